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
# Chinese-Mixtral's: see what differs from the above.
MX_LORA = LORA.replace("gate_proj,down_proj,up_proj", "gate,w1,w2,w3").replace("_kbits 16", "_kbits 4")
MX_LORA = MX_LORA.replace(" --ddp_find_unused_parameters False", " --output_router_logits")
MX_PT = PT.replace(LORA, MX_LORA).replace("2e-4", "1e-4").replace("decay 0.01", "decay 0.1").replace("512", "1024")
MX_SFT = SFT.replace(LORA, MX_LORA).replace("_epochs 1", "_epochs 3").replace("decay 0 ", "decay 0.1 ")
MX_SFT = MX_SFT.replace("0.03", "0.05").replace("512", "1024")
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


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory, base_tokenizer_folder):
    """A tiny Mixtral, hidden 64, whose layers fill the blocks of 4 bits."""
    from transformers import AutoConfig

    from support.models import model_of
    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("mx") / "base", load_tokenizer(base_tokenizer_folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes)
    model_of(config, scale=0.05).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.slow
def test_chinese_mixtrals_run_pt_sh_and_run_sft_sh(folder, mixtral):
    """In 4 bits with dropout on experts; the adapters merge onto each other, and what comes out answers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from utils.core.arguments import ModelArguments
    from utils.lora.adapter_folder import load_with_peft
    from utils.models.loading import load_model

    paths = ["--deepspeed", folder / "ds.json", "--tokenizer_name_or_path", mixtral]
    data = ["--dataset_dir", folder / "pt", "--data_cache_dir", folder / "mx_cache", "--output_dir", folder / "mx_pt"]
    run("pt.py", MX_PT, "--model_name_or_path", mixtral, *paths, *data)
    merge = "merge_llama2_with_chinese_lora_low_mem.py"
    adapter, merged = folder / "mx_pt", folder / "mx_pt_merged"
    run(merge, "--verify", "--base_model", mixtral, "--lora_model", adapter, "--output_dir", merged)
    expected = load_with_peft(
        load_model(ModelArguments(str(mixtral)), torch.float32, adapts_experts=True), {"default": str(adapter)}
    ).eval()
    ids = torch.tensor([[1, 40, 50, 60, 70, 80]])
    got = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(got, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert isinstance(expected, PeftModel) and any(".experts.3.w2.lora_A" in n for n, _ in expected.named_parameters())
    data = ["--dataset_dir", folder / "sft", "--validation_file", folder / "valid.json"]
    data += ["--output_dir", folder / "mx_sft", "--prompt_template", "mixtral"]
    run("sft.py", MX_SFT, "--model_name_or_path", merged, *paths, *data)
    assert "eval_valid_loss" in json.loads((folder / "mx_sft" / "all_results.json").read_text())
    (folder / "q.txt").write_text("你好\n", encoding="utf-8")
    answer = f"--data_file {folder / 'q.txt'} --predictions_file {folder / 'p.json'} --max_new_tokens 4"
    pair = ("--base_model", merged, "--lora_model", folder / "mx_sft")
    for bits in ("", " --load_in_4bit"):
        run("inference_hf.py", answer + bits + " --overwrite", *pair)
        assert (folder / "p.json").is_file()
