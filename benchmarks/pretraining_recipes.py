"""Recipes of continued pre-training with a larger vocabulary, on the demo's base: bits a byte after as many steps.

  make demo && python benchmarks/pretraining_recipes.py --demo output/demo
Each row is pt.py as the demo runs it (LoRA, embed_tokens and lm_head whole, English replayed) with other flags. The
staged row spends a part of the steps on the new rows alone, and goes on with the adapter.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "data" / "pretrain"
sys.path.insert(0, str(ROOT / "scripts"))

TEXTS = ("zh", "en")


def pretrain(args, out: Path, steps: int, *flags) -> dict[str, float]:
    """{text: bits a byte} after pt.py."""
    import pt

    from utils.core.arguments import DataArguments, ExtendArguments, LoraArguments, ModelArguments
    from utils.core.command_line import parse_args
    from utils.training.arguments import RunArguments

    argv = ["--model_name_or_path", args.demo / "base", "--tokenizer_name_or_path", args.demo / "merged_tokenizer"]
    argv += ["--train_data", DATA / "zh_train.txt", "--replay_data", DATA / "en_train.txt", "--replay_share", 0.3]
    argv += ["--validation_data", *(f"{name}={DATA}/{name}_heldout.txt" for name in TEXTS), "--output_dir", out]
    argv += ["--lora_rank", 32, "--lora_alpha", 64, "--lora_dropout", 0.05, "--target_modules", "all"]
    argv += ["--modules_to_save", "embed_tokens,lm_head", "--block_size", 256, "--per_device_train_batch_size", 16]
    argv += ["--learning_rate", args.learning_rate, "--lr_scheduler_type", "cosine", "--warmup_steps", 0.05]
    argv += ["--weight_decay", 0.01, "--max_steps", steps, "--seed", args.seed, "--save_strategy", "no"]
    argv += ["--report_to", "none", "--logging_steps", 20, "--disable_tqdm", "True", *flags]
    types = (ModelArguments, ExtendArguments, LoraArguments, DataArguments, pt.PretrainingArguments, RunArguments)
    metrics = pt.main(*parse_args(*types, argv=list(map(str, argv))))
    return {name: metrics[f"eval_{name}_bits_per_byte"] for name in TEXTS}


def rows(args, folder: Path) -> dict[str, dict[str, float]]:
    steps, rate, first = args.steps, args.learning_rate, args.steps // 4
    decay = f'{{"num_decay_steps": {steps // 5}}}'
    stable = ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", decay]
    found = {"as the demo": pretrain(args, folder / "plain", steps)}
    for factor in (0.25, 0.5, 2.0):
        name = f"--embedding_learning_rate {factor:g} x --learning_rate"
        found[name] = pretrain(args, folder / f"x{factor}", steps, "--embedding_learning_rate", factor * rate)
    found["--lr_scheduler_type warmup_stable_decay, the last fifth decays"] = pretrain(
        args, folder / "stable", steps, *stable
    )
    stage = folder / "stage"
    found[f"--train_new_rows_only for {first} steps"] = pretrain(args, stage, first, "--train_new_rows_only")
    found[f"then everything for {steps - first}"] = pretrain(
        args, folder / "staged", steps - first, "--adapter_name_or_path", stage
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "output" / "demo", help="folder of a finished make demo")
    parser.add_argument("--steps", type=int, default=80, help="of each row, 16 blocks of 256 tokens each")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    if not (args.demo / "merged_tokenizer").is_dir():
        parser.error(f"{args.demo}/merged_tokenizer: no such folder; run make demo, or pass --demo")
    with tempfile.TemporaryDirectory() as temporary:
        report(args, rows(args, Path(temporary)))


def report(args, found: dict[str, dict[str, float]]) -> None:
    lines = [
        f"The demo's English base with its merged vocabulary: {args.steps} steps of 4,096 tokens, learning rate "
        f"{args.learning_rate:g}; one run each, seed {args.seed}.",
        "",
        f"| recipe | {' | '.join(f'{name}, bits/byte' for name in TEXTS)} |",
        "|---|" + "---|" * len(TEXTS),
        *(f"| {name} | {' | '.join(f'{bits[text]:.4f}' for text in TEXTS)} |" for name, bits in found.items()),
    ]
    print("\n".join(lines))
    if not args.no_record:
        from record import describe_run, record

        record("Recipes of continued pre-training", "\n".join([describe_run("torch", "transformers"), "", *lines]))


if __name__ == "__main__":
    main()
