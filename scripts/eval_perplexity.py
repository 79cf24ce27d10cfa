"""Perplexity and bits a byte of texts: whole documents in one table, or by position, to see how far a window reaches.

  python scripts/eval_perplexity.py --base_model MODEL --texts news=news.txt papers=papers.jsonl
  python scripts/eval_perplexity.py --base_model MODEL --texts t.txt --other_models ADAPTER q4_k_m.gguf --kbits 16 4
  python scripts/eval_perplexity.py --base_model MODEL --texts t.txt --window 1024 --stride 512
  python scripts/eval_perplexity.py --base_model MODEL --texts t.txt --lengths 512 1024 --settings none auto-ntk yarn
Output: a table on the screen, perplexity.json, perplexity.png, and of whole documents documents.jsonl. An interrupted
run goes on when it is run again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from utils.core.arguments import InferenceArguments, RopeArguments, arg, list_arg
from utils.core.command_line import describe_arguments, describe_environment, run, select_gpus, shell_command
from utils.core.errors import InputError, raise_problems
from utils.core.files import atomic_file, hash_file

if TYPE_CHECKING:
    from utils.evaluation.models import Candidate
    from utils.evaluation.perplexity import Documents, TextRows
    from utils.evaluation.progress import Parts

logger = logging.getLogger("eval_perplexity")

RESULT, PICTURE, DOCUMENTS, PARTS = "perplexity.json", "perplexity.png", "documents.jsonl", "perplexity.parts.jsonl"
LENGTHS = [256, 512, 1024]
IRRELEVANT = ("output_dir", "overwrite", "batch_tokens")  # an unfinished run goes on with others
MOST_WINDOW = 2048  # tokens of a window, unless told otherwise


@dataclass
class EvalArguments:
    """Which texts, in which windows, of which models, and where the result goes."""

    texts: list[str] = list_arg(
        help="Files or folders (txt, json, jsonl, parquet) of documents, each optionally as name=path; each name is a "
        "row of the table and a panel of the picture."
    )
    window: int | None = arg(
        help="Tokens that are computed together, BOS included; longer documents are cut. Default: the smallest of the "
        "models' windows, at most 2048."
    )
    stride: int | None = arg(
        help="Tokens between the beginnings of windows: each token then has window - 1 - stride tokens before it at "
        "least. Default: window - 1, blocks that share nothing; smaller is slower and gives better figures."
    )
    lengths: list[int] = list_arg(
        help="Instead of whole documents, a curve: the perplexity of tokens by position, at these lengths in tokens, "
        "BOS included; documents shorter than the longest are left out. Default with --settings: 256 512 1024."
    )
    settings: list[str] = list_arg(
        help="Scalings to compare: none pi ntk auto-ntk yarn pi+ntk; default: --rope_scaling alone. Without "
        "--rope_factor each makes the window as long as the longest length, or --window."
    )
    kbits: list[int] = list_arg(
        help="Precisions to compare, in bits: 16 (as stored), 8 and 4 (bitsandbytes); default: --load_in_kbits alone."
    )
    other_models: list[str] = list_arg(
        help="Models to compare with --base_model, each optionally as name=path: folders, adapters, GGUF files; they "
        "use their own tokenizers, so compare bits a byte."
    )
    max_documents: int | None = arg(help="Documents that are scored of each text, spread over it; default: all.")
    max_rows: int | None = arg(100, help="With --lengths: stretches of the longest length, spread over each text.")
    text_column: str = arg("text", help="Field with the text in json, jsonl and parquet files.")
    document_separator: str | None = arg(
        help="In txt files, the line that ends a document; default: a line a document."
    )
    batch_tokens: int = arg(
        4096, help="Tokens computed at once, about; memory grows with it, figures change by rounding alone."
    )
    output_dir: str = arg("output/perplexity", help="Folder for perplexity.json and perplexity.png.")
    overwrite: bool = arg(False, help="Replace a finished result, or an unfinished one of other settings.")

    def __post_init__(self) -> None:
        self.lengths = sorted(set(self.lengths))
        if self.settings and not self.lengths and self.window is None and self.stride is None:
            self.lengths = list(LENGTHS)
        known = get_args(get_type_hints(RopeArguments)["rope_scaling"])
        unknown = [name for name in self.settings if name not in known]
        lengths, kbits = (" ".join(map(str, numbers)) for numbers in (self.lengths, self.kbits))
        checks = {
            "pass --texts: documents to score": bool(self.texts),
            f"--lengths {lengths}: need numbers of at least 2": not self.lengths or self.lengths[0] >= 2,
            "--lengths is for curves, --window, --stride and --max_documents are for whole documents; pass one kind": (
                not self.lengths or (self.window, self.stride, self.max_documents) == (None, None, None)
            ),
            f"--window {self.window}: need at least 2": self.window is None or self.window >= 2,
            f"--stride {self.stride}: need 1 to --window - 1": (
                self.stride is None or 1 <= self.stride < (self.window or self.stride + 1)
            ),
            f"--settings {' '.join(unknown)}: need some of {', '.join(known)}": not unknown,
            f"--kbits {kbits}: need some of 16, 8, 4": set(self.kbits) <= {16, 8, 4},
            f"--max_documents {self.max_documents}: need at least 1": (
                self.max_documents is None or self.max_documents >= 1
            ),
            f"--max_rows {self.max_rows}: need at least 1": self.max_rows is None or self.max_rows >= 1,
            f"--batch_tokens {self.batch_tokens}: need at least 1": self.batch_tokens >= 1,
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])


def main(model_args: InferenceArguments, args: EvalArguments) -> dict[str, Any]:
    """Evaluate; returns what perplexity.json holds."""
    select_gpus(model_args)  # before torch is imported
    from utils.data.corpora import parse_corpora
    from utils.evaluation.models import find_candidates, find_models
    from utils.evaluation.progress import Parts, refuse_finished
    from utils.evaluation.result_files import write_result

    folder = Path(args.output_dir)
    refuse_finished(folder / RESULT, args.overwrite)
    if args.settings and model_args.rope_scaling != "none":
        raise InputError("--settings names the scalings to compare; leave --rope_scaling out")
    if model_args.system_prompt is not None or model_args.prompt_template is not None:
        logger.warning("--system_prompt and --prompt_template have no effect: texts are read as they are")
    files = parse_corpora(args.texts)
    models = find_models(model_args, args.other_models)
    longest = args.lengths[-1] if args.lengths else args.window
    candidates = find_candidates(models, args.settings, args.kbits, longest, bool(args.lengths))
    if not args.lengths:
        choose_window(candidates, args)
    texts = read_texts(candidates, files, args)  # before the first model is loaded
    settings = describe_arguments(model_args, args)
    record = {
        "kind": "perplexity",
        "settings": settings,
        "environment": describe_environment(),
        "window": None if args.lengths else args.window,
        "stride": None if args.lengths else args.stride,
        "texts": {name: {str(path): hash_file(path) for path in paths} for name, paths in files.items()},
        "models": {candidate.label: candidate.describe() for candidate in candidates},
    }
    decides = {name: value for name, value in settings.items() if name not in IRRELEVANT}
    parts = Parts(folder / PARTS, {**record, "settings": decides}, args.overwrite)
    evaluate = draw_curves if args.lengths else score_documents
    result = {**record, "rows": evaluate(candidates, texts, args, parts)}
    write_result(folder / RESULT, result)
    parts.finish()
    report(candidates, files, args)
    return result


# ---------------------------------------------------------------- before models are loaded


def choose_window(candidates: Sequence[Candidate], args: EvalArguments) -> None:
    """Fill in --window and --stride; both are the same for all models, so that their figures can be compared."""
    smallest = min(candidates, key=lambda candidate: candidate.window)
    if args.window is None:
        args.window = min(smallest.window, MOST_WINDOW)
    if args.stride is None:
        args.stride = args.window - 1
    elif args.stride >= args.window:
        raise InputError(f"--stride {args.stride}: need 1 to {args.window - 1}, less than the window of {args.window}")
    if args.window > smallest.window:
        logger.warning("--window %d is longer than that of %s, %d", args.window, smallest.label, smallest.window)


def read_texts(
    candidates: Sequence[Candidate], files: dict[str, list[Path]], args: EvalArguments
) -> dict[str, dict[str, Any]]:
    """{tokenizer: {name of a text: its Documents, for curves its TextRows}}. Raises: InputError if there are none."""
    from utils.evaluation.perplexity import read_documents, read_rows

    how = (args.document_separator, args.text_column)
    found: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        if (key := candidate.tokenizer_key) not in found:
            found[key] = {
                name: read_rows(paths, candidate.tokenizer, args.lengths[-1], args.max_rows, *how)
                if args.lengths
                else read_documents(paths, candidate.tokenizer, args.max_documents, *how)
                for name, paths in files.items()
            }
    return found


# ---------------------------------------------------------------- whole documents


def score_documents(
    candidates: Sequence[Candidate], texts: dict[str, dict[str, Documents]], args: EvalArguments, parts: Parts
) -> list[dict[str, Any]]:
    """The rows of the table of whole documents; the picture and the losses of each document are written."""
    from tqdm import tqdm

    from utils.evaluation.perplexity import compare_documents, document_figures
    from utils.evaluation.plots import format_document_row, plot_documents

    rows: list[dict[str, Any]] = []
    losses: dict[str, dict[str, list[float]]] = {}
    total = sum(int(one.num_scored.sum()) for c in candidates for one in texts[c.tokenizer_key].values())
    with tqdm(total=total, unit="token", unit_scale=True, desc="scoring") as bar:
        bar.write(format_document_row(None))
        for candidate in candidates:
            ours, base = texts[candidate.tokenizer_key], texts[candidates[0].tokenizer_key]
            losses[candidate.label] = score_candidate(candidate, ours, args, parts, bar)
            for name, found in losses[candidate.label].items():
                row = {**describe_row(candidate, name), "left_out": ours[name].left_out}
                row |= document_figures(found, ours[name])
                if candidate is not candidates[0]:
                    row |= compare_documents(found, ours[name], losses[candidates[0].label][name], base[name])
                rows.append(row)
                bar.write(format_document_row(row))
    folder = Path(args.output_dir)
    write_documents(folder / DOCUMENTS, losses, texts[candidates[0].tokenizer_key])
    plot_documents(rows, folder / PICTURE)
    return rows


def score_candidate(
    candidate: Candidate, texts: dict[str, Documents], args: EvalArguments, parts: Parts, bar: Any
) -> dict[str, list[float]]:
    """{name of a text: the loss of each document in nats}; what a killed run has done is not done again."""
    groups = [(name, group) for name, documents in texts.items() for group in documents.groups()]
    left = []
    for name, group in groups:
        if parts.get(candidate.label, name, group.start) is None:
            left.append((name, group))
        else:
            bar.update(int(texts[name].num_scored[group.start : group.stop].sum()))
    if left:
        assert args.window is not None
        with candidate.load(args.window, args.batch_tokens) as scorer:
            for name, group in left:
                cut = texts[name].windows(group, args.window, args.stride)
                losses = iter(scorer.window_losses([window for windows in cut for window in windows], bar.update))
                sums = [sum(next(losses) for _ in windows) for windows in cut]
                parts.add(sums, candidate.label, name, group.start)
    found: dict[str, list[float]] = {name: [] for name in texts}
    for name, group in groups:
        found[name] += parts.get(candidate.label, name, group.start)
    return found


def write_documents(path: Path, losses: dict[str, dict[str, list[float]]], texts: dict[str, Documents]) -> None:
    """A line for each document: its text's name, its number, its bytes, and its loss under each model."""
    import json

    with atomic_file(path) as file:
        for name, documents in texts.items():
            for number, size in enumerate(documents.num_bytes.tolist()):
                row = {"text": name, "document": number, "bytes": size}
                row["nats"] = {label: found[name][number] for label, found in losses.items()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- curves


def draw_curves(
    candidates: Sequence[Candidate], texts: dict[str, dict[str, TextRows]], args: EvalArguments, parts: Parts
) -> list[dict[str, Any]]:
    """The rows of the table by length; the picture is written."""
    from utils.evaluation.plots import format_length_row, plot_by_length

    rows: list[dict[str, Any]] = []
    print(format_length_row(None))
    for candidate in candidates:
        for row in score_lengths(candidate, texts[candidate.tokenizer_key], args, parts):
            rows.append(row)
            print(format_length_row(row), flush=True)
    windows = [candidate.trained_window for candidate in candidates]
    plot_by_length(rows, Path(args.output_dir) / PICTURE, windows)
    return rows


def score_lengths(
    candidate: Candidate, texts: dict[str, TextRows], args: EvalArguments, parts: Parts
) -> list[dict[str, Any]]:
    """The rows of a model under one scaling."""
    from utils.evaluation.perplexity import perplexity_by_length

    left = [text for text in texts if parts.get(candidate.label, text) is None]
    if left:
        with candidate.load(args.lengths[-1], args.batch_tokens) as scorer:
            for text in left:
                losses = scorer.row_losses(texts[text].ids, args.lengths)
                about = {**describe_row(candidate, text), "rows": len(texts[text].ids)}
                rows = [{**about, **row} for row in perplexity_by_length(losses, texts[text].num_bytes)]
                parts.add(rows, candidate.label, text)
    return [row for text in texts for row in parts.get(candidate.label, text)]


# ---------------------------------------------------------------- reporting


def describe_row(candidate: Candidate, text: str) -> dict[str, Any]:
    """Which model and text a row of the table is about."""
    return {
        "label": candidate.label,
        "model": candidate.model,
        "setting": candidate.setting,
        "kbits": candidate.kbits,
        "text": text,
    }


def report(candidates: Sequence[Candidate], files: dict[str, list[Path]], args: EvalArguments) -> None:
    """The files and the next command, in the log."""
    names = [RESULT, PICTURE] + ([] if args.lengths else [DOCUMENTS])
    logger.info(
        "%d texts, %d lines\n  files in %s: %s\n  next: %s",
        *(len(files), len(candidates), args.output_dir, ", ".join(names)),
        shell_command("python", "scripts/report.py", "--results", Path(args.output_dir) / RESULT),
    )


if __name__ == "__main__":
    run(
        main,
        InferenceArguments,
        EvalArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
