"""eval_perplexity.py on the tiny model: files and figures, several models and scalings, and what is refused.

Figures are compared with plain loops over transformers' own logits, one window at a time, in float64.
"""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import eval_perplexity
import pytest
import torch
from eval_perplexity import EvalArguments
from transformers import AutoModelForCausalLM

from support.paths import EXAMPLES, SCRIPTS
from utils.core.arguments import InferenceArguments
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.core.files import hash_file
from utils.evaluation import likelihood, perplexity
from utils.gguf import llamacpp
from utils.text.tokenizer import encode_text, load_tokenizer

needs_llama_cpp = pytest.mark.skipif(
    not llamacpp.is_installed(), reason="llama-cpp-python is not installed (requirements-llamacpp.txt)"
)

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


@pytest.mark.slow
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
    assert "next: python scripts/report.py --results " in caplog.text


@pytest.mark.slow
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


# ---------------------------------------------------------------- whole documents


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> dict[str, Path]:
    """Documents of all lengths, from one letter to some windows of 64 tokens; the second text has few."""
    folder = tmp_path_factory.mktemp("documents")
    lines = (EXAMPLES / "pretrain" / "en_heldout.txt").read_text(encoding="utf-8").splitlines()
    texts = ["a", "猫", *lines[:12], " ".join(lines[12:15]), " ".join(lines[15:18]), "两句话，短的。"]
    found = {"mixed": folder / "mixed.txt", "few": folder / "few.jsonl"}
    found["mixed"].write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    found["few"].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[-4:]), encoding="utf-8")
    return found


def read_texts(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [json.loads(line)["text"] for line in lines] if path.suffix == ".jsonl" else lines


@torch.no_grad()
def plain_document_losses(folder, path, window, stride, **config):
    """The loss of each document in nats, window by window, and its number of tokens."""
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder, **config).eval()
    found = []
    for text in read_texts(path):
        ids, total, scored, begin = encode_text(tokenizer, text), 0.0, 0, 0
        while scored < len(ids):
            row = [tokenizer.bos_token_id, *ids[begin : begin + window - 1]]
            chances = torch.log_softmax(model(input_ids=torch.tensor([row])).logits[0].double(), -1)
            for place in range(scored - begin + 1, len(row)):
                total -= float(chances[place - 1, row[place]])
            scored = begin + len(row) - 1
            begin += stride
        found.append((total, len(ids)))
    return found


def score(model, out, texts, model_settings=None, **settings):
    """As evaluate, of whole documents."""
    return evaluate(model, out, texts, model_settings, **({"lengths": []} | settings))


@pytest.mark.parametrize("stride", [None, 24])
def test_whole_documents_against_a_plain_loop(stride, tiny_model_folder, documents, tmp_path, capsys):
    result = score(tiny_model_folder, tmp_path / "out", documents, window=64, stride=stride, batch_tokens=300)
    names = {"perplexity.json", "perplexity.png", "documents.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text(encoding="utf-8")) == result
    assert (result["kind"], result["window"], result["stride"]) == ("perplexity", 64, stride or 63)
    assert result["texts"]["few"] == {str(documents["few"]): hash_file(documents["few"])}
    assert result["environment"]["torch"] == torch.__version__
    lines = (tmp_path / "out" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line) for line in lines]
    for row, (name, path) in zip(result["rows"], documents.items(), strict=True):
        plain = plain_document_losses(tiny_model_folder, path, 64, stride or 63)
        nats, tokens = sum(loss for loss, _ in plain), sum(count for _, count in plain)
        size = sum(len(text.encode()) for text in read_texts(path))
        assert (row["label"], row["text"], row["documents"], row["left_out"]) == ("tiny", name, len(plain), 0)
        assert (row["scored_tokens"], row["unscored_tokens"], row["bytes"]) == (tokens, 0, size)
        assert row["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        found = [line["nats"]["tiny"] for line in losses if line["text"] == name]
        assert found == pytest.approx([loss for loss, _ in plain], rel=1e-5)
        assert (row["bits_per_byte_interval"] is None) == (name == "few")  # from four documents there is none
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base_tokenizer_folder):
    """A model of 120 steps, so that its weights are no noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from utils.text.tokenizer import save_tokenizer

    folder = tmp_path_factory.mktemp("trained") / "trained"
    tokenizer = load_tokenizer(base_tokenizer_folder)
    lines = (EXAMPLES / "pretrain" / "en_train.txt").read_text(encoding="utf-8").splitlines()[:800]
    stream = torch.tensor([i for line in lines for i in [tokenizer.bos_token_id, *encode_text(tokenizer, line)]])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        starts = torch.randint(len(stream) - 64, (8,))
        rows = torch.stack([stream[start : start + 64] for start in starts])
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.slow
def test_sliding_windows_give_each_token_more_context(trained, documents, tmp_path):
    text = {"mixed": documents["mixed"]}
    blocks, sliding = (
        score(trained, tmp_path / str(stride), text, window=16, stride=stride)["rows"][0]["perplexity"]
        for stride in (None, 8)
    )
    assert sliding < 0.9 * blocks


@pytest.mark.slow
def test_models_precisions_and_adapters_in_one_table(tiny_model_folder, trained, documents, tmp_path):
    """An adapter is its merged model; precisions are multiplied out; differences are against the first line."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(trained), LoraConfig(r=2, target_modules=["q_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    shutil.copytree(trained, merged)
    model.merge_and_unload().save_pretrained(merged)
    result = score(
        trained, tmp_path / "out", {"mixed": documents["mixed"]}, window=64, kbits=[16, 4],
        other_models=[str(tmp_path / "adapter"), f"whole={merged}"],
    )  # fmt: skip
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == [f"{name} {bits}-bit" for name in ("trained", "adapter", "whole") for bits in (16, 4)]
    bits = {label: row["bits_per_byte"] for label, row in rows.items()}
    assert bits["adapter 16-bit"] == pytest.approx(bits["whole 16-bit"], rel=1e-5)
    assert bits["trained 16-bit"] < bits["trained 4-bit"] < 1.2 * bits["trained 16-bit"]
    assert bits["adapter 16-bit"] > bits["trained 16-bit"]
    assert "bits_per_byte_difference" not in rows["trained 16-bit"]
    for label, row in list(rows.items())[1:]:
        assert row["bits_per_byte_difference"] == pytest.approx(bits[label] - bits["trained 16-bit"])
        low, high = row["bits_per_byte_difference_interval"]
        assert low < row["bits_per_byte_difference"] < high
    described = result["models"]
    assert described["adapter 4-bit"]["kbits"] == 4 and described["adapter 4-bit"]["model"] == str(trained)
    assert described["adapter 4-bit"]["adapter"] == str(tmp_path / "adapter")
    weights = {label.split()[0]: model["weights"] for label, model in described.items()}
    assert len(set(weights.values())) == 3


@pytest.mark.slow
def test_scalings_of_whole_documents(tiny_model_folder, documents, tmp_path):
    """--window makes --settings scale whole documents instead of drawing a curve."""
    result = score(
        tiny_model_folder, tmp_path / "out", {"few": documents["few"]}, window=1024, settings=["none", "pi"]
    )
    expected = [
        plain_document_losses(tiny_model_folder, documents["few"], 1024, 1023, **config)
        for config in ({}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}})
    ]
    for row, plain in zip(result["rows"], expected, strict=True):
        nats, tokens = sum(loss for loss, _ in plain), sum(count for _, count in plain)
        assert row["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert [row["label"] for row in result["rows"]] == ["tiny none", "tiny pi"]
    yarn = score(tiny_model_folder, tmp_path / "yarn", {"few": documents["few"]}, {"rope_scaling": "yarn"})
    assert yarn["window"] == 1024 and yarn["models"]["tiny yarn"]["rope_parameters"]["factor"] == 2.0


# ---------------------------------------------------------------- GGUF files


def export(base, out, *types):
    import export_gguf

    export_gguf.main(
        export_gguf.ExportArguments(str(base), output_dir=str(out), types=list(types), self_test="tokens")
    )
    return [out / f"model-{name.upper()}.gguf" for name in types]


@needs_llama_cpp
def test_gguf_files_beside_the_model(trained, documents, tmp_path):
    """float32 in llama.cpp to five digits; f16 of a trained model within 0.1 %; sliding, scaled and by length too."""
    exact, half, coarse = export(trained, tmp_path / "gguf", "f32", "f16", "q8_0")
    text = {"mixed": documents["mixed"]}
    others = [str(exact), f"half={half}", str(coarse)]
    result = score(trained, tmp_path / "out", text, window=64, stride=40, other_models=others, kbits=[16, 8])
    perplexities = {row["label"]: row["perplexity"] for row in result["rows"]}
    labels = ["trained 16-bit", "trained 8-bit", "model-F32", "half", "model-Q8_0"]
    assert list(perplexities) == labels
    first = perplexities["trained 16-bit"]
    assert perplexities["model-F32"] == pytest.approx(first, rel=1e-5)
    assert perplexities["half"] == pytest.approx(first, rel=1e-3) and perplexities["half"] != first
    assert perplexities["model-Q8_0"] == pytest.approx(first, rel=1e-2)
    assert result["models"]["half"]["weights"] == hash_file(half) and result["models"]["half"]["kbits"] is None
    curves = evaluate(
        exact, tmp_path / "curve", text, lengths=[32, 200], settings=["none", "pi"], document_separator="",
        other_models=[f"folder={trained}"], max_rows=2, rope={"rope_factor": 2.0},
    )  # fmt: skip
    bits = {(row["label"], row["tokens"]): row["bits_per_byte"] for row in curves["rows"]}
    assert len(bits) == 8
    for setting in ("none", "pi"):
        for bucket in ("1-32", "33-200"):
            one, other = bits[f"model-F32 {setting}", bucket], bits[f"folder {setting}", bucket]
            assert one == pytest.approx(other, rel=1e-5), (setting, bucket)
    assert bits["folder none", "33-200"] != bits["folder pi", "33-200"]


# ---------------------------------------------------------------- interrupted runs


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tiny_model_folder, documents, tmp_path, monkeypatch):
    """The same figures to the last digit, and nothing is scored twice."""
    monkeypatch.setattr(perplexity, "GROUP_TOKENS", 100)
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    settings = {"window": 32, "other_models": [str(other)]}
    expected = score(tiny_model_folder, tmp_path / "whole", documents, **settings)
    real, scored = likelihood.LikelihoodScorer.window_losses, []

    def stop_after_some(self, cut, progress=None):
        scored.append(len(cut))
        if len(scored) == stop:
            raise KeyboardInterrupt
        return real(self, cut, progress)

    monkeypatch.setattr(likelihood.LikelihoodScorer, "window_losses", stop_after_some)
    total = 0
    for stop in (3, 9, 10**6):
        scored.clear()
        if stop < 10**6:
            with pytest.raises(KeyboardInterrupt):
                score(tiny_model_folder, tmp_path / "out", documents, **settings)
            total += stop - 1
            assert [path.name for path in (tmp_path / "out").iterdir()] == ["perplexity.parts.jsonl"]
    with pytest.raises(InputError, match=r"unfinished run with other settings, .*window; .*--overwrite"):
        score(tiny_model_folder, tmp_path / "out", documents, **{**settings, "window": 16})
    found = score(tiny_model_folder, tmp_path / "out", documents, **settings)
    assert found["rows"] == expected["rows"]
    every = sum(len(list(perplexity.read_documents([path], load_tokenizer(tiny_model_folder)).groups()))
                for path in documents.values())  # fmt: skip
    assert total + len(scored) == 2 * every and not (tmp_path / "out" / "perplexity.parts.jsonl").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on(tiny_model_folder, documents, tmp_path):
    text = tmp_path / "many.txt"
    text.write_text(documents["mixed"].read_text(encoding="utf-8") * 30, encoding="utf-8")
    command = [sys.executable, str(SCRIPTS / "eval_perplexity.py"), "--base_model", str(tiny_model_folder)]
    command += ["--texts", str(text), "--window", "64", "--stride", "8", "--only_cpu", "--dtype", "float32"]
    subprocess.run([*command, "--output_dir", str(tmp_path / "whole")], check=True, capture_output=True)
    command += ["--output_dir", str(tmp_path / "out")]
    parts = tmp_path / "out" / "perplexity.parts.jsonl"
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and not (parts.is_file() and parts.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert parts.is_file() and not (tmp_path / "out" / "perplexity.json").exists()
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "going on after" in again.stderr
    found, whole = (json.loads((tmp_path / name / "perplexity.json").read_text()) for name in ("out", "whole"))
    assert found["rows"] == whole["rows"]


# ---------------------------------------------------------------- mistakes


REFUSED = {
    "no texts": ({"texts": []}, {}, "pass --texts"),
    "lengths": ({"lengths": [1, 5]}, {}, r"--lengths 1 5: need numbers of at least 2"),
    "settings": ({"settings": ["none", "abf"]}, {}, "--settings abf: need some of none, pi, ntk"),
    "rows": ({"max_rows": 0}, {}, "--max_rows 0"),
    "two kinds": ({"lengths": [64], "window": 64}, {}, "--lengths is for curves, --window"),
    "kbits": ({"kbits": [16, 5]}, {}, "--kbits 16 5: need some of 16, 8, 4"),
    "stride": ({"lengths": [], "window": 64, "stride": 64}, {}, "--stride 64: need 1 to --window - 1"),
    "long stride": ({"lengths": [], "stride": 600}, {}, r"--stride 600: need 1 to 511, less than the window of 512"),
    "engine": ({"lengths": []}, {"engine": "vllm"}, "--engine vllm: it tells no losses"),
    "no model": ({"lengths": [], "other_models": ["nowhere"]}, {}, "nowhere"),
    "both": ({"settings": ["none"]}, {"rope_scaling": "ntk"}, "leave --rope_scaling out"),
    "within": ({"settings": ["ntk"], "lengths": [64, 512]}, {}, "within the model's window of 512; pass a longer one"),
    "too long": ({"lengths": [64, 100_000]}, {}, "no document of 100000 tokens.*or none to score whole documents"),
    "twice": ({"other_models": ["SAME"]}, {}, "another model is called tiny; pass NAME="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named_before_models_are_loaded(case, tiny_model_folder, texts, tmp_path, monkeypatch):
    settings, rope, message = REFUSED[case]
    if settings.get("other_models") == ["SAME"]:
        settings = {"other_models": [str(tiny_model_folder)]}
    monkeypatch.setattr("utils.generation.loading.load_for_inference", lambda *args: pytest.fail("loaded"))
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


@pytest.mark.slow
def test_a_window_beyond_the_models_is_warned_about(tiny_model_folder, documents, tmp_path, caplog):
    result = score(tiny_model_folder, tmp_path / "out", {"few": documents["few"]})
    assert result["window"] == 512 and not caplog.records  # the model's own
    score(tiny_model_folder, tmp_path / "long", {"few": documents["few"]}, window=600)
    assert "--window 600 is longer than that of tiny, 512" in caplog.text


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
    environment |= {
        "LENGTHS": "",
        "SETTINGS": "",
        "WINDOW": "64",
        "STRIDE": "16",
        "OTHERS": "a.gguf b=c",
        "KBITS": "16 4",
    }
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    _, args = parse_args(InferenceArguments, EvalArguments, argv=shlex.split(printed)[2:])
    assert (args.lengths, args.settings, args.window, args.stride) == ([], [], 64, 16)
    assert (args.other_models, args.kbits) == (["a.gguf", "b=c"], [16, 4])
