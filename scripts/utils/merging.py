"""Merging: a base model with adapters added, read tensor by tensor in bounded memory.

Every adapter tensor becomes part of exactly one planned update, or the merge is refused before a weight is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .adapters import AddBias, LowRank, Replace, ReplaceRows, Update, plan_updates
from .checkpoints import Checkpoint, TensorSpec, row_blocks, row_shape
from .files import InputError
from .lora import EMBEDDING, HEAD, AdapterConfig, LowRankFactors


@dataclass
class _Stage:
    """One update of a weight with its tensors at hand."""

    adapter: int
    update: Update
    factors: LowRankFactors | None = None
    norm: Tensor | None = None  # DoRA on a transposed weight: (out,)
    values: Tensor | None = None  # replaced rows, or a bias change


@dataclass
class MergedWeight:
    """A weight of the merged model: a tensor of the base, and what the adapters do to it, in order."""

    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    updates: list[tuple[int, Update]] = field(default_factory=list)  # (adapter, update)


class MergedModel:
    """The weights of base + adapters, each adapter seeing the result of the earlier ones.

    Arithmetic is float32; after each adapter values take the output's type, so that merging one adapter at a time
    gives the same bits. Weights that no adapter touches pass unchanged.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[tuple[AdapterConfig, Checkpoint]], tied: bool):
        """Plan the merge.

        Args:
            tied: the base's config says that lm_head shares the weight of embed_tokens.
        Raises: InputError if an adapter does not fit, listing all that is wrong with it.
        """
        self.base, self.adapters = base, adapters
        self.weights = {n: MergedWeight(n, i.dtype, i.shape) for n, i in base.tensors.items()}
        self.notes: list[str] = []  # decisions the user should hear of
        # |W' - W| / |W| of every changed weight, known once it was streamed
        self.relative_delta: dict[str, float] = {}
        self.untied = False
        self.tied = tied and EMBEDDING in self.weights
        if self.tied and HEAD in self.weights and not _equal(base, EMBEDDING, HEAD):
            self._untie("the base's files hold an lm_head of its own, though its config ties it to embed_tokens")
        if self.tied:
            self.weights.pop(HEAD, None)
        for number in range(len(adapters)):
            self._add_adapter(number)
        if self.tied and HEAD in base.tensors:
            self.weights[HEAD] = dataclasses.replace(self.weights[EMBEDDING])
        self._check_result()
        self._read_adapter = lru_cache(maxsize=4)(self._read_finite)  # experts of a layer share their factors

    @property
    def changed(self) -> list[str]:
        return [name for name, weight in self.weights.items() if weight.updates]

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embeddings, None for models that call them otherwise."""
        return self.weights[EMBEDDING].shape[0] if EMBEDDING in self.weights else None

    def specs(self, dtype: torch.dtype | None = None) -> list[TensorSpec]:
        """What is to be written, in the base's order; `dtype` changes the type of all ordinary float weights."""
        return [
            TensorSpec(name, dtype if dtype and _is_float(weight.dtype) else weight.dtype, weight.shape)
            for name, weight in self.weights.items()
        ]

    # -------------------------------- planning

    def _add_adapter(self, number: int) -> None:
        config, tensors = self.adapters[number]
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        if self.tied:
            shapes[HEAD] = shapes[EMBEDDING]
        updates = plan_updates(config, tensors.shapes, shapes)
        self._check_copies(tensors, updates)
        if self.tied:
            self._keep_or_break_tie(config, tensors, updates)
        for name, steps in updates.items():
            weight = self.weights[name]
            if not _is_float(weight.dtype):
                raise InputError(
                    f"the base's {name} is stored as {str(weight.dtype).removeprefix('torch.')}; adapters are merged "
                    "into full-precision weights: pass the base model as it was before quantisation"
                )
            weight.updates += [(number, step) for step in steps]
            if isinstance(steps[0], Replace):
                weight.shape = tensors.shapes[steps[0].source]

    def _check_copies(self, tensors: Checkpoint, updates: Mapping[str, list[Update]]) -> None:
        for step in (step for steps in updates.values() for step in steps if isinstance(step, Replace)):
            for copy in step.copies:
                if not _equal(tensors, step.source, copy):
                    raise InputError(f"{tensors.folder}: {step.source} and {copy} should be equal but differ")

    def _keep_or_break_tie(self, config: AdapterConfig, tensors: Checkpoint, updates: dict[str, list[Update]]) -> None:
        embedding, head = updates.get(EMBEDDING), updates.pop(HEAD, None)
        if embedding is None and head is None:
            return
        # PEFT trains single rows of tied embeddings tied, without saving them twice.
        follows = head is None and (
            config.ensure_weight_tying or all(isinstance(s, ReplaceRows) for s in embedding or ())
        )
        if follows or (embedding and head and self._same_change(tensors, embedding, head)):
            self.notes.append(f"{config.folder} changes embed_tokens and lm_head alike: they stay tied")
            return
        self._untie(f"{config.folder} changes embed_tokens and lm_head differently")
        embedding, head = embedding or [], head or []
        # A resized base that only one of the two brings was under both.
        shared = [step for step in (*embedding[:1], *head[:1]) if isinstance(step, Replace) and step.frozen][:1]
        for name, steps in ((EMBEDDING, embedding), (HEAD, head)):
            if steps := steps if steps and isinstance(steps[0], Replace) else shared + steps:
                updates[name] = steps

    def _untie(self, reason: str) -> None:
        self.tied, self.untied = False, True
        if HEAD not in self.weights:
            shared = self.weights[EMBEDDING]
            self.weights[HEAD] = dataclasses.replace(shared, updates=list(shared.updates))
        self.notes.append(f"{reason}: the merged model has both (tie_word_embeddings: false)")

    def _same_change(self, tensors: Checkpoint, embedding: list[Update], head: list[Update]) -> bool:
        pairs = zip(embedding, head, strict=False)
        return len(embedding) == len(head) and all(self._same_update(tensors, *pair) for pair in pairs)

    def _same_update(self, tensors: Checkpoint, one: Update, other: Update) -> bool:
        if isinstance(one, LowRank) and isinstance(other, LowRank):
            if one.magnitude or other.magnitude or one.scaling != other.scaling:
                return False
            # An embedding's factors act on the transposed weight.
            A, B = tensors.read(one.name_A).T, tensors.read(one.name_B).T
            return torch.equal(A, tensors.read(other.name_B)) and torch.equal(B, tensors.read(other.name_A))
        if isinstance(one, ReplaceRows) and isinstance(other, ReplaceRows):
            return one.indices == other.indices and _equal(tensors, one.source, other.source)
        return isinstance(one, Replace) and isinstance(other, Replace) and _equal(tensors, one.source, other.source)

    def _check_result(self) -> None:
        if HEAD in self.weights and EMBEDDING in self.weights:
            rows, head_rows = self.weights[EMBEDDING].shape[0], self.weights[HEAD].shape[0]
            if rows != head_rows:
                raise InputError(
                    f"merged, embed_tokens would have {rows} rows and lm_head {head_rows}: the adapter must bring "
                    "both; train it with --modules_to_save embed_tokens,lm_head"
                )

    # -------------------------------- values

    def blocks(self, spec: TensorSpec) -> Iterator[Tensor]:
        """The values of one merged tensor in row blocks, in the type of `spec`.

        Raises: InputError if the adapter or the result holds NaN or infinity.
        """
        weight = self.weights[spec.name]
        if not weight.updates:
            for start, stop in row_blocks(weight.shape, weight.dtype.itemsize):
                rows = self.base.read_rows(weight.source, start, stop)
                if spec.dtype != rows.dtype:
                    self._check_finite(rows.to(spec.dtype), rows, spec)
                yield rows.to(spec.dtype)
            return
        stages = self._load(weight, spec.dtype)
        changed = total = 0.0
        for start, stop in row_blocks(weight.shape):
            old = self._base_rows(weight, start, stop)
            merged = self._apply(stages, old, start, stop, spec.dtype)
            result = merged.to(spec.dtype)
            self._check_finite(result, old, spec)
            changed += float(torch.linalg.vector_norm(merged[: len(old)] - old)) ** 2
            total += float(torch.linalg.vector_norm(old)) ** 2
            yield result
        self.relative_delta[spec.name] = math.sqrt(changed / total) if total else math.inf if changed else 0.0

    def stream(
        self, specs: Iterable[TensorSpec], convert: Callable[[TensorSpec, Tensor], Any] | None = None
    ) -> Iterator[tuple[TensorSpec, Any]]:
        """(spec, block) for every row block of every tensor in `specs`, in order.

        A block holds whole rows, as a matrix (rows, columns) of the spec's type; of vectors, a vector. `convert`
        turns each block into something else, in the worker threads.
        """
        for spec in specs:
            for block in self.blocks(spec):
                yield spec, block if convert is None else convert(spec, block)

    def _base_rows(self, weight: MergedWeight, start: int, stop: int) -> Tensor:
        """The rows the base has of these, as float32; fewer where the vocabulary grew."""
        rows, _ = row_shape(self.base.tensors[weight.source].shape)
        return self.base.read_rows(weight.source, min(start, rows), min(stop, rows)).float()

    def _load(self, weight: MergedWeight, dtype: torch.dtype) -> list[_Stage]:
        stages: list[_Stage] = []
        for number, update in weight.updates:
            read = partial(self._read_adapter, number)
            stage = _Stage(number, update)
            if isinstance(update, Replace):
                stages = []  # what came before is overwritten
            elif isinstance(update, LowRank):
                stage.factors = update.load(read)
                if stage.factors.needs_norm:
                    stage.norm = self._column_norm(weight, stages, stage, dtype)
            else:
                stage.values = read(update.source).float()
            stages.append(stage)
        return stages

    def _column_norm(self, weight: MergedWeight, before: list[_Stage], stage: _Stage, dtype: torch.dtype) -> Tensor:
        """DoRA's norm of every column of W + dW, summed over all row blocks: (columns,)."""
        assert stage.factors is not None
        total = torch.zeros(weight.shape[1], dtype=torch.float64)
        for start, stop in row_blocks(weight.shape):
            rows = self._apply([*before, stage], self._base_rows(weight, start, stop), start, stop, dtype)
            total += rows.double().square().sum(dim=0)
        return total.sqrt().float()

    def _apply(self, stages: list[_Stage], old: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows `start` to `stop` after `stages`, as float32, from the base's rows `old`.

        A last DoRA stage that waits for its norm gives W + dW.
        """
        rows, adapter = old, None
        for stage in stages:
            if adapter is not None and stage.adapter != adapter:
                rows = rows.to(dtype).float()  # as the file would hold it that this adapter was trained on
            adapter = stage.adapter
            if isinstance(stage.update, Replace):
                rows = self._replaced_rows(stage, start, stop)
            elif stage.factors is not None:
                waits = stage.factors.needs_norm and stage.norm is None
                delta_only = dataclasses.replace(stage.factors, magnitude=None) if waits else stage.factors
                rows = delta_only.merge_rows(rows, start, stage.norm)
            elif isinstance(stage.update, AddBias):
                assert stage.values is not None
                rows = rows + stage.values[start:stop] * stage.update.scaling
            elif isinstance(stage.update, ReplaceRows):
                assert stage.values is not None
                indices = torch.tensor(stage.update.indices)
                inside = (indices >= start) & (indices < stop)
                rows = rows.clone()
                rows[indices[inside] - start] = stage.values[inside]
        return rows

    def _replaced_rows(self, stage: _Stage, start: int, stop: int) -> Tensor:
        assert isinstance(stage.update, Replace)
        rows = self.adapters[stage.adapter][1].read_rows(stage.update.source, start, stop).float()
        return self._finite(stage.adapter, stage.update.source, rows)

    def _read_finite(self, adapter: int, name: str) -> Tensor:
        return self._finite(adapter, name, self.adapters[adapter][1].read(name))

    def _finite(self, adapter: int, name: str, values: Tensor) -> Tensor:
        if not _is_finite(values):
            folder = self.adapters[adapter][0].folder
            raise InputError(
                f"adapter {folder}: {name} holds NaN or infinity; its training diverged, take an earlier checkpoint"
            )
        return values

    def _check_finite(self, result: Tensor, old: Tensor, spec: TensorSpec) -> None:
        if not _is_float(result.dtype) or _is_finite(result):
            return
        if not _is_finite(old):
            raise InputError(f"the base's {spec.name} holds NaN or infinity; download the base model again")
        raise InputError(
            f"merged, {spec.name} overflows {str(spec.dtype).removeprefix('torch.')}; pass --dtype bfloat16 or float32"
        )


def _equal(tensors: Checkpoint, one: str, other: str) -> bool:
    """True if two tensors of a checkpoint have the same shape, type and bits."""
    shape = tensors.shapes[one]
    return shape == tensors.shapes[other] and all(
        torch.equal(
            tensors.read_rows(one, *block).view(torch.uint8), tensors.read_rows(other, *block).view(torch.uint8)
        )
        for block in row_blocks(shape)
    )


def _is_finite(values: Tensor) -> bool:
    # A norm is 50 times faster than isfinite; where it overflows, the slow way decides.
    norm = torch.linalg.vector_norm(values, dtype=torch.float32)
    return bool(torch.isfinite(norm)) or bool(torch.isfinite(values).all())


def _is_float(dtype: torch.dtype) -> bool:
    """True for the types weights are trained in; 8-bit floats are storage formats with scales of their own."""
    return dtype.is_floating_point and dtype.itemsize >= 2
