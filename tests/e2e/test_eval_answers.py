"""eval_answers.py on the tiny model and on files of answers: figures, the judge, resuming, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import eval_answers
import pytest
import torch
from eval_answers import AnswerArguments, EvalArguments

from support.openai_stand_in import StandIn
from support.paths import SCRIPTS
from utils.core.arguments import InferenceArguments
from utils.core.errors import InputError
from utils.data.questions import read_questions
from utils.evaluation.answers.scores import score_answer
from utils.generation import engine
from utils.text.prompts import CHAT_TEMPLATES, encode_prompt
from utils.text.tokenizer import load_tokenizer

ANIMALS = ["cat", "dog", "cow", "hen", "pig", "fox"]
RECORDS = [
    {"instruction": "Where is the cat?", "input": "", "output": "The cat is on the mat.", "category": "where"},
    {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "12"}]},
    {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hello."},
            {"from": "gpt", "value": "Hi."},
            {"from": "human", "value": "How many dogs?"},
            {"from": "gpt", "value": "There are 3."},
        ],
        "id": "dogs",
    },
]


def evaluate(out, settings=None, model=None, **task) -> dict:
    return eval_answers.main(
        InferenceArguments(model_name_or_path=model and str(model)),
        AnswerArguments(**({"max_new_tokens": 6} | (settings or {}))),
        EvalArguments(output_dir=str(out), **task),
    )


def read(path: Path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def write_lines(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    return write_lines(tmp_path_factory.mktemp("questions") / "my questions.jsonl", RECORDS)


@pytest.fixture(scope="module")
def animals(tmp_path_factory) -> dict[str, str]:
    """Six questions, and three files of answers: of a, of which two are right, of b, of which four are, and of c."""
    folder = tmp_path_factory.mktemp("animals")
    rows = [{"instruction": f"What is animal {n}?", "output": name} for n, name in enumerate(ANIMALS)]
    said = {
        "a": ["cat", "dog", "no", "no", "no", "no"],
        "b": ["The cat.", "no", "cow", "hen", "pig", "no"],
        "c": ["cat", "dog", "no", "no", "no", "no idea"],
    }
    files = {
        name: write_lines(folder / f"{name}.jsonl", [{"id": n, "answer": text} for n, text in enumerate(texts, 1)])
        for name, texts in said.items()
    }
    return {"questions": write_lines(folder / "animals.jsonl", rows), **files}


def test_a_model_and_a_file_of_answers_are_compared(tiny_model_folder, questions, tmp_path, capsys, caplog):
    """The model's answers against transformers' own greedy search; a right answer beside them; then once more."""
    from transformers import AutoModelForCausalLM

    caplog.set_level("INFO")
    references = [question.reference for question in read_questions([questions])]
    right = [{"id": name, "answer": text} for name, text in zip(("1", "2", "dogs"), references, strict=True)]
    task = {"questions": [questions], "answers": [f"right={write_lines(tmp_path / 'right.jsonl', right)}"]}
    figures = evaluate(tmp_path / "out", model=tiny_model_folder, **task)
    result = read(tmp_path / "out" / "answers.json")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model_folder), load_tokenizer(tiny_model_folder)
    name = tiny_model_folder.name
    for row, question in zip(result["questions"], read_questions([questions]), strict=True):
        prompt = encode_prompt(question.messages, CHAT_TEMPLATES["alpaca-2"], tokenizer)
        output = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, num_beams=1)
        text = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
        assert (row["question"], row["reference"]) == (question.text, question.reference)
        assert row["answers"][name] == {"text": text, "scores": score_answer(text, question.reference)}
        assert set(row["answers"]["right"]["scores"].values()) == {1.0} and row["answers"]["right"]["change"] == 1
    assert [row["id"] for row in result["questions"]] == ["1", "2", "dogs"]
    assert [turn["content"] for turn in result["questions"][2]["before"]] == ["Be brief.", "Hello.", "Hi."]
    assert figures["right"]["scores"]["number"] == {
        "score": 100.0,
        "interval": pytest.approx([34.2, 100], abs=0.1),
        "questions": 2,
    }
    assert figures["right"]["changes"]["better"] == 3 and figures["right"]["changes"]["p_value"] == 0.25
    assert set(figures[name]["by_category"]) == {"where", ""} and "changes" not in figures[name]
    out = capsys.readouterr().out
    assert re.search(r"right +100\.0 +100\.0 +100\.0 +100\.0 +100\.0", out)
    assert "only 3 questions: differences are mostly chance" in caplog.text
    assert f"right against {name}, by chrf: 3 better, 0 worse, 0 the same" in caplog.text
    assert f"next: open {tmp_path / 'out' / 'answers.html'} in a browser" in caplog.text
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"answers.json", "answers.html", "answers.md", "answers"}
    # Nothing is answered twice, and a further model may join.
    other = write_lines(tmp_path / "other.jsonl", [{"id": row["id"], "answer": "12"} for row in right])
    task["answers"].append(f"other={other}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.generation.loading.load_for_inference", lambda *_: pytest.fail("the weights were read"))
        again = evaluate(tmp_path / "out", model=tiny_model_folder, **task)
    assert list(again) == [name, "right", "other"] and again["right"] == figures["right"]


def test_the_metric_decides_what_changed(animals, tmp_path):
    task = {"questions": [animals["questions"]], "answers": [f"{name}={animals[name]}" for name in "abc"]}
    figures = evaluate(tmp_path / "out", metric="contained", **task)
    changes = figures["b"]["changes"]
    assert (changes["better"], changes["worse"], changes["same"]) == (3, 1, 2)
    assert changes["difference"] == pytest.approx(100 * 2 / 6) and changes["p_value"] == 10 / 16
    rows = read(tmp_path / "out" / "answers.json")["questions"]
    assert [row["answers"]["b"]["change"] for row in rows] == [0, -1, 1, 1, 1, 0]
    assert evaluate(tmp_path / "out", metric="exact", **task)["b"]["changes"]["worse"] == 2, "The cat. is not cat"


def shown(prompt):
    return [text.strip() for text in re.findall(r"【回答 [AB]】\n(.*?)\n【回答 [AB] 结束】", prompt, re.S)]


def test_a_judge_decides_instead(animals, tmp_path, caplog):
    """A judge that likes long answers, asked in both orders; what it said is kept."""
    caplog.set_level("INFO")

    def longer(body):
        first, second = shown(body["messages"][0]["content"])
        return "[[A]]" if len(first) > len(second) else "[[B]]" if len(first) < len(second) else "[[C]]"

    task = {"questions": [animals["questions"]], "answers": [f"{name}={animals[name]}" for name in "abc"]}
    with StandIn(longer) as server:
        figures = evaluate(tmp_path / "out", judge=server.url, **task)
        # b: The cat. > cat, dog < no is false: no is shorter; cow, hen, pig > no; no = no is not asked. c: one alone.
        assert len(server.requests) == 2 * (5 + 1)
        assert any("【参考答案】\ncat\n" in body["messages"][0]["content"] for body in server.requests)
        assert evaluate(tmp_path / "out", judge=server.url, **task) == figures and len(server.requests) == 12
    judged = figures["b"]["judged"]
    assert (judged["better"], judged["worse"], judged["same"]) == (4, 1, 1) and judged["p_value"] == 12 / 32
    result = read(tmp_path / "out" / "answers.json")
    assert [row["answers"]["c"]["change"] for row in result["questions"]] == [0, 0, 0, 0, 0, 1]
    assert result["judge"] == "stand-in" and "b against a, by the judge: 4 better, 1 worse, 1 the same" in caplog.text


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"instruction": "q", "input": "x"}], r"1: no reference answer to compare with; write it in 'output'"),
        ([{"instruction": "q", "output": " "}], "1: no reference answer"),
        ([{"instruction": "q", "output": "a"}, {"instruction": " ", "output": "a"}], "2: the question is empty"),
        ([{"question": "q", "answer": "a"}], "1: need 'instruction' and 'output', 'messages', or 'conversations'"),
        ([{"messages": [{"role": "user", "content": "q"}]}], "1: no reference answer"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "1: the question is empty"),
        ([{"instruction": "q", "output": "a", "id": 1}] * 2, "2: the id '1' is that of .*:1 too"),
        ([{"instruction": "q", "output": "a", "tools": [{"name": "f"}]}], "1: calls functions"),
        ([], "no question in it"),
    ],
)
def test_questions_that_cannot_be_asked_are_named(animals, tmp_path, rows, words):
    path = write_lines(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=re.escape(path) + f".*{words}|--questions .*{words}"):
        evaluate(tmp_path / "out", questions=[path], answers=[f"a={animals['a']}"])
    assert not (tmp_path / "out").exists()


def test_mistakes_are_found_before_weights_are_read(tiny_model_folder, animals, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.generation.loading.load_for_inference", lambda *_: pytest.fail("the weights were read"))
    answers = [f"a={animals['a']}"]
    gbk = tmp_path / "gbk.json"
    text = json.dumps(
        [{"instruction": f"第{n}个城市在哪里？", "output": "在中国。"} for n in range(9)], ensure_ascii=False
    )
    gbk.write_bytes(text.encode("gb18030"))
    for task, words in (
        ({"questions": [str(gbk)]}, r"whole file seems to be in GB18030, need UTF-8; convert it: iconv"),
        ({"questions": ["nowhere.json"]}, r"data not found: nowhere\.json"),
        ({"questions": [questions]}, r"a: no answer to \d of 3 questions"),
        ({"questions": [animals["questions"]], "category_field": "kind"}, "--category_field kind: no record has it"),
        ({"questions": [animals["questions"]], "judge": "http://x"}, "--judge compares the answers of two models"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(tmp_path / "out", **({"answers": answers} | task))
    with pytest.raises(InputError, match="pass --base_model FOLDER, --models, --answers or --servers"):
        evaluate(tmp_path / "out", questions=[questions])
    long = write_lines(tmp_path / "long.jsonl", [{"instruction": "cat " * 600, "output": "a"}])
    with pytest.raises(InputError, match="question 1: the prompt has"):
        evaluate(tmp_path / "out", questions=[long], model=tiny_model_folder)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({}, "pass --questions FILE"),
        ({"questions": ["q"], "batch_size": 0}, "--batch_size 0: need at least 1"),
        ({"questions": ["q"], "judge_prompt": "p"}, "--judge_prompt needs --judge"),
        ({"questions": ["q"], "workers": 0}, "--workers 0: need at least 1"),
    ],
)
def test_flags_that_contradict(task, words):
    with pytest.raises(InputError, match=words):
        EvalArguments(**task)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_other_models_answers_are_not_mixed_in(
    tiny_model_folder, questions, tmp_path, monkeypatch
):
    whole = evaluate(tmp_path / "whole", model=tiny_model_folder, questions=[questions])
    wait, calls = engine.Answer.wait, []

    def stops(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return wait(self)

    monkeypatch.setattr(engine.Answer, "wait", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "cut", model=tiny_model_folder, questions=[questions])
    assert not (tmp_path / "cut" / "answers.json").exists()
    assert evaluate(tmp_path / "cut", model=tiny_model_folder, questions=[questions]) == whole and len(calls) == 2 + 2
    other = shutil.copytree(tiny_model_folder, tmp_path / "moved" / tiny_model_folder.name)
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(1).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"other settings .* pass another --output_dir, or --overwrite"):
        evaluate(tmp_path / "cut", model=other, questions=[questions])
    evaluate(tmp_path / "cut", model=other, questions=[questions], overwrite=True)


@pytest.mark.slow
def test_the_launcher_runs_and_names_what_is_missing(animals, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "my out")}
    environment |= {"QUESTIONS": animals["questions"], "ANSWERS": f"a={animals['a']} b={animals['b']}"}
    command = ["bash", str(SCRIPTS / "run_eval_answers.sh")]

    def launch(*without):
        chosen = {name: value for name, value in environment.items() if name not in without}
        return subprocess.run(command, env=chosen, capture_output=True, text=True, check=False, cwd=tmp_path)

    result = launch()
    assert result.returncode == 0, result.stderr
    assert "b against a" in result.stderr and (tmp_path / "my out" / "answers.html").is_file()
    assert "set QUESTIONS to" in launch("QUESTIONS").stderr and "set MODEL, LORA" in launch("ANSWERS").stderr


@pytest.mark.slow
def test_the_page_is_filtered_in_a_browser(browser, animals, tmp_path):
    """Rows that are chosen are seen, the others are not; no scripts run, nothing is loaded."""
    task = {"questions": [animals["questions"]], "answers": [f"{name}={animals[name]}" for name in "ab"]}
    evaluate(tmp_path / "out", metric="contained", **task)
    page = browser.new_page()
    page.goto(f"file://{tmp_path / 'out' / 'answers.html'}")
    rows = page.locator("#questions tbody tr")
    assert sum(rows.nth(n).is_visible() for n in range(rows.count())) == 6
    assert "animal 1?" in rows.nth(0).inner_text(), "the one that got worse"
    for label, count in (("worse", 1), ("better", 3), ("same", 2), ("all", 6)):
        page.locator(f".filtered label:has-text('{label}')").click()
        assert sum(rows.nth(n).is_visible() for n in range(rows.count())) == count
    page.close()
