"""The report on a recipe's run folder: what every stage cost and bought.

A later stage adds its part by one more function that takes the run and returns a Section, listed in `build_report`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .arguments import RUN_CONFIG
from .charts import bar_chart, line_chart
from .files import InputError, iter_records, read_json, write_json
from .report import (
    Answer,
    Card,
    Cards,
    Cell,
    Commands,
    Paragraph,
    Picture,
    Pictures,
    Report,
    Section,
    Step,
    Strip,
    Table,
    Text,
    duration,
    percent,
    write_report,
)

SUMMARY = "summary.json"
STAGE_LOG = "stages.jsonl"
TARGET_KIND = "unseen_wording"  # the kind of question that tuning promises to answer
TARGETS = {"zh_drop": 0.60, "en_rise": 0.05, "exact_match": 0.90, "seconds": 480, "memory_gb": 4}
NUM_SAMPLES = {TARGET_KIND: 8, "unseen_operands": 3, "pretraining_only": 3}
LANGUAGES = {"zh": Text("中文", "Chinese"), "en": Text("英文", "English")}


class Stage(NamedTuple):
    """A stage of the recipe, the file that shows it is finished, and the launcher that makes it."""

    title: Text
    mark: str
    launcher: str


# By folder, in the order they run.
STAGES = {
    "base_tokenizer": Stage(Text("英文词表", "English vocabulary"), "tokenizer.model", "run_train_tokenizer.sh"),
    "base": Stage(Text("英文基座，从零训练", "English base, from scratch"), "all_results.json", "run_pt.sh"),
    "zh_tokenizer": Stage(Text("中文词表", "Chinese vocabulary"), "tokenizer.model", "run_train_tokenizer.sh"),
    "merged_tokenizer": Stage(Text("合并词表", "Merged vocabulary"), "vocabulary_report.json", "run_merge_tokenizers.sh"),
    "pretrain": Stage(Text("继续预训练", "Continued pre-training"), "all_results.json", "run_pt.sh"),
    "pretrained": Stage(Text("合并 LoRA", "LoRA merged"), "merge_report.json", "run_merge.sh"),
    "sft": Stage(Text("指令精调", "Instruction tuning"), "all_results.json", "run_sft.sh"),
    "assistant": Stage(Text("合并为助手", "Merged assistant"), "merge_report.json", "run_merge.sh"),
}
ANSWERS = {
    "base": Stage(Text("回答：基座", "Answers: base"), "answers/base.json", "run_inference.sh"),
    "adapter": Stage(Text("回答：适配器", "Answers: adapter"), "answers/adapter.json", "run_inference.sh"),
    "assistant": Stage(Text("回答：合并后", "Answers: merged"), "answers/assistant.json", "run_inference.sh"),
}
TRAINING = ("base", "pretrain", "sft")
KINDS = {
    TARGET_KIND: Text("新问法（事实在精调中问过）", "Unseen wording of facts asked in tuning"),
    "seen_with_other_facts": Text("— 问法见于其他事实", "— wording seen with other facts"),
    "never_seen": Text("— 问法从未见过", "— wording never seen"),
    "unseen_operands": Text("算术，数字组合未见过", "Arithmetic, unseen operands"),
    "pretraining_only": Text("只在预训练文本中出现的事实", "Facts seen in pre-training only"),
}
PIECE_COUNTS = {
    "candidates": Text("候选词", "pieces offered"),
    "already_in_base": Text("原词表已有", "already in the base"),
    "base_language": Text("去除：会改变英文切分", "dropped: would cut the base's language anew"),
    "in_base_language_sample": Text("去除：见于英文样本", "dropped: found in the base-language sample"),
    "unreachable": Text("去除：任何文本都切不出", "dropped: no text is cut into them"),
    "beyond_max_new_tokens": Text("未取：超过上限", "left out: beyond --max_new_tokens"),
    "added": Text("加入", "added"),
}


# ---------------------------------------------------------------- reading the run folder


@dataclass
class RecipeRun:
    """What the stages of a recipe left behind."""

    folder: Path
    stages: dict[str, dict[str, Any]]  # name -> seconds, peak_memory_gb; the last run of each
    results: dict[str, dict[str, Any]]  # training stage -> metrics
    history: dict[str, list[dict[str, Any]]]  # training stage -> log lines
    vocabulary: dict[str, Any]
    embedding_init: dict[str, dict[str, float]]  # method -> language -> bits per byte
    init_method: str
    merges: dict[str, dict[str, Any]]
    questions: list[dict[str, Any]]
    answers: dict[str, list[str]]  # base, adapter, assistant -> one a question


def load_run(folder: Path, questions_file: Path) -> RecipeRun:
    """Read a recipe's run folder.

    Raises: InputError that names every unfinished stage with the command that makes it, or a file that does not fit.
    """
    refuse_unfinished(folder)
    questions = [record for _, record in iter_records(questions_file)]
    if not any(question.get("kind") == TARGET_KIND for question in questions):
        raise InputError(f"{questions_file}: no question has kind {TARGET_KIND!r}; pass the recipe's held-out questions")
    init_file = folder / "pretrain" / "embedding_init.json"
    if not init_file.is_file():
        raise InputError(f"stage 'pretrain' has no {init_file}; run pt.py with --compare_embedding_init and --restart")
    stages = {}
    for location, line in iter_records(folder / STAGE_LOG):
        stages[str(need(line, "name", location))] = {
            key: float(need(line, key, location)) for key in ("seconds", "peak_memory_gb")
        }
    return RecipeRun(
        folder=folder,
        stages=stages,
        results={name: read_json(folder / name / "all_results.json") for name in TRAINING},
        history={name: read_json(folder / name / "trainer_state.json")["log_history"] for name in TRAINING},
        vocabulary=read_json(folder / "merged_tokenizer" / "vocabulary_report.json"),
        embedding_init=read_json(init_file),
        init_method=read_settings(folder / "pretrain").get("embedding_init", "mean_of_pieces"),
        merges={name: read_json(folder / name / "merge_report.json") for name in ("pretrained", "assistant")},
        questions=questions,
        answers={name: read_answers(folder / stage.mark, questions) for name, stage in ANSWERS.items()},
    )


def refuse_unfinished(folder: Path) -> None:
    """Raises: InputError with every stage whose last file is missing."""
    if not folder.is_dir():
        raise InputError(f"--run_dir {folder} is no folder; `OUT={folder} bash scripts/run_demo.sh` makes it")
    marks = {name: (f"{name}/{stage.mark}", stage.launcher) for name, stage in STAGES.items()}
    marks |= {f"answers_{name}": (stage.mark, stage.launcher) for name, stage in ANSWERS.items()}
    missing = [
        f"stage '{name}' is not finished: no {folder / mark}; scripts/{launcher} makes it"
        for name, (mark, launcher) in marks.items()
        if not (folder / mark).is_file()
    ]
    if not (folder / STAGE_LOG).is_file():
        missing.append(f"no {folder / STAGE_LOG}; run_demo.sh writes it, a line a stage")
    if missing:
        missing.append(f"run `OUT={folder} bash scripts/run_demo.sh`: it skips finished stages and makes the others")
        raise InputError("\n".join(missing))


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in a stage's run_config.yaml; {} if there is none."""
    import yaml

    path = folder / RUN_CONFIG
    return (yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None) or {}


def read_answers(path: Path, questions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The outputs of one predictions file. Raises: InputError if they answer other questions."""
    records = list(iter_records(path))
    if len(records) != len(questions):
        raise InputError(
            f"{path} answers {len(records)} questions, the questions file has {len(questions)}; delete it and rerun its stage"
        )
    for (location, record), question in zip(records, questions, strict=True):
        if question["instruction"].strip() not in str(need(record, "Input", location)):
            raise InputError(f"{location}: answers another question than {question['instruction']!r}; rerun its stage")
    return [str(need(record, "Output", location)) for location, record in records]


def need(mapping: Mapping[str, Any], key: str, where: str | Path) -> Any:
    """mapping[key]. Raises: InputError that names the file."""
    if key not in mapping:
        raise InputError(f"{where}: no '{key}'; it has {', '.join(map(str, mapping)) or 'nothing'}")
    return mapping[key]


# ---------------------------------------------------------------- figures


def summarise(run: RecipeRun) -> dict[str, Any]:
    """The figures of summary.json: seconds, 1e9 bytes, bits per byte, shares from 0 to 1."""

    def bits(stage: str, language: str) -> float:
        return float(need(run.results[stage], f"eval_{language}_bits_per_byte", run.folder / stage / "all_results.json"))

    extended = need(run.embedding_init, run.init_method, "embedding_init.json")
    bits_per_byte = {
        language: {
            "base": bits("base", language),
            "extended": float(need(extended, language, "embedding_init.json")),
            "pretrained": bits("pretrain", language),
        }
        for language in LANGUAGES
    }
    by_kind = exact_match_by(run, [question.get("kind", "other") for question in run.questions])
    return {
        "seconds": round(sum(stage["seconds"] for stage in run.stages.values()), 1),
        "peak_memory_gb": max((stage["peak_memory_gb"] for stage in run.stages.values()), default=0.0),
        "stage_seconds": {name: stage["seconds"] for name, stage in run.stages.items()},
        "bits_per_byte": bits_per_byte,
        "exact_match": {side: by_kind[TARGET_KIND][side] for side in ("base", "sft")},
        "exact_match_by_kind": by_kind,
        "vocabulary": {
            "base": need(run.vocabulary, "base_vocabulary", "vocabulary_report.json"),
            "merged": need(run.vocabulary, "vocabulary", "vocabulary_report.json"),
        },
        "merged_equals_adapter": run.answers["assistant"] == run.answers["adapter"],
    }


def is_exact(answer: str, question: Mapping[str, Any]) -> bool:
    """Whether an answer is the expected one but for white space around it."""
    return answer.strip() == str(question["output"]).strip()


def exact_match_by(run: RecipeRun, groups: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """Share of exact answers before and after tuning in every group; `groups` names that of each question, or None."""
    result: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(name for name in groups if name is not None):
        members = [index for index, name in enumerate(groups) if name == group]
        shares = {
            side: sum(is_exact(run.answers[source][index], run.questions[index]) for index in members) / len(members)
            for side, source in (("base", "base"), ("sft", "assistant"))
        }
        result[group] = {**shares, "questions": len(members)}
    return result


def chinese_drop(summary: Mapping[str, Any]) -> float:
    """How far Chinese bits per byte fell below the lower of the base and the extended model at step 0, as a share."""
    bits = summary["bits_per_byte"]["zh"]
    return 1 - bits["pretrained"] / min(bits["base"], bits["extended"])


def english_rise(summary: Mapping[str, Any]) -> float:
    """How far English bits per byte rose above the base's, as a share; negative: fell."""
    bits = summary["bits_per_byte"]["en"]
    return bits["pretrained"] / bits["base"] - 1


# ---------------------------------------------------------------- the report


def write_recipe_report(folder: Path, questions_file: Path) -> dict[str, Any]:
    """Write report.html, report.md and summary.json into a run folder; returns the summary."""
    run = load_run(folder, questions_file)
    summary = summarise(run)
    write_report(build_report(run, summary), folder)
    write_json(folder / SUMMARY, summary)
    return summary


def build_report(run: RecipeRun, summary: dict[str, Any]) -> Report:
    """All sections, in the order they are read."""
    sections = [
        headline_section(summary),
        pipeline_section(run, summary),
        vocabulary_section(run),
        embedding_section(run),
        training_section(run),
        language_section(summary),
        answers_section(run, summary),
        samples_section(run),
        merge_section(run, summary),
        files_section(run),
        next_section(run),
    ]
    title = Text("从英文基座到中文助手", "From an English base to a Chinese assistant")
    return Report(title, sections, footer=f"{run.folder.name} · {describe_machine(run.folder / 'pretrain')}")


def describe_machine(stage: Path) -> str:
    """What the figures were measured on: cores of this machine, package versions of a stage's run_config.yaml."""
    notes = []
    if (stage / RUN_CONFIG).is_file():
        comments = [line[2:] for line in (stage / RUN_CONFIG).read_text(encoding="utf-8").splitlines() if line[:2] == "# "]
        notes = [" ".join(line.split(": ", 1)) for line in comments if line.startswith(("python: ", "torch: ", "transformers: ", "peft: "))]  # fmt: skip
    return " · ".join([f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", *notes])


def headline_section(summary: Mapping[str, Any]) -> Section:
    drop, rise, exact = chinese_drop(summary), english_rise(summary), summary["exact_match"]
    equal = summary["merged_equals_adapter"]
    zh, en = summary["bits_per_byte"]["zh"], summary["bits_per_byte"]["en"]
    cards = [
        Card(
            Text("中文每字节比特数", "Chinese bits per byte"),
            percent(-drop, signed=True),
            aim(f"{min(zh['base'], zh['extended']):.2f} → {zh['pretrained']:.2f}", f"≤ −{TARGETS['zh_drop']:.0%}"),
            drop >= TARGETS["zh_drop"],
        ),
        Card(
            Text("英文每字节比特数", "English bits per byte"),
            percent(rise, signed=True),
            aim(f"{en['base']:.2f} → {en['pretrained']:.2f}", f"≤ +{TARGETS['en_rise']:.0%}"),
            rise <= TARGETS["en_rise"],
        ),
        Card(
            Text("新问法完全答对", "Unseen wordings answered exactly"),
            percent(exact["sft"]),
            aim(f"{percent(exact['base'])} → {percent(exact['sft'])}", f"≥ {TARGETS['exact_match']:.0%}"),
            exact["sft"] >= TARGETS["exact_match"],
        ),
        Card(
            Text("合并模型与适配器", "Merged model and adapter"),
            "＝" if equal else "≠",
            Text("贪心回答完全相同", "same greedy answers") if equal else Text("回答不同", "answers differ"),
            equal,
        ),
        Card(
            Text("全部用时", "Time in all"),
            duration(summary["seconds"]),
            aim("", f"≤ {duration(TARGETS['seconds'])}", "2 核", "2 cores"),
        ),
        Card(Text("内存峰值", "Peak memory"), f"{summary['peak_memory_gb']:.2f} GB", aim("", f"≤ {TARGETS['memory_gb']} GB")),
    ]
    return Section("headline", Text("要点", "At a glance"), [Cards(cards)])


def aim(change: str, target: str, zh: str = "", en: str = "") -> Text:
    """ "2.10 → 0.80; target ≤ 0.9" in both languages."""
    start = f"{change}；" if change else ""
    return Text(f"{start}目标 {target} {zh}".strip(), f"target {target} {en}".strip())


def stage_title(name: str) -> Text:
    """What a stage of stages.jsonl is called in the report; an unknown one keeps its name."""
    known = STAGES.get(name) or ANSWERS.get(name.removeprefix("answers_"))
    return known.title if known else Text(name, "")


def pipeline_section(run: RecipeRun, summary: Mapping[str, Any]) -> Section:
    total = max(summary["seconds"], 1e-9)
    steps = [
        Step(stage_title(name), duration(stage["seconds"]), stage["seconds"] / total)
        for name, stage in run.stages.items()
    ]
    rows: list[list[Cell]] = [
        [stage_title(name), name, duration(stage["seconds"]), percent(stage["seconds"] / total), f"{stage['peak_memory_gb']:.2f}"]
        for name, stage in run.stages.items()
    ]
    rows.append([Text("合计 / 峰值", "total / peak"), "", duration(total), percent(1), f"{summary['peak_memory_gb']:.2f}"])
    header = [Text("步骤", "stage"), Text("名称", "name"), Text("用时", "time"), Text("占比", "share"), Text("内存 GB", "memory, GB")]
    fold = Text("每一步的时间和内存", "Time and memory of every stage")
    return Section("stages", Text("流程", "The pipeline"), [Strip(steps), Table(header, rows, words=2, fold=fold)])


def vocabulary_section(run: RecipeRun) -> Section:
    report = run.vocabulary
    rows: list[list[Cell]] = []
    for name, language in report["languages"].items():
        old, new = language["before"], language["after"]
        pairs = [f"{old[key]:.2f} → {new[key]:.2f}" for key in ("characters_per_token", "bytes_per_token")]
        shares = f"{percent(old['byte_fallback_share'])} → {percent(new['byte_fallback_share'])}"
        counts = [f"{old['characters']:,}", f"{old['tokens']:,}", f"{new['tokens']:,}", percent(1 - new["tokens"] / max(old["tokens"], 1))]
        rows.append([LANGUAGES.get(name, Text(name, "")), *counts, *pairs, shares])
    header = [
        *(Text("留出文本", "held-out text"), Text("字符", "characters"), Text("词元，之前", "tokens before")),
        *(Text("之后", "after"), Text("节省", "saved"), Text("字符/词元", "characters/token")),
        *(Text("字节/词元", "bytes/token"), Text("字节回退", "byte fallback")),
    ]
    counts_rows: list[list[Cell]] = [[Text("原词表", "base vocabulary"), f"{report['base_vocabulary']:,}"]]
    counts_rows += [[PIECE_COUNTS.get(key, Text(key, "")), f"{count:,}"] for key, count in report["selection"].items()]
    counts_rows.append([Text("合并后", "merged vocabulary"), f"{report['vocabulary']:,}"])
    counts_rows.append([Text("其中留出文本未用到", "of these unused in the text above"), _count(report["unused_added_tokens"])])
    if report.get("cost"):
        counts_rows.append([Text("新增嵌入参数", "embedding parameters added"), _count(report["cost"]["added_parameters"])])
    blocks = [Table(header, rows), Table([Text("词表", "vocabulary"), Text("数量", "count")], counts_rows)]
    picture = run.folder / "merged_tokenizer" / "vocabulary_report.png"
    pictures = []
    if picture.is_file():
        title = Text("每个词元的字符数", "Characters per token")
        pictures = [Pictures([Picture(title, png=picture.read_bytes(), file="merged_tokenizer/vocabulary_report.png")])]
    return Section("vocabulary", Text("词表效率", "Vocabulary efficiency"), [blocks[0], *pictures, blocks[1]])


def _count(number: int | None) -> str:
    return "—" if number is None else f"{number:,}"


def embedding_section(run: RecipeRun) -> Section:
    names = list(run.embedding_init)
    rows: list[list[Cell]] = [
        [name + (" ✓" if name == run.init_method else ""), *(f"{run.embedding_init[name].get(key, float('nan')):.3f}" for key in LANGUAGES)]
        for name in names
    ]
    note = Text(
        "新词的向量在训练前如何设定。数值为第 0 步留出文本的每字节比特数，越低越好；✓ 为本次所用。",
        "How the rows of new pieces are set before training. Bits per byte of held-out text at step 0, lower is better; "
        "✓ marks the one used.",
    )
    chart = bar_chart({name: {LANGUAGES[key].en: value for key, value in bits.items() if key in LANGUAGES}
                       for name, bits in run.embedding_init.items()}, "bits per byte")  # fmt: skip
    header = [Text("方法", "method"), *LANGUAGES.values()]
    pictures = Pictures([Picture(Text("第 0 步", "At step 0"), svg=chart)])
    return Section("embedding", Text("新词向量的初始化", "Embedding initialisation"), [Paragraph(note), Table(header, rows), pictures])


def training_section(run: RecipeRun) -> Section:
    pictures = [
        Picture(STAGES[name].title, svg=line_chart(curves, "optimizer step", "loss (nats a token)"), file=f"{name}/loss.png")
        for name, history in run.history.items()
        if (curves := loss_curves(history))
    ]
    rows: list[list[Cell]] = [
        [
            STAGES[name].title,
            *(f"{results['steps']:,}", f"{results['train_loss']:.3f}", duration(results["seconds"])),
            *(f"{results['tokens_per_second']:,.0f}", f"{results['peak_memory_gb']:.2f}"),
        ]
        for name, results in run.results.items()
    ]
    header = [
        *(Text("步骤", "stage"), Text("优化步数", "steps"), Text("平均训练损失", "mean training loss")),
        *(Text("训练用时", "training time"), Text("词元/秒", "tokens/s"), Text("内存 GB", "memory, GB")),
    ]
    return Section("training", Text("损失曲线", "Loss curves"), [Pictures(pictures), Table(header, rows)])


def loss_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Training loss and every held-out set's loss over optimizer steps."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if key == "loss":
                curves.setdefault("train", []).append((entry["step"], value))
            elif key.startswith("eval_") and key.endswith("_loss"):
                curves.setdefault(f"{key[5:-5]} held-out", []).append((entry["step"], value))
    return curves


def language_section(summary: Mapping[str, Any]) -> Section:
    labels = {
        "base": Text("基座", "base"),
        "extended": Text("扩词表，第 0 步", "extended, step 0"),
        "pretrained": Text("继续预训练后", "pre-trained"),
    }
    bits = summary["bits_per_byte"]
    changes = {"zh": percent(-chinese_drop(summary), signed=True), "en": percent(english_rise(summary), signed=True)}
    rows: list[list[Cell]] = [
        [title, *(f"{bits[key][side]:.3f}" for side in labels), changes[key]] for key, title in LANGUAGES.items()
    ]
    chart = bar_chart({LANGUAGES[key].en: {labels[side].en: value for side, value in values.items()}
                       for key, values in bits.items()}, "bits per byte")  # fmt: skip
    note = Text(
        "留出文本每字节所需的比特数：与词表无关，可直接比较，越低越好。中文与前两列中较低者比，英文与基座比。",
        "Bits the model needs for a byte of held-out text: independent of the vocabulary, lower is better. Chinese is compared "
        "with the lower of the first two columns, English with the base.",
    )
    header = [Text("语言", "language"), *labels.values(), Text("变化", "change")]
    pictures = Pictures([Picture(Text("每字节比特数", "Bits per byte"), svg=chart)])
    return Section("languages", Text("语言能力", "Each language, before and after"), [Paragraph(note), Table(header, rows), pictures])
