"""What --check says of a folder, and that it reads headers alone."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from support.merging import make_adapter
from utils.core.arguments import InferenceArguments
from utils.generation.folder_check import FolderCheck
from utils.lora.base_record import record_base
from utils.weights.reader import Checkpoint


@pytest.fixture
def model(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def check(model, adapter=None, **more):
    return FolderCheck(InferenceArguments(str(model), adapter_name_or_path=adapter and str(adapter), **more))


def test_what_is_there(model, monkeypatch):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    monkeypatch.setattr(Checkpoint, "read", None)  # no number is needed
    report = check(model)
    text = "\n".join(report.found)
    assert report.refused == []
    for part in (
        "llama, LlamaForCausalLM, 2 layers, 32 wide, 400 rows, window 512 tokens, type float32",
        "model.safetensors (no index), 21 tensors",
        "21 float32",
        "lm_head: of its own, in the files",
        "2 '</s>' (config.json, generation_config.json, tokenizer), 7",
        "padding: None",
        "sentencepiece, 400 tokens, largest id 399, without chat template",
    ):
        assert part in text, text


def test_what_answering_refuses_is_refused_here(model):
    (model / "generation_config.json").write_text(json.dumps({"temperature": "hot", "eos_token_id": "</s>"}))
    (model / "chat_template.jinja").write_text("{% for m in messages %}")
    (model / "config.json").write_text("{")
    words = ["config.json:1: broken JSON", "temperature 'hot'", "is no jinja"]
    refused = check(model).refused
    assert len(refused) == 3 and all(any(word in line for line in refused) for word in words), refused


def test_an_adapter(model, tmp_path):
    make_adapter(model, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj"])
    record_base(tmp_path / "adapter", model)
    for folder, end in ((model, 7), (tmp_path / "adapter", 9)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    report = check(model, tmp_path / "adapter")
    assert report.refused == []
    text = "\n".join(report.found)
    assert "LoRA of rank 4, alpha 16, on q_proj; in full: embed_tokens, lm_head; changes 4 weights" in text
    assert "its base's weights are recorded" in text and "rows: 400" in text
    ends = next(line for line in report.found if "ends of an answer" in line)
    assert "9 '" in ends and "7 '" not in ends, "the adapter's own file counts, as in engines"


def test_all_that_is_wrong_is_listed_together(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (model / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes()[:500])
    report = check(model)
    assert len(report.refused) == 2
    assert "lack 1 tensors: model.norm.weight" in report.refused[0] and "tokenizer.model" in report.refused[1]
    assert any("20 tensors" in line for line in report.found)
    report = check(tmp_path / "absent")
    assert report.found == [] and "folder not found" in report.refused[0]


def test_a_tokenizer_with_too_many_tokens(model, extended_tokenizer_folder):
    report = check(model, tokenizer_name_or_path=str(extended_tokenizer_folder))
    assert len(report.refused) == 1 and "406 tokens but the model has 400 rows" in report.refused[0]
