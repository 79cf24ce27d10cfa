"""GGUF vocabularies: a tokenizer as llama.cpp reads it, or a refusal where llama.cpp would cut text otherwise.

Vocabularies are held as metadata is: {method of gguf.GGUFWriter: its argument}.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from ..core.errors import InputError
from ..text.pieces import BYTE, CONTROL, NORMAL, USER_DEFINED, is_byte_level
from ..text.prompts import OWN_TEMPLATE, resolve_template, stop_token_ids
from ..text.tokenizer import SentencePieceTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

UNUSED = int(TokenType.UNUSED)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_OF_GPT2 = "GPT-2's own"  # what ByteLevel splits by when no pattern is given
SINGLE_DIGITS = "single digits"
# (patterns a text is split by, one after another; whether whole words are looked up before merging) -> llama.cpp's
# name for such a tokenizer.   Source: llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe.
PRE_TOKENIZERS = {
    ((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), False): "smaug-bpe",
    ((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
    ((SPLIT_OF_GPT2,), False): "gpt-2",
    ((SINGLE_DIGITS, SPLIT_OF_GPT2), False): "smollm",
}


def describe_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    config: dict[str, Any],
    notes: list[str],
    end_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """The tokenizer as GGUFWriter's methods and their arguments, padded to `rows` ids.

    Args: end_ids: tokens that end answers besides the tokenizer's own, by the model's files.
    Raises: InputError for tokenizers that llama.cpp would not imitate, naming why.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        found = _sentencepiece_vocabulary(tokenizer, rows)
    else:
        found = _byte_level_vocabulary(tokenizer, rows, notes)
    ids = tokenizer("a")["input_ids"]  # shows what plain calls add
    specials = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    found["add_add_bos_token"] = specials["bos"] is not None and ids[0] == specials["bos"]
    found["add_add_eos_token"] = specials["eos"] is not None and ids[-1] == specials["eos"]
    for name in ("bos", "eos"):
        if specials[name] is None:  # llama.cpp would take a number of its own
            recorded = config.get(f"{name}_token_id")
            specials[name] = next(iter(recorded), None) if isinstance(recorded, list) else recorded
    ends = [index for index in find_ends(tokenizer, end_ids) if index != specials["eos"]]
    # GGUF has places for three tokens that end an answer: end of text, of turn, of message.
    specials |= zip(("eot", "eom"), ends, strict=False)
    if ends[2:]:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(ends[2:])))
        notes.append(f"a GGUF file has no place for more than three ends of an answer; it does not name {names}")
    found |= {f"add_{name}_token_id": int(value) for name, value in specials.items() if value is not None}
    if tokenizer.chat_template:
        found["add_chat_template"] = resolve_template(OWN_TEMPLATE, tokenizer)
    return found


def find_ends(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> list[int]:
    """The tokens that end an answer, those of tokenizer and chat template before those of the model's files."""
    own = stop_token_ids(None, tokenizer)
    if tokenizer.chat_template:
        try:
            own = stop_token_ids(resolve_template(OWN_TEMPLATE, tokenizer), tokenizer)
        except InputError as error:
            logger.warning("the end-of-turn token was not looked for: %s", error)
    return list(dict.fromkeys([*own, *(index for index in end_ids if index < len(tokenizer))]))


def _sentencepiece_vocabulary(tokenizer: SentencePieceTokenizer, rows: int) -> dict[str, Any]:
    proto = tokenizer.proto
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problems = {
        "is no BPE model": trainer.model_type != trainer.BPE,
        "lacks pieces for all 256 bytes": sum(piece.type == BYTE for piece in proto.pieces) < 256,
        "changes the text before cutting it": normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces,
        "writes spaces behind words": trainer.treat_whitespace_as_suffix,
    }
    if reasons := [reason for reason, applies in problems.items() if applies]:
        raise InputError(
            f"{tokenizer.vocab_file} {' and '.join(reasons)}: llama.cpp would cut text otherwise; train or merge the "
            "vocabulary with train_tokenizer.py and merge_tokenizers.py, whose models have none of this"
        )
    tokens = [piece.piece.encode() for piece in proto.pieces]
    scores = [float(piece.score) for piece in proto.pieces]
    types = [int(piece.type) for piece in proto.pieces]
    tokens, types = _with_added_tokens(tokenizer, tokens, types, rows)
    # llama.cpp's converter gives added tokens -1000 and padding -10000; neither takes part in merging.
    scores += [-10000.0 if kind == UNUSED else -1000.0 for kind in types[len(scores) :]]
    return {
        "add_tokenizer_model": "llama",
        "add_tokenizer_pre": "default",
        "add_token_list": tokens,
        "add_token_scores": scores,
        "add_token_types": types,
        "add_unk_token_id": int(trainer.unk_id),
        "add_add_space_prefix": bool(normalizer.add_dummy_prefix),
    }


def _byte_level_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, notes: list[str]) -> dict[str, Any]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE" or not is_byte_level(tokenizer.backend_tokenizer):
        raise InputError(
            f"{tokenizer.name_or_path}: tokenizer.json alone is enough for byte-level BPE only; put the "
            "tokenizer.model it was made from beside it, whose scores llama.cpp needs"
        )
    pre = pre_tokenizer_name(backend)
    if backend["normalizer"] is not None:
        notes.append("llama.cpp does not normalise text to NFC; text that is not NFC already is cut otherwise")
    vocab = model["vocab"]
    tokens = [b""] * (max(vocab.values()) + 1)
    types = [UNUSED] * len(tokens)
    for token, index in vocab.items():
        tokens[index], types[index] = token.encode(), NORMAL
    tokens, types = _with_added_tokens(tokenizer, tokens, types, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": pre,
        "add_token_list": tokens,
        "add_token_types": types,
        "add_token_merges": merges,
    }


def _with_added_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: list[bytes], types: list[int], rows: int
) -> tuple[list[bytes], list[int]]:
    """Tokens and types with the added tokens in their places, and a named unused token for every other id."""
    padding = rows - len(tokens)
    tokens, types = tokens + [b""] * padding, types + [UNUSED] * padding
    if (last := max(tokenizer.added_tokens_decoder, default=0)) >= rows:
        raise InputError(f"the tokenizer's id {last} has no row in the embeddings ({rows} rows); one of them is wrong")
    for index, token in tokenizer.added_tokens_decoder.items():
        tokens[index] = token.content.encode()
        if not token.special:
            types[index] = USER_DEFINED  # found in ordinary text, there as here
        elif types[index] in (NORMAL, UNUSED):
            types[index] = CONTROL
    return [token or f"[PAD{index}]".encode() for index, token in enumerate(tokens)], types


def pre_tokenizer_name(backend: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer.json splits text.

    Raises: InputError with the split pattern for one that has no name there.
    """
    pre = backend["pre_tokenizer"] or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    patterns = []
    for step in steps:
        isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        if step.get("type") == "Split" and isolated and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        elif step.get("type") == "Digits" and step["individual_digits"]:
            patterns.append(SINGLE_DIGITS)
        elif step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [SPLIT_OF_GPT2] if step["use_regex"] else []
        else:
            patterns.append(json.dumps(step, ensure_ascii=False))
    model = backend["model"]
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]
    normalizer = (backend["normalizer"] or {}).get("type")
    name = PRE_TOKENIZERS.get((tuple(patterns), bool(model.get("ignore_merges"))))
    if name is None or affixes or normalizer not in (None, "NFC"):
        extra = "".join(f", {key} {model[key]!r}" for key in (*affixes, "ignore_merges") if model.get(key))
        raise InputError(
            f"tokenizer.json splits text in a way that has no name in llama.cpp: {' then '.join(patterns)}{extra}, "
            f"normaliser {normalizer}; a guess would give wrong tokens. Known: {', '.join(PRE_TOKENIZERS.values())}"
        )
    return name
