"""Actor and critic in one model: the policy that is trained, and what estimates the rewards still to come.

One backbone serves the policy, the reference (adapters off), the critic (a head on the policy's last hidden states, or
an adapter of its own) and a reward adapter. The policy holds the critic, so that optimizers, DeepSpeed, FSDP and
checkpoints see one model; the policy's own files stay those of tuning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
        # Near 1 bfloat16 has steps of 1/128, and advantages are differences of such values.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value(hidden.to(self.value.weight.dtype)).squeeze(-1).float()


def hidden_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states (B, T, H) of packed or padded rows (B, T), whose segments do not see each other."""
    # Below PEFT's wrapper and the head: the adapters are in the layers, and logits are made of answer tokens alone.
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


class ActorCritic(nn.Module):
    """A policy that holds its critic, and answers by both at once. attach_critic makes one of any policy.

    It goes before the policy's own class, and is no module around it: transformers, accelerate and PEFT ask
    isinstance(model, PeftModel) which weights a checkpoint of DeepSpeed or FSDP holds and how they come back. Around
    the policy, every checkpoint would hold the frozen base too, and every weight would have another name.
    """

    critic: Critic

    def forward(self, *args: Any, targets: Tensor | None = None, temperature: float = 1.0, **inputs: Any) -> Any:
        """Log-probabilities of `targets`, entropies and values, (B, T) each; without targets the policy's own output.

        Args: targets, and input_ids and position_ids among `inputs`: (B, T), see models.lm_loss.
        Entropies are no part of the loss, and zeros where gradients are made. One call gives all three, because DDP,
        DeepSpeed and FSDP count the forward passes of the whole model.
        """
        if targets is None:
            return super().forward(*args, **inputs)
        causal = causal_model(self)
        hidden = hidden_states(self, **inputs)
        # The head is called as a module, since that is where DeepSpeed and FSDP have its weight whole.
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

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """transformers' switch, which reaches the critic's model too."""
        self._enable_checkpointing("activation", options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same, by the name it had before."""
        self._enable_checkpointing("gradient", options)

    def _enable_checkpointing(self, kind: str, options: dict[str, Any]) -> None:
        name = f"{kind}_checkpointing_enable"
        if self.critic.model is not None:
            getattr(self.critic.model, name)(**options)
        if self.critic.adapter is not None:
            modules = _adapted_modules(self)

            def contexts() -> tuple[Any, Any]:
                # Called with a layer's forward pass. The backward pass computes the layer again, in the second
                # context: with the adapter of its forward pass, which is another one by then.
                active, disabled = modules[0]._active_adapter, modules[0]._disable_adapters
                return contextlib.nullcontext(), _switch(modules, active, disabled)

            given = options.get(f"{kind}_checkpointing_kwargs") or {}
            options[f"{kind}_checkpointing_kwargs"] = {**given, "use_reentrant": False, "context_fn": contexts}
        # PEFT's model has no such method of its own, and hands calls on to the model inside.
        causal = causal_model(self)
        getattr(super() if causal is self else causal, name)(**options)


def attach_critic(policy: Any, critic: Critic) -> None:
    """Make an ActorCritic of `policy`: its class becomes one that has ActorCritic's methods before its own."""
    own = type(policy)
    # Under the name it had, which config.json records and transformers looks things up by.
    policy.__class__ = type(own.__name__, (ActorCritic, own), {"__module__": own.__module__})
    policy.critic = critic
    # With dropout old and new probabilities would differ by chance; an adapter to go on with brings its own.
    for module in policy.modules():
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

    Unlike PEFT's set_adapter and disable_adapter it leaves alone which parameters are trained: the critic's pass is a
    part of one whose gradients are wanted.
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
    """Write what critic_state gave, beside the policy's files; no file for a critic that does not learn."""
    from safetensors.torch import save_file

    if tensors:
        save_file(tensors, Path(folder) / CRITIC_FILE)


@torch.no_grad()
def load_critic(policy: nn.Module, folder: str | Path) -> None:
    """Read a critic that save_critic wrote into the same kind of critic."""
    from safetensors.torch import load_file

    parameters = dict(policy.named_parameters())
    if not any(parameter.requires_grad and is_critic_parameter(name) for name, parameter in parameters.items()):
        return  # it does not learn
    for name, tensor in load_file(Path(folder) / CRITIC_FILE).items():
        parameters[name].copy_(tensor)
