#!/usr/bin/env bash
# 合并词表 / Extend a tokenizer with new pieces.  BASE=... SP=... bash scripts/run_merge_tokenizers.sh [any merge_tokenizers.py flag]
# Env: BASE* (基座词表目录 base tokenizer folder); SP (新词表 sentencepiece model, Llama-2/Mistral) 或 or DATA (语料 text, Llama-3/Qwen)
#      OUT=output/merged_tokenizer DRY_RUN=0    (* 必填 required)
# 写出 / writes: OUT: 合并后的分词器 tokenizer, vocabulary_report.md
# 常用 / often used: --report_text 语言=文本，报告用 LANGUAGE=TEXT of the report, --max_new_tokens 最多加多少 most new pieces, --pad_token 填充词元 padding token, --model_config 估计代价的模型 model whose cost is told, --overwrite 覆盖 replace
# 例 / example (make demo 之后 after it): BASE=output/demo/base SP=output/demo/zh_tokenizer/tokenizer.model OUT=output/try_tokenizer bash scripts/run_merge_tokenizers.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${BASE:?set BASE to the folder of the base tokenizer}"
if [[ -n ${SP:-} ]]; then
  SOURCE=(--chinese_sp_model_file "$SP")
else
  SOURCE=(--input "${DATA:?set SP to a sentencepiece model, or DATA to text for a byte-level base}")
fi
run "$HERE/merge_tokenizers.py" --base_tokenizer "$BASE" "${SOURCE[@]}" --output_dir "${OUT:-output/merged_tokenizer}" "$@"
