"""Curves of a run: which figures of its log belong to one line, and when there is nothing to draw."""

from utils.training.plots import log_curves, plot_curves, plot_losses

HISTORY = [
    {"step": 10, "loss": 3.0, "value_loss": 9.0},
    {"step": 10, "eval_zh_loss": 2.5, "eval_en_loss": 2.0, "eval_loss": 2.25, "eval_zh_runtime": 1.0},
    {"step": 20, "loss": 2.0},
    {"step": 20, "train_loss": 2.5},
]


def test_training_sets_and_their_mean_are_lines_of_their_own():
    assert log_curves(HISTORY, "loss") == {
        "training": [(10, 3.0), (20, 2.0)],
        "eval_zh": [(10, 2.5)],
        "eval_en": [(10, 2.0)],
        "eval": [(10, 2.25)],
    }
    assert log_curves(HISTORY, "kl") == {}


def test_pictures_need_two_points(tmp_path):
    plot_losses(HISTORY[:2], tmp_path / "loss.png", "one point")
    plot_curves(HISTORY, tmp_path / "curves.png", "one point", {"value_loss": "of the critic"})
    assert list(tmp_path.iterdir()) == []
    plot_losses(HISTORY, tmp_path / "loss.png", "two points")
    plot_curves(HISTORY, tmp_path / "curves.png", "two points", {"value_loss": "of the critic", "loss": "loss"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "loss.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
