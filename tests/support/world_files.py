"""Files of conversations as others publish them, drawn at random by seed; what each record means is known beforehand.

A conversation is made first; then it is written in one of the layouts and one of the file formats, with the oddities
of such files. What is to be learnt of it is encoded by hand for two templates, without jinja.
"""

import codecs
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from support.fuzz_text import ATOMS

ENDS = ("?", "。", " end", "\n")
TOOL = {"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {"type": "object"}}}
Fate = Literal["sample", "dropped", "bad"]


@dataclass
class Record:
    """A record of a file, and what becomes of it.

    Attributes:
        written: the record, or the text that stands in its place in a file of lines.
        messages: what is learnt from, `weight` 0 on answers that are not; a call has its JSON as content.
        system: with the functions behind it.
    """

    written: Any
    fate: Fate = "sample"
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    planted: list[str] = field(default_factory=list)


@dataclass
class File:
    """A written file, and in which line each of its records begins."""

    path: Path
    records: list[Record]
    lines: list[int]
    planted: list[str]


# ---------------------------------------------------------------- conversations


def draw_text(rng: random.Random) -> str:
    """Also with what looks like control tokens; never blank."""
    atoms = [atom for atom in ATOMS if "\ufeff" not in atom and "▁" not in atom]
    body = "".join(rng.choice(atoms) for _ in range(rng.choice([1, 2, 5, 12])))
    return f"{rng.choice(['', ' ', '好'])}{body}{rng.choice(ENDS)}x"


def draw_turns(rng: random.Random) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": draw_text(rng)}
        for _ in range(rng.choice([1, 1, 2, 3]))
        for role in ("user", "assistant")
    ]


def draw_record(rng: random.Random) -> Record:
    """One conversation, written in one of the layouts, perhaps with something wrong or unusual in it."""
    if rng.random() < 0.12:
        return draw_bad(rng)
    record = Record(None, messages=draw_turns(rng))
    if rng.random() < 0.4:
        record.system = draw_text(rng)
    layout = rng.choice([write_instruction, write_sharegpt, write_messages])
    if layout is write_instruction:
        layout(rng, record, record.messages)
        return record
    turns = [dict(turn) for turn in record.messages]
    for change in sorted(rng.sample(CHANGES, rng.choice([0, 0, 1, 1, 2])), key=CHANGES.index):
        turns = change(rng, record, turns)
        record.planted.append(change.__name__)
    layout(rng, record, turns)
    _settle(record, turns)
    return record


def _settle(record: Record, turns: list[dict[str, Any]]) -> None:
    """What is learnt of these turns by the rules of docs/data, in plain steps."""
    asked = next((number for number, turn in enumerate(turns) if turn["role"] != "assistant"), len(turns))
    turns = turns[asked:]
    joined: list[dict[str, Any]] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"] != "tool":
            if joined[-1].get("weight", 1) != turn.get("weight", 1):
                record.fate = "bad"
                return
            joined[-1]["content"] = "\n\n".join(
                text for text in (joined[-1]["content"], turn["content"]) if text.strip()
            )
        else:
            joined.append(dict(turn))
    if not asked and not any(turn["role"] == "assistant" for turn in joined):
        record.fate = "bad"
        return
    while joined and not (joined[-1]["role"] == "assistant" and joined[-1]["content"].strip()):
        joined.pop()
    for turn in joined:
        if turn["role"] == "assistant" and not turn["content"].strip():
            turn["weight"] = 0
    record.messages = joined
    if not any(turn["role"] == "assistant" and turn.get("weight", 1) for turn in joined):
        record.fate = "dropped"


Turns = list[dict[str, Any]]


def two_in_a_row(rng: random.Random, record: Record, turns: Turns) -> Turns:
    place = rng.randrange(len(turns))
    more = {**turns[place], "content": draw_text(rng)}
    return [*turns[: place + 1], more, *turns[place + 1 :]]


def ends_with_a_question(rng: random.Random, record: Record, turns: Turns) -> Turns:
    return [*turns, {"role": "user", "content": draw_text(rng)}]


def the_assistant_begins(rng: random.Random, record: Record, turns: Turns) -> Turns:
    return [{"role": "assistant", "content": draw_text(rng)}, *turns]


def _place_of_an_answer(rng: random.Random, turns: Turns) -> int:
    return rng.choice([number for number, turn in enumerate(turns) if turn["role"] == "assistant"])


def an_empty_answer(rng: random.Random, record: Record, turns: Turns) -> Turns:
    place = _place_of_an_answer(rng, turns)
    blank = {**turns[place], "content": rng.choice(["", " ", "\n\t", "\u3000"])}
    return [*turns[:place], blank, *turns[place + 1 :]]


def an_answer_without_weight(rng: random.Random, record: Record, turns: Turns) -> Turns:
    place = _place_of_an_answer(rng, turns)
    return [*turns[:place], {**turns[place], "weight": 0}, *turns[place + 1 :]]


def no_answer_at_all(rng: random.Random, record: Record, turns: Turns) -> Turns:
    return [turn for turn in turns if turn["role"] == "user"][:1]


CHANGES = [two_in_a_row, ends_with_a_question, the_assistant_begins, an_empty_answer, an_answer_without_weight]
CHANGES += [no_answer_at_all]


# ---------------------------------------------------------------- layouts


def write_instruction(rng: random.Random, record: Record, turns: Turns) -> None:
    """Alpaca's, with the earlier turns as history."""
    pairs = [[turns[n]["content"], turns[n + 1]["content"]] for n in range(0, len(turns), 2)]
    question, answer = pairs.pop()
    written: dict[str, Any] = {"instruction": question, "output": answer}
    if rng.random() < 0.5:
        head, line, tail = question.partition("\n")
        if line and head and tail:
            written |= {"instruction": head, "input": tail}
    if "input" not in written and rng.random() < 0.7:
        written["input"] = rng.choice(["", None])
    if pairs or rng.random() < 0.2:
        written["history"] = pairs or None
    if record.system is not None:
        written["system"] = record.system
    record.written = _with_more(rng, written)
    if rng.random() < 0.06:
        written["output"] = rng.choice(["", " \n"])
        record.planted.append("an empty output")
        record.written = written
        record.fate, record.messages = "dropped", record.messages[:-1]
        if pairs:  # earlier answers are learnt
            record.fate, record.messages = "sample", record.messages[:-1]


def write_sharegpt(rng: random.Random, record: Record, turns: Turns) -> None:
    names = rng.choice([{"user": "human", "assistant": "gpt"}, {"user": "user", "assistant": "assistant"}])
    names |= {"system": "system"}
    written = [
        {"from": names[turn["role"]], "value": turn["content"], **_others(turn)}
        for turn in _with_system(rng, record, turns)
    ]
    record.written = _with_more(rng, {"id": "identity_0", "conversations": written} | _beside(rng, record, written))


def write_messages(rng: random.Random, record: Record, turns: Turns) -> None:
    written = [
        {"role": turn["role"], "content": _parts(rng, record, turn["content"]), **_others(turn)}
        for turn in _with_system(rng, record, turns)
    ]
    record.written = _with_more(rng, {"messages": written} | _beside(rng, record, written))


def _with_system(rng: random.Random, record: Record, turns: Turns) -> Turns:
    """The system prompt as a first turn; else it stands in a field, see _beside."""
    if record.system is None or rng.random() < 0.3:
        return turns
    return [{"role": "system", "content": record.system}, *turns]


def _beside(rng: random.Random, record: Record, written: Turns) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if record.system is not None and "system" not in (written[0].get("role"), written[0].get("from")):
        fields["system"] = record.system
    if rng.random() < 0.15:
        record.planted.append("tools")
        functions = [TOOL["function"]]
        fields["tools"] = rng.choice(
            [[TOOL], functions, json.dumps(functions), json.dumps([TOOL], ensure_ascii=False)]
        )
        listed = json.dumps(functions, ensure_ascii=False)
        record.system = listed if record.system is None else f"{record.system}\n\n{listed}"
    return fields


def _others(turn: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in turn.items() if name not in ("role", "content")}


def _parts(rng: random.Random, record: Record, text: str) -> Any:
    """As OpenAI's clients write content, too."""
    if rng.random() > 0.1:
        return text
    record.planted.append("content in parts")
    return [{"type": "text", "text": part} for part in text.split("\n", 1)]


def _with_more(rng: random.Random, written: dict[str, Any]) -> dict[str, Any]:
    """Fields that say nothing, in any order."""
    more = {"id": 7, "source": "web", "tools": None, "system": None, "category": None, "score": 0.5, "lang": "中文"}
    chosen = {name: value for name, value in more.items() if rng.random() < 0.15 and name not in written}
    items = list((written | chosen).items())
    rng.shuffle(items)
    return dict(items)


def draw_bad(rng: random.Random) -> Record:
    """A record that cannot be used."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    name = rng.choice(list(BAD))
    return Record(BAD[name](turns), "bad", planted=[name])


class Line(str):
    """What stands in a file of lines as it is."""


BAD: dict[str, Callable[[Turns], Any]] = {
    "null content": lambda turns: {"messages": [turns[0], {"role": "assistant", "content": None}]},
    "a number as content": lambda turns: {"messages": [{"role": "user", "content": 3}, turns[1]]},
    "an object as content": lambda turns: {"messages": [{"role": "user", "content": {"text": "a"}}, turns[1]]},
    "an image": lambda turns: {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, turns[1]]},
    "an unknown role": lambda turns: {"messages": [turns[0], {"role": "narrator", "content": "b"}]},
    "no role": lambda turns: {"messages": [turns[0], {"content": "b"}]},
    "no turns": lambda turns: {"messages": []},
    "turns as text": lambda turns: {"conversations": "a"},
    "a turn as text": lambda turns: {"conversations": ["a", "b"]},
    "no known field": lambda turns: {"question": "a", "answer": "b"},
    "an instruction alone": lambda turns: {"instruction": "a"},
    "a null output": lambda turns: {"instruction": "a", "output": None},
    "a number as output": lambda turns: {"instruction": "a", "output": 42},
    "a list as instruction": lambda turns: {"instruction": ["a"], "output": "b"},
    "history of three": lambda turns: {"instruction": "a", "output": "b", "history": [["a", "b", "c"]]},
    "history as text": lambda turns: {"instruction": "a", "output": "b", "history": "none"},
    "a system prompt as list": lambda turns: {"messages": turns, "system": ["a"]},
    "tools as text": lambda turns: {"messages": turns, "tools": "call me"},
    "a weight of a half": lambda turns: {"messages": [turns[0], {**turns[1], "weight": 0.5}]},
    "a question with weight": lambda turns: {"messages": [{**turns[0], "weight": 1}, turns[1]]},
    "half a surrogate pair": lambda turns: Line('{"instruction": "\\ud83d", "output": "b"}'),
    "a list": lambda turns: turns,
    "a number": lambda turns: 3,
    "null": lambda turns: None,
    "text": lambda turns: "instruction",
    "an empty object": lambda turns: {},
    "broken JSON": lambda turns: Line('{"instruction": "a", "output": }'),
    "cut JSON": lambda turns: Line('{"instruction": "a", "output": "b'),
    "two records in a line": lambda turns: Line(
        '{"instruction": "a", "output": "b"}{"instruction": "a", "output": "b"}'
    ),
    "a number of 5,000 digits": lambda turns: Line('{"instruction": "a", "output": "b", "id": ' + "9" * 5000 + "}"),
    "deep": lambda turns: Line('{"instruction": "a", "output": "b", "id": ' + "[" * 3000 + "]" * 3000 + "}"),
    "very deep": lambda turns: Line(
        '{"instruction": "a", "output": "b", "id": ' + "[" * 100_000 + "]" * 100_000 + "}"
    ),
    "bytes that are no UTF-8": lambda turns: Line('{"instruction": "a\udcff", "output": "b"}'),
}
# What no record of one list can be: the whole file is broken.
BREAKS_LISTS = ("broken JSON", "cut JSON", "two records in a line", "a number of 5,000 digits", "deep", "very deep")


# ---------------------------------------------------------------- files


def draw_file(seed: int, folder: Path) -> File:
    """A file of up to twelve records, most of them good."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    records = [draw_record(rng) for _ in range(rng.choice([1, 4, 12]))]
    kind = rng.choice(["jsonl", "jsonl", "list", "indented", "objects"])
    planted = [kind]
    if kind != "jsonl":
        records = [record for record in records if not set(record.planted) & set(BREAKS_LISTS)] or [draw_good(rng)]
    breaks = rng.choice(["\n", "\n", "\r\n"])
    texts = []
    for record in records:
        raw = isinstance(record.written, Line)
        indent = 1 if kind == "indented" and not raw else None
        text = record.written if raw else json.dumps(record.written, ensure_ascii=rng.random() < 0.3, indent=indent)
        texts.append(text.replace("\n", breaks))
    blank = breaks * rng.choice([0, 0, 2])
    between = {"jsonl": breaks + blank, "list": f",{breaks}", "indented": f",{breaks}", "objects": breaks + blank}[
        kind
    ]
    head, tail = ("[", breaks + "]") if kind in ("list", "indented") else (blank, rng.choice(["", breaks]))
    lines = [1 + (head + between.join([*texts[:number], ""])).count("\n") for number in range(len(texts))]
    content = (head + between.join(texts) + tail).encode("utf-8", "surrogateescape")
    if rng.random() < 0.2:
        planted.append("BOM")
        content = codecs.BOM_UTF8 + content
    if breaks == "\r\n":
        planted.append("CRLF")
    path = folder / f"data.{'jsonl' if kind == 'jsonl' else 'json'}"
    path.write_bytes(content)
    names = list(itertools.chain.from_iterable(record.planted for record in records))
    return File(path, records, lines, [*planted, *names])


def draw_good(rng: random.Random) -> Record:
    while (record := draw_record(rng)).fate != "sample":
        pass
    return record


# ---------------------------------------------------------------- what is learnt, by hand

Encode = Callable[[str], list[int]]
Piece = tuple[list[int], bool]  # ids, and whether they are trained


def _split(encode: Encode, head: str, answer: str) -> list[Piece]:
    """A prompt's last words and the answer: what stands before the answer is what is encoded when answering."""
    before, whole = encode(head), encode(head + answer)
    rest = whole[len(before) :] if whole[: len(before)] == before else encode(answer)
    return [(before, False), (rest, True)]


def learn_chatml(record: Record, encode: Encode, start: int, end: int) -> list[Piece]:
    turns = [{"role": "system", "content": record.system}] if record.system else []
    pieces: list[Piece] = []
    for turn in [*turns, *record.messages]:
        trained = turn["role"] == "assistant" and turn.get("weight", 1) != 0
        pieces.append(([start], False))
        if trained:
            pieces += _split(encode, "assistant\n", turn["content"])
        else:
            pieces.append((encode(f"{turn['role']}\n{turn['content']}"), False))
        pieces += [([end], trained), (encode("\n"), False)]
    while pieces and pieces[-1][0] != [end]:
        pieces.pop()
    return [*pieces, (encode("\n"), False)]


def learn_mixtral(record: Record, encode: Encode, bos: int, eos: int) -> list[Piece]:
    """The brackets of the project's own template of that name, the system prompt before the first question."""
    pieces: list[Piece] = []
    system = f"{record.system}\n\n" if record.system else ""
    head = ""
    for turn in record.messages:
        if turn["role"] == "user":
            pieces.append(([bos], False))
            head, system = f"[INST] {system}{turn['content']} [/INST]", ""
        elif turn.get("weight", 1):
            pieces += [*_split(encode, head, f" {turn['content']}"), ([eos], True)]
        else:
            pieces += [(encode(f"{head} {turn['content']}"), False), ([eos], False)]
    return pieces
