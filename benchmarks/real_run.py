"""Write what benchmarks/real_run.sh measured into benchmarks/RESULTS.md.

python benchmarks/real_run.py --run_dir output/real_run
"""

import argparse
import json
from pathlib import Path

from record import describe_run, record

INITS = ("mean_of_pieces", "mean", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True)
    folder = parser.parse_args().run_dir

    def results(stage: str) -> dict:
        return json.loads((folder / stage / "all_results.json").read_text(encoding="utf-8"))

    base = results("base")
    lines = [
        "Bits per byte on held-out text (base: 19.7M parameters, Llama-2's tokenizer; before: new rows set, step 0).",
        "",
    ]
    lines += ["| model | Chinese before | Chinese after | English before | English after |", "|---|---|---|---|---|"]
    own = {name: base[f"eval_{name}_bits_per_byte"] for name in ("zh", "en")}
    lines.append(f"| base, own vocabulary | | {own['zh']:.3f} | | {own['en']:.3f} |")
    for init in INITS:
        after = results(f"pt_{init}")
        before = json.loads((folder / f"pt_{init}" / "embedding_init.json").read_text(encoding="utf-8"))[init]
        cells = [f"{before[n]:.3f} | {after[f'eval_{n}_bits_per_byte']:.3f}" for n in ("zh", "en")]
        lines.append(f"| continued, --embedding_init {init} | {cells[0]} | {cells[1]} |")
    lines += ["", "| stage | steps | tokens a second | seconds | peak memory (GB) |", "|---|---|---|---|---|"]
    for stage in ("base", *(f"pt_{init}" for init in INITS), "sft"):
        r = results(stage)
        figures = [f"{r['tokens_per_second']:,.0f}", f"{r['seconds']:.0f}", f"{r['peak_memory_gb']:.2f}"]
        lines.append(f"| {stage} | {r['steps']} | {' | '.join(figures)} |")
    lines += [
        "",
        f"Held-out loss of alpaca_zh_10k after tuning: {results('sft')['eval_heldout_loss']:.3f} nats a token.",
        "",
    ]
    lines += ["Greedy answers of the tuned model:", ""]
    for answer in json.loads((folder / "answers.json").read_text(encoding="utf-8")):
        text = " ".join(answer["Output"].split())
        lines.append(f"- {answer['Input']} → {text}")
    record("Real text, 20M parameters", "\n".join([describe_run("torch", "transformers", "peft"), "", *lines]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
