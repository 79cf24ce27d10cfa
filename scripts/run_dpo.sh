#!/usr/bin/env bash
# 偏好对齐（DPO）/ Preference tuning (DPO).  MODEL=... DATA=... bash scripts/run_dpo.sh [any dpo.py flag]
# 必填 / required: MODEL 精调并合并后的模型 tuned and merged model, DATA 偏好数据文件或目录 json/jsonl/parquet file or folder of pairs
# 可选 / optional: OUT=output/dpo NPROC=1 NNODES=1 SEED=42 LR=5e-5 LORA_RANK=64 LORA_ALPHA=128 LENGTH=1024 LOSS=sigmoid BETA=(0.1, simpo 2.0) DRY_RUN=0
# 提示模板默认用模型自带的 / the prompt template is the model's own by default.  多机 / several nodes: see run_sft.sh
# 写出 / writes: OUT: 适配器 adapter, loss.png, dpo.png, all_results.json
# 常用 / often used: --max_steps 最多多少步 at most so many steps, --num_train_epochs 轮数 epochs, --validation_split 留出多少 share held out, --load_in_kbits 4 为 QLoRA 4 is QLoRA, --overwrite_output_dir 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant DATA=examples/data/rlhf/preferences.jsonl OUT=output/try_dpo bash scripts/run_dpo.sh --max_steps 5
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to the tuned, merged model (folder or hub id)}" "${DATA:?set DATA to a json, jsonl or parquet file or folder of pairs}"
launch "$HERE/dpo.py" \
  --model_name_or_path "$MODEL" --train_data "$DATA" --output_dir "${OUT:-output/dpo}" \
  --loss "${LOSS:-sigmoid}" ${BETA:+--beta "$BETA"} \
  --seed "${SEED:-42}" --learning_rate "${LR:-5e-5}" --lr_scheduler_type cosine --warmup_steps 0.1 --weight_decay 0 --num_train_epochs 1 \
  --lora_rank "${LORA_RANK:-64}" --lora_alpha "${LORA_ALPHA:-128}" --lora_dropout 0 \
  --target_modules all \
  --max_seq_length "${LENGTH:-1024}" \
  --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --gradient_checkpointing \
  --validation_split 0.02 --save_steps 100 "$@"
