"""Batches: rows padded to the longest, both answers of a pair in one row, and which rows make a batch.

A pair's answers stand behind the one prompt they share and do not see each other. One forward pass serves both, the
prompt is computed once, and a row is padded to the longest pair of its batch, not to the longest answer twice. That
takes an attention kernel with masks of any form (sdpa); with others each answer has its own copy of the prompt, and
both are segments of the row (position_ids restart, see utils.data.blocks).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..core.errors import InputError
from ..text.prompts import IGNORE_INDEX
from .blocks import Item
from .preferences import Pair, PairCache

BATCHES_PER_GROUP = 50  # more: batches of more equal lengths, but an order that depends less on chance


# ---------------------------------------------------------------- rows of text and samples


class Collator:
    """Items -> a batch of (B, T) tensors, int64, rows padded on the right to the longest; no attention_mask.

    Padding is a segment of its own: positions from 0, no targets; is_token (B, T) bool says where there is none.
    """

    def __init__(self, pad_token_id: int, *, flatten: bool = False, pad_to_multiple_of: int = 1) -> None:
        """Args:
        flatten: one row (1, sum of lengths), which flash_attention_2 needs to see where segments begin.
        pad_to_multiple_of: what T is a multiple of.
        """
        self.pad_token_id, self.flatten, self.pad_to_multiple_of = pad_token_id, flatten, pad_to_multiple_of

    def __call__(self, items: Sequence[Item]) -> Item:
        names = ("input_ids", "position_ids", "labels", "shift_labels")
        if self.flatten:
            items = [{name: torch.cat([item[name] for item in items]) for name in names}]
        length = max(len(item["input_ids"]) for item in items)
        length += -length % self.pad_to_multiple_of
        batch = {name: torch.full((len(items), length), IGNORE_INDEX, dtype=torch.int64) for name in names}
        batch["input_ids"].fill_(self.pad_token_id)
        for row, item in enumerate(items):
            count = len(item["input_ids"])
            for name in names:
                batch[name][row, :count] = item[name]
            batch["position_ids"][row, count:] = torch.arange(length - count)
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return batch | {"is_token": torch.arange(length) < lengths[:, None]}


@dataclass(frozen=True)
class PartCollator:
    """Items -> one of `parts` equal parts of each row of a Collator's batch, (B, T / parts).

    row_position_ids (B, T): of the whole rows. Targets are those of the whole rows too: the last token of a part has
    the first one of the next part for its target.
    """

    whole: Collator
    parts: int
    part: int

    def __call__(self, items: Sequence[Item]) -> Item:
        batch = self.whole(items)
        own = {name: rows.chunk(self.parts, 1)[self.part] for name, rows in batch.items()}
        return own | {"row_position_ids": batch["position_ids"]}


# ---------------------------------------------------------------- preference pairs


@dataclass(frozen=True)
class Example:
    """A pair and its number in the PairCache."""

    number: int
    pair: Pair


class PairSet(Dataset[Example]):
    """Some pairs of a PairCache.

    Attributes:
        lengths: (n,) tokens of each pair, its prompt counted once.
        num_tokens: their sum.
    """

    num_bytes = 0  # bits per byte are not reported for pairs

    def __init__(self, file: PairCache, ids: np.ndarray | None = None) -> None:
        """Args: ids: (n,) which pairs; all by default."""
        self.file = file
        self.ids = np.arange(len(file)) if ids is None else np.asarray(ids, dtype=np.int64)
        self.lengths = file.lengths[self.ids].astype(np.int64).sum(1)
        self.num_tokens = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        number = int(self.ids[index])
        return Example(number, self.file[number])


class PairCollator:
    """Examples -> a batch of P pairs: int64 tensors, rows padded on the right to the longest.

    input_ids, position_ids, shift_labels: (B, T), as in utils.data.blocks; targets are the tokens of the answers.
    attention_mask: (B, 1, T, T) bool, where prompts are shared: who sees whom.
    answer: (B, T), the number of the answer each position belongs to, -1 for padding: 2 p is the chosen answer of pair
        p, 2 p + 1 its rejected one. A prompt counts to its answer, a shared one to the chosen answer.
    last: (2 P,), the place of each answer's last token in the flattened (B * T,) positions.
    numbers: (P,), the pairs' numbers in the PairCache.
    margins: (P,) float32, 0 where the record gave none.
    """

    def __init__(self, pad_token_id: int, attention: str) -> None:
        """Args: attention: sdpa shares prompts; eager has two segments in a row; flash_attention_2 has those of all
        pairs in one row, since it sees where segments begin only there."""
        self.pad_token_id = pad_token_id
        self.shares_prompts = attention == "sdpa"
        self.flatten = attention == "flash_attention_2"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        layout = _shared_row if self.shares_prompts else _row
        rows = [layout(example.pair, place) for place, example in enumerate(examples)]
        if self.flatten:
            rows = [{name: np.concatenate([row[name] for row in rows]) for name in rows[0]}]
        length = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": self.pad_token_id, "shift_labels": IGNORE_INDEX, "answer": -1, "segment": 3}
        batch: dict[str, Tensor] = {}
        for name in rows[0]:
            table: np.ndarray = np.full((len(rows), length), padding.get(name, 0), dtype=np.int64)
            for number, row in enumerate(rows):
                count = len(row[name])
                table[number, :count] = row[name]
                if name == "position_ids":  # padding is a segment of its own
                    table[number, count:] = np.arange(length - count)
            batch[name] = torch.from_numpy(table)
        if self.shares_prompts:
            segment = batch.pop("segment")
            # The prompt (0) is seen by all, by padding (3) too: a row of the mask without any True would make NaN.
            seen = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
            batch["attention_mask"] = (seen & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1)
        answer = batch["answer"].flatten()
        places = torch.arange(len(answer))[answer >= 0]
        # The largest place of each answer, wherever its row is: one call for rows of one pair and for flattened ones.
        last = torch.zeros(2 * len(examples), dtype=torch.int64)
        batch["last"] = last.scatter_reduce(0, answer[answer >= 0], places, "amax")
        batch["numbers"] = torch.tensor([example.number for example in examples])
        batch["margins"] = torch.tensor([example.pair.margin or 0.0 for example in examples], dtype=torch.float32)
        return batch


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a PairCollator's batch, what a model's forward takes."""
    return {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}


def _row(pair: Pair, place: int) -> dict[str, np.ndarray]:
    segments = []
    for side, answer in enumerate((pair.chosen, pair.rejected)):
        ids = np.concatenate([pair.prompt, answer])
        targets: np.ndarray = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        targets[len(pair.prompt) - 1 : -1] = answer  # the prompt's last token predicts the answer's first
        segments.append(
            {
                "input_ids": ids,
                "position_ids": np.arange(len(ids)),
                "shift_labels": targets,
                "answer": np.full(len(ids), 2 * place + side),
            }
        )
    return {name: np.concatenate([segment[name] for segment in segments]) for name in segments[0]}


def _shared_row(pair: Pair, place: int) -> dict[str, np.ndarray]:
    """Prompt, chosen answer, rejected answer; the prompt's last token stands before each, as it predicts both firsts.

    "segment" is 0 for the rest of the prompt, which all see, then 1 and 2, which do not see each other.
    """
    start, last = len(pair.prompt) - 1, pair.prompt[-1:]
    ends = [start + 1 + len(answer) for answer in (pair.chosen, pair.rejected)]
    none: np.ndarray = np.full(start, IGNORE_INDEX)
    counts = [start, ends[0] - start, ends[1] - start]
    return {
        "input_ids": np.concatenate([pair.prompt[:-1], last, pair.chosen, last, pair.rejected]),
        "position_ids": np.concatenate([np.arange(ends[0]), np.arange(start, ends[1])]),
        "shift_labels": np.concatenate([none, pair.chosen, [IGNORE_INDEX], pair.rejected, [IGNORE_INDEX]]),
        "answer": np.repeat([2 * place, 2 * place, 2 * place + 1], counts),
        "segment": np.repeat([0, 1, 2], counts),
    }


def sum_by_answer(values: Tensor, answer: Tensor, num_answers: int) -> Tensor:
    """Sums of values (B, T) over the positions of each answer (B, T; see PairCollator) -> (num_answers,)."""
    inside = answer.flatten() >= 0
    sums = values.new_zeros(num_answers)
    return sums.index_add(0, answer.flatten()[inside], values.flatten()[inside])


# ---------------------------------------------------------------- which rows make a batch


def group_by_length(lengths: np.ndarray, batch_size: int, seed: int) -> list[np.ndarray]:
    """Batches of rows of about the same length, in random order: shuffled, sorted within groups of some batches.

    The batch with the longest row comes first, so that a lack of memory shows at once.

    Args:
        lengths: (n,) tokens of each row, for a pair what one forward pass sees of it.
        batch_size: rows of a batch over all processes; one batch may have fewer.
        seed: another one each epoch.
    Returns: (rows,) int64 each; every row is in one of them.
    """
    if batch_size < 1:
        raise InputError(f"a batch of {batch_size} rows: need at least 1")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    size = batch_size * BATCHES_PER_GROUP
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    groups = [group[np.argsort(-np.asarray(lengths)[group], kind="stable")] for group in groups]
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    # Shuffled again, or every group would go from long to short.
    batches = [batches[number] for number in generator.permutation(len(batches))]
    longest = max(range(len(batches)), key=lambda number: int(lengths[batches[number]].max()), default=0)
    return batches[longest : longest + 1] + batches[:longest] + batches[longest + 1 :]


class LengthGroupedOrder(Sampler[int]):
    """Rows in batches of about the same length, another order every epoch; see group_by_length."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        """Args: lengths: (n,) tokens of each row; batch_size: rows of a forward pass, over all processes."""
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        batches = group_by_length(self.lengths, self.batch_size, self.seed + self.epoch)
        # A smaller batch must come last, or those after it would be cut in the wrong places.
        batches.sort(key=lambda batch: len(batch) < self.batch_size)
        for batch in batches:
            yield from batch.tolist()
