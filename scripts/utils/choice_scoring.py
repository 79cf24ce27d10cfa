"""Scoring choices: how likely a model holds each of several continuations of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

OnScore = Callable[[int, "ChoiceScore"], None]
COUNTS = ("requests", "prompt_tokens", "computed_tokens", "retries", "errors")


@dataclass(frozen=True)
class ChoiceRequest:
    """A prompt, and the continuations whose likelihood after it is asked for.

    Attributes:
        prompt: token ids, for models that run here; BOS included where there is one.
        continuations: token ids of each, at least one.
        text: the same prompt for servers, a text to be continued or a conversation.
        texts: the same continuations for servers.
    """

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    text: str | list[dict[str, str]]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceScore:
    """What came of a request.

    Attributes:
        logprobs: log-likelihood of each continuation after the prompt, in nats, summed over its tokens.
        error: why there are none: a server failed, again and again.
    """

    logprobs: tuple[float, ...]
    error: str | None = None


class Scorer(Protocol):
    """What scores: a model here, or a server.

    Attributes:
        counts: totals of requests, prompt_tokens (in the prompts), computed_tokens (in forward passes, padding
            included), retries and errors.
    """

    counts: dict[str, int]

    def score(self, requests: Sequence[ChoiceRequest], on_score: OnScore | None = None) -> list[ChoiceScore]:
        """Score all, in order; `on_score` is told each score and the number of its request, as soon as it is known."""

    def close(self) -> None:
        """Free what is held."""


class ModelScorer:
    """Scorer on a transformers model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.counts = dict.fromkeys(COUNTS, 0)

    @torch.no_grad()
    def score(self, requests: Sequence[ChoiceRequest], on_score: OnScore | None = None) -> list[ChoiceScore]:
        """See Scorer."""
        scores = []
        for number, request in enumerate(requests):
            found = ChoiceScore(tuple(self._likelihood(request.prompt, ids) for ids in request.continuations))
            scores.append(found)
            if on_score:
                on_score(number, found)
        return scores

    def _likelihood(self, prompt: Sequence[int], continuation: Sequence[int]) -> float:
        ids = torch.tensor([[*prompt, *continuation[:-1]]], device=self.model.device)
        logits = self.model(input_ids=ids, logits_to_keep=len(continuation)).logits[0].float()
        targets = torch.tensor(continuation, device=logits.device).unsqueeze(1)
        return float(torch.log_softmax(logits, -1).gather(1, targets).sum())

    def close(self) -> None:
        """See Scorer."""
