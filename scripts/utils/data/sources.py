"""Sources: the arguments of a run -> the caches of its data, what is trained on and what is held out.

The data side of all training scripts: where caches are kept, which process builds them, which files belong together,
what --validation_split, --max_train_samples and --max_eval_samples mean, and how a run records its data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.records import RECORD_SUFFIXES, TEXT_SUFFIXES
from .batches import PairSet
from .cache import Cache, CacheSettings
from .corpora import parse_corpora, split_documents
from .preferences import PromptCache, load_preferences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from ..core.arguments import DataArguments

logger = logging.getLogger(__name__)

RECORD_FILES = "json, jsonl or parquet files or folders"


class Rows(NamedTuple, Generic[Cache]):
    """Some rows of a cache; ids: (n,) int64, ascending."""

    cache: Cache
    ids: np.ndarray


class Sources:
    """The data that a run's arguments name, tokenised once into the cache.

    Loaders are called with files alone, or with files and max_samples.

    Attributes:
        settings: what the loaders need to know of the arguments.
        keys: what identifies the data of the run: the keys of the caches by "train/zh", "validation/zh" and so on.
            Files that make one cache together have their names joined, "train/zh+en".
    """

    def __init__(
        self,
        data_args: DataArguments,
        training_args: TrainingArguments,
        needs: str = RECORD_FILES,
        max_dropped_share: float = 0.1,
    ) -> None:
        """Args: needs: what --train_data takes. Raises: InputError without --train_data."""
        if not data_args.train_data:
            raise InputError(f"pass --train_data: {needs}")
        self.data_args, self.training_args = data_args, training_args
        self.settings = CacheSettings(
            Path(data_args.data_cache_dir or Path(str(training_args.output_dir)).absolute().parent / ".token_cache"),
            data_args.on_bad_record,
            data_args.preprocessing_num_workers,
            max_dropped_share,
        )
        self.keys: dict[str, str] = {}

    def load_each(
        self,
        role: str,
        specs: Sequence[str],
        load: Callable[[Sequence[Path]], Cache],
        suffixes: tuple[str, ...] = TEXT_SUFFIXES,
    ) -> dict[str, Cache]:
        """A cache for each file or folder, by name; none without `specs`. Raises: InputError."""
        groups = parse_corpora(specs, suffixes) if specs else {}
        return {name: self._load(f"{role}/{name}", files, load) for name, files in groups.items()}

    def load_together(self, role: str, specs: Sequence[str], load: Callable[[Sequence[Path]], Cache]) -> Cache:
        """One cache of all these records. Raises: InputError."""
        groups = parse_corpora(specs, RECORD_SUFFIXES)
        files = [file for group in groups.values() for file in group]
        return self._load(f"{role}/{'+'.join(groups)}", files, load)

    def _load(self, key: str, files: Sequence[Path], load: Callable[[Sequence[Path]], Cache]) -> Cache:
        # The first process of all nodes builds the cache, the others then find it. The cache's lock alone would do on
        # one machine, but not on every network file system.
        with self.training_args.main_process_first(local=False, desc="tokenising"):
            cache = load(files)
        self.keys[key] = cache.key
        return cache

    def hold_out(self, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        """The ids to train on and those of --validation_split, which counts where there is no --validation_data."""
        share = 0.0 if self.data_args.validation_data else self.data_args.validation_split
        return split_documents(cache, share, self.training_args.seed)

    def load_records(self, load: Callable[..., Cache]) -> tuple[Rows[Cache], dict[str, Rows[Cache]]]:
        """What to train on, and what to evaluate on by name: that of --validation_data, or "heldout".

        --max_train_samples and --max_eval_samples limit the records that are read, and the rows that are held out.
        """
        args = self.data_args
        cache = self.load_together("train", args.train_data, partial(load, max_samples=args.max_train_samples))
        load_validation = partial(load, max_samples=args.max_eval_samples)
        groups = self.load_each("validation", args.validation_data, load_validation, RECORD_SUFFIXES)
        train_ids, held_out_ids = self.hold_out(cache)
        validation = {name: Rows(group, np.arange(group.num_documents)) for name, group in groups.items()}
        if len(held_out_ids):
            validation["heldout"] = Rows(cache, held_out_ids[: args.max_eval_samples])
        return Rows(cache, train_ids), validation


def load_pair_sets(
    data_args: DataArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_seq_length: int,
) -> tuple[PairSet, dict[str, PairSet], dict[str, str]]:
    """The pairs to train on, those to evaluate on by name, and Sources.keys. Raises: InputError."""
    sources = Sources(data_args, training_args, f"{RECORD_FILES} of preference pairs")
    load = partial(
        load_preferences,
        tokenizer=tokenizer,
        template=template,
        max_seq_length=max_seq_length,
        settings=sources.settings,
    )
    train, validation = sources.load_records(load)
    log_statistics("preference pairs", train.cache)
    first = train.cache[0]
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in (first.prompt, first.chosen, first.rejected)]
    logger.info("first pair\n  prompt   %s\n  chosen   %s\n  rejected %s", *texts)
    return PairSet(*train), {name: PairSet(*rows) for name, rows in validation.items()}, sources.keys


def log_statistics(what: str, cache: PromptCache) -> None:
    logger.info("%s: %s", what, json.dumps(cache.statistics(), ensure_ascii=False))
