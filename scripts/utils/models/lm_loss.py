"""Losses over the vocabulary, computed in chunks: logits of all positions never exist at once.

Shapes: B batch, T positions, H hidden size, V vocabulary rows, N scored positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..text.prompts import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_ELEMENTS = 1 << 25  # logits alive at once: 64 MiB in bf16
# Rows whose softmax is in float32 at once: on a CPU few enough to stay in the cache, on a GPU all rows of a chunk.
CPU_SOFTMAX_ROWS = 16
LossKind = Literal["sum", "tokens", "tokens+entropy"]


class _SummedNLL(torch.autograd.Function):
    """Sum of token negative log-likelihoods; gradients are made chunk by chunk while the logits are at hand.

    The gradient of a sum is known in the forward pass up to the factor that comes in backward: softmax - one-hot.
    So every
    chunk of logits is made once, overwritten by its gradient, used for those of hidden and weight, and dropped.
    Source: the idea of fused linear cross-entropy, Hsu et al. 2024, "Liger Kernel", section 3.2.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden (N, H), weight (V, H) in one dtype, targets (N,) without IGNORE_INDEX -> scalar float32."""
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows in chunks(len(hidden), weight.shape[0]):
            logits = hidden[rows] @ weight.T
            total += _to_gradient(logits, targets[rows])[0].sum()
            if grad_hidden is not None:
                torch.matmul(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                # In quarters, since the product takes as much memory as the weight in the low precision.
                for quarter, columns in zip(grad_weight.chunk(4), logits.chunk(4, dim=1), strict=True):
                    quarter += columns.T @ hidden[rows]
        # Kept outside save_for_backward so that backward can hand grad_weight over: a second reference would make
        # autograd
        # copy these V x H floats instead of taking them as the parameter's gradient.
        ctx.gradients = (grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients
        scale = upstream[0]
        if grad_hidden is not None:
            grad_hidden.mul_(scale)
        if grad_weight is not None:
            grad_weight.mul_(scale)
        return grad_hidden, grad_weight, None


class _TokenStatistics(torch.autograd.Function):
    """Negative log-likelihood of each target, and the entropy of each distribution (which has no gradient).

    As in _SummedNLL the gradient of hidden is made in the forward pass, up to each row's factor. That of weight mixes
    the rows, so it needs the factors: where weight is trained, the backward pass makes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """hidden (N, H), weight (V, H) in one dtype, targets (N,) without IGNORE_INDEX -> float32 (N,) and (N,)."""
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies = torch.zeros_like(losses)
        for rows in chunks(len(hidden), weight.shape[0]):
            logits = hidden[rows] @ weight.T
            losses[rows], entropies[rows] = _to_gradient(logits, targets[rows], with_entropy)
            if grad_hidden is not None:
                torch.matmul(logits, weight, out=grad_hidden[rows])
        trained = (hidden, weight, targets) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(*(() if grad_hidden is None else (grad_hidden,)), *trained)
        ctx.mark_non_differentiable(entropies)
        return losses, entropies

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        factors = upstream[0].unsqueeze(1)
        saved = list(ctx.saved_tensors)
        grad_hidden = saved.pop(0) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            hidden, weight, targets = saved
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            for rows in chunks(len(hidden), weight.shape[0]):
                logits = hidden[rows] @ weight.T
                _to_gradient(logits, targets[rows])
                grad_weight += (logits * factors[rows].to(logits)).T @ hidden[rows]
        return None if grad_hidden is None else grad_hidden * factors.to(grad_hidden), grad_weight, None, None


def _to_gradient(logits: Tensor, targets: Tensor, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
    """Overwrite logits (N, V) by softmax - one-hot; returns losses (N,) and entropies (N,), 0 if not asked for.

    All sums and logarithms are in float32.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    entropies = torch.zeros_like(losses)
    step = _softmax_rows(logits)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        part, target = logits[rows], targets[rows].unsqueeze(1)
        highest, chosen = part.amax(1, keepdim=True).float(), part.gather(1, target).float()
        probabilities = torch.softmax(part, 1, dtype=torch.float32)
        # log(sum(exp)) from the likeliest entry, whose probability cannot underflow.
        log_normaliser = highest - probabilities.amax(1, keepdim=True).log()
        losses[rows] = (log_normaliser - chosen).squeeze(1)
        if with_entropy:  # -sum p log p, with log p = logit - log_normaliser
            entropies[rows] = log_normaliser.squeeze(1) - (probabilities * part).sum(1)
        probabilities.scatter_add_(1, target, torch.full_like(chosen, -1.0))
        part.copy_(probabilities)
    return losses, entropies


def _softmax_rows(logits: Tensor) -> int:
    """How many rows of logits have their softmax at once, see CPU_SOFTMAX_ROWS."""
    return CPU_SOFTMAX_ROWS if logits.device.type == "cpu" else max(len(logits), 1)


def chunks(count: int, width: int) -> list[slice]:
    """Cut `count` rows of `width` numbers into equal slices of at most CHUNK_ELEMENTS numbers (but at least 64
    rows)."""
    most = max(64, CHUNK_ELEMENTS // max(width, 1))
    number = max(1, math.ceil(count / most))
    size = max(1, math.ceil(count / number))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _GradientCast(torch.autograd.Function):
    """A low-precision copy of a weight whose gradient comes back in float32 without passing through that precision."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0].to(ctx.dtype), None


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, without gradient.

    Args: hidden (..., H); weight (V, H); targets (...), IGNORE_INDEX where there is none.
    Returns: float32 of targets' shape, 0 at ignored positions.
    """
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    result = torch.zeros(flat_targets.shape, dtype=torch.float32, device=hidden.device)
    kept = (flat_targets != IGNORE_INDEX).nonzero().squeeze(1)
    for rows in chunks(len(kept), weight.shape[0]):
        logits = flat_hidden[kept[rows]] @ weight.T
        step = _softmax_rows(logits)
        for part, index in zip(logits.split(step), kept[rows].split(step), strict=True):
            part, target = part.float(), flat_targets[index].unsqueeze(1)
            result[index] = torch.logsumexp(part, 1) - part.gather(1, target).squeeze(1)
    return result.view(targets.shape)


class LossHead(nn.Linear):
    """An lm_head that, while `request` is set, returns losses instead of logits.

    The loss is computed inside the module's own forward, where DeepSpeed ZeRO-3 and FSDP have gathered the weight.
    """

    request: LossRequest | None = None
    has_answered = False

    def forward(self, input: Tensor) -> Tensor:
        """input (B, T, H) -> logits (B, T, V), or what `request` asks for."""
        if self.request is None:
            return super().forward(input)
        self.has_answered = True
        targets, kind = self.request.targets, self.request.kind
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        with torch.autocast(device, enabled=False):
            if kind == "sum" and not torch.is_grad_enabled():
                return token_nll(input.to(dtype), self.weight.to(dtype), targets)
            kept = (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
            hidden = input.reshape(-1, input.shape[-1])[kept].to(dtype)
            if self.request.temperature != 1:
                hidden = hidden / self.request.temperature  # the head has no bias, so this divides the logits
            weight = _GradientCast.apply(self.weight, dtype) if self.weight.dtype != dtype else self.weight
            if kind == "sum":
                return _SummedNLL.apply(hidden, weight, targets.reshape(-1)[kept])
            losses = _TokenStatistics.apply(hidden, weight, targets.reshape(-1)[kept], kind == "tokens+entropy")
            places = [
                input.new_zeros(targets.numel(), dtype=torch.float32).index_copy(0, kept, part) for part in losses
            ]
            if kind == "tokens":
                return places[0].view(targets.shape)
            return torch.stack(places, -1).view(*targets.shape, 2)


@dataclass(frozen=True)
class LossRequest:
    """What a LossHead computes of `targets` (B, T), the next tokens or IGNORE_INDEX; see loss_targets."""

    targets: Tensor
    kind: LossKind = "sum"
    temperature: float = 1.0


def install_loss_head(model: PreTrainedModel) -> None:
    """Replace a plain lm_head by a LossHead that shares its weight (a tied weight stays tied)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise InputError(f"{type(model).__name__} has no plain lm_head; need a Llama-family causal language model")
    model.set_output_embeddings(_as_loss_head(head))


def _as_loss_head(head: nn.Linear) -> LossHead:
    replacement = LossHead(head.in_features, head.out_features, bias=False, device="meta")
    replacement.weight = head.weight
    return replacement


def restore_loss_heads(wrapped: nn.Module) -> None:
    """Let the trained copies of a LossHead be LossHeads in a PEFT model, too.

    Where the head is tied to embeddings that are trained whole, PEFT makes a plain Linear around their matrix.
    """
    from peft.utils import ModulesToSaveWrapper

    for wrapper in wrapped.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and isinstance(wrapper.original_module, LossHead):
            for name, head in wrapper.modules_to_save.items():
                wrapper.modules_to_save[name] = head if isinstance(head, LossHead) else _as_loss_head(head)


@contextlib.contextmanager
def loss_targets(
    model: nn.Module, targets: Tensor, kind: LossKind = "sum", temperature: float = 1.0
) -> Iterator[None]:
    """Within the block, the model's forward returns losses of `targets` (B, T) as its "logits".

    Args:
        kind: "sum", the scalar sum of the negative log-likelihoods (without gradients: each one, (B, T));
            "tokens", each negative log-likelihood (B, T), 0 at ignored positions;
            "tokens+entropy", (B, T, 2), with the entropy of each distribution in nats, which has no gradient.
        temperature: logits are divided by it.
    """
    heads = [module for module in model.modules() if isinstance(module, LossHead)]
    assert heads, "install_loss_head comes first"
    for head in heads:
        head.request, head.has_answered = LossRequest(targets, kind, temperature), False
    try:
        yield
        # Else its logits would be taken for losses, and their sum be trained.
        assert any(head.has_answered for head in heads), "the head that computed is no LossHead"
    finally:
        for head in heads:
            head.request = None
