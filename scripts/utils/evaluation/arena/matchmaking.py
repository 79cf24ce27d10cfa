"""Matches: the questions that models are asked side by side, and who meets whom over which of them."""

from __future__ import annotations

import itertools
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...core.errors import InputError
from ...core.records import text_field
from ...text.prompts import Message
from .. import banks
from .votes import Vote, VoteFile

TYPED = "typed"  # category of questions that are not from the bank
Choice = TypeVar("Choice")


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """What both models of a battle are asked; the reference is a right answer, which only a judge sees.

    Attributes:
        before: the turns that stand before the text, where it is asked within a conversation.
    """

    text: str
    category: str = TYPED
    id: str | None = None
    reference: str | None = None
    before: tuple[Message, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """All that is asked."""
        return [*self.before, {"role": "user", "content": self.text}]


def read_bank(paths: Sequence[str], categories: Sequence[str] = ()) -> list[Question]:
    """The questions of json, jsonl and parquet files, of some categories alone where they are named.

    Fields: "id", "category", "question"; optional: "reference". Raises: InputError naming file and line.
    """
    bank = banks.read_bank(paths, _read_question)
    check_categories(categories, (question.category for question in bank))
    return [question for question in bank if not categories or question.category in categories]


def _read_question(record: Mapping[str, Any], location: str) -> Question:
    name, category, text = (text_field(record, key, location) for key in ("id", "category", "question"))
    reference = None if record.get("reference") is None else text_field(record, "reference", location)
    return Question(text, category, name, reference)


def check_categories(categories: Sequence[str], known: Iterable[str]) -> None:
    """Raises: InputError naming those that are not known."""
    names = list(dict.fromkeys(known))
    if unknown := [name for name in categories if name not in names]:
        raise InputError(f"--categories {' '.join(unknown)}: need some of {', '.join(names)}")


# ---------------------------------------------------------------- who meets whom


def new_id() -> str:
    """An id for a battle, unlike any other."""
    return uuid.uuid4().hex


@dataclass
class PendingBattle:
    """A battle that waits for its answers and its vote."""

    models: tuple[str, str]  # left, right
    question: Question
    id: str = field(default_factory=new_id)


class Arena:
    """Who meets whom over which question, so that pairs and questions get equally many battles. For any thread."""

    def __init__(
        self,
        names: Sequence[str],
        votes: VoteFile,
        bank: Sequence[Question],
        can_answer: Callable[[str, Question], bool] = lambda name, question: True,
        rng: random.Random | None = None,
    ) -> None:
        """
        Args:
            can_answer: whether a model, by its name, has an answer to a question.
            rng: what decides where counts do not; default: a generator that nobody can foresee.
        Raises: InputError if there are fewer than two models, or two that no question of the bank can bring together.
        """
        self.names, self.votes, self.bank = list(names), votes, list(bank)
        self._can_answer, self._rng, self._mutex = can_answer, rng or random.SystemRandom(), threading.Lock()
        self._open: dict[str, PendingBattle] = {}  # by visitor
        if len(self.names) < 2:
            raise InputError(f"a battle takes two models; got {len(self.names)}: {', '.join(self.names) or 'none'}")
        for pair in itertools.combinations(self.names, 2):
            if not self._questions(pair, None):
                raise InputError(f"{pair[0]} and {pair[1]} have no question of the bank that both can answer")

    @property
    def categories(self) -> list[str]:
        """Those of the bank, in its order."""
        return list(dict.fromkeys(question.category for question in self.bank))

    def begin(self, visitor: str, category: str | None = None, text: str | None = None) -> PendingBattle:
        """A new battle for a visitor, who leaves an earlier one without a vote.

        Args:
            category: of the question, from the bank; None: any.
            text: what the visitor asks; None: a question of the bank.
        Raises: InputError if no two models can answer.
        """
        with self._mutex:
            self._open.pop(visitor, None)
            pairs = self._pair_counts()
            typed = None if text is None else Question(text)
            choices = [
                pair
                for pair in itertools.combinations(self.names, 2)
                if (self._questions(pair, category) if typed is None else self._both_can(pair, typed))
            ]
            if not choices:
                raise InputError("no two of the models can answer this: answers files have answers to the bank alone")
            pair = self._rarest(choices, lambda pair: pairs[frozenset(pair)])
            question = typed or self._draw_question(pair, category)
            models = pair if self._rng.random() < 0.5 else (pair[1], pair[0])
            battle = self._open[visitor] = PendingBattle(models, question)
            return battle

    def leave(self, visitor: str) -> None:
        """The visitor's battle gets no vote."""
        with self._mutex:
            self._open.pop(visitor, None)

    def vote(self, visitor: str, vote: Vote) -> bool:
        """Record a vote on the visitor's battle; False: it has one already. Raises: OSError, nothing written."""
        recorded = self.votes.append(vote)
        self.leave(visitor)
        return recorded

    def _pair_counts(self) -> Counter[frozenset[str]]:
        waiting = [battle.models for battle in self._open.values()]
        return Counter(frozenset(models) for models in [*(vote.models for vote in self.votes.log.votes), *waiting])

    def _questions(self, pair: tuple[str, str], category: str | None) -> list[Question]:
        """Those of the bank that both can answer."""
        return [q for q in self.bank if category in (None, q.category) and self._both_can(pair, q)]

    def _both_can(self, pair: tuple[str, str], question: Question) -> bool:
        return all(self._can_answer(name, question) for name in pair)

    def _draw_question(self, pair: tuple[str, str], category: str | None) -> Question:
        """One of those that this pair, and then all models, had least often."""
        asked, together = Counter[str | None](), Counter[str | None]()
        for vote in self.votes.log.votes:
            asked[vote.question_id] += 1
            together[vote.question_id] += set(vote.models) == set(pair)
        asked.update(battle.question.id for battle in self._open.values())
        choices = self._questions(pair, category)
        return self._rarest(choices, lambda question: (together[question.id], asked[question.id]))

    def _rarest(self, choices: Sequence[Choice], count: Callable[[Choice], Any]) -> Choice:
        counts = [count(choice) for choice in choices]
        fewest = min(counts)
        return self._rng.choice([choice for choice, n in zip(choices, counts, strict=True) if n == fewest])
