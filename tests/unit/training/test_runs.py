"""Runs: what a folder is taken for, what counts as another run, and which checkpoints stay."""

import errno

import pytest

from utils.core.errors import InputError
from utils.training.arguments import RunArguments
from utils.training.runs import (
    COMPLETE,
    changed_settings,
    finish_run,
    last_checkpoint,
    named_disk_errors,
    open_run,
    seal_checkpoint,
    start_run,
)


def arguments(folder, **settings) -> RunArguments:
    return RunArguments(output_dir=str(folder), report_to="none", use_cpu=True, **settings)


def begin(folder, inputs=None, **settings):
    args = arguments(folder, **settings)
    run = open_run(args)
    start_run(run, inputs or {"train/zh": "1"}, is_main_process=True)
    return args, run


def checkpoint(folder, step: int, keep=None, best=None) -> None:
    (folder / f"checkpoint-{step}").mkdir()
    seal_checkpoint(folder, step, keep, best)


def test_a_run_begins_goes_on_and_ends(tmp_path):
    folder = tmp_path / "run"
    assert begin(folder)[1].checkpoint is None
    checkpoint(folder, 5)
    (folder / "checkpoint-9").mkdir()  # its writing is cut off here
    args, run = begin(folder, seed=7)
    assert run.checkpoint == folder / "checkpoint-5" and not (folder / "checkpoint-9").exists()
    assert args.seed == 42, "a run goes on with the seed it began with"
    finish_run(folder, {"loss": 1.0}, "next")
    with pytest.raises(InputError, match="holds a finished run"):
        begin(folder)
    begin(folder, overwrite_output_dir=True)
    assert not (folder / "checkpoint-5").exists()


def test_what_may_not_go_on_is_refused(tmp_path):
    folder = tmp_path / "run"
    begin(folder)
    checkpoint(folder, 5)
    with pytest.raises(InputError, match=r"other settings \(learning_rate .* -> 0.5\)"):
        begin(folder, learning_rate=0.5)
    with pytest.raises(InputError, match=r"with other train/zh \(the contents"):
        begin(folder, {"train/zh": "2"})
    assert begin(folder, learning_rate=0.5, restart=True)[1].replaces
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no training run"):
        begin(tmp_path / "other", overwrite_output_dir=True)
    with pytest.raises(InputError, match="is a file"):
        begin(tmp_path / "other" / "thesis.txt")


def test_settings_that_change_no_weights_may_change():
    old = {"learning_rate": 1e-4, "logging_steps": 10, "betas": [0.9, 0.95]}
    assert changed_settings(old, {"learning_rate": 1e-4, "logging_steps": 1, "betas": (0.9, 0.95)}) == []
    assert changed_settings(old, {"learning_rate": 1e-4, "betas": [0.9, 0.99], "bf16": True}) == [
        "betas [0.9, 0.95] -> [0.9, 0.99]",
        "bf16 None -> True",
    ]


def test_the_newest_checkpoints_and_the_best_stay(tmp_path):
    for step in (9, 10, 100, 11):
        checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100", "by number, not by name"
    checkpoint(tmp_path, 101, keep=2, best=str(tmp_path / "checkpoint-9"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-101", "checkpoint-9"]
    (tmp_path / "checkpoint-101" / COMPLETE).unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_a_full_disk_is_called_so(tmp_path):
    with pytest.raises(OSError, match="No space left") as raised, named_disk_errors(tmp_path):
        raise RuntimeError("[enforce fail] write: No space left on device")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path)
    with pytest.raises(RuntimeError, match="shapes"), named_disk_errors(tmp_path):
        raise RuntimeError("shapes differ")
