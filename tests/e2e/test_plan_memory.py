"""plan_memory.py: from config.json and flags alone, through every training launcher; what it says adds up."""

import json
import os
import shlex
import subprocess
import sys

import plan_memory
import pytest
from transformers import LlamaConfig

from support.paths import SCRIPTS
from support.scripts import script_types
from support.stages import run_main, stage_argv, write_records
from utils.core.errors import InputError
from utils.planning.request import STAGES
from utils.training.memory import Record, append, device_name, read_records, records_file

MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
FULL_IN_4_BITS = ("--full_finetuning", "--load_in_kbits", "4")
LAUNCHERS = ("pt", "sft", "rm", "ppo", "dpo")


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory):
    """config.json alone."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    LlamaConfig(**MODEL, vocab_size=512, dtype="bfloat16").save_pretrained(folder)
    return folder


def run_plan(stage: str, folder, *flags: str, **plan) -> dict:
    command = [stage, "--model_name_or_path", str(folder), "--output_dir", str(folder.parent / "run"), *flags]
    return plan_memory.main(command, plan_memory.PlanArguments(**plan))


def test_the_flags_are_those_of_the_scripts():
    for stage in LAUNCHERS:
        assert script_types(f"{stage}.py")[:-1] == STAGES[stage]


@pytest.mark.slow
@pytest.mark.parametrize("stage", LAUNCHERS)
def test_every_launcher_plans(stage, config_folder, tmp_path):
    environment = {**os.environ, "PLAN": "1", "DRY_RUN": "1", "MODEL": str(config_folder), "DATA": "none"}
    environment |= {"NPROC": "4", "NNODES": "2", "OUT": str(tmp_path / "out"), "REWARD": "", "PYTHON": sys.executable}
    launched = subprocess.run(
        ["bash", str(SCRIPTS / f"run_{stage}.sh"), "--gpu_memory", "24GiB"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = shlex.split(launched.stdout)
    assert words[1].endswith("plan_memory.py")
    own, command = plan_memory.split_command(words[2:])
    assert command[0] == stage and own == ["--gpu_memory", "24GiB", "--processes", "8"]
    command += ["--reward_function", "none:none"] if stage == "ppo" else []
    figures = plan_memory.main(command, plan_memory.PlanArguments(processes=8))
    assert figures["needed"] == figures["peak"] == pytest.approx(sum(figures["parts"].values()))
    assert "gradients' copies to reduce" in figures["parts"]


def test_the_launcher_of_its_own(config_folder, tmp_path):
    environment = {**os.environ, "MODEL": str(config_folder), "STAGE": "sft", "GPU": "8GiB", "DRY_RUN": "1"}
    launched = subprocess.run(
        ["bash", str(SCRIPTS / "run_plan_memory.sh"), "--lora_rank", "4"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "plan_memory.py sft" in launched.stdout and "--gpu_memory 8GiB" in launched.stdout


@pytest.mark.slow
def test_parts_add_up_and_knobs_save(config_folder, capsys):
    figures = run_plan("pt", config_folder, "--per_device_train_batch_size", "8", gpu_memory="8GiB")
    assert figures["peak"] == pytest.approx(sum(figures["parts"].values()))
    said = capsys.readouterr().out
    assert "fits 8.6 GB" in said and "--gradient_checkpointing:" in said and "--load_in_kbits 4:" in said


@pytest.mark.slow
def test_suggestions_fit_and_keep_the_batch(config_folder):
    flags = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4", "--block_size", "2048"]
    found = run_plan("pt", config_folder, *flags, gpu_memory="1GiB")["suggestions"]
    assert found
    for item in found:
        job = item.plan.setting.job
        assert item.plan.needed <= 2**30
        accumulation = 16 // job.rows
        assert job.rows == 4 or f"--gradient_accumulation_steps {accumulation}" in item.flags


@pytest.mark.slow
def test_what_cannot_fit_is_said(config_folder, capsys):
    assert run_plan("pt", config_folder, gpu_memory="10MB")["suggestions"] == []
    assert "no setting of this model and batch fits" in capsys.readouterr().out


@pytest.mark.slow
def test_time_and_price_from_a_given_or_a_measured_rate(config_folder):
    given = run_plan("pt", config_folder, tokens="7.2M", tokens_per_second=1000, price=2.5, processes=2)
    assert (given["hours"], given["price"]) == (2.0, 10.0)
    with pytest.raises(InputError, match="no run of these settings was measured"):
        run_plan("pt", config_folder, tokens="7.2M")


@pytest.mark.slow
def test_earlier_runs_calibrate(config_folder, capsys):
    from utils.planning.advice import describe
    from utils.planning.request import PlannedRun, read_request

    args = [kind() for kind in STAGES["pt"]]
    args[0].model_name_or_path = str(config_folder)
    setting = read_request("pt", args, PlannedRun(output_dir="x"), on_gpu=False)
    path = records_file(config_folder.parent / "run")
    append(path, Record("pt", describe(setting), device_name(), 1e9, 1.25e9, 500.0, 1))
    try:
        assert run_plan("pt", config_folder, tokens="1.8M")["hours"] == 1.0
        assert "1 runs of pt here took 1.25 x their plan" in capsys.readouterr().out
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("command", "plan", "message"),
    [
        (["tp"], {}, "tp: name the stage first, one of pt, sft, rm, ppo, dpo"),
        (["pt"], {}, "pass --model_name_or_path"),
        (["pt", "--model_name_or_path", "FOLDER", "--lora_rankk", "4"], {}, "lora_rank"),
        (
            ["pt", "--model_name_or_path", "FOLDER", "--full_finetuning", "--load_in_kbits", "4"],
            {},
            "cannot train 4-bit",
        ),
        (["pt", "--model_name_or_path", "FOLDER", "--modules_to_save", "embed"], {}, "no module is called embed"),
        (["pt", "--model_name_or_path", "/nowhere"], {}, "nowhere"),
    ],
)
def test_bad_commands_are_named(config_folder, command, plan, message):
    words = [word.replace("FOLDER", str(config_folder)) for word in command]
    with pytest.raises(InputError, match=message):
        plan_memory.main(words, plan_memory.PlanArguments(**plan))


@pytest.mark.parametrize(
    "flags", [{"gpu_memory": "24 apples"}, {"processes": 0}, {"tokens": "-3"}, {"tokens_per_second": 0}, {"price": -1}]
)
def test_bad_values_are_named(flags):
    name = next(iter(flags))
    with pytest.raises(InputError, match=f"--{name}"):
        plan_memory.PlanArguments(**flags)


def test_sizes():
    assert plan_memory.read_size("24GiB", "x") == 24 * 2**30
    assert plan_memory.read_size("1.5 GB", "x") == 1.5e9
    assert plan_memory.read_size("200M", "x") == 2e8


@pytest.mark.parametrize(
    "stage", [stage if stage == "sft" else pytest.param(stage, marks=pytest.mark.slow) for stage in LAUNCHERS]
)
def test_a_run_ends_with_planned_beside_measured(stage, tiny_model_folder, tmp_path, caplog):
    """In its log, its figures, and the file that calibrates later plans; the plan is what plan_memory.py says."""
    records = write_records(tmp_path / "records")
    argv = stage_argv(stage, tiny_model_folder, records, tmp_path / "runs" / "first", "--precision", "fp32")
    with caplog.at_level("INFO"):
        run_main(stage, argv)
    assert "memory: planned" in caplog.text
    [record] = read_records(records_file(tmp_path / "runs" / "first"))
    assert record.stage == stage and record.planned > 0 and record.tokens_per_second > 0
    figures = json.loads((tmp_path / "runs" / "first" / "all_results.json").read_text())
    assert figures["planned_memory_gb"] == pytest.approx(record.planned / 1e9, abs=1e-4)
    if stage in ("pt", "ppo"):  # the others know their longest row
        planned = plan_memory.main([stage, *argv], plan_memory.PlanArguments())
        assert planned["peak"] == pytest.approx(record.planned)
