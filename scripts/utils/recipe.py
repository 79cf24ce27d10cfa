"""A recipe's run folder: the stages that make it, what they left behind, and the figures that sum it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .arguments import RUN_CONFIG
from .files import InputError, iter_records, read_json
from .pages import Text

STAGE_LOG = "stages.jsonl"
TARGET_KIND = "unseen_wording"  # the kind of question that tuning promises to answer
LANGUAGES = {"zh": Text("中文", "Chinese"), "en": Text("英文", "English")}


class Stage(NamedTuple):
    """A stage of the recipe, its last file in the run folder, and the launcher that makes it."""

    title: Text
    mark: str
    launcher: str


# By their names in run_demo.sh, in the order they run.
STAGES = {
    "base_tokenizer": Stage(
        Text("英文词表", "English vocabulary"), "base_tokenizer/tokenizer.model", "run_train_tokenizer.sh"
    ),
    "base": Stage(Text("英文基座", "English base"), "base/all_results.json", "run_pt.sh"),
    "zh_tokenizer": Stage(
        Text("中文词表", "Chinese vocabulary"), "zh_tokenizer/tokenizer.model", "run_train_tokenizer.sh"
    ),
    "merged_tokenizer": Stage(
        Text("合并词表", "Merged vocabulary"), "merged_tokenizer/vocabulary_report.json", "run_merge_tokenizers.sh"
    ),
    "pretrain": Stage(Text("继续预训练", "Continued pre-training"), "pretrain/all_results.json", "run_pt.sh"),
    "pretrained": Stage(Text("合并进基座", "Merged into the base"), "pretrained/merge_report.json", "run_merge.sh"),
    "sft": Stage(Text("指令精调", "Instruction tuning"), "sft/all_results.json", "run_sft.sh"),
    "assistant": Stage(Text("合并为助手", "Merged assistant"), "assistant/merge_report.json", "run_merge.sh"),
    "gguf": Stage(Text("导出 GGUF", "GGUF files"), "gguf/export_report.json", "run_export_gguf.sh"),
    "quantization": Stage(Text("比较各种格式", "Storage formats"), "quantization.json", "run_demo.sh"),
    "answers_base": Stage(Text("基座的回答", "Answers, base"), "answers/base.json", "run_inference.sh"),
    "answers_adapter": Stage(Text("适配器的回答", "Answers, adapter"), "answers/adapter.json", "run_inference.sh"),
    "answers_assistant": Stage(Text("助手的回答", "Answers, merged"), "answers/assistant.json", "run_inference.sh"),
}
TRAINING = ("base", "pretrain", "sft")
MERGES = ("pretrained", "assistant")
ANSWERS = ("base", "adapter", "assistant")

KINDS = {
    TARGET_KIND: Text("新问法，事实在精调中问过", "unseen wording of facts asked in tuning"),
    "seen_with_other_facts": Text("· 问法见于其他事实", "wording seen with other facts"),
    "never_seen": Text("· 问法从未见过", "wording never seen"),
    "unseen_operands": Text("算术，数字组合未见过", "arithmetic with unseen operands"),
    "pretraining_only": Text("只在预训练文本中出现的事实", "facts seen in pre-training only"),
}
NUM_SAMPLES = {TARGET_KIND: 8}  # questions shown of a kind; 3 of any other


@dataclass
class RecipeRun:
    """What the stages of a recipe left behind."""

    folder: Path
    stages: dict[str, dict[str, float]]  # name -> seconds, peak_memory_gb of its last run
    results: dict[str, dict[str, Any]]  # training stage -> metrics
    history: dict[str, list[dict[str, Any]]]  # training stage -> log lines
    vocabulary: dict[str, Any]
    embedding_init: dict[str, dict[str, float]]  # method -> language -> bits per byte at step 0
    init_method: str
    merges: dict[str, dict[str, Any]]
    questions: list[dict[str, Any]]
    answers: dict[str, list[str]]  # base, adapter, assistant -> one a question


def load_run(folder: Path, questions_file: Path) -> RecipeRun:
    """Read a recipe's run folder.

    Raises: InputError that names every unfinished stage and the command that makes it, or a file that does not fit.
    """
    refuse_unfinished(folder)
    questions = [record for _, record in iter_records(questions_file)]
    if not any(question.get("kind") == TARGET_KIND for question in questions):
        raise InputError(
            f"{questions_file}: no question of kind '{TARGET_KIND}'; pass the recipe's held-out questions"
        )
    return RecipeRun(
        folder=folder,
        stages=read_stage_log(folder / STAGE_LOG),
        results={name: read_json(folder / STAGES[name].mark) for name in TRAINING},
        history={name: read_json(folder / name / "trainer_state.json")["log_history"] for name in TRAINING},
        vocabulary=read_json(folder / STAGES["merged_tokenizer"].mark),
        embedding_init=read_json(folder / "pretrain" / "embedding_init.json"),
        init_method=read_settings(folder / "pretrain").get("embedding_init", "mean_of_pieces"),
        merges={name: read_json(folder / STAGES[name].mark) for name in MERGES},
        questions=questions,
        answers={name: read_answers(folder / STAGES[f"answers_{name}"].mark, questions) for name in ANSWERS},
    )


def refuse_unfinished(folder: Path) -> None:
    """Raises: InputError with every stage whose last file is missing, and what makes it."""
    command = f"OUT={folder} bash scripts/run_demo.sh"
    if not folder.is_dir():
        raise InputError(f"--run_dir {folder} is no folder; run `{command}`, which makes it")
    problems = [
        f"stage '{name}' is not finished: no {folder / stage.mark} (scripts/{stage.launcher} makes it)"
        for name, stage in STAGES.items()
        if not (folder / stage.mark).is_file()
    ]
    if not problems and not (folder / "pretrain" / "embedding_init.json").is_file():
        problems.append(f"stage 'pretrain' ran without --compare_embedding_init; remove {folder / 'pretrain'}")
    if not (folder / STAGE_LOG).is_file():
        problems.append(f"no {folder / STAGE_LOG}: run_demo.sh writes a line for every stage")
    if problems:
        raise InputError("\n".join([*problems, f"run `{command}`: it skips finished stages and makes the others"]))


def read_stage_log(path: Path) -> dict[str, dict[str, float]]:
    """Seconds and memory of every stage; of a stage that ran again, the last line counts."""
    stages = {}
    for location, line in iter_records(path):
        figures = {key: float(need(line, key, location)) for key in ("seconds", "peak_memory_gb")}
        stages[str(need(line, "name", location))] = figures
    if not stages:
        raise InputError(f"{path} is empty; run_demo.sh writes a line for every stage")
    return stages


def read_settings(stage: Path) -> dict[str, Any]:
    """The settings in a stage's run_config.yaml: those that differ from their defaults."""
    import yaml

    path = stage / RUN_CONFIG
    return (yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None) or {}


def read_answers(path: Path, questions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The outputs of one predictions file. Raises: InputError if they answer other questions."""
    records = list(iter_records(path))
    if len(records) != len(questions):
        raise InputError(f"{path}: {len(records)} answers to {len(questions)} questions; remove it and make it again")
    for (location, record), question in zip(records, questions, strict=True):
        if str(need(question, "instruction", "questions")).strip() not in str(need(record, "Input", location)):
            raise InputError(
                f"{location}: not an answer to '{question['instruction']}'; remove the file and make it again"
            )
    return [str(need(record, "Output", location)) for location, record in records]


def need(mapping: Mapping[str, Any], key: str, where: str | Path) -> Any:
    """mapping[key]. Raises: InputError that names the file."""
    if key not in mapping:
        raise InputError(f"{where}: no '{key}'; it has {', '.join(map(str, mapping)) or 'nothing'}")
    return mapping[key]


# ---------------------------------------------------------------- figures


def summarise(run: RecipeRun) -> dict[str, Any]:
    """The figures of summary.json: seconds, 1e9 bytes, bits per byte, shares from 0 to 1."""
    by_kind = exact_match_by(run, [question.get("kind", "other") for question in run.questions])
    return {
        "seconds": round(sum(stage["seconds"] for stage in run.stages.values()), 1),
        "peak_memory_gb": max(stage["peak_memory_gb"] for stage in run.stages.values()),
        "stage_seconds": {name: stage["seconds"] for name, stage in run.stages.items()},
        "bits_per_byte": {language: bits_per_byte(run, language) for language in LANGUAGES},
        "exact_match": {side: by_kind[TARGET_KIND][side] for side in ("base", "sft")},
        "exact_match_by_kind": by_kind,
        "vocabulary": {
            "base": need(run.vocabulary, "base_vocabulary", "vocabulary_report.json"),
            "merged": need(run.vocabulary, "vocabulary", "vocabulary_report.json"),
        },
        "merged_equals_adapter": run.answers["assistant"] == run.answers["adapter"],
    }


def bits_per_byte(run: RecipeRun, language: str) -> dict[str, float]:
    """Of held-out text: by the base, by the extended model before its first step, and after pre-training."""
    metric = f"eval_{language}_bits_per_byte"
    extended = need(run.embedding_init, run.init_method, "embedding_init.json")
    return {
        "base": float(need(run.results["base"], metric, run.folder / STAGES["base"].mark)),
        "extended": float(need(extended, language, "embedding_init.json")),
        "pretrained": float(need(run.results["pretrain"], metric, run.folder / STAGES["pretrain"].mark)),
    }


def is_exact(answer: str, question: Mapping[str, Any]) -> bool:
    """Whether an answer is the expected one, white space around it apart."""
    return answer.strip() == str(need(question, "output", "questions")).strip()


def exact_match_by(run: RecipeRun, groups: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """Share of exact answers before and after tuning, by group.

    Args:
        groups: the group of each question; None leaves it out.
    """
    result: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(name for name in groups if name is not None):
        members = [index for index, name in enumerate(groups) if name == group]
        result[group] = {
            side: sum(is_exact(run.answers[source][index], run.questions[index]) for index in members) / len(members)
            for side, source in (("base", "base"), ("sft", "assistant"))
        }
        result[group]["questions"] = len(members)
    return result


def chinese_drop(summary: Mapping[str, Any]) -> float:
    """How far Chinese bits per byte fell below the lower of the base's and the extended model's, as a share."""
    bits = summary["bits_per_byte"]["zh"]
    return 1 - bits["pretrained"] / min(bits["base"], bits["extended"])


def english_rise(summary: Mapping[str, Any]) -> float:
    """How far English bits per byte rose above the base's, as a share; negative: they fell."""
    bits = summary["bits_per_byte"]["en"]
    return bits["pretrained"] / bits["base"] - 1


# ---------------------------------------------------------------- kinds of questions


def rank_kind(kind: str) -> int:
    """The place of a kind of question in tables; unknown ones come last."""
    return list(KINDS).index(kind) if kind in KINDS else len(KINDS)


def pick_samples(kinds: Sequence[str]) -> dict[str, list[int]]:
    """Indices of some questions of each kind, evenly spaced: right and wrong answers as they come."""
    chosen = {}
    for kind in sorted(dict.fromkeys(kinds), key=rank_kind):
        members = [index for index, name in enumerate(kinds) if name == kind]
        count = min(NUM_SAMPLES.get(kind, 3), len(members))
        chosen[kind] = [members[(2 * rank + 1) * len(members) // (2 * count)] for rank in range(count)]
    return chosen
