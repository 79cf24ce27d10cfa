"""download.py against a local server that speaks the hubs' endpoints: whole runs, broken ones, half folders."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import download
import pytest
import yaml

from support.hub_stand_in import COMMIT, HubStandIn
from support.paths import ROOT, SCRIPTS
from support.scripts import next_words
from utils.core import downloads
from utils.core.errors import InputError, Unfinished

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": random.Random(1).randbytes(400_000),
    "pytorch_model.bin": b"the same weights again",
    "sub/notes.txt": "笔记".encode(),
    ".gitattributes": b"x",
}
WANTED = {"config.json", "model.safetensors", "sub/notes.txt"}


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(downloads, "FIRST_WAIT", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    with HubStandIn(FILES, large=["model.safetensors"]) as stand_in:
        # As HF_ENDPOINT=... HF_HUB_OFFLINE=0 would have it in a process of its own.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        template = f"{stand_in.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", stand_in.url)
        yield stand_in


def run_main(folder, **settings):
    return download.main(download.DownloadArguments(repo_id="owner/name", output_dir=str(folder), **settings))


def contents(folder):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop("run_config.yaml", None)
    return files


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_a_model_comes_whole_and_a_second_run_checks_it(hub, name, tmp_path, caplog):
    caplog.set_level("INFO")
    hub.faults["model.safetensors"] = ["cut"]
    figures = run_main(tmp_path / "m", hub=name)
    size = sum(len(FILES[path]) for path in WANTED)
    assert figures == {"files": 3, "bytes": size, "downloaded": size, "output_dir": str(tmp_path / "m")}
    assert contents(tmp_path / "m") == {path: FILES[path] for path in WANTED}
    text = (tmp_path / "m" / "run_config.yaml").read_text()
    revision = "master" if name == "modelscope" else COMMIT
    assert yaml.safe_load(text)["repo_id"] == "owner/name" and f"# revision: {revision}" in text
    assert next_words(caplog.text)[:3] == [f"MODEL={tmp_path}/m", "bash", "scripts/run_inference.sh"]
    assert ("checked by their size alone" in caplog.text) == (name == "modelscope")
    served = len(hub.served)
    assert run_main(tmp_path / "m", hub=name)["downloaded"] == 0
    assert len(hub.served) == served and "complete already" in caplog.text


def test_a_data_set_in_pages(hub, tmp_path, monkeypatch, caplog):
    hub.page = 2
    monkeypatch.setattr(downloads, "MODELSCOPE_PAGE", 2)
    caplog.set_level("INFO")
    figures = run_main(tmp_path / "d", hub="modelscope", kind="dataset")
    assert figures["files"] == 4 and set(contents(tmp_path / "d")) == WANTED | {"pytorch_model.bin"}
    assert next_words(caplog.text) == ["MODEL=BASE", f"DATA={tmp_path}/d", "bash", "scripts/run_sft.sh"]


def test_what_broke_off_goes_on(hub, tmp_path, caplog):
    caplog.set_level("INFO")
    hub.faults["model.safetensors"] = ["cut", *["busy"] * 20]
    with pytest.raises(Unfinished):
        run_main(tmp_path / "m", num_connections=1)
    assert not (tmp_path / "m").exists()
    hub.faults.clear()
    served = len(hub.served)
    assert run_main(tmp_path / "m", num_connections=1)["downloaded"] < 400_000
    assert "going on: 0.000 of 0.000 GB are there" in caplog.text
    assert ("model.safetensors", "bytes=200000-", 200_000) in hub.served[served:]
    assert contents(tmp_path / "m") == {path: FILES[path] for path in WANTED}


def test_what_changed_on_the_hub_meanwhile_starts_anew(hub, tmp_path):
    hub.faults["model.safetensors"] = ["cut", *["busy"] * 20]
    with pytest.raises(Unfinished):
        run_main(tmp_path / "m")
    hub.faults.clear()
    hub.files["model.safetensors"] = other = random.Random(2).randbytes(400_000)
    run_main(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == other


def test_a_half_or_changed_folder_is_refused(hub, tmp_path):
    folder = tmp_path / "m"
    run_main(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"x" * 400_000)
    with pytest.raises(
        InputError, match=r"of 3 files 1 are missing and 1 are not what the hub has \(config.json, model"
    ):
        run_main(folder)
    run_main(folder, overwrite=True)
    assert contents(folder) == {path: FILES[path] for path in WANTED}


def test_a_wrong_hash_leaves_no_folder(hub, tmp_path):
    hub.faults["config.json"] = ["other", "other"]
    with pytest.raises(InputError, match="has not the hash that the hub publishes"):
        run_main(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("name", "variable"), [("huggingface", "HF_TOKEN"), ("modelscope", "MODELSCOPE_API_TOKEN")])
def test_keys_come_from_the_environment(hub, name, variable, tmp_path, monkeypatch, caplog):
    hub.locked = True
    with pytest.raises(InputError, match=f"accept its terms on its page and set {variable}"):
        run_main(tmp_path / "m", hub=name)
    monkeypatch.setenv(variable, "secret")
    run_main(tmp_path / "m", hub=name)
    assert ("HF_TOKEN is sent to HF_ENDPOINT" in caplog.text) == (name == "huggingface")  # which is a mirror here
    assert hub.keys and all(host == hub.url for host, *_ in hub.keys)
    assert not any(b"secret" in content for content in contents(tmp_path / "m").values())
    assert "secret" not in (tmp_path / "m" / "run_config.yaml").read_text()


def test_nothing_is_fetched_by_a_dry_run_or_onto_a_full_disk(hub, tmp_path, capsys, monkeypatch):
    run_main(tmp_path / "m", dry_run=True)
    assert "        400,000  model.safetensors\n" in capsys.readouterr().out
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(InputError, match=r"GB are needed, 0\.00 GB are free there"):
        run_main(tmp_path / "m")
    assert hub.served == [] and list(tmp_path.iterdir()) == []


def test_bad_arguments_and_names(hub, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="name what is to be downloaded"):
        download.DownloadArguments()
    with pytest.raises(InputError, match="need OWNER/NAME"):
        download.DownloadArguments(repo_id="https://huggingface.co/owner/name", num_connections=0)
    for name in ("huggingface", "modelscope"):
        with pytest.raises(InputError, match="has no model owner/other at revision x"):
            download.main(download.DownloadArguments(repo_id="owner/other", hub=name, revision="x"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        run_main(tmp_path / "m")


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": random.Random(3).randbytes(4_000_000)}
    with HubStandIn(files, large=["model.safetensors"]) as hub:
        hub.faults["model.safetensors"] = ["cut", *["busy"] * 5]  # it waits for seconds then
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "REPO": "owner/name"}
        environment |= {"OUT": str(tmp_path / "m"), "PYTHON": sys.executable}
        command = ["bash", str(SCRIPTS / "run_download.sh")]
        first = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
        while not any(sent for name, _, sent in hub.served if name == "model.safetensors"):
            assert first.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert not (tmp_path / "m").exists()
        hub.faults.clear()
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "going on: 0.002 of 0.004 GB" in done.stderr and contents(tmp_path / "m") == files
