"""Inference: the files of the model that is to answer, whether they belong together, and loading it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .adapters import Replace, plan_updates
from .arguments import InferenceArguments
from .checkpoints import local_folder, open_checkpoint
from .files import InputError
from .lora import EMBEDDING, HEAD, load_adapter_config
from .modeling import bf16_is_supported, load_config, load_model
from .rope import install_row_rotary, rope_overrides, scale_rope
from .tokenization import embedding_rows, has_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def find_inference_files(args: InferenceArguments) -> InferenceArguments:
    """The arguments with folders filled in: the base an adapter records, the tokenizer of the adapter or the base.

    Raises: InputError if one of them is not there.
    """
    if "," in (args.adapter_name_or_path or ""):
        raise InputError(
            f"--lora_model {args.adapter_name_or_path}: one adapter can be used here; merge several first"
        )
    adapter = local_folder(args.adapter_name_or_path) if args.adapter_name_or_path else None
    recorded = load_adapter_config(adapter).base_model_name_or_path if adapter else None
    if not (args.model_name_or_path or recorded):
        raise InputError("pass --base_model: a model folder or hub id")
    base = local_folder(args.model_name_or_path or recorded or "")
    tokenizer = args.tokenizer_name_or_path
    if tokenizer is None:
        tokenizer = str(adapter if adapter is not None and has_tokenizer(adapter) else base)
    return dataclasses.replace(
        args,
        model_name_or_path=str(base),
        adapter_name_or_path=str(adapter) if adapter else None,
        tokenizer_name_or_path=tokenizer,
    )


def check_inference_request(args: InferenceArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Find, before weights are read, whether base, adapter and tokenizer belong together; `args` has its folders.

    Returns: the config; its vocab_size counts the rows that an adapter adds, its window is the one asked for.
    Raises: InputError.
    """
    assert args.model_name_or_path is not None
    config = load_config(args.model_name_or_path)
    scale_rope(config, args)
    shapes = dict(open_checkpoint(args.model_name_or_path).shapes)
    old_rows = config.vocab_size
    if adapter := args.adapter_name_or_path:
        if config.tie_word_embeddings and EMBEDDING in shapes:
            shapes.setdefault(HEAD, shapes[EMBEDDING])
        tensors = open_checkpoint(adapter).shapes
        updates = plan_updates(load_adapter_config(adapter), tensors, shapes)
        rows = {
            name: next(
                (tensors[u.source][0] for u in updates.get(name, ()) if isinstance(u, Replace)), shapes[name][0]
            )
            for name in (EMBEDDING, HEAD)
            if name in shapes
        }
        if len(set(rows.values())) > 1:
            raise InputError(f"adapter {adapter}: embed_tokens and lm_head get different rows {rows}; train both")
        config.vocab_size = rows.get(EMBEDDING, old_rows)
    check_tokenizer_fits(tokenizer, config.vocab_size, old_rows, args.adapter_name_or_path)
    return config


def check_tokenizer_fits(
    tokenizer: PreTrainedTokenizerBase, rows: int, old_rows: int, adapter: str | None = None
) -> None:
    """Raises: InputError unless `rows` embeddings, grown by an adapter from `old_rows`, are this tokenizer's."""
    size = len(tokenizer)
    owner = f"adapter's embeddings have {rows} rows (the base has {old_rows})" if adapter else f"model has {rows} rows"
    remedy = f"pass --tokenizer_path {adapter}, or the" if adapter else "pass the model's own --tokenizer_path, or the"
    if size > rows:
        raise InputError(
            f"the tokenizer has {size} tokens but the {owner}: they come from different runs; "
            f"{remedy} {'adapter' if adapter else 'model'} that was trained with this tokenizer"
        )
    padded = rows in {embedding_rows(tokenizer), *(math.ceil(size / 2**n) * 2**n for n in range(10))}
    if size <= old_rows < rows and not padded:
        raise InputError(
            f"the tokenizer has {size} tokens but the {owner}: it is the tokenizer from before the vocabulary grew; "
            f"{remedy} folder of the trained tokenizer"
        )


def load_for_inference(
    args: InferenceArguments, config: PreTrainedConfig, adapters: Mapping[str, str] | None = None
) -> Any:
    """The model, ready to answer: 16-bit or k-bit weights, the adapter with its grown vocabulary, no dropout.

    Args:
        args: with the folders of find_inference_files.
        config: what check_inference_request returned.
        adapters: folders of further adapters by name; with them the result is a PeftModel that has them.
    """
    from transformers import GenerationConfig

    device_map: Any = {"": "cpu"}
    if torch.cuda.is_available() and not args.only_cpu:
        device_map = "auto" if torch.cuda.device_count() > 1 else {"": 0}
    compute_dtype = torch.bfloat16 if bf16_is_supported() else torch.float32
    if args.dtype != "auto":
        compute_dtype = getattr(torch, args.dtype)
    elif compute_dtype == torch.float32 and torch.cuda.is_available():
        compute_dtype = torch.float16
    model = load_model(args, compute_dtype, device_map, **rope_overrides(config))
    if args.adapter_name_or_path:
        if config.vocab_size > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        model = _add_adapter(model, args.adapter_name_or_path)
    if auto_ntk := getattr(config, "auto_ntk", None):
        model.config.auto_ntk = auto_ntk
        install_row_rotary(model)
    if args.torch_compile:
        compile_layers(model)
    # What the model's own file says about sampling would mix with the settings asked for.
    model.generation_config = GenerationConfig()
    if adapters:
        return _wrap(model, adapters).eval()
    return model.eval()


def compile_layers(model: PreTrainedModel) -> None:
    """Let torch.compile fuse what stands around attention in every layer: the norms, and the experts or the MLP.

    Attention itself reads a cache whose shape changes with every pass, which would be compiled anew each time.
    """
    for layer in model.get_decoder().layers:
        for name, part in layer.named_children():
            if name != "self_attn":
                part.compile(dynamic=True)


def _add_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with the adapter's layers in it, in the model's own precision."""
    inner: PreTrainedModel = _wrap(model, {"default": adapter}).get_base_model()
    return inner


def _wrap(model: PreTrainedModel, adapters: Mapping[str, str]) -> Any:
    """A PeftModel with these adapters, by name, in the model's own precision."""
    from peft import PeftModel

    dtype = model.dtype
    (first, folder), *others = adapters.items()
    wrapped = PeftModel.from_pretrained(model, folder, adapter_name=first, torch_device=str(model.device))
    for name, folder in others:
        wrapped.load_adapter(folder, adapter_name=name, torch_device=str(model.device))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or ".modules_to_save." in name or "token_adapter" in name:
            parameter.data = parameter.data.to(dtype)
    return wrapped
