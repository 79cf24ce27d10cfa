"""The Trainer of pt.py and sft.py: chunked loss, complete checkpoints, evaluation in bits per byte, throughput."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..core.command_line import shell_command
from ..core.errors import InputError
from ..core.files import remove
from ..data.batches import Collator, PartCollator
from ..lora.base_record import record_base
from ..models.experts import counted_by_router
from ..models.lm_loss import loss_targets
from ..models.loading import causal_model
from ..models.new_rows import rows_from
from ..models.sequence_parallel import SequenceParallel
from ..models.training_model import train_flops_per_token, trainable_summary
from ..text.prompts import IGNORE_INDEX
from ..text.tokenizer import save_tokenizer
from ..weights.model_card import write_model_card
from ..weights.names import is_embedding
from .arguments import NO_EMBEDDINGS, RunArguments, peak_flops, peak_memory_gb
from .before_after import Trial, as_notes, as_text
from .memory import PlannedMemory
from .plots import plot_losses
from .runs import (
    CHECKPOINT_PREFIX,
    Run,
    finish_run,
    format_number,
    last_checkpoint,
    named_disk_errors,
    seal_checkpoint,
)

logger = logging.getLogger(__name__)

CURVE_POINTS = 10  # at least, of the training loss, where a run has so many steps


class ShortRuns(TrainerCallback):
    """Has a run that is hardly longer than --logging_steps logged more often, so that it has a curve, too."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called once the number of steps is known."""
        if state.max_steps < 2 * state.logging_steps:
            state.logging_steps = max(1, state.max_steps // CURVE_POINTS)


class LogLines(ProgressCallback):
    """The progress bar, and lines of the log that a person reads."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called with the figures of a line."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(describe_step(state.global_step, state.max_steps, logs))


def describe_step(step: int, steps: int, logs: Mapping[str, Any]) -> str:
    """One line: step, epoch, and the figures, of which total_flos says nothing to most."""
    figures = [f"{name} {format_number(value)}" for name, value in logs.items() if name not in ("epoch", "total_flos")]
    epoch = f" (epoch {logs['epoch']:.2f})" if "epoch" in logs else ""
    return "  ".join([f"step {step:,}/{steps:,}{epoch}", *figures])


class CausalLMTrainer(Trainer):
    """transformers' Trainer with this project's loss, checkpoints and measurements.

    Batches hold input_ids, position_ids, labels, shift_labels and is_token, each (B, T); see data.batches.Collator.
    """

    args: RunArguments
    data_collator: Any  # a Collator; while training batches are made of shared rows, a PartCollator
    loss_unit = "nats a token"

    def __init__(
        self,
        model: nn.Module,
        args: RunArguments,
        train_set: Any,
        eval_sets: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        collator: Collator,
        first_trained_row: int | None = None,
    ) -> None:
        """Args: first_trained_row: of embed_tokens and lm_head, where nothing else is trained; None: all rows."""
        self.first_trained_row = first_trained_row
        if collator.flatten:
            args.per_device_eval_batch_size = 1  # flattened batches are one row; evaluation sums row by row
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_set,
            eval_dataset=eval_sets or None,
            processing_class=tokenizer,
            compute_metrics=self._summarise_losses,
        )
        self.add_callback(ShortRuns())
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LogLines())
        # The loss is divided by the number of scored tokens of the whole optimizer step, over all devices.
        self.loss_is_scaled_for_ga = True
        size = args.sequence_parallel_size
        self.sequence_parallel = SequenceParallel(causal_model(model).config, size) if size > 1 else None
        self.eval_bytes = 0
        self.flops_per_token = train_flops_per_token(model, self._tokens_per_row())
        self.tokens_done = 0.0
        self._last_log = (time.perf_counter(), 0.0)

    # ------------------------------------------------------------ rows that processes share

    def get_train_dataloader(self) -> Any:
        """As the Trainer's, where processes that share rows get the same ones, each its part of them."""
        if self.sequence_parallel is None:
            return super().get_train_dataloader()
        size, whole = self.sequence_parallel.size, self.data_collator
        self.data_collator = PartCollator(whole, size, self.sequence_parallel.rank)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = whole  # evaluation has whole rows in each process
        shards = loader.batch_sampler  # accelerate's, which deals the batches to so many processes
        shards.num_processes, shards.process_index = shards.num_processes // size, shards.process_index // size
        # One group alone need not have as many rows in its last batch as others: no row comes twice.
        shards.even_batches = shards.even_batches and shards.num_processes > 1
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of an optimizer step."""
        return super().get_total_train_batch_size(args) // args.sequence_parallel_size

    # ------------------------------------------------------------ optimizer

    def learning_rates(self) -> dict[str, float]:
        """{kind of weights: their learning rate}; "" is all that has no rate of its own."""
        rates = {"": self.args.learning_rate}
        if self.args.embedding_learning_rate is not None:
            rates["embedding"] = self.args.embedding_learning_rate
        return rates

    def kind_of(self, name: str) -> str:
        """The kind of a parameter, by its name in the model."""
        return "embedding" if self.args.embedding_learning_rate is not None and is_embedding(name) else ""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with groups of their own for weights that have a learning rate of their own.

        Raises: InputError if embeddings have one, and are not trained.
        """
        if self.optimizer is not None:
            return self.optimizer
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if len(self.learning_rates()) > 1:
            self._split_groups(optimizer, self.model if model is None else model)
        if self.first_trained_row is not None:
            for group in optimizer.param_groups:  # nothing but embeddings
                group["params"] = [rows_from(weight, self.first_trained_row) for weight in group["params"]]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the Trainer's. Raises: InputError if warmup_stable_decay has more steps to decay than there are."""
        decay = (self.args.lr_scheduler_kwargs or {}).get("num_decay_steps", 0)
        steps = self.args.get_warmup_steps(num_training_steps) + decay
        if decay and steps > num_training_steps:
            raise InputError(
                f"--lr_scheduler_kwargs: warm-up and num_decay_steps are {steps} steps together, the run has "
                f"{num_training_steps}; lower num_decay_steps"
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _split_groups(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Give each kind of weights groups of its own, in an order that the state in a checkpoint relies on."""
        kinds = {id(weight): self.kind_of(name) for name, weight in model.named_parameters()}
        groups = optimizer.param_groups[:]
        optimizer.param_groups.clear()
        for kind, rate in self.learning_rates().items():
            for group in groups:
                if chosen := [weight for weight in group["params"] if kinds[id(weight)] == kind]:
                    optimizer.add_param_group({**group, "params": chosen, "lr": rate})
        if self.args.embedding_learning_rate is not None and not any(
            kinds[id(weight)] == "embedding" for group in groups for weight in group["params"]
        ):
            raise InputError(NO_EMBEDDINGS.format(self.args.embedding_learning_rate))

    # ------------------------------------------------------------ loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean negative log-likelihood a scored token, in nats; plus the router's balancing loss of a mixture."""
        targets, features = inputs["shift_labels"], _features(inputs)
        with loss_targets(model, targets), counted_by_router(model, inputs["is_token"]):
            outputs = model(**features, use_cache=False)  # .logits: the summed loss, see models.lm_loss
        count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORE_INDEX).sum()
        loss = outputs.logits.sum() / count
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        loss = self.add_router_loss(loss, model, outputs)
        return (loss, outputs) if return_outputs else loss

    def add_router_loss(self, loss: Tensor, model: nn.Module, outputs: Any) -> Tensor:
        """A micro-batch's loss with its share of the balancing loss, where the model is a mixture that gives one."""
        auxiliary = getattr(outputs, "aux_loss", None)
        if not torch.is_tensor(auxiliary):
            return loss
        weight = self.accelerator.unwrap_model(model).config.router_aux_loss_coef
        # A mean over its own tokens: the micro-batches' means are averaged, where the other losses are summed.
        return loss + weight * auxiliary / self.current_gradient_accumulation_steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass. Raises: InputError when the loss is not finite."""
        shared = self.sequence_parallel
        with shared.attention_over(inputs["row_position_ids"]) if shared else contextlib.nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):  # found before the optimizer's step, so no checkpoint holds such weights
            last = last_checkpoint(Path(self.args.output_dir))
            raise InputError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower --learning_rate, or use "
                f"--precision bf16 or fp32; the last good checkpoint is {last or 'none'}"
            )
        self.tokens_done += self._tokens_in(inputs)
        return loss

    def _tokens_in(self, inputs: dict[str, Any]) -> float:
        """Tokens without padding of the batches of all processes, from their mean number in a row."""
        rows = len(inputs["input_ids"]) if not self.data_collator.flatten else self.args.per_device_train_batch_size
        return rows * self._tokens_per_row() * self.args.world_size / self.args.sequence_parallel_size

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run stopped after its last step, but before its results were written, has no step left; transformers
        # would look for that only after one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _tokens_per_row(self) -> float:
        return float(self.train_dataset.num_tokens) / max(len(self.train_dataset), 1)

    # ------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, perplexity and bits per byte of every validation set, and their mean as "eval_loss"."""
        sets = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not isinstance(sets, dict):
            self.eval_bytes = sets.num_bytes  # for _summarise_losses, which transformers calls with losses alone
            return super().evaluate(sets, ignore_keys, metric_key_prefix)
        metrics = super().evaluate(sets, ignore_keys, metric_key_prefix)
        losses = [metrics[f"{metric_key_prefix}_{name}_loss"] for name in sets]
        metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """(None, summed losses, scored tokens), one entry a row of the batch."""
        inputs = self._prepare_inputs(inputs)
        targets, features = inputs["shift_labels"], _features(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), loss_targets(model, targets):
            losses = model(**features, use_cache=False).logits
        # Sums and counts, no means: rows differ in their number of scored tokens.
        return None, losses.float().sum(1, keepdim=True), (targets != IGNORE_INDEX).sum(1, keepdim=True)

    def _summarise_losses(self, prediction: EvalPrediction) -> dict[str, float]:
        # In float64: float32 sums of millions of tokens lose the digits in which models differ.
        total = float(np.asarray(prediction.predictions, dtype=np.float64).sum())
        tokens = int(np.asarray(prediction.label_ids).sum())
        loss = total / max(tokens, 1)
        summary = {"loss": loss, "perplexity": math.exp(min(loss, 80.0))}  # infinity is no JSON
        if self.eval_bytes:
            summary["bits_per_byte"] = total / math.log(2) / self.eval_bytes
        return summary

    # ------------------------------------------------------------ saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model)
        options: dict[str, Any] = {} if state_dict is None else {"state_dict": state_dict}
        if hasattr(model, "peft_config"):
            # Decided here, because PEFT would ask the hub whether the base's vocabulary changed.
            options |= {"save_embedding_layers": False, "selected_adapters": ["default"]}
            record_base(folder, model.peft_config["default"].base_model_name_or_path)
        model.save_pretrained(folder, **options)
        save_tokenizer(self.processing_class, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint counts only once its mark is written; older ones go after that, never before.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"{CHECKPOINT_PREFIX}{self.state.global_step}"
        if self.args.should_save:
            remove(checkpoint)  # what a kill cut off; files of it would survive among the new ones
        try:
            with named_disk_errors(folder):
                super()._save_checkpoint(model, trial)
        except OSError:
            remove(checkpoint)  # on a full disk, room for whoever looks into it
            raise
        finally:
            self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()  # the mark says that every process has written its part
        if self.args.should_save:
            seal_checkpoint(folder, self.state.global_step, keep, self.state.best_model_checkpoint)

    # ------------------------------------------------------------ logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens/s, utilisation and memory to the training lines."""
        if "loss" in logs:
            now, (then, before) = time.perf_counter(), self._last_log
            rate = (self.tokens_done - before) / max(now - then, 1e-9)
            self._last_log = (now, self.tokens_done)
            logs["tokens_per_second"] = round(rate, 1)
            peak = peak_flops()
            if peak is not None:
                logs["mfu"] = round(rate * self.flops_per_token / (peak * self.args.world_size), 4)
            logs["peak_memory_gb"] = round(peak_memory_gb(), 3)
        super().log(logs, start_time)

    def doubts(self) -> list[str]:
        """What the reader of the last evaluation's figures has to know."""
        return []

    def draw(self, folder: Path, title: str) -> None:
        """Pictures of the finished run."""
        plot_losses(self.state.log_history, folder / "loss.png", title, self.loss_unit)


def _features(inputs: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the model gets."""
    others = ("labels", "shift_labels", "is_token", "row_position_ids")
    return {name: value for name, value in inputs.items() if name not in others}


def describe_model(model: nn.Module) -> str:
    """One line for the log: which share of the weights is trained."""
    trainable, total = trainable_summary(model)
    return f"{total:,} parameters, {trainable:,} trained ({trainable / total:.2%})"


def train_and_save(
    trainer: CausalLMTrainer,
    run: Run,
    title: str,
    next_words: Sequence[str],
    planned: PlannedMemory | None = None,
    trial: Trial | None = None,
    **next_variables: str,
) -> dict[str, Any]:
    """Train (or resume), evaluate, save the model or adapter with its tokenizer, plot, and sum up.

    Args:
        next_words: the launcher that a fully trained model goes into next, with its flags; an adapter is merged first.
        planned: what is compared with the memory that was taken.
        trial: questions that are answered before the first step and after the last; a run that resumes has its first
            weights again until it reads its checkpoint.
        next_variables: what that launcher needs besides MODEL.
    Returns: the metrics, as in all_results.json.
    """
    args, folder = trainer.args, run.folder
    before = trial.answer(trainer) if trial else []
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    seconds = time.perf_counter() - started
    metrics: dict[str, Any] = {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(trainer.tokens_done / max(seconds, 1e-9), 1),
        "peak_memory_gb": round(peak_memory_gb(), 3),
    }
    if trainer.eval_dataset:
        evaluated = trainer.evaluate()
        for doubt in trainer.doubts():
            logger.warning("%s", doubt)
        metrics |= {
            name: value for name, value in evaluated.items() if name.startswith("eval_") and "_per_second" not in name
        }
    if planned is not None:
        metrics |= planned.compare(folder, metrics["tokens_per_second"], args.world_size)
    after = trial.answer(trainer) if trial else []
    with named_disk_errors(folder):
        trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        # finish_run last: its file marks the run finished, and one killed before that resumes and writes the rest.
        trainer.save_state()
        figures = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in metrics.items()}
        rows = trial.describe(before, after) if trial else []
        if rows:
            metrics["questions"] = rows
            logger.info("before and after:\n%s", as_text(rows))
        text = ["Settings: run_config.yaml. Losses: loss.png."]
        write_model_card(folder, title, text, figures, as_notes(rows) if rows else ())
        trainer.draw(folder, title)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        finish_run(folder, metrics, next_command(trained, folder, next_words, next_variables))
    run.release()
    return metrics


def next_command(model: Any, folder: Path, words: Sequence[str], variables: Mapping[str, str]) -> str:
    """The command to run on what this run made."""
    if not hasattr(model, "peft_config"):
        return shell_command("bash", f"scripts/{words[0]}", *words[1:], MODEL=folder, **variables)
    base = model.peft_config["default"].base_model_name_or_path
    return shell_command("bash", "scripts/run_merge.sh", MODEL=base, LORA=folder, OUT=f"{folder}-merged")
