"""LoRA on a mixture's experts: linear experts (this project) against PEFT on transformers' stacks, in 16 and 4 bits.

  python benchmarks/moe.py      (Mixtral's shape: hidden 512, 8 experts of which 2 compute, vocabulary 32,000; CPU)
The dense twin is a Llama of the same active parameters. All linear layers but the head have LoRA of rank 8. Each side
runs in its own process; sides alternate, medians are reported. Memory is anonymous memory: files that are only mapped
do not count. Seconds are processor seconds of one thread: those of more count how long they wait for each other, which
on a busy machine is most. The second half of the steps counts, since kernels are compiled in the first. Experts: bytes
of their weights with the constants of quantisation.
"""

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

SIDES = {
    "dense": "dense twin, 16 bits",
    "linear": "linear experts, 16 bits",
    "linear4": "linear experts, 4 bits",
    "stacks": "stacks, PEFT, 16 bits (no dropout)",
    "stacks4": "stacks, bitsandbytes' parametrisation, PEFT, 4 bits (no dropout)",
}
SIZES = {"vocab_size": 32000, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}


def make_models(folder: Path, layers: int) -> None:
    """The mixture and its dense twin, in 16 bits, with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": layers}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1792}
    for config in (MixtralConfig(**sizes, **experts), LlamaConfig(**sizes, intermediate_size=2 * 1792)):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / config.model_type)


def anonymous_memory() -> int:
    """Bytes of this process that no file holds."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


class Peak:
    """The most anonymous memory within a block, over what there was before."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.before, self.most, self.done = anonymous_memory(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, anonymous_memory() - self.before)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def load(side: str, folder: Path) -> Any:
    """The model of a side, with its adapter."""
    import torch

    from utils.core.arguments import LoraArguments, ModelArguments
    from utils.models.loading import load_model
    from utils.models.training_model import attach_adapter

    name = "llama" if side == "dense" else "mixtral"
    if not side.startswith("stacks"):
        bits: Any = 4 if side == "linear4" else 16
        args = ModelArguments(model_name_or_path=str(folder / name), load_in_kbits=bits)
        place = {"": "cpu"} if bits == 4 else None
        model: Any = load_model(args, torch.bfloat16, place, adapts_experts=side != "dense")
        lora = LoraArguments(target_modules="all", lora_rank=8, lora_alpha=16, lora_dropout=0.05)
        return attach_adapter(model, lora, bits)
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {}
    if side == "stacks4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16, **settings)
    if side == "stacks4":
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        for layer in model.model.layers:
            for stack in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(layer.mlp.experts, stack, compress_statistics=True, quant_type="nf4")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def expert_bytes(model: Any) -> int:
    """Of the experts' frozen weights; a dense model's MLPs count as such."""
    total = 0
    for name, module in model.named_modules():
        for value in module.parameters(recurse=False):
            if re.search(r"\.(experts|mlp)\b", name) and "lora_" not in name and not re.search(r"\.gate\b", name):
                total += value.nbytes
                state = getattr(value, "quant_state", None)
                state = state or getattr(getattr(module, "0", None), "quant_state", None)
                if state is not None:
                    total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


def measure(side: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    from peft import LoraConfig  # noqa: F401  # imports are no part of what is measured

    with Peak() as loading:
        model = load(side, folder)
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    # Text that can be learned: the next token is a function of this one.
    ids = torch.randint(0, 200, (args.steps, args.rows, 1))
    for _ in range(args.tokens - 1):
        ids = torch.cat([ids, (ids[..., -1:] * 37 + 11) % 32000], -1)
    seconds, losses = [], []
    with Peak() as training:
        for batch in ids:
            start = time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - start)
            losses.append(loss.item())
    return {
        "experts_mb": expert_bytes(model) / 1e6,
        "loading_mb": loading.most / 1e6,
        "training_mb": training.most / 1e6,
        "seconds": statistics.median(seconds[len(seconds) // 2 :]),  # before, kernels are compiled
        "losses": losses,
    }


def product_times() -> str:
    """Milliseconds of products in 16 bits with row counts not met before, and again: what compilation costs."""
    import torch

    torch.set_num_threads(1)
    weight, down = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((1792, 512), (8, 512)))
    times: dict[str, list[tuple[float, float]]] = {}
    for rows in range(129, 161):
        x, wide, low = (torch.randn(rows, size, dtype=torch.bfloat16) for size in (512, 1792, 8))
        products = {"x W": (x, weight.T), "grad W": (wide, weight), "x A": (x, down.T), "grad A": (low, down)}
        for name, (left, right) in products.items():
            spent = []
            for _ in range(2):
                start = time.process_time_ns()
                left @ right
                spent.append((time.process_time_ns() - start) / 1e6)
            times.setdefault(name, []).append((spent[0], spent[1]))
    medians = {name: [statistics.median(side) for side in zip(*pairs, strict=True)] for name, pairs in times.items()}
    parts = [f"{name} {first:.2f}, then {again:.2f}" for name, (first, again) in medians.items()]
    return "One expert's products for a row count not met before, then again (ms): " + "; ".join(parts) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 4, "rows": 1, "tokens": 1024, "steps": 8, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args)))
        return
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), args.layers)
        for _ in range(args.repeats):
            for side, results in runs.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--measure", side, folder]
                one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
                finished = subprocess.run(command, capture_output=True, text=True, env=one_thread)
                if finished.returncode:
                    raise SystemExit(f"{side}: {finished.stderr[-2000:]}")
                results.append(json.loads(finished.stdout.splitlines()[-1]))
                shown = {key: round(value, 2) for key, value in results[-1].items() if key != "losses"}
                print(side, shown, flush=True)
    lines = [
        "| side | experts (MB) | loading, most (MB) | training, most (MB) | seconds a step | last loss |",
        "|---|---|---|---|---|---|",
    ]
    for side, results in runs.items():
        m = {key: statistics.median(run[key] for run in results) for key in results[0] if key != "losses"}
        lines.append(
            f"| {SIDES[side]} | {m['experts_mb']:.1f} | {m['loading_mb']:.0f} | {m['training_mb']:.0f} | "
            f"{m['seconds']:.2f} | {results[0]['losses'][-1]:.4f} |"
        )
    if {"linear", "linear4"} <= runs.keys():
        pairs = zip(runs["linear"][0]["losses"], runs["linear4"][0]["losses"], strict=True)
        largest = max(abs(four / sixteen - 1) for sixteen, four in pairs)
        lines.append(f"\nLoss in 4 bits against 16, largest difference over {args.steps} steps: {largest:.2%}.")
    lines.append("\n" + product_times())
    print("\n".join(lines))
    if not args.no_record:
        from record import describe_run, record

        packages = ("torch", "transformers", "peft", "bitsandbytes")
        record("LoRA on a mixture's experts", "\n".join([describe_run(*packages), "", *lines]))


if __name__ == "__main__":
    main()
