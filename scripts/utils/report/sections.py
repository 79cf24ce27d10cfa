"""Tables and pictures of evaluations, models as rows: a section for each benchmark.

Figures whose questions, prompts or settings differ stand in columns of their own, marked where the headings are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from ..core.files import hash_json
from ..evaluation.result_files import (
    AlignmentResult,
    AnswerChanges,
    AnswerScore,
    AnswersFigures,
    ArenaResult,
    AverageScore,
    ChoiceResult,
    DocumentRow,
    LongbenchResult,
    Percent,
)
from .charts import bar_chart, line_chart, radar_chart
from .pages import Beside, Block, Cell, Paragraph, Picture, Pictures, Section, Table, Text, columns
from .results import Curve, Entry, F, Figures

MARKS = "¹²³⁴⁵⁶⁷⁸⁹"
MODEL = Text("模型", "model")
LONGEST_AXIS = 18  # letters of the name of a radar's axis
MOST_BESIDE = 3  # columns of a table that has room for a picture beside it


class Scored(Protocol):
    """A part of a result: a category, a subject, a dataset ..."""

    @property
    def percent(self) -> Percent | None: ...


@dataclass(frozen=True)
class Column(Generic[F]):
    """Entries that can be compared, and their heading with its mark."""

    heading: str
    entries: Sequence[Entry[F]]

    @property
    def by_model(self) -> dict[str, F]:
        """What each model scored."""
        return {entry.model: entry.figures for entry in self.entries}


def select(entries: Iterable[Entry[Any]], kind: type[F]) -> list[Entry[F]]:
    """The entries whose figures are of a kind."""
    return [entry for entry in entries if isinstance(entry.figures, kind)]


def group_columns(entries: Sequence[Entry[F]]) -> tuple[list[Column[F]], list[Block]]:
    """Entries with equal details together, in the order they came; and what differs between equal headings."""
    groups: dict[str, list[Entry[F]]] = {}
    for entry in entries:
        key = hash_json([entry.kind, entry.benchmark, entry.column, entry.details])
        groups.setdefault(key, []).append(entry)
    # Groups of one heading are marked by raised digits; the notes say in what they differ.
    headings: dict[tuple[str, str], list[list[Entry[F]]]] = {}
    for group in groups.values():
        headings.setdefault((group[0].kind, group[0].column), []).append(group)
    found: list[Column[F]] = []
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
    # A setting that one file does not name differs from one that it does: get() gives None for it.
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
    # Prompts and lists of files differ somewhere in their middle; of a hash the beginning tells.
    return text if len(text) <= 24 and "\n" not in text else hash_json(value)[:8]


def models_of(entries: Iterable[Entry[Any]]) -> list[str]:
    # A dict where a set would do, here and below: it keeps the order, which is the user's.
    return list(dict.fromkeys(entry.model for entry in entries))


def scored(percent: Percent | None) -> str:
    """A percentage with its interval; a dash where there is none."""
    if percent is None:
        return "—"
    value, (low, high) = percent
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def scored_part(parts: Mapping[str, Scored], name: str) -> str:
    """The same of a category, a subject, a group ...; not all models have all of them."""
    return scored(parts[name].percent if name in parts else None)


def with_interval(value: float, interval: Sequence[float] | None, digits: int = 3, sign: str = "") -> str:
    """A figure that is no percentage, with its interval where it has one."""
    if interval is None:
        return f"{value:{sign}.{digits}f}"
    return f"{value:{sign}.{digits}f} ({interval[0]:{sign}.{digits}f} – {interval[1]:{sign}.{digits}f})"


def main_percent(figures: Figures) -> Percent | None:
    """The figure that stands for a result; None where the right answers are not public, and of texts."""
    if isinstance(figures, ChoiceResult | AlignmentResult):
        return figures.percent
    return figures.averages["all"].percent if isinstance(figures, LongbenchResult) else None


def main_figure(entry: Entry[Any]) -> float | None:
    """The same without its interval, and of texts bits a byte."""
    figures: Figures = entry.figures
    if isinstance(figures, DocumentRow):
        return figures.bits_per_byte
    if isinstance(figures, Curve):
        return figures.rows[-1].bits_per_byte_to_here
    if isinstance(figures, AnswersFigures):
        return None if figures.main is None else figures.main.score
    percent = main_percent(figures)
    return None if percent is None else percent[0]


def main_cell(entry: Entry[Any] | None) -> str:
    """The same with its interval."""
    if entry is None:
        return "—"
    figures: Figures = entry.figures
    if isinstance(figures, DocumentRow | Curve):
        interval = figures.bits_per_byte_interval if isinstance(figures, DocumentRow) else None
        return with_interval(main_figure(entry) or 0.0, interval)
    if isinstance(figures, AnswersFigures):
        return answer_cell(figures.main)
    return scored(main_percent(figures))


def table_of(models: Sequence[str], header: Sequence[Text], cells: Callable[[str], Sequence[Cell]]) -> Table:
    """A row for each model."""
    return Table([MODEL, *header], [[model, *cells(model)] for model in models])


def picture_of(title: Text, groups: Mapping[str, Mapping[str, float]], label: str) -> Picture | None:
    """{benchmark or category: {model: figure}} as a radar, as bars where there are too few axes or names too long.

    Returns: None if there is nothing to draw.
    """
    if not any(groups.values()):
        return None
    if len(groups) >= 3 and max(map(len, groups)) <= LONGEST_AXIS:  # two axes make a line, not an area
        return Picture(title, svg=radar_chart(groups, label))
    models = list(dict.fromkeys(model for values in groups.values() for model in values))
    # Bars stand in clusters by model, an axis's values by name: the table is turned round.
    bars = {model: {name: values[model] for name, values in groups.items() if model in values} for model in models}
    return Picture(title, svg=bar_chart(bars, label, digits=1))


def with_picture(table: Table, picture: Picture | None) -> list[Block]:
    """Side by side, a wide table above its picture."""
    if picture is None:
        return [table]
    # A wide table beside a picture would be squeezed until its figures break over lines.
    return [Beside(table, picture)] if len(table.header) <= MOST_BESIDE else [table, Pictures([picture])]


MAX_ROWS = 20  # longer tables are folded
AVERAGES = {"zh": Text("中文", "Chinese"), "en": Text("英文", "English"), "all": Text("全部", "all")}


# ---------------------------------------------------------------- questions with choices


def choice_sections(entries: Sequence[Entry[Any]]) -> list[Section]:
    """A section for each benchmark of questions with choices."""
    chosen = select(entries, ChoiceResult)
    sections = []
    for rank, name in enumerate(dict.fromkeys(entry.benchmark for entry in chosen), 1):
        found, notes = group_columns([entry for entry in chosen if entry.benchmark == name])
        blocks: list[Block] = [choice_table(found), *notes]
        for column in found:
            blocks += choice_details(column)
        sections.append(Section(f"choices-{rank}", Text(f"选择题 {name}", f"Multiple choice, {name}"), blocks))
    return sections


def choice_table(found: Sequence[Column[ChoiceResult]]) -> Table:
    """Accuracy in every column, weighted by questions, and the mean over subjects."""
    header: list[Text] = []
    for column in found:
        header += [Text(column.heading, "%"), Text("科目平均", "mean over subjects")]
        if has_clean(column):  # of any model: the others have dashes
            header.append(Text("训练数据中没有的题", "questions not in training data"))

    def cells(model: str) -> list[Cell]:
        row: list[Cell] = []
        for column in found:
            figures = column.by_model.get(model)
            row.append(scored(figures.percent if figures else None) + remarks(figures))
            row.append(scored(figures.subject_percent if figures else None))
            if has_clean(column):
                clean = figures.contamination.clean if figures and figures.contamination else None
                row.append(scored(clean.percent if clean else None))
        return row

    return table_of(models_of(entry for column in found for entry in column.entries), header, cells)


def has_clean(column: Column[ChoiceResult]) -> bool:
    return any(figures.contamination for figures in column.by_model.values())


def remarks(figures: ChoiceResult | None) -> str:
    """What makes a figure less sure: unread answers, ties, failures, missing subjects, prompts that were cut."""
    if figures is None:
        return ""
    counts = {
        "unparsed": figures.unparsed,
        "ties": figures.ties,
        "errors": figures.errors,
        "subjects missing": len(figures.benchmark.missing_subjects),
        "prompts without all examples": figures.prompts.prompts_without_all_examples,
        "prompts cut": figures.prompts.cut_prompts,
    }
    said = [f"{count} {name}" for name, count in counts.items() if count]
    return f"\n{', '.join(said)}" if said else ""


def choice_details(column: Column[ChoiceResult]) -> list[Block]:
    """Accuracy by category with its picture, and by subject."""
    by_model = column.by_model
    blocks: list[Block] = []
    names = list(dict.fromkeys(name for figures in by_model.values() for name in figures.by_category))
    if len(names) > 1:  # of one category, the table above says it
        table = table_of(
            list(by_model),
            [Text(name, "") for name in names],
            lambda model: [scored_part(by_model[model].by_category, name) for name in names],
        )
        table.title = Text(f"{column.heading}，按类别", f"{column.heading}, by category")
        groups = {name: values_of(name, {m: f.by_category for m, f in by_model.items()}) for name in names}
        blocks += with_picture(table, picture_of(table.title, groups, "accuracy, %"))
    subjects = list(dict.fromkeys(name for figures in by_model.values() for name in figures.by_subject))
    if len(subjects) > 1:
        rows: list[list[Cell]] = [
            [
                # Each file has the names of its own subjects; not all files have all of them.
                next(f.by_subject[name].name or name for f in by_model.values() if name in f.by_subject),
                *(scored_part(figures.by_subject, name) for figures in by_model.values()),
            ]
            for name in subjects
        ]
        title = Text(f"{column.heading}，{len(rows)} 个科目", f"{column.heading}, {len(rows)} subjects")
        header = [Text("科目", "subject"), *(Text(model, "") for model in by_model)]
        blocks.append(Table(header, rows, title=title, folded=True))
    return blocks


def values_of(name: str, parts: Mapping[str, Mapping[str, Scored]]) -> dict[str, float]:
    """{model: the percentage of its part of this name}, without models that have none. Args: parts: by model."""
    return {model: percent[0] for model, own in parts.items() if name in own and (percent := own[name].percent)}


# ---------------------------------------------------------------- LongBench


def longbench_sections(entries: Sequence[Entry[Any]]) -> list[Section]:
    """Averages and groups of tasks as published tables have them, LongBench-E's by length, and every dataset."""
    sections = []
    chosen = select(entries, LongbenchResult)
    for rank, name in enumerate(dict.fromkeys(entry.benchmark for entry in chosen), 1):
        found, notes = group_columns([entry for entry in chosen if entry.benchmark == name])
        blocks: list[Block] = [*notes]
        for column in found:
            blocks += longbench_blocks(column)
        sections.append(Section(f"longbench-{rank}", Text(name, ""), blocks))
    return sections


def longbench_blocks(column: Column[LongbenchResult]) -> list[Block]:
    by_model = column.by_model
    blocks: list[Block] = []
    for key, title in AVERAGES.items():
        averages = {model: f.averages[key] for model, f in by_model.items() if key in f.averages}
        if not averages or (key == "all" and len(blocks) == 1 and len(averages) == len(by_model)):
            continue  # of one language, all is the same again
        title = Text(f"{column.heading}，{title.zh}", f"{column.heading}, {title.en}")
        groups = list(dict.fromkeys(group for average in averages.values() for group in average.groups))
        bars = {group: values_of(group, {m: a.groups for m, a in averages.items()}) for group in groups}
        blocks += with_picture(average_table(averages, groups, title), picture_of(title, bars, "score, %"))
    names = list(dict.fromkeys(name for figures in by_model.values() for name in figures.datasets))
    rows: list[list[Cell]] = [
        [name, *(scored_part(figures.datasets, name) for figures in by_model.values())] for name in names
    ]
    title = Text(f"{column.heading}，各数据集", f"{column.heading}, every dataset")
    header = [Text("数据集", "dataset"), *(Text(model, "") for model in by_model)]
    blocks.append(Table(header, rows, title=title, folded=len(rows) > MAX_ROWS))
    said = "; ".join(
        f"{e.model}: max_length {e.settings.get('max_length', '–')}, {e.figures.prompts_cut} cut"
        for e in column.entries
    )
    blocks.append(Paragraph(Text(f"提示的最大长度与截断数 — {said}。", f"Longest prompts, and prompts cut: {said}.")))
    return blocks


def average_table(averages: Mapping[str, AverageScore], groups: Sequence[str], title: Text) -> Table:
    """A row for each model: its average, that of each group of tasks, and in LongBench-E of each length."""
    buckets = list(dict.fromkeys(bucket for average in averages.values() for bucket in average.buckets))
    header = [Text("平均", "average"), *(Text(name, "") for name in (*groups, *buckets))]

    def cells(model: str) -> list[Cell]:
        average = averages[model]
        by_group = [scored_part(average.groups, group) for group in groups]
        return [scored(average.percent), *by_group, *(scored_part(average.buckets, bucket) for bucket in buckets)]

    table = table_of(list(averages), header, cells)
    table.title = title
    return table


# ---------------------------------------------------------------- perplexity


def perplexity_sections(entries: Sequence[Entry[Any]]) -> list[Section]:
    """Perplexity and bits a byte of whole documents, and curves by position."""
    found, notes = group_columns([entry for entry in entries if entry.kind == "perplexity"])
    if not found:
        return []
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
    # Entries of a column are all of documents or all of rows: their details tell these apart.
    for column in found:
        if curves := select(column.entries, Curve):
            blocks += curve_blocks(Column(column.heading, curves))
        else:
            blocks += document_blocks(Column(column.heading, select(column.entries, DocumentRow)))
    return [Section("perplexity", Text("困惑度", "Perplexity"), [*blocks, *notes])]


def document_blocks(column: Column[DocumentRow]) -> list[Block]:
    """A row for each model; the first whose tokenizer is another one than the first row's has a mark."""
    first = tokenizer_of(column.entries[0])
    rows: list[list[Cell]] = []
    for entry in column.entries:
        figures = entry.figures
        difference, between = figures.bits_per_byte_difference, figures.bits_per_byte_difference_interval
        # Other tokens, other perplexity: the figure stands there, but must not be compared.
        mark = "" if tokenizer_of(entry) == first else " †"
        rows.append(
            [
                entry.model,
                with_interval(figures.perplexity, figures.perplexity_interval, 2) + mark,
                with_interval(figures.bits_per_byte, figures.bits_per_byte_interval),
                "—"
                if difference is None
                else with_interval(difference, between, sign="+") + compared_with(entry, column),
                *(f"{count:,}" for count in (figures.documents, figures.scored_tokens)),
            ]
        )
    header = [MODEL, *columns("困惑度|perplexity", "比特/字节|bits/byte", "与第一行之差|against the first")]
    header += columns("文档|documents", "词元|tokens")
    table = Table(header, rows, title=Text(column.heading, ""))
    bars = {entry.model: {"bits per byte": float(entry.figures.bits_per_byte)} for entry in column.entries}
    picture = Picture(Text("比特/字节", "Bits a byte"), svg=bar_chart(bars, "bits per byte"))
    return [table, Pictures([picture])]


def compared_with(entry: Entry[Any], column: Column[Any]) -> str:
    """The model that a difference is from, where it is not the first row: each file compares with its own first."""
    first = next(other for other in column.entries if other.path == entry.path)
    return "" if first is column.entries[0] else f" ({first.model})"


def tokenizer_of(entry: Entry[Any]) -> Any:
    return entry.settings.get("tokenizer")


def curve_blocks(column: Column[Curve]) -> list[Block]:
    """Perplexity of the tokens at certain positions, and the lines through it."""
    first = tokenizer_of(column.entries[0])
    header = [Text(row.tokens, "") for row in column.entries[0].figures.rows]
    by_model = {entry.model: entry for entry in column.entries}

    def cells(model: str) -> list[Cell]:
        mark = "" if tokenizer_of(by_model[model]) == first else " †"
        return [f"{row.perplexity:.2f}{mark}" for row in by_model[model].figures.rows]

    table = table_of(list(by_model), header, cells)
    table.title = Text(f"{column.heading}：各位置词元的困惑度", f"{column.heading}: perplexity of tokens by position")
    lines = {
        model: [(float(row.length), float(row.perplexity)) for row in entry.figures.rows]
        for model, entry in by_model.items()
    }
    picture = Picture(Text("困惑度随位置", "Perplexity by position"), svg=line_chart(lines, "tokens", "perplexity"))
    return [Beside(table, picture)]


# ---------------------------------------------------------------- alignment, open questions and the arena


def alignment_sections(entries: Sequence[Entry[Any]]) -> list[Section]:
    """Aligned answers overall, by the right answer and by category."""
    found, notes = group_columns(select(entries, AlignmentResult))
    if not found:
        return []
    blocks: list[Block] = []
    for column in found:
        by_model = column.by_model
        blocks.append(aligned_table(column))
        names = list(dict.fromkeys(name for figures in by_model.values() for name in figures.by_category))
        rows: list[list[Cell]] = [
            [name, *(scored_part(figures.by_category, name) for figures in by_model.values())] for name in names
        ]
        bars = {name: values_of(name, {m: f.by_category for m, f in by_model.items()}) for name in names}
        title = Text(f"{column.heading}，按类别", f"{column.heading}, by category")
        table = Table([Text("类别", "category"), *(Text(model, "") for model in by_model)], rows, title=title)
        blocks += with_picture(table, picture_of(title, bars, "aligned, %"))
    return [Section("alignment", Text("对齐", "Alignment"), [*blocks, *notes])]


def aligned_table(column: Column[AlignmentResult]) -> Table:
    """A row for each model: all its answers, and those to questions whose right answer is one of yes and no."""
    by_model = column.by_model
    sides = list(dict.fromkeys(name for figures in by_model.values() for name in figures.by_expected))
    header = [Text(column.heading, "%"), *(Text(f"应答 {side}", f"expected {side}") for side in sides)]
    header += columns("含糊|unclear", "题数|questions")

    def cells(model: str) -> list[Cell]:
        figures = by_model[model]
        by_side = [scored_part(figures.by_expected, side) for side in sides]
        return [scored(figures.percent), *by_side, f"{figures.unclear:,}", f"{len(figures.answers):,}"]

    return table_of(list(by_model), header, cells)


METRICS = {
    "exact": Text("完全一致", "exact"),
    "contained": Text("含参考答案", "contained"),
    "number": Text("数字", "number"),
    "rouge_l": Text("ROUGE-L", ""),
    "chrf": Text("chrF", ""),
}


def answers_sections(entries: Sequence[Entry[Any]]) -> list[Section]:
    """Scores of answers to one's own questions, and what changed from each file's first model."""
    found, notes = group_columns(select(entries, AnswersFigures))
    if not found:
        return []
    blocks: list[Block] = []
    for column in found:
        blocks += answers_tables(column.by_model, Text(column.heading, ""))
    return [Section("answers", Text("自己的问题", "Own questions"), [*blocks, *notes])]


def answers_tables(by_model: Mapping[str, AnswersFigures], title: Text | None = None) -> list[Block]:
    """A row for each model: every metric with its interval; and what changed from the first model."""
    known = [name for name in METRICS if any(name in figures.scores for figures in by_model.values())]
    scores = table_of(
        list(by_model),
        [METRICS[name] for name in known],
        lambda model: [answer_cell(by_model[model].scores.get(name)) for name in known],
    )
    scores.title = title
    others = [model for model, figures in by_model.items() if figures.changes]
    if not others:
        return [scores]
    metric = METRICS[by_model[others[0]].metric]
    header = [Text(f"{metric.zh}：更好/更差/相同", f"{metric.en or metric.zh}: better/worse/same")]
    header += columns("差|difference", "p|")
    judged = any(figures.judged for figures in by_model.values())
    header += columns("评判：更好/更差/相同|judged better/worse/same", "p|") * judged

    def cells(model: str) -> list[Cell]:
        by_judge = change_cells(by_model[model].judged)
        return [*change_cells(by_model[model].changes), *([by_judge[0], by_judge[2]] * judged)]

    changes = table_of(others, header, cells)
    changes.title = Text("与第一个模型相比", "against the first model")
    return [scores, changes]


def answer_cell(score: AnswerScore | None) -> str:
    """A mean in percent with its interval."""
    return "—" if score is None else with_interval(score.score, score.interval, 1)


def change_cells(changes: AnswerChanges | None) -> list[str]:
    """How many are better, worse and the same; the difference of means; the p-value."""
    if changes is None:
        return ["—"] * 3
    difference = "—" if changes.difference is None else with_interval(changes.difference, changes.interval, 1, "+")
    p_value = "—" if changes.p_value is None else f"{changes.p_value:.2g}"
    return [f"{changes.better} / {changes.worse} / {changes.same}", difference, p_value]


def arena_sections(entries: Sequence[Entry[Any]]) -> list[Section]:
    """Standings and pairs of each file of votes: ratings of different votes cannot be compared."""
    sections = []
    # No columns: a rating says how strong a model is among those it met, and every file has its own.
    for rank, entry in enumerate(select(entries, ArenaResult), 1):
        figures = entry.figures
        rows: list[list[Cell]] = [
            [
                model.name,
                str(model.rank),
                with_interval(model.rating, model.rating_interval, 0),
                with_interval(model.elo, model.elo_interval, 0),
                scored(model.percent),
                f"{model.wins} / {model.losses} / {model.ties} / {model.both_bad}",
            ]
            for model in figures.models
        ]
        header = [MODEL, *columns("名次|rank", "Bradley-Terry|", "Elo|", "胜率，不计平局，%|win rate without ties, %")]
        header += columns("胜/负/平/都差|won/lost/tied/both bad")
        ratings = {model.name: {"Bradley-Terry": float(model.rating)} for model in figures.models}
        picture = Picture(Text("评分", "Ratings"), svg=bar_chart(ratings, "rating", digits=0))
        about = Text(f"{entry.path}，{figures.battles} 场对战。", f"{entry.path}, {figures.battles} battles.")
        blocks: list[Block] = [Paragraph(about), Table(header, rows), Pictures([picture])]
        if len(figures.groups) > 1:
            groups = " | ".join(", ".join(group) for group in figures.groups)
            unconnected = Text(
                f"没有对战相连，不可比较：{groups}", f"Not connected by battles, not to be compared: {groups}"
            )
            blocks.append(Paragraph(unconnected))
        pairs: list[list[Cell]] = [[*pair.models, str(pair.battles), scored(pair.percent)] for pair in figures.pairs]
        header = columns("模型|model", "对手|against", "场数|battles", "前者胜率，%|win rate of the first, %")
        blocks.append(Table(header, pairs, words=2, title=Text("两两对战", "pairs"), folded=len(pairs) > MAX_ROWS))
        name = f"竞技场 {rank}" if rank > 1 else "竞技场"
        sections.append(Section(f"arena-{rank}", Text(name, "Arena"), blocks))
    return sections
