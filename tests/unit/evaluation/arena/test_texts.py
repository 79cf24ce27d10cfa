"""The arena's words are there in both languages, and take the same values."""

import re
import string

from utils.evaluation.arena.texts import ARENA_TEXTS, translate
from utils.web import texts


def test_texts_are_in_both_languages():
    names = lambda text: sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)  # noqa: E731
    for chinese, english in ARENA_TEXTS.values():
        assert names(chinese) == names(english)
        assert not re.search("[\u4e00-\u9fff]", english)
    assert not set(ARENA_TEXTS) & set(texts.TEXTS)


def test_the_arena_has_the_words_of_every_page_too():
    assert translate("arena_battles", "en", count=3) == "3 battles"
    assert translate("dark", "zh") == texts.translate("dark", "zh")
