"""hub: a name is a folder or a hub id by one rule, and the cache serves where the hub cannot be reached."""

import os
import subprocess
import sys

import pytest

from support.paths import SCRIPTS
from utils.core.errors import InputError
from utils.core.hub import fetch, find_folder, is_hub_id, not_found

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_home_folder_is_known_everywhere(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_folder("~/m") == tmp_path / "m"
    assert find_folder("~/other") is None and find_folder(tmp_path / "m") == tmp_path / "m"


def test_what_may_be_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "file").touch()
    assert is_hub_id("owner/name-1.5_x")
    assert not any(map(is_hub_id, ("name", "./name", "../name", "/owner/name", "~/name", "a/b/c", "owner/file")))


def test_what_cannot_be_fetched_is_named():
    def download(hub_id):
        raise FileNotFoundError(f"{hub_id} is not there\nmore")

    with pytest.raises(InputError, match=r"^model folder not found: a/b; as a hub id .*: a/b is not there; x"):
        fetch("a/b", "model", download, "; x")


def test_a_name_that_is_nothing_and_a_file_are_told_apart(tmp_path):
    for name in ("model.gguf", "notes.txt"):
        (tmp_path / name).touch()
    assert "model folder not found: ./nowhere" in str(not_found("./nowhere", "model"))
    assert "--engine llama.cpp" in str(not_found(tmp_path / "model.gguf", "model"))
    assert "--engine" not in str(not_found(tmp_path / "absent.gguf", "model"))
    assert "notes.txt is a file; pass the folder" in str(not_found(tmp_path / "notes.txt", "tokenizer"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"HF_HUB_OFFLINE": "TRUE"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}],
    ids=["offline", "no network"],
)
def test_a_cached_model_and_its_tokenizer_are_found(settings, tmp_path, tiny_model_folder):
    """As huggingface_hub would have downloaded it, in a process that was started so; nothing is retried for long."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / COMMIT).symlink_to(tiny_model_folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    code = (
        "from utils.text.tokenizer import load_tokenizer\n"
        "from utils.weights.config import local_folder\n"
        "from utils.weights.model_folder import read_model\n"
        "name = 'owner/tiny'\n"
        "print(local_folder(name).name, read_model(name).config.vocab_size, len(load_tokenizer(name)))"
    )
    settings = {**settings, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    environment = {**os.environ, **settings, "PYTHONPATH": str(SCRIPTS)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert result.stdout.split() == [COMMIT, "400", "400"], result.stderr
