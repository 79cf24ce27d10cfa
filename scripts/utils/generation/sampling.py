"""Choosing the next tokens of a batch whose rows have settings of their own.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..core.arguments import GenerationArguments
from ..core.errors import InputError


class Constraint(Protocol):
    """What a grammar allows; one for each request."""

    def allowed(self) -> Tensor:
        """Which tokens may come now, (V,) bool; the end token too where the text may end."""

    def advance(self, token_id: int) -> None:
        """The token that was chosen."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities of a chosen token and of the likeliest ones beside it.

    In nats, of the model's own distribution: before temperature, penalties and bias.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """What decides the tokens of one row: its settings, its random numbers and what it has written so far."""

    def __init__(
        self,
        settings: GenerationArguments,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        seed: int,
        *,
        logit_bias: Mapping[int, float] | None = None,
        top_logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.settings, self.stop_ids, self.top_logprobs = settings, list(stop_ids), top_logprobs
        self.logit_bias, self.constraint = dict(logit_bias or {}), constraint
        self.counts: Counter[int] = Counter()  # of the answer's tokens
        self.length = 0
        # What costs time for each token is only kept where a setting needs it.
        self._seen = dict.fromkeys(prompt) if settings.repetition_penalty != 1 else {}  # a set that keeps its order
        self._random = torch.Generator().manual_seed(seed)

    @property
    def seen(self) -> list[int]:
        """The tokens that a repetition penalty is for: those of prompt and answer."""
        return list(self._seen)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the model is the choice."""
        return not (self.settings.samples or self.edits)

    @property
    def edits(self) -> bool:
        """Whether some logits are changed before the choice."""
        settings = self.settings
        return bool(
            self.logit_bias
            or self.constraint
            or settings.repetition_penalty != 1
            or settings.presence_penalty
            or settings.frequency_penalty
            or self.length < settings.min_new_tokens
        )

    def draw(self) -> float:
        """The row's next random number in [0, 1): an answer depends on its seed, not on the batch around it."""
        return float(torch.rand(1, generator=self._random, dtype=torch.float64))

    def fork(self) -> Sampler:
        """A copy that tries tokens out: it draws from the same random numbers, and knows no constraint."""
        # The generator is shared and not copied: what a draft draws must be independent of what decides on it.
        forked = copy.copy(self)
        forked.counts, forked._seen, forked.constraint = self.counts.copy(), dict(self._seen), None
        return forked

    def advance(self, token_id: int) -> None:
        """Take note of the token that was chosen."""
        self.length += 1
        self.counts[token_id] += 1
        if self.settings.repetition_penalty != 1:
            self._seen[token_id] = None
        if self.constraint is not None:
            self.constraint.advance(token_id)


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[list[int], list[TokenLogprob | None]]:
    """The next token of each row, and its log-probabilities where they were asked for.

    Args: logits: (B, V), of the model. The samplers are not advanced.
    Raises: InputError if a row's first logits are no numbers; of later ones it would cost a synchronisation each.
    """
    first = [row for row, sampler in enumerate(samplers) if not sampler.length]
    if first and not _finite(logits if len(first) == len(samplers) else logits[first]):
        raise InputError(
            "the model's logits are not finite: its weights are damaged, or float16 is too narrow for it; "
            "try --dtype bfloat16 or float32"
        )
    # Rows of which the likeliest token is wanted, the usual case, are not copied and not processed.
    special = [row for row, sampler in enumerate(samplers) if not sampler.plain]
    tokens = argmax_tokens(logits) if len(special) < len(samplers) else [0] * len(samplers)
    if special:
        chosen = [samplers[row] for row in special]
        scores = process_logits(logits if len(special) == len(samplers) else logits[special], chosen)
        for row, token in zip(special, _pick(scores, chosen), strict=True):
            tokens[row] = token
    return tokens, _logprobs(logits, samplers, tokens)


def argmax_tokens(scores: Tensor) -> list[int]:
    """The likeliest token of each row of (B, V); on the CPU numpy finds it ten times faster than torch."""
    on_cpu = scores.device.type == "cpu"
    if on_cpu and scores.dtype != torch.float32:
        # Row by row, since numpy knows no bfloat16: a row in float32 stays in the cache, all of them would not.
        return [int(row.float().numpy().argmax()) for row in scores]
    tokens: list[int] = (scores.numpy() if on_cpu else scores).argmax(-1).tolist()
    return tokens


def _finite(logits: Tensor) -> bool:
    """Whether all are numbers: their extremes are, since a nan is both of them."""
    return all(math.isfinite(float(extreme)) for extreme in logits.aminmax())


# ---------------------------------------------------------------- what changes logits


def process_logits(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Logits (B, V) -> float32 scores with bias, penalties and what is forbidden; temperature comes later.

    The logits themselves are returned where nothing changes them.

    Sources: repetition penalty: Keskar et al. 2019, "CTRL", section 4.1; presence and frequency penalties: OpenAI's
    API reference (logit - count * frequency - (count > 0) * presence).
    """
    # float() gives the logits themselves where they are float32, and those belong to the model (or to llama.cpp).
    scores = logits.float()
    if scores is logits and any(sampler.edits for sampler in samplers):
        scores = _copy(logits)
    for row, sampler in enumerate(samplers):
        settings = sampler.settings
        if sampler.logit_bias:
            _edit(scores[row], list(sampler.logit_bias), torch.tensor(list(sampler.logit_bias.values())).add)
        if settings.repetition_penalty != 1:
            _edit(scores[row], sampler.seen, partial(_penalise, penalty=float(settings.repetition_penalty)))
        if sampler.counts and (settings.presence_penalty or settings.frequency_penalty):
            counts = torch.tensor(list(sampler.counts.values()), dtype=torch.float32)
            cost = counts * settings.frequency_penalty + settings.presence_penalty
            _edit(scores[row], list(sampler.counts), (-cost).add)
        if sampler.length < settings.min_new_tokens and sampler.stop_ids:
            scores[row, sampler.stop_ids] = -math.inf
        if sampler.constraint is not None:
            allowed = sampler.constraint.allowed().to(scores.device)
            scores[row, : len(allowed)].masked_fill_(~allowed[: scores.shape[1]], -math.inf)
            scores[row, len(allowed) :] = -math.inf  # rows of padding, which no grammar knows
    return scores


def _copy(logits: Tensor) -> Tensor:
    """A copy; on the CPU by numpy, since torch's threads would go on spinning beside those of llama.cpp."""
    return logits.clone() if logits.device.type != "cpu" else torch.from_numpy(logits.numpy().copy())


def _penalise(scores: Tensor, penalty: float) -> Tensor:
    return torch.where(scores < 0, scores * penalty, scores / penalty)


def _edit(row: Tensor, ids: Sequence[int], change: Callable[[Tensor], Tensor]) -> None:
    """Replace the scores of some tokens of a row (V,) by what `change` makes of them, on the CPU."""
    # `change` has tensors of its own, which are on the CPU; the tokens are few.
    places = torch.tensor(ids, device=row.device)
    row[places] = change(row[places].cpu()).to(row)


# ---------------------------------------------------------------- drawing


def _pick(scores: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The likeliest token of rows that do not sample, one at random of the others."""
    tokens = [0] * len(samplers) if all(sampler.settings.samples for sampler in samplers) else argmax_tokens(scores)
    # By kind, not all by the most general one: sorting a whole vocabulary is dear, and a row's candidates must not
    # depend on the settings beside it.
    groups: dict[str, list[int]] = {}
    for row, sampler in enumerate(samplers):
        if sampler.settings.samples:
            groups.setdefault(_kind(sampler.settings), []).append(row)
    for rows in groups.values():
        own = scores if len(rows) == len(samplers) else scores[rows]
        drawn = draw([samplers[row] for row in rows], *filter_probabilities(own, [samplers[row] for row in rows]))
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _kind(settings: GenerationArguments) -> str:
    """How a row's candidates are found; it depends on the row alone, never on the rows beside it."""
    return "top_k" if settings.top_k > 0 else "top_p" if settings.top_p < 1 else "all"


def filter_probabilities(scores: Tensor, samplers: Sequence[Sampler]) -> tuple[Tensor, Tensor | None]:
    """Probabilities of what may be drawn after temperature, top_k, top_p and min_p, in this order.

    Args: scores: (B, V), of rows of one kind.
    Returns: (B, K) float64, not normalised; and the tokens (B, K) they belong to, in the order of their ids, or None
        where they are all tokens.
    """

    def column(name: str) -> Tensor:
        values = [float(getattr(sampler.settings, name)) for sampler in samplers]
        return torch.tensor(values, dtype=torch.float64, device=scores.device).unsqueeze(1)

    kind, ids = _kind(samplers[0].settings), None
    if kind == "top_k":
        counts = column("top_k")
        scores, ids = scores.topk(min(max(sampler.settings.top_k for sampler in samplers), scores.shape[1]))
        scores = scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= counts, -math.inf)
    elif kind == "top_p":
        scores, ids = scores.sort(descending=True)
    # In float64: they are summed over the whole vocabulary, here and where tokens are drawn.
    probabilities = torch.softmax(scores / column("temperature").to(scores), -1, dtype=torch.float64)
    if kind != "all":
        # The token that reaches top_p stays: what counts is the sum before it.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= column("top_p"), 0)
    # Back in the order of the ids: by likelihood, rounding (which differs with the batch and the processor) would swap
    # tokens that are almost equally likely, and with them what a random number picks.
    if ids is not None and kind == "top_p":
        probabilities, ids = torch.zeros_like(probabilities).scatter(-1, ids, probabilities), None
    elif ids is not None:
        ids, order = ids.sort(-1)
        probabilities = probabilities.gather(-1, order)
    least = column("min_p") * probabilities.amax(-1, keepdim=True)
    return probabilities.masked_fill(probabilities < least, 0), ids


def draw(samplers: Sequence[Sampler], probabilities: Tensor, ids: Tensor | None) -> list[int]:
    """A token of each row, by the row's own random numbers; arguments as `filter_probabilities` returns them."""
    totals = probabilities.cumsum(-1)
    numbers = torch.tensor([[sampler.draw()] for sampler in samplers], dtype=torch.float64, device=totals.device)
    places = torch.searchsorted(totals, numbers * totals[:, -1:], right=True)  # (B, 1)
    places.clamp_(max=totals.shape[1] - 1)  # where rounding puts the number at the very end
    tokens: list[int] = (places if ids is None else ids.gather(1, places))[:, 0].tolist()
    return tokens


def _logprobs(logits: Tensor, samplers: Sequence[Sampler], tokens: Sequence[int]) -> list[TokenLogprob | None]:
    rows = [row for row, sampler in enumerate(samplers) if sampler.top_logprobs is not None]
    found: list[TokenLogprob | None] = [None] * len(tokens)
    if not rows:
        return found
    logprobs = torch.log_softmax(logits[rows].float(), -1)
    for line, row in zip(logprobs, rows, strict=True):
        values, ids = line.topk(samplers[row].top_logprobs or 0)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found[row] = TokenLogprob(tokens[row], float(line[tokens[row]]), top)
    return found
