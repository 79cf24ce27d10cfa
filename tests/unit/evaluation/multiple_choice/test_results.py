"""Choices from likelihoods and from what was written, and their figures, against sums done by hand."""

import json
import math
import random

import pytest

from utils.evaluation.contamination import Hit, Overlap
from utils.evaluation.intervals import wilson_interval
from utils.evaluation.multiple_choice.answers import Choice, choose_by_likelihood
from utils.evaluation.multiple_choice.benchmarks import Benchmark
from utils.evaluation.multiple_choice.questions import ChoiceQuestion
from utils.evaluation.multiple_choice.results import (
    ChoiceAnswer,
    accuracies,
    average_of_shares,
    clean_accuracies,
    plot_choices,
    write_submission,
)
from utils.evaluation.multiple_choice.subjects import Subject

FOUR = ChoiceQuestion("law", "0", "?", ("苹果", "苹果树", "NA", "pear"), "B")


def test_the_likeliest_choice():
    assert choose_by_likelihood(FOUR, (-3.0, -1.0, -2.0, -4.0), "constrained") == Choice("B")
    # Two forms of each letter: -5, -4, -6, -9.
    both = (-1.0, -3.0, -2.0, -5.0, -4.0, -1.0, -4.0, -4.0)
    assert choose_by_likelihood(FOUR, both, "constrained") == Choice("B")
    # By the byte: -6/6, -8/9, -3/2, -4/4.
    assert choose_by_likelihood(FOUR, (-6.0, -8.0, -3.0, -4.0), "cloze") == Choice("B", "C")


def test_of_equal_choices_the_first_is_taken_and_counted():
    assert choose_by_likelihood(FOUR, (-3.0, -1.0, -2.0, -1.0), "constrained") == Choice("B", tied=True)
    assert choose_by_likelihood(FOUR, (-6.0, -9.0, -8.0, -9.0), "cloze") == Choice("A", "A", tied=True)  # by the byte
    questions = [ChoiceQuestion("law", str(n), "?", ("x", "y"), "B") for n in range(3)]
    answers = [ChoiceAnswer(question, "A", None, None, {}, is_tied=question.id != "1") for question in questions]
    figures = accuracies(answers, BENCHMARK, "constrained")
    assert figures["ties"] == 2 == figures["by_subject"]["law"]["ties"]


SUBJECTS = {
    "law": Subject("law", "法学", "Humanities"),
    "logic": Subject("logic", "逻辑学", "Humanities"),
    "physics": Subject("physics", "物理", "STEM"),
}
# Per subject: right, wrong, unreadable, failed.
OUTCOMES = {"law": (6, 2, 2, 1), "logic": (1, 1, 0, 0), "physics": (0, 3, 1, 2)}


def make_answers():
    answers = []
    for subject, counts in OUTCOMES.items():
        letters = ["B"] * counts[0] + ["C"] * counts[1] + [None] * (counts[2] + counts[3])
        for number, letter in enumerate(letters):
            question = ChoiceQuestion(subject, str(number), f"{subject} {number}", ("x", "y", "z"), "B")
            error = "down" if number >= sum(counts[:3]) else None
            answers.append(ChoiceAnswer(question, letter, "B" if number == 0 else "A", error, {}))
    return answers


BENCHMARK = Benchmark("mine", "own", "test", SUBJECTS, [], {})


def test_figures_are_percents_and_errors_are_not_wrong():
    figures = accuracies(make_answers(), BENCHMARK, "constrained")
    assert (figures["questions"], figures["errors"], figures["unparsed"], figures["correct"]) == (19, 3, 3, 7)
    assert figures["accuracy"] == pytest.approx(100 * 7 / 16)
    assert figures["interval"] == pytest.approx([100 * bound for bound in wilson_interval(7, 16)])
    assert figures["subject_average"] == pytest.approx((60 + 50 + 0) / 3)
    law = figures["by_subject"]["law"]
    assert law["accuracy"] == 60 and (law["name"], law["category"], law["questions"]) == ("法学", "Humanities", 11)
    assert "subject_average" not in law
    humanities = figures["by_category"]["Humanities"]
    assert humanities["accuracy"] == pytest.approx(100 * 7 / 12) and humanities["subject_average"] == pytest.approx(55)
    assert list(figures["by_category"]) == ["Humanities", "STEM"] and "accuracy_unnormalised" not in figures
    cloze = accuracies(make_answers(), BENCHMARK, "cloze")
    assert cloze["accuracy_unnormalised"] == pytest.approx(100 * 3 / 16)


def test_no_accuracy_without_answers(tmp_path):
    secret = [
        ChoiceAnswer(ChoiceQuestion("law", str(n), "?", ("x", "y"), None), letter, None, None, {})
        for n, letter in enumerate(["A", None, "B"])
    ]
    figures = accuracies(secret, BENCHMARK, "constrained")
    assert "accuracy" not in figures and "accuracy" not in figures["by_subject"]["law"] and figures["unparsed"] == 1
    write_submission(secret, tmp_path / "submission.json")
    assert json.loads((tmp_path / "submission.json").read_text()) == {"law": {"0": "A", "1": "", "2": "B"}}


def test_the_average_over_subjects_lies_in_its_interval_19_times_of_20():
    generator = random.Random(1)
    rates = [generator.uniform(0.15, 0.6) for _ in range(12)]
    sizes = [generator.randint(8, 40) for _ in rates]
    truth, inside, times = sum(rates) / len(rates), 0, 2000
    for _ in range(times):
        shares = [(sum(generator.random() < p for _ in range(n)), n) for p, n in zip(rates, sizes, strict=True)]
        _, (low, high) = average_of_shares(shares)
        inside += low <= truth <= high
    assert 0.94 <= inside / times <= 0.985
    mean, (low, high) = average_of_shares([(0, 9), (0, 4)])
    assert (mean, low) == (0.0, 0.0) and 0.1 < high < 0.4


def test_clean_questions_beside_all():
    answers = make_answers()[:11]  # law: six right, four not, one failed
    overlaps = [
        Overlap([Hit("train.txt:3", "law", 0.9)] if n < 3 else [], 3 * (n < 3), 0.9 * (n < 3), n == 3)
        for n in range(11)
    ]
    found = clean_accuracies(answers, overlaps, BENCHMARK, "constrained", ["train.txt"])
    assert (found["contaminated"], found["too_short"], len(found["hits"])) == (3, 1, 3)
    assert found["clean"]["correct"] == 2 and found["clean"]["accuracy"] == pytest.approx(100 * 2 / 6)
    assert found["contaminated_figures"]["accuracy"] == 100 and found["hits"][0]["where"] == "train.txt:3"
    nothing = clean_accuracies(answers[:3], overlaps[:3], BENCHMARK, "constrained", ["train.txt"])
    assert nothing["clean"] is None


def test_the_picture_has_a_bar_for_every_category(tmp_path, monkeypatch):
    from matplotlib import axes

    drawn = []
    barh = axes.Axes.barh

    def watch(self, places, widths, **options):
        drawn.append(list(widths))
        return barh(self, places, widths, **options)

    monkeypatch.setattr(axes.Axes, "barh", watch)
    figures = accuracies(make_answers(), BENCHMARK, "constrained")
    plot_choices(figures, tmp_path / "a.png", "mine")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == [[figures["accuracy"], 100 * 7 / 12, 0.0]] and math.isfinite(sum(drawn[0]))
    drawn.clear()
    figures["by_category"]["all"] = figures["by_category"].pop("STEM")
    plot_choices(figures, tmp_path / "b.png", "a category may be called all")
    assert drawn == [[figures["accuracy"], 100 * 7 / 12, 0.0]]
