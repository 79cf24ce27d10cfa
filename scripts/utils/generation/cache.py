"""A KV cache of slots: sequences of different lengths side by side, that come and go, and keep what they share.

A slot is one row of the tensors; its tokens stand at the places 0, 1, 2 ... in it, so nothing is padded between a
sequence and its past, and going back is forgetting the last places. A slot that is no longer used keeps its keys and
values until another sequence needs the room: whoever begins with the same tokens goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

GROWTH = 256  # the tensors have a multiple of so many places, tokens


class SlotCache(Cache):
    """Keys and values of S slots, for forward passes over any run of neighbouring slots.

    Attributes:
        tokens: of each slot, the tokens whose keys and values stand in it.
        places: tokens of a slot that there is room for from the beginning.
    """

    def __init__(self, num_slots: int, context: int | None = None, places: int = 0) -> None:
        """
        Args:
            context: tokens that a slot will have at most, where that is known.
            places: see the attributes.
        """
        super().__init__(layers=[])
        self._context, self.places = context, places
        self.tokens: list[list[int]] = [[] for _ in range(num_slots)]
        self._keys: list[Tensor] = []  # a layer each: (S, heads, places, head width)
        self._values: list[Tensor] = []
        # Of the pass being prepared: its first slot, how many slots, how many places are read, how many were there.
        self._first, self._count, self._width, self._start = 0, 0, 0, 0
        # Where the tokens that are no padding go: (N,) slots, (N,) places, and (B, T) which they are, None: all.
        # Copies for each device that has layers, made once a pass.
        self._targets: dict[torch.device, tuple[Tensor, Tensor, Tensor | None]] = {}

    # ------------------------------------------------------------ one forward pass

    def prepare(self, first: int, rows: Sequence[Sequence[int]], config: PreTrainedConfig) -> dict[str, Any]:
        """Say which tokens come next in the slots first, first + 1, ...; the slots then count as holding them.

        Args: rows: the new tokens of each of B slots, at least one each.
        Returns: what the model's forward takes: input_ids and position_ids (B, T), padded on the left, and a mask
            (B, 1, T, K) where rows differ; past_key_values is this cache.
        """
        starts = [len(self.tokens[first + number]) for number in range(len(rows))]
        length = max(map(len, rows))
        padding = [length - len(row) for row in rows]
        self._first, self._count = first, len(rows)
        self._width = max(start + len(row) for start, row in zip(starts, rows, strict=True))
        self._start = self._width - length
        # Padding stands on the left, so that the logits wanted are the last of every row. Its tokens are of no matter:
        # nobody sees them, and their keys are not written (see _targets).
        input_ids = torch.tensor([[row[0]] * pad + list(row) for row, pad in zip(rows, padding, strict=True)])
        positions = torch.arange(length) + torch.tensor(starts)[:, None] - torch.tensor(padding)[:, None]
        written = torch.arange(length) >= torch.tensor(padding)[:, None]
        slots = (torch.arange(len(rows)) + first)[:, None].expand(-1, length)
        self._targets = {torch.device("cpu"): (slots[written], positions[written], written if any(padding) else None)}
        for number, row in enumerate(rows):  # before the pass: whoever calls it forgets them if it fails
            self.tokens[first + number] += row
        inputs = {"input_ids": input_ids, "position_ids": positions.clamp(min=0), "past_key_values": self}
        # Rows that are all alike have the model's own causal mask, which its kernels need not be given.
        if any(padding) or len(set(starts)) > 1:
            inputs["attention_mask"] = _mask(inputs["position_ids"], self._width, config)
        return inputs

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Called by attention: new keys and values (B, heads, T, D) -> all of the rows' so far, (B, heads, K, D)."""
        if layer_idx == len(self._keys):  # the first pass tells heads, width, type and device of each layer
            for tensors, new in ((self._keys, key_states), (self._values, value_states)):
                tensors.append(new.new_empty(len(self.tokens), new.shape[1], 0, new.shape[3]))
        if self._keys[layer_idx].shape[2] < self._width:
            for tensors in (self._keys, self._values):
                tensors[layer_idx] = self._grown(tensors[layer_idx])
        window = slice(self._first, self._first + self._count)
        slots, places, written = self._targets_on(key_states.device)
        result = []
        for tensors, new in ((self._keys, key_states), (self._values, value_states)):
            table = tensors[layer_idx]
            # Padding is left out: its places are those of the row's earlier tokens, or lie before the first.
            flat = new.transpose(1, 2)
            table[slots, :, places] = flat.flatten(0, 1) if written is None else flat[written]
            result.append(table[window, :, : self._width])  # a view: neighbouring slots need no copy
        return tuple(result)

    def _grown(self, old: Tensor) -> Tensor:
        """A layer's keys or values with room for the pass, twice what there was, so that growing is seldom."""
        twice = 2 * old.shape[2]
        needed = max(self._width, self.places, min(twice, self._context or twice))
        places = math.ceil(needed / GROWTH) * GROWTH
        # Zeros: what a mask hides must be a number, since 0 * nan is nan.
        table = _zeros((*old.shape[:2], places, old.shape[3]), old)
        for slot, tokens in enumerate(self.tokens):
            length = min(len(tokens), old.shape[2])
            table[slot, :, :length] = old[slot, :, :length]
        return table

    def _targets_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        if device not in self._targets:
            slots, places, written = self._targets[torch.device("cpu")]
            moved = None if written is None else written.to(device)
            self._targets[device] = slots.to(device), places.to(device), moved
        return self._targets[device]

    # What transformers asks where it makes the mask itself: rows that are all equally long.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the pass being prepared."""
        return self._start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The same."""
        return self._start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(K, where the keys begin)."""
        return self._width, 0

    # ------------------------------------------------------------ slots

    def truncate(self, slot: int, length: int) -> None:
        """Forget what comes after the first `length` tokens of a slot."""
        del self.tokens[slot][length:]

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin with the first `length` tokens of another, and hold nothing else."""
        # Going back is forgetting: what stands behind is hidden by the mask until it is written over.
        if source != target:
            for tensors in (self._keys, self._values):
                for table in tensors:
                    table[target, :, :length] = table[source, :, :length]
        self.tokens[target] = self.tokens[source][:length]

    def swap(self, one: int, other: int) -> None:
        """Exchange two slots."""
        length = max(len(self.tokens[one]), len(self.tokens[other]))
        if one != other and length:
            for tensors in (self._keys, self._values):
                for table in tensors:
                    table[[one, other], :, :length] = table[[other, one], :, :length]
        self.tokens[one], self.tokens[other] = self.tokens[other], self.tokens[one]


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of the kind of another tensor; on the CPU they cost no memory and no time where nobody writes.

    numpy lets the system clear each page when it is first written, torch clears all of them at once: the other slots'
    share of a long context would be hundreds of megabytes while everybody waits.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(math.prod(shape) * like.element_size(), np.uint8)).view(like.dtype).view(*shape)


def _mask(positions: Tensor, width: int, config: PreTrainedConfig) -> Tensor:
    """Who sees whom, (B, 1, T, K): each token all places up to its own, or those in its model's sliding window."""
    places = torch.arange(width)
    seen = places <= positions[:, :, None]
    # Some configs have a window that the model does not use.
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        seen &= places > positions[:, :, None] - window
    # Eager attention adds its mask, the others take booleans.
    if getattr(config, "_attn_implementation", "sdpa") != "eager":
        return seen.unsqueeze(1)
    zero = torch.zeros(seen.shape)
    return zero.masked_fill(~seen, torch.finfo(torch.float32).min).unsqueeze(1)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halves compared whole: no loop over tokens
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
