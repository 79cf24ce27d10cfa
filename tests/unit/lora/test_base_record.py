"""What an adapter's folder says about its base, and which bases are refused for it."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from utils.core.errors import InputError
from utils.core.files import read_json
from utils.lora.base_record import BASE_RECORD, check_base, record_base, weights_fingerprint
from utils.lora.config import load_adapter_config
from utils.weights.reader import open_checkpoint


@pytest.fixture(scope="module")
def adapter_folder(tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    record_base(folder, tiny_model_folder)
    return folder


def copy_base(base, folder, change=lambda weights: weights, **config):
    folder.mkdir()
    weights = load_file(base / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(read_json(base / "config.json") | config))
    return folder


def check(adapter_folder, base, first=True):
    with open_checkpoint(base) as checkpoint:
        config = read_json(base / "config.json")
        check_base(load_adapter_config(adapter_folder), base, checkpoint, config, first)


def fingerprint(folder):
    with open_checkpoint(folder) as checkpoint:
        return weights_fingerprint(checkpoint)


def test_a_fingerprint_is_of_weights_and_not_of_files(tiny_model_folder, tmp_path):
    expected = fingerprint(tiny_model_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1 and fingerprint(tmp_path / "shards") == expected
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "other")
    assert fingerprint(tmp_path / "other") != expected


def test_its_own_base_is_welcome_under_another_name(adapter_folder, tiny_model_folder, tmp_path, caplog):
    assert read_json(adapter_folder / BASE_RECORD)["folder"] == str(tiny_model_folder)
    with caplog.at_level(logging.WARNING):
        check(adapter_folder, copy_base(tiny_model_folder, tmp_path / "renamed"))
    assert caplog.text == ""


def test_other_weights_are_refused_unless_adapters_went_in_before(adapter_folder, tiny_model_folder, tmp_path):
    other = copy_base(tiny_model_folder, tmp_path / "other", lambda weights: {k: v + 1 for k, v in weights.items()})
    with pytest.raises(InputError, match="whose weights are not those of"):
        check(adapter_folder, other)
    check(adapter_folder, other, first=False)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architectures": ["MistralForCausalLM"]}, r"on a LlamaForCausalLM, .* is a MistralForCausalLM"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers 2\), .* has 3"),
    ],
)
def test_another_model_is_refused(adapter_folder, tiny_model_folder, tmp_path, config, named):
    with pytest.raises(InputError, match=named):
        check(adapter_folder, copy_base(tiny_model_folder, tmp_path / "other", **config))


def test_other_types_cannot_be_compared_and_that_is_said(adapter_folder, tiny_model_folder, tmp_path, caplog):
    half = copy_base(tiny_model_folder, tmp_path / "half", lambda weights: {k: v.half() for k, v in weights.items()})
    with caplog.at_level(logging.WARNING):
        check(adapter_folder, half)
    assert "whether the weights are the same cannot be checked" in caplog.text
