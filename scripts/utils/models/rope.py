"""RoPE: windows longer than the trained one, by transformers' own rope_parameters, and rotations that differ by row.

scale_rope changes a config before its model is loaded: rope_parameters (linear, yarn, or a larger rope_theta) and
max_position_embeddings, the new window. Auto-NTK chooses a rotary base for each request, which no config can say; the
config then has `auto_ntk`, {"window": trained window in tokens, "factor"}, and the model a RowRotary.

Shapes: B rows of a batch, T positions, D the dimensions of a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.arguments import RopeArguments
from ..core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What can be put on top of a scaling that a model carries: positions divided twice are divided by the product, and a
# larger base goes with divided positions. YaRN fits its bands to rotations as they were trained.
COMPOSES = {
    "default": ("pi", "ntk", "auto-ntk", "yarn", "pi+ntk"),
    "linear": ("pi", "ntk", "auto-ntk", "pi+ntk"),
    "dynamic": ("auto-ntk",),
}
DYNAMIC_FACTOR = 2.0  # of the dynamic NTK formula; 2 makes it the forerunners'
STEPS = 4  # planned lengths are rounded up to quarters of the trained window, so that requests share cached prefixes


# ---------------------------------------------------------------- formulas


def ntk_alpha(windows: float, factor: float = DYNAMIC_FACTOR) -> float:
    """Dynamic NTK's alpha for a length of so many trained windows; 1, which changes nothing, up to one window.

    Source: Chinese-LLaMA-Alpaca-2's auto alpha, 2 * windows - 1; the factor as in transformers' rope_type dynamic.
    """
    return max(1.0, factor * windows - (factor - 1))


def ntk_theta(theta: float, alpha: float, dim: int) -> float:
    """The rotary base that slows the slowest of `dim` / 2 rotations down by `alpha` and leaves the fastest.

    Source: bloc97 2023, "NTK-aware scaled RoPE".
    """
    return theta * alpha ** (dim / (dim - 2))


def rotary_dim(config: PreTrainedConfig) -> int:
    """D."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# ---------------------------------------------------------------- configs


def scale_rope(config: PreTrainedConfig, args: RopeArguments) -> None:
    """Change a config to the window asked for; what the model carries itself is kept, and composed where it can be.

    A config with dynamic NTK of its own becomes an auto-NTK one, so that its cached keys and queries agree.
    Raises: InputError if the arguments contradict each other, or the scaling does not go with the model's own.
    """
    _check_arguments(args)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    own, name, factor = rope.get("rope_type"), args.rope_scaling, args.factor
    if name == "none" and own == "dynamic" and _rotates_whole_heads(rope):
        name, factor = "auto-ntk", float(rope["factor"])
    if name == "none":
        return
    _check_composes(name, rope)
    rope.pop("type", None)  # the older name of rope_type
    window = int(config.max_position_embeddings)
    if name == "auto-ntk":
        config.auto_ntk = {"window": window, "factor": DYNAMIC_FACTOR}
        if own == "dynamic":
            config.auto_ntk["factor"] = float(rope.pop("factor"))
            rope["rope_type"] = "default"
    elif name == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": window}
    else:
        divided, slowed = _split_factor(args)
        if slowed > 1:
            rope["rope_theta"] = ntk_theta(float(rope["rope_theta"]), ntk_alpha(slowed), rotary_dim(config))
        if divided > 1:
            rope |= {"rope_type": "linear", "factor": divided * float(rope.get("factor", 1.0))}
    config.rope_parameters = rope
    config.max_position_embeddings = int(window * factor)


def _split_factor(args: RopeArguments) -> tuple[float, float]:
    """By how much PI and NTK make the window longer: their product is the factor."""
    divided = {"pi": args.factor, "ntk": 1.0}.get(args.rope_scaling)
    if divided is None:
        divided = math.sqrt(args.factor) if args.pi_factor is None else args.pi_factor
    return divided, args.factor / divided


def _check_arguments(args: RopeArguments) -> None:
    name, divided = args.rope_scaling, args.pi_factor
    if name == "none" and (args.rope_factor, divided) != (None, None):
        raise InputError("--rope_factor and --pi_factor do nothing without --rope_scaling; pass e.g. yarn")
    if divided is not None and name != "pi+ntk":
        raise InputError(f"--pi_factor is for --rope_scaling pi+ntk, not {name}; leave it out")
    if divided is not None and not divided < args.factor:
        raise InputError(f"--pi_factor {divided:g}: need less than --rope_factor, {args.factor:g}: NTK does the rest")


def _rotates_whole_heads(rope: Mapping[str, Any]) -> bool:
    return rope.get("partial_rotary_factor", 1.0) == 1.0


def _check_composes(name: str, rope: Mapping[str, Any]) -> None:
    own = rope.get("rope_type")
    if own is None:
        raise InputError(f"--rope_scaling {name}: the model has no rotary positions, or several kinds; leave it out")
    if not _rotates_whole_heads(rope):
        raise InputError(f"--rope_scaling {name}: the model rotates a part of each head only; leave it out")
    if name not in COMPOSES.get(own, ()):
        carried = f"{own} scaling" + (f" by {rope['factor']:g}" if rope.get("factor") else "")
        possible = " or ".join(COMPOSES.get(own, ()))
        raise InputError(
            f"--rope_scaling {name} cannot be put on the {carried} that the model's config carries; "
            + (f"pass {possible}, or " if possible else "")
            + "leave --rope_scaling out: the model's own window is used"
        )


def rope_overrides(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings in which scale_rope changes a config, for from_pretrained(**settings)."""
    names = ("rope_parameters", "max_position_embeddings")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def scaled_config(config: PreTrainedConfig, args: RopeArguments, engine: str) -> PreTrainedConfig:
    """A copy of a config after scale_rope, for `engine`, which has one rotation for all texts; none: as it is.

    Raises: InputError as scale_rope, and for auto-ntk.
    """
    _check_arguments(args)
    scaled = copy.deepcopy(config)
    if args.rope_scaling != "none":
        scale_rope(scaled, args)
        need_one_rotation(scaled, engine)
    return scaled


def scale_settings(settings: Mapping[str, Any], args: RopeArguments) -> dict[str, Any]:
    """scaled_config for the content of a config.json, in whatever file it goes."""
    from transformers import AutoConfig

    config = scaled_config(AutoConfig.for_model(**settings), args, "a model's file")
    if args.rope_scaling == "none":
        return dict(settings)
    kept = {key: value for key, value in settings.items() if key not in ("rope_theta", "rope_scaling")}
    return kept | rope_overrides(config)


# ---------------------------------------------------------------- a rotation for each row


class RowRotary(nn.Module):
    """A model's rotary embedding that can rotate every row of a batch with frequencies of its own.

    While `inv_freq_rows` (B, D / 2), float32, is set, row b is rotated with inv_freq_rows[b]; (1, D / 2) is for all
    rows. With None the original module answers. `key` and `rotate` choose the frequencies of auto-NTK.
    """

    inv_freq_rows: Tensor | None = None

    def __init__(self, original: nn.Module, config: PreTrainedConfig) -> None:
        super().__init__()
        self.original, self.config = original, config
        self._frequencies: dict[int | None, Tensor] = {}

    def key(self, planned_length: int) -> int | None:
        """See rotary_key."""
        return rotary_key(self.config, planned_length)

    def rotate(self, planned_lengths: Sequence[int]) -> None:
        """Rotate the rows of the next forward passes for texts of these lengths, prompt and new tokens together.

        One length is for all rows, none for what fits the trained window.
        """
        rows = []
        for length in planned_lengths:
            key = self.key(length)
            if key not in self._frequencies:
                self._frequencies[key] = auto_ntk_frequencies(self.config, length)
            rows.append(self._frequencies[key])
        self.inv_freq_rows = torch.stack(rows) if rows else None

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`x` says type and device; position_ids (B, T) or (1, T) -> cos, sin: (B, T, D) each."""
        if self.inv_freq_rows is None:
            cos, sin = self.original(x, position_ids)
            return cos, sin
        angles = position_ids[..., None].float() * self.inv_freq_rows[:, None].to(x.device)
        both = torch.cat((angles, angles), dim=-1)
        scaling = self.original.attention_scaling
        return (both.cos() * scaling).to(x.dtype), (both.sin() * scaling).to(x.dtype)


def install_row_rotary(model: PreTrainedModel) -> RowRotary:
    """Put a RowRotary in the place of the model's rotary embedding; one that is there stays."""
    decoder = model.get_decoder()
    if not isinstance(decoder.rotary_emb, RowRotary):
        decoder.rotary_emb = RowRotary(decoder.rotary_emb, model.config)
    rotary: RowRotary = decoder.rotary_emb
    return rotary


def find_row_rotary(model: PreTrainedModel) -> RowRotary | None:
    """The model's RowRotary, None if it has none."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    return rotary if isinstance(rotary, RowRotary) else None


def rotary_key(config: PreTrainedConfig, planned_length: int) -> int | None:
    """Equal for requests with equal rotations, which may share cached keys; None where all requests have one.

    Under auto-NTK: the planned length (prompt and new tokens), rounded up, in quarters of the trained window; all
    requests that fit the trained window have one key. Rounding up is planning a longer text, which the formula allows.
    """
    auto = getattr(config, "auto_ntk", None)
    return max(STEPS, math.ceil(STEPS * planned_length / auto["window"])) if auto else None


def auto_ntk_frequencies(config: PreTrainedConfig, planned_length: int) -> Tensor:
    """Rotary frequencies (D / 2,) float32 of a request that will have `planned_length` tokens in all.

    They are those of transformers' dynamic NTK at the rounded length (see rotary_key), so that every key and query of
    the request has one rotation. `config`: after scale_rope with auto-ntk.
    """
    rope, dim = config.rope_parameters, rotary_dim(config)
    steps = rotary_key(config, planned_length)
    assert steps is not None, "the config has no auto-NTK"
    theta = ntk_theta(float(rope["rope_theta"]), ntk_alpha(steps / STEPS, config.auto_ntk["factor"]), dim)
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    return frequencies / float(rope.get("factor", 1.0))  # a linear scaling of the model's own


# ---------------------------------------------------------------- other engines


def need_one_rotation(config: PreTrainedConfig, engine: str) -> None:
    """Raises: InputError for auto-NTK, which engines that rotate all texts alike do not have."""
    if getattr(config, "auto_ntk", None):
        raise InputError(
            f"--rope_scaling auto-ntk: {engine} has one rotation for all texts, not one for each; pass ntk or yarn "
            "with the --rope_factor you need"
        )


def llama_cpp_rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of llama_cpp.Llama that replace what a GGUF file says about RoPE by what the config says.

    Raises: InputError for what llama.cpp has no parameters for.
    """
    need_one_rotation(config, "llama.cpp")
    rope = config.rope_parameters
    kind = rope["rope_type"]
    types = {"default": 0, "linear": 1, "yarn": 2}  # llama.cpp's enum llama_rope_scaling_type
    if kind not in types:
        raise InputError(f"rope_type {kind}: llama.cpp has no parameters for it; export the model with export_gguf.py")
    parameters = {
        "rope_scaling_type": types[kind],
        "rope_freq_base": float(rope["rope_theta"]),
        "rope_freq_scale": 1.0 / float(rope.get("factor") or 1.0),
    }
    if kind == "yarn":
        parameters["yarn_orig_ctx"] = int(rope["original_max_position_embeddings"])
    # The binding's own defaults would override what the file says.
    return parameters | {"yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0}


def gguf_rope_config(metadata: Mapping[str, str]) -> PreTrainedConfig:
    """What a GGUF file says about positions, as a config that scale_rope takes; `metadata`: llama_cpp.Llama's own.

    rope_type is llama.cpp's word for it: linear, yarn, longrope, or default without any.
    """
    from transformers import LlamaConfig

    keys = {key.partition(".")[2]: value for key, value in metadata.items()}  # without the architecture's name
    kind = keys.get("rope.scaling.type", "none")
    window = int(keys["context_length"])
    rope: dict[str, Any] = {
        "rope_type": "default" if kind == "none" else kind,
        "rope_theta": float(keys.get("rope.freq_base", 10_000.0)),
    }
    if kind != "none":
        rope["factor"] = float(keys["rope.scaling.factor"])
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(keys.get("rope.scaling.original_context_length", window))
    heads, size = int(keys["attention.head_count"]), int(keys["embedding_length"])
    dim = int(keys.get("rope.dimension_count", size // heads))
    config = LlamaConfig(hidden_size=size, num_attention_heads=heads, head_dim=dim, max_position_embeddings=window)
    config.rope_parameters = rope
    return config
