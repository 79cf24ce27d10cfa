"""The whole recipe on a laptop CPU: a list of stages, each a command as one would type it.

A tiny English base -> Chinese vocabulary -> merge -> continued pre-training -> merge -> tuning -> merge -> GGUF and
other formats -> reward model, PPO, DPO -> answers and evaluations -> report.html in the folder of the run.

bash scripts/run_demo.sh
bash scripts/run_demo.sh --quick
bash scripts/run_demo.sh --dry_run
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template

from utils.core.arguments import arg
from utils.core.command_line import run, shell_command
from utils.report.stage_runner import Stage, run_stages

SCRIPTS = Path(__file__).resolve().parent
EXAMPLES = SCRIPTS.parent / "examples"
# What several commands say. The model is tiny, so its steps are small: no recomputation, rows of 256 tokens, learning
# rates ten times those of a 7B.
WORDS = {
    "EN": "$DATA/pretrain/en_train.txt",
    "ZH": "$DATA/pretrain/zh_train.txt",
    "HELDOUT": "zh=$DATA/pretrain/zh_heldout.txt en=$DATA/pretrain/en_heldout.txt",
    "SMALL": "--gradient_checkpointing False --per_device_train_batch_size 16 --gradient_accumulation_steps 1 "
    "--block_size 256 --validation_split 0 --logging_steps 10 --save_steps 100 --save_total_limit 1",
    "PAIRS": "--validation_data heldout=$DATA/rlhf/preferences_heldout.jsonl --validation_split 0 "
    "--max_seq_length 256 --prompt_template tokenizer --gradient_checkpointing False --per_device_eval_batch_size 32 "
    "--gradient_accumulation_steps 1 --logging_steps 5 --save_steps 1000 --save_total_limit 1",
    "ALIGNMENT": "--batch_size 64 --max_new_tokens 48 --dtype float32",
    "GREEDY": "--with_prompt --temperature 0 --repetition_penalty 1 --max_new_tokens 48 --batch_size 32 "
    "--dtype float32",
    "CHOICES": "--mode cloze --with_prompt --dtype float32 --prompt_template llama-2",
}


@dataclass
class DemoArguments:
    """Where the run goes, and its seed."""

    quick: bool = arg(
        False,
        help="A first look of four or five minutes: a third of the training steps, up to the tuned model, whose "
        "answers stand beside those before tuning.",
    )
    output_dir: str | None = arg(
        help="Folder of all stages; finished ones are skipped. Default: output/demo, with --quick output/quick."
    )
    seed: int = arg(42, help="Of every training stage.")
    dry_run: bool = arg(False, help="Print the commands of all stages instead of running them.")


def main(args: DemoArguments) -> None:
    """Run what is not finished, then the report; a failure ends this process with the exit status of its stage."""
    output_dir = args.output_dir or ("output/quick" if args.quick else "output/demo")
    stages = list_stages(output_dir, args.seed, args.quick)
    if args.dry_run:
        print("\n".join(f"== {stage.name}\n{shlex.join(stage.words)}" for stage in stages))
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if status := run_stages(stages, folder):
        sys.exit(status)
    if args.quick:
        print_look(folder)
    # The report is always made anew: it takes a second and sums up whatever was run again.
    elif status := subprocess.run(report_command(output_dir)).returncode:
        sys.exit(status)


def print_look(folder: Path) -> None:
    """Where a first look's answers are, and how to have some of one's own."""
    chat = ("bash", "scripts/run_inference.sh", "--interactive")
    print("\nA first look, after a third of the training steps")
    print(f"  what tuning changed: {folder / LOOK.makes}/answers.html")
    print(f"  next: {shell_command(*chat, MODEL=folder / 'assistant')}")
    print("  the whole recipe, ten to twenty minutes: make demo")


def list_stages(output_dir: str, seed: int, quick: bool = False) -> list[Stage]:
    """STAGES with the paths and the seed of a run; quick: those of a first look."""
    places = {"OUT": output_dir, "SCRIPTS": SCRIPTS, "EXAMPLES": EXAMPLES, "DATA": EXAMPLES / "data", "SEED": seed}
    quoted = {name: shlex.quote(str(value)) for name, value in places.items()}
    words = {name: Template(text).substitute(quoted) for name, text in WORDS.items()} | quoted
    stages = quick_stages() if quick else STAGES
    return [dataclasses.replace(stage, command=Template(stage.command).substitute(words)) for stage in stages]


def quick_stages() -> list[Stage]:
    """STAGES up to the tuned model, with fewer steps, and then a look at its answers."""
    names = [stage.name for stage in STAGES]
    stages = STAGES[: names.index("assistant") + 1]
    return [
        *(dataclasses.replace(stage, command=f"{stage.command} {QUICK.get(stage.name, '')}") for stage in stages),
        LOOK,
    ]


def report_command(output_dir: str) -> list[str]:
    """The report on all of it."""
    questions = EXAMPLES / "data" / "sft" / "heldout.json"
    return [
        "env",
        "-u",
        "RESULTS",
        f"RUN_DIR={output_dir}",
        f"QUESTIONS={questions}",
        "bash",
        str(SCRIPTS / "run_report.sh"),
    ]


# ---------------------------------------------------------------- the stages

# fmt: off


def alignment(method: str) -> Stage:
    """What it says to questions about right and wrong, beside what the tuned model says."""
    return Stage(f"alignment_{method}", f"alignment/{method}", "alignment.json", f"""
        MODEL=$OUT/{method}_merged OUT=$OUT/alignment/{method}
        bash $SCRIPTS/run_eval_alignment.sh $ALIGNMENT --compare $OUT/alignment/assistant/alignment.json""",
        needs=[f"{method}_merged", "alignment_assistant"], beside=True)


def aligned(method: str) -> Stage:
    """The tuned model with a part of what `method` changed: aligned as well, and what tuning taught is kept better."""
    return Stage(f"{method}_merged", f"{method}_merged", "config.json", f"""
        MODEL=$OUT/assistant LORA=$OUT/{method} OUT=$OUT/{method}_merged
        bash $SCRIPTS/run_merge.sh --adapter_weights 0.8""",
        needs=["assistant", method], beside=True)


def answers(name: str, model: str, adapter: str = "", template: str = "tokenizer") -> Stage:
    """Its answers to held-out questions of the tuning."""
    return Stage(f"answers_{name}", f"answers/{name}.json", command=f"""
        MODEL=$OUT/{model} {f"LORA=$OUT/{adapter}" if adapter else ""} bash $SCRIPTS/run_inference.sh
        --data_file $DATA/sft/heldout.json $GREEDY --prompt_template {template}
        --predictions_file $OUT/answers/{name}.json""",
        needs=[model, adapter] if adapter else [model], beside=True)


def choices(name: str, model: str = "") -> Stage:
    """What it knows: questions with choices in unseen wordings."""
    model = model or name
    return Stage(f"choices_{name}", f"choices/{name}", "multiple_choice.json", f"""
        MODEL=$OUT/{model} BENCHMARK=$DATA/choices SHOTS=0 OUT=$OUT/choices/{name}
        bash $SCRIPTS/run_eval_multiple_choice.sh $CHOICES""",
        needs=[model], beside=True)


STAGES = [
    Stage("base_tokenizer", "base_tokenizer", "tokenizer.model", """
        DATA=$EN OUT=$OUT/base_tokenizer VOCAB=1200 bash $SCRIPTS/run_train_tokenizer.sh"""),
    Stage("base", "base", "all_results.json", """
        CONFIG=$EXAMPLES/configs/demo_model TOKENIZER=$OUT/base_tokenizer DATA=$EN OUT=$OUT/base
        LR=3e-3 SEED=$SEED bash $SCRIPTS/run_pt.sh $SMALL --num_train_epochs 2 --validation_data $HELDOUT""",
        needs=["base_tokenizer"]),
    Stage("zh_tokenizer", "zh_tokenizer", "tokenizer.model", """
        DATA=$ZH OUT=$OUT/zh_tokenizer VOCAB=2000 bash $SCRIPTS/run_train_tokenizer.sh"""),
    Stage("merged_tokenizer", "merged_tokenizer", "tokenizer.model", """
        BASE=$OUT/base_tokenizer SP=$OUT/zh_tokenizer/tokenizer.model OUT=$OUT/merged_tokenizer
        bash $SCRIPTS/run_merge_tokenizers.sh --report_text $HELDOUT
        --base_language_sample $EN --hidden_size 256""",
        needs=["base_tokenizer", "zh_tokenizer"]),
    Stage("pretrain", "pretrain", "all_results.json", """
        MODEL=$OUT/base TOKENIZER=$OUT/merged_tokenizer DATA=$ZH OUT=$OUT/pretrain LR=2e-3 LORA_RANK=32 LORA_ALPHA=64
        SEED=$SEED bash $SCRIPTS/run_pt.sh $SMALL --num_train_epochs 2 --replay_data $EN --replay_share 0.3
        --validation_data $HELDOUT --compare_embedding_init""",
        needs=["base", "merged_tokenizer"]),
    Stage("pretrained", "pretrained", "config.json", """
        MODEL=$OUT/base LORA=$OUT/pretrain OUT=$OUT/pretrained bash $SCRIPTS/run_merge.sh""",
        needs=["base", "pretrain"]),
    Stage("sft", "sft", "all_results.json", """
        MODEL=$OUT/pretrained DATA=$DATA/sft/train.json OUT=$OUT/sft LR=3e-3 LORA_RANK=32 LORA_ALPHA=64 LENGTH=256
        TEMPLATE=llama-2 SEED=$SEED bash $SCRIPTS/run_sft.sh
        --train_data $DATA/sft/train.json $DATA/rlhf/sft_values.json --gradient_checkpointing False
        --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --num_train_epochs 7 --validation_split 0.02
        --modules_to_save embed_tokens,lm_head --save_steps 100 --save_total_limit 1""",
        needs=["pretrained"]),
    Stage("assistant", "assistant", "config.json", """
        MODEL=$OUT/pretrained LORA=$OUT/sft OUT=$OUT/assistant bash $SCRIPTS/run_merge.sh""",
        needs=["pretrained", "sft"]),
    Stage("gguf", "gguf", "export_report.json", """
        MODEL=$OUT/assistant OUT=$OUT/gguf TYPES="f16 q8_0 q4_0" bash $SCRIPTS/run_export_gguf.sh""",
        needs=["assistant"]),
    Stage("quantization", "quantization.json", command="""
        MODEL=$OUT/pretrained TEXTS=$DATA/pretrain/zh_heldout.txt OUT=$OUT/quantization.json
        bash $SCRIPTS/run_compare_formats.sh --formats float32 bnb-8bit bnb-4bit f16 q8_0 q4_0""",
        needs=["pretrained"]),
    # The tuned model was deliberately given bad answers to questions about right and wrong (rlhf/sft_values.json). A
    # reward model learns from pairs which answers are better; PPO follows it, DPO learns from the same pairs directly.
    Stage("rm", "rm", "all_results.json", """
        MODEL=$OUT/assistant DATA=$DATA/rlhf/preferences.jsonl OUT=$OUT/rm LR=5e-4 SEED=$SEED
        bash $SCRIPTS/run_rm.sh $PAIRS --full_finetuning --per_device_train_batch_size 16 --num_train_epochs 6""",
        needs=["assistant"], beside=True),
    Stage("dpo", "dpo", "all_results.json", """
        MODEL=$OUT/assistant DATA=$DATA/rlhf/preferences.jsonl OUT=$OUT/dpo LR=7e-4 BETA=0.3 LORA_RANK=16 LORA_ALPHA=32
        SEED=$SEED bash $SCRIPTS/run_dpo.sh $PAIRS --per_device_train_batch_size 16 --sft_weight 6 --lora_dropout 0
        --num_train_epochs 2""",
        needs=["assistant"], beside=True),
    Stage("alignment_assistant", "alignment/assistant", "alignment.json", """
        MODEL=$OUT/assistant OUT=$OUT/alignment/assistant bash $SCRIPTS/run_eval_alignment.sh $ALIGNMENT""",
        needs=["assistant"], beside=True),
    aligned("dpo"),
    alignment("dpo"),
    answers("dpo", "dpo_merged"),
    # The critic learns faster than by default, and its values may move further: they are of the size of the scores,
    # about 3. Advantages keep their size: whitening would scale up what is left of them once most answers are right.
    Stage("ppo", "ppo", "all_results.json", """
        MODEL=$OUT/assistant REWARD=$OUT/rm DATA=$DATA/rlhf/prompts.jsonl OUT=$OUT/ppo LR=2e-3 LORA_RANK=16
        LORA_ALPHA=32 PROMPT_LENGTH=200 LENGTH=48 SEED=$SEED bash $SCRIPTS/run_ppo.sh
        --validation_data heldout=$DATA/rlhf/prompts_heldout.jsonl --validation_split 0 --max_steps 28 --ppo_epochs 2
        --lam 1 --critic_learning_rate 1e-2 --value_coef 0.3 --value_clip_range 5 --sft_data $DATA/sft/train.json
        --sft_ratio 1 --whiten_advantages False --gradient_checkpointing False --rollout_batch_size 128
        --per_device_rollout_batch_size 64 --per_device_train_batch_size 32 --gradient_accumulation_steps 1
        --eval_steps 14 --save_steps 14 --save_total_limit 1""",
        needs=["assistant", "rm"]),
    aligned("ppo"),
    alignment("ppo"),
    answers("ppo", "ppo_merged"),
    answers("base", "base", template="llama-2"),
    answers("adapter", "pretrained", "sft"),
    answers("assistant", "assistant"),
    choices("base"),
    choices("pretrained"),
    choices("assistant"),
    choices("ppo", "ppo_merged"),
    choices("dpo", "dpo_merged"),
    # The held-out texts, by every model as it is and in 4 bits, in one paired table.
    Stage("perplexity", "perplexity", "perplexity.json", """
        MODEL=$OUT/base TEXTS=zh=$DATA/pretrain/zh_heldout.txt OUT=$OUT/perplexity KBITS="16 4"
        bash $SCRIPTS/run_eval_perplexity.sh --texts $HELDOUT
        --other_models $OUT/pretrained $OUT/assistant $OUT/ppo_merged $OUT/dpo_merged
        --max_documents 60 --dtype float32""",
        needs=["base", "pretrained", "assistant", "ppo_merged", "dpo_merged"], beside=True),
]
# A first look: what --quick adds to the commands of these stages, and its last one.
QUICK = {
    "base": "--max_steps 25",
    "pretrain": "--max_steps 25 --compare_embedding_init False",
    "sft": "--max_steps 250",
}
LOOK = Stage("look", "look", "answers.md", """
        MODEL=$OUT/pretrained MODELS=after_tuning=$OUT/assistant QUESTIONS=$DATA/sft/heldout.json OUT=$OUT/look
        bash $SCRIPTS/run_eval_answers.sh --max_new_tokens 48 --batch_size 32 --dtype float32""",
        needs=["pretrained", "assistant"])
# fmt: on


if __name__ == "__main__":
    run(main, DemoArguments, description=__doc__)
