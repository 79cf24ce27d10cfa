"""LongBench's prompts: what is asked of an engine, as token ids that leave room for the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ...core.arguments import GenerationArguments
from ...core.errors import InputError
from ...generation.cache import common_prefix
from ...generation.engine import Prompter, Request
from ...text.prompts import with_system_prompt
from .tasks import Sample, Task


@dataclass(frozen=True)
class PromptWriter:
    """Turns samples into requests.

    Attributes:
        prompter: whose tokenizer and template are used.
        settings: how answers are drawn; their length is the task's own, if that is shorter.
        with_inst: true: everything is asked in the template; false: nothing is; auto: what the task says.
        max_length: tokens of prompt, template and answer together; None: any number.
        constrains: whether the engine takes constraints.
    """

    prompter: Prompter
    settings: GenerationArguments
    with_inst: str = "auto"
    system_prompt: str | None = None
    max_length: int | None = None
    constrains: bool = True

    def answer_length(self, task: Task) -> int:
        """Longest answer, in tokens."""
        return min(task.max_new_tokens, self.settings.max_new_tokens)

    def in_template(self, task: Task) -> bool:
        """Whether the task's prompts are put into the template."""
        return {"true": True, "false": False, "auto": task.chat}[self.with_inst]

    # ------------------------------------------------------------ requests

    def request(self, task: Task, sample: Sample, seed: int) -> tuple[Request, int]:
        """What is asked, and how many tokens were cut out of the prompt."""
        prompt, cut = self.encode(task, sample)
        longest = self.answer_length(task)
        least, stop, constraint = min(self.settings.min_new_tokens, longest), self.settings.stop, None
        if task.one_line:
            least, stop = max(least, 1), [*stop, "\n"]
            constraint = NoNewlineFirst(self._may_begin) if self.constrains else None
        settings = replace(self.settings, max_new_tokens=longest, min_new_tokens=least, stop=stop)
        return Request(prompt, settings, seed, strip=self.in_template(task), constraint=constraint), cut

    @cached_property
    def _may_begin(self) -> torch.Tensor:
        """Which tokens do not begin with a newline, (V,) bool."""
        return torch.tensor([not surface.startswith(b"\n") for surface in self.prompter.token_bytes])

    # ------------------------------------------------------------ token ids

    def encode(self, task: Task, sample: Sample) -> tuple[list[int], int]:
        """A sample's prompt, and how many tokens were cut out of its middle.

        It is cut where upstream cuts it: as many of its first tokens stay as of its last. But template and special
        tokens are counted, and what is left goes to the model as it is, not as text that is encoded once more. What
        stands around the long text is not cut: where a half has too little room for it, the half gets more.
        """
        ids = self._encode(task, sample.context, sample.question)
        if self.max_length is None or len(ids) <= (room := self.max_length - self.answer_length(task)):
            return ids, 0
        start, end = _ends(ids, self._frame) if self.in_template(task) else (0, 0)
        half = (room - start - end) // 2
        before, after = _ends(ids, self._encode_bare(task, sample))
        head = min(max(start + half, before), room - after)
        tail = min(max(end + half, after), room - head)
        return ids[:head] + ids[len(ids) - tail :], len(ids) - head - tail

    def check(self, task: Task, samples: Sequence[Sample]) -> None:
        """Raises: InputError naming a sample whose prompt is too long even without its long text."""
        if self.max_length is None:
            return
        answer = self.answer_length(task)
        for sample in samples:
            length = len(self._encode_bare(task, sample))
            if length > self.max_length - answer:
                raise InputError(
                    f"{sample.location}: the prompt has {length} tokens without its {' and '.join(task.long_fields)}, "
                    f"its answer may have {answer}, but --max_length is {self.max_length}; pass a larger one, up to "
                    f"the model's window of {self.prompter.context}, or leave {task.name} out of --predict_on"
                )

    @cached_property
    def _frame(self) -> list[int]:
        """The template around nothing."""
        return self._chat("")

    def _encode_bare(self, task: Task, sample: Sample) -> list[int]:
        return self._encode(task, "", "" if "input" in task.long_fields else sample.question)

    def _encode(self, task: Task, context: str, question: str) -> list[int]:
        text = task.fill(context, question)
        return self._chat(text) if self.in_template(task) else self.prompter.encode_text(text)

    def _chat(self, text: str) -> list[int]:
        return self.prompter.encode(with_system_prompt([{"role": "user", "content": text}], self.system_prompt))


def _ends(ids: Sequence[int], others: Sequence[int]) -> tuple[int, int]:
    """How many tokens at its beginning and at its end a prompt has in common with another, a shorter one."""
    before = common_prefix(ids, others)
    return before, min(common_prefix(ids[::-1], others[::-1]), len(others) - before)


class NoNewlineFirst:
    """A sampling.Constraint: an answer of one line does not begin with the newline that would end it."""

    def __init__(self, may_begin: torch.Tensor) -> None:
        self._may_begin, self._begun = may_begin, False

    def allowed(self) -> torch.Tensor:
        """See sampling.Constraint."""
        return torch.ones_like(self._may_begin) if self._begun else self._may_begin

    def advance(self, token_id: int) -> None:
        """See sampling.Constraint."""
        self._begun = True
