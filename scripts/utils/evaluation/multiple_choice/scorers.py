"""What answers multiple-choice questions: a model loaded here, whatever its engine, or one behind a server."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ...core.arguments import GenerationArguments
from ...core.errors import InputError
from ...generation.engine import Completion, Engine, Request
from ...generation.transformers_engine import TransformersEngine
from ..endpoints import TIMEOUT, Endpoint, EndpointError
from .scoring import COUNTS, ChoiceRequest, ChoiceScore, OnScore, PrefixScorer, Scorer, check_requests

logger = logging.getLogger(__name__)

UNLISTED = -9999.0  # of a token that is not among the likeliest, which are all that a server tells
LISTED, LISTED_IN_CHAT = 5, 20  # likeliest tokens asked for, the most that the protocol has
CONTEXT_ERROR = "context_length_exceeded"


def open_scorer(engine: Engine, exact: bool = True) -> Scorer:
    """Scores with an engine that answers nothing else meanwhile.

    Args: exact: see PrefixScorer; llama.cpp's logits are in float32 anyhow.
    Raises: InputError for one that cannot.
    """
    if isinstance(engine, TransformersEngine):
        return PrefixScorer(engine.model, exact=exact)
    if engine.name == "vllm":
        raise InputError("--engine vllm: start `vllm serve`, and score through its address as any OpenAI server's")
    return EngineScorer(engine)


# ---------------------------------------------------------------- engines


class Forced:
    """A sampling.Constraint that allows one sequence of tokens."""

    def __init__(self, ids: Sequence[int], rows: int) -> None:
        self._ids, self._rows, self._place = ids, rows, 0

    def allowed(self) -> Tensor:
        """See Constraint."""
        allowed = torch.zeros(self._rows, dtype=torch.bool)
        allowed[self._ids[self._place]] = True
        return allowed

    def advance(self, token_id: int) -> None:
        """See Constraint."""
        self._place = min(self._place + 1, len(self._ids) - 1)


class EngineScorer:
    """Scorer on an engine that keeps what prompts have in common, such as llama.cpp's: it writes what it is told to.

    A token's log-probability is the model's own, whatever forces the choice.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._rows = engine, len(engine.tokenizer)
        self.counts = dict.fromkeys(COUNTS, 0)

    def score(self, requests: Sequence[ChoiceRequest], on_score: OnScore | None = None) -> list[ChoiceScore]:
        """See Scorer. Raises: InputError for requests beyond the context."""
        check_requests(requests, self._engine.context)
        before = self._engine.statistics()
        slots = int(before["max_batch_size"])
        order = sorted(range(len(requests)), key=lambda number: requests[number].prompt)  # who shares stands together
        scores: dict[int, ChoiceScore] = {}
        for start in range(0, len(order), slots):  # so many that a prompt still stands in its slot for the next choice
            numbers = order[start : start + slots]
            found = self._score_batch([requests[number] for number in numbers])
            for number, logprobs in zip(numbers, found, strict=True):
                scores[number] = ChoiceScore(logprobs)
                if on_score:
                    on_score(number, scores[number])
        after = self._engine.statistics()
        used = {name: int(after[name] - before[name]) for name in ("prompt_tokens", "cached_tokens", "new_tokens")}
        self.counts["computed_tokens"] += used["prompt_tokens"] - used["cached_tokens"] + used["new_tokens"]
        self.counts["requests"] += len(requests)
        self.counts["prompt_tokens"] += sum(len(request.prompt) for request in requests)
        return [scores[number] for number in range(len(requests))]

    def _score_batch(self, requests: Sequence[ChoiceRequest]) -> list[tuple[float, ...]]:
        """First every prompt with its first continuation, then with its second, and so on."""
        most = max(len(request.continuations) for request in requests)
        asked = [
            (row, place)
            for place in range(most)
            for row, request in enumerate(requests)
            if place < len(request.continuations)
        ]
        completions = self._engine.generate(
            [self._force(requests[row].prompt, requests[row].continuations[place]) for row, place in asked]
        )
        found = dict(zip(asked, completions, strict=True))
        return [
            tuple(_sum(found[row, place], ids) for place, ids in enumerate(request.continuations))
            for row, request in enumerate(requests)
        ]

    def _force(self, prompt: Sequence[int], ids: Sequence[int]) -> Request:
        settings = GenerationArguments(max_new_tokens=len(ids), do_sample=False, repetition_penalty=1.0)
        return Request(prompt, settings, top_logprobs=0, constraint=Forced(ids, self._rows))

    def close(self) -> None:
        """See Scorer. The engine is whose it was."""


def _sum(completion: Completion, ids: Sequence[int]) -> float:
    if completion.token_ids != list(ids):
        raise InputError(f"a continuation has a token that ends answers before its last: {list(ids)}")
    return sum(token.logprob for token in completion.logprobs)


# ---------------------------------------------------------------- servers


class ServerScorer(Endpoint):
    """Scorer on a model behind an OpenAI-compatible server, which tokenises texts itself.

    A continuation of one character is looked for among the likeliest next tokens that the server lists, exactly as it
    is after a text, without white space around it after a conversation; what is not listed counts as UNLISTED. Longer
    ones, and questions of which no continuation is listed, need a server that tells the log-probabilities of prompts
    ("echo" with "logprobs"), as vLLM's does. A request that fails after all tries becomes a score with an error.
    """

    def __init__(self, name: str, address: str, max_batch_size: int = 8) -> None:
        """`max_batch_size`: requests under way at once; the others: see Endpoint."""
        import openai

        super().__init__(name, address)
        self._max_batch_size, self._lock = max_batch_size, Lock()
        self.counts = dict.fromkeys(COUNTS, 0)
        client = openai.DefaultHttpxClient(event_hooks={"request": [self._note_request]}, timeout=TIMEOUT)
        self._client = self._client.with_options(http_client=client)

    def score(self, requests: Sequence[ChoiceRequest], on_score: OnScore | None = None) -> list[ChoiceScore]:
        """See Scorer. Raises: InputError where no request can succeed."""
        self._check(requests)
        scores: dict[int, ChoiceScore] = {}
        with ThreadPoolExecutor(self._max_batch_size) as pool:
            futures = {pool.submit(self._score, request): number for number, request in enumerate(requests)}
            try:
                for future in as_completed(futures):
                    number, score = futures[future], future.result()
                    scores[number] = score
                    self._count(requests=1, errors=int(score.error is not None))
                    if on_score:
                        on_score(number, score)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [scores[number] for number in range(len(requests))]

    def _check(self, requests: Sequence[ChoiceRequest]) -> None:
        """Raises: InputError for what the server, or the protocol, cannot tell."""
        logger.info("%s: %s, model %s", self.name, self.url, self.model)  # it answers
        longer = [request for request in requests if not all(map(_is_letter, request.texts))]
        if any(isinstance(request.text, list) for request in longer):
            raise InputError(
                f"{self.name}: a server tells no likelihood of longer texts in a conversation; ask for letters, or "
                "for generated answers"
            )
        if longer and not self._echoes:
            raise InputError(
                f"{self.name}: {self.url} does not tell log-probabilities of prompts (echo with logprobs), which "
                "continuations of several tokens need; use a server that does, such as vLLM's, ask for letters, or "
                "load the model here"
            )

    def _score(self, request: ChoiceRequest) -> ChoiceScore:
        import openai

        try:
            return ChoiceScore(self._ask_likelihoods(request))
        except EndpointError as error:
            return ChoiceScore((), str(error))
        except openai.APIError as error:
            self._refuse(error)
            if isinstance(error, openai.BadRequestError) and error.code != CONTEXT_ERROR:
                raise InputError(f"{self.name}: {self.url} refuses requests: {error}") from None
            return ChoiceScore((), f"{type(error).__name__}: {error}")

    def _ask_likelihoods(self, request: ChoiceRequest) -> tuple[float, ...]:
        text, texts = request.text, request.texts
        if isinstance(text, str) and not all(map(_is_letter, texts)):
            return tuple(self._echo(text, continuation) for continuation in texts)
        listed = self._complete(text) if isinstance(text, str) else self._chat(text)
        found = [_find(continuation, listed, exact=isinstance(text, str)) for continuation in texts]
        if any(value is not None for value in found):
            return tuple(UNLISTED if value is None else value for value in found)
        if isinstance(text, str) and self._echoes:
            return tuple(self._echo(text, continuation) for continuation in texts)
        names = ", ".join(map(repr, listed))
        raise EndpointError(f"no continuation is among the likeliest tokens that the server lists ({names})")

    # ------------------------------------------------------------ requests

    def _complete(self, text: str) -> dict[str, float]:
        choice = self._completion(prompt=text, max_tokens=1, logprobs=LISTED)
        return _listed(choice.logprobs)

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> dict[str, float]:
        options = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": LISTED_IN_CHAT}
        response = self._create([dict(message) for message in messages], options, stream=False)
        self._note_usage(response)
        return _listed(response.choices[0].logprobs if response.choices else None)

    def _echo(self, text: str, continuation: str) -> float:
        """The log-likelihood of a continuation: of all tokens that reach into it."""
        choice = self._completion(prompt=text + continuation, max_tokens=1, logprobs=1, echo=True)
        told = choice.logprobs
        places, values = list(told.text_offset), list(told.token_logprobs)
        count = choice.prompt_tokens
        # Counted from its end, since some servers count BOS as characters of the text.
        end = places[count] if count < len(places) else len(choice.text)
        ends = [*places[1:count], end]
        chosen = [value for value, stop in zip(values[:count], ends, strict=True) if stop > end - len(continuation)]
        if not chosen or None in chosen:
            raise EndpointError("the server's answer does not tell the log-probabilities of the continuation")
        return float(sum(chosen))

    def _completion(self, **options: Any) -> Any:
        """The one choice, with `prompt_tokens`. Raises: EndpointError if it has no log-probabilities."""
        create: Any = self._client.completions.create
        response = create(model=self.model, temperature=0, **options)
        self._note_usage(response)
        if not response.choices or response.choices[0].logprobs is None:
            raise EndpointError("the server's answer has no log-probabilities")
        choice = response.choices[0]
        choice.prompt_tokens = response.usage.prompt_tokens if response.usage else len(choice.logprobs.tokens) - 1
        return choice

    @cached_property
    def _echoes(self) -> bool:
        """Whether the server tells log-probabilities of prompts."""
        import openai

        try:
            self._echo("A B", " C")
        except (openai.BadRequestError, openai.UnprocessableEntityError, EndpointError, TypeError, AttributeError):
            return False
        except openai.APIError as error:
            self._refuse(error)
            raise InputError(f"{self.name}: {self.url} fails: {error}") from None
        return True

    # ------------------------------------------------------------ counts

    def _note_request(self, request: Any) -> None:
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            self._count(retries=1)

    def _note_usage(self, response: Any) -> None:
        if usage := response.usage:
            cached = getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None) or 0
            computed = usage.prompt_tokens - cached + (usage.completion_tokens or 0)
            self._count(prompt_tokens=usage.prompt_tokens, computed_tokens=computed)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self.counts[name] += number

    def close(self) -> None:
        """See Scorer."""
        self._client.close()


def _is_letter(text: str) -> bool:
    return len(text.strip()) == 1


def _find(text: str, listed: Mapping[str, float], exact: bool) -> float | None:
    """The log-probability of a text among those listed; where white space does not count, of its likeliest form."""
    if exact:
        return listed.get(text)
    return max((value for name, value in listed.items() if name.strip() == text.strip()), default=None)


def _listed(logprobs: Any) -> dict[str, float]:
    """What a server lists for the first token, as completions or as chat write it: {text: log-probability}.

    Raises: EndpointError if nothing.
    """
    rows = getattr(logprobs, "top_logprobs", None)
    if rows and rows[0]:
        return dict(rows[0])
    content = getattr(logprobs, "content", None)
    if not content:
        raise EndpointError("the server's answer has no log-probabilities")
    found: dict[str, float] = {}
    for item in content[0]["top_logprobs"] if isinstance(content[0], dict) else content[0].top_logprobs:
        token, value = (item["token"], item["logprob"]) if isinstance(item, dict) else (item.token, item.logprob)
        found[token] = max(value, found.get(token, value))  # two tokens can have one text
    return found
