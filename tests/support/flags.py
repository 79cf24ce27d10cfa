"""Which flags a script reads, in its own code and all that it imports, and which of its own transformers reads."""

import ast
import dataclasses
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from . import house
from .paths import SCRIPTS, UTILS
from .scripts import script_types


def own_flags(script: str) -> dict[str, type]:
    """The flags of a script that are this project's own, and the dataclass of each."""
    from transformers import TrainingArguments

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {
        field.name: kind
        for kind in script_types(script)
        for field in dataclasses.fields(kind)
        if field.init and field.name not in inherited
    }


def code_of(script: str) -> set[Path]:
    """The script's file and those of every module of the package that it imports, however late, and they."""
    modules, seen = house.module_paths(), {SCRIPTS / script}
    waiting = list(seen)
    while waiting:
        for found in house.imports_of(waiting.pop(), UTILS):
            path = modules.get(found.module) if found.own else None
            if path is not None and path not in seen:
                seen.add(path)
                waiting.append(path)
    return seen


def trainer_reads() -> set[str]:
    """Names that transformers reads of its TrainingArguments, but for methods that this project's Trainer replaces."""
    import transformers

    folder = Path(transformers.__file__).parent
    replaced = replaced_methods(UTILS / "training" / "trainer.py")
    found = set()
    for path in [*folder.glob("trainer*.py"), *folder.glob("training_args.py"), *folder.glob("integrations/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == "Trainer":
                node.body = [part for part in node.body if getattr(part, "name", "") not in replaced]
            if isinstance(node, ast.FunctionDef) and node.name not in replaced:
                attributes = [each for each in ast.walk(node) if isinstance(each, ast.Attribute)]
                found |= {a.attr for a in attributes if ast.unparse(a.value).rpartition(".")[2] in ("self", "args")}
    return found


def replaced_methods(path: Path) -> set[str]:
    """Methods of the classes of a file that do not call the method they replace."""
    return {
        part.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.FunctionDef) and f"super().{part.name}(" not in ast.unparse(part)
    }


def names_read(paths: Iterable[Path]) -> set[str]:
    """Attributes that are read of anything but `self`, and of `self` in classes of arguments outside __post_init__."""
    return {name for path in paths for name in _names_read(path)}


@cache
def _names_read(path: Path) -> frozenset[str]:
    return frozenset(_reads(ast.parse(path.read_text(encoding="utf-8")), in_arguments=False))


def _reads(node: ast.AST, in_arguments: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and child.name == "__post_init__":
            continue
        inside = child.name.endswith("Arguments") if isinstance(child, ast.ClassDef) else in_arguments
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            of_self = isinstance(child.value, ast.Name) and child.value.id == "self"
            if in_arguments or not of_self:
                yield child.attr
        yield from _reads(child, inside)
