"""Planned and measured memory, and the file that keeps both."""

import json
import logging

import numpy as np

from utils.training.memory import (
    RECORDS,
    Meter,
    PlannedMemory,
    Record,
    append,
    calibration,
    read_records,
    records_file,
)


def record(planned: float, measured: float, stage: str = "pt", device: str = "cpu") -> Record:
    return Record(stage, "llama 2x64", device, planned, measured, 100.0, 1)


def test_a_meter_measures_what_came_and_went():
    meter = Meter()
    size = 300_000_000
    held = np.ones(size, dtype=np.uint8)
    del held
    assert 0.95 * size <= meter.peak() <= 1.1 * size


def test_planned_and_measured_are_said_and_kept(tmp_path, caplog):
    planned = PlannedMemory("sft", "key", 250e6, {"frozen weights": 200e6, "gradients": 50e6})
    held = np.ones(200_000_000, dtype=np.uint8)
    folder = tmp_path / "run"
    with caplog.at_level(logging.INFO):
        figures = planned.compare(folder, 12.5, 1)
    assert figures["planned_memory_gb"] == 0.25 and 0.19 <= figures["measured_memory_gb"] <= 0.25
    assert "planned 0.250 GB, measured 0.2" in caplog.text and "frozen weights 0.200" in caplog.text
    (kept,) = read_records(records_file(folder))
    assert (kept.stage, kept.key, kept.planned, kept.tokens_per_second) == ("sft", "key", 250e6, 12.5)
    assert records_file(folder) == tmp_path / RECORDS and held.size


def test_damaged_lines_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / RECORDS
    append(path, record(1e9, 2e9))
    with path.open("a") as file:
        file.write('{"stage": "pt"}\nno json\n\n')
    append(path, record(1e9, 3e9))
    with caplog.at_level(logging.WARNING):
        assert [r.measured for r in read_records(path)] == [2e9, 3e9]
    assert "2 lines are no records" in caplog.text
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines()[:1])


def test_calibration_is_the_median_of_the_same_stage_and_device():
    records = [record(1e9, 1.1e9), record(1e9, 1.3e9), record(2e9, 2.4e9), record(1e9, 9e9, "rm")]
    assert calibration(records, "pt", "cpu") == (1.2, 3)
    assert calibration(records, "pt", "NVIDIA H100") == (1.0, 0)
