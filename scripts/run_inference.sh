#!/usr/bin/env bash
# 推理与对话 / Ask a model.  MODEL=... [LORA=...] bash scripts/run_inference.sh --interactive  [any inference_hf.py flag]
# 必填 / required: MODEL 合并后的模型或基座 merged model or base
# 可选 / optional: LORA 适配器目录 adapter folder, DRY_RUN=0.  续写原文（不套模板）/ plain continuation: --with_prompt False
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to a merged model, or a base (folder or hub id)}"
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/inference_hf.py" --base_model "$MODEL" --with_prompt ${LORA:+--lora_model "$LORA"} "$@"
