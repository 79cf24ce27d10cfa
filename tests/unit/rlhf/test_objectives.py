"""Formulas against plain-Python loops, finite differences, their known properties, and TRL's own code.

The comparisons with TRL run its code in another Python, named by environment variables, and are skipped without:
  TRL_PYTHON      a Python with current TRL (pip install trl; 1.16 was used): DPO, IPO, hinge, reward model
  OLD_TRL_PYTHON  a Python with the last TRL that has PPO's parts as methods (pip install trl==0.11.4
                  transformers==4.45.2 datasets==3.0.2 accelerate==0.34.2 rich): PPO, GAE, all preference losses
"""

import importlib.util
import math
import os
import random
import subprocess
import sys
from decimal import Decimal, localcontext
from types import SimpleNamespace

import pytest
import torch

from utils.rlhf import objectives

NAN = float("nan")
MASKS = ["holes", "right", "left", "one", "empty_row", "empty", "full"]


def make_mask(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """(rows, columns) bool: answers with gaps, padded on a side, of one token, a row without any, none at all, all."""
    chance = random.Random(f"{kind}{seed}")
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        length = chance.randint(1, columns)
        if kind == "holes":
            mask[row] = torch.tensor([chance.random() < 0.5 for _ in range(columns)])
        elif kind == "right" or (kind == "empty_row" and row != 1):
            mask[row, :length] = True
        elif kind == "left":
            mask[row, -length:] = True
        elif kind == "one":
            mask[row, length - 1] = True
        elif kind == "full":
            mask[row] = True
    return mask


def normal(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale + shift


def spoiled(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values with NaN outside the mask: nothing there may be used."""
    return values.masked_fill(~mask, NAN)


def inside(values: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """The masked values as plain numbers, row by row."""
    return [
        v
        for row, kept in zip(values.tolist(), mask.tolist(), strict=True)
        for v, k in zip(row, kept, strict=True)
        if k
    ]


def close(got, expected, tolerance: float = 1e-6) -> None:
    got, expected = torch.as_tensor(got).double(), torch.as_tensor(expected, dtype=torch.float64)
    assert got.shape == expected.shape
    assert torch.isfinite(got).all(), got
    error = (got - expected).abs() / expected.abs().clamp(min=1)
    assert not error.numel() or error.max() <= tolerance, (got, expected)


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def variance(numbers: list[float]) -> float:
    return sum((x - mean(numbers)) ** 2 for x in numbers) / max(1, len(numbers) - 1)


def softplus(x: float) -> float:
    """-log sigmoid(-x) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


# ---------------------------------------------------------------- masked statistics


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("seed", range(3))
def test_masked_mean_and_whitening_equal_loops(kind, seed):
    mask = make_mask(kind, 4, 7, seed)
    values = normal(4, 7, seed=seed, scale=3, shift=-2)
    used = spoiled(values, mask)
    kept = inside(values, mask)
    close(objectives.masked_mean(used, mask), mean(kept))
    close(objectives.masked_mean(used, mask, count=9), sum(kept) / 9)
    got_mean, got_variance = objectives.masked_moments(used, mask)
    close(got_mean, mean(kept))
    close(got_variance, variance(kept))
    expected = [
        [(v - mean(kept)) / math.sqrt(variance(kept) + 1e-8) if k else 0.0 for v, k in zip(r, m, strict=True)]
        for r, m in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    close(objectives.masked_whiten(used, mask), expected)
    close(objectives.masked_whiten(used, mask.float()), expected)  # a mask of numbers is as good


def test_whitened_values_have_mean_0_and_std_1():
    mask = make_mask("holes", 16, 50)
    whitened = objectives.masked_whiten(normal(16, 50, seed=1, scale=40, shift=1e4).float(), mask)
    assert abs(whitened[mask].mean().item()) < 1e-4
    assert abs(whitened[mask].std().item() - 1) < 1e-4


def test_equal_values_whiten_to_zero():
    mask = make_mask("right", 3, 5)
    assert objectives.masked_whiten(torch.full((3, 5), 7.0), mask).abs().max() == 0


@pytest.mark.parametrize("kind", ["holes", "right", "full", "empty_row"])
def test_explained_variance(kind):
    mask = make_mask(kind, 4, 6)
    values, returns = normal(4, 6, seed=1), normal(4, 6, seed=2)
    kept = inside(returns, mask)
    errors = [r - v for r, v in zip(kept, inside(values, mask), strict=True)]
    expected = 1 - variance(errors) / variance(kept)
    close(objectives.explained_variance(spoiled(values, mask), spoiled(returns, mask), mask), expected)
    assert objectives.explained_variance(returns, returns, mask) == 1
    assert abs(objectives.explained_variance(torch.ones(4, 6), returns.float(), mask)) < 1e-6
    assert math.isnan(objectives.explained_variance(values, torch.ones(4, 6, dtype=torch.float64), mask))


# ---------------------------------------------------------------- KL and token rewards


def test_kl_estimators_equal_loops():
    policy, reference = -normal(3, 8, seed=1).abs() * 3, -normal(3, 8, seed=2).abs() * 3
    policy[0, 0], reference[0, 0] = -1.0, -1.0
    policy[0, 1], reference[0, 1] = -1.0, -1.0 - 1e-9  # r - 1 would have no digits left
    policy[0, 2], reference[0, 2] = -1e-3, -90.0
    ratios = [
        [r - p for p, r in zip(a, b, strict=True)] for a, b in zip(policy.tolist(), reference.tolist(), strict=True)
    ]
    close(objectives.kl_per_token(policy, reference, "k1"), [[-x for x in row] for row in ratios])
    close(objectives.kl_per_token(policy, reference, "k2"), [[x * x / 2 for x in row] for row in ratios])
    close(objectives.kl_per_token(policy, reference, "k3"), [[math.expm1(x) - x for x in row] for row in ratios])
    # Near r = 1 float32 has digits left too, and the sign is right.
    small = [1e-4, -1e-4, 3e-4, -1e-3, 2e-3]
    estimates = objectives.kl_per_token(torch.zeros(1, 5), torch.tensor([small]), "k3")[0].tolist()
    assert all(abs(got / (math.expm1(x) - x) - 1) < 0.01 for got, x in zip(estimates, small, strict=True)), estimates
    assert torch.isfinite(objectives.kl_per_token(torch.tensor([[-500.0]]), torch.tensor([[-0.1]]), "k3")).all()
    with pytest.raises(ValueError, match="got 'k4', need one of k1, k2, k3"):
        objectives.kl_per_token(policy, reference, "k4")


def test_kl_estimators_are_unbiased_on_samples():
    count = 200_000
    policy, reference = torch.log_softmax(normal(12, seed=1), 0), torch.log_softmax(normal(12, seed=2), 0)
    drawn = torch.multinomial(policy.exp(), count, replacement=True, generator=torch.Generator().manual_seed(0))
    true = (policy.exp() * (policy - reference)).sum().item()
    expected = {"k1": true, "k2": (policy.exp() * (policy - reference).square() / 2).sum().item(), "k3": true}
    spread = {}
    for estimator, value in expected.items():
        samples = objectives.kl_per_token(policy[drawn], reference[drawn], estimator)
        spread[estimator] = samples.std().item()
        assert abs(samples.mean().item() - value) < 4 * spread[estimator] / math.sqrt(count), estimator
    assert spread["k3"] < spread["k1"]


def test_kl_controllers():
    fixed = objectives.FixedKL(0.3)
    fixed.update(100.0, 64)
    assert fixed.value == 0.3
    adaptive, expected = objectives.AdaptiveKL(0.2, target=6.0, horizon=1000.0), 0.2
    for kl, episodes in [(60.0, 100), (0.0, 100), (6.0, 100), (6.6, 50), (-3.0, 10), (5.7, 64)]:
        adaptive.update(kl, episodes)
        error = kl / 6.0 - 1
        error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
        expected *= 1 + error * episodes / 1000
        assert abs(adaptive.value - expected) < 1e-12
    with pytest.raises(ValueError, match="mean KL to the reference: got nan"):
        adaptive.update(NAN, 1)
    for wrong in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="target of the adaptive KL"):
            objectives.AdaptiveKL(0.2, target=wrong, horizon=10)
        with pytest.raises(ValueError, match="horizon of the adaptive KL"):
            objectives.AdaptiveKL(0.2, target=6, horizon=wrong)


@pytest.mark.parametrize("kind", MASKS)
def test_token_rewards_equal_loops(kind):
    mask, kl, scores = make_mask(kind, 4, 6), normal(4, 6, seed=5), normal(4, seed=6, scale=2)
    expected = [[0.0] * 6 for _ in range(4)]
    for i in range(4):
        answer = [t for t in range(6) if mask[i, t]]
        for t in answer:
            expected[i][t] = -0.15 * kl[i, t].item()
        if answer:
            expected[i][answer[-1]] += scores[i].item()
    close(objectives.token_rewards(scores, spoiled(kl, mask), mask, 0.15), expected)
    close(objectives.token_rewards(scores, spoiled(kl, mask), mask.long(), 0.15), expected)


# ---------------------------------------------------------------- PPO


def loop_gae(rewards, values, mask, gamma, lam):
    """The definition: sums of discounted temporal differences over the answer's own tokens, without recursion."""
    rows, columns = mask.shape
    advantages, returns = [[0.0] * columns for _ in range(rows)], [[0.0] * columns for _ in range(rows)]
    for i in range(rows):
        steps = [t for t in range(columns) if mask[i, t]]
        reward, value = [rewards[i, t].item() for t in steps], [values[i, t].item() for t in steps] + [0.0]
        deltas = [reward[k] + gamma * value[k + 1] - value[k] for k in range(len(steps))]
        for k, t in enumerate(steps):
            advantages[i][t] = sum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(steps)))
            returns[i][t] = advantages[i][t] + value[k]
    return advantages, returns


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (0.9, 0.0), (0.9, 1.0), (0.0, 0.5)])
def test_gae_equals_its_definition(kind, gamma, lam):
    mask, rewards, values = make_mask(kind, 4, 7), normal(4, 7, seed=7), normal(4, 7, seed=8)
    advantages, returns = objectives.gae(spoiled(rewards, mask), spoiled(values, mask), mask, gamma, lam)
    expected_advantages, expected_returns = loop_gae(rewards, values, mask, gamma, lam)
    close(advantages, expected_advantages)
    close(returns, expected_returns)


def test_gae_with_lambda_1_is_discounted_return_minus_value():
    mask, rewards, values = make_mask("holes", 5, 20), normal(5, 20, seed=9), normal(5, 20, seed=10)
    advantages, returns = objectives.gae(rewards, values, mask, gamma=0.97, lam=1.0)
    for i in range(5):
        steps = [t for t in range(20) if mask[i, t]]
        for k, t in enumerate(steps):
            discounted = sum(0.97 ** (j - k) * rewards[i, steps[j]].item() for j in range(k, len(steps)))
            assert abs(returns[i, t].item() - discounted) < 1e-9
            assert abs(advantages[i, t].item() - (discounted - values[i, t].item())) < 1e-9


def test_gae_with_lambda_0_is_the_temporal_difference_and_empty_answers_pass():
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]])
    advantages, _ = objectives.gae(rewards, values, torch.ones(1, 2), gamma=0.5, lam=0.0)
    close(advantages, [[1 + 0.5 * -1 - 0.5, 2 - -1]])
    assert objectives.gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0))[0].shape == (2, 0)


def loop_policy_loss(logprobs, old, advantages, mask, clip):
    losses, clips, kls = [], [], []
    columns = [inside(tensor, mask) for tensor in (logprobs, old, advantages)]
    for new, before, advantage in zip(*columns, strict=True):
        ratio = math.exp(new - before)
        plain, clipped = ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage
        losses.append(-min(plain, clipped))
        clips.append(1.0 if clipped < plain else 0.0)
        kls.append(ratio - 1 - (new - before))
    return losses, clips, kls


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_policy_loss_equals_loops(kind, clip):
    mask, old, advantages = make_mask(kind, 4, 6), normal(4, 6, seed=11), normal(4, 6, seed=12)
    logprobs = old + normal(4, 6, seed=13, scale=0.3)
    losses, clips, kls = loop_policy_loss(logprobs, old, advantages, mask, clip)
    arguments = [spoiled(tensor, mask) for tensor in (logprobs, old, advantages)]
    loss, statistics = objectives.ppo_policy_loss(*arguments, mask, clip)
    close(loss, mean(losses))
    close(statistics["clip_fraction"], mean(clips))
    close(statistics["approx_kl"], mean(kls))
    loss, statistics = objectives.ppo_policy_loss(*arguments, mask, clip, count=50)
    close(loss, sum(losses) / 50)
    close(statistics["clip_fraction"], sum(clips) / 50)


@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("log_ratio", [-1e4, -200.0, -0.5, 0.0, 0.5, 200.0, 1e4])
def test_policy_loss_stays_finite(advantage, log_ratio):
    logprobs = torch.tensor([[log_ratio, NAN]], requires_grad=True)
    loss, statistics = objectives.ppo_policy_loss(
        logprobs, torch.zeros(1, 2), torch.tensor([[advantage, NAN]]), torch.tensor([[1, 0]])
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()
    assert all(torch.isfinite(value) for value in statistics.values())
    # Clipping cuts the gradient only where the step has already been taken.
    moved = (advantage > 0 and log_ratio > 0.2) or (advantage < 0 and log_ratio < -0.25)
    if moved or advantage == 0:
        assert logprobs.grad.abs().max() == 0
    elif abs(log_ratio) < 1:
        close(logprobs.grad[0, 0], -advantage * math.exp(log_ratio))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
def test_value_loss_equals_loops(kind, clip):
    mask, old, returns = make_mask(kind, 4, 6), normal(4, 6, seed=14), normal(4, 6, seed=15)
    values = old + normal(4, 6, seed=16, scale=0.5)
    losses, clips = [], []
    for value, before, target in zip(*(inside(tensor, mask) for tensor in (values, old, returns)), strict=True):
        plain = (value - target) ** 2
        clipped = plain if clip is None else (min(max(value, before - clip), before + clip) - target) ** 2
        losses.append(max(plain, clipped) / 2)
        clips.append(1.0 if clipped > plain else 0.0)
    arguments = [spoiled(tensor, mask) for tensor in (values, old, returns)]
    loss, fraction = objectives.value_loss(*arguments, mask, clip)
    close(loss, mean(losses))
    close(fraction, mean(clips))
    close(objectives.value_loss(*arguments, mask, clip, count=50)[0], sum(losses) / 50)


def test_losses_and_gradients_of_parts_add_up_to_the_whole():
    mask, old, advantages = make_mask("holes", 6, 8), normal(6, 8, seed=17), normal(6, 8, seed=18)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    gradients, totals = [], []
    for rows in ([slice(0, 6)], parts):
        logprobs = (old + normal(6, 8, seed=19, scale=0.3)).requires_grad_()
        total = 0.0
        for part in rows:
            arguments = (logprobs[part], old[part], advantages[part], mask[part])
            loss = (
                objectives.ppo_policy_loss(*arguments, count=mask.sum())[0]
                + objectives.value_loss(*arguments, count=mask.sum())[0]
            )
            loss.backward()
            total += loss.item()
        gradients.append(logprobs.grad)
        totals.append(total)
    close(gradients[0], gradients[1], 1e-12)
    assert abs(totals[0] - totals[1]) < 1e-12


# ---------------------------------------------------------------- reward model and preference losses

EXTREMES = [(0.0, 0.0), (500.0, -500.0), (-500.0, 500.0), (1e4, 1e4), (-1e4, -1e4 + 1), (1e-8, 0.0), (3.0, 3.0)]


def pairs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, rejected = normal(20, seed=seed, scale=3), normal(20, seed=seed + 100, scale=3)
    return (
        torch.cat([chosen, torch.tensor([c for c, _ in EXTREMES], dtype=torch.float64)]),
        torch.cat([rejected, torch.tensor([r for _, r in EXTREMES], dtype=torch.float64)]),
    )


def test_reward_model_loss_equals_loops():
    chosen, rejected = pairs(20)
    margin = normal(len(chosen), seed=21).abs()
    columns = list(zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True))
    close(objectives.reward_model_loss(chosen, rejected), [softplus(r - c) for c, r, _ in columns])
    close(objectives.reward_model_loss(chosen, rejected, margin), [softplus(r + m - c) for c, r, m in columns])
    close(
        objectives.reward_model_loss(chosen, rejected, margin, 0.01),
        [softplus(r + m - c) + 0.01 * (c + r) ** 2 for c, r, m in columns],
    )


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_preference_losses_with_reference_equal_loops(beta):
    chosen, rejected = pairs(23)
    ref_chosen, ref_rejected = normal(len(chosen), seed=24, scale=3), normal(len(chosen), seed=25, scale=3)
    tensors = (chosen, rejected, ref_chosen, ref_rejected)
    gaps = [(c - rc) - (r - rr) for c, r, rc, rr in zip(*(tensor.tolist() for tensor in tensors), strict=True)]
    close(objectives.dpo_loss(*tensors, beta), [softplus(-beta * h) for h in gaps])
    close(
        objectives.dpo_loss(*tensors, beta, label_smoothing=0.2),
        [0.8 * softplus(-beta * h) + 0.2 * softplus(beta * h) for h in gaps],
    )
    close(objectives.ipo_loss(*tensors, beta), [(h - 1 / (2 * beta)) ** 2 for h in gaps])
    close(objectives.hinge_loss(*tensors, beta), [max(0.0, 1 - beta * h) for h in gaps])
    ratios = [c - rc for c, rc in zip(chosen.tolist(), ref_chosen.tolist(), strict=True)]
    close(objectives.implicit_rewards(chosen, ref_chosen, beta), [beta * x for x in ratios])


def exact_log1mexp(x: float) -> Decimal:
    with localcontext() as context:
        context.prec = 400
        return (1 - Decimal(x).exp()).ln()


@pytest.mark.parametrize("x", [-1e-15, -1e-9, -1e-4, -0.5, -0.69, -math.log(2), -0.7, -1.0, -20.0, -60.0, -700.0])
def test_log1mexp_is_accurate(x):
    number = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    result = objectives.log1mexp(number)
    result.backward()
    assert abs(float(Decimal(result.item()) / exact_log1mexp(x)) - 1) < 1e-12
    # d/dx log(1 - e^x) = -1 / (e^-x - 1)
    assert abs(number.grad.item() * math.expm1(-x) + 1) < 1e-9


def test_reference_free_losses_equal_loops():
    values = [-1e-9, -1e-3, -0.3, -0.7, -2.0, -8.0, -50.0, -300.0]
    columns = [(c, r) for c in values for r in values]
    chosen, rejected = torch.tensor(columns, dtype=torch.float64).unbind(1)
    expected = []
    for c, r in columns:
        odds = (c - float(exact_log1mexp(c))) - (r - float(exact_log1mexp(r)))
        expected.append(-c + 0.25 * softplus(-odds))
    close(objectives.orpo_loss(chosen, rejected, 0.25), expected)
    close(objectives.simpo_loss(chosen, rejected, 2.5, 0.8), [softplus(0.8 - 2.5 * (c - r)) for c, r in columns])
    # Certain answers (log-probability 0, as an empty answer's) have a finite loss and gradient too.
    for dtype in (torch.float32, torch.bfloat16):
        certain = torch.zeros(2, dtype=dtype, requires_grad=True)
        loss = objectives.orpo_loss(certain, torch.tensor([0.0, -3.0], dtype=dtype)).sum()
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(certain.grad).all()


def test_equal_policy_and_reference():
    chosen, rejected = pairs(26)
    same = (chosen, rejected, chosen, rejected)
    ones = torch.ones(len(chosen), dtype=torch.float64)
    close(objectives.dpo_loss(*same), ones * math.log(2), 1e-12)
    close(objectives.dpo_loss(*same, label_smoothing=0.3), ones * math.log(2), 1e-12)
    close(objectives.ipo_loss(*same, beta=0.5), ones, 1e-12)
    close(objectives.hinge_loss(*same), ones, 1e-12)
    rewards = objectives.implicit_rewards(chosen, chosen, 0.1), objectives.implicit_rewards(rejected, rejected, 0.1)
    assert not (rewards[0] > rewards[1]).any()


# ---------------------------------------------------------------- dtypes, shapes, gradients

FOUR = [normal(12, seed=seed, scale=2) - 8 for seed in (31, 32, 33, 34)]
PAIR_LOSSES = {
    "dpo": lambda c, r, rc, rr: objectives.dpo_loss(c, r, rc, rr, 0.3),
    "cdpo": lambda c, r, rc, rr: objectives.dpo_loss(c, r, rc, rr, 0.3, 0.1),
    "ipo": lambda c, r, rc, rr: objectives.ipo_loss(c, r, rc, rr, 0.3),
    "hinge": lambda c, r, rc, rr: objectives.hinge_loss(c, r, rc, rr, 0.3),
    "orpo": lambda c, r, rc, rr: objectives.orpo_loss(c, r, 0.3),
    "orpo_likely": lambda c, r, rc, rr: objectives.orpo_loss(c / 40, r / 40, 0.3),
    "simpo": lambda c, r, rc, rr: objectives.simpo_loss(c, r, 2.0, 0.5),
    "rm": lambda c, r, rc, rr: objectives.reward_model_loss(c, r, rc.abs(), 0.01),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradients_of_pair_losses_equal_finite_differences(name):
    chosen, rejected = (tensor.clone().requires_grad_() for tensor in FOUR[:2])
    assert torch.autograd.gradcheck(lambda c, r: PAIR_LOSSES[name](c, r, *FOUR[2:]), (chosen, rejected))


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(name, dtype):
    low = [tensor.to(dtype) for tensor in FOUR]
    result = PAIR_LOSSES[name](*low)
    if name != "orpo_likely":  # divides before the loss, in low precision
        assert result.dtype == torch.float32
        assert torch.equal(result, PAIR_LOSSES[name](*(tensor.float() for tensor in low)))


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge"])
def test_the_reference_gets_no_gradient(name):
    tensors = [tensor.clone().requires_grad_() for tensor in FOUR]
    PAIR_LOSSES[name](*tensors).sum().backward()
    assert tensors[0].grad is not None and tensors[2].grad is None and tensors[3].grad is None


def test_what_ppo_takes_as_given_gets_no_gradient():
    mask = make_mask("holes", 3, 5)
    new, *given = (normal(3, 5, seed=seed).requires_grad_() for seed in (45, 46, 47))
    for loss in (objectives.ppo_policy_loss, objectives.value_loss):
        value, _ = loss(new, *given, mask)
        value.backward()
        assert new.grad is not None and all(tensor.grad is None for tensor in given)
    assert not any(result.requires_grad for result in objectives.gae(*given, mask))
    assert not objectives.ppo_policy_loss(new, *given, mask)[1]["approx_kl"].requires_grad


@pytest.mark.parametrize("kind", ["holes", "right", "one", "empty_row"])
def test_gradients_of_token_losses_equal_finite_differences(kind):
    mask = make_mask(kind, 3, 5)
    old, advantages = normal(3, 5, seed=35), normal(3, 5, seed=36)
    start = (old + normal(3, 5, seed=37, scale=0.3)).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: objectives.ppo_policy_loss(x, old, advantages, mask)[0], (start,))
    assert check(lambda x: objectives.value_loss(x, old, advantages, mask, 0.2)[0], (start,))
    assert check(lambda x: objectives.value_loss(x, old, advantages, mask, None)[0], (start,))
    assert check(lambda x: objectives.masked_mean(x, mask), (start,))
    assert check(lambda x: objectives.masked_whiten(x, mask), (start,))
    for estimator in objectives.KL_ESTIMATORS:
        assert check(lambda x, name=estimator: objectives.kl_per_token(x, old, name), (start,))


def test_token_functions_compute_low_precision_in_float32():
    mask = make_mask("holes", 3, 5)
    a, b, c = (normal(3, 5, seed=seed).bfloat16() for seed in (41, 42, 43))
    scores = normal(3, seed=44).bfloat16()
    calls = [
        lambda x, y, z, s: objectives.masked_mean(x, mask),
        lambda x, y, z, s: objectives.masked_whiten(x, mask),
        lambda x, y, z, s: objectives.kl_per_token(x, y, "k3"),
        lambda x, y, z, s: objectives.token_rewards(s, x, mask, 0.1),
        lambda x, y, z, s: objectives.gae(x, y, mask)[0],
        lambda x, y, z, s: objectives.gae(x, y, mask)[1],
        lambda x, y, z, s: objectives.ppo_policy_loss(x, y, z, mask)[0],
        lambda x, y, z, s: objectives.value_loss(x, y, z, mask)[0],
    ]
    for call in calls:
        result = call(a, b, c, scores)
        assert result.dtype == torch.float32
        assert torch.equal(result, call(a.float(), b.float(), c.float(), scores.float()))


def test_shapes_that_would_broadcast_are_refused():
    column, row, mask = torch.zeros(4, 1), torch.zeros(4), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"different shapes: got \[\(4, 1\), \(4,\)\]"):
        objectives.reward_model_loss(column, row)
    for call in (
        lambda: objectives.reward_model_loss(row, row, column),
        lambda: objectives.dpo_loss(row, row, column, row),
        lambda: objectives.orpo_loss(row, column),
        lambda: objectives.simpo_loss(row, column),
        lambda: objectives.masked_mean(row, mask),
        lambda: objectives.kl_per_token(row, column),
        lambda: objectives.gae(mask, column, mask),
        lambda: objectives.ppo_policy_loss(mask, mask, row, mask),
        lambda: objectives.value_loss(mask, mask, column, mask),
        lambda: objectives.token_rewards(row, row, mask, 0.1),
    ):
        with pytest.raises(ValueError, match="different shapes"):
            call()
    with pytest.raises(ValueError, match=r"got shape \(4, 1\), need one score for each of 4 answers"):
        objectives.token_rewards(column, mask, mask, 0.1)


# ---------------------------------------------------------------- TRL, in a Python of its own

OLD_TRL = """
import sys, warnings, torch
from types import SimpleNamespace as Self
from trl import CPOTrainer, DPOTrainer, ORPOTrainer, PPOTrainer, RewardTrainer
from trl.core import masked_mean, masked_whiten
from trl.trainer.utils import AdaptiveKLController
x = torch.load(sys.argv[1], weights_only=True)
here = Self(device=torch.device("cpu"), gather=lambda t: t)
out = {}
m = x["mask"]
out["mean"], out["whiten"] = masked_mean(x["rewards"], m), masked_whiten(x["rewards"], m)
controller = AdaptiveKLController(0.2, 6.0, 1000)
out["controller"] = []
for kl in x["kls"].tolist():
    controller.update(kl, 64)
    out["controller"].append(controller.value)
out["controller"] = torch.tensor(out["controller"], dtype=torch.float64)
config = Self(gamma=0.98, lam=0.9, whiten_rewards=False, cliprange=0.2, cliprange_value=0.2, vf_coef=1.0,
              ratio_threshold=1e9, kl_penalty="kl")
ppo = Self(config=config, kl_ctl=Self(value=0.15))
ppo._kl_penalty = lambda a, b: PPOTrainer._kl_penalty(ppo, a, b)
out["token_rewards"] = PPOTrainer.compute_rewards(ppo, x["scores"], x["old"], x["ref"], m)[0]
_, out["advantages"], out["returns"] = PPOTrainer.compute_advantages(ppo, x["values"], x["rewards"], m)
new, v = x["new"].clone().requires_grad_(), x["vpreds"].clone().requires_grad_()
policy, value, stats = PPOTrainer.loss(ppo, x["old"], x["values"], x["logits"], v, new, m, x["given"], x["targets"])
(policy + value).backward()
out |= {"policy_loss": policy.detach(), "value_loss": value.detach(), "policy_grad": new.grad, "value_grad": v.grad}
names = ("policy/clipfrac", "val/clipfrac", "policy/policykl", "policy/approxkl", "policy/entropy")
out |= {n: stats[n] for n in names}
four = [x[k] for k in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
def dpo(**kw):
    base = dict(accelerator=here, reference_free=False, f_divergence_type="reverse_kl", f_divergence_params=None,
                beta=0.1, label_smoothing=0.0)
    return DPOTrainer.dpo_loss(Self(**(base | kw)), *four)
out["dpo"], out["chosen_rewards"], out["rejected_rewards"] = dpo(loss_type="sigmoid")
out["cdpo"] = dpo(loss_type="sigmoid", label_smoothing=0.2)[0]
out["ipo"], out["hinge"] = dpo(loss_type="ipo")[0], dpo(loss_type="hinge")[0]
out["orpo"] = ORPOTrainer.odds_ratio_loss(Self(accelerator=here, beta=0.3), *four[:2])[0]
out["simpo"] = CPOTrainer.cpo_loss(
    Self(accelerator=here, beta=2.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0), *four[:2])[0]
def rm(margin, centering):
    inputs = {"input_ids_chosen": x["chosen"], "input_ids_rejected": x["rejected"],
              "attention_mask_chosen": None, "attention_mask_rejected": None}
    inputs |= {"margin": x["margin"]} if margin else {}
    trainer = Self(use_reward_data_collator=True, args=Self(center_rewards_coefficient=centering))
    return RewardTrainer.compute_loss(trainer, lambda input_ids, **_: {"logits": input_ids}, inputs)
out["rm"], out["rm_margin"], out["rm_centering"] = rm(False, None), rm(True, None), rm(True, 0.01)
torch.save(out, sys.argv[2])
"""

NEW_TRL = '''
import sys, torch
from collections import defaultdict
from types import SimpleNamespace as Self
from trl import DPOTrainer, RewardTrainer
from trl.trainer import dpo_trainer
x = torch.load(sys.argv[1], weights_only=True)
gather = lambda t: t
here = Self(device=torch.device("cpu"), gather=gather, gather_for_metrics=gather)
out = {}
def dpo(loss_type, smoothing, rows):
    """DPOTrainer._compute_loss on the token log-probabilities of both answers, chosen first."""
    both = lambda a, b: torch.cat([x[a][rows], x[b][rows]])
    mask, logprobs = both("chosen_mask", "rejected_mask"), both("chosen_tokens", "rejected_tokens")
    logprobs = (logprobs * mask).requires_grad_()
    model = lambda **_: Self(log_probs=logprobs, entropy=0 * logprobs, mean_logits=0 * logprobs,
                             is_top1=logprobs > 0, logits=None, loss=None)
    first = torch.zeros(len(mask), 1, dtype=mask.dtype)  # TRL's mask counts the first position, which is never scored
    inputs = {"input_ids": torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long),
              "completion_mask": torch.cat([first, mask], 1), "attention_mask": torch.ones_like(mask),
              "ref_chosen_logps": x["ref_chosen"][rows], "ref_rejected_logps": x["ref_rejected"][rows]}
    trainer = Self(model=Self(training=True), accelerator=here, aux_loss_enabled=False, ld_alpha=None,
                   precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type],
                   loss_weights=[1.0], beta=0.1, label_smoothing=smoothing, use_weighting=False,
                   _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, args=Self())
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    return loss.detach(), logprobs.grad, trainer._metrics["train"]
every = slice(None)
for kind in ("sigmoid", "ipo", "hinge"):
    out[kind], out[kind + "_grad"], metrics = dpo(kind, 0.0, every)
out["accuracy"] = torch.tensor(metrics["rewards/accuracies"][0])
out["margin"] = torch.tensor(metrics["rewards/margins"][0])
# "aot" of one pair is DPO with label smoothing: sorting one number changes nothing.
out["cdpo"] = torch.stack([dpo("aot", 0.2, slice(i, i + 1))[0] for i in range(len(x["ref_chosen"]))])
def rm(margin, centering):
    logits = torch.cat([x["scores_chosen"], x["scores_rejected"]]).unsqueeze(1).requires_grad_()
    trainer = Self(model=Self(training=False), accelerator=here, args=Self(center_rewards_coefficient=centering),
                   _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1)
    inputs = {"attention_mask": torch.ones(2, 2)} | ({"margin": x["margin"]} if margin else {})
    loss = RewardTrainer.compute_loss(trainer, lambda **_: Self(logits=logits), inputs)
    loss.backward()
    return loss.detach(), logits.grad.squeeze(1), torch.tensor(trainer._metrics["eval"]["accuracy"][0])
out["rm"], _, out["rm_accuracy"] = rm(False, None)
out["rm_margin"] = rm(True, None)[0]
out["rm_centering"], out["rm_grad"], _ = rm(True, 0.01)
torch.save(out, sys.argv[2])
'''


def ask_trl(variable: str, code: str, inputs: dict, folder) -> dict:
    """Run `code` in the Python that the environment variable names; skip where there is none."""
    python = os.environ.get(variable)
    if not python and variable == "TRL_PYTHON" and importlib.util.find_spec("trl"):
        python = sys.executable
    if not python:
        pytest.skip(f"{variable} names no Python with TRL (see the top of this file)")
    torch.save(inputs, folder / "inputs.pt")
    script = folder / "trl_code.py"
    script.write_text(code, encoding="utf-8")
    command = [python, str(script), str(folder / "inputs.pt"), str(folder / "outputs.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "outputs.pt", weights_only=True)


@pytest.fixture(scope="module")
def old_trl(tmp_path_factory):
    mask = make_mask("right", 8, 12)
    tokens = {
        name: normal(8, 12, seed=seed)
        for seed, name in enumerate(("rewards", "old", "ref", "values", "given", "targets"), 50)
    }
    inputs = tokens | {
        "mask": mask.double(),
        "new": tokens["old"] + normal(8, 12, seed=60, scale=0.3),
        "vpreds": tokens["values"] + normal(8, 12, seed=61, scale=0.4),
        "logits": normal(8, 12, 9, seed=62, scale=2),
        "scores": normal(8, seed=63),
        "kls": normal(6, seed=64, scale=3, shift=6),
        "margin": normal(10, seed=65).abs(),
    }
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    inputs |= {name: -normal(10, seed=seed, scale=2).abs() - 0.05 for seed, name in enumerate(names, 70)}
    return SimpleNamespace(**inputs), ask_trl("OLD_TRL_PYTHON", OLD_TRL, inputs, tmp_path_factory.mktemp("old"))


def test_ppo_agrees_with_trl(old_trl):
    x, trl = old_trl
    close(objectives.masked_mean(x.rewards, x.mask), trl["mean"], 1e-5)
    close(objectives.masked_whiten(x.rewards, x.mask), trl["whiten"] * x.mask, 1e-5)
    controller, values = objectives.AdaptiveKL(0.2, 6.0, 1000), []
    for kl in x.kls.tolist():
        controller.update(kl, 64)
        values.append(controller.value)
    close(values, trl["controller"], 1e-5)
    kl = objectives.kl_per_token(x.old, x.ref, "k1")
    close(objectives.token_rewards(x.scores, kl, x.mask, 0.15), trl["token_rewards"] * x.mask, 1e-5)
    advantages, returns = objectives.gae(x.rewards, x.values, x.mask, gamma=0.98, lam=0.9)
    close(returns, trl["returns"] * x.mask, 1e-5)
    close(objectives.masked_whiten(advantages, x.mask), trl["advantages"] * x.mask, 1e-5)
    new, vpreds = x.new.clone().requires_grad_(), x.vpreds.clone().requires_grad_()
    policy, statistics = objectives.ppo_policy_loss(new, x.old, x.given, x.mask, 0.2)
    value, value_clips = objectives.value_loss(vpreds, x.values, x.targets, x.mask, 0.2)
    (policy + value).backward()
    close(policy, trl["policy_loss"], 1e-5)
    close(value, trl["value_loss"], 1e-5)
    close(new.grad, trl["policy_grad"], 1e-5)
    close(vpreds.grad, trl["value_grad"], 1e-5)
    close(statistics["clip_fraction"], trl["policy/clipfrac"], 1e-5)
    close(value_clips, trl["val/clipfrac"], 1e-5)
    assert 0 < value_clips < 1 and 0 < statistics["clip_fraction"] < 1
    close(objectives.masked_mean(objectives.kl_per_token(x.old, x.new, "k1"), x.mask), trl["policy/policykl"], 1e-5)
    close(objectives.masked_mean(objectives.kl_per_token(x.old, x.new, "k2"), x.mask), trl["policy/approxkl"], 1e-5)


def test_preference_and_reward_losses_agree_with_old_trl(old_trl):
    x, trl = old_trl
    four = (x.chosen, x.rejected, x.ref_chosen, x.ref_rejected)
    close(objectives.dpo_loss(*four, 0.1), trl["dpo"], 1e-5)
    close(objectives.dpo_loss(*four, 0.1, 0.2), trl["cdpo"], 1e-5)
    close(objectives.ipo_loss(*four, 0.1), trl["ipo"], 1e-5)
    close(objectives.hinge_loss(*four, 0.1), trl["hinge"], 1e-5)
    close(objectives.implicit_rewards(x.chosen, x.ref_chosen, 0.1), trl["chosen_rewards"], 1e-5)
    close(objectives.implicit_rewards(x.rejected, x.ref_rejected, 0.1), trl["rejected_rewards"], 1e-5)
    close(
        objectives.orpo_loss(x.chosen, x.rejected, 0.3) + x.chosen, -trl["orpo"], 1e-5
    )  # theirs is the second term's negative
    close(objectives.simpo_loss(x.chosen, x.rejected, 2.0, 0.7), trl["simpo"], 1e-5)
    close(objectives.reward_model_loss(x.chosen, x.rejected).mean(), trl["rm"], 1e-5)
    close(objectives.reward_model_loss(x.chosen, x.rejected, x.margin).mean(), trl["rm_margin"], 1e-5)
    close(objectives.reward_model_loss(x.chosen, x.rejected, x.margin, 0.01).mean(), trl["rm_centering"], 1e-5)


def test_preference_and_reward_losses_agree_with_current_trl(tmp_path):
    masks = {
        f"{side}_mask": make_mask("right", 10, 9, seed).long() for seed, side in enumerate(("chosen", "rejected"))
    }
    inputs = masks | {
        "chosen_tokens": -normal(10, 9, seed=80).abs(),
        "rejected_tokens": -normal(10, 9, seed=81).abs(),
        "ref_chosen": -normal(10, seed=82, scale=4).abs(),
        "ref_rejected": -normal(10, seed=83, scale=4).abs(),
        "scores_chosen": normal(10, seed=84),
        "scores_rejected": normal(10, seed=85),
        "margin": normal(10, seed=86).abs(),
    }
    trl = ask_trl("TRL_PYTHON", NEW_TRL, inputs, tmp_path)
    x = SimpleNamespace(**inputs)
    lengths = (x.chosen_mask.sum(1), x.rejected_mask.sum(1))
    for kind, loss, average in (
        ("sigmoid", objectives.dpo_loss, False),
        ("ipo", objectives.ipo_loss, True),
        ("hinge", objectives.hinge_loss, False),
    ):
        tokens = torch.cat([x.chosen_tokens, x.rejected_tokens]).requires_grad_()
        mask = torch.cat([x.chosen_mask, x.rejected_mask])
        summed = (tokens * mask).sum(1)
        chosen, rejected = (summed / mask.sum(1) if average else summed).chunk(2)
        references = (x.ref_chosen, x.ref_rejected)
        if average:
            references = tuple(total / length for total, length in zip(references, lengths, strict=True))
        value = loss(chosen, rejected, *references, 0.1).mean()
        value.backward()
        close(value, trl[kind], 1e-5)
        close(tokens.grad, trl[kind + "_grad"] * mask, 1e-5)
    chosen = (x.chosen_tokens * x.chosen_mask).sum(1)
    rejected = (x.rejected_tokens * x.rejected_mask).sum(1)
    close(objectives.dpo_loss(chosen, rejected, x.ref_chosen, x.ref_rejected, 0.1, 0.2), trl["cdpo"], 1e-5)
    rewards = (
        objectives.implicit_rewards(chosen, x.ref_chosen, 0.1),
        objectives.implicit_rewards(rejected, x.ref_rejected, 0.1),
    )
    close((rewards[0] > rewards[1]).double().mean(), trl["accuracy"], 1e-5)
    close((rewards[0] - rewards[1]).mean(), trl["margin"], 1e-5)
    close(objectives.reward_model_loss(x.scores_chosen, x.scores_rejected).mean(), trl["rm"], 1e-5)
    close(objectives.reward_model_loss(x.scores_chosen, x.scores_rejected, x.margin).mean(), trl["rm_margin"], 1e-5)
    close((x.scores_chosen > x.scores_rejected).double().mean(), trl["rm_accuracy"], 1e-5)
    scores = torch.cat([x.scores_chosen, x.scores_rejected]).requires_grad_()
    loss = objectives.reward_model_loss(*scores.chunk(2), x.margin, 0.01).mean()
    loss.backward()
    close(loss, trl["rm_centering"], 1e-5)
    close(scores.grad, trl["rm_grad"], 1e-5)
