"""Batches of pairs: what a row holds, and that one packed forward equals two separate ones."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from utils.core.errors import InputError
from utils.data import batches as batches_module
from utils.data.batches import (
    Example,
    LengthGroupedOrder,
    PairCollator,
    group_by_length,
    model_inputs,
    sum_by_answer,
)
from utils.data.preferences import Pair
from utils.models.lm_loss import install_loss_head, loss_targets


def some_examples(count: int = 4, vocabulary: int = 97) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        prompt, chosen, rejected = (rng.integers(3, vocabulary, size=int(rng.integers(2, 12))) for _ in range(3))
        margin = None if number % 2 else 0.5
        examples.append(Example(10 + number, Pair(prompt, chosen, rejected, (False, False), margin, "here")))
    return examples


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_packed_log_probabilities_equal_separate_forward_passes(attention):
    model, examples = tiny_llama(), some_examples()
    expected = []
    for example in examples:
        for answer in (example.pair.chosen, example.pair.rejected):
            ids = torch.from_numpy(np.concatenate([example.pair.prompt, answer]))
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0]
            start = len(example.pair.prompt)
            expected.append(-functional.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum").item())
    install_loss_head(model)
    batch = PairCollator(0, attention)(examples)
    with torch.no_grad(), loss_targets(model, batch["shift_labels"], "tokens"):
        losses = model(**model_inputs(batch), use_cache=False).logits
    logprobs = sum_by_answer(-losses, batch["answer"], 2 * len(examples))
    np.testing.assert_allclose(logprobs.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_a_batch_names_its_answers_and_their_last_tokens(attention):
    examples = some_examples()
    batch = PairCollator(0, attention)(examples)
    assert batch["numbers"].tolist() == [10, 11, 12, 13]
    assert batch["margins"].tolist() == [0.5, 0.0, 0.5, 0.0]
    ids = batch["input_ids"].flatten()
    for number, example in enumerate(examples):
        assert ids[batch["last"][2 * number]] == example.pair.chosen[-1]
        assert ids[batch["last"][2 * number + 1]] == example.pair.rejected[-1]
        for side, answer in enumerate((example.pair.chosen, example.pair.rejected)):
            inside = batch["answer"].flatten() == 2 * number + side
            # A shared prompt counts to the chosen answer; its last token stands before both.
            prompt = example.pair.prompt[-1:] if attention == "sdpa" and side else example.pair.prompt
            assert ids[inside].tolist() == [*prompt, *answer]
            targets = batch["shift_labels"].flatten()[inside]
            assert targets[targets >= 0].tolist() == answer.tolist()
    assert (batch["shift_labels"].flatten()[batch["answer"].flatten() < 0] == -100).all()


def test_the_order_of_rows_is_whole_repeatable_and_new_every_epoch():
    lengths = np.random.default_rng(1).integers(5, 200, size=53)
    order = LengthGroupedOrder(lengths, 4, seed=7)
    first = list(order)
    assert sorted(first) == list(range(53)) and first == list(order)
    order.set_epoch(1)
    assert sorted(order) == list(range(53)) and list(order) != first
    spreads = [np.ptp(lengths[first[start : start + 4]]) for start in range(0, 52, 4)]
    assert np.mean(spreads) < 40, "rows of a batch are about equally long"


def test_a_shared_prompt_is_computed_once():
    examples = some_examples()
    batch = PairCollator(0, "sdpa")(examples)
    lengths = [len(pair.prompt) + 1 + len(pair.chosen) + len(pair.rejected) for pair in (e.pair for e in examples)]
    assert (batch["answer"] >= 0).sum(1).tolist() == lengths
    assert batch["attention_mask"].shape == (4, 1, max(lengths), max(lengths))
    assert "attention_mask" not in PairCollator(0, "eager")(examples)


def test_batches_are_of_like_lengths_and_hold_every_row_once(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 1000, 1003)
    batches = group_by_length(lengths, 8, seed=1)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    assert sorted(map(len, batches))[:2] == [3, 8] and len(batches) == 126
    assert lengths[batches[0]].max() == lengths.max()
    order = np.random.default_rng(2).permutation(1003)

    def padding(parts):
        return sum(int((lengths[part].max() - lengths[part]).sum()) for part in parts)

    assert padding(batches) < 0.1 * padding(np.array_split(order, 126))
    same, other = group_by_length(lengths, 8, seed=1), group_by_length(lengths, 8, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(batches, same, strict=True))
    assert np.concatenate(other).tolist() != np.concatenate(batches).tolist()
    assert group_by_length(lengths[:0], 8, seed=1) == []
    with pytest.raises(InputError, match="at least 1"):
        group_by_length(lengths, 0, seed=1)
    monkeypatch.setattr(batches_module, "BATCHES_PER_GROUP", 126)
    longest = [int(lengths[batch].max()) for batch in group_by_length(lengths, 8, seed=1)]
    assert longest[1:] != sorted(longest[1:], reverse=True)  # one group, yet not from long to short
