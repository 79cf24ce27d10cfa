"""What a model's folder lacks or has too much; every kind of model against the file that transformers itself wrote."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.merging import make_base
from utils.core.errors import InputError
from utils.weights import model_folder
from utils.weights.model_folder import REWARD_MODEL, read_model


def edited(source, target, change=None, **config):
    """A copy of a folder with other weights and another config.json."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = load_file(target / "model.safetensors")
    if change:
        weights = change(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    settings = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(settings))
    return target


def without(prefix):
    return lambda weights: {name: value for name, value in weights.items() if not name.startswith(prefix)}


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "qwen2", "qwen3"])
def test_each_tensor_is_missed(tmp_path, kind):
    base = make_base(tmp_path / "base", kind, num_hidden_layers=1)
    assert read_model(str(base)).extra == []
    for name in load_file(base / "model.safetensors"):
        folder = edited(base, tmp_path / "cut", without(name))
        named = name.replace("block_sparse_moe", "mlp")  # as transformers calls it
        expert = f"layer 0 has 3 of 4 {name.split('.')[-2]}" if ".experts." in name else f"lack 1 tensors: {named}"
        with pytest.raises(InputError, match=expert):
            read_model(str(folder))


def prefixed(prefix):
    return lambda weights: {prefix + name: value for name, value in weights.items()}


def with_more(**more):
    return lambda weights: weights | {name.replace("__", "."): torch.ones(shape) for name, shape in more.items()}


REFUSED = {
    "all_renamed": (prefixed("base_model."), {}, r"lack 21 tensors: .* hold 21 .* base_model\.lm_head\.weight"),
    "fewer_layers_in_the_config": (None, {"num_hidden_layers": 1}, r"hold 9 that have no place.*model\.layers\.1\."),
    "more_layers_in_the_config": (None, {"num_hidden_layers": 3}, r"lack 9 tensors: model\.layers\.2\."),
    "a_bias_that_would_be_dropped": (with_more(model__layers__0__self_attn__q_proj__bias=64), {}, "hold 1 that"),
    "other_shapes": (None, {"vocab_size": 500}, r"lm_head\.weight \[400, 64\] instead of \[500, 64\]"),
    "integers_without_scales": (
        lambda weights: weights | {"model.norm.weight": torch.ones(64, dtype=torch.int8)},
        {},
        r"model\.norm\.weight is stored as int8, but config\.json has no quantization_config",
    ),
    "padding_without_a_row": (None, {"pad_token_id": 400}, r"config\.json: pad_token_id is 400, but vocab_size 400"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_are_not_the_configs_are_refused(llama, tmp_path, case):
    change, config, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        read_model(str(edited(llama, tmp_path / "other", change, **config)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "llama")


ACCEPTED = {
    "old_buffers": (with_more(model__layers__0__self_attn__rotary_emb__inv_freq=8), {}, []),
    "a_stray_tensor": (with_more(vision__weight=3), {}, ["vision.weight"]),
    "a_head_beside_a_tied_one": (None, {"tie_word_embeddings": True}, []),
    "a_tied_head": (without("lm_head.weight"), {"tie_word_embeddings": True}, []),
    "a_padding_token_counted_from_the_end": (None, {"pad_token_id": -1}, []),
    "without_the_prefix": (lambda w: {n.removeprefix("model."): v for n, v in w.items()}, {}, []),
    "one_prefix_too_many": (prefixed("model."), {}, []),  # transformers takes it off
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_transformers_computes_or_ties_is_not_missed(llama, tmp_path, case):
    change, config, extra = ACCEPTED[case]
    assert read_model(str(edited(llama, tmp_path / "other", change, **config))).extra == extra


def test_a_reward_model_gets_a_head_and_answers_nothing(llama, tmp_path):
    assert read_model(str(llama), REWARD_MODEL).extra == []  # a new head
    named = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    change = with_more(score__weight=(1, 64))
    scores = edited(llama, tmp_path / "scores", lambda w: change(without("lm_head.weight")(w)), **named)
    assert read_model(str(scores), REWARD_MODEL).extra == []
    with pytest.raises(InputError, match=r"lack 1 tensors: lm_head\.weight"):
        read_model(str(scores))
    with pytest.raises(InputError, match=r"lack 1 tensors: score\.weight"):
        read_model(str(edited(llama, tmp_path / "headless", **named)), REWARD_MODEL)


def test_a_quantised_folder_has_something_of_every_module(llama, tmp_path):
    pytest.importorskip("bitsandbytes")
    from utils.core.arguments import ModelArguments
    from utils.models.loading import load_model

    model = load_model(ModelArguments(str(llama), load_in_kbits=4), torch.float32, {"": "cpu"})
    model.save_pretrained(tmp_path / "small")
    assert read_model(str(tmp_path / "small")).extra == []
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        folder = edited(tmp_path / "small", tmp_path / name, without(name))
        with pytest.raises(InputError, match=f"lack 1 tensors: {name}"):
            read_model(str(folder))


def test_the_rehearsal_leaves_no_trace(llama):
    from transformers.integrations import deepspeed
    from transformers.utils import logging as library

    class Zero3:
        def is_zero3(self):
            return True

    spread = Zero3()
    deepspeed.set_hf_deepspeed_config(spread)
    before = library.get_verbosity(), library.is_progress_bar_enabled()
    try:
        with model_folder._alone():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
        assert (library.get_verbosity(), library.is_progress_bar_enabled()) == before
    finally:
        deepspeed.unset_hf_deepspeed_config()
