"""GGUF files: a model's metadata, vocabulary and tensors as llama.cpp reads them, streamed block by block.

Written here are the types that the gguf package can quantise; llama.cpp makes the others from such a file.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from tqdm import tqdm

from ..core.errors import InputError
from ..lora.merged_model import MergedModel
from ..weights.generation_config import named_end_ids, named_sampling
from ..weights.names import EXPERT, FUSED_EXPERTS, HEAD, expert_part
from ..weights.reader import TensorSpec, row_shape
from ..weights.streams import FileWriter
from .metadata import ARCHITECTURES, describe_model, describe_sampling
from .vocabulary import describe_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# File types in llama.cpp's spelling. The first group is quantised here, the second by llama.cpp.
WRITTEN_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
QUANTIZED_TYPES = (
    *("Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
)
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP16": "F16", "FP32": "F32"}
NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
FULL_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_COARSE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")  # too coarse for the output layer

_EXPERT_NAMES = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


# ---------------------------------------------------------------- file types


def parse_types(names: Sequence[str], imatrix: str | None = None) -> list[str]:
    """File types in llama.cpp's spelling, without repetitions. Raises: InputError for unknown ones."""
    types = list(dict.fromkeys(ALIASES.get(name.upper(), name.upper()) for name in names))
    known = (*WRITTEN_TYPES, *QUANTIZED_TYPES)
    if not types or (unknown := [name for name in types if name not in known]):
        given = ", ".join(unknown) if types else "nothing given"
        raise InputError(f"--types: {given}: need one or more of {', '.join(known).lower()}")
    if imatrix is None and (needy := [name for name in types if name in NEED_IMATRIX]):
        raise InputError(
            f"--types {' '.join(needy).lower()}: so few bits need an importance matrix; pass --imatrix with a file "
            "that llama.cpp's llama-imatrix made from this model, or a type from q2_k up"
        )
    return types


def file_type_number(name: str) -> LlamaFileType:
    """The number under which GGUF metadata and llama.cpp know a file type."""
    return LlamaFileType.ALL_F32 if name == "F32" else LlamaFileType[f"MOSTLY_{name}"]


# ---------------------------------------------------------------- planning, before weights are read


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file, and the model's tensors whose rows it holds, one after another."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    heads: int | None = None  # rows are reordered within so many attention heads
    half: int | None = None  # of fused experts: 0 the gate's rows, 1 the up projection's
    offset: float = 0.0  # added to every value
    data: Tensor | None = None  # computed, not read: sources is empty


@dataclass
class GgufPlan:
    """What a GGUF file will hold, whatever its type."""

    arch: str
    metadata: dict[str, Any]  # gguf.GGUFWriter's methods and their arguments
    tensors: list[GgufTensor]
    tied: bool  # the embeddings are the output layer too
    notes: list[str]  # where llama.cpp computes otherwise than transformers


def plan_gguf(
    model: MergedModel,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    folders: Sequence[Path] = (),
) -> GgufPlan:
    """Decide metadata, vocabulary and tensors.

    Args:
        config: the content of config.json.
        name: what the model is called in the file.
        folders: of adapters and base, as weights.generation_config takes them.
    Raises: InputError for what llama.cpp cannot represent, naming it.
    """
    from transformers import AutoConfig

    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise InputError(f"model_type {kind}: need one of {', '.join(ARCHITECTURES)} to write a GGUF file")
    if tokenizer is None or model.vocab_size is None:
        raise InputError("a GGUF file holds the tokenizer, and neither base nor adapters have one: --tokenizer_path")
    settings = AutoConfig.for_model(**config)
    notes: list[str] = []
    metadata, factors = describe_model(settings, notes)
    vocabulary = describe_vocabulary(tokenizer, model.vocab_size, config, notes, named_end_ids(folders))
    tensors = _plan_tensors(model, settings)
    if factors is not None:
        tensors.insert(0, GgufTensor("rope_freqs.weight", tuple(factors.shape), (), data=factors))
    metadata = {"add_type": gguf.GGUFType.MODEL, "add_name": name} | metadata | vocabulary
    metadata |= describe_sampling(named_sampling(folders))
    return GgufPlan(ARCHITECTURES[kind], metadata, tensors, model.tied, notes)


# ---------------------------------------------------------------- tensors


def _plan_tensors(model: MergedModel, config: PreTrainedConfig) -> list[GgufTensor]:
    arch = ARCHITECTURES[config.model_type]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    planned: dict[str, GgufTensor] = {}
    problems = []
    for source, weight in model.weights.items():
        if source.endswith(".rotary_emb.inv_freq") or (source == HEAD and model.tied):
            continue
        if weight.dtype not in (*FULL_TYPES, torch.float64):
            problems.append(f"{source} is stored as {str(weight.dtype).removeprefix('torch.')}")
        elif experts := _expert_tensors(source, weight.shape):
            for tensor in experts:
                before = planned.get(tensor.name)
                planned[tensor.name] = _append_expert(before, tensor) if before else tensor
        elif name := names.get_name(source, try_suffixes=(".weight", ".bias")):
            # A router with one output, as of shared experts, is a vector.
            shape = weight.shape[1:] if weight.shape[:1] == (1,) and "ffn_gate_inp" in name else weight.shape
            # Gemma's norms multiply by 1 + weight; llama.cpp by what the file says.
            offset = float(arch == "gemma3" and name.endswith("norm.weight"))
            planned[name] = GgufTensor(name, shape, (source,), _rotated_heads(source, config), offset=offset)
        else:
            problems.append(f"{source} has no counterpart in llama.cpp")
    if problems:
        raise InputError(f"this model cannot become a GGUF file: {'; '.join(problems[:5])}")
    return list(planned.values())


def _rotated_heads(source: str, config: PreTrainedConfig) -> int | None:
    """The heads whose rows llama.cpp's llama architecture wants interleaved: it rotates neighbours, not halves."""
    if ARCHITECTURES[config.model_type] != "llama":
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(source.split(".")[-2])


def _expert_tensors(source: str, shape: tuple[int, ...]) -> list[GgufTensor]:
    """The stacked tensors (experts, rows, columns) that a tensor of a mixture's experts belongs to."""
    if match := EXPERT.fullmatch(source):
        name = _EXPERT_NAMES[expert_part(match[3])]
        return [GgufTensor(f"blk.{match[1]}.{name}.weight", (1, *shape), (source,))]
    match = FUSED_EXPERTS.fullmatch(source)
    if match is None:
        return []
    if match[2] == "down_proj":
        return [GgufTensor(f"blk.{match[1]}.ffn_down_exps.weight", shape, (source,))]
    shape = (shape[0], shape[1] // 2, shape[2])
    return [
        GgufTensor(f"blk.{match[1]}.{name}.weight", shape, (source,), half=half)
        for half, name in enumerate(("ffn_gate_exps", "ffn_up_exps"))
    ]


def _append_expert(stacked: GgufTensor, expert: GgufTensor) -> GgufTensor:
    def expert_number(source: str) -> int:
        return int(source.split(".")[-3])

    sources = tuple(sorted((*stacked.sources, *expert.sources), key=expert_number))
    return dataclasses.replace(stacked, shape=(len(sources), *expert.shape[1:]), sources=sources)


def tensor_type(tensor: GgufTensor, file_type: str, tied: bool) -> GGMLQuantizationType:
    """The type of one tensor in a file of `file_type`.

    As in llama.cpp's converter: vectors and routers float32, rows that do not fill whole blocks float16. With 4 and 5
    bits the output layer keeps 8 (llama.cpp's own quantiser gives it Q6_K, which gguf cannot write).
    """
    columns = tensor.shape[-1]
    if len(tensor.shape) == 1 or "_norm." in tensor.name or "ffn_gate_inp." in tensor.name:
        return GGMLQuantizationType.F32
    is_output = tensor.name == ("token_embd.weight" if tied else "output.weight")
    wanted = GGMLQuantizationType["Q8_0" if is_output and file_type in _COARSE else file_type]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if columns % block == 0 else GGMLQuantizationType.F16


def describe_plan(plan: GgufPlan, file_type: str) -> dict[str, Any]:
    """`describe_types` of the file that `write_gguf` writes."""
    types = ((t.name, t.shape, tensor_type(t, file_type, plan.tied).name) for t in plan.tensors)
    return describe_types(types, file_type)


def describe_types(tensors: Iterable[tuple[str, Sequence[int], str]], file_type: str) -> dict[str, Any]:
    """{"tensor_types": {type: how many}, "fallbacks": names of tensors whose rows do not fill the type's blocks}.

    Those are stored in a type with smaller blocks; llama.cpp says so only in its own log.

    Args:
        tensors: (name, shape, type) of each.
    """
    small = file_type in WRITTEN_TYPES or file_type == "IQ4_NL"
    block = 1 if file_type in ("F32", "F16", "BF16") else 32 if small else 256
    counts: Counter[str] = Counter()
    fallbacks = []
    for name, shape, kind in tensors:
        counts[kind] += 1
        if len(shape) > 1 and kind != "F32" and shape[-1] % block:
            fallbacks.append(name)
    return {"tensor_types": dict(counts), "fallbacks": fallbacks}


def file_bytes(plan: GgufPlan, file_type: str) -> int:
    """About the size of a file, without its metadata."""
    if file_type in WRITTEN_TYPES:
        return sum(_tensor_bytes(tensor, tensor_type(tensor, file_type, plan.tied)) for tensor in plan.tensors)
    bits = int(re.findall(r"\d", file_type)[0]) + 1  # scales and better-kept tensors come on top of the name's bits
    return sum(math.prod(tensor.shape) for tensor in plan.tensors) * bits // 8


def _tensor_bytes(tensor: GgufTensor, kind: GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(tensor.shape) // block * size


# ---------------------------------------------------------------- writing


def write_vocabulary(plan: GgufPlan, path: Path) -> None:
    """Write a file without tensors, enough for llama.cpp to tokenise with."""
    _write_header(plan, "F32", path, {})


def _write_header(plan: GgufPlan, file_type: str, path: Path, types: dict[str, GGMLQuantizationType]) -> None:
    """Everything up to the tensors' data."""
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, plan.arch)
    for tensor in plan.tensors:
        if tensor.name in types:
            kind = types[tensor.name]
            size = _tensor_bytes(tensor, kind)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    for method, value in plan.metadata.items():
        getattr(writer, method)(value)
    if types:
        writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(file_type_number(file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def write_gguf(plan: GgufPlan, model: MergedModel, file_type: str, path: Path) -> str:
    """Stream the model into one file of a type in WRITTEN_TYPES. Returns: the file's SHA-256.

    Raises: InputError if a weight is not finite, or does not fit into float16.
    """
    types = {tensor.name: tensor_type(tensor, file_type, plan.tied) for tensor in plan.tensors}
    source_types = {source: types[tensor.name] for tensor in plan.tensors for source in tensor.sources}
    offsets = {source: tensor.offset for tensor in plan.tensors for source in tensor.sources if tensor.offset}

    def convert(spec: TensorSpec, block: Tensor) -> np.ndarray:
        """A block of rows as they stand in the file: (rows, bytes)."""
        kind = source_types[spec.name]
        if spec.name in offsets:
            block = block + offsets[spec.name]
        if kind.name in ("F32", "F16", "BF16"):
            return block.contiguous().view(torch.uint8).numpy().reshape(len(block), -1)
        return gguf.quants.quantize(block.numpy(), kind)

    casts = {"F16": torch.float16, "BF16": torch.bfloat16}
    specs = [
        TensorSpec(source, casts.get(types[tensor.name].name, torch.float32), model.weights[source].shape)
        for tensor in plan.tensors
        for source in tensor.sources
    ]
    header = path.with_suffix(".header")
    _write_header(plan, file_type, header, types)
    blocks = model.stream(specs, convert)
    with FileWriter(path) as writer:
        _write_padded(writer, [header.read_bytes()])
        header.unlink()
        with tqdm(total=file_bytes(plan, file_type), unit="B", unit_scale=True, desc=file_type) as bar:
            for tensor in plan.tensors:
                _write_padded(writer, _tensor_blocks(tensor, model, blocks))
                bar.update(_tensor_bytes(tensor, types[tensor.name]))
    return writer.digest["sha256"]


def _write_padded(writer: FileWriter, blocks: Iterable[Any]) -> None:
    """Write blocks, then zeros up to the next multiple of GGUF's alignment."""
    for block in blocks:
        writer.write(block)
    if rest := -writer.size % gguf.GGUF_DEFAULT_ALIGNMENT:
        writer.write(bytes(rest))


def _tensor_blocks(
    tensor: GgufTensor, model: MergedModel, blocks: Iterator[tuple[TensorSpec, np.ndarray]]
) -> Iterator[np.ndarray]:
    """The rows of one tensor of the file, taken from the stream that holds its sources next."""
    if tensor.data is not None:
        yield tensor.data.numpy()
        return
    shapes = [model.weights[source].shape for source in tensor.sources]
    left = sum(row_shape(shape)[0] for shape in shapes)
    row, reordered = 0, None
    targets = None if tensor.heads is None else _interleaved_rows(left, tensor.heads)
    while left > 0:
        _, block = next(blocks)
        stop = row + len(block)
        if targets is not None:
            if reordered is None:
                reordered = np.empty((left, block.shape[1]), block.dtype)
            reordered[targets[row:stop]] = block
        elif tensor.half is None:
            yield block
        else:
            rows = block[np.arange(row, stop) // tensor.shape[1] % 2 == tensor.half]
            if len(rows):
                yield np.ascontiguousarray(rows)
        row, left = stop, left - len(block)
    if reordered is not None:
        yield reordered


def _interleaved_rows(rows: int, heads: int) -> np.ndarray:
    """Where each row of q_proj or k_proj goes: the two halves of every head's rows alternate. (rows,)"""
    size = rows // heads
    inside: np.ndarray = np.arange(rows) % size
    return np.arange(rows) - inside + 2 * (inside % (size // 2)) + inside // (size // 2)
