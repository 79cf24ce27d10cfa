"""LongBench: questions about long texts in 21 datasets -> scores in percent by dataset, group and language.

  python scripts/eval_longbench.py --base_model MODEL --data_dir LONGBENCH --predict_on zh,code
  python scripts/eval_longbench.py --base_model MODEL --data_dir LONGBENCH --e --rope_scaling auto-ntk
  python scripts/eval_longbench.py --output_dir output/longbench
Output: longbench.json, longbench.png, a table, and the answers, a .jsonl file a dataset in pred (LongBench-E: pred_e).
The third command scores answers that stand there already. An interrupted run goes on when it is run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import InferenceArguments, arg
from utils.core.command_line import describe_arguments, describe_environment, run, select_gpus, shell_command
from utils.core.errors import InputError, raise_problems
from utils.core.files import hash_file, read_json, remove
from utils.evaluation.arguments import GreedyArguments, warn_unused
from utils.evaluation.longbench.tasks import GROUPS, HUB_ID, find_data, find_files, read_samples, select_tasks
from utils.evaluation.progress import answer_all, refuse_finished

if TYPE_CHECKING:
    from utils.evaluation.longbench.prompts import PromptWriter
    from utils.evaluation.longbench.results import LongBenchPredictions
    from utils.evaluation.longbench.tasks import Sample, Task
    from utils.evaluation.progress import Predictions
    from utils.generation.engine import Completion, Engine
    from utils.generation.loading import EnginePlan

logger = logging.getLogger("eval_longbench")

METRIC_PACKAGES = ("jieba", "rouge", "rapidfuzz")
AHEAD = 3  # prompts written for each that is being answered, so that whoever ends first is followed at once


@dataclass
class AnswerArguments(GreedyArguments):
    """How answers are drawn: as LongBench prescribes, always the likeliest token, and no penalties."""

    max_new_tokens: int = arg(512, help="Longest answer; each dataset has its own length, which may be shorter.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_scale > 1:
            raise InputError("LongBench is answered without guidance; leave out --guidance_scale")


@dataclass
class EvalArguments:
    """What is asked, how prompts are made, and where the result goes."""

    data_dir: str = arg(HUB_ID, help="Folder with <dataset>.jsonl, or for --e <dataset>_e.jsonl; or a hub id.")
    predict_on: str = arg("zh,en,code", help="Languages (zh, en, code) and datasets, separated by commas.")
    e: bool = arg(False, help="LongBench-E: 13 datasets, scored by length too (0-4k, 4-8k, 8k+ words).")
    max_length: int | None = arg(
        help="Tokens of prompt, template and answer together; longer prompts lose their middle. Default: the model's "
        "window."
    )
    with_inst: Literal["auto", "true", "false"] = arg(
        "auto",
        help="Whether questions are put into the chat template; auto: but in trec, triviaqa, samsum, lsht, lcc and "
        "repobench-p.",
    )
    max_samples: int | None = arg(help="Ask only this many samples of each dataset, spread evenly over it.")
    output_dir: str = arg("output/longbench", help="Folder for longbench.json, longbench.png and the answers.")
    batch_size: int = arg(8, help="Samples answered at once; memory grows with it, answers do not change.")
    overwrite: bool = arg(False, help="Replace a finished result, or answers of another model.")

    def __post_init__(self) -> None:
        self.predict_on = ",".join(name.strip() for name in self.predict_on.split(",") if name.strip())
        checks = {
            "--predict_on: need zh, en, code or names of datasets, separated by commas": bool(self.predict_on),
            f"--max_length {self.max_length}: need at least 2": self.max_length is None or self.max_length >= 2,
            f"--max_samples {self.max_samples}: need at least 1": self.max_samples is None or self.max_samples >= 1,
            f"--batch_size {self.batch_size}: need at least 1": self.batch_size >= 1,
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])

    @property
    def result(self) -> Path:
        """The file with the figures."""
        return Path(self.output_dir) / ("longbench_e.json" if self.e else "longbench.json")

    @property
    def predictions(self) -> Path:
        """The folder of the answers, named as the forerunners name it."""
        return Path(self.output_dir) / ("pred_e" if self.e else "pred")


def main(model_args: InferenceArguments, settings: AnswerArguments, args: EvalArguments) -> dict[str, Any]:
    """Evaluate; returns what longbench.json holds."""
    select_gpus(model_args)  # before torch is imported
    from utils.evaluation.longbench.results import average_scores, plot_longbench, read_predictions
    from utils.evaluation.result_files import write_result

    tasks = select_tasks(args.predict_on.split(","), args.e)
    if model_args.model_name_or_path or model_args.adapter_name_or_path:
        refuse_same_datasets(args, [task.name for task in tasks])
        rows, source = answer_samples(model_args, settings, args, tasks)
    else:
        warn_unused(settings, "without a model, answers that are there already are scored")
        rows, source = read_predictions(args.predictions, tasks)
        refuse_same_datasets(args, list(rows))
    figures = average_scores(rows, args.e)
    result = {
        "kind": "longbench",
        "settings": describe_arguments(model_args, settings, args),
        **source,
        "e": args.e,
        "environment": describe_environment(*METRIC_PACKAGES),
        **figures,
    }
    write_result(args.result, result)
    plot_longbench(figures, args.result.with_suffix(".png"), "LongBench-E" if args.e else "LongBench")
    print_tables(figures)
    report(result, args)
    return result


def refuse_same_datasets(args: EvalArguments, names: list[str]) -> None:
    """Raises: InputError if there is a result that has these datasets already, or others; more may be added to it."""
    if not args.result.is_file() or args.overwrite:
        return
    there = list(read_json(args.result).get("datasets", {}))
    others = [name for name in there if name not in names]
    if set(names) <= set(there):
        refuse_finished(args.result, overwrite=False)
    if others:
        raise InputError(
            f"{args.result} has {', '.join(others)} too; name them in --predict_on to add to it (what is answered "
            "stays), or pass another --output_dir, or --overwrite to replace it"
        )


# ---------------------------------------------------------------- answering


def answer_samples(
    model_args: InferenceArguments, settings: AnswerArguments, args: EvalArguments, tasks: list[Task]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """{dataset: its answers}, and what made them; answers are written as they come, so that a killed run goes on."""
    from utils.evaluation.longbench.prompts import PromptWriter
    from utils.evaluation.longbench.results import open_predictions
    from utils.evaluation.models import for_evaluation
    from utils.generation.loading import EnginePlan

    files = find_files(find_data(args.data_dir), tasks, args.e)
    plan = EnginePlan(for_evaluation(model_args), chat=args.with_inst != "false")
    samples = {task.name: read_samples(files[task.name], task, args.max_samples) for task in tasks}
    writer = PromptWriter(
        plan, settings, args.with_inst, model_args.system_prompt, choose_length(plan, args), plan.args.engine != "vllm"
    )
    for task in tasks:
        writer.check(task, samples[task.name])
    label, source = describe_source(plan, writer)
    record = {**describe_arguments(plan.args, settings), **source, "max_samples": args.max_samples}
    record.pop("gpus", None)  # where it is computed does not decide the answers
    data = {name: {"file": str(path), "sha256": hash_file(path)} for name, path in files.items()}
    anew = args.overwrite and args.result.is_file()
    predictions = {
        name: open_predictions(
            args.predictions / f"{name}.jsonl", found, {**record, "data": data[name]["sha256"]}, args.overwrite, anew
        )
        for name, found in samples.items()
    }
    if anew:
        remove(args.result)  # from here on an interrupted run goes on
    cut = ask_all(plan, writer, tasks, samples, predictions, args.batch_size)
    return {name: found.rows for name, found in predictions.items()}, {
        "models": {label: source},
        "data": {name: {**found, **cut[name]} for name, found in data.items()},
    }


def choose_length(plan: EnginePlan, args: EvalArguments) -> int | None:
    """Tokens that prompt and answer may have together. Raises: InputError for more than the model's window."""
    if plan.context is not None and args.max_length is not None and args.max_length > plan.context:
        raise InputError(
            f"--max_length {args.max_length}: the model's window has {plan.context} tokens; pass less, or lengthen "
            "the window with --rope_scaling and --rope_factor"
        )
    return plan.context if args.max_length is None else args.max_length


def describe_source(plan: EnginePlan, writer: PromptWriter) -> tuple[str, dict[str, Any]]:
    """A name for the model, and what decides its answers: weights, template, length."""
    from utils.evaluation.models import short_name, weights_of

    weights = weights_of(plan.args)
    template = {"template": plan.template_name, "with_inst": writer.with_inst, "max_length": writer.max_length}
    return short_name(list(weights)[-1]), {"weights": weights, **template}


def ask_all(
    plan: EnginePlan,
    writer: PromptWriter,
    tasks: list[Task],
    samples: Mapping[str, list[Sample]],
    predictions: Mapping[str, LongBenchPredictions],
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """Complete the predictions. Returns: {dataset: how many prompts, and tokens of them, were cut}."""
    cut = {task.name: {"prompts_cut": 0, "tokens_cut": 0} for task in tasks}

    def count_cut(task: Task, tokens: int) -> None:
        cut[task.name]["prompts_cut"] += tokens > 0
        cut[task.name]["tokens_cut"] += tokens

    def submit(engine: Engine, file: Predictions, number: int) -> Callable[[], Completion]:
        task = by_path[file.path]
        request, tokens = writer.request(task, samples[task.name][number], writer.settings.seed + number)
        count_cut(task, tokens)
        return engine.submit(request).wait

    by_path = {predictions[task.name].path: task for task in tasks}
    for task in tasks:
        if predictions[task.name].metrics is None:  # what is answered counts again, for the record
            for sample in samples[task.name][: len(predictions[task.name].rows)]:
                count_cut(task, writer.encode(task, sample)[1])
    answer_all(
        lambda: closing(plan.load(batch_size, writer.max_length)),
        submit,
        *(predictions[task.name] for task in tasks),
        ahead=AHEAD * batch_size,
        measure=lambda file: cut[by_path[file.path].name],
    )
    return {name: dict(found.metrics or {}) for name, found in predictions.items()}


# ---------------------------------------------------------------- reporting


def print_tables(figures: Mapping[str, Any]) -> None:
    """Scores in percent on standard output: by dataset, then by language and group."""
    datasets, averages = figures["datasets"], figures["averages"]
    buckets = list(averages["all"].get("buckets", {}))
    headings = "".join(f" {bucket:>7}" for bucket in buckets)
    print(f"{'dataset':22} {'group':14} {'score':>7}  {'95 % interval':>13} {'samples':>8}{headings}")
    for name, found in datasets.items():
        low, high = found["interval"]
        lengths = "".join(cell(found["buckets"].get(bucket)) for bucket in buckets)
        interval = f"{low:5.1f} - {high:5.1f}"
        print(f"{name:22} {found['group']:14}{cell(found)}  {interval:>13} {found['samples']:8}{lengths}")
    groups = list(averages["all"]["groups"])
    print("\n" + f"{'average':10} {'all':>7}" + "".join(f" {group:>13}" for group in groups))
    for language, whole in averages.items():
        if language == "all" and len(averages) == 2:
            continue  # the same as the one language
        for bucket, part in {"": whole, **whole.get("buckets", {})}.items():
            scores = "".join(f" {cell(part['groups'].get(group)):>13}" for group in groups)
            print(f"{f'{language} {bucket}':10}{cell(part)}{scores}")


def cell(part: Mapping[str, Any] | None) -> str:
    """A score in a table; empty where there is none."""
    return f" {part['score']:7.2f}" if part else " " * 8


def report(result: Mapping[str, Any], args: EvalArguments) -> None:
    """The summary, the files and the next command, in the log."""
    whole, datasets, data = result["averages"]["all"], result["datasets"], result.get("data", {})
    cut = ""
    if prompts := sum(found.get("prompts_cut", 0) for found in data.values()):
        tokens = sum(found.get("tokens_cut", 0) for found in data.values())
        cut = f"\n  {prompts} prompts were longer than --max_length and lost {tokens} tokens from their middle"
    logger.info(
        "LongBench: %.2f (%.1f - %.1f) over %d of %d groups, %d datasets, %d answers%s\n"
        "  files in %s: %s, %s, answers in %s\n"
        "  next: %s",
        *(whole["score"], *whole["interval"], len(whole["groups"]), len(GROUPS), len(datasets)),
        *(sum(found["samples"] for found in datasets.values()), cut, args.output_dir, args.result.name),
        *(args.result.with_suffix(".png").name, args.predictions.name),
        shell_command("python", "scripts/report.py", "--results", args.result),
    )


if __name__ == "__main__":
    run(
        main,
        InferenceArguments,
        AnswerArguments,
        EvalArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
