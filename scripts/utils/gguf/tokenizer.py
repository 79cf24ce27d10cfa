"""The tokenizer in a GGUF file, as load_tokenizer gives it: the way back from vocabulary.py."""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ..core.errors import InputError
from ..core.files import write_json
from ..text.pieces import CONTROL, NORMAL, SAMPLE, UNKNOWN, USER_DEFINED
from ..text.tokenizer import (
    CONFIG_FILE,
    SENTENCEPIECE_FILE,
    TOKENIZERS_FILE,
    SentencePieceTokenizer,
    encode_texts,
    load_tokenizer,
)
from .llamacpp import open_model, tokenize
from .vocabulary import PRE_TOKENIZERS, SINGLE_DIGITS, SPLIT_OF_GPT2, UNUSED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def load_gguf_tokenizer(path: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that the file holds, with its chat template.

    Args: metadata: what read_metadata found in the file.
    Raises: InputError for a kind of tokenizer that is not known here.
    """
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(ggml.get("add_bos_token", "llama" in (ggml.get("model"), ggml.get("pre", "")[:5]))),
        "add_eos_token": bool(ggml.get("add_eos_token", False)),
    }
    template = metadata.get("tokenizer.chat_template") or ""
    if template:
        settings["chat_template"] = template
    for name, key in _SPECIALS.items():
        index = ggml.get(f"{key}_token_id", -1)
        if 0 <= index < len(ggml["tokens"]):
            settings[name] = ggml["tokens"][index]
    if not settings["add_bos_token"] and "bos_token" not in template:
        settings["bos_token"] = None  # files name one also where the model has none
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if ggml.get("model") == "llama":
            (folder / SENTENCEPIECE_FILE).write_bytes(_sentencepiece_model(ggml))
            settings["added_tokens_decoder"] = {
                str(index): {"content": token, "normalized": False, "special": False}
                for index, (token, kind) in enumerate(zip(ggml["tokens"], ggml["token_type"], strict=True))
                if kind == USER_DEFINED
            }
        elif ggml.get("model") == "gpt2":
            _byte_level_tokenizer(path, ggml).save(str(folder / TOKENIZERS_FILE))
        else:
            raise InputError(_advice(path, f"its vocabulary is of the kind {ggml.get('model')}"))
        write_json(folder / CONFIG_FILE, settings)
        return load_tokenizer(folder)


def _advice(path: Path, reason: str) -> str:
    return f"{path.name}: {reason}, which cannot be read here; pass the model's tokenizer folder as --tokenizer_path"


def _sentencepiece_model(ggml: dict[str, Any]) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto()
    unknown = ggml.get("unknown_token_id", 0)
    for index, (piece, score, kind) in enumerate(zip(ggml["tokens"], ggml["scores"], ggml["token_type"], strict=True)):
        # One piece is the unknown one; llama.cpp's converter has called padding so too. Added words are no pieces.
        kind = UNKNOWN if index == unknown else UNUSED if kind in (UNKNOWN, USER_DEFINED) else kind or NORMAL
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(proto.pieces)
    trainer.unk_id = unknown
    trainer.bos_id, trainer.eos_id = ggml.get("bos_token_id", 1), ggml.get("eos_token_id", 2)
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = bool(ggml.get("add_space_prefix", True))
    return bytes(proto.SerializeToString())


def _byte_level_tokenizer(path: Path, ggml: dict[str, Any]) -> Tokenizer:
    forms = {name: form for form, name in PRE_TOKENIZERS.items()}
    if ggml.get("pre") not in forms:
        raise InputError(_advice(path, f"it cuts text the way {ggml.get('pre', 'default')}"))
    patterns, ignore_merges = forms[ggml["pre"]]
    vocab = {token: index for index, token in enumerate(ggml["tokens"])}
    merges = [tuple(pair.split(" ", 1)) for pair in ggml["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    steps: list[Any] = []
    for pattern in patterns:
        if pattern == SINGLE_DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif pattern != SPLIT_OF_GPT2:
            steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPLIT_OF_GPT2 in patterns))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        found = [token for token, other in zip(ggml["tokens"], ggml["token_type"], strict=True) if other == kind]
        add([AddedToken(token, normalized=False) for token in found])
    return backend


def check_same_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: InputError if llama.cpp, given the file's vocabulary, cuts text otherwise than the tokenizer."""
    # Of the others llama.cpp takes those with well-known names, such as <|im_end|>, for special in text of its own.
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:16]
    texts = [*SAMPLE, *(f"你好{token}world" for token in specials)]
    if different := token_differences(path, tokenizer, texts):
        raise InputError(
            f"{path.name}: the tokenizer in {tokenizer.name_or_path} cuts {len(different)} of {len(texts)} texts "
            f"otherwise than the file's vocabulary, first {different[0][:40]!r}; pass the tokenizer folder of the "
            "exported model as --tokenizer_path"
        )


def token_differences(path: Path, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """The texts that llama.cpp, given the file's vocabulary, cuts otherwise than the tokenizer.

    Texts are normalised first where the tokenizer does that: llama.cpp has no such step.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.backend_tokenizer.normalizer is not None:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    expected = encode_texts(tokenizer, list(texts))
    with open_model(path, 1) as model:
        return [text for text, ids in zip(texts, expected, strict=True) if tokenize(model, text) != ids]
