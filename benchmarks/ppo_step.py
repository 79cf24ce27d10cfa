"""PPO against its parts done plainly: sampling, the update, and memory, side by side.

  python benchmarks/ppo_step.py
Speed, on a model of the demo's shape: the tokens/s of rollouts against transformers' own batched sampling of the same
prompts, and an update against tuning steps with a value head on the same tokens; sides alternate, medians are
reported. Memory, on a model of 110 million weights, each side in its own process: the peak of tuning steps, of PPO
iterations with one shared backbone, and of PPO with four models, over what a process holds before any model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

DEMO = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
LARGER = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
MEMORY_SIDES = {"sft": "tuning", "shared": "PPO, one backbone", "four": "PPO, four models"}


def make_assistant(folder: Path, shape: dict[str, int], vocabulary: int) -> Path:
    """A model with random weights, a sentencepiece tokenizer trained on the examples, and a chat template."""
    import sentencepiece
    from models import random_llama

    from utils.text.prompts import resolve_template
    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    texts = [
        line
        for name in ("zh_train.txt", "en_train.txt")
        for line in (ROOT / "examples/data/pretrain" / name).read_text(encoding="utf-8").splitlines()[:3000]
    ]
    folder.mkdir(parents=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=3000, model_type="bpe", byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = resolve_template("llama-2", tokenizer)
    random_llama(vocabulary, max_position_embeddings=1024, **shape).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def make_trainer(folder: Path, output: Path, args: argparse.Namespace, layout: str = "shared") -> Any:
    """The PPOTrainer that ppo.py makes, ready to sample and to update."""
    import ppo

    from utils.core.arguments import DataArguments, LoraArguments, ModelArguments
    from utils.core.command_line import parse_args
    from utils.data.sources import Sources
    from utils.rlhf.objectives import FixedKL
    from utils.rlhf.ppo_trainer import PPOTrainer
    from utils.rlhf.rewards import Rewards
    from utils.text.tokenizer import load_tokenizer
    from utils.training.arguments import RunArguments

    argv = ["--model_name_or_path", str(folder), "--output_dir", str(output), "--report_to", "none"]
    argv += ["--train_data", str(ROOT / "examples/data/rlhf/prompts.jsonl"), "--reward_function", "unused.py:unused"]
    argv += ["--lora_rank", "16", "--lora_alpha", "32", "--lora_dropout", "0", "--target_modules", "all"]
    argv += ["--per_device_train_batch_size", str(args.batch), "--rollout_batch_size", str(args.answers)]
    argv += ["--per_device_rollout_batch_size", str(args.rollout_batch), "--max_new_tokens", str(args.tokens)]
    argv += ["--max_prompt_length", "128", "--ppo_epochs", "1", "--precision", "fp32", "--save_strategy", "no"]
    argv += ["--max_steps", "1", "--learning_rate", "1e-5"]
    if layout == "four":
        argv += ["--critic", "model", "--critic_model", str(folder), "--reference_model", str(folder)]
    types = (ModelArguments, LoraArguments, DataArguments, ppo.RolloutArguments, ppo.RewardArguments, ppo.PPOArguments)
    parsed = parse_args(*types, RunArguments, argv=argv)
    model_args, lora_args, data_args, rollout_args, _, ppo_args, training_args = parsed
    tokenizer = load_tokenizer(folder)
    data_args.data_cache_dir = str(output / "cache")
    sources = Sources(data_args, training_args)
    prompts, _ = ppo.load_prompt_sets(sources, rollout_args, tokenizer, tokenizer.chat_template)
    policy = ppo.build_policy(model_args, lora_args, ppo_args, tokenizer, training_args)
    reference = ppo.build_reference(str(folder), model_args, training_args) if layout == "four" else None
    trainer = PPOTrainer(
        policy,
        training_args,
        prompts,
        {},
        tokenizer,
        tokenizer.chat_template,
        Rewards(make_scorer(policy, reference, layout, folder)),
        rollout_args,
        ppo_args,
        FixedKL(0.05),
        reference,
    )
    trainer.generator.stop_ids = []  # every answer has all its tokens, so that both sides do the same work
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    return trainer


def make_scorer(policy: Any, reference: Any, layout: str, folder: Path) -> Any:
    """A reward model with a random head: hidden states of the policy's backbone, or of a model of its own."""
    import torch

    from utils.models.loading import load_model
    from utils.rlhf.actor_critic import hidden_states, use_adapter
    from utils.rlhf.rollouts import collate

    own = None
    if layout == "four":
        from utils.core.arguments import ModelArguments

        own = load_model(ModelArguments(model_name_or_path=str(folder)), torch.float32).eval()

    class Scorer:
        @torch.no_grad()
        def score(self, sequences: Any, batch_size: int = 16) -> Any:
            scores = []
            for start in range(0, len(sequences), batch_size):
                batch, places = collate(sequences[start : start + batch_size], 0)
                with use_adapter(policy, None):
                    hidden = hidden_states(own or policy, batch["input_ids"], batch["position_ids"])
                scores.append(hidden[torch.arange(len(places)), places.amax(1) + 1].mean(1))
            return torch.cat(scores)

    return Scorer()


# ---------------------------------------------------------------- speed


def sample_plainly(trainer: Any, prompts: list[list[int]], tokens: int) -> None:
    """transformers' own batched sampling."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        output = trainer.generator.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
    assert output.shape[1] == width + tokens


def tune_with_value_head(trainer: Any, experience: Any, batch_size: int) -> None:
    """The same tokens, learned as in tuning: mean loss of the answers' tokens, and squared errors of the values."""
    from utils.models.lm_loss import loss_targets
    from utils.models.loading import causal_model
    from utils.rlhf.actor_critic import hidden_states
    from utils.rlhf.rollouts import make_batch, minibatches

    model = trainer.model_wrapped
    model.train()
    for micro_batches in minibatches(experience, batch_size, batch_size, (0,), 0, 1):
        for numbers in micro_batches:
            batch = make_batch(experience, numbers, 0)
            mask = batch["targets"] >= 0
            causal = causal_model(model)
            hidden = hidden_states(model, batch["input_ids"], batch["position_ids"])
            with loss_targets(causal, batch["targets"]):
                loss = causal.get_output_embeddings()(hidden) / mask.sum()
            errors = (model.critic(hidden) - batch["returns"]).square()
            (loss + 0.1 * (errors * mask).sum() / mask.sum()).backward()
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        model.zero_grad()


def measure_speed(args: argparse.Namespace, folder: Path) -> list[str]:
    trainer = make_trainer(make_assistant(folder / "demo", DEMO, 3000), folder / "out", args)
    model = trainer.model_wrapped
    prompts = trainer.prompts[: args.answers]
    seconds: dict[str, list[float]] = {"plain sampling": [], "rollouts": [], "tuning": [], "update": [], "phase": []}

    def timed(name: str, work: Any) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name].append(time.perf_counter() - start)
        return result

    batches = [prompts[start : start + args.rollout_batch] for start in range(0, len(prompts), args.rollout_batch)]
    settings = trainer.generation
    for repeat in range(args.repeats + 1):
        model.eval()
        timed("plain sampling", lambda: [sample_plainly(trainer, batch, args.tokens) for batch in batches])
        timed("rollouts", lambda: [trainer.generator.generate(b, settings, range(len(b))) for b in batches])
        rollouts = timed("phase", lambda: trainer.sample(model, prompts, repeat))  # noqa: B023
        experience = trainer.build(rollouts)
        timed("tuning", lambda: tune_with_value_head(trainer, experience, args.batch))  # noqa: B023
        timed("update", lambda: trainer.update(model, experience))  # noqa: B023
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    sampled = args.answers * args.tokens
    learned = sum(len(rollout.prompt) + len(rollout.answer) for rollout in rollouts)
    rate = {name: (learned if name in ("tuning", "update") else sampled) / median[name] for name in median}
    return [
        f"Model of the demo's shape, LoRA on every layer, {args.answers} answers of {args.tokens} tokens, "
        f"{args.rollout_batch} sampled at once, micro-batches of {args.batch}, float32; medians of {args.repeats}.",
        "",
        "| side | tokens/s | against the plain way |",
        "|---|---|---|",
        f"| transformers' batched sampling | {rate['plain sampling']:,.0f} | |",
        f"| rollouts | {rate['rollouts']:,.0f} | {rate['rollouts'] / rate['plain sampling']:.2f} x its tokens/s |",
        f"| rollouts, with log-probabilities, reference, values and rewards | {rate['phase']:,.0f} | "
        f"{rate['phase'] / rate['plain sampling']:.2f} x its tokens/s |",
        f"| tuning with a value head | {rate['tuning']:,.0f} | |",
        f"| update | {rate['update']:,.0f} | {rate['tuning'] / rate['update']:.2f} x its cost |",
    ]


# ---------------------------------------------------------------- memory


def measure_memory_side(side: str, args: argparse.Namespace, folder: Path) -> float:
    """Peak resident memory in 1e9 bytes over what the process held before the model."""
    import gc

    import psutil
    import transformers  # noqa: F401 (its memory is not the model's)

    import utils.rlhf.ppo_trainer  # noqa: F401

    gc.collect()
    process = psutil.Process()
    before, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    trainer = make_trainer(folder / "larger", folder / side, args, side)
    for step in range(args.memory_steps):
        if side == "sft":
            tune_with_value_head(trainer, fixed_experience(trainer, args), args.batch)
        else:
            rollouts = trainer.sample(trainer.model_wrapped, trainer.prompts[: args.answers], step)
            trainer.update(trainer.model_wrapped, trainer.build(rollouts))
    done.set()
    watcher.join()
    return (peak - before) / 1e9


def fixed_experience(trainer: Any, args: argparse.Namespace) -> Any:
    """Answers of the same lengths as rollouts, without sampling them."""
    import torch

    from utils.rlhf.rollouts import Rollout

    zeros = torch.zeros(args.tokens)
    rollouts = [
        Rollout(prompt, [5 + number % 100] * args.tokens, "", False, number, zeros, zeros, zeros, zeros)
        for number, prompt in enumerate(trainer.prompts[: args.answers])
    ]
    return trainer.build(rollouts)


def measure_memory(args: argparse.Namespace, folder: Path) -> list[str]:
    make_assistant(folder / "larger", LARGER, 32000)
    peaks = {}
    for side in MEMORY_SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", str(folder)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[side] = json.loads(output.splitlines()[-1])
        print(side, peaks[side], flush=True)
    lines = [
        f"Model of 110M weights and 32,000 tokens, LoRA on every layer, float32, {args.memory_steps} iterations of "
        f"{args.answers} answers of {args.tokens} tokens, micro-batches of {args.batch}.",
        "",
        "| side | peak memory (GB) | against tuning |",
        "|---|---|---|",
    ]
    return lines + [f"| {MEMORY_SIDES[s]} | {peak:.2f} | {peak / peaks['sft']:.2f} x |" for s, peak in peaks.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"answers": 64, "tokens": 48, "rollout_batch": 64, "batch": 16, "repeats": 5, "memory_steps": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=list(MEMORY_SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure_memory_side(args.side, args, args.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = measure_speed(args, Path(folder))
        print("\n".join(lines), flush=True)
        lines += ["", *measure_memory(args, Path(folder))]
    print("\n".join(lines))
    if not args.no_record:
        from record import describe_run, record

        record("PPO: sampling, update, memory", "\n".join([describe_run("torch", "transformers", "peft"), "", *lines]))


if __name__ == "__main__":
    main()
