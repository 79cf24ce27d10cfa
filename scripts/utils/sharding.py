"""Weights that DeepSpeed ZeRO-3 or FSDP spread over the processes, gathered for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def whole_model(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Within the block every process has all weights of `model`, the prepared model of `trainer`.

    Generation calls the model once a token; gathering layer by layer each time would cost far more than the model
    itself. So the weights are gathered once, at the price of holding them whole (2 bytes a weight in 16 bits).
    """
    if trainer.is_deepspeed_enabled and model.zero_optimization_partition_weights():
        with _gathered_by_deepspeed(model):
            yield
    elif trainer.is_fsdp_enabled:
        with _gathered_by_fsdp(model):
            yield
    else:
        yield


@contextlib.contextmanager
def _gathered_by_deepspeed(engine: Any) -> Iterator[None]:
    """The engine's hooks, which would partition each layer again after its forward pass, are off in the block."""
    import deepspeed

    offload = engine.optimizer.parameter_offload
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            yield
    finally:
        offload._register_deepspeed_module(offload.module)


@contextlib.contextmanager
def _gathered_by_fsdp(model: nn.Module) -> Iterator[None]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False, recurse=True):
            yield
        return
    sharded: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
