"""Runs: questions with choices put to a model or a server, each answer written as it comes."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from ...core.arguments import GenerationArguments, InferenceArguments
from ...core.errors import InputError
from ...generation.engine import Prompter, Request
from ...generation.loading import EnginePlan
from ..endpoints import EndpointError, answer_options
from ..models import for_evaluation, weights_of
from ..progress import Parts
from .answer_reading import read_letter
from .answers import Choice, choose_by_likelihood
from .prompts import ChoicePrompt
from .results import ChoiceAnswer
from .scorers import ServerScorer, open_scorer
from .scoring import ChoiceScore, Scorer
from .wordings import Mode

SERVER = "server"  # its name in messages; its key is in SERVER_API_KEY
PLAIN_STOPS: dict[str, list[str]] = {"generative": ["\n\n"], "cot": ["。\n\n", ".\n\n"]}  # where an example ends
OnRow = Callable[[int, dict[str, Any]], None]


class ModelUnderTest(ABC):
    """What is asked: a model here, whose weights are not read yet, or a server.

    Attributes:
        prompter: writes and checks prompts; None: the server does.
        counts: totals of scoring, see Scorer; of generating, requests and errors.
    """

    prompter: Prompter | None = None
    counts: dict[str, int]

    @abstractmethod
    def describe(self) -> tuple[str, dict[str, Any]]:
        """A name, and what decides the answers."""

    @abstractmethod
    def _open_scorer(self) -> contextlib.AbstractContextManager[Scorer]:
        """What scores, while it is needed."""

    @abstractmethod
    def _write_answers(
        self, prompts: Sequence[ChoicePrompt], settings: GenerationArguments
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number of a prompt, its row), in the order in which they come."""

    def score(self, prompts: Sequence[ChoicePrompt], on_row: OnRow) -> None:
        """Ask for likelihoods: rows of logprobs, or of an error."""

        def on_score(number: int, score: ChoiceScore) -> None:
            on_row(number, {"error": score.error} if score.error else {"logprobs": list(score.logprobs)})

        with self._open_scorer() as scorer:
            scorer.score([prompt.request for prompt in prompts], on_score)
            self.counts = dict(scorer.counts)

    def generate(self, prompts: Sequence[ChoicePrompt], settings: GenerationArguments, on_row: OnRow) -> None:
        """Ask for answers: rows of text, or of an error."""
        self.counts = {"requests": len(prompts), "errors": 0}
        for number, row in self._write_answers(prompts, settings):
            self.counts["errors"] += "error" in row
            on_row(number, row)


class LocalModel(ModelUnderTest):
    """A model loaded here, whatever its engine."""

    def __init__(self, args: InferenceArguments, chat: bool, batch_size: int, exact: bool) -> None:
        """`exact`: see open_scorer. Raises: InputError if the files do not belong together."""
        self.prompter = self._plan = EnginePlan(for_evaluation(args), chat)
        self._batch_size, self._exact, self.counts = batch_size, exact, {}

    def describe(self) -> tuple[str, dict[str, Any]]:
        """Weights and template."""
        weights = weights_of(self._plan.args)
        return " + ".join(weights), {"weights": weights, "template": self._plan.template_name}

    @contextlib.contextmanager
    def _open_scorer(self) -> Iterator[Scorer]:
        with closing(self._plan.load(self._batch_size)) as engine, closing(open_scorer(engine, self._exact)) as scorer:
            yield scorer

    def _write_answers(
        self, prompts: Sequence[ChoicePrompt], settings: GenerationArguments
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        requests = [self._request(prompt, settings) for prompt in prompts]
        with closing(self._plan.load(self._batch_size * settings.prompts_per_answer)) as engine:
            answers = [engine.submit(request) for request in requests]
            for number, answer in enumerate(answers):
                yield number, {"text": answer.wait().text}

    def _request(self, prompt: ChoicePrompt, settings: GenerationArguments) -> Request:
        """Raises: InputError for a negative prompt that goes with no plain text, or has no room."""
        negative, text = None, prompt.request.text
        if settings.negative_prompt is not None:
            if isinstance(text, str):
                raise InputError(
                    "--negative_prompt: this preset writes its conversations as text; use --preset default"
                )
            negative = self._plan.encode_negative(text, settings)
        # A question's seed is its own, however many were answered before.
        request = Request(prompt.request.prompt, settings, settings.seed + _seed(prompt), negative_prompt=negative)
        self._plan.check(request)
        return request


class ServedModel(ModelUnderTest):
    """A model behind an OpenAI-compatible server."""

    def __init__(self, address: str, batch_size: int) -> None:
        """Raises: InputError if the address is none."""
        self._server, self._batch_size, self.counts = ServerScorer(SERVER, address, batch_size), batch_size, {}

    def describe(self) -> tuple[str, dict[str, Any]]:
        """The server and its model."""
        return self._server.model, {"server": self._server.url, "model": self._server.model}

    def _open_scorer(self) -> contextlib.AbstractContextManager[Scorer]:
        return closing(self._server)

    def _write_answers(
        self, prompts: Sequence[ChoicePrompt], settings: GenerationArguments
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        server, options = self._server, answer_options(settings, settings.seed)
        assert server.model  # found before there are threads, each of which would ask for it

        def ask(prompt: ChoicePrompt) -> dict[str, Any]:
            text = prompt.request.text
            try:
                return {"text": server.complete(text, options) if isinstance(text, str) else server.ask(text, options)}
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


def open_model(
    args: InferenceArguments, chat: bool, server_url: str | None, batch_size: int, exact: bool = True
) -> ModelUnderTest:
    """The model that is asked.

    Args: exact: see open_scorer.
    Raises: InputError if its files do not belong together, or the address is none.
    """
    return ServedModel(server_url, batch_size) if server_url else LocalModel(args, chat, batch_size, exact)


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
    prompts: Sequence[ChoicePrompt], parts: Parts, model: ModelUnderTest, mode: Mode, settings: GenerationArguments
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
                model.score(chosen, keep)
            else:
                model.generate(chosen, settings, keep)
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
        choice = Choice(read_letter(row["text"], question, mode))
    told = {name: value for name, value in asdict(choice).items() if value is not None}
    return ChoiceAnswer(
        question, choice.letter, choice.unnormalised, None, {**kept, **told, **row}, is_tied=bool(choice.tied)
    )
