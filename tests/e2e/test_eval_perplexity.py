"""eval_perplexity.py on the tiny model: files and figures, several models and scalings, and what is refused."""

import json
import math
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import eval_perplexity
import pytest
import torch
from conftest import EXAMPLES, SCRIPTS
from eval_perplexity import EvalArguments
from transformers import AutoModelForCausalLM

from utils.arguments import InferenceArguments, parse_args
from utils.files import InputError, hash_file
from utils.tokenization import encode_text, load_tokenizer

LENGTHS = [64, 512, 1024]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Two texts of some documents, each of at least 1,024 tokens of the tiny model's."""
    folder = tmp_path_factory.mktemp("texts")
    lines = (EXAMPLES / "pretrain" / "en_heldout.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for name, start in (("one", 0), ("two", 60)):
        documents = [" ".join(lines[first : first + 15]) for first in (start, start + 15, start + 30)]
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return found


def evaluate(model, out, texts, rope=None, **settings):
    return eval_perplexity.main(
        InferenceArguments(model_name_or_path=str(model), only_cpu=True, dtype="float32", **(rope or {})),
        EvalArguments(
            texts=[f"{name}={path}" for name, path in texts.items()],
            **({"lengths": LENGTHS, "output_dir": str(out), "max_rows": None} | settings),
        ),
    )


@torch.no_grad()
def plain_perplexities(folder, path, **config):
    """Perplexity of each bucket of the first stretch of every document, from transformers' logits in float64."""
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder, **config).eval()
    sums, counts = [0.0] * len(LENGTHS), [0] * len(LENGTHS)
    for line in path.read_text(encoding="utf-8").splitlines():
        ids = [tokenizer.bos_token_id, *encode_text(tokenizer, json.loads(line)["text"])]
        step = LENGTHS[-1] - 1
        for start in range(1, len(ids) - step + 1, step):
            row = torch.tensor([ids[0], *ids[start : start + step]])
            logits = model(input_ids=row.unsqueeze(0)).logits[0].double()
            for place in range(1, len(row)):
                bucket = next(number for number, length in enumerate(LENGTHS) if place < length)
                sums[bucket] -= float(torch.log_softmax(logits[place - 1], 0)[row[place]])
                counts[bucket] += 1
    return [math.exp(total / count) for total, count in zip(sums, counts, strict=True)]


def test_settings_are_compared(tiny_model_folder, texts, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    settings = ["none", "pi", "ntk", "auto-ntk", "yarn", "pi+ntk"]
    result = evaluate(tiny_model_folder, tmp_path / "out", texts, settings=settings)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"perplexity.json", "perplexity.png"}
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text(encoding="utf-8")) == result
    found = {(row["setting"], row["text"], row["tokens"]): row for row in result["rows"]}
    assert len(found) == len(result["rows"]) == 6 * 2 * 3
    assert {key[2] for key in found} == {"1-64", "65-512", "513-1024"}
    assert result["texts"]["one"] == {str(texts["one"]): hash_file(texts["one"])}
    assert {name: model["max_position_embeddings"] for name, model in result["models"].items()} == {
        "none": 512, **dict.fromkeys(settings[1:], 1024)
    }  # fmt: skip
    # Independent figures: transformers with configs written by hand.
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    slower = {"rope_type": "default", "rope_theta": 1e4 * 3 ** (8 / 6)}
    for name, config in (("none", {}), ("pi", linear), ("ntk", slower), ("yarn", yarn)):
        changes = {"rope_parameters": config} if config else {}
        expected = plain_perplexities(tiny_model_folder, texts["one"], **changes)
        rows = [found[name, "one", bucket] for bucket in ("1-64", "65-512", "513-1024")]
        assert [row["perplexity"] for row in rows] == pytest.approx(expected, rel=1e-5), name
    # auto-NTK is the model itself up to its window, and NTK for twice the window from there on.
    for bucket, other in (("1-64", "none"), ("65-512", "none"), ("513-1024", "ntk")):
        same = found["auto-ntk", "two", bucket]["perplexity"]
        assert same == pytest.approx(found[other, "two", bucket]["perplexity"], rel=1e-5)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(result["rows"]) and "513-1024" in printed[-1] and "pi+ntk" in printed[-1]
    assert "next: MODEL=" in caplog.text


def test_models_are_compared_in_bits_a_byte(tiny_model_folder, texts, tmp_path):
    other = Path(shutil.copytree(tiny_model_folder, tmp_path / "other"))
    result = evaluate(
        tiny_model_folder, tmp_path / "out", {"one": texts["one"]}, lengths=[64], other_models=[f"copy={other}"]
    )
    labels = {row["label"]: row for row in result["rows"]}
    assert list(labels) == ["tiny none", "copy none"]
    first, second = labels.values()
    assert first["bits_per_byte"] == second["bits_per_byte"] and first["rows"] > 3
    assert result["models"]["copy none"]["model"] == str(other)


def test_one_scaling_without_settings(tiny_model_folder, texts, tmp_path):
    rope = {"rope_scaling": "yarn", "rope_factor": 4.0}
    result = evaluate(tiny_model_folder, tmp_path / "out", {"two": texts["two"]}, rope)
    assert {row["setting"] for row in result["rows"]} == {"yarn"}
    assert result["models"]["yarn"]["rope_parameters"]["factor"] == 4.0


REFUSED = {
    "no texts": ({"texts": []}, {}, "pass --texts"),
    "lengths": ({"lengths": [1, 5]}, {}, r"--lengths 1 5: need numbers of at least 2"),
    "settings": ({"settings": ["none", "abf"]}, {}, "--settings abf: need some of none, pi, ntk"),
    "rows": ({"max_rows": 0}, {}, "--max_rows 0"),
    "both": ({"settings": ["none"]}, {"rope_scaling": "ntk"}, "leave --rope_scaling out"),
    "within": ({"settings": ["ntk"], "lengths": [64, 512]}, {}, "within the model's window of 512; pass a longer one"),
    "too long": ({"lengths": [64, 100_000]}, {}, "no document of 100000 tokens"),
    "twice": ({"other_models": ["SAME"]}, {}, "another model is called tiny; pass NAME="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named_before_models_are_loaded(case, tiny_model_folder, texts, tmp_path, monkeypatch):
    settings, rope, message = REFUSED[case]
    if "other_models" in settings:
        settings = {"other_models": [str(tiny_model_folder)]}
    monkeypatch.setattr("utils.inference.load_for_inference", lambda *args: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        if "texts" in settings:
            EvalArguments(**settings)
        else:
            evaluate(tiny_model_folder, tmp_path / "out", texts, rope, **settings)
    assert not (tmp_path / "out").exists()


def test_a_finished_result_stays(tiny_model_folder, texts, tmp_path):
    (tmp_path / "perplexity.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="is finished; pass another --output_dir, or --overwrite"):
        evaluate(tiny_model_folder, tmp_path, texts)
    evaluate(tiny_model_folder, tmp_path, {"one": texts["one"]}, lengths=[64], overwrite=True)
    assert len(json.loads((tmp_path / "perplexity.json").read_text(encoding="utf-8"))["rows"]) == 1


def test_the_launcher_passes_lists_on(tiny_model_folder, texts, tmp_path):
    environment = {
        **os.environ, "DRY_RUN": "1", "MODEL": str(tiny_model_folder), "TEXTS": f"one={texts['one']}",
        "LORA": "adapter", "OUT": str(tmp_path / "my out"), "LENGTHS": "64 32", "SETTINGS": "none yarn",
    }  # fmt: skip
    command = ["bash", str(SCRIPTS / "run_eval_perplexity.sh"), "--max_rows", "2"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    model, args = parse_args(InferenceArguments, EvalArguments, argv=shlex.split(printed)[2:])
    assert (model.model_name_or_path, model.adapter_name_or_path) == (str(tiny_model_folder), "adapter")
    assert (args.lengths, args.settings, args.max_rows) == ([32, 64], ["none", "yarn"], 2)
    assert (args.texts, args.output_dir) == ([f"one={texts['one']}"], str(tmp_path / "my out"))
