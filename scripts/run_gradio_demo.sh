#!/usr/bin/env bash
# 网页对话 / Chat in the browser.  MODEL=... [LORA=...] bash scripts/run_gradio_demo.sh  [any gradio_demo.py flag]
# 必填 / required: MODEL 合并后的模型或基座 merged model or base
# 可选 / optional: LORA 适配器目录 adapter folder, HOST=127.0.0.1, PORT=7860, DRY_RUN=0
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to a merged model, or a base (folder or hub id)}"
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/gradio_demo.py" --base_model "$MODEL" --host "${HOST:-127.0.0.1}" --port "${PORT:-7860}" ${LORA:+--lora_model "$LORA"} "$@"
