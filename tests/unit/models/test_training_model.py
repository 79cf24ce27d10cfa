"""What may be trained: a larger tokenizer, a head among targets."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from support.models import tiny_llama
from support.tokenizers import PATTERNS, make_byte_level
from utils.core.arguments import ExtendArguments, LoraArguments, ModelArguments
from utils.core.errors import InputError
from utils.models import training_model
from utils.models.lm_loss import install_loss_head, loss_targets
from utils.text.tokenizer import load_tokenizer
from utils.weights.generation_config import named_end_ids


def test_a_larger_tokenizer_needs_trained_rows(tiny_model_folder, extended_tokenizer_folder):
    tokenizer = load_tokenizer(extended_tokenizer_folder)
    request = (ModelArguments(model_name_or_path=str(tiny_model_folder)), ExtendArguments())
    with pytest.raises(InputError, match=r"406 tokens, the model 400 .*--modules_to_save embed_tokens,lm_head"):
        training_model.check_training_request(*request, LoraArguments(), tokenizer)
    training_model.check_training_request(*request, LoraArguments(modules_to_save="embed_tokens,lm_head"), tokenizer)
    allowed = ExtendArguments(resize_embeddings=True)
    training_model.check_training_request(request[0], allowed, LoraArguments(), tokenizer)


def test_lm_head_among_targets_is_refused(tiny_model_folder):
    model = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    with pytest.raises(InputError, match="lm_head"):
        training_model.attach_adapter(model, LoraArguments(target_modules="q_proj,lm_head"), 16)


@pytest.mark.parametrize("saved", ["embed_tokens,lm_head", "embed_tokens", "lm_head"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_trained_embeddings_of_a_tied_model_get_the_gradients_of_cross_entropy(saved, kind, tmp_path):
    """PEFT puts a plain Linear in the head's place; a new adapter, and one that is gone on with, against autograd."""
    ids, targets = torch.arange(18).view(2, 9), torch.arange(1, 19).view(2, 9)
    config = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "vocab_size": 97, "tie_word_embeddings": True}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    base.save_pretrained(tmp_path / "base")

    def attach(**adapter):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        install_loss_head(model)
        return training_model.attach_adapter(model, LoraArguments(lora_dropout=0.0, **adapter), 16)

    def gradients(model, loss):
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    first = attach(modules_to_save=saved)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    first.save_pretrained(tmp_path / "adapter")
    second = attach(adapter_name_or_path=str(tmp_path / "adapter"))
    for model in (first, second):
        logits = model(ids).logits
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        assert torch.allclose(logits, first(ids).logits, atol=1e-5)
        expected = gradients(model, plain)
        with loss_targets(model, targets):
            loss = model(ids).logits
        assert loss.shape == () and torch.allclose(loss, plain)
        found = gradients(model, loss)
        assert found.keys() == expected.keys() and any("embed_tokens.modules_to_save" in name for name in found)
        assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in found)
    # What is saved is one model for PEFT, too.
    plain_base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.allclose(PeftModel.from_pretrained(plain_base, tmp_path / "adapter")(ids).logits, logits, atol=1e-5)


def test_a_tied_head_is_left_alone_where_embeddings_get_a_low_rank_update(tmp_path):
    """As PEFT without ensure_weight_tying has it; with it, PEFT would wrap the head that computes the loss."""
    model = tiny_llama(97, tie_word_embeddings=True)
    install_loss_head(model)
    settings = LoraArguments(target_modules="q_proj,embed_tokens", modules_to_save="norm", lora_dropout=0.0)
    model = training_model.attach_adapter(model, settings, 16)
    ids, targets = torch.arange(18).view(2, 9), torch.arange(1, 19).view(2, 9)
    expected = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    with loss_targets(model, targets):
        assert torch.allclose(model(ids).logits, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, "tied": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6], "tied": True},
    ],
)
def test_adapters_that_update_the_head_by_parts_are_not_gone_on_with(changes, tiny_model_folder, tmp_path):
    """The sum of the logits would be trained instead of the loss."""
    tied = changes.pop("tied", False)
    tokenizer = load_tokenizer(tiny_model_folder)
    tiny_llama(len(tokenizer), tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **changes)).save_pretrained(tmp_path / "adapter")
    request = (ModelArguments(model_name_or_path=str(tmp_path / "base")), ExtendArguments())
    lora_args = LoraArguments(adapter_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="it updates lm_head by parts"):
        training_model.check_training_request(*request, lora_args, tokenizer)


def test_a_new_model_ends_answers_where_its_tokenizer_does(tmp_path):
    LlamaConfig(hidden_size=32, num_attention_heads=4, intermediate_size=32).save_pretrained(tmp_path / "config")
    tokenizer = make_byte_level(tmp_path / "tokenizer", PATTERNS["qwen2"], False)
    request = (ModelArguments(), ExtendArguments(config_name=str(tmp_path / "config")))
    request += (LoraArguments(full_finetuning=True), tokenizer, torch.float32, 0)
    training_model.build_training_model(*request).save_pretrained(tmp_path / "model")
    assert named_end_ids([tmp_path / "model"]) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("way", [{"modules_to_save": "embed_tokens,lm_head"}, {"full_finetuning": True}])
def test_gradients_of_a_float16_base_can_be_scaled(way, tiny_model_folder, tmp_path):
    """--precision fp16: torch's GradScaler refuses float16 gradients, so that what is trained is float32."""
    LlamaForCausalLM.from_pretrained(tiny_model_folder).half().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tiny_model_folder)
    lora_args, ids = LoraArguments(lora_dropout=0.0, **way), torch.tensor([[5, 6, 7, 8]])
    losses = {}
    for dtype in ("auto", "float32"):
        request = (ModelArguments(model_name_or_path=str(tmp_path), dtype=dtype), ExtendArguments(), lora_args)
        model = training_model.build_training_model(*request, tokenizer, torch.float16, seed=0)
        if not lora_args.full_finetuning:
            assert dtype != "auto" or model.dtype == torch.float16, "frozen weights stay as they are stored"
            torch.manual_seed(0)
            model = training_model.attach_adapter(model, lora_args, 16)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, scaler = torch.optim.SGD(trained, lr=1e-3), torch.amp.GradScaler("cpu", init_scale=8.0)
        losses[dtype] = []
        for _ in range(2):
            with torch.autocast("cpu", torch.float16):
                loss = model(input_ids=ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses[dtype].append(loss.item())
    assert losses["auto"][1] < losses["auto"][0]
    assert losses["auto"] == pytest.approx(losses["float32"], abs=0.02)


def test_names_that_no_module_has_are_an_error(tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder)
    request = (ModelArguments(model_name_or_path=str(tiny_model_folder)), ExtendArguments())
    for wrong in ("embed_token", "embed_tokens, lm-head"):
        with pytest.raises(InputError, match=rf"no module is called {wrong.split(', ')[-1]}; .*embed_tokens.*lm_head"):
            training_model.check_training_request(*request, LoraArguments(modules_to_save=wrong), tokenizer)
    for targets, message in (("q_proj,v_prj", "v_prj"), ("q_proj, lm_head", "lm_head cannot")):
        with pytest.raises(InputError, match=message):
            training_model.check_training_request(*request, LoraArguments(target_modules=targets), tokenizer)


def test_spaces_around_names_mean_nothing(tiny_model_folder):
    args = LoraArguments(target_modules="q_proj, v_proj", modules_to_save=" embed_tokens, lm_head ")
    training_model.check_modules(args, LlamaForCausalLM.from_pretrained(tiny_model_folder).config)
    model = training_model.attach_adapter(LlamaForCausalLM.from_pretrained(tiny_model_folder), args, 16)
    trained = {name.split(".modules_to_save")[0] for name, part in model.named_parameters() if part.requires_grad}
    assert {"base_model.model.model.embed_tokens", "base_model.model.lm_head"} <= trained


def test_rows_longer_than_the_window_are_said(tiny_model_folder, caplog):
    request = (ModelArguments(model_name_or_path=str(tiny_model_folder)), ExtendArguments(), LoraArguments())
    training_model.check_training_request(*request, load_tokenizer(tiny_model_folder), 512)
    assert not caplog.records
    training_model.check_training_request(*request, load_tokenizer(tiny_model_folder), 4096)
    assert "rows of 4096 tokens, but the model's window has 512" in caplog.text


def test_a_package_that_loading_needs_is_missed_before_data_is_read(tiny_model_folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    request = (ModelArguments(model_name_or_path=str(tiny_model_folder), load_in_kbits=4), ExtendArguments())
    with pytest.raises(InputError, match="needs bitsandbytes"):
        training_model.check_training_request(*request, LoraArguments(), load_tokenizer(tiny_model_folder))


def test_a_model_converted_as_a_whole_runs_without_autocast(tiny_model_folder, tmp_path):
    """DeepSpeed with bf16 converts all weights, here of a float16 base: what borders give must be converted too."""
    LlamaForCausalLM.from_pretrained(tiny_model_folder).half().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    wrapped = training_model.attach_adapter(model, LoraArguments(modules_to_save="embed_tokens,lm_head"), 16)
    assert wrapped.bfloat16()(torch.tensor([[5, 6, 7]])).logits.dtype == torch.bfloat16
