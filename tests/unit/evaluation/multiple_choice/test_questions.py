"""Reading benchmarks: the published layouts, made here and shared; folders of one's own; what is refused, by name."""

import csv
import json
import sys
import types
from collections import Counter

import pytest

from utils.core.errors import InputError
from utils.evaluation.multiple_choice.benchmarks import read_benchmark
from utils.evaluation.multiple_choice.questions import iter_csv, read_questions
from utils.evaluation.multiple_choice.subjects import CEVAL, CMMLU, MMLU

CHOICES = ["NA", "None", "null", "nan"]  # texts that a reader of tables takes for missing values


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_ceval(folder, keys=("law", "logic"), rows=3):
    """C-Eval's layout: data/{val,dev,test}/<subject>_{split}.csv; the test split keeps its answers."""
    header = ["id", "question", "A", "B", "C", "D"]
    for key in keys:
        for split in ("val", "dev", "test"):
            solved = split != "test"
            body = [[n, f"{key} {split} {n}?", *CHOICES, *(["B", f"因为{n}"] if solved else [])] for n in range(rows)]
            head = header + ["answer", "explanation"] * solved
            write_csv(folder / "data" / split / f"{key}_{split}.csv", [head[: len(body[0])], *body])
    return folder


def write_mmlu(folder, keys=("anatomy", "virology"), rows=2):
    """MMLU's layout: no header."""
    for key in keys:
        for split in ("test", "val", "dev"):
            body = [[f"{key} {n}, of two\nlines?", "one", "two, or so", "NA", "4", "ABCD"[n]] for n in range(rows)]
            write_csv(folder / split / f"{key}_{split}.csv", body)
    return folder


def test_tables_have_the_published_subjects():
    assert Counter(subject.category for subject in CEVAL.values()) == {
        "STEM": 20,
        "Humanities": 11,
        "Social Science": 10,
        "Other": 11,
    }
    assert Counter(subject.category for subject in CMMLU.values()) == {
        "STEM": 17,
        "China specific": 15,
        "Social Science": 13,
        "Humanities": 11,
        "Other": 11,
    }
    assert Counter(subject.category for subject in MMLU.values()) == {
        "STEM": 18,
        "Humanities": 13,
        "Social Science": 12,
        "Other": 14,
    }
    assert CEVAL["computer_network"].name == "计算机网络" and CMMLU["logical"].name == "逻辑学"
    assert MMLU["high_school_us_history"].name == "high school us history"


@pytest.mark.shared_data
def test_table_of_ceval_is_its_own_mapping(shared_data):
    mapping = json.loads((shared_data / "eval" / "ceval" / "subject_mapping.json").read_text(encoding="utf-8"))
    assert {key: (names[1], names[2]) for key, names in mapping.items()} == {
        key: (subject.name, subject.category) for key, subject in CEVAL.items()
    }


@pytest.mark.shared_data
def test_the_whole_of_cmmlu(shared_data):
    benchmark = read_benchmark("cmmlu", str(shared_data / "eval" / "cmmlu"), num_examples=5)
    assert (len(benchmark.questions), len(benchmark.subjects), benchmark.split) == (11582, 67, "test")
    assert all(len(rows) == 5 for rows in benchmark.examples.values()) and not benchmark.ignored
    assert Counter(question.answer for question in benchmark.questions)["A"] > 2500
    first = next(question for question in benchmark.questions if question.subject == "anatomy")
    assert (first.text, first.choices, first.answer, first.id) == (
        "女性生殖腺是",
        ("卵巢", "前庭大腺", "前庭球", "乳腺"),
        "A",
        "0",
    )


def test_ceval_and_choices_that_look_like_nothing(tmp_path):
    folder = str(write_ceval(tmp_path))
    with pytest.raises(InputError, match=r"no file of 50 of 52 subjects: computer_network, .*--skip_missing"):
        read_benchmark("ceval", folder)
    benchmark = read_benchmark("ceval", folder, num_examples=2, skip_missing=True)
    assert benchmark.split == "val" and len(benchmark.missing) == 50
    assert [question.choices for question in benchmark.questions] == [tuple(CHOICES)] * 6
    assert benchmark.examples["law"][1].explanation == "因为1"
    assert benchmark.subjects["law"].name == "法学"
    hidden = read_benchmark("ceval", folder, "test", subjects=["logic"], max_questions=2)
    assert [question.answer for question in hidden.questions] == [None, None]
    assert len(hidden.files) == 1 and next(iter(hidden.files)).endswith("logic_test.csv")


def test_a_mapping_beside_the_data_names_the_subjects(tmp_path):
    write_ceval(tmp_path, keys=("baking",))
    (tmp_path / "subject_mapping.json").write_text(json.dumps({"baking": ["Baking", "烘焙", "Crafts"]}))
    benchmark = read_benchmark("ceval", str(tmp_path))
    assert (benchmark.subjects["baking"].name, benchmark.subjects["baking"].category) == ("烘焙", "Crafts")
    (tmp_path / "subject_mapping.json").write_text(json.dumps({"baking": "Baking"}))
    with pytest.raises(InputError, match=r"subject_mapping\.json: need"):
        read_benchmark("ceval", str(tmp_path))


def test_mmlu_has_no_header(tmp_path):
    benchmark = read_benchmark("mmlu", str(write_mmlu(tmp_path)), num_examples=-1, skip_missing=True)
    assert [question.answer for question in benchmark.questions] == ["A", "B", "A", "B"]
    question = benchmark.questions[1]
    assert question.text == "anatomy 1, of two\nlines?" and question.choices[1] == "two, or so"
    assert question.location.endswith("anatomy_test.csv:3")  # its first line
    assert len(benchmark.examples["virology"]) == 2
    assert read_benchmark("mmlu", str(tmp_path), "val", subjects=["anatomy"]).split == "val"


def test_stray_files_are_ignored_and_named(tmp_path, caplog):
    folder = write_mmlu(tmp_path)
    (folder / "test" / ".DS_Store").write_text("x")
    (folder / "test" / "notes.txt").write_text("x")
    write_csv(folder / "test" / "anatomy_old_test.csv", [["?", "a", "b", "c", "d", "A"]])
    benchmark = read_benchmark("mmlu", str(folder), skip_missing=True)
    assert {name.rsplit("/", 1)[1] for name in benchmark.ignored} == {".DS_Store", "notes.txt", "anatomy_old_test.csv"}
    assert "3 files belong to no subject and were ignored" in caplog.text and len(benchmark.questions) == 4


def test_a_folder_of_ones_own(tmp_path):
    folder = tmp_path / "mine"
    write_csv(folder / "cooking.csv", [["QUESTION", " a ", "B", "c", "Answer"], ["盐？", "x", "y", "z", "c"]])
    write_csv(folder / "cooking_dev.csv", [["题目", "A", "B", "答案", "解析"], ["糖？", "x", "y", "B", "甜"]])
    rows = [{"question": "Why?", "choices": ["x", 2], "answer": 1, "id": "k7"}]
    (folder / "sewing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sewing_dev.jsonl").write_text(json.dumps({"Question": "?", "options": ["p", "q"], "answer": "a"}))
    benchmark = read_benchmark(str(folder), num_examples=1)
    assert (benchmark.name, benchmark.kind, benchmark.ignored) == ("mine", "own", [])
    assert [(q.choices, q.answer, q.id) for q in benchmark.questions] == [
        (("x", "y", "z"), "C", "0"),
        (("x", "2"), "B", "k7"),
    ]
    assert benchmark.examples["cooking"][0].explanation == "甜" and benchmark.examples["sewing"][0].answer == "A"
    with pytest.raises(InputError, match=r"fewer examples in dev: cooking .1., sewing .1.; pass at most 1, or -1"):
        read_benchmark(str(folder), num_examples=2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [["question", "A", "B", "answer"], ["?", "x", "y", "C"]],
            r"law_val\.csv:2: the answer is 'C', need one of A, B",
        ),
        (
            [["question", "A", "B", "answer"], ["?", "x", "y", ""]],
            r"law_val\.csv:2: the answer is '', need one of A, B",
        ),
        (
            [["id", "question", "A", "B", "answer"], [7, "?", "x", "y", "A"], [7, "?", "x", "y", "A"]],
            "ids must differ",
        ),
        (
            [["question", "choice1", "answer"], ["?", "x", "A"]],
            "need the columns question, A, B, .*there are 'question'",
        ),
        ([["question", "A", "B", "answer"], ["?", "x", "y"]], r"law_val\.csv:2: 3 cells, need 4"),
        ([["question", "A", "B", "answer"], [" ", "x", "y", "A"]], r"law_val\.csv:2: the question is empty"),
        ([["question", "A", "B", "answer"]], r"law_val\.csv: no question in it"),
        (
            [["question;A;B;answer"], ["?;x;y;A"]],
            r"law_val\.csv:1: the cells seem to be separated by ';', need commas",
        ),
        ([["question\tA\tB\tanswer"], ["a, b\tx\ty\tA"]], r"separated by '\\t'"),
        ([["题, 一;x;y;A"]], "separated by ';'"),
        (
            [["Question Text", "A", "B", "正确答案"], ["?", "x", "y", "A"]],
            r"csv:1: neither a header, which has a column question or 题目.* are 'Question Text', 'A', 'B', '正确",
        ),
        ([["question", "A", "B", "正确答案"], ["?", "x", "y", "A"]], r"csv:2: need the columns .* '正确答案'"),
        ([["question", *"ABCDEFGHIJKL", "answer"], ["?", *"abcdefghijkl", "L"]], r"csv:2: 12 choices, at most 10"),
        ([["question", "A", "B", "D", "answer"], ["?", "x", "y", "z", "D"]], r"csv:2: choice C is empty, and others"),
        ([["question", *"ABCD", "answer"], ["?", "x", "", " ", "z", "A"]], r"csv:2: choice B, C is empty"),
        ([["question", *"ABCD", "answer"], ["?", "x", "", "", "", "A"]], r"csv:2: 1 choices that are not empty"),
        (
            [["question", *"ABCD", "answer"], ["?", "x", "y", "", "", "C"]],
            r"csv:2: the answer is 'C', need one of A, B",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    write_csv(tmp_path / "val" / "law_val.csv", rows)
    with pytest.raises(InputError, match=message):
        read_benchmark("ceval", str(tmp_path), skip_missing=True)


def test_empty_choices_at_the_end_are_none(tmp_path):
    header = ["question", *"ABCD", "n", "answer"]
    path = write_csv(tmp_path / "a.csv", [header, ["?", "x", "y", "", " ", 3, "B"], ["?", *"xyzw", 4, "D"]])
    questions = read_questions("law", list(iter_csv(path)))
    assert [(question.choices, question.letters) for question in questions] == [
        (("x", "y"), "AB"),
        (("x", "y", "z", "w"), "ABCD"),
    ]
    rows = [{"question": "?", "choices": ["x", "y", None, ""], "answer": 1}]
    assert read_questions("law", [("f:1", row) for row in rows])[0].choices == ("x", "y")
    row = {"question": "?", "choices": list("abcdefghijk"), "answer": 10}
    with pytest.raises(InputError, match=r"f:1: 11 choices, at most 10"):
        read_questions("law", [("f:1", row)])


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes("question,A,B,answer\n题,x,y,A\n".encode("gbk"))
    with pytest.raises(InputError, match=r"bad\.csv: the whole file seems to be in GB18030"):
        list(iter_csv(path))
    path.write_bytes("question,A,B,answer\n题,x,\ufffd,A\n".encode()[:-4] + b"\xff,A\n")
    with pytest.raises(InputError, match=r"bad\.csv: not UTF-8 at byte 26"):
        list(iter_csv(path))
    path.write_text('question,A,B,answer\n?,"x,y,A\n?,x,y,B\n')
    with pytest.raises(InputError, match=r"bad\.csv:\d: broken csv"):
        list(iter_csv(path))


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match=r"pass --data_dir, .* --data_dir haonan-li/cmmlu"):
        read_benchmark("cmmlu")
    with pytest.raises(InputError, match="need one of ceval, cmmlu, mmlu, or a folder"):
        read_benchmark("gsm8k")
    with pytest.raises(InputError, match="is no folder"):
        read_benchmark("mmlu", str(tmp_path / "no where"))
    with pytest.raises(InputError, match=r"no folder .*test"):
        read_benchmark("mmlu", str(tmp_path))
    with pytest.raises(InputError, match="cmmlu has test"):
        read_benchmark("cmmlu", str(tmp_path), "val")
    write_mmlu(tmp_path)
    with pytest.raises(InputError, match="--subjects baking: no such subject; there are abstract_algebra"):
        read_benchmark("mmlu", str(tmp_path), subjects=["baking"])
    (tmp_path / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(InputError, match=r"no file of anatomy in .*dev, .*--num_fewshot 0"):
        read_benchmark("mmlu", str(tmp_path), num_examples=2, subjects=["anatomy"])
    with pytest.raises(InputError, match="fewer examples in dev: virology"):
        read_benchmark("mmlu", str(tmp_path), num_examples=9, subjects=["virology"])


def test_a_hub(monkeypatch):
    """Rows as the datasets library gives them: choices as a list, answers as numbers."""
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return [{"question": f"{name}?", "subject": name, "choices": ["a", "b", "c", "d"], "answer": 3}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    benchmark = read_benchmark("mmlu", "cais/mmlu", "val", subjects=["anatomy"], num_examples=1)
    assert asked == [("cais/mmlu", "anatomy", "validation"), ("cais/mmlu", "anatomy", "dev")]
    assert benchmark.questions[0].answer == "D" and benchmark.questions[0].location == "cais/mmlu/anatomy/val: row 1"

    def offline(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(InputError, match="cannot be read: no network; download the files"):
        read_benchmark("mmlu", "cais/mmlu")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        read_benchmark("mmlu", "cais/mmlu")


def test_a_secret_split_has_no_answers_at_all_or_all():
    row = {"question": "?", "A": "x", "B": "y"}
    assert read_questions("law", [("f:2", row)], secret=True)[0].answer is None
    with pytest.raises(InputError, match="f:3: the answer is ''"):
        read_questions("law", [("f:2", {**row, "answer": "A"}), ("f:3", row)], secret=True)
