#!/usr/bin/env bash
# 训练词表 / Train a sentencepiece vocabulary.  DATA=... bash scripts/run_train_tokenizer.sh [any train_tokenizer.py flag]
# Env: DATA* (文件或目录 file or folder) OUT=output/chinese_sp VOCAB=20000 SEED=42 DRY_RUN=0    (* 必填 required)
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${DATA:?set DATA to a text file or folder}"
# shellcheck source=scripts/launch.sh
source "$HERE/launch.sh"
run "$HERE/train_tokenizer.py" --input "$DATA" --output_dir "${OUT:-output/chinese_sp}" --vocab_size "${VOCAB:-20000}" --seed "${SEED:-42}" "$@"
