"""Files: output that is complete or absent, one run at a time, JSON, and hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from .errors import InputError, Unfinished

HashName = Literal["sha256", "blake3"]  # BLAKE3 takes a third of the time

logger = logging.getLogger(__name__)

RESUME_KEY = ".resume_key"


# ---------------------------------------------------------------- output: complete or absent


def fsync_path(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial_name(path: Path) -> Path:
    # A sibling, so that the final rename stays within one file system and is atomic.
    return path.with_name(f".{path.name}.partial")


def remove(path: str | Path) -> None:
    """Remove a file or folder; nothing happens if it is absent."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a temporary sibling of `path` for writing; it takes the name `path` only when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(path)
    try:
        with open(partial, mode, encoding="utf-8" if mode == "w" else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_path(path.parent)
    except BaseException:
        remove(partial)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False, resume_key: str | None = None) -> Iterator[Path]:
    """Yield an empty sibling folder that becomes `path` only when the block ends well; hidden files are left out.

    What a killed run left under the sibling's name is removed first, unless it was made for the same `resume_key`:
    then the block gets it back as it is. Ctrl-C and Unfinished leave such a folder too, other errors do not.
    The old folder stays until the new one is complete.
    Raises: InputError if `path` holds anything and `overwrite` is False, or another run is writing it.
    """
    refuse_existing_output(path, overwrite)
    path = Path(path).resolve()  # a link's target, not the link, is what is written
    partial = _partial_name(path)
    with locked(partial.with_name(f"{partial.name}.lock")) as held:
        if not held:
            raise InputError(f"another run is writing {partial}; wait for it, or pass another --output_dir")
        partial.mkdir(exist_ok=True)
        if resume_key is None or unfinished_folder(path, resume_key) is None:
            for item in partial.iterdir():
                remove(item)
            if resume_key is not None:
                (partial / RESUME_KEY).write_text(resume_key)
        try:
            yield partial
            for item in partial.iterdir():
                if item.name.startswith("."):
                    remove(item)
            for item in partial.rglob("*"):
                if item.is_file():
                    fsync_path(item)
            _publish(partial, path)
        except BaseException as error:
            if resume_key is None or not isinstance(error, (KeyboardInterrupt, Unfinished)):
                remove(partial)
            raise


def unfinished_folder(path: str | Path, resume_key: str) -> Path | None:
    """The folder that an interrupted `atomic_folder` of the same key left, if there is one."""
    key = _partial_name(Path(path).resolve()) / RESUME_KEY
    return key.parent if key.is_file() and key.read_text() == resume_key else None


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file `path` during the block; where another has it, wait, or yield False.

    The system lets go of it when the process ends, however that ends. The file is gone afterwards.
    """
    from filelock import FileLock, Timeout  # here: 0.1 s that --help need not take

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            yield False
            return
        logger.info("waiting for the process that holds %s", path)
        lock.acquire()
    except OSError as error:
        if error.filename is not None:
            raise  # it cannot be made; otherwise this file system has no locks
    try:
        yield True
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)  # while it is held: who gets a removed file tries again
            lock.release()


class HeldFolder:
    """A folder that this process alone writes, for as long as it lives or until `release`.

    The lock stands beside the folder, `.<name>.lock`, and says whose it is. The system lets go of it when the process
    ends, however that ends. A process may take again what it holds.
    """

    def __init__(self, folder: str | Path, flag: str = "--output_dir") -> None:
        """Raises: InputError naming `flag` and, where it is known, the process that holds the folder."""
        from filelock import FileLock, Timeout

        path = Path(folder).resolve()
        path = path.with_name(f".{path.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, is_singleton=True)
        try:
            lock.acquire(blocking=False)
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except Timeout:
            holder = path.read_text(encoding="utf-8", errors="replace").strip()
            raise InputError(
                f"{flag} {folder}: another run is writing it ({holder or 'an unknown process'}); wait for it, or pass "
                "another folder"
            ) from None
        except OSError as error:
            if error.filename is not None:
                raise  # it cannot be made; otherwise this file system has no locks
        self.release = weakref.finalize(self, _let_go, lock, path)  # at the latest when the process ends


def _let_go(lock: Any, path: Path) -> None:
    if lock.lock_counter == 1:
        path.unlink(missing_ok=True)  # while it is held, as in locked
    lock.release()


def _publish(partial: Path, path: Path) -> None:
    """Give a complete folder its name."""
    old = path.with_name(f".{path.name}.replaced")
    if path.exists():
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except OSError:
            os.rename(old, path)
            raise
        remove(old)
    else:
        os.rename(partial, path)
    fsync_path(path.parent)


def refuse_existing_output(path: str | Path, overwrite: bool = False) -> None:
    """Check an output folder's name. What a run killed while it replaced the folder left aside is put back first.

    Raises: InputError if `path` is a file, holds the current folder, or holds anything unless `overwrite` is set.
    """
    name, path = path, Path(path).resolve()
    if path == Path.cwd() or path in Path.cwd().parents:
        raise InputError(f"--output_dir {name} is the current folder or holds it; pass the name of a new folder")
    old = path.with_name(f".{path.name}.replaced")
    if old.is_dir():
        remove(old) if path.exists() else os.rename(old, path)
    if path.is_file():
        raise InputError(f"--output_dir {name} is a file; pass the name of a new folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"output folder {name} is not empty; pass another --output_dir, or --overwrite to replace it")


@contextlib.contextmanager
def named_write_errors(path: str | Path) -> Iterator[None]:
    """Let an OSError of the block name `path`: a write that fails, unlike an open, does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    with atomic_file(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """Read one JSON value. Raises: InputError naming file and line if it is absent or broken."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"file not found: {path}")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: broken JSON: {json_problem(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken JSON: {json_problem(error)}") from None


def json_problem(error: ValueError | RecursionError) -> str:
    """What is wrong with JSON, of all that Python's decoder raises."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    # A number of thousands of digits is the other one.
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


# Of a JSON object, by name: whether a value can be read, and what is needed.
Fields = Mapping[str, tuple[Callable[[Any], bool], str]]


def read_object(path: str | Path, fields: Fields | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        fields: those that are looked at; one that is absent or null can always be read.
    Raises: InputError as read_json, for any other value, and for a field that holds what it cannot.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: need an object, got {type(value).__name__}")
    for name, (fits, need) in (fields or {}).items():
        if value.get(name) is not None and not fits(value[name]):
            raise InputError(f"{path}: {name} {value[name]!r:.80}: need {need}")
    return value


def is_list_of(kind: type) -> Callable[[Any], bool]:
    """Whether a value is a list of such values, for read_object."""
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


def read_text(path: str | Path) -> str:
    """A file's text, without a byte order mark. Raises: InputError if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None


# ---------------------------------------------------------------- hashes


def new_hash(kind: HashName) -> Any:
    """An object with update() and hexdigest(). Raises: InputError if the package of BLAKE3 is not installed."""
    if kind == "sha256":
        return hashlib.sha256()
    try:
        from blake3 import blake3
    except ImportError:
        raise InputError("--hash blake3: the package is not installed; pip install blake3") from None
    return blake3()


def hash_file(path: str | Path, kind: HashName = "sha256") -> str:
    """SHA-256, or another hash, of a file's bytes, in hexadecimal. Raises: as new_hash."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, partial(new_hash, kind)).hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
