"""Comparison: base + adapters and a merged folder, run through the library's own model at once.

They are the two halves of one batch: the first half sees the base's weights and the adapters' factors, the second
half the merged folder's weights. Weights are read from disk a block of rows at a time, so that memory does not grow
with the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..weights.names import EMBEDDING, HEAD
from ..weights.reader import Checkpoint, row_blocks, row_shape
from ..weights.streams import prefetch
from .inputs import MergeInputs
from .merged_model import MergedModel
from .updates import AddBias, Experts, LowRank, Replace, Update

# ---------------------------------------------------------------- base + adapters


@dataclass
class _Stage:
    """One update of a weight, with its tensors: rows change by `left` @ `right` (scaling included in `left`)."""

    adapter: int
    update: Update
    left: Tensor | None = None  # (rows, rank)
    right: Tensor | None = None  # (rank, columns)
    magnitude: Tensor | None = None  # DoRA: (rows,), or (columns,) of a transposed weight
    norm: Tensor | None = None  # (columns,) of a transposed weight under DoRA
    values: Tensor | None = None  # replaced rows, or a change of a bias


class _AdaptedWeight:
    """A weight of the base, or the rows `region` of a stack of experts, with the adapters beside it."""

    def __init__(
        self, model: MergedModel, read: Callable[[int, str], Tensor], name: str, region: tuple[int, int] | None = None
    ):
        """`read`: gives an adapter's tensor."""
        self.model, self.weight = model, model.weights[name]
        self.source = model.base.tensors[self.weight.source]
        self.stages: list[_Stage] = []
        for number, update in model.remaining_updates(self.weight):
            if region and isinstance(update, LowRank) and update.place and not _overlap(update.place, region):
                continue
            stage = _Stage(number, update)
            self.stages.append(stage)
            if isinstance(update, LowRank):
                factors = update.load(partial(read, number))
                left, stage.right = (factors.A.T, factors.B.T) if update.transposed else (factors.B, factors.A)
                stage.left = left * factors.scaling
                stage.norm = self._column_norm() if factors.needs_norm else None
                stage.magnitude = factors.magnitude
            elif not isinstance(update, Replace):
                stage.values = read(number, update.source).float()

    def base_rows(self, index: Tensor) -> Tensor:
        """Rows of the base as float32, zero where the vocabulary grew: (rows, columns)."""
        return _gather(self.model.base, self.source.name, index)

    def _column_norm(self) -> Tensor:
        """DoRA's norm of every column of W + dW, before the last adapter's magnitude and share: (columns,)."""
        total = torch.zeros(self.weight.shape[1], dtype=torch.float64)
        for start, stop in row_blocks(self.weight.shape):
            index = torch.arange(start, stop)
            base = self.base_rows(index)
            total += self.apply(base, index, base[:0], whole=True)[0].double().square().sum(dim=0)
        return total.sqrt().float()

    def apply(
        self, rows: Tensor, index: Tensor, x: Tensor, dtype: torch.dtype | None = None, whole: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The adapted rows `index`, and what they make of `x`, to which low-rank updates are not added but applied.

        Args:
            rows: the base's, (rows, columns); x: (tokens, columns).
            dtype: what rows are rounded to between two adapters; None for none.
            whole: the last adapter counts in full, whatever its share.
        Returns: (rows, columns) and (tokens, rows).
        """
        y = x @ rows.T
        known = index < row_shape(self.source.shape)[0]
        for number, group in itertools.groupby(self.stages, key=lambda stage: stage.adapter):
            if dtype is not None and number != self.stages[0].adapter:
                rows = rows.to(dtype).float()
            before, known_before = (rows, y), known
            for stage in group:
                rows, y = self._step(stage, rows, y, index, x)
                if isinstance(stage.update, Replace):
                    shapes = self.model.adapters[number][1].shapes
                    known = index < row_shape(shapes[stage.update.source])[0]
            share = self.model.shares[number]
            if share != 1.0 and not (whole and number == self.stages[-1].adapter):
                shares = torch.where(known_before, share, 1.0)  # rows that only the adapter has are taken whole
                rows, y = torch.lerp(before[0], rows, shares[:, None]), torch.lerp(before[1], y, shares)
        return rows, y

    def rounded(self, rows: Tensor, base: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Adapted rows as the merge rounds them: after every adapter, as their files would hold them."""
        if dtype.itemsize >= 4 or (not self.stages and dtype == self.source.dtype):
            return rows
        if len({stage.adapter for stage in self.stages}) > 1:
            rows, _ = self.apply(base, index, base[:0], dtype)
        return rows.to(dtype).float()

    def _step(self, stage: _Stage, rows: Tensor, y: Tensor, index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        update = stage.update
        if isinstance(update, Replace):
            rows = _gather(self.model.adapters[stage.adapter][1], update.source, index)
            return rows, x @ rows.T
        if isinstance(update, LowRank):
            return self._low_rank(stage, update, rows, y, index, x)
        assert stage.values is not None
        if isinstance(update, AddBias):
            return rows + stage.values[index, None] * update.scaling, y
        places, which = (index[:, None] == torch.tensor(update.indices)).nonzero(as_tuple=True)
        rows, y = rows.clone(), y.clone()
        rows[places], y[:, places] = stage.values[which], x @ stage.values[which].T
        return rows, y

    @staticmethod
    def _low_rank(
        stage: _Stage, update: LowRank, rows: Tensor, y: Tensor, index: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Source: LoRA, Hu et al. 2021, eq. 3; DoRA, Liu et al. 2024, eq. 5."""
        assert stage.left is not None and stage.right is not None
        if update.place is not None:
            if not update.place[0] <= int(index[0]) < update.place[1]:
                return rows, y
            index = index - update.place[0]
        known = (index < len(stage.left)).float()  # not the rows that only a later adapter has
        index = index.clamp(max=len(stage.left) - 1)
        left = stage.left[index] * known[:, None]
        rows, y = rows + left @ stage.right, y + (x @ stage.right.T) @ left.T
        if stage.magnitude is None:
            return rows, y
        if update.transposed:
            assert stage.norm is not None
            rows = rows * (stage.magnitude / stage.norm)
            return rows, x @ rows.T
        gain = stage.magnitude[index] / torch.linalg.vector_norm(rows, dim=1).clamp_min(1 - known)
        return rows * gain[:, None], y * gain


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _gather(checkpoint: Checkpoint, name: str, index: Tensor) -> Tensor:
    """Rows of a tensor as float32, (len(index), columns); zero beyond its end. `index` rises."""
    count, width = row_shape(checkpoint.tensors[name].shape)
    known = index[index < count].tolist()
    if known and known[-1] - known[0] + 1 == len(known):
        parts = [checkpoint.scan_rows(name, known[0], known[-1] + 1)]
    else:
        parts = [checkpoint.read_rows(name, row, row + 1) for row in known]
    rows = torch.cat([torch.zeros(0, width), *(part.float().view(-1, width) for part in parts)])
    return rows if len(known) == len(index) else torch.cat([rows, rows.new_zeros(len(index) - len(known), width)])


# ---------------------------------------------------------------- both at once


class Comparison:
    """Runs both halves and keeps how far every tensor's outputs are apart.

    Inputs and outputs of its methods hold both halves, base + adapters first, along the first dimension.
    """

    def __init__(self, inputs: MergeInputs, merged: Checkpoint):
        self.weights, self.merged = inputs.model.weights, merged
        self.differences: dict[str, float] = {}  # by tensor, in the order of the model
        self.layers: list[float] = []
        adapters = inputs.model.adapters
        # Experts of a layer share their factors.
        read = lru_cache(maxsize=4 * max(1, len(adapters)))(lambda adapter, name: adapters[adapter][1].read(name))
        self._adapted = partial(_AdaptedWeight, inputs.model, read)
        self._skeleton = Skeleton(inputs)

    def run(self, ids: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Logits of base + adapters and of the merged folder, (2, tokens, vocabulary), of `ids`: (tokens,)."""
        rows = self.weights[EMBEDDING].shape[0]
        if ids.dim() != 1 or not len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise InputError(f"token ids to verify with must be a list of numbers from 0 to {rows - 1}")
        model = self._skeleton.fill(self)
        layers = model.model.layers

        def note(module: nn.Module, args: Any, output: Any) -> None:
            ours, theirs = (output[0] if isinstance(output, tuple) else output).chunk(2)
            self.layers.append(_relative(theirs, ours))
            if progress is not None:
                progress(len(self.layers), len(layers))

        for layer in layers:
            layer.register_forward_hook(note)
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids.expand(2, -1), use_cache=False).logits
        return logits

    def record(self, name: str, got: Tensor, expected: Tensor) -> None:
        """Note how far a tensor's outputs are apart; the largest of its row blocks counts."""
        self.differences[name] = max(self.differences.get(name, 0.0), _relative(got, expected))

    def rows(self, name: str, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of a tensor, rising: (adapted, the same rounded to the stored type, stored), (rows, columns) each."""
        weight = self._adapted(name)
        base = weight.base_rows(index)
        rows, _ = weight.apply(base, index, base[:0])
        rounded = weight.rounded(rows, base, index, self.merged.tensors[name].dtype)
        return rows, rounded, _gather(self.merged, name, index)

    def values(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A small tensor as `rows` gives it, in its own shape."""
        shape = self.weights[name].shape
        adapted, rounded, stored = self.rows(name, torch.arange(row_shape(shape)[0]))
        return adapted.view(shape), rounded.view(shape), stored.view(shape)

    def linear(self, name: str, x: Tensor, region: tuple[int, int] | None = None) -> Tensor:
        """(2 * tokens, columns) -> (2 * tokens, rows), by the rows `region` of the weight, or all."""
        ours, _ = x.chunk(2)
        weight = self._adapted(name, region)
        first, stop = region or (0, self.weights[name].shape[0])
        output = x.new_empty(len(x), stop - first)
        for index, base, stored in prefetch(self._blocks(weight, name, first, stop)):
            rows, y = weight.apply(base, index, ours)
            rounded = weight.rounded(rows, base, index, self.merged.tensors[name].dtype)
            expected = y if rounded is rows else y + ours @ (rounded - rows).T
            got = x @ stored.float().T
            self.record(name, got[: len(ours)], expected)
            place = slice(int(index[0]) - first, int(index[-1]) + 1 - first)
            output[: len(ours), place], output[len(ours) :, place] = y, got[len(ours) :]
        return output

    def _blocks(
        self, weight: _AdaptedWeight, name: str, first: int, stop: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(numbers, base's rows, merged folder's rows) of every row block."""
        for start, end in row_blocks((stop - first, self.weights[name].shape[-1])):
            index = torch.arange(first + start, first + end)
            stored = self.merged.scan_rows(name, first + start, first + end)
            yield index, weight.base_rows(index), stored


def _relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|; infinite for NaN."""
    difference, norm = float(torch.linalg.vector_norm(got - expected)), float(torch.linalg.vector_norm(expected))
    relative = difference / norm if norm else math.inf if difference else 0.0
    return math.inf if math.isnan(relative) else relative


# ---------------------------------------------------------------- modules


class Skeleton:
    """The library's model without weights, and which tensors each of its modules needs.

    Raises: InputError for models that are built otherwise than Llama.
    """

    def __init__(self, inputs: MergeInputs):
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        self._names = {name: weight.shape for name, weight in inputs.model.weights.items()}
        kind = str(inputs.config.get("model_type"))
        if inputs.model.is_reward_model:
            raise InputError("--verify compares the logits of language models; leave it out for a reward model")
        self._unsupported = (
            f"--verify knows models built as Llama is (Llama, Mistral, Mixtral, Qwen); {inputs.base_folder} is a "
            f"{kind} model: leave --verify out"
        )
        if kind not in CONFIG_MAPPING or EMBEDDING not in self._names:
            raise InputError(self._unsupported)
        config = CONFIG_MAPPING[kind].from_dict(inputs.config)
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa"
            )
        inner: Any = getattr(self._model, "model", None)
        if not hasattr(inner, "layers") or not hasattr(inner, "rotary_emb"):
            raise InputError(self._unsupported)
        inner.rotary_emb = type(inner.rotary_emb)(config)  # its frequencies are computed, not loaded
        if any(buffer.is_meta for buffer in self._model.buffers()):
            raise InputError(self._unsupported)
        self._parts = {
            path: self._tensors(path, module)
            for path, module in self._model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        }

    def _tensors(self, path: str, module: nn.Module) -> dict[str, str] | Experts:
        """{parameter: checkpoint name} of a module; its experts, if it holds those of a layer."""
        if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            experts = Experts.of(path.removesuffix(".experts"), self._names)
            if experts is None:
                raise InputError(self._unsupported)
            return experts
        return {name: self._find(f"{path}.{name}") for name, _ in module.named_parameters(recurse=False)}

    def _find(self, name: str) -> str:
        # In memory transformers 5 calls Mixtral's block `mlp`; a tied head has the embeddings' weight.
        for other in (name, name.replace(".mlp.", ".block_sparse_moe."), name.replace(HEAD, EMBEDDING)):
            if other in self._names:
                return other
        raise InputError(self._unsupported)

    def fill(self, comparison: Comparison) -> Any:
        """The model, once: its modules with weights replaced by modules that compare."""
        for path, tensors in self._parts.items():
            module = self._model.get_submodule(path)
            filled: nn.Module
            if isinstance(tensors, Experts):
                filled = _ExpertsModule(comparison, tensors, module.act_fn)
            elif type(module) is nn.Linear:
                filled = _LinearModule(comparison, tensors)
            elif type(module) is nn.Embedding:
                filled = _EmbeddingModule(comparison, tensors)
            else:
                filled = _SmallModule(comparison, tensors, module)
            self._model.set_submodule(path, filled)
        return self._model.eval()


class _LinearModule(nn.Module):
    def __init__(self, comparison: Comparison, tensors: dict[str, str]):
        super().__init__()
        self.comparison, self.tensors = comparison, tensors

    def forward(self, x: Tensor) -> Tensor:
        """(2 * batch, ..., in) -> (2 * batch, ..., out)."""
        y = self.comparison.linear(self.tensors["weight"], x.flatten(0, -2))
        if bias := self.tensors.get("bias"):
            adapted, rounded, stored = self.comparison.values(bias)
            self.comparison.record(bias, stored, rounded)
            ours, theirs = y.chunk(2)
            ours += adapted
            theirs += stored
        return y.view(*x.shape[:-1], -1)


class _EmbeddingModule(nn.Module):
    def __init__(self, comparison: Comparison, tensors: dict[str, str]):
        super().__init__()
        self.comparison, self.name = comparison, tensors["weight"]

    def forward(self, ids: Tensor) -> Tensor:
        """(2, tokens), both halves alike -> (2, tokens, hidden)."""
        index, places = torch.unique(ids[0], return_inverse=True)
        adapted, rounded, stored = self.comparison.rows(self.name, index)
        self.comparison.record(self.name, stored, rounded)
        return torch.stack([adapted[places], stored[places]])


class _SmallModule(nn.Module):
    """Norms, routers and what else there is: their few weights are held whole."""

    def __init__(self, comparison: Comparison, tensors: dict[str, str], module: nn.Module):
        super().__init__()
        self.comparison, self.tensors = comparison, tensors
        self.original = [module]  # in a list, its weights are not this module's

    def forward(self, x: Tensor) -> Any:
        ours, theirs = x.chunk(2)
        values = {name: self.comparison.values(tensor) for name, tensor in self.tensors.items()}
        adapted, rounded, stored = ({name: value[kind] for name, value in values.items()} for kind in range(3))
        output, expected, got, merged = (
            torch.func.functional_call(self.original[0], weights, (part,))
            for weights, part in ((adapted, ours), (rounded, ours), (stored, ours), (stored, theirs))
        )
        single = isinstance(output, Tensor)
        for tensor in self.tensors.values():
            self.comparison.record(tensor, got if single else got[0], expected if single else expected[0])
        if single:
            return torch.cat([output, merged])
        return tuple(torch.cat(pair) for pair in zip(output, merged, strict=True))


class _ExpertsModule(nn.Module):
    """Mixtral's experts, one after the other: out = sum of share * w2(act(w1 x) * w3 x) over a token's experts."""

    def __init__(self, comparison: Comparison, experts: Experts, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.comparison, self.experts, self.activation = comparison, experts, activation

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """x: (2 * tokens, hidden); chosen, shares: (2 * tokens, experts of a token) -> (2 * tokens, hidden)."""
        count = len(x) // 2
        output = torch.zeros_like(x)
        for number in range(self.experts.count):
            token, slot = torch.where(chosen[:count] == number)  # the routing of base + adapters, for both
            if not len(token):
                self._expert(number, x[[0, count]])  # compared all the same
                continue
            both = torch.cat([token, token + count])
            weights = shares[token, slot].repeat(2)[:, None]
            output.index_add_(0, both, self._expert(number, x[both]) * weights)
        return output

    def _expert(self, number: int, x: Tensor) -> Tensor:
        def linear(part: str, values: Tensor) -> Tensor:
            name, region = self.experts.find(number, part)
            return self.comparison.linear(name, values, region)

        return linear("w2", self.activation(linear("w1", x)) * linear("w3", x))
