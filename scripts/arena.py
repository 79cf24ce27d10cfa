"""Which model answers better: blind battles in the browser, or a model as judge -> votes, ratings, pictures.

  python scripts/arena.py --models sft=output/sft ppo=output/ppo --servers big=http://127.0.0.1:8000/v1
  python scripts/arena.py --report
  python scripts/arena.py --answers a=a.jsonl b=b.jsonl --judge http://127.0.0.1:8000/v1
The page is served to this machine only (http://127.0.0.1:7860). Votes go to <output_dir>/votes.jsonl, each on the
disk before names are shown; --report makes ratings of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.core.arguments import GenerationArguments, InferenceArguments, arg, list_arg
from utils.core.command_line import describe_arguments, describe_environment, run, select_gpus, shell_command
from utils.core.errors import InputError, raise_problems
from utils.core.files import hash_file, hash_json, read_json, remove, write_json
from utils.core.machine import check_port
from utils.evaluation.arguments import refuse_beams, warn_unused
from utils.evaluation.progress import settings_beside
from utils.web.access import WebArguments, launch, read_accounts

if TYPE_CHECKING:
    from utils.evaluation.arena.page import ArenaPage
    from utils.evaluation.arena.players import Player
    from utils.evaluation.arena.votes import Vote

logger = logging.getLogger("arena")

QUESTIONS = Path(__file__).resolve().parents[1] / "examples" / "data" / "arena" / "questions.jsonl"
VOTES, VERDICTS, ANSWERS = "votes.jsonl", "verdicts.jsonl", "answers"
JUDGE = "judge"  # the endpoint's name; its key is in JUDGE_API_KEY
RESULT, RATINGS, PAIRS = "arena.json", "arena.png", "arena_pairs.png"


@dataclass
class ArenaArguments:
    """Who takes part, what is asked, who judges, and where votes and ratings go."""

    models: list[str] = list_arg(
        help="Models loaded here, each as NAME=FOLDER: a model, an adapter (its base is the one it records) or a GGUF "
        "file; --base_model with --lora_model is one more."
    )
    answers: list[str] = list_arg(
        help='Answers made before, each as NAME=FILE: {"id", "answer"}, or inference_hf.py\'s predictions file.'
    )
    servers: list[str] = list_arg(
        help="OpenAI-compatible servers, each as NAME=URL or NAME=URL#MODEL; the key is in the environment variable "
        "NAME_API_KEY, the name in capitals."
    )
    questions: list[str] = list_arg(
        help="Files or folders (json, jsonl, parquet) of questions: id, category, question, and reference for judges; "
        "default: those of examples/data/arena."
    )
    categories: list[str] = list_arg(help="Only questions, or votes, of these categories; default: all.")
    judge: str | None = arg(
        help="Let this model judge all pairs instead of people: URL or URL#MODEL of an OpenAI-compatible server; its "
        "key is in JUDGE_API_KEY."
    )
    judge_prompt: str | None = arg(help="File with another prompt for the judge; {question}, {answer_a}, {answer_b}.")
    judge_max_tokens: int = arg(1024, help="Longest reply of the judge, in tokens.")
    workers: int = arg(4, help="Battles that the judge decides at once.")
    report: bool = arg(False, help="Only make ratings of the votes there are.")
    votes: list[str] = list_arg(
        help="With --report, files of votes; default: votes.jsonl and verdicts.jsonl of --output_dir."
    )
    bootstrap_rounds: int = arg(1000, help="Times that the votes are drawn anew for the intervals.")
    elo_k: float = arg(16.0, help="Points of Elo that a vote moves at most: more follows faster, and is less sure.")
    output_dir: str = arg("output/arena", help="Folder for votes, answers, arena.json and pictures.")
    overwrite: bool = arg(False, help="With --judge, replace answers and verdicts of other models or settings.")

    def __post_init__(self) -> None:
        checks = {
            "--judge and --report exclude each other; pass one": not (self.judge and self.report),
            "--votes is for --report; votes are added to <output_dir>/votes.jsonl": self.report or not self.votes,
            "--judge_prompt needs --judge": bool(self.judge) or not self.judge_prompt,
            f"--judge_max_tokens {self.judge_max_tokens}: need at least 1": self.judge_max_tokens >= 1,
            f"--workers {self.workers}: need at least 1": self.workers >= 1,
            f"--bootstrap_rounds {self.bootstrap_rounds}: need at least 1": self.bootstrap_rounds >= 1,
            f"--elo_k {self.elo_k}: need more than 0": self.elo_k > 0,
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])


def main(
    model_args: InferenceArguments, settings: GenerationArguments, web: WebArguments, args: ArenaArguments
) -> dict[str, Any]:
    """Serve the page until Ctrl-C, have a model judge, or report; returns the figures of arena.json."""
    refuse_beams(settings)
    if args.report:
        warn_unused(settings, "--report", but=("seed",))
        return report(args, settings.seed, find_votes(args))
    if args.judge:
        return judge(model_args, settings, web, args)
    page = start(model_args, settings, web, args)
    try:
        page.blocks.block_thread()
    finally:
        stop(page)
    return report(args, settings.seed, [page.arena.votes.path]) if page.arena.votes.log.counted else {}


# ---------------------------------------------------------------- people vote


def start(
    model_args: InferenceArguments, settings: GenerationArguments, web: WebArguments, args: ArenaArguments
) -> ArenaPage:
    """Load the models and serve the page; returns while it is being served (for notebooks, and tests)."""
    accounts = read_accounts(web)
    check_port(web.host, web.port)
    select_gpus(model_args)  # before torch is imported
    from utils.evaluation.arena.matchmaking import Arena, read_bank
    from utils.evaluation.arena.votes import VoteFile

    bank = read_bank(args.questions or [str(QUESTIONS)], args.categories)
    players = list_players(model_args, settings, args)
    by_name = {player.name: player for player in players}
    votes = VoteFile(Path(args.output_dir) / VOTES)
    try:
        arena = Arena(list(by_name), votes, bank, lambda name, question: by_name[name].can_answer(question))
        record_sources(votes.path, players, describe_arguments(model_args, settings))
        from utils.evaluation.arena.page import ARENA_CSS, RESULTS_CSS, ArenaPage  # gradio takes seconds

        for player in players:
            player.load(web.max_batch_size * settings.prompts_per_answer)
        figures = partial(rate_votes, rounds=args.bootstrap_rounds, k=args.elo_k, seed=settings.seed)
        page = ArenaPage(
            players,
            arena,
            settings,
            lambda category: figures([vote for vote in votes.log.counted if category in (None, vote.category)]),
            title=web.title,
            language=web.language,
            max_answers=web.max_batch_size,
        )
        launch(page.blocks, web, accounts, ARENA_CSS + RESULTS_CSS)
    except BaseException:
        close(players, votes)
        raise
    logger.info("%d models, %d questions, %d votes in %s", len(players), len(bank), len(votes.log.votes), votes.path)
    return page


def list_players(
    model_args: InferenceArguments, settings: GenerationArguments, args: ArenaArguments, judge: str | None = None
) -> list[Player]:
    """Who takes part; says which settings servers are not told. Raises: InputError."""
    from utils.evaluation.arena.players import find_players
    from utils.evaluation.endpoints import unsent_flags

    if args.servers and (unsent := unsent_flags(settings)):
        logger.warning("OpenAI's protocol has no word for %s: servers are not told", ", ".join(unsent))
    return find_players(model_args, args.models, args.answers, args.servers, judge)


def stop(page: ArenaPage) -> None:
    """End the page and what answers on it."""
    page.blocks.close(verbose=False)
    close(list(page.players.values()), page.arena.votes)


def close(players: Sequence[Player], votes: Any) -> None:
    """Free the models, and the file of votes."""
    for player in players:
        player.close()
    votes.close()


def record_sources(votes: Path, players: Sequence[Player], settings: dict[str, Any]) -> None:
    """Write beside a file of votes what its models' names stand for. Raises: InputError if one stood for another."""
    from utils.evaluation.arena.players import check_sources

    path = settings_beside(votes)
    recorded = read_json(path)["models"] if path.is_file() else {}
    write_json(path, {"models": check_sources(recorded, players, path), "settings": settings})


# ---------------------------------------------------------------- a model judges


def judge(
    model_args: InferenceArguments, settings: GenerationArguments, web: WebArguments, args: ArenaArguments
) -> dict[str, Any]:
    """Every pair of models on every question, in both orders; what was done before is not asked again."""
    select_gpus(model_args)  # before torch is imported
    from utils.evaluation.arena.judging import Judge, judge_battles, list_battles, read_judge_prompt
    from utils.evaluation.arena.matchmaking import read_bank
    from utils.evaluation.arena.players import LocalPlayer, answer_bank
    from utils.evaluation.arena.votes import VoteFile
    from utils.evaluation.endpoints import Endpoint

    prompt = read_judge_prompt(args.judge_prompt)
    bank = read_bank(args.questions or [str(QUESTIONS)], args.categories)
    judging = Judge(Endpoint(JUDGE, args.judge or ""), prompt, args.judge_max_tokens)
    players = list_players(model_args, settings, args, JUDGE)
    if len(players) < 2:
        raise InputError(f"a battle takes two models; got {len(players)}: pass --models, --answers or --servers")
    for player in players:
        if isinstance(player, LocalPlayer):
            player.check(bank, settings)
    folder, path = Path(args.output_dir), Path(args.output_dir) / VERDICTS
    answers = {
        player.name: answer_bank(
            player,
            bank,
            settings,
            folder / ANSWERS / f"{player.name}.jsonl",
            batch_size=web.max_batch_size * settings.prompts_per_answer,
            overwrite=args.overwrite,
        )
        for player in players
    }
    if args.overwrite:
        remove(path)
        remove(settings_beside(path))
    votes = VoteFile(path)
    try:
        described = {"judge": judging.name, "sha256_of_judge_prompt": hash_json(prompt)}
        record_sources(path, players, {**describe_arguments(model_args, settings, args), **described})
        counts = judge_battles(judging, list_battles(bank, answers), votes, args.workers)
    finally:
        votes.close()
    if counts["errors"]:
        logger.warning("%d battles failed; run the same command again to have them decided", counts["errors"])
    return report(args, settings.seed, [path], counts)


# ---------------------------------------------------------------- ratings


def find_votes(args: ArenaArguments) -> list[Path]:
    """The files that --report reads. Raises: InputError if there is none."""
    if args.votes:
        return [Path(path) for path in args.votes]
    found = [path for name in (VOTES, VERDICTS) if (path := Path(args.output_dir) / name).is_file()]
    if not found:
        raise InputError(f"no {VOTES} or {VERDICTS} in {args.output_dir}; vote first, or pass --votes FILE")
    return found


def report(
    args: ArenaArguments, seed: int, paths: Sequence[Path], counts: dict[str, int] | None = None
) -> dict[str, Any]:
    """Write arena.json and pictures, print the table; they are made of the votes, so older ones are replaced."""
    from utils.evaluation.arena.judging import describe_judges
    from utils.evaluation.arena.matchmaking import check_categories
    from utils.evaluation.arena.ratings import plot_pairs, plot_ratings
    from utils.evaluation.arena.votes import read_votes
    from utils.evaluation.result_files import write_result

    log = read_votes(paths)
    check_categories(args.categories, (vote.category for vote in log.votes))
    chosen = [vote for vote in log.votes if not args.categories or vote.category in args.categories]
    counted = [vote for vote in chosen if vote.vote is not None]
    if not counted:
        raise InputError(f"{', '.join(map(str, paths))}: no vote that counts")
    how: dict[str, Any] = {"rounds": args.bootstrap_rounds, "k": args.elo_k, "seed": seed}
    figures = rate_votes(counted, **how)
    names = list(dict.fromkeys(vote.category for vote in counted))
    sources: dict[str, Any] = {}
    answering: dict[str, Any] = {}
    for path in paths:
        if (beside := settings_beside(path)).is_file():
            recorded = read_json(beside)
            sources |= recorded["models"]
            answering[str(path)] = recorded["settings"]
    result = {
        "kind": "arena",
        "settings": describe_arguments(args),
        "votes": {str(path): hash_file(path) for path in paths},
        "left_out": {"unparsed": len(chosen) - len(counted), "duplicates": log.duplicates, "torn": log.torn},
        **({"judging": counts} if counts else {}),
        "sources": sources,
        "answering": answering,
        "environment": describe_environment(),
        **figures,
        "categories": {name: rate_votes([vote for vote in counted if vote.category == name], **how) for name in names},
        "judges": describe_judges(chosen),
    }
    folder = Path(args.output_dir)
    write_result(folder / RESULT, result)
    plot_ratings(figures, folder / RATINGS)
    plot_pairs(figures, folder / PAIRS)
    print_table(figures)
    log_report(result, folder, paths)
    return result


def rate_votes(votes: Sequence[Vote], rounds: int, k: float, seed: int) -> dict[str, Any]:
    """Figures of votes: people's in the order they came in, a judge's in one that does not depend on its workers."""
    from utils.evaluation.arena.ratings import rate_models
    from utils.evaluation.arena.votes import HUMAN

    people = [vote for vote in votes if vote.judge == HUMAN]
    judged = sorted((vote for vote in votes if vote.judge != HUMAN), key=lambda vote: vote.id)
    return rate_models([vote.outcome for vote in [*people, *judged]], rounds=rounds, k=k, seed=seed)


def print_table(figures: dict[str, Any]) -> None:
    """Ratings and win rates with their intervals, the strongest model first, on standard output."""
    width = max(len(model["name"]) for model in figures["models"])
    print(f"rank  {'model':{width}}  Bradley-Terry        Elo                  win rate %           won lost tied bad")
    for model in figures["models"]:
        cells = [describe_figure(model, kind, digits) for kind, digits in (("rating", 0), ("elo", 0), ("win_rate", 1))]
        counts = " ".join(f"{model[name]:4}" for name in ("wins", "losses", "ties", "both_bad"))
        print(f"{model['rank']:4}  {model['name']:{width}}  {''.join(f'{cell:21}' for cell in cells)}{counts}")


def describe_figure(model: dict[str, Any], kind: str, digits: int) -> str:
    """1510 (1480 - 1540)."""
    if model[kind] is None:
        return "-"
    low, high = model[f"{kind}_interval"]
    return f"{model[kind]:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def log_report(result: dict[str, Any], folder: Path, paths: Sequence[Path]) -> None:
    """What was counted, what was not, the files and the next command, in the log."""
    left_out = ", ".join(f"{count} {name}" for name, count in result["left_out"].items() if count)
    if len(result["groups"]) > 1:
        groups = " | ".join(", ".join(group) for group in result["groups"])
        logger.warning("no battles connect these groups of models, so their ratings cannot be compared: %s", groups)
    for name, judged in result["judges"].items():
        if judged.get("consistent") is not None:
            logger.info(
                "judge %s: the same verdict in both orders in %.1f %%; the first answer won both in %.1f %%, "
                "the second in %.1f %%",
                *(name, judged["consistent"], judged["prefers_first"], judged["prefers_second"]),
            )
    logger.info(
        "%d battles%s\n  files in %s: %s, %s, %s\n  next: %s",
        *(result["battles"], f" (left out: {left_out})" if left_out else ""),
        *(folder, RESULT, RATINGS, PAIRS),
        shell_command("bash", "scripts/run_arena.sh", "--report", "--votes", *paths),
    )


if __name__ == "__main__":
    run(
        main,
        InferenceArguments,
        GenerationArguments,
        WebArguments,
        ArenaArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
