"""Arguments of a run: mistakes said together, precision, DeepSpeed and FSDP configs made to fit."""

import logging

import pytest
import torch

from utils.core.errors import InputError
from utils.training.arguments import RunArguments, check_validation, prepare_deepspeed


def arguments(**settings) -> RunArguments:
    return RunArguments(**{"output_dir": "out", "report_to": "none", "use_cpu": True, **settings})


def test_several_mistakes_are_said_together():
    with pytest.raises(InputError) as raised:
        arguments(learning_rate=0, num_train_epochs=-1, fp16=True, bf16=True)
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == [
        "--learning_rate 0",
        "--num_train_epochs -1",
        "--fp16 and --bf16 exclude each other",
    ]


@pytest.mark.parametrize(
    ("settings", "dtype"), [({"precision": "fp32"}, torch.float32), ({"precision": "bf16"}, torch.bfloat16)]
)
def test_the_precision_asked_for_is_used_and_recorded_as_asked(settings, dtype):
    args = arguments(**settings)
    assert args.compute_dtype == dtype and args.bf16 == (dtype == torch.bfloat16)
    assert args.given["precision"] == settings["precision"] and args.given["bf16"] is not True


def test_checkpointing_does_not_lose_gradients_of_adapters():
    args = arguments(gradient_checkpointing=True)
    new = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    assert getattr(args, new) is True and getattr(args, f"{new}_kwargs") == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("config", "named"),
    [({"version": 1}, "version 1"), ({"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, "SHARDED_STATE_DICT")],
)
def test_fsdp_that_leaves_no_model_is_refused(config, named):
    with pytest.raises(InputError, match=named):
        arguments(fsdp="full_shard", fsdp_config=config)


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


def test_evaluation_needs_validation_data():
    check_validation(arguments(), [])
    check_validation(arguments(eval_strategy="steps", eval_steps=5), ["validation/zh"])
    with pytest.raises(InputError, match="--validation_split"):
        check_validation(arguments(eval_strategy="steps", eval_steps=5), [])
