"""LongBench's metrics: values computed by hand, and, where its source is at hand, LongBench's own code."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import EXAMPLES
from utils.evaluation.longbench.metrics import (
    find_metric,
    fuzz_ratio,
    levenshtein_ratio,
    rouge_l,
    score_answer,
    score_levenshtein,
    segment,
)
from utils.evaluation.longbench.tasks import TASKS

CLASSES = ["Human", "Human group", "Human individual", "Date", "City"]
BY_HAND = [
    # metric, prediction, answer, score
    ("qa_f1", "The Eiffel tower.", "Eiffel Tower, Paris", 2 * 1 * (2 / 3) / (5 / 3)),
    ("qa_f1", "a cat, a cat; the CAT", "cat", 2 * (1 / 3) / (4 / 3)),
    ("qa_f1", "theatre and an-other", "theatre other", 0.4),  # "anther" is no article: theatre, and, another
    ("qa_f1", "", "cat", 0.0),
    ("qa_f1", "The", "the", 0.0),  # nothing is left of either
    ("qa_f1_zh", "北京，清华大学。", "清华大学", 2 * (1 / 2) / (3 / 2)),
    ("qa_f1_zh", "（ABC）", "abc", 1.0),
    ("qa_f1_zh", "《北京》", "北京", 2 * (1 / 2) / (3 / 2)),  # the published list has 》 and not 《
    ("qa_f1_zh", "？？", "北京", 0.0),
    # r = 2/3, p = 2/4 of the words; the package adds 1e-8 to their sum
    ("rouge_l", "the cat sat down", "the dog sat", 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2 + 1e-8)),
    ("rouge_l", "", "the dog sat", 0.0),
    ("rouge_l", "...", "the dog sat", 0.0),
    ("rouge_l", "The dog", "the dog", 2 * 0.5 * 0.5 / (1 + 1e-8)),  # case counts
    ("rouge_l_zh", "我来到北京", "我到北京", None),
    ("classification", "Answer: Date", "Date", 1.0),
    ("classification", "Date or City", "City", 0.5),
    ("classification", "date", "Date", 0.0),
    # Classes named: Human, Human group. The part of the answer is taken out.
    ("classification", "Human group", "Human group", 1.0),
    # Human and Human group are named and Human is right, but so is Human group named.
    ("classification", "Human group", "Human", 0.5),
    ("count", "There are 3, not 5 or 3", "3", 2 / 3),
    ("count", "13", "3", 0.0),
    ("count", "three", "3", 0.0),
    ("retrieval", "Paragraph 12", "Paragraph 12", 1.0),
    ("retrieval", "Paragraph 1 or 12", "Paragraph 12", 0.5),
    ("retrieval", "none", "Paragraph 12", 0.0),
    ("retrieval_zh", "段落3和段落4", "段落4", 0.5),
    ("code_similarity", "\n\n```python\n# comment\nx = 1 // 2\nreturn x\nmore", "return x", 1.0),
    ("code_similarity", "", "return x", 0.0),
    ("code_similarity", "# all is comment", "return x", 0.0),
    ("code_similarity", "abcd", "bcde", 0.75),  # 2 * 3 of 8
    ("code_similarity", "abc", "abcd", 0.86),  # 6/7, in whole percents
]


@pytest.mark.parametrize(("metric", "prediction", "answer", "score"), BY_HAND)
def test_values_by_hand(metric, prediction, answer, score):
    if score is None:  # by the segmentation: 我 来到 北京, and 我 到 北京
        assert [segment(prediction), segment(answer)] == [["我", "来到", "北京"], ["我", "到", "北京"]]
        score = 2 * (2 / 3) ** 2 / (4 / 3 + 1e-8)
    assert find_metric(metric, CLASSES)(prediction, answer) == pytest.approx(score, abs=1e-12)


def test_taking_names_out_of_the_list_skips_the_next_as_upstream():
    """Named: A, AB, ABC; right: ABCD and ABC of it. A goes, AB is skipped and stays, ABC stays: one of three."""
    names = ["A", "AB", "ABC", "ABCD"]
    metric = find_metric("classification", names)
    assert metric("ABCD", "ABCD") == 1 / 2  # A goes, AB is passed over, ABC goes
    assert metric("ABC", "ABCD") == 0.0
    assert metric("ABCD", "ABC") == 1 / 3  # A goes, AB is passed over, ABCD is no part


def test_the_nearest_answer_counts_and_of_some_tasks_the_first_line():
    assert score_answer(TASKS["hotpotqa"], "a red fox", ["blue", "red fox", "red"], None) == 1.0
    assert score_answer(TASKS["triviaqa"], "\n\nred fox\nQuestion: blue", ["red fox"], None) == 1.0
    assert score_answer(TASKS["hotpotqa"], "\n\nred fox\nQuestion: blue", ["red fox"], None) < 1.0
    assert score_answer(TASKS["lsht"], "体育\n财经", ["体育"], ["体育", "财经"]) == 1.0


def test_a_text_of_more_words_than_calls_are_allowed_is_scored():
    """Upstream's score is 0 there; 1,000 calls are allowed by default."""
    text, before = " ".join(f"w{number}" for number in range(400)), sys.getrecursionlimit()
    sys.setrecursionlimit(390)
    try:
        assert rouge_l(text, text) == pytest.approx(1.0)
        assert sys.getrecursionlimit() == 390
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.slow
def test_jieba_is_quiet_and_leaves_nothing_behind(tmp_path):
    code = (
        "import sys, tempfile; sys.path.insert(0, sys.argv[1])\n"
        "from utils.evaluation.longbench.metrics import segment\n"
        "assert segment('我来到北京清华大学') == ['我', '来到', '北京', '清华大学']\n"
    )
    scripts = Path(sys.modules["utils"].__path__[0]).parent
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(scripts)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_code_has_two_ratios():
    """fuzzywuzzy's own, and the one it has beside python-Levenshtein: figures in the issue tracker of both."""
    assert (fuzz_ratio("ababab", "aaaaab"), levenshtein_ratio("ababab", "aaaaab")) == (33, 67)
    task, prediction = TASKS["lcc"], "ababab\n"
    assert score_answer(task, prediction, ["aaaaab"], None) == 0.33
    assert score_levenshtein(task, prediction, ["aaaaab"], None) == 0.67
    assert score_levenshtein(task, "x", ["x"], None) == 1.0 and score_levenshtein(task, "", ["x"], None) == 0.0


# ---------------------------------------------------------------- LongBench's own code

DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import jieba; jieba.setLogLevel(60)
import eval as official
from fuzzywuzzy import fuzz
rows = json.load(sys.stdin)
found = [
    [official.dataset2metric[task](prediction, answer, all_classes=classes) for answer in answers]
    + [official.scorer(task, [prediction], [answers], classes)]
    for task, prediction, answers, classes in rows
]
print(json.dumps([fuzz.SequenceMatcher.__name__, found]))
"""


def official_scores(rows):
    """Which matcher code is compared by, and LongBench's scores: of each answer (0-1), and of the row (percent)."""
    source = os.environ.get("LONGBENCH_SOURCE")
    if source is None:
        pytest.skip("LONGBENCH_SOURCE, a folder with THUDM/LongBench's source, is not set")
    folder = next(
        path.parent for path in sorted(Path(source).rglob("metrics.py")) if (path.parent / "eval.py").exists()
    )
    python = os.environ.get("LONGBENCH_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import fuzzywuzzy, rouge, jieba, numpy"], capture_output=True).returncode:
        pytest.skip(f"{python} lacks LongBench's packages (fuzzywuzzy, rouge, jieba, numpy); set LONGBENCH_PYTHON")
    done = subprocess.run(
        [python, "-W", "ignore", "-c", DRIVER, str(folder)],
        input=json.dumps(rows), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def constructed(task, count):
    """Predictions from hopeless to perfect, with what makes trouble: no text, marks, lines, numbers, comments."""
    random_ = random.Random(task.name)
    language = "zh" if task.language == "zh" else "en"
    lines = (EXAMPLES / "pretrain" / f"{language}_heldout.txt").read_text(encoding="utf-8").splitlines()
    code = [
        "\treturn self.x;",
        "    for i in range(10):",
        "x = 1  # one",
        "// note",
        "```",
        "if (a) {",
        "}",
        "",
        " " * 260 + "x",
    ]
    classes = ["Human", "Human group", "Human", "Date", "体育", "体育新闻", "财经", "Hum"]
    numbers = ["Paragraph 3", "段落3", "13", "3", "3.0", "III", "段落13"]
    oddities = [
        "",
        " ",
        ".",
        "...",
        "\n",
        "\n\n",
        "the",
        "。",
        "A.B.C.",
        "《》",
        "\u3000",
        "ａ１",
        "é",
        "😀",
        "a an the",
    ]
    right = {"classification": classes, "retrieval": numbers[:1], "retrieval_zh": numbers[1:2], "count": numbers[2:4]}
    rows = []
    for _ in range(count):
        pool = code if task.language == "code" else right.get(task.metric) or lines
        answers = random_.choices(pool, k=random_.randint(1, 3))
        words = [*" ".join(answers).split(" "), *random_.choice(lines)[:60].split(" "), *random_.sample(oddities, 3)]
        if task.language == "zh":
            words += [answers[0][: random_.randint(0, 40)], answers[0][random_.randint(0, 20) :]]
        random_.shuffle(words)
        join = random_.choice([" ", "", "\n", ". "])
        mixed = join.join(words[: random_.randint(0, 30)])
        near = random_.choice(answers)
        near = near[: random_.randint(0, len(near))] + random_.choice(oddities) + near[random_.randint(0, len(near)) :]
        several = " ".join(random_.choices([*numbers, *classes, *code], k=3))
        lines_of_both, other = f"\n{near}\n{mixed}", random_.choice([*oddities, *code, *classes])
        prediction = random_.choice([answers[-1], mixed, near, several, lines_of_both, other])
        rows.append((task.name, prediction, answers, sorted(set(classes)) if "class" in task.metric else None))
    return rows


@pytest.mark.parametrize("count", [pytest.param(25, id="quick"), pytest.param(200, id="full", marks=pytest.mark.slow)])
def test_scores_are_longbenchs_own(count):
    rows = [row for task in TASKS.values() for row in constructed(task, count)]
    matcher, official = official_scores(rows)
    seen = dict.fromkeys(TASKS, 0)
    for (name, prediction, answers, classes), (*single, percent) in zip(rows, official, strict=True):
        task = TASKS[name]
        score, metric = score_answer, find_metric(task.metric, classes)
        if task.language == "code" and matcher == "StringMatcher":  # python-Levenshtein is there
            score = score_levenshtein
        else:
            assert [metric(prediction, answer) for answer in answers] == pytest.approx(single, abs=1e-12)
        ours = score(task, prediction, answers, classes)
        assert round(100 * ours, 2) == pytest.approx(percent, abs=1e-9), (name, prediction, answers)
        seen[name] += ours > 0
    assert all(count / 5 < positive for positive in seen.values()), seen
