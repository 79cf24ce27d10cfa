"""Flags of a training command -> what is planned. They are parsed by the dataclasses of the training scripts."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..core.arguments import DataArguments, ExtendArguments, LoraArguments, ModelArguments
from ..core.errors import InputError
from ..core.files import read_json
from ..data.arguments import PretrainingArguments, TuningArguments
from ..generation.cache import GROWTH
from ..lora.config import load_adapter_config
from ..models.gathering import whole_models_loaded
from ..models.loading import choose_attention, new_config, training_dtype
from ..models.sequence_parallel import check_sequence_parallel
from ..models.training_model import check_bits, check_modules
from ..rlhf.arguments import PPOArguments, PreferenceArguments, RewardArguments, RewardModelArguments, RolloutArguments
from ..rlhf.dpo_trainer import REFERENCE_LOSSES
from ..rlhf.reward_model import find_reward_model
from ..training.arguments import RunArguments
from ..training.flags import REFUSED_FOR_PAIRS, check_shared_rows, set_aside
from ..training.memory import PlannedMemory
from ..weights.config import load_config
from ..weights.model_folder import REWARD_MODEL
from .advice import describe
from .memory import Rollouts, Setting, Sharing, plan
from .stages import Job, Stage, count_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# The dataclasses of each training script, but for RunArguments, in the order of its main.
STAGES: dict[str, tuple[type, ...]] = {
    "pt": (ModelArguments, ExtendArguments, LoraArguments, DataArguments, PretrainingArguments),
    "sft": (ModelArguments, ExtendArguments, LoraArguments, DataArguments, TuningArguments),
    "rm": (ModelArguments, LoraArguments, DataArguments, RewardModelArguments),
    "ppo": (ModelArguments, LoraArguments, DataArguments, RolloutArguments, RewardArguments, PPOArguments),
    "dpo": (ModelArguments, LoraArguments, DataArguments, PreferenceArguments),
}
Part = TypeVar("Part")


@dataclass
class PlannedRun(RunArguments):
    """RunArguments that start nothing: DeepSpeed and FSDP are taken note of, and no process group is made."""

    def __post_init__(self) -> None:
        self.sharing = (self.deepspeed, self.fsdp, self.fsdp_config)
        self.deepspeed = self.fsdp = self.fsdp_config = None
        super().__post_init__()


def read_request(
    stage: Stage,
    arguments: Sequence[Any],
    run: RunArguments,
    *,
    on_gpu: bool,
    processes: int = 1,
    vocabulary: int | None = None,
    length: int | None = None,
) -> Setting:
    """What a run with these arguments needs memory for.

    Args:
        arguments: an instance of each of STAGES[stage].
        vocabulary: rows that embeddings will have, if they grow.
        length: tokens of the longest row, where the data is known; else the longest that the flags allow.
    Raises: InputError, also for what training would refuse.
    """
    model_args, lora_args = _one(arguments, ModelArguments), _one(arguments, LoraArguments)
    extend_args = _one(arguments, ExtendArguments) if stage in ("pt", "sft") else ExtendArguments()
    check_bits(model_args, lora_args)
    config = _config(model_args, extend_args, vocabulary)
    check_modules(lora_args, config)
    parts = run.sequence_parallel_size
    if stage not in ("pt", "sft"):
        set_aside(run, {}, REFUSED_FOR_PAIRS)
    check_shared_rows(run, parts, processes)
    check_sequence_parallel(parts, config, model_args.attn_implementation)
    compute_dtype = _compute_dtype(run, on_gpu)
    dtype = _dtype(model_args, extend_args, lora_args, config, compute_dtype)
    rows, masked = run.per_device_train_batch_size, True
    reference, critic, rollouts, others = False, "head", None, 0.0
    if stage == "pt":
        settings = _one(arguments, PretrainingArguments)
        length, masked = length or settings.block_size, not settings.cross_document_attention
    elif stage == "sft":
        length = length or _one(arguments, TuningArguments).max_seq_length
    elif stage == "rm":
        # The prompt stands once, so that a row is longest where both answers fill the window.
        length = length or 2 * _one(arguments, RewardModelArguments).max_seq_length
    elif stage == "dpo":
        preference = _one(arguments, PreferenceArguments)
        length = length or 2 * preference.max_seq_length
        reference = preference.loss in REFERENCE_LOSSES and not (
            lora_args.full_finetuning or preference.precompute_reference or preference.reference_model
        )
    else:
        rollout, ppo = _one(arguments, RolloutArguments), _one(arguments, PPOArguments)
        length = length or rollout.max_prompt_length + rollout.max_new_tokens
        critic = ppo.critic
        rollouts = Rollouts(rollout.per_device_rollout_batch_size, GROWTH * math.ceil(length / GROWTH))
        others = _other_models(_one(arguments, RewardArguments), ppo, model_args, lora_args, config, compute_dtype)
    job = Job(
        stage,
        config,
        model_args,
        lora_args,
        dtype,
        compute_dtype,
        on_gpu,
        _attention(model_args.attn_implementation, on_gpu),
        rows,
        length,
        bool(getattr(run, "activation_checkpointing", False) or run.gradient_checkpointing),
        run.gradient_accumulation_steps > 1,
        masked,
        reference,
        critic,
        parts,
    )
    return Setting(
        job, str(getattr(run.optim, "value", run.optim)), _sharing(run, config, processes), rollouts, others
    )


def plan_run(
    stage: Stage, arguments: Sequence[Any], run: RunArguments, vocabulary: int | None = None, length: int | None = None
) -> PlannedMemory | None:
    """The plan of a run that is about to load its model; of the first process, and None where nothing can be planned.

    Args: vocabulary, length: see read_request.
    """
    if run.process_index != 0:
        return None
    try:
        with whole_models_loaded(run), torch.random.fork_rng(devices=[]):
            setting = read_request(
                stage,
                arguments,
                run,
                on_gpu=not run.use_cpu,
                processes=run.world_size,
                vocabulary=vocabulary,
                length=length,
            )
            planned = plan(setting)
    except Exception as error:  # a plan that fails is no reason not to train
        logger.warning("the memory of this run is not planned: %s: %s", type(error).__name__, error)
        return None
    return PlannedMemory(stage, describe(setting), planned.peak, planned.parts)


def _one(arguments: Sequence[Any], kind: type[Part]) -> Part:
    return next(part for part in arguments if isinstance(part, kind))


def _config(model_args: ModelArguments, extend_args: ExtendArguments, vocabulary: int | None) -> PreTrainedConfig:
    name = extend_args.config_name or model_args.model_name_or_path
    if not name:
        raise InputError("pass --model_name_or_path (a folder with config.json will do), or --config_name")
    path = Path(name).expanduser()
    config = load_config(str(path.parent if path.name == "config.json" else name))
    if extend_args.config_name:
        return new_config(extend_args, vocabulary or config.vocab_size)
    config = copy.deepcopy(config)
    if vocabulary is not None:
        config.vocab_size = max(vocabulary, config.vocab_size)
    return config


def _compute_dtype(run: RunArguments, on_gpu: bool) -> torch.dtype:
    """The type of products; planned for a GPU, what was asked for counts and not what this machine made of it."""
    if not on_gpu or torch.cuda.is_available():
        return run.compute_dtype
    asked = run.given
    if asked["fp16"] or asked["precision"] == "fp16":
        return torch.float16
    return torch.float32 if asked["precision"] == "fp32" else torch.bfloat16


def _dtype(
    model_args: ModelArguments,
    extend_args: ExtendArguments,
    lora_args: LoraArguments,
    config: PreTrainedConfig,
    compute_dtype: torch.dtype,
) -> torch.dtype:
    """The type of weights in memory."""
    if extend_args.config_name:
        return torch.float32
    name = training_dtype(model_args.dtype, compute_dtype, lora_args.full_finetuning)
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if model_args.load_in_kbits != 16:
        return compute_dtype
    stored = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, stored) if isinstance(stored, str) else stored


def _attention(requested: str, on_gpu: bool) -> str:
    planned_elsewhere = on_gpu and not torch.cuda.is_available()
    return requested if planned_elsewhere and requested == "flash_attention_2" else choose_attention(requested)


def _other_models(
    reward: RewardArguments,
    ppo: PPOArguments,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    config: PreTrainedConfig,
    compute_dtype: torch.dtype,
) -> float:
    """Bytes of a reference and a reward model of their own."""
    name = training_dtype(model_args.dtype, compute_dtype)
    stored = config.dtype or torch.float32
    size = (stored if name == "auto" else getattr(torch, name)).itemsize
    total = 0.0
    if ppo.reference_model or lora_args.full_finetuning:
        total += size * count_weights(load_config(ppo.reference_model) if ppo.reference_model else config)
    if reward.reward_model:
        base, adapter = find_reward_model(reward.reward_model)
        own = Path(str(model_args.model_name_or_path)).expanduser()
        if adapter is None or lora_args.full_finetuning or base.resolve() != own.resolve():
            total += size * count_weights(load_config(str(base)), REWARD_MODEL)
        else:
            total += 4.0 * load_adapter_config(adapter).rank * config.hidden_size * 14 * config.num_hidden_layers
    return total


# ---------------------------------------------------------------- several processes


def _sharing(run: RunArguments, config: PreTrainedConfig, processes: int) -> Sharing:
    deepspeed, fsdp, fsdp_config = getattr(run, "sharing", (run.deepspeed, run.fsdp, run.fsdp_config))
    if deepspeed:
        settings = deepspeed if isinstance(deepspeed, dict) else read_json(deepspeed)
        return _zero(settings.get("zero_optimization", {}), config.hidden_size, processes)
    if (fsdp and run.fsdp_config is not None) or (fsdp and hasattr(run, "sharing")):
        given = fsdp_config if isinstance(fsdp_config, dict) else read_json(fsdp_config) if fsdp_config else {}
        offloads = bool(given.get("cpu_offload", given.get("fsdp_offload_params", False)))
        return Sharing("fsdp", processes, optimizer_on_cpu=offloads, weights_on_cpu=offloads)
    return Sharing("ddp", processes)


def _zero(zero: dict[str, Any], hidden_size: int, processes: int) -> Sharing:
    """DeepSpeed's section; "auto" is what transformers puts there."""
    stage = int(zero.get("stage", 0))

    def number(name: str, default: float, auto: float) -> float:
        value = zero.get(name, default)
        return auto if value == "auto" else float(value)

    def on_cpu(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") in ("cpu", "nvme")

    return Sharing(
        f"zero{stage}" if stage else "ddp",
        processes,
        optimizer_on_cpu=on_cpu("offload_optimizer") or bool(zero.get("cpu_offload")),
        weights_on_cpu=on_cpu("offload_param"),
        bucket=number("reduce_bucket_size", 5e8, float(hidden_size) ** 2),
        gather_bucket=number("allgather_bucket_size", 5e8, 5e8),
        live=number("stage3_max_live_parameters", 1e9, 1e9),
        overlaps=bool(zero.get("overlap_comm", stage == 3)),
    )
