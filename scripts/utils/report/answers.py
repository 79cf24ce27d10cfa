"""The page of eval_answers.py: models' answers to the same questions next to each other, with what changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.result_files import SHARES, AnsweredQuestion, AnswersResult
from .pages import Block, Cell, Change, Filtered, Page, Paragraph, Section, Table, Text, columns, write_page
from .sections import METRICS, answer_cell, answers_tables

MOST_ROWS = 500  # questions on the page; a browser takes its time with more
CHANGES = {-1: Text("更差", "worse"), 1: Text("更好", "better"), 0: Text("相同", "same")}
NOTE = Text(
    "数值都是百分数，括号内是 95 % 置信区间。变化与第一个模型在同样的题上成对比较；p 是更好与更差的双侧符号检验。"
    "“数字”只算参考答案里有数字的题。",
    "Figures are percents with 95 % intervals in brackets. Changes are from the first model, paired by question; p: "
    "two-sided sign test on better and worse. The number counts only where the reference has one.",
)


def write_answers(result: AnswersResult, path: Path, few: int) -> None:
    """Write `path`.html and `path`.md. Args: few: fewer questions than that are said to be few."""
    write_page(build_page(result, few), path)


def build_page(result: AnswersResult, few: int) -> Page:
    """Scores, then every question, the worst first."""
    blocks: list[Block] = [Paragraph(NOTE)]
    if len(result.questions) < few:
        said = Text(
            f"只有 {len(result.questions)} 道题：差别多半是偶然，至少 {few} 道题才可信。",
            f"Only {len(result.questions)} questions: differences are mostly chance; ask {few} at least.",
        )
        blocks.append(Paragraph(said))
    blocks += answers_tables(result.models)
    sections = [
        Section("scores", Text("得分", "Scores"), blocks),
        *category_sections(result),
        questions_section(result),
    ]
    sections.append(models_section(result))
    return Page(Text("我的问题", "My questions"), sections, " · ".join(result.question_files))


def category_sections(result: AnswersResult) -> list[Section]:
    """The deciding metric by category, where there are several."""
    names = list(dict.fromkeys(name for figures in result.models.values() for name in figures.by_category))
    if len(names) < 2:
        return []
    rows: list[list[Cell]] = [
        [
            name or "—",
            *(answer_cell(f.by_category.get(name, {}).get(f.metric)) for f in result.models.values()),
        ]
        for name in names
    ]
    metric = METRICS[next(iter(result.models.values())).metric]
    table = Table([Text("类别", "category"), *(Text(model, "") for model in result.models)], rows)
    return [Section("categories", Text(f"按类别，{metric.zh}", f"By category, {title_of(metric)}"), [table])]


def questions_section(result: AnswersResult) -> Section:
    """A row for each question: the reference, and what each model said, marked by what changed from the first."""
    first, *others = result.models
    metric = result.models[first].metric
    ordered = sorted(result.questions, key=lambda question: badness(question, first, others, metric))
    shown = ordered[:MOST_ROWS]
    header = [*columns("问题|question", "参考答案|reference"), *(Text(model, "") for model in result.models)]
    rows = [
        [asked(question), question.reference, *(answer(question, m, metric) for m in result.models)]
        for question in shown
    ]
    table = Table(header, rows, words=len(header))
    left_out = Text(
        f"最差的 {len(shown)} 道在前，共 {len(ordered)} 道；其余在 answers.json。",
        f"The worst {len(shown)} of {len(ordered)}; the others are in answers.json.",
    )
    blocks: list[Block] = [Paragraph(left_out)] if len(shown) < len(ordered) else []
    if not others:
        return Section("questions", Text("逐题，最差的在前", "Questions, the worst first"), [*blocks, table])
    kinds = [(model, change) for model in others for change in CHANGES]
    groups = [
        Text(f"{model} {text.zh}" if len(others) > 1 else text.zh, text.en)
        for model, change in kinds
        if (text := CHANGES[change])
    ]
    members = [
        {place for place, (model, change) in enumerate(kinds) if question.answers[model].change == change}
        for question in shown
    ]
    blocks.append(Filtered("changes", table, groups, members))
    return Section("questions", Text("逐题，最差的在前", "Questions, the worst first"), blocks)


def badness(question: AnsweredQuestion, first: str, others: Sequence[str], metric: str) -> tuple[float, ...]:
    """What sorts questions: the worst change, the largest loss against the first model, the lowest score."""
    scores = {model: given.scores.get(metric, 0.0) for model, given in question.answers.items()}
    changes = [question.answers[model].change or 0 for model in others]
    losses = [scores[model] - scores[first] for model in others]
    return (min(changes, default=0), min(losses, default=0.0), min(scores.values()))


def asked(question: AnsweredQuestion) -> str:
    """The question with the turns before it."""
    turns = [f"[{turn['role']}] {turn['content']}" for turn in question.before]
    return "\n".join([*turns, question.question])


def answer(question: AnsweredQuestion, model: str, metric: str) -> Cell:
    """What a model said; below it the score that decides, and which of the shares it has."""
    given = question.answers[model]
    marks = [title_of(METRICS[name]) for name in SHARES if given.scores.get(name) == 1 and name != metric]
    score = [f"{title_of(METRICS[metric])} {100 * given.scores[metric]:.0f}"] if metric in given.scores else []
    text = "\n".join(filter(None, [given.text or "∅", " · ".join([*score, *marks])]))
    return text if given.change is None else Change(text, given.change)


def title_of(text: Text) -> str:
    """The shorter of a title's languages, for lines of scores."""
    return text.en or text.zh


def models_section(result: AnswersResult) -> Section:
    """What each name stands for."""
    rows: list[list[Cell]] = [
        [name, "\n".join(f"{key}: {value}" for key, value in figures.source.items())]
        for name, figures in result.models.items()
    ]
    blocks: list[Block] = [Table(columns("模型|model", "来源|source"), rows, words=2)]
    if result.judge:
        blocks.append(Paragraph(Text(f"评判模型：{result.judge}。", f"Judge: {result.judge}.")))
    return Section("models", Text("模型", "Models"), blocks)
