"""Streams: output files written and hashed in the background while the next bytes are computed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


class FileWriter:
    """A file that is written once, from its first byte to its last, and hashed on the way.

    `write` takes any object with the buffer protocol, which must not change afterwards.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.size = 0
        self._file = open(self.path, "wb")  # noqa: SIM115 (closed by close)
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self.size += len(view)

    def close(self) -> str:
        """Finish the file. Returns: its SHA-256 in hexadecimal. Raises: OSError naming the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abort(self) -> None:
        """Stop writing after an error elsewhere; the file is incomplete."""
        self._file.close()
