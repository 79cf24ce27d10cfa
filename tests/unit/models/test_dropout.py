"""Dropout of adapters against its definition: which share goes, what stays, and that a seed repeats."""

import peft
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from support.models import tiny_llama
from utils.core.arguments import LoraArguments
from utils.models.dropout import AdapterDropout
from utils.models.training_model import attach_adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_goes_and_the_rest_is_scaled(p, dtype):
    torch.manual_seed(0)
    x = torch.rand(500, 401, dtype=dtype).add_(1).requires_grad_()
    y = AdapterDropout(p)(x)
    kept = y != 0
    # A binomial count is within five standard deviations of its mean.
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(1 - kept.float().mean() - p) < 5 * deviation
    assert (1 - kept.float().mean(0) - p).abs().max() < 5 * deviation * 401**0.5, "of every column"
    torch.testing.assert_close(y[kept], x[kept] / (1 - p), rtol=2e-4 if dtype == torch.float32 else 8e-3, atol=0)
    (y * torch.full_like(y, 3)).sum().backward()
    torch.testing.assert_close(x.grad, torch.where(kept, 3 / (1 - p), 0).to(dtype), rtol=8e-3, atol=0)


def test_neighbours_and_calls_are_independent():
    torch.manual_seed(0)
    dropout, x = AdapterDropout(0.5), torch.ones(400_001)
    first, second = (dropout(x).bool().float() for _ in range(2))
    for distance in range(1, 9):  # 16-bit numbers come four at a time
        assert abs(torch.corrcoef(torch.stack([first[distance:], first[:-distance]]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.01


def test_a_seed_repeats_also_under_checkpointing():
    dropout, weight = AdapterDropout(0.3), torch.randn(20, 20, requires_grad=True)
    x, gradients = torch.randn(7, 20), []
    for step in (
        lambda x: dropout(x @ weight),
        lambda x: checkpoint(lambda x: dropout(x @ weight), x, use_reentrant=False),
    ):
        torch.manual_seed(3)
        weight.grad = None
        step(x).pow(2).sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (5, 0)])
def test_any_shape(shape):
    assert AdapterDropout(0.5)(torch.ones(shape)).shape == shape


def test_without_training_or_without_a_share_nothing_is_changed():
    x = torch.randn(9)
    assert torch.equal(AdapterDropout(0.5).eval()(x), x) and torch.equal(AdapterDropout(0.0)(x), x)


@pytest.mark.slow
def test_a_compiled_layer_has_torch_s_own(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # conftest.py sets 1
    torch.manual_seed(0)
    x = torch.ones(1000, requires_grad=True)
    y = torch.compile(AdapterDropout(0.5), backend="eager", fullgraph=True)(x)
    y.sum().backward()
    assert 0 < (y == 0).sum() < 1000 and torch.equal(x.grad, y)


def test_adapters_have_it(tmp_path):
    lora = LoraArguments(lora_rank=2, target_modules="all", lora_dropout=0.25)
    wrapped = attach_adapter(tiny_llama(50), lora, 16)
    layers = [layer for layer in wrapped.modules() if isinstance(layer, peft.tuners.lora.Linear)]
    assert layers
    assert all(type(layer.lora_dropout["default"]) is AdapterDropout for layer in layers)
    assert all(layer.lora_dropout["default"].p == 0.25 for layer in layers)
    wrapped.save_pretrained(tmp_path)
    going_on = attach_adapter(tiny_llama(50), LoraArguments(adapter_name_or_path=str(tmp_path)), 16)
    kinds = {type(module) for module in going_on.modules() if isinstance(module, torch.nn.Dropout)}
    assert kinds == {AdapterDropout}
