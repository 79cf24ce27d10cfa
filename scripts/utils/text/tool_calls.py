"""Tool calls: how functions are told to the model and called by it, in the form that instruction tuning trains.

The functions stand as a JSON list in the system prompt, an answer that calls one is {"name": ..., "arguments": ...}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .prompts import Message


def add_tools(messages: Sequence[Message], functions: Sequence[dict[str, Any]]) -> list[Message]:
    """The messages, their system prompt followed by the functions, as text.prompts reads them from training data."""
    listed = json.dumps(list(functions), ensure_ascii=False)
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{listed}"}, *messages[1:]]
    return [{"role": "system", "content": listed}, *messages]


def write_call(name: str, arguments: str) -> str:
    """What the model writes to call a function; `arguments` is JSON."""
    try:
        return json.dumps({"name": name, "arguments": json.loads(arguments)}, ensure_ascii=False)
    except (ValueError, RecursionError):  # no JSON, or JSON deeper than Python goes
        return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def call_forms(functions: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any], str]]:
    """Calls of the functions for Grammars.json: what stands before the arguments, their schema, what stands after."""
    return [
        (
            f'{{"name": {json.dumps(function["name"])}, "arguments": ',
            {"type": "object", **(function.get("parameters") or {})},
            "}",
        )
        for function in functions
    ]


def read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments (JSON) of the call that an answer is; None if it is text, or a call cut short."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["name"], str):
        return None
    return call["name"], json.dumps(call["arguments"], ensure_ascii=False)
