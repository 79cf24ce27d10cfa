"""The vLLM engine: within this process where vLLM is installed, else a `vllm serve` that runs somewhere.

Prompts go in and answers come out as token ids, so that prompts, stop texts and texts are those of the other engines;
the tokens are chosen by vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.arguments import InferenceArguments
from ..core.errors import InputError
from ..text.prompts import OWN_TEMPLATE
from .engine import BASE, Answer, Delta, Engine, Prompter, Request, TokenSequence
from .vllm_backends import (
    KEY_VARIABLE,
    VllmBackend,
    VllmLibrary,
    VllmServer,
    engine_options,
    is_installed,
    serve_command,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class _Answer(Answer):
    """An answer whose cancel() is heard at once, also where no token comes for a while."""

    wake: Callable[[], Any] | None = None

    def cancel(self) -> None:
        super().cancel()
        # vLLM may be at a long prompt or in its queue; waiting for the next token would keep its memory until then.
        if self.completion is None and self.wake is not None:
            self.wake()


class VllmEngine(Engine):
    """An Engine on a VllmBackend. Its thread runs an event loop with a task for each request."""

    name = "vllm"

    def __init__(
        self,
        backend: VllmBackend,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        *,
        context: int,
        models: Mapping[str, str],
        max_batch_size: int,
        end_ids: Iterable[int] = (),
    ) -> None:
        """`models`: what vLLM calls each model, by the name it has here."""
        super().__init__(tokenizer, template, context, models, max_batch_size, end_ids)
        self._backend, self._served = backend, dict(models)
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "new_tokens", "steps"), 0)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0
        self._slots = asyncio.Semaphore(max_batch_size)  # first come, first served
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> int:
        """How many new tokens a request has room for. Raises: InputError, for what vLLM does not do too."""
        problems = {
            "beam search (num_beams)": request.settings.num_beams > 1,
            "classifier-free guidance (guidance_scale, negative_prompt)": (
                request.settings.guidance_scale > 1 and request.negative_prompt is not None
            ),
            "this project's grammars (response_format, tools)": request.constraint is not None,
        }
        if found := [name for name, wanted in problems.items() if wanted]:
            raise InputError(f"--engine vllm has no {' or '.join(found)}; use --engine transformers")
        return super().check(request)

    def submit(self, request: Request, on_delta: Callable[[Delta], None] | None = None) -> Answer:
        name = self._find_model(request)
        self._check_open()
        answer = _Answer(len(request.prompt), on_delta)
        sequence = TokenSequence(request, self, answer)
        self._loop.call_soon_threadsafe(self._start, sequence, self._served[name])
        return answer

    def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Raises: InputError."""
        raise InputError(
            "a vLLM that writes answers gives no embeddings; use --engine transformers or llama.cpp for them"
        )

    def statistics(self) -> dict[str, float]:
        """vLLM does not tell its steps: 0."""
        waiting = len(self._tasks) - self._running
        return {"running": self._running, "waiting": waiting, "max_batch_size": self.max_batch_size, **self._counts}

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # ------------------------------------------------------------ within the loop

    def _start(self, sequence: TokenSequence, model: str) -> None:
        task = self._loop.create_task(self._work(sequence, model))
        self._tasks.add(task)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the task
                self._loop.call_soon_threadsafe(task.cancel)

        def finish(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            # Here and not in _work: a task cancelled before its first step never enters its coroutine.
            if task.cancelled() and sequence.answer.completion is None:
                sequence.end("cancelled")

        task.add_done_callback(finish)
        assert isinstance(sequence.answer, _Answer)
        sequence.answer.wake = wake
        if sequence.answer.cancelled:  # between submit and here, when there was nothing to wake
            task.cancel()

    async def _work(self, sequence: TokenSequence, model: str) -> None:
        try:
            async with self._slots:
                self._running += 1
                try:
                    await self._follow(sequence, model)
                finally:
                    self._running -= 1
        except Exception as error:  # raised again where the answer is read
            sequence.end(error=error)

    async def _follow(self, sequence: TokenSequence, model: str) -> None:
        self._counts["prompt_tokens"] += len(sequence.request.prompt)
        async with contextlib.aclosing(self._backend.tokens(sequence, model)) as tokens:
            async for token, logprob in tokens:
                self._counts["new_tokens"] += 1
                if sequence.advance(token, logprob):
                    break
        self._counts["cached_tokens"] += sequence.answer.num_cached_tokens
        if sequence.answer.completion is None:
            sequence.end("length")  # vLLM's own limit

    async def _stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._backend.close()


# ---------------------------------------------------------------- loading


def load_vllm(
    prompter: Prompter,
    template_name: str | None,
    args: InferenceArguments,
    config: PreTrainedConfig,
    *,
    max_batch_size: int,
    context: int | None = None,
    adapters: Mapping[str, str] | None = None,
    url: str | None = None,
) -> VllmEngine:
    """The engine for what a loading.EnginePlan has found.

    Args:
        url: of a running `vllm serve`, whose key is in the environment (KEY_VARIABLE); None: vLLM runs here.
    Raises: InputError; where vLLM is not installed, with the command that serves the same model.
    """
    served = dict(adapters or {})
    if args.adapter_name_or_path:
        served = {Path(args.adapter_name_or_path).name: args.adapter_name_or_path}
    options = engine_options(args, config, served, max_batch_size, _window(prompter, context))
    # Without a --lora_model the base is a model too, the first.
    names = list(served) if args.adapter_name_or_path else [BASE, *served]
    backend: VllmBackend
    if url is not None:
        backend = server = VllmServer(url, os.environ.get(KEY_VARIABLE))
        models, window = server.find_models(names, prompter.tokenizer)
        options["max_model_len"] = min(options["max_model_len"], window)
    elif is_installed():
        backend, models = VllmLibrary(options, served), {name: name for name in names}
    else:
        template = None if template_name in (None, OWN_TEMPLATE) else prompter.template
        raise InputError(
            "--engine vllm: vLLM is not installed here (pip install -r requirements-gpu.txt). Start it where GPUs are:"
            f"\n  {serve_command(options, served, args.gpus, template)}\nthen come back with --vllm_url "
            "http://127.0.0.1:8000"
        )
    return VllmEngine(
        backend,
        prompter.tokenizer,
        prompter.template,
        context=options["max_model_len"],
        models=models,
        max_batch_size=max_batch_size,
        end_ids=prompter.stop_ids,
    )


def _window(prompter: Prompter, context: int | None) -> int:
    assert prompter.context is not None
    return min(prompter.context, context or prompter.context)
