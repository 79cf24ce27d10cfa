"""Adapters: what each tensor of a LoRA adapter does to which weight of the base model.

Works on names and shapes alone, so that an adapter that does not fit is refused before a weight is read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..core.errors import InputError
from ..weights.names import (
    ADAPTER_CONFIG,
    EMBEDDING,
    EXPERT,
    FUSED_PARTS,
    HEAD,
    Experts,
    expert_part,
    find_spelling,
)
from .config import AdapterConfig, LowRankFactors


@dataclass(frozen=True)
class Replace:
    """The weight becomes the adapter's tensor `source` (modules_to_save, trained biases, resized embeddings)."""

    source: str
    copies: tuple[str, ...] = ()  # PEFT stores some of them twice; the caller checks that these are equal
    frozen: bool = False  # not trained, but the resized base under a LoRA update; shared if the embeddings were tied


@dataclass(frozen=True)
class ReplaceRows:
    """The rows `indices` become the rows of the adapter's tensor `source` (trainable_token_indices)."""

    source: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class AddBias:
    """The adapter's vector `source` times `scaling` is added to a bias (lora_bias)."""

    source: str
    scaling: float


@dataclass(frozen=True)
class LowRank:
    """scaling * B @ A is added, then DoRA's magnitude applied.

    `transposed`: the weight is stored as (in, out), as embeddings and fan_in_fan_out layers are.
    `expert`: (index, count, first row, end row) where A and B hold all experts of a layer; the rows are those of B.
    `place`: (first row, end row) of the stored weight that change, where it holds all experts of a layer.
    """

    name_A: str
    name_B: str
    scaling: float
    transposed: bool = False
    magnitude: str | None = None
    expert: tuple[int, int, int, int] | None = None
    place: tuple[int, int] | None = None

    def load(self, read: Callable[[str], Tensor]) -> LowRankFactors:
        """Read the factors as float32."""
        A, B = read(self.name_A), read(self.name_B)
        if self.expert is not None:
            index, count, start, stop = self.expert
            A = A.reshape(count, -1, A.shape[1])[index]  # (experts * rank, in), the expert varies slowest
            B = B.reshape(B.shape[0], -1, count)[start:stop, :, index].contiguous()  # (out, rank * experts): fastest
        magnitude = None if self.magnitude is None else read(self.magnitude).float()
        return LowRankFactors(A.float(), B.float(), self.scaling, self.transposed, magnitude)

    def merge_rows(self, factors: LowRankFactors, rows: Tensor, start: int, norm: Tensor | None = None) -> Tensor:
        """The rows of the stored weight that begin at row `start`, merged; see LowRankFactors.merge_rows."""
        if self.place is None:
            return factors.merge_rows(rows, start, norm)
        first, stop = max(start, self.place[0]), min(start + len(rows), self.place[1])
        if first >= stop:
            return rows
        rows = rows.clone()
        rows[first - start : stop - start] = factors.merge_rows(
            rows[first - start : stop - start], first - self.place[0], norm
        )
        return rows


Update = Replace | ReplaceRows | AddBias | LowRank


# The first that matches counts, so the general endings come last.
_TENSOR_ROLES = (
    (re.compile(r"\.lora_A(?:\.default)?\.weight$"), "A"),
    (re.compile(r"\.lora_B(?:\.default)?\.weight$"), "B"),
    (re.compile(r"\.lora_B(?:\.default)?\.bias$"), "lora_bias"),
    (re.compile(r"\.lora_embedding_A(?:\.default)?$"), "embedding_A"),
    (re.compile(r"\.lora_embedding_B(?:\.default)?$"), "embedding_B"),
    (re.compile(r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?$"), "magnitude"),
    (re.compile(r"\.token_adapter\.trainable_tokens_delta(?:\.default)?$"), "tokens"),
    (re.compile(r"\.original_module\.weight$"), "original"),
    (re.compile(r"(?:\.token_adapter)?\.base_layer\.weight$"), "base_layer.weight"),
    (re.compile(r"\.base_layer\.bias$"), "bias"),
    (re.compile(r"\.modules_to_save(?:\.default)?\.weight$"), "modules_to_save"),
    (re.compile(r"\.bias$"), "bias"),
    (re.compile(r"\.weight$"), "weight"),
)
# PEFT saves resized embeddings up to three times; the first of these that is there decides.
_WHOLE_ROLES = ("weight", "modules_to_save", "base_layer.weight")


_PREFIX = "base_model.model."
# Computed by the model itself; old libraries saved them with every layer.
_BUFFERS = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|position_ids)$")


def peft_spelling(names: Iterable[str]) -> dict[str, str]:
    """{the name under which today's PEFT looks for a tensor: its name in the file}.

    Older ones wrote the adapter's name ("default") and modules_to_save into it, others left the prefix out.
    """
    spelled: dict[str, str] = {}
    # What is there twice counts as _WHOLE_ROLES has it: without modules_to_save first.
    for name in sorted(names, key=lambda name: ".modules_to_save" in name):
        if not _BUFFERS.search(name) and not name.endswith(".original_module.weight"):
            key = re.sub(r"\.(?:modules_to_save\.default|modules_to_save|default)(?=\.|$)", "", name)
            spelled.setdefault(_PREFIX + key.removeprefix(_PREFIX), name)
    return spelled


def _group_by_module(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """({module: {role: tensor name}}, names that are no part of a LoRA adapter or say the same thing twice)."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    strange = []
    for name in names:
        key = name.removeprefix(_PREFIX)
        pattern, role = next(((p, r) for p, r in _TENSOR_ROLES if p.search(key)), (None, ""))
        module = pattern.sub("", key) if pattern else ""
        if pattern is None or role in modules[module]:
            strange.append(name)
        else:
            modules[module][role] = name
    return modules, strange


class _Planner:
    """Turns the tensors of one adapter into updates of base weights, and collects what does not fit."""

    def __init__(
        self, config: AdapterConfig, tensors: Mapping[str, tuple[int, ...]], weights: Mapping[str, tuple[int, ...]]
    ):
        self.config, self.tensors, self.weights = config, tensors, weights
        self.modules, self.unmatched = _group_by_module(name for name in tensors if not _BUFFERS.search(name))
        self.updates: dict[str, list[Update]] = defaultdict(list)
        self.problems: list[str] = []

    def plan(self) -> dict[str, list[Update]]:
        # In this order: low-rank factors and single rows act on what a replaced or resized weight has become.
        for module, roles in self.modules.items():
            self._plan_whole(module, roles)
            self._plan_low_rank(module, roles)
            self._plan_tokens(module, roles)
            self.unmatched += roles.values()  # what no step has taken
        self._check_whole()
        return dict(self.updates)

    def _check_whole(self) -> None:
        """That modules trained in full are there; PEFT's own list also names modules that a model does not have."""
        replaced = {_module_name(weight) for weight, steps in self.updates.items() if isinstance(steps[0], Replace)}
        wanted = {name.rpartition(".")[2] for name in self.config.modules_to_save}
        absent = (wanted & {_module_name(weight) for weight in self.weights}) - replaced
        if self.config.ensure_weight_tying and replaced & {"embed_tokens", "lm_head"}:
            absent -= {"embed_tokens", "lm_head"}  # one of the two stands for both
        if absent:
            self.problems.append(
                f"{ADAPTER_CONFIG} says that {', '.join(sorted(absent))} were trained in full (modules_to_save), but "
                "the weights do not hold them"
            )

    def _weight(self, module: str, parameter: str = "weight") -> str | None:
        return find_spelling(f"{module}.{parameter}", self.weights)

    def _shape(self, weight: str) -> tuple[int, ...]:
        """The shape once this adapter's own Replace, if there is one, has happened."""
        first = next(iter(self.updates.get(weight, ())), None)
        return self.tensors[first.source] if isinstance(first, Replace) else self.weights[weight]

    def _plan_whole(self, module: str, roles: dict[str, str]) -> None:
        if "bias" in roles and (weight := self._weight(module, "bias")):
            self._replace(weight, (roles.pop("bias"),))
        weight = self._weight(module)
        present = [role for role in _WHOLE_ROLES if role in roles]
        if weight is None or not present:
            return
        self._replace(weight, tuple(roles.pop(role) for role in present), frozen=present[0] == "base_layer.weight")
        roles.pop("original", None)  # the module as training found it: modules_to_save has its successor

    def _replace(self, weight: str, sources: tuple[str, ...], frozen: bool = False) -> None:
        new, old = self.tensors[sources[0]], self.weights[weight]
        grows = weight in (EMBEDDING, HEAD) and len(new) == 2
        if grows and new[1:] == old[1:] and new[0] < old[0]:
            self.problems.append(
                f"{sources[0]} has {new[0]} rows, but the model already has {old[0]}: adapters are merged in the "
                "order they were trained, and each onto its own base"
            )
        elif new != old and not (grows and new[1:] == old[1:]):
            self.problems.append(f"{sources[0]} has shape {list(new)}, the base's {weight} {list(old)}")
        elif any(self.tensors[copy] != new for copy in sources[1:]):
            self.problems.append(f"{', '.join(sources)} should be copies of one tensor, but their shapes differ")
        self.updates[weight].append(Replace(sources[0], sources[1:], frozen))

    def _plan_low_rank(self, module: str, roles: dict[str, str]) -> None:
        if {"A", "B"} <= roles.keys():
            name_A, name_B, transposed = roles["A"], roles["B"], self.config.fan_in_fan_out
        elif {"embedding_A", "embedding_B"} <= roles.keys():
            name_A, name_B, transposed = roles["embedding_A"], roles["embedding_B"], True
        else:
            return
        shape_A, shape_B = self.tensors[name_A], self.tensors[name_B]
        if len(shape_A) != 2 or len(shape_B) != 2 or not all((*shape_A, *shape_B)):
            self.problems.append(
                f"{name_A} and {name_B} have shapes {list(shape_A)} and {list(shape_B)}, need two matrices: ZeRO-3 or "
                "FSDP shards were probably not gathered when the adapter was saved; save it again"
            )
        elif (weight := self._weight(module)) is not None:
            # The scaling follows, once it is known under which name the config has it.
            self._low_rank(module, weight, LowRank(name_A, name_B, 0.0, transposed, roles.pop("magnitude", None)))
            if "lora_bias" in roles and (bias := self._weight(module, "bias")):
                self.updates[bias].append(AddBias(roles.pop("lora_bias"), self.config.scaling_of(module)))
        elif not self._fused_experts(module, name_A, name_B) and not self._one_expert(module, name_A, name_B):
            return
        for role in ("A", "B", "embedding_A", "embedding_B"):
            roles.pop(role, None)

    def _key(self, module: str) -> str:
        """The name under which rank_pattern and alpha_pattern know a module: adapted parameters have their own."""
        parameter = f"{module}.weight"
        return parameter if any(parameter.endswith(f".{name}") for name in self.config.target_parameters) else module

    def _low_rank(self, module: str, weight: str, update: LowRank) -> None:
        shape_A, shape_B, shape = self.tensors[update.name_A], self.tensors[update.name_B], self._shape(weight)
        expected = shape[::-1] if update.transposed else shape
        if (shape_B[0], shape_A[1]) != expected or shape_A[0] != shape_B[1]:
            self.problems.append(
                f"{update.name_A} {list(shape_A)} and {update.name_B} {list(shape_B)} do not fit "
                f"{weight} {list(shape)}"
            )
        key = self._key(module)
        self._check_rank(update.name_A, key, shape_A[0])
        if (update.magnitude is not None) != self.config.use_dora:
            self.problems.append(f"{module}: {ADAPTER_CONFIG} and tensors disagree about DoRA (lora_magnitude_vector)")
        elif update.magnitude is not None and self.tensors[update.magnitude] != (shape_B[0],):
            self.problems.append(
                f"{update.magnitude} has shape {list(self.tensors[update.magnitude])}, need [{shape_B[0]}]"
            )
        self.updates[weight].append(
            LowRank(update.name_A, update.name_B, self.config.scaling_of(key), update.transposed, update.magnitude)
        )

    def _check_rank(self, name: str, key: str, rank: int) -> None:
        if rank != self.config.rank_of(key):
            self.problems.append(f"{name} has rank {rank}, {ADAPTER_CONFIG} says {self.config.rank_of(key)}")

    def _fused_experts(self, module: str, name_A: str, name_B: str) -> bool:
        """PEFT adapts the fused experts of transformers 5 so: A (E * rank, in), B (out, rank * E).

        `experts` and `experts.base_layer` say only how the wrappers are nested; the shapes tell gate_up from down.
        """
        _, found, nested = module.partition(".experts")
        experts = Experts.of(module, self.weights)
        if not found or nested not in ("", ".base_layer") or experts is None:
            return False
        count, hidden, inner = experts.count, experts.hidden, experts.inner
        (size_A, in_A), out_B = self.tensors[name_A], self.tensors[name_B][0]
        parameters = {(hidden, 2 * inner): "gate_up_proj", (inner, hidden): "down_proj"}
        if (in_A, out_B) not in parameters or size_A % count or size_A != self.tensors[name_B][1]:
            self.problems.append(
                f"{name_A} {list(self.tensors[name_A])} and {name_B} {list(self.tensors[name_B])} do not fit "
                f"{count} experts of {inner} x {hidden}"
            )
            return True
        parameter = parameters[in_A, out_B]
        parts = FUSED_PARTS[parameter]
        key = f"{module.removesuffix('.base_layer')}.{parameter}"
        self._check_rank(name_A, key, size_A // count)
        rows = out_B // len(parts)
        for index in range(count):
            for number, part in enumerate(parts):
                weight, place = experts.find(index, part)
                source = (index, count, number * rows, (number + 1) * rows)
                update = LowRank(name_A, name_B, self.config.scaling_of(key), expert=source, place=place)
                self.updates[weight].append(update)
        return True

    def _one_expert(self, module: str, name_A: str, name_B: str) -> bool:
        """Adapters of linear experts name them one by one (experts.3.w1), as Chinese-Mixtral's; here onto stacks."""
        match = EXPERT.fullmatch(f"{module}.weight")
        experts = Experts.of(module, self.weights)
        if match is None or experts is None or int(match[2]) >= experts.count:
            return False
        part = expert_part(match[3])
        weight, place = experts.find(int(match[2]), part)
        shape = (experts.hidden, experts.inner) if part == "w2" else (experts.inner, experts.hidden)
        shape_A, shape_B = self.tensors[name_A], self.tensors[name_B]
        if (shape_B[0], shape_A[1]) != shape or shape_A[0] != shape_B[1]:
            self.problems.append(
                f"{name_A} {list(shape_A)} and {name_B} {list(shape_B)} do not fit an expert's {match[3]} "
                f"{list(shape)}"
            )
        self._check_rank(name_A, module, shape_A[0])
        self.updates[weight].append(LowRank(name_A, name_B, self.config.scaling_of(module), place=place))
        return True

    def _plan_tokens(self, module: str, roles: dict[str, str]) -> None:
        weight = self._weight(module)
        if "tokens" not in roles or weight is None:
            return
        indices = self.config.trainable_token_indices
        # A head tied to the embeddings is trained on the embeddings' indices without being listed.
        listed = next((ids for name, ids in indices.items() if module.endswith(name)), indices.get("embed_tokens", []))
        source, shape = roles.pop("tokens"), self._shape(weight)
        if self.tensors[source] != (len(listed), *shape[1:]) or not all(0 <= index < shape[0] for index in listed):
            self.problems.append(
                f"{source} has shape {list(self.tensors[source])} for {len(listed)} trainable_token_indices up to "
                f"{max(listed, default=0)}; the base's {weight} has shape {list(shape)}"
            )
        self.updates[weight].append(ReplaceRows(source, tuple(listed)))


def plan_updates(
    config: AdapterConfig, tensors: Mapping[str, tuple[int, ...]], weights: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Update]]:
    """What one adapter does to a model: {weight name: updates in order}; every adapter tensor stands in it.

    Args:
        tensors: shapes of the adapter's tensors by their names in the file.
        weights: shapes of the model's weights by their checkpoint names, as earlier adapters left them.
    Raises: InputError listing tensors that match no weight and shapes that do not fit.
    """
    if not tensors:
        raise InputError(
            f"adapter {config.folder} holds no tensors at all (a file of some 443 bytes): it was saved empty, as old "
            "training scripts do in their last folder; use the adapter of a checkpoint folder"
        )
    planner = _Planner(config, tensors, weights)
    updates = planner.plan()
    problems = planner.problems
    if planner.unmatched:
        problems.append(
            f"{len(planner.unmatched)} of {len(tensors)} tensors match no weight of the base model: "
            f"{_some(sorted(planner.unmatched))}"
        )
    if problems:
        recorded = f" (it was trained on {config.base_model_name_or_path})" if config.base_model_name_or_path else ""
        raise InputError(
            f"adapter {config.folder} does not fit this base model{recorded}; nothing was merged:\n  "
            + _some(problems, "\n  ")
        )
    return updates


def _module_name(weight: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> q_proj."""
    return weight.rpartition(".")[0].rpartition(".")[2]


def _some(items: list[str], separator: str = ", ") -> str:
    """The first eight items, and how many more there are."""
    more = f"{separator}and {len(items) - 8} more" if len(items) > 8 else ""
    return separator.join(items[:8]) + more
