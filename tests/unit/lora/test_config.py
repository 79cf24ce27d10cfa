"""utils.lora.config: formulas against hand computation, PEFT's pattern matching, target modules per architecture."""

import json
import math
import types

import pytest
import torch

from utils.core.errors import InputError
from utils.lora.config import LowRankFactors, linear_modules, load_adapter_config, resolve_target_modules


def write_config(folder, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 32} | settings))
    return folder


def test_delta_by_hand():
    A, B = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, -1.0], [0.0, 2.0]])
    factors = LowRankFactors(A, B, 0.5, transposed=False, magnitude=None)
    assert factors.delta_rows(0, 3).tolist() == [[0.5, 1.0], [1.5, 2.5], [0.0, 1.0]]
    assert factors.delta_rows(1, 2).tolist() == [[1.5, 2.5]]
    stored_transposed = LowRankFactors(A, B, 0.5, transposed=True, magnitude=None)
    assert stored_transposed.delta_rows(0, 2).tolist() == [[0.5, 1.5, 0.0], [1.0, 2.5, 1.0]]
    assert stored_transposed.merge_rows(torch.ones(1, 3), 1).tolist() == [[2.0, 3.5, 2.0]]


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_rescales_every_output_to_its_magnitude(transposed):
    torch.manual_seed(0)
    weight, A, B, magnitude = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2), torch.rand(6) + 0.5
    merged = torch.empty(6, 5)
    for row in range(6):  # one output after the other, in double precision
        direction = (weight[row].double() + 1.5 * sum(B[row, k].double() * A[k].double() for k in range(2))).float()
        merged[row] = magnitude[row] * direction / math.sqrt(float((direction.double() ** 2).sum()))
    factors = LowRankFactors(A, B, 1.5, transposed, magnitude)
    assert factors.needs_norm == transposed
    if transposed:
        norm = torch.linalg.norm(weight + 1.5 * B @ A, dim=1)
        result = torch.cat([factors.merge_rows(weight.T[:2], 0, norm), factors.merge_rows(weight.T[2:], 2, norm)]).T
    else:
        result = torch.cat([factors.merge_rows(weight[:4], 0), factors.merge_rows(weight[4:], 4)])
    torch.testing.assert_close(result, merged, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.norm(dim=1), magnitude)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [320, 1000])
def test_row_blocks_are_bit_equal_to_the_whole_product(rows, transposed):
    torch.manual_seed(rows)
    A, B = torch.randn(64, 256 if not transposed else rows), torch.randn(rows if not transposed else 256, 64)
    factors = LowRankFactors(A, B, 2.0, transposed, None)
    whole = (B @ A).T * 2.0 if transposed else (B @ A) * 2.0
    for step in (64, 128, 192):
        blocks = [factors.delta_rows(start, min(start + step, rows)) for start in range(0, rows, step)]
        assert torch.equal(torch.cat(blocks), whole)


def test_scaling_follows_rank_alpha_and_their_patterns(tmp_path):
    patterns = {
        "rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"^model.layers.0.*v_proj": 8},
    }
    config = load_adapter_config(write_config(tmp_path / "a", **patterns))
    assert config.scaling_of("model.layers.0.self_attn.k_proj") == 32 / 8
    assert config.scaling_of("model.layers.0.self_attn.q_proj") == 32 / 4
    assert config.scaling_of("model.layers.0.self_attn.xq_proj") == 32 / 8  # a name matches from a dot on
    assert config.scaling_of("model.layers.1.mlp.down_proj") == 32 / 2
    assert config.scaling_of("model.layers.11.mlp.down_proj") == 32 / 8
    rslora = load_adapter_config(write_config(tmp_path / "b", use_rslora=True))
    assert rslora.scaling_of("x") == 32 / math.sqrt(8)


def test_patterns_match_as_in_peft(tmp_path):
    from peft.utils.other import get_pattern_key

    patterns = {
        "q_proj": 1,
        "layers.1.mlp.up_proj": 2,
        r".*\.gate_up_proj": 3,
        r"layers\.[0-3]\.self_attn": 4,
        "^x.y$": 5,
    }
    config = load_adapter_config(write_config(tmp_path / "a", rank_pattern=patterns))
    names = ("q_proj", "v_proj", "mlp.up_proj", "self_attn", "mlp.experts.gate_up_proj")
    for key in [f"model.layers.{layer}.{name}" for layer in (0, 1, 11) for name in names] + [
        "x.y",
        "z.x.y",
        "xq_proj",
    ]:
        assert config.rank_of(key) == patterns.get(get_pattern_key(patterns.keys(), key), 8), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is PREFIX_TUNING"),
        ({"peft_type": None}, "need LORA"),
        ({"r": 0}, "positive rank"),
        ({"r": None}, "positive rank"),
        ({"lora_alpha": "much"}, "lora_alpha 'much': need a number"),
        ({"rank_pattern": ["q_proj"]}, r"adapter_config\.json: rank_pattern \['q_proj'\]: need an object"),
        ({"modules_to_save": "lm_head"}, "modules_to_save 'lm_head': need a list of names"),
        ({"target_modules": 3}, "need a pattern or list of names"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is olora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ],
)
def test_configs_that_cannot_be_merged(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        load_adapter_config(write_config(tmp_path / "a", **settings))


def test_absent_and_broken_configs(tmp_path):
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load_adapter_config(tmp_path / "absent")
    (tmp_path / "adapter_config.json").write_text('{"r": 8,\n')
    with pytest.raises(InputError, match=r"adapter_config\.json:2: broken JSON"):
        load_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="need an object, got list"):
        load_adapter_config(tmp_path)


def model_config(kind):
    from transformers import AutoConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return AutoConfig.for_model(kind, num_attention_heads=4, num_key_value_heads=2, **sizes)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_all_is_what_peft_accepts(kind):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = model_config(kind)
    targets = resolve_target_modules("all", config)
    model = AutoModelForCausalLM.from_config(config)
    linear = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    experts = {"gate", "w1", "w2", "w3"} if kind == "mixtral" else set()  # no nn.Linear in memory
    assert set(targets) == linear - {"lm_head"} | experts
    adapted = get_peft_model(model, LoraConfig(target_modules=targets))
    text = " ".join(name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
    for name in set(targets) - experts:
        assert f".{name}.lora_A" in text
    if experts:
        assert all(f".mlp.{name}.lora_A" in text for name in ("gate", "experts", "experts.base_layer"))


def test_target_module_names():
    config = types.SimpleNamespace(model_type="llama")
    assert resolve_target_modules(" q_proj, v_proj,q_proj", config) == ["q_proj", "v_proj"]
    assert resolve_target_modules("all-linear", config) == linear_modules(config)
    assert resolve_target_modules("layers.0.self_attn.q_proj,embed_tokens", config) == [
        "layers.0.self_attn.q_proj",
        "embed_tokens",
    ]
    with pytest.raises(
        InputError, match=r"no such modules in this llama model: w1, qproj; it has q_proj, .*down_proj"
    ):
        resolve_target_modules("q_proj,w1,qproj", config)
    with pytest.raises(InputError, match="none given"):
        resolve_target_modules(" , ", config)
    assert resolve_target_modules("q_proj,w1", types.SimpleNamespace(model_type="mixtral")) == ["q_proj", "w1"]


def test_linear_modules_of_an_unlisted_architecture():
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "phi3", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    assert sorted(linear_modules(config)) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
