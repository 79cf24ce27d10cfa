"""What a training stage runs: its model on the meta device, one step of it, and the bytes that the step takes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..core.arguments import LoraArguments, ModelArguments
from ..lora.config import load_adapter_config
from ..models.experts import counted_by_router, linear_experts
from ..models.lm_loss import install_loss_head, loss_targets
from ..models.loading import causal_model, quantization_config
from ..models.training_model import adapts_experts, attach_adapter
from ..rlhf.actor_critic import CRITIC_ADAPTER, Critic, add_critic_adapter, attach_critic, token_logprobs, use_adapter
from ..rlhf.reward_model import TASK_TYPE, install_score_head, score_places
from ..weights.config import local_folder, model_of_shapes
from ..weights.model_folder import LANGUAGE_MODEL, REWARD_MODEL
from .ledger import Footprint, rehearse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Stage = Literal["pt", "sft", "rm", "ppo", "dpo"]
REHEARSED_LAYERS = 3  # a first, a last and one between; deeper models have more of those
BLOCK, BLOCK_OF_SCALES = 64, 256  # weights that share a scale in 4 bits, and scales that share one
MASKLESS = "planned_maskless"  # transformers' name for attention that makes no mask


@dataclass(frozen=True)
class Job:
    """All that the memory of a run depends on.

    Attributes:
        config: of the model, with the rows that its vocabulary will have.
        dtype: of frozen weights; compute_dtype: of products.
        rows: of a micro-batch, for rm and dpo pairs; length: tokens of the longest row, for rm and dpo of both answers
            and their prompt.
        masked: whether rows hold segments that do not see each other.
        accumulates: whether an optimizer step has several micro-batches.
        reference: dpo: whether each step asks the policy without its adapter.
        critic: ppo, as --critic.
        sequence_parallel_size: processes that share a row.
    """

    stage: Stage
    config: PreTrainedConfig
    model_args: ModelArguments
    lora_args: LoraArguments
    dtype: torch.dtype
    compute_dtype: torch.dtype
    on_gpu: bool
    attention: str
    rows: int
    length: int
    checkpointing: bool
    accumulates: bool
    masked: bool = True
    reference: bool = False
    critic: str = "head"
    sequence_parallel_size: int = 1


_known: dict[str, Footprint] = {}  # what this process has rehearsed


def footprint(job: Job) -> Footprint:
    """Bytes of a step of the job, without optimizer and what several processes need.

    Deep models are rehearsed with few layers, twice; all layers have the same shapes then.
    """
    settings: Any = job.config.to_json_string()
    key = repr(replace(job, config=settings))
    if key not in _known:
        depth = int(job.config.num_hidden_layers)
        if depth <= REHEARSED_LAYERS + 1 or not _is_uniform(job.config):
            _known[key] = _rehearse(job, depth)
        else:
            short, longer = _rehearse(job, REHEARSED_LAYERS), _rehearse(job, REHEARSED_LAYERS + 1)
            _known[key] = short.extended(longer, depth - REHEARSED_LAYERS)
    return _known[key]


def _is_uniform(config: PreTrainedConfig) -> bool:
    """Whether all layers have weights of the same shapes."""
    return not getattr(config, "mlp_only_layers", None) and getattr(config, "decoder_sparse_step", 1) == 1


def _rehearse(job: Job, layers: int) -> Footprint:
    job = replace(job, config=_with_layers(job.config, layers))
    model = build(job)
    inner = causal_model(model)
    if job.checkpointing:
        _checkpoint(model)
    if job.model_args.load_in_kbits != 16:
        _pack(model, job)
    autocast = job.compute_dtype if job.compute_dtype != torch.float32 else None
    evaluate = _figures(job) if job.stage == "ppo" else None
    return rehearse(
        model,
        _step(job),
        evaluate,
        layers=list(inner.base_model.layers),
        autocast=autocast,
        accumulates=job.accumulates,
    )


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:layers]
    changed.num_hidden_layers = layers
    return changed


# ---------------------------------------------------------------- models without weights


def build(job: Job) -> Any:
    """The model that the stage trains, as its script makes it, on the meta device."""
    config = copy.deepcopy(job.config)
    auto_class = REWARD_MODEL if job.stage == "rm" else LANGUAGE_MODEL
    if job.stage == "rm":
        config.num_labels, config.pad_token_id = 1, config.pad_token_id or 0
    if job.lora_args.output_router_logits:
        config.output_router_logits = True
    bits = job.model_args.load_in_kbits
    config._attn_implementation = MASKLESS if job.attention == "flash_attention_2" or not job.masked else job.attention
    experts = (
        linear_experts(config) if bits != 16 or adapts_experts(job.lora_args, config) else contextlib.nullcontext()
    )
    with _flash_planned():
        with experts:
            model = model_of_shapes(config, auto_class, job.dtype)
        with torch.device("meta"):
            if bits != 16:
                _quantise(model, job)
            install_score_head(model) if job.stage == "rm" else install_loss_head(model)
            if not job.lora_args.full_finetuning:
                model = attach_adapter(
                    model, _new_adapter(job.lora_args), bits, TASK_TYPE if job.stage == "rm" else "CAUSAL_LM"
                )
            if job.stage == "ppo":
                _add_critic(model, job)
    return model


def _new_adapter(args: LoraArguments) -> LoraArguments:
    """An adapter to go on with, as one to begin of its shape."""
    if not args.adapter_name_or_path:
        return args
    saved = load_adapter_config(local_folder(args.adapter_name_or_path, "adapter"))
    targets = saved.target_modules
    return replace(
        args,
        adapter_name_or_path=None,
        lora_rank=saved.rank,
        target_modules=targets if isinstance(targets, str) else ",".join(targets),
        modules_to_save=",".join(saved.modules_to_save) or None,
        use_dora=saved.use_dora,
    )


def _add_critic(model: Any, job: Job) -> None:
    width = model.config.hidden_size
    if job.critic == "adapter":
        add_critic_adapter(model)
        critic = Critic(width, CRITIC_ADAPTER)
    elif job.critic == "model":
        critic = Critic(width, model=_critic_backbone(job))
    else:
        critic = Critic(width).requires_grad_(job.critic == "head")
    attach_critic(model, critic)


def _critic_backbone(job: Job) -> Any:
    """A model of the critic's own; taken to be of the policy's shape."""
    from transformers import AutoModel

    backbone: Any = AutoModel.from_config(job.config, dtype=job.dtype, attn_implementation=job.attention)
    if job.model_args.load_in_kbits != 16:
        _quantise(backbone, job)
    if job.lora_args.full_finetuning:
        return backbone
    own = replace(_new_adapter(job.lora_args), modules_to_save=None)
    return attach_adapter(backbone, own, job.model_args.load_in_kbits, "FEATURE_EXTRACTION")


def _checkpoint(model: Any) -> None:
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers renamed it
    options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
    getattr(model, f"{kind}_checkpointing_enable")(**options)


@contextlib.contextmanager
def _flash_planned() -> Iterator[None]:
    """Within the block transformers knows attention that needs no mask, as flash_attention_2 does."""
    from transformers import AttentionInterface

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
        )
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(MASKLESS, attention)
    yield


# ---------------------------------------------------------------- 4 and 8 bits


def _quantise(model: Any, job: Job) -> None:
    """Exchange the linear layers that bitsandbytes takes, as transformers does when it loads."""
    from transformers.quantizers.auto import AutoHfQuantizer

    args = job.model_args
    settings = quantization_config(args.load_in_kbits, args.quant_type, args.double_quant, job.compute_dtype)
    AutoHfQuantizer.from_config(settings, pre_quantized=False).preprocess_model(model=model, device_map=None)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = args.load_in_kbits == 4, args.load_in_kbits == 8


def _pack(model: nn.Module, job: Job) -> None:
    """Exchange the layers of bitsandbytes, whose kernels want numbers, for ones that take the same memory."""
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kinds):
                setattr(module, name, PackedLinear(child, job.model_args))


class PackedLinear(nn.Module):
    """The memory of a linear layer of bitsandbytes: packed weights and their scales, unpacked for each product."""

    def __init__(self, layer: Any, args: ModelArguments) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        count = self.in_features * self.out_features
        if args.load_in_kbits == 8:
            size, scales = count, 4 * self.out_features
        else:
            blocks = -(-count // BLOCK)
            # Twice quantised: a byte for each scale, and a float32 for BLOCK_OF_SCALES of them.
            size, scales = (count + 1) // 2, blocks + 4 * -(-blocks // BLOCK_OF_SCALES)
            if not args.double_quant:
                scales = 4 * blocks
        self.keeps_input = args.load_in_kbits == 8
        self.weight: Any = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), False)
        self.weight.stands_for = count
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device="meta"))

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        shape = (self.out_features, self.in_features)
        output: Tensor = _PackedProduct.apply(input, self.weight, shape, self.keeps_input)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, shape: tuple[int, int], keeps_input: bool) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(packed, *((input,) if keeps_input else ()))
        return input @ input.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient = upstream[0]
        return gradient @ gradient.new_empty(ctx.shape), None, None, None


# ---------------------------------------------------------------- a step


def _step(job: Job) -> Any:
    """The model -> the loss of a micro-batch in which every token counts: the most that a batch can take."""
    batch = _batch(job)
    if job.stage == "rm":
        return lambda model: _scores(model, batch()).sum()
    if job.stage == "ppo":
        return lambda model: _actor_critic_loss(model, batch())
    if job.stage == "dpo":
        return lambda model: _preference_loss(model, batch(), job.reference)
    return lambda model: _token_loss(model, batch())


def _batch(job: Job) -> Any:
    """Makes the tensors of a micro-batch, within the rehearsal."""

    def make() -> dict[str, Tensor]:
        rows, length = job.rows, job.length
        if job.attention == "flash_attention_2":
            rows, length = 1, rows * length  # the collators lay rows end to end for it
        # A process's part of a row. At attention it has the whole row for its part of the heads, as many bytes; the
        # mask is whole.
        ids = torch.zeros(rows, -(-length // job.sequence_parallel_size), dtype=torch.int64)
        batch = {"input_ids": ids, "position_ids": torch.zeros_like(ids)}
        if job.masked and job.attention != "flash_attention_2":
            seen = torch.ones(rows, 1, length, length, dtype=torch.bool)
            # Eager attention adds its mask.
            batch["attention_mask"] = seen.to(job.dtype) if job.attention == "eager" else seen
        return batch

    return make


def _token_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    with loss_targets(model, ids), counted_by_router(model, ids.bool()):
        outputs = model(**batch, use_cache=False)
    loss: Tensor = outputs.logits.sum() / ids.numel()
    auxiliary = getattr(outputs, "aux_loss", None)
    return loss + auxiliary if torch.is_tensor(auxiliary) else loss


def _scores(model: Any, batch: dict[str, Tensor]) -> Tensor:
    places = batch["input_ids"].new_zeros(2 * len(batch["input_ids"]))
    with score_places(model, places):
        scores: Tensor = model(**batch, use_cache=False).logits
    return scores


def _logprobs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    with loss_targets(model, ids, "tokens"), counted_by_router(model, ids.bool()):
        losses: Tensor = model(**batch, use_cache=False).logits
    return losses


def _preference_loss(model: Any, batch: dict[str, Tensor], reference: bool) -> Tensor:
    if reference:
        with torch.no_grad(), model.disable_adapter():
            _logprobs(model, batch)
    return _logprobs(model, batch).float().sum()


def _actor_critic_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logprobs, _, values = model(**_without_mask(batch), targets=batch["input_ids"])
    loss: Tensor = logprobs.sum() + values.sum()
    return loss


def _figures(job: Job) -> Any:
    """What PPO asks of each answer before it learns: log-probabilities, entropies, values, and the reference's."""
    make = _batch(job)

    def evaluate(model: Any) -> None:
        batch = _without_mask(make())
        model(**batch, targets=batch["input_ids"])
        if hasattr(model, "peft_config"):
            with use_adapter(model, None):
                token_logprobs(model, **batch, targets=batch["input_ids"])

    return evaluate


def _without_mask(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    # Its masks are transformers' own, made of position_ids.
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}


def count_weights(config: PreTrainedConfig, auto_class: str = LANGUAGE_MODEL) -> int:
    """Weights of a model of this config."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
