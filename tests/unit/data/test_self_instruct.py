"""self_instruct: what a model wrote is read whatever stands around it, and kept only where it is new."""

import functools
import json
import random
import re

import pytest

from support.paths import EXAMPLES
from utils.core.errors import InputError
from utils.data.self_instruct import (
    REQUESTS,
    Pool,
    Task,
    language_of,
    read_answer,
    read_seeds,
    units,
    write_request,
)
from utils.text.conversations import read_example

SEEDS = EXAMPLES / "instructions" / "seed_tasks.json"


def line(instruction, output="好的。", **fields):
    return json.dumps({"instruction": instruction, "input": "", "output": output, **fields}, ensure_ascii=False)


def rouge_l(one, other):
    """F1 of the longest common subsequence, by its recursion."""

    @functools.cache
    def common(i, j):
        if not i or not j:
            return 0
        return common(i - 1, j - 1) + 1 if one[i - 1] == other[j - 1] else max(common(i - 1, j), common(i, j - 1))

    length = common(len(one), len(other))
    precision, recall = length / len(one), length / len(other)
    return 2 * precision * recall / (precision + recall) if length else 0.0


# ---------------------------------------------------------------- seeds


def test_the_seeds_of_the_examples_are_new_to_each_other_and_can_be_trained_on():
    seeds = read_seeds(SEEDS)
    languages = [language_of(seed) for seed in seeds]
    assert len(seeds) >= 20 and min(languages.count("zh"), languages.count("en")) >= 10
    for number, seed in enumerate(seeds):
        assert [m["role"] for m in read_example(seed.record(), "seed").messages] == ["user", "assistant"]
        pool = Pool(0.7)
        pool.add(other.instruction for other in seeds[:number])
        assert pool.nearest(seed.instruction) is None, seed
    assert sum(bool(seed.input) for seed in seeds) >= 5
    # What is asked for is what is taken: no seed would be left out.
    text = "\n".join(json.dumps(seed.record(), ensure_ascii=False) for seed in seeds)
    assert read_answer(text) == (seeds, {})


def test_bad_seeds_are_named(tmp_path):
    path = tmp_path / "seeds.json"
    for content, message in (
        ('[{"instruction": "做什么", "output": ""}]', "field 'output' is ''"),
        ('[{"instruction": "做什么", "input": 3, "output": "x"}]', "field 'input' is 3"),
        ("[{]", "broken JSON"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=re.escape(f"{path}:1: ") + ".*" + re.escape(message)):
            read_seeds(path)
    with pytest.raises(InputError, match="no such file"):
        read_seeds(tmp_path / "none.json")


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_request_shows_seeds_and_a_task_of_its_own(language):
    seeds = [Task(f"种子{n}", "", f"答{n}") for n in range(10)]
    kept = [Task("自己写的{brace}", "料", "答")]
    text = write_request(seeds, kept, 7, language, random.Random(1))
    assert text == write_request(seeds, kept, 7, language, random.Random(1))
    assert text != write_request(seeds, kept, 7, language, random.Random(2))
    examples = [json.loads(part) for part in text.splitlines() if part.startswith("{")]
    assert len(examples) == 4 and kept[0].record() in examples and "7" in text.partition("\n")[0]
    assert len([e for e in examples if e["instruction"].startswith("种子")]) == 3
    assert write_request(seeds[:1], [], 7, language, random.Random(1)).count('"instruction"') == 1
    assert language_of(Task(REQUESTS[language], "", "")) == language


# ---------------------------------------------------------------- answers


def test_tasks_are_read_whatever_stands_around_them():
    lines = [line("写一句问候"), line("Name a fruit", input="x", output=" apple ")]
    expected = [Task("写一句问候", "", "好的。"), Task("Name a fruit", "x", "apple")]
    for text in (
        "\n".join(lines),
        f"好的：\n```json\n{lines[0]}\n{lines[1]}\n```\n完成。",
        f"[{lines[0]},\n{lines[1]}]",
        f'{{"tasks": [{lines[0]}, {lines[1]}]}}',
        f"1. {lines[0]}\n2. {lines[1]}",
        f"{lines[0]} {lines[1]}",
    ):
        assert read_answer(text) == (expected, {}), text


def test_a_line_break_written_as_it_is():
    assert read_answer('{"instruction": "写两行诗", "output": "一\n二"}')[0] == [Task("写两行诗", "", "一\n二")]


def test_what_breaks_off_or_is_broken_is_left_out_and_counted():
    whole, cut = line("写一句问候"), line("写一封长信")
    assert read_answer(whole + "\n" + cut[:25]) == ([Task("写一句问候", "", "好的。")], {"cut off": 1})
    tasks, left_out = read_answer('{"instruction": "a" "output": "b"}\n' + whole)
    assert len(tasks) == 1 and list(left_out) == ["broken JSON: Expecting ',' delimiter"]
    for text in ("", "对不起，我不能。"):
        assert read_answer(text) == ([], {"no JSON in the answer": 1})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (line("写一句问候", output=" "), "no answer"),
        (line("写诗"), "instruction too short or too long"),
        (line("写" * 2001), "instruction too short or too long"),
        (line("描述这张图片里有什么"), "needs more than text"),
        (line("Describe the attached image"), "needs more than text"),
        (line("重复这一句话", output="重复这一句话"), "answer repeats the instruction"),
        (line("写一句问候", output=["x"]), "a field is no text"),
        (line("写一句问候", output=None), "no answer"),
        ('{"instruction": "写一句问候"}', "fields missing"),
        ('{"a": {"instruction": "写一句问候"}}', "fields missing"),
    ],
)
def test_what_cannot_be_trained_on_is_left_out(text, reason):
    assert read_answer(text) == ([], {reason: 1})


# ---------------------------------------------------------------- what is new


def test_units_are_words_and_chinese_characters():
    assert units("用Python写 2个Functions，好吗？") == ["用", "python", "写", "2", "个", "functions", "好", "吗"]


def test_similarity_is_rouge_l():
    draw = random.Random(0)
    for _ in range(200):
        texts = ["".join(draw.choices("天地人你我 ab ", k=draw.randint(1, 12))) for _ in range(2)]
        one, other = map(units, texts)
        if not one or not other:
            continue
        expected = rouge_l(tuple(one), tuple(other))
        pool = Pool(1e-9)
        pool.add([texts[0]])
        found = pool.nearest(texts[1])
        assert (found[0] if found else 0.0) == pytest.approx(expected)


def test_the_nearest_of_many_decides():
    pool = Pool(0.7)
    pool.add(["写一首关于春天的诗", "Name three fruits that are red"])
    score, text = pool.nearest("写一首关于秋天的诗")
    assert score == pytest.approx(8 / 9) and text == "写一首关于春天的诗"
    assert pool.nearest("写一封辞职信") is None
    assert pool.nearest("NAME three fruits, that are Red!")[0] == 1.0
    assert Pool(0.7).nearest("什么都没有") is None
