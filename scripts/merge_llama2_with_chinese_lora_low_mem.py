"""Merge one or more LoRA adapters into their base model, tensor by tensor, in about the memory of a few tensors.

Base model + adapters -> a Hugging Face folder: safetensors, config, tokenizer, model card, merge_report.json.

python scripts/merge_llama2_with_chinese_lora_low_mem.py --base_model llama2-7b --lora_model output/pt \
    --output_dir merged
python scripts/merge_llama2_with_chinese_lora_low_mem.py --base_model llama2-7b --lora_model output/pt,output/sft \
    --output_dir merged --dtype float16 --max_shard_size 2GB
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.arguments import arg, describe_arguments, run, save_run_config
from utils.files import InputError, atomic_folder, peak_resident_bytes, refuse_existing_output, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from utils.checkpoints import TensorSpec
    from utils.merge_inputs import MergeInputs
    from utils.merging import MergedModel

logger = logging.getLogger(__name__)

REPORT = "merge_report.json"


@dataclass
class MergeArguments:
    """What is merged, and where the result goes."""

    model_name_or_path: str | None = arg(help="Base model (--base_model): a folder or a hub id, in full precision.")
    adapter_name_or_path: str | None = arg(
        help="Adapter (--lora_model): a folder or hub id, or several, comma-separated, in the order they were trained."
    )
    tokenizer_name_or_path: str | None = arg(
        help="Tokenizer folder (--tokenizer_path); default: that of the last adapter that has one, else the base's."
    )
    output_dir: str = arg("./merged_model", help="New folder of the merged model.")
    output_type: Literal["huggingface"] = arg(
        "huggingface", help="Layout of the result. Meta's pth layout is not written by this version."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = arg(
        "auto", help="Type of the merged weights; auto keeps every tensor's own."
    )
    max_shard_size: str = arg("5GB", help="Largest weight file; a larger tensor has a file of its own.")
    overwrite: bool = arg(False, help="Replace output_dir if it holds something, once the new model is complete.")
    verbose: bool = arg(False, help="Log every changed tensor.")

    def __post_init__(self) -> None:
        if not self.model_name_or_path or not self.adapters:
            raise InputError("pass the base model as --base_model and one or more adapters as --lora_model")

    @property
    def base(self) -> str:
        return self.model_name_or_path or ""

    @property
    def adapters(self) -> list[str]:
        return [name.strip() for name in (self.adapter_name_or_path or "").split(",") if name.strip()]


def main(args: MergeArguments) -> dict[str, Any]:
    """Plan, check, write, report. Returns: the report."""
    refuse_existing_output(args.output_dir, args.overwrite)  # before the slow imports
    import torch

    from utils.checkpoints import parse_size
    from utils.merge_inputs import check_space, open_merge

    started = time.monotonic()
    max_shard_bytes = parse_size(args.max_shard_size)
    with open_merge(args.base, args.adapters, args.tokenizer_name_or_path, args.output_dir) as inputs:
        model = inputs.model
        specs = model.specs(None if args.dtype == "auto" else getattr(torch, args.dtype))
        check_space(Path(args.output_dir), sum(spec.num_bytes for spec in specs))
        for note in model.notes:
            logger.info("%s", note)
        with atomic_folder(args.output_dir, args.overwrite) as folder:
            write_weights(model, specs, folder, max_shard_bytes, args.verbose)
            write_companions(inputs, folder, args)
            report = build_report(model, specs, args, time.monotonic() - started)
            write_json(folder / REPORT, report)
            write_model_card(folder, report)
    log_summary(report, args.output_dir)
    return report


# ---------------------------------------------------------------- output


def write_weights(
    model: MergedModel, specs: list[TensorSpec], folder: Path, max_shard_bytes: int, verbose: bool
) -> dict[str, str]:
    """Stream all weights into safetensors shards, with a progress bar. Returns: their SHA-256."""
    from tqdm import tqdm

    from utils.checkpoints import plan_shards, write_index, write_shard

    total = sum(spec.num_bytes for spec in specs)
    shards = plan_shards(specs, max_shard_bytes)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc="merging") as bar:

        def blocks() -> Iterator[tuple[TensorSpec, Tensor]]:
            for spec, block in model.stream(spec for shard in shards.values() for spec in shard):
                yield spec, block
                bar.update(block.nbytes)

        stream = blocks()
        hashes = {name: write_shard(folder / name, shard, stream) for name, shard in shards.items()}
    write_index(folder, shards)
    return hashes


def write_companions(inputs: MergeInputs, folder: Path, args: MergeArguments) -> None:
    """config.json, generation_config.json, the tokenizer with its chat template, and run_config.yaml."""
    from utils.tokenization import save_tokenizer

    config = dict(inputs.config)
    if args.dtype != "auto":
        for name in [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]:
            config[name] = args.dtype
    write_json(folder / "config.json", config)
    sources = [item / "generation_config.json" for item in (*reversed(inputs.adapter_folders), inputs.base_folder)]
    if source := next((item for item in sources if item.is_file()), None):
        shutil.copyfile(source, folder / source.name)
    if inputs.tokenizer is not None:
        save_tokenizer(inputs.tokenizer, folder)
    save_run_config(folder, describe_arguments(args))


def build_report(model: MergedModel, specs: list[TensorSpec], args: MergeArguments, seconds: float) -> dict[str, Any]:
    """What was merged and what it changed; sizes in units of 1e9 bytes."""
    size = sum(spec.num_bytes for spec in specs)
    deltas = model.relative_delta
    if not any(deltas.values()):
        logger.warning("the adapters change nothing: the merged weights equal the base's; were they trained at all?")
    return {
        "base_model": args.model_name_or_path,
        "adapters": [str(config.folder) for config, _ in model.adapters],
        "adapter_tensors": [len(checkpoint.tensors) for _, checkpoint in model.adapters],
        "tensors": len(specs),
        "changed_tensors": len(model.changed),
        "copied_tensors": len(specs) - len(model.changed),
        "vocab_size": model.vocab_size,
        "notes": model.notes,
        "size_gb": round(size / 1e9, 6),
        "seconds": round(seconds, 2),
        "gb_per_second": round(size / 1e9 / max(seconds, 1e-9), 4),
        "peak_memory_gb": round(peak_resident_bytes() / 1e9, 3),
        # null where the base's weight is zero
        "relative_delta": {n: deltas[n] if math.isfinite(deltas[n]) else None for n in sorted(deltas)},
    }


def write_model_card(folder: Path, report: dict[str, Any]) -> None:
    """README.md: what the model was made of."""
    figures = ("tensors", "changed_tensors", "vocab_size", "size_gb")
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [llama, merged-lora]", "---"),
        *(f"# {Path(report['adapters'][-1]).name}, merged", ""),
        f"Base model: `{report['base_model']}`. Adapters, in order: {', '.join(report['adapters'])}.",
        f"Every change is listed in {REPORT}, the settings in run_config.yaml. The base model's licence applies.",
        *("", "| figure | value |", "|---|---|"),
        *(f"| {name} | {report[name]} |" for name in figures),
        *(f"\n{note[0].upper()}{note[1:]}." for note in report["notes"]),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def log_summary(report: dict[str, Any], output: str) -> None:
    """The last lines of the log: figures, files, the next command."""
    logger.info(
        "merged %d adapter(s): %d of %d tensors changed, %.3f GB in %.1f s (%.2f GB/s), peak memory %.2f GB\n"
        "  files in %s (%s lists every change)\n"
        "  next: python scripts/inference_hf.py --base_model %s --with_prompt --interactive",
        *(len(report["adapters"]), report["changed_tensors"], report["tensors"], report["size_gb"], report["seconds"]),
        *(report["gb_per_second"], report["peak_memory_gb"], output, REPORT, output),
    )


if __name__ == "__main__":
    run(main, MergeArguments, documented=("base_model", "lora_model", "tokenizer_path"), description=__doc__)
