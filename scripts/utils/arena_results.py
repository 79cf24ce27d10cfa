"""The arena's results as a piece of a page: standings with their intervals, and the pairs as a heat map."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from .ratings import pair_rates
from .web_texts import translate

RESULTS_CSS = """
.standings { border-collapse: collapse; font-size: 0.86rem; margin: 4px 0 14px; }
.standings th, .standings td { padding: 5px 12px !important; text-align: right; white-space: nowrap; }
.standings th:nth-child(2), .standings td:nth-child(2) { text-align: left; }
.standings small { color: var(--body-text-color-subdued); }
.track { position: relative; width: 190px; height: 14px; }
.track i { position: absolute; top: 6px; height: 2px; background: #52606d; }
.track b { position: absolute; top: 2px; width: 10px; height: 10px; margin-left: -5px; border-radius: 5px;
  background: var(--color-accent); }
.heat td { width: 76px; height: 46px; text-align: center !important; white-space: pre; line-height: 1.15; }
.heat td:first-child { text-align: right !important; width: auto; }
"""


def results_html(figures: Mapping[str, Any], language: str) -> str:
    """Standings with their intervals, and the pairs as a heat map. All text is escaped."""
    if not figures["models"]:
        return f"<p>{translate('arena_empty', language)}</p>"
    parts = [f"<p><b>{translate('arena_battles', language, count=figures['battles'])}</b></p>"]
    if len(figures["groups"]) > 1:
        groups = " | ".join(", ".join(map(html.escape, group)) for group in figures["groups"])
        parts.append(f"<p>⚠ {translate('arena_groups', language, groups=groups)}</p>")
    parts += [_standings(figures["models"], language), f"<p><small>{translate('arena_about', language)}</small></p>"]
    parts += [f"<p>{translate('arena_pairs', language)}</p>", _heat_map(figures)]
    return "".join(parts)


def _standings(models: Sequence[Mapping[str, Any]], language: str) -> str:
    low = min(model["rating_interval"][0] for model in models)
    span = max(model["rating_interval"][1] for model in models) - low or 1.0
    head = [translate(f"column_{name}", language) for name in ("rank", "model", "rating")]
    head += ["", *(translate(f"column_{name}", language) for name in ("elo", "win_rate", "record"))]
    rows = []
    for model in models:
        start, middle, end = ((value - low) / span for value in _with_value(model, "rating"))
        track = f'<i style="left:{start:.1%};width:{end - start:.1%}"></i><b style="left:{middle:.1%}"></b>'
        record = " / ".join(str(model[name]) for name in ("wins", "losses", "ties", "both_bad"))
        cells = [model["rank"], html.escape(model["name"]), _figure(model, "rating", 0)]
        cells += [f'<div class="track">{track}</div>', _figure(model, "elo", 0), _figure(model, "win_rate", 1), record]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    lines = ["".join(f"<th>{name}</th>" for name in head), *rows]
    return f'<table class="standings">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def _with_value(model: Mapping[str, Any], kind: str) -> list[float]:
    low, high = model[f"{kind}_interval"]
    return [min(low, model[kind]), model[kind], max(high, model[kind])]


def _figure(model: Mapping[str, Any], kind: str, digits: int) -> str:
    if model[kind] is None:
        return "–"
    low, high = model[f"{kind}_interval"]
    return f"{model[kind]:.{digits}f} <small>[{low:.{digits}f}, {high:.{digits}f}]</small>"


def _heat_map(figures: Mapping[str, Any]) -> str:
    """Blue where the row wins, red where it loses."""
    names = [html.escape(model["name"]) for model in figures["models"]]
    rates, labels = pair_rates(figures)
    rows = ["<th></th>" + "".join(f"<th>{name}</th>" for name in names)]
    for name, line, texts in zip(names, rates, labels, strict=True):
        cells = [f"<td>{name}</td>"]
        for rate, text in zip(line.tolist(), texts, strict=True):
            color = "" if rate != rate else f"background:rgba({'42,111,151' if rate >= 50 else '178,58,72'}"
            color += f",{abs(rate - 50) / 62:.2f})" if color else ""
            cells.append(f'<td style="{color}">{text}</td>')
        rows.append("".join(cells))
    return f'<table class="standings heat">{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'
