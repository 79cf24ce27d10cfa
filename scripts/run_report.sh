#!/usr/bin/env bash
# 汇总评测结果或一次完整流程 / Report on result files, or on a recipe's run folder.  RESULTS="a.json b.json" bash scripts/run_report.sh [any report.py flag]
# 可选 / optional: RESULTS 评测的结果文件或目录，空格分隔 result files of evaluations or folders, between spaces; OUT=output/evaluation
#   没有 RESULTS 时 / without RESULTS: RUN_DIR=output/demo QUESTIONS=examples/data/sft/heldout.json; DRY_RUN=0
# 写出 / writes: OUT: evaluation.html, evaluation.md; 或 or RUN_DIR: report.html, report.md, summary.json
# 常用 / often used: --results 结果文件 result files, --output_dir 写到哪里 where it goes, --run_dir 完整流程的目录 folder of a recipe, --questions 问答的题目 its questions
# 例 / example (make demo 之后 after it): RESULTS="output/demo/perplexity output/demo/alignment" OUT=output/try_report bash scripts/run_report.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
if [[ -n ${RESULTS:-} ]]; then
  read -ra WORDS <<<"$RESULTS"
  FLAGS=(--results "${WORDS[@]}" --output_dir "${OUT:-output/evaluation}")
else
  FLAGS=(--run_dir "${RUN_DIR:-output/demo}" --questions "${QUESTIONS:-$HERE/../examples/data/sft/heldout.json}")
fi
run "$HERE/report.py" "${FLAGS[@]}" "$@"
