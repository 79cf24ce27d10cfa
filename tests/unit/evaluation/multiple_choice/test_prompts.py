"""Prompts of the presets against texts written out by hand, token ids against whole encodings, short windows."""

import pytest

from utils.core.errors import InputError
from utils.evaluation.multiple_choice.benchmarks import read_benchmark
from utils.evaluation.multiple_choice.prompts import ChoiceEncoder, ChoiceWriter, count_cuts
from utils.evaluation.multiple_choice.questions import ChoiceQuestion
from utils.evaluation.multiple_choice.subjects import CEVAL, CMMLU, MMLU, Subject
from utils.evaluation.multiple_choice.wordings import PRESETS
from utils.generation.engine import Prompter
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import encode_text, load_tokenizer

NETWORK = CEVAL["computer_network"]
ONE = ChoiceQuestion("computer_network", "0", "甲？", ("一", "二", "NA", "4"), "C", "1. 因为丙", "dev.csv:2")
TWO = ChoiceQuestion("computer_network", "1", " 乙？", ("五", "六", "七", "八"), "A", "1. 因为子", "dev.csv:3")
ASKED = ChoiceQuestion("computer_network", "0", "丙？", ("九", "十", "百", "千"), None, "", "val.csv:2")
# Chinese-LLaMA-Alpaca-2's form, with the file's name as the subject: facts of reference/upstream.md, 1.11.
A2_FEW = (
    "以下是中国关于computer_network考试的单项选择题，请选出其中的正确答案。\n\n"
    "甲？\nA. 一\nB. 二\nC. NA\nD. 4\n答案：C\n\n"
    " 乙？\nA. 五\nB. 六\nC. 七\nD. 八\n答案：A\n\n"
    "丙？\nA. 九\nB. 十\nC. 百\nD. 千\n答案："
)
A2_SYSTEM = "[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n"
A2_CHAT = (
    A2_SYSTEM + "以下是中国关于computer_network考试的单项选择题，请选出其中的正确答案。\n\n [/INST]"
    "好的，我会结合computer_network相关知识回答"
    "[INST] 甲？\nA. 一\nB. 二\nC. NA\nD. 4\n答案：[/INST]C\n"
    "[INST]  乙？\nA. 五\nB. 六\nC. 七\nD. 八\n答案：[/INST]A\n"
    + A2_SYSTEM
    + "丙？\nA. 九\nB. 十\nC. 百\nD. 千\n答案： [/INST]"
)
MMLU_FEW = (
    "The following are multiple choice questions (with answers) about{space}high school us history.\n\n"
    "甲？\nA. 一\nB. 二\nC. NA\nD. 4\nAnswer: C\n\n"
    "{two}\nA. 五\nB. 六\nC. 七\nD. 八\nAnswer: A\n\n"
    "丙？\nA. 九\nB. 十\nC. 百\nD. 千\nAnswer:"
)


def write(preset, benchmark="ceval", subject=NETWORK, examples=(ONE, TWO), mode="constrained", chat=False):
    wording = PRESETS[preset].wording(benchmark, "zh", mode, chat)
    return ChoiceWriter(wording, mode, chat).write(ASKED, subject, examples)


def test_the_forerunners_prompts_byte_for_byte():
    assert write("a2-2023") == A2_FEW
    assert write("a2-2023", examples=()) == "丙？\nA. 九\nB. 十\nC. 百\nD. 千\n答案："
    assert write("a2-2023", chat=True) == A2_CHAT
    assert write("a2-2023", chat=True, examples=()) == A2_SYSTEM + "丙？\nA. 九\nB. 十\nC. 百\nD. 千\n答案： [/INST]"
    # CMMLU's conversations have another system prompt.
    cmmlu = write("a2-2023", "cmmlu", CMMLU["anatomy"], chat=True)
    expected = A2_CHAT.replace("You are a helpful assistant. ", "").replace("computer_network", "anatomy")
    assert cmmlu == expected


def test_the_forerunners_chain_of_thought():
    few = (
        "以下是中国关于computer_network考试的单项选择题，请选出其中的正确答案。\n\n"
        "甲？\nA. 一\nB. 二\nC. NA\nD. 4\n答案：让我们一步一步思考，\n1. 因为丙\n所以答案是C。\n\n"
        "丙？\nA. 九\nB. 十\nC. 百\nD. 千\n答案：让我们一步一步思考，\n1."
    )
    assert write("a2-2023", mode="cot", examples=(ONE,)) == few
    assert write("default", mode="cot", examples=(ONE,)) == few.replace("computer_network", "计算机网络")
    # Its examples in conversations do not reason, though the question asks for it.
    chat = write("a2-2023", mode="cot", chat=True)
    assert chat == A2_CHAT[: -len("答案： [/INST]")] + "答案是什么？让我们一步一步思考，\n1. [/INST]"


def test_mmlu_of_the_forerunners_has_two_spaces_and_lm_eval_strips():
    history = MMLU["high_school_us_history"]
    assert write("a2-2023", "mmlu", history) == MMLU_FEW.format(space="  ", two=" 乙？")
    assert write("lm-eval", "mmlu", history) == MMLU_FEW.format(space=" ", two="乙？")
    assert write("default", "mmlu", history) == MMLU_FEW.format(space=" ", two=" 乙？")
    head = "The following are multiple choice questions (with answers) about{space}high school us history.\n\n"
    for preset, space in (("a2-2023", "  "), ("lm-eval", " "), ("default", " ")):
        zero = write(preset, "mmlu", history, examples=())
        assert zero == head.format(space=space) + "丙？\nA. 九\nB. 十\nC. 百\nD. 千\nAnswer:"


def test_lm_evaluation_harness_s_prompts():
    body = (
        "甲？\nA. 一\nB. 二\nC. NA\nD. 4\n答案： C\n\n乙？\nA. 五\nB. 六\nC. 七\nD. 八\n答案： A\n\n"
        "丙？\nA. 九\nB. 十\nC. 百\nD. 千\n答案："
    )
    assert write("lm-eval") == "以下是中国关于计算机网络的单项选择题，请选出其中的正确答案。\n\n" + body
    cmmlu = write("lm-eval", "cmmlu", CMMLU["anatomy"])
    assert cmmlu == "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n" + body
    zero = write("lm-eval", "cmmlu", CMMLU["anatomy"], examples=())
    assert zero.startswith("以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n丙？")


def test_default_names_subjects_in_chinese():
    assert write("default") == A2_FEW.replace("computer_network", "计算机网络")
    assert write("default", "own", Subject("baking", "烘焙", "x"), ()) == "丙？\nA. 九\nB. 十\nC. 百\nD. 千\n答案："


def test_default_conversations_are_messages():
    messages = write("default", chat=True)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 + ["user"]
    assert messages[0]["content"] == "以下是中国关于计算机网络考试的单项选择题，请选出其中的正确答案。\n\n"
    assert messages[1]["content"] == "好的，我会结合计算机网络相关知识回答"
    assert messages[2]["content"] == "甲？\nA. 一\nB. 二\nC. NA\nD. 4\n答案：" and messages[3]["content"] == "C"
    assert messages[-1]["content"] == "丙？\nA. 九\nB. 十\nC. 百\nD. 千\n答案："
    english = write("default", "mmlu", MMLU["anatomy"], (ONE,), chat=True)
    assert english[0]["content"].startswith("The following are") and english[0]["content"].endswith("D. 4\nAnswer:")
    reasoning = write("default", mode="cot", chat=True, examples=(ONE,))
    assert reasoning[3]["content"] == "1. 因为丙\n所以答案是C。" and "一步一步思考" in reasoning[-1]["content"]


def test_cloze_does_not_show_the_choices():
    few = "以下是中国关于计算机网络考试的单项选择题，请选出其中的正确答案。\n\n甲？\n答案：NA\n\n丙？\n答案："
    assert write("default", mode="cloze", examples=(ONE,)) == few
    wording = PRESETS["default"].wording("mmlu", "en", "cloze", False)
    assert ChoiceWriter(wording, "cloze", False).answers(ASKED) == [" 九", " 十", " 百", " 千"]


@pytest.mark.parametrize(
    ("preset", "benchmark", "mode", "chat", "message"),
    [
        ("lm-eval", "ceval", "cloze", False, "--preset lm-eval has no cloze prompts for ceval"),
        ("lm-eval", "ceval", "constrained", True, "--preset lm-eval has no conversations"),
        ("lm-eval", "own", "constrained", False, "--preset lm-eval is for ceval, cmmlu, mmlu"),
        ("a2-2023", "mmlu", "cot", False, "--preset a2-2023 has no cot prompts for mmlu"),
        ("a2-2023", "mmlu", "constrained", True, "--preset a2-2023 has no conversations for mmlu"),
    ],
)
def test_what_a_preset_does_not_have(preset, benchmark, mode, chat, message):
    with pytest.raises(InputError, match=message):
        PRESETS[preset].wording(benchmark, "zh", mode, chat)


def test_reasoning_needs_explanations():
    silent = ChoiceQuestion("law", "0", "?", ("a", "b"), "A", "", "dev.csv:9")
    with pytest.raises(InputError, match=r"dev\.csv:9: the example has no explanation"):
        write("default", mode="cot", examples=(silent,))


# ---------------------------------------------------------------- token ids


@pytest.fixture(scope="module")
def prompter(base_tokenizer_folder):
    return Prompter(load_tokenizer(base_tokenizer_folder), CHAT_TEMPLATES["alpaca-2"], 4096)


def encoder(prompter, preset="default", benchmark="ceval", mode="constrained", chat=False, room=0):
    writer = ChoiceWriter(PRESETS[preset].wording(benchmark, "zh", mode, chat), mode, chat)
    return ChoiceEncoder(writer, prompter, room)


@pytest.mark.parametrize(("preset", "before"), [("default", ""), ("lm-eval", " ")])
def test_letters_are_cut_from_the_whole_text(prompter, preset, before):
    found = encoder(prompter, preset).encode(ASKED, NETWORK, (ONE, TWO)).request
    tokenizer, text = prompter.tokenizer, write(preset)
    assert found.text == text and found.texts == tuple(before + letter for letter in "ABCD")
    assert found.prompt == (tokenizer.bos_token_id, *encode_text(tokenizer, text))
    for letter, ids in zip("ABCD", found.continuations, strict=True):
        assert found.prompt[1:] + ids == tuple(encode_text(tokenizer, text + before + letter))


def test_both_forms_of_a_letter_count_for_the_forerunners(prompter):
    found = encoder(prompter, "a2-2023").encode(ASKED, NETWORK, (ONE,)).request
    alone = [encode_text(prompter.tokenizer, letter) for letter in "ABCD"]
    after = [encode_text(prompter.tokenizer, f"：{letter}") for letter in "ABCD"]
    assert found.continuations == (*((ids[0],) for ids in alone), *((ids[-1],) for ids in after))
    assert prompter.tokenizer.convert_ids_to_tokens([found.continuations[0][0], found.continuations[4][0]]) == [
        "▁A",
        "A",
    ]
    assert found.texts == (" A", " B", " C", " D", "A", "B", "C", "D")
    mmlu = encoder(prompter, "a2-2023", "mmlu").encode(ASKED, MMLU["anatomy"], (ONE,)).request
    assert mmlu.continuations == tuple((ids[-1],) for ids in alone)


def test_conversations_are_what_training_encodes(prompter):
    from utils.text.prompts import encode_conversation

    found = encoder(prompter, chat=True).encode(ASKED, NETWORK, (ONE,)).request
    messages = [*write("default", chat=True, examples=(ONE,)), {"role": "assistant", "content": "B"}]
    ids, _ = encode_conversation(messages, prompter.template, prompter.tokenizer)
    assert list(found.prompt + found.continuations[1]) == ids[:-1]  # without the end token


def test_cloze_texts_follow_the_prompt(prompter):
    found = encoder(prompter, mode="cloze").encode(ONE, NETWORK, ()).request
    text = "甲？\n答案："
    assert [len(ids) for ids in found.continuations] == [3, 3, 2, 1]  # bytes of Chinese, pieces of the rest
    for choice, ids in zip(ONE.choices, found.continuations, strict=True):
        assert found.prompt[1:] + ids == tuple(encode_text(prompter.tokenizer, text + choice))
    empty = ChoiceQuestion("law", "0", "?", ("a", " "), "A", "", "val.csv:7")
    with pytest.raises(InputError, match=r"val\.csv:7: a choice is empty"):
        encoder(prompter, mode="cloze").encode(empty, NETWORK, ())


def test_examples_go_one_by_one_until_the_prompt_fits(prompter):
    tokenizer = prompter.tokenizer
    lengths = [len(encode_text(tokenizer, write("default", examples=(ONE, TWO)[:n]))) + 1 for n in range(3)]
    for context in range(lengths[0] - 5, lengths[2] + 3):
        short = Prompter(tokenizer, None, context)
        found = encoder(short).encode(ASKED, NETWORK, (ONE, TWO))
        fitting = max((n for n in range(3) if lengths[n] + 1 <= context), default=0)  # and a letter
        assert (found.num_examples, found.num_dropped) == (fitting, 2 - fitting)
        assert len(found.request.prompt) + 1 <= context
        assert found.num_cut == max(lengths[0] + 1 - context, 0)
        if found.num_cut:
            whole = encode_text(tokenizer, write("default", examples=()))
            assert list(found.request.prompt) == [tokenizer.bos_token_id, *whole[found.num_cut :]]
    assert count_cuts([found, encoder(Prompter(tokenizer, None, 30)).encode(ASKED, NETWORK, (ONE,))]) == {
        "prompts_without_all_examples": 1,
        "dropped_examples": 1,
        "cut_prompts": 1,
        "cut_tokens": lengths[0] + 1 - 30,
    }


def test_generated_answers_need_room(prompter):
    tokenizer = prompter.tokenizer
    bare = len(encode_text(tokenizer, write("default", examples=()))) + 1
    found = encoder(Prompter(tokenizer, None, bare + 20), mode="generative", room=20).encode(ASKED, NETWORK, (ONE,))
    assert (found.num_examples, found.num_cut, found.request.continuations) == (0, 0, ())
    with pytest.raises(InputError, match="window of 20 tokens has no room"):
        encoder(Prompter(tokenizer, None, 20), mode="generative", room=20).encode(ASKED, NETWORK, (ONE,))


def test_servers_get_text(prompter):
    found = encoder(None).encode(ASKED, NETWORK, (ONE,)).request
    assert found.text == write("default", examples=(ONE,)) and found.texts == ("A", "B", "C", "D")
    assert found.prompt == () and encoder(None, chat=True).encode(ASKED, NETWORK, ()).request.text == [
        {"role": "user", "content": "丙？\nA. 九\nB. 十\nC. 百\nD. 千\n答案："}
    ]


@pytest.mark.shared_data
def test_letters_of_every_subject_of_cmmlu_are_cut_from_the_whole_text(shared_data, base_tokenizer_folder):
    """The last line decides how a letter is cut off: checked on a whole prompt of each subject."""
    tokenizer = load_tokenizer(base_tokenizer_folder)
    benchmark = read_benchmark("cmmlu", str(shared_data / "eval" / "cmmlu"), num_examples=1, max_questions=1)
    encode = encoder(Prompter(tokenizer, None, None), "lm-eval", "cmmlu").encode
    for question in benchmark.questions:
        found = encode(question, benchmark.subjects[question.subject], benchmark.examples[question.subject]).request
        assert found.prompt[1:] + found.continuations[2] == tuple(encode_text(tokenizer, found.text + " C"))
