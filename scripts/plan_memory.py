"""What a training command will need before it starts: memory of each process, settings that fit, time and price.

  python scripts/plan_memory.py pt --model_name_or_path CONFIG_FOLDER --gpu_memory 24GiB [any flag of pt.py]
  PLAN=1 MODEL=path/to/model DATA=zh bash scripts/run_pt.sh --gpu_memory 24GiB
The model's folder needs no weights, only config.json; the stages are pt, sft, rm, ppo and dpo.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.core.arguments import arg
from utils.core.command_line import run
from utils.core.errors import InputError, raise_problems

if TYPE_CHECKING:
    from utils.planning.memory import Plan, Setting
    from utils.training.memory import Record

logger = logging.getLogger("plan")

SIZES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2.0**10, "MI": 2.0**20, "GI": 2.0**30, "TI": 2.0**40}
SHOWN = 6  # suggestions


@dataclass
class PlanArguments:
    """What is asked of the plan; all other flags are those of the training script."""

    gpu_memory: str | None = arg(
        help="Memory of each GPU, such as 24GiB or 80GB: plan for GPUs and suggest settings that fit. Default: for "
        "this machine, its GPU or its CPU."
    )
    processes: int = arg(1, help="Processes (GPUs) of the run; the launchers pass NPROC x NNODES.")
    vocabulary: int | None = arg(
        help="Rows that embeddings will have. Default: of --tokenizer_name_or_path where that is given, else of the "
        "model."
    )
    row_length: int | None = arg(
        help="Tokens of the longest row, where the data is known (rm.py, dpo.py: a prompt with both answers); "
        "default: the longest that the flags allow."
    )
    tokens: str | None = arg(help="Tokens of the whole run, such as 200M: says how long it will take.")
    tokens_per_second: float | None = arg(
        help="The speed of all processes together; default: that of an earlier run of these settings beside "
        "--output_dir."
    )
    price: float = arg(0.0, help="Price of a GPU for an hour, in any currency.")

    def __post_init__(self) -> None:
        problems = [
            f"--{name} {value}: need at least {least}"
            for name, least in (("processes", 1), ("vocabulary", 1), ("row_length", 8))
            if (value := getattr(self, name)) is not None and value < least
        ]
        if self.tokens_per_second is not None and not self.tokens_per_second > 0:
            problems.append(f"--tokens_per_second {self.tokens_per_second}: need a number above 0")
        if self.price < 0:
            problems.append(f"--price {self.price}: need 0 or more")
        for name in ("gpu_memory", "tokens"):
            try:
                read_size(getattr(self, name) or "1", name)
            except InputError as error:
                problems.append(str(error))
        raise_problems(problems)


def read_size(text: str, flag: str) -> float:
    """24GiB -> 24 * 2^30, 200M -> 2e8. Raises: InputError naming the flag."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if found is None or float(found[1]) <= 0 or found[2] not in SIZES:
        raise InputError(f"--{flag} {text}: need a number with a unit, such as 24GiB, 80GB or 200M")
    return float(found[1]) * SIZES[found[2]]


def main(command: Sequence[str], plan_args: PlanArguments) -> dict[str, Any]:
    """Plan a command, [stage, flags ...]; returns its figures."""
    import torch
    from tqdm import tqdm

    from utils.core.command_line import parse_args
    from utils.planning.advice import Footprints, describe, table
    from utils.planning.memory import plan
    from utils.planning.request import STAGES, PlannedRun, read_request
    from utils.training.memory import calibration, device_name, read_records, records_file

    stage: Any = command[0].rpartition("/")[2].removesuffix(".py") if command else ""
    if stage not in STAGES:
        raise InputError(f"{stage or 'no stage'}: name the stage first, one of {', '.join(STAGES)}, then its flags")
    *arguments, run_args = parse_args(*STAGES[stage], PlannedRun, argv=command[1:])
    on_gpu = plan_args.gpu_memory is not None or torch.cuda.is_available()
    setting = read_request(
        stage,
        arguments,
        run_args,
        on_gpu=on_gpu,
        processes=plan_args.processes,
        vocabulary=plan_args.vocabulary or rows_of_tokenizer(arguments),
        length=plan_args.row_length,
    )
    bar = tqdm(desc="rehearsing", unit=" steps", leave=False)
    footprints = Footprints(bar.update)
    planned = plan(setting, footprints.of(setting.job))
    records = read_records(records_file(run_args.output_dir))
    where = "GPU" if on_gpu else "CPU (for a GPU pass --gpu_memory)"
    print(f"{stage} on {where}: {describe(setting)}")
    print(f"{planned.num_weights:,.0f} parameters, {planned.num_trained:,.0f} trained; GB are 1e9 bytes")
    print("\n".join(table(planned)))
    factor, runs = calibration(records, stage, device_name())
    if runs:
        print(f"  {runs} runs of {stage} here took {factor:.2f} x their plan: {factor * planned.peak / 1e9:.3f} GB")
    figures: dict[str, Any] = {"peak": planned.peak, "needed": planned.needed, "parts": planned.parts}
    if plan_args.gpu_memory is not None:
        size = read_size(plan_args.gpu_memory, "gpu_memory")
        figures["suggestions"] = advise(planned, setting, run_args.gradient_accumulation_steps, size, footprints)
    bar.close()
    figures |= price(plan_args, setting, records)
    return figures


def rows_of_tokenizer(arguments: Sequence[Any]) -> int | None:
    """Rows that --tokenizer_name_or_path needs; None where it is not given, or is the model's own."""
    from utils.core.arguments import ModelArguments
    from utils.core.hub import find_folder
    from utils.text.tokenizer import embedding_rows, has_tokenizer, load_tokenizer

    model_args = next(part for part in arguments if isinstance(part, ModelArguments))
    name = model_args.tokenizer_name_or_path
    if name is None:
        return None
    folder = find_folder(name)
    if name == model_args.model_name_or_path and (folder is None or not has_tokenizer(folder)):
        return None  # a folder with config.json alone will do
    return embedding_rows(load_tokenizer(name))


def advise(planned: Plan, setting: Setting, accumulation: int, size: float, footprints: Any) -> list[Any]:
    """Print whether it fits, what each knob saves, and the settings that fit; returns these."""
    from utils.planning.advice import knobs, suggest
    from utils.planning.memory import plan

    needed = planned.needed
    verdict = "fits" if needed <= size else "does not fit"
    print(f"{verdict} {size / 1e9:.1f} GB: needs {needed / 1e9:.1f} GB of each GPU")
    print("what each change saves:")
    for flags, changed in knobs(setting, accumulation):
        other = plan(changed, footprints.of(changed.job)).needed
        print(f"  {flags}: {needed / 1e9:.1f} -> {other / 1e9:.1f} GB")
    found = suggest(setting, accumulation, size, footprints)
    if not found:
        print(
            "no setting of this model and batch fits; take more GPUs (NPROC, with --deepspeed), shorter rows, or a "
            "smaller model"
        )
        return []
    print("settings that fit, the fastest first (speed against the command's own, a rule of thumb):")
    for item in found[:SHOWN]:
        print(f"  {item.plan.needed / 1e9:6.1f} GB  {item.speed:4.2f} x  {item.flags}")
    return found


def price(plan_args: PlanArguments, setting: Setting, records: list[Record]) -> dict[str, float]:
    """Print time and price of --tokens; returns them. Raises: InputError without a speed."""
    from utils.planning.advice import describe, measured_rate

    if plan_args.tokens is None:
        return {}
    rate = plan_args.tokens_per_second or measured_rate(records, describe(setting))
    if rate is None:
        raise InputError(
            "--tokens: no run of these settings was measured here; pass --tokens_per_second, or run a few steps first"
        )
    hours = read_size(plan_args.tokens, "tokens") / rate / 3600
    figures = {"hours": hours}
    line = f"{plan_args.tokens} tokens at {rate:,.0f} a second: {hours:.1f} h"
    if plan_args.price:
        figures["price"] = hours * plan_args.processes * plan_args.price
        line += f", {figures['price']:,.2f} for {plan_args.processes} GPU(s) at {plan_args.price} an hour"
    print(line)
    return figures


def split_command(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(flags of the plan, the stage and its flags); the plan's may stand anywhere, and each has a value."""
    own_names = {f"--{field.name}" for field in fields(PlanArguments)}
    own: list[str] = []
    others: list[str] = []
    takes_value = False
    for word in words:
        mine = takes_value or word.partition("=")[0] in own_names
        takes_value = mine and not takes_value and "=" not in word
        (own if mine else others).append(word)
    if others and others[0] in ("-h", "--help"):
        return [*own, *others], []
    return own, others


if __name__ == "__main__":
    sys.argv[1:], words = split_command(sys.argv[1:])
    run(partial(main, words), PlanArguments, description=__doc__)
