"""Flags of transformers without meaning here are refused or said; values that libraries refuse are found first."""

import dataclasses
import logging

import pytest

from utils.core.command_line import describe_arguments
from utils.core.errors import InputError
from utils.training import flags
from utils.training.arguments import RunArguments, check_validation

VALUES = {
    "hub_strategy": "end",
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "label_smoothing_factor": 0.5,
    "liger_kernel_config": {"rope": True},
    "local_rank": 3,
    "parallelism_config": {"tp_size": 2},
}


FIELDS = {field.name: field for field in dataclasses.fields(RunArguments)}


def make(tmp_path, **given):
    return RunArguments(**({"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True} | given))


def other_value(name):
    default = FIELDS[name].default
    return VALUES.get(name, not default if isinstance(default, bool) else "some")


@pytest.mark.parametrize("name", sorted(flags.REFUSED.keys() & FIELDS.keys()))
def test_what_would_have_to_change_the_result_is_refused(name, tmp_path):
    with pytest.raises(InputError, match=rf"--{name} .*; leave it out"):
        make(tmp_path, **{name: other_value(name)})


@pytest.mark.parametrize("name", sorted(flags.MEANINGLESS.keys() & FIELDS.keys()))
def test_what_changes_nothing_is_said(name, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        args = make(tmp_path, **{name: other_value(name)})
    assert f"--{name} has no effect" in caplog.text and name not in describe_arguments(args)
    caplog.clear()
    make(tmp_path)
    assert not caplog.records


def test_tables_of_the_stages(tmp_path, caplog):
    args = make(tmp_path, data_seed=7, train_sampling_strategy="sequential")
    flags.set_aside(args, flags.MEANINGLESS_FOR_PAIRS, flags.REFUSED_FOR_PAIRS)
    assert "--data_seed has no effect" in caplog.text and "--train_sampling_strategy has no effect" in caplog.text
    with pytest.raises(InputError, match="--sequence_parallel_size 2: pairs and rollouts"):
        flags.set_aside(make(tmp_path, sequence_parallel_size=2), flags.NONE, flags.REFUSED_FOR_PAIRS)
    with pytest.raises(InputError, match="neftune_noise_alpha"):
        flags.check_ppo_flags(make(tmp_path, neftune_noise_alpha=5))
    with pytest.raises(InputError, match="reduce_lr_on_plateau waits"):
        flags.check_ppo_flags(make(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "--seed -1: need 0 to 4294967295"),
        ({"sequence_parallel_size": 0}, "--sequence_parallel_size 0: need at least 1"),
        ({"save_steps": 0}, "--save_steps 0: need a number above 0"),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size 0: need at least 1"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr.*min_lr"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "--lr_scheduler_kwargs .*num_cycles"),
        ({"adam_beta1": 1.5}, "--optim adamw_torch.*beta"),
        ({"optim": "galore_adamw"}, "--optim galore_adamw: pass --optim_target_modules"),
        ({"optim": "lomo"}, "--optim lomo.*install"),
        ({"optim_args": "momentum=0.9"}, "does not read them"),
        ({"optim_target_modules": "q_proj"}, "--optim_target_modules q_proj: --optim adamw_torch_fused has none"),
        ({"report_to": "nonsense"}, "--report_to nonsense: need none, all, or some of"),
    ],
)
def test_values_that_a_library_would_refuse_later(given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make(tmp_path, **given)


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        ({}, 1, "--sequence_parallel_size 2: 1 process; start a multiple of 2"),
        ({}, 3, "3 processes; start a multiple of 2"),
        ({"neftune_noise_alpha": 5}, 2, "--neftune_noise_alpha"),
        ({"accelerator_config": {"dispatch_batches": True}}, 2, "dispatch_batches"),
    ],
)
def test_rows_that_processes_cannot_share(given, processes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        flags.check_shared_rows(make(tmp_path, **given), 2, processes)
    flags.check_shared_rows(make(tmp_path, **given), 1, processes)
    flags.check_shared_rows(make(tmp_path), 2, 4)


def test_trackers_that_are_not_installed(tmp_path, monkeypatch):
    from transformers import integrations

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(InputError, match="--report_to wandb: its package is not installed"):
        make(tmp_path, report_to="tensorboard,wandb")
    assert make(tmp_path, report_to="tensorboard").report_to == ["tensorboard"]


def test_values_that_they_take(tmp_path):
    make(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-6}, optim="sgd")
    make(tmp_path, optim="sgd", optim_args="momentum=0.9", warmup_steps=0.1)
    given = {"use_reentrant": True}
    args = make(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=given)
    assert args.activation_checkpointing_kwargs == given


def test_a_figure_to_choose_by_has_to_be_measured(tmp_path):
    args = make(tmp_path, load_best_model_at_end=True, eval_strategy="steps", metric_for_best_model="eval_zh_los")
    with pytest.raises(InputError, match=r"eval_zh_los: need one of eval_zh_loss, .*eval_loss"):
        check_validation(args, ["zh"])
    args.metric_for_best_model = "zh_bits_per_byte"
    check_validation(args, ["zh"])
