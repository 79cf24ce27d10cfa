"""Meta files: a Llama model streamed into consolidated.NN.pth and params.json, hashed on the way.

A consolidated.NN.pth is what torch.save writes: a zip of a pickle, which names tensors and the records that hold their
values, and the records, uncompressed. Python's zipfile writes it from front to back, checksums after the data; every
record begins at a multiple of 64 bytes, as torch has it. rope.freqs is left out: the forerunners' files have none,
Meta's and everybody's code computes it, and Meta's Llama 3 code refuses it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import HashName, write_json
from .meta_reader import (
    LLAMA3_ROPE,
    LLAMA3_THETA,
    LLAMA_THETA,
    PARAMS,
    LlamaSizes,
    MetaWeight,
    scaled_rope_factor,
    to_meta_rows,
)
from .names import EMBEDDING, HEAD
from .reader import TensorSpec, row_shape
from .streams import Digest, FileWriter

logger = logging.getLogger(__name__)

PARTS_OF_DIM = {4096: 1, 5120: 2, 6656: 4, 8192: 8}  # 7B, 13B, 33B, 65B and 70B as Meta publishes them
# (multiple_of, ffn_dim_multiplier) of the published models
PUBLISHED_FFN = ((256, None), (256, 1.5), (4096, 1.3), (1024, 1.3), (4096, 1.2))
STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
ALIGNMENT = 64
Stream = Callable[[Sequence[TensorSpec]], Iterator[tuple[TensorSpec, Tensor]]]


@dataclass(frozen=True)
class PlannedWeight:
    """A weight in the order of writing: where its values come from, and how many rows or columns each part gets."""

    weight: MetaWeight
    source: TensorSpec
    widths: tuple[int, ...]  # along weight.split

    def spec(self, part: int) -> TensorSpec:
        shape = list(self.weight.shape)
        if self.weight.split is not None:
            shape[self.weight.split] = self.widths[part]
        return TensorSpec(self.weight.meta, self.source.dtype, tuple(shape))


@dataclass(frozen=True)
class MetaPlan:
    """What is to be written."""

    params: dict[str, Any]
    num_parts: int
    head_dim: int
    weights: list[PlannedWeight]


# ---------------------------------------------------------------- planning


def plan_meta_checkpoint(
    config: dict[str, Any], specs: Sequence[TensorSpec], num_parts: int | None = None
) -> MetaPlan:
    """Check that a model can be written in Meta's layout, and how.

    Args:
        config: the content of the model's config.json.
        specs: its tensors under Hugging Face's names.
        num_parts: default: as many as Meta's models of this dim have, 1 for other sizes.
    Raises: InputError naming the setting or tensor that the layout cannot hold.
    """
    from transformers import AutoConfig

    model = AutoConfig.for_model(**config)
    _refuse_other_models(model)
    sizes = LlamaSizes(
        dim=model.hidden_size,
        layers=model.num_hidden_layers,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        ffn=model.intermediate_size,
        vocab=model.vocab_size,
    )
    parts = PARTS_OF_DIM.get(sizes.dim, 1) if num_parts is None else num_parts
    _check_parts(sizes, parts)
    rope = model.rope_parameters
    like_llama3 = rope["rope_theta"] == LLAMA3_THETA
    params = {
        "dim": sizes.dim,
        **ffn_settings(sizes.dim, sizes.ffn),
        "n_heads": sizes.heads,
        **({"n_kv_heads": sizes.kv_heads} if sizes.kv_heads != sizes.heads else {}),
        "n_layers": sizes.layers,
        "norm_eps": model.rms_norm_eps,
        # Meta's code for Llama 1 and 2 takes the size from the tokenizer, that for Llama 3 compares them.
        "vocab_size": sizes.vocab if like_llama3 else -1,
        **_rope_settings(rope, sizes.dim),
    }
    weights = {weight.name: weight for weight in sizes.weights(vocab_split=0 if like_llama3 else 1)}
    return MetaPlan(params, parts, sizes.head_dim, _order_weights(weights, specs, model.tie_word_embeddings, parts))


def _refuse_other_models(model: Any) -> None:
    kind = model.model_type
    if kind != "llama" and not (kind == "mistral" and model.sliding_window is None):
        window = f" with sliding_window {model.sliding_window}" if kind == "mistral" else ""
        raise InputError(
            f"--output_type pth holds Llama models only, this is a {kind} model{window}; use --output_type huggingface"
        )
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    found = [name for name in ("attention_bias", "mlp_bias") if getattr(model, name, False)]
    found += [f"hidden_act {model.hidden_act}"] if model.hidden_act != "silu" else []
    found += [f"head_dim {head_dim}"] if head_dim * model.num_attention_heads != model.hidden_size else []
    if found:
        raise InputError(
            f"Meta's pth layout cannot hold a model with {', '.join(found)}; use --output_type huggingface"
        )


def _check_parts(sizes: LlamaSizes, parts: int) -> None:
    counts = {
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "intermediate_size": sizes.ffn,
        "hidden_size": sizes.dim,
    }
    if parts < 1:
        raise InputError(f"cannot write {parts} parts: need at least 1")
    if uneven := [f"{name} {count}" for name, count in counts.items() if count % parts]:
        raise InputError(
            f"cannot write {parts} parts, among which {', '.join(uneven)} cannot be shared out evenly; pass another "
            "--num_parts"
        )


def _rope_settings(rope: dict[str, Any], dim: int) -> dict[str, Any]:
    """The settings of params.json that say what transformers' rope_parameters say."""
    kind = rope["rope_type"]
    scaled = kind == "llama3" and all(rope.get(name) == value for name, value in LLAMA3_ROPE.items())
    if kind != "default" and not scaled:
        values = ", ".join(f"{name} {value}" for name, value in rope.items() if name != "rope_type")
        raise InputError(
            f"Meta's params.json cannot say that positions are scaled by rope_type {kind} ({values}): the model would "
            "be read without it; use --output_type huggingface"
        )
    settings = {} if rope["rope_theta"] == LLAMA_THETA else {"rope_theta": rope["rope_theta"]}
    if scaled:
        settings["use_scaled_rope"] = True
        if rope["factor"] != scaled_rope_factor(dim):
            settings["rope_scaling_factor"] = rope["factor"]
    return settings


def ffn_settings(dim: int, ffn: int) -> dict[str, Any]:
    """multiple_of and ffn_dim_multiplier from which Meta's code computes the intermediate size `ffn`."""
    multiple = min(ffn & -ffn, 256)  # the largest power of two that divides it
    # The middle of what is rounded up to ffn, with ever more decimals.
    middle = (ffn - multiple / 2 + 1) / int(8 * dim / 3)
    candidates: list[tuple[int, float | None]] = [*PUBLISHED_FFN, (multiple, None)]
    candidates += [(multiple, round(middle, digits)) for digits in range(1, 16)]
    for multiple_of, multiplier in candidates:
        if _meta_ffn(dim, multiple_of, multiplier) == ffn:
            return {"multiple_of": multiple_of} | ({} if multiplier is None else {"ffn_dim_multiplier": multiplier})
    raise InputError(f"Meta's params.json cannot say intermediate_size {ffn} for hidden_size {dim}")


def _meta_ffn(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Source: FeedForward in https://github.com/meta-llama/llama/blob/main/llama/model.py."""
    size = int(8 * dim / 3)
    size = size if multiplier is None else int(multiplier * size)
    return math.ceil(size / multiple_of) * multiple_of


def _order_weights(
    weights: dict[str, MetaWeight], specs: Sequence[TensorSpec], tied: bool, parts: int
) -> list[PlannedWeight]:
    """The weights in the order of `specs`; a tied head follows its embedding."""
    given = {spec.name: spec for spec in specs if not spec.name.endswith("rotary_emb.inv_freq")}
    if len(given) < len(specs):
        logger.info("%d tensors rotary_emb.inv_freq are left out: they are computed", len(specs) - len(given))
    if unknown := sorted(given.keys() - weights.keys()):
        raise InputError(
            f"Meta's pth layout has no place for {len(unknown)} tensors of this model, first {unknown[0]}; use "
            "--output_type huggingface"
        )
    planned = []
    for spec in given.values():
        planned.append(_plan_weight(weights[spec.name], spec, parts))
        if spec.name == EMBEDDING and HEAD not in given and tied:
            logger.info("lm_head is tied to embed_tokens: output.weight is written as its copy")
            planned.append(_plan_weight(weights[HEAD], spec, parts))
    if missing := sorted(weights.keys() - {item.weight.name for item in planned}):
        raise InputError(f"the model lacks {len(missing)} tensors that its config needs, first {missing[0]}")
    return planned


def _plan_weight(weight: MetaWeight, spec: TensorSpec, parts: int) -> PlannedWeight:
    if spec.shape != weight.shape:
        raise InputError(f"{spec.name} is {[*spec.shape]}, but config.json needs {[*weight.shape]}")
    if spec.dtype not in STORAGES:
        raise InputError(
            f"{spec.name} is {str(spec.dtype).removeprefix('torch.')}; Meta's pth layout is written in float16, "
            "bfloat16 or float32: pass one as --dtype"
        )
    total = weight.shape[weight.split or 0]
    # Only the vocabulary may be uneven: the last part has what remains.
    widths = [total // parts] * (parts - 1) + [total - total // parts * (parts - 1)]
    return PlannedWeight(weight, spec, tuple(widths) if weight.split is not None else (total,) * parts)


# ---------------------------------------------------------------- writing


def write_meta_checkpoint(
    folder: str | Path,
    config: dict[str, Any],
    specs: Sequence[TensorSpec],
    stream: Stream,
    num_parts: int | None = None,
    kind: HashName | None = "sha256",
) -> dict[str, Digest]:
    """Write params.json and consolidated.NN.pth; arguments and errors are those of `plan_meta_checkpoint`.

    Args:
        stream: gives (spec, row block) for all blocks of all tensors it is asked for, in order.
        kind: which hash is taken of the files.
    Returns: {file name: its hash}.
    """
    plan = plan_meta_checkpoint(config, specs, num_parts)
    folder = Path(folder)
    write_json(folder / PARAMS, plan.params)
    with contextlib.ExitStack() as stack:
        parts = [
            stack.enter_context(
                _open_part(folder / f"consolidated.{part:02d}.pth", [item.spec(part) for item in plan.weights], kind)
            )
            for part in range(plan.num_parts)
        ]
        blocks = (block for _, block in stream([item.source for item in plan.weights]))
        for number, item in enumerate(plan.weights):
            with contextlib.ExitStack() as records:
                outputs = [records.enter_context(part.record(f"data/{number}")) for part in parts]
                for pieces in _cut(item, plan.head_dim, blocks):
                    for output, piece in zip(outputs, pieces, strict=True):
                        output.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy())
        assert next(blocks, None) is None, "more blocks than asked for"
    return {part.writer.path.name: part.writer.digest for part in parts}


def _cut(item: PlannedWeight, head_dim: int, blocks: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    """Take the blocks of one weight; of each, what every part gets of it (maybe nothing)."""
    weight, done = item.weight, 0
    total, _ = row_shape(weight.shape)
    held: list[Tensor] = []  # the first rows of a head, until the others come
    while done < total:
        block = next(blocks)
        if weight.rotary:
            block = torch.cat([*held, block])
            whole = len(block) // head_dim * head_dim
            block, held = to_meta_rows(block[:whole], head_dim), [block[whole:]]
        if weight.split is None:
            yield [block] * len(item.widths)
        elif weight.split == 1:
            yield list(block.split(item.widths, dim=1))
        else:
            yield _cut_rows(block, done, item.widths)
        done += len(block)


def _cut_rows(block: Tensor, start: int, widths: Sequence[int]) -> list[Tensor]:
    """Of rows that begin at row `start`, those of every part."""
    pieces, begin = [], -start
    for width in widths:
        pieces.append(block[max(begin, 0) : max(begin + width, 0)])
        begin += width
    return pieces


@dataclass
class _Part:
    """One consolidated.NN.pth, its records written one after the other."""

    writer: FileWriter
    archive: zipfile.ZipFile

    def record(self, name: str) -> Any:
        """A file object for the next record of the zip."""
        info = zipfile.ZipInfo(f"{self.writer.path.stem}/{name}")
        # A header of 30 bytes, the name, a 64-bit size field of 20, and a field of zeros up to the next multiple.
        padding = -(self.writer.size + 30 + len(info.filename) + 20 + 4) % ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        return self.archive.open(info, "w", force_zip64=True)


@contextlib.contextmanager
def _open_part(path: Path, specs: Sequence[TensorSpec], kind: HashName | None) -> Iterator[_Part]:
    """A part ready for its tensors, which are the records data/0, data/1, ..."""
    with FileWriter(path, kind) as writer, zipfile.ZipFile(_Sink(writer), "w") as archive:
        part = _Part(writer, archive)
        for name, data in (("data.pkl", _pickle_state(specs)), ("byteorder", b"little"), ("version", b"3\n")):
            with part.record(name) as record:
                record.write(data)
        yield part


class _Sink(io.RawIOBase):
    """A file object that cannot seek, in front of a FileWriter."""

    def __init__(self, writer: FileWriter):
        self._writer = writer

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._writer.write(data)
        return memoryview(data).nbytes


@dataclass(frozen=True)
class _Storage:
    """Stands for the record `data/<key>` in the pickle."""

    key: int
    spec: TensorSpec


class _Tensor:
    """Is pickled as torch pickles a contiguous tensor."""

    def __init__(self, storage: _Storage):
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.storage.spec.shape
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if isinstance(obj, _Storage):
            dtype = obj.spec.dtype
            return "storage", STORAGES[dtype], str(obj.key), "cpu", obj.spec.num_bytes // dtype.itemsize
        return None


def _pickle_state(specs: Sequence[TensorSpec]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({spec.name: _Tensor(_Storage(key, spec)) for key, spec in enumerate(specs)})
    return buffer.getvalue()
