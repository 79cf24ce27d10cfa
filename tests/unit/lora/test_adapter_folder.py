"""Adapters of any age answer as PEFT's own do; on another base of the same shapes they are refused everywhere."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.merging import TEXT, load, make_adapter, make_base
from utils.core.arguments import ExtendArguments, InferenceArguments, LoraArguments, ModelArguments
from utils.core.errors import InputError
from utils.generation.loading import check_inference_request
from utils.lora.adapter_folder import load_with_peft, read_adapter
from utils.lora.base_record import record_base
from utils.lora.inputs import open_merge
from utils.models.training_model import attach_adapter, check_training_request
from utils.rlhf.reward_model import check_reward_request, load_reward_model
from utils.text.tokenizer import load_tokenizer, save_tokenizer
from utils.weights.model_folder import read_model


@pytest.fixture(scope="module")
def base(tmp_path_factory, base_tokenizer_folder):
    folder = make_base(tmp_path_factory.mktemp("models") / "llama")
    save_tokenizer(load_tokenizer(base_tokenizer_folder), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """(folder, logits with it on): LoRA, and embeddings and head in full."""
    folder = tmp_path_factory.mktemp("adapters") / "new"
    logits = make_adapter(
        base, folder, modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj", "v_proj"]
    )
    record_base(folder, base)
    return folder, logits


def rewritten(source, target, change, file="adapter_model.bin"):
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("oracle", "*.safetensors", "base_model.json"))
    weights = change(load_file(source / "adapter_model.safetensors"))
    torch.save(weights, target / file) if file.endswith(".bin") else save_file(weights, target / file)
    return target


def spelled(infix):
    """As PEFT 0.3 wrote modules trained in full, beside what training found there."""

    def change(weights):
        old = {}
        for name, value in weights.items():
            if "lora_" in name:
                old[name.replace(".weight", f"{infix}.weight")] = value
            else:
                old[name.replace(".weight", f".modules_to_save{infix}.weight")] = value
                old[name.replace(".weight", ".original_module.weight")] = torch.zeros_like(value)
        return old

    return change


def whole_state(base):
    """The state of the whole model, as scripts of 2023 saved it."""

    def change(weights):
        everything = {
            f"base_model.model.{name}": value for name, value in load_file(base / "model.safetensors").items()
        }
        everything |= weights
        return everything | {
            f"base_model.model.model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in (0, 1)
        }

    return change


@pytest.mark.parametrize("case", ["modules_to_save.default", "modules_to_save", "no prefix", "whole state"])
def test_every_spelling_answers_as_peft_wrote_it(base, adapter, tmp_path, case):
    changes = {
        "modules_to_save.default": spelled(".default"),
        "modules_to_save": spelled(""),
        "no prefix": lambda weights: {n.removeprefix("base_model.model."): v for n, v in weights.items()},
        "whole state": whole_state(base),
    }
    folder = rewritten(adapter[0], tmp_path / "old", changes[case])
    assert read_adapter(str(folder), read_model(str(base))).rows == 400
    arguments = LoraArguments(adapter_name_or_path=str(folder))
    for model in (load_with_peft(load(base), {"default": str(folder)}), attach_adapter(load(base), arguments, 16)):
        with torch.no_grad():
            assert torch.equal(model.eval()(TEXT).logits, adapter[1])
    larger = load(base)
    larger.resize_token_embeddings(410, mean_resizing=False)
    with pytest.raises(InputError, match=r"has 400 rows, the model 410: they belong to different vocabularies"):
        attach_adapter(larger, arguments, 16)


def test_modules_that_the_config_promises_must_be_there(base, adapter, tmp_path):
    folder = rewritten(
        adapter[0], tmp_path / "cut", lambda weights: {n: v for n, v in weights.items() if "lm_head" not in n}
    )
    with pytest.raises(InputError, match=r"lm_head were trained in full \(modules_to_save\), but the weights do not"):
        read_adapter(str(folder), read_model(str(base)))


@pytest.fixture(scope="module")
def other(base, tmp_path_factory):
    """A model of the same shapes, vocabulary and tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(base, folder)
    weights = {name: value + 0.01 for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def use(adapter, model):
    """Ways in which an adapter meets a base."""
    tokenizer = load_tokenizer(model)
    lora, named = LoraArguments(adapter_name_or_path=str(adapter)), ModelArguments(str(model))

    def merge():
        with open_merge(str(model), [str(adapter)]):
            pass

    arguments = InferenceArguments(model_name_or_path=str(model), adapter_name_or_path=str(adapter))
    return {
        "inference": lambda: check_inference_request(arguments, tokenizer),
        "training": lambda: check_training_request(named, ExtendArguments(), lora, tokenizer),
        "merging": merge,
    }


def test_the_base_of_another_run_is_refused_everywhere(base, adapter, other):
    for way in use(adapter[0], other).values():
        with pytest.raises(InputError, match=r"was trained on .*llama, whose weights are not those of .*other"):
            way()
    for way in use(adapter[0], base).values():
        way()


def test_the_base_of_another_reward_model_is_refused(base, other, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(base)
    tokenizer.pad_token, tokenizer.chat_template = "<unk>", "{{ messages[0]['content'] }}"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(tmp_path)
    record_base(tmp_path, base)
    save_tokenizer(tokenizer, tmp_path)
    lora = LoraArguments(adapter_name_or_path=str(tmp_path))
    check_reward_request(ModelArguments(str(base)), lora, tokenizer)
    assert load_reward_model(tmp_path).score([([1, 5], [9])]).shape == (1,)
    for way in (
        lambda: check_reward_request(ModelArguments(str(other)), lora, tokenizer),
        lambda: load_reward_model(tmp_path, base=str(other)),
    ):
        with pytest.raises(InputError, match="whose weights are not those of"):
            way()


def test_a_base_that_cannot_be_told_apart_is_said(base, adapter, other, tmp_path, caplog):
    folder = rewritten(adapter[0], tmp_path / "old", dict)
    with caplog.at_level(logging.INFO):
        read_adapter(str(folder), read_model(str(base)))
    assert [record.levelname for record in caplog.records] == ["INFO"]
    caplog.clear()
    read_adapter(str(folder), read_model(str(other)))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "does not say which weights it was trained on" in caplog.text


def test_an_adapter_fits_the_weights_that_a_quantised_folder_was_made_from(base, adapter, tmp_path):
    pytest.importorskip("bitsandbytes")
    from utils.models.loading import load_model

    model = load_model(ModelArguments(str(base), load_in_kbits=4), torch.float32, {"": "cpu"})
    model.save_pretrained(tmp_path / "small")
    read_adapter(str(adapter[0]), read_model(str(tmp_path / "small")))
    config = json.loads((adapter[0] / "adapter_config.json").read_text()) | {"r": 8}
    shutil.copytree(adapter[0], tmp_path / "wrong")
    (tmp_path / "wrong" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"has rank 4, adapter_config\.json says 8"):
        read_adapter(str(tmp_path / "wrong"), read_model(str(tmp_path / "small")))
