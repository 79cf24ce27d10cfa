"""Model families: their chat templates, written anew from the published rules, on small tokenizers with their tokens.

Each with what its first prompt and two turns look like, the trained part marked by hand between ⟦ and ⟧.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from support.fuzz_text import ATOMS
from support.tokenizers import CHATML, PATTERNS, make_byte_level, write_sentencepiece
from utils.text.pieces import CONTROL, read_sentencepiece_model
from utils.text.tokenizer import load_tokenizer
from utils.text.vocabulary import append_pieces

# ---------------------------------------------------------------- templates

LLAMA_2 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] if loop.first and system is not none "
    "else m['content'] %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3_1 = (
    "{% macro head(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}"
    "{% set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}"
    "{{ bos_token + head('system') + 'Cutting Knowledge Date: December 2023\\n\\n' + system + '<|eot_id|>' }}"
    "{% set state = namespace(told=false) %}{% for m in messages if m['role'] != 'system' %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}{{ head('assistant') + '{\"name\": \"' + call.name + '\", ' "
    "+ '\"parameters\": ' + call.arguments | tojson + '}' + '<|eot_id|>' }}"
    "{% elif m['role'] == 'tool' %}{{ head('ipython') + m['content'] | tojson + '<|eot_id|>' }}"
    "{% else %}{{ head(m['role']) }}{% if tools and not state.told and m['role'] == 'user' %}"
    "{% set state.told = true %}{{ 'Answer with a call of one of these functions.\\n\\n' }}"
    "{% for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}{% endif %}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
)
# The system message and the tools stand before the last question.
MISTRAL = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% set turns = messages[1:] if system is not none else messages %}"
    "{% set asked = turns | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}{% for m in turns %}"
    "{% if m['role'] == 'user' %}{% if tools and m == asked[-1] %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson "
    "+ '[/AVAILABLE_TOOLS]' }}{% endif %}{% if system is not none and m == asked[-1] %}"
    "{{ '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids of calls have 9 characters') }}{% endif %}"
    '{{ \'{"name": "\' + call.function.name + \'", "arguments": \' + call.function.arguments | tojson '
    "+ ', \"id\": \"' + call.id + '\"}' + (']' if loop.last else ', ') }}{% endfor %}{{ eos_token }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m['content'] | tojson + ', \"call_id\": \"' "
    "+ m['tool_call_id'] + '\"}[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MIXTRAL = (
    "{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "{{ ' [INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_QWEN_TOOLS = (
    "{% if tools %}{{ '\\n\\n# Tools\\n\\nSignatures:\\n<tools>' }}{% for tool in tools %}"
    "{{ '\\n' + tool | tojson }}{% endfor %}"
    '{{ \'\\n</tools>\\n\\nCall with <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>\' }}{% endif %}'
)
_QWEN_CALLS = (
    '{% for call in m.tool_calls or [] %}{{ \'\\n<tool_call>\\n{"name": "\' + call.function.name '
    "+ '\", \"arguments\": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}{% endfor %}"
)
_QWEN_RESULTS = (
    "{% if loop.first or messages[number - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m['content'] + '\\n</tool_response>' }}"
    "{% if loop.last or messages[number + 1]['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else 'You are Qwen.' %}"
    "{{ '<|im_start|>system\\n' + system }}" + _QWEN_TOOLS + "{{ '<|im_end|>\\n' }}"
    "{% for m in messages %}{% set number = loop.index0 %}{% if m['role'] == 'tool' %}"
    + _QWEN_RESULTS
    + "{% elif m['role'] != 'system' or not loop.first %}{{ '<|im_start|>' + m['role'] }}"
    "{% if m['content'] or not m.tool_calls %}{{ '\\n' + m['content'] }}{% endif %}"
    + _QWEN_CALLS
    + "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Answers before the last question lose their thoughts, those after it are shown with them.
QWEN_3 = (
    "{% if tools or messages[0]['role'] == 'system' %}{{ '<|im_start|>system\\n' }}"
    "{{ messages[0]['content'] if messages[0]['role'] == 'system' else '' }}"
    + _QWEN_TOOLS
    + "{{ '<|im_end|>\\n' }}{% endif %}{% set last = namespace(question=0) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set number = loop.index0 %}{% if m['role'] == 'tool' %}"
    + _QWEN_RESULTS
    + "{% elif m['role'] == 'assistant' %}{% set text = m['content'] or '' %}{% set thought = '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|im_start|>assistant\\n' }}"
    "{% if number > last.question and (loop.last or thought) %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + text.lstrip('\\n') }}{% else %}{{ text }}{% endif %}"
    + _QWEN_CALLS
    + "{{ '<|im_end|>\\n' }}"
    "{% elif m['role'] != 'system' or not loop.first %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
GEMMA_3 = (
    "{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages if m['role'] != 'system' %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' "
    "+ (system if loop.first else '') + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
VICUNA = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else 'A chat.' %}"
    "{{ bos_token + system }}"
    "{% for m in messages if m['role'] != 'system' %}"
    "{{ ' USER: ' + m['content'] if m['role'] == 'user' else ' ' + m['content'] + eos_token }}"
    "{% if m['role'] == 'user' %}{{ ' ASSISTANT:' }}{% endif %}{% endfor %}"
)


# ---------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """A chat template, the tokens that its tokenizer needs, and what comes of them, written out by hand.

    Attributes:
        kind: sentencepiece, or the name of a byte-level split pattern.
        special, plain: added tokens that the tokenizer calls special, and others.
        prompt: of a conversation of a system message {s} and a question {q1}.
        marked: of the same with the answer {a1}, and a second question and answer; trained text between ⟦ and ⟧.
        without_system: as `marked`, the conversation without a system message.
        stops: the tokens that end an answer.
        takes_tools: whether the template writes tools and calls.
    """

    template: str
    kind: str
    prompt: str
    marked: str
    without_system: str
    stops: tuple[str, ...]
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    ends: dict[str, str] = field(default_factory=lambda: {"bos_token": "<s>", "eos_token": "</s>"})
    takes_tools: bool = False


_CHATML_TURNS = (
    "<|im_start|>user\n{q1}<|im_end|>\n<|im_start|>assistant\n⟦{a1}<|im_end|>⟧\n"
    "<|im_start|>user\n{q2}<|im_end|>\n<|im_start|>assistant\n⟦{a2}<|im_end|>⟧\n"
)
_CHATML_SYSTEM = "<|im_start|>system\n{s}<|im_end|>\n"
_CHATML_PROMPT = _CHATML_SYSTEM + "<|im_start|>user\n{q1}<|im_end|>\n<|im_start|>assistant\n"
_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n".format
_LLAMA_3_START = "<|begin_of_text|>" + _HEAD("system") + "Cutting Knowledge Date: December 2023\n\n"
_LLAMA_3_TURNS = "".join(f"{_HEAD('user')}{{q{n}}}<|eot_id|>{_HEAD('assistant')}⟦{{a{n}}}<|eot_id|>⟧" for n in (1, 2))
_QWEN_WORDS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_GEMMA_TURNS = (
    "{q1}<end_of_turn>\n<start_of_turn>model\n⟦{a1}<end_of_turn>⟧\n"
    "<start_of_turn>user\n{q2}<end_of_turn>\n<start_of_turn>model\n⟦{a2}<end_of_turn>⟧\n"
)
_QWEN_ENDS = {"bos_token": None, "eos_token": "<|im_end|>"}

FAMILIES = {
    "Llama-2": Family(
        LLAMA_2,
        "sentencepiece",
        "<s>[INST] <<SYS>>\n{s}\n<</SYS>>\n\n{q1} [/INST]",
        "<s>[INST] <<SYS>>\n{s}\n<</SYS>>\n\n{q1} [/INST]⟦ {a1} </s>⟧<s>[INST] {q2} [/INST]⟦ {a2} </s>⟧",
        "<s>[INST] {q1} [/INST]⟦ {a1} </s>⟧<s>[INST] {q2} [/INST]⟦ {a2} </s>⟧",
        ("</s>",),
    ),
    "Llama-3.1": Family(
        LLAMA_3_1,
        "llama-bpe",
        _LLAMA_3_START + "{s}<|eot_id|>" + _HEAD("user") + "{q1}<|eot_id|>" + _HEAD("assistant"),
        _LLAMA_3_START + "{s}<|eot_id|>" + _LLAMA_3_TURNS,
        _LLAMA_3_START + "<|eot_id|>" + _LLAMA_3_TURNS,
        ("<|end_of_text|>", "<|eot_id|>"),
        special=("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
        ends={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        takes_tools=True,
    ),
    "Mistral": Family(
        MISTRAL,
        "sentencepiece",
        "<s>[INST] {s}\n\n{q1}[/INST]",
        "<s>[INST] {q1}[/INST]⟦ {a1}</s>⟧[INST] {s}\n\n{q2}[/INST]⟦ {a2}</s>⟧",
        "<s>[INST] {q1}[/INST]⟦ {a1}</s>⟧[INST] {q2}[/INST]⟦ {a2}</s>⟧",
        ("</s>",),
        special=(
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
            *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        takes_tools=True,
    ),
    "Mixtral": Family(
        MIXTRAL,
        "sentencepiece",
        "<s> [INST] {s}\n\n{q1} [/INST]",
        "<s> [INST] {s}\n\n{q1} [/INST]⟦ {a1}</s>⟧ [INST] {q2} [/INST]⟦ {a2}</s>⟧",
        "<s> [INST] {q1} [/INST]⟦ {a1}</s>⟧ [INST] {q2} [/INST]⟦ {a2}</s>⟧",
        ("</s>",),
    ),
    "Qwen2.5": Family(
        QWEN_2_5,
        "qwen2",
        _CHATML_PROMPT,
        _CHATML_SYSTEM + _CHATML_TURNS,
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n" + _CHATML_TURNS,
        ("<|im_end|>",),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain=_QWEN_WORDS,
        ends=_QWEN_ENDS,
        takes_tools=True,
    ),
    "Qwen3": Family(
        QWEN_3,
        "qwen2",
        _CHATML_PROMPT,
        _CHATML_SYSTEM + _CHATML_TURNS.replace("⟦{a2}", "⟦<think>\n\n</think>\n\n{a2}"),
        _CHATML_TURNS.replace("⟦{a2}", "⟦<think>\n\n</think>\n\n{a2}"),
        ("<|im_end|>",),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain=(*_QWEN_WORDS, "<think>", "</think>"),
        ends=_QWEN_ENDS,
        takes_tools=True,
    ),
    "DeepSeek-R1-Distill": Family(
        DEEPSEEK_R1,
        "qwen2",
        "<｜begin▁of▁sentence｜>{s}<｜User｜>{q1}<｜Assistant｜><think>\n",
        "<｜begin▁of▁sentence｜>{s}<｜User｜>{q1}<｜Assistant｜>⟦{a1}<｜end▁of▁sentence｜>⟧"
        "<｜User｜>{q2}<｜Assistant｜>⟦{a2}<｜end▁of▁sentence｜>⟧",
        "<｜begin▁of▁sentence｜><｜User｜>{q1}<｜Assistant｜>⟦{a1}<｜end▁of▁sentence｜>⟧"
        "<｜User｜>{q2}<｜Assistant｜>⟦{a2}<｜end▁of▁sentence｜>⟧",
        ("<｜end▁of▁sentence｜>",),
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        ends={"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    ),
    "Gemma-3": Family(
        GEMMA_3,
        "sentencepiece",
        "<s><start_of_turn>user\n{s}\n\n{q1}<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\n{s}\n\n" + _GEMMA_TURNS,
        "<s><start_of_turn>user\n" + _GEMMA_TURNS,
        ("</s>", "<end_of_turn>"),
        special=("<start_of_turn>", "<end_of_turn>"),
    ),
    "ChatML-on-Llama": Family(
        CHATML,
        "sentencepiece",
        _CHATML_PROMPT,
        _CHATML_SYSTEM + _CHATML_TURNS,
        _CHATML_TURNS,
        ("</s>", "<|im_end|>"),
        plain=("<|im_start|>", "<|im_end|>"),
    ),
    "Vicuna": Family(
        VICUNA,
        "sentencepiece",
        "<s>{s} USER: {q1} ASSISTANT:",
        "<s>{s} USER: {q1} ASSISTANT:⟦ {a1}</s>⟧ USER: {q2} ASSISTANT:⟦ {a2}</s>⟧",
        "<s>A chat. USER: {q1} ASSISTANT:⟦ {a1}</s>⟧ USER: {q2} ASSISTANT:⟦ {a2}</s>⟧",
        ("</s>",),
    ),
}


def make_family(name: str, folder: Path, base: Path) -> PreTrainedTokenizerBase:
    """The family's tokenizer with its template.

    Args: base: folder of a sentencepiece tokenizer.
    """
    family = FAMILIES[name]
    if family.kind == "sentencepiece":
        proto = read_sentencepiece_model(base / "tokenizer.model")
        proto.normalizer_spec.add_dummy_prefix = name != "Gemma-3"
        controls = append_pieces(proto, family.special, CONTROL)
        write_sentencepiece(folder, controls.SerializeToString())
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = make_byte_level(folder, PATTERNS[family.kind], family.kind == "llama-bpe")
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in family.plain])
    for end, token in family.ends.items():
        setattr(tokenizer, end, token)
    tokenizer.chat_template = family.template
    return tokenizer


# ---------------------------------------------------------------- conversations

_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "天气 of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_LOOK_ALIKES = ("<", "[", "▁", "\ufeff")


def generate_conversations(count: int, with_tools: bool, seed: int = 0) -> list[tuple[list[dict], list[dict] | None]]:
    """(messages that end in a question or a result, tools or none); no text looks like a control token."""
    rng = random.Random(seed)
    atoms = [atom for atom in ATOMS if not any(sign in atom for sign in _LOOK_ALIKES)]
    conversations = []
    for _ in range(count):

        def text() -> str:
            return "".join(rng.choice(atoms) for _ in range(rng.randint(1, 8))) + rng.choice(["?", "。", " end", "\n"])

        messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
        tools = [_TOOL] if with_tools and rng.random() < 0.5 else None
        for _ in range(rng.randint(0, 3)):
            messages.append({"role": "user", "content": text()})
            if tools and rng.random() < 0.5:
                messages += call_and_result(text(), f"call{len(messages):05}")
            messages.append({"role": "assistant", "content": text()})
        messages.append({"role": "user", "content": text()})
        if tools and rng.random() < 0.3:
            messages += call_and_result(text(), f"call{len(messages):05}")
        conversations.append((messages, tools))
    return conversations


def call_and_result(city: str, index: str) -> list[dict]:
    """An answer that calls the tool, and what the tool says."""
    function = {"name": "weather", "arguments": {"city": city}}
    return [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "id": index, "function": function}],
        },
        {"role": "tool", "content": '{"celsius": 21}', "tool_call_id": index, "name": "weather"},
    ]


def describe_families() -> str:
    """The families as docs/data shows them, a line break as ↵."""
    texts = {"s": "你是一位老师。", "q1": "你好", "a1": "你好！", "q2": "天空是什么颜色？", "a2": "蓝色。"}
    lines = []
    for name, family in FAMILIES.items():
        shown = {"prompt": family.prompt.format(**texts), "trained": family.marked.format(**texts)}
        shown["stops"] = " ".join(family.stops)
        lines += [name, *(f"  {title:8}{text}".replace("\n", "↵") for title, text in shown.items())]
    return "\n".join(lines)
