"""Perplexity: how well a model predicts texts, by document or by the position of the predicted token.

Documents are cut into windows that score each of their tokens once (likelihood.py). For curves by position, texts are
rows of one length; each is a stretch of one document with BOS before it. A likelihood.Scorer knows the losses of
tokens; everything else is made of those.

Shapes: N rows, L their length in tokens; D documents. Tokens of a row are counted from 1; the first one, BOS, is given
and not scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.records import iter_document_batches, spread_evenly
from ..text.tokenizer import encode_texts, start_ids, token_byte_lengths
from .intervals import ratio_spread, sum_spread
from .likelihood import Window, cut_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_EXPONENT = 700.0  # exp(710) is no float64
GROUP_TOKENS = 1 << 16  # of documents that are scored together: what a killed run has to do again


# ---------------------------------------------------------------- whole documents


@dataclass(frozen=True)
class Documents:
    """Some documents as a tokenizer writes them.

    Attributes:
        ids: the tokens of each, without BOS.
        start: BOS, or nothing for tokenizers that have none.
        num_scored: (D,) tokens with a loss: all, or all but the first one where there is no BOS.
        num_bytes: (D,) their UTF-8 bytes.
        left_out: documents of the files that are not among them, as only some were asked for.
    """

    ids: list[np.ndarray]
    start: list[int]
    num_scored: np.ndarray
    num_bytes: np.ndarray
    left_out: int

    def groups(self) -> Iterator[range]:
        """The documents in order, in parts of about GROUP_TOKENS."""
        begin = size = 0
        for number, ids in enumerate(self.ids):
            size += len(ids)
            if size >= GROUP_TOKENS or number == len(self.ids) - 1:
                yield range(begin, number + 1)
                begin, size = number + 1, 0

    def windows(self, group: range, length: int, stride: int | None) -> list[list[Window]]:
        """Of each document of a group, see likelihood.cut_windows."""
        return [cut_windows(self.ids[number].tolist(), self.start, length, stride) for number in group]


def read_documents(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    max_documents: int | None = None,
    document_separator: str | None = None,
    text_column: str = "text",
) -> Documents:
    """Tokenise every document of some files, however short or long; blank ones are none.

    Args:
        max_documents: so many are kept, spread evenly over the files; None: all.
        document_separator: in txt files, the line that ends a document; None makes every line one.
    Raises: InputError if there is no document, or none with a token to score.
    """
    start, surfaces = start_ids(tokenizer), token_byte_lengths(tokenizer)
    ids: list[np.ndarray] = []
    scored: list[int] = []
    num_bytes: list[int] = []
    for file in files:
        for texts in iter_document_batches(file, text_column=text_column, document_separator=document_separator):
            for text, found in zip(texts, encode_texts(tokenizer, texts), strict=True):
                given = [] if start else found[:1]
                ids.append(np.array(found, np.int32))
                scored.append(len(found) - len(given))
                num_bytes.append(len(text.encode()) - sum(surfaces[given].tolist()))
    kept = spread_evenly(range(len(ids)), max_documents)
    if not any(scored[number] for number in kept):
        raise InputError(f"no text to score in {', '.join(map(str, files))}")
    return Documents(
        [ids[number] for number in kept],
        start,
        np.array([scored[number] for number in kept]),
        np.array([num_bytes[number] for number in kept]),
        len(ids) - len(kept),
    )


def document_figures(losses: Sequence[float], documents: Documents) -> dict[str, Any]:
    """Perplexity and bits a byte of all documents together, with 95 % intervals over documents.

    Args:
        losses: of each document, in nats. Long documents weigh more, as every token weighs the same.
    """
    total = np.asarray(losses, np.float64)
    bits = total / math.log(2)
    tokens, sizes = documents.num_scored, documents.num_bytes
    mean, spread = total.sum() / tokens.sum(), ratio_spread(total, tokens)
    per_byte, byte_spread = bits.sum() / sizes.sum(), ratio_spread(bits, sizes)
    return {
        "documents": len(total),
        "scored_tokens": int(tokens.sum()),
        "unscored_tokens": sum(map(len, documents.ids)) - int(tokens.sum()),
        "bytes": int(sizes.sum()),
        "perplexity": _exp(mean),
        "perplexity_interval": None if spread is None else [_exp(mean - spread), _exp(mean + spread)],
        "bits_per_byte": float(per_byte),
        "bits_per_byte_interval": (
            None if byte_spread is None else [float(per_byte - byte_spread), float(per_byte + byte_spread)]
        ),
    }


def compare_documents(
    losses: Sequence[float], documents: Documents, base_losses: Sequence[float], base_documents: Documents
) -> dict[str, Any]:
    """How bits a byte differ from another model's on the same documents, in pairs: positive is worse.

    What all models find hard in a document does not count, so the interval is much narrower than each model's own.
    """
    bits = [np.asarray(values, np.float64) / math.log(2) for values in (losses, base_losses)]
    sizes = [documents.num_bytes, base_documents.num_bytes]
    ratios = [float(one.sum() / size.sum()) for one, size in zip(bits, sizes, strict=True)]
    parts = [(one - ratio * size) / size.sum() for one, ratio, size in zip(bits, ratios, sizes, strict=True)]
    difference, spread = ratios[0] - ratios[1], sum_spread(parts[0] - parts[1])
    return {
        "bits_per_byte_difference": difference,
        "bits_per_byte_difference_interval": None if spread is None else [difference - spread, difference + spread],
    }


def _exp(mean: float) -> float:
    return math.exp(min(float(mean), LARGEST_EXPONENT))


# ---------------------------------------------------------------- rows of one length


@dataclass(frozen=True)
class TextRows:
    """Stretches of documents, all of one length."""

    ids: Tensor  # (N, L) int64
    num_bytes: Tensor  # (N, L) int64: UTF-8 bytes that each token stands for


def read_rows(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    max_rows: int | None = None,
    document_separator: str | None = None,
    text_column: str = "text",
) -> TextRows:
    """Cut every document into stretches of `length` tokens, one after the other; what is left at its end is dropped.

    Args:
        max_rows: so many are kept, spread evenly over the files; None: all.
        document_separator: in txt files, the line that ends a document; None makes every line one.
    Raises: InputError if no document is long enough.
    """
    start = start_ids(tokenizer)
    surfaces, step = token_byte_lengths(tokenizer), length - len(start)
    ids: list[list[int]] = []
    num_bytes: list[list[int]] = []
    longest = 0
    for file in files:
        for texts in iter_document_batches(file, text_column=text_column, document_separator=document_separator):
            for text, found in zip(texts, encode_texts(tokenizer, texts), strict=True):
                longest = max(longest, len(start) + len(found))
                sizes = surfaces[found].tolist()
                if found:
                    sizes[0] += len(text.encode()) - sum(sizes)  # a space put before the text is no part of it
                for begin in range(0, len(found) - step + 1, step):
                    ids.append(start + found[begin : begin + step])
                    num_bytes.append([0] * len(start) + sizes[begin : begin + step])
    if not ids:
        raise InputError(
            f"no document of {length} tokens in {', '.join(map(str, files))}; the longest has {longest}: pass longer "
            "texts (--document_separator joins the lines of a txt file), smaller --lengths, or none to score whole "
            "documents"
        )
    kept = spread_evenly(range(len(ids)), max_rows)
    return TextRows(torch.tensor([ids[rank] for rank in kept]), torch.tensor([num_bytes[rank] for rank in kept]))


def perplexity_by_length(losses: Mapping[int, Tensor], num_bytes: Tensor) -> list[dict[str, Any]]:
    """A row for every length: perplexity and bits a byte of the tokens after the length before, and of all to here.

    Args:
        losses: of likelihood.Scorer.row_losses.
        num_bytes: (N, L), of the rows' tokens.
    """
    rows = []
    before = 1  # tokens that are scored under smaller lengths; the first token never is
    for length in sorted(losses):
        here, sizes = losses[length].double(), num_bytes[:, 1:length].double()
        bucket = slice(before - 1, length - 1)
        rows.append(
            {
                "length": length,
                "tokens": f"{before + 1 if before > 1 else 1}-{length}",
                "perplexity": _perplexity(here[:, bucket]),
                "bits_per_byte": _bits_per_byte(here[:, bucket], sizes[:, bucket]),
                "perplexity_to_here": _perplexity(here),
                "bits_per_byte_to_here": _bits_per_byte(here, sizes),
                "scored_tokens": here[:, bucket].numel(),
            }
        )
        before = length
    return rows


def _perplexity(losses: Tensor) -> float:
    return _exp(float(losses.mean()))


def _bits_per_byte(losses: Tensor, sizes: Tensor) -> float:
    return float(losses.sum()) / math.log(2) / float(sizes.sum())
