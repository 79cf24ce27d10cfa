"""Export: the self-test of GGUF files, llama.cpp's tokens and logits against transformers'.

transformers' model runs in float32, a layer at a time, so that memory does not grow with the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..core.errors import InputError
from ..lora.inputs import MergeInputs
from ..lora.streamed_model import StreamedModel
from ..text.pieces import SAMPLE
from ..text.tokenizer import encode_raw
from .llamacpp import compute_logits, continue_greedily, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLAG = "--self_test full"
CONTEXT = 256  # tokens of a text that are compared
GREEDY_PROMPTS, PROMPT_TOKENS, GREEDY_TOKENS = 20, 16, 64

# Perplexity and continuations are compared on these: both languages, a dialogue with code, figures.
PASSAGES = (
    *SAMPLE,
    "春天来了，河边的柳树发出了嫩芽，孩子们脱下厚厚的棉衣，在草地上放风筝。老人们坐在长椅上晒太阳，谈论今年的收成。",
    "问：如何用Python读取文本文件？\n答：\nwith open('a.txt', encoding='utf-8') as f:\n    text = f.read()",
    "The committee met on 14 March to discuss the budget. After two hours of debate, most members agreed that the "
    "library should stay open on Sundays, and that the roof must be repaired before winter.",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the pressure is lower, so it boils at a "
    "lower temperature, and food takes longer to cook.",
)
# Texts that tell tokenizers apart.
TOKEN_TEXTS = (
    *PASSAGES,
    *("", " ", "  ", "   x", "x   ", "\n", "\n\n\n", "a\n b\r\n\tc", "\t\t", " 你好 ", "　　全角空格", "a" * 50),
    *("0", "3.14159", "1234567890", "2023年10月1日", "１２３", "$1,000.50", "100%", "x^2+y^2=z^2", "1e-4", "0x7f"),
    "def f(x):\n    if x > 0:\n        return [i ** 2 for i in range(x)]\n    return {'a': \"b\"}\n",
    "<div class=\"a\">&nbsp;</div> // comment /* ... */ #include <stdio.h>; SELECT * FROM t WHERE a != 'b';",
    *("我喜欢machine learning和深度学习。", "他说：“Hello，世界！”——真的吗？", "中English混排，mixed文本123。"),
    *("😀👍🏽👨\u200d👩\u200d👧 🇨🇳", "龘靐齉𠀀𪚥㐀", "naïve café Straße İstanbul ﬁ e\u0301", "哈" * 30),
    *("한국어 日本語 العربية ไทย", "\x00\x01\x7f", "\u200b\ufeff\u2028\u00a0", "I'm you've he'll THEY'RE"),
    *("……！！！???===---___", "…—·「」『』【】", "<s>", "</s>", "<unk> <pad>", "<0x0A>"),
    *("<|im_start|>user\n<|im_end|>", "<|begin_of_text|><|eot_id|>", "### Response:", "[/INST]"),
)


# ---------------------------------------------------------------- what counts as a mistake


@dataclass(frozen=True)
class Rule:
    """How far llama.cpp's arithmetic may be from transformers' in float32."""

    near_tie: float  # greedy continuations are compared up to a position whose two best logits are closer than this
    agreement: float  # least share of positions with the same likeliest token, given the same text
    perplexity: float  # largest relative difference


# llama.cpp multiplies float16 weights with activations rounded to float16 (11 significant bits) and bfloat16 weights
# with activations rounded to bfloat16 (8 bits), hence the wider rule.
RULES = {"F32": Rule(0.01, 0.995, 0.001), "F16": Rule(0.01, 0.995, 0.001), "BF16": Rule(0.1, 0.98, 0.005)}

# Of quantised files: the largest ratio of perplexities, by bits a weight, that quantisation explains. Published for 7B
# models: 8 bits 1.0001, 4 bits 1.012 to 1.08, 2 bits 1.22, and 1 bit below 2; swapped rows or a wrong vocabulary give
# 10 and more.
LARGEST_RATIO = {8: 1.02, 6: 1.25, 5: 1.25, 4: 1.25, 3: 1.6, 2: 2.0, 1: 3.0}


def choose_rule(file_type: str, experts: bool) -> Rule | None:
    """The rule for a full-precision type, None for others. With experts, rounding may turn a near-tie in a router."""
    return RULES.get("BF16" if experts and file_type == "F16" else file_type)


def largest_ratio(file_type: str) -> float:
    """The bound for a quantised type such as Q4_K_M or IQ2_XS."""
    return LARGEST_RATIO[int(re.findall(r"\d", file_type)[0])]


# ---------------------------------------------------------------- tokenisation


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The built-in texts, and the tokenizer's own special tokens as a user may type them."""
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:64]
    return [*TOKEN_TEXTS, *specials, *(f"你好{token}world" for token in specials)]


# ---------------------------------------------------------------- the comparison


@dataclass
class _Scores:
    """What an engine makes of the passages."""

    nll: float  # mean negative log-likelihood of a token, in nats
    likeliest: np.ndarray  # the likeliest next token at every position


def _score(rows: Sequence[Sequence[int]], logits: Iterable[np.ndarray]) -> _Scores:
    total, count, likeliest = 0.0, 0, []
    for row, values in zip(rows, logits, strict=True):
        # Copied, because llama.cpp's are overwritten by the next row.
        log_probs = torch.from_numpy(values.copy()).double().log_softmax(dim=-1)
        total -= float(log_probs[torch.arange(len(row) - 1), torch.tensor(row[1:])].sum())
        count += len(row) - 1
        likeliest.append(values.argmax(axis=1))
    return _Scores(total / count, np.concatenate(likeliest))


def run_self_test(
    inputs: MergeInputs, files: Mapping[str, Path], texts: Sequence[str], threads: int
) -> dict[str, dict[str, Any]]:
    """Compare what llama.cpp computes with each file with what transformers computes in float32.

    Args:
        files: by file type.
        texts: perplexity is taken over their beginnings; the first GREEDY_PROMPTS are continued too.
    Returns: figures by file type; "problems" lists what breaks the rules.
    """
    assert inputs.tokenizer is not None
    context = min(CONTEXT, int(inputs.config.get("max_position_embeddings") or CONTEXT))
    rows = [encode_raw(text, inputs.tokenizer)[:context] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise InputError("the self-test has no text; pass other --self_test_data")
    reference = StreamedModel(inputs, FLAG)
    expected = _score(rows, reference.run(rows))
    figures: dict[str, dict[str, Any]] = {}
    rules = {file_type: choose_rule(file_type, "num_local_experts" in inputs.config) for file_type in files}
    continued: list[tuple[str, int, list[int]]] = []  # (file type, length of the prompt, ids)
    for file_type, path in files.items():
        with open_model(path, threads, context) as model:
            found = _score(rows, (compute_logits(model, row) for row in rows))
            figures[file_type] = _compare_scores(found, expected, file_type, rules[file_type])
            for row in rows[:GREEDY_PROMPTS] if rules[file_type] else ():
                prompt = row[: min(PROMPT_TOKENS, len(row) - 1)]
                count = min(GREEDY_TOKENS, context - len(prompt))
                continued.append((file_type, len(prompt), continue_greedily(model, prompt, count)))
    if continued:
        logits = reference.run([ids[:-1] for _, _, ids in continued])
        for (file_type, start, ids), values in zip(continued, logits, strict=True):
            rule = rules[file_type]
            assert rule is not None
            _compare_continuation(figures[file_type], ids, start, values, rule)
    for result in figures.values():
        result["passed"] = not result["problems"]
    return figures


def _compare_scores(found: _Scores, expected: _Scores, file_type: str, rule: Rule | None) -> dict[str, Any]:
    ratio = math.exp(found.nll - expected.nll)
    agreement = float((found.likeliest == expected.likeliest).mean())
    problems = []
    # Written so that NaN is a problem.
    if rule is None:
        largest = largest_ratio(file_type)
        if not 1 / largest <= ratio <= largest:
            problems.append(f"perplexity is {ratio:.4g} times the model's; quantisation explains {largest} at most")
    else:
        if not abs(ratio - 1) <= rule.perplexity:
            problems.append(f"perplexity is {100 * (ratio - 1):+.3g} % off, allowed {100 * rule.perplexity:.3g} %")
        if not agreement >= rule.agreement:
            problems.append(f"{agreement:.2%} of likeliest next tokens agree, need {rule.agreement:.2%}")
    return {
        "tokens": len(found.likeliest),
        "perplexity": math.exp(found.nll),
        "reference_perplexity": math.exp(expected.nll),
        "perplexity_ratio": ratio,
        "top1_agreement": agreement,
        "problems": problems,
    }


def _compare_continuation(
    figures: dict[str, Any], ids: Sequence[int], start: int, logits: np.ndarray, rule: Rule
) -> None:
    """Count one greedy continuation: equal throughout, equal up to a near-tie, or different.

    Given llama.cpp's tokens, transformers' greedy choice is the same up to where its likeliest token first differs.
    """
    counts = figures.setdefault("greedy", {"prompts": 0, "equal": 0, "equal_up_to_a_near_tie": 0})
    counts["prompts"] += 1
    best = np.sort(logits, axis=1)[:, -2:]
    for position in range(start - 1, len(ids) - 1):
        if ids[position + 1] == int(logits[position].argmax()):
            continue
        gap = float(best[position, 1] - best[position, 0])
        if gap < rule.near_tie:
            counts["equal_up_to_a_near_tie"] += 1
        else:
            figures["problems"].append(
                f"the greedy continuation of prompt {counts['prompts']} differs at its token {position + 2 - start}, "
                f"where the model's two best logits are {gap:.3g} apart"
            )
        return
    counts["equal"] += 1
