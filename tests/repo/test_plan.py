"""The tests stand in their plan; each check of support.plan is shown to find a planted fault."""

from pathlib import Path

import pytest

from support import plan

FILES = {
    "utils/__init__.py": '"""The package.\n\nlow\n"""\n',
    "utils/low/__init__.py": '"""Low."""\n',
    "utils/low/tools.py": "",
    "utils/low/page.py": "",
    "utils/low/leaf/__init__.py": '"""Leaf."""\n',
    "utils/low/leaf/deep.py": "",
    "tests/conftest.py": "from support.helper import thing\n",
    "tests/support/helper.py": "thing = 1\n",
    "tests/unit/low/test_tools.py": "from utils.low import tools\nfrom support.helper import thing\n",
    "tests/unit/low/leaf/test_deep.py": "def test():\n    from utils.low.leaf.deep import use\n",
    "tests/e2e/test_run.py": "from utils.low.page import use\n",
    "tests/repo/test_house.py": "",
}
LISTED = {"low.page": "e2e/test_run: needs a browser"}


@pytest.fixture
def tree(tmp_path) -> Path:
    for name, text in FILES.items():
        plant(tmp_path, name, text)
    return tmp_path


def plant(tree: Path, name: str, text: str) -> None:
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text(text)


def faults(tree: Path, listed: dict[str, str] = LISTED) -> list[str]:
    tests, package = tree / "tests", tree / "utils"
    return [
        *plan.find_misplaced(tests, package),
        *plan.find_imported_tests(tests),
        *plan.find_unnamed(tests, package, listed),
    ]


def test_every_test_has_its_place():
    assert plan.find_misplaced() == []


def test_no_test_imports_a_test():
    assert plan.find_imported_tests() == []


def test_every_module_is_named_by_a_unit_test_of_its_wing_or_listed():
    assert plan.find_unnamed() == []


def test_a_good_tree_has_no_fault(tree):
    assert faults(tree) == []


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("tests/unit/low/test_gone.py", "", "unit/low/test_gone.py: there is no module low.gone"),
        ("tests/unit/high/test_tools.py", "", "unit/high/test_tools.py: there is no module high.tools"),
        ("tests/unit/test_tools.py", "", "unit/test_tools.py: there is no module tools"),
        ("tests/test_all.py", "", "test_all.py: need unit/<wing>/, e2e/ or repo/"),
        ("tests/e2e/more/test_run.py", "", "e2e/more/test_run.py: need unit/<wing>/, e2e/ or repo/"),
        ("tests/unit/low/helper.py", "", "unit/low/helper.py: helpers stand in support/"),
        ("tests/repo/test_house.py", "import test_run\n", "repo/test_house.py:1: imports test_run"),
        ("tests/repo/test_house.py", "from e2e.test_run import a\n", "imports e2e.test_run.a"),
        ("tests/support/helper.py", "def late():\n    from .. import test_all\n", "support/helper.py:2: imports"),
        ("tests/repo/test_house.py", "from conftest import plant\n", "imports conftest.plant"),
        ("utils/low/new.py", "", "low.new: no test in unit/low/ imports it"),
        ("tests/unit/low/test_tools.py", "", "low.tools: no test in unit/low/ imports it"),
        ("tests/unit/low/test_page.py", "from utils.low import page\n", "low.page: listed, but a unit test imports"),
    ],
)
def test_a_planted_fault_is_found(tree, name, text, fault):
    plant(tree, name, text)
    assert len(faults(tree)) == 1 and fault in faults(tree)[0]


def test_a_list_that_is_no_longer_true_is_found(tree):
    assert faults(tree, {}) == ["low.page: no test in unit/low/ imports it"]
    assert faults(tree, LISTED | {"low.gone": "e2e/test_run: x"}) == ["low.gone: listed, but there is no such module"]
    assert faults(tree, {"low.page": "e2e/test_walk: x"}) == [
        "low.page: listed with e2e/test_walk, which is no test file"
    ]


def test_a_unit_test_of_another_wing_does_not_count(tree):
    plant(tree, "utils/high/__init__.py", '"""High."""\n')
    plant(tree, "utils/high/top.py", "")
    plant(tree, "tests/unit/low/test_tools.py", "from utils.low import tools\nfrom utils.high import top\n")
    assert faults(tree) == ["high.top: no test in unit/high/ imports it"]
