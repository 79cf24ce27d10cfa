#!/usr/bin/env bash
# 比较各种存储格式 / Size, perplexity and speed of a model in every storage format.  MODEL=... TEXTS=... bash scripts/run_compare_formats.sh [any compare_formats.py flag]
# 必填 / required: MODEL 全精度模型 full-precision model; TEXTS 模型没见过的文本，文件或目录 text the model has not seen, file or folder
# 可选 / optional: OUT=output/formats.json, DRY_RUN=0
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to the full-precision model (folder)}" "${TEXTS:?set TEXTS to a file or folder with text the model has not seen}"
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/compare_formats.py" --base_model "$MODEL" --texts "$TEXTS" --output "${OUT:-output/formats.json}" "$@"
