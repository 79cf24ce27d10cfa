"""What a model's files say about its answers: the tokens that end them (eos_token_id), and how they are drawn.

Folders are given as merging takes them: adapters first, the base last. Of several generation_config.json the first
counts, which is the one that merging copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.arguments import GenerationArguments
from ..core.errors import InputError
from ..core.files import read_object

GENERATION_CONFIG = "generation_config.json"
# Where a file names one of these, it means the others as transformers takes them, not as this project does.
NEUTRAL_SAMPLING: dict[str, bool | int | float] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


def find_generation_config(folders: Sequence[Path]) -> Path | None:
    """The file that counts, if there is one."""
    return next((file for folder in folders if (file := folder / GENERATION_CONFIG).is_file()), None)


def named_end_ids(folders: Sequence[Path]) -> list[int]:
    """The tokens that the base's config.json and generation_config.json name as ends of an answer.

    Raises: InputError for what is no token id.
    """
    return list(named_ends(folders))


def named_ends(folders: Sequence[Path]) -> dict[int, list[str]]:
    """The same, each with the names of the files that name it."""
    named: dict[int, list[str]] = {}
    configs = [folder / "config.json" for folder in folders[-1:]]
    for file in [*configs, find_generation_config(folders)]:
        if file is not None and file.is_file():
            content = read_object(file)
            # Models of several kinds of input have their language model's config within theirs.
            for part in (content, content.get("text_config") or {}):
                for index in _read_ids(file, part.get("eos_token_id")):
                    files = named.setdefault(index, [])
                    if file.name not in files:
                        files.append(file.name)
    return named


def named_sampling(folders: Sequence[Path]) -> dict[str, Any]:
    """Settings by the names of GenerationArguments that generation_config.json asks for; none if it names none."""
    file = find_generation_config(folders)
    if file is None:
        return {}
    return complete_sampling(read_object(file), str(file))


def complete_sampling(settings: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The settings of NEUTRAL_SAMPLING as a model's file means them, those that it does not name too; none if it names
    none of them.

    Args: place: the file, for errors.
    """
    named = {name: value for name, value in settings.items() if name in NEUTRAL_SAMPLING and value is not None}
    for name, value in named.items():
        kind = bool if name == "do_sample" else int if name == "top_k" else float
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (kind, int)):
            raise InputError(f"{place}: {name} {value!r}: need {'true or false' if kind is bool else 'a number'}")
        named[name] = kind(value)
    if "top_k" in named:
        named["top_k"] = max(named["top_k"], 0)  # -1, as some write it: from all
    try:
        GenerationArguments(**named)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    return NEUTRAL_SAMPLING | named if named else {}


def _read_ids(file: Path, value: Any) -> list[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(index) is not int for index in values):
        raise InputError(f"{file}: eos_token_id {value!r}: need a token id, a list of ids, or null")
    return [index for index in values if index >= 0]  # -1: none, in older files
