"""Reward model: preference pairs -> a model that scores answers, as a LoRA adapter with its head, or fully trained.

  python scripts/rm.py --model_name_or_path SFT_MERGED --train_data pairs.jsonl --validation_split 0.05 \\
      --output_dir output/rm
  python scripts/rm.py --score answers.jsonl --model_name_or_path output/rm --output_file scores.jsonl
Run the same command again after an interruption: it resumes exactly.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.core.arguments import DataArguments, LoraArguments, ModelArguments
from utils.core.command_line import EXAMPLE_PAIRS, run
from utils.core.errors import InputError
from utils.core.files import atomic_file
from utils.core.records import iter_records
from utils.rlhf.arguments import RewardModelArguments

if TYPE_CHECKING:
    from utils.rlhf.reward_model import RewardModel
    from utils.text.conversations import Conversation
    from utils.training.arguments import RunArguments

logger = logging.getLogger("rm")


def main(
    model_args: ModelArguments,
    lora_args: LoraArguments,
    data_args: DataArguments,
    reward_args: RewardModelArguments,
    training_args: RunArguments,
) -> dict[str, Any]:
    """Run the stage, or score a file; returns the metrics."""
    if reward_args.score:
        return score_file(model_args, lora_args, reward_args, training_args)
    from utils.data.batches import PairCollator
    from utils.data.sources import load_pair_sets
    from utils.models.loading import choose_attention
    from utils.models.training_model import attach_adapter
    from utils.planning.request import plan_run
    from utils.rlhf.reward_model import TASK_TYPE, check_reward_request, set_pad_token
    from utils.rlhf.reward_trainer import RewardTrainer, check_best_metric
    from utils.text.prompts import resolve_template
    from utils.text.tokenizer import choose_tokenizer, load_tokenizer, tokenizer_fingerprint
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
    check_reward_request(model_args, lora_args, tokenizer, reward_args.max_seq_length)
    all_args = (model_args, lora_args, data_args, reward_args)
    training_run = open_run(training_args, *all_args)
    template = resolve_template(reward_args.prompt_template, tokenizer)
    tokenizer.chat_template = template  # saved beside the weights, so that answers are scored as they were trained
    set_pad_token(tokenizer, template)
    train_set, eval_sets, keys = load_pair_sets(
        data_args, training_args, tokenizer, template, reward_args.max_seq_length
    )
    check_best_metric(training_args, list(eval_sets))
    inputs = {"data": keys, "tokenizer": tokenizer_fingerprint(tokenizer), "processes": training_args.world_size}
    start_run(training_run, inputs, training_args.process_index == 0)

    planned = plan_run("rm", all_args, training_args, length=int(train_set.lengths.max()))
    model: Any = build_model(model_args, lora_args, tokenizer.pad_token_id, training_args)
    if not lora_args.full_finetuning:
        model = attach_adapter(model, lora_args, model_args.load_in_kbits, TASK_TYPE)
    logger.info("%s", describe_model(model))
    collator = PairCollator(tokenizer.pad_token_id, choose_attention(model_args.attn_implementation))
    trainer = RewardTrainer(
        *(model, training_args, train_set, eval_sets, tokenizer, collator),
        use_margin=reward_args.use_margin,
        centering=reward_args.centering,
    )
    if not eval_sets:
        logger.warning("no validation pairs: the accuracy is not measured; pass --validation_split 0.05")
    return train_and_save(trainer, training_run, "Reward model", ("run_rm.sh", "--score", EXAMPLE_PAIRS), planned)


def build_model(
    model_args: ModelArguments, lora_args: LoraArguments, pad_token_id: int, training_args: RunArguments
) -> Any:
    """The backbone with its head."""
    import torch

    from utils.models.loading import training_dtype
    from utils.models.training_model import adapts_experts
    from utils.rlhf.reward_model import load_classifier
    from utils.weights.config import load_config

    device_map = None
    if model_args.load_in_kbits != 16:
        device_map = {"": int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"}
    compute_dtype = training_args.compute_dtype
    dtype: Any = training_dtype(model_args.dtype, compute_dtype, lora_args.full_finetuning)
    args = replace(model_args, dtype=dtype)
    routed = adapts_experts(lora_args, load_config(str(model_args.model_name_or_path)))
    return load_classifier(args, compute_dtype, pad_token_id, training_args.seed, device_map, routed)


# ---------------------------------------------------------------- scoring


def score_file(
    model_args: ModelArguments,
    lora_args: LoraArguments,
    reward_args: RewardModelArguments,
    training_args: RunArguments,
) -> dict[str, Any]:
    """Score the records of a file into --output_file, in order; returns the summary."""
    from tqdm import tqdm

    from utils.rlhf.reward_model import load_reward_model

    output = Path(reward_args.output_file)
    if output.exists() and not training_args.overwrite_output_dir:
        raise InputError(f"--output_file {output} is there already; pass another name, or --overwrite_output_dir")
    if not model_args.model_name_or_path:
        raise InputError("pass --model_name_or_path: the folder that rm.py saved")
    records = [(record, *read_answers(record, location)) for location, record in iter_records(str(reward_args.score))]
    if not records:
        raise InputError(f"{reward_args.score}: no records")
    model = load_reward_model(
        lora_args.adapter_name_or_path or model_args.model_name_or_path,
        model_args.dtype,
        "cpu" if training_args.use_cpu else None,
        model_args.load_in_kbits,
        model_args.attn_implementation,
        base=model_args.model_name_or_path if lora_args.adapter_name_or_path else None,
    )
    rows: list[dict[str, Any]] = [{**record, **dict.fromkeys(answers)} for record, _, answers in records]
    places, sequences = encode_records(records, model, reward_args.max_seq_length)
    with tqdm(total=len(sequences), unit="answer", desc="scoring") as bar:
        scores = model.score(sequences, training_args.per_device_eval_batch_size, bar.update).tolist()
    for (number, name), score in zip(places, scores, strict=True):
        rows[number][name] = score
    with atomic_file(output) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    summary = summarise(rows)
    logger.info(
        "finished\n%s\n  scores in %s", "\n".join(f"  {name}  {value}" for name, value in summary.items()), output
    )
    return summary


def read_answers(record: dict[str, Any], location: str) -> tuple[Conversation, dict[str, Any]]:
    """The conversation before the answer, and the answers of a record (messages) by the field of their scores.

    Pairs have "chosen" and "rejected"; single answers stand in "answer" beside the prompt, in "output" beside an
    instruction, or are the last turn of a conversation. Raises: InputError naming `location`.
    """
    from utils.text.conversations import Conversation, read_conversation, read_preference

    if "chosen" in record or "rejected" in record:
        pair = read_preference(record, location)
        prompt = Conversation(pair.messages, pair.tools)
        return prompt, {"chosen_score": pair.chosen, "rejected_score": pair.rejected}
    if "answer" in record:
        kept = {name: value for name, value in record.items() if name not in ("answer", "margin", "source")}
        single = read_preference({**kept, "chosen": record["answer"], "rejected": record["answer"]}, location)
        return Conversation(single.messages, single.tools), {"score": single.chosen}
    if not any(name in record for name in ("instruction", "messages", "conversations")):
        raise InputError(
            f"{location}: need 'chosen' and 'rejected', or 'answer' beside 'prompt', 'instruction' and 'output', or a "
            f"conversation that ends with an answer; the record has {sorted(record)}"
        )
    whole = read_conversation(record, location)
    last = whole.messages[-1]["role"] if whole.messages else "assistant's opening words"
    if last != "assistant":
        raise InputError(f"{location}: the conversation ends with the {last}, not with an answer")
    return Conversation(whole.messages[:-1], whole.tools), {"score": whole.messages[-1]}


def encode_records(
    records: list[tuple[dict[str, Any], Conversation, dict[str, Any]]], model: RewardModel, max_seq_length: int
) -> tuple[list[tuple[int, str]], list[tuple[list[int], list[int]]]]:
    """(number of the record, field of the score) and (prompt ids, answer ids) of each answer that can be scored.

    Answers are cut to the window as in training; empty ones, and those whose prompt fills it, are counted and logged.
    """
    from utils.data.preferences import MIN_ANSWER, encode_answers
    from utils.text.conversations import is_empty

    places, sequences, empty, long, cut = [], [], 0, 0, 0
    for number, (_, before, answers) in enumerate(records):
        prompt, encoded = encode_answers(
            before.messages, list(answers.values()), model.template, model.tokenizer, before.tools
        )
        room = max_seq_length - len(prompt)
        if room < MIN_ANSWER:
            long += 1
            continue
        for (name, answer), ids in zip(answers.items(), encoded, strict=True):
            if is_empty(answer):
                empty += 1
                continue
            cut += len(ids) > room
            places.append((number, name))
            sequences.append((prompt, ids[:room]))
    if empty or long:
        logger.warning("no score: %d empty answers, %d records whose prompt fills the window", empty, long)
    if cut:
        logger.warning("%d answers are cut to the window of %d tokens", cut, max_seq_length)
    if not sequences:
        raise InputError(f"nothing can be scored: {empty} empty answers, {long} prompts fill {max_seq_length} tokens")
    return places, sequences


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of all scores; of pairs accuracy and mean margin."""
    from utils.rlhf.pair_trainer import doubt_few_pairs

    names = ("score", "chosen_score", "rejected_score")
    scores = [row[name] for row in rows for name in names if row.get(name) is not None]
    pairs = [(row.get("chosen_score"), row.get("rejected_score")) for row in rows]
    margins = [chosen - rejected for chosen, rejected in pairs if chosen is not None and rejected is not None]
    for doubt in doubt_few_pairs("scored", len(margins)) if margins else ():
        logger.warning("%s", doubt)
    summary: dict[str, Any] = {"records": len(rows), "scored_answers": len(scores)}
    summary |= {"score_mean": statistics.fmean(scores), "score_std": statistics.pstdev(scores)}
    if margins:
        summary |= {"pairs": len(margins), "accuracy": sum(margin > 0 for margin in margins) / len(margins)}
        summary["margin"] = statistics.fmean(margins)
    return summary


if __name__ == "__main__":
    run(
        main,
        ModelArguments,
        LoraArguments,
        DataArguments,
        RewardModelArguments,
        "utils.training.arguments:RunArguments",
        description=__doc__,
    )
