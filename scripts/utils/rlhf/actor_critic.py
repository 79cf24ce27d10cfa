"""Actor and critic in one model: the policy that is trained, and what estimates the rewards still to come.

One backbone serves the policy, the reference (adapters off), the critic (a head on the policy's last hidden states, or
an adapter of its own) and a reward adapter. The critic is attached to the policy, so that optimizers, DeepSpeed, FSDP
and checkpoints see one model; the policy's own files stay those of tuning.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.lm_loss import loss_targets
from ..models.loading import causal_model

CRITIC_FILE = "critic.safetensors"
CRITIC_ADAPTER = "critic"
CRITIC_PREFIX = "critic."


class Critic(nn.Module):
    """Values of the state before each token, from hidden states of the policy's backbone or of a model of its own."""

    def __init__(self, hidden_size: int, adapter: str | None = None, model: nn.Module | None = None) -> None:
        """
        Args:
            adapter: the adapter of the policy's backbone that makes the hidden states; None: they are the policy's.
            model: a causal or classification model that makes them instead; `hidden_size` is then its own.
        """
        super().__init__()
        self.adapter = adapter
        self.model = model
        self.value = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value.weight)  # no estimate before the first update, rather than a random one
        nn.init.zeros_(self.value.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, H) -> values (B, T) in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value(hidden.to(self.value.weight.dtype)).squeeze(-1).float()


def hidden_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states (B, T, H) of packed or padded rows (B, T), whose segments do not see each other."""
    backbone = causal_model(model).base_model
    hidden: Tensor = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    return hidden


def token_logprobs(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities (B, T) of `targets` (B, T), 0 where there is none; see models.lm_loss.loss_targets."""
    causal = causal_model(model)
    hidden = hidden_states(model, input_ids, position_ids)
    with loss_targets(causal, targets, "tokens", temperature):
        losses: Tensor = causal.get_output_embeddings()(hidden)
    return -losses


def attach_critic(policy: Any, critic: Critic) -> None:
    """Make `critic` a part of `policy`, whose forward then answers calls with `targets` by actor and critic at once.

    policy(input_ids=..., position_ids=..., targets=..., temperature=...), each (B, T), returns log-probabilities of
    the targets, entropies (only without gradients, since they are no part of the loss; else zeros) and values, (B, T)
    each. One call, because DDP, DeepSpeed and FSDP count forward passes of the whole model. Calls without `targets`
    are the model's own.
    """
    policy.critic = critic
    _remove_dropout(policy)
    plain_forward: Callable[..., Any] = policy.forward

    def forward(self: Any, *args: Any, targets: Tensor | None = None, temperature: float = 1.0, **inputs: Any) -> Any:
        if targets is None:
            return plain_forward(*args, **inputs)
        causal = causal_model(self)
        hidden = hidden_states(self, **inputs)
        if torch.is_grad_enabled():
            with loss_targets(causal, targets, "tokens", temperature):
                losses = causal.get_output_embeddings()(hidden)
            entropies = torch.zeros_like(losses)
        else:
            with loss_targets(causal, targets, "tokens+entropy", temperature):
                losses, entropies = causal.get_output_embeddings()(hidden).unbind(-1)
        if self.critic.model is not None:
            hidden = hidden_states(self.critic.model, **inputs)
        elif self.critic.adapter is not None:
            with use_adapter(self, self.critic.adapter):
                hidden = hidden_states(self, **inputs)
        return -losses, entropies, self.critic(hidden)

    policy.forward = types.MethodType(forward, policy)
    _checkpoint_all_parts(policy)


def _remove_dropout(model: nn.Module) -> None:
    """With it old and new probabilities would differ by chance; an adapter to go on with brings its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


# ---------------------------------------------------------------- adapters on one backbone


def _adapted_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "_active_adapter")]


@contextlib.contextmanager
def use_adapter(policy: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block the backbone runs with adapter `name`; None: with none, as the base model it was.

    Unlike PEFT's set_adapter it leaves alone which parameters are trained.
    """
    modules = _adapted_modules(policy)
    active = modules[0]._active_adapter if name is None and modules else [name]
    with _switch(modules, active, name is None):
        yield


@contextlib.contextmanager
def _switch(modules: list[Any], active: Any, disabled: bool) -> Iterator[None]:
    before = [(module._active_adapter, module._disable_adapters) for module in modules]
    for module in modules:
        module._active_adapter, module._disable_adapters = active, disabled
    try:
        yield
    finally:
        for module, (active, disabled) in zip(modules, before, strict=True):
            module._active_adapter, module._disable_adapters = active, disabled


def _checkpoint_all_parts(policy: Any) -> None:
    """Let the switch for activation checkpointing reach the critic's model, and the adapter in use every layer.

    What the backward pass computes again must use the adapter of the forward pass, which is another one by then.
    """

    def contexts() -> tuple[Any, Any]:
        active, disabled = modules[0]._active_adapter, modules[0]._disable_adapters
        return contextlib.nullcontext(), _switch(modules, active, disabled)

    modules = _adapted_modules(policy)
    for kind in ("activation", "gradient"):  # transformers' new name, and the old one
        name, options = f"{kind}_checkpointing_enable", f"{kind}_checkpointing_kwargs"
        if (enable := getattr(policy, name, None)) is None:
            continue

        def enable_all(
            *args: Any, _enable: Any = enable, _name: str = name, _options: str = options, **kwargs: Any
        ) -> None:
            if policy.critic.model is not None:
                getattr(policy.critic.model, _name)(*args, **kwargs)
            if policy.critic.adapter is not None:
                kwargs[_options] = {**(kwargs.get(_options) or {}), "use_reentrant": False, "context_fn": contexts}
            _enable(*args, **kwargs)

        setattr(policy, name, enable_all)


def add_critic_adapter(policy: Any) -> None:
    """Give the backbone of a PEFT model a second trainable adapter of the policy's shape, for the critic."""
    import dataclasses

    config = dataclasses.replace(policy.peft_config["default"], modules_to_save=None, ensure_weight_tying=False)
    policy.add_adapter(CRITIC_ADAPTER, config)
    for name, parameter in policy.named_parameters():
        if f".{CRITIC_ADAPTER}." in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()


# ---------------------------------------------------------------- files


def is_critic_parameter(name: str) -> bool:
    """Whether a parameter of the policy, by its name there, belongs to the critic."""
    return name.startswith(CRITIC_PREFIX) or f".{CRITIC_ADAPTER}." in name


def critic_state(policy: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The critic's trained parameters by name; `state`: gathered tensors, where the model's own are partitioned."""
    trained = {name: tensor for name, tensor in policy.named_parameters() if tensor.requires_grad}
    return {
        name: (tensor if state is None else state[name]).detach().cpu().contiguous()
        for name, tensor in trained.items()
        if is_critic_parameter(name)
    }


def save_critic(folder: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write what critic_state gave, beside the policy's files."""
    from safetensors.torch import save_file

    save_file(tensors, Path(folder) / CRITIC_FILE)


@torch.no_grad()
def load_critic(policy: nn.Module, folder: str | Path) -> None:
    """Read a critic that save_critic wrote into the same kind of critic."""
    from safetensors.torch import load_file

    parameters = dict(policy.named_parameters())
    for name, tensor in load_file(Path(folder) / CRITIC_FILE).items():
        parameters[name].copy_(tensor)
