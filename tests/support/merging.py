"""Bases and adapters to merge, and what PEFT makes of them."""

import warnings
from pathlib import Path

import merge_llama2_with_chinese_lora_low_mem as merge
import torch
from safetensors.torch import load_file

from utils.text.tokenizer import load_tokenizer

SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 320,  # three blocks of at most 128 rows
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
OTHERS = {
    "qwen2moe": ("qwen2_moe", _QWEN | {"shared_expert_intermediate_size": 64}),
    "qwen3moe": ("qwen3_moe", _QWEN | {"head_dim": 16}),
    # The first of its layers slides, the second sees everything.
    "gemma3": (
        "gemma3_text",
        {
            **{"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}

DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

TEXT = torch.tensor([[1, 5, 9, 33, 120, 399, 7, 64]])


def make_base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind == "mixtral":
        changes = {"num_local_experts": 4, "num_experts_per_tok": 2} | changes
    elif kind in OTHERS:
        kind, settings = OTHERS[kind]
        changes = settings | changes
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


def make_adapter(
    base: Path, folder: Path, rows: int | None = None, seed: int = 1, dtype=None, **settings
) -> torch.Tensor:
    """Save a perturbed adapter and what PEFT's merge_and_unload makes of it. Returns: logits with the adapter on."""
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


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "full_modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms_and_full": {"modules_to_save": ["norm", "input_layernorm", "lm_head"], "target_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [399, 0, 7], "lm_head": [7, 9]},
    },
}

GROWING = {
    "full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "frozen": {},
    "embedding_and_head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [401, 3], "lm_head": [433]}},
}


def grown_tokenizer(base: Path, folder: Path, size: int) -> Path:
    from utils.text.tokenizer import save_tokenizer

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

KINDS = {
    "mistral": {},
    "qwen2": {"bias": "all"},
    "qwen2_lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "qwen3": {},
    "gemma3": {},
    "mixtral_attention": {"target_modules": DENSE[:4]},
    "mixtral": {"target_modules": [*DENSE[:4], "gate", "w1", "w2", "w3"]},
    "mixtral_down": {"target_modules": ["w2"]},
    "mixtral_gate_up": {"target_modules": ["w1", "w3"], "use_rslora": True},
    "qwen2moe": {"target_modules": DENSE},  # for PEFT these are the shared expert's
    "qwen3moe": {"target_modules": [*DENSE, "gate"]},
}


def fused(base: Path, folder: Path) -> Path:
    """The same mixture with its experts stacked on disk, as transformers 5 has them in memory."""
    load(base).save_pretrained(folder, save_original_format=False)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in all_weights(folder))
    return folder


def big_base(folder: Path, megabytes: int) -> Path:
    """A model of that size in shards of 20 MB, for tests of memory, kills and full disks."""
    hidden, inner = 512, 2048
    layers = max(1, round(megabytes * 1e6 / (4 * (2.5 * hidden * hidden + 3 * hidden * inner))))
    make_base(
        folder, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=400,
    )  # fmt: skip
    model = load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20MB")
    return folder
