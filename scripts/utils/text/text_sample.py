"""Text for training vocabularies: documents streamed from files, and a seeded sample that fits in memory."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from ..core.records import BadRecords, iter_document_batches, list_data_files


@dataclass
class Sample:
    """A uniform sample of texts; `total` and `total_bytes` count what it was drawn from."""

    texts: list[str]
    bytes: int
    total: int
    total_bytes: int


def list_corpus(sources: Sequence[str]) -> list[Path]:
    """All data files that files and folders name. Raises: InputError if there is none."""
    return [path for source in sources for path in list_data_files(source)]


def iter_corpus(paths: Sequence[Path], text_column: str, bad_records: BadRecords) -> Iterator[list[str]]:
    """The documents of some files in batches."""
    for path in paths:
        yield from iter_document_batches(path, text_column=text_column, bad_records=bad_records)


def sample_texts(texts: Iterable[str], max_bytes: int, max_count: int | None, seed: int) -> Sample:
    """Keep a uniform sample of at most `max_bytes` of UTF-8 and `max_count` texts, in the order they came.

    Every text draws a number, and those with the smallest numbers stay; one pass, memory bounded by the sample.
    Raises: InputError if there is no text.
    """
    draw = random.Random(seed).random
    kept: list[tuple[float, int, str]] = []  # the largest number on top
    size = total = total_bytes = 0
    for text in texts:
        length = len(text.encode())
        total, total_bytes, size = total + 1, total_bytes + length, size + length
        heapq.heappush(kept, (-draw(), total, text))
        while kept and (size > max_bytes or (max_count is not None and len(kept) > max_count)):
            size -= len(heapq.heappop(kept)[2].encode())
    if not kept:
        raise InputError("no text in the input" if not total else f"no text of at most {max_bytes} bytes in the input")
    return Sample([text for _, _, text in sorted(kept, key=lambda item: item[1])], size, total, total_bytes)
