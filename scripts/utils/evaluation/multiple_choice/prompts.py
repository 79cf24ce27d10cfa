"""Prompts of questions with choices: text or messages by a preset's wording, token ids that fit the model's window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...core.errors import InputError
from ...generation.engine import Prompter
from ...text.prompts import (
    IGNORE_INDEX,
    Message,
    encode_conversation,
    render_forerunner_exam,
    with_system_prompt,
)
from ...text.tokenizer import encode_text
from .questions import ChoiceQuestion
from .scoring import ChoiceRequest
from .subjects import Subject
from .wordings import Mode, Wording

Prompt = str | list[Message]


@dataclass(frozen=True)
class ChoicePrompt:
    """A question as it is asked.

    Attributes:
        num_examples: solved questions before it.
        num_dropped: examples that had no room in the window.
        num_cut: tokens cut from the beginning of a prompt that is too long without examples too.
    """

    question: ChoiceQuestion
    request: ChoiceRequest
    num_examples: int
    num_dropped: int = 0
    num_cut: int = 0


class ChoiceWriter:
    """Writes prompts in one wording, plain or (`with_prompt`) as conversations."""

    def __init__(self, wording: Wording, mode: Mode, with_prompt: bool, system_prompt: str | None = None) -> None:
        self.wording, self.mode, self.with_prompt = wording, mode, with_prompt
        self._system_prompt = system_prompt
        if wording.system is not None and with_prompt and system_prompt is not None:
            raise InputError("the preset has a system prompt of its own; leave out --system_prompt, or --preset")

    def write(self, question: ChoiceQuestion, subject: Subject, examples: Sequence[ChoiceQuestion]) -> Prompt:
        """The prompt, up to where the answer comes."""
        name = self.wording.name_subject(subject)
        introduces = bool(examples) or self.wording.introduces_zero_shot
        introduction = self.wording.introduction.replace("{subject}", name) if introduces else ""
        if not self.with_prompt:
            return introduction + "".join(map(self._example, examples)) + self._ask(question)
        turns = [(self._ask(example, is_example=True), self._solve(example)) for example in examples]
        turns.append((self._ask(question), ""))
        acknowledgement = self.wording.acknowledgement.replace("{subject}", name)
        if introduction and acknowledgement:
            turns.insert(0, (introduction, acknowledgement))
        elif introduction:
            turns[0] = (introduction + turns[0][0], turns[0][1])
        if self.wording.system is not None:
            return render_forerunner_exam(self.wording.system, turns)
        messages = []
        for asked, answered in turns:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        return with_system_prompt(messages[:-1], self._system_prompt)

    def answers(self, question: ChoiceQuestion) -> list[str]:
        """What is scored after the prompt: the letters, or in cloze mode the texts of the choices."""
        answers = list(question.choices if self.mode == "cloze" else question.letters)
        return answers if self.with_prompt else [self.wording.before_answer + answer for answer in answers]

    def _state(self, question: ChoiceQuestion) -> str:
        """The question and, but in cloze mode, its choices."""
        text = question.text.strip() if self.wording.strips else question.text
        if self.mode == "cloze":
            return text
        choices = zip(question.letters, question.choices, strict=True)
        return text + "".join(f"\n{letter}. {choice}" for letter, choice in choices)

    def _ask(self, question: ChoiceQuestion, is_example: bool = False) -> str:
        ask = self.wording.ask
        # The forerunners' conversations have examples without reasoning before a question with it.
        if self.mode == "cot" and not (is_example and self.wording.system is not None):
            ask = self.wording.reason_in_chat if self.with_prompt else self.wording.reason
        return self._state(question) + ask

    def _solve(self, example: ChoiceQuestion) -> str:
        """An example's answer in a conversation."""
        assert example.answer is not None
        if self.mode == "cloze":
            return example.choices[example.letters.index(example.answer)]
        if self.mode == "cot" and self.wording.system is None:
            return self._explain(example) + self.wording.reasoned[1].replace("{answer}", example.answer)
        return example.answer

    def _example(self, example: ChoiceQuestion) -> str:
        """An example with its answer in a plain prompt."""
        assert example.answer is not None
        wording = self.wording
        if self.mode == "cot":
            before, after = wording.reasoned
            reasoned = before + self._explain(example) + after.replace("{answer}", example.answer)
            return self._state(example) + reasoned + wording.after_answer
        return self._state(example) + wording.ask + wording.before_answer + self._solve(example) + wording.after_answer

    def _explain(self, example: ChoiceQuestion) -> str:
        if not example.explanation:
            raise InputError(
                f"{example.location}: the example has no explanation, which chain of thought shows; pass "
                "--num_fewshot 0, or another --mode"
            )
        return example.explanation


# ---------------------------------------------------------------- token ids


class ChoiceEncoder:
    """Makes requests of prompts, for a model here or, without a prompter, for a server."""

    def __init__(self, writer: ChoiceWriter, prompter: Prompter | None, max_new_tokens: int = 0) -> None:
        """`max_new_tokens`: room for a generated answer; 0: answers are scored."""
        self._writer, self._prompter, self._room = writer, prompter, max_new_tokens
        self._known: dict[tuple[str, str], tuple[int, ...]] = {}

    def encode(self, question: ChoiceQuestion, subject: Subject, examples: Sequence[ChoiceQuestion]) -> ChoicePrompt:
        """The request of a question: with as many of the examples, from the first, as the window has room for.

        A prompt that is too long without any loses its beginning. Raises: InputError for a choice without text.
        """
        if self._writer.mode == "cloze" and not all(choice.strip() for choice in question.choices):
            raise InputError(
                f"{question.location}: a choice is empty, its likelihood says nothing; use --mode constrained"
            )
        texts, prompter = self._texts(question), self._prompter
        for count in range(len(examples), -1, -1):
            prompt = self._writer.write(question, subject, examples[:count])
            if prompter is None:
                return ChoicePrompt(question, ChoiceRequest((), (), prompt, texts), count)
            ids = self._encode_prompt(prompt)
            continuations = self._continuations(question, prompt, texts)
            room = self._context - max(map(len, continuations)) if continuations else self._context - self._room
            if len(ids) <= room:
                break
        dropped, cut = len(examples) - count, max(len(ids) - room, 0)
        if prompter is not None and cut:
            start = ids[:1] if ids[0] == prompter.tokenizer.bos_token_id else []
            if room <= len(start):
                raise InputError(
                    f"the model's window of {self._context} tokens has no room for a question beside --max_new_tokens "
                    f"{self._room}; pass less"
                )
            ids = start + ids[len(start) + cut :]
        request = ChoiceRequest(tuple(ids), continuations, prompt, texts)
        return ChoicePrompt(question, request, count, dropped, cut)

    @property
    def _context(self) -> int:
        context = self._prompter.context if self._prompter else None
        return 1 << 40 if context is None else context

    def _texts(self, question: ChoiceQuestion) -> tuple[str, ...]:
        """The continuations as text."""
        if self._room:
            return ()
        if self._writer.wording.letter_scoring == "both":
            return (*(f" {letter}" for letter in question.letters), *question.letters)
        return tuple(self._writer.answers(question))

    def _encode_prompt(self, prompt: Prompt) -> list[int]:
        assert self._prompter is not None
        return self._prompter.encode_text(prompt) if isinstance(prompt, str) else self._prompter.encode(prompt)

    def _continuations(
        self, question: ChoiceQuestion, prompt: Prompt, texts: Sequence[str]
    ) -> tuple[tuple[int, ...], ...]:
        scoring = self._writer.wording.letter_scoring
        if scoring == "joint":
            return tuple(self._follow(prompt, text) for text in texts)
        assert self._prompter is not None
        alone = [encode_text(self._prompter.tokenizer, letter) for letter in question.letters if texts]
        if scoring == "spaced":
            return tuple((ids[-1],) for ids in alone)
        after = [encode_text(self._prompter.tokenizer, f"：{letter}") for letter in question.letters if texts]
        return (*((ids[0],) for ids in alone), *((ids[-1],) for ids in after))

    def _follow(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """Ids of a continuation, cut from the prompt's last line as training cuts an answer from its question."""
        # A new line separates tokens, so what stands before the last one does not matter.
        tail = prompt[prompt.rfind("\n") :] if isinstance(prompt, str) else ""
        if (tail, text) not in self._known:
            found = self._after_text(tail, text) if tail else self._after_template(text)
            if not found:
                raise InputError(f"the tokenizer has no tokens for {text!r}")
            self._known[tail, text] = tuple(found)
        return self._known[tail, text]

    def _after_text(self, tail: str, text: str) -> list[int]:
        assert self._prompter is not None
        tokenizer = self._prompter.tokenizer
        before, joint = encode_text(tokenizer, tail), encode_text(tokenizer, tail + text)
        if joint[: len(before)] == before:
            return joint[len(before) :]
        # A token would reach from the prompt into the answer: the prompt stays as it is.
        return encode_text(tokenizer, "\n" + text)[len(encode_text(tokenizer, "\n")) :]

    def _after_template(self, text: str) -> list[int]:
        """What training would have as the answer, its end token apart."""
        prompter = self._prompter
        assert prompter is not None and prompter.template is not None
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        ids, labels = encode_conversation(turn, prompter.template, prompter.tokenizer)
        answer = [index for index, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
        while answer and answer[-1] in prompter.stop_ids:
            answer.pop()
        return answer


def count_cuts(prompts: Sequence[ChoicePrompt]) -> Mapping[str, int]:
    """How many prompts lost examples or their beginning, and how much."""
    return {
        "prompts_without_all_examples": sum(prompt.num_dropped > 0 for prompt in prompts),
        "dropped_examples": sum(prompt.num_dropped for prompt in prompts),
        "cut_prompts": sum(prompt.num_cut > 0 for prompt in prompts),
        "cut_tokens": sum(prompt.num_cut for prompt in prompts),
    }
