"""What all pages have: a header, and texts that change with the language."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from .web_style import DARK_TOGGLE
from .web_texts import LANGUAGES, translate


class TranslatedPage:
    """A page whose components get their texts in the language chosen at its top."""

    blocks: gr.Blocks

    def __init__(self, language: str) -> None:
        """`language`: "zh", "en", or "auto": what the browser asks for."""
        self.first_language = language
        self.texts: list[tuple[gr.blocks.Block, dict[str, str]]] = []  # components and the names of their texts

    @property
    def _start_language(self) -> str:
        return "zh" if self.first_language == "auto" else self.first_language

    def _add(self, kind: type, texts: dict[str, str], **options: Any) -> Any:
        """A component with texts ({attribute: name of the text}), which change with the language."""
        component = kind(**options, **{name: translate(text, self._start_language) for name, text in texts.items()})
        self.texts.append((component, texts))
        return component

    def _lay_out_header(self, title: str) -> None:
        with gr.Row(elem_id="header"):
            gr.HTML(f"<h1>{html.escape(title)}</h1>", elem_id="title")
            choices = [(text, code) for code, text in LANGUAGES.items()]
            self.language = gr.Radio(choices, value=self._start_language, container=False, elem_id="language")
            self.dark = self._add(gr.Button, {"value": "dark"}, size="sm", elem_id="dark")

    def _listen_to_header(self, quick: dict[str, Any]) -> None:
        """`quick`: how events that compute nothing are handled."""
        self.dark.click(None, None, None, js=DARK_TOGGLE)
        if self.first_language == "auto":
            self.blocks.load(self._browser_language, None, [self.language], **quick)

    @property
    def _translated(self) -> list[gr.blocks.Block]:
        """The components that _translations is for."""
        return [component for component, _ in self.texts]

    def _translations(self, language: str) -> list[Any]:
        updates: list[dict[str, Any]] = [
            {name: translate(text, language) for name, text in texts.items()} for _, texts in self.texts
        ]
        return [gr.update(**update) for update in updates]

    def _browser_language(self, request: gr.Request) -> str:
        return "zh" if request.headers.get("accept-language", "zh").lower().startswith("zh") else "en"
