"""Small SVG charts for reports: plain text that needs no scripts, no fonts and no files beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 40  # margins around the plotted area; the legend stands in the top one
COLORS = ("#2a6f97", "#d9822b", "#4d9078", "#8e6c8a", "#b23a48", "#7b6d3f", "#5aa9c9", "#3d405b")
LINE = 16  # height of a line of the legend
INK, GRID = "#52606d", "#e4e7eb"
RADAR_X, RADAR_Y, RADIUS = WIDTH / 2, 152, 96  # of radar charts
DOTTED = 12  # lines of at most so many points have a dot on each

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Lines through (x, y) points as one <svg> element; points that are not finite are left out.

    Raises: ValueError if none is finite.
    """
    kept = {name: [point for point in points if all(map(math.isfinite, point))] for name, points in series.items()}
    points = [point for line in kept.values() for point in line]
    # Python's min and max pass over NaN or not by its place: what is not finite must be gone before ticks are chosen.
    if not points:
        raise ValueError("line_chart: no finite point")
    x_ticks, y_ticks = (nice_ticks(min(values), max(values)) for values in zip(*points, strict=True))
    parts = [_axis_labels(x_label, y_label), _legend(kept), _y_grid(y_ticks)]
    parts += [_text(_place_x(tick, x_ticks), HEIGHT - BOTTOM + 16, f"{tick:g}", "middle") for tick in x_ticks]
    for color, line in zip(_colors(kept), kept.values(), strict=True):
        places = [(_place_x(x, x_ticks), _place_y(y, y_ticks)) for x, y in line]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(places) <= DOTTED:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
    return _svg(parts, f"{y_label} over {x_label}: {', '.join(kept)}", kept)


def bar_chart(groups: Mapping[str, Mapping[str, float]], y_label: str, digits: int = 2) -> str:
    """Bars as one <svg> element: a cluster for each group, a colour for each name in it; values are 0 or more.

    Bars that are wide enough have their value above, with so many `digits` behind the point.

    Raises: ValueError if no value is finite.
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    values = [value for bars in groups.values() for value in bars.values() if math.isfinite(value)]
    if not values:
        raise ValueError("bar_chart: no finite value")
    ticks = nice_ticks(0, max(values))  # from 0: a bar's length is its value
    parts = [_axis_labels("", y_label), _legend(names), _y_grid(ticks)]
    cluster = (WIDTH - LEFT - RIGHT) / len(groups)
    width = min(0.84 * cluster / len(names), 44)  # a gap between clusters; two bars alone do not fill the picture
    for place, (group, bars) in enumerate(groups.items()):
        middle = LEFT + cluster * (place + 0.5)
        parts.append(_text(middle, HEIGHT - BOTTOM + 17, group, "middle"))
        for rank, (color, name) in enumerate(zip(_colors(names), names, strict=True)):
            value = bars.get(name, math.nan)
            if not math.isfinite(value):
                continue
            x, y = middle + width * (rank - len(names) / 2), _place_y(value, ticks)
            # A pixel of air on either side keeps neighbours of like colours apart.
            size = f'width="{width - 2:.1f}" height="{HEIGHT - BOTTOM - y:.1f}"'
            parts.append(f'<rect x="{x + 1:.1f}" y="{y:.1f}" {size} fill="{color}"/>')
            label = f"{value:.{digits}f}"
            if width >= 6.5 * len(label):  # else it would run into its neighbour's
                parts.append(_text(x + width / 2, y - 4, label, "middle"))
    return _svg(parts, f"{y_label} of {', '.join(groups)}: {', '.join(names)}", names)


def radar_chart(groups: Mapping[str, Mapping[str, float]], label: str) -> str:
    """Values of 0 or more as one <svg> element: an axis for each group, a closed line for each name in it.

    Raises: ValueError for fewer than three axes, or if no value is finite. A name without a value on some axis has
        dots alone.
    """
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    finite = [value for values in groups.values() for value in values.values() if math.isfinite(value)]
    if len(groups) < 3 or not finite:
        raise ValueError("radar_chart: need three axes and a finite value")
    ticks = nice_ticks(0, max(finite), 4)
    parts = [_legend(names)]
    # The first tick is the middle, where a ring would be a point.
    for tick in ticks[1:]:
        ring = [_spoke(rank / len(groups), tick / ticks[-1]) for rank in range(len(groups))]
        parts.append(f'<path d="{_joined(ring, closed=True)}" fill="none" stroke="{GRID}"/>')
        parts.append(_text(RADAR_X + 4, _spoke(0, tick / ticks[-1])[1] + 4, f"{tick:g}"))
    for rank, group in enumerate(groups):
        x, y = _spoke(rank / len(groups), 1)
        parts.append(f'<path d="M{RADAR_X} {RADAR_Y}L{x:.1f} {y:.1f}" stroke="{GRID}"/>')
        x, y = _spoke(rank / len(groups), 1.09)
        # Names begin or end at their axis, so that none lies across the picture; at the top and the bottom they stand
        # centred over it.
        side = "middle" if abs(x - RADAR_X) < 12 else "start" if x > RADAR_X else "end"
        parts.append(_text(x, y + (-2 if rank == 0 else 4), group, side))
    for color, name in zip(_colors(names), names, strict=True):
        values = [bars.get(name, math.nan) for bars in groups.values()]
        places = [
            _spoke(rank / len(groups), value / ticks[-1]) for rank, value in enumerate(values) if math.isfinite(value)
        ]
        # Without one value the line would cut across that axis, and show a score nobody measured.
        closed = len(places) == len(groups)
        if closed:
            style = f'fill="{color}" fill-opacity="0.08" stroke="{color}" stroke-width="1.8"'
            parts.append(f'<path d="{_joined(places, closed)}" {style}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
    return _svg(parts, f"{label} of {', '.join(groups)}: {', '.join(names)}", names)


def _spoke(turn: float, share: float) -> tuple[float, float]:
    """The place at a share of a radar's radius; the first axis points up, the others follow clockwise."""
    angle = 2 * math.pi * turn
    return RADAR_X + RADIUS * share * math.sin(angle), RADAR_Y - RADIUS * share * math.cos(angle)


def _joined(places: Sequence[tuple[float, float]], closed: bool) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) + ("Z" if closed else "")


def scatter_chart(groups: Mapping[str, Mapping[str, tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Labelled dots as one <svg> element: {group: {label: (x, y)}}, a colour for each group.

    Raises: ValueError if there is no point, or one is not finite.
    """
    points = [point for labels in groups.values() for point in labels.values()]
    if not points or not all(math.isfinite(value) for point in points for value in point):
        raise ValueError("scatter_chart: need finite points")
    x_ticks, y_ticks = (nice_ticks(min(values), max(values)) for values in zip(*points, strict=True))
    parts = [_axis_labels(x_label, y_label), _legend(groups), _y_grid(y_ticks)]
    parts += [_text(_place_x(tick, x_ticks), HEIGHT - BOTTOM + 16, f"{tick:g}", "middle") for tick in x_ticks]
    places = {
        label: (_place_x(x, x_ticks), _place_y(y, y_ticks))
        for labels in groups.values()
        for label, (x, y) in labels.items()
    }
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places.values()]  # all dots first: no label hides one
    lines, dots, names = [], [], []
    for color, labels in zip(_colors(groups), groups.values(), strict=True):
        for label in sorted(labels, key=lambda label: labels[label]):  # left to right: the same picture each time
            x, y = places[label]
            left, top, right, bottom = box = _free_box(x, y, 6.5 * len(label), taken)
            taken.append(box)
            if not top - 3 <= y <= bottom + 3:  # too far for the eye to connect
                end = min(max(x, left), right), bottom if bottom < y else top
                lines.append(f'<path d="M{x:.1f} {y:.1f}L{end[0]:.1f} {end[1]:.1f}" stroke="{color}"/>')
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
            names.append(_text(left, bottom - 3, label))
    # In this order, as later ones are drawn over earlier ones: connecting lines under all dots, labels on top.
    return _svg([*parts, *lines, *dots, *names], f"{y_label} over {x_label}: {', '.join(places)}", groups)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _free_box(x: float, y: float, width: float, taken: Sequence[Box]) -> Box:
    """Where a label has room, as near to its dot as possible: beside it, or some lines above or below."""
    choices = []
    for shift in range(0, HEIGHT, 6):  # the nearest first
        for middle in (y - shift, y + shift):
            choices += [(left, middle - 6, left + width, middle + 7) for left in (x + 7, x - 7 - width)]
    for box in choices:
        left, top, right, bottom = box
        inside = left >= LEFT and right <= WIDTH and top >= TOP - 6 and bottom <= HEIGHT - BOTTOM
        if inside and all(left >= b[2] or right <= b[0] or top >= b[3] or bottom <= b[1] for b in taken):
            return box
    return choices[0]  # no room anywhere: beside its dot, over what is there


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Evenly spaced round numbers, at most `most` steps over the span, the first <= `low` and the last >= `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most * (1 + 1e-9))
    # The small number keeps rounding from adding a step at either end.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(rank * step, 12) for rank in range(first, max(last, first + 1) + 1)]


def _place_x(value: float, ticks: Sequence[float]) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _place_y(value: float, ticks: Sequence[float]) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _colors(names: Iterable[str]) -> list[str]:
    return [COLORS[rank % len(COLORS)] for rank, _ in enumerate(names)]


def _axis_labels(x_label: str, y_label: str) -> str:
    across, down = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 13 {down})"'
    return _text(across, HEIGHT - 6, x_label, "middle") + _text(13, down, y_label, "middle", turned)


def _y_grid(ticks: Sequence[float]) -> str:
    parts = []
    for tick in ticks:
        y = _place_y(tick, ticks)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", "end"))
    return "".join(parts)


def _legend(names: Iterable[str]) -> str:
    names = list(names)
    places, parts = _legend_places(names), []
    last = places[-1][1] if places else 0
    # The last line stands in the top margin, those before it above the picture: its plotted area stays where it was.
    for color, name, (x, line) in zip(_colors(names), names, places, strict=True):
        y = 8 - LINE * (last - line)
        parts.append(f'<rect x="{x:.0f}" y="{y}" width="12" height="10" rx="2" fill="{color}"/>')
        parts.append(_text(x + 17, y + 9, name))
    return "".join(parts)


def _legend_places(names: Iterable[str]) -> list[tuple[float, int]]:
    """Where each name begins, and in which line; lines before the last stand above the picture."""
    places: list[tuple[float, int]] = []
    x, line = float(LEFT), 0
    for name in names:
        # Letters are about 6.5 wide at this size, Chinese characters 12.
        size = 32 + sum(6.5 if letter.isascii() else 12 for letter in name)
        if places and x + size > WIDTH:
            x, line = float(LEFT), line + 1
        places.append((x, line))
        x += size
    return places


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="12" fill="{INK}" {extra}>{escape(text)}</text>'


def _svg(parts: Sequence[str], label: str, names: Iterable[str] = ()) -> str:
    """The element, with room above for the lines of its legend."""
    above = LINE * max((line for _, line in _legend_places(names)), default=0)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-above} {WIDTH} {HEIGHT + above}" role="img"'
    return f'{head} aria-label="{escape(label)}" font-family="inherit">{"".join(parts)}</svg>'
