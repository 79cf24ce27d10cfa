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

from .batching import Decoder, Rotations, Row
from .engine import Job
from .sampling import Chooser, TokenLogprob, adjust, candidates, choose, draw

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
    """What drafts, for one decoder. The decoder tells it what happens to its slots.

    Attributes:
        cost: of a drafted token, in forward passes of the model.
    """

    cost = 0.0

    @abc.abstractmethod
    def propose(self, jobs: Sequence[Job], counts: Sequence[int], paces: Sequence[Pace]) -> list[Proposal]:
        """Draft what comes next: at most counts[i] tokens for the job in slot i, while paces[i] goes on."""

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
        return self._hits / self._weight

    def add(self, hits: float, weight: float = 1.0) -> None:
        self._hits, self._weight = MEMORY * self._hits + hits, MEMORY * self._weight + weight


class Pace:
    """How many tokens to draft for one answer, by what became of those before.

    A token more is drafted where the tokens it is expected to bring are more than the same time brings otherwise: its
    chance of being accepted, with all before it, against its cost times the tokens that a pass's time has brought of
    late. How likely a token is accepted is learnt for each class of how sure the draft was of it.
    """

    def __init__(self, cost: float, fixed: int = 0) -> None:
        """`cost`: of a drafted token, in passes of the model; `fixed`: always draft so many."""
        self._cost, self._fixed = cost + PLACE_COST, fixed
        self._accepted = _Record(0.75, 4)
        self._classes = [_Record(0.25 + 0.75 * (number + 0.5) / CLASSES, 3) for number in range(CLASSES)]
        self._speed = _Record(1.5, 2)  # tokens a pass's time
        self._passes, self._resting, self._rest = 0, 0, REST
        self._drafted: list[int] = []  # the class of each token drafted for this pass
        self._standing = 1.0  # the chance that all of them are accepted

    def length(self) -> int:
        """How many tokens to draft at most before the next pass; called once for each pass."""
        self._passes += 1
        self._drafted, self._standing = [], 1.0
        if self._passes % MEASURED == MEASURED // 4:
            return 0
        if self._fixed > 0:
            return self._fixed
        if self._resting:
            self._resting -= 1
            return 0 if self._resting else PROBE
        if self._speed.share > 1 and self._pays():
            self._rest = REST
            return LONGEST
        self._resting, self._rest = self._rest, min(2 * self._rest, LONGEST_REST)
        self._speed = _Record(1.5, 2)
        return 0

    def goes_on(self, sureness: float) -> bool:
        """Whether to draft another token after one of which the draft was so sure, 0-1."""
        number = min(int(sureness * CLASSES), CLASSES - 1)
        self._drafted.append(number)
        self._standing *= self._classes[number].share
        return self._fixed > 0 or self._pays()

    def _pays(self) -> bool:
        return self._standing * self._accepted.share > max(1.0, self._speed.share) * self._cost

    def note(self, place: int, accepted: bool) -> None:
        """The drafted token at this place was looked at."""
        self._accepted.add(accepted)
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
        make_draft: what drafts for a decoder.
        k: tokens drafted at once; 0 or less: as many as pay off.
    """

    make_draft: Callable[[SpeculativeDecoder], Draft]
    k: int = 0
    clock: Clock = field(default_factory=Clock)


# ---------------------------------------------------------------- checking what was drafted


def distribution(scores: Tensor, chooser: Chooser) -> Tensor:
    """Probabilities of all tokens, (V,) float64, from the scores (V,) of a row that samples; see `adjust`."""
    probabilities, ids = candidates(scores.unsqueeze(0), [chooser])
    if ids is not None:
        probabilities = torch.zeros_like(scores, dtype=torch.float64).unsqueeze(0).scatter_(1, ids, probabilities)
    return probabilities[0] / probabilities.sum()


def accept_or_replace(logits: Tensor, chooser: Chooser, token: int, drafted: Tensor) -> int:
    """Rejection sampling: the drafted token, or one in its place, so that the outcome is distributed as the model's.

    Args:
        logits: (V,), of the model.
        drafted: (V,), the distribution that `token` was drawn from.
    Source: Leviathan et al. 2023, algorithm 1.
    """
    own = distribution(adjust(logits.unsqueeze(0), [chooser])[0], chooser)
    drafted = drafted.to(own.device)
    if chooser.draw() * float(drafted[token]) < float(own[token]):
        return token
    rest = (own - drafted).clamp_(min=0)
    if not float(rest.sum()):  # the two are the same but for rounding
        rest = own
    return draw([chooser], rest.unsqueeze(0), None)[0]


def choose_beside(
    logits: Tensor, choosers: Sequence[Chooser], drafted: Sequence[tuple[int, Tensor] | None]
) -> tuple[list[int], list[TokenLogprob | None]]:
    """As `choose`, for logits (B, V); `drafted`: a token and what it was drawn from, in rows where one was drawn."""
    tokens = [0] * len(choosers)
    logprobs: list[TokenLogprob | None] = [None] * len(choosers)
    others = [row for row, proposed in enumerate(drafted) if proposed is None]
    if others:
        chosen = choose(logits if len(others) == len(choosers) else logits[others], [choosers[row] for row in others])
        for row, token, logprob in zip(others, *chosen, strict=True):
            tokens[row], logprobs[row] = token, logprob
    for row, proposed in enumerate(drafted):
        if proposed is not None:
            tokens[row] = accept_or_replace(logits[row], choosers[row], *proposed)
    return tokens, logprobs


class SpeculativeDecoder(Decoder):
    """A Decoder whose rows advance by several tokens a pass where a draft has guessed them.

    Attributes:
        counts: those of Decoder; drafted and accepted tokens; passes: how often the model computed a row's next token.
    """

    def __init__(self, model: Any, num_slots: int, rotations: Rotations | None, speculation: Speculation) -> None:
        super().__init__(model, num_slots, rotations)
        self.counts |= dict.fromkeys(("drafted", "accepted", "passes"), 0)
        self._k, self._clock = speculation.k, speculation.clock
        self._paces: WeakKeyDictionary[Job, Pace] = WeakKeyDictionary()
        self._draft = speculation.make_draft(self)

    def step(self) -> bool:
        """See Decoder."""
        alone = len(self._rows) == self._decoding == 1
        before, start = dict(self.counts), time.perf_counter()
        more = super().step()
        new = {name: count - before[name] for name, count in self.counts.items()}
        if alone and new["passes"] and not new["prompt_tokens"]:
            self._clock.note(time.perf_counter() - start, new["new_tokens"], bool(new["drafted"]))
        return more

    # ------------------------------------------------------------ slots

    def _enter(self, row: Row) -> int:
        length = super()._enter(row)
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
        jobs = [row.job for row in self._rows[: self._decoding]]
        counts = self._counts(jobs)
        paces = [self._pace(job) for job in jobs]
        proposals = self._draft.propose(jobs, counts, paces) if any(counts) else []
        for slot, job in enumerate(jobs):  # a draft of the model's first layers leaves its tokens there
            self._cache.truncate(slot, len(job.tokens) - 1)
        if not any(proposal.tokens for proposal in proposals):
            return super()._decode()
        tokens = [[job.tokens[-1], *proposal.tokens] for job, proposal in zip(jobs, proposals, strict=True)]
        self._check(jobs, proposals, self.logits(0, tokens, keep=max(map(len, tokens))))
        return {}

    def _counts(self, jobs: Sequence[Job]) -> list[int]:
        """How many tokens to draft for each row; a pass gives one more, which has to have room too."""
        if len(jobs) > MOST_ROWS:
            return [0] * len(jobs)
        return [min(self._pace(job).length(), job.room - job.chooser.length - 1) for job in jobs]

    def _pace(self, job: Job) -> Pace:
        if job not in self._paces:
            self._paces[job] = Pace(self._draft.cost, self._k)
        return self._paces[job]

    def _check(self, jobs: Sequence[Job], proposals: Sequence[Proposal], logits: Tensor) -> None:
        """Advance each row by the drafted tokens that hold and by one of the model's own; logits: (B, T, V)."""
        self.counts["passes"] += len(jobs)
        self.counts["drafted"] += sum(len(proposal.tokens) for proposal in proposals)
        first = [logits.shape[1] - 1 - len(proposal.tokens) for proposal in proposals]
        before = [len(job.tokens) for job in jobs]
        holding, ended, place = list(range(len(jobs))), [], 0
        while holding:
            here = torch.stack([logits[row, first[row] + place] for row in holding])
            choosers = [jobs[row].chooser for row in holding]
            chosen = choose_beside(here, choosers, [_drawn(proposals[row], place) for row in holding])
            self.counts["new_tokens"] += len(holding)
            still = []
            for row, token, logprob in zip(holding, *chosen, strict=True):
                job, drafted = jobs[row], proposals[row].tokens[place : place + 1]
                if drafted:
                    self._pace(job).note(place, drafted == [token])
                    self.counts["accepted"] += drafted == [token]
                if job.advance(token, logprob):
                    ended.append(job)
                elif drafted == [token]:
                    still.append(row)
            holding, place = still, place + 1
        for slot, job in enumerate(jobs):
            self._pace(job).end(len(job.tokens) - before[slot])
            self._cache.truncate(slot, len(job.tokens) - 1)
        for job in ended:
            self._leave(job)

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
