"""What worker processes are given instead of their work; apart, since they import the module that it stands in."""

import os
import signal
from typing import Any


def die_of_sigill(state: Any, work: Any) -> None:
    """As of an instruction that the processor has not, or denies."""
    os.kill(os.getpid(), signal.SIGILL)


def end(model: Any) -> None:
    os._exit(0)
