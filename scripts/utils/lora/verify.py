"""Verification: a merged folder against its base with the adapters beside it, as training ran them.

Which tokens are run, what counts as a mistake, and the verdict; comparison.py runs them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import read_json
from ..core.machine import peak_resident_bytes
from ..text.tokenizer import encode_raw
from ..weights.names import EMBEDDING
from ..weights.reader import Checkpoint, open_checkpoint
from .inputs import MergeInputs
from .streamed_model import Comparison, Skeleton
from .updates import ReplaceRows

TOLERANCE = 1e-5  # float32 arithmetic in another order, relative to the largest value or to the norm
TEXT = (
    "The merged model should answer as the adapter did. In 2023 the committee met 14 times; most of its members "
    "agreed. 合并后的模型应当与适配器给出相同的回答。春天来了,山上的花都开了,孩子们在河边唱歌。"
)
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
    text_ids: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerificationReport:
    """Compare the logits of base + adapters with those of the merged folder, and every tensor's effect on the way.

    Adapters are applied as training ran them, y = W x + s B (A x), the merged folder's weights as they are stored;
    both in float32. A tensor passes if, on the inputs that base + adapters produce, its outputs differ from

        y + (round(W') - W') x,    W' = W + s B A

    by at most `tolerance_of` its type, relative, in every block of rows. The second term is what rounding each merged
    weight to the stored type does; in float32 it is zero. It is computed, not bounded, so a mistake shows even where
    it is smaller than the rounding. Where all weights are float32, logits must agree, too, within TOLERANCE of the
    largest for every layer on their way: float32's own errors add up like that. Of half-precision weights no such
    bound is asked: how far rounding moves logits depends on the model, and once every tensor passes, rounding is all
    there is.

    Mixtral: a near-tie in the router would send a token to other experts and say nothing about the merge, so both
    halves take the routing of base + adapters; the router's own outputs are compared as every module's are.

    Args:
        inputs: as `open_merge` gives them, open.
        text_ids: (tokens,) to run; default: a short text and rows from all over the vocabulary, new rows included.
        progress: called with (layers done, layers) after each decoder layer.
    Raises: InputError if the folder cannot be the merge of these inputs (other tensors, shapes or settings), or the
        model is none of the Llama family.
    """
    started = time.monotonic()
    with open_checkpoint(merged_folder) as merged:
        _check_folder(inputs, merged)
        comparison = Comparison(inputs, merged)
        ids = choose_ids(inputs) if text_ids is None else text_ids
        logits = comparison.run(ids, progress)
        return _report(comparison, logits, time.monotonic() - started)


def check_supported(inputs: MergeInputs) -> None:
    """A fast check before anything slow. Raises: InputError if the model is none that can be verified here."""
    Skeleton(inputs)


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
    ours, theirs = logits
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    relative = difference / largest if largest else math.inf if difference else 0.0
    types = {comparison.merged.tensors[name].dtype for name in comparison.differences}
    tolerance = TOLERANCE * len(comparison.layers) if all(dtype.itemsize >= 4 for dtype in types) else None
    limits = {name: tolerance_of(comparison.merged.tensors[name].dtype) for name in comparison.differences}
    # Written so that NaN fails.
    failed = [name for name, value in comparison.differences.items() if not value <= limits[name]]
    passed = not failed and relative <= (math.inf if tolerance is None else tolerance)
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    figures = f"largest logit difference {difference:.3g} of {largest:.3g}, {agreement:.1%} of tokens agree"
    if failed:
        value, more = comparison.differences[failed[0]], f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        verdict = f"first apart at {failed[0]} (by {value:.2g}, allowed {limits[failed[0]]:.2g}){more}; {figures}"
    elif not passed:
        verdict = f"every tensor agrees, but the logits do not: {figures}"
    else:
        verdict = f"the merged model computes what base and adapters do: {figures}"
    return VerificationReport(
        passed=passed,
        verdict=verdict,
        dtypes=sorted(str(dtype).removeprefix("torch.") for dtype in types),
        tokens=len(ours),
        max_abs_logit=largest,
        max_difference=difference,
        relative_difference=relative,
        logit_tolerance=tolerance,
        token_agreement=agreement,
        layer_differences=comparison.layers,
        tensor_differences=comparison.differences,
        failed=failed,
        unchecked=sorted(comparison.merged.tensors.keys() - comparison.differences.keys()),
        seconds=round(seconds, 2),
        peak_memory_gb=round(peak_resident_bytes() / 1e9, 3),
    )
