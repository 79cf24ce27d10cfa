"""What lies in the folders of a model and an adapter, in words, and what would be refused; no weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.arguments import InferenceArguments
from ..core.errors import InputError
from ..lora.adapter_folder import read_adapter
from ..lora.base_record import BASE_RECORD
from ..lora.config import load_adapter_config
from ..text.tokenizer import SentencePieceTokenizer, load_tokenizer, vocabulary_end
from ..weights.config import load_config, local_folder
from ..weights.generation_config import named_ends
from ..weights.model_folder import ModelFolder, read_model, some_of
from ..weights.names import HEAD
from ..weights.reader import BIN_INDEX, SAFETENSORS_INDEX, Checkpoint, open_checkpoint
from .loading import check_tokenizer, find_inference_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

T = TypeVar("T")


class FolderCheck:
    """
    Attributes:
        found: lines that say what is there.
        refused: the errors that inference, the server, evaluation, training or merging would end with.
    """

    def __init__(self, args: InferenceArguments) -> None:
        self.found: list[str] = []
        self.refused: list[str] = []
        if files := self._try(lambda: find_inference_files(args)):
            model = self._check_model(str(files.model_name_or_path))
            tokenizer = self._try(lambda: load_tokenizer(str(files.tokenizer_name_or_path)))
            if model:
                # As an engine asks: an adapter's own generation_config.json counts before the base's.
                folders = [Path(name) for name in (files.adapter_name_or_path, str(model.folder)) if name]
                ends = self._try(lambda: _end_ids(folders, tokenizer))
                self.found.append(f"  ends of an answer: {', '.join(ends or ['none'])}")
                self.found.append(f"  padding: {getattr(model.config, 'pad_token_id', None)}")
            if tokenizer:
                self.found.append(f"tokenizer: {files.tokenizer_name_or_path}: {_describe_tokenizer(tokenizer)}")
            if model:
                self._check_together(files, model, tokenizer)

    def _try(self, step: Callable[[], T]) -> T | None:
        """What a step gives; None if it is refused, which goes into the list."""
        try:
            return step()
        except InputError as error:
            self.refused.append(str(error))
            return None

    def _check_model(self, name: str) -> ModelFolder | None:
        """Config and weights, also described where the two do not go together."""
        folder = local_folder(name)
        self.found.append(f"model: {folder}")
        if config := self._try(lambda: load_config(name)):
            self.found.append(f"  config.json: {_describe_config(config)}")
        if checkpoint := self._try(lambda: open_checkpoint(folder)):
            self.found.append(f"  weights: {_describe_weights(checkpoint)}")
        if not config or not checkpoint or not (model := self._try(lambda: read_model(name))):
            return None
        if model.extra:
            self.found.append(f"  without a place in the model, left out: {len(model.extra)} ({some_of(model.extra)})")
        head = "in the files" if HEAD in checkpoint.tensors else "not in the files"
        tied = "tied to embed_tokens" if config.tie_word_embeddings else "of its own"
        self.found.append(f"  lm_head: {tied}, {head}")
        return model

    def _check_together(
        self, files: InferenceArguments, model: ModelFolder, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        rows = old_rows = model.config.vocab_size
        if name := files.adapter_name_or_path:
            self.found.append(f"adapter: {name}")
            if not (adapter := self._try(lambda: read_adapter(name, model))):
                return
            rows = adapter.rows or old_rows
            self.found += [f"  {line}" for line in _describe_adapter(Path(name), len(adapter.updates), rows, old_rows)]
        if tokenizer:
            self._try(lambda: check_tokenizer(tokenizer, rows, old_rows, name))


def _describe_config(config: PreTrainedConfig) -> str:
    parts: list[Any] = [config.model_type, *(config.architectures or ())]
    named = {"num_hidden_layers": "layers", "hidden_size": "wide", "vocab_size": "rows"}
    parts += [f"{getattr(config, name)} {unit}" for name, unit in named.items() if hasattr(config, name)]
    if window := getattr(config, "max_position_embeddings", None):
        parts.append(f"window {window} tokens")
    parts.append(f"type {str(config.dtype).removeprefix('torch.')}")
    if quantisation := getattr(config, "quantization_config", None):
        parts.append(f"quantised ({quantisation['quant_method']})")
    return ", ".join(parts)


def _describe_weights(checkpoint: Checkpoint) -> str:
    tensors, files = checkpoint.tensors.values(), checkpoint.files
    index = next((name for name in (SAFETENSORS_INDEX, BIN_INDEX) if (checkpoint.folder / name).is_file()), None)
    types = Counter(str(info.dtype).removeprefix("torch.") for info in tensors)
    named = f"{len(files)} files" if len(files) > 1 else files[0].name
    wrapped = f"; names begin with {checkpoint.wrapper}, which is left off" if checkpoint.wrapper else ""
    size = sum(info.num_bytes for info in tensors) / 1e9
    return (
        f"{named} ({index or 'no index'}), {len(tensors)} tensors, {size:.3g} GB: "
        f"{', '.join(f'{count} {name}' for name, count in types.most_common())}{wrapped}"
    )


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    kind = "sentencepiece" if isinstance(tokenizer, SentencePieceTokenizer) else "tokenizer.json"
    template = "with" if tokenizer.chat_template else "without"
    return f"{kind}, {len(tokenizer)} tokens, largest id {vocabulary_end(tokenizer) - 1}, {template} chat template"


def _describe_adapter(folder: Path, weights: int, rows: int, old_rows: int) -> list[str]:
    config = load_adapter_config(folder)
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    whole = f"; in full: {', '.join(config.modules_to_save)}" if config.modules_to_save else ""
    record = (
        "its base's weights are recorded" if (folder / BASE_RECORD).is_file() else "no record of its base's weights"
    )
    return [
        f"LoRA of rank {config.rank}, alpha {config.alpha:g}, on {targets}{whole}; changes {weights} weights",
        f"trained on {config.base_model_name_or_path or 'a model it does not name'}; {record}",
        f"rows: {rows}" + (f", grown from {old_rows}" if rows != old_rows else ""),
    ]


def _end_ids(folders: Sequence[Path], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Every id that one of the three files calls an end, with the files."""
    named = named_ends(folders)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        named.setdefault(int(tokenizer.eos_token_id), []).append("tokenizer")
    texts = {index: f" {tokenizer.convert_ids_to_tokens(index)!r}" for index in named} if tokenizer else {}
    return [f"{index}{texts.get(index, '')} ({', '.join(files)})" for index, files in sorted(named.items())]
