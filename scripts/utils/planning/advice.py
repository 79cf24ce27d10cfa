"""Settings that fit a GPU, the fastest first, and what each knob saves; time and price of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..core.errors import InputError
from ..models.sequence_parallel import check_sequence_parallel, heads_of
from ..training.memory import Record
from .ledger import Footprint
from .memory import GB, Plan, Setting, Sharing, plan, with_job
from .stages import Job, footprint

# Speeds relative to each other, by which suggestions are ordered; nothing else depends on them.
UNPACKING = 0.87  # QLoRA against LoRA, Qwen-7B on an A100: 2,825 against 3,244 tokens/s (Qwen's README)
ZERO3 = 0.98  # against ZeRO-2, 14B on 8 A800: 10.56 s against 10.32 s (ms-swift)
OFFLOAD = 0.5  # optimizer or weights in main memory: the bus is the limit
EAGER = 0.7
HALF_SPEED_TOKENS = 512.0  # a micro-batch of so many keeps a GPU half as busy as a large one
ZERO2_FILE, ZERO3_FILE = "scripts/configs/ds_zero2_no_offload.json", "scripts/configs/ds_zero3_offload.json"


@dataclass(frozen=True)
class Suggestion:
    """A setting that fits, and the flags that differ from those of the command.

    Attributes:
        speed: relative to the command's own setting.
    """

    plan: Plan
    flags: str
    speed: float


class Footprints:
    """Footprints of many jobs: they are linear in the rows of a micro-batch, so that one and two are rehearsed."""

    def __init__(self, on_rehearsal: Callable[[], Any] = lambda: None) -> None:
        self._on_rehearsal = on_rehearsal

    def of(self, job: Job) -> Footprint:
        """A job's."""
        if job.rows > 2:
            one, two = (self.of(replace(job, rows=rows)) for rows in (1, 2))
            return one.extended(two, job.rows - 1)
        self._on_rehearsal()
        return footprint(job)


def speed(setting: Setting) -> float:
    """Tokens a second, in no unit: forward and backward passes of the weights, and what slows them down."""
    job = setting.job
    passes = 3.0 if job.lora_args.full_finetuning else 2.0  # of each weight; those that learn need one more
    busy = job.rows * job.length / (job.rows * job.length + HALF_SPEED_TOKENS)
    result = busy / (passes + job.checkpointing)
    if job.model_args.load_in_kbits != 16:
        result *= UNPACKING
    if job.attention == "eager":
        result *= EAGER
    if setting.sharing.kind in ("zero3", "fsdp"):
        result *= ZERO3
    if setting.sharing.optimizer_on_cpu or setting.sharing.weights_on_cpu:
        result *= OFFLOAD
    return result


def knobs(setting: Setting, accumulation: int) -> Iterator[tuple[str, Setting]]:
    """Single changes of a setting that save memory, as flags."""
    job = setting.job
    lora = not job.lora_args.full_finetuning
    if not job.checkpointing:
        yield "--gradient_checkpointing", with_job(setting, checkpointing=True)
    if job.rows > 1:
        flags = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {accumulation * job.rows}"
        yield flags, with_job(setting, rows=1, accumulates=True)
    if job.attention != "flash_attention_2":
        yield "--attn_implementation flash_attention_2", with_job(setting, attention="flash_attention_2")
    if lora and job.model_args.load_in_kbits == 16:
        yield "--load_in_kbits 4", _packed(setting)
    if setting.optim.startswith("adamw") and "8bit" not in setting.optim:
        yield "--optim adamw_bnb_8bit", replace(setting, optim="adamw_bnb_8bit")
    if lora and job.lora_args.modules_to_save:
        trained = replace(job.lora_args, modules_to_save=None)
        yield "without --modules_to_save (new rows stay untrained)", with_job(setting, lora_args=trained)
    yield f"half the length ({job.length // 2})", with_job(setting, length=max(job.length // 2, 8))
    parts = math.gcd(setting.sharing.processes, job.length, *heads_of(job.config))
    if parts > 1 and job.stage in ("pt", "sft") and job.sequence_parallel_size == 1 and _shares_rows(job, parts):
        flags = f"--sequence_parallel_size {parts} --gradient_accumulation_steps {accumulation * parts}"
        yield flags, with_job(setting, sequence_parallel_size=parts, accumulates=True)
    if setting.sharing.kind == "ddp" and setting.sharing.processes > 1:
        for flags, sharing in _sharings(setting.sharing):
            yield flags, replace(setting, sharing=sharing)


def _packed(setting: Setting) -> Setting:
    job = setting.job
    return with_job(setting, model_args=replace(job.model_args, load_in_kbits=4), dtype=job.compute_dtype)


def _shares_rows(job: Job, parts: int) -> bool:
    try:
        check_sequence_parallel(parts, job.config, job.attention)
    except InputError:
        return False
    return True


def _sharings(sharing: Sharing) -> Iterator[tuple[str, Sharing]]:
    yield f"--deepspeed {ZERO2_FILE}", replace(sharing, kind="zero2", bucket=1e8, gather_bucket=1e8)
    offloaded = replace(sharing, kind="zero3", optimizer_on_cpu=True, weights_on_cpu=True)
    yield f"--deepspeed {ZERO3_FILE}", offloaded
    yield "--fsdp full_shard --fsdp_config scripts/configs/fsdp.json", replace(sharing, kind="fsdp")


def suggest(setting: Setting, accumulation: int, gpu_memory: float, footprints: Footprints) -> list[Suggestion]:
    """Settings of the same model, data and batch that fit `gpu_memory` bytes, the fastest first.

    Args: accumulation: the command's --gradient_accumulation_steps; the product with the micro-batch stays.
    """
    base = speed(setting)
    found: list[Suggestion] = []
    job = setting.job
    packs = [(False, "")]
    if not job.lora_args.full_finetuning and job.model_args.load_in_kbits == 16:
        packs.append((True, "--load_in_kbits 4"))
    sharings = [("", setting.sharing)]
    if setting.sharing.processes > 1 and setting.sharing.kind == "ddp":
        sharings += _sharings(setting.sharing)
    for checkpointing in (False, True):
        for packed, pack_flag in packs:
            if packed and any(s.plan.setting.job.checkpointing == checkpointing for s in found):
                continue  # it fits without
            for rows in _micro_batches(job.rows * accumulation):
                changed = with_job(
                    _packed(setting) if packed else setting,
                    checkpointing=checkpointing,
                    rows=rows,
                    accumulates=rows < job.rows * accumulation,
                )
                step = footprints.of(changed.job)
                fits = [
                    (flags, planned)
                    for flags, sharing in sharings
                    if not (packed and sharing.kind in ("zero3", "fsdp"))
                    and (planned := plan(replace(changed, sharing=sharing), step)).needed <= gpu_memory
                ]
                if not fits:
                    break  # more rows need more
                for flags, planned in fits:
                    words = [
                        _checkpoint_flag(checkpointing, job),
                        pack_flag,
                        _rows_flag(rows, job, accumulation),
                        flags,
                    ]
                    text = " ".join(word for word in words if word) or "as it is"
                    found.append(Suggestion(planned, text, speed(planned.setting) / base))
    found.sort(key=lambda suggestion: -suggestion.speed)
    return found


def _micro_batches(batch: int) -> list[int]:
    return [rows for rows in (1, 2, 4, 8, 16, 32, 64) if batch % rows == 0]


def _checkpoint_flag(checkpointing: bool, job: Job) -> str:
    if checkpointing == job.checkpointing:
        return ""
    return "--gradient_checkpointing" if checkpointing else "--gradient_checkpointing False"


def _rows_flag(rows: int, job: Job, accumulation: int) -> str:
    if rows == job.rows:
        return ""
    steps = job.rows * accumulation // rows
    return f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {steps}"


# ---------------------------------------------------------------- what is known of a run


def describe(setting: Setting) -> str:
    """The key of Record: what decides memory and speed, in words."""
    job = setting.job
    lora, config = job.lora_args, job.config
    kind = "full" if lora.full_finetuning else f"LoRA {lora.lora_rank}"
    if lora.modules_to_save and not lora.full_finetuning:
        kind += f" + {lora.modules_to_save}"
    parts = [
        f"{config.model_type} {config.num_hidden_layers}x{config.hidden_size} V{config.vocab_size}",
        f"{kind} in {job.model_args.load_in_kbits} bits" if job.model_args.load_in_kbits != 16 else kind,
        f"{job.rows}x{job.length}",
        str(job.compute_dtype).removeprefix("torch."),
        job.attention,
        "checkpointing" if job.checkpointing else "no checkpointing",
        setting.optim,
        f"{setting.sharing.kind} {setting.sharing.processes}" if setting.sharing.processes > 1 else "",
        f"{job.sequence_parallel_size} to a row" if job.sequence_parallel_size > 1 else "",
    ]
    return ", ".join(part for part in parts if part)


def measured_rate(records: list[Record], key: str) -> float | None:
    """Tokens a second of the last run with this key."""
    rates = [record.tokens_per_second for record in records if record.key == key and record.tokens_per_second > 0]
    return rates[-1] if rates else None


def table(planned: Plan) -> list[str]:
    """Lines: each part of the peak in GB, and their sum."""
    parts = sorted(planned.parts.items(), key=lambda item: -item[1])
    width = max(len(name) for name in [*planned.parts, "CUDA context, fragmentation"])
    lines = [f"  {name:<{width}} {size / GB:9.3f}" for name, size in parts]
    if planned.allowance:
        lines.append(f"  {'CUDA context, fragmentation':<{width}} {planned.allowance / GB:9.3f}")
    lines.append(f"  {'peak of a process':<{width}} {planned.needed / GB:9.3f} GB (at: {planned.moment})")
    if planned.host:
        lines.append(f"  {'main memory of a process':<{width}} {planned.host / GB:9.3f} GB")
    return lines
