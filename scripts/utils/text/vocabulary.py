"""Extending a vocabulary: merging sentencepiece models, growing byte-level BPE, and keeping what is reachable.

An added piece is useful only if text can be cut into it, and harmless only if the base's own language is still cut as
before. Both are checked, and what fails is dropped until nothing fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.files import write_json
from .pieces import (
    CONTROL,
    NORMAL,
    SPACE,
    USER_DEFINED,
    is_byte_level,
    orphaned_pieces,
    parse_sentencepiece_model,
    piece_surface,
    processor_without_prefix,
    token_surface,
)
from .tokenizer import (
    CONFIG_FILE,
    SENTENCEPIECE_FILE,
    TOKENIZERS_FILE,
    SentencePieceTokenizer,
    added_settings,
    encode_texts,
    load_tokenizer,
    save_tokenizer,
    saved_settings,
)

# Scores are ranks held in float32, whose whole numbers end here. Llama-2 keeps 16 runs of spaces at -1e9, below this.
LOWEST_RANK = -(2.0**24)
ASCII_WORD = re.compile(rb"[A-Za-z0-9]")
# Any stretch of bytes that text of ASCII, Latin letters (to U+024F) and general punctuation (U+2000-206F) can hold,
# whole characters or not: a piece outside it cannot occur in a text of the base language.
LATIN_TEXT = re.compile(
    rb"[\x80-\xbf]{0,2}(?:[\x00-\x7f]|[\xc2-\xc9][\x80-\xbf]|\xe2[\x80\x81][\x80-\xbf])*(?:[\xc2-\xc9]|\xe2[\x80\x81]?)?"
)
MAX_MERGED_TOKENS = 16  # base tokens in one new byte-level token; longer ones are boilerplate of the corpus
SEPARATOR = "\x01"  # between words of base ids; ids are written as characters from FIRST_CHARACTER on
FIRST_CHARACTER, SURROGATES = 0x100, range(0xD800, 0xE000)


@dataclass
class Selection:
    """Which candidates may enter a vocabulary, and how many were left out for which reason."""

    keep_unreachable: bool = False
    keep_base_language_pieces: bool = False
    max_new_tokens: int | None = None
    base_language_sample: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def touches_base_language(self, surface: bytes, known: bool = True) -> bool:
        """Whether a piece could change how the base's language is cut; `known`: the base knows its characters."""
        return not self.keep_base_language_pieces and is_base_language(surface, known)


def is_base_language(surface: bytes, known: bool = True) -> bool:
    """Whether bytes hold ASCII letters or digits, or could be part of text in Latin script and punctuation alone.

    A base without a piece for a character beyond ASCII, such as a curly quote, hardly met it: with `known` False,
    Latin text is not counted as its own.
    """
    return ASCII_WORD.search(surface) is not None or (known and LATIN_TEXT.fullmatch(surface) is not None)


def drop_until_stable(
    candidates: list[str], selection: Selection, failures: Callable[[list[str]], dict[str, set[str]]]
) -> list[str]:
    """Drop failing candidates until the first `max_new_tokens` that remain all pass.

    Args:
        failures: chosen candidates -> those that fail, by reason. Dropping some may make others fail: hence the loop.
    """
    while True:
        chosen = candidates[: selection.max_new_tokens]
        failing: set[str] = set()
        for reason, found in failures(chosen).items():
            new = found - failing
            selection.counts[reason] = selection.counts.get(reason, 0) + len(new)
            failing |= new
        if not failing:
            selection.counts["beyond_max_new_tokens"] = len(candidates) - len(chosen)
            selection.counts["added"] = len(chosen)
            return chosen
        candidates = [candidate for candidate in candidates if candidate not in failing]


# ---------------------------------------------------------------- sentencepiece


def merge_sentencepiece(base: Any, extra: Any, selection: Selection) -> Any:
    """A copy of the ModelProto `base` with the pieces of `extra` it lacks, in their order, ranked below all its own.

    Scores fall strictly from the lowest ordinary score of the base on, so that sentencepiece, llama.cpp (by score) and
    merge lists (by rank) cut text alike, and base pieces always merge first.
    Raises: InputError if the base is no BPE model.
    """
    if base.trainer_spec.model_type != base.trainer_spec.BPE:
        raise InputError("the base's sentencepiece model is not BPE; merging needs a BPE base (Llama, Mistral)")
    known = {piece.piece for piece in base.pieces}
    text_pieces = [piece.piece for piece in extra.pieces if piece.type in (NORMAL, USER_DEFINED)]
    candidates = list(dict.fromkeys(piece for piece in text_pieces if piece not in known))
    selection.counts["candidates"] = len(text_pieces)
    selection.counts["already_in_base"] = len(text_pieces) - len(candidates)
    latin = known | {chr(code) for code in range(128)}
    kept = [
        piece
        for piece in candidates
        if not selection.touches_base_language(piece_surface(piece, NORMAL), latin.issuperset(piece))
    ]
    selection.counts["base_language"] = len(candidates) - len(kept)
    if selection.max_new_tokens is not None:
        kept = characters_first(kept)

    def failures(chosen: list[str]) -> dict[str, set[str]]:
        merged = append_pieces(base, chosen)
        found = {}
        if not selection.keep_unreachable:
            found["unreachable"] = set(unreachable_pieces(merged, len(base.pieces)))
        if selection.base_language_sample and not selection.keep_base_language_pieces:
            found["in_base_language_sample"] = _pieces_in(merged, len(base.pieces), selection.base_language_sample)
        return found

    return append_pieces(base, drop_until_stable(kept, selection, failures))


def characters_first(pieces: list[str]) -> list[str]:
    """The same pieces, each after its characters: BPE models list those last, and a cut would leave orphans."""
    offered = set(pieces)
    return list(dict.fromkeys(part for piece in pieces for part in (*piece, piece) if part in offered))


def append_pieces(base: Any, pieces: Sequence[str], kind: int = NORMAL) -> Any:
    """A copy of a ModelProto with `pieces` appended, each ranked one below the last.

    Raises: InputError if the scores of the base leave no room.
    """
    merged = parse_sentencepiece_model(base.SerializeToString())
    lowest = min((p.score for p in merged.pieces if p.type == NORMAL and p.score > LOWEST_RANK), default=0.0)
    if lowest - len(pieces) <= LOWEST_RANK:
        raise InputError(f"the base's scores end at {lowest:.0f}: no room for {len(pieces)} pieces in float32")
    for rank, piece in enumerate(pieces, 1):
        merged.pieces.add(piece=piece, score=lowest - rank, type=kind)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    return merged


def unreachable_pieces(proto: Any, first: int = 0) -> list[str]:
    """The pieces from id `first` on whose own text is not cut into that one piece (without a dummy prefix).

    Pieces with a character that has no piece count too: sentencepiece reaches them, engines with merge lists do not.
    """
    pieces = [(index, piece) for index, piece in enumerate(proto.pieces) if index >= first and piece.type == NORMAL]
    encoded = processor_without_prefix(proto).encode([piece.piece.replace(SPACE, " ") for _, piece in pieces])
    orphans = set(orphaned_pieces(proto))
    return [
        piece.piece
        for (index, piece), ids in zip(pieces, encoded, strict=True)
        if ids != [index] or piece.piece in orphans
    ]


def _pieces_in(proto: Any, first: int, texts: list[str]) -> set[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    used = {index for ids in processor.encode(texts) for index in ids if index >= first}
    return {proto.pieces[index].piece for index in used}


# ---------------------------------------------------------------- byte-level BPE


def extend_byte_level(base: Tokenizer, batches: Iterable[list[str]], num_new: int, selection: Selection) -> Tokenizer:
    """A byte-level BPE tokenizer with `num_new` more tokens, whose merges continue the base's on a corpus.

    The corpus is cut by the base, and BPE training goes on from there: base ids and merges stay as they are, new
    merges rank below them. Fewer tokens are added where no more pairs of the corpus occur twice.
    Raises: InputError if the base is not byte-level, or nothing in the corpus can be merged.
    """
    if not is_byte_level(base) or not isinstance(base.model, models.BPE):
        raise InputError(
            "the base tokenizer is neither a sentencepiece model nor byte-level BPE; need tokenizer.model (Llama-2, "
            "Mistral, Mixtral) or a byte-level tokenizer.json (Llama-3, Qwen)"
        )
    names = dict(base.get_vocab(with_added_tokens=True))
    by_id = {index: token for token, index in names.items()}
    words, alphabet = _words_of_ids(base, batches, by_id, selection)
    if not alphabet:
        raise InputError(
            "the corpus has no text of a new language; pass other --input, or --keep_base_language_pieces"
        )
    # More than asked: two merges may make one token, and some candidates will be dropped.
    learned = _train_merges(words, len(alphabet) + num_new + num_new // 4 + 64)
    merges: dict[str, list[tuple[str, str]]] = {}  # by the token they make; some make tokens the base has already
    for left, right in learned:
        pair = (_token_of(left, by_id), _token_of(right, by_id))
        merges.setdefault("".join(pair), []).append(pair)
    learned_tokens = merges.keys() - names.keys()
    merges = {whole: pairs for whole, pairs in merges.items() if not _touches(whole, selection)}
    candidates = [token for token in merges if token not in names]
    selection.counts["candidates"] = len(learned_tokens)
    selection.counts["base_language"] = len(learned_tokens) - len(candidates)
    selection.max_new_tokens = min(num_new, selection.max_new_tokens or num_new)

    def failures(chosen: list[str]) -> dict[str, set[str]]:
        extended = _with_tokens(base, names, chosen, merges)
        found = {}
        if not selection.keep_unreachable:
            found["unreachable"] = unreachable_tokens(extended, chosen)
        if selection.base_language_sample and not selection.keep_base_language_pieces:
            encodings = extended.encode_batch_fast(selection.base_language_sample, add_special_tokens=False)
            used = {index for encoding in encodings for index in encoding.ids if index not in by_id}
            found["in_base_language_sample"] = {extended.id_to_token(index) or "" for index in used}
        return found

    return _with_tokens(base, names, drop_until_stable(candidates, selection, failures), merges)


def _touches(token: str, selection: Selection) -> bool:
    return selection.touches_base_language(token_surface(token, True))


def _words_of_ids(
    base: Tokenizer, batches: Iterable[list[str]], by_id: dict[int, str], selection: Selection
) -> tuple[list[str], set[str]]:
    """The corpus as strings of base ids, a character each, with a separator after each pre-tokenized word.

    Words that hold ASCII letters or digits, or nothing but Latin text, are left out: merges learned from them would
    cut the base's language anew.
    """
    size = max(by_id) + 1
    holds_ascii: np.ndarray = np.zeros(size, bool)
    holds_other: np.ndarray = np.zeros(size, bool)
    for index, token in by_id.items():
        surface = token_surface(token, True)
        holds_ascii[index] = ASCII_WORD.search(surface) is not None
        holds_other[index] = LATIN_TEXT.fullmatch(surface) is None
    keep_all = selection.keep_base_language_pieces
    base.no_truncation()
    base.no_padding()
    base.encode_special_tokens = True
    texts: list[str] = []
    for batch in batches:
        for encoding in base.encode_batch(batch, add_special_tokens=False):
            ids = np.array(encoding.ids, np.uint32)
            if not len(ids):
                continue
            starts = np.flatnonzero(np.diff(np.array(encoding.word_ids, np.int64), prepend=-1))
            lengths = np.diff(starts, append=len(ids))
            foreign = np.logical_or.reduceat(holds_other[ids], starts)
            usable = foreign & ~np.logical_or.reduceat(holds_ascii[ids], starts) | keep_all
            points = np.where(np.repeat(usable, lengths), _to_code_points(ids), ord(SEPARATOR))
            separated: np.ndarray = np.insert(points, starts[1:], ord(SEPARATOR))
            texts.append(separated.astype("<u4").tobytes().decode("utf-32-le"))
    alphabet = set().union(*map(set, texts)) - {SEPARATOR} if texts else set()
    return texts, alphabet


def _to_code_points(ids: np.ndarray) -> np.ndarray:
    points: np.ndarray = ids + FIRST_CHARACTER
    return np.where(points >= SURROGATES.start, points + len(SURROGATES), points)


def _token_of(text: str, by_id: dict[int, str]) -> str:
    """The byte-level token that a string of id characters stands for."""
    points = (ord(character) for character in text)
    ids = (point - len(SURROGATES) if point >= SURROGATES.stop else point for point in points)
    return "".join(by_id[index - FIRST_CHARACTER] for index in ids)


def _train_merges(words: list[str], vocab_size: int) -> list[tuple[str, str]]:
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Split(SEPARATOR, "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, max_token_length=MAX_MERGED_TOKENS, show_progress=False
    )
    trainee.train_from_iterator(words, trainer)
    return [(left, right) for left, right in json.loads(trainee.to_str())["model"]["merges"]]


def _with_tokens(
    base: Tokenizer, names: dict[str, int], tokens: list[str], merges: dict[str, list[tuple[str, str]]]
) -> Tokenizer:
    """The base with `tokens` and the learned merges whose parts and whole are all there."""
    content = json.loads(base.to_str())
    # Added tokens move into the model's own list, or loading the file would number them anew, after the new tokens.
    vocab = names | {token: index for index, token in enumerate(tokens, max(names.values()) + 1)}
    content["model"]["vocab"] = vocab
    content["model"]["merges"] += [
        list(pair) for whole, pairs in merges.items() if whole in vocab for pair in pairs if set(pair) <= vocab.keys()
    ]
    return Tokenizer.from_str(json.dumps(content))


def unreachable_tokens(backend: Tokenizer, tokens: Iterable[str]) -> set[str]:
    """The byte-level tokens that merging their own bytes does not lead to."""
    content = json.loads(backend.to_str())
    content["model"]["ignore_merges"] = False  # with it, whole words would be found without any merge
    model = Tokenizer.from_str(json.dumps(content)).model
    return {token for token in tokens if [found.value for found in model.tokenize(token)] != [token]}


# ---------------------------------------------------------------- writing and checking the result


def save_extended(
    base: PreTrainedTokenizerBase,
    extended: Any,
    folder: Path,
    *,
    pad_token: str | None = None,
    chat_template: str | None = None,
    pad_to_multiple_of: int = 1,
) -> PreTrainedTokenizerBase:
    """Write an extended ModelProto or tokenizers.Tokenizer with the base's settings, and load it again.

    Args:
        pad_token: appended as a control token where the vocabulary lacks it.
        pad_to_multiple_of: recorded as `embedding_rows`; the tokenizer itself gets no made-up pieces.
    """
    settings = saved_settings(base)
    if pad_token:
        settings["pad_token"] = pad_token
    if isinstance(extended, Tokenizer):
        _write_backend(extended, pad_token, folder)
    else:
        if pad_token and pad_token not in {piece.piece for piece in extended.pieces}:
            extended = append_pieces(extended, [pad_token], CONTROL)
            extended.trainer_spec.pad_id, extended.trainer_spec.pad_piece = len(extended.pieces) - 1, pad_token
        (folder / SENTENCEPIECE_FILE).write_bytes(extended.SerializeToString())
        # Words that the base adds keep their places as control pieces, which no text is cut into, and stay words.
        added = added_settings(base)
        settings["added_tokens_decoder"] = {index: token for index, token in added.items() if not token["special"]}
    write_json(folder / CONFIG_FILE, settings)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = chat_template or base.chat_template
    tokenizer.init_kwargs["embedding_rows"] = -(-len(tokenizer) // pad_to_multiple_of) * pad_to_multiple_of
    save_tokenizer(tokenizer, folder)
    return load_tokenizer(folder)


def _write_backend(backend: Tokenizer, pad_token: str | None, folder: Path) -> None:
    content = json.loads(backend.to_str())
    vocab = content["model"]["vocab"]
    if pad_token and pad_token not in vocab:
        vocab[pad_token] = max(vocab.values()) + 1
    backend = Tokenizer.from_str(json.dumps(content))
    if pad_token:
        backend.add_special_tokens([pad_token])
    backend.save(str(folder / TOKENIZERS_FILE))


def base_with_added_tokens(tokenizer: SentencePieceTokenizer) -> Any:
    """The base's ModelProto with the tokens its folder adds beyond the model file as control pieces, ids unchanged.

    Raises: InputError if those ids leave a gap.
    """
    proto = tokenizer.proto
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if i >= len(proto.pieces)}
    expected = list(range(len(proto.pieces), len(proto.pieces) + len(added)))
    if sorted(added) != expected:
        raise InputError(
            f"{tokenizer.name_or_path}: added tokens have the ids {sorted(added)}, need {expected} to go on after them"
        )
    return append_pieces(proto, [added[index] for index in expected], CONTROL) if added else proto


def count_disagreements(folder: Path, texts: list[str]) -> dict[str, int]:
    """How many of `texts` each engine cuts unlike the tokenizer's own model file, and how many do not return whole."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(folder)
    expected = encode_texts(tokenizer, texts)
    found = {"round_trip": sum(tokenizer.decode(ids) != text for ids, text in zip(expected, texts, strict=True))}
    by_call = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    found["load_tokenizer"] = sum(a != b for a, b in zip(expected, by_call, strict=True))
    if (folder / TOKENIZERS_FILE).is_file():
        auto = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        theirs = [auto(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
        found["AutoTokenizer"] = sum(a != b for a, b in zip(expected, theirs, strict=True))
    return found
