"""Footprints of stages against the memory of real tensors: what autograd saves, and what bitsandbytes packs."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from utils.core.arguments import LoraArguments, ModelArguments
from utils.models.lm_loss import install_loss_head, loss_targets
from utils.models.training_model import attach_adapter
from utils.planning.ledger import EVALUATION, FORWARD
from utils.planning.stages import Job, PackedLinear, _rehearse, build, count_weights, footprint

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 2, "vocab_size": 512}
LLAMA = LlamaConfig(**SIZES)
ROWS, LENGTH = 2, 48


def job(stage="pt", config=LLAMA, bits=16, lora=None, **changes) -> Job:
    lora = lora or LoraArguments(target_modules="all", lora_dropout=0.0)
    settings = {
        "dtype": torch.float32, "compute_dtype": torch.float32, "on_gpu": False, "attention": "sdpa", "rows": ROWS,
        "length": LENGTH, "checkpointing": False, "accumulates": False,
    }  # fmt: skip
    return Job(stage, config, ModelArguments(load_in_kbits=bits), lora, **(settings | changes))


FULL = LoraArguments(full_finetuning=True)


def really_saved(config, lora: LoraArguments) -> int:
    """Bytes of the storages that autograd holds at the end of a real forward pass, but for those of the model."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    install_loss_head(model)
    if not lora.full_finetuning:
        model = attach_adapter(model, lora, 16)
    model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    mask = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), loss_targets(model, ids):
        loss = model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False).logits.sum()
    hidden = ROWS * LENGTH * config.hidden_size * 4  # the loss's own gradient, held outside of what autograd saves
    weights = 0 if not lora.full_finetuning else config.vocab_size * config.hidden_size * 4
    assert loss.requires_grad
    return sum(saved.values()) + hidden + weights


@pytest.mark.parametrize("config", [LLAMA, Qwen3Config(**SIZES, head_dim=32)], ids=lambda config: config.model_type)
@pytest.mark.parametrize("lora", [FULL, job().lora_args], ids=["full", "lora"])
def test_what_is_kept_is_what_autograd_saves(config, lora):
    planned, real = footprint(job(config=config, lora=lora)).kept, really_saved(config, lora)
    assert real <= planned <= 1.03 * real + 20_000  # with the batch itself


def test_processes_that_share_a_row_keep_their_part_of_it_and_the_whole_mask():
    whole, half = (footprint(job(sequence_parallel_size=size)).kept for size in (1, 2))
    masks = SIZES["num_hidden_layers"] * ROWS * LENGTH * LENGTH * 4  # of float32 in each layer
    assert 2 * half - whole == pytest.approx(masks, rel=0.15)  # what is not divided; with the batch's own mask


def test_weights_are_those_of_the_model_and_its_adapter():
    step = footprint(job())
    real = AutoModelForCausalLM.from_config(LLAMA)
    base = sum(parameter.numel() for parameter in real.parameters())
    wrapped = attach_adapter(real, job().lora_args, 16)
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert (step.num_trained, step.num_weights) == (trained, base + trained)
    assert step.trained == step.gradients == 4 * trained
    assert count_weights(LLAMA) == base


@pytest.mark.slow
def test_trained_embeddings_are_copies_in_float32():
    lora = dataclasses.replace(job().lora_args, modules_to_save="embed_tokens,lm_head")
    plain, trained = footprint(job(dtype=torch.bfloat16)), footprint(job(lora=lora, dtype=torch.bfloat16))
    rows = 2 * LLAMA.vocab_size * LLAMA.hidden_size
    assert trained.num_trained - plain.num_trained == rows
    assert trained.trained - plain.trained == 4 * rows  # beside the frozen ones
    assert trained.frozen == plain.frozen


@pytest.mark.slow
def test_deep_models_are_rehearsed_with_few_layers():
    deep = job(config=LlamaConfig(**SIZES | {"num_hidden_layers": 6}), lora=FULL, checkpointing=True)
    assert footprint(deep) == _rehearse(deep, 6)


@pytest.mark.parametrize(("bits", "double"), [(4, True), (4, False), (8, True)])
def test_packed_layers_have_the_size_of_bitsandbytes(bits, double):
    bnb = pytest.importorskip("bitsandbytes")
    args = ModelArguments(load_in_kbits=bits, double_quant=double)
    if bits == 8:
        real = bnb.nn.Linear8bitLt(512, 1024, bias=False, has_fp16_weights=False)
    else:
        real = bnb.nn.Linear4bit(512, 1024, bias=False, compress_statistics=double, quant_type="nf4")
    real = real.to("cpu")
    weight = real.weight
    if bits == 8:
        weight.data = torch.zeros(1024, 512, dtype=torch.int8)
        packed = PackedLinear(real, args)
        assert packed.weight.numel() + packed.scales.numel() == 1024 * 512 + 4 * 1024
        return
    weight = weight._quantize("cpu") if getattr(weight, "quant_state", None) is None else weight
    state = weight.quant_state
    scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
    size = weight.numel() * weight.element_size() + sum(part.numel() * part.element_size() for part in scales)
    packed = PackedLinear(real, args)
    assert packed.weight.numel() + packed.scales.numel() == size


@pytest.mark.slow
def test_four_bits_are_a_quarter_of_the_linear_layers():
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 512})
    whole, packed = footprint(job(config=config)), footprint(job(config=config, bits=4))
    linear = sum(
        parameter.numel()
        for name, parameter in AutoModelForCausalLM.from_config(config).named_parameters()
        if name.endswith("proj.weight")
    )
    saved = whole.frozen - packed.frozen
    assert 4 * linear * (1 - 0.53 / 4) <= saved <= 4 * linear * (1 - 0.5 / 4)
    assert packed.num_weights == whole.num_weights


@pytest.mark.slow
def test_a_gpu_keeps_no_attention_matrix_but_eager_does():
    fused = footprint(job(on_gpu=True, attention="sdpa", length=256))
    flash = footprint(job(on_gpu=True, attention="flash_attention_2", length=256))
    eager = footprint(job(on_gpu=True, attention="eager", length=256))
    matrix = ROWS * LLAMA.num_attention_heads * 256 * 256 * 4
    assert eager.kept - flash.kept > 0.9 * matrix * LLAMA.num_hidden_layers
    assert flash.kept < fused.kept


@pytest.mark.parametrize(
    "critic", ["head", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adapter", "model", "group"))]
)
def test_ppo_has_its_critic(critic):
    lora = LoraArguments(target_modules="q_proj", lora_dropout=0.0)
    step, plain = footprint(job("ppo", lora=lora, critic=critic)), footprint(job(lora=lora))
    extra = step.num_trained - plain.num_trained
    adapter = plain.num_trained
    head = LLAMA.hidden_size + 1
    assert extra == {"head": head, "adapter": head + adapter, "model": head + adapter, "group": 0}[critic]
    assert step.moments[EVALUATION].activations > 0


def test_a_reward_model_has_no_logits():
    scores, text = footprint(job("rm")), footprint(job())
    assert scores.moments[FORWARD].activations < text.moments[FORWARD].activations


@pytest.mark.slow
def test_dpo_asks_the_reference_before():
    assert footprint(job("dpo", reference=True)).kept == footprint(job("dpo")).kept


def test_experts_are_counted():
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    lora = LoraArguments(target_modules="q_proj,v_proj", lora_dropout=0.0)
    step = footprint(job(config=config, lora=lora))
    assert step.num_weights - step.num_trained == count_weights(config)
    assert step.frozen == 4 * count_weights(config) + 4 * 16 // 2 * 2  # and the rotation's two buffers


@pytest.mark.parametrize("stage", ["pt", "dpo"])
def test_a_mixtures_router_loss_is_rehearsed(stage):
    """Rows that mask each other have a square mask, which the router's loss must not take for the tokens."""
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    lora = LoraArguments(target_modules="q_proj", lora_dropout=0.0)
    plain, router = (
        footprint(job(stage, config, lora=dataclasses.replace(lora, output_router_logits=on))) for on in (False, True)
    )
    assert router.num_weights == plain.num_weights and router.frozen == plain.frozen


def test_a_model_is_built_without_memory():
    assert all(parameter.is_meta for parameter in build(job()).parameters())
