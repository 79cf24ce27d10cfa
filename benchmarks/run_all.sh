#!/usr/bin/env bash
# 全部测量，写入 benchmarks/RESULTS.md / All measurements into benchmarks/RESULTS.md:  SHARED=../shared/data make bench
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python} SHARED=${SHARED:-../shared/data}
"$PYTHON" benchmarks/train_step.py
"$PYTHON" benchmarks/moe.py
"$PYTHON" benchmarks/adapter_dropout.py
"$PYTHON" benchmarks/ppo_step.py
"$PYTHON" benchmarks/evaluation_cost.py
if [[ -d $SHARED ]]; then
  "$PYTHON" benchmarks/prepare_data.py --tokenizer "$SHARED/tokenizers/chinese_llama2_55296" --text "$SHARED"/pt/zh_*.txt
  "$PYTHON" benchmarks/sft_packing.py --data "$SHARED/sft/alpaca_zh_10k.json" --tokenizer "$SHARED/tokenizers/chinese_llama2_55296"
  "$PYTHON" benchmarks/dpo_step.py --data "$SHARED/preference/dpo_zh_demo.json" --tokenizer "$SHARED/tokenizers/chinese_llama2_55296"
  "$PYTHON" benchmarks/serving.py --tokenizer "$SHARED/tokenizers/chinese_llama2_55296"
  "$PYTHON" benchmarks/startup.py --tokenizer "$SHARED/tokenizers/chinese_llama2_55296"
  "$PYTHON" benchmarks/decoding_step.py --tokenizer "$SHARED/tokenizers/chinese_llama2_55296"
  "$PYTHON" benchmarks/merge.py --tokenizer "$SHARED/tokenizers/chinese_llama2_55296"
  "$PYTHON" benchmarks/long_context.py --shared "$SHARED"
  "$PYTHON" benchmarks/multiple_choice.py --shared "$SHARED"
  SHARED=$SHARED PYTHON=$PYTHON bash benchmarks/real_run.sh
else
  echo "the other measurements need real text: set SHARED to a folder with pt/, sft/ and tokenizers/"
fi
if [[ -f output/demo/pretrained/config.json ]]; then  # make demo
  "$PYTHON" benchmarks/prune_layers.py
  "$PYTHON" benchmarks/pretraining_recipes.py
fi
