"""The report on a run folder: its figures, what it refuses, and what its pages show and escape."""

import json
import random
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from support import fake_recipe, fake_results
from support.fake_recipe import NASTY, OUTPUTS, QUESTIONS
from utils.core.errors import InputError
from utils.report.charts import BOTTOM, HEIGHT, bar_chart, line_chart, nice_ticks
from utils.report.pages import duration, escape_markdown, percent, render_html, render_markdown
from utils.report.recipe import TARGET_KIND, curves_of, load_run
from utils.report.run import build_report, pick_samples, write_report
from utils.report.summary import summarise_run

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def run(tmp_path):
    """(run folder, questions file)"""
    return fake_recipe.write_small_run(tmp_path)


# ---------------------------------------------------------------- figures


def test_summary_holds_the_figures_of_the_run(run):
    summary = write_report(*run)
    assert json.loads((run[0] / "summary.json").read_text(encoding="utf-8")) == asdict(summary)
    # The first, slower run of sft (999 s, 9.9 GB) does not count.
    assert summary.seconds == 3 + 100 + 4 + 9.5 + 120 + 6.5 + 90 + 6 + 5 + 16 + 21 + 20 + 19 + 241 + 60
    assert summary.rlhf_seconds == 30 + 100 + 40 + 18 + 17 + 11 + 12 + 13 == 241
    assert summary.stage_seconds["sft"] == 90 and len(summary.stage_seconds) == 27
    assert summary.peak_memory_gb == 1.8
    assert summary.bits_per_byte == {
        "zh": {"base": 2.5, "extended": 3.1, "pretrained": 0.9},
        "en": {"base": 1.5, "extended": 1.6, "pretrained": 1.53},
    }
    assert summary.exact_match == pytest.approx({"base": 0, "sft": 2 / 3, "ppo": 1, "dpo": 1 / 3})
    kinds = summary.exact_match_by_kind
    assert kinds["unseen_operands"] == {"base": 0.5, "sft": 0.5, "ppo": 0.0, "dpo": 0.5, "questions": 2}
    assert kinds["pretraining_only"] == {"base": 0.0, "sft": 0.0, "ppo": 0.0, "dpo": 1.0, "questions": 1}
    assert summary.vocabulary == {"base": 1200, "merged": 2900}
    assert summary.merged_equals_adapter is True
    assert summary.alignment == pytest.approx({"sft": 6 / 12, "ppo": 9 / 12, "dpo": 8 / 12})
    for side, (low, high) in summary.alignment_interval.items():
        assert 0 < low < summary.alignment[side] < high < 1
    assert summary.reward_model_accuracy == 0.925
    assert summary.multiple_choice == pytest.approx(
        {"base": 7 / 30, "pretrained": 11 / 30, "assistant": 19 / 30, "ppo": 18 / 30, "dpo": 18 / 30}
    )
    assert summary.kl == {"ppo": 3.125}  # of the saved model, not of the evaluations before


def test_chinese_is_compared_with_the_lower_figure(run):
    folder, questions = run
    assert summarise_run(load_run(folder, questions)).chinese_drop == pytest.approx(
        1 - 0.9 / 2.5
    )  # the base's 2.5 < 3.1
    (folder / "pretrain" / "run_config.yaml").write_text("embedding_init: zero\n")
    summary = summarise_run(load_run(folder, questions))
    assert summary.bits_per_byte["zh"]["extended"] == 2.4
    assert summary.chinese_drop == pytest.approx(1 - 0.9 / 2.4)
    assert summary.english_rise == pytest.approx(1.53 / 1.5 - 1)


def test_one_different_answer_shows(run):
    folder, questions = run
    fake_recipe.write_answers(folder, QUESTIONS, {"adapter": [*OUTPUTS["adapter"][:-1], "利马。"]})
    assert write_report(folder, questions).merged_equals_adapter is False
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "1 answers differ" in page and "greedy answers differ" in page


@pytest.mark.parametrize(("sft", "missed"), [(OUTPUTS["adapter"], 1), ([q["output"] for q in QUESTIONS], 0)])
def test_targets_are_judged(run, sft, missed):
    folder, questions = run
    fake_recipe.write_answers(folder, QUESTIONS, {"adapter": sft, "assistant": sft})
    write_report(folder, questions)
    page = (folder / "report.html").read_text(encoding="utf-8")
    # Missed in any case: alignment after PPO and DPO, and DPO's exact answers.
    assert page.count('class="card met"') == 7 - missed and page.count('class="card missed"') == 3 + missed
    assert page.count('class="card"') == 2  # time and memory


def test_samples_are_spread_over_each_kind():
    kinds = ["pretraining_only"] * 9 + [TARGET_KIND] * 2 + ["new_kind"]
    assert pick_samples(kinds) == {TARGET_KIND: [9, 10], "pretraining_only": [1, 4, 7], "new_kind": [11]}
    many = pick_samples([TARGET_KIND] * 180 + ["unseen_operands"] * 50 + ["pretraining_only"] * 50)
    assert sum(map(len, many.values())) >= 12


def test_curves_leave_out_means_over_sets_and_the_saved_model():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_zh_loss": 2.0, "eval_loss": 9.0, "eval_zh_runtime": 1.0}]
    history += [{"step": 2, "train_loss": 8.0, "value_loss": 7.0}, {"step": 2, "eval_zh_loss": 1.0}]
    assert curves_of(history, "loss") == {
        "training": [(1, 3.0)],
        "zh held-out": [(2, 2.0)],
    }


# ---------------------------------------------------------------- what is refused


def test_every_unfinished_stage_is_named_with_its_command(run):
    folder, questions = run
    shutil.rmtree(folder / "sft")
    (folder / "answers" / "adapter.json").unlink()
    shutil.rmtree(folder / "rm")
    (folder / "alignment" / "dpo" / "alignment.json").unlink()
    with pytest.raises(InputError) as error:
        write_report(folder, questions)
    message = str(error.value)
    assert "stage 'sft' is not finished" in message and "scripts/run_sft.sh" in message
    assert "stage 'answers_adapter' is not finished" in message and "scripts/run_inference.sh" in message
    assert (
        "stage 'rm' is not finished" in message and "scripts/run_rm.sh" in message and "reward_report" not in message
    )
    assert "stage 'alignment_dpo' is not finished" in message and "scripts/run_eval_alignment.sh" in message
    assert f"OUT={folder} bash scripts/run_demo.sh" in message and "stage 'base'" not in message
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("damaged", "content", "words"),
    [
        ("stages.jsonl", None, "no {file}: run_demo.sh writes"),
        ("stages.jsonl", "", "{file} is empty"),
        ("stages.jsonl", '{"name": "base", "seconds": 1}\n', "{file}:1: no 'peak_memory_gb'"),
        ("pretrain/embedding_init.json", None, "ran without --compare_embedding_init"),
        ("pretrain/embedding_init.json", '{"zero": {}}', "embedding_init.json: no 'mean_of_pieces'; it has zero"),
        ("pretrain/embedding_init.json", '{"mean_of_pieces": {"en": 2}}', "embedding_init.json: no 'zh'"),
        ("base/all_results.json", '{"steps": 1}', "{file}: no 'eval_zh_bits_per_byte'"),
        ("base/all_results.json", "{", "{file}:1: broken JSON"),
        ("answers/base.json", '[{"Input": "?", "Output": "!"}]', "{file}: 1 answers to 6 questions"),
        ("answers/base.json", json.dumps([{"Input": "?", "Output": "!"}] * 6), "{file}:1: not an answer to"),
        ("answers/ppo.json", "[]", "{file}: 0 answers to 6 questions"),
        ("rm/reward_report.json", None, "stage 'rm' ran without validation pairs: no {file}; remove"),
        ("rm/reward_report.json", "{}", "{file}: no held-out set in it"),
        (
            "rm/reward_report.json",
            '{"zh": 3}',
            "{file}, set 'zh': no 'accuracy', 'pairs', 'margin', 'calibration', 'calibration_error', "
            "'accuracy_by_source'; it has 3",
        ),
        (
            "rm/reward_report.json",
            '{"zh": {"accuracy": 1}}',
            "{file}, set 'zh': no 'pairs', 'margin', 'calibration', 'calibration_error', 'accuracy_by_source'; it has",
        ),
        (
            "assistant/merge_report.json",
            '{"tensors": 39}',
            "{file}: no 'changed_tensors', 'vocab_size', 'size_gb', 'sec",
        ),
        ("ppo/samples.jsonl", None, "stage 'ppo' ran without validation prompts: no {file}; remove"),
        ("ppo/samples.jsonl", '{"set": "a", "prompt": "?", "score": 1}', "{file}:1: no 'answer'; it has set, prompt"),
        ("ppo/all_results.json", '{"steps": 1, "eval_kl": 2}', "{file}: no 'eval_<set>_kl'"),
        ("ppo/trainer_state.json", None, "file not found: {file}"),
        ("alignment/ppo/alignment.json", "[]", "{file}: need the object that an evaluation writes, got []"),
        ("alignment/ppo/alignment.json", '{"aligned": 1}', "{file}: kind None is no evaluation's"),
        (
            "alignment/ppo/alignment.json",
            '{"kind": "alignment", "aligned": 1}',
            "{file}: no 'settings', 'interval', 'questions', 'by_category', 'by_expected', 'answers'; it has kind",
        ),
        (
            "alignment/ppo/alignment.json",
            json.dumps(fake_results.perplexity()),
            "{file}: kind 'perplexity'; need align",
        ),
        ("choices/dpo/multiple_choice.json", None, "stage 'choices_dpo' is not finished: no {file}"),
        (
            "choices/dpo/multiple_choice.json",
            '{"kind": "arena"}',
            "{file}: no 'settings', 'battles', 'models', 'pairs', 'groups', 'votes'; it has kind",
        ),
        ("perplexity/perplexity.json", "{}", "{file}: kind None is no evaluation's"),
    ],
)
def test_what_does_not_fit_is_refused(run, damaged, content, words):
    file = run[0] / damaged
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=re.escape(words.format(file=file) if "{file}" in words else words)):
        write_report(*run)
    assert not (run[0] / "report.html").exists()


@pytest.mark.parametrize(
    "change", [{"benchmark": {"files": {"law.csv": "other"}}}, {"prompts": {"preset_version": 2}}]
)
def test_stages_that_answered_other_questions_are_refused(run, change):
    file = run[0] / "choices" / "ppo" / "multiple_choice.json"
    fake_recipe.write(file, fake_results.multiple_choice("out/ppo", **change))
    with pytest.raises(InputError, match=f"{re.escape(str(file))}: it answers other questions than"):
        write_report(*run)


def test_every_stage_has_its_line_in_the_tables_of_evaluations(run):
    write_report(*run)
    text = (run[0] / "report.md").read_text(encoding="utf-8")
    assert "| base | 23.3 (6.3–39.3) | 23.3 (8.3–38.3) |" in text and "| ppo | 80.0 (49.0–94.3) | 50.0" in text
    assert "| pretrained | 8.00 (7.00 – 9.00) | 1.750 (1.650 – 1.850) | -0.250 (-0.270 – -0.230) |" in text


def test_missing_folder_is_refused(run):
    with pytest.raises(InputError, match="nothing is no folder; run `OUT="):
        write_report(run[0] / "nothing", run[1])


def test_questions_without_the_target_kind_are_refused(run):
    fake_recipe.write(run[1], [{**question, "kind": "other"} for question in QUESTIONS])
    with pytest.raises(InputError, match="no question of kind 'unseen_wording'"):
        write_report(*run)


# ---------------------------------------------------------------- the pages


class Reader(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.text, self.open = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_whole_and_loads_nothing(run):
    write_report(*run)
    text = (run[0] / "report.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("data:image/png;base64,") or link[1:] in page.ids for link in page.links)
    assert "url(" not in text and "@import" not in text
    # 3 loss curves, 2 bar charts, 1 of formats; RLHF: 1 bar chart, 3 of the reward model, 6 of PPO, 3 of DPO.
    # Evaluation: a radar of questions with choices, bars of two texts.
    # Pictures from files: vocabulary, and 3 of alignment by category.
    assert page.tags.count("svg") == 6 + 13 + 1 + 2 and page.tags.count("img") == 1 + 3
    assert len(page.ids) == len(set(page.ids)) == page.tags.count("section") == 18 + 2


def test_all_text_from_data_is_escaped(run):
    folder, questions = run
    report = build_report(load_run(folder, questions), summarise_run(load_run(folder, questions)))
    page = Reader(render_html(report))
    assert NASTY in page.text  # as it was, in one piece
    assert any("<b>bold</b>" in piece for piece in page.text)
    markdown = render_markdown(report)
    assert "<script" not in markdown and "<b>bold" not in markdown
    [row] = {line for line in markdown.splitlines() if "alert" in line}
    assert "a\\|b \\`code\\` \\*star\\* \\_under\\_<br>second line" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 7


def test_markdown_tables_are_regular(run):
    write_report(*run)
    lines = (run[0] / "report.md").read_text(encoding="utf-8").splitlines()
    columns = 0
    for previous, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            count = len(re.findall(r"(?<!\\)\|", line))
            columns = columns if previous.startswith("|") else count
            assert count == columns, line
    assert sum(line.startswith("|--") for line in lines) >= 10
    text = "\n".join(lines)
    assert "](merged_tokenizer/vocabulary_report.png)" in text and "](alignment/ppo/alignment.png)" in text
    assert "loss.png" not in text and "ppo/ppo.png" not in text  # the fake run has none


def test_markdown_shows_plots_that_exist(run):
    drawn = ["sft/loss.png", "rm/loss.png", "rm/reward_report.png", "ppo/ppo.png", "dpo/dpo.png"]
    for name in drawn:
        (run[0] / name).write_bytes(fake_recipe.PNG)
    write_report(*run)
    text = (run[0] / "report.md").read_text(encoding="utf-8")
    assert all(text.count(f"]({name})") == 1 for name in drawn)


def test_vocabulary_without_picture_or_cost_is_reported(run):
    folder, questions = run
    (folder / "merged_tokenizer" / "vocabulary_report.png").unlink()
    report = {**fake_recipe.VOCABULARY, "cost": None, "unused_added_tokens": None, "languages": {}}
    fake_recipe.write(folder / "merged_tokenizer" / "vocabulary_report.json", report)
    write_report(folder, questions)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert (
        "merged vocabulary" in text and "embedding parameters added" not in text and "Characters per token" not in text
    )


# ---------------------------------------------------------------- charts and small things


def test_bars_are_as_high_as_their_values():
    svg = ElementTree.fromstring(
        bar_chart({"zh": {"a": 1.0, "b<": 4.0}, "en": {"a": 2.0, "b<": float("nan")}}, "bits")
    )
    bars = [item for item in svg.iter(f"{SVG}rect") if float(item.get("height")) > 10.5]
    heights = [float(bar.get("height")) for bar in bars]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 4, 2], rel=0.01)
    assert all(
        float(bar.get("y")) + float(bar.get("height")) == pytest.approx(HEIGHT - BOTTOM, abs=0.2) for bar in bars
    )
    texts = [item.text for item in svg.iter(f"{SVG}text")]
    assert {"1.00", "4.00", "2.00", "zh", "en", "b<"} <= set(texts)


def test_lines_pass_through_their_points():
    points = [(0, 10.0), (50, 5.0), (60, float("inf")), (100, 0.0)]
    svg = ElementTree.fromstring(line_chart({"train": points, "held-out": [(100, 2.5)]}, "step", "loss"))
    lines = [line.get("points").split() for line in svg.iter(f"{SVG}polyline")]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, place.split(",")) for place in lines[0])
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y2 > y0
    assert float(lines[1][0].split(",")[1]) == pytest.approx(y2 + (y0 - y2) / 4, abs=0.2)
    assert sum(1 for _ in svg.iter(f"{SVG}circle")) == 4


def test_charts_refuse_nothing_to_draw():
    with pytest.raises(ValueError, match="no finite"):
        line_chart({"train": [(1, float("nan"))]}, "step", "loss")
    with pytest.raises(ValueError, match="no finite"):
        bar_chart({"zh": {}}, "bits")


def test_ticks_are_round_even_and_cover():
    rng = random.Random(0)
    for _ in range(2000):
        low = rng.uniform(-1, 1) * 10 ** rng.randint(-4, 5)
        high = low + rng.choice([0, rng.random() * 10 ** rng.randint(-4, 5)])
        ticks = nice_ticks(low, high)
        steps = [right - left for left, right in pairwise(ticks)]
        assert ticks[0] <= low + 1e-6 * steps[0] and ticks[-1] >= high - 1e-6 * steps[0]
        assert 1 <= len(steps) <= 6 + (low == high)
        assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-5)
        assert float(f"{steps[0]:.4e}".split("e")[0]) in (1, 2, 5)
    assert nice_ticks(0, 4.9) == [0, 1, 2, 3, 4, 5]


def test_figures_as_text():
    assert [duration(s) for s in (0, 9.96, 59.96, 95, 480, 3600, 7265)] == [
        *("0.0 s", "10.0 s", "1 min", "1 min 35 s", "8 min", "1 h 00 min", "2 h 01 min")
    ]
    assert [percent(0.1234), percent(-0.6, 0), percent(0.02, signed=True)] == ["12.3 %", "−60 %", "+2.0 %"]
    assert escape_markdown("a_b <i>\r\n#1") == "a\\_b &lt;i&gt;<br>\\#1" and escape_markdown(3) == 3
