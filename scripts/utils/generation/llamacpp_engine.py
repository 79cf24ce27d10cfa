"""The llama.cpp engine: GGUF files, answered in batches like any other model.

llama-cpp-python's own class runs one text at a time and samples in its own way. Here its bindings only compute: every
slot is a sequence in one llama.cpp cache, and scheduling, sampling and text are those of the other engines.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.arguments import InferenceArguments
from ..core.errors import InputError
from ..core.machine import available_bytes
from ..gguf.llamacpp import last_error, listen, require_llama_cpp
from ..gguf.metadata import gguf_parts, read_metadata
from ..gguf.tokenizer import check_same_tokens, load_gguf_tokenizer
from ..models.rope import gguf_rope_config, llama_cpp_rope_parameters, scale_rope
from ..text.tokenizer import load_tokenizer
from .batching import BatchScheduler
from .engine import BASE, Request, TokenSequence
from .transformers_engine import DecodingEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BATCH = 2048  # tokens that llama.cpp is given at a time
PHYSICAL_BATCH = 512  # tokens that it computes at a time; memory grows with it
EMBEDDING_BATCH = 128  # each of its tokens has logits too, which llama.cpp cannot leave out
MOST_SLOTS = 256  # sequences in one of llama.cpp's caches
CACHE_SHARE = 0.5  # of the free memory, for keys and values
ALL_F32 = 0  # general.file_type of a file in full precision


# ---------------------------------------------------------------- the model


class GgufModel:
    """A GGUF file loaded by llama.cpp, with a cache of slots like cache.SlotCache.

    A token of the cache can belong to several slots, so that a beginning they share is stored once. A slot's sequence
    in llama.cpp changes when slots are swapped; nothing is copied.

    Attributes:
        end_ids: the tokens that llama.cpp itself ends answers at, by the file's metadata or their names.
        tokens: of each slot, the tokens whose keys and values stand in it.
        capacity: tokens that all slots together can hold.
    """

    def __init__(
        self, path: Path, num_slots: int, capacity: int, *, threads: int, on_gpu: bool, **settings: Any
    ) -> None:
        """`settings`: of llama.cpp's context. Raises: InputError if llama.cpp refuses file or sizes."""
        import llama_cpp

        self._library: Any = llama_cpp
        listen()  # llama.cpp writes its reasons to a log only, and returns nothing
        llama_cpp.llama_backend_init()
        model_settings = llama_cpp.llama_model_default_params()
        model_settings.n_gpu_layers = -1 if on_gpu else 0  # -1: all
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_settings)
        if not self._model:
            raise InputError(f"llama.cpp cannot read {path.name}: {last_error()}")
        kinds = (
            llama_cpp.llama_model_is_recurrent,
            llama_cpp.llama_model_is_hybrid,
            llama_cpp.llama_model_has_encoder,
        )
        # A recurrent state cannot be cut back to a shorter text, which going on from a shared prefix needs.
        if any(is_kind(self._model) for is_kind in kinds):
            raise InputError(
                f"{path.name} is no decoder that keeps keys and values for each token; only those work here"
            )
        self._settings = {"n_threads": threads, "n_threads_batch": threads, "offload_kqv": on_gpu, **settings}
        self._context = self._open(
            n_ctx=capacity, n_seq_max=num_slots, n_outputs_max=num_slots, n_batch=BATCH, n_ubatch=PHYSICAL_BATCH
        )
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._embedder: Any = None  # a context of its own, made when it is first asked for: few servers embed
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(vocabulary)
        is_end = llama_cpp.llama_vocab_is_eog
        self.end_ids = [index for index in range(self.vocab_size) if is_end(vocabulary, index)]
        self.hidden_size: int = llama_cpp.llama_model_n_embd(self._model)
        self.capacity = capacity
        self.tokens: list[list[int]] = [[] for _ in range(num_slots)]
        self._seq_ids = list(range(num_slots))  # of each slot; swapping slots exchanges these and no keys
        self._batch = _Batch(llama_cpp, BATCH)

    def _open(self, **sizes: Any) -> Any:
        """A context, llama.cpp's word for a cache and what computes with it."""
        settings = self._library.llama_context_default_params()
        # One store for all sequences: tokens can belong to several, and a long text can use what others leave.
        for name, value in {"kv_unified": True, **self._settings, **sizes}.items():
            setattr(settings, name, value)
        context = self._library.llama_init_from_model(self._model, settings)
        if not context:
            raise InputError(
                f"llama.cpp could not make room for {sizes['n_ctx']} tokens: {last_error()}; pass a smaller "
                "--max_context or --max_batch_size"
            )
        return context

    def close(self) -> None:
        """Free what llama.cpp holds."""
        # Contexts before the model they belong to, or llama.cpp reads freed memory.
        for context in (self._embedder, self._context):
            if context:
                self._library.llama_free(context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._embedder = self._context = self._model = None

    # ------------------------------------------------------------ computing

    def forward(self, first: int, rows: Sequence[Sequence[int]]) -> Tensor:
        """Compute the next tokens of the slots first, first + 1, ...; one at least each.

        Returns: logits after the last token of each row, (B, V) float32, valid until the next call.
        """
        ids: list[int] = []
        places: list[int] = []
        seq_ids: list[int] = []
        ends: list[int] = []
        # llama.cpp takes tokens of any sequences in one batch, so rows of different lengths need no padding.
        for slot, row in enumerate(rows, first):
            start = len(self.tokens[slot])
            ids += row
            places += range(start, start + len(row))
            seq_ids += [self._seq_ids[slot]] * len(row)
            ends.append(len(ids) - 1)
        blocks = []
        for begin in range(0, len(ids), BATCH):
            part = slice(begin, begin + BATCH)
            wanted = [end - begin for end in ends if begin <= end < begin + BATCH]
            self._batch.fill(ids[part], places[part], seq_ids[part], wanted)
            try:
                self._decode(self._context)
            except RuntimeError:
                # Nobody knows how much of a batch is in the cache after a failure.
                self._library.llama_memory_clear(self._memory, False)
                self.tokens = [[] for _ in self.tokens]
                raise
            if wanted:
                pointer = self._library.llama_get_logits(self._context)
                block = torch.from_numpy(np.ctypeslib.as_array(pointer, (len(wanted), self.vocab_size)))
                # It is llama.cpp's own memory, which the next llama_decode overwrites.
                blocks.append(block.clone() if len(ids) > BATCH else block)
        for slot, row in enumerate(rows, first):
            self.tokens[slot] += row
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _decode(self, context: Any) -> None:
        if status := self._library.llama_decode(context, self._batch.struct):
            raise RuntimeError(f"llama.cpp failed with status {status}: {last_error()}")

    def embed(self, prompt: Sequence[int], context: int) -> Tensor:
        """The mean of the last layer's states (after its norm) over a prompt's tokens, of length 1: (H,) float32."""
        library = self._library
        if self._embedder is None:
            self._embedder = self._open(
                n_ctx=context,
                embeddings=True,
                pooling_type=library.LLAMA_POOLING_TYPE_NONE,  # all states: the mean over batches is taken here
                n_batch=EMBEDDING_BATCH,
                n_ubatch=EMBEDDING_BATCH,
                n_outputs_max_per_seq=0,
            )
        library.llama_memory_clear(library.llama_get_memory(self._embedder), False)
        total: np.ndarray = np.zeros(self.hidden_size, np.float32)
        for begin in range(0, len(prompt), EMBEDDING_BATCH):
            ids = prompt[begin : begin + EMBEDDING_BATCH]
            self._batch.fill(ids, range(begin, begin + len(ids)), [0] * len(ids), range(len(ids)))
            self._decode(self._embedder)
            pointer = library.llama_get_embeddings(self._embedder)
            total += np.ctypeslib.as_array(pointer, (len(ids), self.hidden_size)).sum(0)
        return torch.nn.functional.normalize(torch.from_numpy(total), dim=0)

    # ------------------------------------------------------------ slots, see cache.SlotCache

    def truncate(self, slot: int, length: int) -> None:
        """Forget what comes after the first `length` tokens of a slot."""
        self._library.llama_memory_seq_rm(self._memory, self._seq_ids[slot], length, -1)  # -1: to the end
        del self.tokens[slot][length:]

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin with the first `length` tokens of another, and hold nothing else."""
        if source != target:
            self.truncate(target, 0)  # copying adds to what a sequence has
            one, other = self._seq_ids[source], self._seq_ids[target]
            self._library.llama_memory_seq_cp(self._memory, one, other, 0, length)
            self.tokens[target] = self.tokens[source][:length]
        self.truncate(target, length)

    def swap(self, one: int, other: int) -> None:
        """Exchange two slots."""
        self.tokens[one], self.tokens[other] = self.tokens[other], self.tokens[one]
        seq_ids = self._seq_ids
        seq_ids[one], seq_ids[other] = seq_ids[other], seq_ids[one]


class _Batch:
    """llama.cpp's llama_batch, filled through numpy."""

    def __init__(self, library: Any, size: int) -> None:
        self._ids: np.ndarray = np.zeros(size, np.int32)
        self._places: np.ndarray = np.zeros(size, np.int32)
        self._seq_ids: np.ndarray = np.zeros(size, np.int32)
        self._ones: np.ndarray = np.ones(size, np.int32)
        self._wanted: np.ndarray = np.zeros(size, np.int8)
        # Each token names its sequences by a pointer to them; it has one.
        self._pointers: np.ndarray = np.arange(size, dtype=np.uintp) * self._seq_ids.itemsize
        self._pointers += self._seq_ids.ctypes.data
        self.struct = library.llama_batch()
        arrays = {"token": self._ids, "pos": self._places, "n_seq_id": self._ones, "seq_id": self._pointers}
        arrays["logits"] = self._wanted
        kinds = dict(self.struct._fields_)
        for name, array in arrays.items():
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def fill(self, ids: Sequence[int], places: Sequence[int], seq_ids: Sequence[int], wanted: Sequence[int]) -> None:
        """Tokens, their positions and sequences; `wanted`: the numbers of those whose logits are wanted."""
        count = len(ids)
        self._ids[:count], self._places[:count], self._seq_ids[:count] = ids, places, seq_ids
        self._wanted[:count] = 0
        self._wanted[list(wanted)] = 1
        self.struct.n_tokens = count


# ---------------------------------------------------------------- the engine


class LlamaCppScheduler(BatchScheduler):
    """BatchScheduler on a GgufModel."""

    def __init__(self, model: GgufModel) -> None:
        super().__init__(model, len(model.tokens), cache=model)

    def _forward(self, first: int, tokens: Sequence[Sequence[int]]) -> Tensor:
        self._forget(sum(map(len, tokens)))  # before: llama.cpp fails where there is no room
        for slot in range(first, first + len(tokens)):
            self._used[slot] = self.counts["steps"]
        logits: Tensor = self.model.forward(first, tokens)
        # Where this is one of several passes of a step, the next one overwrites it.
        return logits if len(tokens) == len(self._rows) else logits.clone()

    def _forget(self, coming: int) -> None:
        """Make room in the cache: slots that nobody uses go first, those unused for longest before others."""
        # A shared beginning counts for every slot here, though it is stored once: more is forgotten than need be.
        excess = coming + sum(map(len, self._cache.tokens)) - self.model.capacity
        for slot in sorted(range(len(self._rows), self.max_batch_size), key=self._used.__getitem__):
            if excess <= 0:
                break
            excess -= len(self._cache.tokens[slot])
            self._cache.truncate(slot, 0)

    def _fits(self, sequence: TokenSequence) -> bool:
        # By the most they may come to need, so that no answer that has begun runs out of cache.
        sequences = [row.sequence for row in self._rows if not row.guides]
        return sum(_most_tokens(other.request, other.room) for other in [*sequences, sequence]) <= self.model.capacity


def _most_tokens(request: Request, room: int) -> int:
    """Places in the cache that a request may come to need."""
    negative = request.negative_prompt if request.settings.guidance_scale > 1 else None
    return len(request.prompt) + room + (0 if negative is None else len(negative) + room)


class LlamaCppEngine(DecodingEngine):
    """An Engine on a GGUF file."""

    name = "llama.cpp"

    def __init__(
        self, model: GgufModel, tokenizer: PreTrainedTokenizerBase, template: str | None, context: int
    ) -> None:
        self._model = model
        super().__init__({BASE: LlamaCppScheduler(model)}, tokenizer, template, context, model.end_ids)

    def check(self, request: Request) -> int:
        room = super().check(request)
        if (most := _most_tokens(request, room)) > self._model.capacity:
            raise InputError(
                f"prompt, negative prompt and answers may have {most} tokens together, the cache "
                f"{self._model.capacity}; shorten them, or pass a smaller --max_context so that more fit into memory"
            )
        return room

    def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Raises: InputError for a prompt that is empty or longer than the context."""
        assert self.context is not None
        for prompt in prompts:
            if not 0 < len(prompt) <= self.context:
                raise InputError(f"a text of {len(prompt)} tokens has no embedding; need 1 to {self.context}")
        # One at a time: answers that are being written go on between them.
        return torch.stack([self._call(partial(self._model.embed, prompt, self.context)) for prompt in prompts])

    def close(self) -> None:
        super().close()  # first, since it waits for the thread that computes with the model
        self._model.close()


# ---------------------------------------------------------------- loading


class GgufFile:
    """A GGUF file whose weights are not read yet.

    Attributes:
        tokenizer: --tokenizer_path, else the file's own.
        context: tokens of prompt and answer together that the model can take.
    """

    def __init__(self, args: InferenceArguments) -> None:
        """Raises: InputError if it cannot be used, or not in the way asked for."""
        require_llama_cpp("--engine llama.cpp")
        _refuse_other_settings(args)
        self.path, self._only_cpu = find_gguf_file(args.model_name_or_path or ""), args.only_cpu
        self.metadata = read_metadata(self.path)
        try:
            self._rope = _rope_settings(args, self.metadata)
            self._token_numbers = cache_numbers(self.metadata)
            if args.tokenizer_name_or_path:
                self.tokenizer = load_tokenizer(args.tokenizer_name_or_path)
            else:
                self.tokenizer = load_gguf_tokenizer(self.path, self.metadata)
        except KeyError as error:
            raise InputError(f"{self.path.name}: its metadata has no {error}; is it a language model?") from None
        self.context: int = self._rope.pop("window")  # what is left are llama.cpp's own settings
        check_same_tokens(self.path, self.tokenizer)

    def load(self, template: str | None, max_batch_size: int, context: int | None = None) -> LlamaCppEngine:
        """Read the weights.

        Args:
            template: the chat template; None for plain text.
            max_batch_size, context: as of loading.EnginePlan.load.
        """
        import llama_cpp

        if max_batch_size > MOST_SLOTS:
            raise InputError(f"--max_batch_size {max_batch_size}: llama.cpp answers {MOST_SLOTS} at once at most")
        window = min(self.context, context or self.context)
        on_gpu = llama_cpp.llama_supports_gpu_offload() and not self._only_cpu
        # Keys and values are as exact as the weights; llama.cpp's flash attention on the CPU rounds to float16.
        exact = self.metadata.get("general.file_type") == ALL_F32
        value_type = llama_cpp.GGML_TYPE_F32 if exact else llama_cpp.GGML_TYPE_F16
        attention = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED if exact else llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        bytes_per_token = self._token_numbers * (4 if exact else 2)
        free_bytes = _free_bytes(on_gpu) - sum(part.stat().st_size for part in gguf_parts(self.path))
        capacity = choose_capacity(window, max_batch_size, bytes_per_token, free_bytes)
        model = GgufModel(
            self.path,
            max_batch_size,
            capacity,
            threads=torch.get_num_threads(),
            on_gpu=on_gpu,
            type_k=value_type,
            type_v=value_type,
            flash_attn_type=attention,
            **self._rope,
        )
        logger.info(
            "%s loaded by llama.cpp: keys and values of %d tokens, %.2f GB",
            *(self.path.name, capacity, capacity * bytes_per_token / 1e9),
        )
        return LlamaCppEngine(model, self.tokenizer, template, window)


def find_gguf_file(name: str) -> Path:
    """The GGUF file, or the one in a folder. Raises: InputError if there is none, or more than one."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"--base_model {name}: no such file or folder; --engine llama.cpp needs a GGUF file")
    # Of a file in parts llama.cpp is given the first.
    found = [file for file in sorted(path.glob("*.gguf")) if "-of-" not in file.stem or "-00001-of-" in file.stem]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        remedy = "pass one of them" if found else "make one with export_gguf.py"
        raise InputError(f"--base_model {name}: need one GGUF file, the folder has {names}; {remedy}")
    return found[0]


def _refuse_other_settings(args: InferenceArguments) -> None:
    if args.adapter_name_or_path:
        raise InputError("--engine llama.cpp has no adapters: put it into the GGUF file, export_gguf.py --lora_model")
    if args.load_in_kbits != 16:
        raise InputError("--engine llama.cpp reads files as they are: quantise with export_gguf.py --types q4_k_m")


def _rope_settings(args: InferenceArguments, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a llama.cpp context for --rope_scaling, none if it is not given; and "window", in tokens."""
    if args.rope_scaling == "none":
        return {"window": int(metadata[f"{metadata['general.architecture']}.context_length"])}
    config = gguf_rope_config(metadata)
    scale_rope(config, args)
    return {**llama_cpp_rope_parameters(config), "window": config.max_position_embeddings}


def cache_numbers(metadata: Mapping[str, Any]) -> int:
    """Numbers that a token has in the cache."""
    keys = {key.partition(".")[2]: value for key, value in metadata.items()}  # without the architecture's name
    heads = keys["attention.head_count"]
    groups = keys.get("attention.head_count_kv", heads)
    layers = keys["block_count"]
    total = sum(groups) if isinstance(groups, list) else layers * groups  # a list: one for each layer
    usual = keys["embedding_length"] // (max(heads) if isinstance(heads, list) else heads)
    width = keys.get("attention.key_length", usual) + keys.get("attention.value_length", usual)
    return int(total * width)


def choose_capacity(window: int, max_batch_size: int, bytes_per_token: int, free_bytes: int) -> int:
    """Tokens that the cache should hold: a window for each slot, or as many as memory allows.

    Raises: InputError if memory is too small for a window.
    """
    possible = int(CACHE_SHARE * free_bytes) // bytes_per_token
    if possible < window:
        raise InputError(
            f"keys and values of {window} tokens need {window * bytes_per_token / 1e9:.1f} GB, which is more than "
            f"half of the {max(0, free_bytes) / 1e9:.1f} GB that are free beside the weights; pass a smaller "
            "--max_context"
        )
    return min(window * max_batch_size, possible)


def _free_bytes(on_gpu: bool) -> int:
    if on_gpu and torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    return available_bytes()
