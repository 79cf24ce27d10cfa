"""Curves of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.files import atomic_file


def plot_losses(history: list[dict[str, Any]], path: Path, title: str, unit: str = "nats a token") -> None:
    """Draw training and evaluation losses over optimizer steps into a png; nothing is drawn without two points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "loss" or (name.startswith("eval_") and name.endswith("_loss")) or name == "eval_loss":
                curves.setdefault("train" if name == "loss" else name.removesuffix("_loss"), []).append(
                    (entry["step"], value)
                )
    if not any(len(points) > 1 for points in curves.values()):
        return
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in curves.items():
        steps, losses = zip(*points, strict=True)
        axes.plot(
            steps, losses, label=name, linewidth=1.2 if name == "train" else 1.8, marker="" if name == "train" else "o"
        )
    axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def plot_curves(history: list[dict[str, Any]], path: Path, title: str, curves: dict[str, str]) -> None:
    """Draw small charts over optimizer steps into one png; those without two points are left out.

    Args: curves: a key of the log lines, and the label of its axis. "eval_<set>_<key>" is drawn with it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def lines(key: str) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in history:
            for name, value in entry.items():
                if name == key or (name.startswith("eval_") and name.endswith(f"_{key}") and name != f"eval_{key}"):
                    label = "training" if name == key else name.removeprefix("eval_").removesuffix(f"_{key}")
                    found.setdefault(label, []).append((entry["step"], value))
        return found

    found_lines = {key: lines(key) for key in curves}
    drawn = [key for key, found in found_lines.items() if any(len(points) > 1 for points in found.values())]
    if not drawn:
        return
    rows = -(-len(drawn) // 2)
    figure, grid = pyplot.subplots(rows, 2, figsize=(10, 2.6 * rows), squeeze=False)
    axes: Any
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes, key in zip(grid.flat, drawn, strict=False):
        for label, points in found_lines[key].items():
            axes.plot(
                *zip(*points, strict=True), label=label, marker="" if label == "training" else "o", linewidth=1.4
            )
        axes.set(xlabel="step", title=curves[key])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
