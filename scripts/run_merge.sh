#!/usr/bin/env bash
# 合并 LoRA 与基座模型 / Merge LoRA adapters into their base.  MODEL=... LORA=... bash scripts/run_merge.sh [any merge flag]
# 必填 / required: MODEL 基座模型 base model; LORA 适配器目录，多个以逗号分隔、按训练顺序 adapter folders, comma-separated, in training order
# 可选 / optional: OUT=output/merged DTYPE=auto DRY_RUN=0
# 写出 / writes: OUT: 完整的模型 a whole model, merge_report.json, merge_manifest.json
# 常用 / often used: --verify 核对 logits compare the logits, --dry_run 只检查 check only, --tokenizer_path 用哪个分词器 which tokenizer, --output_type pth 为 Meta 格式 pth: Meta layout, --overwrite 覆盖 replace
# 例 / example (make demo 之后 after it): MODEL=output/demo/pretrained LORA=output/demo/sft OUT=output/try_merged bash scripts/run_merge.sh --verify
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${MODEL:?set MODEL to the base model (folder or hub id)}" "${LORA:?set LORA to the adapter folder, or several, comma-separated}"
run "$HERE/merge_llama2_with_chinese_lora_low_mem.py" \
  --base_model "$MODEL" --lora_model "$LORA" --output_dir "${OUT:-output/merged}" --dtype "${DTYPE:-auto}" "$@"
