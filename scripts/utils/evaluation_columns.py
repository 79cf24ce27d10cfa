"""Columns of results that can be compared, and the cells, tables and pictures that evaluation_tables is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .charts import bar_chart, radar_chart
from .evaluation_results import Entry
from .files import hash_json
from .pages import Beside, Block, Cell, Paragraph, Picture, Pictures, Table, Text

MARKS = "¹²³⁴⁵⁶⁷⁸⁹"
MODEL = Text("模型", "model")
LONGEST_AXIS = 18  # letters of the name of a radar's axis
MOST_BESIDE = 3  # columns of a table that has room for a picture beside it


class Column(NamedTuple):
    """Entries that can be compared, and their heading with its mark."""

    heading: str
    entries: Sequence[Entry]

    def figures(self, model: str) -> Mapping[str, Any] | None:
        """What a model scored, None where it was not asked."""
        return next((entry.figures for entry in self.entries if entry.model == model), None)


# ---------------------------------------------------------------- what can be compared


def group_columns(entries: Sequence[Entry]) -> tuple[list[Column], list[Block]]:
    """Entries with equal details together, in the order they came; and what differs between equal headings."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        key = hash_json([entry.kind, entry.benchmark, entry.column, entry.details])
        groups.setdefault(key, []).append(entry)
    headings: dict[tuple[str, str], list[list[Entry]]] = {}
    for group in groups.values():
        headings.setdefault((group[0].kind, group[0].column), []).append(group)
    found: list[Column] = []
    notes: list[Block] = []
    for (_, heading), same in headings.items():
        marks = [""] if len(same) == 1 else [mark_of(rank) for rank in range(len(same))]
        found += [Column(heading + mark, group) for mark, group in zip(marks, same, strict=True)]
        if len(same) > 1:
            named = [(heading + mark, group[0].details) for mark, group in zip(marks, same, strict=True)]
            notes.append(Paragraph(describe_differences(named)))
    return found, notes


def mark_of(rank: int) -> str:
    return MARKS[rank] if rank < len(MARKS) else f" ({rank + 1})"


def describe_differences(named: Sequence[tuple[str, Mapping[str, Any]]]) -> Text:
    """Why columns of one heading cannot be compared."""
    keys = dict.fromkeys(key for _, details in named for key in details)
    different = [key for key in keys if len({hash_json(details.get(key)) for _, details in named}) > 1]
    said = []
    for heading, details in named:
        said.append(f"{heading}: " + ", ".join(f"{key} {short(details.get(key))}" for key in different))
    values = "; ".join(said)
    return Text(f"不可比较 — {values}。", f"Not to be compared: {values}.")


def short(value: Any) -> str:
    """A setting as it is, or the beginning of its hash where it is long."""
    text = "–" if value is None else value if isinstance(value, str) else str(value)
    return text if len(text) <= 24 and "\n" not in text else hash_json(value)[:8]


def models_of(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.model for entry in entries))


# ---------------------------------------------------------------- cells


def scored(figures: Mapping[str, Any] | None, key: str, interval: str = "interval", factor: float = 1) -> str:
    """A percentage with its interval; a dash where there is none."""
    if figures is None or figures.get(key) is None:
        return "—"
    low, high = (factor * bound for bound in figures[interval])
    return f"{factor * figures[key]:.1f} ({low:.1f}–{high:.1f})"


def spread(value: float, interval: Sequence[float] | None, digits: int = 3, sign: str = "") -> str:
    """A figure that is no percentage, with its interval where it has one."""
    if interval is None:
        return f"{value:{sign}.{digits}f}"
    return f"{value:{sign}.{digits}f} ({interval[0]:{sign}.{digits}f} – {interval[1]:{sign}.{digits}f})"


def main_figure(entry: Entry) -> float | None:
    """Percent, or of texts bits a byte; None where answers are secret."""
    figures = entry.figures
    if entry.kind == "multiple_choice":
        return figures.get("accuracy")
    if entry.kind == "longbench":
        return float(figures["averages"]["all"]["score"])
    if entry.kind == "perplexity":
        return float(figures["curve"][-1]["bits_per_byte_to_here"] if "curve" in figures else figures["bits_per_byte"])
    return 100 * float(figures["aligned"])


def main_cell(entry: Entry | None) -> str:
    """The same with its interval."""
    if entry is None:
        return "—"
    figures = entry.figures
    if entry.kind == "multiple_choice":
        return scored(figures, "accuracy")
    if entry.kind == "longbench":
        return scored(figures["averages"]["all"], "score")
    if entry.kind == "perplexity":
        return spread(main_figure(entry) or 0.0, figures.get("bits_per_byte_interval"))
    return scored(figures, "aligned", factor=100)


def table_of(models: Sequence[str], header: Sequence[Text], cells: Callable[[str], Sequence[Cell]]) -> Table:
    """A row for each model."""
    return Table([MODEL, *header], [[model, *cells(model)] for model in models])


def picture_of(title: Text, groups: Mapping[str, Mapping[str, float]], label: str) -> Picture | None:
    """{benchmark or category: {model: figure}} as a radar, as bars where there are too few axes or names too long.

    Returns: None if there is nothing to draw.
    """
    if not any(groups.values()):
        return None
    if len(groups) >= 3 and max(map(len, groups)) <= LONGEST_AXIS:
        return Picture(title, svg=radar_chart(groups, label))
    models = list(dict.fromkeys(model for values in groups.values() for model in values))
    bars = {model: {name: values[model] for name, values in groups.items() if model in values} for model in models}
    return Picture(title, svg=bar_chart(bars, label, digits=1))


def with_picture(table: Table, picture: Picture | None) -> list[Block]:
    """Side by side, a wide table above its picture."""
    if picture is None:
        return [table]
    return [Beside(table, picture)] if len(table.header) <= MOST_BESIDE else [table, Pictures([picture])]
