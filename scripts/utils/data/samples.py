"""Samples for instruction tuning: conversations tokenised once, with what is trained marked, into token caches."""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..core.errors import InputError
from ..core.records import BadRecords
from ..text.conversations import CHANGES, read_example
from ..text.prompts import IGNORE_INDEX, encode_conversation, stop_token_ids, warn_without_end
from .cache import (
    CacheSettings,
    Part,
    Record,
    RecordEncoder,
    TokenCache,
    build_cache,
    describe_counts,
    describe_files,
    located,
    token_dtype,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DROPS = {
    "dropped_no_answer": "have no answer but empty ones and are dropped",
    "dropped_no_label": "have no answer token left to learn from and are dropped",
}
CUTS = {"truncated": "are longer than --max_seq_length and cut at the right, end token kept"}


class SampleCache(TokenCache):
    """Tokenised conversations, each a document; see TokenCache.

    Attributes:
        trained: (num_tokens,) bool, where the label is the token itself and not IGNORE_INDEX.
        counters: samples, truncated, dropped_no_answer, dropped_no_label, skipped_bad_records, those of
            conversations.CHANGES, tokens, label_tokens.
    """

    KIND = "samples"
    RULES = 4

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.trained = self._map("trained")
        self.counters["skipped_bad_records"] = self.skipped

    @property
    def num_samples(self) -> int:
        return self.num_documents


def load_sft_samples(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_seq_length: int,
    settings: CacheSettings,
    *,
    max_samples: int | None = None,
) -> SampleCache:
    """Tokenise conversations (json, jsonl, parquet) into a SampleCache, or open the one that is there.

    A sample without an answer is dropped, see conversations.read_example. One longer than max_seq_length loses its
    right end; if the cut falls within an answer, the answer's end token takes the last place. A sample that then
    trains nothing is dropped. All are counted.

    Args:
        template: the jinja text of the chat template, see prompts.resolve_template.
        max_samples: read only this many records.
    Raises: as build_cache, and InputError if no label is left.
    """
    if max_seq_length < 2:
        raise InputError(f"--max_seq_length {max_seq_length}: need at least 2 tokens")
    warn_without_end(template, tokenizer)
    encoder = _ConversationEncoder(tokenizer, template, max_seq_length, max_samples, settings.on_bad_record)
    cache = build_cache(SampleCache, encoder, files, tokenizer, settings)
    _log_counters(cache, files)
    return cache


class _ConversationEncoder(RecordEncoder):
    """Records -> samples with what is trained marked."""

    counted: ClassVar[tuple[str, ...]] = (
        *("samples", "truncated", "dropped_no_answer", "dropped_no_label"),
        *CHANGES,
        *("tokens", "label_tokens"),
    )

    def encode(self, unit: list[Record]) -> Part:
        tokens: list[int] = []
        trained: list[bool] = []
        ends: list[int] = []
        counters = Counter(dict.fromkeys(self.counted, 0))
        stops = stop_token_ids(self.template, self.tokenizer)
        bad_records = BadRecords(self.on_bad_record)
        for record in unit:
            with bad_records.handled():
                example = read_example(record.fields, record.location)
                if not example.messages:
                    counters["dropped_no_answer"] += 1
                    continue
                with located(record.location):
                    ids, labels = encode_conversation(example.messages, self.template, self.tokenizer, example.tools)
                flags = [label != IGNORE_INDEX for label in labels]
                counters.update(example.changes)
                if len(ids) > self.max_length:
                    counters["truncated"] += 1
                    ids, flags = truncate_sample(ids, flags, self.max_length, stops)
                flags[0] = False  # nothing predicts the first token
                if not any(flags):
                    counters["dropped_no_label"] += 1
                    continue
                tokens += ids
                trained += flags
                ends.append(len(tokens))
        counters.update(samples=len(ends), tokens=len(tokens), label_tokens=sum(trained))
        part = Part(len(unit), [], dict(counters), bad_records.skipped, bad_records.problems)
        if not ends:
            return part
        ids_array = np.array(tokens, dtype=token_dtype(self.tokenizer))
        bounds = zip([0, *ends[:-1]], ends, strict=True)
        hashes = [zlib.crc32(ids_array[start:end].tobytes()) for start, end in bounds]
        arrays = {
            "tokens": ids_array,
            "trained": np.array(trained, dtype=bool),
            "document_ends": np.array(ends, dtype=np.int64),
            "document_hashes": np.array(hashes, dtype=np.uint32),
        }
        return replace(part, arrays=[arrays])

    def check(self, counters: Counter[str], files: Sequence[Path]) -> None:
        dropped = counters["dropped_no_answer"] + counters["dropped_no_label"]
        if dropped and not counters["samples"]:
            raise InputError(
                f"{describe_files(files)}: all labels are masked: of {dropped} samples {counters['truncated']} were "
                f"longer than --max_seq_length {self.max_length}, and {describe_counts(counters, DROPS)}; raise "
                "--max_seq_length, or check that the answers are not empty"
            )


def _log_counters(cache: SampleCache, files: Sequence[str | Path]) -> None:
    """Say, also of a cache that was there, what is not as the records have it."""
    counters = cache.counters
    total = sum(counters[name] for name in ("samples", *DROPS))
    if said := describe_counts(counters, {**DROPS, **CHANGES, **CUTS}):
        logger.warning("%s: of %d samples %s", describe_files(list(map(Path, files))), total, said)


def truncate_sample(
    ids: list[int], trained: list[bool], length: int, ends: Collection[int]
) -> tuple[list[int], list[bool]]:
    """The first `length` tokens of a longer sample, the last one replaced by the end token of an answer that is cut.

    An answer of which nothing but that end would be left is no longer marked as trained. One that ends in text, with
    none of the tokens `ends`, is cut only.
    """
    kept, flags = ids[:length], trained[:length]
    # The cut falls within an answer only if the tokens on both sides of it are trained.
    if trained[length - 1] and trained[length]:
        answer_end = next((i for i in range(length, len(trained)) if not trained[i]), len(trained))
        if not any(flags[:-1]):
            flags[-1] = False
        elif ids[answer_end - 1] in ends:
            kept[-1] = ids[answer_end - 1]
    return kept, flags
