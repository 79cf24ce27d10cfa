"""What the documents claim is so: file tree, layers, data lines, prompt texts, old flags, error texts, links."""

import ast
import json
import re

import jinja2
import pytest
import yaml

from support import house
from support.paths import EXAMPLES, ROOT, SCRIPTS
from support.scripts import command_mistakes, commands_in, tracked
from utils.core.old_flags import DROPPED, RENAMED, REPLACED_SWITCHES
from utils.text.prompts import CHAT_TEMPLATES, LONG_SYSTEM_PROMPT, SYSTEM_PROMPT

READMES = ("README.md", "README_EN.md")
TURNS = (("user", "你好"), ("assistant", "你好！"), ("user", "天空是什么颜色？"), ("assistant", "蓝色。"))
DOCUMENTS = sorted(tracked("*.md"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READMES)
def test_the_map_names_every_wing_and_script(name):
    text = read(name)
    listed = [path.name for path in [*SCRIPTS.glob("*.py"), *(SCRIPTS / "configs").iterdir()]]
    listed += [f"{wing}/" for wing in house.wing_order()]
    assert not [file for file in listed if not re.search(rf"(?<![\w.]){re.escape(file)}(?![\w.])", text)]


def test_the_picture_of_the_house_is_drawn_from_the_code():
    assert house.draw_picture() == read("pics/house.svg"), "run make house"


@pytest.mark.parametrize("name", READMES)
def test_the_order_of_the_wings_is_the_one_of_the_package(name):
    assert " > ".join(house.wing_order()) in " ".join(read(name).split())


@pytest.mark.parametrize("name", READMES)
def test_stage_table_has_every_script_and_launcher(name):
    for path in [*SCRIPTS.glob("*.py"), *SCRIPTS.glob("run_*.sh")]:
        assert path.name in read(name)


def example_lines():
    """Every line and record of the example data, as the files have them."""
    lines = set()
    for path in EXAMPLES.rglob("*"):
        if path.suffix in (".txt", ".json", ".jsonl") and path.parent.name != "source":
            lines |= {line.rstrip(",") for line in path.read_text(encoding="utf-8").splitlines()}
    return lines


@pytest.mark.parametrize("name", ["README.md", "docs/data.md"])
def test_shown_data_is_example_data(name):
    known = example_lines()
    shown = [line for block in re.findall(r"```json\n(.*?)```", read(name), re.S) for line in block.splitlines()]
    assert len(shown) >= 3
    for line in shown:
        record = json.loads(line)
        if "text" in record:
            line = record["text"]
        # The one line that is said not to be example data shows a tool call.
        assert line in known or "function_call" in line or "tool_calls" in line, (
            f"{name}: not in examples/data: {line}"
        )


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_prompt_texts_are_what_the_templates_write(template):
    messages = [{"role": role, "content": content} for role, content in TURNS]
    if template == "mixtral":
        messages.insert(0, {"role": "system", "content": "你是一位老师。"})
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    source = environment.from_string(CHAT_TEMPLATES[template])
    text = source.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=False)
    for name in ("docs/data.md", "docs/data_EN.md"):
        shown = re.search(rf"\n`{template}`.*?```text\n(.*?)\n```", read(name), re.S).group(1)
        assert shown == text
    assert SYSTEM_PROMPT in read("docs/data.md") and LONG_SYSTEM_PROMPT in read("docs/data.md")


@pytest.mark.parametrize("name", ["docs/migrating.md", "docs/migrating_EN.md"])
def test_every_old_flag_is_in_the_migration_tables(name):
    rows = [line for line in read(name).splitlines() if line.startswith("| `--")]
    for old, new in {**RENAMED, **{old: flags[0][2:] for old, flags in REPLACED_SWITCHES.items()}}.items():
        assert any(f"`--{old}`" in row and re.search(rf"`--{new}\b", row) for row in rows), old
    for old in DROPPED:
        assert any(re.search(rf"`--{old}\b", row) for row in rows), old


def message_parts():
    """The constant parts of all strings in the code, adjoining literals joined as Python does."""
    parts = []
    for path in house.files_with_code():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return parts


def faq_headings(name):
    return [line.removeprefix("### ").strip("`") for line in read(name).splitlines() if line.startswith("### ")]


def test_faq_is_keyed_by_errors_the_code_raises():
    parts = message_parts()
    headings = faq_headings("docs/faq.md")
    assert headings == faq_headings("docs/faq_EN.md") and len(headings) > 30
    unknown = [heading for heading in headings if not any(heading in part for part in parts)]
    assert not unknown


@pytest.mark.parametrize("name", READMES)
def test_readme_errors_are_in_the_faq(name):
    rows = [line for line in read(name).splitlines() if "docs/faq" in line and line.startswith("| `")]
    headings = faq_headings("docs/faq.md")
    for row in rows:
        for error in re.findall(r"`([^`]+)`", row):
            assert error in headings, error
    assert len(rows) > 8


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    mistakes = [fault for target in links_in(path.read_text(encoding="utf-8")) if (fault := link_fault(path, target))]
    assert mistakes == []


def links_in(text):
    """Targets of a markdown text's links and pictures, also of HTML's; code is no text."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return [one or other for one, other in re.findall(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"", text)]


def link_fault(path, target):
    """None where a relative link leads to a tracked kind of file or folder, and to an anchor or heading in it."""
    if re.match(r"https?:|mailto:", target):
        return None
    file, _, anchor = target.partition("#")
    linked = path.parent / file if file else path
    if not linked.exists():
        return f"{target}: no such file"
    if anchor and anchor not in anchors_of(linked):
        return f"{target}: no such anchor"
    return None


def anchors_of(path):
    """Anchors as GitHub has them: <a id>, and headings in lower case without punctuation, spaces as hyphens."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
    return {*re.findall(r'<a id="([^"]+)"', text), *slugs}


@pytest.mark.parametrize("suffix", ["", "_EN"])
def test_the_index_has_every_page_and_notebook(suffix):
    linked = set(links_in(read(f"docs/README{suffix}.md")))
    pages = {path.name for path in (ROOT / "docs").glob("*.md") if path.stem.endswith("_EN") == bool(suffix)}
    notebooks = {f"../notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert (pages | notebooks) - {f"README{suffix}.md"} <= linked


def test_faulty_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text('# A heading: `x`, 中文\n<a id="here"></a>\n', encoding="utf-8")
    page = tmp_path / "page.md"
    text = '[a](other.md#here) ![b](none.png) `[c](no)` [d](other.md#a-heading-x-中文) <a href="other.md#gone">'
    assert [link_fault(page, target) for target in links_in(text)] == [
        None, "none.png: no such file", None, "other.md#gone: no such anchor",
    ]  # fmt: skip


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_parse(path):
    """Every command that starts a file of this repository: it exists, its flags and variables are known."""
    assert [fault for line in commands_in(path.read_text(encoding="utf-8")) for fault in command_mistakes(line)] == []


def test_faulty_commands_are_found():
    good = "PLAN=1 NPROC=8 MODEL=m DATA=d bash scripts/run_pt.sh --gpu_memory 24GiB --replay_share=0.1 && ls --all"
    assert command_mistakes(good) == [] and len(commands_in(f"```bash\n# bash scripts/x.sh\n{good}\n```")) == 1
    for bad in (
        "bash scripts/run_no.sh", "MODELL=m bash scripts/run_sft.sh", "python scripts/pt.py --gpu_memory 1GB",
        "torchrun --nproc_per_node 8 scripts/sft.py --lora_rnk 8", "ls; PYTHON=p bash scripts/run_pt.sh --x",
    ):  # fmt: skip
        assert len(command_mistakes(bad)) == 1, bad
    assert sum(len(commands_in(path.read_text(encoding="utf-8"))) for path in DOCUMENTS) > 150


def test_workflow_and_issue_forms_are_sound():
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert "uses" not in step or re.search(r"@[0-9a-f]{40}$", step["uses"]), "pinned by commit"
        rows = {row["constraints"] for row in job["strategy"]["matrix"]["include"]}
        assert all(row == "/dev/null" or (ROOT / row).is_file() for row in rows)
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.name != "config.yml":
            assert {"name", "description", "body"} <= form.keys()
            names = [part["id"] for part in form["body"] if "id" in part]
            assert len(set(names)) == len(names)
    assert yaml.safe_load(read("CITATION.cff"))["license"] == "Apache-2.0"


@pytest.mark.parametrize("name", ["docs/architecture.md", "docs/architecture_EN.md"])
def test_the_architecture_names_files_and_definitions_that_exist(name):
    """`wing/module.py` below utils, scripts and tests by their paths; names in brackets behind a file stand in it."""
    text, checked = read(name), 0
    pattern = r"`((?:[a-z_]+/)*[a-z_A-Z]+\.(?:py|sh))`(?: ?[(（]((?:`\w+`(?:, |、)?)+)[)）])?"
    for file, names in re.findall(pattern, text):
        if "X" in file:
            continue
        places = [place for place in (SCRIPTS / "utils" / file, SCRIPTS / file, ROOT / file) if place.is_file()]
        assert places, file
        for definition in re.findall(r"\w+", names):
            defined = rf"^(?:class|def|async def) {definition}\b|^{definition}\b.*="
            assert re.search(defined, places[0].read_text(encoding="utf-8"), re.M), f"{file}: {definition}"
            checked += 1
    assert checked > 10
