"""The chunked loss against torch's own, in value and in every gradient."""

import pytest
import torch
from torch.nn import functional

from support.models import tiny_llama
from utils.models import lm_loss
from utils.models.lm_loss import LossHead, install_loss_head, loss_targets, token_nll


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
    plain, chunked = tiny_llama(97, tie_word_embeddings=tied), tiny_llama(97, tie_word_embeddings=tied)
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
    model = tiny_llama(97)
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
    plain, chunked = tiny_llama(97), tiny_llama(97)
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
    model = tiny_llama(97)
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
    plain, chunked = tiny_llama(97), tiny_llama(97)
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
        model = tiny_llama(97)
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


def test_logits_are_never_taken_for_losses():
    """Where a library puts a head of its own before the LossHead, the sum of its logits would be trained."""
    model = tiny_llama(97)
    install_loss_head(model)
    model.spare, model.lm_head = model.lm_head, torch.nn.Linear(model.config.hidden_size, 97, bias=False)
    ids = torch.arange(6).view(1, 6)
    with pytest.raises(AssertionError, match="no LossHead"), loss_targets(model, ids):
        model(ids)
