#!/usr/bin/env bash
# 合并词表 / Extend a tokenizer with new pieces.  BASE=... SP=... bash scripts/run_merge_tokenizers.sh [any merge_tokenizers.py flag]
# Env: BASE* (基座词表目录 base tokenizer folder); SP (新词表 sentencepiece model, Llama-2/Mistral) 或 or DATA (语料 text, Llama-3/Qwen)
#      OUT=output/merged_tokenizer DRY_RUN=0    (* 必填 required)
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${BASE:?set BASE to the folder of the base tokenizer}"
if [[ -n ${SP:-} ]]; then
  SOURCE=(--chinese_sp_model_file "$SP")
else
  SOURCE=(--input "${DATA:?set SP to a sentencepiece model, or DATA to text for a byte-level base}")
fi
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/merge_tokenizers.py" --base_tokenizer "$BASE" "${SOURCE[@]}" --output_dir "${OUT:-output/merged_tokenizer}" "$@"
