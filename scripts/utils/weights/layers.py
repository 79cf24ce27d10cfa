"""Layers: which of a model's layers another depth keeps or repeats, and what its config then says of each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# What configs say about layers besides a list with a word for each: the numbers of some, how many come first, or a
# rule that a list replaces.
INDICES = ("mlp_only_layers", "moe_layers")
FIRST = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
RULES = ("sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval")


# ---------------------------------------------------------------- which layers


def read_layers(text: str, count: int) -> list[int]:
    """Numbers of layers, from 0: `first:N`, `even:N` (the first, the last, and between them), or a list as 0,1,5-9.

    Args: count: how many the model has.
    Raises: InputError for anything else, and for layers that the model does not have.
    """
    if match := re.fullmatch(r"\s*(first|even):(\d+)\s*", text):
        wanted = int(match[2])
        if not 1 <= wanted <= count:
            raise InputError(f"{text}: the model has {count} layers; need 1 to {count}")
        if match[1] == "first":
            return list(range(wanted))
        return [round(number * (count - 1) / max(1, wanted - 1)) for number in range(wanted)]
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match:
            raise InputError(f"'{text}' names no layers; need first:N, even:N, or numbers from 0 such as 0,1,5-9")
        start, stop = int(match[1]), int(match[2] or match[1])
        if stop < start:
            raise InputError(f"{part.strip()}: the range ends before it begins; write {stop}-{start}")
        if stop >= count:
            raise InputError(f"{part.strip()}: the model has {count} layers; need numbers from 0 to {count - 1}")
        layers += range(start, stop + 1)
    return layers


def kept_layers(text: str, count: int) -> list[int]:
    """The layers of --keep. Raises: InputError as read_layers, and for lists that repeat or turn round."""
    layers = read_layers(text, count)
    for before, after in itertools.pairwise(layers):
        if after <= before:
            raise InputError(
                f"--keep {text}: layer {after} after {before}; need each once and in order (--depth_upscale repeats)"
            )
    if len(layers) == count:
        raise InputError(f"--keep {text}: these are all {count} layers of the model; keep fewer")
    return layers


def repeated_layers(text: str, count: int) -> list[int]:
    """The layers of --depth_upscale: a list, or a depth N, which the first and the last N / 2 layers make.

    Source: Kim et al. 2023, "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling".
    Raises: InputError as read_layers, and unless the result is deeper than the model.
    """
    if text.strip().isdecimal():
        depth = int(text)
        if not count < depth <= 2 * count:
            raise InputError(
                f"--depth_upscale {depth}: the model has {count} layers; need {count + 1} to {2 * count}, or a list "
                "in which layers come again"
            )
        return [*range(-(-depth // 2)), *range(count - depth // 2, count)]
    layers = read_layers(text, count)
    if len(layers) <= count:
        raise InputError(
            f"--depth_upscale {text}: these are {len(layers)} layers, no more than the model's {count}; "
            "--keep makes a smaller model"
        )
    return layers


def renumbered(name: str, places: Mapping[int, Sequence[int]]) -> list[str]:
    """What a tensor is called in the new model: one name for each place of its layer, its own outside of layers.

    Args: places: {layer of the old model: its numbers in the new one}.
    """
    match = LAYER.fullmatch(name)
    return [f"model.layers.{new}.{match[2]}" for new in places.get(int(match[1]), ())] if match else [name]


def describe_layers(layers: Sequence[int]) -> str:
    """A list of layers in short, such as 0-3,8,12-15."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# ---------------------------------------------------------------- config


def config_of_layers(settings: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The content of a config.json, for the model that has these layers of the old one.

    Lists with an entry for each layer, numbers of layers and "the first so many" follow; the rest stays as it is.
    Raises: InputError if no config of this architecture says that each layer is what it was.
    """
    before = _parse(settings)
    known: dict[str, Any] = {**before.to_dict(), **settings}  # with what only the class's defaults say
    count = before.num_hidden_layers
    changed: dict[str, Any] = {"num_hidden_layers": len(layers)}
    if known.get("decoder_sparse_step", 1) > 1:  # every n-th layer has experts: then all but those that have none
        step = known["decoder_sparse_step"]
        known["mlp_only_layers"] = sorted(
            {*(known.get("mlp_only_layers") or ()), *(layer for layer in range(count) if (layer + 1) % step)}
        )
        changed["decoder_sparse_step"] = 1
    for name, value in known.items():
        if name in INDICES and isinstance(value, list):
            changed[name] = [new for new, old in enumerate(layers) if old in value]
        elif name in FIRST and isinstance(value, int):
            changed[name] = sum(layer < value for layer in layers)
        elif "layer" in name and isinstance(value, list) and len(value) == count:
            changed[name] = [value[layer] for layer in layers]
    result = {name: value for name, value in settings.items() if name not in RULES} | changed
    _check_same_layers(before, _parse(result), layers)
    return result


def count_layers(settings: Mapping[str, Any]) -> int:
    """How many layers the model of a config.json's content has."""
    return int(_parse(settings).num_hidden_layers)


def _parse(settings: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))


def _check_same_layers(before: PreTrainedConfig, after: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Build both models without weights, and compare layer by layer. Raises: InputError where they differ."""
    old, new = _bare_layers(before), _bare_layers(after)
    for number, layer in enumerate(layers):
        if difference := _first_difference(old[layer], new[number]):
            raise InputError(
                f"layer {layer} cannot become layer {number}: a {before.model_type} config has no words for it there "
                f"({difference}); keep layers in the model's own pattern, such as its first ones"
            )


def _bare_layers(config: PreTrainedConfig) -> Sequence[nn.Module]:
    from transformers import AutoModel

    with torch.device("meta"):
        layers = getattr(AutoModel.from_config(config), "layers", None)
    if layers is None:
        raise InputError(f"{config.model_type}: only models whose tensors are called model.layers.N can change depth")
    found: Sequence[nn.Module] = layers
    return found


def _first_difference(one: nn.Module, other: nn.Module) -> str | None:
    """The first setting or shape in which two layers differ, in words; numbers of layers aside."""
    first, second = _settings(one), _settings(other)
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            return f"{name} {first.get(name)} and {second.get(name)}"
    return None


def _settings(layer: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    for path, module in layer.named_modules():
        found[path or "layer"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | tuple | None) and not name.startswith(("_", "layer_idx")):
                found[f"{path}.{name}".lstrip(".")] = value
    return found
