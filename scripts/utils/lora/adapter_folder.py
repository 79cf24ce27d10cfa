"""An adapter's folder: read against the base it is used on, and opened by PEFT whatever PEFT wrote it."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..core.errors import InputError
from ..core.files import read_object
from ..weights.config import local_folder
from ..weights.model_folder import ModelFolder
from ..weights.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMBEDDING, HEAD, SCORE
from ..weights.reader import Checkpoint, open_checkpoint
from .base_record import check_base
from .config import AdapterConfig, load_adapter_config
from .updates import Replace, Update, peft_spelling, plan_updates


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter that belongs to a base.

    Attributes:
        checkpoint: the headers of its weights.
        updates: what it does to which weight of the base.
        rows: of the embeddings with the adapter; None for models that call them otherwise.
    """

    config: AdapterConfig
    checkpoint: Checkpoint
    updates: dict[str, list[Update]]
    rows: int | None


def read_adapter(name_or_path: str, base: ModelFolder, reward_model: bool = False) -> AdapterFolder:
    """Read an adapter, but for the numbers of its weights.

    Args: reward_model: it may bring a score head.
    Raises: InputError if it is damaged, was trained on other weights than this base's, or does not fit its shapes.
    """
    folder = local_folder(name_or_path, "adapter")
    config, checkpoint = load_adapter_config(folder), open_checkpoint(folder)
    with base.checkpoint:  # its first values are read
        check_base(config, base.folder, base.checkpoint, read_object(base.folder / "config.json"), first=True)
    shapes, tensors = dict(base.shapes), checkpoint.shapes
    # A tied model's files have no lm_head, which an adapter may still be for.
    if base.config.tie_word_embeddings and EMBEDDING in shapes:
        shapes.setdefault(HEAD, shapes[EMBEDDING])
    if reward_model and (score := next((name for name in tensors if name.endswith(f".{SCORE}")), None)):
        shapes.setdefault(SCORE, tensors[score])
    updates = plan_updates(config, tensors, shapes)
    rows = {
        name: next((tensors[u.source][0] for u in updates.get(name, ()) if isinstance(u, Replace)), shapes[name][0])
        for name in (EMBEDDING, HEAD)
        if name in shapes
    }
    if len(set(rows.values())) > 1 and not reward_model:
        raise InputError(f"adapter {folder}: embed_tokens and lm_head get different rows {rows}; train both")
    return AdapterFolder(config, checkpoint, updates, rows.get(EMBEDDING))


def names_experts(name_or_path: str, otherwise: bool = False) -> bool:
    """Whether an adapter names experts one by one (experts.3.w1), or a mixture's router alone, as linear layers have
    them; not where PEFT adapted the stacks of transformers 5, which it then says in target_parameters.

    Args: otherwise: the answer where an adapter has nothing for experts and routers.
    """
    folder = local_folder(name_or_path, "adapter")
    if load_adapter_config(folder).target_parameters:
        return False
    names = open_checkpoint(folder).tensors
    return any(re.search(r"\.experts\.\d+\.|\.gate\.lora_", name) for name in names) or otherwise


def load_with_peft(model: Any, adapters: Mapping[str, str], **settings: Any) -> Any:
    """A PeftModel around a model, with adapters by name.

    Args: settings: for PEFT, as from_pretrained and load_adapter both have them.
    """
    from peft import PeftModel

    (first, folder), *others = adapters.items()
    with _loadable(folder) as found:
        wrapped = PeftModel.from_pretrained(model, str(found), adapter_name=first, **settings)
    for name, folder in others:
        with _loadable(folder) as found:
            wrapped.load_adapter(str(found), adapter_name=name, **settings)
    return wrapped


@contextlib.contextmanager
def _loadable(name_or_path: str) -> Iterator[Path]:
    """A folder that PEFT loads: the adapter's own, or a copy of it with the names of today."""
    folder = local_folder(name_or_path, "adapter")
    with open_checkpoint(folder) as checkpoint:
        names = peft_spelling(checkpoint.tensors)
        if names.keys() <= checkpoint.tensors.keys():  # others are left aside by PEFT
            yield folder
            return
        with tempfile.TemporaryDirectory() as copy:
            shutil.copyfile(folder / ADAPTER_CONFIG, Path(copy) / ADAPTER_CONFIG)
            weights = {name: checkpoint.read(old) for name, old in names.items()}
            save_file(weights, Path(copy) / ADAPTER_WEIGHTS[0], {"format": "pt"})
            del weights
            yield Path(copy)
