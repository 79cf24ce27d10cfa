"""Preference pairs and prompts for reward models, PPO and DPO: records -> messages -> token caches.

Encoded by utils.text.prompts alone, so what is trained here is what tuning trained and what inference writes.

Window and cuts. A pair whose prompt leaves no room for MIN_ANSWER tokens is dropped: without its end the model would
not know the question. A longer answer keeps its first tokens and is marked as truncated, without an end token (tuning
puts one there). An end token in mid-sentence would be a judgement nobody gave: DPO would raise the probability of
stopping there, and a reward model, which reads its score at the last token, would take broken-off answers for complete
ones, which PPO then finds. Without it, the tokens are scored exactly as a rollout that ran out of room is.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ..core.errors import InputError
from ..core.files import hash_file, hash_json
from ..core.records import BadText, iter_records
from ..core.workers import ordered_map
from ..text.conversations import Preference, read_preference, split_prompt
from ..text.prompts import IGNORE_INDEX, Message, encode_conversation, encode_prompt
from .cache import (
    FORMAT,
    CacheWriter,
    OnBadText,
    TokenCache,
    check_sources,
    choose_workers,
    describe_sources,
    hash_files,
    open_or_build,
    token_dtype,
)
from .samples import PARALLEL_BYTES, RECORDS_PER_UNIT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Why records are left out.
DROPS = {
    "empty_prompt": "with an empty question",
    "empty_answer": "with an empty answer",
    "long_prompt": "with a prompt that fills the window",
    "identical": "whose two answers have the same tokens within the window",
}


class PromptCache(TokenCache):
    """Encoded prompts, memory-mapped; a data set whose items are (T,) int64 arrays. See TokenCache.

    Attributes:
        document_hashes: a checksum of each prompt, so that documents.split_documents holds equal ones out together.
        sources: (n,) uint16, the number of each row's source in `source_names`.
        counters: records, a count for each reason in DROPS, answers_removed.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.sources = self._map("sources")
        self.source_names: list[str] = self.meta["source_names"]
        self.counters: dict[str, int] = self.meta["counters"]

    def __len__(self) -> int:
        return self.num_documents

    def _row(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = self.document_ends[index - 1] if index else 0
        return self.tokens[start : self.document_ends[index]].astype(np.int64)

    def __getitem__(self, index: int) -> Any:
        return self._row(index)

    def statistics(self) -> dict[str, Any]:
        """Counts, by source and by reason of being dropped, and the distribution of lengths in tokens."""
        lengths = np.diff(self.document_ends, prepend=0)
        return {**self._counts(), "answers_removed": self.counters["answers_removed"], "prompt": _spread(lengths)}

    def _counts(self) -> dict[str, Any]:
        counts = np.bincount(self.sources, minlength=len(self.source_names)).tolist()
        return {
            "records": self.counters["records"],
            "kept": len(self),
            "dropped": {reason: self.counters[reason] for reason in DROPS},
            "skipped_bad_text": self.skipped,
            "sources": dict(zip(self.source_names, counts, strict=True)),
        }


class Pair(NamedTuple):
    """One encoded pair.

    Attributes:
        prompt, chosen, rejected: (T,) int64 each.
        truncated: whether chosen and rejected were cut and have no end token.
        margin: None if the record gave none.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    truncated: tuple[bool, bool]
    margin: float | None
    source: str


class PairCache(PromptCache):
    """Encoded pairs, memory-mapped; a data set whose items are Pairs. See PromptCache; a document is a whole pair.

    Attributes:
        lengths: (n, 3) int32, tokens of prompt, chosen and rejected.
        truncated: (n, 2) bool, chosen and rejected.
        margins: (n,) float32, NaN where none was given.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.lengths = self._map("lengths").reshape(-1, 3)
        self.truncated = self._map("truncated").reshape(-1, 2)
        self.margins = self._map("margins")

    def __getitem__(self, index: int) -> Pair:
        ids = self._row(index)
        start, length, _ = self.lengths[index].tolist()
        chosen_cut, rejected_cut = self.truncated[index].tolist()
        margin = float(self.margins[index])
        return Pair(
            prompt=ids[:start],
            chosen=ids[start : start + length],
            rejected=ids[start + length :],
            truncated=(chosen_cut, rejected_cut),
            margin=None if math.isnan(margin) else margin,
            source=self.source_names[self.sources[index]],
        )

    def statistics(self) -> dict[str, Any]:
        """Counts, distributions of lengths, and length bias: the share of pairs whose chosen answer is the longer one.

        A reward model that only counts tokens is right on that share (of the pairs that differ in length); half is no
        bias. Lengths are those after cutting.
        """
        lengths: np.ndarray = self.lengths.astype(np.int64)
        prompt, chosen, rejected = lengths[:, 0], lengths[:, 1], lengths[:, 2]
        longer = chosen > rejected
        of_source = {name: longer[self.sources == number] for number, name in enumerate(self.source_names)}
        return {
            **self._counts(),
            "truncated": dict(zip(("chosen", "rejected"), self.truncated.sum(axis=0).tolist(), strict=True)),
            "prompt": _spread(prompt),
            "chosen": _spread(chosen),
            "rejected": _spread(rejected),
            "chosen_longer": float(longer.mean()),
            "same_length": float((chosen == rejected).mean()),
            "mean_length_difference": float((chosen - rejected).mean()),
            "chosen_longer_by_source": {name: float(rows.mean()) for name, rows in of_source.items()},
        }


def _spread(lengths: np.ndarray) -> dict[str, float]:
    names = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}
    values = np.percentile(lengths, list(names.values())).tolist()
    return {**dict(zip(names, values, strict=True)), "mean": float(lengths.mean())}


def group_by_length(lengths: np.ndarray, batch_size: int, seed: int, batches_per_group: int = 50) -> list[np.ndarray]:
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
    size = batch_size * batches_per_group
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    groups = [group[np.argsort(-np.asarray(lengths)[group], kind="stable")] for group in groups]
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    batches = [batches[number] for number in generator.permutation(len(batches))]
    longest = max(range(len(batches)), key=lambda number: int(lengths[batches[number]].max()), default=0)
    return batches[longest : longest + 1] + batches[:longest] + batches[longest + 1 :]


logger = logging.getLogger(__name__)

MIN_ANSWER = 2  # tokens an answer needs: one of text and its end


# ---------------------------------------------------------------- messages -> ids


def encode_answers(
    messages: Sequence[Message], answers: Sequence[str], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, as encode_prompt's, and of each answer up to and with its end token.

    Prompt and answer together are encode_conversation's, less what a template writes after the end token.
    Raises: InputError if the template writes the prompt of a whole conversation in another way.
    """
    prompt = encode_prompt(messages, template, tokenizer)
    encoded = []
    for answer in answers:
        conversation = [*messages, {"role": "assistant", "content": answer}]
        ids, labels = encode_conversation(conversation, template, tokenizer)
        end = max((place for place, label in enumerate(labels, 1) if label != IGNORE_INDEX), default=0)
        if ids[: len(prompt)] != prompt or end <= len(prompt):
            raise InputError(
                "the chat template writes a prompt in one way before an answer and in another way for generation, so "
                "rollouts and training would differ; pass another --prompt_template"
            )
        encoded.append(ids[len(prompt) : end])
    return prompt, encoded


@dataclass(frozen=True)
class _Encoder:
    """What a worker needs; travels to it once."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_length: int
    dtype: str


class _Record(NamedTuple):
    location: str
    source: str  # the file's name, for records that give none
    fields: dict[str, Any]


@dataclass
class _Rows:
    """What some records became; one entry of each list a row."""

    ids: list[list[int]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)  # checksum of each prompt
    sources: list[str] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)

    def add(self, ids: list[int], prompt: np.ndarray, source: str, **extra: Any) -> None:
        self.ids.append(ids)
        self.prompts.append(zlib.crc32(prompt.tobytes()))
        self.sources.append(source)
        for name, value in extra.items():
            self.extra.setdefault(name, []).append(value)


@contextlib.contextmanager
def _located(location: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{location}: {error}") from None


def _encode_preferences(encoder: _Encoder, records: list[_Record]) -> _Rows:
    rows = _Rows()
    for record in records:
        rows.counters["records"] += 1
        preference = read_preference(record.fields, record.location)
        with _located(record.location):
            encoded = _encode_pair(preference, encoder)
        if isinstance(encoded, str):
            rows.counters[encoded] += 1
            continue
        prompt, answers = encoded
        room = encoder.max_length - len(prompt)
        truncated = [len(answer) > room for answer in answers]
        chosen, rejected = (answer[:room] for answer in answers)
        if chosen == rejected:
            rows.counters["identical"] += 1
            continue
        rows.counters["truncated_chosen"] += truncated[0]
        rows.counters["truncated_rejected"] += truncated[1]
        rows.add(
            [*prompt, *chosen, *rejected],
            np.array(prompt, dtype=encoder.dtype),
            preference.source or record.source,
            lengths=[len(prompt), len(chosen), len(rejected)],
            truncated=truncated,
            margins=np.nan if preference.margin is None else preference.margin,
        )
    return rows


def _encode_pair(preference: Preference, encoder: _Encoder) -> tuple[list[int], list[list[int]]] | str:
    """The ids of the prompt and of both answers, uncut; or why the pair is dropped."""
    if not preference.messages[-1]["content"].strip():
        return "empty_prompt"
    if not (preference.chosen.strip() and preference.rejected.strip()):
        return "empty_answer"
    texts = (preference.chosen, preference.rejected)
    prompt, answers = encode_answers(preference.messages, texts, encoder.template, encoder.tokenizer)
    return "long_prompt" if len(prompt) + MIN_ANSWER > encoder.max_length else (prompt, answers)


def _encode_prompts(encoder: _Encoder, records: list[_Record]) -> _Rows:
    rows = _Rows()
    for record in records:
        rows.counters["records"] += 1
        messages, answered = split_prompt(record.fields, record.location)
        rows.counters["answers_removed"] += answered
        if not messages[-1]["content"].strip():
            rows.counters["empty_prompt"] += 1
            continue
        with _located(record.location):
            ids = encode_prompt(messages, encoder.template, encoder.tokenizer)
        if len(ids) > encoder.max_length:
            rows.counters["long_prompt"] += 1
            continue
        source = record.fields.get("source")
        source = source if isinstance(source, str) and source else record.source
        rows.add(ids, np.array(ids, dtype=encoder.dtype), source)
    return rows


# ---------------------------------------------------------------- caches


def load_preferences(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_seq_length: int,
    cache_dir: str | Path,
    *,
    on_bad_text: OnBadText = "error",
    num_workers: int | None = None,
    max_samples: int | None = None,
    max_dropped_share: float = 0.1,
) -> PairCache:
    """Tokenise pairs (json, jsonl, parquet) into a PairCache below `cache_dir`, or open the one there.

    Args:
        template: the jinja text of the chat template, see prompts.resolve_template.
        max_seq_length: tokens of a prompt and one answer; the module's head says what happens to longer ones.
        max_samples: read only this many records.
        max_dropped_share: warn if a larger share of the records is dropped.
    Raises: InputError for a broken or unknown record (file:line), bad text unless skipped, or if no pair is left.
    """
    if max_seq_length <= MIN_ANSWER:
        raise InputError(f"--max_seq_length {max_seq_length}: need at least {MIN_ANSWER + 1} tokens")
    settings = (tokenizer, template, max_seq_length, Path(cache_dir), on_bad_text, num_workers, max_samples)
    return _load(PairCache, _encode_preferences, files, *settings, max_dropped_share)


def load_prompts(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_prompt_length: int,
    cache_dir: str | Path,
    *,
    on_bad_text: OnBadText = "error",
    num_workers: int | None = None,
    max_samples: int | None = None,
    max_dropped_share: float = 0.1,
) -> PromptCache:
    """Tokenise prompts into a PromptCache, as load_preferences does pairs; a prompt that is too long is dropped."""
    if max_prompt_length < 1:
        raise InputError(f"--max_prompt_length {max_prompt_length}: need at least 1 token")
    settings = (tokenizer, template, max_prompt_length, Path(cache_dir), on_bad_text, num_workers, max_samples)
    return _load(PromptCache, _encode_prompts, files, *settings, max_dropped_share)


File = TypeVar("File", bound=PromptCache)


def _load(
    kind: type[File],
    encode: Callable[[_Encoder, list[_Record]], _Rows],
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    cache_dir: Path,
    on_bad_text: OnBadText,
    num_workers: int | None,
    max_samples: int | None,
    max_dropped_share: float,
) -> File:
    from ..text import prompts
    from ..text.tokenizer import tokenizer_fingerprint

    paths = [Path(file) for file in files]
    hashes = hash_files(paths, cache_dir)
    # The rules are code: a changed rule must not meet an old cache. A file's name is the source of its records.
    rules = [hash_file(prompts.__file__), hash_file(__file__), [path.stem for path in paths]]
    settings = [FORMAT, rules, template, max_length, on_bad_text, max_samples]
    key = hash_json([kind.__name__, hashes, tokenizer_fingerprint(tokenizer), settings])
    encoder = _Encoder(tokenizer, template, max_length, token_dtype(tokenizer))

    def build(folder: Path) -> None:
        bad_text = BadText(on_bad_text)
        workers = choose_workers(num_workers, sum(path.stat().st_size for path in paths), PARALLEL_BYTES)
        counters: Counter[str] = Counter(dict.fromkeys([*DROPS, *_OTHER_COUNTS], 0))
        names: dict[str, int] = {}
        units = _record_units(paths, bad_text, max_samples)
        with (
            CacheWriter(folder) as writer,
            contextlib.closing(ordered_map(encode, encoder, units, workers)) as results,
        ):
            for rows in results:
                counters.update(rows.counters)
                if rows.ids:
                    writer.add(_to_arrays(rows, names, encoder.dtype))
            if counters["records"] and not writer.num_tokens:
                raise InputError(
                    f"{describe_sources(paths)}: nothing is left of {counters['records']} records: "
                    f"{_describe_drops(counters)}; the window is {max_length} tokens"
                )
            check_sources(paths, hashes, cache_dir, writer.num_tokens, bad_text)
            meta = {"counters": dict(counters), "source_names": list(names)}
            writer.finish(key, paths, skipped=bad_text.skipped, **meta)

    file = open_or_build(kind, cache_dir / f"{kind.__name__.lower()}-{key[:20]}", build)
    _log_counters(file, describe_sources(paths), max_dropped_share)
    return file


_OTHER_COUNTS = ("records", "answers_removed", "truncated_chosen", "truncated_rejected")


def _record_units(files: Sequence[Path], bad_text: BadText, max_samples: int | None) -> Iterator[list[_Record]]:
    every = (_Record(place, path.stem, record) for path in files for place, record in iter_records(path, bad_text))
    records = itertools.islice(every, max_samples)
    while unit := list(itertools.islice(records, RECORDS_PER_UNIT)):
        yield unit


def _to_arrays(rows: _Rows, names: dict[str, int], dtype: str) -> dict[str, np.ndarray]:
    """The arrays of a cache; `names` numbers the sources and grows."""
    numbers = [names.setdefault(source, len(names)) for source in rows.sources]
    if len(names) > 1 << 16:
        raise InputError(f"more than {1 << 16} different values in the field 'source'; name data sets there, not rows")
    types = {"lengths": np.int32, "truncated": np.bool_, "margins": np.float32}
    return {
        "tokens": np.array([index for ids in rows.ids for index in ids], dtype=dtype),
        "document_ends": np.cumsum([len(ids) for ids in rows.ids], dtype=np.int64),
        "document_hashes": np.array(rows.prompts, dtype=np.uint32),
        "sources": np.array(numbers, dtype=np.uint16),
        **{name: np.array(values, dtype=types[name]).reshape(-1) for name, values in rows.extra.items()},
    }


def _describe_drops(counters: dict[str, int]) -> str:
    parts = [f"{counters[reason]} {words}" for reason, words in DROPS.items() if counters[reason]]
    return ", ".join(parts)


def _log_counters(file: PromptCache, name: str, max_dropped_share: float) -> None:
    counters = file.counters
    records = counters["records"]
    dropped = sum(counters[reason] for reason in DROPS)
    if dropped:
        level = logging.WARNING if dropped > max_dropped_share * records else logging.INFO
        logger.log(level, "%s: %d of %d records dropped: %s", name, dropped, records, _describe_drops(counters))
    cut = counters["truncated_chosen"], counters["truncated_rejected"]
    if any(cut):
        logger.warning("%s: cut at the right, no end token: %d chosen and %d rejected of %d", name, *cut, len(file))
    if counters["answers_removed"]:
        logger.info("%s: the answer at the end of %d prompts is left out", name, counters["answers_removed"])
