#!/usr/bin/env bash
# 模型竞技场 / Arena: blind battles, side by side.  MODELS="a=DIR b=DIR" bash scripts/run_arena.sh [any arena.py flag]
# 两个以上的参赛者 / two or more contestants, NAME=PLACE, 空格分开 separated by spaces: MODELS 模型或适配器目录 folders of models or adapters,
#   ANSWERS 已有的答案文件 files of answers, SERVERS 服务地址 addresses of servers
# 可选 / optional: JUDGE=URL#MODEL 由模型评判 a model judges, OUT=output/arena, PORT=7860, DRY_RUN=0; --report 只算分 ratings only
# 写出 / writes: OUT: arena.json 评分 ratings, votes.jsonl 或 or verdicts.jsonl
# 常用 / often used: --questions 题目文件 file of questions, --categories 只比这些类 only these kinds, --judge_prompt 评判提示 what the judge is asked, --share 公开网址 a public address, --auth 用户名:密码 user:password
# 例 / example (make demo 之后 after it): MODELS="tuned=output/demo/assistant base=output/demo/pretrained" OUT=output/try_arena bash scripts/run_arena.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
if [[ " $* " != *" --report "* && -z ${ANSWERS:-}${SERVERS:-} ]]; then
  : "${MODELS:?set MODELS, ANSWERS or SERVERS to the contestants, each as NAME=PLACE}"
fi
read -ra MODELS <<<"${MODELS:-}"
read -ra ANSWERS <<<"${ANSWERS:-}"
read -ra SERVERS <<<"${SERVERS:-}"
FLAGS=(--output_dir "${OUT:-output/arena}" --port "${PORT:-7860}")
[[ ${#MODELS[@]} -gt 0 ]] && FLAGS+=(--models "${MODELS[@]}")
[[ ${#ANSWERS[@]} -gt 0 ]] && FLAGS+=(--answers "${ANSWERS[@]}")
[[ ${#SERVERS[@]} -gt 0 ]] && FLAGS+=(--servers "${SERVERS[@]}")
run "$HERE/arena.py" "${FLAGS[@]}" ${JUDGE:+--judge "$JUDGE"} "$@"
