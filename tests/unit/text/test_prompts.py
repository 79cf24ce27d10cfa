"""Prompts: golden texts, exact label masks, model families, records, and text that looks like special tokens."""

import json
import os
import re

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from support.families import FAMILIES, call_and_result, describe_families, generate_conversations, make_family
from support.paths import ROOT
from support.tokenizers import CHATML, PATTERNS, TOOL_TEMPLATE, make_byte_level
from utils.core.errors import InputError
from utils.text.prompts import (
    CHAT_TEMPLATES,
    IGNORE_INDEX,
    call_form,
    encode_conversation,
    encode_prompt,
    render,
    renders_tools,
    resolve_template,
    stop_token_ids,
    warn_of_replaced_template,
    warn_without_end,
    with_system_prompt,
)
from utils.text.tokenizer import encode_text, load_tokenizer, save_tokenizer
from utils.text.tool_calls import HERMES_FORM, LLAMA_FORM, MISTRAL_FORM, OWN_FORM

SYSTEM = "You are a helpful assistant. 你是一个乐于助人的助手。"
CHAT = [
    {"role": "user", "content": "问一"},
    {"role": "assistant", "content": "答一"},
    {"role": "user", "content": "问二"},
    {"role": "assistant", "content": "答二"},
]


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer_folder):
    return load_tokenizer(base_tokenizer_folder)


def test_texts_are_the_forerunners(tokenizer):
    texts = {name: render(CHAT, template, tokenizer, False) for name, template in CHAT_TEMPLATES.items()}
    second = "答一</s><s>[INST] 问二 [/INST] 答二</s>"
    assert texts["alpaca-2"] == f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n问一 [/INST] {second}"
    assert texts["alpaca-2-long"].startswith(
        f"<s>[INST] <<SYS>>\n{SYSTEM}请你提供专业、有逻辑、内容真实、有价值的详细回复。\n<</SYS>>"
    )
    assert texts["llama-2"] == f"<s>[INST] 问一 [/INST] {second}" == texts["mixtral"]
    assert texts["alpaca"].startswith(
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n问一\n\n### Response: 答一</s>"
    )


def test_alpaca_2_ids_are_the_forerunners_source_and_target(tokenizer):
    source = [tokenizer.bos_token_id, *encode_text(tokenizer, f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\nWhat? [/INST]")]
    target = [*encode_text(tokenizer, "That.\nYes"), tokenizer.eos_token_id]
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That.\nYes"}]
    ids, labels = encode_conversation(messages, CHAT_TEMPLATES["alpaca-2"], tokenizer)
    assert ids == source + target
    assert labels == [IGNORE_INDEX] * len(source) + target


def test_first_generation_alpaca_encodes_the_answer_alone(tokenizer):
    introduction = CHAT_TEMPLATES["alpaca"].split("set system = '")[1].split("'")[0]
    source = [
        tokenizer.bos_token_id,
        *encode_text(tokenizer, f"{introduction}\n\n### Instruction:\nWhat?\n\n### Response: "),
    ]
    target = [*encode_text(tokenizer, "That."), tokenizer.eos_token_id]
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    assert encode_conversation(messages, CHAT_TEMPLATES["alpaca"], tokenizer)[0] == source + target


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_training_and_inference_encode_the_same_prompt(tokenizer, name):
    template = CHAT_TEMPLATES[name]
    ids, labels = encode_conversation(CHAT, template, tokenizer)
    # First-generation Alpaca's prompts end in a space: earlier answers stand behind it as text, as inference has them.
    for turn in (1,) if name == "alpaca" else (1, 3):
        prompt = encode_prompt(CHAT[:turn], template, tokenizer)
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] == ids[len(prompt)] and labels[len(prompt) - 1] == IGNORE_INDEX


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_answer_and_its_end_is_trained_and_nothing_else(tokenizer, name):
    ids, labels = encode_conversation(CHAT, CHAT_TEMPLATES[name], tokenizer)
    trained = [index for index, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
    text = tokenizer.decode(trained).replace(" ", "")
    assert text == "答一</s>答二</s>"


def test_user_text_never_becomes_a_special_token(tokenizer):
    messages = [{"role": "user", "content": "a</s><s>b"}, {"role": "assistant", "content": "c</s>d"}]
    ids, labels = encode_conversation(messages, CHAT_TEMPLATES["llama-2"], tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id == labels[-1]


def test_a_tokenizers_own_template_is_masked_too(tokenizer):
    import copy

    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own.chat_template = CHATML
    template = resolve_template("tokenizer", own)
    messages = [{"role": "system", "content": "S"}, *CHAT]
    ids, labels = encode_conversation(messages, template, own)
    end = own.convert_tokens_to_ids("<|im_end|>")
    assert [label for label in labels if label == end] == [end, end]
    prompt = encode_prompt(messages[:2], template, own)
    assert ids[: len(prompt)] == prompt
    assert end in stop_token_ids(template, own) and own.eos_token_id in stop_token_ids(template, own)


def test_replacing_a_models_own_template_is_said_with_both_texts(tokenizer, caplog):
    import copy

    own = copy.deepcopy(tokenizer)
    for template in (None, CHAT_TEMPLATES["llama-2"]):
        own.chat_template = template
        warn_of_replaced_template(resolve_template(None, own), own)
    assert caplog.text == "", "what the model has is what it gets"
    own.chat_template = CHATML
    assert resolve_template(None, own) == CHATML
    warn_of_replaced_template(CHAT_TEMPLATES["llama-2"], own)
    assert "<|im_start|>user\\n你好<|im_end|>" in caplog.text and "<s>[INST] 你好 [/INST] 你好！</s>" in caplog.text


def test_a_template_that_strips_contents_is_followed(tokenizer):
    template = "{% for m in messages %}{{ '[' + m['content'] | trim + ']' + eos_token }}{% endfor %}"
    ids, labels = encode_conversation(
        [{"role": "user", "content": " q "}, {"role": "assistant", "content": " a "}], template, tokenizer
    )
    assert tokenizer.decode(ids).replace(" ", "") == "[q]</s>[a]</s>" and labels[-1] == tokenizer.eos_token_id


def test_unknown_template_lists_the_known(tokenizer):
    with pytest.raises(InputError, match="alpaca-2"):
        resolve_template("alpacca", tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.chat_template = None
        resolve_template("tokenizer", tokenizer)


def test_a_system_prompt_goes_before_messages_that_have_none():
    messages = [{"role": "user", "content": "q"}]
    assert with_system_prompt(messages, None) == messages, "the template's default, if it has one"
    assert with_system_prompt(messages, "s") == [{"role": "system", "content": "s"}, *messages]
    assert with_system_prompt(messages, "") == [{"role": "system", "content": ""}, *messages], "none, on purpose"
    own = [{"role": "system", "content": "own"}, *messages]
    assert with_system_prompt(own, "s") == own
    assert messages == [{"role": "user", "content": "q"}], "the messages themselves stay as they are"


# ---------------------------------------------------------------- model families, against transformers and by hand

QUESTION, ANSWER = {"role": "user", "content": "天空 is?"}, {"role": "assistant", "content": "蓝色 sky."}
TURNS = [
    QUESTION,
    ANSWER,
    {"role": "user", "content": " and\n\nthe sea 😀"},
    {"role": "assistant", "content": "A sea."},
]
INSTRUCTION = {"role": "system", "content": "你 are\nkind."}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, base_tokenizer_folder):
    """(name, description, tokenizer, the same as transformers alone loads it)."""
    folder = tmp_path_factory.mktemp("family")
    tokenizer = make_family(request.param, folder / "made", base_tokenizer_folder)
    save_tokenizer(tokenizer, folder / "saved")
    other = AutoTokenizer.from_pretrained(folder / "saved")
    return request.param, FAMILIES[request.param], tokenizer, other


def encode_with_transformers(tokenizer, messages, tools=None, **kwargs):
    kwargs = {"add_generation_prompt": True} | kwargs
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, **kwargs)["input_ids"]


def trained_text(tokenizer, ids, labels):
    return tokenizer.decode([index for index, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX])


def test_prompts_are_those_of_transformers(family):
    _, described, tokenizer, other = family
    conversations = generate_conversations(200, described.takes_tools)
    for messages, tools in conversations:
        prompt = encode_prompt(messages, described.template, tokenizer, tools)
        assert prompt == encode_with_transformers(other, messages, tools), messages
    assert any(tools for _, tools in conversations) == described.takes_tools


def test_an_answer_is_gone_on_with_as_in_transformers(family):
    _, described, tokenizer, other = family
    for messages, tools in generate_conversations(20, False, seed=1):
        messages = [*messages, {"role": "assistant", "content": "The sky is 蓝"}]
        expected = encode_with_transformers(
            other, messages, tools, add_generation_prompt=False, continue_final_message=True
        )
        assert encode_prompt(messages, described.template, tokenizer, tools, continue_final=True) == expected


def read_marked(marked, messages, strip):
    """The text of a conversation as marked by hand, and where it is trained: [(start, end)]."""
    texts = {"s": INSTRUCTION["content"]}
    for role in ("user", "assistant"):
        found = [message["content"] for message in messages if message["role"] == role]
        texts |= {f"{'q' if role == 'user' else 'a'}{number}": text for number, text in enumerate(found, 1)}
    if strip:
        texts = {name: text.strip() for name, text in texts.items()}
    pieces = re.split("[⟦⟧]", marked)
    spans, text = [], ""
    for number, piece in enumerate(pieces):
        start, text = len(text), text + piece.format(**texts)
        spans += [(start, len(text))] if number % 2 else []
    return text, spans


@pytest.mark.parametrize("with_system", [True, False])
def test_labels_are_those_marked_by_hand(family, with_system):
    name, described, tokenizer, other = family
    strip = name in ("Llama-3.1", "Llama-2", "Gemma-3")
    marked = described.marked if with_system else described.without_system
    text, spans = read_marked(marked, TURNS, strip)
    encoding = other(text, add_special_tokens=False, return_offsets_mapping=True)
    expected = [
        index if any(start <= place < end for start, end in spans) else IGNORE_INDEX
        for index, (place, _) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]
    messages = [INSTRUCTION, *TURNS] if with_system else TURNS
    ids, labels = encode_conversation(messages, described.template, tokenizer)
    assert ids == encoding["input_ids"]
    assert labels == expected
    prompt = read_marked(described.prompt, TURNS, strip)[0]
    if with_system:
        first = encode_prompt([INSTRUCTION, QUESTION], described.template, tokenizer)
        assert first == other(prompt, add_special_tokens=False)["input_ids"]


def test_answers_end_at_the_familys_tokens(family):
    _, described, tokenizer, _ = family
    stops = stop_token_ids(described.template, tokenizer)
    assert sorted(tokenizer.convert_ids_to_tokens(stops)) == sorted(described.stops)


def test_a_turn_with_weight_0_is_not_trained(family):
    _, described, tokenizer, _ = family
    whole = encode_conversation(TURNS, described.template, tokenizer)
    ids, labels = encode_conversation([QUESTION, {**ANSWER, "weight": 0}, *TURNS[2:]], described.template, tokenizer)
    assert ids == whole[0]
    shown, kept = trained_text(tokenizer, *whole), trained_text(tokenizer, ids, labels)
    assert "蓝色" in shown and "蓝色" not in kept and shown.endswith(kept.lstrip())


def test_text_that_looks_like_a_control_token_stays_text(family):
    _, described, tokenizer, other = family
    signs = [token for token in (*described.special, *described.plain, *described.ends.values()) if token]
    signs = [token for token in signs if token not in ("<think>", "</think>") and "tool" not in token]
    looks = " ".join(signs)
    messages = [{"role": "user", "content": f"x {looks} y"}, {"role": "assistant", "content": f"z {looks}z"}, QUESTION]
    plain = [{"role": "user", "content": "x y"}, {"role": "assistant", "content": "z"}, QUESTION]
    ids = encode_prompt(messages, described.template, tokenizer)
    innocent = encode_with_transformers(other, plain)
    for token in signs:
        index = tokenizer.convert_tokens_to_ids(token)
        assert ids.count(index) == innocent.count(index), token
    text = tokenizer.decode(ids).replace(" ", "")
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).replace(" ", "")
    ids, labels = encode_conversation(messages[:2], described.template, tokenizer)
    assert trained_text(tokenizer, ids, labels).replace(" ", "").count(looks.replace(" ", "")) == 1


def test_plain_added_tokens_are_tokens_in_a_users_words(family):
    _, described, tokenizer, other = family
    words = [token for token in described.plain if "think" in token or "tool" in token]
    for word in words:
        messages = [{"role": "user", "content": f"a {word} b"}]
        assert encode_prompt(messages, described.template, tokenizer) == encode_with_transformers(other, messages)
        assert tokenizer.convert_tokens_to_ids(word) in encode_text(tokenizer, f"a {word} b")


CALLS = {
    "Llama-3.1": '{"name": "weather", "parameters": {"city": "北京"}}<|eot_id|>',
    "Mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "北京"}, "id": "call00001"}]</s>',
    "Qwen2.5": '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>',
    "Qwen3": '\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>',
}


@pytest.mark.parametrize("tools", [None, [{"name": "weather", "parameters": {"type": "object", "properties": {}}}]])
def test_calls_are_trained_in_the_templates_form(family, tools):
    name, described, tokenizer, _ = family
    if name == "Gemma-3":
        pytest.skip("its template refuses results of tools")
    messages = [QUESTION, *call_and_result("北京", "call00001"), ANSWER]
    ids, labels = encode_conversation(messages, described.template, tokenizer, tools)
    trained = trained_text(tokenizer, ids, labels)
    if not described.takes_tools:
        assert '{"name": "weather", "arguments": {"city": "北京"}}' in trained
        return
    shown = trained.replace(" ", "")
    assert CALLS[name].replace(" ", "").strip() in shown, shown
    assert "celsius" not in shown and shown.count("蓝色") == 1
    assert resolve_template("tokenizer", tokenizer) == described.template


# ---------------------------------------------------------------- templates and tokens of any kind


def labelled(messages, template, tokenizer):
    """The conversation's text with the trained part between ⟦ and ⟧."""
    ids, labels = encode_conversation(messages, template, tokenizer)
    assert len(ids) == len(labels)
    shown, trained = "", False
    for start in range(len(ids) + 1):
        now = start < len(ids) and labels[start] != IGNORE_INDEX
        if now != trained:
            shown += tokenizer.decode(ids[:start])[len(shown.replace("⟦", "").replace("⟧", "")) :] + "⟧⟦"[now]
            trained = now
    return shown + tokenizer.decode(ids)[len(shown.replace("⟦", "").replace("⟧", "")) :]


def test_an_end_that_is_no_special_token_ends_the_labels(tmp_path):
    tokenizer = make_byte_level(tmp_path / "t", PATTERNS["qwen2"], False)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<|im_start|>", "<|im_end|>")])
    assert labelled(CHAT, CHATML, tokenizer) == (
        "<|im_start|>user\n问一<|im_end|>\n<|im_start|>assistant\n⟦答一<|im_end|>⟧\n"
        "<|im_start|>user\n问二<|im_end|>\n<|im_start|>assistant\n⟦答二<|im_end|>⟧\n"
    )
    assert stop_token_ids(CHATML, tokenizer) == sorted(
        tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|im_end|>"])
    )


HUMAN = (
    "{% for m in messages %}{{ '### Human: ' + m['content'] + '\n### Assistant:' if m['role'] == 'user' "
    "else ' ' + m['content'] + '\n' }}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_an_end_that_is_text_or_none_ends_the_labels(tmp_path, tokenizer, kind, caplog):
    if kind == "byte-level":
        tokenizer = make_byte_level(tmp_path / "t", PATTERNS["qwen2"], False)
    assert labelled(CHAT, CHATML, tokenizer).replace("⟦ ", "⟦") == (
        "<|im_start|>user\n问一<|im_end|>\n<|im_start|>assistant\n⟦答一<|im_end|>\n⟧"
        "<|im_start|>user\n问二<|im_end|>\n<|im_start|>assistant\n⟦答二<|im_end|>\n⟧"
    )
    assert labelled(CHAT, HUMAN, tokenizer) == (
        "### Human: 问一\n### Assistant:⟦ 答一\n⟧### Human: 问二\n### Assistant:⟦ 答二\n⟧"
    )
    for template in (CHATML, HUMAN):
        assert stop_token_ids(template, tokenizer) == [tokenizer.eos_token_id]
        warn_without_end(template, tokenizer)
        warn_without_end(template, tokenizer)
    assert [record.message[:50] for record in caplog.records] == 2 * [
        "the chat template ends answers with no token of th"
    ]


def test_a_template_whose_answers_end_at_a_stop_is_not_warned_of(tokenizer, caplog):
    for template in CHAT_TEMPLATES.values():
        warn_without_end(template, tokenizer)
    assert not caplog.records


def test_a_template_that_hides_answers_stops_at_the_tokenizers_end(tokenizer):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    assert stop_token_ids(template, tokenizer) == [tokenizer.eos_token_id]


def test_a_template_that_refuses_answers_can_be_asked(tmp_path):
    tokenizer = make_byte_level(tmp_path / "t", PATTERNS["qwen2"], False)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<|a|>", "<|b|>")])
    template = (
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('one question') }}{% endif %}"
        "{{ '<|a|>' + m['content'] }}{% endfor %}"
    )
    ids = encode_prompt([{"role": "user", "content": "q <|a|> <|b|>"}], template, tokenizer)
    a, b = tokenizer.convert_tokens_to_ids(["<|a|>", "<|b|>"])
    assert ids[0] == a and ids.count(a) == 1 and ids.count(b) == 1, "<|a|> is the template's own, <|b|> a word"


def test_the_next_turns_start_is_no_end(tokenizer):
    """Where answers have no end, the token that begins the next turn was trained as one."""
    template = (
        "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' "
        "else ' ' + m['content'] }}{% endfor %}"
    )
    _, labels = encode_conversation(CHAT, template, tokenizer)
    assert tokenizer.bos_token_id not in labels


def test_thoughts_that_the_template_leaves_out_are_not_trained(tmp_path, base_tokenizer_folder):
    tokenizer = make_family("Qwen3", tmp_path / "t", base_tokenizer_folder)
    answers = ["<think>\n想一\n</think>\n\n答一", "<think>\n想二\n</think>\n\n答二"]
    messages = [CHAT[0], {**CHAT[1], "content": answers[0]}, CHAT[2], {**CHAT[3], "content": answers[1]}]
    assert labelled(messages, tokenizer.chat_template, tokenizer) == (
        "<|im_start|>user\n问一<|im_end|>\n<|im_start|>assistant\n⟦答一<|im_end|>⟧\n"
        f"<|im_start|>user\n问二<|im_end|>\n<|im_start|>assistant\n⟦{answers[1]}<|im_end|>⟧\n"
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "leaves out message 2"),
        ("{{ messages | map(attribute='content') | join | length }}" + CHATML, "more than message 2 otherwise"),
        (
            "{% for m in messages %}{{ m['content'] + ('.' if loop.last else ',') }}{% endfor %}",
            "ends answer 2 otherwise where others follow",
        ),
    ],
)
def test_templates_that_do_not_tell_what_an_answer_is_are_refused(tokenizer, template, words):
    with pytest.raises(InputError, match=words):
        encode_conversation(CHAT, template, tokenizer)
    assert encode_prompt(CHAT[:3], template, tokenizer), "there is nothing to be marked in a prompt"


def test_tokens_that_take_the_space_beside_them_are_as_in_transformers(tmp_path):
    tokenizer = make_byte_level(tmp_path / "t", PATTERNS["qwen2"], False)
    for token in (
        AddedToken("<|user|>", rstrip=True, special=True),
        AddedToken("<|end|>", lstrip=True, special=False),
    ):
        tokenizer.add_tokens([token])
    template = "{% for m in messages %}{{ '<|user|>\n' + m['content'] + '\n<|end|>\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "  a b "}]
    expected = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True)["input_ids"]
    assert encode_prompt(messages, template, tokenizer) == expected


def test_a_space_before_the_first_word_alone_is_as_in_transformers(tmp_path, base_tokenizer_folder):
    """transformers 5 saves Llamas as a tokenizer.json alone, whose Metaspace puts no space behind special tokens."""
    LlamaTokenizer.from_pretrained(base_tokenizer_folder, legacy=False).save_pretrained(tmp_path)
    assert '"prepend_scheme": "first"' in (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer, other = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, other):
        each.add_tokens([AddedToken("<sign>", special=False, normalized=False)])
    end = "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    templates = [FAMILIES["Llama-2"].template, "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}" + end]
    for template in templates:
        for messages in ([QUESTION], [QUESTION, ANSWER, {"role": "user", "content": "a <sign>b\n c"}]):
            expected = encode_with_transformers(other, messages, chat_template=template)
            assert encode_prompt(messages, template, tokenizer) == expected
    ids, labels = encode_conversation(TURNS, templates[0], tokenizer)
    assert ids == encode_with_transformers(other, TURNS, chat_template=templates[0])
    assert trained_text(tokenizer, ids, labels).count("</s>") == 2
    framed = templates[0].replace("bos_token", "'<sign>'")  # a control token now: what looks like it is cut as text
    ids = encode_prompt([{"role": "user", "content": "x<sign>y"}], framed, tokenizer)
    assert tokenizer.decode(ids) == "<sign>[INST] x<sign>y [/INST]"
    assert ids.count(tokenizer.convert_tokens_to_ids("<sign>")) == 1


def test_of_several_templates_the_default_and_the_one_for_tools_are_used(tmp_path, base_tokenizer_folder):
    tokenizer = make_family("Qwen2.5", tmp_path / "t", base_tokenizer_folder)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    both = {"default": CHATML + "\n", "tool_use": FAMILIES["Qwen2.5"].template, "rag": "{{ 'rag' }}"}
    settings = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": text} for name, text in both.items()]
    save_tokenizer(tokenizer, tmp_path / "named")
    (tmp_path / "named" / "chat_template.jinja").unlink()
    (tmp_path / "named" / "tokenizer_config.json").write_text(json.dumps(settings))
    named = load_tokenizer(tmp_path / "named")
    template = resolve_template("tokenizer", named)
    for given in (None, tools):
        expected = encode_with_transformers(named, CHAT[:1], given)
        assert encode_prompt(CHAT[:1], template, named, given) == expected
    named.chat_template = {"rag": "{{ 'rag' }}", "other": "x"}
    with pytest.raises(InputError, match="chat templates called rag, other, and none called default"):
        resolve_template(None, named)


def test_a_template_that_is_no_jinja_is_refused_before_anything_is_asked(base_tokenizer_folder):
    tokenizer = load_tokenizer(base_tokenizer_folder)
    for broken in ("{% for m in messages %}\n{{ m }", {"default": CHATML, "tool_use": "{% end %}"}):
        tokenizer.chat_template = broken
        with pytest.raises(InputError, match=r"is no jinja: line \d"):
            resolve_template(None, tokenizer)
    assert resolve_template("alpaca-2", tokenizer) == CHAT_TEMPLATES["alpaca-2"]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_system_messages_stand_at_the_beginning_and_are_joined(tokenizer, name):
    template = CHAT_TEMPLATES[name]
    system = [{"role": "system", "content": text} for text in ("one", "", "two")]
    joined = [{"role": "system", "content": "one\n\ntwo"}]
    assert encode_prompt([*system, *CHAT[:3]], template, tokenizer) == encode_prompt(
        [*joined, *CHAT[:3]], template, tokenizer
    )
    with pytest.raises(InputError, match="message 3 is a system message"):
        encode_conversation([*CHAT[:2], *joined, *CHAT[2:]], template, tokenizer)


@pytest.mark.parametrize("page", ["data.md", "data_EN.md"])
def test_the_docs_show_the_families(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert f"```text\n{describe_families()}\n```" in text


# ---------------------------------------------------------------- real tokenizers


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "config", ["added_tokens.json", pytest.param("tokenizer_config.json", marks=pytest.mark.slow)]
)
def test_chatml_on_the_real_llama_2_tokenizer(tmp_path, shared_data, config):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in (shared_data / "tokenizers" / "llama2_32000").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    added = {"<|im_end|>": 32000, "<|im_start|>": 32001, "维修手册": 32002}
    if config == "added_tokens.json":
        (folder / config).write_text(json.dumps(added), encoding="utf-8")
    else:
        settings = json.loads((folder / config).read_text(encoding="utf-8"))
        tokens = {str(index): {"content": token, "special": False} for token, index in added.items()}
        (folder / config).write_text(json.dumps(settings | {"added_tokens_decoder": tokens}), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, tmp_path / "saved")
    messages = [{"role": "user", "content": "请看维修手册第<|im_end|>页"}]
    ids = encode_prompt(messages, CHATML, tokenizer)
    assert [ids.count(index) for index in (32000, 32001, 32002)] == [1, 2, 1]
    assert stop_token_ids(CHATML, tokenizer) == [2, 32000]
    again, other = load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    for messages, _ in generate_conversations(50, False):
        expected = encode_with_transformers(other, messages, chat_template=CHATML)
        assert encode_prompt(messages, CHATML, tokenizer) == expected
        text = messages[-1]["content"] + "维修手册"
        assert encode_text(tokenizer, text) == other(text, add_special_tokens=False)["input_ids"]
        assert encode_text(again, text) == encode_text(tokenizer, text)


@pytest.mark.skipif("REAL_MODEL" not in os.environ, reason="REAL_MODEL names no folder of a Qwen2.5 model")
def test_a_real_qwen_model_is_asked_as_transformers_asks_it():
    tokenizer = load_tokenizer(os.environ["REAL_MODEL"])
    # AutoTokenizer's class for Qwen would add NFC, whatever tokenizer.json says.
    other = PreTrainedTokenizerFast.from_pretrained(os.environ["REAL_MODEL"])
    template = resolve_template("tokenizer", tokenizer)
    for messages, tools in generate_conversations(200, True):
        assert encode_prompt(messages, template, tokenizer, tools) == encode_with_transformers(other, messages, tools)
    assert call_form(template, tokenizer) == HERMES_FORM
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(template, tokenizer)) == ["<|im_end|>"]
    assert labelled(CHAT, template, tokenizer).endswith(
        "<|im_start|>assistant\n⟦答一<|im_end|>⟧\n<|im_start|>user\n问二<|im_end|>\n<|im_start|>assistant\n"
        "⟦答二<|im_end|>⟧\n"
    )


# ---------------------------------------------------------------- the forms of calls


def test_the_form_of_calls_is_what_the_template_writes(family):
    name, described, tokenizer, _ = family
    forms = {"Llama-3.1": LLAMA_FORM, "Mistral": MISTRAL_FORM, "Qwen2.5": HERMES_FORM, "Qwen3": HERMES_FORM}
    assert call_form(described.template, tokenizer) == forms.get(name, OWN_FORM)
    assert renders_tools(described.template, tokenizer) == (name in forms)


@pytest.mark.parametrize(
    "call",
    [
        "'<call ' + name + '/>'",
        # Qwen3-Coder's, Mistral's of 2025, DeepSeek's: marks of forms that are read, and something else behind them
        "'<tool_call>\n<function=' + name + '>\n</function>\n</tool_call>'",
        "'[TOOL_CALLS]' + name + '[ARGS]' + call.function.arguments | tojson",
        "'<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + name + '\n```json\n' + call.function.arguments | tojson",
    ],
)
def test_calls_that_cannot_be_read_have_no_form(tokenizer, call):
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for m in messages %}"
        "{% for call in m.tool_calls or [] %}{% set name = call.function.name %}{{ CALL }}{% endfor %}{% endfor %}"
    )
    assert call_form(template.replace("CALL", call), tokenizer) is None


def test_a_mark_in_the_instructions_is_no_call(tokenizer):
    template = "{% if tools %}{{ 'Write {} in <tool_call></tool_call>.' }}{% endif %}" + TOOL_TEMPLATE
    thinking = template.replace("%}assistant:{%", "%}assistant: <think>{%")  # which begins no text of a conversation
    assert thinking != template
    assert call_form(template, tokenizer) == call_form(thinking, tokenizer) == HERMES_FORM


def test_an_empty_text_beside_a_call_changes_nothing(family):
    name, described, tokenizer, _ = family
    if name == "Gemma-3":
        pytest.skip("its template refuses results of tools")
    call, result = call_and_result("北京", "call00001")
    arguments = {"name": "weather", "arguments": json.dumps({"city": "北京"})}
    spellings = [call, {**call, "content": ""}, {**call, "tool_calls": [{"id": "call00001", "function": arguments}]}]
    first, *others = [encode_prompt([QUESTION, shown, result], described.template, tokenizer) for shown in spellings]
    assert others == [first, first]
