"""Multiple choice: C-Eval, CMMLU, MMLU or questions of your own -> accuracy in percent by subject and category.

  python scripts/eval_multiple_choice.py --base_model MODEL --benchmark cmmlu --data_dir CMMLU
  python scripts/eval_multiple_choice.py --base_model MODEL --benchmark ceval --data_dir CEVAL --split test
  python scripts/eval_multiple_choice.py --server_url http://127.0.0.1:8000/v1 --benchmark my_questions --num_fewshot 0
Output: multiple_choice.json, multiple_choice.png, answers.jsonl, a table, and for C-Eval's test split submission.json.
An interrupted run goes on when it is run again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import InferenceArguments, arg, list_arg
from utils.core.command_line import describe_arguments, describe_environment, run, select_gpus, shell_command
from utils.core.errors import InputError, raise_problems
from utils.core.files import atomic_file, hash_json, read_json
from utils.evaluation.arguments import GreedyArguments, warn_unused
from utils.evaluation.progress import Parts, refuse_finished

if TYPE_CHECKING:
    from utils.evaluation.contamination import Overlap
    from utils.evaluation.multiple_choice.benchmarks import Benchmark
    from utils.evaluation.multiple_choice.prompts import ChoicePrompt
    from utils.evaluation.multiple_choice.results import ChoiceAnswer
    from utils.evaluation.multiple_choice.runs import ModelUnderTest
    from utils.evaluation.multiple_choice.wordings import Wording

logger = logging.getLogger("eval_multiple_choice")

RESULT, PICTURE, ANSWERS, SUBMISSION = (
    "multiple_choice.json",
    "multiple_choice.png",
    "answers.jsonl",
    "submission.json",
)
PARTS = "answers.partial.jsonl"


@dataclass
class AnswerArguments(GreedyArguments):
    """How answers are drawn where they are generated: always the likeliest token by default, and no penalties."""

    max_new_tokens: int = arg(512, help="Longest answer; generative and cot alone.")


@dataclass
class EvalArguments:
    """What is asked, how, and where the result goes."""

    benchmark: str | None = arg(help="ceval, cmmlu, mmlu, or a folder of your own questions (csv, jsonl).")
    data_dir: str | None = arg(help="Folder of a published benchmark's files, or a hub id such as ceval/ceval-exam.")
    split: str | None = arg(help="val, test; default: val for ceval, test for the others.")
    subjects: list[str] = list_arg(help="Only these subjects, as their files are named.")
    skip_missing: bool = arg(False, help="Go on where subjects have no file; default: stop and name them.")
    max_questions: int | None = arg(help="Ask only so many questions of each subject, the first ones.")
    preset: Literal["default", "a2-2023", "lm-eval"] = arg(
        "default",
        help="Wording of the prompts: default; a2-2023: the forerunners', byte for byte; lm-eval: that of "
        "lm-evaluation-harness.",
    )
    mode: Literal["constrained", "cloze", "generative", "cot"] = arg(
        "constrained",
        help="constrained: the likeliest letter; cloze: the likeliest choice, by its text; generative: what the model "
        "writes; cot: the same after reasoning.",
    )
    num_fewshot: int = arg(5, help="Solved examples before each question, the first of dev; -1: all; 0: none.")
    with_prompt: bool = arg(False, help="Ask in a conversation, under the chat template.")
    language: Literal["zh", "en"] | None = arg(help="Of the prompts around questions of your own; default: theirs.")
    decontaminate: list[str] = list_arg(
        help="Files or folders of training data: scores on the questions they do not hold stand beside those on all."
    )
    server_url: str | None = arg(
        help="Ask a model behind an OpenAI-compatible server, URL or URL#MODEL; its key: SERVER_API_KEY in the "
        "environment."
    )
    output_dir: str = arg("output/multiple_choice", help="Folder for the results.")
    batch_size: int = arg(8, help="Questions answered at once (generative, cot, llama.cpp, servers).")
    overwrite: bool = arg(False, help="Replace a finished result, or answers of another model or other settings.")

    def __post_init__(self) -> None:
        checks = {
            "pass --benchmark: ceval, cmmlu, mmlu, or a folder of questions": self.benchmark is not None,
            f"--num_fewshot {self.num_fewshot}: need 0 or more, or -1 for all": self.num_fewshot >= -1,
            f"--max_questions {self.max_questions}: need at least 1": (
                self.max_questions is None or self.max_questions >= 1
            ),
            f"--batch_size {self.batch_size}: need at least 1": self.batch_size >= 1,
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])

    @property
    def generates(self) -> bool:
        """Whether answers are written, not scored."""
        return self.mode in ("generative", "cot")


def main(model_args: InferenceArguments, settings: AnswerArguments, args: EvalArguments) -> dict[str, Any]:
    """Evaluate; returns what multiple_choice.json holds."""
    select_gpus(model_args)  # before torch is imported
    from utils.evaluation.multiple_choice.benchmarks import read_benchmark
    from utils.evaluation.multiple_choice.results import accuracies, clean_accuracies, plot_choices
    from utils.evaluation.multiple_choice.runs import PLAIN_STOPS, ask_all, check_engine, open_model
    from utils.evaluation.multiple_choice.wordings import PRESETS
    from utils.evaluation.result_files import write_result

    assert args.benchmark is not None
    folder = Path(args.output_dir)
    if not args.overwrite and not has_errors_to_ask_again(folder):
        refuse_finished(folder / RESULT, args.overwrite)
    check_flags(model_args, settings, args)
    check_engine(model_args, args.mode)
    what = (args.split, args.subjects, args.num_fewshot, args.skip_missing, args.max_questions)
    benchmark = read_benchmark(args.benchmark, args.data_dir, *what)
    language = args.language or guess_language(benchmark)
    preset = PRESETS[args.preset]
    wording = preset.wording(benchmark.kind, language, args.mode, args.with_prompt)
    if args.generates and not args.with_prompt and not settings.stop:
        settings = replace(settings, stop=PLAIN_STOPS[args.mode])
    if args.server_url and args.mode == "constrained" and wording.letter_scoring == "both":
        raise InputError(
            f"--preset {args.preset} adds up two forms of each letter, and a server tells only its likeliest tokens; "
            "pass --preset default, or load the model here"
        )
    chat = args.with_prompt and wording.system is None
    model = open_model(model_args, chat, args.server_url, args.batch_size, wording.exact)
    prompts = write_prompts(benchmark, wording, model, model_args, settings, args)
    overlaps = find_overlaps(benchmark, args.decontaminate)  # data that is not there is found before weights are read
    label, source = model.describe()
    record = {
        **describe_arguments(model_args, *([settings] if args.generates else [])),
        **source,
        "mode": args.mode,
        "exact": wording.exact,
        "sha256_of_prompts": hash_json([[p.request.text, p.request.prompt, p.request.continuations] for p in prompts]),
    }
    record.pop("gpus", None)  # where it is computed does not decide the answers
    parts = Parts(folder / PARTS, record, args.overwrite)
    answers = ask_all(prompts, parts, model, args.mode, settings)

    result = {
        "kind": "multiple_choice",
        "settings": describe_arguments(model_args, settings, args),
        "models": {label: source},
        "benchmark": describe_benchmark(benchmark),
        "prompts": describe_prompts(prompts, language, args) | {"preset_version": preset.version},
        "environment": describe_environment(),
        "tokens": model.counts,
        **accuracies(answers, benchmark, args.mode),
    }
    if overlaps:
        result["contamination"] = clean_accuracies(answers, overlaps, benchmark, args.mode, args.decontaminate)
    write_results(answers, benchmark, folder)
    if "accuracy" in result:
        plot_choices(result, folder / PICTURE, f"{benchmark.name} ({benchmark.split}), {args.num_fewshot}-shot")
    write_result(folder / RESULT, result)
    if not result["errors"]:
        parts.finish()
    print_table(result)
    report(result, args)
    return result


def has_errors_to_ask_again(folder: Path) -> bool:
    """Whether there is a result with errors, and the answers that it has, so that it can go on."""
    path = folder / RESULT
    errors = read_json(path).get("errors") if path.is_file() and (folder / PARTS).is_file() else 0
    if errors:
        logger.info("%s has %d errors; asking those questions again", path, errors)
    return bool(errors)


def check_flags(model_args: InferenceArguments, settings: AnswerArguments, args: EvalArguments) -> None:
    """Say which flags have no effect. Raises: InputError for flags that contradict each other."""
    from utils.evaluation.endpoints import unsent_flags

    unsent = unsent_flags(settings) if args.server_url and args.generates else []
    local = model_args.model_name_or_path or model_args.adapter_name_or_path
    template = model_args.prompt_template is not None or model_args.system_prompt is not None
    checks = {
        "--server_url asks a server, --base_model a model here; pass one of them": not (local and args.server_url),
        "pass --base_model, a model folder or hub id, or --server_url": bool(local or args.server_url),
        "--prompt_template and --system_prompt are of conversations; pass --with_prompt too, or leave them out": (
            args.with_prompt or not template
        ),
        "--guidance_scale leads away from a system prompt, which plain prompts have not; pass --with_prompt too": (
            args.with_prompt or not args.generates or settings.guidance_scale == 1
        ),
        f"{' '.join(unsent)}: OpenAI's protocol has no word for it, the server would not be told; leave it out": (
            not unsent
        ),
        "--prompt_template: a server has a template of its own; leave it out": not (
            args.server_url and model_args.prompt_template
        ),
    }
    raise_problems([problem for problem, holds in checks.items() if not holds])
    if not args.generates:
        warn_unused(settings, f"--mode {args.mode} writes no answers")


def guess_language(benchmark: Benchmark) -> str:
    """Of the questions: Chinese if most of them have a Chinese character."""
    chinese = sum(any("\u4e00" <= letter <= "\u9fff" for letter in question.text) for question in benchmark.questions)
    return "zh" if 2 * chinese > len(benchmark.questions) else "en"


# ---------------------------------------------------------------- before and after asking


def write_prompts(
    benchmark: Benchmark,
    wording: Wording,
    model: ModelUnderTest,
    model_args: InferenceArguments,
    settings: AnswerArguments,
    args: EvalArguments,
) -> list[ChoicePrompt]:
    """The prompts of all questions; says what did not fit."""
    from tqdm import tqdm

    from utils.evaluation.multiple_choice.prompts import ChoiceEncoder, ChoiceWriter, count_cuts

    writer = ChoiceWriter(wording, args.mode, args.with_prompt, model_args.system_prompt)
    encoder = ChoiceEncoder(writer, model.prompter, settings.max_new_tokens if args.generates else 0)
    prompts = [
        encoder.encode(question, benchmark.subjects[question.subject], benchmark.examples[question.subject])
        for question in tqdm(benchmark.questions, unit="prompt", desc="writing prompts")
    ]
    cuts = count_cuts(prompts)
    if cuts["prompts_without_all_examples"]:
        logger.warning(
            "%d of %d prompts were longer than the model's window and lost %d examples; %d of them lost %d tokens of "
            "their beginning too",
            *(cuts["prompts_without_all_examples"], len(prompts), cuts["dropped_examples"]),
            *(cuts["cut_prompts"], cuts["cut_tokens"]),
        )
    elif cuts["cut_prompts"]:
        logger.warning("%d prompts lost %d tokens of their beginning", cuts["cut_prompts"], cuts["cut_tokens"])
    return prompts


def find_overlaps(benchmark: Benchmark, data: Sequence[str]) -> list[Overlap]:
    """What each question, with its choices, shares with training data; nothing without any."""
    from utils.evaluation.contamination import find_contaminated

    texts = ["\n".join([question.text, *question.choices]) for question in benchmark.questions]
    return find_contaminated(texts, data) if data else []


def describe_benchmark(benchmark: Benchmark) -> dict[str, Any]:
    """What was asked, and what was not."""
    return {
        "name": benchmark.name,
        "kind": benchmark.kind,
        "split": benchmark.split,
        "files": benchmark.files,
        "ignored_files": benchmark.ignored,
        "missing_subjects": benchmark.missing,
    }


def describe_prompts(prompts: Sequence[ChoicePrompt], language: str, args: EvalArguments) -> dict[str, Any]:
    """How it was asked: the preset, what had no room, and the first prompt as an example."""
    from utils.evaluation.multiple_choice.prompts import count_cuts

    asked = {
        "preset": args.preset,
        "mode": args.mode,
        "num_fewshot": args.num_fewshot,
        "with_prompt": args.with_prompt,
    }
    return {**asked, "language": language, **count_cuts(prompts), "example": prompts[0].request.text}


def write_results(answers: Sequence[ChoiceAnswer], benchmark: Benchmark, folder: Path) -> None:
    """answers.jsonl, in the questions' order, and C-Eval's submission.json."""
    from utils.evaluation.multiple_choice.results import write_submission

    with atomic_file(folder / ANSWERS) as file:
        file.writelines(json.dumps(dict(answer.row), ensure_ascii=False) + "\n" for answer in answers)
    if benchmark.kind == "ceval" and benchmark.split == "test":
        write_submission(answers, folder / SUBMISSION)


# ---------------------------------------------------------------- reporting


def print_table(result: Mapping[str, Any]) -> None:
    """Accuracy of all, categories and subjects in percent, on standard output."""
    categories = [(f"[{name}]", group) for name, group in result["by_category"].items()]
    rows = [*result["by_subject"].items(), *categories, ("[all]", result)]  # a category may be called all
    if clean := (result.get("contamination") or {}).get("clean"):
        rows.append(("[all, clean]", clean))
    width = max(len(name) for name, _ in rows)
    print(f"{'':{width}}  accuracy  95 % interval  questions  unparsed  errors  average over subjects")
    for name, group in rows:
        score, average = " " * 25, ""
        if "accuracy" in group:
            low, high = group["interval"]
            score = f"{group['accuracy']:8.2f}  {low:5.1f} - {high:5.1f}"
        if "subject_average" in group:
            low, high = group["subject_average_interval"]
            average = f"  {group['subject_average']:6.2f} ({low:.1f} - {high:.1f})"
        print(
            f"{name:{width}}  {score:23}  {group['questions']:9}  {group['unparsed']:8}  {group['errors']:6}{average}"
        )


def report(result: Mapping[str, Any], args: EvalArguments) -> None:
    """The summary, the files and the next command, in the log."""
    benchmark, prompts = result["benchmark"], result["prompts"]
    files = [RESULT, ANSWERS]
    score = "no accuracy: the answers are not public"
    if "accuracy" in result:
        files.append(PICTURE)
        low, high = result["interval"]
        score = f"{result['accuracy']:.2f} % ({low:.1f} - {high:.1f})"
    if benchmark["kind"] == "ceval" and benchmark["split"] == "test":
        files.append(SUBMISSION)
    problems = ""
    if result["errors"]:
        problems += f"\n  {result['errors']} questions have no answer, the server failed; run again to ask them again"
    if result["unparsed"]:
        problems += f"\n  {result['unparsed']} answers name no choice and count as wrong"
    if result["ties"]:
        problems += f"\n  {result['ties']} questions have two likeliest choices, of which the first was taken"
    if "contamination" in result:
        found = result["contamination"]
        problems += (
            f"\n  {found['contaminated']} questions stand in the training data, {found['too_short']} are too short"
        )
    logger.info(
        "%s (%s), %s, %d-shot, preset %s: %s, %d questions%s\n  files in %s: %s\n  next: %s",
        *(benchmark["name"], benchmark["split"], prompts["mode"], args.num_fewshot, args.preset, score),
        *(result["questions"], problems, args.output_dir, ", ".join(files)),
        shell_command("python", "scripts/report.py", "--results", Path(args.output_dir) / RESULT),
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
