"""Sum up a recipe's run folder: report.html (one self-contained page), report.md and summary.json are written into it.

  python scripts/report.py --run_dir output/demo
  python scripts/report.py --run_dir output/demo --questions examples/data/sft/heldout.json
The folder is the one run_demo.sh makes; unfinished stages are named. Runs in about a second, without loading a model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.arguments import arg, run

logger = logging.getLogger("report")

QUESTIONS = Path(__file__).resolve().parents[1] / "examples" / "data" / "sft" / "heldout.json"


@dataclass
class ReportArguments:
    """Which run is reported."""

    run_dir: str = arg("output/demo", help="Folder with the stages of a recipe, as run_demo.sh makes it.")
    questions: str | None = arg(
        help="Held-out questions (json or jsonl) that answers/*.json answer, in their order; default: the examples'."
    )


def main(args: ReportArguments) -> dict[str, Any]:
    """Write the report; returns the figures of summary.json."""
    from utils.recipe import chinese_drop, english_rise
    from utils.report import write_report

    folder = Path(args.run_dir)
    summary = write_report(folder, Path(args.questions or QUESTIONS))
    logger.info(
        "bits per byte: zh %+.1f %%, en %+.1f %%; exact answers %.1f %% -> %.1f %%; merged %s adapter; %.0f s\n"
        "  alignment: tuned %.1f %% -> PPO %.1f %%, DPO %.1f %%; reward model right on %.1f %% of held-out pairs\n"
        "  files in %s: report.html, report.md, summary.json\n"
        "  next: open report.html in a browser, or: MODEL=%s bash scripts/run_inference.sh --interactive",
        *(-100 * chinese_drop(summary), 100 * english_rise(summary)),
        *(100 * summary["exact_match"]["base"], 100 * summary["exact_match"]["sft"]),
        *("==" if summary["merged_equals_adapter"] else "!=", summary["seconds"]),
        *(100 * summary["alignment"][side] for side in ("sft", "ppo", "dpo")),
        *(100 * summary["reward_model_accuracy"], folder, folder / "assistant"),
    )
    return summary


if __name__ == "__main__":
    run(main, ReportArguments, description=__doc__)
