"""Prompts: golden texts, exact label masks, records of every format, and user text that looks like special tokens."""

import pytest

from support.tokenizers import CHATML
from utils.core.errors import InputError
from utils.text.prompts import (
    CHAT_TEMPLATES,
    IGNORE_INDEX,
    encode_conversation,
    encode_prompt,
    render,
    resolve_template,
    stop_token_ids,
    with_system_prompt,
)
from utils.text.tokenizer import encode_text, load_tokenizer

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
