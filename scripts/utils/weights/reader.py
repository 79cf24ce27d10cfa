"""Checkpoints: safetensors and .bin weights read tensor by tensor, in bounded memory.

Files are read with pread: pages of a memory-mapped file would count into the process's memory, these do not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import read_object
from ..core.hub import find_folder, not_found
from .names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EMBEDDING, HEAD, INNER_MODEL, SCORE
from .streams import WINDOW, FileHasher

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
BLOCK_BYTES = 4 << 20  # bytes of one tensor handled at a time: fits caches, keeps memory flat
# What DistributedDataParallel and torch.compile put before the names of the model that they wrap.
WRAPPERS = ("module.", "_orig_mod.")
MIN_BLOCK_ROWS = 128  # products of smaller row blocks are not bit-equal to the whole product

# https://github.com/huggingface/safetensors#format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as a file describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor and where it lies: `offset` bytes into `file`, or in a file that must be loaded whole (offset None)."""

    file: Path
    offset: int | None


# ---------------------------------------------------------------- reading headers


def _read_safetensors_header(path: Path) -> list[TensorInfo]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise InputError(f"{path} is a git-lfs pointer, not the weights; run: git lfs pull")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:  # else a damaged length would ask for any amount of memory
            raise InputError(
                f"{path} is truncated or no safetensors file: {size} bytes, less than its header needs; copy it again"
            )
        text = file.read(length)
    infos = []
    end = 0
    for begin, stop, name, kind, shape in _header_entries(path, text):
        if kind not in DTYPES:
            raise InputError(f"{path}: tensor {name} has type {kind}, which cannot be read here")
        info = TensorInfo(name, DTYPES[kind], shape, path, 8 + length + begin)
        # The format has no gaps and no overlaps: a wrong offset would be read as plausible numbers.
        if begin != end or stop - begin != info.num_bytes:
            raise InputError(f"{path} is corrupted: its header is wrong about the size of {name}; copy it again")
        end = stop
        infos.append(info)
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "corrupted"
        raise InputError(f"{path} is {state}: it has {size} bytes, its header needs {8 + length + end}; copy it again")
    return infos


def _header_entries(path: Path, text: bytes) -> list[tuple[int, int, str, str, tuple[int, ...]]]:
    """(begin, end, name, type, shape) of every tensor, in the order of the file."""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = []
        for name, value in header.items():
            begin, stop = value["data_offsets"]
            numbers = [begin, stop, *value["shape"]]
            if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(
                value["dtype"], str
            ):
                raise ValueError(name)
            entries.append((begin, stop, name, value["dtype"], tuple(value["shape"])))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is corrupted: its safetensors header cannot be read; copy it again") from None
    return sorted(entries)


def load_bin(path: Path, **kwargs: Any) -> dict[str, Tensor]:
    """torch.load that never runs code from the file. Raises: InputError naming the file."""
    try:
        weights = torch.load(path, weights_only=True, **kwargs)
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds Python objects besides weights, which may run code; refused") from None
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(f"{path} is truncated or corrupted ({reason}); copy it again") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} is no state dict: need names and tensors only")
    return weights


def read_bin_header(path: Path) -> list[TensorInfo]:
    infos = []
    for name, tensor in load_bin(path, map_location="meta").items():
        # torch notes where a storage's bytes stand in the (uncompressed) zip; its old format has no such offsets.
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        offset = None
        if start is not None and tensor.is_contiguous():
            offset = start + tensor.storage_offset() * tensor.dtype.itemsize
        infos.append(TensorInfo(name, tensor.dtype, tuple(tensor.shape), path, offset))
    size = path.stat().st_size
    if any(info.offset is not None and info.offset + info.num_bytes > size for info in infos):
        raise InputError(f"{path} is truncated: it has {size} bytes, fewer than its tensors need; copy it again")
    return sorted(infos, key=lambda info: info.offset or 0)  # from front to back


def _weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """The weight files of a model or adapter folder, safetensors first, and the index that names them.

    Raises: InputError if there are none, or the index or the shards' own numbering names one that is missing.
    """
    adapter = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
    if adapter and (folder / ADAPTER_CONFIG).is_file():
        return adapter[:1], None
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (BIN, BIN_INDEX)):
        if (folder / index).is_file():
            names = sorted(set(_weight_map(folder / index).values()))
            if single not in names and (folder / single).is_file():
                raise InputError(
                    f"{folder} holds {single} and {index}: the weights stand there twice; remove the stale ones"
                )
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise InputError(
                    f"{folder / index} names files that are missing: {', '.join(missing)}; download them again"
                )
            return [folder / name for name in names], folder / index
        if (folder / single).is_file():
            return [folder / single], None
        shards = sorted(folder.glob(single.replace(".", "-*-of-*.")))
        if shards:
            count = int(re.findall(r"\d+", shards[0].stem)[-1])
            if len(shards) != count:
                raise InputError(f"{folder} holds {len(shards)} of {count} weight files; download the others")
            return shards, None
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{folder} has an {ADAPTER_CONFIG} but no {' or '.join(ADAPTER_WEIGHTS)}")
    raise InputError(f"no weights in {folder}: need {SAFETENSORS} or {BIN}, or shards of them")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map; download it again")
    if strange := [name for name in weight_map.values() if Path(str(name)).name != name]:
        raise InputError(f"{index} names {strange[0]}, which is not a file of this folder")
    return weight_map


# ---------------------------------------------------------------- reading tensors


class Checkpoint:
    """The tensors of a folder. Files are opened at the first read; `close()`, or use it in a `with` statement.

    Attributes:
        wrapper: stands before every name in the files, and is left off here.
        inner: the files are of the model below its head (LlamaModel): their names lack the "model." of these here.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo], wrapper: str = "", inner: bool = False):
        self.folder = folder
        self.tensors = tensors
        self.wrapper, self.inner = wrapper, inner
        self._descriptors: dict[Path, int] = {}
        self._whole: tuple[Path, dict[str, Tensor]] | None = None
        self._dropped: dict[Path, int] = {}  # bytes of a file that were told to leave the page cache
        self._lock = threading.Lock()  # tensors are read from several threads

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the files."""
        return self.wrapper + (name.removeprefix(INNER_MODEL) if self.inner else name)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors, self._whole = {}, None

    def read(self, name: str) -> Tensor:
        """One tensor, in its own type, in memory of its own."""
        info = self.tensors[name]
        return self._read_elements(info, 0, math.prod(info.shape)).reshape(info.shape)

    def read_start(self, name: str, count: int) -> memoryview:
        """The bytes of the first `count` elements of one tensor, or of all there are."""
        info = self.tensors[name]
        return self._read_elements(info, 0, min(count, math.prod(info.shape))).view(torch.uint8).numpy().data

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of one tensor as a matrix, see `row_shape`; of a vector, the elements."""
        info = self.tensors[name]
        _, width = row_shape(info.shape)
        rows = self._read_elements(info, start * width, stop * width)
        return rows.reshape(stop - start, width) if len(info.shape) > 1 else rows

    def _read_elements(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        if info.offset is None:
            return self._read_whole_file(info.file)[self.stored_name(info.name)].reshape(-1)[start:stop].clone()
        descriptor = self._descriptor(info.file)
        size = info.dtype.itemsize
        data = torch.empty((stop - start) * size, dtype=torch.uint8)
        view, position = memoryview(data.numpy()), info.offset + start * size
        done = 0
        while done < len(view):  # Linux reads at most 2 GiB at a time
            count = os.preadv(descriptor, [view[done:]], position + done)
            if count == 0:
                raise InputError(f"{info.file} ended while {info.name} was read; it was changed or truncated")
            done += count
        return data.view(info.dtype)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def _read_whole_file(self, path: Path) -> dict[str, Tensor]:
        # Only for .bin files of torch < 1.6 and tensors saved as views; one file is kept at a time.
        with self._lock:
            if self._whole is None or self._whole[0] != path:
                self._whole = None
                self._whole = (path, load_bin(path, map_location="cpu"))
            return self._whole[1]

    def scan_rows(self, name: str, start: int, stop: int, hasher: FileHasher | None = None) -> Tensor:
        """`read_rows` of a large file read once from front to back: hashed, and not kept in the page cache."""
        rows = self.read_rows(name, start, stop)
        info = self.tensors[name]
        if info.offset is not None:
            offset = info.offset + start * row_shape(info.shape)[1] * info.dtype.itemsize
            if hasher is not None:
                hasher.update(info.file, offset, rows.reshape(-1).view(torch.uint8).numpy())
            # Now and then, not for every block: a call walks through all pages that the file has in the cache.
            if offset - self._dropped.get(info.file, 0) > WINDOW:
                os.posix_fadvise(self._descriptor(info.file), 0, offset, os.POSIX_FADV_DONTNEED)
                self._dropped[info.file] = offset
        return rows

    @property
    def files(self) -> list[Path]:
        """The weight files, in the order their tensors are listed."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the headers of a model's or an adapter's weights, and check them against the files' sizes.

    Raises: InputError naming the file that is missing, truncated or corrupted.
    """
    found = find_folder(folder)
    if found is None:
        raise not_found(folder, "model")
    files, index = _weight_files(found)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_bin_header(file) if file.suffix == ".bin" else _read_safetensors_header(file):
            if info.name in tensors:
                raise InputError(
                    f"{info.name} stands in {tensors[info.name].file} and in {file}; remove the stale file"
                )
            tensors[info.name] = info
    if index is not None and (missing := sorted(_weight_map(index).keys() - tensors.keys())):
        raise InputError(
            f"{index} names {len(missing)} tensors that no file holds, first {missing[0]}; download again"
        )
    wrapper = next((w for w in WRAPPERS if all(name.startswith(w) for name in tensors)), "") if tensors else ""
    if wrapper:
        tensors = _renamed(tensors, lambda name: name.removeprefix(wrapper))
    # As transformers reads it, too.
    inner = EMBEDDING not in tensors and EMBEDDING.removeprefix(INNER_MODEL) in tensors
    if inner:
        tensors = _renamed(tensors, lambda name: name if name in (HEAD, SCORE) else INNER_MODEL + name)
    return Checkpoint(found, tensors, wrapper, inner)


def _renamed(tensors: dict[str, TensorInfo], rename: Callable[[str], str]) -> dict[str, TensorInfo]:
    return {(name := rename(old)): dataclasses.replace(info, name=name) for old, info in tensors.items()}


# ---------------------------------------------------------------- row blocks


def row_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a tensor as it is cut into row blocks: the last dimension is a row, a vector has width 1."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def row_blocks(shape: Sequence[int], itemsize: int = 4) -> Iterator[tuple[int, int]]:
    """Cut a tensor into (start, stop) row blocks of about BLOCK_BYTES, never under MIN_BLOCK_ROWS but for the last.

    A block never holds rows of two matrices of a stack, as fused experts are.
    """
    rows, width = row_shape(shape)
    height = shape[-2] if len(shape) > 2 else rows
    step = max(MIN_BLOCK_ROWS, BLOCK_BYTES // max(1, width * itemsize) // 64 * 64)
    for first in range(0, rows, max(1, height)):
        for start, stop in _even_blocks(height, step):
            yield first + start, first + stop


def _even_blocks(rows: int, step: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < rows:
        # A short rest joins the last block: products of few rows are not bit-equal to the whole product.
        stop = rows if rows - start - step < MIN_BLOCK_ROWS // 2 else start + step
        yield start, stop
        start = stop
