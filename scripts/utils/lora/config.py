"""LoRA: target modules, what an adapter's config says, and the change of one weight, a block of rows at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import Fields, is_list_of, read_object
from ..core.hub import find_folder
from ..weights.config import model_of_shapes
from ..weights.names import ADAPTER_CONFIG

# Settings of LoraConfig under which the trained model is not "base weight + change" as computed here.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# Initialisations that take a part out of the base weight when training starts.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# ---------------------------------------------------------------- target modules

_DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Experts and routers have the names of the checkpoints, which Chinese-Mixtral's commands use too: transformers 5 holds
# experts in stacks, which are no linear layers, see models.experts.
_LINEAR_MODULES = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"],
    "qwen2_moe": [*_DENSE, "gate", "shared_expert_gate"],
    "qwen3_moe": [*_DENSE, "gate"],
}


def linear_modules(config: Any) -> list[str]:
    """The names of a model's linear layers without lm_head, as --target_modules spells them."""
    kind = type(config).model_type if hasattr(type(config), "model_type") else config.model_type
    if kind in _LINEAR_MODULES:
        return list(_LINEAR_MODULES[kind])
    parts = model_of_shapes(config).named_modules()
    names = {name.rpartition(".")[2]: None for name, part in parts if isinstance(part, torch.nn.Linear)}
    return [name for name in names if name != "lm_head"]


def resolve_target_modules(names: str, config: Any) -> list[str]:
    """The modules that get a LoRA update.

    Args:
        names: comma-separated module names (also dotted, as layers.0.self_attn.q_proj); "all" means every linear layer
            but lm_head.
        config: the model's transformers config.
    Raises: InputError for unknown names.
    """
    linear = linear_modules(config)
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if wanted in (["all"], ["all-linear"]):
        return linear
    known = [*linear, "embed_tokens", "lm_head"]
    unknown = [name for name in wanted if name.rpartition(".")[2] not in known]
    if unknown or not wanted:
        raise InputError(
            f"--target_modules {names}: no such modules in this {config.model_type} model: "
            f"{', '.join(unknown) or '(none given)'}; it has {', '.join(known)}; all means {','.join(linear)}"
        )
    return wanted


# ---------------------------------------------------------------- the adapter's config


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter that decide what its tensors mean."""

    folder: Path
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    target_modules: list[str] | str
    target_parameters: list[str]
    modules_to_save: list[str]
    trainable_token_indices: dict[str, list[int]]
    ensure_weight_tying: bool
    base_model_name_or_path: str
    base_model_class: str | None

    def rank_of(self, key: str) -> int:
        """The rank of the module or parameter called `key` in the model."""
        return self.rank_pattern.get(_matching_pattern(self.rank_pattern, key), self.rank)

    def scaling_of(self, key: str) -> float:
        """The factor of B @ A: alpha / rank (Hu et al. 2021), or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)."""
        alpha = self.alpha_pattern.get(_matching_pattern(self.alpha_pattern, key), self.alpha)
        rank = self.rank_of(key)
        return float(alpha / rank**0.5 if self.use_rslora else alpha / rank)


def _matching_pattern(patterns: Iterable[str], key: str) -> str:
    """The first pattern that matches the end of `key` from a dot on, as PEFT decides it."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", key)), "")


def load_adapter_config(folder: str | Path) -> AdapterConfig:
    """Read adapter_config.json, offline.

    Raises: InputError if it is absent, broken, or describes a change that B @ A does not express.
    """
    folder = find_folder(folder) or Path(folder)
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is no adapter folder: it has no {ADAPTER_CONFIG}; pass the folder PEFT saved")
    raw = read_object(path, _FIELDS)
    if str(raw.get("peft_type", "")).upper() != "LORA":
        raise InputError(
            f"{path}: peft_type is {raw.get('peft_type')}, need LORA; use PEFT's save_as_lora to turn the adapter "
            "into one"
        )
    _refuse_unsupported(path, raw)
    tokens = raw.get("trainable_token_indices") or {}
    rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    if rank is None or alpha is None:
        raise InputError(f"{path}: r is {rank} and lora_alpha {alpha}; need a positive rank and a number")
    return AdapterConfig(
        folder=folder,
        rank=rank,
        alpha=float(alpha),
        rank_pattern=dict(raw.get("rank_pattern") or {}),
        alpha_pattern=dict(raw.get("alpha_pattern") or {}),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        target_modules=raw.get("target_modules") or [],
        target_parameters=list(raw.get("target_parameters") or []),
        modules_to_save=list(raw.get("modules_to_save") or []),
        trainable_token_indices=tokens if isinstance(tokens, dict) else {"embed_tokens": list(tokens)},
        ensure_weight_tying=bool(raw.get("ensure_weight_tying")),
        base_model_name_or_path=str(raw.get("base_model_name_or_path") or ""),
        base_model_class=(raw.get("auto_mapping") or {}).get("base_model_class"),
    )


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _are_indices(value: Any) -> bool:
    are_numbers = is_list_of(int)
    return are_numbers(value) or _is_pattern(are_numbers)(value)


_FIELDS: Fields = {
    "r": (_is_rank, "a positive rank"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (_is_pattern(_is_rank), "an object of positive ranks"),
    "alpha_pattern": (_is_pattern(_is_number), "an object of numbers"),
    "target_modules": (lambda value: isinstance(value, str) or is_list_of(str)(value), "a pattern or list of names"),
    **dict.fromkeys(("target_parameters", "modules_to_save"), (is_list_of(str), "a list of names")),
    "trainable_token_indices": (_are_indices, "a list of token ids, or one for each module"),
    "auto_mapping": (lambda value: isinstance(value, dict), "an object"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a name"),
}


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    if used := [name for name in _UNSUPPORTED if raw.get(name)]:
        raise InputError(f"{path}: {', '.join(used)} is set; such an adapter cannot be added to the base weights here")
    init = str(raw.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise InputError(
            f"{path}: init_lora_weights is {init}, which changed the base weights when training started; convert the "
            "adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) and merge that"
        )


# ---------------------------------------------------------------- the change of one weight


@dataclass
class LowRankFactors:
    """A: (rank, in), B: (out, rank), magnitude: (out,) or None; all float32."""

    A: Tensor
    B: Tensor
    scaling: float
    transposed: bool
    magnitude: Tensor | None

    @property
    def needs_norm(self) -> bool:
        """True where DoRA's norm runs over all rows of the stored weight, so that one pass must come before."""
        return self.magnitude is not None and self.transposed

    def delta_rows(self, start: int, stop: int) -> Tensor:
        """Scaling * B @ A for rows `start` to `stop` of the stored weight: (stop - start, columns).

        Bit-equal to the same rows of the whole product for blocks of at least 64 rows (measured on CPU).
        """
        product = (self.B @ self.A[:, start:stop]).T if self.transposed else self.B[start:stop] @ self.A
        return product.mul_(self.scaling)

    def merge_rows(self, rows: Tensor, start: int, norm: Tensor | None = None) -> Tensor:
        """The merged rows that begin at row `start`; `rows` is float32, `norm` (out,) is given if `needs_norm`.

        Source: DoRA, Liu et al. 2024, eq. 5: W' = m * (W + dW) / ||W + dW||, one norm per output.
        """
        merged = self.delta_rows(start, start + len(rows)).add_(rows)  # in place: memory is what blocks cost
        if self.magnitude is None:
            return merged
        if self.transposed:
            assert norm is not None
            return (self.magnitude / norm).view(1, -1) * merged
        norm = torch.linalg.norm(merged, dim=1)
        return (self.magnitude[start : start + len(rows)] / norm).view(-1, 1) * merged
