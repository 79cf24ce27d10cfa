"""Arguments: the dataclasses that scripts share, each checking its own values; command_line fills them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import InputError, raise_problems

GUIDED_DRAFTS = (
    "guidance_scale does not go with speculative decoding: drafts would have to be guided too, by two more passes for "
    "each token; leave out --guidance_scale, or the flags of speculation"
)


def arg(default: Any = None, *, help: str) -> Any:
    """A dataclass field with its help text, the only place where that text stands."""
    return dataclasses.field(default=default, metadata={"help": help})


def list_arg(default: Sequence[Any] = (), *, help: str) -> Any:
    """A field that takes several values on the command line and a list in a config file."""
    return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})


@dataclass
class ModelArguments:
    """Which model and tokenizer, and how they are loaded."""

    model_name_or_path: str | None = arg(help="Base model: a folder, or a hub id.")
    tokenizer_name_or_path: str | None = arg(help="Tokenizer folder; default: the adapter's or the model's own.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = arg(
        "auto",
        help="Type of the frozen base weights; auto: as stored; the run's precision with k-bit bases; float32 where "
        "training computes in it.",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = arg(
        "auto", help="Attention kernel; auto: flash_attention_2 where it is installed and CUDA is there, else sdpa."
    )
    load_in_kbits: Literal[4, 8, 16] = arg(16, help="Bits of the frozen base weights: 4 and 8 use bitsandbytes.")
    quant_type: Literal["nf4", "fp4"] = arg("nf4", help="4-bit data type.")
    double_quant: bool = arg(True, help="Quantise the 4-bit scales too (saves 0.4 bit a weight).")

    def __post_init__(self) -> None:
        if self.load_in_kbits not in (4, 8, 16):
            raise InputError(f"--load_in_kbits {self.load_in_kbits}: need 4, 8 or 16")


@dataclass
class RopeArguments:
    """A window longer than the one the model was trained with; formulas in utils.models.rope."""

    rope_scaling: Literal["none", "pi", "ntk", "auto-ntk", "yarn", "pi+ntk"] = arg(
        "none",
        help="none: the model as it is, with what its config says; pi: positions divided; ntk: larger rotary base; "
        "auto-ntk: a base for each request, by its length; yarn; pi+ntk: both.",
    )
    rope_factor: float | None = arg(
        help="How many times longer the window becomes (auto-ntk: at most); default: 2, with auto-ntk 4."
    )
    pi_factor: float | None = arg(
        help="With pi+ntk: the part of --rope_factor that positions are divided by, NTK does the rest (a window 4 "
        "times longer is 2 x 2); default: the square root of --rope_factor."
    )

    def __post_init__(self) -> None:
        factors = {"rope_factor": self.rope_factor, "pi_factor": self.pi_factor}
        raise_problems(
            [
                f"--{name} {value}: need more than 1, how many times longer the window becomes"
                for name, value in factors.items()
                if value is not None and not value > 1
            ]
        )

    @property
    def factor(self) -> float:
        """How many times longer the window becomes."""
        default = 4.0 if self.rope_scaling == "auto-ntk" else 2.0
        return default if self.rope_factor is None else self.rope_factor


@dataclass
class ExtendArguments(RopeArguments):
    """What training extends of a model, its vocabulary and its window, and models made from scratch."""

    embedding_init: Literal["mean_of_pieces", "mean", "random", "zero"] = arg(
        "mean_of_pieces",
        help="New rows of embed_tokens and lm_head: mean of the rows of the pieces the old tokenizer cut the new "
        "piece into; mean of all old rows; random with the old rows' spread; zero.",
    )
    resize_embeddings: bool = arg(
        False, help="Allow a larger vocabulary although embed_tokens and lm_head are not trained."
    )
    train_new_rows_only: bool = arg(
        False,
        help="Train nothing but the rows that the tokenizer adds to embed_tokens and lm_head: a first, short stage.",
    )
    config_name: str | None = arg(
        help="Folder or file of a model config: train from scratch (with --full_finetuning)."
    )
    config_overrides: str | None = arg(
        help="Comma-separated changes to that config, e.g. hidden_size=256,num_hidden_layers=4."
    )


@dataclass
class LoraArguments:
    """Low-rank adaptation, or full fine-tuning."""

    adapter_name_or_path: str | None = arg(help="Continue this trainable PEFT adapter instead of starting a new one.")
    lora_rank: int = arg(8, help="Rank of the update: more rank, more capacity and memory.")
    lora_alpha: float = arg(32.0, help="Scaling numerator: the update is multiplied by alpha / rank.")
    lora_dropout: float = arg(0.1, help="Dropout on the input of the update, 0-1.")
    target_modules: str = arg(
        "q_proj,v_proj", help="Comma-separated linear layers that get an update; all: every one."
    )
    modules_to_save: str | None = arg(help="Comma-separated modules trained in full, e.g. embed_tokens,lm_head.")
    use_rslora: bool = arg(False, help="Scale by alpha / sqrt(rank) (rank-stabilised LoRA).")
    use_dora: bool = arg(False, help="Weight-decomposed LoRA (DoRA).")
    full_finetuning: bool = arg(False, help="Train every weight, no adapter.")
    output_router_logits: bool = arg(False, help="Mixtral: add the router's load-balancing loss.")

    def __post_init__(self) -> None:
        problems = []
        if self.lora_rank < 1:
            problems.append(f"--lora_rank {self.lora_rank}: need at least 1")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"--lora_dropout {self.lora_dropout}: need 0 <= dropout < 1")
        if self.full_finetuning and self.adapter_name_or_path:
            problems.append("--full_finetuning and --adapter_name_or_path exclude each other; merge the adapter first")
        raise_problems(problems)


@dataclass
class DataArguments:
    """Where the data is and how it is cut; sizes are in tokens."""

    train_data: list[str] = list_arg(
        help="Files or folders (txt, json, jsonl, parquet; recursive, sorted), each optionally as name=path."
    )
    validation_data: list[str] = list_arg(help="Files or folders for evaluation, each optionally as name=path.")
    validation_split: float = arg(
        0.0, help="Share of every training corpus held out for evaluation when there is no --validation_data, 0-1."
    )
    on_bad_record: Literal["error", "skip"] = arg(
        "error", help="A line or record that cannot be read or used: stop with file:line, or skip and count."
    )
    data_cache_dir: str | None = arg(help="Folder of the token caches; default: <output_dir>/../.token_cache.")
    preprocessing_num_workers: int | None = arg(help="Processes that tokenise; default: the cores available.")
    max_train_samples: int | None = arg(
        help="Train on at most this many blocks (pt.py) or records, from all files of --train_data alike."
    )
    max_eval_samples: int | None = arg(
        help="Evaluate on at most this many blocks (pt.py) or records of each validation set."
    )

    def __post_init__(self) -> None:
        counts = ("preprocessing_num_workers", "max_train_samples", "max_eval_samples")
        problems = [f"--{name} {value}: need at least 1" for name in counts
                    if (value := getattr(self, name)) is not None and value < 1]  # fmt: skip
        if not 0 <= self.validation_split < 1:
            problems.append(
                f"--validation_split {self.validation_split}: it is a fraction, 0 <= share < 1 (0.05 holds out 5 %)"
            )
        raise_problems(problems)


@dataclass
class InferenceArguments(RopeArguments, ModelArguments):
    """Which model answers, how it is prompted, and where it runs."""

    adapter_name_or_path: str | None = arg(help="LoRA adapter on top of the base model; merged models need none.")
    prompt_template: str | None = arg(
        help="alpaca-2, alpaca-2-long, llama-2, mixtral, alpaca, or tokenizer (its own chat template); default: the "
        "tokenizer's own where it has one, else alpaca-2."
    )
    system_prompt: str | None = arg(help='System prompt instead of the template\'s default; "" for none.')
    load_in_8bit: bool = arg(False, help="The same as --load_in_kbits 8.")
    load_in_4bit: bool = arg(False, help="The same as --load_in_kbits 4.")
    only_cpu: bool = arg(False, help="Run on the CPU although there is a GPU.")
    gpus: str | None = arg(help="GPUs to use, such as 0 or 0,1; default: those CUDA_VISIBLE_DEVICES names, or all.")
    engine: Literal["transformers", "llama.cpp", "vllm"] = arg(
        "transformers", help="What computes: transformers; llama.cpp, for GGUF files; vllm, here or at --vllm_url."
    )
    torch_compile: bool = arg(False, help="Let torch.compile fuse what stands around attention; a slow start.")
    vllm_url: str | None = arg(
        help="With --engine vllm: a running vLLM server, such as http://127.0.0.1:8000; "
        "its key is in the environment variable VLLM_API_KEY."
    )

    def __post_init__(self) -> None:
        ModelArguments.__post_init__(self)
        RopeArguments.__post_init__(self)
        if self.load_in_8bit and self.load_in_kbits == 16:
            self.load_in_kbits = 8
        elif self.load_in_4bit and self.load_in_kbits == 16:
            self.load_in_kbits = 4
        if self.torch_compile and self.engine != "transformers":
            raise InputError(f"--torch_compile is for --engine transformers; {self.engine} has kernels of its own")
        if self.vllm_url and self.engine != "vllm":
            raise InputError(f"--vllm_url is for --engine vllm, not {self.engine}; pass that too, or leave it out")
        if (self.load_in_8bit and self.load_in_kbits != 8) or (self.load_in_4bit and self.load_in_kbits != 4):
            raise InputError("--load_in_4bit, --load_in_8bit and --load_in_kbits contradict each other; pass one")


# Chinese-LLaMA-Alpaca-2's own, for models whose files name no settings.
SAMPLING_DEFAULTS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.2,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "repetition_penalty": 1.1,
}


def _sampling_arg(name: str, help: str) -> Any:
    return arg(None, help=f"{help} Default: the model's generation_config.json, else {SAMPLING_DEFAULTS[name]}.")


@dataclass
class GenerationArguments:
    """How answers are drawn; lengths are in tokens.

    Attributes:
        given: the settings of SAMPLING_DEFAULTS that nobody asked for (None), which a model's own may replace.
    """

    max_new_tokens: int = arg(400, help="Longest answer.")
    min_new_tokens: int = arg(0, help="An answer does not end before this many tokens.")
    do_sample: bool = _sampling_arg("do_sample", "Draw each token at random; off: always the likeliest.")
    temperature: float = _sampling_arg(
        "temperature", "Below 1 prefers likely tokens more; 0 always takes the likeliest."
    )
    top_k: int = _sampling_arg("top_k", "Draw from this many likeliest tokens only; 0: from all.")
    top_p: float = _sampling_arg(
        "top_p", "Draw from the likeliest tokens that reach this probability together, 0-1; 1: from all."
    )
    min_p: float = _sampling_arg(
        "min_p", "Draw only from tokens at least this share as likely as the likeliest, 0-1; 0: all."
    )
    repetition_penalty: float = _sampling_arg(
        "repetition_penalty", "Above 1 makes tokens that the prompt or the answer has less likely."
    )
    presence_penalty: float = arg(0.0, help="Taken from the logits of tokens that the answer has, -2 to 2.")
    frequency_penalty: float = arg(
        0.0, help="Taken from the logits of tokens once for each time the answer has them, -2 to 2."
    )
    guidance_scale: float = arg(1.0, help="Above 1: classifier-free guidance away from --negative_prompt; two passes.")
    negative_prompt: str | None = arg(help="System prompt of what answers should not be like; with --guidance_scale.")
    stop: list[str] = list_arg(help="Texts that end an answer and are not part of it.")
    num_beams: int = arg(1, help="Above 1: beam search, which never draws at random.")
    seed: int = arg(42, help="Equal seeds give equal answers, whatever the batch size.")

    def __post_init__(self) -> None:
        self.given = dict.fromkeys(name for name in SAMPLING_DEFAULTS if getattr(self, name) is None)
        for name in self.given:
            setattr(self, name, SAMPLING_DEFAULTS[name])
        checks = {
            f"--max_new_tokens {self.max_new_tokens}: need at least 1": self.max_new_tokens >= 1,
            f"--min_new_tokens {self.min_new_tokens}: need 0 to --max_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens
            ),
            f"--temperature {self.temperature}: need 0 (greedy) or more": self.temperature >= 0,
            f"--top_k {self.top_k}: need 0 (all tokens) or more": self.top_k >= 0,
            f"--top_p {self.top_p}: need 0 < top_p <= 1": 0 < self.top_p <= 1,
            f"--min_p {self.min_p}: need 0 <= min_p <= 1": 0 <= self.min_p <= 1,
            f"--repetition_penalty {self.repetition_penalty}: need more than 0": self.repetition_penalty > 0,
            f"--presence_penalty {self.presence_penalty}: need -2 to 2": -2 <= self.presence_penalty <= 2,
            f"--frequency_penalty {self.frequency_penalty}: need -2 to 2": -2 <= self.frequency_penalty <= 2,
            f"--guidance_scale {self.guidance_scale}: need 1 or more": self.guidance_scale >= 1,
            f"--guidance_scale {self.guidance_scale}: it leads away from --negative_prompt; pass both, or neither": (
                (self.negative_prompt is not None) == (self.guidance_scale > 1)
            ),
            "--stop '': need texts of at least a character": all(self.stop),
            f"--num_beams {self.num_beams}: need at least 1": self.num_beams >= 1,
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])

    def with_model_defaults(self, own: Mapping[str, Any]) -> GenerationArguments:
        """These settings, those that nobody asked for replaced by a model's own."""
        return dataclasses.replace(self, **{name: value for name, value in own.items() if name in self.given})

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.do_sample and self.temperature > 0 and self.num_beams == 1

    @property
    def prompts_per_answer(self) -> int:
        """Guided answers take two places of an engine's batch."""
        return 2 if self.guidance_scale > 1 else 1


@dataclass
class SpeculationArguments:
    """Speculative decoding: a draft writes some tokens ahead, and the model checks them in one pass."""

    speculative_sampling: bool = arg(
        False, help="Speculative decoding; --draft_base_model, --draft_layers and --prompt_lookup ask for it too."
    )
    draft_k: int = arg(0, help="Tokens drafted at once; 0 or less: as many as pay off, by how many were accepted.")
    draft_base_model: str | None = arg(help="Model that drafts: a folder, or a hub id; any vocabulary.")
    draft_lora_model: str | None = arg(help="LoRA adapter on top of --draft_base_model.")
    draft_model_load_in_8bit: bool = arg(False, help="Load --draft_base_model in 8 bits.")
    draft_model_load_in_4bit: bool = arg(False, help="Load --draft_base_model in 4 bits.")
    draft_layers: int | None = arg(help="Draft with this many first layers of the model itself.")
    prompt_lookup: bool = arg(False, help="Draft what followed the last tokens where the text has them already.")

    def __post_init__(self) -> None:
        kinds = {
            "--draft_base_model": self.draft_base_model is not None or self.draft_lora_model is not None,
            "--draft_layers": self.draft_layers is not None,
            "--prompt_lookup": self.prompt_lookup,
        }
        asked = [kind for kind, given in kinds.items() if given]
        k_bits = self.draft_model_load_in_8bit or self.draft_model_load_in_4bit
        checks = {
            f"{' and '.join(asked)} exclude each other; pass one": len(asked) < 2,
            f"--speculative_sampling needs something that drafts: pass {', or '.join(kinds)}": (
                bool(asked) or not self.speculative_sampling
            ),
            "--draft_k: there is nothing that drafts; pass --draft_base_model, --draft_layers or --prompt_lookup": (
                bool(asked) or self.speculative_sampling or self.draft_k <= 0
            ),
            "--draft_model_load_in_8bit and --draft_model_load_in_4bit exclude each other; pass one": (
                not (self.draft_model_load_in_8bit and self.draft_model_load_in_4bit)
            ),
            "--draft_model_load_in_8bit and 4bit are for --draft_base_model": (
                kinds["--draft_base_model"] or not k_bits
            ),
            f"--draft_layers {self.draft_layers}: need at least 1": self.draft_layers is None or self.draft_layers > 0,
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])

    @property
    def drafts(self) -> bool:
        """Whether anything is drafted."""
        return bool(self.draft_base_model or self.draft_lora_model or self.draft_layers or self.prompt_lookup)

    def check(self, settings: GenerationArguments) -> None:
        """Raises: InputError for settings that go with no drafts."""
        if self.drafts and settings.num_beams > 1:
            raise InputError("beam search checks no drafts; leave out --num_beams, or the flags of speculation")
        if self.drafts and settings.guidance_scale > 1:
            raise InputError(GUIDED_DRAFTS)
