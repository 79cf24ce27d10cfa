"""The web demo's page: what stands on it, and what happens when it is used. All else is in web.chat."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.arguments import GenerationArguments
from ..core.errors import InputError
from ..generation.engine import Engine
from .base import DOWNLOAD, LATEX_DELIMITERS, TranslatedPage
from .chat import Conversation, describe_context, describe_reply, read_controls, read_stops, show_stops
from .markup import escape_answer, escape_question, unescape_question
from .saved_chats import load_chat, save_chat
from .texts import TEXTS, translate

STOPPED = "■"  # stands for an answer that was stopped before it began
SLIDERS: dict[str, tuple[float, float, float]] = {  # lowest, highest, step
    "max_new_tokens": (1, 4096, 1),
    "temperature": (0.0, 2.0, 0.05),
    "top_p": (0.05, 1.0, 0.05),
    "top_k": (0, 200, 1),
    "min_p": (0.0, 1.0, 0.01),
    "repetition_penalty": (0.5, 3.0, 0.05),
    "presence_penalty": (-2.0, 2.0, 0.1),
    "frequency_penalty": (-2.0, 2.0, 0.1),
    "guidance_scale": (1.0, 5.0, 0.1),
}
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k")
MORE_SAMPLING = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class ChatPage(TranslatedPage):
    """The page of one or several engines; what users say is in their own sessions."""

    def __init__(
        self,
        engines: Sequence[Engine],
        cards: Sequence[dict[str, str]],
        settings: GenerationArguments,
        system_prompt: str | None = None,
        *,
        title: str | None = None,
        language: str = "auto",
        max_memory: int | None = None,
        max_answers: int = 8,
    ) -> None:
        """
        Args:
            cards: what is shown about each engine, see web.chat.model_card.
            settings, system_prompt: what the controls say at first.
            language: "zh", "en", or "auto": what the browser asks for.
            max_answers: conversations answered at once; further ones wait, and see their place in the queue.
        """
        super().__init__(language)
        self.engines, self.cards, self.settings = engines, cards, settings
        self.first_system_prompt, self.max_memory, self.max_answers = system_prompt, max_memory, max_answers
        self.models = [card["card_name"] for card in cards]
        self.controls: dict[str, gr.components.Component] = {}
        name = title or " / ".join(self.models)
        with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            self.conversation = gr.State(Conversation(len(engines)))
            self._lay_out(name)
            self._listen()

    # ------------------------------------------------------------ layout

    def _lay_out(self, name: str) -> None:
        self._lay_out_header(name)
        with gr.Row():
            with gr.Column(scale=7, min_width=320, elem_id="chat-column"):
                self._lay_out_chat()
            with gr.Column(scale=3, min_width=320, elem_id="panel"):
                self._lay_out_panel()

    def _lay_out_chat(self) -> None:
        self.chatbots, self.notes = [], []
        with gr.Row(elem_id="chats"):
            for number, model in enumerate(self.models):
                with gr.Column(min_width=280):
                    chatbot = self._add(
                        gr.Chatbot,
                        {"placeholder": "greeting"},
                        label=model,
                        show_label=len(self.models) > 1,
                        editable="user",
                        buttons=["copy"],
                        elem_id=f"chat-{number}",
                        elem_classes="answers",
                        latex_delimiters=LATEX_DELIMITERS,
                    )
                    self.chatbots.append(chatbot)
                    self.notes.append(gr.HTML(elem_id=f"notes-{number}", elem_classes="notes"))
        self.box = self._add(
            gr.Textbox,
            {"placeholder": "question"},
            lines=1,
            max_lines=10,
            show_label=False,
            submit_btn=True,
            autofocus=True,
            elem_id="question",
        )
        with gr.Row(elem_id="below"):
            self.context = gr.HTML(self._context_html(Conversation(), self._start_language), elem_id="context")
            self.go_on = self._add(gr.Button, {"value": "go_on"}, size="sm", elem_id="go-on")
            self.new_chat = self._add(gr.Button, {"value": "new_chat"}, size="sm", elem_id="new-chat")
            self.save = self._add(gr.Button, {"value": "save"}, size="sm", elem_id="save")
            self.load = self._add(gr.UploadButton, {"label": "load"}, size="sm", elem_id="load", file_types=[".json"])
        self.saved = gr.Textbox(visible="hidden", elem_id="saved")

    def _lay_out_panel(self) -> None:
        with self._add(gr.Accordion, {"label": "model"}, open=True):
            self.card = gr.HTML(self._card_html(self._start_language), elem_id="card")
        with self._add(gr.Accordion, {"label": "prompts"}, open=True):
            hint = "system_prompt_none" if self.first_system_prompt == "" else "system_prompt_hint"
            self.system = self._add_text("system_prompt", hint, self.first_system_prompt or "")
            negative = self._add_text("negative_prompt", "negative_prompt_hint", self.settings.negative_prompt or "")
            self.controls["negative_prompt"] = negative
            self._add_slider("guidance_scale")
        with self._add(gr.Accordion, {"label": "sampling"}, open=True):
            for name in SAMPLING:
                self._add_slider(name)
        with self._add(gr.Accordion, {"label": "more_sampling"}, open=False, elem_id="more"):
            for name in MORE_SAMPLING:
                self._add_slider(name)
            self.controls["seed"] = self._add(
                gr.Number,
                {"label": "seed", "info": "seed_info"},
                value=self.settings.seed,
                precision=0,
                minimum=0,
                elem_id="seed",
            )
            self.controls["stop"] = self._add_text("stop", "stop_hint", show_stops(self.settings.stop))

    def _add_text(self, name: str, hint: str, value: str) -> Any:
        texts = {"label": name, "placeholder": hint}
        return self._add(gr.Textbox, texts, value=value, lines=2, max_lines=8, elem_id=name)

    def _add_slider(self, name: str) -> None:
        value = getattr(self.settings, name)
        if name == "temperature" and not self.settings.samples:
            value = 0.0
        lowest, highest, step = SLIDERS[name]
        if name == "max_new_tokens":
            highest = min([highest, *(engine.context for engine in self.engines if engine.context is not None)])
        self.controls[name] = self._add(
            gr.Slider,
            {"label": name, **({"info": f"{name}_info"} if f"{name}_info" in TEXTS else {})},
            # What the command line asks for can be chosen, even where nobody would look for it.
            minimum=min(lowest, value),
            maximum=max(highest, value),
            value=value,
            step=step,
            elem_id=name,
        )

    # ------------------------------------------------------------ what is shown

    def _messages(self, conversation: Conversation, model: int) -> list[dict[str, Any]]:
        """What a chatbot shows. Two messages a turn, so that message 2 n is question n."""
        shown = []
        for turn in conversation.turns:
            shown.append({"role": "user", "content": [{"type": "text", "text": escape_question(turn.question)}]})
            for reply in turn.replies[model : model + 1]:
                if reply.text or reply.finish_reason:
                    text = escape_answer(reply.text) or STOPPED
                    shown.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        return shown

    def _show(self, conversation: Conversation, language: str) -> list[Any]:
        """Values of the chatbots, the notes below them, and the context's bar."""
        replies = conversation.turns[-1].replies if conversation.turns else []
        notes = ["" for _ in self.engines]
        for number, reply in enumerate(replies):
            notes[number] = html.escape(describe_reply(reply, self.engines[number].statistics(), language))
        chats = [self._messages(conversation, number) for number in range(len(self.engines))]
        return [*chats, *notes, self._context_html(conversation, language)]

    def _context_html(self, conversation: Conversation, language: str) -> str:
        replies = conversation.turns[-1].replies if conversation.turns else []
        text, share = describe_context(replies, [engine.context for engine in self.engines], language)
        kind = "bar full" if share > 0.9 else "bar"
        return f'{html.escape(text)}<div class="{kind}"><div style="width: {share:.1%}"></div></div>'

    def _card_html(self, language: str) -> str:
        names = dict.fromkeys(name for card in self.cards for name in card)
        rows = []
        for name in names:
            values = "".join(f"<td>{html.escape(card.get(name, '–'))}</td>" for card in self.cards)
            rows.append(f"<tr><td>{translate(name, language)}</td>{values}</tr>")
        return f'<table class="card">{"".join(rows)}</table>'

    @property
    def _views(self) -> list[Any]:
        return [*self.chatbots, *self.notes, self.context]

    # ------------------------------------------------------------ what happens

    def _listen(self) -> None:
        common = [self.conversation, self.language]
        settings = [self.system, *self.controls.values()]
        views = [self.box, *self._views]
        # What may have something to tell the user goes through the queue: only there messages can be shown.
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        telling = {**quick, "queue": True, "concurrency_limit": None}
        begun = [
            self.box.submit(self._send, [*common, self.box], views, **telling),
            gr.on([chatbot.edit for chatbot in self.chatbots], self._edit, common, views, **telling),
            gr.on([chatbot.retry for chatbot in self.chatbots], self._retry, common, views, **telling),
            self.go_on.click(self._go_on, common, views, **telling),
        ]
        answers = []
        for event in begun:
            answer = event.success(
                self._answer,
                [*common, *settings],
                views,
                show_progress_on=self.chatbots,
                concurrency_limit=self.max_answers,
                concurrency_id="answers",
                api_visibility="private",
            )
            answers.append(answer)
            answer.then(self._redraw, common, views, **quick)
        # The engine is told to stop; what still waits for its turn leaves the queue.
        self.box.stop(self._stop, common, views, **quick)
        self.box.stop(None, None, None, cancels=answers, api_visibility="private")
        gr.on([chatbot.undo for chatbot in self.chatbots], self._undo, common, views, **telling)
        cleared = [self.new_chat.click, *(chatbot.clear for chatbot in self.chatbots)]
        gr.on(cleared, self._clear, common, views, **quick)
        saved = self.save.click(self._save, [self.conversation, *settings], [self.saved], **quick)
        saved.success(None, [self.saved], None, js=DOWNLOAD)
        self.load.upload(self._load, [*common, self.load], [*settings, *views], **telling)
        views = [self.card, *self.notes, self.context, *self._translated]
        self.language.change(self._translate, common, views, **quick)
        self._listen_to_header(quick)

    def _send(self, conversation: Conversation, language: str, text: str) -> list[Any]:
        with _reported(language):
            if question := unescape_question(text).strip():
                conversation.ask(question)
        return self._redraw(conversation, language, value="")

    def _edit(self, conversation: Conversation, language: str, event: gr.EditData) -> list[Any]:
        index = event.index if isinstance(event.index, int) else event.index[0]
        text = event.value if isinstance(event.value, str) else event.value[0]["text"]
        with _reported(language):
            if question := unescape_question(text).strip():
                conversation.edit(index // 2, question)
        return self._redraw(conversation, language)

    def _retry(self, conversation: Conversation, language: str) -> list[Any]:
        with _reported(language):
            conversation.retry()
        return self._redraw(conversation, language)

    def _go_on(self, conversation: Conversation, language: str) -> list[Any]:
        with _reported(language, "busy" if conversation.is_busy else "no_answer"):
            conversation.go_on()
        return self._redraw(conversation, language)

    def _redraw(self, conversation: Conversation, language: str, **box: Any) -> list[Any]:
        """Everything as it stands; the box has the button that sends, or the one that stops."""
        busy = conversation.is_busy
        return [gr.update(submit_btn=not busy, stop_btn=busy, **box), *self._show(conversation, language)]

    def _answer(self, conversation: Conversation, language: str, system: str, *controls: Any) -> Iterator[list[Any]]:
        try:
            settings = self._read(controls)
            for _ in conversation.answer(self.engines, settings, self._system_prompt(system), self.max_memory):
                yield [gr.skip(), *self._show(conversation, language)]
        except InputError as error:
            question = conversation.take_back()
            gr.Warning(translate("cannot_answer", language, error=html.escape(str(error))))
            yield [gr.skip() if question is None else gr.update(value=question), *self._show(conversation, language)]

    def _stop(self, conversation: Conversation, language: str) -> list[Any]:
        conversation.stop()
        return self._redraw(conversation, language)

    def _undo(self, conversation: Conversation, language: str) -> list[Any]:
        with _reported(language):
            question = conversation.undo()
        return self._redraw(conversation, language, value=question)

    def _clear(self, conversation: Conversation, language: str) -> list[Any]:
        conversation.clear()
        return self._redraw(conversation, language, value="")

    def _save(self, conversation: Conversation, system: str, *controls: Any) -> str:
        settings = dict(zip(self.controls, controls, strict=True))
        settings["stop"] = read_stops(settings["stop"])
        return save_chat(conversation, self.models, self._system_prompt(system), settings)

    def _load(self, conversation: Conversation, language: str, path: str) -> list[Any]:
        file = Path(path)
        data = file.read_bytes()
        file.unlink()
        try:
            saved = load_chat(data, len(self.engines))
        except InputError as error:
            message = translate("bad_file", language, file=html.escape(file.name), error=html.escape(str(error)))
            raise gr.Error(message, print_exception=False) from None
        conversation.replace(saved.turns)
        if "stop" in saved.settings:
            saved.settings["stop"] = show_stops(saved.settings["stop"])
        values = [saved.settings.get(name, gr.skip()) for name in self.controls]
        system = gr.skip() if saved.system_prompt is None else saved.system_prompt
        return [system, *values, *self._redraw(conversation, language)]

    def _translate(self, conversation: Conversation, language: str) -> list[Any]:
        views = self._show(conversation, language)[len(self.chatbots) :]
        return [self._card_html(language), *views, *self._translations(language)]

    def _system_prompt(self, text: str) -> str | None:
        """An empty box: no system prompt if the command line said so, else the template's own."""
        return text if text.strip() else ("" if self.first_system_prompt == "" else None)

    def _read(self, controls: Sequence[Any]) -> GenerationArguments:
        return read_controls(self.settings, dict(zip(self.controls, controls, strict=True)))


@contextlib.contextmanager
def _reported(language: str, reason: str = "busy") -> Iterator[None]:
    """Tells the user, in words of the page, why nothing happens, and ends the event."""
    try:
        yield
    except InputError:
        raise gr.Error(translate(reason, language), print_exception=False) from None
