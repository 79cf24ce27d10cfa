"""The figures that sum up a recipe's run: summary.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import InputError
from ..evaluation.result_files import ChoiceResult
from .recipe import LANGUAGES, RLHF_STAGES, SIDES, STAGES, TARGET_KIND, RecipeRun
from .results import need
from .stage_runner import wall_seconds


@dataclass(frozen=True)
class Summary:
    """What summary.json holds: seconds, 1e9 bytes, bits per byte, shares from 0 to 1.

    Time in which several stages ran side by side counts once.
    """

    seconds: float
    peak_memory_gb: float
    stage_seconds: dict[str, float]
    bits_per_byte: dict[str, dict[str, float]]  # language -> "base", "extended", "pretrained"
    exact_match: dict[str, float]  # SIDES -> share of TARGET_KIND
    exact_match_by_kind: dict[str, dict[str, Any]]  # kind -> SIDES and "questions"
    vocabulary: dict[str, int]
    merged_equals_adapter: bool
    alignment: dict[str, float]
    alignment_interval: dict[str, list[float]]
    reward_model_accuracy: float
    kl: dict[str, float]
    multiple_choice: dict[str, float]
    rlhf_seconds: float

    @property
    def chinese_drop(self) -> float:
        """How far Chinese bits per byte fell below the lower of the base's and the extended model's, as a share."""
        bits = self.bits_per_byte["zh"]
        return 1 - bits["pretrained"] / min(bits["base"], bits["extended"])

    @property
    def english_rise(self) -> float:
        """How far English bits per byte rose above the base's, as a share; negative: they fell."""
        bits = self.bits_per_byte["en"]
        return bits["pretrained"] / bits["base"] - 1

    def exact_change(self, side: str) -> float:
        """How the share of exact answers changed from the tuned model to `side`, -1 to 1; negative: it fell."""
        return self.exact_match[side] - self.exact_match["sft"]


def summarise_run(run: RecipeRun) -> Summary:
    """The figures of a run. Raises: InputError naming a file that lacks one."""
    by_kind = exact_match_by(run, [question.get("kind", "other") for question in run.questions])
    return Summary(
        seconds=round(wall_seconds(vars(stage) for stage in run.stages.values()), 1),
        peak_memory_gb=max(stage.peak_memory_gb for stage in run.stages.values()),
        stage_seconds={name: stage.seconds for name, stage in run.stages.items()},
        bits_per_byte={language: bits_per_byte(run, language) for language in LANGUAGES},
        # Other kinds of questions are shown, but tuning does not promise them.
        exact_match={side: by_kind[TARGET_KIND][side] for side in SIDES},
        exact_match_by_kind=by_kind,
        vocabulary={
            "base": need(run.vocabulary, "base_vocabulary", "vocabulary_report.json"),
            "merged": need(run.vocabulary, "vocabulary", "vocabulary_report.json"),
        },
        merged_equals_adapter=run.answers["assistant"] == run.answers["adapter"],
        alignment={side: result.aligned for side, result in run.alignment.items()},
        alignment_interval={side: result.interval for side, result in run.alignment.items()},
        reward_model_accuracy=reward_accuracy(run),
        kl={"ppo": ppo_kl(run)},
        multiple_choice={
            entry.model: entry.figures.accuracy / 100
            for entry in run.evaluations
            if isinstance(entry.figures, ChoiceResult) and entry.figures.accuracy is not None
        },
        rlhf_seconds=round(wall_seconds(vars(run.stages[name]) for name in RLHF_STAGES if name in run.stages), 1),
    )


def bits_per_byte(run: RecipeRun, language: str) -> dict[str, float]:
    """Of held-out text: by the base, by the extended model before its first step, and after pre-training."""
    metric = f"eval_{language}_bits_per_byte"
    # The file compares ways of setting new rows; the run began with one of them.
    extended = need(run.embedding_init, run.init_method, "embedding_init.json")
    return {
        "base": float(need(run.results["base"], metric, run.folder / STAGES["base"].mark)),
        "extended": float(need(extended, language, "embedding_init.json")),
        "pretrained": float(need(run.results["pretrain"], metric, run.folder / STAGES["pretrain"].mark)),
    }


def reward_accuracy(run: RecipeRun) -> float:
    """Share of held-out pairs whose better answer the reward model prefers."""
    # Weighted by pairs: a set of ten must not count as much as one of a thousand.
    reports = run.reward_reports.values()
    return sum(report.accuracy * report.pairs for report in reports) / sum(report.pairs for report in reports)


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
