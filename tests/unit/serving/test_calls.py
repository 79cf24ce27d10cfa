"""Calls in answers that are streamed: whatever the pieces, joined they are what read_calls finds in the whole."""

import json
from random import Random

import pytest

from utils.serving.calls import CallStream
from utils.text.tool_calls import HERMES_FORM, LLAMA_FORM, MISTRAL_FORM, OWN_FORM, read_calls, write_calls

CALLS = [("weather", '{"city": "北京", "days": [1, 2]}'), ("now", "{}"), ("say", '{"text": "<tool_call> } \\" {"}')]
FORMS = {"own": OWN_FORM, "hermes": HERMES_FORM, "llama": LLAMA_FORM, "mistral": MISTRAL_FORM}


def stream(text, form, random, several=True):
    """Push a text in random pieces; the text and the calls (name, arguments) that came, and the pieces of calls."""
    calls, said, pieces, reached = CallStream(form, several), "", [], 0
    while reached < len(text) or not reached:
        reached = min(len(text), reached + random.randrange(1, 6))
        shown, new = calls.push(text[:reached], reached == len(text))
        said, pieces = said + shown, pieces + new
    names = [piece.name for piece in pieces if piece.name is not None]
    arguments = ["".join(p.arguments for p in pieces if p.index == number) for number in range(len(names))]
    assert calls.num_calls == len(names)
    return said, [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)], pieces


def parsed(calls):
    return [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", ["", "Let me see.\n\n"])
def test_pieces_joined_are_the_whole(form, before):
    random, form = Random(1), FORMS[form]
    for count in (1, 2, 3):
        mark = form.mark if form is LLAMA_FORM and before else ""  # what has no mark is the whole answer
        text = (before if form.mark else "") + mark + write_calls(CALLS[:count], form)
        content, calls = read_calls(text, form)
        assert parsed(calls) == parsed(CALLS[:count])
        for _ in range(6):
            said, found, _ = stream(text, form, random)
            assert (said, found) == (content, parsed(calls))
            assert stream(text, form, random, several=False)[1] == parsed(CALLS[:1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text", ["Hello <b>you</b>.\n\n Bye", '{"answer": 42}', "{ no", "[1, 2]", "a <tool", "<", " ", '{"name": "x"}']
)
def test_text_stays_text(form, text):
    for seed in range(10):
        assert stream(text, FORMS[form], Random(seed))[:2] == (text, [])


@pytest.mark.parametrize("form", ["own", "hermes", "llama"])
def test_arguments_come_while_they_are_written(form):
    text = write_calls([("say", json.dumps({"text": "word " * 50}))], FORMS[form])
    _, [(name, arguments)], pieces = stream(text, FORMS[form], Random(0))
    assert name == "say" and arguments == {"text": "word " * 50} and len(pieces) > 20


@pytest.mark.parametrize("form", [OWN_FORM, HERMES_FORM, LLAMA_FORM])
def test_text_that_begins_with_a_bracket_is_streamed(form):
    calls = CallStream(form, True)
    assert [calls.push("[1] says"[:size], False)[0] for size in (3, 5, 8)] == ["[1]", " s", "ays"]
    assert not calls.num_calls


def test_of_a_call_cut_short_the_beginning_came():
    calls = CallStream(HERMES_FORM, True)
    assert calls.push('Well.\n<tool_call>\n{"name": "f", "arguments": {"a": ', False)[0] == "Well."
    assert calls.push('Well.\n<tool_call>\n{"name": "f", "arguments": {"a": 1', True)[0] == ""
    assert calls.num_calls == 1
