"""The stages of a recipe: commands run in order, alone or two side by side, with their times and memory in a log."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGE_LOG = "stages.jsonl"  # in the recipe's folder; read_stage_log in recipe reads it
SIDE_BY_SIDE = 2


@dataclass(frozen=True)
class Stage:
    """A command, and what it makes in the recipe's folder."""

    name: str
    makes: str  # a folder, or a file with a suffix
    last: str = ""  # the file of that folder that is written last: with it the stage is finished
    command: str = ""  # as one would type it, `NAME=value ... program flags`; line breaks count as spaces
    needs: Sequence[str] = ()  # stages above this one
    beside: bool = False  # mostly start-up, or too small for all cores: runs beside its neighbours in the list

    @property
    def words(self) -> list[str]:
        """The command for the system."""
        return ["env", *shlex.split(self.command)]

    def mark(self, folder: Path) -> Path:
        """The file that tells that it is finished."""
        return folder / self.makes / self.last

    def remove_output(self, folder: Path) -> None:
        """What it made before, and what it left under names beside that."""
        output = (folder / self.makes).with_suffix("")
        for path in [output, *output.parent.glob(f"{output.name}.*")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def run_stages(stages: Sequence[Stage], folder: Path) -> int:
    """Run the first stage that is not finished and all behind it; returns an exit status.

    Those behind it may need what it makes, so what they made before is removed. The first one's own is kept: training
    goes on from its last checkpoint. After a stage has failed no other begins. Each that succeeds gets a line in
    STAGE_LOG.

    Raises: ValueError if one needs a stage that does not stand above it.
    """
    for number, stage in enumerate(stages):
        if missing := set(stage.needs) - {other.name for other in stages[:number]}:
            raise ValueError(f"{stage.name} needs {sorted(missing)}, which do not stand above it")
    waiting = list(itertools.dropwhile(lambda stage: stage.mark(folder).exists(), stages))
    for stage in stages[: len(stages) - len(waiting)]:
        print(f"== {stage.name}: finished before, skipped ({stage.mark(folder)})", flush=True)
    try:
        for group in _groups(waiting):
            for stage in group:
                if stage is not waiting[0]:
                    stage.remove_output(folder)
            if status := _run_group(group, folder / STAGE_LOG):
                return status
    except KeyboardInterrupt:
        return 130
    return 0


def _groups(stages: Iterable[Stage]) -> Iterator[list[Stage]]:
    """Neighbours that run side by side; each of the others by itself."""
    for beside, found in itertools.groupby(stages, lambda stage: stage.beside):
        neighbours = list(found)
        yield from [neighbours] if beside else ([stage] for stage in neighbours)


def _run_group(group: Sequence[Stage], log: Path) -> int:
    """Run stages two at a time, each once those it needs have ended; returns the first failure's exit status."""
    # How many threads add up a sum decides its last bits: a stage of a group has half of the cores even when the other
    # half is idle for a while, or its figures would depend on who ended first.
    runner = _Runner(log, None if len(group) == 1 else max(1, (os.cpu_count() or 1) // SIDE_BY_SIDE))
    waiting, running = list(group), dict[Future[int], Stage]()
    status = 0
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        while waiting or running:
            unfinished = {stage.name for stage in [*waiting, *running.values()]}
            ready = [stage for stage in waiting if unfinished.isdisjoint(stage.needs)]
            for stage in ready[: SIDE_BY_SIDE - len(running)]:
                waiting.remove(stage)
                running[pool.submit(runner.run, stage)] = stage
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                status = status or abs(future.result())
            if status:
                waiting.clear()
    return status


class _Runner:
    """Runs the commands of stages, of which several may run at once."""

    def __init__(self, log: Path, threads: int | None) -> None:
        """Args: threads: of each command; None: as many as it takes by itself."""
        self.log = log
        self.environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        self._terminal = threading.Lock()

    def run(self, stage: Stage) -> int:
        """Run one; returns its exit status.

        Of those that run side by side one has the terminal; what another prints comes when it has ended.
        """
        if not self._terminal.acquire(blocking=False):
            with tempfile.TemporaryFile() as output:
                status = self._run(stage, output)
                output.seek(0)
                text = output.read().decode(errors="replace")
            # Of a progress bar its last state.
            lines = [line.rsplit("\r", 1)[-1] for line in text.rstrip().split("\n")]
            print("\n".join([f"\n== {stage.name}, beside it", *lines]), flush=True)
            return status
        try:
            print(f"== {stage.name}", flush=True)
            return self._run(stage)
        finally:
            self._terminal.release()

    def _run(self, stage: Stage, output: Any = None) -> int:
        started = time.time()
        process = subprocess.Popen(
            stage.words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment
        )
        _, wait_status, usage = os.wait4(process.pid, 0)  # the memory of this one alone, and of what it started
        seconds, status = time.time() - started, os.waitstatus_to_exitcode(wait_status)
        if status:
            return status
        unit = 1 if sys.platform == "darwin" else 1024
        figures = {"started": started, "seconds": seconds, "peak_memory_gb": usage.ru_maxrss * unit / 1e9}
        line = json.dumps({"name": stage.name, **{key: round(value, 3) for key, value in figures.items()}})
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        return 0


def wall_seconds(stages: Iterable[Mapping[str, float]]) -> float:
    """Seconds in which at least one of the stages ran. Args: stages: "started" and "seconds" of each."""
    total, end = 0.0, -float("inf")
    for stage in sorted(stages, key=lambda stage: stage["started"]):
        until = stage["started"] + stage["seconds"]
        total += max(0.0, until - max(end, stage["started"]))
        end = max(end, until)
    return total
