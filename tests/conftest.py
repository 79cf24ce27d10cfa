"""Fixtures: everything a test needs is made here, small and offline, in the session's temporary folder."""

import io
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
EXAMPLES = ROOT / "examples" / "data"
sys.path.insert(0, str(SCRIPTS))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NEW_PIECES = ["的", "是", "猫", "狗", "猫狗", "▁zebra"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
SHARED_DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))


def pytest_configure(config):
    """Let Ctrl-C tests work in background jobs, which a shell starts with SIGINT ignored; children inherit that."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Skip, with the reason, what this machine cannot run."""
    absent = pytest.mark.skip(reason=f"shared data not found at {SHARED_DATA} (set SHARED_DATA)")
    for item in items:
        if "shared_data" in item.keywords and not SHARED_DATA.is_dir():
            item.add_marker(absent)
        if "gpu" in item.keywords:
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def same_environment():
    """What a test sets in the environment (DeepSpeed: the port of its processes) does not reach the next one's."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return SHARED_DATA


def write_sentencepiece(folder: Path, model: bytes) -> Path:
    """A Llama-2-style tokenizer folder, as people have them: tokenizer.model and a short tokenizer_config.json."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def train_sentencepiece(lines: list[str], vocab_size: int) -> bytes:
    """A BPE model with Llama-2's settings: byte fallback, dummy prefix, no normalisation."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def base_tokenizer_folder(tmp_path_factory) -> Path:
    """An English sentencepiece tokenizer of 400 pieces."""
    lines = (EXAMPLES / "pretrain" / "en_train.txt").read_text(encoding="utf-8").splitlines()[:1500]
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "base", train_sentencepiece(lines, 400))


@pytest.fixture(scope="session")
def extended_tokenizer_folder(tmp_path_factory, base_tokenizer_folder) -> Path:
    """The base tokenizer with a few Chinese pieces and one English word after its own."""
    from utils.pieces import read_sentencepiece_model
    from utils.vocabulary import append_pieces

    proto = append_pieces(read_sentencepiece_model(base_tokenizer_folder / "tokenizer.model"), NEW_PIECES)
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "extended", proto.SerializeToString())


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, base_tokenizer_folder) -> Path:
    """A 2-layer, width-32 Llama with random weights and the base tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from utils.tokenization import load_tokenizer, save_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = load_tokenizer(base_tokenizer_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the library's small random weights leave logits nearly equal
            parameter.mul_(3.0)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements-dev.txt)")
    if not Path(CHROMIUM).is_file():
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()
