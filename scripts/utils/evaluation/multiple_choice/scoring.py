"""Scoring choices: how likely a model holds each of several continuations of a prompt.

Prompts that begin alike (the examples of a subject before each of its questions) are a group: their beginning is
computed once, its keys and values stand in every slot of a SlotCache, and what differs is computed in batches of
similar lengths. A prompt's continuations go on from its slot, one after the other, so the prompt is computed once too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ...core.machine import available_bytes
from ...generation.batching import forward
from ...generation.cache import GROWTH, SlotCache, common_prefix
from ...models.rope import find_row_rotary, rotary_dim
from ..likelihood import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

OnScore = Callable[[int, "ChoiceScore"], None]
COUNTS = ("requests", "prompt_tokens", "computed_tokens", "retries", "errors")
BATCH_TOKENS, BATCH_TOKENS_ON_GPU = 1024, 4096  # in one forward pass, padding included
LEAST_FILLED = 0.6  # of a batch's longest row, the shortest; the rest is padding
GROUP_COST = 64  # what a group costs beside its tokens, in tokens: a pass for its beginning, and smaller batches
CACHE_SHARE = 0.25  # of the free memory, for keys and values at most
LOGIT_NUMBERS = 2**25  # rows x positions x vocabulary of one pass at most, where a row leaves the choice


# ---------------------------------------------------------------- what is asked and found


@dataclass(frozen=True)
class ChoiceRequest:
    """A prompt, and the continuations whose likelihood after it is asked for.

    Attributes:
        prompt: token ids, for models that run here; BOS included where there is one.
        continuations: token ids of each, at least one.
        text: the same prompt for servers, a text to be continued or a conversation.
        texts: the same continuations for servers.
    """

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    text: str | list[dict[str, str]]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceScore:
    """What came of a request.

    Attributes:
        logprobs: log-likelihood of each continuation after the prompt, in nats, summed over its tokens.
        error: why there are none: a server failed, again and again.
    """

    logprobs: tuple[float, ...]
    error: str | None = None


class Scorer(Protocol):
    """What scores: a model here, or a server.

    Attributes:
        counts: totals of requests, prompt_tokens (in the prompts), computed_tokens (in forward passes, padding
            included), retries and errors.
    """

    counts: dict[str, int]

    def score(self, requests: Sequence[ChoiceRequest], on_score: OnScore | None = None) -> list[ChoiceScore]:
        """Score all, in order; `on_score` is told each score and the number of its request, as soon as it is known."""

    def close(self) -> None:
        """Free what is held."""


def check_requests(requests: Sequence[ChoiceRequest], context: int | None) -> None:
    """Raises: InputError if a model cannot score one of them.

    Args: context: tokens of prompt and continuation together at most; None: any number.
    """
    for number, request in enumerate(requests):
        if not (request.prompt and request.continuations and all(request.continuations)):
            raise InputError(f"request {number}: prompt and continuations need at least a token each")
        length = len(request.prompt) + max(map(len, request.continuations))
        if context is not None and length > context:
            raise InputError(
                f"request {number}: prompt and continuation have {length} tokens, the model's context {context}; "
                "leave out examples"
            )


# ---------------------------------------------------------------- groups


@dataclass(frozen=True)
class Group:
    """Prompts, by number, whose first `length` tokens are computed once; the last token of each is its own."""

    length: int
    numbers: tuple[int, ...]


@dataclass
class _Node:
    """Prompts with a common beginning: what it costs to compute them in groups of longer beginnings."""

    depth: int
    numbers: list[int] = field(default_factory=list)
    tokens: int = 0
    cost: int = 0
    groups: list[Group] = field(default_factory=list)

    def add(self, other: _Node) -> None:
        """Take over what lies below."""
        self.numbers += other.numbers
        self.tokens += other.tokens
        self.cost += other.cost
        self.groups += other.groups

    def settle(self) -> _Node:
        """Compute all together, if that costs less."""
        # What all have in common is computed once instead of once for each; `cost` has the best way below this node.
        saved = (len(self.numbers) - 1) * self.depth
        cost = self.tokens - saved + GROUP_COST
        if len(self.numbers) > 1 and cost < self.cost:
            # A short beginning is not worth a pass and copies: one group, each prompt whole.
            length = self.depth if saved > GROUP_COST else 0
            self.cost, self.groups = cost, [Group(length, tuple(self.numbers))]
        return self


def group_prompts(prompts: Sequence[Sequence[int]]) -> list[Group]:
    """Groups that need the fewest tokens computed, a group itself counted as GROUP_COST.

    The prompts in order are a tree of common beginnings; each node is computed as one group, or as those below it.
    """
    keys = [
        np.asarray(prompt[:-1], ">u4").tobytes() for prompt in prompts
    ]  # sorted as the tokens would be, but faster
    path: list[_Node] = []  # from the root to the last prompt
    last: Sequence[int] = ()
    for number in sorted(range(len(prompts)), key=keys.__getitem__):
        prompt = prompts[number]
        # A prompt's last token is never shared: its logits are what continuations are scored by.
        _close(path, min(common_prefix(last, prompt), max(len(last), 1) - 1, len(prompt) - 1))
        size = len(prompt)
        path.append(_Node(size - 1, [number], size, size + GROUP_COST, [Group(0, (number,))]))
        last = prompt
    _close(path, -1)
    return path[0].groups if path else []


def _close(path: list[_Node], depth: int) -> None:
    """Settle what lies deeper than the place where the next prompt branches off."""
    while path and path[-1].depth > depth:
        node = path.pop().settle()
        if not path or path[-1].depth < depth:
            path.append(_Node(depth))
        path[-1].add(node)
        if path[-1].depth == depth == -1:
            return


# ---------------------------------------------------------------- transformers


class PrefixScorer:
    """Scorer on a transformers model.

    Equal requests get equal scores whatever stands beside them, up to rounding. Keys and values of at most CACHE_SHARE
    of the free memory are held; where that is less than a row needs, of one row. The model is its own until `close`.
    """

    def __init__(self, model: Any, batch_tokens: int | None = None, exact: bool = True) -> None:
        """
        Args:
            batch_tokens: computed at once, padding included; default: what the device is quick with.
            exact: logits are made of the last hidden states in float32, by a copy of lm_head (4 bytes a weight); off:
                in the model's precision, in which logits near 20 lie 1/8 apart in bfloat16.
        Raises: InputError if its layers keep no keys and values for each token.
        """
        check_layers(model.config)
        usual = BATCH_TOKENS if model.device.type == "cpu" else BATCH_TOKENS_ON_GPU
        self.model = model
        self._batch_tokens = batch_tokens or usual
        self._head = model.get_output_embeddings()
        if exact and self._head.weight.dtype in (torch.bfloat16, torch.float16):
            model.set_output_embeddings(exact_head(self._head))
        self._rotations = find_row_rotary(model)  # None but under auto-NTK
        self._cache: SlotCache | None = None
        self.counts = dict.fromkeys(COUNTS, 0)

    @torch.no_grad()
    def score(self, requests: Sequence[ChoiceRequest], on_score: OnScore | None = None) -> list[ChoiceScore]:
        """See Scorer. Raises: InputError for requests beyond the context, or logits that are no numbers."""
        check_requests(requests, getattr(self.model.config, "max_position_embeddings", None))
        self.counts["requests"] += len(requests)
        self.counts["prompt_tokens"] += sum(len(request.prompt) for request in requests)
        scores: dict[int, ChoiceScore] = {}
        for alike in self._split_by_rotation(requests):
            for group in group_prompts([requests[number].prompt for number in alike]):
                members = [alike[place] for place in group.numbers]
                for number, score in self._score_group(requests, members, group.length):
                    scores[number] = score
                    if on_score:
                        on_score(number, score)
        return [scores[number] for number in range(len(requests))]

    def _split_by_rotation(self, requests: Sequence[ChoiceRequest]) -> list[list[int]]:
        """The numbers of requests whose keys are rotated alike; under auto-NTK that depends on their lengths."""
        found: dict[Hashable, list[int]] = {}
        for number, request in enumerate(requests):
            key = self._rotations.key(_length(request)) if self._rotations else None
            found.setdefault(key, []).append(number)
        return list(found.values())

    def _score_group(
        self, requests: Sequence[ChoiceRequest], members: Sequence[int], shared: int
    ) -> Iterator[tuple[int, ChoiceScore]]:
        # With its continuation: so many places every slot gets, and so far auto-NTK rotates.
        longest = max(_length(requests[number]) for number in members)
        if self._rotations:
            self._rotations.rotate([longest])
        batches = list(self._batches(requests, members, shared, longest))
        num_slots = max(map(len, batches))
        cache = self._empty_cache(num_slots, longest)
        # Into slot 0, in pieces as large as a batch; the other slots get copies, which cost no computing.
        beginning = list(requests[members[0]].prompt[:shared])
        for start in range(0, shared, self._batch_tokens):
            self._compute(cache, [beginning[start : start + self._batch_tokens]])
        for slot in range(1, num_slots) if shared else ():
            cache.copy(0, slot, shared)
        for batch in batches:
            found = self._score_batch(cache, [requests[number] for number in batch], shared)
            yield from ((number, ChoiceScore(tuple(row))) for number, row in zip(batch, found, strict=True))

    def _empty_cache(self, num_slots: int, places: int) -> SlotCache:
        """The last group's, if it is large enough: memory that is in use already is much quicker to write to."""
        if self._cache is None or len(self._cache.tokens) < num_slots or self._cache.places < places:
            self._cache = None  # before there is another
            self._cache = SlotCache(num_slots, places=places)
        for slot in range(len(self._cache.tokens)):
            self._cache.truncate(slot, 0)
        return self._cache

    def _batches(
        self, requests: Sequence[ChoiceRequest], members: Sequence[int], shared: int, longest: int
    ) -> Iterator[list[int]]:
        """The members, long ones first, so that a batch's rows need little padding."""
        config, places = self.model.config, (longest + GROWTH - 1) // GROWTH * GROWTH
        most = max(1, self._free_bytes() // (places * token_bytes(config, self.model.dtype)))
        rest = sorted(members, key=lambda number: (-len(requests[number].prompt), number))
        while rest:
            # Rows that are much shorter than the first wait for a batch of their own: padding costs as much as text.
            length = len(requests[rest[0]].prompt) - shared
            alike = sum(len(requests[number].prompt) - shared >= LEAST_FILLED * length for number in rest)
            count = min(max(1, self._batch_tokens // length), most, alike)
            # Logits of long continuations are (rows, tail, V): with large vocabularies they, not keys, are the limit.
            tail = max(len(ids) for number in rest[:count] for ids in requests[number].continuations)
            count = min(count, max(1, LOGIT_NUMBERS // (tail * config.vocab_size)))
            yield rest[:count]
            rest = rest[count:]

    def _free_bytes(self) -> int:
        device = self.model.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
        return int(CACHE_SHARE * free)

    def _score_batch(self, cache: SlotCache, requests: Sequence[ChoiceRequest], shared: int) -> list[list[float]]:
        """The likelihoods of each request's continuations; the slots then hold the shared tokens again."""
        # One pass tells the first token of every continuation; letters need no more.
        logits = self._compute(cache, [request.prompt[shared:] for request in requests])
        first = torch.log_softmax(logits[:, -1], -1).float()
        scores = [
            row[[ids[0] for ids in request.continuations]].tolist()
            for row, request in zip(first, requests, strict=True)
        ]
        # Longer ones by turns: each writes its tokens behind the prompt, and the next one overwrites them.
        for place in range(max(len(request.continuations) for request in requests)):
            self._add_tails(cache, requests, place, scores)
        for slot in range(len(requests)):
            cache.truncate(slot, shared)
        return scores

    def _add_tails(
        self, cache: SlotCache, requests: Sequence[ChoiceRequest], place: int, scores: list[list[float]]
    ) -> None:
        """Add what the tokens after the first of each request's continuation at `place` bring."""
        tails = [request.continuations[place] if place < len(request.continuations) else () for request in requests]
        keep = max(map(len, tails)) - 1
        if keep < 1:
            return
        # Every slot needs a token; what is computed for one without a tail is not looked at.
        logits = self._compute(cache, [tail[:-1] or (0,) for tail in tails], keep)
        logprobs = torch.log_softmax(logits, -1).float()
        for slot, (tail, request) in enumerate(zip(tails, requests, strict=True)):
            cache.truncate(slot, len(request.prompt))
            if len(tail) > 1:
                # Rows end together: a shorter tail's logits stand at the last places.
                targets = torch.tensor(tail[1:], device=logprobs.device).unsqueeze(1)
                scores[slot][place] += float(logprobs[slot, 1 - len(tail) :].gather(1, targets).sum())

    def _compute(self, cache: SlotCache, rows: Sequence[Sequence[int]], keep: int = 1) -> Tensor:
        """Logits (B, keep, V) after the last tokens of the first B slots. Raises: InputError if one is no number."""
        self.counts["computed_tokens"] += len(rows) * max(map(len, rows))
        logits = forward(self.model, cache, 0, rows, keep)
        check_finite(logits[:, -1], "the model's logits")
        return logits

    def close(self) -> None:
        """See Scorer. The model is whose it was."""
        self.model.set_output_embeddings(self._head)
        self._cache = None


def exact_head(head: nn.Module) -> nn.Module:
    """A copy of an lm_head, adapters included, that computes in float32 whatever it is given."""
    copied = copy.deepcopy(head).float()
    copied.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
    return copied


def _length(request: ChoiceRequest) -> int:
    return len(request.prompt) + max(map(len, request.continuations))


def token_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Size of a token's keys and values."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * rotary_dim(config) * dtype.itemsize)


def check_layers(config: PreTrainedConfig) -> None:
    """Raises: InputError for layers that a cache of keys and values by token does not serve."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"} or len(kinds) > 1:
        raise InputError(
            f"a {config.model_type} model has layers of the kinds {', '.join(sorted(kinds))}; prompts that share "
            "their beginning need the same attention in all of them: serve it elsewhere, and pass that server"
        )
