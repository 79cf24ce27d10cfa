"""prune_layers.py against models in memory whose other layers do nothing; its result is trained, and drafts.

In the oracle a layer that is not kept hands on what it got, all else being the whole model: its config, its masks.
"""

import json
import logging
import shutil
import sys
from pathlib import Path

import merge_llama2_with_chinese_lora_low_mem as merge
import prune_layers
import pytest
import torch
from torch import nn

from support.merging import TEXT, all_weights, load, make_base
from support.models import save_llama
from support.paths import EXAMPLES
from support.scripts import next_words
from utils.core.arguments import (
    DataArguments,
    ExtendArguments,
    GenerationArguments,
    InferenceArguments,
    LoraArguments,
    ModelArguments,
    SpeculationArguments,
)
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.core.files import read_json
from utils.text.tokenizer import load_tokenizer, tokenizer_fingerprint
from utils.training.arguments import RunArguments

pytestmark = pytest.mark.usefixtures("small_blocks")

LAYERS = {"num_hidden_layers": 6, "vocab_size": 400}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 3},
    "gemma3_text": {"sliding_window": 3, "head_dim": 16, "sliding_window_pattern": 3},
    "qwen3_moe": {"mlp_only_layers": [1, 3], **EXPERTS},
    "mixtral": {"num_local_experts": 4},
}


class Skipped(nn.Module):
    def forward(self, hidden_states, *args, **settings):
        return hidden_states


def prune(base: Path, out: Path, keep: str | None = None, **settings) -> dict:
    return prune_layers.main(prune_layers.PruneArguments(str(base), str(out), keep, **settings))


@torch.no_grad()
def run(model) -> torch.Tensor:
    return model(TEXT, use_cache=False).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("prune") / "llama", **LAYERS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_the_model_without_the_other_layers(kind, tmp_path):
    base = make_base(tmp_path / "base", kind, **LAYERS, **KINDS[kind])
    report = prune(base, tmp_path / "out", "0,2-3,5")
    model = load(base, torch.float32)
    for layer in (1, 4):
        model.model.layers[layer] = Skipped()
    small = load(tmp_path / "out", torch.float32)
    assert len(small.model.layers) == 4 and report["layers"] == "0,2-3,5"
    torch.testing.assert_close(run(small), run(model), rtol=1e-5, atol=1e-5)
    # The layers matter, and so does which: else any four would pass.
    assert (run(load(base, torch.float32)) - run(small)).abs().max() > 0.01


def test_a_deeper_model_runs_layers_again(llama, tmp_path):
    prune(llama, tmp_path / "out", depth_upscale="9")
    model = load(llama, torch.float32)
    order = [0, 1, 2, 3, 4, 2, 3, 4, 5]
    model.model.layers = nn.ModuleList([model.model.layers[layer] for layer in order])
    model.config.num_hidden_layers = 9
    deep = load(tmp_path / "out", torch.float32)
    torch.testing.assert_close(run(deep), run(model), rtol=1e-5, atol=1e-5)
    assert read_json(tmp_path / "out" / "config.json")["num_hidden_layers"] == 9


def test_shards_types_and_the_manifest(llama, tmp_path, caplog):
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO):
        report = prune(llama, out, "even:2", dtype="bfloat16", max_shard_size="100KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    weights, base = all_weights(out), all_weights(llama)
    assert torch.equal(
        weights["model.layers.1.mlp.up_proj.weight"], base["model.layers.5.mlp.up_proj.weight"].bfloat16()
    )
    assert report["parameters"] == [sum(w.numel() for w in found.values()) for found in (base, weights)]
    assert read_json(out / "config.json")["dtype"] == "bfloat16"
    assert merge.verify_only(str(out))["files"] > 4
    manifest = read_json(out / "merge_manifest.json")
    assert manifest["settings"]["keep"] == "even:2" and manifest["inputs"]["base"]["files"]
    assert "6 -> 2 layers (0,5)" in caplog.text
    words = next_words(caplog.text)
    assert words[:2] == [f"MODEL={out}", "DATA=TEXT"] and words[-2:] == ["scripts/run_pt.sh", "--full_finetuning"]


def test_an_interrupted_run_goes_on_only_with_the_same_layers(llama, tmp_path, monkeypatch):
    """Two lists of equal length have equal names, shapes and sizes of everything."""
    out = tmp_path / "out"

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_layers, "write_companions", stop)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, out, "first:2")
    monkeypatch.undo()
    prune(llama, out, "even:2")
    found = all_weights(out)["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(found, all_weights(llama)["model.layers.5.self_attn.q_proj.weight"])


def test_a_dry_run_writes_nothing(llama, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        report = prune(llama, tmp_path / "out", "first:3", dry_run=True)
    assert report["num_layers"] == [6, 3] and not list(tmp_path.iterdir())
    assert "6 -> 3 layers (0-2)" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": "0-6"}, "0-6: the model has 6 layers; need numbers from 0 to 5"),
        ({"keep": "first:0"}, "first:0: the model has 6 layers; need 1 to 6"),
        ({"keep": ""}, "names no layers"),
        ({"depth_upscale": "6"}, "--depth_upscale 6: the model has 6 layers; need 7 to 12"),
        ({}, "pass --keep for a smaller model, or --depth_upscale"),
        ({"keep": "0", "depth_upscale": "7"}, "pass --keep for a smaller model, or --depth_upscale"),
        ({"keep": "0", "max_shard_size": "none"}, "'none' is no size"),
    ],
)
def test_bad_requests_write_nothing(llama, tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        prune(llama, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_adapters_and_quantised_models_are_refused(llama, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="pass the base model here"):
        prune(tmp_path / "adapter", tmp_path / "out", "0")
    shutil.copytree(llama, tmp_path / "quantised")
    config = read_json(llama / "config.json") | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="pass the full-precision model"):
        prune(tmp_path / "quantised", tmp_path / "out", "0")
    with pytest.raises(InputError, match="overlap"):
        prune(llama, llama / "out", "0")


# ---------------------------------------------------------------- what becomes of the result


@pytest.mark.slow
def test_the_result_is_trained_and_drafts_for_the_model_it_came_from(base_tokenizer_folder, tmp_path):
    import inference_hf
    import pt

    tokenizer = load_tokenizer(base_tokenizer_folder)
    whole = save_llama(tmp_path / "whole", tokenizer, num_hidden_layers=4, initializer_range=0.1)
    prune(whole, tmp_path / "small", "first:2")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "small")) == tokenizer_fingerprint(tokenizer)
    text = tmp_path / "text.txt"
    lines = (EXAMPLES / "pretrain" / "en_train.txt").read_text(encoding="utf-8").splitlines()[:30]
    text.write_text("\n".join(lines), encoding="utf-8")
    argv = ["--model_name_or_path", str(tmp_path / "small"), "--train_data", str(text), "--full_finetuning"]
    argv += [
        "--output_dir",
        str(tmp_path / "trained"),
        "--block_size",
        "64",
        "--max_steps",
        "6",
        "--report_to",
        "none",
    ]
    argv += ["--learning_rate", "1e-2", "--precision", "fp32", "--logging_steps", "1", "--disable_tqdm", "True"]
    types = (ModelArguments, ExtendArguments, LoraArguments, DataArguments, pt.PretrainingArguments, RunArguments)
    pt.main(*parse_args(*types, argv=[*argv, "--preprocessing_num_workers", "1"]))
    history = [entry["loss"] for entry in read_json(tmp_path / "trained" / "trainer_state.json")["log_history"][:6]]
    assert history[-1] < history[0]
    questions = tmp_path / "questions.txt"
    questions.write_text("Where is the house?\nTell me a story.\n", encoding="utf-8")
    answers = []
    for draft in (None, tmp_path / "small", tmp_path / "trained"):
        result = inference_hf.main(
            InferenceArguments(model_name_or_path=str(whole), dtype="float32"),
            GenerationArguments(max_new_tokens=12, temperature=0.0),
            inference_hf.TaskArguments(data_file=str(questions), predictions_file=str(tmp_path / f"{draft}.json")),
            SpeculationArguments(draft_base_model=draft and str(draft), draft_k=2 if draft else 0),
        )
        answers.append([row["Output"] for row in read_json(tmp_path / f"{draft}.json")])
        assert draft is None or result["drafted"] > 0
    assert answers[0] == answers[1] == answers[2]


def test_one_line_for_bad_input(llama, tmp_path, monkeypatch, capsys):
    argv = ["--base_model", str(llama), "--keep", "0,9", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prune_layers.py", *argv])
    from utils.core.command_line import run as run_script

    with pytest.raises(SystemExit) as end:
        run_script(prune_layers.main, prune_layers.PruneArguments, documented=("base_model",))
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: 9: the model has 6 layers")
