"""Merge inputs: a base, its adapters and its tokenizer found, checked against each other, and opened as one model.

What merges, exports and converts share. Nothing here reads a weight.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..core.files import read_object
from ..text.tokenizer import check_embedding_rows, has_tokenizer, is_padded_size, load_tokenizer
from ..weights.config import load_config, local_folder
from ..weights.layers import config_of_layers, count_layers
from ..weights.meta_reader import is_meta_folder, meta_config, open_meta_checkpoint
from ..weights.model_folder import LANGUAGE_MODEL, REWARD_MODEL, check_complete, is_classifier
from ..weights.names import CLASSIFIER, EMBEDDING, SCORE
from ..weights.reader import Checkpoint, open_checkpoint
from .base_record import SAME_BASE, check_base
from .chat_vector import ChatVector
from .config import load_adapter_config
from .merged_model import MergedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass
class MergeInputs:
    """A base with its adapters, ready to stream."""

    base_folder: Path
    adapter_folders: list[Path]
    model: MergedModel
    tokenizer: PreTrainedTokenizerBase | None
    config: dict[str, Any]  # the content of the merged model's config.json

    @property
    def folders(self) -> list[Path]:
        """Those of chat model, adapters and base, as weights.generation_config takes them."""
        vector = self.model.chat_vector
        return [*([vector.tuned.folder] if vector else []), *reversed(self.adapter_folders), self.base_folder]

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return count_layers(self.config)

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Make it a model of these layers, see MergedModel.keep_layers. Raises: InputError as config_of_layers."""
        self.config = config_of_layers(self.config, layers)
        self.model.keep_layers(layers)


@contextlib.contextmanager
def open_merge(
    base: str,
    adapters: Sequence[str] = (),
    tokenizer: str | None = None,
    output: str | Path | None = None,
    adapter_weights: Sequence[float] | None = None,
    chat_vector: tuple[str, str, float] | None = None,
) -> Iterator[MergeInputs]:
    """Find, check and open a base and its adapters.

    Args:
        base, adapters: folders or hub ids, adapters in the order they were trained; none: the base as it is.
        adapter_weights: how much of each adapter's change is taken; default: all.
        tokenizer: a folder; default: that of the last adapter that has one, else the base's.
        chat_vector: chat model, the model it was tuned from, and how much of the difference is added.
        output: where the result goes; it must not overlap with an input.
    Raises: InputError naming what is missing, damaged or does not belong together.
    """
    from transformers import CONFIG_MAPPING

    base_folder, adapter_folders = _find_folders(base, adapters, output)
    is_meta = is_meta_folder(base_folder)
    if is_meta:
        config = meta_config(base_folder)
        parsed: Any = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    else:
        parsed = load_config(str(base_folder))  # names what is wrong with the file, knows defaults
        config = read_object(base_folder / "config.json")
    if config.get("quantization_config"):
        raise InputError(f"{base_folder} is a quantised model; pass the full-precision model it was made from")
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context((open_meta_checkpoint if is_meta else open_checkpoint)(base_folder))
        opened = [
            (load_adapter_config(folder), stack.enter_context(open_checkpoint(folder))) for folder in adapter_folders
        ]
        for number, (adapter, _) in enumerate(opened):
            check_base(adapter, base_folder, checkpoint, config, first=number == 0)
        check_complete(parsed, checkpoint, REWARD_MODEL if is_classifier(parsed) else LANGUAGE_MODEL)
        tied = bool(parsed.tie_word_embeddings)
        vector = None if chat_vector is None else _open_chat_vector(chat_vector, config, output, stack)
        model = MergedModel(checkpoint, opened, tied=tied, adapter_weights=adapter_weights, chat_vector=vector)
        found = _find_tokenizer(tokenizer, base_folder, adapter_folders)
        if vector is not None and found is not None:
            _take_chat_template(found, vector.tuned.folder, model.notes)
        _check_vocabulary(model, checkpoint, found)
        merged = _merged_config(model, config)
        if model.is_reward_model and SCORE not in checkpoint.tensors:
            merged |= _classifier_config(config, found)
        yield MergeInputs(base_folder, adapter_folders, model, found, merged)


def _open_chat_vector(
    models: tuple[str, str, float], config: dict[str, Any], output: str | Path | None, stack: contextlib.ExitStack
) -> ChatVector:
    """Open the two models. Raises: InputError if they are quantised, of another architecture than `config`, or one."""
    folders = [local_folder(name) for name in models[:2]]
    if folders[0].resolve() == folders[1].resolve():
        raise InputError(f"--chat_model and --chat_model_base are both {folders[0]}: their difference is nothing")
    opened = []
    for folder in folders:
        if output is not None:
            _check_apart(output, folder)
        is_meta = is_meta_folder(folder)
        theirs = meta_config(folder) if is_meta else _read_config(folder)
        for name in ("quantization_config", *SAME_BASE):
            if theirs.get(name) != config.get(name):
                raise InputError(
                    f"chat vector: {folder} has {name} {theirs.get(name)}, the model {config.get(name)}; need "
                    "full-precision models of one architecture and size"
                )
        opened.append(stack.enter_context((open_meta_checkpoint if is_meta else open_checkpoint)(folder)))
    return ChatVector(opened[0], opened[1], models[2])


def _read_config(folder: Path) -> dict[str, Any]:
    load_config(str(folder))  # names what is wrong with the file
    return read_object(folder / "config.json")


def _take_chat_template(tokenizer: PreTrainedTokenizerBase, chat_model: Path, notes: list[str]) -> None:
    """Give a tokenizer without a chat template the chat model's, and say which one counts."""
    theirs = load_tokenizer(chat_model).chat_template if has_tokenizer(chat_model) else None
    if theirs is None or theirs == tokenizer.chat_template:
        return
    if tokenizer.chat_template is None:
        tokenizer.chat_template = theirs
        notes.append(f"the chat template is that of {chat_model}")
    else:
        notes.append(f"the chat template is the tokenizer's own, not that of {chat_model}")


def _check_apart(output: str | Path, source: Path) -> None:
    """Raises: InputError for output that would touch an input."""
    target, source = Path(output).resolve(), source.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise InputError(f"--output_dir {output} and the input {source} overlap; pass another one")


def _find_folders(base: str, adapters: Sequence[str], output: str | Path | None) -> tuple[Path, list[Path]]:
    """The base's and the adapters' folders. Raises: InputError for output that would touch them."""
    base_folder = local_folder(base)
    adapter_folders = [local_folder(name, "adapter") for name in adapters]
    if output is not None:
        for source in (base_folder, *adapter_folders):
            _check_apart(output, source)
    if len({folder.resolve() for folder in adapter_folders}) < len(adapter_folders):
        raise InputError(f"--lora_model {','.join(adapters)} names an adapter twice; it would be added twice")
    return base_folder, adapter_folders


def _find_tokenizer(name: str | None, base: Path, adapters: Sequence[Path]) -> PreTrainedTokenizerBase | None:
    """The tokenizer named, else that of the last adapter that has one, else the base's; None if nobody has one."""
    if name:
        return load_tokenizer(name)
    for folder in (*reversed(adapters), base):
        if has_tokenizer(folder):
            logger.info("tokenizer: %s", folder)
            return load_tokenizer(folder)
    return None


def _check_vocabulary(model: MergedModel, base: Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises: InputError if the tokenizer is not the one the merged embeddings were trained with."""
    rows = model.vocab_size
    if rows is None:
        return
    old_rows = base.shapes[EMBEDDING][0]
    if tokenizer is None:
        if rows != old_rows:
            raise InputError(
                f"the adapters grow the vocabulary from {old_rows} to {rows} rows, but neither they nor the base have "
                "a tokenizer; pass --tokenizer_path"
            )
        logger.warning("no tokenizer found: the merged model has none; copy one there before using it")
        return
    size = len(tokenizer)
    check_embedding_rows(
        tokenizer,
        rows,
        f"the tokenizer has {size} tokens, the merged model {rows} embedding rows: they come from different runs; "
        "pass the adapter that was trained with this tokenizer, or another --tokenizer_path",
        old_rows,
        f"the adapters grow the vocabulary from {old_rows} to {rows} rows, but the tokenizer has {size} tokens: "
        "it is the one from before; pass the trained one as --tokenizer_path",
    )
    if rows != old_rows and not is_padded_size(tokenizer, rows):
        logger.warning("the tokenizer has %d tokens, the merged model %d rows: %d are unused", size, rows, rows - size)


def _merged_config(model: MergedModel, base: dict[str, Any]) -> dict[str, Any]:
    """The base's own config with what the merge changed; a config in an adapter folder never replaces it."""
    config = dict(base)
    if model.vocab_size is not None:
        config["vocab_size"] = model.vocab_size
    if model.untied:
        config["tie_word_embeddings"] = False
    return config


def _classifier_config(base: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """What the config of a language model says otherwise once its lm_head is a reward model's head."""
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise InputError(
            "a reward model needs a tokenizer with a padding token, which tells where an answer ends; leave "
            "--tokenizer_path out: the adapter's folder has it"
        )
    names = [name.replace("ForCausalLM", CLASSIFIER) for name in base.get("architectures") or ()]
    labels: dict[str, Any] = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {"architectures": names, **labels, "pad_token_id": tokenizer.pad_token_id}


def check_space(output: Path, num_bytes: int) -> None:
    """Raises: InputError if so many bytes of weights cannot fit where they are to go."""
    place = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise InputError(
            f"no space for the new model: it needs {num_bytes / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free"
        )
