"""Is it better at my questions?  Questions with reference answers -> what one or several models say, scored, compared.

  python scripts/eval_answers.py --questions my.json --base_model MERGED --models output/ppo output/dpo
  python scripts/eval_answers.py --questions my.json --models before=A after=B --judge http://127.0.0.1:8000/v1
  python scripts/eval_answers.py --questions my.json --answers a=predictions.json b=other.json
Questions in any format that sft.py reads; the last answer of a record is the reference. The first model is what the
others are compared with. Greedy unless told otherwise. An interrupted run goes on when it is run again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import InferenceArguments, arg, list_arg
from utils.core.command_line import describe_arguments, describe_environment, run, select_gpus
from utils.core.errors import InputError, raise_problems
from utils.core.files import hash_file, remove
from utils.core.records import RECORD_SUFFIXES, list_data_files
from utils.evaluation.arguments import GreedyArguments, warn_unused

if TYPE_CHECKING:
    from utils.evaluation.answers.comparison import Change
    from utils.evaluation.arena.matchmaking import Question
    from utils.evaluation.arena.players import Player

logger = logging.getLogger("eval_answers")

RESULT, PAGE, ANSWERS, VERDICTS = "answers.json", "answers", "answers", "verdicts.jsonl"
JUDGE = "judge"  # the endpoint's name; its key is in JUDGE_API_KEY


@dataclass
class AnswerArguments(GreedyArguments):
    """How answers are drawn; unlike elsewhere, always the likeliest token by default."""

    max_new_tokens: int = arg(256, help="Longest answer.")


@dataclass
class EvalArguments:
    """What is asked, who answers, what decides, and where the result goes."""

    questions: list[str] = list_arg(
        help="Files or folders (json, jsonl, parquet) of questions with their answers, in any format that sft.py "
        "reads; a record's 'id' and 'category' are used where they are there."
    )
    models: list[str] = list_arg(
        help="Models loaded here, each a folder or NAME=FOLDER: a model, an adapter (its base is the one it records) "
        "or a GGUF file; --base_model with --lora_model is one more, the first."
    )
    answers: list[str] = list_arg(
        help='Answers made before, each as NAME=FILE: {"id", "answer"}, or inference_hf.py\'s predictions file.'
    )
    servers: list[str] = list_arg(
        help="OpenAI-compatible servers, each as NAME=URL or NAME=URL#MODEL; the key is in the environment variable "
        "NAME_API_KEY, the name in capitals."
    )
    metric: Literal["exact", "contained", "number", "rouge_l", "chrf"] = arg(
        "chrf", help="Which score says whether an answer is better, worse or the same; all are reported."
    )
    category_field: str = arg("category", help="Field of a record by which scores are reported, too.")
    judge: str | None = arg(
        help="Let this model compare each answer with the first model's, in both orders: URL or URL#MODEL of an "
        "OpenAI-compatible server; its key is in JUDGE_API_KEY. Its verdicts, not --metric, say what is better."
    )
    judge_prompt: str | None = arg(help="File with another prompt for the judge; {question}, {answer_a}, {answer_b}.")
    judge_max_tokens: int = arg(1024, help="Longest reply of the judge, in tokens.")
    workers: int = arg(4, help="Answers that the judge compares at once.")
    output_dir: str = arg("output/answers", help="Folder for answers.json, the page and each model's answers.")
    batch_size: int = arg(16, help="Questions answered at once; memory grows with it, answers do not change.")
    overwrite: bool = arg(False, help="Replace answers and verdicts of other models, questions or settings.")

    def __post_init__(self) -> None:
        checks = {
            "pass --questions FILE: questions with their answers, in any format that sft.py reads": self.questions,
            f"--batch_size {self.batch_size}: need at least 1": self.batch_size >= 1,
            f"--workers {self.workers}: need at least 1": self.workers >= 1,
            f"--judge_max_tokens {self.judge_max_tokens}: need at least 1": self.judge_max_tokens >= 1,
            "--judge_prompt needs --judge": self.judge or not self.judge_prompt,
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])


def main(model_args: InferenceArguments, settings: AnswerArguments, args: EvalArguments) -> dict[str, Any]:
    """Evaluate; returns the figures of answers.json by model, the single answers apart."""
    select_gpus(model_args)  # before torch is imported
    from utils.evaluation.answers.comparison import FEW, mean_scores
    from utils.evaluation.answers.scores import score_answer
    from utils.evaluation.arena.players import LocalPlayer, answer_bank
    from utils.evaluation.result_files import AnswersResult, read_result_of, write_result
    from utils.report.answers import write_answers

    for noisy in ("httpx", "httpx2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # a line for every request
    folder, questions = Path(args.output_dir), read_bank(args)
    players = list_players(model_args, settings, args)
    for player in players:
        if isinstance(player, LocalPlayer):
            player.check(questions, settings)
    judging = open_judge(args) if args.judge else None
    answers = {
        player.name: answer_bank(
            player,
            questions,
            settings,
            folder / ANSWERS / f"{player.name}.jsonl",
            batch_size=args.batch_size * settings.prompts_per_answer,
            overwrite=args.overwrite,
        )
        for player in players
    }
    pairs = {name: zip(said, questions, strict=True) for name, said in answers.items()}
    scores = {name: [score_answer(said, asked.reference or "") for said, asked in own] for name, own in pairs.items()}
    verdicts = judge(judging, args, questions, answers) if judging else {}
    models = {
        player.name: {
            "metric": args.metric,
            "source": player.source,
            "scores": mean_scores(scores[player.name]),
            "by_category": by_category(questions, scores[player.name]),
            **compare_with_first(args.metric, player.name, scores, verdicts),
        }
        for player in players
    }
    record = {
        "kind": "answers",
        "settings": describe_arguments(model_args, settings, args),
        "question_files": {
            str(path): hash_file(path) for name in args.questions for path in list_data_files(name, RECORD_SUFFIXES)
        },
        "judge": judging.name if judging else None,
        "environment": describe_environment(),
        "models": models,
        "questions": describe_questions(questions, answers, scores, find_changes(args.metric, scores, verdicts)),
    }
    # Made of the answers, which are kept: an older result is replaced, so that one more model can be added.
    write_result(folder / RESULT, record)
    write_answers(read_result_of(AnswersResult, folder / RESULT), folder / PAGE, FEW)
    print_table(models)
    report(models, len(questions), folder, FEW)
    return models


# ---------------------------------------------------------------- questions and models


def read_bank(args: EvalArguments) -> list[Question]:
    """The questions, each under an id of its own: the record's, else its place. Raises: InputError."""
    from utils.data.questions import read_questions
    from utils.evaluation.arena.matchmaking import Question
    from utils.evaluation.banks import with_own_ids

    found = read_questions(args.questions)
    name = args.category_field
    if name != "category" and not any(name in question.record for question in found):
        raise InputError(f"--category_field {name}: no record has it; the first has {sorted(found[0].record)}")
    return list(
        with_own_ids(
            (
                question.location,
                Question(
                    question.text,
                    str(question.record.get(name) or ""),
                    str(number if question.record.get("id") is None else question.record["id"]),
                    question.reference,
                    tuple(question.messages[:-1]),
                ),
            )
            for number, question in enumerate(found, 1)
        )
    )


def list_players(model_args: InferenceArguments, settings: AnswerArguments, args: EvalArguments) -> list[Player]:
    """Who answers; says which settings reach nobody. Raises: InputError."""
    from utils.evaluation.arena.players import AnswersPlayer, find_players
    from utils.evaluation.endpoints import unsent_flags

    players = find_players(model_args, args.models, args.answers, args.servers, JUDGE if args.judge else None)
    if not players:
        raise InputError("pass --base_model FOLDER, --models, --answers or --servers: who answers the questions")
    if args.judge and len(players) < 2:
        raise InputError("--judge compares the answers of two models; pass another one in --models")
    if all(isinstance(player, AnswersPlayer) for player in players):
        warn_unused(settings, "--answers are there already")
    if args.servers and (unsent := unsent_flags(settings)):
        logger.warning("OpenAI's protocol has no word for %s: servers are not told", ", ".join(unsent))
    return players


# ---------------------------------------------------------------- judging


def open_judge(args: EvalArguments) -> Any:
    """The judge, asked whether it is there. Raises: InputError."""
    from utils.evaluation.arena.judging import Judge, read_judge_prompt
    from utils.evaluation.endpoints import Endpoint

    prompt = read_judge_prompt(args.judge_prompt)
    return Judge(Endpoint(JUDGE, args.judge or ""), prompt, args.judge_max_tokens)


def judge(
    judging: Any, args: EvalArguments, questions: Sequence[Question], answers: Mapping[str, Sequence[str]]
) -> dict[str, list[Change | None]]:
    """What the judge says of every model but the first, by question; what was said before is not asked again."""
    from utils.evaluation.arena.judging import judge_battles, list_battles
    from utils.evaluation.arena.votes import VoteFile

    first, *others = answers
    battles = {name: list_battles(questions, {first: answers[first], name: answers[name]}) for name in others}
    path = Path(args.output_dir) / VERDICTS
    every = [battle for own in battles.values() for battle in own]
    if args.overwrite:
        remove(path)
    votes = VoteFile(path)
    try:
        counts = judge_battles(judging, every, votes, args.workers)
    finally:
        votes.close()
    if counts["errors"]:
        logger.warning("%d answers were not judged; run the same command again to have them judged", counts["errors"])
    said = {vote.id: vote.vote for vote in votes.log.votes}
    meaning: dict[Any, Change] = {"left": -1, "right": 1, "tie": 0}
    return {name: [meaning.get(said.get(judging.id_of(one))) for one in own] for name, own in battles.items()}


# ---------------------------------------------------------------- figures


def find_changes(
    metric: str, scores: Mapping[str, Sequence[Mapping[str, float]]], verdicts: Mapping[str, Sequence[Change | None]]
) -> Mapping[str, Sequence[Change | None]]:
    """Of every model but the first, whether each answer is better than the first's: by the judge, or the metric."""
    from utils.evaluation.answers.comparison import change_of

    first, *others = scores
    if verdicts:
        return verdicts
    return {
        name: [change_of(metric, a, b) for a, b in zip(scores[first], scores[name], strict=True)] for name in others
    }


def compare_with_first(
    metric: str,
    name: str,
    scores: Mapping[str, Sequence[Mapping[str, float]]],
    verdicts: Mapping[str, Sequence[Change | None]],
) -> dict[str, Any]:
    """What changed from the first model, by the metric, and by the judge where there is one; {} of the first."""
    from utils.evaluation.answers.comparison import compare, count_changes

    first = next(iter(scores))
    if name == first:
        return {}
    judged = {"judged": count_changes(verdicts[name])} if verdicts else {}
    return {"changes": compare(metric, scores[first], scores[name]), **judged}


def by_category(questions: Sequence[Question], scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """{category: mean_scores}; {} where the questions have none."""
    from utils.evaluation.answers.comparison import mean_scores

    names = dict.fromkeys(question.category for question in questions)
    pairs = list(zip(questions, scores, strict=True))
    if not any(names):
        return {}
    return {name: mean_scores([own for question, own in pairs if question.category == name]) for name in names}


def describe_questions(
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[str]],
    scores: Mapping[str, Sequence[Mapping[str, float]]],
    changes: Mapping[str, Sequence[Change | None]],
) -> list[dict[str, Any]]:
    """A row for every question: what was asked, what every model said, and how good it is."""
    rows: list[dict[str, Any]] = []
    for place, question in enumerate(questions):
        given: dict[str, Any] = {
            name: {
                "text": said[place],
                "scores": dict(scores[name][place]),
                **({"change": changes[name][place]} if name in changes else {}),
            }
            for name, said in answers.items()
        }
        row = {"id": question.id, "category": question.category, "question": question.text}
        before = {"before": list(question.before)} if question.before else {}
        rows.append({**row, "reference": question.reference, **before, "answers": given})
    return rows


# ---------------------------------------------------------------- reporting


def print_table(models: Mapping[str, Mapping[str, Any]]) -> None:
    """Every model's scores with the interval of the one that decides, on standard output."""
    from utils.evaluation.answers.scores import METRICS

    known = [name for name in METRICS if any(name in figures["scores"] for figures in models.values())]
    width = max(map(len, ("", *models)))
    print(f"{'%':{width}}  {''.join(f'{name:>11}' for name in known)}  95 % interval of {metric_of(models)}")
    for model, figures in models.items():
        scores = figures["scores"]
        cells = "".join(f"{scores[name]['score']:11.1f}" if name in scores else f"{'-':>11}" for name in known)
        interval = scores.get(figures["metric"], {}).get("interval")
        print(f"{model:{width}}  {cells}  {'-' if interval is None else '{:.1f} - {:.1f}'.format(*interval)}")


def metric_of(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The metric that decides, the same for all models."""
    return str(next(iter(models.values()))["metric"])


def report(models: Mapping[str, Mapping[str, Any]], count: int, folder: Path, few: int) -> None:
    """What changed from the first model, the files and the next command, in the log."""
    first, *others = models
    if count < few:
        logger.warning("only %d questions: differences are mostly chance; ask %d at least", count, few)
    lines = []
    for name in others:
        changes = {metric_of(models): models[name]["changes"], "the judge": models[name].get("judged")}
        lines += [f"\n  {name} against {first}, by {how}: {say(found)}" for how, found in changes.items() if found]
    logger.info(
        "%d questions, %d models%s\n  files in %s: %s, %s.html, %s.md, %s/\n  next: %s",
        *(count, len(models), "".join(lines), folder, RESULT, PAGE, PAGE, ANSWERS),
        f"open {folder / PAGE}.html in a browser",
    )


def say(changes: Mapping[str, Any]) -> str:
    """34 better, 12 worse, 134 the same, +3.2 points (+1.0 to +5.4), p = 0.002."""
    words = f"{changes['better']} better, {changes['worse']} worse, {changes['same']} the same"
    if changes.get("difference") is not None:
        interval = changes.get("interval")
        between = "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
        words += f", {changes['difference']:+.1f} points{between}"
    return words + ("" if changes["p_value"] is None else f", p = {changes['p_value']:.2g}")


if __name__ == "__main__":
    run(
        main,
        InferenceArguments,
        AnswerArguments,
        EvalArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
