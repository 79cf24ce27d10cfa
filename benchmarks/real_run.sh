#!/usr/bin/env bash
# 真实语料上的一次完整流程 / The recipe on real text, about 20M parameters on a CPU:  SHARED=../shared/data bash benchmarks/real_run.sh
# 英文 -> 基座; 中文 -> 词表; 三种新词向量初始化各做一次继续预训练; 指令精调; 回答示例 -> benchmarks/RESULTS.md
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCRIPTS=$HERE/../scripts
: "${SHARED:?set SHARED to the folder of the shared data}"
export PYTHON=${PYTHON:-python} HF_HUB_OFFLINE=1
OUT_DIR=${OUT:-output/real_run} BLOCKS=${BLOCKS:-300} SAMPLES=${SAMPLES:-10000}
mkdir -p "$OUT_DIR/data"

# The last 2 % of the lines of every file are held out.
for name in en_c4 en_wiki zh_answers zh_d2l zh_songci; do
  lines=$(wc -l < "$SHARED/pt/$name.txt")
  held=$((lines / 50 + 1))
  head -n $((lines - held)) "$SHARED/pt/$name.txt" > "$OUT_DIR/data/$name.train.txt"
  tail -n "$held" "$SHARED/pt/$name.txt" > "$OUT_DIR/data/$name.held.txt"
done
cat "$OUT_DIR"/data/en_*.held.txt > "$OUT_DIR/data/en.txt"
cat "$OUT_DIR"/data/zh_*.held.txt > "$OUT_DIR/data/zh.txt"
cat "$OUT_DIR"/data/zh_*.train.txt > "$OUT_DIR/data/zh_all.txt"
HELDOUT=("zh=$OUT_DIR/data/zh.txt" "en=$OUT_DIR/data/en.txt")
EN=("$OUT_DIR/data/en_c4.train.txt" "$OUT_DIR/data/en_wiki.train.txt")
ZH=("$OUT_DIR/data/zh_answers.train.txt" "$OUT_DIR/data/zh_d2l.train.txt" "$OUT_DIR/data/zh_songci.train.txt")
SMALL=(--gradient_checkpointing False --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --validation_split 0
  --block_size 512 --save_steps 1000 --save_total_limit 1)
done_already() { [[ -e $1 ]]; }

done_already "$OUT_DIR/base/all_results.json" ||
  CONFIG=$HERE/../examples/configs/demo_model TOKENIZER=$SHARED/tokenizers/llama2_32000 DATA=${EN[0]} OUT=$OUT_DIR/base LR=2e-3 \
    bash "$SCRIPTS/run_pt.sh" "${SMALL[@]}" --num_train_epochs 2 --train_data "${EN[@]}" --validation_data "${HELDOUT[@]}"
done_already "$OUT_DIR/zh_sp/tokenizer.model" ||
  DATA=$OUT_DIR/data/zh_all.txt OUT=$OUT_DIR/zh_sp VOCAB=8000 bash "$SCRIPTS/run_train_tokenizer.sh"
done_already "$OUT_DIR/merged_tokenizer/tokenizer.model" ||
  BASE=$SHARED/tokenizers/llama2_32000 SP=$OUT_DIR/zh_sp/tokenizer.model OUT=$OUT_DIR/merged_tokenizer \
    bash "$SCRIPTS/run_merge_tokenizers.sh" --report_text "${HELDOUT[@]}" --hidden_size 256
for init in mean_of_pieces mean random; do
  done_already "$OUT_DIR/pt_$init/all_results.json" ||
    MODEL=$OUT_DIR/base TOKENIZER=$OUT_DIR/merged_tokenizer DATA=${ZH[0]} OUT=$OUT_DIR/pt_$init LR=1e-3 LORA_RANK=32 LORA_ALPHA=64 \
      bash "$SCRIPTS/run_pt.sh" "${SMALL[@]}" --num_train_epochs 1 --train_data "${ZH[@]}" --max_train_samples "$BLOCKS" \
      --replay_data "${EN[@]}" --replay_share 0.2 --validation_data "${HELDOUT[@]}" --embedding_init "$init" --compare_embedding_init
done
done_already "$OUT_DIR/pretrained/config.json" ||
  MODEL=$OUT_DIR/base LORA=$OUT_DIR/pt_mean_of_pieces OUT=$OUT_DIR/pretrained bash "$SCRIPTS/run_merge.sh"
done_already "$OUT_DIR/sft/all_results.json" ||
  MODEL=$OUT_DIR/pretrained DATA=$SHARED/sft/alpaca_zh_10k.json OUT=$OUT_DIR/sft LR=1e-3 LORA_RANK=32 LORA_ALPHA=64 LENGTH=512 \
    bash "$SCRIPTS/run_sft.sh" --gradient_checkpointing False --per_device_train_batch_size 8 --gradient_accumulation_steps 1 \
    --validation_split 0.02 --modules_to_save embed_tokens,lm_head --save_steps 1000 --max_train_samples "$SAMPLES"
done_already "$OUT_DIR/assistant/config.json" ||
  MODEL=$OUT_DIR/pretrained LORA=$OUT_DIR/sft OUT=$OUT_DIR/assistant bash "$SCRIPTS/run_merge.sh"
printf '%s\n' 什么是三原色？ 给出三个保持健康的秘诀。 写一首关于春天的短诗。 如何学习一门新的语言？ > "$OUT_DIR/questions.txt"
done_already "$OUT_DIR/answers.json" ||
  MODEL=$OUT_DIR/assistant bash "$SCRIPTS/run_inference.sh" --data_file "$OUT_DIR/questions.txt" --temperature 0 \
    --max_new_tokens 80 --predictions_file "$OUT_DIR/answers.json"
"$PYTHON" "$HERE/real_run.py" --run_dir "$OUT_DIR"
