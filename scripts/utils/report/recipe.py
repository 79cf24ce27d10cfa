"""A recipe's run folder: the stages that make it, what they left behind, and the figures that sum it up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..core.command_line import RUN_CONFIG
from ..core.errors import InputError
from ..core.files import read_json
from ..core.records import iter_records
from ..training.plots import Curves, log_curves
from .pages import Text
from .results import Entry, need, read_results
from .stage_runner import STAGE_LOG, wall_seconds

TARGET_KIND = "unseen_wording"  # the kind of question that tuning promises to answer
LANGUAGES = {"zh": Text("中文", "Chinese"), "en": Text("英文", "English")}


class Stage(NamedTuple):
    """A stage of the recipe, its last file in the run folder, and the launcher that makes it."""

    title: Text
    mark: str
    launcher: str


# The models that answer questions with choices and whose perplexity is measured.
EVALUATED = {
    "base": Text("基座", "base"),
    "pretrained": Text("预训练后", "pre-trained"),
    "assistant": Text("助手", "tuned"),
    "ppo": Text("PPO 后", "PPO"),
    "dpo": Text("DPO 后", "DPO"),
}
# By their names in run_demo.sh.
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
    "quantization": Stage(Text("比较各种格式", "Storage formats"), "quantization.json", "run_compare_formats.sh"),
    "rm": Stage(Text("奖励模型", "Reward model"), "rm/all_results.json", "run_rm.sh"),
    "ppo": Stage(Text("强化学习 PPO", "PPO"), "ppo/all_results.json", "run_ppo.sh"),
    "dpo": Stage(Text("偏好优化 DPO", "DPO"), "dpo/all_results.json", "run_dpo.sh"),
    "answers_base": Stage(Text("基座的回答", "Answers, base"), "answers/base.json", "run_inference.sh"),
    "answers_adapter": Stage(Text("适配器的回答", "Answers, adapter"), "answers/adapter.json", "run_inference.sh"),
    "answers_assistant": Stage(Text("助手的回答", "Answers, merged"), "answers/assistant.json", "run_inference.sh"),
    "answers_ppo": Stage(Text("PPO 后的回答", "Answers, PPO"), "answers/ppo.json", "run_inference.sh"),
    "answers_dpo": Stage(Text("DPO 后的回答", "Answers, DPO"), "answers/dpo.json", "run_inference.sh"),
    "alignment_assistant": Stage(
        Text("助手的对齐率", "Alignment, tuned"), "alignment/assistant/alignment.json", "run_eval_alignment.sh"
    ),
    "alignment_ppo": Stage(
        Text("PPO 后的对齐率", "Alignment, PPO"), "alignment/ppo/alignment.json", "run_eval_alignment.sh"
    ),
    "alignment_dpo": Stage(
        Text("DPO 后的对齐率", "Alignment, DPO"), "alignment/dpo/alignment.json", "run_eval_alignment.sh"
    ),
    **{
        f"choices_{name}": Stage(
            Text(f"{zh}的选择题", f"Choices, {en}"),
            f"choices/{name}/multiple_choice.json",
            "run_eval_multiple_choice.sh",
        )
        for name, (zh, en) in EVALUATED.items()
    },
    "perplexity": Stage(
        Text("各阶段的困惑度", "Perplexity of each stage"), "perplexity/perplexity.json", "run_eval_perplexity.sh"
    ),
}
TRAINING = ("base", "pretrain", "sft")
PREFERENCE_TRAINING = ("rm", "ppo", "dpo")
RLHF_STAGES = (
    *PREFERENCE_TRAINING,
    *("answers_ppo", "answers_dpo", "alignment_assistant", "alignment_ppo", "alignment_dpo"),
)
MERGES = ("pretrained", "assistant")
ANSWERS = ("base", "adapter", "assistant", "ppo", "dpo")
# The models that are compared -> the name of their answers; the last three are asked about right and wrong too.
SIDES = {"base": "base", "sft": "assistant", "ppo": "ppo", "dpo": "dpo"}
ALIGNMENT_SIDES = ("sft", "ppo", "dpo")
SIDE_TITLES = {
    "base": Text("基座", "base"),
    "sft": Text("精调后", "tuned"),
    "ppo": Text("PPO 后", "after PPO"),
    "dpo": Text("DPO 后", "after DPO"),
}
REWARD_REPORT = "rm/reward_report.json"
PPO_SAMPLES = "ppo/samples.jsonl"
# What a finished stage lacks if it was run by hand in another way: stage -> file, how it ran.
ALSO_NEEDED = {
    "pretrain": ("pretrain/embedding_init.json", "without --compare_embedding_init"),
    "rm": (REWARD_REPORT, "without validation pairs"),
    "ppo": (PPO_SAMPLES, "without validation prompts"),
}

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
    stages: dict[str, dict[str, float]]  # name -> started, seconds, peak_memory_gb of its last run
    results: dict[str, dict[str, Any]]  # training stage -> metrics
    history: dict[str, list[dict[str, Any]]]  # training stage -> log lines
    vocabulary: dict[str, Any]
    embedding_init: dict[str, dict[str, float]]  # method -> language -> bits per byte at step 0
    init_method: str
    merges: dict[str, dict[str, Any]]
    questions: list[dict[str, Any]]
    answers: dict[str, list[str]]  # ANSWERS -> one a question
    reward_reports: dict[str, dict[str, Any]]  # held-out set of pairs -> what rm.py says of the reward model on it
    ppo_samples: list[dict[str, Any]]  # answers to held-out prompts, evaluation by evaluation
    alignment: dict[str, dict[str, Any]]  # ALIGNMENT_SIDES -> alignment.json
    evaluations: list[Entry]  # questions with choices and perplexity, of EVALUATED


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
    trainings = (*TRAINING, *PREFERENCE_TRAINING)
    return RecipeRun(
        folder=folder,
        stages=read_stage_log(folder / STAGE_LOG),
        results={name: read_json(folder / STAGES[name].mark) for name in trainings},
        history={name: read_json(folder / name / "trainer_state.json")["log_history"] for name in trainings},
        vocabulary=read_json(folder / STAGES["merged_tokenizer"].mark),
        embedding_init=read_json(folder / "pretrain" / "embedding_init.json"),
        init_method=read_settings(folder / "pretrain").get("embedding_init", "mean_of_pieces"),
        merges={name: read_json(folder / STAGES[name].mark) for name in MERGES},
        questions=questions,
        answers={name: read_answers(folder / STAGES[f"answers_{name}"].mark, questions) for name in ANSWERS},
        reward_reports=read_reward_reports(folder / REWARD_REPORT),
        ppo_samples=read_samples(folder / PPO_SAMPLES),
        alignment=read_alignment(folder),
        evaluations=read_evaluations(folder),
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
    problems += [
        f"stage '{name}' ran {how}: no {folder / file}; remove {folder / name}"
        for name, (file, how) in ALSO_NEEDED.items()
        if (folder / STAGES[name].mark).is_file() and not (folder / file).is_file()
    ]
    if not (folder / STAGE_LOG).is_file():
        problems.append(f"no {folder / STAGE_LOG}: run_demo.sh writes a line for every stage")
    if problems:
        raise InputError("\n".join([*problems, f"run `{command}`: it skips finished stages and makes the others"]))


def read_stage_log(path: Path) -> dict[str, dict[str, float]]:
    """started, seconds and peak_memory_gb of every stage; of a stage that ran again, the last line counts."""
    stages, end = dict[str, dict[str, float]](), 0.0
    for location, line in iter_records(path):
        figures = {key: float(need(line, key, location)) for key in ("seconds", "peak_memory_gb")}
        figures["started"] = float(line.get("started", end))  # older logs: behind the one before
        end = figures["started"] + figures["seconds"]
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


def read_reward_reports(path: Path) -> dict[str, dict[str, Any]]:
    """What rm.py says of the reward model, by held-out set. Raises: InputError if a figure is missing."""
    reports = read_json(path)
    if not isinstance(reports, dict) or not reports:
        raise InputError(f"{path}: no held-out set in it; remove {path.parent} and make it again")
    for name, report in reports.items():
        for key in ("accuracy", "pairs", "margin", "calibration", "calibration_error", "accuracy_by_source"):
            need(report, key, f"{path}, set '{name}'")
    return reports


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Answers to held-out prompts that ppo.py noted. Raises: InputError if one lacks what is shown."""
    samples = []
    for location, record in iter_records(path):
        samples.append({key: need(record, key, location) for key in ("set", "prompt", "answer", "score")})
    return samples


def read_alignment(folder: Path) -> dict[str, dict[str, Any]]:
    """alignment.json of every side. Raises: InputError if one is broken, or answers other questions than the first."""
    results: dict[str, dict[str, Any]] = {}
    asked: dict[str, list[Any]] = {}
    for side in ALIGNMENT_SIDES:
        path = folder / STAGES[f"alignment_{SIDES[side]}"].mark
        result = results[side] = read_json(path)
        for key in ("aligned", "interval", "questions", "unclear", "by_category", "by_expected", "answers"):
            need(result, key, path)
        for number, row in enumerate(result["answers"], 1):
            for key in ("id", "category", "question", "expected", "answer", "aligned"):
                need(row, key, f"{path}, answer {number}")
        asked[side] = [(row["id"], row["category"], row["question"], row["expected"]) for row in result["answers"]]
        if not asked[side] or asked[side] != asked["sft"]:
            first = STAGES["alignment_assistant"].mark
            raise InputError(
                f"{path}: it answers other questions than {first}; remove {path.parent} and make it again"
            )
    return results


def read_evaluations(folder: Path) -> list[Entry]:
    """Multiple choice and perplexity of every stage. Raises: InputError if one is broken, or of other questions."""
    marks = [STAGES[name].mark for name in (*(f"choices_{model}" for model in EVALUATED), "perplexity")]
    entries = read_results([str(folder / mark) for mark in marks])
    first = entries[0]
    for entry in entries[: len(EVALUATED)]:
        if (entry.kind, entry.column, entry.details) != (first.kind, first.column, first.details):
            raise InputError(
                f"{entry.path}: it answers other questions than {first.path}, or in another way; remove "
                f"{entry.path.parent} and make it again"
            )
    return entries


# ---------------------------------------------------------------- figures


def summarise(run: RecipeRun) -> dict[str, Any]:
    """The figures of summary.json: seconds, 1e9 bytes, bits per byte, shares from 0 to 1.

    Time in which several stages ran side by side counts once.
    """
    by_kind = exact_match_by(run, [question.get("kind", "other") for question in run.questions])
    return {
        "seconds": round(wall_seconds(run.stages.values()), 1),
        "peak_memory_gb": max(stage["peak_memory_gb"] for stage in run.stages.values()),
        "stage_seconds": {name: stage["seconds"] for name, stage in run.stages.items()},
        "bits_per_byte": {language: bits_per_byte(run, language) for language in LANGUAGES},
        "exact_match": {side: by_kind[TARGET_KIND][side] for side in SIDES},
        "exact_match_by_kind": by_kind,
        "vocabulary": {
            "base": need(run.vocabulary, "base_vocabulary", "vocabulary_report.json"),
            "merged": need(run.vocabulary, "vocabulary", "vocabulary_report.json"),
        },
        "merged_equals_adapter": run.answers["assistant"] == run.answers["adapter"],
        "alignment": {side: float(result["aligned"]) for side, result in run.alignment.items()},
        "alignment_interval": {side: result["interval"] for side, result in run.alignment.items()},
        "reward_model_accuracy": reward_accuracy(run),
        "kl": {"ppo": ppo_kl(run)},
        "multiple_choice": {
            entry.model: entry.figures["accuracy"] / 100 for entry in run.evaluations if "accuracy" in entry.figures
        },
        "rlhf_seconds": round(wall_seconds(run.stages[name] for name in RLHF_STAGES if name in run.stages), 1),
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


def reward_accuracy(run: RecipeRun) -> float:
    """Share of held-out pairs whose better answer the reward model prefers."""
    reports = run.reward_reports.values()
    return float(sum(report["accuracy"] * report["pairs"] for report in reports) / sum(r["pairs"] for r in reports))


def ppo_kl(run: RecipeRun) -> float:
    """KL of the saved PPO policy to the tuned model, nats an answer, mean over the sets of held-out prompts."""
    found = [value for key, value in run.results["ppo"].items() if re.fullmatch("eval_.+_kl", key)]
    if not found:
        raise InputError(f"{run.folder / STAGES['ppo'].mark}: no 'eval_<set>_kl'; run ppo.py with validation prompts")
    return float(sum(found) / len(found))


def is_exact(answer: str, question: Mapping[str, Any]) -> bool:
    """Whether an answer is the expected one, white space around it apart."""
    return answer.strip() == str(need(question, "output", "questions")).strip()


def exact_match_by(run: RecipeRun, groups: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """Share of exact answers of every side, by group.

    Args:
        groups: the group of each question; None leaves it out.
    """
    result: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(name for name in groups if name is not None):
        members = [index for index, name in enumerate(groups) if name == group]
        result[group] = {
            side: sum(is_exact(run.answers[source][index], run.questions[index]) for index in members) / len(members)
            for side, source in SIDES.items()
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


def exact_change(summary: Mapping[str, Any], side: str) -> float:
    """How the share of exact answers changed from the tuned model to `side`, -1 to 1; negative: it fell."""
    return float(summary["exact_match"][side] - summary["exact_match"]["sft"])


def curves_of(history: Sequence[Mapping[str, Any]], key: str) -> Curves:
    """A figure of the log over optimizer steps, in training and of every held-out set.

    The last evaluation repeats a step where the best checkpoint was loaded after it: the first value of a step counts.
    """
    curves = {}
    for name, points in log_curves(history, key).items():
        if name != "eval":  # the mean over held-out sets
            line = {"training": "training", "eval_heldout": "held-out"}.get(name)
            curves[line or f"{name.removeprefix('eval_')} held-out"] = sorted(dict(reversed(points)).items())
    return curves


# ---------------------------------------------------------------- titles, and questions to show


def label(known: Mapping[str, Text], name: str) -> Text:
    """The title of a name, or the name itself."""
    return known.get(name, Text(name, ""))


def target(bound: str) -> Text:
    """What a card says of its aim."""
    return Text("目标", f"target {bound}")


def rank_kind(kind: str) -> int:
    """The place of a kind of question in tables; unknown ones come last."""
    return list(KINDS).index(kind) if kind in KINDS else len(KINDS)


def pick_samples(kinds: Sequence[str]) -> dict[str, list[int]]:
    """Indices of some questions of each kind, evenly spaced: right and wrong answers as they come."""
    chosen = {}
    for kind in sorted(dict.fromkeys(kinds), key=rank_kind):
        members = [index for index, name in enumerate(kinds) if name == kind]
        chosen[kind] = spread(members, NUM_SAMPLES.get(kind, 3))
    return chosen


def spread(members: Sequence[int], most: int) -> list[int]:
    """At most `most` of the members, evenly spaced."""
    count = min(most, len(members))
    return [members[(2 * rank + 1) * len(members) // (2 * count)] for rank in range(count)]


def pick_changed(rows: Sequence[Sequence[Mapping[str, Any]]], most: int) -> list[int]:
    """Places of some questions, at most `most` a category: first those that only some models answer rightly.

    Args: rows: of alignment.json, the same question's together, one for each model.
    """
    chosen = []
    for category in dict.fromkeys(row[0]["category"] for row in rows):
        members = [place for place, row in enumerate(rows) if row[0]["category"] == category]
        changed = [place for place in members if len({bool(one["aligned"]) for one in rows[place]}) > 1]
        shown = spread(changed, most)
        chosen += shown + spread([place for place in members if place not in changed], most - len(shown))
    return chosen
