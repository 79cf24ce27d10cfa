"""Loading: what is no model, and models made from a config."""

import pytest

from utils.core.arguments import ExtendArguments
from utils.core.errors import InputError
from utils.models import loading
from utils.weights import config


def test_an_adapter_folder_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="it holds an adapter"):
        config.load_config(str(tmp_path))


def test_a_model_is_created_from_a_config_with_overrides(tiny_model_folder):
    overrides = "num_hidden_layers=1,tie_word_embeddings=true"
    created = loading.create_model(
        ExtendArguments(config_name=str(tiny_model_folder), config_overrides=overrides), 300, "eager"
    )
    assert len(created.model.layers) == 1 and tuple(created.lm_head.weight.shape) == (300, 32)
    assert created.lm_head.weight is created.model.embed_tokens.weight
    for wrong in ("num_hidden_layers", "layers=3"):
        with pytest.raises(InputError, match=rf"--config_overrides {wrong}: need name=value"):
            loading.create_model(
                ExtendArguments(config_name=str(tiny_model_folder), config_overrides=wrong), 300, "eager"
            )
    for wrong, message in {
        "hidden_size=abc": "need int, as hidden_size 32 is",
        "hidden_size=16.5": "need int",
        "tie_word_embeddings=1": "need bool",
        "hidden_act=abc": "--config_overrides hidden_act=abc: ",
    }.items():
        with pytest.raises(InputError, match=message):
            loading.new_config(ExtendArguments(config_name=str(tiny_model_folder), config_overrides=wrong), 300)
    made = "pad_token_id=0, rms_norm_eps=1"
    read = loading.new_config(ExtendArguments(config_name=str(tiny_model_folder), config_overrides=made), 300)
    assert (read.pad_token_id, read.rms_norm_eps) == (0, 1.0)
    with pytest.raises(InputError, match="no such folder"):
        loading.create_model(ExtendArguments(config_name=str(tiny_model_folder / "absent")), 300, "eager")
