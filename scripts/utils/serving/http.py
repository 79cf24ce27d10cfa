"""What stands around the server's routes: keys, size limits, errors in OpenAI's form, the log and the metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from pydantic_core import from_json

from .errors import ApiError
from .queue import ClientLeft

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ..generation.engine import Engine
    from .queue import FairQueue

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("access")

BODY_SECONDS = 60.0  # that a request body may take to arrive
OPEN_PATHS = ("/health",)  # what needs no key
CLIENT_LEFT = 499  # the status logged for a client that did not wait; nginx's
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds


@dataclass
class Record:
    """What is known of a request, for the log and the metrics; routes fill it in."""

    id: str
    started: float  # seconds, of time.perf_counter
    status: int | None = None
    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float | None = None

    def note_token(self) -> None:
        """A token came."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self.started


# ---------------------------------------------------------------- metrics


class Metrics:
    """The counts of one server; nothing is shared with other servers of the process."""

    def __init__(self, engine: Engine, queue: FairQueue) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._engine, self._queue = engine, queue
        self.registry.register(self)  # see collect
        self._requests = Counter(
            "http_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "http_request_seconds", "Time to the end of the reply.", ["route"], registry=self.registry, buckets=BUCKETS
        )
        self._first_token = Histogram(
            "first_token_seconds", "Time to the first token.", ["route"], registry=self.registry, buckets=BUCKETS
        )
        self._tokens = {
            name: Counter(name, help, ["model"], registry=self.registry)
            for name, help in (
                ("prompt_tokens", "Tokens of prompts."),
                ("cached_tokens", "Tokens of prompts that were computed before."),
                ("generated_tokens", "Tokens of answers."),
            )
        }

    def count(self, route: str, record: Record, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(route, str(record.status)).inc()
        self._seconds.labels(route).observe(seconds)
        if record.first_token_seconds is not None:
            self._first_token.labels(route).observe(record.first_token_seconds)
        if record.model is not None:
            for name, number in (
                ("prompt_tokens", record.prompt_tokens),
                ("cached_tokens", record.cached_tokens),
                ("generated_tokens", record.new_tokens),
            ):
                self._tokens[name].labels(record.model).inc(number)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry: what the queue and the engine say of themselves."""
        yield GaugeMetricFamily("answers_running", "Answers being written.", value=self._queue.running)
        yield GaugeMetricFamily("answers_waiting", "Answers waiting for their turn.", value=self._queue.waiting)
        for name, value in self._engine.statistics().items():
            if name in ("running", "waiting", "max_batch_size"):
                yield GaugeMetricFamily(f"engine_{name}", "Of the engine.", value=value)
            else:
                yield CounterMetricFamily(f"engine_{name}", "Total of the engine.", value=value)

    def describe(self) -> Iterable[Metric]:
        """Called by the registry: names are not checked beforehand."""
        return []


# ---------------------------------------------------------------- bodies and errors


class JsonRequest(Request):
    """A request whose body is read as JSON is defined: no NaN, no half characters, no depth without end."""

    async def json(self) -> Any:
        """Raises: JSONDecodeError."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class JsonRoute(APIRoute):
    """A route whose requests are JsonRequests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Called by FastAPI."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


async def send_error(send: Send, error: ApiError) -> None:
    """A reply that is an error."""
    body = error.json()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# ---------------------------------------------------------------- layers


class LogMiddleware:
    """The outermost layer: gives each request an id, and writes one line of JSON when it has ended.

    Neither prompts nor keys are in it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(16)
        record = scope["record"] = Record(request_id, time.perf_counter())

        async def note_start(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        finally:
            self._write(scope, record)

    def _write(self, scope: Scope, record: Record) -> None:
        seconds = time.perf_counter() - record.started
        record.status = record.status or CLIENT_LEFT
        route = getattr(scope.get("route"), "path", None) or "other"
        self._metrics.count(route, record, seconds)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "id": record.id,
            "method": scope["method"],
            "route": route,
            "status": record.status,
            "model": record.model,
            "prompt_tokens": record.prompt_tokens,
            "new_tokens": record.new_tokens,
            "seconds": round(seconds, 4),
            "first_token_seconds": record.first_token_seconds and round(record.first_token_seconds, 4),
        }
        access_logger.info("%s", json.dumps(line, ensure_ascii=False))


class AccessMiddleware:
    """The inner layer: who may come in, how much may be sent, and what a failure looks like."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def note_start(message: Message) -> None:  # afterwards an error has no place in the reply
            nonlocal started
            started = True
            await send(message)

        try:
            await self._enter(scope, receive, note_start)
        except ClientLeft:
            scope["record"].status = CLIENT_LEFT
        except ApiError as error:
            if started:
                raise
            await send_error(send, error)
        except Exception:
            logger.exception("request %s failed", scope["record"].id)
            if started:
                raise
            await send_error(
                send, ApiError(500, "The server failed; its log says why.", type="server_error", code="internal_error")
            )

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["client_name"] = self._check_key(scope)
        await self._app(scope, await self._read_body(scope, receive), send)

    def _check_key(self, scope: Scope) -> str:
        """A name for whoever sends the request, by its key, else by its address. Raises: ApiError 401."""
        address = scope.get("client")
        if not self._keys or scope["path"] in OPEN_PATHS:
            return str(address[0]) if address else ""
        given = _header(scope, b"authorization")
        scheme, _, key = given.partition(b" ")
        # All keys are compared, in constant time: how long it takes tells nothing of them.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() == b"bearer" and any(matches):
            return f"key {matches.index(True)}"
        message = "Incorrect API key provided." if given else "You didn't provide an API key."
        raise ApiError(
            401,
            f"{message} Send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, then what comes after it. Raises: ApiError 413 or 408; ClientLeft."""
        body = bytearray()
        length = _header(scope, b"content-length")
        too_large = length.isdigit() and int(length) > self._max_body_bytes
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    more = message.get("more_body", False)
                    body += message.get("body", b"")
                    if too_large or len(body) > self._max_body_bytes:
                        # It is read to its end and thrown away: few clients listen before they have sent all.
                        too_large = True
                        body.clear()
        except TimeoutError:
            error = ApiError(408, f"The request body did not arrive within {BODY_SECONDS:g} seconds.", code="timeout")
            error.headers["Connection"] = "close"
            raise error from None
        if too_large:
            raise ApiError(
                413,
                f"The request body is larger than this server's limit of {self._max_body_bytes} bytes.",
                code="request_too_large",
            )
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:  # the body once, then the connection itself: it tells when the client leaves
            nonlocal whole
            message, whole = whole, None
            return message if message is not None else await receive()

        return replay


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
