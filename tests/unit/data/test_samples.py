"""utils.data.samples: conversations -> ids with what is trained marked; truncation, counters, cache."""

import itertools
import json
import random
import re

import pytest

from utils.core.errors import InputError
from utils.core.records import iter_records
from utils.data import cache
from utils.data.cache import CacheSettings
from utils.data.samples import load_sft_samples, truncate_sample
from utils.text import conversations, prompts
from utils.text.prompts import IGNORE_INDEX
from utils.text.tokenizer import load_tokenizer

TEMPLATE = prompts.CHAT_TEMPLATES["mixtral"]


@pytest.fixture(scope="module")
def tokenizer(extended_tokenizer_folder):
    return load_tokenizer(extended_tokenizer_folder)


def u(text):
    return {"role": "user", "content": text}


def w(text, **more):
    return {"role": "assistant", "content": text, **more}


def make_records(seed: int, count: int) -> list[dict]:
    rng = random.Random(seed)
    words = ["the", "cat", "猫狗", "的", "zebra", "<s>", "[INST]", "é"]

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 12)))

    records = []
    for number in range(count):
        if number % 2:
            turns = [{"role": role, "content": text()} for _ in range(2) for role in ("user", "assistant")]
            records.append({"messages": turns})
        else:
            records.append({"instruction": text(), "input": "", "output": text()})
    return records


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_back(file) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every sample."""
    result, start = [], 0
    for end in file.document_ends.tolist():
        ids = file.tokens[start:end].tolist()
        trained = file.trained[start:end].tolist()
        result.append((ids, [i if flag else IGNORE_INDEX for i, flag in zip(ids, trained, strict=True)]))
        start = end
    return result


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_samples_are_those_of_a_plain_loop(tmp_path, monkeypatch, tokenizer, num_workers):
    monkeypatch.setattr(cache, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(cache, "RECORDS_PER_UNIT", 3)
    records = make_records(0, 20)
    paths = [write_records(tmp_path / "a.jsonl", records[:10]), tmp_path / "b.json"]
    paths[1].write_text(json.dumps(records[10:], indent=1))
    file = load_sft_samples(paths, tokenizer, TEMPLATE, 1000, CacheSettings(tmp_path / "c", num_workers=num_workers))
    expected = [
        prompts.encode_conversation(conversations.read_example(record, "").messages, TEMPLATE, tokenizer)
        for record in records
    ]
    assert read_back(file) == expected
    labels = [label for _, sample_labels in expected for label in sample_labels if label != IGNORE_INDEX]
    assert file.counters == {
        "samples": 20,
        "truncated": 0,
        "dropped_no_answer": 0,
        "dropped_no_label": 0,
        **dict.fromkeys(conversations.CHANGES, 0),
        "skipped_bad_records": 0,
        "tokens": sum(len(ids) for ids, _ in expected),
        "label_tokens": len(labels),
    }


def marks(text: str) -> list[bool]:
    return [character == "T" for character in text]


@pytest.mark.parametrize(
    ("trained", "length", "ids", "flags"),
    [
        ("..TTTT", 4, [0, 1, 2, 5], "..TT"),  # cut within the answer: its end token takes the last place
        ("..TTT...TT", 4, [0, 1, 2, 4], "..TT"),  # the end of that answer, not of the last one
        ("..TTT...TT", 5, [0, 1, 2, 3, 4], "..TTT"),  # cut just after its end
        ("..TTT...TT", 7, [0, 1, 2, 3, 4, 5, 6], "..TTT.."),  # within a question: no end token there
        ("..TTT...TT", 9, [0, 1, 2, 3, 4, 5, 6, 7, 8], "..TTT...."),  # one place for the second answer: see below
        ("....TT", 3, [0, 1, 2], "..."),  # the question alone fills the row
        ("....TTT", 5, [0, 1, 2, 3, 4], "....."),  # nothing but the end would be left
    ],
)
def test_truncation_keeps_the_end_token(trained, length, ids, flags):
    if flags == "..TTT....":
        flags, ids = "..TTT...T", [*ids[:-1], 9]
    count = len(trained)
    assert truncate_sample(list(range(count)), marks(trained), length, range(count)) == (ids, marks(flags))


def test_an_answer_that_ends_in_text_is_cut_only():
    assert truncate_sample([7, 8, 3, 4, 5, 6], marks("..TTTT"), 4, [2]) == ([7, 8, 3, 4], marks("..TT"))


def test_long_samples_are_cut_counted_and_dropped(tmp_path, tokenizer, caplog):
    records = [
        {"instruction": "cat", "output": "dog"},
        {"instruction": "cat", "output": "the cat " * 50},
        {"instruction": "the cat " * 50, "output": "dog"},
    ]
    path = write_records(tmp_path / "a.jsonl", records)
    file = load_sft_samples([path], tokenizer, TEMPLATE, 40, CacheSettings(tmp_path / "c"))
    assert (file.counters["samples"], file.counters["truncated"], file.counters["dropped_no_label"]) == (2, 2, 1)
    full = prompts.encode_conversation(conversations.read_example(records[1], "").messages, TEMPLATE, tokenizer)
    ids, labels = read_back(file)[1]
    assert len(ids) == 40
    assert (ids[:-1], labels[:-1]) == (full[0][:39], full[1][:39])
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert "of 3 samples 1 have no answer token left to learn from and are dropped, 2 are longer than" in caplog.text


def test_all_labels_masked_is_an_error(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.jsonl", [{"instruction": "the cat " * 50, "output": "dog"}] * 3)
    with pytest.raises(
        InputError, match="all labels are masked: of 3 samples 3 were longer than --max_seq_length 20, and 3 have"
    ):
        load_sft_samples([path], tokenizer, TEMPLATE, 20, CacheSettings(tmp_path / "c"))
    assert not [item for item in (tmp_path / "c").iterdir() if item.suffix not in (".lock", ".json")]


def test_bad_records_are_named(tmp_path, tokenizer):
    path = write_records(
        tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a", "answer": "b"}]
    )
    with pytest.raises(InputError, match=re.escape(f"{path}:2: field 'output' is missing; the record has")):
        load_sft_samples([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c"))
    with pytest.raises(InputError, match="no text in"):
        load_sft_samples(
            [write_records(tmp_path / "e.jsonl", [])], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c")
        )


def test_bad_records_are_skipped_and_counted(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"instruction": "a", "output": "b"}\n{"instruction": "\xff", "output": "b"}\n')
    with pytest.raises(InputError, match=re.escape(f"{path}:2: invalid UTF-8")):
        load_sft_samples([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c"))
    file = load_sft_samples([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c", on_bad_record="skip"))
    assert (file.num_samples, file.skipped, file.counters["skipped_bad_records"]) == (1, 1, 1)


# Each record, and its text with what is trained between marks, written out by hand in mixtral's form.
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = json.dumps([{"name": "f"}])
MARKED = [
    (
        {"messages": [u("a"), w("b", weight=0), u("c"), w("d")]},
        "<s>[INST] a [/INST] b</s><s>[INST] c [/INST]⟦ d</s>⟧",
    ),
    ({"messages": [u("a"), u("b"), w("c"), w("d"), u("e")]}, "<s>[INST] a\n\nb [/INST]⟦ c\n\nd</s>⟧"),
    ({"messages": [w("hi"), u("a"), w("b")], "system": "s"}, "<s>[INST] s\n\na [/INST]⟦ b</s>⟧"),
    ({"messages": [u("a"), w(" "), u("c"), w("d")]}, "<s>[INST] a [/INST]  </s><s>[INST] c [/INST]⟦ d</s>⟧"),
    (
        {"messages": [{"role": "system", "content": "t"}, u("a"), w("b")], "system": "s", "tools": TOOLS},
        '<s>[INST] s\n\nt\n\n[{"name": "f"}]\n\na [/INST]⟦ b</s>⟧',
    ),
    (
        {"messages": [u("a"), w(None, tool_calls=[CALL]), {"role": "tool", "content": "r"}, w("b")]},
        '<s>[INST] a [/INST]⟦ {"name": "f", "arguments": {"x": 1}}</s>⟧<s>[INST] r [/INST]⟦ b</s>⟧',
    ),
]


@pytest.mark.parametrize(("record", "marked"), MARKED)
def test_what_is_trained_of_a_conversation(tmp_path, tokenizer, record, marked):
    file = load_sft_samples(
        [write_records(tmp_path / "a.jsonl", [record])], tokenizer, TEMPLATE, 500, CacheSettings(tmp_path / "c")
    )
    [(ids, labels)] = read_back(file)
    pieces = []
    for trained, group in itertools.groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORE_INDEX):
        text = "".join(tokenizer.convert_ids_to_tokens([index for index, _ in group])).replace("▁", " ")
        pieces.append(f"⟦{text}⟧" if trained else text)
    text = "".join(pieces).replace("<s> ", "<s>")  # the tokenizer puts a space before what follows a special token
    assert re.sub(r"<0x([0-9A-F]{2})>", lambda match: chr(int(match[1], 16)), text) == marked


def test_what_is_changed_and_dropped_is_counted_and_said(tmp_path, tokenizer, caplog):
    records = [record for record, _ in MARKED] + [
        {"instruction": "a", "output": ""},
        {"instruction": "a", "output": " \n"},
        {"messages": [w("hi")]},
        {"messages": [u("a"), w("b", weight=0)]},
    ]
    path = write_records(tmp_path / "a.jsonl", records)
    for _ in range(2):  # a cache that is there says the same
        caplog.clear()
        file = load_sft_samples([path], tokenizer, TEMPLATE, 500, CacheSettings(tmp_path / "c"))
        counts = {name: file.counters[name] for name in ("samples", "dropped_no_answer", "dropped_no_label")}
        assert counts == {"samples": 6, "dropped_no_answer": 3, "dropped_no_label": 1}
        changes = {name: file.counters[name] for name in conversations.CHANGES}
        assert changes == {"joined_turns": 1, "dropped_openings": 1, "empty_answers": 1, "cut_ends": 1}
        assert "of 10 samples 3 have no answer but empty ones and are dropped, 1 have no answer token" in caplog.text
        assert "1 have neighbouring turns of one speaker" in caplog.text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
            "{{ m['content'] }}{% endfor %}",
            "roles must alternate",
        ),
        ("{% for m in [messages[0], messages[-1]] %}{{ m['content'] }}{% endfor %}", "leaves out"),
    ],
)
def test_errors_of_a_template_name_the_record(tmp_path, tokenizer, template, words):
    turns = [u("a"), w("b"), u("c"), w("d")]
    path = write_records(tmp_path / "a.jsonl", [{"messages": turns}])
    with pytest.raises(InputError, match=re.escape(f"{path}:1: the chat template") + f".*{words}"):
        load_sft_samples([path], tokenizer, template, 500, CacheSettings(tmp_path / "c"))


def test_records_that_cannot_be_used_are_skipped_and_counted(tmp_path, tokenizer, caplog):
    records = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "answer": "b"},
        {"messages": [u("a")]},
        {"messages": [u("a"), w("b", weight=0.5)]},
    ]
    path = write_records(tmp_path / "a.jsonl", records)
    file = load_sft_samples([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c", on_bad_record="skip"))
    assert (file.num_samples, file.counters["skipped_bad_records"]) == (1, 3)
    assert f"skipped 3 bad records, the first: {path}:2: field 'output' is missing" in caplog.text
    caplog.clear()
    load_sft_samples([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c", on_bad_record="skip"))
    assert "skipped 3 bad records" in caplog.text  # of the cache that was there
    with pytest.raises(InputError, match="skipped 3 bad records"):
        load_sft_samples(
            [write_records(tmp_path / "b.jsonl", records[1:])], tokenizer, TEMPLATE, 100,
            CacheSettings(tmp_path / "c", on_bad_record="skip"),
        )  # fmt: skip


@pytest.mark.shared_data
def test_shared_conversations_are_all_read(shared_data):
    counts = {}
    for path in sorted((shared_data / "sft").iterdir()):
        examples = [conversations.read_example(record, location) for location, record in iter_records(path)]
        calls = sum(len(message.get("tool_calls", ())) for example in examples for message in example.messages)
        dropped = sum(not example.messages for example in examples)
        counts[path.stem] = (len(examples), dropped, sum(bool(example.tools) for example in examples), calls)
        assert not any(example.changes for example in examples if example.messages)
    assert counts == {
        "alpaca_en_demo": (999, 0, 0, 0),
        "alpaca_zh_10k": (10021, 6, 0, 0),
        "alpaca_zh_demo": (1000, 0, 0, 0),
        "ruozhiba_2449": (2449, 0, 0, 0),
        "sharegpt_toolcall_zh_demo": (300, 0, 200, 216),
    }


def test_the_key_is_content_template_and_settings(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.jsonl", make_records(1, 6))
    folders = [
        load_sft_samples([path], tokenizer, template, length, CacheSettings(tmp_path / "c"), max_samples=most).folder
        for template, length, most in [
            (TEMPLATE, 1000, None),
            (TEMPLATE, 1000, None),
            (prompts.CHAT_TEMPLATES["alpaca"], 1000, None),
            (TEMPLATE, 1001, None),
            (TEMPLATE, 1000, 4),
        ]
    ]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 4
    assert (
        load_sft_samples([path], tokenizer, TEMPLATE, 1000, CacheSettings(tmp_path / "c"), max_samples=4).num_samples
        == 4
    )
