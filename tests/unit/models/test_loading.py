"""Modeling: the chunked loss against torch's own, new rows against hand-made means, refusals."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from support.tokenizers import NEW_PIECES, train_sentencepiece, write_sentencepiece
from utils.core.arguments import ExtendArguments, LoraArguments, ModelArguments
from utils.core.errors import InputError
from utils.models import lm_loss, loading, new_rows, training_model
from utils.models.lm_loss import LossHead, install_loss_head, loss_targets, token_nll
from utils.models.new_rows import extend_vocabulary
from utils.text.tokenizer import encode_text, load_tokenizer
from utils.weights import config


def tiny_llama(tied: bool = False, vocabulary: int = 97) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


def some_batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (3, 70))
    targets = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    targets[0, :40] = -100
    targets[2] = -100  # a row without any label
    return ids, targets


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_elements", [97 * 64, 1 << 24])
def test_chunked_loss_and_all_gradients_equal_cross_entropy(tied, chunk_elements, monkeypatch):
    monkeypatch.setattr(lm_loss, "CHUNK_ELEMENTS", chunk_elements)
    plain, chunked = tiny_llama(tied), tiny_llama(tied)
    install_loss_head(chunked)
    ids, targets = some_batch()
    expected = (
        functional.cross_entropy(plain(input_ids=ids).logits.flatten(0, 1), targets.flatten(), reduction="sum") / 7
    )
    expected.backward()
    with loss_targets(chunked, targets):
        loss = chunked(input_ids=ids).logits / 7
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for (name, mine), theirs in zip(chunked.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_without_gradient_every_position_has_its_loss():
    model = tiny_llama()
    install_loss_head(model)
    ids, targets = some_batch()
    logits = model(input_ids=ids).logits
    with torch.no_grad(), loss_targets(model, targets):
        losses = model(input_ids=ids).logits
    expected = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    assert model(input_ids=ids).logits.shape == (3, 70, 97), "outside the block the head gives logits again"


@pytest.mark.parametrize("trained", ["all", "head frozen", "hidden frozen"])
@pytest.mark.parametrize("kind", ["tokens", "tokens+entropy"])
def test_token_losses_take_any_gradient(monkeypatch, kind, trained):
    """Weighted token losses against autograd through whole logits, in several chunks, with a temperature."""
    monkeypatch.setattr(lm_loss, "CHUNK_ELEMENTS", 97 * 64)
    plain, chunked = tiny_llama(), tiny_llama()
    install_loss_head(chunked)
    ids, targets = some_batch()
    for model in (plain, chunked):
        model.lm_head.requires_grad_(trained != "head frozen")
        model.model.requires_grad_(trained != "hidden frozen")
    weights = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    logits = plain(input_ids=ids).logits / 0.7
    nll = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    (nll * weights).sum().backward()
    with loss_targets(chunked, targets, kind, temperature=0.7):
        result = chunked(input_ids=ids).logits
    if kind == "tokens+entropy":
        result, entropy = result.unbind(-1)
        expected = torch.distributions.Categorical(logits=logits.detach()).entropy().masked_fill(targets == -100, 0.0)
        torch.testing.assert_close(entropy.detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.detach(), nll.detach())
    (result * weights).sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), chunked.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_token_losses_without_gradient_and_in_bf16():
    model = tiny_llama()
    install_loss_head(model)
    ids, targets = some_batch()
    with torch.no_grad(), loss_targets(model, targets):
        expected = model(input_ids=ids).logits
    with torch.no_grad(), loss_targets(model, targets, "tokens+entropy"):
        torch.testing.assert_close(model(input_ids=ids).logits[..., 0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16), loss_targets(model, targets, "tokens"):
        result = model(input_ids=ids).logits
    result.sum().backward()
    torch.testing.assert_close(result.detach(), expected, rtol=0.05, atol=0.05)
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_bf16_autocast_keeps_the_gradient_in_fp32_and_close():
    plain, chunked = tiny_llama(), tiny_llama()
    install_loss_head(chunked)
    ids, targets = some_batch()
    plain_loss = functional.cross_entropy(plain(input_ids=ids).logits.flatten(0, 1), targets.flatten())
    plain_loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16), loss_targets(chunked, targets):
        loss = chunked(input_ids=ids).logits / (targets != -100).sum()
    loss.backward()
    torch.testing.assert_close(loss, plain_loss, rtol=5e-3, atol=0)
    gradient, expected = chunked.lm_head.weight.grad, plain.lm_head.weight.grad
    assert gradient.dtype == torch.float32
    assert functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.999


def test_a_frozen_head_costs_no_gradient_and_a_saved_copy_gets_it():
    from peft import LoraConfig, get_peft_model

    ids, targets = some_batch()
    for saved in (None, ["lm_head"]):
        model = tiny_llama()
        install_loss_head(model)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
        with loss_targets(model, targets):
            model(input_ids=ids).logits.backward()
        heads = [module for module in model.modules() if isinstance(module, LossHead)]
        grads = [head.weight.grad is not None for head in heads]
        assert grads == ([False] if saved is None else [False, True])


def test_logits_are_never_whole(monkeypatch):
    """The saved tensors and the peak of one chunk stay far below T x V."""
    hidden, weight = torch.randn(512, 8), torch.randn(50_000, 8)
    monkeypatch.setattr(lm_loss, "CHUNK_ELEMENTS", 1 << 22)
    assert len(lm_loss.chunks(512, 50_000)) > 1
    nll = token_nll(hidden, weight, torch.zeros(512, dtype=torch.long))
    expected = functional.cross_entropy(hidden @ weight.T, torch.zeros(512, dtype=torch.long), reduction="none")
    torch.testing.assert_close(nll, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_their_old_pieces(base_tokenizer_folder, extended_tokenizer_folder, tied):
    old, new = load_tokenizer(base_tokenizer_folder), load_tokenizer(extended_tokenizer_folder)
    model = tiny_llama(tied, len(old))
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
    model = tiny_llama(False, len(old))
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


def test_a_larger_tokenizer_needs_trained_rows(tiny_model_folder, extended_tokenizer_folder):
    tokenizer = load_tokenizer(extended_tokenizer_folder)
    request = (ModelArguments(model_name_or_path=str(tiny_model_folder)), ExtendArguments())
    with pytest.raises(InputError, match=r"406 tokens, the model 400 .*--modules_to_save embed_tokens,lm_head"):
        training_model.check_training_request(*request, LoraArguments(), tokenizer)
    training_model.check_training_request(*request, LoraArguments(modules_to_save="embed_tokens,lm_head"), tokenizer)
    allowed = ExtendArguments(resize_embeddings=True)
    training_model.check_training_request(request[0], allowed, LoraArguments(), tokenizer)


def test_lm_head_among_targets_is_refused(tiny_model_folder):
    model = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    with pytest.raises(InputError, match="lm_head"):
        training_model.attach_adapter(model, LoraArguments(target_modules="q_proj,lm_head"), 16)


def test_an_adapter_folder_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="it holds an adapter"):
        config.load_config(str(tmp_path))


def test_a_model_is_created_from_a_config_with_overrides(tiny_model_folder):
    overrides = "num_hidden_layers=1,tie_word_embeddings=true"
    created = loading.create_model(
        ExtendArguments(config_name=str(tiny_model_folder), config_overrides=overrides), 300, "eager"
    )
    assert len(created.model.layers) == 1 and tuple(created.lm_head.weight.shape) == (300, 32)
    assert created.lm_head.weight is created.model.embed_tokens.weight
    for wrong in ("num_hidden_layers", "layers=3"):
        with pytest.raises(InputError, match=rf"--config_overrides {wrong}: need name=value"):
            loading.create_model(
                ExtendArguments(config_name=str(tiny_model_folder), config_overrides=wrong), 300, "eager"
            )
    with pytest.raises(InputError, match="no such folder"):
        loading.create_model(ExtendArguments(config_name=str(tiny_model_folder / "absent")), 300, "eager")
