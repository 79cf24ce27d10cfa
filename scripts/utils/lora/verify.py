"""Verification: a merged folder against its base with the adapters beside it, as training ran them.

Both are run at once through transformers' own model, as parts of one batch: the first sees the base's weights and the
adapters' factors, the second the merged folder's weights, and a third the base's alone, which says how much the
adapters do. Weights are read from disk a block of rows at a time, so that memory does not grow with the model. First
which tokens are run, what counts as a mistake and the verdict; then the parts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.files import read_json
from ..core.machine import peak_resident_bytes
from ..text.tokenizer import encode_raw
from ..weights.names import EMBEDDING, FUSED_PARTS, Experts
from ..weights.reader import Checkpoint, open_checkpoint, row_blocks, row_shape
from ..weights.streams import prefetch
from .chat_vector import AddDifference
from .inputs import MergeInputs
from .merged_model import MergedModel
from .streamed_model import StreamedModel
from .updates import AddBias, LowRank, Replace, ReplaceRows, Update

FLAG = "--verify"
TOLERANCE = 1e-5  # float32 arithmetic in another order, relative to the largest value or to the norm
TEXT = (
    "The merged model should answer as the adapter did. In 2023 the committee met 14 times; most of its members "
    "agreed. 合并后的模型应当与适配器给出相同的回答。春天来了,山上的花都开了,孩子们在河边唱歌。"
)
LARGEST_ROUNDING = 0.5  # how far rounding may move the logits, in units of how far the adapters do
NUM_TEXT_TOKENS, NUM_ROWS = 64, 16
_FREE_KEYS = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}  # may differ in the merged config.json


@dataclass
class VerificationReport:
    """How far base + adapters and the merged folder are apart.

    Differences of tensors are relative norms of module outputs, both fed the same input; those of layers and logits
    are end to end.
    """

    passed: bool
    verdict: str  # one sentence
    dtypes: list[str]  # types of the merged weights
    tokens: int
    max_abs_logit: float
    max_difference: float  # of two logits
    relative_difference: float  # max_difference / max_abs_logit
    logit_tolerance: float | None  # of relative_difference; None where rounded weights decide it
    token_agreement: float  # of positions, how many have the same likeliest next token, 0-1
    rounding_of_effect: float | None  # |merged - adapted| / |adapted - base| of all logits; None without effect
    layer_differences: list[float]  # hidden states after each layer
    tensor_differences: dict[str, float]  # in the order of the model
    failed: list[str]  # tensors beyond their tolerance, in the order of the model
    unchecked: list[str]  # tensors of the folder that the model does not use
    seconds: float
    peak_memory_gb: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def verify_merge(
    inputs: MergeInputs,
    merged_folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> VerificationReport:
    """Compare the logits of base + adapters with those of the merged folder, and every tensor's effect on the way.

    Adapters are applied as training ran them, y = W x + s B (A x), the merged folder's weights as they are stored;
    both in float32. A tensor passes if, on the inputs that base + adapters produce, its outputs differ from

        y + (round(W') - W') x,    W' = W + s B A

    by at most `tolerance_of` its type, relative, in every block of rows. The second term is what rounding each merged
    weight to the stored type does; in float32 it is zero. It is computed, not bounded, so a mistake shows even where
    it is smaller than the rounding. Where all weights are float32, logits must agree, too, within TOLERANCE of the
    largest for every layer on their way: float32's own errors add up like that. How far half-precision weights move
    logits by rounding depends on the model; once every tensor passes, rounding is all there is. It is measured by what
    the adapters do: a change smaller than half a weight's last place is rounded away, and then the folder is the base
    again, whose logits are as far from those of base + adapters as can be. Beyond LARGEST_ROUNDING nothing is passed.

    Mixtral: a near-tie in the router would send a token to other experts and say nothing about the merge, so all
    parts take the routing of base + adapters; the router's own outputs are compared as every module's are.

    Args:
        inputs: as `open_merge` gives them, open.
        progress: called with (layers done, layers) after each decoder layer.
    Raises: InputError if the folder cannot be the merge of these inputs (other tensors, shapes or settings), or the
        model is none of the Llama family.
    """
    started = time.monotonic()
    with open_checkpoint(merged_folder) as merged:
        _check_folder(inputs, merged)
        comparison = Comparison(inputs, merged)
        logits = comparison.run(choose_ids(inputs), progress)
        return _report(comparison, logits, time.monotonic() - started)


def check_supported(inputs: MergeInputs) -> None:
    """A fast check before anything slow. Raises: InputError if the model is none that can be verified here."""
    StreamedModel(inputs, FLAG)


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference of a tensor's outputs that is no mistake: TOLERANCE, and half the unit of rounding.

    The merge and this module add the change in float32 in another order, so that their sums differ in float32's last
    places, by some 2^-22. Those as near as that to the middle between two bfloat16 or float16 numbers are rounded
    apart by one step, 2u (u = 2^-8 or 2^-11): at most one weight in 2^11, or u / 20 of the norm. Half of u leaves room
    for small tensors, where a single such weight counts more.
    """
    return TOLERANCE + (torch.finfo(dtype).eps / 4 if dtype.itemsize < 4 else 0.0)


def choose_ids(inputs: MergeInputs) -> Tensor:
    """Token ids to run: the built-in text, then rows from all over the vocabulary, new and retrained ones in
    particular: (tokens,)."""
    weight = inputs.model.weights[EMBEDDING]
    rows, old_rows = weight.shape[0], inputs.model.base.shapes[EMBEDDING][0]
    if inputs.tokenizer is not None:
        text = encode_raw(TEXT, inputs.tokenizer)[:NUM_TEXT_TOKENS]
    else:
        text = torch.randint(rows, (NUM_TEXT_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    retrained = [i for _, update in weight.updates if isinstance(update, ReplaceRows) for i in update.indices]
    places = [*torch.linspace(0, rows - 1, NUM_ROWS).long().tolist(), *retrained[:NUM_ROWS]]
    if rows > old_rows:
        places += torch.linspace(old_rows, rows - 1, NUM_ROWS).long().tolist()
    places = list(dict.fromkeys(places))
    room = inputs.config.get("max_position_embeddings") or len(text) + len(places)
    return torch.tensor([*text[: max(1, room - len(places))], *places][:room])


def _check_folder(inputs: MergeInputs, merged: Checkpoint) -> None:
    """Raises: InputError if the folder's tensors, shapes or settings are not those of the merge."""
    problems = []
    expected = {name: weight.shape for name, weight in inputs.model.weights.items()}
    for name in sorted(expected.keys() | merged.shapes.keys()):
        if expected.get(name) != merged.shapes.get(name):
            problems.append(f"{name}: shape {merged.shapes.get(name)}, need {expected.get(name)}")
    config = read_json(merged.folder / "config.json")
    for key in sorted((inputs.config.keys() | config.keys()) - _FREE_KEYS):
        if inputs.config.get(key) != config.get(key):
            problems.append(f"config.json: {key} is {config.get(key)}, need {inputs.config.get(key)}")
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(
            f"{merged.folder} is not the merge of this base and these adapters; merge again:\n  "
            + "\n  ".join(problems[:8])
            + more
        )


def _report(comparison: Comparison, logits: Tensor, seconds: float) -> VerificationReport:
    ours, theirs, base = logits
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    relative = difference / largest if largest else math.inf if difference else 0.0
    types = {comparison.merged.tensors[name].dtype for name in comparison.differences}
    names = sorted(str(dtype).removeprefix("torch.") for dtype in types)
    tolerance = TOLERANCE * len(comparison.layers) if all(dtype.itemsize >= 4 for dtype in types) else None
    limits = {name: tolerance_of(comparison.merged.tensors[name].dtype) for name in comparison.differences}
    # Written so that NaN fails.
    failed = [name for name, value in comparison.differences.items() if not value <= limits[name]]
    effect, deviation = (float(torch.linalg.vector_norm(ours - other)) for other in (base, theirs))
    rounding = deviation / effect if effect else None
    same = relative <= (math.inf if tolerance is None else tolerance)
    passed = not failed and same and (rounding is None or rounding <= LARGEST_ROUNDING)
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    figures = f"largest logit difference {difference:.3g} of {largest:.3g}, {agreement:.1%} of tokens agree"
    stored = " and ".join(names)
    if failed:
        value, more = comparison.differences[failed[0]], f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        verdict = f"first apart at {failed[0]} (by {value:.2g}, allowed {limits[failed[0]]:.2g}){more}; {figures}"
    elif not same:
        verdict = f"every tensor agrees, but the logits do not: {figures}"
    elif not passed:
        verdict = (
            f"rounding to {stored} moves the logits {rounding:.2f} times as far as the adapters do, so "
            f"that little of them is left: {figures}; merge with --dtype float32, or train the adapters further"
        )
    else:
        verdict = f"the merged model computes what base and adapters do: {figures}"
        if tolerance is None:
            share = "" if rounding is None else f", here {rounding:.3f}"
            verdict = (
                f"the merged model is base and adapters rounded to {stored} (every tensor is just that, and rounding "
                f"may move the logits {LARGEST_ROUNDING:.0%} as far as the adapters do{share}): {figures}"
            )
    return VerificationReport(
        passed=passed,
        verdict=verdict,
        dtypes=names,
        tokens=len(ours),
        max_abs_logit=largest,
        max_difference=difference,
        relative_difference=relative,
        logit_tolerance=tolerance,
        token_agreement=agreement,
        rounding_of_effect=rounding,
        layer_differences=comparison.layers,
        tensor_differences=comparison.differences,
        failed=failed,
        unchecked=sorted(comparison.merged.tensors.keys() - comparison.differences.keys()),
        seconds=round(seconds, 2),
        peak_memory_gb=round(peak_resident_bytes() / 1e9, 3),
    )


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
            assert not isinstance(update, AddDifference), "the merge refuses --verify with a chat vector"
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
        """DoRA's norm of every column of W + dW, before the last adapter's magnitude and weight: (columns,)."""
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
            whole: the last adapter counts in full, whatever its weight.
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
            weight = self.model.adapter_weights[number]
            if weight != 1.0 and not (whole and number == self.stages[-1].adapter):
                weights = torch.where(known_before, weight, 1.0)  # rows that only the adapter has are taken whole
                rows, y = torch.lerp(before[0], rows, weights[:, None]), torch.lerp(before[1], y, weights)
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


# ---------------------------------------------------------------- all at once


class Comparison:
    """Runs the three parts and keeps how far the outputs of every tensor of the first two are apart.

    Inputs and outputs of its methods hold base + adapters, the merged folder and the base alone along the first
    dimension.
    """

    def __init__(self, inputs: MergeInputs, merged: Checkpoint):
        self.weights, self.merged = inputs.model.weights, merged
        self.differences: dict[str, float] = {}  # by tensor, in the order of the model
        self.layers: list[float] = []
        adapters = inputs.model.adapters
        # Experts of a layer share their factors.
        read = lru_cache(maxsize=4 * max(1, len(adapters)))(lambda adapter, name: adapters[adapter][1].read(name))
        self._adapted = partial(_AdaptedWeight, inputs.model, read)
        self._streamed = StreamedModel(inputs, FLAG)

    def run(self, ids: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Logits of the three parts, (3, tokens, vocabulary), of `ids`: (tokens,)."""
        rows = self.weights[EMBEDDING].shape[0]
        if ids.dim() != 1 or not len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise InputError(f"token ids to verify with must be a list of numbers from 0 to {rows - 1}")
        model = self._fill()
        layers = model.model.layers

        def note(module: nn.Module, args: Any, output: Any) -> None:
            ours, theirs, _ = (output[0] if isinstance(output, tuple) else output).chunk(3)
            self.layers.append(_relative(theirs, ours))
            if progress is not None:
                progress(len(self.layers), len(layers))

        for layer in layers:
            layer.register_forward_hook(note)
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids.expand(3, -1), use_cache=False).logits
        return logits

    def _fill(self) -> Any:
        """The model, once: its modules with weights replaced by modules that compare."""
        model, shapes = self._streamed.model, {name: weight.shape for name, weight in self.weights.items()}
        for path, module in list(model.named_modules()):
            own = [name for name, _ in module.named_parameters(recurse=False)]
            if not own:
                continue
            experts = Experts.of(path, shapes) if set(own) == FUSED_PARTS.keys() else None
            tensors = {name: str(self._streamed.sources[f"{path}.{name}"]) for name in own}
            filled: nn.Module
            if experts is not None:
                filled = _ExpertsModule(self, experts, module.act_fn)
            elif type(module) is nn.Linear:
                filled = _LinearModule(self, tensors)
            elif isinstance(module, nn.Embedding):
                filled = _EmbeddingModule(self, tensors, float(getattr(module, "scalar_embed_scale", 1.0)))
            else:
                filled = _SmallModule(self, tensors, module)
            model.set_submodule(path, filled)
        return model

    def record(self, name: str, got: Tensor, expected: Tensor) -> None:
        """Note how far a tensor's outputs are apart; the largest of its row blocks counts."""
        self.differences[name] = max(self.differences.get(name, 0.0), _relative(got, expected))

    def rows(self, name: str, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of a tensor, rising: (adapted, rounded to the stored type, stored, base's), (rows, columns) each."""
        weight = self._adapted(name)
        base = weight.base_rows(index)
        rows, _ = weight.apply(base, index, base[:0])
        rounded = weight.rounded(rows, base, index, self.merged.tensors[name].dtype)
        return rows, rounded, _gather(self.merged, name, index), base

    def values(self, name: str) -> list[Tensor]:
        """A small tensor as `rows` gives it, in its own shape."""
        shape = self.weights[name].shape
        return [rows.view(shape) for rows in self.rows(name, torch.arange(row_shape(shape)[0]))]

    def linear(self, name: str, x: Tensor, region: tuple[int, int] | None = None) -> Tensor:
        """(3 * tokens, columns) -> (3 * tokens, rows), by the rows `region` of the weight, or all."""
        ours, theirs, alone = x.chunk(3)
        weight = self._adapted(name, region)
        first, stop = region or (0, self.weights[name].shape[0])
        output = x.new_empty(len(x), stop - first)
        for index, base, stored in prefetch(self._blocks(weight, name, first, stop)):
            rows, y = weight.apply(base, index, ours)
            rounded = weight.rounded(rows, base, index, self.merged.tensors[name].dtype)
            expected = y if rounded is rows else y + ours @ (rounded - rows).T
            stored = stored.float()
            self.record(name, ours @ stored.T, expected)
            place = slice(int(index[0]) - first, int(index[-1]) + 1 - first)
            output[:, place] = torch.cat([y, theirs @ stored.T, alone @ base.T])
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


# ---------------------------------------------------------------- modules that compare


class _LinearModule(nn.Module):
    def __init__(self, comparison: Comparison, tensors: dict[str, str]):
        super().__init__()
        self.comparison, self.tensors = comparison, tensors

    def forward(self, x: Tensor) -> Tensor:
        """(2 * batch, ..., in) -> (2 * batch, ..., out)."""
        y = self.comparison.linear(self.tensors["weight"], x.flatten(0, -2))
        if bias := self.tensors.get("bias"):
            adapted, rounded, stored, base = self.comparison.values(bias)
            self.comparison.record(bias, stored, rounded)
            for part, value in zip(y.chunk(3), (adapted, stored, base), strict=True):
                part += value
        return y.view(*x.shape[:-1], -1)


class _EmbeddingModule(nn.Module):
    def __init__(self, comparison: Comparison, tensors: dict[str, str], scale: float):
        """`scale`: what rows are multiplied by, not 1 in Gemma."""
        super().__init__()
        self.comparison, self.name, self.scale = comparison, tensors["weight"], scale

    def forward(self, ids: Tensor) -> Tensor:
        """(3, tokens), all parts alike -> (3, tokens, hidden)."""
        index, places = torch.unique(ids[0], return_inverse=True)
        adapted, rounded, stored, base = self.comparison.rows(self.name, index)
        self.comparison.record(self.name, stored, rounded)
        return torch.stack([adapted[places], stored[places], base[places]]) * self.scale


class _SmallModule(nn.Module):
    """Norms, routers and what else there is: their few weights are held whole."""

    def __init__(self, comparison: Comparison, tensors: dict[str, str], module: nn.Module):
        super().__init__()
        self.comparison, self.tensors = comparison, tensors
        self.original = [module]  # in a list, its weights are not this module's

    def forward(self, x: Tensor) -> Any:
        ours, theirs, alone = x.chunk(3)
        values = {name: self.comparison.values(tensor) for name, tensor in self.tensors.items()}
        adapted, rounded, stored, base = ({name: value[kind] for name, value in values.items()} for kind in range(4))
        output, expected, got, merged, plain = (
            torch.func.functional_call(self.original[0], weights, (part,))
            for weights, part in (
                (adapted, ours), (rounded, ours), (stored, ours), (stored, theirs), (base, alone)
            )
        )  # fmt: skip
        single = isinstance(output, Tensor)
        for tensor in self.tensors.values():
            self.comparison.record(tensor, got if single else got[0], expected if single else expected[0])
        if single:
            return torch.cat([output, merged, plain])
        return tuple(torch.cat(parts) for parts in zip(output, merged, plain, strict=True))


class _ExpertsModule(nn.Module):
    """Mixtral's experts, one after the other: out = sum of routing * w2(act(w1 x) * w3 x) over a token's experts."""

    def __init__(self, comparison: Comparison, experts: Experts, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.comparison, self.experts, self.activation = comparison, experts, activation

    def forward(self, x: Tensor, chosen: Tensor, routing: Tensor) -> Tensor:
        """x: (3 * tokens, hidden); chosen, routing: (3 * tokens, experts of a token) -> (3 * tokens, hidden)."""
        count = len(x) // 3
        output = torch.zeros_like(x)
        for number in range(self.experts.count):
            token, slot = torch.where(chosen[:count] == number)  # the routing of base + adapters, for all
            if not len(token):
                self._expert(number, x[[0, count, 2 * count]])  # compared all the same
                continue
            rows = torch.cat([token, token + count, token + 2 * count])
            weights = routing[token, slot].repeat(3)[:, None]
            output.index_add_(0, rows, self._expert(number, x[rows]) * weights)
        return output

    def _expert(self, number: int, x: Tensor) -> Tensor:
        def linear(part: str, values: Tensor) -> Tensor:
            name, region = self.experts.find(number, part)
            return self.comparison.linear(name, values, region)

        return linear("w2", self.activation(linear("w1", x)) * linear("w3", x))
