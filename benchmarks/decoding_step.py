"""The decoding step in bf16 on a CPU: packed weights against plain ones, and transformers' own generate, by turns.

  python benchmarks/decoding_step.py --tokenizer ../shared/data/tokenizers/chinese_llama2_55296
The Llama of 58M random weights of serving.py, and the model folder in the environment's REAL_MODEL if there is one;
1, 4 and 16 prompts of 40 tokens are answered greedily in one process. Figures are tokens a second of processor time,
which a machine busy with other work changes less than the clock's; ratios are taken within a repetition.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

ROWS = (1, 4, 16)
SIDES = ("generate", "plain weights", "packed weights")


def measure(name: str, folder: Path, tokens: int, repeats: int) -> list[str]:
    """A line of the table for each number of rows."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from utils.core.arguments import GenerationArguments
    from utils.generation.batching import Generator
    from utils.generation.prepacking import prepack
    from utils.text.tokenizer import load_tokenizer

    tokenizer, generators = load_tokenizer(folder), {}
    for side in SIDES[1:]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        model.generation_config = GenerationConfig()
        if side == SIDES[2]:
            prepack(model)
        generators[side] = Generator(model, tokenizer)
        generators[side].stop_ids = []
    settings = GenerationArguments(max_new_tokens=tokens, temperature=0.0, repetition_penalty=1.0)
    lines = []
    for rows in ROWS:
        ids = torch.randint(5, 5000, (rows, 40), generator=torch.Generator().manual_seed(rows))

        def answer(side: str, ids: torch.Tensor = ids) -> Any:
            if side != SIDES[0]:
                return generators[side].generate(ids.tolist(), settings)
            with torch.no_grad():
                return generators[SIDES[1]].model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                    max_new_tokens=tokens, min_new_tokens=tokens,
                )  # fmt: skip

        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(repeats + 1):
            for side in SIDES:
                start = time.process_time()
                answer(side)
                seconds[side].append(time.process_time() - start)
        kept = {side: values[1:] for side, values in seconds.items()}  # the first warms up
        rates = [f"{rows * tokens / statistics.median(kept[side]):.1f}" for side in SIDES]
        ratios = [
            f"{statistics.median(one / own for one, own in zip(kept[side], kept[SIDES[2]], strict=True)):.2f}"
            for side in SIDES[:2]
        ]
        lines.append(f"| {name} | {rows} | " + " | ".join([*rates, *ratios]) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    from serving import make_model

    from utils.generation.prepacking import pays_here

    if not pays_here():
        raise SystemExit(
            "this processor does not multiply in bf16: weights stay as they are, there is nothing to compare"
        )
    lines = [
        f"bf16, {args.tokens} greedy tokens an answer, tokens a second of processor time; medians of {args.repeats}.",
        "",
        "| model | rows | generate | plain weights | packed weights | packed : generate | packed : plain |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch) / "model", args.tokenizer)
        lines += measure("58M, random", Path(scratch) / "model", args.tokens, args.repeats)
    if real := os.environ.get("REAL_MODEL"):
        lines += measure("REAL_MODEL", Path(real), args.tokens, args.repeats)
    if not args.no_record:
        from record import describe_run, record

        record("The decoding step", "\n".join([describe_run("torch", "transformers"), "", *lines]))


if __name__ == "__main__":
    main()
