"""LongBench's metrics: how near an answer comes to the right one, 0-1.

They give the scores of THUDM/LongBench's own, with their peculiarities, so that figures can be compared with published
ones. A test compares them, where LongBench's source is at hand.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import re
import string
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .tasks import NUMBERED, Task

Classes = Sequence[str] | None
Metric = Callable[[str, str], float]  # prediction, right answer

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏."
)  # as published: without 《 and 〈〉
_DROPPED = str.maketrans("", "", string.punctuation)
_DROPPED_ZH = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
_COMMENT_MARKS = ("`", "#", "//")


def score_answer(task: Task, prediction: str, answers: Sequence[str], all_classes: Classes) -> float:
    """The score against the nearest of the right answers."""
    return _best(find_metric(task.metric, all_classes), task, prediction, answers)


def score_levenshtein(task: Task, prediction: str, answers: Sequence[str], all_classes: Classes) -> float:
    """The same for a code task, measured as upstream's code does where python-Levenshtein is installed."""
    return _best(functools.partial(code_similarity, ratio=levenshtein_ratio), task, prediction, answers)


def _best(metric: Metric, task: Task, prediction: str, answers: Sequence[str]) -> float:
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max(metric(prediction, answer) for answer in answers)


# ---------------------------------------------------------------- words in common


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words, without case, punctuation and articles."""
    return _f1(*(re.sub(r"\b(?:a|an|the)\b", " ", _bare(text)).split() for text in (prediction, answer)))


def _bare(text: str) -> str:
    return text.lower().translate(_DROPPED)


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 of jieba's words, without case, punctuation and white space."""
    words = [
        ["".join(word.lower().translate(_DROPPED_ZH).split()) for word in segment(text)]
        for text in (prediction, answer)
    ]
    return _f1(*(list(filter(None, found)) for found in words))


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    common = (Counter(prediction) & Counter(answer)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


@functools.cache
def _segmenter() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns about backslashes in jieba's patterns
        import jieba

    jieba.setLogLevel(logging.WARNING)
    # A segmenter of its own: its words are those of jieba's dictionary, whatever other code has added. And a folder of
    # its own: jieba would believe any /tmp/jieba.cache, which may be another version's or another user's.
    segmenter = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        segmenter.tmp_dir = folder
        segmenter.initialize()
    return segmenter


def segment(text: str) -> list[str]:
    """jieba's words of a text, white space and punctuation among them."""
    return list(_segmenter().cut(text))


# ---------------------------------------------------------------- sequences in common


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L of the `rouge` package (sentences end at full stops, words at white space); 0 where a text is empty."""
    from rouge import Rouge

    with _deep_recursion(len(prediction) + len(answer)):
        try:
            return float(Rouge(metrics=["rouge-l"]).get_scores(prediction, answer)[0]["rouge-l"]["f"])
        except ValueError:  # it refuses texts without a sentence
            return 0.0


@contextlib.contextmanager
def _deep_recursion(depth: int) -> Iterator[None]:
    """Let Python functions call each other so deep: the package calls itself once for every word of both texts.

    Upstream's code takes a text so long that this fails, with no full stop in it, for one without a word in common.
    """
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L of jieba's words."""
    return rouge_l(" ".join(segment(prediction)), " ".join(segment(answer)))


def code_similarity(prediction: str, answer: str, ratio: Callable[[str, str], int] | None = None) -> float:
    """Likeness of the first line that is no comment and no fence, in whole percents as 0-1."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _COMMENT_MARKS)), "")
    if line == answer:
        return 1.0
    return (ratio or fuzz_ratio)(line, answer) / 100 if line and answer else 0.0


def fuzz_ratio(one: str, other: str) -> int:
    """What fuzzywuzzy's `ratio` gives of two different texts, 0-100: difflib's, which favours long common pieces."""
    return round(100 * difflib.SequenceMatcher(None, one, other).ratio())


def levenshtein_ratio(one: str, other: str) -> int:
    """What it gives with python-Levenshtein beside it: twice the longest common subsequence over both lengths."""
    from rapidfuzz.distance import Indel

    return round(100 * Indel.normalized_similarity(one, other))


# ---------------------------------------------------------------- numbers and classes


def count(prediction: str, answer: str) -> float:
    """How many of the numbers in the prediction are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, before: str = "Paragraph ") -> float:
    """How many of the numbers in the prediction are the one of the answer, such as "Paragraph 3"."""
    found = re.search(rf"{before}(\d+)", answer)
    return count(prediction, found[1]) if found else 0.0


def classification(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """1 where the answer is the only class that the prediction names, 1/n where it is one of n, else 0.

    A class whose name is a part of the answer's does not count; but upstream takes such names out of the list while it
    walks along it, so the one after a name taken out stays. What it would do where no class is named, choose the most
    similar, its code never does. Both are kept: they are in every published figure.
    """
    named = [name for name in all_classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "retrieval": retrieval,
    "retrieval_zh": functools.partial(retrieval, before=NUMBERED["retrieval_zh"]),
    "count": count,
    "code_similarity": code_similarity,
}


def find_metric(name: str, all_classes: Classes) -> Metric:
    """What measures answers; classification alone needs to know the classes there are."""
    if name == "classification":
        return functools.partial(classification, all_classes=all_classes or ())
    return METRICS[name]
