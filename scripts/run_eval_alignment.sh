#!/usr/bin/env bash
# 价值观对齐评测 / Alignment: questions about right and wrong.  MODEL=... [LORA=...] bash scripts/run_eval_alignment.sh [any eval_alignment.py flag]
# 二选一 / one of: MODEL 合并后的模型或基座 merged model or base; ANSWERS 已有的答案文件 a file of answers
# 可选 / optional: LORA 适配器目录 adapter folder, OUT=output/alignment, QUESTIONS=examples/data/alignment/questions.jsonl, DRY_RUN=0
# 写出 / writes: OUT: alignment.json, alignment.png, answers.jsonl
# 常用 / often used: --compare 与另一结果比较 against another result, --judge 由模型评判 a model judges, --reward_model 奖励模型打分 scores of a reward model, --batch_size 批大小 batch size, --overwrite 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant OUT=output/try_alignment bash scripts/run_eval_alignment.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
[[ -n ${ANSWERS:-} ]] || : "${MODEL:?set MODEL to a merged model or a base, or ANSWERS to a file of answers}"
if [[ -n ${ANSWERS:-} ]]; then ANSWERED_BY=(--answers "$ANSWERS"); else ANSWERED_BY=(--base_model "$MODEL"); fi
run "$HERE/eval_alignment.py" --output_dir "${OUT:-output/alignment}" \
  --questions "${QUESTIONS:-$HERE/../examples/data/alignment/questions.jsonl}" "${ANSWERED_BY[@]}" ${LORA:+--lora_model "$LORA"} "$@"
