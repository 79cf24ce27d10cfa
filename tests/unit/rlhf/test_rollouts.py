"""Experience, batches and their order, against plain loops over single answers."""

import math

import numpy as np
import pytest
import torch

from support.policies import make_rollouts, plain_experience
from utils.rlhf.arguments import PPOArguments
from utils.rlhf.rollouts import (
    build_experience,
    collate,
    gather_answers,
    make_batch,
    minibatches,
    prompt_numbers,
    rollout_seed,
    scatter_answers,
    score_moments,
)
from utils.text.prompts import IGNORE_INDEX

# ---------------------------------------------------------------- experience


def experience_of(rollouts, kl_coef, **ppo_args):
    return build_experience(rollouts, PPOArguments(**ppo_args), kl_coef)


@pytest.mark.parametrize(
    "settings",
    [
        (0.05, "k1", None, False, True, 1.0, 0.95),
        (0.3, "k3", 1.5, False, False, 0.9, 0.8),
        (0.2, "k2", 2.0, True, True, 0.99, 1.0),
        (0.0, "k1", None, True, False, 1.0, 0.0),
    ],
)
def test_experience_equals_a_plain_loop(settings):
    rollouts = make_rollouts()
    names = ("kl_coef", "kl_estimator", "score_clip", "whiten_scores", "whiten_advantages", "gamma", "lam")
    experience = experience_of(rollouts, **dict(zip(names, settings, strict=True)))
    advantages, returns, kl = plain_experience(rollouts, *settings)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.answer)
        assert experience.mask[row].tolist() == [place < length for place in range(experience.mask.shape[1])]
        for got, expected in ((experience.advantages, advantages), (experience.returns, returns), (experience.kl, kl)):
            torch.testing.assert_close(got[row, :length], torch.tensor(expected[row]), rtol=1e-5, atol=1e-6)
            assert not got[row, length:].any()
        assert torch.equal(experience.values[row, :length], rollout.values)
        assert torch.equal(experience.logprobs[row, :length], rollout.logprobs)
    sums = [sum((r.logprobs - r.ref_logprobs).tolist()) for r in rollouts]
    assert experience.kl_of_answer == pytest.approx(sum(sums) / len(sums), abs=1e-6)
    entropies = [value for rollout in rollouts for value in rollout.entropies.tolist()]
    assert experience.entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-6)
    assert len(experience) == 7


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_without_a_critic_an_answer_is_compared_with_the_others_to_its_prompt(gamma):
    rollouts = make_rollouts(7)
    for number, rollout in enumerate(rollouts):
        rollout.prompt = [[5, 6], [7], [8]][[0, 1, 0, 0, 1, 2, 0][number]]  # groups of 4, 2 and 1, mixed
    settings = {"gamma": gamma, "whiten_advantages": False, "critic": "group"}
    experience = experience_of(rollouts, kl_coef=0.3, **settings)
    gains = []  # the discounted reward from each token on
    for rollout in rollouts:
        rewards = [
            -0.3 * (own - other).item() for own, other in zip(rollout.logprobs, rollout.ref_logprobs, strict=True)
        ]
        rewards[-1] += rollout.score
        gains.append([sum(gamma**i * r for i, r in enumerate(rewards[t:])) for t in range(len(rewards))])
    for row, rollout in enumerate(rollouts):
        others = [gains[n][0] for n, o in enumerate(rollouts) if o.prompt == rollout.prompt and n != row]
        baseline = sum(others) / len(others) if others else 0.0
        expected = torch.tensor([gain - baseline for gain in gains[row]])
        torch.testing.assert_close(experience.advantages[row, : len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert not experience.advantages[row, len(expected) :].any()


def test_answers_that_earn_the_same_move_nothing():
    rollouts = make_rollouts(4)
    for rollout in rollouts:
        rollout.prompt, rollout.score = [5, 6], 2.5
    experience = experience_of(rollouts, kl_coef=0.0, critic="group", whiten_advantages=False)
    assert experience.advantages.abs().max() < 1e-6
    learned = experience_of(rollouts, kl_coef=0.0, whiten_advantages=False)
    assert learned.advantages.abs().max() > 0.1  # a critic that knows nothing yet praises every one


def test_more_kl_means_less_reward():
    """The sign: a policy that has left its reference is pulled back."""
    rollouts = make_rollouts(2)
    for rollout in rollouts:
        rollout.logprobs = rollout.ref_logprobs + 1
    near = experience_of(rollouts, kl_coef=0.0, whiten_advantages=False, lam=1.0)
    far = experience_of(rollouts, kl_coef=0.5, whiten_advantages=False, lam=1.0)
    for row, rollout in enumerate(rollouts):
        cost = (near.returns - far.returns)[row, : len(rollout.answer)]
        expected = 0.5 * torch.arange(len(rollout.answer), 0, -1)
        torch.testing.assert_close(cost, expected.float(), rtol=1e-5, atol=1e-5)
    assert far.kl_of_answer > 0


@pytest.mark.parametrize("name", ["score", "logprobs", "ref_logprobs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(name, bad):
    rollouts = make_rollouts(3)
    if name == "score":
        rollouts[1].score = bad
    else:
        getattr(rollouts[1], name)[0] = bad
    with pytest.raises(ValueError, match="not finite"):
        experience_of(rollouts, kl_coef=0.1)


def test_a_single_answer_of_a_single_token():
    (rollout,) = make_rollouts(1, longest=1)
    experience = experience_of([rollout], kl_coef=0.1, whiten_scores=True, whiten_advantages=True)
    assert experience.advantages.tolist() == [[0.0]]  # nothing to compare with
    assert torch.isfinite(experience.returns).all()


def test_score_moments():
    rollouts = make_rollouts()
    scores = np.array([rollout.score for rollout in rollouts])
    mean, deviation = score_moments(rollouts)
    assert mean == pytest.approx(scores.mean(), abs=1e-6) and deviation == pytest.approx(scores.std(ddof=1), abs=1e-6)
    assert score_moments(rollouts[:1])[1] == 0


# ---------------------------------------------------------------- batches


SEQUENCES = [([1, 5, 9], [30, 31, 2]), ([7], [40]), ([8, 9, 10, 11], [50, 51, 52, 53, 54])]


def test_collate_lays_out_prompts_and_answers():
    batch, places = collate(SEQUENCES, pad_token_id=77)
    assert batch["input_ids"].tolist() == [
        [1, 5, 9, 30, 31, 2, 77, 77, 77],
        [7, 40, 77, 77, 77, 77, 77, 77, 77],
        [8, 9, 10, 11, 50, 51, 52, 53, 54],
    ]
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 1, 2],
        [0, 1, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
    ]
    none = IGNORE_INDEX
    assert batch["targets"].tolist() == [
        [none, none, 30, 31, 2, none, none, none, none],
        [40, none, none, none, none, none, none, none, none],
        [none, none, none, 50, 51, 52, 53, 54, none],
    ]
    assert places.tolist() == [[2, 3, 4, -1, -1], [0, -1, -1, -1, -1], [3, 4, 5, 6, 7]]
    assert [batch["targets"][row][places[row][places[row] >= 0]].tolist() for row in range(3)] == [
        answer for _, answer in SEQUENCES
    ]


def test_gathering_and_scattering_undo_each_other():
    batch, places = collate(SEQUENCES, pad_token_id=0)
    length = batch["input_ids"].shape[1]
    values = torch.randn(3, length, dtype=torch.float64)
    rows = gather_answers(values, places)
    assert [len(row) for row in rows] == [3, 1, 5]
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    back = scatter_answers(table, places, length)
    scored = batch["targets"] != IGNORE_INDEX
    assert torch.equal(back[scored], values[scored].float()) and not back[~scored].any()
    wide = torch.cat([table, torch.full((3, 4), 9.0)], 1)  # a table of the whole iteration is wider than its batch
    assert torch.equal(scatter_answers(wide, places, length), back)


def test_a_batch_holds_its_rollouts_experience():
    rollouts = make_rollouts(9)
    experience = experience_of(rollouts, kl_coef=0.1)
    numbers = [4, 0, 7]
    batch = make_batch(experience, numbers, pad_token_id=0)
    for row, number in enumerate(numbers):
        rollout = rollouts[number]
        start, length = len(rollout.prompt), len(rollout.answer)
        assert batch["input_ids"][row, : start + length].tolist() == [*rollout.prompt, *rollout.answer]
        for key, table in (
            ("old_logprobs", experience.logprobs),
            ("old_values", experience.values),
            ("advantages", experience.advantages),
            ("returns", experience.returns),
        ):
            assert torch.equal(batch[key][row, start - 1 : start - 1 + length], table[number, :length])
            assert not batch[key][row, start - 1 + length :].any() and not batch[key][row, : start - 1].any()


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("size", [4, 8, 16])
def test_minibatches_cover_everything_once_whatever_the_processes(size):
    experience = experience_of(make_rollouts(16), kl_coef=0.1)
    steps = {}
    for world in (1, 2, 4):
        per_process = [list(minibatches(experience, size, 2, (7, 3, 0), rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in per_process}) == 1
        steps[world] = []
        for batches in zip(*per_process, strict=True):
            assert len({len(micro) for micro in batches}) == 1, "every process takes part as often"
            assert all(len(numbers) <= 2 for micro in batches for numbers in micro)
            steps[world].append(sorted(number for micro in batches for numbers in micro for number in numbers))
        assert sorted(number for step in steps[world] for number in step) == list(range(16))
        assert all(len(step) == size for step in steps[world])
    assert steps[1] == steps[2] == steps[4]


def test_minibatches_are_shuffled_by_their_seed_and_sorted_within():
    rollouts = make_rollouts(16)
    experience = experience_of(rollouts, kl_coef=0.1)
    one, again, other = (list(minibatches(experience, 8, 4, seed, 0, 1)) for seed in ((1, 2, 0), (1, 2, 0), (1, 2, 1)))
    assert one == again != other
    for micro in one:
        lengths = [len(rollouts[n].prompt) + len(rollouts[n].answer) for numbers in micro for n in numbers]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("batch_size", "num_prompts"), [(4, 10), (8, 3), (5, 5), (3, 1)])
def test_prompt_numbers_are_endless_shuffled_passes(batch_size, num_prompts):
    steps = 12
    stream = [n for step in range(steps) for n in prompt_numbers(step, batch_size, num_prompts, seed=5)]
    assert len(stream) == steps * batch_size
    passes = [stream[start : start + num_prompts] for start in range(0, len(stream), num_prompts)]
    for order in passes[:-1]:
        assert sorted(order) == list(range(num_prompts))
    if num_prompts > 3:
        assert len({tuple(order) for order in passes[:-1]}) > 1
        assert stream != [n for step in range(steps) for n in prompt_numbers(step, batch_size, num_prompts, seed=6)]
    assert prompt_numbers(7, batch_size, num_prompts, 5) == stream[7 * batch_size : 8 * batch_size]


def test_every_answer_has_random_numbers_of_its_own():
    seeds = {rollout_seed(seed, step, n) for seed in (1, 2) for step in (0, 1, 1 << 40) for n in range(50)}
    assert len(seeds) == 300 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert rollout_seed(1, 2, 3) == rollout_seed(1, 2, 3)
    torch.Generator().manual_seed(max(seeds))
