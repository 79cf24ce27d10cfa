"""The hub: whether a name is a folder or a hub id, and what a hub id names, downloaded or from the cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .errors import InputError


def find_folder(name: str | Path) -> Path | None:
    """The folder called `name`, None if there is none. ~ is the home folder here too: no shell reads YAML files."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None


def is_hub_id(name: str | Path) -> bool:
    """Whether a name that is no folder can be owner/name on a hub; what begins with a dot is a path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) is not None and not Path(name).exists()


def not_found(name: str | Path, kind: str) -> InputError:
    """The error for a name that is neither a folder nor a hub id.

    Args: kind: what the name was taken for: model, adapter, tokenizer.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return InputError(
            f"{name} is a GGUF file, which llama.cpp alone reads: to chat, serve or evaluate, add --engine llama.cpp; "
            "to train, merge, quantise or export, pass the model folder that it was made from"
        )
    if path.is_file():
        return InputError(f"{kind} {name} is a file; pass the folder it lies in")
    return InputError(f"{kind} folder not found: {name}; check the path, which starts at {Path.cwd()}")


def fetch(name: str | Path, kind: str, download: Callable[[str], str], remedy: str = "") -> Path:
    """Where `download`, a function of huggingface_hub, has put what a hub id names.

    Whether the cache alone is used (HF_HUB_OFFLINE, or no network) is left to huggingface_hub: it knows every
    spelling of that variable, and looks into the cache when the hub cannot be reached.

    Args:
        kind: what the name was taken for, as in not_found, and `remedy` what to do instead, for the message.
    Raises: InputError if neither the hub nor the cache has it.
    """
    try:
        return Path(download(str(name)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{kind} folder not found: {name}; as a hub id it cannot be fetched either: {reason}{remedy}"
        ) from None
