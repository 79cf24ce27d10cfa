"""Which checkpoint a run resumes from, which ones stay, and which settings may change meanwhile."""

import errno
import json

import pytest

from utils.training.runs import COMPLETE, changed_settings, last_checkpoint, named_disk_errors, seal_checkpoint


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
