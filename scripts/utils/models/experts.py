"""Mixtures of experts whose experts and routers are linear layers, as LoRA, its dropout and 4 bits need them.

transformers 5 holds the experts of a layer in two stacks, which suits full training: few products, all grouped. But
bitsandbytes quantises linear layers and leaves stacks as they are; PEFT adapts stacks by adding B A to the whole stack
in every pass, which cannot have a dropout, and takes a layer's experts twice in 16 bits. As linear layers, experts
are quantised one by one while they are read, and adapted as all other layers are, and adapters have the layout of
Chinese-Mixtral's: experts.N.w1. Measured by benchmarks/moe.py; docs/training has the figures.

Shapes: N tokens, H hidden size, E experts, k experts a token.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..weights.config import expert_count
from ..weights.model_folder import ModelFolder, some_of
from ..weights.names import EXPERT_PARTS, FUSED_EXPERTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# How transformers calls the classes of a family, behind which come SparseMoeBlock and TopKRouter.
_CLASSES = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}
# Added to a model's model_type: PEFT would rewrite adapters, and transformers weights, for the type without it.
_LINEAR = "_linear_experts"


def check_linear_experts(model: ModelFolder, why: str) -> None:
    """Raises: InputError naming `why`, where the model is a mixture whose experts cannot be linear layers here."""
    if not expert_count(model.config):
        return
    kind = model.config.model_type
    if kind not in _CLASSES:
        raise InputError(
            f"{why}: the experts of a {kind} model are one tensor a layer, and would stay as they are; mixtures that "
            f"this works with: {', '.join(_CLASSES)}"
        )
    if stacks := [name for name in model.shapes if FUSED_EXPERTS.fullmatch(name)]:
        raise InputError(
            f"{why} needs experts one by one, but {model.folder} holds them in stacks: {some_of(stacks)}. Write it "
            'anew: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{model.folder}').save_pretrained('NEW')\""
        )


@contextlib.contextmanager
def linear_experts(config: PreTrainedConfig) -> Iterator[None]:
    """Within the block transformers builds and loads a model of this config with linear experts; dense ones as ever.

    The config gets a model_type of its own. check_linear_experts comes first.
    """
    if not expert_count(config):
        yield
        return
    kind = config.model_type
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    parts = EXPERT_PARTS[0] if kind == "mixtral" else EXPERT_PARTS[1]
    block = _block_class(getattr(module, f"{_CLASSES[kind]}SparseMoeBlock"), parts)
    config.model_type = kind + _LINEAR  # of this object alone: what is saved says the class's own
    _register_names(config.model_type)
    with mock.patch.object(module, block.__bases__[1].__name__, block):
        yield


def _register_names(kind: str) -> None:
    """Tell transformers, and PEFT with it, that tensors go where their names say."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    names = [WeightRenaming(".block_sparse_moe.", ".mlp.")]  # Mixtral's files and Chinese-Mixtral's adapters
    register_checkpoint_conversion_mapping(kind, names, overwrite=True)


def gather_with_experts(model: nn.Module) -> None:
    """Have DeepSpeed ZeRO-3 gather the experts of a layer at once: one by one, processes would wait for each other for
    ever where they use different ones."""
    if any(isinstance(part, LinearMoeBlock) for part in model.modules()):
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list({type(part) for part in model.modules() if isinstance(part, LinearMoeBlock)}))


@contextlib.contextmanager
def counted_by_router(model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Within the block a mixture's balancing loss counts the positions alone where `tokens` (B, T) is true.

    transformers takes the attention mask for that, which tells who sees whom: packed rows have none, pairs a square.
    """
    from transformers import PreTrainedModel

    inner = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    module = importlib.import_module(type(inner).__module__)
    original = getattr(module, "load_balancing_loss_func", None)
    if original is None:
        yield
        return
    with mock.patch.object(
        module, "load_balancing_loss_func", lambda logits, count, top_k, _: original(logits, count, top_k, tokens)
    ):
        yield


class Router(nn.Linear):
    """The layer that scores experts. As no nn.Linear itself it is never quantised: a near-tie would change experts.

    As the quantised layers around it, it takes inputs of any type: DeepSpeed runs without autocast.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, H) -> (N, E)."""
        return super().forward(input if torch.is_autocast_enabled(input.device.type) else input.to(self.weight.dtype))


class Expert(nn.Module):
    """One expert: down(act(gate x) * up x), its layers named as in the files of its family."""

    def __init__(self, hidden: int, inner: int, activation: nn.Module, parts: tuple[str, str, str]) -> None:
        """Args: parts: the names of gate, up and down."""
        super().__init__()
        self.parts, self.act_fn = parts, activation
        for part, (size_in, size_out) in zip(parts, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True):
            self.add_module(part, nn.Linear(size_in, size_out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(tokens of this expert, H) -> the same shape."""
        gate, up, down = (self.get_submodule(part) for part in self.parts)
        result: Tensor = down(self.act_fn(gate(x)) * up(x))
        return result


class Experts(nn.ModuleList):
    """The experts of a layer; each computes its own tokens, which are sorted by expert."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (N, H), chosen (N, k) numbers of experts, weights (N, k) float32 -> (N, H)."""
        counts = torch.bincount(chosen.flatten(), minlength=len(self))
        sizes = _group_sizes(counts)
        places = _places(chosen.flatten(), counts, sizes)
        copies = x.repeat_interleave(chosen.shape[1], 0)
        groups = x.new_zeros(sum(sizes), x.shape[1]).index_copy(0, places, copies).split(sizes)
        # In training those without tokens run too: DDP waits for a gradient of every weight.
        runs = [size > 0 or torch.is_grad_enabled() for size in sizes]
        triples = zip(self, groups, runs, strict=True)
        outputs = torch.cat([expert(group) for expert, group, wanted in triples if wanted])
        # Back in order and summed, always in the same order and in float32.
        own = outputs.index_select(0, places).view(*chosen.shape, -1)
        return (own * weights[..., None]).sum(1).to(x.dtype)


def _group_sizes(counts: Tensor) -> list[int]:
    """How many rows each expert computes: on a CPU its tokens rounded up to four binary digits, by at most an eighth.

    oneDNN compiles a kernel for each shape that it has not met, which takes longer than the product, up to twenty
    times: with counts as they are, nearly every product of a step. Rows of zeros give zeros, and no gradient.
    """
    sizes: list[int] = counts.tolist()
    if counts.device.type != "cpu":
        return sizes
    steps = (1 << max(0, size.bit_length() - 4) for size in sizes)
    return [-(-size // step) * step for size, step in zip(sizes, steps, strict=True)]


def _places(chosen: Tensor, counts: Tensor, sizes: list[int]) -> Tensor:
    """Row (N k) of each choice where experts stand one after the other, each with its `sizes` rows."""
    experts, order = chosen.sort(stable=True)
    starts = torch.tensor([0, *sizes[:-1]], device=chosen.device).cumsum(0)
    before = (starts - counts.cumsum(0) + counts)[experts]  # rows of zeros
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=chosen.device) + before
    return places


def _block_class(block: type[nn.Module], parts: tuple[str, str, str]) -> Any:
    """A class that takes the place of a family's block of router and experts, with its jitter or shared expert."""
    module = importlib.import_module(block.__module__)
    router_class = getattr(module, block.__name__.replace("SparseMoeBlock", "TopKRouter"))

    class Choice(router_class):  # type: ignore[valid-type, misc]  # transformers collects router logits by its class
        _is_hf_initialized = True  # it has no weights that transformers could set

        def __init__(self, config: Any) -> None:
            nn.Module.__init__(self)
            self.top_k = config.num_experts_per_tok
            self.normalises = getattr(config, "norm_topk_prob", True)

        def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """(N, E) -> logits (N, E), weights (N, k) in float32, chosen experts (N, k)."""
            weights, chosen = logits.float().softmax(-1).topk(self.top_k, dim=-1)
            return logits, weights / weights.sum(-1, keepdim=True) if self.normalises else weights, chosen

    class LinearBlock(LinearMoeBlock, block):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            count, hidden = expert_count(config), config.hidden_size
            inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
            activation = self.experts.act_fn
            self.gate = Router(hidden, count, bias=False)
            self.choice = Choice(config)
            self.experts = Experts(Expert(hidden, inner, activation, parts) for _ in range(count))

    return LinearBlock


class LinearMoeBlock:
    """What all families' blocks have in common; the class that ZeRO-3 gathers as a whole."""

    gate: Router
    choice: nn.Module
    experts: Experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        noise = getattr(self, "jitter_noise", 0.0)
        if noise and self.training:  # type: ignore[attr-defined]
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1 - noise, 1 + noise)
        x = hidden_states.flatten(0, 1)
        _, weights, chosen = self.choice(self.gate(x))
        out = self.experts(x, chosen, weights)
        shared: Any = getattr(self, "shared_expert", None)
        if shared is not None:
            out = out + self.shared_expert_gate(x).sigmoid() * shared(x)  # type: ignore[attr-defined]
        return out.view_as(hidden_states)
