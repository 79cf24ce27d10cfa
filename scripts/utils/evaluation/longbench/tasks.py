"""LongBench's 21 tasks: what is asked, how long an answer may be, and what it is measured by.

Prompts and lengths are those of THUDM/LongBench's published tables (MIT licence), byte for byte, with their
misspellings: they are part of the benchmark.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.files import atomic_folder
from ...core.hub import fetch, find_folder, is_hub_id
from ...core.records import iter_records, spread_evenly

LANGUAGES = ("zh", "en", "code")
SINGLE, MULTI, SUMMARY, FEW_SHOT, CODE, SYNTHETIC = GROUPS = (
    "single-doc QA",
    "multi-doc QA",
    "summarization",
    "few-shot",
    "code",
    "synthetic",
)


@dataclass(frozen=True)
class Task:
    """A dataset of LongBench.

    Attributes:
        metric: a name that metrics.find_metric knows.
        max_new_tokens: longest answer.
        in_e: whether LongBench-E has it.
        chat: whether chat models are asked in their template; they do better without it where examples or code are
            to be continued.
        first_line: whether the first line of an answer is all that counts.
        one_line: whether the answer ends at a newline, and does not begin with one.
        long_fields: the fields that may be cut where a prompt is too long.
    """

    name: str
    group: str
    language: str
    metric: str
    max_new_tokens: int
    prompt: str
    in_e: bool = False
    chat: bool = True
    first_line: bool = False
    one_line: bool = False
    long_fields: tuple[str, ...] = ("context",)

    def fill(self, context: str, question: str) -> str:
        """The prompt of a sample."""
        return self.prompt.format(context=context, input=question)


# ---------------------------------------------------------------- the tasks

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
_STORY = "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"

_ALL = (
    Task(
        "narrativeqa", SINGLE, "en", "qa_f1", 128,
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_STORY}Story: {{context}}\n\nNow, answer the question based on the story {_STORY}"
        "Question: {input}\n\nAnswer:",
    ),
    Task(
        "qasper", SINGLE, "en", "qa_f1", 128,
        f"You are given a scientific article and a question. Answer the question {_ARTICLE}Article: {{context}}\n\n "
        f"Answer the question based on the above article {_ARTICLE}Question: {{input}}\n\nAnswer:",
        in_e=True,
    ),
    Task(
        "multifieldqa_en", SINGLE, "en", "qa_f1", 64,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        in_e=True,
    ),
    Task(
        "multifieldqa_zh", SINGLE, "zh", "qa_f1_zh", 64,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，"
        "不要输出任何其他字词。\n\n问题：{input}\n回答：",
    ),
    Task("hotpotqa", MULTI, "en", "qa_f1", 32, _PASSAGES, in_e=True),
    Task("2wikimqa", MULTI, "en", "qa_f1", 32, _PASSAGES, in_e=True),
    Task("musique", MULTI, "en", "qa_f1", 32, _PASSAGES),
    Task(
        "dureader", MULTI, "zh", "rouge_l_zh", 128,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n"
        "问题：{input}\n回答：",
    ),
    Task(
        "gov_report", SUMMARY, "en", "rouge_l", 512,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n"
        "{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        in_e=True,
    ),
    Task(
        "qmsum", SUMMARY, "en", "rouge_l", 512,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
    ),
    Task(
        "multi_news", SUMMARY, "en", "rouge_l", 512,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
        "Now, write a one-page summary of all the news.\n\nSummary:",
        in_e=True,
    ),
    Task(
        "vcsum", SUMMARY, "zh", "rouge_l_zh", 512,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    ),
    Task(
        "trec", FEW_SHOT, "en", "classification", 64,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        in_e=True, chat=False, first_line=True,
    ),
    Task(
        "triviaqa", FEW_SHOT, "en", "qa_f1", 32,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        in_e=True, chat=False, first_line=True,
    ),
    Task(
        "samsum", FEW_SHOT, "en", "rouge_l", 128,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        in_e=True, chat=False, first_line=True, one_line=True,
    ),
    Task(
        "lsht", FEW_SHOT, "zh", "classification", 64,
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
        chat=False, first_line=True,
    ),
    Task(
        "passage_count", SYNTHETIC, "en", "count", 32,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        in_e=True,
    ),
    Task(
        "passage_retrieval_en", SYNTHETIC, "en", "retrieval", 32,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the "
        'paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        in_e=True,
    ),
    Task(
        "passage_retrieval_zh", SYNTHETIC, "zh", "retrieval_zh", 32,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"
        '下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n'
        "答案是：",
    ),
    Task(
        "lcc", CODE, "code", "code_similarity", 64,
        "Please complete the code given below. \n{context}Next line of code:\n",
        in_e=True, chat=False,
    ),
    Task(
        "repobench-p", CODE, "code", "code_similarity", 64,
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        in_e=True, chat=False, long_fields=("context", "input"),  # the input is the file up to the line, also long
    ),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def select_tasks(names: Sequence[str], e: bool) -> list[Task]:
    """The tasks of languages (zh, en, code) and datasets by name, in LongBench's order; `e`: those of LongBench-E.

    Raises: InputError for an unknown name, or where LongBench-E has nothing of what was asked for.
    """
    unknown = [name for name in names if name not in (*LANGUAGES, *TASKS)]
    if unknown:
        raise InputError(
            f"--predict_on {','.join(unknown)}: need some of {', '.join(LANGUAGES)}, or datasets: {', '.join(TASKS)}"
        )
    absent = [name for name in names if e and name in TASKS and not TASKS[name].in_e]
    found = [task for task in TASKS.values() if {task.name, task.language} & set(names) and (task.in_e or not e)]
    if absent or not found:
        known = ", ".join(task.name for task in TASKS.values() if task.in_e)
        raise InputError(f"LongBench-E has nothing of --predict_on {','.join(absent or names)}; it has {known}")
    return found


HUB_ID = "THUDM/LongBench"
ARCHIVE = "data.zip"  # of the hub; its files are data/<dataset>.jsonl
NUMBERED = {"retrieval": "Paragraph ", "retrieval_zh": "段落"}  # what an answer measured so says before its number


@dataclass(frozen=True)
class Sample:
    """A question with its long text and all its right answers; `length` is in words, in Chinese in characters."""

    context: str
    question: str
    answers: list[str]
    all_classes: list[str] | None
    length: int
    location: str


def find_data(name: str) -> Path:
    """The folder of the .jsonl files: a folder (or `data` in it), or the download of a dataset's hub id.

    Raises: InputError if there is no such folder and the hub has (or reaches) nothing of that name.
    """
    if path := find_folder(name):
        return path / "data" if any(path.glob("data/*.jsonl")) and not any(path.glob("*.jsonl")) else path
    remedy = f"download {ARCHIVE} of {HUB_ID} where there is a network, unzip it, and pass that folder as --data_dir"
    if not is_hub_id(name):
        raise InputError(f"--data_dir {name} is no folder; {remedy}")
    from huggingface_hub import hf_hub_download

    def download(hub_id: str) -> str:
        return hf_hub_download(hub_id, ARCHIVE, repo_type="dataset")

    return _unpack(fetch(name, "data", download, f"; {remedy}"))


def _unpack(archive: Path) -> Path:
    """The folder, beside the archive, of the files in it."""
    folder = archive.with_name("longbench_data")
    if not folder.is_dir():
        with atomic_folder(folder) as partial, zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                if member.filename.endswith(".jsonl"):
                    (partial / Path(member.filename).name).write_bytes(packed.read(member))
    return folder


def find_files(folder: Path, tasks: Sequence[Task], e: bool) -> dict[str, Path]:
    """{task: its file}. Raises: InputError that names all that are missing."""
    files = {task.name: folder / f"{task.name}{'_e' if e else ''}.jsonl" for task in tasks}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        there = [name for name in files if name not in missing]
        choice = f"leave them out: --predict_on {','.join(there)}" if there else "pass another --data_dir"
        names = ", ".join(files[name].name for name in missing)
        raise InputError(f"{folder} has no {names}; put them there, or {choice}")
    return files


def read_samples(path: Path, task: Task, max_samples: int | None = None) -> list[Sample]:
    """The samples of a dataset's file.

    Args: max_samples: so many are kept, spread evenly over the file; None: all.
    Raises: InputError naming the line, for a field that is missing or is not what LongBench publishes.
    """
    samples = [_read_sample(record, location, task) for location, record in iter_records(path)]
    if not samples:
        raise InputError(f"{path}: no sample in it")
    return spread_evenly(samples, max_samples)


def _read_sample(record: Mapping[str, Any], location: str, task: Task) -> Sample:
    context, question, answers, classes, length = (
        record.get(name) for name in ("context", "input", "answers", "all_classes", "length")
    )
    kind = "a list of texts" if task.metric == "classification" else "a list of texts, or null"
    number = NUMBERED.get(task.metric)
    checks = [
        ("context", "text", isinstance(context, str) and bool(context.strip())),
        ("input", "text, which may be empty", isinstance(question, str)),
        ("answers", "a list of texts", _is_texts(answers)),
        ("all_classes", kind, _is_texts(classes) or (classes is None and task.metric != "classification")),
        ("length", "a whole number", type(length) is int),
        ("dataset", f"'{task.name}'", record.get("dataset", task.name) in (task.name, f"{task.name}_e")),
    ]
    if number and _is_texts(answers):
        numbered = all(re.search(rf"{number}\d", answer) for answer in answers or ())
        checks.append(("answers", f"texts such as '{number}1'", numbered))
    for name, need, holds in checks:
        if not holds:
            found = f"is {record[name]!r:.40}" if name in record else "is missing"
            fields = ", ".join(sorted(record))
            raise InputError(f"{location}: field '{name}' {found}, need {need}; the record has {fields}")
    return Sample(str(context), str(question), list(answers or ()), classes, int(length or 0), location)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
