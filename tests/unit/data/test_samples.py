"""utils.data.samples: conversations -> ids with what is trained marked; truncation, counters, cache."""

import json
import random
import re

import pytest

from utils.core.errors import InputError
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


@pytest.mark.parametrize("num_workers", [1, 2])
def test_samples_are_those_of_a_plain_loop(tmp_path, monkeypatch, tokenizer, num_workers):
    monkeypatch.setattr(cache, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(cache, "RECORDS_PER_UNIT", 3)
    records = make_records(0, 20)
    paths = [write_records(tmp_path / "a.jsonl", records[:10]), tmp_path / "b.json"]
    paths[1].write_text(json.dumps(records[10:], indent=1))
    file = load_sft_samples(paths, tokenizer, TEMPLATE, 1000, CacheSettings(tmp_path / "c", num_workers=num_workers))
    expected = [
        prompts.encode_conversation(conversations.read_conversation(record, ""), TEMPLATE, tokenizer)
        for record in records
    ]
    assert read_back(file) == expected
    labels = [label for _, sample_labels in expected for label in sample_labels if label != IGNORE_INDEX]
    assert file.counters == {
        "samples": 20,
        "truncated": 0,
        "dropped_no_label": 0,
        "skipped_bad_text": 0,
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
    full = prompts.encode_conversation(conversations.read_conversation(records[1], ""), TEMPLATE, tokenizer)
    ids, labels = read_back(file)[1]
    assert len(ids) == 40
    assert (ids[:-1], labels[:-1]) == (full[0][:39], full[1][:39])
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert "2 of 3 samples are longer than max_seq_length 40" in caplog.text
    assert "1 of 3 samples dropped" in caplog.text


def test_all_labels_masked_is_an_error(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.jsonl", [{"instruction": "the cat " * 50, "output": "dog"}] * 3)
    with pytest.raises(InputError, match="all labels are masked: of 3 samples 3 were longer than --max_seq_length 20"):
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


def test_bad_text_is_skipped_and_counted(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"instruction": "a", "output": "b"}\n{"instruction": "\xff", "output": "b"}\n')
    with pytest.raises(InputError, match=re.escape(f"{path}:2: invalid UTF-8")):
        load_sft_samples([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c"))
    file = load_sft_samples([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c", on_bad_text="skip"))
    assert (file.num_samples, file.skipped, file.counters["skipped_bad_text"]) == (1, 1, 1)


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
