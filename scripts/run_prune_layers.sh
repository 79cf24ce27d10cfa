#!/usr/bin/env bash
# 裁剪层数，或重复层加深 / A smaller model by keeping layers, or a deeper one by repeating them.  MODEL=... KEEP=... bash scripts/run_prune_layers.sh [any prune_layers.py flag]
# 必填 / required: MODEL 全精度模型 (先合并适配器) full-precision model (merge adapters first); KEEP 保留的层 layers to keep: first:N, even:N or 0,1,5-9 (KEEP= with --depth_upscale)
# 可选 / optional: OUT=output/pruned DTYPE=auto DRY_RUN=0
# 写出 / writes: OUT: 模型 model, prune_report.json
# 常用 / often used: --dry_run 只检查 check only, --depth_upscale 重复的层 layers to repeat, --max_shard_size 分片大小 size of a shard, --overwrite 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/pretrained KEEP=first:2 OUT=output/try_pruned bash scripts/run_prune_layers.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to the full-precision model (folder or hub id)}" "${KEEP?set KEEP to the layers to keep, such as first:4 (or KEEP= and pass --depth_upscale)}"
run "$HERE/prune_layers.py" --base_model "$MODEL" ${KEEP:+--keep "$KEEP"} --output_dir "${OUT:-output/pruned}" \
  --dtype "${DTYPE:-auto}" "$@"
