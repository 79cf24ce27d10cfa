"""From deltas to replies of the OpenAI protocol: whole, or as events of a stream."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from ..generation.engine import Delta
from ..generation.sampling import TokenLogprob
from ..text.tool_calls import read_calls
from .calls import CallPiece, CallStream
from .planning import RequestPlan
from .responses import (
    AnswerMessage,
    AnswerToolCall,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FunctionCall,
    PromptTokensDetails,
    TopLogprob,
    Usage,
)

LEAST_LOGPROB = -9999.0  # JSON has no infinity


# ---------------------------------------------------------------- tokens


class TokenNames:
    """How tokens are shown."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, token_bytes: Sequence[bytes]) -> None:
        self._tokenizer, self.token_bytes = tokenizer, token_bytes

    def surface(self, token_id: int) -> bytes:
        """The bytes a token stands for; special tokens and padded rows: none."""
        return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""

    def name(self, token_id: int) -> str:
        """Its text; of a part of a character its bytes, of a special token its name."""
        surface = self.surface(token_id)
        if not surface:
            return (
                str(self._tokenizer.convert_ids_to_tokens(token_id) or "") if token_id < len(self.token_bytes) else ""
            )
        try:
            return surface.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in surface)

    def top(self, token_id: int, logprob: float) -> dict[str, Any]:
        """The fields of a TopLogprob."""
        surface = self.surface(token_id)
        return {
            "token": self.name(token_id),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(surface) if surface else None,
        }


class VisibleTokens:
    """The tokens of an answer, each with the place of its first character in the text, as soon as the text passes it.

    Tokens that are no part of the text (an end token, white space that was stripped, a stop text) have the place where
    they would stand; the last ones come with the end.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._waiting: deque[tuple[int, int, TokenLogprob]] = deque()  # first byte, first character, token
        self._bytes = self._characters = 0  # of all tokens so far
        self._space: list[bytes] | None = []  # tokens before the text begins; None: it has begun
        self._lead = (0, 0)  # bytes and characters of stripped space before the text
        self._end = 0  # bytes of the text so far and of the space before it
        self._length = 0  # characters of the text so far

    def push(self, text: str, logprobs: Iterable[TokenLogprob], last: bool = False) -> list[tuple[int, TokenLogprob]]:
        """The tokens that become visible with this piece of text, each with its place (in characters)."""
        for logprob in logprobs:
            surface = self._names.surface(logprob.token_id)
            if self._space is not None:
                self._space.append(surface)
            self._waiting.append((self._bytes, self._characters, logprob))
            self._bytes += len(surface)
            self._characters += sum(byte & 0xC0 != 0x80 for byte in surface)
        if text and self._space is not None:
            self._begin(text)
        self._end += len(text.encode())
        self._length += len(text)
        visible = []
        while self._waiting and (last or self._waiting[0][0] < self._end):
            _, character, logprob = self._waiting.popleft()
            visible.append((min(max(character - self._lead[1], 0), self._length), logprob))
        return visible

    def _begin(self, text: str) -> None:
        written = b"".join(self._space or ()).decode(errors="ignore")
        space = written[: len(written) - len(written.lstrip())]
        if not text.startswith(space):
            self._lead = (len(space.encode()), len(space))
        self._end, self._space = self._lead[0], None


# ---------------------------------------------------------------- choices


@dataclass
class ChoiceBuilder:
    """One answer, as far as it has come."""

    visible: VisibleTokens
    begun: bool = False
    text: str = ""
    num_tokens: int = 0
    tokens: list[tuple[int, TokenLogprob]] = field(default_factory=list)  # those that are shown
    logprob: float = 0.0  # of all tokens together
    finish_reason: str | None = None
    calls: CallStream | None = None  # what tells them from the text while they come

    def add(self, delta: Delta) -> list[tuple[int, TokenLogprob]]:
        """Take what came; returns the tokens to be shown with it."""
        self.begun = True
        self.text += delta.text
        self.num_tokens += len(delta.token_ids)
        self.logprob += sum(logprob.logprob for logprob in delta.logprobs)
        shown = self.visible.push(delta.text, delta.logprobs, last=delta.finish_reason is not None)
        self.tokens += shown
        self.finish_reason = delta.finish_reason
        return shown

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; what the best of several is chosen by."""
        return self.logprob / max(self.num_tokens, 1)


class ResponseBuilder:
    """What all replies have in common: names, choices and usage."""

    prefix = ""
    kinds = ("", "")  # the object field of a whole response, and of an event

    def __init__(self, plan: RequestPlan, names: TokenNames) -> None:
        self.plan, self.names = plan, names
        self.head: dict[str, Any] = {"id": f"{self.prefix}-{secrets.token_hex(16)}"}
        self.head |= {"created": int(time.time()), "model": plan.model}
        self.choices = [ChoiceBuilder(VisibleTokens(names)) for _ in plan.requests]
        self._whole_head = {**self.head, "object": self.kinds[0]}
        self._event_head = {**self.head, "object": self.kinds[1]}
        if plan.include_usage:
            self._event_head["usage"] = None  # it comes in the last event

    @property
    def num_new_tokens(self) -> int:
        """Of all answers, those that are not returned too."""
        return sum(choice.num_tokens for choice in self.choices)

    def usage(self, num_cached_tokens: int) -> Usage:
        """What the request has cost."""
        prompts = self.plan.num_prompt_tokens
        return Usage(
            prompt_tokens=prompts,
            completion_tokens=self.num_new_tokens,
            total_tokens=prompts + self.num_new_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached_tokens),
        )

    def whole(self, usage: Usage) -> BaseModel:
        """The reply once all answers have ended."""
        raise NotImplementedError

    def events(self, number: int, delta: Delta) -> list[BaseModel]:
        """What is streamed when an answer goes on."""
        raise NotImplementedError

    def usage_event(self, usage: Usage) -> BaseModel:
        """What is streamed last where the request wants the usage."""
        raise NotImplementedError


class ChatResponseBuilder(ResponseBuilder):
    """Replies of /v1/chat/completions."""

    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def whole(self, usage: Usage) -> BaseModel:
        choices = []
        for number, choice in enumerate(self.choices):
            content, calls = read_calls(choice.text, self.plan.call_form)
            calls = calls if self.plan.several_calls else calls[:1]
            message = AnswerMessage(role="assistant", content=content, refusal=None)
            if calls:
                message = AnswerMessage(role="assistant", content=content or None, refusal=None)
                message.tool_calls = [_tool_call(name=name, arguments=arguments) for name, arguments in calls]
            choices.append(
                ChatChoice(
                    index=number,
                    message=message,
                    logprobs=self._logprobs(choice.tokens),
                    finish_reason=self._reason(choice, bool(calls)),
                )
            )
        return ChatCompletion(**self._whole_head, choices=choices, usage=usage)

    def events(self, number: int, delta: Delta) -> list[BaseModel]:
        """Text that may be a tool call is held back until it is known."""
        choice = self.choices[number]
        first = not choice.begun
        shown = choice.add(delta)
        message: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        text, pieces = delta.text, list[CallPiece]()
        if self.plan.call_form is not None:
            if choice.calls is None:
                choice.calls = CallStream(self.plan.call_form, self.plan.several_calls)
            text, pieces = choice.calls.push(choice.text, delta.finish_reason is not None)
        if text:
            message["content"] = text
        if pieces:
            message["tool_calls"] = [_call_delta(piece) for piece in pieces]
        events = []
        if message or shown:
            events.append(self._chunk(number, message, logprobs=self._logprobs(shown), finish_reason=None))
        if delta.finish_reason:
            called = choice.calls is not None and choice.calls.num_calls > 0
            events.append(self._chunk(number, {}, logprobs=None, finish_reason=self._reason(choice, called)))
        return events

    def usage_event(self, usage: Usage) -> BaseModel:
        return ChatCompletionChunk(**{**self._event_head, "usage": usage}, choices=[])

    def _chunk(self, number: int, message: dict[str, Any], **fields: Any) -> BaseModel:
        choice = ChatChunkChoice(index=number, delta=AnswerMessage(**message), **fields)
        return ChatCompletionChunk(**self._event_head, choices=[choice])

    def _reason(self, choice: ChoiceBuilder, called: bool) -> Any:
        # An answer that was cut may lack a call, or the end of one.
        return "tool_calls" if called and choice.finish_reason == "stop" else choice.finish_reason

    def _logprobs(self, tokens: Sequence[tuple[int, TokenLogprob]]) -> ChatLogprobs | None:
        if self.plan.logprobs is None:
            return None
        content = [
            ChatTokenLogprob(
                **self.names.top(token.token_id, token.logprob),
                top_logprobs=[TopLogprob(**self.names.top(*other)) for other in token.top],
            )
            for _, token in tokens
        ]
        return ChatLogprobs(content=content, refusal=None)


def _tool_call(name: str, arguments: str, **fields: int) -> AnswerToolCall:
    function = FunctionCall(name=name, arguments=arguments)
    return AnswerToolCall(**fields, id=f"call_{secrets.token_hex(12)}", type="function", function=function)


def _call_delta(piece: CallPiece) -> AnswerToolCall:
    """As OpenAI has them: id, type and name with the first piece of a call, which all its pieces have the index of."""
    if piece.name is not None:
        return _tool_call(piece.name, piece.arguments, index=piece.index)
    return AnswerToolCall(index=piece.index, function=FunctionCall(arguments=piece.arguments))


class CompletionResponseBuilder(ResponseBuilder):
    """Replies of /v1/completions."""

    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def whole(self, usage: Usage) -> BaseModel:
        """Of each prompt's answers the best ones come first."""
        choices: list[CompletionChoice] = []
        for first in range(0, len(self.choices), self.plan.per_prompt):
            numbers = list(range(first, first + self.plan.per_prompt))
            if self.plan.per_prompt > self.plan.num_choices:
                numbers.sort(key=lambda number: -self.choices[number].mean_logprob)
            for number in numbers[: self.plan.num_choices]:
                choice, echo = self.choices[number], self._echo(number)
                choices.append(
                    CompletionChoice(
                        text=echo + choice.text,
                        index=len(choices),
                        logprobs=self._logprobs(choice.tokens),
                        finish_reason=choice.finish_reason,  # type: ignore[arg-type]
                    )
                )
        return Completion(**self._whole_head, choices=choices, usage=usage)

    def events(self, number: int, delta: Delta) -> list[BaseModel]:
        choice = self.choices[number]
        text = (self._echo(number) if not choice.begun else "") + delta.text
        shown = choice.add(delta)
        if not (text or shown or delta.finish_reason):
            return []
        piece = CompletionChoice(
            text=text,
            index=number,
            logprobs=self._logprobs(shown),
            finish_reason=delta.finish_reason,  # type: ignore[arg-type]
        )
        return [Completion(**self._event_head, choices=[piece])]

    def usage_event(self, usage: Usage) -> BaseModel:
        return Completion(**{**self._event_head, "usage": usage}, choices=[])

    def _echo(self, number: int) -> str:
        return "" if self.plan.prompts is None else self.plan.prompts[number // self.plan.per_prompt]

    def _logprobs(self, tokens: Sequence[tuple[int, TokenLogprob]]) -> CompletionLogprobs | None:
        if self.plan.logprobs is None:
            return None
        name = self.names.name
        return CompletionLogprobs(
            tokens=[name(token.token_id) for _, token in tokens],
            token_logprobs=[max(token.logprob, LEAST_LOGPROB) for _, token in tokens],
            top_logprobs=[
                {name(index): max(value, LEAST_LOGPROB) for index, value in token.top} for _, token in tokens
            ],
            text_offset=[place for place, _ in tokens],
        )


# ---------------------------------------------------------------- bytes


def to_json(model: BaseModel) -> bytes:
    """The fields that were set, null or not."""
    return model.model_dump_json(exclude_unset=True).encode()


def to_event(data: bytes) -> bytes:
    """A server-sent event."""
    return b"data: " + data + b"\n\n"
