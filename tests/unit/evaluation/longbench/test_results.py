"""LongBench's results: answers that are there, scores, intervals and averages against figures by hand."""

import json
import math
import random
import statistics

import pytest

from utils.core.errors import InputError
from utils.evaluation.intervals import wilson_interval
from utils.evaluation.longbench.results import (
    LongBenchPredictions,
    average_scores,
    mean_score,
    open_predictions,
    plot_longbench,
    read_predictions,
)
from utils.evaluation.longbench.tasks import TASKS, Sample


def row(pred, answer, length=10, classes=None):
    return {"pred": pred, "answers": [answer], "all_classes": classes, "length": length}


# Scores: dureader 100 and 0, multifieldqa_zh 100, hotpotqa 50 (word F1 2/3 and 1/3), lcc 75.
ROWS = {
    "multifieldqa_zh": [row("北京", "北京")],
    "dureader": [row("天", "天"), row("地", "天")],
    "hotpotqa": [row("red fox", "fox"), row("b c d e fox", "fox")],
    "lcc": [row("abcd", "bcde")],  # one sample: its interval is all there is
}


def test_averages_by_hand():
    figures = average_scores(ROWS, e=False)
    scores = {name: found["score"] for name, found in figures["datasets"].items()}
    assert scores == pytest.approx({"multifieldqa_zh": 100, "dureader": 50, "hotpotqa": 50, "lcc": 75}, abs=1e-5)
    assert figures["datasets"]["lcc"]["score_levenshtein"] == 75 and "buckets" not in figures["datasets"]["lcc"]
    averages = figures["averages"]
    assert list(averages) == ["zh", "en", "all"]
    assert {g: f["score"] for g, f in averages["zh"]["groups"].items()} == pytest.approx(
        {"single-doc QA": 100, "multi-doc QA": 50, "code": 75}, abs=1e-5
    )
    assert averages["zh"]["score"] == pytest.approx(75, abs=1e-5)
    assert averages["en"]["score"] == pytest.approx((50 + 75) / 2)
    assert averages["all"]["groups"]["multi-doc QA"]["score"] == pytest.approx(50, abs=1e-5)
    assert averages["all"]["groups"]["multi-doc QA"]["datasets"] == 2
    assert averages["all"]["score"] == pytest.approx((100 + 50 + 75) / 3, abs=1e-5)


def test_longbench_e_is_looked_at_by_length():
    lengths = [0, 3999, 4000, 7999, 8000, 99999]
    rows = {
        "hotpotqa": [row("x" if number % 2 else "y", "x", length) for number, length in enumerate(lengths)],
        "lcc": [row("x", "x", 5000)],
    }
    figures = average_scores(rows, e=True)
    buckets = figures["datasets"]["hotpotqa"]["buckets"]
    assert {name: (part["samples"], part["score"]) for name, part in buckets.items()} == {
        "0-4k": (2, 50.0), "4-8k": (2, 50.0), "8k+": (2, 50.0)
    }  # fmt: skip
    assert list(figures["datasets"]["lcc"]["buckets"]) == ["4-8k"]
    averages = figures["averages"]["en"]["buckets"]
    assert {name: part["score"] for name, part in averages.items()} == {"0-4k": 50.0, "4-8k": 75.0, "8k+": 50.0}
    assert list(averages["8k+"]["groups"]) == ["multi-doc QA"]


def test_intervals():
    """Right-or-wrong scores have Wilson's, graded ones that of a mean; an average's is that of independent parts."""
    assert mean_score([1.0, 0.0, 1.0, 1.0])["interval"] == [100 * bound for bound in wilson_interval(3, 4)]
    assert mean_score([0.0] * 200)["interval"] == pytest.approx([0, 1.88], abs=0.01)
    graded = [0.2, 0.4, 0.9, 0.5]
    half = 1.959964 * statistics.stdev(graded) / math.sqrt(4)
    assert mean_score(graded)["interval"] == pytest.approx([100 * (0.5 - half), 100 * (0.5 + half)])
    assert mean_score([0.3])["interval"] == [0, 100]
    averages = average_scores(ROWS, e=False)["averages"]["en"]
    low, high = averages["interval"]
    # hotpotqa's two scores, 2/3 and 1/3, and a single one of lcc, 75, which may be anything from 0 to 100.
    parts = [100 * 1.959964 * statistics.stdev([2 / 3, 1 / 3]) / math.sqrt(2), 75]
    half, mean = math.hypot(*parts) / 2, averages["score"]
    assert [low, high] == pytest.approx([mean - half, 100])


def test_an_average_is_an_interval_that_holds():
    """Of 400 simulated benchmarks 95 % hold the true mean between their bounds, but for chance."""
    random_ = random.Random(0)
    holds = 0
    for _ in range(400):
        rows = {}
        for name, share in (("passage_count", 0.3), ("passage_retrieval_zh", 0.5), ("hotpotqa", 0.8)):
            answer = {"passage_count": "7", "passage_retrieval_zh": "段落7", "hotpotqa": "7"}[name]
            rows[name] = [row("7" if random_.random() < share else "8", answer) for _ in range(60)]
        low, high = average_scores(rows, e=False)["averages"]["all"]["interval"]
        holds += low <= 100 * ((0.3 + 0.5) / 2 + 0.8) / 2 <= high
    assert 0.92 < holds / 400 < 0.985


def test_the_picture_is_drawn(tmp_path):
    plot_longbench(average_scores(ROWS, e=False), tmp_path / "a.png", "title")
    plot_longbench(
        average_scores({"lcc": [row("x", "x", 1), row("x", "x", 9000)]}, e=True), tmp_path / "b.png", "title"
    )
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


# ---------------------------------------------------------------- answers that are there

SAMPLES = [Sample("c", "q", [f"answer {number}"], None, number, f"x:{number}") for number in range(3)]


def test_answers_are_written_in_upstreams_form_and_go_on(tmp_path):
    path = tmp_path / "pred" / "hotpotqa.jsonl"
    first = open_predictions(path, SAMPLES, {"weights": 1}, overwrite=False, anew=False)
    for answer in ("un\u2028", "deux"):
        first.append(answer)
    with open(path, "ab") as file:
        file.write(b'{"pred": "half a li')  # killed here
    again = open_predictions(path, SAMPLES, {"weights": 1}, overwrite=False, anew=False)
    assert [r["pred"] for r in again.rows] == ["un\u2028", "deux"] and not again.metrics
    again.append("trois")
    again.finish({"prompts_cut": 1})
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert rows == [
        {"pred": pred, "answers": s.answers, "all_classes": None, "length": s.length}
        for pred, s in zip(["un\u2028", "deux", "trois"], SAMPLES, strict=True)
    ]
    assert open_predictions(path, SAMPLES, {"weights": 1}, False, False).metrics == {"prompts_cut": 1}


def test_answers_of_others_stay_unless_told(tmp_path):
    path = tmp_path / "hotpotqa.jsonl"
    done = open_predictions(path, SAMPLES, {"weights": 1}, overwrite=False, anew=False)
    for answer in "abc":
        done.append(answer)
    done.finish({})
    with pytest.raises(
        InputError, match=r"other settings \(weights 1 -> 2\); pass another --output_dir, or --overwri"
    ):
        open_predictions(path, SAMPLES, {"weights": 2}, overwrite=False, anew=False)
    with pytest.raises(InputError, match=r"answer 1 is to .*answer 0"):
        open_predictions(path, SAMPLES[1:], {"weights": 1}, overwrite=False, anew=False)
    path.write_text('{"question": 1}\n')
    with pytest.raises(InputError, match="holds no predictions; pass another --output_dir"):
        open_predictions(path, SAMPLES, {"weights": 1}, overwrite=False, anew=False)
    replaced = open_predictions(path, SAMPLES, {"weights": 2}, overwrite=True, anew=False)
    assert not replaced.rows
    for answer in "abc":
        replaced.append(answer)
    assert len(open_predictions(path, SAMPLES, {"weights": 2}, overwrite=True, anew=False).rows) == 3
    assert not open_predictions(path, SAMPLES, {"weights": 2}, overwrite=True, anew=True).rows


def write(folder, name, rows, record=None):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    if record is not None:
        (folder / f"{name}.jsonl.settings.json").write_text(json.dumps(record), encoding="utf-8")


def test_answers_are_read(tmp_path):
    tasks = list(TASKS.values())
    with pytest.raises(InputError, match=r"no answers in .*; pass --base_model to make them"):
        read_predictions(tmp_path, tasks)
    for name, rows in ROWS.items():  # as another program wrote them
        write(tmp_path, name, rows)
    write(tmp_path, "squad", [{}])  # none of LongBench's
    rows, source = read_predictions(tmp_path, tasks)
    assert rows == ROWS and source["models"] == {tmp_path.parent.name: {}}
    assert read_predictions(tmp_path, [TASKS["lcc"]])[0] == {"lcc": ROWS["lcc"]}
    for name in ROWS:
        write(tmp_path, name, ROWS[name], {"settings": {"weights": 1, "data": name}, "metrics": {"tokens_cut": 2}})
    source = read_predictions(tmp_path, tasks)[1]
    assert source["models"] == {tmp_path.parent.name: {"weights": 1}}
    assert source["data"]["lcc"] == {"sha256": "lcc", "tokens_cut": 2}


def test_answers_that_do_not_belong_together_are_refused(tmp_path):
    tasks = list(TASKS.values())
    write(tmp_path, "lcc", ROWS["lcc"], {"settings": {"weights": 1}})
    with pytest.raises(InputError, match=r"lcc\.jsonl is unfinished; run the command that made it again"):
        read_predictions(tmp_path, tasks)
    write(tmp_path, "lcc", ROWS["lcc"], {"settings": {"weights": 1}, "metrics": {}})
    write(tmp_path, "hotpotqa", ROWS["hotpotqa"], {"settings": {"weights": 2}, "metrics": {}})
    with pytest.raises(InputError, match=r"lcc\.jsonl and hotpotqa\.jsonl are of different models"):
        read_predictions(tmp_path, tasks)
    for name, rows, message in (
        ("lcc", [{"pred": "x"}], r"lcc\.jsonl:1: answers, length: missing or wrong for lcc; the record has pred"),
        ("lcc", [row(None, "x")], "jsonl:1: pred: missing or wrong"),
        ("trec", [row("x", "x")], r"trec\.jsonl:1: all_classes: missing or wrong for trec"),
        ("lcc", [], "no answers in"),
    ):
        write(tmp_path, name, rows)
        with pytest.raises(InputError, match=message):
            read_predictions(tmp_path, [TASKS[name]])


def test_a_folder_in_the_answers_place_is_named(tmp_path):
    (tmp_path / "lcc.jsonl").mkdir()
    with pytest.raises(InputError, match=r"--output_dir .*lcc\.jsonl is a folder"):
        LongBenchPredictions(tmp_path / "lcc.jsonl", SAMPLES, {})
