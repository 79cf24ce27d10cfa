"""utils.text.conversations: every layout of a conversation, what is changed in one, and what is refused."""

import json

import pytest

from utils.core.errors import InputError
from utils.text.conversations import Conversation, read_conversation, read_example, read_preference, read_prompt


def system(text="S"):
    return {"role": "system", "content": text}


def user(text="Q"):
    return {"role": "user", "content": text}


def assistant(text="A", **more):
    return {"role": "assistant", "content": text, **more}


def call(name="f", arguments=None, **more):
    arguments = {"x": 1} if arguments is None else arguments
    return {"type": "function", **more, "function": {"name": name, "arguments": arguments}}


def sharegpt(*turns, **more):
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "default": None}, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}


def test_every_layout_gives_the_same_messages():
    expected = [system(), user(), assistant(), user("I\nX"), assistant("O")]
    alpaca = {"instruction": "I", "input": "X", "output": "O", "system": "S", "history": [["Q", "A"]]}
    shared = sharegpt(("human", "Q"), ("gpt", "A"), ("human", "I\nX"), ("gpt", "O"), system="S")
    other_spellings = {"messages": shared["conversations"], "system": "S"}, {"conversations": expected}
    for record in (alpaca, shared, {"messages": expected}, *other_spellings):
        assert read_conversation(record, "f:1") == read_example(record, "f:1") == Conversation(expected)


def test_text_in_parts_is_read_as_the_server_reads_it():
    parts = [{"type": "text", "text": "I"}, {"type": "text", "text": "X"}]
    turns = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}, assistant()]
    assert read_example({"messages": turns}, "f:1") == Conversation([system(), user("I\nX"), assistant()])
    for strange in ([*parts, {"type": "image_url"}], [{"type": "text"}], [{"type": "text", "text": 3}], ["I"], []):
        with pytest.raises(InputError, match="f:1: messages: turn 1 needs 'role'"):
            read_example({"messages": [{"role": "user", "content": strange}, assistant()]}, "f:1")


# ---------------------------------------------------------------- system prompts and tools


def test_system_prompts_of_a_record_are_joined():
    for record in (
        {"messages": [system("T"), user(), assistant()], "system": "S"},
        {"messages": [system(), system("T"), user(), assistant()]},
        sharegpt(("system", "T"), ("human", "Q"), ("gpt", "A"), system="S"),
    ):
        assert read_example(record, "f:1") == Conversation([system("S\n\nT"), user(), assistant()])
        answered = {**record, "chosen": "B", "rejected": "C"}
        turns = next(record[name] for name in ("messages", "conversations") if name in record)
        answered["messages"], answered["conversations"] = turns[:-1], None
        assert read_preference(answered, "f:1").messages == [system("S\n\nT"), user()]
        assert read_prompt(record, "f:1")[0].messages == [system("S\n\nT"), user()]


@pytest.mark.parametrize(
    "tools", [[TOOL], TOOL, json.dumps([TOOL]), [json.dumps(TOOL)], [FUNCTION], json.dumps([FUNCTION], indent=1)]
)
def test_tools_are_what_a_list_or_its_json_says(tools):
    record = {"messages": [system(), user(), assistant()], "tools": tools}
    pair = {**record, "messages": record["messages"][:-1], "chosen": "B", "rejected": "C"}
    for found in (
        read_example(record, "f:1").tools,
        read_preference(pair, "f:1").tools,
        read_prompt(record, "f:1")[0].tools,
    ):
        assert found in ([TOOL], [FUNCTION])


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools(tools):
    assert read_example({"instruction": "I", "output": "O", "tools": tools}, "f:1").tools is None


@pytest.mark.parametrize("tools", ["search the web", "{'name': 'f'}", [3], [{"description": "nameless"}], '["f"]'])
def test_tools_that_are_no_functions_are_named(tools):
    with pytest.raises(InputError, match="f:1: 'tools' needs a list of functions"):
        read_example({"instruction": "I", "output": "O", "tools": tools}, "f:1")


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (assistant(None, tool_calls=[call(id="c1")]), assistant("", tool_calls=[call(id="c1")])),
        (
            assistant("", tool_calls=[call(arguments='{"x": 1}')]),
            assistant("", tool_calls=[call(arguments='{"x": 1}')]),
        ),
        (assistant("Let me see.", tool_calls=[call()]), assistant("Let me see.", tool_calls=[call()])),
        (assistant("", tool_calls=[{"name": "f", "arguments": {"x": 1}}]), assistant("", tool_calls=[call()])),
        (
            assistant(None, function_call={"name": "f", "arguments": None}),
            assistant("", tool_calls=[call(arguments={})]),
        ),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            assistant("", tool_calls=[call()]),
        ),
        (
            {
                "from": "function_call",
                "value": '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]',
            },
            assistant("", tool_calls=[call(), call("g", {})]),
        ),
        (
            assistant(None, tool_calls='[{"function": {"name": "f", "arguments": "{\\"x\\": 1}"}}]'),
            assistant("", tool_calls=[call(arguments='{"x": 1}')]),
        ),
        ({"from": "function_call", "value": "f(x=1)"}, assistant("f(x=1)")),  # in a form of its own: as it stands
        ({"role": "assistant", "content": "A", "tool_calls": []}, assistant()),
        ({"role": "assistant", "content": "A", "tool_calls": None, "function_call": None}, assistant()),
    ],
)
def test_calls(turn, expected):
    tool = {"role": "tool", "content": "R", "tool_call_id": "c1", "name": "f"}
    record = {"messages": [user(), turn, tool, assistant("B")]}
    assert read_example(record, "f:1") == Conversation([user(), expected, tool, assistant("B")])
    pair = read_preference({"prompt": "Q", "chosen": turn, "rejected": assistant("no")}, "f:1")
    assert pair.chosen == expected


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (assistant("", tool_calls=[{"name": "f", "arguments": "x=1"}]), "turn 2: a call needs 'name' and 'arguments'"),
        (assistant("", tool_calls=[{"function": {"arguments": {}}}]), "turn 2: a call needs 'name'"),
        (assistant("", tool_calls=["f"]), "turn 2: a call needs"),
        (user("Q") | {"tool_calls": [call()]}, "turn 2: only the assistant calls functions, not the user"),
        (assistant(None), "turn 2 needs 'role'"),
    ],
)
def test_calls_that_cannot_be_read_are_named(turn, words):
    with pytest.raises(InputError, match=f"f:1: messages: {words}"):
        read_example({"messages": [user(), turn]}, "f:1")


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize("field", ["weight", "train", "loss"])
@pytest.mark.parametrize(("yes", "no"), [(1, 0), (1.0, 0.0), (True, False), (None, 0)])
def test_weights(field, yes, no):
    turns = [user() | {field: no}, assistant() | {field: no}, user(), assistant("B") | {field: yes}]
    assert read_example({"messages": turns}, "f:1").messages == [user(), assistant(weight=0), user(), assistant("B")]
    pair = {"messages": turns[:3], "chosen": [turns[3]], "rejected": "C"}
    assert read_preference(pair, "f:1").messages == [user(), assistant(), user()]


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (assistant(weight=0.5), "turn 2: {'weight': 0.5}, need 0"),
        (assistant(train="no"), "need 0"),
        (assistant(loss=[]), "need 0"),
        (assistant(weight=1, train=False), "need 0"),
        (
            user() | {"train": True},
            "turn 2: {'train': True}: only the assistant's turns can be trained, not the user's",
        ),
    ],
)
def test_weights_that_say_nothing_are_named(turn, words):
    with pytest.raises(InputError, match=words):
        read_example({"messages": [user(), turn, assistant()]}, "f:1")


# ---------------------------------------------------------------- the order of turns


@pytest.mark.parametrize(
    ("turns", "expected", "changes"),
    [
        # Neighbours.
        (
            [user(), user("R"), assistant(), assistant("B")],
            [user("Q\n\nR"), assistant("A\n\nB")],
            {"joined_turns"},
        ),
        ([user(), assistant(), assistant(" ")], [user(), assistant()], {"joined_turns"}),
        (
            [user(), assistant(), assistant("", tool_calls=[call()]), assistant("", tool_calls=[call("g")])],
            [user(), assistant(tool_calls=[call(), call("g")])],
            {"joined_turns"},
        ),
        # What follows the last answer.
        ([user(), assistant(), user("R")], [user(), assistant()], {"cut_ends"}),
        ([user(), user("R"), assistant(), user("T")], [user("Q\n\nR"), assistant()], {"joined_turns", "cut_ends"}),
        # What precedes the first question.
        ([system(), assistant(), user(), assistant("B")], [system(), user(), assistant("B")], {"dropped_openings"}),
        ([assistant(), system(), user(), assistant("B")], [system(), user(), assistant("B")], {"dropped_openings"}),
        # Empty answers.
        (
            [user(), assistant("  \n"), user("R"), assistant("B")],
            [user(), assistant("  \n", weight=0), user("R"), assistant("B")],
            {"empty_answers"},
        ),
        ([user(), assistant(), user("R"), assistant("")], [user(), assistant()], {"empty_answers", "cut_ends"}),
        ([user(), assistant("")], [], {"empty_answers", "cut_ends"}),
        ([assistant()], [], {"dropped_openings"}),
        ([system(), assistant(), user()], [], {"dropped_openings", "cut_ends"}),
    ],
)
def test_what_is_changed(turns, expected, changes):
    assert read_example({"messages": turns}, "f:1") == Conversation(expected, None, frozenset(changes))


def test_results_of_several_calls_stay_apart():
    tool = {"role": "tool", "content": "R"}
    turns = [user(), assistant("", tool_calls=[call(), call("g")]), tool, tool, assistant()]
    assert read_example({"messages": turns}, "f:1") == Conversation(turns)


def test_pairs_and_prompts_are_changed_alike():
    turns = [assistant("Hello."), user(), user("R")]
    record = {"messages": turns, "chosen": [assistant(), assistant("B")], "rejected": "C"}
    pair = read_preference(record, "f:1")
    assert (pair.messages, pair.chosen) == ([user("Q\n\nR")], assistant("A\n\nB"))
    assert pair.changes == {"joined_turns", "dropped_openings"}
    assert read_prompt(record, "f:1")[0] == Conversation(pair.messages, None, pair.changes)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"instruction": "a"}, r"f\.json: record 3: field 'output' is missing; the record has \['instruction'\]"),
        ({"instruction": 3, "output": "b"}, "field 'instruction' is int"),
        ({"instruction": "a", "output": 0}, "field 'output' is int, not text"),
        ({"instruction": "a", "input": False, "output": "b"}, "field 'input' is bool, not text"),
        ({"instruction": "a", "output": "b", "system": ["S"]}, "field 'system' is list, not text"),
        ({"prompt": "a"}, r"need 'instruction' and 'output', 'messages', or 'conversations'.*\['prompt'\]"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 1 needs 'role' .* in 'from' and 'value'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ({"messages": []}, "non-empty list"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1 needs 'role'"),
        ({"instruction": "a", "output": "b", "history": [["only one"]]}, "history"),
        ({"instruction": "a", "output": "b", "history": 5}, "'history' needs .* got 5"),
        (
            {"messages": [user(), assistant(weight=0), assistant()]},
            "of two neighbouring turns of the assistant only one",
        ),
    ],
)
def test_bad_records_are_named(record, words):
    with pytest.raises(InputError, match=words):
        read_example(record, "f.json: record 3")
