"""Stages of a recipe: what runs, in which order and side by side, their log, and what happens when one fails."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from support.paths import ROOT
from utils.report.stage_runner import STAGE_LOG, Stage, run_stages, wall_seconds


def python(code):
    return [sys.executable, "-c", code]


def stage(name, command, needs=(), beside=True):
    return Stage(name, name, command=shlex.join(command), needs=needs, beside=beside)


def stages(**commands):
    return [stage(name, command) for name, command in commands.items()]


def program(folder, stages):
    """A process of its own that runs stages: a child's peak memory counts from its parent's."""
    return python(
        f"import pathlib, sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "from utils.report.stage_runner import Stage, run_stages\n"
        f"sys.exit(run_stages({stages!r}, pathlib.Path({str(folder)!r})))"
    )


def main(folder, stages):
    return subprocess.run(program(folder, stages)).returncode


def read(folder):
    log = folder / STAGE_LOG
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def meet(folder, one, other):
    """Code that ends once both have begun: were they not side by side, the first would wait in vain."""
    return (
        f"import pathlib, time\nfolder = pathlib.Path({str(folder)!r})\n(folder / '{one}').touch()\n"
        f"for _ in range(600):\n    if (folder / '{other}').exists(): break\n    time.sleep(0.05)\n"
        f"else: raise SystemExit(9)\nprint('{one} met')"
    )


def test_several_run_side_by_side_with_half_of_the_cores_each(tmp_path, capfd):
    threads = "import os; print('threads', os.environ.get('OMP_NUM_THREADS'))"
    commands = {"a": python(meet(tmp_path, "a.began", "b.began")), "b": python(meet(tmp_path, "b.began", "a.began"))}
    assert main(tmp_path, stages(**commands, c=python(threads))) == 0
    lines = {line["name"]: line for line in read(tmp_path)}
    assert lines.keys() == {"a", "b", "c"}
    a, b, c = (lines[name] for name in "abc")
    assert a["started"] < b["started"] + b["seconds"] and b["started"] < a["started"] + a["seconds"]
    assert c["started"] >= min(line["started"] + line["seconds"] for line in (a, b)) - 0.01
    assert all(0.001 < line["peak_memory_gb"] < 1 for line in lines.values())
    output = capfd.readouterr().out
    assert "a.began met" in output and "b.began met" in output and "beside it" in output
    assert f"threads {max(1, os.cpu_count() // 2)}" in output


def test_one_alone_has_all_cores_and_the_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "import os, sys; print('threads', os.environ.get('OMP_NUM_THREADS')); print(repr(sys.stdin.read()))"
    assert main(tmp_path, stages(one=python(code))) == 0
    assert capfd.readouterr().out.split("\n")[:2] == ["== one", "threads None"]


def test_memory_is_that_of_the_stage_alone(tmp_path):
    """Also of what its command starts; not of a larger one before it."""
    large = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'b = bytearray(300_000_000)'], check=True)"
    assert main(tmp_path, stages(large=python(large), small=python("pass"))) == 0
    large, small = (next(x for x in read(tmp_path) if x["name"] == name) for name in ("large", "small"))
    assert large["peak_memory_gb"] > 0.3 > 2 * small["peak_memory_gb"]


def test_after_a_failure_no_other_begins_and_what_ran_is_kept(tmp_path, capfd):
    late = python(f"import pathlib; pathlib.Path({str(tmp_path / 'late')!r}).touch()")
    good = python(meet(tmp_path, "good.began", "bad.began") + "; time.sleep(0.3)")
    bad = python(meet(tmp_path, "bad.began", "good.began") + "; raise SystemExit('error: what is wrong')")
    assert main(tmp_path, stages(good=good, bad=bad, late=late)) == 1
    assert [line["name"] for line in read(tmp_path)] == ["good"] and not (tmp_path / "late").exists()
    captured = capfd.readouterr()
    assert "error: what is wrong" in captured.out + captured.err


def test_of_a_progress_bar_beside_another_the_last_state_is_shown(tmp_path, capfd):
    quiet = python(meet(tmp_path, "x.began", "y.began") + "; time.sleep(0.5)")
    bar = python(meet(tmp_path, "y.began", "x.began") + r"; print('  1%\r 50%\r100%'); print('done')")
    assert main(tmp_path, stages(quiet=quiet, bar=bar)) == 0
    output = capfd.readouterr().out
    assert ("100%\ndone" in output) and ("50%" not in output or "== bar\n" in output)


def test_an_interrupt_ends_all_of_them(tmp_path):
    """As ctrl-c does, which reaches the whole group: status 130, no traceback, nothing left running."""
    forever = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    both = stages(**{name: [*python(forever), str(tmp_path / f"{name}.began")] for name in "ab"})
    process = subprocess.Popen(
        program(tmp_path, both), start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not ((tmp_path / "a.began").exists() and (tmp_path / "b.began").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"stage_runner" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_time_side_by_side_counts_once():
    def stage(started, seconds):
        return {"started": started, "seconds": seconds}

    assert wall_seconds([]) == 0
    assert wall_seconds([stage(100, 10), stage(105, 20), stage(107, 3)]) == 25
    assert wall_seconds([stage(200, 5), stage(100, 10)]) == 15  # another day is not counted


def test_a_stage_that_needs_another_waits_for_it_and_others_do_not(tmp_path, capfd):
    """a, then b; c beside both: it meets b, which would not happen if it came after or before all of them."""
    first = python(f"import pathlib, time; time.sleep(0.5); pathlib.Path({str(tmp_path / 'made')!r}).touch()")
    second = python(
        f"import pathlib; assert pathlib.Path({str(tmp_path / 'made')!r}).exists()\n"
        + meet(tmp_path, "b.began", "c.began")
    )
    third = python(meet(tmp_path, "c.began", "b.began"))
    assert main(tmp_path, [stage("a", first), stage("b", second, needs=["a"]), stage("c", third)]) == 0
    lines = {line["name"]: line for line in read(tmp_path)}
    assert lines.keys() == {"a", "b", "c"}
    assert lines["b"]["started"] >= lines["a"]["started"] + lines["a"]["seconds"] - 0.01


def test_what_needs_a_stage_that_failed_does_not_begin(tmp_path):
    late = python(f"import pathlib; pathlib.Path({str(tmp_path / 'late')!r}).touch()")
    bad = stage("bad", python("raise SystemExit(3)"))
    assert main(tmp_path, [bad, stage("late", late, needs=["bad"])]) == 3
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("needs", [["b"], ["a"], ["c"]])
def test_a_stage_needs_what_stands_above_it(tmp_path, needs):
    with pytest.raises(ValueError, match=r"a needs .* above it"):
        run_stages([stage("a", python("pass"), needs=needs), stage("b", python("pass"))], tmp_path)
    assert not read(tmp_path)


def write(folder, name):
    """A stage that makes a folder, with a part of it written before, and ends with how much of it there was."""
    code = (
        f"import pathlib; folder = pathlib.Path({str(folder / name)!r}); folder.mkdir(exist_ok=True)\n"
        "(folder / 'part').open('a').write('x'); (folder / 'last').write_text((folder / 'part').read_text())"
    )
    return Stage(name, name, "last", shlex.join(python(code)), beside=name in "cd")


def test_finished_stages_are_skipped_and_one_that_is_deleted_runs_again_with_all_behind_it(tmp_path, capsys):
    recipe = [write(tmp_path, name) for name in "abcde"]
    assert run_stages(recipe, tmp_path) == 0 and run_stages(recipe, tmp_path) == 0
    assert sorted(line["name"] for line in read(tmp_path)) == [*"abcde"]
    assert f"== a: finished before, skipped ({tmp_path / 'a' / 'last'})" in capsys.readouterr().out
    (tmp_path / "b" / "last").unlink()  # as a run that was killed leaves it: it goes on with what there is
    (tmp_path / "c.tmp").mkdir()
    assert run_stages(recipe, tmp_path) == 0
    assert sorted(line["name"] for line in read(tmp_path)[5:]) == [*"bcde"]
    assert {name: (tmp_path / name / "last").read_text() for name in "abcde"} == dict(
        a="x", b="xx", c="x", d="x", e="x"
    )
    assert not (tmp_path / "c.tmp").exists()


def test_a_stage_may_make_a_file(tmp_path):
    made = Stage("made", "answers/base.json", command="true")
    assert made.mark(tmp_path) == tmp_path / "answers" / "base.json"
    for name in ("base.json", "base.json.tmp", "base.png", "based.json"):
        (tmp_path / "answers").mkdir(exist_ok=True)
        (tmp_path / "answers" / name).touch()
    made.remove_output(tmp_path)
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["based.json"]
