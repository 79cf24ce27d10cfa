"""merge_llama2_with_chinese_lora_low_mem.py against PEFT's own merge_and_unload and its adapter-on logits.

Adapters are perturbed everywhere: a fresh lora_B is zero, so that any formula would pass. Row blocks are made small, so
that every larger weight is merged in several.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_llama2_with_chinese_lora_low_mem as merge
from utils import checkpoints
from utils.files import InputError

SCRIPT = Path(merge.__file__)
SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 320,  # three blocks of at most 128 rows
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = torch.tensor([[1, 5, 9, 33, 120, 399, 7, 64]])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 1)


def make_base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind == "mixtral":
        changes = {"num_local_experts": 4, "num_experts_per_tok": 2} | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | changes)), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0).add_(torch.randn_like(parameter) * 0.02)
    model.to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path, dtype="auto"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_adapter(base: Path, folder: Path, rows: int | None = None, seed: int = 1, dtype=None, **settings) -> torch.Tensor:
    """Save a perturbed adapter and what PEFT's merge_and_unload makes of it; returns the logits with the adapter on."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = load(base)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        settings = {"r": 4, "lora_alpha": 16, "target_modules": DENSE} | settings
        model = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        model.eval()
        logits = model(TEXT).logits.detach().float()
        if dtype is not None:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
        model.merge_and_unload().save_pretrained(folder / "oracle")
    return logits


def run_merge(base: Path, adapter: Path | str, out: Path, **settings) -> dict:
    return merge.main(merge.MergeArguments(str(base), str(adapter), output_dir=str(out), **settings))


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = load_file(file)
        assert not weights.keys() & loaded.keys(), "a tensor was written twice"
        weights |= loaded
    return weights


def differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [
        name
        for name in first
        if first[name].dtype != second[name].dtype or not torch.equal(first[name], second[name])
    ]


def assert_logits_close(folder: Path, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    logits = load(folder, torch.float32)(TEXT).logits
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "full_modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms_and_full": {"modules_to_save": ["norm", "input_layernorm", "lm_head"], "target_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [399, 0, 7], "lm_head": [7, 9]}},
}


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
    assert differences({n: merged[n] for n in untouched}, {n: w for n, w in all_weights(llama).items() if n in untouched}) == []
    assert all(delta > 1e-4 for delta in report["relative_delta"].values())


def test_dora_on_embeddings_needs_the_norm_over_all_rows(llama, tmp_path):
    expected = make_adapter(llama, tmp_path / "adapter", use_dora=True, target_modules=["q_proj", "embed_tokens"])
    run_merge(llama, tmp_path / "adapter", tmp_path / "out")
    merged, oracle = all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")
    assert differences(merged, oracle) in ([], ["model.embed_tokens.weight"])  # its sum has no fixed order in PEFT
    torch.testing.assert_close(merged["model.embed_tokens.weight"], oracle["model.embed_tokens.weight"], rtol=1e-6, atol=0)
    assert_logits_close(tmp_path / "out", expected)


GROWING = {
    "full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "frozen": {},
    "embedding_and_head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [401, 3], "lm_head": [433]}},
}


@pytest.mark.parametrize("variant", GROWING)
def test_a_grown_vocabulary_reaches_the_config(llama, tmp_path, variant, base_tokenizer_folder):
    expected = make_adapter(llama, tmp_path / "adapter", rows=434, **GROWING[variant])
    with pytest.raises(InputError, match=r"from 400 to 434 rows.*pass --tokenizer_path"):
        run_merge(llama, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    grown_tokenizer(base_tokenizer_folder, tmp_path / "tokenizer", 434)
    report = run_merge(llama, tmp_path / "adapter", tmp_path / "out", tokenizer_name_or_path=str(tmp_path / "tokenizer"))
    assert differences(all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")) == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 434 == report["vocab_size"]
    assert_logits_close(tmp_path / "out", expected)


def grown_tokenizer(base: Path, folder: Path, size: int) -> Path:
    from utils.tokenization import load_tokenizer, save_tokenizer

    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens([f"<new{number}>" for number in range(size - len(tokenizer))])
    assert len(tokenizer) == size
    save_tokenizer(tokenizer, folder)
    return folder


TIED = {
    # settings, still tied afterwards
    "linear_only": ({}, True),
    "both_tied": ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, True),
    "embedding_tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "lora_tied": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    "rows": ({"trainable_token_indices": [3, 77]}, True),
    "both_apart": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "embedding_only": ({"modules_to_save": ["embed_tokens"]}, False),
    "lora_embedding_only": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "head_only": ({"target_modules": ["q_proj", "lm_head"]}, False),
}


@pytest.mark.parametrize("rows", [None, 434], ids=["same_vocabulary", "grown"])
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
    merged, oracle = all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")
    assert {weight.dtype for weight in merged.values()} == {dtype}
    if adapter_dtype is None:
        assert differences(merged, {name: weight.to(dtype) for name, weight in oracle.items()}) == []
    for name in merged:  # PEFT rounds the change of a half-precision adapter before it adds it: the last place may differ
        torch.testing.assert_close(merged[name], oracle[name].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


def test_dtype_casts_every_weight_and_the_config(llama, tmp_path):
    make_adapter(llama, tmp_path / "adapter")
    run_merge(llama, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    oracle = all_weights(tmp_path / "adapter" / "oracle")
    assert differences(all_weights(tmp_path / "out"), {n: w.bfloat16() for n, w in oracle.items()}) == []
    assert load(tmp_path / "out").dtype == torch.bfloat16


KINDS = {
    "mistral": {},
    "qwen2": {"bias": "all"},
    "qwen2_lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "qwen3": {},
    "mixtral_attention": {"target_modules": DENSE[:4]},
    "mixtral": {"target_modules": [*DENSE[:4], "gate", "w1", "w2", "w3"]},
    "mixtral_down": {"target_modules": ["w2"]},
    "mixtral_gate_up": {"target_modules": ["w1", "w3"], "use_rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_equal_peft(tmp_path, kind):
    changes = {"head_dim": 16} if kind == "qwen3" else {}
    base = make_base(tmp_path / "base", kind.split("_")[0], **changes)
    expected = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    run_merge(base, tmp_path / "adapter", tmp_path / "out", verbose=True)
    merged, oracle = all_weights(tmp_path / "out"), all_weights(tmp_path / "adapter" / "oracle")
    assert [name for name in differences(merged, oracle) if ".experts." not in name] == []
    for name in differences(merged, oracle):
        # einsum over stacked experts and a product of one expert's matrices sum in different orders
        torch.testing.assert_close(merged[name], oracle[name], rtol=1e-6, atol=1e-7)
    assert_logits_close(tmp_path / "out", expected)


def test_chinese_mixtral_adapters_name_experts_one_by_one(tmp_path):
    """Their adapters carry block_sparse_moe.experts.N.w1 ...; PEFT of today opens them by conversion: the oracle."""
    from peft import PeftModel

    base = make_base(tmp_path / "base", "mixtral")
    targets = ["q_proj", "gate", "w1", "w2", "w3"]
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
    run_merge(base, adapter, tmp_path / "out")
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
