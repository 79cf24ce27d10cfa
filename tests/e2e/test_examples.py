"""The examples against the project's own server: LangChain, privateGPT, clients; llama.cpp's own programs.

The model is tiny and has random weights, so its answers mean nothing; what it is asked does, and is looked at.
"""

import contextlib
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from support.models import save_llama
from support.paths import ROOT
from support.server import Live
from utils.core.arguments import InferenceArguments
from utils.generation.loading import EnginePlan
from utils.gguf import llamacpp
from utils.text.tokenizer import load_tokenizer

FOLDER = ROOT / "examples"
DOCUMENT = "\n\n".join(
    f"Paragraph {number}. The {animal} lives in the {place}. It sleeps at night and eats in the morning."
    for number, (animal, place) in enumerate([("cat", "house"), ("fox", "forest"), ("whale", "sea"), ("owl", "tree")])
)


class NotingLive(Live):
    """A server that notes the messages and texts that came, as the engine's prompts."""

    def __init__(self, folder):
        engine = EnginePlan(InferenceArguments(model_name_or_path=str(folder))).load(max_batch_size=4)
        self.prompts, self.embedded = [], []
        submit, embed = engine.submit, engine.embed

        def noting_submit(request, *args, **kwargs):
            self.prompts.append(self.engine.decode(request.prompt))
            return submit(request, *args, **kwargs)

        def noting_embed(prompts):
            self.embedded += [self.engine.decode(prompt).strip() for prompt in prompts]
            return embed(prompts)

        engine.submit, engine.embed = noting_submit, noting_embed
        super().__init__(engine)
        self.url += "/v1"

    def close(self):
        self.stop()
        self.engine.close()


@pytest.fixture(scope="module")
def model_folder(base_tokenizer_folder, tmp_path_factory):
    """A tiny model whose context holds whole documents in small pieces."""
    folder = tmp_path_factory.mktemp("examples") / "tiny"
    return save_llama(
        folder, load_tokenizer(base_tokenizer_folder), num_key_value_heads=4, max_position_embeddings=8192
    )


@pytest.fixture(scope="module")
def live(model_folder):
    live = NotingLive(model_folder)
    yield live
    live.close()


@pytest.fixture
def asked(live):
    live.prompts.clear()
    live.embedded.clear()
    return live


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT, encoding="utf-8")
    return path


@contextlib.contextmanager
def example(folder, name):
    """A module of an example, imported as its script imports what lies beside it."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER / folder))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER / folder))
        for new in set(sys.modules) - before:
            if str(FOLDER) in str(getattr(sys.modules[new], "__file__", "")):
                del sys.modules[new]


def run(folder, name, *arguments):
    with example(folder, name) as module:
        return module.main([str(argument) for argument in arguments])


def shell(script, *arguments, **environment):
    command = ["bash", str(FOLDER / "clients" / script), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


# ---------------------------------------------------------------- LangChain


@pytest.fixture(scope="module")
def langchain():
    pytest.importorskip("langchain_openai", reason="langchain is not installed")
    pytest.importorskip("langchain_text_splitters", reason="langchain is not installed")


def passages_in(text):
    return re.findall(r"Paragraph \d", text)


@pytest.mark.slow
@pytest.mark.usefixtures("langchain")
def test_questions_read_the_passages_in_each_way(asked, document):
    common = ["--file_path", document, "--base_url", asked.url, "--question", "Where does the fox live?", "--k", 3]
    common += ["--chunk_size", 120, "--chunk_overlap", 0, "--max_tokens", 8, "--language", "en"]
    run("langchain", "qa", *common, "--chain_type", "stuff")
    assert len(asked.prompts) == 1 and len(set(passages_in(asked.prompts[0]))) == 3
    assert "Question: Where does the fox live?" in asked.prompts[0]
    # Each passage was embedded as it is, and the question.
    assert sorted(passages_in(" ".join(asked.embedded))) == [f"Paragraph {number}" for number in range(4)]
    assert asked.embedded[-1] == "Where does the fox live?"
    asked.prompts.clear()
    answer = run("langchain", "qa", *common, "--chain_type", "refine")
    assert [len(passages_in(prompt)) for prompt in asked.prompts] == [1, 1, 1]
    assert len(set(map(str, map(passages_in, asked.prompts)))) == 3
    assert "Answer so far" not in asked.prompts[0] and "Answer so far" in asked.prompts[2]
    assert isinstance(answer, str)
    asked.prompts.clear()
    run("langchain", "qa", *common, "--chain_type", "map_reduce")
    assert sorted(len(passages_in(prompt)) for prompt in asked.prompts) == [0, 1, 1, 1]
    assert "Make one answer of them" in asked.prompts[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("langchain")
def test_summaries_read_the_whole_text_in_each_way(asked, document):
    common = ["--file_path", document, "--base_url", asked.url, "--chunk_size", 120, "--chunk_overlap", 0]
    common += ["--max_tokens", 8, "--language", "en"]
    run("langchain", "summarise", *common, "--chain_type", "stuff")
    assert [len(passages_in(prompt)) for prompt in asked.prompts] == [4]
    asked.prompts.clear()
    run("langchain", "summarise", *common, "--chain_type", "refine")
    assert [passages_in(prompt) for prompt in asked.prompts] == [[f"Paragraph {number}"] for number in range(4)]
    assert all("Summary so far" in prompt for prompt in asked.prompts[1:])
    asked.prompts.clear()
    run("langchain", "summarise", *common, "--chain_type", "map_reduce")
    assert sorted(len(passages_in(prompt)) for prompt in asked.prompts) == [0, 1, 1, 1, 1]


@pytest.mark.usefixtures("langchain")
@pytest.mark.slow
def test_questions_are_asked_on_the_terminal_in_chinese(asked, tmp_path):
    path = tmp_path / "诗人.txt"
    path.write_text("李白是唐代的诗人。" * 30, encoding="utf-8")
    command = [sys.executable, str(FOLDER / "langchain" / "qa.py"), "--file_path", str(path), "--base_url", asked.url]
    done = subprocess.run(
        [*command, "--max_tokens", "4", "--chunk_size", "60", "--chunk_overlap", "10"],
        input="李白是谁？\n\n",
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert len(asked.prompts) == 3 and all("李白是谁？" in prompt for prompt in asked.prompts)
    assert "现有的回答" in asked.prompts[1]
    # A text that the model's context has no room for.
    path.write_text("李白是唐代的诗人。" * 800, encoding="utf-8")
    command[1] = str(FOLDER / "langchain" / "summarise.py")
    done = subprocess.run([*command, "--chain_type", "stuff"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "8192" in done.stderr


# ---------------------------------------------------------------- privateGPT


@pytest.mark.usefixtures("langchain")
def test_documents_are_read_once_and_answers_name_their_passages(asked, tmp_path, capsys):
    source, store = tmp_path / "documents", tmp_path / "new" / "store.sqlite"
    (source / "below").mkdir(parents=True)
    for number, paragraph in enumerate(DOCUMENT.split("\n\n")):
        folder = source / "below" if number % 2 else source
        (folder / f"{number}.{'md' if number % 2 else 'txt'}").write_text(paragraph, encoding="utf-8")
    (source / "picture.png").write_bytes(b"\x89")
    common = ["--store", store, "--base_url", asked.url]
    ingest = ["--source_documents", source, *common]
    assert run("privategpt", "ingest", *ingest) == {"new": 4, "changed": 0, "unchanged": 0, "gone": 0}
    asked.embedded.clear()
    assert run("privategpt", "ingest", *ingest) == {"new": 0, "changed": 0, "unchanged": 4, "gone": 0}
    assert asked.embedded == []
    (source / "0.txt").write_text("The dog lives in the garden.", encoding="utf-8")
    (source / "2.txt").unlink()
    assert run("privategpt", "ingest", *ingest) == {"new": 0, "changed": 1, "unchanged": 2, "gone": 1}
    assert asked.embedded == ["The dog lives in the garden."]
    capsys.readouterr()
    ask = [*common, "--language", "en", "--max_tokens", 6, "--target_source_chunks", 3]
    ask += ["--question", "The dog lives in the garden."]
    answer = run("privategpt", "ask", *ask)
    [prompt] = asked.prompts
    assert all(f"[{number}]" in prompt for number in (1, 2, 3)) and "whale" not in prompt
    shown = capsys.readouterr().out
    # The passage that is the question itself is the nearest.
    assert f"[1] {source.resolve() / '0.txt'}, passage 1, similarity 1.00\nThe dog lives in the garden." in shown
    assert shown.startswith(answer) and shown.count(", passage 1,") == 3
    asked.prompts.clear()
    answer = run("privategpt", "ask", *ask, "--chain_type", "refine", "--hide_source", "--mute_stream")
    assert len(asked.prompts) == 3 and "Answer so far" in asked.prompts[2]
    assert capsys.readouterr().out == f"{answer}\n"


def test_the_store_finds_the_nearest_vectors(tmp_path):
    with example("privategpt", "store") as module:
        store = module.Store(tmp_path / "store.sqlite")
        assert store.search([1.0, 0.0], 3) == []
        generator = np.random.default_rng(0)
        vectors = generator.normal(size=(50, 8))
        store.replace("a", "hash", "model", [str(number) for number in range(50)], vectors.tolist())
        query = generator.normal(size=8)
        cosine = [vector @ query / np.linalg.norm(vector) / np.linalg.norm(query) for vector in vectors]
        found = store.search(query.tolist(), 5)
        assert [int(passage.text) for passage in found] == sorted(range(50), key=lambda n: -cosine[n])[:5]
        assert [passage.score for passage in found] == pytest.approx(sorted(cosine, reverse=True)[:5], abs=1e-6)
        with pytest.raises(ValueError, match="zip"):
            store.replace("a", "new", "model", ["x", "y"], [[1.0] * 8])
        assert store.files() == {"a": ("hash", "model")} and len(store.search(query.tolist(), 99)) == 50
        store.close()


@pytest.mark.usefixtures("langchain")
def test_what_cannot_be_asked_is_named(asked, tmp_path):
    store = tmp_path / "store.sqlite"
    for arguments, words in (
        (["ask", "--store", store, "--base_url", asked.url, "--question", "x"], "holds no document"),
        (["ask", "--store", store, "--base_url", "http://127.0.0.1:9/v1", "--question", "x"], "no server answers"),
        (["ingest", "--source_documents", tmp_path / "none", "--base_url", asked.url], "no .txt, .md, .pdf file"),
    ):
        with pytest.raises(SystemExit, match=words):
            run("privategpt", *arguments)
    (tmp_path / "a.txt").write_text("text")
    run("privategpt", "ingest", "--source_documents", tmp_path, "--store", store, "--base_url", asked.url)
    with pytest.raises(SystemExit, match="made with tiny, the server has other"):
        run("privategpt", "ask", "--store", store, "--base_url", asked.url, "--model", "other", "--question", "x")


# ---------------------------------------------------------------- clients


def test_curl_calls_every_interface(asked):
    done = shell("curl.sh", BASE_URL=asked.url)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.split(r"== (\S+)\n", done.stdout)[1:]
    assert parts[::2] == ["models", "chat/completions", "chat/completions", "completions", "embeddings"]
    models, chat, stream, completion, embeddings = parts[1::2]
    assert json.loads(models)["data"][0]["id"] == "tiny"
    assert json.loads(chat)["choices"][0]["message"]["role"] == "assistant"
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert events[-1] == "[DONE]" and json.loads(events[-2])["usage"]["completion_tokens"] <= 16
    assert json.loads(completion)["object"] == "text_completion"
    assert len(json.loads(embeddings)["data"]) == 2
    assert "为什么要减少污染，保护环境？" in asked.prompts[0] and "从前有一座山，" in asked.prompts[2]
    wrong = shell("curl.sh", BASE_URL=asked.url, MODEL="no-such-model")
    assert wrong.returncode != 0 and "no-such-model" in wrong.stdout


def test_the_official_client(asked, capsys):
    run("clients", "openai_client", "--base_url", asked.url)
    shown = capsys.readouterr().out
    assert re.search(r"^models: tiny$", shown, re.M)
    assert re.search(r"first token: '.*', probability 0\.\d+", shown)
    assert re.search(r"json: \{'城市': '(北京|上海)', '晴': (True|False)\}", shown)
    assert re.search(r"embeddings: 32 numbers, similarity -?[01]\.\d+", shown)
    assert re.search(r"error: .*no-such-model", shown)


def test_llama_cpps_programs_are_called_with_what_they_know(tmp_path):
    """With stand-ins that show their arguments; flags against llama.cpp's documentation of 2026."""
    for name in ("llama-cli", "llama-server"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    chat = shell("chat.sh", "my model.gguf", "--seed", "7", SYSTEM="be brief", THREADS="3", **path).stdout.splitlines()
    assert chat[1:3] == ["--model", "my model.gguf"] and chat[-2:] == ["--seed", "7"]
    assert chat[chat.index("--system-prompt") + 1] == "be brief" and chat[chat.index("--threads") + 1] == "3"
    server = shell("server.sh", "m.gguf", "--alias", "x", PORT="9090", **path).stdout.splitlines()
    assert server[server.index("--host") + 1] == "127.0.0.1" and server[server.index("--port") + 1] == "9090"
    assert server[-2:] == ["--alias", "x"]
    for script in ("chat.sh", "server.sh"):
        assert "pass a GGUF file" in shell(script).stderr
        absent = shell(script, "m.gguf", LLAMA_CLI="no-such-program", LLAMA_SERVER="no-such-program")
        assert absent.returncode == 2 and "no-such-program not found" in absent.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    "LLAMACPP_BIN" not in os.environ, reason="LLAMACPP_BIN, the folder of llama.cpp's programs, is not set"
)
@pytest.mark.skipif(
    not llamacpp.is_installed(), reason="llama-cpp-python is not installed (requirements-llamacpp.txt)"
)
def test_llama_cpps_own_programs_run_our_files(model_folder, tmp_path):
    import export_gguf

    out = tmp_path / "out"
    export_gguf.main(export_gguf.ExportArguments(str(model_folder), output_dir=str(out), types=["f16"], threads=1))
    programs = {
        "LLAMA_CLI": f"{os.environ['LLAMACPP_BIN']}/llama-cli",
        "LLAMA_SERVER": f"{os.environ['LLAMACPP_BIN']}/llama-server",
    }
    model = out / "model-F16.gguf"
    flags = ["--chat-template", "llama2", "--predict", "8", "--threads", "1"]
    chat = shell("chat.sh", model, *flags, "--single-turn", "--prompt", "Hello", CONTEXT="512", **programs)
    assert chat.returncode == 0, chat.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["bash", str(FOLDER / "clients" / "server.sh"), str(model), *flags]
    environment = {**os.environ, **programs, "PORT": str(port), "CONTEXT": "1024"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert time.monotonic() < end and server.poll() is None
            time.sleep(0.1)
        answer = shell("server.sh", "--ask", 'say "hi" \\ now', PORT=str(port))
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"
    finally:
        server.terminate()
        server.wait(20)


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("folder", ["langchain", "privategpt", "clients"])
def test_both_languages_carry_the_same_code_and_commands_that_exist(folder):
    blocks = [
        re.findall(r"```[a-z]*\n(.*?)```", (FOLDER / folder / name).read_text(encoding="utf-8"), re.S)
        for name in ("README.md", "README_EN.md")
    ]
    assert blocks[0] == blocks[1] and blocks[0]
    for path, flags in re.findall(r"^(?:bash|python) (\S+)(.*)", "\n".join(blocks[0]), re.M):
        assert (ROOT / path).is_file(), path
        source = (ROOT / path).read_text(encoding="utf-8")
        beside = [file.read_text(encoding="utf-8") for file in (ROOT / path).parent.glob("*.py")]
        if path.startswith("examples"):
            for flag in re.findall(r"--[a-z_]+", flags):
                assert any(flag in text for text in (source, *beside)), f"{path} {flag}"


@pytest.mark.parametrize("folder", ["langchain", "privategpt"])
def test_every_flag_of_an_example_is_described(folder):
    flags = set()
    for path in (FOLDER / folder).glob("*.py"):
        flags |= set(re.findall(r'add_argument\((?:"-\w", )?"(--\w+)"', path.read_text(encoding="utf-8")))
    assert len(flags) > 8
    for name in ("README.md", "README_EN.md"):
        text = (FOLDER / folder / name).read_text(encoding="utf-8")
        assert not {flag for flag in flags if f"`{flag}`" not in text}
