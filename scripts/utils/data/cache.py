"""Token caches: memory-mapped files of tokens, keyed by content and settings; complete or absent, built once.

A cache is a folder with one flat file an array and meta.json, which records their sizes; a damaged one is built again.
Tokens take 2 bytes each (4 where the vocabulary is larger than 65,536), documents 16.

A kind of cache is a subclass of TokenCache, and an Encoder that says how documents are made of files; build_cache does
the rest for all kinds. The key holds all that decides the arrays: the files' content, the tokenizer, the settings, and
the version of the rules (RULES), because a changed rule must not meet an old cache.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from ..core.errors import InputError
from ..core.files import atomic_folder, hash_file, hash_json, locked, named_write_errors, read_json, remove, write_json
from ..core.machine import available_cores
from ..core.records import BadRecords, OnBadRecord, iter_records
from ..core.workers import ordered_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT = 2  # of the cache folders; part of every key
META = "meta.json"
HASHES = "hashes.json"
SETTLED_NANOSECONDS = 2_000_000_000

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class CacheSettings:
    """Where the caches of a run are kept, and how they are built.

    Attributes:
        num_workers: processes that tokenise; None takes the available cores. Small inputs are done in this process.
        max_dropped_share: warn if a larger share of the records of preference data is dropped.
    """

    folder: Path
    on_bad_record: OnBadRecord = "error"
    num_workers: int | None = None
    max_dropped_share: float = 0.1


# ---------------------------------------------------------------- a cache on disk


class TokenCache:
    """Documents, samples or pairs on disk as token ids, memory-mapped.

    Attributes:
        KIND: how the folders of these caches begin.
        RULES: the version of the code that turns files into the arrays; raise it when the same input gives others.
        tokens: (num_tokens,) uint16 or uint32, all documents one after another.
        document_ends: (num_documents,) int64, where each ends in `tokens`.
        document_hashes: (num_documents,) uint32, a checksum of each; equal documents have equal ones.
        skipped: lines or records left out because they could not be used.
        counters: what the encoder counted, by name.
        key: the hash of content, tokenizer, settings and rules.
    """

    KIND: ClassVar[str]
    RULES: ClassVar[int]

    def __init__(self, folder: str | Path) -> None:
        """Raises: InputError if the folder is not a complete cache."""
        self.folder = Path(folder)
        self.meta: dict[str, Any] = read_json(self.folder / META)
        self.key: str = self.meta["key"]
        self.skipped: int = self.meta["skipped"]
        self.counters: dict[str, int] = self.meta["counters"]
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


Cache = TypeVar("Cache", bound=TokenCache)


class CacheWriter:
    """Appends arrays to the files of a new cache folder; documents' ends are made absolute.

    Names (arrays of Python strings) are written as their numbers, uint16, and stand in meta.json in that order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, dict[str, int]] = {}
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
            if array.dtype == object:
                array = self._number(name, array)
            if name not in self.streams:
                path = self.folder / f"{name}.bin"
                self.streams[name] = self.stack.enter_context(path.open("wb"))
                self.counts[name] = [array.dtype.name, 0]
            self.streams[name].write(array.tobytes())  # (array.tofile would hide the reason when the disk is full)
            self.counts[name][1] += len(array)

    def _number(self, column: str, values: np.ndarray) -> np.ndarray:
        names = self.names.setdefault(column, {})
        numbers = [names.setdefault(value, len(names)) for value in values]
        if len(names) > 1 << 16:
            raise InputError(
                f"more than {1 << 16} different values in the field 'source'; name data sets there, not rows"
            )
        return np.array(numbers, dtype=np.uint16)

    def finish(self, key: str, sources: Sequence[Path], **meta: Any) -> None:
        """Write what describes the arrays, last of all."""
        self.stack.close()
        names = {column: list(numbers) for column, numbers in self.names.items()}
        files = [str(path) for path in sources]
        write_json(self.folder / META, {"key": key, **meta, "names": names, "sources": files, "arrays": self.counts})


# ---------------------------------------------------------------- one builder at a time


def _open_or_build(kind: type[Cache], folder: Path, build: Callable[[Path], None]) -> Cache:
    """Open a complete cache, or let one process of all that come here build it while the others wait."""
    if found := _open(kind, folder):
        return found
    with cache_lock(folder):
        if found := _open(kind, folder):
            return found
        _remove_abandoned(folder.parent)
        with named_write_errors(folder), atomic_folder(folder, overwrite=True) as partial:
            build(partial)
    return kind(folder)


def _open(kind: type[Cache], folder: Path) -> Cache | None:
    if not folder.is_dir():
        return None
    try:
        found = kind(folder)
    except (InputError, KeyError, TypeError):
        logger.warning("the cache %s is damaged; it is built again", folder)
        return None
    logger.info("using the cache %s: %s", folder, _describe(found))
    return found


def _describe(cache: TokenCache) -> str:
    size = sum(item.stat().st_size for item in cache.folder.iterdir())
    tokens = len(cache.tokens)
    return f"{cache.num_documents:,} documents, {tokens:,} tokens, {size / tokens:.2f} bytes of disk a token"


def cache_lock(path: Path, wait: bool = True) -> contextlib.AbstractContextManager[bool]:
    """The lock of whoever makes `path`, which lies in a cache folder; what is made without it may be cleaned away."""
    return locked(path.with_name(f".{path.name}.lock"), wait)


def _remove_abandoned(cache_dir: Path) -> None:
    """Free the space of what was being made in a cache folder by a process that was killed."""
    for partial in cache_dir.glob(".*.partial"):
        with cache_lock(partial.with_name(partial.name[1:].removesuffix(".partial")), wait=False) as held:
            if held:
                remove(partial)


# ---------------------------------------------------------------- building one


@dataclass(frozen=True)
class Part:
    """What an encoder made of a unit of input.

    Attributes:
        progress: the unit's share of the work, for the bar: bytes, or records.
        arrays: those of a cache with these documents alone, or several of them; none if no document was kept.
        skipped, problems: as BadRecords has them, of what the encoder could not use.
    """

    progress: int
    arrays: list[Arrays] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    problems: list[str] = field(default_factory=list)


class Encoder(ABC):
    """How files become documents of one kind of cache; a frozen dataclass that travels to each worker once."""

    bar: ClassVar[dict[str, Any]]  # tqdm's settings: the unit of Part.progress
    counted: ClassVar[tuple[str, ...]] = ()  # counters that start at 0

    @property
    @abstractmethod
    def parallel_bytes(self) -> int:
        """Bytes of input from which on worker processes save more than their start costs."""

    @abstractmethod
    def settings(self, files: Sequence[Path]) -> list[Any]:
        """All that decides the arrays beside the files' content and the tokenizer, JSON-like; part of the key."""

    @abstractmethod
    def units(self, files: Sequence[Path], bad_records: BadRecords) -> Iterator[Any]:
        """The files in pieces of work, in order."""

    @abstractmethod
    def encode(self, unit: Any) -> Part:
        """Called in a worker. Raises: InputError for a record that cannot be used (file:line), unless skipped."""

    def check(self, counters: Counter[str], files: Sequence[Path]) -> None:  # noqa: B027 (nothing to check is usual)
        """Log what was cut or dropped. Raises: InputError if nothing is left of the records there are."""


def build_cache(
    kind: type[Cache],
    encoder: Encoder,
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    settings: CacheSettings,
) -> Cache:
    """Open the cache of these files, or build it.

    Raises: InputError for a bad record unless skipped, a file that changes meanwhile, or if nothing is found; OSError
        when the disk is full, with nothing left behind.
    """
    from tqdm import tqdm  # here, because workers import this module and have no use for it

    from ..text.tokenizer import tokenizer_fingerprint

    paths = [Path(file) for file in files]
    hashes = hash_files(paths, settings.folder)  # before reading; compared with those afterwards
    decided_by = [kind.KIND, kind.RULES, FORMAT, settings.on_bad_record, *encoder.settings(paths)]
    key = hash_json([hashes, tokenizer_fingerprint(tokenizer), decided_by])

    def build(folder: Path) -> None:
        bad_records = BadRecords(settings.on_bad_record)
        counters: Counter[str] = Counter(dict.fromkeys(encoder.counted, 0))
        units = encoder.units(paths, bad_records)  # a generator: files are read as workers take units
        total_bytes = sum(path.stat().st_size for path in paths)
        num_processes = choose_workers(settings.num_workers, total_bytes, encoder.parallel_bytes)
        total = total_bytes if encoder.bar["unit"] == "B" else None
        with (
            CacheWriter(folder) as writer,
            # Closed whatever happens: an error here must not leave workers behind.
            contextlib.closing(ordered_map(_encode_unit, encoder, units, num_processes)) as parts,
            tqdm(total=total, desc="tokenizing", **encoder.bar) as bar,
        ):
            for part in parts:
                for arrays in part.arrays:
                    writer.add(arrays)
                counters.update(part.counters)
                bad_records.add(part.skipped, part.problems)
                bar.set_postfix(tokens=f"{writer.num_tokens:,}", refresh=False)
                bar.update(part.progress)
            encoder.check(counters, paths)
            _check_sources(paths, hashes, settings.folder, writer.num_tokens, bad_records)
            bad = {"skipped": bad_records.skipped, "problems": bad_records.problems}
            writer.finish(key, paths, **bad, counters=dict(counters))

    cache = _open_or_build(kind, settings.folder / f"{kind.KIND}-{key[:20]}", build)
    if cache.skipped:  # said of a cache that was there, too
        logger.warning("%s: %s", describe_files(paths), BadRecords("skip", cache.skipped, cache.meta["problems"]))
    return cache


def _encode_unit(encoder: Encoder, unit: Any) -> Part:
    """A function of the module, because workers are sent it by name."""
    return encoder.encode(unit)


def _check_sources(
    files: Sequence[Path], hashes: list[list[str]], cache_dir: Path, num_tokens: int, bad_records: BadRecords
) -> None:
    """Raises: InputError if nothing was found, or a file changed while it was read."""
    names = describe_files(files)
    if not num_tokens:
        skipped = f"; {bad_records}" if bad_records.skipped else ""
        raise InputError(f"no text in {names}: the files are empty, or hold only blank lines{skipped}")
    if hash_files(files, cache_dir) != hashes:
        raise InputError(f"{names}: changed while being read; run the same command again once nothing writes there")


def describe_files(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def choose_workers(num_workers: int | None, total_bytes: int = 1, parallel_bytes: int = 0) -> int:
    """Processes to use: the available cores where none are given, 1 for an input too small to gain from more."""
    num_workers = available_cores() if num_workers is None else num_workers
    return max(num_workers, 1) if total_bytes >= parallel_bytes else 1


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    from ..text.tokenizer import vocabulary_end

    return "uint16" if vocabulary_end(tokenizer) <= 1 << 16 else "uint32"


# ---------------------------------------------------------------- caches of conversations, pairs and prompts


PARALLEL_BYTES = 8 << 20
RECORDS_PER_UNIT = 500
MOST_OPEN = 256  # files read in turn

Item = TypeVar("Item")


def take_in_turn(iterators: Sequence[Iterator[Item]]) -> Iterator[Item]:
    """One item of each, again and again; those that are at their end are left out."""
    waiting = collections.deque(iterators)
    while waiting:
        iterator = waiting.popleft()
        for item in iterator:
            yield item
            waiting.append(iterator)
            break


class Record(NamedTuple):
    location: str  # file:line, for messages
    source: str  # the file's name, for records that name none
    fields: dict[str, Any]


@dataclass(frozen=True)
class RecordEncoder(Encoder):
    """What the encoders of records share.

    Attributes:
        template: the jinja text of the chat template, see prompts.resolve_template.
        max_length: tokens of a row.
        max_samples: only so many records are read, from all files in turn; None: all.
        on_bad_record: see BadRecords.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_length: int
    max_samples: int | None = None
    on_bad_record: OnBadRecord = "error"

    bar: ClassVar[dict[str, Any]] = {"unit": " records"}

    @property
    def parallel_bytes(self) -> int:
        return PARALLEL_BYTES

    def settings(self, files: Sequence[Path]) -> list[Any]:
        # In turn: the limit once was the first records of all files.
        return [self.template, self.max_length, self.max_samples and ["in turn", self.max_samples]]

    def units(self, files: Sequence[Path], bad_records: BadRecords) -> Iterator[list[Record]]:
        def read(path: Path) -> Iterator[Record]:
            return (Record(place, path.stem, record) for place, record in iter_records(path, bad_records))

        if self.max_samples is None:
            records: Iterator[Record] = itertools.chain.from_iterable(map(read, files))
        else:
            # Chains of files rather than files, so that not too many are open at once.
            chains = [files[start::MOST_OPEN] for start in range(min(MOST_OPEN, len(files)))]
            in_turn = take_in_turn([itertools.chain.from_iterable(map(read, chain)) for chain in chains])
            records = itertools.islice(in_turn, self.max_samples)
        while unit := list(itertools.islice(records, RECORDS_PER_UNIT)):
            yield unit


@contextlib.contextmanager
def located(location: str) -> Iterator[None]:
    """Put the record's place before errors that do not name it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{location}: {error}") from None


def describe_counts(counters: Mapping[str, int], words: Mapping[str, str]) -> str:
    """What was counted, as "2 are short, 1 is long" for {"short": "are short", ...}; "" if nothing was."""
    return ", ".join(f"{counters[name]} {text}" for name, text in words.items() if counters[name])


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
        with contextlib.suppress(OSError), cache_lock(index_path):
            write_json(index_path, index)
    return hashes


def _file_state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
