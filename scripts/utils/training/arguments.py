"""Training: the arguments of a run, DeepSpeed configs made to fit, and what is measured."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from ..core.arguments import ExtendArguments, LoraArguments, arg
from ..core.errors import InputError, raise_problems
from ..core.files import read_json
from ..core.machine import peak_resident_bytes
from ..models.loading import bf16_is_supported
from ..weights.names import is_embedding
from .flags import MEANINGLESS, REFUSED, check_optimizer, check_trackers, check_values, set_aside

logger = logging.getLogger(__name__)

# Fields that __post_init__ fills in from the machine.
RESOLVED = ("precision", "bf16", "fp16", "use_cpu", "deepspeed", "dataloader_pin_memory")
PEAK_FLOPS = {  # dense bf16, from the makers' data sheets; matched by the first name found in the device's name
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "A40": 150e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
    "V100": 125e12, "T4": 65e12,
}  # fmt: skip


@dataclass
class RunArguments(TrainingArguments):
    """How a run trains and where it writes: transformers' TrainingArguments with this project's defaults and rules."""

    # Of transformers' flags, those that --help shows.
    USUAL_FLAGS: ClassVar[tuple[str, ...]] = (
        *("output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
        *("weight_decay", "max_grad_norm", "optim", "seed", "report_to", "deepspeed", "fsdp"),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("gradient_checkpointing", "eval_strategy", "eval_steps", "save_steps"),
        *("load_best_model_at_end", "metric_for_best_model"),
    )

    if TYPE_CHECKING:  # inherited, named for the type checker
        fp16: bool
        bf16: bool
        use_cpu: bool
        deepspeed: Any
        fsdp: Any
        fsdp_config: Any
        gradient_checkpointing: Any
        dataloader_pin_memory: bool
        gradient_checkpointing_kwargs: Any
        report_to: Any

    precision: Literal["auto", "bf16", "fp16", "fp32"] = arg(
        "auto", help="Arithmetic: auto is bf16 where the hardware has it, else fp32. --bf16 and --fp16 decide too."
    )
    embedding_learning_rate: float | None = arg(
        help="Learning rate of embed_tokens and lm_head, where they are trained; default: --learning_rate."
    )
    sequence_parallel_size: int = arg(
        1,
        help="pt, sft: processes that share each row, each with its part of the tokens; divides the processes, the "
        "model's attention heads and --block_size.",
    )
    overwrite_output_dir: bool = arg(
        False, help="Replace a finished run in output_dir (an unfinished one is resumed)."
    )
    restart: bool = arg(False, help="Start over, also where output_dir holds an unfinished run.")
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two lines of the log."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "No effect: a loss that is not finite stops training."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "No effect: batches hold what the model needs."}
    )
    save_total_limit: int | None = field(default=3, metadata={"help": "How many checkpoints are kept."})

    def __post_init__(self) -> None:
        check_values(self)
        # What was asked for; run_config.yaml records this, so that it fits another machine too.
        self.given = {name: getattr(self, name) for name in RESOLVED} | {
            "restart": False,
            "overwrite_output_dir": False,
        }
        set_aside(self, MEANINGLESS, REFUSED)
        if isinstance(self.report_to, str) or self.report_to is None:
            self.report_to = (self.report_to or "none").split(",")
        self._choose_precision()
        if self.deepspeed:
            self.deepspeed = prepare_deepspeed(self.deepspeed)
        self._prepare_checkpointing()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self._check_fsdp()
        super().__post_init__()
        check_trackers(self)
        check_optimizer(self)
        if self.deepspeed:
            join_deepspeed()
        if self.n_gpu > 1:
            raise InputError(
                f"{self.n_gpu} GPUs in one process: start with torchrun, or set CUDA_VISIBLE_DEVICES to one"
            )

    def _choose_precision(self) -> None:
        if not (self.fp16 or self.bf16):
            self.fp16 = self.precision == "fp16"
            self.bf16 = self.precision == "bf16" or (self.precision == "auto" and bf16_is_supported())
        if self.fp16 and not torch.cuda.is_available():
            logger.warning("--fp16 needs a GPU; bf16 is used instead")
            self.fp16, self.bf16 = False, True
        if self.precision == "auto" and torch.cuda.is_available() and not (self.bf16 or self.fp16):
            logger.info("this GPU has no bf16: fp32 is used; --precision fp16 takes half the memory and is faster")
        self.precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"

    def _prepare_checkpointing(self) -> None:
        # transformers renamed gradient_checkpointing to activation_checkpointing; people know the first name.
        new = "activation_checkpointing" if hasattr(self, "activation_checkpointing") else "gradient_checkpointing"
        if self.gradient_checkpointing or getattr(self, new):
            self.gradient_checkpointing = None if new != "gradient_checkpointing" else True
            setattr(self, new, True)
            if getattr(self, f"{new}_kwargs") is None and self.gradient_checkpointing_kwargs is None:
                # The re-entrant form loses gradients when the embeddings are frozen, as in LoRA training.
                setattr(self, f"{new}_kwargs", {"use_reentrant": False})

    def _check_fsdp(self) -> None:
        if not self.fsdp:
            return
        config = self.fsdp_config or {}
        if isinstance(config, str):
            config = json.loads(config) if config.startswith("{") else read_json(config)
        given = {name.removeprefix("fsdp_"): value for name, value in config.items()}
        problems = []
        if int(given.get("version", 2)) != 2:
            problems.append(f"--fsdp_config: version {given['version']} of FSDP is on its way out; need version 2")
        if given.get("state_dict_type", "FULL_STATE_DICT") != "FULL_STATE_DICT":
            problems.append(
                f"--fsdp_config: state_dict_type {given['state_dict_type']} leaves no model files behind; need "
                "FULL_STATE_DICT"
            )
        raise_problems(problems)
        if self.use_cpu:
            logger.warning("--fsdp needs GPUs; without them every process holds the whole model")
            self.fsdp = self.fsdp_config = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type matrix products run in."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]


def prepare_deepspeed(config: str | dict[str, Any]) -> dict[str, Any]:
    """Read a DeepSpeed config and mend what today's DeepSpeed or this machine refuses, each with a warning."""
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("--deepspeed needs the package deepspeed: pip install deepspeed")
    settings: dict[str, Any] = dict(config) if isinstance(config, dict) else read_json(config)
    fp16 = dict(settings.get("fp16", {}))
    if 0 < fp16.get("min_loss_scale", 1) < 1:
        logger.warning("DeepSpeed: min_loss_scale %s is refused today, 1 is used", fp16["min_loss_scale"])
        fp16["min_loss_scale"] = 1
        settings["fp16"] = fp16
    for section in ("optimizer", "scheduler"):
        if settings.pop(section, None) is not None:
            logger.warning("DeepSpeed: the %s section is dropped, the flags of this command decide", section)
    zero = dict(settings.get("zero_optimization", {}))
    whole = "stage3_gather_16bit_weights_on_model_save"
    if zero.get("stage") == 3 and zero.get(whole) is not True:
        logger.warning("DeepSpeed: %s is switched on, or models would be saved without their weights", whole)
        settings["zero_optimization"] = {**zero, whole: True}
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if settings.pop("fp16", None) is not None:
            logger.warning("DeepSpeed: the fp16 section is dropped, there is no GPU")
    settings.setdefault("bf16", {"enabled": "auto"})
    for lock in extension_locks():
        logger.warning(
            "DeepSpeed compiles its operations once, and waits as long as %s exists: if no other process is compiling "
            "now, one was killed while it did; remove the file then",
            lock,
        )
    # Without torchrun there is one process, and DeepSpeed would look for MPI.
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    return settings


def extension_locks() -> list[Path]:
    """The locks of PyTorch extensions that are being compiled, or were when their process was killed."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(named) if named else Path.home() / ".cache" / "torch_extensions"
    return sorted(root.glob("**/lock"))


def join_deepspeed() -> None:
    """Let DeepSpeed know this run's processes before a model is loaded, which ZeRO-3 cuts into one shard for each.

    On GPUs transformers has done so; on CPUs it would come only with the Trainer.
    """
    import deepspeed

    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)


# ---------------------------------------------------------------- what a run measures


def peak_memory_gb() -> float:
    """Peak memory of this process in 1e9 bytes: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_resident_bytes() / 1e9


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of the GPU from its data sheet, None where it is not known (CPUs too)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


NO_EMBEDDINGS = (
    "--embedding_learning_rate {}: neither embed_tokens nor lm_head is trained; pass --modules_to_save "
    "embed_tokens,lm_head too, or leave it out"
)


def check_embeddings(args: RunArguments, extend_args: ExtendArguments | None, lora_args: LoraArguments) -> None:
    """Raises: InputError if embeddings have a learning rate, and the flags say that they are not trained; or if rows
    are trained alone that are spread over processes."""
    if extend_args is not None and extend_args.train_new_rows_only and (args.deepspeed or args.fsdp):
        raise InputError("--train_new_rows_only: DeepSpeed and FSDP spread the rows; use torchrun without them (DDP)")
    if args.embedding_learning_rate is None or lora_args.full_finetuning or lora_args.adapter_name_or_path:
        return  # what an adapter trains its files say: the Trainer looks
    named = f"{lora_args.modules_to_save},{lora_args.target_modules}".split(",")
    if not any(is_embedding(name.strip()) for name in named):
        raise InputError(NO_EMBEDDINGS.format(args.embedding_learning_rate))


METRICS = ("loss", "perplexity", "bits_per_byte")  # of the evaluation of text


def check_validation(
    args: TrainingArguments, names: Sequence[str], metrics: Sequence[str] = METRICS, means: Sequence[str] = ("loss",)
) -> None:
    """Look at what evaluation is asked for, before anything is trained.

    Args: names: of the validation sets; metrics: figures of a set; means: those that are averaged over the sets.
    Raises: InputError if there are none of these sets, or a checkpoint is to be chosen by a figure that they lack.
    """
    if not names and (args.eval_strategy != "no" or args.load_best_model_at_end):
        raise InputError(
            "--eval_strategy and --load_best_model_at_end need validation data: pass --validation_data, or "
            "--validation_split 0.05"
        )
    chosen = args.metric_for_best_model
    known = [*(f"eval_{name}_{metric}" for name in names for metric in metrics), *(f"eval_{name}" for name in means)]
    if names and chosen is not None and f"eval_{chosen.removeprefix('eval_')}" not in known:
        raise InputError(f"--metric_for_best_model {chosen}: need one of {', '.join(known)}")
