"""What an evaluation costs beside the model's bare forward passes over the same tokens.

  python benchmarks/evaluation_cost.py --part longbench
  python benchmarks/evaluation_cost.py --part perplexity
A Llama with random weights answers LongBench's questions, in the published layout, about texts longer than its window.
`bare` gives the same token ids to transformers' model: a pass over the prompt, then one for each new token but the
last, one sample after another, nothing else: no text, no file. Ours is all of eval_longbench.main: reading, encoding,
cutting, loading, answering, scoring, the picture. Every repetition is a fresh process; torch and transformers'
Llama, which the bare passes need as well, are imported before the clock starts.
Perplexity likewise: `bare` gives the windows of documents short and long to transformers' model, padded in the same
batches, and drops the logits; ours is all of eval_perplexity.main, loading the model included.
"""

import argparse
import contextlib
import io
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

AIM = 1.10
BARE = "bare forward passes"
OURS = {"eval_longbench.py, one at a time": 1, "eval_longbench.py, eight at once (default)": 8}
# Whether it is ours, and the stride as a part of the window.
SCORED = {
    "bare forward passes over blocks": (False, 1.0),
    "eval_perplexity.py, blocks": (True, 1.0),
    "bare forward passes over sliding windows": (False, 0.5),
    "eval_perplexity.py, windows that slide by half": (True, 0.5),
}
PARTS = {"longbench": (BARE, *OURS), "perplexity": tuple(SCORED)}
SCORED_CHARACTERS = 400_000
BATCH_TOKENS = 4096
DATASETS = ("hotpotqa", "multifieldqa_en", "qasper", "lcc")  # answers of 32, 64, 128 and 64 tokens


# ---------------------------------------------------------------- the model and the questions


def make_model(args, folder: Path) -> int:
    """Save a tokenizer of the example texts and a random model; returns its parameters."""
    import torch
    import train_tokenizer as script
    from models import random_llama

    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    script.main(
        script.TokenizerArguments(
            input=[str(ROOT / "examples" / "data" / "pretrain" / "en_train.txt")],
            output_dir=str(folder / "tokenizer"),
            vocab_size=args.vocabulary,
        )
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = random_llama(
        tokenizer,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        max_position_embeddings=args.window,
        tie_word_embeddings=True,
    )
    with torch.no_grad():  # the end is never the likeliest, so every answer has its full length
        model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder / "model")
    save_tokenizer(tokenizer, folder / "model")
    return model.num_parameters()


def make_data(args, folder: Path) -> None:
    """LongBench's layout: questions about stretches of the example texts, most of them longer than the window."""
    text = (ROOT / "examples" / "data" / "pretrain" / "en_train.txt").read_text(encoding="utf-8")
    folder.mkdir()
    for name in DATASETS:
        rows = []
        for number in range(args.samples):
            start = (number * 7919 * 31 + len(name) * 4001) % (len(text) - args.window * 8)
            length = args.window * (2 + number % 5)  # characters; about four make a token
            row = {"input": f"What is said of {number}?", "context": text[start : start + length]}
            rows.append(
                row | {"answers": ["yes, it is so"], "length": length // 5, "dataset": name, "all_classes": None}
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_prompts(folder: Path) -> None:
    """The token ids that eval_longbench.py gives to the model, and how many it wants, for the bare passes."""
    from eval_longbench import AnswerArguments

    from utils.core.arguments import InferenceArguments
    from utils.evaluation.longbench.prompts import PromptWriter
    from utils.evaluation.longbench.tasks import TASKS, read_samples
    from utils.generation.loading import EnginePlan

    plan = EnginePlan(InferenceArguments(model_name_or_path=str(folder / "model")))
    writer = PromptWriter(plan, AnswerArguments(), max_length=plan.context)
    rows = []
    for name in DATASETS:
        task = TASKS[name]
        for sample in read_samples(folder / "data" / f"{name}.jsonl", task):
            rows.append((writer.encode(task, sample)[0], writer.answer_length(task)))
    (folder / "prompts.json").write_text(json.dumps(rows))


# ---------------------------------------------------------------- one row of the table, in a process of its own


def measure(row: str, folder: Path) -> dict:
    """Seconds, and the tokens that were given to the model."""
    if row in SCORED:
        return measure_perplexity(row, folder)
    prompts = json.loads((folder / "prompts.json").read_text())
    counts = {"prompt_tokens": sum(len(ids) for ids, _ in prompts), "new_tokens": sum(new for _, new in prompts)}
    if row == BARE:
        return {"seconds": time_bare(folder, prompts), **counts}
    return {"seconds": time_ours(folder, OURS[row]), **counts}


def import_llama() -> None:
    """What the bare passes import too before their clock starts; transformers imports it late."""
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def time_bare(folder: Path, prompts) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    start = time.perf_counter()
    with torch.no_grad():
        for ids, new_tokens in prompts:
            cache, given = None, torch.tensor([ids])
            for _ in range(new_tokens):
                output = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, given = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - start


def time_ours(folder: Path, batch_size: int) -> float:
    import eval_longbench as script

    import_llama()
    from utils.core.arguments import InferenceArguments

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        script.main(
            InferenceArguments(model_name_or_path=str(folder / "model"), dtype="float32"),
            script.AnswerArguments(),
            script.EvalArguments(
                data_dir=str(folder / "data"), predict_on=",".join(DATASETS), output_dir=out, batch_size=batch_size
            ),
        )
        return time.perf_counter() - start


# ---------------------------------------------------------------- perplexity


def make_documents(folder: Path) -> None:
    """The example texts: a line a document, then forty lines a document."""
    lines = (ROOT / "examples" / "data" / "pretrain" / "en_train.txt").read_text(encoding="utf-8").splitlines()
    documents, size = [], 0
    while size < SCORED_CHARACTERS:
        documents += [*lines[:40], " ".join(lines[40:80])]
        size += sum(map(len, lines[:80]))
        lines = lines[80:]
    (folder / "documents.txt").write_text("\n".join(documents) + "\n", encoding="utf-8")


def measure_perplexity(row: str, folder: Path) -> dict:
    """Seconds, and the tokens that were given to the model, padding not counted."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from utils.text.tokenizer import encode_texts, load_tokenizer

    ours, share = SCORED[row]
    window = AutoConfig.from_pretrained(folder / "model").max_position_embeddings
    stride = int((window - 1) * share)
    tokenizer = load_tokenizer(folder / "model")
    rows = []
    for ids in encode_texts(tokenizer, (folder / "documents.txt").read_text(encoding="utf-8").splitlines()):
        starts = [0, *(start for start in range(stride, len(ids), stride) if start - stride + window - 1 < len(ids))]
        rows += [[tokenizer.bos_token_id, *ids[start : start + window - 1]] for start in starts]
    tokens = sum(map(len, rows))
    if ours:
        return {"seconds": time_scored(folder, stride), "tokens": tokens}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    rows.sort(key=len, reverse=True)
    start = time.perf_counter()
    with torch.no_grad():
        while rows:
            count = max(1, BATCH_TOKENS // len(rows[0]))
            batch, rows = rows[:count], rows[count:]
            padded = [ids + [0] * (len(batch[0]) - len(ids)) for ids in batch]
            model(input_ids=torch.tensor(padded), use_cache=False)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def time_scored(folder: Path, stride: int) -> float:
    import eval_perplexity as script

    import_llama()
    from utils.core.arguments import InferenceArguments

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        script.main(
            InferenceArguments(model_name_or_path=str(folder / "model"), dtype="float32", only_cpu=True),
            script.EvalArguments(
                texts=[str(folder / "documents.txt")], stride=stride, batch_tokens=BATCH_TOKENS, output_dir=out
            ),
        )
        return time.perf_counter() - start


def report_perplexity(args, parameters: int, results: dict[str, list[dict]]) -> None:
    import torch
    from record import describe_run, record

    seconds = {row: statistics.median(found["seconds"] for found in rows) for row, rows in results.items()}
    lines = [
        describe_run("torch", "transformers"),
        f"- random Llama, {parameters / 1e6:.1f} million parameters, float32, {torch.get_num_threads()} threads, "
        f"window {args.window}; {SCORED_CHARACTERS:,} characters of documents short and long; medians of "
        f"{args.repeats}, ratios within a repetition, every row in a fresh process",
        "",
        "| | tokens | seconds | of the bare passes |",
        "|---|---|---|---|",
    ]
    for row, found in seconds.items():
        bare = next(other for other, (ours, share) in SCORED.items() if not ours and share == SCORED[row][1])
        lines.append(f"| {row} | {results[row][0]['tokens']:,} | {found:.1f} | {ratio(results, row, bare):.3f} |")
    lines += ["", f"Aim: at most {AIM:.2f}. Logits are made for scored tokens alone, of sliding windows for half."]
    text = "\n".join(lines)
    print(text)
    if not args.no_record:
        record("Cost of an evaluation: perplexity", text)


# ---------------------------------------------------------------- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), default="longbench")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=6, help="of each of four datasets")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    parser.add_argument(
        "--row", choices=[BARE, *OURS, *SCORED], help=argparse.SUPPRESS
    )  # a fresh process of this script
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.row:
        print(json.dumps(measure(args.row, args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = make_model(args, folder)
        if args.part == "longbench":
            make_data(args, folder / "data")
            write_prompts(folder)
        else:
            make_documents(folder)
        results: dict[str, list[dict]] = {row: [] for row in PARTS[args.part]}
        for repeat in range(args.repeats):  # there and back: a processor whose speed drifts favours neither
            for row in reversed(results) if repeat % 2 else results:
                command = [sys.executable, __file__, "--row", row, "--folder", temporary]
                finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
                results[row].append(json.loads(finished.stdout.splitlines()[-1]))
                print(f"{row}: {results[row][-1]['seconds']:.1f} s", flush=True)
    (report if args.part == "longbench" else report_perplexity)(args, parameters, results)


def ratio(results: dict[str, list[dict]], row: str, bare: str) -> float:
    """Of the seconds within a repetition: the median."""
    return statistics.median(
        ours["seconds"] / theirs["seconds"] for ours, theirs in zip(results[row], results[bare], strict=True)
    )


def report(args, parameters: int, results: dict[str, list[dict]]) -> None:
    import torch
    from record import describe_run, record

    seconds = {row: statistics.median(found["seconds"] for found in rows) for row, rows in results.items()}
    counts = results[BARE][0]
    lines = [
        describe_run("torch", "transformers"),
        f"- random Llama, {parameters / 1e6:.1f} million parameters, float32, {torch.get_num_threads()} threads, "
        f"window {args.window}; {len(DATASETS) * args.samples} questions of {', '.join(DATASETS)}: "
        f"{counts['prompt_tokens']:,} tokens in prompts, {counts['new_tokens']:,} new ones",
        f"- medians of {args.repeats}, ratios within a repetition, every row in a fresh process",
        "",
        "| | seconds | of the bare passes |",
        "|---|---|---|",
        *(f"| {row} | {found:.1f} | {ratio(results, row, BARE):.3f} |" for row, found in seconds.items()),
        "",
        f"Aim: at most {AIM:.2f}. Below 1 is possible where several are answered at once: they share the reading of "
        "the weights, which the bare passes, one after another, repeat for each.",
    ]
    text = "\n".join(lines)
    print(text)
    if not args.no_record:
        record("Cost of an evaluation: LongBench", text)


if __name__ == "__main__":
    main()
