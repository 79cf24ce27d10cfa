"""Tables and pictures of evaluations, models as rows: a section for each benchmark.

Figures whose questions, prompts or settings differ stand in columns of their own, marked where the headings are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..core.files import hash_json
from .charts import bar_chart, line_chart, radar_chart
from .pages import Beside, Block, Cell, Paragraph, Picture, Pictures, Section, Table, Text, columns
from .results import Entry

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


MAX_ROWS = 20  # longer tables are folded
AVERAGES = {"zh": Text("中文", "Chinese"), "en": Text("英文", "English"), "all": Text("全部", "all")}


# ---------------------------------------------------------------- questions with choices


def choice_sections(entries: Sequence[Entry]) -> list[Section]:
    """A section for each benchmark of questions with choices."""
    chosen = [entry for entry in entries if entry.kind == "multiple_choice"]
    sections = []
    for rank, name in enumerate(dict.fromkeys(entry.benchmark for entry in chosen), 1):
        found, notes = group_columns([entry for entry in chosen if entry.benchmark == name])
        blocks: list[Block] = [choice_table(found), *notes]
        for column in found:
            blocks += choice_details(column)
        sections.append(Section(f"choices-{rank}", Text(f"选择题 {name}", f"Multiple choice, {name}"), blocks))
    return sections


def choice_table(found: Sequence[Column]) -> Table:
    """Accuracy in every column, weighted by questions, and the mean over subjects."""
    header: list[Text] = []
    for column in found:
        header += [Text(column.heading, "%"), Text("科目平均", "mean over subjects")]
        if has_clean(column):
            header.append(Text("训练数据中没有的题", "questions not in training data"))

    def cells(model: str) -> list[Cell]:
        row: list[Cell] = []
        for column in found:
            figures = column.figures(model)
            row.append(scored(figures, "accuracy") + remarks(figures))
            row.append(scored(figures, "subject_average", "subject_average_interval"))
            if has_clean(column):
                row.append(scored(((figures or {}).get("contamination") or {}).get("clean"), "accuracy"))
        return row

    return table_of(models_of(entry for column in found for entry in column.entries), header, cells)


def has_clean(column: Column) -> bool:
    return any(entry.figures.get("contamination") for entry in column.entries)


def remarks(figures: Mapping[str, Any] | None) -> str:
    """What makes a figure less sure: unread answers, failures, missing subjects, prompts that were cut."""
    if figures is None:
        return ""
    counts = {
        "unparsed": figures.get("unparsed", 0),
        "errors": figures.get("errors", 0),
        "subjects missing": len(figures["benchmark"].get("missing_subjects", [])),
        "prompts without all examples": figures["prompts"].get("prompts_without_all_examples", 0),
        "prompts cut": figures["prompts"].get("cut_prompts", 0),
    }
    said = [f"{count} {name}" for name, count in counts.items() if count]
    return f"\n{', '.join(said)}" if said else ""


def choice_details(column: Column) -> list[Block]:
    """Accuracy by category with its picture, and by subject."""
    models = models_of(column.entries)
    by_model = {entry.model: entry.figures for entry in column.entries}
    blocks: list[Block] = []
    names = list(dict.fromkeys(name for figures in by_model.values() for name in figures["by_category"]))
    if len(names) > 1:
        table = table_of(
            models,
            [Text(name, "") for name in names],
            lambda model: [scored(by_model[model]["by_category"].get(name), "accuracy") for name in names],
        )
        table.title = Text(f"{column.heading}，按类别", f"{column.heading}, by category")
        groups = {name: accuracies(by_model, "by_category", name) for name in names}
        blocks += with_picture(table, picture_of(table.title, groups, "accuracy, %"))
    subjects = list(dict.fromkeys(name for figures in by_model.values() for name in figures["by_subject"]))
    if len(subjects) > 1:
        rows: list[list[Cell]] = [
            [
                next(f["by_subject"][name].get("name", name) for f in by_model.values() if name in f["by_subject"]),
                *(scored(figures["by_subject"].get(name), "accuracy") for figures in by_model.values()),
            ]
            for name in subjects
        ]
        title = Text(f"{column.heading}，{len(rows)} 个科目", f"{column.heading}, {len(rows)} subjects")
        header = [Text("科目", "subject"), *(Text(model, "") for model in models)]
        blocks.append(Table(header, rows, title=title, folded=True))
    return blocks


def accuracies(by_model: Mapping[str, Mapping[str, Any]], group: str, name: str) -> dict[str, float]:
    found = {model: figures[group].get(name, {}).get("accuracy") for model, figures in by_model.items()}
    return {model: value for model, value in found.items() if value is not None}


# ---------------------------------------------------------------- LongBench


def longbench_sections(entries: Sequence[Entry]) -> list[Section]:
    """Averages and groups of tasks as published tables have them, LongBench-E's by length, and every dataset."""
    sections = []
    chosen = [entry for entry in entries if entry.kind == "longbench"]
    for rank, name in enumerate(dict.fromkeys(entry.benchmark for entry in chosen), 1):
        found, notes = group_columns([entry for entry in chosen if entry.benchmark == name])
        blocks: list[Block] = [*notes]
        for column in found:
            blocks += longbench_blocks(column)
        sections.append(Section(f"longbench-{rank}", Text(name, ""), blocks))
    return sections


def longbench_blocks(column: Column) -> list[Block]:
    models = models_of(column.entries)
    by_model = {entry.model: entry.figures for entry in column.entries}
    blocks: list[Block] = []
    for key, title in AVERAGES.items():
        averages = {model: f["averages"][key] for model, f in by_model.items() if key in f["averages"]}
        if not averages or (key == "all" and len(blocks) == 1 and len(averages) == len(models)):
            continue  # of one language, all is the same again
        groups = list(dict.fromkeys(group for average in averages.values() for group in average["groups"]))
        buckets = list(dict.fromkeys(bucket for average in averages.values() for bucket in average.get("buckets", {})))
        header = [Text("平均", "average"), *(Text(name, "") for name in (*groups, *buckets))]

        def cells(model: str, averages: Any = averages, groups: Any = groups, buckets: Any = buckets) -> list[Cell]:
            average = averages.get(model, {})
            parts = [average.get("groups", {}).get(group) for group in groups]
            parts += [average.get("buckets", {}).get(bucket) for bucket in buckets]
            return [scored(part, "score") for part in (average, *parts)]

        table = table_of(list(averages), header, cells)
        table.title = Text(f"{column.heading}，{title.zh}", f"{column.heading}, {title.en}")
        bars = {group: {model: a["groups"][group]["score"] for model, a in averages.items()} for group in groups}
        blocks += with_picture(table, picture_of(table.title, bars, "score, %"))
    names = list(dict.fromkeys(name for figures in by_model.values() for name in figures["datasets"]))
    rows: list[list[Cell]] = [
        [name, *(scored(figures["datasets"].get(name), "score") for figures in by_model.values())] for name in names
    ]
    title = Text(f"{column.heading}，各数据集", f"{column.heading}, every dataset")
    header = [Text("数据集", "dataset"), *(Text(model, "") for model in models)]
    blocks.append(Table(header, rows, title=title, folded=len(rows) > MAX_ROWS))
    cut = {e.model: sum(d.get("prompts_cut", 0) for d in e.file.get("data", {}).values()) for e in column.entries}
    said = "; ".join(
        f"{e.model}: max_length {e.settings.get('max_length', '–')}, {cut[e.model]} cut" for e in column.entries
    )
    blocks.append(Paragraph(Text(f"提示的最大长度与截断数 — {said}。", f"Longest prompts, and prompts cut: {said}.")))
    return blocks


# ---------------------------------------------------------------- perplexity


def perplexity_sections(entries: Sequence[Entry]) -> list[Section]:
    """Perplexity and bits a byte of whole documents, and curves by position."""
    chosen = [entry for entry in entries if entry.kind == "perplexity"]
    if not chosen:
        return []
    found, notes = group_columns(chosen)
    blocks: list[Block] = [
        Paragraph(
            Text(
                "困惑度以词元计，带 † 的各模型分词器不同，只能比较比特/字节。"
                "“与第一行之差”在同样的文档上成对计算，正数更差。",
                "Perplexity is per token: models marked † have other tokenizers, compare their bits a byte alone. "
                "Against the first: in pairs on the same documents, positive is worse.",
            )
        )
    ]
    for column in found:
        whole = "curve" not in column.entries[0].figures
        blocks += document_blocks(column) if whole else curve_blocks(column)
    return [Section("perplexity", Text("困惑度", "Perplexity"), [*blocks, *notes])]


def document_blocks(column: Column) -> list[Block]:
    """A row for each model; the first whose tokenizer is another one than the first row's has a mark."""
    first = tokenizer_of(column.entries[0])
    rows: list[list[Cell]] = []
    for entry in column.entries:
        figures = entry.figures
        difference, between = figures.get("bits_per_byte_difference"), figures.get("bits_per_byte_difference_interval")
        mark = "" if tokenizer_of(entry) == first else " †"
        rows.append(
            [
                entry.model,
                spread(figures["perplexity"], figures.get("perplexity_interval"), 2) + mark,
                spread(figures["bits_per_byte"], figures.get("bits_per_byte_interval")),
                "—" if difference is None else spread(difference, between, sign="+") + compared_with(entry, column),
                *(f"{figures[key]:,}" for key in ("documents", "scored_tokens")),
            ]
        )
    header = [MODEL, *columns("困惑度|perplexity", "比特/字节|bits/byte", "与第一行之差|against the first")]
    header += columns("文档|documents", "词元|tokens")
    table = Table(header, rows, title=Text(column.heading, ""))
    bars = {entry.model: {"bits per byte": float(entry.figures["bits_per_byte"])} for entry in column.entries}
    picture = Picture(Text("比特/字节", "Bits a byte"), svg=bar_chart(bars, "bits per byte"))
    return [table, Pictures([picture])]


def compared_with(entry: Entry, column: Column) -> str:
    """The model that a difference is from, where it is not the first row: each file compares with its own first."""
    first = next(other for other in column.entries if other.path == entry.path)
    return "" if first is column.entries[0] else f" ({first.model})"


def tokenizer_of(entry: Entry) -> Any:
    return entry.settings.get("tokenizer")


def curve_blocks(column: Column) -> list[Block]:
    """Perplexity of the tokens at certain positions, and the lines through it."""
    first = tokenizer_of(column.entries[0])
    header = [Text(row["tokens"], "") for row in column.entries[0].figures["curve"]]
    by_model = {entry.model: entry for entry in column.entries}

    def cells(model: str) -> list[Cell]:
        mark = "" if tokenizer_of(by_model[model]) == first else " †"
        return [f"{row['perplexity']:.2f}{mark}" for row in by_model[model].figures["curve"]]

    table = table_of(list(by_model), header, cells)
    table.title = Text(f"{column.heading}：各位置词元的困惑度", f"{column.heading}: perplexity of tokens by position")
    lines = {
        model: [(float(row["length"]), float(row["perplexity"])) for row in entry.figures["curve"]]
        for model, entry in by_model.items()
    }
    picture = Picture(Text("困惑度随位置", "Perplexity by position"), svg=line_chart(lines, "tokens", "perplexity"))
    return [Beside(table, picture)]


# ---------------------------------------------------------------- alignment and the arena


def alignment_sections(entries: Sequence[Entry]) -> list[Section]:
    """Aligned answers overall, by the right answer and by category."""
    chosen = [entry for entry in entries if entry.kind == "alignment"]
    if not chosen:
        return []
    found, notes = group_columns(chosen)
    blocks: list[Block] = []
    for column in found:
        by_model = {entry.model: entry.figures for entry in column.entries}
        sides = list(dict.fromkeys(name for figures in by_model.values() for name in figures["by_expected"]))
        header = [Text(column.heading, "%"), *(Text(f"应答 {side}", f"expected {side}") for side in sides)]
        header += columns("含糊|unclear", "题数|questions")

        def cells(model: str, by_model: Any = by_model, sides: Any = sides) -> list[Cell]:
            figures = by_model[model]
            parts = [figures, *(figures["by_expected"].get(side) for side in sides)]
            counts = [f"{figures.get('unclear', 0):,}", f"{len(figures['answers']):,}"]
            return [*(scored(part, "aligned", factor=100) for part in parts), *counts]

        blocks.append(table_of(list(by_model), header, cells))
        names = list(dict.fromkeys(name for figures in by_model.values() for name in figures["by_category"]))
        rows: list[list[Cell]] = [
            [name, *(scored(f["by_category"].get(name), "aligned", factor=100) for f in by_model.values())]
            for name in names
        ]
        bars = {
            name: {m: 100 * float(f["by_category"][name]["aligned"]) for m, f in by_model.items()} for name in names
        }
        title = Text(f"{column.heading}，按类别", f"{column.heading}, by category")
        table = Table([Text("类别", "category"), *(Text(model, "") for model in by_model)], rows, title=title)
        blocks += with_picture(table, picture_of(title, bars, "aligned, %"))
    return [Section("alignment", Text("对齐", "Alignment"), [*blocks, *notes])]


def arena_sections(entries: Sequence[Entry]) -> list[Section]:
    """Standings and pairs of each file of votes: ratings of different votes cannot be compared."""
    sections = []
    for rank, entry in enumerate((entry for entry in entries if entry.kind == "arena"), 1):
        figures = entry.figures
        rows: list[list[Cell]] = [
            [
                model["name"],
                str(model["rank"]),
                *(spread(model[key], model[f"{key}_interval"], 0) for key in ("rating", "elo")),
                scored(model, "win_rate", "win_rate_interval"),
                " / ".join(str(model.get(key, 0)) for key in ("wins", "losses", "ties", "both_bad")),
            ]
            for model in figures["models"]
        ]
        header = [MODEL, *columns("名次|rank", "Bradley-Terry|", "Elo|", "胜率，不计平局，%|win rate without ties, %")]
        header += columns("胜/负/平/都差|won/lost/tied/both bad")
        ratings = {model["name"]: {"Bradley-Terry": float(model["rating"])} for model in figures["models"]}
        picture = Picture(Text("评分", "Ratings"), svg=bar_chart(ratings, "rating", digits=0))
        about = Text(f"{entry.path}，{figures['battles']} 场对战。", f"{entry.path}, {figures['battles']} battles.")
        blocks: list[Block] = [Paragraph(about), Table(header, rows), Pictures([picture])]
        if len(figures["groups"]) > 1:
            groups = " | ".join(", ".join(group) for group in figures["groups"])
            unconnected = Text(
                f"没有对战相连，不可比较：{groups}", f"Not connected by battles, not to be compared: {groups}"
            )
            blocks.append(Paragraph(unconnected))
        pairs: list[list[Cell]] = [
            [*pair["models"], str(pair["battles"]), scored(pair, "win_rate", "win_rate_interval")]
            for pair in figures["pairs"]
        ]
        header = columns("模型|model", "对手|against", "场数|battles", "前者胜率，%|win rate of the first, %")
        blocks.append(Table(header, pairs, words=2, title=Text("两两对战", "pairs"), folded=len(pairs) > MAX_ROWS))
        name = f"竞技场 {rank}" if rank > 1 else "竞技场"
        sections.append(Section(f"arena-{rank}", Text(name, "Arena"), blocks))
    return sections
