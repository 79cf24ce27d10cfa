"""Records of conversations, preference pairs and prompts, in every layout -> messages, tools and answers.

A record that cannot be used is an InputError with its place; what is used in another form is named in `changes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.errors import InputError
from .prompts import Message
from .tool_calls import parse_json, read_function

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "function_call": "assistant",  # the model writes the call
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
}
TURN_FIELDS = (("from", "value"), ("role", "content"))  # where a turn has its role and its text
WEIGHTS = ("weight", "train", "loss")  # where a turn says whether it is trained, as 0 and 1 or false and true

# What may be changed in a conversation, and how the log says it.
CHANGES = {
    "joined_turns": "have neighbouring turns of one speaker, joined with an empty line between them",
    "dropped_openings": "are opened by the assistant, whose words before the first question are left out",
    "empty_answers": "have empty answers, which are not trained",
    "cut_ends": "go on after the last answer, and end there now",
}


@dataclass(frozen=True)
class Conversation:
    """Messages, and what goes with them.

    Attributes:
        messages: at most one system message at the beginning; no two users' or assistants' turns are neighbours.
        tools: the functions that may be called; None: there are none.
        changes: the names in CHANGES of what is not as the record has it.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    changes: frozenset[str] = frozenset()


def read_conversation(record: dict[str, Any], location: str) -> Conversation:
    """Turn one record into messages of role (system, user, assistant, tool), content, and what else they have.

    Understood: {"instruction", "input", "output", "system", "history"}, {"messages": [{"role", "content"}]} and
    ShareGPT's {"conversations": [{"from", "value"}], "system", "tools"}; a turn may have either spelling in both. An
    instruction without an output is a question.
    Raises: InputError naming `location` and the fields found.
    """
    layout = _find_layout(record, location)
    turns = (
        _read_instruction(record, location)
        if layout == "instruction"
        else _read_turns(record[layout], f"{location}: {layout}")
    )
    return _arrange(turns, record, location)


def read_example(record: dict[str, Any], location: str) -> Conversation:
    """A conversation to be trained: read_conversation's up to its last answer, empty answers weighted 0.

    No message is left if all answers are empty, or stand before the first question.
    Raises: InputError as read_conversation, and if there is no answer.
    """
    if _find_layout(record, location) == "instruction" and record.get("output") is None:
        raise InputError(f"{location}: field 'output' is missing; the record has {sorted(record)}")
    found = read_conversation(record, location)
    answers = [number for number, message in enumerate(found.messages) if message["role"] == "assistant"]
    if not answers and "dropped_openings" not in found.changes:
        raise InputError(f"{location}: the conversation has no assistant turn to learn from")
    empty = [number for number in answers if is_empty(found.messages[number])]
    end = max((number + 1 for number in answers if number not in empty), default=0)
    messages = list(found.messages[:end])
    for number in empty:
        if number < end:
            messages[number] = {**messages[number], "weight": 0}
    made = {"empty_answers": bool(empty), "cut_ends": end < len(found.messages)}
    return Conversation(messages, found.tools, found.changes.union(name for name, holds in made.items() if holds))


def is_empty(message: Message) -> bool:
    """Whether a turn says nothing and calls nothing."""
    return not message["content"].strip() and not message.get("tool_calls")


def _find_layout(record: dict[str, Any], location: str) -> str:
    """The field with the conversation. Raises: InputError."""
    if layout := next((name for name in ("messages", "conversations") if record.get(name) is not None), None):
        return layout
    if "instruction" not in record:
        raise InputError(
            f"{location}: need 'instruction' and 'output', 'messages', or 'conversations'; the record has "
            f"{sorted(record)}"
        )
    return "instruction"


def _read_instruction(record: dict[str, Any], location: str) -> list[Message]:
    given = {field: record.get(field) for field in ("instruction", "input", "output")}
    texts = {field: "" if text is None else text for field, text in given.items()}
    for field, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"{location}: field '{field}' is {type(text).__name__}, not text")
    messages: list[Message] = []
    history = record.get("history") or []
    for turn in history if isinstance(history, list | tuple) else [history]:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise InputError(f"{location}: 'history' needs [question, answer] pairs, got {turn!r:.80}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = texts["instruction"] + ("\n" + texts["input"] if texts["input"] else "")
    messages.append({"role": "user", "content": question})
    if record.get("output") is not None:
        messages.append({"role": "assistant", "content": texts["output"]})
    return messages


def _read_turns(turns: Any, location: str) -> list[Message]:
    """Messages of a list of turns, each in one of TURN_FIELDS."""
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{location}: need a non-empty list of turns, got {turns!r:.80}")
    return [_read_turn(turn, f"{location}: turn {number}") for number, turn in enumerate(turns, 1)]


def _read_turn(turn: Any, location: str) -> Message:
    fields = turn if isinstance(turn, dict) else {}
    calls = fields.get("tool_calls") or fields.get("function_call")
    spellings = [(fields.get(role), _join_parts(fields.get(text))) for role, text in TURN_FIELDS]
    # parquet fills up the fields of the other spelling with None
    known = [(role, text) for role, text in spellings if isinstance(role, str) and role in ROLES]
    found = [(role, text) for role, text in known if isinstance(text, str)]
    found += [(role, "") for role, text in known if text is None and calls]
    if not found:
        raise InputError(
            f"{location} needs 'role' (one of {', '.join(ROLES)}) and text in 'content', or the same in 'from' and "
            f"'value'; got {turn!r:.80}"
        )
    role, text = found[0]
    message: Message = {"role": ROLES[role], "content": text}
    if calls and message["role"] != "assistant":
        raise InputError(f"{location}: only the assistant calls functions, not the {role}")
    if role == "function_call" and not calls and (calls := _parse_calls(text)):
        message["content"] = ""
    if calls:
        message["tool_calls"] = _read_calls(calls, location)
    if message["role"] == "tool":
        message |= {name: fields[name] for name in ("tool_call_id", "name") if isinstance(fields.get(name), str)}
    if not _is_trained(fields, message["role"], location):
        message["weight"] = 0
    return message


def _join_parts(content: Any) -> Any:
    """The text of content that OpenAI's clients write in parts, as the server reads it; anything else as it is."""
    parts = content if isinstance(content, list) else []
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text"
             and isinstance(part.get("text"), str)]  # fmt: skip
    return "\n".join(texts) if texts and len(texts) == len(parts) else content


def _is_trained(turn: dict[str, Any], role: str, location: str) -> bool:
    """What the turn says about it, True by default. Raises: InputError for what is neither yes nor no."""
    given = {name: turn[name] for name in WEIGHTS if turn.get(name) is not None}
    values = list(given.values())  # 0 and 1, 0.0 and 1.0, false and true
    if any(value not in (0, 1) or bool(value) != bool(values[0]) for value in values):
        raise InputError(f"{location}: {given!r:.80}, need 0 (not trained) or 1")
    if role == "assistant":
        return all(values)
    if values and values[0]:
        raise InputError(f"{location}: {given!r:.80}: only the assistant's turns can be trained, not the {role}'s")
    return True


def _parse_calls(text: str) -> Any:
    """The call or calls that ShareGPT's function_call writes as JSON; None for other text."""
    value = parse_json(text)
    calls = value if isinstance(value, list) else [value]
    is_call = all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls)
    return calls if calls and is_call else None


def _read_calls(calls: Any, location: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, of a list or its JSON. Raises: InputError."""
    read = []
    calls = parse_json(calls)
    for call in calls if isinstance(calls, list) else [calls]:
        function = read_function(call) if isinstance(call, dict) else {}
        name, arguments = function.get("name"), function.get("arguments") or {}
        if not isinstance(name, str) or not isinstance(parse_json(arguments), dict):
            raise InputError(
                f"{location}: a call needs 'name' and 'arguments', an object or its JSON; got {call!r:.80}"
            )
        index = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read.append({"type": "function", **index, "function": {"name": name, "arguments": arguments}})
    return read


def _read_tools(tools: Any, location: str) -> list[dict[str, Any]] | None:
    """The functions that may be called, of a list or its JSON. Raises: InputError."""
    if tools is None or (isinstance(tools, str) and not tools.strip()):
        return None
    parsed = parse_json(tools)
    found = [parse_json(tool) for tool in (parsed if isinstance(parsed, list) else [parsed])]
    for tool in found:
        if not isinstance(tool, dict) or not isinstance(read_function(tool).get("name"), str):
            raise InputError(
                f"{location}: 'tools' needs a list of functions, each with 'name', 'description' and 'parameters', or "
                f"the same as JSON; got {tool!r:.80}"
            )
    return found or None


def _arrange(turns: Iterable[Message], record: dict[str, Any], location: str) -> Conversation:
    """The turns with the record's system prompt and tools, see Conversation. Raises: InputError."""
    system = record.get("system")
    if not isinstance(system, str | None):
        raise InputError(f"{location}: field 'system' is {type(system).__name__}, not text")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    changes = set()
    is_asked = False
    for turn in turns:
        is_asked = is_asked or turn["role"] in ("user", "tool")
        if turn["role"] == "assistant" and not is_asked:
            changes.add("dropped_openings")
        elif not messages or turn["role"] == "tool" or turn["role"] != messages[-1]["role"]:
            messages.append(turn)
        else:
            messages[-1] = _join(messages[-1], turn, location)
            if turn["role"] != "system":
                changes.add("joined_turns")
    return Conversation(messages, _read_tools(record.get("tools"), location), frozenset(changes))


def _join(first: Message, second: Message, location: str) -> Message:
    """Neighbouring turns of one speaker as one."""
    if first.get("weight") != second.get("weight"):
        raise InputError(f"{location}: of two neighbouring turns of the {first['role']} only one is to be trained")
    joined = {**first, "content": "\n\n".join(filter(str.strip, [first["content"], second["content"]]))}
    if calls := [*first.get("tool_calls", ()), *second.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined


# ---------------------------------------------------------------- preference pairs and prompts

PROMPT_FIELDS = ("prompt", "messages", "conversations", "instruction")


@dataclass(frozen=True)
class Preference:
    """A conversation up to where the assistant answers, the better and the worse answer.

    Attributes:
        chosen, rejected: messages of the assistant.
        margin: how much better, in the units of the reward; None if not given.
        source: where the record says it comes from; None if it does not.
        tools, changes: see Conversation.
    """

    messages: list[Message]
    chosen: Message
    rejected: Message
    margin: float | None = None
    source: str | None = None
    tools: list[dict[str, Any]] | None = None
    changes: frozenset[str] = frozenset()


def read_preference(record: dict[str, Any], location: str) -> Preference:
    """Turn one record into a Preference.

    The conversation stands in "prompt" (text or turns), "messages", "conversations" or "instruction" (with "input" and
    "history"), with "system" and "tools" beside it; the answers in "chosen" and "rejected": text, one turn, or turns
    (the rest of the conversation, or the whole of it, then the prompt may be left out). Turns are {"role", "content"}
    or {"from", "value"}. Text of the form "Human: ... Assistant: ..." is cut into turns.
    Raises: InputError naming `location` and the fields found.
    """
    record = {name: value for name, value in record.items() if value is not None}  # parquet fills up with None
    prompt = _read_prompt_turns(record, location)
    chosen, rejected = (
        _arrange(_read_answer(record, name, prompt, location), record, location) for name in ("chosen", "rejected")
    )
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise InputError(f"{location}: 'chosen' and 'rejected' answer different conversations; only the last turn may")
    _check_question(chosen.messages[:-1], record, location)
    margin, source = record.get("margin"), record.get("source")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise InputError(f"{location}: field 'margin' needs a number, got {margin!r:.80}")
    if margin is not None and not math.isfinite(margin):
        raise InputError(f"{location}: field 'margin' is {margin}, need a finite number")
    if not isinstance(source, str | None):
        raise InputError(f"{location}: field 'source' needs text, got {source!r:.80}")
    return Preference(
        chosen.messages[:-1],
        chosen.messages[-1],
        rejected.messages[-1],
        None if margin is None else float(margin),
        source,
        chosen.tools,
        chosen.changes | rejected.changes,
    )


def read_prompt(record: dict[str, Any], location: str) -> tuple[Conversation, bool]:
    """One record's messages up to a user (or tool) turn, and whether an answer after them was left out.

    The fields are read_preference's; "chosen", "rejected" and "output" may be absent.
    Raises: InputError naming `location` and the fields found.
    """
    record = {name: value for name, value in record.items() if value is not None}
    turns = _read_prompt_turns(record, location)
    if not turns and "chosen" in record:  # the prompt stands inside the answers
        turns = _read_answer(record, "chosen", turns, location)
    count = len(turns)
    while count and turns[count - 1]["role"] == "assistant":
        count -= 1
    answered = count < len(turns) or ("instruction" in record and bool(record.get("output")))
    conversation = _arrange(turns[:count], record, location)
    _check_question(conversation.messages, record, location)
    return conversation, answered


def _read_prompt_turns(record: dict[str, Any], location: str) -> list[Message]:
    """The conversation before the answer; [] if no field holds it."""
    name = next((name for name in PROMPT_FIELDS if name in record), None)
    if name is None:
        return []
    if name == "instruction":
        return _read_instruction({**record, "output": None}, location)
    value = record[name]
    if name == "prompt" and isinstance(value, str):
        return _read_dialogue(value) or [{"role": "user", "content": value}]
    return _unweighted(_read_turns(value, f"{location}: {name}"))


def _unweighted(turns: list[Message]) -> list[Message]:
    """The turns of a pair, in which nothing but the two answers is learnt from."""
    return [{name: value for name, value in turn.items() if name != "weight"} for turn in turns]


def _read_answer(record: dict[str, Any], name: str, prompt: list[Message], location: str) -> list[Message]:
    """The whole conversation with this answer as its last turn."""
    value = record.get(name)
    if value is None or (not prompt and not isinstance(value, list | str)):
        raise InputError(
            f"{location}: need 'chosen' and 'rejected', and the question in one of {', '.join(PROMPT_FIELDS)}; the "
            f"record has {sorted(record)}"
        )
    if isinstance(value, str):
        if prompt:
            _check_question(prompt, record, location)
            # After the text "Assistant:" an answer usually begins with a space, which is the mark's and not its own.
            dialogue = isinstance(record.get("prompt"), str) and _read_dialogue(record["prompt"])
            return [*prompt, {"role": "assistant", "content": value.strip() if dialogue else value}]
        turns = _split_dialogue(value)
    else:
        turns = _unweighted(_read_turns([value] if isinstance(value, dict) else value, f"{location}: {name}"))
        if turns[0]["role"] == "assistant":
            if prompt:
                _check_question(prompt, record, location)
            turns = [*prompt, *turns]
        elif prompt and prompt not in (turns[: len(prompt)], turns[:-1][-len(prompt) :]):
            raise InputError(f"{location}: the turns in '{name}' neither go on from the prompt nor hold it")
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise InputError(
            f"{location}: '{name}' needs a question before it and an assistant turn at its end, got {value!r:.80}; "
            f"the record has {sorted(record)}"
        )
    return turns


def _check_question(messages: list[Message], record: dict[str, Any], location: str) -> None:
    """Raises: InputError unless the assistant is to speak next."""
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"{location}: need a question for the assistant to answer, the last of the turns in one of "
            f"{', '.join(PROMPT_FIELDS)}; got the roles {[turn['role'] for turn in messages]}, the record has "
            f"{sorted(record)}"
        )


# A speaker's mark: at the start of the text or of a line, or as the last word.
_SPEAKER = re.compile(r"(?:\A|\n\s*|\s(?=Assistant:\Z))(Human|Assistant):")


def _split_dialogue(text: str) -> list[Message]:
    """The turns of "Human: ... Assistant: ..." (DeepSpeed-Chat's and hh-rlhf's spelling); [] if it is other text."""
    start, *pieces = _SPEAKER.split(text.strip())
    if start or not pieces or pieces[0] != "Human":
        return []
    speakers = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": speakers[speaker], "content": content.strip()} for speaker, content in pairs]


def _read_dialogue(prompt: str) -> list[Message]:
    """The turns of a dialogue that ends in "Assistant:", where the answer is to follow; [] if it is other text."""
    turns = _split_dialogue(prompt)
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else []
