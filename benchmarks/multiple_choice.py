"""CMMLU, five examples a question: the scorer with shared beginnings against a full-prompt forward pass a question.

  python benchmarks/multiple_choice.py --shared ../shared/data
A Llama of about 100M random parameters with the tokenizer's rows, embeddings and head untied as Llama-2's. Whole
subjects, by turns: transformers' model(input_ids).logits[:, -1] (plain), the same with logits of the last position
only, and the scorer. All three have to choose the same letters. Speeds are of processor seconds, which other work on
the machine distorts less.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

# Three of about a hundred questions; the tokens they share are as many as those of all 67 subjects together.
SUBJECTS = ["college_education", "college_mathematics", "philosophy"]
NAMES = ("plain forward a question", "forward a question, logits of its last position", "scorer, shared beginnings")
AIM = 8.0  # times the questions a second of the plain forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="folder with eval/cmmlu")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS)
    parser.add_argument("--max_questions", type=int, help="of each subject, for a look; default: all")
    parser.add_argument("--num_fewshot", type=int, default=5)
    parser.add_argument("--hidden_size", type=int, default=640)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch_tokens", type=int, help="of the scorer; default: its own")
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    if not (args.shared / "eval" / "cmmlu").is_dir():
        parser.error(f"{args.shared}/eval/cmmlu: no such folder; pass --shared")
    measure(args)


def make_model(args, tokenizer):
    import torch
    from models import random_llama

    model = random_llama(
        tokenizer,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        max_position_embeddings=2048,
        initializer_range=0.04,
    )
    return model.to(getattr(torch, args.dtype)).eval()


def read_requests(args, tokenizer, subjects, max_questions=None):
    """{subject: requests}, prompts of preset default."""
    from utils.evaluation.multiple_choice.benchmarks import read_benchmark
    from utils.evaluation.multiple_choice.prompts import ChoiceEncoder, ChoiceWriter
    from utils.evaluation.multiple_choice.wordings import PRESETS
    from utils.generation.engine import Prompter

    benchmark = read_benchmark(
        "cmmlu",
        str(args.shared / "eval" / "cmmlu"),
        subjects=subjects,
        num_examples=args.num_fewshot,
        max_questions=max_questions,
    )
    wording = PRESETS["default"].wording("cmmlu", "zh", "constrained", False)
    encoder = ChoiceEncoder(ChoiceWriter(wording, "constrained", False), Prompter(tokenizer, None, 2048))
    found: dict[str, list] = {key: [] for key in benchmark.subjects}
    for question in benchmark.questions:
        subject = benchmark.subjects[question.subject]
        found[question.subject].append(encoder.encode(question, subject, benchmark.examples[question.subject]).request)
    return found


def forward_each(model, requests, **options):
    """Log-probabilities of the letters, a pass a question."""
    import torch

    found = []
    with torch.no_grad():
        for request in requests:
            logits = model(input_ids=torch.tensor([request.prompt]), **options).logits[:, -1]
            letters = [ids[0] for ids in request.continuations]
            found.append(torch.log_softmax(logits[0].float(), -1)[letters].tolist())
    return found


def measure(args) -> None:
    from utils.evaluation.multiple_choice.scoring import PrefixScorer, group_prompts
    from utils.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.shared / "tokenizers" / "chinese_llama2_55296")
    requests = read_requests(args, tokenizer, args.subjects, args.max_questions)
    every = [request.prompt for rows in read_requests(args, tokenizer, []).values() for request in rows]
    shared = sum(
        group.length + sum(len(every[number]) - group.length for number in group.numbers)
        for group in group_prompts(every)
    )
    model = make_model(args, tokenizer)
    scorer = PrefixScorer(model, args.batch_tokens)
    ways = {
        NAMES[0]: lambda rows: forward_each(model, rows),
        NAMES[1]: lambda rows: forward_each(model, rows, logits_to_keep=1),
        NAMES[2]: lambda rows: [list(score.logprobs) for score in scorer.score(rows)],
    }
    for way in ways.values():  # nobody pays for the first use
        way(requests[args.subjects[0]][:4])
    scorer.counts = dict.fromkeys(scorer.counts, 0)
    seconds, processor = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    answers: dict[str, list] = {name: [] for name in NAMES}
    for subject, rows in requests.items():
        for name, way in ways.items():
            start, used = time.perf_counter(), time.process_time()
            answers[name] += way(rows)
            seconds[name] += time.perf_counter() - start
            processor[name] += time.process_time() - used
            print(f"{subject}, {len(rows)} questions: {name}: {processor[name]:.1f} s so far", flush=True)
    report(args, model, scorer, (seconds, processor), answers, (sum(map(len, every)), shared))


def report(args, model, scorer, times, answers, whole) -> None:
    import torch

    seconds, processor = times
    count, prompts, computed = (scorer.counts[name] for name in ("requests", "prompt_tokens", "computed_tokens"))
    rates = {name: count / processor[name] for name in NAMES}
    chosen = {name: [row.index(max(row)) for row in answers[name]] for name in NAMES}
    others = [sum(a != b for a, b in zip(chosen[name], chosen[NAMES[0]], strict=True)) for name in NAMES]
    gap = (torch.tensor(answers[NAMES[2]]) - torch.tensor(answers[NAMES[0]])).abs().max().item()
    lines = [
        f"{model.num_parameters() / 1e6:.1f}M parameters ({args.layers} layers of width {args.hidden_size}, "
        f"{model.config.vocab_size:,} rows), {args.dtype}, {torch.get_num_threads()} threads; {count} questions of "
        f"{', '.join(args.subjects)} after {args.num_fewshot} examples, {prompts / count:.0f} tokens on average.",
        "",
        "| | tokens computed | seconds | processor seconds | questions a processor second | speed | other answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, differ in zip(NAMES, others, strict=True):
        tokens = computed if name == NAMES[2] else prompts
        lines.append(
            f"| {name} | {tokens:,} | {seconds[name]:.1f} | {processor[name]:.1f} | {rates[name]:.2f} | "
            f"{rates[name] / rates[NAMES[0]]:.2f} x | {differ} |"
        )
    speed = rates[NAMES[2]] / rates[NAMES[0]]
    met = "met" if speed >= AIM and not any(others) else "missed"
    lines += [
        "",
        f"The scorer computes {computed:,} of {prompts:,} prompt tokens ({prompts / computed:.2f} x fewer, padding "
        f"counted), and is {rates[NAMES[2]] / rates[NAMES[1]]:.2f} x as fast as the forward with the last logits. "
        f"Largest difference of a log-probability from the plain forward's: {gap:.1e}. The whole of CMMLU: "
        f"{whole[0]:,} tokens in prompts, {whole[1]:,} to be computed ({whole[0] / whole[1]:.2f} x fewer).",
        "",
        f"Aim: {AIM:g} x the plain forward with the same answers: {met}.",
    ]
    print("\n".join(lines))
    if not args.no_record:
        from record import describe_run, record

        record("Multiple choice with shared examples", "\n".join([describe_run("torch", "transformers"), "", *lines]))


if __name__ == "__main__":
    main()
