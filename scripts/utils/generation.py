"""Generation: the one way to answer, in batches or as a stream.

The command line, the web demo, the server, PPO and evaluation all use it.
"""

from __future__ import annotations

import codecs
import math
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .arguments import GenerationArguments
from .files import InputError
from .prompts import Message, encode_prompt, stop_token_ids
from .tokenization import encode_text, token_surfaces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---------------------------------------------------------------- ids -> text


class TextDecoder:
    """Turns token ids into text as they come; the pieces, joined, are the text of all of them.

    A character is given once all its bytes are there, whatever tokens they came in; each token is looked at once.
    """

    def __init__(self, surfaces: Sequence[bytes], strip: bool) -> None:
        """`surfaces`: the bytes of each id, see token_surfaces; `strip`: leave out white space at both ends."""
        self._surfaces, self._strip = surfaces, strip
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._started = False
        self._space: list[str] = []  # white space that counts only if more text follows

    def push(self, ids: Iterable[int]) -> str:
        """The text that is complete with these ids; ids beyond the vocabulary (padded rows) stand for nothing."""
        known = (self._surfaces[index] for index in ids if index < len(self._surfaces))
        return self._without_ends(self._decode(b"".join(known)))

    def finish(self) -> str:
        """What is left; half a character becomes U+FFFD."""
        return self._without_ends(self._decode(b"", final=True))

    def _without_ends(self, text: str) -> str:
        if not self._strip:
            return text
        if not text or text.isspace():
            self._space.append(text)
            return ""
        space, self._space = "".join(self._space), []
        text = space + text if self._started else text.lstrip()
        self._started = True
        body = text.rstrip()
        self._space.append(text[len(body) :])
        return body


# ---------------------------------------------------------------- choosing tokens


class SeededSampling:
    """Leaves of each row's distribution the one token that the row's own random numbers draw.

    An answer then depends on its seed, not on the batch around it, nor on what was drawn before. It is the last logits
    processor; generate() takes the likeliest token of what it leaves.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores`: (B, V) logits -> (B, V), 0 at the drawn token and -inf elsewhere."""
        draws = torch.stack([torch.rand(1, generator=generator) for generator in self._generators])
        totals = torch.softmax(scores, -1, dtype=torch.float64).cumsum(-1)
        drawn = torch.searchsorted(totals, draws.to(totals) * totals[:, -1:], right=True)  # (B, 1)
        return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)


class _FiniteCheck:
    """Raises: InputError if the first logits are no numbers; of later ones it would cost a synchronisation each."""

    def __init__(self) -> None:
        self._checked = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._checked and not bool(torch.isfinite(scores).all()):
            raise InputError(
                "the model's logits are not finite: its weights are damaged, or float16 is too narrow for it; "
                "try --dtype bfloat16 or float32"
            )
        self._checked = True
        return scores


class _Stop:
    """A stopping criterion that ends all rows once it is told to."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def _logits_processors(
    settings: GenerationArguments, seeds: Sequence[int], prompt_width: int, stop_ids: Sequence[int]
) -> list[Any]:
    """What changes logits after the repetition penalty, which generate() applies itself."""
    from transformers import (
        MinNewTokensLengthLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors: list[Any] = [_FiniteCheck()]
    if settings.min_new_tokens and stop_ids:
        processors.append(MinNewTokensLengthLogitsProcessor(prompt_width, settings.min_new_tokens, list(stop_ids)))
    if settings.samples:
        if settings.temperature != 1:
            processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k > 0:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(float(settings.top_p)))
        processors.append(SeededSampling(seeds))
    return processors


# ---------------------------------------------------------------- answering


@dataclass(frozen=True)
class Completion:
    """An answer."""

    text: str  # without special tokens
    token_ids: list[int]  # as generated, the stop token included
    num_prompt_tokens: int
    finish_reason: Literal["stop", "length"]


def encode_raw(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text to be continued: BOS, where the tokenizer has one, as pre-training documents begin."""
    bos = tokenizer.bos_token_id
    return ([] if bos is None else [int(bos)]) + encode_text(tokenizer, text)


class Generator:
    """A model that answers: prompts in as token ids, completions out."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None = None
    ) -> None:
        """`template`: the jinja chat template whose end-of-turn token ends answers too; None for plain text."""
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        end = tokenizer.eos_token_id
        self.stop_ids = stop_token_ids(template, tokenizer) if template else [] if end is None else [int(end)]
        self._surfaces = token_surfaces(tokenizer)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers."""
        assert self.template is not None, "conversations need a template"
        return encode_prompt(messages, self.template, self.tokenizer)

    def fit_history(self, messages: Sequence[Message], max_new_tokens: int) -> tuple[list[Message], int]:
        """Leave out the oldest exchanges, not the system message, until prompt and answer fit the context.

        Returns: the messages that stay, and how many went. The last exchange stays even if it does not fit.
        """
        first = 1 if messages and messages[0]["role"] == "system" else 0
        system, turns = list(messages[:first]), list(messages[first:])
        while self.context and len(self.encode([*system, *turns])) + max_new_tokens > self.context:
            later = [number for number, message in enumerate(turns) if number and message["role"] == "user"]
            if not later:
                break
            turns = turns[later[0] :]
        return [*system, *turns], len(messages) - len(system) - len(turns)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationArguments,
        seeds: Sequence[int] | None = None,
        strip: bool = True,
    ) -> list[Completion]:
        """Answer a batch of prompts; each answer is the one the prompt would get alone.

        Args:
            seeds: one for each prompt; default: settings.seed and the numbers after it.
            strip: leave out white space around the text, which continued text needs and answers do not.
        Raises: InputError if a prompt leaves no room in the context.
        """
        rooms = [check_room(len(prompt), settings, self.context) for prompt in prompts]
        seeds = [settings.seed + number for number in range(len(prompts))] if seeds is None else seeds
        rows = self._run(prompts, settings, max(rooms), seeds)
        completions = []
        for prompt, row, room in zip(prompts, rows.tolist(), rooms, strict=True):
            ids, reason = self._cut(row[:room])
            decoder = TextDecoder(self._surfaces, strip)
            text = decoder.push(ids[:-1] if reason == "stop" else ids) + decoder.finish()
            completions.append(Completion(text, ids, len(prompt), reason))
        return completions

    def stream(
        self, prompt: Sequence[int], settings: GenerationArguments, seed: int | None = None, strip: bool = True
    ) -> AnswerStream:
        """Answer one prompt piece by piece; arguments as for `generate`, whose text the joined pieces equal."""
        if settings.num_beams > 1:
            raise InputError("beam search gives nothing before its end; streaming needs --num_beams 1")
        return AnswerStream(self, prompt, settings, settings.seed if seed is None else seed, strip)

    def _cut(self, row: list[int]) -> tuple[list[int], Literal["stop", "length"]]:
        end = next((number for number, index in enumerate(row) if index in self.stop_ids), None)
        return (row, "length") if end is None else (row[: end + 1], "stop")

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationArguments,
        max_new_tokens: int,
        seeds: Sequence[int],
        streamer: Any = None,
        stop: _Stop | None = None,
    ) -> Tensor:
        """New tokens, (B, up to max_new_tokens); what follows a row's first stop token means nothing."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        width = max(map(len, prompts))
        # Rows are padded with their own first token: no pad token is needed, and a repetition penalty that looks at
        # padding too (not all releases of transformers leave it out) sees nothing new.
        input_ids = torch.tensor([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,  # SeededSampling draws
            num_beams=settings.num_beams,
            repetition_penalty=float(settings.repetition_penalty),
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.stop_ids[0] if self.stop_ids else 0,
        )
        output = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(_logits_processors(settings, seeds, width, self.stop_ids)),
            stopping_criteria=StoppingCriteriaList([stop] if stop else []),
            streamer=streamer,
            synced_gpus=False,  # each process answers prompts of its own; PPO gathers sharded weights beforehand
        )
        return output[:, width:]


def check_room(num_prompt_tokens: int, settings: GenerationArguments, context: int | None) -> int:
    """How many new tokens a prompt has room for. Raises: InputError if none, or if the prompt is empty."""
    if num_prompt_tokens == 0:
        raise InputError("the prompt is empty, and the tokenizer has no BOS token to begin with")
    room = settings.max_new_tokens if context is None else min(settings.max_new_tokens, context - num_prompt_tokens)
    if room < 1:
        raise InputError(
            f"the prompt has {num_prompt_tokens} tokens, the model's context {context}: nothing is left for an "
            "answer; shorten the prompt"
        )
    return room


class AnswerStream:
    """Iterate over it for pieces of text; `completion` is there afterwards. `close()` stops the model early.

    The model runs in a thread, since generate() hands out tokens only from within.
    """

    completion: Completion | None = None

    def __init__(
        self, generator: Generator, prompt: Sequence[int], settings: GenerationArguments, seed: int, strip: bool
    ) -> None:
        self._generator, self._prompt, self._strip = generator, prompt, strip
        self._items: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        self._stop = _Stop()
        self._prompt_came = False
        room = check_room(len(prompt), settings, generator.context)
        self._thread = threading.Thread(target=self._work, args=(settings, room, seed), daemon=True)
        self._thread.start()

    def put(self, ids: Tensor) -> None:
        """Called by generate(): first with the prompt, then with each new token."""
        if self._prompt_came:
            self._items.put(ids.tolist())
        self._prompt_came = True

    def end(self) -> None:
        """Called by generate() when it is done; _work says so to the reader."""

    def _work(self, settings: GenerationArguments, room: int, seed: int) -> None:
        try:
            self._generator._run([self._prompt], settings, room, [seed], streamer=self, stop=self._stop)
        except BaseException as error:  # raised again where the answer is read
            self._items.put(error)
        self._items.put(None)

    def __iter__(self) -> Iterator[str]:
        decoder = TextDecoder(self._generator._surfaces, self._strip)
        pieces: list[str] = []
        token_ids: list[int] = []
        reason: Literal["stop", "length"] = "length"
        try:
            while (item := self._items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if reason == "stop":
                    continue  # generate() may run a step further than its stop token
                token_ids += item
                if item[0] in self._generator.stop_ids:
                    reason = "stop"
                elif piece := decoder.push(item):
                    pieces.append(piece)
                    yield piece
            if piece := decoder.finish():
                pieces.append(piece)
                yield piece
            self.completion = Completion("".join(pieces), token_ids, len(self._prompt), reason)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the model after the token it is at; nothing happens if it has finished."""
        self._stop.event.set()
        self._thread.join()
