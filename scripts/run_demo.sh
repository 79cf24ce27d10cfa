#!/usr/bin/env bash
# 一条命令跑完整个流程 (笔记本 CPU) / The whole recipe on a laptop CPU:  bash scripts/run_demo.sh
#   英文小模型 -> 中文词表 -> 合并词表 -> 继续预训练 -> 合并 -> 指令精调 -> 合并 -> GGUF 与量化 -> 奖励模型, PPO, DPO -> 问答与评测 -> output/demo/report.html
#   tiny English base -> Chinese vocabulary -> merge -> continued pre-training -> merge -> tuning -> merge -> GGUF, formats -> reward model, PPO, DPO -> answers -> report
# 可选 / optional: OUT=output/demo SEED=42.  已完成的步骤会跳过; 删除某一步的目录即可重跑该步及其后的步骤
# Finished stages are skipped; delete a stage's folder to run it and those after it again.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
export PYTHON=${PYTHON:-python} HF_HUB_OFFLINE=1
# Memory that a step has freed stays with the process for the next one: asking the system for it again costs a tenth of the run time.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}
OUT_DIR=${OUT:-output/demo} SEED=${SEED:-42}
DATA_DIR=$ROOT/examples/data
EN=$DATA_DIR/pretrain/en_train.txt ZH=$DATA_DIR/pretrain/zh_train.txt
HELDOUT=("zh=$DATA_DIR/pretrain/zh_heldout.txt" "en=$DATA_DIR/pretrain/en_heldout.txt")
mkdir -p "$OUT_DIR"

# stage NAME TARGET MARK COMMAND...: run the command unless TARGET+MARK exists; its time and memory go to stages.jsonl.
# What a stage made before is removed once a stage above it, which may be needed by it, has run again.
# beside ...: the same for stages that need nothing of one another and are mostly start-up, or too small for all cores:
# they wait for `together`, which runs two at a time with half of the cores each. after ...: once the one above has ended.
stage() { beside "$@"; together; }
beside() {
  local name=$1 target=$2 mark=$2$3
  shift 3
  if [[ -n ${RUNNING:-} ]]; then
    rm -rf "$target" "$target".*
  elif [[ -e $mark ]]; then
    echo "== $name: finished before, skipped ($mark)"
    return
  fi
  RUNNING=yes
  WAITING+=("$name" "$@" "<end>")
}
after() {
  (( ${#WAITING[@]} == 0 )) || WAITING[${#WAITING[@]}-1]="<then>"
  beside "$@"
}
WAITING=()
together() {
  (( ${#WAITING[@]} == 0 )) || "$PYTHON" - "$HERE" "$OUT_DIR/stages.jsonl" "${WAITING[@]}" <<'PY'
import sys
sys.path.insert(0, sys.argv[1])
from utils.report.stage_runner import main
sys.exit(main(sys.argv[2], sys.argv[3:]))
PY
  WAITING=()
}

# The model is tiny, so its steps are small: no recomputation, rows of 256 tokens, learning rates ten times those of a 7B.
SMALL=(--gradient_checkpointing False --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --block_size 256
  --validation_split 0 --logging_steps 10 --save_steps 100 --save_total_limit 1)

stage base_tokenizer "$OUT_DIR/base_tokenizer" /tokenizer.model \
  env DATA="$EN" OUT="$OUT_DIR/base_tokenizer" VOCAB=1200 bash "$HERE/run_train_tokenizer.sh"
stage base "$OUT_DIR/base" /all_results.json \
  env CONFIG="$ROOT/examples/configs/demo_model" TOKENIZER="$OUT_DIR/base_tokenizer" DATA="$EN" OUT="$OUT_DIR/base" LR=3e-3 SEED="$SEED" \
  bash "$HERE/run_pt.sh" "${SMALL[@]}" --num_train_epochs 2 --validation_data "${HELDOUT[@]}"
stage zh_tokenizer "$OUT_DIR/zh_tokenizer" /tokenizer.model \
  env DATA="$ZH" OUT="$OUT_DIR/zh_tokenizer" VOCAB=2000 bash "$HERE/run_train_tokenizer.sh"
stage merged_tokenizer "$OUT_DIR/merged_tokenizer" /tokenizer.model \
  env BASE="$OUT_DIR/base_tokenizer" SP="$OUT_DIR/zh_tokenizer/tokenizer.model" OUT="$OUT_DIR/merged_tokenizer" \
  bash "$HERE/run_merge_tokenizers.sh" --report_text "${HELDOUT[@]}" --base_language_sample "$EN" --hidden_size 256
stage pretrain "$OUT_DIR/pretrain" /all_results.json \
  env MODEL="$OUT_DIR/base" TOKENIZER="$OUT_DIR/merged_tokenizer" DATA="$ZH" OUT="$OUT_DIR/pretrain" LR=2e-3 LORA_RANK=32 LORA_ALPHA=64 SEED="$SEED" \
  bash "$HERE/run_pt.sh" "${SMALL[@]}" --num_train_epochs 2 --replay_data "$EN" --replay_share 0.3 \
  --validation_data "${HELDOUT[@]}" --compare_embedding_init
stage pretrained "$OUT_DIR/pretrained" /config.json \
  env MODEL="$OUT_DIR/base" LORA="$OUT_DIR/pretrain" OUT="$OUT_DIR/pretrained" bash "$HERE/run_merge.sh"
stage sft "$OUT_DIR/sft" /all_results.json \
  env MODEL="$OUT_DIR/pretrained" DATA="$DATA_DIR/sft/train.json" OUT="$OUT_DIR/sft" LR=3e-3 LORA_RANK=32 LORA_ALPHA=64 LENGTH=256 TEMPLATE=llama-2 SEED="$SEED" \
  bash "$HERE/run_sft.sh" --train_data "$DATA_DIR/sft/train.json" "$DATA_DIR/rlhf/sft_values.json" \
  --gradient_checkpointing False --per_device_train_batch_size 8 --gradient_accumulation_steps 1 \
  --num_train_epochs 7 --validation_split 0.02 --modules_to_save embed_tokens,lm_head --save_steps 100 --save_total_limit 1
stage assistant "$OUT_DIR/assistant" /config.json \
  env MODEL="$OUT_DIR/pretrained" LORA="$OUT_DIR/sft" OUT="$OUT_DIR/assistant" bash "$HERE/run_merge.sh"

stage gguf "$OUT_DIR/gguf" /export_report.json \
  env MODEL="$OUT_DIR/assistant" OUT="$OUT_DIR/gguf" TYPES="f16 q8_0 q4_0" bash "$HERE/run_export_gguf.sh"
stage quantization "$OUT_DIR/quantization" .json \
  "$PYTHON" "$ROOT/benchmarks/quantization.py" --model "$OUT_DIR/pretrained" --texts "$DATA_DIR/pretrain/zh_heldout.txt" \
  --formats float32 bnb-8bit bnb-4bit f16 q8_0 q4_0 --output "$OUT_DIR/quantization.json" --no_record

# The tuned model was deliberately given bad answers to questions about right and wrong (rlhf/sft_values.json). A reward
# model learns from pairs which answers are better; PPO follows it, DPO learns from the same pairs directly.
PAIRS=(--validation_data "heldout=$DATA_DIR/rlhf/preferences_heldout.jsonl" --validation_split 0 --max_seq_length 256 --prompt_template tokenizer
  --gradient_checkpointing False --per_device_eval_batch_size 32 --gradient_accumulation_steps 1
  --logging_steps 5 --save_steps 1000 --save_total_limit 1)
ALIGNMENT=(--batch_size 64 --max_new_tokens 48 --dtype float32)
GREEDY=(--data_file "$DATA_DIR/sft/heldout.json" --with_prompt --temperature 0 --repetition_penalty 1 --max_new_tokens 48 --batch_size 32 --dtype float32)
judge() { # beside|after METHOD: its alignment, and its answers to held-out questions of the tuning
  "$1" "alignment_$2" "$OUT_DIR/alignment/$2" /alignment.json \
    env MODEL="$OUT_DIR/assistant" LORA="$OUT_DIR/$2" OUT="$OUT_DIR/alignment/$2" \
    bash "$HERE/run_eval_alignment.sh" "${ALIGNMENT[@]}" --compare "$OUT_DIR/alignment/assistant/alignment.json"
  "$1" "answers_$2" "$OUT_DIR/answers/$2" .json \
    env MODEL="$OUT_DIR/assistant" LORA="$OUT_DIR/$2" bash "$HERE/run_inference.sh" "${GREEDY[@]}" --prompt_template tokenizer --predictions_file "$OUT_DIR/answers/$2.json"
}
beside rm "$OUT_DIR/rm" /all_results.json \
  env MODEL="$OUT_DIR/assistant" DATA="$DATA_DIR/rlhf/preferences.jsonl" OUT="$OUT_DIR/rm" LR=1e-3 SEED="$SEED" \
  bash "$HERE/run_rm.sh" "${PAIRS[@]}" --full_finetuning --per_device_train_batch_size 16 --num_train_epochs 4
beside dpo "$OUT_DIR/dpo" /all_results.json \
  env MODEL="$OUT_DIR/assistant" DATA="$DATA_DIR/rlhf/preferences.jsonl" OUT="$OUT_DIR/dpo" LR=7e-4 BETA=0.3 LORA_RANK=16 LORA_ALPHA=32 SEED="$SEED" \
  bash "$HERE/run_dpo.sh" "${PAIRS[@]}" --per_device_train_batch_size 16 --sft_weight 3 --lora_dropout 0 --num_train_epochs 2
after alignment_assistant "$OUT_DIR/alignment/assistant" /alignment.json \
  env MODEL="$OUT_DIR/assistant" OUT="$OUT_DIR/alignment/assistant" bash "$HERE/run_eval_alignment.sh" "${ALIGNMENT[@]}"
judge after dpo
together
# The critic learns faster than by default, and its values may move further: they are of the size of the scores, about 3.
# Advantages keep their size: whitening would scale up what is left of them once most of the answers are right.
stage ppo "$OUT_DIR/ppo" /all_results.json \
  env MODEL="$OUT_DIR/assistant" REWARD="$OUT_DIR/rm" DATA="$DATA_DIR/rlhf/prompts.jsonl" OUT="$OUT_DIR/ppo" LR=2e-3 LORA_RANK=16 LORA_ALPHA=32 \
  PROMPT_LENGTH=200 LENGTH=48 SEED="$SEED" \
  bash "$HERE/run_ppo.sh" --validation_data "heldout=$DATA_DIR/rlhf/prompts_heldout.jsonl" --validation_split 0 --max_steps 28 --ppo_epochs 1 --lam 1 \
  --critic_learning_rate 1e-2 --value_coef 0.3 --value_clip_range 5 --sft_data "$DATA_DIR/sft/train.json" --sft_ratio 0.75 --whiten_advantages False \
  --gradient_checkpointing False --rollout_batch_size 128 --per_device_rollout_batch_size 64 --per_device_train_batch_size 32 \
  --gradient_accumulation_steps 1 --eval_steps 14 --save_steps 14 --save_total_limit 1

judge beside ppo
beside answers_base "$OUT_DIR/answers/base" .json \
  env MODEL="$OUT_DIR/base" bash "$HERE/run_inference.sh" "${GREEDY[@]}" --prompt_template llama-2 --predictions_file "$OUT_DIR/answers/base.json"
beside answers_adapter "$OUT_DIR/answers/adapter" .json \
  env MODEL="$OUT_DIR/pretrained" LORA="$OUT_DIR/sft" bash "$HERE/run_inference.sh" "${GREEDY[@]}" --prompt_template tokenizer --predictions_file "$OUT_DIR/answers/adapter.json"
beside answers_assistant "$OUT_DIR/answers/assistant" .json \
  env MODEL="$OUT_DIR/assistant" bash "$HERE/run_inference.sh" "${GREEDY[@]}" --prompt_template tokenizer --predictions_file "$OUT_DIR/answers/assistant.json"
# What each stage knows: questions with choices in unseen wordings, and the held-out texts, as they are and in 4 bits, in one paired table.
CHOICES=(--mode cloze --with_prompt --dtype float32)
for MODEL in base pretrained assistant; do
  beside "choices_$MODEL" "$OUT_DIR/choices/$MODEL" /multiple_choice.json \
    env MODEL="$OUT_DIR/$MODEL" BENCHMARK="$DATA_DIR/choices" SHOTS=0 OUT="$OUT_DIR/choices/$MODEL" \
    bash "$HERE/run_eval_multiple_choice.sh" "${CHOICES[@]}" --prompt_template llama-2
done
for METHOD in ppo dpo; do
  beside "choices_$METHOD" "$OUT_DIR/choices/$METHOD" /multiple_choice.json \
    env MODEL="$OUT_DIR/assistant" LORA="$OUT_DIR/$METHOD" BENCHMARK="$DATA_DIR/choices" SHOTS=0 OUT="$OUT_DIR/choices/$METHOD" \
    bash "$HERE/run_eval_multiple_choice.sh" "${CHOICES[@]}" --prompt_template llama-2
done
beside perplexity "$OUT_DIR/perplexity" /perplexity.json \
  env MODEL="$OUT_DIR/base" TEXTS="${HELDOUT[0]}" OUT="$OUT_DIR/perplexity" KBITS="16 4" bash "$HERE/run_eval_perplexity.sh" --texts "${HELDOUT[@]}" \
  --other_models "$OUT_DIR/pretrained" "$OUT_DIR/assistant" "$OUT_DIR/ppo" "$OUT_DIR/dpo" --max_documents 60 --dtype float32
together
# The report is always made anew: it takes a second and sums up whatever was run again.
"$PYTHON" "$HERE/report.py" --run_dir "$OUT_DIR" --questions "$DATA_DIR/sft/heldout.json"
