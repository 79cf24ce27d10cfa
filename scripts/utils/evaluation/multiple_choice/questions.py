"""Questions with choices: what a row of a csv or jsonl file says, in the columns of the published benchmarks."""

from __future__ import annotations

import csv
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.records import check_encoding
from ..banks import with_own_ids

LETTERS = "ABCDEFGHIJ"
# Names of columns, whatever their case; the first is the canonical one.
COLUMNS = {
    "question": ("question", "题目", "问题"),
    "answer": ("answer", "答案"),
    "explanation": ("explanation", "解析", "解释"),
    "id": ("id", ""),  # pandas writes row numbers into a column without a name
}


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, its choices (A, B, ...) and the letter of the right one.

    Attributes:
        answer: None where the split keeps it secret.
        explanation: why it is right; empty where the file does not say.
        location: file:line.
    """

    subject: str
    id: str
    text: str
    choices: tuple[str, ...]
    answer: str | None
    explanation: str = ""
    location: str = ""

    @property
    def letters(self) -> str:
        """Those of the choices."""
        return LETTERS[: len(self.choices)]


def iter_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, record) of a csv file; all cells are text, NA and None too. Without a header: MMLU's columns.

    Raises: InputError for text that is not UTF-8, other separators, an unknown header, or a row with other columns.
    """
    header: list[str] | None = None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            line = 1
            for row in reader:
                location, line = f"{path}:{line}", reader.line_num + 1
                if not any(cell.strip() for cell in row):
                    continue
                if header is None:
                    header = [cell.strip().lower() for cell in row]
                    if set(COLUMNS["question"]) & set(header):
                        continue
                    header = _columns_without_header(row, location)
                if len(row) != len(header):
                    raise InputError(f"{location}: {len(row)} cells, need {len(header)}: {', '.join(header)}")
                yield location, dict(zip(header, row, strict=True))
    except UnicodeDecodeError as error:
        check_encoding(path)
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}:{line}: broken csv: {error}") from None


def _columns_without_header(row: Sequence[str], location: str) -> list[str]:
    """MMLU's columns for a file that begins with this row. Raises: InputError if it is a header that is not known."""
    text = ",".join(row)
    if other := next((mark for mark in ";\t|" if len(row) < 4 <= text.count(mark) + 1), None):
        raise InputError(f"{location}: the cells seem to be separated by {other!r}, need commas")
    letters = LETTERS[: max(len(row) - 2, 0)]
    if row[-1].strip().upper() not in list(letters):
        raise InputError(
            f"{location}: neither a header, which has a column {' or '.join(COLUMNS['question'])}, nor a question, A, "
            f"B, ... and the letter of the answer, as in files without a header; the cells are "
            f"{', '.join(map(repr, row)):.200}"
        )
    return ["question", *letters.lower(), "answer"]


def read_questions(
    subject: str, records: Sequence[tuple[str, Mapping[str, Any]]], secret: bool = False
) -> list[ChoiceQuestion]:
    """Questions from the records of a file; see ChoiceQuestion.

    Columns, in any case: question, A, B, ... or a list `choices` (or `options`), answer (a letter, or a number from
    0), optional id and explanation. Empty choices at the end are none. Raises: InputError naming file and line.

    Args: secret: of a split whose answers may be kept back.
    """
    rows = [(location, _canonical(record, location, secret)) for location, record in records]
    secret = secret and not any(str(row.get("answer") or "").strip() for _, row in rows)
    questions = [_read_question(subject, number, location, row, secret) for number, (location, row) in enumerate(rows)]
    return list(with_own_ids((question.location, question) for question in questions))


def _canonical(record: Mapping[str, Any], location: str, secret: bool) -> dict[str, Any]:
    """The record under the canonical names, its choices as a list of texts."""
    lowered = {str(name).strip().lower(): value for name, value in record.items()}
    row = {name: next((lowered[n] for n in names if n in lowered), None) for name, names in COLUMNS.items()}
    choices = lowered.get("choices", lowered.get("options"))
    if choices is None:
        # Up to the last column of the ten letters, so that one that is left out is seen, and all that go on from them.
        count = max((number for number, letter in enumerate(LETTERS.lower(), 1) if letter in lowered), default=0)
        while count >= len(LETTERS) and string.ascii_lowercase[count : count + 1] in lowered:
            count += 1
        choices = [lowered.get(letter) for letter in string.ascii_lowercase[:count]]
    has_answer = secret or any(name in lowered for name in COLUMNS["answer"])
    if row["question"] is None or not isinstance(choices, list) or len(choices) < 2 or not has_answer:
        raise InputError(
            f"{location}: need the columns question, A, B, ... (or a list 'choices') and answer; there are "
            f"{', '.join(map(repr, record))}"
        )
    return {**row, "choices": _read_choices(choices, location)}


def _read_choices(choices: Sequence[Any], location: str) -> list[str]:
    """The choices without empty ones at the end. Raises: InputError for an empty one before others, or too many."""
    texts = ["" if choice is None else str(choice) for choice in choices]
    while texts and not texts[-1].strip():
        texts.pop()
    if len(texts) > len(LETTERS):
        raise InputError(f"{location}: {len(texts)} choices, at most {len(LETTERS)} can be asked")
    if gaps := [letter for letter, text in zip(LETTERS, texts, strict=False) if not text.strip()]:
        raise InputError(f"{location}: choice {', '.join(gaps)} is empty, and others follow")
    if len(texts) < 2:
        raise InputError(f"{location}: {len(texts)} choices that are not empty, need at least 2")
    return texts


def _read_question(subject: str, number: int, location: str, row: Mapping[str, Any], secret: bool) -> ChoiceQuestion:
    choices = tuple(row["choices"])
    letters, answer = LETTERS[: len(choices)], row["answer"]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = letters[answer]
    answer = str("" if answer is None else answer).strip().upper()
    if not secret and (len(answer) != 1 or answer not in letters):
        raise InputError(f"{location}: the answer is '{answer}', need one of {', '.join(letters)}")
    if not str(row["question"]).strip():
        raise InputError(f"{location}: the question is empty")
    name = str(number if row["id"] in (None, "") else row["id"])
    explanation = str(row["explanation"] or "")
    return ChoiceQuestion(subject, name, str(row["question"]), choices, answer or None, explanation, location)
