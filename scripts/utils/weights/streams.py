"""Streams: files read ahead and written behind in threads, hashed on the way, without filling the page cache."""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..core.files import HashName, named_write_errors, new_hash

T = TypeVar("T")
Digest = dict[str, str]  # {"sha256": hexadecimal} or {"blake3": ...} of a file; {} if nobody took it

WINDOW = 64 << 20  # bytes read between two cleanings of the page cache
QUEUE_LENGTH = 8  # blocks of some megabytes that wait between two threads
WRITE_BYTES = 8 << 20  # written at a time
PAGE = mmap.PAGESIZE
GAP_BYTES = 8 << 20


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """The same items, computed ahead in a thread. What goes wrong there is raised here."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(QUEUE_LENGTH)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        # A consumer that stopped takes nothing out of a full queue: waiting without an end would keep the thread.
        while not stopped.is_set():
            try:
                return waiting.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            more, value = waiting.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        thread.join()


class FileWriter:
    """A file written once, from its first byte to its last, by a thread; hashed on the way.

    Where the file system allows, bytes go to the disk past the page cache: that costs a fraction of the processor
    time and leaves the cache to others. In a `with` statement the file is finished at the end, or left incomplete
    after an error. Its hash is taken unless `kind` is None.
    """

    def __init__(self, path: str | Path, kind: HashName | None = "sha256"):
        self.path = Path(path)
        self.size = 0
        self.digest: Digest = {}  # complete after close()
        self._kind, self._hash = kind, kind and new_hash(kind)
        self._queue: queue.Queue[memoryview | None] = queue.Queue(QUEUE_LENGTH)
        self._error: OSError | None = None
        self._descriptor: int | None = _open_direct(self.path)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, data: Any) -> None:
        """Queue the bytes of any object with the buffer protocol, which must not change afterwards.

        Raises: OSError, naming the file, if an earlier write failed.
        """
        self._raise_error()
        view = memoryview(data).cast("B")
        self.size += len(view)
        if self._hash:
            self._hash.update(view)  # in the caller's thread, side by side with the writing
        self._queue.put(view)

    def close(self) -> None:
        """Wait until everything is on the disk. Raises: OSError."""
        self._stop()
        self._raise_error()
        if self._kind and self._hash:
            self.digest = {self._kind: self._hash.hexdigest()}

    def abort(self) -> None:
        """Stop after an error elsewhere."""
        self._stop()

    def _stop(self) -> None:
        if self._descriptor is not None:
            self._queue.put(None)
            self._thread.join()
            os.close(self._descriptor)
            self._descriptor = None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        views = iter(self._queue.get, None)
        try:
            with named_write_errors(self.path):
                self._write_all(views)
        except OSError as error:
            self._error = error
            for _ in views:  # let the producer go on until it looks
                pass

    def _write_all(self, views: Iterable[memoryview]) -> None:
        assert self._descriptor is not None
        # A mapping begins at a page, as direct writes need their memory to.
        with mmap.mmap(-1, WRITE_BYTES) as buffer:
            filled = total = 0
            for view in views:
                while len(view):
                    count = min(len(view), WRITE_BYTES - filled)
                    buffer[filled : filled + count] = view[:count]
                    view, filled, total = view[count:], filled + count, total + count
                    if filled == WRITE_BYTES:
                        self._write_buffer(buffer, filled)
                        filled = 0
            # Direct writes need whole pages too: the last one is written whole and cut.
            self._write_buffer(buffer, -(-filled // PAGE) * PAGE)
        os.ftruncate(self._descriptor, total)
        os.fsync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _write_buffer(self, buffer: mmap.mmap, count: int) -> None:
        assert self._descriptor is not None
        with memoryview(buffer) as view:
            done = 0
            while done < count:
                with view[done:count] as rest:
                    done += os.write(self._descriptor, rest)


def _open_direct(path: Path) -> int:
    """A new file for writing past the page cache, or through it where the file system cannot do otherwise."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


class FileHasher:
    """The hashes of files whose bytes pass by in parts, read for another purpose.

    Parts that come in the order of the file are hashed as they come; only what nobody reads is read here.
    """

    def __init__(self, kind: HashName = "sha256") -> None:
        self._kind: HashName = kind
        self._open: dict[Path, tuple[Any, int]] = {}  # file: (hash of the bytes so far, how many)
        self.finished: dict[Path, str] = {}

    def update(self, file: Path, offset: int, data: Any) -> None:
        """Note that `data` stands at `offset` of `file`."""
        if file in self.finished:
            return
        view = memoryview(data).cast("B")
        digest, position = self._open.get(file) or (new_hash(self._kind), 0)
        if offset > position:  # tensors that nobody asked for, or padding
            self._read(file, digest, position, offset)
            position = offset
        if offset + len(view) > position:  # what was hashed already, of a tensor read twice, is left out
            digest.update(view[position - offset :])
            position = offset + len(view)
        self._open[file] = digest, position

    def finish(self, file: Path) -> str:
        """The hash of the whole file, in hexadecimal."""
        if file not in self.finished:
            digest, position = self._open.pop(file) if file in self._open else (new_hash(self._kind), 0)
            self._read(file, digest, position, file.stat().st_size)
            self.finished[file] = digest.hexdigest()
        return self.finished[file]

    @staticmethod
    def _read(file: Path, digest: Any, start: int, stop: int) -> None:
        with open(file, "rb", buffering=0) as opened:
            opened.seek(start)
            while start < stop and (block := opened.read(min(GAP_BYTES, stop - start))):
                digest.update(block)
                start += len(block)
