"""The manifest of a merged folder: hashes against hashlib, every kind of damage named, notes that survive a kill."""

import hashlib
import json

import pytest

from utils.core.errors import InputError
from utils.lora.manifest import MANIFEST, Progress, describe_folder, verify_manifest, write_manifest


@pytest.fixture
def merged(tmp_path):
    folder = tmp_path / "merged"
    (folder / "original").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "original" / "params.json").write_text("[]")
    (folder / ".hidden").write_text("notes")
    write_manifest(folder, {"base": {"folder": "b"}}, {"dtype": "float16"}, {})
    return folder


def test_every_file_stands_in_it_with_its_hash(merged):
    outputs = json.loads((merged / MANIFEST).read_text())["outputs"]
    assert outputs == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in {
            "config.json": b"{}",
            "model.safetensors": b"weights",
            "original/params.json": b"[]",
        }.items()
    }
    assert verify_manifest(merged) == {"files": 3, "gb": 0.0, "by_size_alone": 0}


def test_all_damage_is_named_at_once(merged):
    (merged / "config.json").unlink()
    (merged / "model.safetensors").write_bytes(b"Weights")
    (merged / "original" / "params.json").write_text("[1]")
    (merged / "other.bin").write_bytes(b"")
    with pytest.raises(InputError) as raised:
        verify_manifest(merged)
    assert [line.strip() for line in str(raised.value).splitlines()[1:]] == [
        "config.json is missing",
        "model.safetensors was changed: its hash is another",
        "original/params.json has 3 bytes, need 2",
        "other.bin is not in the manifest; engines may load it",
    ]


def test_another_hash_or_none_is_checked_as_it_was_made(merged):
    blake3 = pytest.importorskip("blake3")
    weights = {"model.safetensors": {"blake3": blake3.blake3(b"weights").hexdigest()}, "original/params.json": {}}
    write_manifest(merged, {}, {}, weights)
    assert verify_manifest(merged) == {"files": 3, "gb": 0.0, "by_size_alone": 1}
    (merged / "original" / "params.json").write_text("{}")  # as long: without a hash nobody can tell
    verify_manifest(merged)
    (merged / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(InputError, match=r"model.safetensors was changed: its hash is another$"):
        verify_manifest(merged)


@pytest.mark.parametrize("content", ["[]", "{}", '{"outputs": {"a": {"bytes": "7"}}}'])
def test_a_file_that_is_no_manifest_is_named(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InputError, match="is no merge manifest"):
        verify_manifest(tmp_path)


def test_an_input_is_its_weights_and_small_files(tmp_path):
    for name in ("config.json", "tokenizer.model", "README.md", "model.safetensors"):
        (tmp_path / name).write_text(name)
    files = describe_folder(tmp_path, {tmp_path / "model.safetensors": {"sha256": "known"}})["files"]
    assert {name: entry["sha256"] for name, entry in files.items()} == {
        "config.json": hashlib.sha256(b"config.json").hexdigest(),
        "tokenizer.model": hashlib.sha256(b"tokenizer.model").hexdigest(),
        "model.safetensors": "known",
    }


def test_notes_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    progress = Progress(tmp_path)
    for name in ("one", "two", "three"):
        (tmp_path / name).write_bytes(name.encode())
        progress.add(name, len(name), {"sha256": "hash of " + name}, {"w": [1.5]})
    with open(progress.path, "a") as file:
        file.write('{"name": "fo')
    (tmp_path / "two").write_bytes(b"tw")  # its writing was cut off
    (tmp_path / "rest").write_bytes(b"")
    again = Progress(tmp_path)
    assert set(again.shards) == {"one", "three"} and again.shards["one"]["squares"] == {"w": [1.5]}
    again.discard_rest()
    assert sorted(path.name for path in tmp_path.iterdir()) == [Progress.FILE, "one", "three"]
