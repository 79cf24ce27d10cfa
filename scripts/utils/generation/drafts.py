"""What drafts in speculative decoding: a smaller model, the first layers of the model itself, or the text so far."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..models.loading import causal_model
from ..models.rope import find_row_rotary
from ..text.tokenizer import encode_raw, encode_text, token_surfaces
from .batching import forward
from .cache import SlotCache, common_prefix
from .engine import TokenSequence
from .sampling import Sampler, argmax_tokens, draw, process_logits
from .speculation import Draft, DraftLengthController, Proposal, SpeculativeScheduler, distribution

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_MATCH, SHORTEST_MATCH = 4, 2  # tokens that must have occurred before, for what followed them to be drafted
CATCHING_UP = 512  # tokens of a prompt that a draft model computes at once
TAIL = 8  # tokens of the text that a draft in another vocabulary is cut into tokens with


# ---------------------------------------------------------------- the text so far


class PromptLookup(Draft):
    """Drafts what followed the last tokens where they occurred before, in the prompt or the answer.

    Source: Saxena 2023, "Prompt Lookup Decoding".
    """

    def __init__(self, scheduler: SpeculativeScheduler) -> None:
        self._seen: WeakKeyDictionary[TokenSequence, _Occurrences] = WeakKeyDictionary()

    def propose(
        self, sequences: Sequence[TokenSequence], counts: Sequence[int], controllers: Sequence[DraftLengthController]
    ) -> list[Proposal]:
        proposals = []
        for sequence, count, controller in zip(sequences, counts, controllers, strict=True):
            found, length = self._seen.setdefault(sequence, _Occurrences()).continuation(sequence.tokens, count)
            confidence = length / (LONGEST_MATCH + 1)  # the longer what occurred before, the surer what follows
            end = next((place for place in range(1, len(found) + 1) if not controller.goes_on(confidence)), len(found))
            proposals.append(Proposal(_until_stop(found[:end], sequence.sampler)))
        return proposals


class _Occurrences:
    """Where the last tokens of a growing sequence occurred before."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # the place after the last occurrence that something follows
        self._known = 0  # tokens that have been looked at

    def continuation(self, tokens: Sequence[int], count: int) -> tuple[list[int], int]:
        """`count` tokens that followed the longest known ending of `tokens`, and its length; none if it has none."""
        # Up to the last token but one: the ending itself has nothing behind it, and would always be found.
        for end in range(max(self._known, SHORTEST_MATCH), len(tokens)):
            for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self._ends[tuple(tokens[end - length : end])] = end
        self._known = len(tokens)
        for length in range(min(LONGEST_MATCH, len(tokens)), SHORTEST_MATCH - 1, -1):
            start = self._ends.get(tuple(tokens[-length:]))
            if start is not None:
                period = len(tokens) - start  # what repeats may reach beyond the end of the text
                return [tokens[start + number % period] for number in range(count)], length
        return [], 0


# ---------------------------------------------------------------- models


class _TokenDraft(Draft):
    """Drafts token by token with logits over the model's own vocabulary."""

    def propose(
        self, sequences: Sequence[TokenSequence], counts: Sequence[int], controllers: Sequence[DraftLengthController]
    ) -> list[Proposal]:
        # Forks draw from the sequences' own random numbers (see Sampler.fork), but count and penalise by themselves.
        forks = [sequence.sampler.fork() for sequence in sequences]
        # Where log-probabilities are asked for, `choose` has to choose.
        random = [fork.settings.samples and fork.top_logprobs is None for fork in forks]
        proposals, left = [Proposal() for _ in sequences], list(counts)
        pending = self._begin([sequence.tokens for sequence in sequences], sequences)
        while any(left):  # all slots are computed together: those that need no more tokens too
            scores = process_logits(self._logits(pending, sequences), forks)
            tokens = argmax_tokens(scores)
            for row in (row for row, count in enumerate(left) if count):
                if random[row]:
                    probabilities = distribution(scores[row], forks[row])
                    proposals[row].probabilities.append(probabilities)
                    tokens[row] = draw([forks[row]], probabilities.unsqueeze(0), None)[0]
                    confidence = float(probabilities.max())
                else:
                    confidence = float((scores[row, tokens[row]] - scores[row].logsumexp(-1)).exp())
                proposals[row].tokens.append(tokens[row])
                ends = tokens[row] in forks[row].stop_ids
                left[row] = left[row] - 1 if controllers[row].goes_on(confidence) and not ends else 0
            for fork, token in zip(forks, tokens, strict=True):
                fork.advance(token)
            pending = [[token] for token in tokens]
        return proposals

    def _begin(self, contexts: Sequence[Sequence[int]], sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """What of each context is to be computed with the first draft, at least its last token."""
        raise NotImplementedError

    def _logits(self, pending: Sequence[Sequence[int]], sequences: Sequence[TokenSequence]) -> Tensor:
        """Compute the next tokens of the slots 0, 1, ...; returns (B, V) over the model's vocabulary."""
        raise NotImplementedError


class EarlyExitDraft(_TokenDraft):
    """Drafts with the first layers of the model, its norm and its head; weights and cache are the model's.

    What the first layers keep of the text is the same in both, so nothing is computed twice but the drafted tokens.
    Source of the idea: Zhang et al. 2023, "Draft & Verify: Lossless Large Language Model Acceleration via
    Self-Speculative Decoding".
    """

    def __init__(self, num_layers: int, scheduler: SpeculativeScheduler) -> None:
        self._scheduler = scheduler
        self._backbone = causal_model(scheduler.model).get_decoder()
        self._layers = self._backbone.layers[:num_layers]
        config = scheduler.model.config
        head = config.hidden_size * config.vocab_size
        layers = scheduler.model.num_parameters(exclude_embeddings=True)
        layers -= 0 if config.tie_word_embeddings else head
        self.cost = (layers * num_layers / config.num_hidden_layers + head) / (layers + head)

    def _begin(self, contexts: Sequence[Sequence[int]], sequences: Sequence[TokenSequence]) -> list[list[int]]:
        return [list(tokens[-1:]) for tokens in contexts]

    def _logits(self, pending: Sequence[Sequence[int]], sequences: Sequence[TokenSequence]) -> Tensor:
        with self._first_layers():
            return self._scheduler.logits(0, pending)[:, -1]

    @contextlib.contextmanager
    def _first_layers(self) -> Iterator[None]:
        """Within the block the model has its first layers only."""
        # The cache goes by a layer's number, which stays; layers left out are not asked, and keep what they have.
        layers, self._backbone.layers = self._backbone.layers, self._layers
        try:
            yield
        finally:
            self._backbone.layers = layers


class ModelDraft(_TokenDraft):
    """Drafts with another model of the same vocabulary, whose slots are those of the scheduler."""

    def __init__(self, model: Any, scheduler: SpeculativeScheduler) -> None:
        self._model, self._request_rope = model, find_row_rotary(causal_model(model))
        self._cache = SlotCache(scheduler.max_batch_size, getattr(model.config, "max_position_embeddings", None))
        self._rows, self._vocabulary = model.config.vocab_size, scheduler.model.config.vocab_size
        sizes = [one.num_parameters(exclude_embeddings=True) for one in (model, scheduler.model)]
        self.cost = sizes[0] / sizes[1]

    def swap(self, one: int, other: int) -> None:
        self._cache.swap(one, other)

    def copy(self, source: int, slot: int, length: int) -> None:
        self._cache.copy(source, slot, min(length, len(self._cache.tokens[source])))

    def truncate(self, slot: int, length: int) -> None:
        self._cache.truncate(slot, length)

    def _begin(self, contexts: Sequence[Sequence[int]], sequences: Sequence[TokenSequence]) -> list[list[int]]:
        pending = []
        for slot, tokens in enumerate(contexts):
            if self._rows < self._vocabulary:  # the model's padding rows, which only untrained models write
                tokens = [min(token, self._rows - 1) for token in tokens]
            # The cache may hold drafts that were refused, or lack what the model wrote while nothing was drafted.
            known = min(common_prefix(self._cache.tokens[slot], tokens), len(tokens) - 1)
            self._cache.truncate(slot, known)
            while len(tokens) - known > CATCHING_UP:
                self._compute(slot, [tokens[known : known + CATCHING_UP]], sequences[slot : slot + 1])
                known += CATCHING_UP
            pending.append(list(tokens[known:]))
        return pending

    def _logits(self, pending: Sequence[Sequence[int]], sequences: Sequence[TokenSequence]) -> Tensor:
        logits = self._compute(0, [[min(token, self._rows - 1) for token in tokens] for tokens in pending], sequences)
        return torch.nn.functional.pad(logits, (0, self._vocabulary - self._rows), value=-torch.inf)

    def _compute(self, first: int, tokens: Sequence[Sequence[int]], sequences: Sequence[TokenSequence]) -> Tensor:
        """Logits after the last token of each, (B, draft's V)."""
        if self._request_rope:
            self._request_rope.rotate([len(sequence.request.prompt) + sequence.room for sequence in sequences])
        return forward(self._model, self._cache, first, tokens)[:, -1]


class RetokenizedDraft(ModelDraft):
    """Drafts with a model of another vocabulary: it goes on with the text, and its text is cut into tokens."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        own_tokenizer: PreTrainedTokenizerBase,
        scheduler: SpeculativeScheduler,
    ) -> None:
        """`tokenizer`: the draft model's; `own_tokenizer`: that of the model whose tokens are drafted."""
        super().__init__(model, scheduler)
        self._vocabulary = self._rows  # its logits are read in its own vocabulary
        self._tokenizer, self._token_bytes = tokenizer, token_surfaces(tokenizer)
        self._own_tokenizer, self._own_token_bytes = own_tokenizer, token_surfaces(own_tokenizer)

    def propose(
        self, sequences: Sequence[TokenSequence], counts: Sequence[int], controllers: Sequence[DraftLengthController]
    ) -> list[Proposal]:
        written: list[list[int]] = [[] for _ in sequences]
        texts = [_text(sequence.tokens, self._own_token_bytes).removeprefix(" ") for sequence in sequences]
        pending, left = self._begin([encode_raw(text, self._tokenizer) for text in texts], sequences), list(counts)
        while any(left):
            confidence, tokens = self._logits(pending, sequences).softmax(-1).max(-1)
            pending = [[token] for token in tokens.tolist()]
            for row in (row for row, count in enumerate(left) if count):
                written[row] += pending[row]
                left[row] = left[row] - 1 if controllers[row].goes_on(float(confidence[row])) else 0
        drafted = [self._in_own_tokens(sequence.tokens, ids) for sequence, ids in zip(sequences, written, strict=True)]
        return [
            Proposal(_until_stop(tokens[:count], sequence.sampler))
            for sequence, tokens, count in zip(sequences, drafted, counts, strict=True)
        ]

    def _in_own_tokens(self, tokens: Sequence[int], written: Sequence[int]) -> list[int]:
        """The model's tokens for the text of the draft's; none where no token of it begins where the text ends."""
        token_bytes, end = self._own_token_bytes, self._tokenizer.eos_token_id
        written = written[: written.index(end)] if end in written else written
        text = _text(written, self._token_bytes)
        tail = b"".join(token_bytes[token] for token in tokens[-TAIL:] if token < len(token_bytes))
        tail = tail.lstrip(bytes(range(0x80, 0xC0)))  # a character that began before
        try:
            joined = tail.decode() + text
        except UnicodeDecodeError:  # the model is within a character
            return []
        ids = encode_text(self._own_tokenizer, joined)
        ends = list(accumulate(len(token_bytes[index]) for index in ids))
        border = len(tail) + (ends[-1] - len(joined.encode()) if ends else 0)  # after the space that some put before
        return ids[ends.index(border) + 1 :] if border in ends else []


def _text(tokens: Sequence[int], token_bytes: Sequence[bytes]) -> str:
    """The text of tokens, as far as its characters are complete; special tokens have none."""
    joined = b"".join(token_bytes[token] for token in tokens if token < len(token_bytes))
    return codecs.getincrementaldecoder("utf-8")("replace").decode(joined)


def _until_stop(tokens: list[int], sampler: Sampler) -> list[int]:
    """The tokens up to the first that ends the answer."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in sampler.stop_ids), None)]


# ---------------------------------------------------------------- from the flags


def same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same tokens in the same rows."""
    return one is other or (len(one) == len(other) and one.get_vocab() == other.get_vocab())
