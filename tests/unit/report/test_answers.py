"""The page of answers next to each other: the order of questions, what is marked, what can be chosen."""

import re

import pytest

from support import fake_results as fake
from utils.core.errors import InputError
from utils.evaluation.result_files import AnswersResult, read_result, read_result_of
from utils.report import answers as page
from utils.report.pages import Filtered, Table, render_html, render_markdown


@pytest.fixture
def result(tmp_path):
    def read(record) -> AnswersResult:
        return read_result_of(AnswersResult, fake.write(tmp_path / "answers.json", record))

    return read


def three_models():
    """z beside x and y: worse than x in the second question alone, where y is better."""
    record = fake.answers()
    record["models"]["z"] = {**record["models"]["y"], "source": {"from": "z.jsonl", "sha256": "hash of z"}}
    for question, change in zip(record["questions"], (0, -1), strict=True):
        question["answers"]["z"] = {"text": "不知道", "scores": {"exact": 0.0, "chrf": 0.0}, "change": change}
    return record


def shown(html):
    """(classes, cells) of the rows of the last table but one: the questions."""
    body = re.search(r'<div class="filtered">.*?<tbody>(.*?)</tbody>', html, re.S)[1]
    rows = re.findall(r"<tr(?: class=\"([^\"]*)\")?>(.*?)</tr>", body, re.S)
    return [(classes.split(), re.findall(r"<td[^>]*>(.*?)</td>", cells, re.S)) for classes, cells in rows]


def test_the_worst_stands_first_and_says_what_changed(result):
    rows = shown(render_html(page.build_page(result(three_models()), 20)))
    # y: worse, better, same are the groups 0 to 2; z's are 3 to 5.
    assert [classes for classes, _ in rows] == [["g1", "g3"], ["g2", "g5"]]
    assert [cells[0] for _, cells in rows] == ["日本的首都？2", "日本的首都？1"]
    assert "▲" in rows[0][1][3] and "▼" in rows[0][1][4] and "＝" in rows[1][1][3]
    assert rows[0][1][2].startswith("大阪") and "exact 0" in rows[0][1][2], "of the first model nothing has changed"


def test_a_reader_can_choose_without_scripts(result):
    html = render_html(page.build_page(result(three_models()), 20))
    assert "<script" not in html
    ids = re.findall(r'<input type="radio" name="changes" id="([^"]+)"', html)
    assert ids == ["changes-all", *(f"changes-{number}" for number in range(6))]
    assert all(f'for="{name}"' in html for name in ids)
    assert "#changes-3:checked ~ .scroll tbody tr:not(.g3)" in html
    labels = re.findall(r'<label for="changes-(\w+)">(.*?)</label>', html)
    counts = {name: int(re.search(r"\((\d+)\)", text)[1]) for name, text in labels}
    assert counts == {"all": 2, "0": 0, "1": 1, "2": 1, "3": 1, "4": 0, "5": 1}


def test_one_model_has_its_lowest_score_first_and_nothing_to_choose(result):
    record = fake.answers()
    del record["models"]["y"]
    for question in record["questions"]:
        del question["answers"]["y"]
    built = page.build_page(result(record), 20)
    blocks = next(section for section in built.sections if section.name == "questions").blocks
    assert not any(isinstance(block, Filtered) for block in blocks)
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert [row[0] for row in table.rows] == ["日本的首都？2", "日本的首都？1"]


def test_few_questions_are_said_with_their_number(result):
    read = result(fake.answers())
    assert "Only 2 questions" in render_markdown(page.build_page(read, 20))
    assert "Only 2 questions" not in render_markdown(page.build_page(read, 2))


def test_text_is_escaped_and_a_conversation_is_shown_whole(result):
    record = fake.answers(texts=(("<script>1</script>", "|"), ("大阪", "东京")))
    record["questions"][0]["before"] = [{"role": "user", "content": "你好"}]
    built = page.build_page(result(record), 20)
    html = render_html(built)
    assert "&lt;script&gt;" in html and "<script" not in html and "[user] 你好\n日本" in html
    assert "\\|" in render_markdown(built)


def test_of_many_questions_the_worst_are_shown(result, monkeypatch):
    monkeypatch.setattr(page, "MOST_ROWS", 1)
    html = render_html(page.build_page(result(three_models()), 2))
    assert len(shown(html)) == 1 and "The worst 1 of 2" in html


def test_categories_have_a_table_where_there_are_several(result):
    record = fake.answers()
    assert page.category_sections(result(record)) == []
    for figures in record["models"].values():
        figures["by_category"]["law"] = {"chrf": {"score": 1.0, "interval": None, "questions": 1}}
    (section,) = page.category_sections(result(record))
    assert [row[0] for row in section.blocks[0].rows] == ["geo", "law"]
    assert section.blocks[0].rows[0][1] == "50.0 (25.0 – 75.0)" and section.blocks[0].rows[1][1] == "—"


def test_another_kind_of_result_is_refused(tmp_path):
    path = fake.write(tmp_path / "arena.json", fake.arena())
    with pytest.raises(InputError, match="kind 'arena'; need answers"):
        read_result_of(AnswersResult, path)
    assert read_result(fake.write(tmp_path / "a.json", fake.answers())).kind == "answers"
