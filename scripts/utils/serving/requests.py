"""OpenAI's HTTP protocol: what requests look like.

Requests are read strictly, as the original does: a number in quotes or an unknown field is an error that names it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from .errors import TOO_MANY

MAX_INPUTS = 2048  # texts in one request, as the original has it
MAX_MESSAGES = 512  # in one conversation; the time to write its prompt grows with their square
MAX_FIELDS = 1000  # of one object: more are not looked at, since each wrong one costs time


def _limit_fields(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise PydanticCustomError(TOO_MANY, f"An object with {len(value)} fields; {MAX_FIELDS} at most are read")
    return value


class RequestModel(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    _few_fields = model_validator(mode="before")(_limit_fields)


def _kind(value: Any) -> str:
    """Which branch of a union a value belongs to."""
    return "text" if isinstance(value, str) else "list" if isinstance(value, list) else "object"


def _kind_of_items(value: Any) -> str:
    if isinstance(value, list):
        first = value[0] if value else ""
        return "ids" if type(first) is int else "lists" if isinstance(first, list) else "texts"
    return _kind(value)


def _need(what: str, kind: Any = _kind) -> Discriminator:
    return Discriminator(kind, custom_error_type="shape", custom_error_message=f"need {what}")


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
Inputs = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("lists")],
    _need("a text, a list of texts, a list of token ids, or a list of such lists", _kind_of_items),
]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = Annotated[
    Annotated[StopText, Tag("text")] | Annotated[list[StopText], Field(max_length=4), Tag("list")],
    _need("a text or a list of up to 4 texts"),
]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_FIELDS),
    BeforeValidator(_limit_fields),
]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class StreamOptions(RequestModel):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingRequest(RequestModel):
    """What chat and completions have in common; null and absent fields take the server's own settings."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not OpenAI's: the forerunner's, and what other servers have too. top_k 0 or -1: from all tokens.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    do_sample: bool | None = None
    num_beams: Annotated[int, Field(ge=1)] | None = None
    # Accepted without effect: they say who asks, or how the original's own machines should work.
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


class ContentPart(RequestModel):
    """A part of a message; only text can be read."""

    model_config = ConfigDict(extra="ignore")

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(RequestModel):
    """A call that an earlier answer made."""

    model_config = ConfigDict(extra="ignore")

    name: str
    arguments: str


class ToolCall(RequestModel):
    """A call that an earlier answer made."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    type: Literal["function"] | None = "function"
    function: CalledFunction


class ChatMessage(RequestModel):
    """A turn of a conversation; fields that answers carry besides are ignored, so that they can be sent back."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("list")],
            _need("a text or a list of parts"),
        ]
        | None
    ) = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class JsonSchema(RequestModel):
    """What an answer in JSON must look like."""

    name: Name
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """Text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(RequestModel):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(RequestModel):
    """Which function."""

    name: str


class NamedTool(RequestModel):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag("list")],
        _need("a list of messages"),
    ]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("text")] | Annotated[NamedTool, Tag("object")],
            _need("none, auto, required, or a function"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    # Accepted without effect.
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None
    # Refused unless null or plain text; see planning.
    modalities: list[str] | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    moderation: Any = None


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: Inputs
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: str | None = None  # refused unless null or empty


class EmbeddingRequest(RequestModel):
    """POST /v1/embeddings."""

    input: Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Any = None
