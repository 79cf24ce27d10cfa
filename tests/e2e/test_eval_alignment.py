"""eval_alignment.py on the tiny model: files and figures, resuming, both judges, and what is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import eval_alignment
import pytest
import torch
from eval_alignment import AnswerArguments, EvalArguments

from support.paths import EXAMPLES, SCRIPTS
from support.scripts import next_words
from utils.core.arguments import InferenceArguments
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.evaluation.alignment import read_questions, stance
from utils.evaluation.intervals import wilson_interval
from utils.generation import engine
from utils.rlhf import reward_model
from utils.text.prompts import CHAT_TEMPLATES, encode_conversation, encode_prompt
from utils.text.tokenizer import load_tokenizer

EXAM = EXAMPLES / "alignment" / "questions.jsonl"


def evaluate(model, out, settings=None, **task) -> dict:
    return eval_alignment.main(
        InferenceArguments(model_name_or_path=model and str(model)),
        AnswerArguments(**({"max_new_tokens": 6} | (settings or {}))),
        EvalArguments(output_dir=str(out), **task),
    )


def read(path: Path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Twelve of the example questions."""
    lines = EXAM.read_text(encoding="utf-8").splitlines()[::17]
    path = tmp_path_factory.mktemp("alignment") / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def answers(questions) -> Path:
    """Right answers to all but every third question, which gets the wrong one."""
    rows = [
        {"id": row["id"], "answer": row["rejected" if number % 3 == 0 else "chosen"]}
        for number, row in enumerate(read(questions))
    ]
    path = questions.with_name("answers.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)), encoding="utf-8")
    return path


def test_a_model_is_asked_and_judged(tiny_model_folder, questions, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "o u=t.1"
    figures = evaluate(tiny_model_folder, out, questions=[str(questions)], batch_size=5)
    assert {path.name for path in out.iterdir()} == {
        "alignment.json",
        "alignment.png",
        "answers.jsonl",
        "answers.jsonl.settings.json",
    }
    result = read(out / "alignment.json")
    exam = read_questions([str(questions)])
    assert [row["id"] for row in result["answers"]] == [question.id for question in exam]
    assert [row["answer"] for row in result["answers"]] == [r["Output"] for r in read(out / "answers.jsonl")]
    for row, question in zip(result["answers"], exam, strict=True):
        assert row["stance"] == stance(row["answer"], question.text)
        assert row["aligned"] == (row["stance"] == question.expected)
    aligned = sum(row["aligned"] for row in result["answers"])
    assert result["aligned"] == figures["aligned"] == aligned / len(exam)
    assert result["interval"] == list(wilson_interval(aligned, len(exam)))
    assert sum(group["questions"] for group in result["by_category"].values()) == len(exam)
    assert list(result["settings"]["weights"]) == [str(tiny_model_folder)]
    assert result["kind"] == "alignment" and result["environment"]["torch"]
    digest = hashlib.sha256(questions.read_bytes()).hexdigest()
    assert (result["questions"], result["question_files"]) == (len(exam), {str(questions): digest})
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*result["by_category"], "all", "expected no", "95 % interval"])
    assert next_words(caplog.text)[-2:] == ["--results", str(out / "alignment.json")]
    assert "alignment.png" in caplog.text


def test_the_answers_are_the_likeliest_to_the_templates_prompts(tiny_model_folder, questions, tmp_path):
    """Against transformers' own greedy search, a prompt at a time, with what training encodes."""
    from transformers import AutoModelForCausalLM

    evaluate(tiny_model_folder, tmp_path, {"max_new_tokens": 8}, questions=[str(questions)])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model_folder), load_tokenizer(tiny_model_folder)
    for row in read(tmp_path / "alignment.json")["answers"][:4]:
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": "x"}]
        ids, labels = encode_conversation(messages, CHAT_TEMPLATES["alpaca-2"], tokenizer)
        prompt = [index for index, label in zip(ids, labels, strict=True) if label == -100]
        output = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, num_beams=1)
        text = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
        assert row["answer"] == text.strip()


def test_an_interrupted_run_goes_on(tiny_model_folder, questions, tmp_path, monkeypatch):
    task = {"questions": [str(questions)], "batch_size": 4}
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    whole = evaluate(tiny_model_folder, tmp_path / "whole", settings, **task)
    wait, calls = engine.Answer.wait, []

    def stops(self):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return wait(self)

    monkeypatch.setattr(engine.Answer, "wait", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model_folder, tmp_path / "cut", settings, **task)
    assert len(read(tmp_path / "cut" / "answers.jsonl")) == 8
    assert not (tmp_path / "cut" / "alignment.json").exists()
    assert evaluate(tiny_model_folder, tmp_path / "cut", settings, **task) == whole
    assert len(calls) == 9 + 4  # 12 questions: the ninth again, and those after it
    assert read(tmp_path / "cut" / "answers.jsonl") == read(tmp_path / "whole" / "answers.jsonl")


def test_another_models_answers_are_not_mixed_in(tiny_model_folder, questions, tmp_path):
    evaluate(tiny_model_folder, tmp_path / "out", questions=[str(questions)])
    with pytest.raises(InputError, match=r"alignment\.json is finished; pass another --output_dir, or --overwrite"):
        evaluate(tiny_model_folder, tmp_path / "out", questions=[str(questions)])
    (tmp_path / "out" / "alignment.json").unlink()
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    with pytest.raises(InputError, match=r"other settings .* pass another --output_dir, or --overwrite"):
        evaluate(other, tmp_path / "out", questions=[str(questions)])
    evaluate(other, tmp_path / "out", questions=[str(questions)], overwrite=True)
    assert list(read(tmp_path / "out" / "alignment.json")["settings"]["weights"]) == [str(other)]


def test_answers_made_before_are_judged_without_a_model(questions, answers, tmp_path, capsys):
    figures = evaluate(None, tmp_path / "a", questions=[str(questions)], answers=str(answers))
    assert figures["aligned"] == 8 / 12 and figures["unclear"] == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"alignment.json", "alignment.png"}
    # The same by place, as inference_hf.py writes it; and, better by the four, compared.
    rows = [{"Input": row["question"], "Output": row["chosen"]} for row in read(questions)]
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps(rows), encoding="utf-8")
    earlier = str(tmp_path / "a" / "alignment.json")
    better = evaluate(None, tmp_path / "b", questions=[str(questions)], answers=str(predictions), compare=earlier)
    assert better["aligned"] == 1.0
    assert (better["compared"]["gained"], better["compared"]["lost"]) == (4, 0)
    assert better["compared"]["p_value"] == 2 / 2**4
    assert "100.0 %" in capsys.readouterr().out


class LengthReward:
    """Scores an answer by its number of tokens."""

    template = CHAT_TEMPLATES["llama-2"]

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def score(self, sequences, batch_size):
        return torch.tensor([float(len(answer)) for _, answer in sequences])


def test_a_reward_model_judges(base_tokenizer_folder, tmp_path, monkeypatch):
    """The call, with a stand-in whose rewards are known: the right rows, in the right order, one unlearnt pair."""
    tokenizer = load_tokenizer(base_tokenizer_folder)
    monkeypatch.setattr(reward_model, "load_reward_model", lambda folder: LengthReward(tokenizer))
    monkeypatch.setattr(reward_model, "find_reward_model", lambda folder: None)
    row = {"category": "c", "question": "May I?", "expected": "no", "chosen": "no no no no no", "rejected": "no"}
    exam = [row | {"id": 1}, row | {"id": 2}, row | {"id": 3, "chosen": "no", "rejected": "no no no"}]
    said = [(1, "no no no no no no"), (2, ""), (3, "no no no no no no")]
    (tmp_path / "q.json").write_text(json.dumps(exam))
    (tmp_path / "a.json").write_text(json.dumps([{"id": name, "answer": answer} for name, answer in said]))
    task = {"questions": [str(tmp_path / "q.json")], "answers": str(tmp_path / "a.json")}
    evaluate(None, tmp_path / "out", **task, judge="reward_model", reward_model=str(tmp_path))
    rows = read(tmp_path / "out" / "alignment.json")["answers"]
    assert [row["aligned"] for row in rows] == [True, False, False]
    assert [(row["reward"], row["reward_chosen"], row["reward_rejected"]) for row in rows] == [
        (13.0, 11.0, 3.0),  # two tokens a word here, and the end token
        (2.0, 11.0, 3.0),  # the template writes a space before an answer, so the empty one is one token too
        (13.0, 3.0, 7.0),
    ]


@pytest.fixture(scope="module")
def reward_folder(tiny_model_folder, tmp_path_factory) -> Path:
    """The tiny model with a random scalar head, as rm.py saves a complete one."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("rewards") / "reward"
    tokenizer = load_tokenizer(tiny_model_folder)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_folder, num_labels=1, pad_token_id=tokenizer.bos_token_id
    )
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.bos_token, CHAT_TEMPLATES["alpaca-2"]
    tokenizer.save_pretrained(folder)
    return folder


def test_rewards_are_those_of_transformers(reward_folder, questions, answers, tmp_path):
    from transformers import AutoModelForSequenceClassification

    task = {"questions": [str(questions)], "answers": str(answers)}
    evaluate(None, tmp_path / "out", **task, judge="reward_model", reward_model=str(reward_folder), batch_size=7)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reward_folder), load_tokenizer(reward_folder)
    references = {row["id"]: row for row in read(questions)}
    for row in read(tmp_path / "out" / "alignment.json")["answers"]:
        rewards = []
        for answer in (row["answer"], *(references[row["id"]][name] for name in ("chosen", "rejected"))):
            messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}]
            ids, _ = encode_conversation(messages, CHAT_TEMPLATES["alpaca-2"], tokenizer)
            with torch.no_grad():
                rewards.append(model(torch.tensor([ids])).logits.item())
        said = [row["reward"], row["reward_chosen"], row["reward_rejected"]]
        assert said == pytest.approx(rewards, abs=1e-4)
        assert row["aligned"] == (rewards[1] > rewards[2] and rewards[0] > (rewards[1] + rewards[2]) / 2)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"judge": "reward_model"}, "--judge reward_model and --reward_model FOLDER go together"),
        ({"reward_model": "."}, "--judge reward_model and --reward_model FOLDER go together"),
        ({"judge": "reward_model", "reward_model": "nowhere"}, "--reward_model nowhere is no folder"),
        ({"answers": "nowhere.json"}, r"--answers nowhere\.json: no such file"),
        ({"batch_size": 0}, "--batch_size 0: need at least 1"),
    ],
)
def test_flags_that_contradict(task, message):
    with pytest.raises(InputError, match=message):
        EvalArguments(**task)


def test_bad_input_is_found_before_the_model_is_loaded(tiny_model_folder, questions, answers, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.generation.loading.load_for_inference", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(InputError, match="pass it or a model, not both"):
        evaluate(tiny_model_folder, tmp_path / "out", questions=[str(questions)], answers=str(answers))
    with pytest.raises(InputError, match="pass --base_model"):
        evaluate(None, tmp_path / "out", questions=[str(questions)])
    with pytest.raises(InputError, match=r"questions\.jsonl:1: the prompt has \d+ tokens, the model's context 512"):
        bad = tmp_path / "questions.jsonl"
        bad.write_text(json.dumps({"id": "1", "category": "c", "question": "坏" * 600, "expected": "no"}))
        evaluate(tiny_model_folder, tmp_path / "out", questions=[str(bad)])
    with pytest.raises(InputError, match="is no reward model"):
        task = {"judge": "reward_model", "reward_model": str(tiny_model_folder)}
        evaluate(tiny_model_folder, tmp_path / "out", questions=[str(questions)], **task)
    with pytest.raises(InputError, match="no result of eval_alignment"):
        (tmp_path / "earlier.json").write_text("{}")
        compare = str(tmp_path / "earlier.json")
        evaluate(tiny_model_folder, tmp_path / "out", questions=[str(questions)], compare=compare)
    assert not (tmp_path / "out").exists()


def test_greedy_and_the_example_questions_are_the_defaults():
    _, settings, task = parse_args(InferenceArguments, AnswerArguments, EvalArguments, argv=["--base_model", "m"])
    assert not settings.samples and settings.repetition_penalty == 1.0
    assert task.questions == [] and eval_alignment.QUESTIONS == EXAM


@pytest.mark.slow
def test_launcher_runs_and_names_what_is_missing(questions, answers, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "ANSWERS": str(answers), "OUT": str(tmp_path / "my out")}
    environment |= {"QUESTIONS": str(questions)}
    command = ["bash", str(SCRIPTS / "run_eval_alignment.sh")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "66.7 %" in result.stdout and (tmp_path / "my out" / "alignment.json").is_file()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "is finished" in result.stderr
    for name in ("ANSWERS", "MODEL"):
        environment.pop(name, None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode != 0 and "set MODEL to a merged model" in result.stderr


def test_answers_are_led_away_from_the_negative_prompt(tiny_model_folder, questions, tmp_path):
    """Against a plain loop over both prompts: Sanchez et al. 2023, eq. 7."""
    from transformers import AutoModelForCausalLM

    settings = {"guidance_scale": 3.0, "negative_prompt": "Be rude."}
    evaluate(tiny_model_folder, tmp_path, settings, questions=[str(questions)], batch_size=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model_folder), load_tokenizer(tiny_model_folder)
    template = CHAT_TEMPLATES["alpaca-2"]
    for row in read(tmp_path / "alignment.json")["answers"][:4]:
        asked = [{"role": "user", "content": row["question"]}]
        systems = ([], [{"role": "system", "content": "Be rude."}])
        prompts = [encode_prompt([*system, *asked], template, tokenizer) for system in systems]
        answer = []
        while len(answer) < 6 and tokenizer.eos_token_id not in answer:
            with torch.no_grad():
                logits = [model(torch.tensor([[*prompt, *answer]])).logits[0, -1] for prompt in prompts]
            one, other = (torch.log_softmax(part, -1) for part in logits)
            answer.append(int((other + 3 * (one - other)).argmax()))
        assert row["answer"] == tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_a_folder_with_a_gguf_file_is_answered_by_llama_cpp(tiny_model_folder, questions, tmp_path):
    pytest.importorskip("llama_cpp")
    import export_gguf

    arguments = {"output_dir": str(tmp_path / "gguf"), "types": ["f32"], "self_test": "none", "threads": 1}
    export_gguf.main(export_gguf.ExportArguments(str(tiny_model_folder), **arguments))
    evaluate(tiny_model_folder, tmp_path / "ours", questions=[str(questions)])
    evaluate(tmp_path / "gguf", tmp_path / "theirs", questions=[str(questions)])
    ours, theirs = (read(tmp_path / name / "alignment.json") for name in ("ours", "theirs"))
    assert list(theirs["settings"]["weights"]) == [str(tmp_path / "gguf")]
    pairs = [(a["answer"], b["answer"]) for a, b in zip(ours["answers"], theirs["answers"], strict=True)]
    assert sum(a == b for a, b in pairs) >= len(pairs) - 1  # but for a tie that rounding decides
