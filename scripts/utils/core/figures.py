"""Pictures in files: a figure of matplotlib that is saved whole or not at all, bars and points with their intervals.

Figures are made without pyplot, which would keep them alive and choose a backend for the whole process. Matplotlib is
imported where something is drawn: it takes half a second, which --help would wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, INK = "#2a6f97", "#d9822b", "#52606d"
# Latin first, then what the machine has for Chinese; of a collection matplotlib sees the first face (JP) alone.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "PingFang SC", "Microsoft YaHei")


@contextlib.contextmanager
def saved_figure(
    path: str | Path, width: float, height: float, dpi: int = 120, layout: Literal["tight", "constrained"] = "tight"
) -> Iterator[Figure]:
    """A figure to draw on, written as a png when the block ends well; in fonts that have Chinese where there are any.

    Args: width, height: inches; dpi: pixels an inch.
    """
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure

    known = {font.name for font in font_manager.fontManager.ttflist}
    # A text takes its fonts from the settings when it is made, ticks as late as in savefig: the context holds it all.
    with rc_context({"font.family": [name for name in FONTS if name in known]}):
        figure = Figure(figsize=(width, height), layout="constrained" if layout == "constrained" else None)
        yield figure
        if layout == "tight":
            figure.tight_layout()
        with atomic_file(path, "wb") as file:
            figure.savefig(file, format="png", dpi=dpi)


def draw_bars(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[Sequence[float]],
    colors: Sequence[str],
    label: str,
) -> None:
    """Percentages as lying bars, the first at the top, each with its 95 % interval (low, high)."""
    # Places, not names: matplotlib would draw bars of one name over each other.
    places = range(len(names))
    axes.barh(places, values, xerr=interval_errors(values, intervals), color=colors, ecolor=INK, capsize=2)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel=f"{label} (%), 95 % interval")
    axes.grid(axis="x", alpha=0.3)


def interval_errors(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> list[list[float]]:
    """(2, N): how far the ends of intervals lie below and above their values, as matplotlib's xerr takes them.

    A value beyond its own interval, which rounding and resampling allow, has no bar on that side: matplotlib refuses
    negative lengths.
    """
    pairs = list(zip(values, intervals, strict=True))
    return [[max(value - low, 0) for value, (low, _) in pairs], [max(high - value, 0) for value, (_, high) in pairs]]
