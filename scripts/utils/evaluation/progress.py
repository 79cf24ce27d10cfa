"""Progress: files that are written as answers or parts of a result come, and go on where a run was killed."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.errors import InputError
from ..core.files import named_write_errors, read_json, remove, write_json

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..generation.engine import Completion

logger = logging.getLogger(__name__)

# One text, messages, or {"messages", "tools"}, with the functions that may be called.
Question = str | list[dict[str, Any]] | dict[str, Any]


def refuse_finished(path: Path, overwrite: bool) -> None:
    """Raises: InputError if there is a result already."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} is finished; pass another --output_dir, or --overwrite to replace it")


def settings_beside(path: Path) -> Path:
    """The file that says what decided the rows of another one: models, settings, and figures at last."""
    return path.with_name(f"{path.name}.settings.json")


# ---------------------------------------------------------------- lines of JSON


def _append_rows(path: Path, rows: Sequence[Any]) -> None:
    with named_write_errors(path), open(path, "ab") as file:
        # One write for all: a kill tears the last line at most, which _read_rows leaves out.
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _read_rows(path: Path) -> tuple[list[Any], int]:
    """The rows of a jsonl file, and its bytes without a last line that was being written when the run was killed.

    Raises: ValueError for what is none.
    """
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    # Not splitlines: texts may hold U+2028 and the like, which end no line of a file.
    return [json.loads(line) for line in content[:whole].split(b"\n") if line], whole


def _is_start_of(path: Path, row: Any) -> bool:
    """Whether the file is all that a kill left of its first row."""
    line = json.dumps(row, ensure_ascii=False).encode()
    with open(path, "rb") as file:
        return line.startswith(file.read(len(line) + 1))


def _cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def _as_read_back(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a file gives them back, tuples as lists and keys as text: only so they can be compared."""
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def _changed(recorded: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    return [name for name in {**recorded, **settings} if recorded.get(name) != settings.get(name)]


# ---------------------------------------------------------------- questions and answers


class Predictions:
    """The answers to a list of questions: rows of a .jsonl file as they come, or a .json list once all are there.

    Until then a .json list is a .partial.jsonl. Beside it stands <name>.settings.json, all that decided the answers.
    A subclass may write rows of another form.

    Attributes:
        rows: as far as they are there, in the questions' order.
        metrics: what `finish` recorded; None before.
    """

    def __init__(
        self,
        path: Path,
        questions: Sequence[Any],
        settings: dict[str, Any],
        overwrite: bool,
        flag: str = "--predictions_file",
    ) -> None:
        """Open it; `overwrite` lets a finished file go, or one with other answers, while an unfinished one goes on.

        Args: flag: that the path comes from, for errors.
        Raises: InputError if the file holds answers to other questions, or of another model or settings.
        """
        self.path, self.questions, self.flag = path, list(questions), flag
        self.rows_path = path if path.suffix == ".jsonl" else path.with_name(f"{path.name}.partial.jsonl")
        self.settings_path = settings_beside(path)
        self.settings = _as_read_back(settings)
        self.rows: list[dict[str, Any]] = []
        self.metrics: dict[str, Any] | None = None
        if path.is_dir():
            raise InputError(f"{flag} {path} is a folder; pass the name of a file")
        # Rows first: beside a .json list there are some only where an --overwrite was killed, and they are newer.
        if existing := next((file for file in (self.rows_path, path) if file.exists()), None):
            try:
                self._resume(existing)
            except InputError:
                if not overwrite:
                    raise
            if overwrite and self.is_complete:
                self.rows = []  # a .json list stays until the new one is whole
        if self.is_complete:
            if self.settings_path.is_file():
                self.metrics = read_json(self.settings_path).get("metrics")
            return
        try:
            # Settings last: rows of another run must be gone before these settings claim what stands there.
            if not self.rows:
                remove(self.rows_path)
            write_json(self.settings_path, {"settings": self.settings})
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise InputError(f"{flag} {path}: cannot write there: {error.strerror}") from None

    def make_row(self, question: Any, output: str) -> dict[str, Any]:
        """What the file has of an answer."""
        return {"Input": question, "Output": output}

    def question_of(self, row: dict[str, Any]) -> Any:
        """The question of such a row. Raises: KeyError or TypeError for another one."""
        return row["Input"]

    @property
    def is_complete(self) -> bool:
        return len(self.rows) == len(self.questions)

    def _resume(self, existing: Path) -> None:
        remedy = f"pass another {self.flag}, or --overwrite to replace it"
        whole = None
        try:
            if existing.suffix == ".json":
                rows = json.loads(existing.read_bytes().decode())
            else:
                rows, whole = _read_rows(existing)
            inputs = [self.question_of(row) for row in rows]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{existing} holds no predictions; {remedy}") from None
        for number, (old, new) in enumerate(zip(inputs, self.questions, strict=False), 1):
            if old != new:
                raise InputError(f"{existing}: answer {number} is to {old!r:.60}, this run asks {new!r:.60}; {remedy}")
        if len(inputs) > len(self.questions):
            raise InputError(f"{existing} has {len(inputs)} answers, this run asks {len(self.questions)}; {remedy}")
        # Without settings it is another program's file, which some setting differs from, unless there are none.
        recorded = read_json(self.settings_path)["settings"] if self.settings_path.is_file() else {}
        if changed := _changed(recorded, self.settings):
            changes = "; ".join(f"{name} {recorded.get(name)} -> {self.settings.get(name)}" for name in changed)
            raise InputError(f"{existing} was written with other settings ({changes:.400}); {remedy}")
        if whole is not None:
            _cut(existing, whole)  # only now: a file that is not this run's stays as it is
        self.rows = rows
        if rows and not self.is_complete:
            logger.info("going on after %d of %d answers in %s", len(rows), len(self.questions), existing)

    def append(self, output: str) -> None:
        """Write the next answer through to the file."""
        row = self.make_row(self.questions[len(self.rows)], output)
        _append_rows(self.rows_path, [row])
        self.rows.append(row)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Make the .json list, if that was asked for, and record the figures."""
        if self.path != self.rows_path:
            write_json(self.path, self.rows)  # whole before its rows go, so that a kill between loses nothing
            remove(self.rows_path)
        write_json(self.settings_path, {"settings": self.settings, "metrics": metrics})
        self.metrics = metrics

    def report_complete(self) -> dict[str, Any]:
        """All answers were there before."""
        metrics = {"answers": len(self.rows), "resumed": len(self.rows), "predictions_file": str(self.path)}
        if not self.path.exists():  # the run was killed when all that was missing was the list
            self.finish(metrics)
        logger.info("all %d answers are in %s already; pass --overwrite to make them anew", len(self.rows), self.path)
        return metrics


Answering = TypeVar("Answering")  # an engine, a player of the arena


def answer_all(
    load: Callable[[], contextlib.AbstractContextManager[Answering]],
    submit: Callable[[Answering, Predictions, int], Callable[[], Completion]],
    *files: Predictions,
    ahead: int | None = None,
    desc: str = "answering",
    write: Callable[[tqdm[Any], Completion], str] | None = None,
    measure: Callable[[Predictions], dict[str, Any]] | None = None,
) -> None:
    """Complete files of predictions: each answer is written as soon as those before it are.

    Args:
        load: reads the weights, which are there within its block; not called where no answer is missing.
        submit: begins to answer question `number` of a file, in order, and returns what waits for the answer.
        ahead: so many answers are under way at once; None: all.
        desc: of the progress bar.
        write: what is written of an answer, told the bar and the answer; default: its text.
        measure: what is recorded of a file that is complete; default: how many answers, and how many came before.
    """
    from tqdm import tqdm

    resumed = {id(file): len(file.rows) for file in files}  # rows grow, so this is kept

    def finish(file: Predictions) -> None:
        counts = {"answers": len(file.rows), "resumed": resumed[id(file)]}
        file.finish(measure(file) if measure else counts)

    for file in files:
        if file.is_complete and file.metrics is None:  # killed when only the record was missing
            finish(file)
    if all(file.is_complete for file in files):
        return
    waiting: deque[tuple[Predictions, Callable[[], Completion]]] = deque()
    total = sum(len(file.questions) for file in files)
    with (
        load() as answering,
        tqdm(total=total, initial=sum(resumed.values()), unit="answer", desc=desc) as bar,
    ):

        def take(most: int) -> None:
            """Write the oldest answers, waiting for them, until at most so many are under way."""
            # In order, though a later answer may be there before: a file without gaps is what a run can go on from.
            while len(waiting) > most:
                file, wait = waiting.popleft()
                completion = wait()
                file.append(write(bar, completion) if write else completion.text)
                bar.update()
                if file.is_complete:
                    finish(file)

        # The end of one file and the beginning of the next are under way together: the engine never runs empty.
        for file in files:
            for number in range(len(file.rows), len(file.questions)):
                waiting.append((file, submit(answering, file, number)))
                if ahead is not None:
                    take(ahead)
        take(0)


# ---------------------------------------------------------------- parts of a result


class Parts:
    """A jsonl file: all that decides the result, then the name and the value of each part, as soon as it is there."""

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        """Open it; `overwrite` lets go the parts of a run with other settings.

        Raises: InputError if there are such without it.
        """
        self._path = path
        self._values: dict[str, Any] = {}
        settings = _as_read_back(settings)
        if path.is_file() and not _is_start_of(path, settings):
            # The first line is read before anything is cut off: the file may be another run's, which goes on some day.
            recorded, values, whole = self._read()
            if recorded == settings:
                _cut(path, whole)
                self._values = values
                logger.info("going on after %d parts in %s", len(values), path)
                return
            if not overwrite:
                raise InputError(
                    f"{path} is of an unfinished run with other {', '.join(sorted(_changed(recorded, settings)))}; "
                    "run that again to go on, pass another --output_dir, or --overwrite to replace it"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(path)
        _append_rows(path, [settings])

    def _read(self) -> tuple[dict[str, Any], dict[str, Any], int]:
        """Settings, {name: value}, whole bytes; a file of something else has no settings that agree with any."""
        try:
            (first, *rows), whole = _read_rows(self._path)
            return {**first}, {json.dumps(name): value for name, value in rows}, whole
        except (ValueError, TypeError):
            return {"file": "is none of these"}, {}, 0

    def get(self, *name: str | int) -> Any:
        """The value of a part, None if it is not there."""
        return self._values.get(json.dumps(name))  # as the file has it: a list of texts and numbers

    def add(self, value: Any, *name: str | int) -> None:
        """Write a part."""
        _append_rows(self._path, [[name, value]])
        self._values[json.dumps(name)] = value

    def finish(self) -> None:
        """The result stands elsewhere: remove the file."""
        remove(self._path)
