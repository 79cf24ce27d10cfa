"""Small models with random weights, and folders of them."""

import copy
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import load_tokenizer, save_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2}
# {model_type: settings} of mixtures whose experts can be linear layers, as wide as no other layer.
_QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _QWEN_MOE | {"norm_topk_prob": False, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _QWEN_MOE | {"norm_topk_prob": True, "head_dim": 16},
}


def tiny_llama(vocabulary: int, seed: int = 0, scale: float = 1.0, **changes) -> LlamaForCausalLM:
    """A 2-layer, width-32 Llama, or one of other sizes.

    Args: scale: times the library's random weights, which are so small that logits are nearly equal.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **(SIZES | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def save_llama(folder: Path, tokenizer, **changes) -> Path:
    """tiny_llama with a tokenizer, as a folder."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_llama(len(tokenizer), **(ends | changes)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def model_of(config, dtype=torch.float32, scale: float = 0.2):
    """A model of any architecture whose logits differ: biases are 0 and norms 1 otherwise."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.to(dtype)


def with_template(model: Path, folder: Path, template: str = "alpaca-2") -> Path:
    """A copy of a model folder whose tokenizer has a chat template."""
    shutil.copytree(model, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    save_tokenizer(tokenizer, folder)
    return folder


def save_scripted_llama(folder: Path, tokenizer, script: dict[int, int], **config) -> Path:
    """A Llama whose likeliest next token depends on the last one alone, as `script` says; with its tokenizer."""
    size = -(-len(tokenizer) // 32) * 32
    model = tiny_llama(size, hidden_size=size, intermediate_size=32, num_hidden_layers=1, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        model.get_input_embeddings().weight.copy_(torch.eye(size))
        for last, following in script.items():
            model.lm_head.weight[following, last] = 1.0
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder
