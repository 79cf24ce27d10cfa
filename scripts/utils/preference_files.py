"""Caches of encoded preference pairs and prompts, as data sets, and batches of rows of about the same length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .files import InputError
from .token_cache import TokenStore

# Why records are left out.
DROPS = {
    "empty_prompt": "with an empty question",
    "empty_answer": "with an empty answer",
    "long_prompt": "with a prompt that fills the window",
    "identical": "whose two answers have the same tokens within the window",
}


class PromptFile(TokenStore):
    """Encoded prompts, memory-mapped; a data set whose items are (T,) int64 arrays. See TokenStore.

    Attributes:
        document_hashes: a checksum of each prompt, so that documents.split_documents holds equal ones out together.
        sources: (n,) uint16, the number of each row's source in `source_names`.
        counters: records, a count for each reason in DROPS, answers_removed.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.sources = self._map("sources")
        self.source_names: list[str] = self.meta["source_names"]
        self.counters: dict[str, int] = self.meta["counters"]

    def __len__(self) -> int:
        return self.num_documents

    def _row(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = self.document_ends[index - 1] if index else 0
        return self.tokens[start : self.document_ends[index]].astype(np.int64)

    def __getitem__(self, index: int) -> Any:
        return self._row(index)

    def statistics(self) -> dict[str, Any]:
        """Counts, by source and by reason of being dropped, and the distribution of lengths in tokens."""
        lengths = np.diff(self.document_ends, prepend=0)
        return {**self._counts(), "answers_removed": self.counters["answers_removed"], "prompt": _spread(lengths)}

    def _counts(self) -> dict[str, Any]:
        counts = np.bincount(self.sources, minlength=len(self.source_names)).tolist()
        return {
            "records": self.counters["records"],
            "kept": len(self),
            "dropped": {reason: self.counters[reason] for reason in DROPS},
            "skipped_bad_text": self.skipped,
            "sources": dict(zip(self.source_names, counts, strict=True)),
        }


class Pair(NamedTuple):
    """One encoded pair.

    Attributes:
        prompt, chosen, rejected: (T,) int64 each.
        truncated: whether chosen and rejected were cut and have no end token.
        margin: None if the record gave none.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    truncated: tuple[bool, bool]
    margin: float | None
    source: str


class PreferenceFile(PromptFile):
    """Encoded pairs, memory-mapped; a data set whose items are Pairs. See PromptFile; a document is a whole pair.

    Attributes:
        lengths: (n, 3) int32, tokens of prompt, chosen and rejected.
        truncated: (n, 2) bool, chosen and rejected.
        margins: (n,) float32, NaN where none was given.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.lengths = self._map("lengths").reshape(-1, 3)
        self.truncated = self._map("truncated").reshape(-1, 2)
        self.margins = self._map("margins")

    def __getitem__(self, index: int) -> Pair:
        ids = self._row(index)
        start, length, _ = self.lengths[index].tolist()
        chosen_cut, rejected_cut = self.truncated[index].tolist()
        margin = float(self.margins[index])
        return Pair(
            prompt=ids[:start],
            chosen=ids[start : start + length],
            rejected=ids[start + length :],
            truncated=(chosen_cut, rejected_cut),
            margin=None if math.isnan(margin) else margin,
            source=self.source_names[self.sources[index]],
        )

    def statistics(self) -> dict[str, Any]:
        """Counts, distributions of lengths, and length bias: the share of pairs whose chosen answer is the longer one.

        A reward model that only counts tokens is right on that share (of the pairs that differ in length); half is no
        bias. Lengths are those after cutting.
        """
        lengths: np.ndarray = self.lengths.astype(np.int64)
        prompt, chosen, rejected = lengths[:, 0], lengths[:, 1], lengths[:, 2]
        longer = chosen > rejected
        of_source = {name: longer[self.sources == number] for number, name in enumerate(self.source_names)}
        return {
            **self._counts(),
            "truncated": dict(zip(("chosen", "rejected"), self.truncated.sum(axis=0).tolist(), strict=True)),
            "prompt": _spread(prompt),
            "chosen": _spread(chosen),
            "rejected": _spread(rejected),
            "chosen_longer": float(longer.mean()),
            "same_length": float((chosen == rejected).mean()),
            "mean_length_difference": float((chosen - rejected).mean()),
            "chosen_longer_by_source": {name: float(rows.mean()) for name, rows in of_source.items()},
        }


def _spread(lengths: np.ndarray) -> dict[str, float]:
    names = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}
    values = np.percentile(lengths, list(names.values())).tolist()
    return {**dict(zip(names, values, strict=True)), "mean": float(lengths.mean())}


# ---------------------------------------------------------------- batches


def group_by_length(lengths: np.ndarray, batch_size: int, seed: int, batches_per_group: int = 50) -> list[np.ndarray]:
    """Batches of rows of about the same length, in random order: shuffled, sorted within groups of some batches.

    The batch with the longest row comes first, so that a lack of memory shows at once.

    Args:
        lengths: (n,) tokens of each row, for a pair what one forward pass sees of it.
        batch_size: rows of a batch over all processes; one batch may have fewer.
        seed: another one each epoch.
    Returns: (rows,) int64 each; every row is in one of them.
    """
    if batch_size < 1:
        raise InputError(f"a batch of {batch_size} rows: need at least 1")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    size = batch_size * batches_per_group
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    groups = [group[np.argsort(-np.asarray(lengths)[group], kind="stable")] for group in groups]
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    batches = [batches[number] for number in generator.permutation(len(batches))]
    longest = max(range(len(batches)), key=lambda number: int(lengths[batches[number]].max()), default=0)
    return batches[longest : longest + 1] + batches[:longest] + batches[longest + 1 :]
