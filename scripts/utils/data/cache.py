"""Token caches: memory-mapped files of tokens, keyed by content and settings; complete or absent, built once.

A cache is a folder with one flat file an array and meta.json, which records their sizes; a damaged one is built again.
Tokens take 2 bytes each (4 where the vocabulary is larger than 65,536), documents 16.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from ..core.errors import InputError
from ..core.files import atomic_folder, hash_file, locked, named_write_errors, read_json, remove, write_json
from ..core.machine import available_cores
from ..core.records import BadText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cache folders; part of every key
META = "meta.json"
HASHES = "hashes.json"
SETTLED_NANOSECONDS = 2_000_000_000

Arrays = dict[str, np.ndarray]
OnBadText = Literal["error", "skip"]


# ---------------------------------------------------------------- the cache of a corpus


class TokenCache:
    """Documents or samples on disk as token ids, memory-mapped.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32, all documents one after another.
        document_ends: (num_documents,) int64, where each ends in `tokens`.
        document_hashes: (num_documents,) uint32, a checksum of each; equal documents have equal ones.
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

    def __reduce__(self) -> tuple[type[TokenCache], tuple[Path]]:
        # Workers of a DataLoader map the file again; by default the whole array would travel.
        return type(self), (self.folder,)


class CorpusCache(TokenCache):
    """A tokenised corpus; see TokenCache.

    Attributes:
        document_bytes: (num_documents,) uint32, UTF-8 bytes of each document's text.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.document_bytes = self._map("document_bytes")


class SampleCache(TokenCache):
    """Tokenised conversations, each a document; see TokenCache.

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


File = TypeVar("File", bound=TokenCache)


class CacheWriter:
    """Appends arrays to the files of a new cache folder; documents' ends are made absolute."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[str, list[Any]] = {}
        self.stack = contextlib.ExitStack()
        self.streams: dict[str, Any] = {}

    def __enter__(self) -> CacheWriter:
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
                path = self.folder / f"{name}.bin"
                self.streams[name] = self.stack.enter_context(path.open("wb"))
                self.counts[name] = [array.dtype.name, 0]
            self.streams[name].write(array.tobytes())  # (array.tofile would hide the reason when the disk is full)
            self.counts[name][1] += len(array)

    def finish(self, key: str, sources: Sequence[Path], **meta: Any) -> None:
        """Write what describes the arrays, last of all."""
        self.stack.close()
        names = [str(path) for path in sources]
        write_json(self.folder / META, {"key": key, **meta, "sources": names, "arrays": self.counts})


def open_or_build(kind: type[File], folder: Path, build: Callable[[Path], None]) -> File:
    """Open a complete cache, or let one process of all that come here build it while the others wait."""
    if found := _open(kind, folder):
        return found
    with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
        if found := _open(kind, folder):
            return found
        _remove_abandoned(folder.parent)
        with named_write_errors(folder), atomic_folder(folder, overwrite=True) as partial:
            build(partial)
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


def _describe(file: TokenCache) -> str:
    size = sum(item.stat().st_size for item in file.folder.iterdir())
    tokens = len(file.tokens)
    return f"{file.num_documents:,} documents, {tokens:,} tokens, {size / tokens:.2f} bytes of disk a token"


def _remove_abandoned(cache_dir: Path) -> None:
    """Free the space of caches whose builder was killed."""
    for partial in cache_dir.glob(".*.partial"):
        with locked(partial.with_suffix(".lock")) as held:
            if held:
                remove(partial)


# ---------------------------------------------------------------- what builders share


def choose_workers(num_workers: int | None, total_bytes: int = 1, parallel_bytes: int = 0) -> int:
    """Processes to use: the available cores where none are given, 1 for an input too small to gain from more."""
    num_workers = available_cores() if num_workers is None else num_workers
    return max(num_workers, 1) if total_bytes >= parallel_bytes else 1


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    return "uint16" if len(tokenizer) <= 1 << 16 else "uint32"


def describe_sources(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def check_sources(
    files: Sequence[Path], hashes: list[list[str]], cache_dir: Path, num_tokens: int, bad_text: BadText
) -> None:
    """Log what was skipped. Raises: InputError if nothing was found, or a file changed while it was read."""
    names = describe_sources(files)
    if bad_text.skipped:
        logger.warning(
            "%s: skipped %d rows whose text is not valid, the first at %s",
            names,
            bad_text.skipped,
            ", ".join(bad_text.locations),
        )
    if not num_tokens:
        raise InputError(f"no text in {names}: the files are empty, or hold only blank lines and skipped rows")
    if hash_files(files, cache_dir) != hashes:
        raise InputError(f"{names}: changed while being read; run the same command again once nothing writes there")


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
        with contextlib.suppress(OSError), locked(cache_dir / f".{HASHES}.lock", wait=True):
            write_json(index_path, index)
    return hashes


def _file_state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
