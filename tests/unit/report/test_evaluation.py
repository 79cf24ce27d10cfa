"""The report on result files: what shares a column, what is refused, and that figures are those of the files."""

import re

import pytest

from support import fake_results as fake
from utils.core.errors import InputError
from utils.report.charts import nice_ticks, radar_chart
from utils.report.evaluation import build_page, write_evaluation
from utils.report.pages import render_html, render_markdown
from utils.report.results import read_results
from utils.report.sections import group_columns


@pytest.fixture
def put(tmp_path):
    """Write a result file into a folder of its own; returns its path."""
    made = []

    def write(value, name=None):
        made.append(value)
        kind = value.get("kind", "alignment") if isinstance(value, dict) else "multiple_choice"
        return fake.write(tmp_path / str(len(made)) / (name or f"{kind}.json"), value)

    return write


def headings(entries):
    return [column.heading for column in group_columns(entries)[0]]


def rows_of(entries, title):
    """{model: cells} of the first table of a section in Markdown."""
    part = re.search(rf"^## {title}[^\n]*\n(.*?)(?=^## |\Z)", render_markdown(build_page(entries)), re.M | re.S)[1]
    table = re.search(r"(?:^\|.*\n)+", part, re.M)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return {row[0].strip(): row[1:] for row in rows[2:]}


# ---------------------------------------------------------------- figures


def test_every_kind_is_in_one_page(put, tmp_path):
    files = [fake.multiple_choice(), fake.multiple_choice("out/base", (2, 3, 3)), fake.longbench(), fake.perplexity()]
    files += [fake.alignment(), fake.arena(), fake.curve(), fake.answers(names=("sft", "base"))]
    entries = read_results([put(file) for file in files])
    figures = write_evaluation(entries, tmp_path / "page")
    assert figures == {
        "cmmlu test, 5-shot": {"sft": pytest.approx(56.667, abs=0.001), "base": pytest.approx(26.667, abs=0.001)},
        "LongBench": {"sft": pytest.approx(100 / 3)},
        "news, window 512": {"base": 1.2, "sft": 1.0},
        "novel, by position": {"base": 0.75},
        "alignment": {"sft": 75.0},
        "answers, exact": {"sft": 50.0, "base": 100.0},
    }
    page = (tmp_path / "page" / "evaluation.html").read_text(encoding="utf-8")
    names = re.findall(r'<section id="([^"]+)"', page)
    assert names == ["overview", "choices-1", "longbench-1", "perplexity", "alignment", "answers", "arena-1",
                     "prompts", "settings", "data", "environment"]  # fmt: skip
    assert "<script" not in page and "src=" not in page and "<b>1+1</b>" not in page and "&lt;b&gt;1+1" in page
    # CMMLU by category (two models), LongBench in Chinese and all, and of the overview the model that has all three.
    assert page.count('fill-opacity="0.08"') == 2 + 2 + 1


def test_cells_have_the_figures_of_the_files(put):
    entries = read_results([put(fake.multiple_choice()), put(fake.multiple_choice("out/base", (2, 3, 3)))])
    rows = rows_of(entries, "总表")
    assert rows["sft"] == ["56.7 (39.7–72.7)"] and rows["base"] == ["26.7 (9.7–42.7)"]
    assert rows_of(entries, "选择题")["base"] == ["26.7 (9.7–42.7)", "26.7 (11.7–41.7)"]
    shown = render_markdown(build_page(entries))
    assert "| sft | 80.0 (49.0–94.3) | 60.0 (31.3–83.2) | 30.0 (10.8–60.3) |" in shown
    assert "| 科目 law | 60.0 (31.3–83.2) | 30.0 (10.8–60.3) |" in shown


def test_alignment_is_shown_in_percent(put):
    entries = read_results([put(fake.alignment())])
    assert rows_of(entries, "对齐")["sft"] == [
        *("75.0 (37.5–87.5)", "50.0 (25.0–75.0)", "100.0 (50.0–100.0)", "1", "4"),
    ]


def test_answers_have_every_score_and_what_changed(put):
    entries = read_results([put(fake.answers())])
    rows = rows_of(entries, "自己的问题")
    assert rows["x"] == ["50.0 (25.0 – 75.0)", "60.0 (30.0 – 80.0)"]
    assert "| y | 1 / 0 / 1 | +50.0 (-19.3 – +100.0) | 1 |" in render_markdown(build_page(entries))
    other = fake.answers(question="法国的首都？")
    entries = read_results([put(fake.answers()), put(other)])
    assert headings(entries) == ["answers, exact¹", "answers, exact²"], "other questions, another column"


def test_perplexity_pairs_models_and_marks_other_tokenizers(put):
    entries = read_results([put(fake.perplexity(tokenizers={"sft": "two"}))])
    rows = rows_of(entries, "困惑度")
    assert rows["base"] == ["12.00 (11.00 – 13.00)", "1.200 (1.100 – 1.300)", "—", "40", "12,345"]
    assert rows["sft"][:3] == ["10.00 (9.00 – 11.00) †", "1.000 (0.900 – 1.100)", "-0.200 (-0.220 – -0.180)"]


def test_weights_of_the_arena_are_listed_by_folder(put):
    file = fake.arena()
    file["sources"]["x"] = {"from": "out/base + out/lora", "weights": ["print of base", "print of lora"]}
    [entry] = read_results([put(file)])
    assert entry.weights == {"x: out/base": "print of base", "x: out/lora": "print of lora"}


def test_arena_says_which_models_never_met(put):
    entries = read_results([put(fake.arena(2))])
    assert rows_of(entries, "竞技场")["x"] == [
        *("1", "1600 (1550 – 1650)", "1590 (1520 – 1660)", "75.0 (20.0–90.0)", "6 / 2 / 1 / 0"),
    ]
    shown = render_markdown(build_page(entries))
    assert "Not connected by battles, not to be compared: x, y \\| z" in shown
    assert "| y | z | 5 | 75.0 (30.1–95.4) |" in shown


def test_secret_answers_and_what_went_wrong_are_shown(put):
    secret = fake.multiple_choice("out/base", (2, 3, 3), benchmark={"split": "val"})
    for group in (secret, *secret["by_category"].values(), *secret["by_subject"].values()):
        for key in ("accuracy", "interval", "subject_average", "subject_average_interval", "correct"):
            group.pop(key, None)
    cut = fake.multiple_choice(prompts={"prompts_without_all_examples": 4}, benchmark={"missing_subjects": ["a", "b"]})
    entries = read_results([put(secret), put(cut | {"unparsed": 3, "ties": 4})])
    rows = rows_of(entries, "选择题")
    assert rows["base"][:2] == ["—", "—"]
    assert (
        rows["sft"][2] == "56.7 (39.7–72.7)<br>3 unparsed, 4 ties, 2 subjects missing, 4 prompts without all examples"
    )


# ---------------------------------------------------------------- what can be compared


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"benchmark": {"files": {"law.csv": "aa", "dev.csv": "cc"}}}, "data"),
        ({"prompts": {"preset_version": 2}}, "preset default 1"),
        ({"prompts": {"example": "问题：1+1=?"}}, "prompt "),
        ({"prompts": {"language": "en"}}, "language zh"),
    ],
)
def test_columns_of_one_heading_are_marked_where_they_differ(put, change, said):
    entries = read_results([put(fake.multiple_choice()), put(fake.multiple_choice("out/base", (2, 3, 3), **change))])
    columns, [note] = group_columns(entries)
    assert [column.heading for column in columns] == ["cmmlu test, 5-shot¹", "cmmlu test, 5-shot²"]
    assert said in note.text.en and "Not to be compared" in note.text.en
    assert rows_of(entries, "总表") == {"sft": ["56.7 (39.7–72.7)", "—"], "base": ["—", "26.7 (9.7–42.7)"]}


def test_other_splits_shots_modes_and_presets_have_other_headings(put):
    changes = [
        {},
        {"benchmark": {"split": "val"}},
        {"prompts": {"num_fewshot": 0}},
        {"prompts": {"mode": "cloze", "with_prompt": True}},
        {"prompts": {"preset": "a2-2023"}},
    ]
    entries = read_results([put(fake.multiple_choice(**change)) for change in changes])
    assert headings(entries) == [
        *("cmmlu test, 5-shot", "cmmlu val, 5-shot", "cmmlu test, 0-shot"),
        *("cmmlu test, 5-shot, cloze, chat", "cmmlu test, 5-shot, a2-2023"),
    ]


def test_where_the_files_lie_does_not_matter(put):
    moved = fake.multiple_choice("out/base", (2, 3, 3), benchmark={"files": {"/x/law.csv": "bb", "/y/dev.csv": "aa"}})
    assert headings(read_results([put(fake.multiple_choice()), put(moved)])) == ["cmmlu test, 5-shot"]


def test_other_kinds_are_told_apart_too(put):
    other = {"lcc": {"file": "lcc.jsonl", "sha256": "another"}}
    files = [fake.longbench(), fake.longbench("base", (10.0, 20.0, 30.0), data=other)]
    assert headings(read_results([put(file) for file in files])) == ["LongBench¹", "LongBench²"]
    files = [fake.perplexity(), fake.perplexity((("dpo", 9.0, 0.9),), window=256)]
    assert headings(read_results([put(file) for file in files])) == ["news, window 512", "news, window 256"]
    files = [fake.alignment(), fake.alignment("out/a", judge="rm"), fake.alignment("out/b", question="行吗")]
    assert headings(read_results([put(file) for file in files])) == ["alignment¹", "alignment²", "alignment³"]


def test_models_of_one_name_are_named_in_full(put):
    files = [fake.multiple_choice("a/merged"), fake.multiple_choice("b/merged", (2, 3, 3)), fake.longbench("base")]
    assert [entry.model for entry in read_results([put(file) for file in files])] == ["a/merged", "b/merged", "base"]
    same = [fake.multiple_choice("a/sft", weights="w"), fake.longbench("sft", weights="w")]
    assert [entry.model for entry in read_results([put(file) for file in same])] == ["sft", "sft"]
    bits = [fake.multiple_choice(), fake.multiple_choice(correct=(2, 3, 3), settings={"load_in_4bit": True})]
    assert [entry.model for entry in read_results([put(file) for file in bits])] == ["sft", "sft, 4-bit"]


def test_names_and_folders_are_taken(put, tmp_path):
    put(fake.multiple_choice())
    path = put(fake.multiple_choice("out/base", (2, 3, 3)))
    assert [entry.model for entry in read_results([str(tmp_path / "1"), f"基座={path}"])] == ["sft", "基座"]


# ---------------------------------------------------------------- what is refused


def broken(value, *path, to):
    """A result with another value at a place."""
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return value


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ([], "need the object that an evaluation writes, got \\[\\]"),
        ({"kind": "speed"}, "kind 'speed' is no evaluation's; need one of multiple_choice, longbench"),
        ({"scores": 1}, "kind None is no evaluation's"),
        ({"kind": "multiple_choice"}, "no 'settings', .*'benchmark', 'prompts'; it has kind; .*: evaluate again"),
        (broken(fake.multiple_choice(), "models", to={}), "need one model in 'models', got {}"),
        (broken(fake.multiple_choice(), "accuracy", to=0.5667), "accuracy 0.5667, but 17 of 30 answers are right"),
        (broken(fake.multiple_choice(), "by_subject", "law", "accuracy", to=0.6), "but 6 of 10 answers are right"),
        (broken(fake.multiple_choice(), "interval", to=[30, 130]), "need percents, 0 to 100"),
        (broken(fake.longbench(), "datasets", to={}), "no dataset in it"),
        (
            broken(fake.perplexity(), "rows", 0, "perplexity", to=0.5),
            "perplexity 0.5, bits a byte 1.2; need at least 1",
        ),
        (broken(fake.perplexity(), "models", to={}), "models: no 'base'; it has nothing"),
        (broken(fake.alignment(), "aligned", to=75.0), "aligned 75.0; eval_alignment.py writes shares"),
        (broken(fake.alignment(), "aligned", to=0.5), "aligned 0.5, but 3 of 4 answers are"),
        (broken(fake.arena(), "models", 0, "win_rate", to=0.75), "x has a win rate of 0.75, but won 6 of 8"),
        (broken(fake.arena(), "models", 0, to={"name": "x"}), "models, 1: no 'rank', .*; it has name"),
    ],
)
def test_files_that_do_not_fit_are_named(put, file, words):
    path = put(file)
    with pytest.raises(InputError, match=f"{re.escape(path)}.*{words}"):
        read_results([path])


KINDS = [fake.multiple_choice, fake.longbench, fake.perplexity, fake.curve, fake.alignment, fake.answers, fake.arena]
LATER = {
    fake.multiple_choice: ("prompts", "preset_version"),
    fake.longbench: ("averages", "zh", "groups"),
    fake.perplexity: ("rows", 1, "documents"),
    fake.curve: ("rows", 1, "bits_per_byte_to_here"),
    fake.alignment: ("by_expected", "no", "interval"),
    fake.answers: ("questions", 1, "answers", "y", "scores"),
    fake.arena: ("pairs", 0, "battles"),
}  # fields that a file of an older version could lack


@pytest.mark.parametrize("file", KINDS)
def test_an_older_file_is_named_with_what_it_lacks_and_what_to_do(put, file):
    value = file()
    *path, last = LATER[file]
    inner = value
    for key in path:
        inner = inner[key]
    del inner[last]
    where = ", ".join(str(key + 1 if isinstance(key, int) else key) for key in path)
    remedy = "run arena.py --report again" if file is fake.arena else "evaluate again"
    name = put(value)
    with pytest.raises(InputError) as error:
        read_results([name])
    known = ", ".join(inner)
    assert str(error.value) == f"{name}, {where}: no '{last}'; it has {known}; broken, or another version's: {remedy}"


@pytest.mark.parametrize("file", KINDS)
def test_what_a_newer_file_adds_is_said_and_left_out(put, file, caplog):
    name = put(file() | {"calibrated": 1})
    assert len(read_results([name])) >= 1
    assert caplog.messages == [f"{name}: calibrated: written by another version, not read"]


@pytest.mark.parametrize("file", KINDS)
def test_a_field_of_another_type_is_named(put, file):
    name = put(file() | {"settings": "none"})
    with pytest.raises(InputError, match=f"{re.escape(name)}, settings: got 'none', need dict"):
        read_results([name])


def test_fractions_of_longbench_are_refused(put):
    file = fake.longbench()
    scores = [*file["datasets"].values(), *file["averages"]["zh"]["groups"].values(), file["averages"]["zh"]]
    for figures in {id(figures): figures for figures in scores}.values():
        figures["score"] /= 100
        figures["interval"] = [bound / 100 for bound in figures["interval"]]
    with pytest.raises(InputError, match=r"no score is above 1, 0\.5 is the highest: fractions"):
        read_results([put(file)])


def test_broken_and_missing_files_are_named(put, tmp_path):
    (tmp_path / "half.json").write_text('{"kind": "arena", ')
    with pytest.raises(InputError, match=r"half.json:1: broken JSON"):
        read_results([str(tmp_path / "half.json")])
    with pytest.raises(InputError, match=r"none\.json"):
        read_results([str(tmp_path / "none.json")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: none of multiple_choice.json, longbench.json"):
        read_results([str(tmp_path / "empty")])


@pytest.mark.parametrize("file", [*KINDS[:3], *KINDS[4:]])
def test_two_results_of_one_model_and_one_benchmark_are_refused(put, file):
    first, second = put(file()), put(file())
    with pytest.raises(InputError, match=f"{re.escape(second)}: .* is in {re.escape(first)} too; pass one of them"):
        read_results([first, second])


def test_one_name_for_several_models_is_refused(put):
    for file in (fake.perplexity(), fake.arena()):
        with pytest.raises(InputError, match="the file has several models, which have names; leave out x="):
            read_results([f"x={put(file)}"])


# ---------------------------------------------------------------- the page


def test_settings_hashes_and_environments_are_listed(put):
    older = fake.longbench("base") | {"environment": {**fake.ENVIRONMENT, "torch": "2.9.1"}}
    shown = render_html(build_page(read_results([put(fake.multiple_choice()), put(older)])))
    for words in ("--num_fewshot 5", "print of out/sft", "print of out/base", "hash of vcsum", "2.13.0", "2.9.1"):
        assert words in shown, words


def test_radar_has_its_values_on_its_axes():
    svg = radar_chart({"up": {"m": 50.0}, "right": {"m": 100.0}, "down": {"m": 25.0}, "left": {"m": 0.0}}, "share")
    x, y = 200, 152
    places = [tuple(map(float, found)) for found in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert places == [(x, y - 48), (x + 96, y), (x, y + 24), (x, y)] and nice_ticks(0, 100, 4)[-1] == 100
    with pytest.raises(ValueError, match="three axes"):
        radar_chart({"a": {"m": 1.0}, "b": {"m": 1.0}}, "share")
    open_line = radar_chart({"a": {"m": 1.0, "n": 2.0}, "b": {"m": 1.0}, "c": {"m": 1.0}}, "share")
    assert open_line.count("fill-opacity") == 1 and open_line.count("<circle") == 4


def test_legends_of_many_models_have_more_lines():
    names = {f"a model of a long name {number}": float(number + 1) for number in range(6)}
    svg = radar_chart({"a": names, "b": names, "c": names}, "share")
    assert 'viewBox="0 -80 400 350"' in svg  # one a line, five of them above
