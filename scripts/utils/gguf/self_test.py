"""Export: the self-test of GGUF files, llama.cpp's tokens and logits against transformers'.

transformers' model runs in float32, a layer at a time, so that memory does not grow with the model; llama.cpp runs in
a process of its own, which it may end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
from .llamacpp import compute_logits, continue_greedily, separate_process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLAG = "--self_test full"
CONTEXT = 256  # tokens of a text that are compared
GREEDY_PROMPTS, PROMPT_TOKENS, GREEDY_TOKENS = 20, 16, 64

# Distributions and continuations are compared on these: both languages, dialogues, code, figures.
PASSAGES = (
    *SAMPLE,
    "春天来了，河边的柳树发出了嫩芽，孩子们脱下厚厚的棉衣，在草地上放风筝。老人们坐在长椅上晒太阳，谈论今年的收成。",
    "问：如何用Python读取文本文件？\n答：\nwith open('a.txt', encoding='utf-8') as f:\n    text = f.read()",
    "The committee met on 14 March to discuss the budget. After two hours of debate, most members agreed that the "
    "library should stay open on Sundays, and that the roof must be repaired before winter.",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the pressure is lower, so it boils at a "
    "lower temperature, and food takes longer to cook.",
    "外婆家的院子里有一棵老枣树，每到秋天，红枣挂满枝头。弟弟拿着竹竿在下面打，妹妹提着篮子捡，不一会儿就装了满满一篮。"
    "外婆把枣洗干净，一半晒干，一半做成枣糕，分给左右邻居，大家都说今年的枣比去年的甜。",
    "第三章 仓库管理规定\n第一条 货物入库前，管理员应当核对名称、数量和批号，发现不符的，当日报告主管。\n第二条 "
    "易燃物品必须单独存放，距离电源不少于五米。\n第三条 每月最后一个工作日盘点一次，盘点表保存三年。",
    "小王：这趟火车几点到南京？\n列车员：下午四点二十分，比原来晚了十分钟。\n小王：那我还赶得上五点的汽车吗？\n"
    "列车员：来得及，出站以后往右走，汽车站离这里只有三百米。",
    "数学题：一个水池有两根进水管，单开甲管六小时注满，单开乙管四小时注满。两管同时打开，一小时注入水池的六分之一加四分之一，"
    "也就是十二分之五，所以需要十二除以五，即二点四小时。",
    "The old lighthouse had not been used for thirty years when Martha bought it. Its lamp was rusty, and the stairs "
    "creaked at every step, but from the top she could see the whole bay: the fishing boats, the islands, and on "
    "clear evenings the hills of the other shore. She painted the door blue and moved in before the first snow.",
    "Customer: The kettle I ordered last week arrived with a broken lid. Can I send it back?\nAgent: I am sorry to "
    "hear that. Please keep the box; we will send a new lid today, and you do not have to return anything.\nCustomer: "
    "Thank you, that is very kind. How long will it take?\nAgent: Two or three working days.",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        "
    "self.items.append(item)\n\n    def pop(self):\n        if not self.items:\n            raise IndexError\n"
    "        return self.items.pop()\n",
    "城市,人口（万）,面积（平方公里）\n甲市,320,1850\n乙市,145,960\n丙市,87,2210\n合计,552,5020",
    "To repair a flat tyre, turn the bicycle upside down and take the wheel out. Lift one side of the tyre with two "
    "levers, pull out the tube, pump it up and hold it under water: bubbles show where the hole is. Dry the spot, "
    "roughen it, spread glue, wait five minutes, and press the patch on firmly.",
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

    divergence: float  # the mean KL divergence of next-token distributions, in nats
    near_tie: float | None  # greedy continuations are compared up to a position whose two best logits are closer


# llama.cpp multiplies float16 weights with activations rounded to float16 (11 significant bits) and bfloat16 weights
# with activations rounded to bfloat16 (8 bits), hence the wider rule.
FULL_RULES = {"F32": Rule(1e-5, 0.01), "F16": Rule(1e-4, 0.01), "BF16": Rule(0.01, 0.1)}

# Of quantised files, by bits a weight, what quantisation explains. llama.cpp's own measurements of Llama-3-8B are
# 0.0014 (8 bits), 0.0055, 0.011, 0.03 to 0.07 (4), 0.1, 0.45 and 2 (1); of one of 0.5 billion parameters here 0.002,
# 0.013 (4) and 0.14 (2). The room is for smaller models and unusual words; what is broken has 5 and more.
LARGEST_DIVERGENCE = {8: 0.1, 6: 0.2, 5: 0.3, 4: 0.5, 3: 1.0, 2: 2.0, 1: 4.0}


def choose_rule(file_type: str, experts: bool) -> Rule:
    """The rule for a type such as F16 or Q4_K_M. With experts, rounding may turn a near-tie in a router."""
    full = FULL_RULES.get("BF16" if experts and file_type == "F16" else file_type)
    return full or Rule(LARGEST_DIVERGENCE[int(re.findall(r"\d", file_type)[0])], None)


# ---------------------------------------------------------------- tokenisation


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The built-in texts, and the tokenizer's own special tokens as a user may type them."""
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:64]
    return [*TOKEN_TEXTS, *specials, *(f"你好{token}world" for token in specials)]


# ---------------------------------------------------------------- the comparison


@dataclass
class _TextScores:
    """What the two make of one text, summed over its positions."""

    positions: int
    divergence: float  # KL(model || file) of the next token's distributions, in nats
    agreements: int  # positions with the same likeliest next token
    nll: float  # by the file, of the tokens that follow
    reference_nll: float


def _score(ids: Sequence[int], expected: np.ndarray, found: np.ndarray) -> _TextScores:
    """Of logits after every token, (tokens, vocabulary) each."""
    reference, other = (torch.from_numpy(logits).double().log_softmax(dim=-1) for logits in (expected, found))
    places, following = torch.arange(len(ids) - 1), torch.tensor(ids[1:])
    return _TextScores(
        positions=len(ids),
        divergence=float((reference.exp() * (reference - other)).sum()),
        agreements=int((expected.argmax(axis=1) == found.argmax(axis=1)).sum()),
        nll=-float(other[places, following].sum()),
        reference_nll=-float(reference[places, following].sum()),
    )


def run_self_test(
    inputs: MergeInputs, files: Mapping[str, Path], texts: Sequence[str], threads: int
) -> dict[str, dict[str, Any]]:
    """Compare what llama.cpp computes with each file with what transformers computes in float32.

    Args:
        files: by file type.
        texts: distributions are compared over their beginnings; the first GREEDY_PROMPTS are continued too.
    Returns: figures by file type; "problems" lists what breaks the rules, "doubts" what these texts cannot decide.
    Raises: InputError if llama.cpp fails.
    """
    assert inputs.tokenizer is not None
    context = min(CONTEXT, int(inputs.config.get("max_position_embeddings") or CONTEXT))
    rows = [encode_raw(text, inputs.tokenizer)[:context] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise InputError("the self-test has no text; pass other --self_test_data")
    reference = StreamedModel(inputs, FLAG)
    expected = reference.run(rows)
    figures: dict[str, dict[str, Any]] = {}
    experts = any(inputs.config.get(name) for name in ("num_local_experts", "num_experts"))
    rules = {file_type: choose_rule(file_type, experts) for file_type in files}
    continued: list[tuple[str, int, list[int]]] = []  # (file type, length of the prompt, ids)
    with separate_process(threads, context) as run:
        for file_type, path in files.items():
            scores = [
                _score(row, logits, run(compute_logits, path, row)) for row, logits in zip(rows, expected, strict=True)
            ]
            figures[file_type] = judge(scores, rules[file_type])
            for row in rows[:GREEDY_PROMPTS] if rules[file_type].near_tie else ():
                prompt = row[: min(PROMPT_TOKENS, len(row) - 1)]
                count = min(GREEDY_TOKENS, context - len(prompt))
                continued.append((file_type, len(prompt), run(continue_greedily, path, prompt, count)))
    if continued:
        logits = reference.run([ids[:-1] for _, _, ids in continued])
        for (file_type, start, ids), values in zip(continued, logits, strict=True):
            _compare_continuation(figures[file_type], ids, start, values, rules[file_type])
    for result in figures.values():
        result["passed"] = not result["problems"] and not result["doubts"]
    return figures


def judge(scores: Sequence[_TextScores], rule: Rule) -> dict[str, Any]:
    """The figures of a file and what they say: whether its mean KL divergence is within the rule.

    The mean is known as well as the texts allow: +- twice its standard error. A text is the unit, since the positions
    of one text are not independent; the mean is a ratio of sums, whose standard error for k texts of n_i positions
    with divergences s_i is sqrt(k / (k - 1) * sum (s_i - n_i * mean)^2) / sum n_i (Cochran, Sampling Techniques, 6.4).
    A file is refused if all of the interval is beyond the bound, passes if none of it is, and is doubtful between.

    The divergence is compared and not the perplexity: it is positive wherever the file differs, so that errors add up,
    while those of log-likelihoods have both signs. Near the model, s nats of divergence are log-likelihoods that
    differ by sqrt(2 s) a token: at the 0.05 of a small model in 8 bits, perplexity over 376 tokens is off by 1.6 %
    (one standard error) with nothing wrong, and a damaged file may have the same perplexity.
    """
    count, positions = len(scores), sum(score.positions for score in scores)
    tokens = positions - count
    nll, reference_nll = (sum(getattr(score, name) for score in scores) / tokens for name in ("nll", "reference_nll"))
    mean = sum(score.divergence for score in scores) / positions
    squares = sum((score.divergence - score.positions * mean) ** 2 for score in scores)
    error = math.sqrt(count / (count - 1) * squares) / positions if count > 1 else math.inf
    low, high = mean - 2 * error, mean + 2 * error
    said = (
        f"mean KL divergence {mean:.3g} nats ({max(low, 0):.3g} to {high:.3g} over {count} texts), at most "
        f"{rule.divergence:g} explained by the type's rounding"
    )
    within = low <= rule.divergence  # not so of NaN
    return {
        "texts": count,
        "tokens": positions,
        "kl_divergence": mean,
        "kl_divergence_interval": [max(low, 0.0), high],
        "perplexity": math.exp(nll),
        "reference_perplexity": math.exp(reference_nll),
        "perplexity_ratio": math.exp(nll - reference_nll),
        "top1_agreement": sum(score.agreements for score in scores) / positions,
        "problems": [] if within else [said],
        "doubts": [said] if within and not high <= rule.divergence else [],
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
        if rule.near_tie is not None and gap < rule.near_tie:
            counts["equal_up_to_a_near_tie"] += 1
        else:
            figures["problems"].append(
                f"the greedy continuation of prompt {counts['prompts']} differs at its token {position + 2 - start}, "
                f"where the model's two best logits are {gap:.3g} apart"
            )
        return
    counts["equal"] += 1
