#!/usr/bin/env bash
# 推理与对话 / Ask a model.  MODEL=... [LORA=...] bash scripts/run_inference.sh --interactive  [any inference_hf.py flag]
# 必填 / required: MODEL 合并后的模型或基座 merged model or base
# 可选 / optional: LORA 适配器目录 adapter folder, DRY_RUN=0.  续写原文（不套模板）/ plain continuation: --with_prompt False
# 写出 / writes: 无，或 --predictions_file 指定的文件 nothing, or the file of --predictions_file
# 常用 / often used: --interactive 多轮对话 a conversation, --prompt 一个问题 one question, --data_file 问题的文件 a file of questions, --predictions_file 答案写到哪里 where answers go, --engine GGUF 用 llama.cpp llama.cpp for GGUF
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant bash scripts/run_inference.sh --prompt "What is the capital of France?"
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to a merged model, or a base (folder or hub id)}"
run "$HERE/inference_hf.py" --base_model "$MODEL" --with_prompt ${LORA:+--lora_model "$LORA"} "$@"
