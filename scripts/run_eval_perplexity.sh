#!/usr/bin/env bash
# 困惑度随长度的曲线 / Perplexity against length.  MODEL=... TEXTS=... bash scripts/run_eval_perplexity.sh [any eval_perplexity.py flag]
# 必填 / required: MODEL 合并后的模型或基座 merged model or base; TEXTS 长文本的文件或目录 file or folder of long documents
# 可选 / optional: LORA 适配器目录 adapter folder, OUT=output/perplexity, LENGTHS="256 512 1024", SETTINGS="none auto-ntk yarn", DRY_RUN=0
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${MODEL:?set MODEL to a merged model or a base}" "${TEXTS:?set TEXTS to a file or folder of long documents}"
read -ra LENGTHS <<<"${LENGTHS:-256 512 1024}"
read -ra SETTINGS <<<"${SETTINGS:-}"
CMD=("${PYTHON:-python}" "$HERE/eval_perplexity.py" --base_model "$MODEL" --texts "$TEXTS"
     --output_dir "${OUT:-output/perplexity}" --lengths "${LENGTHS[@]}")
[[ ${#SETTINGS[@]} -gt 0 ]] && CMD+=(--settings "${SETTINGS[@]}")
[[ -n ${LORA:-} ]] && CMD+=(--lora_model "$LORA")
CMD+=("$@")
[[ ${DRY_RUN:-0} == 1 ]] && { printf '%q ' "${CMD[@]}"; echo; exit 0; }
exec "${CMD[@]}"
