"""The reference's tables: what another run that shares the cache folder may not touch."""

from types import SimpleNamespace

import numpy as np
import torch

from utils.core.arguments import LoraArguments, ModelArguments
from utils.data import cache
from utils.rlhf import reference


def test_the_clean_up_of_another_run_leaves_a_table_in_the_making(tmp_path, monkeypatch):
    table, save = np.ones((3, 2), dtype=np.float32), np.save

    def interrupted(*args, **options):
        cache._remove_abandoned(tmp_path)  # as another run does that begins to build a cache at this moment
        save(*args, **options)

    monkeypatch.setattr(np, "save", interrupted)
    monkeypatch.setattr(reference, "build_training_model", lambda *_: torch.nn.Linear(1, 1))
    monkeypatch.setattr(reference, "_compute_table", lambda *_: table)
    training_args = SimpleNamespace(device="cpu", compute_dtype=torch.float32, seed=0, should_save=True)
    file = type("File", (), {"folder": tmp_path / "pairs-1", "key": "k", "__len__": lambda self: 3})()
    request = (ModelArguments(), LoraArguments(), training_args, None, None, [file])
    assert np.array_equal(reference.load_reference_tables("key", *request)[0], table)
    monkeypatch.setattr(reference, "_compute_table", None)
    assert np.array_equal(reference.load_reference_tables("key", *request)[0], table), "it is in the cache"
