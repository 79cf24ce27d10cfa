"""Names: how files and tensors of models and adapters are called."""

from __future__ import annotations

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in order of preference
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"  # the head of a reward model, without a bias


CLASSIFIER = "ForSequenceClassification"  # how transformers names the classes
