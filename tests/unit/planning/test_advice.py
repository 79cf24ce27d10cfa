"""Suggestions that fit, in their order; no rehearsal, but footprints given by a formula."""

import dataclasses

import torch
from transformers import LlamaConfig

from utils.core.arguments import LoraArguments, ModelArguments
from utils.planning.advice import describe, knobs, measured_rate, speed, suggest, table
from utils.planning.ledger import BOTTOM, FORWARD, TOP, Footprint, Moment
from utils.planning.memory import Setting, Sharing, plan
from utils.planning.stages import Job
from utils.training.memory import Record

BATCH = 16


class Formula:
    """1 GB of weights, a quarter in 4 bits; 2 GB of activations a row, a tenth with checkpointing."""

    def of(self, job: Job) -> Footprint:
        weights = 0.25e9 if job.model_args.load_in_kbits == 4 else 1e9
        activations = job.rows * (0.2e9 if job.checkpointing else 2e9)
        moment = Moment(0, activations)
        return Footprint(
            weights, 4e6, 4e6, activations, 1e6, 5e8, 0, 1e6, dict.fromkeys((FORWARD, TOP, BOTTOM), moment)
        )


def setting(rows: int = 4, checkpointing: bool = False, sharing: Sharing | None = None) -> Setting:
    job = Job(
        *("pt", LlamaConfig(), ModelArguments(), LoraArguments(), torch.bfloat16, torch.bfloat16, True, "sdpa", rows),
        length=512,
        checkpointing=checkpointing,
        accumulates=True,
    )
    return Setting(job, sharing=sharing or Sharing())


def test_all_suggestions_fit_and_come_by_speed():
    found = suggest(setting(), BATCH // 4, 8e9, Formula())
    assert found and all(item.plan.needed <= 8e9 for item in found)
    assert [item.speed for item in found] == sorted((item.speed for item in found), reverse=True)
    assert {item.plan.setting.job.model_args.load_in_kbits for item in found} == {16}  # none needs 4 bits


def test_the_batch_stays():
    for item in suggest(setting(), BATCH // 4, 8e9, Formula()):
        rows = item.plan.setting.job.rows
        assert rows == 4 or f"--gradient_accumulation_steps {BATCH // rows}" in item.flags


def test_four_bits_come_where_sixteen_do_not_fit():
    found = suggest(setting(), BATCH // 4, 1.4e9, Formula())
    assert found and all("--load_in_kbits 4" in item.flags for item in found)


def test_nothing_fits_nothing():
    assert suggest(setting(), 4, 0.5e9, Formula()) == []


def test_shared_models_are_suggested_to_several_gpus():
    found = suggest(setting(sharing=Sharing("ddp", 4)), 4, 8e9, Formula())
    assert {item.plan.setting.sharing.kind for item in found} == {"ddp", "zero2", "zero3", "fsdp"}


def test_checkpointing_costs_a_pass():
    assert speed(setting(checkpointing=True)) / speed(setting()) == 2 / 3
    assert speed(setting(rows=8)) > speed(setting())


def test_knobs_change_one_thing_each():
    base = setting()
    names = [flags for flags, _ in knobs(base, 4)]
    assert names[:2] == [
        "--gradient_checkpointing",
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 16",
    ]
    for _, changed in knobs(base, 4):
        jobs = dataclasses.asdict(base.job).items(), dataclasses.asdict(changed.job)
        differ = [name for name, value in jobs[0] if jobs[1][name] != value]
        assert changed.optim != base.optim or changed.sharing != base.sharing or differ


def test_rows_are_shared_where_training_would_share_them():
    base = setting(sharing=Sharing("ddp", 4))
    flags = "--sequence_parallel_size 4 --gradient_accumulation_steps 16"
    assert flags in dict(knobs(base, 4)) and dict(knobs(base, 4))[flags].job.sequence_parallel_size == 4
    dynamic = LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    for changes in ({"attention": "eager"}, {"config": dynamic}, {"stage": "dpo"}):
        refused = dataclasses.replace(base, job=dataclasses.replace(base.job, **changes))
        assert not any("--sequence_parallel_size" in name for name, _ in knobs(refused, 4)), changes


def test_a_rate_is_that_of_the_last_run_alike():
    key = describe(setting())
    records = [Record("pt", key, "cpu", 1, 1, rate, 1) for rate in (100.0, 120.0)] + [
        Record("pt", "x", "cpu", 1, 1, 9, 1)
    ]
    assert measured_rate(records, key) == 120.0 and measured_rate(records, "other") is None
    assert describe(setting(rows=2)) != key


def test_a_table_ends_with_the_sum():
    planned = plan(setting(), Formula().of(setting().job))
    lines = table(planned)
    assert f"{planned.needed / 1e9:.3f} GB" in lines[-1] and "frozen weights" in "\n".join(lines)
