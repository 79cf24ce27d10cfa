#!/usr/bin/env bash
# 将 LoRA 合并到基座模型 / Merge LoRA adapters into their base.  MODEL=... LORA=... bash scripts/run_merge.sh [any flag]
# Env: MODEL* LORA* (adapter folders, comma-separated, in order) OUT=output/merged DTYPE=auto DRY_RUN=0    (* required)
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to the base model (directory or hub id)}" "${LORA:?set LORA to the adapter folder, or several, comma-separated}"
CMD=("${PYTHON:-python}" "$HERE/merge_llama2_with_chinese_lora_low_mem.py"
     --base_model "$MODEL" --lora_model "$LORA" --output_dir "${OUT:-output/merged}" --dtype "${DTYPE:-auto}" "$@")
[[ ${DRY_RUN:-0} == 1 ]] && { printf '%q ' "${CMD[@]}"; echo; exit 0; }
exec "${CMD[@]}"
