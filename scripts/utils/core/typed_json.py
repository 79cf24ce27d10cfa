"""JSON values as dataclasses: what is missing, or of another type, is named with its file, field and remedy."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .errors import InputError

T = TypeVar("T")


def parse_json(kind: type[T], value: Any, where: str, remedy: str, unknown: list[str] | None = None) -> T:
    """A value of a file as a dataclass has it, those within it too.

    Args:
        where: the file, and the field within it, for errors.
        remedy: what makes the file again.
        unknown: takes the names of fields that the class does not have, which are left out.
    Raises: InputError for fields without a default that are not there, all of them, or one of another type.
    """
    parsed = _parse(kind, value, where, f"broken, or another version's: {remedy}", [] if unknown is None else unknown)
    return cast(T, parsed)


def _parse(kind: Any, value: Any, where: str, why: str, unknown: list[str]) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        kinds = [one for one in inner if one is not type(None)]
        # Of two kinds of rows the one that shares most fields, so that a row lacking one is not taken for the other.
        names = set(value) if isinstance(value, Mapping) else set()
        kind = max(kinds, key=lambda one: len(names & set(get_type_hints(one)))) if len(kinds) > 1 else kinds[0]
        return _parse(kind, value, where, why, unknown)
    if dataclasses.is_dataclass(kind):
        if missing := _missing(kind, value):
            known = ", ".join(value) if isinstance(value, Mapping) else repr(value)[:40]
            lacking = ", ".join(f"'{name}'" for name in missing)
            raise InputError(f"{where}: no {lacking}; it has {known or 'nothing'}; {why}")
        hints = get_type_hints(kind)
        unknown += [name for name in value if name not in hints]
        found = {n: _parse(hints[n], one, f"{where}, {n}", why, unknown) for n, one in value.items() if n in hints}
        return cast(Any, kind)(**found)
    # A whole number is a float too, as other writers of JSON leave out ".0"; True is an int for Python, but no number.
    plain: Any = {float: (int, float), dict: Mapping, list: (list, tuple)}.get(origin or kind, origin or kind)
    if kind is not Any and (not isinstance(value, plain) or (isinstance(value, bool) and kind is not bool)):
        raise InputError(f"{where}: got {value!r:.40}, need {getattr(kind, '__name__', kind)}; {why}")
    if origin is dict:
        return {name: _parse(inner[1], one, f"{where}, {name}", why, unknown) for name, one in value.items()}
    if origin is list:
        return [_parse(inner[0], one, f"{where}, {rank}", why, unknown) for rank, one in enumerate(value, 1)]
    return value


def _missing(kind: Any, value: Any) -> list[str]:
    """The fields without a default that are not there."""
    needed = [
        one.name
        for one in dataclasses.fields(kind)
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    return [name for name in needed if not isinstance(value, Mapping) or name not in value]
