"""Records of conversations, preference pairs and prompts, in every layout -> messages and answers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..core.errors import InputError
from .prompts import Message

ROLES = {
    "system": "system",
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


def read_conversation(record: dict[str, Any], location: str) -> list[Message]:
    """Turn one record into messages of role (system, user, assistant, tool) and content.

    Understood: {"instruction", "input", "output", "system", "history"}, {"messages": [{"role", "content"}]} and
    ShareGPT's {"conversations": [{"from", "value"}], "system", "tools"}; a turn may have either spelling in both.
    Raises: InputError naming `location` and the fields found.
    """
    if record.get("messages") is not None:
        messages = _read_turns(record["messages"], f"{location}: messages")
    elif record.get("conversations") is not None:
        messages = _read_turns(record["conversations"], f"{location}: conversations")
    elif "instruction" in record:
        messages = _read_instruction(record, location)
    else:
        raise InputError(
            f"{location}: need 'instruction' and 'output', 'messages', or 'conversations'; the record has "
            f"{sorted(record)}"
        )
    system = "\n\n".join(str(record[field]) for field in ("system", "tools") if record.get(field))
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{location}: the conversation has no assistant turn to learn from")
    return messages


def _read_instruction(record: dict[str, Any], location: str) -> list[Message]:
    texts = {field: record.get(field, "") or "" for field in ("instruction", "input")}
    texts["output"] = record.get("output")
    for field, text in texts.items():
        if not isinstance(text, str):
            problem = "is missing" if text is None else f"is {type(text).__name__}, not text"
            raise InputError(f"{location}: field '{field}' {problem}; the record has {sorted(record)}")
    messages: list[Message] = []
    for turn in record.get("history") or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise InputError(f"{location}: 'history' needs [question, answer] pairs, got {turn!r:.80}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = texts["instruction"] + ("\n" + texts["input"] if texts["input"] else "")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]


def _read_turns(turns: Any, location: str) -> list[Message]:
    """Messages of a list of turns, each in one of TURN_FIELDS."""
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{location}: need a non-empty list of turns, got {turns!r:.80}")
    messages = []
    for number, turn in enumerate(turns, 1):
        fields = turn if isinstance(turn, dict) else {}
        spellings = [(fields.get(role), fields.get(text)) for role, text in TURN_FIELDS]
        # parquet fills up the fields of the other spelling with None
        found = [(role, text) for role, text in spellings if role in ROLES and isinstance(text, str)]
        if not found:
            raise InputError(
                f"{location}: turn {number} needs 'role' (one of {', '.join(ROLES)}) and text in 'content', or the "
                f"same in 'from' and 'value'; got {turn!r:.80}"
            )
        role, text = found[0]
        messages.append({"role": ROLES[role], "content": text})
    return messages


PROMPT_FIELDS = ("prompt", "messages", "conversations", "instruction")


@dataclass(frozen=True)
class Preference:
    """A conversation up to where the assistant answers, the better and the worse answer.

    Attributes:
        margin: how much better, in the units of the reward; None if not given.
        source: where the record says it comes from; None if it does not.
    """

    messages: list[Message]
    chosen: str
    rejected: str
    margin: float | None = None
    source: str | None = None


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
    chosen, rejected = (_read_answer(record, name, prompt, location) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise InputError(f"{location}: 'chosen' and 'rejected' answer different conversations; only the last turn may")
    messages = _finish_prompt(record, chosen[:-1], location)
    margin, source = record.get("margin"), record.get("source")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise InputError(f"{location}: field 'margin' needs a number, got {margin!r:.80}")
    if margin is not None and not math.isfinite(margin):
        raise InputError(f"{location}: field 'margin' is {margin}, need a finite number")
    if not isinstance(source, str | None):
        raise InputError(f"{location}: field 'source' needs text, got {source!r:.80}")
    answers = chosen[-1]["content"], rejected[-1]["content"]
    return Preference(messages, *answers, None if margin is None else float(margin), source)


def split_prompt(record: dict[str, Any], location: str) -> tuple[list[Message], bool]:
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
    return _finish_prompt(record, turns[:count], location), answered


def _read_prompt_turns(record: dict[str, Any], location: str) -> list[Message]:
    """The conversation before the answer; [] if no field holds it."""
    name = next((name for name in PROMPT_FIELDS if name in record), None)
    if name is None:
        return []
    if name == "instruction":
        fields = ("instruction", "input", "history", "system", "tools")
        kept = {name: record[name] for name in fields if name in record}
        return read_conversation({**kept, "output": ""}, location)[:-1]
    value = record[name]
    if name == "prompt" and isinstance(value, str):
        return _read_dialogue(value) or [{"role": "user", "content": value}]
    return _read_turns(value, f"{location}: {name}")


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
            # After the text "Assistant:" an answer usually begins with a space, which is the mark's and not its own.
            dialogue = isinstance(record.get("prompt"), str) and _read_dialogue(record["prompt"])
            return [*prompt, {"role": "assistant", "content": value.strip() if dialogue else value}]
        turns = _split_dialogue(value)
    else:
        turns = _read_turns([value] if isinstance(value, dict) else value, f"{location}: {name}")
        if turns[0]["role"] == "assistant":
            turns = [*prompt, *turns]
        elif prompt and prompt not in (turns[: len(prompt)], turns[:-1][-len(prompt) :]):
            raise InputError(f"{location}: the turns in '{name}' neither go on from the prompt nor hold it")
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise InputError(
            f"{location}: '{name}' needs a question before it and an assistant turn at its end, got {value!r:.80}; "
            f"the record has {sorted(record)}"
        )
    return turns


def _finish_prompt(record: dict[str, Any], turns: list[Message], location: str) -> list[Message]:
    """The turns with the record's system prompt. Raises: InputError unless the assistant is to speak next."""
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"{location}: need a question for the assistant to answer, the last of the turns in one of "
            f"{', '.join(PROMPT_FIELDS)}; got the roles {[turn['role'] for turn in turns]}, the record has "
            f"{sorted(record)}"
        )
    system: dict[str, Any] = {name: record[name] for name in ("system", "tools") if name in record}
    answered = [*turns, {"role": "assistant", "content": ""}]  # read_conversation wants something to learn
    return read_conversation({"messages": answered, **system}, location)[:-1]


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
