"""Predictions: a file of questions and answers that is written as answers come, and goes on where a run was killed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.files import read_json, remove, write_json

logger = logging.getLogger(__name__)

Question = str | list[dict[str, str]]  # one text, or messages of role and content


class Predictions:
    """The answers to a list of questions: rows of a .jsonl file as they come, or a .json list once all are there.

    Until then a .json list is a .partial.jsonl. Beside it stands <name>.settings.json, all that decided the answers.
    A subclass may write rows of another form.
    """

    flag = "--predictions_file"  # that the path comes from, for errors

    def __init__(self, path: Path, questions: Sequence[Any], settings: dict[str, Any], overwrite: bool) -> None:
        """Open it; `overwrite` lets a finished file go, or one with other answers, while an unfinished one goes on.

        Raises: InputError if the file holds answers to other questions, or of another model or settings.
        """
        self.path, self.questions = path, list(questions)
        self.rows_path = path if path.suffix == ".jsonl" else path.with_name(f"{path.name}.partial.jsonl")
        self.settings_path = path.with_name(f"{path.name}.settings.json")
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        if path.is_dir():
            raise InputError(f"{self.flag} {path} is a folder; pass the name of a file")
        if existing := next((file for file in (self.rows_path, path) if file.exists()), None):
            try:
                self._resume(existing)
            except InputError:
                if not overwrite:
                    raise
            if overwrite and self.is_complete:
                self.rows = []
        if self.is_complete:
            return
        try:
            if not self.rows:
                remove(self.rows_path)
            write_json(self.settings_path, {"settings": self.settings})
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise InputError(f"{self.flag} {path}: cannot write there: {error.strerror}") from None

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
        content = existing.read_bytes()
        whole = len(content) if existing.suffix == ".json" else content.rfind(b"\n") + 1
        try:
            text = content[:whole].decode()
            rows = (
                json.loads(text)
                if existing.suffix == ".json"
                else [json.loads(line) for line in text.split("\n") if line]
            )
            inputs = [self.question_of(row) for row in rows]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{existing} holds no predictions; {remedy}") from None
        for number, (old, new) in enumerate(zip(inputs, self.questions, strict=False), 1):
            if old != new:
                raise InputError(f"{existing}: answer {number} is to {old!r:.60}, this run asks {new!r:.60}; {remedy}")
        if len(inputs) > len(self.questions):
            raise InputError(f"{existing} has {len(inputs)} answers, this run asks {len(self.questions)}; {remedy}")
        recorded = read_json(self.settings_path)["settings"] if self.settings_path.is_file() else {}
        changed = [name for name in {**recorded, **self.settings} if recorded.get(name) != self.settings.get(name)]
        if changed:
            changes = "; ".join(f"{name} {recorded.get(name)} -> {self.settings.get(name)}" for name in changed)
            raise InputError(f"{existing} was written with other settings ({changes:.400}); {remedy}")
        if whole < len(content):
            with open(existing, "r+b") as file:
                file.truncate(whole)  # the row that was being written when the run was killed
        self.rows = rows
        if rows and not self.is_complete:
            logger.info("going on after %d of %d answers in %s", len(rows), len(self.questions), existing)

    def append(self, outputs: list[str]) -> None:
        """Write the next answers through to the file."""
        questions = self.questions[len(self.rows) :]
        new = [self.make_row(question, output) for question, output in zip(questions, outputs, strict=False)]
        try:
            with open(self.rows_path, "ab") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new).encode())
        except OSError as error:  # a failed write does not say which file it was
            raise OSError(error.errno, error.strerror, str(self.rows_path)) from None
        self.rows += new

    def finish(self, metrics: dict[str, Any]) -> None:
        """Make the .json list, if that was asked for, and record the figures."""
        if self.path != self.rows_path:
            write_json(self.path, self.rows)
            remove(self.rows_path)
        write_json(self.settings_path, {"settings": self.settings, "metrics": metrics})

    def report_complete(self) -> dict[str, Any]:
        """All answers were there before."""
        metrics = {"answers": len(self.rows), "resumed": len(self.rows), "predictions_file": str(self.path)}
        if not self.path.exists():  # the run was killed when all that was missing was the list
            self.finish(metrics)
        logger.info("all %d answers are in %s already; pass --overwrite to make them anew", len(self.rows), self.path)
        return metrics


class Parts:
    """A jsonl file: all that decides the result, then the name and the value of each part, as soon as it is there."""

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        """Open it; `overwrite` lets go the parts of a run with other settings.

        Raises: InputError if there are such without it.
        """
        self._path = path
        self._values: dict[str, Any] = {}
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1  # a line behind it was being written when the run was killed
            recorded, rows = self._read(content[:whole].decode("utf-8", "replace"))
            if recorded == settings:
                with open(path, "r+b") as file:
                    file.truncate(whole)
                self._values = rows
                logger.info("going on after %d parts in %s", len(rows), path)
                return
            if not overwrite:
                changed = sorted(name for name in {**recorded, **settings} if recorded.get(name) != settings.get(name))
                raise InputError(
                    f"{path} is of an unfinished run with other {', '.join(changed)}; run that again to go on, pass "
                    "another --output_dir, or --overwrite to replace it"
                )
            remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(settings)

    @staticmethod
    def _read(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings and {name: value}; a file of something else has no settings that agree with any."""
        try:
            first, *rows = [json.loads(line) for line in text.splitlines()]
            return first, {json.dumps(name): value for name, value in rows}
        except (ValueError, TypeError):
            return {"file": "is none of these"}, {}

    def _write(self, row: Any) -> None:
        try:
            with open(self._path, "ab") as file:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        except OSError as error:  # a failed write does not say which file it was
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def get(self, *name: str | int) -> Any:
        """The value of a part, None if it is not there."""
        return self._values.get(json.dumps(name))

    def add(self, value: Any, *name: str | int) -> None:
        """Write a part."""
        self._write([name, value])
        self._values[json.dumps(name)] = value

    def finish(self) -> None:
        """The result stands elsewhere: remove the file."""
        remove(self._path)
