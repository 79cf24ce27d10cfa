"""docs/rlhf.md: every command parses, batches come out even, the reward function runs, sizes are the formulas'."""

import os
import re
import shlex
import subprocess

import pytest

from support.paths import ROOT, SCRIPTS
from support.scripts import script_types
from utils.core.command_line import parse_args
from utils.rlhf.rewards import call_reward_function, load_reward_function

TEXT = (ROOT / "docs" / "rlhf.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)
COMMANDS = [
    line
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def expand(command):
    """A documented command as (variables, script, flags), launchers written out."""
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(variables) :]
    if words[0] == "bash":
        left = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        printed = subprocess.run(
            words, cwd=ROOT, env={**left, **variables, "DRY_RUN": "1"}, capture_output=True, text=True, check=True
        )
        words = shlex.split(printed.stdout)
    place = next(number for number, word in enumerate(words) if word.endswith(".py") and "scripts/" in word)
    return variables, words[place].split("/")[-1], words[place + 1 :]


@pytest.mark.parametrize("launcher", ["run_rm.sh", "run_ppo.sh"])
def test_the_betas_of_deepspeed_chat_can_be_had(launcher):
    """They are in its code and not among its flags, so that the table has to say how."""
    assert "| `--adam_beta2 0.95`" in TEXT
    _, script, flags = expand(f"MODEL=m REWARD=r DATA=d bash scripts/{launcher} --adam_beta2 0.95")
    [training] = [part for part in parse_args(*script_types(script), argv=flags) if hasattr(part, "adam_beta2")]
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.95)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse_and_batches_come_out_even(command, monkeypatch):
    variables, script, flags = expand(command)
    assert (SCRIPTS / script).is_file()
    if flags and flags[0].endswith("run_config.yaml"):
        flags[0] = "examples/configs/ppo.yaml"  # the one that such a run would write is not there
    monkeypatch.chdir(ROOT)
    # Parsing a DeepSpeed config would prepare this process for it.
    if "--deepspeed" in flags and not flags[(place := flags.index("--deepspeed")) + 1 :][0].startswith("--"):
        assert (ROOT / flags[place + 1]).is_file()
        del flags[place : place + 2]
    settings = {}
    if script in ("rm.py", "ppo.py", "dpo.py") and "--output_dir" not in flags and not flags[0].endswith(".yaml"):
        pytest.fail(f"{script} without --output_dir")
    for part in parse_args(*script_types(script), argv=flags, documented=("base_model", "lora_model")):
        settings |= vars(part)
    if script == "ppo.py":
        processes = int(variables.get("NPROC", 1)) * int(variables.get("NNODES", 1))
        processes = (
            processes if (torchrun := re.search(r"nproc_per_node (\d+)", command)) is None else int(torchrun[1])
        )
        old = "--generation_batches" in command  # counts the processes there are, here one
        step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        rollouts = settings["rollout_batch_size"]  # None: ppo.py takes whole optimizer steps
        assert rollouts is None or rollouts % (step * (1 if old else processes)) == 0


def test_there_are_commands_of_every_stage():
    scripts = {expand(command)[1] for command in COMMANDS}
    assert {"rm.py", "ppo.py", "dpo.py", "eval_alignment.py"} <= scripts and len(COMMANDS) > 20


def test_the_reward_function_runs(tmp_path):
    (source,) = [block for kind, block in BLOCKS if kind == "python"]
    (tmp_path / "rewards.py").write_text(source, encoding="utf-8")
    name, function = load_reward_function(f"{tmp_path / 'rewards.py'}:short_and_polite")
    prompts = ["问题", "问题", "问题", "问题"]
    answers = ["谢谢您，我知道了。", "知道了。", "问", "请" + "好" * 199]
    assert call_reward_function(name, function, prompts, answers) == [1.0, 0.0, -1.0, 0.0]


def test_the_memory_plan_is_what_its_formulas_say():
    """The totals of the tables, from the formulas of the text block, by this test's own arithmetic."""
    width, inner, rows, rank = 4096, 11008, 55_296, 64
    embedding = rows * width
    for column, layers, bits in ((0, 32, 16), (1, 32, 4), (-1, 4, 16)):
        backbone = layers * (4 * width**2 + 3 * width * inner + 2 * width) + width
        lora = layers * rank * (4 * 2 * width + 3 * (width + inner))
        # 4 bits and, quantised again, the scale of every 64 weights; what is not a linear layer stays in 16.
        base = (2 if bits == 16 else 0.516) * backbone + 2 * 2 * embedding
        reward_base = 2 * (backbone + embedding)

        def learned(tokens, logits=0.4e9, layers=layers):
            return 2 * layers * width * tokens + 66 * width * tokens + logits

        cache = 4 * layers * width * 16 * 1024 * (1 + 1 / layers)
        checkpoints = 2 * layers * width * 4096
        stays = base + 12 * lora + 4 * lora
        learning = 4 * lora + learned(4096)
        full = 16 * (backbone + 2 * embedding) + 16 * (backbone + embedding) + base + reward_base
        four = 2 * base + 2 * reward_base + 24 * lora + max(cache, 8 * lora + checkpoints + learned(4096))
        totals = {
            "**峰值**": stays + max(cache, learning),
            "`--per_device_rollout_batch_size 8` 时": stays + max(cache / 2, learning),
            "同样的模型和行数做 SFT": base + 16 * lora + learned(4096),
            "一份权重（默认）": stays + max(cache, learning),
            "`--critic adapter`": stays + 12 * lora + max(cache, learning + 4 * lora + checkpoints),
            "四个模型，策略和 critic": four,
            "四个模型，全参数": full,
            "奖励模型，2 对": reward_base + 16 * lora + learned(2 * 4096, 0),
            "同上，8 对": reward_base + 16 * lora + learned(8 * 4096, 0),
            "DPO，1 对": base + 16 * lora + learned(2048),
        }
        for start, expected in totals.items():
            (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| {start}")]
            figures = [float(figure) for figure in re.findall(r"([\d.]+) GB", row)]
            if bits == 4 and len(figures) < 3:
                continue  # the other tables have 16 bits alone
            assert figures[column] == pytest.approx(expected / 1e9, abs=0.051), start
