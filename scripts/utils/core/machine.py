"""The machine: cores, memory and ports this process may use, what it used, and whether Ctrl-C reaches it."""

from __future__ import annotations

import os
import re
import resource
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .errors import InputError


def available_cores() -> int:
    """Cores this process may use, which containers and schedulers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (line := re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())):
        return int(line[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_resident_bytes() -> int:
    """The most memory this process has held."""
    status = Path("/proc/self/status")
    if status.is_file() and (line := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(line[1]) * 1024  # ru_maxrss would count what the parent held when it started this process
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """The memory this process holds."""
    status = Path("/proc/self/status")
    if status.is_file() and (line := re.search(r"VmRSS:\s*(\d+) kB", status.read_text())):
        return int(line[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_resident() -> bool:
    """Let peak_resident_bytes count from now on; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def check_port(host: str, port: int) -> None:
    """Raises: InputError if it cannot be listened on, before minutes are spent on loading a model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"--host {host} --port {port}: {error.strerror}; pass another --port") from None


Result = TypeVar("Result")


def interruptible(work: Callable[[], Result]) -> Result:
    """Run a long call of foreign code in a thread of its own, so that Ctrl-C need not wait for its end."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]
    return results[0]
