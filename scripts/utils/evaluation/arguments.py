"""Arguments that the evaluations share."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.arguments import GenerationArguments, arg


@dataclass
class GreedyArguments(GenerationArguments):
    """How answers are drawn; unlike elsewhere, always the likeliest token by default, and no penalties."""

    do_sample: bool = arg(False, help="Draw each token at random; off: always the likeliest.")
    repetition_penalty: float = arg(1.0, help="Above 1 makes tokens that the prompt or the answer has less likely.")
