"""The checks of support.house find what they are for: each rule is broken once in a small package."""

from pathlib import Path

import pytest

from support import house

GOOD = {
    "utils/__init__.py": '"""The package.\n\nhigh > low\n"""\n',
    "utils/low/__init__.py": '"""Low.\n\nOthers import: tools.\n"""\n',
    "utils/low/tools.py": "import json\n\n\ndef use():\n    return json\n",
    "utils/low/inner.py": "from .tools import use\n",
    "utils/high/__init__.py": '"""High.\n\nOthers import: page.\n"""\n',
    "utils/high/page.py": "from ..low.tools import use\nfrom ..low import tools\n",
    "utils/high/leaf/__init__.py": '"""Leaf.\n\nOthers import: deep.\n"""\n',
    "utils/high/leaf/deep.py": "from ...low.tools import use\nfrom ..page import use\n",
    "run.py": "from utils.high.leaf.deep import use\nfrom utils.high import page\nfrom utils.low.tools import use\n",
}


@pytest.fixture
def package(tmp_path) -> Path:
    for name, text in GOOD.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "utils"


def faults(package: Path) -> list[str]:
    return house.find_faults(package, [package.parent / "run.py"])


def plant(package: Path, name: str, text: str) -> None:
    path = package.parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.is_file() else "") + text)


def test_a_good_package_has_no_fault(package):
    assert faults(package) == []
    assert set(house.module_paths(package)) == {"low.tools", "low.inner", "high.page", "high.leaf.deep"}


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("utils/low/inner.py", "from ..high.page import use\n", "low.inner:2: imports high.page, which stands higher"),
        ("utils/low/inner.py", "def late():\n    from ..high import page\n", "which stands higher"),
        ("utils/low/inner.py", "from utils.high.page import use\n", "which stands higher"),
        ("utils/high/page.py", "from ..low.inner import use\n", "high.page:3: low.inner is not public in low"),
        ("run.py", "from utils.low import inner\n", "run.py:4: low.inner is not public in low"),
        ("utils/high/page.py", "from ..low.tools import _use\n", "high.page:3: _use is private to low.tools"),
        ("utils/high/page.py", "from ..low.gone import use\n", "high.page:3: no module low.gone"),
        ("utils/low/tools.py", "from .inner import use\n", "a cycle: low.tools > low.inner > low.tools"),
        ("utils/high/page.py", "from .leaf.deep import use\n", "a cycle: high.leaf.deep > high.page > high.leaf.deep"),
        ("utils/low/__init__.py", "from .tools import use\n", "holds code"),
        ("utils/high/leaf/__init__.py", "VALUE = 1\n", "high/leaf/__init__.py: holds code"),
        ("utils/flat.py", "", "flat: stands in no wing"),
        ("utils/other/__init__.py", '"""Other."""\n', ""),
        ("utils/other/thing.py", "", "other: a wing without a place in the order"),
        ("utils/high/none/thing.py", "", "high/none: no __init__.py"),
        ("utils/low/__init__.py", "", ""),
    ],
)
def test_a_planted_fault_is_found(package, name, text, fault):
    plant(package, name, text)
    if fault:
        assert any(fault in line for line in faults(package)), faults(package)
    else:
        assert faults(package) == []


def test_a_full_folder_is_found_at_any_depth(package):
    for number in range(15):
        plant(package, f"utils/high/leaf/extra{number}.py", "")
    assert "high/leaf: 16 modules, at most 15" in faults(package)


def test_a_public_module_that_nobody_imports_is_found(package):
    plant(package, "utils/low/__init__.py", "")
    (package / "low" / "__init__.py").write_text('"""Low.\n\nOthers import: tools, inner.\n"""\n')
    assert faults(package) == ["low: inner is public, but nobody imports it"]


def test_a_leaf_is_its_scripts_alone(package):
    plant(package, "utils/high/other.py", "from .leaf.deep import use\n")
    assert faults(package) == ["high.other:1: imports high.leaf.deep, of a leaf, which is its script's alone"]
    (package / "high" / "other.py").unlink()
    plant(package, "second.py", "from utils.high.leaf import deep\n")
    scripts = [package.parent / "run.py", package.parent / "second.py"]
    assert house.find_faults(package, scripts) == ["high.leaf: a leaf of several scripts: run.py, second.py"]
    (package / "high" / "leaf" / "__init__.py").write_text(
        '"""Of run.py and second.py.\n\nOthers import: deep.\n"""\n'
    )
    assert house.find_faults(package, scripts) == []


def test_a_script_with_the_name_of_a_wing_stands_outside_it(package):
    plant(package, "low.py", "from utils.low import inner\n")
    assert house.find_faults(package, [package.parent / "run.py", package.parent / "low.py"]) == [
        "low.py:1: low.inner is not public in low"
    ]


def test_what_happens_at_import_is_found(package):
    plant(package, "utils/high/leaf/deep.py", "for number in (1, 2):\n    print(number)\n")
    plant(package, "utils/low/tools.py", "def change():\n    global use\n    os.system('ls')\n")
    assert house.find_import_time_work("high.leaf.deep", package) == ["high.leaf.deep:3: For at import"]
    assert house.find_import_time_work("low.tools", package) == ["low.tools:7: global", "low.tools:8: calls system"]
    assert house.find_import_time_work("high.page", package) == []


def test_what_is_decided_twice_is_found(package):
    for name, text in {
        "utils/high/leaf/deep.py": 'PROMPT = "[INST] "\n',
        "utils/low/tools.py": 'FILE = "adapter_model.bin"\n',
        "run.py": "subprocess.run(command, shell=True)\n",
        "utils/low/inner.py": "ROWS = 55_296\n",
    }.items():
        plant(package, name, text)
    assert sorted(house.find_decided_twice(package)) == [
        "run.py: shell=True",
        "utils/high/leaf/deep.py: decided in utils/text/prompts.py",
        "utils/low/inner.py: 55_296",
        "utils/low/tools.py: decided in utils/weights/names.py",
    ]


def test_an_unlisted_library_and_an_imported_script_are_found(package):
    plant(package, "utils/high/leaf/deep.py", "def late():\n    import surprise.inner\n")
    assert house.find_unlisted_imports("numpy", package) == ["deep.py: imports surprise"]
    plant(package, "utils/low/tools.py", "import run\n")
    assert house.find_imported_scripts(package) == ["tools.py:6: imports the script run"]


def test_wings_are_drawn(package):
    assert house.draw(package).splitlines()[:3] == [
        "high: 2 modules, 4 lines",
        "  leaf.deep 2, page 2",
        "  > low 3",
    ]
