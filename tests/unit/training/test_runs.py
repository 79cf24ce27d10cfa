"""Runs: what a folder is taken for, what counts as another run, and which checkpoints stay."""

import errno
import json

import pytest

from utils.core.errors import InputError
from utils.training import runs
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


def test_a_run_killed_at_its_first_file_starts_over(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(runs, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        begin(folder)
    monkeypatch.undo()
    assert (folder / "run_config.yaml").is_file() and not (folder / runs.INPUTS).exists()
    begin(folder)
    assert (folder / runs.INPUTS).is_file()
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".run_config.yaml.partial").touch()
    begin(killed)


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


def make_checkpoints(folder, *steps):
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / COMPLETE).touch()


def left(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.iterdir())


def test_the_newest_checkpoint_is_that_of_the_largest_number_among_the_complete(tmp_path):
    assert last_checkpoint(tmp_path) is None
    make_checkpoints(tmp_path, 200, 1000)
    (tmp_path / "checkpoint-3000").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [(None, None, [5, 10, 200, 1000]), (2, None, [200, 1000]), (1, 5, [5, 1000]), (2, 200, [200, 1000])],
)
def test_sealing_keeps_the_newest_and_the_best(keep, best, kept, tmp_path):
    make_checkpoints(tmp_path, 5, 10, 200)
    (tmp_path / "checkpoint-1000").mkdir()
    seal_checkpoint(tmp_path, 1000, keep, None if best is None else f"elsewhere/checkpoint-{best}")
    assert left(tmp_path) == kept
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"


def test_settings_that_change_the_weights_are_named():
    recorded = {"learning_rate": 1e-4, "seed": 1, "logging_steps": 5, "train_data": ["a"], "gone": True}
    settings = {"learning_rate": 2e-4, "seed": 2, "logging_steps": 1, "train_data": ("a",), "new": 0}
    assert changed_settings(recorded, settings) == [
        "gone True -> None", "learning_rate 0.0001 -> 0.0002", "new None -> 0"
    ]  # fmt: skip
    assert changed_settings(json.loads(json.dumps(settings)), settings) == []


def test_a_full_disk_is_named_as_the_system_names_it(tmp_path):
    with pytest.raises(OSError) as caught, named_disk_errors(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed: No space left on device")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)
    with pytest.raises(RuntimeError, match="shapes differ"), named_disk_errors(tmp_path):
        raise RuntimeError("shapes differ")
