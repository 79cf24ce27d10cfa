"""Planned against measured memory of training runs: families x full, LoRA, 4 bits x lengths x stages, on a CPU.

  python benchmarks/memory_plan.py --shared ../shared/data        (26 runs of two steps, about a quarter of an hour)
  python benchmarks/memory_plan.py --published                    (plans beside figures that others published)
Each run is a process of its own: the training script with random weights of 60 to 120 million parameters in few
layers, so that the model and not the interpreter is what is measured. Planned and measured are what the run itself
says at its end: the plan is made before the model is loaded, measured is what the resident memory grew by since then.
Runs have MALLOC_MMAP_THRESHOLD_ of 64 KiB: glibc's own keeps freed blocks of up to 32 MiB, a tenth to a fifth more;
with 1 MiB a model of width 512, whose tensors are smaller, was 12 to 15 % above its plan, with 64 KiB 2 to 4 %.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
}
STEPS = 2  # at the second one the optimizer's states are there
SHAPE = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SHAPE, "intermediate_size": 2816, "num_hidden_layers": 4},
    "mistral": {"model_type": "mistral", **SHAPE, "intermediate_size": 3584, "num_hidden_layers": 3,
                "num_key_value_heads": 4, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **SHAPE, "intermediate_size": 4864, "num_hidden_layers": 3,
              "num_key_value_heads": 2, "vocab_size": 64000, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SHAPE, "intermediate_size": 3072, "num_hidden_layers": 4,
              "num_key_value_heads": 8, "head_dim": 128},
    "gemma3": {"model_type": "gemma3_text", **SHAPE, "intermediate_size": 4096, "num_hidden_layers": 4,
               "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 48000, "tie_word_embeddings": True},
    "deep": {"model_type": "llama", **SHAPE, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8,
             "intermediate_size": 1408, "num_hidden_layers": 16},
}  # fmt: skip
LORA = ["--lora_rank", "64", "--lora_dropout", "0.05", "--target_modules", "all"]
KINDS = {
    "full": ["--full_finetuning"],
    "LoRA": LORA,
    "LoRA + embeddings": [*LORA, "--modules_to_save", "embed_tokens,lm_head"],
    "4-bit": [*LORA, "--load_in_kbits", "4"],
    "4-bit + embeddings": [*LORA, "--load_in_kbits", "4", "--modules_to_save", "embed_tokens,lm_head"],
}


@dataclass(frozen=True)
class Case:
    """A run: rows x length tokens a micro-batch."""

    family: str
    stage: str
    kind: str
    rows: int
    length: int
    extra: str = ""

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.stage} {self.family} {self.kind} {self.rows}x{self.length} {self.extra}".strip()


CHECKPOINTING = "--gradient_checkpointing"
CASES = [
    Case("llama", "pt", "full", 1, 128),
    Case("llama", "pt", "LoRA", 1, 256),
    Case("llama", "pt", "LoRA", 1, 512),
    Case("llama", "pt", "4-bit", 1, 128),
    Case("llama", "sft", "4-bit + embeddings", 1, 128, CHECKPOINTING),
    Case("qwen2", "pt", "full", 1, 128),
    Case("qwen2", "sft", "LoRA", 1, 128),
    Case("qwen3", "dpo", "LoRA", 1, 128),
    Case("qwen3", "rm", "LoRA", 1, 128),
    Case("qwen3", "sft", "full", 1, 128),
    Case("gemma3", "pt", "LoRA", 1, 128),
    Case("gemma3", "sft", "full", 1, 128),
    Case("mistral", "pt", "full", 2, 64, "--gradient_accumulation_steps 2"),
    Case("mistral", "sft", "4-bit", 2, 128),
    Case("deep", "pt", "LoRA", 1, 512),
    Case("deep", "pt", "full", 1, 128),
    Case("llama", "pt", "LoRA + embeddings", 1, 128, f"{CHECKPOINTING} --gradient_accumulation_steps 2"),
    Case("llama", "pt", "full", 1, 128, CHECKPOINTING),
    Case("mistral", "sft", "LoRA", 1, 128),
    Case("qwen2", "pt", "4-bit", 1, 128, CHECKPOINTING),
    Case("qwen3", "pt", "LoRA", 2, 128),
    Case("gemma3", "pt", "4-bit", 1, 128),
    Case("qwen3", "dpo", "full", 1, 128),
    Case("llama", "rm", "full", 1, 128),
    Case("llama", "ppo", "LoRA", 2, 128),
    Case("llama", "pt", "LoRA", 2, 128, "--attn_implementation eager"),
]


# Qwen's README (2023), one A100-80, flash-attention 2, checkpointing, LoRA of rank 64 on all linear layers: GB at
# these lengths. Qwen-7B has the shape below; the 4-bit base is GPTQ's.
QWEN_7B = {"model_type": "qwen2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 151936}  # fmt: skip
QWEN_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
QWEN_GB = {
    "LoRA": (20.1, 20.4, 21.5, 23.8, 29.7, 36.6),
    "LoRA + embeddings": (33.7, 34.1, 35.2, 35.1, 39.2, 48.5),
    "4-bit": (11.5, 11.5, 12.3, 13.9, 16.9, 23.5),
}
# What a loss over all logits at once holds of each: bfloat16 and its shifted copy, float32 and its gradient.
BYTES_OF_A_LOGIT = 2 + 2 + 4 + 4
# They train embeddings in bfloat16: weight, gradient and two states take 8 bytes less each.
LESS_OF_AN_EMBEDDING = 8
LLAMA_3_8B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
MIXTRAL = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 57000,
           "num_local_experts": 8}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="plan what others measured, run nothing")
    parser.add_argument("--shared", type=Path, help="folder with tokenizers/, sft/ and preference/")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of CASES; all by default")
    parser.add_argument(
        "--results", type=Path, help="a file that keeps each case's line: an interrupted table goes on"
    )
    parser.add_argument("--no_record", action="store_true")
    args = parser.parse_args()
    if args.published:
        return compare_published()
    if args.shared is None:
        parser.error("pass --shared")
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(
            sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT}
        )  # malloc reads it at start
    sys.path.insert(0, str(ROOT / "scripts"))
    for name in ("utils.planning.request", "utils.rlhf.ppo_trainer", "utils.rlhf.reward_trainer", "bitsandbytes"):
        importlib.import_module(name)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for number in range(len(CASES)) if args.cases is None else args.cases:
            row = known(args.results, CASES[number].name)
            if row is None:
                row = measure(CASES[number], Path(work), args.shared.resolve())
                if args.results and "measured" in row:
                    with args.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(line(row), flush=True)
    within = [row for row in rows if "measured" in row and abs(row["planned"] / row["measured"] - 1) <= 0.10]
    print(f"{len(within)} of {len(rows)} within 10 %")
    if not args.no_record:
        from record import describe_run, record

        table = "\n".join(["| run | planned GB | measured GB | difference |", "|---|---|---|---|", *map(line, rows)])
        text = f"{describe_run('torch', 'transformers', 'peft', 'bitsandbytes')}\n- {len(within)} of {len(rows)} runs "
        record("memory_plan.py: planned against measured memory", f"{text}within 10 %\n\n{table}\n")


def planned_gb(config: dict[str, Any], flags: list[str], stage: str = "pt", processes: int = 1) -> Any:
    """The plan of a stage's flags on a GPU."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from transformers import AutoConfig

    from utils.core.command_line import parse_args
    from utils.planning.memory import plan
    from utils.planning.request import STAGES, PlannedRun, read_request

    with tempfile.TemporaryDirectory() as folder:
        settings = dict(config)
        AutoConfig.for_model(settings.pop("model_type"), dtype="bfloat16", **settings).save_pretrained(folder)
        words = ["--model_name_or_path", folder, "--output_dir", f"{folder}/run", *flags]
        *arguments, run = parse_args(*STAGES[stage], PlannedRun, argv=words)
        return plan(read_request(stage, arguments, run, on_gpu=True, processes=processes))


def compare_published() -> None:
    """Print plans beside figures that others published; reasons for the differences are in docs/planning."""
    print("| Qwen-7B | tokens | planned GB | as they trained | published GB | difference |")
    print("|---|---|---|---|---|---|")
    flash = ["--attn_implementation", "flash_attention_2", CHECKPOINTING, "--gradient_accumulation_steps", "8"]
    for kind, published in QWEN_GB.items():
        for length, gb in zip(QWEN_LENGTHS, published, strict=True):
            flags = [*KINDS[kind], *flash, "--block_size", str(length), "--per_device_train_batch_size", "1"]
            planned = planned_gb(QWEN_7B, flags).needed / 1e9
            whole = planned + length * QWEN_7B["vocab_size"] * BYTES_OF_A_LOGIT / 1e9
            if kind == "LoRA + embeddings":
                whole -= 2 * QWEN_7B["vocab_size"] * QWEN_7B["hidden_size"] * LESS_OF_AN_EMBEDDING / 1e9
            off = 100 * (whole / gb - 1)
            print(f"| {kind} | {length} | {planned:.1f} | {whole:.1f} | {gb} | {off:+.0f} % |", flush=True)
    print("\n| row | planned GB | published GB |\n|---|---|---|")
    packed = [
        "--block_size",
        "2048",
        "--per_device_train_batch_size",
        "2",
        "--cross_document_attention",
        CHECKPOINTING,
    ]
    rows = {
        "torchtune Llama-3.1-8B full, 2 x 2048 (bfloat16 weights, paged 8-bit AdamW)": (
            [*packed, "--full_finetuning", "--dtype", "bfloat16", "--optim", "paged_adamw_8bit"], 18.9 * 2**30, 1),
        "torchtune LoRA, 2 x 2048": ([*packed, "--lora_rank", "8", "--target_modules", "all"], 16.2 * 2**30, 1),
        "torchtune QLoRA, 2 x 2048": (
            [*packed, "--lora_rank", "8", "--target_modules", "all", "--load_in_kbits", "4"], 7.4 * 2**30, 1),
        "torchtitan Llama-3.1-8B pre-training, 8 x H100, FSDP, 1 x 8192": (
            ["--block_size", "8192", "--per_device_train_batch_size", "1", "--cross_document_attention",
             "--full_finetuning", "--fsdp", "full_shard"], 82.4 * 2**30, 8),
    }  # fmt: skip
    for name, (flags, published, processes) in rows.items():
        plan = planned_gb(LLAMA_3_8B, flags, processes=processes)
        print(f"| {name} | {plan.needed / 1e9:.1f} | {published / 1e9:.1f} |", flush=True)
    router = ["--target_modules", "all", "--lora_rank", "64", "--lora_dropout", "0.05", "--load_in_kbits", "4"]
    flags = [*router, "--modules_to_save", "embed_tokens,lm_head", "--block_size", "1024", CHECKPOINTING]
    plan = planned_gb(MIXTRAL, [*flags, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"])
    print(f"| Mixtral-8x7B QLoRA + embeddings, V 57,000, 1 x 1024 | {plan.needed / 1e9:.1f} | one 80 GB GPU |")


def known(results: Path | None, name: str) -> dict[str, Any] | None:
    """The line of a case in the file of results."""
    if results is None or not results.is_file():
        return None
    rows = [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()]
    return next((row for row in rows if row["name"] == name), None)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "measured" not in row:
        return f"| {row['name']} | | | failed: {row['error']} |"
    off = 100 * (row["planned"] / row["measured"] - 1)
    return f"| {row['name']} | {row['planned']:.3f} | {row['measured']:.3f} | {off:+.1f} % |"


def measure(case: Case, work: Path, shared: Path) -> dict[str, Any]:
    """Run a case's script in a process of its own; planned and measured in 1e9 bytes."""
    tokenizer = shared / "tokenizers" / "llama2_32000"
    model = work / case.family
    if not model.is_dir():
        in_a_process(lambda: write_model(case.family, model), work / "model.log")
    data = write_data(case, work, shared)
    output = work / f"run-{time.time_ns()}"
    flags = [
        *("--model_name_or_path", model, "--tokenizer_name_or_path", tokenizer, "--train_data", data),
        *("--output_dir", output, "--max_steps", STEPS, "--per_device_train_batch_size", case.rows),
        *("--save_strategy", "no", "--logging_steps", 1, "--learning_rate", "1e-5", "--disable_tqdm", "True"),
        *("--preprocessing_num_workers", 1),
        *("--gradient_accumulation_steps", 1, *KINDS[case.kind], *lengths(case), *case.extra.split()),
    ]
    log = work / f"{output.name}.log"
    ended = in_a_process(lambda: run_script(case.stage, list(map(str, flags))), log)
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if not ended:
        return {"name": case.name, "error": said[-1][:200]}
    figures = json.loads((output / "all_results.json").read_text())
    if "planned_memory_gb" not in figures:
        return {"name": case.name, "error": next(text for text in said if "not planned" in text)[:300]}
    return {
        "name": case.name,
        "planned": figures["planned_memory_gb"],
        "measured": figures["measured_memory_gb"],
        "seconds": figures["seconds"],
    }


def in_a_process(work: Callable[[], Any], log: Path) -> bool:
    """Whether a fork of this process does it well; the libraries that it imported are there, and nothing else."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            work()
        except BaseException:  # whatever it is, a fork must not go on as its parent would
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def run_script(stage: str, flags: list[str]) -> None:
    """A training script's main."""
    from utils.core.command_line import parse_args
    from utils.planning.request import STAGES
    from utils.training.arguments import RunArguments

    logging.basicConfig(level=logging.INFO)
    importlib.import_module(stage).main(*parse_args(*STAGES[stage], RunArguments, argv=flags))


def lengths(case: Case) -> list[Any]:
    """The flags that say how long rows are."""
    if case.stage == "pt":
        return ["--block_size", case.length]
    if case.stage == "ppo":
        half = case.length // 2
        rewards = ROOT / "benchmarks" / "memory_plan.py"
        return [
            *("--max_prompt_length", half, "--max_new_tokens", half, "--min_new_tokens", half),
            *("--rollout_batch_size", 4, "--per_device_rollout_batch_size", 4, "--ppo_epochs", 1),
            *("--prompt_template", "alpaca-2", "--reward_function", f"{rewards}:length_reward"),
            *("--max_dropped_share", 1.0),
        ]
    return ["--max_seq_length", case.length, "--prompt_template", "alpaca-2"]


def length_reward(prompts: list[str], answers: list[str]) -> list[float]:
    """A reward for PPO that needs no model."""
    return [len(answer) / 100 for answer in answers]


def write_data(case: Case, work: Path, shared: Path) -> Path:
    """Data whose rows are as long as the case allows."""
    path = work / f"{case.stage}-{case.length}.jsonl"
    if path.exists():
        return path
    source = shared / "sft" / "alpaca_zh_10k.json"
    records = json.loads(source.read_text(encoding="utf-8"))[:400]
    texts = [record["instruction"] + record["output"] for record in records]
    lines: list[dict[str, Any]] = []
    if case.stage == "pt":
        lines = [{"text": text} for text in texts]
    elif case.stage == "sft":
        lines = records
    elif case.stage == "ppo":
        lines = [{"prompt": record["instruction"][:12]} for record in records]
    else:
        long = "".join(texts)
        width = case.length  # characters of an answer; cut to the window
        lines = [
            {
                "prompt": "说说看。",
                "chosen": long[n * width : (n + 1) * width],
                "rejected": long[(n + 1) * width :][:width],
            }
            for n in range(12)
        ]
    path.write_text("\n".join(json.dumps(item, ensure_ascii=False) for item in lines) + "\n", encoding="utf-8")
    return path


def write_model(family: str, folder: Path) -> None:
    """A model with random weights in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **FAMILIES[family]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    main()
