"""Players: what takes part in an arena. Models loaded here, files of answers, OpenAI-compatible servers."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from ...core.arguments import GenerationArguments, InferenceArguments
from ...core.command_line import describe_arguments
from ...core.errors import InputError
from ...core.files import hash_file, hash_json
from ...core.records import iter_records
from ...generation.engine import Answer, Delta, Engine, FinishReason, Request
from ...generation.loading import EnginePlan
from ...text.prompts import Message, with_system_prompt
from ...weights.names import ADAPTER_CONFIG
from ..endpoints import Endpoint, EndpointError, answer_options, check_key_variables
from ..models import for_evaluation, short_name, split_name, weights_of
from ..progress import Predictions, answer_all
from .matchmaking import Question

OnDelta = Callable[[Delta], None]
# Of InferenceArguments, those that change what a model answers.
RECORDED = ("load_in_kbits", "quant_type", "rope_scaling", "rope_factor", "pi_factor", "system_prompt")


class Player(Protocol):
    """What answers questions under a name.

    Attributes:
        source: what it is, for the record; only "from", the place it was read from, may change between runs.
    """

    name: str
    source: dict[str, Any]

    def can_answer(self, question: Question) -> bool:
        """Whether it has an answer to the question."""

    def load(self, max_batch_size: int) -> None:
        """Get ready to give so many answers at once."""

    def submit(
        self, question: Question, settings: GenerationArguments, seed: int, on_delta: OnDelta | None = None
    ) -> Answer:
        """Begin to answer, without waiting. Raises: InputError for what cannot be answered."""

    def close(self) -> None:
        """Stop, and free what it holds; `load` makes it ready again."""


def ask(question: Question, system_prompt: str | None) -> list[Message]:
    """The messages that a question is."""
    return with_system_prompt(question.messages, system_prompt)


class LocalPlayer:
    """A model loaded here, or an adapter with the base it records."""

    def __init__(self, name: str, args: InferenceArguments) -> None:
        """Raises: InputError if the files do not belong together."""
        self.name = name
        self._plan, self._system_prompt = EnginePlan(args), args.system_prompt
        self._engine: Engine | None = None
        found = self._plan.args
        files = [path for path in (found.model_name_or_path, found.adapter_name_or_path) if path]
        recorded = {name: value for name, value in describe_arguments(found).items() if name in RECORDED}
        self.source = {
            "from": " + ".join(files),
            "weights": list(weights_of(found).values()),
            "template": self._plan.template_name,
            **({"sampling": own} if (own := self._plan.own_sampling) else {}),
            **recorded,
        }

    def can_answer(self, question: Question) -> bool:
        return True

    def check(self, questions: Sequence[Question], settings: GenerationArguments) -> None:
        """Raises: InputError for a question that leaves no room for an answer, before weights are read."""
        for question in questions:
            try:
                self._plan.check(self._request(question, settings, settings.seed))
            except InputError as error:
                raise InputError(f"{self.name}, question {question.id}: {error}") from None

    def load(self, max_batch_size: int) -> None:
        self._engine = self._engine or self._plan.load(max_batch_size)

    def submit(
        self, question: Question, settings: GenerationArguments, seed: int, on_delta: OnDelta | None = None
    ) -> Answer:
        assert self._engine is not None, "load first"
        return self._engine.submit(self._request(question, settings, seed), on_delta)

    def _request(self, question: Question, settings: GenerationArguments, seed: int) -> Request:
        messages = ask(question, self._system_prompt)
        # As its users meet it: a contestant's own sampling, where nobody asked for another.
        settings = settings.with_model_defaults(self._plan.own_sampling)
        negative = self._plan.encode_negative(messages, settings)
        return Request(self._plan.encode(messages), settings, seed, negative_prompt=negative)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None


class AnswersPlayer:
    """Answers made before: {"id", "answer"}, or {"Input", "Output"} as inference_hf.py writes them."""

    def __init__(self, name: str, path: str) -> None:
        """Raises: InputError naming the line of what is no answer, or a second, other one."""
        self.name, self.source = name, {"from": path, "sha256": hash_file(path)}
        self._answers: dict[str, str] = {}
        for location, record in iter_records(path):
            asked = record.get("id", record.get("Input"))
            answer = record.get("answer", record.get("Output"))
            if isinstance(asked, list) and asked and all(isinstance(turn, dict) for turn in asked):
                asked = _key(asked)
            if not isinstance(asked, str | int) or not isinstance(answer, str):
                raise InputError(
                    f"{location}: need 'id' and 'answer', or 'Input' and 'Output' as inference_hf.py writes them; "
                    f"the record has {', '.join(sorted(record))}"
                )
            if self._answers.setdefault(str(asked).strip(), answer) != answer:
                raise InputError(f"{location}: a second, other answer to {asked!r:.60}")

    def can_answer(self, question: Question) -> bool:
        return self._find(question) is not None

    def load(self, max_batch_size: int) -> None:
        pass

    def submit(
        self, question: Question, settings: GenerationArguments, seed: int, on_delta: OnDelta | None = None
    ) -> Answer:
        answer, text = Answer(0, on_delta), self._find(question)
        if text is None:
            raise InputError(f"{self.name} has no answer to '{question.text:.60}'")
        answer.push(Delta(text, finish_reason="stop"))
        return answer

    def _find(self, question: Question) -> str | None:
        found = None if question.id is None else self._answers.get(question.id)
        return self._answers.get(_key(question.messages)) if found is None else found

    def close(self) -> None:
        pass


def _key(messages: Sequence[Mapping[str, Any]]) -> str:
    """What a file of answers knows a question by: its text, or of several turns all of them."""
    if sum(turn.get("role") == "user" for turn in messages) == 1:
        return str(messages[-1].get("content")).strip()
    return hash_json([[turn.get("role"), str(turn.get("content")).strip()] for turn in messages])


class ServerPlayer:
    """A model behind a server, which applies its own template and its own defaults where the protocol has no word."""

    def __init__(self, name: str, address: str, system_prompt: str | None) -> None:
        """Raises: InputError if it does not answer."""
        self.name, self._endpoint, self._system_prompt = name, Endpoint(name, address), system_prompt
        self.source = {"from": self._endpoint.url, "model": self._endpoint.model}
        self._threads: ThreadPoolExecutor | None = None
        self._answers: WeakSet[Answer] = WeakSet()

    def can_answer(self, question: Question) -> bool:
        return True

    def load(self, max_batch_size: int) -> None:
        self._threads = self._threads or ThreadPoolExecutor(max_batch_size, thread_name_prefix=self.name)

    def submit(
        self, question: Question, settings: GenerationArguments, seed: int, on_delta: OnDelta | None = None
    ) -> Answer:
        assert self._threads is not None, "load first"
        answer = Answer(0, on_delta)
        self._answers.add(answer)
        self._threads.submit(self._answer, answer, question, settings, seed)
        return answer

    def _answer(self, answer: Answer, question: Question, settings: GenerationArguments, seed: int) -> None:
        options = answer_options(settings, seed)
        reason: FinishReason = "stop"
        try:
            if not answer.cancelled:
                for text, ended in self._endpoint.stream(ask(question, self._system_prompt), options):
                    answer.push(Delta(text))
                    reason = "length" if ended == "length" else reason
                    if answer.cancelled:
                        break
            answer.push(Delta(finish_reason="cancelled" if answer.cancelled else reason))
        except BaseException as error:  # whoever waits for the answer is told
            answer.push(Delta(error=error))

    def close(self) -> None:
        for answer in list(self._answers):
            answer.cancel()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._threads = None


# ---------------------------------------------------------------- who takes part


def find_players(
    model_args: InferenceArguments,
    models: Sequence[str],
    answers: Sequence[str],
    servers: Sequence[str],
    judge: str | None = None,
) -> list[Player]:
    """Those that were named, each as NAME=PLACE or PLACE; --base_model, if given, is the first.

    Args: judge: the name of the endpoint that judges them, if one does.
    Raises: InputError if files do not belong together, a server does not answer, or two have one name, one source or
        one variable for their keys.
    """
    check_key_variables([item.partition("=")[0] for item in servers] + ([judge] if judge else []))
    players: list[Player] = []
    if model_args.model_name_or_path or model_args.adapter_name_or_path:
        name = short_name(model_args.adapter_name_or_path or str(model_args.model_name_or_path))
        players.append(LocalPlayer(name, for_evaluation(model_args)))
    for item in models:
        name, path = _split_name(item)
        players.append(LocalPlayer(name, _arguments_of(model_args, path)))
    for item in answers:
        name, path = _split_name(item)
        if not Path(path).is_file():
            raise InputError(f"--answers {item}: no such file")
        players.append(AnswersPlayer(name, path))
    for item in servers:
        name, equals, address = item.partition("=")
        if not equals or "/" in name:
            raise InputError(f"--servers {item}: need NAME=URL, or NAME=URL#MODEL")
        players.append(ServerPlayer(name, address, model_args.system_prompt))
    names, sources = dict[str, dict[str, Any]](), dict[str, str]()
    for player in players:
        if player.name in names:
            raise InputError(f"two models are called {player.name}; pass another name as NAME=PLACE")
        if (same := sources.setdefault(hash_json(player.source), player.name)) != player.name:
            raise InputError(f"{same} and {player.name} are the same: {player.source}; leave one out")
        names[player.name] = player.source
    return players


def _split_name(item: str) -> tuple[str, str]:
    """See models.split_name. Raises: InputError for a name that no file can be called by."""
    name, path = split_name(item)
    if not re.fullmatch(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]*", name):
        raise InputError(f"'{name}' cannot be a name, files are called by it; pass another one as NAME=PLACE")
    return name, path


def _arguments_of(model_args: InferenceArguments, path: str) -> InferenceArguments:
    """How a model is loaded: an adapter's folder with the base that it records, a GGUF file by llama.cpp."""
    is_adapter = (Path(path) / ADAPTER_CONFIG).is_file()
    found = dataclasses.replace(
        model_args,
        model_name_or_path=None if is_adapter else path,
        adapter_name_or_path=path if is_adapter else None,
        tokenizer_name_or_path=None,
    )
    return for_evaluation(found)


# ---------------------------------------------------------------- answering a whole bank


def answer_bank(
    player: Player,
    questions: Sequence[Question],
    settings: GenerationArguments,
    path: Path,
    *,
    batch_size: int,
    overwrite: bool,
) -> list[str]:
    """A player's answers to all questions; what has to be made is written as it comes, and goes on after a kill.

    Raises: InputError if a file of answers has none to a question, or `path` holds answers of something else.
    """
    if isinstance(player, AnswersPlayer):
        missing = [question for question in questions if not player.can_answer(question)]
        if missing:
            raise InputError(
                f"{player.name}: no answer to {len(missing)} of {len(questions)} questions, such as "
                f"'{missing[0].text:.60}'; answer the same questions, or leave out those that are not answered"
            )
        return [player.submit(question, settings, 0).wait().text for question in questions]
    record = {**describe_arguments(settings), **player.source}
    asked = [question.messages if question.before else question.text for question in questions]
    predictions = Predictions(path, asked, record, overwrite, flag="--output_dir")

    @contextlib.contextmanager
    def loaded() -> Iterator[Player]:
        try:
            player.load(batch_size)
            yield player
        finally:
            player.close()

    try:
        answer_all(
            loaded,
            lambda player, _, number: player.submit(questions[number], settings, settings.seed + number).wait,
            predictions,
            desc=player.name,
        )
    except EndpointError as error:
        raise InputError(f"{player.name}: {error}; run the same command again to go on") from None
    return [row["Output"] for row in predictions.rows]


def check_sources(recorded: Mapping[str, Any], players: Sequence[Player], path: Path) -> dict[str, Any]:
    """What all models of a file of votes are: those recorded before, and these.

    Raises: InputError if a name stood for something else when votes were cast on it.
    """
    for player in players:
        before = recorded.get(player.name)
        if before is not None and before | {"from": None} != player.source | {"from": None}:
            raise InputError(
                f"{path}: {player.name} was {before}, now it is {player.source}; votes on one do not count for the "
                "other: pass it under another name, or another --output_dir"
            )
    return {**recorded, **{player.name: player.source for player in players}}
