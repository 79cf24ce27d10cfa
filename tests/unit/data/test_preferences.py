"""utils.data.preferences: every record format, ids equal to those of prompts, cuts, drops, statistics, batches."""

import json
import logging
import pickle
import random

import numpy as np
import pytest

from support.tokenizers import CHATML
from utils.core.errors import InputError
from utils.core.records import iter_records
from utils.data import cache
from utils.data.cache import CacheSettings
from utils.data.corpora import split_documents
from utils.data.preferences import encode_answers, load_preferences, load_prompts
from utils.text import prompts
from utils.text.conversations import Preference, read_preference, read_prompt
from utils.text.prompts import CHAT_TEMPLATES, encode_conversation, encode_prompt
from utils.text.tokenizer import load_tokenizer

TEMPLATE = CHAT_TEMPLATES["mixtral"]


@pytest.fixture(scope="module")
def tokenizer(extended_tokenizer_folder):
    return load_tokenizer(extended_tokenizer_folder)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "S"}
CHAT = [SYSTEM, user("Q1"), assistant("A1"), user("Q2\nX")]
SHAREGPT = [{"from": role, "value": text} for role, text in [("human", "Q1"), ("gpt", "A1"), ("human", "Q2\nX")]]
GOOD, BAD = [assistant("good")], [assistant("bad")]
TEXTS = {"chosen": "good", "rejected": "bad"}
MULTI_TURN = {
    "instruction": {"instruction": "Q2", "input": "X", "system": "S", "history": [["Q1", "A1"]], **TEXTS},
    "sharegpt, text": {"system": "S", "conversations": SHAREGPT, **TEXTS},
    "sharegpt, turns": {
        "conversations": [{"from": "system", "value": "S"}, *SHAREGPT],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "sharegpt, other turns": {"system": "S", "conversations": SHAREGPT, "chosen": GOOD[0], "rejected": BAD[0]},
    "messages": {"messages": CHAT, "chosen": GOOD, "rejected": BAD},
    "prompt of turns": {"prompt": CHAT, "chosen": GOOD, "rejected": BAD},
    "prompt of turns, texts": {"prompt": CHAT, **TEXTS},
    "prompt inside too": {"prompt": CHAT, "chosen": CHAT + GOOD, "rejected": CHAT + BAD},
    "prompt inside alone": {"chosen": CHAT + GOOD, "rejected": CHAT + BAD},
    "last question as text": {
        "prompt": "Q2\nX",
        "chosen": CHAT + GOOD,
        "rejected": CHAT + BAD,
        "messages": CHAT + GOOD,
    },
    "turns go on together": {"prompt": CHAT[:2], "chosen": CHAT[2:] + GOOD, "rejected": CHAT[2:] + BAD},
    "dialogue": {"system": "S", "prompt": "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\nX\n\nAssistant:", **TEXTS},
    "dialogue inside": {
        "system": "S",
        "chosen": "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\nX\n\nAssistant: good",
        "rejected": "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\nX\n\nAssistant: bad",
    },
}


@pytest.mark.parametrize("name", MULTI_TURN)
def test_every_format_gives_the_same_pair_and_prompt(name):
    record = MULTI_TURN[name]
    before = json.dumps(record)
    assert read_preference(record, "f:1") == Preference(CHAT, assistant("good"), assistant("bad"))
    expected = CHAT[:2] if name == "turns go on together" else CHAT
    if name == "last question as text":
        expected = CHAT[-1:]  # a prompt record has nothing but its prompt
    assert read_prompt(record, "f:1")[0].messages == expected
    assert json.dumps(record) == before


def test_one_turn_margin_and_source():
    record = {"prompt": "Q", **TEXTS, "margin": 2, "source": "web", "score": 7}
    assert read_preference(record, "f:1") == Preference([user("Q")], assistant("good"), assistant("bad"), 2.0, "web")
    record = {"instruction": "Q", "input": "", "output": None, "conversations": None, "margin": None, **TEXTS}
    assert read_preference(record, "f:1") == Preference([user("Q")], assistant("good"), assistant("bad"))


def test_deepspeed_chats_marks_are_turns_and_other_text_is_not():
    pair = read_preference(
        {"prompt": "Human: I have a question. Assistant:", "chosen": " Yes.", "rejected": "No."}, ""
    )
    assert pair == Preference([user("I have a question.")], assistant("Yes."), assistant("No."))
    pair = read_preference({"prompt": "Human: what does Human: mean? Assistant:", **TEXTS}, "")
    assert pair.messages == [user("what does Human: mean?")]
    for text in ("Human: are you one?", "What does Human: mean? Assistant:", "Say\nHuman: hi\nAssistant:"):
        pair = read_preference({"prompt": text, "chosen": " Yes.", "rejected": "No."}, "")
        assert pair == Preference([user(text)], assistant(" Yes."), assistant("No."))


def test_observations_and_tools_are_kept():
    turns = [("human", "Q"), ("function_call", "{}"), ("observation", "R")]
    tools = [{"name": "f", "parameters": {}}]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": tools, **TEXTS}
    pair = read_preference(record, "f:1")
    assert [message["role"] for message in pair.messages] == ["user", "assistant", "tool"]
    assert pair.tools == tools


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "Q", "chosen": "a"}, r"f\.json:3: need 'chosen' and 'rejected'.*\['chosen', 'prompt'\]"),
        ({"prompt": "Q", "chosen": "a", "rejected": None}, "need 'chosen' and 'rejected'"),
        ({"question": "Q", **TEXTS}, r"f\.json:3: .*needs a question.*\['chosen', 'question', 'rejected'\]"),
        ({"question": "Q", "chosen": GOOD[0], "rejected": BAD[0]}, "in one of prompt, messages"),
        ({"chosen": GOOD, "rejected": BAD}, "needs a question before it"),
        ({"prompt": "Q", "chosen": 3, "rejected": "b"}, "non-empty list of turns, got 3"),
        ({"prompt": 3, **TEXTS}, r"f\.json:3: prompt: need a non-empty list"),
        ({"prompt": [], **TEXTS}, "non-empty list"),
        ({"prompt": "Q", "chosen": [], "rejected": BAD}, r"f\.json:3: chosen: need a non-empty list"),
        (
            {"prompt": "Q", "chosen": [{"role": "alien", "content": "x"}], "rejected": BAD},
            "chosen: turn 1 needs 'role'",
        ),
        ({"conversations": [{"from": "human"}], **TEXTS}, "conversations: turn 1 needs"),
        ({"prompt": [user("Q")], "chosen": [user("R"), *GOOD], "rejected": BAD}, "'chosen' neither go on .* nor hold"),
        (
            {"prompt": [user("Q")], "chosen": [user("Q")], "rejected": BAD},
            "'chosen' needs a question before it and an",
        ),
        ({"chosen": [user("Q"), *GOOD], "rejected": [user("R"), *BAD]}, "answer different conversations"),
        ({"messages": [user("Q"), *GOOD], **TEXTS}, r"question for the assistant.*\['user', 'assistant'\]"),
        ({"prompt": [SYSTEM], **TEXTS}, "question for the assistant"),
        ({"prompt": "Q", **TEXTS, "margin": "2"}, "field 'margin' needs a number, got '2'"),
        ({"prompt": "Q", **TEXTS, "margin": True}, "field 'margin' needs a number"),
        ({"prompt": "Q", **TEXTS, "margin": float("nan")}, "field 'margin' is nan"),
        ({"prompt": "Q", **TEXTS, "source": 3}, "field 'source' needs text, got 3"),
        ({"instruction": 3, **TEXTS}, r"f\.json:3: field 'instruction' is int"),
    ],
)
def test_bad_pairs_are_named(record, words):
    with pytest.raises(InputError, match=words):
        read_preference(record, "f.json:3")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Q"}, [user("Q")]),
        ({"prompt": "Q", "system": "S"}, [SYSTEM, user("Q")]),
        ({"prompt": [user("Q"), *GOOD]}, [user("Q")]),
        ({"instruction": "Q2", "input": "X", "history": [["Q1", "A1"]], "system": "S", "output": "O"}, CHAT),
        ({"instruction": "Q"}, [user("Q")]),
        ({"messages": [*CHAT, *GOOD]}, CHAT),
        ({"messages": [*CHAT, *GOOD, *BAD]}, CHAT),
        ({"conversations": [*SHAREGPT, {"from": "gpt", "value": "A"}]}, CHAT[1:]),
    ],
)
def test_prompts_end_with_the_question(record, expected):
    assert read_prompt(record, "f:1")[0].messages == expected


@pytest.mark.parametrize("record", [{"text": "Q"}, {"messages": GOOD}, {"prompt": [SYSTEM]}])
def test_records_without_a_question_are_named(record):
    with pytest.raises(InputError, match=r"f\.json:3: need a question.*the record has"):
        read_prompt(record, "f.json:3")


# ---------------------------------------------------------------- ids


def make_tokenizer(folder, template):
    """(tokenizer, template text); "chatml" stands for a tokenizer with special tokens and a template of its own."""
    tokenizer = load_tokenizer(folder)
    if template != "chatml":
        return tokenizer, CHAT_TEMPLATES[template]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer, CHATML


@pytest.mark.parametrize("folder", ["base_tokenizer_folder", "extended_tokenizer_folder"])
@pytest.mark.parametrize("name", [*CHAT_TEMPLATES, "chatml"])
def test_ids_are_those_of_tuning_and_inference(tmp_path, request, folder, name):
    tokenizer, template = make_tokenizer(request.getfixturevalue(folder), name)
    chats = [[user("a cat 猫狗")], [user("Q"), assistant("A </s>"), user("zebra?")]]
    records = [{"prompt": chat, "chosen": " 猫狗 <s> é", "rejected": "No\n, the"} for chat in chats]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    file = load_preferences([tmp_path / "a.jsonl"], tokenizer, template, 1000, CacheSettings(tmp_path / "c"))
    stops = prompts.stop_token_ids(template, tokenizer)
    assert len(file) == 2
    for pair, chat, record in zip(file, chats, records, strict=True):
        assert pair.prompt.dtype == np.int64
        assert pair.prompt.tolist() == encode_prompt(chat, template, tokenizer)
        for ids, text in ((pair.chosen, record["chosen"]), (pair.rejected, record["rejected"])):
            earlier = [{**message, "weight": 0} for message in chat]  # a pair trains its last answers alone
            whole, labels = encode_conversation([*earlier, assistant(text)], template, tokenizer)
            joint = [*pair.prompt.tolist(), *ids.tolist()]
            after = whole[len(joint) :]  # chatml writes a line break after the end token, which no answer needs
            assert whole == joint + after and len(after) <= (name == "chatml") * 3
            assert ids[-1] in stops
            assert labels[len(pair.prompt) : len(joint)] == ids.tolist()
            assert set(labels[len(joint) :]) <= {prompts.IGNORE_INDEX}


def test_a_template_with_another_generation_prompt_is_refused(tmp_path, tokenizer):
    template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    with pytest.raises(InputError, match="one way before an answer"):
        encode_answers([user("Q")], ["A"], template, tokenizer)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Q", **TEXTS}))
    with pytest.raises(InputError, match=r"a\.jsonl:1: the chat template"):
        load_preferences([tmp_path / "a.jsonl"], tokenizer, template, 100, CacheSettings(tmp_path / "c"))


# ---------------------------------------------------------------- files


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def make_pairs(seed, count):
    rng = random.Random(seed)
    words = ["the", "cat", "猫狗", "的", "zebra", "<s>", "é"]

    def text():
        return " ".join(rng.choices(words, k=rng.randint(1, 12)))

    return [
        {
            "prompt": text(),
            "chosen": text() + " a",
            "rejected": text() + " b",
            "margin": number / 2,
            "source": "xy"[number % 2],
        }
        for number in range(count)
    ]


def read_back(file):
    return [
        (pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist(), *pair.truncated, pair.margin, pair.source)
        for pair in (file[index] for index in range(len(file)))
    ]


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_files_hold_what_a_plain_loop_reads(tmp_path, monkeypatch, tokenizer, num_workers):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(cache, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(cache, "RECORDS_PER_UNIT", 3)
    records = make_pairs(0, 20)
    del records[0]["margin"], records[4]["source"], records[5]["margin"]
    (tmp_path / "b.json").write_text(json.dumps(records[6:13], indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[13:]), tmp_path / "c.parquet")
    paths = [write(tmp_path / "a.jsonl", records[:6]), tmp_path / "b.json", tmp_path / "c.parquet"]
    settings = CacheSettings(tmp_path / "cache", num_workers=num_workers)
    file = load_preferences(paths, tokenizer, TEMPLATE, 1000, settings)
    expected = []
    for record in records:
        texts = [record["chosen"], record["rejected"]]
        prompt, (chosen, rejected) = encode_answers([user(record["prompt"])], texts, TEMPLATE, tokenizer)
        expected.append((prompt, chosen, rejected, False, False, record.get("margin"), record.get("source", "a")))
    assert read_back(file) == expected
    assert read_back(pickle.loads(pickle.dumps(file))) == expected
    assert file.lengths.tolist() == [[len(p), len(c), len(r)] for p, c, r, *_ in expected]
    with pytest.raises(IndexError):
        file[20]


def test_the_cache_is_used_until_something_changes(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", make_pairs(1, 5))
    first = load_preferences([path], tokenizer, TEMPLATE, 1000, CacheSettings(tmp_path / "c"))
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    again = load_preferences([path], tokenizer, TEMPLATE, 1000, CacheSettings(tmp_path / "c"))
    assert again.folder == first.folder and (again.folder / "meta.json").stat().st_mtime_ns == stamp
    others = [
        load_preferences([path], tokenizer, TEMPLATE, 999, CacheSettings(tmp_path / "c")),
        load_preferences([path], tokenizer, CHAT_TEMPLATES["alpaca-2"], 1000, CacheSettings(tmp_path / "c")),
        load_preferences([path], tokenizer, TEMPLATE, 1000, CacheSettings(tmp_path / "c"), max_samples=3),
        load_prompts([path], tokenizer, TEMPLATE, 1000, CacheSettings(tmp_path / "c")),
    ]
    assert len({file.folder for file in [first, *others]}) == 5
    assert [len(file) for file in others] == [5, 5, 3, 5]


def test_equal_prompts_are_held_out_together(tmp_path, tokenizer):
    pairs = [{"prompt": f"Q{n % 10}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    path = write(tmp_path / "a.jsonl", pairs)
    file = load_preferences([path], tokenizer, TEMPLATE, 1000, CacheSettings(tmp_path / "c"))
    training, held_out = (
        {tuple(file[i].prompt.tolist()) for i in ids.tolist()} for ids in split_documents(file, 0.4, seed=3)
    )
    assert training and held_out and not training & held_out and len(training | held_out) == 10
    prompt_file = load_prompts([path], tokenizer, TEMPLATE, 1000, CacheSettings(tmp_path / "c"))
    assert prompt_file.document_hashes.tolist() == file.document_hashes.tolist()


def test_long_answers_are_cut_without_an_end_token(tmp_path, tokenizer, caplog):
    long = "the cat " * 50
    pairs = [
        {"prompt": "Q", "chosen": long, "rejected": "no"},
        {"prompt": "Q", "chosen": "yes", "rejected": long},
        {"prompt": "Q", "chosen": long + "a", "rejected": long + "b"},  # equal where they are cut
        {"prompt": long, "chosen": "a", "rejected": "b"},
    ]
    path = write(tmp_path / "a.jsonl", pairs)
    file = load_preferences([path], tokenizer, TEMPLATE, 40, CacheSettings(tmp_path / "c"))
    whole, _ = encode_conversation([user("Q"), assistant(long)], TEMPLATE, tokenizer)
    first, second = file[0], file[1]
    assert [*first.prompt.tolist(), *first.chosen.tolist()] == whole[:40]
    assert first.chosen[-1] != tokenizer.eos_token_id == first.rejected[-1]
    assert second.rejected.tolist() == first.chosen.tolist()
    assert (first.truncated, second.truncated) == ((True, False), (False, True))
    assert len(file) == 2
    statistics = file.statistics()
    assert statistics["dropped"] == {"empty_prompt": 0, "empty_answer": 0, "long_prompt": 1, "identical": 1}
    assert statistics["truncated"] == {"chosen": 1, "rejected": 1}
    assert "cut at the right, no end token: 1 chosen and 1 rejected of 2" in caplog.text


def test_the_window_is_used_to_the_last_token(tmp_path, tokenizer):
    prompt, (chosen,) = encode_answers([user("Q")], ["the cat sees"], TEMPLATE, tokenizer)
    path = write(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "the cat sees", "rejected": "b"}])
    exact, short = (
        load_preferences([path], tokenizer, TEMPLATE, len(prompt) + len(chosen) - less, CacheSettings(tmp_path / "c"))
        for less in (0, 1)
    )
    assert (exact[0].chosen.tolist(), exact[0].truncated[0]) == (chosen, False)
    assert (short[0].chosen.tolist(), short[0].truncated[0]) == (chosen[:-1], True)
    load_preferences([path], tokenizer, TEMPLATE, len(prompt) + 2, CacheSettings(tmp_path / "c"))
    with pytest.raises(InputError, match="1 with a prompt that fills the window"):
        load_preferences([path], tokenizer, TEMPLATE, len(prompt) + 1, CacheSettings(tmp_path / "c"))
    assert len(load_prompts([path], tokenizer, TEMPLATE, len(prompt), CacheSettings(tmp_path / "c"))) == 1
    with pytest.raises(InputError, match="1 with a prompt that fills the window"):
        load_prompts([path], tokenizer, TEMPLATE, len(prompt) - 1, CacheSettings(tmp_path / "c"))


def test_drops_are_counted_and_warned_of(tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    pairs = make_pairs(2, 6)
    pairs += [{"prompt": "Q", "chosen": "same", "rejected": "same"}]
    pairs += [{"prompt": "Q", "chosen": " \n", "rejected": "b"}, {"prompt": "Q", "chosen": "a", "rejected": ""}]
    pairs += [{"prompt": " ", **TEXTS}]
    path = write(tmp_path / "a.jsonl", pairs)
    for share, level in ((0.4, "INFO"), (0.39, "WARNING")):  # the second finds the cache and warns all the same
        caplog.clear()
        file = load_preferences(
            [path], tokenizer, TEMPLATE, 500, CacheSettings(tmp_path / "c", max_dropped_share=share)
        )
        assert len(file) == 6
        assert file.counters == {
            **dict.fromkeys(("joined_turns", "dropped_openings"), 0),
            **{"records": 10, "empty_prompt": 1, "empty_answer": 2, "long_prompt": 0, "identical": 1},
            **{"answers_removed": 0, "truncated_chosen": 0, "truncated_rejected": 0},
        }
        (entry,) = (entry for entry in caplog.records if "dropped" in entry.message)
        assert entry.levelname == level and "4 of 10 records dropped: 1 with an empty question, 2" in entry.message


def test_nothing_left_is_an_error_and_leaves_no_cache(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "a"}])
    with pytest.raises(InputError, match=r"a\.jsonl: nothing is left of 1 records: 1 whose two answers"):
        load_preferences([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c"))
    path = write(tmp_path / "b.jsonl", [])
    for load in (load_preferences, load_prompts):
        with pytest.raises(InputError, match="no text in"):
            load([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c"))
    assert not [item for item in (tmp_path / "c").iterdir() if item.is_dir()]
    with pytest.raises(InputError, match="--max_seq_length 2"):
        load_preferences([path], tokenizer, TEMPLATE, 2, CacheSettings(tmp_path / "c"))
    with pytest.raises(InputError, match="--max_prompt_length 0"):
        load_prompts([path], tokenizer, TEMPLATE, 0, CacheSettings(tmp_path / "c"))


def test_broken_records_name_file_and_line(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [*make_pairs(3, 2), {"prompt": "Q", "chosen": "a"}])
    with pytest.raises(InputError, match=r"a\.jsonl:3: need 'chosen' and 'rejected'"):
        load_preferences([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c"))
    path.write_bytes(json.dumps(make_pairs(3, 1)[0]).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: invalid UTF-8"):
        load_preferences([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c"))
    file = load_preferences([path], tokenizer, TEMPLATE, 100, CacheSettings(tmp_path / "c", on_bad_record="skip"))
    assert (len(file), file.skipped, file.statistics()["skipped_bad_records"]) == (1, 1, 1)


def test_statistics_are_those_of_a_plain_count(tmp_path, tokenizer):
    records = make_pairs(4, 31)
    for record in records[::5]:
        record["rejected"] = record["chosen"][:-1] + "b"  # as long as the chosen one
    path = write(tmp_path / "a.jsonl", records)
    file = load_preferences([path], tokenizer, TEMPLATE, 1000, CacheSettings(tmp_path / "c"))
    statistics = file.statistics()
    pairs = [file[index] for index in range(31)]
    assert statistics["sources"] == {"x": 16, "y": 15}
    assert statistics["records"] == statistics["kept"] == 31
    lengths = sorted(len(pair.chosen) for pair in pairs)
    assert statistics["chosen"]["median"] == lengths[15]
    assert (statistics["chosen"]["min"], statistics["chosen"]["max"]) == (lengths[0], lengths[-1])
    assert statistics["chosen"]["p90"] == lengths[27] and statistics["chosen"]["mean"] == pytest.approx(
        sum(lengths) / 31
    )
    assert statistics["prompt"]["max"] == max(len(pair.prompt) for pair in pairs)
    assert statistics["rejected"]["max"] == max(len(pair.rejected) for pair in pairs)
    differences = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    assert statistics["chosen_longer"] == pytest.approx(sum(d > 0 for d in differences) / 31)
    assert 0 < statistics["chosen_longer"] < 1 and statistics["same_length"] >= 7 / 31
    assert statistics["same_length"] == pytest.approx(sum(d == 0 for d in differences) / 31)
    assert statistics["mean_length_difference"] == pytest.approx(sum(differences) / 31)
    of_x = [d > 0 for d, pair in zip(differences, pairs, strict=True) if pair.source == "x"]
    assert statistics["chosen_longer_by_source"]["x"] == pytest.approx(sum(of_x) / 16)
    json.dumps(statistics)


def test_prompt_files_drop_the_answers(tmp_path, tokenizer):
    records = [
        {"prompt": "the cat"},
        {"instruction": "Q", "output": "A"},
        {"messages": [user("Q"), *GOOD], "source": "m"},
    ]
    records += [{"prompt": " "}, {"prompt": "the cat " * 50}]
    path = write(tmp_path / "a.jsonl", records)
    file = load_prompts([path], tokenizer, TEMPLATE, 60, CacheSettings(tmp_path / "c"))
    expected = [encode_prompt([user(text)], TEMPLATE, tokenizer) for text in ("the cat", "Q", "Q")]
    assert [file[index].tolist() for index in range(len(file))] == expected
    statistics = file.statistics()
    assert statistics["answers_removed"] == 2 and statistics["sources"] == {"a": 2, "m": 1}
    assert statistics["dropped"] == {"empty_prompt": 1, "empty_answer": 0, "long_prompt": 1, "identical": 0}
    assert statistics["prompt"]["max"] == len(expected[0])


def test_pairs_that_cannot_be_used_are_skipped_and_counted(tmp_path, tokenizer, caplog):
    """hh-rlhf has some whose two dialogues differ before the last turn."""
    same, other = "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant:", "\n\nHuman: Q1\n\nAssistant:"
    records = [
        {"chosen": f"{same} good", "rejected": f"{same} bad"},
        {"chosen": f"{same} good", "rejected": f"{other} bad"},
        {"prompt": [user("a"), user("b")], "chosen": "good", "rejected": "bad"},
    ]
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(InputError, match=rf"{path}:2: .* different conversations.*pass --on_bad_record skip"):
        load_preferences([path], tokenizer, TEMPLATE, 60, CacheSettings(tmp_path / "c"))
    file = load_preferences([path], tokenizer, TEMPLATE, 60, CacheSettings(tmp_path / "c", on_bad_record="skip"))
    statistics = file.statistics()
    assert (statistics["records"], statistics["kept"], statistics["skipped_bad_records"]) == (2, 2, 1)
    assert statistics["changed"] == {"joined_turns": 1, "dropped_openings": 0}
    assert f"skipped 1 bad records, the first: {path}:2: 'chosen' and 'rejected' answer" in caplog.text
    assert "of 2 records 1 have neighbouring turns" in caplog.text


def test_answers_may_be_calls(tmp_path, tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    record = {
        "tools": json.dumps([{"name": "f"}]),
        "messages": [user("Q")],
        "chosen": {"role": "assistant", "content": None, "tool_calls": [call]},
        "rejected": {"from": "function_call", "value": '{"name": "g", "arguments": {}}'},
    }
    path = write(tmp_path / "a.jsonl", [record])
    [pair] = load_preferences([path], tokenizer, TEMPLATE, 200, CacheSettings(tmp_path / "c"))
    assert "[{" in tokenizer.decode(pair.prompt)
    for ids, text in ((pair.chosen, '{"name": "f", "arguments": {"x": 1}}'), (pair.rejected, '{"name": "g", "arg')):
        assert tokenizer.decode(ids).strip().startswith(text)


@pytest.mark.shared_data
def test_shared_preferences_are_all_read(tmp_path, shared_data):
    records = 0
    for path in sorted((shared_data / "preference").iterdir()):
        for location, record in iter_records(path):
            pair = read_preference(record, location)
            assert pair.messages[-1]["content"] == record["conversations"][-1]["value"]
            assert pair.chosen == assistant(record["chosen"]["value"])
            assert pair.rejected == assistant(record["rejected"]["value"])
            assert read_prompt(record, location)[0].messages == pair.messages
            records += 1
    assert records == 300
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "chinese_llama2_55296")
    files = [shared_data / "preference" / "dpo_zh_demo.json"]
    file = load_preferences(files, tokenizer, CHAT_TEMPLATES["alpaca-2"], 4096, CacheSettings(tmp_path, num_workers=1))
    statistics = file.statistics()
    assert statistics["records"] == 300 == len(file) + sum(statistics["dropped"].values())
    assert len(file) > 290
