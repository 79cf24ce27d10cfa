"""Flags of rm.py, ppo.py and dpo.py: learning from pairs, how answers are sampled and rewarded, the algorithm."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.arguments import GenerationArguments, arg, list_arg
from ..core.errors import InputError, raise_problems
from ..data.arguments import QuestionArguments


@dataclass
class RewardModelArguments:
    """How pairs are encoded and what is learnt of them; or what is to be scored."""

    max_seq_length: int = arg(
        1024, help="Longest prompt with its answer, in tokens; longer answers are cut at the right."
    )
    prompt_template: str | None = arg(
        help="alpaca-2, alpaca-2-long, llama-2, mixtral, alpaca, or tokenizer (its own chat template); default: the "
        "tokenizer's own where it has one, else alpaca-2."
    )
    use_margin: bool = arg(False, help="Demand that scores differ by the record's 'margin' (0 where it has none).")
    centering: float = arg(
        0.01, help="Weight of (chosen + rejected)^2 in the loss, which keeps the mean score near 0; 0: none."
    )
    score: str | None = arg(
        help="Train nothing: score the texts or pairs of this file with the reward model in --model_name_or_path."
    )
    output_file: str = arg("scores.jsonl", help="Where --score writes, one record a line.")

    def __post_init__(self) -> None:
        problems = []
        if self.max_seq_length < 8:
            problems.append(f"--max_seq_length {self.max_seq_length}: need at least 8 tokens")
        if self.centering < 0:
            problems.append(f"--centering {self.centering}: need 0 or more")
        if self.score and Path(self.output_file).suffix != ".jsonl":
            problems.append(f"--output_file {self.output_file}: need a name that ends in .jsonl")
        raise_problems(problems)


@dataclass
class PreferenceArguments(QuestionArguments):
    """What is learned from a pair, and against which reference."""

    loss: Literal["sigmoid", "ipo", "hinge", "orpo", "simpo"] = arg(
        "sigmoid", help="sigmoid is DPO; ipo and hinge need a reference too; orpo and simpo need none."
    )
    beta: float | None = arg(
        help="Sigmoid, ipo, hinge: larger keeps the policy nearer to the reference; orpo: weight of the preference "
        "beside the SFT loss; simpo: scale of the reward. Default: 0.1, simpo 2.0."
    )
    label_smoothing: float = arg(0.0, help="Sigmoid: the share of pairs believed to be swapped, 0 <= share < 0.5.")
    simpo_gamma: float | None = arg(help="Simpo: the reward margin wanted. Default: 1.0.")
    sft_weight: float = arg(
        0.0, help="Add this many times the chosen answer's mean negative log-likelihood (RPO); 0: nothing."
    )
    precompute_reference: bool = arg(
        False,
        help="Compute the reference's log-probabilities once before training, into the cache, instead of in every "
        "step; always so with --full_finetuning and --reference_model.",
    )
    reference_model: str | None = arg(
        help="The reference, if it is not the model that training starts from; in memory only before training."
    )
    max_seq_length: int = arg(1024, help="Longest prompt with one answer, in tokens; longer answers are cut.")
    prompt_template: str | None = arg(
        help="alpaca-2, alpaca-2-long, llama-2, mixtral, alpaca, or tokenizer (its own chat template); default: the "
        "tokenizer's own where it has one, else alpaca-2."
    )

    def __post_init__(self) -> None:
        free = self.loss in ("orpo", "simpo")
        problems = []
        if self.beta is not None and not self.beta > 0:
            problems.append(f"--beta {self.beta}: need a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            problems.append(f"--label_smoothing {self.label_smoothing}: it is a share, need 0 <= share < 0.5")
        if self.label_smoothing and self.loss != "sigmoid":
            problems.append(f"--label_smoothing is for --loss sigmoid, {self.loss} has none; leave it out")
        if self.simpo_gamma is not None and (self.loss != "simpo" or self.simpo_gamma < 0):
            problems.append(f"--simpo_gamma {self.simpo_gamma}: need --loss simpo and a number from 0")
        if self.sft_weight < 0:
            problems.append(f"--sft_weight {self.sft_weight}: need 0 or more")
        if free and (self.precompute_reference or self.reference_model):
            problems.append(
                f"--loss {self.loss} uses no reference; leave out --precompute_reference and --reference_model"
            )
        if self.max_seq_length < 8:
            problems.append(f"--max_seq_length {self.max_seq_length}: need at least 8 tokens")
        raise_problems(problems)


# ---------------------------------------------------------------- PPO


@dataclass
class RewardArguments:
    """What is rewarded: a reward model, a function, or both weighted."""

    reward_model: str | None = arg(help="Folder of a reward model made by rm.py, complete or an adapter.")
    reward_model_weight: float = arg(1.0, help="Its scores are multiplied by this.")
    reward_function: str | None = arg(
        help="file.py:name, a function (prompts, answers) -> rewards, lists of the same length."
    )
    reward_function_weight: float = arg(1.0, help="Its rewards are multiplied by this.")
    end_bonus: float = arg(0.0, help="Added to the reward of an answer that ends by itself.")
    missing_end_penalty: float = arg(0.0, help="Taken off the reward of an answer that is cut at --max_new_tokens.")

    def __post_init__(self) -> None:
        if not (self.reward_model or self.reward_function):
            raise InputError("pass --reward_model (a folder made by rm.py), --reward_function file.py:name, or both")


@dataclass
class RolloutArguments(QuestionArguments):
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
