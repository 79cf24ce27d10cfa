"""GGUF metadata: a model's settings as llama.cpp reads them, or a refusal of what it cannot compute; and read back.

What is to be written is held as {method of gguf.GGUFWriter: its argument}, in writing order.
"""

from __future__ import annotations

import glob
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gguf import RopeScalingType
from torch import Tensor

from ..core.errors import InputError
from ..weights.config import expert_count
from ..weights.generation_config import complete_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# transformers' model_type -> llama.cpp's architecture, which decides tensor names and the layout of q and k.
ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "mixtral": "llama"},
    **{"qwen2": "qwen2", "qwen3": "qwen3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"},
    **{"gemma3_text": "gemma3"},
}
# What llama.cpp computes for Gemma-3 whatever the file says.   Source: llama.cpp, src/models/gemma3.cpp
_GEMMA_PERIOD, _GEMMA_LOCAL_THETA, _GEMMA_27B_LAYERS = 6, 10000.0, 62
# Whether llama.cpp makes the weights of a token's experts sum to 1, whatever the file says.
_NORMALISED = {"qwen2_moe": False, "qwen3_moe": True}


def describe_model(config: PreTrainedConfig, notes: list[str]) -> tuple[dict[str, Any], Tensor | None]:
    """The settings, and llama3's factors of the rotary frequencies where the model has them: (head_dim / 2,) float32.

    Args:
        notes: gets what llama.cpp computes otherwise than transformers.
    Raises: InputError for what llama.cpp cannot compute.
    """
    is_gemma = ARCHITECTURES[config.model_type] == "gemma3"
    problems = _gemma_problems(config) if is_gemma else []
    if not is_gemma and config.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act {config.hidden_act} (need silu)")
    rotated = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        problems.append(f"partial_rotary_factor {rotated} (need 1)")
    if config.model_type in _NORMALISED:
        if config.norm_topk_prob != _NORMALISED[config.model_type]:
            problems.append(f"norm_topk_prob {config.norm_topk_prob} (need {_NORMALISED[config.model_type]})")
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            problems.append("layers without experts (mlp_only_layers, decoder_sparse_step)")
    if problems:
        raise InputError(f"llama.cpp has no such {config.model_type} model: {', '.join(problems)}")
    window = getattr(config, "sliding_window", None)
    slides = window and getattr(config, "use_sliding_window", True)
    if slides and not is_gemma and window < config.max_position_embeddings:
        notes.append(
            f"llama.cpp attends to all earlier tokens, the model to the last {window}: texts longer than that are "
            "computed otherwise"
        )
    head_dim = _head_dim(config)
    found = {
        "add_vocab_size": config.vocab_size,
        "add_context_length": config.max_position_embeddings,
        "add_embedding_length": config.hidden_size,
        "add_block_count": config.num_hidden_layers,
        "add_feed_forward_length": config.intermediate_size,
        "add_head_count": config.num_attention_heads,
        "add_head_count_kv": config.num_key_value_heads,
        "add_key_length": head_dim,
        "add_value_length": head_dim,
        "add_rope_dimension_count": head_dim,
        "add_layer_norm_rms_eps": config.rms_norm_eps,
    }
    if is_gemma:
        found["add_sliding_window"] = config.sliding_window
        if config.final_logit_softcapping:
            found["add_final_logit_softcapping"] = config.final_logit_softcapping
    if count := expert_count(config):
        found |= {"add_expert_count": count, "add_expert_used_count": config.num_experts_per_tok}
    if config.model_type in _NORMALISED:
        found["add_expert_feed_forward_length"] = config.moe_intermediate_size
    if config.model_type == "qwen2_moe":
        found["add_expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    rope, factors = _describe_rope(config, notes)
    return found | rope, factors


def _gemma_problems(config: PreTrainedConfig) -> list[str]:
    """What llama.cpp would compute otherwise for a Gemma-3 model."""
    problems = []
    full, sliding = "full_attention", "sliding_attention"
    numbers = range(1, config.num_hidden_layers + 1)
    if list(config.layer_types) != [sliding if number % _GEMMA_PERIOD else full for number in numbers]:
        problems.append(f"layer_types {config.layer_types} (need {full} in every {_GEMMA_PERIOD}th layer)")
    if config.hidden_activation != "gelu_pytorch_tanh":
        problems.append(f"hidden_activation {config.hidden_activation} (need gelu_pytorch_tanh)")
    scale = _head_dim(config)
    if config.num_hidden_layers == _GEMMA_27B_LAYERS:
        scale = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != scale:
        problems.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar} (need {scale})")
    if config.attn_logit_softcapping:
        problems.append(f"attn_logit_softcapping {config.attn_logit_softcapping} (need none)")
    if config.use_bidirectional_attention:
        problems.append("use_bidirectional_attention")
    local = config.rope_parameters[sliding]
    if local["rope_type"] != "default" or local["rope_theta"] != _GEMMA_LOCAL_THETA:
        problems.append(f"rope_parameters of {sliding} {local} (need rope_theta {_GEMMA_LOCAL_THETA:g})")
    return problems


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _describe_rope(config: PreTrainedConfig, notes: list[str]) -> tuple[dict[str, Any], Tensor | None]:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)  # Gemma-3's layers that slide have their own
    kind = rope.get("rope_type", "default")
    found: dict[str, Any] = {"add_rope_freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        found |= {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": float(rope["factor"])}
    elif kind == "yarn" and rope.get("truncate", True):
        found |= _describe_yarn(rope, config.max_position_embeddings)
    elif kind == "llama3" and ARCHITECTURES[config.model_type] == "llama":
        return found, _llama3_factors(rope, _head_dim(config))
    elif kind == "dynamic":
        notes.append(
            f"llama.cpp has no dynamic NTK scaling: the file is exact up to {config.max_position_embeddings} tokens, "
            "beyond that pass --rope-freq-base to llama.cpp"
        )
    elif kind != "default":
        raise InputError(f"rope_type {kind}: llama.cpp has nothing equal to it for {config.model_type} models")
    return found, None


def _describe_yarn(rope: dict[str, Any], length: int) -> dict[str, Any]:
    """YaRN's settings (Peng et al. 2023), with the defaults of transformers' modeling_rope_utils."""
    trained = rope.get("original_max_position_embeddings") or length
    factor = float(rope.get("factor") or length / trained)
    found = {
        "add_rope_scaling_type": RopeScalingType.YARN,
        "add_rope_scaling_factor": factor,
        "add_rope_scaling_orig_ctx_len": trained,
    }
    # llama.cpp's own defaults; it reads other values for other architectures only.
    for beta, usual in (("beta_fast", 32), ("beta_slow", 1)):
        if (rope.get(beta) or usual) != usual:
            raise InputError(f"YaRN with {beta} {rope[beta]}: llama.cpp computes {usual} whatever the file says")

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1

    own = rope.get("attention_factor")
    if own is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        own = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    if own is not None:
        found["add_rope_scaling_attn_factors"] = own / magnitude(1)  # llama.cpp multiplies the usual one by it
    return found


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """What every rotary frequency is divided by.   Source: Llama 3.1, apply_scaling."""
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    # Turns within the trained context: from `high` on a frequency stays, up to `low` it is divided by the factor.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1.0 / ((1 - smooth) / rope["factor"] + smooth)


# GGUF's names for settings of sampling; temperature 0 is its do_sample false.
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def describe_sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of weights.generation_config.named_sampling, which llama.cpp takes as its defaults."""
    if settings and not settings["do_sample"]:
        settings = {**settings, "temperature": 0.0}
    return {f"add_sampling_{_SAMPLING[name]}": value for name, value in settings.items() if name in _SAMPLING}


# ---------------------------------------------------------------- the way back

# GGUF's value types that have a fixed size, as struct writes them; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def gguf_parts(path: Path) -> list[Path]:
    """The file itself, or of a model in several files (whose first it is) all of them."""
    name, parts, _ = path.name.partition("-00001-of-")
    return sorted(path.parent.glob(f"{glob.escape(name)}-*-of-*.gguf")) if parts else [path]


def read_metadata(path: Path) -> dict[str, Any]:
    """What a GGUF file says about its model, without its tensors; the gguf package needs seconds for a vocabulary.

    Raises: InputError if it is no GGUF file of version 2 or 3, or is truncated.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is no GGUF file; make one with export_gguf.py")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Header(data).read()
            except (struct.error, KeyError, UnicodeDecodeError):
                raise InputError(f"{path}: the GGUF header is damaged or truncated; copy the file again") from None


def read_sampling(metadata: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The settings of sampling that a file asks for, by the names of GenerationArguments; none if it names none.

    llama.cpp's converter writes those that generation_config.json has, so the others mean the same as there.
    Args: place: the file, for errors.
    """
    keys = {name: f"general.sampling.{own}" for name, own in _SAMPLING.items()}
    # They are kept in 32 bits, which makes 0.699999988 of 0.7.
    found = {
        name: round(metadata[key], 6) if isinstance(metadata[key], float) else metadata[key]
        for name, key in keys.items()
        if key in metadata
    }
    return complete_sampling(found, place)


class _Header:
    """Reads one value after another.   Source: ggml's docs/gguf.md."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._position = data, 4

    def read(self) -> dict[str, Any]:
        version, _, count = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, 3):
            raise InputError(f"GGUF version {version}: need 2 or 3 in little-endian order; export the model again")
        return {self._string(): self._value(self._scalar("I")) for _ in range(count)}

    def _scalar(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._data, self._position)
        self._position += struct.calcsize(f"<{kind}")
        return value

    def _string(self) -> str:
        (size,) = struct.unpack_from("<Q", self._data, self._position)
        start = self._position + 8
        self._position = start + size
        if self._position > len(self._data):
            raise struct.error("a string ends behind the file")
        return self._data[start : self._position].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        element, count = self._scalar("I"), self._scalar("Q")
        if element == _STRING:
            return [self._string() for _ in range(count)]
        form = f"<{count}{_SCALARS[element]}"
        values = list(struct.unpack_from(form, self._data, self._position))
        self._position += struct.calcsize(form)
        return values
