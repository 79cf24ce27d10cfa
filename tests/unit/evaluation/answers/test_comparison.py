"""comparison: against the textbook's arithmetic, written out."""

import math
import statistics

import pytest

from utils.evaluation.answers.comparison import change_of, compare, count_changes, mean_scores

CHRF = [0.1, 0.5, 0.9, 0.4, 0.3, 0.8, 0.7, 0.2, 0.6, 1.0]


def rows(metric, values):
    return [{} if value is None else {metric: value} for value in values]


def test_means_have_students_intervals_and_shares_wilsons():
    figures = mean_scores(rows("chrf", CHRF))["chrf"]
    # Student's t at 9 degrees of freedom, from a table.
    half = 2.262157 * statistics.stdev(CHRF) / math.sqrt(10)
    assert figures["score"] == pytest.approx(55.0) and figures["questions"] == 10
    assert figures["interval"] == pytest.approx([100 * (0.55 - half), 100 * (0.55 + half)], rel=1e-3)
    # Wilson 1927 for 8 of 10, from Newcombe's table.
    figures = mean_scores(rows("exact", [1.0] * 8 + [0.0] * 2))["exact"]
    assert figures["score"] == 80.0 and figures["interval"] == pytest.approx([49.02, 94.33], abs=0.01)


def test_too_few_questions_have_no_interval_and_others_are_not_counted():
    assert mean_scores(rows("chrf", CHRF[:9]))["chrf"]["interval"] is None
    found = mean_scores([{"number": 1.0, "chrf": 0.5}, {"chrf": 0.5}, {"number": 0.0, "chrf": 0.5}])
    assert (found["number"]["score"], found["number"]["questions"], found["chrf"]["questions"]) == (50.0, 2, 3)
    assert set(found) == {"number", "chrf"}


def test_a_change_of_words_alone_is_none():
    assert [change_of("chrf", {"chrf": 0.5}, {"chrf": value}) for value in (0.54, 0.46, 0.56, 0.44)] == [0, 0, 1, -1]
    assert [change_of("exact", {"exact": a}, {"exact": b}) for a, b in ((0, 1), (1, 0), (1, 1))] == [1, -1, 0]
    assert change_of("number", {"chrf": 1.0}, {"chrf": 0.0}) is None


def test_graded_scores_are_paired():
    other = [value + shift for value, shift in zip(CHRF, [0.2, -0.1, 0.02] + [0.1] * 7, strict=True)]
    found = compare("chrf", rows("chrf", CHRF), rows("chrf", other))
    assert (found["better"], found["worse"], found["same"]) == (8, 1, 1)
    differences = [b - a for a, b in zip(CHRF, other, strict=True)]
    half = 2.262157 * statistics.stdev(differences) / math.sqrt(10)
    mean = statistics.mean(differences)
    assert found["difference"] == pytest.approx(100 * mean)
    assert found["interval"] == pytest.approx([100 * (mean - half), 100 * (mean + half)], rel=1e-3)
    # At most one of nine the other way: 2 * (1 + 9) / 2**9.
    assert found["p_value"] == pytest.approx(2 * 10 / 512)
    assert compare("chrf", rows("chrf", CHRF[:3]), rows("chrf", other[:3]))["interval"] is None


def test_shares_are_paired_as_mcnemar_does():
    first, other = [1, 1, 0, 0, 0, 0, None], [1, 0, 1, 1, 1, 0, None]
    found = compare("number", rows("number", first), rows("number", other))
    assert (found["better"], found["worse"], found["same"]) == (3, 1, 2)
    assert found["difference"] == pytest.approx(100 * (4 - 2) / 6) and found["p_value"] == pytest.approx(10 / 16)
    # Wald: sqrt((3 + 1) - (3 - 1)**2 / 6) / 6 around 2 / 6.
    half = 1.959964 * math.sqrt(4 - 4 / 6) / 6
    assert found["interval"] == pytest.approx([100 * (1 / 3 - half), 100 * min(1 / 3 + half, 1)])


def test_nothing_to_compare():
    found = compare("number", rows("chrf", CHRF), rows("chrf", CHRF))
    assert found == {"better": 0, "worse": 0, "same": 0, "p_value": None}
    assert count_changes([1, None, -1, 0, 0])["same"] == 2
