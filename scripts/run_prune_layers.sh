#!/usr/bin/env bash
# 裁剪层数，或重复层加深 / A smaller model by keeping layers, or a deeper one by repeating them.  MODEL=... KEEP=... bash scripts/run_prune_layers.sh [any prune_layers.py flag]
# 必填 / required: MODEL 全精度模型 (先合并适配器) full-precision model (merge adapters first); KEEP 保留的层 layers to keep: first:N, even:N or 0,1,5-9 (KEEP= with --depth_upscale)
# 可选 / optional: OUT=output/pruned DTYPE=auto DRY_RUN=0
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to the full-precision model (folder or hub id)}" "${KEEP?set KEEP to the layers to keep, such as first:4 (or KEEP= and pass --depth_upscale)}"
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/prune_layers.py" --base_model "$MODEL" ${KEEP:+--keep "$KEEP"} --output_dir "${OUT:-output/pruned}" \
  --dtype "${DTYPE:-auto}" "$@"
