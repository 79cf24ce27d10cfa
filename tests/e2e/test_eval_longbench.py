"""eval_longbench.py on the tiny model: files and figures, the answers themselves, going on, and what is refused."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import eval_longbench
import pytest
import torch
from eval_longbench import AnswerArguments, EvalArguments

from support.paths import EXAMPLES, SCRIPTS
from support.scripts import next_words
from utils.core.arguments import InferenceArguments
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.core.files import hash_file
from utils.evaluation.longbench.metrics import score_answer
from utils.evaluation.longbench.tasks import TASKS
from utils.generation import engine
from utils.text.prompts import CHAT_TEMPLATES, encode_prompt
from utils.text.tokenizer import load_tokenizer

WINDOW = 1024
SOME = ["dureader", "hotpotqa", "passage_retrieval_en", "samsum", "trec", "lcc"]
ROW = {"answers", "all_classes", "length", "pred"}


@pytest.fixture(scope="module")
def model_folder(tiny_model_folder, tmp_path_factory) -> Path:
    """The tiny model with a window that LongBench's instructions fit into."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("longbench") / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": WINDOW}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """All of LongBench's files in their published layout, four samples each; some contexts exceed the window."""
    folder = tmp_path_factory.mktemp("longbench_data")
    texts = {
        language: (EXAMPLES / "pretrain" / f"{language}_heldout.txt").read_text(encoding="utf-8").splitlines()
        for language in ("en", "zh")
    }
    right = {"retrieval": "Paragraph 3", "retrieval_zh": "段落3", "count": "3", "classification": "Human"}
    for task in TASKS.values():
        lines = texts["zh" if task.language == "zh" else "en"]
        for suffix in ["", "_e"][: 1 + task.in_e]:
            rows = [
                {
                    "input": f"What of {number}? ",
                    "context": " ".join(lines[number * 20 :][: 1 + 9 * number]),
                    "answers": [right.get(task.metric, lines[number]), right.get(task.metric, "the")],
                    "length": (100, 4000, 7999, 8000)[number],
                    "dataset": task.name + suffix,
                    "language": task.language,
                    "all_classes": ["Human", "Date"] if task.metric == "classification" else None,
                    "_id": f"{number:032x}",
                }
                for number in range(4)
            ]
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{task.name}{suffix}.jsonl").write_text(content, encoding="utf-8")
    return folder


def evaluate(model, data, out, settings=None, model_settings=None, **task) -> dict:
    return eval_longbench.main(
        InferenceArguments(model_name_or_path=model and str(model), **(model_settings or {})),
        AnswerArguments(**({"max_new_tokens": 8} | (settings or {}))),
        EvalArguments(
            **({"data_dir": str(data), "output_dir": str(out), "predict_on": ",".join(SOME), "max_samples": 2} | task)
        ),
    )


def read(path: Path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]


def answers(out: Path, folder="pred"):
    return {path.stem: read(path) for path in sorted((out / folder).glob("*.jsonl"))}


@pytest.mark.slow
def test_all_of_longbench(model_folder, data, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    result = evaluate(model_folder, data, tmp_path, predict_on="zh,en,code")
    assert result == read(tmp_path / "longbench.json") and result["kind"] == "longbench"
    assert {path.name for path in tmp_path.iterdir()} == {"longbench.json", "longbench.png", "pred"}
    files = {path.name for path in (tmp_path / "pred").iterdir()}
    assert files == {f"{name}.jsonl{end}" for name in TASKS for end in ("", ".settings.json")}
    for name, rows in answers(tmp_path).items():
        assert all(set(row) == ROW for row in rows)
        published = read(data / f"{name}.jsonl")[::2]
        kept = [{field: row[field] for field in ROW - {"pred"}} for row in rows]
        assert kept == [{field: row[field] for field in ROW - {"pred"}} for row in published]
        scores = [score_answer(TASKS[name], row["pred"], row["answers"], row["all_classes"]) for row in rows]
        assert result["datasets"][name]["score"] == pytest.approx(100 * sum(scores) / 2)
        assert result["data"][name]["sha256"] == hash_file(data / f"{name}.jsonl")
    assert list(result["averages"]) == ["zh", "en", "all"]
    groups = {g: f["score"] for g, f in result["averages"]["zh"]["groups"].items()}
    assert list(groups) == ["single-doc QA", "multi-doc QA", "summarization", "few-shot", "code", "synthetic"]
    code = [result["datasets"][name]["score"] for name in ("lcc", "repobench-p")]
    assert groups["code"] == pytest.approx(sum(code) / 2)
    assert result["averages"]["zh"]["score"] == pytest.approx(sum(groups.values()) / 6)
    (model,) = result["models"].values()
    assert list(model["weights"]) == [str(model_folder)] and model["max_length"] == WINDOW
    assert result["environment"]["jieba"] == "0.42.1"
    cut = sum(found["prompts_cut"] for found in result["data"].values())
    assert 0 < cut < 42 and f"{cut} prompts were longer than --max_length" in caplog.text
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*TASKS, *groups, "95 % interval", "average"])
    assert "over 6 of 6 groups, 21 datasets, 42 answers" in caplog.text and next_words(caplog.text)[-2] == "--results"


def test_the_answers_are_the_likeliest_to_prompts_that_fit(model_folder, data, tmp_path):
    """Against transformers' own greedy search, a prompt at a time, cut as upstream's code cuts."""
    from transformers import AutoModelForCausalLM

    longest = 640
    evaluate(
        model_folder, data, tmp_path, {"max_new_tokens": 12}, {"dtype": "float32"},
        max_length=longest, max_samples=None, batch_size=3,
    )  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), load_tokenizer(model_folder)
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    cut = 0
    for name, rows in answers(tmp_path).items():
        task = TASKS[name]
        for sample, row in zip(read(data / f"{name}.jsonl"), rows, strict=True):
            text = task.prompt.format(**sample)
            if name in ("trec", "samsum", "lcc"):
                ids = tokenizer(text).input_ids
            else:
                ids = encode_prompt([{"role": "user", "content": text}], CHAT_TEMPLATES["alpaca-2"], tokenizer)
            if len(ids) > longest - 12:
                cut += 1
                if name not in ("trec", "samsum", "lcc"):
                    continue  # see tests/unit/evaluation/longbench/test_prompts.py
                half = (longest - 12) // 2
                ids = ids[:half] + ids[-half:]
            ends = [tokenizer.eos_token_id] + [newline] * (name == "samsum")
            output = model.generate(
                torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=ends,
                min_new_tokens=int(name == "samsum") or None,
            )  # fmt: skip
            said = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
            assert row["pred"].strip() == said.strip(), name
            assert len(row["pred"]) >= len(said.strip()) and (name == "samsum") <= ("\n" not in row["pred"])
    assert cut > 6


def test_longbench_e(model_folder, data, tmp_path, capsys):
    result = evaluate(model_folder, data, tmp_path, predict_on="code,hotpotqa", e=True, max_samples=None)
    assert {path.name for path in tmp_path.iterdir()} == {"longbench_e.json", "longbench_e.png", "pred_e"}
    assert list(result["datasets"]) == ["hotpotqa", "lcc", "repobench-p"]
    scores = [
        100 * score_answer(TASKS["lcc"], row["pred"], row["answers"], None)
        for row in answers(tmp_path, "pred_e")["lcc"]
    ]
    buckets = result["datasets"]["lcc"]["buckets"]
    assert {name: part["score"] for name, part in buckets.items()} == pytest.approx(
        {"0-4k": scores[0], "4-8k": (scores[1] + scores[2]) / 2, "8k+": scores[3]}
    )
    assert list(result["averages"]) == ["en", "all"]
    assert "en 4-8k" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_goes_on(model_folder, data, tmp_path, monkeypatch):
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    whole = evaluate(model_folder, data, tmp_path / "whole", settings, batch_size=2)
    wait, calls = engine.Answer.wait, []

    def stops(self):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return wait(self)

    monkeypatch.setattr(engine.Answer, "wait", stops)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_folder, data, cut, settings, batch_size=3)
    assert sum(map(len, answers(cut).values())) == 5 and not (cut / "longbench.json").exists()
    with open(cut / "pred" / "samsum.jsonl", "ab") as file:
        file.write(b'{"pred": "what was being wri')
    again = evaluate(model_folder, data, cut, settings, batch_size=3)
    assert len(calls) == 6 + 7  # twelve answers: the sixth again, and those after it
    assert answers(cut) == answers(tmp_path / "whole")
    assert {name: again[name] for name in ("datasets", "averages", "data")} == {
        name: whole[name] for name in ("datasets", "averages", "data")
    }


def test_datasets_may_be_added(model_folder, data, tmp_path, monkeypatch):
    first = evaluate(model_folder, data, tmp_path, predict_on="lcc")
    before = answers(tmp_path)["lcc"]
    with pytest.raises(InputError, match=r"longbench\.json is finished; pass another --output_dir, or --overwrite"):
        evaluate(model_folder, data, tmp_path, predict_on="lcc")
    with pytest.raises(InputError, match=r"longbench\.json has lcc too; name them in --predict_on to add to it"):
        evaluate(model_folder, data, tmp_path, predict_on="hotpotqa")
    wait, asked = engine.Answer.wait, []
    monkeypatch.setattr(engine.Answer, "wait", lambda self: asked.append(1) or wait(self))
    both = evaluate(model_folder, data, tmp_path, predict_on="lcc,hotpotqa")
    assert both["datasets"]["lcc"] == first["datasets"]["lcc"] and both["data"]["lcc"] == first["data"]["lcc"]
    assert len(asked) == 2 and answers(tmp_path)["lcc"] == before


def test_overwriting_begins_anew_once(model_folder, data, tmp_path, monkeypatch):
    evaluate(model_folder, data, tmp_path, {"max_new_tokens": 4}, predict_on="lcc,hotpotqa")
    wait, calls = engine.Answer.wait, []

    def stops(self):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return wait(self)

    monkeypatch.setattr(engine.Answer, "wait", stops)
    for rounds in (1, 2):
        task = {"predict_on": "lcc,hotpotqa", "overwrite": True, "batch_size": 1}
        if rounds == 1:
            with pytest.raises(KeyboardInterrupt):
                evaluate(model_folder, data, tmp_path, **task)
            assert not (tmp_path / "longbench.json").exists()
        else:
            evaluate(model_folder, data, tmp_path, **task)
    assert len(calls) == 4 + 1  # of four answers three were there, hotpotqa's two finished


def test_another_models_answers_are_not_mixed_in(model_folder, data, tmp_path):
    evaluate(model_folder, data, tmp_path / "out", predict_on="lcc")
    (tmp_path / "out" / "longbench.json").unlink()
    other = shutil.copytree(model_folder, tmp_path / "other")
    for settings in ({}, {"max_length": 900}, {"with_inst": "true"}):
        model = model_folder if settings else other
        with pytest.raises(
            InputError, match=r"lcc\.jsonl was written with other settings .* pass another --output_dir"
        ):
            evaluate(model, data, tmp_path / "out", predict_on="lcc", **settings)
    changed = Path(shutil.copytree(data, tmp_path / "data"))
    content = (changed / "lcc.jsonl").read_text(encoding="utf-8")
    (changed / "lcc.jsonl").write_text(content.replace("What of", "What about"), encoding="utf-8")
    with pytest.raises(InputError, match=r"other settings \(data "):
        evaluate(model_folder, changed, tmp_path / "out", predict_on="lcc")
    evaluate(other, data, tmp_path / "out", predict_on="lcc,hotpotqa", overwrite=True)
    (model,) = read(tmp_path / "out" / "longbench.json")["models"].values()
    assert list(model["weights"]) == [str(other)]


@pytest.mark.slow
def test_answers_that_are_there_are_scored_without_a_model(model_folder, data, tmp_path, capsys):
    made = evaluate(model_folder, data, tmp_path)
    with pytest.raises(InputError, match="is finished"):
        evaluate(None, data, tmp_path)
    scored = evaluate(None, "nowhere", tmp_path, overwrite=True)
    assert (scored["datasets"], scored["averages"]) == (made["datasets"], made["averages"])
    assert {name: found["sha256"] for name, found in scored["data"].items()} == {
        name: found["sha256"] for name, found in made["data"].items()
    }
    (model,) = scored["models"].values()
    assert list(model["weights"]) == [str(model_folder)]
    # As the forerunner's pred_llama2.py leaves them, scored with its eval.py's flags.
    theirs = tmp_path / "theirs"
    (theirs / "pred").mkdir(parents=True)
    shutil.copy(tmp_path / "pred" / "hotpotqa.jsonl", theirs / "pred")
    argv = ["--output_dir", str(theirs)]
    capsys.readouterr()
    result = eval_longbench.main(*parse_args(InferenceArguments, AnswerArguments, EvalArguments, argv=argv))
    assert result["datasets"] == {"hotpotqa": made["datasets"]["hotpotqa"]}
    assert capsys.readouterr().out.count("hotpotqa") == 1
    with pytest.raises(InputError, match=r"no answers in .*pred_e; pass --base_model"):
        eval_longbench.main(*parse_args(InferenceArguments, AnswerArguments, EvalArguments, argv=[*argv, "--e"]))


def test_forerunners_command_lines(caplog):
    argv = (
        "--model_path m --predict_on zh,en,code --output_dir out --gpus 0 --max_length 4096 --with_inst auto "
        "--load_in_4bit --alpha auto --use_ntk --use_flash_attention_2 --e"
    )
    types = (InferenceArguments, AnswerArguments, EvalArguments)
    model, settings, task = parse_args(*types, argv=argv.split())
    assert (model.model_name_or_path, model.gpus, model.load_in_kbits) == ("m", "0", 4)
    assert (model.rope_scaling, model.attn_implementation) == ("auto-ntk", "flash_attention_2")
    assert (task.predict_on, task.output_dir, task.max_length, task.with_inst, task.e) == (
        "zh,en,code", "out", 4096, "auto", True
    )  # fmt: skip
    assert not settings.samples and settings.repetition_penalty == 1.0 and settings.max_new_tokens == 512
    assert caplog.text.count("old flags accepted") == 1


REFUSED = {
    "datasets": ({"predict_on": "zh,squad"}, "--predict_on squad: need some of zh, en, code, or datasets"),
    "no dataset": ({"predict_on": " , "}, "--predict_on: need zh, en, code or names"),
    "chinese e": ({"predict_on": "zh", "e": True}, "LongBench-E has nothing of --predict_on zh"),
    "length": ({"max_length": 1}, "--max_length 1: need at least 2"),
    "window": ({"max_length": WINDOW + 1}, "the model's window has 1024 tokens; pass less, or lengthen"),
    "narrow": ({"max_length": 100}, r"hotpotqa\.jsonl:1: the prompt has \d+ tokens without its context, its answer"),
    "samples": ({"max_samples": 0}, "--max_samples 0: need at least 1"),
    "batch": ({"batch_size": 0}, "--batch_size 0: need at least 1"),
    "files": ({"data_dir": str(EXAMPLES)}, r"no hotpotqa\.jsonl, dureader\.jsonl, .*; put them there, or pass"),
    "folder": ({"data_dir": "nowhere"}, "--data_dir nowhere is no folder; download"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named_before_the_model_is_loaded(case, model_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "utils.generation.loading.load_for_inference", lambda *args: pytest.fail("the weights were read")
    )
    task, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        evaluate(model_folder, data, tmp_path / "out", **task)
    assert not (tmp_path / "out").exists()


def test_ways_of_answering_that_longbench_has_not():
    for settings in ({"num_beams": 2}, {"guidance_scale": 2.0, "negative_prompt": "x"}):
        with pytest.raises(InputError, match=r"answered without (beams|guidance)"):
            AnswerArguments(**settings)


@pytest.mark.slow
def test_a_longer_window_takes_longer_prompts(model_folder, data, tmp_path):
    rope = {"rope_scaling": "auto-ntk", "rope_factor": 4.0}
    result = evaluate(model_folder, data, tmp_path / "a", model_settings=rope, predict_on="lcc", max_samples=None)
    (model,) = result["models"].values()
    assert model["max_length"] == 4 * WINDOW
    plain = evaluate(model_folder, data, tmp_path / "b", predict_on="lcc", max_samples=None)
    assert result["data"]["lcc"]["tokens_cut"] < plain["data"]["lcc"]["tokens_cut"]


def test_the_launcher_passes_everything_on(model_folder, tmp_path):
    environment = {
        **os.environ, "DRY_RUN": "1", "MODEL": str(model_folder), "DATA": str(tmp_path / "my data"), "LORA": "adapter",
        "OUT": str(tmp_path / "my out"), "TASKS": "zh,lcc", "MAX_LENGTH": "900",
    }  # fmt: skip
    command = ["bash", str(SCRIPTS / "run_eval_longbench.sh"), "--e", "--batch_size", "2"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    types = (InferenceArguments, AnswerArguments, EvalArguments)
    model, _, args = parse_args(*types, argv=shlex.split(printed)[2:])
    assert (model.model_name_or_path, model.adapter_name_or_path) == (str(model_folder), "adapter")
    assert (args.data_dir, args.output_dir) == (str(tmp_path / "my data"), str(tmp_path / "my out"))
    assert (args.predict_on, args.max_length, args.e, args.batch_size) == ("zh,lcc", 900, True, 2)


@pytest.mark.slow
def test_a_gguf_file_answers_as_its_model(model_folder, data, tmp_path):
    pytest.importorskip("llama_cpp")
    import export_gguf

    out = tmp_path / "gguf"
    export_gguf.main(
        export_gguf.ExportArguments(str(model_folder), output_dir=str(out), types=["f32"], self_test="none", threads=1)
    )
    (file,) = out.glob("*.gguf")
    ours = evaluate(model_folder, data, tmp_path / "a", model_settings={"dtype": "float32"})
    theirs = evaluate(file, data, tmp_path / "b", model_settings={"engine": "llama.cpp"})
    (model,) = theirs["models"].values()
    assert model["weights"] == {str(file): hash_file(file)} and model["max_length"] == WINDOW
    pairs = [
        (row["pred"], other["pred"])
        for name, rows in answers(tmp_path / "a").items()
        for row, other in zip(rows, answers(tmp_path / "b")[name], strict=True)
    ]
    assert sum(one == other for one, other in pairs) >= len(pairs) - 1  # but for a tie that rounding decides
    assert ours["data"] == theirs["data"]


@pytest.mark.slow
def test_a_killed_run_goes_on(model_folder, data, tmp_path):
    command = [sys.executable, str(SCRIPTS / "eval_longbench.py"), "--base_model", str(model_folder)]
    command += ["--data_dir", str(data), "--max_new_tokens", "24", "--batch_size", "1"]
    whole = subprocess.run([*command, "--output_dir", str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    cut, kills = tmp_path / "cut", 0
    for wanted in (3, 30, 70):
        process = subprocess.Popen([*command, "--output_dir", str(cut)], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if sum(path.read_bytes().count(b"\n") for path in cut.glob("pred/*.jsonl")) >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.communicate()
    assert kills == 3 and not (cut / "longbench.json").exists()
    subprocess.run([*command, "--output_dir", str(cut)], capture_output=True, check=True)
    assert answers(cut) == answers(tmp_path / "whole")
    results = [read(folder / "longbench.json") for folder in (cut, tmp_path / "whole")]
    assert results[0]["datasets"] == results[1]["datasets"] and results[0]["data"] == results[1]["data"]


@pytest.mark.slow
@pytest.mark.parametrize("e", [False, True])
def test_longbenchs_own_program_gives_the_same_figures(model_folder, data, tmp_path, e):
    """Its eval.py on our files: the mean of every dataset, and of LongBench-E's lengths."""
    source = os.environ.get("LONGBENCH_SOURCE")
    if source is None:
        pytest.skip("LONGBENCH_SOURCE, a folder with THUDM/LongBench's source, is not set")
    python = os.environ.get("LONGBENCH_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import fuzzywuzzy, rouge, jieba, numpy"], capture_output=True).returncode:
        pytest.skip(f"{python} lacks LongBench's packages; set LONGBENCH_PYTHON")
    program = next(p for p in sorted(Path(source).rglob("eval.py")) if (p.parent / "metrics.py").exists())
    result = evaluate(
        model_folder, data, tmp_path / "out", {"max_new_tokens": 64}, predict_on="zh,en,code", max_samples=None, e=e
    )
    folder = "pred_e" if e else "pred"
    (tmp_path / folder).mkdir()
    (tmp_path / "out" / folder).rename(tmp_path / folder / "m")
    command = [python, "-W", "ignore", str(program), "--model", "m", *["--e"] * e]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    official = read(tmp_path / folder / "m" / "result.json")
    code = "score" if python_lacks_levenshtein(python) else "score_levenshtein"
    for name, found in result["datasets"].items():
        if e:
            ours = {bucket: round(part["score"], 2) for bucket, part in found["buckets"].items()}
            assert name in ("lcc", "repobench-p") or ours == pytest.approx(official[name], abs=0.0051)
        else:
            score = found[code] if TASKS[name].language == "code" else found["score"]
            assert score == pytest.approx(official[name], abs=0.0051), name
    assert official.keys() == result["datasets"].keys()


def python_lacks_levenshtein(python) -> bool:
    return subprocess.run([python, "-c", "import Levenshtein"], capture_output=True).returncode != 0
