#!/usr/bin/env bash
# 检查安装与机器 / Look at the installation and the machine.  [MODEL=...] bash scripts/run_doctor.sh [any doctor.py flag]
# 可选 / optional: MODEL 顺带检查的模型目录 a model folder to look at too; NETWORK=0 (1: 询问模型站能否连上 ask the hubs whether they answer); DRY_RUN=0
# 退出码 1: 核心不能用 / Exit status 1: the core cannot work.
# 写出 / writes: 每样东西一行、哪些能用、补齐的命令，在标准输出 a line on each thing, what works, what mends the rest, on standard output
# 常用 / often used: --model 模型目录 folder of a model, --network 询问模型站 ask the hubs, --json 一个 JSON 对象 one JSON object
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant bash scripts/run_doctor.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
FLAGS=()
[[ ${NETWORK:-0} == 0 ]] || FLAGS+=(--network)
run "$HERE/doctor.py" ${MODEL:+--model "$MODEL"} "${FLAGS[@]}" "$@"
