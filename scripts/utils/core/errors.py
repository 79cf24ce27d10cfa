"""The one exception for mistakes in what the user gives, and how several are reported together."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """A mistake in the user's input: scripts print its message without a traceback and exit with status 2."""


class Unfinished(InputError):
    """An error after which the same command goes on: what an atomic_folder with a resume key holds by then is kept."""


def raise_problems(problems: Sequence[str]) -> None:
    """Raises: InputError with all problems, if there is any."""
    if problems:
        raise InputError("\n".join(problems))
