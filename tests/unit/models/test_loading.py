"""Loading: what is no model, and models made from a config."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from utils.core.arguments import ExtendArguments, InferenceArguments, LoraArguments, ModelArguments
from utils.core.errors import InputError
from utils.generation.loading import check_inference_request
from utils.lora.inputs import open_merge
from utils.models import loading
from utils.models.training_model import check_training_request
from utils.rlhf.reference import check_reference_model
from utils.rlhf.reward_model import check_reward_request
from utils.text.tokenizer import load_tokenizer
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
    with pytest.raises(InputError, match="no such folder"):
        loading.create_model(ExtendArguments(config_name=str(tiny_model_folder / "absent")), 300, "eager")


# ---------------------------------------------------------------- folders that transformers alone cannot load


def in_shards(source, folder, suffix, index):
    """The model in two files of its tensors in turn, with the index that is given."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    parts, names = [{}, {}], [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for number, (name, value) in enumerate(weights.items()):
        parts[number % 2][name] = value
    for part, name in zip(parts, names, strict=True):
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
    weight_map = {tensor: name for part, name in zip(parts, names, strict=True) for tensor in part}
    if index is not None:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index(weight_map)))
    return folder


INDEXES = {
    "none": None,
    "no_metadata": lambda names: {"weight_map": names},
    "empty_metadata": lambda names: {"metadata": None, "weight_map": names},
    "files_confused": lambda names: {
        "metadata": {},
        "weight_map": dict(zip(names, [*[*names.values()][1:], next(iter(names.values()))], strict=True)),
    },
}


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 33, 120, 399]])).logits


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("index", INDEXES)
def test_shards_with_any_index_or_none(tiny_model_folder, tmp_path, index, suffix):
    expected = logits_of(LlamaForCausalLM.from_pretrained(tiny_model_folder))
    folder = in_shards(tiny_model_folder, tmp_path / "model", suffix, INDEXES[index])
    model = loading.load_model(ModelArguments(str(folder)), torch.float32)
    assert torch.equal(logits_of(model), expected)
    assert model.name_or_path == model.config.name_or_path == str(folder)  # what an adapter records


def test_a_single_file_named_as_a_shard(tiny_model_folder, tmp_path):
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-00001-of-00001.safetensors")
    model = loading.load_model(ModelArguments(str(tmp_path / "model")), torch.float32)
    assert torch.equal(logits_of(model), logits_of(LlamaForCausalLM.from_pretrained(tiny_model_folder)))


def test_what_a_wrapper_put_before_the_names_is_left_off(tiny_model_folder, tmp_path):
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    weights = load_file(tiny_model_folder / "model.safetensors")
    save_file({f"module.{n}": v for n, v in weights.items()}, tmp_path / "model" / "model.safetensors")
    model = loading.load_model(ModelArguments(str(tmp_path / "model")), torch.float32)
    assert torch.equal(logits_of(model), logits_of(LlamaForCausalLM.from_pretrained(tiny_model_folder)))
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == weights.keys()


def test_a_missing_weight_is_the_same_error_wherever_a_model_is_read(tiny_model_folder, tmp_path):
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    weights = load_file(tiny_model_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors")
    folder = str(tmp_path / "model")
    tokenizer = load_tokenizer(folder)

    def merge():
        with open_merge(folder):
            pass

    ways = {
        "inference": lambda: check_inference_request(InferenceArguments(model_name_or_path=folder), tokenizer),
        "training": lambda: check_training_request(
            ModelArguments(folder), ExtendArguments(), LoraArguments(), tokenizer
        ),
        "reward model": lambda: check_reward_request(ModelArguments(folder), LoraArguments(), tokenizer),
        "reference": lambda: check_reference_model(folder, tokenizer),
        "loading": lambda: loading.load_model(ModelArguments(folder), torch.float32),
        "merging": merge,
    }
    for way in ways.values():
        with pytest.raises(InputError, match=r"lack 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
            way()
