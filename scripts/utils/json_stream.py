"""A JSON file read value by value, with only the part in work in memory, and errors that know line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any, NoReturn, cast

CHUNK_CHARACTERS = 1 << 20  # read at a time; a longer value makes the buffer grow
LOOKAHEAD = 16  # characters a cut token (an escape, a literal, a number) may reach back from the end of the buffer
SPACE = re.compile(r"[ \t\r\n]*")


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
    is_list = stream.skip("[")
    while not stream.at_end():
        if is_list and stream.skip("]"):
            if not stream.at_end():
                stream.fail("something follows the end of the list")
            return
        yield stream.read_value()
        if is_list and not stream.skip(",") and not stream.next_is("]"):
            stream.fail("expecting ',' or ']' after a record")
    if is_list:
        stream.fail("the list is not closed by ']'")


class _JsonStream:
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
            else:
                self._count_lines(self.position)
                self.position = end
                return self.line, value

    def fail(self, message: str) -> NoReturn:
        self._count_lines(self.position)
        raise JsonStreamError(message, self.line, self.position - self.line_start + 1)
