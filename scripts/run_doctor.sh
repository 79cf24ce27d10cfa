#!/usr/bin/env bash
# 检查安装与机器 / Look at the installation and the machine.  [MODEL=...] bash scripts/run_doctor.sh [any doctor.py flag]
# 可选 / optional: MODEL 顺带检查的模型目录 a model folder to look at too; NETWORK=0 (1: 询问模型站能否连上 ask the hubs whether they answer); DRY_RUN=0
# 退出码 1: 核心不能用 / Exit status 1: the core cannot work.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
FLAGS=()
[[ ${NETWORK:-0} == 0 ]] || FLAGS+=(--network)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/doctor.py" ${MODEL:+--model "$MODEL"} "${FLAGS[@]}" "$@"
