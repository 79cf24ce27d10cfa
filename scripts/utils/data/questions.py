"""Questions with reference answers, in every layout of conversations that tuning reads: asked, not learnt from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..core.errors import InputError
from ..core.records import RECORD_SUFFIXES, iter_records, list_data_files
from ..text.conversations import read_conversation
from ..text.prompts import Message


@dataclass(frozen=True)
class OpenQuestion:
    """A conversation up to where the assistant answers.

    Attributes:
        messages: role and content of each turn; the last is the user's.
        reference: the record's own last answer; None if it has none.
        record: what else it says of itself, such as its id.
    """

    messages: list[Message]
    reference: str | None
    location: str
    record: dict[str, Any]

    @property
    def text(self) -> str:
        """What is asked, without the turns before it."""
        return str(self.messages[-1]["content"])


def read_questions(paths: Sequence[str], need_reference: bool = True, most: int | None = None) -> list[OpenQuestion]:
    """The questions of json, jsonl and parquet files or folders, at most `most`, the first.

    Raises: InputError naming file and line of what is no question, or has no reference where one is needed; if there
        is no question.
    """
    questions = list(islice(_iter_questions(paths, need_reference), most))
    if not questions:
        raise InputError(f"--questions {' '.join(paths)}: no question in it")
    return questions


def _iter_questions(paths: Sequence[str], need_reference: bool) -> Iterator[OpenQuestion]:
    for path in paths:
        for file in list_data_files(path, RECORD_SUFFIXES):
            for location, record in iter_records(file):
                yield read_question(record, location, need_reference)


def read_question(record: dict[str, Any], location: str, need_reference: bool = True) -> OpenQuestion:
    """One record: its last answer is the reference, what stands before it is asked. Raises: InputError."""
    found = read_conversation(record, location)
    if found.tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in found.messages):
        raise InputError(f"{location}: calls functions, but questions here are asked in words; leave the record out")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in found.messages]
    answer = turns.pop()["content"].strip() if turns and turns[-1]["role"] == "assistant" else ""
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise InputError(
            f"{location}: the question is empty; write it in 'instruction', or as the user's last turn; the record "
            f"has {sorted(record)}"
        )
    if need_reference and not answer:
        raise InputError(
            f"{location}: no reference answer to compare with; write it in 'output', or as the assistant's last turn; "
            f"the record has {sorted(record)}"
        )
    return OpenQuestion(turns, answer or None, location, record)
