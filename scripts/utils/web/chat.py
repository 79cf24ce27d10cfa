"""Conversations, whatever shows them: turns, prompts that fit, answers as they come, and their words.

A conversation may have several models answer the same questions side by side; each sees its own earlier answers.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..core.arguments import GenerationArguments, InferenceArguments
from ..core.errors import InputError
from ..generation.engine import Answer, Delta, Engine, FinishReason, Request, goes_on
from ..text.prompts import CHAT_TEMPLATES, OWN_TEMPLATE, Message, with_system_prompt
from ..weights.reader import open_checkpoint
from .texts import translate

# The settings that users change, and that files of conversations hold.
SETTINGS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "guidance_scale",
    "negative_prompt",
    "stop",
    "seed",
)
REFRESH_SECONDS = 0.05  # what comes within this time is shown at once: faster than this nobody reads


# ---------------------------------------------------------------- conversations


@dataclass
class Reply:
    """What one model has answered so far; counts are in tokens."""

    text: str = ""
    finish_reason: FinishReason | None = None  # None while it is being written
    seed: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    num_dropped: int = 0  # messages left out of the prompt, the oldest
    seconds: float = 0.0  # since it was asked for
    first_seconds: float = 0.0  # until its first token


@dataclass
class Turn:
    """A question, and a reply of each model; no reply yet while it waits for its place in the queue."""

    question: str
    replies: list[Reply] = field(default_factory=list)


class Conversation:
    """What one user and the models have said, in a browser or a terminal.

    One request at a time; `stop` may come from any thread.
    """

    def __init__(self, num_models: int = 1) -> None:
        self.turns: list[Turn] = []
        self._num_models = num_models
        self._drawn = 0  # answers so far: each has a seed of its own, so that a second try differs
        self._waiting: Turn | None = None  # what `answer` is to answer, once
        self._running: list[Answer] = []  # those of the last question

    @property
    def is_busy(self) -> bool:
        """Whether a question waits for its answer, or an answer is being written."""
        return bool(self.turns) and not _is_settled(self.turns[-1])

    def ask(self, question: str) -> None:
        """Put a question at the end. Raises: InputError while another is being answered."""
        self._check_idle()
        self.turns.append(Turn(question))
        self._waiting = self.turns[-1]

    def edit(self, number: int, question: str) -> None:
        """Ask turn `number` differently; what was said after it is forgotten."""
        self._check_idle()
        self.turns[number:] = [Turn(question)]
        self._waiting = self.turns[-1]

    def retry(self) -> None:
        """Ask the last question again."""
        self._check_idle()
        if self.turns:
            self.turns[-1].replies = []
            self._waiting = self.turns[-1]

    def go_on(self) -> None:
        """Have the last answers go on where they were cut or stopped; where none was, all of them.

        Raises: InputError while one is being written, or if there is none.
        """
        self._check_idle()
        replies = [reply for reply in (self.turns[-1].replies if self.turns else ()) if reply.text]
        if not replies:
            raise InputError("there is no answer to go on with")
        for reply in [reply for reply in replies if reply.finish_reason != "stop"] or replies:
            reply.finish_reason = None
        self._waiting = self.turns[-1]

    def undo(self) -> str:
        """Take back the last question, which is returned, and its answer."""
        self._check_idle()
        return self.turns.pop().question if self.turns else ""

    def clear(self) -> None:
        """Forget everything; what is being written is stopped."""
        self.stop()
        self.turns, self._drawn, self._waiting = [], 0, None

    def replace(self, turns: list[Turn]) -> None:
        """Go on from another conversation."""
        self.clear()
        self.turns = turns

    def take_back(self) -> str | None:
        """Forget the last question if it could not be answered; returns it then."""
        return self.turns.pop().question if self.turns and not self.turns[-1].replies else None

    def stop(self) -> None:
        """Cancel what is being written, in the engines too, or what still waits to be."""
        running = list(self._running)
        for answer in running:
            answer.cancel()
        if self.turns and not running:
            turn = self.turns[-1]
            turn.replies = turn.replies or [Reply() for _ in range(self._num_models)]
            _settle(turn)

    def messages(self) -> list[Message]:
        """Everything said so far; with several models, as the first saw it. The last question may have no answer."""
        messages: list[Message] = []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            if turn.replies:
                messages.append({"role": "assistant", "content": turn.replies[0].text})
        return messages

    def _history(self, model: int) -> list[Message]:
        """The prompt's messages: exchanges without an answer are left out, roles have to alternate.

        The last answer is at their end if it goes on.
        """
        messages: list[Message] = []
        for turn in self.turns[:-1]:
            if model < len(turn.replies) and turn.replies[model].text:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": turn.replies[model].text})
        messages.append({"role": "user", "content": self.turns[-1].question})
        if self.turns[-1].replies:
            messages.append({"role": "assistant", "content": self.turns[-1].replies[model].text})
        return messages

    def _check_idle(self) -> None:
        if self.is_busy:
            raise InputError("an answer is being written; stop it first")

    def answer(
        self,
        engines: Sequence[Engine],
        settings: GenerationArguments,
        system_prompt: str | None = None,
        max_memory: int | None = None,
    ) -> Iterator[None]:
        """Have every engine answer the last question, all at the same time; yields whenever there is more to show.

        Of a question that has answers, those are written that go on. Closing the generator cancels the answers.

        Args:
            system_prompt, max_memory: see plan_request.
        Raises: InputError for a question that cannot be answered; whatever goes wrong in an engine.
        """
        turn, self._waiting = self._waiting, None
        if turn is None or _is_settled(turn):
            return
        seed = settings.seed + self._drawn
        news: queue.SimpleQueue[tuple[int, Delta]] = queue.SimpleQueue()
        start = time.perf_counter()
        running = self._running = []
        try:
            answers: dict[int, Answer] = {}
            replies = list(turn.replies) or [Reply() for _ in engines]
            for number, engine in enumerate(engines):
                if replies[number].finish_reason:
                    continue
                request, dropped = plan_request(
                    engine, self._history(number), settings, seed, system_prompt, max_memory
                )
                answers[number] = engine.submit(request, partial(put_news, news, number))
                running.append(answers[number])
                text, length = replies[number].text, len(request.prompt)
                replies[number] = Reply(text, seed=seed, num_prompt_tokens=length, num_dropped=dropped)
            if _is_settled(turn):
                return  # stopped meanwhile
            turn.replies = replies
            self._drawn += 1
            while not _is_settled(turn):
                for number, delta in next_news(news):
                    add_delta(turn.replies[number], delta, answers[number], time.perf_counter() - start)
                yield
        finally:
            for answer in running:
                answer.cancel()
            _settle(turn)
            if self._running is running:
                self._running = []


def _is_settled(turn: Turn) -> bool:
    return bool(turn.replies) and all(reply.finish_reason for reply in turn.replies)


def _settle(turn: Turn) -> None:
    """What is not finished was cancelled."""
    for reply in turn.replies:
        reply.finish_reason = reply.finish_reason or "cancelled"


def put_news(news: queue.SimpleQueue[tuple[int, Delta]], number: int, delta: Delta) -> None:
    """Called by engines: what came of answer `number`."""
    news.put((number, delta))


def next_news(news: queue.SimpleQueue[tuple[int, Delta]]) -> Iterator[tuple[int, Delta]]:
    """Wait for one delta, then for a moment more, and give all that came."""
    yield news.get()
    time.sleep(REFRESH_SECONDS)
    while not news.empty():
        yield news.get()


def add_delta(reply: Reply, delta: Delta, answer: Answer, seconds: float) -> None:
    """What came, into the reply. Raises: what went wrong in the engine."""
    if delta.error is not None:
        raise delta.error
    if not reply.num_tokens:
        reply.first_seconds = seconds
    reply.text += delta.text
    reply.num_tokens += len(delta.token_ids)
    reply.num_cached_tokens = answer.num_cached_tokens
    reply.seconds = seconds
    reply.finish_reason = delta.finish_reason or reply.finish_reason


def plan_request(
    engine: Engine,
    messages: Sequence[Message],
    settings: GenerationArguments,
    seed: int,
    system_prompt: str | None = None,
    max_memory: int | None = None,
) -> tuple[Request, int]:
    """The request for an answer to the last message, and how many of the oldest messages it leaves out.

    After a last message that is the assistant's own, it is the request for what follows there, white space included.
    The prompt and, with guidance, the one with the negative prompt in the system prompt's place hold the same ones.

    Args:
        system_prompt: None: the template's default.
        max_memory: most tokens of a prompt; None: what the context has beside the answer.
    """
    systems = [system_prompt] if settings.negative_prompt is None else [system_prompt, settings.negative_prompt]
    reserved = settings.max_new_tokens
    if max_memory is not None and engine.context is not None:
        reserved = max(reserved, engine.context - max_memory)
    dropped = max(engine.fit_history(with_system_prompt(messages, system), reserved)[1] for system in systems)
    kept = with_system_prompt(messages[dropped:], system_prompt)
    negative = engine.encode_negative(kept, settings)
    return Request(engine.encode(kept), settings, seed, not goes_on(kept), negative_prompt=negative), dropped


# ---------------------------------------------------------------- settings


def read_controls(defaults: GenerationArguments, values: Mapping[str, Any]) -> GenerationArguments:
    """The settings with what a page's controls say; an empty one says nothing. Raises: InputError."""
    given = asdict(defaults)
    for name, value in values.items():
        if name == "stop":
            given[name] = read_stops(value)
        elif name == "negative_prompt":
            given[name] = value if value.strip() else None
        elif value is not None:
            given[name] = type(given[name])(value)  # a slider gives 1 for 1.0
    given["min_new_tokens"] = min(given["min_new_tokens"], given["max_new_tokens"])
    return GenerationArguments(**with_guidance(given))


def with_guidance(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings; guidance is off where the scale or the negative prompt is missing."""
    both = settings.get("guidance_scale", 1.0) > 1 and settings.get("negative_prompt")
    return dict(settings) if both else {**settings, "guidance_scale": 1.0, "negative_prompt": None}


def read_stops(text: str) -> list[str]:
    """Stop texts, one a line; `\\n` in them is a new line."""
    return [line.replace("\\n", "\n") for line in text.splitlines() if line]


def show_stops(stops: Sequence[str]) -> str:
    """What read_stops reads."""
    return "\n".join(text.replace("\n", "\\n") for text in stops)


# ---------------------------------------------------------------- what is shown about answers and models


def describe_reply(reply: Reply, statistics: Mapping[str, float], language: str) -> str:
    """One line about an answer: its length and speed, what was cached, why it ended; and the engine's speculation."""
    if not reply.num_tokens:
        return translate("stopped", language) if reply.finish_reason == "cancelled" and not reply.text else ""
    rate = reply.num_tokens / reply.seconds if reply.seconds else 0.0
    parts = [
        translate("answer_speed", language, tokens=reply.num_tokens, rate=f"{rate:.1f}"),
        translate("first_token", language, seconds=f"{reply.first_seconds:.2f}"),
        translate("prompt_cached", language, tokens=reply.num_prompt_tokens, cached=reply.num_cached_tokens),
    ]
    if drafted := statistics.get("drafted"):
        accepted = statistics.get("accepted", 0)
        share = f"{accepted / drafted:.0%}"
        parts.append(translate("speculation", language, share=share, accepted=int(accepted), drafted=int(drafted)))
    parts.append(translate("seed_used", language, seed=reply.seed))
    if reply.finish_reason in ("length", "cancelled"):
        parts.append(translate("cut" if reply.finish_reason == "length" else "stopped", language))
    return " · ".join(parts)


def describe_context(replies: Sequence[Reply], contexts: Sequence[int | None], language: str) -> tuple[str, float]:
    """How full the fullest context is: a line, and the share used (0 to 1)."""
    used = [reply.num_prompt_tokens + reply.num_tokens for reply in replies] or [0] * len(contexts)
    shares = [count / context if context else 0.0 for count, context in zip(used, contexts, strict=True)]
    fullest = shares.index(max(shares))
    context = contexts[fullest]
    if context is None:
        return translate("context_unlimited", language, used=used[fullest]), 0.0
    left = max(0, context - used[fullest])
    text = translate("context_used", language, used=used[fullest], context=context, left=left)
    if dropped := max((reply.num_dropped for reply in replies), default=0):
        text += " · " + translate("dropped", language, count=dropped)
    return text, min(1.0, shares[fullest])


def model_name(args: InferenceArguments) -> str:
    """A short name: the adapter's or the model's folder."""
    name = args.adapter_name_or_path or args.model_name_or_path or ""
    return Path(name.rstrip("/")).name or name


def model_card(engine: Engine, args: InferenceArguments) -> dict[str, str]:
    """What there is to know about a model; the keys are those of the page's texts."""
    template = next((name for name, text in CHAT_TEMPLATES.items() if text == engine.template), OWN_TEMPLATE)
    model = getattr(engine, "model", None)  # only in this process's own memory can it be asked
    card = {"card_name": model_name(args)}
    base = Path(args.model_name_or_path or "")
    if base.is_dir():
        count = sum(math.prod(shape) for shape in open_checkpoint(base).shapes.values())
        card["card_parameters"] = format_count(count)
    dtype = str(getattr(model, "dtype", None) or args.dtype).removeprefix("torch.")
    kind = args.quant_type if args.load_in_kbits == 4 else "int8"
    card["card_dtype"] = dtype if args.load_in_kbits == 16 else f"{args.load_in_kbits}-bit {kind}, {dtype}"
    card["card_context"] = "∞" if engine.context is None else f"{engine.context:,}"
    card["card_template"] = template
    if args.adapter_name_or_path:
        card["card_adapter"] = Path(args.adapter_name_or_path).name
        card["card_base"] = base.name
    card["card_engine"] = engine.name
    return card


def format_count(count: int) -> str:
    """12,345,678 -> 12.3 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
