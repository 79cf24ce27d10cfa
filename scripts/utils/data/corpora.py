"""Corpora for pre-training: which files, their text tokenised once into token caches, and the validation split.

Large corpora are tokenised by several processes; memory does not grow with their size.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..core.errors import InputError
from ..core.records import TEXT_SUFFIXES, BadText, iter_document_batches, list_data_files
from .cache import (
    Arrays,
    CacheSettings,
    Encoder,
    OnBadText,
    Part,
    TokenCache,
    build_cache,
    choose_workers,
    token_dtype,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Bytes of input from which on worker processes save more than their start costs. With a tokenizers library tokenizer
# they import transformers, and that library has threads of its own.
PARALLEL_BYTES = {"sentencepiece": 8 << 20, "tokenizers": 64 << 20}
UNIT_BYTES = 1 << 20  # of a txt file given to a worker at a time


class CorpusCache(TokenCache):
    """A tokenised corpus; see TokenCache.

    Attributes:
        document_bytes: (num_documents,) uint32, UTF-8 bytes of each document's text.
    """

    KIND = "tokens"
    RULES = 2

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.document_bytes = self._map("document_bytes")


# ---------------------------------------------------------------- which files


def parse_corpora(specs: Sequence[str], suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> dict[str, list[Path]]:
    """Turn "name=path" and "path" (the folder's name, or the file's without suffix) into names and data files.

    Args: suffixes: the kinds of files taken; records.RECORD_SUFFIXES for conversations.
    Raises: InputError for data that is missing or empty, and for a name given twice; equal stems get a number.
    """
    corpora: dict[str, list[Path]] = {}
    problems = []
    for spec in specs:
        name, equals, path = spec.partition("=")
        named = bool(equals) and not Path(spec).exists()  # a path may have "=" in its own name
        if not named:
            path = spec
            place = Path(spec).resolve()  # so that "." has a name too
            stem = place.name if place.is_dir() else place.stem  # a folder's name may have a dot, and no suffix
            numbers = range(2, len(specs) + 2)
            name = next(n for n in (stem, *(f"{stem}-{number}" for number in numbers)) if n not in corpora)
        elif not name or name in corpora:
            problems.append(f"{spec}: {'a corpus with this name was given before' if name else 'the name is empty'}")
            continue
        try:
            corpora[name] = list_data_files(Path(path).expanduser(), suffixes)
            if not any(file.stat().st_size for file in corpora[name]):
                problems.append(f"{path}: every file is empty")
        except InputError as error:
            problems.append(str(error))
    if not specs:
        problems.append("no data: pass files or folders")
    if problems:
        raise InputError("\n".join(problems))
    return corpora


# ---------------------------------------------------------------- pre-training corpora


@dataclass(frozen=True)
class _Unit:
    """A piece of work: a byte range of a txt file, or texts read already."""

    num_bytes: int  # of the file, for the progress bar
    texts: list[str] | None = None
    path: Path | None = None
    start: int = 0


@dataclass(frozen=True)
class _TextEncoder(Encoder):
    """Texts -> documents of ids, BOS and EOS around each."""

    model: bytes | None  # of sentencepiece: a worker then needs no transformers, which take 1 s and 100 MB to import
    tokenizer: PreTrainedTokenizerBase | None
    bos_token_id: int | None
    eos_token_id: int | None
    dtype: str
    text_column: str
    document_separator: str | None
    on_bad_text: OnBadText
    num_threads: int = 1  # of the sentencepiece library, where no worker processes share the cores

    bar: ClassVar[dict[str, Any]] = {"unit": "B", "unit_scale": True}

    @property
    def parallel_bytes(self) -> int:
        return PARALLEL_BYTES["tokenizers" if self.model is None else "sentencepiece"]

    def settings(self, files: Sequence[Path]) -> list[Any]:
        return [self.text_column, self.document_separator]

    def units(self, files: Sequence[Path], bad_text: BadText) -> Iterator[_Unit]:
        for path in files:
            size = path.stat().st_size
            if path.suffix.lower() == ".txt" and self.document_separator is None:
                # A line is a document, so the file can be cut anywhere, and workers read it themselves.
                for start in range(0, size, UNIT_BYTES):
                    yield _Unit(min(UNIT_BYTES, size - start), path=path, start=start)
                continue
            left = size
            for texts in iter_document_batches(
                path, text_column=self.text_column, document_separator=self.document_separator, bad_text=bad_text
            ):
                # How far the file has been read is not known (parquet is compressed); the end of it is exact.
                done = min(left, sum(map(len, texts)))
                left -= done
                yield _Unit(done, texts=texts)
            yield _Unit(left, texts=[])

    def encode(self, unit: _Unit) -> Part:
        bad_text = BadText(self.on_bad_text)
        if unit.path is None:
            batches = iter([unit.texts or []])
        else:
            byte_range = (unit.start, unit.start + unit.num_bytes)
            batches = iter_document_batches(unit.path, bad_text=bad_text, byte_range=byte_range)
        arrays = [self._encode_texts(texts) for texts in batches if texts]
        return Part(unit.num_bytes, arrays, skipped=bad_text.skipped, locations=bad_text.locations)

    @functools.cached_property
    def processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self.model)

    def _encode_texts(self, texts: list[str]) -> Arrays:
        """The arrays of a CorpusCache that holds these documents."""
        raw = [text.encode() for text in texts]
        if self.model is not None:
            # No Python list of ids is ever made: twice as fast.
            encoded = self.processor.encode(raw, num_threads=self.num_threads, return_type="numpy")
            ids = np.concatenate(encoded)
        else:
            from ..text.tokenizer import encode_texts

            assert self.tokenizer is not None
            encoded = encode_texts(self.tokenizer, texts, self.num_threads)
            ids = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int64)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        tokens, ends = self._add_ends(ids, lengths)
        return {
            "tokens": tokens,
            "document_ends": ends,
            "document_bytes": np.fromiter(map(len, raw), dtype=np.uint32, count=len(raw)),
            "document_hashes": np.fromiter(map(zlib.crc32, raw), dtype=np.uint32, count=len(raw)),
        }

    def _add_ends(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put BOS and EOS around every document; returns the tokens and where each document ends."""
        framed: np.ndarray = lengths + (self.bos_token_id is not None) + (self.eos_token_id is not None)
        ends = np.cumsum(framed)
        # In bulk, without a loop over documents.
        tokens = np.empty(ends[-1], dtype=self.dtype)
        inner: np.ndarray = np.ones(len(tokens), dtype=bool)
        for token_id, places in ((self.bos_token_id, ends - framed), (self.eos_token_id, ends - 1)):
            if token_id is not None:
                tokens[places] = token_id
                inner[places] = False
        tokens[inner] = ids
        return tokens, ends


def tokenize_corpus(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    settings: CacheSettings,
    *,
    text_column: str = "text",
    document_separator: str | None = None,
) -> CorpusCache:
    """Tokenise files (txt, json, jsonl, parquet) into a CorpusCache, or open the one that is there.

    Every document is BOS + ids + EOS, each where the tokenizer has it; its text is encoded as text, so "<s>" in a file
    is no special token.

    Args: document_separator: in txt files, the exact line that ends a document; None makes every line one.
    Raises: as build_cache.
    """
    from ..text.tokenizer import SentencePieceTokenizer

    model = tokenizer.sp_model.serialized_model_proto() if isinstance(tokenizer, SentencePieceTokenizer) else None
    encoder = _TextEncoder(
        model=model,
        tokenizer=tokenizer if model is None else None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=token_dtype(tokenizer),
        text_column=text_column,
        document_separator=document_separator,
        on_bad_text=settings.on_bad_text,
    )
    total_bytes = sum(Path(file).stat().st_size for file in files)
    if choose_workers(settings.num_workers, total_bytes, encoder.parallel_bytes) == 1:
        encoder = replace(encoder, num_threads=choose_workers(settings.num_workers))
    return build_cache(CorpusCache, encoder, files, tokenizer, settings)


# ---------------------------------------------------------------- the validation split


def split_documents(cache: TokenCache, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split into (training ids, validation ids), each int64 and ascending; about `share` are held out.

    A document's side follows from its text and the seed alone: other documents, their order and the number of files do
    not matter, and copies of a text are never on both sides. At least one document is on each side if 0 < share.
    Raises: InputError if there are fewer than two documents to split.
    """
    ids = np.arange(cache.num_documents)
    if share <= 0:
        return ids, ids[:0]
    if len(ids) < 2:
        raise InputError(
            f"{cache.meta['sources'][0]}: cannot hold out a part of one document; pass --validation_data, or "
            "--validation_split 0"
        )
    draws = _uniform(np.asarray(cache.document_hashes), seed)
    held_out = draws < share
    # In a small corpus chance may leave a side empty; then it gets one text, the nearest to the border, in all copies.
    if not held_out.any():
        held_out = draws == draws.min()
    if held_out.all():
        held_out = draws < draws.max()
        if not held_out.any():  # one text repeated
            held_out[-1] = True
    return ids[~held_out], ids[held_out]


def _uniform(values: np.ndarray, seed: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on each value and the seed. Source: SplitMix64 (Steele et al. 2014)."""
    mixed = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) / 2.0**64
