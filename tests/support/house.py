"""The house: wings and modules of scripts/utils, who imports whom, and what breaks its rules.

Every check takes the package's folder, so that a test can plant a fault in a small package and see it found.
`python tests/support/house.py [PICTURE.svg]` (make house) prints the wings, their modules, lines and arrows, and draws
the picture of the READMEs.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UTILS = Path(__file__).resolve().parents[2] / "scripts" / "utils"
MOST_MODULES = 15  # in one folder: what a reader holds


@dataclass(frozen=True)
class Import:
    """One imported module of the package, or, where `module` is none of its modules, another library's."""

    line: int
    module: str  # dotted, below the package for its own modules: "weights.reader"
    names: tuple[str, ...]  # what is taken from it; empty for the module itself
    own: bool


def module_paths(package: Path = UTILS) -> dict[str, Path]:
    """Dotted name below the package -> file, of every module at any depth; `__init__` files are no modules."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in sorted(package.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports_of(path: Path, package: Path = UTILS) -> list[Import]:
    """What a file imports, anywhere in it; relative imports are resolved where the file lies in the package."""
    return _read_imports(path, package, path.stat().st_mtime_ns)


@functools.cache  # several checks ask for the imports of every module
def _read_imports(path: Path, package: Path, changed: int) -> list[Import]:
    inside = path.is_relative_to(package)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [_import(node.lineno, alias.name.split("."), (), package) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level:
                assert inside, f"{path}:{node.lineno}: a relative import outside the package"
                above = path.relative_to(package).parent.parts
                parts = [package.name, *above[: len(above) - node.level + 1], *parts]
            names = tuple(alias.name for alias in node.names)
            if parts[:1] == [package.name] and (package / Path(*parts[1:])).is_dir():
                # from . import module, from ..wing import module
                found += [_import(node.lineno, [*parts, name], (), package) for name in names]
            else:
                found.append(_import(node.lineno, parts, names, package))
    return found


def _import(line: int, parts: list[str], names: tuple[str, ...], package: Path) -> Import:
    own = parts[:1] == [package.name]
    return Import(line, ".".join(parts[1:] if own else parts), names, own)


def wing_order(package: Path = UTILS) -> list[str]:
    """The wings, the highest first, as the package's docstring gives their order."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    line = re.search(r"\w+(?:\s*>\s*\w+)+", docstring)
    return re.split(r"\s*>\s*", line[0]) if line else []


def public_modules(folder: Path) -> set[str]:
    """The modules of a wing that other wings and the scripts may import, as its docstring lists them."""
    init = folder / "__init__.py"
    docstring = (ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or "") if init.is_file() else ""
    line = re.search(r"Others import: ([\w,\s]+)\.", docstring)
    return set(re.split(r",\s*", " ".join(line[1].split()))) if line else set()


def find_faults(package: Path = UTILS, scripts: list[Path] | None = None) -> list[str]:
    """Everything that breaks the rules of the wings, a line each."""
    return [
        *_folder_faults(package),
        *_import_faults(package),
        *_face_faults(package, scripts or []),
        *_leaf_faults(package, scripts or []),
        *_cycles(package),
    ]


def _folder_faults(package: Path) -> Iterator[str]:
    order = wing_order(package)
    folders = {path.parent for path in package.rglob("*.py")} - {package}
    for folder in sorted(folders):
        place = folder.relative_to(package)
        if not (folder / "__init__.py").is_file():
            yield f"{place}: no __init__.py"
        count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        if count > MOST_MODULES:
            yield f"{place}: {count} modules, at most {MOST_MODULES}"
    for path in sorted(package.rglob("__init__.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if len(body) != 1 or not (isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)):
            yield f"{path.relative_to(package)}: holds code; an __init__ is a docstring alone"
    for name in module_paths(package):
        if "." not in name:
            yield f"{name}: stands in no wing"
    wings = {name.split(".")[0] for name in module_paths(package) if "." in name}
    yield from (f"{wing}: a wing without a place in the order" for wing in sorted(wings - set(order)))
    yield from (f"{wing}: in the order, but no wing" for wing in order if wing not in wings)


def _import_faults(package: Path) -> Iterator[str]:
    """Imports of what is not there, of a higher wing, or of a name that is private to another module."""
    order, modules = wing_order(package), module_paths(package)
    for name, path in modules.items():
        for found in imports_of(path, package):
            if not found.own:
                continue
            where = f"{name}:{found.line}"
            if found.module not in modules:
                yield f"{where}: no module {found.module}"
                continue
            mine, other = name.split(".")[0], found.module.split(".")[0]
            if mine in order and other in order and order.index(other) < order.index(mine):
                yield f"{where}: imports {found.module}, which stands higher"
            yield from (f"{where}: {private} is private to {found.module}" for private in _private(found.names))


def _private(names: tuple[str, ...]) -> Iterator[str]:
    return (name for name in names if name.startswith("_"))


def _face_faults(package: Path, scripts: list[Path]) -> Iterator[str]:
    """Imports from outside a folder (a wing, or a leaf within one) of what its docstring does not make public."""
    modules = module_paths(package)
    # A script stands in no folder of the package, also where it has a wing's name (report.py).
    users = [(name, name.rpartition(".")[0], path) for name, path in modules.items()]
    users += [(path.name, "", path) for path in scripts]
    used: dict[str, set[str]] = defaultdict(set)
    for name, home, path in users:
        for found in imports_of(path, package):
            folder, _, leaf = found.module.rpartition(".")
            if not found.own or found.module not in modules or home == folder:
                continue
            used[folder].add(leaf)
            if leaf not in public_modules(package / Path(*folder.split("."))):
                yield f"{name}:{found.line}: {found.module} is not public in {folder}"
    for folder in sorted({path.parent for path in modules.values()} - {package}):
        place = ".".join(folder.relative_to(package).parts)
        if scripts:
            yield from (
                f"{place}: {leaf} is public, but nobody imports it"
                for leaf in sorted(public_modules(folder) - used[place])
            )


def _leaf_faults(package: Path, scripts: list[Path]) -> Iterator[str]:
    """A folder within a wing is a leaf: one script imports it, or those its docstring names; no module elsewhere."""
    modules = module_paths(package)
    users: dict[str, set[str]] = defaultdict(set)
    for name, path in [*modules.items(), *((path.name, path) for path in scripts)]:
        for found in imports_of(path, package):
            leaf = found.module.rpartition(".")[0]
            if not found.own or found.module not in modules or "." not in leaf or name.startswith(f"{leaf}."):
                continue
            if name in modules:
                yield f"{name}:{found.line}: imports {found.module}, of a leaf, which is its script's alone"
            users[leaf].add(name)
    for leaf, names in sorted(users.items()):
        said = (package / Path(*leaf.split(".")) / "__init__.py").read_text(encoding="utf-8")
        found_scripts = sorted(names - set(modules))
        if len(found_scripts) > 1 and not all(name in said for name in found_scripts):
            yield f"{leaf}: a leaf of several scripts: {', '.join(found_scripts)}"


def _cycles(package: Path) -> Iterator[str]:
    modules = module_paths(package)
    edges = {
        name: {found.module for found in imports_of(path, package) if found.own and found.module in modules}
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> Iterator[str]:
        if name in trail:
            yield "a cycle: " + " > ".join([*trail[trail.index(name) :], name])
        elif name not in done:
            for other in sorted(edges[name]):
                yield from visit(other, [*trail, name])
            done.add(name)

    for name in sorted(edges):
        yield from visit(name, [])


def files_with_code(package: Path = UTILS, scripts: Path | None = None) -> list[Path]:
    """Every module of the package and every script."""
    return [*module_paths(package).values(), *sorted((scripts or package.parent).glob("*.py"))]


def find_import_time_work(name: str, package: Path = UTILS) -> list[str]:
    """Globals, shell calls, and loops or `with` at a module's own level: what happens at import."""
    faults = []
    tree = ast.parse(module_paths(package)[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            faults.append(f"{name}:{node.lineno}: global")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "system":
            faults.append(f"{name}:{node.lineno}: calls system")
    return faults + [
        f"{name}:{node.lineno}: {type(node).__name__} at import"
        for node in tree.body
        if isinstance(node, (ast.For, ast.While, ast.With))
    ]


def find_decided_twice(package: Path = UTILS, scripts: Path | None = None) -> list[str]:
    """Prompt markers outside text/prompts.py, adapter file names outside weights/names.py, and what is forbidden."""
    faults = []
    for path in files_with_code(package, scripts):
        place, text = path.relative_to(package.parent).as_posix(), path.read_text(encoding="utf-8")
        homes = {f"{package.name}/text/prompts.py": r"\[INST\]|### Instruction"}
        homes[f"{package.name}/weights/names.py"] = r'"adapter_model\.(safetensors|bin)"|"adapter_config\.json"'
        faults += [
            f"{place}: decided in {home}" for home, marks in homes.items() if place != home and re.search(marks, text)
        ]
        forbidden = re.search(r"shell=True|trust_remote_code=True|55[_,]?296", text)
        faults += [f"{place}: {forbidden[0]}"] if forbidden else []
    return faults


def find_unlisted_imports(requirements: str, package: Path = UTILS, scripts: Path | None = None) -> list[str]:
    """Imported libraries that no requirements file names."""
    renamed = {"yaml": "pyyaml", "google": "protobuf", "llama_cpp": "llama_cpp_python"}
    required, faults = requirements.lower().replace("-", "_"), []
    for path in files_with_code(package, scripts):
        for module in {found.module.split(".")[0] for found in imports_of(path, package) if not found.own}:
            if module in sys.stdlib_module_names or module == "":
                continue
            if renamed.get(module, module).lower() not in required:
                faults.append(f"{path.name}: imports {module}")
    return faults


def find_imported_scripts(package: Path = UTILS, scripts: Path | None = None) -> list[str]:
    """A script is imported by nobody."""
    names = {path.stem for path in (scripts or package.parent).glob("*.py")}
    return [
        f"{path.name}:{found.line}: imports the script {found.module}"
        for path in files_with_code(package, scripts)
        for found in imports_of(path, package)
        if not found.own and found.module in names
    ]


def draw(package: Path = UTILS) -> str:
    """The wings, highest first: their modules with lines, and which wings each imports from."""
    modules, rows = module_paths(package), []
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in modules.items()}
    for wing in wing_order(package):
        own = [name for name in modules if name.split(".")[0] == wing]
        arrows = defaultdict(int)
        for name in own:
            for found in imports_of(modules[name], package):
                if found.own and (other := found.module.split(".")[0]) != wing:
                    arrows[other] += 1
        rows.append(f"{wing}: {len(own)} modules, {sum(lines[name] for name in own):,} lines")
        rows.append("  " + ", ".join(f"{name.removeprefix(wing + '.')} {lines[name]}" for name in own))
        if arrows:
            rows.append(
                "  > " + ", ".join(f"{other} {arrows[other]}" for other in wing_order(package) if arrows[other])
            )
    rows.append(f"{len(modules)} modules, {sum(lines.values()):,} lines")
    return "\n".join(rows)


# The scripts by task, as the picture's roof shows them.
TASKS = {
    "begin": ("doctor.py", "download.py", "train_tokenizer.py", "merge_tokenizers.py"),
    "training": ("pt.py", "sft.py", "generate_…py"),
    "alignment": ("rm.py", "ppo.py", "dpo.py"),
    "merge, export": ("merge_llama2_…py", "export_gguf.py", "quantize.py", "compare_formats.py"),
    "chat": ("inference_hf.py", "gradio_demo.py", "openai_api_server.py"),
    "evaluation": ("eval_*.py", "arena.py", "report.py", "demo.py"),
}


def draw_picture(package: Path = UTILS) -> str:
    """The house as an SVG: the scripts by task under the roof, below them a floor for each wing with its rooms."""
    modules, order = module_paths(package), wing_order(package)
    width, floor, top = 1120, 30, 128
    height = top + floor * len(order) + 16
    shapes = [_box(0, 0, width, height, "#f7f8fa", "#f7f8fa")]
    step = (width - 32) // len(TASKS)
    for place, (task, scripts) in enumerate(TASKS.items()):
        left = 16 + place * step
        shapes += [_box(left + 3, 14, step - 6, 84, "#e8f1fd", "#3b7dd8"), _label(left + 13, 34, task, bold=True)]
        shapes += [_label(left + 13, 52 + 16 * line, name) for line, name in enumerate(scripts)]
    shapes.append(_label(24, 117, "The scripts import the wings below; a wing imports only from those below it."))
    for place, wing in enumerate(order):
        y = top + place * floor
        own = [name.split(".")[1:] for name in modules if name.split(".")[0] == wing]
        rooms = [parts[0] for parts in own if len(parts) == 1]
        leaves = sorted({f"{parts[0]}/" for parts in own if len(parts) > 1})
        shapes += [_box(19, y, width - 38, floor - 4, "#ffffff", "#c3ccd6"), _label(30, y + 17, wing, bold=True)]
        shapes.append(_label(128, y + 17, " · ".join([*leaves, *rooms])))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    label = 'role="img" aria-label="the scripts by task, and the wings of scripts/utils"'
    return "\n".join([f"{head} {label} font-family=\"'Segoe UI', sans-serif\">", *shapes, "</svg>"]) + "\n"


def _box(x: int, y: int, width: int, height: int, fill: str, stroke: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{stroke}"/>'


def _label(x: int, y: int, text: str, bold: bool = False) -> str:
    style = 'font-size="13" font-weight="600" fill="#1d2733"' if bold else 'font-size="11.5" fill="#46566a"'
    return f'<text x="{x}" y="{y}" {style}>{text}</text>'


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(draw_picture(), encoding="utf-8")
    print(draw())
    sys.exit("\n".join(find_faults(scripts=sorted(UTILS.parent.glob("*.py")))) or 0)
