"""Worker processes for long, independent pieces of work: results in order, memory bounded, no orphans.

Workers are spawned, not forked: a fork would copy the threads' locks of torch and CUDA in whatever state they are.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

State = TypeVar("State")
Unit = TypeVar("Unit")
Result = TypeVar("Result")
_Worker = tuple[BaseProcess, Connection]


class WorkerDied(RuntimeError):
    """A worker process ended before it answered.

    Attributes:
        signal: the name of what killed it, such as SIGILL; None if it ended in another way.
    """

    def __init__(self, signal_name: str | None) -> None:
        super().__init__(
            "a worker process ended unexpectedly"
            + (f", killed by {signal_name}" if signal_name else "")
            + (", for instance for want of memory" if signal_name in (None, "SIGKILL") else "")
        )
        self.signal = signal_name


def ordered_map(
    function: Callable[[State, Unit], Result], state: State, units: Iterable[Unit], num_workers: int
) -> Generator[Result, None, None]:
    """Yield function(state, unit) for every unit, in the order of the units.

    At most two units a worker are under way, so memory does not grow with their number. With one worker no process is
    started. Workers end when this process does, however it ends.

    Args:
        function: a module's own function (it is sent by name); `state` is sent to each worker once.
    Raises: a ValueError (InputError) or OSError of a worker as it is; WorkerDied when a worker ended otherwise.
    """
    if num_workers <= 1:
        for unit in units:
            yield function(state, unit)
        return
    # Left in reverse: the workers end first, which frees threads that wait for their answers.
    with ThreadPoolExecutor(num_workers) as threads, _started_workers(function, state, num_workers) as idle:
        waiting: deque[Future[Result]] = deque()
        try:
            for unit in units:
                waiting.append(threads.submit(_call, idle, unit))
                if len(waiting) >= 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def one_worker(function: Callable[[State, Unit], Result], state: State) -> Iterator[Callable[[Unit], Result]]:
    """A process of its own that answers function(state, unit): for libraries that end the process where they fail.

    Args: as of `ordered_map`, and what the call raises as well.
    """
    with _started_workers(function, state, 1) as idle:
        yield partial(_call, idle)


def _call(idle: queue.SimpleQueue[_Worker], unit: Any) -> Any:
    process, connection = idle.get()
    try:
        with _named_failure(process):
            connection.send(unit)
            succeeded, result = connection.recv()
    finally:
        idle.put((process, connection))
    if not succeeded:
        raise result
    return result


@contextlib.contextmanager
def _named_failure(process: BaseProcess) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        process.join(5)  # its end of the pipe closes a moment before its status is known
        status = process.exitcode or 0
        raise WorkerDied(signal.Signals(-status).name if status < 0 else None) from None


@contextlib.contextmanager
def _started_workers(
    function: Callable[..., Any], state: Any, num_workers: int
) -> Iterator[queue.SimpleQueue[_Worker]]:
    """Start the workers and give the queue of those that have nothing to do."""
    context = multiprocessing.get_context("spawn")
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    workers: list[_Worker] = []
    # Ctrl-C reaches every process of a terminal; only this one shall answer it. Workers inherit the blocked signal.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(theirs, function), daemon=True)
            process.start()
            theirs.close()
            workers.append((process, ours))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        for process, connection in workers:
            with _named_failure(process):
                connection.send(state)
            idle.put((process, connection))
        yield idle
    finally:
        for process, _ in workers:
            process.terminate()
        for process, connection in workers:
            process.join()
            connection.close()


def _serve(connection: Connection, function: Callable[[Any, Any], Any]) -> None:
    """A worker's life: receive the state, then answer units until the other end closes."""
    # One core each; set before the state brings in the libraries that read these.
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.suppress(EOFError, ConnectionError):
        state = connection.recv()
        # Lists of ids come and go by the thousand; walking them again and again would cost a third of the time.
        gc.freeze()
        gc.set_threshold(100_000)
        while True:
            unit = connection.recv()
            try:
                answer = (True, function(state, unit))
            except (ValueError, OSError) as error:  # the user's; anything else ends the worker with its traceback
                answer = (False, error)
            connection.send(answer)
