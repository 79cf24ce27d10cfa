"""merge_llama2_with_chinese_lora_low_mem.py against PEFT's own merge_and_unload and its adapter-on logits.

Adapters are perturbed everywhere: a fresh lora_B is zero, so that any formula would pass. Row blocks are small: every
larger weight is merged in several.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import merge_llama2_with_chinese_lora_low_mem as merge
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.merging import (
    GROWING,
    KINDS,
    TEXT,
    TIED,
    VARIANTS,
    all_weights,
    big_base,
    fused,
    grown_tokenizer,
    load,
    make_adapter,
    make_base,
    run_merge,
)
from support.scripts import next_words
from utils.core.errors import InputError
from utils.lora import inputs, writer
from utils.lora.base_record import record_base
from utils.lora.config import LowRankFactors
from utils.lora.merged_model import worker_count
from utils.text.tokenizer import load_tokenizer
from utils.weights.streams import FileHasher

SCRIPT = Path(merge.__file__)
pytestmark = pytest.mark.usefixtures("small_blocks")


def differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [
        name for name in first if first[name].dtype != second[name].dtype or not torch.equal(first[name], second[name])
    ]


def without_prefix(model: Path, folder: Path) -> Path:
    """The folder as LlamaModel, below the head, saves it: names without "model."."""
    weights = load_file(model / "model.safetensors")
    shutil.copytree(model, folder)
    inner = {name.removeprefix("model."): weight for name, weight in weights.items()}
    assert "embed_tokens.weight" in inner and "norm.weight" in inner
    save_file(inner, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_names_without_the_models_prefix_are_read_as_transformers_reads_them(tmp_path, tied):
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    bare = without_prefix(base, tmp_path / "bare")
    make_adapter(bare, tmp_path / "adapter")  # by transformers and PEFT
    run_merge(bare, tmp_path / "adapter", tmp_path / "out")
    assert (
        differences(load_file(tmp_path / "out" / "model.safetensors"), all_weights(tmp_path / "adapter/oracle")) == []
    )


def assert_logits_close(folder: Path, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    logits = load(folder, torch.float32)(TEXT).logits
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("merge") / "llama")


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_llama_equals_peft_bit_for_bit(llama, tmp_path, variant):
    expected = make_adapter(llama, tmp_path / "adapter", **VARIANTS[variant])
    report = run_merge(llama, tmp_path / "adapter", tmp_path / "out")
    merged, oracle = all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")
    assert differences(merged, oracle) == []
    assert_logits_close(tmp_path / "out", expected)
    untouched = set(merged) - set(report["relative_delta"])
    assert (
        differences({n: merged[n] for n in untouched}, {n: w for n, w in all_weights(llama).items() if n in untouched})
        == []
    )
    assert all(delta > 1e-4 for delta in report["relative_delta"].values())


def test_dora_on_embeddings_needs_the_norm_over_all_rows(llama, tmp_path):
    expected = make_adapter(llama, tmp_path / "adapter", use_dora=True, target_modules=["q_proj", "embed_tokens"])
    run_merge(llama, tmp_path / "adapter", tmp_path / "out")
    merged, oracle = all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")
    assert differences(merged, oracle) in ([], ["model.embed_tokens.weight"])  # its sum has no fixed order in PEFT
    torch.testing.assert_close(
        merged["model.embed_tokens.weight"], oracle["model.embed_tokens.weight"], rtol=1e-6, atol=0
    )
    assert_logits_close(tmp_path / "out", expected)


@pytest.mark.parametrize("variant", GROWING)
def test_a_grown_vocabulary_reaches_the_config(llama, tmp_path, variant, base_tokenizer_folder):
    expected = make_adapter(llama, tmp_path / "adapter", rows=434, **GROWING[variant])
    with pytest.raises(InputError, match=r"from 400 to 434 rows.*pass --tokenizer_path"):
        run_merge(llama, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    grown_tokenizer(base_tokenizer_folder, tmp_path / "tokenizer", 434)
    report = run_merge(
        llama, tmp_path / "adapter", tmp_path / "out", tokenizer_name_or_path=str(tmp_path / "tokenizer")
    )
    assert differences(all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")) == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 434 == report["vocab_size"]
    assert_logits_close(tmp_path / "out", expected)


@pytest.mark.parametrize(
    "rows", [pytest.param(None, id="same_vocabulary", marks=pytest.mark.slow), pytest.param(434, id="grown")]
)
@pytest.mark.parametrize("variant", TIED)
def test_a_tie_is_kept_or_broken_as_training_left_it(tmp_path, variant, rows, base_tokenizer_folder):
    """The oracle is the model with the adapter on: PEFT's own merge changes both tied weights in place."""
    settings, stays_tied = TIED[variant]
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    assert "lm_head.weight" not in all_weights(base)
    expected = make_adapter(base, tmp_path / "adapter", rows=rows, **settings)
    tokenizer = grown_tokenizer(base_tokenizer_folder, tmp_path / "tokenizer", rows or 400)
    report = run_merge(base, tmp_path / "adapter", tmp_path / "out", tokenizer_name_or_path=str(tokenizer))
    assert_logits_close(tmp_path / "out", expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == stays_tied
    assert ("lm_head.weight" in all_weights(tmp_path / "out")) != stays_tied
    assert any("differently" in note for note in report["notes"]) != stays_tied


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_base_with_an_lm_head_on_disk(tmp_path, equal):
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (1.0 if equal else 1.5)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    expected = make_adapter(base, tmp_path / "adapter", trainable_token_indices=[3, 77] if equal else None)
    run_merge(base, tmp_path / "adapter", tmp_path / "out")
    assert_logits_close(tmp_path / "out", expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == equal


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16], ids=["fp32_adapter", "bf16_adapter"])
def test_half_precision_bases_keep_their_type(tmp_path, dtype, adapter_dtype):
    base = make_base(tmp_path / "base", dtype=dtype)
    make_adapter(base, tmp_path / "adapter", dtype=adapter_dtype, modules_to_save=["lm_head"])
    run_merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = all_weights(tmp_path / "out")
    assert {weight.dtype for weight in merged.values()} == {dtype}
    exact = all_weights(peft_merge(base, tmp_path / "adapter", tmp_path / "exact", torch.float32))
    assert differences(merged, {name: weight.to(dtype) for name, weight in exact.items()}) == []
    peft = all_weights(peft_merge(base, tmp_path / "adapter", tmp_path / "peft", dtype))
    for name, weight in merged.items():  # at most one unit in the last place
        assert (weight.view(torch.int16).int() - peft[name].view(torch.int16).int()).abs().max() <= 1, name


def peft_merge(base: Path, adapter: Path, folder: Path, dtype: torch.dtype) -> Path:
    from peft import PeftModel

    PeftModel.from_pretrained(load(base, dtype), adapter).merge_and_unload().save_pretrained(folder)
    return folder


def test_dtype_casts_every_weight_and_the_config(llama, tmp_path):
    make_adapter(llama, tmp_path / "adapter")
    run_merge(llama, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    oracle = all_weights(tmp_path / "adapter" / "oracle")
    assert differences(all_weights(tmp_path / "out"), {n: w.bfloat16() for n, w in oracle.items()}) == []
    assert load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_equal_peft(tmp_path, kind):
    changes = {"head_dim": 16} if kind == "qwen3" else {}
    base = make_base(tmp_path / "base", kind.split("_")[0], **changes)
    expected = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    run_merge(base, tmp_path / "adapter", tmp_path / "out", verbose=True)
    merged, oracle = all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")
    assert differences(merged, oracle) == []
    assert_logits_close(tmp_path / "out", expected)


@pytest.mark.parametrize("targets", [["q_proj", "gate", "w1", "w2", "w3"], ["w2"], ["w1", "w3"]], ids="-".join)
def test_fused_experts_on_disk_get_the_same_change(tmp_path, targets):
    base = make_base(tmp_path / "base", "mixtral", intermediate_size=192)  # several blocks of every expert
    expected = make_adapter(base, tmp_path / "adapter", target_modules=targets)
    run_merge(fused(base, tmp_path / "fused"), tmp_path / "adapter", tmp_path / "out")
    load(tmp_path / "adapter" / "oracle").save_pretrained(tmp_path / "oracle", save_original_format=False)
    assert differences(all_weights(tmp_path / "out"), all_weights(tmp_path / "oracle")) == []
    assert_logits_close(tmp_path / "out", expected)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3moe"])
@pytest.mark.parametrize("layout", ["one_by_one", "fused"])
def test_chinese_mixtral_adapters_name_experts_one_by_one(tmp_path, layout, kind):
    """Theirs carry block_sparse_moe.experts.N.w1 ..., today's are alike; PEFT opens them by conversion: the oracle."""
    from peft import PeftModel

    base = make_base(tmp_path / "base", kind)
    experts = ["w1", "w2", "w3"] if kind == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    targets = ["q_proj", "gate", *experts]
    torch.manual_seed(5)
    tensors = {}
    for name, weight in all_weights(base).items():
        if name.split(".")[-2] in targets:
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, weight.shape[1]) * 0.1
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 4) * 0.1
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    run_merge(fused(base, tmp_path / "fused") if layout == "fused" else base, adapter, tmp_path / "out")
    assert_logits_close(tmp_path / "out", PeftModel.from_pretrained(load(base), adapter)(TEXT).logits)


def test_fan_in_fan_out_layers(tmp_path):
    """GPT-2 stores its linear layers transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=64, n_layer=1, n_head=4, n_positions=64))
    model.save_pretrained(tmp_path / "base")
    for number, use_dora in enumerate([False, True]):
        adapter, out = tmp_path / f"adapter{number}", tmp_path / f"out{number}"
        expected = make_adapter(
            tmp_path / "base", adapter, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=use_dora
        )
        run_merge(tmp_path / "base", adapter, out)
        for name, weight in all_weights(adapter / "oracle").items():
            torch.testing.assert_close(all_weights(out)[name], weight, rtol=2e-6 if use_dora else 0, atol=0)
        assert_logits_close(out, expected)


# ---------------------------------------------------------------- formats, order, output


def as_bin(folder: Path, target: Path, shards: int = 1, legacy: bool = False) -> Path:
    """The same model as pytorch_model.bin files."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = list(all_weights(folder).items())
    size = -(-len(weights) // shards)
    weight_map = {}
    for number in range(shards):
        part = dict(weights[number * size : (number + 1) * size])
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, target / name, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def as_old_adapter(adapter: Path, target: Path) -> Path:
    """The same adapter as PEFT 0.3 of the forerunners saved it: adapter_model.bin and a short config."""
    target.mkdir()
    torch.save(load_file(adapter / "adapter_model.safetensors"), target / "adapter_model.bin")
    config = json.loads((adapter / "adapter_config.json").read_text())
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "fan_in_fan_out", "bias", "task_type")
    (target / "adapter_config.json").write_text(json.dumps({name: config[name] for name in kept}))
    return target


@pytest.fixture(scope="module")
def simple_adapter(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "simple"
    make_adapter(llama, folder, modules_to_save=["embed_tokens", "lm_head"])
    return folder


@pytest.mark.parametrize(
    "base_format", ["bin", "bin_sharded", "bin_legacy", "safetensors_sharded", "shards_without_index"]
)
def test_every_format_gives_the_same_weights(llama, simple_adapter, tmp_path, base_format):
    base = tmp_path / "base"
    if base_format.startswith("bin"):
        as_bin(llama, base, shards=3 if "sharded" in base_format else 1, legacy="legacy" in base_format)
    else:
        load(llama).save_pretrained(base, max_shard_size="150KB")
        assert len(list(base.glob("*.safetensors"))) > 2
        if base_format == "shards_without_index":
            (base / "model.safetensors.index.json").unlink()
    adapter = as_old_adapter(simple_adapter, tmp_path / "adapter")
    run_merge(base, adapter, tmp_path / "out", max_shard_size="200KB")
    assert differences(all_weights(tmp_path / "out"), all_weights(simple_adapter / "oracle")) == []
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(all_weights(llama))
    files = {name: (tmp_path / "out" / name).stat().st_size for name in set(index["weight_map"].values())}
    assert max(files.values()) <= 200_000 + 4096
    assert differences(load(tmp_path / "out").state_dict(), load(simple_adapter / "oracle").state_dict()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_list_of_adapters_equals_merging_one_by_one(tmp_path, dtype, base_tokenizer_folder):
    base = make_base(tmp_path / "base", dtype=dtype)
    first, second = tmp_path / "first", tmp_path / "second"
    make_adapter(base, first, rows=434, modules_to_save=["embed_tokens", "lm_head"])
    tokenizer = str(grown_tokenizer(base_tokenizer_folder, tmp_path / "tokenizer", 434))
    run_merge(base, first, tmp_path / "merged1", tokenizer_name_or_path=tokenizer)
    expected = make_adapter(
        tmp_path / "merged1", second, seed=2, use_dora=True, target_modules=["q_proj", "embed_tokens"]
    )
    run_merge(tmp_path / "merged1", second, tmp_path / "merged2")
    run_merge(base, f"{first}, {second}", tmp_path / "both", tokenizer_name_or_path=tokenizer)
    assert differences(all_weights(tmp_path / "merged2"), all_weights(tmp_path / "both")) == []
    assert_logits_close(tmp_path / "both", expected, 1e-5 if dtype == torch.float32 else 0.05)
    with pytest.raises(InputError, match=r"400 rows.*434|434.*400"):
        shrinking = tmp_path / "shrinking"
        make_adapter(base, shrinking, modules_to_save=["embed_tokens", "lm_head"])
        run_merge(base, f"{first},{shrinking}", tmp_path / "never", tokenizer_name_or_path=tokenizer)


def test_output_folder_and_report(tiny_model_folder, tmp_path):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    make_adapter(tiny_model_folder, adapter, target_modules=["q_proj"])
    (adapter / "config.json").write_text('{"vocab_size": 1}')  # never wins over the base's
    report = run_merge(tiny_model_folder, adapter, out)
    assert {item.name for item in out.iterdir()} == {
        *(
            "README.md",
            "config.json",
            "generation_config.json",
            "merge_manifest.json",
            "merge_report.json",
            "model.safetensors",
            "run_config.yaml",
        ),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    }
    assert json.loads((out / "config.json").read_text()) == json.loads((tiny_model_folder / "config.json").read_text())
    assert report == json.loads((out / "merge_report.json").read_text())
    old, new = all_weights(tiny_model_folder), all_weights(out)
    for name, delta in report["relative_delta"].items():
        assert delta == pytest.approx(float((new[name] - old[name]).norm() / old[name].norm()), rel=1e-5)
    assert report["changed_tensors"] == 2 == len(report["relative_delta"])
    assert report["copied_tensors"] == len(new) - 2
    assert sum(weight.nbytes for weight in new.values()) / 1e9 == pytest.approx(report["size_gb"], abs=1e-6)


def test_an_untrained_adapter_is_noticed(llama, tmp_path, caplog):
    from peft import LoraConfig, get_peft_model

    get_peft_model(load(llama), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    run_merge(llama, tmp_path / "adapter", tmp_path / "out")
    assert "change nothing" in caplog.text
    assert differences(all_weights(tmp_path / "out"), all_weights(llama)) == []


def test_adapter_weights_scale_each_change(llama, tmp_path, base_tokenizer_folder):
    first, second = tmp_path / "first", tmp_path / "second"
    make_adapter(llama, first, rows=434, modules_to_save=["embed_tokens", "lm_head"])
    make_adapter(llama, second, seed=2, use_dora=True, target_modules=["q_proj", "v_proj"])
    tokenizer = str(grown_tokenizer(base_tokenizer_folder, tmp_path / "tokenizer", 434))
    run_merge(
        llama, f"{first},{second}", tmp_path / "out", adapter_weights="0.25,-1", tokenizer_name_or_path=tokenizer
    )
    base, merged = all_weights(llama), all_weights(tmp_path / "out")
    one, two = all_weights(first / "oracle"), all_weights(second / "oracle")
    for name, weight in merged.items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(weight[400:], one[name][400:]), "rows that only the adapter has are taken whole"
            expected = torch.lerp(base[name], one[name][:400], 0.25)
            torch.testing.assert_close(weight[:400], expected, rtol=1e-5, atol=1e-6)
        elif "q_proj" not in name and "v_proj" not in name:
            torch.testing.assert_close(weight, torch.lerp(base[name], one[name], 0.25), rtol=1e-5, atol=1e-6)
    run_merge(llama, second, tmp_path / "taken_away", adapter_weights="-1")
    for name, weight in all_weights(tmp_path / "taken_away").items():
        torch.testing.assert_close(weight, 2 * base[name] - two[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="2 numbers for 1 adapters"):
        run_merge(llama, second, tmp_path / "never", adapter_weights="1,1")
    with pytest.raises(InputError, match="need numbers such as"):
        run_merge(llama, second, tmp_path / "never", adapter_weights="nan")


def assert_manifest_is_true(out: Path, base: Path, *adapters: Path) -> dict:
    manifest = json.loads((out / "merge_manifest.json").read_text())
    files = {item.name for item in out.iterdir()}
    assert set(manifest["outputs"]) == files - {"merge_manifest.json"}
    folders = [(out, manifest["outputs"]), (base, manifest["inputs"]["base"]["files"])]
    folders += zip(adapters, (entry["files"] for entry in manifest["inputs"]["adapters"]), strict=True)
    for folder, entries in folders:
        weights = {item.name for item in folder.iterdir() if item.suffix in (".safetensors", ".bin", ".pth")}
        assert weights <= entries.keys()
        for name, entry in entries.items():
            content = (folder / name).read_bytes()
            assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, name
    return manifest


def test_the_manifest_names_every_file_with_its_hash(llama, simple_adapter, tmp_path):
    base = tmp_path / "base"
    load(llama).save_pretrained(base, max_shard_size="150KB")
    run_merge(base, simple_adapter, tmp_path / "out", max_shard_size="200KB")
    manifest = assert_manifest_is_true(tmp_path / "out", base, simple_adapter)
    assert manifest["settings"]["max_shard_size"] == "200KB"
    old = as_bin(llama, tmp_path / "bin", shards=2)
    run_merge(old, as_old_adapter(simple_adapter, tmp_path / "old"), tmp_path / "out2")
    assert_manifest_is_true(tmp_path / "out2", old, tmp_path / "old")


@pytest.mark.parametrize("kind", ["blake3", "none"])
def test_the_manifest_has_the_hash_that_was_asked_for(llama, simple_adapter, tmp_path, kind, caplog):
    blake3 = pytest.importorskip("blake3")
    out = tmp_path / "out"
    run_merge(llama, simple_adapter, out, hash=kind)
    manifest = json.loads((out / "merge_manifest.json").read_text())
    for folder, entries in ((out, manifest["outputs"]), (llama, manifest["inputs"]["base"]["files"])):
        content = (folder / "model.safetensors").read_bytes()
        digest = {"blake3": blake3.blake3(content).hexdigest()} if kind == "blake3" else {}
        assert entries["model.safetensors"] == {"bytes": len(content)} | digest
        assert set(entries["config.json"]) == {"bytes", "sha256"}
    with caplog.at_level("INFO"):
        merge.main(merge.MergeArguments(verify_only=str(out)))
    assert ("by their size alone" in caplog.text) == (kind == "none")


def test_a_hash_without_its_package_is_refused_before_anything(llama, simple_adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(InputError, match="--hash blake3: the package is not installed; pip install blake3"):
        run_merge(llama, simple_adapter, tmp_path / "out", hash="blake3")
    assert not (tmp_path / "out").exists()


def test_verify_only_finds_every_change(llama, simple_adapter, tmp_path):
    out = tmp_path / "out"
    run_merge(llama, simple_adapter, out)
    result = merge.main(merge.MergeArguments(verify_only=str(out)))
    assert result["files"] == len(list(out.iterdir())) - 1
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (out / "config.json").unlink()
    (out / "README.md").write_text("short")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        merge.main(merge.MergeArguments(verify_only=str(out)))
    for problem in ("model.safetensors was changed", "config.json is missing", "README.md has 5 bytes", "not in the"):
        assert problem in str(caught.value)
    with pytest.raises(InputError, match=r"merge_manifest\.json"):
        merge.main(merge.MergeArguments(verify_only=str(llama)))


def test_a_dry_run_shows_the_plan_and_writes_nothing(llama, simple_adapter, tmp_path, caplog):
    caplog.set_level("INFO")
    plan = run_merge(llama, simple_adapter, tmp_path / "out", dry_run=True, max_shard_size="200KB")
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*"))
    assert "nothing is written" in caplog.text
    report = run_merge(llama, simple_adapter, tmp_path / "out", max_shard_size="200KB")
    sizes = {item.name: item.stat().st_size for item in (tmp_path / "out").glob("*.safetensors")}
    assert plan["files"] == sizes
    assert (plan["tensors"], plan["changed_tensors"]) == (report["tensors"], report["changed_tensors"])
    assert plan["expected_memory_gb"] > 0.1
    with pytest.raises(InputError, match="match no weight"):
        broken = edit_adapter(simple_adapter, tmp_path / "broken", BROKEN_ADAPTERS["one_strange"][0])
        run_merge(llama, broken, tmp_path / "out2", dry_run=True)


def test_a_model_without_adapters_is_converted(llama, tmp_path):
    report = run_merge(llama, "", tmp_path / "out", dtype="bfloat16", max_shard_size="100KB")
    expected = {name: weight.bfloat16() for name, weight in all_weights(llama).items()}
    assert differences(all_weights(tmp_path / "out"), expected) == []
    assert report["changed_tensors"] == 0
    assert "converted" in (tmp_path / "out" / "README.md").read_text()


# ---------------------------------------------------------------- bad input


def test_a_base_with_other_weights_of_the_same_shape_is_refused(llama, simple_adapter, tmp_path, caplog):
    """Training records what its base was; another model of the same size is no base for that adapter."""
    adapter = edit_adapter(simple_adapter, tmp_path / "adapter")
    record_base(adapter, llama)
    run_merge(llama, adapter, tmp_path / "out")
    sharded = tmp_path / "sharded"
    load(llama).save_pretrained(sharded, max_shard_size="100KB")
    run_merge(sharded, adapter, tmp_path / "out2")  # the same weights in other files
    run_merge(as_bin(llama, tmp_path / "bin"), adapter, tmp_path / "out3")
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    weights = all_weights(llama)
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.001
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="whose weights are not those of"):
        run_merge(other, adapter, tmp_path / "out4")
    load(llama, torch.bfloat16).save_pretrained(tmp_path / "half")
    run_merge(tmp_path / "half", adapter, tmp_path / "out5")
    assert "cannot be checked" in caplog.text


def edit_adapter(source: Path, target: Path, change=None, **config) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("oracle"))
    tensors = load_file(target / "adapter_model.safetensors")
    if change:
        change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    settings = json.loads((target / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return target


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN_ADAPTERS = {
    "empty": (lambda t: t.clear(), {}, "holds no tensors"),
    "one_strange": (
        lambda t: t.update({f"{PREFIX}x.lora_A.weight": torch.ones(4, 64)}),
        {},
        r"1 of \d+ .*q_projx.lora_A",
    ),
    "missing_half": (lambda t: t.pop(f"{PREFIX}.lora_B.weight"), {}, r"1 of .*q_proj\.lora_A"),
    "other_layers": (
        lambda t: t.update({n.replace("layers.1", "layers.7"): t.pop(n) for n in list(t) if "layers.1" in n}),
        {},
        r"28? of \d+ tensors match no weight|14 of",
    ),
    "other_width": (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(4, 32)}), {}, "do not fit"),
    "unsharded_zero3": (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(0)}), {}, "ZeRO-3"),
    "other_rank": (None, {"r": 8}, "has rank 4, adapter_config.json says 8"),
    "other_head": (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(300, 64)}), {}, "300 rows"),
    "head_grows_alone": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(500, 64)}),
        {},
        "bring both",
    ),
    "dora_without_magnitude": (None, {"use_dora": True}, "disagree about DoRA"),
    "not_a_number": (lambda t: t[f"{PREFIX}.lora_B.weight"].fill_(float("nan")), {}, "q_proj.lora_B.weight holds NaN"),
    "infinite_head": (
        lambda t: t["base_model.model.lm_head.weight"][399].fill_(float("inf")),
        {},
        "lm_head.*NaN or inf",
    ),
    "overflow": (lambda t: t[f"{PREFIX}.lora_B.weight"].fill_(3e38), {}, "overflows float32"),
    "other_method": (None, {"peft_type": "IA3"}, "need LORA"),
    "pissa": (None, {"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
    "qalora": (None, {"use_qalora": True}, "use_qalora"),
    "other_class": (None, {"auto_mapping": {"base_model_class": "MixtralForCausalLM"}}, "MixtralForCausalLM"),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_a_broken_or_foreign_adapter_is_refused(llama, simple_adapter, tmp_path, case):
    change, config, message = BROKEN_ADAPTERS[case]
    adapter = edit_adapter(simple_adapter, tmp_path / "adapter", change, **config)
    with pytest.raises(InputError, match=message):
        run_merge(llama, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_adapter_of_another_model_is_refused_with_both_names(llama, simple_adapter, tmp_path):
    smaller = make_base(tmp_path / "smaller", num_hidden_layers=1)
    with pytest.raises(InputError, match=r"num_hidden_layers 2.*smaller has 1"):
        run_merge(smaller, simple_adapter, tmp_path / "out")
    deeper = make_base(tmp_path / "deeper", num_hidden_layers=3)  # every adapter tensor would find its weight
    with pytest.raises(InputError, match=r"num_hidden_layers 2.*deeper has 3"):
        run_merge(deeper, simple_adapter, tmp_path / "out")


def test_the_tokenizer_must_be_that_of_the_embeddings(llama, simple_adapter, tmp_path, base_tokenizer_folder):
    larger = grown_tokenizer(base_tokenizer_folder, tmp_path / "larger", 450)
    with pytest.raises(InputError, match=r"450 tokens.*400 embedding rows"):
        run_merge(llama, simple_adapter, tmp_path / "out", tokenizer_name_or_path=str(larger))
    make_adapter(llama, tmp_path / "adapter", rows=450, modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(InputError, match=r"400 to 450 rows, but the tokenizer has 400"):
        run_merge(llama, tmp_path / "adapter", tmp_path / "out", tokenizer_name_or_path=str(base_tokenizer_folder))
    assert not (tmp_path / "out").exists()


def test_quantised_and_incomplete_bases_are_refused(llama, simple_adapter, tmp_path):
    base = Path(shutil.copytree(llama, tmp_path / "quantised"))
    config = json.loads((base / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(InputError, match="full-precision"):
        run_merge(base, simple_adapter, tmp_path / "out")
    (base / "config.json").write_text(json.dumps(config))
    weights = all_weights(llama)
    weights["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    save_file(weights, base / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj\.weight is stored as int8"):
        run_merge(base, simple_adapter, tmp_path / "out")
    weights["model.layers.1.self_attn.q_proj.weight"] = torch.full((64, 64), float("nan"))
    save_file(weights, base / "model.safetensors")
    with pytest.raises(InputError, match=r"the base's .*q_proj.weight holds NaN"):
        run_merge(base, simple_adapter, tmp_path / "out")
    (base / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        run_merge(base, simple_adapter, tmp_path / "out")


def test_truncated_files_are_named(llama, simple_adapter, tmp_path):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    os.truncate(base / "model.safetensors", (base / "model.safetensors").stat().st_size // 2)
    with pytest.raises(InputError, match=r"base/model\.safetensors is truncated"):
        run_merge(base, simple_adapter, tmp_path / "out")
    adapter = edit_adapter(simple_adapter, tmp_path / "adapter")
    os.truncate(adapter / "adapter_model.safetensors", 1000)
    with pytest.raises(InputError, match=r"adapter/adapter_model\.safetensors is truncated"):
        run_merge(llama, adapter, tmp_path / "out")


def test_existing_output_and_overlapping_folders(llama, simple_adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        run_merge(llama, simple_adapter, out)
    with pytest.raises(InputError, match="holds NaN"):  # a failed merge leaves what it was to replace
        nan = edit_adapter(simple_adapter, tmp_path / "nan", BROKEN_ADAPTERS["not_a_number"][0])
        run_merge(llama, nan, out, overwrite=True)
    assert (out / "keep.txt").read_text() == "precious"
    run_merge(llama, simple_adapter, out, overwrite=True)
    assert not (out / "keep.txt").exists()
    for output in (llama, llama / "sub", llama.parent, simple_adapter / "merged"):
        with pytest.raises(InputError, match="overlap"):
            run_merge(llama, simple_adapter, output, overwrite=True)
    with pytest.raises(InputError, match="twice"):
        run_merge(llama, f"{simple_adapter},{simple_adapter}", tmp_path / "twice")
    with pytest.raises(InputError, match="no space"):
        inputs.check_space(tmp_path, 10**18)


def command(*flags: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, flags)]


@pytest.mark.slow
def test_command_line(llama, simple_adapter, tmp_path):
    """The forerunners' spelling works without a warning; a mistake is one line and status 2."""
    flags = ("--base_model", llama, "--lora_model", simple_adapter, "--output_type", "huggingface", "--output_dir")
    done = subprocess.run(command(*flags, tmp_path / "out"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "old flags" not in done.stderr
    assert next_words(done.stderr)[:2] == ["python", "scripts/inference_hf.py"]
    assert next_words(done.stderr)[-2:] == ["--base_model", str(tmp_path / "out")]
    assert differences(all_weights(tmp_path / "out"), all_weights(simple_adapter / "oracle")) == []
    done = subprocess.run(command(*flags, tmp_path / "out"), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: output folder")
    assert "Traceback" not in done.stderr


def test_launcher(llama, simple_adapter, tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "MODEL": str(llama), "LORA": str(simple_adapter)}
    launch = ["bash", str(SCRIPT.with_name("run_merge.sh")), "--verbose"]
    done = subprocess.run(
        launch, env=environment | {"DRY_RUN": "1", "OUT": "a b"}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0
    assert done.stdout.split()[2:] == (
        f"--base_model {llama} --lora_model {simple_adapter} --output_dir a\\ b --dtype auto --verbose".split()
    )
    del environment["LORA"]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "set LORA" in done.stderr


def wait_for_second_shard(folder: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not list(folder.glob("model-00002-*")):
        assert process.poll() is None and time.monotonic() < end, "the merge ended before it could be killed"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_merge_leaves_nothing_and_goes_on(tmp_path, stop):
    base = big_base(tmp_path / "base", 40)
    make_adapter(base, tmp_path / "adapter")
    flags = command("--base_model", base, "--lora_model", tmp_path / "adapter", "--output_dir", tmp_path / "out")
    process = subprocess.Popen([*flags, "--max_shard_size", "5MB"], stderr=subprocess.PIPE, text=True)
    wait_for_second_shard(tmp_path / ".out.partial", process)
    process.send_signal(stop)
    log = process.communicate()[1]
    assert not (tmp_path / "out").exists()
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in log
        assert "again to go on" in log
    (first,) = (tmp_path / ".out.partial").glob("model-00001-*")
    written = first.stat().st_mtime_ns
    report = run_merge(base, tmp_path / "adapter", tmp_path / "out", max_shard_size="5MB")
    assert (tmp_path / "out" / first.name).stat().st_mtime_ns == written, "a finished shard was written again"
    assert differences(all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")) == []
    assert not list(tmp_path.glob(".*"))
    assert not list((tmp_path / "out").glob(".*"))
    assert_manifest_is_true(tmp_path / "out", base, tmp_path / "adapter")
    fresh = run_merge(base, tmp_path / "adapter", tmp_path / "fresh", max_shard_size="5MB")
    assert report["relative_delta"] == fresh["relative_delta"]


def test_an_unfinished_merge_of_something_else_is_not_continued(llama, simple_adapter, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    for settings in ({"dtype": "bfloat16"}, {"adapter_weights": "0.5"}, {"max_shard_size": "200KB"}, {}):
        with monkeypatch.context() as patch:
            patch.setattr(writer, "write_index", stop)  # after all shards
            with pytest.raises(KeyboardInterrupt):
                run_merge(llama, simple_adapter, tmp_path / "out", **({"max_shard_size": "100KB"} | settings))
        assert (tmp_path / ".out.partial").exists()
    run_merge(llama, simple_adapter, tmp_path / "out", max_shard_size="100KB")
    assert differences(all_weights(tmp_path / "out"), all_weights(simple_adapter / "oracle")) == []


@pytest.mark.slow
def test_twenty_kills_leave_nothing_or_a_complete_folder(tmp_path):
    """Killed at random moments of its writing, again and again; what stands at the end is what PEFT makes."""
    base = big_base(tmp_path / "base", 120)
    make_adapter(base, tmp_path / "adapter")
    flags = command("--base_model", base, "--lora_model", tmp_path / "adapter", "--output_dir", tmp_path / "out")
    chance = random.Random(0)
    for number in range(20):
        process = subprocess.Popen([*flags, "--max_shard_size", "8MB"], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not (tmp_path / ".out.partial").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.4)
        process.kill()
        process.wait()
        if (tmp_path / "out").exists():
            merge.main(merge.MergeArguments(verify_only=str(tmp_path / "out")))
            assert differences(all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")) == []
            shutil.rmtree(tmp_path / "out")
        elif number % 5 == 4:
            shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)  # so that many kills hit early shards
    run_merge(base, tmp_path / "adapter", tmp_path / "out", max_shard_size="8MB")
    assert differences(all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")) == []
    assert_manifest_is_true(tmp_path / "out", base, tmp_path / "adapter")


@pytest.mark.slow
def test_a_read_only_place_is_named(llama, simple_adapter, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        flags = command("--base_model", llama, "--lora_model", simple_adapter, "--output_dir", disk / "out")
        done = subprocess.run(flags, capture_output=True, text=True)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Read-only file system while writing" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_memory_stays_far_below_the_model(tmp_path):
    sizes = {}
    for megabytes in (40, 240):
        base = big_base(tmp_path / f"base{megabytes}", megabytes)
        make_adapter(base, tmp_path / f"adapter{megabytes}", r=16)
        flags = command(
            "--base_model", base, "--lora_model", tmp_path / f"adapter{megabytes}", "--max_shard_size", "20MB"
        )
        subprocess.run([*flags, "--output_dir", tmp_path / f"out{megabytes}"], check=True, stderr=subprocess.DEVNULL)
        sizes[megabytes] = json.loads((tmp_path / f"out{megabytes}" / "merge_report.json").read_text())[
            "peak_memory_gb"
        ]
    assert sizes[240] - sizes[40] < 0.03, sizes  # the model grew by 0.2 GB


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line_and_no_output(tmp_path):
    base = big_base(tmp_path / "base", 60)
    make_adapter(base, tmp_path / "adapter")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        # The check before the merge is told that there is room, as when another program fills the disk meanwhile.
        code = (
            "import runpy, shutil, sys, types\n"
            "shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 40)\n"
            f"sys.argv = {['merge', '--base_model', str(base), '--lora_model', str(tmp_path / 'adapter')]!r}\n"
            f"sys.argv += ['--output_dir', {str(disk / 'out')!r}]\n"
            f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
            f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: no space left on the device while writing")
        assert list(disk.iterdir()) == []
        done = subprocess.run(
            command("--base_model", base, "--lora_model", tmp_path / "adapter", "--output_dir", disk / "out"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "no space for the new model: it needs 0.06 GB" in done.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


def test_verify_compares_logits_and_publishes_nothing_where_they_part(llama, simple_adapter, tmp_path, monkeypatch):
    report = run_merge(llama, simple_adapter, tmp_path / "out", verify=True, dtype="bfloat16")
    assert report["verification"]["passed"]
    assert report["verification"]["tokens"] > 10
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report
    real = LowRankFactors.delta_rows
    monkeypatch.setattr(LowRankFactors, "delta_rows", lambda self, start, stop: real(self, start, stop) * 0.5)
    with pytest.raises(InputError, match=r"--verify: .*layers\.0\..*nothing was published"):
        run_merge(llama, simple_adapter, tmp_path / "out2", verify=True)
    assert not list(tmp_path.glob("*out2*"))
    with pytest.raises(InputError, match="--output_type huggingface to verify"):
        run_merge(llama, simple_adapter, tmp_path / "out2", verify=True, output_type="pth")


# ---------------------------------------------------------------- what a review found


@pytest.mark.slow
def test_weighted_adapters_that_grow_the_vocabulary_after_others(llama, tmp_path, base_tokenizer_folder):
    """Rows that only the second adapter has come from it alone; the first one's file ends before them."""
    tokenizer = str(grown_tokenizer(base_tokenizer_folder, tmp_path / "tokenizer", 434))
    whole = {"modules_to_save": ["embed_tokens", "lm_head"]}
    firsts = {
        "whole": whole,
        "low_rank": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    }
    second = tmp_path / "second"
    make_adapter(llama, second, rows=434, seed=2, **whole)
    two = all_weights(second / "oracle")
    for name, settings in firsts.items():
        first = tmp_path / name
        make_adapter(llama, first, **settings)
        one = all_weights(first / "oracle")
        for share in (0.5, 1.0):
            out = tmp_path / f"{name}{share}"
            run_merge(
                llama, f"{first},{second}", out, adapter_weights=f"1,{share}", tokenizer_name_or_path=tokenizer,
                verify=True,
            )  # fmt: skip
            for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
                merged = all_weights(out)[tensor]
                assert torch.equal(merged[400:], two[tensor][400:]), (name, share, tensor)
                expected = torch.lerp(one[tensor], two[tensor][:400], share)
                torch.testing.assert_close(merged[:400], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [513, 514, 520])
def test_a_short_last_block_has_the_same_bits(tmp_path, rows):
    base = make_base(tmp_path / "base", vocab_size=rows)
    make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"], r=16)
    run_merge(base, tmp_path / "adapter", tmp_path / "out")
    assert differences(all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")) == []


def test_two_merges_into_one_folder_do_not_mix(llama, simple_adapter, tmp_path, monkeypatch):
    started, finish = threading.Event(), threading.Event()
    real = writer.write_index

    def wait(*args):
        started.set()
        assert finish.wait(60)
        return real(*args)

    monkeypatch.setattr(writer, "write_index", wait)
    thread = threading.Thread(target=run_merge, args=(llama, simple_adapter, tmp_path / "out"))
    thread.start()
    assert started.wait(60)
    for settings in ({}, {"dtype": "bfloat16"}):
        with pytest.raises(InputError, match="another run is writing"):
            run_merge(llama, simple_adapter, tmp_path / "out", **settings)
    finish.set()
    thread.join()
    assert merge.main(merge.MergeArguments(verify_only=str(tmp_path / "out")))["files"] > 3


def test_a_resumed_merge_takes_nothing_but_weights_from_before(tiny_model_folder, tmp_path, monkeypatch):
    """Stopped during --verify; the second run has another tokenizer, and room for nothing but what is missing."""
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    make_adapter(tiny_model_folder, adapter)
    tokenizers = [Path(shutil.copytree(tiny_model_folder, tmp_path / name)) for name in ("with", "without")]
    (tokenizers[0] / "chat_template.jinja").write_text("{{ messages }}")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge, "verify_logits", stop)
        with pytest.raises(KeyboardInterrupt):
            run_merge(tiny_model_folder, adapter, out, tokenizer_name_or_path=str(tokenizers[0]), verify=True)
    partial = tmp_path / ".out.partial"
    assert (partial / "chat_template.jinja").is_file()
    written = (partial / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(inputs.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="no space"):
        run_merge(tiny_model_folder, adapter, tmp_path / "elsewhere", tokenizer_name_or_path=str(tokenizers[1]))
    run_merge(tiny_model_folder, adapter, out, tokenizer_name_or_path=str(tokenizers[1]), verify=True)
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert not (out / "chat_template.jinja").exists()
    manifest = assert_manifest_is_true(out, tiny_model_folder, adapter)
    assert "tokenizer.model" in manifest["inputs"]["tokenizer"]["files"]


def test_a_folder_left_aside_by_a_kill_comes_back(llama, simple_adapter, tmp_path):
    out = tmp_path / "out"
    run_merge(llama, simple_adapter, out)
    out.rename(tmp_path / ".out.replaced")  # killed between the two renames of --overwrite
    with pytest.raises(InputError, match="not empty"):
        run_merge(llama, simple_adapter, out)
    assert (out / "model.safetensors").is_file()


def test_output_folders_that_cannot_be(llama, simple_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", "/"):
        with pytest.raises(InputError, match=r"current folder or holds it|overlap"):
            run_merge(llama, simple_adapter, Path(name), overwrite=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    run_merge(llama, simple_adapter, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model" / "model.safetensors").is_file()
    with pytest.raises(InputError, match="belongs to --output_type pth"):
        run_merge(llama, simple_adapter, tmp_path / "never", num_parts=2)


def test_weights_that_no_adapter_touches_are_checked_too(llama, tmp_path):
    make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    weights = all_weights(llama)
    weights["model.layers.1.mlp.up_proj.weight"][300, 5] = float("inf")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the base's model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf"):
        run_merge(base, tmp_path / "adapter", tmp_path / "out")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 2 tensors: lm_head\.weight, model\.layers\.1\.mlp\.up_proj"):
        run_merge(base, tmp_path / "adapter", tmp_path / "out")


def test_old_bin_files_are_read_once(llama, simple_adapter, tmp_path, monkeypatch):
    """Records out of order, and a type that is wider than the others'."""
    base = as_bin(llama, tmp_path / "base")
    weights = torch.load(base / "pytorch_model.bin", weights_only=True)
    weights = {name: weight.half() for name, weight in reversed(weights.items())}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(weights, base / "pytorch_model.bin")
    read = []
    real = FileHasher._read

    def note(file, digest, start, stop):
        read.append(stop - start)
        real(file, digest, start, stop)

    monkeypatch.setattr(FileHasher, "_read", staticmethod(note))
    run_merge(base, simple_adapter, tmp_path / "out")
    assert_manifest_is_true(tmp_path / "out", base, simple_adapter)
    assert sum(read) < 20_000, "only what lies between tensors"


def test_threads_are_as_many_as_cores_up_to_eight(monkeypatch):
    for cores, workers in ((1, 1), (2, 2), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert worker_count() == workers


# ---------------------------------------------------------------- Meta's layout


def test_meta_bases_with_a_record_a_tie_or_a_tiktoken_file(tmp_path):
    twin = make_base(tmp_path / "twin", tie_word_embeddings=True)
    run_merge(twin, "", tmp_path / "pth", output_type="pth")
    part = tmp_path / "pth" / "consolidated.00.pth"
    weights = torch.load(part, weights_only=True)
    del weights["output.weight"]  # the head is tied
    torch.save(weights, part)
    (tmp_path / "pth" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    expected = make_adapter(twin, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    record_base(tmp_path / "adapter", twin)
    report = run_merge(tmp_path / "pth", tmp_path / "adapter", tmp_path / "out")
    assert any("differently" in note for note in report["notes"])
    assert_logits_close(tmp_path / "out", expected)
    with pytest.raises(InputError, match=r"tiktoken's format.*copy tokenizer\.json"):
        load_tokenizer(tmp_path / "pth")


@pytest.mark.parametrize("num_parts", [None, 2])
def test_pth_output_and_pth_base_hold_the_same_weights(tiny_model_folder, tmp_path, num_parts):
    """Merged as pth and turned back, the weights are those of the Hugging Face merge, bit for bit."""
    adapter = tmp_path / "adapter"
    make_adapter(tiny_model_folder, adapter, modules_to_save=["embed_tokens", "lm_head"])
    pth, back = tmp_path / "pth", tmp_path / "back"
    report = run_merge(tiny_model_folder, adapter, pth, output_type="pth", num_parts=num_parts)
    parts = [f"consolidated.{number:02d}.pth" for number in range(num_parts or 1)]
    expected = {*parts, "params.json", "merge_manifest.json", "merge_report.json", "run_config.yaml", "README.md"}
    files = {item.name for item in pth.iterdir()}
    assert expected <= files
    assert {"tokenizer.model"} <= files
    assert not {"config.json", "model.safetensors"} & files
    assert_manifest_is_true(pth, tiny_model_folder, adapter)
    assert report["changed_tensors"] == 16
    assert merge.main(merge.MergeArguments(verify_only=str(pth)))["files"] == len(files) - 1
    assert torch.load(pth / parts[0], weights_only=True)["norm.weight"].shape == (32,)
    run_merge(pth, "", back)
    assert differences(all_weights(back), all_weights(adapter / "oracle")) == []
    assert_manifest_is_true(back, pth)
    logits = load(adapter / "oracle", torch.float32)(TEXT).logits
    assert_logits_close(back, logits)
    again = tmp_path / "again"
    make_adapter(back, again, seed=3)
    run_merge(pth, again, tmp_path / "both")  # an adapter trained on the Hugging Face twin
    assert differences(all_weights(tmp_path / "both"), all_weights(again / "oracle")) == []
    plan = run_merge(pth, again, tmp_path / "never", output_type="pth", dry_run=True, num_parts=num_parts)
    assert list(plan["files"]) == parts


def test_pth_output_refuses_what_the_layout_cannot_hold(tmp_path):
    base = make_base(tmp_path / "base", "qwen2")
    make_adapter(base, tmp_path / "adapter")
    with pytest.raises(InputError, match="pth holds Llama models only"):
        run_merge(base, tmp_path / "adapter", tmp_path / "out", output_type="pth")
    assert not (tmp_path / "out").exists()
