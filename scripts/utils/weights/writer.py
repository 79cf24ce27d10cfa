"""Shards: which safetensors files a model's tensors go into, and writing them from a stream."""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import HashName, write_json
from .reader import DTYPE_NAMES, SAFETENSORS, SAFETENSORS_INDEX, TensorSpec
from .streams import Digest, FileWriter


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 200MB or 1GiB. Raises: InputError."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = int(float(match[1]) * units[match[2].upper()]) if match and match[2].upper() in units else 0
    if size < 1:
        raise InputError(f"'{text}' is no size; need a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB")
    return size


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """{file name: tensors in writing order}: filled in the given order; a larger tensor has a shard of its own."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(spec)
        room -= spec.num_bytes
    for shard in shards:
        ends = itertools.accumulate((spec.num_bytes for spec in shard), initial=0)
        if any(end % spec.dtype.itemsize for end, spec in zip(ends, shard, strict=False)):
            shard.sort(key=lambda spec: -spec.dtype.itemsize)  # wide types first keeps every tensor aligned; stable
    count = len(shards)
    names = [SAFETENSORS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return dict(zip(names, shards, strict=True))


def safetensors_header(specs: Sequence[TensorSpec]) -> bytes:
    """The bytes before the data of a safetensors file that holds `specs` in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_shard(
    path: Path,
    specs: Sequence[TensorSpec],
    blocks: Iterator[tuple[TensorSpec, Tensor]],
    kind: HashName | None = "sha256",
) -> Digest:
    """Write one safetensors file. Returns: its hash of this kind.

    Args:
        blocks: (spec, values) of these tensors in this order, each cut anywhere, in the spec's type; what follows
            belongs to the next file and is left in the iterator.
    Raises: OSError naming the file.
    """
    expected = sum(spec.num_bytes for spec in specs)
    written = 0
    with FileWriter(path, kind) as file:
        file.write(safetensors_header(specs))
        while written < expected:
            spec, block = next(blocks)
            assert block.dtype == spec.dtype, f"{spec.name}: {block.dtype} instead of {spec.dtype}"
            file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy())
            written += block.nbytes
        assert written == expected, f"{path.name}: {written} of {expected} bytes"
    return file.digest


def write_index(folder: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    """Write model.safetensors.index.json, if there are several shards."""
    if len(shards) < 2:
        return
    everything = [spec for specs in shards.values() for spec in specs]
    metadata = {
        "total_size": sum(spec.num_bytes for spec in everything),
        "total_parameters": sum(math.prod(spec.shape) for spec in everything),
    }
    weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
    write_json(folder / SAFETENSORS_INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
