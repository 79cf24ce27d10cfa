"""Memory and time of a training step at a large vocabulary: transformers' own loss against the chunked one.

  python benchmarks/train_step.py      (vocabulary 55,296, hidden 1024, 4 layers, 4 x 512 tokens, bf16 autocast, CPU)
Each side runs in its own process: extra memory = peak resident memory of the steps minus what the process held once
model and optimizer state existed. Sides alternate, medians are reported.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))


def measure(side: str, args: argparse.Namespace) -> dict[str, float]:
    import psutil
    import torch
    from models import random_llama

    from utils.models.lm_loss import install_loss_head, loss_targets

    model = random_llama(
        args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
    ).train()
    if side == "chunked":
        install_loss_head(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the optimizer's state
    optimizer.zero_grad()
    gc.collect()
    ids = torch.randint(0, args.vocabulary, (args.rows, args.tokens))
    targets = torch.cat([ids[:, 1:], torch.full((args.rows, 1), -100)], 1)
    process = psutil.Process()
    before, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if side == "chunked":
                with loss_targets(model, targets):
                    loss = model(input_ids=ids).logits / (targets != -100).sum()
            else:
                loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    seconds, losses = [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    done.set()
    watcher.join()
    return {"extra_gb": (peak - before) / 1e9, "seconds": statistics.median(seconds[1:]), "loss": losses[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "vocabulary": 55296,
        "hidden": 1024,
        "layers": 4,
        "rows": 4,
        "tokens": 512,
        "steps": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=["plain", "chunked"], help=argparse.SUPPRESS)
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "chunked": []}
    for _ in range(args.repeats):
        for side, results in runs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
            print(side, results[-1], flush=True)
    median = {
        side: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for side, results in runs.items()
    }
    lines = ["| loss | extra memory (GB) | seconds a step | loss after the last step |", "|---|---|---|---|"]
    names = {"plain": "transformers' own", "chunked": "chunked (this project)"}
    lines += [
        f"| {names[s]} | {m['extra_gb']:.2f} | {m['seconds']:.2f} | {m['loss']:.4f} |" for s, m in median.items()
    ]
    memory = median["chunked"]["extra_gb"] / median["plain"]["extra_gb"]
    speed = median["plain"]["seconds"] / median["chunked"]["seconds"]
    lines.append(
        f"\nExtra memory {memory:.1%} of the plain loss, {speed:.2f} x its speed (medians of {args.repeats} runs)."
    )
    print("\n".join(lines))
    if not args.no_record:
        from record import describe_run, record

        record("Training step at a large vocabulary", "\n".join([describe_run("torch", "transformers"), "", *lines]))


if __name__ == "__main__":
    main()
