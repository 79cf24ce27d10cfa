"""What a command spends before its work: --help of every script, and the smallest real work of some, by turns.

  python benchmarks/startup.py --tokenizer ../shared/data/tokenizers/chinese_llama2_55296 --against ../before
A Llama of two layers of width 64, random weights, so that the work itself is next to nothing. Figures are processor
seconds (user and system, child processes too), which a machine busy with other work changes less than the clock's.
--against is a checkout of another commit (git worktree add ../before COMMIT): both run by turns on the same files.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

PORT = 18764
TRAINING = "--max_steps 1 --per_device_train_batch_size 1 --lora_rank 4 --report_to none --use_cpu"
# What each row runs, in a folder where model, adapter, sft.json, pairs.jsonl and text.txt lie; OUT is new each time.
TASKS = {
    "a question": "inference_hf.py --base_model model --prompt hi --max_new_tokens 1",
    "a question, adapter": "inference_hf.py --base_model model --lora_model adapter --prompt hi --max_new_tokens 1",
    "a look at a folder": "inference_hf.py --check model",
    "server until it answers": f"openai_api_server.py --base_model model --port {PORT}",
    "web chat until it answers": f"gradio_demo.py --base_model model --port {PORT}",
    "a merge": "merge_llama2_with_chinese_lora_low_mem.py --base_model model --lora_model adapter --output_dir OUT",
    "perplexity of a text": "eval_perplexity.py --base_model model --texts t=text.txt --output_dir OUT",
    "a step of pre-training": f"pt.py --model_name_or_path model --train_data text.txt --output_dir OUT {TRAINING}",
    "a step of tuning": f"sft.py --model_name_or_path model --train_data sft.json --output_dir OUT {TRAINING}",
    "a step of DPO": f"dpo.py --model_name_or_path model --train_data pairs.jsonl --output_dir OUT {TRAINING}",
    "a plan of memory": "plan_memory.py sft --model_name_or_path model --max_seq_length 64",
}  # fmt: skip


def prepare(folder: Path, tokenizer_folder: str) -> None:
    """Make the files of TASKS."""
    from models import random_llama

    from utils.text.prompts import CHAT_TEMPLATES
    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = CHAT_TEMPLATES["alpaca-2"]
    model = random_llama(tokenizer, hidden_size=64, num_hidden_layers=2, max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    save_tokenizer(tokenizer, folder / "model")
    (folder / "text.txt").write_text("今天天气很好。We went for a walk in the park.\n" * 40, encoding="utf-8")
    samples = [{"instruction": f"What is {n} and {n}?", "input": "", "output": f"{2 * n}"} for n in range(20)]
    (folder / "sft.json").write_text(json.dumps(samples), encoding="utf-8")
    pairs = [{"prompt": sample["instruction"], "chosen": sample["output"], "rejected": "no"} for sample in samples]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    spend(ROOT, TASKS["a step of tuning"].replace("OUT", "adapter"), folder)


def spend(checkout: Path, task: str, folder: Path) -> float:
    """Processor seconds of a script, which must end well; of one that serves until it answers a request."""
    script, *flags = task.split()
    with open(folder / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, str(checkout / "scripts" / script), *flags], cwd=folder, stdout=log, stderr=log
        )
        if serves := str(PORT) in flags:
            wait_until_it_answers()
            process.terminate()
        _, status, usage = os.wait4(process.pid, 0)
        if status and not serves:
            raise SystemExit(f"{checkout}: {task}:\n{(folder / 'log').read_text(encoding='utf-8')}")
    return usage.ru_utime + usage.ru_stime


def wait_until_it_answers() -> None:
    """Raises: SystemExit after five minutes."""
    for _ in range(1500):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/docs", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server does not answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--against", type=Path, help="checkout of another commit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", nargs="+", help="only rows whose name holds one of these words")
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    sides = {"before": args.against.resolve()} if args.against else {}
    sides["now"] = ROOT
    helps = {f"{path.name} --help": f"{path.name} --help" for path in sorted((ROOT / "scripts").glob("*.py"))}
    rows = {
        name: task
        for name, task in (helps | TASKS).items()
        if not args.rows or any(word in name for word in args.rows)
    }
    lines = [f"Processor seconds, medians of {args.repeats}.", ""]
    lines += [f"| start | {' | '.join(sides)} |" + " before : now |" * (len(sides) - 1)]
    lines += ["|---" * (len(lines[-1].split("|")) - 2) + "|"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, str(Path(args.tokenizer).resolve()))
        for name, task in rows.items():
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            for turn in range(args.repeats):
                for side, checkout in sides.items():
                    output = f"{side}-{len(lines)}-{turn}"
                    seconds[side].append(spend(checkout, task.replace("OUT", output), folder))
            figures = [f"{statistics.median(seconds[side]):.2f}" for side in sides]
            if args.against:
                ratios = [one / other for one, other in zip(seconds["before"], seconds["now"], strict=True)]
                figures.append(f"{statistics.median(ratios):.2f}")
            lines.append(f"| {name} | {' | '.join(figures)} |")
            print(lines[-1], flush=True)
    if not args.no_record:
        from record import describe_run, record

        record("Start-up", "\n".join([describe_run("torch", "transformers", "peft"), "", *lines]))


if __name__ == "__main__":
    main()
