"""Passages and their embeddings in one SQLite file."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Passage:
    """A piece of a document; `number` counts from 1 within it."""

    file: str
    number: int
    text: str
    score: float = 0.0  # nearness to the question, 1 at most


class Store:
    """What ingest.py writes and ask.py searches."""

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path)
        self._database.execute("CREATE TABLE IF NOT EXISTS files (file TEXT PRIMARY KEY, sha256 TEXT, model TEXT)")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS passages (file TEXT, number INTEGER, text TEXT, vector BLOB)"
        )

    def files(self) -> dict[str, tuple[str, str]]:
        """SHA-256 and embedding model of each file that is in the store."""
        rows = self._database.execute("SELECT file, sha256, model FROM files")
        return {file: (sha256, model) for file, sha256, model in rows}

    def replace(
        self, file: str, sha256: str, model: str, texts: Sequence[str], vectors: Sequence[Sequence[float]]
    ) -> None:
        """Put a file's passages in the place of those it had; all of them or none."""
        with self._database:  # a transaction
            self._delete(file)
            self._database.execute("INSERT INTO files VALUES (?, ?, ?)", (file, sha256, model))
            self._database.executemany(
                "INSERT INTO passages VALUES (?, ?, ?, ?)",
                [
                    (file, number, text, np.asarray(vector, dtype=np.float32).tobytes())
                    for number, (text, vector) in enumerate(zip(texts, vectors, strict=True), 1)
                ],
            )

    def remove(self, file: str) -> None:
        """Forget a file."""
        with self._database:
            self._delete(file)

    def _delete(self, file: str) -> None:
        self._database.execute("DELETE FROM files WHERE file = ?", (file,))
        self._database.execute("DELETE FROM passages WHERE file = ?", (file,))

    def search(self, vector: Sequence[float], k: int) -> list[Passage]:
        """The k passages nearest to a vector, by cosine similarity, the nearest first."""
        rows = self._database.execute("SELECT file, number, text, vector FROM passages").fetchall()
        if not rows:
            return []
        matrix = np.stack([np.frombuffer(row[3], dtype=np.float32) for row in rows])
        query = np.asarray(vector, dtype=np.float32)
        scores = matrix @ query / (np.linalg.norm(matrix, axis=1) * np.linalg.norm(query))
        return [Passage(*rows[index][:3], float(scores[index])) for index in np.argsort(-scores)[:k]]

    def close(self) -> None:
        """Close the file."""
        self._database.close()
