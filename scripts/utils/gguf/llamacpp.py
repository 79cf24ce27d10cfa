"""llama.cpp, through llama-cpp-python: opening GGUF files, its own quantiser, importance matrices.

The package is optional; nothing here imports it before it is needed. Where llama.cpp fails it may end the process it
runs in: whatever it does with files that nobody has tried yet runs in a process of its own (`separate_process`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf  # but neither torch nor what brings it in: every process of llama.cpp's own imports this module
import numpy as np
from gguf import GGMLQuantizationType

from ..core.errors import InputError
from ..core.workers import WorkerDied, one_worker

_ERROR = 4  # ggml's GGML_LOG_LEVEL_ERROR
_QUANTIZE_BUFFER = 256 << 20  # bytes of rows that llama.cpp holds at a time


def is_installed() -> bool:
    """Whether llama-cpp-python can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


def require_llama_cpp(purpose: str) -> None:
    """Raises: InputError if llama-cpp-python is not installed, or does not run on this processor."""
    if not is_installed():
        raise InputError(f"{purpose} needs llama-cpp-python: pip install -r requirements-llamacpp.txt")
    _try_out()


@functools.cache
def _try_out() -> None:
    """Let llama.cpp compute with every kind of weights: what it is built for is known by running it only.

    Raises: InputError if that ends its process.
    """
    with tempfile.TemporaryDirectory() as folder, separate_process(threads=2, context=32) as run:
        path = Path(folder) / "trial.gguf"
        _write_trial(path)
        run(compute_logits, path, list(range(24)))
        run(compute_logits, path, [1])  # one token takes other routines than many


def _write_trial(path: Path) -> None:
    """A model of one layer whose weights are zero, each of another type."""
    width, rows = 256, 256  # what processors have special routines for comes in blocks of such sizes
    kinds = [GGMLQuantizationType[name] for name in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS")]
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    tensors = {f"blk.0.{name}": kind for name, kind in zip(names, kinds, strict=True)}
    for name, kind in (tensors | {"token_embd": kinds[0], "output": kinds[5]}).items():
        shape = gguf.quant_shape_to_byte_shape((rows, width), kind)
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.uint8), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def listen() -> tuple[list[str], Any]:
    """(llama.cpp's error messages from the first call on, what collects them); it prints nothing any more."""
    import ctypes

    import llama_cpp

    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    return errors, collect


def last_error() -> str:
    errors, _ = listen()
    return errors[-1] if errors else "it gave no reason"


# ---------------------------------------------------------------- running


@contextlib.contextmanager
def separate_process(threads: int, context: int) -> Iterator[Callable[..., Any]]:
    """A process of llama.cpp's own, to call as run(task, path, *arguments) -> task(model, *arguments).

    The model of the last path stays open there. Args: of `open_model`.
    Raises (the call): InputError if the process died, or of the task.
    """
    with _own_process(_work_on_model, (threads, context)) as run:
        yield lambda task, path, *arguments: run((task, path, arguments))


@contextlib.contextmanager
def _own_process(function: Callable[[Any, Any], Any], state: Any) -> Iterator[Callable[[Any], Any]]:
    try:
        with one_worker(function, state) as run:
            yield run
    except WorkerDied as error:
        remedy = {
            "SIGILL": "it is built for another processor than this one; build it anew with `make setup-llamacpp`, "
            "which asks this processor first",
            "SIGKILL": "most likely for want of memory",
        }
        reason = remedy.get(str(error.signal), "the file, or a fault in llama.cpp; its own words stand above, if any")
        raise InputError(f"llama.cpp was ended by {error.signal or 'itself'}: {reason}") from None


def _work_on_model(state: tuple[int, int], work: tuple[Callable[..., Any], Path, tuple[Any, ...]]) -> Any:
    task, path, arguments = work
    return task(_opened(path, *state), *arguments)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, threads: int, context: int) -> Any:
    return _load_model(path, threads, context)  # closed when another takes its place, or with the process


@contextlib.contextmanager
def open_model(
    path: Path, threads: int, context: int | None = None, batch: int | None = None, **others: Any
) -> Iterator[Any]:
    """llama-cpp-python's Llama, closed at the end; it keeps the logits of every position.

    Args:
        context: tokens it can hold; None: the vocabulary alone is loaded, for `tokenize`.
        batch: tokens computed at once, and memory with them; None: all.
        others: further settings of Llama, such as rope.llama_cpp_rope_parameters.
    Raises: InputError if llama.cpp cannot read the file.
    """
    with contextlib.closing(_load_model(path, threads, context, batch, **others)) as model:
        yield model


def _load_model(path: Path, threads: int, context: int | None = None, batch: int | None = None, **others: Any) -> Any:
    import llama_cpp

    listen()
    settings: dict[str, Any] = {"vocab_only": True}
    if context is not None:
        batch = min(context, batch or context)
        settings = {"n_ctx": context, "n_batch": batch, "n_ubatch": batch, "logits_all": True}
        settings |= {"n_threads": threads, "n_threads_batch": threads}
        # The binding's own defaults would override what the file says about YaRN.
        settings |= {"yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0}
        # Keys and values in float32: their rounding is no property of the file.
        settings |= {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, **others}
    try:
        return llama_cpp.Llama(str(path), verbose=False, **settings)
    except (ValueError, RuntimeError):
        raise InputError(f"llama.cpp cannot read {path.name}: {last_error()}") from None


def tokenize(model: Any, text: str) -> list[int]:
    """The ids of `text` as text: no BOS, and what looks like a special token is ordinary text."""
    ids: list[int] = model.tokenize(text.encode(), add_bos=False, special=False)
    return ids


def compute_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Logits after every token of `ids`: (tokens, vocabulary) float32, valid until the next call."""
    model.reset()
    model.eval(ids)
    logits: np.ndarray = model.scores[: len(ids)]
    return logits


def continue_greedily(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """`ids` and the `count` tokens that llama.cpp finds likeliest after them, end tokens included."""
    logits, result = compute_logits(model, ids), list(ids)
    for _ in range(count):
        result.append(int(logits[-1].argmax()))
        model.eval(result[-1:])
        logits = model.scores[: len(result)]
    return result


# ---------------------------------------------------------------- llama.cpp's own quantiser


def quantize(source: Path, target: Path, file_type: str, imatrix: dict[str, np.ndarray] | None, threads: int) -> None:
    """Make a file of a type in QUANTIZED_TYPES from a full-precision one. Raises: InputError if llama.cpp fails."""
    from .file import file_type_number

    with _own_process(_quantize, (source, target, threads)) as run:
        run((file_type, int(file_type_number(file_type)), imatrix))


def _quantize(state: tuple[Path, Path, int], work: tuple[str, int, dict[str, np.ndarray] | None]) -> None:
    import ctypes

    import llama_cpp

    (source, target, threads), (file_type, number, imatrix) = state, work
    listen()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, threads
    if hasattr(params, "max_buf_size"):
        params.max_buf_size = _QUANTIZE_BUFFER
    if imatrix is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()  # the last one, all zero, ends the list
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise InputError(f"llama.cpp could not quantise to {file_type}: {last_error()}")


def read_imatrix(path: str | Path) -> dict[str, np.ndarray]:
    """Importance of every input column by tensor name, mean of squares: (experts * columns,) float32.

    Reads llama-imatrix's GGUF files and its older .dat files. Raises: InputError if it is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--imatrix {path}: no such file")
    with open(path, "rb") as file:
        magic = file.read(4)
    try:
        return _read_imatrix_gguf(path) if magic == b"GGUF" else _read_imatrix_dat(path.read_bytes())
    except (ValueError, IndexError, KeyError, struct.error, UnicodeDecodeError):
        raise InputError(
            f"--imatrix {path} is no importance matrix, or truncated; make it with llama-imatrix"
        ) from None


def _read_imatrix_gguf(path: Path) -> dict[str, np.ndarray]:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".in_sum2"):
            name = name.removesuffix(".in_sum2")
            counts = np.array(tensors[f"{name}.counts"].data, np.float32).reshape(-1, 1)
            sums = np.array(tensor.data, np.float32).reshape(len(counts), -1)
            # An expert that no token reached has no statistics: every column counts the same.
            found[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0).astype(np.float32).ravel()
    if not found:
        raise ValueError(path)
    return found


def _read_imatrix_dat(data: bytes) -> dict[str, np.ndarray]:
    """Per entry: length and bytes of the name, calls, number of values, their sums. All int32 and float32."""
    found = {}
    (count,), position = struct.unpack_from("<i", data), 4
    if not 0 < count < 1 << 20:
        raise ValueError(count)
    for _ in range(count):
        (length,) = struct.unpack_from("<i", data, position)
        name = data[position + 4 : position + 4 + length].decode()
        calls, size = struct.unpack_from("<ii", data, position + 4 + length)
        position += 12 + length
        values = np.frombuffer(data, "<f4", size, position)
        found[name] = (values / max(calls, 1)).astype(np.float32)
        position += 4 * size
    return found


# ---------------------------------------------------------------- what a file holds


def describe_file(path: Path, file_type: str) -> dict[str, Any]:
    """file.describe_types of a file that llama.cpp may have written; reads its whole header, which is slow."""
    from .file import describe_types

    tensors = gguf.GGUFReader(path).tensors
    return describe_types(((t.name, t.shape.tolist()[::-1], t.tensor_type.name) for t in tensors), file_type)
