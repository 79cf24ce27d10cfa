"""Streams: files read ahead and written behind in threads, hashed on the way, without filling the page cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

WINDOW = 64 << 20  # bytes between two looks at the page cache
QUEUE_LENGTH = 8  # blocks of some megabytes that wait between two threads
GAP_BYTES = 8 << 20
_WRITE, _WAIT_ALL = 2, 7  # SYNC_FILE_RANGE_* of Linux: start writing pages; wait until they are written


def prefetch(items: Iterable[T], depth: int = QUEUE_LENGTH) -> Iterator[T]:
    """The same items, computed ahead in a thread. What goes wrong there is raised here."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
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
    """A file written once, from its first byte to its last, in a thread that also hashes it.

    `write` takes any object with the buffer protocol, which must not change afterwards. In a `with` statement the
    file is finished at the end, or left incomplete after an error.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.size = 0
        self.sha256: str | None = None  # known after close()
        self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 (closed by close and abort)
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[memoryview | None] = queue.Queue(QUEUE_LENGTH)
        self._error: OSError | None = None
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
        """Queue some bytes. Raises: OSError, naming the file, if an earlier write failed."""
        self._raise_error()
        view = memoryview(data).cast("B")
        self.size += len(view)
        self._queue.put(view)

    def close(self) -> str:
        """Wait until everything is on the disk. Returns: the file's SHA-256 in hexadecimal. Raises: OSError."""
        self._stop()
        self._raise_error()
        self.sha256 = self._hash.hexdigest()
        return self.sha256

    def abort(self) -> None:
        """Stop after an error elsewhere."""
        self._stop()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._file.close()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self.path)) from None

    def _work(self) -> None:
        try:
            self._write_all()
        except OSError as error:
            self._error = error
            while self._queue.get() is not None:  # let the producer go on until it looks
                pass

    def _write_all(self) -> None:
        descriptor, written, window = self._file.fileno(), 0, 0
        while (view := self._queue.get()) is not None:
            self._hash.update(view)
            while len(view):
                count = os.write(descriptor, view)
                view, written = view[count:], written + count
            if written - window >= WINDOW:
                # Pages go to the disk while the next window is filled, and out of the cache one window later.
                _sync_range(descriptor, window, written - window, _WRITE)
                if window:
                    _sync_range(descriptor, 0, window, _WAIT_ALL)
                    os.posix_fadvise(descriptor, 0, window, os.POSIX_FADV_DONTNEED)
                window = written
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_range(descriptor: int, offset: int, count: int, flags: int) -> None:
    # Only Linux has it; elsewhere fsync at the end does it all at once.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.sync_file_range(
            ctypes.c_int(descriptor), ctypes.c_int64(offset), ctypes.c_int64(count), ctypes.c_uint(flags)
        )


class FileHasher:
    """SHA-256 of files whose bytes pass by in parts, read for another purpose.

    Parts that come in the order of the file are hashed as they come; only what nobody reads is read here.
    """

    def __init__(self) -> None:
        self._open: dict[Path, tuple[Any, int]] = {}  # file: (hash of the bytes so far, how many)
        self.finished: dict[Path, str] = {}

    def update(self, file: Path, offset: int, data: Any) -> None:
        """Note that `data` stands at `offset` of `file`."""
        if file in self.finished:
            return
        view = memoryview(data).cast("B")
        digest, position = self._open.get(file) or (hashlib.sha256(), 0)
        if offset > position:
            self._read(file, digest, position, offset)
            position = offset
        if offset + len(view) > position:
            digest.update(view[position - offset :])
            position = offset + len(view)
        self._open[file] = digest, position

    def finish(self, file: Path) -> str:
        """The hash of the whole file, in hexadecimal."""
        if file not in self.finished:
            digest, position = self._open.pop(file, None) or (hashlib.sha256(), 0)
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
