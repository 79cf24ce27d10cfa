"""No flag without effect: each is read by code that the script runs, or a table says what comes of it.

Shown of this project's own flags: the script, or a module that it imports, reads an attribute of that name, and not of
`self`. Of transformers' own: its Trainer reads them outside the methods that are replaced here, and somebody put the
name into APPLIED after having looked at what it does; or training/flags.py has it, refused or with a warning.
What reading leads to is for other tests to show. A new flag fails here until it has its place.
"""

import dataclasses

import pytest
from transformers import TrainingArguments

from support.flags import code_of, names_read, own_flags, replaced_methods, trainer_reads
from support.paths import SCRIPTS, UTILS
from utils.training.arguments import RunArguments
from utils.training.flags import (
    MEANINGLESS,
    MEANINGLESS_FOR_PAIRS,
    MEANINGLESS_FOR_PPO,
    REFUSED,
    REFUSED_FOR_PAIRS,
    REFUSED_FOR_PPO,
)

# Own flags that nobody reads, since the dataclass itself turns them into others.
TURNED_INTO_OTHERS = {"load_in_8bit", "load_in_4bit", "speculative_sampling"}
APPLIED = {
    "accelerator_config", "activation_checkpointing", "activation_checkpointing_kwargs", "adam_beta1",
    "adam_beta2", "adam_epsilon", "auto_find_batch_size", "bf16", "data_seed", "dataloader_in_order",
    "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_backend", "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug", "deepspeed",
    "disable_tqdm", "enable_jit_checkpoint", "eval_accumulation_steps", "eval_delay", "eval_on_start",
    "eval_steps", "eval_strategy", "fp16", "fsdp", "fsdp_config", "full_determinism",
    "gradient_accumulation_steps", "gradient_checkpointing", "gradient_checkpointing_kwargs", "greater_is_better",
    "hub_private_repo", "include_num_input_tokens_seen", "learning_rate", "load_best_model_at_end", "log_level",
    "log_level_replica", "log_on_each_node", "logging_first_step", "logging_steps", "logging_strategy",
    "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm", "max_steps", "metric_for_best_model",
    "neftune_noise_alpha", "num_train_epochs", "optim", "optim_args", "optim_target_modules", "output_dir",
    "per_device_eval_batch_size", "per_device_train_batch_size", "project", "report_to",
    "restore_callback_states_from_checkpoint", "run_name", "save_on_each_node", "save_steps", "save_strategy",
    "save_total_limit", "seed", "skip_memory_metrics", "tf32", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id",
    "trackio_static_space_id", "train_sampling_strategy", "use_cpu", "warmup_steps", "weight_decay",
}  # fmt: skip


def test_every_flag_of_transformers_has_one_place():
    every = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    tables = (APPLIED, set(REFUSED), set(MEANINGLESS))
    assert every - set().union(*tables) == set(), "new flags: apply, refuse or warn, see the head of this file"
    assert sum(map(len, tables)) == len(set().union(*tables))
    own = {field.name for field in dataclasses.fields(RunArguments)} - every
    of_stages = (MEANINGLESS_FOR_PAIRS, MEANINGLESS_FOR_PPO, REFUSED_FOR_PAIRS, REFUSED_FOR_PPO)
    assert set().union(*of_stages) <= APPLIED | own


def test_what_counts_as_applied_is_read():
    own = names_read(UTILS.rglob("*.py"))
    assert APPLIED - trainer_reads() - own == set()
    # The check can tell: these are asked in a method of transformers' that is replaced here, and nowhere else.
    assert {"compute_loss", "prediction_step"} <= replaced_methods(UTILS / "training" / "trainer.py")


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_every_own_flag_is_read_by_the_code_of_its_script(script):
    read = names_read(code_of(script)) | TURNED_INTO_OTHERS
    assert {f"{kind.__name__}.{name}" for name, kind in own_flags(script).items() if name not in read} == set()
