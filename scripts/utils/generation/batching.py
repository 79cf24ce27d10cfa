"""Continuous batching with a transformers model: sequences join and leave the batch at every step.

A step decodes one token of every sequence that is past its prompt, then prefills those that join: long prompts in
chunks, while others wait for their next token. A prompt that begins like one computed before goes on from there, since
slots that are free again serve as the prefix cache.

Who stands where: a forward pass runs over neighbouring slots, so that the cache is read without copying it together.
Hence rows have no slot of their own: slots 0 to `_decoding` - 1 are those that decode, then come those being
prefilled, then the free ones, and whoever joins, finishes its prompt or leaves is swapped into its part.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..core.arguments import GenerationArguments
from .cache import SlotCache, common_prefix
from .engine import Answer, Completion, Prompter, Request, TextDecoder, TokenSequence
from .prepacking import adapters_folded
from .sampling import choose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFILL_TOKENS = 8192  # tokens of prompts in one step, while nobody waits for it
PREFILL_CHUNK = 512  # the same while others decode: their next token comes after it
MIN_SHARED_PREFIX = 16  # tokens; copying a shorter beginning from another slot saves nothing


class RequestRope(Protocol):
    """Rotary embeddings that differ from request to request; see utils.models.rope."""

    def key(self, planned_length: int) -> Hashable:
        """Which requests rotate alike, and so can share what was computed."""

    def rotate(self, planned_lengths: Sequence[int]) -> None:
        """Rotate the rows of the next forward pass for texts of these lengths."""


@dataclass
class Row:
    """What stands in a slot: a sequence's own text, or the one it is guided away from."""

    sequence: TokenSequence
    tokens: list[int]  # in the sequence's own row its very list, which grows with it
    guides: bool = False


class BatchScheduler:
    """Answers sequences in the slots of one model, in the order in which they came.

    Attributes:
        max_batch_size: slots; a guided sequence takes two.
        waiting: sequences without a slot, the first come first.
        counts: totals of prompt_tokens, cached_tokens, new_tokens, steps.
    """

    def __init__(
        self, model: Any, max_batch_size: int, request_rope: RequestRope | None = None, cache: Any = None
    ) -> None:
        """`cache`: what holds keys and values; default: a SlotCache."""
        self.model, self.max_batch_size, self.request_rope = model, max_batch_size, request_rope
        self.waiting: deque[TokenSequence] = deque()
        self.counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "new_tokens", "steps"), 0)
        self._cache: Any = cache or SlotCache(max_batch_size, getattr(model.config, "max_position_embeddings", None))
        self._rows: list[Row] = []  # row i stands in slot i; those being prefilled come last
        self._decoding = 0  # how many are past their prompt
        # Of all slots, free ones too: the step in which each was in use last, and how what it holds was rotated.
        self._used = [0] * max_batch_size
        self._keys: list[Hashable] = [None] * max_batch_size

    @property
    def running(self) -> int:
        """Sequences that have slots."""
        return sum(not row.guides for row in self._rows)

    @torch.no_grad()
    def step(self) -> bool:
        """Compute the next tokens; returns whether there is more to do."""
        # Those who left go first, so that their slots serve those who wait in this very step.
        for row in [row for row in self._rows if row.sequence.answer.cancelled and not row.guides]:
            row.sequence.end("cancelled")
            self._release_slot(row.sequence)
        self._admit()
        if self._rows:
            self.counts["steps"] += 1
            # In this order: prefilling moves the border between the two parts, and advancing moves the rows, after
            # which the slots in `ready` are no longer those of their logits.
            ready = self._decode() if self._decoding else {}
            ready |= self._prefill()
            self._advance(ready)
        return bool(self._rows or self.waiting)

    def abandon(self, error: BaseException | None = None) -> None:
        """End all sequences, with an error or as cancelled."""
        sequences = [row.sequence for row in self._rows if not row.guides] + list(self.waiting)
        # A pass that failed leaves tokens without their keys; what was cancelled may still serve as a prefix.
        for slot in range(len(self._rows) if error else 0):
            self._cache.truncate(slot, 0)
        self._rows, self._decoding = [], 0
        self.waiting.clear()
        for sequence in sequences:
            sequence.end(None if error else "cancelled", error)

    # ------------------------------------------------------------ who is in

    def _admit(self) -> None:
        for sequence in [sequence for sequence in self.waiting if sequence.answer.cancelled]:
            self.waiting.remove(sequence)
            sequence.end("cancelled")
        while self.waiting:
            sequence = self.waiting[0]  # nobody overtakes the first, or what needs much room would wait for ever
            guided = sequence.request.settings.guidance_scale > 1 and sequence.request.negative_prompt is not None
            if len(self._rows) + 1 + guided > self.max_batch_size or not self._fits(sequence):
                return
            row = Row(sequence, sequence.tokens)
            key = self._key(row)
            coming = [
                common_prefix(other.tokens, row.tokens)
                for slot, other in enumerate(self._rows)
                if slot >= self._decoding and self._keys[slot] == key
            ]
            if max(coming, default=0) >= max(self._cached_lengths(row)) + MIN_SHARED_PREFIX:
                return  # it is being computed in another row: once it is there, this one takes it from the cache
            self.waiting.popleft()
            sequence.answer.num_cached_tokens = self._allocate_slot(row)
            if guided:
                self._allocate_slot(Row(sequence, list(sequence.request.negative_prompt or ()), guides=True))
            self.counts["prompt_tokens"] += len(sequence.tokens)
            self.counts["cached_tokens"] += sequence.answer.num_cached_tokens

    def _fits(self, sequence: TokenSequence) -> bool:
        """Whether there is memory for a sequence beside those that run."""
        return True

    def _allocate_slot(self, row: Row) -> int:
        """Give a row the first free slot, with what is cached of its tokens; returns how many are."""
        cache, slot = self._cache, len(self._rows)
        # `source` has the longest common beginning, in use or free; `target` is the free slot whose past is given up.
        shared = self._cached_lengths(row)
        source = max(range(self.max_batch_size), key=shared.__getitem__)
        length = shared[source] if shared[source] >= MIN_SHARED_PREFIX or source >= slot else 0
        target = min(range(slot, self.max_batch_size), key=lambda number: (self._used[number], number))
        # A conversation that goes on takes its old slot over. Where most of what a slot holds differs (only the system
        # prompt is shared, say), it is left to its own conversation, and the beginning is copied.
        if source >= slot and 2 * length >= len(cache.tokens[source]):
            target = source
        # The target comes to stand at `slot`; the source is followed where it is one of the two that change places.
        if source == slot:
            source = target
        elif source == target:
            source = slot
        self._swap(slot, target)
        if length:
            self._copy(source, slot, length)
        else:
            cache.truncate(slot, 0)
        self._keys[slot] = self._key(row)
        self._rows.append(row)
        return length

    def _cached_lengths(self, row: Row) -> list[int]:
        """How many of a row's tokens each slot holds, rotated as it is.

        At most all but the last, which has to be computed for its logits.
        """
        key = self._key(row)
        return [
            min(common_prefix(tokens, row.tokens), len(row.tokens) - 1) if self._keys[slot] == key else 0
            for slot, tokens in enumerate(self._cache.tokens)
        ]

    def _release_slot(self, sequence: TokenSequence) -> None:
        """Free the slots of a sequence; what they hold stays as a prefix for others."""
        # From the end, so that moving rows leaves the number of the other one as it is.
        for number in reversed([number for number, row in enumerate(self._rows) if row.sequence is sequence]):
            if number < self._decoding:  # to the end of its part first, or a row being prefilled would fall into it
                self._decoding -= 1
                self._swap(number, self._decoding)
                self._rows[number], self._rows[self._decoding] = self._rows[self._decoding], self._rows[number]
                number = self._decoding
            last = len(self._rows) - 1
            self._swap(number, last)
            self._rows[number] = self._rows[last]
            self._rows.pop()

    def _swap(self, one: int, other: int) -> None:
        self._cache.swap(one, other)
        self._used[one], self._used[other] = self._used[other], self._used[one]
        self._keys[one], self._keys[other] = self._keys[other], self._keys[one]

    def _copy(self, source: int, slot: int, length: int) -> None:
        self._cache.copy(source, slot, length)

    def _key(self, row: Row) -> Hashable:
        return self.request_rope.key(self._planned(row)) if self.request_rope else None

    def _planned(self, row: Row) -> int:
        # Not the tokens so far: rotations that changed on the way would not fit the keys that are cached.
        return (
            len(row.sequence.request.negative_prompt or () if row.guides else row.sequence.request.prompt)
            + row.sequence.room
        )

    # ------------------------------------------------------------ forward passes

    def _forward(self, first: int, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Compute the next tokens of neighbouring slots; returns the logits after the last of each, (B, V)."""
        return self.logits(first, tokens)[:, -1]

    def logits(self, first: int, tokens: Sequence[Sequence[int]], keep: int = 1) -> Tensor:
        """The same; returns the logits after the last `keep` tokens of each, (B, keep, V)."""
        if self.request_rope:
            self.request_rope.rotate([self._planned(row) for row in self._rows[first : first + len(tokens)]])
        for slot in range(first, first + len(tokens)):
            self._used[slot] = self.counts["steps"]
        return forward(self.model, self._cache, first, tokens, keep)

    def _decode(self) -> dict[int, Tensor]:
        """Logits (V,) of the rows past their prompts, by slot."""
        logits = self._forward(0, [row.tokens[-1:] for row in self._rows[: self._decoding]])
        return dict(enumerate(logits))

    def _prefill(self) -> dict[int, Tensor]:
        """Compute prompts as far as there is time; logits (V,) of those that are done, which then decode."""
        budget = PREFILL_CHUNK if self._decoding else PREFILL_TOKENS
        ready: dict[int, Tensor] = {}
        group: list[list[int]] = []  # what is computed of the slots first, first + 1, ... in one pass
        first = slot = self._decoding
        while slot < len(self._rows) and (budget > 0 or self._rows[slot].guides):
            row = self._rows[slot]
            rest = row.tokens[len(self._cache.tokens[slot]) :]
            guided = slot + 1 < len(self._rows) and self._rows[slot + 1].guides
            # Only the last of a step is cut, so those that finish are always the first of this part. Guided pairs are
            # neither cut nor parted: both logits are needed in the same step.
            if not (guided or row.guides):
                rest = rest[:budget]
            joined = [*group, rest]
            if len(joined) * max(map(len, joined)) > 2 * sum(map(len, joined)):  # it would be mostly padding
                ready |= self._finish_prefill(first, group)
                first, group = slot, []
            group.append(rest)
            budget -= len(rest)
            slot += 1
        if group:
            ready |= self._finish_prefill(first, group)
        return ready

    def _finish_prefill(self, first: int, group: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        logits = self._forward(first, group)
        ready = {}
        for number, row in enumerate(logits):
            if len(self._cache.tokens[first + number]) == len(self._rows[first + number].tokens):
                ready[first + number] = row
                self._decoding += 1
        return ready

    # ------------------------------------------------------------ tokens

    def _advance(self, ready: dict[int, Tensor]) -> None:
        """Choose the next token of every row that has logits (V,), and tell its reader."""
        slots = [slot for slot in ready if not self._rows[slot].guides]
        if not slots:  # a step that computed a part of a long prompt
            return
        sequences = [self._rows[slot].sequence for slot in slots]
        guides = {id(row.sequence): slot for slot, row in enumerate(self._rows) if row.guides}
        rows = [
            _guide(ready[slot], ready[guides[id(sequence)]], sequence.request.settings.guidance_scale)
            if id(sequence) in guides
            else ready[slot]
            for slot, sequence in zip(slots, sequences, strict=True)
        ]
        # One row is not copied: torch's threads would go on spinning beside those that compute the next token. Several
        # are chosen together, since every choice waits for the GPU once.
        logits = torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)
        tokens, logprobs = choose(logits, [sequence.sampler for sequence in sequences])
        self.counts["new_tokens"] += len(tokens)
        ended = []
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            if id(sequence) in guides:  # the text it is guided away from goes on with the same token
                self._rows[guides[id(sequence)]].tokens.append(token)
            if sequence.advance(token, logprob):
                ended.append(sequence)
        for sequence in ended:  # after the loop, which needs the rows where they are
            self._release_slot(sequence)


def forward(model: Any, cache: SlotCache, first: int, tokens: Sequence[Sequence[int]], keep: int = 1) -> Tensor:
    """A forward pass over the next tokens of neighbouring slots; logits after the last `keep` of each, (B, keep, V).

    A row with fewer tokens than `keep` has logits that mean nothing before its own.
    """
    inputs = cache.prepare(first, tokens, model.config)
    inputs = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    with _masks_of_any_form(model):
        logits: Tensor = model(**inputs, use_cache=True, logits_to_keep=keep).logits
    return logits


def _guide(logits: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Logits (V,) led away from those of the negative prompt.

    Source: Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance", eq. 7.
    """
    one, other = (torch.log_softmax(part.float(), -1) for part in (logits, negative))
    return other + scale * (one - other)


@contextlib.contextmanager
def _masks_of_any_form(model: Any) -> Iterator[None]:
    """Within the block attention takes masks over slots, which FlashAttention's interface does not."""
    # The model's attention layers read the name from the config at every pass.
    config = model.config
    before = config._attn_implementation
    if before not in ("sdpa", "eager"):
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before


class Generator(Prompter):
    """A model that answers within the caller's thread, call by call: PPO's, whose weights change between calls."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        end_ids: Iterable[int] = (),
    ) -> None:
        super().__init__(tokenizer, template, getattr(model.config, "max_position_embeddings", None), end_ids)
        self.model = model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationArguments,
        seeds: Sequence[int] | None = None,
        max_batch_size: int | None = None,
    ) -> list[Completion]:
        """Answer prompts; each answer is the one the prompt would get alone.

        Args:
            seeds: one for each prompt; default: settings.seed and the numbers after it.
            max_batch_size: prompts at once, the next one joins when one is answered; default: all.
        Raises: InputError if a prompt leaves no room in the context.
        """
        seeds = [settings.seed + number for number in range(len(prompts))] if seeds is None else seeds
        requests = [Request(prompt, settings, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        sequences = [TokenSequence(request, self, Answer(len(request.prompt))) for request in requests]
        scheduler = BatchScheduler(self.model, min(max_batch_size or len(sequences), len(sequences)))
        scheduler.waiting.extend(sequences)
        with adapters_folded(self.model):
            while scheduler.step():
                pass
        return [sequence.answer.completion for sequence in sequences if sequence.answer.completion is not None]


def search_beams(model: Any, prompter: Prompter, request: Request) -> Completion:
    """Beam search, which transformers does. Raises: InputError if the prompt leaves no room in the context."""
    from transformers import GenerationConfig

    settings, stop_ids = request.settings, prompter.find_stop_ids(request.settings.stop)
    config = GenerationConfig(
        max_new_tokens=prompter.check(request),
        min_new_tokens=settings.min_new_tokens or None,
        do_sample=False,
        num_beams=settings.num_beams,
        repetition_penalty=float(settings.repetition_penalty),
        eos_token_id=stop_ids or None,
        pad_token_id=stop_ids[0] if stop_ids else 0,
    )
    input_ids = torch.tensor([list(request.prompt)], device=model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
        )
    ids: list[int] = output[0, len(request.prompt) :].tolist()
    # A beam that ended before the longest is padded, here with a stop token.
    end = next((number for number, index in enumerate(ids) if index in stop_ids), None)
    ids = ids if end is None else ids[: end + 1]
    decoder = TextDecoder(prompter.token_bytes, request.strip, settings.stop)
    text = decoder.push(ids if end is None else ids[:-1]) + decoder.finish()
    return Completion(text, ids, len(request.prompt), "length" if end is None and not decoder.stopped else "stop")
