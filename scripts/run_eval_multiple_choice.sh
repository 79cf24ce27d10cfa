#!/usr/bin/env bash
# 选择题评测 / Multiple choice (C-Eval, CMMLU, MMLU, your own).  MODEL=... DATA=... bash scripts/run_eval_multiple_choice.sh [any eval_multiple_choice.py flag]
# 必填 / required: MODEL 合并后的模型或基座 merged model or base, 或 / or SERVER OpenAI 接口的地址 address of an OpenAI-compatible server
# 可选 / optional: BENCHMARK=cmmlu（ceval, cmmlu, mmlu 或自己的题目目录 or a folder of your own）, DATA 数据目录 folder of its files,
#   LORA 适配器目录 adapter folder, SHOTS=5, OUT=output/multiple_choice, DRY_RUN=0
# 写出 / writes: OUT: multiple_choice.json, 图 picture, 每题的答案 answers
# 常用 / often used: --subjects 只考这些科目 only these subjects, --max_questions 每科多少题 questions of each subject, --mode 打分方式 how choices are scored, --with_prompt 套对话模板 in the chat template, --overwrite 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant BENCHMARK=examples/data/choices SHOTS=0 OUT=output/try_choices bash scripts/run_eval_multiple_choice.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
[[ -n ${SERVER:-} ]] || : "${MODEL:?set MODEL to a merged model or a base, or SERVER to the address of a server}"
if [[ -n ${SERVER:-} ]]; then ANSWERED_BY=(--server_url "$SERVER"); else ANSWERED_BY=(--base_model "$MODEL"); fi
run "$HERE/eval_multiple_choice.py" --benchmark "${BENCHMARK:-cmmlu}" --num_fewshot "${SHOTS:-5}" \
  --output_dir "${OUT:-output/multiple_choice}" "${ANSWERED_BY[@]}" ${DATA:+--data_dir "$DATA"} ${LORA:+--lora_model "$LORA"} "$@"
