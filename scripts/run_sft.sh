#!/usr/bin/env bash
# 指令精调 / Instruction tuning.  MODEL=... DATA=... bash scripts/run_sft.sh [any sft.py flag]
# 必填 / required: MODEL 基座模型 base model, DATA 指令数据文件或目录 json/jsonl/parquet file or folder
# 可选 / optional: OUT=output/sft NPROC=1 NNODES=1 SEED=42 LR=1e-4 LORA_RANK=64 LORA_ALPHA=128 LENGTH=1024 TEMPLATE 提示模板，默认模型自带的 prompt template, default: the model's own; DRY_RUN=0
# 多机 / several nodes: NNODES=2 NODE_RANK=0 MASTER_ADDR=... MASTER_PORT=29500;  DeepSpeed: --deepspeed scripts/configs/ds_zero2_no_offload.json
# 写出 / writes: OUT: 适配器 adapter, 分词器与模板 tokenizer and template, loss.png, all_results.json
# 常用 / often used: --max_steps 最多多少步 at most so many steps, --num_train_epochs 轮数 epochs, --validation_split 留出多少 share held out, --load_in_kbits 4 为 QLoRA 4 is QLoRA, --overwrite_output_dir 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/pretrained DATA=examples/data/sft/train.json OUT=output/try_sft bash scripts/run_sft.sh --max_steps 5
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to the model to tune (folder or hub id)}" "${DATA:?set DATA to a json, jsonl or parquet file or folder}"
launch "$HERE/sft.py" \
  --model_name_or_path "$MODEL" --train_data "$DATA" --output_dir "${OUT:-output/sft}" \
  --seed "${SEED:-42}" --learning_rate "${LR:-1e-4}" --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 --num_train_epochs 1 \
  --lora_rank "${LORA_RANK:-64}" --lora_alpha "${LORA_ALPHA:-128}" --lora_dropout 0.05 \
  --target_modules all \
  --max_seq_length "${LENGTH:-1024}" ${TEMPLATE:+--prompt_template "$TEMPLATE"} \
  --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --gradient_checkpointing \
  --validation_split 0.01 --save_steps 200 "$@"
