"""The report's part on storage formats: what quantising the recipe's model costs and saves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .charts import scatter_chart
from .files import read_json
from .pages import Beside, Block, Cell, Paragraph, Picture, Section, Table, Text, columns, percent

QUANTIZATION = "quantization.json"  # what benchmarks/quantization.py writes


def quantization_sections(folder: Path) -> list[Section]:
    """Size and quality of the model in every format: one section, none if they were not measured.

    Raises: InputError if the file is broken.
    """
    if not (folder / QUANTIZATION).is_file():
        return []
    table = read_json(folder / QUANTIZATION)
    name = Path(table.get("model") or "").name
    model, named = (f"模型 {name} ", f"the model {name}") if name else ("同一模型", "the same model")
    note = Text(
        f"{model}存成不同格式后的大小与质量，都在同样的 {table['scored_tokens']:,} 个留出词元上测得，困惑度越低越好；"
        "变化与第一行比。",
        f"Size and quality of {named} in each format, all measured on the same {table['scored_tokens']:,} "
        "held-out tokens; lower perplexity is better, changes are against the first row.",
    )
    first = next((row["perplexity"] for row in table["rows"] if row["perplexity"] is not None), None)
    header = columns("格式|format", "大小 MB|size, MB", "比特/权重|bits/weight", "困惑度|perplexity", "变化|change")
    header += columns("比特/字节|bits/byte", "毫秒/词元|ms/token")
    rows = [format_row(row, first) for row in table["rows"]]
    blocks: list[Block] = [Paragraph(note)]
    shown = Table(header, rows)
    if points := plot_points(table):
        picture = Picture(
            Text("困惑度与大小", "Perplexity against size"), svg=scatter_chart(points, "MB", "perplexity")
        )
        blocks.append(Beside(shown, picture))
    else:
        blocks.append(shown)
    if remarks := [[row["format"], row["note"]] for row in table["rows"] if row["note"]]:
        blocks.append(Table(columns("格式|format", "说明|remark"), remarks, words=2))
    return [Section("quantization", Text("量化", "Quantisation"), blocks)]


def format_row(row: Mapping[str, Any], first: float | None) -> list[Cell]:
    """One format's cells; what was not measured is a dash."""
    figures = [
        (None if row["size_gb"] is None else 1000 * row["size_gb"], ".2f"),
        (row["bits_per_weight"], ".2f"),
        (row["perplexity"], ".3f"),
    ]
    cells: list[Cell] = [
        row["format"],
        *("—" if value is None else format(value, digits) for value, digits in figures),
    ]
    measured = row["perplexity"] is not None and first is not None
    cells.append(percent(row["perplexity"] / first - 1, 2, signed=True) if measured else "—")
    figures = [(row["bits_per_byte"], ".3f"), (row["ms_per_token"], ".2f")]
    return [*cells, *("—" if value is None else format(value, digits) for value, digits in figures)]


def plot_points(table: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """{engine: {format: (MB, perplexity)}} of the formats that were measured."""
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for row in table["rows"]:
        if row["perplexity"] is not None and row["size_gb"] is not None:
            engine = "GGUF" if "types" in row else "transformers"
            points.setdefault(engine, {})[row["format"]] = (1000 * row["size_gb"], row["perplexity"])
    return points
