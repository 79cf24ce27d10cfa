"""Rollouts: answers sampled from the policy, and what PPO learns from each of their tokens.

N answers of up to A tokens. Experience is small beside the model (a few numbers a token), so every process gets all of
it: statistics are then those of the whole iteration, and which process learns from which answer does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..text.prompts import IGNORE_INDEX
from .arguments import PPOArguments
from .objectives import gae, kl_per_token, leave_one_out, masked_mean, masked_moments, masked_whiten, token_rewards


@dataclass
class Rollout:
    """One answer.

    Attributes:
        prompt, answer: token ids; the answer's end token included, if it came.
        ended: whether it ended by itself.
        logprobs, ref_logprobs, values, entropies: (A,) float32 of each answer token.
        score: the reward of the whole answer.
    """

    prompt: list[int]
    answer: list[int]
    text: str
    ended: bool
    number: int  # its place in the iteration, whatever the process
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropies: Tensor
    score: float = 0.0  # set once all answers are there: a reward function sees them together


@dataclass
class Experience:
    """The rollouts of an iteration; tables are (N, A), right-padded.

    Attributes:
        mask: which places hold answer tokens.
        kl: per-token estimates of KL(policy || reference), nats.
        returns: what the critic should have said.
    """

    rollouts: list[Rollout]
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    kl_of_answer: float  # mean over answers of the sum over tokens, k1: nats
    entropy: float

    def __len__(self) -> int:
        return len(self.rollouts)


def build_experience(rollouts: Sequence[Rollout], ppo_args: PPOArguments, kl_coef: float) -> Experience:
    """Rewards, advantages and returns of every token.

    Args: kl_coef: weight of the KL penalty now; that in `ppo_args` is where an adaptive one started.
    Raises: ValueError if a score or log-probability is not finite.
    """
    mask = _table([torch.ones(len(rollout.answer)) for rollout in rollouts]).bool()
    logprobs, ref_logprobs, values, entropies = (
        _table([getattr(rollout, name) for rollout in rollouts])
        for name in ("logprobs", "ref_logprobs", "values", "entropies")
    )
    scores = torch.tensor([rollout.score for rollout in rollouts])
    if not (torch.isfinite(scores).all() and torch.isfinite(logprobs).all() and torch.isfinite(ref_logprobs).all()):
        raise ValueError("scores or log-probabilities of the rollouts are not finite")
    if ppo_args.score_clip is not None:
        scores = scores.clamp(-ppo_args.score_clip, ppo_args.score_clip)  # Yao et al. 2023 (DeepSpeed-Chat): 5
    if ppo_args.whiten_scores:  # after clipping, or one outlier would decide the scale
        scores = masked_whiten(scores, torch.ones_like(scores))
    kl = kl_per_token(logprobs, ref_logprobs, ppo_args.kl_estimator).masked_fill(~mask, 0.0)
    rewards = token_rewards(scores, kl, mask, kl_coef)
    lam = ppo_args.lam
    if ppo_args.critic == "group":
        lam = 1.0  # whole answers are compared, so each token is credited with all that came after it
        _, returns = gae(rewards, torch.zeros_like(rewards), mask, ppo_args.gamma, lam)
        values = leave_one_out(returns[:, 0], _number_prompts(rollouts)).unsqueeze(1) * mask
    advantages, returns = gae(rewards, values, mask, ppo_args.gamma, lam)
    if ppo_args.whiten_advantages:  # the returns stay: they are what the critic learns
        advantages = masked_whiten(advantages, mask)
    # What is logged, limited and steered by is k1 whichever estimator is rewarded: unbiased, and comparable.
    plain_kl = kl_per_token(logprobs, ref_logprobs).masked_fill(~mask, 0.0)
    return Experience(
        rollouts=list(rollouts),
        mask=mask,
        logprobs=logprobs,
        values=values,
        kl=kl,
        advantages=advantages,
        returns=returns,
        kl_of_answer=plain_kl.sum(1).mean().item(),
        entropy=masked_mean(entropies, mask).item(),
    )


def score_moments(rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Mean and standard deviation of the answers' scores."""
    scores = torch.tensor([rollout.score for rollout in rollouts])
    mean, variance = masked_moments(scores, torch.ones_like(scores))
    return mean.item(), variance.sqrt().item()


def _number_prompts(rollouts: Sequence[Rollout]) -> Tensor:
    """(N,), equal for answers to the same prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(rollout.prompt), len(numbers)) for rollout in rollouts])


def _table(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


# ---------------------------------------------------------------- batches of sequences


def collate(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts and their answers as rows padded on the right.

    Returns: input_ids, position_ids and targets (the answers' tokens), (B, T) each, as data.blocks lays them out; and
        `places` (B, A), the column of the target that each answer token is, -1 behind its end.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in sequences)
    longest = max(len(answer) for _, answer in sequences)
    shape = (len(sequences), length)
    ids, positions = torch.full(shape, pad_token_id), torch.arange(length).repeat(len(sequences), 1)
    targets, places = torch.full(shape, IGNORE_INDEX), torch.full((len(sequences), longest), -1)
    for row, (prompt, answer) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        # A token is predicted, and valued, at the place before it.
        targets[row, start - 1 : end - 1] = torch.tensor(list(answer))
        places[row, : len(answer)] = torch.arange(start - 1, end - 1)
        positions[row, end:] -= end  # padding is a segment of its own: positions that start again at 0 are a border
    return {"input_ids": ids, "position_ids": positions, "targets": targets}, places


def gather_answers(values: Tensor, places: Tensor) -> list[Tensor]:
    """Of values (B, T), each row's entries at its places (B, A): tensors (A,) on the CPU."""
    # One copy to the CPU for the whole batch; -1 picks column 0, and is dropped row by row.
    picked = values.gather(1, places.clamp(min=0).to(values.device)).float().cpu()
    return [row[place >= 0] for row, place in zip(picked, places, strict=True)]


def scatter_answers(rows: Tensor, places: Tensor, length: int) -> Tensor:
    """The inverse of gather_answers for a table (B, A): (B, length), 0 elsewhere."""
    inside = places >= 0
    # By index: scatter_ has no way to leave out the -1 behind short answers.
    table = rows.new_zeros(len(rows), length)
    row = torch.arange(len(rows)).unsqueeze(1).expand_as(places)
    table[row[inside], places[inside]] = rows[:, : places.shape[1]][inside]
    return table


def make_batch(experience: Experience, numbers: Sequence[int], pad_token_id: int) -> dict[str, Tensor]:
    """What the update learns from, for some rollouts: collate's tensors, and the experience at the targets' places."""
    index = torch.tensor(list(numbers))
    batch, places = collate(
        [(experience.rollouts[n].prompt, experience.rollouts[n].answer) for n in numbers], pad_token_id
    )
    length = batch["input_ids"].shape[1]
    for name in ("logprobs", "values", "advantages", "returns"):
        batch[f"old_{name}" if name in ("logprobs", "values") else name] = scatter_answers(
            getattr(experience, name)[index], places, length
        )
    return batch


def minibatches(
    experience: Experience, size: int, micro_size: int, seed: Sequence[int], rank: int, world_size: int
) -> Iterator[list[list[int]]]:
    """The rollouts of each optimizer step, as this process's micro-batches; one random pass over all of them.

    Rollouts of a minibatch are sorted by length before they are cut, which changes no gradient and saves padding.
    Args: size: rollouts of a minibatch over all processes; seed: integers that name this pass.
    """
    # Every process draws the same order and takes its own part of it: nothing has to be sent.
    order = np.random.default_rng(list(seed)).permutation(len(experience))
    lengths = [len(rollout.prompt) + len(rollout.answer) for rollout in experience.rollouts]
    for start in range(0, len(order), size):
        chosen = sorted(order[start : start + size].tolist(), key=lambda number: -lengths[number])
        mine = chosen[rank::world_size]  # by turns, so that each process has long and short ones
        yield [mine[place : place + micro_size] for place in range(0, len(mine), micro_size)]


def prompt_numbers(step: int, batch_size: int, num_prompts: int, seed: int) -> list[int]:
    """The prompts of iteration `step`: consecutive places in an endless sequence of shuffled passes over all prompts.

    It depends on nothing but its arguments, so that a resumed run goes on with the right ones.
    """
    # An iteration may reach from one pass into the next, or over several where prompts are few.
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {place // num_prompts: None for place in places}
    shuffled = {epoch: np.random.default_rng([seed, epoch]).permutation(num_prompts) for epoch in orders}
    return [int(shuffled[place // num_prompts][place % num_prompts]) for place in places]


def rollout_seed(seed: int, step: int, number: int) -> int:
    """The seed of one answer's random numbers, the same on any number of processes."""
    # Hashed, so that neighbours in step and number share nothing; 63 bits, to fit a signed integer.
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
