"""Files of conversations: saved, and read again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..core.arguments import GenerationArguments
from ..core.errors import InputError
from ..core.files import json_problem
from ..text.conversations import read_conversation
from ..text.prompts import Message, with_system_prompt
from ..text.tool_calls import add_tools
from .chat import SETTINGS, Conversation, Reply, Turn, with_guidance

TURN_KEYS = {"role", "from"}  # one of them says that a record is a turn


@dataclass
class SavedChat:
    """What a file of a conversation holds; None: nothing about it."""

    turns: list[Turn]
    system_prompt: str | None
    settings: dict[str, Any]


def save_chat(
    conversation: Conversation, models: Sequence[str], system_prompt: str | None, settings: Mapping[str, Any]
) -> str:
    """The conversation as JSON: messages as in training data, the settings, and further models' answers."""
    messages = with_system_prompt(conversation.messages(), system_prompt)
    record: dict[str, Any] = {"messages": messages, "model": models[0]}
    if len(models) > 1:
        record["compared"] = [
            {"model": name, "answers": [turn.replies[number].text for turn in conversation.turns if turn.replies]}
            for number, name in enumerate(models[1:], 1)
        ]
    record["settings"] = dict(settings)
    return json.dumps(record, ensure_ascii=False, indent=2)


def load_chat(data: bytes, num_models: int = 1) -> SavedChat:
    """Read a conversation that save_chat wrote, or any one that training data may hold (messages, ShareGPT, Alpaca).

    It may stand in a list alone, and the list of its messages is one, too.

    Args:
        num_models: replies each turn gets; a file with fewer gives the others the first model's.
    Raises: InputError saying what is wrong with the file.
    """
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"it is not UTF-8 text (byte {error.start + 1})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not JSON ({json_problem(error)})") from None
    if isinstance(record, list) and record:
        is_turn = [isinstance(item, dict) and bool(TURN_KEYS & item.keys()) for item in record]
        record = {"messages": record} if all(is_turn) else record[0] if len(record) == 1 else record
    if not isinstance(record, dict):
        found = f"a list of {len(record)}" if isinstance(record, list) else type(record).__name__
        raise InputError(f"need one conversation, an object with 'messages', got {found}")
    messages = _read_messages(record)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2) or not roles:
        raise InputError(f"user and assistant have to take turns, got {', '.join(roles) or 'nothing'}")
    turns = [Turn(question["content"]) for question in messages[::2]]
    answers = [message["content"] for message in messages[1::2]]
    columns = [answers, *_read_compared(record.get("compared") or [], len(answers))]
    for number, turn in enumerate(turns):
        texts = [column[number] if number < len(column) else "" for column in columns]
        texts = (texts + [texts[0]] * num_models)[:num_models]
        turn.replies = [Reply(text, "stop" if text else "cancelled") for text in texts]
    return SavedChat(turns, system, _read_settings(record.get("settings") or {}))


def _read_messages(record: dict[str, Any]) -> list[Message]:
    """The messages of a record; tools are told in the system prompt."""
    conversation = read_conversation(record, "the file")
    if conversation.changes:
        raise InputError("user and assistant have to take turns, beginning with the user")
    read = add_tools(conversation.messages, conversation.tools) if conversation.tools else conversation.messages
    for message in read:
        try:
            message["content"].encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
            raise InputError("a message is not valid Unicode") from None
    return read


def _read_compared(compared: Any, num_answers: int) -> list[list[str]]:
    entries = compared if isinstance(compared, list) else [None]
    columns = [entry.get("answers") if isinstance(entry, dict) else None for entry in entries]
    for column in columns:
        if not isinstance(column, list) or not all(isinstance(text, str) for text in column):
            raise InputError("'compared' needs objects with 'model' and 'answers', a list of texts")
        if len(column) < num_answers:
            raise InputError(f"'compared' has {len(column)} answers, 'messages' has {num_answers}")
    return [list(column) for column in columns if column is not None]


def _read_settings(settings: Any) -> dict[str, Any]:
    """Settings as GenerationArguments takes them. Raises: InputError for what it would not."""
    if not isinstance(settings, dict):
        raise InputError(f"'settings' needs names and values, got {type(settings).__name__}")
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise InputError(f"'settings' has unknown names: {', '.join(map(str, unknown))}")
    defaults = asdict(GenerationArguments())
    for name, value in settings.items():
        if not _has_kind_of(value, defaults[name]):
            raise InputError(f"'settings': {name} cannot be {value!r:.80}")
    GenerationArguments(**with_guidance(settings))
    return dict(settings)


def _has_kind_of(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or isinstance(value, str)
    if isinstance(default, list):
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    return isinstance(value, int) or isinstance(default, float)
