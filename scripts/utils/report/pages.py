"""Pages: sections of text, tables and pictures, rendered as one self-contained HTML page and as Markdown.

What a page says is decided elsewhere (report); here is only what it can show, and how.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..core.files import atomic_file

TEMPLATES = Path(__file__).parent / "templates"
MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]|#~$])")


class Text(NamedTuple):
    """One message in both languages."""

    zh: str
    en: str


class Answer(NamedTuple):
    """A table cell that is marked right or wrong."""

    text: str
    right: bool


class Change(NamedTuple):
    """A table cell that is marked better (1), worse (-1) or the same (0) than another one."""

    text: str
    change: int


Cell = str | Text | Answer | Change


@dataclass
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: Text


@dataclass
class Card:
    """A headline figure, how it came about, and its aim; `met` is None where the aim is only stated."""

    label: Text
    value: str
    change: str
    aim: Text
    met: bool | None = None


@dataclass
class Cards:
    kind: ClassVar[str] = "cards"
    cards: list[Card]


@dataclass
class Step:
    """A stage of a pipeline; `share` is the length of its bar, 0-1."""

    label: Text
    value: str
    share: float


@dataclass
class Strip:
    kind: ClassVar[str] = "strip"
    steps: list[Step]


@dataclass
class Table:
    """Rows of cells; all columns but the first `words` hold figures. A folded one opens by a click on its title."""

    kind: ClassVar[str] = "table"
    header: Sequence[Text]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    title: Text | None = None
    folded: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the cells of a row stand below each other on narrow screens, where columns of text get too thin."""
        return self.words == len(self.header) > 2


@dataclass
class Filtered:
    """A table of which a reader may see some rows alone, without scripts.

    Attributes:
        groups: what can be chosen; a row may belong to several.
        members: of every row, the places of its groups.
    """

    kind: ClassVar[str] = "filtered"
    name: str  # unlike any other on the page
    table: Table
    groups: Sequence[Text]
    members: Sequence[set[int]]

    def count(self, group: int) -> int:
        """Rows of a group."""
        return sum(group in members for members in self.members)


@dataclass
class Picture:
    """An <svg> element from charts, or a png; `file` is where Markdown finds it, relative to the page."""

    title: Text
    svg: str | None = None
    png: bytes = b""
    file: str | None = None

    @property
    def source(self) -> str:
        """The png as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass
class Pictures:
    kind: ClassVar[str] = "pictures"
    pictures: list[Picture]


@dataclass
class Beside:
    """A table and a picture, side by side where there is room."""

    kind: ClassVar[str] = "beside"
    table: Table
    picture: Picture


@dataclass
class Commands:
    """Lines for the shell, each with a comment above it."""

    kind: ClassVar[str] = "commands"
    commands: list[tuple[Text, str]]


Block = Paragraph | Cards | Strip | Table | Filtered | Pictures | Beside | Commands


@dataclass
class Section:
    """A headed part of a page; `name` is its anchor."""

    name: str
    title: Text
    blocks: list[Block]


@dataclass
class Page:
    title: Text
    sections: list[Section]
    footer: str


def write_page(page: Page, path: Path) -> None:
    """Write `path`.html and `path`.md."""
    for suffix, text in ((".html", render_html(page)), (".md", render_markdown(page))):
        with atomic_file(path.with_name(path.name + suffix)) as file:
            file.write(text)


def render_html(page: Page) -> str:
    """A file that loads nothing: style inline, pictures inside. All text is escaped."""
    return _render("page.html.jinja", page, autoescape=True)


def render_markdown(page: Page) -> str:
    """GitHub's Markdown. All text is escaped; pictures without a file are left out."""
    return _render("page.md.jinja", page, autoescape=False, finalize=escape_markdown)


def _render(template: str, page: Page, **options: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    return environment.get_template(template).render(page=page)


def escape_markdown(value: Any) -> Any:
    """A string that Markdown shows as it is, in tables too; what is marked safe and other types pass unchanged."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    text = MARKDOWN_SPECIAL.sub(r"\\\1", html.escape(value, quote=False))
    return re.sub(r"\r\n|\r|\n", "<br>", text)


# ---------------------------------------------------------------- figures and labels as text


def title_of(known: Mapping[str, Text], name: str) -> Text:
    """The title of a name, or the name itself."""
    return known.get(name, Text(name, ""))


def target_of(bound: str) -> Text:
    """What a card says of its aim."""
    return Text("目标", f"target {bound}")


def evenly_spaced(members: Sequence[int], most: int) -> list[int]:
    """At most `most` of the members, evenly spaced."""
    count = min(most, len(members))
    return [members[(2 * rank + 1) * len(members) // (2 * count)] for rank in range(count)]


def columns(*labels: str) -> list[Text]:
    """Header cells from "中文|English" strings."""
    return [Text(*label.split("|", 1)) for label in labels]


def percent(share: float, digits: int = 1, signed: bool = False) -> str:
    """0.123 -> "12.3 %"."""
    return f"{share * 100:{'+' if signed else ''}.{digits}f} %".replace("-", "−")


def duration(seconds: float) -> str:
    """95 -> "1 min 35 s"; below a minute tenths of a second are kept."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if rest else f"{minutes} min"
