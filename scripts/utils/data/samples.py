"""Samples for instruction tuning: conversations tokenised once, with what is trained marked, into token caches."""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..core.errors import InputError
from .cache import CacheSettings, Part, Record, RecordEncoder, TokenCache, build_cache, describe_files, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class SampleCache(TokenCache):
    """Tokenised conversations, each a document; see TokenCache.

    Attributes:
        trained: (num_tokens,) bool, where the label is the token itself and not IGNORE_INDEX.
        counters: samples, truncated, dropped_no_label, skipped_bad_text, tokens, label_tokens.
    """

    KIND = "samples"
    RULES = 2

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.trained = self._map("trained")
        self.counters["skipped_bad_text"] = self.skipped

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

    A sample longer than max_seq_length loses its right end; if the cut falls within an answer, the answer's end token
    takes the last place. A sample that then trains nothing is dropped. Both are counted.

    Args:
        template: the jinja text of the chat template, see prompts.resolve_template.
        max_samples: read only this many records.
    Raises: as build_cache, and InputError if no label is left.
    """
    if max_seq_length < 2:
        raise InputError(f"--max_seq_length {max_seq_length}: need at least 2 tokens")
    from ..text.prompts import warn_without_end

    warn_without_end(template, tokenizer)
    encoder = _ConversationEncoder(tokenizer, template, max_seq_length, max_samples)
    return build_cache(SampleCache, encoder, files, tokenizer, settings)


class _ConversationEncoder(RecordEncoder):
    """Records -> samples with what is trained marked."""

    counted: ClassVar[tuple[str, ...]] = ("samples", "truncated", "dropped_no_label", "tokens", "label_tokens")

    def encode(self, unit: list[Record]) -> Part:
        from ..text.conversations import read_conversation
        from ..text.prompts import IGNORE_INDEX, encode_conversation, stop_token_ids

        tokens: list[int] = []
        trained: list[bool] = []
        ends: list[int] = []
        truncated = dropped = 0
        stops = stop_token_ids(self.template, self.tokenizer)
        for record in unit:
            messages = read_conversation(record.fields, record.location)
            ids, labels = encode_conversation(messages, self.template, self.tokenizer)
            flags = [label != IGNORE_INDEX for label in labels]
            if len(ids) > self.max_length:
                truncated += 1
                ids, flags = truncate_sample(ids, flags, self.max_length, stops)
            flags[0] = False  # nothing predicts the first token
            if not any(flags):
                dropped += 1
                continue
            tokens += ids
            trained += flags
            ends.append(len(tokens))
        counts = (len(ends), truncated, dropped, len(tokens), sum(trained))
        counters = dict(zip(self.counted, counts, strict=True))
        if not ends:
            return Part(len(unit), counters=counters)
        ids_array = np.array(tokens, dtype=token_dtype(self.tokenizer))
        bounds = zip([0, *ends[:-1]], ends, strict=True)
        hashes = [zlib.crc32(ids_array[start:end].tobytes()) for start, end in bounds]
        arrays = {
            "tokens": ids_array,
            "trained": np.array(trained, dtype=bool),
            "document_ends": np.array(ends, dtype=np.int64),
            "document_hashes": np.array(hashes, dtype=np.uint32),
        }
        return Part(len(unit), [arrays], counters)

    def check(self, counters: Counter[str], files: Sequence[Path]) -> None:
        truncated, dropped = counters["truncated"], counters["dropped_no_label"]
        num_records = counters["samples"] + dropped
        if num_records and dropped == num_records:
            raise InputError(
                f"{describe_files(files)}: all labels are masked: of {num_records} samples {truncated} were longer "
                f"than --max_seq_length {self.max_length} and {dropped} have no answer left to learn from; raise "
                "--max_seq_length, or check that the answers are not empty"
            )
        if truncated:
            logger.warning(
                "%d of %d samples are longer than max_seq_length %d: cut at the right, end token kept",
                truncated,
                num_records,
                self.max_length,
            )
        if dropped:
            logger.warning("%d of %d samples dropped: no answer token is left in them", dropped, num_records)


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
