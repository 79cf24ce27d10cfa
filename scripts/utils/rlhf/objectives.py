"""The arithmetic of alignment training: pure functions on log-probabilities, values, rewards and scores.

Shapes: B sequences or pairs, T positions, V vocabulary rows. Log-probabilities and entropies are in nats, masks are 1
(or True) at answer tokens. What stands outside a mask is never used, not even NaN. Inputs below float32 are computed
in float32. PPO's losses are means over answer tokens; where a batch is cut into parts (gradient accumulation, several
processes) pass `count`, the number of answer tokens of the whole batch: then the parts' losses add up to the whole's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# |log ratio| of new to old policy above which a token's ratio stays constant: exp(20) is still finite in float32, and
# an infinite ratio times a zero advantage or gradient would be NaN.
MAX_LOG_RATIO = 20.0
KL_ERROR_LIMIT = 0.2  # Ziegler et al. 2019, section 2.2: the proportional error is cut to [-0.2, 0.2]
KL_ESTIMATORS = ("k1", "k2", "k3")


def _check_shapes(*tensors: Tensor) -> None:
    """Broadcasting (B, 1) with (B,) would give B x B losses without a word."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"tensors of different shapes: got {shapes}, need one shape; index or squeeze them before")


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, of one shape, in float32, or in float64 where they have it."""
    _check_shapes(*tensors)
    return tuple(tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float() for tensor in tensors)


def _masked(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as _wide gives them, with zeros outside the mask of the same shape."""
    _check_shapes(mask, *tensors)
    outside = ~mask.bool()
    # Filled, not multiplied by the mask: 0 * NaN is NaN, in the values and in their gradients.
    return tuple(tensor.masked_fill(outside, 0.0) for tensor in _wide(*tensors))


# ---------------------------------------------------------------- masked statistics


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean of values (...) over mask (...), a scalar; 0 where the mask is empty.

    Args: count: divide by this number instead of the mask's own sum (see the module's docstring).
    """
    (kept,) = _masked(mask, values)
    return kept.sum() / (mask.bool().sum().clamp(min=1) if count is None else count)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (divisor n - 1, at least 1) of values (...) over mask (...): two scalars."""
    (kept,) = _masked(mask, values)
    number = mask.bool().sum().to(kept.dtype)
    mean = kept.sum() / number.clamp(min=1)
    # Two passes: the mean of squares less the square of the mean would cancel in float32.
    squares = (kept - mean).square().masked_fill(~mask.bool(), 0.0).sum()
    return mean, squares / (number - 1).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Values (...) scaled to mean 0 and standard deviation 1 over mask (...); 0 outside it.

    Equal values (or a single one) become 0.
    Source: Huang et al. 2023, "The N Implementation Details of RLHF with PPO" (reward and advantage whitening).
    """
    mean, variance = masked_moments(values, mask)
    (kept,) = _masked(mask, values)
    # Masked once more: the padding is no longer 0.
    return ((kept - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(~mask.bool(), 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over mask: 1 is a perfect critic, 0 as good as a constant.

    Args: values, returns, mask: (B, T). NaN where the returns do not vary.
    """
    values, returns = _masked(mask, values, returns)
    variance = masked_moments(returns, mask)[1].item()
    return 1 - masked_moments(returns - values, mask)[1].item() / variance if variance > 0 else math.nan


# ---------------------------------------------------------------- KL and token rewards


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """An estimate of KL(policy || reference) from each sampled token; (B, T) each -> (B, T), in nats.

    With log r = ref_logprobs - logprobs, of tokens sampled from the policy: k1 = -log r (unbiased, any sign), k2 =
    (log r)^2 / 2 (biased, little variance), k3 = r - 1 - log r (unbiased, never negative).
    Source: Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).
    """
    logprobs, ref_logprobs = _wide(logprobs, ref_logprobs)
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        # expm1, since r - 1 loses all digits near r = 1. An unlikely token must not make it infinite.
        return torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO)) - log_ratio
    raise ValueError(f"estimator: got {estimator!r}, need one of {', '.join(KL_ESTIMATORS)}")


@dataclass
class FixedKL:
    """A KL coefficient that stays as it is."""

    value: float

    def update(self, kl: float, episodes: int) -> None:
        """Does nothing; the same call as AdaptiveKL.update."""


@dataclass
class AdaptiveKL:
    """A KL coefficient that steers the KL of an answer to the reference (nats, summed over its tokens) to `target`.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2, whose K_beta is
    here episodes / horizon, as in the authors' code: 0.1 for updates of 1,000 episodes and a horizon of 10,000.
    """

    value: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        for name in ("target", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} of the adaptive KL coefficient: got {getattr(self, name)}, need a number above 0"
                )

    def update(self, kl: float, episodes: int) -> None:
        """Adjust the coefficient after `episodes` answers of mean KL `kl`; one that is not finite is a ValueError."""
        if not math.isfinite(kl):
            raise ValueError(f"mean KL to the reference: got {kl}, need a finite number; the policy has diverged")
        # Cut, because one answer that runs away would else change the coefficient by orders of magnitude.
        error = min(max(kl / self.target - 1, -KL_ERROR_LIMIT), KL_ERROR_LIMIT)
        self.value *= 1 + error * episodes / self.horizon


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of every answer token: -kl_coef * kl, and at the last one also the answer's score; 0 outside the mask.

    Args: scores: (B,), the reward model's; kl: (B, T) from kl_per_token; mask: (B, T).
    Returns: (B, T). A row without answer tokens has no reward.
    Source: Ouyang et al. 2022 (InstructGPT), section 3.5, eq. 2, with one KL term per token as in Ziegler et al. 2019,
    eq. 2.
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, need one score for each of {len(mask)} answers")
    (kl,) = _masked(mask, kl)
    (scores,) = _wide(scores)
    # Counted from the right, the last answer token is the first with exactly one answer token from there on.
    from_right = mask.bool().flip(1).cumsum(1).flip(1)
    last = mask.bool() & (from_right == 1)
    return torch.where(last, scores.unsqueeze(1), 0.0) - kl_coef * kl


# ---------------------------------------------------------------- PPO


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (advantage + value, the critic's targets); both 0 outside the mask.

    Args: rewards, values, mask: (B, T); values[:, t] is the critic's value before token t; gamma: discount; lam:
        lambda.
    Returns: advantages (B, T), returns (B, T), without gradient.
    Positions outside the mask do not count as steps: an answer in several pieces is one episode of its own tokens.
    After the last answer token the value is 0.
    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16,
    as the recursion A_t = delta_t + gamma lambda A_(t+1), delta_t = r_t + gamma V_(t+1) - V_t.
    """
    rewards, values = _masked(mask, rewards, values)
    inside = mask.bool()
    advantages = torch.zeros_like(rewards)
    advantage = next_value = rewards.new_zeros(len(rewards))  # behind an answer nothing more comes
    for t in range(rewards.shape[1] - 1, -1, -1):
        # Outside the mask both are carried over unchanged: the next token of an answer is that inside the mask.
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(inside[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(inside[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    advantages.masked_fill_(~inside, 0.0)
    return advantages, advantages + values


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """For each answer the mean reward of the other answers of its group (N,); 0 for one that is alone.

    An estimate of what the prompt is worth without a critic: independent of the answer, so subtracting it leaves the
    policy's gradient as it is on average, and answers that are all alike move nothing.
    Args: rewards: (N,), of whole answers; groups: (N,), small integers, equal for the answers to one prompt.
    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", eq. 8; on language models Ahmadian
    et al. 2024, "Back to Basics".
    """
    (rewards,) = _wide(rewards)
    sums = rewards.new_zeros(int(groups.max()) + 1).index_add(0, groups, rewards)
    others = torch.bincount(groups)[groups] - 1
    return torch.where(others > 0, (sums[groups] - rewards) / others.clamp(min=1), 0.0)


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    count: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss, a mean over answer tokens: -min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A).

    Args: logprobs: of the policy being trained; old_logprobs: of the one that sampled; advantages; mask: (B, T) each;
        count: see the module's docstring.
    Returns: scalar loss, and statistics without gradient: "clip_fraction" (share of tokens whose loss is the clipped
        one, so without gradient) and "approx_kl" (k3 of KL(old || new), nats a token), means with the same
        `count` as the loss.
    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7.
    """
    logprobs, old_logprobs, advantages = _masked(mask, logprobs, old_logprobs, advantages)
    log_ratio = (logprobs - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    advantages = advantages.detach()
    # The larger loss of the two: clipping takes away what a token could still gain, never what it has to lose.
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.maximum(plain, clipped), mask, count=count)
    with torch.no_grad():
        statistics = {
            "clip_fraction": masked_mean((clipped > plain).float(), mask, count=count),
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask, count=count),
        }
    return loss, statistics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float | None = 0.2,
    count: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic, a mean over answer tokens; the larger of the plain and the clipped one.

    The clipped error is that of values cut to old_values +- clip_range, so that one update cannot move them far.
    Args: values: the critic's, being trained; old_values: before the update; returns: from gae; mask: (B, T) each;
        clip_range: None for the plain squared error; count: see the module's docstring.
    Returns: scalar loss, and the share of tokens whose loss is the clipped one (scalar, without gradient).
    Source: Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization", detail 9.
    """
    values, old_values, returns = _masked(mask, values, old_values, returns)
    returns, old_values = returns.detach(), old_values.detach()
    plain = (values - returns).square()
    if clip_range is None:
        return 0.5 * masked_mean(plain, mask, count=count), plain.new_zeros(())
    cut = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    # The larger of the two: a value that has moved far towards its return gets no gradient, one that moved away does.
    clipped = (cut - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask, count=count)
    return loss, masked_mean((clipped > plain).float(), mask, count=count)


# ---------------------------------------------------------------- reward model


def reward_model_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)^2 of each pair, (B,).

    Args: chosen, rejected: (B,) scores of the two answers; margin: (B,), larger where the preference is clearer;
        centering: weight of the term that pulls the mean of a pair's scores to 0.
    Source: Touvron et al. 2023 (Llama 2), section 3.2.2, eq. 1 and 2; centering: Eisenstein et al. 2023, "Helping or
    Herding?", eq. 2.
    """
    chosen, rejected = _wide(chosen, rejected)
    difference = chosen - rejected
    if margin is not None:
        difference = difference - _wide(chosen, margin)[1]  # with `chosen` for the check of their shapes
    losses = -F.logsigmoid(difference)
    return losses + centering * (chosen + rejected).square() if centering else losses


# ---------------------------------------------------------------- preference losses
# One loss a pair. "Averaged" log-probabilities are divided by the answer's number of tokens.


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """beta * log(policy / reference) of each answer, (B,), without gradient.

    Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 5 without its constant of the prompt.
    """
    logprobs, ref_logprobs = _wide(logprobs.detach(), ref_logprobs.detach())
    return beta * (logprobs - ref_logprobs)


def _preference_logits(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    chosen, rejected, ref_chosen, ref_rejected = _wide(chosen, rejected, ref_chosen, ref_rejected)
    return (chosen - ref_chosen.detach()) - (rejected - ref_rejected.detach())


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta * h), h the policy's log ratio of chosen to rejected less the reference's.

    Args: chosen, rejected: (B,) summed log-probabilities of the policy; ref_chosen, ref_rejected: of the reference;
        label_smoothing: weight of the swapped pair's loss, the share of pairs believed to be swapped, in [0, 0.5).
    Returns: (B,).
    Source: Rafailov et al. 2023, eq. 7; label smoothing: Mitchell 2023, "A note on DPO with noisy preferences" (cDPO).
    """
    logits = beta * _preference_logits(chosen, rejected, ref_chosen, ref_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1) -> Tensor:
    """(h - 1 / (2 beta))^2, h as in dpo_loss but of averaged log-probabilities; (B,) each -> (B,).

    Source: Azar et al. 2024, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17,
    whose tau is beta; the average over tokens is what its authors used.
    """
    return (_preference_logits(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)).square()


def hinge_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """max(0, 1 - beta * h), h as in dpo_loss, of summed log-probabilities; (B,) each -> (B,).

    Source: Zhao et al. 2023 (SLiC-HF), eq. 1, on log ratios to a reference as in the hinge-norm loss of Liu et al.
    2024, "Statistical Rejection Sampling Improves Preference Optimization".
    """
    return torch.relu(1 - beta * _preference_logits(chosen, rejected, ref_chosen, ref_rejected))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, accurate everywhere; x within one rounding of 0 is taken as one rounding below it.

    Source: Maechler 2012, "Accurately Computing log(1 - exp(-|a|))", eq. 7.
    """
    # An answer of probability 1 has log odds of infinity, whose gradient is NaN.
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """-chosen - beta * log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p); without reference.

    Args: chosen, rejected: (B,) averaged log-probabilities; beta: the paper's lambda.
    Returns: (B,); the first term is the SFT loss of the chosen answer, averaged over its tokens.
    Source: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", eq. 6 and 7.
    """
    chosen, rejected = _wide(chosen, rejected)
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds)


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """-log sigmoid(beta * (chosen - rejected) - gamma); without reference.

    Args: chosen, rejected: (B,) averaged log-probabilities; gamma: the margin wanted, in units of beta * mean.
    Returns: (B,).
    Source: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", eq. 6.
    """
    chosen, rejected = _wide(chosen, rejected)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)
