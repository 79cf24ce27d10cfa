"""report.py as users run it, on the questions of examples/data."""

import json
import os
import subprocess
import sys

import pytest
import report

from support import fake_recipe
from support.paths import EXAMPLES, SCRIPTS
from support.scripts import next_words


@pytest.fixture
def folder(tmp_path):
    questions = json.loads((EXAMPLES / "sft" / "heldout.json").read_text(encoding="utf-8"))
    right = [question["output"] for question in questions]
    wrong = ["The cat was in the garden."] * len(questions)
    answers = {"base": wrong, "adapter": right, "assistant": right, "ppo": right, "dpo": wrong}
    return fake_recipe.write_recipe_run(tmp_path / "my demo", questions, answers)


def test_main_writes_three_files(folder, caplog):
    before = {path for path in folder.rglob("*") if path.is_file()}
    caplog.set_level("INFO")
    summary = report.main(report.ReportArguments(run_dir=str(folder)))
    written = {path.name for path in folder.rglob("*") if path.is_file()} - {path.name for path in before}
    assert written == {"report.html", "report.md", "summary.json"}
    assert summary["exact_match"] == {"base": 0.0, "sft": 1.0, "ppo": 1.0, "dpo": 0.0}
    assert {"unseen_wording", "unseen_operands", "pretraining_only"} == set(summary["exact_match_by_kind"])
    assert next_words(caplog.text)[-4] == f"MODEL={folder / 'assistant'}", "whose path has a space"
    assert "alignment: tuned 50.0 % -> PPO 75.0 %, DPO 66.7 %; reward model right on 92.5 %" in caplog.text
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "wording never seen" in page and page.count("<tr>") > 280  # all questions, folded
    # A second report replaces the first: it sums up whatever was run again.
    with open(folder / "stages.jsonl", "a") as log:
        log.write(json.dumps({"name": "base", "seconds": 50, "peak_memory_gb": 1.0}) + "\n")
    assert report.main(report.ReportArguments(run_dir=str(folder)))["seconds"] == summary["seconds"] - 50


@pytest.mark.slow
def test_command_line_names_what_is_missing(folder):
    (folder / "pretrain" / "all_results.json").unlink()
    environment = {**os.environ, "RUN_DIR": str(folder), "PYTHON": sys.executable}
    command = ["bash", str(SCRIPTS / "run_report.sh")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: stage 'pretrain' is not finished" in result.stderr and "scripts/run_pt.sh" in result.stderr


def test_launcher_prints_its_command(folder):
    environment = {**os.environ, "RUN_DIR": str(folder), "DRY_RUN": "1"}
    command = ["bash", str(SCRIPTS / "run_report.sh"), "--questions", "mine.json"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "report.py" in printed and "my\\ demo" in printed and printed.rstrip().endswith("--questions mine.json")
