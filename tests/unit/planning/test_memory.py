"""Plans against sums made by hand: 16 bytes a weight, shares of processes, caches."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig

from utils.core.arguments import LoraArguments, ModelArguments
from utils.planning.ledger import BOTTOM, EVALUATION, FORWARD, TOP, Footprint, Moment
from utils.planning.memory import CUDA_CONTEXT, Rollouts, Setting, Sharing, plan
from utils.planning.stages import Job

CONFIG = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
MILLION = 1_000_000


def setting(trained=MILLION, frozen=0, compute=torch.bfloat16, **changes) -> tuple[Setting, Footprint]:
    """Weights that are trained in float32 and others in bfloat16, and 3 MB of activations."""
    job = Job(
        *("pt", CONFIG, ModelArguments(), LoraArguments(full_finetuning=not frozen), torch.bfloat16, compute),
        on_gpu=True,
        attention="sdpa",
        rows=1,
        length=128,
        checkpointing=False,
        accumulates=False,
    )
    moments = {FORWARD: Moment(0, 3e6), TOP: Moment(0, 2e6), BOTTOM: Moment(4 * trained, 1e6)}
    step = Footprint(2 * frozen, 4 * trained, 4 * trained, 2e6, trained, trained + frozen, 0, trained // 4, moments)
    return Setting(job, **changes), step


def test_all_weights_take_16_bytes_each():
    planned = plan(*setting())
    assert planned.moment == BOTTOM
    assert planned.peak == 16 * MILLION + 1e6
    assert planned.needed == planned.peak + CUDA_CONTEXT + 0.05 * 1e6


def test_a_frozen_base_takes_its_own_bytes():
    planned = plan(*setting(trained=MILLION // 100, frozen=10 * MILLION))
    assert planned.moment == FORWARD
    assert planned.parts["frozen weights"] == 20 * MILLION
    assert planned.peak == 20 * MILLION + 12 * MILLION // 100 + 3e6


@pytest.mark.parametrize(
    ("optim", "bytes_each"), [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2.03), ("sgd", 0), ("lion_32bit", 4)]
)
def test_optimizers(optim, bytes_each):
    assert plan(*setting(optim=optim)).parts.get("optimizer", 0) == bytes_each * MILLION


def test_paged_states_are_in_main_memory():
    planned = plan(*setting(optim="paged_adamw_32bit"))
    assert "optimizer" not in planned.parts and planned.host == 8 * MILLION


def test_ddp_copies_gradients():
    one, two = plan(*setting()), plan(*setting(sharing=Sharing("ddp", 2)))
    assert two.peak - one.peak == 4 * MILLION


def test_zero2_shares_gradients_and_states():
    sharing = Sharing("zero2", 4, bucket=1e5, gather_bucket=1e5)
    job, step = setting(sharing=sharing)
    parts = plan(job, dataclasses.replace(step, moments={})).parts  # at the optimizer's step
    assert parts["trained weights"] == 2 * MILLION  # in 16 bits
    assert parts["optimizer"] == 12 * MILLION / 4  # with the float32 weights
    assert parts["buckets"] == 2 * 2 * 1e5 + 2 * 1e5
    assert parts["gradients"] == 2 * MILLION / 4


def test_zero3_shares_weights_too_and_offloading_moves_them():
    on_gpu = plan(*setting(sharing=Sharing("zero3", 4)))
    offloaded = plan(*setting(sharing=Sharing("zero3", 4, optimizer_on_cpu=True, weights_on_cpu=True)))
    assert on_gpu.parts["trained weights"] == 2 * MILLION / 4
    assert "trained weights" not in offloaded.parts and "optimizer" not in offloaded.parts
    assert offloaded.host == 14 * MILLION / 4


def test_fsdp_shares_all_in_float32():
    parts = plan(*setting(sharing=Sharing("fsdp", 4))).parts
    assert parts["trained weights"] == 4 * MILLION / 4 and parts["optimizer"] == 8 * MILLION / 4
    assert parts["weights gathered"] == 2 * (2 * MILLION / 4 + 2 * MILLION / 4)


def test_keys_and_values_of_rollouts():
    job, step = setting(trained=1000, frozen=MILLION)
    step = dataclasses.replace(step, moments={**step.moments, EVALUATION: Moment(0, 1e6)})
    planned = plan(dataclasses.replace(job, rollouts=Rollouts(slots=64, tokens=512)), step)
    assert planned.moment == "rollouts"
    # keys and values x layers x heads x their width x 2 bytes x slots x places
    assert planned.parts["KV cache"] == 2 * 2 * 4 * 16 * 2 * 64 * 512


def test_other_models_are_added():
    assert plan(*setting(others=7e6)).peak - plan(*setting()).peak == 7e6


def on_cpu(stored: torch.dtype, packed: int = 0) -> tuple[Setting, Footprint]:
    """10 million frozen weights, float32 in memory."""
    job, step = setting(trained=MILLION // 100, frozen=10 * MILLION, compute=torch.float32)
    config = LlamaConfig(dtype=stored)
    job = dataclasses.replace(job, job=dataclasses.replace(job.job, on_gpu=False, dtype=torch.float32, config=config))
    return job, dataclasses.replace(step, frozen=40 * MILLION, num_packed=packed)


def test_files_that_stay_mapped_count_on_a_cpu():
    plain, packed = plan(*on_cpu(torch.float32)), plan(*on_cpu(torch.float32, packed=5 * MILLION))
    assert plain.moment == FORWARD and plain.allowance == 0
    # Embeddings are pages of the file, which therefore holds those of the layers that were packed, too.
    assert packed.peak - plain.peak == 4 * 5 * MILLION


def test_another_type_is_beside_the_file_while_it_is_read():
    planned = plan(*on_cpu(torch.bfloat16))
    assert planned.moment == "loading" and planned.parts["checkpoint's pages"] == 2 * 10 * MILLION
