"""A model folder, found by path or hub id, and its config.json."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import InputError
from .names import ADAPTER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Read a model's config. Raises: InputError if the folder or its config.json is absent or broken."""
    from transformers import AutoConfig

    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        adapter = " (it holds an adapter: pass the base model here)" if (path / ADAPTER_CONFIG).is_file() else ""
        raise InputError(f"{path} has no config.json, so it is no model folder{adapter}")
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the model config of {name_or_path}: {error}") from None


def local_folder(name_or_path: str) -> Path:
    """The folder of a model or adapter: itself, or the download of a hub id (safetensors, else .bin, else .pth).

    Raises: InputError if there is no such folder and the hub has (or reaches) nothing of that name.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path):
        raise InputError(f"folder not found: {name_or_path}")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        names = [] if os.environ.get("HF_HUB_OFFLINE") == "1" else HfApi().list_repo_files(name_or_path)
        kinds = ["safetensors", "bin", "pth"]  # the first that is there, others hold the same weights again
        found = next((kind for kind in kinds if any(name.endswith(f".{kind}") for name in names)), None)
        skip = [f"*.{kind}" for kind in kinds if found and kind != found]
        return Path(
            snapshot_download(
                name_or_path,
                allow_patterns=["*.json", "*.model", "*.jinja", "*.safetensors", "*.bin", "*.pth"],
                ignore_patterns=skip,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"no folder {name_or_path}, and as a hub id it cannot be fetched: {reason}") from None
