"""downloads: which files are wanted, and that they come whole through broken connections and wrong bytes."""

import errno
import hashlib
import random
import shutil
import subprocess
import time

import pytest

from support.hub_stand_in import HubStandIn
from utils.core import downloads
from utils.core.downloads import (
    RemoteFile,
    Repository,
    bytes_here,
    check_space,
    choose_files,
    download_files,
    partial_name,
)
from utils.core.errors import InputError, Unfinished

CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_WAIT", 0.0)


@pytest.fixture
def hub():
    with HubStandIn({"big.bin": CONTENT, "small.json": b"{}"}, large=["big.bin"]) as stand_in:
        yield stand_in


def remote(hub, name="big.bin", **changes):
    sha256 = hashlib.sha256(hub.files[name]).hexdigest()
    settings = {"path": name, "size": len(hub.files[name]), "url": f"{hub.store}/store/{name}", "sha256": sha256}
    return RemoteFile(**(settings | changes))


def bring(folder, *files, headers=None):
    told = []
    repository = Repository("owner/name", "model", "main", files, headers or {})
    download_files(repository, folder, 2, told.append)
    return sum(told)


def listing(*names, kind="model"):
    return Repository("owner/name", kind, "main", tuple(RemoteFile(name, 1, "") for name in names), {})


def chosen(*names, include=(), exclude=(), kind="model"):
    return [file.path for file in choose_files(listing(*names, kind=kind), include, exclude)]


# ---------------------------------------------------------------- which files


def test_of_a_model_one_kind_of_weights_is_wanted():
    settings = ["config.json", "tokenizer.model"]
    weights = ["model-1.safetensors", "consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth"]
    others = ["tf_model.h5", "flax_model.msgpack", ".gitattributes", "onnx/model.onnx"]
    assert chosen(*settings, *weights, *others) == [*settings, "model-1.safetensors"]
    assert chosen(*settings, *weights[2:], *others) == [*settings, "pytorch_model.bin"]
    assert chosen(*settings, weights[3]) == [*settings, weights[3]]
    assert chosen("consolidated.safetensors", "params.json") == ["consolidated.safetensors", "params.json"]


def test_of_a_data_set_everything_is_wanted():
    assert chosen("a.bin", "b.safetensors", "d/c.json", ".x", "d/.y", kind="dataset") == [
        "a.bin",
        "b.safetensors",
        "d/c.json",
    ]


def test_patterns():
    names = ("a.json", "d/b.json", "d/c.bin", "model.safetensors")
    assert chosen(*names, include=["*.json"]) == ["a.json", "d/b.json"]
    assert chosen(*names, include=["d/"]) == ["d/b.json", "d/c.bin"]
    assert chosen(*names, exclude=["d/*"]) == ["a.json", "model.safetensors"]
    with pytest.raises(InputError, match=r"--include '\*.txt': owner/name has no such file; it has a.json"):
        chosen(*names, include=["*.json", "*.txt"])
    with pytest.raises(InputError, match="no file is left"):
        chosen(*names, exclude=["*"])


def test_one_of_several_gguf_files_has_to_be_asked_for():
    with pytest.raises(InputError, match="has 2 GGUF files"):
        chosen("q4.gguf", "q8.gguf")
    assert chosen("q4.gguf", "q8.gguf", include=["q4*"]) == ["q4.gguf"]
    assert chosen("q4.gguf", "q8.gguf", "model.safetensors") == ["model.safetensors"]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name):
    with pytest.raises(InputError, match="leads out of its folder"):
        downloads._checked("owner/name", [RemoteFile(name, 1, "")])


def test_hashes_are_those_of_other_programs(tmp_path):
    """git's own hash of a blob, and sha256sum."""
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    for tool, name in (("git", "git_hash"), ("sha256sum", "sha256")):
        if shutil.which(tool) is None:
            continue
        command = ["git", "hash-object", str(file)] if tool == "git" else [tool, str(file)]
        digest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        assert RemoteFile("file", len(CONTENT), "", **{name: digest}).matches(file)
        assert not RemoteFile("file", len(CONTENT), "", **{name: digest[::-1]}).matches(file)
    assert not RemoteFile("file", len(CONTENT) + 1, "").matches(file)


# ---------------------------------------------------------------- bringing them


def test_files_come_whole(hub, tmp_path):
    assert bring(tmp_path, remote(hub), remote(hub, "small.json", path="d/small.json")) == len(CONTENT) + 2
    assert (tmp_path / "big.bin").read_bytes() == CONTENT and (tmp_path / "d/small.json").read_bytes() == b"{}"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["big.bin", "d", "small.json"]


def test_a_cut_connection_goes_on_where_it_broke(hub, tmp_path):
    hub.faults["big.bin"] = ["cut", "busy", "limited", "cut"]
    assert bring(tmp_path, remote(hub)) == len(CONTENT)
    assert (tmp_path / "big.bin").read_bytes() == CONTENT
    ranges = [asked for _, asked, _ in hub.served]
    assert ranges == [None, "bytes=150000-", "bytes=150000-", "bytes=150000-", "bytes=225000-"]
    assert sum(sent for *_, sent in hub.served) == len(CONTENT)  # no byte came twice


def test_what_an_earlier_run_left_is_gone_on_with(hub, tmp_path):
    file = remote(hub)
    partial_name(tmp_path / "big.bin").write_bytes(CONTENT[:1234])
    assert bytes_here(tmp_path, file) == 1234
    assert bring(tmp_path, file) == len(CONTENT) - 1234
    assert hub.served == [("big.bin", "bytes=1234-", len(CONTENT) - 1234)]
    assert bytes_here(tmp_path, file) == len(CONTENT) and bring(tmp_path, file) == 0 and len(hub.served) == 1


def test_a_server_without_ranges_sends_it_all_again(hub, tmp_path):
    for faults in (["cut", "whole"], ["cut", "no part"]):
        hub.faults["big.bin"] = list(faults)
        assert bring(tmp_path, remote(hub)) == len(CONTENT)
        assert (tmp_path / "big.bin").read_bytes() == CONTENT
        (tmp_path / "big.bin").unlink()


def test_wrong_bytes_are_fetched_again_once_and_then_refused(hub, tmp_path):
    hub.faults["big.bin"] = ["other"]
    assert bring(tmp_path, remote(hub)) == len(CONTENT)
    assert (tmp_path / "big.bin").read_bytes() == CONTENT
    (tmp_path / "big.bin").unlink()
    hub.faults["big.bin"] = ["other", "other"]
    with pytest.raises(Unfinished, match=r"big\.bin: what came, twice, has not the hash"):
        bring(tmp_path, remote(hub))
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_file_is_found_by_the_hash(hub, tmp_path):
    partial_name(tmp_path / "big.bin").write_bytes(b"x" * 1000)
    bring(tmp_path, remote(hub))
    assert (tmp_path / "big.bin").read_bytes() == CONTENT


def test_it_gives_up_after_some_tries_and_keeps_what_came(hub, tmp_path):
    hub.faults["big.bin"] = ["cut", *["busy"] * 20]
    with pytest.raises(Unfinished, match="Service Unavailable; run the same command again"):
        bring(tmp_path, remote(hub))
    assert bytes_here(tmp_path, remote(hub)) == len(CONTENT) // 2 and len(hub.served) == downloads.TRIES


def test_an_empty_file_and_one_that_fails_beside_a_slow_one(hub, tmp_path, monkeypatch):
    hub.files["empty"] = b""
    assert bring(tmp_path, remote(hub, "empty")) == 0 and (tmp_path / "empty").read_bytes() == b""
    monkeypatch.setattr(
        downloads, "FIRST_WAIT", 60.0
    )  # the first file waits so long, unless the second's error ends it
    hub.faults["big.bin"] = ["busy"]
    began = time.monotonic()
    with pytest.raises(Unfinished, match="Not Found"):
        bring(tmp_path, remote(hub), remote(hub, "small.json", url=f"{hub.url}/owner/name/resolve/main/nothing"))
    assert time.monotonic() - began < 30


def test_what_is_not_there_is_not_asked_for_again(hub, tmp_path):
    with pytest.raises(Unfinished, match="Not Found"):
        bring(tmp_path, remote(hub, url=f"{hub.url}/owner/name/resolve/main/nothing"))


def test_keys_are_not_sent_to_another_host(hub, tmp_path):
    address = f"{hub.url}/api/v1/models/owner/name/repo?Revision=master&FilePath=big.bin"
    bring(tmp_path, remote(hub, url=address), headers={"Authorization": "Bearer secret", "Cookie": "m=secret"})
    assert hub.keys == [(hub.url, "Authorization", "Bearer secret"), (hub.url, "Cookie", "m=secret")]
    assert hub.served == [("big.bin", None, len(CONTENT))]


def test_a_full_disk_is_said_before_and_meanwhile(hub, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"1000000\.00 GB are needed, \d+\.\d\d GB are free there"):
        check_space(tmp_path / "new" / "folder", 10**15)
    check_space(tmp_path / "new", 1)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Unfinished, match=r"no space left while writing big\.bin; free some"):
        monkeypatch.setattr(downloads, "_blocks", refuse)
        bring(tmp_path, remote(hub))
