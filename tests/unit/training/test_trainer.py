"""CausalLMTrainer's own parts that need no run: the router's share of a loss, the model card, what comes next."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback

from utils.training.runs import format_number
from utils.training.trainer import CausalLMTrainer, ShortRuns, describe_step, next_command


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
    assert next_command(adapter, tmp_path, ["run_x.sh"], {}) == (
        f"MODEL=base LORA={tmp_path} OUT={tmp_path}-merged bash scripts/run_merge.sh"
    )
    assert next_command(SimpleNamespace(), tmp_path, ["run_x.sh"], {}) == f"MODEL={tmp_path} bash scripts/run_x.sh"
    odd = Path("o u=t.1")
    assert shlex.split(next_command(SimpleNamespace(), odd, ["run_x.sh", "--score", "FILE"], {})) == [
        "MODEL=o u=t.1", "bash", "scripts/run_x.sh", "--score", "FILE",
    ]  # fmt: skip
    assert shlex.split(next_command(adapter, odd, ["run_x.sh"], {}))[1:3] == ["LORA=o u=t.1", "OUT=o u=t.1-merged"]


def test_a_line_of_the_log_is_for_people():
    logs = {"loss": 4.24876, "learning_rate": 5e-05, "tokens_per_second": 12345.67, "epoch": 0.5, "total_flos": 1e18}
    expected = "step 1,200/9,000 (epoch 0.50)  loss 4.249  learning_rate 5e-05  tokens_per_second 12,346"
    assert describe_step(1200, 9000, logs) == expected
    assert [format_number(value) for value in (True, 1234567, "a", 0.0001234567)] == [
        "True", "1,234,567", "a", "0.0001235",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "logged"), [(3, [1, 2, 3]), (19, list(range(1, 20))), (20, [10, 20]), (35, [10, 20, 30])]
)
def test_a_short_run_is_logged_often_enough_for_a_curve(steps, logged):
    """As transformers' own callback decides it, by the state of a run with --logging_steps 10."""
    args = SimpleNamespace(
        logging_first_step=False, logging_strategy="steps", eval_strategy="no", save_strategy="no", eval_delay=0
    )
    state, found = TrainerState(max_steps=steps, logging_steps=10, eval_steps=500, save_steps=500), []
    ShortRuns().on_train_begin(args, state, TrainerControl())
    for state.global_step in range(1, steps + 1):
        if DefaultFlowCallback().on_step_end(args, state, TrainerControl()).should_log:
            found.append(state.global_step)
    assert found == logged
