"""What may be trained: a larger tokenizer, a head among targets."""

import pytest
import torch
from transformers import LlamaForCausalLM

from utils.core.arguments import ExtendArguments, LoraArguments, ModelArguments
from utils.core.errors import InputError
from utils.models import training_model
from utils.text.tokenizer import load_tokenizer


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
