"""Who is answered when: a fair queue before the engine, and the answers of one HTTP request on their way through it.

Everything here runs on the event loop's thread, so nothing is locked; the engine's thread only hands over deltas.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..core.errors import InputError
from ..generation.engine import Answer, Delta, Engine, Request
from .errors import ApiError, bad_request

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A place in the queue, then one of the slots."""

    client: str
    start: Callable[[], None]
    started: float | None = None  # seconds, of time.monotonic


class FairQueue:
    """Lets a number of jobs run at once; clients whose jobs wait take turns, whoever sent how many.

    A job is an answer to be written, or a request for embeddings.

    Attributes:
        max_batch_size, max_waiting: how many jobs may run, and wait.
        running, waiting: how many jobs.
    """

    def __init__(self, max_batch_size: int, max_waiting: int) -> None:
        self.max_batch_size, self.max_waiting = max_batch_size, max_waiting
        self.running = self.waiting = self._expected = 0  # expected: of requests that are still being tokenised
        self._lines: dict[str, deque[Ticket]] = {}  # clients in the order of their turns
        self._seconds = 1.0  # that a job takes, about: a moving average, for Retry-After

    def check_room(self, jobs: int) -> None:
        """Raises: ApiError 429 if so many more jobs would be too many, 400 if they always would."""
        capacity = self.max_batch_size + self.max_waiting
        if jobs > capacity:
            raise bad_request(f"The request asks for {jobs} answers; this server takes up to {capacity} at once.")
        if self.running + self.waiting + self._expected + jobs > capacity:
            seconds = math.ceil(self._seconds * max(self.waiting, 1) / self.max_batch_size)
            raise ApiError(
                429,
                f"The server is busy: {self.running} answers are being written and {self.waiting} wait. Try again "
                "later.",
                code="rate_limit_exceeded",
                type="rate_limit_error",
                headers={"Retry-After": str(min(max(seconds, 1), 60))},
            )

    @contextlib.contextmanager
    def expect(self, jobs: int) -> Iterator[None]:
        """Keep room for jobs that are being made ready. Raises: see check_room."""
        # Tokenising takes place outside the event loop: what is checked only afterwards would let a burst through.
        self.check_room(jobs)
        self._expected += jobs
        try:
            yield
        finally:
            self._expected -= jobs

    def enter(self, ticket: Ticket) -> None:
        """Wait for a slot; the ticket's `start` is called, perhaps at once, when there is one. `leave` must follow."""
        self._lines.setdefault(ticket.client, deque()).append(ticket)
        self.waiting += 1
        self._fill()

    def leave(self, ticket: Ticket) -> None:
        """Free the slot, or give up waiting."""
        if ticket.started is not None:
            self.running -= 1
            self._seconds += 0.1 * (time.monotonic() - ticket.started - self._seconds)
        else:
            self.waiting -= 1
            self._lines[ticket.client].remove(ticket)
            if not self._lines[ticket.client]:
                del self._lines[ticket.client]
        self._fill()

    def _fill(self) -> None:
        while self.running < self.max_batch_size and self._lines:
            client, line = next(iter(self._lines.items()))
            del self._lines[client]  # a dict keeps its order: who comes again stands last
            ticket = line.popleft()
            if line:
                self._lines[client] = line  # behind the others
            self.waiting -= 1
            self.running += 1
            ticket.started = time.monotonic()
            ticket.start()  # last: by then it counts as running


class ClientLeft(Exception):
    """Nobody waits for the reply any more."""


class RequestStream:
    """The answers of one HTTP request, from the queue to their last tokens.

    Attributes:
        begun: whether any has left the queue.
        completed: how many have ended.
    """

    def __init__(
        self, engine: Engine, queue: FairQueue, client: str, requests: Sequence[Request], interval: float
    ) -> None:
        """
        Args:
            interval: seconds between two readings at least, the first and the last apart; infinite: only those two.
        Raises: ApiError if the queue is full.
        """
        queue.check_room(len(requests))
        self._engine, self._queue, self._requests, self._interval = engine, queue, requests, interval
        self._loop = asyncio.get_running_loop()
        # Waking the event loop takes time from the engine's thread: what comes within the interval waits here.
        self._arrived: deque[tuple[int, Delta]] = deque()
        self._woken = False  # whether somebody will look without being told
        self._timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._deltas: dict[int, list[Delta]] = {}  # not read yet, by number
        self._answers: dict[int, Answer] = {}
        self._tickets = {
            number: Ticket(client, functools.partial(self._start, number)) for number in range(len(requests))
        }  # of those that have not ended
        self._failure: Exception | None = None
        self.completed = 0
        self.begun = False
        # At the end, when all else is there: a ticket whose turn it is calls _start within enter.
        for ticket in list(self._tickets.values()):
            queue.enter(ticket)

    def _start(self, number: int) -> None:
        self.begun = True

        def hand_over(delta: Delta) -> None:  # in the engine's thread; deque.append needs no lock
            ended = delta.finish_reason is not None or delta.error is not None
            self._arrived.append((number, delta))
            if ended or not self._woken:
                self._woken = True
                # The loop is closed if the server had to end before the engine did.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._wake, ended)

        try:
            self._answers[number] = self._engine.submit(self._requests[number], hand_over)
        except Exception as error:  # not at once: this may run within __init__, or in the middle of FairQueue._fill
            self._loop.call_soon(self._take, number, Delta(error=error))

    def _wake(self, ended: bool) -> None:
        # The first delta and the last are not kept waiting; those between come with the timer.
        if ended or self._timer is None:
            self._collect()

    def _collect(self) -> None:
        """Read what arrived, and look again after the interval; once nothing has come, the next delta wakes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        found = self._read_arrived()
        if not found:
            self._woken = False
            found = self._read_arrived()  # what came just before woke nobody
        if found and self._tickets:
            self._woken = True
            if math.isfinite(self._interval):
                self._timer = self._loop.call_later(self._interval, self._collect)

    def _read_arrived(self) -> bool:
        found = bool(self._arrived)
        while self._arrived:
            self._take(*self._arrived.popleft())
        return found

    def _take(self, number: int, delta: Delta) -> None:
        self._deltas.setdefault(number, []).append(delta)
        if delta.error is not None:
            self.fail(_engine_failure(delta.error))
        if delta.error is not None or delta.finish_reason is not None:
            self.completed += 1
            self._queue.leave(self._tickets.pop(number))  # the next one begins before this reply is sent
        self._news.set()

    async def read(self) -> list[tuple[int, Delta]]:
        """What came since the last call, at least something, one delta for each answer; a slow reader gets more each.

        Raises: ApiError if the engine fails; ClientLeft.
        """
        await self._news.wait()
        self._news.clear()
        if self._failure is not None:
            raise self._failure
        deltas, self._deltas = self._deltas, {}
        return [(number, _merge(parts)) for number, parts in deltas.items()]

    @property
    def unread(self) -> bool:
        """Whether read() would return at once."""
        return self._news.is_set()

    def num_cached_tokens(self, number: int) -> int:
        """Tokens of an answer's prompt that were computed before."""
        return self._answers[number].num_cached_tokens if number in self._answers else 0

    def fail(self, error: Exception) -> None:
        """Let the reader have an error instead of what is still to come."""
        self._failure = self._failure or error  # the first is the reason, later ones follow from it
        self._news.set()

    def cancel(self) -> None:
        """End what has not ended; slots are free once the engine has let go of them."""
        # A slot is not free before the engine says so: what it still computes would be one answer too many.
        for number, ticket in list(self._tickets.items()):
            if ticket.started is None:
                del self._tickets[number]
                self._queue.leave(ticket)
            elif number in self._answers:
                self._answers[number].cancel()


def _engine_failure(error: BaseException) -> ApiError:
    if isinstance(error, InputError):
        return bad_request(str(error))
    logger.error("the engine failed", exc_info=error)
    return ApiError(500, "The model failed to answer; the server's log says why.", type="server_error")


def _merge(parts: Sequence[Delta]) -> Delta:
    if len(parts) == 1:
        return parts[0]
    return Delta(
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.token_ids),
        tuple(logprob for part in parts for logprob in part.logprobs),
        parts[-1].finish_reason,
        parts[-1].error,
    )
