"""A recipe's run folder: the stages that make it, and what they left behind, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..core.command_line import RUN_CONFIG, shell_command
from ..core.errors import InputError
from ..core.files import read_json
from ..core.records import iter_records
from ..core.typed_json import parse_json
from ..evaluation.result_files import AlignmentResult, read_result_of
from ..training.plots import Curves, log_curves
from .pages import Text
from .results import Entry, need, read_results
from .stage_runner import STAGE_LOG

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
# By their names in demo.py.
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
    "ppo_merged": Stage(
        Text("合并 PPO 的一部分", "PPO merged in part"), "ppo_merged/merge_report.json", "run_merge.sh"
    ),
    "dpo_merged": Stage(
        Text("合并 DPO 的一部分", "DPO merged in part"), "dpo_merged/merge_report.json", "run_merge.sh"
    ),
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
    *("ppo_merged", "dpo_merged", "answers_ppo", "answers_dpo"),
    *("alignment_assistant", "alignment_ppo", "alignment_dpo"),
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


@dataclass(frozen=True)
class StageTimes:
    """When a stage began, in seconds since 1970, how long it ran, and the memory it took, 1e9 bytes."""

    started: float
    seconds: float
    peak_memory_gb: float


@dataclass(frozen=True)
class MergeReport:
    """What the merge script says of a merged model; size in 1e9 bytes."""

    tensors: int
    changed_tensors: int
    vocab_size: int | None
    size_gb: float
    seconds: float


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs of about the same predicted probability, and the share of them that the reward model gets right."""

    predicted: float
    observed: float
    pairs: int = 0


@dataclass(frozen=True)
class SourceAccuracy:
    """Held-out pairs of one source."""

    pairs: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class RewardReport:
    """What rm.py says of the reward model on a held-out set of pairs; None where a figure is not defined there."""

    accuracy: float
    pairs: int
    margin: float
    calibration: list[CalibrationBin]
    calibration_error: float
    accuracy_by_source: dict[str, SourceAccuracy]
    chosen_mean: float | None = None
    rejected_mean: float | None = None
    share_chosen_longer: float | None = None
    accuracy_chosen_longer: float | None = None
    accuracy_chosen_shorter: float | None = None
    length_correlation: float | None = None


@dataclass(frozen=True)
class PolicySample:
    """An answer to a held-out prompt that ppo.py noted at an evaluation."""

    set: str
    prompt: str
    answer: str
    score: float


@dataclass(frozen=True)
class RecipeRun:
    """What the stages of a recipe left behind."""

    folder: Path
    stages: dict[str, StageTimes]  # of the last run of each
    results: dict[str, dict[str, Any]]  # training stage -> metrics
    history: dict[str, list[dict[str, Any]]]  # training stage -> log lines
    vocabulary: dict[str, Any]
    embedding_init: dict[str, dict[str, float]]  # method -> language -> bits per byte at step 0
    init_method: str
    merges: dict[str, MergeReport]
    questions: list[dict[str, Any]]
    answers: dict[str, list[str]]  # ANSWERS -> one a question
    reward_reports: dict[str, RewardReport]  # by held-out set of pairs
    ppo_samples: list[PolicySample]  # evaluation by evaluation
    alignment: dict[str, AlignmentResult]  # ALIGNMENT_SIDES -> alignment.json
    evaluations: list[Entry[Any]]  # questions with choices and perplexity, of EVALUATED


def load_run(folder: Path, questions_file: Path) -> RecipeRun:
    """Read a recipe's run folder.

    Raises: InputError that names every unfinished stage and the command that makes it, or a file that does not fit.
    """
    refuse_unfinished(folder)  # all of them at once, before the first file is read
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
        merges={name: read_merge(folder / STAGES[name].mark) for name in MERGES},
        questions=questions,
        answers={name: read_answers(folder / STAGES[f"answers_{name}"].mark, questions) for name in ANSWERS},
        reward_reports=read_reward_reports(folder / REWARD_REPORT),
        ppo_samples=read_policy_samples(folder / PPO_SAMPLES),
        alignment=read_alignment(folder),
        evaluations=read_evaluations(folder),
    )


def refuse_unfinished(folder: Path) -> None:
    """Raises: InputError with every stage whose last file is missing, and what makes it."""
    command = shell_command("bash", "scripts/run_demo.sh", OUT=folder)
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


def read_stage_log(path: Path) -> dict[str, StageTimes]:
    """The times of every stage; of a stage that ran again, the last line counts."""
    stages, end = dict[str, StageTimes](), 0.0
    for location, line in iter_records(path):
        seconds, memory = (float(need(line, key, location)) for key in ("seconds", "peak_memory_gb"))
        started = float(line.get("started", end))  # older logs: behind the one before
        end = started + seconds
        stages[str(need(line, "name", location))] = StageTimes(started, seconds, memory)
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
        # "Input" may have more around the question: its own input, or a template.
        if str(need(question, "instruction", "questions")).strip() not in str(need(record, "Input", location)):
            raise InputError(
                f"{location}: not an answer to '{question['instruction']}'; remove the file and make it again"
            )
    return [str(need(record, "Output", location)) for location, record in records]


def read_merge(path: Path) -> MergeReport:
    """merge_report.json. Raises: InputError if a figure is missing."""
    return parse_json(MergeReport, read_json(path), str(path), f"remove {path.parent} and make it again")


def read_reward_reports(path: Path) -> dict[str, RewardReport]:
    """What rm.py says of the reward model, by held-out set. Raises: InputError if a figure is missing."""
    reports = read_json(path)
    if not isinstance(reports, dict) or not reports:
        raise InputError(f"{path}: no held-out set in it; remove {path.parent} and make it again")
    remedy = f"remove {path.parent} and make it again"
    return {
        name: parse_json(RewardReport, report, f"{path}, set '{name}'", remedy) for name, report in reports.items()
    }


def read_policy_samples(path: Path) -> list[PolicySample]:
    """Answers to held-out prompts that ppo.py noted. Raises: InputError if one lacks what is shown."""
    return [
        PolicySample(*(need(record, key, location) for key in ("set", "prompt", "answer", "score")))
        for location, record in iter_records(path)
    ]


def read_alignment(folder: Path) -> dict[str, AlignmentResult]:
    """alignment.json of every side. Raises: InputError if one is broken, or answers other questions than the first."""
    results: dict[str, AlignmentResult] = {}
    asked: dict[str, list[Any]] = {}
    for side in ALIGNMENT_SIDES:
        path = folder / STAGES[f"alignment_{SIDES[side]}"].mark
        results[side] = read_result_of(AlignmentResult, path)
        asked[side] = [(row.id, row.category, row.question, row.expected) for row in results[side].answers]
        # The tables put answers to a question side by side, by their place alone.
        if not asked[side] or asked[side] != asked["sft"]:
            first = STAGES["alignment_assistant"].mark
            raise InputError(
                f"{path}: it answers other questions than {first}; remove {path.parent} and make it again"
            )
    return results


def read_evaluations(folder: Path) -> list[Entry[Any]]:
    """Multiple choice and perplexity of every stage. Raises: InputError if one is broken, or of other questions."""
    marks = [STAGES[name].mark for name in (*(f"choices_{model}" for model in EVALUATED), "perplexity")]
    # All at once: read_results gives other names to models of one name, and refuses a model that is there twice.
    entries = read_results([str(folder / mark) for mark in marks])
    first = entries[0]
    for entry in entries[: len(EVALUATED)]:
        if (entry.kind, entry.column, entry.details) != (first.kind, first.column, first.details):
            raise InputError(
                f"{entry.path}: it answers other questions than {first.path}, or in another way; remove "
                f"{entry.path.parent} and make it again"
            )
    return entries


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
