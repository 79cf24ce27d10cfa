"""The notebooks as files: sound, without outputs, in both languages, and every command in them parses."""

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from plan_memory import split_command

from support.notebooks import FOLDER, as_python, read, shell_commands, sources
from support.paths import ROOT
from support.scripts import command_mistakes, script_types
from utils.core.command_line import parse_args

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_is_a_notebook_for_each_task():
    tasks = {"recipe", "merge_and_quantize", "pretraining", "tuning", "rlhf", "evaluation", "deployment"}
    assert {path.stem for path in NOTEBOOKS} == tasks | {"gradio_web_demo"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_sound_and_without_outputs(path):
    """nbformat 4.5: each cell has an id of its own, code has empty outputs and no count."""
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert {"kernelspec", "language_info"} <= notebook["metadata"].keys()
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in identities)
    for cell in notebook["cells"]:
        kind = cell["cell_type"]
        expected = {"id", "cell_type", "metadata", "source"} | (
            {"outputs", "execution_count"} if kind == "code" else set()
        )
        assert kind in ("code", "markdown") and cell.keys() == expected
        assert cell["source"] and all(isinstance(line, str) for line in cell["source"])
        if kind == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_text_is_chinese_and_english(path):
    for text in sources(read(path), "markdown"):
        # A heading alone may be a name, such as PPO.
        prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
        chinese, english = len(re.findall(r"[\u4e00-\u9fff]", prose)), len(re.findall(r"\b[a-z]{2,}\b", prose))
        assert (chinese >= 2 and english >= 1) or (not chinese and not english), text


def test_all_begin_with_the_same_setup():
    assert len({sources(read(path), "code")[0] for path in NOTEBOOKS}) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_code_and_its_commands_parse(path):
    notebook = read(path)
    for source in sources(notebook, "code"):
        ast.parse(as_python(source))
        assert [mistake for command in shell_commands(source) for mistake in command_mistakes(command)] == []
    for text in sources(notebook, "markdown"):
        for block in re.findall(r"```bash\n(.*?)```", text, re.S):
            assert [mistake for line in block.splitlines() for mistake in command_mistakes(line)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_launchers_print_commands_that_their_scripts_take(path):
    """Values too, as the scripts' own dataclasses check them; a plan's flags are its stage's."""
    names = {"DRY_RUN": "1", "PYTHON": "python", "STEPS": "4", "PPO_STEPS": "2", "DATA_DIR": "d", "SERVER_PORT": "1"}
    names |= dict.fromkeys(("DEMO", "WORK", "RUN", "MINE", "QUESTIONS"), "folder") | {"SMALL": small_flags(path)}
    for source in sources(read(path), "code"):
        for command in shell_commands(source):
            if "bash scripts/" not in command:
                continue
            done = subprocess.run(
                ["bash", "-c", command], cwd=ROOT, env=os.environ | names, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            script, *words = shlex.split(done.stdout)[1:]
            stage = Path(script).name
            if stage == "plan_memory.py":
                own, (stage, *words) = split_command(words)
                parse_args(*script_types("plan_memory.py"), argv=own)
                stage += ".py"
            parse_args(*script_types(stage), argv=[*words, *(["--output_dir", "o"] if "PLAN=1" in command else [])])


def small_flags(path):
    found = re.search(r'environ\["SMALL"\] = "(.*)"', "".join(sources(read(path), "code")))
    return found[1] if found else ""


def test_a_cell_becomes_python():
    cell = "x = 1\nif x:\n    !A=b bash run.sh --one \\\n      --two '$X'\nelse:\n    pass\n!ls\n"
    assert shell_commands(cell) == ["A=b bash run.sh --one        --two '$X'", "ls"]
    ran = []
    exec(as_python(cell), {"run_shell": ran.append})
    assert ran == ["A=b bash run.sh --one \\\n      --two '$X'", "ls"]
