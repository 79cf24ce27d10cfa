"""What GitHub runs: actions pinned by commit, targets that exist, and the notes of a release out of CHANGELOG.md."""

import os
import re
import subprocess

import pytest
import yaml

from support.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path):
    for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step
        made = re.findall(r"^make (\S+)", step.get("run", ""), re.M)
        assert set(made) <= targets
    # An action has one commit in all workflows.
    pinned = {tuple(step["uses"].split("@")) for each in WORKFLOWS for step in steps(each) if "uses" in step}
    assert len(pinned) == len({name for name, _ in pinned})


CHANGELOG = (
    "# Log\n\n## Unreleased\n\n- later\n\n## 1.2.0 - 2027-01-01\n\n### Added\n- this\n\n## 1.2 - old\n\n- older\n"
)


@pytest.mark.parametrize(
    ("tag", "cited", "notes"),
    [
        ("v1.2.0", "1.2.0", "\n### Added\n- this\n\n"),
        ("v1.2.0", "1.1.0", None),  # another version is cited
        ("v1.2.1", "1.2.1", None),  # nothing is written of it
    ],
)
def test_the_notes_of_a_release_are_its_part_of_the_changelog(tag, cited, notes, tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {cited}\n")
    path = ROOT / ".github" / "workflows" / "release.yml"
    script = next(step["run"] for step in steps(path) if step.get("name") == "Notes")
    environment = {**os.environ, "GITHUB_REF_NAME": tag}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (notes is not None), done.stdout + done.stderr
    if notes is not None:
        assert (tmp_path / "notes.md").read_text() == notes


def test_the_bug_report_asks_for_what_the_doctor_says():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text(encoding="utf-8"))
    asked = {field["id"]: field for field in form["body"] if "id" in field}
    assert "make doctor" in asked["doctor"]["attributes"]["description"]
    assert asked["doctor"]["validations"]["required"] is True
