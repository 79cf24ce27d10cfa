"""Generation, whatever the engine: what is asked, what comes back, and text out of tokens.

The command line, the web demo, the server, PPO and evaluation all use it.
"""

from __future__ import annotations

import abc
import codecs
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..core.arguments import GenerationArguments
from ..core.errors import InputError
from ..text.prompts import Message, encode_prompt, stop_token_ids
from ..text.tokenizer import encode_raw, token_surfaces
from .sampling import Constraint, Sampler, TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled"]
BASE = "default"  # the name of the model itself, beside those of its adapters


# ---------------------------------------------------------------- ids -> text


class TextDecoder:
    """Turns token ids into text as they come; the pieces, joined, are the text of all of them, up to a stop text.

    A character is given once all its bytes are there, whatever tokens they came in, and once it cannot be part of a
    stop text any more; each token is looked at once.

    Attributes:
        stopped: whether a stop text came; what follows it gives no text.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        strip: bool,
        stops: Sequence[str] = (),
        shown: Mapping[int, str] | None = None,
    ) -> None:
        """
        Args:
            token_bytes: the bytes of each id, see token_surfaces.
            strip: leave out white space at both ends.
            shown: special tokens that stand in the text, with their names.
        """
        self._token_bytes, self._strip, self._stops = token_bytes, strip, stops
        self._shown = {index: name.encode() for index, name in (shown or {}).items()}
        # Bytes that are no UTF-8 become U+FFFD; the beginning of a character waits for the rest.
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._held = ""  # the beginning of a stop text, perhaps
        self.stopped = False
        self._started = False
        self._space: list[str] = []  # white space that counts only if more text follows

    def push(self, ids: Iterable[int]) -> str:
        """The text that is complete with these ids; ids beyond the vocabulary (padded rows) stand for nothing."""
        surfaces = self._token_bytes
        known = (self._shown.get(index) or surfaces[index] for index in ids if index < len(surfaces))
        return self._without_ends(self._before_stop(self._decode(b"".join(known)), last=False))

    def finish(self) -> str:
        """What is left; half a character becomes U+FFFD."""
        return self._without_ends(self._before_stop(self._decode(b"", final=True), last=True))

    def _before_stop(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text, self._held = self._held + text, ""
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        # Hold back the longest end of the text that a stop text begins with; a whole one was found above.
        if not last:
            longest = min(len(text), max(map(len, self._stops)) - 1)
            for length in range(longest, 0, -1):
                if any(stop.startswith(text[-length:]) for stop in self._stops):
                    text, self._held = text[:-length], text[-length:]
                    break
        return text

    def _without_ends(self, text: str) -> str:
        if not self._strip:
            return text
        if not text or text.isspace():
            self._space.append(text)
            return ""
        space, self._space = "".join(self._space), []  # it was within the text, or at its beginning
        text = space + text if self._started else text.lstrip()
        self._started = True
        body = text.rstrip()
        self._space.append(text[len(body) :])
        return body


# ---------------------------------------------------------------- what is asked and answered


@dataclass
class Request:
    """What is asked of an engine.

    Attributes:
        prompt: token ids.
        seed: default: that of the settings.
        strip: leave out white space around the text, which continued text needs and answers do not.
        logit_bias: added to the logits of these tokens.
        top_logprobs: None: no log-probabilities; n: those of the chosen tokens and of the n likeliest.
        negative_prompt: token ids, with settings.guidance_scale above 1.
        model: an adapter by name (see Engine.models); None: the first.
        shown_tokens: special tokens that stand in the answer's text, by their names; others do not.
    """

    prompt: Sequence[int]
    settings: GenerationArguments
    seed: int | None = None
    strip: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    negative_prompt: Sequence[int] | None = None
    constraint: Constraint | None = None
    model: str | None = None
    shown_tokens: Mapping[int, str] = field(default_factory=dict)

    def sampler(self, stop_ids: Sequence[int]) -> Sampler:
        """What decides its tokens."""
        return Sampler(
            self.settings,
            self.prompt,
            stop_ids,
            self.settings.seed if self.seed is None else self.seed,
            logit_bias=self.logit_bias,
            top_logprobs=self.top_logprobs,
            constraint=self.constraint,
        )


@dataclass(frozen=True)
class Delta:
    """What came since the one before; the last has a finish_reason or an error."""

    text: str = ""  # complete characters, never part of a stop text
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Completion:
    """An answer."""

    text: str  # without special tokens
    token_ids: list[int]  # as generated, the stop token included
    num_prompt_tokens: int
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0  # of the prompt, those whose keys and values were there already


class Answer:
    """An answer being written. Iterate over it for what comes, or give `on_delta`; `cancel()` ends it early.

    Each delta is given once: a second iteration goes on where the first was left.

    Attributes:
        completion: all of it, once it is finished.
        num_cached_tokens: see Completion.
    """

    def __init__(self, num_prompt_tokens: int, on_delta: Callable[[Delta], None] | None = None) -> None:
        """`on_delta` is called in the engine's thread, in order; it must not block."""
        self.completion: Completion | None = None
        self.num_prompt_tokens, self.num_cached_tokens = num_prompt_tokens, 0
        self.cancelled = False  # looked at by the engine between two steps; setting a bool needs no lock
        self._items: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._on_delta = on_delta or self._items.put
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._all_read = False
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def cancel(self) -> None:
        """End the answer after the token being computed; from any thread. Nothing happens if it has ended."""
        self.cancelled = True

    def push(self, delta: Delta) -> None:
        """Called by the engine."""
        self._pieces.append(delta.text)
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs
        if delta.finish_reason:  # before the reader is told, who may ask for it at once
            self.completion = Completion(
                "".join(self._pieces),
                self._token_ids,
                self.num_prompt_tokens,
                delta.finish_reason,
                tuple(self._logprobs),
                self.num_cached_tokens,
            )
        self._on_delta(delta)
        if delta.finish_reason or delta.error:
            self._error = delta.error
            self._ended.set()

    def wait(self) -> Completion:
        """The whole answer, whoever reads its deltas; as often as it is asked for. An interrupted wait cancels it.

        Raises: what went wrong in the engine.
        """
        try:
            self._ended.wait()
        finally:
            self.cancel()
        if self._error is not None:
            raise self._error
        assert self.completion is not None
        return self.completion

    def __iter__(self) -> Iterator[Delta]:
        """The deltas as they come. Raises: what went wrong in the engine. Leaving early cancels."""
        try:
            while not self._all_read:
                delta = self._items.get()
                self._all_read = bool(delta.finish_reason or delta.error)
                if delta.error is not None:
                    raise delta.error
                yield delta
        finally:
            self.cancel()


# ---------------------------------------------------------------- prompts


def check_room(num_prompt_tokens: int, settings: GenerationArguments, context: int | None) -> int:
    """How many new tokens a prompt has room for. Raises: InputError if none, or if the prompt is empty."""
    if num_prompt_tokens == 0:
        raise InputError("the prompt is empty, and the tokenizer has no BOS token to begin with")
    room = settings.max_new_tokens if context is None else min(settings.max_new_tokens, context - num_prompt_tokens)
    if room < 1:
        raise InputError(
            f"the prompt has {num_prompt_tokens} tokens, the model's context {context}: nothing is left for an "
            "answer; shorten the prompt"
        )
    return room


def goes_on(messages: Sequence[Message]) -> bool:
    """Whether the last message is the beginning of the answer, as in transformers' continue_final_message."""
    return bool(messages) and messages[-1]["role"] == "assistant"


class Prompter:
    """Text and tokens of a model: how prompts are written, and what ends an answer. It needs no weights.

    Attributes:
        context: tokens that prompt and answer may have together; None: any number.
        stop_ids: the tokens that end an answer, whatever is asked.
        token_bytes: the bytes that each token id stands for; of special tokens none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        context: int | None,
        end_ids: Iterable[int] = (),
    ) -> None:
        """
        Args:
            template: the jinja chat template whose end-of-turn token ends answers too; None for plain text.
            end_ids: what ends answers besides, see weights.generation_config.named_end_ids.
        """
        self.tokenizer, self.template, self.context = tokenizer, template, context
        self.token_bytes = token_surfaces(tokenizer)
        ids = stop_token_ids(template, tokenizer, end_ids)
        self.stop_ids = [index for index in ids if index < len(self.token_bytes)]
        if unknown := sorted(set(ids) - set(self.stop_ids)):
            logger.warning(
                "the model's files name %s as ends of an answer, its tokenizer has %d tokens: they are ignored",
                *(", ".join(map(str, unknown)), len(self.token_bytes)),
            )

    def hidden_tokens(self, text: str) -> dict[int, str]:
        """The special tokens, which have no text in answers, that stand in a text."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {index: token.content for index, token in added if token.special and token.content in text}

    def find_stop_ids(self, stops: Iterable[str]) -> list[int]:
        """The tokens that end an answer with these stop texts: special tokens, which have no text, among them."""
        found = {text: self.tokenizer.convert_tokens_to_ids(text) for text in stops}
        specials = [
            index
            for text, index in found.items()
            if index is not None
            and not self.token_bytes[index]
            and self.tokenizer.convert_ids_to_tokens(index) == text  # not the unknown token
        ]
        return [*self.stop_ids, *specials]

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation up to where the assistant answers, or goes on; see goes_on and encode_prompt."""
        assert self.template is not None, "conversations need a template"
        return encode_prompt(messages, self.template, self.tokenizer, tools, goes_on(messages))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text to be continued."""
        return encode_raw(text, self.tokenizer)

    def encode_negative(
        self,
        messages: Sequence[Message],
        settings: GenerationArguments,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int] | None:
        """The conversation under the negative prompt as its system prompt; None without guidance.

        System messages further down stay: both prompts differ in nothing else.
        """
        if settings.negative_prompt is None:
            return None
        turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
        return self.encode([{"role": "system", "content": settings.negative_prompt}, *turns], tools)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens have none."""
        decoder = TextDecoder(self.token_bytes, strip=False)
        return decoder.push(ids) + decoder.finish()

    def fit_history(self, messages: Sequence[Message], max_new_tokens: int) -> tuple[list[Message], int]:
        """Leave out the oldest exchanges, not the system message, until prompt and answer fit the context.

        Returns: the messages that stay, and how many went. The last exchange stays even if it does not fit.
        """
        first = 1 if messages and messages[0]["role"] == "system" else 0
        system, turns = list(messages[:first]), list(messages[first:])
        # By encoding again each time: how long an exchange is depends on the template and on where it stands.
        while self.context and len(self.encode([*system, *turns])) + max_new_tokens > self.context:
            # Whole exchanges: many templates refuse a conversation that the assistant begins.
            later = [number for number, message in enumerate(turns) if number and message["role"] == "user"]
            if not later:
                break
            turns = turns[later[0] :]
        return [*system, *turns], len(messages) - len(system) - len(turns)

    def check(self, request: Request) -> int:
        """How many new tokens a request has room for. Raises: InputError if it cannot be answered."""
        # Both prompts grow by the same answer, so the context has to hold the longer one; an empty prompt is an error
        # beside a negative one, too.
        longest = max(len(request.prompt), len(request.negative_prompt or ()))
        return check_room(min(longest, len(request.prompt)) and longest, request.settings, self.context)


# ---------------------------------------------------------------- engines


class Engine(Prompter, abc.ABC):
    """What answers: transformers, llama.cpp or vLLM.

    Attributes:
        models: names of the adapters (or of the model itself) that a request may ask for; the first is the default.
        max_batch_size: requests answered at once.
    """

    name: str

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        context: int | None,
        models: Iterable[str],
        max_batch_size: int,
        end_ids: Iterable[int] = (),
    ) -> None:
        super().__init__(tokenizer, template, context, end_ids)
        self.models, self.max_batch_size = list(models), max_batch_size
        self._closed = False

    @abc.abstractmethod
    def submit(self, request: Request, on_delta: Callable[[Delta], None] | None = None) -> Answer:
        """Begin to answer; from any thread, without waiting. Requests beyond max_batch_size wait, first come first
        served.

        Raises: InputError for what cannot be answered.
        """

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all, in order."""
        return [answer.wait() for answer in [self.submit(request) for request in requests]]

    @abc.abstractmethod
    def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(N, H) float32: the mean of the last layer's states over a prompt's tokens, of length 1."""

    @abc.abstractmethod
    def statistics(self) -> dict[str, float]:
        """running, waiting, max_batch_size; totals: prompt_tokens, cached_tokens, new_tokens, steps; and the like."""

    @abc.abstractmethod
    def close(self) -> None:
        """Cancel what runs, and stop."""

    def _find_model(self, request: Request) -> str:
        """The name of the model that a request asks for. Raises: InputError if there is none."""
        name = self.models[0] if request.model is None else request.model
        if name not in self.models:
            raise InputError(f"there is no model {name!r}; there are {', '.join(self.models)}")
        return name

    def _check_open(self) -> None:
        """Raises: InputError once the engine is closed."""
        if self._closed:
            raise InputError("the engine is closed")


class TokenSequence:
    """A request on its way through an engine.

    Attributes:
        tokens: those of the prompt and of the answer so far.
        room: how many tokens the answer may have.
        stop_ids: the tokens that end it.
    """

    def __init__(self, request: Request, prompter: Prompter, answer: Answer) -> None:
        """Raises: InputError if the request cannot be answered."""
        self.request, self.answer = request, answer
        self.room = prompter.check(request)
        self.tokens = list(request.prompt)
        self.stop_ids = prompter.find_stop_ids(request.settings.stop)
        self.sampler = request.sampler(self.stop_ids)
        self._text = TextDecoder(
            prompter.token_bytes, request.strip, request.settings.stop, shown=request.shown_tokens
        )

    def advance(self, token_id: int, logprob: TokenLogprob | None = None) -> bool:
        """Take the next token and tell whoever waits for it; returns whether the answer has ended."""
        # The end token is part of the tokens (a conversation goes on after it), not of the text.
        self.tokens.append(token_id)
        self.sampler.advance(token_id)
        ended = token_id in self.stop_ids
        text = "" if ended else self._text.push([token_id])
        reason: FinishReason | None = None
        if ended or self._text.stopped:
            reason = "stop"
        elif self.sampler.length >= self.room:
            reason = "length"
        if reason:
            text += self._text.finish()
            # A stop text can be complete only now: it was held back as the beginning of a longer one.
            reason = "stop" if self._text.stopped else reason
        self.answer.push(Delta(text, (token_id,), (logprob,) if logprob else (), reason))
        return reason is not None

    def end(self, reason: FinishReason | None = None, error: BaseException | None = None) -> None:
        """End the answer before its time."""
        text = self._text.finish() if reason else ""
        self.answer.push(Delta(text, finish_reason=reason, error=error))
