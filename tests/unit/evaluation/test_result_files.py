"""Result files: written as they are, checked against the classes that the report reads them by."""

import json
import re

import pytest

from support import fake_results as fake
from utils.core.errors import InputError
from utils.evaluation import result_files
from utils.evaluation.result_files import (
    KINDS,
    AlignmentResult,
    ArenaResult,
    DocumentRow,
    LengthRow,
    read_result,
    read_result_of,
    write_result,
)

RECORDS = [
    fake.multiple_choice(),
    fake.longbench(),
    fake.perplexity(),
    fake.curve(),
    {"kind": "alignment", **fake.alignment()},
    fake.arena(),
    fake.answers(),
]
assert set(KINDS) == {record["kind"] for record in RECORDS}


@pytest.mark.parametrize("record", RECORDS)
def test_what_is_written_is_the_record_and_is_read_as_its_kind(tmp_path, record):
    path = tmp_path / "result.json"
    write_result(path, record)
    assert list(json.loads(path.read_text(encoding="utf-8")).items()) == list(record.items())
    result = read_result(path)
    assert type(result) is KINDS[record["kind"]] and result.settings == record["settings"]


def test_parts_have_types_too(tmp_path):
    path = tmp_path / "result.json"
    write_result(path, fake.perplexity())
    assert {type(row) for row in read_result(path).rows} == {DocumentRow}
    write_result(path, fake.curve())
    assert {type(row) for row in read_result(path).rows} == {LengthRow}
    write_result(path, fake.arena())
    arena = read_result_of(ArenaResult, path)
    assert arena.models[0].percent == (75.0, [20.0, 90.0]) and arena.pairs[1].models == ["y", "z"]
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: kind 'arena'; need alignment"):
        read_result_of(AlignmentResult, path)


def test_a_writer_that_forgets_the_classes_fails_its_tests_and_loses_nothing(tmp_path, monkeypatch):
    """The fixture good_result_files fails a test whose script writes such a file; here the log is looked at itself."""
    path, said = tmp_path / "result.json", []
    monkeypatch.setattr(result_files.logger, "error", lambda text, mistake: said.append(mistake))
    write_result(path, fake.arena() | {"speed": 1})
    assert json.loads(path.read_text(encoding="utf-8"))["speed"] == 1
    assert len(said) == 1 and "speed is not in result_files.py" in said[0]
    write_result(path, {name: value for name, value in fake.arena().items() if name != "votes"})
    assert len(said) == 2 and "no 'votes'" in said[1]
    write_result(path, fake.arena())
    assert len(said) == 2


def test_values_of_another_type_are_named(tmp_path):
    path = tmp_path / "result.json"
    for key, value, said in (
        ("battles", "13", "battles: got '13', need int"),
        ("battles", True, "battles: got True, need int"),
        ("models", {"x": 1}, "models: got {'x': 1}, need list"),
        ("pairs", [3], "pairs, 1: no 'models', 'battles', 'win_rate', 'win_rate_interval'; it has 3"),
    ):
        path.write_text(json.dumps(fake.arena() | {key: value}), encoding="utf-8")
        with pytest.raises(InputError, match=re.escape(f"{path}, {said}") + ".*: run arena.py --report again"):
            read_result(path)
