"""A streamed answer's text and its calls of functions, told apart as they come."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..text.tool_calls import CallForm, open_call, read_calls


@dataclass(frozen=True)
class CallPiece:
    """What came of a call: its name at first, then text of its arguments."""

    index: int
    name: str | None
    arguments: str


class CallStream:
    """Takes an answer apart that grows; what may still become a call is held back.

    Attributes:
        num_calls: calls that have begun.
    """

    def __init__(self, form: CallForm, several: bool) -> None:
        """`several`: all calls count, else the first alone."""
        self.num_calls = 0
        self._form, self._several = form, several
        self._given = 0  # characters of the answer's own text
        self._start: int | None = None  # where the arguments of the call begin that is being written
        self._place = 0  # how far they were given

    def push(self, text: str, last: bool) -> tuple[str, list[CallPiece]]:
        """What is new with the answer so far: text of its own, and pieces of calls; `last`: it has ended."""
        content, calls = read_calls(text, self._form)
        pieces = []
        for call in calls[self.num_calls - (self._start is not None) :]:
            if self._start is not None:
                pieces += self._go_on(text)
                self._start = None
            elif self._several or not self.num_calls:
                pieces.append(CallPiece(self.num_calls, call.name, call.arguments))
                self.num_calls += 1
        if self._start is None and (begun := open_call(text, self._form)) and (self._several or not self.num_calls):
            name, arguments = begun
            self._start = self._place = len(text) - len(arguments)
            pieces.append(CallPiece(self.num_calls, name, ""))
            self.num_calls += 1
        if self._start is not None:
            pieces += self._go_on(text)
        # Of a call that is cut short its beginning was given already, so it is not text besides.
        certain = content if last and self._start is None else self._before_calls(text)
        shown, self._given = certain[self._given :], max(self._given, len(certain))
        return shown, pieces

    def _go_on(self, text: str) -> list[CallPiece]:
        """What came of the open call's arguments."""
        assert self._start is not None
        try:
            _, end = json.JSONDecoder().raw_decode(text, self._start)
        except (ValueError, RecursionError):
            end = len(text)
        new, self._place = text[self._place : end], max(end, self._place)
        return [CallPiece(self.num_calls - 1, None, new)] if new else []

    def _before_calls(self, text: str) -> str:
        """The text that no call can begin in any more."""
        mark = self._form.mark
        if mark and mark in text:
            return text[: text.index(mark)].rstrip()
        # Without a mark a call is the whole answer; some forms have a list of calls.
        if text.startswith(("{", "[") if self._form.end else "{"):
            return ""
        part = next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)
        return text[: len(text) - part].rstrip()
