"""Results of questions with choices, in percent: accuracy by subject and category, averages, intervals, files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.figures import BLUE, ORANGE, draw_bars, saved_figure
from ...core.files import write_json
from ..contamination import Overlap
from ..intervals import Z95, wilson_interval
from .benchmarks import Benchmark
from .questions import ChoiceQuestion


@dataclass(frozen=True)
class ChoiceAnswer:
    """What came of a question.

    Attributes:
        letter: None: nothing that could be read.
        unnormalised: in cloze mode the choice that is likeliest whatever its length.
        is_tied: whether another choice was exactly as likely as the one that counts.
        error: why nothing came: a server failed. It counts neither as right nor as wrong.
        row: all that is kept of it.
    """

    question: ChoiceQuestion
    letter: str | None
    unnormalised: str | None
    error: str | None
    row: Mapping[str, Any]
    is_tied: bool = False

    @property
    def is_correct(self) -> bool:
        return self.letter is not None and self.letter == self.question.answer


# ---------------------------------------------------------------- figures


def accuracies(answers: Sequence[ChoiceAnswer], benchmark: Benchmark, mode: str) -> dict[str, Any]:
    """Accuracy of all questions, by category and by subject; no accuracy where answers are kept secret."""
    by_subject: dict[str, list[ChoiceAnswer]] = {}
    for answer in answers:
        by_subject.setdefault(answer.question.subject, []).append(answer)
    categories: dict[str, dict[str, list[ChoiceAnswer]]] = {}
    for key, members in by_subject.items():
        categories.setdefault(benchmark.subjects[key].category, {})[key] = members
    subjects = {
        key: {"name": benchmark.subjects[key].name, "category": benchmark.subjects[key].category}
        | _figures({key: members}, mode)
        for key, members in by_subject.items()
    }
    for figures in subjects.values():
        for name in ("subjects", "subject_average", "subject_average_interval"):
            figures.pop(name, None)  # the same as the accuracy
    return {
        **_figures(by_subject, mode),
        "by_category": {name: _figures(members, mode) for name, members in sorted(categories.items())},
        "by_subject": subjects,
    }


def _figures(by_subject: Mapping[str, Sequence[ChoiceAnswer]], mode: str) -> dict[str, Any]:
    """Counts, accuracy weighted by questions, and the average over subjects, each with its 95 % interval."""
    answers = [answer for members in by_subject.values() for answer in members]
    scored = {
        key: [a for a in members if a.error is None and a.question.answer] for key, members in by_subject.items()
    }
    shares = [(sum(a.is_correct for a in members), len(members)) for members in scored.values() if members]
    figures: dict[str, Any] = {
        "questions": len(answers),
        "subjects": len(by_subject),
        "errors": sum(answer.error is not None for answer in answers),
        "unparsed": sum(answer.error is None and answer.letter is None for answer in answers),
        "ties": sum(answer.is_tied for answer in answers),
    }
    if not shares:
        return figures
    correct, total = (sum(column) for column in zip(*shares, strict=True))
    low, high = wilson_interval(correct, total)
    average, average_interval = average_of_shares(shares)
    figures |= {
        "correct": correct,
        "accuracy": 100 * correct / total,
        "interval": [100 * low, 100 * high],
        "subject_average": 100 * average,
        "subject_average_interval": [100 * bound for bound in average_interval],
    }
    if mode == "cloze":
        likeliest = sum(a.unnormalised == a.question.answer for members in scored.values() for a in members)
        figures["accuracy_unnormalised"] = 100 * likeliest / total
    return figures


def average_of_shares(shares: Sequence[tuple[int, int]]) -> tuple[float, tuple[float, float]]:
    """The mean of independent shares (successes, total), each as important as another, with its 95 % interval.

    The normal interval; a share's variance is taken at the middle of its Wilson interval, so that none is 0.
    """
    mean = statistics.fmean(successes / total for successes, total in shares)
    middles = [((successes + Z95**2 / 2) / (total + Z95**2), total) for successes, total in shares]
    half = Z95 * math.sqrt(sum(middle * (1 - middle) / total for middle, total in middles)) / len(shares)
    return mean, (max(mean - half, 0.0), min(mean + half, 1.0))


def clean_accuracies(
    answers: Sequence[ChoiceAnswer], overlaps: Sequence[Overlap], benchmark: Benchmark, mode: str, data: Sequence[str]
) -> dict[str, Any]:
    """Figures of the questions that training data does not hold, and what it holds of the others.

    Questions too short to tell are neither clean nor contaminated.
    """
    pairs = list(zip(answers, overlaps, strict=True))
    clean = [answer for answer, overlap in pairs if not (overlap.is_contaminated or overlap.too_short)]
    dirty = [answer for answer, overlap in pairs if overlap.is_contaminated]
    return {
        "data": list(data),
        "contaminated": len(dirty),
        "too_short": sum(overlap.too_short and not overlap.is_contaminated for overlap in overlaps),
        "clean": accuracies(clean, benchmark, mode) if clean else None,
        "contaminated_figures": accuracies(dirty, benchmark, mode) if dirty else None,
        "hits": [
            {
                "question": answer.question.location,
                "share": overlap.share,
                "where": overlap.hits[0].location,
                "text": overlap.hits[0].text,
            }
            for answer, overlap in pairs
            if overlap.is_contaminated
        ],
    }


# ---------------------------------------------------------------- files


def write_submission(answers: Sequence[ChoiceAnswer], path: Path) -> None:
    """C-Eval's file for its leaderboard, {subject: {id: letter}}; what has no answer has an empty one."""
    submission: dict[str, dict[str, str]] = {}
    for answer in answers:
        submission.setdefault(answer.question.subject, {})[answer.question.id] = answer.letter or ""
    write_json(path, submission)


def plot_choices(figures: Mapping[str, Any], path: Path, title: str) -> None:
    """Draw the accuracy of all questions and of every category, with its interval, into a png."""
    rows = [("all", figures), *figures["by_category"].items()]  # a category may be called all
    names, groups = zip(*((name, group) for name, group in rows if "accuracy" in group), strict=True)
    with saved_figure(path, 7, 0.4 * len(groups) + 1.4) as figure:
        axes = figure.subplots()
        shares = [group["accuracy"] for group in groups]
        colors = [ORANGE] + [BLUE] * (len(groups) - 1)
        draw_bars(axes, names, shares, [group["interval"] for group in groups], colors, "accuracy")
        axes.set_title(title)
