"""Sequence parallelism: one row over several processes, each with a part of its tokens, by exchanging heads.

All of a decoder but attention sees tokens one by one, so that each process computes its own part of a row. At
attention the processes exchange: each gives its tokens of most heads away and gets the whole row for the heads that it
keeps, runs the model's own attention function with the whole row's mask, and exchanges back.
Source: Jacobs et al. 2023, "DeepSpeed Ulysses", section 3.

Shapes: B rows, T tokens of a row, P processes, H query heads, G heads of keys and values, D width of a head.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from ..core.errors import InputError, raise_problems
from ..weights.config import model_of_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ULYSSES = "ulysses"  # transformers' name for attention over rows that are spread
LAYER_KINDS = {"full_attention", "sliding_attention"}  # others mix tokens elsewhere too, or have masks of their own
# Rotations that depend on the length of the text, of which a process sees a part.
LENGTH_DEPENDENT = {"dynamic", "longrope"}


class _AllToAll(torch.autograd.Function):
    """Each process gives process i the i-th of P slices of dimension `cut`, and joins what it gets along `join`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: int, join: int, group: Any) -> Tensor:
        ctx.settings = cut, join, group
        slices = torch.stack(tensor.chunk(distributed.get_world_size(group), cut))
        received = torch.empty_like(slices)
        distributed.all_to_all_single(received, slices, group=group)
        return torch.cat(received.unbind(), join)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cut, join, group = ctx.settings
        return _AllToAll.apply(upstream[0], join, cut, group), None, None, None


class SequenceParallel:
    """The processes that share rows with this one, and attention over these rows.

    Attributes:
        size: P; rank: which part of a row is this process's.
    """

    def __init__(self, config: PreTrainedConfig, size: int) -> None:
        """Every process of the run makes one at the same time; those of neighbouring ranks share rows.

        Args: config: the model's own, whose attention is switched.
        """
        self.size = size
        self.group, _ = distributed.new_subgroups(size)
        self.rank = distributed.get_rank(self.group)
        self._config = config
        self._whole = copy.deepcopy(config)  # keeps the kernel's name, by which masks are made

    @contextlib.contextmanager
    def attention_over(self, position_ids: Tensor) -> Iterator[None]:
        """Within the block the model takes parts of rows, and its attention sees the rows whole.

        The backward pass belongs into the block: activation checkpointing runs attention again.
        Args: position_ids: (B, T) of the whole rows; where they start again, another document begins.
        """
        from transformers import AttentionInterface
        from transformers.masking_utils import create_masks_for_generate

        kernel: Any = AttentionInterface()[self._whole._attn_implementation]

        @functools.cache
        def whole_rows(device: torch.device) -> tuple[Tensor, Any]:
            """Positions and masks, these by kinds of layers where there are several."""
            positions = position_ids.to(device)
            shaped = torch.empty(*positions.shape, 1, device=device)
            return positions, create_masks_for_generate(self._whole, shaped, None, None, positions)

        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
        ) -> tuple[Tensor, None]:
            """query (B, H, T / P, D), key and value (B, G, T / P, D) -> (B, T / P, H, D)."""
            strange = [name for name, given in options.items() if torch.is_tensor(given) and name != "position_ids"]
            if strange:
                raise InputError(
                    f"--sequence_parallel_size {self.size}: attention in {type(module).__name__} takes "
                    f"{', '.join(strange)}, which is not exchanged here; leave it out"
                )
            positions, masks = whole_rows(query.device)
            if isinstance(masks, dict):
                masks = masks[self._whole.layer_types[module.layer_idx]]
            query, key, value = (_AllToAll.apply(part, 1, 2, self.group) for part in (query, key, value))
            output, _ = kernel(module, query, key, value, masks, **(options | {"position_ids": positions}))
            return _AllToAll.apply(output, 1, 2, self.group), None

        # Transformers makes no masks of its own for a name that it knows none for.
        AttentionInterface.register(ULYSSES, attention)
        self._config._attn_implementation = ULYSSES
        try:
            yield
        finally:
            self._config._attn_implementation = self._whole._attn_implementation


def check_sequence_parallel(size: int, config: PreTrainedConfig, attention: str) -> None:
    """Args: attention: as --attn_implementation. Raises: InputError for a model whose rows `size` processes cannot
    share."""
    if size == 1:
        return
    flag = f"--sequence_parallel_size {size}"
    problems = []
    heads, shared = heads_of(config)
    if heads % size or shared % size:
        problems.append(
            f"{flag}: the processes exchange heads, and the model has {heads}, {shared} of keys and values; pass a "
            "divisor of both"
        )
    if attention == "eager":  # a function of each model's own; and it holds T x T numbers for each head
        problems.append(f"{flag} with --attn_implementation eager: need sdpa or flash_attention_2")
    kinds = set(getattr(config, "layer_types", None) or ()) - LAYER_KINDS
    kinds |= {"chunked_attention"} if getattr(config, "attention_chunk_size", None) else set()
    if kinds or not model_of_shapes(config)._supports_attention_backend:
        named = ", ".join(sorted(kinds)) or "attention of its own"
        problems.append(f"{flag}: a {config.model_type} model has {named}, which is not exchanged here; leave it out")
    if rotations := LENGTH_DEPENDENT & _rope_types(getattr(config, "rope_parameters", None) or {}):
        problems.append(
            f"{flag}: RoPE of type {', '.join(rotations)} depends on a text's length, and each process has a part of "
            "it; leave it out"
        )
    raise_problems(problems)


def heads_of(config: PreTrainedConfig) -> tuple[int, int]:
    """(H, G)."""
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """The kinds of rotations; some models have one for each kind of layers."""
    nested = [_rope_types(value) for value in parameters.values() if isinstance(value, dict)]
    return {str(parameters.get("rope_type", "default"))}.union(*nested)
