"""The choice that likelihoods speak for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .questions import ChoiceQuestion
from .wordings import Mode


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        letter: None: nothing that the rules can read.
        unnormalised: in cloze mode the choice whose text is likeliest as a whole, whatever its length.
        tied: True: another choice is exactly as likely.
    """

    letter: str | None
    unnormalised: str | None = None
    tied: bool | None = None


def choose_by_likelihood(question: ChoiceQuestion, logprobs: Sequence[float], mode: Mode) -> Choice:
    """The likeliest choice; of equal ones the first.

    Args:
        logprobs: in nats, of the letters (of two forms of each their sum counts), or in cloze mode of the texts,
            which are compared by the byte.
    """
    count = len(question.choices)
    sums = [sum(logprobs[place::count]) for place in range(count)]
    likeliest = question.letters[sums.index(max(sums))]
    if mode != "cloze":
        return Choice(likeliest, tied=_is_tied(sums))
    rates = [value / len(text.encode()) for value, text in zip(sums, question.choices, strict=True)]
    return Choice(question.letters[rates.index(max(rates))], likeliest, _is_tied(rates))


def _is_tied(values: Sequence[float]) -> bool | None:
    """True or None, which results leave out."""
    return values.count(max(values)) > 1 or None
