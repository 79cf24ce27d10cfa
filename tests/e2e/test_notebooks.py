"""Every notebook from its first cell to its last, on what `make demo` left in DEMO_RUN (default output/demo)."""

import os
from pathlib import Path

import pytest

from support.notebooks import FOLDER, execute
from support.paths import ROOT
from support.web import free_port

DEMO_RUN = Path(os.environ.get("DEMO_RUN", ROOT / "output" / "demo"))
# The web demo's notebook runs in test_gradio_demo.py.
NOTEBOOKS = sorted(path for path in FOLDER.glob("*.ipynb") if path.stem != "gradio_web_demo")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    if path.stem != "recipe" and not (DEMO_RUN / "summary.json").is_file():
        pytest.skip(f"no finished demo in {DEMO_RUN}: make demo, or set DEMO_RUN")
    for name, value in {"STEPS": "8", "PPO_STEPS": "2", "SERVER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DEMO", str(DEMO_RUN))
    monkeypatch.setenv("WORK", str(tmp_path))
    execute(path, monkeypatch)
