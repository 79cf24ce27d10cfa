"""Merging and exporting at full size: synthetic fp16 weights of 7B and of a Mixtral-8x7B cut to a few layers.

Every row runs in a process of its own with a cold cache, is timed from start to exit, and its output is deleted:
- `cat`: copies the base's files, the floor that the disk sets; `cat + sync` waits until the copy is on the disk;
- `merge`, `pth`: merge_llama2_with_chinese_lora_low_mem.py with a rank-64 adapter and full embed_tokens and lm_head;
- `peft`: load, merge_and_unload, save_pretrained, as LLaMA-Factory does;
- `gguf-f16`, `gguf-q8_0`: export_gguf.py of the base alone, without its self-test;
- `verify`: the merge with --verify;
- `mixtral-cat`, `mixtral-merge`: the same for a Mixtral with adapters on attention, router and all experts.

python benchmarks/merge.py --tokenizer ../shared/data/tokenizers/chinese_llama2_55296 --scratch_dir /data/tmp
python benchmarks/merge.py --tokenizer DIR --layers 2 --rows cat merge --no_record
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent / "scripts"
sys.path[:0] = [str(HERE), str(SCRIPTS)]
SECTION = "Merging and exporting at full size"
ROWS = ("cat", "merge", "peft", "pth", "gguf-f16", "gguf-q8_0", "verify", "mixtral-cat", "mixtral-merge")

PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, rows = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
model.resize_token_embeddings(int(rows), mean_resizing=False)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="5GB")
"""

LAUNCHER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_maxrss, usage.ru_utime + usage.ru_stime)
sys.exit(status)
"""


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Make the weights, measure every row, print and record the table."""
    args = parse_arguments(argv)
    from record import describe_run, record

    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch_dir) as name:
        work = Path(name)
        for kind in ("llama", "mixtral"):
            rows = [row for row in args.rows if row.startswith("mixtral") == (kind == "mixtral")]
            if not rows:
                continue
            make_model(work / kind, kind, args.layers if kind == "llama" else args.mixtral_layers, args.tokenizer)
            for row in rows:
                results[row] = measure(row, work, kind, args)
                print(row, json.dumps(results[row]), flush=True)
            shutil.rmtree(work / kind)
    text = format_results(results)
    print(text)
    if not args.no_record:
        record(SECTION, f"{text}\n\n{describe_run('torch', 'transformers', 'peft', 'gguf')}")
    return results


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="Folder of a tokenizer with more than 32,000 tokens.")
    parser.add_argument("--layers", type=int, default=32, help="Layers of the 7B model.")
    parser.add_argument("--mixtral_layers", type=int, default=5, help="Layers of the Mixtral; one has 2.9 GB.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--scratch_dir", help="Where models are written, 45 GB; default: the system's.")
    parser.add_argument("--no_record", action="store_true", help="Do not write RESULTS.md.")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- synthetic models


def make_model(folder: Path, kind: str, layers: int, tokenizer: str) -> None:
    """`folder`/base: fp16 weights with 32,000 rows; `folder`/adapter: rank 64, with embeddings for `tokenizer`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from utils.text.tokenizer import load_tokenizer, save_tokenizer
    from utils.weights.reader import TensorSpec
    from utils.weights.writer import plan_shards, write_index, write_shard

    sizes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": 4096, "vocab_size": 32000}
    sizes |= {"intermediate_size": 11008} if kind == "llama" else {"intermediate_size": 14336}
    config = AutoConfig.for_model(kind, **sizes)
    config.architectures = ["LlamaForCausalLM" if kind == "llama" else "MixtralForCausalLM"]
    config.dtype = torch.float16
    base, adapter = folder / "base", folder / "adapter"
    config.save_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = dict(disk_shapes({name: tuple(weight.shape) for name, weight in model.state_dict().items()}, config))

    pool = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).half()

    def values(specs: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, Any]]:
        for number, spec in enumerate(specs):
            left = spec.num_bytes // 2
            while left:  # stretches of the same random numbers, begun anywhere
                start = (number * 7919 + left) % (1 << 22)
                part = pool[start : start + min(left, 1 << 22)]
                left -= len(part)
                yield spec, part

    def write(target: Path, specs: list[TensorSpec], shards: dict[str, list[TensorSpec]]) -> None:
        target.mkdir(parents=True, exist_ok=True)
        stream = values(specs)
        for name, shard in shards.items():
            write_shard(target / name, shard, stream)

    specs = [TensorSpec(name, torch.float16, shape) for name, shape in shapes.items()]
    shards = plan_shards(specs, 5 * 10**9)
    write(base, specs, shards)
    write_index(base, shards)

    grown = load_tokenizer(tokenizer)
    rank, tensors = 64, []
    for name, shape in shapes.items():
        module = "base_model.model." + name.removesuffix(".weight")
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            if kind == "llama":
                tensors.append(TensorSpec(f"{module}.weight", torch.float16, (len(grown), 4096)))
        elif len(shape) == 2:
            tensors.append(TensorSpec(f"{module}.lora_A.weight", torch.float16, (rank, shape[1])))
            tensors.append(TensorSpec(f"{module}.lora_B.weight", torch.float16, (shape[0], rank)))
    write(adapter, tensors, {"adapter_model.safetensors": tensors})
    targets = sorted({name.split(".")[-2] for name, shape in shapes.items() if len(shape) == 2})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 128, "base_model_name_or_path": "base",
        "target_modules": [name for name in targets if name not in ("embed_tokens", "lm_head")],
        "modules_to_save": ["embed_tokens", "lm_head"] if kind == "llama" else None,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    if kind == "llama":
        save_tokenizer(grown, adapter)


def disk_shapes(shapes: dict[str, tuple[int, ...]], config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as checkpoints hold them: Mixtral's experts are fused in memory only."""
    inner, hidden = config.intermediate_size, config.hidden_size
    for name, shape in shapes.items():
        block, found, parameter = name.replace(".mlp.", ".block_sparse_moe.").partition(".experts.")
        if not found:
            yield (block if config.model_type == "mixtral" else name), shape
        elif parameter == "gate_up_proj":
            for expert in range(shape[0]):
                for part in ("w1", "w2", "w3"):
                    rows = (hidden, inner) if part == "w2" else (inner, hidden)
                    yield f"{block}.experts.{expert}.{part}.weight", rows


# ---------------------------------------------------------------- rows


def command(row: str, folder: Path, out: Path, tokenizer: str) -> list[str]:
    base, adapter = str(folder / "base"), str(folder / "adapter")
    merge = [sys.executable, str(SCRIPTS / "merge_llama2_with_chinese_lora_low_mem.py"), "--base_model", base]
    merge += ["--lora_model", adapter, "--output_dir", str(out)]
    export = [sys.executable, str(SCRIPTS / "export_gguf.py"), "--base_model", base, "--output_dir", str(out)]
    if row.endswith("cat"):
        return ["bash", "-c", f"cat {base}/*.safetensors > {out}"]
    if row == "peft":
        from utils.text.tokenizer import load_tokenizer

        return [sys.executable, "-c", PEFT_MERGE, base, adapter, str(out), str(len(load_tokenizer(tokenizer)))]
    if row == "pth":
        return [*merge, "--output_type", "pth"]
    if row == "verify":
        return [*merge, "--verify"]
    if row.startswith("gguf"):
        return [*export, "--lora_model", adapter, "--types", row.removeprefix("gguf-"), "--self_test", "none"]
    return merge


def measure(row: str, work: Path, kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one row with nothing of its input in the page cache. Returns: seconds, GB written, peak memory in GB."""
    folder, out, log = work / kind, work / "out", work / "log.txt"
    drop_cache(folder)
    with open(log, "wb") as output:
        start = time.perf_counter()
        # Through a small process: the peak of one started here would count what this one holds.
        launch = [sys.executable, "-S", "-c", LAUNCHER, *command(row, folder, out, args.tokenizer)]
        process = subprocess.run(launch, stdout=subprocess.PIPE, stderr=output, text=True)
        seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{row} failed:\n{log.read_text()[-2000:]}")
    peak, processor = process.stdout.split()[-2:]
    start = time.perf_counter()
    os.sync()
    synced = time.perf_counter() - start
    files = [out] if out.is_file() else [item for item in out.rglob("*") if item.is_file()]
    size = sum(item.stat().st_size for item in files)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return {
        "seconds": round(seconds, 1),
        "sync_seconds": round(synced, 1),
        "written_gb": round(size / 1e9, 2),
        "peak_gb": round(int(peak) * 1024 / 1e9, 2),
        "cpu_seconds": round(float(processor), 1),
    }


def drop_cache(folder: Path) -> None:
    """Empty the page cache (as root), else tell it to forget these files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for item in folder.rglob("*"):
            if item.is_file():
                descriptor = os.open(item, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def format_results(results: dict[str, dict[str, float]]) -> str:
    lines = [
        "| row | seconds | then `sync` | x `cat` | written GB | processor s | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, result in results.items():
        floor = results.get("mixtral-cat" if row.startswith("mixtral") else "cat")
        ratio = f"{result['seconds'] / floor['seconds']:.2f}" if floor else "–"
        lines.append(
            f"| {row} | {result['seconds']} | {result['sync_seconds']} | {ratio} | {result['written_gb']} "
            f"| {result['cpu_seconds']} | {result['peak_gb']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
