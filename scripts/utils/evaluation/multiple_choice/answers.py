"""Answers to questions with choices: from likelihoods, or from what a model wrote, by rules and never at random."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from .questions import ChoiceQuestion
from .wordings import Mode

# What stands around a letter that is named: brackets, quotation marks, stars; and what says that it is a wrong one.
_OPENING, _CLOSING = r"[\s(\[{<\"'“‘「《【*$]*", r"(?![A-Za-z0-9])"
_NOT_WRONG = r"(?!\s*[)\]”」】*]*\s*(?:选项)?\s*(?:是|为)?(?:错|不|有误|\s*is (?:wrong|incorrect|not)))"
_NAMED = re.compile(
    r"(?:"
    r"答案\s*(?:应该|应当|应)?\s*(?:选择|选项|是|为|选)?"
    r"|(?<!不)(?<!不应)(?<!不能)(?:选择|选项|选)\s*(?:是|为)?"
    r"|\b(?i:answer|option|choice)\b\s*(?i:is|would be|should be)?"
    r")\s*[:,]?\s*(?:选项|(?i:option))?" + _OPENING + r"([A-J])" + _CLOSING + _NOT_WRONG
)
_CONFIRMED = re.compile(
    r"(?<![A-Za-z0-9])([A-J])\s*[)\]”」】]?\s*(?:选项)?\s*(?:(?:是|为)?\s*(?:正确|对的)|(?i:is correct))"
)
_ALONE = re.compile(r"(?<![A-Za-z0-9])([A-J])(?![A-Za-z0-9])")
_FIRST = re.compile(r"\s*" + _OPENING + r"([A-J])" + _CLOSING)


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        letter: None: nothing that the rules can read.
        unnormalised: in cloze mode the choice whose text is likeliest as a whole, whatever its length.
    """

    letter: str | None
    unnormalised: str | None = None


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
        return Choice(likeliest)
    rates = [value / len(text.encode()) for value, text in zip(sums, question.choices, strict=True)]
    return Choice(question.letters[rates.index(max(rates))], likeliest)


def parse_answer(text: str, question: ChoiceQuestion, mode: Mode) -> Choice:
    """The letter that an answer names. The first rule that finds one decides:

    1. a letter named as the answer (答案是B, 选B, B是正确的, the answer is B): the first, after reasoning the last;
    2. (without reasoning) the letter that the answer begins with;
    3. the only letter that stands alone anywhere;
    4. the only choice whose text stands in it.
    """
    text = unicodedata.normalize("NFKC", text)
    named = sorted((match.start(1), match[1]) for pattern in (_NAMED, _CONFIRMED) for match in pattern.finditer(text))
    letters = [letter for _, letter in named if letter in question.letters]
    if letters:
        return Choice(letters[-1 if mode == "cot" else 0])
    first = _FIRST.match(text)
    if mode != "cot" and first and first[1] in question.letters:
        return Choice(first[1])
    alone = {letter for letter in _ALONE.findall(text) if letter in question.letters}
    if len(alone) == 1:
        return Choice(alone.pop())
    return Choice(_find_text(text, question))


def _find_text(text: str, question: ChoiceQuestion) -> str | None:
    """The letter of the only choice whose text is there; one that is a part of another one's does not count."""
    choices = [unicodedata.normalize("NFKC", choice).strip() for choice in question.choices]
    # Within a longer word or number it is not meant.
    there = [c for c in choices if c and re.search(rf"(?<![A-Za-z0-9]){re.escape(c)}(?![A-Za-z0-9])", text)]
    longest = [choice for choice in there if not any(choice != other and choice in other for other in there)]
    return question.letters[choices.index(longest[0])] if len(longest) == 1 else None
