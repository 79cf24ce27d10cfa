"""The forerunners' own command lines, only the paths replaced, run to the end on a tiny model."""

import json
import os
import subprocess
import sys

import pytest

from support.paths import EXAMPLES, SCRIPTS

LORA = "--lora_rank 64 --lora_alpha 128 --trainable q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj"
LORA += " --lora_dropout 0.05"
LORA += " --modules_to_save embed_tokens,lm_head --torch_dtype float16 --load_in_kbits 16 --save_safetensors False"
LORA += " --gradient_checkpointing --ddp_find_unused_parameters False"
COMMON = "--do_train --seed 31337 --fp16 --num_train_epochs 1 --lr_scheduler_type cosine"
COMMON += " --logging_strategy steps --logging_steps 10"
COMMON += " --save_strategy steps --save_total_limit 3 --save_steps 200 --gradient_accumulation_steps 8"
COMMON += " --preprocessing_num_workers 8"
COMMON += " --overwrite_output_dir --ddp_timeout 30000 --logging_first_step True"
PT = f"{COMMON} {LORA} --learning_rate 2e-4 --validation_split_percentage 0.001"
PT += " --per_device_train_batch_size 1 --warmup_ratio 0.05"
PT += " --weight_decay 0.01 --block_size 512"
SFT = f"{COMMON} {LORA} --learning_rate 1e-4 --do_eval --per_device_train_batch_size 1 --per_device_eval_batch_size 1"
SFT += " --warmup_ratio 0.03 --weight_decay 0 --evaluation_strategy steps --eval_steps 100 --max_seq_length 512"
ZERO2 = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 100,
        "initial_scale_power": 16,
        "min_loss_scale": 1e-10,
    },
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 1e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a2")
    (folder / "pt").mkdir()
    lines = (EXAMPLES / "pretrain" / "zh_train.txt").read_text(encoding="utf-8").splitlines()[:60]
    (folder / "pt" / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "sft").mkdir()
    rows = json.loads((EXAMPLES / "sft" / "train.json").read_text(encoding="utf-8"))
    (folder / "sft" / "train.json").write_text(json.dumps(rows[:60], ensure_ascii=False), encoding="utf-8")
    (folder / "valid.json").write_text(json.dumps(rows[60:70], ensure_ascii=False), encoding="utf-8")
    (folder / "ds.json").write_text(json.dumps(ZERO2))
    return folder


def run(script, flags, *paths):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    argv = [sys.executable, str(SCRIPTS / script), *map(str, paths), *flags.split()]
    result = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


@pytest.mark.slow
def test_run_pt_sh(folder, tiny_model_folder, extended_tokenizer_folder):
    log = run(
        "pt.py",
        PT,
        "--deepspeed",
        folder / "ds.json",
        "--model_name_or_path",
        tiny_model_folder,
        "--tokenizer_name_or_path",
        extended_tokenizer_folder,
        "--dataset_dir",
        folder / "pt",
        "--data_cache_dir",
        folder / "cache",
        "--output_dir",
        folder / "out",
    )
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    for words in (
        "--trainable is now --target_modules",
        "--warmup_ratio is now --warmup_steps",
        "--torch_dtype is now --dtype",
        "--save_safetensors has no effect",
        "--validation_split_percentage is now --validation_split",
        "bf16 is used instead",
        "min_loss_scale 1e-10 is refused today",
        "the fp16 section is dropped",
    ):
        assert words in log, words
    assert log.count("old flags accepted") == 1


@pytest.mark.slow
def test_run_sft_sh(folder, tiny_model_folder):
    run(
        "sft.py",
        SFT,
        "--deepspeed",
        folder / "ds.json",
        "--model_name_or_path",
        tiny_model_folder,
        "--tokenizer_name_or_path",
        tiny_model_folder,
        "--dataset_dir",
        folder / "sft",
        "--output_dir",
        folder / "out_sft",
        "--validation_file",
        folder / "valid.json",
    )
    assert (folder / "out_sft" / "adapter_model.safetensors").is_file()
    assert "eval_valid_loss" in json.loads((folder / "out_sft" / "all_results.json").read_text())
