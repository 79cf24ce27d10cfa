"""Banks of questions: files in order, ids that differ, places of mistakes."""

import json
from dataclasses import dataclass

import pytest

from utils.core.errors import InputError
from utils.core.records import text_field
from utils.evaluation.banks import read_bank, with_own_ids


@dataclass(frozen=True)
class Asked:
    id: str
    text: str


def read(record, location):
    return Asked(text_field(record, "id", location), text_field(record, "question", location))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_questions_of_several_files_in_order(tmp_path):
    first = write(tmp_path / "b.jsonl", {"id": 7, "question": " one "})
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", {"id": "x", "question": "two"})
    assert read_bank([first, str(folder)], read) == [Asked("7", "one"), Asked("x", "two")]


def test_mistakes_are_named_with_their_place(tmp_path):
    path = write(tmp_path / "q.jsonl", {"id": "1", "question": "a"}, {"id": "1", "question": "b"})
    with pytest.raises(InputError, match=r"q\.jsonl:2: the id '1' is that of .*q\.jsonl:1 too; ids must differ"):
        read_bank([path], read)
    with pytest.raises(InputError, match=r"q\.jsonl:1: field 'question' is missing, need text; the record has id"):
        read_bank([write(tmp_path / "q.jsonl", {"id": "1"})], read)
    with pytest.raises(InputError, match=r"--questions .*q\.jsonl: no question in it"):
        read_bank([write(tmp_path / "q.jsonl")], read)


def test_ids_differ_wherever_questions_come_from():
    questions = [("a:1", Asked("1", "x")), ("a:2", Asked("2", "x"))]
    assert list(with_own_ids(questions)) == [question for _, question in questions]
    with pytest.raises(InputError, match="a:3: the id '2' is that of a:2 too"):
        list(with_own_ids([*questions, ("a:3", Asked("2", "y"))]))
