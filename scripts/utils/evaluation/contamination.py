"""Contamination: which questions of a benchmark stand, in whole or in part, in files of training data.

A question and a file share an n-gram if so many units in a row agree (rolling_hash: words, or Chinese characters);
case, width, punctuation and spaces do not matter. Data is read as a stream, whatever its layout: txt files as one text
from line to line, of json, jsonl and parquet files all texts in a record. Memory grows with the questions alone.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from ..core.records import BadRecords, iter_records, list_data_files
from .rolling_hash import BOUNDARY, RollingHash, Units, cut_units, join_texts

logger = logging.getLogger(__name__)

# Units in a row that must agree. 13 words: Brown et al. 2020, appendix C; a word is about one and a half characters.
NUM_WORDS, NUM_CHARACTERS = 13, 20
# A question of fewer units than that must agree as a whole; one of fewer than these is too short to tell.
SHORTEST_WORDS, SHORTEST_CHARACTERS = 8, 12
LINE_END = "\n"
MAX_PLACES = 50  # in a benchmark; n-grams that it has more often are its formulas, and no sign of anything
MAX_HITS = 5  # kept of each question
BLOCK = 1 << 18  # characters of data that are looked at together: arrays that fit into a processor's cache
FILTER_BITS = 6  # the filter is open to one n-gram in 2**6 that no question has
LARGEST_FILTER = 27  # bits: 128 MiB


# ---------------------------------------------------------------- what is found


@dataclass(frozen=True)
class Hit:
    """An n-gram that a question shares with the data, as long as it can be.

    Attributes:
        location: file:line where it starts, of a record its first line, in parquet files its row.
        text: the n-gram, as the question spells it.
        share: of the question's units, 0-1.
    """

    location: str
    text: str
    share: float


@dataclass(frozen=True)
class Overlap:
    """What a question shares with the data.

    Attributes:
        hits: the longest n-grams, longest first, at most `max_hits`.
        num_hits: how many there are in all.
        share: of the question's units that stand in any of them, 0-1.
        too_short: the question is too short to tell, or has no n-gram but formulas of the benchmark.
    """

    hits: list[Hit]
    num_hits: int
    share: float
    too_short: bool

    @property
    def is_contaminated(self) -> bool:
        """Whether anything is shared."""
        return self.num_hits > 0


def find_contaminated(
    texts: Sequence[str],
    data: Sequence[str | Path],
    *,
    num_words: int = NUM_WORDS,
    num_characters: int = NUM_CHARACTERS,
    max_hits: int = MAX_HITS,
) -> list[Overlap]:
    """Look for each of `texts` (a question, with its choices) in data files.

    Args:
        data: files or folders (txt, json, jsonl, parquet), of text for pre-training, instructions or anything else.
        num_words, num_characters: units in a row that must agree; the second counts for texts most of whose units are
            characters (Chinese), the first for others.
    Returns: an Overlap for each text, in their order.
    Raises: InputError for data that is not there or broken JSON, with file:line.
    """
    from tqdm import tqdm

    files = [file for name in data for file in list_data_files(Path(name).expanduser())]
    search = _Search(texts, num_words, num_characters, max_hits)
    bad_records = BadRecords("skip")
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="looking for the questions") as bar:
        for file in files:
            left = file.stat().st_size
            for block in _text_blocks(file) if file.suffix.lower() == ".txt" else _record_blocks(file, bad_records):
                search.scan(block)
                # How far the file has been read is not known exactly; the end of it is.
                done = min(left, len(block.text) if block.text.isascii() else len(block.text.encode(errors="replace")))
                bar.update(done)
                left -= done
            bar.update(left)
    if bad_records.skipped:
        logger.warning("%s", bad_records)
    overlaps = search.result()
    logger.info(
        "%d of %d questions share a stretch with %s, %d are too short to tell",
        *(sum(overlap.is_contaminated for overlap in overlaps), len(overlaps), ", ".join(map(str, data))),
        sum(overlap.too_short for overlap in overlaps),
    )
    return overlaps


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Block:
    """Some text of a file.

    Attributes:
        locations: of its records, each of which ends in a BOUNDARY; none: it is a part of a txt file.
        line: of a txt file, the number of the first line.
        is_last: nothing follows that an n-gram could go on into.
    """

    text: str
    path: Path
    locations: list[str] = field(default_factory=list)
    line: int = 1
    is_last: bool = True

    def locate(self, units: Units, number: int) -> str:
        """file:line of a unit of the text."""
        start = int(units.starts[number])
        if self.locations:
            return self.locations[units.text.count(BOUNDARY, 0, start)]
        return f"{self.path}:{self.line + units.text.count(LINE_END, 0, start)}"


def _text_blocks(path: Path) -> Iterator[_Block]:
    """A txt file, cut at the ends of lines; one line that is longer than a block, at a space."""
    line, rest = 1, ""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        while True:
            read = file.read(BLOCK)
            text = rest + read
            cut = (text.rfind(LINE_END) + 1 or text.rfind(" ") + 1 or len(text)) if read else len(text)
            text, rest = text[:cut], text[cut:]
            yield _Block(text, path, line=line, is_last=not read)
            if not read:
                return
            line += text.count(LINE_END)


def _record_blocks(path: Path, bad_records: BadRecords) -> Iterator[_Block]:
    """The records of a json, jsonl or parquet file, each as one text."""
    locations: list[str] = []
    texts: list[str] = []
    size = 0
    for location, record in iter_records(path, bad_records):
        locations.append(location)
        texts.append("\n".join(_iter_texts(record)))
        size += len(texts[-1])
        if size >= BLOCK:
            yield _Block(join_texts(texts), path, locations)
            locations, texts, size = [], [], 0
    yield _Block(join_texts(texts), path, locations)


def _iter_texts(value: Any) -> Iterator[str]:
    """All texts in a record, in their order; names of fields are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _iter_texts(part)


# ---------------------------------------------------------------- searching


@dataclass(frozen=True)
class _Index:
    """All n-grams of one length that questions have, and where.

    Attributes:
        hashes: (K,) ascending.
        places: (K,) of their first units among the units of all questions.
    """

    hashes: np.ndarray
    places: np.ndarray

    def look_up(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All pairs (number of a hash, place in a question) of equal n-grams."""
        # A hash stands as often as there are places; its run is [first, first + count).
        first = np.searchsorted(self.hashes, hashes)
        counts = np.searchsorted(self.hashes, hashes, "right") - first
        numbers: np.ndarray = np.repeat(np.arange(len(hashes)), counts)
        # 0, 1, ... within each run, without a loop over the runs.
        within = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
        return numbers, self.places[np.repeat(first, counts) + within]


@dataclass
class _Found:
    """N-grams of a question: the longest ones, smallest first, and how many there are."""

    num_hits: int = 0
    longest: list[tuple[int, int, int, str]] = field(default_factory=list)  # units, -number, first unit, location


class _Search:
    """Questions, looked for in blocks of data.

    Units of all questions stand in one array, with a BOUNDARY behind each question, so no n-gram reaches into two.
    """

    def __init__(self, texts: Sequence[str], num_words: int, num_characters: int, max_hits: int) -> None:
        for name, value, least in (
            ("num_words", num_words, SHORTEST_WORDS),
            ("num_characters", num_characters, SHORTEST_CHARACTERS),
        ):
            if value < least:
                raise InputError(f"{name} {value}: need at least {least}; fewer in a row are no sign of anything")
        self._max_hits = max_hits
        self._units = cut_units(join_texts(list(texts)))
        ends = np.flatnonzero(self._units.values == cut_units(BOUNDARY).values[0])
        self._starts: np.ndarray = np.append(0, ends + 1)[: len(ends)]
        self._sizes = ends - self._starts
        self._questions: np.ndarray = np.repeat(np.arange(len(texts)), self._sizes + 1)  # (U,)
        characters = np.bincount(self._questions[self._units.singles], minlength=len(texts)) - 1  # no BOUNDARY
        is_chinese = 2 * characters > self._sizes
        is_short = self._sizes < np.where(is_chinese, SHORTEST_CHARACTERS, SHORTEST_WORDS)
        wanted = np.minimum(self._sizes, np.where(is_chinese, num_characters, num_words))
        self._covered: np.ndarray = np.zeros(len(self._questions), bool)
        self._found = [_Found() for _ in texts]
        self._indices = self._build_indices(np.where(is_short, 0, wanted))
        # What a block leaves for the next one of its file: longer than any n-gram, so that each is seen whole.
        self._kept = int(self._sizes.max(initial=0)) + 1
        self._tail: _Block | None = None
        self._num_tail = 0  # its units

    def _build_indices(self, wanted: np.ndarray) -> dict[int, _Index]:
        """{length: its index}, and the filter that all n-grams of data pass first, by their beginnings."""
        hashes = RollingHash(self._units.values)
        place: np.ndarray = np.arange(len(self._questions)) - self._starts[self._questions]
        room = self._sizes[self._questions] - place  # units from here to the question's end
        told: np.ndarray = np.zeros(len(self._sizes), bool)
        indices = {}
        first = []
        for length in sorted({int(length) for length in wanted} - {0}):
            places = np.flatnonzero((wanted[self._questions] == length) & (room >= length))
            found = hashes.at(places, length)
            # A benchmark's formulas ("which of the following is ...") would match everywhere, and say nothing.
            _, numbers, counts = np.unique(found, return_inverse=True, return_counts=True)
            rare = counts[numbers] <= MAX_PLACES
            found, places = found[rare], places[rare]
            order = np.argsort(found, kind="stable")
            indices[length] = _Index(found[order], places[order])
            # One filter for all lengths: every n-gram begins with one of SHORTEST_WORDS, the shortest there is.
            first.append(hashes.at(places, SHORTEST_WORDS))
            told[self._questions[places]] = True
        self.too_short = ~told
        self._beginnings = np.unique(np.concatenate(first)) if first else np.zeros(0, np.uint64)
        # By the highest bits of a hash; nearly all data fails here, at the price of one look-up.
        bits = min(max(len(self._beginnings) - 1, 1).bit_length() + FILTER_BITS, LARGEST_FILTER)
        self._shift = np.uint64(64 - bits)
        self._filter: np.ndarray = np.zeros(1 << bits, bool)
        self._filter[self._beginnings >> self._shift] = True
        return indices

    def scan(self, block: _Block) -> None:
        """Look for the questions in the next block of a file."""
        if self._tail:
            block = replace(block, text=self._tail.text + block.text, line=self._tail.line)
        units = cut_units(block.text)
        for first, length, place in self._runs(units.values):
            end = first + length
            # What ends within the tail has been counted; what reaches the end may go on in the next block.
            if end >= self._num_tail and (end < len(units.values) or block.is_last):
                self._add(length, place, block.locate(units, first))
        self._tail, self._num_tail = None, 0
        if not block.is_last:
            self._num_tail = min(self._kept, len(units.values))
            start = int(units.starts[-self._num_tail]) if self._num_tail else len(units.text)
            line = block.line + units.text.count(LINE_END, 0, start)
            self._tail = replace(block, text=units.text[start:], line=line)

    def _runs(self, values: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(first unit, number of units, place in a question) of all n-grams, each as long as it can be."""
        hashes = RollingHash(values)
        beginnings = hashes.every(SHORTEST_WORDS)
        candidates = np.flatnonzero(self._filter[beginnings >> self._shift])
        if len(candidates) and len(self._beginnings):
            # What passed the filter by chance goes before the n-grams are looked up length by length.
            ranks = np.searchsorted(self._beginnings, beginnings[candidates])
            same = self._beginnings[np.minimum(ranks, len(self._beginnings) - 1)] == beginnings[candidates]
            candidates = candidates[same]
        found = []
        for length, index in self._indices.items():
            possible = candidates[candidates + length <= len(values)]
            numbers, places = index.look_up(hashes.at(possible, length))
            found.append(np.stack([places - possible[numbers], possible[numbers], np.full(len(numbers), length)]))
        if not found or not (pairs := np.concatenate(found, axis=1)).size:
            return
        # On one diagonal (place in the question - place in the data) n-grams that meet are one. A diagonal may pass
        # through several questions, but not without a gap: no n-gram has a BOUNDARY.
        diagonal, first, length = pairs[:, np.lexsort((pairs[1], pairs[0]))]
        new: np.ndarray = np.ones(len(first), bool)
        new[1:] = (diagonal[1:] != diagonal[:-1]) | (first[1:] > (first + length)[:-1])
        starts = np.flatnonzero(new)
        ends = (first + length)[np.append(starts[1:], len(first)) - 1]
        yield from self._extend(
            values, zip(diagonal[starts].tolist(), first[starts].tolist(), ends.tolist(), strict=True)
        )

    def _extend(self, values: np.ndarray, runs: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
        """N-grams (diagonal, first unit, end) as long as they can be, into formulas too, each once."""
        ours, last = self._units.values, (0, -1)
        for diagonal, first, end in runs:
            if last[0] == diagonal and first <= last[1]:
                continue  # an n-gram before reaches as far
            question = self._questions[first + diagonal]
            start = int(self._starts[question])
            stop = start + int(self._sizes[question])
            while first and first + diagonal > start and values[first - 1] == ours[first + diagonal - 1]:
                first -= 1
            while end < len(values) and end + diagonal < stop and values[end] == ours[end + diagonal]:
                end += 1
            last = (diagonal, end)
            yield first, end - first, first + diagonal

    def _add(self, length: int, place: int, location: str) -> None:
        self._covered[place : place + length] = True
        found = self._found[self._questions[place]]
        found.num_hits += 1
        # A heap with the shortest on top; of equal ones the later, so that the first found stay.
        entry = (length, -found.num_hits, place, location)
        heapq.heappush(found.longest, entry)
        if len(found.longest) > self._max_hits:
            heapq.heappop(found.longest)

    def result(self) -> list[Overlap]:
        """What was found, for each question."""
        overlaps = []
        for found, start, size, short in zip(self._found, self._starts, self._sizes, self.too_short, strict=True):
            hits = []
            for length, _, place, location in sorted(found.longest, reverse=True):
                begin, end = self._units.starts[place], self._units.ends[place + length - 1]
                hits.append(Hit(location, self._units.text[begin:end], length / int(size)))
            covered = int(self._covered[start : start + size].sum())
            overlaps.append(Overlap(hits, found.num_hits, covered / max(int(size), 1), bool(short)))
        return overlaps
