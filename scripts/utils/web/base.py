"""What all pages have: a header, and texts that change with the language."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from fastapi.middleware import Middleware

from .markup import CONTENT_POLICY
from .texts import LANGUAGES, TEXTS, translate

MAX_FILE_SIZE = "4mb"
LATEX_DELIMITERS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "\\[", "right": "\\]", "display": True},
]

CSS = """
.gradio-container { max-width: 1600px !important; padding: 10px 16px !important; }
.gradio-container .main.app { padding: 0 !important; }
.gradio-container .main.app .column { gap: 8px; }
footer { display: none !important; }
#header { align-items: center; flex-wrap: nowrap; gap: 8px; }
#header h1 { font-size: 1.05rem; font-weight: 600; margin: 0; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
#title { flex: 1 1 auto; min-width: 0; }
#title .html-container { padding: 0 4px; }
#language { flex: 0 0 auto !important; width: auto; min-width: 0 !important; margin: 0 !important; }
#language .wrap { gap: 0; flex-wrap: nowrap; }
#language label { padding: 3px 10px; border-radius: 0; box-shadow: none; }
#language label input { display: none; }
#language label span { margin: 0; font-size: 0.8rem; }
#language label.selected { background: var(--color-accent); color: white; }
#dark { flex: 0 0 auto; min-width: 0; width: auto; padding: 4px 10px; }
#chat-column { height: calc(100vh - 58px); min-height: 480px; flex-wrap: nowrap; }
#chats { flex: 1 1 auto; min-height: 0; gap: 12px; }
#chats > .column { height: 100%; flex-wrap: nowrap; }
.answers { flex: 1 1 0 !important; height: auto !important; min-height: 200px; }
.answers .icon-button-wrapper.top-panel { display: none; }
.answers .bubble-gap { gap: 4px; }
.answers .message-row.bubble { margin: 6px 16px 2px; }
.answers .user p { white-space: pre-wrap; }
.notes { flex: 0 0 auto !important; }
.notes .html-container, #context .html-container { padding: 0 4px; color: var(--body-text-color-subdued); }
.notes .prose, #context .prose { font-size: 0.78rem; min-height: 1.2em; }
#below { align-items: center; gap: 8px; flex: 0 0 auto; }
#below button { flex: 0 0 auto; min-width: 0; width: auto; padding: 4px 12px; }
#context { flex: 1 1 240px; min-width: 240px; }
#context .bar { height: 4px; border-radius: 2px; background: var(--border-color-primary); margin-top: 3px;
  overflow: hidden; }
#context .bar div { height: 100%; background: var(--color-accent); }
#context .bar.full div { background: #d97706; }
#question .submit-button { background: var(--color-accent); color: white; }
#question .stop-button { background: #dc2626; color: white; }
#panel { height: calc(100vh - 58px); min-height: 480px; overflow-y: auto; flex-wrap: nowrap; scrollbar-width: thin; }
#panel > .block { flex: 0 0 auto; }
#panel .form { border: none; background: none; box-shadow: none; gap: 8px; overflow: visible; }
#panel .form .block { padding: 0; border: none; background: none; }
#panel .form input[type="range"] { margin: 6px 0; }
#panel .form .min_value, #panel .form .max_value { display: none; }
#panel .form [data-testid="block-info"] { font-size: 0.82rem; margin-bottom: 2px; }
#panel .form .info-text, #panel .form .info { font-size: 0.72rem; line-height: 1.25; }
.dark #panel input[type="range"] { --neutral-200: var(--neutral-600); }
#panel textarea { font-size: 0.85rem; padding: 6px 8px; }
.card { width: 100%; font-size: 0.82rem; border-collapse: collapse; margin: 0; }
.card, .card tr, .card td { border: none !important; background: none !important; }
.card td { padding: 2px 0 !important; vertical-align: top; }
.card td:first-child { color: var(--body-text-color-subdued); padding-right: 12px !important; white-space: nowrap; }
.card td:not(:first-child) { text-align: right; overflow-wrap: anywhere; padding-left: 8px !important; }
#card .html-container { padding: 0; }
@media (max-width: 768px) {
  .gradio-container { padding: 8px !important; }
  #chat-column, #panel { height: auto; min-height: 0; overflow: visible; }
  .answers { flex: 0 0 auto !important; height: 62vh !important; }
  #context { flex: 1 0 100%; }
  #below button { flex: 1 1 0; }
}
"""
# The choice of dark or light is kept in the browser.
DARK_AT_START = """() => {
  const kept = localStorage.getItem('dark');
  if (kept !== null) document.body.classList.toggle('dark', kept === '1');
}"""
DARK_TOGGLE = "() => localStorage.setItem('dark', document.body.classList.toggle('dark') ? '1' : '0')"
# The file is made in the browser: no conversation is written to the server's disk.
DOWNLOAD = """(text) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  link.download = 'chat-' + new Date().toISOString().slice(0, 19).replace(/[:T]/g, '-') + '.json';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""


class ContentPolicy:
    """Adds the Content-Security-Policy header to every response."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", CONTENT_POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def launch_settings() -> dict[str, Any]:
    """How the page looks and is served: fonts of the system, nothing recorded, nothing from elsewhere."""
    fonts = ["system-ui", "-apple-system", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=fonts,
        font_mono=["ui-monospace", "Consolas", "Menlo", "monospace"],
    )
    return {
        "theme": theme,
        "css": CSS,
        "js": DARK_AT_START,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "ssr_mode": False,
        "max_file_size": MAX_FILE_SIZE,
        "app_kwargs": {"middleware": [Middleware(ContentPolicy)], "docs_url": None, "redoc_url": None},
    }


class TranslatedPage:
    """A page whose components get their texts in the language chosen at its top."""

    blocks: gr.Blocks
    words: Mapping[str, tuple[str, str]] = TEXTS  # all texts by name, Chinese and English

    def __init__(self, language: str) -> None:
        """`language`: "zh", "en", or "auto": what the browser asks for."""
        self.first_language = language
        self.texts: list[tuple[gr.blocks.Block, dict[str, str]]] = []  # components and the names of their texts

    @property
    def _start_language(self) -> str:
        return "zh" if self.first_language == "auto" else self.first_language

    def _add(self, kind: type, texts: dict[str, str], **options: Any) -> Any:
        """A component with texts ({attribute: name of the text}), which change with the language."""
        component = kind(**options, **{name: self._word(text, self._start_language) for name, text in texts.items()})
        self.texts.append((component, texts))
        return component

    def _word(self, name: str, language: str) -> str:
        return translate(name, language, self.words)

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
            {name: self._word(text, language) for name, text in texts.items()} for _, texts in self.texts
        ]
        return [gr.update(**update) for update in updates]

    def _browser_language(self, request: gr.Request) -> str:
        return "zh" if request.headers.get("accept-language", "zh").lower().startswith("zh") else "en"
