"""eval_multiple_choice.py on the tiny model: likelihoods against a plain loop, modes, resuming, what is refused."""

import json
import os
import shutil
import subprocess
import sys

import eval_multiple_choice
import pytest
import torch
from eval_multiple_choice import AnswerArguments, EvalArguments

from support.paths import SCRIPTS
from support.scripts import next_words
from utils.core.arguments import InferenceArguments
from utils.core.errors import InputError
from utils.evaluation.multiple_choice import runs
from utils.text.tokenizer import encode_text, load_tokenizer

FILES = {"multiple_choice.json", "multiple_choice.png", "answers.jsonl"}


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    """Two subjects of ten short questions each, with two solved ones."""
    folder = tmp_path_factory.mktemp("exam") / "mine"
    for subject in ("animals", "numbers"):
        for split, count in (("test", 10), ("dev", 2)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            rows = [f"{subject} {split} {n}: which?,cat {n},dog,NA,bird {n},{'ABCD'[n % 4]}\n" for n in range(count)]
            (folder / split / f"{subject}.csv").write_text("question,A,B,C,D,answer\n" + "".join(rows))
    return folder


def evaluate(model, out, exam, settings=None, **task):
    task = {"benchmark": str(exam), "num_fewshot": 2, **task}
    return eval_multiple_choice.main(
        InferenceArguments(model_name_or_path=model and str(model), only_cpu=True),
        AnswerArguments(**({"max_new_tokens": 8} | (settings or {}))),
        EvalArguments(output_dir=str(out), **task),
    )


def read_rows(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def examine(model_folder, text, continuation):
    """The log-likelihood of a continuation in one plain forward pass over all of it."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder).eval(), load_tokenizer(model_folder)
    prompt = [tokenizer.bos_token_id, *encode_text(tokenizer, text)]
    joint = [tokenizer.bos_token_id, *encode_text(tokenizer, text + continuation)]
    assert joint[: len(prompt)] == prompt
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([joint])).logits[0].double(), -1)
    return sum(float(table[place - 1, joint[place]]) for place in range(len(prompt), len(joint)))


PROMPT = (
    "The following are multiple choice questions (with answers) about numbers.\n\n"
    "numbers dev 0: which?\nA. cat 0\nB. dog\nC. NA\nD. bird 0\nAnswer: A\n\n"
    "numbers dev 1: which?\nA. cat 1\nB. dog\nC. NA\nD. bird 1\nAnswer: B\n\n"
    "numbers test 3: which?\nA. cat 3\nB. dog\nC. NA\nD. bird 3\nAnswer:"
)
CLOZE = (
    "The following are multiple choice questions (with answers) about numbers.\n\n"
    "numbers dev 0: which?\nAnswer: cat 0\n\nnumbers test 3: which?\nAnswer:"
)


def test_letters_against_a_plain_loop(tiny_model_folder, exam, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    result = evaluate(tiny_model_folder, tmp_path / "out", exam)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    rows = read_rows(tmp_path / "out")
    row = next(row for row in rows if (row["subject"], row["id"]) == ("numbers", "3"))
    expected = [examine(tiny_model_folder, PROMPT, f" {letter}") for letter in "ABCD"]
    assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
    assert row["letter"] == "ABCD"[expected.index(max(expected))] and row["choices"][2] == "NA"
    correct = sum(row["letter"] == row["answer"] for row in rows)
    assert result["accuracy"] == 100 * correct / 20 and result["questions"] == 20 == len(rows)
    assert result["kind"] == "multiple_choice" and result["prompts"]["preset_version"] == 1
    assert result["prompts"]["example"].startswith("The following are") and result["prompts"]["language"] == "en"
    assert result["tokens"]["computed_tokens"] < result["tokens"]["prompt_tokens"]
    assert len(result["benchmark"]["files"]) == 4 and "torch" in result["environment"]
    assert json.loads((tmp_path / "out" / "multiple_choice.json").read_text(encoding="utf-8")) == result
    printed = capsys.readouterr().out
    assert "[all]" in printed and "animals" in printed and next_words(caplog.text)[-1].endswith("multiple_choice.json")


def test_cloze_against_a_plain_loop(tiny_model_folder, exam, tmp_path):
    result = evaluate(tiny_model_folder, tmp_path, exam, mode="cloze", num_fewshot=1, subjects=["numbers"])
    row = read_rows(tmp_path)[3]
    expected = [examine(tiny_model_folder, CLOZE, f" {choice}") for choice in ("cat 3", "dog", "NA", "bird 3")]
    assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
    rates = [value / size for value, size in zip(expected, (5, 3, 2, 6), strict=True)]
    assert row["letter"] == "ABCD"[rates.index(max(rates))]
    assert row["unnormalised"] == "ABCD"[expected.index(max(expected))]
    assert 0 <= result["accuracy_unnormalised"] <= 100 and result["questions"] == 10


@pytest.mark.parametrize("mode", ["generative", "cot"])
def test_written_answers(tiny_model_folder, exam, tmp_path, mode):
    task = {"mode": mode, "num_fewshot": 0, "with_prompt": True, "max_questions": 3}
    result = evaluate(tiny_model_folder, tmp_path / "one", exam, **task)
    rows = read_rows(tmp_path / "one")
    assert result["unparsed"] == sum(row.get("letter") is None for row in rows) and result["errors"] == 0
    assert all("text" in row for row in rows) and len(rows) == 6
    evaluate(tiny_model_folder, tmp_path / "two", exam, batch_size=1, **task)
    assert read_rows(tmp_path / "two") == rows


def test_chat_and_the_forerunners_form_run(tiny_model_folder, exam, tmp_path):
    for number, task in enumerate([{"with_prompt": True}, {"with_prompt": True, "language": "zh", "mode": "cloze"}]):
        result = evaluate(tiny_model_folder, tmp_path / str(number), exam, max_questions=2, **task)
        assert result["prompts"]["example"][0]["role"] == "user" and result["questions"] == 4
    mmlu = tmp_path / "mmlu"
    for split in ("test", "dev"):
        (mmlu / split).mkdir(parents=True)
        (mmlu / split / f"anatomy_{split}.csv").write_text("Where?,here,there,None,NA,D\nWho?,I,you,she,we,A\n")
    task = {"benchmark": "mmlu", "data_dir": str(mmlu), "preset": "a2-2023", "skip_missing": True}
    result = evaluate(tiny_model_folder, tmp_path / "a2", exam, **task)
    assert "about  anatomy" in result["prompts"]["example"] and len(result["benchmark"]["missing_subjects"]) == 56


def test_an_interrupted_run_goes_on(tiny_model_folder, exam, tmp_path, monkeypatch):
    whole = evaluate(tiny_model_folder, tmp_path / "whole", exam)
    add, calls = runs.Parts.add, []

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(runs.Parts, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model_folder, tmp_path / "cut", exam)
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"answers.partial.jsonl"}
    with pytest.raises(InputError, match=r"unfinished run with other .*sha256_of_prompts"):
        evaluate(tiny_model_folder, tmp_path / "cut", exam, num_fewshot=1)
    again = evaluate(tiny_model_folder, tmp_path / "cut", exam)
    assert len(calls) == 8 + 13  # seven answers stood there
    assert again["by_subject"] == whole["by_subject"]
    letters = [[row["letter"] for row in read_rows(tmp_path / name)] for name in ("whole", "cut")]
    assert letters[0] == letters[1]
    with pytest.raises(InputError, match=r"multiple_choice\.json is finished; pass another --output_dir, or --over"):
        evaluate(tiny_model_folder, tmp_path / "cut", exam)


def test_what_fails_is_an_error_and_is_asked_again(tiny_model_folder, exam, tmp_path, monkeypatch):
    score, asked = runs.ModelUnderTest.score, []

    def fails(self, prompts, on_row):
        asked.append(len(prompts))

        def pass_on(number, row):
            on_row(number, {"error": "503"} if len(asked) == 1 and number % 4 == 1 else row)

        score(self, prompts, pass_on)

    monkeypatch.setattr(runs.ModelUnderTest, "score", fails)
    first = evaluate(tiny_model_folder, tmp_path, exam)
    assert first["errors"] == 5 and sum(row.get("error") == "503" for row in read_rows(tmp_path)) == 5
    right = sum(row.get("letter") == row["answer"] for row in read_rows(tmp_path))
    assert first["accuracy"] == pytest.approx(100 * right / 15)
    second = evaluate(tiny_model_folder, tmp_path, exam)
    assert second["errors"] == 0 and asked == [20, 5]
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_ceval_test_gives_a_submission_and_no_accuracy(tiny_model_folder, exam, tmp_path, capsys):
    folder = tmp_path / "data" / "test"
    folder.mkdir(parents=True)
    (folder / "law_test.csv").write_text("id,question,A,B,C,D\n0,法？,一,二,None,四\n1,律？,甲,乙,NA,丁\n")
    task = {"benchmark": "ceval", "data_dir": str(tmp_path), "split": "test", "subjects": ["law"], "num_fewshot": 0}
    result = evaluate(tiny_model_folder, tmp_path / "out", exam, **task)
    submission = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert submission == {"law": {row["id"]: row["letter"] for row in read_rows(tmp_path / "out")}}
    assert "accuracy" not in result and not (tmp_path / "out" / "multiple_choice.png").exists()


def test_scores_on_questions_that_training_data_does_not_hold(tiny_model_folder, tmp_path):
    exam = tmp_path / "long"
    exam.mkdir()
    words = [f"{'abcdefghij'[n]}word" for n in range(10)]
    rows = [" ".join(f"{word}{n}" for word in words) + f"?,one{n},two,three,four,A" for n in range(6)]
    (exam / "all.csv").write_text("question,A,B,C,D,answer\n" + "\n".join(rows) + "\n")
    data = tmp_path / "train.txt"
    data.write_text("nothing here\n" + rows[2].replace(",", "\n") + "\n")
    result = evaluate(tiny_model_folder, tmp_path / "out", exam, num_fewshot=0, decontaminate=[str(data)])
    found = result["contamination"]
    assert (found["contaminated"], found["too_short"], found["clean"]["questions"]) == (1, 0, 5)
    assert found["hits"][0]["where"] == f"{data}:2" and found["hits"][0]["question"].endswith("all.csv:4")
    assert "accuracy" in found["clean"] and result["questions"] == 6


def test_bad_input_is_found_before_the_model_is_loaded(tiny_model_folder, exam, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.generation.loading.load_for_inference", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(InputError, match="pass --base_model, a model folder or hub id, or --server_url"):
        evaluate(None, tmp_path / "out", exam)
    with pytest.raises(InputError, match="--server_url asks a server"):
        evaluate(tiny_model_folder, tmp_path / "out", exam, server_url="http://127.0.0.1:9/v1")
    for split in ("dev", "test"):
        (tmp_path / "cmmlu" / split).mkdir(parents=True)
        text = ",Question,A,B,C,D,Answer\n" + "".join(f"{n},问{n},甲,乙,丙,丁,A\n" for n in range(5))
        (tmp_path / "cmmlu" / split / "agronomy.csv").write_text(text, encoding="utf-8")
    task = {"benchmark": "cmmlu", "data_dir": str(tmp_path / "cmmlu"), "preset": "a2-2023", "skip_missing": True}
    with pytest.raises(InputError, match="--preset a2-2023 adds up two forms of each letter"):
        evaluate(None, tmp_path / "out", exam, server_url="http://127.0.0.1:9/v1", **task)
    with pytest.raises(InputError, match="fewer examples in dev"):
        evaluate(tiny_model_folder, tmp_path / "out", exam, num_fewshot=3)
    with pytest.raises(InputError, match="data not found"):
        evaluate(tiny_model_folder, tmp_path / "out", exam, decontaminate=[str(tmp_path / "none.txt")])
    with pytest.raises(InputError, match="--engine vllm has no --mode cloze"):
        eval_multiple_choice.main(
            InferenceArguments(model_name_or_path=str(tiny_model_folder), engine="vllm"),
            AnswerArguments(),
            EvalArguments(benchmark=str(exam), mode="cloze"),
        )
    guided = {"guidance_scale": 2.0, "negative_prompt": "x"}
    with pytest.raises(InputError, match=r"--guidance_scale leads away .* pass --with_prompt"):
        evaluate(tiny_model_folder, tmp_path / "out", exam, guided, mode="generative")
    with pytest.raises(InputError, match=r"--top_k --guidance_scale --negative_prompt: OpenAI's protocol has no word"):
        task = {"mode": "generative", "with_prompt": True, "server_url": "http://127.0.0.1:9/v1"}
        evaluate(None, tmp_path / "out", exam, guided | {"top_k": 3}, **task)
    with pytest.raises(InputError, match="pass --benchmark"):
        EvalArguments()
    with pytest.raises(InputError, match=r"--num_fewshot -2: .*\n--batch_size 0: need at least 1"):
        EvalArguments(benchmark="ceval", num_fewshot=-2, batch_size=0)
    assert not (tmp_path / "out").exists()


def test_written_answers_are_guided_and_flags_without_effect_are_said(tiny_model_folder, exam, tmp_path, caplog):
    task = {"mode": "generative", "with_prompt": True, "num_fewshot": 0, "max_questions": 3}
    guided = {"guidance_scale": 4.0, "negative_prompt": "Be rude."}
    evaluate(tiny_model_folder, tmp_path / "plain", exam, **task)
    evaluate(tiny_model_folder, tmp_path / "guided", exam, guided, **task)
    plain, led = ([row["text"] for row in read_rows(tmp_path / name)] for name in ("plain", "guided"))
    assert plain != led and len(led) == 6
    evaluate(tiny_model_folder, tmp_path / "scored", exam, {"temperature": 0.7}, max_questions=1)
    assert "--mode constrained writes no answers: no effect of --max_new_tokens, --temperature" in caplog.text


@pytest.mark.slow
def test_launcher_and_a_kill(tiny_model_folder, exam, tmp_path):
    """Killed as soon as the first answers stand there, then run again."""
    import time

    environment = {**os.environ, "PYTHON": sys.executable, "MODEL": str(tiny_model_folder), "SHOTS": "2"}
    environment |= {"BENCHMARK": str(exam), "OUT": str(tmp_path / "my out")}
    command = ["bash", str(SCRIPTS / "run_eval_multiple_choice.sh"), "--mode", "generative", "--max_new_tokens", "60"]
    command += ["--batch_size", "1"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    parts = tmp_path / "my out" / "answers.partial.jsonl"
    while process.poll() is None and not (parts.is_file() and len(parts.read_bytes().splitlines()) > 3):
        time.sleep(0.01)
    process.kill()
    process.wait()
    cut = shutil.copy(parts, tmp_path / "cut.jsonl") if parts.is_file() else None
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "[all]" in result.stdout and cut is not None and "going on after" in result.stderr
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "is finished" in result.stderr and "Traceback" not in result.stderr
