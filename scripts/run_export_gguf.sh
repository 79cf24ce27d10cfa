#!/usr/bin/env bash
# 导出 GGUF / Export to GGUF (llama.cpp, Ollama, LM Studio).  MODEL=... bash scripts/run_export_gguf.sh [any export_gguf.py flag]
# 必填 / required: MODEL 合并后的模型或基座模型 merged or base model
# 可选 / optional: LORA 适配器，多个以逗号分隔 adapters, comma-separated; OUT=output/gguf TYPES="f16" 以空格分隔 space-separated; DRY_RUN=0
# 写出 / writes: OUT: model-TYPE.gguf, Modelfile (Ollama), export_report.json
# 常用 / often used: --self_test 测试到哪一步 how far it is tested, --self_test_data 测试用的文本 texts of the test, --imatrix 重要性矩阵 importance matrix, --threads 线程数 threads, --overwrite 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant TYPES="f16 q8_0" OUT=output/try_gguf bash scripts/run_export_gguf.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to the model (folder or hub id)}"
read -ra TYPE_LIST <<< "${TYPES:-f16}"
run "$HERE/export_gguf.py" --base_model "$MODEL" --output_dir "${OUT:-output/gguf}" ${LORA:+--lora_model "$LORA"} \
  --types "${TYPE_LIST[@]}" "$@"
