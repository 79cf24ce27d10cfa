"""Runs: questions with choices put to a model or a server, each answer written as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from ...core.arguments import GenerationArguments, InferenceArguments
from ...core.errors import InputError
from ...generation.engine import Request
from ...generation.loading import EnginePlan
from ..endpoints import Endpoint, EndpointError
from ..models import weights_of
from ..progress import Parts
from .answers import choose_by_likelihood, parse_answer
from .prompts import ChoicePrompt
from .results import ChoiceAnswer
from .scorers import ServerScorer, open_scorer
from .scoring import ChoiceScore
from .wordings import Mode

SERVER = "server"  # its name in messages; its key is in SERVER_API_KEY
PLAIN_STOPS: dict[str, list[str]] = {"generative": ["\n\n"], "cot": ["。\n\n", ".\n\n"]}  # where an example ends
OnRow = Callable[[int, dict[str, Any]], None]


class Target:
    """What is asked: a model here, whose weights are not read yet, or a server.

    Attributes:
        plan: writes and checks prompts; None: the server does.
        counts: totals of scoring, see Scorer; of generating, requests and errors.
    """

    def __init__(self, args: InferenceArguments, chat: bool, server_url: str | None, batch_size: int) -> None:
        """Raises: InputError if the files do not belong together, or the address is none."""
        self.plan: EnginePlan | None = None
        self._url, self._batch_size = server_url, batch_size
        self.counts: dict[str, int] = {}
        if server_url is None:
            self.plan = EnginePlan(args, chat)
        self._endpoint = Endpoint(SERVER, server_url) if server_url else None

    def describe(self) -> tuple[str, dict[str, Any]]:
        """A name, and what decides the answers: weights and template, or the server and its model."""
        if self._endpoint is not None:
            return self._endpoint.model, {"server": self._endpoint.url, "model": self._endpoint.model}
        assert self.plan is not None
        weights = weights_of(self.plan.args)
        return " + ".join(weights), {"weights": weights, "template": self.plan.template_name}

    def score(self, prompts: Sequence[ChoicePrompt], on_row: OnRow) -> None:
        """Ask for likelihoods: rows of logprobs, or of an error."""

        def on_score(number: int, score: ChoiceScore) -> None:
            on_row(number, {"error": score.error} if score.error else {"logprobs": list(score.logprobs)})

        with contextlib.ExitStack() as stack:
            if self._url is not None:
                scorer: Any = ServerScorer(SERVER, self._url, concurrency=self._batch_size)
            else:
                assert self.plan is not None
                engine = self.plan.load(self._batch_size)
                stack.callback(engine.close)
                scorer = open_scorer(engine)
            stack.callback(scorer.close)
            scorer.score([prompt.request for prompt in prompts], on_score)
            self.counts = dict(scorer.counts)

    def generate(self, prompts: Sequence[ChoicePrompt], settings: GenerationArguments, on_row: OnRow) -> None:
        """Ask for answers: rows of text, or of an error."""
        write = self._ask_server if self._endpoint is not None else self._ask_engine
        self.counts = {"requests": len(prompts), "errors": 0}
        for number, row in write(prompts, settings):
            self.counts["errors"] += "error" in row
            on_row(number, row)

    def _ask_engine(
        self, prompts: Sequence[ChoicePrompt], settings: GenerationArguments
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        assert self.plan is not None
        engine = self.plan.load(self._batch_size)
        try:
            # A question's seed is its own, however many were answered before.
            answers = [engine.submit(Request(p.request.prompt, settings, settings.seed + _seed(p))) for p in prompts]
            for number, answer in enumerate(answers):
                yield number, {"text": answer.wait().text}
        finally:
            engine.close()

    def _ask_server(
        self, prompts: Sequence[ChoicePrompt], settings: GenerationArguments
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        endpoint = self._endpoint
        assert endpoint is not None and endpoint.model
        temperature = settings.temperature if settings.do_sample else 0.0
        options: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "temperature": temperature}
        options |= {"top_p": settings.top_p if settings.samples else 1.0, "seed": settings.seed}
        if settings.stop:
            options["stop"] = settings.stop

        def ask(prompt: ChoicePrompt) -> dict[str, Any]:
            text = prompt.request.text
            try:
                return {
                    "text": endpoint.complete(text, options) if isinstance(text, str) else endpoint.ask(text, options)
                }
            except EndpointError as error:
                return {"error": str(error)}

        with ThreadPoolExecutor(self._batch_size) as pool:
            futures = {pool.submit(ask, prompt): number for number, prompt in enumerate(prompts)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _seed(prompt: ChoicePrompt) -> int:
    """A number that is the question's own, the same in every run."""
    return sum(map(ord, f"{prompt.question.subject}/{prompt.question.id}")) % 100_003


def check_engine(args: InferenceArguments, mode: Mode) -> None:
    """Raises: InputError for an engine that cannot score."""
    if args.engine == "vllm" and mode in ("constrained", "cloze"):
        raise InputError(
            f"--engine vllm has no --mode {mode}; start `vllm serve` and pass its --server_url, or generate answers"
        )


def ask_all(
    prompts: Sequence[ChoicePrompt], parts: Parts, target: Target, mode: Mode, settings: GenerationArguments
) -> list[ChoiceAnswer]:
    """Answer all questions but those that `parts` has; an error is no part of it, and is asked again next time."""
    names = [(prompt.question.subject, prompt.question.id) for prompt in prompts]
    pending = [number for number, name in enumerate(names) if parts.get(*name) is None]
    errors: dict[int, str] = {}
    if pending:
        with tqdm(total=len(prompts), initial=len(prompts) - len(pending), unit="question", desc="asking") as bar:

            def keep(place: int, row: dict[str, Any]) -> None:
                number = pending[place]
                if "error" in row:
                    errors[number] = row["error"]
                else:
                    parts.add(row, *names[number])
                bar.update()

            chosen = [prompts[number] for number in pending]
            if mode in ("constrained", "cloze"):
                target.score(chosen, keep)
            else:
                target.generate(chosen, settings, keep)
    return [
        read_answer(prompt, mode, parts.get(*name), errors.get(number))
        for number, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]


def read_answer(prompt: ChoicePrompt, mode: Mode, row: dict[str, Any] | None, error: str | None) -> ChoiceAnswer:
    """What a row of a run says to its question."""
    question = prompt.question
    kept: dict[str, Any] = {"subject": question.subject, "id": question.id, "question": question.text}
    kept |= {"choices": list(question.choices), "answer": question.answer, "examples": prompt.num_examples}
    if row is None:
        return ChoiceAnswer(question, None, None, error or "not asked", {**kept, "error": error})
    if "logprobs" in row:
        choice = choose_by_likelihood(question, row["logprobs"], mode)
    else:
        choice = parse_answer(row["text"], question, mode)
    told = {name: value for name, value in asdict(choice).items() if value is not None}
    return ChoiceAnswer(question, choice.letter, choice.unnormalised, None, {**kept, **told, **row})
