"""questions: every layout of conversations, what is asked and what is the reference."""

import json

import pytest

from utils.core.errors import InputError
from utils.data.questions import read_question, read_questions

ASKED = [{"role": "user", "content": "1+1=?"}]


@pytest.mark.parametrize(
    ("record", "before"),
    [
        ({"instruction": "1+1=?", "output": "2"}, []),
        ({"instruction": "1+1=?", "input": "", "output": " 2\n", "id": 7}, []),
        ({"messages": [*ASKED, {"role": "assistant", "content": "2"}]}, []),
        ({"conversations": [{"from": "human", "value": "1+1=?"}, {"from": "gpt", "value": "2"}]}, []),
        (
            {"instruction": "1+1=?", "output": "2", "system": "s", "history": [["a", "b"]]},
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        (
            {
                "conversations": [
                    {"from": "gpt", "value": "The assistant's opening words are not asked."},
                    {"from": "human", "value": "1+1=?"},
                    {"from": "gpt", "value": "2", "weight": 0},
                ]
            },
            [],
        ),
    ],
)
def test_every_layout(record, before):
    found = read_question(record, "f:1")
    assert [(turn["role"], turn["content"]) for turn in found.messages] == [*before, ("user", "1+1=?")]
    assert (found.text, found.reference, found.location, found.record) == ("1+1=?", "2", "f:1", record)


def test_the_input_is_part_of_the_question():
    assert read_question({"instruction": "Add:", "input": "1, 1", "output": "2"}, "f:1").text == "Add:\n1, 1"


def test_a_reference_may_be_missing_where_none_is_needed():
    for record in ({"instruction": "q"}, {"instruction": "q", "output": " "}, {"messages": [*ASKED]}):
        assert read_question(record, "f:1", need_reference=False).reference is None
        with pytest.raises(InputError, match="f:1: no reference answer to compare with"):
            read_question(record, "f:1")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"instruction": " \n", "output": "a"}, "the question is empty"),
        ({"messages": [{"role": "system", "content": "s"}]}, "the question is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the question is empty"),
        ({"question": "q", "answer": "a"}, r"need 'instruction' .* the record has \['answer', 'question'\]"),
        ({"instruction": "q", "output": 2}, "field 'output' is int, not text"),
        ({"instruction": "q", "output": "a", "tools": '[{"name": "f"}]'}, "calls functions"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "calls functions"),
        ({"messages": [*ASKED, {"role": "tool", "content": "2"}]}, "calls functions"),
    ],
)
def test_what_is_no_question_is_named(record, words):
    with pytest.raises(InputError, match=f"^f:1.*{words}"):
        read_question(record, "f:1", need_reference=False)


def test_files_and_how_many(tmp_path):
    rows = [{"instruction": f"q{n}", "output": "a"} for n in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(rows[:2]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:]) + '{"instruction": 1}\n')
    assert [q.text for q in read_questions([str(tmp_path)], most=3)] == ["q0", "q1", "q2"]
    with pytest.raises(InputError, match=r"b\.jsonl:3: field 'instruction' is int"):
        read_questions([str(tmp_path)])
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(InputError, match=r"--questions .*none\.json: no question in it"):
        read_questions([str(tmp_path / "none.json")])
