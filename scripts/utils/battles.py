"""Battles: the questions that models are asked side by side, who meets whom, and the votes, which no crash loses."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

from .alignment import text_field
from .files import RECORD_SUFFIXES, InputError, fsync_path, iter_records, list_data_files
from .ratings import Battle, Verdict

logger = logging.getLogger(__name__)

HUMAN = "human"  # judged a battle that no model judged
TYPED = "typed"  # category of questions that are not from the bank
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Choice = TypeVar("Choice")


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """What both models of a battle are asked; the reference is a right answer, which only a judge sees."""

    text: str
    category: str = TYPED
    id: str | None = None
    reference: str | None = None


def read_bank(paths: Sequence[str], categories: Sequence[str] = ()) -> list[Question]:
    """The questions of json, jsonl and parquet files, of some categories alone where they are named.

    Fields: "id", "category", "question"; optional: "reference". Raises: InputError naming file and line.
    """
    places: dict[str, str] = {}
    bank: list[Question] = []
    for path in paths:
        for file in list_data_files(path, RECORD_SUFFIXES):
            for location, record in iter_records(file):
                name, category, text = (text_field(record, key, location) for key in ("id", "category", "question"))
                if name in places:
                    raise InputError(f"{location}: the id '{name}' is that of {places[name]} too; ids must differ")
                places[name] = location
                reference = None if record.get("reference") is None else text_field(record, "reference", location)
                bank.append(Question(text, category, name, reference))
    if not bank:
        raise InputError(f"--questions {' '.join(paths)}: no question in it")
    check_categories(categories, (question.category for question in bank))
    return [question for question in bank if not categories or question.category in categories]


def check_categories(categories: Sequence[str], known: Iterable[str]) -> None:
    """Raises: InputError naming those that are not known."""
    names = list(dict.fromkeys(known))
    if unknown := [name for name in categories if name not in names]:
        raise InputError(f"--categories {' '.join(unknown)}: need some of {', '.join(names)}")


# ---------------------------------------------------------------- votes


@dataclass(frozen=True)
class Vote:
    """A line of a file of votes: a battle, and what was said of it. Pairs are of the left and the right model.

    Attributes:
        id: of the battle, which counts once however often it is voted on.
        vote: None: a judge said something that is no verdict.
        judge: "human", or the model that judged.
        voter: who was logged in.
        verdicts: what a judge said, "A", "B" or "tie": with the left answer first, and with the right one first.
    """

    id: str
    models: tuple[str, str]
    vote: Verdict | None
    category: str
    question: str
    answers: tuple[str, str]
    question_id: str | None = None
    judge: str = HUMAN
    voter: str | None = None
    verdicts: tuple[str | None, str | None] | None = None
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def battle(self) -> Battle:
        """What ratings are made of."""
        assert self.vote is not None
        return Battle(*self.models, self.vote)


def new_id() -> str:
    """An id for a battle between a person's votes."""
    return uuid.uuid4().hex


@dataclass
class VoteLog:
    """What files of votes hold: each id once, in the files' order."""

    votes: list[Vote] = field(default_factory=list)
    duplicates: int = 0  # further lines with an id that was there before
    torn: int = 0  # last lines that were being written when their program or the machine died

    @property
    def counted(self) -> list[Vote]:
        """Those that say something."""
        return [vote for vote in self.votes if vote.vote is not None]


def read_votes(paths: Iterable[str | Path]) -> VoteLog:
    """Read files of votes, also while others write them. Raises: InputError naming the line of what is no vote."""
    log, ids = VoteLog(), set[str]()
    for path in map(Path, paths):
        if not path.is_file():
            raise InputError(f"--votes {path}: no such file; arena.py writes it as people vote")
        whole, torn = _split(path.read_bytes())
        log.torn += bool(torn)
        for number, line in enumerate(whole.split(b"\n"), 1):
            if line.strip():
                vote = _read_vote(line, f"{path}:{number}")
                log.duplicates += vote.id in ids
                if vote.id not in ids:
                    log.votes.append(vote)
                ids.add(vote.id)
    return log


def _split(content: bytes) -> tuple[bytes, bytes]:
    """A file's whole lines, and what is left of a torn last one; one that lacks nothing but its end is whole."""
    end = content.rfind(b"\n") + 1
    last = content[end:]
    if last:
        with contextlib.suppress(InputError):
            _read_vote(last, "")
            return content, b""
    return content[:end], last


def _read_vote(line: bytes, location: str) -> Vote:
    remedy = "mend or delete the line"
    try:
        record: Any = json.loads(line)
    except ValueError as error:  # broken JSON or UTF-8
        raise InputError(f"{location}: no vote: {error}; {remedy}") from None
    if not isinstance(record, dict):
        raise InputError(f"{location}: need an object with named fields, got {type(record).__name__}; {remedy}")
    models: Any
    answers: Any
    models, answers, vote, verdicts = (record.get(name) for name in ("models", "answers", "vote", "verdicts"))
    texts = {name: record.get(name) for name in ("id", "category", "question")}
    problems = [f"'{name}' is {value!r:.40}, need text" for name, value in texts.items() if not isinstance(value, str)]
    for name, pair in {"models": models, "answers": answers}.items():
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            problems.append(f"'{name}' is {pair!r:.40}, need two texts")
    if isinstance(models, list) and len(models) == 2 and models[0] == models[1]:
        problems.append(f"'models' has '{models[0]}' twice")
    if vote is not None and vote not in VERDICTS:
        problems.append(f"'vote' is {vote!r:.40}, need one of {', '.join(VERDICTS)}")
    if problems:
        raise InputError(f"{location}: {'; '.join(problems)}; {remedy}")
    return Vote(
        models=tuple(models),
        vote=vote,
        answers=tuple(answers),
        **{name: str(text) for name, text in texts.items()},
        question_id=record.get("question_id"),
        judge=str(record.get("judge") or HUMAN),
        voter=record.get("voter"),
        verdicts=tuple(verdicts) if isinstance(verdicts, list) and len(verdicts) == 2 else None,
        time=str(record.get("time") or ""),
    )


class VoteFile:
    """A file of votes that is added to: a line a vote, on the disk before `append` returns. For one process at a time.

    A torn last line, of a crash, moves into <name>.torn when the file is opened, so that lines stay lines.

    Attributes:
        log: what it holds.
    """

    def __init__(self, path: str | Path) -> None:
        """Open it; it is made if it is absent. Raises: InputError if another process has it, or a line is no vote."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mutex = threading.Lock()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._take()
            torn = self._set_torn_line_aside()
            self.log = read_votes([self.path])
        except BaseException:
            self.close()
            raise
        self.log.torn += torn
        self._ids = {vote.id for vote in self.log.votes}

    def _take(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however
        except BlockingIOError:
            raise InputError(f"{self.path}: another arena is writing it; pass another --output_dir") from None
        except OSError:
            pass  # this file system has no locks

    def _set_torn_line_aside(self) -> int:
        content = self.path.read_bytes()
        whole, torn = _split(content)
        if torn:
            aside = self.path.with_name(f"{self.path.name}.torn")
            with open(aside, "ab") as file:
                file.write(torn + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.ftruncate(self._descriptor, len(whole))
            logger.warning("%s: its last line was torn by a crash; moved to %s", self.path, aside)
        elif whole and not whole.endswith(b"\n"):
            os.write(self._descriptor, b"\n")
        os.fsync(self._descriptor)
        fsync_path(self.path.parent)
        return bool(torn)

    def append(self, vote: Vote) -> bool:
        """Add a vote; False: nothing was done, its battle has been voted on. Raises: OSError, the file as it was."""
        record = {name: value for name, value in asdict(vote).items() if value is not None or name == "vote"}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        with self._mutex:
            if vote.id in self._ids:
                return False
            size = os.fstat(self._descriptor).st_size
            try:
                rest = line
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                os.fsync(self._descriptor)
            except OSError as error:  # a failed write does not say which file it was
                os.ftruncate(self._descriptor, size)
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            self._ids.add(vote.id)
            self.log.votes.append(vote)
            return True

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._descriptor)


# ---------------------------------------------------------------- who meets whom


@dataclass
class OpenBattle:
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
        self._open: dict[str, OpenBattle] = {}  # by visitor
        if len(self.names) < 2:
            raise InputError(f"a battle takes two models; got {len(self.names)}: {', '.join(self.names) or 'none'}")
        for pair in itertools.combinations(self.names, 2):
            if not self._questions(pair, None):
                raise InputError(f"{pair[0]} and {pair[1]} have no question of the bank that both can answer")

    @property
    def categories(self) -> list[str]:
        """Those of the bank, in its order."""
        return list(dict.fromkeys(question.category for question in self.bank))

    def begin(self, visitor: str, category: str | None = None, text: str | None = None) -> OpenBattle:
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
            battle = self._open[visitor] = OpenBattle(models, question)
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
