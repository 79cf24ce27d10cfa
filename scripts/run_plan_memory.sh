#!/usr/bin/env bash
# 训练前的显存估算 / What a training command needs, before it starts.  STAGE=pt MODEL=... bash scripts/run_plan_memory.sh [any flag of the stage]
# 必填 / required: MODEL 模型目录，只需 config.json  model folder, config.json alone will do
# 可选 / optional: STAGE=pt (pt sft rm ppo dpo) GPU=24GiB 每卡显存 memory of a GPU; 其余同该阶段的启动脚本 all else as for the stage's launcher: NPROC LORA_RANK BLOCK LENGTH ...
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to a model folder; its config.json alone will do}"
export DATA="${DATA:-none}" PLAN=1  # 估算不读数据 data is not read
exec bash "$HERE/run_${STAGE:-pt}.sh" ${GPU:+--gpu_memory "$GPU"} "$@"
