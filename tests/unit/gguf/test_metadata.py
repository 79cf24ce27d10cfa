"""utils.gguf.metadata: what a file says of sampling means what the generation_config.json it was made of means."""

import json

import pytest
from transformers import AutoConfig

from utils.core.errors import InputError
from utils.gguf.metadata import describe_model, describe_sampling, read_sampling
from utils.weights.generation_config import named_sampling


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05},
        {"top_k": -1},
        {},
    ],
)
def test_what_a_converter_wrote_means_the_same_as_the_folder(tmp_path, settings):
    """llama.cpp's converter writes those that are there, this project all of them."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
    folder = named_sampling([tmp_path])
    keys = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "penalty_repeat"}
    written = {f"general.sampling.{keys[name]}": value for name, value in settings.items()}
    assert read_sampling(written, "a.gguf") == folder
    own = {name.replace("add_sampling_", "general.sampling."): v for name, v in describe_sampling(folder).items()}
    assert read_sampling(own, "a.gguf") == folder


def test_a_setting_that_makes_no_sense_is_named_with_the_file():
    with pytest.raises(InputError, match=r"a\.gguf: --top_p 7"):
        read_sampling({"general.sampling.top_p": 7.0}, "a.gguf")


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 7, "sliding_window": 64}


def test_a_gemma_says_what_its_layers_see_and_turn_by():
    config = AutoConfig.for_model("gemma3_text", **GEMMA, final_logit_softcapping=30.0)
    found, factors = describe_model(config, notes := [])
    assert factors is None and not notes, "its window is no difference: llama.cpp has it too"
    assert (found["add_sliding_window"], found["add_rope_freq_base"]) == (64, 1e6)
    assert found["add_final_logit_softcapping"] == 30.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 7}, r"layer_types .* \(need full_attention in every 6th layer\)"),
        ({"hidden_activation": "silu"}, r"hidden_activation silu \(need gelu_pytorch_tanh\)"),
        ({"query_pre_attn_scalar": 256}, r"query_pre_attn_scalar 256 \(need 16\)"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50\.0 \(need none\)"),
        ({"use_bidirectional_attention": True}, r"use_bidirectional_attention"),
    ],
)
def test_a_gemma_that_llama_cpp_would_compute_otherwise_is_refused(changes, message):
    with pytest.raises(InputError, match=f"llama.cpp has no such gemma3_text model: .*{message}"):
        describe_model(AutoConfig.for_model("gemma3_text", **(GEMMA | changes)), [])


def test_a_gemma_with_another_local_rotation_is_refused():
    config = AutoConfig.for_model("gemma3_text", **GEMMA)
    config.rope_parameters["sliding_attention"]["rope_theta"] = 20000.0
    with pytest.raises(InputError, match=r"rope_parameters of sliding_attention .*need rope_theta 10000"):
        describe_model(config, [])
