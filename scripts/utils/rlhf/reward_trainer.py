"""The Trainer of rm.py, and the report on a reward model: accuracy, calibration, length bias."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..core.figures import saved_figure
from ..core.files import write_json
from ..data.batches import PairSet, model_inputs
from ..training.arguments import RunArguments, check_validation
from ..training.plots import plot_curves
from .objectives import reward_model_loss
from .pair_trainer import PairTrainer
from .reward_model import score_places

REPORT = "reward_report.json"
PICTURE = "reward_report.png"
NUM_BINS = 10
MAX_SOURCES = 50  # with more, the accuracy by source stands in the report alone
METRICS = ("accuracy", "loss", "margin", "calibration_error")  # those a checkpoint may be chosen by
SMALLER_IS_BETTER = ("loss", "calibration_error")


class RewardTrainer(PairTrainer):
    """PairTrainer with the reward model's loss; a report of every validation set after each evaluation."""

    def __init__(
        self,
        model: nn.Module,
        args: RunArguments,
        train_set: PairSet,
        eval_sets: dict[str, PairSet],
        tokenizer: PreTrainedTokenizerBase,
        collator: Any,
        use_margin: bool,
        centering: float,
    ) -> None:
        """Args: collator: a PairCollator; use_margin: demand the records' margins; centering: see
        objectives.reward_model_loss."""
        self.use_margin, self.centering = use_margin, centering
        self.reports: dict[str, dict[str, Any]] = {}
        self._evaluated: tuple[str, PairSet] | None = None
        self._since_log: list[Tensor] = []
        super().__init__(model, args, train_set, eval_sets, tokenizer, collator)

    # ------------------------------------------------------------ loss

    def _score(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Scores (P, 2) of a batch: chosen, rejected."""
        with score_places(model, inputs["last"]):
            output = model(**model_inputs(inputs), use_cache=False)
        scores: Tensor = output.logits.view(-1, 2)
        return scores

    def _losses(self, scores: Tensor, margins: Tensor) -> Tensor:
        """Scores (P, 2) and margins (P,) -> (P,)."""
        margin = margins if self.use_margin else None
        return reward_model_loss(scores[:, 0], scores[:, 1], margin, self.centering)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean over the pairs of the optimizer step of -log sigmoid(chosen - rejected), and centering."""
        scores = self._score(model, inputs)
        loss = self.mean_over_pairs(self._losses(scores, inputs["margins"]), num_items_in_batch)
        difference = (scores[:, 0] - scores[:, 1]).detach()
        self._since_log.append(
            torch.stack([(difference > 0).float().sum(), difference.sum(), difference.new_tensor(len(difference))])
        )
        return (loss, scores) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add accuracy and mean margin of the training pairs since the last line."""
        if "loss" in logs and self._since_log:
            sums = self.accelerator.reduce(torch.stack(self._since_log).sum(0))
            correct, margin, count = sums.tolist()
            logs |= {"accuracy": round(correct / count, 4), "margin": round(margin / count, 4)}
            self._since_log.clear()
        super().log(logs, start_time)

    # ------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The figures of describe_scores for every validation set, and the means of loss and accuracy over them."""
        sets = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not isinstance(sets, dict):
            self._evaluated = metric_key_prefix.removeprefix("eval_"), sets
            return super().evaluate(sets, ignore_keys, metric_key_prefix)
        metrics = super().evaluate(sets, ignore_keys, metric_key_prefix)
        accuracies = [metrics[f"{metric_key_prefix}_{name}_accuracy"] for name in sets]
        metrics[f"{metric_key_prefix}_accuracy"] = sum(accuracies) / len(accuracies)
        return metrics

    def draw(self, folder: Path, title: str) -> None:
        """Curves of the run, and the report of the last evaluation as reward_report.json and reward_report.png."""
        curves = {"loss": "loss (nats a pair)", "accuracy": "accuracy", "margin": "mean margin of the scores"}
        plot_curves(self.state.log_history, folder / "loss.png", title, curves)
        if self.reports:
            write_json(folder / REPORT, self.reports)
            plot_report(self.reports, folder / PICTURE)

    def evaluate_pairs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Scores (P, 2)."""
        return self._score(model, inputs)

    def _summarise_losses(self, prediction: EvalPrediction) -> dict[str, float]:
        assert self._evaluated is not None
        name, pairs = self._evaluated
        scores: np.ndarray = np.asarray(prediction.predictions, dtype=np.float64)
        numbers: np.ndarray = np.asarray(prediction.label_ids, dtype=np.int64)
        margins = np.nan_to_num(pairs.file.margins[numbers])
        losses = self._losses(torch.from_numpy(scores), torch.from_numpy(margins).double())
        sources = [pairs.file.source_names[number] for number in pairs.file.sources[numbers]]
        metrics, tables = describe_scores(scores, pairs.file.lengths[numbers, 1:], sources)
        metrics = {"loss": float(losses.mean()), **metrics}
        self.reports[name] = {**metrics, **tables}
        return metrics


def check_best_metric(args: RunArguments, names: Sequence[str]) -> None:
    """Have a checkpoint chosen by the smaller error, which transformers knows of losses alone.

    Raises: InputError if evaluation, or a checkpoint's choice, is asked of validation sets that are not there.
    """
    check_validation(args, names, METRICS, ("loss", "accuracy"))
    metric = args.metric_for_best_model
    if metric is not None and metric.endswith(SMALLER_IS_BETTER):
        args.greater_is_better = False


# ---------------------------------------------------------------- the report


def describe_scores(
    scores: np.ndarray, lengths: np.ndarray, sources: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """What the scores of pairs say of a reward model.

    Args: scores, lengths: (P, 2), of the chosen and the rejected answer, lengths in tokens; sources: (P,).
    Returns: figures (accuracy, margin: the mean difference of scores, means and standard deviations of both sides,
        calibration_error, and accuracy where the chosen answer is longer or shorter, length_correlation), and tables
        (accuracy_by_source, calibration, histogram).
    """
    difference = scores[:, 0] - scores[:, 1]
    correct = difference > 0  # a tie is a mistake
    calibration, error = calibrate(difference)
    metrics = {
        "accuracy": float(correct.mean()),
        "margin": float(difference.mean()),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "chosen_mean": float(scores[:, 0].mean()),
        "rejected_mean": float(scores[:, 1].mean()),
        "calibration_error": error,
    }
    longer = lengths[:, 0] > lengths[:, 1]
    shorter = lengths[:, 0] < lengths[:, 1]
    for name, kept in (("chosen_longer", longer), ("chosen_shorter", shorter)):
        metrics[f"share_{name}"] = float(kept.mean())
        if kept.any():
            metrics[f"accuracy_{name}"] = float(correct[kept].mean())
    if scores.std() > 0 and lengths.std() > 0:
        metrics["length_correlation"] = float(np.corrcoef(scores.ravel(), lengths.ravel())[0, 1])
    names = np.asarray(sources)
    by_source = {
        str(name): {"pairs": int((names == name).sum()), "accuracy": float(correct[names == name].mean())}
        for name in sorted(set(sources))
    }
    if 1 < len(by_source) <= MAX_SOURCES:
        metrics |= {f"accuracy_of_{name}": float(row["accuracy"]) for name, row in by_source.items()}
    edges = np.histogram_bin_edges(scores, 20)
    histogram = {
        "edges": edges.tolist(),
        "chosen": np.histogram(scores[:, 0], edges)[0].tolist(),
        "rejected": np.histogram(scores[:, 1], edges)[0].tolist(),
    }
    tables = {"pairs": len(scores), "accuracy_by_source": by_source, "calibration": calibration}
    return metrics, {**tables, "histogram": histogram}


def calibrate(difference: np.ndarray) -> tuple[list[dict[str, float]], float]:
    """Predicted against observed shares, and the expected calibration error.

    Which answer of a pair counts as the first is open: each pair is taken as the model's own bet on the answer it
    prefers, with probability sigmoid(|difference|) in [0.5, 1]; bins are as wide as one another.

    Args: difference: (P,) score of the chosen answer less that of the rejected one.
    Returns: {"predicted", "observed", "pairs"} of every bin that has pairs, and the mean over the pairs of
        |predicted - observed| of their bin (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 5).
    """
    predicted = 1 / (1 + np.exp(-np.minimum(np.abs(difference), 700)))
    right = np.where(difference == 0, 0.5, difference > 0)
    bins = np.minimum(((predicted - 0.5) * 2 * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    rows, error = [], 0.0
    for number in range(NUM_BINS):
        kept = bins == number
        if kept.any():
            row = {"predicted": float(predicted[kept].mean()), "observed": float(right[kept].mean())}
            rows.append({**row, "pairs": int(kept.sum())})
            error += abs(row["predicted"] - row["observed"]) * float(kept.mean())
    return rows, error


def plot_report(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """Calibration curve, histogram of scores and accuracy by source, a row for each validation set, as a png."""
    with saved_figure(path, 13, 3.6 * len(reports), dpi=110) as figure:
        grid = figure.subplots(len(reports), 3, squeeze=False)
        for (name, report), (curve, bars, sources) in zip(reports.items(), grid, strict=True):
            curve.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
            points = report["calibration"]
            curve.plot([row["predicted"] for row in points], [row["observed"] for row in points], marker="o")
            title = f"{name}: accuracy {report['accuracy']:.1%}, calibration error {report['calibration_error']:.3f}"
            curve.set(xlabel="predicted probability", ylabel="observed share", title=title)
            edges = report["histogram"]["edges"]
            for side in ("chosen", "rejected"):
                bars.stairs(report["histogram"][side], edges, fill=True, alpha=0.5, label=side)
            bars.set(xlabel="score", ylabel="answers", title=f"mean margin {report['margin']:.3g}")
            bars.legend()
            by_source = report["accuracy_by_source"]
            sources.barh(list(by_source), [row["accuracy"] for row in by_source.values()])
            sources.set(xlabel="accuracy", xlim=(0, 1), title="by source")
