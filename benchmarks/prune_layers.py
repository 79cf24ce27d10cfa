"""A smaller model by layer cut: how well it predicts and drafts for the model it came from, by training.

  make demo && python benchmarks/prune_layers.py --demo output/demo
The model is the demo's after continued pre-training. Each cut keeps some of its layers (prune_layers.py) and is
trained on in full on the demo's text (pt.py); beside it a model of as many layers is trained alike from scratch. Then
all score the held-out texts (eval_perplexity.py), and each drafts greedy continuations for the whole model (float32):
how many drafted tokens it accepts. Continuations must be those without drafts.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "data" / "pretrain"
sys.path.insert(0, str(ROOT / "scripts"))

PROMPT_TOKENS = 24
TEXTS = {"zh": DATA / "zh_heldout.txt", "en": DATA / "en_heldout.txt"}


def train(args, source: list[str], out: Path) -> Path:
    """pt.py in full on the demo's text; `source` says what model."""
    import pt

    from utils.core.arguments import DataArguments, ExtendArguments, LoraArguments, ModelArguments
    from utils.core.command_line import parse_args
    from utils.training.arguments import RunArguments

    argv = [*source, "--full_finetuning", "--output_dir", out, "--train_data", DATA / "zh_train.txt"]
    argv += ["--replay_data", DATA / "en_train.txt", "--replay_share", 0.3, "--block_size", 256]
    argv += ["--per_device_train_batch_size", 16, "--learning_rate", args.learning_rate, "--max_steps", args.steps]
    argv += ["--lr_scheduler_type", "cosine", "--warmup_steps", 0.05, "--weight_decay", 0.01, "--seed", args.seed]
    argv += ["--logging_steps", 50, "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True"]
    types = (ModelArguments, ExtendArguments, LoraArguments, DataArguments, pt.PretrainingArguments, RunArguments)
    pt.main(*parse_args(*types, argv=list(map(str, argv))))
    return out


def make_models(args, folder: Path) -> dict[str, Path]:
    """{row of the table: model folder}, the whole model first."""
    import prune_layers

    whole = args.demo / "pretrained"
    models = {"the whole model": whole}
    layers = set()
    for keep in args.keep:
        out = folder / keep.replace(":", "-")
        report = prune_layers.main(prune_layers.PruneArguments(str(whole), str(out), keep))
        models[f"--keep {keep}"] = out
        source = ["--model_name_or_path", str(out)]
        models[f"--keep {keep}, trained"] = train(args, source, out.with_name(f"{out.name}-trained"))
        layers.add(report["num_layers"][1])
    for count in sorted(layers):
        source = ["--config_name", str(whole), "--config_overrides", f"num_hidden_layers={count}"]
        source += ["--tokenizer_name_or_path", str(whole)]
        models[f"{count} layer{'s' * (count > 1)} from scratch, trained"] = train(
            args, source, folder / f"scratch-{count}"
        )
    return models


def score(models: dict[str, Path], folder: Path) -> dict[tuple[str, str], float]:
    """{(row, text): bits a byte}."""
    import eval_perplexity

    from utils.core.arguments import InferenceArguments

    (row, whole), *others = models.items()
    names = {str(path): name for name, path in others}
    result = eval_perplexity.main(
        InferenceArguments(model_name_or_path=str(whole), dtype="float32", only_cpu=True),
        eval_perplexity.EvalArguments(
            texts=[f"{name}={path}" for name, path in TEXTS.items()],
            other_models=[f"{path.name}={path}" for _, path in others],
            output_dir=str(folder / "perplexity"),
            overwrite=True,
        ),
    )
    by_name = {Path(path).name: name for path, name in names.items()}
    return {(by_name.get(found["model"], row), found["text"]): found["bits_per_byte"] for found in result["rows"]}


def draft(args, models: dict[str, Path]) -> dict[str, list[str]]:
    """{row: [share of drafted tokens that were accepted, tokens a pass]}. Exits if a draft changed an answer."""
    import torch
    from transformers import AutoModelForCausalLM

    from utils.core.arguments import GenerationArguments
    from utils.generation.drafts import ModelDraft
    from utils.generation.engine import Request
    from utils.generation.speculation import Speculation
    from utils.generation.transformers_engine import TransformersEngine
    from utils.text.tokenizer import encode_raw, load_tokenizer

    (_, whole), *others = models.items()
    tokenizer = load_tokenizer(whole)
    lines = [line for path in TEXTS.values() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [encode_raw(line, tokenizer)[:PROMPT_TOKENS] for line in lines]
    prompts = [ids for ids in prompts if len(ids) == PROMPT_TOKENS]
    prompts = prompts[:: max(1, len(prompts) // args.prompts)][: args.prompts]
    settings = GenerationArguments(max_new_tokens=args.tokens, temperature=0.0, repetition_penalty=1.0)

    def answer(speculation) -> tuple[list[list[int]], dict]:
        model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
        engine = TransformersEngine(model, tokenizer, None, max_batch_size=1, speculation=speculation)
        engine.stop_ids = []  # continuations of equal length
        answers = [engine.submit(Request(ids, settings)).wait().token_ids for ids in prompts]
        statistics = engine.statistics()
        engine.close()
        return answers, statistics

    plain, _ = answer(None)
    found = {}
    for row, path in others:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        answers, counts = answer(Speculation(partial(ModelDraft, model), args.draft_k))
        if answers != plain:
            raise SystemExit(f"{row}: drafts changed an answer")
        share, rate = counts["accepted"] / counts["drafted"], counts["new_tokens"] / counts["passes"]
        found[row] = [f"{share:.0%}", f"{rate:.2f}"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "output" / "demo", help="folder of a finished make demo")
    parser.add_argument("--keep", nargs="+", default=["first:1", "first:2", "even:2"], help="as of prune_layers.py")
    parser.add_argument("--steps", type=int, default=150, help="of training, 16 rows of 256 tokens each")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each continuation")
    parser.add_argument("--draft_k", type=int, default=4, help="tokens drafted at once")
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    if not (args.demo / "pretrained" / "config.json").is_file():
        parser.error(f"{args.demo}/pretrained: no model; run make demo, or pass --demo")
    with tempfile.TemporaryDirectory() as temporary:
        models = make_models(args, Path(temporary))
        report(args, models, score(models, Path(temporary)), draft(args, models))


def report(args, models: dict[str, Path], bits: dict[tuple[str, str], float], drafts: dict[str, list[str]]) -> None:
    config = json.loads((args.demo / "pretrained" / "config.json").read_text())
    lines = [
        f"The demo's model after continued pre-training ({config['num_hidden_layers']} layers of width "
        f"{config['hidden_size']}), cut, and trained in full for {args.steps} steps of 4,096 tokens. Bits a byte of "
        f"held-out text; drafts: {args.prompts} greedy continuations of {args.tokens} tokens by the whole model, "
        f"{args.draft_k} drafted at once, identical to those without drafts.",
        "",
        f"| model | {' | '.join(f'{name}, bits/byte' for name in TEXTS)} | accepted | tokens a pass |",
        "|---|" + "---|" * (len(TEXTS) + 2),
    ]
    for row in models:
        cells = [row, *(f"{bits[row, name]:.3f}" for name in TEXTS), *drafts.get(row, ["", ""])]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    if not args.no_record:
        from record import describe_run, record

        record("Layer cut", "\n".join([describe_run("torch", "transformers"), "", *lines]))


if __name__ == "__main__":
    main()
