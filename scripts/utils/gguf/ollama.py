"""Ollama: the Modelfile of a GGUF file, with the chat template in Go's language and the words to stop at."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import InputError
from ..text.prompts import OWN_TEMPLATE, Message, render, resolve_template
from .vocabulary import find_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MARKS = [f"\ue000{name}\ue001" for name in ("system", "user", "answer", "user2", "answer2")]
_ROLES = ("system", "user", "assistant", "user", "assistant")


@dataclass(frozen=True)
class TurnTexts:
    """What a chat template writes around the contents of a conversation, without the BOS that llama.cpp adds."""

    default_system: str  # used where a conversation has no system message
    before_system: str
    after_system: str
    no_system: str  # what begins a conversation with an empty system message
    before_user: str  # of later turns
    after_user: str
    before_answer: str  # after what a prompt ends with
    after_answer: str


def read_turn_texts(tokenizer: PreTrainedTokenizerBase) -> TurnTexts | None:
    """Take the tokenizer's chat template apart; None if the parts do not reproduce it."""
    template = resolve_template(OWN_TEMPLATE, tokenizer)

    def split(*contents: str, system: bool = True, prompt: bool = True) -> list[str]:
        """What stands around the contents of a conversation that begins with a system message, or does not."""
        roles = _ROLES[0 if system else 1 :]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        return re.split("|".join(_MARKS), render(messages, template, tokenizer, add_generation_prompt=prompt))

    try:
        parts = split(*_MARKS, prompt=False)
        after_user = split(*_MARKS[:2])[-1]
        default, empty = split(_MARKS[1], system=False)[0], split("", _MARKS[1])[0]
    except InputError:
        return None
    if len(parts) != 6:
        return None
    start, after_system, middle, between, _, end = parts
    default_system = ""
    if default.startswith(start) and default.endswith(after_system) and len(default) > len(start + after_system):
        default_system = default[len(start) : len(default) - len(after_system)]
    bos = str(tokenizer.bos_token) if _adds_bos(tokenizer) else ""
    if not start.startswith(bos):
        logger.warning("Modelfile: llama.cpp puts %s before every prompt, which the chat template does not write", bos)
        bos = ""
    texts = TurnTexts(
        default_system=default_system,
        before_system=start.removeprefix(bos),
        after_system=after_system,
        no_system=(empty if default_system else default).removeprefix(bos),
        before_user=between.removeprefix(end),
        after_user=after_user,
        before_answer=middle.removeprefix(after_user),
        after_answer=end,
    )
    return texts if _reproduces(texts, bos, template, tokenizer) else None


def _reproduces(texts: TurnTexts, bos: str, template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether conversations of one to three turns come out as the template writes them."""
    for count in range(1, 6):
        turns = [{"role": _ROLES[1 + number % 2], "content": f"text {number}"} for number in range(count)]
        for messages in (turns, [{"role": "system", "content": "be brief"}, *turns]):
            expected = render(messages, template, tokenizer, add_generation_prompt=count % 2 == 1)
            if bos + _compose(texts, messages) != expected:
                return False
    return True


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[0] == tokenizer.bos_token_id


def _compose(texts: TurnTexts, messages: Sequence[Message]) -> str:
    """The conversation as the Modelfile's template writes it."""
    system, turns = texts.default_system, list(messages)
    if turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
    first = f"{texts.before_system}{system}{texts.after_system}" if system else texts.no_system
    result = []
    for number, turn in enumerate(turns):
        if turn["role"] == "user":
            result += [texts.before_user if number else first, turn["content"], texts.after_user]
        else:
            result += [texts.before_answer, turn["content"], texts.after_answer]
    return "".join(result)


def build_modelfile(file: str, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int] = ()) -> str:
    """Ollama's Modelfile for a GGUF file beside it.   Source: docs.ollama.com/modelfile and Go's text/template.

    Args: end_ids: tokens that end answers besides the tokenizer's own, by the model's files.
    A template that cannot be put in Go's language is left out: Ollama then looks at the one in the GGUF file.
    """
    lines = [f"FROM ./{file}"]
    if not tokenizer.chat_template:
        # A base model continues text; without this line Ollama might take a template for it.
        return "\n".join([*lines, 'TEMPLATE """{{ .Prompt }}"""', ""])
    stops = [_stop_line(text) for text in tokenizer.convert_ids_to_tokens(find_ends(tokenizer, end_ids))]
    texts = read_turn_texts(tokenizer)
    if texts is None or any(mark in text for text in dataclasses.astuple(texts) for mark in ("{{", '"""')):
        logger.warning("Modelfile without TEMPLATE: the chat template is none that can be written for Ollama")
        lines.append("# TEMPLATE is left out: Ollama looks at the chat template in the GGUF file.")
        return "\n".join([*lines, *stops, ""])
    template = (
        '{{- range $i, $m := .Messages }}{{ if eq $m.Role "user" }}{{ if le $i 1 }}{{ if $.System }}'
        f"{texts.before_system}{{{{ $.System }}}}{texts.after_system}{{{{ else }}}}{texts.no_system}{{{{ end }}}}"
        f"{{{{ else }}}}{texts.before_user}{{{{ end }}}}{{{{ $m.Content }}}}{texts.after_user}"
        f'{{{{ else if eq $m.Role "assistant" }}}}{texts.before_answer}{{{{ $m.Content }}}}{texts.after_answer}'
        "{{ end }}{{ end }}"
    )
    lines.append(f'TEMPLATE """{template}"""')
    if texts.default_system:
        lines.append(f'SYSTEM """{texts.default_system}"""')
    if next_turn := texts.before_user.removeprefix(str(tokenizer.bos_token)).strip():
        stops.append(_stop_line(next_turn))
    return "\n".join([*lines, *dict.fromkeys(stops), ""])


def _stop_line(text: str) -> str:
    return f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}"
