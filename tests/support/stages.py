"""The five training scripts with a few records each, in this process."""

import importlib
import json
from pathlib import Path

from support.scripts import script_types
from utils.core.command_line import parse_args

STAGES = ("pt", "sft", "rm", "dpo", "ppo")
WORDS = ["the cat", "a dog", "my house", "the sea", "a red hat", "that tree", "some milk", "an old man"]
SMALL = [
    *("--max_steps", "3", "--learning_rate", "1e-3", "--lora_dropout", "0", "--per_device_train_batch_size", "2"),
    *("--logging_steps", "1", "--save_strategy", "no", "--preprocessing_num_workers", "1"),
    *("--disable_tqdm", "True", "--report_to", "none"),
]
LENGTHS = {
    "pt": ["--block_size", "64"],
    "sft": ["--max_seq_length", "128", "--prompt_template", "llama-2"],
    "rm": ["--max_seq_length", "128", "--prompt_template", "llama-2"],
    "dpo": ["--max_seq_length", "128", "--prompt_template", "llama-2"],
    "ppo": [
        *("--prompt_template", "llama-2", "--max_prompt_length", "100", "--max_new_tokens", "6"),
        *("--rollout_batch_size", "4", "--per_device_rollout_batch_size", "4"),
    ],
}


def write_records(folder: Path) -> Path:
    """A file of records for each stage, and a reward function."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(f"Tell me about {word} ({number}).", word) for number in range(4) for word in WORDS]
    (folder / "pt.txt").write_text("".join(f"{question} Here is {word}.\n" for question, word in pairs))
    records = {
        "sft": [{"instruction": question, "input": "", "output": f"Here is {word}."} for question, word in pairs],
        "rm": [{"prompt": question, "chosen": f"Here is {word}.", "rejected": "No."} for question, word in pairs],
        "ppo": [{"prompt": question} for question, _ in pairs[:8]],
    }
    for name, rows in {**records, "dpo": records["rm"]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text("def length(prompts, answers):\n    return [len(a) % 7.0 for a in answers]\n")
    return folder


def stage_argv(stage: str, model: Path, records: Path, out: Path, *extra: str) -> list[str]:
    data = records / ("pt.txt" if stage == "pt" else f"{stage}.jsonl")
    argv = ["--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(out)]
    if stage == "ppo":
        argv += ["--reward_function", f"{records / 'rewards.py'}:length"]
    return [*argv, *SMALL, *LENGTHS[stage], *map(str, extra)]


def run_main(stage: str, argv: list[str]) -> dict:
    return importlib.import_module(stage).main(*parse_args(*script_types(f"{stage}.py"), argv=argv))


def stage_losses(stage: str, folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    name = "ppo_loss" if stage == "ppo" else "loss"
    return [entry[name] for entry in history if name in entry]
