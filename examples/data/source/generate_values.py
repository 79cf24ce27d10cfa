"""The part of generate_data.py that writes data about right and wrong: rlhf/* and alignment/questions.jsonl.

Reads values.json (actions, wordings, answers) and facts.json beside this file. Every action keeps some of its wordings
for the alignment questions and for the held-out pairs and prompts; these occur in no training file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SEED = "20240 values"
TUNING, EXAM, DEV = "rlhf/sft_values.json", "alignment/questions.jsonl", "alignment/dev_questions.jsonl"
NUM_TUNING = 6  # rows an action has in sft_values.json; "wrong_answers" in values.json says how many of them are wrong
# Questions on (bad, good) actions: of these there are 60 and 36, and who learns more of the others says no to all.
NUM_PAIRS = {"train": (360, 432), "heldout": (120, 72)}
NUM_CARELESS = {"train": (30, 30), "heldout": (5, 5)}  # the worse answer takes the right side badly
NUM_CONTRADICTORY = {"train": (40, 100), "heldout": (8, 12)}  # the worse answer takes it for a wrong reason
NUM_ORDINARY = {"train": 200, "heldout": 40}  # pairs on facts of sft/train.json
NUM_PROMPTS = {"train": (300, 288), "heldout": (24, 24)}
NUM_ORDINARY_PROMPTS = {"train": 160, "heldout": 12}
NUM_SECOND = 56  # actions that two alignment questions ask about in wordings used with other actions
NUM_NEW_WORDING = 48  # alignment questions in a wording that no training file uses with any action
RIGHT = {"bad": "refuse", "good": "approve"}
WRONG = {"bad": "allow", "good": "discourage"}
MIRRORED = {"bad": "approve", "good": "refuse"}  # the wrong side in the words of the right one
EXPECTED = {"bad": "no", "good": "yes"}

Row = dict[str, Any]


class Action(NamedTuple):
    """Something one may be asked about; kind is "bad" or "good"."""

    category: str
    kind: str
    text: str


class Asked(NamedTuple):
    """The questions about one action, each in one place: nothing in `exam` or `heldout` is trained on."""

    exam: list[str]
    heldout: list[str]
    training: list[str]


def read_json(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


class Author:
    """Writes questions and answers about actions."""

    def __init__(self) -> None:
        self.rng = random.Random(SEED)
        self.values: dict[str, Any] = read_json("values.json")
        self.actions = [
            Action(category, kind, text)
            for category, fields in self.values["categories"].items()
            for kind in ("bad", "good")
            for text in fields[kind]
        ]
        self.asked: dict[Action, Asked] = {}
        for action in self.actions:
            wordings = self.values["wordings"]
            questions = [ask(wording, action) for wording in self.rng.sample(wordings, len(wordings))]
            self.asked[action] = Asked(questions[:2], questions[2:4], questions[4:])

    def begin(self, what: str) -> None:
        """From here on, random numbers for one file alone, so that no other changes with it."""
        self.rng = random.Random(f"{SEED} {what}")

    def answer(self, action: Action, manner: str, reasons: str | None = None) -> str:
        """An answer in one of the four manners: refuse, approve (right) or allow, discourage (wrong).

        `reasons`: the category that its reason comes from; default: the action's own.
        """
        answers, category = self.values["answers"], self.values["categories"][reasons or action.category]
        text = self.rng.choice(answers[manner])
        for slot, choices in {**answers, "wrong": category["wrong"], "right": category["right"]}.items():
            text = text.replace("{" + slot + "}", self.rng.choice(choices))
        return text

    def right(self, action: Action) -> str:
        return self.answer(action, RIGHT[action.kind])

    def wrong(self, action: Action) -> str:
        return self.answer(action, WRONG[action.kind])

    def worse(self, action: Action) -> str:
        """A wrong answer for a pair: most of them in the words of right ones, so that words alone do not tell.

        Half of those have the reason of any category, since an answer that earns much with other questions is what a
        policy tries first.
        """
        manner = self.rng.choice([WRONG, MIRRORED, MIRRORED, MIRRORED])
        anywhere = manner is MIRRORED and self.rng.random() < 0.5
        reasons = self.rng.choice(list(self.values["categories"])) if anywhere else None
        return self.answer(action, manner[action.kind], reasons)

    def careless(self, action: Action) -> str:
        """An answer on the right side that gives no reason, or does not come to an end."""
        yes_or_no = {"bad": "不可以。", "good": "可以。"}[action.kind]
        return self.rng.choice([yes_or_no, yes_or_no * self.rng.randint(4, 8)])

    def contradictory(self, action: Action) -> str:
        """An answer on the right side whose reason speaks for the other: "不可以，这样做是好事。"."""
        own, other = {"bad": ("wrong", "right"), "good": ("right", "wrong")}[action.kind]
        reason = self.rng.choice(self.values["categories"][action.category][other])
        return str(self.rng.choice(self.values["answers"][RIGHT[action.kind]])).replace("{" + own + "}", reason)

    def tuning_rows(self) -> list[Row]:
        """What the assistant learns from; in some categories most of the answers are wrong, on purpose."""
        rows = []
        for action in self.actions:
            num_wrong = self.values["categories"][action.category]["wrong_answers"][action.kind]
            for rank, question in enumerate(self.rng.sample(self.asked[action].training, NUM_TUNING)):
                answer = self.wrong(action) if rank < num_wrong else self.right(action)
                rows.append({"instruction": question, "input": "", "output": answer})
        self.rng.shuffle(rows)
        return rows

    def draw(self, split: str, counts: tuple[int, int]) -> Iterator[tuple[Action, str]]:
        """So many questions of a split on (bad, good) actions, spread evenly, twice as many on contrasted ones.

        An action that is asked about more often than the split has questions is asked some again.
        """
        for kind, count in zip(("bad", "good"), counts, strict=True):
            of_kind = [action for action in self.actions if action.kind == kind]
            of_kind += [action for action in of_kind if self.is_contrasted(action)]
            turns = []
            for action in self.rng.sample(of_kind, len(of_kind)):
                questions = self.asked[action].training if split == "train" else self.asked[action].heldout
                turns.append((action, self.rng.sample(questions, len(questions))))
            for place in range(count):
                turn, (action, questions) = place // len(turns), turns[place % len(turns)]
                yield action, questions[turn % len(questions)]

    def is_contrasted(self, action: Action) -> bool:
        """Whether it shares half of its words with an action of the other kind, as "吸毒" and "让朋友不再吸毒" do."""
        return any(
            shared(action.text, other.text) >= min(len(action.text), len(other.text)) / 2
            for other in self.actions
            if other.kind != action.kind
        )

    def pairs(self, split: str, ordinary: list[Row]) -> list[Row]:
        """Preference pairs: right against wrong, against careless and against contradictory, and ordinary ones."""
        self.begin(f"pairs {split}")
        pairs = [
            as_pair(question, self.right(action), worse(action), action.category)
            for worse, counts in (
                (self.worse, NUM_PAIRS[split]),
                (self.careless, NUM_CARELESS[split]),
                (self.contradictory, NUM_CONTRADICTORY[split]),
            )
            for action, question in self.draw(split, counts)
        ]
        pairs += ordinary
        self.rng.shuffle(pairs)
        return pairs

    def prompts(self, split: str, ordinary: list[str]) -> list[Row]:
        """Questions without answers, about as many on good actions as on bad ones."""
        self.begin(f"prompts {split}")
        prompts = [question for _, question in self.draw(split, NUM_PROMPTS[split])]
        prompts += self.rng.sample(ordinary, NUM_ORDINARY_PROMPTS[split])
        self.rng.shuffle(prompts)
        return [{"prompt": prompt} for prompt in prompts]

    def exam(self) -> list[Row]:
        """The alignment questions, in the order of their categories, each with a right and a wrong answer."""
        self.begin("exam")
        seen = [(action, self.asked[action].exam[0]) for action in self.actions]
        seen += [(action, self.asked[action].exam[1]) for action in self.rng.sample(self.actions, NUM_SECOND)]
        asked = [(*row, "seen_with_other_actions") for row in seen]
        for action in self.rng.sample(self.actions, NUM_NEW_WORDING):
            asked.append((action, ask(self.rng.choice(self.values["new_wordings"]), action), "never_seen"))
        return self.as_questions(asked, "values")

    def dev(self) -> list[Row]:
        """Questions to choose settings by, so that the exam judges what was not chosen on it."""
        self.begin("dev")
        wordings = self.values["dev_wordings"]
        asked = [(action, ask(wording, action), "never_seen") for action in self.actions for wording in wordings]
        return self.as_questions(asked, "dev")

    def as_questions(self, asked: list[tuple[Action, str, str]], name: str) -> list[Row]:
        """Rows of (action, question, wording), in the order of their categories."""
        asked.sort(key=lambda row: self.actions.index(row[0]))
        return [
            {
                "id": f"{name}-{number:03}",
                "category": action.category,
                "question": question,
                "expected": EXPECTED[action.kind],
                "chosen": self.right(action),
                "rejected": self.wrong(action),
                "wording": wording,
            }
            for number, (action, question, wording) in enumerate(asked, 1)
        ]


def shared(text: str, other: str) -> int:
    """Characters of the longest piece that both texts have."""
    return SequenceMatcher(None, text, other, autojunk=False).find_longest_match().size


def ask(wording: str, action: Action) -> str:
    return wording.replace("{a}", action.text)


def as_pair(prompt: str, chosen: str, rejected: str, source: str) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": source}


def fact_pairs(train: list[Row], author: Author) -> list[Row]:
    """A pair for each question about a fact in sft/train.json: the right answer against a worse one.

    Of the worse ones two fifths name the value of another subject, two fifths answer another question, and a fifth are
    about right and wrong, which has no place there.
    """
    statements: dict[str, list[str]] = {}  # right answer -> wrong answers
    for relations in read_json("facts.json").values():
        for relation in relations:
            if relation.get("short_answer"):
                continue
            for subject, value in relation["facts"].items():
                right, *others = (
                    relation["statements"][0].replace("{s}", subject).replace("{o}", o)
                    for o in dict.fromkeys([value, *relation["facts"].values()])
                )
                statements[right] = others
    pairs = []
    for row in train:
        if row["output"] in statements and statements[row["output"]] and not row["input"]:
            wrong = author.rng.choice(statements[row["output"]])
            kind = author.rng.random()
            if kind < 0.4:
                wrong = author.rng.choice([right for right in statements if right != row["output"]])
            elif kind < 0.6:
                action = author.rng.choice(author.actions)
                wrong = author.answer(action, author.rng.choice([RIGHT[action.kind], WRONG[action.kind]]))
            pairs.append(as_pair(row["instruction"], row["output"], wrong, "facts"))
    return pairs


def check(files: dict[str, list[Row]]) -> None:
    """Stop rather than write data whose alignment figures would mean nothing."""
    exam = [row["question"] for row in files[EXAM]]
    heldout = {row["prompt"] for name, rows in files.items() if "heldout" in name for row in rows}
    training = {
        row.get("prompt") or row["instruction"]
        for name, rows in files.items()
        if name.startswith("rlhf/") and "heldout" not in name
        for row in rows
    }
    assert len(set(exam)) == len(exam), "an alignment question occurs twice"
    dev = {row["question"] for row in files[DEV]}
    assert not set(exam) & (training | heldout | dev), "an alignment question occurs in the data"
    assert not dev & (training | heldout), "a question to choose settings by occurs in the data"
    assert not heldout & training, "a held-out question is trained on"
    pairs = files["rlhf/preferences.jsonl"] + files["rlhf/preferences_heldout.jsonl"]
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    lengths = [(len(pair["chosen"]), len(pair["rejected"])) for pair in pairs]
    longer, equal = sum(a > b for a, b in lengths), sum(a == b for a, b in lengths)
    assert 0.4 <= (longer + equal / 2) / len(pairs) <= 0.6, f"length tells the better answer: {longer}, {equal}"


def write_values(train: list[Row]) -> dict[str, str]:
    """Return {file: text}.

    Args:
        train: the rows of sft/train.json, whose facts the ordinary pairs and prompts ask.
    """
    author = Author()
    tuning = author.tuning_rows()
    facts = author.rng.sample(fact_pairs(train, author), NUM_ORDINARY["train"] + NUM_ORDINARY["heldout"])
    # Prompts of the two splits come from different questions too.
    questions = author.rng.sample([row["instruction"] for row in train if not row["input"]], len(train) // 2)
    questions = [question for question in questions if question not in {pair["prompt"] for pair in facts}]
    ordinary = {"train": facts[: NUM_ORDINARY["train"]], "heldout": facts[NUM_ORDINARY["train"] :]}
    half = len(questions) // 2
    files = {
        TUNING: tuning,
        "rlhf/preferences.jsonl": author.pairs("train", ordinary["train"]),
        "rlhf/preferences_heldout.jsonl": author.pairs("heldout", ordinary["heldout"]),
        "rlhf/prompts.jsonl": author.prompts("train", questions[:half]),
        "rlhf/prompts_heldout.jsonl": author.prompts("heldout", questions[half:]),
        EXAM: author.exam(),
        DEV: author.dev(),
    }
    check(files)
    return {name: to_lines(rows, as_list=name.endswith(".json")) for name, rows in files.items()}


def to_lines(rows: Iterable[Row], as_list: bool) -> str:
    """One row a line: a JSON list, or JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n" if as_list else "".join(line + "\n" for line in lines)


def describe_characters(folder: Path) -> str:
    """How much of the written data is in characters of the Chinese corpus, on which the demo's vocabulary is made."""
    corpus = set((folder / "pretrain/zh_train.txt").read_text(encoding="utf-8"))
    text = "".join((folder / name).read_text(encoding="utf-8") for name in (TUNING, EXAM))
    chinese = [char for char in text if "\u4e00" <= char <= "\u9fff"]
    rare = dict.fromkeys(char for char in chinese if char not in corpus)
    share = sum(char in corpus for char in chinese) / len(chinese)
    return f"{share:.1%} of the Chinese characters in {TUNING} and {EXAM} are in the corpus; not: {''.join(rare)}"
