"""Flags of pt.py and sft.py: how text and conversations become rows."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.arguments import arg, list_arg
from ..core.errors import InputError, raise_problems


@dataclass
class PretrainingArguments:
    """How text becomes blocks."""

    block_size: int = arg(512, help="Tokens per packed block; memory grows linearly.")
    text_column: str = arg("text", help="Field with the text in json, jsonl and parquet files.")
    document_separator: str | None = arg(
        help="In txt files, the line that ends a document; default: a line a document."
    )
    cross_document_attention: bool = arg(False, help="Let tokens attend to the document before theirs in the block.")
    data_weights: list[float] = list_arg(
        help="Passes over each corpus of --train_data per epoch, e.g. 1 0.5; default 1."
    )
    replay_data: list[str] = list_arg(help="Text of the old language, mixed in against forgetting.")
    replay_share: float = arg(0.2, help="Share of all training blocks that comes from --replay_data, 0-1.")
    compare_embedding_init: bool = arg(
        False, help="Before training, report validation bits-per-byte at step 0 for every --embedding_init."
    )

    def __post_init__(self) -> None:
        problems = []
        if self.block_size < 2:
            problems.append(f"--block_size {self.block_size}: need at least 2 tokens")
        if not 0 <= self.replay_share < 1:
            problems.append(f"--replay_share {self.replay_share}: it is a share, 0 <= share < 1")
        if any(weight < 0 for weight in self.data_weights):
            problems.append(f"--data_weights {self.data_weights}: need numbers from 0")
        raise_problems(problems)


@dataclass
class QuestionArguments:
    """What is asked before and after training; of sft.py, ppo.py and dpo.py."""

    questions: list[str] = list_arg(
        help="Files of questions, in any format that sft.py reads: the first 5 are answered before and after training "
        "and shown in the log, all_results.json and README.md."
    )


@dataclass
class TuningArguments(QuestionArguments):
    """How conversations become rows."""

    max_seq_length: int = arg(1024, help="Longest sample in tokens; longer ones are cut, their end token is kept.")
    prompt_template: str | None = arg(
        help="alpaca-2, alpaca-2-long, llama-2, mixtral, alpaca, or tokenizer (its own chat template); default: the "
        "tokenizer's own where it has one, else alpaca-2."
    )
    packing: bool = arg(True, help="Several samples a row, isolated from each other; off: one padded sample a row.")

    def __post_init__(self) -> None:
        if self.max_seq_length < 8:
            raise InputError(f"--max_seq_length {self.max_seq_length}: need at least 8 tokens")
