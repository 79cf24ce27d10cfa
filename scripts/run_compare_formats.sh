#!/usr/bin/env bash
# 比较各种存储格式 / Size, perplexity and speed of a model in every storage format.  MODEL=... TEXTS=... bash scripts/run_compare_formats.sh [any compare_formats.py flag]
# 必填 / required: MODEL 全精度模型 full-precision model; TEXTS 模型没见过的文本，文件或目录 text the model has not seen, file or folder
# 可选 / optional: OUT=output/formats.json, DRY_RUN=0
# 写出 / writes: OUT 表格 table, 旁边是图 a picture beside it
# 常用 / often used: --formats 比较哪些格式 which formats, --gguf_dir 已导出的 GGUF exported GGUF files, --max_tokens 最多读多少词元 most tokens that are read, --window 窗口 window, --calibration_data 校准文本 calibration text
# 例 / example (make demo 之后 after it): MODEL=output/demo/assistant TEXTS=examples/data/pretrain/zh_heldout.txt OUT=output/try_formats.json bash scripts/run_compare_formats.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to the full-precision model (folder)}" "${TEXTS:?set TEXTS to a file or folder with text the model has not seen}"
run "$HERE/compare_formats.py" --base_model "$MODEL" --texts "$TEXTS" --output "${OUT:-output/formats.json}" "$@"
