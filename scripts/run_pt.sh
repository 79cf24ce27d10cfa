#!/usr/bin/env bash
# 继续预训练 / Continued pre-training (LoRA + embed_tokens/lm_head).  MODEL=... DATA=... bash scripts/run_pt.sh [any pt.py flag]
# 必填 / required: MODEL 基座模型 base model, DATA 语料文件或目录 text files or folder
# 可选 / optional: TOKENIZER (合并后的词表 merged tokenizer) OUT=output/pt NPROC=1 NNODES=1 SEED=42 LR=2e-4 LORA_RANK=64 LORA_ALPHA=128 BLOCK=512 DRY_RUN=0
# 多机 / several nodes: NNODES=2 NODE_RANK=0 MASTER_ADDR=... MASTER_PORT=29500;  DeepSpeed: --deepspeed scripts/configs/ds_zero2_no_offload.json
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to the base model (folder or hub id)}" "${DATA:?set DATA to a text file or folder}"
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
launch "$HERE/pt.py" \
  --model_name_or_path "$MODEL" --tokenizer_name_or_path "${TOKENIZER:-$MODEL}" --train_data "$DATA" --output_dir "${OUT:-output/pt}" \
  --seed "${SEED:-42}" --learning_rate "${LR:-2e-4}" --lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0.01 --num_train_epochs 1 \
  --lora_rank "${LORA_RANK:-64}" --lora_alpha "${LORA_ALPHA:-128}" --lora_dropout 0.05 \
  --target_modules q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj --modules_to_save embed_tokens,lm_head \
  --block_size "${BLOCK:-512}" --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --gradient_checkpointing \
  --validation_split 0.001 --save_steps 200 "$@"
