"""What a text shows on a page, whoever wrote it: a question as it was typed, no pictures from elsewhere."""

from __future__ import annotations

import re

# Takes no room, and is white space to the browser's markdown reader, which no emphasis begins before.
MARK = "\ufeff"
# What that reader would not show as it is typed: blocks at the beginning of a line, and signs within it
# (or that the mark itself, typed by a user, comes after).
_MARKUP = re.compile(
    rf"^(?={MARK}|[ \t]*(?:[-#>+=|:~`]|\d+[.)])|[ \t]{{2}})|(?P<code>`)"
    rf"|[\\*_~$]|<(?=[A-Za-z/!?{MARK}])|!(?=[\[{MARK}])|\](?=[(\[:{MARK}])|&(?=#?\w+;|{MARK})",
    re.MULTILINE,
)
# Whatever a text may hold, the page loads nothing from elsewhere and sends nothing there.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)


def escape_question(text: str) -> str:
    """A user's text so that the page shows it as it was typed: no tags, pictures, links, headings, bold words.

    The edit box shows it so too, but for a backslash before backticks: no invisible sign keeps code from being code.
    """
    return _MARKUP.sub(lambda match: f"\\`{MARK}" if match["code"] else f"{match[0]}{MARK}", text)


def unescape_question(text: str) -> str:
    """What escape_question was given."""
    return re.sub(rf"(?m)(?:^|(?<=[\\*_~$<!\]&])){MARK}", "", text.replace(f"\\`{MARK}", "`"))


def escape_answer(text: str) -> str:
    """An answer so that its pictures are shown as links; other markup stays."""
    return re.sub(r"!(?=\[)", rf"\g<0>{MARK}", text)
