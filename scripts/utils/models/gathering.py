"""Weights that DeepSpeed ZeRO-3 or FSDP spread over the processes, gathered for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Size, nn


def full_shape(parameter: nn.Parameter) -> Size:
    """The shape of a weight, also where this process has only a part of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextlib.contextmanager
def gathered_weights(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block every process has these weights whole, where ZeRO-3 cut them up as they were loaded.

    What process 0 writes into them there is what all processes have afterwards.
    """
    cut = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut, modifier_rank=0):
        yield


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
        with _gathered_by_fsdp(model, bool(trainer.accelerator.state.fsdp_plugin.reshard_after_forward)):
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
def _gathered_by_fsdp(model: Any, reshards: bool) -> Iterator[None]:
    """Args: reshards: whether a layer gives its weights up after a forward pass outside the block."""
    from torch.distributed.fsdp import FSDPModule

    # What runs first would else count as the whole model, and generation enters below the wrapper of an adapter.
    model._get_fsdp_state()._lazy_init()
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(reshards, recurse=False)
            module.reshard()


@contextlib.contextmanager
def whole_models_loaded(training_args: Any) -> Iterator[None]:
    """Models loaded in the block are whole in every process; else ZeRO-3 cuts them up, and FSDP loads one process's.

    For models that are not trained: the engine knows nothing of them and would not gather their weights.
    """
    from transformers.integrations import deepspeed

    name, config = "FSDP_CPU_RAM_EFFICIENT_LOADING", getattr(training_args, "hf_deepspeed_config", None)
    value = os.environ.pop(name, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
