"""What the scripts are: their flags, dataclasses and imports."""

import ast
import functools
import importlib
import re
import shlex
import subprocess
from pathlib import Path

from support.paths import ROOT, SCRIPTS


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def script_types(name: str) -> tuple[type, ...]:
    """The dataclasses a script parses: the names in its last `run(main, ...)` call."""
    from utils.core.command_line import resolve_type

    module = importlib.import_module(name.removesuffix(".py"))
    tree = ast.parse((SCRIPTS / name).read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "run"]
    arguments = calls[-1].args[1:]
    return tuple(
        resolve_type(argument.value) if isinstance(argument, ast.Constant) else getattr(module, argument.id)
        for argument in arguments
    )


@functools.cache
def script_flags(name: str) -> frozenset[str]:
    from utils.core.command_line import build_parser

    parser = build_parser(script_types(name))
    return frozenset(option for action in parser._actions for option in action.option_strings)


def next_words(log: str) -> list[str]:
    """The words a shell makes of the command that a script's last lines name."""
    return shlex.split(re.findall(r"\b(?:next|then, with .*): (.*)", log)[-1])


def old_names() -> set[str]:
    from utils.core.old_flags import DROPPED, RENAMED, REPLACED_SWITCHES

    return {f"--{name}" for name in [*RENAMED, *DROPPED, *REPLACED_SWITCHES]}


# ---------------------------------------------------------------- commands that documents and notebooks show

# Launchers that are named otherwise than their script.
LAUNCHER_NAMES = {"merge_llama2_with_chinese_lora_low_mem": "merge", "inference_hf": "inference"}
TRAINING = ("pt", "sft", "rm", "ppo", "dpo")
# Of any command: the libraries' own, and secrets, whose names may be the user's (arena: NAME_API_KEY).
EVERYWHERE = r"PYTHON|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|(HF|MALLOC|NCCL)_\w+|\w+_(KEYS?|AUTH)"
COMMAND = re.compile(
    r"(?P<before>[^|;&#]*?)\b(?:bash|python3?|PYTHON|torchrun [^|;&]*?|deepspeed [^|;&]*?|accelerate launch [^|;&]*?) "
    r"(?P<file>(?:scripts|examples|benchmarks)/[\w./-]+\.(?:py|sh))(?P<words>[^|;&#]*)"
)


def launcher_script(launcher: str) -> str | None:
    """run_X.sh -> the script that it starts; None where it is none of this folder's."""
    stem = launcher.removeprefix("run_").removesuffix(".sh")
    stem = {short: name for name, short in LAUNCHER_NAMES.items()}.get(stem, stem)
    return f"{stem}.py" if (SCRIPTS / f"{stem}.py").is_file() else None


@functools.cache
def known_flags(script: str, planned: bool = False) -> frozenset[str]:
    """Those the script takes, old spellings too; a plan has the flags of the command that it plans."""
    known = script_flags(script) | old_names()
    if planned:
        known |= script_flags("plan_memory.py")
    if script == "plan_memory.py":
        known |= frozenset().union(*(script_flags(f"{stage}.py") for stage in TRAINING))
    return known


@functools.cache
def launcher_variables(launcher: str) -> frozenset[str]:
    """Environment variables that a launcher reads, by itself or through the launcher that it starts."""
    files = [SCRIPTS / launcher, SCRIPTS / "launch.sh"]
    if launcher == "run_plan_memory.sh":
        files += [SCRIPTS / f"run_{stage}.sh" for stage in TRAINING]
    found = [re.findall(r"\$\{?!?([A-Z_]+)|:([A-Z_]+)\b", path.read_text(encoding="utf-8")) for path in files]
    return frozenset(name for names in found for pair in names for name in pair if name)


def command_mistakes(line: str) -> list[str]:
    """What is wrong with the commands of a line of shell that start a file of this repository: no such file, flags
    that its script does not know, environment variables that its launcher does not read."""
    mistakes = []
    for command in COMMAND.finditer(line):
        path = ROOT / command["file"]
        if not path.is_file():
            mistakes.append(f"{line}: no file {command['file']}")
        elif path.parent == SCRIPTS:
            script = path.name if path.suffix == ".py" else launcher_script(path.name)
            flags = {word.split("=")[0] for word in command["words"].split() if re.match(r"--\w", word)}
            unknown = flags - known_flags(script, "PLAN=1" in command["before"]) if script else set()
            names = set(re.findall(r"(?:^|\s)([A-Z_]+)=", command["before"]))
            if path.suffix == ".sh":
                names = {name for name in names - launcher_variables(path.name) if not re.fullmatch(EVERYWHERE, name)}
                unknown |= names
            mistakes += [f"{line}: {path.name} does not know {name}" for name in sorted(unknown)]
    return mistakes


def commands_in(text: str) -> list[str]:
    """The lines of the bash blocks of a markdown text, continued ones joined, that start a file of this repository."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if not line.lstrip().startswith("#") and COMMAND.search(line)]
