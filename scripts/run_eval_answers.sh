#!/usr/bin/env bash
# 自己的问题答得更好了吗 / Better at my questions?  MODEL=... QUESTIONS=my.json [LORA="A B"] bash scripts/run_eval_answers.sh [any eval_answers.py flag]
# 必填 / required: QUESTIONS 带参考答案的问题，文件或目录，格式同 sft.py 的数据 file or folder of questions with reference answers, as sft.py reads them
# 回答者，空格分开，第一个是比较的起点 / who answers, separated by spaces; the first is what the others are compared with:
#   MODEL 模型目录 folder of a model, LORA 适配器目录（各用自己记录的基座） folders of adapters, each on the base that it records,
#   MODELS NAME=DIR 更多模型 more models, ANSWERS NAME=FILE 已有的答案文件 files of answers, SERVERS NAME=URL 服务地址 addresses of servers
# 可选 / optional: JUDGE=URL#MODEL 由模型评判 a model judges, OUT=output/answers, DRY_RUN=0
# 写出 / writes: OUT: answers.json, answers.html, answers.md, 每个模型的回答 each model's answers
# 常用 / often used: --metric 以哪个分数论好坏 which score decides, --max_new_tokens 回答最长 longest answer, --batch_size 同时几题 questions at once, --overwrite 重新作答 answer anew
# 例 / example (make demo 之后 after it): LORA="output/demo/ppo output/demo/dpo" QUESTIONS=examples/data/sft/heldout.json bash scripts/run_eval_answers.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${QUESTIONS:?set QUESTIONS to a json, jsonl or parquet file or folder of questions with reference answers}"
if [[ -z ${MODELS:-}${LORA:-}${ANSWERS:-}${SERVERS:-} ]]; then
  : "${MODEL:?set MODEL, LORA, MODELS, ANSWERS or SERVERS to what answers the questions}"
fi
read -ra MODELS <<<"${LORA:-} ${MODELS:-}"
read -ra ANSWERS <<<"${ANSWERS:-}"
read -ra SERVERS <<<"${SERVERS:-}"
FLAGS=(--output_dir "${OUT:-output/answers}" --questions "$QUESTIONS")
[[ ${#MODELS[@]} -gt 0 ]] && FLAGS+=(--models "${MODELS[@]}")
[[ ${#ANSWERS[@]} -gt 0 ]] && FLAGS+=(--answers "${ANSWERS[@]}")
[[ ${#SERVERS[@]} -gt 0 ]] && FLAGS+=(--servers "${SERVERS[@]}")
run "$HERE/eval_answers.py" ${MODEL:+--base_model "$MODEL"} "${FLAGS[@]}" ${JUDGE:+--judge "$JUDGE"} "$@"
