"""GGUF metadata: a model's settings as llama.cpp reads them, or a refusal of what it cannot compute.

Metadata is held as {method of gguf.GGUFWriter: its argument}, in writing order.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from gguf import RopeScalingType
from torch import Tensor

from ..core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# transformers' model_type -> llama.cpp's architecture, which decides tensor names and the layout of q and k.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def describe_model(config: PreTrainedConfig, notes: list[str]) -> tuple[dict[str, Any], Tensor | None]:
    """The settings, and llama3's factors of the rotary frequencies where the model has them: (head_dim / 2,) float32.

    Args:
        notes: gets what llama.cpp computes otherwise than transformers.
    Raises: InputError for what llama.cpp cannot compute.
    """
    problems = []
    if config.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act {config.hidden_act} (need silu)")
    rotated = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        problems.append(f"partial_rotary_factor {rotated} (need 1)")
    if problems:
        raise InputError(f"llama.cpp has no such {config.model_type} model: {', '.join(problems)}")
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and getattr(config, "use_sliding_window", True):
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
    if config.model_type == "mixtral":
        found |= {
            "add_expert_count": config.num_local_experts,
            "add_expert_used_count": config.num_experts_per_tok,
        }
    rope, factors = _describe_rope(config, notes)
    return found | rope, factors


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _describe_rope(config: PreTrainedConfig, notes: list[str]) -> tuple[dict[str, Any], Tensor | None]:
    rope = config.rope_parameters
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
