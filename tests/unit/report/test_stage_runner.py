"""Stages of a recipe: side by side or one after another, their log, and what happens when one fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from support.paths import ROOT
from utils.report.stage_runner import END, THEN, wall_seconds


def python(code):
    return [sys.executable, "-c", code]


def words(**stages):
    return [word for name, command in stages.items() for word in (name, *command, END)]


def main(log, stages):
    """The exit status of main in a process of its own: a child's peak memory counts from its parent's."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\nfrom utils.report.stage_runner import main\n"
    return subprocess.run([*python(f"{code}sys.exit(main(sys.argv[1], sys.argv[2:]))"), log, *stages]).returncode


def read(log):
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def meet(folder, one, other):
    """Code that ends once both have begun: were they not side by side, the first would wait in vain."""
    return (
        f"import pathlib, time\nfolder = pathlib.Path({str(folder)!r})\n(folder / '{one}').touch()\n"
        f"for _ in range(600):\n    if (folder / '{other}').exists(): break\n    time.sleep(0.05)\n"
        f"else: raise SystemExit(9)\nprint('{one} met')"
    )


def test_several_run_side_by_side_with_half_of_the_cores_each(tmp_path, capfd):
    log = tmp_path / "stages.jsonl"
    threads = "import os; print('threads', os.environ.get('OMP_NUM_THREADS'))"
    stages = words(a=python(meet(tmp_path, "a", "b")), b=python(meet(tmp_path, "b", "a")), c=python(threads))
    assert main(str(log), stages) == 0
    lines = {line["name"]: line for line in read(log)}
    assert lines.keys() == {"a", "b", "c"}
    a, b, c = (lines[name] for name in "abc")
    assert a["started"] < b["started"] + b["seconds"] and b["started"] < a["started"] + a["seconds"]
    assert c["started"] >= min(line["started"] + line["seconds"] for line in (a, b)) - 0.01
    assert all(0.001 < line["peak_memory_gb"] < 1 for line in lines.values())
    output = capfd.readouterr().out
    assert "a met" in output and "b met" in output and "beside it" in output
    assert f"threads {max(1, os.cpu_count() // 2)}" in output


def test_one_alone_has_all_cores_and_the_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "import os, sys; print('threads', os.environ.get('OMP_NUM_THREADS')); print(repr(sys.stdin.read()))"
    assert main(str(tmp_path / "log"), words(one=python(code))) == 0
    assert capfd.readouterr().out.split("\n")[:2] == ["== one", "threads None"]


def test_memory_is_that_of_the_stage_alone(tmp_path):
    """Also of what its command starts; not of a larger one before it."""
    large = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'b = bytearray(300_000_000)'], check=True)"
    assert main(str(tmp_path / "log"), words(large=python(large), small=python("pass"))) == 0
    large, small = (next(x for x in read(tmp_path / "log") if x["name"] == name) for name in ("large", "small"))
    assert large["peak_memory_gb"] > 0.3 > 2 * small["peak_memory_gb"]


def test_after_a_failure_no_other_begins_and_what_ran_is_kept(tmp_path, capfd):
    log = tmp_path / "log"
    late = python(f"import pathlib; pathlib.Path({str(tmp_path / 'late')!r}).touch()")
    good = python(meet(tmp_path, "good", "bad") + "; time.sleep(0.3)")
    bad = python(meet(tmp_path, "bad", "good") + "; raise SystemExit('error: what is wrong')")
    assert main(str(log), words(good=good, bad=bad, late=late)) == 1
    assert [line["name"] for line in read(log)] == ["good"] and not (tmp_path / "late").exists()
    captured = capfd.readouterr()
    assert "error: what is wrong" in captured.out + captured.err


def test_of_a_progress_bar_beside_another_the_last_state_is_shown(tmp_path, capfd):
    quiet = python(meet(tmp_path, "x", "y") + "; time.sleep(0.5)")
    bar = python(meet(tmp_path, "y", "x") + r"; print('  1%\r 50%\r100%'); print('done')")
    assert main(str(tmp_path / "log"), words(quiet=quiet, bar=bar)) == 0
    output = capfd.readouterr().out
    assert ("100%\ndone" in output) and ("50%" not in output or "== bar\n" in output)


def test_an_interrupt_ends_all_of_them(tmp_path):
    """As ctrl-c does, which reaches the whole group: status 130, no traceback, nothing left running."""
    forever = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    stages = [w for n in "ab" for w in (n, *python(forever), str(tmp_path / n), END)]
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\nfrom utils.report.stage_runner import main\n"
    code += f"sys.exit(main({str(tmp_path / 'log')!r}, {stages!r}))"
    process = subprocess.Popen(python(code), start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "a").exists() and (tmp_path / "b").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"stages.py" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_time_side_by_side_counts_once():
    def stage(started, seconds):
        return {"started": started, "seconds": seconds}

    assert wall_seconds([]) == 0
    assert wall_seconds([stage(100, 10), stage(105, 20), stage(107, 3)]) == 25
    assert wall_seconds([stage(200, 5), stage(100, 10)]) == 15  # another day is not counted


def test_a_stage_that_needs_the_one_before_it_waits_and_others_do_not(tmp_path, capfd):
    """a, then b; c beside both: it meets b, which would not happen if it came after or before all of them."""
    log = tmp_path / "log"
    first = python(f"import pathlib, time; time.sleep(0.5); pathlib.Path({str(tmp_path / 'made')!r}).touch()")
    second = python(
        f"import pathlib; assert pathlib.Path({str(tmp_path / 'made')!r}).exists()\n" + meet(tmp_path, "b", "c")
    )
    stages = ["a", *first, THEN, "b", *second, END, "c", *python(meet(tmp_path, "c", "b")), END]
    assert main(str(log), stages) == 0
    lines = {line["name"]: line for line in read(log)}
    assert lines.keys() == {"a", "b", "c"}
    assert lines["b"]["started"] >= lines["a"]["started"] + lines["a"]["seconds"] - 0.01


def test_what_needs_a_stage_that_failed_does_not_begin(tmp_path):
    late = python(f"import pathlib; pathlib.Path({str(tmp_path / 'late')!r}).touch()")
    assert main(str(tmp_path / "log"), ["bad", *python("raise SystemExit(3)"), THEN, "late", *late, END]) == 3
    assert not (tmp_path / "late").exists()
