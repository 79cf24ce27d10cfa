"""The machine, against what the operating system says; and long calls that Ctrl-C may end."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from support.paths import SCRIPTS
from utils.core.errors import InputError
from utils.core.machine import available_bytes, available_cores, check_port, interruptible


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_are_those_of_the_process():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cores() == len(before)


def test_available_memory_is_less_than_there_is():
    assert 1 << 20 < available_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_peak_memory_stays_when_it_is_freed():
    code = (
        "from utils.core.machine import peak_resident_bytes as peak\n"
        "before = peak(); block = bytearray(64 << 20); held = peak(); del block; after = peak()\n"
        "print(held - before, after - held)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    grown, later = map(int, result.stdout.split())
    assert 60 << 20 < grown < 80 << 20 and abs(later) < 1 << 20


def test_interruptible_hands_over_results_and_errors():
    assert interruptible(lambda: threading.current_thread() is not threading.main_thread())
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0)


def test_interruptible_lets_an_interrupt_through(monkeypatch):
    started = time.monotonic()
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: time.sleep(3))
    assert time.monotonic() - started < 2


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--host 127.0.0.1 --port {port}: .*; pass another --port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    check_port("127.0.0.1", 0)
