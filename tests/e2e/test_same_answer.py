"""One conversation through every door: the command line, the page, the server and llama.cpp give the same answer."""

import json
import re
import shutil

import inference_hf
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.models import with_template
from support.paths import CHROMIUM, FLAGS
from support.server import GREEDY, serving
from support.web import ask, served, visit, wait_idle
from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.generation.loading import EnginePlan
from utils.gguf.llamacpp import is_installed
from utils.text.tokenizer import load_tokenizer

QUESTIONS = ["Tell me about the sea.", "你好吗？", "And what is *one* and one?"]
LENGTH = 16
SETTINGS = GenerationArguments(max_new_tokens=LENGTH, temperature=0.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def folder(tiny_model_folder, tmp_path_factory):
    """The tiny model, which writes words of letters only, so that a page shows its answers as they are."""
    folder = with_template(tiny_model_folder, tmp_path_factory.mktemp("same") / "model")
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    others = [
        row for row, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        if not re.fullmatch("▁?[a-z]+", piece)
    ]  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[others] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    """What plain forward passes of transformers say, turn by turn, without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    messages, answers = [], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(LENGTH):
                best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
                assert best.values[0] - best.values[1] > 1e-3  # no tie that rounding decides
                ids.append(int(best.indices[0]))
        answers.append(tokenizer.decode(ids[len(prompt) :]).strip())
        messages.append({"role": "assistant", "content": answers[-1]})
    assert len(set(answers)) == len(answers) and all(re.fullmatch("[a-z ]+", answer) for answer in answers)
    return answers


def model_arguments(path, engine="transformers"):
    return InferenceArguments(model_name_or_path=str(path), engine=engine, only_cpu=True, dtype="float32")


def converse(path, engine="transformers"):
    """The server's answers to the official client, each to the whole conversation so far."""
    loaded = EnginePlan(model_arguments(path, engine)).load(max_batch_size=2)
    messages, answers = [], []
    with serving(loaded) as live, live.client() as client:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=LENGTH, **GREEDY)
            answers.append(reply.choices[0].message.content)
            messages.append({"role": "assistant", "content": answers[-1]})
    loaded.close()
    return answers


def test_the_command_line(folder, answers, monkeypatch, capsys):
    lines = iter(QUESTIONS)
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/exit"))
    inference_hf.main(
        model_arguments(folder), SETTINGS, inference_hf.TaskArguments(with_prompt=True, interactive=True)
    )
    shown = capsys.readouterr().out
    places = [shown.index(answer) for answer in answers]
    assert places == sorted(places)


def test_the_server(folder, answers):
    assert converse(folder) == answers


@pytest.mark.slow
def test_the_page(folder, answers):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements-dev.txt)")
    if not shutil.which(CHROMIUM):
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        with served(folder, SETTINGS) as page, visit(browser, page) as tab:
            for number, question in enumerate(QUESTIONS, 1):
                ask(tab, question)
                tab.wait_for_function(
                    f"() => document.querySelectorAll('#chat-0 [data-testid=bot]').length == {number}"
                )
                wait_idle(tab)
            with tab.expect_download() as download:
                tab.click("#save")
            record = json.loads(download.value.path().read_text(encoding="utf-8"))
        browser.close()
    assert [message["content"] for message in record["messages"][1::2]] == answers


@pytest.mark.skipif(not is_installed(), reason="llama-cpp-python is not installed (requirements-llamacpp.txt)")
def test_llama_cpp(folder, answers, tmp_path):
    import export_gguf

    export_gguf.main(
        export_gguf.ExportArguments(str(folder), output_dir=str(tmp_path), types=["f32"], self_test="none", threads=1)
    )
    assert converse(tmp_path, "llama.cpp") == answers
