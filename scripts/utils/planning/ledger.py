"""A rehearsal of one training step: the very modules run on tensors without numbers, and what is alive is summed up.

Nothing is estimated by formula here: what autograd keeps of each layer, what checkpointing drops, what the loss needs
at a large vocabulary are those of the code that will run. Fake tensors have shapes, types and storages but no memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

FORWARD, TOP, MIDDLE, BOTTOM, EVALUATION = "forward", "top", "middle", "bottom", "evaluation"
WINDOWS = (FORWARD, TOP, BOTTOM, EVALUATION)


@dataclass(frozen=True)
class Moment:
    """The peak of a part of a step, in bytes.

    Attributes:
        gradients: of trained weights that are there by then.
        activations: everything else but the weights.
    """

    gradients: float = 0
    activations: float = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes of a step; see `rehearse`.

    Attributes:
        frozen, trained: weights and buffers.
        gradients: of all trained weights.
        kept: what the backward pass is to find at the end of the forward pass.
        moments: the peaks of WINDOWS.
        num_trained, num_weights: how many weights; num_packed: of frozen layers in 4 or 8 bits.
        layer_weights: of the largest decoder layer.
    """

    frozen: float
    trained: float
    gradients: float
    kept: float
    num_trained: float
    num_weights: float
    num_packed: float
    layer_weights: float
    moments: dict[str, Moment] = field(default_factory=dict)

    def extended(self, other: Footprint, layers: float) -> Footprint:
        """What this one would be with `layers` more layers, when `other` has one more: all its parts are linear."""

        def line(one: float, two: float) -> float:
            return one + layers * (two - one)

        numbers = {
            name.name: line(getattr(self, name.name), getattr(other, name.name))
            for name in dataclasses.fields(self)
            if name.name not in ("moments", "layer_weights")
        }
        moments = {
            name: Moment(
                line(moment.gradients, other.moments[name].gradients),
                line(moment.activations, other.moments[name].activations),
            )
            for name, moment in self.moments.items()
        }
        return Footprint(**numbers, layer_weights=self.layer_weights, moments=moments)


class Ledger(TorchDispatchMode):
    """Sums up the storages that are alive within the block, and their peak in each window.

    Attributes:
        now: bytes alive.
        gradients: bytes of gradients of parameters among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.gradients = self.weights = 0
        self.window = FORWARD
        self.peaks: dict[str, tuple[int, int]] = {}
        self._known = WeakIdKeyDictionary()

    def count(self, tensors: Any) -> None:
        """Add the storages of tensors that are not known yet; each is taken off when the last tensor of it goes."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    size = storage.nbytes()
                    self._known[storage] = size
                    self.now += size
                    weakref.finalize(storage, self._release, size)
        if self.now > self.peaks.get(self.window, (-1, 0))[0]:
            self.peaks[self.window] = self.now, self.gradients

    def _release(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is torch.ops.aten.nonzero:  # all targets count: the most that a batch can ask
            result = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        elif packet is torch.ops.aten._local_scalar_dense:  # asked by masks: "are these rows nothing special?"
            return False
        elif packet is torch.ops.aten.bincount:  # tokens of each expert: as many for all
            result = _even_counts(args[0].numel(), args[2] if len(args) > 2 else (kwargs or {})["minlength"])
        elif packet is torch.ops.aten._grouped_mm:  # its own rule knows bfloat16 alone
            result = _grouped_product(*args[:3])
        else:
            result = func(*args, **(kwargs or {}))
        self.count(result)
        return result


def _even_counts(total: int, parts: int) -> Tensor:
    """A real tensor (parts,), for it is asked for its numbers."""
    with _disable_current_modes():
        counts = torch.full((parts,), total // parts)
        counts[: total % parts] += 1
    return counts


def _grouped_product(one: Tensor, other: Tensor, ends: Tensor) -> Tensor:
    """A product of stacks: rows of one matrix by turns with the matrices of a stack, or parts of two matrices."""
    if one.dim() == other.dim() == 2:
        return one.new_empty(len(ends), one.shape[0], other.shape[1])
    return one.new_empty(one.shape[-2], other.shape[-1])


class FusedAttention(torch.autograd.Function):
    """What kernels keep of attention: its inputs, its output, and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query (B, H, T, D), key and value (B, G, S, D), mask (B, 1, T, S) -> (B, H, T, D)."""
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # A mask of booleans is made one of numbers for the kernel.
        numbers = mask.to(query.dtype) if mask is not None else None
        ctx.save_for_backward(query, key, value, output, sums, *(() if numbers is None else (numbers,)))
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """torch's scaled_dot_product_attention as a GPU does it, and a CPU, too."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output: Tensor = FusedAttention.apply(query, key, value, attn_mask)
    return output


def rehearse(
    model: nn.Module,
    step: Callable[[Any], Tensor],
    evaluate: Callable[[Any], Any] | None = None,
    *,
    layers: list[nn.Module],
    autocast: torch.dtype | None,
    accumulates: bool,
) -> Footprint:
    """Run a step of a model on the meta device without numbers; the model is of no use afterwards.

    Args:
        step: the model -> its loss; evaluate: what runs without gradients besides.
        layers: the decoder layers, in order.
        autocast: the type of products, None without autocast.
        accumulates: whether gradients of an earlier micro-batch are there already.
    """
    ledger = Ledger()
    # The types and rules of autocast are those of the CPU; a GPU's differ in operations that these models lack.
    products = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
    attention = mock.patch.object(functional, "scaled_dot_product_attention", fused_attention)
    # Fake tensors, which say that they are on a CPU: autocast knows none of the meta device.
    with warnings_off(), attention, FakeTensorMode(allow_non_fake_inputs=True), ledger:
        weights = _fill(model)
        trained = [weight for weight in weights if weight.requires_grad]
        ledger.weights = ledger.now
        size = {True: 0, False: 0}
        for tensor in {id(t.untyped_storage()): t for t in weights}.values():
            size[tensor.requires_grad] += tensor.untyped_storage().nbytes()
        frozen = ledger.now - size[True]
        total = sum(_count(weight) for weight in weights)
        in_layers = max((sum(_count(p) for p in layer.parameters()) for layer in layers), default=0)
        if accumulates:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            ledger.gradients = size[True]
        else:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: _add(ledger, p))
        if evaluate is not None:
            ledger.window = EVALUATION
            with torch.no_grad(), products:
                evaluate(model)
        model.train()
        _mark_layers(layers, ledger)
        ledger.window = FORWARD
        ledger.peaks.pop(FORWARD, None)
        with products:
            loss = step(model)
        kept = ledger.now - ledger.weights - ledger.gradients
        ledger.window = TOP
        loss.backward()
        peaks = {
            name: Moment(gradients, now - ledger.weights - gradients)
            for name, (now, gradients) in ledger.peaks.items()
            if name in WINDOWS
        }
    return Footprint(
        frozen,
        size[True],
        sum(p.numel() * p.element_size() for p in trained),
        kept,
        sum(p.numel() for p in trained),
        total,
        sum(p.stands_for for p in weights if hasattr(p, "stands_for")),
        in_layers,
        peaks,
    )


def _add(ledger: Ledger, parameter: Tensor) -> None:
    assert parameter.grad is not None
    ledger.gradients += parameter.grad.untyped_storage().nbytes()


def _count(parameter: Tensor) -> int:
    return int(getattr(parameter, "stands_for", parameter.numel()))


def _mark_layers(layers: list[nn.Module], ledger: Ledger) -> None:
    """Name the windows of the backward pass: the last layer and the head, those between, the first and the embedding.

    Between two layers the peak is between theirs, so that of the whole is linear in the number of layers.
    """

    def after(window: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if ledger.window == FORWARD and hidden.requires_grad:
                hidden.register_hook(lambda gradient: setattr(ledger, "window", window))

        return hook

    if len(layers) > 1:
        layers[0].register_forward_hook(after(BOTTOM))
    if len(layers) > 2:
        layers[-2].register_forward_hook(after(MIDDLE))


def _fill(model: nn.Module) -> list[Tensor]:
    """Give the model tensors that the ledger knows, one for those that are tied; returns the parameters."""
    made: dict[int, Tensor] = {}
    parameters: list[Tensor] = []
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                        fake.__dict__.update(tensor.__dict__)
                        parameters.append(fake)
                    made[id(tensor)] = fake
                store[name] = made[id(tensor)]
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype, device="cpu"))
    return parameters


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    """Without what libraries say of a rehearsal."""
    import logging
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
