"""Pictures in files: saved whole or not at all, fonts that have Chinese, and intervals that matplotlib takes."""

from pathlib import Path

import matplotlib
import pytest
from matplotlib import axes as matplotlib_axes
from matplotlib import font_manager

from utils.core.figures import FONTS, draw_bars, interval_errors, saved_figure

ROOT = Path(__file__).parents[3]


def test_a_picture_is_whole_or_absent(tmp_path):
    with saved_figure(tmp_path / "a.png", 2, 1, dpi=50) as figure:
        figure.subplots().plot([1, 2])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ZeroDivisionError), saved_figure(tmp_path / "a.png", 2, 1):
        raise ZeroDivisionError
    assert (tmp_path / "a.png").read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_texts_are_in_fonts_that_have_chinese_and_settings_are_as_before(tmp_path):
    family = matplotlib.rcParams["font.family"]
    with saved_figure(tmp_path / "a.png", 2, 1, layout="constrained") as figure:
        title = figure.subplots().set_title("x")
        known = {font.name for font in font_manager.fontManager.ttflist}
        assert title.get_fontfamily() == [name for name in FONTS if name in known] and "DejaVu Sans" in known
    assert matplotlib.rcParams["font.family"] == family


def test_bars_of_one_name_have_their_own_places(tmp_path, monkeypatch):
    drawn = []
    barh = matplotlib_axes.Axes.barh

    def watch(self, places, widths, **options):
        drawn.append((list(places), list(widths), options["xerr"]))
        return barh(self, places, widths, **options)

    monkeypatch.setattr(matplotlib_axes.Axes, "barh", watch)
    with saved_figure(tmp_path / "a.png", 3, 2) as figure:
        axes = figure.subplots()
        draw_bars(axes, ["all", "all"], [40.0, 60.0], [(30.0, 55.0), (50.0, 65.0)], ["#2a6f97", "#d9822b"], "score")
    assert drawn == [([0, 1], [40.0, 60.0], [[10.0, 10.0], [15.0, 5.0]])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all", "all"]
    assert axes.get_xlabel() == "score (%), 95 % interval" and axes.get_ylim()[0] > axes.get_ylim()[1]


def test_a_value_beyond_its_interval_has_no_bar_on_that_side():
    assert interval_errors([5.0, 1.0], [(6.0, 8.0), (0.0, 0.5)]) == [[0, 1.0], [3.0, 0]]


def test_nothing_is_drawn_with_pyplot():
    users = [
        path.name
        for folder in ("scripts", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if "import pyplot" in path.read_text(encoding="utf-8") or "matplotlib.use" in path.read_text(encoding="utf-8")
    ]
    assert users == []
