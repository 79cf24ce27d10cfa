"""Models: weights loaded or created, and in which precision, attention and quantisation."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.arguments import ExtendArguments, ModelArguments
from ..core.errors import InputError
from ..weights.config import folder_or_hub_id, load_config, model_of_shapes
from ..weights.model_folder import (
    LANGUAGE_MODEL,
    check_padding,
    loadable_folder,
    loading_settings,
    read_model,
    some_of,
)
from .experts import check_linear_experts, gather_with_experts, linear_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- loading


def bf16_is_supported() -> bool:
    """Whether bf16 arithmetic is native here (GPU, or a CPU with AVX-512 BF16 or AMX), not emulated."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


def choose_attention(requested: str) -> str:
    """The attention implementation for "auto". Raises: InputError if flash-attn is asked for and cannot run."""
    available = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    if requested == "auto":
        return "flash_attention_2" if available else "sdpa"
    if requested == "flash_attention_2" and not available:
        if torch.cuda.is_available():
            raise InputError("flash_attention_2 needs the package flash-attn: pip install -r requirements-gpu.txt")
        logger.warning("flash_attention_2 needs a CUDA GPU; sdpa is used")
        return "sdpa"
    return requested


def quantization_config(bits: int, quant_type: str, double_quant: bool, compute_dtype: torch.dtype) -> Any:
    """transformers' bitsandbytes configuration for 4 or 8 bits, None for 16. Raises: InputError without
    bitsandbytes."""
    if bits == 16:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--load_in_kbits {bits} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def check_loading(args: ModelArguments) -> None:
    """Raises: InputError if a package that loading needs is not installed, or a run would spread k-bit weights."""
    choose_attention(args.attn_implementation)
    quantization_config(args.load_in_kbits, args.quant_type, args.double_quant, torch.float32)
    if args.load_in_kbits != 16 and zero3_is_on():
        raise InputError(
            f"--load_in_kbits {args.load_in_kbits} with --deepspeed stage 3: such weights are not spread over the "
            "processes here; pass scripts/configs/ds_zero2_no_offload.json, or leave --load_in_kbits out"
        )


def zero3_is_on() -> bool:
    """Whether weights are to be spread by DeepSpeed ZeRO-3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def training_dtype(dtype: str, compute_dtype: torch.dtype, full_finetuning: bool = False) -> str:
    """The type that the weights of a run have in memory, as ModelArguments.dtype names it.

    Without autocast (float32) nothing converts between frozen 16-bit weights and what is trained, which is float32:
    all weights are. Weights that are all trained are too (AdamW in 16 bits loses small updates, and gradient scaling
    refuses float16), unless bfloat16 is asked for.
    Args: dtype: the one asked for; compute_dtype: the type arithmetic runs in.
    """
    if compute_dtype == torch.float32 and dtype not in ("auto", "float32"):
        logger.warning("--dtype %s has no effect with --precision fp32: all weights are float32", dtype)
    everything = compute_dtype == torch.float32 or (full_finetuning and dtype != "bfloat16")
    return "float32" if everything else dtype


def load_model(
    args: ModelArguments,
    compute_dtype: torch.dtype,
    device_map: Any = None,
    auto_class: str = LANGUAGE_MODEL,
    adapts_experts: bool = False,
    **config: Any,
) -> PreTrainedModel:
    """Load a model's weights; what is damaged, missing or of another shape is named before anything slow.

    Args:
        compute_dtype: the type arithmetic runs in; k-bit weights are dequantised to it.
        auto_class: the class of transformers that loads it.
        adapts_experts: a mixture's experts are to be linear layers, as they always are in k bits; see models.experts.
        config: settings that replace those of the model's config.
    Raises: InputError.
    """
    import transformers

    assert args.model_name_or_path is not None
    found = read_model(args.model_name_or_path, auto_class)
    checkpoint = found.checkpoint
    if found.extra:
        named = some_of(found.extra)
        logger.warning("%s: %d tensors have no place in the model: %s", found.folder, len(found.extra), named)
    quantization = quantization_config(args.load_in_kbits, args.quant_type, args.double_quant, compute_dtype)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if quantization is not None and dtype == "auto":
        dtype = compute_dtype
    # None would replace what the config of a quantised folder says.
    settings = {} if quantization is None else {"quantization_config": quantization}
    shaped = copy.deepcopy(found.config)
    shaped.update(config)
    as_layers = adapts_experts or quantization is not None
    if as_layers:
        check_linear_experts(found, "LoRA on experts" if quantization is None else f"{args.load_in_kbits} bits")
    with loadable_folder(checkpoint) as folder, linear_experts(shaped) if as_layers else contextlib.nullcontext():
        model: PreTrainedModel = getattr(transformers, auto_class).from_pretrained(
            str(folder),
            config=shaped,
            dtype=dtype,
            attn_implementation=choose_attention(args.attn_implementation),
            device_map=device_map,
            **settings,
            **loading_settings(checkpoint),
        )
    # What adapters record as their base.
    model.config.name_or_path = model.name_or_path = folder_or_hub_id(args.model_name_or_path)
    if checkpoint.wrapper:
        del model._weight_conversions  # else save_pretrained would put the wrapper's name back
    _pack_whole_blocks_only(model)
    if as_layers and zero3_is_on():
        gather_with_experts(model)
    return model


def _pack_whole_blocks_only(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing weights for AVX-512 that its packed form cannot hold (tiny models have them)."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and (
            module.out_features % 32 or module.in_features % 64
        ):
            module.support_avx512bf16_for_cpu = False


def new_config(args: ExtendArguments, vocabulary: int) -> PreTrainedConfig:
    """--config_name with --config_overrides and `vocabulary` rows. Raises: InputError, also for impossible shapes."""
    assert args.config_name is not None
    path = Path(args.config_name).expanduser()
    config = load_config(str(path.parent if path.name == "config.json" else path)) if path.exists() else None
    if config is None:
        raise InputError(f"--config_name {args.config_name}: no such folder or file")
    for override in (args.config_overrides or "").split(","):
        if override.strip():
            _override(config, override.strip())
    config.vocab_size = vocabulary
    check_padding(f"--config_name {args.config_name}", config)
    try:
        model_of_shapes(config)
    except Exception as error:  # whatever a model's code makes of sizes that do not go together
        changes = f" --config_overrides {args.config_overrides}" if args.config_overrides else ""
        raise InputError(f"--config_name {args.config_name}{changes}: {error}") from None
    return config


def _override(config: PreTrainedConfig, override: str) -> None:
    """Set one name=value in a config. Values are read as JSON, other words are texts."""
    name, equals, text = override.partition("=")
    name, text = name.strip(), text.strip()
    if not equals or not hasattr(config, name):
        raise InputError(f"--config_overrides {override}: need name=value with a name of {type(config).__name__}")
    old = getattr(config, name)
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        value = text
    if type(old) is float and type(value) is int:
        value = float(value)
    if old is not None and type(value) is not type(old):
        raise InputError(f"--config_overrides {override}: need {type(old).__name__}, as {name} {old!r} is")
    try:
        setattr(config, name, value)
    except (TypeError, ValueError) as error:  # transformers checks types
        raise InputError(f"--config_overrides {override}: {error}") from None


def create_model(args: ExtendArguments, vocabulary: int, attention: str) -> PreTrainedModel:
    """A model with random weights of new_config."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        new_config(args, vocabulary), dtype=torch.float32, attn_implementation=choose_attention(attention)
    )
    return model


# ---------------------------------------------------------------- what is in a loaded model


def causal_model(model: nn.Module) -> Any:
    """The causal language model inside a PEFT model, or the model itself."""
    # Not by peft_config: PEFT leaves that on the inner model too.
    return model.get_base_model() if hasattr(model, "get_base_model") else model
