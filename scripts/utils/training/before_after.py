"""A few questions, answered by the weights that are trained: before the first step and after the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.arguments import GenerationArguments
from ..core.errors import InputError
from ..data.questions import OpenQuestion, read_questions
from ..generation.batching import Generator
from ..generation.engine import Prompter, Request
from ..models.loading import causal_model
from ..weights.config import load_config, local_folder
from ..weights.generation_config import named_end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from ..core.arguments import LoraArguments, ModelArguments
    from .arguments import RunArguments

MOST = 5  # questions: to be looked at, not to be counted
SETTINGS: dict[str, Any] = {"max_new_tokens": 128, "do_sample": False, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Trial:
    """Questions, ready to be answered.

    Attributes:
        end_ids: what ends an answer besides the tokenizer's and the template's ends.
    """

    questions: Sequence[OpenQuestion]
    end_ids: Sequence[int]

    def answer(self, trainer: Trainer) -> list[str]:
        """The likeliest answers of the model as it is; [] in all processes but the first.

        Nothing that training depends on changes: no random number is drawn, and the mode of the model stays.
        """
        if trainer.args.process_index != 0:
            return []
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        # DeepSpeed would move it when training begins.
        if trainer.is_deepspeed_enabled and not getattr(model, "is_quantized", False):
            model.to(trainer.args.device)
        tokenizer: Any = trainer.processing_class
        generator = Generator(causal_model(model), tokenizer, tokenizer.chat_template, self.end_ids)
        prompts = [generator.encode(question.messages) for question in self.questions]
        was_training = model.training
        model.eval()
        try:
            return [found.text for found in generator.generate(prompts, GenerationArguments(**SETTINGS))]
        finally:
            model.train(was_training)

    def describe(self, before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
        """What all_results.json holds: question, reference where there is one, before, after."""
        rows = []
        for question, old, new in zip(self.questions, before, after, strict=True):
            reference = {} if question.reference is None else {"reference": question.reference}
            rows.append({"question": question.text, **reference, "before": old, "after": new})
        return rows


def open_trial(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    training_args: RunArguments,
) -> Trial | None:
    """The first questions of --questions; None without the flag.

    Raises: InputError for what is no question or leaves no room for an answer, before weights are read; or where no
        process has all weights.
    """
    if not paths:
        return None
    config = getattr(training_args, "hf_deepspeed_config", None)
    if training_args.fsdp or (config is not None and config.is_zero3()):
        raise InputError(
            "--questions: ZeRO-3 and FSDP spread the weights, and answering needs them whole; leave it out, and ask "
            "after training with eval_answers.py"
        )
    questions = read_questions(paths, need_reference=False, most=MOST)
    base = model_args.model_name_or_path
    window = None if base is None else getattr(load_config(base), "max_position_embeddings", None)
    names = (lora_args.adapter_name_or_path, base)
    trial = Trial(questions, named_end_ids([local_folder(name) for name in names if name]))
    prompter = Prompter(tokenizer, template, window, trial.end_ids)
    for question in questions:
        try:
            prompter.check(Request(prompter.encode(question.messages), GenerationArguments(**SETTINGS)))
        except InputError as error:
            raise InputError(f"{question.location}: {error}") from None
    return trial


def as_text(rows: Sequence[dict[str, str]]) -> str:
    """For the log: a question, then a line for each of reference, before and after."""
    return "\n".join(
        "\n".join([f"  {_line(row['question'])}", *(f"    {name:9}  {_line(row[name])}" for name in _names(row))])
        for row in rows
    )


def as_notes(rows: Sequence[dict[str, str]]) -> list[str]:
    """For README.md: a heading, then a paragraph for each question."""
    items = (
        [f"**{_line(row['question'])}**", *(f"- {name}: {_line(row[name])}" for name in _names(row))] for row in rows
    )
    return ["## Before and after", *map("\n".join, items)]


def _names(row: dict[str, str]) -> list[str]:
    return [name for name in row if name != "question"]


def _line(text: str) -> str:
    """A text in one line; nothing at all is shown as such."""
    return " ".join(text.split()) or "∅"
