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


def fetch(name: str | Path, kind: str, download: Callable[[str], str], remedy: str = "") -> Path:
    """Where `download`, a function of huggingface_hub, has put what a hub id names.

    Whether the cache alone is used (HF_HUB_OFFLINE, or no network) is left to huggingface_hub: it knows every
    spelling of that variable, and looks into the cache when the hub cannot be reached.

    Args:
        kind: what the name was taken for, and `remedy` what to do instead, for the message.
    Raises: InputError if neither the hub nor the cache has it.
    """
    try:
        return Path(download(str(name)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"no folder {name}, and as {kind} it cannot be fetched: {reason}{remedy}") from None
