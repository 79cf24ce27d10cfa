"""RunArguments: precision, activation checkpointing under both names, and DeepSpeed configs made to fit."""

import logging
from types import SimpleNamespace

import pytest
import torch

from utils.core.arguments import ExtendArguments, LoraArguments
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.training.arguments import RunArguments, check_embeddings, check_validation, prepare_deepspeed


def make_arguments(tmp_path, **given):
    return RunArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **given)


@pytest.mark.parametrize(
    ("given", "precision"),
    [({"precision": "fp32"}, "fp32"), ({"precision": "bf16"}, "bf16"), ({"bf16": True}, "bf16")],
)
def test_the_precision_asked_for_is_what_products_run_in(given, precision, tmp_path):
    args = make_arguments(tmp_path, **given)
    assert args.precision == precision and args.bf16 == (precision == "bf16")
    assert args.compute_dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert args.given["precision"] == given.get("precision", "auto"), "run_config.yaml records what was asked for"


def test_several_mistakes_are_reported_together(tmp_path):
    with pytest.raises(InputError, match=r"learning_rate 0(?s:.*)fp16 and --bf16"):
        make_arguments(tmp_path, learning_rate=0, fp16=True, bf16=True)


def test_layers_are_computed_again_without_the_form_that_loses_gradients(tmp_path):
    args = make_arguments(tmp_path, gradient_checkpointing=True)
    new = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    assert getattr(args, new) and getattr(args, f"{new}_kwargs") == {"use_reentrant": False}


def test_no_tracker_is_asked_for_by_null_too(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\nreport_to: null\n")
    assert parse_args(RunArguments, argv=[str(config)])[0].report_to == []


def test_evaluation_needs_validation_data(tmp_path):
    args = make_arguments(tmp_path, eval_strategy="steps")
    with pytest.raises(InputError, match="need validation data"):
        check_validation(args, [])
    check_validation(args, ["heldout"])
    check_validation(make_arguments(tmp_path), [])


def test_what_a_deepspeed_config_may_not_decide(caplog):
    """An optimizer of its own would have no learning rate for the critic; and models are saved with their weights."""
    settings = prepare_deepspeed({"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}, "scheduler": {}})
    assert not {"optimizer", "scheduler"} & settings.keys() and "optimizer section is dropped" in caplog.text
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert "switched on" in caplog.text


def test_fsdp_without_gpus_is_said_not_to_shard(caplog, tmp_path):
    args = RunArguments(output_dir=str(tmp_path), fsdp=True, use_cpu=True, report_to="none")
    assert not args.fsdp and "--fsdp needs GPUs" in caplog.text
    for config, message in ({"version": 1}, "need version 2"), ({"state_dict_type": "SHARDED_STATE_DICT"}, "FULL"):
        with pytest.raises(InputError, match=message):
            RunArguments(output_dir=str(tmp_path), fsdp=True, fsdp_config=config, report_to="none")


def test_a_lock_that_a_killed_build_left_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    prepare_deepspeed({})
    assert "waits" not in caplog.text
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    prepare_deepspeed({})
    assert f"waits as long as {lock} exists" in caplog.text


def test_deepspeed_configs_of_the_forerunners_are_mended(caplog):
    given = {
        "fp16": {"enabled": "auto", "min_loss_scale": 1e-10},
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 3},
    }
    with caplog.at_level(logging.WARNING):
        config = prepare_deepspeed(given)
    assert "optimizer" not in config and "the optimizer section is dropped" in caplog.text
    assert config["zero_optimization"] == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    assert ("fp16" in config) == torch.cuda.is_available() and "min_loss_scale" in caplog.text
    assert given["zero_optimization"] == {"stage": 3} and given["fp16"]["min_loss_scale"] == 1e-10, "a copy is mended"


def test_new_rows_cannot_be_trained_alone_where_they_are_spread():
    extend, lora = ExtendArguments(train_new_rows_only=True), LoraArguments()
    args = SimpleNamespace(deepspeed=None, fsdp=None, embedding_learning_rate=None)
    check_embeddings(args, extend, lora)
    for engine in ("deepspeed", "fsdp"):
        with pytest.raises(InputError, match="DeepSpeed and FSDP spread the rows"):
            check_embeddings(SimpleNamespace(**vars(args) | {engine: {"zero": 2}}), extend, lora)
