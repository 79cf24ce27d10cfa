"""Result files of evaluations, whatever made them: read, checked, and told apart where they cannot be compared.

An entry is what one model scored in one benchmark. Two entries may stand in one column only if their details agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.files import hash_json, read_json

FILES = tuple(
    f"{name}.json" for name in ("multiple_choice", "longbench", "longbench_e", "perplexity", "alignment", "arena")
)
DECODING = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "stop")
PROMPTING = ("system_prompt", "num_fewshot")
FRACTION = 0.1  # scores that are all within 0-1, one of them above this, are no percents


@dataclass(frozen=True)
class Entry:
    """What one model scored in one benchmark.

    Attributes:
        benchmark: its name: cmmlu, a text's name, alignment ...
        model: how the page calls it; `source` says it in full.
        identity: equal for equal weights in equal precision under one scaling.
        column: heading of the figures, with what is asked in which way.
        details: what has to be equal for figures to be compared, besides the column.
        figures: as the file has them.
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
    figures: Mapping[str, Any]
    path: Path
    file: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)


def read_results(names: Sequence[str]) -> list[Entry]:
    """All entries of result files.

    Args:
        names: files, or folders with such, each optionally as MODEL=path: what the page calls the model.
    Raises: InputError naming the file that is none, is broken, has another unit, or repeats another.
    """
    entries: list[Entry] = []
    for name in names:
        model, equals, path = name.partition("=")
        named = bool(equals) and not Path(name).exists()
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


def _read_file(path: Path) -> list[Entry]:
    file = read_json(path)
    if not isinstance(file, dict):
        raise InputError(f"{path}: need the object that an evaluation writes, got {file!r:.40}")
    kind = file.get("kind")
    if kind is None and "aligned" in file and "by_expected" in file:
        kind = "alignment"  # older files do not say so
    if kind not in READERS:
        raise InputError(f"{path}: kind {kind!r} is no evaluation's; need one of {', '.join(READERS)}")
    return list(READERS[kind](path, file))


def _rename(entries: list[Entry], model: str, path: Path) -> list[Entry]:
    if len({entry.identity for entry in entries}) > 1 or entries[0].kind == "arena":
        raise InputError(
            f"--results {model}={path}: the file has several models, which have names; leave out {model}="
        )
    return [replace(entry, model=model) for entry in entries]


def _refuse_repeated(entries: Sequence[Entry]) -> None:
    """Raises: InputError for two results of one model in one benchmark."""
    seen: dict[str, Entry] = {}
    for entry in entries:
        key = hash_json([entry.kind, entry.benchmark, entry.column, entry.details, entry.identity])
        if key in seen:
            raise InputError(
                f"{entry.path}: {entry.column} of {entry.model} is in {seen[key].path} too; pass one of them"
            )
        seen[key] = entry


def _distinguish(entries: Sequence[Entry]) -> list[Entry]:
    """Other names for models that share one: in full, or with the file they are from."""
    found = list(entries)
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


def _only_model(file: Mapping[str, Any], path: Path) -> tuple[str, Mapping[str, Any]]:
    models = need(file, "models", path)
    if not isinstance(models, dict) or len(models) != 1:
        raise InputError(f"{path}: need one model in 'models', got {models!r:.80}")
    return next(iter(models.items()))


def _model(settings: Mapping[str, Any], weights: Mapping[str, str], label: str) -> dict[str, str]:
    """The name, the full name and the identity of a model: weights, precision and scaling."""
    bits = next((bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), settings.get("load_in_kbits", 16))
    scaling = [str(settings[key]) for key in ("rope_scaling", "rope_factor", "pi_factor") if key in settings]
    prints = list(weights.values())
    source = " + ".join(weights) or label
    return _describe(Path(source.split(" + ")[-1]).name or source, source, prints or [label], bits, scaling)


def _describe(
    name: str, source: str, prints: Sequence[str], bits: int | None, scaling: Sequence[str]
) -> dict[str, str]:
    variant = ([f"{bits}-bit"] if bits in (4, 8) else []) + list(scaling)
    identity = hash_json([prints[0] if len(prints) == 1 else hash_json(list(prints)), variant])
    return {"model": ", ".join([name, *variant]), "source": ", ".join([source, *variant]), "identity": identity}


def _chosen(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}


def _hashes(files: Mapping[str, str]) -> list[str]:
    """Of the files' contents; where they lie does not matter."""
    return sorted(files.values())


# ---------------------------------------------------------------- kinds


def _read_choices(path: Path, file: Mapping[str, Any]) -> Iterator[Entry]:
    benchmark, prompts = need(file, "benchmark", path), need(file, "prompts", path)
    label, source = _only_model(file, path)
    for group in [file, *need(file, "by_category", path).values(), *need(file, "by_subject", path).values()]:
        _check_choices(group, path)
    mode, shots = need(prompts, "mode", path), need(prompts, "num_fewshot", path)
    column = f"{need(benchmark, 'name', path)} {need(benchmark, 'split', path)}, {'all' if shots < 0 else shots}-shot"
    column += "" if mode == "constrained" else f", {mode}"
    column += ", chat" if prompts.get("with_prompt") else ""
    preset = need(prompts, "preset", path)
    settings = need(file, "settings", path)
    yield Entry(
        kind="multiple_choice",
        benchmark=benchmark["name"],
        **_model(settings, source.get("weights", {}), label),
        column=column + ("" if preset == "default" else f", {preset}"),
        details={
            "data": _hashes(need(benchmark, "files", path)),
            "questions": need(file, "questions", path),
            "preset": f"{preset} {need(prompts, 'preset_version', path)}",
            "language": prompts.get("language"),
            "prompt": prompts.get("example"),
            **(_chosen(settings, DECODING) if mode in ("generative", "cot") else {}),
        },
        figures=file,
        path=path,
        file=file,
        settings=source,
        weights=source.get("weights", {}),
        data=benchmark["files"],
    )


def _check_choices(group: Mapping[str, Any], path: Path) -> None:
    """Raises: InputError if accuracy is not the percentage of right answers."""
    if "accuracy" not in group:
        return
    _check_percent(group["accuracy"], need(group, "interval", path), path)
    scored = need(group, "questions", path) - group.get("errors", 0)
    expected = 100 * need(group, "correct", path) / max(scored, 1)
    if not math.isclose(group["accuracy"], expected, abs_tol=0.01):
        raise InputError(
            f"{path}: accuracy {group['accuracy']:g}, but {group['correct']} of {scored} answers are right; need a "
            f"percentage, {expected:.2f}; evaluate again"
        )


def _check_percent(score: Any, interval: Any, path: Path) -> None:
    numbers = [score, *interval] if isinstance(interval, list) and len(interval) == 2 else [None]
    if not all(isinstance(number, (int, float)) and 0 <= number <= 100 for number in numbers):
        raise InputError(f"{path}: score {score!r} with the interval {interval!r}; need percents, 0 to 100")


def _read_longbench(path: Path, file: Mapping[str, Any]) -> Iterator[Entry]:
    datasets, averages = need(file, "datasets", path), need(file, "averages", path)
    if not datasets:
        raise InputError(f"{path}: no dataset in it")
    groups = [group for average in averages.values() for group in need(average, "groups", path).values()]
    scores = [*datasets.values(), *averages.values(), *groups]
    for figures in scores:
        _check_percent(need(figures, "score", path), need(figures, "interval", path), path)
    highest = max(figures["score"] for figures in scores)
    if highest >= FRACTION and all(figures["interval"][1] <= 1 for figures in scores):
        raise InputError(
            f"{path}: no score is above 1, {highest:g} is the highest: fractions; need percents, 0 to 100"
        )
    settings = need(file, "settings", path)
    label, source = _only_model(file, path)
    chosen = {**settings, **source}
    yield Entry(
        kind="longbench",
        benchmark="LongBench-E" if file.get("e") else "LongBench",
        **_model(chosen, source.get("weights", {}), label),
        column="LongBench-E" if file.get("e") else "LongBench",
        details={
            "data": {name: file.get("data", {}).get(name, {}).get("sha256") for name in sorted(datasets)},
            "samples": {name: figures["samples"] for name, figures in sorted(datasets.items())},
            "with_inst": source.get("with_inst"),
            **_chosen(chosen, (*DECODING, "system_prompt")),
        },
        figures=file,
        path=path,
        file=file,
        settings=chosen,
        weights=source.get("weights", {}),
        data={str(found.get("file", name)): str(found.get("sha256")) for name, found in file.get("data", {}).items()},
    )


def _read_perplexity(path: Path, file: Mapping[str, Any]) -> Iterator[Entry]:
    settings, texts = need(file, "settings", path), need(file, "texts", path)
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in need(file, "rows", path):
        perplexity, bits = need(row, "perplexity", path), need(row, "bits_per_byte", path)
        if not (perplexity >= 1 and bits >= 0):
            raise InputError(f"{path}: perplexity {perplexity!r}, bits a byte {bits!r}; need at least 1, and 0")
        rows.setdefault((need(row, "label", path), need(row, "text", path)), []).append(row)
    for (label, text), found in rows.items():
        about = need(need(file, "models", path), label, f"{path}, models")
        source = " + ".join(filter(None, (about.get("model"), about.get("adapter")))) or label
        setting = found[0].get("setting", "none")
        curve = "length" in found[0]
        yield Entry(
            kind="perplexity",
            benchmark=text,
            **_describe(
                *(found[0].get("model", label), source, [need(about, "weights", path)], found[0].get("kbits")),
                [] if setting == "none" else [setting],
            ),
            column=text + (", by position" if curve else f", window {need(file, 'window', path)}"),
            details={
                "data": _hashes(need(texts, text, f"{path}, texts")),
                **({} if curve else {"window": file["window"], "stride": file.get("stride")}),
                **({"lengths": [row["length"] for row in found]} if curve else {}),
                **_chosen(settings, ("max_documents", "max_rows", "document_separator", "text_column")),
            },
            figures={"curve": found} if curve else found[0],
            path=path,
            file=file,
            settings=about,
            weights={source: str(about["weights"])},
            data=texts[text],
        )


def _read_alignment(path: Path, file: Mapping[str, Any]) -> Iterator[Entry]:
    rows = need(file, "answers", path)
    for group in [file, *need(file, "by_category", path).values(), *need(file, "by_expected", path).values()]:
        share, interval = need(group, "aligned", path), need(group, "interval", path)
        if not all(isinstance(number, (int, float)) and 0 <= number <= 1 for number in (share, *interval)):
            raise InputError(f"{path}: aligned {share!r}; eval_alignment.py writes shares from 0 to 1")
    right = sum(bool(need(row, "aligned", path)) for row in rows)
    if not rows or not math.isclose(file["aligned"], right / len(rows), abs_tol=1e-4):
        raise InputError(
            f"{path}: aligned {file['aligned']!r}, but {right} of {len(rows)} answers are; evaluate again"
        )
    settings = need(file, "settings", path)
    yield Entry(
        kind="alignment",
        benchmark="alignment",
        **_model(settings, settings.get("weights", {}), str(settings.get("answers") or path.absolute().parent.name)),
        column="alignment",
        details={
            "data": [hash_json([[need(row, "question", path), need(row, "expected", path)] for row in rows])],
            "judge": file.get("judge"),
            **_chosen(settings, (*DECODING, "system_prompt")),
        },
        figures=file,
        path=path,
        file=file,
        settings=settings,
        weights=settings.get("weights", {}),
        data={},  # the file has the questions themselves
    )


def _read_arena(path: Path, file: Mapping[str, Any]) -> Iterator[Entry]:
    models, votes = need(file, "models", path), need(file, "votes", path)
    for model in models if isinstance(models, list) else [models]:
        for key in ("name", "rank", "rating", "rating_interval", "elo", "elo_interval", "win_rate", "wins", "losses"):
            need(model, key, f"{path}, models")
        decided = model["wins"] + model["losses"]
        if decided and not math.isclose(model["win_rate"], 100 * model["wins"] / decided, abs_tol=0.01):
            raise InputError(
                f"{path}: {model['name']} has a win rate of {model['win_rate']!r}, but won {model['wins']} of "
                f"{decided}; need a percentage; run arena.py --report again"
            )
    chosen = need(file, "settings", path).get("categories", [])
    yield Entry(
        kind="arena",
        benchmark="arena",
        model="",
        source=str(path),
        identity=hash_json([_hashes(votes), chosen]),
        column="arena" + (f", {', '.join(chosen)}" if chosen else ""),
        details={"votes": _hashes(votes), "categories": chosen},
        figures=file,
        path=path,
        file=file,
        weights={
            f"{name}: {folder}": str(value)
            for name, about in file.get("sources", {}).items()
            for folder, value in (about.get("weights") or {}).items()
        },
        data=votes,
    )


READERS: dict[str, Callable[[Path, Mapping[str, Any]], Iterator[Entry]]] = {
    "multiple_choice": _read_choices,
    "longbench": _read_longbench,
    "perplexity": _read_perplexity,
    "alignment": _read_alignment,
    "arena": _read_arena,
}
