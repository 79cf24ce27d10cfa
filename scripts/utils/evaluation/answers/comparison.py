"""Models' answers to the same questions: mean scores with intervals, and what changed from the first model to another.

Scores of one answer are 0-1; what is written into result files is in percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..intervals import paired_difference, sum_spread, wilson_interval
from ..result_files import SHARES
from .scores import METRICS

Scores = Mapping[str, float]  # of an answer, by metric
Change = int  # 1 better, 0 the same, -1 worse
FEW = 20  # questions; of fewer a difference is hardly more than chance
SAME_WITHIN = 0.05  # how far graded scores of answers that count as equally good may differ


def mean_scores(scores: Sequence[Scores]) -> dict[str, dict[str, Any]]:
    """{metric: "score", its 95 % "interval" (None of too few questions), and the "questions" it speaks of}."""
    return {
        name: _mean(name, values)
        for name in METRICS
        if (values := [answer[name] for answer in scores if name in answer])
    }


def _mean(metric: str, values: Sequence[float]) -> dict[str, Any]:
    count, mean = len(values), sum(values) / len(values)
    if metric in SHARES:
        interval: list[float] | None = list(wilson_interval(round(sum(values)), count))
    else:
        spread = sum_spread((np.array(values) - mean) / count)
        interval = None if spread is None else [max(mean - spread, 0.0), min(mean + spread, 1.0)]
    return {"score": 100 * mean, "interval": _percent(interval), "questions": count}


def change_of(metric: str, first: Scores, other: Scores) -> Change | None:
    """Whether the other answer is better than the first; None where the metric says nothing of the question."""
    if metric not in first:
        return None
    difference = other[metric] - first[metric]
    # Shares are 0 or 1; a graded score also moves with words that say the same.
    if metric not in SHARES and abs(difference) <= SAME_WITHIN:
        return 0
    return 1 if difference > 0 else -1 if difference < 0 else 0


def compare(metric: str, first: Sequence[Scores], other: Sequence[Scores]) -> dict[str, Any]:
    """What changed between two models' answers to the same questions, by one metric.

    Returns: how many are better, worse and the same; the difference of the means with its paired 95 % interval (None
        of too few questions); the two-sided exact p-value of the sign test on better and worse (of shares, McNemar's).
    """
    pairs = [(a[metric], b[metric]) for a, b in zip(first, other, strict=True) if metric in a]
    counts = count_changes(change_of(metric, a, b) for a, b in zip(first, other, strict=True))
    if not pairs:
        return counts
    mean, (low, high), _ = paired_difference(counts["better"], counts["worse"], len(pairs))
    interval: list[float] | None = [low, high]
    if metric not in SHARES:
        differences = np.array([b - a for a, b in pairs])
        mean = float(differences.mean())
        spread = sum_spread((differences - mean) / len(pairs))
        interval = None if spread is None else [mean - spread, mean + spread]
    return {**counts, "difference": 100 * mean, "interval": _percent(interval)}


def count_changes(changes: Iterable[Change | None]) -> dict[str, Any]:
    """How many are better, worse and the same, and the two-sided exact p-value of the sign test on these two."""
    known = [change for change in changes if change is not None]
    counts: dict[str, Any] = {name: known.count(value) for name, value in (("better", 1), ("worse", -1), ("same", 0))}
    p_value = paired_difference(counts["better"], counts["worse"], len(known))[2] if known else None
    return {**counts, "p_value": p_value}


def _percent(interval: Sequence[float] | None) -> list[float] | None:
    return None if interval is None else [100 * bound for bound in interval]
