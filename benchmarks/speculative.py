"""Speculative decoding against plain decoding, and against transformers' assisted generation, with one pair of models.

  python benchmarks/speculative.py --shared ../shared/data
Trains a Llama of two layers on Chinese text, on a CPU, then grows it to many layers (new ones change nothing at first)
and trains that. What drafts is the model of two layers, which meanwhile learns the large one's probabilities, and the
large one's own first two layers, which learn to do without the rest. Then all write greedy answers to the same
beginnings of texts that they have not seen, one after another, in float32; each repetition is a fresh process. Answers
must be identical to those of plain decoding.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

AIM = 1.4
PLAIN, DRAFT_ALONE = "plain decoding", "the draft model alone"
OURS = {"draft model": "draft_model", "first layers": "draft_layers", "prompt lookup": "prompt_lookup"}
GENERATE, ASSISTED = "transformers generate", "transformers generate, assisted"
ROWS = [PLAIN, *OURS, GENERATE, ASSISTED, DRAFT_ALONE]
PROMPT_TOKENS = 24


# ---------------------------------------------------------------- the pair


def read_texts(args) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts), a line each."""
    files = sorted((args.shared / "pt").glob("zh_[ad]*.txt"))
    if args.quick:
        files = [ROOT / "examples" / "data" / "pretrain" / "zh_heldout.txt"]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if len(line) > 40]
    held_out = lines[:: max(2, len(lines) // (3 * args.prompts))]
    return sorted(set(lines) - set(held_out)), held_out


def make_tokenizer(args, texts: list[str], folder: Path):
    import train_tokenizer as script

    from utils.text.tokenizer import load_tokenizer

    path = folder / "texts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    script.main(
        script.TokenizerArguments(
            input=[str(path)],
            output_dir=str(folder / "tokenizer"),
            vocab_size=args.vocabulary,
            character_coverage=0.98,
        )
    )
    return load_tokenizer(folder / "tokenizer")


def build(args, tokenizer, layers: int):
    from models import random_llama

    return random_llama(
        tokenizer,
        seed=None,
        hidden_size=args.hidden_size,
        num_hidden_layers=layers,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def token_rows(args, tokenizer, texts: list[str]):
    """Rows (N, window) of the texts, each with BOS before it and EOS after it."""
    import torch

    from utils.text.tokenizer import encode_texts

    joined = []
    for ids in encode_texts(tokenizer, texts):
        joined += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    whole = len(joined) // args.window * args.window
    return torch.tensor(joined[:whole]).view(-1, args.window)


def grow(args, small, tokenizer):
    """A deep model that says what the small one says: its new layers add nothing yet.

    Source: Wu et al. 2024, "LLaMA Pro: Progressive LLaMA with Block Expansion", section 3.2.
    """
    import torch

    large = build(args, tokenizer, args.layers)
    large.load_state_dict(small.state_dict(), strict=False)
    with torch.no_grad():
        for layer in large.model.layers[args.draft_layers :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return large


def own_loss(model, batch):
    """Cross-entropy of the next tokens, and what the model says: a scalar, (B, T, V), the states of its layers."""
    from torch.nn import functional

    output = model(input_ids=batch, output_hidden_states=True, use_cache=False)
    loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    return loss, output.logits, output.hidden_states


def joint_losses(args, target, draft, batch):
    """The large model's own loss, and how far its first layers and the draft model are from it: three scalars."""
    from torch.nn import functional

    own, logits, states = own_loss(target, batch)
    wanted = logits.detach().float().softmax(-1).flatten(0, 1)
    early = target.lm_head(target.model.norm(states[args.draft_layers]))
    drafted = draft(input_ids=batch, use_cache=False).logits
    return own, *(functional.cross_entropy(found.float().flatten(0, 1), wanted) for found in (early, drafted))


def train(args, parameters, losses, rows, steps: int, learning_rate: float) -> None:
    """Train in place what has these parameters. `losses`: of a batch, scalars that are added."""
    import torch

    from utils.models.loading import bf16_is_supported

    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    )
    order, started = torch.empty(0, dtype=torch.int64), time.perf_counter()
    for step in range(steps):
        if len(order) < args.rows:
            order = torch.randperm(len(rows), generator=generator)
        batch, order = rows[order[: args.rows]], order[args.rows :]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16_is_supported()):
            parts = losses(batch)
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            figures = ", ".join(f"{part.item():.2f}" for part in parts)
            print(f"step {step + 1}: losses {figures}; {time.perf_counter() - started:.0f} s", flush=True)


def make_pair(args, folder: Path) -> dict:
    """Train, and save models, tokenizer and prompts in `folder`; returns what they are."""
    import torch

    from utils.text.tokenizer import encode_raw, save_tokenizer

    texts, held_out = read_texts(args)
    tokenizer = make_tokenizer(args, texts, folder)
    torch.manual_seed(args.seed)
    rows, unseen = token_rows(args, tokenizer, texts), token_rows(args, tokenizer, held_out)[:32]
    draft = build(args, tokenizer, args.draft_layers)
    parameters = list(draft.parameters())
    train(args, parameters, lambda batch: own_loss(draft, batch)[:1], rows, args.small_steps, 3e-3)
    target = grow(args, draft, tokenizer)
    parameters += target.parameters()
    train(args, parameters, partial(joint_losses, args, target, draft), rows, args.steps, 1e-3)
    with torch.no_grad():
        perplexities = [math.exp(own_loss(model, unseen)[0].item()) for model in (target, draft)]
    for model, name in ((target, "target"), (draft, "draft")):
        model.save_pretrained(folder / name)
        save_tokenizer(tokenizer, folder / name)
    prompts = [encode_raw(text, tokenizer)[:PROMPT_TOKENS] for text in held_out[: args.prompts]]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    pair = {
        "target": target.num_parameters(),
        "draft": draft.num_parameters(),
        "vocabulary": len(tokenizer),
        "perplexities": perplexities,
        "tokens": [steps * args.rows * args.window for steps in (args.small_steps, args.steps)],
    }
    (folder / "pair.json").write_text(json.dumps(pair))
    return pair


# ---------------------------------------------------------------- one row of the table, in a process of its own


def measure(args, row: str) -> dict:
    """Tokens a second of the answers to all prompts, one after another; the answers; what came of the drafts."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    from utils.text.tokenizer import load_tokenizer

    logging.set_verbosity_error()
    folder = args.output_dir
    target, draft = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval() for name in ("target", "draft")
    )
    prompts = json.loads((folder / "prompts.json").read_text())
    tokenizer = load_tokenizer(folder / "target")
    if row in (GENERATE, ASSISTED):
        target.generation_config = draft.generation_config = GenerationConfig()  # no token ends a text
        config = GenerationConfig(
            max_new_tokens=args.tokens, do_sample=False, repetition_penalty=args.repetition_penalty,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        assistant = {"assistant_model": draft} if row == ASSISTED else {}

        def answer(prompt: list[int]) -> list[int]:
            ids = torch.tensor([prompt])
            output = target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **assistant)
            return output[0, len(prompt) :].tolist()

        return timed(answer, prompts)
    engine = make_engine(args, row, target, draft, tokenizer)
    engine.stop_ids = []  # texts of equal length, one after another where one ends
    result = timed(partial(ask, engine, args), prompts)
    result["statistics"] = engine.statistics()
    engine.close()
    return result


def make_engine(args, row: str, target, draft, tokenizer):
    """This project's engine, as inference_hf.py runs it."""
    from utils.generation.drafts import EarlyExitDraft, ModelDraft, PromptLookup
    from utils.generation.speculation import Speculation
    from utils.generation.transformers_engine import TransformersEngine

    if row == DRAFT_ALONE:
        return TransformersEngine(draft, tokenizer, None, max_batch_size=1)
    kinds = {
        "draft model": partial(ModelDraft, draft),
        "first layers": partial(EarlyExitDraft, args.draft_layers),
        "prompt lookup": PromptLookup,
    }
    speculation = Speculation(kinds[row], args.draft_k) if row in kinds else None
    return TransformersEngine(target, tokenizer, None, max_batch_size=1, speculation=speculation)


def ask(engine, args, prompt: list[int]) -> list[int]:
    from utils.core.arguments import GenerationArguments
    from utils.generation.engine import Request

    settings = GenerationArguments(
        max_new_tokens=args.tokens, temperature=0.0, repetition_penalty=args.repetition_penalty
    )
    return engine.submit(Request(prompt, settings)).wait().token_ids


def timed(answer, prompts: list[list[int]]) -> dict:
    answer(prompts[-1])  # a warm-up
    start = time.perf_counter()
    answers = [answer(prompt) for prompt in prompts]
    seconds = time.perf_counter() - start
    return {"rate": sum(map(len, answers)) / seconds, "answers": answers}


# ---------------------------------------------------------------- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="folder with pt/")
    parser.add_argument("--vocabulary", type=int, default=3000)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--draft_layers", type=int, default=2)
    parser.add_argument("--small_steps", type=int, default=1200, help="of the small model alone")
    parser.add_argument("--steps", type=int, default=200, help="of both")
    parser.add_argument("--rows", type=int, default=4, help="windows a step")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each answer")
    parser.add_argument("--repetition_penalty", type=float, default=1.1, help="the toolkit's own is 1.1")
    parser.add_argument("--draft_k", type=int, default=0, help="as of inference_hf.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, help="keep the pair here, and use it if it is there")
    parser.add_argument("--quick", action="store_true", help="a look: no shared text, models that learn nothing")
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)  # a fresh process of this script
    args = parser.parse_args()
    if args.quick:
        args.vocabulary, args.hidden_size, args.layers, args.draft_layers = 1200, 64, 4, 1
        args.small_steps, args.steps, args.rows, args.window = 6, 4, 4, 64
        args.prompts, args.tokens, args.repeats = 2, 24, 1
    elif not (args.shared / "pt").is_dir():
        parser.error(f"{args.shared}/pt: no such folder; pass --shared")
    if args.row:
        print(json.dumps(measure(args, args.row)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.output_dir = args.output_dir or Path(temporary)
        run_all(args)


def run_all(args) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    known = args.output_dir / "pair.json"
    pair = json.loads(known.read_text()) if known.is_file() else make_pair(args, args.output_dir)
    results: dict[str, list[dict]] = {row: [] for row in ROWS}
    flags = [*sys.argv[1:], "--output_dir", str(args.output_dir)]
    for _ in range(args.repeats):
        for row in ROWS:
            if args.quick:
                results[row].append(measure(args, row))
                continue
            command = [sys.executable, __file__, *flags, "--row", row]
            finished = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
            results[row].append(json.loads(finished.stdout.splitlines()[-1]))
            print(f"{row}: {results[row][-1]['rate']:.1f} tokens/s", flush=True)
    report(args, pair, results)


def report(args, pair: dict, results: dict[str, list[dict]]) -> None:
    import torch

    rates = {row: statistics.median(result["rate"] for result in found) for row, found in results.items()}
    answers = {row: found[0]["answers"] for row, found in results.items()}
    lines = [
        f"A Llama of {pair['target'] / 1e6:.1f}M parameters ({args.layers} layers of width {args.hidden_size}) and a "
        f"draft model of {pair['draft'] / 1e6:.1f}M ({args.draft_layers} layers), {pair['vocabulary']:,} pieces; "
        f"trained alone on {pair['tokens'][0] / 1e6:.2f}M tokens, together on {pair['tokens'][1] / 1e6:.2f}M; "
        f"perplexity of unseen text {pair['perplexities'][0]:.1f} and {pair['perplexities'][1]:.1f}. "
        f"A draft model's token takes {rates[PLAIN] / rates[DRAFT_ALONE]:.2f} of the time of the other's.",
        "",
        f"{args.prompts} answers of {args.tokens} tokens, one after another; greedy, repetition penalty "
        f"{args.repetition_penalty:g}, float32, {torch.get_num_threads()} threads; median of {args.repeats} by turns.",
        "",
        "| | tokens/s | x plain | accepted | tokens a pass | answers |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS[:-1]:
        cells = [row, f"{rates[row]:.1f}", f"{rates[row] / rates[PLAIN]:.2f}", *drafting(results[row][0])]
        cells.append("identical" if answers[row] == answers[PLAIN] else "**others**")
        lines.append(f"| {' | '.join(cells)} |")
    best = max(rates[row] / rates[PLAIN] for row in ("draft model", "first layers"))
    same = all(answers[row] == answers[PLAIN] for row in OURS)
    verdict = "met" if best >= AIM and same else "missed"
    lines += ["", f"Aim: at least {AIM}x with a draft of either kind, answers identical: {verdict} ({best:.2f}x)."]
    print("\n".join(lines))
    if not same:
        raise SystemExit("speculative decoding changed an answer")
    if not args.no_record:
        from record import describe_run, record

        record("Speculative decoding", "\n".join([describe_run("torch", "transformers"), "", *lines]))


def drafting(result: dict) -> list[str]:
    """Share of drafted tokens that were accepted, tokens a pass of the model."""
    counts = result.get("statistics", {})
    if not counts.get("drafted"):
        return ["", ""]
    return [f"{counts['accepted'] / counts['drafted']:.0%}", f"{counts['new_tokens'] / counts['passes']:.2f}"]


if __name__ == "__main__":
    main()
