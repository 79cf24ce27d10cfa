"""Reinforcement learning from a reward: PPO on a tuned model -> a LoRA adapter, or a fully trained model.

  python scripts/ppo.py --model_name_or_path ASSISTANT --reward_model output/rm --train_data prompts.jsonl \\
    --output_dir output/ppo
  python scripts/ppo.py ... --reward_function rewards.py:politeness
Run the same command again after an interruption: it resumes exactly.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.core.arguments import (
    DataArguments,
    ExtendArguments,
    LoraArguments,
    ModelArguments,
)
from utils.core.command_line import run
from utils.core.errors import InputError
from utils.rlhf.arguments import PPOArguments, RewardArguments, RolloutArguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from utils.data.preferences import PromptCache
    from utils.data.samples import SampleCache
    from utils.data.sources import Rows, Sources
    from utils.rlhf.rewards import Rewards
    from utils.training.arguments import RunArguments

logger = logging.getLogger("ppo")


def main(
    model_args: ModelArguments,
    lora_args: LoraArguments,
    data_args: DataArguments,
    rollout_args: RolloutArguments,
    reward_args: RewardArguments,
    ppo_args: PPOArguments,
    training_args: RunArguments,
) -> dict[str, Any]:
    """Run the stage; returns the metrics of all_results.json."""
    from utils.data.sources import RECORD_FILES, Sources
    from utils.planning.request import plan_run
    from utils.rlhf.objectives import AdaptiveKL, FixedKL
    from utils.rlhf.ppo_trainer import METRICS, PPOTrainer
    from utils.rlhf.rewards import load_reward_function
    from utils.text.prompts import resolve_template
    from utils.text.tokenizer import choose_tokenizer, load_tokenizer, tokenizer_fingerprint
    from utils.training.arguments import check_validation
    from utils.training.before_after import open_trial
    from utils.training.flags import check_ppo_flags
    from utils.training.runs import open_run, start_run
    from utils.training.trainer import describe_model, train_and_save
    from utils.weights.config import local_folder
    from utils.weights.generation_config import named_end_ids

    check_ppo_flags(training_args)
    folder = model_args.tokenizer_name_or_path or choose_tokenizer(
        lora_args.adapter_name_or_path, model_args.model_name_or_path
    )
    if folder is None:
        raise InputError("pass --model_name_or_path: the tuned model")
    tokenizer = load_tokenizer(folder)
    names = (lora_args.adapter_name_or_path, model_args.model_name_or_path)
    end_ids = named_end_ids([local_folder(name) for name in names if name])
    reference = check_models(model_args, lora_args, ppo_args, tokenizer)
    check_sizes(model_args, rollout_args, ppo_args, training_args)
    function = load_reward_function(reward_args.reward_function) if reward_args.reward_function else None
    template = resolve_template(rollout_args.prompt_template, tokenizer)
    check_reward_tokenizer(reward_args.reward_model, tokenizer, template)
    all_args = (model_args, lora_args, data_args, rollout_args, reward_args, ppo_args)
    training_run = open_run(training_args, *all_args)
    tokenizer.chat_template = template
    trial = open_trial(rollout_args.questions, tokenizer, template, model_args, lora_args, training_args)
    sources = Sources(data_args, training_args, f"{RECORD_FILES} of prompts", rollout_args.max_dropped_share)
    prompts, eval_prompts = load_prompt_sets(sources, rollout_args, tokenizer, template)
    check_validation(training_args, list(eval_prompts), METRICS, ("score",))
    tuning_set = load_tuning_set(sources, rollout_args, ppo_args, tokenizer, template)
    inputs = {"data": sources.keys, "tokenizer": tokenizer_fingerprint(tokenizer)}
    start_run(training_run, inputs, training_args.process_index == 0)

    planned = plan_run("ppo", all_args, training_args)
    model = build_policy(model_args, lora_args, ppo_args, tokenizer, training_args)
    rewards = build_rewards(model, model_args, reward_args, function, rollout_args, tokenizer, training_args)
    logger.info("%s", describe_model(model))
    kl: FixedKL | AdaptiveKL = FixedKL(ppo_args.kl_coef)
    if ppo_args.kl_target is not None:
        kl = AdaptiveKL(ppo_args.kl_coef, ppo_args.kl_target, ppo_args.kl_horizon)
    trainer = PPOTrainer(
        model,
        training_args,
        prompts,
        eval_prompts,
        tokenizer,
        template,
        rewards,
        rollout_args,
        ppo_args,
        kl,
        build_reference(reference, model_args, training_args) if reference else None,
        tuning_set=tuning_set,
        end_ids=end_ids,
    )
    return train_and_save(trainer, training_run, "PPO", ("run_inference.sh", "--interactive"), planned, trial)


# ---------------------------------------------------------------- checks before anything slow


def check_models(
    model_args: ModelArguments, lora_args: LoraArguments, ppo_args: PPOArguments, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """The reference model's folder; None where it is the policy without its adapter. Raises: InputError."""
    from utils.models.training_model import check_training_request
    from utils.rlhf.reference import check_reference, check_reference_model

    check_training_request(model_args, ExtendArguments(), lora_args, tokenizer)
    if lora_args.output_router_logits:
        raise InputError("--output_router_logits: PPO adds no balancing loss; leave it out")
    reference = ppo_args.reference_model
    check_reference(lora_args, reference, "PPO")
    if lora_args.full_finetuning and not reference:
        reference = model_args.model_name_or_path
    if reference:
        check_reference_model(reference, tokenizer)
    check_critic(ppo_args, lora_args, tokenizer)
    return reference


def check_critic(ppo_args: PPOArguments, lora_args: LoraArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: InputError if there can be no such critic of this policy."""
    from utils.rlhf.reference import check_reference_model

    if ppo_args.critic == "adapter" and lora_args.full_finetuning:
        raise InputError("--critic adapter needs LoRA; with --full_finetuning pass --critic head or model")
    if ppo_args.critic_model:
        check_reference_model(ppo_args.critic_model, tokenizer, "--critic_model")


def check_sizes(
    model_args: ModelArguments, rollout_args: RolloutArguments, ppo_args: PPOArguments, training_args: RunArguments
) -> None:
    """Set the default --rollout_batch_size.

    Raises: InputError if batches do not come out even, there is nothing to compare an answer with, or the window is
        too small for a prompt and its answer.
    """
    from utils.weights.config import load_config

    minibatch = (
        training_args.per_device_train_batch_size
        * training_args.gradient_accumulation_steps
        * training_args.world_size
    )
    group = rollout_args.num_generations
    if ppo_args.critic == "group" and group < 2:
        raise InputError("--critic group compares the answers to one prompt; pass --num_generations 4, or 2 at least")
    if rollout_args.rollout_batch_size is None:
        step = math.lcm(minibatch, group)
        rollout_args.rollout_batch_size = step * -(-128 // step)
    if rollout_args.rollout_batch_size % group:
        raise InputError(
            f"--rollout_batch_size {rollout_args.rollout_batch_size}: need a multiple of --num_generations {group}"
        )
    if rollout_args.rollout_batch_size % minibatch:
        raise InputError(
            f"--rollout_batch_size {rollout_args.rollout_batch_size}: need a multiple of the {minibatch} answers of "
            "an optimizer step (--per_device_train_batch_size x --gradient_accumulation_steps x processes)"
        )
    window = getattr(load_config(str(model_args.model_name_or_path)), "max_position_embeddings", None)
    needed = rollout_args.max_prompt_length + rollout_args.max_new_tokens
    if window is not None and needed > window:
        raise InputError(
            f"--max_prompt_length {rollout_args.max_prompt_length} and --max_new_tokens {rollout_args.max_new_tokens} "
            f"need {needed} tokens, the model's window has {window}; shorten one of them"
        )


def check_reward_tokenizer(folder: str | None, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Raises: InputError if the reward model's folder holds none, or it reads other tokens than the policy writes."""
    if folder is None:
        return
    from utils.rlhf.reward_model import check_same_tokenizer, find_reward_model
    from utils.text.tokenizer import load_tokenizer

    base, adapter = find_reward_model(folder)
    own = load_tokenizer(adapter or base)
    check_same_tokenizer(own, tokenizer)
    if own.chat_template and own.chat_template != template:
        logger.warning(
            "--reward_model %s learned with another prompt template than the rollouts have: its scores may mean "
            "little here; give rm.py and ppo.py the same --prompt_template",
            folder,
        )


# ---------------------------------------------------------------- data


def load_prompt_sets(
    sources: Sources, rollout_args: RolloutArguments, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[list[int]], dict[str, Sequence[list[int]]]]:
    """Training prompts, and held-out prompts by name, as ids."""
    from utils.data.preferences import load_prompts
    from utils.data.sources import log_statistics

    length, settings = rollout_args.max_prompt_length, sources.settings
    load = partial(load_prompts, tokenizer=tokenizer, template=template, max_prompt_length=length, settings=settings)
    train, validation = sources.load_records(load)
    log_statistics("prompts", train.cache)
    logger.info("first prompt:\n%s", tokenizer.decode(train.cache[0], skip_special_tokens=False))

    def read(rows: Rows[PromptCache]) -> list[list[int]]:
        return [rows.cache[number].tolist() for number in rows.ids.tolist()]

    return read(train), {name: read(rows) for name, rows in validation.items()}


def load_tuning_set(
    sources: Sources,
    rollout_args: RolloutArguments,
    ppo_args: PPOArguments,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
) -> SampleCache | None:
    """The samples of --sft_data, cut to a prompt's and an answer's length together; None without."""
    from utils.data.samples import load_sft_samples

    if not ppo_args.sft_data:
        return None
    length, settings = rollout_args.max_prompt_length + rollout_args.max_new_tokens, sources.settings
    load = partial(load_sft_samples, tokenizer=tokenizer, template=template, max_seq_length=length, settings=settings)
    return sources.load_together("sft", ppo_args.sft_data, load)


# ---------------------------------------------------------------- models


def build_policy(
    model_args: ModelArguments,
    lora_args: LoraArguments,
    ppo_args: PPOArguments,
    tokenizer: PreTrainedTokenizerBase,
    training_args: RunArguments,
) -> Any:
    """The policy with its adapter and its critic."""
    from utils.models.training_model import attach_adapter, build_training_model
    from utils.rlhf.actor_critic import CRITIC_ADAPTER, Critic, add_critic_adapter, attach_critic

    if lora_args.lora_dropout and not lora_args.full_finetuning:
        logger.warning("--lora_dropout %s: old and new probabilities differ by it; 0 is used", lora_args.lora_dropout)
        lora_args.lora_dropout = 0.0
    model: Any = build_training_model(
        model_args, ExtendArguments(), lora_args, tokenizer, training_args.compute_dtype, training_args.seed
    )
    if not lora_args.full_finetuning:
        model = attach_adapter(model, lora_args, model_args.load_in_kbits)
    width = model.config.hidden_size
    if ppo_args.critic == "adapter":
        add_critic_adapter(model)
        critic = Critic(width, CRITIC_ADAPTER)
    elif ppo_args.critic == "model":
        backbone = build_critic_model(model_args, lora_args, ppo_args, training_args)
        critic = Critic(backbone.config.hidden_size, model=backbone)
    else:
        # With --critic group nothing is learned: the head says 0, and the answers' groups give the values.
        critic = Critic(width).requires_grad_(ppo_args.critic == "head")
    attach_critic(model, critic)
    return model


def build_critic_model(
    model_args: ModelArguments, lora_args: LoraArguments, ppo_args: PPOArguments, training_args: RunArguments
) -> Any:
    """A backbone of the critic's own, trained as the policy is: with an adapter, or whole."""
    import dataclasses

    from utils.models.loading import load_model, training_dtype
    from utils.models.training_model import adapts_experts, attach_adapter
    from utils.weights.config import load_config

    dtype: Any = training_dtype(model_args.dtype, training_args.compute_dtype, lora_args.full_finetuning)
    critic_args = dataclasses.replace(model_args, model_name_or_path=ppo_args.critic_model, dtype=dtype)
    critic_lora = dataclasses.replace(lora_args, adapter_name_or_path=None, modules_to_save=None)
    # Without its head over the vocabulary, whose weights would never get a gradient.
    routed = adapts_experts(critic_lora, load_config(str(critic_args.model_name_or_path)))
    model: Any = load_model(critic_args, training_args.compute_dtype, auto_class="AutoModel", adapts_experts=routed)
    if lora_args.full_finetuning:
        return model
    return attach_adapter(model, critic_lora, model_args.load_in_kbits, "FEATURE_EXTRACTION")


def build_reference(folder: str, model_args: ModelArguments, training_args: RunArguments) -> Any:
    """A frozen model of its own."""
    import dataclasses

    from utils.models.gathering import whole_models_loaded
    from utils.models.lm_loss import install_loss_head
    from utils.models.loading import load_model, training_dtype

    dtype: Any = training_dtype(model_args.dtype, training_args.compute_dtype)
    args = dataclasses.replace(model_args, model_name_or_path=folder, dtype=dtype)
    with whole_models_loaded(training_args):
        model = load_model(args, training_args.compute_dtype).requires_grad_(False).eval()
    install_loss_head(model)
    return model.to(training_args.device)


def build_rewards(
    policy: Any,
    model_args: ModelArguments,
    reward_args: RewardArguments,
    function: Any,
    rollout_args: RolloutArguments,
    tokenizer: PreTrainedTokenizerBase,
    training_args: RunArguments,
) -> Rewards:
    """The rewards; a reward adapter made on the policy's own base shares its weights."""
    from utils.lora.adapter_folder import read_adapter
    from utils.models.gathering import whole_models_loaded
    from utils.models.loading import training_dtype
    from utils.rlhf.reward_model import find_reward_model, load_reward_model
    from utils.rlhf.rewards import BackboneReward, Rewards
    from utils.weights.config import local_folder
    from utils.weights.model_folder import REWARD_MODEL, read_model

    model: Any = None
    if reward_args.reward_model:
        base, adapter = find_reward_model(reward_args.reward_model)
        own = local_folder(str(model_args.model_name_or_path))
        shared = adapter is not None and hasattr(policy, "peft_config") and base.resolve() == own.resolve()
        shared = shared and BackboneReward.fits(reward_args.reward_model)
        if shared:
            read_adapter(str(adapter), read_model(str(own), REWARD_MODEL), reward_model=True)
            pad = int(tokenizer.pad_token_id or 0)
            model = BackboneReward(policy, reward_args.reward_model, pad, training_args.device)
        else:
            with whole_models_loaded(training_args):
                dtype = training_dtype(model_args.dtype, training_args.compute_dtype)
                model = load_reward_model(reward_args.reward_model, dtype, training_args.device)
        kind = "an adapter on the policy's weights" if shared else "a model of its own"
        logger.info("reward model %s: %s", reward_args.reward_model, kind)
    return Rewards(
        model,
        function,
        model_weight=reward_args.reward_model_weight,
        function_weight=reward_args.reward_function_weight,
        end_bonus=reward_args.end_bonus,
        missing_end_penalty=reward_args.missing_end_penalty,
        batch_size=rollout_args.per_device_rollout_batch_size,
    )


if __name__ == "__main__":
    run(
        main,
        ModelArguments,
        LoraArguments,
        DataArguments,
        RolloutArguments,
        RewardArguments,
        PPOArguments,
        "utils.training.arguments:RunArguments",
        description=__doc__,
    )
