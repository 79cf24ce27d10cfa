#!/usr/bin/env bash
# 合并 LoRA 与基座模型 / Merge LoRA adapters into their base.  MODEL=... LORA=... bash scripts/run_merge.sh [any merge flag]
# 必填 / required: MODEL 基座模型 base model; LORA 适配器目录，多个以逗号分隔、按训练顺序 adapter folders, comma-separated, in training order
# 可选 / optional: OUT=output/merged DTYPE=auto DRY_RUN=0
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to the base model (folder or hub id)}" "${LORA:?set LORA to the adapter folder, or several, comma-separated}"
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/merge_llama2_with_chinese_lora_low_mem.py" \
  --base_model "$MODEL" --lora_model "$LORA" --output_dir "${OUT:-output/merged}" --dtype "${DTYPE:-auto}" "$@"
