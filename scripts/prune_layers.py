"""Make a smaller model of some layers of a larger one, or a deeper one by repeating layers, tensor by tensor.

Model folder -> a Hugging Face folder with the weights of these layers, a config that fits them, the tokenizer,
prune_report.json and merge_manifest.json. It is a beginning, to be trained on.

python scripts/prune_layers.py --base_model llama2-7b --keep first:4 --output_dir output/llama2-1.3b
python scripts/prune_layers.py --base_model llama2-7b --keep 0-3,8,16,24,28-31 --output_dir output/pruned --dry_run
python scripts/prune_layers.py --base_model mistral-7b --depth_upscale 48 --output_dir output/mistral-10.7b
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import arg
from utils.core.command_line import describe_arguments, run, save_run_config, shell_command
from utils.core.errors import InputError
from utils.core.files import atomic_folder, refuse_existing_output, write_json
from utils.core.machine import peak_resident_bytes

if TYPE_CHECKING:
    from utils.lora.inputs import MergeInputs
    from utils.lora.writer import HuggingFaceWriter
    from utils.weights.streams import Digest

logger = logging.getLogger(__name__)

REPORT = "prune_report.json"


@dataclass
class PruneArguments:
    """Which layers the new model has, and where it goes."""

    model_name_or_path: str | None = arg(
        help="Model (--base_model) in full precision: a folder or a hub id; Hugging Face or Meta's pth layout."
    )
    output_dir: str = arg("./pruned_model", help="New folder of the model.")
    keep: str | None = arg(
        help="Layers to keep, numbered from 0: first:N, even:N (the first, the last, and between them), or a list as "
        "0,1,5-9."
    )
    depth_upscale: str | None = arg(
        help="Instead a deeper model: N layers, the first and the last N / 2 of the model one after the other, or a "
        "list in which layers come again, such as 0-23,8-31."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = arg(
        "auto", help="Type of the weights; auto keeps every tensor's own."
    )
    max_shard_size: str = arg("5GB", help="Largest weight file; a larger tensor has a file of its own.")
    dry_run: bool = arg(False, help="Check everything and print layers and sizes; write nothing.")
    overwrite: bool = arg(False, help="Replace output_dir if it holds something, once the new model is complete.")

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise InputError("pass the model as --base_model")
        if (self.keep is None) == (self.depth_upscale is None):
            raise InputError("pass --keep for a smaller model, or --depth_upscale for a deeper one")


def main(args: PruneArguments) -> dict[str, Any]:
    """Check, write, report. Returns: the report."""
    refuse_existing_output(args.output_dir, args.overwrite)  # before the slow imports
    import torch

    from utils.lora.inputs import check_space, open_merge
    from utils.lora.manifest import write_manifest
    from utils.lora.writer import HuggingFaceWriter
    from utils.weights.layers import kept_layers, repeated_layers
    from utils.weights.writer import parse_size

    started = time.monotonic()
    max_shard_bytes = parse_size(args.max_shard_size)
    with open_merge(str(args.model_name_or_path), output=args.output_dir) as inputs:
        count = inputs.num_layers
        layers = (
            kept_layers(args.keep, count) if args.keep is not None else repeated_layers(str(args.depth_upscale), count)
        )
        inputs.keep_layers(layers)
        specs = inputs.model.specs(None if args.dtype == "auto" else getattr(torch, args.dtype))
        writer = HuggingFaceWriter(inputs, specs, max_shard_bytes)
        report = build_report(writer, args, layers, count)
        if args.dry_run:
            log_plan(report, args)
            return report
        check_space(Path(args.output_dir), writer.num_bytes - writer.finished_bytes(args.output_dir))
        with atomic_folder(args.output_dir, args.overwrite, resume_key=writer.key) as folder:
            hashes = write_weights(writer, folder)
            write_companions(inputs, folder, args)
            report["seconds"] = round(time.monotonic() - started, 2)
            report["peak_memory_gb"] = round(peak_resident_bytes() / 1e9, 3)
            write_json(folder / REPORT, report)
            describe_model(folder, report)
            write_manifest(folder, writer.describe_inputs(), describe_arguments(args), hashes)
    log_summary(report, args)
    return report


def write_weights(writer: HuggingFaceWriter, folder: Path) -> dict[str, Digest]:
    """Stream the weights to the disk, with a progress bar. Returns: the hash of every file."""
    from tqdm import tqdm

    with tqdm(total=writer.num_bytes, unit="B", unit_scale=True, unit_divisor=1000, desc="writing") as bar:
        return writer.write(folder, bar.update)


def write_companions(inputs: MergeInputs, folder: Path, args: PruneArguments) -> None:
    """Config, generation config, the tokenizer with its chat template, and run_config.yaml."""
    from utils.text.tokenizer import save_tokenizer
    from utils.weights.generation_config import find_generation_config

    config = dict(inputs.config)
    if args.dtype != "auto":
        for name in [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]:
            config[name] = args.dtype
    write_json(folder / "config.json", config)
    source = find_generation_config(inputs.folders)
    if source is not None:
        shutil.copyfile(source, folder / source.name)
    if inputs.tokenizer is not None:
        save_tokenizer(inputs.tokenizer, folder)
    save_run_config(folder, describe_arguments(args))


# ---------------------------------------------------------------- report


def build_report(writer: HuggingFaceWriter, args: PruneArguments, layers: list[int], count: int) -> dict[str, Any]:
    """What the model was and what it became; sizes in units of 1e9 bytes."""
    from utils.weights.layers import describe_layers

    base = writer.model.base.shapes.values()
    return {
        "base_model": args.model_name_or_path,
        "layers": describe_layers(layers),
        "num_layers": [count, len(layers)],
        "parameters": [sum(map(math.prod, base)), sum(math.prod(spec.shape) for spec in writer.specs)],
        "tensors": len(writer.specs),
        "size_gb": round(writer.num_bytes / 1e9, 6),
    }


def summarise(report: dict[str, Any]) -> str:
    """One line: layers and parameters before and after."""
    (layers_before, layers), (before, after) = report["num_layers"], report["parameters"]
    return (
        f"{layers_before} -> {layers} layers ({report['layers']}), {before / 1e6:,.1f} -> {after / 1e6:,.1f} million "
        f"parameters, {report['size_gb']:.3f} GB"
    )


def log_plan(report: dict[str, Any], args: PruneArguments) -> None:
    """What would be written."""
    logger.info(
        "dry run, nothing is written to %s\n  %s\n  then: the same command without --dry_run",
        *(args.output_dir, summarise(report)),
    )


def describe_model(folder: Path, report: dict[str, Any]) -> None:
    """README.md: what the model was made of."""
    from utils.weights.model_card import write_model_card

    before, after = report["num_layers"]
    text = [
        f"Layers {report['layers']} of `{report['base_model']}` ({before} layers), whose licence applies. Not trained "
        "since: further pre-training comes next.",
        f"The figures stand in {REPORT}, the settings in run_config.yaml.",
    ]
    figures = {name: report[name] for name in ("tensors", "size_gb")} | {"parameters": report["parameters"][1]}
    settings = {"pipeline_tag": "text-generation", "tags": "[llama, pruned-layers]"}
    write_model_card(folder, f"{Path(report['base_model']).name}, {after} layers", text, figures, settings=settings)


def log_summary(report: dict[str, Any], args: PruneArguments) -> None:
    """The last lines of the log: figures, files, the next command."""
    logger.info(
        "%s, written in %.1f s, peak memory %.2f GB\n"
        "  files in %s (%s, merge_manifest.json lists every file)\n"
        "  the layers have not learnt to do without the others: train them before use, on text like the model's own\n"
        "  then, with a file or folder of your text for TEXT: %s",
        *(summarise(report), report["seconds"], report["peak_memory_gb"], args.output_dir, REPORT),
        shell_command(
            *("bash", "scripts/run_pt.sh", "--full_finetuning"),
            **{"MODEL": args.output_dir, "DATA": "TEXT", "OUT": f"{args.output_dir}-trained"},
        ),
    )


if __name__ == "__main__":
    run(main, PruneArguments, documented=("base_model",), description=__doc__)
