#!/usr/bin/env bash
# 强化学习 (PPO) / Reinforcement learning with PPO.  MODEL=... REWARD=... DATA=... bash scripts/run_ppo.sh [any ppo.py flag]
# 必填 / required: MODEL 精调并合并后的模型 tuned (merged) model, DATA 提示文件或目录 prompts, json/jsonl/parquet
#   REWARD 奖励模型目录 folder made by run_rm.sh; 或 or --reward_function file.py:name
# 可选 / optional: OUT=output/ppo NPROC=1 NNODES=1 SEED=42 LR=1e-5 LORA_RANK=64 LORA_ALPHA=128 PROMPT_LENGTH=512 LENGTH=512 DRY_RUN=0
# 多机 / several nodes: NNODES=2 NODE_RANK=0 MASTER_ADDR=... MASTER_PORT=29500;  DeepSpeed: --deepspeed scripts/configs/ds_zero3_offload.json
# 写出 / writes: OUT: 适配器 adapter, 曲线 curves, all_results.json
# 常用 / often used: --max_steps 最多多少步 at most so many steps, --kl_coef 偏离的代价 price of leaving the reference, --rollout_batch_size 每轮答案数 answers of an iteration, --num_generations 每题几个答案 answers to a prompt, --reward_function 自己的奖励 a reward of your own
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant REWARD=output/demo/rm DATA=examples/data/rlhf/prompts.jsonl PROMPT_LENGTH=64 LENGTH=32 OUT=output/try_ppo bash scripts/run_ppo.sh --max_steps 2
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to the tuned model (folder or hub id)}" "${DATA:?set DATA to a json, jsonl or parquet file or folder of prompts}"
launch "$HERE/ppo.py" \
  --model_name_or_path "$MODEL" --train_data "$DATA" ${REWARD:+--reward_model "$REWARD"} --output_dir "${OUT:-output/ppo}" \
  --seed "${SEED:-42}" --learning_rate "${LR:-1e-5}" --lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0 --num_train_epochs 1 \
  --lora_rank "${LORA_RANK:-64}" --lora_alpha "${LORA_ALPHA:-128}" --lora_dropout 0 \
  --target_modules all \
  --max_prompt_length "${PROMPT_LENGTH:-512}" --max_new_tokens "${LENGTH:-512}" \
  --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --gradient_checkpointing \
  --validation_split 0.02 --eval_strategy steps --eval_steps 20 --save_steps 20 --logging_steps 1 \
  --load_best_model_at_end --metric_for_best_model eval_score --greater_is_better True "$@"
