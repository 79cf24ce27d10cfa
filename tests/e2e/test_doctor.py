"""doctor.py: starts where nothing is installed, says what works, looks at a model's folder."""

import json
import re
import shutil
import subprocess
import sys

import doctor
import pytest

from support.paths import ROOT, SCRIPTS
from utils.core.installation import IMPORTED, Imports


@pytest.fixture
def quick_imports(monkeypatch):
    """As if every package had been imported in a process of its own, which takes half a minute."""
    done = Imports(dict.fromkeys(IMPORTED), {"cuda": None, "devices": []})
    monkeypatch.setattr(doctor, "try_imports", lambda packages: done)
    monkeypatch.setattr(doctor, "check_llama_cpp", dict)


def test_it_starts_without_any_package():
    """-S -E: no site-packages; no torch, no transformers."""
    command = [sys.executable, "-S", "-E", str(SCRIPTS / "doctor.py"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["core_works"] is False and "torch" in told["works"]["training"]["lacks"]
    assert told["remedies"][0] == "pip install -r requirements.txt -c constraints.txt"
    help_text = subprocess.run([*command[:-1], "--help"], cwd=ROOT, capture_output=True, text=True)
    assert help_text.returncode == 0 and "--network" in help_text.stdout


@pytest.mark.slow
def test_another_script_says_what_is_missing_without_a_traceback():
    for script in ("sft.py", "eval_alignment.py"):
        command = [sys.executable, "-S", "-E", str(SCRIPTS / script), "--help"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "scripts/doctor.py" in done.stderr


@pytest.mark.slow
def test_what_works_here_and_a_model(quick_imports, tiny_model_folder, capsys):
    told = doctor.main(doctor.DoctorArguments(model=str(tiny_model_folder)))
    assert told["core_works"] and told["works"]["training"]["works"]
    assert not told["works"]["vLLM"]["works"] and not any("requirements-gpu" in each for each in told["remedies"])
    printed = capsys.readouterr().out
    assert "\nwhat works here:\n" in printed and "pt.py, sft.py" in printed
    assert "ok      same tokens" in printed and "model" in printed


def test_a_broken_model_folder_ends_with_status_1(quick_imports, tiny_model_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(SystemExit) as end:
        doctor.main(doctor.DoctorArguments(model=str(folder), json=True))
    told = json.loads(capsys.readouterr().out)
    assert end.value.code == 1 and told["core_works"]
    assert any(each["state"] == "wrong" and "config.json:1: broken JSON" in each["text"] for each in told["findings"])


def test_a_core_that_cannot_be_imported_is_status_1(quick_imports, monkeypatch, capsys):
    broken = Imports({**dict.fromkeys(IMPORTED), "torch": "OSError: libtorch.so"}, {})
    monkeypatch.setattr(doctor, "try_imports", lambda packages: broken)
    with pytest.raises(SystemExit) as end:
        doctor.main(doctor.DoctorArguments())
    printed = capsys.readouterr().out
    assert end.value.code == 1 and "cannot be imported: OSError: libtorch.so" in printed


@pytest.mark.slow
def test_the_whole_of_it():
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "doctor.py"), "--json"], cwd=ROOT, capture_output=True, text=True
    )
    told = json.loads(done.stdout)
    states = {each["name"]: each["state"] for each in told["findings"]}
    assert done.returncode == 0 and told["core_works"] and states["torch"] == states["deepspeed"] == "ok"


@pytest.mark.slow
def test_a_folder_that_other_programs_cut_otherwise_is_said(quick_imports, tiny_model_folder, tmp_path, capsys):
    """tokenizer.model, which this project reads, and a tokenizer.json beside it that has lost its merges."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit):
        doctor.main(doctor.DoctorArguments(model=str(folder)))
    printed = capsys.readouterr().out
    assert re.search(r"\nwrong   same tokens +other programs .* cut [1-9]\d* % of sample lines unlike", printed)
