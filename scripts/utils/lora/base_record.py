"""The base record: what an adapter's folder says about the base it was trained on, and whether a base is that one."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.files import read_object, write_json
from ..text.tokenizer import has_tokenizer, load_tokenizer, tokenizer_fingerprint
from ..weights.reader import Checkpoint, open_checkpoint
from .config import AdapterConfig

logger = logging.getLogger(__name__)

BASE_RECORD = "base_model.json"
SAME_BASE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
FINGERPRINT_ELEMENTS = 2048


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of the names, shapes, types and first values of all tensors, in hexadecimal.

    The same for the same weights in other shards or file formats; reads some megabytes of any model.
    """
    digest = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
        digest.update(checkpoint.read_start(name, FINGERPRINT_ELEMENTS))
    return digest.hexdigest()


def _describe(base: Path, checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": {name: config[name] for name in SAME_BASE if name in config},
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in checkpoint.tensors.values()}),
        "weights": weights_fingerprint(checkpoint),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(base)) if has_tokenizer(base) else None,
    }


def record_base(adapter: str | Path, base: str | Path) -> None:
    """Write base_model.json into an adapter's folder, if the base is a local folder with weights."""
    base = Path(base)
    if (base / "config.json").is_file():
        with open_checkpoint(base) as checkpoint:
            description = _describe(base, checkpoint, read_object(base / "config.json"))
        write_json(Path(adapter) / BASE_RECORD, {"folder": str(base), **description})


def check_base(
    adapter: AdapterConfig, base: Path, checkpoint: Checkpoint, config: dict[str, Any], first: bool
) -> None:
    """Compare a base with what an adapter's folder says about its own.

    Args:
        config: the content of the base's config.json.
        first: the adapter was trained on this base itself, not on one with other adapters merged in.
    Raises: InputError if they are other models. Where the folder says too little, that is logged.
    """
    architecture = next(iter(config.get("architectures") or ()), None)
    recorded = Path(adapter.base_model_name_or_path)
    if adapter.base_model_class and architecture and adapter.base_model_class != architecture:
        raise InputError(
            f"adapter {adapter.folder} was trained on a {adapter.base_model_class}, {base} is a {architecture}; "
            f"pass its own base, recorded as {recorded}"
        )
    record = read_object(adapter.folder / BASE_RECORD) if (adapter.folder / BASE_RECORD).is_file() else {}
    theirs = record.get("config")
    if theirs is None and adapter.base_model_name_or_path and (recorded / "config.json").is_file():
        theirs = read_object(recorded / "config.json")
    for name in SAME_BASE:
        if theirs and name in theirs and name in config and theirs[name] != config[name]:
            raise InputError(
                f"adapter {adapter.folder} was trained on {recorded} ({name} {theirs[name]}), "
                f"{base} has {config[name]}; every adapter belongs to its own base"
            )
    if not first:
        return
    if record.get("weights"):
        _check_fingerprints(adapter, record, base, _describe(base, checkpoint, config))
    else:
        # No record of its weights: it was trained elsewhere.
        differ = adapter.base_model_name_or_path and recorded.name != base.name
        logger.log(
            logging.WARNING if differ else logging.INFO,
            "adapter %s does not say which weights it was trained on (its config names %s); on %s it is right only "
            "if these are the same",
            *(adapter.folder, adapter.base_model_name_or_path or "no model", base),
        )


def _check_fingerprints(adapter: AdapterConfig, record: dict[str, Any], base: Path, ours: dict[str, Any]) -> None:
    trained_on = f"adapter {adapter.folder} was trained on {record.get('folder')}"
    if record["weights"] != ours["weights"]:
        if record.get("dtypes") == ours["dtypes"]:
            raise InputError(
                f"{trained_on}, whose weights are not those of {base} although the sizes agree; pass the model it was "
                f"trained on (or remove {adapter.folder / BASE_RECORD} if you know better)"
            )
        logger.warning(
            "%s in %s, %s is in %s: whether the weights are the same cannot be checked",
            *(trained_on, "/".join(record.get("dtypes", ["?"])), base, "/".join(ours["dtypes"])),
        )
    if record.get("tokenizer") and ours["tokenizer"] and record["tokenizer"] != ours["tokenizer"]:
        logger.warning("%s with another tokenizer in the base's folder than %s has", trained_on, base)
