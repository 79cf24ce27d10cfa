"""Fixtures: everything a test needs is made here, small and offline, in the session's temporary folder."""

import contextlib
import gc
import logging
import os
import signal
import threading
from pathlib import Path

import pytest

from support.paths import CHROMIUM, EXAMPLES, FLAGS, SHARED_DATA
from support.tokenizers import NEW_PIECES, train_sentencepiece, write_sentencepiece

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As each script does: bitsandbytes loads the compiler when it is imported, which takes seconds of each worker.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ["LC_ALL"] = "C.UTF-8"  # a Chinese shell has the scripts print the FAQ before an error


def pytest_configure(config):
    """Let Ctrl-C tests work in background jobs, which a shell starts with SIGINT ignored; children inherit that."""
    gc.disable()  # until all modules are there, see pytest_collection_finish
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


def pytest_collection_finish():
    """What all test modules have brought in lives to the end; collections, many while it grows and one at each end of
    a training run, need not look through it time and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def same_environment():
    """What a test sets in the environment (DeepSpeed: the port of its processes) does not reach the next one's."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def good_result_files():
    """What a script writes as a result is what the report's classes say (evaluation/result_files)."""
    mistakes = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: mistakes.append(record.getMessage())
    logger = logging.getLogger("utils.evaluation.result_files")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not mistakes


@pytest.fixture(autouse=True)
def quick_runs(request, monkeypatch):
    """Training runs of quick tests do without what takes half a second each and has tests of its own: the plan of
    their memory, and the rendering of what they draw."""
    trains, about_plans = not {"e2e", "rlhf"}.isdisjoint(request.path.parts), "plan" in request.path.name
    if trains and not about_plans and request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr("utils.planning.request.plan_run", lambda *args, **kwargs: None)
        monkeypatch.setattr("utils.training.plots.saved_figure", unrendered_figure)


@contextlib.contextmanager
def unrendered_figure(path, width, height, **settings):
    from matplotlib.figure import Figure

    yield Figure(figsize=(width, height))
    path.touch()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return SHARED_DATA


@pytest.fixture(scope="session")
def base_tokenizer_folder(tmp_path_factory) -> Path:
    """An English sentencepiece tokenizer of 400 pieces."""
    lines = (EXAMPLES / "pretrain" / "en_train.txt").read_text(encoding="utf-8").splitlines()[:1500]
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "base", train_sentencepiece(lines, 400))


@pytest.fixture(scope="session")
def extended_tokenizer_folder(tmp_path_factory, base_tokenizer_folder) -> Path:
    """The base tokenizer with a few Chinese pieces and one English word after its own."""
    from utils.text.pieces import read_sentencepiece_model
    from utils.text.vocabulary import append_pieces

    proto = append_pieces(read_sentencepiece_model(base_tokenizer_folder / "tokenizer.model"), NEW_PIECES)
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "extended", proto.SerializeToString())


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, base_tokenizer_folder) -> Path:
    """A 2-layer, width-32 Llama with random weights and the base tokenizer."""
    from support.models import save_llama
    from utils.text.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_llama(folder, load_tokenizer(base_tokenizer_folder), scale=3.0, max_position_embeddings=512)


@pytest.fixture
def small_blocks(monkeypatch):
    """Weights are read in blocks of a few rows, so that small ones have many."""
    from utils.weights import reader

    monkeypatch.setattr(reader, "BLOCK_BYTES", 1)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements-dev.txt)")
    if not Path(CHROMIUM).is_file():
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()
