"""Small SVG charts for reports: plain text that needs no scripts, no fonts and no files beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 34, 40  # margins around the plotted area; the legend stands in the top one
COLORS = ("#2a6f97", "#d9822b", "#4d9078", "#8e6c8a", "#b23a48")
INK, GRID = "#52606d", "#e4e7eb"
DOTTED = 25  # series of at most so many points have a dot on each


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Lines through (x, y) points as one <svg> element; a series of one point is a dot.

    Raises: ValueError if there is no finite point.
    """
    kept = {name: [point for point in points if all(map(math.isfinite, point))] for name, points in series.items()}
    points = [point for line in kept.values() for point in line]
    if not points:
        raise ValueError("line_chart: no finite point")
    x_ticks, y_ticks = (nice_ticks(min(values), max(values)) for values in zip(*points, strict=True))
    parts = [_axes(x_label, y_label), _legend(kept), _y_grid(y_ticks)]
    for tick in x_ticks:
        x = _place_x(tick, x_ticks)
        parts.append(_text(x, HEIGHT - BOTTOM + 16, f"{tick:g}", anchor="middle"))
    for color, line in zip(_colors(kept), kept.values(), strict=True):
        places = [(_place_x(x, x_ticks), _place_y(y, y_ticks)) for x, y in line]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(places) <= DOTTED:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
    return _svg(parts, f"{y_label} over {x_label}: {', '.join(kept)}")


def bar_chart(groups: Mapping[str, Mapping[str, float]], y_label: str) -> str:
    """Bars from zero as one <svg> element: a cluster for each group, a colour for each name within; values are not negative.

    Raises: ValueError if there is no finite value.
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    values = [value for bars in groups.values() for value in bars.values() if math.isfinite(value)]
    if not values:
        raise ValueError("bar_chart: no finite value")
    ticks = nice_ticks(0, max(*values, 1e-9))
    parts = [_axes("", y_label), _legend(names), _y_grid(ticks)]
    cluster = (WIDTH - LEFT - RIGHT) / len(groups)
    width = min(0.8 * cluster / len(names), 48)
    for place, (group, bars) in enumerate(groups.items()):
        middle = LEFT + cluster * (place + 0.5)
        parts.append(_text(middle, HEIGHT - BOTTOM + 18, group, anchor="middle", size=13))
        for rank, (color, name) in enumerate(zip(_colors(names), names, strict=True)):
            value = bars.get(name, math.nan)
            if not math.isfinite(value):
                continue
            x, y = middle + width * (rank - len(names) / 2), _place_y(value, ticks)
            height = HEIGHT - BOTTOM - y
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{height:.1f}" fill="{color}"/>'
            )
            parts.append(_text(x + width / 2, y - 4, f"{value:.2f}", anchor="middle"))
    return _svg(parts, f"{y_label} of {', '.join(groups)}: {', '.join(names)}")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, evenly spaced, the first at or below `low` and the last at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(rank * step, 12) for rank in range(first, max(last, first + 1) + 1)]


def _place_x(value: float, ticks: Sequence[float]) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _place_y(value: float, ticks: Sequence[float]) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _colors(names: Iterable[str]) -> list[str]:
    return [COLORS[rank % len(COLORS)] for rank, _ in enumerate(names)]


def _axes(x_label: str, y_label: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 13 {middle})"'
    return _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, anchor="middle") + _text(
        13, middle, y_label, anchor="middle", extra=turned
    )


def _y_grid(ticks: Sequence[float]) -> str:
    parts = []
    for tick in ticks:
        y = _place_y(tick, ticks)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", anchor="end"))
    return "".join(parts)


def _legend(names: Iterable[str]) -> str:
    names = list(names)
    parts, x = [], float(LEFT)
    for color, name in zip(_colors(names), names, strict=True):
        parts.append(f'<rect x="{x:.0f}" y="8" width="14" height="10" rx="2" fill="{color}"/>')
        parts.append(_text(x + 19, 17, name))
        # Letters are about 6.5 wide at this size, Chinese characters 12.
        x += 36 + sum(6.5 if letter.isascii() else 12 for letter in name)
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{INK}" {extra}>{escape(text)}</text>'


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg" '
        f'font-family="inherit">{"".join(parts)}</svg>'
    )
