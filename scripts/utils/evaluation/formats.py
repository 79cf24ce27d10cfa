"""Formats: what a model becomes in each way of storing it: size, perplexity, bits per byte, time of a token.

Every format scores the same token ids in the same windows, so that their figures can be compared.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.arguments import ModelArguments
from ..core.errors import InputError
from ..core.records import iter_document_batches, list_data_files
from ..gguf.llamacpp import compute_logits, describe_file, open_model, require_llama_cpp
from ..models.loading import load_model
from ..models.quantization import (
    METHODS,
    Scheme,
    check_scheme,
    describe_weights,
    device_map,
    load_quantized,
    quantize_model,
    save_weights,
    stored_dtype,
)
from ..text.tokenizer import encode_texts, start_ids, token_byte_lengths
from ..weights.reader import open_checkpoint
from .likelihood import LikelihoodScorer, LlamaCppScorer, Window, cut_windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FLOATS = ("float32", "bfloat16")
GGUF_FORMATS = ("f16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
FORMATS = (*FLOATS, *METHODS, *GGUF_FORMATS)
BATCH_TOKENS = 2048  # scored at once
TIMED_TOKENS = 32  # after a prompt as long
MAX_F16_DIFFERENCE = 1e-3  # of the perplexity, between float32 in transformers and f16 in llama.cpp; measured: 5e-5


@dataclass(frozen=True)
class ScoredText:
    """Token ids in rows, each a BOS (else the first token) that is not scored, and tokens that are."""

    rows: list[list[int]]
    num_bytes: int  # UTF-8 bytes of the scored tokens

    @property
    def num_tokens(self) -> int:
        return sum(len(row) - 1 for row in self.rows)


def read_scored_text(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    window: int = 512,
    max_tokens: int | None = None,
) -> ScoredText:
    """Cut every document of some files by itself into rows of at most `window` tokens.

    Args:
        names: files or folders (txt: a document a line; json, jsonl, parquet).
        max_tokens: about so many are kept, in rows spread evenly over the text; None: all.
    Raises: InputError if the window does not fit, or there is no text.
    """
    if not 2 <= window <= config.max_position_embeddings:
        raise InputError(f"--window {window}: need 2 to {config.max_position_embeddings} tokens, the model's context")
    pieces = [piece for name in names for file in list_data_files(name) for piece in _cut(file, tokenizer, window)]
    if not pieces:
        raise InputError(f"--texts {' '.join(names)}: no text to score")
    count = len(pieces)
    if max_tokens is not None:
        count = min(count, max(1, round(max_tokens * count / sum(len(row) - 1 for row, _ in pieces))))
    pieces = [pieces[rank * len(pieces) // count] for rank in range(count)]
    return ScoredText([row for row, _ in pieces], sum(num_bytes for _, num_bytes in pieces))


def _cut(file: Path, tokenizer: PreTrainedTokenizerBase, window: int) -> Iterator[tuple[list[int], int]]:
    """Rows of a file and the bytes of their scored tokens."""
    start, sizes = start_ids(tokenizer), token_byte_lengths(tokenizer)
    for batch in iter_document_batches(file):
        for text, ids in zip(batch, encode_texts(tokenizer, batch), strict=True):
            extra = len(text.encode()) - int(sizes[ids].sum())  # the space before a text, which is no part of it
            for number, piece in enumerate(cut_windows(ids, start, window)):
                yield list(piece.ids), int(sizes[piece.ids[1:]].sum()) + (extra if number == 0 else 0)


# ---------------------------------------------------------------- transformers


def model_nll(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> float:
    """Negative log-likelihood, in nats, of all tokens of `rows` but the first ones; takes the model's lm_head over."""
    return sum(LikelihoodScorer(model, BATCH_TOKENS).window_losses([Window(row, 1) for row in rows]))


@torch.no_grad()
def model_milliseconds(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """Median time of a token when they come one at a time, with a cache; the first half of `ids` is the prompt."""
    half = len(ids) // 2
    output = model(input_ids=torch.tensor([ids[:half]], device=model.device), use_cache=True)
    times = []
    for token in ids[half:]:
        started = time.perf_counter()
        last = torch.tensor([[token]], device=model.device)
        output = model(input_ids=last, past_key_values=output.past_key_values, use_cache=True)
        int(output.logits[0, -1].argmax())  # waits for a GPU
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


# ---------------------------------------------------------------- llama.cpp


def gguf_nll(model: Any, rows: Sequence[Sequence[int]]) -> float:
    """As model_nll."""
    return sum(LlamaCppScorer(model).window_losses([Window(row, 1) for row in rows]))


def gguf_milliseconds(model: Any, ids: Sequence[int]) -> float:
    """As model_milliseconds."""
    half = len(ids) // 2
    compute_logits(model, ids[:half])
    times = []
    for token in ids[half:]:
        started = time.perf_counter()
        model.eval([token])
        int(model.scores[model.n_tokens - 1].argmax())
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


# ---------------------------------------------------------------- the table


@dataclass
class FormatTable:
    """A model, the text it is scored on, and the files that are made for it."""

    base: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    text: ScoredText
    gguf_files: Mapping[str, Path]  # of the GGUF formats that are there
    work: Path | None = None  # where quantised folders stand while they are measured; None: the system's place
    calibration: Tensor | None = None  # for gptq and awq, see read_calibration

    def row(self, name: str) -> dict[str, Any]:
        """One line of the table: a format's figures; those that cannot be measured here are None, and `note` says why.

        Sizes are in 1e9 bytes, perplexity is per token.
        """
        row: dict[str, Any] = dict.fromkeys(("size_gb", "bits_per_weight", "perplexity", "bits_per_byte"))
        row = {"format": name, **row, "ms_per_token": None, "note": ""}
        measure: Callable[[str, dict[str, Any]], None] = self._measure_gguf
        if name in FLOATS:
            measure = self._measure_float
        elif name in METHODS:
            measure = self._measure_quantized
        try:
            measure(name, row)
        except InputError as error:
            row["note"] = "; ".join(filter(None, (row["note"], str(error))))
        return row

    def _measure_float(self, name: str, row: dict[str, Any]) -> None:
        arguments = ModelArguments(str(self.base))
        arguments.dtype = name  # type: ignore[assignment]
        model = load_model(arguments, getattr(torch, name), device_map()).eval()
        self._set_size(row, sum(parameter.nbytes for parameter in model.parameters()))
        self._score_model(row, model)

    def _measure_quantized(self, name: str, row: dict[str, Any]) -> None:
        scheme = Scheme(name)
        check_scheme(scheme, self.base, self.config)
        if scheme.needs_calibration and self.calibration is None:
            raise InputError("needs text to calibrate on: pass --calibration_data")
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            model = quantize_model(self.base, scheme, stored_dtype(self.base), self.calibration, self.tokenizer)
            save_weights(model, Path(folder))
            del model
            self._set_size(row, describe_weights(self.base, Path(folder))["size_gb"] * 1e9)
            self._score_model(row, load_quantized(folder))

    def _measure_gguf(self, name: str, row: dict[str, Any]) -> None:
        if name not in self.gguf_files:
            require_llama_cpp(f"making {name}")
            raise InputError("no GGUF file of this type was made")
        file = self.gguf_files[name]
        self._set_size(row, file.stat().st_size)
        described = describe_file(file, name.upper())
        row["types"] = described["tensor_types"]
        if others := len(described["fallbacks"]):
            row["note"] = f"weights in another type, as their rows do not fill {name}'s blocks: {others}"
        require_llama_cpp("measuring perplexity")
        context = max(map(len, [*self.text.rows, self._timed_ids()]))
        with open_model(file, torch.get_num_threads(), context) as model:
            self._set_quality(row, gguf_nll(model, self.text.rows))
            row["ms_per_token"] = gguf_milliseconds(model, self._timed_ids())

    def _score_model(self, row: dict[str, Any], model: PreTrainedModel) -> None:
        self._set_quality(row, model_nll(model, self.text.rows))
        row["ms_per_token"] = model_milliseconds(model, self._timed_ids())

    def _set_size(self, row: dict[str, Any], num_bytes: float) -> None:
        weights = sum(math.prod(shape) for shape in open_checkpoint(self.base).shapes.values())
        row |= {"size_gb": num_bytes / 1e9, "bits_per_weight": 8 * num_bytes / weights}

    def _set_quality(self, row: dict[str, Any], nll: float) -> None:
        row["perplexity"] = math.exp(nll / self.text.num_tokens)
        row["bits_per_byte"] = nll / math.log(2) / self.text.num_bytes

    def _timed_ids(self) -> list[int]:
        """Ids of the text, in their order, for measuring time."""
        ids = [token for row in self.text.rows for token in row]
        length = min(2 * TIMED_TOKENS, int(self.config.max_position_embeddings))
        return (ids * math.ceil(length / len(ids)))[:length]


def check_engines_agree(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The relative difference between the perplexities of float32 and GGUF f16; None if one was not measured.

    Raises: InputError if it is larger than rounding: then the two did not score the same model or text.
    """
    measured = {row["format"]: row["perplexity"] for row in rows if row["perplexity"] is not None}
    if "float32" not in measured or "f16" not in measured:
        return None
    difference = abs(measured["f16"] / measured["float32"] - 1)
    if not difference <= MAX_F16_DIFFERENCE:
        raise InputError(
            f"perplexity is {measured['float32']:.4f} with float32 in transformers and {measured['f16']:.4f} with "
            f"GGUF f16 in llama.cpp, {100 * difference:.2f} % apart; at most {100 * MAX_F16_DIFFERENCE} % is "
            "rounding, so the GGUF file is another model"
        )
    return difference
