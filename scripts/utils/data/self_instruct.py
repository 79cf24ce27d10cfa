"""Self-Instruct: tasks that a model writes after the example of others, read from its answer, and kept where new.

Source: Wang et al. 2023, Self-Instruct, section 2; the first generation of this recipe asked a server's model so too.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.errors import InputError
from ..core.files import json_problem
from ..core.records import BadRecords, iter_records, text_field

Language = Literal["zh", "en"]
SEEDS_SHOWN, OWN_SHOWN = 3, 1  # examples of a request: seed tasks, and tasks that were written before
_GAP = 0xE000  # where code points go on after the surrogates, which stand in no text
LEAST_LENGTH, MOST_LENGTH = 4, 2000  # characters of an instruction

# What a request says. {count} and {examples} are filled in.
REQUESTS: dict[Language, str] = {
    "zh": """请为训练中文助手写 {count} 道新任务，每道任务带上正确、完整的回答。要求：
1. 任务之间、与下面的例子之间都不能雷同；题材、句式、难度要多样，
形式也要多样（问答、写作、改写、分类、抽取、推理、计算、编程……）。
2. 任务只凭文字就能完成，不要求看图、听声音、上网、打开文件或知道今天的日期。
3. instruction 说明要做什么，用中文写；需要材料时写进 input，否则 input 为空字符串；output 是回答，简洁而准确。
4. 不编造事实；没有把握的题目不要写。
5. 每行写一个 JSON 对象，字段为 instruction、input、output，换行写成 \\n；除此之外什么都不要写。

例子：
{examples}
""",
    "en": """Write {count} new tasks for training an assistant, each with a correct and complete answer. Rules:
1. No task may resemble another one or the examples below; vary the subject, the wording, the difficulty and the form
(questions, writing, rewriting, classification, extraction, reasoning, sums, code ...).
2. Text is all that a task needs: no pictures, no sound, no web, no files, no knowledge of today's date.
3. instruction says in English what is to be done; material that it needs goes into input, which is an empty string
otherwise; output is the answer, short and exact.
4. Invent no facts; leave out what you are not sure of.
5. One JSON object a line with the fields instruction, input and output, line breaks written as \\n; nothing else.

Examples:
{examples}
""",
}

# What a text model cannot do, as far as words say so.
_BEYOND_TEXT = re.compile(
    r"图片|图像|照片|视频|音频|录音|上图|下图|附件|链接"
    r"|\b(?:image|picture|photo|video|audio|attached|attachment|link below)s?\b",
    re.I,
)


@dataclass(frozen=True)
class Task:
    """A record that sft.py reads."""

    instruction: str
    input: str
    output: str

    def record(self) -> dict[str, str]:
        """In the Alpaca format."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output}


def read_seeds(path: str | Path) -> list[Task]:
    """Tasks written by people. Raises: InputError naming file and line."""
    if not Path(path).is_file():
        raise InputError(f"--seed_tasks {path}: no such file")
    tasks = []
    for location, record in iter_records(path, BadRecords()):
        if not isinstance(record.get("input") or "", str):
            raise InputError(f"{location}: field 'input' is {record['input']!r:.40}, need text")
        instruction, output = (text_field(record, name, location) for name in ("instruction", "output"))
        tasks.append(Task(instruction, (record.get("input") or "").strip(), output))
    return tasks


def language_of(task: Task) -> Language:
    """What a task is asked in: Chinese where its instruction has a Chinese character."""
    return "zh" if re.search(r"[\u4e00-\u9fff]", task.instruction) else "en"


def write_request(
    seeds: Sequence[Task], kept: Sequence[Task], count: int, language: Language, draw: random.Random
) -> str:
    """The text that asks for `count` tasks, after some seeds and some of those that were kept."""
    examples = draw.sample(seeds, min(SEEDS_SHOWN, len(seeds))) + draw.sample(kept, min(OWN_SHOWN, len(kept)))
    draw.shuffle(examples)
    lines = [json.dumps(task.record(), ensure_ascii=False) for task in examples]
    return REQUESTS[language].format(count=count, examples="\n".join(lines))


def read_answer(text: str) -> tuple[list[Task], Counter[str]]:
    """The tasks of an answer, one JSON object a line or a list of them, and how many were left out, by the reason.

    What stands around them (fences, numbers, remarks) is passed over; an object that breaks off, at the end of an
    answer that was cut, is left out.
    """
    tasks: list[Task] = []
    left_out: Counter[str] = Counter()
    decoder = json.JSONDecoder(strict=False)  # models put line breaks into texts as they are
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            cut = isinstance(error, RecursionError) or "}" not in text[position:]
            left_out["cut off" if cut else f"broken JSON: {json_problem(error).partition(' (')[0]}"] += 1
            end = position + 1 if isinstance(error, RecursionError) else _next_line(text, position)
        else:
            if _holds_tasks(value):  # {"tasks": [...]}: look inside
                end = position + 1
            elif reason := _fault(value):
                left_out[reason] += 1
            else:
                fields = (str(value.get(name) or "").strip() for name in ("instruction", "input", "output"))
                tasks.append(Task(*fields))
        position = text.find("{", end)
    if not tasks and not left_out:
        left_out["no JSON in the answer"] += 1
    return tasks, left_out


def _holds_tasks(value: object) -> bool:
    return (
        isinstance(value, dict)
        and "instruction" not in value
        and any(isinstance(item, dict) for part in value.values() if isinstance(part, list) for item in part)
    )


def _next_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _fault(value: object) -> str | None:
    """Why what a model wrote is no task to train on; None: it is one."""
    if not isinstance(value, dict) or not {"instruction", "output"} <= value.keys():
        return "fields missing"
    if any(not isinstance(value.get(name) or "", str) for name in ("instruction", "input", "output")):
        return "a field is no text"
    instruction, output = ((value[name] or "").strip() for name in ("instruction", "output"))
    if not output:
        return "no answer"
    if not LEAST_LENGTH <= len(instruction) <= MOST_LENGTH:
        return "instruction too short or too long"
    if _BEYOND_TEXT.search(instruction):
        return "needs more than text"
    return "answer repeats the instruction" if output == instruction else None


# ---------------------------------------------------------------- what is new


def units(text: str) -> list[str]:
    """What ROUGE counts: words and numbers, and in Chinese each character."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff_]+", text.lower())


class Pool:
    """The instructions that are there, among which a new one is looked for.

    ROUGE-L is the F1 of the longest common subsequence: 2 LCS / (m + n). That is rapidfuzz's normalised Indel
    similarity, computed for all instructions at once.
    """

    def __init__(self, threshold: float) -> None:
        """`threshold`: one at least so similar to an instruction of the pool is not new, 0-1."""
        self.threshold = threshold
        self._texts: list[str] = []
        self._coded: list[str] = []
        self._codes: dict[str, str] = {}

    def add(self, instructions: Iterable[str]) -> None:
        """Put them in, whatever they are like."""
        for text in instructions:
            self._texts.append(text)
            self._coded.append(self._encode(text))

    def nearest(self, instruction: str) -> tuple[float, str] | None:
        """The ROUGE-L and the text of the most similar instruction that is too similar; None: it is new."""
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        found = process.extractOne(
            self._encode(instruction),
            self._coded,
            processor=None,
            scorer=Indel.normalized_similarity,
            score_cutoff=self.threshold,
        )
        return None if found is None else (float(found[1]), self._texts[found[2]])

    def _encode(self, text: str) -> str:
        # A character a unit, so that rapidfuzz compares strings, which is many times faster than lists of words.
        return "".join(self._codes.setdefault(unit, chr(_GAP + len(self._codes))) for unit in units(text))
