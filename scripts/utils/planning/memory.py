"""A step's bytes, the optimizer, and what several processes share or add -> the peak of each process.

Symbols in comments: N processes, W weights that are trained; 16-bit weights have 2 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .ledger import EVALUATION, Footprint, Moment
from .stages import Job, footprint

GB = 1e9
# A GPU holds more than PyTorch's tensors: the CUDA context with its kernels, and what cuBLAS works in.
CUDA_CONTEXT = 0.75 * GB
# Blocks that the allocator holds and cannot join: a share of what comes and goes in a step.
FRAGMENTATION = 0.05
# Bytes of optimizer states for a weight in float32, by the beginning of --optim; others are taken for AdamW.
STATE_BYTES = {
    "adamw_8bit": 2.03, "adamw_bnb_8bit": 2.03, "paged_adamw_8bit": 0.0, "paged_adamw": 0.0, "adamw": 8.0,
    "adafactor": 0.01, "sgd": 0.0, "adagrad": 4.0, "lion_8bit": 1.02, "paged_lion": 0.0, "lion": 4.0,
    "rmsprop_bnb_8bit": 1.02, "rmsprop": 4.0, "lomo": 0.0, "adalomo": 0.01, "muon": 4.0,
}  # fmt: skip
FUSED = "adamw_torch_fused"  # its step needs no room


@dataclass(frozen=True)
class Sharing:
    """How processes share a model.

    Attributes:
        kind: ddp, zero1, zero2, zero3 or fsdp; of no matter to one process, but for what DeepSpeed does anyway.
        optimizer_on_cpu, weights_on_cpu: kept in main memory.
        bucket, gather_bucket: weights that DeepSpeed reduces and gathers at once.
        live: weights that ZeRO-3 has whole.
        overlaps: whether two buckets are under way.
    """

    kind: str = "ddp"
    processes: int = 1
    optimizer_on_cpu: bool = False
    weights_on_cpu: bool = False
    bucket: float = 5e8
    gather_bucket: float = 5e8
    live: float = 1e9
    overlaps: bool = True

    @property
    def is_deepspeed(self) -> bool:
        return self.kind.startswith("zero")


@dataclass(frozen=True)
class Rollouts:
    """What PPO holds while it samples: a cache of keys and values, and the logits of the answers' next tokens."""

    slots: int
    tokens: int


@dataclass(frozen=True)
class Setting:
    """A job with its optimizer and its processes.

    Attributes:
        others: bytes of models besides: a reward model, a reference of its own.
    """

    job: Job
    optim: str = FUSED
    sharing: Sharing = field(default_factory=Sharing)
    rollouts: Rollouts | None = None
    others: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The peak of one process, in bytes.

    Attributes:
        parts: what it is made of, by name, at the moment of the peak.
        moment: which part of a step that is.
        host: bytes of main memory that offloading takes, of one process.
        allowance: what a GPU needs besides tensors; 0 on a CPU.
        num_weights, num_trained: of the model.
    """

    setting: Setting
    parts: dict[str, float]
    moment: str
    host: float
    allowance: float
    num_weights: float
    num_trained: float

    @property
    def peak(self) -> float:
        """Tensors: what torch.cuda.max_memory_allocated measures, and what a CPU's resident memory grows by."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """What the GPU must have."""
        return self.peak + self.allowance


def plan(setting: Setting, step: Footprint | None = None) -> Plan:
    """Add up a setting; `step`: its job's footprint, where that is known."""
    job = setting.job
    step = footprint(job) if step is None else step
    weights, host = _weights(setting, step)
    states, more_host = _states(setting, step)
    host += more_host
    communication = _communication(setting, step)
    gradients = _gradients_share(setting, step)
    moments: dict[str, dict[str, float]] = {}
    for name, moment in step.moments.items():
        moments[name] = _moment(step, moment, gradients)
    # The optimizer's step: activations are gone, all gradients are there.
    moments["optimizer"] = {"gradients": step.gradients * gradients, "optimizer's step": _step_room(setting, step)}
    if setting.rollouts is not None:
        moments["rollouts"] = _rollouts(setting)
    for parts in moments.values():
        parts["optimizer"] = states
    if not job.on_gpu:
        mapped = _checkpoint_pages(job, step, moments)
        communication |= {"checkpoint's pages": mapped} if mapped else {}
    name, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    total = {**weights, **parts, "other models": setting.others, **communication}
    moving = sum(parts.values()) - parts.get("gradients", 0) - parts.get("optimizer", 0)
    allowance = CUDA_CONTEXT + FRAGMENTATION * moving if job.on_gpu else 0.0
    kept = {name: value for name, value in total.items() if value >= 0.5e3}
    return Plan(setting, kept, name, host, allowance, step.num_weights, step.num_trained)


def _moment(step: Footprint, moment: Moment, gradients: float) -> dict[str, float]:
    kept = 0.0 if moment is step.moments.get(EVALUATION) else min(step.kept, moment.activations)
    return {
        "gradients": moment.gradients * gradients,
        "activations kept": kept,
        "layer or loss at work": moment.activations - kept,
    }


def _checkpoint_pages(job: Job, step: Footprint, moments: dict[str, dict[str, float]]) -> float:
    """Bytes of the weight files that stay in a CPU's memory beside what was made of them.

    Files are mapped, not read. Weights that are used as they are stored are those pages themselves; a file stays
    mapped as long as one of its weights is such a one. If none is, files go once the model is loaded (moment
    "loading").
    """
    stored = job.config.dtype or torch.float32
    size = (getattr(torch, stored) if isinstance(stored, str) else stored).itemsize
    if size == job.dtype.itemsize:
        return size * step.num_packed
    base = step.num_weights - (0 if job.lora_args.full_finetuning else step.num_trained)
    moments["loading"] = {"checkpoint's pages": size * base}
    return 0.0


def _weights(setting: Setting, step: Footprint) -> tuple[dict[str, float], float]:
    """Weights of one process by name, and what of them is in main memory."""
    sharing, job = setting.sharing, setting.job
    frozen, trained = step.frozen, step.trained
    if sharing.is_deepspeed and job.compute_dtype != torch.float32:
        # DeepSpeed converts the whole model, but what is packed; float32 copies of what is trained are its own.
        trained = 2 * step.num_trained
        if job.model_args.load_in_kbits == 16:
            frozen = 2 * (step.num_weights - step.num_trained)
    if sharing.kind in ("zero3", "fsdp") and sharing.processes > 1:
        frozen, trained = frozen / sharing.processes, trained / sharing.processes
    host = 0.0
    if sharing.weights_on_cpu:
        host, frozen, trained = frozen + trained, 0.0, 0.0
    return {"frozen weights": frozen, "trained weights": trained}, host


def _gradients_share(setting: Setting, step: Footprint) -> float:
    """Bytes of gradients that a process keeps, for each byte that one process alone would."""
    sharing, job = setting.sharing, setting.job
    half = 0.5 if sharing.is_deepspeed and job.compute_dtype != torch.float32 else 1.0
    if sharing.optimizer_on_cpu and sharing.is_deepspeed:
        return 0.0
    sharded = sharing.kind in ("zero2", "zero3", "fsdp")
    return half / sharing.processes if sharded else half


def _states(setting: Setting, step: Footprint) -> tuple[float, float]:
    """Optimizer states of one process: on the device, in main memory."""
    sharing, job = setting.sharing, setting.job
    weight_bytes = step.trained / max(step.num_trained, 1)
    optim = setting.optim
    per_weight = next((size for name, size in STATE_BYTES.items() if optim.startswith(name)), 8.0)
    if "8bit" not in optim:
        per_weight *= weight_bytes / 4  # states have their weight's type
    paged = 0.0
    if optim.startswith("paged"):
        paged = step.num_trained * (2.03 if "8bit" in optim else 8.0)
    if sharing.is_deepspeed:
        per_weight = (8.0 if per_weight > 4 else per_weight) + (4.0 if job.compute_dtype != torch.float32 else 0.0)
    size = step.num_trained * per_weight
    if sharing.kind != "ddp":
        size /= sharing.processes
    return (0.0, size + paged) if sharing.optimizer_on_cpu else (size, paged)


def _step_room(setting: Setting, step: Footprint) -> float:
    """What the optimizer's step holds besides weights, gradients and states."""
    sharing = setting.sharing
    if sharing.is_deepspeed:
        # The gradients of the shard in float32, and gathered weights.
        return 0.0 if sharing.optimizer_on_cpu else 4 * step.num_trained / sharing.processes
    if setting.optim.startswith("adamw_torch") and setting.optim != FUSED and setting.job.on_gpu:
        return step.trained / (sharing.processes if sharing.kind == "fsdp" else 1)  # square roots of all at once
    return 0.0


def _communication(setting: Setting, step: Footprint) -> dict[str, float]:
    sharing, job = setting.sharing, setting.job
    if sharing.processes == 1 and not sharing.is_deepspeed:
        return {}
    two = 2.0 if job.compute_dtype != torch.float32 else 4.0
    buckets = min(sharing.bucket, step.num_trained) * two * (2 if sharing.overlaps else 1)
    if sharing.kind == "ddp":
        return {"gradients' copies to reduce": step.gradients}
    if sharing.kind == "fsdp":
        outside = step.num_weights - step.layer_weights * job.config.num_hidden_layers
        whole = 2 * step.layer_weights + max(outside, 0.0)
        return {"weights gathered": whole * two, "gradients to reduce": step.layer_weights * two}
    if sharing.kind == "zero3":
        return {"weights gathered": min(sharing.live, step.num_weights) * two, "buckets": buckets}
    return {"buckets": buckets + min(sharing.gather_bucket, step.num_trained) * two}


def _rollouts(setting: Setting) -> dict[str, float]:
    """Keys and values of all slots, twice for the layer that grows, and the logits of a token of each slot."""
    assert setting.rollouts is not None
    config, job = setting.job.config, setting.job
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.empty((), dtype=job.dtype).element_size()
    cache = 2 * config.num_hidden_layers * heads * width * size * setting.rollouts.slots * setting.rollouts.tokens
    # In float32, with its probabilities and their order.
    return {"KV cache": cache, "sampling": 4.0 * 4 * config.vocab_size * setting.rollouts.slots}


def with_job(setting: Setting, **changes: Any) -> Setting:
    """The setting with another job."""
    return replace(setting, job=replace(setting.job, **changes))
