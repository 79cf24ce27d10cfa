"""Flags of ppo.py that its Trainer obeys: how answers are sampled, and the algorithm."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ..core.arguments import GenerationArguments, arg, list_arg
from ..core.errors import raise_problems


@dataclass
class RolloutArguments:
    """How answers are sampled; lengths are in tokens."""

    prompt_template: str | None = arg(
        help="alpaca-2, alpaca-2-long, llama-2, mixtral, alpaca, or tokenizer (its own chat template); default: the "
        "tokenizer's own where it has one, else alpaca-2."
    )
    max_prompt_length: int = arg(512, help="Longest prompt; longer ones are dropped and counted.")
    max_dropped_share: float = arg(0.1, help="Warn if a larger share of the prompts is dropped.")
    max_new_tokens: int = arg(256, help="Longest answer; one that does not end by then is cut.")
    min_new_tokens: int = arg(0, help="An answer does not end before this many tokens.")
    temperature: float = arg(1.0, help="Of the sampled answers; the policy that is trained is the one sampled from.")
    top_p: float = arg(1.0, help="Draw from the likeliest tokens that reach this probability together; 1: from all.")
    rollout_batch_size: int | None = arg(
        help="Answers of an iteration, over all processes; default: whole optimizer steps that make at least 128."
    )
    num_generations: int = arg(
        1, help="Answers to each prompt of an iteration; from 2 on --critic group compares them with each other."
    )
    per_device_rollout_batch_size: int = arg(16, help="Answers generated at once on each device.")

    def __post_init__(self) -> None:
        checks = {
            f"--rollout_batch_size {self.rollout_batch_size}: need at least 1": (
                self.rollout_batch_size is None or self.rollout_batch_size >= 1
            ),
            f"--per_device_rollout_batch_size {self.per_device_rollout_batch_size}: need at least 1": (
                self.per_device_rollout_batch_size >= 1
            ),
            f"--num_generations {self.num_generations}: need at least 1": self.num_generations >= 1,
            f"--temperature {self.temperature}: PPO needs sampled answers, a number above 0": self.temperature > 0,
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])
        self.generation()  # checks the others

    def generation(self) -> GenerationArguments:
        """The same as the arguments of generation."""
        return GenerationArguments(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_k=0,
            top_p=self.top_p,
            repetition_penalty=1.0,
        )


@dataclass
class PPOArguments:
    """The algorithm."""

    ppo_epochs: int = arg(2, help="Passes over each iteration's answers.")
    kl_coef: float = arg(0.05, help="Weight of the KL to the reference in each token's reward.")
    kl_estimator: Literal["k1", "k2", "k3"] = arg("k1", help="Estimate of the KL of a token: k1, k2 or k3.")
    kl_target: float | None = arg(help="Adapt --kl_coef so that an answer's KL stays near this many nats.")
    kl_horizon: float = arg(10_000, help="Answers over which --kl_coef adapts.")
    kl_limit: float | None = arg(100.0, help="Stop with an error once an answer's mean KL is above this many nats.")
    clip_range: float = arg(0.2, help="How far a token's probability ratio may move the policy in one iteration.")
    value_clip_range: float | None = arg(0.2, help="How far a value may move in one iteration.")
    value_coef: float = arg(0.1, help="Weight of the critic's loss.")
    gamma: float = arg(1.0, help="Discount of a later token's reward.")
    lam: float = arg(0.95, help="Lambda of the generalised advantage estimates.")
    score_clip: float | None = arg(help="Cut the rewards of answers to +- this.")
    whiten_scores: bool = arg(False, help="Scale the rewards of an iteration's answers to mean 0 and deviation 1.")
    whiten_advantages: bool = arg(True, help="Scale the advantages of an iteration's tokens likewise.")
    early_stop_kl: float | None = arg(
        help="End an iteration's updates once the policy has moved this many nats a token from the one that sampled."
    )
    sft_data: list[str] = list_arg(
        help="Conversations as sft.py reads them; each update also learns some of them, so that what tuning taught is "
        "kept."
    )
    sft_ratio: float = arg(1.0, help="How many of --sft_data an update learns for each answer it learns.")
    sft_coef: float = arg(1.0, help="Weight of the loss on --sft_data.")
    critic: Literal["head", "adapter", "model", "group"] = arg(
        "head",
        help="What an answer's reward is compared with. The estimate of a head on the policy's hidden states; of an "
        "adapter of its own on the same weights; of another model; group: the mean reward of the other answers to its "
        "prompt (--num_generations), nothing is learned for it.",
    )
    critic_model: str | None = arg(help="With --critic model: the folder it starts from, such as a reward model's.")
    critic_learning_rate: float | None = arg(help="Default: --learning_rate.")
    reference_model: str | None = arg(help="Default: the policy without its adapter, which is the tuned model.")

    def __post_init__(self) -> None:
        above_zero = ("ppo_epochs", "kl_horizon", "clip_range", "sft_ratio")
        optional = ("kl_target", "kl_limit", "value_clip_range", "score_clip", "early_stop_kl", "critic_learning_rate")
        problems = [f"--{name} {getattr(self, name)}: need a number above 0" for name in above_zero
                    if not getattr(self, name) > 0]  # fmt: skip
        problems += [f"--{name} {getattr(self, name)}: need a number above 0" for name in optional
                     if getattr(self, name) is not None and not getattr(self, name) > 0]  # fmt: skip
        problems += [f"--{name} {getattr(self, name)}: need 0 to 1" for name in ("gamma", "lam")
                     if not 0 <= getattr(self, name) <= 1]  # fmt: skip
        weights = ("kl_coef", "value_coef", "sft_coef")
        problems += [f"--{name} {getattr(self, name)}: need 0 or more" for name in weights
                     if not getattr(self, name) >= 0]  # fmt: skip
        if (self.critic == "model") != (self.critic_model is not None):
            problems.append("--critic model and --critic_model FOLDER go together")
        if self.critic == "group":
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            problems += [
                f"--{name} {getattr(self, name)}: belongs to a critic that learns; --critic group has none"
                for name in ("lam", "value_coef", "value_clip_range", "critic_learning_rate")
                if getattr(self, name) != defaults[name]
            ]
        if self.kl_target is not None and self.kl_coef == 0:
            problems.append("--kl_target adapts --kl_coef, which must not be 0")
        raise_problems(problems)
