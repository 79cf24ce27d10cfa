"""utils.weights.layers: lists of layers against values by hand, configs against what transformers makes of them."""

import pytest
from transformers import AutoConfig

from utils.core.errors import InputError
from utils.weights.layers import config_of_layers, describe_layers, kept_layers, renumbered, repeated_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("first:1", [0]),
        ("first:4", [0, 1, 2, 3]),
        ("even:1", [0]),
        ("even:2", [0, 11]),
        ("even:4", [0, 4, 7, 11]),
        ("0,1,5-9", [0, 1, 5, 6, 7, 8, 9]),
        (" 3 , 5 - 6 ", [3, 5, 6]),
        ("11", [11]),
    ],
)
def test_layers_that_are_kept(text, layers):
    assert kept_layers(text, 12) == layers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("first:0", "need 1 to 12"),
        ("even:13", "the model has 12 layers"),
        ("first:12", "these are all 12 layers"),
        ("0,12", "12: the model has 12 layers; need numbers from 0 to 11"),
        ("4-20", "the model has 12 layers"),
        ("5-3", "write 3-5"),
        ("0,0", "layer 0 after 0"),
        ("3,1", "layer 1 after 3"),
        ("", "names no layers"),
        ("last:3", "names no layers"),
        ("-1", "names no layers"),
        ("1,,2", "names no layers"),
        ("1.5", "names no layers"),
    ],
)
def test_lists_that_are_refused(text, words):
    with pytest.raises(InputError, match=words):
        kept_layers(text, 12)


def test_a_deeper_model_repeats_the_middle():
    """SOLAR: 48 of 32 layers are the first 24 and the last 24."""
    assert repeated_layers("48", 32) == [*range(24), *range(8, 32)]
    assert repeated_layers("5", 4) == [0, 1, 2, 2, 3]
    assert repeated_layers("0-3,0-3", 4) == [0, 1, 2, 3, 0, 1, 2, 3]
    for text, words in (("4", "need 5 to 8"), ("9", "need 5 to 8"), ("0-2", "no more than the model's 4")):
        with pytest.raises(InputError, match=words):
            repeated_layers(text, 4)


def test_names_and_short_lists():
    assert renumbered("model.layers.7.mlp.up_proj.weight", {7: [1, 3]}) == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
    ]
    assert renumbered("model.layers.8.mlp.up_proj.weight", {7: [1]}) == []
    assert renumbered("model.norm.weight", {}) == ["model.norm.weight"]
    assert describe_layers([0, 1, 2, 5, 8, 9, 8, 9]) == "0-2,5,8-9,8-9"


SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "num_hidden_layers": 6}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def config_of(kind: str, layers: list[int], **settings) -> dict:
    return config_of_layers({"model_type": kind, **SIZES, **settings}, layers)


def test_lists_for_each_layer_follow():
    types = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"]
    config = config_of("gemma3_text", [0, 2, 5], head_dim=8, sliding_window_pattern=3)
    assert config["num_hidden_layers"] == 3 and "sliding_window_pattern" not in config
    assert config["layer_types"] == [types[0], types[2], types[5]]
    assert AutoConfig.for_model(**config).layer_types == config["layer_types"]


def test_the_first_so_many_follow():
    config = config_of("qwen2", [0, 1, 4], use_sliding_window=True, sliding_window=4, max_window_layers=2)
    assert config["max_window_layers"] == 2
    assert config["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    config = config_of("qwen2", [1, 4, 5], use_sliding_window=True, sliding_window=4, max_window_layers=2)
    assert config["max_window_layers"] == 1


def test_layers_without_experts_follow():
    config = config_of("qwen3_moe", [0, 1, 3, 4], mlp_only_layers=[1, 4], **EXPERTS)
    assert config["mlp_only_layers"] == [1, 3]
    config = config_of("qwen2_moe", [0, 1, 2, 5], decoder_sparse_step=2, shared_expert_intermediate_size=16, **EXPERTS)
    assert config["decoder_sparse_step"] == 1 and config["mlp_only_layers"] == [0, 2]  # experts were in 1, 3, 5


def test_what_a_config_cannot_say_is_refused():
    """DeepSeek's layers without experts come first, whatever their number."""
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2}
    sizes |= {"topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    sizes |= {"qk_nope_head_dim": 4, "num_key_value_heads": 4}
    assert config_of("deepseek_v3", [1, 2, 3], first_k_dense_replace=2, **sizes)["first_k_dense_replace"] == 1
    with pytest.raises(InputError, match="layer 2 cannot become layer 1: a deepseek_v3 config has no words"):
        config_of("deepseek_v3", [0, 2, 1], first_k_dense_replace=2, **sizes)
    with pytest.raises(InputError, match="gpt2: only models whose tensors are called"):
        config_of_layers({"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 9}, [0])
