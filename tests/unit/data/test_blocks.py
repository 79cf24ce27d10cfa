"""blocks: rows against plain-Python loops, mixing, packing, and that packed rows do not mix in attention."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch

from utils.core.errors import InputError
from utils.data.batches import Collator
from utils.data.blocks import MixedBlocks, PackedBlocks, PackedSamples, PaddedSamples, describe_sample, share_evenly
from utils.data.cache import CacheSettings, CacheWriter
from utils.data.corpora import CorpusCache
from utils.data.samples import SampleCache, load_sft_samples
from utils.text.prompts import IGNORE_INDEX

PAD = 99  # of the Collator; blocks are filled up with 0


def make_file(folder, documents, trained=None):
    """A cache of these lists of ids; a document's text counts ten bytes a token."""
    folder.mkdir()
    with CacheWriter(folder) as writer:
        for number, document in enumerate(documents):
            arrays = {
                "tokens": np.array(document, dtype=np.uint16),
                "document_ends": np.array([len(document)]),
                "document_hashes": np.array([number], dtype=np.uint32),
            }
            if trained is None:
                arrays["document_bytes"] = np.array([10 * len(document)], dtype=np.uint32)
            else:
                arrays["trained"] = np.array(trained[number], dtype=bool)
            writer.add(arrays)
        writer.finish("key", [], skipped=0, counters={})
    return (CorpusCache if trained is None else SampleCache)(folder)


def random_documents(seed: int, count: int, longest: int) -> list[list[int]]:
    rng = random.Random(seed)
    token = iter(range(100, 60_000))  # all different, so that a token's place is known
    return [[next(token) for _ in range(rng.choice([1, 2, rng.randint(1, longest)]))] for _ in range(count)]


def rows(dataset):
    return [{name: row.tolist() for name, row in dataset[index].items()} for index in range(len(dataset))]


# ---------------------------------------------------------------- blocks


def expected_blocks(documents, block_size, cross=False):
    """The rows by a plain loop over tokens."""
    stream = [(token, place, document) for document in documents for place, token in enumerate(document)]
    blocks = []
    for start in range(0, len(stream), block_size):
        block = {"input_ids": [], "position_ids": [], "labels": [], "shift_labels": []}
        position = -1
        for offset in range(block_size):
            if start + offset < len(stream):
                token, place, document = stream[start + offset]
                position = 0 if (place == 0 and not cross) or offset == 0 else position + 1
                label = IGNORE_INDEX if place == 0 else token
                following = document[place + 1] if place + 1 < len(document) else IGNORE_INDEX
            else:
                position = 0 if start + offset == len(stream) and not cross else position + 1
                token, label, following = 0, IGNORE_INDEX, IGNORE_INDEX
            for name, value in zip(block, (token, position, label, following), strict=True):
                block[name].append(value)
        blocks.append(block)
    return blocks


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("block_size", [2, 3, 16, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_those_of_a_plain_loop(tmp_path, seed, block_size, cross):
    documents = random_documents(seed, 40, 50)
    file = make_file(tmp_path / "f", documents)
    ids = np.array(random.Random(seed).sample(range(40), 25))
    chosen = [documents[number] for number in ids]
    blocks = PackedBlocks(file, ids, block_size, cross_document_attention=cross)
    found = rows(blocks)
    assert found == expected_blocks(chosen, block_size, cross)
    # Every token except each document's first is a target exactly once.
    targets = [label for row in found for label in row["shift_labels"] if label != IGNORE_INDEX]
    assert targets == [token for document in chosen for token in document[1:]]
    assert blocks.num_tokens == sum(map(len, chosen))
    assert blocks.num_bytes == 10 * blocks.num_tokens
    assert all(row.dtype == torch.int64 and row.shape == (block_size,) for row in blocks[len(blocks) - 1].values())
    with pytest.raises(IndexError):
        blocks[len(blocks)]


@pytest.mark.parametrize("max_blocks", [1, 3, 10_000])
def test_max_blocks_takes_the_first(tmp_path, max_blocks):
    documents = random_documents(3, 30, 60)
    file = make_file(tmp_path / "f", documents)
    every = PackedBlocks(file, np.arange(30), 16)
    few = PackedBlocks(file, np.arange(30), 16, max_blocks=max_blocks)
    assert len(few) == min(max_blocks, len(every))
    assert few.num_tokens == min(every.num_tokens, max_blocks * 16)
    assert abs(few.num_bytes - 10 * few.num_tokens) <= 1
    whole = rows(every)[: len(few)]
    if max_blocks < len(every):
        whole[-1]["shift_labels"][-1] = IGNORE_INDEX  # the next token lies outside
    assert rows(few) == whole


def test_blocks_travel_to_data_loader_workers_without_their_tokens(tmp_path):
    file = make_file(tmp_path / "f", [[5] * 50_000])
    blocks = PackedBlocks(file, np.arange(1), 16)
    travelled = pickle.dumps(blocks)
    assert len(travelled) < 3000
    assert rows(pickle.loads(travelled))[7] == rows(blocks)[7]


def test_bad_blocks(tmp_path):
    file = make_file(tmp_path / "f", [[1, 2, 3]])
    with pytest.raises(InputError, match="--block_size 1"):
        PackedBlocks(file, np.arange(1), 1)
    file.meta["sources"] = ["a.txt"]
    with pytest.raises(InputError, match=r"a.txt: no document left"):
        PackedBlocks(file, np.arange(0), 8)


# ---------------------------------------------------------------- mixing


@pytest.fixture
def parts(tmp_path):
    documents = random_documents(5, 300, 40)
    file = make_file(tmp_path / "mixed", documents)
    cuts = {"a": range(100), "b": range(100, 200), "old": range(200, 300)}
    return {name: PackedBlocks(file, np.array(list(ids)), 16) for name, ids in cuts.items()}


def first_tokens(dataset) -> list[int]:
    return [row["input_ids"][0] for row in rows(dataset)]


def test_mixing_weights_and_replay(parts):
    old = {"old": parts.pop("old")}
    size = {name: len(part) for name, part in (parts | old).items()}
    mixed = MixedBlocks(parts, {"b": 2.5}, replay=old, replay_share=0.25, seed=3)
    described = {name: (blocks, tokens, share) for name, blocks, tokens, share in mixed.describe()}
    assert described["a"][0] == size["a"]
    assert described["b"][0] == round(2.5 * size["b"])
    assert abs(described["old"][2] - 0.25) < 1 / len(mixed)
    assert sum(blocks for blocks, _, _ in described.values()) == len(mixed)
    # By name and by looking at every row.
    found = first_tokens(mixed)
    for name, part in (parts | old).items():
        own = first_tokens(part)
        counts = [found.count(token) for token in own]
        assert sum(counts) == described[name][0]
        assert max(counts) - min(counts) <= 1  # whole passes first, the rest without repetition
        tokens = sum(sum(id != 0 for id in row["input_ids"]) for row in rows(mixed) if row["input_ids"][0] in own)
        assert tokens == described[name][1]
    assert mixed.num_tokens == sum(tokens for _, tokens, _ in described.values())
    # The seed decides, and nothing else.
    again = MixedBlocks(parts, {"b": 2.5}, replay=old, replay_share=0.25, seed=3)
    other = MixedBlocks(parts, {"b": 2.5}, replay=old, replay_share=0.25, seed=4)
    assert first_tokens(again) == found
    assert first_tokens(other) != found
    assert len(other) == len(mixed)


def test_weights_of_almost_nothing_and_nothing(parts):
    blocks = [blocks for _, blocks, _, _ in MixedBlocks(parts, {"a": 0.0, "b": 1e-6}).describe()]
    assert blocks == [0, 1, len(parts["old"])]


def test_replay_larger_than_its_corpus_is_repeated(parts):
    old = {"old": parts.pop("old")}
    mixed = MixedBlocks(parts, replay=old, replay_share=0.8, seed=0)
    share = mixed.describe()[-1][3]
    assert abs(share - 0.8) < 0.01
    found = first_tokens(mixed)
    counts = [found.count(token) for token in first_tokens(old["old"])]
    assert max(counts) - min(counts) <= 1
    assert min(counts) > 1


def test_bad_mixes(parts):
    with pytest.raises(InputError, match="unknown corpora: c") as caught:
        MixedBlocks(parts, {"c": 1.0, "a": -1.0}, replay_share=0.5)
    assert "weight -1.0 of a" in str(caught.value)
    assert "no replay data" in str(caught.value)
    with pytest.raises(InputError, match="every corpus has the weight 0"):
        MixedBlocks(parts, dict.fromkeys(parts, 0.0))
    with pytest.raises(InputError, match="fraction"):
        MixedBlocks(parts, replay_share=1.0)
    with pytest.raises(InputError, match="both training and replay"):
        MixedBlocks(parts, replay={"a": parts["a"]}, replay_share=0.1)


# ---------------------------------------------------------------- samples


def random_samples(tmp_path, seed, count, longest):
    documents = random_documents(seed, count, longest)
    rng = random.Random(seed)
    trained = [[rng.random() < 0.5 for _ in document] for document in documents]
    return documents, trained, make_file(tmp_path / "s", documents, trained)


def expected_row(samples):
    row = {"input_ids": [], "position_ids": [], "labels": [], "shift_labels": []}
    for document, trained in samples:
        labels = [t if flag else IGNORE_INDEX for t, flag in zip(document, trained, strict=True)]
        labels[0] = IGNORE_INDEX
        row["input_ids"] += document
        row["position_ids"] += range(len(document))
        row["labels"] += labels
        row["shift_labels"] += [*labels[1:], IGNORE_INDEX]
    return row


@pytest.mark.parametrize("seed", range(4))
def test_packed_samples_are_whole_and_each_is_there_once(tmp_path, seed):
    documents, trained, file = random_samples(tmp_path, seed, 60, 30)
    ids = np.array(random.Random(seed).sample(range(60), 50))
    packed = PackedSamples(file, 40, ids, seed=seed)
    place = {document[0]: number for number, document in enumerate(documents)}
    seen = []
    for row in rows(packed):
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        numbers = [place[row["input_ids"][start]] for start in starts]
        assert row == expected_row([(documents[number], trained[number]) for number in numbers])
        assert len(row["input_ids"]) <= 40
        seen += numbers
    assert sorted(seen) == sorted(ids.tolist())
    assert packed.num_tokens == sum(len(documents[number]) for number in ids)
    # Best fit decreasing: no two rows could be one, and it depends on the seed alone.
    lengths = sorted(len(row["input_ids"]) for row in rows(packed))
    assert len(lengths) < 2 or lengths[0] + lengths[1] > 40
    assert rows(PackedSamples(file, 40, ids, seed=seed)) == rows(packed)


def plain_best_fit(lengths, capacity):
    """How many rows best-fit decreasing needs, by the plainest loop."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda index: room[index])] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


@pytest.mark.parametrize("seed", range(10))
def test_packing_is_best_fit_decreasing(seed):
    from utils.data.blocks import pack_best_fit

    rng = random.Random(seed)
    capacity = rng.choice([1, 7, 64, 2048])
    lengths = [rng.randint(1, capacity) for _ in range(200)]
    packed = pack_best_fit(np.array(lengths), capacity, seed)
    room = sorted(capacity - sum(lengths[sample] for sample in row) for row in packed)
    assert room == plain_best_fit(lengths, capacity)


def test_a_sample_longer_than_a_row_is_an_error(tmp_path):
    _, _, file = random_samples(tmp_path, 0, 10, 50)
    with pytest.raises(InputError, match="--max_seq_length 1"):
        PackedSamples(file, 1)


def test_padded_samples_keep_their_order(tmp_path):
    documents, trained, file = random_samples(tmp_path, 1, 12, 30)
    padded = PaddedSamples(file, np.array([3, 1, 7]))
    assert rows(padded) == [expected_row([(documents[number], trained[number])]) for number in (3, 1, 7)]
    assert len(PaddedSamples(file)) == 12


# ---------------------------------------------------------------- batches


def test_collator_pads_with_a_segment_of_its_own(tmp_path):
    items = [
        {name: torch.tensor(row) for name, row in expected_row(samples).items()}
        for samples in ([([5, 6, 7], [False, True, True]), ([8], [True])], [([9, 10], [True, True])])
    ]
    batch = {name: rows.tolist() for name, rows in Collator(PAD)(items).items()}
    assert batch == {
        "input_ids": [[5, 6, 7, 8], [9, 10, PAD, PAD]],
        "position_ids": [[0, 1, 2, 0], [0, 1, 0, 1]],
        "labels": [[-100, 6, 7, -100], [-100, 10, -100, -100]],
        "shift_labels": [[6, 7, -100, -100], [10, -100, -100, -100]],
        "is_token": [[True] * 4, [True, True, False, False]],
    }
    flat = Collator(PAD, flatten=True)(items)
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert flat["is_token"].all()
    flat = Collator(PAD, flatten=True, pad_to_multiple_of=4)(items)
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, PAD, PAD]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]
    assert flat["is_token"].tolist() == [[True] * 6 + [False] * 2]
    for name, rows in [*flat.items(), *Collator(PAD)(items).items()]:
        assert rows.dtype == (torch.bool if name == "is_token" else torch.int64), name


def tiny_llama(attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # attention that matters
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("batch_size", "flatten"), [(1, False), (3, False), (3, True)])
def test_packed_rows_give_the_logits_of_each_document_alone(tmp_path, attention, batch_size, flatten):
    rng = random.Random(0)
    documents = [[rng.randrange(120) for _ in range(rng.randint(1, 20))] for _ in range(9)]
    file = make_file(tmp_path / "s", documents, [[True] * len(document) for document in documents])
    model = tiny_llama(attention)
    packed = PackedSamples(file, 32)
    assert len(packed) >= batch_size
    batch = Collator(PAD, flatten=flatten)([packed[index] for index in range(batch_size)])
    features = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        # With a cache transformers would not look for segments.
        logits = model(**features, use_cache=False).logits
        compared = 0
        for ids, positions, row_logits in zip(batch["input_ids"], batch["position_ids"], logits, strict=True):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for start, end in itertools.pairwise(starts):
                alone = model(input_ids=ids[None, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(row_logits[start:end], alone, atol=1e-4, rtol=1e-4)
                compared += end - start
        assert compared == batch["input_ids"].numel()
        crossing = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert (crossing - logits).abs().max() > 0.1  # the comparison can fail


def test_block_losses_add_up_to_those_of_each_document_alone(tmp_path):
    """A document cut by blocks loses context, never a target; here blocks are longer than all documents."""
    documents = [[1, *random.Random(n).choices(range(2, 120), k=9)] for n in range(5)]
    file = make_file(tmp_path / "f", documents)
    model = tiny_llama("sdpa")
    batch = Collator(PAD)([PackedBlocks(file, np.arange(5), 64)[0]])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        packed = torch.nn.functional.cross_entropy(logits[0], batch["shift_labels"][0], reduction="sum")
        # transformers' own shifting of `labels` scores the same targets here.
        shifted = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
        alone = sum(
            torch.nn.functional.cross_entropy(
                model(input_ids=torch.tensor([document])).logits[0, :-1], torch.tensor(document[1:]), reduction="sum"
            )
            for document in documents
        )
    torch.testing.assert_close(packed, alone, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(shifted, packed)


# ---------------------------------------------------------------- what is shown


def test_the_first_sample_is_shown_with_what_is_trained(tmp_path, extended_tokenizer_folder):
    from utils.text import prompts
    from utils.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(extended_tokenizer_folder)
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "猫 cat", "output": "the 狗"}\n' * 2, encoding="utf-8")
    file = load_sft_samples([path], tokenizer, prompts.CHAT_TEMPLATES["mixtral"], 100, CacheSettings(tmp_path / "c"))
    shown = describe_sample(PackedSamples(file, 300)[0], tokenizer)
    assert shown.count("⟦") == shown.count("⟧") == 1
    prompt, answer = shown.split("⟦")
    assert "[INST] 猫 cat [/INST]" in prompt
    assert answer.strip().startswith("the 狗")
    assert answer.endswith("</s>⟧")
    document = {name: torch.tensor(row) for name, row in expected_row([([1, 300, 301, 2], [True] * 4)]).items()}
    assert describe_sample(document, tokenizer).startswith("⟦<s>")


@pytest.mark.parametrize("total", [0, 1, 5, 12, 40])
def test_a_limit_is_shared_evenly(total):
    """Against giving one to each in turn."""
    sizes = [7, 1, 9, 3]
    shares = [0] * len(sizes)
    for _ in range(min(total, sum(sizes))):
        room = [number for number, size in enumerate(sizes) if shares[number] < size]
        shares[min(room, key=shares.__getitem__)] += 1
    found = share_evenly(sizes, total)
    assert sorted(found) == sorted(shares) and all(map(int.__le__, found, sizes))
