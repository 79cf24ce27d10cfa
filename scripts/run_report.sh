#!/usr/bin/env bash
# 汇总评测结果或一次完整流程 / Report on result files, or on a recipe's run folder.  RESULTS="a.json b.json" bash scripts/run_report.sh [any report.py flag]
# 可选 / optional: RESULTS 评测的结果文件或目录，空格分隔 result files of evaluations or folders, between spaces; OUT=output/evaluation
#   没有 RESULTS 时 / without RESULTS: RUN_DIR=output/demo QUESTIONS=examples/data/sft/heldout.json; DRY_RUN=0
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -n ${RESULTS:-} ]]; then
  read -ra WORDS <<<"$RESULTS"
  FLAGS=(--results "${WORDS[@]}" --output_dir "${OUT:-output/evaluation}")
else
  FLAGS=(--run_dir "${RUN_DIR:-output/demo}" --questions "${QUESTIONS:-$HERE/../examples/data/sft/heldout.json}")
fi
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/report.py" "${FLAGS[@]}" "$@"
