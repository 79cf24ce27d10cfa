"""Models: loading, precision, attention, quantisation, new vocabulary rows and adapters."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .arguments import ExtendArguments, LoraArguments, ModelArguments
from .checkpoints import check_readable, open_checkpoint
from .files import InputError
from .lora import load_adapter_config, resolve_target_modules
from .losses import install_loss_head
from .sharding import full_shape, whole_weights
from .tokenization import embedding_rows, load_tokenizer, segment_with

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Read a model's config. Raises: InputError if the folder or its config.json is absent or broken."""
    from transformers import AutoConfig

    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        adapter = (
            " (it holds an adapter: pass the base model here)" if (path / "adapter_config.json").is_file() else ""
        )
        raise InputError(f"{path} has no config.json, so it is no model folder{adapter}")
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the model config of {name_or_path}: {error}") from None


def load_model(
    args: ModelArguments,
    compute_dtype: torch.dtype,
    device_map: Any = None,
    auto_class: str = "AutoModelForCausalLM",
    **config: Any,
) -> PreTrainedModel:
    """Load a model's weights, with damaged or missing files named before anything slow.

    Args:
        compute_dtype: the type arithmetic runs in; k-bit weights are dequantised to it.
        auto_class: the class of transformers that loads it.
        config: settings that replace those of the model's config.
    Raises: InputError.
    """
    import transformers

    assert args.model_name_or_path is not None
    load_config(args.model_name_or_path)
    if Path(args.model_name_or_path).is_dir():
        check_readable(args.model_name_or_path)
    quantization = quantization_config(args.load_in_kbits, args.quant_type, args.double_quant, compute_dtype)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if quantization is not None and dtype == "auto":
        dtype = compute_dtype
    # None would replace what the config of a quantised folder says.
    settings = {} if quantization is None else {"quantization_config": quantization}
    model: PreTrainedModel = getattr(transformers, auto_class).from_pretrained(
        args.model_name_or_path,
        dtype=dtype,
        attn_implementation=choose_attention(args.attn_implementation),
        device_map=device_map,
        **settings,
        **config,
    )
    _pack_whole_blocks_only(model)
    return model


def _pack_whole_blocks_only(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing weights for AVX-512 that its packed form cannot hold (tiny models have them)."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and (
            module.out_features % 32 or module.in_features % 64
        ):
            module.support_avx512bf16_for_cpu = False


def create_model(args: ExtendArguments, vocabulary: int, attention: str) -> PreTrainedModel:
    """A model with random weights from --config_name and --config_overrides, with `vocabulary` rows."""
    from transformers import AutoModelForCausalLM

    assert args.config_name is not None
    path = Path(args.config_name)
    config = load_config(str(path.parent if path.name == "config.json" else path)) if path.exists() else None
    if config is None:
        raise InputError(f"--config_name {args.config_name}: no such folder or file")
    for override in (args.config_overrides or "").split(","):
        if not override:
            continue
        name, equals, text = override.partition("=")
        if not equals or not hasattr(config, name):
            raise InputError(f"--config_overrides {override}: need name=value with a name of {type(config).__name__}")
        old = getattr(config, name)
        value = text.lower() == "true" if isinstance(old, bool) else type(old)(text)
        setattr(config, name, value)
    config.vocab_size = vocabulary
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=choose_attention(attention)
    )
    return model


# ---------------------------------------------------------------- vocabulary


def check_vocabulary(rows: int, tokenizer: PreTrainedTokenizerBase, may_grow: bool) -> None:
    """Raises: InputError if the tokenizer has ids the model has no rows for and growing was not allowed."""
    if len(tokenizer) > rows and not may_grow:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {rows} embedding rows: new rows would stay "
            "untrained; train them with --modules_to_save embed_tokens,lm_head, or pass --resize_embeddings, or the "
            "model's own tokenizer"
        )


def extend_vocabulary(
    model: PreTrainedModel,
    old_tokenizer: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    seed: int,
) -> int:
    """Give embed_tokens and lm_head rows for every token of a larger tokenizer; returns how many were added.

    Rows the model has beyond its old tokenizer (padding) are initialised too. Methods: see --embedding_init.
    """
    rows = full_shape(model.get_input_embeddings().weight)[0]
    first_new = min(rows, len(old_tokenizer)) if old_tokenizer is not None else rows
    if len(tokenizer) <= first_new:
        return 0
    if len(tokenizer) > rows:
        model.resize_token_embeddings(embedding_rows(tokenizer), mean_resizing=False)
    initialise_rows(model, old_tokenizer, tokenizer, method, first_new, seed)
    return len(tokenizer) - first_new


def check_extends(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> None:
    """Raises: InputError unless the new tokenizer has every token of the old one at its old id."""
    ids = list(range(len(old)))
    for index, token in enumerate(old.convert_ids_to_tokens(ids)):
        other = new.convert_ids_to_tokens(index) if index < len(new) else None
        if token != other:
            raise InputError(
                f"token {index} is {token!r} in the model's tokenizer but {other!r} in {new.name_or_path}: the new "
                "vocabulary must extend the model's own; pass one that merge_tokenizers.py made from this base"
            )


@torch.no_grad()
def initialise_rows(
    model: PreTrainedModel,
    old_tokenizer: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    first_new: int,
    seed: int,
) -> None:
    """Set the rows from `first_new` on of embed_tokens and (untied) lm_head. Raises: InputError as
    extend_vocabulary."""
    if method == "mean_of_pieces" and old_tokenizer is None:
        raise InputError(
            "--embedding_init mean_of_pieces needs the old tokenizer in the model's folder; copy it there or pass mean"
        )
    pieces: Sequence[Sequence[int]] = []
    if method == "mean_of_pieces" and old_tokenizer is not None:
        pieces = [segment_with(old_tokenizer, tokenizer, index) for index in range(first_new, len(tokenizer))]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for weight in [embedding] if head is embedding else [embedding, head]:
        with whole_weights([weight]):
            weight[first_new:] = _new_rows(weight, first_new, pieces, method, seed).to(weight)


def _new_rows(weight: Tensor, first_new: int, pieces: Sequence[Sequence[int]], method: str, seed: int) -> Tensor:
    """Rows (new, H) in float32 on the CPU; rows past the tokenizer (padding) get the mean."""
    old = weight[:first_new].float().cpu()
    count = weight.shape[0] - first_new
    mean = old.mean(0)
    if method == "zero":
        return torch.zeros(count, old.shape[1])
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return mean + old.std(0) * torch.randn(count, old.shape[1], generator=generator)
    rows = mean.repeat(count, 1)
    for index, ids in enumerate(pieces):
        if ids:
            rows[index] = old[list(ids)].mean(0)
    return rows


# ---------------------------------------------------------------- adapters


def build_training_model(
    model_args: ModelArguments,
    extend_args: ExtendArguments,
    lora_args: LoraArguments,
    tokenizer: PreTrainedTokenizerBase,
    compute_dtype: torch.dtype,
    seed: int,
) -> PreTrainedModel:
    """Load or create the model with a row for every token, weights in training precision, and its LossHead.

    attach_adapter comes next, unless every weight is trained. Raises: InputError.
    """
    if extend_args.config_name:
        model = create_model(extend_args, embedding_rows(tokenizer), model_args.attn_implementation)
    else:
        device_map = {"": int(os.environ.get("LOCAL_RANK", 0))} if torch.cuda.is_available() else {"": "cpu"}
        model = load_model(model_args, compute_dtype, device_map if model_args.load_in_kbits != 16 else None)
        old_tokenizer = find_tokenizer(model_args.model_name_or_path)
        added = extend_vocabulary(model, old_tokenizer, tokenizer, extend_args.embedding_init, seed)
        if added:
            logger.info("%d rows of embed_tokens and lm_head are new, set by %s", added, extend_args.embedding_init)
    if lora_args.full_finetuning and model_args.dtype == "auto":
        model.float()  # AdamW in 16 bits loses small updates; arithmetic still runs in the training precision
    if lora_args.output_router_logits:
        model.config.output_router_logits = True
    install_loss_head(model)
    return model


def find_tokenizer(name_or_path: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder, None if the folder has none."""
    try:
        return load_tokenizer(str(name_or_path))
    except InputError:
        return None


def check_training_request(
    model_args: ModelArguments,
    extend_args: ExtendArguments,
    lora_args: LoraArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Find, before data is read, what would fail once weights are loaded. Raises: InputError."""
    if extend_args.config_name:
        if not lora_args.full_finetuning:
            raise InputError("--config_name makes a model from scratch: add --full_finetuning")
        return
    if not model_args.model_name_or_path:
        raise InputError("pass --model_name_or_path (a model to go on with) or --config_name (a new model)")
    config = load_config(model_args.model_name_or_path)
    old_tokenizer = find_tokenizer(model_args.model_name_or_path)
    if old_tokenizer is not None:
        check_extends(old_tokenizer, tokenizer)
    if Path(model_args.model_name_or_path).is_dir():
        check_readable(model_args.model_name_or_path)
    if lora_args.full_finetuning and model_args.load_in_kbits != 16:
        raise InputError(
            f"--full_finetuning cannot train {model_args.load_in_kbits}-bit weights; use LoRA, or 16 bits"
        )
    trained = set((lora_args.modules_to_save or "").split(","))
    if lora_args.adapter_name_or_path:
        trained = set(load_adapter_config(lora_args.adapter_name_or_path).modules_to_save)
        check_readable(lora_args.adapter_name_or_path)
    may_grow = lora_args.full_finetuning or extend_args.resize_embeddings or {"embed_tokens", "lm_head"} <= trained
    check_vocabulary(config.vocab_size, tokenizer, may_grow)


def attach_adapter(model: PreTrainedModel, args: LoraArguments, kbits: int, task_type: str = "CAUSAL_LM") -> Any:
    """Wrap a model for LoRA training, or open a trainable adapter to go on with; trainable weights become float32.

    Args: task_type: PEFT's; SEQ_CLS adds the model's `score` head to the modules trained in full.
    Raises: InputError for unknown modules, an adapter of another shape, or lm_head among target_modules.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if kbits != 16:
        # Not PEFT's prepare_model_for_kbit_training: it makes norms, embeddings and lm_head float32, and with them
        # hidden states, what checkpointing keeps, and the KV cache of PPO's answers: twice the memory.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # At the first pass in evaluation mode bitsandbytes would pack the weights for a kernel that has no
                # gradient, and whatever is trained below them would silently learn nothing more.
                module.support_avx512bf16_for_cpu = False
    if args.adapter_name_or_path:
        check_adapter_fits(args.adapter_name_or_path, model)
        wrapped: Any = PeftModel.from_pretrained(model, args.adapter_name_or_path, is_trainable=True)
    else:
        targets = resolve_target_modules(args.target_modules, model.config)
        saved = [name for name in (args.modules_to_save or "").split(",") if name]
        if "lm_head" in targets:
            raise InputError("lm_head cannot be in --target_modules; train it whole with --modules_to_save lm_head")
        config = LoraConfig(
            task_type=task_type,
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=targets,
            modules_to_save=saved or None,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            ensure_weight_tying=bool(saved) and bool(model.config.tie_word_embeddings),
        )
        wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()  # AdamW in 16 bits loses small updates
    return wrapped


def check_adapter_fits(adapter: str, model: PreTrainedModel) -> None:
    """Raises: InputError if the adapter's embeddings have other rows than the model, or its files are damaged."""
    load_adapter_config(adapter)
    rows = full_shape(model.get_input_embeddings().weight)[0]
    for name, shape in open_checkpoint(adapter).shapes.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and shape[0] != rows:
            raise InputError(
                f"adapter {adapter}: {name} has {shape[0]} rows, the model {rows}: they belong to different "
                "vocabularies; "
                f"pass --tokenizer_name_or_path {adapter} and the base model this adapter was trained on"
            )


def causal_model(model: nn.Module) -> Any:
    """The causal language model inside a PEFT model, or the model itself."""
    # Not by peft_config: PEFT leaves that on the inner model too.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for, also where 4-bit weights are packed or ZeRO-3 has spread them."""
    count = full_shape(parameter).numel()
    return 2 * count if parameter.__class__.__name__ == "Params4bit" else count


def trainable_summary(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) weights."""
    trainable = total = 0
    for parameter in model.parameters():
        count = count_weights(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def train_flops_per_token(model: nn.Module, tokens_per_row: float) -> float:
    """Model FLOPs of one training token: 2 forward, 2 for input gradients, 2 for the gradients of trained weights.

    Plus causal attention, 6 L H T. Embedding look-ups count nothing. Source: Kaplan et al. 2020, section 2.1.
    """
    config = model.config
    frozen = trained = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or ".original_module." in name:
            continue
        count = count_weights(parameter)
        if getattr(config, "num_local_experts", None) and ".experts." in name:
            count = count * config.num_experts_per_tok // config.num_local_experts
        trained, frozen = (trained + count, frozen) if parameter.requires_grad else (trained, frozen + count)
    if getattr(config, "tie_word_embeddings", False):
        trained += config.vocab_size * config.hidden_size
    return 6.0 * trained + 4.0 * frozen + 6.0 * config.num_hidden_layers * config.hidden_size * tokens_per_row
