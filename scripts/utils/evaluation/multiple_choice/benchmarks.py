"""Benchmarks of questions with choices: C-Eval, CMMLU, MMLU and one's own, from files as published or from a hub.

A split is a folder of files, one a subject, `<split>/<subject>_<split>.csv` or `<split>/<subject>.csv`; in a folder of
one's own jsonl too, and files beside each other, `<subject>_<split>` or, for what is evaluated, `<subject>` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...core.errors import InputError
from ...core.files import hash_file, hash_json, read_json
from ...core.hub import find_folder, is_hub_id
from ...core.records import iter_records
from .questions import ChoiceQuestion, iter_csv, read_questions
from .subjects import SUBJECTS, Subject

logger = logging.getLogger(__name__)

PUBLISHED = tuple(SUBJECTS)
DEV = "dev"  # the split that examples are taken from
SPLITS = {"ceval": ("val", "test"), "cmmlu": ("test",), "mmlu": ("test", "val")}  # the first is the default
_SPLIT_FOLDERS = ("test", "val", DEV)
HUB_IDS = {"ceval": "ceval/ceval-exam", "cmmlu": "haonan-li/cmmlu", "mmlu": "cais/mmlu"}
HUB_SPLITS = {"mmlu": {"val": "validation"}}
MAPPING = "subject_mapping.json"  # of C-Eval: {subject: [English name, Chinese name, category]}
SUFFIXES = (".csv", ".jsonl")
OTHER = "Other"  # the category of a subject that has none
MAX_NAMED = 5  # of many alike, named in messages


@dataclass
class Benchmark:
    """What is asked.

    Attributes:
        name: of a folder of one's own, that of the folder.
        kind: ceval, cmmlu, mmlu, or own.
        questions: in the order of subjects and rows.
        examples: solved questions of each subject, for prompts.
        files: {file, or name on a hub: SHA-256}.
        ignored: files that belong to no subject.
        missing: subjects of the benchmark without a file.
    """

    name: str
    kind: str
    split: str
    subjects: dict[str, Subject]
    questions: list[ChoiceQuestion]
    examples: dict[str, list[ChoiceQuestion]]
    files: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_benchmark(
    name: str,
    data_dir: str | None = None,
    split: str | None = None,
    subjects: Sequence[str] = (),
    num_examples: int = 0,
    skip_missing: bool = False,
    max_questions: int | None = None,
) -> Benchmark:
    """Read a benchmark.

    Args:
        name: ceval, cmmlu, mmlu, or a folder of one's own.
        data_dir: of a published one: the folder that holds its splits (or `data`, which does), or a hub id.
        subjects: only these.
        num_examples: of each subject, those that `dev` has first; -1: all.
        skip_missing: go on where subjects have no file.
        max_questions: of each subject, the first ones.
    Raises: InputError naming the file, line or subject that is not as it should be.
    """
    own = name not in PUBLISHED
    source = _open_source(name, data_dir)
    known = source.subjects()
    split = split or (SPLITS[name][0] if not own else source.default_split())
    if not own and split not in SPLITS[name]:
        raise InputError(f"--split {split}: {name} has {', '.join(SPLITS[name])}")
    wanted, missing = _choose_subjects(source, known, split, subjects, skip_missing)
    found = {key: known.get(key) or Subject(key, key.replace("_", " "), OTHER) for key in wanted}
    benchmark = Benchmark(source.name, "own" if own else name, split, found, [], {}, missing=missing)
    for key in wanted:
        questions = source.read(key, split, secret=name == "ceval" and split == "test")
        benchmark.questions += questions[:max_questions]
        examples = source.read(key, DEV) if num_examples else []
        benchmark.examples[key] = examples if num_examples < 0 else examples[:num_examples]
    _check_examples(benchmark, num_examples)
    benchmark.files, benchmark.ignored = source.files, source.ignored
    if benchmark.ignored:
        names = ", ".join(benchmark.ignored[:MAX_NAMED])
        logger.warning("%d files belong to no subject and were ignored, such as %s", len(benchmark.ignored), names)
    return benchmark


def _choose_subjects(
    source: Source, known: Mapping[str, Subject], split: str, subjects: Sequence[str], skip_missing: bool
) -> tuple[list[str], list[str]]:
    """The subjects to read, and those without a file. Raises: InputError."""
    present = source.list_subjects(split)
    expected = list(known) if source.complete else present
    if unknown := [key for key in subjects if key not in {*expected, *present}]:
        raise InputError(
            f"--subjects {' '.join(unknown)}: no such subject; there are {', '.join(expected or present)}"
        )
    wanted = [key for key in expected if not subjects or key in subjects]
    missing = [key for key in wanted if key not in present]
    if missing and not skip_missing:
        raise InputError(
            f"{source.name}, {split}: no file of {len(missing)} of {len(wanted)} subjects: {', '.join(missing)}; "
            "complete the folder, name those you want in --subjects, or pass --skip_missing (the average is then one "
            "over fewer subjects)"
        )
    if missing:
        logger.warning("%d subjects have no file and are left out: %s", len(missing), ", ".join(missing))
    wanted = [key for key in wanted if key in present]
    if not wanted:
        raise InputError(f"{source.name}, {split}: no questions in {source.place}; {LAYOUT}")
    return wanted, missing


def _check_examples(benchmark: Benchmark, num_examples: int) -> None:
    """Raises: InputError if a subject has fewer examples than asked for."""
    short = {key: len(rows) for key, rows in benchmark.examples.items() if len(rows) < num_examples}
    if short:
        names = ", ".join(f"{key} ({count})" for key, count in list(short.items())[:MAX_NAMED])
        raise InputError(
            f"--num_fewshot {num_examples}: {len(short)} subjects have fewer examples in {DEV}: {names}; pass at most "
            f"{min(short.values())}, or -1 for all that each has"
        )


# ---------------------------------------------------------------- where questions come from

LAYOUT = "need <split>/<subject>_<split>.csv or <split>/<subject>.csv, as in docs/evaluation.md"


class Source:
    """A folder in one of the layouts.

    Attributes:
        name: of the benchmark; of a folder, its own.
        place: where it is.
        complete: whether all subjects have to be there.
        files: those read, with their hashes; ignored: those that belong to no subject.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.complete = name in PUBLISHED
        self.name, self.place = name if self.complete else folder.resolve().name, str(folder)
        self.files: dict[str, str] = {}
        self.ignored: list[str] = []
        self._table = SUBJECTS.get(name, {})
        inner = folder / "data"
        self._folder = inner if inner.is_dir() and not any((folder / s).is_dir() for s in _SPLIT_FOLDERS) else folder
        self._suffixes = SUFFIXES[:1] if self.complete else SUFFIXES

    def subjects(self) -> dict[str, Subject]:
        """All subjects by key, as far as the benchmark or its subject_mapping.json names them."""
        path = next((p for p in (self._folder / MAPPING, self._folder.parent / MAPPING) if p.is_file()), None)
        if path is None or (self.complete and self.name != "ceval"):
            return dict(self._table)
        mapping = read_json(path)
        rows = list(mapping.values()) if isinstance(mapping, dict) else [None]
        if not all(isinstance(names, list) and len(names) == 3 for names in rows):
            raise InputError(f"{path}: need {{subject: [English name, Chinese name, category]}}")
        return {key: Subject(key, str(names[1]), str(names[2])) for key, names in mapping.items()}

    def default_split(self) -> str:
        """What a folder of one's own evaluates."""
        there = [name for name in ("test", "val") if (self._folder / name).is_dir() or self._has_files_of(name)]
        return next(iter(there), "test")

    def _has_files_of(self, split: str) -> bool:
        return any(self._folder.glob(f"*_{split}.*"))

    def list_subjects(self, split: str) -> list[str]:
        """Those that have a file, sorted; other files are noted as ignored."""
        found = []
        known = self.subjects()
        for path in sorted(self._split_folder(split).iterdir()):
            key = self._subject_of(path, split)
            if key is None or (self.complete and key not in known):
                if not path.is_dir() and path.name != MAPPING and not self._is_other_split(path, split):
                    self.ignored.append(str(path))
            else:
                found.append(key)
        twice = sorted({key for key in found if found.count(key) > 1})
        if twice:
            raise InputError(f"{self._split_folder(split)}: several files of {', '.join(twice)}; keep one of each")
        return found

    def _split_folder(self, split: str) -> Path:
        folder = self._folder / split
        if folder.is_dir():
            return folder
        if self.complete or not self._folder.is_dir():
            raise InputError(f"no folder {folder}; {LAYOUT}")
        return self._folder

    def _subject_of(self, path: Path, split: str) -> str | None:
        """The subject whose file it is, if it is one's."""
        if path.name.startswith(".") or path.suffix.lower() not in self._suffixes or not path.is_file():
            return None
        stem = path.stem
        if stem.endswith(f"_{split}"):
            return stem.removesuffix(f"_{split}")
        flat = path.parent == self._folder
        if flat and (split == DEV or self._is_other_split(path, split)):
            return None
        return stem

    def _is_other_split(self, path: Path, split: str) -> bool:
        """Whether a file beside those of a split, in one folder, is of another split."""
        others = [name for name in _SPLIT_FOLDERS if name != split]
        return path.parent == self._folder and any(path.stem.endswith(f"_{name}") for name in others)

    def read(self, key: str, split: str, secret: bool = False) -> list[ChoiceQuestion]:
        """The questions of a subject; `secret`: it may be that none has an answer. Raises: InputError."""
        folder = self._split_folder(split)
        path = next((path for path in sorted(folder.iterdir()) if self._subject_of(path, split) == key), None)
        if path is None:
            raise InputError(
                f"no file of {key} in {folder}, which examples are taken from; complete it, or pass --num_fewshot 0"
            )
        records = list(iter_csv(path) if path.suffix.lower() == ".csv" else iter_records(path))
        if not records:
            raise InputError(f"{path}: no question in it")
        self.files[str(path)] = hash_file(path)
        return read_questions(key, records, secret)


class HubSource(Source):
    """A dataset on a hub, read by the datasets library."""

    def __init__(self, name: str, hub_id: str) -> None:
        self.name, self.place, self.complete = name, hub_id, True
        self.files, self.ignored = {}, []
        self._table = SUBJECTS[name]

    def subjects(self) -> dict[str, Subject]:
        """See Source."""
        return dict(self._table)

    def list_subjects(self, split: str) -> list[str]:
        """See Source."""
        return list(self._table)

    def read(self, key: str, split: str, secret: bool = False) -> list[ChoiceQuestion]:
        """See Source."""
        try:
            from datasets import load_dataset
        except ImportError:
            raise InputError(
                f"reading {self.place} from the hub needs the datasets package: pip install datasets; or download the "
                "files and pass their folder as --data_dir"
            ) from None
        try:
            rows = load_dataset(self.place, key, split=HUB_SPLITS.get(self.name, {}).get(split, split))
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"no folder {self.place}, and as a dataset of the hub it cannot be read: {reason}; download the files "
                "where there is a network, and pass their folder as --data_dir"
            ) from None
        records = [(f"{self.place}/{key}/{split}: row {number}", dict(row)) for number, row in enumerate(rows, 1)]
        self.files[f"{self.place}/{key}/{split}"] = hash_json([record for _, record in records])
        return read_questions(key, records, secret)


def _open_source(name: str, data_dir: str | None) -> Source:
    """Raises: InputError if nothing is there."""
    own = name not in PUBLISHED
    if own:
        if data_dir is not None:
            raise InputError(f"--benchmark {name} is a folder itself; leave out --data_dir")
        folder = find_folder(name)
        if folder is None:
            raise InputError(f"--benchmark {name}: need one of {', '.join(PUBLISHED)}, or a folder of questions")
        return Source(name, folder)
    if data_dir is None:
        raise InputError(
            f"--benchmark {name}: pass --data_dir, the folder of its files, or the hub's --data_dir {HUB_IDS[name]}"
        )
    if folder := find_folder(data_dir):
        return Source(name, folder)
    if not is_hub_id(data_dir):
        raise InputError(f"--data_dir {data_dir} is no folder; {LAYOUT}")
    return HubSource(name, data_dir)
