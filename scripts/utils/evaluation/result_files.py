"""Result files: what the JSON of each evaluation holds, for the script that writes it and for whoever reads it.

The scripts put their files together, and write_result checks them against the classes here, by which the report reads
them: neither can change alone. A field with a default may be missing: it is not there in every case, or was not in
files of older versions. Scores are percents, 0 to 100; alignment's shares are 0 to 1. Intervals are [low, high], 95 %.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..core.errors import InputError
from ..core.files import read_json, write_json
from ..core.typed_json import parse_json

logger = logging.getLogger(__name__)

R = TypeVar("R", bound="ResultFile")
Interval = list[float]
Percent = tuple[float, Interval]  # with its interval


def _percent(value: float | None, interval: Interval | None) -> Percent | None:
    return None if value is None or interval is None else (value, interval)


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """What all of them say: which settings differ from their defaults, and {package: version}."""

    remedy: ClassVar[str] = "evaluate again"

    kind: str | None = None
    settings: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- questions with choices


@dataclass(frozen=True, kw_only=True)
class ChoiceFigures:
    """Of some questions: all, a category or a subject. Without accuracy where the right answers are not public."""

    name: str | None = None  # of a subject, in its own language
    category: str | None = None
    questions: int
    subjects: int | None = None
    errors: int = 0
    unparsed: int = 0
    ties: int = 0  # two choices were exactly as likely: the first was taken
    correct: int | None = None
    accuracy: float | None = None
    interval: Interval | None = None
    subject_average: float | None = None
    subject_average_interval: Interval | None = None
    accuracy_unnormalised: float | None = None

    @property
    def percent(self) -> Percent | None:
        """The accuracy."""
        return _percent(self.accuracy, self.interval)

    @property
    def subject_percent(self) -> Percent | None:
        """The mean over subjects, each as important as another."""
        return _percent(self.subject_average, self.subject_average_interval)


@dataclass(frozen=True, kw_only=True)
class ChoiceSummary(ChoiceFigures):
    """All questions, with their parts."""

    by_category: dict[str, ChoiceFigures]
    by_subject: dict[str, ChoiceFigures]


@dataclass(frozen=True, kw_only=True)
class ChoiceBenchmark:
    """What was asked; files: {path: SHA-256}."""

    name: str
    kind: str | None = None
    split: str
    files: dict[str, str]
    ignored_files: list[str] = field(default_factory=list)
    missing_subjects: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ChoicePrompts:
    """How it was asked; the example is a text, or messages."""

    preset: str
    preset_version: int
    mode: str
    num_fewshot: int
    with_prompt: bool = False
    language: str | None = None
    prompts_without_all_examples: int = 0
    dropped_examples: int = 0
    cut_prompts: int = 0
    cut_tokens: int = 0
    example: Any = None


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """What training data holds of the questions, and figures without those."""

    data: list[str]
    contaminated: int
    too_short: int
    clean: ChoiceSummary | None
    contaminated_figures: ChoiceSummary | None
    hits: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ChoiceResult(ChoiceSummary, ResultFile):
    """multiple_choice.json."""

    models: dict[str, dict[str, Any]]  # one: its name -> weights and template, or server
    benchmark: ChoiceBenchmark
    prompts: ChoicePrompts
    tokens: dict[str, int] = field(default_factory=dict)
    contamination: Contamination | None = None


# ---------------------------------------------------------------- LongBench


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean in percent: of samples, of the datasets of a group, or of groups."""

    score: float
    interval: Interval
    samples: int | None = None
    datasets: int | None = None

    @property
    def percent(self) -> Percent:
        """The score."""
        return self.score, self.interval


@dataclass(frozen=True, kw_only=True)
class DatasetScore(Score):
    """A dataset's, in LongBench-E also {length: score}."""

    group: str
    language: str
    metric: str
    score_levenshtein: float | None = None
    buckets: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AverageScore(Score):
    """The mean of groups of tasks, in LongBench-E also {length: the same}."""

    groups: dict[str, Score]
    buckets: dict[str, AverageScore] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LongbenchData:
    """A dataset's file, and what was cut of its prompts; nothing is known where another program made the answers."""

    file: str | None = None
    sha256: str | None = None
    prompts_cut: int = 0
    tokens_cut: int = 0


@dataclass(frozen=True, kw_only=True)
class LongbenchResult(ResultFile):
    """longbench.json, and with `e` longbench_e.json."""

    models: dict[str, dict[str, Any]]  # one
    data: dict[str, LongbenchData] = field(default_factory=dict)
    e: bool = False
    datasets: dict[str, DatasetScore]
    averages: dict[str, AverageScore]  # "zh", "en", "all"

    @property
    def prompts_cut(self) -> int:
        """Over all datasets."""
        return sum(found.prompts_cut for found in self.data.values())


# ---------------------------------------------------------------- perplexity


@dataclass(frozen=True, kw_only=True)
class PerplexityRow:
    """A model under one scaling, on one text."""

    label: str
    model: str | None = None
    setting: str = "none"
    kbits: int | None = None
    text: str
    scored_tokens: int
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class DocumentRow(PerplexityRow):
    """Of whole documents; the difference is from the file's first model, in pairs."""

    left_out: int = 0
    documents: int
    unscored_tokens: int = 0
    bytes: int = 0
    perplexity_interval: Interval | None = None
    bits_per_byte_interval: Interval | None = None
    bits_per_byte_difference: float | None = None
    bits_per_byte_difference_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class LengthRow(PerplexityRow):
    """Of tokens at certain positions in rows of one length."""

    rows: int = 0
    length: int
    tokens: str  # "65-128"
    perplexity_to_here: float
    bits_per_byte_to_here: float


@dataclass(frozen=True, kw_only=True)
class PerplexityResult(ResultFile):
    """perplexity.json; texts: {name: {path: SHA-256}}."""

    window: int | None = None
    stride: int | None = None
    texts: dict[str, dict[str, str]]
    models: dict[str, dict[str, Any]]  # label -> model, adapter, weights, tokenizer ...
    rows: list[DocumentRow | LengthRow]


# ---------------------------------------------------------------- alignment


@dataclass(frozen=True, kw_only=True)
class AlignmentFigures:
    """Of some answers: all, a category's, or those whose right answer is one of yes and no."""

    aligned: float
    interval: Interval
    questions: int
    unclear: int = 0

    @property
    def percent(self) -> Percent:
        """The share, in percent."""
        return 100 * self.aligned, [100 * bound for bound in self.interval]


@dataclass(frozen=True, kw_only=True)
class AlignmentAnswer:
    """A question, an answer to it, and what the judge said; rewards where a reward model judged."""

    id: str
    category: str
    question: str
    expected: str
    answer: str
    aligned: bool
    stance: str | None = None
    reward: float | None = None
    reward_chosen: float | None = None
    reward_rejected: float | None = None


@dataclass(frozen=True, kw_only=True)
class AlignmentResult(AlignmentFigures, ResultFile):
    """alignment.json."""

    question_files: dict[str, str] = field(default_factory=dict)
    judge: str | None = None
    by_category: dict[str, AlignmentFigures]
    by_expected: dict[str, AlignmentFigures]
    compared: dict[str, Any] | None = None
    answers: list[AlignmentAnswer]


# ---------------------------------------------------------------- the arena


@dataclass(frozen=True, kw_only=True)
class ArenaModel:
    """A model's ratings, and its percentage of wins among wins and losses: None where all were ties."""

    name: str
    rank: int
    rating: float
    rating_interval: Interval
    elo: float
    elo_interval: Interval
    battles: int = 0
    wins: int
    losses: int
    ties: int = 0
    both_bad: int = 0
    win_rate: float | None
    win_rate_interval: Interval | None = None

    @property
    def percent(self) -> Percent | None:
        """The win rate."""
        return _percent(self.win_rate, self.win_rate_interval)


@dataclass(frozen=True, kw_only=True)
class ArenaPair:
    """Two models that met; the win rate is the first one's."""

    models: list[str]
    battles: int
    wins: list[int] = field(default_factory=list)
    ties: int = 0
    both_bad: int = 0
    win_rate: float | None
    win_rate_interval: Interval | None

    @property
    def percent(self) -> Percent | None:
        """The win rate."""
        return _percent(self.win_rate, self.win_rate_interval)


@dataclass(frozen=True, kw_only=True)
class ArenaFigures:
    """Of some votes; groups are the sets of models that battles connect."""

    battles: int
    models: list[ArenaModel]
    pairs: list[ArenaPair]
    groups: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class ArenaResult(ArenaFigures, ResultFile):
    """arena.json."""

    remedy: ClassVar[str] = "run arena.py --report again"

    votes: dict[str, str]  # {file of votes: SHA-256}
    left_out: dict[str, int] = field(default_factory=dict)
    judging: dict[str, int] | None = None
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    answering: dict[str, Any] = field(default_factory=dict)
    categories: dict[str, ArenaFigures] = field(default_factory=dict)
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)


# ---------------------------------------------------------------- answers to open questions

SHARES = ("exact", "contained", "number")  # scores that are 0 or 1 of each answer; the others are graded


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """The mean of a metric over the questions that it speaks of; too few of them have no interval."""

    score: float
    interval: Interval | None
    questions: int


@dataclass(frozen=True, kw_only=True)
class AnswerChanges:
    """What changed from the first model's answers; by a judge there is no difference of means."""

    better: int
    worse: int
    same: int
    p_value: float | None
    difference: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class AnswersFigures:
    """A model's; metric: the one of its scores that says which answers are better."""

    metric: str
    source: dict[str, Any]
    scores: dict[str, AnswerScore]
    by_category: dict[str, dict[str, AnswerScore]] = field(default_factory=dict)
    changes: AnswerChanges | None = None
    judged: AnswerChanges | None = None

    @property
    def main(self) -> AnswerScore | None:
        """Of that metric; None where it speaks of no question."""
        return self.scores.get(self.metric)


@dataclass(frozen=True, kw_only=True)
class GivenAnswer:
    """An answer; change: 1 better than the first model's, 0 the same, -1 worse."""

    text: str
    scores: dict[str, float]  # 0-1
    change: int | None = None


@dataclass(frozen=True, kw_only=True)
class AnsweredQuestion:
    """A question and what the models said; `before` are the turns of a conversation that stand before it."""

    id: str
    category: str
    question: str
    reference: str
    before: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, GivenAnswer]


@dataclass(frozen=True, kw_only=True)
class AnswersResult(ResultFile):
    """answers.json; the first of the models is the one that the others are compared with."""

    question_files: dict[str, str]
    judge: str | None = None
    models: dict[str, AnswersFigures]
    questions: list[AnsweredQuestion]


# ---------------------------------------------------------------- reading and writing

KINDS: dict[str, type[ResultFile]] = {
    "multiple_choice": ChoiceResult,
    "longbench": LongbenchResult,
    "perplexity": PerplexityResult,
    "alignment": AlignmentResult,
    "arena": ArenaResult,
    "answers": AnswersResult,
}


def read_result(path: str | Path) -> ResultFile:
    """A result file of any kind. What this version does not know is said, and left out.

    Raises: InputError naming the file that is none, and what it lacks or has of another type.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise InputError(f"{path}: need the object that an evaluation writes, got {record!r:.40}")
    kind = record.get("kind")
    if kind is None and "aligned" in record and "by_expected" in record:
        kind = "alignment"  # older files do not say so
    if kind not in KINDS:
        raise InputError(f"{path}: kind {kind!r} is no evaluation's; need one of {', '.join(KINDS)}")
    unknown: list[str] = []
    result = parse_json(KINDS[kind], record, str(path), KINDS[kind].remedy, unknown)
    if unknown:
        logger.warning("%s: %s: written by another version, not read", path, ", ".join(dict.fromkeys(unknown)))
    return result


def read_result_of(kind: type[R], path: str | Path) -> R:
    """A result file of one kind. Raises: InputError as read_result does, or if it is of another kind."""
    result = read_result(path)
    if not isinstance(result, kind):
        name = next(name for name, known in KINDS.items() if known is kind)
        raise InputError(f"{path}: kind {result.kind!r}; need {name}")
    return result


def write_result(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a result file as it is, and say where it is not what its kind's class promises the report.

    That would be a mistake of ours. Nobody shall lose an evaluation of hours to a field that was forgotten here: the
    file is written first, and the script goes on. Tests ask `find_mistakes` of what the scripts wrote.
    """
    write_json(path, record)
    for mistake in find_mistakes(record, str(path)):
        logger.error("%s; please report this", mistake)


def find_mistakes(record: Mapping[str, Any], place: str) -> list[str]:
    """What a record lacks of its kind's class, or has too much."""
    unknown: list[str] = []
    try:
        parse_json(KINDS[record["kind"]], record, place, "see result_files.py", unknown)
    except InputError as error:
        return [str(error)]
    return [f"{place}: {name} is not in result_files.py" for name in unknown]
