"""Files: atomic output, hashes, and reading txt, json, jsonl and parquet with errors that name file and line."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from .json_stream import JsonStreamError, iter_json_values

TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
RECORD_SUFFIXES = (".json", ".jsonl", ".parquet")
READ_BYTES = 4 << 20  # bytes of text handled at a time: large enough to be fast, small enough to keep memory flat
RESUME_KEY = ".resume_key"
MAX_LOCATIONS = 5  # of skipped rows named in the log


class InputError(ValueError):
    """A mistake in the user's input: scripts print its message without a traceback and exit with status 2."""


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
    then the block gets it back as it is. Ctrl-C leaves such a folder too, other errors do not.
    The old folder stays until the new one is complete.
    Raises: InputError if `path` holds anything and `overwrite` is False, or another run is writing it.
    """
    refuse_existing_output(path, overwrite)
    path = Path(path).resolve()  # a link's target, not the link, is what is written
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked_folder(_partial_name(path)) as partial:
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
            if resume_key is None or not isinstance(error, KeyboardInterrupt):
                remove(partial)
            raise


def unfinished_folder(path: str | Path, resume_key: str) -> Path | None:
    """The folder that an interrupted `atomic_folder` of the same key left, if there is one."""
    key = _partial_name(Path(path).resolve()) / RESUME_KEY
    return key.parent if key.is_file() and key.read_text() == resume_key else None


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[Path]:
    """`folder`, made if it is absent, for this process alone. Raises: InputError if another one has it."""
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another run is writing {folder}; wait for it, or pass another --output_dir"
                ) from None
            except OSError:
                pass  # this file system has no locks
            if not folder.is_dir() or os.stat(folder).st_ino != os.fstat(descriptor).st_ino:
                continue  # the run that had it has just ended
            yield folder
            return
        finally:
            os.close(descriptor)


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
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None


# ---------------------------------------------------------------- hashes


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# ---------------------------------------------------------------- input


def list_data_files(path: str | Path, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[Path]:
    """The data files that `path` names: itself, or all below a folder, recursive and sorted, hidden ones left out.

    Raises: InputError if nothing is there.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise InputError(f"{path}: cannot read '{path.suffix}' files here; need one of {', '.join(suffixes)}")
        return [path]
    if not path.is_dir():
        raise InputError(f"data not found: {path}")
    found = [item for item in path.rglob("*") if item.is_file() and item.suffix.lower() in suffixes]
    found = sorted(item for item in found if not any(part.startswith(".") for part in item.relative_to(path).parts))
    if not found:
        raise InputError(f"no {', '.join(suffixes)} files below {path}")
    return found


@dataclass
class BadText:
    """What to do with text that is not UTF-8 (or holds a lone surrogate): raise an error, or skip and count it."""

    policy: Literal["error", "skip"] = "error"
    skipped: int = 0
    locations: list[str] = field(default_factory=list)  # the first few, for the log

    def handle(self, location: str, reason: str) -> None:
        """Raises: InputError under the policy "error"."""
        if self.policy == "error":
            raise InputError(f"{location}: {reason}; repair the line, or pass --on_bad_text skip to leave it out")
        self.add(1, [location])

    def add(self, skipped: int, locations: Iterable[str]) -> None:
        """Count what another reader (a worker process) skipped."""
        self.skipped += skipped
        self.locations = [*self.locations, *locations][:MAX_LOCATIONS]


def iter_document_batches(
    path: str | Path,
    *,
    text_column: str = "text",
    document_separator: str | None = None,
    bad_text: BadText | None = None,
    byte_range: tuple[int, int] | None = None,
) -> Iterator[list[str]]:
    """Yield the documents of one file in lists of about READ_BYTES of text. Blank documents are left out.

    Args:
        text_column: the field that holds the text in json, jsonl and parquet files.
        document_separator: in txt files, the exact line that ends a document; None makes every line a document.
        byte_range: (start, end) of a txt file: only documents whose first byte lies in it (lines only, no separator),
            so ranges that adjoin give every document once.
    Raises: InputError with file:line for broken JSON, a missing field, or invalid UTF-8.
    """
    path, bad_text = Path(path), bad_text or BadText()
    if path.suffix.lower() == ".txt":
        if document_separator is None:
            yield from _iter_line_batches(path, bad_text, byte_range or (0, path.stat().st_size))
        else:
            yield from _batched(_iter_separated_documents(path, document_separator, bad_text))
    else:
        yield from _batched(_iter_record_texts(path, text_column, bad_text))


def _iter_line_batches(path: Path, bad_text: BadText, byte_range: tuple[int, int]) -> Iterator[list[str]]:
    start, end = byte_range
    with open(path, "rb") as file:
        if start > 0:
            file.seek(start - 1)
            file.readline()  # the line that began before the range belongs to the previous one
        while (position := file.tell()) < end:
            block = file.read(min(READ_BYTES, end - position))
            if not block:
                break  # the file is shorter than the range
            if not block.endswith(b"\n"):
                block += file.readline()
            try:
                lines = block.decode("utf-8-sig" if position == 0 else "utf-8").split("\n")
            except UnicodeDecodeError:
                lines = _decode_lines(path, position, block, bad_text)
            if texts := [text for line in lines if (text := line.rstrip("\r")) and not text.isspace()]:
                yield texts


def _decode_lines(path: Path, position: int, block: bytes, bad_text: BadText) -> list[str]:
    """Decode a block line by line to find (and report or skip) the lines that are not UTF-8."""
    with open(path, "rb") as file:
        number = sum(piece.count(b"\n") for piece in iter_blocks(file, position))
    lines = []
    for raw in block.split(b"\n"):
        number += 1
        line = _decode_line(raw, f"{path}:{number}", number == 1, bad_text)
        if line is not None:
            lines.append(line)
    return lines


def _decode_line(raw: bytes, location: str, first: bool, bad_text: BadText) -> str | None:
    """One line as text, a byte order mark at the start of the file removed; None if it is to be skipped."""
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        bad_text.handle(location, f"invalid UTF-8 (byte {error.start + 1} of the line)")
        return None


def iter_blocks(file: IO[bytes], count: int) -> Iterator[bytes]:
    """The next `count` bytes of an open file, in blocks."""
    while count > 0 and (block := file.read(min(READ_BYTES, count))):
        count -= len(block)
        yield block


def _iter_separated_documents(path: Path, separator: str, bad_text: BadText) -> Iterator[str]:
    lines: list[str] = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decode_line(raw.rstrip(b"\r\n"), f"{path}:{number}", number == 1, bad_text)
            if line == separator:
                yield "\n".join(lines)
                lines = []
            elif line is not None:
                lines.append(line)
    yield "\n".join(lines)


def _iter_record_texts(path: Path, text_column: str, bad_text: BadText) -> Iterator[str]:
    for location, record in iter_records(path, bad_text, columns=[text_column]):
        text = record.get(text_column)
        if not isinstance(text, str):
            raise InputError(
                f"{location}: field '{text_column}' is {'missing' if text is None else 'not a string'}; "
                f"the record has {sorted(record)}; pass --text_column"
            )
        yield text


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        if not text or text.isspace():
            continue
        batch.append(text)
        # A character outside ASCII is counted as three bytes, as Chinese ones are.
        size += len(text) if text.isascii() else 3 * len(text)
        if size >= READ_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def iter_records(
    path: str | Path, bad_text: BadText | None = None, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location, record) for every record of a json, jsonl or parquet file, read as a stream.

    A json file may hold one list, or objects one after another. The location is "file:line" of the record's first
    line, in parquet files "file: row 3".

    Args:
        columns: of a parquet file, read only these (all, if one of them is absent, so that errors can name them).
    Raises: InputError for broken JSON, a record that is not an object, or (policy "error") invalid UTF-8.
    """
    path, bad_text = Path(path), bad_text or BadText()
    if path.suffix.lower() not in RECORD_SUFFIXES:
        raise InputError(f"{path}: need records in one of {', '.join(RECORD_SUFFIXES)}")
    if path.suffix.lower() == ".parquet":
        records = _iter_parquet(path, columns)
    else:
        records = _iter_jsonl(path, bad_text) if path.suffix.lower() == ".jsonl" else _iter_json(path)
    for location, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{location}: need an object with named fields, got {type(record).__name__}")
        if not _is_unicode(record):
            bad_text.handle(location, "text that is not valid Unicode (invalid UTF-8, or half a surrogate pair)")
            continue
        yield location, record


def _is_unicode(value: Any) -> bool:
    # JSON can spell half a surrogate pair (backslash-u d800); such a string cannot be written as UTF-8 later.
    if isinstance(value, str):
        try:
            return value.isascii() or bool(value.encode())
        except UnicodeEncodeError:
            return False
    if isinstance(value, dict):
        return all(map(_is_unicode, value)) and all(map(_is_unicode, value.values()))
    return all(map(_is_unicode, value)) if isinstance(value, list) else True


def _iter_jsonl(path: Path, bad_text: BadText) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            location = f"{path}:{number}"
            line = _decode_line(raw, location, number == 1, bad_text)
            if line is None or not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{location}: broken JSON: {error.msg} (column {error.colno})") from None
            yield location, record


def _iter_json(path: Path) -> Iterator[tuple[str, Any]]:
    # Invalid bytes become lone surrogates, which iter_records finds in the record that holds them.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            # One list, or objects one after another: many ".json" data sets are really one object a line.
            for line, value in iter_json_values(file):
                yield f"{path}:{line}", value
        except JsonStreamError as error:
            raise InputError(f"{path}:{error.line}: broken JSON: {error} (column {error.column})") from None


def _iter_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = set(file.schema_arrow.names)
            chosen = list(columns) if columns and known.issuperset(columns) else None
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=chosen):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a readable parquet file: {error}") from None


# ---------------------------------------------------------------- memory


def peak_resident_bytes() -> int:
    """The most memory this process has held."""
    status = Path("/proc/self/status")
    if status.is_file() and (line := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(line[1]) * 1024  # ru_maxrss would count what the parent held when it started this process
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
