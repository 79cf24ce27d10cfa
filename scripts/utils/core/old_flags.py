"""Old flags: the spellings of the forerunners and of older libraries, and what they mean today.

docs/migrating.md lists them all; a test compares it with the tables here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import InputError

logger = logging.getLogger(__name__)

RENAMED = {
    "base_model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "model": "model_name_or_path",
    "tokenizer_path": "tokenizer_name_or_path",
    "tokenizer_name": "tokenizer_name_or_path",
    "peft_path": "adapter_name_or_path",
    "lora_model": "adapter_name_or_path",
    "dataset_dir": "train_data",
    "train_file": "train_data",
    "validation_file": "validation_data",
    "validation_split_percentage": "validation_split",
    "trainable": "target_modules",
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "force_resize_embeddings": "resize_embeddings",
    "llama_tokenizer_dir": "base_tokenizer",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "on_bad_text": "on_bad_record",
    # The forerunners' evaluations.
    "ntrain": "num_fewshot",
    "input_dir": "data_dir",
    "save_dir": "output_dir",
    # DeepSpeed-Chat, steps 2 (rm.py) and 3 (ppo.py); the last four are names in its code.
    "data_path": "train_data",
    "max_seq_len": "max_seq_length",
    "max_prompt_seq_len": "max_prompt_length",
    "max_answer_seq_len": "max_new_tokens",
    "warmup_rate": "warmup_steps",
    "num_warmup_steps": "warmup_steps",
    "actor_model_name_or_path": "model_name_or_path",
    "critic_model_name_or_path": "reward_model",
    "actor_learning_rate": "learning_rate",
    "actor_weight_decay": "weight_decay",
    "actor_gradient_checkpointing": "gradient_checkpointing",
    "per_device_generation_batch_size": "per_device_rollout_batch_size",
    "per_device_training_batch_size": "per_device_train_batch_size",
    "generation_batches": "rollout_batch_size",
    "kl_ctl": "kl_coef",
    "cliprange": "clip_range",
    "cliprange_value": "value_clip_range",
    "clip_reward_value": "score_clip",
}
_ZERO = "pass --deepspeed scripts/configs/ds_zero2_no_offload.json or ds_zero3_offload.json"
# Those of DeepSpeed-Chat with nothing to do here, and why.
DROPPED_OF_CHAT = {
    "data_split": "each step reads its own files; hold out pairs or prompts with --validation_split",
    "data_output_path": "use --data_cache_dir",
    "num_padding_at_beginning": "scores are read at an answer's last token, wherever it stands",
    "zero_stage": _ZERO,
    "actor_zero_stage": _ZERO,
    "critic_zero_stage": _ZERO,
    "offload": _ZERO,
    "offload_reference_model": "the reference is the policy without its adapter",
    "actor_dropout": "PPO compares probabilities, which dropout would change at random",
    "critic_dropout": "PPO compares values, which dropout would change at random",
    "critic_gradient_checkpointing": "--gradient_checkpointing is for both",
    "critic_weight_decay": "--weight_decay is for both",
    "tensorboard_path": "set TENSORBOARD_LOGGING_DIR; default: <output_dir>/runs",
}
# Only scripts that know one of these flags (rm.py, ppo.py) do DeepSpeed-Chat's steps; others refuse its flags.
CHAT_SCRIPTS_KNOW = {"centering", "kl_coef"}
# Flags with a value or a switch that no longer do anything, and why.
DROPPED = {
    **DROPPED_OF_CHAT,
    "save_safetensors": "weights are always saved as safetensors",
    "overwrite_cache": "caches are keyed by content, so a stale one is never used",
    "use_fast_tokenizer": "one exact tokenizer is loaded",
    "model_type": "the config says it",
    "model_revision": "pass a local folder of that revision",
    "use_auth_token": "log in with the hub's own command line",
    "cache_dir": "set HF_HOME",
    "streaming": "data is always streamed into a memory-mapped cache",
    "keep_linebreaks": "use --document_separator for documents of several lines",
    "dataset_config_name": "local files are read",
    "logging_dir": "set the tracker's own variable",
    "debug_mode": "use --max_train_samples",
    "fp16_full_eval": "evaluation runs in the training precision",
    "half_precision_backend": "torch's own autocast is used",
    # The forerunners' page with vLLM, and their server on it.
    "post_host": "--engine vllm runs in this process; pass --vllm_url for a server that runs already",
    "post_port": "--engine vllm runs in this process; pass --vllm_url for a server that runs already",
    "allow_credentials": "keys are sent in a header; --cors_origins says which pages may ask",
    "allowed_origins": "no other page may ask unless --cors_origins names it",
    "allowed_methods": "--cors_origins says which pages may ask",
    "allowed_headers": "--cors_origins says which pages may ask",
    # The forerunners' evaluations.
    "n_times": "the likeliest answer is the same each time; --do_sample and --seed draw others",
    "do_save_csv": "answers.jsonl always has every answer",
    "ngpu": "use --gpus",
}
REPLACED_SWITCHES = {
    "use_flash_attention_2": ["--attn_implementation", "flash_attention_2"],
    "use_vllm": ["--engine", "vllm"],
    "group_by_length": ["--train_sampling_strategy", "group_by_length"],
    "enable_tensorboard": ["--report_to", "tensorboard"],
}
# The forerunners' NTK scaling, see translate_ntk.
NTK_FLAGS = ("use_ntk", "alpha")
# The forerunners' evaluations of questions with choices, see translate_exam: short flags, and switches.
EXAM_SHORT = {"-k": "--ntrain", "-d": "--data_dir", "-s": "--save_dir", "-m": "--model_path", "-g": "--ngpu"}
EXAM_SWITCHES = ("few_shot", "cot", "constrained_decoding", "do_test")
FALSE_WORDS = ("false", "no", "0", "off")


@dataclass
class Flag:
    """A flag and the words behind it; without a name: words that belong to no flag."""

    typed: str  # as it was given: "--max_seq_length", "--max-seq-length"
    values: list[str] = field(default_factory=list)
    joined: bool = False  # by "=", so that the first value may begin with "--"

    @property
    def name(self) -> str:
        return self.typed.removeprefix("--").replace("-", "_")

    @property
    def switch(self) -> str:
        """Its value, if it is a switch: which may stand alone."""
        return self.values[0] if self.values else "True"

    @property
    def rest(self) -> Flag:
        """What stays when a flag is taken away with its value; the parser complains of it."""
        return Flag("", self.values[1:])

    def words(self) -> list[str]:
        if self.joined:
            return [f"{self.typed}={self.values[0]}", *self.values[1:]]
        return [*filter(None, [self.typed]), *self.values]


Translated = tuple[list[Flag], list[str]]  # with the changes made, for the warning


def read_flags(argv: Sequence[str], short: Mapping[str, str] | None = None) -> list[Flag]:
    """Split a command line into flags and their values. Only two dashes begin a flag: -1 and -x are values.

    Args: short: one-letter flags that begin one all the same -> what they stand for.
    """
    flags = [Flag("")]
    for word in argv:
        typed, equals, value = word.partition("=")
        typed = (short or {}).get(typed, typed)
        if typed.startswith("--"):
            flags.append(Flag(typed, [value] if equals else [], bool(equals)))
        else:
            flags[-1].values.append(word)
    return flags


def translate_old_flags(argv: Sequence[str], known: set[str], documented: Sequence[str] = ()) -> list[str]:
    """Give old flags their modern spelling, with one warning that lists all changes.

    Args:
        known: the names the script's own parser has; those are never touched (but see translate_chat_values).
        documented: old names this script documents as its own; they change without a warning.
    """
    chat, exam = bool(known & CHAT_SCRIPTS_KNOW), "num_fewshot" in known
    flags = read_flags(argv, EXAM_SHORT if exam else None)
    changes: list[str] = []
    # Those that need more than a new name come first: some of their flags are in the tables, for other scripts.
    for applies, translate in (
        (chat, translate_chat_values),
        (exam, translate_exam),
        ("rope_scaling" in known, translate_ntk),
    ):
        if applies:
            flags, more = translate(flags)
            changes += more
    result: list[str] = []
    for flag in flags:
        name = flag.name
        if name in known:
            result += flag.words()
        elif name in REPLACED_SWITCHES and REPLACED_SWITCHES[name][0][2:] in known:
            result += REPLACED_SWITCHES[name] if flag.switch.lower() not in FALSE_WORDS else []
            result += flag.rest.words()
            changes.append(f"--{name} is now {' '.join(REPLACED_SWITCHES[name])}")
        elif name in DROPPED and (chat or name not in DROPPED_OF_CHAT):
            result += flag.rest.words()
            changes.append(f"--{name} has no effect: {DROPPED[name]}")
        elif RENAMED.get(name) in known:
            result += Flag(f"--{RENAMED[name]}", flag.values, flag.joined).words()
            if name not in documented:
                changes.append(f"--{name} is now --{RENAMED[name]}")
        else:
            result += flag.words()
    if changes:
        logger.warning("old flags accepted, see docs/migrating.md: %s", "; ".join(changes))
    return result


def _take(flags: Sequence[Flag], names: Collection[str]) -> tuple[list[Flag], dict[str, str]]:
    """The other flags, and the values of these; of a flag that is repeated, the last."""
    others = [flag.rest if flag.name in names else flag for flag in flags]
    return others, {flag.name: flag.switch for flag in flags if flag.name in names}


def translate_ntk(flags: Sequence[Flag]) -> Translated:
    """--use_ntk and --alpha (a number, or auto) of the forerunners.

    alpha raises the rotary base by alpha ** (d / (d - 2)), which is what --rope_scaling ntk does for a window
    (alpha + 1) / 2 times longer. Alpha 1, their default, changes nothing. Raises: InputError for another value.
    """
    others, given = _take(flags, NTK_FLAGS)
    if not given:
        return others, []
    alpha = given.get("alpha", "1.0")
    try:
        factor = None if alpha == "auto" else (float(alpha) + 1) / 2
    except ValueError:
        raise InputError(f"--alpha {alpha}: need a number, or auto") from None
    modern = [Flag("--rope_scaling", ["ntk"]), Flag("--rope_factor", [str(factor)])]
    if factor is None:
        modern = [Flag("--rope_scaling", ["auto-ntk"])]
    if factor == 1 or given.get("use_ntk", "True").lower() in FALSE_WORDS:
        modern = []
    return others + modern, [_describe(given, modern, "nothing (alpha 1 scales nothing)")]


def translate_exam(flags: Sequence[Flag]) -> Translated:
    """Switches of the forerunners' evaluations.

    --few_shot False is no examples, whatever --ntrain says; --cot True reasons, whatever --constrained_decoding says.
    """
    others, values = _take(flags, EXAM_SWITCHES)
    given = {name: value.lower() not in FALSE_WORDS for name, value in values.items()}
    modern: list[Flag] = []
    if "constrained_decoding" in given or given.get("cot"):
        mode = "constrained" if given.get("constrained_decoding", True) else "generative"
        modern.append(Flag("--mode", ["cot" if given.get("cot") else mode]))
    if given.get("few_shot") is False:
        modern.append(Flag("--num_fewshot", ["0"]))
    if given.get("do_test"):
        modern.append(Flag("--split", ["test"]))
    # Behind all others, so that they decide.
    return others + modern, [_describe(given, modern, "the default")] if given else []


def _describe(given: Mapping[str, object], modern: Sequence[Flag], otherwise: str) -> str:
    old = " ".join(f"--{name} {value}" for name, value in given.items())
    return f"{old} is now {' '.join(word for flag in modern for word in flag.words()) or otherwise}"


def translate_chat_values(flags: Sequence[Flag]) -> Translated:
    """Flags of DeepSpeed-Chat that need more than a new name.

    --deepspeed is a switch there; --dtype is the precision of training; an iteration has generation_batches batches of
    per_device_generation_batch_size answers on every process, here it is their product.
    """
    result: list[Flag] = []
    changes: list[str] = []
    batches, batch_size = "", "16"
    for flag in flags:
        value = flag.values[0] if flag.values else ""
        if flag.name == "deepspeed" and not flag.joined and not any(flag.values):
            changes.append(f"--deepspeed without a config has no effect: {_ZERO}")
        elif flag.name == "dtype" and value in ("bf16", "fp16"):
            result.append(Flag("--precision", flag.values))
            changes.append(f"--dtype {value} is now --precision {value}")
        elif flag.name == "generation_batches" and value.isdecimal():
            batches = value
            result.append(flag.rest)
        else:
            if flag.name in ("per_device_generation_batch_size", "per_device_rollout_batch_size"):
                batch_size = value
            result.append(flag)
    if batches and batch_size.isdecimal():
        processes = int(os.environ.get("WORLD_SIZE", 1))
        answers = int(batches) * int(batch_size) * processes
        result.append(Flag("--rollout_batch_size", [str(answers)]))
        changes.append(
            f"--generation_batches {batches} is now --rollout_batch_size {answers} ({batches} batches x {batch_size} "
            f"answers x {processes} processes)"
        )
    return result, changes
