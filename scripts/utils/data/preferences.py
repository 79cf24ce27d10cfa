"""Preference pairs and prompts for reward models, PPO and DPO: records -> messages -> token caches.

Encoded by utils.text.prompts alone, so what is trained here is what tuning trained and what inference writes.

Window and cuts. A pair whose prompt leaves no room for MIN_ANSWER tokens is dropped: without its end the model would
not know the question. A longer answer keeps its first tokens and is marked as truncated, without an end token (tuning
puts one there). An end token in mid-sentence would be a judgement nobody gave: DPO would raise the probability of
stopping there, and a reward model, which reads its score at the last token, would take broken-off answers for complete
ones, which PPO then finds. Without it, the tokens are scored exactly as a rollout that ran out of room is.
"""

from __future__ import annotations

import logging
import math
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.records import BadRecords
from ..text.conversations import CHANGES, Preference, is_empty, read_preference, read_prompt
from ..text.prompts import IGNORE_INDEX, Message, encode_conversation, encode_prompt, warn_without_end
from .cache import (
    Arrays,
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

MIN_ANSWER = 2  # tokens an answer needs: one of text and its end
# Why records are left out.
DROPS = {
    "empty_prompt": "with an empty question",
    "empty_answer": "with an empty answer",
    "long_prompt": "with a prompt that fills the window",
    "identical": "whose two answers have the same tokens within the window",
}
CHANGED = {name: CHANGES[name] for name in ("joined_turns", "dropped_openings")}  # the others are about training


class PromptCache(TokenCache):
    """Encoded prompts, memory-mapped; a data set whose items are (T,) int64 arrays. See TokenCache.

    Attributes:
        document_hashes: a checksum of each prompt, so that corpora.split_documents holds equal ones out together.
        sources: (n,) uint16, the number of each row's source in `source_names`.
        counters: records, a count for each reason in DROPS and CHANGED, answers_removed.
    """

    KIND = "prompts"
    RULES = 4

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.sources = self._map("sources")
        self.source_names: list[str] = self.meta["names"]["sources"]

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
            "changed": {name: self.counters[name] for name in CHANGED},
            "skipped_bad_records": self.skipped,
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

    KIND = "pairs"
    RULES = 4

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


# ---------------------------------------------------------------- messages -> ids


def encode_answers(
    messages: Sequence[Message],
    answers: Sequence[str | Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[dict[str, Any]] | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, as encode_prompt's, and of each answer up to and with its end token.

    Prompt and answer together are encode_conversation's, less what a template writes after the end token.
    Args: answers: texts, or messages of the assistant, which may call functions.
    Raises: InputError if the template writes the prompt of a whole conversation in another way.
    """
    prompt = encode_prompt(messages, template, tokenizer, tools)
    earlier: list[Message] = [{**message, "weight": 0} for message in messages]  # they are the prompt's
    encoded = []
    for answer in answers:
        last = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        conversation = [*earlier, last]
        ids, labels = encode_conversation(conversation, template, tokenizer, tools)
        # Some templates go on after the end token, with a line break for instance, which no answer needs.
        end = max((place for place, label in enumerate(labels, 1) if label != IGNORE_INDEX), default=0)
        if ids[: len(prompt)] != prompt or end <= len(prompt):
            raise InputError(
                "the chat template writes a prompt in one way before an answer and in another way for generation, so "
                "rollouts and training would differ; pass another --prompt_template"
            )
        encoded.append(ids[len(prompt) : end])
    return prompt, encoded


@dataclass
class _Rows:
    """What some records became; one entry of each list a row."""

    ids: list[list[int]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)

    def add(self, ids: list[int], prompt: list[int], source: str, **extra: Any) -> None:
        self.ids.append(ids)
        self.prompts.append(prompt)
        self.sources.append(source)
        for name, value in extra.items():
            self.extra.setdefault(name, []).append(value)

    def arrays(self, dtype: str) -> Arrays:
        types = {"lengths": np.int32, "truncated": np.bool_, "margins": np.float32}
        checksums = [zlib.crc32(np.array(prompt, dtype=dtype).tobytes()) for prompt in self.prompts]
        return {
            "tokens": np.array([index for ids in self.ids for index in ids], dtype=dtype),
            "document_ends": np.cumsum([len(ids) for ids in self.ids], dtype=np.int64),
            "document_hashes": np.array(checksums, dtype=np.uint32),
            "sources": np.array(self.sources, dtype=object),
            **{name: np.array(values, dtype=types[name]).reshape(-1) for name, values in self.extra.items()},
        }


class _DroppingEncoder(RecordEncoder):
    """Records -> rows; what makes no row is counted by its reason."""

    counted: ClassVar[tuple[str, ...]] = (
        "records",
        *DROPS,
        *CHANGED,
        "answers_removed",
        "truncated_chosen",
        "truncated_rejected",
    )

    @abstractmethod
    def add_row(self, record: Record, rows: _Rows) -> None:
        """Add the record's row, or count why there is none."""

    def settings(self, files: Sequence[Path]) -> list[Any]:
        return [*super().settings(files), [path.stem for path in files]]  # a file's name is the source of its records

    def encode(self, unit: list[Record]) -> Part:
        rows = _Rows()
        bad_records = BadRecords(self.on_bad_record)
        for record in unit:
            with bad_records.handled():
                self.add_row(record, rows)
                rows.counters["records"] += 1
        arrays = [rows.arrays(token_dtype(self.tokenizer))] if rows.ids else []
        return Part(len(unit), arrays, dict(rows.counters), bad_records.skipped, bad_records.problems)

    def check(self, counters: Counter[str], files: Sequence[Path]) -> None:
        if counters["records"] and counters["records"] == sum(counters[reason] for reason in DROPS):
            raise InputError(
                f"{describe_files(files)}: nothing is left of {counters['records']} records: "
                f"{describe_counts(counters, DROPS)}; the window is {self.max_length} tokens"
            )


class _PairEncoder(_DroppingEncoder):
    def add_row(self, record: Record, rows: _Rows) -> None:
        preference = read_preference(record.fields, record.location)
        with located(record.location):
            encoded = self._encode_pair(preference)
        rows.counters.update(preference.changes & set(CHANGED))
        if isinstance(encoded, str):
            rows.counters[encoded] += 1
            return
        prompt, answers = encoded
        room = self.max_length - len(prompt)
        truncated = [len(answer) > room for answer in answers]
        # Compared after the cut: what differs behind it only, teaches nothing.
        chosen, rejected = (answer[:room] for answer in answers)
        if chosen == rejected:
            rows.counters["identical"] += 1
            return
        rows.counters["truncated_chosen"] += truncated[0]
        rows.counters["truncated_rejected"] += truncated[1]
        rows.add(
            [*prompt, *chosen, *rejected],
            prompt,
            preference.source or record.source,
            lengths=[len(prompt), len(chosen), len(rejected)],
            truncated=truncated,
            margins=np.nan if preference.margin is None else preference.margin,
        )

    def _encode_pair(self, preference: Preference) -> tuple[list[int], list[list[int]]] | str:
        """The ids of the prompt and of both answers, uncut; or why the pair is dropped."""
        if not preference.messages[-1]["content"].strip():
            return "empty_prompt"
        pair = (preference.chosen, preference.rejected)
        if any(map(is_empty, pair)):
            return "empty_answer"
        prompt, answers = encode_answers(preference.messages, pair, self.template, self.tokenizer, preference.tools)
        return "long_prompt" if len(prompt) + MIN_ANSWER > self.max_length else (prompt, answers)


class _PromptEncoder(_DroppingEncoder):
    def add_row(self, record: Record, rows: _Rows) -> None:
        conversation, answered = read_prompt(record.fields, record.location)
        with located(record.location):
            ids = encode_prompt(conversation.messages, self.template, self.tokenizer, conversation.tools)
        rows.counters["answers_removed"] += answered
        rows.counters.update(conversation.changes & set(CHANGED))
        if not conversation.messages[-1]["content"].strip():
            rows.counters["empty_prompt"] += 1
            return
        if len(ids) > self.max_length:
            rows.counters["long_prompt"] += 1
            return
        source = record.fields.get("source")
        rows.add(ids, ids, source if isinstance(source, str) and source else record.source)


# ---------------------------------------------------------------- caches


def load_preferences(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_seq_length: int,
    settings: CacheSettings,
    *,
    max_samples: int | None = None,
) -> PairCache:
    """Tokenise pairs (json, jsonl, parquet) into a PairCache, or open the one that is there.

    Args:
        template: the jinja text of the chat template, see prompts.resolve_template.
        max_seq_length: tokens of a prompt and one answer; the module's head says what happens to longer ones.
        max_samples: read only this many records.
    Raises: as build_cache, and InputError if no pair is left.
    """
    if max_seq_length <= MIN_ANSWER:
        raise InputError(f"--max_seq_length {max_seq_length}: need at least {MIN_ANSWER + 1} tokens")
    warn_without_end(template, tokenizer)
    encoder = _PairEncoder(tokenizer, template, max_seq_length, max_samples, settings.on_bad_record)
    pairs = build_cache(PairCache, encoder, files, tokenizer, settings)
    _log_counters(pairs, files, settings)
    return pairs


def load_prompts(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_prompt_length: int,
    settings: CacheSettings,
    *,
    max_samples: int | None = None,
) -> PromptCache:
    """Tokenise prompts into a PromptCache, as load_preferences does pairs; a prompt that is too long is dropped."""
    if max_prompt_length < 1:
        raise InputError(f"--max_prompt_length {max_prompt_length}: need at least 1 token")
    warn_without_end(template, tokenizer)
    encoder = _PromptEncoder(tokenizer, template, max_prompt_length, max_samples, settings.on_bad_record)
    prompts = build_cache(PromptCache, encoder, files, tokenizer, settings)
    _log_counters(prompts, files, settings)
    return prompts


def _log_counters(cache: PromptCache, files: Sequence[str | Path], settings: CacheSettings) -> None:
    """Say, also of a cache that was there, what is not as the records have it."""
    name, counters = describe_files(list(map(Path, files))), cache.counters
    records = counters["records"]
    dropped = sum(counters[reason] for reason in DROPS)
    if dropped:
        level = logging.WARNING if dropped > settings.max_dropped_share * records else logging.INFO
        logger.log(level, "%s: %d of %d records dropped: %s", name, dropped, records, describe_counts(counters, DROPS))
    if changed := describe_counts(counters, CHANGED):
        logger.warning("%s: of %d records %s", name, records, changed)
    cut = counters["truncated_chosen"], counters["truncated_rejected"]
    if any(cut):
        logger.warning("%s: cut at the right, no end token: %d chosen and %d rejected of %d", name, *cut, len(cache))
    if counters["answers_removed"]:
        logger.info("%s: the answer at the end of %d prompts is left out", name, counters["answers_removed"])
