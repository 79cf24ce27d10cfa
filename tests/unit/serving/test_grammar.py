"""Answers in JSON: what may be written is exactly what the schema describes, whatever the tokenizer."""

import json
import random

import pytest
import torch

from utils.core.errors import InputError
from utils.serving.grammar import JSON_OBJECT, Grammars
from utils.text.tokenizer import load_tokenizer, token_surfaces
from utils.text.tool_calls import HERMES_FORM, LLAMA_FORM, MISTRAL_FORM, OWN_FORM, read_calls

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["红", "blue"]}, "minItems": 1, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/flag"}, {"type": "null"}]},
    },
    "$defs": {"flag": {"type": "boolean"}},
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
}


def is_person(value):
    """The schema in Python."""
    return (
        list(value) == ["name", "age", "tags", "next"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 4
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and 1 <= len(value["tags"]) <= 3
        and set(value["tags"]) <= {"红", "blue"}
        and value["next"] in (True, False, None)
    )


@pytest.fixture(scope="module")
def byte_level_folder(tmp_path_factory):
    """A tokenizer of GPT-2's kind, with tokens that hold parts of characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(['{"name": "你好", "age": 3, "tags": ["红", "blue"]}'] * 20, trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level"])
def tokenizer(request, base_tokenizer_folder, byte_level_folder):
    return load_tokenizer(base_tokenizer_folder if request.param == "sentencepiece" else byte_level_folder)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, [tokenizer.eos_token_id])


def write(constraint, tokenizer, seed, limit=400):
    """Text that a model without any preference writes; and whether it came to an end."""
    chance, surfaces, written = random.Random(seed), token_surfaces(tokenizer), []
    for _ in range(limit):
        allowed = constraint.allowed()
        assert allowed.shape == (len(surfaces),) and allowed.dtype == torch.bool
        choices = allowed.nonzero()[:, 0].tolist()
        assert choices, "there is always a way on"
        token = chance.choice(choices)
        constraint.advance(token)
        if token == tokenizer.eos_token_id:
            return b"".join(written).decode(), True
        written.append(surfaces[token])
    return b"".join(written).decode(errors="replace"), False


def test_random_writers_follow_the_schema(grammars, tokenizer):
    for seed in range(25):
        text, ended = write(grammars.json(PERSON), tokenizer, seed)
        assert ended and is_person(json.loads(text)), text


def test_what_can_be_written_is_all_that_the_schema_allows(grammars, tokenizer):
    """Every path through the tokens is walked; the texts at their ends are the schema's values and no others."""
    surfaces, found = token_surfaces(tokenizer), set()

    def walk(constraint, text, path):
        for token in constraint.allowed().nonzero()[:, 0].tolist():
            if token == tokenizer.eos_token_id:
                found.add(text.decode())
                continue
            further = grammars.json({"enum": ["ab", "a", 7, None]})
            for earlier in [*path, token]:
                further.advance(earlier)
            walk(further, text + surfaces[token], [*path, token])

    walk(grammars.json({"enum": ["ab", "a", 7, None]}), b"", [])
    values = {'"ab"', '"a"', "7", "null"}
    assert {text.removeprefix(" ") for text in found} == values


def test_any_object(grammars, tokenizer):
    ended = 0
    for seed in range(30):
        text, complete = write(grammars.json(JSON_OBJECT), tokenizer, seed, 120)
        assert text.lstrip(" ").startswith("{")
        if complete:
            ended += 1
            assert isinstance(json.loads(text), dict)
    assert ended


FUNCTIONS = [
    {
        "name": "f",
        "parameters": {"properties": {"with": {"enum": [1]}}, "required": ["with"], "additionalProperties": False},
    },
    {"name": "g", "parameters": {"properties": {}, "additionalProperties": False}},
]
CALLS = [("f", '{"with": 1}'), ("g", "{}")]
FORMS = {"own": OWN_FORM, "hermes": HERMES_FORM, "llama": LLAMA_FORM, "mistral": MISTRAL_FORM}


@pytest.mark.parametrize("form", FORMS)
def test_calls_in_a_templates_form_are_read_again(grammars, tokenizer, form):
    found, most = set(), 0
    for seed in range(12):
        several = seed % 2 == 0
        constraint = grammars.calls(FUNCTIONS, FORMS[form], several)
        text, ended = write(constraint, tokenizer, seed, 300 if several else 200)
        content, calls = read_calls(text.strip(), FORMS[form])
        assert content == "" or (several and not ended), text
        assert ended or several
        assert set(calls) <= set(CALLS) and (several or len(calls) == 1)
        found |= set(calls)
        most = max(most, len(calls))
    assert found == set(CALLS) and most > 1


def test_text_or_a_call(grammars, tokenizer):
    found = set()
    for seed in range(60):
        constraint = grammars.calls(FUNCTIONS, OWN_FORM, False, or_text=True)
        if seed % 2:  # led to a brace
            constraint.advance(next(i for i, s in enumerate(token_surfaces(tokenizer)) if s == b"{"))
            text, ended = write(constraint, tokenizer, seed)
            assert ended
            found.add("{" + text)
        else:
            text, _ = write(constraint, tokenizer, seed, 20)
            assert not text.startswith("{") or json.loads(text)
    assert found == {'{"name": "f", "arguments": {"with": 1}}', '{"name": "g", "arguments": {}}'}


def test_marks_that_are_special_tokens_are_written_as_such(base_tokenizer_folder):
    tokenizer = load_tokenizer(base_tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    constraint = Grammars(tokenizer, [tokenizer.eos_token_id]).calls(FUNCTIONS[1:], MISTRAL_FORM, False)
    mark = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    constraint.advance(mark) if constraint.allowed()[mark] else pytest.fail("the mark is not allowed")
    text, ended = write(constraint, tokenizer, 0)
    assert ended and json.loads(text) == [{"name": "g", "arguments": {}}]


def test_copies_are_independent(grammars, tokenizer):
    first = grammars.json(PERSON)
    second = first.copy()
    assert write(first, tokenizer, 1)[1]
    assert is_person(json.loads(write(second, tokenizer, 2)[0]))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "catt"},
        {"type": 5},
        {"properties": 3},
        {"not": {}},
        {"anyOf": []},
        {"$ref": "http://127.0.0.1:1/schema.json"},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "minLength": -1},
        {"type": "string", "format": "handwriting"},
        {"properties": {"\ud800": {}}},
        {"minimum": float("nan"), "type": "number"},
        {"enum": list(range(20_000))},
        json.loads('{"items":' * 500 + "{}" + "}" * 500),
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_schemas_that_cannot_be_followed_are_refused(grammars, schema):
    with pytest.raises(InputError, match="the JSON schema cannot be followed"):
        grammars.json(schema)


def test_all_tokens_that_end_answers_may_end_json(tokenizer):
    stops = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    constraint = Grammars(tokenizer, stops).json({"enum": [7]})
    surfaces = token_surfaces(tokenizer)
    assert not constraint.allowed()[stops].any()
    constraint.advance(surfaces.index(b"7"))
    assert constraint.allowed()[stops].all() and constraint.allowed().sum() == 2


def test_a_broken_token_only_ends_the_answer(grammars, tokenizer):
    """What the engine may choose anyway (a forced token) is no reason to fail."""
    constraint = grammars.json({"enum": [7]})
    constraint.advance(token_surfaces(tokenizer).index(b"a"))
    assert constraint.allowed().nonzero()[:, 0].tolist() == [tokenizer.eos_token_id]
