"""Engines that decode here: a thread works for whoever submits, with one set of slots for each adapter."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..core.arguments import GUIDED_DRAFTS
from ..core.errors import InputError
from ..models.loading import causal_model
from .batching import BatchScheduler, RequestRope, search_beams
from .engine import BASE, Answer, Completion, Delta, Engine, Request, TokenSequence
from .speculation import Speculation, SpeculativeScheduler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")


class DecodingEngine(Engine):
    """An Engine on schedulers of its own."""

    def __init__(
        self,
        schedulers: Mapping[str, BatchScheduler],
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        context: int | None,
        end_ids: Iterable[int] = (),
    ) -> None:
        """`schedulers`: one for each model, by name; all have the same number of slots."""
        slots = next(iter(schedulers.values())).max_batch_size
        super().__init__(tokenizer, template, context, schedulers, slots, end_ids)
        self._schedulers = dict(schedulers)
        # One thread owns the model, its adapters and the schedulers; the others only append to queues, and wake it.
        self._tasks: deque[Callable[[], None]] = deque()  # what is to be done between two steps
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_delta: Callable[[Delta], None] | None = None) -> Answer:
        name = self._find_model(request)
        if request.settings.num_beams > 1:
            raise InputError("beam search gives nothing before its end; need num_beams 1 here")
        if request.settings.guidance_scale > 1 and request.negative_prompt is not None and self.max_batch_size < 2:
            raise InputError("guidance_scale needs two slots, one for the negative prompt; pass --max_batch_size 2")
        # What can be refused is refused here, in the caller's thread, where it can be raised.
        answer = Answer(len(request.prompt), on_delta)
        sequence = TokenSequence(request, self, answer)
        with self._changed:
            self._check_open()
            self._schedulers[name].waiting.append(sequence)
            self._changed.notify()
        return answer

    def _call(self, function: Callable[[], Result]) -> Result:
        """What a function returns (or raises) that the engine's thread calls between two steps."""
        future: Future[Result] = Future()

        def task() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # raised again where it was asked for
                future.set_exception(error)

        with self._changed:
            self._check_open()
            self._tasks.append(task)
            self._changed.notify()
        return future.result()

    def statistics(self) -> dict[str, float]:
        schedulers = list(self._schedulers.values())
        totals: dict[str, float] = {
            "running": sum(scheduler.running for scheduler in schedulers),
            "waiting": sum(len(scheduler.waiting) for scheduler in schedulers),
            "max_batch_size": self.max_batch_size,
        }
        for scheduler in schedulers:
            for name, count in scheduler.counts.items():
                totals[name] = totals.get(name, 0) + count
        return totals

    def close(self) -> None:
        with self._changed:  # what is submitted after it is refused, what before it is cancelled
            self._closed = True
            self._changed.notify()
        # A reader's on_delta runs in the engine's thread, and may close it.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        schedulers = self._schedulers
        while True:
            # The lock is held while there is nothing to do, never during a step: submit must not wait for the model.
            with self._changed:
                while not (self._closed or self._tasks or any(s.waiting or s.running for s in schedulers.values())):
                    self._changed.wait()
                closed = self._closed
            while self._tasks:
                self._tasks.popleft()()
            # A step of each adapter in turn: their weights cannot be mixed in one pass.
            for name, scheduler in schedulers.items():
                if closed:
                    scheduler.abandon()
                elif scheduler.waiting or scheduler.running:
                    self._step(name, scheduler)
            if closed:
                return

    def _adapter(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Within it the model is the one of this name."""
        return contextlib.nullcontext()

    def _step(self, name: str, scheduler: BatchScheduler) -> None:
        try:
            with self._adapter(name):
                scheduler.step()
        except BaseException as error:  # raised again where the answers are read
            scheduler.abandon(error)


class TransformersEngine(DecodingEngine):
    """An Engine on a transformers model."""

    name = "transformers"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        *,
        max_batch_size: int = 8,
        context: int | None = None,
        request_rope: RequestRope | None = None,
        adapters: Sequence[str] = (),
        speculation: Speculation | None = None,
        end_ids: Iterable[int] = (),
    ) -> None:
        """
        Args:
            max_batch_size: requests answered at once.
            context: tokens of prompt and answer together; default: what the model was made for.
            adapters: names of a PeftModel's adapters, each a model of its own beside the base.
            speculation: what drafts, if anything does.
            end_ids: see Prompter.
        """
        own: int | None = getattr(model.config, "max_position_embeddings", None)
        self.model, self._request_rope, self._speculation = model, request_rope, speculation

        def scheduler() -> BatchScheduler:
            if speculation is None:
                return BatchScheduler(model, max_batch_size, request_rope)
            return SpeculativeScheduler(model, max_batch_size, request_rope, speculation)

        schedulers = {name: scheduler() for name in (BASE, *adapters)}
        super().__init__(schedulers, tokenizer, template, min(filter(None, (own, context)), default=None), end_ids)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all, in order. Searches beams too, one request after another."""
        # In the engine's thread, between two steps of whatever else it answers.
        if any(request.settings.num_beams > 1 for request in requests):
            return [self._call(partial(self._search, request)) for request in requests]
        return super().generate(requests)

    def _search(self, request: Request) -> Completion:
        if self._request_rope:
            self._request_rope.rotate([len(request.prompt) + self.check(request)])
        return search_beams(self.model, self, request)

    def check(self, request: Request) -> int:
        """How many new tokens a request has room for. Raises: InputError, for guidance beside drafts too."""
        if self._speculation and request.settings.guidance_scale > 1:
            raise InputError(GUIDED_DRAFTS)
        return super().check(request)

    def statistics(self) -> dict[str, float]:
        """With drafts also drafted, accepted, passes, and speed_up once it is known."""
        totals = super().statistics()
        if self._speculation and (speed_up := self._speculation.clock.speed_up):
            totals["speed_up"] = speed_up
        return totals

    def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        def compute() -> Tensor:
            if self._request_rope:
                self._request_rope.rotate([len(prompt) for prompt in prompts])
            with self._adapter(BASE):
                return embed(self.model, prompts)

        return self._call(compute)

    @contextlib.contextmanager
    def _adapter(self, name: str) -> Iterator[None]:
        if len(self.models) == 1:  # nothing to switch, and perhaps no PeftModel
            yield
        elif name == BASE:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(name)
            yield


@torch.no_grad()
def embed(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The mean of the last layer's states (after its norm) over each prompt's tokens, of length 1: (N, H) float32."""
    backbone = causal_model(model).model
    length = max(map(len, prompts))
    ids = torch.tensor([list(prompt) + [prompt[0]] * (length - len(prompt)) for prompt in prompts])
    inside = torch.arange(length) < torch.tensor([[len(prompt)] for prompt in prompts])
    ids, inside = ids.to(model.device), inside.to(model.device)
    # Padding on the right: causal attention does not see it, so no mask is needed.
    positions = torch.arange(length, device=ids.device).expand(len(prompts), -1)
    states = backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.float()
    means = (states * inside.unsqueeze(-1)).sum(1) / inside.sum(1, keepdim=True)
    return torch.nn.functional.normalize(means, dim=-1).cpu()
