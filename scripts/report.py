"""Sum up result files of evaluations, or a recipe's run folder, in one self-contained page, also as Markdown.

  python scripts/report.py --results output/a/multiple_choice.json output/b/perplexity.json --output_dir output/all
  python scripts/report.py --results sft=output/sft/longbench.json base=output/base/longbench.json
  python scripts/report.py --run_dir output/demo
Output of result files: evaluation.html, evaluation.md. Of a folder that run_demo.sh made: report.html, report.md,
summary.json; unfinished stages are named. Runs in about a second, without loading a model.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.core.arguments import arg, list_arg
from utils.core.command_line import run, shell_command
from utils.core.errors import raise_problems

logger = logging.getLogger("report")

QUESTIONS = Path(__file__).resolve().parents[1] / "examples" / "data" / "sft" / "heldout.json"
RUN_DIR, OUTPUT_DIR = "output/demo", "output/evaluation"


@dataclass
class ReportArguments:
    """What is reported: result files, or a run."""

    results: list[str] = list_arg(
        help="Result files of evaluations (multiple_choice.json, longbench.json, perplexity.json, alignment.json, "
        "answers.json, arena.json), or folders with them, each optionally as MODEL=path."
    )
    output_dir: str | None = arg(help="With --results: folder for the page; default: output/evaluation.")
    run_dir: str | None = arg(
        help="Folder with the stages of a recipe, as run_demo.sh makes it; default without --results: output/demo."
    )
    questions: str | None = arg(
        help="With --run_dir: held-out questions (json or jsonl) that answers/*.json answer, in their order; default: "
        "the examples'."
    )

    def __post_init__(self) -> None:
        checks = {
            "--results and --run_dir are two reports; pass one of them": not (self.results and self.run_dir),
            "--output_dir goes with --results; a run's report is written into --run_dir": (
                bool(self.results) or self.output_dir is None
            ),
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])


def main(args: ReportArguments) -> dict[str, Any]:
    """Write the report; returns the figures of summary.json, or of result files {column: {model: figure}}."""
    return report_results(args) if args.results else report_run(args)


def report_results(args: ReportArguments) -> dict[str, Any]:
    """The page of result files."""
    from utils.report.evaluation import PAGE, write_evaluation
    from utils.report.results import read_results

    folder = Path(args.output_dir or OUTPUT_DIR)
    entries = read_results(args.results)
    figures = write_evaluation(entries, folder)
    lines = [
        f"  {column}: "
        + ", ".join(f"{model} {'-' if value is None else f'{value:.2f}'}" for model, value in row.items())
        for column, row in figures.items()
    ]
    logger.info(
        "%d models in %d benchmarks, of %d files\n%s\n  files in %s: %s.html, %s.md\n  next: %s",
        *(len({e.model for e in entries if e.model}), len(figures), len({e.path for e in entries}), "\n".join(lines)),
        *(folder, PAGE, PAGE, shell_command("python", "-m", "webbrowser", folder / f"{PAGE}.html")),
    )
    return figures


def report_run(args: ReportArguments) -> dict[str, Any]:
    """The page of a recipe's run folder."""
    from utils.report.run import write_report

    folder = Path(args.run_dir or RUN_DIR)
    summary = write_report(folder, Path(args.questions or QUESTIONS))
    logger.info(
        "bits per byte: zh %+.1f %%, en %+.1f %%; exact answers %.1f %% -> %.1f %%; merged %s adapter; %.0f s\n"
        "  alignment: tuned %.1f %% -> PPO %.1f %%, DPO %.1f %%; reward model right on %.1f %% of held-out pairs\n"
        "  files in %s: report.html (open it in a browser), report.md, summary.json\n"
        "  next: %s",
        *(-100 * summary.chinese_drop, 100 * summary.english_rise),
        *(100 * summary.exact_match["base"], 100 * summary.exact_match["sft"]),
        *("==" if summary.merged_equals_adapter else "!=", summary.seconds),
        *(100 * summary.alignment[side] for side in ("sft", "ppo", "dpo")),
        *(100 * summary.reward_model_accuracy, folder),
        shell_command("bash", "scripts/run_inference.sh", "--interactive", MODEL=folder / "assistant"),
    )
    return asdict(summary)


if __name__ == "__main__":
    run(main, ReportArguments, description=__doc__)
