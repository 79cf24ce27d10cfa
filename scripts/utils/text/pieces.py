"""What the pieces of a tokenizer file stand for, and the exact tokenizer.json twin of a sentencepiece model."""

from __future__ import annotations

import functools
import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from ..core.errors import InputError

SPACE = "\u2581"  # how sentencepiece writes a space inside pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type

# Sentences on which the segmentation of other engines is compared where no exact tokenizer.json exists.
SAMPLE = (
    "人工智能是计算机科学的一个分支，它企图了解智能的实质。",
    "中华人民共和国的首都是北京，最大的城市是上海。",
    "请你用简单的语言解释一下什么是机器学习，并且举一个例子。",
    "维生素对人体健康非常重要，我们应该多吃新鲜的蔬菜和水果。",
    "随着科学技术的发展，越来越多的人开始使用互联网购物。",
    "他说：“今天天气真好，我们一起去公园散步吧！”",
    "为了减少污染、保护环境，我们可以选择乘坐公共交通工具。",
    "这个问题的答案取决于具体情况，需要进一步分析。",
    "北京大学和清华大学都是中国著名的高等学府。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "下面是一个Python函数，它可以计算两个数字的最大公约数。",
    "第一步，打开电脑；第二步，输入密码；第三步，连接网络。",
    "The quick brown fox jumps over the lazy dog.",
    "In 2023, the company reported revenue of $1.5 billion.",
    "Please write a short story about a robot that learns to paint.",
    "我喜欢 machine learning，尤其是 deep learning 的应用。",
)

# ---------------------------------------------------------------- sentencepiece models


def read_sentencepiece_model(path: str | Path) -> Any:
    """Parse a sentencepiece model file into a ModelProto. Raises: InputError if it is absent or not one."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"sentencepiece model not found: {path}")
    try:
        proto = parse_sentencepiece_model(path.read_bytes())
    except DecodeError:
        raise InputError(f"{path}: not a sentencepiece model, or truncated; copy it again") from None
    if not proto.pieces or not proto.HasField("trainer_spec"):
        raise InputError(f"{path}: a sentencepiece model without pieces or settings; copy it again")
    return proto


def parse_sentencepiece_model(model: bytes) -> Any:
    """The ModelProto in the bytes of a model file."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return proto


def processor_without_prefix(proto: Any) -> sentencepiece.SentencePieceProcessor:
    """A processor of `proto` that puts no space before the text and keeps every space of it."""
    bare = parse_sentencepiece_model(proto.SerializeToString())
    bare.normalizer_spec.add_dummy_prefix = False
    bare.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())


def piece_surface(piece: str, kind: int) -> bytes:
    """The UTF-8 bytes a sentencepiece piece of type `kind` stands for."""
    if kind == BYTE:
        return bytes([int(piece[3:5], 16)])  # "<0x0A>"
    return b"" if kind in (CONTROL, UNKNOWN) else piece.replace(SPACE, " ").encode()


# ---------------------------------------------------------------- byte-level tokenizers


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that stands for each byte.   Source: openai/gpt-2, src/encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


@functools.cache
def _byte_characters() -> dict[int, str]:
    return {byte: character for character, byte in byte_alphabet().items()}


def to_byte_characters(surface: bytes) -> str:
    """How a byte-level tokenizer writes these bytes."""
    return "".join(map(_byte_characters().__getitem__, surface))


def is_byte_level(backend: Tokenizer) -> bool:
    """Whether tokens are strings of byte characters (GPT-2's alphabet), as in Llama-3 and Qwen."""
    return "ByteLevel" in repr(backend.decoder)


def token_surface(token: str, byte_level: bool) -> bytes:
    """The UTF-8 bytes a token of a tokenizer.json stands for."""
    if not byte_level:
        return piece_surface(token, BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL)
    alphabet = byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(map(alphabet.__getitem__, token))
    return token.encode()  # an added token, kept as it is written


# ---------------------------------------------------------------- sentencepiece model -> tokenizer.json


def inexact_reason(proto: Any, added_ids: Collection[int] = ()) -> str | None:
    """Why no tokenizer.json can segment as this sentencepiece model does; None if one can.

    Between pieces of one score sentencepiece takes the leftmost, a merge list the first in the list. Llama-2's runs of
    spaces, tied at the very end, are let through: no text was found that they cut otherwise.
    """
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type != trainer.BPE:
        return "it is not a BPE model"
    if not trainer.byte_fallback:
        return "it has no byte fallback"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or trainer.treat_whitespace_as_suffix:
        return "it changes the text before cutting it"
    if any(piece.type == USER_DEFINED for piece in proto.pieces):
        return "it has user-defined pieces"
    beyond = sorted(index for index in added_ids if index >= len(proto.pieces))
    if beyond != list(range(len(proto.pieces), len(proto.pieces) + len(beyond))):
        return "its added tokens leave gaps between ids"
    mergeable = (piece for piece in proto.pieces if piece.type == NORMAL and len(piece.piece) > 1)
    scores = Counter(piece.score for piece in mergeable if set(piece.piece) != {SPACE})
    if tied := sum(count for count in scores.values() if count > 1):
        return f"{tied} of its pieces share their score with another"
    if orphans := orphaned_pieces(proto):
        return f"{len(orphans)} of its pieces hold a character that has no piece of its own"
    return None


def orphaned_pieces(proto: Any) -> list[str]:
    """Pieces with a character that is no piece: sentencepiece merges from characters, merge lists from pieces."""
    pieces = [piece.piece for piece in proto.pieces if piece.type == NORMAL]
    known = set(pieces)
    return [piece for piece in pieces if not known.issuperset(piece)]


def inexact_rate(model: bytes) -> float:
    """Share of SAMPLE's lines that transformers' LlamaTokenizer cuts unlike sentencepiece, given one model file."""
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model)
        other = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
    exact = sentencepiece.SentencePieceProcessor(model_proto=model).encode(list(SAMPLE))
    theirs = [other(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in SAMPLE]
    return sum(a != b for a, b in zip(exact, theirs, strict=True)) / len(SAMPLE)


def build_tokenizer_json(
    proto: Any, added: Mapping[int, AddedToken], bos: str | None = None, eos: str | None = None
) -> Tokenizer:
    """The tokenizers-library twin of a sentencepiece BPE model that `inexact_reason` has nothing against.

    Args:
        added: added tokens by id; those beyond the model's pieces follow them.
        bos, eos: tokens that plain calls put around a text.
    """
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    merges = sentencepiece_merges(proto)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", SPACE)
    if proto.normalizer_spec.add_dummy_prefix:
        # No Metaspace pre-tokenizer: pieces may hold spaces, and merges must see across them.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    controls = (CONTROL, UNKNOWN)
    tokens = {i: AddedToken(p.piece, special=True) for i, p in enumerate(proto.pieces) if p.type in controls}
    tokens |= added
    # Ids beyond the pieces are given in order, so kinds are added as they come.
    for is_special, group in itertools.groupby(sorted(tokens), key=lambda index: tokens[index].special):
        add = backend.add_special_tokens if is_special else backend.add_tokens
        add([_as_written(tokens[index]) for index in group])
    single = " ".join(filter(None, [bos, "$A", eos]))
    pair = f"{single} {single.replace('$A', '$B')}"
    ends = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    return backend


def _as_written(token: AddedToken) -> AddedToken:
    """The token, found in text before that is normalised: sentencepiece's way to write spaces would be part of it."""
    flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "special")}
    return AddedToken(token.content, normalized=False, **flags)


def sentencepiece_merges(proto: Any) -> list[tuple[str, str]]:
    """All two-way splits of the pieces into pieces: the highest score of the whole first, then the lowest id."""
    normal = [(-piece.score, index, piece.piece) for index, piece in enumerate(proto.pieces) if piece.type == NORMAL]
    pieces = {piece for _, _, piece in normal}
    return [
        (whole[:cut], whole[cut:])
        for _, _, whole in sorted(normal)
        for cut in range(1, len(whole))
        if whole[:cut] in pieces and whole[cut:] in pieces
    ]
