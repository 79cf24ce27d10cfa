"""Training runs that are killed and resumed, and their weights compared."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.paths import SCRIPTS
from utils.core.arguments import DataArguments, LoraArguments, ModelArguments
from utils.core.command_line import parse_args
from utils.training.arguments import RunArguments


def losses(folder: Path) -> list[tuple[int, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def assert_equal_weights(one: Path, other: Path, name: str = "adapter_model.safetensors") -> None:
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def run_dpo(argv: list[str]) -> dict:
    """dpo.main with a command line, in this process."""
    import dpo

    types = (ModelArguments, LoraArguments, DataArguments, dpo.PreferenceArguments, RunArguments)
    return dpo.main(*parse_args(*types, argv=argv))


def command(script: str, argv: list[str]) -> list[str]:
    return [sys.executable, str(SCRIPTS / script), *argv]


def run_until_done(script: str, argv: list[str], folder: Path, kills: int, generator: random.Random) -> int:
    """Run the command, SIGKILL it `kills` times at random moments of its work, then let it end; returns kills done."""
    done = 0
    while True:
        log = (folder.parent / f"{folder.name}.log").open("ab")
        process = subprocess.Popen(command(script, argv), stdout=log, stderr=log)
        if done == kills:
            assert process.wait(timeout=300) == 0, (folder.parent / f"{folder.name}.log").read_text()[-3000:]
            return done
        # From the moment training moves (a new checkpoint folder appears), at any point up to a few steps later.
        seen = {path.name for path in folder.glob("checkpoint-*")}
        early = generator.random() < 0.2
        while process.poll() is None and not early and {path.name for path in folder.glob("checkpoint-*")} <= seen:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 6 if early else 0.15))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        assert process.wait() in (0, -signal.SIGKILL), (folder.parent / f"{folder.name}.log").read_text()[-3000:]
        if (folder / "all_results.json").is_file():
            return done


def check_kills(script, argv_of, reference, tmp_path, kills):
    generator = random.Random(kills)
    total, attempt = 0, 0
    while total < kills:
        attempt += 1
        folder = tmp_path / f"killed-{attempt}"
        total += run_until_done(script, argv_of(folder), folder, min(kills - total, 5), generator)
        assert_equal_weights(reference, folder)
        assert losses(folder) == losses(reference), "every step saw the same samples"
