"""Meta's pth layout: folders of consolidated.NN.pth and params.json, read as Hugging Face models.

Meta's code cuts a model into parts for as many GPUs: wq, wk, wv, w1, w3 and output by rows, wo and w2 by columns,
tok_embeddings by columns (Llama 1 and 2) or rows (Llama 3); norms stand whole in every part. Its rotary embedding
turns neighbouring rows of a head, that of transformers row i and row i + head_dim/2, so that wq and wk have their
rows in another order. `meta_writer` writes the layout.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import read_json
from .names import EMBEDDING, HEAD
from .reader import Checkpoint, TensorInfo, read_bin_header, row_shape
from .streams import FileHasher

logger = logging.getLogger(__name__)

PARAMS = "params.json"
_PART = re.compile(r"consolidated\.(\d\d)\.pth")

LLAMA_THETA, LLAMA3_THETA, CODE_LLAMA_THETA = 10_000.0, 500_000.0, 1_000_000.0
LLAMA3_VOCAB, LLAMA3_BOS, LLAMA3_EOS = 128_256, 128_000, 128_001
# use_scaled_rope of Llama 3.1 and later; the factor is 8, 32 for the small models of Llama 3.2
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LARGEST_LLAMA32 = 3072  # dim of Llama 3.2 3B


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


_REQUIRED = {"dim": _is_count, "n_layers": _is_count, "n_heads": _is_count, "norm_eps": _is_positive}
_OPTIONAL = {"n_kv_heads": _is_count, "rope_theta": _is_positive, "rope_scaling_factor": _is_positive}
# Known, and not needed here: sizes that the tensors' shapes say as well, and how to run the model.
_OTHERS = ("vocab_size", "multiple_of", "ffn_dim_multiplier", "use_scaled_rope", "max_seq_len", "max_batch_size")


@dataclass(frozen=True)
class MetaWeight:
    """A weight under both its names."""

    meta: str
    name: str
    shape: tuple[int, ...]  # of the whole
    split: int | None  # the dimension along which parts are cut; None: every part has all of it
    rotary: bool = False  # its rows are in rotary order


@dataclass(frozen=True)
class LlamaSizes:
    """What decides the shapes of a Llama model."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def weights(self, vocab_split: int) -> list[MetaWeight]:
        """All weights; tok_embeddings is cut along dimension `vocab_split`."""
        dim, ffn, kv = self.dim, self.ffn, self.kv_heads * self.head_dim
        weights = [
            MetaWeight("tok_embeddings.weight", EMBEDDING, (self.vocab, dim), vocab_split),
            MetaWeight("norm.weight", "model.norm.weight", (dim,), None),
            MetaWeight("output.weight", HEAD, (self.vocab, dim), 0),
        ]
        for layer in range(self.layers):
            meta, name = f"layers.{layer}", f"model.layers.{layer}"
            weights += [
                MetaWeight(f"{meta}.attention.wq.weight", f"{name}.self_attn.q_proj.weight", (dim, dim), 0, True),
                MetaWeight(f"{meta}.attention.wk.weight", f"{name}.self_attn.k_proj.weight", (kv, dim), 0, True),
                MetaWeight(f"{meta}.attention.wv.weight", f"{name}.self_attn.v_proj.weight", (kv, dim), 0),
                MetaWeight(f"{meta}.attention.wo.weight", f"{name}.self_attn.o_proj.weight", (dim, dim), 1),
                MetaWeight(f"{meta}.feed_forward.w1.weight", f"{name}.mlp.gate_proj.weight", (ffn, dim), 0),
                MetaWeight(f"{meta}.feed_forward.w2.weight", f"{name}.mlp.down_proj.weight", (dim, ffn), 1),
                MetaWeight(f"{meta}.feed_forward.w3.weight", f"{name}.mlp.up_proj.weight", (ffn, dim), 0),
                MetaWeight(f"{meta}.attention_norm.weight", f"{name}.input_layernorm.weight", (dim,), None),
                MetaWeight(f"{meta}.ffn_norm.weight", f"{name}.post_attention_layernorm.weight", (dim,), None),
            ]
        return weights


def to_huggingface_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads from Meta's rotary order (pairs side by side) to that of transformers (halves).

    Source: Su et al. 2021, eq. 15, turns (2i, 2i + 1); transformers' rotate_half turns (i, i + head_dim/2).
    """
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def to_meta_rows(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_huggingface_rows`."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


# ---------------------------------------------------------------- reading


class _Part(Checkpoint):
    """One consolidated.NN.pth under Meta's names."""

    def __init__(self, file: Path):
        infos = [info for info in read_bin_header(file) if not info.name.endswith("rope.freqs")]  # computed anew
        super().__init__(file.parent, {info.name: info for info in infos})
        self.file = file


class MetaCheckpoint(Checkpoint):
    """The weights of a Meta folder under Hugging Face's names; parts are joined and rows ordered as they are read.

    `params` is the content of params.json.
    """

    def __init__(
        self,
        folder: Path,
        params: dict[str, Any],
        sizes: LlamaSizes,
        weights: Sequence[MetaWeight],
        parts: Sequence[_Part],
    ):
        first = parts[0].tensors
        # In the order of the file, so that it is read from front to back.
        ordered = sorted(weights, key=lambda weight: first[weight.meta].offset or 0)
        super().__init__(
            folder,
            {w.name: TensorInfo(w.name, first[w.meta].dtype, w.shape, first[w.meta].file, None) for w in ordered},
        )
        self.params, self.sizes = params, sizes
        self._weights = {weight.name: weight for weight in weights}
        self._parts = parts

    @property
    def files(self) -> list[Path]:
        return [part.file for part in self._parts]

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def read(self, name: str) -> Tensor:
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_start(self, name: str, count: int) -> memoryview:
        info = self.tensors[name]
        rows = self.read_rows(name, 0, min(math.ceil(count / row_shape(info.shape)[1]), row_shape(info.shape)[0]))
        return rows.reshape(-1)[:count].contiguous().view(torch.uint8).numpy().data

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._rows(name, start, stop, lambda part, meta, *block: part.read_rows(meta, *block))

    def scan_rows(self, name: str, start: int, stop: int, hasher: FileHasher | None = None) -> Tensor:
        return self._rows(name, start, stop, lambda part, meta, *block: part.scan_rows(meta, *block, hasher))

    def _rows(self, name: str, start: int, stop: int, read: Callable[..., Tensor]) -> Tensor:
        weight = self._weights[name]
        if not weight.rotary:
            return self._join(weight, start, stop, read)
        head_dim = self.sizes.head_dim
        first, last = start // head_dim * head_dim, math.ceil(stop / head_dim) * head_dim
        rows = to_huggingface_rows(self._join(weight, first, last, read), head_dim)
        return rows[start - first : stop - first]

    def _join(self, weight: MetaWeight, start: int, stop: int, read: Callable[..., Tensor]) -> Tensor:
        """Rows `start` to `stop` of the whole weight, in Meta's order."""
        if weight.split == 0:
            pieces, begin = [], 0
            for part in self._parts:
                end = begin + part.shapes[weight.meta][0]
                if max(start, begin) < min(stop, end):
                    pieces.append(read(part, weight.meta, max(start, begin) - begin, min(stop, end) - begin))
                begin = end
            if not pieces:
                return torch.empty(0, weight.shape[1], dtype=self.tensors[weight.name].dtype)
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        pieces = [read(part, weight.meta, start, stop) for part in self._parts]
        if weight.split == 1:
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        for part, piece in zip(self._parts, pieces, strict=True):
            if not torch.equal(piece, pieces[0]):
                raise InputError(
                    f"{weight.meta} differs between {self._parts[0].file} and {part.file.name}: they are parts of "
                    "different models; download them again"
                )
        return pieces[0]


def is_meta_folder(folder: str | Path) -> bool:
    """True for a folder of consolidated.NN.pth files that is no Hugging Face model as well."""
    folder = Path(folder)
    return bool(_part_files(folder)) and not (folder / "config.json").is_file()


def open_meta_checkpoint(folder: str | Path) -> MetaCheckpoint:
    """Read the headers of a Meta model's parts, and check them against each other and params.json.

    Raises: InputError naming the part or setting that is missing, damaged or does not fit.
    """
    folder = Path(folder)
    found = _part_files(folder)
    if not found:
        raise InputError(f"no consolidated.00.pth in {folder}: pass the folder of a Llama model as Meta publishes it")
    if missing := [f"consolidated.{number:02d}.pth" for number in range(max(found)) if number not in found]:
        raise InputError(f"{folder} lacks {', '.join(missing)}; download the missing parts")
    params = _read_params(folder)
    parts = [_Part(file) for _, file in sorted(found.items())]
    weights, sizes = _match_weights(folder, params, parts)
    return MetaCheckpoint(folder, params, sizes, weights, parts)


def _part_files(folder: Path) -> dict[int, Path]:
    """{number: file} of the consolidated.NN.pth files."""
    matches = ((file, _PART.fullmatch(file.name)) for file in folder.glob("consolidated.*.pth"))
    return {int(match[1]): file for file, match in matches if match}


def _read_params(folder: Path) -> dict[str, Any]:
    path = folder / PARAMS
    if not path.is_file():
        raise InputError(f"{folder} has no {PARAMS}, which says how its weights are meant; download it from Meta too")
    params = read_json(path)
    params = params.get("model", params) if isinstance(params, dict) else params
    if not isinstance(params, dict):
        raise InputError(f"{path}: need an object with the model's settings, got {type(params).__name__}")
    if unknown := sorted(params.keys() - {*_REQUIRED, *_OPTIONAL, *_OTHERS}):
        raise InputError(f"{path} sets {', '.join(unknown)}, which no Llama 1, 2 or 3 text model has; cannot read it")
    wrong = [name for name, is_good in _REQUIRED.items() if not is_good(params.get(name))]
    wrong += [
        name for name, is_good in _OPTIONAL.items() if params.get(name) is not None and not is_good(params[name])
    ]
    if wrong:
        given = json.dumps({name: params.get(name) for name in wrong})
        raise InputError(f"{path}: need positive numbers for {', '.join(wrong)}, got {given}; download it again")
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    if params["dim"] % (2 * heads) or heads % kv_heads:
        raise InputError(
            f"{path}: dim {params['dim']}, n_heads {heads} and n_kv_heads {kv_heads} do not fit together; "
            "download it again"
        )
    return params


def _match_weights(
    folder: Path, params: dict[str, Any], parts: Sequence[_Part]
) -> tuple[list[MetaWeight], LlamaSizes]:
    """The weights and sizes that params.json and the shapes of the parts agree on."""
    embedding, query, gate = "tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"
    last = f"layers.{params['n_layers'] - 1}.attention.wq.weight"
    for part in parts:
        if absent := [name for name in (embedding, query, gate, last) if len(part.shapes.get(name, ())) != 2]:
            raise InputError(
                f"{part.file} holds no matrix {absent[0]}, which a Llama with {params['n_layers']} layers ({PARAMS}) "
                "has; download both again"
            )
    dim, per_part = params["dim"], parts[0].shapes[query][0]
    if per_part and dim % per_part == 0 and dim // per_part != len(parts):
        raise InputError(f"{folder} holds {len(parts)} of {dim // per_part} parts; download the others")
    vocab_split = 0 if parts[0].shapes[embedding][1] == dim else 1
    rows = [part.shapes[embedding][0] for part in parts]
    sizes = LlamaSizes(
        dim=dim,
        layers=params["n_layers"],
        heads=params["n_heads"],
        kv_heads=params.get("n_kv_heads") or params["n_heads"],
        ffn=sum(part.shapes[gate][0] for part in parts),
        vocab=rows[0] if vocab_split else sum(rows),
    )
    if params.get("vocab_size", -1) not in (-1, sizes.vocab):
        raise InputError(
            f"{folder / PARAMS} says vocab_size {params['vocab_size']}, tok_embeddings has {sizes.vocab} rows: they "
            "belong to different models"
        )
    weights = sizes.weights(vocab_split)
    if all("output.weight" not in part.tensors for part in parts):
        weights = [weight for weight in weights if weight.name != HEAD]  # tied to the embedding
    for part in parts:
        _check_names(part, weights, params)
    for weight in weights:
        _check_shapes(weight, parts, folder)
    return weights, sizes


def _check_names(part: _Part, weights: Sequence[MetaWeight], params: dict[str, Any]) -> None:
    expected = {weight.meta for weight in weights}
    for verb, names in (("lacks", expected - part.tensors.keys()), ("also holds", part.tensors.keys() - expected)):
        if names:
            raise InputError(
                f"{part.file} {verb} {len(names)} tensors, first {min(names)}, where {PARAMS} says a Llama with "
                f"{params['n_layers']} layers; download both again"
            )


def _check_shapes(weight: MetaWeight, parts: Sequence[_Part], folder: Path) -> None:
    shapes = [part.shapes[weight.meta] for part in parts]
    joined = list(shapes[0])
    if weight.split is not None and all(len(shape) == len(weight.shape) for shape in shapes):
        joined[weight.split] = sum(shape[weight.split] for shape in shapes)
        shapes = [(*shape[: weight.split], joined[weight.split], *shape[weight.split + 1 :]) for shape in shapes]
    dtypes = {part.tensors[weight.meta].dtype for part in parts}
    if any(shape != weight.shape for shape in shapes) or len(dtypes) > 1:
        given = ", ".join(f"{part.file.name} {[*part.shapes[weight.meta]]}" for part in parts)
        types = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise InputError(
            f"{folder}: the parts of {weight.meta} ({given}; {types}) do not make up the {[*weight.shape]} that "
            f"{PARAMS} needs; download the model again"
        )


# ---------------------------------------------------------------- config


def scaled_rope_factor(dim: int) -> float:
    """The factor of use_scaled_rope, which Meta's params.json leave out."""
    return 32.0 if dim <= LARGEST_LLAMA32 else 8.0


def meta_config(folder: str | Path) -> dict[str, Any]:
    """The Hugging Face config.json of a Meta folder, with the names that old and new transformers read.

    The context length stands nowhere in Meta's files: that of the Llama generation is taken, which the log names.
    Raises: InputError as `open_meta_checkpoint`.
    """
    checkpoint = open_meta_checkpoint(folder)  # reads headers: nothing stays open
    params, sizes, tensors = checkpoint.params, checkpoint.sizes, checkpoint.tensors
    generation, context = _generation(params)
    logger.info(
        "%s is read as %s by its rope_theta, norm_eps and sizes: max_position_embeddings %d",
        *(folder, generation, context),
    )
    scaling = None
    if params.get("use_scaled_rope"):
        factor = float(params.get("rope_scaling_factor") or scaled_rope_factor(sizes.dim))
        scaling = {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    bos, eos = (LLAMA3_BOS, LLAMA3_EOS) if sizes.vocab >= LLAMA3_VOCAB else (1, 2)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": context,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": float(params.get("rope_theta") or LLAMA_THETA),
        "rope_scaling": scaling,
        "tie_word_embeddings": HEAD not in tensors,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": str(tensors[EMBEDDING].dtype).removeprefix("torch."),
    }


def _generation(params: dict[str, Any]) -> tuple[str, int]:
    """The name of a model's generation and its context length in tokens."""
    theta = params.get("rope_theta") or LLAMA_THETA
    if params.get("use_scaled_rope"):
        return "Llama 3.1 or later", 131_072
    if theta == LLAMA3_THETA:
        return "Llama 3", 8192
    if theta == CODE_LLAMA_THETA:
        return "Code Llama", 16_384
    # Llama 1 has norm_eps 1e-6, but for 65B, which Llama 2 replaced by a 70B with grouped queries.
    if params["norm_eps"] < 1e-5 or (params["dim"] == 8192 and not params.get("n_kv_heads")):
        return "Llama 1", 2048
    return "Llama 2", 4096
