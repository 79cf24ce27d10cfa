"""Notebooks without Jupyter: their cells run in order in one namespace, lines with `!` through bash.

What IPython adds and the notebooks use: `!command` (continued by a backslash) and IPython.display. `!` does not stop a
notebook there when the command fails; here it does.
"""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

from .paths import ROOT

FOLDER = ROOT / "notebooks"
SHELL_LINE = re.compile(r"^([ \t]*)!((?:.*\\\n)*.*)$", re.M)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def sources(notebook: dict, kind: str) -> list[str]:
    """The text of each cell of one kind, "code" or "markdown"."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def shell_commands(source: str) -> list[str]:
    """The commands of a code cell, each on one line."""
    return [match[2].replace("\\\n", " ") for match in SHELL_LINE.finditer(source)]


def as_python(source: str) -> str:
    """A code cell with its shell lines as calls of `run_shell`."""
    return SHELL_LINE.sub(lambda match: f"{match[1]}run_shell({match[2]!r})", source)


def run_shell(command: str) -> None:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


class Shown:
    """Image and Markdown of IPython.display: what is shown exists and is not empty."""

    def __init__(self, content: object) -> None:
        assert Path(content).stat().st_size if isinstance(content, Path) else str(content).strip()


def execute(path: Path, monkeypatch) -> dict:
    """Run a notebook in its own folder, as Jupyter does, up to the first cell that raises; returns its names."""
    display = types.ModuleType("IPython.display")
    display.Image = display.Markdown = Shown
    display.display = lambda *shown: None
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(path.parent)
    names: dict = {"run_shell": run_shell}
    try:
        for number, source in enumerate(sources(read(path), "code"), 1):
            exec(compile(as_python(source), f"{path.name}, code cell {number}", "exec"), names)
    finally:
        for started in names.values():
            if isinstance(started, subprocess.Popen) and started.poll() is None:
                started.terminate()
    return names
