"""Rows that processes share: losses and gradients are those of each document alone, in one process."""

import contextlib
import datetime
import itertools
import os
import traceback

import pytest
import torch
from torch import distributed
from transformers import AttentionInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from support.models import MIXTURES, SIZES, model_of
from utils.core.errors import InputError
from utils.data.batches import Collator, PartCollator
from utils.models.lm_loss import install_loss_head, loss_targets
from utils.models.sequence_parallel import SequenceParallel, check_sequence_parallel
from utils.text.prompts import IGNORE_INDEX

VOCABULARY = 61
KINDS = ["sliding_attention", "full_attention"]
# Layers with and without windows, windows shorter than a process's part, QK norm, shared heads, experts.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen2": {"sliding_window": 3, "use_sliding_window": True, "layer_types": KINDS},
    "gemma3_text": {"sliding_window": 3, "layer_types": KINDS, "head_dim": 8},
    "qwen3_moe": MIXTURES["qwen3_moe"],
}
CASES = [*((family, "sdpa") for family in FAMILIES), ("llama", "by_positions")]
# Tokens of the documents of each row: a document crosses every border between two parts, a row is padded.
ROWS = ([5, 3, 9], [4, 8])
PARTS = 2
QUERIES = "model.layers.0.self_attn.q_proj.weight"


def config_of(family: str, **changes):
    return AutoConfig.for_model(family, vocab_size=VOCABULARY, pad_token_id=0, **(SIZES | FAMILIES[family] | changes))


def items(family: str):
    first = 9 if family == "mistral" else 4  # whose first parts have no target at all
    generator = torch.Generator().manual_seed(0)
    for lengths in ROWS:
        ids = torch.randint(1, VOCABULARY, (sum(lengths),), generator=generator)
        places = torch.cat([torch.arange(length) for length in lengths])
        labels = ids.where(torch.arange(len(ids)) > first, IGNORE_INDEX)  # as of a prompt
        ends = labels.roll(-1).where(places.roll(-1) > 0, IGNORE_INDEX)
        yield {"input_ids": ids, "position_ids": places, "labels": labels, "shift_labels": ends}


def by_positions(module, query, key, value, mask, position_ids, **options):
    """As flash_attention_2: one row, no mask, and a document begins where positions start again."""
    assert mask is None and len(position_ids) == 1
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    borders = sorted({0, *starts, query.shape[2]})
    outputs = [
        sdpa_attention_forward(module, *(part[:, :, start:end] for part in (query, key, value)), None, **options)[0]
        for start, end in itertools.pairwise(borders)
    ]
    return torch.cat(outputs, 1), None


def documents_alone(model, family: str) -> torch.Tensor:
    total = torch.zeros(())
    for lengths, item in zip(ROWS, items(family), strict=True):
        for ids, labels in zip(item["input_ids"].split(lengths), item["labels"].split(lengths), strict=True):
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
    return total


def own_part(model, batch, shared) -> torch.Tensor:
    """The loss of this process's part, and its gradients; `shared`: None has attention see this part alone."""
    model.train()
    model.zero_grad()
    with shared.attention_over(batch["row_position_ids"]) if shared else contextlib.nullcontext():
        with loss_targets(model, batch["shift_labels"]):
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
            loss = model(**inputs, use_cache=False).logits.sum()
        loss.backward()
    return loss.detach()


def take_part(rank: int, folder) -> None:
    """What each process does: each family's loss and gradients, summed over the processes."""
    place = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": PARTS}
    distributed.init_process_group("gloo", timeout=datetime.timedelta(minutes=2), **place)
    results = {}
    AttentionInterface.register("by_positions", by_positions)
    for family, attention in CASES:
        model = model_of(config_of(family))
        model.config._attn_implementation = attention
        install_loss_head(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        shared = SequenceParallel(model.config, PARTS)
        flatten = attention == "by_positions"
        whole = Collator(0, flatten=flatten, pad_to_multiple_of=PARTS)
        batch = PartCollator(whole, PARTS, shared.rank)(list(items(family)))
        assert batch["input_ids"].shape == ((1, 15) if flatten else (2, 9))
        assert batch["row_position_ids"].shape == ((1, 30) if flatten else (2, 18))
        own_part(model, batch, None)
        apart = model.get_parameter(QUERIES).grad
        loss = own_part(model, batch, shared)
        assert model.config._attn_implementation == attention
        found = {"apart": apart, "loss": loss} | {name: weight.grad for name, weight in model.named_parameters()}
        for tensor in found.values():
            distributed.all_reduce(tensor)
        results[f"{family} {attention}"] = found
    if rank == 0:
        torch.save(results, folder / "results.pt")


@pytest.fixture(scope="module")
def shared_rows(tmp_path_factory):
    """{family and attention: what the processes found}. Forked, for these libraries take seconds to import."""
    folder = tmp_path_factory.mktemp("shared_rows")
    children = []
    for rank in range(PARTS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                take_part(rank, folder)
                code = 0
            except BaseException:  # whatever it was: a child must not go on as a second pytest
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * PARTS
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_parts_of_rows_learn_as_documents_alone(family, attention, shared_rows):
    model, found = model_of(config_of(family)).train(), shared_rows[f"{family} {attention}"]
    loss = documents_alone(model, family)
    loss.backward()
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert not torch.allclose(found["apart"], found[QUERIES], rtol=0.1), (
        "parts that do not see each other learn the same"
    )
    for name, weight in model.named_parameters():
        assert torch.allclose(found[name], weight.grad, rtol=1e-4, atol=1e-4 * weight.grad.abs().max()), name


@pytest.mark.parametrize(
    ("family", "changes", "size", "message"),
    [
        ("llama", {}, 4, "--sequence_parallel_size 4: .* heads, and the model has 4, 2 of keys and values"),
        ("llama", {"num_key_value_heads": 4}, 3, "4, 4 of keys and values; pass a divisor of both"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 2, "type dynamic"),
        ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, 2, "a qwen2 model has chunked_attention"),
    ],
)  # fmt: skip
def test_models_whose_rows_cannot_be_shared(family, changes, size, message):
    with pytest.raises(InputError, match=message):
        check_sequence_parallel(size, config_of(family, **changes), "sdpa")


def test_attention_that_cannot_be_shared():
    with pytest.raises(InputError, match="--attn_implementation eager: need sdpa or flash_attention_2"):
        check_sequence_parallel(2, config_of("llama"), "eager")
    for family in FAMILIES:
        check_sequence_parallel(2, config_of(family), "auto")
    check_sequence_parallel(1, config_of("llama", num_attention_heads=1, num_key_value_heads=1), "eager")
