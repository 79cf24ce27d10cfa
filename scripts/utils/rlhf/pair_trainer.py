"""The Trainer of rm.py and dpo.py: batches of pairs of about the same length, losses that are means over pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import LengthGroupedOrder, PairSet
from ..training.trainer import CausalLMTrainer

FEW_PAIRS = 20


def doubt_few_pairs(name: str, count: int) -> list[str]:
    """What to say of the figures on so few pairs; nothing of enough."""
    if count >= FEW_PAIRS:
        return []
    return [
        f"{name}: {count} pairs, of which each moves the accuracy by {100 / max(1, count):.0f} points; figures on "
        f"fewer than {FEW_PAIRS} pairs say little: hold out more (--validation_split, --validation_data)"
    ]


class PairTrainer(CausalLMTrainer):
    """CausalLMTrainer on batches of a PairCollator. A subclass gives compute_loss, evaluate_pairs and its summary.

    Losses are divided by the number of pairs of the whole optimizer step, over all devices: `mean_over_pairs`.
    """

    train_dataset: PairSet
    loss_unit = "nats a pair"

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedOrder:
        batch_size = self.args.train_batch_size * self.args.world_size
        self.order = LengthGroupedOrder(self.train_dataset.lengths, batch_size, self.args.seed)
        return self.order

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # accelerate does not reach a sampler below the wrapper that skips batches when a run resumes.
        self.order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """The number of pairs of an optimizer step, over all processes."""
        count = torch.tensor(sum(len(batch["numbers"]) for batch in batch_samples), device=device)
        return self.accelerator.reduce(count) if self.args.world_size > 1 else count

    def doubts(self) -> list[str]:
        """Sets with too few pairs."""
        sets = self.eval_dataset or {}
        return [doubt for name, pairs in sets.items() for doubt in doubt_few_pairs(name, len(pairs))]

    def evaluate_pairs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """What evaluation needs of each pair of a batch, (P, n)."""
        raise NotImplementedError

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """(None, evaluate_pairs (P, n), the pairs' numbers (P,))."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            figures = self.evaluate_pairs(model, inputs)
        return None, figures.float(), inputs["numbers"]

    def mean_over_pairs(self, losses: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Losses (P,) of a micro-batch -> their share of the mean over the pairs of the optimizer step, a scalar."""
        if num_items_in_batch is None:
            return losses.mean()
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes  # gradients are averaged
