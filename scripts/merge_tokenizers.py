"""Extend a base tokenizer: base + new pieces -> a tokenizer folder that every engine segments alike, and what it buys.

  python scripts/merge_tokenizers.py --base_tokenizer llama-2-7b --chinese_sp_model_file output/chinese_sp \
      --report_text zh=zh_heldout.txt en=en_heldout.txt --output_dir output/merged_tokenizer
  python scripts/merge_tokenizers.py --base_tokenizer llama-3-8b --input zh.txt --max_new_tokens 20000 \
      --report_text zh=zh_heldout.txt en=en_heldout.txt --output_dir output/merged_tokenizer
The first form merges sentencepiece pieces (Llama-2, Mistral, Mixtral); the second trains further merges on text for
byte-level BPE bases (Llama-3, Qwen). Base ids stay what they are.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.core.arguments import arg, list_arg
from utils.core.command_line import describe_arguments, run, save_run_config, shell_command
from utils.core.errors import InputError, raise_problems
from utils.core.files import atomic_folder, read_json, read_text, refuse_existing_output
from utils.core.machine import interruptible
from utils.core.records import BadRecords
from utils.text.text_sample import Sample, iter_corpus, list_corpus, sample_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from utils.text.vocabulary import Selection

logger = logging.getLogger("merge_tokenizers")

OWN_TEMPLATE = "own"  # --chat_template: keep the base's
DEFAULT_NEW_TOKENS = 20000  # for byte-level bases
CHECKED_TEXTS = 2000  # texts of the report that every engine must cut alike, beside the hard ones
HARD_TEXTS = (
    " leading",
    "   three  two ",
    "\n\nlines\r\n\ttab",
    "你好，world！ 123",
    "ＡＢＣ１２３　全角",
    "😀👩\u200d👩\u200d👧🇨🇳",
    "𠮷野家 𪚥𰻞㐀",
    "\x00\x01\x1b[0m\x7f",
    "<s><<SYS>> </s><unk><pad>",
    "<0x0A><|begin_of_text|><|im_end|>",
    "e\u0301 ﬁ İ ß",
    "。。。！！！——……",
    " " * 56,
    "哈哈哈哈哈哈哈哈哈",
)


@dataclass
class MergeTokenizersArguments:
    """Which tokenizer is extended, by what, and which new pieces may enter."""

    base_tokenizer: str | None = arg(help="Base tokenizer (--llama_tokenizer_dir): a folder, or a hub id.")
    chinese_sp_model_file: str | None = arg(
        help="For sentencepiece bases: the model file with the new pieces, or its folder."
    )
    input: list[str] = list_arg(help="For byte-level bases: files or folders with text to train further merges on.")
    output_dir: str | None = arg(help="New folder of the extended tokenizer.")
    max_new_tokens: int | None = arg(
        help=f"At most this many new tokens, the best first; default: all, or {DEFAULT_NEW_TOKENS} by merges on text."
    )
    keep_unreachable: bool = arg(False, help="Keep pieces that no text is ever cut into: rows that never train.")
    keep_base_language_pieces: bool = arg(
        False, help="Keep pieces that cut the base's own language anew: ASCII letters or digits, or Latin text alone."
    )
    base_language_sample: list[str] = list_arg(
        help="Files or folders in the base's language: new pieces found in them are dropped too."
    )
    pad_token: str | None = arg(
        help="Padding token, appended as a control token if the vocabulary lacks it, e.g. <pad>."
    )
    pad_to_multiple_of: int = arg(
        1,
        help="Round the model's embedding rows up to a multiple, e.g. 64; the tokenizer gets no empty pieces.",
    )
    chat_template: str = arg(
        "alpaca-2",
        help=f"Chat template saved with it: a name (see docs), a jinja file, or '{OWN_TEMPLATE}' for the base's.",
    )
    report_text: list[str] = list_arg(
        help="Held-out files or folders to measure efficiency on, each optionally name=path; equal names get a number."
    )
    training_text: list[str] = list_arg(
        help="Files or folders that will be trained on: the report says how many pieces they support, and whether "
        "extending pays; default: those of --input."
    )
    model_config: str | None = arg(
        help="Model folder or config.json for the cost figures; default: the base's folder."
    )
    hidden_size: int | None = arg(help="Width of the model, for the cost figures where there is no config.")
    text_column: str = arg("text", help="Field with the text in json, jsonl and parquet files.")
    on_bad_record: Literal["error", "skip"] = arg(
        "error", help="A line or record that cannot be read or used: stop with file:line, or skip and count."
    )
    sample_bytes: int = arg(100_000_000, help="Bytes of each text input used, drawn at random.")
    seed: int = arg(42, help="Seed of the samples.")
    overwrite: bool = arg(False, help="Replace output_dir if it holds something, once the new tokenizer is complete.")

    def __post_init__(self) -> None:
        problems = []
        if not self.base_tokenizer or not self.output_dir:
            problems.append("pass --base_tokenizer FOLDER and --output_dir FOLDER")
        if bool(self.chinese_sp_model_file) == bool(self.input):
            problems.append(
                "pass --chinese_sp_model_file (sentencepiece bases) or --input (byte-level bases), one of the two"
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(f"--max_new_tokens {self.max_new_tokens}: need at least 1")
        if self.pad_to_multiple_of < 1 or self.sample_bytes < 1:
            problems.append("--pad_to_multiple_of and --sample_bytes: need at least 1")
        raise_problems(problems)


def main(args: MergeTokenizersArguments) -> dict[str, Any]:
    """Extend, write, check, measure. Returns: the report."""
    from utils.data.corpora import parse_corpora
    from utils.text.tokenizer import load_tokenizer
    from utils.text.vocabulary import Selection, save_extended
    from utils.text.vocabulary_report import compare, write_report

    assert args.base_tokenizer is not None and args.output_dir is not None
    started = time.monotonic()
    refuse_existing_output(args.output_dir, args.overwrite)
    template = read_chat_template(args.chat_template)
    model_size = read_model_size(args)
    base = load_tokenizer(args.base_tokenizer)
    check_kind(base, args)
    bad_records = BadRecords(args.on_bad_record)
    held_out = parse_corpora(args.report_text) if args.report_text else {}
    texts = {name: read_texts(paths, args, bad_records).texts for name, paths in held_out.items()}
    base_language = read_texts(list_corpus(args.base_language_sample), args, bad_records).texts
    new_text = read_texts(list_corpus(args.input), args, bad_records)
    training = read_texts(list_corpus(args.training_text), args, bad_records) if args.training_text else new_text
    selection = Selection(args.keep_unreachable, args.keep_base_language_pieces, args.max_new_tokens, base_language)
    extended = extend(base, args, selection, new_text.texts)
    with atomic_folder(args.output_dir, args.overwrite) as folder:
        tokenizer = save_extended(
            base,
            extended,
            folder,
            pad_token=args.pad_token,
            chat_template=template,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        check(
            base, tokenizer, folder, [*HARD_TEXTS, *itertools.islice(itertools.chain(*texts.values()), CHECKED_TEXTS)]
        )
        scale = training.total_bytes / max(training.bytes, 1)
        comparison = compare(base, tokenizer, texts, training.texts, scale)
        report = build_report(base, tokenizer, selection, model_size, comparison)
        report |= {"bad_lines_skipped": bad_records.skipped, "seconds": round(time.monotonic() - started, 1)}
        write_report(report, folder)
        save_run_config(folder, describe_arguments(args))
    log_summary(report, args)
    return report


# ---------------------------------------------------------------- what is read, and checked before anything slow


def read_chat_template(name: str) -> str | None:
    """The jinja text of a template's name or file; None keeps the base's own."""
    from utils.text.prompts import CHAT_TEMPLATES

    if name == OWN_TEMPLATE:
        return None
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if not Path(name).is_file():
        names = ", ".join([*CHAT_TEMPLATES, OWN_TEMPLATE])
        raise InputError(f"--chat_template {name}: neither a file nor one of {names}")
    return read_text(name)


def read_model_size(args: MergeTokenizersArguments) -> Any:
    """What the cost figures are computed for, or None where nothing says it."""
    from utils.text.vocabulary_report import ModelSize

    named = Path(args.model_config or args.base_tokenizer or "")
    file = named / "config.json" if named.is_dir() else named
    if args.model_config or file.is_file():
        config = read_json(file)
        if "hidden_size" not in config:
            raise InputError(f"{file}: no hidden_size in it; pass a Llama-family config.json, or --hidden_size")
        return ModelSize.from_config(config)
    return None if args.hidden_size is None else ModelSize(args.hidden_size, tied=False)


def check_kind(base: PreTrainedTokenizerBase, args: MergeTokenizersArguments) -> None:
    """Raises: InputError if the base is of the other kind than the source of new pieces."""
    from utils.text.tokenizer import SentencePieceTokenizer

    if isinstance(base, SentencePieceTokenizer):
        if args.chinese_sp_model_file is None:
            raise InputError(
                f"{args.base_tokenizer} is a sentencepiece tokenizer: train new pieces with train_tokenizer.py, then "
                "pass them as --chinese_sp_model_file"
            )
    elif not args.input:
        raise InputError(
            f"{args.base_tokenizer} has no sentencepiece model (tokenizer.model) to merge into: pass the original "
            "folder, or, for byte-level bases (Llama-3, Qwen), text as --input"
        )


def read_texts(paths: list[Path], args: MergeTokenizersArguments, bad_records: BadRecords) -> Sample:
    """A seeded sample of the documents of some files; empty if there is no file."""
    if not paths:
        return Sample([], 0, 0, 0)
    documents = itertools.chain.from_iterable(iter_corpus(paths, args.text_column, bad_records))
    return sample_texts(documents, args.sample_bytes, None, args.seed)


# ---------------------------------------------------------------- extending


def extend(
    base: PreTrainedTokenizerBase, args: MergeTokenizersArguments, selection: Selection, texts: list[str]
) -> Any:
    """The extended ModelProto (sentencepiece bases) or tokenizers.Tokenizer (byte-level bases, from `texts`)."""
    from utils.text.pieces import read_sentencepiece_model
    from utils.text.tokenizer import SENTENCEPIECE_FILE, SentencePieceTokenizer
    from utils.text.vocabulary import base_with_added_tokens, extend_byte_level, merge_sentencepiece

    if isinstance(base, SentencePieceTokenizer):
        assert args.chinese_sp_model_file is not None
        file = Path(args.chinese_sp_model_file)
        extra = read_sentencepiece_model(file / SENTENCEPIECE_FILE if file.is_dir() else file)
        return merge_sentencepiece(base_with_added_tokens(base), extra, selection)
    batches = [texts[start : start + 1000] for start in range(0, len(texts), 1000)]
    number = args.max_new_tokens or DEFAULT_NEW_TOKENS
    logger.info("training up to %d merges on %d documents", number, len(texts))
    extended = interruptible(lambda: extend_byte_level(base.backend_tokenizer, batches, number, selection))
    if selection.counts["added"] < number:
        logger.warning(
            "the text gives only %d of %d new tokens; more text gives more", selection.counts["added"], number
        )
    return extended


def check(base: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, folder: Path, texts: list[str]) -> None:
    """Compare what was written with what it must be.

    Raises: InputError if the base's ids moved or engines cut `texts` unlike each other; nothing is left behind then.
    """
    from utils.text.vocabulary import count_disagreements

    moved = [token for token, index in base.get_vocab().items() if tokenizer.convert_tokens_to_ids(token) != index]
    if moved:
        raise InputError(
            f"{len(moved)} base tokens changed their id, such as {moved[:3]}; this base cannot be extended"
        )
    # sentencepiece itself turns its space marker into a space.
    disagreements = count_disagreements(folder, [text for text in texts if "\u2581" not in text])
    if any(disagreements.values()):
        raise InputError(
            f"the written tokenizer does not cut all of {len(texts)} texts alike: {disagreements}; this base has "
            "rules that the written files do not carry over"
        )


def build_report(
    base: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    selection: Selection,
    model_size: Any,
    comparison: dict[str, Any],
) -> dict[str, Any]:
    """Everything vocabulary_report.json holds but the times."""
    from utils.text.tokenizer import SentencePieceTokenizer, embedding_rows
    from utils.text.vocabulary import unreachable_pieces, unreachable_tokens
    from utils.text.vocabulary_report import describe_cost, judge

    if isinstance(tokenizer, SentencePieceTokenizer):
        unreachable = len(unreachable_pieces(tokenizer.proto, len(base)))
    else:
        added = set(tokenizer.get_vocab()) - set(base.get_vocab()) - set(tokenizer.all_special_tokens)
        unreachable = len(unreachable_tokens(tokenizer.backend_tokenizer, added))
    rows = embedding_rows(tokenizer)
    cost = None if model_size is None else describe_cost(model_size, len(base), rows, comparison["languages"])
    report = {
        "base_vocabulary": len(base),
        "vocabulary": len(tokenizer),
        "embedding_rows": rows,
        "selection": dict(selection.counts),
        "unreachable_added_tokens": unreachable,
        **comparison,
        "cost": cost,
    }
    return report | {"verdict": judge(report)}


def log_summary(report: dict[str, Any], args: MergeTokenizersArguments) -> None:
    """The figures, where the files are, and the next command."""
    lines = [f"{report['base_vocabulary']} -> {report['vocabulary']} tokens: {report['selection']}"]
    for name, language in report["languages"].items():
        old, new = language["before"]["characters_per_token"], language["after"]["characters_per_token"]
        lines.append(f"{name}: {old:.2f} -> {new:.2f} characters/token, {language['tokens_saved']:.1%} fewer tokens")
    if not report["languages"]:
        lines.append("efficiency: skipped, no --report_text")
    lines += [f"verdict: {line}" for line in report["verdict"]]
    lines.append(f"{args.output_dir}: tokenizer and vocabulary_report.md ({report['seconds']} s)")
    places = {"MODEL": str(args.base_tokenizer), "TOKENIZER": str(args.output_dir), "DATA": "TEXT"}
    lines.append(
        f"then, with a file or folder of your text for TEXT: {shell_command('bash', 'scripts/run_pt.sh', **places)}"
    )
    logger.info("%s", "\n".join(lines))


if __name__ == "__main__":
    run(main, MergeTokenizersArguments, documented=("llama_tokenizer_dir",), description=__doc__)
