"""Preference tuning without a reward model: pairs of a better and a worse answer -> a LoRA adapter, or a full model.

  python scripts/dpo.py --model_name_or_path MERGED_SFT --train_data pairs.jsonl --output_dir output/dpo
  python scripts/dpo.py examples/configs/dpo.yaml --loss ipo --beta 0.1
Losses: DPO (sigmoid), IPO, hinge, and ORPO and SimPO, which need no reference model.
Run the same command again after an interruption: it resumes exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.core.arguments import DataArguments, ExtendArguments, LoraArguments, ModelArguments
from utils.core.command_line import run
from utils.core.errors import InputError
from utils.rlhf.arguments import PreferenceArguments

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from utils.data.batches import PairSet
    from utils.data.preferences import PairCache
    from utils.rlhf.dpo_trainer import Objective
    from utils.training.arguments import RunArguments

logger = logging.getLogger("dpo")


def main(
    model_args: ModelArguments,
    lora_args: LoraArguments,
    data_args: DataArguments,
    preference_args: PreferenceArguments,
    training_args: RunArguments,
) -> dict[str, Any]:
    """Run the stage; returns the metrics of all_results.json."""
    from utils.data.sources import load_pair_sets
    from utils.models.loading import choose_attention
    from utils.models.training_model import attach_adapter, build_training_model
    from utils.planning.request import plan_run
    from utils.rlhf.dpo_trainer import STATISTICS, DPOTrainer, PreferenceCollator
    from utils.rlhf.reference import load_reference_tables, reference_key
    from utils.text.prompts import resolve_template
    from utils.text.tokenizer import choose_tokenizer, load_tokenizer, tokenizer_fingerprint
    from utils.training.arguments import check_validation
    from utils.training.before_after import open_trial
    from utils.training.flags import MEANINGLESS_FOR_PAIRS, REFUSED_FOR_PAIRS, set_aside
    from utils.training.runs import open_run, start_run
    from utils.training.trainer import describe_model, train_and_save

    set_aside(training_args, MEANINGLESS_FOR_PAIRS, REFUSED_FOR_PAIRS)
    folder = model_args.tokenizer_name_or_path or choose_tokenizer(
        lora_args.adapter_name_or_path, model_args.model_name_or_path
    )
    if folder is None:
        raise InputError("pass --model_name_or_path")
    tokenizer = load_tokenizer(folder)
    objective = choose_objective(preference_args)
    check_request(model_args, lora_args, preference_args, objective, tokenizer)
    all_args = (model_args, lora_args, data_args, preference_args)
    training_run = open_run(training_args, *all_args)
    template = resolve_template(preference_args.prompt_template, tokenizer)
    tokenizer.chat_template = template  # saved beside the weights, so every engine prompts as trained
    trial = open_trial(preference_args.questions, tokenizer, template, model_args, lora_args, training_args)
    train_set, eval_sets, keys = load_pair_sets(
        data_args, training_args, tokenizer, template, preference_args.max_seq_length
    )
    collator = PreferenceCollator(tokenizer.pad_token_id or 0, choose_attention(model_args.attn_implementation))
    reference = choose_reference(model_args, lora_args, preference_args, objective)
    cache = train_set.file.folder.parent
    key = None if reference is None else reference_key(reference, lora_args, training_args, cache)
    check_validation(training_args, list(eval_sets), STATISTICS, STATISTICS)
    inputs = {"data": keys, "tokenizer": tokenizer_fingerprint(tokenizer), "processes": training_args.world_size}
    start_run(training_run, {**inputs, "reference": key}, training_args.process_index == 0)

    if reference is not None and key is not None:
        load = partial(load_reference_tables, key, reference, lora_args, training_args, tokenizer, collator)
        train_set, eval_sets = attach_reference_logprobs(load, train_set, eval_sets)
    planned = plan_run("dpo", all_args, training_args, length=int(train_set.lengths.max()))
    model: Any = build_training_model(
        model_args, ExtendArguments(), lora_args, tokenizer, training_args.compute_dtype, training_args.seed
    )
    if not lora_args.full_finetuning:
        model = attach_adapter(model, lora_args, model_args.load_in_kbits)
    logger.info("%s", describe_model(model))
    trainer = DPOTrainer(model, training_args, train_set, eval_sets, tokenizer, collator, objective)
    return train_and_save(
        trainer,
        training_run,
        f"Preference tuning ({preference_args.loss})",
        ("run_inference.sh", "--interactive"),
        planned,
        trial,
    )


def choose_objective(args: PreferenceArguments) -> Objective:
    """The loss with its defaults."""
    from utils.rlhf.dpo_trainer import DEFAULT_BETA, Objective

    beta = DEFAULT_BETA.get(args.loss, 0.1) if args.beta is None else args.beta
    gamma = 1.0 if args.simpo_gamma is None else args.simpo_gamma
    return Objective(args.loss, beta, args.label_smoothing, gamma, args.sft_weight)


def check_request(
    model_args: ModelArguments,
    lora_args: LoraArguments,
    preference_args: PreferenceArguments,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Find, before data is read, what would fail once weights are loaded. Raises: InputError."""
    from utils.models.training_model import check_training_request
    from utils.rlhf.reference import check_reference, check_reference_model
    from utils.text.tokenizer import check_embedding_rows
    from utils.weights.config import load_config

    check_training_request(model_args, ExtendArguments(), lora_args, tokenizer, preference_args.max_seq_length)
    rows = load_config(str(model_args.model_name_or_path)).vocab_size
    check_embedding_rows(
        tokenizer,
        rows,
        f"the tokenizer has {len(tokenizer)} tokens, the model {rows} embedding rows, and preference tuning adds "
        "none; pass the tuned, merged model with its own tokenizer",
    )
    if objective.needs_reference:
        check_reference(lora_args, preference_args.reference_model, f"--loss {preference_args.loss}")
    if preference_args.reference_model:
        check_reference_model(preference_args.reference_model, tokenizer)


def choose_reference(
    model_args: ModelArguments, lora_args: LoraArguments, args: PreferenceArguments, objective: Objective
) -> ModelArguments | None:
    """The model whose log-probabilities are computed before training; None if every step asks the policy itself."""
    if args.reference_model:
        return replace(model_args, model_name_or_path=args.reference_model)
    before = objective.needs_reference and (lora_args.full_finetuning or args.precompute_reference)
    return model_args if before else None


def attach_reference_logprobs(
    load_tables: Callable[[list[PairCache]], list[np.ndarray]],
    train_set: PairSet,
    eval_sets: dict[str, PairSet],
) -> tuple[PairSet, dict[str, PairSet]]:
    """The sets with the reference's log-probabilities of every answer; `load_tables` finds or computes a file's."""
    from utils.rlhf.dpo_trainer import PairsWithReference

    sets = {"": train_set, **eval_sets}
    files = {pairs.file.key: pairs.file for pairs in sets.values()}
    tables = dict(zip(files, load_tables(list(files.values())), strict=True))
    with_reference: dict[str, PairSet] = {
        name: PairsWithReference(pairs, tables[pairs.file.key]) for name, pairs in sets.items()
    }
    return with_reference.pop(""), with_reference


if __name__ == "__main__":
    run(
        main,
        ModelArguments,
        LoraArguments,
        DataArguments,
        PreferenceArguments,
        "utils.training.arguments:RunArguments",
        description=__doc__,
    )
