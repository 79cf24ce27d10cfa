"""Ratings: how strong models are, by who beat whom. Bradley-Terry and Elo with bootstrap intervals, win rates, pairs.

Both ratings are on Elo's scale: 400 points are odds of 10 to 1, and the mean over the models is 1500. Neither sees a
difference between "tie" and "both bad": each is half a win for either side.

Shapes: N battles, M models, R bootstrap rounds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy import ndarray

from ...core.figures import INK, ORANGE, interval_errors, saved_figure
from ..intervals import wilson_interval

Verdict = Literal["left", "right", "tie", "both_bad"]

SCORES: dict[Verdict, float] = {"left": 1.0, "right": 0.0, "tie": 0.5, "both_bad": 0.5}  # of the left model
SCALE, MEAN = 400.0, 1500.0
POINTS = SCALE / math.log(10)  # of a natural unit of log-odds
PRIOR = 1.0  # tied battles of every model against one of mean strength: keeps models that never lost finite
BLOCK = 4_000_000  # battles that are drawn at a time: 32 MB an array


class Outcome(NamedTuple):
    """Two models, and what was said of their answers."""

    left: str
    right: str
    verdict: Verdict


# ---------------------------------------------------------------- ratings


def bradley_terry(wins: ndarray) -> ndarray:
    """Ratings that make the battles likeliest: i beats j with probability 1 / (1 + 10 ** ((r_j - r_i) / 400)).

    Args:
        wins: (..., M, M) how often the row's model beat the column's; ties are half a win for both.
    Returns: (..., M). Every model also has tied PRIOR battles with one of mean strength: hardly felt among some dozens
        of battles, it gives models that won or lost all of theirs a finite rating, where the likeliest one is not.
    Source: Bradley and Terry 1952; by Newton's method, the step limited, on the log-posterior, which is concave.
    """
    battles = wins + np.swapaxes(wins, -1, -2)
    # In natural units of log-odds, of all rounds of a bootstrap at once; points only at the end.
    strengths = np.zeros(wins.shape[:-1])
    diagonal = np.arange(wins.shape[-1])
    for _ in range(200):
        likely = _logistic(strengths[..., :, None] - strengths[..., None, :])
        share = _logistic(strengths)
        slope = (wins - battles * likely).sum(-1) + PRIOR * (0.5 - share)
        # Minus the Hessian: rows sum to 0, which has no inverse, but for the prior on the diagonal.
        curvature = -battles * likely * (1 - likely)
        curvature[..., diagonal, diagonal] -= curvature.sum(-1) - PRIOR * share * (1 - share)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        strengths += np.clip(step, -2, 2)  # far from the solution Newton's step may overshoot
        if np.abs(step).max(initial=0) < 1e-10:
            break
    # Only differences mean anything; the mean is a convention.
    return MEAN + POINTS * (strengths - strengths.mean(-1, keepdims=True))


def _logistic(values: ndarray) -> ndarray:
    return 0.5 * (1 + np.tanh(0.5 * values))  # does not overflow


def elo(left: ndarray, right: ndarray, scores: ndarray, num_models: int, k: float = 16.0) -> ndarray:
    """Ratings after the battles in their order, each moving `k` points times what the result was above expectation.

    Args: left, right: (..., N) numbers of the models; scores: (..., N) of the left one: 1, 1/2 or 0.
    Returns: (..., M). Source: Elo 1978.
    """
    ratings = np.full((math.prod(left.shape[:-1]), num_models), MEAN)
    # Battle after battle, since each needs the ratings before it, but in all rounds of a bootstrap at once.
    rows = np.arange(len(ratings))
    columns = (array.reshape(len(rows), -1).T for array in (left, right, scores))
    for one, other, score in zip(*columns, strict=True):
        expected = 1 / (1 + 10 ** ((ratings[rows, other] - ratings[rows, one]) / SCALE))
        change = k * (score - expected)
        ratings[rows, one] += change
        ratings[rows, other] -= change
    return ratings.reshape(*left.shape[:-1], num_models)


def count_wins(left: ndarray, right: ndarray, scores: ndarray, num_models: int) -> ndarray:
    """(..., N) battles -> (..., M, M), as bradley_terry takes them."""
    rounds = math.prod(left.shape[:-1])
    # Every (round, row, column) is a cell with a number of its own: one bincount is quicker than np.add.at.
    start: ndarray = np.arange(rounds).reshape(*left.shape[:-1], 1) * num_models**2
    size, cells = rounds * num_models**2, (start + left * num_models + right).ravel()
    mirrored = (start + right * num_models + left).ravel()
    wins = np.bincount(cells, scores.ravel(), size) + np.bincount(mirrored, 1 - scores.ravel(), size)
    return wins.reshape(*left.shape[:-1], num_models, num_models)


def bootstrap(
    left: ndarray, right: ndarray, scores: ndarray, num_models: int, *, rounds: int, k: float = 16.0, seed: int = 0
) -> tuple[ndarray, ndarray]:
    """Bradley-Terry and Elo ratings, each (R, M), of as many battles drawn from the (N,) given, with replacement.

    Drawing shuffles them too, so the spread of Elo ratings holds what their order does to them.
    """
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // len(left))  # rounds at a time: memory does not grow with their number
    found: list[tuple[ndarray, ndarray]] = []
    for start in range(0, rounds, block):
        drawn = rng.integers(len(left), size=(min(block, rounds - start), len(left)))
        battles = left[drawn], right[drawn], scores[drawn]
        found.append((bradley_terry(count_wins(*battles, num_models)), elo(*battles, num_models, k)))
    strengths, elos = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return strengths, elos


# ---------------------------------------------------------------- figures


def rate_models(battles: Sequence[Outcome], *, rounds: int = 1000, k: float = 16.0, seed: int = 0) -> dict[str, Any]:
    """What arena.json says of some battles: "battles", "models", the strongest first, "pairs" and "groups".

    A model's "rank" is 1 + how many models are stronger in at least 97.5 % of the bootstrap rounds, so models that the
    votes do not tell apart share it. "groups" are the sets of models that battles connect: with more than one,
    ratings of different groups say nothing about each other.
    """
    names = list(dict.fromkeys(name for battle in battles for name in battle[:2]))
    if not battles:
        return {"battles": 0, "models": [], "pairs": [], "groups": []}
    number = {name: place for place, name in enumerate(names)}
    left, right = (np.array([number[battle[side]] for battle in battles]) for side in (0, 1))
    scores = np.array([SCORES[battle.verdict] for battle in battles])
    ratings = bradley_terry(count_wins(left, right, scores, len(names)))
    elos = elo(left, right, scores, len(names), k)
    drawn, drawn_elos = bootstrap(left, right, scores, len(names), rounds=rounds, k=k, seed=seed)
    models = []
    for name, place in number.items():
        # Round by round: the ratings of two models are correlated, so their intervals may overlap and one still lead.
        lead = np.quantile(drawn - drawn[:, place, None], 0.025, axis=0)
        models.append(
            {
                "name": name,
                "rank": 1 + int((lead > 0).sum()),
                "rating": round(float(ratings[place]), 1),
                "rating_interval": _interval(drawn[:, place]),
                "elo": round(float(elos[place]), 1),
                "elo_interval": _interval(drawn_elos[:, place]),
                **count_results(battles, name),
            }
        )
    models.sort(key=lambda model: -model["rating"])
    order = [model["name"] for model in models]
    pairs = count_pairs(battles, order)
    return {"battles": len(battles), "models": models, "pairs": pairs, "groups": find_groups(order, pairs)}


def _interval(samples: ndarray) -> list[float]:
    return [round(float(bound), 1) for bound in np.quantile(samples, [0.025, 0.975])]


def count_results(battles: Sequence[Outcome], name: str) -> dict[str, Any]:
    """A model's battles, wins, losses, ties; "win_rate" is the percentage of wins among wins and losses.

    Its interval is Wilson's, 95 %. Both are None where every battle was a tie.
    """
    seen = Counter[str]()
    for battle in battles:
        if name in battle[:2]:
            seen["battles"] += 1
            side = "left" if battle.left == name else "right"
            # A lost battle is counted under the other side's name, whichever that was.
            seen["wins" if battle.verdict == side else f"{battle.verdict}"] += 1
    wins, losses = seen["wins"], seen["left"] + seen["right"]
    counts = {"battles": seen["battles"], "wins": wins, "losses": losses}
    return {**counts, "ties": seen["tie"], "both_bad": seen["both_bad"], **_win_rate(wins, losses)}


def _win_rate(wins: int, losses: int) -> dict[str, Any]:
    if not wins + losses:
        return {"win_rate": None, "win_rate_interval": None}
    bounds = [round(100 * bound, 2) for bound in wilson_interval(wins, wins + losses)]
    return {"win_rate": round(100 * wins / (wins + losses), 2), "win_rate_interval": bounds}


def count_pairs(battles: Sequence[Outcome], names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs that met, in the order of `names`: wins of the first and of the second, ties, the first's win rate."""
    seen = Counter[tuple[str, str, str]]()
    for battle in battles:
        winner = {"left": battle.left, "right": battle.right}.get(battle.verdict, battle.verdict)
        seen[battle.left, battle.right, winner] += 1
    pairs = []
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            keys = [(first, second), (second, first)]  # whoever stood on the left
            wins, losses, ties, both_bad = (
                sum(seen[key[0], key[1], result] for key in keys) for result in (first, second, "tie", "both_bad")
            )
            if total := wins + losses + ties + both_bad:
                counts = {"battles": total, "wins": [wins, losses], "ties": ties, "both_bad": both_bad}
                pairs.append({"models": [first, second], **counts, **_win_rate(wins, losses)})
    return pairs


def find_groups(names: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The sets of models that are connected by battles, directly or through others."""
    group = {name: {name} for name in names}
    for pair in pairs:
        first, second = (group[name] for name in pair["models"])
        if first is not second:
            first |= second
            group |= dict.fromkeys(second, first)  # one set, shared by all its members
    sets = {id(members): members for members in group.values()}.values()
    return [[name for name in names if name in members] for members in sets]


# ---------------------------------------------------------------- pictures


def plot_ratings(figures: Mapping[str, Any], path: Path) -> None:
    """Draw the ratings with their intervals, Bradley-Terry's as bars and Elo's as dots, into a png."""
    models = figures["models"]
    with saved_figure(path, 7, 0.42 * len(models) + 1.5) as figure:
        axes = figure.subplots()
        places = np.arange(len(models))
        ratings, elos = (np.array([model[kind] for model in models]) for kind in ("rating", "elo"))
        low = min(min(model["rating_interval"][0], model["elo_interval"][0], model["elo"]) for model in models) - 40
        bars: dict[str, Any] = {"height": 0.5, "color": "#8ab3cc", "ecolor": INK, "capsize": 3}
        errors = interval_errors(ratings, [model["rating_interval"] for model in models])
        axes.barh(places - 0.08, ratings - low, left=low, xerr=errors, label="Bradley-Terry", **bars)
        dots: dict[str, Any] = {"fmt": "o", "color": ORANGE, "ms": 5, "capsize": 2, "lw": 1}
        errors = interval_errors(elos, [model["elo_interval"] for model in models])
        axes.errorbar(elos, places + 0.3, xerr=errors, label="Elo", **dots)
        axes.axvline(MEAN, color=INK, lw=0.8, ls=":")
        axes.set_yticks(places, [model["name"] for model in models])
        axes.invert_yaxis()
        axes.set(xlabel=f"rating, 95 % interval ({figures['battles']} battles)", title="Arena")
        axes.set_xlim(left=low)
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="lower right", fontsize=8)


def plot_pairs(figures: Mapping[str, Any], path: Path) -> None:
    """Draw how often each row's model beat each column's, in percent without ties, as a heat map into a png."""
    names = [model["name"] for model in figures["models"]]
    rates, labels = pair_rates(figures)
    size = 0.8 * len(names) + 1.8
    with saved_figure(path, size + 1, size) as figure:
        axes = figure.subplots()
        image = axes.imshow(rates, cmap="RdBu", vmin=0, vmax=100)
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for row, texts in enumerate(labels):
            for column, text in enumerate(texts):
                color = "white" if abs(rates[row, column] - 50) > 35 else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
        axes.set_title("the row's model beats the column's (%), ties left out; battles", fontsize=9)
        figure.colorbar(image, shrink=0.8)


def pair_rates(figures: Mapping[str, Any]) -> tuple[ndarray, list[list[str]]]:
    """(M, M) win rates of the row's models against the column's, NaN where there is none, and what the cells say."""
    places = {model["name"]: place for place, model in enumerate(figures["models"])}
    rates = np.full((len(places), len(places)), np.nan)
    labels = [[""] * len(places) for _ in places]
    for pair in figures["pairs"]:
        row, column = (places[name] for name in pair["models"])
        for place, rate in (((row, column), pair["win_rate"]), ((column, row), _other(pair["win_rate"]))):
            rates[place] = np.nan if rate is None else rate
            labels[place[0]][place[1]] = f"{'–' if rate is None else f'{rate:.0f}'}\n({pair['battles']})"
    return rates, labels


def _other(rate: float | None) -> float | None:
    return None if rate is None else 100 - rate
