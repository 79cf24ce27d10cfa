"""The Dockerfile, which cannot be built where the tests run: its commands, paths and versions exist."""

import json
import re

from support.paths import ROOT
from utils.core.installation import OLDEST_PYTHON


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_it_runs_targets_of_the_makefile_in_a_folder_that_the_docs_mount():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    steps = instructions()
    assert steps[0][0] == "FROM" and [name for name, _ in steps][-1] == "CMD"
    command = json.loads(steps[-1][1])
    assert command == ["make", "demo"]
    made = [word for name, words in steps if name == "RUN" for word in re.findall(r"\bmake (?!g\+\+)([a-z-]+)", words)]
    assert made == ["setup"] and {*made, command[1]} <= targets
    workdir = dict(steps)["WORKDIR"]
    for page in ("installation.md", "installation_EN.md"):
        assert f'--volume "$PWD/output:{workdir}/output"' in (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert (dict(steps)["COPY"]) == ". ."


def test_its_python_is_new_enough():
    version = re.match(r"python:(\d+)\.(\d+)", instructions()[0][1])
    assert tuple(map(int, version.groups())) >= OLDEST_PYTHON


def test_what_make_needs_is_copied_and_what_runs_leave_is_not():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv*", "output"} <= set(ignored)
    for name in ("Makefile", "scripts", "examples", "requirements.txt", "constraints.txt"):
        assert (ROOT / name).exists() and name not in ignored
