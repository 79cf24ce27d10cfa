#!/usr/bin/env bash
# 继续预训练 / Continued pre-training (LoRA + embed_tokens/lm_head).  MODEL=... DATA=... bash scripts/run_pt.sh [any pt.py flag]
# 必填 / required: DATA 语料文件或目录 text file or folder; MODEL 基座模型 base model, or CONFIG 从零训练的模型配置 config of a new model (with TOKENIZER)
# 可选 / optional: TOKENIZER (合并后的词表 merged tokenizer) OUT=output/pt NPROC=1 NNODES=1 SEED=42 LR=2e-4 LORA_RANK=64 LORA_ALPHA=128 BLOCK=512 DRY_RUN=0
# 多机 / several nodes: NNODES=2 NODE_RANK=0 MASTER_ADDR=... MASTER_PORT=29500;  DeepSpeed: --deepspeed scripts/configs/ds_zero2_no_offload.json
# 写出 / writes: OUT: 适配器或模型 adapter or model, 分词器 tokenizer, loss.png, all_results.json
# 常用 / often used: --max_steps 最多多少步 at most so many steps, --num_train_epochs 轮数 epochs, --replay_data 防遗忘的旧文本 old text against forgetting, --load_in_kbits 4 为 QLoRA 4 is QLoRA, --overwrite_output_dir 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/base TOKENIZER=output/demo/merged_tokenizer DATA=examples/data/pretrain/zh_train.txt BLOCK=128 OUT=output/try_pt bash scripts/run_pt.sh --max_steps 5
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${DATA:?set DATA to a text file or folder}"
if [[ -n ${CONFIG:-} ]]; then
  : "${TOKENIZER:?set TOKENIZER to the tokenizer of the new model}"
  MODEL_FLAGS=(--config_name "$CONFIG" --tokenizer_name_or_path "$TOKENIZER" --full_finetuning)
else
  : "${MODEL:?set MODEL to the base model (folder or hub id), or CONFIG to train a new one}"
  MODEL_FLAGS=(--model_name_or_path "$MODEL" --tokenizer_name_or_path "${TOKENIZER:-$MODEL}"
    --lora_rank "${LORA_RANK:-64}" --lora_alpha "${LORA_ALPHA:-128}" --lora_dropout 0.05
    --target_modules all --modules_to_save "embed_tokens,lm_head")
fi
launch "$HERE/pt.py" "${MODEL_FLAGS[@]}" --train_data "$DATA" --output_dir "${OUT:-output/pt}" \
  --seed "${SEED:-42}" --learning_rate "${LR:-2e-4}" --lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0.01 --num_train_epochs 1 \
  --block_size "${BLOCK:-512}" --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --gradient_checkpointing \
  --validation_split 0.001 --save_steps 200 "$@"
