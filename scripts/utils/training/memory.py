"""What a run was planned to take and what it took: measured at its end, kept in a file that calibrates later plans.

A GPU's peak is that of PyTorch's tensors. A CPU's is what the resident memory of the process grew by, from before the
model was loaded: its libraries were there already.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..core.machine import peak_resident_bytes, reset_peak_resident, resident_bytes

logger = logging.getLogger(__name__)

RECORDS = ".memory.jsonl"  # beside the output folder, as the token caches are: all runs of a project add to it


def device_name() -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Record:
    """A line of the file; bytes of one process.

    Attributes:
        key: what was run, as far as memory and speed depend on it.
    """

    stage: str
    key: str
    device: str
    planned: float
    measured: float
    tokens_per_second: float
    processes: int
    date: str = ""


class Meter:
    """Measures the peak from its making on."""

    def __init__(self) -> None:
        self.start = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        self.start = resident_bytes()
        reset_peak_resident()

    def peak(self) -> int:
        """Bytes."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return peak_resident_bytes() - self.start


@dataclass
class PlannedMemory:
    """The plan of a run that is under way; made before its model is loaded.

    Attributes:
        peak: planned bytes; parts: what they are made of.
    """

    stage: str
    key: str
    peak: float
    parts: dict[str, float]

    def __post_init__(self) -> None:
        self.meter = Meter()

    def compare(self, folder: Path, tokens_per_second: float, processes: int) -> dict[str, float]:
        """Log planned beside measured, append both to the file of records; returns them as metrics, in 1e9 bytes."""
        measured = self.meter.peak()
        off = self.peak / measured - 1 if measured > 0 else 0.0
        largest = sorted(self.parts.items(), key=lambda item: -item[1])[:4]
        logger.info(
            "memory: planned %.3f GB, measured %.3f GB (%+.1f %%); planned: %s",
            self.peak / 1e9,
            measured / 1e9,
            100 * off,
            ", ".join(f"{name} {size / 1e9:.3f}" for name, size in largest),
        )
        record = Record(
            self.stage,
            self.key,
            device_name(),
            round(self.peak),
            measured,
            tokens_per_second,
            processes,
            time.strftime("%Y-%m-%d %H:%M:%S"),
        )
        append(records_file(folder), record)
        return {"planned_memory_gb": round(self.peak / 1e9, 4), "measured_memory_gb": round(measured / 1e9, 4)}


def records_file(output_dir: str | Path) -> Path:
    """Where the runs beside this one are recorded."""
    return Path(output_dir).absolute().parent / RECORDS


def append(path: Path, record: Record) -> None:
    """Add a line; in one write, so that two runs do not mix theirs."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def read_records(path: Path) -> list[Record]:
    """The records of a file, none if it is absent; lines that are not understood are left out and counted."""
    if not path.is_file():
        return []
    records, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            damaged += 1
    if damaged:
        logger.warning("%s: %d lines are no records of runs; they are left out", path, damaged)
    return records


def calibration(records: list[Record], stage: str, device: str) -> tuple[float, int]:
    """(measured / planned, of how many runs): the median over the stage's runs on such a device; (1, 0) of none."""
    alike = [record for record in records if (record.stage, record.device) == (stage, device) and record.planned]
    ratios = [record.measured / record.planned for record in alike]
    return (statistics.median(ratios), len(ratios)) if ratios else (1.0, 0)
