"""Perplexity: how well a model predicts texts, by the position of the predicted token.

Texts are rows of one length, so that a batch has no padding; each row is a stretch of one document with BOS before it.
An engine turns rows into the losses of their tokens (`model_losses` does for transformers' models); everything else is
made of those.

Shapes: N rows, L their length in tokens. Tokens are counted from 1; the first one, BOS, is given and not scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .files import InputError, atomic_file, iter_document_batches
from .losses import IGNORED, loss_targets
from .rope import find_row_rotary, rotary_key
from .tokenization import encode_texts, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 4096  # scored at once; logits are made in smaller pieces, see utils.losses


# ---------------------------------------------------------------- texts


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
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    surfaces, step = token_bytes(tokenizer), length - len(start)
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
            "texts (--document_separator joins the lines of a txt file), or smaller --lengths"
        )
    count = len(ids) if max_rows is None else min(max_rows, len(ids))
    kept = [rank * len(ids) // count for rank in range(count)]
    return TextRows(torch.tensor([ids[rank] for rank in kept]), torch.tensor([num_bytes[rank] for rank in kept]))


# ---------------------------------------------------------------- losses


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Negative log-likelihoods, in nats, of the tokens after the first: (N, L) -> (N, L - 1) float64 on the CPU.

    The model has its LossHead (losses.install_loss_head). Raises: InputError if one is no number.
    """
    parts = []
    for rows in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
        rows = rows.to(model.device)
        targets = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], IGNORED)], dim=1)
        with loss_targets(model, targets):
            losses: Tensor = model(input_ids=rows, use_cache=False).logits
        parts.append(losses[:, :-1].double().cpu())
    found = torch.cat(parts)
    if not bool(torch.isfinite(found).all()):
        raise InputError(
            "the model's losses are not finite: its weights are damaged, or float16 is too narrow for it; "
            "try --dtype bfloat16 or float32"
        )
    return found


def model_losses(model: PreTrainedModel, ids: Tensor, lengths: Sequence[int]) -> dict[int, Tensor]:
    """The losses of the rows' beginnings: {length: (N, length - 1) float64}, each as in a text of that length.

    Without auto-NTK a token's loss does not depend on what follows it: the longest length is computed, the others are
    its beginnings. With it, lengths that have a rotation of their own are computed by themselves.
    """
    rotary = find_row_rotary(model)
    groups: dict[int | None, list[int]] = {}
    for length in lengths:
        groups.setdefault(rotary_key(model.config, length), []).append(length)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        if rotary is not None:
            rotary.rotate([max(members)])
        losses = token_losses(model, ids[:, : max(members)])
        found |= {length: losses[:, : length - 1] for length in members}
    return found


# ---------------------------------------------------------------- figures


def perplexity_by_length(losses: Mapping[int, Tensor], num_bytes: Tensor) -> list[dict[str, Any]]:
    """A row for every length: perplexity and bits a byte of the tokens after the length before, and of all to here.

    Args:
        losses: of model_losses.
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
    return math.exp(min(float(losses.mean()), 700.0))  # exp(710) is no float64


def _bits_per_byte(losses: Tensor, sizes: Tensor) -> float:
    return float(losses.sum()) / math.log(2) / float(sizes.sum())


# ---------------------------------------------------------------- the picture


def plot_perplexity(rows: Sequence[Mapping[str, Any]], path: Path, windows: Sequence[int] = ()) -> None:
    """Draw perplexity against length into a png: a panel for each text, a line for each model and setting.

    Args:
        rows: those of perplexity_by_length, with `text` and `label`.
        windows: trained windows in tokens, drawn as upright lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter, NullLocator

    texts = list(dict.fromkeys(row["text"] for row in rows))
    figure, grid = pyplot.subplots(1, len(texts), figsize=(1 + 5.5 * len(texts), 4), squeeze=False)
    for axes, text in zip(grid[0], texts, strict=True):
        for label in dict.fromkeys(row["label"] for row in rows):
            points = [row for row in rows if (row["text"], row["label"]) == (text, label)]
            axes.plot([p["length"] for p in points], [p["perplexity"] for p in points], marker="o", label=label)
        for window in sorted(set(windows)):
            axes.axvline(window, color="#52606d", linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="perplexity", title=text)
        ticks = sorted({row["length"] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
