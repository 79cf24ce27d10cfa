"""Perplexity and bits a byte of texts by their length: the curve that shows how far a model's window reaches.

  python scripts/eval_perplexity.py --base_model MODEL --texts long.txt --lengths 256 512 1024
  python scripts/eval_perplexity.py --base_model MODEL --texts book=book.txt --settings none pi ntk auto-ntk yarn
Output: a table on the screen, perplexity.json and perplexity.png. Lengths beyond the trained window are the point:
`none` shows what happens there, the others how much --rope_scaling mends.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from utils.arguments import (
    InferenceArguments,
    RopeArguments,
    arg,
    describe_arguments,
    list_arg,
    raise_problems,
    run,
    select_gpus,
)
from utils.files import InputError, hash_file, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from utils.perplexity import TextRows

logger = logging.getLogger("eval_perplexity")

RESULT, PICTURE = "perplexity.json", "perplexity.png"


@dataclass
class EvalArguments:
    """Which texts, at which lengths, under which scalings, and where the result goes."""

    texts: list[str] = list_arg(
        help="Files or folders (txt, json, jsonl, parquet) with long documents, each optionally as name=path; each "
        "name is a panel of the picture."
    )
    lengths: list[int] = list_arg(
        [256, 512, 1024], help="Lengths in tokens, BOS included; documents shorter than the longest are left out."
    )
    settings: list[str] = list_arg(
        help="Scalings to compare: none pi ntk auto-ntk yarn pi+ntk; default: --rope_scaling alone. Without "
        "--rope_factor each makes the window as long as the longest length."
    )
    other_models: list[str] = list_arg(
        help="Folders of models to compare with --base_model, each optionally as name=path; they use their own "
        "tokenizers, so compare bits a byte."
    )
    max_rows: int | None = arg(100, help="Stretches of the longest length that are scored, spread over each text.")
    text_column: str = arg("text", help="Field with the text in json, jsonl and parquet files.")
    document_separator: str | None = arg(
        help="In txt files, the line that ends a document; default: a line a document."
    )
    output_dir: str = arg("output/perplexity", help="Folder for perplexity.json and perplexity.png.")
    overwrite: bool = arg(False, help="Replace a finished result.")

    def __post_init__(self) -> None:
        self.lengths = sorted(set(self.lengths))
        known = get_args(get_type_hints(RopeArguments)["rope_scaling"])
        unknown = [name for name in self.settings if name not in known]
        checks = {
            "pass --texts: long documents to score": bool(self.texts),
            f"--lengths {' '.join(map(str, self.lengths))}: need numbers of at least 2": (
                bool(self.lengths) and self.lengths[0] >= 2
            ),
            f"--settings {' '.join(unknown)}: need some of {', '.join(known)}": not unknown,
            f"--max_rows {self.max_rows}: need at least 1": self.max_rows is None or self.max_rows >= 1,
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])


@dataclass
class Candidate:
    """A model under one scaling."""

    label: str  # of its line in the picture
    model: str
    setting: str
    args: InferenceArguments
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    trained_window: int


def main(model_args: InferenceArguments, args: EvalArguments) -> dict[str, Any]:
    """Evaluate; returns what perplexity.json holds."""
    select_gpus(model_args)  # before torch is imported
    from utils.documents import parse_corpora
    from utils.perplexity import plot_perplexity

    folder = Path(args.output_dir)
    if (folder / RESULT).exists() and not args.overwrite:
        raise InputError(f"{folder / RESULT} is finished; pass another --output_dir, or --overwrite to replace it")
    if args.settings and model_args.rope_scaling != "none":
        raise InputError("--settings names the scalings to compare; leave --rope_scaling out")
    files = parse_corpora(args.texts)
    candidates = [c for name, one in find_models(model_args, args).items() for c in find_candidates(name, one, args)]
    texts = read_texts(candidates, files, args)  # before the first model is loaded
    rows: list[dict[str, Any]] = []
    print_row(None)
    for candidate in candidates:
        for row in score(candidate, texts[candidate.args.tokenizer_name_or_path], args.lengths):
            rows.append(row)
            print_row(row)
    result = {
        "settings": describe_arguments(model_args, args),
        "texts": {name: {str(path): hash_file(path) for path in paths} for name, paths in files.items()},
        "models": {
            c.label: {
                "model": c.args.model_name_or_path,
                "trained_window": c.trained_window,
                **describe_rope(c.config),
            }
            for c in candidates
        },
        "rows": rows,
    }
    write_json(folder / RESULT, result)
    plot_perplexity(rows, folder / PICTURE, [candidate.trained_window for candidate in candidates])
    logger.info(
        "%d texts, %d lines\n  files in %s: %s, %s\n"
        "  next: MODEL=%s bash scripts/run_inference.sh --interactive --rope_scaling SETTING",
        *(len(files), len(candidates), folder, RESULT, PICTURE, candidates[0].args.model_name_or_path),
    )
    return result


# ---------------------------------------------------------------- models and scalings


def find_models(model_args: InferenceArguments, args: EvalArguments) -> dict[str, InferenceArguments]:
    """{name: the arguments it is loaded with} of --base_model and --other_models, their files found."""
    from utils.inference import find_inference_files

    first = find_inference_files(model_args)
    found = {Path(first.adapter_name_or_path or str(first.model_name_or_path)).absolute().name: first}
    for item in args.other_models:
        name, equals, path = item.partition("=")
        if not equals or Path(item).exists():
            name, path = Path(item).absolute().name, item
        if name in found:
            raise InputError(f"--other_models {item}: another model is called {name}; pass NAME={path}")
        one = dataclasses.replace(
            model_args, model_name_or_path=path, adapter_name_or_path=None, tokenizer_name_or_path=None
        )
        found[name] = find_inference_files(one)
    return found


def find_candidates(name: str, model_args: InferenceArguments, args: EvalArguments) -> list[Candidate]:
    """A model under each of the scalings, checked. Raises: InputError for one that the model cannot have."""
    from utils.inference import check_inference_request
    from utils.modeling import load_config
    from utils.tokenization import load_tokenizer

    assert model_args.tokenizer_name_or_path is not None and model_args.model_name_or_path is not None
    tokenizer = load_tokenizer(model_args.tokenizer_name_or_path)
    window = int(load_config(model_args.model_name_or_path).max_position_embeddings)
    candidates = []
    for setting in dict.fromkeys(args.settings or [model_args.rope_scaling]):
        scaled = choose_factor(model_args, setting, window, args.lengths[-1])
        config = check_inference_request(scaled, tokenizer)
        label = " ".join([name] * bool(args.other_models) + [setting])
        candidates.append(Candidate(label, name, setting, scaled, tokenizer, config, window))
    return candidates


def choose_factor(args: InferenceArguments, setting: str, window: int, longest: int) -> InferenceArguments:
    """The arguments with a scaling; without --rope_factor its window is as long as the longest length."""
    factor, pi_factor = args.rope_factor, args.pi_factor
    if setting == "none":
        factor = None
    elif factor is None:
        factor = longest / window
        if factor <= 1:
            raise InputError(
                f"--settings {setting}: the longest length, {longest} tokens, is within the model's window of "
                f"{window}; pass a longer one in --lengths, or --rope_factor"
            )
    if setting != "pi+ntk":
        pi_factor = None
    changes = {"rope_scaling": setting, "rope_factor": factor, "pi_factor": pi_factor}
    return dataclasses.replace(args, **changes)  # type: ignore[arg-type]


def describe_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """What the scaling made of the config."""
    from utils.rope import rope_overrides

    return {**rope_overrides(config), "auto_ntk": getattr(config, "auto_ntk", None)}


# ---------------------------------------------------------------- scoring


def read_texts(
    candidates: Sequence[Candidate], files: dict[str, list[Path]], args: EvalArguments
) -> dict[str | None, dict[str, TextRows]]:
    """{tokenizer folder: {name of a text: its rows}}. Raises: InputError if no document is long enough."""
    from utils.perplexity import read_rows

    how = (args.lengths[-1], args.max_rows, args.document_separator, args.text_column)
    tokenizers = {candidate.args.tokenizer_name_or_path: candidate.tokenizer for candidate in candidates}
    return {
        folder: {name: read_rows(paths, tokenizer, *how) for name, paths in files.items()}
        for folder, tokenizer in tokenizers.items()
    }


def score(candidate: Candidate, texts: dict[str, TextRows], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of the table of a model under one scaling."""
    from utils.inference import load_for_inference
    from utils.losses import install_loss_head
    from utils.perplexity import model_losses, perplexity_by_length

    model = load_for_inference(candidate.args, candidate.config)
    install_loss_head(model)
    names = {"label": candidate.label, "model": candidate.model, "setting": candidate.setting}
    found = []
    for text, rows in texts.items():
        losses = model_losses(model, rows.ids, lengths)
        for row in perplexity_by_length(losses, rows.num_bytes):
            found.append({**names, "text": text, "rows": len(rows.ids), **row})
    return found


def print_row(row: dict[str, Any] | None) -> None:
    """A line of the table on standard output; None: its heading."""
    if row is None:
        print(f"{'model, scaling':28} {'text':16} {'tokens':>12} {'perplexity':>11} {'bits/byte':>9} {'rows':>5}")
        return
    figures = f"{row['perplexity']:11.3f} {row['bits_per_byte']:9.4f} {row['rows']:5}"
    print(f"{row['label']:28} {row['text']:16} {row['tokens']:>12} {figures}", flush=True)


if __name__ == "__main__":
    run(
        main,
        InferenceArguments,
        EvalArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
