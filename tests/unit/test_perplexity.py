"""utils.perplexity: against plain loops over transformers' own logits, in float64 and one token at a time."""

import copy
import json
import math

import pytest
import torch
from conftest import EXAMPLES
from transformers import AutoModelForCausalLM, LlamaConfig

from utils import losses, perplexity
from utils.arguments import RopeArguments
from utils.files import InputError
from utils.losses import install_loss_head
from utils.perplexity import model_losses, perplexity_by_length, plot_perplexity, read_rows, token_losses
from utils.rope import install_row_rotary, scale_rope
from utils.tokenization import encode_text, load_tokenizer

WINDOW, VOCABULARY = 32, 97


def config_of(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(**(sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": WINDOW} | changes))


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


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
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 90)  # batches of two rows, the last of one
    if chunk:
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    model = model_of(config_of())
    install_loss_head(model)
    found = token_losses(model, ids)
    assert found.shape == (5, 39) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    rows = perplexity_by_length(model_losses(model, ids, [40]), torch.ones_like(ids))
    assert rows[0]["perplexity"] == pytest.approx(math.exp(float(expected.mean())), rel=1e-5)


def test_logits_never_stand_whole(monkeypatch):
    """The largest float32 tensor over the vocabulary has the 64 rows of the smallest chunk, not all positions."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 1)
    seen = []
    real = torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda logits, dim: seen.append(tuple(logits.shape)) or real(logits, dim))
    model = model_of(config_of())
    install_loss_head(model)
    token_losses(model, rows_of(2, 200))
    assert sum(rows for rows, _ in seen) == 2 * 199 and max(rows for rows, _ in seen) <= 64


def test_losses_that_are_no_numbers_are_refused():
    model = model_of(config_of())
    install_loss_head(model)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(InputError, match=r"not finite.*--dtype"):
        token_losses(model, rows_of(1, 8))


def test_shorter_texts_are_the_beginnings_of_longer_ones():
    model = model_of(config_of())
    install_loss_head(model)
    ids = rows_of(3, 60)
    found = model_losses(model, ids, [8, 60, 32])
    assert {length: part.shape for length, part in found.items()} == {n: (3, n - 1) for n in (8, 60, 32)}
    torch.testing.assert_close(found[8], token_losses(model, ids[:, :8]), rtol=1e-5, atol=1e-6)


def test_auto_ntk_scores_each_length_with_its_own_rotation():
    """Against plain models with the base of each length; within the trained window that is the model itself."""
    config = config_of()
    scale_rope(config, RopeArguments("auto-ntk"))
    model = model_of(config)
    install_row_rotary(model)
    install_loss_head(model)
    ids = rows_of(2, 64)
    found = model_losses(model, ids, [16, 32, 48, 64])
    for length, alpha in ((16, 1.0), (32, 1.0), (48, 2.0), (64, 3.0)):
        alone = model_of(config_of(rope_theta=10000.0 * alpha ** (16 / 14)))
        expected = torch.tensor([plain_losses(alone, row[:length]) for row in ids]).double()
        torch.testing.assert_close(found[length], expected, rtol=1e-5, atol=1e-5)


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


def test_the_picture_is_drawn(tmp_path):
    rows = [
        {"text": text, "label": label, "length": length, "perplexity": 10.0 * length}
        for text in ("one", "two")
        for label in ("none", "yarn")
        for length in (8, 16)
    ]
    plot_perplexity(rows, tmp_path / "curve.png", [8])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
