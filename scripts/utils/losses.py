"""Losses over the vocabulary, computed in chunks: logits of all positions never exist at once.

Shapes: B batch, T positions, H hidden size, V vocabulary rows, N scored positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .files import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # targets of positions without loss, the value PyTorch's own losses skip
CHUNK_ELEMENTS = 1 << 24  # logits alive at once: 64 MiB in fp32
WEIGHT_ROWS = 1 << 14  # rows of lm_head whose gradient is added at once


class _SummedNLL(torch.autograd.Function):
    """Sum of token negative log-likelihoods; gradients are made chunk by chunk while the logits are at hand.

    The gradient of a sum is known in the forward pass up to the factor that comes in backward: softmax - one-hot. So every
    chunk of logits is made once, used for loss and gradients, and dropped. Source: the idea of fused linear cross-entropy,
    Hsu et al. 2024, "Liger Kernel", section 3.2.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden (N, H), weight (V, H) in one dtype, targets (N,) without IGNORED -> scalar float32."""
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        rows = chunk_rows(weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows].unsqueeze(1)
            logits = (part @ weight.T).float()
            log_normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (log_normaliser - logits.gather(1, target)).sum()
            if not (needs_hidden or needs_weight):
                continue
            logits.sub_(log_normaliser).exp_()
            logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=logits.dtype))
            grad_logits = logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.matmul(grad_logits, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                for rows_of_weight in range(0, weight.shape[0], WEIGHT_ROWS):
                    block = slice(rows_of_weight, rows_of_weight + WEIGHT_ROWS)
                    grad_weight[block] += grad_logits[:, block].T @ part
        # Kept outside save_for_backward so that backward can hand grad_weight over: a second reference would make autograd
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


class _GradientCast(torch.autograd.Function):
    """A low-precision copy of a weight whose gradient comes back in float32 without passing through that precision."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0].to(ctx.dtype), None


def chunk_rows(vocabulary: int) -> int:
    """How many positions' logits may exist at once (at least 64, so that the matrix products stay efficient)."""
    return max(64, CHUNK_ELEMENTS // vocabulary)


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, without gradient.

    Args: hidden (..., H); weight (V, H); targets (...), IGNORED where there is none.
    Returns: float32 of targets' shape, 0 at ignored positions.
    """
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    result = torch.zeros(flat_targets.shape, dtype=torch.float32, device=hidden.device)
    kept = (flat_targets != IGNORED).nonzero().squeeze(1)
    rows = chunk_rows(weight.shape[0])
    for index in kept.split(rows):
        logits = (flat_hidden[index] @ weight.T).float()
        result[index] = torch.logsumexp(logits, 1) - logits.gather(1, flat_targets[index].unsqueeze(1)).squeeze(1)
    return result.view(targets.shape)


class LossHead(nn.Linear):
    """An lm_head that, while `targets` is set, returns losses instead of logits.

    The loss is computed inside the module's own forward, where DeepSpeed ZeRO-3 and FSDP have gathered the weight.
    With gradients: the scalar sum of the negative log-likelihoods. Without: one value a position, as token_nll.
    """

    targets: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """input (B, T, H) -> logits (B, T, V), or the losses of `targets` (B, T)."""
        if self.targets is None:
            return super().forward(input)
        dtype = (
            torch.get_autocast_dtype(input.device.type)
            if torch.is_autocast_enabled(input.device.type)
            else input.dtype
        )
        with torch.autocast(input.device.type, enabled=False):
            if not torch.is_grad_enabled():
                return token_nll(input.to(dtype), self.weight.to(dtype), self.targets)
            flat_targets = self.targets.reshape(-1)
            kept = (flat_targets != IGNORED).nonzero().squeeze(1)
            hidden = input.reshape(-1, input.shape[-1])[kept].to(dtype)
            weight = _GradientCast.apply(self.weight, dtype) if self.weight.dtype != dtype else self.weight
            return _SummedNLL.apply(hidden, weight, flat_targets[kept])


def install_loss_head(model: PreTrainedModel) -> None:
    """Replace a plain lm_head by a LossHead that shares its weight (a tied weight stays tied)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise InputError(f"{type(model).__name__} has no plain lm_head; need a Llama-family causal language model")
    replacement = LossHead(head.in_features, head.out_features, bias=False, device="meta")
    replacement.weight = head.weight
    model.set_output_embeddings(replacement)


@contextlib.contextmanager
def loss_targets(model: nn.Module, targets: Tensor) -> Iterator[None]:
    """Within the block, the model's forward returns losses of `targets` (B, T) as its "logits"; see LossHead."""
    heads = [module for module in model.modules() if isinstance(module, LossHead)]
    assert heads, "install_loss_head comes first"
    for head in heads:
        head.targets = targets
    try:
        yield
    finally:
        for head in heads:
            head.targets = None
