"""Functions told to a model, and the calls that its answers are."""

import json

from utils.text.tool_calls import add_tools, call_forms, read_call, write_call


def test_tool_calls_are_read_as_written():
    assert read_call(write_call("f", '{"a": [1, "二"]}')) == ("f", '{"a": [1, "二"]}')
    assert read_call(write_call("f", "no json")) == ("f", '"no json"')
    for text in ("hello", '{"name": "f"}', '{"name": "f", "argum', "[1]", '{"name": 1, "arguments": {}}', "[" * 9999):
        assert read_call(text) is None


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
    assert read_call(before + json.dumps({"city": "北京"}) + after) == ('we"ather', '{"city": "北京"}')
    assert call_forms([{"name": "f"}])[0][1] == {"type": "object"}
