"""utils.text.text_sample: a seeded, bounded, uniform sample of streamed text."""

from collections import Counter

import pytest

from utils.core.errors import InputError
from utils.core.records import BadRecords
from utils.text.text_sample import iter_corpus, list_corpus, sample_texts


def test_everything_fits_and_keeps_its_order():
    texts = [f"line {number} 猫" for number in range(50)]
    sample = sample_texts(iter(texts), 10**6, None, seed=1)
    assert sample.texts == texts
    assert sample.bytes == sample.total_bytes == sum(len(text.encode()) for text in texts)
    assert sample.total == 50


def test_limits_hold_and_the_seed_decides():
    texts = [f"{number:05d} 猫" for number in range(2000)]
    by_bytes = sample_texts(iter(texts), 900, None, seed=1)
    assert by_bytes.bytes == 90 * 10 <= 900
    assert by_bytes.total == 2000
    assert by_bytes.texts == sorted(by_bytes.texts)
    assert sample_texts(iter(texts), 900, None, seed=1) == by_bytes
    assert sample_texts(iter(texts), 900, None, seed=2).texts != by_bytes.texts
    assert len(sample_texts(iter(texts), 10**6, 7, seed=1).texts) == 7


def test_the_sample_is_uniform():
    texts = [str(number) for number in range(10)]
    counts = Counter(text for seed in range(2000) for text in sample_texts(iter(texts), 10**6, 3, seed).texts)
    assert all(520 < counts[text] < 680 for text in texts)  # 600 expected, 4 standard deviations


def test_empty_input_is_an_error():
    with pytest.raises(InputError, match="no text"):
        sample_texts(iter([]), 100, None, seed=0)
    with pytest.raises(InputError, match="at most 3 bytes"):
        sample_texts(iter(["猫猫"]), 3, None, seed=0)


def test_files_and_folders_are_streamed(tmp_path):
    (tmp_path / "b.txt").write_text("two\n\nthree\n", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text('{"content": "four"}\n', encoding="utf-8")
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
    paths = list_corpus([str(tmp_path / "a.txt"), str(tmp_path / "sub"), str(tmp_path / "b.txt")])
    documents = [text for batch in iter_corpus(paths, "content", BadRecords()) for text in batch]
    assert documents == ["one", "four", "two", "three"]
    with pytest.raises(InputError, match="not found"):
        list_corpus([str(tmp_path / "absent")])
