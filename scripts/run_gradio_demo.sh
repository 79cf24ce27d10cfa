#!/usr/bin/env bash
# 网页对话 / Chat in the browser.  MODEL=... [LORA=...] bash scripts/run_gradio_demo.sh  [any gradio_demo.py flag]
# 必填 / required: MODEL 合并后的模型或基座 merged model or base
# 可选 / optional: LORA 适配器目录 adapter folder, HOST=127.0.0.1, PORT=7860, DRY_RUN=0
# 写出 / writes: 无，对话存在浏览器里 nothing, chats are kept in the browser
# 常用 / often used: --share 公开网址 a public address, --auth 用户名:密码 user:password, --compare_model 并排比较的模型 a model beside it, --load_in_kbits 4 或 8 位 4 or 8 bits, --engine GGUF 用 llama.cpp llama.cpp for GGUF
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant bash scripts/run_gradio_demo.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to a merged model, or a base (folder or hub id)}"
run "$HERE/gradio_demo.py" --base_model "$MODEL" --host "${HOST:-127.0.0.1}" --port "${PORT:-7860}" ${LORA:+--lora_model "$LORA"} "$@"
