#!/usr/bin/env bash
# 量化 / Quantise a model into a Hugging Face folder.  MODEL=... bash scripts/run_quantize.sh [any quantize.py flag]
# 必填 / required: MODEL 全精度模型 (先合并适配器) full-precision model (merge adapters first)
# 可选 / optional: METHOD=bnb-4bit (bnb-8bit gptq awq fp8) OUT=output/quantized CALIBRATION 校准文本 calibration text for gptq, awq; DRY_RUN=0
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to the full-precision model (folder or hub id)}"
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/quantize.py" --base_model "$MODEL" --method "${METHOD:-bnb-4bit}" --output_dir "${OUT:-output/quantized}" \
  ${CALIBRATION:+--calibration_data "$CALIBRATION"} "$@"
