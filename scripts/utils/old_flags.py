"""Old flags: the spellings of the forerunners and of older libraries, and what they mean today.

docs/migrating.md lists them all; a test compares it with the tables here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)

RENAMED = {
    "base_model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "model": "model_name_or_path",
    "tokenizer_path": "tokenizer_name_or_path",
    "tokenizer_name": "tokenizer_name_or_path",
    "peft_path": "adapter_name_or_path",
    "lora_model": "adapter_name_or_path",
    "dataset_dir": "train_data",
    "train_file": "train_data",
    "validation_file": "validation_data",
    "validation_split_percentage": "validation_split",
    "trainable": "target_modules",
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "force_resize_embeddings": "resize_embeddings",
    "llama_tokenizer_dir": "base_tokenizer",
    "include_tokens_per_second": "include_num_input_tokens_seen",
}
# Flags with a value or a switch that no longer do anything, and why.
DROPPED = {
    "save_safetensors": "weights are always saved as safetensors",
    "overwrite_cache": "caches are keyed by content, so a stale one is never used",
    "use_fast_tokenizer": "one exact tokenizer is loaded",
    "model_type": "the config says it",
    "model_revision": "pass a local folder of that revision",
    "use_auth_token": "log in with the hub's own command line",
    "cache_dir": "set HF_HOME",
    "streaming": "data is always streamed into a memory-mapped cache",
    "keep_linebreaks": "use --document_separator for documents of several lines",
    "dataset_config_name": "local files are read",
    "logging_dir": "set the tracker's own variable",
    "debug_mode": "use --max_train_samples",
    "fp16_full_eval": "evaluation runs in the training precision",
    "half_precision_backend": "torch's own autocast is used",
}
REPLACED_SWITCHES = {
    "use_flash_attention_2": ["--attn_implementation", "flash_attention_2"],
    "group_by_length": ["--train_sampling_strategy", "group_by_length"],
}
FALSE_WORDS = ("false", "no", "0", "off")


def translate_old_flags(argv: Sequence[str], known: set[str], documented: Sequence[str] = ()) -> list[str]:
    """Give old flags their modern spelling, with one warning that lists all changes.

    Args:
        known: the names the script's own parser has; those are never touched.
        documented: old names this script documents as its own; they change without a warning.
    """
    result: list[str] = []
    changes: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, inline = token.removeprefix("--").partition("=")
        if not token.startswith("--") or name in known:
            result.append(token)
            continue
        # A value follows unless the next token is another flag (negative numbers are values).
        takes = not equals and bool(tokens) and not tokens[0].startswith("--")
        if name in REPLACED_SWITCHES and REPLACED_SWITCHES[name][0][2:] in known:
            value = inline if equals else (tokens.pop(0) if takes else "True")
            if value.lower() not in FALSE_WORDS:
                result += REPLACED_SWITCHES[name]
            changes.append(f"--{name} is now {' '.join(REPLACED_SWITCHES[name])}")
        elif name in DROPPED:
            if takes:
                tokens.pop(0)
            changes.append(f"--{name} has no effect: {DROPPED[name]}")
        elif RENAMED.get(name) in known:
            result.append(f"--{RENAMED[name]}{equals}{inline}")
            if name not in documented:
                changes.append(f"--{name} is now --{RENAMED[name]}")
        else:
            result.append(token)
    if changes:
        logger.warning("old flags accepted, see docs/migrating.md: %s", "; ".join(changes))
    return result
