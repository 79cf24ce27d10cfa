"""Bad input to pt.py and sft.py: one clear error before anything slow, status 2, no traceback, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import utils.core.arguments
import utils.core.command_line
from support.paths import EXAMPLES, SCRIPTS
from support.tokenizers import train_sentencepiece, write_sentencepiece

QUICK = [
    "--precision",
    "fp32",
    "--max_steps",
    "2",
    "--lora_rank",
    "2",
    "--target_modules",
    "q_proj",
    "--report_to",
    "none",
]
GOOD = '{"instruction": "a", "output": "b"}\n'


def invoke(script: str, argv: list, monkeypatch, capsys) -> tuple[int, str]:
    """What the shell would see of `python scripts/<script>.py argv`: status and standard error."""
    import pt
    import sft

    shared = ("ModelArguments", "ExtendArguments", "LoraArguments", "DataArguments")
    own = pt.PretrainingArguments if script == "pt" else sft.TuningArguments
    types = [*(getattr(utils.core.arguments, name) for name in shared), own, "utils.training.arguments:RunArguments"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv), *QUICK])
    with pytest.raises(SystemExit) as end:
        utils.core.command_line.run(pt.main if script == "pt" else sft.main, *types)
    return end.value.code, capsys.readouterr().err


def assert_refused(result: tuple[int, str], *words: str) -> None:
    status, text = result
    assert status == 2
    assert "Traceback" not in text
    error = text[text.rindex("error: ") :]
    for word in words:
        assert word in error, error


@pytest.fixture
def refuse(monkeypatch, capsys, tiny_model_folder, tmp_path):
    def check(script, data, *words, extra=(), model=tiny_model_folder):
        out = tmp_path / "out"
        argv = ["--model_name_or_path", model, "--train_data", data, "--output_dir", out, *extra]
        assert_refused(invoke(script, argv, monkeypatch, capsys), *words)
        assert not list(out.glob("checkpoint-*")) and not (out / "all_results.json").exists()

    return check


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("script", ["pt", "sft"])
def test_missing_and_empty_data(script, refuse, tmp_path):
    refuse(script, tmp_path / "nowhere", "data not found", "nowhere")
    (tmp_path / "folder").mkdir()
    refuse(script, tmp_path / "folder", "folder")
    refuse(script, write(tmp_path / "empty.jsonl", ""), "empty.jsonl")


@pytest.mark.parametrize("script", ["pt", "sft"])
def test_broken_json_names_file_and_line(script, refuse, tmp_path):
    good = '{"text": "a"}\n' if script == "pt" else GOOD
    refuse(script, write(tmp_path / "d.jsonl", good + '{"text": \n'), "d.jsonl:2", "broken JSON")


def test_missing_fields_name_what_is_there(refuse, tmp_path):
    refuse("pt", write(tmp_path / "d.jsonl", '{"content": "a"}\n'), "d.jsonl:1", "'text' is missing", "['content']")
    refuse("sft", write(tmp_path / "e.jsonl", GOOD + '{"instruction": "a"}\n'), "e.jsonl:2", "'output' is missing")


def test_invalid_utf8_names_the_line(refuse, tmp_path):
    refuse("pt", write(tmp_path / "d.txt", b"one\ntwo\n\xff\xfe three\n"), "d.txt:3", "UTF-8", "--on_bad_record skip")
    refuse("sft", write(tmp_path / "e.jsonl", GOOD.encode() + b'{"instruction": "\xff"}\n'), "e.jsonl:2", "UTF-8")


def test_invalid_utf8_can_be_skipped_and_is_counted(tiny_model_folder, tmp_path, monkeypatch, capsys, caplog):
    import logging

    import pt

    from utils.core.command_line import parse_args

    data = write(tmp_path / "d.txt", b"some good text here\n" * 20 + b"\xff\n" + b"more of the good text\n" * 20)
    argv = ["--model_name_or_path", tiny_model_folder, "--train_data", data, "--output_dir", tmp_path / "o", *QUICK]
    shared = [
        getattr(utils.core.arguments, n)
        for n in ("ModelArguments", "ExtendArguments", "LoraArguments", "DataArguments")
    ]
    types = [*shared, pt.PretrainingArguments, "utils.training.arguments:RunArguments"]
    with caplog.at_level(logging.INFO):
        pt.main(*parse_args(*types, argv=[*map(str, argv), "--on_bad_record", "skip", "--block_size", "32"]))
    assert "skipped 1" in caplog.text or "1 skipped" in caplog.text or "1 line" in caplog.text, caplog.text


def test_all_labels_masked(refuse, tmp_path):
    row = json.dumps({"instruction": "word " * 400, "output": "b"})
    refuse(
        "sft", write(tmp_path / "d.jsonl", row + "\n"), "label", "--max_seq_length", extra=["--max_seq_length", "16"]
    )


@pytest.mark.parametrize("script", ["pt", "sft"])
def test_a_larger_tokenizer_without_permission(script, refuse, tmp_path, extended_tokenizer_folder):
    data = write(tmp_path / "d.jsonl", '{"text": "a"}\n' if script == "pt" else GOOD)
    tokenizer = ["--tokenizer_name_or_path", extended_tokenizer_folder]
    refuse(script, data, "406 tokens", "400 embedding rows", "--modules_to_save embed_tokens,lm_head", extra=tokenizer)


def test_an_adapter_of_another_vocabulary(refuse, tmp_path, tiny_model_folder, base_tokenizer_folder):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    model.resize_token_embeddings(410, mean_resizing=False)
    torch.manual_seed(0)
    saved = ["embed_tokens", "lm_head"]
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    extra = ["--peft_path", tmp_path / "adapter", "--tokenizer_name_or_path", base_tokenizer_folder]
    refuse("sft", write(tmp_path / "d.jsonl", GOOD), "410 rows", "400", "vocabularies", extra=extra)


@pytest.mark.parametrize("damage", ["truncated", "corrupt header", "missing"])
def test_damaged_weights_are_named(damage, refuse, tmp_path, tiny_model_folder):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "corrupt header":
        weights.write_bytes(b"\x10" + b"\xff" * 20 + content[21:])
    else:
        weights.unlink()
    refuse("sft", write(tmp_path / "d.jsonl", GOOD), str(model), model=model)


def test_unknown_yaml_key_and_numbers_that_are_none(tmp_path, monkeypatch, capsys):
    config = write(tmp_path / "c.yaml", "learnin_rate: 1e-4\n")
    assert_refused(
        invoke("sft", [config], monkeypatch, capsys), "c.yaml", "'learnin_rate'", "did you mean 'learning_rate'"
    )
    assert_refused(invoke("sft", ["--learning_rate", "nan"], monkeypatch, capsys), "--learning_rate nan", "finite")
    assert_refused(invoke("pt", ["--learning_rate", "-1"], monkeypatch, capsys), "--learning_rate -1")


def test_a_loss_that_explodes_stops_the_run(tmp_path, tiny_model_folder, monkeypatch, capsys):
    data = write(tmp_path / "d.jsonl", GOOD * 50)
    argv = ["--model_name_or_path", tiny_model_folder, "--train_data", data, "--output_dir", tmp_path / "out"]
    argv += ["--learning_rate", "1e30", "--max_grad_norm", "0", "--full_finetuning", "--max_seq_length", "128"]
    monkeypatch.setattr(sys.modules[__name__], "QUICK", [*QUICK, "--max_steps", "20"])
    assert_refused(invoke("sft", argv, monkeypatch, capsys), "the loss is", "lower --learning_rate")


# ---------------------------------------------------------------- the machine says no


def spawn(script: str, *argv, **options) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def training_argv(script, model, out, tmp_path) -> list:
    if script == "pt":
        lines = (EXAMPLES / "pretrain" / "en_train.txt").read_text(encoding="utf-8").splitlines()[:300]
        data = write(tmp_path / "en.txt", "\n".join(lines))
        extra = ["--block_size", "64", "--modules_to_save", "embed_tokens,lm_head"]
    else:
        data, extra = EXAMPLES / "sft" / "train.json", ["--max_seq_length", "256"]
    argv = ["--model_name_or_path", model, "--train_data", data, "--output_dir", out, "--precision", "fp32", *extra]
    return [*argv, "--lora_rank", "8", "--save_steps", "2", "--max_steps", "400", "--report_to", "none"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pt", "sft"])
@pytest.mark.parametrize("moment", ["importing", "tokenising", "training"])
def test_ctrl_c_ends_with_one_line(script, moment, tmp_path, tiny_model_folder):
    out = tmp_path / "out"
    process = spawn(script, *training_argv(script, tiny_model_folder, out, tmp_path))
    start = {"importing": None, "tokenising": out / "run_config.yaml", "training": out / "checkpoint-2"}[moment]
    time.sleep(1.0 if start is None else 0)
    while start is not None and not start.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text[-2000:]
    assert "interrupted; run the same command again" in text and "Traceback" not in text


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_while_checkpointing(small_disk, tmp_path, tiny_model_folder):
    out = small_disk / "out"
    argv = training_argv("pt", tiny_model_folder, out, tmp_path)
    process = spawn("pt", *argv, "--lora_rank", "128", "--data_cache_dir", tmp_path / "cache")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text[-2000:]
    assert "no space left on the device" in text and "Traceback" not in text
    assert all((checkpoint / "complete").is_file() for checkpoint in out.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_full_disk_while_caching(small_disk, tmp_path, base_tokenizer_folder, tiny_model_folder):
    text = (EXAMPLES / "pretrain" / "en_train.txt").read_text(encoding="utf-8") * 8
    data = write(tmp_path / "big.txt", text)
    argv = ["--model_name_or_path", tiny_model_folder, "--train_data", data, "--output_dir", tmp_path / "out", *QUICK]
    process = spawn("pt", *argv, "--data_cache_dir", small_disk / "cache")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text[-2000:]
    assert "no space left on the device" in text and "Traceback" not in text
    left = [path for path in (small_disk / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1 << 16]
    assert not left


@pytest.mark.slow
def test_one_process_error_has_no_traceback(tmp_path):
    """Once through a real shell: the launcher, a real process, its status."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "MODEL": str(tmp_path / "none"),
        "DATA": str(tmp_path / "none"),
    }
    result = subprocess.run(
        ["bash", str(SCRIPTS / "run_sft.sh")], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr


def test_other_base_is_refused_before_weights(refuse, tmp_path, tiny_model_folder):
    lines = [f"the dog {i} sits on the mat, abc def ghi" for i in range(300)]
    other = write_sentencepiece(tmp_path / "other", train_sentencepiece(lines, 330))
    data = write(tmp_path / "d.txt", "some text to learn from\n" * 50)
    extra = ["--tokenizer_name_or_path", other, "--modules_to_save", "embed_tokens,lm_head"]
    refuse("pt", data, "must extend", extra=extra)


def test_a_finished_run_survives_a_mistake_in_the_command_that_replaces_it(
    tiny_model_folder, tmp_path, monkeypatch, capsys
):
    """--overwrite_output_dir takes the old run away only when the new one has its data."""
    from utils.training.runs import FINISHED

    out = tmp_path / "out"
    out.mkdir()
    for name in ("run_config.yaml", FINISHED, "adapter_model.safetensors"):
        write(out / name, "{}")
    argv = ["--model_name_or_path", tiny_model_folder, "--train_data", tmp_path / "mistyped.json", "--output_dir", out]
    assert_refused(invoke("sft", [*argv, "--overwrite_output_dir"], monkeypatch, capsys), "mistyped.json")
    assert (out / "adapter_model.safetensors").read_text() == "{}"
