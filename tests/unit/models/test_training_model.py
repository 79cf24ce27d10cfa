"""What may be trained: a larger tokenizer, a head among targets."""

import pytest
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
