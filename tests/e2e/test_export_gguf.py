"""export_gguf.py: files that llama.cpp runs as transformers runs the model, or no files at all.

With random weights llama.cpp and transformers agree exactly in float32 and almost in float16 (logits of random models
are nearly equal); the slow tests train a small model first. The slow oracle is llama.cpp's own converter.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import export_gguf
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from support.dying import die_of_sigill
from support.fuzz_text import fuzz_texts, shared_lines
from support.paths import EXAMPLES, ROOT
from support.scripts import next_words
from support.tokenizers import read_lines, train_sentencepiece, write_sentencepiece
from utils.core import machine
from utils.core.errors import InputError
from utils.core.files import hash_file
from utils.gguf import file as gguf_file
from utils.gguf import llamacpp, tokenizer
from utils.text.tokenizer import encode_texts, load_tokenizer, save_tokenizer

SCRIPT = Path(export_gguf.__file__)
needs_llama_cpp = pytest.mark.skipif(
    not llamacpp.is_installed(), reason="llama-cpp-python is not installed (requirements-llamacpp.txt)"
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_model(folder, tokenizer_folder, kind="llama", dtype=torch.float32, **changes):
    """A model folder with random weights, large enough that logits differ, and the tokenizer."""
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **({"vocab_size": len(tokenizer)} | SIZES | ids | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0).add_(torch.randn_like(parameter) * 0.02)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def run_export(base, out, *types, **settings):
    arguments = {"types": list(types) or ["f32"], "threads": 1} | settings
    return export_gguf.main(export_gguf.ExportArguments(str(base), output_dir=str(out), **arguments))


def read_tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def read_fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory, extended_tokenizer_folder):
    return make_model(tmp_path_factory.mktemp("export") / "llama", extended_tokenizer_folder)


# ---------------------------------------------------------------- files that are right


@needs_llama_cpp
def test_export_proves_what_it_writes(llama, tmp_path):
    from utils.text.prompts import CHAT_TEMPLATES

    base = Path(shutil.copytree(llama, tmp_path / "base"))
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = CHAT_TEMPLATES["alpaca-2"]
    save_tokenizer(tokenizer, base)
    (tmp_path / "mine.txt").write_text("我自己的文本。\nMy own text.\n", encoding="utf-8")
    report = run_export(base, tmp_path / "out", "f32", "Q8_0", self_test_data=[str(tmp_path / "mine.txt")])
    names = {"model-F32.gguf", "model-Q8_0.gguf", "Modelfile-F32", "Modelfile-Q8_0", "export_report.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"run_config.yaml"}
    assert json.loads((tmp_path / "out" / "export_report.json").read_text(encoding="utf-8")) == report
    test = report["self_test"]
    assert test["level"] == "full" and test["token_texts"] > 70
    exact, coarse = test["results"]["F32"], test["results"]["Q8_0"]
    assert exact["passed"] and coarse["passed"]
    assert exact["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert exact["top1_agreement"] == 1.0 and exact["kl_divergence"] < 1e-8 < coarse["kl_divergence"] < 0.1
    assert exact["doubts"] == coarse["doubts"] == []
    assert exact["greedy"] == {"prompts": 20, "equal": 20, "equal_up_to_a_near_tie": 0}
    assert "greedy" not in coarse and 0.5 < coarse["top1_agreement"] < 1
    assert report["files"]["Q8_0"]["tensor_types"] == {"Q8_0": 16, "F32": 5}
    assert report["files"]["Q8_0"]["sha256"] == hash_file(tmp_path / "out" / "model-Q8_0.gguf")
    fields = read_fields(tmp_path / "out" / "model-F32.gguf")
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATES["alpaca-2"]
    assert fields["general.name"] == "base"
    assert (tmp_path / "out" / "Modelfile-Q8_0").read_text(encoding="utf-8").startswith("FROM ./model-Q8_0.gguf\n")


def rope(**settings):
    return {"rope_parameters": {"rope_theta": 10000.0, **settings}}


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "llama3": ("llama", rope(**LLAMA3, original_max_position_embeddings=64)),
    "yarn": ("llama", rope(**YARN, attention_factor=0.9)),
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "num_hidden_layers": 7}
MORE_KINDS = {
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3_capped": ("gemma3_text", GEMMA | {"final_logit_softcapping": 3.0, "tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("llama", {"head_dim": 32}),
    "multi_head": ("llama", {"num_key_value_heads": 4}),
    "linear": ("llama", rope(rope_type="linear", factor=4.0)),
    "plain_yarn": ("llama", rope(**YARN)),
    "dynamic": ("llama", rope(rope_type="dynamic", factor=4.0)),
    "theta": ("llama", rope(rope_type="default") | {"rms_norm_eps": 1e-3}),
    "mistral": ("mistral", {"sliding_window": 400}),
    "qwen2": ("qwen2", {}),
    "qwen2_yarn": ("qwen2", rope(**YARN)),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **{"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
            **{"head_dim": 32, "moe_intermediate_size": 64},
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **{"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
            **{"moe_intermediate_size": 64, "shared_expert_intermediate_size": 32},
        },
    ),
    "one_expert": ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


@needs_llama_cpp
@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE_KINDS)])
def test_llama_cpp_computes_the_same_in_float32(tmp_path, extended_tokenizer_folder, kind):
    """Every architecture and rotary embedding: all 20 continuations equal, perplexity to five digits."""
    architecture, changes = (KINDS | MORE_KINDS)[kind]
    base = make_model(tmp_path / "base", extended_tokenizer_folder, architecture, **changes)
    result = run_export(base, tmp_path / "out", "f32", self_test="full")["self_test"]["results"]["F32"]
    assert result["perplexity_ratio"] == pytest.approx(1, abs=2e-5)
    assert result["top1_agreement"] > 0.998
    assert result["greedy"]["equal"] >= 19


@needs_llama_cpp
def test_base_and_adapters_are_exported_as_one_model(llama, tmp_path):
    import merge_llama2_with_chinese_lora_low_mem as merge
    from peft import LoraConfig, get_peft_model

    for number, modules in enumerate((["q_proj", "up_proj"], ["k_proj", "q_proj"])):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=modules))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / f"adapter{number}")
    adapters = f"{tmp_path / 'adapter0'},{tmp_path / 'adapter1'}"
    report = run_export(llama, tmp_path / "direct", "f32", adapter_name_or_path=adapters)
    assert report["self_test"]["results"]["F32"]["greedy"]["equal"] == 20
    assert [Path(path).name for path in report["adapters"]] == ["adapter0", "adapter1"]
    merge.main(merge.MergeArguments(str(llama), adapters, output_dir=str(tmp_path / "merged")))
    run_export(tmp_path / "merged", tmp_path / "steps", "f32", self_test="tokens")
    direct, steps = (read_tensors(tmp_path / name / "model-F32.gguf") for name in ("direct", "steps"))
    assert direct.keys() == steps.keys()
    assert all(np.array_equal(direct[name].data, steps[name].data) for name in direct)


@needs_llama_cpp
def test_k_quants_say_where_rows_do_not_fill_their_blocks(llama, extended_tokenizer_folder, tmp_path, caplog):
    report = run_export(llama, tmp_path / "narrow", "q4_k_m", self_test="tokens")  # rows of 64 and 96
    file = report["files"]["Q4_K_M"]
    assert len(file["fallbacks"]) == 16 and not any("_K" in kind for kind in file["tensor_types"])
    assert "do not fill its blocks" in caplog.text
    assert sorted(path.name for path in (tmp_path / "narrow").glob("*.gguf")) == ["model-Q4_K_M.gguf"]
    wide = make_model(tmp_path / "wide", extended_tokenizer_folder, hidden_size=256, intermediate_size=512)
    report = run_export(wide, tmp_path / "out", "f16", "q6_k", "q4_k_m", self_test="tokens")
    assert report["files"]["Q4_K_M"]["fallbacks"] == []
    assert report["files"]["Q4_K_M"]["tensor_types"]["Q4_K"] > 10
    assert report["files"]["Q6_K"]["tensor_types"] == {"Q6_K": 16, "F32": 5}
    assert report["files"]["Q4_K_M"]["size_gb"] < 0.4 * report["files"]["F16"]["size_gb"]


def write_imatrix(path, columns):
    """Importance that says: every other column counts."""
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, size in columns.items():
        importance = np.where(np.arange(size) % 2, 0.001, 1000.0).astype(np.float32)
        writer.add_tensor(f"{name}.in_sum2", importance[None])
        writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_llama_cpp
def test_an_importance_matrix_decides_what_is_kept(extended_tokenizer_folder, tmp_path):
    base = make_model(tmp_path / "base", extended_tokenizer_folder, hidden_size=256, intermediate_size=256)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    columns = {f"blk.{layer}.{name}.weight": 256 for layer in range(2) for name in names}
    write_imatrix(tmp_path / "imatrix.gguf", columns)
    run_export(base, tmp_path / "plain", "f32", "q2_k", self_test="none")
    run_export(base, tmp_path / "matrix", "q2_k", "iq2_xs", self_test="none", imatrix=str(tmp_path / "imatrix.gguf"))
    exact = read_tensors(tmp_path / "plain" / "model-F32.gguf")["blk.0.ffn_up.weight"].data
    errors = {}
    for folder in ("plain", "matrix"):
        tensor = read_tensors(tmp_path / folder / "model-Q2_K.gguf")["blk.0.ffn_up.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        errors[folder] = np.abs(values - exact)[:, ::2].mean()
    assert errors["matrix"] < 0.9 * errors["plain"]
    write_imatrix(tmp_path / "other.gguf", {"blk.0.attn_q.weight": 64})
    with pytest.raises(InputError, match=r"--imatrix was made from another model \(blk\.0\.attn_q\.weight has 64"):
        run_export(base, tmp_path / "out", "q2_k", self_test="none", imatrix=str(tmp_path / "other.gguf"))


# ---------------------------------------------------------------- files that would be wrong


def swap_nothing(rows, heads):
    return np.arange(rows)


def wrong_plan(monkeypatch, change):
    """Let the plan be changed before it is written."""
    plan_gguf = gguf_file.plan_gguf

    def changed(*args):
        plan = plan_gguf(*args)
        change(plan)
        return plan

    monkeypatch.setattr(gguf_file, "plan_gguf", changed)


WRONG_ARITHMETIC = {
    "order of rows": lambda m: m.setattr(gguf_file, "_interleaved_rows", swap_nothing),
    "rotary base": lambda m: wrong_plan(m, lambda plan: plan.metadata.update(add_rope_freq_base=500000.0)),
    "epsilon": lambda m: wrong_plan(m, lambda plan: plan.metadata.update(add_layer_norm_rms_eps=0.1)),
}


@needs_llama_cpp
@pytest.mark.parametrize("file_type", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("mistake", WRONG_ARITHMETIC)
def test_wrong_arithmetic_is_not_published(llama, tmp_path, monkeypatch, mistake, file_type):
    WRONG_ARITHMETIC[mistake](monkeypatch)
    with pytest.raises(InputError, match=f"{file_type.upper()}: .*") as caught:
        run_export(llama, tmp_path / "out", file_type)
    assert "nothing is published" in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@needs_llama_cpp
@pytest.mark.parametrize("damaged", [False, True])
def test_a_damaged_quantisation_is_not_published(llama, tmp_path, monkeypatch, damaged):
    """One tensor of fourteen whose rows stand in another order: everything else is as it should be."""
    write_gguf = gguf_file.write_gguf

    def write(plan, model, file_type, path):
        digest = write_gguf(plan, model, file_type, path)
        if damaged:
            reader = gguf.GGUFReader(path, "r+")
            (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
            tensor.data[:] = tensor.data[::-1].copy()
            reader.data.flush()
        return digest

    monkeypatch.setattr(gguf_file, "write_gguf", write)
    if not damaged:
        assert run_export(llama, tmp_path / "out", "q8_0")["self_test"]["results"]["Q8_0"]["passed"]
        return
    with pytest.raises(InputError, match=r"Q8_0: mean KL divergence .* .* over 29 texts\), at most 0.1 explained"):
        run_export(llama, tmp_path / "out", "q8_0")
    assert not (tmp_path / "out").exists()


@needs_llama_cpp
@pytest.mark.parametrize("what, file_type", [("_work_on_model", "q8_0"), ("_quantize", "q4_k_m")])
def test_llama_cpp_takes_nothing_with_it(llama, tmp_path, monkeypatch, what, file_type):
    """An instruction that this processor has not, or denies: one line, and nothing is half published."""
    llamacpp.require_llama_cpp("this test")  # it runs here; what is tested is its death later on
    monkeypatch.setattr(llamacpp, what, die_of_sigill)
    with pytest.raises(InputError, match=r"^llama\.cpp was ended by SIGILL: .* with `make setup-llamacpp`"):
        run_export(llama, tmp_path / "out", file_type)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@needs_llama_cpp
def test_a_llama_cpp_that_dies_is_named_before_weights_are_read(llama, tmp_path, monkeypatch):
    llamacpp._try_out.cache_clear()
    monkeypatch.setattr(llamacpp, "_work_on_model", die_of_sigill)
    monkeypatch.setattr(gguf_file, "write_gguf", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=r"^llama\.cpp was ended by SIGILL"):
        run_export(llama, tmp_path / "out", "f16")


def shuffle_scores(plan):
    plan.metadata["add_token_scores"] = plan.metadata["add_token_scores"][::-1]


def forget_prefix(plan):
    plan.metadata["add_add_space_prefix"] = False


@needs_llama_cpp
@pytest.mark.parametrize("change", [shuffle_scores, forget_prefix])
def test_wrong_tokens_are_found_before_weights_are_read(llama, tmp_path, monkeypatch, change):
    wrong_plan(monkeypatch, change)
    monkeypatch.setattr(gguf_file, "write_gguf", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=r"llama\.cpp cuts \d+ of \d+ texts otherwise than the tokenizer, first '"):
        run_export(llama, tmp_path / "out", self_test="tokens")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_names_without_the_models_prefix_give_the_same_file(llama, tmp_path):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    weights = {name.removeprefix("model."): weight for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for model, name in ((llama, "one"), (base, "two")):
        run_export(model, tmp_path / name, "f16", self_test="none")
    one, two = (read_tensors(tmp_path / name / "model-F16.gguf") for name in ("one", "two"))
    assert one.keys() == two.keys() and all((one[name].data == two[name].data).all() for name in one)


# ---------------------------------------------------------------- what is tested where


def test_without_llama_cpp_files_are_written_and_called_unproven(llama, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    report = run_export(llama, tmp_path / "out", "f16")
    assert report["self_test"]["level"] == "none" and "pip install" in report["self_test"]["reason"]
    assert "NOT TESTED" in caplog.text
    assert len(read_tensors(tmp_path / "out" / "model-F16.gguf")) == 21
    report = run_export(llama, tmp_path / "some", "q4_k_m", "q8_0", "q6_k")
    assert list(report["files"]) == ["Q8_0"] and report["not_made"] == ["Q4_K_M", "Q6_K"]
    assert "NOT MADE: --types q4_k_m q6_k needs llama-cpp-python; the other types are made: q8_0" in caplog.text
    assert "pip install -r requirements-llamacpp.txt" in caplog.text and not (tmp_path / "some/source.gguf").exists()
    for settings in ({"types": ["q4_k_m"]}, {"self_test": "full"}, {"self_test": "tokens"}):
        with pytest.raises(InputError, match=r"needs llama-cpp-python: pip install -r requirements-llamacpp\.txt"):
            run_export(llama, tmp_path / "other", **settings)


@needs_llama_cpp
def test_auto_tests_what_the_machine_can_do(llama, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(machine, "available_bytes", lambda: 1000)
    report = run_export(llama, tmp_path / "out", "f16")
    assert report["self_test"]["level"] == "tokens" and "of memory" in report["self_test"]["reason"]
    assert report["self_test"]["results"] == {} and report["self_test"]["token_texts"] > 50
    assert "arithmetic is not compared" in caplog.text
    monkeypatch.setattr(export_gguf, "AUTO_SELF_TEST_PARAMETERS", 1000)
    report = run_export(llama, tmp_path / "out2", "f16")
    assert "--self_test full" in report["self_test"]["reason"]
    assert run_export(llama, tmp_path / "out3", "f32", self_test="full")["self_test"]["level"] == "full"


# ---------------------------------------------------------------- bad input


def test_bad_input_is_named(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="--base_model"):
        export_gguf.ExportArguments()
    with pytest.raises(InputError, match="--threads 0"):
        export_gguf.ExportArguments(str(llama), threads=0)
    with pytest.raises(InputError, match="Q9: need one or more of"):
        run_export(llama, out, "q9")
    with pytest.raises(InputError, match="need an importance matrix"):
        run_export(llama, out, "iq1_s")
    with pytest.raises(InputError, match="no such file"):
        run_export(llama, out, "f16", imatrix=str(tmp_path / "none.gguf"))
    with pytest.raises(InputError, match="data not found"):
        run_export(llama, out, "f16", self_test_data=[str(tmp_path / "none.txt")])
    with pytest.raises(InputError, match="overlap"):
        run_export(llama, llama / "gguf")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(llama / name, bare / name)
    with pytest.raises(InputError, match="--tokenizer_path"):
        run_export(bare, out)
    os.truncate(bare / "model.safetensors", 5000)
    with pytest.raises(InputError, match=r"model\.safetensors is truncated"):
        run_export(bare, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(InputError, match="no space"):
        run_export(llama, out, self_test="none")
    assert not out.exists()
    out.mkdir()
    (out / "keep.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        run_export(llama, out)
    assert (out / "keep.txt").read_text() == "precious"


@pytest.mark.slow
def test_command_line(llama, tmp_path):
    """The documented spelling works without a warning; a mistake is one line and status 2."""
    command = [sys.executable, str(SCRIPT), "--base_model", llama, "--output_dir", tmp_path / "o u=t.1"]
    command = [str(word) for word in command]
    done = subprocess.run([*command, "--types", "f16", "q8_0", "--self_test", "none"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "old flags" not in done.stderr and "NOT TESTED" in done.stderr
    place = f"MODEL={tmp_path / 'o u=t.1' / 'model-Q8_0.gguf'}"
    flags = ["--engine", "llama.cpp", "--interactive"]
    assert next_words(done.stderr) == [place, "bash", "scripts/run_inference.sh", *flags]
    done = subprocess.run([*command, "--types", "f16"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: output folder")
    assert "Traceback" not in done.stderr


def test_launcher(tmp_path):
    environment = os.environ | {"PYTHON": "python", "DRY_RUN": "1", "MODEL": "a b"}
    launch = ["bash", str(SCRIPT.with_name("run_export_gguf.sh")), "--threads", "2"]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split("export_gguf.py ")[1].strip() == (
        "--base_model a\\ b --output_dir output/gguf --types f16 --threads 2"
    )
    environment |= {"LORA": "x,y", "TYPES": "f16 q4_k_m", "OUT": "o"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split("export_gguf.py ")[1].strip() == (
        "--base_model a\\ b --output_dir o --lora_model x\\,y --types f16 q4_k_m --threads 2"
    )
    del environment["MODEL"]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "set MODEL" in done.stderr


@pytest.mark.slow
def test_killed_exports_leave_nothing_and_run_again(extended_tokenizer_folder, tmp_path):
    base = make_model(tmp_path / "base", extended_tokenizer_folder, hidden_size=1024, intermediate_size=4096)
    flags = ["--base_model", base, "--output_dir", tmp_path / "out", "--types", "f32", "q8_0", "--self_test", "none"]
    for stop in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, flags)], stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while not (tmp_path / ".out.partial" / "model-Q8_0.gguf").exists():
            assert process.poll() is None and time.monotonic() < end, "the export ended before it could be stopped"
            time.sleep(0.002)
        process.send_signal(stop)
        log = process.communicate()[1]
        assert not (tmp_path / "out").exists()
        if stop == signal.SIGINT:
            assert process.returncode == 130 and "Traceback" not in log
            assert not list(tmp_path.glob(".*"))
    run_export(base, tmp_path / "out", "f32", self_test="none")
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- trained weights


def train_model(folder, tokenizer_folder, kind, steps=80, **changes):
    """A small model that has learnt something of the examples' text."""
    base = make_model(folder, tokenizer_folder, kind, hidden_size=256, num_hidden_layers=3, **changes)
    tokenizer = load_tokenizer(base)

    lines = [
        line for pair in zip(read_lines("zh_train.txt"), read_lines("en_train.txt"), strict=False) for line in pair
    ]
    ids = [index for row in encode_texts(tokenizer, lines[:4000]) for index in (1, *row, 2)]
    blocks = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = last = None
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (8,))]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        first, last = first or loss.item(), loss.item()
    assert last < first - 1.5
    model.to(torch.float16).save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def bilingual_tokenizer(tmp_path_factory):
    lines = read_lines("zh_train.txt")[:1500] + read_lines("en_train.txt")[:1500]
    return write_sentencepiece(tmp_path_factory.mktemp("tok") / "bilingual", train_sentencepiece(lines, 2000))


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, changes",
    [("llama", {"intermediate_size": 512}), ("mixtral", {"intermediate_size": 256, "num_local_experts": 4})],
)
def test_trained_models_in_every_type(tmp_path, bilingual_tokenizer, kind, changes):
    base = train_model(tmp_path / "trained", bilingual_tokenizer, kind, **changes)
    heldout = [str(EXAMPLES / "pretrain" / f"{language}_heldout.txt") for language in ("zh", "en")]
    types = ["f32", "f16", "bf16", "q8_0", "q4_0", "q5_1", "q6_k", "q4_k_m", "q3_k_m", "q2_k", "iq4_xs"]
    report = run_export(base, tmp_path / "out", *types, self_test="full", self_test_data=heldout)
    results = report["self_test"]["results"]
    for name in ("F32", "F16"):
        assert results[name]["perplexity_ratio"] == pytest.approx(1, abs=1e-3)
        assert results[name]["top1_agreement"] >= 0.995
        assert sum(results[name]["greedy"].values()) == 40  # 20 prompts, each equal as far as the rule asks
    ratios = {name: result["perplexity_ratio"] for name, result in results.items()}
    assert ratios["Q8_0"] == pytest.approx(1, abs=0.005)
    assert all(0.97 < ratio < 1.1 for ratio in ratios.values()), ratios
    sizes = {name: file["size_gb"] for name, file in report["files"].items()}
    assert sizes["Q2_K"] < sizes["Q4_K_M"] < sizes["Q6_K"] < sizes["Q8_0"] < sizes["F16"] < sizes["F32"]


# ---------------------------------------------------------------- vocabularies


def token_errors(folder, tmp_path, texts):
    """Texts that llama.cpp cuts otherwise, by an exported file of a small model with this tokenizer."""
    base = make_model(tmp_path / "small", folder, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    report = run_export(base, tmp_path / "exported", "q8_0", self_test="tokens")
    assert report["self_test"]["token_texts"] > 60
    path = tmp_path / "exported" / "model-Q8_0.gguf"
    return tokenizer.token_differences(path, load_tokenizer(folder), texts)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["chinese_llama2_55296", "llama2_32000", "merged"])
def test_published_and_merged_vocabularies(shared_data, tmp_path, name):
    folder = shared_data / "tokenizers" / name
    if name == "merged":
        import merge_tokenizers

        tokenizers = shared_data / "tokenizers"
        folder = tmp_path / "merged"
        merge_tokenizers.main(
            merge_tokenizers.MergeTokenizersArguments(
                base_tokenizer=str(tokenizers / "llama2_32000"),
                chinese_sp_model_file=str(tokenizers / "chinese_sp_20000" / "chinese_sp.model"),
                output_dir=str(folder),
            )
        )
    lines = shared_lines(shared_data, every=3)
    texts = [text for text in lines + fuzz_texts(5000, lines) if "\u2581" not in text]
    assert token_errors(folder, tmp_path, texts) == []


@needs_llama_cpp
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_byte_level_vocabularies(tmp_path, name):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    digits = r"\p{N}{1,3}" if name == "llama-bpe" else r"\p{N}"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    backend.decoder = decoders.ByteLevel()
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    lines = read_lines("en_train.txt")[:800] + read_lines("zh_train.txt")[:800]
    backend.train_from_iterator(lines, trainer)
    backend.add_special_tokens(["<|bos|>", "<|eos|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    assert token_errors(tmp_path / "tokenizer", tmp_path, lines[::20] + fuzz_texts(1000, lines)) == []
    fields = read_fields(tmp_path / "exported" / "model-Q8_0.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", name)


# ---------------------------------------------------------------- the oracle: llama.cpp's own converter


@pytest.fixture(scope="session")
def converter(request):
    """convert_hf_to_gguf.py of llama-cpp-python's source: from LLAMACPP_SOURCE, or downloaded once into the cache."""
    if source := os.environ.get("LLAMACPP_SOURCE"):
        return Path(source) / "convert_hf_to_gguf.py"
    requirement = next(
        line.split()[0]
        for line in (ROOT / "requirements-llamacpp.txt").read_text().splitlines()
        if line.startswith("llama-cpp")
    )
    cache = Path(request.config.cache.mkdir("llamacpp")) / requirement
    if not cache.exists():
        working = Path(request.config.cache.mkdir(f"llamacpp-{os.getpid()}"))
        pip = [sys.executable, "-m", "pip", "download", requirement, "--no-binary", "llama-cpp-python", "--no-deps"]
        done = subprocess.run([*pip, "-d", str(working)], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(working)
            pytest.skip(f"no LLAMACPP_SOURCE, and pip cannot download {requirement}")
        with tarfile.open(next(working.glob("*.tar.gz"))) as archive:
            wanted = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")
            members = []
            for member in archive:
                _, _, inside = member.name.partition("/vendor/llama.cpp/")
                if inside.startswith(wanted):
                    member.name = inside
                    members.append(member)
            archive.extractall(working / "source", members, filter="data")
        if not cache.exists():  # another process may have been faster
            os.rename(working / "source", cache)
        shutil.rmtree(working)
    return cache / "convert_hf_to_gguf.py"


OURS_ONLY = {"tokenizer.ggml.add_space_prefix", "tokenizer.ggml.unknown_token_id", "llama.attention.key_length"}
OURS_ONLY |= {"llama.attention.value_length", "GGUF.kv_count", "general.name", "tokenizer.ggml.padding_token_id"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, file_type", [("llama", t) for t in ("f32", "f16", "bf16", "q8_0")] + [("mixtral", "f16")]
)
def test_llama_cpps_own_converter_writes_the_same(converter, extended_tokenizer_folder, tmp_path, kind, file_type):
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    if file_type == "f32":
        changes |= rope(**LLAMA3, original_max_position_embeddings=64)
    base = make_model(
        tmp_path / "base", extended_tokenizer_folder, kind, torch.bfloat16,
        hidden_size=256, intermediate_size=512, vocab_size=410, **changes,
    )  # fmt: skip
    run_export(base, tmp_path / "out", file_type, self_test="none")
    theirs = tmp_path / "theirs.gguf"
    subprocess.run(
        [sys.executable, str(converter), str(base), "--outfile", str(theirs), "--outtype", file_type],
        env=os.environ | {"PYTHONPATH": str(converter.parent / "gguf-py")}, check=True, capture_output=True,
    )  # fmt: skip
    ours = tmp_path / "out" / f"model-{file_type.upper()}.gguf"
    mine, reference = read_tensors(ours), read_tensors(theirs)
    assert mine.keys() == reference.keys()
    for name, tensor in reference.items():
        assert mine[name].tensor_type == tensor.tensor_type, name
        assert list(mine[name].shape) == list(tensor.shape), name
        if name == "rope_freqs.weight":
            np.testing.assert_allclose(mine[name].data, tensor.data, rtol=1e-6)
        else:
            assert np.array_equal(mine[name].data, tensor.data), name
    fields, expected = read_fields(ours), read_fields(theirs)
    assert fields.keys() - expected.keys() <= OURS_ONLY
    assert expected.pop("tokenizer.ggml.add_sep_token", False) is False  # llama.cpp's default
    assert {name for name in expected if fields.get(name) != expected[name]} <= {"GGUF.kv_count", "general.name"}
