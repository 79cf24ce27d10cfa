"""The report on a recipe's run folder: what every stage cost and bought.

A later stage adds its part by one more function that returns a Section, called in `build_report`.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.command_line import RUN_CONFIG, shell_command
from ..core.files import read_json, write_json
from .charts import bar_chart, line_chart, scatter_chart
from .pages import (
    Answer,
    Beside,
    Block,
    Card,
    Cards,
    Cell,
    Commands,
    Page,
    Paragraph,
    Picture,
    Pictures,
    Section,
    Step,
    Strip,
    Table,
    Text,
    columns,
    duration,
    evenly_spaced,
    percent,
    target_of,
    title_of,
    write_page,
)
from .recipe import (
    KINDS,
    LANGUAGES,
    SIDE_TITLES,
    SIDES,
    STAGES,
    TARGET_KIND,
    TRAINING,
    RecipeRun,
    curves_of,
    load_run,
)
from .rlhf import rlhf_cards, rlhf_sections
from .sections import choice_sections, perplexity_sections
from .summary import Summary, exact_match_by, is_exact, summarise_run

SUMMARY = "summary.json"
VOCABULARY_PICTURE = "merged_tokenizer/vocabulary_report.png"
TARGETS = {"zh_drop": 0.60, "en_rise": 0.05, "seconds": 780, "memory_gb": 4}
RECORDED = re.compile(r"^# ((?:python|torch|transformers|peft): .*)", re.MULTILINE)
PIECE_COUNTS = {
    "candidates": Text("候选", "offered"),
    "already_in_base": Text("原词表已有", "already in the base"),
    "base_language": Text("去除：会改变英文切分", "dropped: would cut English anew"),
    "in_base_language_sample": Text("去除：见于英文样本", "dropped: found in English text"),
    "unreachable": Text("去除：切不出来", "dropped: no text is cut into them"),
    "beyond_max_new_tokens": Text("未取：超过上限", "left out: beyond the limit"),
    "added": Text("加入", "added"),
}


def write_report(folder: Path, questions_file: Path) -> Summary:
    """Write report.html, report.md and summary.json into a run folder; returns the summary."""
    run = load_run(folder, questions_file)
    summary = summarise_run(run)
    write_page(build_report(run, summary), folder / "report")
    write_json(folder / SUMMARY, asdict(summary))
    return summary


def build_report(run: RecipeRun, summary: Summary) -> Page:
    """All sections, in the order they are read."""
    sections = [
        headline_section(summary),
        pipeline_section(summary),
        vocabulary_section(run),
        embedding_section(run),
        training_section(run),
        language_section(summary),
        answers_section(run, summary),
        samples_section(run),
        *rlhf_sections(run, summary),
        *choice_sections(run.evaluations),
        *perplexity_sections(run.evaluations),
        merge_section(run),
        *quantization_sections(run.folder),
        time_section(run, summary),
        files_section(run),
        next_section(run),
    ]
    return Page(
        Text("从英文基座到中文助手", "From an English base to a Chinese assistant"), sections, describe_machine(run)
    )


def describe_machine(run: RecipeRun) -> str:
    """What the figures were measured with: this machine, and the packages a training stage recorded."""
    config = run.folder / "pretrain" / RUN_CONFIG
    packages = RECORDED.findall(config.read_text(encoding="utf-8")) if config.is_file() else []
    machine = f"{sys.platform} {platform.machine()}, {os.cpu_count()} cores"
    return " · ".join([str(run.folder), machine, *(package.replace(": ", " ") for package in packages)])


def stage_title(name: str) -> Text:
    return STAGES[name].title if name in STAGES else Text(name, "")


# ---------------------------------------------------------------- sections


def headline_section(summary: Summary) -> Section:
    drop, rise, exact = summary.chinese_drop, summary.english_rise, summary.exact_match
    zh, en, equal = summary.bits_per_byte["zh"], summary.bits_per_byte["en"], summary.merged_equals_adapter
    cards = [
        Card(
            Text("中文每字节比特数", "Chinese bits per byte"),
            percent(-drop, signed=True),
            f"{min(zh['base'], zh['extended']):.2f} → {zh['pretrained']:.2f}",
            target_of(f"≤ {percent(-TARGETS['zh_drop'], 0)}"),
            drop >= TARGETS["zh_drop"],
        ),
        Card(
            Text("英文每字节比特数", "English bits per byte"),
            percent(rise, signed=True),
            f"{en['base']:.2f} → {en['pretrained']:.2f}",
            target_of(f"≤ {percent(TARGETS['en_rise'], 0, signed=True)}"),
            rise <= TARGETS["en_rise"],
        ),
        Card(
            Text("新问法完全答对", "New wordings answered exactly"),
            percent(exact["sft"]),
            f"{percent(exact['base'])} → {percent(exact['sft'])}",
            target_of(f"≥ {percent(EXACT_MATCH_TARGET, 0)}"),
            exact["sft"] >= EXACT_MATCH_TARGET,
        ),
        Card(
            Text("合并模型与适配器", "Merged model and adapter"),
            "=" if equal else "≠",
            "",
            Text("贪心回答相同", "same greedy answers") if equal else Text("贪心回答不同", "greedy answers differ"),
            equal,
        ),
        *rlhf_cards(summary),
        # Time and memory are the machine's as much as the recipe's: their aims are stated, not judged.
        Card(
            Text("全部用时", "Time in all"),
            duration(summary.seconds),
            f"RLHF {duration(summary.rlhf_seconds)}",
            target_of(f"≤ {duration(TARGETS['seconds'])}, 2 cores"),
        ),
        Card(
            Text("内存峰值", "Peak memory"),
            f"{summary.peak_memory_gb:.2f} GB",
            "",
            target_of(f"≤ {TARGETS['memory_gb']} GB"),
        ),
    ]
    return Section("headline", Text("要点", "At a glance"), [Cards(cards)])


def pipeline_section(summary: Summary) -> Section:
    stages = summary.stage_seconds
    longest = max(*stages.values(), 1e-9)
    steps = [Step(stage_title(name), duration(seconds), seconds / longest) for name, seconds in stages.items()]
    return Section("pipeline", Text("流程", "The pipeline"), [Strip(steps)])


def vocabulary_section(run: RecipeRun) -> Section:
    report = run.vocabulary
    rows: list[list[Cell]] = []
    for name, language in report["languages"].items():
        old, new = language["before"], language["after"]
        rows.append(
            [
                title_of(LANGUAGES, name),
                *(f"{old['characters']:,}", f"{old['tokens']:,}", f"{new['tokens']:,}"),
                percent(1 - new["tokens"] / max(old["tokens"], 1)),
                *(f"{old[key]:.2f} → {new[key]:.2f}" for key in ("characters_per_token", "bytes_per_token")),
                f"{percent(old['byte_fallback_share'])} → {percent(new['byte_fallback_share'])}",
            ]
        )
    header = columns("留出文本|held-out text", "字符|characters", "原词元数|tokens before", "现词元数|after")
    header += columns("节省|saved", "字符/词元|characters/token", "字节/词元|bytes/token", "字节回退|byte fallback")
    counts = [(Text("原词表", "base vocabulary"), report["base_vocabulary"])]
    counts += [(title_of(PIECE_COUNTS, name), count) for name, count in report["selection"].items()]
    counts.append((Text("合并后", "merged vocabulary"), report["vocabulary"]))
    counts.append((Text("加入而上述文本未用到", "added, unused in the text above"), report["unused_added_tokens"]))
    added_parameters = (report.get("cost") or {}).get("added_parameters")
    counts.append((Text("新增嵌入参数", "embedding parameters added"), added_parameters))
    known: list[list[Cell]] = [[title, f"{count:,}"] for title, count in counts if count is not None]
    sizes = Table(columns("词表|vocabulary", "数量|number"), known)
    blocks: list[Block] = [Table(header, rows), sizes]
    png = run.folder / VOCABULARY_PICTURE
    if png.is_file():
        picture = Picture(Text("每词元字符数", "Characters per token"), png=png.read_bytes(), file=VOCABULARY_PICTURE)
        blocks[1] = Beside(sizes, picture)
    return Section("vocabulary", Text("词表效率", "Vocabulary efficiency"), blocks)


def embedding_section(run: RecipeRun) -> Section:
    note = Text(
        "训练之前，新词的向量如何设定：第 0 步留出文本的每字节比特数，越低越好；✓ 为本次所用。",
        "How the rows of new pieces are set before training: bits per byte of held-out text at step 0, lower is "
        "better; ✓ marks the one used.",
    )
    rows: list[list[Cell]] = []
    groups: dict[str, dict[str, float]] = {}
    for name, bits in run.embedding_init.items():
        known = {key: bits[key] for key in LANGUAGES if key in bits}
        groups[name] = {LANGUAGES[key].en: value for key, value in known.items()}
        mark = " ✓" if name == run.init_method else ""
        rows.append([name + mark, *(f"{known[key]:.3f}" if key in known else "—" for key in LANGUAGES)])
    table = Table([*columns("方法|method"), *LANGUAGES.values()], rows)
    picture = Picture(Text("第 0 步", "At step 0"), svg=bar_chart(groups, "bits per byte"))
    title = Text("新词向量的初始化", "Embedding initialisation")
    return Section("embedding", title, [Paragraph(note), Beside(table, picture)])


def training_section(run: RecipeRun) -> Section:
    pictures = []
    for name in TRAINING:
        if curves := curves_of(run.history[name], "loss"):
            chart = line_chart(curves, "optimizer step", "loss (nats a token)")
            file = f"{name}/loss.png"
            drawn = (run.folder / file).is_file()
            pictures.append(Picture(stage_title(name), svg=chart, file=file if drawn else None))
    rows: list[list[Cell]] = [
        [
            stage_title(name),
            f"{results['steps']:,}",
            f"{results['train_loss']:.3f}" if name in TRAINING else "—",  # what RLHF minimises is no measure of it
            duration(results["seconds"]),
            *(f"{results['tokens_per_second']:,.0f}", f"{results['peak_memory_gb']:.2f}"),
        ]
        for name, results in run.results.items()
    ]
    header = columns("步骤|stage", "优化步数|steps", "平均训练损失|mean training loss", "训练用时|training time")
    header += columns("词元/秒|tokens/s", "内存峰值 GB|peak memory, GB")
    return Section("training", Text("损失曲线", "Loss curves"), [Pictures(pictures), Table(header, rows)])


def language_section(summary: Summary) -> Section:
    note = Text(
        "留出文本每字节所需的比特数，与词表无关，越低越好。“扩词表”指换上新词表、尚未训练。"
        "中文与前两列中较低者比，英文与基座比。",
        "Bits the model needs for a byte of held-out text: independent of the vocabulary, lower is better. Extended: "
        "with the new vocabulary, before training. Chinese is compared with the lower of the first two columns, "
        "English with the base.",
    )
    sides = {
        "base": Text("基座", "base"),
        "extended": Text("扩词表", "extended"),
        "pretrained": Text("预训练后", "pre-trained"),
    }
    changes = {"zh": -summary.chinese_drop, "en": summary.english_rise}
    rows: list[list[Cell]] = []
    groups: dict[str, dict[str, float]] = {}
    for key, title in LANGUAGES.items():
        bits = summary.bits_per_byte[key]
        rows.append([title, *(f"{bits[side]:.3f}" for side in sides), percent(changes[key], signed=True)])
        groups[title.en] = {text.en: bits[side] for side, text in sides.items()}
    table = Table([*columns("语言|language"), *sides.values(), *columns("变化|change")], rows)
    picture = Picture(Text("每字节比特数", "Bits per byte"), svg=bar_chart(groups, "bits per byte"))
    return Section("languages", Text("两种语言", "Both languages"), [Paragraph(note), Beside(table, picture)])


def merge_section(run: RecipeRun) -> Section:
    number, pairs = len(run.questions), zip(run.answers["assistant"], run.answers["adapter"], strict=True)
    different = sum(merged != adapter for merged, adapter in pairs)
    note = Text(
        f"合并后的模型与“基座 + 适配器”贪心回答 {number} 个问题，{different} 个回答不同。",
        f"The merged model and base + adapter answered {number} questions greedily: {different} answers differ.",
    )
    rows: list[list[Cell]] = [
        [
            stage_title(name),
            *(f"{report.tensors:,}", f"{report.changed_tensors:,}", f"{report.vocab_size or 0:,}"),
            *(f"{report.size_gb:.3f}", duration(report.seconds)),
        ]
        for name, report in run.merges.items()
    ]
    header = columns("合并|merge", "张量|tensors", "有变化|changed", "词表行数|embedding rows")
    header += columns("大小 GB|size, GB", "用时|time")
    return Section("merge", Text("合并检查", "Merging"), [Paragraph(note), Table(header, rows)])


def time_section(run: RecipeRun, summary: Summary) -> Section:
    total = summary.seconds
    rows: list[list[Cell]] = [
        [
            stage_title(name),
            *(name, duration(stage.seconds), percent(stage.seconds / max(total, 1e-9))),
            f"{stage.peak_memory_gb:.2f}",
        ]
        for name, stage in run.stages.items()
    ]
    rows.append([Text("合计", "in all"), "", duration(total), percent(1), f"{summary.peak_memory_gb:.2f}"])
    header = columns("步骤|stage", "名称|name", "用时|time", "占比|share", "内存峰值 GB|peak memory, GB")
    return Section("time", Text("时间和内存", "Time and memory"), [Table(header, rows, words=2)])


def files_section(run: RecipeRun) -> Section:
    note = Text(
        f"都在 {run.folder}。训练目录中的 run_config.yaml 记录全部设置，可直接重跑。",
        f"All in {run.folder}. run_config.yaml in a training folder holds its settings and can be run again as it is.",
    )
    rows: list[list[Cell]] = [[stage.mark, stage.title, f"scripts/{stage.launcher}"] for stage in STAGES.values()]
    rows.append([SUMMARY, Text("本页的数字", "the figures of this page"), "scripts/run_report.sh"])
    header = columns("文件|file", "内容|what it shows", "由谁生成|made by")
    return Section("files", Text("文件", "Files"), [Paragraph(note), Table(header, rows, words=3)])


def next_section(run: RecipeRun) -> Section:
    folder = run.folder
    chat = ("bash", "scripts/run_inference.sh", "--interactive")
    redone = shell_command("rm", "-r", *(folder / name for name in ("sft", "assistant", "answers")))
    commands = [
        (
            Text("与助手对话", "chat with the assistant"),
            shell_command(*chat, MODEL=folder / "assistant"),
        ),
        (
            Text("与 PPO 之后的助手对话", "chat with the assistant after PPO"),
            shell_command(*chat, MODEL=folder / "ppo_merged"),
        ),
        (
            Text("重做精调和它之后的步骤", "tune again, with the stages after it and this report"),
            f"{redone} && {shell_command('bash', 'scripts/run_demo.sh', OUT=folder)}",
        ),
        (
            Text("用自己的对话精调", "tune on conversations of your own"),
            shell_command(
                *("bash", "scripts/run_sft.sh"),
                MODEL=folder / "pretrained",
                DATA="path/to/conversations.json",
                OUT="output/my_sft",
            ),
        ),
        (
            Text("同样的脚本，真实大小的模型", "the same scripts at real size"),
            "MODEL=path/to/llama TOKENIZER=path/to/merged_tokenizer DATA=path/to/texts bash scripts/run_pt.sh",
        ),
    ]
    return Section("next", Text("接下来", "What to try next"), [Commands(commands)])


EXACT_MATCH_TARGET = 0.90
NUM_SAMPLES = {TARGET_KIND: 8}  # questions shown of a kind; 3 of any other


def answers_section(run: RecipeRun, summary: Summary) -> Section:
    """Shares of exact answers by kind of question."""
    note = Text(
        "回答与期望逐字相同的比例。只有第一类设目标：精调教的是怎样回答它问过的事实。没见过的算术、"
        "只在预训练文本里出现的事实，这样小的模型并不承诺，如实列出。PPO、DPO 学的是另一类问题，"
        "这里看它们有没有损害已学会的回答。",
        "Share of answers equal to the expected text. Only the first kind has a target: tuning teaches how to answer "
        "about facts it asks for. Sums with unseen operands and facts met only in plain text are more than a model of "
        "this size promises; they are shown as they are. PPO and DPO learn from other questions: here it shows "
        "whether they harm what was learned before.",
    )
    wordings = exact_match_by(run, [question.get("wording") for question in run.questions])
    groups = {**summary.exact_match_by_kind, **wordings}
    rows: list[list[Cell]] = [
        [
            title_of(KINDS, name),
            *(f"{group['questions']:,}", *(percent(group[side]) for side in SIDES)),
            f"≥ {percent(EXACT_MATCH_TARGET, 0)}" if name == TARGET_KIND else "—",
        ]
        for name, group in sorted(groups.items(), key=lambda item: rank_kind(item[0]))
    ]
    header = [*columns("问题|questions", "数量|number"), *SIDE_TITLES.values(), *columns("精调后目标|target, tuned")]
    return Section("answers", Text("完全答对的问题", "Exact answers"), [Paragraph(note), Table(header, rows)])


def rank_kind(kind: str) -> int:
    """The place of a kind of question in tables; unknown ones come last."""
    return list(KINDS).index(kind) if kind in KINDS else len(KINDS)


def pick_samples(kinds: Sequence[str]) -> dict[str, list[int]]:
    """Indices of some questions of each kind, evenly spaced: right and wrong answers as they come."""
    chosen = {}
    for kind in sorted(dict.fromkeys(kinds), key=rank_kind):
        members = [index for index, name in enumerate(kinds) if name == kind]
        chosen[kind] = evenly_spaced(members, NUM_SAMPLES.get(kind, 3))
    return chosen


def samples_section(run: RecipeRun) -> Section:
    """Some answers of each kind, and all of them, folded."""
    header = [*columns("问题|question", "期望|expected"), *SIDE_TITLES.values()]
    rows: list[list[Cell]] = []
    for place, question in enumerate(run.questions):
        asked = "\n".join(filter(None, (question["instruction"], question.get("input"))))
        answers = [run.answers[source][place] for source in SIDES.values()]
        rows.append([asked, str(question["output"]), *(Answer(text, is_exact(text, question)) for text in answers)])
    words = len(header)
    blocks: list[Block] = [
        Table(header, [rows[index] for index in indices], words=words, title=title_of(KINDS, kind))
        for kind, indices in pick_samples([question.get("kind", "other") for question in run.questions]).items()
    ]
    title = Text(f"全部 {len(rows)} 个问题", f"all {len(rows)} questions")
    blocks.append(Table(header, rows, words=words, title=title, folded=True))
    return Section("samples", Text("回答示例", "Sample answers"), blocks)


QUANTIZATION = "quantization.json"  # what compare_formats.py writes


def quantization_sections(folder: Path) -> list[Section]:
    """Size and quality of the model in every format: one section, none if they were not measured.

    Raises: InputError if the file is broken.
    """
    if not (folder / QUANTIZATION).is_file():
        return []
    table = read_json(folder / QUANTIZATION)
    name = Path(table.get("model") or "").name
    model, named = (f"模型 {name} ", f"the model {name}") if name else ("同一模型", "the same model")
    note = Text(
        f"{model}存成不同格式后的大小与质量，都在同样的 {table['scored_tokens']:,} 个留出词元上测得，困惑度越低越好；"
        "变化与第一行比。",
        f"Size and quality of {named} in each format, all measured on the same {table['scored_tokens']:,} "
        "held-out tokens; lower perplexity is better, changes are against the first row.",
    )
    first = next((row["perplexity"] for row in table["rows"] if row["perplexity"] is not None), None)
    header = columns("格式|format", "大小 MB|size, MB", "比特/权重|bits/weight", "困惑度|perplexity", "变化|change")
    header += columns("比特/字节|bits/byte", "毫秒/词元|ms/token")
    rows = [format_row(row, first) for row in table["rows"]]
    blocks: list[Block] = [Paragraph(note)]
    shown = Table(header, rows)
    if points := plot_points(table):
        picture = Picture(
            Text("困惑度与大小", "Perplexity against size"), svg=scatter_chart(points, "MB", "perplexity")
        )
        blocks.append(Beside(shown, picture))
    else:
        blocks.append(shown)
    if remarks := [[row["format"], row["note"]] for row in table["rows"] if row["note"]]:
        blocks.append(Table(columns("格式|format", "说明|remark"), remarks, words=2))
    return [Section("quantization", Text("量化", "Quantisation"), blocks)]


def format_row(row: Mapping[str, Any], first: float | None) -> list[Cell]:
    """One format's cells; what was not measured is a dash."""
    figures = [
        (None if row["size_gb"] is None else 1000 * row["size_gb"], ".2f"),
        (row["bits_per_weight"], ".2f"),
        (row["perplexity"], ".3f"),
    ]
    cells: list[Cell] = [
        row["format"],
        *("—" if value is None else format(value, digits) for value, digits in figures),
    ]
    measured = row["perplexity"] is not None and first is not None
    cells.append(percent(row["perplexity"] / first - 1, 2, signed=True) if measured else "—")
    figures = [(row["bits_per_byte"], ".3f"), (row["ms_per_token"], ".2f")]
    return [*cells, *("—" if value is None else format(value, digits) for value, digits in figures)]


def plot_points(table: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """{engine: {format: (MB, perplexity)}} of the formats that were measured."""
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for row in table["rows"]:
        if row["perplexity"] is not None and row["size_gb"] is not None:
            engine = "GGUF" if "types" in row else "transformers"
            points.setdefault(engine, {})[row["format"]] = (1000 * row["size_gb"], row["perplexity"])
    return points
