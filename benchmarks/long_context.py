"""Perplexity against length of a model trained with a window of 512 tokens, under every --rope_scaling.

  python benchmarks/long_context.py --shared ../shared/data
Trains a small Llama from scratch, on a CPU, on full windows of Chinese text, then scores documents it has not seen, of
at least 1,024 tokens: the collected lyrics of poets, and the last part of a textbook. The model learns nothing of
positions after the 512th; without scaling it should fail there, with auto-NTK and YaRN go on as before. Last it is
trained on in windows of 1,024 (pt.py --rope_scaling), under each scaling and with no more than a longer window in its
config, and scored again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

WINDOW, LENGTHS = 512, [256, 512, 1024]
SETTINGS = ["none", "pi", "ntk", "auto-ntk", "yarn", "pi+ntk"]
FURTHER = ["none", "pi", "ntk", "yarn"]  # trained on; none: the window is written longer, nothing else
HELD_OUT_BOOK, HELD_OUT_POETS = 0.15, 8  # share of the textbook; every so many-th of the long collections
SMALLEST, LARGEST = 2.0, 1.15  # what the ratio of perplexities is to be: without scaling at least, with it at most


# ---------------------------------------------------------------- documents


def read_documents(shared: Path) -> tuple[list[list[str]], list[str], list[str]]:
    """(training corpora, each documents in order; held-out lyrics; held-out text of the book)."""

    def lines(name: str) -> list[str]:
        return [line for line in (shared / "pt" / name).read_text(encoding="utf-8").splitlines() if line.strip()]

    def poet(line: str) -> str:
        return line.split("：")[0].split()[-1]  # "title poet：text", poet by poet

    collections = ["\n".join(poems) for _, poems in groupby(lines("zh_songci.txt"), poet)]
    long = [number for number, text in enumerate(collections) if len(text) >= 2000]
    held_out = set(long[::HELD_OUT_POETS])
    book = lines("zh_d2l.txt")
    cut = round(len(book) * (1 - HELD_OUT_BOOK))
    training = [
        [text for number, text in enumerate(collections) if number not in held_out],
        ["\n".join(book[:cut])],
        ["\n".join(lines("zh_answers.txt"))],
    ]
    return training, [collections[number] for number in sorted(held_out)], ["\n".join(book[cut:])]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def train_tokenizer(corpora: list[list[str]], args, folder: Path):
    import train_tokenizer as script

    from utils.text.tokenizer import load_tokenizer

    paths = [write_jsonl(folder / f"{number}.jsonl", texts) for number, texts in enumerate(corpora)]
    script.main(
        script.TokenizerArguments(
            input=paths,
            output_dir=str(folder / "tokenizer"),
            overwrite=True,
            vocab_size=args.vocabulary,
            character_coverage=0.98,  # rare characters of the lyrics are written as bytes
        )
    )
    return load_tokenizer(folder / "tokenizer")


# ---------------------------------------------------------------- training


def build(args, tokenizer):
    from models import random_llama

    return random_llama(
        tokenizer,
        seed=args.seed,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // args.head_dim,
        max_position_embeddings=WINDOW,
        rope_theta=args.rope_theta,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )


def training_rows(corpora: list[list[str]], tokenizer, generator):
    """Rows (N, WINDOW) of one pass over the text: BOS and the next tokens of a corpus, from a random beginning."""
    import torch

    from utils.text.tokenizer import encode_texts

    rows = []
    for texts in corpora:
        stream = torch.tensor([token for ids in encode_texts(tokenizer, texts) for token in ids])
        skip = int(torch.randint(0, WINDOW - 1, (), generator=generator))
        body = stream[skip:]
        body = body[: len(body) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1)
        rows.append(torch.cat([torch.full((len(body), 1), tokenizer.bos_token_id), body], dim=1))
    every = torch.cat(rows)
    return every[torch.randperm(len(every), generator=generator)]


def train(args, model, tokenizer, corpora, watched) -> dict[str, float]:
    """Train in place; `watched`: rows that are looked at on the way, with --watch."""
    import torch

    from utils.models.lm_loss import loss_targets
    from utils.models.loading import bf16_is_supported
    from utils.text.prompts import IGNORE_INDEX

    generator = torch.Generator().manual_seed(args.seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    warmup = max(1, args.steps // 20)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rows, place = training_rows(corpora, tokenizer, generator), 0
    started, processor = time.perf_counter(), time.process_time()
    for step in range(args.steps):
        if place + args.rows > len(rows):
            rows, place = training_rows(corpora, tokenizer, generator), 0
        batch, place = rows[place : place + args.rows], place + args.rows
        targets = torch.cat([batch[:, 1:], torch.full_like(batch[:, :1], IGNORE_INDEX)], dim=1)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16_is_supported()),
            loss_targets(model, targets),
        ):
            loss = model(input_ids=batch, use_cache=False).logits / (targets != IGNORE_INDEX).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step + 1}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
        if args.watch and (step + 1) % args.watch == 0:
            look(model, watched)
    tokens = args.steps * args.rows * WINDOW
    times = {"seconds": time.perf_counter() - started, "processor": time.process_time() - processor}
    return {**times, "tokens": tokens, "passes": tokens / rows.numel()}


def train_on(args, source: Path, scaling: str, corpora: list[list[str]], folder: Path) -> Path:
    """pt.py in windows of twice the length; returns the model's folder."""
    import pt

    from utils.core.arguments import DataArguments, ExtendArguments, LoraArguments, ModelArguments
    from utils.core.command_line import parse_args
    from utils.training.arguments import RunArguments

    out, flags = folder / f"further-{scaling}", ["--rope_scaling", scaling, "--rope_factor", "2"]
    if scaling == "none":
        longer, flags = folder / "longer", []
        shutil.copytree(source, longer)
        config = json.loads((longer / "config.json").read_text()) | {"max_position_embeddings": LENGTHS[-1]}
        (longer / "config.json").write_text(json.dumps(config))
        source = longer
    # Documents of several lines stay whole: that is what a longer window is for.
    data = [write_jsonl(folder / f"whole-{number}.jsonl", texts) for number, texts in enumerate(corpora)]
    argv = ["--model_name_or_path", source, "--full_finetuning", "--train_data", *data, "--output_dir", out, *flags]
    argv += ["--block_size", LENGTHS[-1], "--per_device_train_batch_size", args.rows // 2, "--seed", args.seed]
    argv += ["--max_steps", args.further_steps, "--learning_rate", args.learning_rate / 10, "--weight_decay", 0.1]
    argv += ["--lr_scheduler_type", "cosine", "--warmup_steps", 0.05, "--save_strategy", "no", "--report_to", "none"]
    argv += ["--logging_steps", 50, "--disable_tqdm", "True"]
    types = (ModelArguments, ExtendArguments, LoraArguments, DataArguments, pt.PretrainingArguments, RunArguments)
    pt.main(*parse_args(*types, argv=list(map(str, argv))))
    return out


def look(model, ids) -> None:
    """Print the ratio of perplexities without scaling, and with NTK for twice the window."""
    from utils.core.arguments import RopeArguments
    from utils.evaluation.likelihood import token_losses
    from utils.models.rope import RowRotary, auto_ntk_frequencies, scale_rope

    config = type(model.config)(**model.config.to_dict())
    scale_rope(config, RopeArguments("auto-ntk"))
    original = model.model.rotary_emb
    model.model.rotary_emb = RowRotary(original, config)
    model.eval()
    near, far = slice(255, 511), slice(511, 1023)
    plain = token_losses(model, ids)
    model.model.rotary_emb.inv_freq_rows = auto_ntk_frequencies(config, 2 * WINDOW).unsqueeze(0)
    slowed = token_losses(model, ids)
    model.model.rotary_emb = original
    model.train()
    base = float(plain[:, near].mean())
    figures = [math.exp(base), *(math.exp(float(losses[:, far].mean()) - base) for losses in (plain, slowed))]
    print("  perplexity of tokens 257-512 {:.1f}; after them x {:.2f}, with NTK x {:.2f}".format(*figures), flush=True)


# ---------------------------------------------------------------- the measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="folder with pt/")
    parser.add_argument("--vocabulary", type=int, default=3000)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rope_theta", type=float, default=500.0)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--rows", type=int, default=4, help="windows a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--further_steps", type=int, default=150, help="steps in windows of 1,024 afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--watch", type=int, help="look at the ratios after every so many steps")
    parser.add_argument("--max_rows", type=int, help="documents' stretches scored of each text; default: all")
    parser.add_argument("--output_dir", type=Path, help="keep model, texts, table and picture here")
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    if not (args.shared / "pt").is_dir():
        parser.error(f"{args.shared}/pt: no such folder; pass --shared")
    with tempfile.TemporaryDirectory() as temporary:
        measure(args, args.output_dir or Path(temporary))


def measure(args, folder: Path) -> None:
    import eval_perplexity

    from utils.core.arguments import InferenceArguments
    from utils.evaluation.perplexity import read_rows
    from utils.models.lm_loss import install_loss_head
    from utils.text.tokenizer import save_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    corpora, lyrics, book = read_documents(args.shared)
    texts = {"lyrics": write_jsonl(folder / "lyrics.jsonl", lyrics), "book": write_jsonl(folder / "book.jsonl", book)}
    model_folder = folder / "model"
    tokenizer = train_tokenizer(corpora, args, folder)
    model = build(args, tokenizer)
    install_loss_head(model)
    watched = read_rows([Path(path) for path in texts.values()], tokenizer, LENGTHS[-1], 16).ids
    trained = train(args, model, tokenizer, corpora, watched)
    model.save_pretrained(model_folder)
    save_tokenizer(tokenizer, model_folder)

    def score(source: Path, settings: list[str]) -> dict:
        return eval_perplexity.main(
            InferenceArguments(model_name_or_path=str(source), dtype="float32", only_cpu=True),
            eval_perplexity.EvalArguments(
                texts=[f"{name}={path}" for name, path in texts.items()],
                lengths=LENGTHS,
                settings=settings,
                max_rows=args.max_rows,
                output_dir=str(folder / f"perplexity-{source.name}"),
                overwrite=True,
            ),
        )

    result = score(model_folder, SETTINGS)
    further = {}
    for scaling in FURTHER if args.further_steps else []:
        longer = train_on(args, model_folder, scaling, corpora, folder)
        further[scaling] = score(longer, ["none"])  # its config says how it is scaled
    report(args, model, trained, result, further)


def report(args, model, trained: dict[str, float], result: dict, further: dict[str, dict]) -> None:
    import torch

    rows = {(row["setting"], row["text"], row["tokens"]): row for row in result["rows"]}
    names = list(result["texts"])
    buckets = list(dict.fromkeys(row["tokens"] for row in result["rows"]))
    near, far = buckets[-2:]
    times = (
        f"{trained['seconds']:.0f} s, {trained['processor']:.0f} of the processor, {torch.get_num_threads()} threads"
    )
    counts = ", ".join(f"{rows['none', name, far]['rows']} of {LENGTHS[-1]} ({name})" for name in names)
    head = [
        f"| scaling | {' | '.join(f'{name}, {bucket}' for name in names for bucket in buckets)} | ratio |",
        "|---|" + "---|" * (len(names) * len(buckets) + 1),
    ]
    lines = [
        f"{model.num_parameters() / 1e6:.1f}M parameters, {args.layers} layers of width {args.hidden_size}, heads of "
        f"{args.head_dim}, rotary base {args.rope_theta:g}, {model.config.vocab_size:,} pieces; trained on "
        f"{trained['tokens'] / 1e6:.1f}M tokens ({trained['passes']:.1f} passes) in windows of {WINDOW}, "
        f"{times}.",
        "",
        f"Perplexity by position in documents it has not seen, stretches of tokens: {counts}. Ratio: tokens {far} to "
        f"tokens {near}, both texts together.",
        "",
        *head,
    ]
    ratios = {}
    for setting in SETTINGS:
        cells = [f"{rows[setting, name, bucket]['perplexity']:.1f}" for name in names for bucket in buckets]
        ratios[setting] = math.exp(mean_loss(rows, setting, names, far) - mean_loss(rows, setting, names, near))
        lines.append(f"| {setting} | {' | '.join(cells)} | {ratios[setting]:.3f} |")
    if further:
        lines += [
            "",
            f"Trained on for {args.further_steps} steps of {args.rows // 2} windows of {LENGTHS[-1]} tokens (pt.py "
            "--full_finetuning --rope_scaling ... --rope_factor 2; none: a longer window in the config alone):",
            "",
            *head,
        ]
    for scaling, found in further.items():
        found_rows = {(scaling, row["text"], row["tokens"]): row for row in found["rows"]}
        cells = [f"{found_rows[scaling, name, bucket]['perplexity']:.1f}" for name in names for bucket in buckets]
        ratio = mean_loss(found_rows, scaling, names, far) - mean_loss(found_rows, scaling, names, near)
        lines.append(f"| {scaling} | {' | '.join(cells)} | {math.exp(ratio):.3f} |")
    lines += ["", f"Aims: none above {SMALLEST}, auto-ntk and yarn at most {LARGEST}: {judge(ratios)}."]
    print("\n".join(lines))
    if not args.no_record:
        from record import describe_run, record

        record("Windows longer than the trained one", "\n".join([describe_run("torch", "transformers"), "", *lines]))


def mean_loss(rows, setting: str, names: list[str], bucket: str) -> float:
    """Nats a token of a bucket in all texts."""
    found = [rows[setting, name, bucket] for name in names]
    total = sum(row["scored_tokens"] for row in found)
    return sum(math.log(row["perplexity"]) * row["scored_tokens"] for row in found) / total


def judge(ratios: dict[str, float]) -> str:
    missed = [name for name in ("auto-ntk", "yarn") if ratios[name] > LARGEST]
    missed += ["none"] if ratios["none"] < SMALLEST else []
    return f"missed by {', '.join(missed)}" if missed else "met"


if __name__ == "__main__":
    main()
