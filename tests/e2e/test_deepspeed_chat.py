"""The command lines of the forerunners' RLHF recipe, written for DeepSpeed-Chat: parsed, and run on a tiny model."""

import json
import os
import subprocess
import sys

import pytest

from support.paths import EXAMPLES, SCRIPTS
from support.scripts import script_types
from utils.core.command_line import parse_args

# Their wiki's commands, without paths. Step 2: the reward model; step 3: PPO.
RM = (
    "--data_split 0,10,0 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 2048 "
    "--learning_rate 5e-6 --weight_decay 0.1 --num_padding_at_beginning 0 --num_train_epochs 1 "
    "--gradient_accumulation_steps 1 --lr_scheduler_type cosine --warmup_rate 0.1 --seed 9527 "
    "--gradient_checkpointing --zero_stage 3 --deepspeed --offload --enable_tensorboard --tensorboard_path logs"
)
PPO = (
    "--data_split 0,0,10 --num_padding_at_beginning 0 --per_device_generation_batch_size 6 "
    "--per_device_training_batch_size 6 --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 512 "
    "--max_prompt_seq_len 512 --actor_learning_rate 5e-6 --critic_learning_rate 2e-6 --actor_weight_decay 0.1 "
    "--critic_weight_decay 0.1 --num_train_epochs 1 --lr_scheduler_type cosine --gradient_accumulation_steps 1 "
    "--actor_gradient_checkpointing --critic_gradient_checkpointing --offload_reference_model --actor_dropout 0.0 "
    "--warmup_rate 0.05 --deepspeed --seed 1234 --actor_zero_stage 3 --critic_zero_stage 3 --enable_tensorboard "
    "--tensorboard_path logs --dtype bf16"
)


def values(script, flags):
    """The settings a script reads from a command line, all dataclasses together."""
    parsed = {}
    for part in parse_args(*script_types(script), argv=[*flags.split(), "--output_dir", "out"]):
        parsed |= vars(part)
    return parsed


def test_the_reward_model_s_hyperparameters_are_read(caplog):
    got = values("rm.py", f"--data_path pairs --model_name_or_path base {RM}")
    expected = {
        "train_data": ["pairs"],
        "model_name_or_path": "base",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_seq_length": 2048,
        "learning_rate": 5e-6,
        "weight_decay": 0.1,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "seed": 9527,
        "report_to": ["tensorboard"],
        "deepspeed": None,
    }
    assert {name: got[name] for name in expected} == expected
    assert got.get("activation_checkpointing") or got["gradient_checkpointing"]
    (warning,) = [record.getMessage() for record in caplog.records if "old flags" in record.getMessage()]
    for name in ("data_split", "num_padding_at_beginning", "zero_stage", "offload", "tensorboard_path"):
        assert f"--{name} has no effect" in warning


def test_ppo_s_hyperparameters_are_read(caplog):
    got = values("ppo.py", f"--data_path p --actor_model_name_or_path a --critic_model_name_or_path r {PPO}")
    expected = {
        "train_data": ["p"],
        "model_name_or_path": "a",
        "reward_model": "r",
        "per_device_rollout_batch_size": 6,
        "per_device_train_batch_size": 6,
        "rollout_batch_size": 6,  # of one process; tests/unit/test_old_flags.py has their 24
        "ppo_epochs": 1,
        "max_new_tokens": 512,
        "max_prompt_length": 512,
        "learning_rate": 5e-6,
        "critic_learning_rate": 2e-6,
        "weight_decay": 0.1,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "seed": 1234,
        "precision": "bf16",
        "dtype": "auto",
        "report_to": ["tensorboard"],
    }
    assert {name: got[name] for name in expected} == expected
    assert got.get("activation_checkpointing") or got["gradient_checkpointing"]
    assert len([record for record in caplog.records if "old flags" in record.getMessage()]) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base_tokenizer_folder):
    """A tuned model with their window, pairs and prompts."""
    from support.models import save_llama
    from utils.text.prompts import CHAT_TEMPLATES
    from utils.text.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = load_tokenizer(base_tokenizer_folder)
    tokenizer.chat_template = CHAT_TEMPLATES["alpaca-2"]
    save_llama(folder / "sft", tokenizer, num_hidden_layers=1, max_position_embeddings=2048)
    for name, count in (("preferences", 24), ("prompts", 8)):
        lines = (EXAMPLES / "rlhf" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def launch(folder, launcher, flags, **environment):
    left = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment = {**left, **environment, "PYTHON": sys.executable}
    command = ["bash", str(SCRIPTS / launcher), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("old flags accepted") == 1
    return json.loads((folder / environment["OUT"] / "all_results.json").read_text())


@pytest.mark.slow
def test_both_stages_run_through_their_launchers(folder):
    tuned = {"MODEL": str(folder / "sft")}
    trained = launch(folder, "run_rm.sh", f"{RM} --precision fp32", **tuned, DATA="preferences.jsonl", OUT="rm")
    assert trained["steps"] == 3  # 24 pairs less the held-out one, 8 a step
    assert 0 <= trained["eval_heldout_accuracy"] <= 1
    ppo = f"--critic_model_name_or_path rm {PPO} --max_answer_seq_len 16"  # an untrained model never ends
    trained = launch(folder, "run_ppo.sh", ppo, **tuned, DATA="prompts.jsonl", OUT="ppo")
    assert trained["steps"] == 1 and trained["eval_score"] == pytest.approx(trained["eval_heldout_score"])
    assert (folder / "ppo" / "adapter_model.safetensors").is_file()
    assert list((folder / "ppo" / "runs").glob("*/events.out.tfevents.*"))
