"""Speculative decoding: a draft writes some tokens ahead, and the model checks them all in one forward pass.

Whatever is drafted, answers are the model's own. A token that the draft has chosen for certain is accepted if it is
the one that the model chooses in its turn, with its own settings and random numbers: greedy answers, and those drawn
beside such drafts, are the same token for token. A token that the draft has drawn at random is accepted or replaced
by rejection sampling, after which answers have the model's distribution.

Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et al. 2023,
"Accelerating Large Language Model Decoding with Speculative Sampling". Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .batching import BatchScheduler, RequestRope, Row
from .engine import TokenSequence
from .sampling import Sampler, TokenLogprob, choose, draw, filter_probabilities, process_logits

MOST_ROWS = 4  # answers written at once; where more are, the passes are full without drafts
LONGEST = 16  # tokens drafted at once by themselves
MEMORY = 0.95  # what a record keeps at each further entry: it spans about 20
CLASSES = 10  # of how sure a draft is; each has a record of its own
REST, LONGEST_REST = 16, 128  # passes without a draft where drafts do not pay: at first, and in the long run
PROBE = 2  # tokens drafted at most after such a rest
CHECK_COST, PLACE_COST = 0.1, 0.05  # what checking drafts adds to a pass of the model, and each token of them
MEASURED = 32  # every so many-th pass goes without a draft, to see what drafts save


@dataclass
class Proposal:
    """Tokens drafted for a row, and the distributions (V,) they were drawn from; none if they were not drawn."""

    tokens: list[int] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)  # float64, sums of 1


class Draft(abc.ABC):
    """What drafts, for one scheduler. The scheduler tells it what happens to its slots.

    Attributes:
        cost: of a drafted token, in forward passes of the model.
    """

    cost = 0.0

    @abc.abstractmethod
    def propose(
        self, sequences: Sequence[TokenSequence], counts: Sequence[int], controllers: Sequence[DraftLengthController]
    ) -> list[Proposal]:
        """Draft what comes next: at most counts[i] tokens for the sequence in slot i, while controllers[i] goes on."""

    # A draft without keys and values of its own has nothing to do here.

    def swap(self, one: int, other: int) -> None:  # noqa: B027
        """Two slots were exchanged."""

    def copy(self, source: int, slot: int, length: int) -> None:  # noqa: B027
        """A slot begins with the first `length` tokens of another now."""

    def truncate(self, slot: int, length: int) -> None:  # noqa: B027
        """A new row is in a slot; only the first `length` tokens there are its own."""


# ---------------------------------------------------------------- how much is drafted


class _Record:
    """A share of cases, the later ones counting more."""

    def __init__(self, share: float, weight: float) -> None:
        self._hits, self._weight = share * weight, weight

    @property
    def share(self) -> float:
        """What was given to begin with, until enough has been seen."""
        return self._hits / self._weight

    def add(self, hits: float, weight: float = 1.0) -> None:
        self._hits, self._weight = MEMORY * self._hits + hits, MEMORY * self._weight + weight


class DraftLengthController:
    """How many tokens to draft for one answer, by what became of those before.

    A token more is drafted where the tokens it is expected to bring are more than the same time brings otherwise: its
    chance of being accepted, with all before it, against its cost times the tokens that a pass's time has brought of
    late. How likely a token is accepted is learnt for each class of how sure the draft was of it.
    """

    def __init__(self, cost: float, fixed: int = 0) -> None:
        """`cost`: of a drafted token, in passes of the model; `fixed`: always draft so many."""
        self._cost, self._fixed = cost + PLACE_COST, fixed
        # It begins hopefully, or it would never draft and never learn; a few cases outweigh what it begins with.
        self._accepted = _Record(0.75, 4)
        self._classes = [_Record(0.25 + 0.75 * (number + 0.5) / CLASSES, 3) for number in range(CLASSES)]
        self._speed = _Record(1.5, 2)  # tokens a pass's time
        # Hysteresis: where drafts do not pay it rests for some passes, each time twice as long as the last, and then
        # tries a short one; without a rest it would waste a probe on every pass.
        self._passes, self._resting, self._rest = 0, 0, REST
        self._drafted: list[int] = []  # the class of each token drafted for this pass
        self._standing = 1.0  # the chance that all of them are accepted

    def length(self) -> int:
        """How many tokens to draft at most before the next pass; called once for each pass."""
        self._passes += 1
        self._drafted, self._standing = [], 1.0
        # Clock compares the others with these passes; the first comes early, so that short answers have one too.
        if self._passes % MEASURED == MEASURED // 4:
            return 0
        if self._fixed > 0:
            return self._fixed
        if self._resting:
            self._resting -= 1
            return 0 if self._resting else PROBE  # the pass after the rest shows whether the text has changed
        if self._speed.share > 1 and self._pays():
            self._rest = REST
            return LONGEST
        self._resting, self._rest = self._rest, min(2 * self._rest, LONGEST_REST)
        self._speed = _Record(1.5, 2)  # what was learnt before the rest is of another text
        return 0

    def goes_on(self, confidence: float) -> bool:
        """Whether to draft another token after one of which the draft was so sure, 0-1."""
        number = min(int(confidence * CLASSES), CLASSES - 1)
        self._drafted.append(number)
        self._standing *= self._classes[number].share
        return self._fixed > 0 or self._pays()

    def _pays(self) -> bool:
        # At least 1: a pass without drafts brings a token.
        return self._standing * self._accepted.share > max(1.0, self._speed.share) * self._cost

    def note(self, place: int, accepted: bool) -> None:
        """The drafted token at this place was looked at."""
        self._accepted.add(accepted)
        # A draft of another vocabulary has as many classes as tokens of its own, which may be fewer.
        if place < len(self._drafted):
            self._classes[self._drafted[place]].add(accepted)

    def end(self, tokens: int) -> None:
        """The pass has brought so many tokens."""
        self._speed.add(tokens, 1 + CHECK_COST + self._cost * len(self._drafted))


class Clock:
    """What drafts save, by the time of passes in which one answer was written alone."""

    def __init__(self) -> None:
        self._plain_seconds, self._plain_passes = 0.0, 0
        self._seconds, self._tokens = 0.0, 0

    def note(self, seconds: float, tokens: int, drafted: bool) -> None:
        """A pass, with its draft where it had one."""
        self._seconds += seconds
        self._tokens += tokens
        if not drafted:
            self._plain_seconds += seconds
            self._plain_passes += 1

    @property
    def speed_up(self) -> float | None:
        """Seconds of a token without drafts over seconds of a token; None if there is too little to tell."""
        if self._plain_passes < 3 or not self._tokens:
            return None
        return (self._plain_seconds / self._plain_passes) / (self._seconds / self._tokens)


@dataclass
class Speculation:
    """How an engine drafts.

    Attributes:
        make_draft: what drafts for a scheduler.
        k: tokens drafted at once; 0 or less: as many as pay off.
    """

    make_draft: Callable[[SpeculativeScheduler], Draft]
    k: int = 0
    clock: Clock = field(default_factory=Clock)


# ---------------------------------------------------------------- checking what was drafted


def distribution(scores: Tensor, sampler: Sampler) -> Tensor:
    """Probabilities of all tokens, (V,) float64, from the scores (V,) of a row that samples; see `process_logits`."""
    probabilities, ids = filter_probabilities(scores.unsqueeze(0), [sampler])
    if ids is not None:
        probabilities = torch.zeros_like(scores, dtype=torch.float64).unsqueeze(0).scatter_(1, ids, probabilities)
    return probabilities[0] / probabilities.sum()


def rejection_sample(logits: Tensor, sampler: Sampler, token: int, drafted: Tensor) -> int:
    """Rejection sampling: the drafted token, or one in its place, so that the outcome is distributed as the model's.

    Args:
        logits: (V,), of the model.
        drafted: (V,), the distribution that `token` was drawn from.
    Source: Leviathan et al. 2023, algorithm 1.
    """
    # As the draft's, this distribution is what is left after penalties and filters; raw ones would not compare.
    own = distribution(process_logits(logits.unsqueeze(0), [sampler])[0], sampler)
    drafted = drafted.to(own.device)
    # Accepted with probability min(1, own / drafted), written without a division by what may be tiny.
    if sampler.draw() * float(drafted[token]) < float(own[token]):
        return token
    rest = (own - drafted).clamp_(min=0)  # what the drafts are too seldom
    if not float(rest.sum()):  # the two are the same but for rounding
        rest = own
    return draw([sampler], rest.unsqueeze(0), None)[0]


def verify_drafts(
    logits: Tensor, samplers: Sequence[Sampler], drafted: Sequence[tuple[int, Tensor] | None]
) -> tuple[list[int], list[TokenLogprob | None]]:
    """As `choose`, for logits (B, V); `drafted`: a token and what it was drawn from, in rows where one was drawn."""
    tokens = [0] * len(samplers)
    logprobs: list[TokenLogprob | None] = [None] * len(samplers)
    others = [row for row, proposed in enumerate(drafted) if proposed is None]
    # These are chosen as without drafts, with the same random numbers: which is why drafts that were not drawn change
    # no answer.
    if others:
        chosen = choose(logits if len(others) == len(samplers) else logits[others], [samplers[row] for row in others])
        for row, token, logprob in zip(others, *chosen, strict=True):
            tokens[row], logprobs[row] = token, logprob
    for row, proposed in enumerate(drafted):
        if proposed is not None:
            tokens[row] = rejection_sample(logits[row], samplers[row], *proposed)
    return tokens, logprobs


class SpeculativeScheduler(BatchScheduler):
    """A BatchScheduler whose rows advance by several tokens a pass where a draft has guessed them.

    Attributes:
        counts: those of BatchScheduler; drafted and accepted tokens; passes: how often the model computed a row's
            next token.
    """

    def __init__(
        self, model: Any, max_batch_size: int, request_rope: RequestRope | None, speculation: Speculation
    ) -> None:
        super().__init__(model, max_batch_size, request_rope)
        self.counts |= dict.fromkeys(("drafted", "accepted", "passes"), 0)
        self._k, self._clock = speculation.k, speculation.clock
        # Weak: sequences end in several places, and nobody has to remember this one.
        self._controllers: WeakKeyDictionary[TokenSequence, DraftLengthController] = WeakKeyDictionary()
        self._draft = speculation.make_draft(self)

    def step(self) -> bool:
        # Only passes of one answer, without a prompt beside it, take times that can be compared.
        alone = len(self._rows) == self._decoding == 1
        before, start = dict(self.counts), time.perf_counter()
        more = super().step()
        new = {name: count - before[name] for name, count in self.counts.items()}
        if alone and new["passes"] and not new["prompt_tokens"]:
            self._clock.note(time.perf_counter() - start, new["new_tokens"], bool(new["drafted"]))
        return more

    # ------------------------------------------------------------ slots

    def _allocate_slot(self, row: Row) -> int:
        length = super()._allocate_slot(row)
        self._draft.truncate(len(self._rows) - 1, length)
        return length

    def _swap(self, one: int, other: int) -> None:
        super()._swap(one, other)
        self._draft.swap(one, other)

    def _copy(self, source: int, slot: int, length: int) -> None:
        super()._copy(source, slot, length)
        self._draft.copy(source, slot, length)

    # ------------------------------------------------------------ tokens

    def _decode(self) -> dict[int, Tensor]:
        sequences = [
            row.sequence for row in self._rows[: self._decoding]
        ]  # no guides: guidance is refused with drafts
        counts = self._counts(sequences)
        controllers = [self._controller(sequence) for sequence in sequences]
        proposals = self._draft.propose(sequences, counts, controllers) if any(counts) else []
        for slot, sequence in enumerate(sequences):  # a draft of the model's first layers leaves its tokens there
            self._cache.truncate(slot, len(sequence.tokens) - 1)
        if not any(proposal.tokens for proposal in proposals):
            return super()._decode()
        tokens = [
            [sequence.tokens[-1], *proposal.tokens] for sequence, proposal in zip(sequences, proposals, strict=True)
        ]
        self._check(sequences, proposals, self.logits(0, tokens, keep=max(map(len, tokens))))
        return {}  # these rows have advanced already

    def _counts(self, sequences: Sequence[TokenSequence]) -> list[int]:
        """How many tokens to draft for each row; a pass gives one more, which has to have room too."""
        if len(sequences) > MOST_ROWS:
            return [0] * len(sequences)
        return [
            min(self._controller(sequence).length(), sequence.room - sequence.sampler.length - 1)
            for sequence in sequences
        ]

    def _controller(self, sequence: TokenSequence) -> DraftLengthController:
        if sequence not in self._controllers:
            self._controllers[sequence] = DraftLengthController(self._draft.cost, self._k)
        return self._controllers[sequence]

    def _check(self, sequences: Sequence[TokenSequence], proposals: Sequence[Proposal], logits: Tensor) -> None:
        """Advance each row by the drafted tokens that hold and by one of the model's own; logits: (B, T, V)."""
        self.counts["passes"] += len(sequences)
        self.counts["drafted"] += sum(len(proposal.tokens) for proposal in proposals)
        first = [logits.shape[1] - 1 - len(proposal.tokens) for proposal in proposals]
        before = [len(sequence.tokens) for sequence in sequences]
        holding, ended, place = list(range(len(sequences))), [], 0
        # Place by place, not row by row, so that one call chooses for all rows. A row goes on while its draft holds:
        # the logits of a place are right only after the very tokens that were computed before it.
        while holding:
            here = torch.stack([logits[row, first[row] + place] for row in holding])
            samplers = [sequences[row].sampler for row in holding]
            chosen = verify_drafts(here, samplers, [_drawn(proposals[row], place) for row in holding])
            self.counts["new_tokens"] += len(holding)
            still = []
            for row, token, logprob in zip(holding, *chosen, strict=True):
                sequence, drafted = sequences[row], proposals[row].tokens[place : place + 1]
                if drafted:
                    self._controller(sequence).note(place, drafted == [token])
                    self.counts["accepted"] += drafted == [token]
                if sequence.advance(token, logprob):  # first: an end token that was drafted ends the answer too
                    ended.append(sequence)
                elif drafted == [token]:
                    still.append(row)
            holding, place = still, place + 1
        for slot, sequence in enumerate(sequences):
            self._controller(sequence).end(len(sequence.tokens) - before[slot])
            # The last token was chosen, not computed; behind it stand drafts that did not hold.
            self._cache.truncate(slot, len(sequence.tokens) - 1)
        for sequence in ended:
            self._release_slot(sequence)

    def _advance(self, ready: dict[int, Tensor]) -> None:
        self.counts["passes"] += len(ready)
        super()._advance(ready)


def _drawn(proposal: Proposal, place: int) -> tuple[int, Tensor] | None:
    """The token drafted at a place and what it was drawn from; None if there is none, or if it was not drawn."""
    if place >= len(proposal.probabilities):
        return None
    return proposal.tokens[place], proposal.probabilities[place]


def describe_speculation(statistics: Mapping[str, float]) -> str:
    """What came of the drafts, in a line, from an engine's statistics."""
    drafted, passes = statistics["drafted"], statistics["passes"]
    if not drafted:
        return "speculative decoding: nothing was drafted"
    parts = [
        f"{statistics['accepted']:.0f} of {drafted:.0f} drafted tokens accepted "
        f"({statistics['accepted'] / drafted:.0%})",
        f"{statistics['new_tokens'] / passes:.2f} tokens a pass of the model",
    ]
    if "speed_up" in statistics:
        parts.append(f"about {statistics['speed_up']:.2f}x as fast as passes without a draft")
    return f"speculative decoding: {', '.join(parts)}"
