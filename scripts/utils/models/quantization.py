"""Quantisation: a full-precision model made smaller, saved as a folder that transformers (and vLLM) load.

bitsandbytes rounds each weight by itself; GPTQ and AWQ look at calibration text to round where it matters least; FP8
rounds weights to 8-bit floats and activations on the fly. The last three are llmcompressor's.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.arguments import ModelArguments
from ..core.errors import InputError
from ..core.records import iter_document_batches, list_data_files
from ..text.tokenizer import encode_raw, encode_texts, start_ids
from ..weights.config import expert_count
from ..weights.names import ADAPTER_CONFIG
from ..weights.reader import open_checkpoint
from .loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BITSANDBYTES = {"bnb-4bit": 4, "bnb-8bit": 8}
CALIBRATED = ("gptq", "awq")
METHODS = (*BITSANDBYTES, *CALIBRATED, "fp8")
# Kept in full precision: the output layer, whose errors reach every token. Embeddings are no Linear layers.
KEPT = ["lm_head"]
WHOLE_ROW = -1  # a group size: one scale a row
KERNEL_GROUPS = (128, 64, 32)  # group sizes that vLLM has fast kernels for
MAX_RELOAD_DIFFERENCE = 1e-3  # of the largest logit; measured: 0
CHECK_TEXTS = (
    "The capital of France is Paris, and water boils at 100 degrees.",
    "中国的首都是北京。水在一百度时沸腾。",
    "def add(a, b):\n    return a + b",
)
CHECK_TOKENS = 64


@dataclass(frozen=True)
class Scheme:
    """How weights are stored; each setting counts for the methods that have it.

    `group_size` (gptq, awq): weights of a row that share a scale, WHOLE_ROW for all. `quant_type`, `double_quant`:
    bnb-4bit.
    """

    method: str
    group_size: int = 128
    quant_type: str = "nf4"
    double_quant: bool = True

    @property
    def needs_calibration(self) -> bool:
        return self.method in CALIBRATED

    @property
    def package(self) -> str:
        """The library that quantises."""
        return "bitsandbytes" if self.method in BITSANDBYTES else "llmcompressor"


# ---------------------------------------------------------------- before weights are read


def refuse_adapter(name_or_path: str) -> None:
    """Raises: InputError if this is the folder of an adapter."""
    folder = Path(name_or_path)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is an adapter, not a model; merge it into its base first: "
            "python scripts/merge_llama2_with_chinese_lora_low_mem.py --base_model BASE "
            f"--lora_model {folder} --output_dir MERGED, then quantise MERGED"
        )


def check_scheme(scheme: Scheme, folder: Path, config: PreTrainedConfig) -> None:
    """Find what would fail after minutes. Raises: InputError for a package, a device or a shape that does not fit."""
    if scheme.method not in METHODS:
        raise InputError(f"--method {scheme.method}: need one of {', '.join(METHODS)}")
    package = scheme.package
    if importlib.util.find_spec(package) is None:
        remedy = (
            "pip install bitsandbytes" if scheme.method in BITSANDBYTES else "pip install -r requirements-quantize.txt"
        )
        raise InputError(f"--method {scheme.method} needs the package {package}: {remedy}")
    if expert_count(config):
        raise InputError(
            f"{folder} is a mixture of experts: transformers holds a layer's experts in one tensor, which --method "
            f"{scheme.method} leaves in full precision or saves in a form transformers cannot load; "
            "quantise it as GGUF instead, with scripts/export_gguf.py"
        )
    if scheme.method == "awq" and not torch.accelerator.is_available():
        raise InputError("--method awq needs a GPU (llmcompressor copies to one); gptq runs on a CPU too")
    if scheme.needs_calibration:
        _check_group_size(scheme.group_size, folder)


def _check_group_size(size: int, folder: Path) -> None:
    if size == WHOLE_ROW:
        return
    widths = {shape[-1] for name, shape in open_checkpoint(folder).shapes.items() if _is_quantisable(name, shape)}
    if size < 1 or any(width % size for width in widths):
        fitting = [group for group in KERNEL_GROUPS if not any(width % group for width in widths)]
        raise InputError(
            f"--group_size {size}: need one that divides the rows of all weights, which have "
            f"{', '.join(map(str, sorted(widths)))} columns; pass {[*fitting, WHOLE_ROW][0]}"
            f"{'' if fitting else ' (one scale a row)'}"
        )


def _is_quantisable(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the weight of a Linear layer inside the blocks."""
    return len(shape) == 2 and ".layers." in name and name.endswith(".weight")


def read_calibration(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    samples: int,
    length: int | None,
) -> Tensor:
    """Windows of calibration text: (samples, length) token ids, as many from every file, each document after a BOS.

    Args:
        names: files or folders (txt, json, jsonl, parquet).
        length: tokens of a window; None: 2048, or the model's context if that is shorter.
    Raises: InputError if there is less text than `samples` windows, or a window exceeds the context.
    """
    context = int(config.max_position_embeddings)
    length = length or min(2048, context)
    if length > context or samples < 1 or length < 2:
        raise InputError(
            f"--num_calibration_samples {samples} --calibration_length {length}: need at least 1 sample of 2 to "
            f"{context} tokens, the model's context"
        )
    sources = [_windows(file, tokenizer, length) for name in names for file in list_data_files(name)]
    rows: list[list[int]] = []
    # In turns: a calibration that saw the first file alone would fit its language and no other.
    while sources and len(rows) < samples:
        for source in list(sources):
            row = next(source, None)
            if row is None:
                sources.remove(source)
            elif len(rows) < samples:
                rows.append(row)
    if len(rows) < samples:
        raise InputError(
            f"--calibration_data {' '.join(names)} holds {len(rows)} windows of {length} tokens, need {samples}: add "
            "text, or pass a smaller --num_calibration_samples or --calibration_length"
        )
    return torch.tensor(rows)


def _windows(file: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Consecutive stretches of `length` ids of a file; a rest is left out."""
    start = start_ids(tokenizer)
    stream: list[int] = []
    for batch in iter_document_batches(file):
        for ids in encode_texts(tokenizer, batch):
            stream += start + ids
        cut = len(stream) // length * length
        yield from (stream[begin : begin + length] for begin in range(0, cut, length))
        stream = stream[cut:]


# ---------------------------------------------------------------- quantising


def quantize_model(
    folder: Path,
    scheme: Scheme,
    dtype: torch.dtype,
    calibration: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Load a model and quantise it.

    Args:
        dtype: of arithmetic, and of the weights that are not quantised.
        calibration: (samples, length) token ids, for the methods that need them, with the tokenizer they come from.
    """
    bits: Any = BITSANDBYTES.get(scheme.method, 16)
    quant_type: Any = scheme.quant_type
    args = ModelArguments(str(folder), load_in_kbits=bits, quant_type=quant_type, double_quant=scheme.double_quant)
    args.dtype = dtype_name(dtype)
    if bits != 16:
        return load_model(args, dtype, device_map()).eval()
    from llmcompressor import oneshot

    data: dict[str, Any] = {}
    if calibration is not None:
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration]
        data = {
            "dataset": torch.utils.data.DataLoader(rows, batch_size=1),
            "num_calibration_samples": len(rows),
            "max_seq_length": calibration.shape[1],
            "tokenizer": tokenizer,
        }
    # It stays on the CPU; llmcompressor brings layer after layer to the GPU, if there is one.
    model = load_model(args, dtype)
    quantised: PreTrainedModel = oneshot(model=model, recipe=build_recipe(scheme), **data)
    return quantised.eval()


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating-point type that most of a model's weights are stored in."""
    sizes = {dtype: 0 for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    for info in open_checkpoint(folder).tensors.values():
        if info.dtype in sizes:
            sizes[info.dtype] += info.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def dtype_name(dtype: torch.dtype) -> Any:
    """torch.float32 -> "float32", as arguments spell it."""
    return str(dtype).removeprefix("torch.")


def build_recipe(scheme: Scheme) -> list[Any]:
    """llmcompressor's modifiers. GPTQ: Frantar et al. 2022; AWQ: Lin et al. 2023; FP8: one scale a row of weights,
    one a token of activations.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if scheme.method == "fp8":
        return [QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC", ignore=KEPT)]
    whole = scheme.group_size == WHOLE_ROW
    # The forms that vLLM has fast kernels for: GPTQ's without zero points, AWQ's with them.
    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": scheme.method == "gptq"}
    weights |= {"strategy": "channel"} if whole else {"strategy": "group", "group_size": scheme.group_size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if scheme.method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=KEPT)]
    return [AWQModifier(duo_scaling="both"), QuantizationModifier(config_groups=groups, ignore=KEPT)]


def describe_package(scheme: Scheme) -> str:
    """Name and version of the library that quantises."""
    return f"{scheme.package} {metadata.version(scheme.package)}"


def device_map() -> dict[str, Any]:
    """Everything on one device: the first GPU, or the CPU."""
    return {"": 0 if torch.cuda.is_available() else "cpu"}


# ---------------------------------------------------------------- saving and checking


def save_weights(model: PreTrainedModel, folder: Path, max_shard_size: str = "5GB") -> None:
    """Weights, config with quantization_config, generation_config; before the model's first forward pass.

    The first pass on a CPU with AVX-512 BF16 packs bitsandbytes' 4-bit weights for its own kernel; what
    bitsandbytes 0.50 unpacks when it saves afterwards has other scales than those it was quantised with.
    """
    from transformers import GenerationConfig

    # The base's own file is copied beside; a contradictory one would stop save_pretrained.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def load_quantized(folder: str | Path) -> PreTrainedModel:
    """A saved folder as a user loads it: type and quantisation as its config says."""
    return load_model(ModelArguments(model_name_or_path=str(folder)), torch.float32, device_map()).eval()


@torch.no_grad()
def check_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Logits (T, V) in float32 on the CPU of every text in CHECK_TEXTS."""
    rows = [encode_raw(text, tokenizer)[:CHECK_TOKENS] for text in CHECK_TEXTS]
    return [model(input_ids=torch.tensor([row], device=model.device)).logits[0].float().cpu() for row in rows if row]


def compare_reloaded(folder: Path, before: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase) -> float:
    """The largest difference between the logits of a saved folder and those `before` saving, relative to the largest.

    Raises: InputError if they differ, or are not finite.
    """
    after = check_logits(load_quantized(folder), tokenizer)
    largest = max(float(logits.abs().max()) for logits in before)
    difference = max(float((new - old).abs().max()) for new, old in zip(after, before, strict=True)) / largest
    if not difference <= MAX_RELOAD_DIFFERENCE:  # also where it is not a number
        raise InputError(
            f"the saved model answers otherwise than the quantised one in memory: logits differ by {difference:.2g} "
            f"of the largest, at most {MAX_RELOAD_DIFFERENCE} is rounding; nothing was published"
            + ("" if math.isfinite(largest) else "; the quantised weights hold NaN or infinity")
        )
    return difference


def describe_weights(base: Path, folder: Path) -> dict[str, Any]:
    """What became of the base's weights: counts, the quantised share of all parameters, sizes in 1e9 bytes."""
    old, new = open_checkpoint(base).tensors, open_checkpoint(folder).tensors
    kept = {
        name
        for name, info in old.items()
        if name in new
        and new[name].shape == info.shape
        and new[name].dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    count = {name: math.prod(info.shape) for name, info in old.items()}
    total = sum(count.values())
    size = sum(info.num_bytes for info in new.values())
    quantised = sum(count[name] for name in old if name not in kept)
    return {
        "weights": len(old),
        "quantised_weights": len(old) - len(kept),
        "quantised_share": round(quantised / total, 4),
        "size_gb_before": round(sum(info.num_bytes for info in old.values()) / 1e9, 6),
        "size_gb": round(size / 1e9, 6),
        "bits_per_weight": round(8 * size / total, 3),
    }
