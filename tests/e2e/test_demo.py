"""The recipe as a list: what each command reads is a stage it needs, launchers and files exist, nothing runs dry."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import demo
import pytest

from support.paths import SCRIPTS
from support.scripts import script_flags
from utils.report.recipe import STAGES
from utils.report.stage_runner import STAGE_LOG

RUN = "out of the way/run"  # words are kept together


flags_of = functools.cache(script_flags)


def settings(stage):
    """(environment, launcher, flags) of a stage's command."""
    words = stage.words[1:]
    bash = words.index("bash")
    return dict(word.split("=", 1) for word in words[:bash]), Path(words[bash + 1]), words[bash + 2 :]


@pytest.mark.parametrize("quick", [False, True])
def test_a_stage_needs_the_stages_whose_output_its_command_names(quick):
    stages = demo.list_stages(RUN, 7, quick)
    for number, stage in enumerate(stages):
        places = re.findall(rf"{RUN}/([\w/.]+)", "\n".join(stage.words))
        read = {other.name for other in stages for place in places if f"{place}/".startswith(f"{other.makes}/")}
        assert read - {stage.name} == {*stage.needs}, stage.name
        assert set(stage.needs) <= {other.name for other in stages[:number]}
        assert stage.last == "" or f"OUT={RUN}/{stage.makes}" in stage.words


def test_commands_are_those_of_launchers_and_their_files_exist():
    whole, quick = demo.list_stages(RUN, 7), demo.list_stages(RUN, 7, quick=True)
    for stage in [*whole, *(stage for stage in quick if stage not in whole)]:
        environment, launcher, flags = settings(stage)
        assert launcher.parent == SCRIPTS and launcher.is_file()
        assert environment.get("SEED", "7") == "7"
        printed = subprocess.run(
            stage.words,
            env={"PATH": "/usr/bin:/bin", "DRY_RUN": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        words = shlex.split(printed)
        assert words[2:][-len(flags) :] == flags or not flags
        known = flags_of(Path(words[1]).name)
        assert {word for word in flags if word.startswith("--")} <= known, stage.name
        data = [word.rsplit("=", 1)[-1] for word in words if "/examples/data/" in word]
        assert all(Path(path).exists() for path in data), stage.name


def test_the_report_knows_every_stage_in_its_launcher_and_place():
    stages = {stage.name: stage for stage in demo.list_stages(RUN, 7)}
    assert stages.keys() == STAGES.keys()
    for name, known in STAGES.items():
        assert known.launcher == settings(stages[name])[1].name
        assert known.mark == stages[name].makes or known.mark.startswith(f"{stages[name].makes}/")


def test_a_dry_run_prints_all_and_makes_nothing(tmp_path, capsys):
    demo.main(demo.DemoArguments(output_dir=str(tmp_path / "run"), seed=3, dry_run=True))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "== base_tokenizer" and len(printed) == 2 * len(demo.STAGES)
    assert f"SEED=3 bash {SCRIPTS}/run_pt.sh" in printed[3]
    assert not (tmp_path / "run").exists()


def test_a_first_look_is_the_recipe_with_fewer_steps_up_to_the_tuned_model(monkeypatch, capsys, tmp_path):
    whole, quick = ({stage.name: stage for stage in demo.list_stages(RUN, 7, quick)} for quick in (False, True))
    *recipe, look = quick
    assert recipe == list(whole)[: len(recipe)] and recipe[-1] == "assistant" and look == "look"
    for name in recipe:
        words = whole[name].words
        assert quick[name].words[: len(words)] == words
        assert (quick[name].words != words) == ("SEED=7" in words), "training alone is shorter"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run_stages", lambda stages, folder: 0)
    demo.main(demo.DemoArguments(quick=True))
    assert "MODEL=output/quick/assistant bash" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failure_ends_it_with_the_status_of_the_stage_and_without_a_report(tmp_path, monkeypatch):
    """As a command: the launcher, whose stages fail here since their python is none."""
    fails = tmp_path / "python"
    fails.write_text(f'#!/bin/sh\ncase "$1" in */demo.py) exec {sys.executable} "$@";; *) exit 5;; esac\n')
    fails.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(fails), "OUT": str(tmp_path / "run")}
    done = subprocess.run(["bash", str(SCRIPTS / "run_demo.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 5 and done.stdout.split("\n")[0] == "== base_tokenizer", done.stderr
    assert not (tmp_path / "run" / STAGE_LOG).exists()
