"""Continued pre-training: text -> a LoRA adapter with full embed_tokens and lm_head, or a fully trained model.

  python scripts/pt.py --model_name_or_path BASE --tokenizer_name_or_path MERGED --train_data zh.txt \
      --validation_split 0.01 --modules_to_save embed_tokens,lm_head --output_dir output/pt
  python scripts/pt.py --config_name CONFIG --full_finetuning --tokenizer_name_or_path TOKENIZER --train_data en.txt \
      --output_dir output/base          (a new model from scratch)
Run the same command again after an interruption: it resumes exactly.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.core.arguments import DataArguments, ExtendArguments, LoraArguments, ModelArguments
from utils.core.command_line import run
from utils.core.errors import InputError
from utils.core.files import write_json
from utils.data.arguments import PretrainingArguments

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from utils.data.batches import Collator
    from utils.data.blocks import MixedBlocks, PackedBlocks
    from utils.data.corpora import CorpusCache
    from utils.training.arguments import RunArguments

logger = logging.getLogger("pt")

EMBEDDING_INITS = ("mean_of_pieces", "mean", "random", "zero")


def main(
    model_args: ModelArguments,
    extend_args: ExtendArguments,
    lora_args: LoraArguments,
    data_args: DataArguments,
    pretraining_args: PretrainingArguments,
    training_args: RunArguments,
) -> dict[str, Any]:
    """Run the stage; returns the metrics of all_results.json."""
    from utils.data.batches import Collator
    from utils.models.loading import choose_attention
    from utils.models.new_rows import freeze_all_but_new_rows
    from utils.models.training_model import attach_adapter, build_training_model, check_training_request
    from utils.planning.request import plan_run
    from utils.text.tokenizer import choose_tokenizer, embedding_rows, load_tokenizer, tokenizer_fingerprint
    from utils.training.arguments import check_validation
    from utils.training.runs import open_run, start_run
    from utils.training.trainer import CausalLMTrainer, describe_model, train_and_save

    folder = model_args.tokenizer_name_or_path or choose_tokenizer(
        lora_args.adapter_name_or_path, model_args.model_name_or_path
    )
    if folder is None:
        raise InputError("pass --model_name_or_path, or --config_name with --tokenizer_name_or_path")
    tokenizer = load_tokenizer(folder)
    parts = training_args.sequence_parallel_size
    check_training_request(
        *(model_args, extend_args, lora_args, tokenizer, pretraining_args.block_size),
        full_rows=True,
        sequence_parallel_size=parts,
    )
    all_args = (model_args, extend_args, lora_args, data_args, pretraining_args)
    training_run = open_run(training_args, *all_args)
    train_set, eval_sets, keys = load_pretraining_data(data_args, pretraining_args, training_args, tokenizer)
    check_validation(training_args, list(eval_sets))
    inputs = {"data": keys, "tokenizer": tokenizer_fingerprint(tokenizer), "processes": training_args.world_size}
    start_run(training_run, inputs, training_args.process_index == 0)

    attention = choose_attention(model_args.attn_implementation)
    collator = Collator(
        tokenizer.pad_token_id or 0, flatten=attention == "flash_attention_2", pad_to_multiple_of=parts
    )
    planned = plan_run("pt", all_args, training_args, embedding_rows(tokenizer))
    model: Any = build_training_model(
        model_args, extend_args, lora_args, tokenizer, training_args.compute_dtype, training_args.seed
    )
    if pretraining_args.compare_embedding_init and training_run.checkpoint is None and eval_sets:
        compare_embedding_inits(
            model, model_args, extend_args, training_args, train_set, eval_sets, tokenizer, collator
        )
    if not lora_args.full_finetuning:
        model = attach_adapter(model, lora_args, model_args.load_in_kbits)
    first_row = None
    if extend_args.train_new_rows_only:
        first_row = freeze_all_but_new_rows(model, str(model_args.model_name_or_path), tokenizer)
    logger.info("%s", describe_model(model))
    trainer = CausalLMTrainer(model, training_args, train_set, eval_sets, tokenizer, collator, first_row)
    return train_and_save(
        *(trainer, training_run, "Continued pre-training", ("run_sft.sh",), planned),
        DATA="examples/data/sft/train.json",
    )


def load_pretraining_data(
    data_args: DataArguments,
    pretraining_args: PretrainingArguments,
    training_args: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[MixedBlocks, dict[str, PackedBlocks], dict[str, str]]:
    """Tokenise (once, into the cache) and pack the training and validation corpora."""
    import numpy as np

    from utils.data.blocks import MixedBlocks, PackedBlocks, share_evenly
    from utils.data.corpora import tokenize_corpus
    from utils.data.sources import Sources

    settings = pretraining_args
    sources = Sources(data_args, training_args, "files or folders of text")
    load = partial(
        tokenize_corpus,
        tokenizer=tokenizer,
        settings=sources.settings,
        text_column=settings.text_column,
        document_separator=settings.document_separator,
    )
    corpora = sources.load_each("train", data_args.train_data, load)
    replays = sources.load_each("replay", settings.replay_data, load)
    validation = sources.load_each("validation", data_args.validation_data, load)

    crossing = settings.cross_document_attention

    def pack(corpus: CorpusCache, ids: np.ndarray, limit: int | None = None) -> PackedBlocks:
        if limit is not None:
            # Multiples of the golden ratio: however many documents are needed, they lie evenly over all files.
            ids = ids[np.argsort(np.arange(len(ids)) * 0.6180339887498949 % 1, kind="stable")]
        return PackedBlocks(corpus, ids, settings.block_size, cross_document_attention=crossing, max_blocks=limit)

    train, held_out = {}, {}
    for name, corpus in {**corpora, **replays}.items():
        train_ids, held_out_ids = sources.hold_out(corpus)
        train[name] = pack(corpus, train_ids)
        if len(held_out_ids):
            held_out[name] = pack(corpus, held_out_ids, data_args.max_eval_samples)
    if data_args.max_train_samples is not None:
        limits = share_evenly([len(train[name]) for name in corpora], data_args.max_train_samples)
        for (name, corpus), limit in zip(corpora.items(), limits, strict=True):
            train[name] = pack(corpus, sources.hold_out(corpus)[0], limit)
    for name, corpus in validation.items():
        held_out[name] = pack(corpus, np.arange(corpus.num_documents), data_args.max_eval_samples)
    if len(settings.data_weights) not in (0, len(corpora)):
        raise InputError(
            f"--data_weights: {len(settings.data_weights)} numbers for {len(corpora)} corpora; give one each"
        )
    mixed = MixedBlocks(
        {name: train[name] for name in corpora},
        dict(zip(corpora, settings.data_weights, strict=False)),
        replay={name: train[name] for name in replays},
        replay_share=settings.replay_share if replays else 0.0,
        seed=training_args.seed,
    )
    for name, blocks, tokens, part in mixed.describe():
        logger.info("data: %s: %d blocks, %d tokens an epoch, %.1f %% of all blocks", name, blocks, tokens, 100 * part)
    return mixed, held_out, sources.keys


def compare_embedding_inits(
    model: PreTrainedModel,
    model_args: ModelArguments,
    extend_args: ExtendArguments,
    training_args: RunArguments,
    train_set: MixedBlocks,
    eval_sets: dict[str, PackedBlocks],
    tokenizer: PreTrainedTokenizerBase,
    collator: Collator,
) -> None:
    """Write embedding_init.json: validation bits-per-byte at step 0 for every way to set the new rows."""
    from utils.models.new_rows import find_tokenizer, initialise_rows
    from utils.text.tokenizer import vocabulary_end
    from utils.training.runs import prepare_process
    from utils.training.trainer import CausalLMTrainer

    old_tokenizer = find_tokenizer(model_args.model_name_or_path)
    if old_tokenizer is None or vocabulary_end(old_tokenizer) >= vocabulary_end(tokenizer):
        return
    old_end = vocabulary_end(old_tokenizer)
    trainer = CausalLMTrainer(model, training_args, train_set, eval_sets, tokenizer, collator)
    report: dict[str, dict[str, float]] = {}
    for method in EMBEDDING_INITS:
        initialise_rows(model, old_tokenizer, tokenizer, method, old_end, training_args.seed)
        metrics = trainer.evaluate()
        report[method] = {name: metrics[f"eval_{name}_bits_per_byte"] for name in eval_sets}
        logger.info("step 0, new rows by %s: bits per byte %s", method, report[method])
    write_json(Path(training_args.output_dir) / "embedding_init.json", report)
    initialise_rows(model, old_tokenizer, tokenizer, extend_args.embedding_init, old_end, training_args.seed)
    prepare_process(training_args.seed)  # the comparison must not change the run that follows


if __name__ == "__main__":
    run(
        main,
        ModelArguments,
        ExtendArguments,
        LoraArguments,
        DataArguments,
        PretrainingArguments,
        "utils.training.arguments:RunArguments",
        description=__doc__,
    )
