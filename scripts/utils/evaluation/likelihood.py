"""Likelihood: texts cut so that a model whose context is limited scores each token once, and the losses of windows.

Losses are negative log-likelihoods in nats, those of a token given the tokens before it in its window.

Shapes: N rows, L their length in tokens. The first token of a row is given and not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..core.errors import InputError
from ..gguf.llamacpp import compute_logits
from ..models.lm_loss import install_loss_head, loss_targets
from ..models.rope import find_row_rotary, rotary_key
from ..text.prompts import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096  # scored at once; logits are made in smaller pieces, see utils.models.lm_loss
NARROW = "its weights are damaged, or float16 is too narrow for it; try --dtype bfloat16 or float32"
Progress = Callable[[int], object]  # is told how many more tokens have been scored


@dataclass(frozen=True)
class Window:
    """Tokens that are computed together; those from number `first` (at least 1) on are scored, others are context."""

    ids: Sequence[int]
    first: int

    @property
    def num_scored(self) -> int:
        return len(self.ids) - self.first


def cut_windows(ids: Sequence[int], start: Sequence[int], length: int, stride: int | None = None) -> list[Window]:
    """Cut a document into windows of at most `length` tokens that together score each of its tokens once.

    Args:
        start: BOS, put before every window and not scored; [] for models without: then the document's first token is
            the one that is not scored.
        stride: tokens from the beginning of a window to that of the next; each scores that many new ones, so a token
            has the length - 1 - stride tokens before it at least, where the document has them. None: length - 1, the
            most: windows share no token that is scored.
    Raises: ValueError for lengths and strides that leave tokens out.
    """
    # With BOS that is all the room; without, windows share one token, the context of the next one's first.
    stride = length - 1 if stride is None else stride
    if not 1 <= stride < length:
        raise ValueError(f"cut_windows: stride {stride} and length {length}")
    room = length - len(start)
    windows = []
    done = 0 if start else 1
    for begin in range(0, len(ids), stride):
        end = min(begin + room, len(ids))
        if done < end:  # where strides are short, a window before may have reached the end already
            windows.append(Window([*start, *ids[begin:end]], len(start) + done - begin))
            done = end
    return windows


class Scorer(Protocol):
    """Something that knows the losses of tokens."""

    def window_losses(self, windows: Sequence[Window], progress: Progress | None = None) -> list[float]:
        """The loss of each window: the sum over its scored tokens."""

    def row_losses(self, ids: Tensor, lengths: Sequence[int]) -> dict[int, Tensor]:
        """The losses of the beginnings of rows (N, L), each as in a text of that length.

        Returns: {length: (N, length - 1) float64 on the CPU}.
        """


# ---------------------------------------------------------------- transformers


class LikelihoodScorer:
    """A Scorer on a model of transformers, whose lm_head it takes over."""

    def __init__(self, model: PreTrainedModel, batch_tokens: int | None = None) -> None:
        """Args: batch_tokens: about so many are computed at once; BATCH_TOKENS by default."""
        # In this order: the loss head reads the matrix of a plain lm_head.
        _unwrap_head(model)
        install_loss_head(model)
        self._model, self._batch_tokens = model, batch_tokens or BATCH_TOKENS

    def window_losses(self, windows: Sequence[Window], progress: Progress | None = None) -> list[float]:
        """See Scorer. Windows of like length go through the model together."""
        found = [0.0] * len(windows)
        for numbers in _batches([len(window.ids) for window in windows], self._batch_tokens):
            batch = [windows[number] for number in numbers]
            losses = self._batch_losses(batch).sum(1).tolist()
            for number, loss in zip(numbers, losses, strict=True):
                found[number] = loss
            if progress is not None:
                progress(sum(window.num_scored for window in batch))
        return found

    def _batch_losses(self, windows: Sequence[Window]) -> Tensor:
        """(B, T) float64, 0 where nothing is scored."""
        length = max(len(window.ids) for window in windows)
        ids = torch.zeros(len(windows), length, dtype=torch.long)
        targets = torch.full_like(ids, IGNORE_INDEX)  # padding and context are computed, but get no logits
        for row, window in enumerate(windows):
            tokens = torch.as_tensor(window.ids, dtype=torch.long)
            ids[row, : len(tokens)] = tokens
            # Place t predicts the token at t + 1.
            targets[row, window.first - 1 : len(tokens) - 1] = tokens[window.first :]
        if rotary := find_row_rotary(self._model):
            # By each window's own length: what it is padded to must not change its figures.
            rotary.rotate([len(window.ids) for window in windows])
        return _target_losses(self._model, ids, targets)

    def row_losses(self, ids: Tensor, lengths: Sequence[int]) -> dict[int, Tensor]:
        """See Scorer.

        Without auto-NTK a token's loss does not depend on what follows it: the longest length is computed, the others
        are its beginnings. With it, lengths that have a rotation of their own are computed by themselves.
        """
        rotary = find_row_rotary(self._model)
        groups: dict[int | None, list[int]] = {}
        for length in lengths:
            groups.setdefault(rotary_key(self._model.config, length), []).append(length)
        found: dict[int, Tensor] = {}
        for members in groups.values():
            if rotary is not None:
                rotary.rotate([max(members)])
            losses = token_losses(self._model, ids[:, : max(members)], self._batch_tokens)
            found |= {length: losses[:, : length - 1] for length in members}
        return found


@torch.no_grad()
def _unwrap_head(model: PreTrainedModel) -> None:
    """Put a plain lm_head in the place of one that an adapter wraps; its matrix is what that makes of unit vectors."""
    head = model.get_output_embeddings()
    if not hasattr(head, "base_layer") and not hasattr(head, "original_module"):  # PEFT's names of what it wraps
        return
    embeddings = model.get_input_embeddings().weight
    units = torch.eye(embeddings.shape[1], dtype=embeddings.dtype, device=embeddings.device)
    if bool(head(torch.zeros_like(units[:1])).any()):
        return  # it has a bias, which install_loss_head refuses
    matrix = head(units).T.contiguous()
    plain = torch.nn.Linear(*reversed(matrix.shape), bias=False, device="meta")
    plain.weight = torch.nn.Parameter(matrix, requires_grad=False)
    model.set_output_embeddings(plain)


def token_losses(model: PreTrainedModel, ids: Tensor, batch_tokens: int | None = None) -> Tensor:
    """The losses of rows, of all tokens but the first: (N, L) -> (N, L - 1) float64 on the CPU.

    The model has its LossHead (losses.install_loss_head). Raises: InputError if one is no number.
    """
    # Rows of one length need no sorting; the last place of a row predicts nothing, and is cut off again.
    parts = ids.split(max(1, (batch_tokens or BATCH_TOKENS) // ids.shape[1]))
    last = torch.full_like(ids[:, :1], IGNORE_INDEX)
    targets = torch.cat([ids[:, 1:], last], dim=1).split(len(parts[0]))
    losses = [_target_losses(model, *pair) for pair in zip(parts, targets, strict=True)]
    return torch.cat(losses)[:, :-1]


@torch.no_grad()
def _target_losses(model: PreTrainedModel, ids: Tensor, targets: Tensor) -> Tensor:
    """The losses of `targets`, the tokens that follow: (B, T) float64, 0 where they are IGNORE_INDEX.

    Rows need no attention mask: what pads a shorter one stands behind it, where a causal model does not look.
    """
    with loss_targets(model, targets.to(model.device)):
        losses: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    check_finite(losses, "the model's losses")
    # float64: hundreds of thousands of losses are summed.
    return losses.double().cpu()


def check_finite(values: Tensor, what: str, reason: str = NARROW) -> None:
    """Raises: InputError saying so if one of them is infinite, or no number."""
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{what} are not finite: {reason}")


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """The numbers of rows of like length, the longest first, about `batch_tokens` at a time."""
    # The longest first: whether memory suffices shows at once, and the first row of a batch is its width.
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


# ---------------------------------------------------------------- llama.cpp


class LlamaCppScorer:
    """A Scorer on a model of llamacpp.open_model, whose context holds the longest window."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def window_losses(self, windows: Sequence[Window], progress: Progress | None = None) -> list[float]:
        """See Scorer."""
        found = []
        for window in windows:
            found.append(float(self._losses(window.ids, window.first).sum()))
            if progress is not None:
                progress(window.num_scored)
        return found

    def row_losses(self, ids: Tensor, lengths: Sequence[int]) -> dict[int, Tensor]:
        """See Scorer."""
        longest = torch.stack([self._losses(row, 1) for row in ids[:, : max(lengths)].tolist()])
        return {length: longest[:, : length - 1] for length in lengths}

    def _losses(self, ids: Sequence[int], first: int) -> Tensor:
        """Of the tokens from number `first` on, float64."""
        # The last token predicts nothing that is scored, so it is not computed.
        logits = torch.from_numpy(compute_logits(self._model, ids[:-1])[first - 1 :])
        losses = torch.nn.functional.cross_entropy(logits, torch.as_tensor(ids[first:]), reduction="none").double()
        check_finite(losses, "llama.cpp's losses", "the GGUF file is damaged")
        return losses
