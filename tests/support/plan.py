"""The plan of the tests: unit/<wing>/test_<module>.py, e2e/test_<script>.py, repo/, and support/ for what they share.

Every check takes the folders, so that a test can plant a fault in a small tree and see it found.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from . import house

TESTS = Path(__file__).resolve().parents[1]
# Modules that no unit test of their wing names, and what tests them instead.
TESTED_ELSEWHERE = {
    "evaluation.arena.page": "e2e/test_arena: needs a browser",
    "evaluation.formats": "unit/models/test_quantization, e2e/test_quantize: needs quantised models",
    "evaluation.multiple_choice.runs": "e2e/test_eval_multiple_choice: whole runs, killed and gone on with",
    "lora.streamed_model": "e2e/test_verification: compares whole models",
    "lora.verify": "e2e/test_verification: compares whole models",
    "lora.writer": "e2e/test_merge_llama2_with_chinese_lora_low_mem: whole merges, killed and gone on with",
    "models.gathering": "e2e/test_distributed: needs several processes",
    "serving.http": "unit/serving/test_app: asks the app, as clients do",
    "serving.planning": "unit/serving/test_app: asks the app, as clients do",
    "serving.responses": "unit/serving/test_app: asks the app, as clients do",
    "web.base": "e2e/test_gradio_demo: needs a browser",
    "web.page": "e2e/test_gradio_demo: needs a browser",
}


def find_misplaced(tests: Path = TESTS, package: Path = house.UTILS) -> list[str]:
    """Test files that stand nowhere in the plan, or are called after no module of their wing; and other stray code."""
    modules = house.module_paths(package)
    faults = []
    for path in sorted(tests.rglob("*.py")):
        place = path.relative_to(tests)
        folder, name = place.parent.parts, place.stem
        if name in ("conftest", "__init__") or folder[:1] == ("support",):
            continue
        if not name.startswith("test_"):
            faults.append(f"{place}: helpers stand in support/")
        elif folder[:1] == ("unit",):
            module = ".".join([*folder[1:], name.removeprefix("test_")])
            faults += [] if module in modules else [f"{place}: there is no module {module}"]
        elif folder not in (("e2e",), ("repo",)):
            faults.append(f"{place}: need unit/<wing>/, e2e/ or repo/")
    return faults


def find_imported_tests(tests: Path = TESTS) -> list[str]:
    """Tests import from support, from nothing else here."""
    faults = []
    for path in sorted(tests.rglob("*.py")):
        for line, name in _imported(path):
            parts = name.split(".")
            if parts[0] in ("unit", "e2e", "repo", "tests", "conftest") or any(p.startswith("test_") for p in parts):
                faults.append(f"{path.relative_to(tests)}:{line}: imports {name}")
    return faults


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module or ''}.{alias.name}") for alias in node.names)


def find_unnamed(
    tests: Path = TESTS, package: Path = house.UTILS, listed: Mapping[str, str] = TESTED_ELSEWHERE
) -> list[str]:
    """Modules that no unit test of their wing imports and the list does not excuse, and what the list has in vain."""
    modules = house.module_paths(package)
    named = set()
    for wing in (tests / "unit").iterdir():
        for path in wing.rglob("test_*.py"):
            found = (each.module for each in house.imports_of(path, package) if each.own)
            named |= {module for module in found if module.split(".")[0] == wing.name}
    missing = sorted(modules.keys() - named - listed.keys())
    return [
        *(f"{module}: no test in unit/{module.split('.')[0]}/ imports it" for module in missing),
        *(f"{module}: listed, but a unit test imports it" for module in sorted(listed.keys() & named)),
        *(f"{module}: listed, but there is no such module" for module in sorted(listed.keys() - modules.keys())),
        *_lost_reasons(tests, listed),
    ]


def _lost_reasons(tests: Path, listed: Mapping[str, str]) -> Iterator[str]:
    for module, reason in listed.items():
        for file in reason.partition(":")[0].split(", "):
            if not (tests / f"{file}.py").is_file():
                yield f"{module}: listed with {file}, which is no test file"
