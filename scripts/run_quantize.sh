#!/usr/bin/env bash
# 量化 / Quantise a model into a Hugging Face folder.  MODEL=... bash scripts/run_quantize.sh [any quantize.py flag]
# 必填 / required: MODEL 全精度模型 (先合并适配器) full-precision model (merge adapters first)
# 可选 / optional: METHOD=bnb-4bit (bnb-8bit gptq awq fp8) OUT=output/quantized CALIBRATION 校准文本 calibration text for gptq, awq; DRY_RUN=0
# 写出 / writes: OUT: 量化后的模型 quantised model, 报告 report
# 常用 / often used: --dtype 其余权重的类型 type of the other weights, --num_calibration_samples 校准样本数 calibration samples, --group_size 分组大小 group size, --double_quant 二次量化 quantise the scales too, --overwrite 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant OUT=output/try_quantized bash scripts/run_quantize.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to the full-precision model (folder or hub id)}"
run "$HERE/quantize.py" --base_model "$MODEL" --method "${METHOD:-bnb-4bit}" --output_dir "${OUT:-output/quantized}" \
  ${CALIBRATION:+--calibration_data "$CALIBRATION"} "$@"
