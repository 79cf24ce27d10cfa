"""Battles: what was said of two models' answers, in a file of votes that no crash loses, and that counts each once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from ...core.errors import InputError
from ...core.files import fsync_path, named_write_errors
from .ratings import Outcome, Verdict

logger = logging.getLogger(__name__)

HUMAN = "human"  # judged a battle that no model judged
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


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
    def outcome(self) -> Outcome:
        """What ratings are made of."""
        assert self.vote is not None
        return Outcome(*self.models, self.vote)


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
                with named_write_errors(self.path):
                    rest = line
                    while rest:
                        rest = rest[os.write(self._descriptor, rest) :]
                    os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise
            self._ids.add(vote.id)
            self.log.votes.append(vote)
            return True

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._descriptor)
