"""The model that is trained: checked, loaded, grown, with its adapter; its size and FLOPs."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.arguments import ExtendArguments, LoraArguments, ModelArguments
from ..core.errors import InputError
from ..lora.adapter_folder import load_with_peft, names_experts, read_adapter
from ..lora.config import load_adapter_config, resolve_target_modules
from ..lora.updates import Replace, ReplaceRows, peft_spelling
from ..text.tokenizer import embedding_rows
from ..weights.config import expert_count, load_config, local_folder, model_of_shapes
from ..weights.model_folder import ModelFolder, read_model
from ..weights.names import EMBEDDING, EXPERT_PARTS, HEAD, SCORE, is_embedding
from ..weights.reader import open_checkpoint
from .dropout import quicken_dropout
from .experts import check_linear_experts
from .gathering import full_shape
from .lm_loss import LossHead, install_loss_head, restore_loss_heads
from .loading import check_loading, create_model, load_model, new_config, training_dtype
from .new_rows import (
    UNTRAINED,
    check_extends,
    extend_vocabulary,
    find_tokenizer,
    first_new_row,
    refuse_untrained_rows,
)
from .rope import rope_overrides, scaled_config
from .sequence_parallel import check_sequence_parallel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The loss in chunks is computed in the head itself, which has to have the whole matrix.
UPDATED_HEAD = (
    "it updates lm_head by parts (low-rank, or some rows), which cannot be trained on here; merge it with "
    "run_merge.sh, and begin a new adapter with --modules_to_save embed_tokens,lm_head"
)
# Names of --target_modules that mean experts and routers in a mixture.
ROUTED = {"gate", *EXPERT_PARTS[0], *EXPERT_PARTS[1]}
TRAINING = "training"  # as an engine: it rotates all texts alike
HEADS = tuple(name.removesuffix(".weight") for name in (HEAD, SCORE))


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
        # Those that a config has, if only by its class's defaults, are another vocabulary's: answers would end there.
        for config in (model.config, model.generation_config):
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    else:
        device_map = {"": int(os.environ.get("LOCAL_RANK", 0))} if torch.cuda.is_available() else {"": "cpu"}
        dtype: Any = training_dtype(model_args.dtype, compute_dtype, lora_args.full_finetuning)
        args = replace(model_args, dtype=dtype)
        window = {}
        if extend_args.rope_scaling != "none":
            config = read_model(str(model_args.model_name_or_path)).config
            window = rope_overrides(scaled_config(config, extend_args, TRAINING))
        model = load_model(
            args,
            compute_dtype,
            device_map if model_args.load_in_kbits != 16 else None,
            adapts_experts=adapts_experts(lora_args, load_config(str(model_args.model_name_or_path))),
            **window,
        )
        old_tokenizer = find_tokenizer(model_args.model_name_or_path)
        added = extend_vocabulary(model, old_tokenizer, tokenizer, extend_args.embedding_init, seed)
        if added:
            logger.info("%d rows of embed_tokens and lm_head are new, set by %s", added, extend_args.embedding_init)
    if lora_args.output_router_logits:
        model.config.output_router_logits = True
    install_loss_head(model)
    return model


def check_training_request(
    model_args: ModelArguments,
    extend_args: ExtendArguments,
    lora_args: LoraArguments,
    tokenizer: PreTrainedTokenizerBase,
    length: int = 0,
    full_rows: bool = False,
    sequence_parallel_size: int = 1,
) -> None:
    """Find, before data is read, what would fail once weights are loaded.

    Args:
        length: the longest row in tokens; beyond the model's window there is a warning.
        full_rows: all rows are that long; beyond the window that is an error.
        sequence_parallel_size: processes that share a row.
    Raises: InputError.
    """
    check_loading(model_args)
    attention = model_args.attn_implementation
    if full_rows and length % sequence_parallel_size:
        raise InputError(
            f"--block_size {length}: --sequence_parallel_size {sequence_parallel_size} cuts a row into equal parts; "
            f"pass a multiple of {sequence_parallel_size}"
        )
    if extend_args.config_name:
        if extend_args.train_new_rows_only:
            raise InputError("--train_new_rows_only: in a model from scratch all rows are new; leave it out")
        if not lora_args.full_finetuning:
            raise InputError("--config_name makes a model from scratch: add --full_finetuning")
        if extend_args.rope_scaling != "none":
            raise InputError(
                f"--rope_scaling {extend_args.rope_scaling} makes the window of a trained model longer; a model from "
                "scratch has the one that its config says: --config_overrides max_position_embeddings=16384"
            )
        config = new_config(extend_args, embedding_rows(tokenizer))
        _check_window(config, length, full_rows)
        check_sequence_parallel(sequence_parallel_size, config, attention)
        return
    if not model_args.model_name_or_path:
        raise InputError("pass --model_name_or_path (a model to go on with) or --config_name (a new model)")
    base = read_model(model_args.model_name_or_path)
    if extend_args.rope_scaling != "none" and not lora_args.full_finetuning:
        raise InputError(
            f"--rope_scaling {extend_args.rope_scaling}: an adapter has no config that would carry the longer window "
            "on; make a base with it first (merge_llama2_with_chinese_lora_low_mem.py --base_model BASE --output_dir "
            f"LONG --rope_scaling {extend_args.rope_scaling}) and train on that, or add --full_finetuning"
        )
    config = scaled_config(base.config, extend_args, TRAINING)
    _check_window(config, length, full_rows)
    check_sequence_parallel(sequence_parallel_size, config, attention)
    old_tokenizer = find_tokenizer(model_args.model_name_or_path)
    if old_tokenizer is not None:
        check_extends(old_tokenizer, tokenizer)
    check_bits(model_args, lora_args)
    check_modules(lora_args, base.config)
    check_experts(model_args, lora_args, base)
    trained = _whole_modules(lora_args, base)
    if extend_args.train_new_rows_only:
        if not (lora_args.full_finetuning or any(map(is_embedding, trained))):
            raise InputError(f"--train_new_rows_only: {UNTRAINED}")
        first_new_row(model_args.model_name_or_path, tokenizer)
    may_grow = lora_args.full_finetuning or extend_args.resize_embeddings or {"embed_tokens", "lm_head"} <= trained
    if not may_grow:
        refuse_untrained_rows(tokenizer, base.config.vocab_size)


def adapts_experts(args: LoraArguments, config: PreTrainedConfig) -> bool:
    """Whether a mixture's experts or routers get a LoRA update of their own, and so must be linear layers."""
    if args.full_finetuning or not expert_count(config):
        return False
    if args.adapter_name_or_path:
        return names_experts(args.adapter_name_or_path)
    targets = {name.rpartition(".")[2] for name in resolve_target_modules(args.target_modules, config)}
    return not targets.isdisjoint(ROUTED)


def check_experts(model_args: ModelArguments, lora_args: LoraArguments, base: ModelFolder) -> None:
    """Raises: InputError where a mixture is to be trained in a way that its experts cannot be."""
    if not expert_count(base.config):
        if lora_args.output_router_logits:
            raise InputError(
                f"--output_router_logits: {base.folder} is a {base.config.model_type} model, which has no router; "
                "leave it out"
            )
        return
    if model_args.load_in_kbits != 16:
        check_linear_experts(base, f"--load_in_kbits {model_args.load_in_kbits}")
        if lora_args.adapter_name_or_path and not names_experts(lora_args.adapter_name_or_path, True):
            raise InputError(
                f"--adapter_name_or_path {lora_args.adapter_name_or_path} holds a layer's experts in stacks, which "
                f"--load_in_kbits {model_args.load_in_kbits} cannot take: leave the latter out, or merge the adapter"
            )
    elif adapts_experts(lora_args, base.config):
        check_linear_experts(base, f"--target_modules {lora_args.target_modules}")
    elif lora_args.target_modules in ("all", "all-linear") and not lora_args.full_finetuning:
        logger.warning(
            "--target_modules all: the experts of a %s model are one tensor a layer and get no update",
            base.config.model_type,
        )


def check_bits(model_args: ModelArguments, lora_args: LoraArguments) -> None:
    """Raises: InputError where weights of few bits would have to be trained themselves."""
    if lora_args.full_finetuning and model_args.load_in_kbits != 16:
        raise InputError(
            f"--full_finetuning cannot train {model_args.load_in_kbits}-bit weights; use LoRA, or 16 bits"
        )


def _whole_modules(args: LoraArguments, base: ModelFolder) -> set[str]:
    """What is trained whole beside LoRA. Raises: InputError for an adapter that cannot be trained on."""
    if not args.adapter_name_or_path:
        return set(split_names(args.modules_to_save))
    adapter = read_adapter(args.adapter_name_or_path, base)
    of_head = any(not isinstance(update, Replace) for update in adapter.updates.get(HEAD, ()))
    rows = any(isinstance(update, ReplaceRows) for update in adapter.updates.get(EMBEDDING, ()))
    if of_head or (rows and base.config.tie_word_embeddings):
        raise InputError(f"--adapter_name_or_path {args.adapter_name_or_path}: {UPDATED_HEAD}")
    return set(adapter.config.modules_to_save)


def split_names(names: str | None) -> list[str]:
    """The names of a comma-separated list, without the spaces around them."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def check_modules(
    args: LoraArguments, config: PreTrainedConfig, auto_class: str = "AutoModelForCausalLM", **settings: Any
) -> None:
    """Raises: InputError for names of --target_modules and --modules_to_save that no module of the model has.

    Args: auto_class, settings: as load_model has them.
    """
    if args.full_finetuning or args.adapter_name_or_path:
        return
    if "lm_head" in resolve_target_modules(args.target_modules, config):
        raise InputError("lm_head cannot be in --target_modules; train it whole with --modules_to_save lm_head")
    wanted = split_names(args.modules_to_save)
    if not wanted:
        return
    shaped = copy.deepcopy(config)
    shaped.update(settings)
    names = [name for name, _ in model_of_shapes(shaped, auto_class).named_modules()]
    # As PEFT takes them: a module's name, or the end of its path.
    if unknown := [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in names)]:
        known = dict.fromkeys(path.rpartition(".")[2] for path in names)
        has = ", ".join(name for name in known if name and not name.isdecimal())
        raise InputError(
            f"--modules_to_save {args.modules_to_save}: no module is called {', '.join(unknown)}; the model has {has}"
        )


def _check_window(config: PreTrainedConfig, length: int, full_rows: bool) -> None:
    """Raises: InputError where all rows are longer than the window; where some may be, it is said."""
    window = getattr(config, "max_position_embeddings", None)
    if full_rows and window is not None and length > window:
        raise InputError(
            f"--block_size {length}: the model's window has {window} tokens, by the max_position_embeddings of its "
            f"config; lower it, or make the window longer: --rope_scaling yarn --rope_factor {-(-length // window)}"
        )
    warn_beyond_window(config, length)


def warn_beyond_window(config: PreTrainedConfig, length: int) -> None:
    """Say it where rows of `length` tokens are longer than the model's window."""
    window = getattr(config, "max_position_embeddings", None)
    if window is not None and length > window:
        logger.warning(
            "rows of %d tokens, but the model's window has %d: what stands beyond is learned at positions that the "
            "model has never seen; lower --block_size (pt.py) or --max_seq_length, or take a base of a longer window",
            length,
            window,
        )


def attach_adapter(model: PreTrainedModel, args: LoraArguments, kbits: int, task_type: str = "CAUSAL_LM") -> Any:
    """Wrap a model for LoRA training, or open a trainable adapter to go on with; trainable weights become float32.

    Args: task_type: PEFT's; SEQ_CLS adds the model's `score` head to the modules trained in full.
    Raises: InputError for unknown modules, an adapter of another shape, or lm_head among target_modules.
    """
    from peft import LoraConfig, get_peft_model

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
        wrapped: Any = load_with_peft(model, {"default": args.adapter_name_or_path}, is_trainable=True)
    else:
        targets = resolve_target_modules(args.target_modules, model.config)
        saved = split_names(args.modules_to_save)
        if "lm_head" in targets:
            raise InputError("lm_head cannot be in --target_modules; train it whole with --modules_to_save lm_head")
        is_tied = bool(model.config.tie_word_embeddings)
        config = LoraConfig(
            task_type=task_type,
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=targets,
            modules_to_save=saved or None,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            ensure_weight_tying=is_tied and not {"embed_tokens", "lm_head"}.isdisjoint(saved),
        )
        wrapped = get_peft_model(model, config)
    restore_loss_heads(wrapped)
    for wrapper in wrapped.modules():  # PEFT may have wrapped a head that is tied to what the adapter updates
        if isinstance(getattr(wrapper, "base_layer", None), LossHead):
            raise InputError(UPDATED_HEAD)
    for config in wrapped.peft_config.values():
        if isinstance(config.target_modules, set):  # whose order in adapter_config.json changes from run to run
            config.target_modules = sorted(config.target_modules)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()  # AdamW in 16 bits loses small updates
    convert_at_borders(wrapped)
    quicken_dropout(wrapped)
    return wrapped


def convert_at_borders(wrapped: nn.Module) -> None:
    """Let modules of a PEFT model that are trained whole, in float32, stand between layers of 16 bits.

    Under autocast the kernels convert by themselves; PPO generates, and reward models score, without it.
    """
    from peft.utils import ModulesToSaveWrapper

    for name, wrapper in wrapped.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        base = next(wrapper.original_module.parameters()).dtype
        if base not in (torch.float16, torch.bfloat16):
            continue
        is_head = name.endswith(HEADS)  # nothing comes behind a head, and its results stay as exact as they are
        for module in wrapper.modules_to_save.values():
            module.register_forward_pre_hook(_take)
            if not is_head:
                module.register_forward_hook(partial(_give, wrapper.original_module))


# Types are read in each pass: DeepSpeed converts all weights of a model once it has it.
def _take(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_convert(value, next(module.parameters()).dtype) for value in inputs)


def _give(original: nn.Module, module: nn.Module, inputs: Any, output: Any) -> Any:
    return _convert(output, next(original.parameters()).dtype)


def _convert(value: Any, dtype: torch.dtype) -> Any:
    converts = torch.is_tensor(value) and value.is_floating_point()
    return value.to(dtype) if converts and not torch.is_autocast_enabled(value.device.type) else value


def check_adapter_fits(adapter: str, model: PreTrainedModel) -> None:
    """Raises: InputError if the adapter's embeddings have other rows than the model, or its files are damaged."""
    folder = local_folder(adapter, "adapter")
    load_adapter_config(folder)
    rows, shapes = full_shape(model.get_input_embeddings().weight)[0], open_checkpoint(folder).shapes
    for name, old in peft_spelling(shapes).items():
        if name.endswith((EMBEDDING, HEAD)) and shapes[old][0] != rows:
            raise InputError(
                f"adapter {adapter}: {old} has {shapes[old][0]} rows, the model {rows}: they belong to different "
                "vocabularies; "
                f"pass --tokenizer_name_or_path {adapter} and the base model this adapter was trained on"
            )


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
        if ".experts." in name:
            count = count * config.num_experts_per_tok // expert_count(config)
        trained, frozen = (trained + count, frozen) if parameter.requires_grad else (trained, frozen + count)
    if getattr(config, "tie_word_embeddings", False):
        trained += config.vocab_size * config.hidden_size
    return 6.0 * trained + 4.0 * frozen + 6.0 * config.num_hidden_layers * config.hidden_size * tokens_per_row
