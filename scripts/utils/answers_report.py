"""The report's part on held-out questions: which answers are the expected ones, before and after each training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .pages import Answer, Block, Cell, Paragraph, Section, Table, Text, columns, percent
from .recipe import (
    KINDS,
    SIDE_TITLES,
    SIDES,
    TARGET_KIND,
    RecipeRun,
    exact_match_by,
    is_exact,
    label,
    pick_samples,
    rank_kind,
)

EXACT_MATCH_TARGET = 0.90


def answers_section(run: RecipeRun, summary: Mapping[str, Any]) -> Section:
    """Shares of exact answers by kind of question."""
    note = Text(
        "回答与期望逐字相同的比例。只有第一类设目标：精调教的是怎样回答它问过的事实。没见过的算术、"
        "只在预训练文本里出现的事实，这样小的模型并不承诺，如实列出。PPO、DPO 学的是另一类问题，"
        "这里看它们有没有损害已学会的回答。",
        "Share of answers equal to the expected text. Only the first kind has a target: tuning teaches how to answer "
        "about facts it asks for. Sums with unseen operands and facts met only in plain text are more than a model of "
        "this size promises; they are shown as they are. PPO and DPO learn from other questions: here it shows "
        "whether they harm what was learned before.",
    )
    wordings = exact_match_by(run, [question.get("wording") for question in run.questions])
    groups = {**summary["exact_match_by_kind"], **wordings}
    rows: list[list[Cell]] = [
        [
            label(KINDS, name),
            *(f"{group['questions']:,}", *(percent(group[side]) for side in SIDES)),
            f"≥ {percent(EXACT_MATCH_TARGET, 0)}" if name == TARGET_KIND else "—",
        ]
        for name, group in sorted(groups.items(), key=lambda item: rank_kind(item[0]))
    ]
    header = [*columns("问题|questions", "数量|number"), *SIDE_TITLES.values(), *columns("精调后目标|target, tuned")]
    return Section("answers", Text("完全答对的问题", "Exact answers"), [Paragraph(note), Table(header, rows)])


def samples_section(run: RecipeRun) -> Section:
    """Some answers of each kind, and all of them, folded."""
    header = [*columns("问题|question", "期望|expected"), *SIDE_TITLES.values()]
    rows: list[list[Cell]] = []
    for place, question in enumerate(run.questions):
        asked = "\n".join(filter(None, (question["instruction"], question.get("input"))))
        answers = [run.answers[source][place] for source in SIDES.values()]
        rows.append([asked, str(question["output"]), *(Answer(text, is_exact(text, question)) for text in answers)])
    words = len(header)
    blocks: list[Block] = [
        Table(header, [rows[index] for index in indices], words=words, title=label(KINDS, kind))
        for kind, indices in pick_samples([question.get("kind", "other") for question in run.questions]).items()
    ]
    title = Text(f"全部 {len(rows)} 个问题", f"all {len(rows)} questions")
    blocks.append(Table(header, rows, words=words, title=title, folded=True))
    return Section("samples", Text("回答示例", "Sample answers"), blocks)
