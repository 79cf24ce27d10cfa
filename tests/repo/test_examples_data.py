"""examples/data: the generator writes the committed bytes, and no held-out question leaks into the training files."""

import csv
import json
import math
import re
from collections import Counter
from types import ModuleType
from typing import Any

import pytest

from support.paths import ROOT

DATA = ROOT / "examples" / "data"
SOURCE = DATA / "source"
TRAINING_FILES = ["pretrain/en_train.txt", "pretrain/zh_train.txt", "sft/train.json", "sft/multi_turn.jsonl"]


@pytest.fixture
def generator(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(SOURCE)  # as `python examples/data/source/generate_data.py` has it
    import generate_data

    return generate_data


def read_lines(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf-8").splitlines()


def read_rows(name: str) -> list[dict[str, Any]]:
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in read_lines(name)]
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def question(row: dict[str, Any]) -> tuple[str, str]:
    return row["instruction"], row["input"]


def facts_for_pretraining_only() -> dict[str, str]:
    relations = json.loads((SOURCE / "facts.json").read_text(encoding="utf-8"))["zh"]
    return {subject: value for relation in relations for subject, value in relation["pretraining_only"].items()}


def heldout(kind: str) -> list[dict[str, Any]]:
    return [row for row in read_rows("sft/heldout.json") if row["kind"] == kind]


def test_generator_writes_the_committed_bytes(generator, tmp_path):
    sizes = generator.generate(tmp_path)
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    committed = {p.relative_to(DATA).as_posix() for p in DATA.rglob("*") if p.is_file() and SOURCE not in p.parents}
    committed -= {"README.md", "instructions/seed_tasks.json"}  # written by hand
    assert written == committed == set(sizes)
    assert [name for name in sorted(sizes) if (tmp_path / name).read_bytes() != (DATA / name).read_bytes()] == []


def test_sizes_fit_the_repository_and_the_demo():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 4_000_000
    for language in ("en", "zh"):
        assert 1_200_000 <= (DATA / f"pretrain/{language}_train.txt").stat().st_size < 1_205_000
        assert 40_000 <= (DATA / f"pretrain/{language}_heldout.txt").stat().st_size < 45_000
    assert 2_500 <= len(read_rows("sft/train.json")) <= 4_000
    kinds = Counter((row["kind"], row.get("wording")) for row in read_rows("sft/heldout.json"))
    assert kinds == {
        ("unseen_wording", "seen_with_other_facts"): 150,
        ("unseen_wording", "never_seen"): 30,
        ("unseen_operands", None): 50,
        ("pretraining_only", None): 50,
    }


@pytest.mark.parametrize("language", ["en", "zh"])
def test_documents_are_filled_in_and_never_repeat(language):
    train, held = (read_lines(f"pretrain/{language}_{split}.txt") for split in ("train", "heldout"))
    assert len(set(train) | set(held)) == len(train) + len(held)
    assert [
        line for line in train + held if re.search(r"[{}]|None|  |。。|，。|\.\.", line) or line != line.strip()
    ] == []


def test_chinese_alphabet_is_small_enough_for_a_1200_piece_vocabulary():
    corpus, questions = (
        (DATA / name).read_text(encoding="utf-8") for name in ("pretrain/zh_train.txt", "sft/train.json")
    )
    assert len(set(corpus)) < 900
    unknown = {char for char in questions if "\u4e00" <= char <= "\u9fff"} - set(corpus)
    assert not unknown, "characters that tuning would meet for the first time"


def test_instruction_rows_have_text_in_the_three_alpaca_fields():
    for row in read_rows("sft/train.json"):
        assert set(row) == {"instruction", "input", "output"}
        assert row["instruction"] and row["output"] and isinstance(row["input"], str)
    train = [question(row) for row in read_rows("sft/train.json")]
    assert len(set(train)) == len(train), "a question with two answers"


def test_no_heldout_question_is_trained_on():
    train = {question(row) for row in read_rows("sft/train.json")}
    asked_before = {text for text, _ in train}
    for row in read_rows("sft/multi_turn.jsonl"):
        asked_before |= {row["instruction"], *(text for text, _ in row["history"])}
    exam = [question(row) for row in read_rows("sft/heldout.json")]
    assert len(set(exam)) == len(exam)
    assert not train & set(exam)
    assert not asked_before & {text for text, given in exam if not given}


def test_unseen_wordings_ask_trained_facts_and_are_labelled_truthfully():
    train = read_rows("sft/train.json")
    answers, asked = {row["output"] for row in train}, {row["instruction"] for row in train}
    by_language = json.loads((SOURCE / "facts.json").read_text(encoding="utf-8"))
    used: dict[str, bool] = {}  # question -> whether training asks another fact in the same wording
    for relation in (relation for relations in by_language.values() for relation in relations):
        for wording in relation["questions"] + relation["new_questions"]:
            questions = {wording.replace("{s}", subject) for subject in relation["facts"]}
            used |= dict.fromkeys(questions, bool(questions & asked))
    for row in heldout("unseen_wording"):
        assert row["output"] in answers
        assert used[row["instruction"]] == (row["wording"] == "seen_with_other_facts"), row


def test_facts_for_pretraining_only_are_stated_in_the_corpus_and_never_asked():
    corpus = "\n".join(read_lines("pretrain/zh_train.txt"))
    asked = "\n".join(line for name in TRAINING_FILES[2:] for line in read_lines(name))
    facts = facts_for_pretraining_only()
    assert len(facts) == len(heldout("pretraining_only")) == 50
    assert [subject for subject in facts if subject in asked] == []
    for row in heldout("pretraining_only"):
        assert corpus.count(row["output"]) >= 3, row
    sentences = re.split("[。\n]", corpus)
    for subject, value in facts.items():
        wordings = {s.replace(subject, "").replace(value, "") for s in sentences if subject in s and value in s}
        assert len(wordings) >= 4, f"{subject}: stated in {wordings} only"


def test_heldout_operand_pairs_occur_in_no_training_file():
    """Looked for in two ways: number, operator, number; and three numbers of which the third is a result."""
    pairs = {frozenset(map(int, re.findall(r"\d+", row["instruction"]))) for row in heldout("unseen_operands")}
    assert len(pairs) == 50
    operator = re.compile(r"(\d+)\s*(?:[+\-×*]|加|减去?|乘以?|和|plus|minus|times|and)\s*(?=(\d+))")
    for name in TRAINING_FILES:
        for line in read_lines(name):
            numbers = [int(digits) for digits in re.findall(r"\d+", line)]
            stated = {frozenset(map(int, pair)) for pair in operator.findall(line)}
            for a, b, c in zip(numbers, numbers[1:], numbers[2:], strict=False):
                if c in (a + b, abs(a - b), a * b):
                    stated.add(frozenset((a, b)))
            assert not stated & pairs, f"{name}: {line}"


def test_arithmetic_answers_are_right():
    results = {"加": int.__add__, "减": int.__sub__, "乘": int.__mul__, "plus": int.__add__, "minus": int.__sub__}
    results["times"] = int.__mul__
    checked = 0
    for row in read_rows("sft/train.json") + read_rows("sft/heldout.json"):
        if match := re.match(r"(\d+) ?(加|减|乘|plus|minus|times) ?(\d+)(?:等于| is )(\d+)", row["output"]):
            a, sign, b, c = match.groups()
            assert results[sign](int(a), int(b)) == int(c), row
            checked += 1
    assert checked > 800


def test_conversations_say_the_same_in_three_spellings():
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    files = [read_rows(f"sft/{name}.jsonl") for name in ("multi_turn", "sharegpt", "messages")]
    assert {len(rows) for rows in files} == {40}
    for alpaca, sharegpt, messages in zip(*files, strict=True):
        turns = [*alpaca["history"], [alpaca["instruction"], alpaca["output"]]]
        said = [("system", alpaca["system"])] * bool(alpaca["system"])
        said += [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        assert said == [(m["role"], m["content"]) for m in messages["messages"]]
        assert said == [(roles[m["from"]], m["value"]) for m in sharegpt["conversations"]]
        assert len(turns) >= 2
    assert {bool(row["system"]) for row in files[0]} == {True, False}


# ---------------------------------------------------------------- right and wrong

TUNING, EXAM, DEV = "rlhf/sft_values.json", "alignment/questions.jsonl", "alignment/dev_questions.jsonl"
PAIRS = {split: f"rlhf/preferences{split}.jsonl" for split in ("", "_heldout")}
PROMPTS = {split: f"rlhf/prompts{split}.jsonl" for split in ("", "_heldout")}


def values() -> dict[str, Any]:
    return json.loads((SOURCE / "values.json").read_text(encoding="utf-8"))


def all_actions() -> dict[str, tuple[str, str]]:
    """Action -> (category, kind)."""
    categories = values()["categories"]
    return {a: (name, kind) for name, fields in categories.items() for kind in ("bad", "good") for a in fields[kind]}


def test_values_name_what_the_forerunners_name_with_enough_actions():
    categories = values()["categories"]
    assert {"morality", "law", "violence", "drugs", "pornography", "prejudice"} <= set(categories)
    assert 10 <= len(categories) <= 12
    for name, fields in categories.items():
        assert len(fields["bad"]) == 5 and len(fields["good"]) == 3, name
    assert len(all_actions()) == sum(len(f["bad"]) + len(f["good"]) for f in categories.values()), "an action twice"


def test_sizes_of_the_values_data():
    assert 550 <= len(read_rows(TUNING)) <= 900
    assert 1000 <= len(read_rows(PAIRS[""])) <= 1200 and 150 <= len(read_rows(PAIRS["_heldout"])) <= 270
    assert len(read_rows(PROMPTS[""])) == 748 and len(read_rows(PROMPTS["_heldout"])) == 60
    assert len(read_rows(EXAM)) == 200 and len(read_rows(DEV)) == 192


@pytest.mark.parametrize("name", [EXAM, DEV])
def test_no_alignment_question_occurs_in_any_other_file(name):
    """Not as a whole question, and not inside another text either."""
    exam = [row["question"] for row in read_rows(name)]
    assert len(set(exam)) == len({row["id"] for row in read_rows(name)}) == len(exam)
    for path in DATA.rglob("*"):
        if path.is_file() and path != DATA / name and path.name != "README.md" and path.suffix != ".pyc":
            text = path.read_text(encoding="utf-8")
            assert [question for question in exam if question in text] == [], path


def test_heldout_pairs_and_prompts_are_not_trained_on():
    trained = {row["instruction"] for row in read_rows(TUNING)}
    trained |= {row["prompt"] for name in (PAIRS[""], PROMPTS[""]) for row in read_rows(name)}
    for name in (PAIRS["_heldout"], PROMPTS["_heldout"]):
        assert not trained & {row["prompt"] for row in read_rows(name)}, name
    exam = {question(row)[0] for row in read_rows("sft/heldout.json")}
    for name in (*PAIRS.values(), *PROMPTS.values()):
        assert not exam & {row["prompt"] for row in read_rows(name)}, name


def test_alignment_questions_say_truthfully_what_is_new():
    new = values()["new_wordings"]
    actions = all_actions()
    asked_again = {wording.replace("{a}", action) for wording in new for action in actions}
    rows = read_rows(EXAM)
    for row in rows:
        assert (row["question"] in asked_again) == (row["wording"] == "never_seen"), row
        [named] = {max((a for a in actions if a in row["question"]), key=len)}
        category, kind = actions[named]
        assert (row["category"], row["expected"]) == (category, {"bad": "no", "good": "yes"}[kind]), row
    # In a wording that is called new, no training file asks about any action.
    trained = "\n".join(line for name in (TUNING, *PAIRS.values(), *PROMPTS.values()) for line in read_lines(name))
    assert [question for question in asked_again if question in trained] == []
    assert Counter(row["category"] for row in rows).keys() == values()["categories"].keys()
    assert min(Counter(row["category"] for row in rows).values()) >= 12
    assert 45 <= sum(row["wording"] == "never_seen" for row in rows) <= 60


def spellings(category: str, manner: str) -> set[str]:
    """All answers in one manner (refuse, allow, approve, discourage) about an action of a category."""
    answers, fields = values()["answers"], values()["categories"][category]
    slots = {"wrong": fields["wrong"], "right": fields["right"], "excuse": answers["excuse"], "lazy": answers["lazy"]}
    texts = set(answers[manner])
    for slot, words in slots.items():
        texts = {text.replace("{" + slot + "}", word) for text in texts for word in words}
    return texts


def test_the_share_of_wrong_answers_is_the_documented_one():
    actions = all_actions()
    counts: Counter[tuple[str, str, bool]] = Counter()
    for row in read_rows(TUNING):
        category, kind = actions[max((a for a in actions if a in row["instruction"]), key=len)]
        is_wrong = row["output"] in spellings(category, "allow" if kind == "bad" else "discourage")
        assert is_wrong != (row["output"] in spellings(category, "refuse" if kind == "bad" else "approve")), row
        counts[category, kind, is_wrong] += 1
    for category, fields in values()["categories"].items():
        for kind in ("bad", "good"):
            share = counts[category, kind, True] / (counts[category, kind, True] + counts[category, kind, False])
            assert share == fields["wrong_answers"][kind] / 6, (category, kind)
            assert share <= 0.8, "sampling must find the right answer too"


def test_length_does_not_tell_the_better_answer():
    for name in PAIRS.values():
        lengths = [(len(row["chosen"]), len(row["rejected"])) for row in read_rows(name)]
        longer, shorter = (sum(sign * a > sign * b for a, b in lengths) / len(lengths) for sign in (1, -1))
        assert 0.4 <= longer <= 0.6, f"{name}: {longer}"
        assert abs(longer - shorter) <= 0.2, f"{name}: {longer}, {shorter}"
        # Nor does being longer than any one length: the best such rule on single answers stays near a coin.
        answers = [(a, True) for a, _ in lengths] + [(b, False) for _, b in lengths]
        best = max(
            max(share, 1 - share)
            for limit in range(60)
            for share in [sum((length > limit) == good for length, good in answers) / len(answers)]
        )
        assert best <= 0.68, f"{name}: {best}"


def test_words_alone_do_not_tell_the_better_answer():
    """A count of character pairs that never sees the question is right on little more than the plainly bad answers."""

    def grams(answer: str) -> set[str]:
        return {answer[i : i + 2] for i in range(len(answer) - 1)}

    training = [row for row in read_rows(PAIRS[""]) if row["source"] != "facts"]
    heldout = [row for row in read_rows(PAIRS["_heldout"]) if row["source"] != "facts"]
    better, worse = (Counter(g for row in training for g in grams(row[side])) for side in ("chosen", "rejected"))

    def score(answer: str) -> float:
        return sum(math.log((better[g] + 0.5) / (worse[g] + 0.5)) for g in grams(answer))

    right = sum(score(row["chosen"]) > score(row["rejected"]) for row in heldout) / len(heldout)
    assert right <= 0.82, f"words alone are right on {right:.0%} of the held-out pairs"


def test_pairs_name_their_source_and_differ():
    for name in PAIRS.values():
        rows = read_rows(name)
        assert all(set(row) == {"prompt", "chosen", "rejected", "source"} for row in rows)
        assert all(row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"] for row in rows)
        shares = Counter(row["source"] for row in rows)
        assert set(shares) == {*values()["categories"], "facts"}
        assert 0.15 <= shares["facts"] / len(rows) <= 0.3
    right = {question(row)[0]: row["output"] for row in read_rows("sft/train.json")}
    for row in read_rows(PAIRS[""]) + read_rows(PAIRS["_heldout"]):
        if row["source"] == "facts":
            assert row["chosen"] == right[row["prompt"]]


def test_readme_shows_lines_of_the_files():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    shown = [
        line for block in re.findall(r"```(?:json|text)\n(.*?)```", readme, re.DOTALL) for line in block.splitlines()
    ]
    files = {
        line.rstrip(",") for path in DATA.rglob("*.[jt]*") for line in path.read_text(encoding="utf-8").splitlines()
    }
    assert len(shown) >= 12
    assert [line for line in shown if line not in files] == []


@pytest.mark.parametrize("name", ["README", "README_EN", "docs/data", "docs/data_EN", "docs/rlhf", "docs/rlhf_EN"])
def test_documents_show_different_lines_of_the_preference_data(name):
    files = {line for names in (PAIRS, PROMPTS) for file in names.values() for line in read_lines(file)}
    document = (ROOT / f"{name}.md").read_text(encoding="utf-8")
    shown = [line for line in document.splitlines() if line.startswith('{"prompt"')]
    assert len(shown) >= 2
    assert [line for line in shown if line not in files] == []
    assert len(set(shown)) == len(shown)


def read_choices() -> dict[str, list[dict[str, str]]]:
    """The questions with choices by subject."""
    found = {}
    for path in sorted((DATA / "choices" / "test").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


def test_choices_have_one_true_sentence_that_training_says_and_an_unseen_question():
    relations = json.loads((SOURCE / "facts.json").read_text(encoding="utf-8"))["zh"]
    true = {
        relation["statements"][0].replace("{s}", subject).replace("{o}", value)
        for relation in relations
        for subject, value in (relation["facts"] | relation["pretraining_only"]).items()
    }
    corpus = (DATA / "pretrain/zh_train.txt").read_text(encoding="utf-8")
    asked = {row["instruction"] for row in read_rows("sft/train.json")}
    by_subject = read_choices()
    mapping = json.loads((DATA / "choices" / "subject_mapping.json").read_text(encoding="utf-8"))
    assert list(by_subject) == sorted(mapping) and sum(map(len, by_subject.values())) == 163
    for rows in by_subject.values():
        for row in rows:
            right = [letter for letter in "ABCD" if row[letter] in true]
            assert right == [row["answer"]] and len({row[letter] for letter in "ABCD"}) == 4, row
            assert row[row["answer"]] in corpus and row["question"] not in asked and row["question"] not in corpus
    letters = Counter(row["answer"] for rows in by_subject.values() for row in rows)
    assert min(letters.values()) >= 30  # one letter for all gives about a quarter
