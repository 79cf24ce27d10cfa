#!/usr/bin/env bash
# 文本的困惑度与 bits/byte / Perplexity and bits a byte of texts.  MODEL=... TEXTS=... bash scripts/run_eval_perplexity.sh [any eval_perplexity.py flag]
# 必填 / required: MODEL 模型或 GGUF 文件 model or GGUF file; TEXTS 文本的文件或目录 file or folder of documents
# 可选 / optional: LORA 适配器目录 adapter folder, OUT=output/perplexity, OTHERS="比较的模型 models to compare", KBITS="16 4",
#   WINDOW, STRIDE 整篇文档的窗口与步长 of whole documents, LENGTHS="256 512 1024" 改画长度曲线 a curve instead,
#   SETTINGS="none auto-ntk yarn" 比较的缩放 scalings to compare, DRY_RUN=0
# 写出 / writes: OUT: perplexity.json, perplexity.png, documents.jsonl
# 常用 / often used: --max_documents 最多多少篇 most documents, --text_column 文本字段 field of the text, --document_separator 文档分隔行 line between documents, --dtype 数值类型 type of the weights, --overwrite 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/pretrained TEXTS=examples/data/pretrain/zh_heldout.txt OTHERS=output/demo/base OUT=output/try_perplexity bash scripts/run_eval_perplexity.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to a merged model, a base or a GGUF file}" "${TEXTS:?set TEXTS to a file or folder of documents}"
FLAGS=(--base_model "$MODEL" --texts "$TEXTS" --output_dir "${OUT:-output/perplexity}"
  ${LORA:+--lora_model "$LORA"} ${WINDOW:+--window "$WINDOW"} ${STRIDE:+--stride "$STRIDE"})
# 词与词之间用空格 / words between spaces
for FLAG in lengths:LENGTHS settings:SETTINGS other_models:OTHERS kbits:KBITS; do
  NAME=${FLAG#*:}
  read -ra WORDS <<<"${!NAME:-}"
  [[ ${#WORDS[@]} -gt 0 ]] && FLAGS+=("--${FLAG%%:*}" "${WORDS[@]}")
done
run "$HERE/eval_perplexity.py" "${FLAGS[@]}" "$@"
