"""utils.lora.updates: which update every adapter tensor becomes, by names and shapes alone."""

import json

import pytest

from utils.core.errors import InputError
from utils.lora.config import load_adapter_config
from utils.lora.updates import AddBias, LowRank, Replace, ReplaceRows, plan_updates

WEIGHTS = {
    "model.embed_tokens.weight": (40, 8),
    "lm_head.weight": (40, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.block_sparse_moe.gate.weight": (2, 8),
    **{f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": (12, 8) for e in (0, 1) for w in ("w1", "w3")},
    **{f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight": (8, 12) for e in (0, 1)},
}
LAYER = "base_model.model.model.layers.0"
QUERY = f"{LAYER}.self_attn.q_proj"


def plan(tmp_path, tensors, **settings):
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "some/base"} | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    return plan_updates(load_adapter_config(tmp_path), tensors, WEIGHTS)


def test_low_rank_with_bias_and_magnitude(tmp_path):
    tensors = {
        f"{QUERY}.lora_A.weight": (4, 8),
        f"{QUERY}.lora_B.weight": (8, 4),
        f"{QUERY}.lora_B.bias": (8,),
        f"{QUERY}.lora_magnitude_vector": (8,),
    }
    assert plan(tmp_path, tensors, use_dora=True) == {
        "model.layers.0.self_attn.q_proj.weight": [
            LowRank(f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", 2.0, False, f"{QUERY}.lora_magnitude_vector")
        ],
        "model.layers.0.self_attn.q_proj.bias": [AddBias(f"{QUERY}.lora_B.bias", 2.0)],
    }


@pytest.mark.parametrize("infix", ["", ".default"])
def test_older_spellings(tmp_path, infix):
    tensors = {
        f"{QUERY}.lora_A{infix}.weight": (4, 8),
        f"{QUERY}.lora_B{infix}.weight": (8, 4),
        f"{QUERY}.lora_magnitude_vector{infix}.weight": (8,),
        f"base_model.model.lm_head.modules_to_save{infix}.weight": (50, 8),
        "base_model.model.lm_head.original_module.weight": (40, 8),
    }
    updates = plan(tmp_path, tensors, use_dora=True)
    assert updates["lm_head.weight"] == [Replace(f"base_model.model.lm_head.modules_to_save{infix}.weight")]
    assert (
        updates["model.layers.0.self_attn.q_proj.weight"][0].magnitude
        == f"{QUERY}.lora_magnitude_vector{infix}.weight"
    )


def test_resized_embeddings_are_kept_once_and_their_base_comes_first(tmp_path):
    embed, head = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
    tensors = {
        f"{embed}.base_layer.weight": (50, 8),
        f"{embed}.lora_embedding_A": (4, 50),
        f"{embed}.lora_embedding_B": (8, 4),
        f"{head}.weight": (50, 8),
        f"{head}.modules_to_save.weight": (50, 8),
        f"{head}.original_module.weight": (50, 8),
    }
    assert plan(tmp_path, tensors) == {
        "model.embed_tokens.weight": [
            Replace(f"{embed}.base_layer.weight", frozen=True),
            LowRank(f"{embed}.lora_embedding_A", f"{embed}.lora_embedding_B", 2.0, transposed=True),
        ],
        "lm_head.weight": [Replace(f"{head}.weight", (f"{head}.modules_to_save.weight",))],
    }


def test_token_rows(tmp_path):
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    updates = plan(tmp_path, {name: (3, 8)}, trainable_token_indices=[7, 0, 39])
    assert updates == {"model.embed_tokens.weight": [ReplaceRows(name, (7, 0, 39))]}
    for wrong in ([7, 0], [7, 0, 40], [7, 0, -1]):
        with pytest.raises(InputError, match="trainable_token_indices"):
            plan(tmp_path, {name: (3, 8)}, trainable_token_indices=wrong)


@pytest.mark.parametrize("nested", ["experts.base_layer", "experts"])
def test_fused_experts_are_told_apart_by_shape(tmp_path, nested):
    """PEFT nests the wrappers by what is targeted: alone, either parameter sits at `experts`."""
    module = f"{LAYER}.mlp.{nested}"
    gate_up = {f"{module}.lora_A.weight": (2 * 8, 8), f"{module}.lora_B.weight": (24, 16)}
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 8}, "alpha_pattern": {r".*\.gate_up_proj": 16}}
    updates = plan(tmp_path, gate_up, **patterns)
    assert len(updates) == 4
    third = updates["model.layers.0.block_sparse_moe.experts.1.w3.weight"][0]
    assert (third.expert, third.scaling) == ((1, 2, 12, 24), 2.0)
    down = {f"{module}.lora_A.weight": (2 * 4, 12), f"{module}.lora_B.weight": (8, 8)}
    updates = plan(tmp_path, down, **patterns)
    assert [updates[f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"][0].expert for e in (0, 1)] == [
        (0, 2, 0, 8),
        (1, 2, 0, 8),
    ]
    with pytest.raises(InputError, match="do not fit 2 experts of 12 x 8"):
        plan(tmp_path, {f"{module}.lora_A.weight": (16, 9), f"{module}.lora_B.weight": (24, 16)}, **patterns)


def test_every_tensor_is_used_or_named(tmp_path):
    tensors = {f"{QUERY}.lora_A.weight": (4, 8), f"{QUERY}.lora_B.weight": (8, 4)}
    strange = {
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight": (4, 8),
        f"{QUERY}.lora_C.weight": (4, 8),
        f"{QUERY}.lora_magnitude": (8,),
        f"{LAYER}.mlp.experts.base_layer.weight": (2, 24, 8),
        "base_model.model.lm_head.original_module.weight": (40, 8),
        "lonely": (1,),
    }
    with pytest.raises(InputError) as error:
        plan(tmp_path, tensors | strange)
    assert "6 of 8 tensors match no weight" in str(error.value)
    assert "trained on some/base" in str(error.value)
    assert all(name in str(error.value) for name in strange)
    twice = {"base_model.model.lm_head.weight": (40, 8), "lm_head.weight": (40, 8)}
    with pytest.raises(InputError, match="1 of 2 tensors"):
        plan(tmp_path, twice)


def test_all_mistakes_are_reported_together(tmp_path):
    tensors = {
        f"{QUERY}.lora_A.weight": (4, 9),
        f"{QUERY}.lora_B.weight": (8, 4),
        f"{LAYER}.mlp.gate.lora_A.weight": (2, 8),
        f"{LAYER}.mlp.gate.lora_B.weight": (2, 2),
        "base_model.model.lm_head.weight": (30, 8),
        "base_model.model.model.embed_tokens.weight": (50, 9),
    }
    with pytest.raises(InputError) as error:
        plan(tmp_path, tensors)
    for message in ("do not fit", "has rank 2", "has 30 rows, but the model already has 40", "has shape [50, 9]"):
        assert message in str(error.value)
