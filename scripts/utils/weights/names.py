"""Names: how files and tensors of models and adapters are called."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in order of preference
EMBEDDING = "model.embed_tokens.weight"
INNER_MODEL = "model."  # where all but the head stands
HEAD = "lm_head.weight"
SCORE = "score.weight"  # the head of a reward model, without a bias
CLASSIFIER = "ForSequenceClassification"  # how transformers names the classes

# Experts, one by one as in checkpoints, and in two stacks as transformers 5 holds them.
_EXPERTS = r"(?:.*\.)?layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\."
# The gate's, the up and the down projection of an expert: Mixtral's names, by which this project goes, and Qwen's.
EXPERT_PARTS = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
EXPERT = re.compile(_EXPERTS + r"(\d+)\.(w[123]|gate_proj|up_proj|down_proj)\.weight")
FUSED_EXPERTS = re.compile(_EXPERTS + r"(gate_up_proj|down_proj)")
FUSED_PARTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}  # of one expert, in the order of the rows


def spellings(name: str) -> dict[str, None]:
    """What a tensor or module may be called: in memory transformers 5 calls Mixtral's block `mlp`, most checkpoints
    `block_sparse_moe`."""
    in_files, in_memory = ".block_sparse_moe.", ".mlp."
    return dict.fromkeys((name, name.replace(in_memory, in_files), name.replace(in_files, in_memory)))


def find_spelling(name: str, names: Container[str]) -> str | None:
    """The first spelling of `name` that is among `names`."""
    return next((other for other in spellings(name) if other in names), None)


def expert_part(name: str) -> str:
    """Mixtral's name of a part of an expert: gate_proj -> w1."""
    return dict(zip(EXPERT_PARTS[1], EXPERT_PARTS[0], strict=True)).get(name, name)


def is_embedding(name: str) -> bool:
    """Whether a module or parameter, by its name in memory or in an adapter, is of embed_tokens or lm_head."""
    modules = {EMBEDDING.split(".")[-2], HEAD.split(".")[-2]}
    return not modules.isdisjoint(name.split("."))


@dataclass(frozen=True)
class Experts:
    """The experts of one layer: matrices of their own (experts.N.w1), or two stacks as transformers 5 has them in
    memory, gate_up_proj (experts, 2 * inner, hidden) and down_proj (experts, hidden, inner).

    Attributes: names: what Mixtral's w1, w3 and w2 are called, where they are matrices of their own.
    """

    prefix: str
    count: int
    inner: int
    hidden: int
    fused: bool
    names: tuple[str, str, str] = EXPERT_PARTS[0]

    @classmethod
    def of(cls, name: str, weights: Mapping[str, tuple[int, ...]]) -> Experts | None:
        """The experts of the layer in which `name` stands, such as model.layers.0.mlp.experts; None if it has none."""
        for prefix in spellings(f"{name.partition('.experts')[0]}.experts."):
            if len(stack := weights.get(f"{prefix}gate_up_proj", ())) == 3:
                return cls(prefix, stack[0], stack[1] // 2, stack[2], True)
            for names in EXPERT_PARTS:
                if first := weights.get(f"{prefix}0.{names[0]}.weight"):
                    end = f".{names[0]}.weight"
                    count = sum(other.startswith(prefix) and other.endswith(end) for other in weights)
                    return cls(prefix, count, first[0], first[1], False, names)
        return None

    def find(self, index: int, part: str) -> tuple[str, tuple[int, int] | None]:
        """The weight that holds an expert's w1, w2 or w3, and the rows of it, None for all."""
        if not self.fused:
            return f"{self.prefix}{index}.{self.names[EXPERT_PARTS[0].index(part)]}.weight", None
        if part == "w2":
            return f"{self.prefix}down_proj", (index * self.hidden, (index + 1) * self.hidden)
        first = (2 * index + (part == "w3")) * self.inner
        return f"{self.prefix}gate_up_proj", (first, first + self.inner)
