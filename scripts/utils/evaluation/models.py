"""Models that are evaluated: how they are named, which weights answered; and perplexity's candidates.

A model is a folder, an adapter's folder, or a GGUF file (a folder that holds one).
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.arguments import InferenceArguments
from ..core.errors import InputError
from ..core.files import hash_file, hash_json
from ..generation.llamacpp_engine import GgufFile, find_gguf_file
from ..generation.loading import check_inference_request, find_inference_files, load_for_inference
from ..gguf.llamacpp import open_model
from ..gguf.metadata import gguf_parts
from ..lora.base_record import weights_fingerprint
from ..lora.config import load_adapter_config
from ..models.rope import gguf_rope_config, llama_cpp_rope_parameters, rope_overrides, scale_rope
from ..text.tokenizer import load_tokenizer, tokenizer_fingerprint
from ..weights.config import load_config
from ..weights.names import ADAPTER_CONFIG
from ..weights.reader import open_checkpoint
from .likelihood import LikelihoodScorer, LlamaCppScorer, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

GGUF_BATCH = 512  # tokens that llama.cpp computes at once: so many rows of logits stand beside those it keeps


# ---------------------------------------------------------------- names and fingerprints


def is_gguf(place: str | None) -> bool:
    """Whether this is a GGUF file, or a folder of such without a model of transformers in it."""
    path = Path(place or "")
    if path.suffix == ".gguf":
        return True
    return path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.gguf"))


def for_evaluation(args: InferenceArguments) -> InferenceArguments:
    """The arguments, with llama.cpp as the engine of a GGUF file."""
    return replace(args, engine="llama.cpp") if is_gguf(args.model_name_or_path) else args


def split_name(item: str) -> tuple[str, str]:
    """NAME=PLACE, or a place alone, whose short name it is then. An existing file with = in its name is a place."""
    name, equals, place = item.partition("=")
    return (name, place) if equals and not Path(item).exists() else (short_name(item), item)


def short_name(place: str) -> str:
    """The last part of a path, without the suffix of a GGUF file or of a file of answers."""
    return re.sub(r"\.(gguf|jsonl?|parquet)$", "", Path(place).absolute().name)


def weights_of(args: InferenceArguments) -> dict[str, str]:
    """{place: fingerprint} of the model and then its adapter, equal for equal weights.

    Args: args: with the files of find_inference_files; with llama.cpp, a GGUF file or the folder that holds it.
    """
    found: dict[str, str] = {}
    for place in filter(None, (args.model_name_or_path, args.adapter_name_or_path)):
        if args.engine == "llama.cpp":
            parts = [hash_file(part) for part in gguf_parts(find_gguf_file(place))]
            found[place] = parts[0] if len(parts) == 1 else hash_json(parts)
        else:
            with open_checkpoint(place) as checkpoint:
                found[place] = weights_fingerprint(checkpoint)
    return found


# ---------------------------------------------------------------- perplexity's candidates


@dataclass
class Candidate:
    """A model in one precision under one scaling.

    Attributes:
        label: of its line in the table and the picture.
        kbits: of its weights; None for GGUF files, which are read as they are.
        trained_window: tokens, without the scaling.
        window: tokens, with it.
        tokenizer_key: equal for tokenizers that cut alike.
    """

    label: str
    model: str
    setting: str
    kbits: int | None
    args: InferenceArguments
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    trained_window: int
    tokenizer_key: str

    @property
    def window(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def is_gguf(self) -> bool:
        return self.args.engine == "llama.cpp"

    def describe(self) -> dict[str, Any]:
        """What a result file says of it."""
        weights = list(weights_of(self.args).values())
        return {
            "model": self.args.model_name_or_path,
            "adapter": self.args.adapter_name_or_path,
            "engine": self.args.engine,
            "kbits": self.kbits,
            "weights": weights[0] if len(weights) == 1 else hash_json(weights),
            "tokenizer": self.tokenizer_key,
            "trained_window": self.trained_window,
            **rope_overrides(self.config),
            "auto_ntk": getattr(self.config, "auto_ntk", None),
        }

    @contextlib.contextmanager
    def load(self, context: int, batch_tokens: int) -> Iterator[Scorer]:
        """Read the weights, which are there within the block.

        Args:
            context: tokens of the longest window.
            batch_tokens: computed at once.
        """
        if self.is_gguf:
            rope = {} if self.setting == "none" else llama_cpp_rope_parameters(self.config)
            offload = {} if self.args.only_cpu else {"n_gpu_layers": -1}
            threads, path = torch.get_num_threads(), Path(str(self.args.model_name_or_path))
            with open_model(path, threads, context, GGUF_BATCH, **rope, **offload) as model:
                yield LlamaCppScorer(model)
            return
        gc.collect()  # the memory of the model before
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield LikelihoodScorer(load_for_inference(self.args, self.config), batch_tokens)


def find_models(first: InferenceArguments, others: Sequence[str]) -> dict[str, InferenceArguments]:
    """{name: the arguments it is loaded with} of --base_model and --other_models, their files found.

    Args: others: a folder of a model or an adapter, or a GGUF file, each optionally as name=path.
    Raises: InputError if one is not there, or two have one name.
    """
    if first.engine == "vllm":
        raise InputError("--engine vllm: it tells no losses of texts here; use transformers, or llama.cpp for GGUF")
    first = for_evaluation(first)
    found = {}
    if first.engine == "llama.cpp":
        found[short_name(str(first.model_name_or_path))] = first
    else:
        files = find_inference_files(first)
        found[short_name(files.adapter_name_or_path or str(files.model_name_or_path))] = files
    for item in others:
        name, path = split_name(item)
        if name in found:
            raise InputError(f"--other_models {item}: another model is called {name}; pass NAME={path}")
        found[name] = _find_other(path, first)
    return found


def _find_other(path: str, first: InferenceArguments) -> InferenceArguments:
    """The arguments of one of --other_models: as the first model is loaded, with files of its own."""
    args = replace(first, adapter_name_or_path=None, tokenizer_name_or_path=None)
    if is_gguf(path):
        return replace(args, model_name_or_path=path, engine="llama.cpp", torch_compile=False, **_kbits(16))
    args = replace(args, engine="transformers")
    if not (Path(path) / ADAPTER_CONFIG).is_file() or (Path(path) / "config.json").is_file():
        return find_inference_files(replace(args, model_name_or_path=path))
    recorded = load_adapter_config(Path(path)).base_model_name_or_path
    base = recorded if recorded and Path(recorded).is_dir() else first.model_name_or_path
    return find_inference_files(replace(args, model_name_or_path=base, adapter_name_or_path=path))


def _kbits(bits: int) -> dict[str, Any]:
    """The changes of arguments that load weights in so many bits."""
    return {"load_in_kbits": bits, "load_in_4bit": False, "load_in_8bit": False}


def find_candidates(
    models: dict[str, InferenceArguments],
    settings: Sequence[str],
    kbits: Sequence[int],
    longest: int | None,
    curve: bool,
) -> list[Candidate]:
    """Every model in every precision under every scaling, checked.

    Args:
        settings: scalings; none: that of the arguments.
        kbits: bits of weights; none: those of the arguments.
        longest: tokens that the window of a scaling without a factor holds; None: the scaling's default.
        curve: labels are for one model under several scalings; else for several models.
    Raises: InputError for what a model cannot have.
    """
    return [
        candidate
        for name, args in models.items()
        for candidate in _variants(name, args, settings, kbits, longest, curve, len(models) > 1 or not curve)
    ]


def _variants(
    name: str,
    args: InferenceArguments,
    settings: Sequence[str],
    kbits: Sequence[int],
    longest: int | None,
    with_setting: bool,
    with_name: bool,
) -> Iterator[Candidate]:
    gguf = None
    if args.engine == "llama.cpp":
        gguf = GgufFile(replace(args, rope_scaling="none", rope_factor=None, pi_factor=None))
        tokenizer, window = gguf.tokenizer, gguf.context
        args = replace(args, model_name_or_path=str(gguf.path))
    else:
        tokenizer = load_tokenizer(str(args.tokenizer_name_or_path))
        window = int(load_config(str(args.model_name_or_path)).max_position_embeddings)
    key = tokenizer_fingerprint(tokenizer)
    for bits in [None] if gguf else list(dict.fromkeys(kbits)) or [args.load_in_kbits]:
        for setting in dict.fromkeys(settings or [args.rope_scaling]):
            scaled = choose_factor(args, setting, window, longest)
            if gguf:
                config = gguf_rope_config(gguf.metadata)
                scale_rope(config, scaled)
                if setting != "none":
                    llama_cpp_rope_parameters(config)  # whether it can
            else:
                assert bits is not None
                scaled = replace(scaled, **_kbits(bits))
                config = check_inference_request(scaled, tokenizer)
            parts = [name] * with_name + [f"{bits}-bit"] * (bits is not None and len(kbits) > 1)
            parts += [setting] * (with_setting or bool(settings) or setting != "none")
            yield Candidate(" ".join(parts), name, setting, bits, scaled, tokenizer, config, window, key)


def choose_factor(args: InferenceArguments, setting: str, window: int, longest: int | None) -> InferenceArguments:
    """The arguments with a scaling; without --rope_factor its window is as long as `longest`, where that is given."""
    factor, pi_factor = args.rope_factor, args.pi_factor
    if setting == "none":
        factor = None
    elif factor is None and longest is not None:
        factor = longest / window
        if factor <= 1:
            raise InputError(
                f"--settings {setting}: the longest length, {longest} tokens, is within the model's window of "
                f"{window}; pass a longer one, in --lengths or --window, or --rope_factor"
            )
    if setting != "pi+ntk":
        pi_factor = None
    changes = {"rope_scaling": setting, "rope_factor": factor, "pi_factor": pi_factor}
    return replace(args, **changes)  # type: ignore[arg-type]
