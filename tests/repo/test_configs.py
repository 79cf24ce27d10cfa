"""The ready config files: they parse with their script's own parser, and say what the launchers say."""

import os
import shlex
import subprocess

import pytest
import yaml

from support.paths import ROOT, SCRIPTS
from support.scripts import script_types
from utils.core.command_line import parse_args

CONFIGS = ROOT / "examples" / "configs"
STAGES = ("pt", "sft", "rm", "ppo", "dpo")
OTHERS = {"mixtral_pt": "pt", "mixtral_sft": "sft"}  # of another model than the launchers'


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


@pytest.mark.parametrize("script", STAGES)
def test_command_line_beats_the_config(script):
    parsed = values(parse(script, [str(CONFIGS / f"{script}.yaml"), "--learning_rate", "3e-5", "--lora_rank", "8"]))
    assert parsed["learning_rate"] == 3e-5 and parsed["lora_rank"] == 8
