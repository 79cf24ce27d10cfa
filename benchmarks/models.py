"""Models with random weights: time and memory do not depend on what a model has learnt."""

from __future__ import annotations

from typing import Any


def random_llama(vocabulary: Any, *, hidden_size: int, seed: int | None = 0, **settings: Any) -> Any:
    """A LlamaForCausalLM in float32; equal seeds give equal weights.

    Args:
        vocabulary: a number of rows, or a tokenizer, whose BOS and EOS the config then has.
        seed: None: torch's generator as it stands.
        settings: of LlamaConfig; by default heads have 64 numbers each, and the MLP is 8/3 as wide as the model.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = {
        "intermediate_size": hidden_size * 8 // 3 // 16 * 16,
        "num_attention_heads": max(1, hidden_size // 64),
    }
    if isinstance(vocabulary, int):
        defaults["vocab_size"] = vocabulary
    else:
        defaults["vocab_size"] = len(vocabulary)
        defaults |= {name: getattr(vocabulary, name) for name in ("bos_token_id", "eos_token_id")}
    if seed is not None:
        torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**defaults | {"hidden_size": hidden_size} | settings))
