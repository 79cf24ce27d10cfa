"""Merge one or more LoRA adapters into their base model, tensor by tensor, in about the memory of a few tensors.

Base model + adapters -> a Hugging Face folder (safetensors, config, tokenizer, model card) or Meta's pth layout, with
merge_report.json (what changed) and merge_manifest.json (hashes of all that went in and came out).

python scripts/merge_llama2_with_chinese_lora_low_mem.py --base_model llama2-7b --lora_model output/pt \
    --output_dir merged
python scripts/merge_llama2_with_chinese_lora_low_mem.py --base_model llama2-7b --lora_model output/pt,output/sft \
    --output_dir merged --dtype float16 --max_shard_size 2GB
python scripts/merge_llama2_with_chinese_lora_low_mem.py --base_model llama2-7b --lora_model output/pt \
    --chat_model llama2-7b-chat --output_dir merged-chat
python scripts/merge_llama2_with_chinese_lora_low_mem.py --verify_only merged
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import RopeArguments, arg
from utils.core.command_line import EXAMPLE_PAIRS, describe_arguments, run, save_run_config, shell_command
from utils.core.errors import InputError
from utils.core.files import HashName, atomic_folder, new_hash, refuse_existing_output, write_json
from utils.core.machine import peak_resident_bytes

if TYPE_CHECKING:
    from utils.lora.inputs import MergeInputs
    from utils.lora.writer import MergeWriter
    from utils.weights.streams import Digest

logger = logging.getLogger(__name__)

REPORT = "merge_report.json"


@dataclass
class MergeArguments:
    """What is merged, and where the result goes."""

    model_name_or_path: str | None = arg(
        help="Base model (--base_model) in full precision: a folder or a hub id; Hugging Face or Meta's pth layout."
    )
    adapter_name_or_path: str | None = arg(
        help="Adapter (--lora_model): a folder or hub id, or several, comma-separated, in the order they were "
        "trained; without one the base is converted to --output_type and --dtype."
    )
    adapter_weights: str | None = arg(
        help="How much of each adapter's change is taken, comma-separated, such as 1,0.5; default: 1 for each."
    )
    chat_model: str | None = arg(
        help="Chat vector: a chat model in full precision, a folder or a hub id; its difference from "
        "--chat_model_base is added to the result."
    )
    chat_model_base: str | None = arg(
        help="The model that --chat_model was tuned from; default, where there are adapters: --base_model."
    )
    chat_weight: float = arg(1.0, help="How much of the chat vector is added.")
    tokenizer_name_or_path: str | None = arg(
        help="Tokenizer folder (--tokenizer_path); default: that of the last adapter that has one, else the base's."
    )
    output_dir: str = arg("./merged_model", help="New folder of the merged model.")
    output_type: Literal["huggingface", "pth"] = arg(
        "huggingface", help="Layout of the result: Hugging Face safetensors, or Meta's consolidated.NN.pth."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = arg(
        "auto", help="Type of the merged weights; auto keeps every tensor's own."
    )
    max_shard_size: str = arg("5GB", help="Largest weight file; a larger tensor has a file of its own.")
    num_parts: int | None = arg(
        help="Number of consolidated.NN.pth files; default: Meta's number for the model's size (7B 1, 13B 2, 70B 8)."
    )
    verify: bool = arg(
        False,
        help="Before the folder gets its name, compare its logits with those of base + adapters, layer by layer.",
    )
    hash: Literal["sha256", "blake3", "none"] = arg(
        "sha256",
        help="Of the weights, in the manifest: sha256; blake3 (pip install blake3), which takes a third of its time; "
        "none: the manifest knows their sizes alone.",
    )
    verify_only: str | None = arg(help="Merge nothing: compare this merged folder with its merge_manifest.json.")
    dry_run: bool = arg(False, help="Check everything and print the plan, sizes, memory and time; write nothing.")
    overwrite: bool = arg(False, help="Replace output_dir if it holds something, once the new model is complete.")
    verbose: bool = arg(False, help="Log every changed tensor.")

    def __post_init__(self) -> None:
        if not self.verify_only and not self.model_name_or_path:
            raise InputError("pass the base model as --base_model and one or more adapters as --lora_model")
        weights = self.weights
        if weights is not None and len(weights) != len(self.adapters):
            raise InputError(
                f"--adapter_weights {self.adapter_weights}: {len(weights)} numbers for {len(self.adapters)} adapters"
            )
        if self.num_parts is not None and self.output_type != "pth":
            raise InputError(f"--num_parts {self.num_parts} belongs to --output_type pth")
        if self.verify and self.output_type == "pth":
            raise InputError("--verify reads a Hugging Face folder; merge with --output_type huggingface to verify")

        self._check_chat_vector()

    def _check_chat_vector(self) -> None:
        if self.chat_model is None:
            if self.chat_model_base is not None or self.chat_weight != 1.0:
                raise InputError("--chat_model_base and --chat_weight do nothing without --chat_model; pass it too")
            return
        if self.chat_model_base is None and not self.adapters:
            raise InputError(
                "--chat_model: pass --chat_model_base, the model that it was tuned from; without adapters the chat "
                "vector of --base_model would only make the chat model again"
            )
        if not math.isfinite(self.chat_weight) or self.chat_weight == 0:
            raise InputError(f"--chat_weight {self.chat_weight}: need a number other than 0, such as 1 or 0.5")
        if self.verify:
            raise InputError("--verify compares with base and adapters alone; leave it out with --chat_model")

    @property
    def chat_vector(self) -> tuple[str, str, float] | None:
        """As open_merge takes it."""
        if self.chat_model is None:
            return None
        return self.chat_model, str(self.chat_model_base or self.model_name_or_path), self.chat_weight

    @property
    def hash_name(self) -> HashName | None:
        return None if self.hash == "none" else self.hash

    @property
    def adapters(self) -> list[str]:
        return [name.strip() for name in (self.adapter_name_or_path or "").split(",") if name.strip()]

    @property
    def weights(self) -> list[float] | None:
        if self.adapter_weights is None:
            return None
        try:
            weights = [float(word) for word in self.adapter_weights.split(",")]
        except ValueError:
            weights = [math.nan]
        if not all(map(math.isfinite, weights)):
            raise InputError(f"--adapter_weights {self.adapter_weights}: need numbers such as 1,0.5")
        return weights


def main(args: MergeArguments, rope: RopeArguments | None = None) -> dict[str, Any]:
    """Plan, check, write, prove, report; `rope`: a longer window for the config. Returns: the report."""
    rope = rope or RopeArguments()
    if args.verify_only:
        return verify_only(args.verify_only)
    refuse_existing_output(args.output_dir, args.overwrite)  # before the slow imports
    if args.hash_name:
        new_hash(args.hash_name)  # is it there?
    import torch

    from utils.lora.inputs import check_space, open_merge
    from utils.lora.manifest import write_manifest
    from utils.lora.writer import HuggingFaceWriter, MetaWriter
    from utils.models.rope import scale_settings
    from utils.weights.writer import parse_size

    started = time.monotonic()
    base, max_shard_bytes = str(args.model_name_or_path), parse_size(args.max_shard_size)
    with open_merge(
        base, args.adapters, args.tokenizer_name_or_path, args.output_dir, args.weights, args.chat_vector
    ) as inputs:
        inputs.config = scale_settings(inputs.config, rope)
        specs = inputs.model.specs(None if args.dtype == "auto" else getattr(torch, args.dtype))
        writer = (
            MetaWriter(inputs, specs, args.num_parts, args.hash_name)
            if args.output_type == "pth"
            else HuggingFaceWriter(inputs, specs, max_shard_bytes, args.hash_name)
        )
        for note in inputs.model.notes:
            logger.info("%s", note)
        if args.dry_run:
            return show_plan(writer, args)
        if args.verify:
            check_verifiable(inputs)
        check_space(Path(args.output_dir), writer.num_bytes - writer.finished_bytes(args.output_dir))
        with atomic_folder(args.output_dir, args.overwrite, resume_key=writer.key) as folder:
            hashes = write_weights(writer, folder)
            write_companions(inputs, folder, args, rope)
            report = build_report(writer, args)
            if args.verify:
                report["verification"] = verify_logits(inputs, folder)
            report |= measure(writer, time.monotonic() - started)
            write_json(folder / REPORT, report)
            describe_merge(folder, report)
            write_manifest(folder, writer.describe_inputs(), describe_arguments(args, rope), hashes)
    log_summary(report, args)
    return report


# ---------------------------------------------------------------- before and instead of writing


def show_plan(writer: MergeWriter, args: MergeArguments) -> dict[str, Any]:
    """Log what a merge would do. Returns: the same as figures."""
    model, files = writer.model, writer.files()
    plan = {
        "files": files,
        "tensors": len(writer.specs),
        "changed_tensors": len(model.changed),
        "vocab_size": model.vocab_size,
        "notes": model.notes,
        "size_gb": round(writer.num_bytes / 1e9, 3),
        "expected_seconds": round(writer.expected_seconds(), 1),
        "expected_memory_gb": round(writer.expected_memory() / 1e9, 2),
    }
    logger.info(
        "dry run, nothing is written\n  %d of %d tensors change; vocabulary %s\n%s\n  %.3f GB in all, about %.0f s if "
        "the disk keeps up, about %.2f GB of memory\n  then: the same command without --dry_run",
        *(plan["changed_tensors"], plan["tensors"], plan["vocab_size"]),
        "\n".join(f"  {Path(args.output_dir) / name}: {size / 1e9:.3f} GB" for name, size in files.items()),
        *(plan["size_gb"], plan["expected_seconds"], plan["expected_memory_gb"]),
    )
    return plan


def verify_only(folder: str) -> dict[str, Any]:
    """Check a merged folder against its manifest."""
    from utils.lora.manifest import verify_manifest

    result = verify_manifest(folder)
    logger.info("%s: all %d files (%.3f GB) are as the merge wrote them", folder, result["files"], result["gb"])
    if result["by_size_alone"]:
        logger.warning("%d of them by their size alone: merged with --hash none", result["by_size_alone"])
    return result


def check_verifiable(inputs: MergeInputs) -> None:
    """Raises: InputError if --verify does not know this kind of model."""
    from utils.lora.verify import check_supported

    check_supported(inputs)


# ---------------------------------------------------------------- output


def write_weights(writer: MergeWriter, folder: Path) -> dict[str, Digest]:
    """Stream all weights to the disk, with a progress bar. Returns: the hash of every file."""
    from tqdm import tqdm

    with tqdm(total=writer.num_bytes, unit="B", unit_scale=True, unit_divisor=1000, desc="merging") as bar:
        return writer.write(folder, bar.update)


def write_companions(inputs: MergeInputs, folder: Path, args: MergeArguments, rope: RopeArguments) -> None:
    """The tokenizer with its chat template, run_config.yaml, and of Hugging Face folders the two configs."""
    from utils.text.tokenizer import save_tokenizer
    from utils.weights.generation_config import find_generation_config

    if args.output_type == "huggingface":
        config = dict(inputs.config)
        if args.dtype != "auto":
            for name in [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]:
                config[name] = args.dtype
        write_json(folder / "config.json", config)
        source = None if inputs.model.is_reward_model else find_generation_config(inputs.folders)
        if source is not None:
            shutil.copyfile(source, folder / source.name)
    if inputs.tokenizer is not None:
        save_tokenizer(inputs.tokenizer, folder)
    save_run_config(folder, describe_arguments(args, rope))


def verify_logits(inputs: MergeInputs, folder: Path) -> dict[str, Any]:
    """Compare the folder's logits with those of base + adapters. Raises: InputError if they part."""
    from tqdm import tqdm

    from utils.lora.verify import verify_merge

    layers = int(inputs.config.get("num_hidden_layers", 0))
    with tqdm(total=layers, unit="layer", desc="verifying") as bar:
        result = verify_merge(inputs, folder, progress=lambda done, _: bar.update(done - bar.n))
    if not result.passed:
        raise InputError(f"--verify: {result.verdict}; nothing was published")
    logger.info("%s", result.verdict)
    if differing := round((1 - result.token_agreement) * result.tokens):
        logger.warning(
            "at %d of %d places the likeliest next token is another than before the merge, so greedy answers may "
            "differ: two tokens were about as likely, and %s rounds; --dtype float32 keeps what base and adapters "
            "compute, in a folder of four bytes a parameter",
            *(differing, result.tokens, " and ".join(result.dtypes)),
        )
    return result.to_dict()


def build_report(writer: MergeWriter, args: MergeArguments) -> dict[str, Any]:
    """What was merged and what it changed."""
    model, deltas = writer.model, writer.model.relative_delta
    if deltas and not any(deltas.values()):
        logger.warning("the adapters change nothing: the merged weights equal the base's; were they trained at all?")
    if args.verbose:
        for name, delta in sorted(deltas.items()):
            logger.info("%s: relative change %.3g", name, delta)
    return {
        "base_model": args.model_name_or_path,
        "adapters": [str(config.folder) for config, _ in model.adapters],
        "adapter_weights": model.adapter_weights,
        "chat_vector": None if args.chat_vector is None else list(args.chat_vector),
        "adapter_tensors": [len(checkpoint.tensors) for _, checkpoint in model.adapters],
        "output_type": args.output_type,
        "tensors": len(writer.specs),
        "changed_tensors": len(model.changed),
        "copied_tensors": len(writer.specs) - len(model.changed),
        "vocab_size": model.vocab_size,
        "reward_model": model.is_reward_model,
        "notes": model.notes,
        # null where the base's weight is zero
        "relative_delta": {n: deltas[n] if math.isfinite(deltas[n]) else None for n in sorted(deltas)},
    }


def measure(writer: MergeWriter, seconds: float) -> dict[str, float]:
    """Sizes in units of 1e9 bytes, and what the merge took."""
    size = writer.num_bytes / 1e9
    return {
        "size_gb": round(size, 6),
        "seconds": round(seconds, 2),
        "gb_per_second": round(size / max(seconds, 1e-9), 4),
        "peak_memory_gb": round(peak_resident_bytes() / 1e9, 3),
    }


def describe_merge(folder: Path, report: dict[str, Any]) -> None:
    """README.md: what the model was made of."""
    from utils.weights.model_card import write_model_card

    adapters = report["adapters"]
    changed = "converted" if report["chat_vector"] is None else "with a chat vector"
    title = f"{Path(adapters[-1]).name}, merged" if adapters else f"{Path(report['base_model']).name}, {changed}"
    made_of = f" Adapters, in order: {', '.join(adapters)}." if adapters else ""
    if report["chat_vector"] is not None:
        tuned, plain, share = report["chat_vector"]
        made_of += f" Then {share:g} times the difference of `{tuned}` and `{plain}`, whose licences apply too."
    task = "text-classification" if report["reward_model"] else "text-generation"
    text = [
        f"Base model: `{report['base_model']}`.{made_of}",
        f"Every change is listed in {REPORT}, the settings in run_config.yaml. The base model's licence applies.",
    ]
    figures = {name: report[name] for name in ("tensors", "changed_tensors", "vocab_size", "size_gb")}
    notes = [f"{note[0].upper()}{note[1:]}." for note in report["notes"]]
    settings = {"pipeline_tag": task, "tags": "[llama, merged-lora]"}
    write_model_card(folder, title, text, figures, notes, settings)


def log_summary(report: dict[str, Any], args: MergeArguments) -> None:
    """The last lines of the log: figures, files, the next command."""
    words = ["inference_hf.py", "--with_prompt", "--interactive", "--base_model"]
    if report["reward_model"]:
        words = ["rm.py", "--score", EXAMPLE_PAIRS, "--model_name_or_path"]
    merged = f"{len(report['adapters'])} adapter(s)" + (" and a chat vector" if report["chat_vector"] else "")
    if args.output_type == "pth":
        words = ["merge_llama2_with_chinese_lora_low_mem.py", "--verify_only"]
    logger.info(
        "merged %s: %d of %d tensors changed, %.3f GB in %.1f s (%.2f GB/s), peak memory %.2f GB\n"
        "  files in %s (%s lists every change, merge_manifest.json every file)\n  next: %s",
        *(merged, report["changed_tensors"], report["tensors"], report["size_gb"], report["seconds"]),
        *(report["gb_per_second"], report["peak_memory_gb"], args.output_dir, REPORT),
        shell_command("python", f"scripts/{words[0]}", *words[1:], args.output_dir),
    )


if __name__ == "__main__":
    run(
        main,
        MergeArguments,
        RopeArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
