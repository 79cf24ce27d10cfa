"""The README.md that lies beside weights: what they are, how they were made, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def write_model_card(
    folder: Path,
    title: str,
    text: Sequence[str],
    figures: Mapping[str, object],
    notes: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> None:
    """Write README.md: text, a table of figures, then a paragraph for each note.

    Args: settings: what a hub reads besides the library's name, such as pipeline_tag.
    """
    lines = [
        *("---", "library_name: transformers", *(f"{name}: {value}" for name, value in (settings or {}).items())),
        *("---", f"# {title}", "", *text, "", "| figure | value |", "|---|---|"),
        *(f"| {name} | {value} |" for name, value in figures.items()),
        *(f"\n{note}" for note in notes),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
