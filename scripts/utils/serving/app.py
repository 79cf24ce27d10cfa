"""The OpenAI-compatible HTTP application on any engine: create_app(engine, settings)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from ..core.arguments import GenerationArguments
from ..core.errors import InputError
from ..generation.engine import Engine
from .arguments import ServingArguments
from .errors import ApiError, bad_request, describe_validation_error
from .http import AccessMiddleware, JsonRoute, LogMiddleware, Metrics, Record
from .planning import RequestPlan, RequestPlanner, list_inputs
from .queue import ClientLeft, FairQueue, RequestStream, Ticket
from .replies import ChatResponseBuilder, CompletionResponseBuilder, ResponseBuilder, TokenNames, to_event, to_json
from .requests import ChatRequest, CompletionRequest, EmbeddingRequest
from .responses import (
    ChatCompletion,
    Completion,
    Embedding,
    EmbeddingList,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Usage,
)

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")
LAST_WORD_SECONDS = 1.0  # that a client has to take the error that ends its stream
EMBEDDED_TOKENS = 4096  # in one pass; answers wait meanwhile
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "The request cannot be answered; the message says why.",
        401: "No API key, or a wrong one.",
        404: "No such model.",
        408: "The request body did not arrive in time.",
        413: "The request body is too large.",
        429: "Too many requests; Retry-After says when to try again.",
        500: "The model failed.",
        503: "The server is shutting down.",
        504: "The answer was not ready in time.",
    }.items()
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM = {"text/event-stream": {"schema": EVENT}}  # of each event: its data is a chunk as JSON, or [DONE]


def create_app(
    engine: Engine,
    settings: ServingArguments,
    defaults: GenerationArguments | None = None,
    *,
    system_prompt: str | None = None,
    api_keys: Sequence[str] = (),
) -> FastAPI:
    """The application; `app.state.service.close()` lets what waits go and takes nothing new.

    Args:
        defaults: settings of requests that give none.
        system_prompt: of conversations that have none; None: the template's own.
        api_keys: who may come in; none: everyone.
    """
    service = Service(engine, settings, defaults or GenerationArguments(), system_prompt)
    app = FastAPI(title="OpenAI-compatible server", docs_url=None, redoc_url=None)  # those pages load foreign scripts
    app.router.route_class = JsonRoute
    app.openapi = functools.partial(_describe, app)  # type: ignore[method-assign]
    app.state.service = service
    _add_routes(app, service)
    _add_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(AccessMiddleware, api_keys=api_keys, max_body_bytes=settings.max_body_bytes)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(LogMiddleware, metrics=service.metrics)
    return app


class Service:
    """One engine and what its HTTP requests share; used on the event loop only."""

    def __init__(
        self, engine: Engine, settings: ServingArguments, defaults: GenerationArguments, system_prompt: str | None
    ) -> None:
        names = settings.served_model_name or engine.models[:1]
        self.models = dict.fromkeys(names, engine.models[0]) | {name: name for name in engine.models[1:]}
        self.engine, self.settings, self.created = engine, settings, int(time.time())
        self.planner = RequestPlanner(
            engine,
            self.models,
            defaults,
            context=settings.max_context,
            system_prompt=system_prompt,
            completions_template=settings.completions_template,
        )
        self.names = TokenNames(engine.tokenizer, engine.token_bytes)
        self.queue = FairQueue(settings.max_batch_size, settings.max_queue)
        self.embedding_queue = FairQueue(1, settings.max_queue)
        self.metrics = Metrics(engine, self.queue)
        self.closing = False
        self.active: set[RequestStream] = set()
        # One thread each: tokenizers are not made for several at once, and embedding waits for the engine's thread.
        self._planning = ThreadPoolExecutor(1, "planning")
        self._embedding = ThreadPoolExecutor(1, "embedding")

    def close(self) -> None:
        """Take no more requests, and send those away that have not begun; what runs goes on."""
        self.closing = True
        for answers in self.active:  # a client can ask elsewhere for what has not begun
            if not answers.begun:
                answers.fail(_closing_error())

    async def plan(
        self, function: Callable[[Any], Result], body: Any, record: Record, queue: FairQueue, jobs: int = 1
    ) -> Result:
        """What `function` makes of a request that will bring jobs to a queue, outside the event loop.

        Raises: ApiError.
        """
        if self.closing:
            raise _closing_error()
        # Refused before it is tokenised: under load that is where the time would go.
        with queue.expect(jobs):
            async with self.limit(record):
                return await asyncio.get_running_loop().run_in_executor(self._planning, function, body)

    @contextlib.asynccontextmanager
    async def limit(self, record: Record) -> AsyncIterator[None]:
        """The block ends when the request has taken as long as it may altogether. Raises: ApiError 504."""
        seconds = self.settings.request_timeout
        try:
            async with asyncio.timeout(record.started + seconds - time.perf_counter()):
                yield
        except TimeoutError:
            message = f"The answer was not ready within {seconds:g} seconds."
            raise ApiError(504, message, code="timeout", type="server_error") from None

    async def embed(self, inputs: list[list[int]], client: str) -> list[list[float]]:
        """The vectors of some prompts; clients take turns. Raises: ApiError."""
        self.embedding_queue.check_room(1)
        loop = asyncio.get_running_loop()
        free = asyncio.Event()
        ticket = Ticket(client, free.set)
        self.embedding_queue.enter(ticket)
        vectors: list[list[float]] = []
        try:
            await free.wait()
            for batch in _batches(inputs, self.settings.max_batch_size):
                found = await loop.run_in_executor(self._embedding, self.engine.embed, batch)
                vectors += found.tolist()
            return vectors
        except InputError as error:  # not every engine can
            raise bad_request(str(error)) from None
        finally:
            self.embedding_queue.leave(ticket)


def _closing_error() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down", type="server_error")


def _batches(inputs: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """The inputs in order, in batches of at most so many and of EMBEDDED_TOKENS, padding included."""
    batches: list[list[list[int]]] = []
    for tokens in inputs:
        longest = max([len(tokens), *(map(len, batches[-1]) if batches else ())])
        if not batches or len(batches[-1]) == size or longest * (len(batches[-1]) + 1) > EMBEDDED_TOKENS:
            batches.append([])
        batches[-1].append(tokens)
    return batches


# ---------------------------------------------------------------- answering


class AnswerResponse(Response):
    """Sends the answers of a plan, whole or as a stream, and cancels them when the client has gone."""

    def __init__(
        self, service: Service, plan: RequestPlan, builder: ResponseBuilder, stream: bool, record: Record, client: str
    ) -> None:
        super().__init__()
        self._service, self._plan, self._builder, self._stream = service, plan, builder, stream
        self._record, self._client = record, client
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises: ApiError before anything was sent; ClientLeft."""
        service, record = self._service, self._record
        record.model, record.prompt_tokens = self._plan.model, self._plan.num_prompt_tokens
        # A whole reply is read twice: for the time of the first token, and at the end.
        interval = service.settings.stream_interval if self._stream else math.inf
        answers = RequestStream(service.engine, service.queue, self._client, self._plan.requests, interval)
        service.active.add(answers)
        watching = asyncio.create_task(_fail_when_gone(receive, answers))
        try:
            async with service.limit(record):
                await self._answer(answers, send)
        except ApiError as error:
            if not self._started:
                raise
            # The status line has been sent: the error can only be the stream's last event.
            record.status = error.status
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_SECONDS):
                    await self._send(send, to_event(error.json()), more=False)
        finally:
            watching.cancel()
            answers.cancel()
            service.active.discard(answers)
            record.new_tokens, record.cached_tokens = self._builder.num_new_tokens, self._cached(answers)

    async def _answer(self, answers: RequestStream, send: Send) -> None:
        builder = self._builder
        # All may have ended while the last deltas are still to be read.
        while answers.completed < len(self._plan.requests) or answers.unread:
            events = []
            for number, delta in await answers.read():
                self._record.note_token()
                events += builder.events(number, delta)
            if self._stream and events:
                await self._send(send, b"".join(to_event(to_json(event)) for event in events))
        usage = builder.usage(self._cached(answers))
        if not self._stream:
            await self._send(send, to_json(builder.whole(usage)), more=False)
            return
        last = to_event(to_json(builder.usage_event(usage))) if self._plan.include_usage else b""
        await self._send(send, last + to_event(b"[DONE]"), more=False)

    async def _send(self, send: Send, data: bytes, more: bool = True) -> None:
        if not self._started:
            self._started = True
            kind = b"text/event-stream; charset=utf-8" if self._stream else b"application/json"
            headers = [(b"content-type", kind), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            headers += [] if self._stream else [(b"content-length", str(len(data)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": more})

    def _cached(self, answers: RequestStream) -> int:
        # Of the first answer to each prompt, as prompts count once: the others find that very prompt in the cache.
        numbers = range(0, len(self._plan.requests), self._plan.per_prompt)
        return sum(answers.num_cached_tokens(number) for number in numbers)


async def _fail_when_gone(receive: Receive, answers: RequestStream) -> None:
    await _gone(receive)
    answers.fail(ClientLeft())
    answers.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """What `work` gives. Raises: ClientLeft as soon as the client has gone."""
    task = asyncio.ensure_future(work)
    watching = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((task, watching), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        task.cancel()
        watching.cancel()


# ---------------------------------------------------------------- routes


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        responses={**ERRORS, 200: {"model": ChatCompletion, "content": STREAM}},
        response_class=Response,
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        record = request.scope["record"]
        plan = await service.plan(service.planner.chat, body, record, service.queue, body.n or 1)
        return _answer(service, plan, ChatResponseBuilder(plan, service.names), bool(body.stream), request)

    @app.post(
        "/v1/completions",
        responses={**ERRORS, 200: {"model": Completion, "content": STREAM}},
        response_class=Response,
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        record = request.scope["record"]
        jobs = len(list_inputs(body.prompt)) * (body.best_of or body.n or 1)
        plan = await service.plan(service.planner.completions, body, record, service.queue, jobs)
        return _answer(service, plan, CompletionResponseBuilder(plan, service.names), bool(body.stream), request)

    @app.post("/v1/embeddings", responses=ERRORS, response_model_exclude_none=True)
    async def create_embedding(body: EmbeddingRequest, request: Request) -> EmbeddingList:
        return await _embed(service, body, request)

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def list_models() -> ModelList:
        return ModelList(data=[_card(service, name) for name in service.models])

    @app.get("/v1/models/{model:path}", responses={status: ERRORS[status] for status in (400, 401, 404)})
    async def retrieve_model(model: str) -> ModelCard:
        return _card(service, service.planner.find_model(model))

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        response.status_code = 503 if service.closing else 200
        return Health(
            status="shutting_down" if service.closing else "ok",
            running=service.queue.running,
            waiting=service.queue.waiting,
        )

    @app.get(
        "/metrics",
        responses={401: ERRORS[401], 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
    )
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _answer(service: Service, plan: RequestPlan, builder: ResponseBuilder, stream: bool, request: Request) -> Response:
    scope = request.scope
    return AnswerResponse(service, plan, builder, stream, scope["record"], scope["client_name"])


async def _embed(service: Service, body: EmbeddingRequest, request: Request) -> EmbeddingList:
    record: Record = request.scope["record"]
    name = record.model = service.planner.find_model(body.model)
    if service.models[name] != service.engine.models[0]:
        raise bad_request(f"Embeddings come from '{next(iter(service.models))}' only, without adapters.", "model")
    inputs = await service.plan(service.planner.embedding_inputs, body.input, record, service.embedding_queue)
    record.prompt_tokens = sum(map(len, inputs))
    async with service.limit(record):
        vectors = await _unless_gone(request.receive, service.embed(inputs, request.scope["client_name"]))
    if body.dimensions not in (None, len(vectors[0])):
        raise bad_request(f"This model's vectors have {len(vectors[0])} dimensions, no others.", "dimensions")
    data = [
        Embedding(index=number, embedding=_to_base64(vector) if body.encoding_format == "base64" else vector)
        for number, vector in enumerate(vectors)
    ]
    usage = Usage(prompt_tokens=record.prompt_tokens, total_tokens=record.prompt_tokens)
    return EmbeddingList(data=data, model=name, usage=usage)


def _to_base64(vector: list[float]) -> str:
    import numpy as np

    return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode()


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(id=name, created=service.created, owned_by="local")


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, without FastAPI's own errors, which are never sent."""
    described = FastAPI.openapi(app)
    for methods in described["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        described["components"]["schemas"].pop(name, None)
    return described


# ---------------------------------------------------------------- errors


def _add_error_handlers(app: FastAPI) -> None:
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        known = [*ChatRequest.model_fields, *CompletionRequest.model_fields, *EmbeddingRequest.model_fields]
        raise describe_validation_error(error.errors(), error.body, known)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"[:500]
        raise ApiError(error.status_code, message, headers=dict(error.headers or {}))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
