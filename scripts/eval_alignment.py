"""Ask a model questions about right and wrong, and judge its answers -> percentage aligned, overall and by category.

  python scripts/eval_alignment.py --base_model MERGED --output_dir output/alignment
  python scripts/eval_alignment.py --base_model OTHER --output_dir output/ppo --compare output/alignment/alignment.json
  python scripts/eval_alignment.py --answers predictions.jsonl --judge reward_model --reward_model RM
Greedy unless told otherwise. An interrupted run goes on when it is run again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import InferenceArguments, arg, list_arg
from utils.core.command_line import describe_arguments, describe_environment, run, select_gpus, shell_command
from utils.core.errors import InputError, raise_problems
from utils.core.files import hash_file, hash_json
from utils.core.records import list_data_files
from utils.evaluation.arguments import GreedyArguments, warn_unused

if TYPE_CHECKING:
    from utils.evaluation.alignment import Judgement, Question

logger = logging.getLogger("eval_alignment")

QUESTIONS = Path(__file__).resolve().parents[1] / "examples" / "data" / "alignment" / "questions.jsonl"
RESULT, PICTURE, ANSWERS = "alignment.json", "alignment.png", "answers.jsonl"


@dataclass
class AnswerArguments(GreedyArguments):
    """How answers are drawn; unlike elsewhere, always the likeliest token by default."""

    max_new_tokens: int = arg(128, help="Longest answer.")


@dataclass
class EvalArguments:
    """What is asked, who judges, and where the result goes."""

    questions: list[str] = list_arg(
        help="Files or folders (json, jsonl, parquet) of questions: id, category, question, expected (yes or no), and "
        "for --judge reward_model chosen and rejected; default: those of examples/data/alignment."
    )
    answers: str | None = arg(
        help="Judge these answers instead of asking a model: {id, answer}, or inference_hf.py's predictions file."
    )
    judge: Literal["rules", "reward_model"] = arg(
        "rules",
        help="rules: what the words say, yes or no; reward_model: nearer to the good answer or to the bad one.",
    )
    reward_model: str | None = arg(help="Folder of the reward model that judges.")
    compare: str | None = arg(help="alignment.json of an earlier model on the same questions: report the difference.")
    output_dir: str = arg("output/alignment", help="Folder for alignment.json, alignment.png and the answers.")
    batch_size: int = arg(16, help="Questions answered at once; memory grows with it, answers do not change.")
    overwrite: bool = arg(False, help="Replace a finished result, or answers of another model.")

    def __post_init__(self) -> None:
        problems = []
        if self.batch_size < 1:
            problems.append(f"--batch_size {self.batch_size}: need at least 1")
        if (self.judge == "reward_model") != (self.reward_model is not None):
            problems.append("--judge reward_model and --reward_model FOLDER go together; pass both or neither")
        if self.reward_model is not None and not Path(self.reward_model).is_dir():
            problems.append(f"--reward_model {self.reward_model} is no folder; pass one that rm.py wrote")
        if self.answers is not None and not Path(self.answers).is_file():
            problems.append(f"--answers {self.answers}: no such file")
        raise_problems(problems)


def main(model_args: InferenceArguments, settings: AnswerArguments, args: EvalArguments) -> dict[str, Any]:
    """Evaluate; returns the figures of alignment.json, the single answers apart."""
    select_gpus(model_args)  # before torch is imported
    from utils.evaluation.alignment import (
        aligned_shares,
        compare,
        judge_by_rewards,
        judge_by_rules,
        need_references,
        plot_alignment,
        read_answers,
        read_earlier,
        read_questions,
    )
    from utils.evaluation.progress import refuse_finished
    from utils.evaluation.result_files import write_result

    if args.answers and (model_args.model_name_or_path or model_args.adapter_name_or_path):
        raise InputError("--answers judges answers made before; pass it or a model, not both")
    folder = Path(args.output_dir)
    refuse_finished(folder / RESULT, args.overwrite)
    files = args.questions or [str(QUESTIONS)]
    questions = read_questions(files)
    if args.reward_model:
        from utils.rlhf.reward_model import find_reward_model

        find_reward_model(args.reward_model)  # whether it is one, before answers are made
        need_references(questions)
    earlier = read_earlier(args.compare, questions) if args.compare else None
    if args.answers:
        warn_unused(settings, "--answers are there already")
        answers, source = read_answers(args.answers, questions), {"answers": args.answers}
    else:
        answers, source = answer_questions(model_args, settings, args, questions)
    if args.reward_model:
        judgements = judge_by_rewards(score_answers(args.reward_model, questions, answers, args.batch_size))
    else:
        judgements = judge_by_rules(questions, answers)

    figures = aligned_shares(questions, judgements)
    if earlier is not None:
        now = {question.id: judgement.aligned for question, judgement in zip(questions, judgements, strict=True)}
        figures["compared"] = {"file": args.compare, **compare(earlier, now)}
    record = {
        "kind": "alignment",
        "settings": {**describe_arguments(model_args, settings, args), **source},
        "question_files": {
            str(path): hash_file(path) for name in files for path in list_data_files(name) if path.suffix != ".txt"
        },
        "judge": args.reward_model or args.judge,
        "environment": describe_environment(),
    }
    write_result(folder / RESULT, {**record, **figures, "answers": describe_answers(questions, answers, judgements)})
    plot_alignment(figures, folder / PICTURE, "Alignment")
    print_table(figures)
    report(figures, folder, args)
    return figures


# ---------------------------------------------------------------- answering


def answer_questions(
    model_args: InferenceArguments, settings: AnswerArguments, args: EvalArguments, questions: Sequence[Question]
) -> tuple[list[str], dict[str, Any]]:
    """The model's answers, and what it was; answers are written as they come, so that a killed run goes on."""
    from utils.evaluation.models import for_evaluation, weights_of
    from utils.evaluation.progress import Predictions, answer_all
    from utils.generation.engine import Request
    from utils.generation.loading import EnginePlan
    from utils.text.prompts import with_system_prompt

    plan = EnginePlan(for_evaluation(model_args))
    model_args = plan.args
    requests = []
    for number, question in enumerate(questions):
        messages = with_system_prompt([{"role": "user", "content": question.text}], model_args.system_prompt)
        negative = plan.encode_negative(messages, settings)
        request = Request(plan.encode(messages), settings, settings.seed + number, negative_prompt=negative)
        requests.append(request)
        try:
            plan.check(request)
        except InputError as error:
            raise InputError(f"{question.location}: {error}") from None

    source = {"template": plan.template_name, "weights": weights_of(model_args)}
    record = {
        **describe_arguments(model_args, settings),
        **source,
        "sha256_of_prompts": hash_json([r.prompt for r in requests]),
    }
    texts = [question.text for question in questions]
    predictions = Predictions(Path(args.output_dir) / ANSWERS, texts, record, args.overwrite, flag="--output_dir")
    answer_all(
        lambda: closing(plan.load(args.batch_size * settings.prompts_per_answer)),
        lambda engine, _, number: engine.submit(requests[number]).wait,
        predictions,
    )
    return [row["Output"] for row in predictions.rows], source


# ---------------------------------------------------------------- judging


def score_answers(
    folder: str, questions: Sequence[Question], answers: Sequence[str], batch_size: int
) -> list[tuple[float, float, float]]:
    """Rewards of each answer, and of the question's good and bad one, by the reward model in `folder`."""
    from utils.data.preferences import encode_answers
    from utils.rlhf.reward_model import load_reward_model

    model = load_reward_model(folder)
    sequences = []
    for question, answer in zip(questions, answers, strict=True):
        messages = [{"role": "user", "content": question.text}]
        texts = [answer, question.chosen or "", question.rejected or ""]
        prompt, encoded = encode_answers(messages, texts, model.template, model.tokenizer)
        sequences += [(prompt, ids) for ids in encoded]
    rewards = model.score(sequences, batch_size).tolist()
    return list(zip(rewards[0::3], rewards[1::3], rewards[2::3], strict=True))


def describe_answers(
    questions: Sequence[Question], answers: Sequence[str], judgements: Sequence[Judgement]
) -> list[dict[str, Any]]:
    """A row for every question: what was asked and answered, and what the judge said."""
    rows = []
    for question, answer, judgement in zip(questions, answers, judgements, strict=True):
        row: dict[str, Any] = {"id": question.id, "category": question.category, "question": question.text}
        row |= {"expected": question.expected, "answer": answer, "aligned": judgement.aligned}
        if judgement.stance is not None:
            row["stance"] = judgement.stance
        if judgement.rewards is not None:
            row |= dict(zip(("reward", "reward_chosen", "reward_rejected"), judgement.rewards, strict=True))
        rows.append(row)
    return rows


# ---------------------------------------------------------------- reporting


def print_table(figures: dict[str, Any]) -> None:
    """Share of aligned answers by category and overall, with its interval, on standard output."""
    expected = [(f"expected {side}", group) for side, group in figures["by_expected"].items()]
    rows = [*figures["by_category"].items(), *expected, ("all", figures)]  # a category may have one of these names too
    width = max(len(name) for name, _ in rows)
    print(f"{'':{width}}  aligned  95 % interval  questions  unclear")
    for name, group in rows:
        low, high = group["interval"]
        shares = f"{100 * group['aligned']:5.1f} %  {100 * low:5.1f} - {100 * high:5.1f}"
        print(f"{name:{width}}  {shares}  {group['questions']:9}  {group['unclear']:7}")


def report(figures: dict[str, Any], folder: Path, args: EvalArguments) -> None:
    """The summary, the files and the next command, in the log."""
    low, high = figures["interval"]
    compared = ""
    if "compared" in figures:
        change = figures["compared"]
        points = [f"{100 * share:+.1f}" for share in (change["difference"], *change["interval"])]
        compared = (
            f"\n  against {args.compare}: {points[0]} points ({points[1]} to {points[2]}), {change['gained']} gained, "
            f"{change['lost']} lost, p = {change['p_value']:.2g}"
        )
    logger.info(
        "aligned: %.1f %% (%.1f - %.1f) of %d answers, %d unclear%s\n  files in %s: %s, %s%s\n  next: %s",
        *(100 * figures["aligned"], 100 * low, 100 * high, figures["questions"], figures["unclear"], compared),
        *(folder, RESULT, PICTURE, "" if args.answers else f", {ANSWERS}"),
        shell_command("python", "scripts/report.py", "--results", folder / RESULT),
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
