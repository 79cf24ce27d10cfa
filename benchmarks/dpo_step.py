"""One DPO training step, policy and reference: dpo.py's Trainer against the plain way, on the same pairs.

  python benchmarks/dpo_step.py --data ../shared/data/preference/dpo_zh_demo.json \
      --tokenizer ../shared/data/tokenizers/chinese_llama2_55296
The plain way: chosen answers in one padded batch, rejected ones in another, each through the policy with gradient and
through the reference (the adapter switched off) without, log_softmax in float32 of the logits of all positions. Both
ways train the same LoRA model on the same pairs, by turns; dpo.py in its own batches of about equal length, the plain
way in random ones, and for comparison in dpo.py's. Without --data the lengths are made up.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

BETA = 0.1


class MadePairs:
    """Random tokens of given lengths, in the place of a PairCache."""

    def __init__(self, lengths, vocabulary: int) -> None:
        self.lengths, self.vocabulary = lengths, vocabulary

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int):
        import numpy as np

        from utils.data.preferences import Pair

        rng = np.random.default_rng(number)
        ids = (rng.integers(3, self.vocabulary, size=count) for count in self.lengths[number])
        return Pair(*ids, (False, False), None, "made")


def pair_lengths(args):
    """(n, 3) tokens of prompts, chosen and rejected answers."""
    import numpy as np

    if args.data:
        from utils.data.cache import CacheSettings
        from utils.data.preferences import load_preferences
        from utils.text.prompts import CHAT_TEMPLATES
        from utils.text.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
        with tempfile.TemporaryDirectory() as cache:
            settings = CacheSettings(Path(cache))
            pairs = load_preferences([args.data], tokenizer, CHAT_TEMPLATES["alpaca-2"], args.max_seq_length, settings)
            return np.array(pairs.lengths, dtype=np.int64)
    # As the lengths of Chinese preference data spread: a short question or a long one, answers of some hundred tokens.
    rng = np.random.default_rng(0)
    prompt = np.exp(rng.normal(4.4, 1.0, 300)).clip(12, args.max_seq_length // 2)
    answers = np.exp(rng.normal(5.0, 0.9, (300, 2))).clip(3, args.max_seq_length - prompt[:, None])
    return np.column_stack([prompt, answers]).astype(np.int64)


def plain_logprobs(model, rows, starts):
    """Summed log-probabilities of the answers of padded rows, (P,)."""
    import torch

    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    scored = torch.zeros(len(rows), width - 1)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[number, : len(row)], mask[number, : len(row)] = torch.from_numpy(row), 1
        scored[number, start - 1 : len(row) - 1] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logprobs = torch.log_softmax(logits, -1).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    return (logprobs * scored).sum(1)


def plain_loss(model, pairs, autocast):
    """The mean DPO loss of some pairs by four padded forward passes."""
    import numpy as np
    import torch

    sums = []
    for side in ("chosen", "rejected"):
        rows = [np.concatenate([pair.prompt, getattr(pair, side)]) for pair in pairs]
        starts = [len(pair.prompt) for pair in pairs]
        with autocast():
            with torch.no_grad(), model.disable_adapter():
                reference = plain_logprobs(model, rows, starts)
            sums.append(plain_logprobs(model, rows, starts) - reference)
    return -torch.nn.functional.logsigmoid(BETA * (sums[0] - sums[1])).mean()


def build(args, lengths, folder):
    """(model, trainer, batches of rows of the trainer's data set)."""
    from models import random_llama

    from utils.core.arguments import LoraArguments
    from utils.data.batches import PairSet
    from utils.models.lm_loss import install_loss_head
    from utils.models.training_model import attach_adapter
    from utils.rlhf.dpo_trainer import DPOTrainer, Objective, PreferenceCollator
    from utils.training.arguments import RunArguments

    base = random_llama(args.vocabulary, hidden_size=256, intermediate_size=688, num_hidden_layers=8)
    install_loss_head(base)
    model = attach_adapter(base, LoraArguments(lora_rank=16, lora_dropout=0.0, target_modules="all"), 16)
    run = RunArguments(
        output_dir=str(folder),
        per_device_train_batch_size=args.pairs,
        precision=args.precision,
        report_to="none",
        disable_tqdm=True,
    )
    pairs = PairSet(MadePairs(lengths, args.vocabulary))
    trainer = DPOTrainer(model, run, pairs, {}, None, PreferenceCollator(0, "sdpa"), Objective("sigmoid", BETA))
    order = list(trainer._get_train_sampler())
    batches = [order[start : start + args.pairs] for start in range(0, len(order) - args.pairs, args.pairs)]
    return model, trainer, batches


def timed(step, batches, optimizer) -> tuple[float, float]:
    """Seconds a step on the wall and of the processor, which other load on the machine does not change."""
    start, processor = time.perf_counter(), time.process_time()
    for batch in batches:
        step(batch)
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / len(batches), (time.process_time() - processor) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="preference pairs, of which the lengths are taken")
    parser.add_argument("--tokenizer", help="tokenizer folder, with --data")
    parser.add_argument("--max_seq_length", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--steps", type=int, default=4, help="steps a measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--profile", action="store_true", help="show where this Trainer's time goes, and stop")
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    if args.data and not args.tokenizer:
        parser.error("--data needs --tokenizer")
    import torch

    lengths = pair_lengths(args)
    with tempfile.TemporaryDirectory() as folder:
        model, trainer, batches = build(args, lengths, folder)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        batches = batches[:: max(1, len(batches) // args.steps)][: args.steps]
        autocast = trainer.compute_loss_context_manager
        chance = torch.Generator().manual_seed(0)
        everything = [index for batch in batches for index in batch]
        shuffled = [everything[place] for place in torch.randperm(len(everything), generator=chance)]
        shuffled = [shuffled[start : start + args.pairs] for start in range(0, len(shuffled), args.pairs)]

        def plain(batch) -> None:
            model.train()
            plain_loss(model, [trainer.train_dataset[index].pair for index in batch], autocast).backward()

        def ours(batch) -> None:
            inputs = trainer.data_collator([trainer.train_dataset[index] for index in batch])
            trainer.training_step(model, inputs, torch.tensor(len(batch)))

        trainer.create_accelerator_and_postprocess()
        ways = {
            "plain, random batches": (plain, shuffled),
            "plain, dpo.py's batches": (plain, batches),
            "dpo.py": (ours, batches),
        }
        if args.profile:
            from torch.profiler import ProfilerActivity, profile

            for name, (way, its_batches) in ways.items():
                with profile(activities=[ProfilerActivity.CPU]) as record_of:
                    timed(way, its_batches, optimizer)
                print(name, record_of.key_averages().table(sort_by="self_cpu_time_total", row_limit=14))
            return
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for way, its_batches in ways.values():
            timed(way, its_batches[-1:], optimizer)  # warm-up
        for _ in range(args.repeats):
            for name, (way, its_batches) in ways.items():
                seconds[name].append(timed(way, its_batches, optimizer))
                wall, processor = seconds[name][-1]
                print(f"{name}: {wall:.2f} s a step, {processor:.2f} of the processor", flush=True)
    report(args, lengths, trainer, batches, seconds)


def report(args, lengths, trainer, batches, seconds) -> None:
    import torch

    rows = [lengths[index] for batch in batches for index in batch]
    prompt, chosen, rejected = (sum(int(row[column]) for row in rows) / len(rows) for column in range(3))
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    lines = [
        f"{total / 1e6:.1f}M parameters, {args.vocabulary:,} vocabulary rows, {trainer.args.precision}, "
        f"{torch.get_num_threads()} threads; {len(batches)} steps of {args.pairs} pairs, on average {prompt:.0f} "
        f"prompt, {chosen:.0f} chosen and {rejected:.0f} rejected tokens.",
        "",
        "| way | seconds a step (median) | processor seconds | all measurements |",
        "|---|---|---|---|",
    ]
    for name, values in seconds.items():
        wall, processor = (statistics.median(value[column] for value in values) for column in range(2))
        listed = ", ".join(f"{value[0]:.2f}" for value in values)
        lines.append(f"| {name} | {wall:.2f} | {processor:.2f} | {listed} |")
    lines.append("")
    for name in list(seconds)[:2]:
        pairs = list(zip(seconds["dpo.py"], seconds[name], strict=True))
        wall, processor = (statistics.median(ours[i] / theirs[i] for ours, theirs in pairs) for i in range(2))
        lines.append(f"- dpo.py / {name}: {wall:.2f} x the time, {processor:.2f} x the processor time")
    print("\n".join(lines))
    if not args.no_record:
        from record import describe_run, record

        record("A DPO step", "\n".join([describe_run("torch", "transformers", "peft"), "", *lines]))


if __name__ == "__main__":
    main()
