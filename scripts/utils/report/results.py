"""Result files of evaluations, whatever made them: read, checked, and told apart where they cannot be compared.

An entry is what one model scored in one benchmark. Two entries may stand in one column only if their details agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..core.errors import InputError
from ..core.files import hash_json
from ..evaluation.result_files import (
    AlignmentResult,
    AnswersFigures,
    AnswersResult,
    ArenaResult,
    ChoiceFigures,
    ChoiceResult,
    DocumentRow,
    LengthRow,
    LongbenchData,
    LongbenchResult,
    PerplexityResult,
    PerplexityRow,
    ResultFile,
    read_result,
)

FILES = tuple(
    f"{name}.json"
    for name in ("multiple_choice", "longbench", "longbench_e", "perplexity", "alignment", "answers", "arena")
)
DECODING = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "stop")
FRACTION = 0.1  # scores that are all within 0-1, one of them above this, are no percents


@dataclass(frozen=True)
class Curve:
    """Perplexity by position: a model's rows on a text, one a length."""

    rows: list[LengthRow]


# What an entry has: of a file of one model the file itself, of perplexity a row or a curve.
Figures = ChoiceResult | LongbenchResult | DocumentRow | Curve | AlignmentResult | ArenaResult | AnswersFigures
F = TypeVar("F", bound=Figures)


@dataclass(frozen=True)
class Entry(Generic[F]):
    """What one model scored in one benchmark.

    Attributes:
        benchmark: its name: cmmlu, a text's name, alignment ...
        model: how the page calls it; `source` says it in full.
        identity: equal for equal weights in equal precision under one scaling.
        column: heading of the figures, with what is asked in which way.
        details: what has to be equal for figures to be compared, besides the column.
        settings: of the model where it differs from others: tokenizer, longest prompt, template.
        weights: {folder or file: fingerprint}; data: {file: SHA-256}.
    """

    kind: str
    benchmark: str
    model: str
    source: str
    identity: str
    column: str
    details: Mapping[str, Any]
    figures: F
    path: Path
    file: ResultFile
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)


def read_results(names: Sequence[str]) -> list[Entry[Any]]:
    """All entries of result files.

    Args:
        names: files, or folders with such, each optionally as MODEL=path: what the page calls the model.
    Raises: InputError naming the file that is none, is broken, has another unit, or repeats another.
    """
    entries: list[Entry[Any]] = []
    for name in names:
        model, equals, path = name.partition("=")
        named = bool(equals) and not Path(name).exists()  # a path may have an equals sign itself
        for file in _find_files(Path(path if named else name)):
            entries += _rename(_read_file(file), model, file) if named else _read_file(file)
    _refuse_repeated(entries)
    return _distinguish(entries)


def _find_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        raise InputError(f"--results {path}: none of {', '.join(FILES)} in this folder; pass result files")
    return found


def _read_file(path: Path) -> list[Entry[Any]]:
    file = read_result(path)
    return list(READERS[type(file)](path, file))


def _rename(entries: list[Entry[Any]], model: str, path: Path) -> list[Entry[Any]]:
    if len({entry.identity for entry in entries}) > 1 or entries[0].kind == "arena":
        raise InputError(
            f"--results {model}={path}: the file has several models, which have names; leave out {model}="
        )
    return [replace(entry, model=model) for entry in entries]


def _refuse_repeated(entries: Sequence[Entry[Any]]) -> None:
    """Raises: InputError for two results of one model in one benchmark."""
    seen: dict[str, Entry[Any]] = {}
    for entry in entries:
        # Not the name, nor the file: a model evaluated twice would stand twice in one column.
        key = hash_json([entry.kind, entry.benchmark, entry.column, entry.details, entry.identity])
        if key in seen:
            raise InputError(
                f"{entry.path}: {entry.column} of {entry.model} is in {seen[key].path} too; pass one of them"
            )
        seen[key] = entry


def _distinguish(entries: Sequence[Entry[Any]]) -> list[Entry[Any]]:
    """Other names for models that share one: in full, or with the file they are from."""
    found = list(entries)
    # The shortest name that tells: the folder's, then its whole path, then the file the result is from. Each round
    # looks at all names again, as a longer one may be another model's too.
    for more in (lambda entry: entry.source, lambda entry: f"{entry.model} ({entry.path})"):
        owners: dict[str, set[str]] = {}
        for entry in found:
            owners.setdefault(entry.model, set()).add(entry.identity)
        found = [replace(e, model=more(e)) if len(owners[e.model]) > 1 and e.model else e for e in found]
    return found


def need(mapping: Any, key: str, where: str | Path) -> Any:
    """mapping[key]. Raises: InputError that names the file."""
    if not isinstance(mapping, Mapping):
        raise InputError(f"{where}: need an object with '{key}', got {mapping!r:.40}")
    if key not in mapping:
        raise InputError(f"{where}: no '{key}'; it has {', '.join(map(str, mapping)) or 'nothing'}")
    return mapping[key]


# ---------------------------------------------------------------- models


def _only_model(models: Mapping[str, Mapping[str, Any]], path: Path) -> tuple[str, Mapping[str, Any]]:
    if len(models) != 1:
        raise InputError(f"{path}: need one model in 'models', got {models!r:.80}")
    return next(iter(models.items()))


def _describe_model(settings: Mapping[str, Any], weights: Mapping[str, str], label: str) -> dict[str, str]:
    """The name, the full name and the identity of a model: weights, precision and scaling."""
    bits = next((bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), settings.get("load_in_kbits", 16))
    scaling = [str(settings[key]) for key in ("rope_scaling", "rope_factor", "pi_factor") if key in settings]
    # None of the weights is known where a server or another program answered: then its name must do.
    prints = list(weights.values())
    source = " + ".join(weights) or label
    return _identify(Path(source.split(" + ")[-1]).name or source, source, prints or [label], bits, scaling)


def _identify(
    name: str, source: str, prints: Sequence[str], bits: int | None, scaling: Sequence[str]
) -> dict[str, str]:
    variant = ([f"{bits}-bit"] if bits in (4, 8) else []) + list(scaling)
    # perplexity.json has base and adapter hashed together; the others, which have each, are hashed to the same here.
    identity = hash_json([prints[0] if len(prints) == 1 else hash_json(list(prints)), variant])
    return {"model": ", ".join([name, *variant]), "source": ", ".join([source, *variant]), "identity": identity}


def _chosen(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}


def _hashes(files: Mapping[str, str]) -> list[str]:
    """Of the files' contents; where they lie does not matter."""
    return sorted(files.values())


# ---------------------------------------------------------------- kinds


def _read_choices(path: Path, file: ChoiceResult) -> Iterator[Entry[ChoiceResult]]:
    benchmark, prompts = file.benchmark, file.prompts
    label, source = _only_model(file.models, path)
    # Every group is checked, not the total alone: a file that was put together by hand has its mistakes there.
    for group in (file, *file.by_category.values(), *file.by_subject.values()):
        _check_choices(group, path)
    shots = "all" if prompts.num_fewshot < 0 else prompts.num_fewshot
    column = f"{benchmark.name} {benchmark.split}, {shots}-shot"
    column += "" if prompts.mode == "constrained" else f", {prompts.mode}"
    column += ", chat" if prompts.with_prompt else ""
    yield Entry(
        kind="multiple_choice",
        benchmark=benchmark.name,
        **_describe_model(file.settings, source.get("weights", {}), label),
        column=column + ("" if prompts.preset == "default" else f", {prompts.preset}"),
        details={
            "data": _hashes(benchmark.files),
            "questions": file.questions,
            "preset": f"{prompts.preset} {prompts.preset_version}",
            "language": prompts.language,
            "prompt": prompts.example,
            # Scored answers are not drawn: how drawing is set says nothing about them.
            **(_chosen(file.settings, DECODING) if prompts.mode in ("generative", "cot") else {}),
        },
        figures=file,
        path=path,
        file=file,
        settings=source,
        weights=source.get("weights", {}),
        data=benchmark.files,
    )


def _check_choices(group: ChoiceFigures, path: Path) -> None:
    """Raises: InputError if accuracy is not the percentage of right answers."""
    if group.accuracy is None:
        return
    _check_percent(group.accuracy, group.interval, path)
    # A server's failures count neither as right nor as wrong.
    scored, correct = group.questions - group.errors, group.correct or 0
    expected = 100 * correct / max(scored, 1)
    if not math.isclose(group.accuracy, expected, abs_tol=0.01):
        raise InputError(
            f"{path}: accuracy {group.accuracy:g}, but {correct} of {scored} answers are right; need a percentage, "
            f"{expected:.2f}; evaluate again"
        )


def _check_percent(score: float, interval: Sequence[float] | None, path: Path) -> None:
    numbers = [score, *interval] if interval is not None and len(interval) == 2 else [math.nan]
    if not all(0 <= number <= 100 for number in numbers):
        raise InputError(f"{path}: score {score!r} with the interval {interval!r}; need percents, 0 to 100")


def _read_longbench(path: Path, file: LongbenchResult) -> Iterator[Entry[LongbenchResult]]:
    if not file.datasets:
        raise InputError(f"{path}: no dataset in it")
    groups = [group for average in file.averages.values() for group in average.groups.values()]
    scores = [*file.datasets.values(), *file.averages.values(), *groups]
    for figures in scores:
        _check_percent(figures.score, figures.interval, path)
    # One score of 0.5 may be half a percent; that all are, with their intervals, is no model but another unit.
    highest = max(figures.score for figures in scores)
    if highest >= FRACTION and all(figures.interval[1] <= 1 for figures in scores):
        raise InputError(
            f"{path}: no score is above 1, {highest:g} is the highest: fractions; need percents, 0 to 100"
        )
    label, source = _only_model(file.models, path)
    chosen = {**file.settings, **source}  # answers scored later: how they were made stands with the model
    name = "LongBench-E" if file.e else "LongBench"
    unknown = LongbenchData()
    yield Entry(
        kind="longbench",
        benchmark=name,
        **_describe_model(chosen, source.get("weights", {}), label),
        column=name,
        details={
            "data": {dataset: file.data.get(dataset, unknown).sha256 for dataset in sorted(file.datasets)},
            # Scores of the first 50 samples are no scores of all, whatever the file's hash.
            "samples": {dataset: figures.samples for dataset, figures in sorted(file.datasets.items())},
            "with_inst": source.get("with_inst"),
            **_chosen(chosen, (*DECODING, "system_prompt")),
        },
        figures=file,
        path=path,
        file=file,
        settings=chosen,
        weights=source.get("weights", {}),
        data={found.file or dataset: str(found.sha256) for dataset, found in file.data.items()},
    )


def _read_perplexity(path: Path, file: PerplexityResult) -> Iterator[Entry[Any]]:
    rows: dict[tuple[str, str], list[PerplexityRow]] = {}
    for row in file.rows:
        if not (row.perplexity >= 1 and row.bits_per_byte >= 0):
            raise InputError(
                f"{path}: perplexity {row.perplexity!r}, bits a byte {row.bits_per_byte!r}; need at least 1, and 0"
            )
        rows.setdefault((row.label, row.text), []).append(row)
    for (label, text), found in rows.items():
        about = need(file.models, label, f"{path}, models")
        source = " + ".join(filter(None, (about.get("model"), about.get("adapter")))) or label
        first, lengths = found[0], [row for row in found if isinstance(row, LengthRow)]
        yield Entry(
            kind="perplexity",
            benchmark=text,
            **_identify(
                *(first.model or label, source, [need(about, "weights", path)], first.kbits),
                [] if first.setting == "none" else [first.setting],
            ),
            column=text + (", by position" if lengths else f", window {file.window}"),
            details={
                "data": _hashes(need(file.texts, text, f"{path}, texts")),
                **({} if lengths else {"window": file.window, "stride": file.stride}),
                **({"lengths": [row.length for row in lengths]} if lengths else {}),
                **_chosen(file.settings, ("max_documents", "max_rows", "document_separator", "text_column")),
            },
            figures=Curve(lengths) if lengths else first,
            path=path,
            file=file,
            settings=about,
            weights={source: str(about["weights"])},
            data=file.texts[text],
        )


def _read_alignment(path: Path, file: AlignmentResult) -> Iterator[Entry[AlignmentResult]]:
    rows = file.answers
    for group in (file, *file.by_category.values(), *file.by_expected.values()):
        if not all(0 <= number <= 1 for number in (group.aligned, *group.interval)):
            raise InputError(f"{path}: aligned {group.aligned!r}; eval_alignment.py writes shares from 0 to 1")
    right = sum(row.aligned for row in rows)
    if not rows or not math.isclose(file.aligned, right / len(rows), abs_tol=1e-4):
        raise InputError(f"{path}: aligned {file.aligned!r}, but {right} of {len(rows)} answers are; evaluate again")
    settings, weights = file.settings, file.settings.get("weights", {})
    yield Entry(
        kind="alignment",
        benchmark="alignment",
        **_describe_model(settings, weights, str(settings.get("answers") or path.absolute().parent.name)),
        column="alignment",
        details={
            # The questions as they were answered, not the files: these may have been put together otherwise.
            "data": [hash_json([[row.question, row.expected] for row in rows])],
            "judge": file.judge,
            **_chosen(settings, (*DECODING, "system_prompt")),
        },
        figures=file,
        path=path,
        file=file,
        settings=settings,
        weights=weights,
        data={},  # the file has the questions themselves
    )


def _read_arena(path: Path, file: ArenaResult) -> Iterator[Entry[ArenaResult]]:
    for model in file.models:
        won, decided, rate = model.wins, model.wins + model.losses, model.win_rate
        if decided and (rate is None or not math.isclose(rate, 100 * won / decided, abs_tol=0.01)):
            raise InputError(
                f"{path}: {model.name} has a win rate of {rate!r}, but won {won} of {decided}; need a percentage; run "
                "arena.py --report again"
            )
    chosen = file.settings.get("categories", [])
    yield Entry(
        kind="arena",
        benchmark="arena",
        model="",
        source=str(path),
        # Ratings are of the votes, not of one model: the same votes rated twice are the same result.
        identity=hash_json([_hashes(file.votes), chosen]),
        column="arena" + (f", {', '.join(chosen)}" if chosen else ""),
        details={"votes": _hashes(file.votes), "categories": chosen},
        figures=file,
        path=path,
        file=file,
        weights={
            f"{name}: {folder}": fingerprint
            for name, about in file.sources.items()
            # Answers made before, and those of servers, are of weights that nobody has seen.
            for folder, fingerprint in zip(
                need(about, "from", f"{path}, sources, {name}").split(" + "), about.get("weights", []), strict=False
            )
        },
        data=file.votes,
    )


def _read_answers(path: Path, file: AnswersResult) -> Iterator[Entry[AnswersFigures]]:
    for name, figures in file.models.items():
        for score in figures.scores.values():
            _check_percent(score.score, score.interval or [0, 100], path)
        source = str(figures.source.get("from", name))
        prints = list(figures.source.get("weights", [])) or [str(figures.source.get("sha256", source))]
        yield Entry(
            kind="answers",
            benchmark="answers",
            **_identify(name, source, prints, figures.source.get("load_in_kbits"), []),
            column=f"answers, {figures.metric}",
            details={
                # The questions as they were asked, not the files: these may have been put together otherwise.
                "data": [hash_json([[row.before, row.question, row.reference] for row in file.questions])],
                **_chosen(file.settings, (*DECODING, "system_prompt")),
            },
            figures=figures,
            path=path,
            file=file,
            settings=figures.source,
            weights=dict(zip(source.split(" + "), figures.source.get("weights", []), strict=False)),
            data={},  # the file has the questions themselves
        )


READERS: dict[type[ResultFile], Callable[[Path, Any], Iterator[Entry[Any]]]] = {
    ChoiceResult: _read_choices,
    LongbenchResult: _read_longbench,
    PerplexityResult: _read_perplexity,
    AlignmentResult: _read_alignment,
    ArenaResult: _read_arena,
    AnswersResult: _read_answers,
}
