"""LongBench's results: answers written as they come, their scores, averages and picture.

Scores are percents, as LongBench's are. An average of groups is the mean of their scores, a group's the mean of its
datasets': a group of four datasets counts as much as one of two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.figures import draw_bars, saved_figure
from ...core.files import read_json, remove
from ...core.records import iter_records
from ..intervals import Z95, wilson_interval
from ..progress import Predictions, settings_beside
from .metrics import score_answer, score_levenshtein
from .tasks import GROUPS, TASKS, Sample, Task

BUCKETS = {"0-4k": 4000, "4-8k": 8000, "8k+": math.inf}  # of LongBench-E: below so many words
FIELDS = ("answers", "all_classes", "length")  # that an answer's line repeats of its sample
COLORS = ("#2a6f97", "#d9822b", "#4d9078", "#8e6c8a", "#b23a48", "#7b6d3f")  # of the groups


# ---------------------------------------------------------------- answers


class LongBenchPredictions(Predictions):
    """A dataset's answers in upstream's form, a line {pred, answers, all_classes, length} for each sample."""

    def __init__(self, path: Path, samples: Sequence[Sample], settings: dict[str, Any]) -> None:
        """See Predictions."""
        rows = [{"answers": s.answers, "all_classes": s.all_classes, "length": s.length} for s in samples]
        super().__init__(path, rows, settings, overwrite=False, flag="--output_dir")

    def make_row(self, question: Any, output: str) -> dict[str, Any]:
        """See Predictions."""
        return {"pred": output, **question}

    def question_of(self, row: dict[str, Any]) -> Any:
        """See Predictions."""
        return {name: row[name] for name in FIELDS if isinstance(row["pred"], str)}


def open_predictions(
    path: Path, samples: Sequence[Sample], settings: dict[str, Any], overwrite: bool, anew: bool
) -> LongBenchPredictions:
    """The answers of a dataset as far as they are there.

    Args:
        overwrite: answers of another model, or with other settings, go.
        anew: those that are there go whatever they are.
    """
    if anew:
        remove(path)
    try:
        return LongBenchPredictions(path, samples, settings)
    except InputError:
        if not overwrite:
            raise
    remove(path)
    return LongBenchPredictions(path, samples, settings)


def read_predictions(folder: Path, tasks: Sequence[Task]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """The answers that stand in a folder, {dataset: rows}, and what is known of the model that made them.

    Raises: InputError for a file that is unfinished or is none, or if the files are not of one model.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    known: dict[str, dict[str, Any]] = {}
    data: dict[str, dict[str, Any]] = {}
    for path in [folder / f"{task.name}.jsonl" for task in tasks]:
        if not path.is_file():
            continue
        name, beside = path.stem, settings_beside(path)
        record = read_json(beside) if beside.is_file() else {"settings": {}, "metrics": {}}  # another program's
        if "metrics" not in record:
            raise InputError(f"{path} is unfinished; run the command that made it again, it goes on")
        found[name] = [_read_row(row, location, name) for location, row in iter_records(path)]
        known[name] = record["settings"]
        data[name] = {"sha256": known[name].pop("data", None), **record["metrics"]}
    if not found or not all(found.values()):
        raise InputError(f"no answers in {folder}; pass --base_model to make them")
    first = next(iter(known))
    for name, settings in known.items():
        if settings != known[first]:
            raise InputError(
                f"{folder}: {name}.jsonl and {first}.jsonl are of different models or settings; keep one's, or name "
                "those that belong together in --predict_on"
            )
    return found, {"models": {folder.absolute().parent.name: known[first]}, "data": data}


def _read_row(row: dict[str, Any], location: str, name: str) -> dict[str, Any]:
    needs_classes = TASKS[name].metric == "classification"
    checks = {
        "pred": isinstance(row.get("pred"), str),
        "answers": isinstance(row.get("answers"), list) and bool(row["answers"]),
        "all_classes": isinstance(row.get("all_classes"), list) or not needs_classes,
        "length": isinstance(row.get("length"), int),
    }
    if wrong := [field for field, holds in checks.items() if not holds]:
        fields = ", ".join(sorted(row))
        raise InputError(f"{location}: {', '.join(wrong)}: missing or wrong for {name}; the record has {fields}")
    return {"all_classes": None, **row}


# ---------------------------------------------------------------- figures


def average_scores(rows: Mapping[str, Sequence[Mapping[str, Any]]], e: bool) -> dict[str, Any]:
    """Scores in percent with their 95 % intervals, of datasets and of groups.

    Args:
        rows: {dataset: its answers, as LongBenchPredictions has them}.
        e: whether they are LongBench-E's, which are also looked at by length.
    """
    datasets = {name: _dataset_figures(TASKS[name], found, e) for name, found in rows.items()}
    return {"datasets": datasets, "averages": _averages(datasets)}


def _dataset_figures(task: Task, rows: Sequence[Mapping[str, Any]], e: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {"group": task.group, "language": task.language, "metric": task.metric}
    scores = [_score(score_answer, task, row) for row in rows]
    figures |= mean_score(scores)
    if task.metric == "code_similarity":
        figures["score_levenshtein"] = mean_score([_score(score_levenshtein, task, row) for row in rows])["score"]
    if e:
        lengths = [row["length"] for row in rows]
        members: dict[str, list[float]] = {name: [] for name in BUCKETS}
        for score, length in zip(scores, lengths, strict=True):
            members[next(name for name, limit in BUCKETS.items() if length < limit)].append(score)
        figures["buckets"] = {name: mean_score(found) for name, found in members.items() if found}
    return figures


def _score(judge: Callable[..., float], task: Task, row: Mapping[str, Any]) -> float:
    return judge(task, row["pred"], row["answers"], row["all_classes"])


def mean_score(scores: Sequence[float]) -> dict[str, Any]:
    """The mean of scores 0-1, in percent, with its 95 % interval.

    The interval is Wilson's where every score is 0 or 1, else the normal one of a mean.
    """
    mean = statistics.fmean(scores)
    if set(scores) <= {0.0, 1.0}:
        low, high = wilson_interval(round(sum(scores)), len(scores))
    elif len(scores) == 1:
        low, high = 0.0, 1.0
    else:
        half = Z95 * statistics.stdev(scores) / math.sqrt(len(scores))
        low, high = max(mean - half, 0.0), min(mean + half, 1.0)
    return {"score": 100 * mean, "interval": [100 * low, 100 * high], "samples": len(scores)}


def _averages(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Averages of {dataset: figures}: all, and Chinese and English with the code tasks in both, as published."""
    found: dict[str, Any] = {}
    for name in ("zh", "en", "all"):
        chosen = [f for f in datasets.values() if name == "all" or f["language"] in (name, "code")]
        if name == "all" or any(figures["language"] == name for figures in chosen):
            found[name] = _average(chosen)
            if any("buckets" in figures for figures in chosen):
                found[name]["buckets"] = {
                    bucket: _average([{**f, **f["buckets"][bucket]} for f in chosen if bucket in f["buckets"]])
                    for bucket in BUCKETS
                    if any(bucket in f["buckets"] for f in chosen)
                }
    return found


def _average(datasets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of the groups' scores, and these."""
    groups = {}
    for group in GROUPS:
        if members := [figures for figures in datasets if figures["group"] == group]:
            groups[group] = {**_mean_of_means(members), "datasets": len(members)}
    return {**_mean_of_means(list(groups.values())), "groups": groups}


def _mean_of_means(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of independent scores in percent, with its interval: errors add up as the sides of a right angle do."""
    mean = statistics.fmean(part["score"] for part in parts)
    # The longer side of an interval: the other one may have been cut off at 0 or 100.
    errors = [max(part["score"] - part["interval"][0], part["interval"][1] - part["score"]) for part in parts]
    half = math.hypot(*errors) / len(parts)
    return {"score": mean, "interval": [max(mean - half, 0.0), min(mean + half, 100.0)]}


# ---------------------------------------------------------------- the picture


def plot_longbench(figures: Mapping[str, Any], path: Path, title: str) -> None:
    """Draw the score of every dataset, LongBench-E's by length, into a png: a colour for each group."""
    from matplotlib.patches import Patch

    bars: list[tuple[str, str, Mapping[str, Any]]] = []  # name, group, figures
    for group in GROUPS:
        for name, found in figures["datasets"].items():
            if found["group"] == group:
                parts = found.get("buckets") or {"": found}
                bars += [(f"{name} {bucket}".strip(), group, part) for bucket, part in parts.items()]
    colors = dict(zip(GROUPS, COLORS, strict=True))
    with saved_figure(path, 8, 0.27 * len(bars) + 1.6) as figure:
        axes = figure.subplots()
        draw_bars(
            axes,
            [name for name, _, _ in bars],
            [part["score"] for _, _, part in bars],
            [part["interval"] for _, _, part in bars],
            [colors[group] for _, group, _ in bars],
            "score",
        )
        axes.set_title(title)
        axes.margins(y=0.01)
        used = [group for group in GROUPS if group in {group for _, group, _ in bars}]
        patches = [Patch(color=colors[group], label=group) for group in used]
        axes.legend(handles=patches, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
