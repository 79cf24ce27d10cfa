"""utils.gguf.file, gguf_metadata, gguf_vocabulary, llamacpp: what a GGUF file holds, without running llama.cpp.

Expected bytes are computed on whole tensors, from what llama.cpp's rotary embedding needs; the writer works on row
blocks, which are small here.
"""

import itertools
import json
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from utils.core.errors import InputError
from utils.core.files import hash_file
from utils.gguf.file import parse_types, plan_gguf, write_gguf
from utils.gguf.llamacpp import describe_file, read_imatrix, require_llama_cpp
from utils.gguf.metadata import describe_model
from utils.gguf.vocabulary import describe_vocabulary, pre_tokenizer_name
from utils.lora.inputs import open_merge
from utils.text.tokenizer import load_tokenizer, save_tokenizer

pytestmark = pytest.mark.usefixtures("small_blocks")

SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,  # q has 512 rows, k 256
    "max_position_embeddings": 256,
}
MIXTRAL = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": None}


def make_model(folder, tokenizer_folder, kind="llama", dtype=torch.float32, **changes):
    """A model folder with random weights, and its weights: {name: float32 tensor}."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{k: v for k, v in (SIZES | changes).items() if v is not None})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(load_tokenizer(tokenizer_folder), folder)
    return folder, {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory, base_tokenizer_folder):
    return make_model(tmp_path_factory.mktemp("gguf") / "llama", base_tokenizer_folder)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory, base_tokenizer_folder):
    return make_model(tmp_path_factory.mktemp("gguf") / "mixtral", base_tokenizer_folder, "mixtral", **MIXTRAL)


def export(folder, path, file_type="F32", tokenizer=None):
    """Write a file. Returns: its tensors as gguf reads them, dequantised; the plan."""
    with open_merge(str(folder), tokenizer=tokenizer) as inputs:
        plan = plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "test")
        sha256 = write_gguf(plan, inputs.model, file_type, path)
    assert sha256 == hash_file(path)
    assert not list(path.parent.glob("*.header"))
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}, plan


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def interleaved(weight, heads):
    """Row 2i of every head is row i of its first half, row 2i + 1 row i of its second: neighbours rotate together."""
    size = len(weight) // heads
    rows = [
        head * size + half * (size // 2) + index
        for head, index, half in itertools.product(range(heads), range(size // 2), range(2))
    ]
    return weight[rows]


def expected_llama(weights, layers=2):
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for layer in range(layers):
        theirs, ours = f"model.layers.{layer}", f"blk.{layer}"
        found |= {
            f"{ours}.attn_q.weight": interleaved(weights[f"{theirs}.self_attn.q_proj.weight"], 8),
            f"{ours}.attn_k.weight": interleaved(weights[f"{theirs}.self_attn.k_proj.weight"], 4),
            f"{ours}.attn_v.weight": weights[f"{theirs}.self_attn.v_proj.weight"],
            f"{ours}.attn_output.weight": weights[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.ffn_gate.weight": weights[f"{theirs}.mlp.gate_proj.weight"],
            f"{ours}.ffn_up.weight": weights[f"{theirs}.mlp.up_proj.weight"],
            f"{ours}.ffn_down.weight": weights[f"{theirs}.mlp.down_proj.weight"],
            f"{ours}.attn_norm.weight": weights[f"{theirs}.input_layernorm.weight"],
            f"{ours}.ffn_norm.weight": weights[f"{theirs}.post_attention_layernorm.weight"],
        }
    return found


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_every_tensor_is_where_and_what_llama_cpp_expects(llama, tmp_path, file_type):
    folder, weights = llama
    tensors, _ = export(folder, tmp_path / "model.gguf", file_type)
    expected = expected_llama(weights)
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        kind = "F32" if weight.dim() == 1 else file_type
        if name == "output.weight" and file_type in ("Q4_0", "Q5_1"):
            kind = "Q8_0"
        kind = gguf.GGMLQuantizationType[kind]
        assert tensors[name].tensor_type == kind
        assert list(tensors[name].shape) == list(weight.shape)[::-1]
        bytes_ = np.ascontiguousarray(gguf.quants.quantize(weight.numpy(), kind)).tobytes()
        assert tensors[name].data.tobytes() == bytes_, name


def test_mixtral_experts_are_stacked_from_both_layouts_alike(mixtral, tmp_path):
    folder, weights = mixtral
    tensors, _ = export(folder, tmp_path / "separate.gguf")
    for layer in range(2):
        for expert in range(3):
            for theirs, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                weight = weights[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{theirs}.weight"]
                assert np.array_equal(tensors[f"blk.{layer}.ffn_{ours}_exps.weight"].data[expert], weight)
        router = weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert np.array_equal(tensors[f"blk.{layer}.ffn_gate_inp.weight"].data, router)
    fused = {}
    for name, weight in weights.items():
        if ".experts." not in name:
            fused[name.replace("block_sparse_moe", "mlp")] = weight
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (torch.stack([weights[f"{block}.{e}.{w}.weight"] for e in range(3)]) for w in ("w1", "w2", "w3"))
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    other = tmp_path / "fused"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    save_file(fused, other / "model.safetensors")
    together, _ = export(other, tmp_path / "fused.gguf", "F16")
    separate, _ = export(folder, tmp_path / "separate16.gguf", "F16")
    assert together.keys() == separate.keys()
    assert all(together[name].data.tobytes() == separate[name].data.tobytes() for name in separate)
    assert separate["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_qwen_rows_keep_their_order_and_biases_are_there(tmp_path, base_tokenizer_folder):
    folder, weights = make_model(tmp_path / "qwen", base_tokenizer_folder, "qwen2", head_dim=None)
    with torch.no_grad():
        weights["model.layers.0.self_attn.k_proj.bias"].copy_(torch.arange(32.0))
    save_file(weights, folder / "model.safetensors")
    tensors, _ = export(folder, tmp_path / "model.gguf")
    q = weights["model.layers.1.self_attn.q_proj.weight"]
    assert np.array_equal(tensors["blk.1.attn_q.weight"].data, q)
    assert tensors["blk.0.attn_k.bias"].data.tolist() == list(range(32))
    assert fields(tmp_path / "model.gguf")["general.architecture"] == "qwen2"


def test_llama_biases_are_reordered_with_their_rows(tmp_path, base_tokenizer_folder):
    folder, weights = make_model(tmp_path / "bias", base_tokenizer_folder, attention_bias=True, head_dim=8)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.arange(64.0)
    save_file(weights, folder / "model.safetensors")
    tensors, _ = export(folder, tmp_path / "model.gguf", "F16")
    assert tensors["blk.0.attn_q.bias"].data[:9].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8]
    assert tensors["blk.0.attn_q.bias"].tensor_type == gguf.GGMLQuantizationType.F32


def test_tied_embeddings_have_no_output_tensor(tmp_path, base_tokenizer_folder):
    folder, _ = make_model(tmp_path / "tied", base_tokenizer_folder, tie_word_embeddings=True)
    tensors, plan = export(folder, tmp_path / "model.gguf", "Q4_0")
    assert plan.tied
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0  # it is the output layer too


def test_rows_that_fill_no_block_stay_float16_and_are_named(tmp_path, base_tokenizer_folder):
    folder, _ = make_model(tmp_path / "odd", base_tokenizer_folder, intermediate_size=80)
    tensors, _ = export(folder, tmp_path / "model.gguf", "Q8_0")
    assert tensors["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    described = describe_file(tmp_path / "model.gguf", "Q8_0")
    assert described["fallbacks"] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert described["tensor_types"] == {"Q8_0": 14, "F16": 2, "F32": 5}


def test_adapters_are_merged_on_the_way(llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder, _ = llama
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "oracle")
    save_tokenizer(load_tokenizer(folder), tmp_path / "oracle")
    expected, _ = export(tmp_path / "oracle", tmp_path / "oracle.gguf")
    with open_merge(str(folder), [str(tmp_path / "adapter")]) as inputs:
        plan = plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "test")
        write_gguf(plan, inputs.model, "F32", tmp_path / "merged.gguf")
    plain, _ = export(folder, tmp_path / "plain.gguf")
    merged = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    assert merged.keys() == expected.keys()
    assert all(np.array_equal(merged[name].data, expected[name].data) for name in merged)
    changed = [name for name in merged if not np.array_equal(merged[name].data, plain[name].data)]
    assert changed == ["output.weight", *(f"blk.{n}.{t}.weight" for n in (0, 1) for t in ("ffn_down", "attn_q"))]


def edit(folder, target, change):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    change(weights, config)
    save_file(weights, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


BROKEN = {
    "no_layer": (lambda w, c: [w.pop(n) for n in list(w) if "layers.1." in n], r"lack 9 tensors: model\.layers\.1"),
    "no_tensor": (lambda w, c: w.pop("model.layers.1.mlp.up_proj.weight"), r"lack 1 tensors: model\.layers\.1\.mlp"),
    "no_norm": (lambda w, c: w.pop("model.norm.weight"), r"lack 1 tensors: model\.norm"),
    "no_head": (lambda w, c: w.pop("lm_head.weight"), r"lack 1 tensors: lm_head"),
    "more_layers": (lambda w, c: c.update(num_hidden_layers=1), r"hold 9 that have no place in it: model\.layers\.1"),
    "strange": (lambda w, c: w.update({"model.vision.weight": torch.ones(2)}), r"model\.vision\.weight has no count"),
    "integers": (
        lambda w, c: w.update({"model.layers.0.mlp.up_proj.weight": torch.ones(160, 64, dtype=torch.int8)}),
        "is stored as int8",
    ),
    "gelu": (lambda w, c: c.update(hidden_act="gelu"), r"hidden_act gelu \(need silu\)"),
    "longrope": (
        lambda w, c: c.update(
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 32,
                "long_factor": [2.0] * 32, "original_max_position_embeddings": 128,
            }
        ),
        "rope_type longrope",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_llama_cpp_cannot_hold_is_refused_before_weights_are_read(llama, tmp_path, case):
    change, message = BROKEN[case]
    folder = edit(llama[0], tmp_path / "broken", change)
    with pytest.raises(InputError, match=message), open_merge(str(folder)) as inputs:
        plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "test")


@pytest.mark.parametrize(("kind", "normalised"), [("qwen2_moe", False), ("qwen3_moe", True)])
def test_qwens_mixtures(kind, normalised, base_tokenizer_folder, tmp_path):
    """Written with the same weights as Mixtral's; what llama.cpp computes otherwise is refused by name."""
    shared = {"shared_expert_intermediate_size": 24} if kind == "qwen2_moe" else {}
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": normalised}
    folder, weights = make_model(tmp_path / "model", base_tokenizer_folder, kind, **sizes, **shared)
    tensors, plan = export(folder, tmp_path / "model.gguf")
    block = "model.layers.1.mlp"
    for theirs, ours in (("gate_proj", "gate"), ("down_proj", "down"), ("up_proj", "up")):
        stacked = tensors[f"blk.1.ffn_{ours}_exps.weight"].data
        for expert in range(3):
            assert np.array_equal(stacked[expert], weights[f"{block}.experts.{expert}.{theirs}.weight"])
    assert np.array_equal(tensors["blk.1.ffn_gate_inp.weight"].data, weights[f"{block}.gate.weight"])
    counts = ("add_expert_count", "add_expert_used_count", "add_expert_feed_forward_length")
    assert [plan.metadata[name] for name in counts] == [3, 2, 40]
    if shared:
        assert plan.metadata["add_expert_shared_feed_forward_length"] == 24
        gate = weights[f"{block}.shared_expert_gate.weight"]
        assert np.array_equal(tensors["blk.1.ffn_gate_inp_shexp.weight"].data, gate[0]), "a vector for llama.cpp"
        assert np.array_equal(
            tensors["blk.1.ffn_up_shexp.weight"].data, weights[f"{block}.shared_expert.up_proj.weight"]
        )
    with open_merge(str(folder)) as inputs:
        for change, words in (
            ({"norm_topk_prob": not normalised}, f"norm_topk_prob {not normalised}"),
            ({"mlp_only_layers": [0]}, "layers without experts"),
        ):
            with pytest.raises(InputError, match=words):
                plan_gguf(inputs.model, inputs.config | change, inputs.tokenizer, "test")


def test_missing_experts_and_other_architectures_are_refused(mixtral, tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    folder = edit(mixtral[0], tmp_path / "broken", lambda w, c: w.pop(name))
    with pytest.raises(InputError, match="layer 1 has 2 of 3 w1"), open_merge(str(folder)):
        pass
    with open_merge(str(mixtral[0])) as inputs:
        with pytest.raises(InputError, match="model_type gemma: need one of llama"):
            plan_gguf(inputs.model, inputs.config | {"model_type": "gemma"}, inputs.tokenizer, "test")
        with pytest.raises(InputError, match="--tokenizer_path"):
            plan_gguf(inputs.model, inputs.config, None, "test")


def test_weights_that_float16_cannot_hold_are_refused(llama, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edit(llama[0], tmp_path / "large", lambda w, c: w[name][150].fill_(1e6))
    with pytest.raises(InputError, match=r"up_proj\.weight overflows float16"):
        export(folder, tmp_path / "model.gguf", "F16")
    tensors, _ = export(folder, tmp_path / "model.gguf", "BF16")
    assert len(tensors) == 21


# ---------------------------------------------------------------- metadata


def config_of(kind="llama", **changes):
    return AutoConfig.for_model(kind, **(SIZES | {"head_dim": 16} | changes))


def test_plain_settings(llama, tmp_path):
    export(llama[0], tmp_path / "model.gguf", "F16")
    found = fields(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "test",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 160,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 400,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def rope(**settings):
    return {"rope_parameters": {"rope_theta": 50000.0, **settings}}


def test_rope_scaling():
    found, factors = describe_model(config_of(**rope(rope_type="linear", factor=4.0)), [])
    assert (found["add_rope_scaling_type"].value, found["add_rope_scaling_factor"]) == ("linear", 4.0)
    assert (found["add_rope_freq_base"], factors) == (50000.0, None)
    # the spelling of older configs
    found, _ = describe_model(config_of(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}), [])
    assert (found["add_rope_freq_base"], found["add_rope_scaling_factor"]) == (5e5, 2.0)
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    found, _ = describe_model(config_of(**rope(**yarn)), [])
    assert (found["add_rope_scaling_type"].value, found["add_rope_scaling_orig_ctx_len"]) == ("yarn", 32)
    assert "add_rope_scaling_attn_factors" not in found


@pytest.mark.parametrize("extra", [{"attention_factor": 0.9}, {"mscale": 1.0, "mscale_all_dim": 0.7}])
def test_yarn_magnitude_is_that_of_transformers(extra):
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    config = config_of(**rope(**yarn, **extra))
    _, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    found, _ = describe_model(config, [])
    assert found["add_rope_scaling_attn_factors"] * (0.1 * np.log(8.0) + 1) == pytest.approx(magnitude, rel=1e-6)


def test_llama3_factors_are_those_of_transformers():
    settings = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    scaled = config_of(**rope(rope_type="llama3", **settings))
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")
    plain = 1.0 / 50000.0 ** (torch.arange(0, 16, 2) / 16)
    _, factors = describe_model(scaled, [])
    torch.testing.assert_close(plain / factors, expected)
    assert factors[0] == 1 and factors[-1] == 8


def test_what_llama_cpp_computes_otherwise_is_noted_or_refused():
    notes: list[str] = []
    describe_model(config_of(**rope(rope_type="dynamic", factor=2.0)), notes)
    assert "exact up to 256 tokens" in notes[0]
    notes.clear()
    describe_model(config_of("mistral", sliding_window=100), notes)
    assert "the last 100" in notes[0]
    notes.clear()
    describe_model(config_of("mistral", sliding_window=None), notes)
    describe_model(config_of("qwen2", sliding_window=100, use_sliding_window=False), notes)
    assert notes == []
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    with pytest.raises(InputError, match=r"beta_fast 16: llama\.cpp computes 32"):
        describe_model(config_of(**rope(**yarn, beta_fast=16)), [])
    with pytest.raises(InputError, match=r"partial_rotary_factor 0\.5"):
        describe_model(config_of(**rope(rope_type="default", partial_rotary_factor=0.5)), [])
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with pytest.raises(InputError, match="rope_type llama3"):
        describe_model(config_of("qwen2", **rope(**llama3, original_max_position_embeddings=64)), [])


# ---------------------------------------------------------------- vocabularies


def test_sentencepiece_scores_and_types_are_the_model_files(extended_tokenizer_folder):
    tokenizer = load_tokenizer(extended_tokenizer_folder)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("<think>", special=False)])
    found = describe_vocabulary(tokenizer, 416, {}, [])
    pieces = tokenizer.proto.pieces
    count = len(pieces)
    assert count == 406
    assert found["add_token_list"][:count] == [piece.piece.encode() for piece in pieces]
    assert found["add_token_scores"][:count] == [piece.score for piece in pieces]
    assert found["add_token_types"][:count] == [piece.type for piece in pieces]
    assert set(found["add_token_types"][:count]) == {1, 2, 3, 6}  # normal, unknown, control, byte
    assert found["add_token_list"][count:] == [b"<|turn|>", b"<think>", *(b"[PAD%d]" % n for n in range(408, 416))]
    assert found["add_token_types"][count:] == [3, 4, *[5] * 8]  # control, user-defined, unused
    assert found["add_token_scores"][count:] == [-1000.0, -1000.0, *[-10000.0] * 8]
    with pytest.raises(InputError, match="id 407 has no row"):
        describe_vocabulary(tokenizer, 407, {}, [])


def test_end_of_turn_and_chat_template(extended_tokenizer_folder):
    tokenizer = load_tokenizer(extended_tokenizer_folder)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    assert "add_eot_token_id" not in describe_vocabulary(tokenizer, 416, {}, [])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] + '<|turn|>' }}{% endfor %}"
    found = describe_vocabulary(tokenizer, 416, {}, [])
    assert found["add_chat_template"] == tokenizer.chat_template
    assert (found["add_eos_token_id"], found["add_eot_token_id"]) == (2, 406)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("trainer_spec.model_type", 1, "is no BPE model"),
        ("normalizer_spec.precompiled_charsmap", b"x", "changes the text"),
        ("normalizer_spec.remove_extra_whitespaces", True, "changes the text"),
        ("trainer_spec.treat_whitespace_as_suffix", True, "behind words"),
        ("bytes", None, "lacks pieces for all 256 bytes"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_reads_otherwise_are_refused(base_tokenizer_folder, field, value, message):
    tokenizer = load_tokenizer(base_tokenizer_folder)
    proto = tokenizer.proto
    if field == "bytes":
        proto.pieces[50].type = 1
    else:
        part, name = field.split(".")
        setattr(getattr(proto, part), name, value)

    class Edited(type(tokenizer)):
        proto = None

    tokenizer.__class__ = Edited
    Edited.proto = proto
    with pytest.raises(InputError, match=message):
        describe_vocabulary(tokenizer, 400, {}, [])


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"llama-bpe": WORDS + r"\p{N}{1,3}" + REST, "qwen2": WORDS + r"\p{N}" + REST}


def byte_level(folder, name, **changes):
    """A small byte-level tokenizer of the kind that has this name in llama.cpp."""
    backend = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
    first = pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated") if name in PATTERNS else None
    if name == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, plain]) if first else plain
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["hello hello world", "你好你好世界"] * 20, trainer)
    backend.add_special_tokens(["<|bos|>", "<|eos|>"])
    backend.add_tokens(["<tool>"])
    for attribute, value in changes.items():
        setattr(backend, attribute, value)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gpt-2", "smollm"])
def test_byte_level_vocabularies(tmp_path, name):
    tokenizer = byte_level(tmp_path, name)
    size = len(tokenizer)
    found = describe_vocabulary(tokenizer, size + 2, {}, [])
    assert (found["add_tokenizer_model"], found["add_tokenizer_pre"]) == ("gpt2", name)
    assert [token.decode() for token in found["add_token_list"][:size]] == tokenizer.convert_ids_to_tokens(range(size))
    assert found["add_token_types"] == [*[1] * (size - 3), 3, 3, 4, 5, 5]
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert [tuple(pair.split(" ")) for pair in found["add_token_merges"]] == [tuple(p) for p in model["merges"]]
    assert len(found["add_token_merges"]) > 10
    assert (found["add_bos_token_id"], found["add_eos_token_id"]) == (size - 3, size - 2)
    assert found["add_add_bos_token"] is False


def test_llama3_takes_whole_words_and_its_twin_without_them_has_another_name(tmp_path):
    backend = json.loads(byte_level(tmp_path, "llama-bpe").backend_tokenizer.to_str())
    backend["model"]["ignore_merges"] = False
    assert pre_tokenizer_name(backend) == "smaug-bpe"


def test_normalisation_is_noted(tmp_path):
    notes: list[str] = []
    describe_vocabulary(byte_level(tmp_path, "qwen2", normalizer=normalizers.NFC()), 400, {}, notes)
    assert "NFC" in notes[0]


UNKNOWN = {
    "pattern": ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d+|\D+"), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)])}, r"\\d\+\|\\D\+"),
    "space": ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "add_prefix_space"),
    "behaviour": ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERNS["qwen2"]), "removed"),
        pre_tokenizers.ByteLevel(False, use_regex=False)])}, "Removed"),
    "normaliser": ({"normalizer": normalizers.NFKC()}, "normaliser NFKC"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_way_of_splitting_is_refused_with_the_pattern(tmp_path, case):
    changes, message = UNKNOWN[case]
    tokenizer = byte_level(tmp_path, "qwen2", **changes)
    with pytest.raises(InputError, match=message):
        describe_vocabulary(tokenizer, 400, {}, [])


def test_a_sentencepiece_vocabulary_without_its_model_file_is_refused(base_tokenizer_folder, tmp_path):
    save_tokenizer(load_tokenizer(base_tokenizer_folder), tmp_path / "json")
    (tmp_path / "json" / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"put the tokenizer\.model"):
        describe_vocabulary(load_tokenizer(tmp_path / "json"), 400, {}, [])


def test_ids_a_tokenizer_lacks_come_from_the_config(tmp_path):
    tokenizer = byte_level(tmp_path, "qwen2")
    tokenizer.bos_token = tokenizer.eos_token = None
    found = describe_vocabulary(tokenizer, 400, {"bos_token_id": 7, "eos_token_id": [9, 10]}, [])
    assert (found["add_bos_token_id"], found["add_eos_token_id"]) == (7, 9)


# ---------------------------------------------------------------- types and importance matrices


def test_types_are_spelled_as_llama_cpp_does():
    assert parse_types(["f16", "Q4_k_m", "q4_K", "fp16"]) == ["F16", "Q4_K_M"]
    with pytest.raises(InputError, match="Q4_K_X: need one or more of f32, f16"):
        parse_types(["f16", "q4_k_x"])
    with pytest.raises(InputError, match="nothing given"):
        parse_types([])
    with pytest.raises(InputError, match="iq2_xs: so few bits need an importance matrix"):
        parse_types(["f16", "iq2_xs"])
    assert parse_types(["iq2_xs"], "some.gguf") == ["IQ2_XS"]


def test_missing_llama_cpp_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--types q4_k_m needs .*pip install -r requirements-llamacpp\.txt"):
        require_llama_cpp("--types q4_k_m")


def write_imatrix(path, entries):
    """As llama-imatrix writes it: {name: (sums of squares (experts, columns), tokens per expert)}."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.array(sums, np.float32))
        writer.add_tensor(f"{name}.counts", np.array(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_importance_matrices_of_both_formats(tmp_path):
    write_imatrix(tmp_path / "new.gguf", {"a": ([[2, 4]], [2]), "e": ([[3, 6], [0, 0]], [3, 0])})
    found = read_imatrix(tmp_path / "new.gguf")
    assert {name: values.tolist() for name, values in found.items()} == {"a": [1, 2], "e": [1, 2, 1, 1]}
    data = struct.pack("<i", 1) + struct.pack("<i", 1) + b"a" + struct.pack("<ii", 2, 2)
    (tmp_path / "old.dat").write_bytes(data + np.array([2, 4], "<f4").tobytes())
    assert read_imatrix(tmp_path / "old.dat")["a"].tolist() == [1, 2]
    (tmp_path / "cut.dat").write_bytes((tmp_path / "old.dat").read_bytes()[:-3])
    (tmp_path / "text.dat").write_text("this is no matrix at all")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "new.gguf").read_bytes()[:60])
    for name in ("cut.dat", "text.dat", "cut.gguf", "absent"):
        with pytest.raises(InputError, match=f"--imatrix .*{name}"):
            read_imatrix(tmp_path / name)
