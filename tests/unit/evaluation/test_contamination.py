"""contamination: planted questions are found, nothing else is, against a plain loop over lists of units."""

import itertools
import json
import random
import tracemalloc
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.core.errors import InputError
from utils.evaluation import contamination, rolling_hash
from utils.evaluation.contamination import find_contaminated
from utils.evaluation.rolling_hash import cut_units, fold

CHINESE = "下列关于光合作用的说法中，哪一项是正确的？它只在夜间进行，需要叶绿素和二氧化碳"
ENGLISH = "Which of these planets is known for the large rings of ice and rock that circle around it: Saturn or Mars?"
LONG = {"CHINESE": CHINESE, "ENGLISH": ENGLISH}


# ---------------------------------------------------------------- the plain way


def is_single(letter):
    name = unicodedata.name(letter, "")
    return name.startswith(("CJK UNIFIED", "HIRAGANA", "KATAKANA", "HANGUL SYLLABLE", "THAI"))


def plain_units(text):
    """[(unit, place of its first character in the folded text)]."""
    text = fold(text)
    units, word = [], None
    for place, letter in enumerate(text):
        if unicodedata.category(letter)[0] not in "LNM":
            word = None
        elif is_single(letter):
            units.append((letter, place))
            word = None
        elif word is None:
            units.append((letter, place))
            word = len(units) - 1
        else:
            units[word] = (units[word][0] + letter, units[word][1])
    return units


def plain_overlap(question, documents, num_words, num_characters):
    """(share of the question covered, {(document, line where it starts, units)} of its shared stretches, too short).

    A document is (its name, its text). Every pair of beginnings is tried and followed as far as units agree.
    """
    ours = [unit for unit, _ in plain_units(question)]
    singles = sum(len(unit) == 1 and is_single(unit) for unit in ours)
    least, wanted = (12, num_characters) if 2 * singles > len(ours) else (8, num_words)
    if len(ours) < least:
        return 0.0, set(), True
    wanted = min(wanted, len(ours))
    covered, found = set(), set()
    for name, text in documents:
        folded, theirs = fold(text), plain_units(text)
        for i, j in itertools.product(range(len(ours)), range(len(theirs))):
            if ours[i] != theirs[j][0] or (i and j and ours[i - 1] == theirs[j - 1][0]):
                continue
            size = 0
            while i + size < len(ours) and j + size < len(theirs) and ours[i + size] == theirs[j + size][0]:
                size += 1
            if size >= wanted:
                covered |= set(range(i, i + size))
                found.add((name, folded[: theirs[j][1]].count("\n") + 1, size))
    return len(covered) / len(ours), found, False


def random_text(rng, size, alphabet):
    return "".join(rng.choice(alphabet) for _ in range(size))


@pytest.mark.parametrize("seed", range(6))
def test_random_texts_against_a_plain_loop(seed, tmp_path, monkeypatch):
    """Few different units, so that stretches repeat and overlap; small blocks, so that they are cut."""
    rng = random.Random(seed)
    alphabet = ["天", "地", "人", "a", "b ", "Ａ", "，", "\n", " ", "é", "e\u0301", "ﬁ", "㎡", "1", "\u200b"]
    texts = [random_text(rng, rng.randrange(0, 60), alphabet) for _ in range(30)]
    lines = random_text(rng, 1000, alphabet)
    for text in texts * 3:
        start, place = rng.randrange(0, 20), rng.randrange(len(lines))
        lines = lines[:place] + text[start:] + lines[place:]
    (tmp_path / "data.txt").write_text(lines, encoding="utf-8")
    monkeypatch.setattr(contamination, "BLOCK", rng.choice([50, 333, 1 << 18]))
    found = find_contaminated(texts, [tmp_path], num_words=9, num_characters=12, max_hits=10**6)
    seen = 0
    for text, overlap in zip(texts, found, strict=True):
        share, stretches, too_short = plain_overlap(text, [("data.txt", lines)], 9, 12)
        size = len(plain_units(text))
        assert (overlap.share, overlap.too_short) == (share, too_short), text
        assert overlap.num_hits == len(overlap.hits) and overlap.is_contaminated == bool(stretches)
        places = {(int(hit.location.rpartition(":")[2]), round(hit.share * size)) for hit in overlap.hits}
        assert places == {(line, units) for _, line, units in stretches}, text
        for hit in overlap.hits:
            assert len(plain_units(hit.text)) == round(hit.share * size) and fold(hit.text) in fold(text)
        seen += len(stretches)
    assert seen > 10


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_units_are_those_of_folded_text(text):
    """Any Unicode text: as many units as in a plain loop over the folded text, equal where those are equal."""
    text = text.replace(rolling_hash.BOUNDARY, " ")
    units, plain = cut_units(text), cut_units(fold(text))
    assert units.values.tolist() == plain.values.tolist() == cut_units(text.upper().lower()).values.tolist()
    assert units.singles.tolist() == plain.singles.tolist()
    assert all(fold(units.text[a:b]) for a, b in zip(units.starts, units.ends, strict=True))


def test_what_is_the_same_and_what_is_not():
    same = [
        ("Ｔｈｅ　ＣＡＴ！", "the cat"),
        ("猫，狗。", "猫 狗"),
        ("cafe\u0301", "CAFÉ"),
        ("ﬁsh", "fish"),
        ("ｶﾞ", "ガ"),
        ("STRASSE", "Straße"),
        ("1０②", "102"),
        ("a\u00adb\ufeffc", "abc"),
        ("\u1112\u1161\u11ab", "한"),
    ]
    for one, other in same:
        assert cut_units(one).values.tolist() == cut_units(other).values.tolist(), one
    assert len(cut_units("the cat 猫狗 3.14 안녕").values) == 2 + 2 + 2 + 2
    for one, other in (("ab", "a b"), ("abc", "acb"), ("猫", "狗"), ("体", "體"), ("a", "A1"), ("猫狗", "狗猫")):
        assert cut_units(one).values.tolist() != cut_units(other).values.tolist(), one


# ---------------------------------------------------------------- planted questions


DISGUISES = {
    "as it is": lambda text: text,
    "other marks": lambda text: text.replace("，", "——").replace("？", "\n").replace(" ", " / ").replace(":", " ("),
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "upper case": str.upper,
    "spaces": lambda text: text.replace("，", " ， ").replace(" ", "  \t"),
    "a line each": lambda text: text.replace("，", "，\r\n").replace(" ", "\n"),
    "in a sentence": lambda text: f"我的问题是：「{text}」请回答 (thanks).",
}


@pytest.mark.parametrize("question", LONG)
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_planted_question_is_found(question, disguise, tmp_path):
    planted = DISGUISES[disguise](LONG[question])
    before = "今天天气很好。\nIt rains.\n"
    (tmp_path / "data.txt").write_text(f"{before}{planted}\nThe end. 完\n", encoding="utf-8")
    (overlap, other) = find_contaminated([LONG[question], LONG[question][::-1]], [tmp_path])
    assert overlap.share == 1 and not other.is_contaminated and not overlap.too_short
    (hit,) = overlap.hits
    assert (hit.location, hit.share) == (f"{tmp_path / 'data.txt'}:3", 1.0)
    assert hit.text == LONG[question].rstrip("?")  # the units of the question, in its own spelling


RECORDS = {
    "text": {"text": CHINESE},
    "another field": {"id": 7, "content": CHINESE, "tags": ["a", "b"]},
    "instruction": {"instruction": "回答问题", "input": CHINESE, "output": "好"},
    "output": {"instruction": "写一道题", "input": "", "output": f"好的：{CHINESE}"},
    "across fields": {"instruction": CHINESE[:19], "input": CHINESE[19:], "output": "B"},
    "history": {"instruction": "谢谢", "output": "不客气", "history": [["写一道题", CHINESE]]},
    "messages": {"messages": [{"role": "user", "content": CHINESE}, {"role": "assistant", "content": "B"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "写题"}, {"from": "gpt", "value": CHINESE}]},
    "preferences": {"prompt": "写题", "chosen": CHINESE, "rejected": "不写"},
}


@pytest.mark.parametrize("layout", RECORDS)
def test_every_layout_is_read(layout, tmp_path):
    rows = [{"text": "前面的一行"}, RECORDS[layout], {"text": "后面的一行"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([RECORDS[layout]] * 2), tmp_path / "c.parquet")
    (overlap,) = find_contaminated([CHINESE], [tmp_path])
    found = sorted(hit.location for hit in overlap.hits)
    a, b, c = (tmp_path / name for name in ("a.jsonl", "b.json", "c.parquet"))
    assert found == [f"{a}:2", f"{b}:5", f"{c}: row 1", f"{c}: row 2"] and overlap.share == 1


def test_records_are_not_read_as_one_text(tmp_path):
    rows = [{"text": CHINESE[:19]}, {"text": CHINESE[19:]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert not find_contaminated([CHINESE], [tmp_path])[0].is_contaminated


def test_a_part_of_a_question(tmp_path):
    """What is shared is told: 21 of 36 characters in one place, 20 in another, 29 together."""
    units = [unit for unit, _ in plain_units(CHINESE)]
    one, two = "".join(units[:21]), "".join(units[9:29])
    (tmp_path / "a.txt").write_text(f"说{one}吗\n说{two}吗\n{''.join(units[17:])}\n", encoding="utf-8")
    (overlap,) = find_contaminated([CHINESE], [tmp_path / "a.txt"])
    assert [hit.location.rpartition(":")[2] for hit in overlap.hits] == ["1", "2"]  # 19 characters: none
    assert [hit.share for hit in overlap.hits] == [21 / len(units), 20 / len(units)]
    assert overlap.hits[0].text == "下列关于光合作用的说法中，哪一项是正确的？它只"
    assert overlap.share == 29 / len(units)
    (best,) = find_contaminated([CHINESE], [tmp_path / "a.txt"], max_hits=1)
    assert best.hits == overlap.hits[:1] and best.num_hits == 2
    assert find_contaminated([CHINESE], [tmp_path / "a.txt"], num_characters=19)[0].num_hits == 3


def test_short_questions_must_agree_as_a_whole(tmp_path):
    short = ["水在一百度时会不会沸腾呢", "one two three four five six seven eight", "猫是什么", "", "……"]
    text = "那么水，在一百度时会不会沸腾呢！猫是什么\none two three four five six seven nine\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = find_contaminated(short, [tmp_path])
    assert [overlap.too_short for overlap in found] == [False, False, True, True, True]
    assert [overlap.share for overlap in found] == [1, 0, 0, 0, 0]


def test_an_answer_to_every_question_in_order(tmp_path):
    (tmp_path / "a.txt").write_text(f"{ENGLISH}\n{CHINESE}\n{ENGLISH} {ENGLISH}\n", encoding="utf-8")
    found = find_contaminated([CHINESE, "别的问题", ENGLISH, CHINESE], [tmp_path / "a.txt", str(tmp_path)])
    assert [overlap.num_hits for overlap in found] == [2, 0, 6, 2]  # a file that is named twice is read twice
    assert find_contaminated([], [tmp_path]) == []


def test_disjoint_text_has_no_hits(tmp_path, caplog):
    """A thousand questions and a text over other characters and words; both alphabets are large and small alike."""
    caplog.set_level("INFO")
    rng = random.Random(0)
    ours, theirs = [chr(0x4E00 + n) for n in range(300)], [chr(0x5E00 + n) for n in range(300)]
    texts = [random_text(rng, 60, [*ours, " cat ", " dog "]) for _ in range(1000)]
    (tmp_path / "a.txt").write_text(random_text(rng, 200_000, [*theirs, " cat ", " mouse ", "\n"]), encoding="utf-8")
    assert not any(overlap.is_contaminated for overlap in find_contaminated(texts, [tmp_path]))
    assert "0 of 1000 questions share a stretch with" in caplog.text


def test_formulas_of_a_benchmark_are_no_sign(tmp_path):
    """Instructions that stand in each of its questions; a question that is there is found with them, as a whole."""
    rng = random.Random(1)
    letters = [chr(0x4E00 + number) for number in range(500)]
    formula = "请根据下面的材料回答问题，每题只有一个正确的选项，把它的字母写在答案里。"
    texts = [formula + random_text(rng, 30, letters) + "，请回答。" for _ in range(60)]
    zeros = "0 1 " * 100  # repeats itself more often than that
    (tmp_path / "a.txt").write_text(f"{formula * 9}\n{zeros * 9}\n好：{texts[7]}\n", encoding="utf-8")
    found = find_contaminated([*texts, zeros, "two 2 " + zeros], [tmp_path])
    assert [number for number, overlap in enumerate(found) if overlap.is_contaminated] == [7]
    assert (found[7].share, found[7].num_hits, found[7].hits[0].location) == (1, 1, f"{tmp_path / 'a.txt'}:3")
    assert [overlap.too_short for overlap in found[-3:]] == [False, True, False]
    assert find_contaminated(texts[:40], [tmp_path])[0].num_hits == 9 + 1  # it is part of each of forty


# ---------------------------------------------------------------- files


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    """Ten times the data, with hits all over and a line much longer than a block, takes no more memory."""
    monkeypatch.setattr(contamination, "BLOCK", 1 << 14)
    path, peaks = tmp_path / "a.txt", []
    for times in (1, 10):
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(times):
                file.write("今天天气很好，我们一起去公园里散步聊天。\n" * 9000 + f"{CHINESE} 好 " * 800)
        tracemalloc.start()
        (overlap,) = find_contaminated([CHINESE], [path])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert overlap.num_hits == 800 * times and len(overlap.hits) == 5
    assert peaks[1] < 1.5 * peaks[0] < path.stat().st_size


def test_what_cannot_be_read(tmp_path, caplog):
    with pytest.raises(InputError, match="data not found"):
        find_contaminated([CHINESE], [tmp_path / "nothing"])
    with pytest.raises(InputError, match="num_words 3: need at least 8"):
        find_contaminated([CHINESE], [], num_words=3)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe bad \n" + CHINESE.encode() + b"\n")
    (tmp_path / "b.jsonl").write_text('{"text": "\\ud800"}\n' + json.dumps({"text": CHINESE}) + "\n")
    (overlap,) = find_contaminated([CHINESE], [tmp_path])
    assert sorted(hit.location for hit in overlap.hits) == [f"{tmp_path}/a.txt:2", f"{tmp_path}/b.jsonl:2"]
    assert "skipped 1 bad records" in caplog.text
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    find_contaminated([CHINESE], [tmp_path])
    assert "skipped 2 bad records" in caplog.text and "c.jsonl:2: broken JSON" in caplog.text
