"""Files of records and of documents, read as streams: txt, json, jsonl, parquet; errors name file and line."""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, TypeVar, cast

from .errors import InputError
from .files import json_problem

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

CHUNK_CHARACTERS = 1 << 20  # read at a time; a longer value makes the buffer grow
LOOKAHEAD = 16  # characters a cut token (an escape, a literal, a number) may reach back from the end of the buffer
SPACE = re.compile(r"[ \t\r\n]*")


# ---------------------------------------------------------------- JSON, value by value


class JsonStreamError(ValueError):
    """Broken JSON; `line` and `column` count from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.line, self.column = line, column


def iter_json_values(file: IO[str]) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for the elements of one list, or for values that stand one after another.

    Raises: JsonStreamError.
    """
    stream = _JsonStream(file)
    is_list, after_comma = stream.skip("["), False
    while not stream.at_end():
        if is_list and stream.next_is("]"):
            if after_comma:
                stream.fail("a comma before the end of the list; remove it")
            stream.skip("]")
            if not stream.at_end():
                stream.fail("something follows the end of the list")
            return
        yield stream.read_value()
        after_comma = is_list and stream.skip(",")
        if is_list and not after_comma and not stream.next_is("]"):
            stream.fail("expecting ',' or ']' after a record")
    if is_list:
        stream.fail("the list is not closed by ']'")


class _JsonStream:
    """A file as a buffer that is refilled: a list of a million records is never in memory as a whole."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.decoder = json.JSONDecoder()
        self.buffer, self.position, self.complete = "", 0, False
        # `line` is that of buffer[counted]; column 1 lies at buffer[line_start], before the buffer if negative.
        self.line, self.counted, self.line_start = 1, 0, 0

    def _read_more(self) -> None:
        self._count_lines(self.position)
        rest = self.buffer[self.position :]
        # Reading as much again as is held keeps the work linear in the length of a long value.
        more = self.file.read(max(CHUNK_CHARACTERS, len(rest)))
        self.line_start -= self.position
        self.buffer, self.position, self.counted, self.complete = rest + more, 0, 0, not more

    def _count_lines(self, position: int) -> None:
        if breaks := self.buffer.count("\n", self.counted, position):
            self.line += breaks
            self.line_start = self.buffer.rfind("\n", self.counted, position) + 1
        self.counted = position

    def at_end(self) -> bool:
        """Skip white space; whether nothing follows it."""
        while True:
            # A pattern that may be empty always matches.
            self.position = cast(re.Match[str], SPACE.match(self.buffer, self.position)).end()
            if self.position < len(self.buffer) or self.complete:
                return self.position == len(self.buffer)
            self._read_more()

    def next_is(self, character: str) -> bool:
        return not self.at_end() and self.buffer[self.position] == character

    def skip(self, character: str) -> bool:
        """Step over `character` if it comes next."""
        found = self.next_is(character)
        self.position += found
        return found

    def read_value(self) -> tuple[int, Any]:
        self.at_end()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                # At the end of the buffer the value may only be cut; anywhere else it is broken.
                cut = error.msg.startswith("Unterminated") or error.pos + LOOKAHEAD > len(self.buffer)
                if self.complete or not cut:
                    self.position = error.pos
                    self.fail(error.msg)
                self._read_more()
            except (ValueError, RecursionError) as error:
                self.fail(json_problem(error))
            else:
                self._count_lines(self.position)
                self.position = end
                return self.line, value

    def fail(self, message: str) -> NoReturn:
        self._count_lines(self.position)
        raise JsonStreamError(message, self.line, self.position - self.line_start + 1)


# ---------------------------------------------------------------- files and bad records

TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
RECORD_SUFFIXES = (".json", ".jsonl", ".parquet")
READ_BYTES = 4 << 20  # bytes of text handled at a time: large enough to be fast, small enough to keep memory flat

OnBadRecord = Literal["error", "skip"]
MAX_NAMED = 5  # of many alike (skipped records, files that are not read), named in messages


def list_data_files(path: str | Path, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[Path]:
    """The data files that `path` names: itself, or all below a folder, recursive and sorted, hidden ones left out.

    Linked folders are followed, each folder is read once. Files of other kinds are named in a warning.
    Raises: InputError if nothing is there, or a link leads nowhere.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise InputError(f"{path}: cannot read '{path.suffix}' files here; need one of {', '.join(suffixes)}")
        return [path]
    if not path.is_dir():
        raise InputError(f"data not found: {path}")
    every = sorted(_iter_visible_files(path))
    found = [item for item in every if item.suffix.lower() in suffixes]
    others = [str(item.relative_to(path)) for item in every if item.suffix.lower() not in suffixes]
    names = ", ".join(others[:MAX_NAMED]) + (", ..." if len(others) > MAX_NAMED else "")
    if not found:
        there = f"; there are {names}" if others else ""
        raise InputError(f"no {', '.join(suffixes)} files below {path}{there}")
    if others:
        logger.warning("%s: %d files are not read, being no %s: %s", path, len(others), ", ".join(suffixes), names)
    return found


def _refuse_folder(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}")


def _iter_visible_files(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()  # real paths: links may lead to a folder that is read anyway, or round in a circle
    for place, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        if (real := os.path.realpath(place)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            if not (path := Path(place) / name).exists():
                raise InputError(f"{path}: a link that leads nowhere; repair or remove it")
            yield path


@dataclass
class BadRecords:
    """What to do with a line or record that cannot be used: raise the error, or skip and count it.

    Attributes:
        policy: the value of --on_bad_record; None: an error, of a script that has no such flag.
        problems: the first few of what was skipped, each "file:line: reason".
    """

    policy: OnBadRecord | None = None
    skipped: int = 0
    problems: list[str] = field(default_factory=list)

    def handle(self, problem: str) -> None:
        """Raises: InputError unless the policy is "skip"."""
        if self.policy != "skip":
            remedy = "; repair it, or pass --on_bad_record skip to leave it out" if self.policy else ""
            raise InputError(f"{problem}{remedy}")
        self.add(1, [problem])

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the InputError of this block, which names file and line."""
        try:
            yield
        except InputError as error:
            self.handle(str(error))

    def add(self, skipped: int, problems: Iterable[str]) -> None:
        """Count what another reader (a worker process) skipped."""
        self.skipped += skipped
        self.problems = [*self.problems, *problems][:MAX_NAMED]

    def __str__(self) -> str:
        """For the log."""
        return f"skipped {self.skipped} bad records, the first: {'; '.join(self.problems)}"


# ---------------------------------------------------------------- files in other encodings

SAMPLE_BYTES = 1 << 16
COMMON_SHARE = 0.8  # of the characters beyond ASCII; in a wrong encoding about a third are common by chance


def check_encoding(path: Path) -> None:
    """To be called where text is not as it should be. Raises: InputError if the whole file is in another encoding.

    Also under "skip": what would be skipped is the file.
    """
    if encoding := _guess_encoding(path, path.stat().st_mtime_ns):
        raise InputError(
            f"{path}: the whole file seems to be in {encoding}, need UTF-8; convert it: "
            f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > NEW_FILE"
        )


@functools.lru_cache(maxsize=8)  # a file with many bad lines asks for each
def _guess_encoding(path: Path, changed: int) -> str | None:
    """iconv's name of the encoding of a file that is not UTF-8, from its beginning; None if it cannot be told."""
    with open(path, "rb") as file:
        sample = file.read(SAMPLE_BYTES)
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    lines = [line for line in sample.split(b"\n") if not line.isascii()]
    # Each line break of UTF-16 has a zero byte.
    if b"\0" not in sample and 2 * sum(_decode(line, "utf-8") is not None for line in lines) >= len(lines):
        return None  # single lines are bad
    names = ["UTF-16LE", "UTF-16BE"] if b"\0" in sample else ["GB18030", "BIG5"]
    shares = {name: _share_of_common(_decode(sample, name)) for name in names}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= COMMON_SHARE else None


def _decode(sample: bytes, encoding: str) -> str | None:
    """The text, which may end within a character; None if it is not in this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return None


def _share_of_common(text: str | None) -> float:
    """The share of the characters beyond ASCII that are common in Chinese texts."""
    if text is None:
        return 0.0
    characters = [character for character in text if not character.isascii() or character == "\0"]
    common = _common_characters()
    return sum(character in common for character in characters) / len(characters) if characters else 1.0


@functools.cache
def _common_characters() -> frozenset[str]:
    """Punctuation, and the characters that GB 2312 and Big5 have in their first levels, those in common use."""
    simplified = (bytes((row, cell)) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    traditional = (bytes((row, cell)) for row in range(0xA4, 0xC7) for cell in range(0x40, 0xFF))
    characters = {pair.decode("gb2312", "ignore") for pair in simplified}
    characters |= {pair.decode("big5", "ignore") for pair in traditional}
    ranges = ((0x2010, 0x2028), (0x3000, 0x3040), (0xFF00, 0xFFF0))
    return frozenset(characters) | {chr(code) for start, end in ranges for code in range(start, end)}


# ---------------------------------------------------------------- documents


def iter_document_batches(
    path: str | Path,
    *,
    text_column: str = "text",
    document_separator: str | None = None,
    bad_records: BadRecords | None = None,
    byte_range: tuple[int, int] | None = None,
) -> Iterator[list[str]]:
    """Yield the documents of one file in lists of about READ_BYTES of text. Blank documents are left out.

    Args:
        text_column: the field that holds the text in json, jsonl and parquet files.
        document_separator: in txt files, the exact line that ends a document; None makes every line a document.
        byte_range: (start, end) of a txt file: only documents whose first byte lies in it (lines only, no separator),
            so ranges that adjoin give every document once.
    Raises: InputError with file:line for broken JSON, a field that is missing or null, or invalid UTF-8.
    """
    path, bad_records = Path(path), bad_records or BadRecords()
    if path.suffix.lower() == ".txt":
        if document_separator is None:
            yield from _iter_line_batches(path, bad_records, byte_range or (0, path.stat().st_size))
        else:
            yield from _batched(_iter_separated_documents(path, document_separator, bad_records))
    else:
        yield from _batched(_iter_record_texts(path, text_column, bad_records))


def _iter_line_batches(path: Path, bad_records: BadRecords, byte_range: tuple[int, int]) -> Iterator[list[str]]:
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
                lines = _decode_lines(path, position, block, bad_records)
            if texts := [text for line in lines if (text := line.rstrip("\r")) and not text.isspace()]:
                yield texts


def _decode_lines(path: Path, position: int, block: bytes, bad_records: BadRecords) -> list[str]:
    """Decode a block line by line to find (and report or skip) the lines that are not UTF-8."""
    with open(path, "rb") as file:
        number = sum(piece.count(b"\n") for piece in iter_blocks(file, position))
    lines = []
    for raw in block.split(b"\n"):
        number += 1
        line = _decode_line(raw, path, number, bad_records)
        if line is not None:
            lines.append(line)
    return lines


def _decode_line(raw: bytes, path: Path, number: int, bad_records: BadRecords) -> str | None:
    """One line as text, a byte order mark at the start of the file removed; None if it is to be skipped."""
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        check_encoding(path)
        bad_records.handle(f"{path}:{number}: invalid UTF-8 (byte {error.start + 1} of the line)")
        return None


def iter_blocks(file: IO[bytes], count: int) -> Iterator[bytes]:
    """The next `count` bytes of an open file, in blocks."""
    while count > 0 and (block := file.read(min(READ_BYTES, count))):
        count -= len(block)
        yield block


def _iter_separated_documents(path: Path, separator: str, bad_records: BadRecords) -> Iterator[str]:
    lines: list[str] = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decode_line(raw.rstrip(b"\r\n"), path, number, bad_records)
            if line == separator:
                yield "\n".join(lines)
                lines = []
            elif line is not None:
                lines.append(line)
    yield "\n".join(lines)


def _iter_record_texts(path: Path, text_column: str, bad_records: BadRecords) -> Iterator[str]:
    for location, record in iter_records(path, bad_records, columns=[text_column]):
        text = record.get(text_column)
        if isinstance(text, str):
            yield text
            continue
        if text_column in record:
            problem = f"is {'null' if text is None else type(text).__name__}, not text"
        else:
            problem = f"is missing; the record has {sorted(record)}; pass --text_column"
        bad_records.handle(f"{location}: field '{text_column}' {problem}")


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


# ---------------------------------------------------------------- files of records


def iter_records(
    path: str | Path, bad_records: BadRecords | None = None, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location, record) for every record of a json, jsonl or parquet file, read as a stream.

    A json file may hold one list, or objects one after another. The location is "file:line" of the record's first
    line, in parquet files "file: row 3".

    Args:
        columns: of a parquet file, read only these (all, if one of them is absent, so that errors can name them).
    Raises: InputError (unless skipped) for broken JSON, a record that is not an object, or invalid UTF-8; always for
        a broken json file and for one in another encoding.
    """
    path, bad_records = Path(path), bad_records or BadRecords()
    suffix = path.suffix.lower()
    if suffix not in RECORD_SUFFIXES:
        raise InputError(f"{path}: need records in one of {', '.join(RECORD_SUFFIXES)}")
    if suffix == ".parquet":
        records = _iter_parquet(path, columns, bad_records)
    else:
        records = _iter_jsonl(path, bad_records) if suffix == ".jsonl" else _iter_json(path)
    for location, record in records:
        if not isinstance(record, dict):
            bad_records.handle(f"{location}: need an object with named fields, got {type(record).__name__}")
        elif problem := _text_problem(record):
            if suffix == ".json":
                check_encoding(path)
            bad_records.handle(f"{location}: {problem}")
        else:
            yield location, record


def text_field(record: Mapping[str, Any], name: str, location: str) -> str:
    """A field that has to hold text, without white space around it. Raises: InputError."""
    value = record.get(name)
    if name == "id" and isinstance(value, int):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        found = f"is {value!r:.40}" if name in record else "is missing"
        raise InputError(f"{location}: field '{name}' {found}, need text; the record has {', '.join(sorted(record))}")
    return value.strip()


def spread_evenly(items: Sequence[Item], most: int | None) -> list[Item]:
    """At most so many of them, the first and then at equal distances; None: all."""
    count = len(items) if most is None else min(most, len(items))
    return [items[rank * len(items) // count] for rank in range(count)]


def _text_problem(record: dict[str, Any]) -> str | None:
    """What keeps the texts of a record from being used; None: nothing."""
    try:
        if _is_unicode(record):
            return None
    except RecursionError as error:
        return json_problem(error)
    return "text that is not valid Unicode (invalid UTF-8, or half a surrogate pair)"


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


def _iter_jsonl(path: Path, bad_records: BadRecords) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decode_line(raw, path, number, bad_records)
            if line is None or not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                check_encoding(path)
                bad_records.handle(f"{path}:{number}: broken JSON: {json_problem(error)}")
            else:
                yield f"{path}:{number}", record


def _iter_json(path: Path) -> Iterator[tuple[str, Any]]:
    # Invalid bytes become lone surrogates, which iter_records finds in the record that holds them.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            # One list, or objects one after another: many ".json" data sets are really one object a line.
            for line, value in iter_json_values(file):
                yield f"{path}:{line}", value
        except JsonStreamError as error:
            check_encoding(path)
            raise InputError(f"{path}:{error.line}: broken JSON: {error} (column {error.column})") from None


def _iter_parquet(path: Path, columns: Sequence[str] | None, bad_records: BadRecords) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = set(file.schema_arrow.names)
            chosen = list(columns) if columns and known.issuperset(columns) else None
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=chosen):
                for record in _batch_records(batch):
                    number += 1
                    if record is None:
                        bad_records.handle(f"{path}: row {number}: invalid UTF-8")
                    else:
                        yield f"{path}: row {number}", record
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a readable parquet file: {error}") from None


def _batch_records(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a pyarrow.RecordBatch; None for one with bytes in a text that are no UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                yield None
