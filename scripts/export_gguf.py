"""Write a model as GGUF files for llama.cpp, Ollama, LM Studio and others, and prove that they compute the same.

Model folder, or base + adapters -> model-TYPE.gguf of every type, Ollama's Modelfile, export_report.json.

python scripts/export_gguf.py --base_model output/merged --output_dir output/gguf --types f16 q8_0 q4_k_m
python scripts/export_gguf.py --base_model llama2-7b --lora_model output/pt,output/sft --output_dir output/gguf
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import RopeArguments, arg, list_arg
from utils.core.command_line import CHECKOUT, describe_arguments, run, save_run_config, shell_command
from utils.core.errors import InputError
from utils.core.files import atomic_folder, refuse_existing_output, write_json
from utils.core.machine import peak_resident_bytes

if TYPE_CHECKING:
    import numpy as np

    from utils.gguf.file import GgufPlan
    from utils.lora.inputs import MergeInputs

logger = logging.getLogger(__name__)

REPORT = "export_report.json"
# The self-test's model runs go through all weights several times: minutes up to this size, hours far beyond it.
AUTO_SELF_TEST_PARAMETERS = 3e9


@dataclass
class ExportArguments:
    """What is exported, in which types, and how it is tested."""

    model_name_or_path: str | None = arg(help="Model (--base_model): a folder or a hub id, in full precision.")
    adapter_name_or_path: str | None = arg(
        help="Adapter (--lora_model), merged on the way: a folder or hub id, or several, comma-separated, in the "
        "order they were trained."
    )
    tokenizer_name_or_path: str | None = arg(
        help="Tokenizer folder (--tokenizer_path); default: that of the last adapter that has one, else the base's."
    )
    output_dir: str = arg("./gguf_model", help="New folder of the GGUF files.")
    types: list[str] = list_arg(
        ["f16"],
        help="File types as llama.cpp spells them: f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0; with llama-cpp-python also "
        "q6_k q5_k_m q4_k_m q3_k_m q2_k iq4_xs and so on.",
    )
    imatrix: str | None = arg(
        help="Importance matrix of this model, made by llama-imatrix; the smallest types need it."
    )
    self_test: Literal["auto", "full", "tokens", "none"] = arg(
        "auto",
        help="full: compare tokens, greedy continuations and next-token distributions with the model's; tokens: "
        "tokens only; auto: the most that this machine can do in minutes.",
    )
    self_test_data: list[str] = list_arg(
        help="Files or folders (txt, json, jsonl, parquet) with texts to test on besides the built-in ones."
    )
    threads: int | None = arg(help="Threads of llama.cpp; default: the cores available.")
    overwrite: bool = arg(False, help="Replace output_dir if it holds something, once the new files are complete.")

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise InputError("pass the model as --base_model")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads {self.threads}: need at least 1")

    @property
    def adapters(self) -> list[str]:
        return [name.strip() for name in (self.adapter_name_or_path or "").split(",") if name.strip()]

    @property
    def num_threads(self) -> int:
        from utils.core.machine import available_cores

        return self.threads or available_cores()


def main(args: ExportArguments, rope: RopeArguments | None = None) -> dict[str, Any]:
    """Plan, check, write, test, publish; `rope`: a longer window for the file. Returns: the report."""
    rope = rope or RopeArguments()
    refuse_existing_output(args.output_dir, args.overwrite)  # before the slow imports
    from utils.gguf.file import QUANTIZED_TYPES, parse_types, plan_gguf
    from utils.gguf.llamacpp import is_installed, read_imatrix, require_llama_cpp
    from utils.lora.inputs import open_merge
    from utils.models.rope import scale_settings

    started = time.monotonic()
    types, not_made = choose_types(parse_types(args.types, args.imatrix))
    quantized = [name for name in types if name in QUANTIZED_TYPES]
    if args.self_test in ("full", "tokens") or (args.self_test == "auto" and is_installed()):
        require_llama_cpp(f"--self_test {args.self_test}")
    imatrix = read_imatrix(args.imatrix) if args.imatrix else None
    texts = read_texts(args.self_test_data)
    assert args.model_name_or_path is not None
    with open_merge(args.model_name_or_path, args.adapters, args.tokenizer_name_or_path, args.output_dir) as inputs:
        inputs.config = scale_settings(inputs.config, rope)
        name = Path([args.model_name_or_path, *args.adapters][-1]).absolute().name
        plan = plan_gguf(inputs.model, inputs.config, inputs.tokenizer, name, inputs.folders)
        for note in (*inputs.model.notes, *plan.notes):
            logger.warning("%s", note)
        check_imatrix(imatrix, plan)
        source = choose_source(inputs, types)
        check_disk(plan, [*types, *([source] if quantized and source not in types else [])], args.output_dir)
        level, reason = choose_self_test(args, inputs)
        with atomic_folder(args.output_dir, args.overwrite) as folder:
            count = prove_tokens(plan, inputs, folder, texts) if level != "none" else 0
            files = write_files(plan, inputs, types, source, folder, imatrix, args.num_threads)
            results = prove_arithmetic(inputs, files, folder, texts, args.num_threads) if level == "full" else {}
            write_modelfiles(inputs, types, folder)
            report = {
                "base_model": args.model_name_or_path,
                "adapters": [str(path) for path in inputs.adapter_folders],
                "architecture": plan.arch,
                "vocab_size": inputs.model.vocab_size,
                "notes": [*inputs.model.notes, *plan.notes],
                "files": files,
                "not_made": not_made,
                "self_test": {"level": level, "reason": reason, "token_texts": count, "results": results},
                "seconds": round(time.monotonic() - started, 2),
                "peak_memory_gb": round(peak_resident_bytes() / 1e9, 3),
            }
            write_json(folder / REPORT, report)
            save_run_config(folder, describe_arguments(args, rope))
    log_summary(report, args.output_dir)
    return report


# ---------------------------------------------------------------- before weights are read


def choose_types(types: list[str]) -> tuple[list[str], list[str]]:
    """The types that can be made here, and those that cannot, llama.cpp being absent, which the log names.

    Raises: InputError if none can be made, or llama.cpp is there and does not run.
    """
    from utils.gguf.file import QUANTIZED_TYPES, WRITTEN_TYPES
    from utils.gguf.llamacpp import is_installed, require_llama_cpp

    quantized = [name for name in types if name in QUANTIZED_TYPES]
    written = [name for name in types if name not in quantized]
    if not quantized:
        return types, []
    purpose = f"--types {' '.join(quantized).lower()}"
    if is_installed() or not written:
        require_llama_cpp(f"{purpose} (without it: {' '.join(WRITTEN_TYPES).lower()})")
        return types, []
    logger.warning(
        "NOT MADE: %s needs llama-cpp-python; the other types are made: %s. To have it: pip install -r "
        "requirements-llamacpp.txt, then the same command with %s and another --output_dir",
        *(purpose, " ".join(written).lower(), purpose),
    )
    return written, quantized


def read_texts(names: list[str]) -> list[str]:
    """The user's own texts for the self-test."""
    from utils.core.records import iter_document_batches, list_data_files

    files = [file for name in names for file in list_data_files(name)]
    return [text for file in files for batch in iter_document_batches(file) for text in batch]


def check_imatrix(imatrix: dict[str, np.ndarray] | None, plan: GgufPlan) -> None:
    """Raises: InputError if the importance matrix was made from another model."""
    if imatrix is None:
        return
    sizes = {
        tensor.name: tensor.shape[-1] * (tensor.shape[0] if len(tensor.shape) > 2 else 1) for tensor in plan.tensors
    }
    known = [name for name in imatrix if name in sizes]
    wrong = [name for name in known if imatrix[name].size != sizes[name]]
    if not known or wrong:
        which = (
            f"{wrong[0]} has {imatrix[wrong[0]].size} columns, need {sizes[wrong[0]]}" if wrong else "no tensor fits"
        )
        raise InputError(f"--imatrix was made from another model ({which}); make one from this model's f16 file")


def choose_source(inputs: MergeInputs, types: list[str]) -> str:
    """The full-precision type that llama.cpp quantises from: one that is written anyway, or the base's own."""
    from utils.gguf.file import FULL_TYPES

    stored = Counter(
        FULL_TYPES.get(weight.dtype, "F32") for weight in inputs.model.weights.values() if len(weight.shape) > 1
    )
    own = stored.most_common(1)[0][0]
    return next((name for name in (own, "F32", "F16") if name in types), own)


def check_disk(plan: GgufPlan, types: list[str], output: str) -> None:
    """Raises: InputError if the files do not fit on the disk."""
    from utils.gguf.file import file_bytes
    from utils.lora.inputs import check_space

    check_space(Path(output), sum(file_bytes(plan, name) for name in types))


def choose_self_test(args: ExportArguments, inputs: MergeInputs) -> tuple[str, str]:
    """(full, tokens or none; why): what was asked for, or for auto what this machine can do in minutes."""
    import math

    from utils.core.machine import available_bytes
    from utils.gguf.llamacpp import is_installed
    from utils.gguf.self_test import FLAG
    from utils.lora.streamed_model import StreamedModel

    if args.self_test != "auto":
        level, reason = args.self_test, "asked for"
    elif not is_installed():
        level, reason = "none", "llama-cpp-python is not installed: pip install -r requirements-llamacpp.txt"
    else:
        parameters = sum(math.prod(weight.shape) for weight in inputs.model.weights.values())
        needed, available = StreamedModel(inputs, FLAG).needed_bytes, available_bytes()
        level, reason = "full", f"{parameters / 1e9:.2g} billion parameters"
        if parameters > AUTO_SELF_TEST_PARAMETERS:
            level, reason = "tokens", f"{reason} would take long; pass --self_test full for it"
        elif needed > available:
            level, reason = (
                "tokens",
                f"it needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available",
            )
    if level == "none":
        logger.warning("NOT TESTED: nothing proves that llama.cpp computes the same with these files (%s)", reason)
    elif level == "tokens":
        logger.warning("self-test of the tokens only; the model's arithmetic is not compared (%s)", reason)
    return level, reason


# ---------------------------------------------------------------- writing and testing


def prove_tokens(plan: GgufPlan, inputs: MergeInputs, folder: Path, texts: list[str]) -> int:
    """Compare llama.cpp's tokens with the tokenizer's before any weight is written. Returns: how many texts.

    Raises: InputError with the texts that are cut otherwise.
    """
    from utils.gguf.file import write_vocabulary
    from utils.gguf.self_test import token_texts
    from utils.gguf.tokenizer import token_differences

    assert inputs.tokenizer is not None
    path = folder / "vocabulary.gguf"
    write_vocabulary(plan, path)
    texts = [*token_texts(inputs.tokenizer), *texts]
    wrong = token_differences(path, inputs.tokenizer, texts)
    path.unlink()
    if wrong:
        shown = ", ".join(repr(text[:40]) for text in wrong[:5])
        raise InputError(
            f"llama.cpp cuts {len(wrong)} of {len(texts)} texts otherwise than the tokenizer, first {shown}; nothing "
            "is published: the model would be given tokens it was not trained with"
        )
    return len(texts)


def write_files(
    plan: GgufPlan, inputs: MergeInputs, types: list[str], source: str, folder: Path,
    imatrix: dict[str, np.ndarray] | None, threads: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Write one file of every type. Returns: name, size, SHA-256 and tensor types of each."""
    from utils.core.files import hash_file
    from utils.gguf.file import QUANTIZED_TYPES, describe_plan, write_gguf
    from utils.gguf.llamacpp import describe_file, quantize

    paths = {name: folder / f"model-{name}.gguf" for name in types}
    quantized = [name for name in types if name in QUANTIZED_TYPES]
    origin = paths.get(source, folder / "source.gguf")
    hashes = {name: write_gguf(plan, inputs.model, name, paths[name]) for name in types if name not in quantized}
    if quantized and source not in paths:
        write_gguf(plan, inputs.model, source, origin)
    for name in quantized:
        logger.info("llama.cpp quantises to %s", name)
        quantize(origin, paths[name], name, imatrix, threads)
        hashes[name] = hash_file(paths[name])
    if origin not in paths.values():
        origin.unlink(missing_ok=True)
    files = {}
    for name, path in paths.items():
        described = describe_file(path, name) if name in quantized else describe_plan(plan, name)
        if fallbacks := described["fallbacks"]:
            logger.warning(
                "%s: the rows of %d tensors (first %s) do not fill its blocks; they are stored with more bits: %s",
                *(name, len(fallbacks), fallbacks[0], described["tensor_types"]),
            )
        size = round(path.stat().st_size / 1e9, 6)
        files[name] = {"file": path.name, "size_gb": size, "sha256": hashes[name], **described}
    return files


def prove_arithmetic(
    inputs: MergeInputs, files: dict[str, dict[str, Any]], folder: Path, texts: list[str], threads: int
) -> dict[str, dict[str, Any]]:
    """Compare llama.cpp's arithmetic with the model's; warn of what the texts cannot decide.

    Raises: InputError listing every difference.
    """
    from utils.gguf.self_test import PASSAGES, run_self_test

    paths = {name: folder / file["file"] for name, file in files.items()}
    results = run_self_test(inputs, paths, [*PASSAGES, *texts], threads)
    for name, result in results.items():
        for doubt in result["doubts"]:
            logger.warning("DOUBTFUL, %s: %s; more text decides it: --self_test_data", name, doubt)
    problems = [f"{name}: {problem}" for name, result in results.items() for problem in result["problems"]]
    if problems:
        raise InputError(
            "llama.cpp does not compute what the model does; nothing is published (--self_test tokens leaves this "
            "comparison out):\n  " + "\n  ".join(problems[:12])
        )
    return results


def write_modelfiles(inputs: MergeInputs, types: list[str], folder: Path) -> None:
    """Ollama's Modelfile; of several types one each, Modelfile-TYPE."""
    from utils.gguf.ollama import build_modelfile
    from utils.weights.generation_config import named_end_ids

    assert inputs.tokenizer is not None
    end_ids = named_end_ids(inputs.folders)
    for name in types:
        text = build_modelfile(f"model-{name}.gguf", inputs.tokenizer, end_ids)
        path = folder / ("Modelfile" if len(types) == 1 else f"Modelfile-{name}")
        path.write_text(text, encoding="utf-8")


def log_summary(report: dict[str, Any], output: str) -> None:
    """The last lines of the log: files, what was proven, the next command."""
    from utils.gguf.llamacpp import is_installed

    lines = []
    for name, file in report["files"].items():
        line = f"  {output}/{file['file']}: {file['size_gb']:.3f} GB"
        if result := report["self_test"]["results"].get(name):
            line += (
                f", KL divergence {result['kl_divergence']:.2g} nats, perplexity {result['perplexity']:.4g} "
                f"({result['perplexity_ratio']:.5f} times the model's), {result['top1_agreement']:.2%} of likeliest "
                f"tokens agree{'' if result['passed'] else '; DOUBTFUL'}"
            )
        lines.append(line)
    last = Path(output) / list(report["files"].values())[-1]["file"]
    logger.info(
        "exported in %.1f s, peak memory %.2f GB, self-test: %s\n%s\n  next: %s",
        *(report["seconds"], report["peak_memory_gb"], report["self_test"]["level"], "\n".join(lines)),
        shell_command(*("bash", "scripts/run_inference.sh", "--engine", "llama.cpp", "--interactive"), MODEL=last)
        if is_installed()
        else shell_command("pip", "install", "-r", CHECKOUT / "requirements-llamacpp.txt"),
    )


if __name__ == "__main__":
    run(
        main,
        ExportArguments,
        RopeArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
