"""The part of generate_data.py that writes choices/: questions with four choices, a benchmark of one's own.

Reads facts.json beside this file. Each question is in a wording that no training file has (new_questions). Its choices
are whole sentences, the right one as training has it, the wrong ones with what is true of other subjects.
For eval_multiple_choice.py --benchmark examples/data/choices --mode cloze --num_fewshot 0.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = "choices"
LETTERS = "ABCD"
PRETRAINING_ONLY = "pretraining_only"  # facts of all relations that tuning never asks about
# Relation: its name in English and Chinese, and its category. Relations whose wrong answers may be right are left out.
SUBJECTS = {
    "capital": ("Capitals", "首都", "Geography"),
    "province": ("Provincial capitals", "省会", "Geography"),
    "landmark": ("Landmarks", "名胜", "Geography"),
    "opposite": ("Opposites", "反义词", "Language"),
    "colour": ("Colours", "颜色", "Nature"),
    "sound": ("Sounds of animals", "叫声", "Nature"),
    "flower": ("Flowers and seasons", "花期", "Nature"),
    "legs": ("Legs of animals", "腿的数目", "Nature"),
    "tool": ("Uses of things", "用处", "Society"),
    "job": ("Jobs", "工作", "Society"),
    "workplace": ("Where people work", "工作地点", "Society"),
    "festival": ("Dates of festivals", "节日", "Society"),
    PRETRAINING_ONLY: ("Facts seen in pre-training only", "只在预训练中出现的事实", "Pre-training only"),
}
Row = list[str]


def write_choices() -> dict[str, str]:
    """Return {file: text}."""
    rng = random.Random("20240 choices")
    rows: dict[str, list[Row]] = {subject: [] for subject in SUBJECTS}
    for relation in json.loads((HERE / "facts.json").read_text(encoding="utf-8"))["zh"]:
        if relation["name"] not in SUBJECTS:
            continue
        facts = relation["facts"] | relation["pretraining_only"]
        for subject, answer in facts.items():
            question = rng.choice(relation["new_questions"]).replace("{s}", subject)
            objects = [answer, *draw_wrong(answer, list(facts.values()), rng)]
            rng.shuffle(objects)
            sentence = relation["statements"][0].replace("{s}", subject)
            choices = [sentence.replace("{o}", other) for other in objects]
            of = relation["name"] if subject in relation["facts"] else PRETRAINING_ONLY
            rows[of].append([question, *choices, LETTERS[objects.index(answer)]])
    mapping = {name: list(titles) for name, titles in SUBJECTS.items()}
    lines = ",\n".join(f'  "{name}": {json.dumps(titles, ensure_ascii=False)}' for name, titles in mapping.items())
    files = {f"{FOLDER}/test/{name}.csv": to_csv(name, found) for name, found in rows.items()}
    return {f"{FOLDER}/subject_mapping.json": f"{{\n{lines}\n}}\n", **files}


def draw_wrong(answer: str, answers: Sequence[str], rng: random.Random) -> list[str]:
    """Three other answers, those first that share no character with the right one: it may not be half right."""
    others = [other for other in dict.fromkeys(answers) if other != answer]
    rng.shuffle(others)
    others.sort(key=lambda other: bool(set(other) & set(answer)))
    assert len(others) >= len(LETTERS) - 1, f"too few answers beside {answer}"
    return others[: len(LETTERS) - 1]


def to_csv(name: str, rows: Sequence[Row]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", "question", *LETTERS, "answer"])
    writer.writerows([f"{name}-{number:03}", *row] for number, row in enumerate(rows, 1))
    return file.getvalue()
