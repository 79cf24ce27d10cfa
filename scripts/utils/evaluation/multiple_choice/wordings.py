"""Presets: the wording of prompts for questions with choices, each under a name and a version.

  default    what the forerunners asked, with its known faults mended: Chinese names of subjects instead of English
             file names, one conversation under the template of training, examples that reason where reasoning is asked
  a2-2023    Chinese-LLaMA-Alpaca-2's prompts of 2023 (MMLU: Chinese-Mixtral's), byte for byte
  lm-eval    lm-evaluation-harness's tasks cmmlu 1.0, ceval-valid 2.0 and mmlu 1.0
A change of a wording raises its preset's version; results carry both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ...core.errors import InputError
from ...text.prompts import SYSTEM_PROMPT
from .subjects import Subject

Mode = Literal["constrained", "cloze", "generative", "cot"]


@dataclass(frozen=True)
class Wording:
    """The texts of a prompt; `{subject}` stands for the subject's name, `{answer}` for a letter.

    Attributes:
        introduction: before the examples.
        ask: after the question, where the answer comes.
        before_answer: between that and an answer.
        after_answer: after an example.
        subject: how subjects are called: by name, by their key (file name), or by the words of it after a space.
        introduces_zero_shot: whether the introduction stands without examples too.
        strips: whether white space around questions goes.
        acknowledgement: in a conversation, what the assistant says to the introduction; empty: it is part of the first
            question.
        reason: ask for reasoning; reason_in_chat: in a conversation; reasoned: an example's reasoning, before and
            after its explanation.
        system: system prompt of conversations in the forerunners' own form; None: messages under a chat template.
        letter_scoring: letters are scored as they follow the prompt; as the sum of the logits of two forms of each;
            after a space.
        exact: likelihoods are computed in float32 of whatever the model's precision makes; off: in that precision,
            where letters are often exactly as likely as others, as the project does whose wording this is.
    """

    introduction: str
    ask: str
    before_answer: str = ""
    after_answer: str = "\n\n"
    subject: Literal["name", "key", "words"] = "name"
    introduces_zero_shot: bool = False
    strips: bool = False
    acknowledgement: str = ""
    reason: str = ""
    reason_in_chat: str = ""
    reasoned: tuple[str, str] = ("", "")
    system: str | None = None
    letter_scoring: Literal["joint", "both", "spaced"] = "joint"
    exact: bool = True

    def name_subject(self, subject: Subject) -> str:
        """What `{subject}` stands for."""
        words = subject.key.replace("_", " ")
        return {"name": subject.name, "key": subject.key, "words": f" {words}"}[self.subject]


@dataclass(frozen=True)
class Preset:
    """Wordings by benchmark (ceval, cmmlu, mmlu), or by language (zh, en) for one's own."""

    name: str
    version: int
    wordings: Mapping[str, Wording]
    modes: tuple[Mode, ...] = ("constrained", "cloze", "generative", "cot")
    chats: bool = True

    def wording(self, benchmark: str, language: str, mode: Mode, with_prompt: bool) -> Wording:
        """The texts for a benchmark. Raises: InputError for what the preset does not have."""
        found = self.wordings.get(benchmark) or self.wordings.get(language)
        if found is None:
            raise InputError(f"--preset {self.name} is for {', '.join(self.wordings)}; use --preset default")
        chat = self.chats and (found.system is not None or found.letter_scoring == "joint")
        reasons = bool(found.reason)
        if mode not in self.modes or (mode == "cot" and not reasons):
            raise InputError(f"--preset {self.name} has no {mode} prompts for {benchmark}; use --preset default")
        if with_prompt and not chat:
            raise InputError(f"--preset {self.name} has no conversations for {benchmark}; leave out --with_prompt")
        return found


_CHINESE = Wording(
    introduction="以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n",
    ask="\n答案：",
    acknowledgement="好的，我会结合{subject}相关知识回答",
    reason="\n答案：让我们一步一步思考，\n1.",
    reason_in_chat="\n请一步一步思考，最后用“所以答案是X。”的形式写出答案。",
    reasoned=("\n答案：让我们一步一步思考，\n", "\n所以答案是{answer}。"),
)
_ENGLISH = Wording(
    introduction="The following are multiple choice questions (with answers) about {subject}.\n\n",
    ask="\nAnswer:",
    before_answer=" ",
    introduces_zero_shot=True,
    reason="\nAnswer: Let's think step by step.\n1.",
    reason_in_chat="\nThink step by step, and end with “So the answer is X.”",
    reasoned=("\nAnswer: Let's think step by step.\n", "\nSo the answer is {answer}."),
)
_OWN = replace(_CHINESE, introduction="以下是关于{subject}的单项选择题，请选出其中的正确答案。\n\n")
_A2 = replace(
    _CHINESE,
    subject="key",
    reason_in_chat="\n答案是什么？让我们一步一步思考，\n1.",
    system=SYSTEM_PROMPT,
    letter_scoring="both",
)
_A2_MMLU = replace(_ENGLISH, subject="words", letter_scoring="spaced", reason="")
_LM_EVAL = Wording(
    introduction="以下是中国关于{subject}的单项选择题，请选出其中的正确答案。\n\n",
    ask="\n答案：",
    before_answer=" ",
    introduces_zero_shot=True,
    strips=True,
    exact=False,
)
_PRESETS = (
    Preset(
        "default",
        1,
        {"ceval": _CHINESE, "cmmlu": _CHINESE, "mmlu": _ENGLISH, "zh": _OWN, "en": _ENGLISH},
    ),
    Preset(
        "a2-2023",
        1,
        {"ceval": _A2, "cmmlu": replace(_A2, system="你是一个乐于助人的助手。"), "mmlu": _A2_MMLU},
        modes=("constrained", "generative", "cot"),
    ),
    Preset(
        "lm-eval",
        1,
        {
            "ceval": _LM_EVAL,
            "cmmlu": replace(_LM_EVAL, introduction="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n"),
            "mmlu": replace(
                _LM_EVAL,
                introduction="The following are multiple choice questions (with answers) about {subject}.\n\n",
                ask="\nAnswer:",
            ),
        },
        modes=("constrained",),
        chats=False,
    ),
)
PRESETS = {preset.name: preset for preset in _PRESETS}
