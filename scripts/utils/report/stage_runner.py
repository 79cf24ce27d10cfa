"""The stages of a recipe, run one after another or side by side, with their times and memory in a log."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# What run_demo.sh writes behind the last word of a stage in one command line of several.
END = "<end>"
THEN = "<then>"  # the same, where the stage behind it needs this one
SIDE_BY_SIDE = 2


class Stages:
    """Runs the commands of stages; each that succeeds gets a line in the log."""

    def __init__(self, log: str | Path, threads: int | None = None) -> None:
        """
        Args:
            log: a jsonl file; see recipe.read_stage_log.
            threads: of each command; None: as many as it takes by itself.
        """
        self.log = Path(log)
        self.environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        self.failed = threading.Event()
        self._terminal = threading.Lock()

    def run(self, name: str, command: Sequence[str]) -> int:
        """Run one; returns its exit status. After one has failed no other begins.

        Of those that run side by side one has the terminal; what another prints comes when it has ended.
        """
        if self.failed.is_set():
            return 0
        if not self._terminal.acquire(blocking=False):
            with tempfile.TemporaryFile() as output:
                status = self._run(name, command, output)
                output.seek(0)
                text = output.read().decode(errors="replace")
            # Of a progress bar its last state.
            lines = [line.rsplit("\r", 1)[-1] for line in text.rstrip().split("\n")]
            print("\n".join([f"\n== {name}, beside it", *lines]), flush=True)
            return status
        try:
            print(f"== {name}", flush=True)
            return self._run(name, command)
        finally:
            self._terminal.release()

    def _run(self, name: str, command: Sequence[str], output: Any = None) -> int:
        started = time.time()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment
        )
        _, wait_status, usage = os.wait4(process.pid, 0)  # the memory of this one alone, and of what it started
        seconds, status = time.time() - started, os.waitstatus_to_exitcode(wait_status)
        if status:
            self.failed.set()
            return status
        unit = 1 if sys.platform == "darwin" else 1024
        figures = {"started": started, "seconds": seconds, "peak_memory_gb": usage.ru_maxrss * unit / 1e9}
        line = json.dumps({"name": name, **{key: round(value, 3) for key, value in figures.items()}})
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        return 0


def main(log: str, words: Iterable[str]) -> int:
    """Run stages, two at a time with half of the cores each where there are several; returns an exit status.

    Args: words: for each stage its name, the words of its command, and END; THEN where the next one waits for it.
    """
    rows = [_split(row, THEN) for row in _split(words, END)]
    stages = Stages(log, None if len(rows) == 1 else max(1, (os.cpu_count() or 1) // SIDE_BY_SIDE))

    def run_row(row: Sequence[Sequence[str]]) -> list[int]:
        return [stages.run(name, command) for name, *command in row]

    try:
        with concurrent.futures.ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            statuses = itertools.chain(*pool.map(run_row, rows))
            return next((abs(status) for status in statuses if status), 0)
    except KeyboardInterrupt:
        return 130


def _split(words: Iterable[str], mark: str) -> list[list[str]]:
    """The words between marks."""
    return [list(group) for is_mark, group in itertools.groupby(words, mark.__eq__) if not is_mark]


def wall_seconds(stages: Iterable[Mapping[str, float]]) -> float:
    """Seconds in which at least one of the stages ran. Args: stages: "started" and "seconds" of each."""
    total, end = 0.0, -float("inf")
    for stage in sorted(stages, key=lambda stage: stage["started"]):
        until = stage["started"] + stage["seconds"]
        total += max(0.0, until - max(end, stage["started"]))
        end = max(end, until)
    return total
