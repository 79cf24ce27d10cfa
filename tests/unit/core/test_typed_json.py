"""JSON values as dataclasses: nested ones, what is missing, of another type, or unknown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from utils.core.errors import InputError
from utils.core.typed_json import parse_json


@dataclass(frozen=True)
class Part:
    share: float
    note: str | None = None


@dataclass(frozen=True)
class Row:
    length: int
    share: float


@dataclass(frozen=True)
class Whole:
    name: str
    parts: dict[str, Part]
    rows: list[Part | Row] = field(default_factory=list)
    best: Part | None = None
    more: Any = None


def test_values_become_what_the_class_says():
    value = {
        "name": "x",
        "parts": {"a": {"share": 1}},
        "rows": [{"share": 0.5, "note": None}, {"length": 2, "share": 0.5}],
        "best": None,
        "more": [1, {"b": 2}],
    }
    expected = Whole("x", {"a": Part(1)}, [Part(0.5), Row(2, 0.5)], None, [1, {"b": 2}])
    assert parse_json(Whole, value, "file", "do it again") == expected
    assert parse_json(Whole, {"name": "x", "parts": {}}, "file", "do it again") == Whole("x", {})


def test_unknown_fields_are_collected_and_left_out():
    unknown: list[str] = []
    value = {"name": "x", "parts": {"a": {"share": 1.0, "new": 3}}, "newer": 4}
    assert parse_json(Whole, value, "file", "", unknown) == Whole("x", {"a": Part(1.0)})
    assert unknown == ["newer", "new"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "file: no 'name', 'parts'; it has []"),
        ({}, "file: no 'name', 'parts'; it has nothing"),
        ({"name": 1, "parts": {}}, "file, name: got 1, need str"),
        ({"name": "x", "parts": []}, "file, parts: got [], need dict; "),
        ({"name": "x", "parts": {"a": {"note": ""}}}, "file, parts, a: no 'share'; it has note"),
        ({"name": "x", "parts": {"a": {"share": True}}}, "file, parts, a, share: got True, need float"),
        (
            {"name": "x", "parts": {}, "rows": [{"share": 1}, {"length": 1}]},
            "file, rows, 2: no 'share'; it has length",
        ),
        ({"name": "x", "parts": {}, "rows": [None]}, "file, rows, 1: no 'share'; it has None"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place_and_remedy(value, said):
    with pytest.raises(InputError) as error:
        parse_json(Whole, value, "file", "do it again")
    assert str(error.value).startswith(said)
    assert str(error.value).endswith("; broken, or another version's: do it again")
