"""Self-Instruct: a model behind an OpenAI-compatible server writes tasks like some seed tasks -> data for sft.py.

  python scripts/generate_instructions.py --server_url https://api.openai.com/v1#gpt-4.1-mini --price_in 0.4 \
      --price_out 1.6 --max_cost 5
  python scripts/generate_instructions.py --server_url http://127.0.0.1:8000/v1 --language en --max_tasks 200
The key is read from OPENAI_API_KEY. An interrupted run goes on when it is run again, also with higher limits.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import arg
from utils.core.command_line import describe_arguments, run, save_run_config, shell_command
from utils.core.errors import InputError, Unfinished, raise_problems
from utils.core.files import HeldFolder, atomic_file, hash_file

if TYPE_CHECKING:
    from utils.data.self_instruct import Pool, Task
    from utils.evaluation.endpoints import Endpoint, ServerAnswer
    from utils.evaluation.progress import Parts

logger = logging.getLogger("generate_instructions")

SEEDS = Path(__file__).resolve().parents[1] / "examples" / "data" / "instructions" / "seed_tasks.json"
RESULT, REQUESTS = "instructions.json", "requests.jsonl"
MOST_FAILURES = 3  # requests in a row that the server answers with errors, after all tries
MOST_IN_VAIN = 10  # requests in a row whose answers have nothing new
SENT_FLAGS = (
    "server_url",
    "language",
    "tasks_per_request",
    "rouge_threshold",
    "temperature",
    "max_new_tokens",
    "seed",
)


@dataclass
class GenerateArguments:
    """Who writes, after which examples, how much, and what it may cost."""

    server_url: str | None = arg(help="URL or URL#MODEL of an OpenAI-compatible server; its key: OPENAI_API_KEY.")
    seed_tasks: str = arg(
        str(SEEDS),
        help="Tasks written by people (json, jsonl): instruction, input, output; those of --language count.",
    )
    language: Literal["zh", "en"] = arg("zh", help="The language of the request, of its examples and of new tasks.")
    output_dir: str = arg("output/instructions", help=f"Folder for {RESULT} and the record of all requests.")
    max_tasks: int = arg(1000, help="End with so many new tasks.")
    max_cost: float | None = arg(help="Ask no more where this could be exceeded, in the currency of the prices.")
    price_in: float = arg(0.0, help="Price of a million tokens that are sent.")
    price_out: float = arg(0.0, help="Price of a million tokens that are written.")
    tasks_per_request: int = arg(8, help="New tasks that a request asks for.")
    num_connections: int = arg(4, help="Requests that are under way at once.")
    rouge_threshold: float = arg(
        0.7, help="A task is new if the ROUGE-L of its instruction with each one kept, and each seed, is below, 0-1."
    )
    temperature: float = arg(1.0, help="How freely the model writes.")
    max_new_tokens: int = arg(4096, help="Longest answer to a request, in tokens.")
    seed: int = arg(42, help="Decides which examples a request shows.")
    overwrite: bool = arg(False, help="Let go what another run left in the folder.")

    def __post_init__(self) -> None:
        counts = ("max_tasks", "tasks_per_request", "num_connections", "max_new_tokens")
        problems = [f"--{name} {getattr(self, name)}: need at least 1" for name in counts if getattr(self, name) < 1]
        checks = {
            "--server_url: pass the URL of an OpenAI-compatible server, http://127.0.0.1:8000/v1 say": self.server_url,
            f"--rouge_threshold {self.rouge_threshold}: need 0 < threshold <= 1": 0 < self.rouge_threshold <= 1,
            f"--temperature {self.temperature}: need 0 or more": self.temperature >= 0,
            "--price_in and --price_out: need 0 or more": min(self.price_in, self.price_out) >= 0,
            f"--max_cost {self.max_cost}: need more than 0": self.max_cost is None or self.max_cost > 0,
            "--max_cost: what a request costs is not known; pass --price_in and --price_out (of a million tokens)": (
                self.max_cost is None or self.price_in + self.price_out > 0
            ),
        }
        raise_problems(problems + [problem for problem, holds in checks.items() if not holds])


@dataclass
class Progress:
    """What there is so far.

    Attributes:
        requests: that were answered; tokens: sent and written; left_out: tasks by the reason.
        uncounted: answers whose tokens the server did not count.
    """

    tasks: list[Task] = field(default_factory=list)
    requests: int = 0
    sent: int = 0
    written: int = 0
    uncounted: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def cost(self, args: GenerateArguments) -> float:
        """In the currency of the prices."""
        return (self.sent * args.price_in + self.written * args.price_out) / 1e6

    def add(self, value: dict[str, Any], most: int) -> None:
        """Count an answered request, as its line in the record has it; tasks beyond `most` are left aside."""
        from utils.data.self_instruct import Task

        self.requests += 1
        self.uncounted += value["tokens"] is None
        sent, written = value["tokens"] or (0, 0)
        self.sent, self.written = self.sent + sent, self.written + written
        self.left_out.update(value["left_out"])
        self.tasks += [Task(**task) for task in value["kept"]][: max(most - len(self.tasks), 0)]


def main(args: GenerateArguments) -> dict[str, Any]:
    """Ask until there are enough tasks, or the limit of the cost is near; returns the figures."""
    from utils.data.self_instruct import Pool, language_of, read_seeds
    from utils.evaluation.endpoints import Endpoint
    from utils.evaluation.progress import Parts

    every = read_seeds(args.seed_tasks)
    seeds = [task for task in every if language_of(task) == args.language]
    if not seeds:
        raise InputError(
            f"--seed_tasks {args.seed_tasks}: none of {len(every)} tasks is in --language {args.language}"
        )
    endpoint = Endpoint("openai", str(args.server_url))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    held = HeldFolder(folder)
    settings = {name: getattr(args, name) for name in SENT_FLAGS} | {"sha256_of_seeds": hash_file(args.seed_tasks)}
    record = Parts(folder / REQUESTS, settings, args.overwrite)
    progress = Progress()
    while (value := record.get(progress.requests)) is not None:
        progress.add(value, args.max_tasks)
    pool = Pool(args.rouge_threshold)
    pool.add(task.instruction for task in [*seeds, *progress.tasks])
    resumed = len(progress.tasks)
    ended = "there were enough already"
    try:
        if resumed < args.max_tasks:
            assert endpoint.model  # found before there are threads, each of which would ask for it
            ended = ask(args, endpoint, seeds, pool, record, progress)
    finally:
        write_tasks(folder / RESULT, progress.tasks)
        save_run_config(folder, describe_arguments(args), {"model": str(args.server_url)})
        held.release()
    report(args, folder, progress, resumed, ended)
    return {
        **{"tasks": len(progress.tasks), "resumed": resumed, "requests": progress.requests},
        **{"tokens_in": progress.sent, "tokens_out": progress.written, "cost": round(progress.cost(args), 6)},
        **{"left_out": dict(progress.left_out), "ended": ended},
    }


# ---------------------------------------------------------------- asking


def ask(
    args: GenerateArguments, endpoint: Endpoint, seeds: list[Task], pool: Pool, record: Parts, progress: Progress
) -> str:
    """Have requests under way until a limit is reached; each answer is written down as it comes.

    Returns: why it ended. Raises: Unfinished when the server fails; InputError where no request can succeed.
    """
    from tqdm import tqdm

    failures = vain = 0
    submitted = progress.requests
    under_way: set[Future[ServerAnswer]] = set()
    with (
        tqdm(total=args.max_tasks, initial=len(progress.tasks), unit="task", desc="writing") as bar,
        ThreadPoolExecutor(args.num_connections) as threads,
    ):
        try:
            while True:
                ended = reason_to_end(args, progress, len(under_way), vain)
                if ended and not under_way:
                    return ended
                while not ended and len(under_way) < args.num_connections:
                    text = next_request(args, seeds, progress.tasks, submitted)
                    options = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
                    under_way.add(threads.submit(endpoint.answer, [{"role": "user", "content": text}], options))
                    submitted += 1
                    ended = reason_to_end(args, progress, len(under_way), vain)
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for answer in answers_of(done):
                    if isinstance(answer, str):
                        failures += 1
                        logger.warning("a request failed: %s", answer)
                        if failures >= MOST_FAILURES:
                            raise Unfinished(f"{failures} requests in a row failed: {answer}; run it again to go on")
                        continue
                    failures = 0
                    before = len(progress.tasks)
                    value = sort_tasks(answer, pool)
                    record.add(value, progress.requests)
                    progress.add(value, args.max_tasks)
                    vain = 0 if value["kept"] else vain + 1
                    bar.update(len(progress.tasks) - before)
                    cost = f", cost {progress.cost(args):.4g}" if args.price_in + args.price_out else ""
                    bar.set_postfix_str(f"{progress.sent:,} + {progress.written:,} tokens{cost}")
                    if answer.tokens is None and args.max_cost is not None:
                        raise InputError(
                            "the server does not say how many tokens it took: --max_cost cannot be kept; leave it out"
                        )
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def reason_to_end(args: GenerateArguments, progress: Progress, under_way: int, vain: int) -> str | None:
    """Why no further request is begun; None: one is."""
    if len(progress.tasks) >= args.max_tasks:
        return "enough tasks"
    if vain >= MOST_IN_VAIN:
        return f"{vain} requests in a row brought nothing new"
    if args.max_cost is not None:
        # Those under way, and the next one, cost what the others did; before the first answer one is asked alone.
        each = progress.cost(args) / progress.requests if progress.requests else 0.0
        if progress.cost(args) + each * (under_way + 1) > args.max_cost or (not progress.requests and under_way):
            return "the limit of the cost is near" if progress.requests else "the cost of a request is not known yet"
    return None


def next_request(args: GenerateArguments, seeds: list[Task], kept: list[Task], number: int) -> str:
    """The text of request `number`."""
    from utils.data.self_instruct import write_request

    draw = random.Random(f"{args.seed}-{number}")
    return write_request(seeds, kept, args.tasks_per_request, args.language, draw)


def answers_of(done: set[Future[ServerAnswer]]) -> Iterator[ServerAnswer | str]:
    """Each answer, or what went wrong instead."""
    from utils.evaluation.endpoints import EndpointError

    for future in done:
        try:
            yield future.result()
        except EndpointError as error:
            yield str(error)


def sort_tasks(answer: ServerAnswer, pool: Pool) -> dict[str, Any]:
    """The line of a request in the record: its tokens, the tasks that are kept, and why others are not."""
    from utils.data.self_instruct import read_answer

    tasks, left_out = read_answer(answer.text)
    kept = []
    for task in tasks:
        if pool.nearest(task.instruction):
            left_out["too similar"] += 1
        else:
            pool.add([task.instruction])
            kept.append(task.record())
    tokens = list(answer.tokens) if answer.tokens else None
    return {"tokens": tokens, "finish_reason": answer.finish_reason, "kept": kept, "left_out": dict(left_out)}


# ---------------------------------------------------------------- reporting


def write_tasks(path: Path, tasks: list[Task]) -> None:
    """The tasks in the Alpaca format, a record a line."""
    lines = [json.dumps(task.record(), ensure_ascii=False) for task in tasks]
    with atomic_file(path) as file:
        file.write("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")


def report(args: GenerateArguments, folder: Path, progress: Progress, resumed: int, ended: str) -> None:
    """The summary, the files and the next command, in the log."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in progress.left_out.most_common())
    cost = f", cost {progress.cost(args):.4g}" if args.price_in + args.price_out else ""
    if progress.uncounted:
        logger.warning("of %d answers the server did not say how many tokens they took", progress.uncounted)
    if ended.endswith("nothing new"):
        logger.warning("%s: more seed tasks, a higher --temperature or --rouge_threshold may help", ended)
    logger.info(
        "%d tasks (%d of an earlier run) from %d requests; %d + %d tokens%s; ended: %s\n  left out: %s\n"
        "  files in %s: %s, %s; read some of them before training on them\n  next: %s",
        *(len(progress.tasks), resumed, progress.requests, progress.sent, progress.written, cost, ended),
        *(reasons or "none", folder, RESULT, REQUESTS),
        shell_command("bash", "scripts/run_sft.sh", MODEL="MODEL", DATA=folder / RESULT),
    )


if __name__ == "__main__":
    run(main, GenerateArguments, description=__doc__)
