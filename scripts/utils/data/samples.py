"""Samples for instruction tuning: conversations tokenised once, with what is trained marked, into token caches."""

from __future__ import annotations

import contextlib
import itertools
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import InputError
from ..core.files import hash_file, hash_json
from ..core.records import BadText, iter_records
from ..core.workers import ordered_map
from .cache import (
    FORMAT,
    Arrays,
    CacheWriter,
    OnBadText,
    SampleCache,
    check_sources,
    choose_workers,
    describe_sources,
    hash_files,
    open_or_build,
    token_dtype,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PARALLEL_BYTES = 8 << 20  # of input from which on worker processes save more than their start costs
RECORDS_PER_UNIT = 500


@dataclass(frozen=True)
class _ConversationEncoder:
    """What a worker needs to turn records into samples; travels to it once."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_seq_length: int
    dtype: str


@dataclass(frozen=True)
class _Samples:
    """The samples of some records; no arrays if none was left."""

    num_records: int
    arrays: list[Arrays]
    counters: dict[str, int]


def load_sft_samples(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_seq_length: int,
    cache_dir: str | Path,
    *,
    on_bad_text: OnBadText = "error",
    num_workers: int | None = None,
    max_samples: int | None = None,
) -> SampleCache:
    """Tokenise conversations (json, jsonl, parquet) into a SampleCache below `cache_dir`, or open the one there.

    A sample longer than max_seq_length loses its right end; if the cut falls within an answer, the answer's end token
    takes the last place. A sample that then trains nothing is dropped. Both are counted.

    Args:
        template: the jinja text of the chat template, see prompts.resolve_template.
        max_samples: read only this many records.
    Raises: InputError for a broken or unknown record (file:line), bad text unless skipped, or if no label is left.
    """
    from tqdm import tqdm

    from ..text import prompts
    from ..text.tokenizer import tokenizer_fingerprint

    if max_seq_length < 2:
        raise InputError(f"--max_seq_length {max_seq_length}: need at least 2 tokens")
    paths, cache_dir = [Path(file) for file in files], Path(cache_dir)
    hashes = hash_files(paths, cache_dir)
    # The rules that turn records into labels are code; a changed rule must not meet an old cache.
    rules = hash_file(prompts.__file__)
    settings = [FORMAT, rules, template, max_seq_length, on_bad_text, max_samples]
    key = hash_json(["samples", hashes, tokenizer_fingerprint(tokenizer), settings])

    def build(folder: Path) -> None:
        bad_text = BadText(on_bad_text)
        encoder = _ConversationEncoder(tokenizer, template, max_seq_length, token_dtype(tokenizer))
        total_bytes = sum(path.stat().st_size for path in paths)
        num_processes = choose_workers(num_workers, total_bytes, PARALLEL_BYTES)
        units = _record_units(paths, bad_text, max_samples)
        counters = dict.fromkeys(("samples", "truncated", "dropped_no_label", "tokens", "label_tokens"), 0)
        num_records = 0
        with (
            CacheWriter(folder) as writer,
            contextlib.closing(ordered_map(_encode_records, encoder, units, num_processes)) as results,
            tqdm(unit=" samples", desc="tokenizing") as bar,
        ):
            for result in results:
                for arrays in result.arrays:
                    writer.add(arrays)
                for name, count in result.counters.items():
                    counters[name] += count
                num_records += result.num_records
                bar.update(result.num_records)
            counters["skipped_bad_text"] = bad_text.skipped
            _check_counters(counters, num_records, paths, max_seq_length)
            check_sources(paths, hashes, cache_dir, writer.num_tokens, bad_text)
            writer.finish(key, paths, skipped=bad_text.skipped, counters=counters)

    return open_or_build(SampleCache, cache_dir / f"samples-{key[:20]}", build)


def _record_units(
    files: Sequence[Path], bad_text: BadText, max_samples: int | None
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    every = itertools.chain.from_iterable(iter_records(path, bad_text) for path in files)
    records = itertools.islice(every, max_samples)
    while unit := list(itertools.islice(records, RECORDS_PER_UNIT)):
        yield unit


def _encode_records(encoder: _ConversationEncoder, records: list[tuple[str, dict[str, Any]]]) -> _Samples:
    from ..text.conversations import read_conversation
    from ..text.prompts import IGNORE_INDEX, encode_conversation

    tokens: list[int] = []
    trained: list[bool] = []
    ends: list[int] = []
    truncated = dropped = 0
    for location, record in records:
        messages = read_conversation(record, location)
        ids, labels = encode_conversation(messages, encoder.template, encoder.tokenizer)
        flags = [label != IGNORE_INDEX for label in labels]
        if len(ids) > encoder.max_seq_length:
            truncated += 1
            ids, flags = truncate_sample(ids, flags, encoder.max_seq_length)
        flags[0] = False  # nothing predicts the first token
        if not any(flags):
            dropped += 1
            continue
        tokens += ids
        trained += flags
        ends.append(len(tokens))
    counters = {
        "samples": len(ends),
        "truncated": truncated,
        "dropped_no_label": dropped,
        "tokens": len(tokens),
        "label_tokens": sum(trained),
    }
    if not ends:
        return _Samples(len(records), [], counters)
    ids_array = np.array(tokens, dtype=encoder.dtype)
    bounds = zip([0, *ends[:-1]], ends, strict=True)
    hashes = [zlib.crc32(ids_array[start:end].tobytes()) for start, end in bounds]
    arrays = {
        "tokens": ids_array,
        "trained": np.array(trained, dtype=bool),
        "document_ends": np.array(ends, dtype=np.int64),
        "document_hashes": np.array(hashes, dtype=np.uint32),
    }
    return _Samples(len(records), [arrays], counters)


def truncate_sample(ids: list[int], trained: list[bool], length: int) -> tuple[list[int], list[bool]]:
    """The first `length` tokens of a longer sample, the last one replaced by the end token of an answer that is cut.

    An answer of which nothing but that end would be left is no longer marked as trained.
    """
    kept, flags = ids[:length], trained[:length]
    if trained[length - 1] and trained[length]:
        answer_end = next((i for i in range(length, len(trained)) if not trained[i]), len(trained))
        if any(flags[:-1]):
            kept[-1] = ids[answer_end - 1]
        else:
            flags[-1] = False
    return kept, flags


def _check_counters(counters: dict[str, int], num_records: int, files: Sequence[Path], max_seq_length: int) -> None:
    """Log what truncation did. Raises: InputError if nothing can be learnt from what is left."""
    truncated, dropped = counters["truncated"], counters["dropped_no_label"]
    if num_records and dropped == num_records:
        raise InputError(
            f"{describe_sources(files)}: all labels are masked: of {num_records} samples {truncated} were longer than "
            f"--max_seq_length {max_seq_length} and {dropped} have no answer left to learn from; raise "
            "--max_seq_length, or check that the answers are not empty"
        )
    if truncated:
        logger.warning(
            "%d of %d samples are longer than max_seq_length %d: cut at the right, end token kept",
            truncated,
            num_records,
            max_seq_length,
        )
    if dropped:
        logger.warning("%d of %d samples dropped: no answer token is left in them", dropped, num_records)
