"""Curves of a run, from the lines of its log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.figures import saved_figure

Curves = dict[str, list[tuple[int, float]]]


def log_curves(history: Iterable[Mapping[str, Any]], key: str) -> Curves:
    """A figure of the log over optimizer steps, as "training", "eval_<set>" and "eval", the mean over the sets."""
    found: Curves = {}
    for entry in history:
        for name, value in entry.items():
            if name == key or (name.startswith("eval_") and name.endswith(f"_{key}")):
                line = "training" if name == key else name.removesuffix(f"_{key}")
                found.setdefault(line, []).append((entry["step"], value))
    return found


def has_line(curves: Curves) -> bool:
    """Whether there is more to draw than single points."""
    return any(len(points) > 1 for points in curves.values())


def plot_losses(history: list[dict[str, Any]], path: Path, title: str, unit: str = "nats a token") -> None:
    """Draw training and evaluation losses over optimizer steps into a png; nothing is drawn without two points."""
    curves = log_curves(history, "loss")
    if not has_line(curves):
        return
    with saved_figure(path, 7, 4) as figure:
        axes = figure.subplots()
        for name, points in curves.items():
            steps, losses = zip(*points, strict=True)
            train = name == "training"
            label, width, marker = ("train", 1.2, "") if train else (name, 1.8, "o")
            axes.plot(steps, losses, label=label, linewidth=width, marker=marker)
        axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})", title=title)
        axes.grid(alpha=0.3)
        axes.legend()


def plot_curves(history: list[dict[str, Any]], path: Path, title: str, curves: dict[str, str]) -> None:
    """Draw small charts over optimizer steps into one png; those without two points are left out.

    Args: curves: a key of the log lines, and the label of its axis. "eval_<set>_<key>" is drawn with it.
    """
    # Means over held-out sets are left out: they would be drawn over the line of a single set.
    found = {key: {n: p for n, p in log_curves(history, key).items() if n != "eval"} for key in curves}
    drawn = [key for key, lines in found.items() if has_line(lines)]
    if not drawn:
        return
    rows = -(-len(drawn) // 2)
    with saved_figure(path, 10, 2.6 * rows, dpi=110) as figure:
        grid = figure.subplots(rows, 2, squeeze=False)
        axes: Any
        for axes in grid.flat[len(drawn) :]:
            axes.set_visible(False)
        for axes, key in zip(grid.flat, drawn, strict=False):
            for name, points in found[key].items():
                marker = "" if name == "training" else "o"
                axes.plot(*zip(*points, strict=True), label=name.removeprefix("eval_"), marker=marker, linewidth=1.4)
            axes.set(xlabel="step", title=curves[key])
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(title)
