"""Slots: what growing costs, and what it keeps."""

import psutil
import torch

from utils.generation.cache import SlotCache, common_prefix


def fill(cache, slot, count, start):
    """Write `count` tokens of one layer into a slot, as a forward pass does; their keys are their numbers."""
    cache.prepare(slot, [list(range(start, start + count))], config=None)
    numbers = torch.arange(start, start + count, dtype=torch.float32)
    states = numbers.view(1, 1, -1, 1).expand(1, 8, count, 64).contiguous()
    return cache.update(states, -states, 0)


def test_growing_keeps_what_slots_hold_and_costs_memory_only_where_they_write():
    cache = SlotCache(64, context=8192)
    fill(cache, 0, 3, 100)
    fill(cache, 5, 2, 200)
    before = psutil.Process().memory_info().rss
    keys, values = fill(cache, 0, 4000, 103)
    grown = psutil.Process().memory_info().rss - before
    assert keys[0, 0, :, 0].tolist() == list(range(100, 4103)) and torch.equal(values, -keys)
    table = 64 * 8 * 4096 * 64 * 4  # bytes of the keys of all slots; one of them is in use
    assert grown < table / 4
    keys, _ = fill(cache, 5, 1, 202)
    assert keys[0, 0, :, 0].tolist() == [200, 201, 202]
    cache.swap(0, 5)
    keys, _ = fill(cache, 0, 4200, 203)
    assert keys[0, 0, :, 0].tolist() == list(range(200, 4403))
    assert fill(cache, 5, 1, 4103)[0][0, 0, :, 0].tolist() == list(range(100, 4104))
    assert float(cache._keys[0][7].abs().sum()) == 0  # a slot nobody wrote into


def test_common_prefix():
    for one, other, expected in (([], [1], 0), ([1, 2, 3], [1, 2, 4], 2), ([1] * 9, [1] * 5, 5), ([2], [1], 0)):
        assert common_prefix(one, other) == expected == common_prefix(other, one)
