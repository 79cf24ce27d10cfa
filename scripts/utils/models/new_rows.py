"""New rows: embeddings and head of a model whose vocabulary grew."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..text.tokenizer import (
    check_embedding_rows,
    embedding_rows,
    has_tokenizer,
    load_tokenizer,
    segment_with,
    vocabulary_end,
)
from ..weights.config import load_config, local_folder
from ..weights.names import is_embedding
from .gathering import full_shape, gathered_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


UNTRAINED = "embed_tokens and lm_head are not trained; pass --modules_to_save embed_tokens,lm_head too"


def refuse_untrained_rows(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raises: InputError if the tokenizer has ids the model has no rows for."""
    check_embedding_rows(
        tokenizer,
        rows,
        f"the tokenizer has {len(tokenizer)} tokens, the model {rows} embedding rows: new rows would stay "
        "untrained; train them with --modules_to_save embed_tokens,lm_head, or pass --resize_embeddings, or the "
        "model's own tokenizer",
    )


def extend_vocabulary(
    model: PreTrainedModel,
    old_tokenizer: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    seed: int,
) -> int:
    """Give embed_tokens and lm_head rows for every token of a larger tokenizer; returns how many were added.

    Rows the model has beyond its old tokenizer (padding) are initialised too. Methods: see --embedding_init.
    """
    rows = full_shape(model.get_input_embeddings().weight)[0]
    first_new = min(rows, vocabulary_end(old_tokenizer)) if old_tokenizer is not None else rows
    end = vocabulary_end(tokenizer)
    if end <= first_new:
        return 0
    if end > rows:
        model.resize_token_embeddings(embedding_rows(tokenizer), mean_resizing=False)
    initialise_rows(model, old_tokenizer, tokenizer, method, first_new, seed)
    return end - first_new


def first_new_row(model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The first row that the tokenizer adds to a model's embeddings. Raises: InputError if it adds none."""
    old_tokenizer, rows = find_tokenizer(model_name_or_path), load_config(model_name_or_path).vocab_size
    first: int = rows if old_tokenizer is None else min(rows, vocabulary_end(old_tokenizer))
    if vocabulary_end(tokenizer) <= first:
        raise InputError(
            f"--train_new_rows_only: {tokenizer.name_or_path} adds no token to the {first} of {model_name_or_path}; "
            "pass the larger tokenizer, or leave it out"
        )
    return first


def freeze_all_but_new_rows(model: nn.Module, model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Of what is trained, leave embed_tokens and lm_head alone; LoRA layers stay as they are.

    Returns: the first row to train, for rows_from. Raises: InputError if they are not trained, or have no new rows.
    """
    first = first_new_row(model_name_or_path, tokenizer)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    kept = {name: weight for name, weight in trained.items() if is_embedding(name) and ".lora_" not in name}
    if not kept:
        raise InputError(f"--train_new_rows_only: {UNTRAINED}")
    for name, weight in trained.items():
        weight.requires_grad_(name in kept)
    count = sum(weight.shape[1] * (weight.shape[0] - first) for weight in kept.values())
    logger.info(
        "rows from %d on of embed_tokens and lm_head are trained, %s weights, and nothing else", first, f"{count:,}"
    )
    return first


def rows_from(weight: nn.Parameter, first: int) -> nn.Parameter:
    """The rows of a weight from `first` on as a parameter of their own, for an optimizer, in the weight's memory.

    Whenever the weight gets a gradient, the rows get theirs, and that of the rows before becomes 0.
    """
    rows = nn.Parameter(weight.data[first:])

    def share(weight: Tensor) -> None:
        assert weight.grad is not None
        weight.grad[:first] = 0  # so that it does not count for --max_grad_norm
        rows.grad = weight.grad[first:]

    weight.register_post_accumulate_grad_hook(share)
    return rows


def check_extends(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> None:
    """Raises: InputError unless the new tokenizer has every token of the old one at its old id."""
    ids = list(range(vocabulary_end(old)))
    for index, token in enumerate(old.convert_ids_to_tokens(ids)):
        other = new.convert_ids_to_tokens(index) if index < vocabulary_end(new) else None
        if token and token != other:  # an id that the old tokenizer left out may be used now
            raise InputError(
                f"token {index} is {token!r} in the model's tokenizer but {other!r} in {new.name_or_path}: the new "
                "vocabulary must extend the model's own; pass one that merge_tokenizers.py made from this base"
            )


@torch.no_grad()
def initialise_rows(
    model: PreTrainedModel,
    old_tokenizer: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    first_new: int,
    seed: int,
) -> None:
    """Set the rows from `first_new` on of embed_tokens and (untied) lm_head. Raises: InputError as
    extend_vocabulary."""
    if method == "mean_of_pieces" and old_tokenizer is None:
        raise InputError(
            "--embedding_init mean_of_pieces needs the old tokenizer in the model's folder; copy it there or pass mean"
        )
    pieces: Sequence[Sequence[int]] = []
    if method == "mean_of_pieces" and old_tokenizer is not None:
        pieces = [
            segment_with(old_tokenizer, tokenizer, index) for index in range(first_new, vocabulary_end(tokenizer))
        ]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for weight in [embedding] if head is embedding else [embedding, head]:
        with gathered_weights([weight]):
            weight[first_new:] = _new_rows(weight, first_new, pieces, method, seed).to(weight)


def _new_rows(weight: Tensor, first_new: int, pieces: Sequence[Sequence[int]], method: str, seed: int) -> Tensor:
    """Rows (new, H) in float32 on the CPU; rows past the tokenizer (padding) get the mean."""
    old = weight[:first_new].float().cpu()
    count = weight.shape[0] - first_new
    mean = old.mean(0)
    if method == "zero":
        return torch.zeros(count, old.shape[1])
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return mean + old.std(0) * torch.randn(count, old.shape[1], generator=generator)
    rows = mean.repeat(count, 1)
    for index, ids in enumerate(pieces):
        if ids:
            rows[index] = old[list(ids)].mean(0)
    return rows


def find_tokenizer(name_or_path: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder, None if there is none. Raises: InputError if it is damaged."""
    if name_or_path is None:
        return None
    folder = local_folder(name_or_path)
    return load_tokenizer(folder) if has_tokenizer(folder) else None
