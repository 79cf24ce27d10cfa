"""Functions told to a model, and the calls that its answers are."""

import json

import pytest

from utils.text.tool_calls import (
    HERMES_FORM,
    LLAMA_FORM,
    MISTRAL_FORM,
    OWN_FORM,
    add_tools,
    call_forms,
    read_calls,
    write_calls,
)

TWO = [("f", '{"a": [1, "二"]}'), ("g", "{}")]
WRITTEN = {
    OWN_FORM: '{"name": "f", "arguments": {"a": [1, "二"]}}\n{"name": "g", "arguments": {}}',
    HERMES_FORM: '<tool_call>\n{"name": "f", "arguments": {"a": [1, "二"]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    LLAMA_FORM: '{"name": "f", "parameters": {"a": [1, "二"]}}; {"name": "g", "parameters": {}}',
    MISTRAL_FORM: '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1, "二"]}}, {"name": "g", "arguments": {}}]',
}


@pytest.mark.parametrize("form", WRITTEN)
def test_calls_are_read_as_written(form):
    assert write_calls(TWO, form) == WRITTEN[form]
    assert read_calls(WRITTEN[form], form) == ("", TWO)
    assert read_calls(write_calls(TWO[:1], form) + "\n", form) == ("", TWO[:1])


def test_arguments_that_are_no_json_stay_text():
    assert read_calls(write_calls([("f", "no json")])) == ("", [("f", '"no json"')])


def test_arguments_may_be_json_in_a_text():
    text = json.dumps({"name": "f", "arguments": '{"a": [1, "二"]}'})
    assert read_calls(f"<tool_call>{text}</tool_call>", HERMES_FORM) == ("", TWO[:1])


@pytest.mark.parametrize("form", WRITTEN)
def test_what_is_no_call_or_cut_short_is_text(form):
    texts = ["hello", '{"name": "f"}', '{"name": "f", "argum', "[1]", '{"name": 1, "arguments": {}}', "[" * 9999]
    for text in [*texts, "see " + write_calls(TWO), write_calls(TWO[:1], form)[:-15]]:
        assert read_calls(text, form) == (text, [])
    assert read_calls(WRITTEN[form], None) == (WRITTEN[form], [])


def test_text_may_stand_before_marked_calls():
    for form in (HERMES_FORM, MISTRAL_FORM):
        assert read_calls("Let me see.\n" + WRITTEN[form], form) == ("Let me see.", TWO)
    assert read_calls("So: <|python_tag|>" + WRITTEN[LLAMA_FORM], LLAMA_FORM) == ("So:", TWO)


def test_a_whole_call_counts_where_the_next_is_cut_short():
    text = WRITTEN[HERMES_FORM][:-20]
    assert read_calls(text, HERMES_FORM) == (text[text.rindex("<tool_call>") :], TWO[:1])
    assert read_calls(WRITTEN[OWN_FORM][:-3]) == (WRITTEN[OWN_FORM][:-3], [])


def test_marks_that_are_special_tokens_are_not_in_the_text():
    for form in (HERMES_FORM, MISTRAL_FORM):
        bare = WRITTEN[form].replace("<tool_call>", "").replace("</tool_call>", "").replace("[TOOL_CALLS]", "")
        assert read_calls(bare, form) == ("", TWO)


def test_functions_stand_in_the_system_prompt():
    assert add_tools([], [{"name": "f"}]) == [{"role": "system", "content": '[{"name": "f"}]'}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
    assert add_tools(messages, [{"name": "查"}]) == [
        {"role": "system", "content": 'be brief\n\n[{"name": "查"}]'},
        {"role": "user", "content": "q"},
    ]


def test_what_a_grammar_allows_is_what_is_read():
    schema = {"properties": {"city": {"type": "string"}}, "required": ["city"]}
    ((before, allowed, after),) = call_forms([{"name": 'we"ather', "parameters": schema}])
    assert allowed == {"type": "object", **schema}
    assert read_calls(before + json.dumps({"city": "北京"}) + after) == ("", [('we"ather', '{"city": "北京"}')])
    for form in WRITTEN:
        ((before, _, after),) = call_forms([{"name": "f"}], form)
        assert before + '{"a": 1}' + after == write_calls([("f", {"a": 1})], form)
    assert call_forms([{"name": "f"}])[0][1] == {"type": "object"}
