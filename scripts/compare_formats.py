"""Size, perplexity, bits per byte and milliseconds a token of a model in every format: transformers and GGUF.

All formats score the same token ids in the same windows; a format whose package is missing has a row that says so.

python scripts/compare_formats.py --base_model output/merged --texts texts.txt --output formats.json --plot formats.png
python scripts/compare_formats.py --base_model output/merged --texts texts.txt --formats float32 bnb-4bit q4_k_m
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.arguments import arg, list_arg
from utils.core.command_line import installed_version, run
from utils.core.errors import InputError
from utils.core.files import write_json

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "bitsandbytes", "llmcompressor", "gguf", "llama_cpp_python")


@dataclass
class FormatArguments:
    """Which model and text, which formats, and where the table goes."""

    model_name_or_path: str | None = arg(help="Model (--base_model, --model) in full precision: a folder.")
    texts: list[str] = list_arg(help="Files or folders with text the model has not seen (txt: a document a line).")
    formats: list[str] = list_arg(help="Rows of the table; default: all.")
    gguf_dir: str | None = arg(
        help="Folder with GGUF files of this model, made by export_gguf.py; default: they are made, and deleted."
    )
    calibration_data: list[str] = list_arg(help="Text for gptq and awq to calibrate on, other than --texts.")
    window: int = arg(512, help="Longest stretch of a document that is scored at once, in tokens.")
    max_tokens: int = arg(20000, help="Tokens scored, spread evenly over the text.")
    output: str | None = arg(help="JSON file for the table.")
    plot: str | None = arg(help="PNG file for a picture of perplexity against size.")
    work_dir: str | None = arg(help="Folder for the models that are made and deleted; default: the system's place.")

    def __post_init__(self) -> None:
        if not self.model_name_or_path or not self.texts:
            raise InputError("pass --base_model and --texts")


def main(args: FormatArguments) -> dict[str, Any]:
    """Measure every format. Returns: the table with what it was measured on."""
    import torch

    from utils.evaluation.formats import FORMATS, GGUF_FORMATS, FormatTable, check_engines_agree, read_scored_text
    from utils.lora.inputs import open_merge
    from utils.models.quantization import read_calibration, refuse_adapter
    from utils.weights.config import load_config

    formats = list(dict.fromkeys(name.lower() for name in args.formats)) or list(FORMATS)
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"--formats {' '.join(unknown)}: need some of {', '.join(FORMATS)}")
    refuse_adapter(str(args.model_name_or_path))
    with (
        open_merge(str(args.model_name_or_path)) as inputs,
        make_gguf_files(args, formats, GGUF_FORMATS) as gguf_files,
    ):
        if inputs.tokenizer is None:
            raise InputError(f"{inputs.base_folder} has no tokenizer; copy its files there")
        config = load_config(str(inputs.base_folder))
        text = read_scored_text(args.texts, inputs.tokenizer, config, args.window, args.max_tokens)
        calibration = None
        if args.calibration_data:
            calibration = read_calibration(args.calibration_data, inputs.tokenizer, config, 128, None)
        work = Path(args.work_dir) if args.work_dir else None
        table = FormatTable(inputs.base_folder, config, inputs.tokenizer, text, gguf_files, work, calibration)
        rows = []
        for name in formats:
            rows.append(table.row(name))
            logger.info("%s", " ".join(f"{key}={value}" for key, value in rows[-1].items() if value not in (None, "")))
    result = {
        "model": str(args.model_name_or_path),
        "texts": args.texts,
        "window": args.window,
        "scored_tokens": text.num_tokens,
        "scored_bytes": text.num_bytes,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
        "f16_difference": check_engines_agree(rows),
        "rows": rows,
    }
    publish(args, result)
    return result


@contextlib.contextmanager
def make_gguf_files(args: FormatArguments, formats: Sequence[str], known: Sequence[str]) -> Iterator[dict[str, Path]]:
    """The GGUF files of the formats asked for, made by scripts/export_gguf.py; K-quants only with llama.cpp."""
    from utils.gguf.file import WRITTEN_TYPES
    from utils.gguf.llamacpp import is_installed

    if args.gguf_dir:
        files = {name: Path(args.gguf_dir) / f"model-{name.upper()}.gguf" for name in known}
        files = {name: file for name, file in files.items() if file.is_file()}
        if not files:
            raise InputError(
                f"--gguf_dir {args.gguf_dir}: no model-F16.gguf or the like; make some with export_gguf.py"
            )
        yield files
        return
    wanted = [name for name in formats if name in known and (is_installed() or name.upper() in WRITTEN_TYPES)]
    if not wanted:
        yield {}
        return
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        output = Path(folder) / "gguf"
        command = [
            sys.executable,
            str(Path(__file__).with_name("export_gguf.py")),
            "--base_model",
            str(args.model_name_or_path),
        ]
        # The table is a test of its own: all types are scored, and f16 must agree with float32.
        command += ["--output_dir", str(output), "--self_test", "none", "--types", *wanted]
        finished = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        if finished.returncode:
            raise InputError(f"export_gguf.py failed with status {finished.returncode}; its message stands above")
        yield {name: output / f"model-{name.upper()}.gguf" for name in wanted}


# ---------------------------------------------------------------- output


def publish(args: FormatArguments, result: dict[str, Any]) -> None:
    """Print the table, write the files asked for."""
    print("\n".join(markdown(result)))
    if args.output:
        write_json(args.output, result)
    if args.plot:
        draw(result, Path(args.plot))


def markdown(result: dict[str, Any]) -> list[str]:
    """The table as lines of Markdown."""
    first = next((row["perplexity"] for row in result["rows"] if row["perplexity"]), None)
    lines = [
        f"{result['model']}, {result['scored_tokens']:,} tokens of {' '.join(result['texts'])} in windows of "
        f"{result['window']}; {result['device']}, {result['threads']} threads.",
        "",
        "| format | GB | bits a weight | perplexity | change | bits a byte | ms a token | tensor types, remarks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        change = (
            "" if row["perplexity"] is None or first is None else f"{100 * (row['perplexity'] / first - 1):+.2f} %"
        )
        types = ", ".join(f"{count} {kind}" for kind, count in row.get("types", {}).items())
        cells = [row["format"], *figures(row), "; ".join(filter(None, (types, row["note"])))]
        cells.insert(4, change)
        lines.append(f"| {' | '.join(cells)} |")
    if result["f16_difference"] is not None:
        lines += ["", f"Perplexity of float32 and of GGUF f16 differ by {100 * result['f16_difference']:.4f} %."]
    return lines


def figures(row: dict[str, Any]) -> list[str]:
    formats = {
        "size_gb": ".4g",
        "bits_per_weight": ".2f",
        "perplexity": ".4f",
        "bits_per_byte": ".4f",
        "ms_per_token": ".2f",
    }
    return ["" if row[key] is None else format(row[key], digits) for key, digits in formats.items()]


def draw(result: dict[str, Any], path: Path) -> None:
    """Perplexity against size, a labelled dot a format."""
    from utils.core.figures import saved_figure
    from utils.report.run import plot_points

    with saved_figure(path, 7, 4.5, dpi=150, layout="constrained") as figure:
        axes = figure.subplots()
        for title, points in plot_points(result).items():
            sizes, perplexities = zip(*points.values(), strict=True)
            axes.scatter(sizes, perplexities, label=title)
            for rank, (name, place) in enumerate(sorted(points.items(), key=lambda item: item[1])):
                above = (6, -12, 16)[rank % 3]  # neighbours lie close together
                axes.annotate(name, place, xytext=(5, above), textcoords="offset points", fontsize=8)
        axes.set(xlabel="size, MB", ylabel="perplexity", title=Path(result["model"]).name)
        axes.legend()


if __name__ == "__main__":
    run(main, FormatArguments, documented=("base_model", "model"), description=__doc__)
