"""The vLLM engine: within this process where vLLM is installed, else a `vllm serve` that runs somewhere.

Prompts go in and answers come out as token ids, so that prompts, stop texts and texts are those of the other engines;
the tokens are chosen by vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..core.arguments import InferenceArguments
from ..core.errors import InputError
from ..text.prompts import OWN_TEMPLATE
from ..text.tokenizer import encode_texts
from .engine import Answer, Delta, Engine, Prompter, Request, TokenSequence
from .sampling import TokenLogprob
from .transformers_engine import BASE
from .vllm_backends import engine_options, is_installed, serve_command

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Tokens = AsyncGenerator[tuple[int, TokenLogprob | None]]
ADVICE = "need vLLM 0.11 or later"


class Source(Protocol):
    """Where tokens come from."""

    def tokens(self, sequence: TokenSequence, model: str, stop_ids: Sequence[int]) -> Tokens:
        """The tokens of an answer as they come, with log-probabilities where they were asked for.

        Closing it early ends the answer in vLLM. Raises: InputError for what vLLM refuses.
        """

    async def close(self) -> None:
        """Stop."""


# ---------------------------------------------------------------- the engine


class _Answer(Answer):
    """An answer whose cancel() is heard at once, also where no token comes for a while."""

    wake: Callable[[], Any] | None = None

    def cancel(self) -> None:
        super().cancel()
        if self.completion is None and self.wake is not None:
            self.wake()


class VllmEngine(Engine):
    """An Engine on a Source. Its thread runs an event loop with a task for each request."""

    name = "vllm"

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        *,
        context: int,
        models: Mapping[str, str],
        max_batch_size: int,
    ) -> None:
        """`models`: what vLLM calls each model, by the name it has here."""
        super().__init__(tokenizer, template, context, models, max_batch_size)
        self._source, self._served = source, dict(models)
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
            if task.cancelled() and sequence.answer.completion is None:
                sequence.end("cancelled")

        task.add_done_callback(finish)
        assert isinstance(sequence.answer, _Answer)
        sequence.answer.wake = wake
        if sequence.answer.cancelled:
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
        async with contextlib.aclosing(self._source.tokens(sequence, model, self.stop_ids)) as tokens:
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
        await self._source.close()


def sampling_settings(sequence: TokenSequence, stop_ids: Sequence[int]) -> dict[str, Any]:
    """A request in vLLM's names, which its Python class and its server share."""
    request, settings = sequence.request, sequence.request.settings
    found: dict[str, Any] = {
        "max_tokens": sequence.room,
        "min_tokens": min(settings.min_new_tokens, sequence.room),
        "temperature": float(settings.temperature) if settings.samples else 0.0,
        "top_k": settings.top_k,
        "top_p": float(settings.top_p),
        "min_p": float(settings.min_p),
        "repetition_penalty": float(settings.repetition_penalty),
        "presence_penalty": float(settings.presence_penalty),
        "frequency_penalty": float(settings.frequency_penalty),
        # Ours only, not those that vLLM finds in the model's files.
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
    }
    if settings.samples:
        found["seed"] = settings.seed if request.seed is None else request.seed
    if request.logit_bias:
        found["logit_bias"] = dict(request.logit_bias)
    if request.top_logprobs is not None:
        found["logprobs"] = request.top_logprobs
    return found


def _logprob(token: int, found: Mapping[int, float], count: int) -> TokenLogprob:
    """`found`: of the token and of the likeliest."""
    likeliest = sorted(found.items(), key=lambda pair: -pair[1])[:count]
    return TokenLogprob(token, found[token], tuple(likeliest))


# ---------------------------------------------------------------- a server


class VllmServer:
    """A running `vllm serve`, through its /v1/completions."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """`api_key`: what that server was started with, if anything."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client: Any = None

    def get(self, path: str) -> Any:
        """What the server says of itself. Raises: InputError if it does not answer."""
        return self._ask("GET", path)

    def detokenize(self, model: str, ids: Sequence[int]) -> str | None:
        """The text of token ids by vLLM's tokenizer; None if this server does not tell."""
        with contextlib.suppress(InputError):
            return str(self._ask("POST", "/detokenize", {"model": model, "tokens": list(ids)})["prompt"])
        return None

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        import httpx

        try:
            response = httpx.request(method, self.url + path, json=body, headers=self._headers, timeout=10)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise InputError(f"--vllm_url {self.url}: no vLLM server answers there ({error})") from None
        if response.status_code != 200:
            raise InputError(f"--vllm_url {self.url}{path}: {_complaint(response)}")
        return response.json()

    async def tokens(self, sequence: TokenSequence, model: str, stop_ids: Sequence[int]) -> Tokens:
        import httpx

        if self._client is None:
            limits = httpx.Limits(max_connections=None)
            timeout = httpx.Timeout(10, read=None, pool=None)  # the first token may wait for other requests
            self._client = httpx.AsyncClient(headers=self._headers, limits=limits, timeout=timeout)
        body = {"model": model, "prompt": list(sequence.request.prompt), "stream": True, "return_token_ids": True}
        body |= sampling_settings(sequence, stop_ids)
        body["return_tokens_as_token_ids"] = True  # in log-probabilities
        async with self._client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                kind = InputError if response.status_code in (400, 404, 413, 422) else RuntimeError
                raise kind(f"vLLM: {_complaint(response)}")
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                chunk = json.loads(line.removeprefix("data:"))
                if "error" in chunk:
                    raise RuntimeError(f"vLLM: {chunk['error'].get('message', chunk['error'])}")
                for choice in chunk["choices"]:
                    for pair in _choice_tokens(choice, sequence.request.top_logprobs):
                        yield pair

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()


def _complaint(response: Any) -> str:
    try:
        content = response.json()
        error = content.get("error", content)
        return str(error.get("message", error))
    except (ValueError, AttributeError):
        return f"status {response.status_code}: {response.text[:200]}"


def _choice_tokens(choice: Mapping[str, Any], top_logprobs: int | None) -> list[tuple[int, TokenLogprob | None]]:
    ids = choice.get("token_ids")
    if ids is None:
        if choice.get("text"):
            raise InputError(f"vLLM's answers come without token_ids; {ADVICE}")
        return []
    if top_logprobs is None or not ids:
        return [(token, None) for token in ids]
    # Keys are "token_id:123"; the likeliest and the chosen one.
    rows = choice["logprobs"]["top_logprobs"]
    found = [{int(name.rpartition(":")[2]): value for name, value in row.items()} for row in rows]
    for token, row, value in zip(ids, found, choice["logprobs"]["token_logprobs"], strict=True):
        row[token] = value
    return [(token, _logprob(token, row, top_logprobs)) for token, row in zip(ids, found, strict=True)]


# ---------------------------------------------------------------- the library


class VllmLibrary:
    """vLLM within this process (its model runs in processes of its own)."""

    def __init__(self, options: Mapping[str, Any], adapters: Mapping[str, str]) -> None:
        """`options`: of vllm.AsyncEngineArgs; `adapters`: folders by name."""
        import vllm
        from vllm.lora.request import LoRARequest

        self._vllm: Any = vllm
        # Prompts and answers are token ids.
        arguments = vllm.AsyncEngineArgs(**options, skip_tokenizer_init=True)
        self._engine = vllm.AsyncLLMEngine.from_engine_args(arguments)
        self._adapters = {
            name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(adapters.items(), 1)
        }

    async def tokens(self, sequence: TokenSequence, model: str, stop_ids: Sequence[int]) -> Tokens:
        from vllm.sampling_params import RequestOutputKind

        count = sequence.request.top_logprobs
        try:
            settings = self._vllm.SamplingParams(
                **sampling_settings(sequence, stop_ids), detokenize=False, output_kind=RequestOutputKind.DELTA
            )
            outputs = self._engine.generate(
                self._vllm.TokensPrompt(prompt_token_ids=list(sequence.request.prompt)),
                settings,
                request_id=uuid.uuid4().hex,
                lora_request=self._adapters.get(model),
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    sequence.answer.num_cached_tokens = output.num_cached_tokens or sequence.answer.num_cached_tokens
                    piece = output.outputs[0]
                    for number, token in enumerate(piece.token_ids):
                        found = None
                        if count is not None:
                            row = {index: item.logprob for index, item in piece.logprobs[number].items()}
                            found = _logprob(token, row, count)
                        yield token, found
        except ValueError as error:  # what vLLM calls bad input
            raise InputError(f"vLLM: {error}") from None

    async def close(self) -> None:
        self._engine.shutdown()


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
    api_key: str | None = None,
) -> VllmEngine:
    """The engine for what a loading.EnginePlan has found.

    Args:
        url: of a running `vllm serve`; None: vLLM runs here.
    Raises: InputError; where vLLM is not installed, with the command that serves the same model.
    """
    served = dict(adapters or {})
    if args.adapter_name_or_path:
        served = {Path(args.adapter_name_or_path).name: args.adapter_name_or_path}
    options = engine_options(args, config, served, max_batch_size, _window(prompter, context))
    # Without a --lora_model the base is a model too, the first.
    names = list(served) if args.adapter_name_or_path else [BASE, *served]
    source: VllmServer | VllmLibrary
    if url is not None:
        source = VllmServer(url, api_key)
        models, window = _find_models(source, names, prompter.tokenizer)
        options["max_model_len"] = min(options["max_model_len"], window)
    elif is_installed():
        source, models = VllmLibrary(options, served), {name: name for name in names}
    else:
        template = None if template_name in (None, OWN_TEMPLATE) else prompter.template
        raise InputError(
            "--engine vllm: vLLM is not installed here (pip install -r requirements-gpu.txt). Start it where GPUs are:"
            f"\n  {serve_command(options, served, args.gpus, template)}\nthen come back with --vllm_url "
            "http://127.0.0.1:8000"
        )
    return VllmEngine(
        source,
        prompter.tokenizer,
        prompter.template,
        context=options["max_model_len"],
        models=models,
        max_batch_size=max_batch_size,
    )


def _window(prompter: Prompter, context: int | None) -> int:
    assert prompter.context is not None
    return min(prompter.context, context or prompter.context)


def _find_models(
    server: VllmServer, names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, str], int]:
    """What the server calls the models, and its window in tokens. Raises: InputError if it has another model."""
    listed = server.get("/v1/models")["data"]
    base = next((item for item in listed if not item.get("parent")), listed[0])
    served = {BASE: base["id"]} | {item["id"]: item["id"] for item in listed}
    if missing := [name for name in names if name not in served]:
        raise InputError(
            f"--vllm_url {server.url}: it serves {', '.join(item['id'] for item in listed)}, not {', '.join(missing)}"
            "; start it with --lora-modules name=folder"
        )
    text = "你好，今天天气怎么样？ Hello."
    ids = encode_texts(tokenizer, [text])[0]
    found = server.detokenize(base["id"], ids)
    if found is not None and found.strip() != text:
        raise InputError(
            f"--vllm_url {server.url}: its model {base['id']} has another vocabulary ({text!r} becomes {found!r}); "
            "pass the model that it serves as --base_model"
        )
    return {name: served[name] for name in names}, int(base["max_model_len"])
