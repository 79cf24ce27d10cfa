"""Chat vectors: what tuning changed in a model, the difference of two checkpoints, to be added to another one.

Source: Huang et al. 2023, "Chat Vector: A Simple Approach to Equip LLMs with Instruction Following and Model Alignment
in New Languages".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..core.errors import InputError
from ..weights.model_folder import some_of
from ..weights.names import EMBEDDING, HEAD, find_spelling
from ..weights.reader import Checkpoint, row_shape


@dataclass(frozen=True)
class AddDifference:
    """To the first `rows` rows of a weight, those of `tuned` are added and those of `plain` taken away."""

    tuned: str
    plain: str
    rows: int


class ChatVector:
    """The weights of a tuned model minus those of the model it was tuned from, times `share`."""

    def __init__(self, tuned: Checkpoint, plain: Checkpoint, share: float = 1.0):
        self.tuned, self.plain, self.share = tuned, plain, share

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, AddDifference]:
        """What is added to each weight of a model, `shapes`; nothing to those that neither of the two has.

        Raises: InputError listing the weights that only one of the two has, or that have other shapes.
        """
        steps, problems = {}, []
        for name, shape in shapes.items():
            found = [_find(name, checkpoint) for checkpoint in (self.tuned, self.plain)]
            others = [c.shapes[n] for c, n in zip((self.tuned, self.plain), found, strict=True) if n is not None]
            if not others:
                continue
            # Vocabularies grow: their rows are those of the tokens that all three have.
            part = slice(1, None) if name in (EMBEDDING, HEAD) else slice(None)
            if len(others) == 1:
                lacking = self.tuned if found[0] is None else self.plain
                problems.append(f"{name} (absent in {lacking.folder})")
            elif any(other[part] != shape[part] for other in others):
                problems.append(f"{name} ({list(shape)}, {list(others[0])} and {list(others[1])})")
            else:
                count = min(row_shape(each)[0] for each in (shape, *others))
                steps[name] = AddDifference(str(found[0]), str(found[1]), count)
        if problems or not steps:
            raise InputError(
                f"the chat vector of {self.tuned.folder} and {self.plain.folder} does not fit: "
                f"{some_of(problems) or 'no weight has the name of one of the model'}; need three models of one "
                "architecture and size, the model trained on, the chat model, and what both were trained from"
            )
        return steps

    def notes(self, rows: int | None) -> list[str]:
        """What the user should hear of; `rows`: of the embeddings of the model that it is added to."""
        tuned, plain = (checkpoint.shapes.get(EMBEDDING, (0,))[0] for checkpoint in (self.tuned, self.plain))
        both, notes = min(tuned, plain), []
        if rows is not None and rows > both:
            notes.append(
                f"the chat vector has {both} rows of embed_tokens; the {rows - both} after them do not change"
            )
        if tuned > plain:
            notes.append(f"{self.tuned.folder} has {tuned - plain} rows more than {self.plain.folder}: not taken")
        return notes

    def add(self, step: AddDifference, rows: Tensor, start: int) -> Tensor:
        """Float32 rows of a weight from row `start` on, with the whole difference added.

        Raises: InputError if either model holds NaN or infinity there.
        """
        stop = min(start + len(rows), step.rows)
        if stop <= start:
            return rows
        read = partial(Checkpoint.read_rows, start=start, stop=stop)
        difference = read(self.tuned, step.tuned).float() - read(self.plain, step.plain).float()
        if not bool(difference.isfinite().all()):
            raise InputError(
                f"{step.tuned} of {self.tuned.folder} or of {self.plain.folder} holds NaN or infinity; download again"
            )
        rows = rows.clone()
        rows[: stop - start] += difference
        return rows


def _find(name: str, checkpoint: Checkpoint) -> str | None:
    """A weight by its name here; a head that is tied is the embeddings."""
    found = find_spelling(name, checkpoint.tensors)
    if found is None and name == HEAD and HEAD not in checkpoint.tensors:
        return find_spelling(EMBEDDING, checkpoint.tensors)
    return found
