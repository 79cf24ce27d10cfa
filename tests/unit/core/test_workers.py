"""utils.core.workers: results in order, errors raised here, no worker outlives its parent."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from support.paths import ROOT, SCRIPTS
from utils.core.workers import WorkerDied, one_worker, ordered_map


def work(state: str, unit: int) -> tuple[str, int, int]:
    """A worker's function (workers import this module by name)."""
    time.sleep(0.001 * (unit % 5))
    if unit == 77:
        raise ValueError("unit 77")
    if unit == 88:
        os.kill(os.getpid(), signal.SIGKILL)
    return state, unit, os.getpid()


def test_one_worker_is_this_process():
    assert list(ordered_map(work, "s", range(3), 1)) == [("s", unit, os.getpid()) for unit in range(3)]


def test_results_come_in_order_from_several_processes_and_units_are_taken_as_needed():
    taken = []

    def units():
        for unit in range(60):
            taken.append(unit)
            yield unit

    big = "s" * 300_000  # larger than a pipe's buffer
    results = ordered_map(work, big, units(), 2)
    seen = []
    for state, unit, pid in results:
        assert state == big
        seen.append((unit, pid))
        assert len(taken) <= len(seen) + 4
    assert [unit for unit, _ in seen] == list(range(60))
    assert len({pid for _, pid in seen} - {os.getpid()}) == 2
    assert not any(psutil.pid_exists(pid) for _, pid in seen)
    # A worker's ValueError (InputError) is raised as it is; a death is named.
    with pytest.raises(ValueError, match="unit 77"):
        list(ordered_map(work, "s", range(70, 80), 2))
    with pytest.raises(WorkerDied, match="worker process ended unexpectedly, killed by SIGKILL, for inst"):
        list(ordered_map(work, "s", range(85, 95), 2))


def test_one_worker_is_another_process():
    with one_worker(work, "s") as call:
        _, unit, pid = call(1)
        assert unit == 1 and pid != os.getpid() and call(2)[2] == pid
        with pytest.raises(ValueError, match="unit 77"):
            call(77)
        with pytest.raises(WorkerDied) as died:
            call(88)
        assert died.value.signal == "SIGKILL"
    assert not psutil.pid_exists(pid)


def test_workers_end_when_the_parent_is_killed(tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(
        f"import sys, time, itertools; sys.path[:0] = [{str(SCRIPTS)!r}, {str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from utils.core.workers import ordered_map\n"
        "from tests.unit.core.test_workers import work\n"
        "if __name__ == '__main__':\n"
        "    for result in ordered_map(work, 's', itertools.cycle(range(50)), 2): print(result, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) >= 2
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
