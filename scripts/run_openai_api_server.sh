#!/usr/bin/env bash
# OpenAI 接口服务 / OpenAI-compatible server.  MODEL=... [LORA=...] bash scripts/run_openai_api_server.sh  [any openai_api_server.py flag]
# 必填 / required: MODEL 合并后的模型或基座 merged model or base
# 可选 / optional: LORA 适配器目录 adapter folder, HOST=127.0.0.1, PORT=19327, API_KEYS=密钥,... 谁可以用 who may use it, DRY_RUN=0
# 写出 / writes: 无 nothing
# 常用 / often used: --served_model_name 对外的名字 the name outside, --lora_models 名字=适配器 NAME=ADAPTER, --max_batch_size 同时答几个 answered at once, --max_context 最长上下文 longest context, --engine GGUF 用 llama.cpp llama.cpp for GGUF
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant bash scripts/run_openai_api_server.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to a merged model, or a base (folder or hub id)}"
run "$HERE/openai_api_server.py" --base_model "$MODEL" --host "${HOST:-127.0.0.1}" --port "${PORT:-19327}" ${LORA:+--lora_model "$LORA"} "$@"
