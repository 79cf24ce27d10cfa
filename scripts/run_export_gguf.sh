#!/usr/bin/env bash
# 导出 GGUF / Export to GGUF (llama.cpp, Ollama, LM Studio).  MODEL=... bash scripts/run_export_gguf.sh [any export_gguf.py flag]
# 必填 / required: MODEL 合并后的模型或基座模型 merged or base model
# 可选 / optional: LORA 适配器，多个以逗号分隔 adapters, comma-separated; OUT=output/gguf TYPES="f16" 以空格分隔 space-separated; DRY_RUN=0
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to the model (folder or hub id)}"
read -ra TYPE_LIST <<< "${TYPES:-f16}"
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/export_gguf.py" --base_model "$MODEL" --output_dir "${OUT:-output/gguf}" ${LORA:+--lora_model "$LORA"} \
  --types "${TYPE_LIST[@]}" "$@"
