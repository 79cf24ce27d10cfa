#!/usr/bin/env bash
# 奖励模型 / Reward model.  MODEL=... DATA=... bash scripts/run_rm.sh [any rm.py flag]
# 必填 / required: MODEL 指令模型 the tuned model, DATA 偏好数据文件或目录 preference pairs, json/jsonl/parquet file or folder
# 可选 / optional: OUT=output/rm NPROC=1 NNODES=1 SEED=9527 LR=5e-6 LORA_RANK=64 LORA_ALPHA=128 LENGTH=2048 DRY_RUN=0
# 打分 / scoring: MODEL=output/rm bash scripts/run_rm.sh --score answers.jsonl   (不需要 DATA / needs no DATA)
# 多机 / several nodes: NNODES=2 NODE_RANK=0 MASTER_ADDR=... MASTER_PORT=29500;  DeepSpeed: --deepspeed scripts/configs/ds_zero3_offload.json
# 写出 / writes: OUT: 奖励模型 reward model, loss.png, reward_report.json
# 常用 / often used: --max_steps 最多多少步 at most so many steps, --num_train_epochs 轮数 epochs, --validation_split 留出多少 share held out, --score 给文件打分 score a file, --overwrite_output_dir 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant DATA=examples/data/rlhf/preferences.jsonl OUT=output/try_rm bash scripts/run_rm.sh --max_steps 5
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to the tuned model, or with --score to the reward model (folder or hub id)}"
if [[ " $* " == *" --score"[\ =]* ]]; then
  launch "$HERE/rm.py" --model_name_or_path "$MODEL" --max_seq_length "${LENGTH:-2048}" "$@"
  exit
fi
: "${DATA:?set DATA to a json, jsonl or parquet file or folder of preference pairs}"
launch "$HERE/rm.py" \
  --model_name_or_path "$MODEL" --train_data "$DATA" --output_dir "${OUT:-output/rm}" \
  --seed "${SEED:-9527}" --learning_rate "${LR:-5e-6}" --lr_scheduler_type cosine --warmup_steps 0.1 --weight_decay 0.1 --num_train_epochs 1 \
  --lora_rank "${LORA_RANK:-64}" --lora_alpha "${LORA_ALPHA:-128}" --lora_dropout 0.05 \
  --target_modules all \
  --max_seq_length "${LENGTH:-2048}" \
  --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --gradient_accumulation_steps 1 --gradient_checkpointing \
  --validation_split 0.05 --save_steps 200 "$@"
