#!/usr/bin/env bash
# 训练词表 / Train a sentencepiece vocabulary.  DATA=... bash scripts/run_train_tokenizer.sh [any train_tokenizer.py flag]
# Env: DATA* (文件或目录 file or folder) OUT=output/chinese_sp VOCAB=20000 SEED=42 DRY_RUN=0    (* 必填 required)
# 写出 / writes: OUT: tokenizer.model, tokenizer.json, training_report.json
# 常用 / often used: --character_coverage 覆盖的字 share of characters, --max_sentences 最多多少行 most lines, --text_column 文本字段 field of the text, --num_threads 线程数 threads, --overwrite 覆盖 replace
# 例 / example (make demo 之后 after it): DATA=examples/data/pretrain/zh_train.txt VOCAB=2000 OUT=output/try_sp bash scripts/run_train_tokenizer.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"  # shows this head for --help
: "${DATA:?set DATA to a text file or folder}"
run "$HERE/train_tokenizer.py" --input "$DATA" --output_dir "${OUT:-output/chinese_sp}" --vocab_size "${VOCAB:-20000}" --seed "${SEED:-42}" "$@"
