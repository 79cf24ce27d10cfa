"""Instruction tuning, packed rows against padded batches of 8: useful (not padding) tokens a second, side by side.

  python benchmarks/sft_packing.py --data ../shared/data/sft/alpaca_zh_10k.json \
      --tokenizer ../shared/data/tokenizers/chinese_llama2_55296
Both sides train the same model on the same samples with the same loss; they alternate, medians are reported.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))


def useful_tokens(batch) -> int:
    """Tokens of samples: a padding segment has positions of its own but no target, and carries the padding id 0."""
    return int((batch["input_ids"] != 0).sum())


def train(model, optimizer, rows, size: int, collator, num_tokens: int) -> float:
    """Useful tokens a second over about `num_tokens` of them."""
    import torch

    from utils.models.lm_loss import loss_targets

    done, start = 0, time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator).tolist()
    for first in range(0, len(order) - size, size):
        batch = collator([rows[index] for index in order[first : first + size]])
        done += useful_tokens(batch)
        targets = batch["shift_labels"]
        with torch.autocast("cpu", dtype=torch.bfloat16), loss_targets(model, targets):
            out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        (out.logits / (targets != -100).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if done >= num_tokens:
            break
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--max_seq_length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=60_000, help="useful tokens a measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    import torch
    from models import random_llama

    from utils.data.batches import Collator
    from utils.data.blocks import PackedSamples, PaddedSamples
    from utils.data.cache import CacheSettings
    from utils.data.samples import load_sft_samples
    from utils.models.lm_loss import install_loss_head
    from utils.text.prompts import CHAT_TEMPLATES
    from utils.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        template = CHAT_TEMPLATES["alpaca-2"]
        samples = load_sft_samples([args.data], tokenizer, template, args.max_seq_length, CacheSettings(Path(cache)))
        packed, padded = PackedSamples(samples, args.max_seq_length), PaddedSamples(samples)
        model = random_llama(tokenizer, hidden_size=512, intermediate_size=1376, num_hidden_layers=8).train()
        install_loss_head(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        collator = Collator(0)
        shares = {
            "padded, 8 samples": useful_share(padded, 8, collator),
            "packed, 4 rows": useful_share(packed, 4, collator),
        }
        rates: dict[str, list[float]] = {name: [] for name in shares}
        train(model, optimizer, packed, 4, collator, args.tokens // 4)  # warm-up
        for _ in range(args.repeats):
            for name, rows, size in (("padded, 8 samples", padded, 8), ("packed, 4 rows", packed, 4)):
                rates[name].append(train(model, optimizer, rows, size, collator, args.tokens))
                print(name, round(rates[name][-1]), "useful tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    lines = ["| rows | useful tokens a second | useful share of all tokens |", "|---|---|---|"]
    lines += [f"| {name} | {medians[name]:,.0f} | {shares[name]:.1%} |" for name in medians]
    slow, fast = medians.values()
    lines.append(f"\nPacked rows train {fast / slow:.2f} x the useful tokens a second (medians of {args.repeats}).")
    print("\n".join(lines))
    if not args.no_record:
        from record import describe_run, record

        record(
            "Instruction tuning, packed against padded", "\n".join([describe_run("torch", "transformers"), "", *lines])
        )


def useful_share(rows, size: int, collator) -> float:
    useful = total = 0
    for first in range(0, min(len(rows), 800) - size, size):
        batch = collator([rows[index] for index in range(first, first + size)])
        useful += useful_tokens(batch)
        total += batch["input_ids"].numel()
    return useful / total


if __name__ == "__main__":
    main()
