"""Streamed model: transformers' own model in float32, whose weights are read from files as it needs them.

Memory does not grow with the model's size: the modules stand on the meta device, which holds shapes and no numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..weights.config import model_of_shapes
from ..weights.names import EMBEDDING, FUSED_PARTS, HEAD, Experts, find_spelling
from ..weights.reader import TensorSpec, row_shape
from .inputs import MergeInputs


class StreamedModel:
    """transformers' model of the merged weights, without them.

    Attributes:
        model: to run as it is (`run`), or to be given other modules that know how to compute.
        sources: by the name of every parameter: the tensor that is its value, or the layer's experts where it holds
            all of them and the files have them one by one.
    """

    def __init__(self, inputs: MergeInputs, flag: str):
        """`flag`: what asked for it. Raises: InputError naming it for models that are built otherwise than Llama."""
        from transformers import CONFIG_MAPPING

        self._merged = inputs.model
        self._shapes = {name: weight.shape for name, weight in inputs.model.weights.items()}
        kind = str(inputs.config.get("model_type"))
        if inputs.model.is_reward_model:
            raise InputError(f"{flag} compares the logits of language models; leave it out for a reward model")
        self._unsupported = (
            f"{flag} knows models built as Llama is (Llama, Mistral, Mixtral, Qwen); {inputs.base_folder} is a "
            f"{kind} model: leave {flag} out"
        )
        if kind not in CONFIG_MAPPING or EMBEDDING not in self._shapes:
            raise InputError(self._unsupported)
        config = CONFIG_MAPPING[kind].from_dict(inputs.config)
        config._attn_implementation = "sdpa"
        self.model: Any = model_of_shapes(config).eval()
        inner: Any = getattr(self.model, "model", None)
        if not hasattr(inner, "layers") or not hasattr(inner, "rotary_emb"):
            raise InputError(self._unsupported)
        inner.rotary_emb = type(inner.rotary_emb)(config)  # its frequencies are computed, not loaded
        self._set_buffers()
        if any(buffer.is_meta for buffer in self.model.buffers()):
            raise InputError(self._unsupported)
        # A tied head is the embeddings' own parameter, which is listed once unless told otherwise.
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        self.sources = {name: self._find(name) for name in names}

    def _set_buffers(self) -> None:
        """Give other buffers that are no part of the files, such as Gemma's scale of embeddings, their values."""
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta and name in module._non_persistent_buffers_set:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
                    self.model._init_weights(module)

    def _find(self, name: str) -> str | Experts:
        if found := find_spelling(name, self._shapes) or (EMBEDDING if name == HEAD else None):
            return found
        experts = Experts.of(name, self._shapes) if name.endswith(tuple(FUSED_PARTS)) else None
        if experts is None:
            raise InputError(self._unsupported)
        return experts

    @property
    def _parts(self) -> dict[str, nn.Module]:
        """What is in memory at a time, by path: the embeddings, one layer, the last norm."""
        inner = self.model.model
        layers = {f"model.layers.{number}": layer for number, layer in enumerate(inner.layers)}
        return {"model.embed_tokens": inner.embed_tokens, "model.norm": inner.norm, **layers}

    @property
    def needed_bytes(self) -> int:
        """About the most memory that `run` holds at a time."""
        sizes = [sum(value.numel() for value in part.parameters()) for part in self._parts.values()]
        return 5 * max(sizes) + (1 << 30)

    @torch.no_grad()
    def run(self, rows: Sequence[Sequence[int]]) -> Logits:
        """Logits after every token of every row of token ids."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)  # what follows a row's end does not reach back to it
        hooks = []
        for path, part in self._parts.items():
            hooks.append(part.register_forward_pre_hook(partial(self._load, path)))
            hooks.append(part.register_forward_hook(_drop_weights))
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        weight = self._read(EMBEDDING if self._merged.tied else HEAD)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return Logits([states[: len(row)] for states, row in zip(hidden, rows, strict=True)], weight, cap)

    def _load(self, path: str, part: nn.Module, _: Any) -> None:
        state = {name: self._value(f"{path}.{name}", value.shape) for name, value in part.named_parameters()}
        part.load_state_dict(state, assign=True)  # a parameter on the meta device cannot be written to

    def _value(self, name: str, shape: Sequence[int]) -> Tensor:
        """A parameter in float32."""
        source = self.sources[name]
        if isinstance(source, str):
            return self._read(source)
        value = torch.empty(*shape)
        for number in range(source.count):
            parts = [source.find(number, part)[0] for part in FUSED_PARTS[name.rpartition(".")[2]]]
            torch.cat([self._read(part) for part in parts], out=value[number])
        return value

    def _read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        value, row = torch.empty(row_shape(shape)) if len(shape) > 1 else torch.empty(shape), 0
        for block in self._merged.blocks(TensorSpec(name, torch.float32, shape)):
            value[row : row + len(block)] = block
            row += len(block)
        return value.view(shape)


class Logits(Sequence[np.ndarray]):
    """(tokens, vocabulary) float32 of every row, computed each time it is asked for.

    All rows' logits at once would be the largest thing in memory.
    """

    def __init__(self, hidden: Sequence[Tensor], head: Tensor, cap: float | None):
        """`hidden`: the last states of every row, (tokens, H); `head`: (vocabulary, H); `cap`: Gemma's soft one."""
        self._hidden, self._head, self._cap = hidden, head, cap

    def __len__(self) -> int:
        return len(self._hidden)

    def __getitem__(self, row: Any) -> Any:
        logits = self._hidden[row] @ self._head.T
        return (logits if self._cap is None else (logits / self._cap).tanh() * self._cap).numpy()


def _drop_weights(part: nn.Module, *_: Any) -> None:
    # Not part.to("meta"): buffers that are computed stay.
    weights = {name: torch.empty_like(value, device="meta") for name, value in part.named_parameters()}
    part.load_state_dict(weights, assign=True)
