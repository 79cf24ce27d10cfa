"""A model folder, found by path or hub id, and its config.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..core.files import read_object
from ..core.hub import fetch, find_folder, is_hub_id, not_found
from .names import ADAPTER_CONFIG

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def folder_or_hub_id(name_or_path: str) -> str:
    """What transformers and PEFT are to open: a folder, or a hub id, which they download and record as it is."""
    # Not by way of Path: an adapter would record ./models/base as models/base, which elsewhere may be a hub id.
    return os.path.expanduser(name_or_path)


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Read a model's config. Raises: InputError if the folder or its config.json is absent or broken."""
    from transformers import AutoConfig

    path = find_folder(name_or_path)
    if path is not None and not (path / "config.json").is_file():
        adapter = " (it holds an adapter: pass the base model here)" if (path / ADAPTER_CONFIG).is_file() else ""
        raise InputError(f"{path} has no config.json, so it is no model folder{adapter}")
    if path is not None:
        read_object(path / "config.json")  # a broken file is named with its line
    if path is None and not is_hub_id(name_or_path):
        raise not_found(name_or_path, "model")
    try:
        return AutoConfig.from_pretrained(folder_or_hub_id(name_or_path))
    except Exception as error:  # whatever the class of such a model makes of the fields
        place = name_or_path if path is None else path / "config.json"
        raise InputError(f"{place}: cannot be read as a model's config: {error}") from None


def expert_count(config: PreTrainedConfig) -> int:
    """How many experts a layer has, 0 where the model is no mixture."""
    return int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)


def local_folder(name_or_path: str, kind: str = "model") -> Path:
    """The folder of a model or adapter: itself, or the download of a hub id (safetensors, else .bin, else .pth).

    Args: kind: model or adapter, for the message.
    Raises: InputError if there is no such folder and the hub has (or reaches) nothing of that name.
    """
    if folder := find_folder(name_or_path):
        return folder
    if not is_hub_id(name_or_path):
        raise not_found(name_or_path, kind)
    return fetch(name_or_path, kind, _download_model)


def _download_model(hub_id: str) -> str:
    from huggingface_hub import snapshot_download

    # The first kind of weights that is there: others hold the same ones again. Not by a list of the hub's files, which
    # there is none of without a network, though the model may be in the cache.
    for kind in ("safetensors", "bin", "pth"):
        folder = snapshot_download(hub_id, allow_patterns=["*.json", "*.model", "*.jinja", f"*.{kind}"])
        if any(Path(folder).rglob(f"*.{kind}")):
            break
    return folder


def model_of_shapes(
    config: PreTrainedConfig, auto_class: str = "AutoModelForCausalLM", dtype: torch.dtype | None = None
) -> Any:
    """The model of a config on torch's meta device: its modules and shapes, no memory.

    Args:
        auto_class: of transformers.
        dtype: of its weights; torch's default otherwise.
    Raises: InputError for a kind of model that this class does not have.
    """
    import torch
    import transformers

    # Not from_config: under ZeRO-3 that cuts the weights up as they are made, which weights without data do not stand.
    model_class: Any = getattr(transformers, auto_class)._model_mapping.get(type(config), None)
    if model_class is None:
        raise InputError(f"a model of type {config.model_type} is none that transformers' {auto_class} can make")
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype or usual)
    try:
        with torch.device("meta"):
            return model_class(config)
    finally:
        torch.set_default_dtype(usual)
