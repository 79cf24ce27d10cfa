"""perplexity and likelihood: against plain loops over transformers' own logits, in float64, one at a time."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from support.models import model_of
from support.paths import EXAMPLES
from utils.core.arguments import RopeArguments
from utils.core.errors import InputError
from utils.evaluation import likelihood, perplexity
from utils.evaluation.likelihood import LikelihoodScorer, Window, cut_windows, token_losses
from utils.evaluation.perplexity import (
    Documents,
    compare_documents,
    document_figures,
    perplexity_by_length,
    read_documents,
    read_rows,
)
from utils.evaluation.plots import format_document_row, plot_by_length, plot_documents
from utils.models import lm_loss
from utils.models.lm_loss import install_loss_head
from utils.models.rope import install_row_rotary, scale_rope
from utils.text.tokenizer import encode_text, load_tokenizer

WINDOW, VOCABULARY = 32, 97


def config_of(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(**(sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": WINDOW} | changes))


def rows_of(count, length):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def plain_losses(model, row):
    """Each token's loss given only what comes before it, one forward pass each."""
    found = []
    for place in range(1, len(row)):
        logits = model(input_ids=row[:place].unsqueeze(0)).logits[0, -1].double()
        found.append(float(torch.logsumexp(logits, 0) - logits[row[place]]))
    return found


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("chunk", [None, 100])
def test_losses_are_those_of_a_plain_loop(chunk, monkeypatch):
    ids = rows_of(5, 40)
    expected = torch.tensor([plain_losses(model_of(config_of()), row) for row in ids]).double()
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 90)  # batches of two rows, the last of one
    if chunk:
        monkeypatch.setattr(lm_loss, "CHUNK_ELEMENTS", chunk)
    model = model_of(config_of())
    install_loss_head(model)
    found = token_losses(model, ids)
    assert found.shape == (5, 39) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    scorer = LikelihoodScorer(model_of(config_of()), 90)
    rows = perplexity_by_length(scorer.row_losses(ids, [40]), torch.ones_like(ids))
    assert rows[0]["perplexity"] == pytest.approx(math.exp(float(expected.mean())), rel=1e-5)


def test_logits_never_stand_whole(monkeypatch):
    """The largest float32 tensor over the vocabulary has the 64 rows of the smallest chunk, not all positions."""
    monkeypatch.setattr(lm_loss, "CHUNK_ELEMENTS", 1)
    seen = []
    real = torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda logits, dim: seen.append(tuple(logits.shape)) or real(logits, dim))
    model = model_of(config_of())
    install_loss_head(model)
    token_losses(model, rows_of(2, 200))
    assert sum(rows for rows, _ in seen) == 2 * 199 and max(rows for rows, _ in seen) <= 64


HEADS = {
    "whole": {"modules_to_save": ["lm_head"]},
    "LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "tied": {"trainable_token_indices": [5, 6, 96], "tied": True},
    "tied whole": {"modules_to_save": ["embed_tokens"], "tied": True, "ensure_weight_tying": True},
}


@pytest.mark.parametrize("name", HEADS)
def test_losses_where_an_adapter_has_the_head(name):
    """The adapter's own forward says what is right; every weight that it starts at zero or as a copy is perturbed."""
    changes = {"r": 2, "target_modules": ["q_proj"]} | HEADS[name]
    config = config_of(tie_word_embeddings=changes.pop("tied", False))
    model = get_peft_model(model_of(config), LoraConfig(**changes)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = rows_of(3, 20)
    before = torch.tensor([plain_losses(model_of(config), row) for row in ids]).double()
    expected = torch.tensor([plain_losses(model, row) for row in ids]).double()
    assert (before - expected).abs().max() > 0.1
    found = LikelihoodScorer(model.get_base_model()).row_losses(ids, [20])[20]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_losses_that_are_no_numbers_are_refused():
    model = model_of(config_of())
    install_loss_head(model)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(InputError, match=r"not finite.*--dtype"):
        token_losses(model, rows_of(1, 8))


def test_shorter_texts_are_the_beginnings_of_longer_ones():
    model = model_of(config_of())
    ids = rows_of(3, 60)
    found = LikelihoodScorer(model).row_losses(ids, [8, 60, 32])
    assert {length: part.shape for length, part in found.items()} == {n: (3, n - 1) for n in (8, 60, 32)}
    torch.testing.assert_close(found[8], token_losses(model, ids[:, :8]), rtol=1e-5, atol=1e-6)


def test_auto_ntk_scores_each_length_with_its_own_rotation():
    """Against plain models with the base of each length; within the trained window that is the model itself."""
    config = config_of()
    scale_rope(config, RopeArguments("auto-ntk"))
    model = model_of(config)
    install_row_rotary(model)
    scorer, ids = LikelihoodScorer(model), rows_of(2, 64)
    found = scorer.row_losses(ids, [16, 32, 48, 64])
    alone = scorer.window_losses([Window(ids[0][:length].tolist(), 1) for length in (16, 32, 48, 64)])
    for loss, length, alpha in zip(alone, (16, 32, 48, 64), (1.0, 1.0, 2.0, 3.0), strict=True):
        plain = model_of(config_of(rope_theta=10000.0 * alpha ** (16 / 14)))
        expected = torch.tensor([plain_losses(plain, row[:length]) for row in ids]).double()
        torch.testing.assert_close(found[length], expected, rtol=1e-5, atol=1e-5)
        assert loss == pytest.approx(float(expected[0].sum()), rel=1e-5)


# ---------------------------------------------------------------- windows


@given(
    count=st.integers(0, 40), length=st.integers(2, 12), stride=st.integers(1, 11), start=st.sampled_from([[], [99]])
)
@settings(max_examples=200, deadline=None)
def test_windows_score_each_token_once(count, length, stride, start):
    """Each token, but the first where there is no BOS; with all the context that window and stride promise."""
    stride = min(stride, length - 1)
    seen = {}
    for window in cut_windows(range(count), start, length, stride):
        assert len(window.ids) <= length and list(window.ids[: len(start)]) == start and window.num_scored > 0
        tokens = window.ids[len(start) :]
        assert list(tokens) == list(range(tokens[0], tokens[0] + len(tokens)))
        for place in range(window.first, len(window.ids)):
            token = window.ids[place]
            assert token not in seen
            seen[token] = place  # so many tokens are before it
    assert sorted(seen) == list(range(0 if start else 1, count))
    for token, context in seen.items():
        assert min(token + len(start), length - 1 - stride) <= context
    if stride == length - 1:  # blocks
        assert all(len(window.ids) == length for window in cut_windows(range(count), start, length)[:-1])


def test_windows_by_hand():
    assert cut_windows([5, 6, 7, 8, 9], [1], 3) == [Window([1, 5, 6], 1), Window([1, 7, 8], 1), Window([1, 9], 1)]
    assert cut_windows([5, 6, 7, 8], [], 3) == [Window([5, 6, 7], 1), Window([7, 8], 1)]
    sliding = [Window([1, 5, 6, 7], 1), Window([1, 6, 7, 8], 3), Window([1, 7, 8, 9], 3)]
    assert cut_windows([5, 6, 7, 8, 9], [1], 4, 1) == sliding
    assert cut_windows([], [1], 4) == cut_windows([7], [], 4) == []
    for length, stride in ((3, 3), (3, 0), (1, None)):
        with pytest.raises(ValueError, match="stride"):
            cut_windows([5, 6], [1], length, stride)


@torch.no_grad()
def plain_window_losses(model, documents, start, length, stride):
    """Losses of documents: one window after the other through the model, all its logits, log_softmax in float64."""
    totals = []
    for ids in documents:
        total, done, begin = 0.0, 0 if start else 1, 0
        while done < len(ids):
            row = [*start, *ids[begin : begin + length - len(start)]]
            chances = torch.log_softmax(model(input_ids=torch.tensor([row])).logits[0].double(), -1)
            for token in range(done, begin + len(row) - len(start)):
                place = len(start) + token - begin
                total -= float(chances[place - 1, row[place]])
            done = begin + len(row) - len(start)
            begin += stride
        totals.append(total)
    return totals


@pytest.mark.parametrize("start", [[], [3]])
@pytest.mark.parametrize("stride", [31, 7, 1])
def test_documents_of_all_lengths_against_a_plain_loop(start, stride):
    """In blocks and sliding, padded together in batches, with BOS and without."""
    lengths = [1, 2, 3, 30, 31, 32, 33, 62, 63, 64, 100]
    documents = [rows_of(1, length)[0].tolist() for length in lengths]
    expected = plain_window_losses(model_of(config_of()), documents, start, 32, stride)
    cut = [cut_windows(ids, start, 32, stride) for ids in documents]
    told = []
    scorer = LikelihoodScorer(model_of(config_of()), batch_tokens=100)
    found = iter(scorer.window_losses([window for windows in cut for window in windows], told.append))
    sums = [sum(next(found) for _ in windows) for windows in cut]
    assert sums == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert sum(told) == sum(lengths) - (0 if start else len(lengths)) and len(told) > 3


def test_losses_do_not_depend_on_the_batch():
    windows = [Window(row.tolist()[: 5 + number], 1 + number % 4) for number, row in enumerate(rows_of(20, 30))]
    few, many = (LikelihoodScorer(model_of(config_of()), size).window_losses(windows) for size in (1, 10**6))
    assert few == pytest.approx(many, rel=1e-6)


# ---------------------------------------------------------------- figures


def test_figures_by_length():
    """Two rows of 6 tokens at lengths 2, 4, 6, counted by hand; token 1 is given."""
    losses_ = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 1.5, 2.5, 3.5, 4.5]])
    num_bytes = torch.tensor([[0, 3, 3, 1, 3, 3], [0, 1, 1, 1, 6, 3]])
    short = losses_ + 10  # another pass: figures of a length come from its own losses
    rows = perplexity_by_length({4: losses_[:, :3], 6: losses_, 2: short[:, :1]}, num_bytes)
    assert [row["tokens"] for row in rows] == ["1-2", "3-4", "5-6"]
    assert [row["length"] for row in rows] == [2, 4, 6]
    assert [row["scored_tokens"] for row in rows] == [2, 4, 4]
    means = [(11 + 10.5) / 2, (2 + 3 + 1.5 + 2.5) / 4, (4 + 5 + 3.5 + 4.5) / 4]
    assert [row["perplexity"] for row in rows] == pytest.approx([math.exp(mean) for mean in means])
    assert rows[1]["bits_per_byte"] == pytest.approx((2 + 3 + 1.5 + 2.5) / math.log(2) / (3 + 1 + 1 + 1))
    assert rows[1]["perplexity_to_here"] == pytest.approx(math.exp((1 + 2 + 3 + 0.5 + 1.5 + 2.5) / 6))
    assert rows[2]["bits_per_byte_to_here"] == pytest.approx((15 + 12.5) / math.log(2) / 25)


def test_sums_are_in_float64():
    """A million losses of 0.1 in float32 would sum to 100,958."""
    many = torch.full((1000, 1001), 0.1, dtype=torch.float64)[:, :-1]
    (row,) = perplexity_by_length({1001: many}, torch.ones(1000, 1001, dtype=torch.int64))
    assert row["bits_per_byte"] == pytest.approx(0.1 / math.log(2), rel=1e-12)


def test_a_hopeless_model_has_a_finite_perplexity():
    (row,) = perplexity_by_length({3: torch.full((1, 2), 5000.0)}, torch.ones(1, 3, dtype=torch.int64))
    assert math.isfinite(row["perplexity"]) and row["perplexity"] > 1e300


def documents_of(tokens, num_bytes):
    ids = [np.arange(count) for count in tokens]
    return Documents(ids, [1], np.array(tokens), np.array(num_bytes), 0)


def test_figures_of_documents():
    found = document_figures([3.0, 1.0, 8.0], documents_of([2, 1, 6], [5, 4, 11]))
    assert found["perplexity"] == pytest.approx(math.exp(12 / 9))
    assert found["bits_per_byte"] == pytest.approx(12 / math.log(2) / 20)
    assert (found["documents"], found["scored_tokens"], found["unscored_tokens"], found["bytes"]) == (3, 9, 0, 20)
    assert found["perplexity_interval"] is None and found["bits_per_byte_interval"] is None


def test_intervals_of_equal_documents_are_those_of_a_mean():
    """Student's interval of a mean, with the quantile of a printed table; of pairs, that of their differences."""
    rng = np.random.default_rng(0)
    losses, others = rng.normal(20, 4, (2, 20))
    documents = documents_of([10] * 20, [7] * 20)
    found = document_figures(losses, documents)
    half = 2.093024 * statistics.stdev(losses) / math.sqrt(20)
    mean = statistics.mean(losses)
    expected = [math.exp((mean - half) / 10), math.exp((mean + half) / 10)]
    assert found["perplexity_interval"] == pytest.approx(expected, rel=1e-5)
    bits = math.log(2) * 7
    assert found["bits_per_byte_interval"] == pytest.approx([(mean - half) / bits, (mean + half) / bits], rel=1e-5)
    pairs = compare_documents(losses, documents, others, documents)
    changes = losses - others
    half, mean = 2.093024 * statistics.stdev(changes) / math.sqrt(20) / bits, statistics.mean(changes) / bits
    assert pairs["bits_per_byte_difference"] == pytest.approx(mean)
    assert pairs["bits_per_byte_difference_interval"] == pytest.approx([mean - half, mean + half], rel=1e-5)


def test_pairs_are_told_apart_where_single_intervals_are_not():
    """A model that is 1 % worse everywhere, on documents that differ by much more."""
    rng = np.random.default_rng(1)
    documents = documents_of(rng.integers(10, 90, 60), rng.integers(30, 300, 60))
    losses = documents.num_scored * rng.uniform(1, 6, 60)
    worse = losses * (1.01 + rng.normal(0, 0.002, 60))
    low, high = compare_documents(worse, documents, losses, documents)["bits_per_byte_difference_interval"]
    assert 0 < low < high
    single = [document_figures(values, documents)["bits_per_byte_interval"] for values in (losses, worse)]
    assert single[1][0] < single[0][1]


# ---------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer_folder):
    return load_tokenizer(base_tokenizer_folder)


@pytest.fixture(scope="module")
def text():
    lines = (EXAMPLES / "pretrain" / "en_heldout.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[:30]) + " 猫和狗。"  # characters that the tokenizer writes as bytes


def test_rows_are_stretches_of_documents(tokenizer, text, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(f"{text}\n***\ntoo short\n***\n{text.upper()}\n", encoding="utf-8")
    rows = read_rows([path], tokenizer, 50, document_separator="***")
    expected = []
    for document in (text, text.upper()):
        ids = encode_text(tokenizer, document)
        pieces = [ids[start : start + 49] for start in range(0, len(ids), 49)]
        expected += [[tokenizer.bos_token_id, *piece] for piece in pieces if len(piece) == 49]
    assert rows.ids.tolist() == expected and len(expected) > 20
    assert rows.num_bytes.shape == rows.ids.shape and not rows.num_bytes[:, 0].any()


def test_bytes_are_those_of_the_text(tokenizer, text, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"body": text}) + "\n", encoding="utf-8")
    length = len(encode_text(tokenizer, text)) + 1
    rows = read_rows([path], tokenizer, length, text_column="body")
    assert len(rows.ids) == 1 and int(rows.num_bytes.sum()) == len(text.encode())


def test_kept_rows_are_spread_evenly(tokenizer, text, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(text.replace("\n", " ") + "\n", encoding="utf-8")
    every = read_rows([path], tokenizer, 20)
    count = len(every.ids)
    some = read_rows([path], tokenizer, 20, max_rows=4)
    assert torch.equal(some.ids, every.ids[[0, count // 4, count // 2, 3 * count // 4]])
    assert torch.equal(read_rows([path], tokenizer, 20, max_rows=10**6).ids, every.ids)


def test_short_documents_are_refused(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("one\ntwo words\n", encoding="utf-8")
    length = len(encode_text(tokenizer, "two words")) + 1
    with pytest.raises(InputError, match=rf"no document of 50 tokens.*the longest has {length}.*--lengths"):
        read_rows([path], tokenizer, 50)


def test_every_document_is_scored(tokenizer, text, tmp_path):
    """Long and short, one character and many; blank lines are none; bytes are those of the text."""
    path = tmp_path / "all.txt"
    texts = ["猫", "a", text.replace("\n", " "), "two words", " led by a space"]
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    documents = read_documents([path, path], tokenizer)
    assert [ids.tolist() for ids in documents.ids] == [encode_text(tokenizer, line) for line in texts * 2]
    assert documents.num_bytes.tolist() == [len(line.encode()) for line in texts * 2]
    assert documents.num_scored.tolist() == [len(ids) for ids in documents.ids]
    assert documents.start == [tokenizer.bos_token_id] and documents.left_out == 0
    some = read_documents([path], tokenizer, max_documents=2)
    assert [ids.tolist() for ids in some.ids] == [documents.ids[rank].tolist() for rank in (0, 2)]
    assert some.left_out == 3 and len(read_documents([path], tokenizer, max_documents=99).ids) == 5
    whole = read_documents([path], tokenizer, document_separator="###")
    assert whole.num_bytes.tolist() == [len("\n\n".join(texts).encode())]


def test_without_bos_the_first_token_is_given(base_tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(base_tokenizer_folder)
    tokenizer.bos_token = None
    (tmp_path / "a.txt").write_text("two words\na\n", encoding="utf-8")
    documents = read_documents([tmp_path / "a.txt"], tokenizer)
    ids = documents.ids[0].tolist()
    first = tokenizer.convert_ids_to_tokens(ids[0])
    assert documents.start == [] and documents.num_scored.tolist() == [len(ids) - 1, len(documents.ids[1]) - 1]
    assert documents.num_bytes[0] in (9 - len(first), 10 - len(first))  # the space put before the text is no byte
    (tmp_path / "b.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"no text to score in .*b\.txt"):
        read_documents([tmp_path / "b.txt"], tokenizer)


def test_groups_are_all_documents_in_order(monkeypatch):
    monkeypatch.setattr(perplexity, "GROUP_TOKENS", 10)
    documents = documents_of([4, 4, 4, 30, 1, 1, 0], [1] * 7)
    assert list(documents.groups()) == [range(0, 3), range(3, 4), range(4, 7)]


def test_the_picture_is_drawn(tmp_path):
    rows = [
        {"text": text, "label": label, "length": length, "perplexity": 10.0 * length}
        for text in ("one", "two")
        for label in ("none", "yarn")
        for length in (8, 16)
    ]
    plot_by_length(rows, tmp_path / "curve.png", [8])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_and_the_table_of_documents(tmp_path):
    rows = []
    for text in ("one", "two"):
        for label, interval in (("a", [0.9, 1.1]), ("b", None)):
            row = {"text": text, "label": label, "perplexity": 7.5, "perplexity_interval": interval}
            row |= {"bits_per_byte": 1.0, "bits_per_byte_interval": interval, "documents": 12, "scored_tokens": 345}
            rows.append(row)
    plot_documents(rows, tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    rows[1] |= {"bits_per_byte_difference": 0.01234, "bits_per_byte_difference_interval": [-0.1, 0.2]}
    lines = [format_document_row(row) for row in (None, *rows)]
    assert len(set(map(len, lines))) == 1
    assert "1.0000 +-0.1000" in lines[1] and "+0.0123 +-0.1500" in lines[2] and "+-" not in lines[4]
