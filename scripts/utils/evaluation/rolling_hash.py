"""N-grams of any text, fast: characters folded, text cut into units, and hashes of n-grams of units.

A unit is a word, or a character of a script that is written without spaces (Chinese, Japanese, Thai ...) or in
syllables (Hangul). Spaces and punctuation are no part of any unit, so that texts that differ in them alone are equal.

Shapes: C characters of a text, U its units.
"""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass

import numpy as np

BOUNDARY = "\x1e"  # a character between texts that are handled together; a unit by itself, equal to none
SEED = 20231
BASE = 0x9E3779B97F4A7C15  # of the polynomials: odd, so that it has an inverse modulo 2**64
SEPARATOR, WORD, SINGLE, COMPLEX = 0, 1, 2, 4  # what a character is; COMPLEX, beside it: its folding needs fold()
# First and last characters of the scripts whose characters are units.
SINGLE_SCRIPTS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x109F),  # Tibetan, Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x312F),  # radicals, kana, bopomofo
    (0x3131, 0x318F),  # single letters of Hangul
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),  # Chinese characters
    (0x4E00, 0xA4CF),  # Chinese characters, Yi
    (0xAC00, 0xD7AF),  # Hangul
    (0xF900, 0xFAFF),
    (0x1B000, 0x1B16F),
    (0x20000, 0x3FFFF),  # rare Chinese characters
)
LARGEST, LISTED = 0x110000, 0x20000  # characters there are; those that others may compose to
UNCHANGED = ((0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x20000, 0x2F7FF), (0x2FA20, 0x3FFFF))  # units that fold to itself
MANY = 8  # where more than one character in so many is COMPLEX, the whole text is folded at once


# ---------------------------------------------------------------- folding


def fold(text: str) -> str:
    """NFKC and full case folding; format characters, and marks that compose with no letter, are left out.

    Source: Unicode 3.13, toNFKC_Casefold, of which this is a coarser form.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(letter for letter in folded if unicodedata.category(letter) not in ("Cf", "Mn", "Me"))


@dataclass(frozen=True)
class _Tables:
    """Of every character: what it is, and a random number that characters with equal foldings share."""

    kinds: np.ndarray  # (LARGEST,) uint8
    values: np.ndarray  # (LARGEST,) uint64


@functools.cache
def _tables() -> _Tables:
    """Made from Python's Unicode tables, in some tenths of a second."""
    kinds: np.ndarray = np.zeros(LARGEST, np.uint8)
    values: np.ndarray = np.random.default_rng(SEED).integers(1, 2**64, LARGEST, np.uint64)
    composing, single_codes = _composing_characters(), _single_codes()
    for first, last in UNCHANGED:
        kinds[first : last + 1] = SINGLE
    rare = (*range(0x2F800, 0x2FA20), *range(0xE0000, 0xE0200))  # other forms, and marks that choose a form
    for code in (*range(0x4E00), *range(0xA000, 0xAC00), *range(0xD7A4, LISTED), *rare):
        folded = fold(chr(code))
        classes = {_kind(letter, single_codes) for letter in folded}
        if classes == {SEPARATOR}:
            kinds[code] = SEPARATOR
        elif len(folded) != 1 or folded in composing or chr(code) in composing:
            kinds[code] = _kind(chr(code), single_codes) | COMPLEX
        else:
            (kinds[code],), values[code] = classes, values[ord(folded)]
    kinds[ord(BOUNDARY)] = SINGLE
    return _Tables(kinds, values)


def _single_codes() -> set[int]:
    return {code for first, last in SINGLE_SCRIPTS for code in range(first, last + 1)}


def _kind(letter: str, single_codes: set[int]) -> int:
    if unicodedata.category(letter)[0] not in "LNM":
        return SEPARATOR
    return SINGLE if ord(letter) in single_codes else WORD


def _composing_characters() -> set[str]:
    """Characters that may become one with the character before them."""
    pairs = (unicodedata.decomposition(chr(code)).split() for code in range(LISTED))
    found = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    hangul = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    return found | hangul | {chr(code) for code in range(LISTED) if unicodedata.combining(chr(code))}


def _codes(text: str) -> np.ndarray:
    """(C,) uint32; half surrogate pairs are kept."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _fold_complex(text: str, places: np.ndarray) -> str:
    """The text with what stands at `places`, each with the character before it, folded by `fold`."""
    if len(places) * MANY > len(text):
        return fold(text)
    pieces = []
    last = 0
    for group in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
        start, end = max(int(group[0]) - 1, last), int(group[-1]) + 1
        pieces += [text[last:start], fold(text[start:end])]
        last = end
    return "".join((*pieces, text[last:]))


# ---------------------------------------------------------------- units


@dataclass(frozen=True)
class Units:
    """The units of a text.

    Attributes:
        text: as it was given, apart from characters whose folding has another length.
        values: (U,) uint64, equal where units are.
        starts, ends: (U,) where units stand in `text`.
        singles: (U,) bool: characters, not words.
    """

    text: str
    values: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    singles: np.ndarray


def cut_units(text: str) -> Units:
    """Cut a text into units."""
    tables = _tables()
    codes = _codes(text)
    kinds = tables.kinds[codes]
    if len(complex_places := np.flatnonzero(kinds & COMPLEX)):
        text = _fold_complex(text, complex_places)
        codes = _codes(text)
        kinds = tables.kinds[codes] & ~np.uint8(COMPLEX)
    places = np.flatnonzero(kinds)
    if not len(places):
        none: np.ndarray = np.zeros(0, np.int64)
        return Units(text, none.astype(np.uint64), none, none, none.astype(bool))
    words = kinds[places] == WORD
    begins: np.ndarray = np.ones(len(places), bool)
    begins[1:] = ~(words[1:] & words[:-1] & (places[1:] - places[:-1] == 1))
    firsts = np.flatnonzero(begins)
    powers, inverses = _powers(len(places))
    # Within a unit the polynomial of its characters: that of the whole text, divided by the power of its first place.
    values = np.add.reduceat(tables.values[codes[places]] * powers[: len(places)], firsts) * inverses[firsts]
    ends: np.ndarray = places[np.append(firsts[1:], len(places)) - 1] + 1
    return Units(text, values, places[firsts], ends, ~words[firsts])


def join_texts(texts: list[str]) -> str:
    """Texts with a BOUNDARY after each: their units in one array, with no n-gram from one into the next."""
    return "".join(text.replace(BOUNDARY, " ") + BOUNDARY for text in texts)


# ---------------------------------------------------------------- hashes of n-grams


@functools.cache
def _powers_of_size(size: int) -> tuple[np.ndarray, np.ndarray]:
    inverse = pow(BASE, -1, 2**64)
    factors: np.ndarray = np.full((2, size), [[BASE], [inverse]], np.uint64)
    factors[:, 0] = 1
    powers, inverses = np.cumprod(factors, axis=1, dtype=np.uint64)
    return powers, inverses


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """At least `size` powers of BASE and of its inverse, modulo 2**64."""
    return _powers_of_size(1 << max(16, (size - 1).bit_length()))


class RollingHash:
    """Hashes of all n-grams of units, each at once: equal for equal n-grams.

    Source: Rabin and Karp 1987, with prefix sums and division by powers modulo 2**64. Units are random numbers, so
    different n-grams agree in one of 2**64 cases.
    """

    def __init__(self, values: np.ndarray) -> None:
        """Args: values: (U,) of Units."""
        powers, self._inverses = _powers(len(values) + 1)
        self._sums: np.ndarray = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * powers[: len(values)], out=self._sums[1:])

    def every(self, length: int) -> np.ndarray:
        """(U - length + 1,) of the n-grams of so many units that start at each unit; none if there are fewer."""
        count = max(0, len(self._sums) - length)
        return (self._sums[length:] - self._sums[:count]) * self._inverses[:count]

    def at(self, places: np.ndarray, length: int) -> np.ndarray:
        """Of the n-grams that start at these units."""
        return (self._sums[places + length] - self._sums[places]) * self._inverses[places]
