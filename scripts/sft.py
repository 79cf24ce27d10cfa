"""Instruction tuning: conversations -> a LoRA adapter, or a fully trained model.

  python scripts/sft.py --model_name_or_path MERGED --train_data sft.json --output_dir output/sft
  python scripts/sft.py examples/configs/sft.yaml --learning_rate 5e-5
Run the same command again after an interruption: it resumes exactly.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.core.arguments import DataArguments, ExtendArguments, LoraArguments, ModelArguments
from utils.core.command_line import run
from utils.core.errors import InputError
from utils.data.arguments import TuningArguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from utils.data.blocks import PaddedSamples
    from utils.data.samples import SampleCache
    from utils.data.sources import Rows
    from utils.training.arguments import RunArguments

logger = logging.getLogger("sft")


def main(
    model_args: ModelArguments,
    extend_args: ExtendArguments,
    lora_args: LoraArguments,
    data_args: DataArguments,
    tuning_args: TuningArguments,
    training_args: RunArguments,
) -> dict[str, Any]:
    """Run the stage; returns the metrics of all_results.json."""
    from utils.data.batches import Collator
    from utils.models.loading import choose_attention
    from utils.models.new_rows import freeze_all_but_new_rows
    from utils.models.training_model import attach_adapter, build_training_model, check_training_request
    from utils.planning.request import plan_run
    from utils.text.prompts import resolve_template, warn_of_replaced_template
    from utils.text.tokenizer import choose_tokenizer, embedding_rows, load_tokenizer, tokenizer_fingerprint
    from utils.training.arguments import check_validation
    from utils.training.before_after import open_trial
    from utils.training.runs import open_run, start_run
    from utils.training.trainer import CausalLMTrainer, describe_model, train_and_save

    folder = model_args.tokenizer_name_or_path or choose_tokenizer(
        lora_args.adapter_name_or_path, model_args.model_name_or_path
    )
    if folder is None:
        raise InputError("pass --model_name_or_path")
    tokenizer = load_tokenizer(folder)
    parts = training_args.sequence_parallel_size
    check_training_request(
        *(model_args, extend_args, lora_args, tokenizer, tuning_args.max_seq_length), sequence_parallel_size=parts
    )
    all_args = (model_args, extend_args, lora_args, data_args, tuning_args)
    training_run = open_run(training_args, *all_args)
    template = resolve_template(tuning_args.prompt_template, tokenizer)
    warn_of_replaced_template(template, tokenizer)
    tokenizer.chat_template = template  # saved beside the weights, so every engine prompts as trained
    trial = open_trial(tuning_args.questions, tokenizer, template, model_args, lora_args, training_args)
    train_set, eval_sets, keys = load_tuning_data(data_args, tuning_args, training_args, tokenizer, template)
    check_validation(training_args, list(eval_sets))
    inputs = {"data": keys, "tokenizer": tokenizer_fingerprint(tokenizer), "processes": training_args.world_size}
    start_run(training_run, inputs, training_args.process_index == 0)

    attention = choose_attention(model_args.attn_implementation)
    collator = Collator(
        tokenizer.pad_token_id or 0, flatten=attention == "flash_attention_2", pad_to_multiple_of=parts
    )
    planned = plan_run("sft", all_args, training_args, embedding_rows(tokenizer), train_set.longest)
    model: Any = build_training_model(
        model_args, extend_args, lora_args, tokenizer, training_args.compute_dtype, training_args.seed
    )
    if not lora_args.full_finetuning:
        model = attach_adapter(model, lora_args, model_args.load_in_kbits)
    first_row = None
    if extend_args.train_new_rows_only:
        first_row = freeze_all_but_new_rows(model, str(model_args.model_name_or_path), tokenizer)
    logger.info("%s", describe_model(model))
    trainer = CausalLMTrainer(model, training_args, train_set, eval_sets, tokenizer, collator, first_row)
    return train_and_save(
        trainer, training_run, "Instruction tuning", ("run_inference.sh", "--interactive"), planned, trial
    )


def load_tuning_data(
    data_args: DataArguments,
    tuning_args: TuningArguments,
    training_args: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
) -> tuple[PaddedSamples, dict[str, PaddedSamples], dict[str, str]]:
    """Tokenise (once, into the cache), log statistics and the first example, and pack or pad."""
    from utils.data.blocks import PackedSamples, PaddedSamples, describe_sample
    from utils.data.samples import load_sft_samples
    from utils.data.sources import Sources

    sources = Sources(data_args, training_args)
    length = tuning_args.max_seq_length
    settings = sources.settings
    load = partial(load_sft_samples, tokenizer=tokenizer, template=template, max_seq_length=length, settings=settings)
    train, validation = sources.load_records(load)

    def arrange(rows: Rows[SampleCache]) -> PaddedSamples:
        if tuning_args.packing:
            return PackedSamples(rows.cache, length, rows.ids, seed=training_args.seed)
        return PaddedSamples(*rows)

    train_set = arrange(train)
    logger.info("data: %s; %d rows for training", train.cache.counters, len(train_set))
    logger.info("first row, trained text between ⟦ and ⟧:\n%s", describe_sample(train_set[0], tokenizer))
    return train_set, {name: arrange(rows) for name, rows in validation.items()}, sources.keys


if __name__ == "__main__":
    run(
        main,
        ModelArguments,
        ExtendArguments,
        LoraArguments,
        DataArguments,
        TuningArguments,
        "utils.training.arguments:RunArguments",
        description=__doc__,
    )
