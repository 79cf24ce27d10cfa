"""inference_hf.py with drafts: the same answers, in 4 and 8 bits and with adapters too; figures; refusals in time."""

import logging
import sys

import inference_hf
import pytest
import torch
from inference_hf import TaskArguments
from transformers import AutoModelForCausalLM

from support.models import save_llama
from support.paths import ROOT
from utils.core.arguments import GenerationArguments, InferenceArguments, SpeculationArguments
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.core.files import read_json
from utils.generation import loading
from utils.generation.engine import Request
from utils.text.tokenizer import load_tokenizer, save_tokenizer

QUESTIONS = ["Where is the house?", "Tell me a story about the river.", "What is one and one?", "Once", "why", "a a a"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.txt"
    path.write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory, tiny_model_folder):
    """Four layers of a width that bitsandbytes packs, with the tiny model's tokenizer."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_key_value_heads": 4}
    folder = tmp_path_factory.mktemp("models") / "deep"
    tokenizer = load_tokenizer(tiny_model_folder)
    return save_llama(folder, tokenizer, seed=2, **sizes, max_position_embeddings=512, initializer_range=0.1)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, deep_model):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(deep_model),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def ask(folder, questions, path, *, model=None, settings=None, batch_size=2, **drafts):
    """main() with small answers; (what it returns, the answers)."""
    result = inference_hf.main(
        InferenceArguments(model_name_or_path=str(folder), dtype="float32", **(model or {})),
        GenerationArguments(**{"max_new_tokens": 24, "temperature": 0.0} | (settings or {})),
        TaskArguments(data_file=str(questions), predictions_file=str(path), with_prompt=True, batch_size=batch_size),
        SpeculationArguments(**drafts),
    )
    return result, [row["Output"] for row in read_json(path)]


@pytest.mark.parametrize(
    ("model", "drafts"),
    [
        ({}, {"draft_layers": 2}),
        ({}, {"prompt_lookup": True, "draft_k": 4}),
        pytest.param({"adapter": True}, {"draft_layers": 3, "draft_k": 3}, marks=pytest.mark.slow),
        pytest.param({"load_in_4bit": True}, {"draft_layers": 2, "draft_k": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"load_in_4bit": True, "adapter": True},
            {"draft_layers": 2, "speculative_sampling": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"load_in_8bit": True, "adapter": True}, {"draft_layers": 1, "draft_k": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            {}, {"draft_base_model": True, "draft_model_load_in_8bit": True, "draft_k": 3}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"load_in_4bit": True},
            {"draft_base_model": True, "draft_lora_model": True, "draft_k": 3},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_answers_are_those_without_drafts(model, drafts, deep_model, adapter, questions, tmp_path, caplog):
    settings = {name: value for name, value in model.items() if name != "adapter"}
    settings |= {"adapter_name_or_path": str(adapter)} if "adapter" in model else {}
    folders = {"draft_base_model": str(deep_model), "draft_lora_model": str(adapter)}
    drafts = {name: folders.get(name, value) for name, value in drafts.items()}
    _, expected = ask(deep_model, questions, tmp_path / "plain.json", model=settings)
    with caplog.at_level(logging.INFO):
        result, answers = ask(deep_model, questions, tmp_path / "drafted.json", model=settings, **drafts)
    assert answers == expected
    assert 0 <= result["accepted"] <= result["drafted"] and result["drafted"] > 0
    assert "drafted tokens accepted" in caplog.text and "tokens a pass of the model" in caplog.text


@pytest.mark.slow
def test_a_draft_of_another_vocabulary_is_told_by_its_tokenizer(
    deep_model, extended_tokenizer_folder, questions, tmp_path, caplog
):
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(deep_model)
    tokenizer = load_tokenizer(extended_tokenizer_folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(other)
    save_tokenizer(tokenizer, other)
    _, expected = ask(deep_model, questions, tmp_path / "plain.json")
    with caplog.at_level(logging.INFO):
        _, answers = ask(deep_model, questions, tmp_path / "drafted.json", draft_base_model=str(other))
    assert answers == expected
    assert "another vocabulary" in caplog.text


@pytest.mark.slow
def test_every_adapter_is_drafted_for_by_itself(deep_model, adapter):
    """Several models on one base, whose answers differ; drafts come from the layers with the adapter in them."""
    settings = GenerationArguments(max_new_tokens=24, temperature=0.0)
    answers = {}
    for speculation in (None, SpeculationArguments(draft_layers=3, draft_k=3)):
        plan = loading.EnginePlan(
            InferenceArguments(model_name_or_path=str(deep_model), dtype="float32"), speculation=speculation
        )
        engine = plan.load(max_batch_size=2, adapters={"adapter": str(adapter)})
        prompts = [plan.encode([{"role": "user", "content": question}]) for question in QUESTIONS[:3]]
        requests = [Request(prompt, settings, model=name) for prompt in prompts for name in engine.models]
        answers[speculation is None] = [completion.token_ids for completion in engine.generate(requests)]
        engine.close()
    assert answers[True] == answers[False]
    assert all(base != other for base, other in zip(answers[True][::2], answers[True][1::2], strict=True))
    assert engine.statistics()["accepted"] > 0


@pytest.mark.slow
def test_a_run_goes_on_with_other_drafts_where_answers_stay_the_same(deep_model, questions, tmp_path):
    path = tmp_path / "p.json"
    ask(deep_model, questions, path, draft_layers=1)
    result, _ = ask(deep_model, questions, path, prompt_lookup=True)
    assert result["answers"] == len(QUESTIONS), "finished before"
    drawn = tmp_path / "drawn.json"
    ask(deep_model, questions, drawn, settings={"temperature": 1.0}, draft_layers=1)
    with pytest.raises(InputError):
        ask(deep_model, questions, drawn, settings={"temperature": 1.0}, draft_layers=2)


@pytest.mark.parametrize(
    ("settings", "drafts", "message"),
    [
        ({"num_beams": 2}, {"draft_layers": 1}, "beam"),
        ({"guidance_scale": 1.5, "negative_prompt": "bad"}, {"prompt_lookup": True}, "guidance_scale"),
        ({}, {"draft_layers": 4}, "4 layers; need fewer"),
        ({}, {"draft_base_model": "nowhere"}, "not found"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    settings, drafts, message, deep_model, questions, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "load_for_inference", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=message):
        ask(deep_model, questions, tmp_path / "p.json", settings=settings, **drafts)


def test_the_forerunners_flags_are_known():
    flags = ["--base_model", "m", "--speculative_sampling", "--draft_k", "-1", "--draft_base_model", "d"]
    flags += ["--draft_lora_model", "l", "--draft_model_load_in_8bit"]
    _, speculation = parse_args(
        InferenceArguments, SpeculationArguments, argv=flags, documented=("base_model", "lora_model", "tokenizer_path")
    )
    assert speculation.drafts and speculation.draft_base_model == "d" and speculation.draft_k == -1


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    """With a model of no use: the figures mean nothing, that answers are the same does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speculative

    monkeypatch.setattr(sys, "argv", ["speculative.py", "--quick", "--no_record", "--output_dir", str(tmp_path)])
    speculative.main()
    printed = capsys.readouterr().out
    assert "first layers" in printed and "identical" in printed
