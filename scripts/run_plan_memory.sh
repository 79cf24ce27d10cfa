#!/usr/bin/env bash
# 训练前的显存估算 / What a training command needs, before it starts.  STAGE=pt MODEL=... bash scripts/run_plan_memory.sh [any flag of the stage]
# 必填 / required: MODEL 模型目录，只需 config.json  model folder, config.json alone will do
# 可选 / optional: STAGE=pt (pt sft rm ppo dpo) GPU=24GiB 每卡显存 memory of a GPU; 其余同该阶段的启动脚本 all else as for the stage's launcher, but DATA is not read: NPROC LORA_RANK BLOCK LENGTH ...
# 写出 / writes: 无，只打印 nothing, it prints
# 常用 / often used: --gpu_memory 每卡显存 memory of a GPU, --processes 进程数 processes, --tokens 训练多少词元 tokens to train on, --tokens_per_second 实测速度 a measured speed, --price 每卡每小时价格 price of a GPU hour
# 例 / example (make demo 之后 after it): STAGE=sft MODEL=output/demo/pretrained GPU=24GiB bash scripts/run_plan_memory.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to a model folder; its config.json alone will do}"
export DATA="${DATA:-none}" PLAN=1  # 估算不读数据 data is not read
exec bash "$HERE/run_${STAGE:-pt}.sh" ${GPU:+--gpu_memory "$GPU"} "$@"
