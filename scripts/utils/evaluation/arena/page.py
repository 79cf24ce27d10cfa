"""The arena's page: two models without names answer side by side, a vote, who they were; and a page of results."""

from __future__ import annotations

import contextlib
import html
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import gradio as gr

from ...core.arguments import GenerationArguments
from ...core.errors import InputError
from ...generation.engine import Answer, Delta
from ...web.base import LATEX_DELIMITERS, TranslatedPage
from ...web.chat import Reply, add_delta, next_news, put_news
from ...web.markup import escape_answer, escape_question
from ..endpoints import EndpointError
from .matchmaking import Arena, PendingBattle
from .players import Player
from .ratings import Verdict, pair_rates
from .texts import TEXTS, translate
from .votes import Vote

logger = logging.getLogger(__name__)

BUTTONS: tuple[Verdict, ...] = ("left", "tie", "both_bad", "right")
AHEAD = 8  # characters that the quicker answer may show more than the slower one has
ARENA_CSS = """
#arena-column { height: calc(100vh - 112px); min-height: 480px; flex-wrap: nowrap; }
#votes button { min-width: 110px; padding: 6px 10px; }
#status .prose { font-size: 0.95rem; text-align: center; min-height: 1.5em; }
#status .html-container { padding: 0; }
#asking { align-items: center; gap: 8px; flex: 0 0 auto; }
#category { flex: 0 0 150px; min-width: 130px; }
#results-category { flex: 0 0 auto; width: 240px; align-self: flex-start; margin-left: 12px; }
#next { flex: 0 0 auto; min-width: 120px; }
@media (max-width: 768px) { #arena-column { height: auto; } #asking { flex-wrap: wrap; } }
"""


@dataclass
class Visit:
    """What one visitor sees: a battle, both replies, and the vote."""

    battle: PendingBattle | None = None
    replies: list[Reply] = field(default_factory=list)
    running: list[Answer] = field(default_factory=list)
    vote: Verdict | None = None
    failed: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether both answers are there, whole."""
        return len(self.replies) == 2 and all(reply.finish_reason for reply in self.replies) and not self.failed

    def begin(self, battle: PendingBattle) -> None:
        """Show a new battle; answers of the last one that are still being written are stopped."""
        self.stop()
        self.battle, self.replies, self.running, self.vote, self.failed = battle, [], [], None, False

    def stop(self) -> None:
        """Cancel what is being written."""
        for answer in self.running:
            answer.cancel()


class ArenaPage(TranslatedPage):
    """The page of some players; what visitors see is in their own sessions, votes are the arena's."""

    words = TEXTS

    def __init__(
        self,
        players: Sequence[Player],
        arena: Arena,
        settings: GenerationArguments,
        summarise: Callable[[str | None], Mapping[str, Any]],
        *,
        title: str | None = None,
        language: str = "auto",
        max_answers: int = 8,
    ) -> None:
        """
        Args:
            settings: how all players answer.
            summarise: figures (see ratings.rate_models) of the votes on a category; None: on all.
            max_answers: battles answered at once; further ones wait, and see their place in the queue.
        """
        super().__init__(language)
        self.players = {player.name: player for player in players}
        self.arena, self.settings, self.max_answers = arena, settings, max_answers
        self._summarise = summarise
        self._known: dict[str, tuple[int, Mapping[str, Any]]] = {}  # figures by category, and of how many votes
        name = title or translate("arena", self._start_language)
        categories = self._category_choices(self._start_language, self.arena.categories)
        with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            self.visit = gr.State(Visit())
            self._lay_out_header(name)
            with gr.Tabs():
                with self._add(gr.Tab, {"label": "arena_battle"}):
                    self._lay_out_battle(categories)
                with self._add(gr.Tab, {"label": "arena_results"}) as self.results_tab:
                    self.results_category = self._category_choice(categories, "results-category")
                    self.results = gr.HTML(elem_id="results")
            self._listen()

    # ------------------------------------------------------------ layout

    def _lay_out_battle(self, categories: Sequence[tuple[str, str]]) -> None:
        self.chatbots = []
        with gr.Column(elem_id="arena-column"):
            with gr.Row(elem_id="chats"):
                for side in range(2):
                    with gr.Column(min_width=280):
                        chatbot = self._add(
                            gr.Chatbot,
                            {"placeholder": "arena_greeting"},
                            label=translate(f"arena_side_{side}", self._start_language),
                            buttons=["copy"],
                            elem_id=f"chat-{side}",
                            elem_classes="answers",
                            latex_delimiters=LATEX_DELIMITERS,
                        )
                        self.chatbots.append(chatbot)
            self.status = gr.HTML(elem_id="status")
            with gr.Row(elem_id="votes"):
                self.buttons = {
                    verdict: self._add(
                        gr.Button, {"value": f"vote_{verdict}"}, interactive=False, elem_id=f"vote-{verdict}"
                    )
                    for verdict in BUTTONS
                }
            with gr.Row(elem_id="asking"):
                self.box = self._add(
                    gr.Textbox,
                    {"placeholder": "arena_question"},
                    lines=1,
                    max_lines=6,
                    show_label=False,
                    submit_btn=True,
                    elem_id="question",
                )
                self.category = self._category_choice(categories, "category")
                self.next = self._add(gr.Button, {"value": "arena_next"}, variant="primary", elem_id="next")

    def _category_choice(self, choices: Sequence[tuple[str, str]], name: str) -> Any:
        return gr.Dropdown(choices, value="", container=False, show_label=False, min_width=130, elem_id=name)

    def _category_choices(self, language: str, categories: Sequence[str]) -> list[tuple[str, str]]:
        named = [(describe_category(name, language), name) for name in categories]
        return [(translate("arena_all", language), ""), *named]

    # ------------------------------------------------------------ what is shown

    def _show(self, visit: Visit, language: str) -> list[Any]:
        """Values of the chatbots, the line below them, and the buttons."""
        chats = [self._chat(visit, side, language) for side in range(2)]
        may_vote = visit.is_answered and visit.vote is None
        buttons = [
            gr.update(interactive=may_vote, variant="primary" if visit.vote == verdict else "secondary")
            for verdict in self.buttons
        ]
        return [*chats, self._status(visit, language), *buttons]

    def _chat(self, visit: Visit, side: int, language: str) -> Any:
        label = translate(f"arena_side_{side}", language)
        shown: list[dict[str, Any]] = []
        if visit.battle is not None:
            if visit.vote is not None:
                label += f": {visit.battle.models[side]}"
            shown.append({"role": "user", "content": _text(escape_question(visit.battle.question.text))})
        if visit.replies and ((text := in_step(visit.replies, side)) or visit.replies[side].finish_reason):
            shown.append({"role": "assistant", "content": _text(escape_answer(text) or "■")})
        return gr.update(value=shown, label=label)

    def _status(self, visit: Visit, language: str) -> str:
        if visit.battle is None:
            return ""
        if visit.failed:
            return translate("arena_failed", language)
        if visit.vote is not None:
            left, right = (f"<b>{html.escape(name)}</b>" for name in visit.battle.models)
            vote = translate(f"vote_{visit.vote}", language)
            return translate("arena_revealed", language, left=left, right=right, vote=vote)
        return translate("arena_to_vote" if visit.is_answered else "arena_writing", language)

    @property
    def _views(self) -> list[Any]:
        return [*self.chatbots, self.status, *self.buttons.values()]

    # ------------------------------------------------------------ what happens

    def _listen(self) -> None:
        common = [self.visit, self.language]
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        # What may have something to tell the visitor goes through the queue: only there messages can be shown.
        telling = {**quick, "queue": True, "concurrency_limit": None}
        begun = [
            self.next.click(self._next, [*common, self.category], self._views, **telling),
            self.box.submit(self._send, [*common, self.box], [self.box, *self._views], **telling),
        ]
        for event in begun:
            event.success(
                self._answer,
                common,
                self._views,
                show_progress_on=self.chatbots,
                concurrency_limit=self.max_answers,
                concurrency_id="answers",
                api_visibility="private",
            ).then(self._show, common, self._views, **quick)
        for verdict, button in self.buttons.items():
            button.click(self._vote, [*common, gr.State(verdict)], self._views, **telling)
        results = [self.results_category, self.results]
        shown = [self.language, self.results_category]
        self.results_tab.select(self._show_results, shown, results, **quick)
        self.results_category.input(self._show_results, shown, results, **quick)
        self.language.change(self._translate, common, [self.category, *self._views, *self._translated], **quick).then(
            self._show_results, shown, results, **quick
        )
        self.blocks.unload(self._leave)
        self._listen_to_header(quick)

    def _next(self, visit: Visit, language: str, category: str, request: gr.Request) -> list[Any]:
        """A battle over a question of the bank; it is answered by the next event."""
        with _reported(language):
            visit.begin(self.arena.begin(str(request.session_hash), category or None))
        return self._show(visit, language)

    def _send(self, visit: Visit, language: str, text: str, request: gr.Request) -> list[Any]:
        """A battle over what was typed."""
        with _reported(language):
            if text.strip():
                visit.begin(self.arena.begin(str(request.session_hash), text=text.strip()))
        return ["", *self._show(visit, language)]

    def _answer(self, visit: Visit, language: str) -> Iterator[list[Any]]:
        """Both answers as they come. Closing the generator, or another battle, cancels them."""
        battle = visit.battle
        if battle is None or visit.replies:  # nothing was begun, or an event of an earlier battle came later
            return
        news: SimpleQueue[tuple[int, Delta]] = SimpleQueue()
        start, seed = time.perf_counter(), self.settings.seed + len(self.arena.votes.log.votes)
        running = visit.running = []
        replies = visit.replies = [Reply(seed=seed), Reply(seed=seed)]
        try:
            for side, name in enumerate(battle.models):
                on_delta = partial(put_news, news, side)
                running.append(self.players[name].submit(battle.question, self.settings, seed, on_delta))
            while not all(reply.finish_reason for reply in replies):
                for side, delta in next_news(news):
                    add_delta(replies[side], delta, running[side], time.perf_counter() - start)
                if visit.battle is not battle:
                    return
                yield self._show(visit, language)
        except (InputError, EndpointError, OSError) as error:
            logger.warning("%s: no answer: %s", " and ".join(battle.models), error)  # the page must not say who
            visit.failed = visit.battle is battle
        finally:
            for answer in running:
                answer.cancel()
            if visit.battle is battle and any(reply.finish_reason in (None, "cancelled") for reply in replies):
                visit.failed = True  # half an answer is not voted on

    def _vote(self, visit: Visit, language: str, verdict: Verdict, request: gr.Request) -> list[Any]:
        battle = visit.battle
        if battle is not None and visit.is_answered and visit.vote is None:
            vote = Vote(
                battle.id,
                battle.models,
                verdict,
                battle.question.category,
                battle.question.text,
                (visit.replies[0].text, visit.replies[1].text),
                battle.question.id,
                voter=request.username,
            )
            with _reported(language):
                if self.arena.vote(str(request.session_hash), vote):
                    visit.vote = verdict
        return self._show(visit, language)

    def _leave(self, request: gr.Request) -> None:
        self.arena.leave(str(request.session_hash))

    def _show_results(self, language: str, category: str) -> list[Any]:
        categories = [*self.arena.categories, *(vote.category for vote in self.arena.votes.log.votes)]
        choices = self._category_choices(language, list(dict.fromkeys(categories)))
        return [gr.update(choices=choices), results_html(self._figures(category), language)]

    def _figures(self, category: str) -> Mapping[str, Any]:
        count = len(self.arena.votes.log.votes)
        if category not in self._known or self._known[category][0] != count:
            self._known[category] = count, self._summarise(category or None)
        return self._known[category][1]

    def _translate(self, visit: Visit, language: str) -> list[Any]:
        choices = self._category_choices(language, self.arena.categories)
        return [gr.update(choices=choices), *self._show(visit, language), *self._translations(language)]


@contextlib.contextmanager
def _reported(language: str) -> Iterator[None]:
    """Tells the visitor what could not be done, and ends the event."""
    try:
        yield
    except (InputError, OSError) as error:
        name = "cannot_answer" if isinstance(error, InputError) else "arena_unsaved"
        message = translate(name, language, error=html.escape(str(error)))
        raise gr.Error(message, print_exception=False) from None


def in_step(replies: Sequence[Reply], side: int) -> str:
    """What is shown of an answer: little more than of the other one while that is written; speed would tell names."""
    own, other = replies[side], replies[1 - side]
    return own.text if other.finish_reason else own.text[: len(other.text) + AHEAD]


def _text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def describe_category(name: str, language: str) -> str:
    """The name of a category of the bank on the page."""
    return translate(f"category_{name}", language) if f"category_{name}" in TEXTS else name


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
