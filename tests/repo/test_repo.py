"""The house itself: launchers match parsers, layers hold, every flag is documented, both READMEs agree."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support import house
from support.paths import ROOT, SCRIPTS
from support.scripts import LAUNCHER_NAMES, launcher_script, old_names, script_flags, script_types, tracked

LAUNCHER_VARIABLES = {"MODEL", "LORA", "TOKENIZER", "DATA", "OUT", "SP"}
PYTHON_SCRIPTS = sorted(path for path in SCRIPTS.glob("*.py"))
LAUNCHERS = sorted(path for path in SCRIPTS.glob("run_*.sh"))
TRAINING_SCRIPTS = {"pt.py", "sft.py", "rm.py", "ppo.py", "dpo.py"}
# What each launcher needs in its environment to print its command.
NEEDS = {
    "run_pt.sh": {"MODEL": "m", "DATA": "d"},
    "run_sft.sh": {"MODEL": "m", "DATA": "d"},
    "run_rm.sh": {"MODEL": "m", "DATA": "d"},
    "run_ppo.sh": {"MODEL": "m", "DATA": "d"},
    "run_dpo.sh": {"MODEL": "m", "DATA": "d"},
    "run_eval_alignment.sh": {"MODEL": "m"},
    "run_eval_answers.sh": {"MODEL": "m", "QUESTIONS": "q"},
    "run_eval_multiple_choice.sh": {"MODEL": "m", "DATA": "d"},
    "run_eval_perplexity.sh": {"MODEL": "m", "TEXTS": "t"},
    "run_eval_longbench.sh": {"MODEL": "m"},
    "run_arena.sh": {"MODELS": "a=b c=d"},
    "run_merge.sh": {"MODEL": "m", "LORA": "l"},
    "run_export_gguf.sh": {"MODEL": "m"},
    "run_quantize.sh": {"MODEL": "m"},
    "run_prune_layers.sh": {"MODEL": "m", "KEEP": "first:4"},
    "run_compare_formats.sh": {"MODEL": "m", "TEXTS": "t"},
    "run_inference.sh": {"MODEL": "m"},
    "run_gradio_demo.sh": {"MODEL": "m"},
    "run_openai_api_server.sh": {"MODEL": "m"},
    "run_train_tokenizer.sh": {"DATA": "d"},
    "run_merge_tokenizers.sh": {"BASE": "b", "SP": "s"},
    "run_download.sh": {"REPO": "r/r"},
    "run_generate_instructions.sh": {"SERVER": "http://s/v1"},
    "run_plan_memory.sh": {"MODEL": "m"},
    "run_report.sh": {"RUN_DIR": "r", "QUESTIONS": "q"},
}


def test_every_script_has_its_launcher_and_back():
    expected = {f"run_{LAUNCHER_NAMES.get(path.stem, path.stem)}.sh" for path in PYTHON_SCRIPTS}
    assert {path.name for path in LAUNCHERS} == expected


def test_the_wings_keep_their_rules():
    """Order, faces, no cycles, no private names, docstrings alone in __init__, at most 15 modules in a folder."""
    assert house.find_faults(scripts=PYTHON_SCRIPTS) == []
    assert len(house.module_paths()) > 100 and len(house.wing_order()) == 15


def test_no_script_is_imported():
    assert house.find_imported_scripts() == []


@pytest.mark.parametrize("module", house.module_paths())
def test_nothing_happens_at_import(module):
    """Only definitions and constants at module level: no argparse, no prints, no globals."""
    assert house.find_import_time_work(module) == []


def test_decided_once():
    """Prompt markers stand in text/prompts.py, adapter file names in weights/names.py, nowhere else in the code."""
    assert house.find_decided_twice() == []


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_launcher_prints_a_command_its_script_parses(launcher, tmp_path):
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": "python", **NEEDS.get(launcher.name, {})}
    result = subprocess.run(
        ["bash", str(launcher), "--x"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    words = shlex.split(result.stdout.strip().splitlines()[-1])
    script = next(Path(word) for word in words if word.endswith(".py"))
    assert script.is_absolute() and script.is_file()
    assert words.count("--x") == 1
    flags = [word for word in words[words.index(str(script)) + 1 :] if word != "--x"]
    known = script_flags(script.name) | old_names()
    if script.name == "plan_memory.py":  # it takes the flags of the stage that it names
        known |= script_flags(f"{flags[0]}.py")
    assert {word for word in flags if word.startswith("--")} <= known


def printed_by(launcher: Path, *flags: str, **environment: str) -> str:
    """What a launcher prints without the variables that it needs."""
    bare = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    command = ["bash", str(launcher), *flags]
    return subprocess.run(command, env=bare | environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_launchers_explain_themselves_in_both_languages(launcher):
    """--help: what it does, needs and writes, its variables, flags, an example that its script parses."""
    text, code = printed_by(launcher, "--help"), launcher.read_text(encoding="utf-8")
    for part in ("写出 / writes: ", "常用 / often used: ", "例 / example "):
        assert len(re.findall(f"^{part}", text, re.M)) == 1, part
    variables = set(re.findall(r"\$\{([A-Z_]+)[:?+}]", code)) | set(re.findall(r":([A-Z]+)(?= |;)", code))
    variables -= {"PYTHON", "BASH_SOURCE", "FLAG", "NAME", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    assert [name for name in variables if not re.search(rf"\b{name}\b", text)] == []
    assert re.search("[\u4e00-\u9fff]", text.split("\n")[0]) and "/ " in text.split("\n")[0]
    script = launcher_script(launcher.name)
    assert f"python scripts/{script} --help" in text
    used = re.findall(r"--\w+", re.search("often used: (.*)", text)[1])
    assert 3 <= len(used) <= 5 and set(used) <= script_flags(script) | {"--tokenizer_path"}
    example = re.search(r"^例 / example .*?: (.*)", text, re.M)[1]
    position = example.index("bash scripts/")
    assert example[position:].startswith(f"bash scripts/{launcher.name}")
    for place in re.findall(r"examples/[\w/.]+", example):
        assert (ROOT / place).exists(), place
    given = dict(word.split("=", 1) for word in shlex.split(example[:position]))
    command = shlex.split(printed_by(launcher, *shlex.split(example[position:])[2:], DRY_RUN="1", **given))
    known = script_flags(script) | old_names() | (script_flags("sft.py") if script == "plan_memory.py" else set())
    assert {word.split("=")[0] for word in command if word.startswith("--")} <= known


@pytest.mark.parametrize("launcher", [path for path in LAUNCHERS if path.name in NEEDS], ids=lambda path: path.name)
def test_launcher_names_what_is_missing(launcher):
    environment = {name: value for name, value in os.environ.items() if name not in NEEDS[launcher.name]}
    if launcher.name == "run_inference.sh" or launcher.name == "run_report.sh":
        pytest.skip("has defaults")
    result = subprocess.run(
        ["bash", str(launcher)], env={**environment, "DRY_RUN": "1"}, capture_output=True, text=True
    )
    assert result.returncode != 0 and "set " in result.stderr


# Each script's help in a process of its own; they have in common what every parser needs, and nothing else.
HELP_OF_EACH = """
import os, runpy, sys
import yaml, utils.core.command_line
sys.stdout = open(os.devnull, "w")
for script in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, script
        continue
    sys.argv, code = [script, "--help"], 1
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    heavy = {"transformers", "torch", "peft", "gradio", "datasets"} & set(sys.modules)
    print(script, code, heavy, file=sys.stderr) if code or heavy else None
    os._exit(1 if code or heavy else 0)
"""


def run_help_of_each(scripts: list[Path]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", HELP_OF_EACH, *map(str, scripts)], cwd=SCRIPTS, capture_output=True, text=True
    )


def test_help_is_quick_and_imports_nothing_heavy():
    """Seconds are measured in benchmarks; here: transformers, torch, peft and gradio stay unimported."""
    done = run_help_of_each([path for path in PYTHON_SCRIPTS if path.name not in TRAINING_SCRIPTS])
    assert done.returncode == 0, done.stderr


def test_a_help_that_imports_torch_is_found(tmp_path):
    (tmp_path / "planted.py").write_text("import sys\nsys.modules['torch'] = sys\nsys.exit(0)\n")
    assert "{'torch'}" in run_help_of_each([tmp_path / "planted.py"]).stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(TRAINING_SCRIPTS))
def test_help_of_training_scripts_exits_well(script):
    result = subprocess.run([sys.executable, str(SCRIPTS / script), "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--lora_rank" in result.stdout


def own_fields(name: str) -> set[str]:
    import dataclasses

    from transformers import TrainingArguments

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {field.name for kind in script_types(name) for field in dataclasses.fields(kind)} - inherited


@pytest.mark.parametrize("script", [path.name for path in PYTHON_SCRIPTS])
def test_every_flag_has_its_line_in_the_docs(script):
    chinese = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md") if "_EN" not in path.name
    )
    english = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*_EN.md"))
    for text in (chinese, english):
        missing = {field for field in own_fields(script) if not re.search(rf"`(--)?{field}\b", text)}
        assert not missing, f"{script}: flags without a line in docs: {sorted(missing)}"


def code_blocks(path: Path) -> list[str]:
    return re.findall(r"```[a-z]*\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def document_pairs() -> list[tuple[Path, Path]]:
    pairs = [(ROOT / "README.md", ROOT / "README_EN.md")]
    pairs += [
        (path, path.with_name(f"{path.stem}_EN.md")) for path in (ROOT / "docs").glob("*.md") if "_EN" not in path.name
    ]
    return pairs


@pytest.mark.parametrize("pair", document_pairs(), ids=lambda pair: pair[0].name)
def test_both_languages_carry_the_same_code(pair):
    chinese, english = pair
    assert english.is_file()
    assert code_blocks(chinese) == code_blocks(english)


def test_readmes_are_short():
    for name in ("README.md", "README_EN.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 300


def test_imports_are_in_requirements():
    assert house.find_unlisted_imports(requirements()) == []


def requirements() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("requirements*.txt"))


def test_nothing_names_this_machine():
    for path in tracked():
        if path.stat().st_size < 2_000_000 and path.suffix not in (".png", ".model"):
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert str(ROOT) + "/" not in text or path.name == "test_repo.py", path


def test_set_up_is_skipped_by_content_not_by_time(tmp_path):
    """make decides by a mark that carries the requirement files' hash: touching them changes nothing, editing does."""
    for name in ("Makefile", "requirements.txt", "requirements-serve.txt", "requirements-dev.txt", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    # Not the variables of the make that runs these tests.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "VENV"}

    def plan() -> str:
        command = ["make", "-n", "setup"]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    mark = re.search(r"touch (\S+)", plan()).group(1)
    (tmp_path / mark).parent.mkdir()
    (tmp_path / mark).touch()
    assert "pip install" not in plan()
    os.utime(tmp_path / "requirements.txt", (2_000_000_000, 2_000_000_000))
    assert "pip install" not in plan()
    (tmp_path / "requirements.txt").write_text("numpy\n")
    assert "pip install" in plan()


def test_next_commands_are_quoted_for_the_shell():
    """What a run names as the next step is made by shell_command, and so can be pasted."""
    free = ("%s", "{shell_command(")
    found = {
        f"{path.name}: {step[:60]}": step.startswith(free)
        for path in sorted(SCRIPTS.rglob("*.py"))
        for step in re.findall(r"(?:[\"\\]n?|  )next: (.*)", path.read_text(encoding="utf-8"))
    }
    assert len(found) >= 10 and all(found.values()), found


def test_next_commands_have_no_blanks():
    """Commands with a place that the reader has to fill in say so ("then, with ... for BASE"); all others run."""
    commands, blanks = 0, []
    for path in sorted(SCRIPTS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            if getattr(call.func, "id", "") != "shell_command":
                continue
            words = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
            named = {word for word in words if re.fullmatch("[A-Z_]{3,}", str(word))} - LAUNCHER_VARIABLES
            blanks += [f"{path.name}: {word}" for word in named if f" for {word}: " not in text]
            own = [word for word in words if re.fullmatch(r"(scripts|examples)/\S+", str(word))]
            assert all((ROOT / word).is_file() for word in own), own
            commands += 1
    assert commands >= 12 and blanks == []
