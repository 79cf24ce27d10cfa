"""What a request of the OpenAI protocol asks of the engine: prompts as tokens, settings, constraints.

The functions here tokenise and compile grammars, which takes time: they run outside the event loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.arguments import GenerationArguments
from ..core.errors import InputError
from ..generation.engine import Engine, Request, goes_on
from ..text.conversations import ROLES
from ..text.prompts import Message, call_form, with_system_prompt
from ..text.tool_calls import OWN_FORM, CallForm
from .errors import ApiError, bad_request, context_error, missing
from .grammar import JSON_OBJECT, Grammars, JsonConstraint
from .requests import ChatMessage, ChatRequest, CompletionRequest, NamedTool, SamplingRequest

SMALLEST_TOP_P = 1e-6  # top_p 0 means: the likeliest token only


@dataclass
class RequestPlan:
    """What the engine is to do for one HTTP request.

    Attributes:
        model: the name shown in the reply.
        requests: for each prompt `per_prompt` of them, side by side.
        prompts: how each prompt reads, where it is echoed.
        num_choices: of the answers to a prompt, how many are returned: the best.
        logprobs: how many likeliest tokens are shown beside each; None: no log-probabilities.
        include_usage: whether a stream ends with the usage.
        call_form: how an answer calls functions; None: it calls none.
        several_calls: whether an answer may have more than one.
    """

    model: str
    requests: list[Request]
    per_prompt: int
    num_choices: int
    logprobs: int | None = None
    include_usage: bool = False
    prompts: list[str] | None = None
    call_form: CallForm | None = None
    several_calls: bool = True

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests[:: self.per_prompt])


class RequestPlanner:
    """Plans requests for one engine."""

    def __init__(
        self,
        engine: Engine,
        models: dict[str, str],
        defaults: GenerationArguments,
        *,
        context: int | None = None,
        system_prompt: str | None = None,
        completions_template: bool = False,
    ) -> None:
        """
        Args:
            models: the engine's models by the names that requests use; the first is the default.
            defaults: settings of requests that give none.
            context: at most so many tokens of prompt and answer; None: the engine's own.
            system_prompt: of conversations that have none; None: the template's.
            completions_template: texts to be completed are put into the chat template.
        """
        self.engine, self.models, self.defaults = engine, models, defaults
        self.context = min(filter(None, (engine.context, context)), default=None)
        self._system_prompt, self._completions_template = system_prompt, completions_template
        self._grammars: Grammars | None = None  # made when first needed: its tables take a second

    # ------------------------------------------------------------ chat

    def chat(self, body: ChatRequest) -> RequestPlan:
        """Raises: ApiError."""
        # What is cheap to refuse comes before tokenising and grammars.
        model = self.find_model(body.model)
        self._refuse_other_services(body)
        self._check_answering(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
        tools = self._tools(body)
        messages = with_system_prompt(read_messages(body), self._system_prompt)
        going_on = goes_on(messages)
        constrained = self._is_constrained(body, tools)
        if going_on and constrained:
            raise bad_request(
                "An answer that was begun in the messages cannot be held to a format; end with a message of the user "
                "or a tool, or leave out response_format and tools.",
                "messages",
            )
        with _refusals_as_mistakes():
            prompt = self.engine.encode(messages, tools)
        settings = self._settings(body, body.max_completion_tokens or body.max_tokens, len(prompt), "messages")
        count = body.n or 1
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        # What goes on is put behind its beginning by the client: the space between them counts.
        requests = self._requests(body, [prompt], count, [settings], top_logprobs, strip=not going_on)
        with _refusals_as_mistakes():
            negative = self.engine.encode_negative(messages, self.defaults, tools)
        form = self._call_form() if tools else None
        shown = self.engine.hidden_tokens(form.signs) if form else {}
        several = body.parallel_tool_calls is not False
        constraint = self._constraint(body, tools, form, several) if constrained else None
        for request in requests:  # a constraint follows one answer, so each has its own
            request.negative_prompt, request.constraint = negative, constraint and constraint.copy()
            request.shown_tokens = shown
        return RequestPlan(
            model,
            requests,
            count,
            count,
            top_logprobs,
            include_usage=_wants_usage(body),
            call_form=form,
            several_calls=several,
        )

    def _refuse_other_services(self, body: ChatRequest) -> None:
        if set(body.modalities or ()) - {"text"} or body.audio is not None:
            raise bad_request(
                "This server's models write text only, no audio.", "modalities" if body.modalities else "audio"
            )
        if body.functions is not None or body.function_call is not None:
            raise bad_request(
                "functions and function_call are the old form of tools and tool_choice; use those.",
                "functions" if body.functions is not None else "function_call",
            )
        if body.web_search_options is not None:
            raise bad_request("This server does not search the web.", "web_search_options")
        if body.moderation is not None:
            raise bad_request("This server does not moderate.", "moderation")

    def _tools(self, body: ChatRequest) -> list[dict[str, Any]]:
        """The functions that this answer may call, as they were sent."""
        listed = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()]
        if body.tool_choice is None or body.tool_choice == "auto":
            return listed
        if body.tool_choice == "none":
            return []
        if not listed:
            raise bad_request("tool_choice needs tools.", "tool_choice")
        # "required" and a named tool differ from "auto" in the grammar only, see _constraint.
        if isinstance(body.tool_choice, NamedTool):
            name = body.tool_choice.function.name
            listed = [tool for tool in listed if tool["function"]["name"] == name]
            if not listed:
                raise bad_request(f"tool_choice names {name[:64]!r}, which is not among the tools.", "tool_choice")
        return listed

    def _call_form(self) -> CallForm:
        """How this model's answers call functions. Raises: ApiError if it is not known here."""
        assert self.engine.template is not None
        form = call_form(self.engine.template, self.engine.tokenizer)
        if form is None:
            raise bad_request("This model's chat template writes calls in a form that is not read here.", "tools")
        return form

    def _is_constrained(self, body: ChatRequest, tools: Sequence[dict[str, Any]]) -> bool:
        """Whether the answer is held to a form."""
        wanted = body.response_format is not None and body.response_format.type != "text"
        if not tools:
            return wanted
        if wanted:
            raise bad_request("tools and a response_format other than text exclude each other.", "response_format")
        # A model whose template knows tools is left free: it was trained to call them, or to answer.
        return body.tool_choice not in (None, "auto") or self._call_form() is OWN_FORM

    def _constraint(
        self, body: ChatRequest, tools: Sequence[dict[str, Any]], form: CallForm | None, several: bool
    ) -> JsonConstraint:
        """What the answer must look like."""
        wanted = body.response_format
        param = "response_format"  # what an error is said to come from; narrowed down as far as it is known
        try:
            if form is not None:
                param = "tools"
                free = body.tool_choice in (None, "auto")  # the model may also answer in plain text
                functions = [tool["function"] for tool in tools]
                return self._get_grammars().calls(functions, form, several, or_text=free)
            assert wanted is not None
            if wanted.type == "json_object":
                return self._get_grammars().json(JSON_OBJECT)
            if wanted.json_schema is None:
                raise missing("response_format.json_schema")
            param = "response_format.json_schema.schema"
            return self._get_grammars().json(wanted.json_schema.schema_ or JSON_OBJECT)
        except InputError as error:
            raise bad_request(str(error), param) from None

    def _get_grammars(self) -> Grammars:
        if self._grammars is None:
            self._grammars = Grammars(self.engine.tokenizer, self.engine.stop_ids)
        return self._grammars

    # ------------------------------------------------------------ completions

    def completions(self, body: CompletionRequest) -> RequestPlan:
        """Raises: ApiError."""
        model = self.find_model(body.model)
        self._check_answering(body)
        if body.suffix:
            raise bad_request("suffix is not supported: the model continues texts, it does not fill gaps.", "suffix")
        if body.echo and body.logprobs is not None:
            raise bad_request("echo with logprobs is not supported: prompts get no log-probabilities.", "echo")
        count = body.n or 1
        tried = body.best_of or count  # so many are written, n of them returned
        if tried < count:
            raise bad_request(f"best_of ({tried}) must be at least n ({count}).", "best_of")
        if tried > count and body.stream:
            raise bad_request("best_of above n cannot be streamed: the best is known at the end.", "best_of")
        inputs = list_inputs(body.prompt)
        prompts = [self._encode_input(text, "prompt", self._completions_template) for text in inputs]
        settings = [self._settings(body, body.max_tokens, len(prompt), "prompt") for prompt in prompts]
        # The best of several is found by log-probability, also where the reply shows none.
        top_logprobs = 0 if tried > count and body.logprobs is None else body.logprobs
        requests = self._requests(body, prompts, tried, settings, top_logprobs, strip=self._completions_template)
        # Echoed as it was sent; what came as token ids has no other text than theirs.
        echoed = [text if isinstance(text, str) else self.engine.decode(text) for text in inputs]
        return RequestPlan(
            model, requests, tried, count, body.logprobs, _wants_usage(body), prompts=echoed if body.echo else None
        )

    def _encode_input(self, text: str | list[int], param: str, template: bool = False) -> list[int]:
        if isinstance(text, str):
            if not template:
                return self.engine.encode_text(text)
            with _refusals_as_mistakes():
                return self.engine.encode([{"role": "user", "content": text}])
        # The protocol allows any number; one beyond the embeddings would fail within the model, for all of its batch.
        if max(text) >= len(self.engine.token_bytes):
            raise bad_request(
                f"Token id {max(text)} is beyond the model's vocabulary of {len(self.engine.token_bytes)} tokens.",
                param,
            )
        return text

    def embedding_inputs(self, inputs: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        """Token ids of texts to be embedded. Raises: ApiError."""
        prompts = [self._encode_input(text, "input") for text in list_inputs(inputs)]
        longest = max(map(len, prompts))
        if self.context is not None and longest > self.context:
            raise bad_request(
                f"This model's maximum context length is {self.context} tokens; an input has {longest}.",
                "input",
                "context_length_exceeded",
            )
        if not all(prompts):
            raise bad_request("An input is empty.", "input")
        return prompts

    # ------------------------------------------------------------ both

    def find_model(self, name: str | None) -> str:
        """The name of the model asked for. Raises: ApiError 404."""
        if name is None:
            return next(iter(self.models))
        if name not in self.models:
            raise ApiError(
                404, f"The model '{name[:200]}' does not exist; see /v1/models.", param="model", code="model_not_found"
            )
        return name

    def _check_answering(self, body: SamplingRequest) -> None:
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options needs stream to be true.", "stream_options")
        if (body.num_beams or 1) > 1:
            raise bad_request(
                "Beam search is not served, it cannot join a running batch; use num_beams 1.", "num_beams"
            )

    def _settings(
        self, body: SamplingRequest, max_tokens: int | None, num_prompt_tokens: int, param: str
    ) -> GenerationArguments:
        """Settings of the answers to one prompt; an answer ends where the context does."""
        # max_tokens is a limit, not a demand: OpenAI's clients ask for more than is left, and get what there is.
        room = self.defaults.max_new_tokens if max_tokens is None else max_tokens
        if self.context is not None:
            # A prompt that fills the context is the client's mistake, with OpenAI's own code for it.
            if num_prompt_tokens >= self.context:
                raise context_error(num_prompt_tokens, self.context, param)
            room = min(room, self.context - num_prompt_tokens)
        names = ("temperature", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty", "do_sample")
        given: dict[str, Any] = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
        if body.top_p is not None:
            given["top_p"] = max(body.top_p, SMALLEST_TOP_P)
        if body.top_k is not None:
            given["top_k"] = max(body.top_k, 0)  # -1, as other servers have it: from all
        if body.stop is not None:
            given["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
        least = min(self.defaults.min_new_tokens, room)  # the server's own must not refuse a short answer
        return dataclasses.replace(self.defaults, max_new_tokens=room, min_new_tokens=least, **given)

    def _requests(
        self,
        body: SamplingRequest,
        prompts: Sequence[Sequence[int]],
        per_prompt: int,
        settings: Sequence[GenerationArguments],
        top_logprobs: int | None,
        strip: bool,
    ) -> list[Request]:
        """For each prompt `per_prompt` requests; with a seed, they use the numbers from it on."""
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        if bias and max(bias) >= len(self.engine.token_bytes):
            raise bad_request(
                f"Token id {max(bias)} is beyond the model's vocabulary of {len(self.engine.token_bytes)} tokens.",
                "logit_bias",
            )
        # Without a seed answers differ from call to call, whatever the server's own --seed is; 62 bits leave room for
        # the numbers that are added below.
        seed = secrets.randbits(62) if body.seed is None else body.seed
        model = self.models[self.find_model(body.model)]
        return [
            Request(
                prompt,
                settings[number],
                seed + number * per_prompt + choice,
                strip,
                logit_bias=bias,
                top_logprobs=top_logprobs,
                model=model,
            )
            for number, prompt in enumerate(prompts)
            for choice in range(per_prompt)
        ]


# ---------------------------------------------------------------- reading


@contextlib.contextmanager
def _refusals_as_mistakes() -> Iterator[None]:
    """A template that refuses the order of a conversation's roles is the request's mistake."""
    try:
        yield
    except InputError as error:
        raise bad_request(str(error), "messages") from None


def list_inputs(inputs: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One or several texts, one or several lists of ids -> a list of them."""
    if isinstance(inputs, str) or isinstance(inputs[0], int):
        return [inputs]
    return list(inputs)


def _wants_usage(body: SamplingRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def read_messages(body: ChatRequest) -> list[Message]:
    """The conversation as templates take it; a bare text is a user's. Raises: ApiError for what is not text."""
    if isinstance(body.messages, str):
        return [{"role": "user", "content": body.messages}]
    messages: list[Message] = []
    for number, message in enumerate(body.messages):
        role, content = ROLES[message.role], _read_content(message, f"messages[{number}]")
        read: Message = {"role": role, "content": content}
        if message.tool_calls:
            read["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        if message.tool_call_id is not None:
            read["tool_call_id"] = message.tool_call_id
        messages.append(read)
    last = messages[-1]
    if len(messages) > 1 and last == {"role": "assistant", "content": ""}:
        messages.pop()  # an answer of which nothing is there yet
    return messages


def _read_content(message: ChatMessage, param: str) -> str:
    content = message.content
    if content is None and not message.tool_calls:
        raise missing(f"{param}.content")
    texts = [content] if isinstance(content, str) else []
    for number, part in enumerate(content if isinstance(content, list) else ()):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "input_text", "output_text", "refusal"):
            raise bad_request(
                f"This model reads text only: a content part of type '{part.type[:50]}' is not supported.",
                f"{param}.content[{number}].type",
            )
        if text is None:
            raise missing(f"{param}.content[{number}].text")
        texts.append(text)
    return "\n".join(texts)
