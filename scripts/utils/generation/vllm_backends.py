"""What vLLM is told about a model: the options of its Python class, which are those of `vllm serve`."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.arguments import InferenceArguments
from ..core.errors import InputError
from ..lora.config import load_adapter_config
from ..models.rope import need_one_rotation, rope_overrides

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM lets --max-lora-rank be
TEMPLATE_FILE = "chat_template.jinja"


def is_installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


def engine_options(
    args: InferenceArguments,
    config: PreTrainedConfig,
    adapters: Mapping[str, str],
    max_batch_size: int,
    context: int,
) -> dict[str, Any]:
    """What vllm.AsyncEngineArgs takes; `vllm serve` takes the same with dashes. Raises: InputError."""
    if args.only_cpu:
        raise InputError("--only_cpu: vLLM needs GPUs; use --engine llama.cpp or transformers on the CPU")
    if args.load_in_kbits == 8:
        raise InputError("--load_in_8bit: vLLM's bitsandbytes has 4 bits only; use quantize.py --method fp8 or gptq")
    options: dict[str, Any] = {"model": args.model_name_or_path}
    if args.tokenizer_name_or_path != args.model_name_or_path:
        options["tokenizer"] = args.tokenizer_name_or_path
    if args.dtype != "auto":
        options["dtype"] = args.dtype
    options |= {"max_model_len": context, "max_num_seqs": max_batch_size}
    if args.rope_scaling != "none":
        need_one_rotation(config, "vLLM")
        options["hf_overrides"] = rope_overrides(config)
    if args.load_in_kbits == 4:
        options["quantization"] = "bitsandbytes"
    if args.gpus and (count := len(args.gpus.split(","))) > 1:
        options["tensor_parallel_size"] = count
    if adapters:
        rank = max(_lora_rank(name, folder) for name, folder in adapters.items())
        if rank > LORA_RANKS[-1]:
            raise InputError(
                f"an adapter has rank {rank}, vLLM takes up to {LORA_RANKS[-1]}; merge it with run_merge.sh"
            )
        options |= {"enable_lora": True, "max_loras": len(adapters)}
        options["max_lora_rank"] = next(size for size in LORA_RANKS if size >= rank)
    return options


def _lora_rank(name: str, folder: str) -> int:
    """The largest rank in an adapter. Raises: InputError if it is more than low-rank updates of linear layers."""
    adapter = load_adapter_config(folder)
    more = [*adapter.modules_to_save, *adapter.trainable_token_indices, *(["DoRA"] if adapter.use_dora else [])]
    if more:
        raise InputError(
            f"adapter {name} ({folder}) has {', '.join(more)} besides LoRA, which vLLM cannot add to a base; merge it:"
            f" MODEL={adapter.base_model_name_or_path or 'BASE'} LORA={folder} bash scripts/run_merge.sh"
        )
    return max([adapter.rank, *adapter.rank_pattern.values()])


def serve_command(
    options: Mapping[str, Any], adapters: Mapping[str, str], gpus: str | None, template: str | None
) -> str:
    """The `vllm serve` command of some engine options; a chat template is written into a file first."""
    words = ["vllm", "serve", str(options["model"]), "--host", "127.0.0.1"]
    for name, value in options.items():
        if name not in ("model", "max_num_seqs"):  # a server's own limit is its own
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [json.dumps(value) if isinstance(value, dict) else str(value)]
    if adapters:
        words += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    command = ("" if gpus is None else f"CUDA_VISIBLE_DEVICES={gpus} ") + shlex.join(words)
    if template is None:
        return command
    return f"printf %s {shlex.quote(template)} > {TEMPLATE_FILE} && {command} --chat-template {TEMPLATE_FILE}"
