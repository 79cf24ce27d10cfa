"""Tool calls: how functions are told to the model, and the forms in which its answers call them.

Where a chat template knows tools, its own rendering is used (see prompts.call_form). Elsewhere the functions stand as
a JSON list in the system prompt, and an answer that calls one is {"name": ..., "arguments": ...}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call of a function; `arguments` is JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallForm:
    """How calls stand in an answer: start, then before + JSON + after of each, between them `between`, then end.

    Attributes:
        mark: what the calls begin with, after text if there is any; "": a call is the whole answer. Where it is a
            special token, the text of an answer lacks it.
        arguments: the JSON's field of the arguments.
    """

    mark: str = ""
    arguments: str = "arguments"
    start: str = ""
    before: str = ""
    after: str = ""
    between: str = "\n"
    end: str = ""

    @property
    def signs(self) -> str:
        """All that may stand around calls, where special tokens are to be shown."""
        return f"{self.mark}{self.start}{self.before}{self.after}"


OWN_FORM = CallForm()
HERMES_FORM = CallForm("<tool_call>", before="<tool_call>\n", after="\n</tool_call>")  # Qwen's, too
LLAMA_FORM = CallForm("<|python_tag|>", arguments="parameters", between="; ")  # 3.1 to 3.3
MISTRAL_FORM = CallForm("[TOOL_CALLS]", start="[TOOL_CALLS] [", between=", ", end="]")


def read_function(tool: dict[str, Any]) -> dict[str, Any]:
    """The function of a tool: of OpenAI's {"type": "function", "function": {...}}, or what has no such frame."""
    function = tool.get("function")
    return function if isinstance(function, dict) else tool


def add_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, their system prompt followed by the functions as a JSON list, for templates without tools."""
    listed = json.dumps([read_function(tool) for tool in tools], ensure_ascii=False)
    first = next((number for number, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if not first:
        return [{"role": "system", "content": listed}, *messages]
    system = {"role": "system", "content": f"{messages[first - 1]['content']}\n\n{listed}"}
    return [*messages[: first - 1], system, *messages[first:]]


def parse_json(value: Any) -> Any:
    """What text that is JSON stands for; anything else, and JSON deeper than Python goes, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def write_calls(calls: Iterable[tuple[str, Any]], form: CallForm = OWN_FORM) -> str:
    """What the model writes to call functions; the arguments are JSON text, or what it stands for."""
    written = [
        json.dumps({"name": name, form.arguments: parse_json(arguments)}, ensure_ascii=False)
        for name, arguments in calls
    ]
    return form.start + form.between.join(f"{form.before}{call}{form.after}" for call in written) + form.end


def call_forms(
    functions: Sequence[dict[str, Any]], form: CallForm = OWN_FORM
) -> list[tuple[str, dict[str, Any], str]]:
    """Single calls of the functions for Grammars.json: what stands before the arguments, their schema, what after."""
    return [
        (
            f'{form.start}{form.before}{{"name": {json.dumps(function["name"])}, "{form.arguments}": ',
            {"type": "object", **(function.get("parameters") or {})},
            f"}}{form.after}{form.end}",
        )
        for function in functions
    ]


def read_calls(text: str, form: CallForm | None = OWN_FORM) -> tuple[str, list[Call]]:
    """The text of an answer, and the calls in it, in order.

    What is cut short is text; without the form's mark, calls are the whole answer or none.
    Args: form: None reads no calls.
    """
    if form is None:
        return text, []
    place = text.find(form.mark) if form.mark else -1
    before, rest = (text[:place], text[place:]) if place >= 0 else ("", text)
    calls, remainder = _scan(rest, form)
    if not calls or (place < 0 and remainder):
        return text, []
    return (before + remainder).strip(), calls


def open_call(text: str, form: CallForm) -> tuple[str, str] | None:
    """The call that an answer has begun and not ended: its name, and the text of its arguments so far.

    None where there is none; of a form whose calls are one list, always.
    """
    place = text.find(form.mark) if form.mark else -1
    calls, rest = _scan(text[max(place, 0) :], form)
    if form.end or (place < 0 and calls):
        return None
    rest = rest[_match_end(_skipping(form.mark, form.before), rest, 0) :]
    head = re.match(rf'\{{\s*"name"\s*:\s*"([^"\\\n]+)"\s*,\s*"{form.arguments}"\s*:\s*(?=\{{)', rest)
    return (head[1], rest[head.end() :]) if head else None


def _scan(text: str, form: CallForm) -> tuple[list[Call], str]:
    """The calls at the beginning of the text, and what comes after them."""
    opening, closing = _skipping(form.mark, form.before), _skipping(form.after, form.between)
    decoder = json.JSONDecoder()
    calls: list[Call] = []
    end = 0
    while True:
        try:
            value, place = decoder.raw_decode(text, _match_end(opening, text, end))
        except (ValueError, RecursionError):
            return calls, text[end:]
        values = value if form.end and isinstance(value, list) else [value]
        found = [call for item in values if (call := _read_call(item, form)) is not None]
        if not found or len(found) < len(values):
            return calls, text[end:]
        calls += found
        end = _match_end(closing, text, place)


def _skipping(*signs: str) -> re.Pattern[str]:
    words = [re.escape(sign.strip()) for sign in signs if sign.strip()]
    return re.compile("(?:" + "|".join([r"\s", *words]) + ")*")


def _match_end(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place


def _read_call(value: Any, form: CallForm) -> Call | None:
    fields = {"name", form.arguments}
    if not isinstance(value, dict) or not fields <= set(value) <= fields | {"id", "type"}:
        return None
    if not isinstance(value["name"], str):
        return None
    # Some models write the arguments as OpenAI's protocol does, as JSON in a text.
    return Call(value["name"], json.dumps(parse_json(value[form.arguments]), ensure_ascii=False))
