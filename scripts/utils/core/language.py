"""The language that a person reads: that of the shell, or the one asked for, and the FAQ's entry on an error in it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Language = Literal["zh", "en"]
DOCS = Path(__file__).parents[3] / "docs"
PAGES: dict[Language, str] = {"zh": "faq.md", "en": "faq_EN.md"}
_ENTRY = re.compile(r'<a id="([\w-]+)"></a>\n### `(.+)`\n((?:.+\n?)*)')


def shell_language(environment: Mapping[str, str] = os.environ) -> Language:
    """Chinese where the locale is, as POSIX ranks its variables; English otherwise."""
    locale = next((value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := environment.get(name))), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def choose_text(language: Language, chinese: str, english: str) -> str:
    """The one in this language."""
    return chinese if language == "zh" else english


@dataclass(frozen=True)
class FaqEntry:
    """An entry of the FAQ.

    Attributes:
        key: of its link; phrase: the constant part of the messages that it is about; text: what it says, in one line.
    """

    key: str
    phrase: str
    text: str


def read_faq(language: Language, folder: Path = DOCS) -> list[FaqEntry]:
    """The entries, in their order; none where the scripts were copied without their docs."""
    page = folder / PAGES[language]
    if not page.is_file():
        return []
    entries = _ENTRY.findall(page.read_text(encoding="utf-8"))
    return [FaqEntry(key, phrase, _plain(text, language)) for key, phrase, text in entries]


def _plain(text: str, language: Language) -> str:
    """Markdown as a terminal shows it."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    return re.sub(r"\s*\n\s*", choose_text(language, "", " "), text.strip())


def find_entry(message: str, language: Language) -> FaqEntry | None:
    """The entry on a message: of several whose phrase is in it, the one that says most."""
    found = [entry for entry in read_faq(language) if entry.phrase in message]
    return max(found, key=lambda entry: len(entry.phrase), default=None)


def with_faq(message: str, language: Language | None = None) -> str:
    """A message with the link to its entry in the FAQ; in Chinese, with what that says before it."""
    language = language or shell_language()
    entry = find_entry(message, language)
    if entry is None:
        return message
    said = f"说明：{entry.text}\n" if language == "zh" else ""
    return f"{said}{message} [docs/{PAGES[language]}#{entry.key}]"
