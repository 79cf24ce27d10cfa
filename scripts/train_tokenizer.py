"""Train a sentencepiece BPE vocabulary: files or folders of text -> a tokenizer folder, to be merged or a base.

  python scripts/train_tokenizer.py --input zh.txt corpus/ --vocab_size 20000 --output_dir output/chinese_sp
  python scripts/train_tokenizer.py --input data.jsonl --text_column content --vocab_size 8000 --output_dir output/sp
The result is the same for the same input and settings, however many threads train it.
"""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.core.arguments import arg, list_arg
from utils.core.command_line import describe_arguments, run, save_run_config, shell_command
from utils.core.errors import InputError, raise_problems
from utils.core.files import atomic_folder, hash_file, refuse_existing_output, write_json
from utils.core.machine import available_cores, interruptible
from utils.core.records import BadRecords
from utils.text.text_sample import Sample, iter_corpus, list_corpus, sample_texts

logger = logging.getLogger("train_tokenizer")

MAX_SENTENCE = 4000  # characters: sentencepiece counts positions within a sentence in 16 bits
# Between sentences: control characters (sentencepiece skips sentences with a tab), its marks of space and unknown.
BOUNDARIES = re.compile("[\\x00-\\x1f\\x7f\u2581\u2047]+")


@dataclass
class TokenizerArguments:
    """What the vocabulary is learned from, and how large it gets."""

    input: list[str] = list_arg(help="Files or folders with text (txt, json, jsonl, parquet; recursive, sorted).")
    output_dir: str | None = arg(help="New folder of the tokenizer.")
    vocab_size: int = arg(20000, help="Pieces in all, 259 special and byte pieces included.")
    character_coverage: float = arg(
        0.9995, help="Share of the text's characters that get a piece of their own, 0.98-1; the rest become bytes."
    )
    byte_fallback: bool = arg(True, help="Write rare characters as their UTF-8 bytes; without it they become <unk>.")
    split_digits: bool = arg(True, help="Cut numbers into single digits, as Llama does.")
    max_piece_length: int = arg(16, help="Longest piece, in characters.")
    sample_bytes: int = arg(200_000_000, help="Bytes of text to learn from, drawn at random; memory grows with it.")
    max_sentences: int | None = arg(
        help="Lines of text to learn from, drawn at random; default: no limit but the bytes."
    )
    text_column: str = arg("text", help="Field with the text in json, jsonl and parquet files.")
    on_bad_record: Literal["error", "skip"] = arg(
        "error", help="A line or record that cannot be read or used: stop with file:line, or skip and count."
    )
    seed: int = arg(42, help="Seed of the sample.")
    num_threads: int | None = arg(help="Threads; default: the cores available. They do not change the result.")
    overwrite: bool = arg(False, help="Replace output_dir if it holds something, once the new tokenizer is complete.")

    def __post_init__(self) -> None:
        problems = []
        if not self.input or not self.output_dir:
            problems.append("pass --input FILE_OR_FOLDER ... and --output_dir FOLDER")
        if self.vocab_size < 1:
            problems.append(f"--vocab_size {self.vocab_size}: need at least 1")
        if not 0.98 <= self.character_coverage <= 1:
            problems.append(f"--character_coverage {self.character_coverage}: need 0.98-1 (what sentencepiece takes)")
        if not 1 <= self.max_piece_length <= 512:
            problems.append(f"--max_piece_length {self.max_piece_length}: need 1-512 characters")
        if self.sample_bytes < 1 or (self.max_sentences is not None and self.max_sentences < 1):
            problems.append("--sample_bytes and --max_sentences: need at least 1")
        raise_problems(problems)


def main(args: TokenizerArguments) -> dict[str, Any]:
    """Sample, train, write, report. Returns: the report."""
    from utils.text.tokenizer import encode_texts, load_tokenizer, save_tokenizer

    assert args.output_dir is not None
    started = time.monotonic()
    refuse_existing_output(args.output_dir, args.overwrite)
    paths = list_corpus(args.input)
    bad_records = BadRecords(args.on_bad_record)
    batches = iter_corpus(paths, args.text_column, bad_records)
    sample = sample_texts(iter_sentences(batches, paths), args.sample_bytes, args.max_sentences, args.seed)
    logger.info("training on %d of %d lines (%.1f MB)", len(sample.texts), sample.total, sample.bytes / 1e6)
    model = train(sample, args)
    with atomic_folder(args.output_dir, args.overwrite) as folder:
        (folder / "tokenizer.model").write_bytes(model)
        tokenizer = load_tokenizer(folder)
        save_tokenizer(tokenizer, folder)
        checked = sample.texts[:2000]
        tokens = sum(map(len, encode_texts(tokenizer, checked)))
        report = {
            "vocabulary": len(tokenizer),
            "lines": len(sample.texts),
            "lines_in_input": sample.total,
            "bytes": sample.bytes,
            "bytes_in_input": sample.total_bytes,
            "bad_lines_skipped": bad_records.skipped,
            "characters_per_token": sum(map(len, checked)) / max(tokens, 1),
            "sha256": hash_file(folder / "tokenizer.model"),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(folder / "training_report.json", report)
        save_run_config(folder, describe_arguments(args))
    log_summary(report, args)
    return report


def iter_sentences(batches: Iterable[list[str]], paths: list[Path]) -> Iterator[str]:
    """Lines of the documents, cut where sentencepiece would otherwise skip or overflow."""
    from tqdm import tqdm

    with tqdm(unit="doc", unit_scale=True, desc=f"reading {len(paths)} files") as bar:
        for batch in batches:
            for document in batch:
                for line in BOUNDARIES.split(document):
                    if not line or line.isspace():
                        continue
                    for start in range(0, len(line), MAX_SENTENCE):
                        yield line[start : start + MAX_SENTENCE]
            bar.update(len(batch))


def train(sample: Sample, args: TokenizerArguments) -> bytes:
    """Train the BPE model; returns the content of a tokenizer.model.

    Raises: InputError with sentencepiece's own limit if the text is too small or too varied for the vocabulary.
    """
    import sentencepiece

    from utils.text.pieces import parse_sentencepiece_model

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": args.vocab_size,
        "character_coverage": args.character_coverage,
        "byte_fallback": args.byte_fallback,
        "split_digits": args.split_digits,
        "max_sentencepiece_length": args.max_piece_length,
        "max_sentence_length": 4 * MAX_SENTENCE,
        "num_threads": args.num_threads or available_cores(),
        # As Llama: text is left as it is, and every space of it is kept.
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }

    def work() -> None:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sample.texts), model_writer=model, **settings)

    try:
        interruptible(work)
    except RuntimeError as error:
        raise explain(error, args) from None
    proto = parse_sentencepiece_model(model.getvalue())
    proto.trainer_spec.ClearField("num_threads")  # recorded by sentencepiece, though it decides nothing
    return bytes(proto.SerializeToString())


def explain(error: RuntimeError, args: TokenizerArguments) -> Exception:
    """The user's mistake behind sentencepiece's message, or the error itself."""
    if found := re.search(r"too high.*<= (\d+)", str(error)):
        return InputError(
            f"--vocab_size {args.vocab_size} is too high for this text, which gives at most {found[1]} pieces; "
            f"pass --vocab_size {found[1]} or less, or more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return InputError(
            f"--vocab_size {args.vocab_size} is too low: special, byte and single-character pieces alone are "
            f"{found[1]}; pass more, or a lower --character_coverage (now {args.character_coverage})"
        )
    return error


def log_summary(report: dict[str, Any], args: TokenizerArguments) -> None:
    """The figures, where the files are, and the next command."""
    logger.info(
        "%d pieces from %d lines in %.1f s, %.2f characters/token on them -> %s\n"
        "then, with the folder of your base model's tokenizer for BASE: %s",
        report["vocabulary"],
        report["lines"],
        report["seconds"],
        report["characters_per_token"],
        args.output_dir,
        shell_command(
            *("python", "scripts/merge_tokenizers.py", "--base_tokenizer", "BASE", "--chinese_sp_model_file"),
            *(Path(str(args.output_dir)) / "tokenizer.model", "--output_dir", "output/merged_tokenizer"),
        ),
    )


if __name__ == "__main__":
    run(main, TokenizerArguments, description=__doc__)
