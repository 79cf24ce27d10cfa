"""Weights made ready for decoding: packed as the processor reads them, and adapters in training folded in meanwhile.

Decoding a token reads every weight once for a few rows, so it can be as fast as the memory, and no faster. oneDNN
rearranges bf16 weights as they lie in files within every product; packed once, they are read as they are. Small models
spend more on the number of their products: an adapter makes three out of each.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.machine import available_bytes
from ..models.loading import causal_model

logger = logging.getLogger(__name__)

# Layers of a block that are given one and the same input: one product serves them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ROWS = 16  # what the layout is chosen for; it serves other numbers of rows too


class PackedLinear(nn.Module):
    """Linear layers of the same input as one product, for inference alone.

    Attributes:
        weight: (out_features, in_features), opaque; `to_dense` gives the numbers.
    """

    def __init__(self, layers: Sequence[nn.Linear], shared: bool = False) -> None:
        """`shared`: the weight stays in use elsewhere too, so this one is a copy and no parameter of the model."""
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.in_features, self.out_features = layers[0].in_features, sum(self.sizes)
        weights = [layer.weight.detach() for layer in layers]
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights) if len(weights) > 1 else weights[0], ROWS)
        bias = None
        if any(layer.bias is not None for layer in layers):
            none = weights[0].new_zeros
            bias = torch.cat([none(layer.out_features) if layer.bias is None else layer.bias for layer in layers])
        for name, tensor in (("weight", weight), ("bias", bias)):
            if shared or tensor is None:
                self.register_buffer(name, tensor, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # of that input, what nobody has fetched yet

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        """A copy is a plain layer, which torch can copy and convert again."""
        copied = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        copied.weight = nn.Parameter(self.weight.detach().to_dense(), requires_grad=False)
        if self.bias is not None:
            copied.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return copied

    def fetch(self, x: Tensor, number: int) -> Tensor:
        """What one of the layers makes of an input; the first that is asked computes all of them."""
        if x is not self._input or number not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(self(x).split(self.sizes, -1)))
        output = self._outputs.pop(number)
        if not self._outputs:  # or a long prompt's states would stay until the next pass
            self._input = None
        return output


class JoinedLinear(nn.Module):
    """One of several layers that a PackedLinear computes together; that stands in the first of them."""

    def __init__(self, packed: PackedLinear, number: int) -> None:
        super().__init__()
        self._number = number
        self._packed = (packed,)  # within a tuple it is no part of this module
        self.in_features, self.out_features = packed.in_features, packed.sizes[number]
        if number == 0:
            self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self._packed[0].fetch(x, self._number)


def pays_here() -> bool:
    """Whether this processor multiplies in bf16, for which alone packed weights are faster than plain ones."""
    return bool(torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def prepack(model: Any, compiled: bool = False) -> None:
    """Pack the bf16 weights of a model's linear layers on the CPU, in place; it then serves inference alone.

    Adapters stay beside the layers that they change; quantised layers, and whatever is no plain linear layer, as they
    are.
    Args: compiled: torch.compile, which cannot look into packed weights, is at work around the layers.
    """
    start, count, extra = time.perf_counter(), 0, 0
    embedding = causal_model(model).get_input_embeddings().weight
    for path, parent in list(model.named_modules()):
        if ".lora_" in path or hasattr(parent, "base_layer"):  # an adapter's own, and what is seen from its owner
            continue
        groups: list[tuple[str, ...]] = [
            names for names in SIBLINGS if all(_plain(getattr(parent, name, None)) for name in names)
        ]
        groups += [(name,) for name, child in parent.named_children() if _plain(child) and name not in sum(groups, ())]
        for group in groups:
            owners = [_owner(parent, name) for name in group]
            layers = [getattr(*owner) for owner in owners]
            packed = PackedLinear(layers, shared := layers[0].weight is embedding)
            for number, (owner, name) in enumerate(owners):
                layer: Any = packed if len(group) == 1 else JoinedLinear(packed, number)
                if compiled:
                    layer.forward = torch.compiler.disable(layer.forward)
                setattr(owner, name, layer)
            count += len(group)
            extra += shared * packed.weight.nbytes
    if count:
        logger.info(
            "%d linear layers packed for this processor in %.1f s%s",
            *(count, time.perf_counter() - start),
            f", {extra / 1e9:.2f} GB of them beside the tied embedding" if extra else "",
        )


# ---------------------------------------------------------------- models in training


@contextlib.contextmanager
def adapters_folded(model: Any) -> Iterator[None]:
    """Within the block the float32 layers on the CPU hold their LoRA adapters, so that each is one product.

    Afterwards the weights are what they were, bit for bit, since what is changed is a copy. In 16 bits nothing is
    folded: what an adapter has learnt so far would be rounded away beside the weights.
    """
    layers = [layer for layer in model.modules() if _folds(layer, model)]
    needed = sum(layer.get_base_layer().weight.nbytes for layer in layers)
    if needed > available_bytes() / 2:
        logger.info("adapters are computed beside their layers: %.1f GB are not free for both", needed / 1e9)
        layers = []
    kept = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer, data in zip(layers, kept, strict=True):
            layer.get_base_layer().weight.data = data.clone()
            with torch.no_grad():
                layer.merge()
        yield
    finally:
        for layer, data in zip(layers, kept, strict=True):
            layer.merged_adapters.clear()
            layer.get_base_layer().weight.data = data


def _folds(layer: Any, model: Any) -> bool:
    # Not isinstance: PEFT, whose import takes seconds, is there only if a layer is its own.
    if not hasattr(layer, "lora_A") or layer.merged or layer.disable_adapters:
        return False
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    return (
        isinstance(base, nn.Linear)
        and not layer.lora_variant  # DoRA and others, and biases, do more than add to the weight
        and not any(layer.lora_bias.values())
        and weight is not model.get_input_embeddings().weight
        and isinstance(weight, nn.Parameter)
        and type(weight.data) is Tensor  # not sharded
        and not hasattr(weight, "ds_id")
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


# ---------------------------------------------------------------- layers


def _owner(parent: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Where the layer of this name stands: an adapter's layer has it within."""
    child = getattr(parent, name)
    return (child, "base_layer") if hasattr(child, "base_layer") else (parent, name)


def _plain(layer: Any) -> bool:
    """Whether a layer, or the one within an adapter's, can be packed."""
    if hasattr(layer, "base_layer"):
        # DoRA, and adapters of other kinds, read the weight itself.
        if getattr(layer, "lora_magnitude_vector", True):
            return False
        layer = layer.base_layer
    return (
        type(layer) is nn.Linear
        and layer.weight.dtype == torch.bfloat16
        and layer.weight.device.type == "cpu"
        and pays_here()
    )
