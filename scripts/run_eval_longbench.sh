#!/usr/bin/env bash
# 长文本评测 LongBench / LongBench, long texts.  MODEL=... DATA=... bash scripts/run_eval_longbench.sh [any eval_longbench.py flag]
# 必填 / required: MODEL 合并后的模型或基座 merged model or base
# 可选 / optional: DATA 数据目录，默认从 hub 下载 folder of the data, default: the hub's; LORA 适配器目录 adapter folder,
#   TASKS=zh,en,code, OUT=output/longbench, MAX_LENGTH 默认模型的窗口 default: the model's window, DRY_RUN=0
# 写出 / writes: OUT: longbench.json, longbench.png, 答案 answers
# 常用 / often used: --max_samples 每个数据集多少题 questions of each set, --e LongBench-E LongBench-E, --with_inst 套指令模板 in the chat template, --batch_size 批大小 batch size, --overwrite 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant DATA=path/to/LongBench/data OUT=output/try_longbench bash scripts/run_eval_longbench.sh --max_samples 2
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to a merged model or a base}"
run "$HERE/eval_longbench.py" --base_model "$MODEL" --predict_on "${TASKS:-zh,en,code}" --output_dir "${OUT:-output/longbench}" \
  ${DATA:+--data_dir "$DATA"} ${LORA:+--lora_model "$LORA"} ${MAX_LENGTH:+--max_length "$MAX_LENGTH"} "$@"
