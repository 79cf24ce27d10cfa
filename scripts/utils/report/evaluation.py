"""The report on evaluations: one page from any set of result files, with what the models were asked, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.result_files import AlignmentResult, AnswersResult, ChoiceResult, ResultFile
from .pages import Block, Cell, Page, Paragraph, Section, Table, Text, columns, write_page
from .results import Entry
from .sections import (
    alignment_sections,
    answers_sections,
    arena_sections,
    choice_sections,
    group_columns,
    longbench_sections,
    main_cell,
    main_figure,
    models_of,
    perplexity_sections,
    picture_of,
    table_of,
    with_picture,
)

PAGE = "evaluation"  # evaluation.html and evaluation.md
NOTE = Text(
    "数值都是百分数，括号内是 95 % 置信区间；困惑度和比特/字节除外。只有题目、提示和设置都相同的结果才在同一列；"
    "标题相同而内容不同的列带上标，表下说明不同之处。",
    "Figures are percents with 95 % intervals in brackets, perplexity and bits a byte apart. Only results of the same "
    "questions, prompts and settings share a column; columns of one heading that differ are marked, and what differs "
    "is said below the table.",
)


def write_evaluation(entries: Sequence[Entry[Any]], folder: Path) -> dict[str, Any]:
    """Write evaluation.html and evaluation.md; returns {column: {model: its main figure}}."""
    write_page(build_page(entries), folder / PAGE)
    return {
        column.heading: {entry.model: main_figure(entry) for entry in column.entries}
        for column in group_columns([entry for entry in entries if entry.kind != "arena"])[0]
    }


def build_page(entries: Sequence[Entry[Any]]) -> Page:
    """All sections, in the order they are read."""
    sections = [
        *overview_sections(entries),
        *choice_sections(entries),
        *longbench_sections(entries),
        *perplexity_sections(entries),
        *alignment_sections(entries),
        *answers_sections(entries),
        *arena_sections(entries),
        prompts_section(entries),
        settings_section(entries),
        data_section(entries),
        environment_section(entries),
    ]
    files = list(dict.fromkeys(str(entry.path) for entry in entries))
    return Page(Text("评测结果", "Evaluation"), sections, " · ".join(files))


def overview_sections(entries: Sequence[Entry[Any]]) -> list[Section]:
    """All models and benchmarks in one table."""
    found, notes = group_columns([entry for entry in entries if entry.kind != "arena"])
    if not found:
        return []
    units = {"perplexity": "比特/字节 bits/byte"}
    header = [Text(column.heading, units.get(column.entries[0].kind, "%")) for column in found]

    def cells(model: str) -> list[Cell]:
        by_model = [{entry.model: entry for entry in column.entries} for column in found]
        return [main_cell(entries.get(model)) for entries in by_model]

    table = table_of(models_of(e for column in found for e in column.entries), header, cells)
    groups = {
        column.heading: {e.model: value for e in column.entries if (value := main_figure(e)) is not None}
        for column in found
        if column.entries[0].kind != "perplexity"
    }
    groups = {name: values for name, values in groups.items() if values}
    picture = picture_of(Text("各项评测，%", "All benchmarks, %"), groups, "score, %")
    return [Section("overview", Text("总表", "At a glance"), [Paragraph(NOTE), *notes, *with_picture(table, picture)])]


# ---------------------------------------------------------------- what was asked, and how


def prompts_section(entries: Sequence[Entry[Any]]) -> Section:
    """How each benchmark was asked, with a prompt or a question as it was."""
    rows: list[list[Cell]] = []
    for column in group_columns([entry for entry in entries if entry.kind != "perplexity"])[0]:
        entry = column.entries[0]
        rows.append([column.heading, describe_prompts(entry), example_of(entry.file)])
    header = columns("评测|benchmark", "提示|prompts", "示例|example")
    note = Text(
        "示例是第一题的提示，如实照录；对话形式尚未套用模型的模板。",
        "The example is the prompt of the first question as it was; conversations are shown before the model's "
        "template is put around them.",
    )
    return Section("prompts", Text("提示", "Prompts"), [Paragraph(note), Table(header, rows, words=3)])


def describe_prompts(entry: Entry[Any]) -> str:
    """Presets and the like; the templates of the models, which may be their own."""
    details = {key: value for key, value in entry.details.items() if key not in ("data", "prompt", "votes", "samples")}
    return "\n".join(f"{key}: {value}" for key, value in details.items() if value not in (None, []))


def example_of(file: ResultFile) -> str:
    """The first prompt, as text or as messages, or the first question; not every kind keeps one."""
    example: Any = None
    if isinstance(file, ChoiceResult):
        example = file.prompts.example
    elif isinstance(file, AlignmentResult):
        example = file.answers[0].question
    elif isinstance(file, AnswersResult) and file.questions:
        example = file.questions[0].question
    if isinstance(example, list):
        return "\n".join(f"[{turn['role']}] {turn['content']}" for turn in example)
    return "—" if example is None else str(example)


def settings_section(entries: Sequence[Entry[Any]]) -> Section:
    """The flags of each file that differ from their defaults."""
    rows: list[list[Cell]] = [
        [str(path), ", ".join(models_of(entries)), say(entries[0].file.settings)]
        for path, entries in by_file(entries).items()
    ]
    header = columns("文件|file", "模型|model", "与默认值不同的设置|settings that differ from defaults")
    return Section("settings", Text("设置", "Settings"), [Table(header, rows, words=3)])


def say(settings: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    return "\n".join(f"--{key} {value}" for key, value in plain.items()) or "—"


def by_file(entries: Sequence[Entry[Any]]) -> dict[Path, list[Entry[Any]]]:
    found: dict[Path, list[Entry[Any]]] = {}
    for entry in entries:
        found.setdefault(entry.path, []).append(entry)
    return found


def data_section(entries: Sequence[Entry[Any]]) -> Section:
    """Fingerprints of weights and hashes of data files."""
    weights: dict[tuple[str, str], list[Cell]] = {}
    for entry in entries:
        for name, value in entry.weights.items():
            weights[name, value] = [entry.model, name, value]
    files: dict[tuple[str, str], list[Cell]] = {}
    for entry in entries:
        for name, value in entry.data.items():
            files[name, value] = [entry.column, name, value]
    blocks: list[Block] = [
        Table(columns("模型|model", "权重|weights", "指纹|fingerprint"), list(weights.values()), words=3)
    ]
    title = Text(f"{len(files)} 个数据文件的 SHA-256", f"SHA-256 of {len(files)} data files")
    header = columns("评测|benchmark", "文件|file", "SHA-256|")
    blocks.append(Table(header, list(files.values()), words=3, title=title, folded=True))
    return Section("data", Text("权重与数据", "Weights and data"), blocks)


def environment_section(entries: Sequence[Entry[Any]]) -> Section:
    """Package versions; files of one environment share a column."""
    groups: dict[str, tuple[Mapping[str, str], list[str]]] = {}
    for path, found in by_file(entries).items():
        versions = found[0].file.environment
        groups.setdefault(repr(sorted(versions.items())), (versions, []))[1].append(str(path))
    packages = dict.fromkeys(name for versions, _ in groups.values() for name in versions)
    header = [Text("软件包", "package"), *(Text("\n".join(files), "") for _, files in groups.values())]
    rows: list[list[Cell]] = [
        [name, *(versions.get(name, "—") for versions, _ in groups.values())] for name in packages
    ]
    return Section("environment", Text("环境", "Environment"), [Table(header, rows, words=len(header))])
