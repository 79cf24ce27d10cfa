"""What a larger vocabulary buys and costs: measured on held-out text, written as json, markdown and a picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..core.figures import BLUE, saved_figure
from ..core.files import atomic_file, write_json
from .tokenizer import encode_texts, token_surfaces

REASONS = {
    "candidates": "pieces offered",
    "already_in_base": "already in the base",
    "base_language": "dropped: would cut the base's language anew",
    "in_base_language_sample": "dropped: found in the base-language sample",
    "unreachable": "dropped: no text is cut into them",
    "beyond_max_new_tokens": "left out: beyond --max_new_tokens",
    "added": "added",
}
BATCH = 10_000  # texts cut at a time: ids of one batch are held in memory
# A new row is taken to have learnt once it was seen so often in training. It is the --vocabulary-threshold of
# subword-nmt and sentencepiece, below which translation models do better without a piece.
SEEN_ENOUGH = 50
COVERED = 0.95  # share of the text's new tokens that are to be such rows
VERDICT_RULES = (
    f"A row is taken to be learnt after {SEEN_ENOUGH} occurrences, a rule of thumb. Charged are all tokens to be read",
    f"until {COVERED:.0%} of the new tokens are such rows, as if they taught nothing else; from the size named on",
    "what is saved in training has paid for them.",
)


@dataclass
class Efficiency:
    """How a tokenizer cuts one body of text."""

    characters: int
    bytes: int
    tokens: int
    characters_per_token: float
    bytes_per_token: float
    byte_fallback_share: float  # tokens that stand for no whole character, 0-1


def measure(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Efficiency, np.ndarray]:
    """Cut texts and count.

    Returns: the figures, and how often each id occurred: (ids,) int64.
    """
    surfaces = token_surfaces(tokenizer)
    partial = np.array([not _is_text(surface) for surface in surfaces])
    occurrences: np.ndarray = np.zeros(len(surfaces), np.int64)
    characters = size = 0
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        characters += sum(map(len, batch))
        size += sum(len(text.encode()) for text in batch)
        ids = np.fromiter(itertools.chain.from_iterable(encode_texts(tokenizer, batch)), np.int64)
        occurrences += np.bincount(ids, minlength=len(surfaces))
    tokens = int(occurrences.sum())
    some = max(tokens, 1)
    fallback = float(occurrences[partial].sum()) / some
    return Efficiency(characters, size, tokens, characters / some, size / some, fallback), occurrences


def _is_text(surface: bytes) -> bool:
    try:
        surface.decode()
    except UnicodeDecodeError:
        return False
    return True


# ---------------------------------------------------------------- cost


@dataclass
class ModelSize:
    """What decides the cost of a token: all counts are parameters that take part in computing one."""

    hidden_size: int
    tied: bool
    body: int | None = None  # everything but embed_tokens and lm_head; None: unknown

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSize:
        """Read a Llama, Mistral, Mixtral or Qwen config.json; the body is None where a field is missing."""
        hidden = int(config["hidden_size"])
        tied = bool(config.get("tie_word_embeddings", False))
        names = ("num_hidden_layers", "num_attention_heads", "intermediate_size")
        if any(config.get(name) is None for name in names):
            return cls(hidden, tied)
        layers, heads, inner = (int(config[name]) for name in names)
        head_dim = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        count = int(config.get("num_local_experts") or config.get("num_experts") or 0)
        if count:  # only the chosen experts compute, and those that all tokens share
            inner = int(config.get("moe_intermediate_size") or inner) * int(config["num_experts_per_tok"])
            inner += int(config.get("shared_expert_intermediate_size") or 0)
        attention = 2 * hidden * head_dim * (heads + kv_heads)
        return cls(hidden, tied, layers * (attention + 3 * hidden * inner + hidden * count))


def describe_cost(size: ModelSize, old_rows: int, new_rows: int, languages: Mapping[str, Any]) -> dict[str, Any]:
    """Embedding parameters added, and from which share of new-language text on the model computes less than before.

    A token costs about 2 * (body + rows * hidden) operations forward: every lm_head row is multiplied for each token,
    embed_tokens is only looked up. With cost ratio c = after / before per token and token ratio r = after / before of
    a language, its text costs c * r of what it did. Of a mix with a share p of that language, the rest cut as before,
    the cost is c * (p * r + 1 - p), which is below 1 from p = (1 - 1 / c) / (1 - r) on.
    """
    added = (new_rows - old_rows) * size.hidden_size * (1 if size.tied else 2)
    cost: dict[str, Any] = {"hidden_size": size.hidden_size, "tied": size.tied, "added_parameters": added}
    if size.body is None:
        return cost
    ratio = (size.body + new_rows * size.hidden_size) / (size.body + old_rows * size.hidden_size)
    cost |= {"body_parameters": size.body, "compute_per_token_ratio": ratio, "compute_per_text_ratio": {}}
    cost["break_even_share"] = {}
    for name, language in languages.items():
        tokens = language["after"]["tokens"] / max(language["before"]["tokens"], 1)
        cost["compute_per_text_ratio"][name] = ratio * tokens
        if tokens < 1:
            cost["break_even_share"][name] = (1 - 1 / ratio) / (1 - tokens)
    return cost


# ---------------------------------------------------------------- what a text supports, and when extending pays


def supported_pieces(added: np.ndarray, scale: float = 1.0) -> int:
    """Added pieces that a text shows at least SEEN_ENOUGH times.

    Args: added: (pieces,) occurrences in a sample; scale: size of the whole text over that of the sample.
    """
    return int((added * scale >= SEEN_ENOUGH).sum())


def tokens_to_learn(added: np.ndarray, tokens: int) -> float | None:
    """Tokens of a text to read until COVERED of its new tokens are pieces seen SEEN_ENOUGH times each.

    The commonest pieces that make up COVERED of them are needed; the rarest of these, with n of `tokens`, is seen
    SEEN_ENOUGH times in SEEN_ENOUGH * tokens / n.
    Args: added: (pieces,) occurrences in the text of `tokens` tokens. Returns: None if it has no added piece.
    """
    if not added.any():
        return None
    falling = np.sort(added)[::-1]
    last = int(np.searchsorted(np.cumsum(falling), COVERED * falling.sum()))
    return SEEN_ENOUGH * tokens / float(falling[last])


def tokens_to_pay(learning: float | None, token_ratio: float, cost_ratio: float = 1.0) -> float | None:
    """Tokens, cut by the extended tokenizer, of training text at which extending has paid for itself in computation.

    Charged is all that is read until the rows are learnt, `learning` tokens at cost_ratio each. A text of T old tokens
    costs cost_ratio * token_ratio * T instead of T. Both are equal at
    T = cost_ratio * learning / (1 - cost_ratio * token_ratio), which are token_ratio * T new tokens.
    Args: token_ratio: tokens after / before; cost_ratio: of a token, after / before. Returns: None for never.
    """
    text_cost = cost_ratio * token_ratio
    if learning is None or text_cost >= 1:
        return None
    return token_ratio * cost_ratio * learning / (1 - text_cost)


def judge(report: Mapping[str, Any]) -> list[str]:
    """The report's verdict in plain words: one line about the pieces, one about each text."""
    cost_ratio = (report.get("cost") or {}).get("compute_per_token_ratio")
    training = report.get("training_text")
    lines = [_judge_pieces(report, training)] if report["selection"].get("added") else []
    texts = report["languages"] if training is None else {**report["languages"], "the text to train on": training}
    for name, text in texts.items():
        if text["after"]["tokens"] == text["before"]["tokens"]:
            continue
        ratio = text["after"]["tokens"] / max(text["before"]["tokens"], 1)
        needed = tokens_to_pay(text["tokens_to_learn"], ratio, cost_ratio or 1.0)
        text_cost = ratio * (cost_ratio or 1.0)
        if needed is None:
            lines.append(
                f"{name}: {1 - ratio:.0%} fewer tokens, {text_cost:.2f} times the computation: never worth it"
            )
            continue
        what = "computation" if cost_ratio else "tokens (--model_config says what a token costs)"
        line = (
            f"{name}: saves {1 - text_cost:.0%} of the {what}: not worth it below {round_figure(needed)} tokens of it"
        )
        if text is training:
            answer = "enough" if training["tokens"] >= needed else "too few: leave the vocabulary as it is"
            line += f"; it has {round_figure(training['tokens'])}, {answer}"
        lines.append(line)
    return lines


def _judge_pieces(report: Mapping[str, Any], training: Mapping[str, Any] | None) -> str:
    added, unused = report["selection"]["added"], report["unused_added_tokens"]
    if training is None:
        if unused is None:
            return "unknown what these pieces are worth: name text with --report_text, or --training_text"
        return (
            f"{unused:,} of {added:,} added pieces unused in the text measured; how many the text to train on "
            "supports, --training_text says"
        )
    supported = training["supported_pieces"]
    line = (
        f"this corpus supports about {supported:,} pieces ({SEEN_ENOUGH} occurrences each); of {added:,} added "
        f"{training['unused_added_tokens']:,} are unused in its sample"
    )
    if supported < 0.8 * added:
        line += f": lower --vocab_size, or pass --max_new_tokens {max(supported, 1)}"
    return line


def round_figure(number: float) -> str:
    """Two digits with a unit: 1,234,567 -> 1.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # What two digits round up to the unit stands in it.
        if number >= 0.995 * size:
            return f"{float(f'{number / size:.2g}'):g}{unit}"
    return f"{float(f'{number:.2g}'):g}"


# ---------------------------------------------------------------- the report


def compare(
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    training: Sequence[str] = (),
    scale: float = 1.0,
) -> dict[str, Any]:
    """Both tokenizers on each body of text, and how many added ids none of it uses.

    Args: training: a sample of the text to be trained on; scale: size of all of it over that of the sample.
    """
    # Special tokens stand for no text.
    added = [index for index, surface in enumerate(token_surfaces(after)) if index >= len(before) and surface]
    languages = {}
    used: np.ndarray = np.zeros(len(added), np.int64)
    for name, body in texts.items():
        languages[name], occurrences = _compare_text(before, after, body, added)
        used += occurrences
    report: dict[str, Any] = {"languages": languages, "unused_added_tokens": int((used == 0).sum()) if texts else None}
    if training:
        figures, occurrences = _compare_text(before, after, training, added)
        figures |= {"tokens": figures["after"]["tokens"] * scale, "unused_added_tokens": int((occurrences == 0).sum())}
        report["training_text"] = figures | {"supported_pieces": supported_pieces(occurrences, scale)}
    return report


def _compare_text(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, body: Sequence[str], added: Sequence[int]
) -> tuple[dict[str, Any], np.ndarray]:
    """The figures of one text, and how often each of the added ids occurs in it."""
    old, _ = measure(before, body)
    new, occurrences = measure(after, body)
    figures = {"before": asdict(old), "after": asdict(new), "tokens_saved": 1 - new.tokens / max(old.tokens, 1)}
    figures["tokens_to_learn"] = tokens_to_learn(occurrences[added], new.tokens)
    return figures, occurrences[added]


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write vocabulary_report.json, .md and, where there was text to measure, .png."""
    write_json(folder / "vocabulary_report.json", report)
    with atomic_file(folder / "vocabulary_report.md") as file:
        file.write("\n".join(_markdown(report)) + "\n")
    if report["languages"]:
        _draw(report["languages"], folder / "vocabulary_report.png")


def _markdown(report: Mapping[str, Any]) -> list[str]:
    lines = ["# Vocabulary report", "", "| | tokens |", "|---|---:|", f"| base | {report['base_vocabulary']:,} |"]
    lines += [f"| {REASONS.get(name, name)} | {count:,} |" for name, count in report["selection"].items()]
    lines += [f"| extended | {report['vocabulary']:,} |", f"| embedding rows | {report['embedding_rows']:,} |"]
    lines += [f"| added, but no text is cut into them | {report['unreachable_added_tokens']:,} |"]
    if report["unused_added_tokens"] is not None:
        lines += [f"| added, unused in the text below | {report['unused_added_tokens']:,} |"]
    lines += ["", "## Efficiency", ""]
    if report["languages"]:
        lines += [
            "| text | characters | tokens before | after | saved | characters/token | bytes/token | byte share |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
        lines += [_row(name, language["before"], language["after"]) for name, language in report["languages"].items()]
        lines += ["", "Before -> after. Byte share: tokens that stand for no whole character."]
        lines += ["", "![characters per token](vocabulary_report.png)"]
    else:
        lines += ["Skipped: no held-out text was given (--report_text name=path)."]
    lines += ["", "## Cost", "", *_cost_lines(report.get("cost"))]
    if report.get("verdict"):
        lines += ["", "## Verdict", "", *(f"- {line}" for line in report["verdict"]), "", *VERDICT_RULES]
    return lines


def _row(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    saved = 1 - new["tokens"] / max(old["tokens"], 1)
    pairs = [f"{old[key]:.2f} -> {new[key]:.2f}" for key in ("characters_per_token", "bytes_per_token")]
    shares = f"{old['byte_fallback_share']:.1%} -> {new['byte_fallback_share']:.1%}"
    counts = f"{old['characters']:,} | {old['tokens']:,} | {new['tokens']:,} | {saved:.1%}"
    return f"| {name} | {counts} | {pairs[0]} | {pairs[1]} | {shares} |"


def _cost_lines(cost: Mapping[str, Any] | None) -> list[str]:
    if cost is None:
        return ["Skipped: the model's size is unknown (--model_config, or --hidden_size)."]
    kind = "tied" if cost["tied"] else "untied"
    lines = [f"- Embedding parameters added ({kind}): {cost['added_parameters']:,}"]
    if "compute_per_token_ratio" not in cost:
        return [*lines, "- Break-even: skipped, the model's layers are unknown (--model_config)."]
    lines += [f"- Computing one token costs {cost['compute_per_token_ratio']:.4f} times what it did (larger lm_head)."]
    for name, ratio in cost["compute_per_text_ratio"].items():
        share = cost["break_even_share"].get(name)
        even = "no token is saved" if share is None else f"a mix breaks even from a share of {share:.1%} of it on"
        lines += [f"- {name}: the same text costs {ratio:.3f} times what it did; {even}."]
    return [
        *lines,
        "",
        "Operations per token, forward: 2 * (parameters of the layers + embedding rows * hidden size). A mix with a",
        "share p of this text, the rest being cut as before, costs less from p = (1 - 1/c) / (1 - r) on: c is the",
        "cost ratio of a token, r the ratio of token counts.",
    ]


def _draw(languages: Mapping[str, Any], path: Path) -> None:
    # Names are the user's and may need glyphs the font lacks: only ASCII is drawn.
    names = [name if name.isascii() else f"text {rank}" for rank, name in enumerate(languages, 1)]
    with saved_figure(path, 7, 1.6 + 0.7 * len(names), dpi=144, layout="constrained") as figure:
        axes = figure.subplots()
        places = np.arange(len(names))
        for shift, side, color in ((-0.2, "before", "#9aa5b1"), (0.2, "after", BLUE)):
            values = [language[side]["characters_per_token"] for language in languages.values()]
            bars = axes.barh(places + shift, values, height=0.38, label=side, color=color)
            axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("characters per token")
        axes.set_title("Held-out text", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, frameon=False)
