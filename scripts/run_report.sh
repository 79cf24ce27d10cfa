#!/usr/bin/env bash
# 汇总一次完整流程 / Report on a recipe's run folder: report.html, report.md, summary.json.  RUN_DIR=output/demo bash scripts/run_report.sh [any report.py flag]
# 可选 / optional: RUN_DIR=output/demo QUESTIONS=examples/data/sft/heldout.json DRY_RUN=0
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CMD=("${PYTHON:-python}" "$HERE/report.py" --run_dir "${RUN_DIR:-output/demo}"
     --questions "${QUESTIONS:-$HERE/../examples/data/sft/heldout.json}" "$@")
[[ ${DRY_RUN:-0} == 1 ]] && { printf '%q ' "${CMD[@]}"; echo; exit 0; }
exec "${CMD[@]}"
