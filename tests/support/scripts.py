"""What the scripts are: their flags, dataclasses and imports."""

import ast
import functools
import importlib
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
    return shlex.split(log.rpartition("next: ")[2].partition("\n")[0])


def old_names() -> set[str]:
    from utils.core.old_flags import DROPPED, RENAMED, REPLACED_SWITCHES

    return {f"--{name}" for name in [*RENAMED, *DROPPED, *REPLACED_SWITCHES]}
