#!/usr/bin/env bash
# 长文本评测 LongBench / LongBench, long texts.  MODEL=... DATA=... bash scripts/run_eval_longbench.sh [any eval_longbench.py flag]
# 必填 / required: MODEL 合并后的模型或基座 merged model or base
# 可选 / optional: DATA 数据目录，默认从 hub 下载 folder of the data, default: the hub's; LORA 适配器目录 adapter folder,
#   TASKS=zh,en,code, OUT=output/longbench, MAX_LENGTH 默认模型的窗口 default: the model's window, DRY_RUN=0
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to a merged model or a base}"
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/eval_longbench.py" --base_model "$MODEL" --predict_on "${TASKS:-zh,en,code}" --output_dir "${OUT:-output/longbench}" \
  ${DATA:+--data_dir "$DATA"} ${LORA:+--lora_model "$LORA"} ${MAX_LENGTH:+--max_length "$MAX_LENGTH"} "$@"
