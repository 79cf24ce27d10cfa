"""Reports: sections of tables, pictures and figures, rendered as one self-contained HTML page and as Markdown.

What a report says is decided elsewhere (recipe_report); here is only what it can show and how that looks.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .files import atomic_file

TEMPLATES = Path(__file__).parent
MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]|#~$])")


class Text(NamedTuple):
    """One message in both languages."""

    zh: str
    en: str


class Answer(NamedTuple):
    """A table cell that is marked right or wrong."""

    text: str
    right: bool


Cell = str | Text | Answer


@dataclass
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: Text


@dataclass
class Card:
    """A headline figure; `met` says whether it reached its target, None where there is none."""

    label: Text
    value: str
    detail: Text
    met: bool | None = None


@dataclass
class Cards:
    kind: ClassVar[str] = "cards"
    cards: list[Card]


@dataclass
class Step:
    """One stage of a pipeline; `share` is its part of the whole time, 0-1."""

    label: Text
    value: str
    share: float


@dataclass
class Strip:
    kind: ClassVar[str] = "strip"
    steps: list[Step]


@dataclass
class Table:
    """Cells in rows; all columns but the first `words` hold figures. A `fold` title hides the rows until it is clicked."""

    kind: ClassVar[str] = "table"
    header: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    fold: Text | None = None


@dataclass
class Picture:
    """An <svg> element made by charts, or a png file; `file` is where Markdown finds it, relative to the report."""

    title: Text
    svg: str | None = None
    png: bytes | None = None
    file: str | None = None

    @property
    def source(self) -> str:
        """The png as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png or b'').decode()}"


@dataclass
class Pictures:
    kind: ClassVar[str] = "pictures"
    pictures: list[Picture]


@dataclass
class Commands:
    """Lines for the shell, each with a comment above it."""

    kind: ClassVar[str] = "commands"
    commands: list[tuple[Text, str]]


Block = Paragraph | Cards | Strip | Table | Pictures | Commands


@dataclass
class Section:
    """A headed part of a report; `name` is its anchor."""

    name: str
    title: Text
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Report:
    title: Text
    sections: list[Section]
    footer: str = ""


def write_report(report: Report, folder: Path) -> None:
    """Write report.html and report.md into `folder`."""
    for name, text in (("report.html", render_html(report)), ("report.md", render_markdown(report))):
        with atomic_file(folder / name) as file:
            file.write(text)


def render_html(report: Report) -> str:
    """The report as a page that loads nothing: style inline, pictures inside. All text is escaped."""
    return _render("report.html.jinja", report, autoescape=True)


def render_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown. All text is escaped; pictures without a file are left out."""
    return _render("report.md.jinja", report, autoescape=False, finalize=escape_markdown)


def _render(template: str, report: Report, **options: Any) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )
    return environment.get_template(template).render(report=report)


def escape_markdown(value: Any) -> Any:
    """A string that Markdown shows as it is, also inside a table; anything marked safe and other types pass unchanged."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    text = MARKDOWN_SPECIAL.sub(r"\\\1", html.escape(value, quote=False))
    return re.sub(r"\r\n|\r|\n", "<br>", text)


# ---------------------------------------------------------------- figures as text


def percent(share: float, signed: bool = False) -> str:
    """0.123 -> "12.3 %"."""
    return f"{share * 100:{'+' if signed else ''}.1f} %".replace("-", "−")


def duration(seconds: float) -> str:
    """95 -> "1 min 35 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
