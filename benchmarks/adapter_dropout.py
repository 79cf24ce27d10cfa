"""A LoRA step on a CPU with torch's dropout, with the adapters' own, and with none, by turns in one process.

  python benchmarks/adapter_dropout.py
The demo's model and a wider one with random weights, LoRA of rank 32 on all linear layers, dropout 0.05, rows of 256
tokens. Figures are processor seconds, which a machine busy with other work changes less than the clock's; ratios are
taken within a repetition.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

SIDES = ("torch's", "the adapters'", "none")
MODELS = {  # name: settings, rows of a step
    "4.6M, the demo's": ({"hidden_size": 256, "num_hidden_layers": 4}, 8),
    "58M": ({"hidden_size": 512, "num_hidden_layers": 8}, 4),
}


def measure(name: str, repeats: int, bf16: bool) -> str:
    """A line of the table."""
    import torch
    from models import random_llama
    from torch import nn

    from utils.core.arguments import LoraArguments
    from utils.models.dropout import AdapterDropout
    from utils.models.training_model import attach_adapter

    settings, rows = MODELS[name]
    base = random_llama(3000 if rows == 8 else 55_296, **settings)
    model = attach_adapter(base, LoraArguments(lora_rank=32, target_modules="all", lora_dropout=0.05), 16).train()
    ids = torch.randint(5, 3000, (rows, 256), generator=torch.Generator().manual_seed(0))
    forward: dict[str, Callable[..., torch.Tensor]] = {
        SIDES[0]: nn.Dropout.forward, SIDES[1]: AdapterDropout.forward, SIDES[2]: lambda self, x: x,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(repeats + 1):
        for side in SIDES:
            AdapterDropout.forward = forward[side]
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                model(input_ids=ids, labels=ids).loss.backward()
            seconds[side].append(time.process_time() - start)
            model.zero_grad()
    AdapterDropout.forward = forward[SIDES[1]]
    kept = {side: values[1:] for side, values in seconds.items()}  # the first warms up
    ratio = statistics.median(a / b for a, b in zip(kept[SIDES[0]], kept[SIDES[1]], strict=True))
    figures = [f"{statistics.median(kept[side]):.3f}" for side in SIDES]
    line = f"| {name} | {'bf16' if bf16 else 'float32'} | " + " | ".join([*figures, f"{ratio:.2f}"]) + " |"
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    lines = [
        f"LoRA of rank 32 on all linear layers, forward and backward, processor seconds; medians of {args.repeats}.",
        "",
        f"| model | precision | {' | '.join(SIDES)} | torch's : the adapters' |",
        "|---|---|---|---|---|---|",
        *(measure(name, args.repeats, bf16) for name in MODELS for bf16 in (True, False)),
    ]
    if not args.no_record:
        from record import describe_run, record

        record("Dropout of adapters on CPUs", "\n".join([describe_run("torch", "peft"), "", *lines]))


if __name__ == "__main__":
    main()
