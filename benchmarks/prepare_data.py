"""Preparing pre-training text: this project's token cache against the usual `datasets` pipeline, in one run.

Text is repeated to --megabytes and prepared by both sides with the same tokenizer and number of processes:
- ours: `utils.data.corpora.tokenize_corpus`, as pt.py calls it;
- theirs: load_dataset("text"), a batched map with the transformers tokenizer (input_ids, attention_mask, labels), a
  batched map that groups into blocks of --block_size, save_to_disk; as Chinese-LLaMA-Alpaca-2 does.
Each repetition runs in a fresh process with empty caches. The clock starts when libraries are imported and the
tokenizer is loaded, and stops when the result is on disk.

python benchmarks/prepare_data.py --tokenizer ../shared/data/tokenizers/chinese_llama2_55296 \
    --text ../shared/data/pt/zh_answers.txt ../shared/data/pt/zh_d2l.txt ../shared/data/pt/zh_songci.txt
python benchmarks/prepare_data.py --megabytes 20 --repeats 1 --no_record --tokenizer DIR --text FILE
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SIDES = ("ours", "theirs")
SECTION = "Preparing pre-training text"


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure both sides by turns, print the table, and record it."""
    args = parse_arguments(argv)
    if args.side:
        print(json.dumps(run_side(args)))
        return {}
    sys.path.insert(0, str(HERE))
    from record import describe_run, record

    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(dir=args.scratch_dir) as folder:
        corpus = repeat_text([Path(path) for path in args.text], Path(folder) / "text", args.megabytes)
        for _ in range(args.repeats):
            for side in SIDES:
                runs[side].append(measure(side, corpus, args))
                print(side, json.dumps(runs[side][-1]), flush=True)
    medians = {
        side: {name: statistics.median(run[name] for run in results) for name in results[0]}
        for side, results in runs.items()
    }
    text = format_results(medians, args)
    print(text)
    if not args.no_record:
        record(SECTION, f"{text}\n\n{describe_run('sentencepiece', 'transformers', 'datasets', 'numpy')}")
    return medians


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="Tokenizer folder.")
    parser.add_argument("--text", nargs="+", required=True, help="txt files, one document a line.")
    parser.add_argument("--megabytes", type=float, default=200, help="Size to which the text is repeated.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="Repetitions; medians are reported.")
    parser.add_argument("--scratch_dir", help="Where the text and both results are written; default: the system's.")
    parser.add_argument("--no_record", action="store_true", help="Do not write RESULTS.md.")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def repeat_text(files: Sequence[Path], folder: Path, megabytes: float) -> Path:
    """One txt file of about that size, whole repetitions only."""
    text = b"".join(path.read_bytes().rstrip(b"\n") + b"\n" for path in files)
    folder.mkdir()
    with open(folder / "corpus.txt", "wb") as file:
        for _ in range(max(1, round(megabytes * 1e6 / len(text)))):
            file.write(text)
    time.sleep(2.5)  # older than two seconds, as any user's corpus: its hash may then be remembered
    return folder / "corpus.txt"


# ---------------------------------------------------------------- one measurement


def measure(side: str, corpus: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run one side in a process of its own; watch the memory of its whole tree."""
    with tempfile.TemporaryDirectory(dir=corpus.parent.parent) as output:
        command = [sys.executable, str(Path(__file__).resolve()), "--side", side, "--output", output]
        command += ["--tokenizer", args.tokenizer, "--text", str(corpus), "--processes", str(args.processes)]
        command += ["--block_size", str(args.block_size)]
        # Every file of theirs lies below `output`, so that all caches are counted.
        environment = {**os.environ, "HF_HOME": f"{output}/hf", "HF_DATASETS_CACHE": f"{output}/datasets"}
        environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": output}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        memory = TreeMemory(process.pid)
        printed, _ = process.communicate()
        peak = memory.stop()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
        result: dict[str, Any] = json.loads(printed.decode().strip().splitlines()[-1])
        size = sum(item.stat().st_size for item in Path(output).rglob("*") if item.is_file())
    return {
        "seconds": result["seconds"],
        "tokens": result["tokens"],
        "tokens_per_second": result["tokens"] / result["seconds"],
        "cpu_seconds": result["cpu_seconds"],
        "bytes_per_token": size / result["tokens"],
        "peak_rss_mb": peak / 1e6,
    }


class TreeMemory:
    """Peak of the summed resident memory of a process and all its descendants, sampled every 100 ms.

    Shared pages are counted once a process, so this is an upper bound.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self.ended = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        import psutil

        while not self.ended.wait(0.1):
            total = 0
            try:
                tree = [psutil.Process(self.pid)]
                tree += tree[0].children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            for process in tree:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.peak


# ---------------------------------------------------------------- the two sides


def run_side(args: argparse.Namespace) -> dict[str, float]:
    """What the measured process does: load the tokenizer, prepare the text, and say what it took."""
    load, prepare = (load_ours, prepare_ours) if args.side == "ours" else (load_theirs, prepare_theirs)
    tokenizer = load(args.tokenizer)
    start, start_cpu = time.perf_counter(), cpu_seconds()
    tokens = prepare(tokenizer, args)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds() - start_cpu,
        "tokens": tokens,
    }


def cpu_seconds() -> float:
    """Processor time of this process and of those it has waited for; other load on the machine does not change it."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def load_ours(folder: str) -> Any:
    sys.path.insert(0, str(HERE.parent / "scripts"))
    import utils.data.corpora  # noqa: F401 (imports are not timed)
    from utils.text.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def prepare_ours(tokenizer: Any, args: argparse.Namespace) -> int:
    from utils.data.cache import CacheSettings
    from utils.data.corpora import tokenize_corpus

    settings = CacheSettings(Path(args.output) / "cache", num_workers=args.processes)
    return len(tokenize_corpus(args.text, tokenizer, settings).tokens)


def load_theirs(folder: str) -> Any:
    import datasets  # noqa: F401 (imports are not timed)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, add_bos_token=True, add_eos_token=True)
    ids = tokenizer("a")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return tokenizer


def prepare_theirs(tokenizer: Any, args: argparse.Namespace) -> int:
    from datasets import load_dataset

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(batch["text"]))

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain.from_iterable(lists)) for name, lists in batch.items()}
        length = len(joined["input_ids"]) // args.block_size * args.block_size
        blocks = {
            name: [values[i : i + args.block_size] for i in range(0, length, args.block_size)]
            for name, values in joined.items()
        }
        return {**blocks, "labels": [list(block) for block in blocks["input_ids"]]}

    data = load_dataset("text", data_files=args.text, split="train")
    data = data.map(tokenize, batched=True, num_proc=args.processes, remove_columns=["text"])
    data = data.map(group, batched=True, num_proc=args.processes)
    data.save_to_disk(f"{args.output}/blocks", num_proc=args.processes)
    return len(data) * args.block_size  # what is dropped at batch edges was work too, but less than 1 %


# ---------------------------------------------------------------- the report


def format_results(medians: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    ours, theirs = medians["ours"], medians["theirs"]
    lines = [
        f"Chinese text repeated to {args.megabytes:g} MB, {args.processes} processes, median of {args.repeats}.",
        "",
        "| | token cache | datasets map + group + save_to_disk | ratio |",
        "|---|---|---|---|",
    ]
    for name, label, digits in (
        ("seconds", "seconds", 1),
        ("tokens_per_second", "tokens/s", 0),
        ("cpu_seconds", "processor seconds of all processes", 1),
        ("bytes_per_token", "bytes of disk a token, all caches", 2),
        ("peak_rss_mb", "peak memory of all processes, MB", 0),
    ):
        ratio = ours[name] / theirs[name]
        lines.append(f"| {label} | {ours[name]:,.{digits}f} | {theirs[name]:,.{digits}f} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
