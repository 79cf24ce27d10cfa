"""Direct preference optimisation: the loss of a pair, its Trainer, and the curves of a run.

Shapes: P pairs of a batch, B rows, T positions. Chosen and rejected answers come by turns; see data.batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..core.figures import saved_figure
from ..data.batches import Example, PairCollator, PairSet
from ..training.arguments import RunArguments
from ..training.plots import log_curves
from . import objectives
from .pair_trainer import PairTrainer
from .reference import answer_lengths, answer_logprobs

REFERENCE_LOSSES = ("sigmoid", "ipo", "hinge")
AVERAGED_LOSSES = ("ipo", "orpo", "simpo")  # they compare log-probabilities a token, the others those of whole answers
DEFAULT_BETA = {"simpo": 2.0}  # 0.1 for the others
STATISTICS = (
    "loss",
    "chosen_reward",  # beta * log(policy / reference), without a reference beta * log(policy)
    "rejected_reward",
    "reward_margin",
    "accuracy",  # of the rewards: a tie is a mistake
    "chosen_logprob",  # nats a token
    "rejected_logprob",
    "log_ratio",  # log(policy / reference), nats a token of both answers; not for losses without a reference
)


@dataclass(frozen=True)
class Objective:
    """The loss of a pair.

    Attributes:
        kind: sigmoid, ipo, hinge, orpo or simpo; see the function of objectives of that name.
        beta: see there; for sigmoid, ipo and hinge, how dear it is to leave the reference.
        label_smoothing: sigmoid only.
        simpo_gamma: simpo only.
        sft_weight: this many times the chosen answer's mean negative log-likelihood is added.
    """

    kind: str
    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 1.0
    sft_weight: float = 0.0

    @property
    def needs_reference(self) -> bool:
        return self.kind in REFERENCE_LOSSES

    def evaluate(self, logprobs: Tensor, lengths: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Losses (P,), and STATISTICS (P, 8) without gradient.

        Args: logprobs, reference: (2 P,) summed log-probabilities of the answers; lengths: (2 P,) their tokens.
        Source of sft_weight: Pang et al. 2024, "Iterative Reasoning Preference Optimization", eq. 1 (RPO).
        """
        zero = torch.zeros_like(logprobs) if reference is None else reference
        divisor = lengths if self.kind in AVERAGED_LOSSES else torch.ones_like(lengths)
        policy, base = logprobs / divisor, zero / divisor
        four = (policy[::2], policy[1::2], base[::2], base[1::2])
        if self.kind == "sigmoid":
            losses = objectives.dpo_loss(*four, self.beta, self.label_smoothing)
        elif self.kind == "ipo":
            losses = objectives.ipo_loss(*four, self.beta)
        elif self.kind == "hinge":
            losses = objectives.hinge_loss(*four, self.beta)
        elif self.kind == "orpo":
            losses = objectives.orpo_loss(*four[:2], self.beta)
        elif self.kind == "simpo":
            losses = objectives.simpo_loss(*four[:2], self.beta, self.simpo_gamma)
        else:
            raise AssertionError(f"no loss is called {self.kind}")
        mean = logprobs / lengths
        if self.sft_weight:
            losses = losses - self.sft_weight * mean[::2]
        rewards = objectives.implicit_rewards(policy, base, self.beta)
        chosen, rejected = rewards[::2], rewards[1::2]
        moved = (logprobs - zero).view(-1, 2).sum(1) / lengths.view(-1, 2).sum(1)
        columns = [losses, chosen, rejected, chosen - rejected, chosen > rejected, mean[::2], mean[1::2], moved]
        return losses, torch.stack([column.detach().float() for column in columns], 1)

    def summarise(self, means: np.ndarray) -> dict[str, float]:
        """Means (8,) of the statistics by name; without a reference there is no log ratio."""
        names = STATISTICS if self.needs_reference else STATISTICS[:-1]
        return dict(zip(names, np.asarray(means, dtype=np.float64).tolist(), strict=False))


# ---------------------------------------------------------------- pairs that carry the reference


@dataclass(frozen=True)
class ExampleWithReference(Example):
    """An Example with the reference's log-probabilities of both answers, (2,) float32."""

    reference: np.ndarray


class PairsWithReference(PairSet):
    """A PairSet with the reference's table (n, 2) of its file; see reference.load_reference_tables."""

    def __init__(self, pairs: PairSet, table: np.ndarray) -> None:
        super().__init__(pairs.file, pairs.ids)
        self.table = table

    def __getitem__(self, index: int) -> ExampleWithReference:
        example = super().__getitem__(index)
        return ExampleWithReference(example.number, example.pair, self.table[example.number])


class PreferenceCollator(PairCollator):
    """A PairCollator whose batches hold "reference", (2 P,) float32, where the examples carry it."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = super().__call__(examples)
        references = [example.reference for example in examples if isinstance(example, ExampleWithReference)]
        if references:
            batch["reference"] = torch.from_numpy(np.concatenate(references))
        return batch


# ---------------------------------------------------------------- the Trainer


class DPOTrainer(PairTrainer):
    """PairTrainer with an Objective. The reference comes with the batch, or is the policy without its adapter."""

    def __init__(
        self,
        model: nn.Module,
        args: RunArguments,
        train_set: PairSet,
        eval_sets: dict[str, PairSet],
        tokenizer: PreTrainedTokenizerBase,
        collator: PreferenceCollator,
        objective: Objective,
    ) -> None:
        super().__init__(model, args, train_set, eval_sets, tokenizer, collator)  # type: ignore[arg-type]
        self.objective = objective
        # Sums of the statistics since the last line of the log, and the number of pairs, of this process.
        self.sums = torch.zeros(len(STATISTICS) + 1, dtype=torch.float64)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss over the pairs of the optimizer step; plus the router's balancing loss of a mixture."""
        losses, statistics, outputs = self._pair_statistics(model, inputs)
        parts = torch.cat([statistics.double().sum(0), statistics.new_tensor([len(losses)]).double()])
        self.sums += parts.cpu()
        loss = self.mean_over_pairs(losses, num_items_in_batch)
        loss = self.add_router_loss(loss, model, outputs)
        return (loss, outputs) if return_outputs else loss

    def _pair_statistics(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
        """Losses (P,), statistics (P, 8) and the policy's output."""
        reference = batch.get("reference")
        if reference is None and self.objective.needs_reference:
            reference = self._without_adapter(model, batch)
        logprobs, outputs = answer_logprobs(model, batch)
        return *self.objective.evaluate(logprobs, answer_lengths(batch), reference), outputs

    @torch.no_grad()
    def _without_adapter(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The reference's log-probabilities (2 P,): originals of what modules_to_save trains, no adapter, no dropout.

        Before the policy's forward pass, because PEFT switches requires_grad of the adapter off and on again.
        """
        training = model.training
        model.eval()
        try:
            with self.accelerator.unwrap_model(model).disable_adapter():
                return answer_logprobs(model, batch)[0]
        finally:
            model.train(training)

    # ------------------------------------------------------------ evaluation

    def evaluate_pairs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Statistics (P, 8)."""
        return self._pair_statistics(model, inputs)[1]

    def _summarise_losses(self, prediction: EvalPrediction) -> dict[str, float]:
        statistics = np.asarray(prediction.predictions, dtype=np.float64)
        return self.objective.summarise(statistics.mean(0))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """STATISTICS of every validation set as "eval_<set>_<name>", and their means over the sets, "eval_<name>"."""
        sets = eval_dataset if eval_dataset is not None else self.eval_dataset
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        for name in STATISTICS:
            values = (
                [metrics.get(f"{metric_key_prefix}_{key}_{name}") for key in sets] if isinstance(sets, dict) else []
            )
            known = [value for value in values if value is not None]
            if known:
                metrics[f"{metric_key_prefix}_{name}"] = sum(known) / len(known)
        return metrics

    # ------------------------------------------------------------ logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the statistics to the training lines: means over all pairs, of all processes, since the line before."""
        if "loss" in logs:
            sums = self.sums.to(self.args.device, torch.float32)
            sums = (self.accelerator.reduce(sums) if self.args.world_size > 1 else sums).cpu().double()
            means = self.objective.summarise((sums[:-1] / sums[-1].clamp(min=1)).numpy())
            logs |= {name: value for name, value in means.items() if name != "loss"}
            self.sums.zero_()
        super().log(logs, start_time)

    def draw(self, folder: Path, title: str) -> None:
        """loss.png, and rewards, margin and accuracy as dpo.png."""
        super().draw(folder, title)
        plot_preferences(self.state.log_history, folder / "dpo.png")


def plot_preferences(history: list[dict[str, Any]], path: Path) -> None:
    """Draw rewards, reward margin and accuracy over optimizer steps into a png; nothing without two points.

    Lines are training, dots evaluation.
    """
    panels = {
        "implicit rewards": ("chosen_reward", "rejected_reward"),
        "reward margin": ("reward_margin",),
        "accuracy": ("accuracy",),
    }
    if len(log_curves(history, "reward_margin").get("training", [])) < 2:
        return
    with saved_figure(path, 13, 4) as figure:
        for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for name in names:
                curves = log_curves(history, name)
                steps, values = zip(*curves.pop("training"), strict=True)
                (line,) = axis.plot(steps, values, label=name, linewidth=1.2)
                points = [point for evaluated in curves.values() for point in evaluated]
                if points:
                    dots = {"color": line.get_color(), "markersize": 5, "label": f"eval {name}"}
                    axis.plot(*zip(*points, strict=True), "o", **dots)
            axis.set(xlabel="optimizer step", title=title)
            axis.grid(alpha=0.3)
            axis.legend()
