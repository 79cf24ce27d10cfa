#!/usr/bin/env bash
# 用 llama.cpp 在终端里聊天 / A chat on the terminal with llama.cpp.  bash examples/clients/chat.sh MODEL.gguf [llama-cli flags]
# Env: LLAMA_CLI=llama-cli THREADS=(llama.cpp's choice) CONTEXT=4096 SYSTEM=(the chat template's own)
# The chat template comes from the GGUF file: export_gguf.py writes it there.
set -euo pipefail
: "${1:?pass a GGUF file, such as output/gguf/model-Q4_K_M.gguf}"
MODEL=$1
shift
LLAMA_CLI=${LLAMA_CLI:-llama-cli}
command -v "$LLAMA_CLI" > /dev/null || { echo "$LLAMA_CLI not found: install llama.cpp, or set LLAMA_CLI" >&2; exit 2; }
CMD=("$LLAMA_CLI" --model "$MODEL" --jinja --ctx-size "${CONTEXT:-4096}" --temp 0.5 --top-k 40
     --top-p 0.9 --repeat-penalty 1.1)
[[ -n ${THREADS:-} ]] && CMD+=(--threads "$THREADS")
[[ -n ${SYSTEM:-} ]] && CMD+=(--system-prompt "$SYSTEM")
exec "${CMD[@]}" "$@"
