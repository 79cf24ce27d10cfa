"""Quantise a full-precision model into a smaller folder that transformers loads, and for gptq, awq and fp8 also vLLM.

Model folder -> weights, config with its quantization_config, tokenizer, model card, quantization_report.json.

python scripts/quantize.py --base_model output/merged --output_dir output/merged-4bit --method bnb-4bit
python scripts/quantize.py --base_model output/merged --output_dir output/merged-gptq --method gptq \
    --calibration_data texts.txt
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import arg, list_arg
from utils.core.command_line import describe_arguments, run, save_run_config, shell_command
from utils.core.errors import InputError
from utils.core.files import atomic_folder, refuse_existing_output, write_json
from utils.core.machine import peak_resident_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from utils.lora.inputs import MergeInputs
    from utils.models.quantization import Scheme

logger = logging.getLogger(__name__)

REPORT = "quantization_report.json"
# How the model card says that a folder is opened.
NEEDED = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes"}


@dataclass
class QuantizeArguments:
    """What is quantised, how, and where the result goes."""

    model_name_or_path: str | None = arg(help="Model (--base_model): a folder or a hub id, in full precision.")
    output_dir: str = arg("./quantized_model", help="New folder of the quantised model.")
    method: Literal["bnb-4bit", "bnb-8bit", "gptq", "awq", "fp8"] = arg(
        "bnb-4bit",
        help="bitsandbytes' 4 or 8 bits; 4 bits after calibration by GPTQ or AWQ; 8-bit floats.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = arg(
        "auto", help="Type of what is not quantised, and of arithmetic; auto: as most weights are stored."
    )
    calibration_data: list[str] = list_arg(
        help="gptq, awq: files or folders (txt, json, jsonl, parquet) with text like that the model will meet."
    )
    num_calibration_samples: int = arg(128, help="Windows of calibration text, as many from every file.")
    calibration_length: int | None = arg(
        help="Tokens of a window; default: 2048, or the model's context if that is shorter."
    )
    group_size: int = arg(
        128, help="gptq, awq: weights of a row that share a scale; -1: all. Smaller: more exact, larger."
    )
    quant_type: Literal["nf4", "fp4"] = arg("nf4", help="bnb-4bit: the 4-bit data type.")
    double_quant: bool = arg(True, help="bnb-4bit: quantise the scales too (saves 0.4 bit a weight).")
    max_shard_size: str = arg("5GB", help="Largest weight file.")
    overwrite: bool = arg(False, help="Replace output_dir if it holds something, once the new model is complete.")

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise InputError("pass the model as --base_model")
        if self.method in ("gptq", "awq") and not self.calibration_data:
            raise InputError(f"--method {self.method} needs text to calibrate on: pass --calibration_data FILE ...")

    @property
    def base(self) -> str:
        return self.model_name_or_path or ""


def main(args: QuantizeArguments) -> dict[str, Any]:
    """Check, quantise, save, reload and compare, publish. Returns: the report."""
    refuse_existing_output(args.output_dir, args.overwrite)  # before the slow imports
    from utils.lora.inputs import open_merge
    from utils.models.quantization import Scheme, check_scheme, read_calibration, refuse_adapter
    from utils.weights.config import load_config
    from utils.weights.writer import parse_size

    started = time.monotonic()
    parse_size(args.max_shard_size)
    scheme = Scheme(args.method, args.group_size, args.quant_type, args.double_quant)
    refuse_adapter(args.base)
    with open_merge(args.base, output=args.output_dir) as inputs:
        if inputs.tokenizer is None:
            raise InputError(f"{inputs.base_folder} has no tokenizer; copy its files there")
        config = load_config(str(inputs.base_folder))
        check_scheme(scheme, inputs.base_folder, config)
        calibration = None
        if scheme.needs_calibration:
            calibration = read_calibration(
                *(args.calibration_data, inputs.tokenizer, config),
                *(args.num_calibration_samples, args.calibration_length),
            )
        with atomic_folder(args.output_dir, args.overwrite) as folder:
            report = write_model(inputs, scheme, calibration, folder, args)
            report["seconds"] = round(time.monotonic() - started, 2)
            report["peak_memory_gb"] = round(peak_resident_bytes() / 1e9, 3)
            write_json(folder / REPORT, report)
            describe_model(folder, report)
    log_summary(report, args.output_dir)
    return report


def write_model(
    inputs: MergeInputs, scheme: Scheme, calibration: Tensor | None, folder: Path, args: QuantizeArguments
) -> dict[str, Any]:
    """Everything but report and card; what was saved is loaded again and compared. Returns: the report's figures."""
    import torch

    from utils.models import quantization
    from utils.text.tokenizer import save_tokenizer

    base, tokenizer = inputs.base_folder, inputs.tokenizer
    assert tokenizer is not None
    dtype = quantization.stored_dtype(base) if args.dtype == "auto" else getattr(torch, args.dtype)
    model = quantization.quantize_model(base, scheme, dtype, calibration, tokenizer)
    quantization.save_weights(model, folder, args.max_shard_size)
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    save_tokenizer(tokenizer, folder)
    save_run_config(folder, describe_arguments(args), {"made with": quantization.describe_package(scheme)})
    before = quantization.check_logits(model, tokenizer)
    del model  # two of them may not fit
    difference = quantization.compare_reloaded(folder, before, tokenizer)
    settings: dict[str, Any] = {"group_size": scheme.group_size} if scheme.needs_calibration else {}
    if scheme.method == "bnb-4bit":
        settings = {"quant_type": scheme.quant_type, "double_quant": scheme.double_quant}
    if calibration is not None:
        samples, length = calibration.shape
        settings |= {"calibration_samples": samples, "calibration_length": length}
    return {
        "base_model": args.base,
        "method": scheme.method,
        **settings,
        "dtype": quantization.dtype_name(dtype),
        **quantization.describe_weights(base, folder),
        "reload_difference": difference,
    }


def describe_model(folder: Path, report: dict[str, Any]) -> None:
    """README.md: what the model was made of, and how it is opened."""
    from utils.weights.model_card import write_model_card

    package = NEEDED.get(report["method"], "compressed-tensors")
    text = [
        f"Base model: `{report['base_model']}`, whose licence applies. transformers loads this folder once "
        f"`{package}` is installed" + ("." if package == "bitsandbytes" else "; vLLM reads this format."),
        f"The figures stand in {REPORT} too, the settings in run_config.yaml.",
    ]
    title = f"{Path(report['base_model']).name}, quantised ({report['method']})"
    figures = {name: value for name, value in report.items() if name not in ("base_model", "method")}
    settings = {"pipeline_tag": "text-generation", "tags": f"[llama, quantized, {report['method']}]"}
    write_model_card(folder, title, text, figures, settings=settings)


def log_summary(report: dict[str, Any], output: str) -> None:
    """The last lines of the log: figures, files, the next command."""
    logger.info(
        "%s: %d of %d weights quantised (%.1f %% of all parameters), %.3f -> %.3f GB (%.2f bits a parameter) "
        "in %.1f s, peak memory %.2f GB; loaded again and compared\n"
        "  files in %s (figures in %s)\n"
        "  next: %s",
        *(report["method"], report["quantised_weights"], report["weights"], 100 * report["quantised_share"]),
        *(report["size_gb_before"], report["size_gb"], report["bits_per_weight"], report["seconds"]),
        *(report["peak_memory_gb"], output, REPORT),
        shell_command("bash", "scripts/run_inference.sh", "--interactive", MODEL=output),
    )


if __name__ == "__main__":
    run(main, QuantizeArguments, documented=("base_model",), description=__doc__)
