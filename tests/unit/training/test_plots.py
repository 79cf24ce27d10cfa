"""Curves of a run: a picture where there are two points, none where there are fewer."""

from utils.training.plots import plot_curves, plot_losses

HISTORY = [
    {"step": 1, "loss": 2.0, "score": 0.1},
    {"step": 1, "eval_zh_loss": 2.5, "eval_zh_score": 0.2, "eval_loss": 2.5},
    {"step": 2, "loss": 1.5, "score": 0.3},
]


def test_two_points_make_a_picture_and_one_makes_none(tmp_path):
    curves = {"score": "reward", "absent": "nothing"}
    for history, drawn in ((HISTORY, True), (HISTORY[:2], False), ([], False)):
        for path in tmp_path.iterdir():
            path.unlink()
        plot_losses(history, tmp_path / "loss.png", "run")
        plot_curves(history, tmp_path / "curves.png", "run", curves)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == ({"loss.png", "curves.png"} if drawn else set())
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
