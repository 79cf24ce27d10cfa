"""Perplexity on the screen and in pictures: a table, a curve by length, bits a byte with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.figures import BLUE, INK, interval_errors, saved_figure

Row = Mapping[str, Any]


# ---------------------------------------------------------------- tables


def format_length_row(row: Row | None) -> str:
    """A line of the table by length; None: its heading."""
    if row is None:
        return f"{'model, scaling':28} {'text':16} {'tokens':>12} {'perplexity':>11} {'bits/byte':>9} {'rows':>5}"
    figures = f"{row['perplexity']:11.3f} {row['bits_per_byte']:9.4f} {row['rows']:5}"
    return f"{row['label']:28} {row['text']:16} {row['tokens']:>12} {figures}"


def format_document_row(row: Row | None) -> str:
    """A line of the table of whole documents, with half of each 95 % interval behind +-; None: its heading."""
    if row is None:
        columns = f"{'perplexity':>11} {'bits/byte':>17} {'against first':>17} {'documents':>9} {'tokens':>10}"
        return f"{'model':28} {'text':16} {columns}"
    bits = _with_spread(f"{row['bits_per_byte']:.4f}", row["bits_per_byte_interval"])
    change = ""
    if (difference := row.get("bits_per_byte_difference")) is not None:
        change = _with_spread(f"{difference:+.4f}", row["bits_per_byte_difference_interval"])
    figures = f"{row['perplexity']:11.3f} {bits:>17} {change:>17} {row['documents']:9} {row['scored_tokens']:10}"
    return f"{row['label']:28} {row['text']:16} {figures}"


def _with_spread(value: str, bounds: Sequence[float] | None) -> str:
    return value if bounds is None else f"{value} +-{(bounds[1] - bounds[0]) / 2:.4f}"


# ---------------------------------------------------------------- pictures


def plot_by_length(rows: Sequence[Row], path: Path, windows: Sequence[int] = ()) -> None:
    """Draw perplexity against length into a png: a panel for each text, a line for each model and setting.

    Args:
        rows: those of perplexity_by_length, with `text` and `label`.
        windows: trained windows in tokens, drawn as upright lines.
    """
    from matplotlib.ticker import LogFormatter, NullLocator

    texts = list(dict.fromkeys(row["text"] for row in rows))
    with saved_figure(path, 1 + 5.5 * len(texts), 4) as figure:
        grid = figure.subplots(1, len(texts), squeeze=False)
        for axes, text in zip(grid[0], texts, strict=True):
            for label in dict.fromkeys(row["label"] for row in rows):
                points = [row for row in rows if (row["text"], row["label"]) == (text, label)]
                axes.plot([p["length"] for p in points], [p["perplexity"] for p in points], marker="o", label=label)
            for window in sorted(set(windows)):
                axes.axvline(window, color=INK, linestyle=":", linewidth=1)
            axes.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="perplexity", title=text)
            ticks = sorted({row["length"] for row in rows})
            axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)


def plot_documents(rows: Sequence[Row], path: Path) -> None:
    """Draw bits a byte into a png: a panel for each text, a point with its 95 % interval for each model.

    Args:
        rows: those of document_figures, with `text` and `label`; each point has its perplexity beside it.
    """
    texts = list(dict.fromkeys(row["text"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    with saved_figure(path, 2 + 5 * len(texts), 1.4 + 0.4 * len(labels)) as figure:
        grid = figure.subplots(1, len(texts), squeeze=False, sharey=True)
        for axes, text in zip(grid[0], texts, strict=True):
            for row in (row for row in rows if row["text"] == text):
                value, place = row["bits_per_byte"], labels.index(row["label"])
                errors = interval_errors([value], [row["bits_per_byte_interval"] or (value, value)])
                axes.errorbar([value], [place], xerr=errors, fmt="o", color=BLUE, ecolor=INK, capsize=3)
                note = f"{row['perplexity']:.4g}"
                axes.annotate(note, (value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
            axes.set(xlabel="bits a byte, 95 % interval; above: perplexity", title=text)
            axes.set_ylim(len(labels) - 0.5, -0.7)
            axes.set_yticks(range(len(labels)), labels)
            axes.grid(axis="x", alpha=0.3)
