"""Prompts: every template and system prompt, messages -> token ids and labels, and the stop tokens.

A template is a jinja chat template, the form every engine reads, so training, inference and exported tokenizers
cannot differ.
Messages enter as text: only what the template itself writes can become a control token (see _controls).
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken

from ..core.errors import InputError
from .tokenizer import TokenFinder, encode_text
from .tool_calls import (
    HERMES_FORM,
    LLAMA_FORM,
    MISTRAL_FORM,
    OWN_FORM,
    CallForm,
    add_tools,
    parse_json,
    read_calls,
    read_function,
    write_calls,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100  # label of positions without loss, the value PyTorch's and transformers' losses skip

# role and content, and where they apply: tool_calls (OpenAI's: [{"function": {"name", "arguments"}}], the arguments an
# object or JSON text), tool_call_id, and weight, 0 for an answer that is not trained.
Message = dict[str, Any]

SYSTEM_PROMPT = "You are a helpful assistant. 你是一个乐于助人的助手。"
LONG_SYSTEM_PROMPT = SYSTEM_PROMPT + "请你提供专业、有逻辑、内容真实、有价值的详细回复。"

# The system messages at the beginning, joined, or the template's default where there are none, in `system`; the other
# messages in `turns`. These formats have no place for a system message further down.
_SPLIT_SYSTEM = (
    "{%- set found = namespace(system=none, turns=[]) -%}{%- for message in messages -%}"
    "{%- if message['role'] != 'system' -%}{%- set found.turns = found.turns + [message] -%}"
    "{%- elif found.turns -%}"
    "{{- raise_exception('message ' ~ loop.index ~ ' is a system message; they stand at the beginning only') -}}"
    r"{%- else -%}{%- set gap = '\n\n' if found.system and message['content'] else '' -%}"
    "{%- set found.system = (found.system or '') + gap + message['content'] -%}{%- endif -%}{%- endfor -%}"
    "{%- set turns = found.turns -%}{%- set system = DEFAULT if found.system is none else found.system -%}"
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

    Of several that a tokenizer has, it is the one called default, and tool_use for conversations with tools.
    Raises: InputError for an unknown name, or where the tokenizer has no template, or none of these names.
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
    named = tokenizer.chat_template
    if not isinstance(named, dict):
        return _checked(str(named), tokenizer)
    if "default" not in named:
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} has chat templates called {', '.join(named)}, and none called "
            "default; leave the one to be used as chat_template in its tokenizer_config.json"
        )
    default, with_tools = (text and text.removesuffix("\n") for text in (named["default"], named.get("tool_use")))
    text = f"{{% if tools %}}{with_tools}{{% else %}}{default}{{% endif %}}" if with_tools else str(default)
    return _checked(text, tokenizer)


def warn_of_replaced_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say before training that a model with a chat template of its own is to learn another, and how the two differ."""
    if not tokenizer.chat_template:
        return
    try:
        own = resolve_template(OWN_TEMPLATE, tokenizer)
        if own == template:
            return
        messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
        rows = [render(messages, each, tokenizer, False) for each in (own, template)]
    except InputError:  # a template of its own that cannot be used, which is why another was asked for
        return
    logger.warning(
        "--prompt_template replaces the chat template that this model was trained with, so what it knows of questions "
        "and answers counts for less; leave the flag out to keep it\n  the model's own: %r\n  now:             %r",
        *rows,
    )


def _checked(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template. Raises: InputError if it is no jinja."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise InputError(
            f"the chat template of the tokenizer in {tokenizer.name_or_path} is no jinja: line {error.lineno}: "
            f"{error}; repair it, or pass --prompt_template with one of {', '.join(CHAT_TEMPLATES)}"
        ) from None
    return template


# ---------------------------------------------------------------- messages -> text


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """The messages, the system prompt before them unless they have one of their own.

    Args:
        system_prompt: None leaves it to the template, which may have a default; "" is a system prompt, an empty one.
    """
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def render(
    messages: Sequence[Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The conversation as text, special tokens written out. Raises: InputError where the template refuses it."""
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except (TemplateError, TypeError) as error:  # TypeError: what jinja makes of a field that is not there
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


# ---------------------------------------------------------------- what a template does with tools

_PROBE = "probe_of_tools"


def renders_tools(template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the functions that it is given."""
    return _renders_tools(template, tokenizer)


def call_form(template: str, tokenizer: PreTrainedTokenizerBase, with_tools: bool = True) -> CallForm | None:
    """How the answers of a conversation call functions; None: in a form that is written, but not read here.

    Args: with_tools: whether the conversation names functions; templates may write calls only then.
    """
    written = _rendered_call(template, tokenizer, with_tools)
    if not written:
        return OWN_FORM
    # The last one before the call's name: instructions may show the mark, too.
    places = {
        form: written.rfind(form.mark, 0, written.find(_PROBE)) for form in (HERMES_FORM, LLAMA_FORM, MISTRAL_FORM)
    }
    marked = {form: written[place:] for form, place in places.items() if place >= 0}
    if marked:  # what follows the mark may be of a format that is not read here
        return next((form for form, call in marked.items() if read_calls(call, form)[1]), None)
    bare = (form for form in (LLAMA_FORM, OWN_FORM) if f'"{form.arguments}"' in written.partition('{"name"')[2])
    return next(bare, None)


@functools.lru_cache(maxsize=16)
def _renders_tools(template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
    try:
        return _PROBE in render([{"role": "user", "content": "a"}], template, tokenizer, True, [tool])
    except InputError:
        return False


@functools.lru_cache(maxsize=16)
def _rendered_call(template: str, tokenizer: PreTrainedTokenizerBase, with_tools: bool) -> str:
    """An answer that calls a function, as the template writes it; "" if it does not."""
    if with_tools and not _renders_tools(template, tokenizer):
        return ""
    call = {"type": "function", "id": "probe0000", "function": {"name": _PROBE, "arguments": {}}}
    question = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "other", "description": "", "parameters": {"type": "object"}}}]
    try:
        text = render([question, answer], template, tokenizer, False, tools if with_tools else None)
        prompt = render([question], template, tokenizer, True, tools if with_tools else None)
    except InputError:
        return ""
    return text.removeprefix(prompt) if _PROBE in text else ""


# ---------------------------------------------------------------- text -> ids


class _Controls(NamedTuple):
    """The tokens that only a template may write.

    Attributes:
        finder: finds them in text.
        plain: those that the tokenizer does not call special.
    """

    finder: TokenFinder
    plain: frozenset[str]


def _controls(template: str, tokenizer: PreTrainedTokenizerBase) -> _Controls:
    """The special tokens, and the added tokens that the template writes around turns, whatever their flag says.

    Of the latter, words and white space stay ordinary tokens: a template's words may be anybody's.
    """
    # What decides them may change: scripts add tokens and name ends.
    return _read_controls(template, tokenizer, len(tokenizer), tokenizer.bos_token, tokenizer.eos_token)


@functools.lru_cache(maxsize=16)
def _read_controls(template: str, tokenizer: PreTrainedTokenizerBase, *_: Any) -> _Controls:
    special = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    special |= {index: AddedToken(token) for index, token in named if index not in special}
    signs = {
        index: token
        for index, token in tokenizer.added_tokens_decoder.items()
        if index not in special and re.search(r"[^\w\s]", token.content)
    }
    frame: dict[int, AddedToken] = {}
    if signs:
        turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
        # Templates may refuse system messages, and some refuse answers, too.
        shown = (_rendered(part, template, tokenizer) for part in (turns, turns[1:], turns[1:2]))
        frame = {index: signs[index] for _, _, index in TokenFinder(signs).find(next(filter(None, shown), ""))}
    return _Controls(TokenFinder(special | frame), frozenset(token.content for token in frame.values()))


def _rendered(messages: Sequence[Message], template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template makes of the messages; "" if it refuses them."""
    try:
        return render(messages, template, tokenizer, False)
    except InputError:
        return ""


class _Conversation:
    """Messages as their template takes them, free of what looks like a control token.

    Look-alikes are exchanged for private characters before rendering. So, whatever the template does with the text,
    the control tokens in the result are its own.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        template: str,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[dict[str, Any]] | None,
    ) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.controls = _controls(template, tokenizer)
        shown, tools = _with_tools(messages, template, tokenizer, tools)
        self.added = len(shown) - len(messages)  # a system message that holds the tools
        text = "".join(_texts([shown, tools]))
        found = {self.controls.finder.tokens[index].content for _, _, index in self.controls.finder.find(text)}
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
        hidden = {token: next(free) for token in sorted(found, key=len, reverse=True)}
        self.visible = {ord(character): token for token, character in hidden.items()}
        self.mark = next(free)  # stands where the place of a text is looked for
        self.messages: list[Message] = _exchange(shown, hidden)
        self.tools: list[dict[str, Any]] | None = _exchange(tools, hidden)

    def render(self, count: int | None = None, prompt: bool = False) -> str:
        """The first `count` messages, all by default."""
        messages = self.messages if count is None else self.messages[: self.added + count]
        return render(messages, self.template, self.tokenizer, prompt, self.tools)

    def render_open(self) -> str:
        """The conversation up to and with the text of its last message, without what ends it."""
        last = self.messages[-1]
        # The space behind the mark shows whether the template strips texts.
        text = self._with(len(self.messages) - 1, {**last, "content": f"{last['content']}{self.mark} "}).render()
        before, mark, after = text.rpartition(self.mark)
        if not mark:
            raise InputError("the chat template leaves out the last message, so its answer cannot be gone on with")
        return before if after.startswith(" ") else before.rstrip()

    def marked(self, number: int) -> _Conversation:
        """The conversation with the mark for the text of one message, and for the names of its calls."""
        message = self.messages[self.added + number]
        shown = {**message, "content": self.mark if message["content"] else message["content"]}
        if message.get("tool_calls"):
            call = {"name": self.mark, "arguments": {}}
            shown["tool_calls"] = [{**other, "function": call} for other in message["tool_calls"]]
        return self._with(self.added + number, shown)

    def _with(self, place: int, message: Message) -> _Conversation:
        other = copy.copy(self)
        other.messages = [*self.messages[:place], message, *self.messages[place + 1 :]]
        return other

    # ------------------------------------------------------------ what is trained

    def answer_span(self, number: int, text: str) -> tuple[int, int]:
        """Where the answer `number` stands in the conversation's text: from where a prompt ends to the answer's end.

        Raises: InputError where the template does not let that be told.
        """
        until = self.render(number + 1)
        try:
            prompt = self.render(number, prompt=True) if number else ""
        except InputError:  # one that the template would not have answered
            prompt = ""
        start = len(prompt) if prompt and text.startswith(prompt) else -1
        end = len(until) if text.startswith(until) else -1
        if start < 0 or end < 0:
            # The turn is written otherwise where others follow. What depends on its text alone shows where it is,
            # and what stands around it there must be what stood around it before.
            marked = self.marked(number)
            first, last, is_mark = self._difference(number, text, marked.render())
            own_first, own_last, opens = self._difference(number, until, marked.render(number + 1))
            closing = until[own_last:]
            if end < 0 and not text.startswith(closing, last):
                raise InputError(f"the chat template ends answer {number + 1} otherwise where others follow{_ADVICE}")
            if start < 0 and not is_mark:
                raise InputError(
                    f"the chat template writes more than message {number + 1} otherwise because of its text{_ADVICE}"
                )
            end = last + len(closing) if end < 0 else end
            if start < 0:
                opening = until[len(prompt) : own_first] if opens and prompt and until.startswith(prompt) else ""
                start = first - len(opening) if text[:first].endswith(opening) else first
        if start == end:
            raise InputError(f"the chat template leaves out message {number + 1}, an assistant turn{_ADVICE}")
        controls = self.controls.finder.find(text[start:end])
        if controls and not text[start + controls[-1][1] : end].strip():
            end = start + controls[-1][1]  # what templates write after the end, a line break mostly, no answer needs
        return start, end

    def _difference(self, number: int, text: str, marked: str) -> tuple[int, int, bool]:
        """Where `text` differs from the same with a marked message, and whether it is at the mark that this begins."""
        if self.mark not in marked:
            raise InputError(f"the chat template leaves out message {number + 1}, an assistant turn{_ADVICE}")
        first = _common_length(text, marked)
        room = min(len(text), len(marked)) - first
        common = _common_length(text[::-1][:room], marked[::-1])
        return first, len(text) - common, marked.startswith(self.mark, first)

    # ------------------------------------------------------------ ids

    def encode(self, text: str, answers: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[int]]:
        """Ids and labels of what the template has written; the answers' places are trained."""
        ids: list[int] = []
        labels: list[int] = []

        def add(new_ids: list[int], place: int) -> None:
            ids.extend(new_ids)
            trained = any(start <= place < end for start, end in answers)
            labels.extend(new_ids if trained else [IGNORE_INDEX] * len(new_ids))

        position = 0
        for start, end, token_id in [*self.controls.finder.find(text), (len(text), len(text), None)]:
            if position < start:
                begins, ends = zip(*answers, strict=True) if answers else ((), ())
                cuts = sorted({place for place in (*begins, *ends) if position < place < start})
                places = [(cut - position, cut in begins) for cut in cuts]
                parts = self._encode_parts(text[position:start], places, inner=position > 0)
                for place, part in zip([position, *cuts], parts, strict=True):
                    add(part, place)
            if token_id is not None:
                add([token_id], start)
            position = end
        return ids, labels

    def _encode_parts(self, text: str, cuts: Sequence[tuple[int, bool]], inner: bool) -> list[list[int]]:
        """The ids of text without control tokens, divided at the cuts: (place, whether an answer begins there).

        What comes before an answer is what inference encodes alone. A token that reaches beyond an answer's end counts
        to what follows.
        Args: inner: a control token stands before it.
        """
        parts = []
        encode: Callable[[str], list[int]] = functools.partial(self._encode_text, inner=inner)
        begin = done = 0
        whole = encode(text)
        for place, begins in cuts:
            head = encode(text[begin:place])
            # First-generation Alpaca was trained on answers encoded alone, after a prompt that ends in a space.
            if begins and (whole[: len(head)] != head or text[:place].endswith(" ")):
                parts.append(head[done:])
                encode, begin, done = self._encode_after_cut, place, 0
                whole = encode(text[place:])
                continue
            reached = max(done, _common_length(whole, head))
            parts.append(whole[done:reached])
            done = reached
        return [*parts, whole[done:]]

    def _encode_text(self, text: str, inner: bool = False) -> list[int]:
        return encode_text(self.tokenizer, text.translate(self.visible), self.controls.plain, inner)

    def _encode_after_cut(self, text: str) -> list[int]:
        # Encoded alone, a sentencepiece tokenizer puts a space of its own before the answer.
        adds_space = encode_text(self.tokenizer, "a") != encode_text(self.tokenizer, "\na")[-1:]
        return self._encode_text(text.removeprefix(" ") if adds_space else text)


_ADVICE = ", so what the model is to learn cannot be told; use another --prompt_template"


def _with_tools(
    messages: Sequence[Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[dict[str, Any]] | None,
) -> tuple[list[Message], Sequence[dict[str, Any]] | None]:
    """Messages and tools as the template takes them; what it does not write of them becomes text of messages."""
    writes_calls = bool(_rendered_call(template, tokenizer, bool(tools)))
    shown: list[Message] = []
    names: dict[Any, str] = {}  # of calls: the ids that they have, and those that are shown
    waiting: list[str] = []
    for message in messages:
        kept = {key: value for key, value in message.items() if key not in ("weight", "tool_calls")}
        functions = [call["function"] for call in message.get("tool_calls") or ()]
        if functions and writes_calls:
            calls = []
            for call, function in zip(message["tool_calls"], functions, strict=True):
                index = names[call.get("id", len(names))] = _call_id(call.get("id"), len(names))
                waiting.append(index)
                function = {**function, "arguments": parse_json(function["arguments"])}
                calls.append({"type": "function", "id": index, "function": function})
            kept |= {"content": kept.get("content") or None, "tool_calls": calls}
        elif functions:
            written = write_calls((function["name"], function["arguments"]) for function in functions)
            kept["content"] = "\n".join(filter(None, [kept.get("content"), written]))
        elif message["role"] == "tool" and waiting:
            index = names.get(message.get("tool_call_id"), waiting[0])
            waiting = [other for other in waiting if other != index]
            kept["tool_call_id"] = index
        shown.append(kept)
    if tools and renders_tools(template, tokenizer):
        return shown, [{"type": "function", "function": read_function(tool)} for tool in tools]
    return (add_tools(shown, tools) if tools else shown), None


def _call_id(given: Any, number: int) -> str:
    """An id of the length that Mistral's templates ask for."""
    return given if isinstance(given, str) and re.fullmatch("[0-9A-Za-z]{9}", given) else f"call{number:05}"


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common at the beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(first), len(second)))


def _texts(value: Any) -> Iterator[str]:
    """Every text in lists and dicts of texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(item)


def _exchange(value: Any, texts: Mapping[str, str]) -> Any:
    """The value, in all its texts one text for the other."""
    if not texts:
        return value
    if isinstance(value, str):
        for old, new in texts.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {_exchange(key, texts): _exchange(item, texts) for key, item in value.items()}
    return [_exchange(item, texts) for item in value] if isinstance(value, list | tuple) else value


def encode_prompt(
    messages: Sequence[Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[dict[str, Any]] | None = None,
    continue_final: bool = False,
) -> list[int]:
    """Token ids of a conversation up to where the assistant answers, exactly as its template writes it.

    Args:
        tools: the functions that may be called, each {"name", "description", "parameters"}, in OpenAI's frame or bare.
        continue_final: the last message is the beginning of the answer, which is gone on with.
    Raises: InputError where the template refuses the conversation, or there is no answer to go on with.
    """
    if not continue_final:
        conversation = _Conversation(messages, template, tokenizer, tools)
        return conversation.encode(conversation.render(prompt=True))[0]
    if not messages or messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        raise InputError("there is no answer to go on with: the last message is none of the assistant's, or a call")
    conversation = _Conversation(messages, template, tokenizer, tools)
    return conversation.encode(conversation.render_open())[0]


def encode_conversation(
    messages: Sequence[Message],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[dict[str, Any]] | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and their labels (unshifted, the same length).

    Labels are the ids on every assistant turn up to and with its end, but of those with the weight 0, and IGNORE_INDEX
    elsewhere.
    Raises: InputError where the template refuses the conversation, or does not let tell where an answer stands.
    """
    conversation = _Conversation(messages, template, tokenizer, tools)
    text = conversation.render()
    trained = [
        number
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight") != 0
    ]
    return conversation.encode(text, [conversation.answer_span(number, text) for number in trained])


# ---------------------------------------------------------------- the end of answers


def _answer_end(template: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token that ends an answer's labels; None if they end in text."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        _, labels = encode_conversation(messages, template, tokenizer)
    except InputError:  # it hides answers, or refuses such a conversation: one can answer with it, not learn
        return None
    last = next((label for label in reversed(labels) if label != IGNORE_INDEX), None)
    return last if last in tokenizer.all_special_ids or last in tokenizer.added_tokens_decoder else None


def stop_token_ids(template: str | None, tokenizer: PreTrainedTokenizerBase, named: Iterable[int] = ()) -> list[int]:
    """The ids that end an answer: the tokenizer's EOS, the template's end-of-turn token, and those that are `named`
    by the model's own files (see weights.generation_config)."""
    own = None if template is None else _answer_end(template, tokenizer)
    return sorted({tokenizer.eos_token_id, own, *named} - {None})


@functools.lru_cache(maxsize=4)  # once per run, however many files are read
def warn_without_end(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say before training that answers end in no token, so that engines would not stop there."""
    if _answer_end(template, tokenizer) is None:
        logger.warning(
            "the chat template ends answers with no token of the tokenizer's: the model will learn no end that "
            "engines stop at; write eos_token after answers in the template, or pass another --prompt_template"
        )
