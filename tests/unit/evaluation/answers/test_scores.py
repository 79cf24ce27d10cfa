"""scores: cases by hand, plain loops as oracles."""

import math
import random
from fractions import Fraction

import pytest

from utils.evaluation.answers.scores import (
    METRICS,
    chrf,
    contained,
    exact,
    number,
    read_numeral,
    rouge_l,
    score_answer,
    words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("羊的叫声是咩咩。", list("羊的叫声是咩咩")),
        ("It's GPT-4, isn't it?", ["it's", "gpt", "4", "isn't", "it"]),
        ("３乘４等于 １２．", ["3", "乘", "4", "等", "于", "12"]),
        ("1,200 元，-5%", ["1200", "元", "-5", "%"]),
        ("有100，200两个", ["有", "100", "200", "两", "个"]),
        ("3-5 x-1 (-2)", ["3", "5", "x", "1", "-2"]),
        ("a + b = c", ["a", "+", "b", "=", "c"]),
        ("……？", [".", ".", ".", ".", ".", ".", "?"]),
        (" \n", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "is_exact", "is_contained"),
    [
        ("北京。", "北京", 1, 1),
        ("中国的首都是北京。", "北京", 0, 1),
        ("北京", "中国的首都是北京。", 0, 0),
        ("The CAPITAL is  Beijing!", "the capital is Beijing", 1, 1),
        ("I know.", "no", 0, 0),
        ("112", "12", 0, 0),
        ("12.5", "12", 0, 0),
        ("答案：12。", "12", 0, 1),
        ("-5", "5", 0, 0),
        ("", "北京", 0, 0),
        ("", "？", 0, 0),
        ("？", "?", 1, 1),
        ("a-b", "a b", 1, 1),
    ],
)
def test_exact_and_contained(answer, reference, is_exact, is_contained):
    assert (exact(answer, reference), contained(answer, reference)) == (is_exact, is_contained)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("3乘4等于12。", "12", 1),
        ("3×4=12，所以是11", "12", 0),
        ("1,200", "1200.0", 1),
        ("一共 0.5", "1/2", 1),
        ("50%", "0.5", 1),
        ("50", "50%", 0),
        ("-7", "7", 0),
        ("等于-7", "−7", 1),
        ("3万", "30000", 1),
        ("十二", "12", 1),
        ("一共是三百零五个", "305", 1),
        ("答案是12，一共就这些", "12", 1),
        ("不知道", "12", 0),
        ("一起去吧", "十二。", 0),
        ("12", "十二。", 1),
        ("北京", "一起去北京", None),
        ("12", "北京", None),
    ],
)
def test_the_last_number(answer, reference, expected):
    assert number(answer, reference) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("零", 0), ("十", 10), ("十二", 12), ("二十", 20), ("两百", 200), ("三百零五", 305), ("一万二千", 12000)),
        *(("二〇二四", 2024), ("三亿二千万", 320_000_000), ("一万二千亿", 12_000 * 10**8), ("三点一四", "3.14")),
    ],
)
def test_chinese_numerals(text, value):
    assert read_numeral(text) == Fraction(value)


def longest_common(one, other):
    """The table of the textbook."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def plain_chrf(answer, reference):
    """Popović 2015 in loops: each n-gram of one text is crossed off the other's list."""
    precisions, recalls = [], []
    for order in range(1, 7):
        said, right = ([t[i : i + order] for i in range(len(t)) if i + order <= len(t)] for t in (answer, reference))
        if not said or not right:
            continue
        left, hits = list(right), 0
        for gram in said:
            if gram in left:
                left.remove(gram)
                hits += 1
        precisions.append(hits / len(said))
        recalls.append(hits / len(right))
    if not precisions or not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * precision * recall / (4 * precision + recall)


def test_rouge_and_chrf_against_plain_loops():
    generator = random.Random(3)
    for _ in range(150):
        answer, reference = ("".join(generator.choices("天地人ab c", k=generator.randint(1, 14))) for _ in range(2))
        if not (words(answer) and words(reference)):
            continue
        common = longest_common(words(answer), words(reference))
        precision, recall = common / len(words(answer)), common / len(words(reference))
        expected = 2 * precision * recall / (precision + recall) if common else 0.0
        assert math.isclose(rouge_l(answer, reference), expected)
        one, other = answer.replace(" ", ""), reference.replace(" ", "")
        assert math.isclose(chrf(answer, reference), plain_chrf(one, other))


def test_graded_scores_by_hand():
    # 猫吃鱼 in 猫爱吃鱼: 3 of 4 characters, 3 of 3.
    assert rouge_l("猫爱吃鱼。", "猫吃鱼") == pytest.approx(2 * 0.75 / 1.75)
    assert rouge_l("the cat sat", "the dog sat") == pytest.approx(2 / 3)
    # abc against abd, orders 1 to 3: 2/3, 1/2 and 0 of either.
    assert chrf("abc", "abd") == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert chrf("a b c", "abc") == 1.0 and chrf("", "abc") == 0.0 and chrf("xyz", "abc") == 0.0
    assert rouge_l("", "北京") == 0.0


def test_a_right_answer_has_every_score_and_an_empty_one_none():
    for reference in ("12", "北京是中国的首都。", "A cat, 3 dogs & 1/2 cow.", "？", "🙂"):
        assert set(score_answer(reference, reference).values()) == {1.0}
        assert set(score_answer("", reference).values()) == {0.0}
    assert set(score_answer("1", "北京")) == set(METRICS) - {"number"}
