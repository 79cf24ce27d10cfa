"""Arguments that the evaluations share."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from ..core.arguments import GenerationArguments, arg
from ..core.errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class GreedyArguments(GenerationArguments):
    """How answers are drawn; unlike elsewhere, always the likeliest token by default, and no penalties."""

    do_sample: bool = arg(False, help="Draw each token at random; off: always the likeliest.")
    repetition_penalty: float = arg(1.0, help="Above 1 makes tokens that the prompt or the answer has less likely.")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_beams(self)


def refuse_beams(settings: GenerationArguments) -> None:
    """Raises: InputError for beam search, which the engines of evaluations do not have."""
    if settings.num_beams > 1:
        raise InputError(f"--num_beams {settings.num_beams}: evaluations are answered without beams; leave it out")


def changed_flags(settings: Any, but: tuple[str, ...] = ()) -> list[str]:
    """The flags of a dataclass of arguments that differ from their defaults, without those named in `but`."""
    found = []
    given = getattr(settings, "given", {})  # as they were asked for, where defaults are filled in afterwards
    for field in dataclasses.fields(settings):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if field.name not in but and given.get(field.name, getattr(settings, field.name)) != default:
            found.append(f"--{field.name}")
    return found


def warn_unused(settings: GenerationArguments, why: str, but: tuple[str, ...] = ()) -> None:
    """Say which of these flags were given though nothing is written."""
    if unused := changed_flags(settings, but):
        logger.warning("%s: no effect of %s", why, ", ".join(unused))
