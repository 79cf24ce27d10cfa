"""Merging: a base model with adapters added, read tensor by tensor in bounded memory.

Every adapter tensor becomes part of exactly one planned update, or the merge is refused before a weight is read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.machine import available_cores
from ..weights.layers import renumbered
from ..weights.names import EMBEDDING, HEAD, SCORE
from ..weights.reader import Checkpoint, TensorSpec, row_blocks, row_shape
from ..weights.streams import FileHasher, prefetch
from .chat_vector import AddDifference, ChatVector
from .config import AdapterConfig, LowRankFactors
from .updates import AddBias, LowRank, Replace, ReplaceRows, Update, plan_updates


@dataclass
class _Stage:
    """One update of a weight with its tensors at hand."""

    adapter: int
    update: Update | AddDifference
    factors: LowRankFactors | None = None
    norm: Tensor | None = None  # DoRA on a transposed weight: (out,)
    values: Tensor | None = None  # replaced rows, or a bias change


@dataclass
class _Block:
    """Some rows of a tensor on their way: `rows` are the base's."""

    spec: TensorSpec
    stages: list[_Stage]
    start: int
    stop: int
    rows: Tensor


@dataclass
class MergedWeight:
    """A weight of the merged model: a tensor of the base (a new head has none), and what the adapters do to it, in
    order."""

    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    updates: list[tuple[int, Update | AddDifference]] = field(default_factory=list)  # (adapter, update)


class MergedModel:
    """The weights of base + adapters, each adapter seeing the result of the earlier ones.

    Arithmetic is float32; after each adapter values take the output's type, so that merging one adapter at a time
    gives the same bits. Weights that no adapter touches pass unchanged.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapters: Sequence[tuple[AdapterConfig, Checkpoint]],
        tied: bool,
        adapter_weights: Sequence[float] | None = None,
        chat_vector: ChatVector | None = None,
    ):
        """Plan the merge.

        Args:
            tied: the base's config says that lm_head shares the weight of embed_tokens.
            adapter_weights: how much of each adapter's change is taken, 1 for all of it.
            chat_vector: added to what the adapters make of the base, as one more of them.
        Raises: InputError if an adapter does not fit, listing all that is wrong with it.
        """
        self.base, self.adapters = base, adapters
        self.adapter_weights = list(adapter_weights or [1.0] * len(adapters))
        self.chat_vector = chat_vector
        self.weights = {n: MergedWeight(n, i.dtype, i.shape) for n, i in base.tensors.items()}
        self.notes: list[str] = []  # decisions the user should hear of
        # |W' - W|^2 and |W|^2 of every changed weight, complete once it was streamed
        self.squares: dict[str, tuple[float, float]] = {}
        self.untied = False
        self.tied = tied and EMBEDDING in self.weights
        if self.tied and HEAD in self.weights and not _equal(base, EMBEDDING, HEAD):
            self._untie("the base's files hold an lm_head of its own, though its config ties it to embed_tokens")
        if self.tied:
            self.weights.pop(HEAD, None)
        for number in range(len(adapters)):
            self._add_adapter(number)
        if chat_vector is not None:
            self._add_chat_vector(chat_vector)
        if self.is_reward_model:
            self.weights.pop(HEAD, None)  # a reward model scores, it predicts no tokens
        elif self.tied and HEAD in base.tensors:  # written twice, as the base's files have it
            self.weights[HEAD] = dataclasses.replace(self.weights[EMBEDDING])
        self._check_result()
        # Experts of a layer share their factors.
        self._read_adapter = lru_cache(maxsize=4 * max(1, len(adapters)))(self._read_finite)

    @property
    def changed(self) -> list[str]:
        return [name for name, weight in self.weights.items() if weight.updates]

    @property
    def relative_delta(self) -> dict[str, float]:
        """|W' - W| / |W| of every changed weight that was streamed; infinity where the base's weight is zero."""
        return {
            name: math.sqrt(changed / total) if total else math.inf if changed else 0.0
            for name, (changed, total) in self.squares.items()
        }

    @property
    def is_reward_model(self) -> bool:
        """Whether the merged model scores answers instead of writing them."""
        return SCORE in self.weights

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

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Have these layers of the base alone, in this order; one may come more than once. Before anything streams."""
        places: dict[int, list[int]] = {}
        for new, old in enumerate(layers):
            places.setdefault(old, []).append(new)
        # In the base's order still, so that its files are read from front to back.
        self.weights = {
            new: dataclasses.replace(weight, updates=list(weight.updates))
            for name, weight in self.weights.items()
            for new in renumbered(name, places)
        }

    # -------------------------------- planning

    def _add_adapter(self, number: int) -> None:
        config, tensors = self.adapters[number]
        self._add_score_head(config, tensors)
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

    def _add_chat_vector(self, vector: ChatVector) -> None:
        shapes = {name: weight.shape for name, weight in self.weights.items() if _is_float(weight.dtype)}
        for name, step in vector.plan(shapes).items():
            self.weights[name].updates.append((len(self.adapters), step))
        self.notes += vector.notes(self.vocab_size)

    def _share(self, number: int) -> float:
        """How much of a change is taken: of an adapter's, or of the chat vector behind them."""
        return [*self.adapter_weights, self.chat_vector.share if self.chat_vector else 1.0][number]

    def _add_score_head(self, config: AdapterConfig, tensors: Checkpoint) -> None:
        """Room for the head that a reward model's adapter brings, where the base is a language model."""
        source = next((name for name in tensors.tensors if name.endswith(f".{SCORE}")), None)
        if source is not None and SCORE not in self.weights:
            self.weights[SCORE] = MergedWeight(SCORE, tensors.tensors[source].dtype, tensors.shapes[source])
            self.notes.append(f"{config.folder} is a reward model: its head takes the place of lm_head")

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

    def stream(
        self,
        specs: Iterable[TensorSpec],
        convert: Callable[[TensorSpec, Tensor], Any] | None = None,
        hasher: FileHasher | None = None,
    ) -> Iterator[tuple[TensorSpec, Any]]:
        """(spec, block) for every row block of every tensor in `specs`, in order, in the type of the spec.

        The base is read ahead in a thread and merged by as many as there are cores; what waits is bounded, so memory
        does not depend on the model's size. Matrices come as (rows, columns), stacks of them too, vectors as vectors.

        Args:
            convert: turns each block into something else, in the worker threads.
            hasher: gets the bytes of the base's files as they are read.
        Raises: InputError if the adapter or the result holds NaN or infinity.
        """
        workers = worker_count()
        pending: deque[tuple[_Block, Future[tuple[Any, float, float]]]] = deque()
        # Threads share the work by blocks: a product of one block is too small to be worth sharing.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for block in prefetch(self._read(specs, hasher)):
                    pending.append((block, pool.submit(self._merge, block, convert)))
                    # One block in work and one waiting for each thread; more would only take memory.
                    if len(pending) > 2 * workers:
                        yield self._take(*pending.popleft())
                while pending:
                    yield self._take(*pending.popleft())
            finally:
                for _, future in pending:
                    future.cancel()

    def blocks(self, spec: TensorSpec) -> Iterator[Tensor]:
        """The row blocks of one merged tensor."""
        return (block for _, block in self.stream([spec]))

    def _read(self, specs: Iterable[TensorSpec], hasher: FileHasher | None) -> Iterator[_Block]:
        for spec in specs:
            weight = self.weights[spec.name]
            # Here, in the thread that reads ahead: a tensor's factors are in memory before its first block is merged,
            # and let go with its last.
            stages = self._load(weight, spec.dtype)
            for start, stop in row_blocks(weight.shape, 4 if weight.updates else spec.dtype.itemsize):
                yield _Block(spec, stages, start, stop, self._base_rows(weight, start, stop, hasher))

    def _merge(self, block: _Block, convert: Callable[[TensorSpec, Tensor], Any] | None) -> tuple[Any, float, float]:
        """(result, squared norm of the change, squared norm of the base's rows); norms 0 where nothing changes."""
        spec, old = block.spec, block.rows
        changed = total = 0.0
        if not block.stages:
            result = old.to(spec.dtype)
            self._check_finite(old, old, spec)
        else:
            old = old.float()
            merged = self._apply(block.stages, old, block.start, block.stop, spec.dtype)
            self._check_finite(merged, old, spec)
            result = merged.to(spec.dtype)
            total = float(torch.linalg.vector_norm(old)) ** 2
            if merged is not old:  # rows that are new have nothing to be compared with; `old` is not needed any more
                changed = float(torch.linalg.vector_norm(old.sub_(merged[: len(old)]))) ** 2
        return (result if convert is None else convert(spec, result)), changed, total

    def _take(self, block: _Block, future: Future[tuple[Any, float, float]]) -> tuple[TensorSpec, Any]:
        result, changed, total = future.result()
        if block.stages:
            # From a tensor's first block on anew: it may have been streamed before, for an estimate.
            before = self.squares[block.spec.name] if block.start else (0.0, 0.0)
            self.squares[block.spec.name] = before[0] + changed, before[1] + total
        return block.spec, result

    def _base_rows(self, weight: MergedWeight, start: int, stop: int, hasher: FileHasher | None = None) -> Tensor:
        """The rows the base has of these; fewer where the vocabulary grew, none of a new head."""
        if weight.source not in self.base.tensors:
            return torch.empty(0, *weight.shape[1:], dtype=weight.dtype)
        rows, _ = row_shape(self.base.tensors[weight.source].shape)
        return self.base.scan_rows(weight.source, min(start, rows), min(stop, rows), hasher)

    def remaining_updates(self, weight: MergedWeight) -> list[tuple[int, Update | AddDifference]]:
        """The updates of a weight without those that a later one overwrites."""
        first = 0
        for place, (number, update) in enumerate(weight.updates):
            # Below 1 the replaced rows are mixed with what stood there before.
            if isinstance(update, Replace) and self._share(number) == 1.0:
                first = place
        return weight.updates[first:]

    def _load(self, weight: MergedWeight, dtype: torch.dtype) -> list[_Stage]:
        stages: list[_Stage] = []
        for number, update in self.remaining_updates(weight):
            read = partial(self._read_adapter, number)
            stage = _Stage(number, update)
            if isinstance(update, LowRank):
                stage.factors = update.load(read)
                if stage.factors.needs_norm:
                    stage.norm = self._column_norm(weight, stages, stage, dtype)
            elif not isinstance(update, Replace | AddDifference):
                stage.values = read(update.source).float()
            stages.append(stage)
        return stages

    def _column_norm(self, weight: MergedWeight, before: list[_Stage], stage: _Stage, dtype: torch.dtype) -> Tensor:
        """DoRA's norm of every column of W + dW, summed over all row blocks: (columns,)."""
        assert stage.factors is not None
        total = torch.zeros(weight.shape[1], dtype=torch.float64)
        delta_only = dataclasses.replace(stage, factors=dataclasses.replace(stage.factors, magnitude=None))
        for start, stop in row_blocks(weight.shape):
            old = self._base_rows(weight, start, stop).float()
            # Without its weight: the norm is that of the adapter's own W + dW.
            rows = self._apply([*before, delta_only], old, start, stop, dtype, whole=True)
            total += rows.double().square().sum(dim=0)
        return total.sqrt().float()

    def _apply(
        self, stages: list[_Stage], old: Tensor, start: int, stop: int, dtype: torch.dtype, whole: bool = False
    ) -> Tensor:
        """Rows `start` to `stop` after `stages`, as float32, from the base's rows `old`.

        Args:
            whole: the last adapter counts in full, whatever its weight.
        """
        rows = old
        for number, group in itertools.groupby(stages, key=lambda stage: stage.adapter):
            if number != stages[0].adapter:
                rows = rows.to(dtype).float()  # as the file would hold it that this adapter was trained on
            before, weight = rows, 1.0 if whole and number == stages[-1].adapter else self._share(number)
            for stage in group:
                rows = self._step(stage, rows, start, stop)
            if weight != 1.0:  # rows that only the adapter has are taken whole
                rows = torch.cat([torch.lerp(before, rows[: len(before)], weight), rows[len(before) :]])
        return rows

    def _step(self, stage: _Stage, rows: Tensor, start: int, stop: int) -> Tensor:
        update = stage.update
        if isinstance(update, Replace):
            return self._replaced_rows(stage, start, stop)
        if isinstance(update, AddDifference):
            assert self.chat_vector is not None
            return self.chat_vector.add(update, rows, start)
        if isinstance(update, LowRank):
            assert stage.factors is not None
            return update.merge_rows(stage.factors, rows, start, stage.norm)
        assert stage.values is not None
        if isinstance(update, AddBias):
            return rows + stage.values[start:stop] * update.scaling
        indices = torch.tensor(update.indices)  # of the whole weight; this block has some of them, or none
        inside = (indices >= start) & (indices < stop)
        rows = rows.clone()
        rows[indices[inside] - start] = stage.values[inside]
        return rows

    def _replaced_rows(self, stage: _Stage, start: int, stop: int) -> Tensor:
        assert isinstance(stage.update, Replace)
        source, tensors = stage.update.source, self.adapters[stage.adapter][1]
        count, _ = row_shape(tensors.shapes[source])  # a later adapter may have more
        rows = tensors.read_rows(source, min(start, count), min(stop, count)).float()
        return self._finite(stage.adapter, source, rows)

    def _read_finite(self, adapter: int, name: str) -> Tensor:
        return self._finite(adapter, name, self.adapters[adapter][1].read(name))

    def _finite(self, adapter: int, name: str, values: Tensor) -> Tensor:
        if not _is_finite(values, values.dtype):
            folder = self.adapters[adapter][0].folder
            raise InputError(
                f"adapter {folder}: {name} holds NaN or infinity; its training diverged, take an earlier checkpoint"
            )
        return values

    def _check_finite(self, values: Tensor, old: Tensor, spec: TensorSpec) -> None:
        """Raises: InputError if `values`, made from the base's `old`, cannot be stored in the type of `spec`."""
        if not _is_float(spec.dtype) or _is_finite(values, spec.dtype):
            return
        if not _is_finite(old, old.dtype):
            raise InputError(f"the base's {spec.name} holds NaN or infinity; download the base model again")
        raise InputError(
            f"merged, {spec.name} overflows {str(spec.dtype).removeprefix('torch.')}; use bfloat16 or float32"
        )


def worker_count() -> int:
    """Threads that merge: the cores this process may use, at most 8, as many as the fastest disks can feed."""
    return min(available_cores(), 8)


def _equal(tensors: Checkpoint, one: str, other: str) -> bool:
    """True if two tensors of a checkpoint have the same shape, type and bits."""
    shape = tensors.shapes[one]
    return shape == tensors.shapes[other] and all(
        torch.equal(
            tensors.read_rows(one, *block).view(torch.uint8), tensors.read_rows(other, *block).view(torch.uint8)
        )
        for block in row_blocks(shape)
    )


def _is_finite(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite in `dtype`."""
    # No value is larger than the norm, which is 20 times faster than isfinite; where it is too large, that decides.
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float32))
    return norm <= torch.finfo(dtype).max or bool(torch.isfinite(values.to(dtype)).all())


def _is_float(dtype: torch.dtype) -> bool:
    """True for the types weights are trained in; 8-bit floats are storage formats with scales of their own."""
    return dtype.is_floating_point and dtype.itemsize >= 2
