"""Prompts: every template and system prompt, messages -> token ids and labels, and the stop tokens.

A template is a jinja chat template, the form every engine reads, so training, inference and exported tokenizers
cannot differ.
User text enters as text: only what the template itself writes can become a special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.errors import InputError
from .tokenizer import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # label of positions without loss, the value PyTorch's and transformers' losses skip

Message = dict[str, str]

SYSTEM_PROMPT = "You are a helpful assistant. 你是一个乐于助人的助手。"
LONG_SYSTEM_PROMPT = SYSTEM_PROMPT + "请你提供专业、有逻辑、内容真实、有价值的详细回复。"

# A system message, or the template's default where there is none, then the other messages in `turns`.
_SPLIT_SYSTEM = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = DEFAULT -%}{%- set turns = messages -%}{%- endif -%}"
)


def _inst_template(default_system: str, wrap_system: str) -> str:
    """Llama-2's and Mistral's bracketed format; `wrap_system` is the jinja expression put before the first user
    text."""
    return (
        _SPLIT_SYSTEM.replace("DEFAULT", repr(default_system)) + "{%- for message in turns -%}"
        "{%- if message['role'] == 'assistant' -%}{{- ' ' + message['content'] + eos_token -}}"
        "{%- else -%}{{- (bos_token or '') + '[INST] ' -}}"
        "{%- if loop.first and system -%}{{- " + wrap_system + " -}}{%- endif -%}"
        "{{- message['content'] + ' [/INST]' -}}{%- endif -%}{%- endfor -%}"
    )


_LLAMA_SYSTEM = r"'<<SYS>>\n' + system + '\n<</SYS>>\n\n'"
_ALPACA_INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)

CHAT_TEMPLATES: dict[str, str] = {
    "alpaca-2": _inst_template(SYSTEM_PROMPT, _LLAMA_SYSTEM),
    "alpaca-2-long": _inst_template(LONG_SYSTEM_PROMPT, _LLAMA_SYSTEM),
    "llama-2": _inst_template("", _LLAMA_SYSTEM),
    "mixtral": _inst_template("", r"system + '\n\n'"),
    # First-generation Alpaca: its prompt ends in a space, and the answer's first piece carries another.
    "alpaca": _SPLIT_SYSTEM.replace("DEFAULT", repr(_ALPACA_INTRODUCTION)) + "{%- for message in turns -%}"
    "{%- if message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}"
    r"{%- else -%}{{- (bos_token or '') + (system + '\n\n' if loop.first and system else '') + '### Instruction:\n' "
    r"+ message['content'] + '\n\n### Response: ' -}}"
    "{%- endif -%}{%- endfor -%}",
}
DEFAULT_TEMPLATE = "alpaca-2"
OWN_TEMPLATE = "tokenizer"  # the name that means: the chat template saved with the tokenizer


def template_name(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name asked for; None: the tokenizer's own template, which training saved, if it has one, else alpaca-2."""
    return name or (OWN_TEMPLATE if tokenizer.chat_template else DEFAULT_TEMPLATE)


def resolve_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The jinja text of a template's name; "tokenizer" is the tokenizer's own. None: see template_name.

    Raises: InputError for an unknown name, or where the tokenizer has no template.
    """
    name = template_name(name, tokenizer)
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if name != OWN_TEMPLATE:
        raise InputError(f"--prompt_template {name}: need one of {', '.join([*CHAT_TEMPLATES, OWN_TEMPLATE])}")
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} has no chat template; "
            f"pass --prompt_template with one of {', '.join(CHAT_TEMPLATES)}"
        )
    return str(tokenizer.chat_template)


# ---------------------------------------------------------------- messages -> ids


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """The messages, the system prompt before them unless they have one of their own.

    Args:
        system_prompt: None leaves it to the template, which may have a default; "" is a system prompt, an empty one.
    """
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def encode_prompt(messages: Sequence[Message], template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a conversation up to where the assistant answers."""
    ids, _ = _encode(messages, template, tokenizer, add_generation_prompt=True)
    return ids


def encode_conversation(
    messages: Sequence[Message], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and their labels (unshifted, the same length).

    Labels are the ids on every assistant turn and its end token, IGNORE_INDEX elsewhere.
    """
    return _encode(messages, template, tokenizer, add_generation_prompt=False)


def _encode(
    messages: Sequence[Message], template: str, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool
) -> tuple[list[int], list[int]]:
    text, contents = _render_with_spans(messages, template, tokenizer, add_generation_prompt)
    specials = _special_spans(text, contents, tokenizer)
    ids: list[int] = []
    labels: list[int] = []

    def add(new_ids: list[int], trained: bool) -> None:
        ids.extend(new_ids)
        labels.extend(new_ids if trained else [IGNORE_INDEX] * len(new_ids))

    starts = _answer_starts(messages, template, tokenizer, text, contents)
    position, answering = 0, False
    for start, end, token_id in [*specials, (len(text), len(text), None)]:
        # The text between two special tokens, cut where an answer begins.
        cut = next((s for s in starts if position <= s < start or s == position), None)
        if cut is None:
            add(encode_text(tokenizer, text[position:start]) if start > position else [], answering)
        else:
            prompt_ids, answer_ids = _encode_cut(tokenizer, text[position:cut], text[cut:start])
            add(prompt_ids, False)
            add(answer_ids, True)
            answering = True
            starts = [s for s in starts if s > cut]
        if token_id is not None:
            add([token_id], answering)
        answering = False  # the first special token after an answer ends it
        position = end
    return ids, labels


def _encode_cut(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Encode two adjoining texts so that the first part is what inference encodes alone."""
    prompt_ids = encode_text(tokenizer, prompt) if prompt else []
    if not answer:
        return prompt_ids, []
    joint = encode_text(tokenizer, prompt + answer)
    # First-generation Alpaca was trained on answers encoded alone, after a prompt that ends in a space.
    if joint[: len(prompt_ids)] == prompt_ids and not prompt.endswith(" "):
        return prompt_ids, joint[len(prompt_ids) :]
    # Encoded alone, a sentencepiece tokenizer puts a space of its own before the answer.
    adds_space = encode_text(tokenizer, "a") != encode_text(tokenizer, "\na")[-1:]
    return prompt_ids, encode_text(tokenizer, answer.removeprefix(" ") if adds_space else answer)


def render(
    messages: Sequence[Message], template: str, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool
) -> str:
    """The conversation as text, special tokens written out. Raises: InputError where the template refuses it."""
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise InputError(f"the chat template refuses a conversation with the roles {roles}: {error}") from None


def render_forerunner_exam(system: str, turns: Sequence[tuple[str, str]]) -> str:
    """Turns of (user, assistant) as the forerunners' evaluation wrote them; no training has this form.

    The first and the last turn carry the system prompt, those between have brackets without it and end in a newline.
    """
    pieces = []
    for number, (question, answer) in enumerate(turns):
        if number in (0, len(turns) - 1):
            pieces.append(f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{question} [/INST]{answer}")
        else:
            pieces.append(f"[INST] {question}[/INST]{answer}\n")
    return "".join(pieces)


def _render_with_spans(
    messages: Sequence[Message], template: str, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and the (start, end) of every message's content in it; (-1, -1) for one that is not shown."""
    text = render(messages, template, tokenizer, add_generation_prompt)
    marks = {f"\ue000{number}\ue001": number for number in range(len(messages))}
    marked = render(
        [
            # Templates leave out the frame of an empty system message; answers are marked even where they are empty.
            {**message, "content": mark if message["content"] or message["role"] == "assistant" else ""}
            for message, mark in zip(messages, marks, strict=True)
        ],
        template,
        tokenizer,
        add_generation_prompt,
    )
    for prepare in (str, str.strip):  # many templates strip the contents
        contents = [prepare(message["content"]) for message in messages]
        pieces: list[str] = []
        spans = [(-1, -1)] * len(messages)
        length = 0
        for piece in re.split("(\ue000[0-9]+\ue001)", marked):
            if piece in marks:
                number = marks[piece]
                piece = contents[number]
                spans[number] = (length, length + len(piece))
            pieces.append(piece)
            length += len(piece)
        if "".join(pieces) == text:
            return text, spans
    raise InputError("the chat template changes the text of messages, so answers cannot be marked; use another one")


def _special_spans(
    text: str, contents: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int, int]]:
    """(start, end, id) of the special tokens the template wrote: those that touch no message's content."""
    specials = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    specials |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    if not specials:
        return []
    pattern = re.compile("|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True)))
    return [
        (match.start(), match.end(), specials[match.group()])
        for match in pattern.finditer(text)
        if not any(start < match.end() and match.start() < end for start, end in contents)
    ]


def _answer_starts(
    messages: Sequence[Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    contents: Sequence[tuple[int, int]],
) -> list[int]:
    """Where the trained text of each assistant turn begins: at the end of the prompt inference would have used."""
    starts = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if contents[number][0] < 0:
            raise InputError("the chat template leaves out an assistant turn; use another one")
        # There is no prompt before a conversation that the assistant opens.
        prompt = render(messages[:number], template, tokenizer, add_generation_prompt=True) if number else None
        starts.append(len(prompt) if prompt and text.startswith(prompt) else contents[number][0])
    return starts


def stop_token_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's EOS and the template's end-of-turn token."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, labels = encode_conversation(messages, template, tokenizer)
    last = [index for index, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX][-1]
    special = last in tokenizer.all_special_ids or last in tokenizer.added_tokens_decoder
    stops = {tokenizer.eos_token_id, last if special else None} - {None}
    return sorted(stops)
