"""Data sets for training: corpora and samples cut into rows whose documents do not see each other; mixing, packing.

Every item is a dict of int64 tensors of one length T:
    input_ids
    position_ids: 0, 1, 2 ... within each segment (document, sample, padding); restarting is what keeps segments apart,
        as attention kernels derive their mask from it when there is no attention_mask and no cache (use_cache=False).
    labels: the token itself where it is a target (transformers' convention, shifted by the model), else IGNORE_INDEX.
    shift_labels: the target of each position, so the next token; IGNORE_INDEX at the end of a segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.errors import InputError
from ..text.prompts import IGNORE_INDEX
from .corpora import CorpusCache
from .samples import SampleCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Item = dict[str, Tensor]
TRAINED_MARKS = ("⟦", "⟧")


# ---------------------------------------------------------------- pre-training blocks


class PackedBlocks(Dataset[Item]):
    """Documents of a corpus one after another, cut into blocks of block_size tokens; the last one is padded.

    Every token except each document's first is a target exactly once, also across the border of two blocks.

    Attributes:
        num_tokens: tokens without padding.
        num_bytes: UTF-8 bytes of the documents' text (of a document cut by max_blocks, in proportion).
    """

    def __init__(
        self,
        corpus: CorpusCache,
        document_ids: np.ndarray,
        block_size: int,
        *,
        cross_document_attention: bool = False,
        max_blocks: int | None = None,
    ) -> None:
        """
        Args:
            document_ids: (n,) which documents, in this order.
            cross_document_attention: positions run through the block, so that attention crosses documents; targets do
                not change.
            max_blocks: use only this many blocks, from the first on.
        Raises: InputError if there is no document, or block_size is below 2.
        """
        if block_size < 2:
            raise InputError(f"--block_size {block_size}: need at least 2 tokens")
        if len(document_ids) == 0:
            raise InputError(f"{corpus.meta['sources'][0]}: no document left for this data set")
        self.corpus, self.block_size = corpus, block_size
        self.cross_document_attention = cross_document_attention
        document_ids = np.asarray(document_ids, dtype=np.int64)
        ends = np.asarray(corpus.document_ends)[document_ids]
        lengths = ends - np.where(document_ids > 0, np.asarray(corpus.document_ends)[document_ids - 1], 0)
        # Two kinds of places: in this data set, where the chosen documents stand without gaps, and in the cache.
        # Blocks are cut when they are asked for, so 16 bytes a document are kept here, however long the text.
        self.document_ends = np.cumsum(lengths)
        self.cache_offsets = ends - self.document_ends  # what to add to a place here to get the place in the cache
        total = int(self.document_ends[-1])
        self.num_tokens = total if max_blocks is None else min(total, max_blocks * block_size)
        self.num_bytes = self._count_bytes(np.asarray(corpus.document_bytes)[document_ids], lengths)

    def _count_bytes(self, document_bytes: np.ndarray, lengths: np.ndarray) -> int:
        whole = int(np.searchsorted(self.document_ends, self.num_tokens, side="right"))
        num_bytes = int(document_bytes[:whole].sum(dtype=np.int64))
        # Of the document that max_blocks cuts, if there is one, as many bytes as its share of tokens.
        rest = self.num_tokens - (int(self.document_ends[whole - 1]) if whole else 0)
        return num_bytes + (round(int(document_bytes[whole]) * rest / int(lengths[whole])) if rest else 0)

    def __len__(self) -> int:
        return -(-self.num_tokens // self.block_size)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.block_size
        places = np.arange(start, min(start + self.block_size, self.num_tokens))
        documents = np.searchsorted(self.document_ends, places, side="right")
        # A document that max_blocks cuts ends there: its last token here has no target.
        ends = np.minimum(self.document_ends[documents], self.num_tokens)
        in_cache = places + self.cache_offsets[documents]
        tokens = self.corpus.tokens[in_cache].astype(np.int64)
        first = np.where(documents > 0, self.document_ends[documents - 1], 0)
        # The target of a block's last place is the first token of the next block, if the document goes on there. Where
        # it does not, the place itself is looked up, since the one after it may lie behind the end of the cache.
        goes_on = places + 1 < ends
        following = self.corpus.tokens[np.where(goes_on, in_cache + 1, in_cache)].astype(np.int64)
        count = len(places)
        item = {
            "input_ids": self._row(tokens, count, 0),
            "labels": self._row(np.where(places == first, IGNORE_INDEX, tokens), count, IGNORE_INDEX),
            "shift_labels": self._row(np.where(goes_on, following, IGNORE_INDEX), count, IGNORE_INDEX),
        }
        positions = np.arange(self.block_size)
        if not self.cross_document_attention:
            # The rest of a document that began in the block before starts at 0 again, as what it sees does.
            positions[:count] = places - np.maximum(first, start)
            positions[count:] -= count
        item["position_ids"] = positions
        return {name: torch.from_numpy(row) for name, row in item.items()}

    def _row(self, values: np.ndarray, count: int, padding: int) -> np.ndarray:
        row: np.ndarray = np.full(self.block_size, padding, dtype=np.int64)
        row[:count] = values
        return row


def share_evenly(sizes: Sequence[int], total: int) -> list[int]:
    """How many to take of each to have `total` of all: equally many, and what one lacks of the others."""
    shares = [0] * len(sizes)
    waiting = sorted(range(len(sizes)), key=sizes.__getitem__)  # the smallest first: what it lacks is known then
    for place, number in enumerate(waiting):
        shares[number] = min(sizes[number], -(-total // (len(sizes) - place)))
        total -= shares[number]
    return shares


class MixedBlocks(Dataset[Item]):
    """Blocks of several corpora: each as many passes an epoch as its weight says, and a share of replay blocks."""

    def __init__(
        self,
        corpora: Mapping[str, PackedBlocks],
        weights: Mapping[str, float] | None = None,
        *,
        replay: Mapping[str, PackedBlocks] | None = None,
        replay_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            weights: passes over a corpus an epoch, 1 where none is given; 2.5 is two passes and half of the blocks, 0
                leaves the corpus out.
            replay: corpora of another kind (the old language), drawn so that their blocks make up `replay_share` of
                all; without repetition if they are large enough. Several are mixed in proportion to their sizes.
        Raises: InputError for unknown names, a negative weight, or a share outside [0, 1).
        """
        replay, weights = replay or {}, weights or {}
        _check_mix(corpora, weights, replay, replay_share)
        self.names = [*corpora, *replay]
        self.parts = [*corpora.values(), *replay.values()]
        # All blocks are numbered through; an epoch is a list of these numbers, in which one may stand twice.
        self.offsets = np.cumsum([0, *map(len, self.parts)])
        generator = np.random.default_rng(seed)
        chosen = [
            self.offsets[number] + _draw(len(part), weights.get(name, 1.0) * len(part), generator)
            for number, (name, part) in enumerate(corpora.items())
        ]
        if replay_share > 0:
            # Replay is `replay_share` of the whole, itself included, so this much of what is not replay.
            count = sum(map(len, chosen)) * replay_share / (1 - replay_share)
            start = self.offsets[len(corpora)]
            chosen.append(start + _draw(int(self.offsets[-1] - start), count, generator))
        self.indices = np.concatenate(chosen)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        block = self.indices[index]
        number = int(np.searchsorted(self.offsets, block, side="right")) - 1
        return self.parts[number][int(block - self.offsets[number])]

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch."""
        return sum(tokens for _, _, tokens, _ in self.describe())

    def describe(self) -> list[tuple[str, int, int, float]]:
        """(name, blocks, tokens, share of all blocks) of an epoch, for each corpus."""
        numbers = np.searchsorted(self.offsets, self.indices, side="right") - 1
        rows = []
        for number, (name, part) in enumerate(zip(self.names, self.parts, strict=True)):
            blocks = self.indices[numbers == number] - self.offsets[number]
            padding = len(part) * part.block_size - part.num_tokens  # all of it in the last block
            tokens = len(blocks) * part.block_size - padding * int((blocks == len(part) - 1).sum())
            rows.append((name, len(blocks), tokens, len(blocks) / max(len(self), 1)))
        return rows


def _check_mix(
    corpora: Mapping[str, PackedBlocks],
    weights: Mapping[str, float],
    replay: Mapping[str, PackedBlocks],
    replay_share: float,
) -> None:
    problems = []
    if unknown := sorted(set(weights) - set(corpora)):
        problems.append(f"weights for unknown corpora: {', '.join(unknown)}; there are {', '.join(corpora)}")
    problems += [f"weight {weight} of {name}: need at least 0" for name, weight in weights.items() if not weight >= 0]
    if all(weights.get(name, 1.0) == 0 for name in corpora):
        problems.append("every corpus has the weight 0; give one of them more")
    if not 0 <= replay_share < 1:
        problems.append(f"--replay_share {replay_share}: it is a fraction, 0 <= share < 1")
    if replay_share > 0 and not replay:
        problems.append(f"--replay_share {replay_share}: there is no replay data")
    if twice := sorted(set(corpora) & set(replay)):
        problems.append(f"both training and replay data are named {', '.join(twice)}; pass them as name=path")
    if problems:
        raise InputError("\n".join(problems))


def _draw(size: int, count: float, generator: np.random.Generator) -> np.ndarray:
    """About `count` of the numbers below `size`: whole passes, then a sample without repetition, ascending in each.

    At least one, unless `count` is 0.
    """
    passes, rest = divmod(max(round(count), 1 if count else 0), size)
    sample = np.sort(generator.permutation(size)[:rest])
    return np.concatenate([np.tile(np.arange(size), passes), sample])


# ---------------------------------------------------------------- samples


class PaddedSamples(Dataset[Item]):
    """One sample a row, as long as it is; the Collator pads."""

    num_bytes = 0  # bits per byte are not reported for answers

    def __init__(self, samples: SampleCache, sample_ids: np.ndarray | None = None) -> None:
        """Args: sample_ids: (n,) which samples; all by default."""
        self.samples = samples
        ids = np.arange(samples.num_samples) if sample_ids is None else np.asarray(sample_ids, dtype=np.int64)
        self.sample_ends = np.asarray(samples.document_ends)[ids]
        self.sample_starts = np.where(ids > 0, np.asarray(samples.document_ends)[ids - 1], 0)
        # Row r holds the samples order[row_ends[r - 1]:row_ends[r]].
        self.order = np.arange(len(ids))
        self.row_ends = np.arange(1, len(ids) + 1)

    @property
    def num_tokens(self) -> int:
        return int((self.sample_ends - self.sample_starts).sum())

    @property
    def num_samples(self) -> int:
        return len(self.order)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        lengths = (self.sample_ends - self.sample_starts)[self.order]
        return int(np.add.reduceat(lengths, np.append(0, self.row_ends[:-1])).max())

    def __len__(self) -> int:
        return len(self.row_ends)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        numbers = self.order[self.row_ends[index - 1] if index else 0 : self.row_ends[index]]
        spans = [slice(self.sample_starts[number], self.sample_ends[number]) for number in numbers]
        tokens = np.concatenate([self.samples.tokens[span] for span in spans]).astype(np.int64)
        trained = np.concatenate([self.samples.trained[span] for span in spans])
        positions = np.concatenate([np.arange(span.stop - span.start) for span in spans])
        trained = trained & (positions > 0)  # nothing in the same sample predicts its first token
        labels = np.where(trained, tokens, IGNORE_INDEX)
        item = {
            "input_ids": tokens,
            "position_ids": positions,
            "labels": labels,
            "shift_labels": np.append(labels[1:], IGNORE_INDEX),
        }
        return {name: torch.from_numpy(row) for name, row in item.items()}


class PackedSamples(PaddedSamples):
    """Whole samples packed into rows of at most max_seq_length tokens; each is a segment of its own."""

    def __init__(
        self, samples: SampleCache, max_seq_length: int | None, sample_ids: np.ndarray | None = None, *, seed: int = 0
    ) -> None:
        """
        Args:
            max_seq_length: None: as pack_best_fit's capacity.
            seed: which of equally long samples go together.
        Raises: InputError if a sample is longer than a row.
        """
        super().__init__(samples, sample_ids)
        lengths = self.sample_ends - self.sample_starts
        if max_seq_length is not None and len(lengths) and lengths.max() > max_seq_length:
            raise InputError(f"a sample has {lengths.max()} tokens, more than --max_seq_length {max_seq_length}")
        rows = pack_best_fit(lengths, max_seq_length, seed)
        self.order = np.array([sample for row in rows for sample in row], dtype=np.int64)
        self.row_ends = np.cumsum([len(row) for row in rows], dtype=np.int64)


def pack_best_fit(lengths: np.ndarray, capacity: int | None, seed: int) -> list[list[int]]:
    """Best-fit decreasing: the longest sample first, each into the fullest row that still has room for it.

    Args:
        lengths: (n,) tokens of each sample, at most `capacity`; the seed decides the order of equal ones.
        capacity: None: twice the longest. Where most samples are longer than half of it, a row of the longest's own
            length would hold one of them and much padding.
    Returns: the samples of each row. Source: Johnson 1974, bin packing within 11/9 of the best.
    """
    capacity = 2 * int(lengths.max(initial=0)) if capacity is None else capacity
    # Shuffled before the stable sort, so that chance decides among equal lengths, and not the order of the file.
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rooms = 0  # bit r is set where by_room[r] holds a row, so the smallest room >= length is one bit operation
    for sample in order.tolist():
        length = int(lengths[sample])
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                open_rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        by_room[room - length].append(row)
        open_rooms |= 1 << (room - length)
    return rows


# ---------------------------------------------------------------- looking at a row


def describe_sample(item: Item, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first segment of an item as text, trained stretches between ⟦ and ⟧."""
    starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
    end = starts[1] if len(starts) > 1 else len(item["input_ids"])
    ids, labels = item["input_ids"][:end].tolist(), item["labels"][:end].tolist()
    # A segment's first token has no label of its own; it belongs to what follows.
    trained = [label != IGNORE_INDEX for label in labels]
    trained[0] = all(trained[1:])
    parts = []
    for begin, stop in _stretches(trained):
        text = str(tokenizer.decode(ids[begin:stop], skip_special_tokens=False))
        parts.append(text.join(TRAINED_MARKS) if trained[begin] else text)
    return "".join(parts)


def _stretches(flags: Sequence[bool]) -> Iterable[tuple[int, int]]:
    borders = [0, *(i for i in range(1, len(flags)) if flags[i] != flags[i - 1]), len(flags)]
    return itertools.pairwise(borders)
