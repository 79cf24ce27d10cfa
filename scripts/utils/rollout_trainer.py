"""The half of PPO's Trainer that answers prompts: sampled for learning, likeliest for evaluation."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .actor_critic import token_logprobs, use_adapter
from .arguments import GenerationArguments
from .data import Collator
from .decoding import Generator
from .files import InputError, atomic_file
from .generation import Completion
from .modeling import causal_model
from .rewards import Rewards
from .rl import AdaptiveKL, FixedKL, explained_variance
from .rollouts import Experience, Rollout, build_experience, collate, rollout_seed, score_moments, take
from .runs import last_checkpoint
from .sharding import whole_model
from .trainer import RecipeTrainer
from .training import RunArguments

SAMPLES_FILE = "samples.jsonl"
NUM_SAMPLES = 8  # answers an evaluation writes into SAMPLES_FILE
EVALUATION_STEP = 1 << 40  # names the random numbers of evaluations, apart from those of any iteration


@dataclass
class PPOSettings:
    """The algorithm; see PPOArguments in ppo.py for what each one does."""

    rollout_batch_size: int
    ppo_epochs: int
    generation: GenerationArguments
    per_device_rollout_batch_size: int = 16
    kl_estimator: str = "k1"
    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    value_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    score_clip: float | None = None
    whiten_scores: bool = False
    whiten_advantages: bool = True
    early_stop_kl: float | None = None
    kl_limit: float | None = None
    critic_learning_rate: float | None = None
    sft_coef: float = 1.0
    sft_ratio: float = 1.0


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


class RolloutTrainer(RecipeTrainer):
    """A RecipeTrainer whose model, with an attached critic (utils.actor_critic), answers prompts and is rewarded."""

    if TYPE_CHECKING:  # inherited, named for the type checker
        control: Any

    def __init__(
        self,
        model: nn.Module,
        args: RunArguments,
        prompts: Sequence[list[int]],
        eval_prompts: dict[str, Sequence[list[int]]],
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        rewards: Rewards,
        settings: PPOSettings,
        kl: FixedKL | AdaptiveKL,
        reference: nn.Module | None = None,
    ) -> None:
        """
        Args:
            prompts, eval_prompts: token ids up to where the answer begins; those for evaluation by name.
            reference: a model of its own; None: the policy without its adapter.
        """
        self.pad_token_id = int(tokenizer.pad_token_id or 0)
        flash = causal_model(model).config._attn_implementation == "flash_attention_2"
        super().__init__(model, args, prompts, eval_prompts, tokenizer, Collator(self.pad_token_id, flatten=flash))
        self.prompts, self.rewards, self.settings, self.kl = prompts, rewards, settings, kl
        self.reference = reference
        self.generator = Generator(causal_model(model), tokenizer, template)
        self.best_is_loaded = False

    def _good_checkpoint(self) -> str:
        best, last = self.state.best_model_checkpoint, last_checkpoint(Path(self.args.output_dir))
        if best is not None:
            return f"the best checkpoint is {best}"
        return f"the last checkpoint is {last or 'none'}"

    def _tokens_per_row(self) -> float:
        return sum(map(len, self.train_dataset)) / len(self.train_dataset)

    def _tokens_in(self, inputs: dict[str, Any]) -> float:
        return float((inputs["input_ids"].numel()) * self.args.world_size)

    @torch.no_grad()
    def sample(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], step: int, greedy: bool = False
    ) -> list[Rollout]:
        """Answers to all prompts, with the policy's, the reference's and the critic's figures, and scored.

        Every process answers its share and returns all, in the prompts' order.
        """
        mine = range(self.args.process_index, len(prompts), self.args.world_size)
        numbers = sorted(mine, key=lambda number: -len(prompts[number]))
        policy = self.accelerator.unwrap_model(model)
        was_training = policy.training
        policy.eval()
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
        settings = self.settings.generation
        seeds = [rollout_seed(self.args.seed, step, number) for number in numbers]
        chosen = [list(prompts[number]) for number in numbers]
        if greedy:
            settings = dataclasses.replace(settings, do_sample=False, temperature=0)
        # Without autocast, which would convert all weights again for every token.
        completions = self.generator.generate(chosen, settings, seeds, self.settings.per_device_rollout_batch_size)
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
        temperature = self.settings.generation.temperature
        size = self.args.per_device_train_batch_size
        # The longest first: a lack of memory shows, and those of about the same length together need little padding.
        order = sorted(range(len(sequences)), key=lambda number: -sum(map(len, sequences[number])))
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            batch, places = collate([sequences[number] for number in numbers], self.pad_token_id)
            batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            logprobs, entropies, values = policy(**batch, temperature=temperature)
            if self.reference is not None:
                ref_logprobs = token_logprobs(self.reference, **batch, temperature=temperature)
            else:
                with use_adapter(policy, None):
                    ref_logprobs = token_logprobs(policy, **batch, temperature=temperature)
            for rows, tensor in zip(figures.values(), (logprobs, ref_logprobs, values, entropies), strict=True):
                for number, row in zip(numbers, take(tensor, places), strict=True):
                    rows[number] = row
        return figures

    def build(self, rollouts: Sequence[Rollout]) -> Experience:
        """Rewards, advantages and returns. Raises: InputError if something is not finite."""
        settings = self.settings
        try:
            return build_experience(
                rollouts,
                kl_coef=self.kl.value,
                kl_estimator=settings.kl_estimator,
                score_clip=settings.score_clip,
                whiten_scores=settings.whiten_scores,
                whiten_advantages=settings.whiten_advantages,
                gamma=settings.gamma,
                lam=settings.lam,
            )
        except ValueError as error:
            raise InputError(
                f"{error} at iteration {self.state.global_step + 1}: the policy has diverged; lower --learning_rate. "
                f"{self._good_checkpoint()}"
            ) from error

    # ------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean score and KL of likeliest answers to held-out prompts; "eval_score" is the mean over the sets."""
        sets: dict[str, Any] = eval_dataset or self.eval_dataset
        metrics: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        for name, prompts in sets.items():
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
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] < self.state.global_step]
        with atomic_file(path) as file:
            file.writelines(f"{line}\n" for line in kept)
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
