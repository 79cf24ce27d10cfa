"""Banks of questions: read from files of records, each question under an id of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from ..core.errors import InputError
from ..core.records import RECORD_SUFFIXES, iter_records, list_data_files


class HasId(Protocol):
    """A question of any evaluation."""

    @property
    def id(self) -> str | None: ...


Question = TypeVar("Question", bound=HasId)


def read_bank(paths: Sequence[str], read: Callable[[Mapping[str, Any], str], Question]) -> list[Question]:
    """The questions of json, jsonl and parquet files.

    Args: read: makes a question of a record and its location, file:line.
    Raises: InputError naming file and line; if there is no question.
    """
    files = (file for path in paths for file in list_data_files(path, RECORD_SUFFIXES))
    records = (found for file in files for found in iter_records(file))
    questions = list(with_own_ids((location, read(record, location)) for location, record in records))
    if not questions:
        raise InputError(f"--questions {' '.join(paths)}: no question in it")
    return questions


def with_own_ids(questions: Iterable[tuple[str, Question]]) -> Iterator[Question]:
    """The questions of (location, question). Raises: InputError if one has the id of another."""
    places: dict[str | None, str] = {}
    for location, question in questions:
        if question.id in places:
            raise InputError(
                f"{location}: the id '{question.id}' is that of {places[question.id]} too; ids must differ"
            )
        places[question.id] = location
        yield question
