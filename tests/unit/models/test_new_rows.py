"""New rows against hand-made means, and vocabularies that do not extend the old one."""

import shutil

import pytest
import torch

from support.models import tiny_llama
from support.tokenizers import NEW_PIECES, train_sentencepiece, write_sentencepiece
from utils.core.errors import InputError
from utils.models import new_rows
from utils.models.new_rows import extend_vocabulary
from utils.text.tokenizer import (
    choose_tokenizer,
    embedding_rows,
    encode_text,
    load_tokenizer,
    save_tokenizer,
    vocabulary_end,
)


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_their_old_pieces(base_tokenizer_folder, extended_tokenizer_folder, tied):
    old, new = load_tokenizer(base_tokenizer_folder), load_tokenizer(extended_tokenizer_folder)
    model = tiny_llama(len(old), tie_word_embeddings=tied)
    before = [weight.detach().clone() for weight in (model.get_input_embeddings().weight, model.lm_head.weight)]
    assert extend_vocabulary(model, old, new, "mean_of_pieces", seed=0) == len(NEW_PIECES)
    # No Chinese piece is in the base, so a Chinese surface is its bytes; "▁zebra" is what the base makes of " zebra".
    surfaces = [
        encode_text(old, "zebra")
        if piece == "▁zebra"
        else [old.convert_tokens_to_ids(f"<0x{b:02X}>") for b in piece.encode()]
        for piece in NEW_PIECES
    ]
    for weight, old_weight in zip((model.get_input_embeddings().weight, model.lm_head.weight), before, strict=True):
        assert weight.shape[0] == len(new)
        torch.testing.assert_close(weight[: len(old)], old_weight)
        for row, ids in enumerate(surfaces, len(old)):
            torch.testing.assert_close(weight[row], old_weight[ids].mean(0))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.vocab_size == len(new)


@pytest.mark.parametrize("method", ["mean", "random", "zero"])
def test_other_initialisations(method, base_tokenizer_folder, extended_tokenizer_folder):
    old = load_tokenizer(base_tokenizer_folder)
    model = tiny_llama(len(old))
    extend_vocabulary(model, old, load_tokenizer(extended_tokenizer_folder), method, seed=3)
    rows = model.lm_head.weight[len(old) :].detach()
    mean = model.lm_head.weight[: len(old)].detach().mean(0)
    if method == "zero":
        assert not rows.any()
    elif method == "mean":
        torch.testing.assert_close(rows, mean.expand(len(NEW_PIECES), -1))
    else:
        assert not torch.allclose(rows[0], rows[1])
        assert rows.norm(dim=1).max() < 3 * model.lm_head.weight[: len(old)].norm(dim=1).max()


@pytest.mark.parametrize("size", [330, 420])
def test_a_vocabulary_that_does_not_extend_the_old_one_is_refused(
    size, base_tokenizer_folder, extended_tokenizer_folder, tmp_path
):
    old = load_tokenizer(base_tokenizer_folder)
    lines = [f"the dog {i} sits on the mat, abc def ghi 狗和猫 {'qrstuvwxyz'[i % 10 :]}{i * 7}" for i in range(400)]
    other = load_tokenizer(write_sentencepiece(tmp_path / "other", train_sentencepiece(lines, size)))
    with pytest.raises(InputError, match=r"token \d+ is .* must extend"):
        new_rows.check_extends(old, other)
    new_rows.check_extends(old, load_tokenizer(extended_tokenizer_folder))
    new_rows.check_extends(old, old)


# ---------------------------------------------------------------- which tokenizer, and how many rows it needs


@pytest.fixture
def with_gap(base_tokenizer_folder, tmp_path):
    """400 pieces, and an added token at id 405."""
    shutil.copytree(base_tokenizer_folder, tmp_path / "gap")
    (tmp_path / "gap" / "added_tokens.json").write_text('{"<late>": 405}')
    return load_tokenizer(tmp_path / "gap")


def test_rows_reach_to_the_largest_id(base_tokenizer_folder, with_gap):
    assert len(with_gap) == 401 and with_gap.convert_tokens_to_ids("<late>") == 405
    assert vocabulary_end(with_gap) == embedding_rows(with_gap) == 406
    model = tiny_llama(400)
    with pytest.raises(
        InputError, match=r"new rows would stay untrained.*\(the largest id is 405: added tokens leave"
    ):
        new_rows.refuse_untrained_rows(with_gap, 401)
    assert extend_vocabulary(model, load_tokenizer(base_tokenizer_folder), with_gap, "mean_of_pieces", seed=0) == 6
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 406
    new_rows.check_extends(load_tokenizer(base_tokenizer_folder), with_gap)


def test_an_adapter_without_a_tokenizer_has_its_bases(base_tokenizer_folder, extended_tokenizer_folder, tmp_path):
    base, trained = str(base_tokenizer_folder), str(extended_tokenizer_folder)
    assert choose_tokenizer(str(tmp_path), base) == base
    assert choose_tokenizer(trained, base) == trained
    assert choose_tokenizer(None, base) == base and choose_tokenizer(None, None) is None


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_damaged_tokenizer_is_not_an_absent_one(base_tokenizer_folder, tmp_path, name):
    assert new_rows.find_tokenizer(str(tmp_path)) is None
    save_tokenizer(load_tokenizer(base_tokenizer_folder), tmp_path / "model")
    assert len(new_rows.find_tokenizer(str(tmp_path / "model"))) == 400
    whole = (tmp_path / "model" / name).read_bytes()
    for other in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / "model" / other).unlink()
    (tmp_path / "model" / name).write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputError, match=name):
        new_rows.find_tokenizer(str(tmp_path / "model"))


def test_rows_of_their_own_have_a_state_of_their_own():
    """Two steps of AdamW on the rows alone: as on a weight of these rows only, and nothing else moves."""
    torch.manual_seed(0)
    weight, inputs = torch.nn.Parameter(torch.randn(7, 3)), torch.randn(5, 3)
    before, alone = weight.detach().clone(), torch.nn.Parameter(weight.detach()[4:].clone())
    rows = new_rows.rows_from(weight, 4)
    optimizers = [torch.optim.AdamW([each], lr=0.1) for each in (rows, alone)]
    for _ in range(2):
        for half in inputs.split(3):  # gradients of two micro-batches
            (half @ weight.T).square().sum().backward()
            (half @ alone.T).square().sum().backward()
        assert torch.equal(weight.grad[:4], torch.zeros(4, 3)) and weight.grad[4:].abs().min() > 0
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        weight.grad = None
    assert torch.equal(weight[:4], before[:4])
    torch.testing.assert_close(weight[4:], alone)
    assert optimizers[0].state[rows]["exp_avg"].shape == (3, 3)
