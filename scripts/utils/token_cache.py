"""Token caches: text tokenised once, by several processes, into memory-mapped files keyed by content and settings.

A cache is a folder with one flat file an array and meta.json, which records their sizes. It is complete or absent; a
damaged one is built again. Tokens take 2 bytes each (4 where the vocabulary is larger than 65,536), documents 16.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from tqdm.auto import tqdm

from .files import (
    READ_BYTES,
    BadText,
    InputError,
    atomic_folder,
    hash_file,
    hash_json,
    iter_document_batches,
    iter_records,
    read_json,
    remove,
    write_json,
)
from .parallel import available_cores, ordered_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cache folders; a change makes every cache be built again
META = "meta.json"
HASHES = "hashes.json"
# Bytes of input below which starting worker processes costs more than they save.
MIN_PARALLEL_BYTES = {"sentencepiece": 8 << 20, "tokenizers": 64 << 20, "records": 8 << 20}
SETTLED_NANOSECONDS = 2_000_000_000

Arrays = dict[str, np.ndarray]
OnBadText = Literal["error", "skip"]


# ---------------------------------------------------------------- the cache of a corpus


class TokenFile:
    """A tokenised corpus on disk, memory-mapped.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32, all documents one after another.
        document_ends: (num_documents,) int64, where each ends in `tokens`.
        document_bytes: (num_documents,) uint32, UTF-8 bytes of each document's text.
        document_hashes: (num_documents,) uint32, a checksum of that text; equal texts have equal ones.
        skipped: rows left out because their text was not valid.
        key: the hash of content, tokenizer and settings.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises: InputError if the folder is not a complete cache."""
        self.folder = Path(folder)
        self.meta: dict[str, Any] = read_json(self.folder / META)
        self.key: str = self.meta["key"]
        self.skipped: int = self.meta["skipped"]
        self.tokens = self._map("tokens")
        self.document_ends = self._map("document_ends")
        self.document_bytes = self._map("document_bytes")
        self.document_hashes = self._map("document_hashes")

    def _map(self, name: str) -> np.ndarray:
        dtype, count = self.meta["arrays"][name]
        path = self.folder / f"{name}.bin"
        if not path.is_file() or path.stat().st_size != count * np.dtype(dtype).itemsize:
            raise InputError(f"{path} is damaged; remove {self.folder} to have it built again")
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,))

    @property
    def num_documents(self) -> int:
        return len(self.document_ends)

    def __reduce__(self) -> tuple[type[TokenFile], tuple[Path]]:
        # Workers of a DataLoader map the file again; by default the whole array would travel.
        return type(self), (self.folder,)


class SampleFile(TokenFile):
    """Tokenised conversations on disk: a TokenFile whose documents are samples, with what is trained marked.

    Attributes:
        trained: (num_tokens,) bool, where the label is the token itself and not IGNORE_INDEX.
        counters: samples, truncated, dropped_no_label, skipped_bad_text, tokens, label_tokens.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.trained = self._map("trained")
        self.counters: dict[str, int] = self.meta["counters"]

    @property
    def num_samples(self) -> int:
        return self.num_documents


File = TypeVar("File", bound=TokenFile)


class _Writer:
    """Appends arrays to the files of a new cache folder; documents' ends are made absolute."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[str, list[Any]] = {}
        self.stack = contextlib.ExitStack()
        self.streams: dict[str, Any] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    @property
    def num_tokens(self) -> int:
        return int(self.counts["tokens"][1]) if self.counts else 0

    def add(self, arrays: Arrays) -> None:
        arrays = {**arrays, "document_ends": arrays["document_ends"] + self.num_tokens}
        for name, array in arrays.items():
            if name not in self.streams:
                self.streams[name] = self.stack.enter_context(open(self.folder / f"{name}.bin", "wb"))
                self.counts[name] = [array.dtype.name, 0]
            self.streams[name].write(array.tobytes())  # (array.tofile would hide the reason when the disk is full)
            self.counts[name][1] += len(array)

    def finish(self, meta: dict[str, Any]) -> None:
        self.stack.close()
        write_json(self.folder / META, {**meta, "arrays": self.counts})


def _open_or_build(kind: type[File], folder: Path, build: Callable[[Path], None]) -> File:
    """Open a complete cache, or let one process of all that come here build it while the others wait."""
    if found := _open(kind, folder):
        return found
    with _lock(folder.with_name(f".{folder.name}.lock")):
        if found := _open(kind, folder):
            return found
        _remove_abandoned(folder.parent)
        try:
            with atomic_folder(folder, overwrite=True) as partial:
                build(partial)
        except OSError as error:
            error.filename = error.filename or str(folder)  # so that "no space left" can say where
            raise
    return kind(folder)


def _open(kind: type[File], folder: Path) -> File | None:
    if not folder.is_dir():
        return None
    try:
        found = kind(folder)
    except (InputError, KeyError, TypeError):
        logger.warning("the cache %s is damaged; it is built again", folder)
        return None
    logger.info("using the cache %s: %s", folder, _describe(found))
    return found


def _describe(file: TokenFile) -> str:
    size = sum(item.stat().st_size for item in file.folder.iterdir())
    tokens = len(file.tokens)
    return f"{file.num_documents:,} documents, {tokens:,} tokens, {size / tokens:.2f} bytes of disk a token"


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an advisory lock, which the system frees when the process ends in any way; yields whether it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            logger.info("waiting for the process that holds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True


def _remove_abandoned(cache_dir: Path) -> None:
    """Free the space of caches whose builder was killed."""
    for partial in cache_dir.glob(".*.partial"):
        with _lock(partial.with_suffix(".lock"), wait=False) as held:
            if held:
                remove(partial)


# ---------------------------------------------------------------- keys


def hash_files(files: Sequence[Path], cache_dir: Path) -> list[list[str]]:
    """[suffix, SHA-256] of each file; names and places do not count.

    A file whose size, inode, and times of change are those recorded beside its hash is not read again. The time of the
    last status change cannot be set by copying tools, and a file changed less than 2 s before it was hashed is not
    recorded, so no edit goes unseen.
    """
    index_path = cache_dir / HASHES
    try:
        index: dict[str, Any] = json.loads(index_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = {}
    hashes, changed = [], False
    for path in files:
        state, recorded = _file_state(path), index.get(str(path.resolve()))
        if recorded is None or recorded[:-1] != state:
            now = time.time_ns()
            recorded = [*state, hash_file(path)]
            if now - max(state[1:3]) > SETTLED_NANOSECONDS:
                index[str(path.resolve())] = recorded
                changed = True
        hashes.append([path.suffix.lower(), recorded[-1]])
    if changed:
        # Only a shortcut: a cache folder that cannot be written may still hold what is needed.
        with contextlib.suppress(OSError), _lock(cache_dir / f".{HASHES}.lock"):
            write_json(index_path, index)
    return hashes


def _file_state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


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
        """The arrays of a TokenFile that holds these documents."""
        raw = [text.encode() for text in texts]
        if self.model is not None:
            # No Python list of ids is ever made: twice as fast.
            encoded = self.processor.encode(raw, num_threads=self.num_threads, return_type="numpy")
            ids = np.concatenate(encoded)
        else:
            from .tokenization import encode_texts

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
        framed = lengths + (self.bos_token_id is not None) + (self.eos_token_id is not None)
        ends = np.cumsum(framed)
        tokens = np.empty(ends[-1], dtype=self.dtype)
        inner = np.ones(len(tokens), dtype=bool)
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
) -> TokenFile:
    """Tokenise files (txt, json, jsonl, parquet) into a TokenFile below `cache_dir`, or open the one that is there.

    Every document is BOS + ids + EOS, each where the tokenizer has it; its text is encoded as text, so "<s>" in a file
    is no special token.

    Args:
        document_separator: in txt files, the exact line that ends a document; None makes every line one.
        num_workers: processes; None takes the available cores. Small corpora are done in this process.
    Raises: InputError for bad text (unless skipped), broken records, or when no document is found; OSError when the
        disk is full, with nothing left behind.
    """
    from .tokenization import tokenizer_fingerprint

    files, cache_dir = [Path(file) for file in files], Path(cache_dir)
    hashes = hash_files(files, cache_dir)
    settings = [FORMAT, text_column, document_separator, on_bad_text]
    key = hash_json(["tokens", hashes, tokenizer_fingerprint(tokenizer), settings])

    def build(folder: Path) -> None:
        bad_text = BadText(on_bad_text)
        total_bytes = sum(file.stat().st_size for file in files)
        encoder, num_processes = _plan(tokenizer, on_bad_text, total_bytes, num_workers)
        units = _corpus_units(files, bad_text, text_column, document_separator)
        with (
            _Writer(folder) as writer,
            contextlib.closing(ordered_map(_tokenize_unit, encoder, units, num_processes)) as parts,
            tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing") as bar,
        ):
            for part in parts:
                for arrays in part.arrays:
                    writer.add(arrays)
                bad_text.add(part.skipped, part.locations)
                bar.set_postfix(tokens=f"{writer.num_tokens:,}", refresh=False)
                bar.update(part.num_bytes)
            _check_complete(writer, files, hashes, cache_dir, bad_text)
            writer.finish({"key": key, "skipped": bad_text.skipped, "sources": [str(file) for file in files]})

    return _open_or_build(TokenFile, cache_dir / f"tokens-{key[:20]}", build)


def _plan(
    tokenizer: PreTrainedTokenizerBase, on_bad_text: OnBadText, total_bytes: int, num_workers: int | None
) -> tuple[_Encoder, int]:
    """What the workers get, and how many processes there shall be (1: this one)."""
    from .tokenization import SentencePieceTokenizer

    native = isinstance(tokenizer, SentencePieceTokenizer)
    model = tokenizer.sp_model.serialized_model_proto() if isinstance(tokenizer, SentencePieceTokenizer) else None
    num_workers = available_cores() if num_workers is None else num_workers
    parallel = total_bytes >= MIN_PARALLEL_BYTES["sentencepiece" if native else "tokenizers"] and num_workers > 1
    encoder = _Encoder(
        model=model,
        tokenizer=None if native else tokenizer,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="uint16" if len(tokenizer) <= 1 << 16 else "uint32",
        on_bad_text=on_bad_text,
        num_threads=1 if parallel else max(num_workers, 1),
    )
    return encoder, num_workers if parallel else 1


def _corpus_units(
    files: Sequence[Path], bad_text: BadText, text_column: str, document_separator: str | None
) -> Iterator[_Unit]:
    for path in files:
        size = path.stat().st_size
        if path.suffix.lower() == ".txt" and document_separator is None:
            for start in range(0, size, READ_BYTES):
                yield _Unit(min(READ_BYTES, size - start), path=path, start=start)
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


def _check_complete(
    writer: _Writer, files: Sequence[Path], hashes: list[list[str]], cache_dir: Path, bad_text: BadText
) -> None:
    """Log what was skipped. Raises: InputError if nothing was found, or a file changed while it was read."""
    names = ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    if bad_text.skipped:
        logger.warning(
            "%s: skipped %d rows whose text is not valid, the first at %s",
            names,
            bad_text.skipped,
            ", ".join(bad_text.locations),
        )
    if not writer.num_tokens:
        raise InputError(f"no text in {names}: the files are empty, or hold only blank lines and skipped rows")
    if hash_files(files, cache_dir) != hashes:
        raise InputError(f"{names}: changed while being read; run the same command again once nothing writes there")
