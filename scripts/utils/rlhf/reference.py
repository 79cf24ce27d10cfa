"""The reference of preference training: when it is the policy without its adapter, and its log-probabilities on disk.

A table holds, for every pair of a PairCache, the summed log-probabilities that the reference gives the two
answers. It is computed before the policy is loaded, so that two models are never in memory together.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.arguments import ExtendArguments, LoraArguments, ModelArguments
from ..core.command_line import shell_command
from ..core.errors import InputError
from ..core.files import atomic_file, hash_json
from ..core.hub import find_folder
from ..data.batches import Example, PairCollator, model_inputs, sum_by_answer
from ..data.cache import cache_lock, hash_files
from ..data.preferences import PairCache
from ..models.experts import counted_by_router
from ..models.gathering import whole_models_loaded
from ..models.lm_loss import loss_targets
from ..models.new_rows import check_extends, find_tokenizer, refuse_untrained_rows
from ..models.training_model import build_training_model
from ..text.prompts import IGNORE_INDEX
from ..weights.config import load_config
from ..weights.model_folder import read_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..training.arguments import RunArguments

logger = logging.getLogger(__name__)

FORMAT = 1  # of the tables; part of their keys


# ---------------------------------------------------------------- which model is the reference


def check_reference(lora_args: LoraArguments, reference_model: str | None, need: str) -> None:
    """Refuse "the policy without its adapter" as the reference where that is not the model the policy starts from.

    Args: need: what asks for a reference, for the message, such as "--loss sigmoid".
    Raises: InputError.
    """
    adapter = lora_args.adapter_name_or_path
    if adapter and not reference_model:
        raise InputError(
            f"--adapter_name_or_path {adapter}: {need} keeps the policy near a reference, the model without its "
            "adapter, and without this one it is not the tuned model; merge the adapter first "
            f"({shell_command('bash', 'scripts/run_merge.sh', MODEL='BASE', LORA=adapter, OUT=f'{adapter}-merged')}) "
            f"and pass --model_name_or_path {adapter}-merged, or name the merged model as --reference_model"
        )


def check_reference_model(folder: str, tokenizer: PreTrainedTokenizerBase, flag: str = "--reference_model") -> None:
    """Raises: InputError unless a model reads the tokens of a policy with this tokenizer; `flag` names it."""
    config = read_model(folder).config
    own = find_tokenizer(folder)
    try:
        if own is not None:
            check_extends(tokenizer, own)
        refuse_untrained_rows(tokenizer, config.vocab_size)
    except InputError as error:
        raise InputError(
            f"{flag} {folder} has another vocabulary than the policy, so it cannot judge the same tokens; "
            f"pass a model with the policy's tokenizer ({error})"
        ) from None


# ---------------------------------------------------------------- log-probabilities of answers


def answer_logprobs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Summed log-probabilities (2 P,) of a PairCollator's batch, chosen and rejected by turns, and the model's output.

    Needs the model's LossHead.
    """
    with loss_targets(model, batch["shift_labels"], "tokens"), counted_by_router(model, batch["answer"] >= 0):
        outputs = model(**model_inputs(batch), use_cache=False)
    return sum_by_answer(-outputs.logits.float(), batch["answer"], len(batch["last"])), outputs


def answer_lengths(batch: dict[str, Tensor]) -> Tensor:
    """Tokens of each answer, (2 P,) float32."""
    scored = (batch["shift_labels"] != IGNORE_INDEX).float()
    return sum_by_answer(scored, batch["answer"], len(batch["last"]))


# ---------------------------------------------------------------- tables


def reference_key(
    model_args: ModelArguments, lora_args: LoraArguments, training_args: RunArguments, cache_dir: Path
) -> str:
    """A hash of the weights and of the arithmetic the reference runs in.

    Args: model_args: of the reference, whose model_name_or_path it is.
    """
    name = str(model_args.model_name_or_path)
    if folder := find_folder(name):
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin")]
        with training_args.main_process_first(local=False, desc="hashing the reference"):
            weights: Any = hash_files([folder / "config.json", *files], cache_dir)
    else:
        weights = [name, getattr(load_config(name), "_commit_hash", None)]
    arithmetic = [training_args.precision, model_args.dtype, model_args.load_in_kbits, lora_args.full_finetuning]
    return hash_json([FORMAT, weights, arithmetic, [model_args.quant_type, model_args.double_quant]])


def load_reference_tables(
    key: str,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    training_args: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    collator: PairCollator,
    files: Sequence[PairCache],
) -> list[np.ndarray]:
    """A table (n, 2) float32 for each file, from the cache beside it, or computed by all processes together.

    Args: key: from reference_key; model_args: of the reference.
    """
    paths = [file.folder.parent / f"reference-{hash_json([key, file.key])[:20]}.npy" for file in files]
    tables = [_read_table(path, len(file)) for path, file in zip(paths, files, strict=True)]
    # One process's view of the cache may be older than another's.
    absent = sorted({place for part in _from_all([i for i, t in enumerate(tables) if t is None]) for place in part})
    if not absent:
        logger.info("using the reference's log-probabilities in %s", ", ".join(map(str, paths)))
    else:
        # Nothing drawn here may change what is drawn later: with the table in the cache, nothing is drawn here.
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with whole_models_loaded(training_args), torch.random.fork_rng(devices):
            model: Any = build_training_model(
                model_args, ExtendArguments(), lora_args, tokenizer, training_args.compute_dtype, training_args.seed
            )
        if model_args.load_in_kbits == 16:
            model.to(training_args.device)
        for place in absent:
            table = tables[place] = _compute_table(model.eval(), files[place], training_args, collator)
            if training_args.should_save:
                with cache_lock(paths[place]), atomic_file(paths[place], "wb") as stream:
                    np.save(stream, table, allow_pickle=False)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [table for table in tables if table is not None]


def _read_table(path: Path, rows: int) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        table: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        table = np.zeros(0)
    if table.shape == (rows, 2) and table.dtype == np.float32 and bool(np.isfinite(table).all()):
        return table
    logger.warning("%s is damaged; it is computed again", path)
    return None


@torch.no_grad()
def _compute_table(
    model: nn.Module, file: PairCache, training_args: RunArguments, collator: PairCollator
) -> np.ndarray:
    from tqdm import tqdm

    table: np.ndarray = np.zeros((len(file), 2), dtype=np.float32)
    size, device = training_args.per_device_eval_batch_size, training_args.device
    longest_first = np.argsort(-file.lengths.astype(np.int64).sum(1), kind="stable")
    mine = longest_first[training_args.process_index :: training_args.world_size]
    started = time.perf_counter()
    with tqdm(total=len(mine), unit="pair", desc="reference", disable=training_args.disable_tqdm) as bar:
        for start in range(0, len(mine), size):
            numbers = mine[start : start + size]
            batch = collator([Example(int(number), file[int(number)]) for number in numbers])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            dtype = training_args.compute_dtype
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logprobs = answer_logprobs(model, batch)[0]
            table[numbers] = logprobs.view(-1, 2).cpu().numpy()
            bar.update(len(numbers))
    # Every row is one process's work and zero elsewhere.
    table = np.sum(_from_all(table), axis=0, dtype=np.float32)
    seconds = time.perf_counter() - started
    logger.info("reference: %d pairs in %.1f s, %.1f a second", len(file), seconds, len(file) / max(seconds, 1e-9))
    if not np.isfinite(table).all():
        raise InputError(
            "the reference's log-probabilities are not all finite; pass --precision bf16 or fp32, or another reference"
        )
    return table


def _from_all(value: Any) -> list[Any]:
    """The value of every process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
