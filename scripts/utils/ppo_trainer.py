"""The Trainer of ppo.py. A step is an iteration: sample answers, score them, then update actor and critic on them.

Everything random in an iteration follows from the seed and the iteration's number, so a resumed run repeats exactly
what an uninterrupted one does, on any number of processes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from .actor_critic import critic_state, is_critic_parameter, load_critic, save_critic
from .data import PackedSamples
from .files import InputError, read_json, write_json
from .prompts import IGNORE_INDEX
from .rl import ppo_policy_loss, value_loss
from .rollout_trainer import RolloutTrainer, describe
from .rollouts import Experience, make_batch, minibatches, prompt_numbers
from .token_cache import SampleFile
from .training import peak_memory_gb, plot_curves

logger = logging.getLogger(__name__)

STATE_FILE = "ppo_state.json"

# What ppo.png shows: the key in the log, and the label of its axis.
CURVES = {
    "score": "reward of an answer",
    "kl": "KL to the reference (nats an answer)",
    "answer_tokens": "tokens of an answer",
    "ended": "share of answers that end",
    "explained_variance": "explained variance of the critic",
    "answer_entropy": "entropy (nats a token)",
    "clip_fraction": "share of clipped tokens",
    "value_loss": "value loss",
}


@dataclass
class Sums:
    """Means over iterations between two lines of the log."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, entries: dict[str, float]) -> None:
        for name, value in entries.items():
            self.values[name].append(value)

    def take_means(self) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self.values.items() if values}
        self.values.clear()
        return means


class PPOTrainer(RolloutTrainer):
    """Proximal policy optimisation of a policy with an attached critic (utils.actor_critic).

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; on language models: Ouyang et al. 2022.
    """

    if TYPE_CHECKING:  # inherited, named for the type checker
        control: Any
        lr_scheduler: Any
        optimizer: Any

    def __init__(self, *args: Any, tuning_set: SampleFile | None = None, **kwargs: Any) -> None:
        """Args: tuning_set: samples that each update also learns as in tuning; the others are RolloutTrainer's."""
        super().__init__(*args, **kwargs)
        self.tuning_set = tuning_set
        self.sums = Sums()

    # ------------------------------------------------------------ the loop

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As the Trainer's, with the KL coefficient as it was, also where no iteration is left."""
        if resume_from_checkpoint is not None:
            self.kl.value = read_json(Path(resume_from_checkpoint) / STATE_FILE)["kl_coef"]
        return super().train(resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Nothing is read from it: its length says how many iterations an epoch has."""
        iterations = max(1, len(self.prompts) // self.settings.rollout_batch_size)
        return range(iterations * self.args.gradient_accumulation_steps)

    def num_examples(self, dataloader: Any) -> int:
        """Prompts of an epoch."""
        return len(self.prompts)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer's epochs only bound the number of iterations; all of them run here.
        model, resumed = kwargs["model"], kwargs["resume_from_checkpoint"]
        if resumed is not None:
            self._load_rng_state(resumed)
        while self.state.global_step < self.state.max_steps:
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            self._iterate(model)
            learning_rate = self._get_learning_rate()
            self.lr_scheduler.step()
            self.state.global_step += 1
            self.state.epoch = self.state.global_step * self.settings.rollout_batch_size / len(self.prompts)
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(
                self._tr_loss,
                None,
                model,
                kwargs["trial"],
                self.state.epoch,
                kwargs["ignore_keys_for_eval"],
                kwargs["start_time"],
                learning_rate=learning_rate,
            )
            if self.control.should_training_stop:
                break
        self.control.should_training_stop = True

    def _iterate(self, model: nn.Module) -> None:
        step, started = self.state.global_step, time.perf_counter()
        numbers = prompt_numbers(step, self.settings.rollout_batch_size, len(self.prompts), self.args.seed)
        rollouts = self.sample(model, [self.prompts[number] for number in numbers], step)
        sampled = time.perf_counter()
        experience = self.build(rollouts)
        self._check_kl(experience)
        statistics = self.update(model, experience)
        self.kl.update(experience.kl_of_answer, len(experience))
        self._tr_loss += statistics["loss"]
        tokens = sum(len(rollout.answer) for rollout in rollouts)
        learned = sum(len(rollout.prompt) + len(rollout.answer) for rollout in rollouts) * self.settings.ppo_epochs
        finished = time.perf_counter()
        self.sums.add(
            {
                **describe(experience),
                **{name: value for name, value in statistics.items() if name != "loss"},
                "kl_coef": self.kl.value,
                "rollout_tokens_per_second": tokens / (sampled - started),
                "update_tokens_per_second": learned / (finished - sampled),
            }
        )

    def _check_kl(self, experience: Experience) -> None:
        limit = self.settings.kl_limit
        if limit is not None and not experience.kl_of_answer <= limit:
            raise InputError(
                f"the KL of an answer to the reference is {experience.kl_of_answer:.1f} nats at iteration "
                f"{self.state.global_step + 1}, above --kl_limit {limit}: the policy has left what the reward was "
                "learned on; raise --kl_coef or lower --learning_rate. "
                f"{self._good_checkpoint()}"
            )

    # ------------------------------------------------------------ updates

    def update(self, model: nn.Module, experience: Experience) -> dict[str, float]:
        """Several passes over the experience; returns means over the optimizer steps that ran."""
        args, settings = self.args, self.settings
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        model.train()
        sums = Sums()
        steps = 0
        for epoch in range(settings.ppo_epochs):
            seed = (args.seed, self.state.global_step, epoch)
            for micro_batches in minibatches(
                experience, size, args.per_device_train_batch_size, seed, args.process_index, args.world_size
            ):
                statistics = self._optimizer_step(model, experience, micro_batches, size, steps)
                steps += 1
                sums.add(statistics)
                if settings.early_stop_kl is not None and statistics["approx_kl"] > settings.early_stop_kl:
                    return {**sums.take_means(), "updates": float(steps)}
        return {**sums.take_means(), "updates": float(steps)}

    def _optimizer_step(
        self, model: nn.Module, experience: Experience, micro_batches: list[list[int]], size: int, update: int
    ) -> dict[str, float]:
        batches = [make_batch(experience, numbers, self.pad_token_id) for numbers in micro_batches]
        tuning = self._tuning_batches(size, update)
        counts = [self._count_targets(batches)] * len(batches) + [self._count_targets(tuning)] * len(tuning)
        self._statistics: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        for number, (batch, count) in enumerate(zip([*batches, *tuning], counts, strict=True)):
            last = number == len(counts) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            synchronised = last or self.is_deepspeed_enabled
            with contextlib.nullcontext() if synchronised else self.accelerator.no_sync(model=model):
                self.training_step(model, batch, count)
        norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        norm = self._get_grad_norm(model, grad_norm=norm)
        self.optimizer.step()
        model.zero_grad()
        names = sorted(self._statistics)
        totals = self._sum_over_processes(torch.stack([self._statistics[name].float() for name in names]))
        statistics = dict(zip(names, totals.tolist(), strict=True))
        if norm is not None:
            statistics["grad_norm"] = float(norm)
        return statistics

    def _tuning_batches(self, size: int, update: int) -> list[dict[str, Tensor]]:
        """This process's share of the tuning samples of an optimizer step over `size` rollouts, packed into rows."""
        if self.tuning_set is None:
            return []
        world_size, micro = self.args.world_size, self.args.per_device_train_batch_size
        count = math.ceil(size * self.settings.sft_ratio / world_size) * world_size
        place = self.state.global_step * self.settings.ppo_epochs * (self.settings.rollout_batch_size // size) + update
        numbers = prompt_numbers(place, count, self.tuning_set.num_samples, self.args.seed + 1)
        mine = np.array(numbers[self.args.process_index :: world_size])
        parts = [
            PackedSamples(self.tuning_set, None, mine[start : start + micro]) for start in range(0, len(mine), micro)
        ]
        batches = [self.data_collator([rows[number] for number in range(len(rows))]) for rows in parts]
        names = {"input_ids": "input_ids", "position_ids": "position_ids", "shift_labels": "targets"}
        return [{new: batch[name] for name, new in names.items()} for batch in batches]

    def _count_targets(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """Targets of the batches of all processes, (1,)."""
        if not batches:
            return torch.ones(1)
        local = sum(int((batch["targets"] != IGNORE_INDEX).sum()) for batch in batches)
        return self._sum_over_processes(torch.tensor([float(local)], device=self.args.device))

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor) if self.args.world_size > 1 else tensor

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Clipped policy loss + value_coef * clipped value loss, means over the answer tokens of the minibatch.

        Of a batch of tuning samples: sft_coef * mean negative log-likelihood ("PPO-ptx", Ouyang et al. 2022, eq. 2).
        """
        settings, count = self.settings, num_items_in_batch[0]
        mask = inputs["targets"] != IGNORE_INDEX
        logprobs, _, values = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            targets=inputs["targets"],
            temperature=settings.generation.temperature if "advantages" in inputs else 1.0,
        )
        if "advantages" not in inputs:
            tuning_loss = -logprobs.sum() / count
            self._statistics["sft_loss"] = self._statistics["sft_loss"] + tuning_loss.detach()
            # The critic is called and counts for nothing: DDP wants every trained weight in every pass.
            return (settings.sft_coef * tuning_loss + 0.0 * values.sum()) * self.accelerator.num_processes
        policy_loss, statistics = ppo_policy_loss(
            logprobs, inputs["old_logprobs"], inputs["advantages"], mask, settings.clip_range, count
        )
        critic_loss, value_clips = value_loss(
            values, inputs["old_values"], inputs["returns"], mask, settings.value_clip_range, count
        )
        loss = policy_loss + settings.value_coef * critic_loss
        for name, value in {
            "loss": loss,
            "policy_loss": policy_loss,
            "value_loss": critic_loss,
            "value_clip_fraction": value_clips,
            **{name: statistics[name] for name in ("clip_fraction", "approx_kl")},
        }.items():
            self._statistics[name] = self._statistics[name] + value.detach()
        return loss * self.accelerator.num_processes  # gradients are averaged over the processes

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with a learning rate of its own for the critic."""
        target = self.model if model is None else model
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(target))
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            rates = {
                False: self.args.learning_rate,
                True: self.settings.critic_learning_rate or self.args.learning_rate,
            }
            groups = []
            for is_critic, rate in rates.items():
                for decays in (True, False):
                    chosen = [
                        parameter
                        for name, parameter in target.named_parameters()
                        if parameter.requires_grad
                        and is_critic_parameter(name) == is_critic
                        and (name in decayed) == decays
                    ]
                    decay = self.args.weight_decay if decays else 0.0
                    if chosen:
                        groups.append({"params": chosen, "weight_decay": decay, "lr": rate})
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the Trainer's, one step later: an iteration is too dear for the rate of 0 that warm-up begins with."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        schedule: Any = super().create_scheduler(num_training_steps + 1, optimizer)
        schedule.step()
        return schedule

    # ------------------------------------------------------------ files and logs

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        # The critic is a part of the model, not of its files.
        whole = model.state_dict() if state_dict is None else state_dict
        super()._save(str(folder), {name: tensor for name, tensor in whole.items() if not is_critic_parameter(name)})
        save_critic(folder, critic_state(model, state_dict))
        write_json(folder / STATE_FILE, {"kl_coef": self.kl.value, "step": self.state.global_step})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            load_critic(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.best_is_loaded = True
        assert self.state.best_model_checkpoint is not None
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_critic(self.model, self.state.best_model_checkpoint)

    def draw(self, folder: Path, title: str) -> None:
        """ppo.png: the curves of the log, held-out ones beside those of training."""
        plot_curves(self.state.log_history, folder / "ppo.png", title, CURVES)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training lines hold the means of the iterations since the last one."""
        if "loss" in logs:
            loss = logs.pop("loss")
            logs = {"ppo_loss": loss, **self.sums.take_means(), **logs, "peak_memory_gb": round(peak_memory_gb(), 3)}
        Trainer.log(self, logs, start_time)
