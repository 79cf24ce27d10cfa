"""Scores of an answer against its reference, 0-1, in Chinese, English and mixtures of them.

A word is a number, a run of letters, or one character of a script that is written without spaces (rolling_hash). Case,
width, spaces and punctuation (but %) are no part of words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from ..rolling_hash import SINGLE_SCRIPTS, fold

NGRAM_ORDER, BETA = 6, 2  # of chrF, as published
_SINGLE = "".join(f"{chr(first)}-{chr(last)}" for first, last in SINGLE_SCRIPTS)
_LETTER = rf"(?:(?![{_SINGLE}])[^\W_])"
# A sign stands before a number, and not between two numbers or letters: 3-5, covid-19.
_SIGN = r"(?:(?<![0-9a-z)\]}%])[-−])?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_WORD = re.compile(rf"{_SIGN}{_DIGITS}|[{_SINGLE}]|{_LETTER}+(?:['’]{_LETTER}+)*|\S")
_NUMBER = re.compile(rf"({_SIGN})({_DIGITS})(?:/([1-9]\d*)(?![\d/.]))?\s*([%万亿]?)")

_CHINESE_DIGITS = {"〇": 0, "两": 2} | {digit: value for value, digit in enumerate("零一二三四五六七八九")}
_CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_NUMERAL = re.compile(rf"[{''.join([*_CHINESE_DIGITS, *_CHINESE_UNITS])}]+(?:点[{''.join(_CHINESE_DIGITS)}]+)?")
_FACTORS = {"": Fraction(1), "%": Fraction(1, 100), "万": Fraction(10**4), "亿": Fraction(10**8)}


def _plain(text: str) -> str:
    # Folding would turn the Chinese comma, which separates numbers, into the one that groups their digits.
    return fold(text.replace("，", "、"))


def words(text: str) -> list[str]:
    """The words of a text, in order; of a text of nothing but punctuation, its characters."""
    found = [word.replace(",", "") if word[-1].isdigit() else word for word in _WORD.findall(_plain(text))]
    return [word for word in found if not _is_punctuation(word)] or found


def _is_punctuation(word: str) -> bool:
    return len(word) == 1 and word != "%" and unicodedata.category(word).startswith("P")


# ---------------------------------------------------------------- words


def exact(answer: str, reference: str) -> float:
    """1 where the words are the same."""
    return float(words(answer) == words(reference))


def contained(answer: str, reference: str) -> float:
    """1 where the reference's words stand in the answer, one after another: 12 is in "= 12.", not in "112"."""
    inner, outer = (f"\0{chr(0).join(words(text))}\0" for text in (reference, answer))
    return float(inner in outer)


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words. Source: Lin 2004, "ROUGE", section 3.1, with beta 1."""
    from rapidfuzz.distance import LCSseq

    said, right = words(answer), words(reference)
    return 2 * LCSseq.similarity(said, right) / (len(said) + len(right)) if said else 0.0


# ---------------------------------------------------------------- characters


def chrf(answer: str, reference: str) -> float:
    """F2 of character n-grams up to 6, white space left out. Source: Popović 2015, "chrF", as sacreBLEU computes it.

    Precision and recall are means over the orders; one that is longer than a text does not count.
    """
    said, right = ("".join(text.split()) for text in (answer, reference))
    orders = range(1, min(NGRAM_ORDER, len(said), len(right)) + 1)
    if not orders:
        return 0.0
    common = [(_ngrams(said, order) & _ngrams(right, order)).total() for order in orders]
    precision, recall = (
        sum(count / (len(text) - order + 1) for order, count in zip(orders, common, strict=True)) / len(orders)
        for text in (said, right)
    )
    total = BETA**2 * precision + recall
    return (1 + BETA**2) * precision * recall / total if total else 0.0


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


# ---------------------------------------------------------------- numbers


def number(answer: str, reference: str) -> float | None:
    """1 where the last number of the answer is that of the reference; None where the reference has none.

    In Chinese numerals a reference counts where it is nothing else (一 in 一起 is no number), and an answer where it
    has no digits.
    """
    right = _last_number(reference)
    if right is None and _NUMERAL.fullmatch(reference.strip(" 。.\n")):
        right = _last_numeral(reference)
    if right is None:
        return None
    said = _last_number(answer)
    return float((_last_numeral(answer) if said is None else said) == right)


def _last_number(text: str) -> Fraction | None:
    """12, 1,200, -0.5, 50%, 3/4, 3万; None: there is no digit."""
    found = _NUMBER.findall(_plain(text))
    if not found:
        return None
    sign, digits, divisor, unit = found[-1]
    value = Fraction(digits.replace(",", "")) / int(divisor or 1) * _FACTORS[unit]
    return -value if sign else value


def _last_numeral(text: str) -> Fraction | None:
    found = _NUMERAL.findall(text)
    return read_numeral(found[-1]) if found else None


def read_numeral(text: str) -> Fraction:
    """A number in Chinese numerals: 三百零五, 一万二千, 二〇二四, 三点五."""
    whole, _, decimals = text.partition("点")
    total = section = digit = 0
    for letter in whole:
        if letter in _CHINESE_DIGITS:
            digit = 10 * digit + _CHINESE_DIGITS[letter]
        elif letter == "亿":  # of all that stands before it: 一万二千亿
            total, section, digit = (total + section + digit) * 10**8, 0, 0
        elif letter == "万":
            total, section, digit = total + (section + digit) * 10**4, 0, 0
        else:
            section, digit = section + (digit or 1) * _CHINESE_UNITS[letter], 0
    places = "".join(str(_CHINESE_DIGITS[letter]) for letter in decimals)
    return total + section + digit + Fraction(int(places or 0), 10 ** len(places))


Metric = Callable[[str, str], float | None]  # answer, reference; None: it says nothing of this reference
METRICS: dict[str, Metric] = {
    "exact": exact,
    "contained": contained,
    "number": number,
    "rouge_l": rouge_l,
    "chrf": chrf,
}


def score_answer(answer: str, reference: str) -> dict[str, float]:
    """{metric: score}, without those that say nothing of this reference."""
    scores = {name: metric(answer, reference) for name, metric in METRICS.items()}
    return {name: score for name, score in scores.items() if score is not None}
