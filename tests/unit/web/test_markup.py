"""What the page would take for markup in a text, kept apart and put back."""

import re
from random import Random

import pytest

from utils.web.markup import CONTENT_POLICY, escape_answer, escape_question, unescape_question


@pytest.mark.parametrize(
    "text",
    ["<s>a</s>", "<script>", "<!-- -->", "a < b <= c", "[x](javascript:1)", "![x](y)", "![x][y]\n[y]: z", "a]b("],
)
def test_marks_are_kept_apart_and_put_back(text):
    shown = escape_question(text)
    assert unescape_question(shown) == text
    assert not re.search(r"<[a-zA-Z/!?]|!\[|\][(\[:]", shown), (
        "nothing a browser or a markdown reader would take for markup"
    )
    assert len(shown.replace("\ufeff", "")) == len(text)


def test_any_text_of_a_user_comes_back_from_the_page_as_it_was():
    random = Random(0)
    for _ in range(5000):
        text = "".join(random.choices("*_`~#>-+=|:<!&\\$[]()1.;a \n\t\ufeff", k=random.randrange(12)))
        assert unescape_question(escape_question(text)) == text


def test_pictures_in_answers_are_not_fetched():
    assert "![" not in escape_answer("![x](http://a/b.png) [link](http://a)")
    assert "](http://a)" in escape_answer("[link](http://a)")
    assert "default-src 'self'" in CONTENT_POLICY and "http" not in CONTENT_POLICY
