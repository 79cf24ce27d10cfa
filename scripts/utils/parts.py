"""Parts of a long run's result, written as they come, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from .files import InputError, remove

logger = logging.getLogger(__name__)


class Parts:
    """A jsonl file: all that decides the result, then the name and the value of each part, as soon as it is there."""

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        """Open it; `overwrite` lets go the parts of a run with other settings.

        Raises: InputError if there are such without it.
        """
        self._path = path
        self._values: dict[str, Any] = {}
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1  # a line behind it was being written when the run was killed
            recorded, rows = self._read(content[:whole].decode("utf-8", "replace"))
            if recorded == settings:
                with open(path, "r+b") as file:
                    file.truncate(whole)
                self._values = rows
                logger.info("going on after %d parts in %s", len(rows), path)
                return
            if not overwrite:
                changed = sorted(name for name in {**recorded, **settings} if recorded.get(name) != settings.get(name))
                raise InputError(
                    f"{path} is of an unfinished run with other {', '.join(changed)}; run that again to go on, pass "
                    "another --output_dir, or --overwrite to replace it"
                )
            remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(settings)

    @staticmethod
    def _read(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings and {name: value}; a file of something else has no settings that agree with any."""
        try:
            first, *rows = [json.loads(line) for line in text.splitlines()]
            return first, {json.dumps(name): value for name, value in rows}
        except (ValueError, TypeError):
            return {"file": "is none of these"}, {}

    def _write(self, row: Any) -> None:
        try:
            with open(self._path, "ab") as file:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        except OSError as error:  # a failed write does not say which file it was
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def get(self, *name: str | int) -> Any:
        """The value of a part, None if it is not there."""
        return self._values.get(json.dumps(name))

    def add(self, value: Any, *name: str | int) -> None:
        """Write a part."""
        self._write([name, value])
        self._values[json.dumps(name)] = value

    def finish(self) -> None:
        """The result stands elsewhere: remove the file."""
        remove(self._path)
