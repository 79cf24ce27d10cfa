"""The report's part on RLHF: which files it refuses, and that it shows what they hold."""

import json
import re

import pytest

from support import fake_recipe
from utils.core.errors import InputError
from utils.evaluation.result_files import AlignmentAnswer
from utils.report.rlhf import PPO_CURVES, pick_changed
from utils.report.run import write_report


@pytest.fixture
def run(tmp_path):
    """(run folder, questions file)"""
    return fake_recipe.write_small_run(tmp_path)


@pytest.mark.parametrize("change", [{"question": "另一题？"}, {"expected": "maybe"}, {"category": "law"}, None])
def test_alignment_of_other_questions_is_refused(run, change):
    file = run[0] / "alignment" / "dpo" / "alignment.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    if change is None:
        result["answers"].pop()
    else:
        result["answers"][0] |= change
    fake_recipe.write(file, result)
    with pytest.raises(InputError, match=re.escape(f"{file}: it answers other questions than alignment/assistant")):
        write_report(*run)
    assert not (run[0] / "report.html").exists()


def test_alignment_answer_without_a_judgement_is_refused(run):
    file = run[0] / "alignment" / "assistant" / "alignment.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    del result["answers"][2]["aligned"]
    fake_recipe.write(file, result)
    with pytest.raises(InputError, match=re.escape(f"{file}, answers, 3: no 'aligned'")):
        write_report(*run)


def test_changed_answers_are_shown_first_of_every_category():
    rights = {"law": ["110", "000", "011", "111", "100"], "study": ["111", "000", "101"], "drugs": ["111"]}
    unasked = {"id": "", "question": "", "expected": "", "answer": ""}
    rows = [
        [AlignmentAnswer(**unasked, category=category, aligned=digit == "1") for digit in digits]
        for category, answers in rights.items()
        for digits in answers
    ]
    # law: two of its three changed ones, evenly spaced; study: its changed one, then another; drugs: what it has.
    assert pick_changed(rows, 2) == [0, 4, 7, 6, 8]


def table_rows(run, section):
    """Rows of the section's tables in report.md, as lists of cells."""
    write_report(*run)
    text = (run[0] / "report.md").read_text(encoding="utf-8")
    part = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")
    ]


def test_alignment_table_has_the_shares_and_their_targets(run):
    rows = {row[0]: row[1:] for row in table_rows(run, "对齐 Alignment")}
    # Intervals: Wilson's for 6, 9 and 8 of 12.
    assert rows["精调后 tuned"] == ["50.0 % (25–75)", "≤ 80 %", "6", "—"]
    assert rows["PPO 后 after PPO"] == ["75.0 % (47–91)", "≥ 95 %", "3", "+4 −1"]
    assert rows["DPO 后 after DPO"] == ["66.7 % (39–86)", "≥ 95 %", "4", "+2 −0"]
    assert rows["道德 morality"][0] == "5" and [cell.split(" ")[0] for cell in rows["道德 morality"][1:]] == [
        *("60.0", "100.0", "100.0")
    ]
    assert [cell.split(" ")[0] for cell in rows["etiquette"]] == ["2", "0.0", "0.0", "0.0"]
    assert [cell.split(" ")[0] for cell in rows["该答“可以” the right answer is yes"]] == [
        "4",
        "50.0",
        "100.0",
        "100.0",
    ]


def test_answers_of_the_three_models_stand_side_by_side(run):
    rows = table_rows(run, "是非题的回答 Answers before and after")
    shown = [row for row in rows if row[1].startswith("第")]
    assert len(shown) == 6 + 12  # two of each of three categories; all of them, folded
    assert shown[0] == ["道德 morality", "第 4 题？", *("✗ assistant 答第 4 题", "✓ ppo 答第 4 题", "✓ dpo 答第 4 题")]
    assert [row[1] for row in shown[6:]] == [f"第 {number} 题？" for number in range(1, 13)]


def test_reward_model_figures_are_shown(run):
    rows = {row[0]: row[1:] for row in table_rows(run, "奖励模型 Reward model")}
    assert rows["准确率 accuracy"] == ["92.5 %"] and rows["平均分差 mean margin of the scores"] == ["2.750"]
    assert rows["分数与长度的相关 correlation of score and length"] == ["−0.120"]
    assert rows["暴力 violence"] == ["28", "100.0 %"] and rows["事实 facts"] == ["12", "75.0 %"]


def test_reward_model_without_length_figures_and_of_two_sets_is_shown(run):
    report = {**fake_recipe.REWARD_REPORT, "accuracy": 0.5, "pairs": 120}
    del report["accuracy_chosen_shorter"], report["length_correlation"]
    fake_recipe.write(run[0] / "rm" / "reward_report.json", {"zh": fake_recipe.REWARD_REPORT, "en": report})
    assert write_report(*run).reward_model_accuracy == pytest.approx((0.925 * 40 + 0.5 * 120) / 160)
    rows = [row[0] for row in table_rows(run, "奖励模型 Reward model")]
    assert rows.count("准确率 accuracy") == 2 and rows.count("分数与长度的相关 correlation of score and length") == 1


def test_ppo_and_dpo_figures_are_shown(run):
    rows = {row[0]: row[1:] for row in table_rows(run, "PPO ")}
    assert rows["第 10 步 step 10"] == rows["第 20 步 step 20"] == ["1.750", "2.625", "12.0", "47.5 %", "−0.100"]
    assert rows["保存的模型 the model that is saved"] == ["2.250", "3.125", "12.5", "97.5 %", "0.400"]
    # The first evaluation against the last, of one prompt.
    assert rows["&lt;i&gt;骗人&lt;/i&gt;好吗？"] == [
        *("早&lt;i&gt;骗人&lt;/i&gt;好吗？", "晚&lt;i&gt;骗人&lt;/i&gt;好吗？", "−1.50", "2.00")
    ]
    rows = {row[0]: row[1:] for row in table_rows(run, "DPO ")}
    assert rows["隐含奖励之差 reward margin"] == ["3.750"] and rows["准确率 accuracy"] == ["96.0 %"]
    page = (run[0] / "report.html").read_text(encoding="utf-8")
    charts = re.findall(r'aria-label="([^"]+)"', page)
    assert "nats an answer over iteration: training, held-out" in charts
    assert "chosen - rejected over optimizer step: training, held-out" in charts
    assert charts.count("share over iteration: training") == 2  # the critic's, and clipped tokens


@pytest.mark.slow  # imports every trainer
def test_the_made_up_files_have_what_the_trainers_write():
    import numpy

    from utils.rlhf import dpo_trainer, ppo_trainer, reward_trainer

    scores, lengths = numpy.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]]), numpy.array([[3, 4], [5, 2], [4, 4]])
    metrics, tables = reward_trainer.describe_scores(scores, lengths, ["facts", "violence", "facts"])
    assert set(fake_recipe.REWARD_REPORT) == {"loss", *metrics, *tables}
    assert set(fake_recipe.DPO_FINAL) == set(dpo_trainer.STATISTICS)
    assert set(PPO_CURVES) <= set(ppo_trainer.CURVES)
