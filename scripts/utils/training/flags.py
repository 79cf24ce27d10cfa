"""Flags of transformers' TrainingArguments: those without meaning here, and values that would be refused only later.

A flag is applied by transformers' Trainer, or it stands in a table here with the reason. A test goes through all of
them, so that a new one has to be placed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import InputError, raise_problems

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# Given, they would have to change what is learned or kept, and do not: an error.
REFUSED = {
    "average_tokens_across_devices": "the loss is always the mean over the tokens of all processes",
    "batch_eval_metrics": "evaluation sums losses by itself, in constant memory",
    "dataloader_drop_last": "every row is trained and evaluated",
    "eval_do_concat_batches": "evaluation needs its batches joined",
    "eval_use_gather_object": "evaluation gathers tensors",
    "ignore_data_skip": "a run that resumes sees each sample as an uninterrupted one does",
    "label_smoothing_factor": "the losses here have no smoothing (dpo.py has --label_smoothing)",
    "parallelism_config": "weights are sharded by --deepspeed or --fsdp, rows by --sequence_parallel_size",
    "prediction_loss_only": "evaluation needs its figures",
    "push_to_hub": "nothing is uploaded; use `hf upload` on the finished folder",
    "save_only_model": "a checkpoint is what a run resumes from; each holds a usable model or adapter anyway",
    "use_liger_kernel": "the loss is computed in chunks already, and Liger's would not be used",
}
# Given, they would change nothing that matters: a warning.
MEANINGLESS = {
    "bf16_full_eval": "evaluation runs in the training precision",
    "do_eval": "validation data is evaluated wherever it is given; --eval_strategy says when",
    "do_predict": "there is nothing to predict; use inference_hf.py",
    "do_train": "these scripts always train",
    "fp16_full_eval": "evaluation runs in the training precision",
    "hub_always_push": "nothing is uploaded",
    "hub_model_id": "nothing is uploaded",
    "hub_revision": "nothing is uploaded",
    "hub_strategy": "nothing is uploaded",
    "hub_token": "nothing is uploaded",
    "include_for_metrics": "the figures of an evaluation are fixed",
    "label_names": "batches hold what the losses need",
    "length_column_name": "lengths are known",
    "liger_kernel_config": "Liger's kernels are not used",
    "local_rank": "torchrun says it in the environment",
    "logging_nan_inf_filter": "a loss that is not finite stops training",
    "remove_unused_columns": "batches hold what the model needs",
    "resume_from_checkpoint": "an unfinished run resumes by itself",
    "use_cache": "training has no use for a cache of keys and values",
}
# What the losses over pairs (rm.py, dpo.py) do not ask.
MEANINGLESS_FOR_PAIRS = {
    "data_seed": "--seed decides the order",
    "train_sampling_strategy": "batches are always of pairs of about the same length",
}
ROWS_ONLY = "pairs and rollouts are not spread over processes; pt.py and sft.py have it"
REFUSED_FOR_PAIRS = {"sequence_parallel_size": ROWS_ONLY}
# What PPO's own loop does not ask: it reads no batches from files, and answers prompts in an order of its own.
MEANINGLESS_FOR_PPO = {
    "data_seed": "--seed decides the order",
    "dataloader_in_order": "answers are made during training",
    "dataloader_multiprocessing_context": "answers are made during training",
    "dataloader_num_workers": "answers are made during training",
    "dataloader_persistent_workers": "answers are made during training",
    "dataloader_pin_memory": "answers are made during training",
    "dataloader_prefetch_factor": "answers are made during training",
    "eval_accumulation_steps": "evaluation answers prompts",
    "include_num_input_tokens_seen": "the log has tokens a second of rollouts and updates",
    "per_device_eval_batch_size": "evaluation answers prompts, --per_device_rollout_batch_size at once",
    "train_sampling_strategy": "prompts are drawn anew each iteration",
}
REFUSED_FOR_PPO = {
    "auto_find_batch_size": "an iteration is cut into batches of a fixed size; lower --per_device_train_batch_size",
    "neftune_noise_alpha": "PPO compares probabilities, which noise would change at random",
    "optim_target_modules": "PPO's optimizer has groups of its own for the critic",
    "sequence_parallel_size": ROWS_ONLY,
}
NONE: dict[str, str] = {}
# Optimizers that transformers makes for a model alone: for some of its modules, and for all of it.
LOW_RANK = ("galore", "apollo")
WHOLE_MODEL = ("lomo", "adalomo")


def set_aside(args: TrainingArguments, meaningless: Mapping[str, str], refused: Mapping[str, str] = NONE) -> None:
    """Put meaningless flags that were given back to their defaults, with one warning.

    Raises: InputError for those that are refused.
    """
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(args)
    }
    given_before: dict[str, object] = getattr(args, "given", {})  # before the machine's own values were filled in
    names = [name for name in (*meaningless, *refused) if name in defaults]  # older transformers lack some
    asked = {name: given_before.get(name, getattr(args, name)) for name in names}
    given = {name: value for name, value in asked.items() if getattr(value, "value", value) != defaults[name]}
    raise_problems([f"--{name} {given[name]}: {why}; leave it out" for name, why in refused.items() if name in given])
    unused = [name for name in meaningless if name in given]
    if unused:
        logger.warning("%s", "; ".join(f"--{name} has no effect: {meaningless[name]}" for name in unused))
    for name in unused:
        setattr(args, name, defaults[name])


def check_ppo_flags(args: TrainingArguments) -> None:
    """What the Trainer of ppo.py does not ask. Raises: InputError."""
    set_aside(args, MEANINGLESS_FOR_PPO, REFUSED_FOR_PPO)
    schedule = args.lr_scheduler_type.value
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise InputError(f"--lr_scheduler_type {schedule} waits for evaluations; PPO needs a schedule over its steps")


def check_shared_rows(args: TrainingArguments, size: int, processes: int) -> None:
    """Raises: InputError where `size` of so many processes cannot share each row."""
    if size == 1:
        return
    flag = f"--sequence_parallel_size {size}"
    problems = []
    if processes % size:
        count = f"{processes} processes" if processes > 1 else "1 process"
        problems.append(
            f"{flag}: {count}; start a multiple of {size}, with NPROC={size} for a launcher, or torchrun "
            f"--nproc_per_node {size}"
        )
    if args.neftune_noise_alpha is not None:
        problems.append(
            f"{flag} with --neftune_noise_alpha: its noise depends on a row's length; leave one of them out"
        )
    if args.torch_compile:
        problems.append(f"{flag} with --torch_compile: the exchange of heads is not compiled; leave one of them out")
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy == "batch_rebalance":
        problems.append(
            f"{flag} with --train_sampling_strategy {strategy}: it deals rows to all processes; leave it out"
        )
    if getattr(args.accelerator_config, "dispatch_batches", None):
        problems.append(f"{flag} with dispatch_batches in --accelerator_config: leave the latter out")
    raise_problems(problems)


def check_values(args: TrainingArguments) -> None:
    """Raises: InputError for values that a library would refuse, or take for something else, once training runs."""
    at_least = {
        **dict.fromkeys(("per_device_eval_batch_size", "eval_accumulation_steps", "sequence_parallel_size"), 1),
        **dict.fromkeys(("save_total_limit", "dataloader_num_workers", "weight_decay", "max_grad_norm"), 0),
    }
    above_zero = ["learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"]
    above_zero += ["embedding_learning_rate", "save_steps", "eval_steps", "ddp_timeout"]
    values: dict[str, Any] = {
        name: getattr(args, name, None) for name in (*at_least, *above_zero, "seed", "data_seed")
    }
    values = {name: value for name, value in values.items() if value is not None}
    problems = []
    for name, value in values.items():
        if name in at_least and not value >= at_least[name]:
            problems.append(f"--{name} {value}: need at least {at_least[name]}")
        elif name in above_zero and not value > 0:
            problems.append(f"--{name} {value}: need a number above 0")
        elif name.endswith("seed") and not 0 <= value < 1 << 32:
            problems.append(f"--{name} {value}: need 0 to {(1 << 32) - 1}")
    if args.fp16 and args.bf16:
        problems.append("--fp16 and --bf16 exclude each other")
    raise_problems(problems)


def check_trackers(args: TrainingArguments) -> None:
    """Raises: InputError for a tracker of --report_to that is unknown or not installed."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    installed = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"--report_to {name}: need none, all, or some of {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name not in installed and name != "flyte":  # which transformers does not look for
            raise InputError(f"--report_to {name}: its package is not installed; install it, or leave it out")


def check_optimizer(args: TrainingArguments) -> None:
    """Make optimizer and schedule for one number, which shows what their libraries refuse. Raises: InputError."""
    from transformers import Trainer, get_scheduler

    name, target_modules = args.optim.value, args.optim_target_modules
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([weight], lr=args.learning_rate)
    if target_modules is not None and not name.startswith(LOW_RANK):
        raise InputError(f"--optim_target_modules {target_modules}: --optim {name} has none; leave it out")
    if getattr(args, "embedding_learning_rate", None) is not None and name.startswith((*LOW_RANK, *WHOLE_MODEL)):
        raise InputError(f"--embedding_learning_rate: --optim {name} has one learning rate for all; leave it out")
    if target_modules is None and name.startswith(LOW_RANK):
        raise InputError(f"--optim {name}: pass --optim_target_modules too")
    with _named(f"--optim {name}, --optim_args {args.optim_args}"):
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            optimizer = kind([weight], **options)
            plain = copy.copy(args)
            plain.optim_args = None
            if args.optim_args and options == Trainer.get_optimizer_cls_and_kwargs(plain)[1]:
                raise ValueError("this optimizer does not read them")
        except ValueError:
            if not name.startswith((*LOW_RANK, *WHOLE_MODEL)):  # these want the model; their packages are there
                raise
    schedule = args.lr_scheduler_type.value
    with _named(f"--lr_scheduler_type {schedule}, --lr_scheduler_kwargs {args.lr_scheduler_kwargs}"):
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )


@contextlib.contextmanager
def _named(flags: str) -> Iterator[None]:
    """Let the errors that libraries have for bad values name the flags."""
    try:
        yield
    except (ImportError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{flags}: {error}") from None
