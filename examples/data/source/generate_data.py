#!/usr/bin/env python3
"""Write the example data of this project: English and Chinese text, instructions and held-out questions.

Reads facts.json, tasks.json, stories_{zh,en}.json, (in generate_values.py) values.json and (in generate_arena.py)
arena.json beside this file; writes --output_dir (default: the folder above).
Seeded and made of the standard library alone: every run writes the same bytes.

    python examples/data/source/generate_data.py
    python examples/data/source/generate_data.py --output_dir /tmp/data
"""

import argparse
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from generate_arena import write_arena
from generate_choices import write_choices
from generate_values import describe_characters, write_values

HERE = Path(__file__).resolve().parent
SEED = 20240
TRAIN_BYTES, HELDOUT_BYTES = 1_200_000, 40_000  # per language; one document a line
MAX_OPERAND = 20  # addition and subtraction stay within 1..20, multiplication within 1..9
NUM_HELDOUT_PAIRS = 50  # half are asked as additions, half as subtractions
NUM_SEEN_WORDING = {"zh": 140, "en": 10}  # held-out rows whose wording training uses with other facts
NUM_NEW_WORDING = {"zh": 27, "en": 3}  # held-out rows whose wording training never uses
NUM_WORDINGS = {"zh": 10, "en": 6}  # training wordings per fact; the others stay free for the held-out rows
NUM_ARITHMETIC = {"zh": {"add": 420, "sub": 300, "mul": 60}, "en": {"add": 40, "sub": 30, "mul": 10}}
NUM_WORD_PROBLEMS = 60
NUM_WORD_LISTS = {"first": 90, "last": 60, "repeat": 60}
NUM_SORTS = 60
NUM_CONVERSATIONS = 40
SLOT = re.compile(r"\{([a-z_]+)(\d?)(\*?)(?:\.(\w+))?\}")

Row = dict[str, Any]
Relation = dict[str, Any]


class Problem(NamedTuple):
    """One arithmetic problem; operation is add, sub or mul."""

    operation: str
    a: int
    b: int

    @property
    def numbers(self) -> dict[str, int]:
        results = {"add": self.a + self.b, "sub": self.a - self.b, "mul": self.a * self.b}
        return {"a": self.a, "b": self.b, "c": results[self.operation]}


def read_json(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def replace_slots(template: str, values: dict[str, Any]) -> str:
    """Fill {s}, {o}, {a}, ... and leave the word-list slots ({person}, {fruit.mw}) for `Words.fill`."""
    for name, value in values.items():
        template = template.replace("{" + name + "}", str(value))
    return template


def capitalise(sentence: str) -> str:
    return re.sub(r"^\W*[a-z]", lambda match: match[0].upper(), sentence)


def endless(items: list[Any], rng: random.Random) -> Iterator[Any]:
    """Deal the items in shuffled rounds, so that each is used equally often."""
    while True:
        yield from rng.sample(items, len(items))


class Words:
    """Fills templates from word lists.

    {person} keeps its word within one document, {person2} is another word of the same list, {person.ta} is the column
    `ta` of the row behind {person}, and {fact_lead*} draws afresh each time.
    """

    def __init__(self, lists: dict[str, Any], rng: random.Random) -> None:
        self.rng = rng
        self.rows: dict[str, list[list[str]]] = {}
        self.fields: dict[str, list[str]] = {}
        for name, words in lists.items():
            self.fields[name] = words["fields"] if isinstance(words, dict) else ["word"]
            self.rows[name] = words["rows"] if isinstance(words, dict) else [[word] for word in words]

    def fill(self, template: str, bound: dict[str, list[str]]) -> str:
        def word(match: re.Match[str]) -> str:
            name, number, fresh, field = match.groups()
            row = self._draw(name, number, {} if fresh else bound)
            return self.fill(row[self.fields[name].index(field)] if field else row[0], bound)

        return SLOT.sub(word, template)

    def _draw(self, name: str, number: str, bound: dict[str, list[str]]) -> list[str]:
        if name + number not in bound:
            taken = [bound[key] for key in bound if key.rstrip("0123456789") == name]
            bound[name + number] = self.rng.choice([row for row in self.rows[name] if row not in taken])
        return bound[name + number]


def heldout_pairs() -> dict[frozenset[int], str]:
    """Operand pairs that only sft/heldout.json may use, each with the operation it is asked in.

    One operand is above 10, so that neither the multiplication table nor numbers written as words give a pair away.
    """
    pairs = [frozenset((a, b)) for b in range(11, MAX_OPERAND + 1) for a in range(1, b)]
    chosen = random.Random(f"{SEED} pairs").sample(pairs, NUM_HELDOUT_PAIRS)
    return {pair: "add" if i % 2 else "sub" for i, pair in enumerate(chosen)}


def training_problems() -> list[Problem]:
    reserved, top = heldout_pairs(), range(1, MAX_OPERAND + 1)
    sums = [Problem(op, a, b) for op in ("add", "sub") for a in top for b in top if op == "add" or a > b]
    return [p for p in sums if frozenset((p.a, p.b)) not in reserved] + [
        Problem("mul", a, b) for a in range(1, 10) for b in range(1, 10)
    ]


def states_heldout_pair(text: str, reserved: Iterable[frozenset[int]]) -> bool:
    """Whether three numbers in a row read as a sum, difference or product of a held-out operand pair."""
    numbers = [int(digits) for digits in re.findall(r"\d+", text)]
    return any(
        frozenset((a, b)) in reserved and c in (a + b, abs(a - b), a * b)
        for a, b, c in zip(numbers, numbers[1:], numbers[2:], strict=False)
    )


class Author:
    """Writes the documents of one language: stories, lessons, lists of facts and sums."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.rng = random.Random(f"{SEED} {language}")
        stories = read_json(f"stories_{language}.json")
        self.words = Words(stories["words"], self.rng)
        self.frames: list[list[list[str]]] = list(stories["frames"].values())
        self.lesson: dict[str, list[str]] = stories["lesson"]
        self.relations: list[Relation] = read_json("facts.json")[language]
        self.arithmetic: dict[str, Any] = read_json("tasks.json")["arithmetic"][language]
        self.number_words: list[str] = read_json("tasks.json")["number_words"]
        facts = [[(r, *fact) for fact in (r["facts"] | r["pretraining_only"]).items()] for r in self.relations]
        self.all_facts = endless([fact for of_relation in facts for fact in of_relation], self.rng)
        self.facts_of = [endless(of_relation, self.rng) for of_relation in facts]
        self.facts_per_relation = [len(of_relation) for of_relation in facts]
        self.wordings: dict[tuple[str, str], Iterator[str]] = {}
        self.problems = endless(training_problems(), self.rng)

    def document(self) -> str:
        [kind] = self.rng.choices([self.story, self.lesson_of_facts, self.theme, self.sums], weights=[38, 26, 26, 10])
        bound: dict[str, list[str]] = {}
        sentences = [self.words.fill(sentence, bound) for sentence in kind() if sentence]
        return "".join(sentences) if self.language == "zh" else " ".join(map(capitalise, sentences))

    def story(self) -> list[str]:
        """One option for each sentence of a frame; every third story ends with a fact."""
        sentences = [self.rng.choice(options) for options in self.rng.choice(self.frames)]
        if self.rng.random() < 1 / 3:
            sentences.append("{fact_lead*}" + self.statement(*next(self.all_facts)))
        return sentences

    def lesson_of_facts(self) -> list[str]:
        """Facts of any kind, some of them introduced ("The teacher said: ...")."""
        facts = [next(self.all_facts) for _ in range(self.rng.randint(3, 6))]
        links = [self.rng.choice(self.lesson["links"]) for _ in facts]
        body = [link + self.statement(*fact) for link, fact in zip(links, facts, strict=True)]
        return [self.rng.choice(self.lesson["openings"]), *body, self.rng.choice(self.lesson["endings"])]

    def theme(self) -> list[str]:
        """Facts of one relation; large relations are drawn more often, so that all facts occur equally often."""
        [i] = self.rng.choices(range(len(self.relations)), weights=self.facts_per_relation)
        facts = {fact[1]: fact for fact in (next(self.facts_of[i]) for _ in range(self.rng.randint(4, 7)))}
        return [self.rng.choice(self.relations[i]["openings"]), *(self.statement(*fact) for fact in facts.values())]

    def statement(self, relation: Relation, subject: str, value: str) -> str:
        """State a fact; its wordings are dealt in turn, so that each of them occurs, the wording of the answer too."""
        wordings = self.wordings.setdefault((relation["name"], subject), endless(relation["statements"], self.rng))
        text = replace_slots(next(wordings), {"s": subject, "o": value})
        return text if self.language == "zh" else capitalise(text)  # in Chinese, "cat" stays "cat"

    def sums(self) -> list[str]:
        """Solved sums; person and fruit are drawn afresh for every sentence."""
        body = [self.words.fill(self.solved(next(self.problems)), {}) for _ in range(self.rng.randint(5, 9))]
        return [self.rng.choice(self.arithmetic["openings"]), *body, self.rng.choice(self.arithmetic["endings"])]

    def solved(self, problem: Problem) -> str:
        texts, numbers = self.arithmetic["operations"][problem.operation], problem.numbers
        if min(numbers.values()) > 1 and self.rng.random() < 0.3:  # "1 apples" would be wrong
            return replace_slots(self.rng.choice(texts["word_problems"]), numbers)
        template = self.rng.choice(texts["statements"])
        if self.language == "en" and max(numbers.values()) <= 10 and "=" not in template and self.rng.random() < 0.5:
            return replace_slots(template, {key: self.number_words[n - 1] for key, n in numbers.items()})
        return replace_slots(template, numbers)


def write_corpus(language: str) -> dict[str, str]:
    """Return {file: text} with TRAIN_BYTES of training and HELDOUT_BYTES of held-out documents, no line twice."""
    author, reserved = Author(language), heldout_pairs()
    seen: set[str] = set()
    files = {}
    for split, target in (("train", TRAIN_BYTES), ("heldout", HELDOUT_BYTES)):
        lines, size = [], 0
        while size < target:
            line = author.document()
            if line in seen or states_heldout_pair(line, reserved):
                continue
            seen.add(line)
            lines.append(line)
            size += len(line.encode()) + 1
        files[f"pretrain/{language}_{split}.txt"] = "\n".join(lines) + "\n"
    return files


def as_row(question: str, answer: str, given: str = "") -> Row:
    return {"instruction": question, "input": given, "output": answer}


def fact_row(relation: Relation, template: str, subject: str, value: str) -> Row:
    """Ask one fact. The answer is the relation's first statement, which pre-training shows too, or the bare value."""
    answer = "{o}" if relation.get("short_answer") else relation["statements"][0]
    values = {"s": subject, "o": value}
    given = subject if relation.get("with_input") else ""
    return as_row(replace_slots(template, values), replace_slots(answer, values), given)


def ask_facts(language: str, rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Training rows, and held-out rows of the kinds unseen_wording and pretraining_only."""
    train: list[Row] = []
    seen_wording: list[Row] = []
    new_wording: list[Row] = []
    never_asked: list[Row] = []
    for relation in read_json("facts.json")[language]:
        questions = relation["questions"]
        if not questions:
            continue
        num_train = min(NUM_WORDINGS[language], len(questions) - 2)
        for subject, value in relation["facts"].items():
            shuffled = rng.sample(questions, len(questions))
            train += [fact_row(relation, q, subject, value) for q in shuffled[:num_train]]
            tags = {"kind": "unseen_wording", "relation": relation["name"]}
            heldout = fact_row(relation, shuffled[num_train], subject, value)
            seen_wording.append(heldout | tags | {"wording": "seen_with_other_facts"})
            heldout = fact_row(relation, rng.choice(relation["new_questions"]), subject, value)
            new_wording.append(heldout | tags | {"wording": "never_seen"})
        for subject, value in relation["pretraining_only"].items():
            row = fact_row(relation, rng.choice(questions), subject, value)
            never_asked.append(row | {"kind": "pretraining_only", "relation": relation["name"]})
    chosen = rng.sample(seen_wording, NUM_SEEN_WORDING[language]) + rng.sample(new_wording, NUM_NEW_WORDING[language])
    return train, chosen + never_asked


def sum_row(language: str, problem: Problem, rng: random.Random) -> Row:
    texts = read_json("tasks.json")["arithmetic"][language]["operations"][problem.operation]
    question = replace_slots(rng.choice(texts["questions"]), problem.numbers)
    return as_row(question, replace_slots(texts["answer"], problem.numbers))


def ask_sums(rng: random.Random) -> list[Row]:
    """Training questions on sums that are not held out, in both languages, and word problems in Chinese."""
    problems, rows = training_problems(), []
    for language, counts in NUM_ARITHMETIC.items():
        for operation, count in counts.items():
            of_operation = endless([p for p in problems if p.operation == operation], rng)
            rows += [sum_row(language, next(of_operation), rng) for _ in range(count)]
    words = Words(read_json("stories_zh.json")["words"], rng)
    operations = read_json("tasks.json")["arithmetic"]["zh"]["operations"]
    for problem in rng.sample([p for p in problems if p.operation != "mul"], NUM_WORD_PROBLEMS):
        bound: dict[str, list[str]] = {}
        texts = operations[problem.operation]["word_question"]
        rows.append(as_row(*(words.fill(replace_slots(text, problem.numbers), bound) for text in texts)))
    reserved = heldout_pairs()  # "18减12等于6，还剩6个" must not pass for 12 - 6 = 6
    return [row for row in rows if not states_heldout_pair(to_json(row), reserved)]


def ask_heldout_sums(rng: random.Random) -> list[Row]:
    rows = []
    for pair, operation in heldout_pairs().items():
        small, large = sorted(pair)
        swap = operation == "sub" or rng.random() < 0.5
        problem = Problem(operation, large, small) if swap else Problem(operation, small, large)
        rows.append(sum_row("zh", problem, rng) | {"kind": "unseen_operands", "relation": operation})
    return rows


def everyday_rows(rng: random.Random) -> list[Row]:
    """Small tasks with an `input` (first word, last word, copy, sort) and small talk."""
    tasks = read_json("tasks.json")
    rows = []
    for task, count in NUM_WORD_LISTS.items():
        for _ in range(count):
            words = rng.sample(tasks["word_list"]["words"], rng.randint(2, 4))
            answer = {"first": words[0], "last": words[-1], "repeat": "、".join(words)}[task]
            rows.append(as_row(rng.choice(tasks["word_list"][task]), answer, "、".join(words)))
    for _ in range(NUM_SORTS):
        digits = rng.sample("123456789", 3)
        rows.append(as_row(rng.choice(tasks["sort"]), "、".join(sorted(digits)), "、".join(digits)))
    return rows + [as_row(q, answer) for answer, questions in tasks["chat"].items() for q in questions]


def converse(fact_rows: list[Row], rng: random.Random) -> list[Row]:
    """Conversations of two to four turns: [{"system": text or "", "turns": [[question, answer], ...]}].

    A first question comes from the training rows (a held-out wording would leak), the next only name another subject.
    """
    tasks, asked = read_json("tasks.json"), {row["instruction"] for row in fact_rows}
    relations = [r for r in read_json("facts.json")["zh"] if "follow_up" in r]
    small_talk = [[q, a] for a, questions in tasks["chat"].items() for q in questions]
    rows = []
    for i in range(NUM_CONVERSATIONS):
        relation = rng.choice(relations)
        (first, value), *others = rng.sample(list(relation["facts"].items()), rng.randint(2, 3))
        wording = rng.choice([q for q in relation["questions"] if replace_slots(q, {"s": first}) in asked])
        questions = [(wording, first, value)] + [(relation["follow_up"], s, o) for s, o in others]
        turns = [[row["instruction"], row["output"]] for row in (fact_row(relation, *q) for q in questions)]
        greeting, thanks = small_talk[0], rng.choice([turn for turn in small_talk if turn[1].startswith("不客气")])
        turns = [greeting, *turns] if i % 4 == 0 else [*turns, thanks] if i % 4 == 1 else turns
        rows.append({"system": rng.choice(tasks["systems"]) if i % 2 else "", "turns": turns})
    return rows


def spell_conversations(conversations: list[Row]) -> dict[str, str]:
    """The same conversations in the three spellings that users bring; line N means the same in each file."""
    alpaca, sharegpt, messages = [], [], []
    for conversation in conversations:
        system, turns = conversation["system"], conversation["turns"]
        said = [("system", system)] if system else []
        said += [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        messages.append({"messages": [{"role": role, "content": text} for role, text in said]})
        sharegpt.append({"conversations": [{"from": names[role], "value": text} for role, text in said]})
        (question, answer), history = turns[-1], turns[:-1]
        alpaca.append({"instruction": question, "input": "", "output": answer, "system": system, "history": history})
    files = {"multi_turn": alpaca, "sharegpt": sharegpt, "messages": messages}
    return {f"sft/{name}.jsonl": "".join(to_json(row) + "\n" for row in rows) for name, rows in files.items()}


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def unique(rows: list[Row]) -> list[Row]:
    """Drop repeated questions (two draws may give the same word list); the first one stays."""
    return list({(row["instruction"], row["input"]): row for row in reversed(rows)}.values())[::-1]


def write_instructions() -> dict[str, str]:
    rng = random.Random(f"{SEED} sft")
    asked = {language: ask_facts(language, rng) for language in ("zh", "en")}
    fact_rows = [row for train, _ in asked.values() for row in train]
    train = unique(fact_rows + ask_sums(rng) + everyday_rows(rng))
    heldout = [row for _, rows in asked.values() for row in rows] + ask_heldout_sums(rng)
    heldout.sort(key=lambda row: row["kind"])
    rng.shuffle(train)
    conversations = converse(asked["zh"][0], rng)
    check_heldout(train, heldout)
    files = {f"sft/{name}.json": list_to_json(rows) for name, rows in (("train", train), ("heldout", heldout))}
    return files | spell_conversations(conversations)


def list_to_json(rows: list[Row]) -> str:
    return "[\n" + ",\n".join(to_json(row) for row in rows) + "\n]\n"  # one row a line: readable diffs


def check_heldout(train: list[Row], heldout: list[Row]) -> None:
    """Stop rather than write data whose held-out scores would mean nothing."""
    questions = {(row["instruction"], row["input"]) for row in train}
    asked = [(row["instruction"], row["input"]) for row in heldout]
    assert len(set(asked)) == len(asked), "a held-out question occurs twice"
    assert not questions & set(asked), f"held-out questions in train: {questions & set(asked)}"
    answers = {row["output"] for row in train}
    for row in heldout:
        assert (row["output"] in answers) == (row["kind"] == "unseen_wording"), f"answer in the wrong place: {row}"
    text, pairs = list_to_json(train), heldout_pairs()
    for relation in read_json("facts.json")["zh"]:
        named = [subject for subject in relation["pretraining_only"] if subject in text]
        assert not named, f"facts for pre-training only, yet named in train: {named}"
    assert not any(states_heldout_pair(to_json(row), pairs) for row in train), "a held-out sum occurs in train"


def generate(output_dir: Path) -> dict[str, int]:
    """Write all files below output_dir and return {file: bytes}."""
    files = write_corpus("en") | write_corpus("zh") | write_instructions()
    files |= write_values(json.loads(files["sft/train.json"])) | write_arena() | write_choices()
    for name, text in files.items():
        path = output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        os.replace(unfinished, path)
    return {name: len(text.encode()) for name, text in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE.parent, help="folder to write")
    folder = parser.parse_args().output_dir
    sizes = generate(folder)
    print("\n".join(f"{size:>9,} bytes  {name}" for name, size in sizes.items()))
    print(describe_characters(folder))


if __name__ == "__main__":
    main()
