"""The Trainer of ppo.py. A step is an iteration: sample answers, score them, then update actor and critic on them.

Everything random in an iteration follows from the seed and the iteration's number, so a resumed run repeats exactly
what an uninterrupted one does, on any number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from ..core.errors import InputError
from ..core.files import atomic_file, read_json, write_json
from ..data.batches import Collator
from ..data.blocks import PackedSamples
from ..data.samples import SampleCache
from ..generation.batching import Generator
from ..generation.engine import Completion
from ..models.gathering import whole_model
from ..models.loading import causal_model
from ..text.prompts import IGNORE_INDEX
from ..training.arguments import RunArguments, peak_memory_gb
from ..training.plots import plot_curves
from ..training.runs import last_checkpoint
from ..training.trainer import CausalLMTrainer
from .actor_critic import critic_state, is_critic_parameter, load_critic, save_critic, token_logprobs, use_adapter
from .arguments import PPOArguments, RolloutArguments
from .objectives import AdaptiveKL, FixedKL, explained_variance, ppo_policy_loss, value_loss
from .rewards import Rewards
from .rollouts import (
    Experience,
    Rollout,
    build_experience,
    collate,
    gather_answers,
    make_batch,
    minibatches,
    prompt_numbers,
    rollout_seed,
    score_moments,
)

SAMPLES_FILE = "samples.jsonl"
NUM_SAMPLES = 8  # answers an evaluation writes into SAMPLES_FILE
EVALUATION_STEP = 1 << 40  # names the random numbers of evaluations, apart from those of any iteration
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

# Figures of an evaluation; explained_variance is left out where it is not defined.
METRICS = ("score", "score_std", "kl", "answer_entropy", "answer_tokens", "ended", "explained_variance")


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


def describe(experience: Experience) -> dict[str, float]:
    """Figures of an iteration's or an evaluation's answers; lengths in tokens, KL in nats an answer."""
    lengths = [len(rollout.answer) for rollout in experience.rollouts]
    mean, deviation = score_moments(experience.rollouts)
    figures = {
        "score": mean,
        "score_std": deviation,
        "kl": experience.kl_of_answer,
        "answer_entropy": experience.entropy,
        "answer_tokens": sum(lengths) / len(lengths),
        "ended": sum(rollout.ended for rollout in experience.rollouts) / len(lengths),
        "explained_variance": explained_variance(experience.values, experience.returns, experience.mask),
    }
    return {name: value for name, value in figures.items() if not math.isnan(value)}


class PPOTrainer(CausalLMTrainer):
    """Proximal policy optimisation of an ActorCritic.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; on language models: Ouyang et al. 2022.
    """

    if TYPE_CHECKING:  # inherited, named for the type checker
        control: Any
        lr_scheduler: Any
        optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        args: RunArguments,
        prompts: Sequence[list[int]],
        eval_prompts: dict[str, Sequence[list[int]]],
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        rewards: Rewards,
        rollout_args: RolloutArguments,
        ppo_args: PPOArguments,
        kl: FixedKL | AdaptiveKL,
        reference: nn.Module | None = None,
        tuning_set: SampleCache | None = None,
        end_ids: Iterable[int] = (),
    ) -> None:
        """
        Args:
            model: an ActorCritic.
            prompts, eval_prompts: token ids up to where the answer begins; those for evaluation by name.
            kl: the coefficient of the KL penalty.
            reference: a model of its own; None: the policy without its adapter.
            tuning_set: samples that each update also learns as in tuning.
            end_ids: tokens that end answers besides the tokenizer's and the template's.
        """
        self.pad_token_id = int(tokenizer.pad_token_id or 0)
        flash = causal_model(model).config._attn_implementation == "flash_attention_2"
        super().__init__(model, args, prompts, eval_prompts, tokenizer, Collator(self.pad_token_id, flatten=flash))
        assert rollout_args.rollout_batch_size is not None
        self.prompts, self.rollout_batch_size = prompts, rollout_args.rollout_batch_size
        self.prompts_per_iteration = self.rollout_batch_size // rollout_args.num_generations
        self.rollout_args, self.ppo_args, self.generation = rollout_args, ppo_args, rollout_args.generation()
        self.rewards, self.kl, self.reference, self.tuning_set = rewards, kl, reference, tuning_set
        self.generator = Generator(causal_model(model), tokenizer, template, end_ids)
        self.best_is_loaded = False
        self.sums = Sums()

    # ------------------------------------------------------------ the loop

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As the Trainer's, with the KL coefficient as it was, also where no iteration is left."""
        if resume_from_checkpoint is not None:
            self.kl.value = read_json(Path(resume_from_checkpoint) / STATE_FILE)["kl_coef"]
        return super().train(resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Nothing is read from it: its length says how many iterations an epoch has."""
        iterations = max(1, len(self.prompts) // self.prompts_per_iteration)
        return range(iterations * self.args.gradient_accumulation_steps)

    def num_examples(self, dataloader: Any) -> int:
        """Prompts of an epoch."""
        return len(self.prompts)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer's loop steps the optimizer once for so many batches of a data loader. An iteration has many steps
        # on batches that do not exist before it samples, so its epochs only bound the number of iterations, and what
        # its loop does around a step (callbacks, schedule, log, checkpoint) is done here.
        model, resumed = kwargs["model"], kwargs["resume_from_checkpoint"]
        if resumed is not None:
            self._load_rng_state(resumed)  # the Trainer's own _run_epoch does this, after it skipped batches
        while self.state.global_step < self.state.max_steps:
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            self._iterate(model)
            learning_rate = self._get_learning_rate()  # that of this iteration, before the schedule moves on
            self.lr_scheduler.step()
            self.state.global_step += 1
            self.state.epoch = self.state.global_step * self.prompts_per_iteration / len(self.prompts)
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
        self.control.should_training_stop = True  # else the Trainer would begin its next epoch

    def _iterate(self, model: nn.Module) -> None:
        step, started = self.state.global_step, time.perf_counter()
        numbers = prompt_numbers(step, self.prompts_per_iteration, len(self.prompts), self.args.seed)
        numbers = [number for number in numbers for _ in range(self.rollout_args.num_generations)]
        rollouts = self.sample(model, [self.prompts[number] for number in numbers], step)
        sampled = time.perf_counter()
        experience = self.build(rollouts)
        self._check_kl(experience)  # before anything is learned from answers of a policy that ran away
        statistics = self.update(model, experience)
        # After the update: the coefficient that this step's checkpoint records is the next iteration's.
        self.kl.update(experience.kl_of_answer, len(experience))
        self._tr_loss += statistics["loss"]
        tokens = sum(len(rollout.answer) for rollout in rollouts)
        learned = sum(len(rollout.prompt) + len(rollout.answer) for rollout in rollouts) * self.ppo_args.ppo_epochs
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
        limit = self.ppo_args.kl_limit
        if limit is not None and not experience.kl_of_answer <= limit:  # so written, NaN is above every limit
            raise InputError(
                f"the KL of an answer to the reference is {experience.kl_of_answer:.1f} nats at iteration "
                f"{self.state.global_step + 1}, above --kl_limit {limit}: the policy has left what the reward was "
                "learned on; raise --kl_coef or lower --learning_rate. "
                f"{self._good_checkpoint()}"
            )

    def _good_checkpoint(self) -> str:
        best, last = self.state.best_model_checkpoint, last_checkpoint(Path(self.args.output_dir))
        if best is not None:
            return f"the best checkpoint is {best}"
        return f"the last checkpoint is {last or 'none'}"

    # ------------------------------------------------------------ rollouts

    @torch.no_grad()
    def sample(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], step: int, greedy: bool = False
    ) -> list[Rollout]:
        """Answers to all prompts, with the policy's, the reference's and the critic's figures, and scored.

        Every process answers its share and returns all, in the prompts' order.
        """
        mine = range(self.args.process_index, len(prompts), self.args.world_size)
        numbers = sorted(mine, key=lambda number: -len(prompts[number]))  # the longest first: a lack of memory shows
        policy = self.accelerator.unwrap_model(model)
        was_training = policy.training
        policy.eval()
        # Rewards too are read in here: an adapter that rewards runs on the policy's weights.
        with whole_model(self, model):
            rollouts = self._answer(policy, prompts, numbers, step, greedy)
            texts = self.processing_class.batch_decode([r.prompt for r in rollouts], skip_special_tokens=True)
            try:
                with self.accelerator.autocast():
                    self.rewards.score(rollouts, texts)
            except InputError as error:
                raise InputError(
                    f"{error} (iteration {self.state.global_step + 1}); {self._good_checkpoint()}"
                ) from error
        policy.train(was_training)
        if self.args.world_size > 1:
            rollouts = gather_object(rollouts)
        return sorted(rollouts, key=lambda rollout: rollout.number)

    def _answer(
        self, policy: Any, prompts: Sequence[Sequence[int]], numbers: Sequence[int], step: int, greedy: bool
    ) -> list[Rollout]:
        """Rollouts of the prompts with these numbers, not scored yet."""
        seeds = [rollout_seed(self.args.seed, step, number) for number in numbers]
        chosen = [list(prompts[number]) for number in numbers]
        settings = self.generation
        if greedy:
            settings = dataclasses.replace(settings, do_sample=False, temperature=0)
        # Without autocast, which would convert all weights again for every token.
        completions = self.generator.generate(chosen, settings, seeds, self.rollout_args.per_device_rollout_batch_size)
        with self.accelerator.autocast():
            figures = self._figures(policy, chosen, completions)
        return [
            Rollout(
                prompt=prompt,
                answer=completion.token_ids,
                text=completion.text,
                ended=completion.finish_reason == "stop",
                number=number,
                **{name: rows[place] for name, rows in figures.items()},
            )
            for place, (number, prompt, completion) in enumerate(zip(numbers, chosen, completions, strict=True))
        ]

    def _figures(
        self, policy: Any, prompts: Sequence[list[int]], completions: Sequence[Completion]
    ) -> dict[str, list[Tensor]]:
        """What policy, reference and critic say of each answer token, in micro-batches of the update's size."""
        sequences = [(prompt, answer.token_ids) for prompt, answer in zip(prompts, completions, strict=True)]
        figures: dict[str, list[Tensor]] = {
            name: [torch.empty(0)] * len(sequences) for name in ("logprobs", "ref_logprobs", "values", "entropies")
        }
        temperature = self.generation.temperature
        size = self.args.per_device_train_batch_size
        # The longest first: a lack of memory shows, and those of about the same length together need little padding.
        order = sorted(range(len(sequences)), key=lambda number: -sum(map(len, sequences[number])))
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            batch, places = collate([sequences[number] for number in numbers], self.pad_token_id)
            batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            # Not the sampler's own log-probabilities: of other arithmetic (a cache, other batches), with which the
            # first update's ratios would not be 1.
            logprobs, entropies, values = policy(**batch, temperature=temperature)
            if self.reference is not None:
                ref_logprobs = token_logprobs(self.reference, **batch, temperature=temperature)
            else:
                with use_adapter(policy, None):
                    ref_logprobs = token_logprobs(policy, **batch, temperature=temperature)
            for rows, tensor in zip(figures.values(), (logprobs, ref_logprobs, values, entropies), strict=True):
                for number, row in zip(numbers, gather_answers(tensor, places), strict=True):
                    rows[number] = row
        return figures

    def build(self, rollouts: Sequence[Rollout]) -> Experience:
        """Rewards, advantages and returns. Raises: InputError if something is not finite."""
        try:
            return build_experience(rollouts, self.ppo_args, self.kl.value)
        except ValueError as error:
            raise InputError(
                f"{error} at iteration {self.state.global_step + 1}: the policy has diverged; lower --learning_rate. "
                f"{self._good_checkpoint()}"
            ) from error

    # ------------------------------------------------------------ updates

    def update(self, model: nn.Module, experience: Experience) -> dict[str, float]:
        """Several passes over the experience; returns means over the optimizer steps that ran."""
        args = self.args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        model.train()  # of no effect on the figures (dropout is off), but activation checkpointing asks for it
        sums = Sums()
        steps = 0
        for epoch in range(self.ppo_args.ppo_epochs):
            seed = (args.seed, self.state.global_step, epoch)
            for micro_batches in minibatches(
                experience, size, args.per_device_train_batch_size, seed, args.process_index, args.world_size
            ):
                statistics = self._optimizer_step(model, experience, micro_batches, size, steps)
                steps += 1
                sums.add(statistics)
                if self.ppo_args.early_stop_kl is not None and statistics["approx_kl"] > self.ppo_args.early_stop_kl:
                    return {**sums.take_means(), "updates": float(steps)}
        return {**sums.take_means(), "updates": float(steps)}

    def _optimizer_step(
        self, model: nn.Module, experience: Experience, micro_batches: list[list[int]], size: int, update: int
    ) -> dict[str, float]:
        batches = [make_batch(experience, numbers, self.pad_token_id) for numbers in micro_batches]
        tuning = self._tuning_batches(size, update)
        # Losses are sums over tokens divided by these counts, of all micro-batches and processes: a token weighs the
        # same whichever micro-batch it is in.
        counts = [self._count_targets(batches)] * len(batches) + [self._count_targets(tuning)] * len(tuning)
        self._statistics: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        for number, (batch, count) in enumerate(zip([*batches, *tuning], counts, strict=True)):
            last = number == len(counts) - 1
            # By hand, since accelerate counts the batches of a data loader. DeepSpeed accumulates by itself, and must
            # see every backward pass.
            self.accelerator.gradient_state._set_sync_gradients(last)
            synchronised = last or self.is_deepspeed_enabled
            with contextlib.nullcontext() if synchronised else self.accelerator.no_sync(model=model):
                self.training_step(model, batch, count)
        norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        norm = self._get_grad_norm(model, grad_norm=norm)
        self.optimizer.step()
        model.zero_grad()
        names = sorted(self._statistics)  # in one order on all processes, for one reduction
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
        count = math.ceil(size * self.ppo_args.sft_ratio / world_size) * world_size
        # Where this step's share begins follows from the step alone, for a resumed run; early_stop_kl leaves gaps.
        place = self.state.global_step * self.ppo_args.ppo_epochs * (self.rollout_batch_size // size) + update
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
            return torch.ones(1)  # never divided by; every process comes by here, so no reduction is missed
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
        ppo_args, count = self.ppo_args, num_items_in_batch[0]
        mask = inputs["targets"] != IGNORE_INDEX
        logprobs, _, values = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            targets=inputs["targets"],
            temperature=self.generation.temperature if "advantages" in inputs else 1.0,
        )
        if "advantages" not in inputs:
            tuning_loss = -logprobs.sum() / count
            self._statistics["sft_loss"] = self._statistics["sft_loss"] + tuning_loss.detach()
            # The critic is called and counts for nothing: DDP wants every trained weight in every pass.
            return (ppo_args.sft_coef * tuning_loss + 0.0 * values.sum()) * self.accelerator.num_processes
        policy_loss, statistics = ppo_policy_loss(
            logprobs, inputs["old_logprobs"], inputs["advantages"], mask, ppo_args.clip_range, count
        )
        figures = {"policy_loss": policy_loss, **statistics}
        loss = policy_loss
        if ppo_args.critic != "group":
            critic_loss, value_clips = value_loss(
                values, inputs["old_values"], inputs["returns"], mask, ppo_args.value_clip_range, count
            )
            loss = policy_loss + ppo_args.value_coef * critic_loss
            figures |= {"value_loss": critic_loss, "value_clip_fraction": value_clips}
        for name, value in {"loss": loss, **figures}.items():
            self._statistics[name] = self._statistics[name] + value.detach()
        return loss * self.accelerator.num_processes  # gradients are averaged over the processes

    def learning_rates(self) -> dict[str, float]:
        """As pre-training's, and the critic's."""
        rate = self.ppo_args.critic_learning_rate
        return {**super().learning_rates(), "critic": self.args.learning_rate if rate is None else rate}

    def kind_of(self, name: str) -> str:
        """As pre-training's; what belongs to the critic is the critic's."""
        return "critic" if is_critic_parameter(name) else super().kind_of(name)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the Trainer's, one step later: an iteration is too dear for the rate of 0 that warm-up begins with."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        schedule: Any = super().create_scheduler(num_training_steps + 1, optimizer)
        schedule.step()
        return schedule

    # ------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean score and KL of likeliest answers to held-out prompts; "eval_score" is the mean over the sets."""
        sets: dict[str, Any] = eval_dataset or self.eval_dataset
        metrics: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        for name, prompts in sets.items():
            # The engine's model, not self.model: its weights may have to be gathered.
            rollouts = self.sample(self.model_wrapped, prompts, EVALUATION_STEP, greedy=True)
            experience = self.build(rollouts)
            figures = describe(experience)
            metrics |= {f"{metric_key_prefix}_{name}_{key}": value for key, value in figures.items()}
            samples += self._describe_samples(name, rollouts)
        scores = [metrics[f"{metric_key_prefix}_{name}_score"] for name in sets]
        metrics[f"{metric_key_prefix}_score"] = sum(scores) / len(scores)
        self._write_samples(samples)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _describe_samples(self, name: str, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        texts = self.processing_class.batch_decode(
            [r.prompt for r in rollouts[:NUM_SAMPLES]], skip_special_tokens=True
        )
        return [
            {
                "step": self.state.global_step,
                "set": name,
                "prompt": text,
                "answer": rollout.text,
                "score": round(rollout.score, 4),
                "kl": round((rollout.logprobs - rollout.ref_logprobs).sum().item(), 4),
                "tokens": len(rollout.answer),
            }
            for text, rollout in zip(texts, rollouts, strict=False)
        ]

    def _write_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        """Add samples, in place of those of this step, and of later ones if these are done again."""
        if not self.args.should_save or self.best_is_loaded:
            return  # the best checkpoint's own evaluation wrote the same
        path = Path(self.args.output_dir) / SAMPLES_FILE
        # Not splitlines: answers may hold U+2028 and the like, which end no line of a file.
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        kept = [line for line in lines if line and json.loads(line)["step"] < self.state.global_step]
        with atomic_file(path) as file:
            file.writelines(f"{line}\n" for line in kept)
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)

    # ------------------------------------------------------------ files and logs

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        # The critic is a part of the model, not of its files, which stay those of tuning, for any engine to read. Its
        # own file beside them is for a run that resumes.
        whole = model.state_dict() if state_dict is None else state_dict
        super()._save(str(folder), {name: tensor for name, tensor in whole.items() if not is_critic_parameter(name)})
        save_critic(folder, critic_state(model, state_dict))
        write_json(folder / STATE_FILE, {"kl_coef": self.kl.value, "step": self.state.global_step})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # whose own checkpoint holds everything that is trained, as DeepSpeed's does
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
        # Not CausalLMTrainer.log, whose tokens a second are those of training batches alone.
        Trainer.log(self, logs, start_time)

    def _tokens_per_row(self) -> float:
        return sum(map(len, self.train_dataset)) / len(self.train_dataset)

    def _tokens_in(self, inputs: dict[str, Any]) -> float:
        return float((inputs["input_ids"].numel()) * self.args.world_size)
