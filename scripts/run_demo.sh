#!/usr/bin/env bash
# 一条命令跑完整个流程 (笔记本 CPU) / The whole recipe on a laptop CPU:  bash scripts/run_demo.sh [any demo.py flag]
#   英文小模型 -> 中文词表 -> 合并词表 -> 继续预训练 -> 合并 -> 指令精调 -> 合并 -> GGUF 与量化 -> 奖励模型, PPO, DPO -> 问答与评测 -> output/demo/report.html
#   tiny English base -> Chinese vocabulary -> merge -> continued pre-training -> merge -> tuning -> merge -> GGUF, formats -> reward model, PPO, DPO -> answers -> report
#   --quick: 四五分钟先看一眼: 三分之一的训练步数, 到助手为止, 精调前后的回答并排 / a first look of four or five minutes: a third of the steps, up to the tuned model, answers before and after side by side
# 可选 / optional: OUT=output/demo (--quick: output/quick) SEED=42 DRY_RUN=0.  已完成的步骤会跳过; 删除某一步的目录即可重跑该步及其后的步骤; --dry_run 只打印各步的命令
# Finished stages are skipped; delete a stage's folder to run it and those after it again. --dry_run prints the commands of all stages.
# 写出 / writes: OUT: report.html, summary.json (--quick: look/answers.html), 各步的目录 a folder for each stage
# 常用 / often used: --quick 四五分钟先看一眼 a first look, --dry_run 只打印命令 print the commands only, --seed 随机种子 random seed, --output_dir 输出目录 output folder
# 例 / example (make demo 之后 after it): OUT=output/demo bash scripts/run_demo.sh --dry_run
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
export PYTHON=${PYTHON:-python} HF_HUB_OFFLINE=1
# Memory that a step has freed stays with the process for the next one: asking the system for it again costs a tenth of the run time.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}
run "$HERE/demo.py" ${OUT:+--output_dir "$OUT"} --seed "${SEED:-42}" "$@"
