"""CausalLMTrainer's own parts that need no run: the router's share of a loss, the model card, what comes next."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import torch

from utils.training.trainer import CausalLMTrainer, next_command


def test_the_router_loss_is_a_mean_over_the_micro_batches():
    model = SimpleNamespace(config=SimpleNamespace(router_aux_loss_coef=0.02))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped), current_gradient_accumulation_steps=4
    )
    loss, auxiliary = torch.tensor(1.5), torch.tensor(3.0)
    added = CausalLMTrainer.add_router_loss(trainer, loss, model, SimpleNamespace(aux_loss=auxiliary))
    assert added.item() == (loss + 0.02 * auxiliary / 4).item()
    for outputs in (SimpleNamespace(), SimpleNamespace(aux_loss=None)):
        assert CausalLMTrainer.add_router_loss(trainer, loss, model, outputs) is loss


def test_an_adapter_is_merged_next_and_a_model_is_used(tmp_path):
    adapter = SimpleNamespace(peft_config={"default": SimpleNamespace(base_model_name_or_path="base")})
    assert next_command(adapter, tmp_path, "run_x.sh") == (
        f"MODEL=base LORA={tmp_path} OUT={tmp_path}-merged bash scripts/run_merge.sh"
    )
    assert next_command(SimpleNamespace(), tmp_path, "run_x.sh") == f"MODEL={tmp_path} bash scripts/run_x.sh"
    odd = Path("o u=t.1")
    assert shlex.split(next_command(SimpleNamespace(), odd, "run_x.sh --score FILE")) == [
        "MODEL=o u=t.1", "bash", "scripts/run_x.sh", "--score", "FILE",
    ]  # fmt: skip
    assert shlex.split(next_command(adapter, odd, "run_x.sh"))[1:3] == ["LORA=o u=t.1", "OUT=o u=t.1-merged"]
