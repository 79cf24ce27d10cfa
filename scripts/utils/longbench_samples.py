"""LongBench's samples, in the published layout: a file <dataset>.jsonl, of LongBench-E <dataset>_e.jsonl, each."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import InputError, atomic_folder, iter_records
from .longbench_tasks import Task

HUB_ID = "THUDM/LongBench"
ARCHIVE = "data.zip"  # of the hub; its files are data/<dataset>.jsonl
NUMBERED = {"retrieval": "Paragraph ", "retrieval_zh": "段落"}  # what an answer measured so says before its number


@dataclass(frozen=True)
class Sample:
    """A question with its long text and all its right answers; `length` is in words, in Chinese in characters."""

    context: str
    question: str
    answers: list[str]
    all_classes: list[str] | None
    length: int
    location: str


# ---------------------------------------------------------------- files


def find_data(name: str) -> Path:
    """The folder of the .jsonl files: a folder (or `data` in it), or the download of a dataset's hub id.

    Raises: InputError if there is no such folder and the hub has (or reaches) nothing of that name.
    """
    path = Path(name)
    if path.is_dir():
        return path / "data" if any(path.glob("data/*.jsonl")) and not any(path.glob("*.jsonl")) else path
    remedy = f"download {ARCHIVE} of {HUB_ID} where there is a network, unzip it, and pass that folder as --data_dir"
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"--data_dir {name} is no folder; {remedy}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        archive = Path(hf_hub_download(name, ARCHIVE, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"no folder {name}, and as a dataset of the hub it cannot be fetched: {reason}; {remedy}"
        ) from None
    return _unpack(archive)


def _unpack(archive: Path) -> Path:
    """The folder, beside the archive, of the files in it."""
    folder = archive.with_name("longbench_data")
    if not folder.is_dir():
        with atomic_folder(folder) as partial, zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                if member.filename.endswith(".jsonl"):
                    (partial / Path(member.filename).name).write_bytes(packed.read(member))
    return folder


def find_files(folder: Path, tasks: Sequence[Task], e: bool) -> dict[str, Path]:
    """{task: its file}. Raises: InputError that names all that are missing."""
    files = {task.name: folder / f"{task.name}{'_e' if e else ''}.jsonl" for task in tasks}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        there = [name for name in files if name not in missing]
        choice = f"leave them out: --predict_on {','.join(there)}" if there else "pass another --data_dir"
        names = ", ".join(files[name].name for name in missing)
        raise InputError(f"{folder} has no {names}; put them there, or {choice}")
    return files


# ---------------------------------------------------------------- records


def read_samples(path: Path, task: Task, max_samples: int | None = None) -> list[Sample]:
    """The samples of a dataset's file.

    Args: max_samples: so many are kept, spread evenly over the file; None: all.
    Raises: InputError naming the line, for a field that is missing or is not what LongBench publishes.
    """
    samples = [_read_sample(record, location, task) for location, record in iter_records(path)]
    if not samples:
        raise InputError(f"{path}: no sample in it")
    count = len(samples) if max_samples is None else min(max_samples, len(samples))
    return [samples[rank * len(samples) // count] for rank in range(count)]


def _read_sample(record: Mapping[str, Any], location: str, task: Task) -> Sample:
    context, question, answers, classes, length = (
        record.get(name) for name in ("context", "input", "answers", "all_classes", "length")
    )
    kind = "a list of texts" if task.metric == "classification" else "a list of texts, or null"
    number = NUMBERED.get(task.metric)
    checks = [
        ("context", "text", isinstance(context, str) and bool(context.strip())),
        ("input", "text, which may be empty", isinstance(question, str)),
        ("answers", "a list of texts", _is_texts(answers)),
        ("all_classes", kind, _is_texts(classes) or (classes is None and task.metric != "classification")),
        ("length", "a whole number", type(length) is int),
        ("dataset", f"'{task.name}'", record.get("dataset", task.name) in (task.name, f"{task.name}_e")),
    ]
    if number and _is_texts(answers):
        numbered = all(re.search(rf"{number}\d", answer) for answer in answers or ())
        checks.append(("answers", f"texts such as '{number}1'", numbered))
    for name, need, holds in checks:
        if not holds:
            found = f"is {record[name]!r:.40}" if name in record else "is missing"
            fields = ", ".join(sorted(record))
            raise InputError(f"{location}: field '{name}' {found}, need {need}; the record has {fields}")
    return Sample(str(context), str(question), list(answers or ()), classes, int(length or 0), location)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
