"""A model folder, read once and strictly: its config, the headers of its weights, and whether the two are one model.

What a folder lacks or has too much is asked of transformers itself, which loads tensors of the files' names and shapes
that hold no numbers: its renamings, ties and computed buffers count as they do when the model is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import InputError
from ..core.files import read_object, write_json
from .config import load_config, local_folder
from .names import CLASSIFIER, EXPERT, HEAD, SCORE
from .reader import BIN_INDEX, SAFETENSORS_INDEX, Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LANGUAGE_MODEL, REWARD_MODEL = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose weights are all that its config asks for.

    Attributes:
        checkpoint: the headers of its weights.
        shapes: of the weights, in a quantised folder those of the weights it was made from.
        extra: tensors of the files that the model has no place for.
    """

    folder: Path
    config: PreTrainedConfig
    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, ...]]
    extra: list[str]


def read_model(name_or_path: str, auto_class: str = LANGUAGE_MODEL) -> ModelFolder:
    """Read a model's folder, but for the numbers of its weights.

    Args: auto_class: the class of transformers that is to load it; a reward model may be made of a language model.
    Raises: InputError naming the file, for what transformers would fail at, or fill with random numbers.
    """
    folder = local_folder(name_or_path)
    config = load_config(str(folder))
    checkpoint = open_checkpoint(folder)
    extra, shapes = check_complete(config, checkpoint, auto_class)
    return ModelFolder(folder, config, checkpoint, shapes, extra)


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a model folder's config says that it has a classification head."""
    return any(name.endswith(CLASSIFIER) for name in config.architectures or ())


def check_padding(place: str | Path, config: PreTrainedConfig) -> None:
    """Raises: InputError if the padding token, which `place` names, has no row in the embeddings."""
    rows, pad = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    if rows is not None and pad is not None and not -rows <= pad < rows:
        raise InputError(
            f"{place}: pad_token_id is {pad}, but vocab_size {rows} has rows for 0 to {rows - 1} only; "
            "set it to null, or to the id of a token"
        )


def check_complete(
    config: PreTrainedConfig, checkpoint: Checkpoint, auto_class: str
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Compare weights with what a config asks for; returns `extra` and `shapes` of ModelFolder.

    Raises: InputError if some are absent, have other shapes, or belong to layers that the model does not have.
    """
    check_padding(checkpoint.folder / "config.json", config)
    if uneven := _uneven_experts(checkpoint):
        raise InputError(f"{checkpoint.folder}: experts are missing: {some_of(uneven)}; download the model again")
    if coded := _without_scales(config, checkpoint):
        raise InputError(
            f"{checkpoint.folder}: {some_of(coded)}, but config.json has no quantization_config that says what the "
            "numbers mean; pass the full-precision model, or the config.json of these weights"
        )
    missing, unplaced, others, shapes = _rehearse(config, checkpoint, auto_class)
    if auto_class == REWARD_MODEL and not is_classifier(config):
        missing.discard(SCORE)  # it gets a new head
    # A head that is not asked for is left out; what stands in a layer takes part in what the model computes.
    extra = sorted(unplaced - {HEAD, SCORE})
    foreign = [name for name in extra if ".layers." in name]
    problems = [f"lack {len(missing)} tensors: {some_of(sorted(missing))}"] * bool(missing)
    problems += [f"have other shapes: {some_of(others)}"] * bool(others)
    problems += [f"hold {len(extra)} that have no place in it: {some_of(extra)}"] * bool(
        foreign or (extra and missing)
    )
    if problems:
        raise InputError(
            f"{checkpoint.folder}: config.json describes a {config.model_type} model that the weight files are not: "
            f"they {'; they '.join(problems)}. Download the model again, or the config.json of these weights"
        )
    return extra, shapes


def _rehearse(
    config: PreTrainedConfig, checkpoint: Checkpoint, auto_class: str
) -> tuple[set[str], set[str], list[str], dict[str, tuple[int, ...]]]:
    """(names that are missing, names that are too many, other shapes in words, shapes), as transformers loads it."""
    import transformers

    model_class = getattr(transformers, auto_class)._model_mapping.get(type(config), None)
    if model_class is None:
        raise InputError(f"{checkpoint.folder}: transformers has no {auto_class} of a {config.model_type} model")
    state = {name: torch.empty(shape, device="meta") for name, shape in checkpoint.shapes.items()}
    if quantised := getattr(config, "quantization_config", None) is not None:
        # Formats differ in what they keep of a weight: there must be something of every module.
        config = copy.deepcopy(config)
        del config.quantization_config
        modules = {name.rpartition(".")[0] for name in state}
        state = {f"{name}.{part}": torch.empty(1, 1, device="meta") for name in modules for part in ("weight", "bias")}
    with _alone():
        try:
            model, found = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # whatever a model's code makes of settings that do not go together
            raise InputError(
                f"{checkpoint.folder / 'config.json'}: no {config.model_type} model can be built of it "
                f"({type(error).__name__}: {error})"
            ) from None
    if quantised:
        return found["missing_keys"], set(), [], {name: tuple(v.shape) for name, v in model.state_dict().items()}
    others = [f"{name} {list(has)} instead of {list(needs)}" for name, has, needs in sorted(found["mismatched_keys"])]
    return found["missing_keys"], found["unexpected_keys"], others, checkpoint.shapes


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """transformers without a word of its own, and without spreading what it loads over the processes of a run."""
    from transformers.integrations import deepspeed
    from transformers.utils import logging as library

    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    zero, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    library.set_verbosity(library.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


def _uneven_experts(checkpoint: Checkpoint) -> list[str]:
    """The layers that have fewer experts than others, in words: transformers could not stack them."""
    counts = Counter((match[1], match[3]) for name in checkpoint.tensors if (match := EXPERT.fullmatch(name)))
    most = max(counts.values(), default=0)
    return [f"layer {layer} has {count} of {most} {part}" for (layer, part), count in counts.items() if count < most]


def _without_scales(config: PreTrainedConfig, checkpoint: Checkpoint) -> list[str]:
    """The weights that are integers or 8-bit floats in a model that is not quantised, in words."""
    if getattr(config, "quantization_config", None) is not None:
        return []
    return [
        f"{name} is stored as {str(info.dtype).removeprefix('torch.')}"
        for name, info in checkpoint.tensors.items()
        if name.endswith(".weight") and not (info.dtype.is_floating_point and info.dtype.itemsize > 1)
    ]


def some_of(items: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


# ---------------------------------------------------------------- for transformers


@contextlib.contextmanager
def loadable_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder that transformers loads: itself, or links to its files with the index that it lacks."""
    files = checkpoint.files
    index_name = BIN_INDEX if files[0].suffix == ".bin" else SAFETENSORS_INDEX
    index = checkpoint.folder / index_name
    if index.is_file():
        complete = isinstance(read_object(index).get("metadata"), dict)
    else:
        complete = len(files) == 1 and "-of-" not in files[0].name
    if complete:
        yield checkpoint.folder
        return
    with tempfile.TemporaryDirectory() as links:
        for item in checkpoint.folder.iterdir():
            if item.name != index_name:
                (Path(links) / item.name).symlink_to(item.resolve())
        names = {checkpoint.stored_name(name): info.file.name for name, info in checkpoint.tensors.items()}
        size = sum(info.num_bytes for info in checkpoint.tensors.values())
        write_json(Path(links) / index_name, {"metadata": {"total_size": size}, "weight_map": names})
        yield Path(links)


def loading_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What from_pretrained needs to know besides, to find tensors under the names of a module around the model."""
    return {"key_mapping": {rf"^{checkpoint.wrapper}".replace(".", r"\."): ""}} if checkpoint.wrapper else {}
