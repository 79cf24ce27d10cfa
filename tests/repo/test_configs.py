"""The ready config files: they parse with their script's own parser, and say what the launchers say."""

import importlib.util
import os
import re
import shlex
import subprocess

import pytest
import yaml

from support.paths import ROOT, SCRIPTS
from support.scripts import script_types
from utils.core.command_line import parse_args

CONFIGS = ROOT / "examples" / "configs"
spec = importlib.util.spec_from_file_location("plan_headers", CONFIGS / "plan_headers.py")
plan_headers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan_headers)
STAGES = ("pt", "sft", "rm", "ppo", "dpo")
SIZES = ("1.3b", "13b", "mixtral")  # the files without a size before their name are for 7B, as the launchers are
OTHERS = {f"{size}_{stage}": stage for size in SIZES for stage in STAGES}


def parse(script, argv):
    return parse_args(*script_types(f"{script}.py"), argv=argv)


def values(instances):
    return {name: value for instance in instances for name, value in vars(instance).items()}


def launcher_argv(script):
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": "python", "MODEL": "m", "DATA": "d", "TOKENIZER": "t"}
    environment["REWARD"] = "output/rm"
    for name in (
        "OUT",
        "LR",
        "LORA_RANK",
        "LORA_ALPHA",
        "BLOCK",
        "LOSS",
        "BETA",
        "PROMPT_LENGTH",
        "LENGTH",
        "TEMPLATE",
        "SEED",
        "NPROC",
        "NNODES",
        "CONFIG",
    ):
        environment.pop(name, None)
    result = subprocess.run(
        ["bash", str(SCRIPTS / f"run_{script}.sh")], env=environment, capture_output=True, text=True, check=True
    )
    return shlex.split(result.stdout)[2:]


def test_every_stage_has_its_config_file():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*STAGES, *OTHERS}


@pytest.mark.parametrize("name", [*STAGES, *OTHERS])
def test_config_parses_and_every_key_arrives(name):
    path = CONFIGS / f"{name}.yaml"
    parsed = values(parse(OTHERS.get(name, name), [str(path)]))
    for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        if name in ("precision", "gradient_checkpointing"):  # resolved for this machine, and renamed by transformers
            continue
        got = parsed[name]
        got = getattr(got, "value", got)
        assert got == (float(value) if isinstance(got, float) else value), name


@pytest.mark.parametrize("script", STAGES)
def test_config_says_what_the_launcher_says(script):
    from_file = values(parse(script, [str(CONFIGS / f"{script}.yaml")]))
    from_launcher = values(parse(script, launcher_argv(script)))
    # Paths are the user's; the files add what there is no environment variable for.
    theirs = {"model_name_or_path", "tokenizer_name_or_path", "train_data", "replay_data", "replay_share"}
    theirs |= {"preprocessing_num_workers", "eval_strategy", "eval_steps", "do_eval"}
    differ = {
        name: (from_file[name], from_launcher[name])
        for name in from_file
        if name not in theirs and not name.startswith("_") and from_file[name] != from_launcher[name]
    }
    # transformers keeps objects made for this process, which compare by identity.
    differ = {name: pair for name, pair in differ.items() if type(pair[0]).__module__ in ("builtins", "enum")}
    assert not differ


# What a size changes, and nothing else, against the 7B's file; for all weights (1.3b) LoRA has no settings.
OF_THE_SIZE = {"model_name_or_path", "tokenizer_name_or_path", "output_dir", "load_in_kbits", "reward_model"}
ALL_WEIGHTS = {"full_finetuning", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"}


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("mixtral_pt", "mixtral_sft")])
def test_other_sizes_change_what_the_size_changes(name):
    """The two for Mixtral's training are Chinese-Mixtral's own settings."""
    stage = OTHERS[name]
    mine, plain = (yaml.safe_load((CONFIGS / f"{n}.yaml").read_text(encoding="utf-8")) for n in (name, stage))
    differ = {key for key in mine.keys() | plain.keys() if mine.get(key) != plain.get(key)}
    assert differ <= OF_THE_SIZE | (ALL_WEIGHTS | {"learning_rate"} if mine.get("full_finetuning") else set())
    assert mine["output_dir"] == f"output/{name}"


@pytest.mark.parametrize("name", [*STAGES, *OTHERS])
def test_the_header_has_a_planned_figure(name):
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    planned = [line for line in lines if line.startswith(plan_headers.MARK)]
    assert len(planned) == 1 and re.search(r": \d+\.\d GB; 8 GPUs .* \d+\.\d GB", planned[0])
    assert f"python scripts/{OTHERS.get(name, name)}.py examples/configs/{name}.yaml" in lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STAGES, *OTHERS])
def test_the_header_says_what_the_planner_says(name):
    path = CONFIGS / f"{name}.yaml"
    assert plan_headers.memory_line(path) in path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("page", ["docs/choose.md", "docs/choose_EN.md"])
def test_the_page_of_choices_has_the_headers_figures(page):
    rows = re.findall(r"^\| `([\w.]+\.yaml)` (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
    for name, row in rows:
        header = next(line for line in (CONFIGS / name).read_text("utf-8").splitlines() if plan_headers.MARK in line)
        assert re.findall(r"(\d+\.\d) GB", row) == re.findall(r"(\d+\.\d) GB", header), name
    assert len(rows) >= 7


def test_shapes_are_those_that_were_published():
    """Parameters as published: Llama-2 with 55,296 rows, Mixtral-8x7B; the 1.3B is four layers of the 7B."""
    from utils.planning.stages import count_weights
    from utils.weights.config import load_config

    billions = {path.name: count_weights(load_config(str(path))) / 1e9 for path in (CONFIGS / "shapes").iterdir()}
    rows = 2 * (55296 - 32000) * 4096 / 1e9
    assert billions["7b"] == pytest.approx(6.738415616 + rows)
    assert billions["13b"] == pytest.approx(13.015864320 + rows * 5120 / 4096)
    assert billions["mixtral"] == pytest.approx(46.702792704)
    assert billions["1.3b"] == pytest.approx(6.738415616 + rows - 28 * 0.202383360)


@pytest.mark.parametrize("script", STAGES)
def test_command_line_beats_the_config(script):
    parsed = values(parse(script, [str(CONFIGS / f"{script}.yaml"), "--learning_rate", "3e-5", "--lora_rank", "8"]))
    assert parsed["learning_rate"] == 3e-5 and parsed["lora_rank"] == 8
