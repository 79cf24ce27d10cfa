"""ratings: against plain loops in pure Python, votes whose strengths are known, and figures by hand."""

import math
import random

import numpy as np
import pytest

from utils.evaluation.arena import ratings
from utils.evaluation.arena.ratings import (
    Outcome,
    bootstrap,
    bradley_terry,
    count_wins,
    elo,
    plot_pairs,
    plot_ratings,
    rate_models,
)
from utils.evaluation.intervals import wilson_interval

TRUE = {"a": 1700, "b": 1580, "c": 1500, "d": 1420, "e": 1300}  # their mean is 1500


def chance(one, other):
    return 1 / (1 + 10 ** ((other - one) / 400))


def simulate(count, seed, strengths=TRUE):
    """Votes without ties by models of these strengths; pairs and sides at random."""
    rng, battles = random.Random(seed), []
    for _ in range(count):
        left, right = rng.sample(list(strengths), 2)
        won = rng.random() < chance(strengths[left], strengths[right])
        battles.append(Outcome(left, right, "left" if won else "right"))
    return battles


def ascend(battles, names, steps=4000, rate=0.05):
    """Bradley-Terry by gradient ascent on the log-likelihood of every vote, with a tie against strength 0 for each."""
    strength = dict.fromkeys(names, 0.0)
    for _ in range(steps):
        slope = {name: 0.5 - 1 / (1 + math.exp(-strength[name])) for name in names}
        for left, right, verdict in battles:
            likely = 1 / (1 + math.exp(strength[right] - strength[left]))
            score = {"left": 1, "right": 0}.get(verdict, 0.5)
            slope[left] += score - likely
            slope[right] -= score - likely
        for name in names:
            strength[name] += rate * slope[name]
    mean = sum(strength.values()) / len(names)
    return {name: 1500 + 400 / math.log(10) * (value - mean) for name, value in strength.items()}


def by_name(figures, field):
    return {model["name"]: model[field] for model in figures["models"]}


# ---------------------------------------------------------------- Bradley-Terry


def test_bradley_terry_is_where_gradient_ascent_ends():
    battles = simulate(60, 1)
    battles += [Outcome("a", "c", "tie"), Outcome("b", "e", "both_bad"), Outcome("d", "a", "tie")]
    found = by_name(rate_models(battles, rounds=2), "rating")
    assert found == pytest.approx(ascend(battles, list(TRUE)), abs=0.06)  # figures have one decimal


def test_known_strengths_lie_in_their_intervals():
    figures = rate_models(simulate(3000, 2), rounds=400)
    for name, (low, high) in by_name(figures, "rating_interval").items():
        assert low < TRUE[name] < high and high - low < 60, name
    assert list(by_name(figures, "rank").items()) == [(name, place) for place, name in enumerate(TRUE, 1)]


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    inside = total = 0
    for seed in range(300):
        intervals = by_name(rate_models(simulate(400, 1000 + seed), rounds=300), "rating_interval")
        inside += sum(low <= TRUE[name] <= high for name, (low, high) in intervals.items())
        total += len(TRUE)
    assert 0.93 < inside / total < 0.97


def test_two_models_by_the_closed_form():
    """30 of 40: odds of 3 to 1, were it not for the prior, which gives away less than 2 %."""
    wins = np.array([[0.0, 30.0], [10.0, 0.0]])
    low, high = sorted(bradley_terry(wins))
    assert low + high == pytest.approx(3000) and 0.97 < (high - low) / (400 * math.log10(3)) < 1
    many = sorted(bradley_terry(1000 * wins))
    assert many[1] - many[0] == pytest.approx(400 * math.log10(3), abs=0.05)


def test_batches_are_what_single_ones_are():
    rng = np.random.default_rng(3)
    wins = rng.integers(0, 9, size=(7, 4, 4)).astype(float)
    wins[:, range(4), range(4)] = 0
    assert np.allclose(bradley_terry(wins), [bradley_terry(single) for single in wins], atol=1e-6)


def test_models_that_never_lost_have_a_finite_rating():
    few, many = ([Outcome("a", "b", "left")] * count + [Outcome("b", "c", "left")] * count for count in (2, 40))
    spans = []
    for battles in (few, many):
        figures = rate_models(battles, rounds=50)
        assert list(by_name(figures, "rating")) == ["a", "b", "c"]
        assert all(math.isfinite(bound) for model in figures["models"] for bound in model["rating_interval"])
        spans.append(figures["models"][0]["rating"] - figures["models"][2]["rating"])
    assert 0 < spans[0] < spans[1] < 4000


# ---------------------------------------------------------------- Elo


def plain_elo(battles, k):
    rating = {}
    for left, right, verdict in battles:
        one, other = rating.setdefault(left, 1500.0), rating.setdefault(right, 1500.0)
        score = {"left": 1, "right": 0, "tie": 0.5, "both_bad": 0.5}[verdict]
        rating[left] = one + k * (score - chance(one, other))
        rating[right] = other + k * ((1 - score) - chance(other, one))
    return rating


def test_elo_is_the_plain_loop():
    battles = [*simulate(300, 4), Outcome("a", "e", "tie"), Outcome("e", "b", "both_bad")]
    random.Random(0).shuffle(battles)
    for k in (4, 16, 32.0):
        found = by_name(rate_models(battles, rounds=2, k=k), "elo")
        assert found == pytest.approx(plain_elo(battles, k), abs=0.051)


def test_one_vote_between_equals_moves_half_of_k():
    assert elo(np.array([0]), np.array([1]), np.array([1.0]), 3).tolist() == [1508, 1492, 1500]
    rounds = elo(np.array([[0], [1]]), np.array([[1], [0]]), np.array([[1.0], [0.5]]), 2, k=32)
    assert rounds.tolist() == [[1516, 1484], [1500, 1500]]


# ---------------------------------------------------------------- the bootstrap


def test_bootstrap_draws_votes_with_replacement():
    """Each round against a loop over votes drawn by the same generator."""
    battles = simulate(40, 5)
    names = list(TRUE)
    left, right = (np.array([names.index(battle[side]) for battle in battles]) for side in (0, 1))
    scores = np.array([float(battle.verdict == "left") for battle in battles])
    strengths, elos = bootstrap(left, right, scores, 5, rounds=3, k=8, seed=9)
    rng = np.random.default_rng(9)
    for number, drawn in enumerate(rng.integers(40, size=(3, 40))):
        chosen = [battles[place] for place in drawn]
        assert strengths[number] == pytest.approx(list(ascend(chosen, names).values()), abs=1e-3)
        assert elos[number] == pytest.approx([plain_elo(chosen, 8).get(name, 1500) for name in names])


def test_blocks_change_nothing(monkeypatch):
    battles = simulate(50, 6)
    whole = rate_models(battles, rounds=30, seed=1)
    monkeypatch.setattr(ratings, "BLOCK", 350)  # 7 rounds at a time
    assert rate_models(battles, rounds=30, seed=1) == whole
    assert rate_models(battles, rounds=30, seed=2) != whole


# ---------------------------------------------------------------- ties and counts


def test_ties_are_half_a_win_for_ratings_and_nothing_for_win_rates():
    decided = [Outcome("a", "b", "left")] * 3 + [Outcome("b", "a", "left")]
    halves = [[Outcome("a", "b", "left"), Outcome("a", "b", "right")], [Outcome("a", "b", "tie")] * 2]
    halves += [[Outcome("b", "a", "both_bad")] * 2]
    figures = [rate_models(decided + added, rounds=2) for added in halves]
    assert by_name(figures[0], "rating") == by_name(figures[1], "rating") == by_name(figures[2], "rating")
    rates = [by_name(one, "win_rate") for one in figures]
    assert rates == [{"a": 66.67, "b": 33.33}, {"a": 75.0, "b": 25.0}, {"a": 75.0, "b": 25.0}]


def test_counts_by_hand():
    battles = [
        Outcome("a", "b", "left"),
        Outcome("b", "a", "left"),
        Outcome("b", "a", "right"),
        Outcome("a", "c", "tie"),
        Outcome("c", "a", "both_bad"),
        Outcome("c", "b", "right"),
    ]
    figures = rate_models(battles, rounds=5)
    found = {model["name"]: model for model in figures["models"]}
    counts = ("battles", "wins", "losses", "ties", "both_bad")
    assert [found["a"][name] for name in counts] == [5, 2, 1, 1, 1]
    assert [found["b"][name] for name in counts] == [4, 2, 2, 0, 0]
    assert [found["c"][name] for name in counts] == [3, 0, 1, 1, 1]
    assert found["a"]["win_rate"] == 66.67
    assert found["a"]["win_rate_interval"] == [round(100 * bound, 2) for bound in wilson_interval(2, 3)]
    pairs = {frozenset(pair["models"]): pair for pair in figures["pairs"]}
    first = pairs[frozenset("ab")]
    assert dict(zip(first["models"], first["wins"], strict=True)) == {"a": 2, "b": 1} and first["battles"] == 3
    tied = pairs[frozenset("ac")]
    assert (tied["ties"], tied["both_bad"], tied["wins"], tied["win_rate"]) == (1, 1, [0, 0], None)
    assert figures["battles"] == 6 and len(figures["groups"]) == 1
    wins = count_wins(np.array([0, 1]), np.array([1, 2]), np.array([1.0, 0.5]), 3)
    assert wins.tolist() == [[0, 1, 0], [0, 0, 0.5], [0, 0.5, 0]]


def test_models_that_the_votes_do_not_tell_apart_share_a_rank():
    even = [Outcome("a", "b", "left"), Outcome("a", "b", "right")] * 10
    figures = rate_models(even + [Outcome("a", "c", "left")] * 30 + [Outcome("c", "b", "right")] * 30, rounds=200)
    assert by_name(figures, "rank") == {"a": 1, "b": 1, "c": 3}


def test_models_that_no_battle_connects_are_told():
    battles = [Outcome("a", "b", "left"), Outcome("c", "d", "right"), Outcome("e", "d", "tie")]
    groups = rate_models(battles, rounds=2)["groups"]
    assert sorted(map(sorted, groups)) == [["a", "b"], ["c", "d", "e"]]


def test_no_battle_is_no_error():
    assert rate_models([]) == {"battles": 0, "models": [], "pairs": [], "groups": []}


@pytest.mark.slow
def test_pictures(tmp_path):
    battles = [*simulate(80, 7), Outcome("模型", "a", "tie")]  # Chinese names, and a pair without a win
    figures = rate_models(battles, rounds=20)
    plot_ratings(figures, tmp_path / "ratings.png")
    plot_pairs(figures, tmp_path / "pairs.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("ratings.png", "pairs.png"))
