"""Documents for pre-training: which files, their text tokenised once into token caches, and the validation split.

Large corpora are tokenised by several processes; memory does not grow with their size.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import InputError
from ..core.files import hash_json
from ..core.records import TEXT_SUFFIXES, BadText, iter_document_batches, list_data_files
from ..core.workers import ordered_map
from .cache import (
    FORMAT,
    Arrays,
    CacheWriter,
    CorpusCache,
    OnBadText,
    TokenCache,
    check_sources,
    choose_workers,
    hash_files,
    open_or_build,
    token_dtype,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Bytes of input from which on worker processes save more than their start costs. With a tokenizers library tokenizer
# they import transformers, and that library has threads of its own.
PARALLEL_BYTES = {"sentencepiece": 8 << 20, "tokenizers": 64 << 20}
UNIT_BYTES = 1 << 20  # of a txt file given to a worker at a time


# ---------------------------------------------------------------- which files


def parse_corpora(specs: Sequence[str], suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> dict[str, list[Path]]:
    """Turn "name=path" and "path" (its stem is the name) into names and data files.

    Args: suffixes: the kinds of files taken; files.RECORD_SUFFIXES for conversations.
    Raises: InputError for data that is missing or empty, and for a name given twice; equal stems get a number.
    """
    corpora: dict[str, list[Path]] = {}
    problems = []
    for spec in specs:
        name, equals, path = spec.partition("=")
        named = bool(equals) and not Path(spec).exists()
        if not named:
            path = spec
            stem = Path(spec).resolve().stem
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
class _Encoder:
    """What a worker needs to turn texts into documents of ids; travels to it once."""

    model: bytes | None  # of sentencepiece: a worker then needs no transformers, which take 1 s and 100 MB to import
    tokenizer: PreTrainedTokenizerBase | None
    bos_token_id: int | None
    eos_token_id: int | None
    dtype: str
    on_bad_text: OnBadText
    num_threads: int = 1

    @functools.cached_property
    def processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self.model)

    def encode(self, texts: list[str]) -> Arrays:
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
        tokens = np.empty(ends[-1], dtype=self.dtype)
        inner: np.ndarray = np.ones(len(tokens), dtype=bool)
        for token_id, places in ((self.bos_token_id, ends - framed), (self.eos_token_id, ends - 1)):
            if token_id is not None:
                tokens[places] = token_id
                inner[places] = False
        tokens[inner] = ids
        return tokens, ends


@dataclass(frozen=True)
class _Unit:
    """A piece of work: a range of a txt file, or texts read already."""

    num_bytes: int  # of the file, for the progress bar
    texts: list[str] | None = None
    path: Path | None = None
    start: int = 0


@dataclass(frozen=True)
class _Part:
    """The work done; no arrays if it held no document."""

    num_bytes: int
    arrays: list[Arrays]
    skipped: int
    locations: list[str]


def tokenize_corpus(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    *,
    text_column: str = "text",
    document_separator: str | None = None,
    on_bad_text: OnBadText = "error",
    num_workers: int | None = None,
) -> CorpusCache:
    """Tokenise files (txt, json, jsonl, parquet) into a CorpusCache below `cache_dir`, or open the one that is there.

    Every document is BOS + ids + EOS, each where the tokenizer has it; its text is encoded as text, so "<s>" in a file
    is no special token.

    Args:
        document_separator: in txt files, the exact line that ends a document; None makes every line one.
        num_workers: processes; None takes the available cores. Small corpora are done in this process.
    Raises: InputError for bad text (unless skipped), broken records, or when no document is found; OSError when the
        disk is full, with nothing left behind.
    """
    from tqdm import tqdm  # here, because workers import this module and have no use for it

    from ..text.tokenizer import tokenizer_fingerprint

    paths, cache_dir = [Path(file) for file in files], Path(cache_dir)
    hashes = hash_files(paths, cache_dir)
    settings = [FORMAT, text_column, document_separator, on_bad_text]
    key = hash_json(["tokens", hashes, tokenizer_fingerprint(tokenizer), settings])

    def build(folder: Path) -> None:
        bad_text = BadText(on_bad_text)
        total_bytes = sum(path.stat().st_size for path in paths)
        encoder, num_processes = _plan(tokenizer, on_bad_text, total_bytes, num_workers)
        units = _corpus_units(paths, bad_text, text_column, document_separator)
        with (
            CacheWriter(folder) as writer,
            contextlib.closing(ordered_map(_tokenize_unit, encoder, units, num_processes)) as parts,
            tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing") as bar,
        ):
            for part in parts:
                for arrays in part.arrays:
                    writer.add(arrays)
                bad_text.add(part.skipped, part.locations)
                bar.set_postfix(tokens=f"{writer.num_tokens:,}", refresh=False)
                bar.update(part.num_bytes)
            check_sources(paths, hashes, cache_dir, writer.num_tokens, bad_text)
            writer.finish(key, paths, skipped=bad_text.skipped)

    return open_or_build(CorpusCache, cache_dir / f"tokens-{key[:20]}", build)


def _plan(
    tokenizer: PreTrainedTokenizerBase, on_bad_text: OnBadText, total_bytes: int, num_workers: int | None
) -> tuple[_Encoder, int]:
    """What the workers get, and how many processes there shall be (1: this one)."""
    from ..text.tokenizer import SentencePieceTokenizer

    model = tokenizer.sp_model.serialized_model_proto() if isinstance(tokenizer, SentencePieceTokenizer) else None
    enough = PARALLEL_BYTES["tokenizers" if model is None else "sentencepiece"]
    num_processes = choose_workers(num_workers, total_bytes, enough)
    encoder = _Encoder(
        model=model,
        tokenizer=tokenizer if model is None else None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=token_dtype(tokenizer),
        on_bad_text=on_bad_text,
        num_threads=choose_workers(num_workers) if num_processes == 1 else 1,
    )
    return encoder, num_processes


def _corpus_units(
    files: Sequence[Path], bad_text: BadText, text_column: str, document_separator: str | None
) -> Iterator[_Unit]:
    for path in files:
        size = path.stat().st_size
        if path.suffix.lower() == ".txt" and document_separator is None:
            for start in range(0, size, UNIT_BYTES):
                yield _Unit(min(UNIT_BYTES, size - start), path=path, start=start)
            continue
        left = size
        for texts in iter_document_batches(
            path, text_column=text_column, document_separator=document_separator, bad_text=bad_text
        ):
            # How far the file has been read is not known (parquet is compressed); the end of it is exact.
            done = min(left, sum(map(len, texts)))
            left -= done
            yield _Unit(done, texts=texts)
        yield _Unit(left, texts=[])


def _tokenize_unit(encoder: _Encoder, unit: _Unit) -> _Part:
    bad_text = BadText(encoder.on_bad_text)
    if unit.path is None:
        batches = iter([unit.texts or []])
    else:
        byte_range = (unit.start, unit.start + unit.num_bytes)
        batches = iter_document_batches(unit.path, bad_text=bad_text, byte_range=byte_range)
    arrays = [encoder.encode(texts) for texts in batches if texts]
    return _Part(unit.num_bytes, arrays, bad_text.skipped, bad_text.locations)


# ---------------------------------------------------------------- the validation split


def split_documents(file: TokenCache, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split into (training ids, validation ids), each int64 and ascending; about `share` are held out.

    A document's side follows from its text and the seed alone: other documents, their order and the number of files do
    not matter, and copies of a text are never on both sides. At least one document is on each side if 0 < share.
    Raises: InputError if there are fewer than two documents to split.
    """
    ids = np.arange(file.num_documents)
    if share <= 0:
        return ids, ids[:0]
    if len(ids) < 2:
        raise InputError(
            f"{file.meta['sources'][0]}: cannot hold out a part of one document; pass --validation_data, or "
            "--validation_split 0"
        )
    draws = _uniform(np.asarray(file.document_hashes), seed)
    held_out = draws < share
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
