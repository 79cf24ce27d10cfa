"""LongBench's prompts: that they fit, what of them is left, and what an engine is asked."""

import random

import pytest
import torch

from utils.core.arguments import GenerationArguments
from utils.core.errors import InputError
from utils.evaluation.longbench.prompts import NoNewlineFirst, PromptWriter
from utils.evaluation.longbench.tasks import TASKS, Sample
from utils.generation.engine import Prompter
from utils.generation.sampling import Sampler, choose
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import load_tokenizer

GREEDY = GenerationArguments(max_new_tokens=512, do_sample=False, repetition_penalty=1.0)
WORDS = [f"word {number} of the long story;" for number in range(400)]


STORY = " ".join(WORDS)


def sample(context=STORY, question="What is the last word?"):
    return Sample(context, question, ["x"], None, 7, "hotpotqa.jsonl:3")


@pytest.fixture(scope="module")
def prompter(base_tokenizer_folder):
    return Prompter(load_tokenizer(base_tokenizer_folder), CHAT_TEMPLATES["alpaca-2"], 4096)


def test_a_prompt_that_fits_is_whole(prompter):
    writer = PromptWriter(prompter, GREEDY, max_length=4096)
    short = sample("One word.")
    assert writer.encode(TASKS["trec"], short) == (
        prompter.encode_text(TASKS["trec"].fill("One word.", short.question)), 0
    )  # fmt: skip
    asked = [{"role": "user", "content": TASKS["hotpotqa"].fill("One word.", short.question)}]
    assert writer.encode(TASKS["hotpotqa"], short) == (prompter.encode(asked), 0)


@pytest.mark.parametrize("max_length", [500, 501])
def test_plain_prompts_are_cut_as_upstream_cuts_them(prompter, max_length):
    """The first and the last half of the tokens that upstream's call of the tokenizer gives, BOS among the first."""
    task, writer = TASKS["trec"], PromptWriter(prompter, GREEDY, max_length=max_length)
    whole = prompter.tokenizer(task.fill(sample().context, sample().question)).input_ids
    half = (max_length - task.max_new_tokens) // 2
    found, cut = writer.encode(task, sample())
    assert found == whole[:half] + whole[-half:] and cut == len(whole) - 2 * half
    assert found[0] == prompter.tokenizer.bos_token_id


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("with_inst", ["true", "false"])
def test_template_and_instructions_stay_and_all_of_it_fits(prompter, name, with_inst):
    task = TASKS[name]
    whole = PromptWriter(prompter, GREEDY, with_inst).encode(task, sample())[0]
    bare = PromptWriter(prompter, GREEDY, with_inst).encode(task, sample(""))[0]
    writer = PromptWriter(prompter, GREEDY, with_inst, max_length=len(bare) + task.max_new_tokens + 100)
    found, cut = writer.encode(task, sample())
    room = writer.max_length - task.max_new_tokens
    assert room - 1 <= len(found) <= room and cut == len(whole) - len(found)
    text = prompter.decode(found)
    head, tail = task.prompt.split("{context}")
    assert head.strip() in text and tail.format(input=sample().question).strip() in text
    assert ("[INST] <<SYS>>" in text and text.endswith("[/INST]")) == (with_inst == "true")
    writer = PromptWriter(prompter, GREEDY, with_inst, max_length=2 * len(bare) + task.max_new_tokens + 100)
    text = prompter.decode(writer.encode(task, sample())[0])
    assert "word 0 of" in text and "word 399" in text


def test_in_a_template_the_halves_are_those_of_what_is_in_it(prompter):
    task, random_ = TASKS["hotpotqa"], random.Random(1)
    varied = sample("".join(random_.choices("abcdefghijklmnopqrstuvwxyz ", k=6000)))
    whole = PromptWriter(prompter, GREEDY).encode(task, varied)[0]
    found, _ = PromptWriter(prompter, GREEDY, max_length=1032).encode(task, varied)
    gap = next(place for place in range(len(found)) if found[place] != whole[place])
    assert found[gap:] == whole[gap - len(found) :]
    framed = prompter.decode(found[:gap]).index("<</SYS>>\n\n") + len("<</SYS>>\n\n")
    opening = len(prompter.encode_text(prompter.decode(found[:gap])[:framed].lstrip()))
    closing = next(n for n in range(20) if "[/INST]" in prompter.decode(found[-n - 1 :]))
    assert abs((gap - opening) - (len(found) - gap - closing)) <= 4


def test_a_long_question_stays_whole_and_takes_its_room_from_the_beginning(prompter):
    task, question = TASKS["hotpotqa"], "Which of these is it: " + " ".join(WORDS[:40]) + "?"
    bare = PromptWriter(prompter, GREEDY).encode(task, sample("", question))[0]
    writer = PromptWriter(prompter, GREEDY, max_length=len(bare) + task.max_new_tokens + 20)
    found, _ = writer.encode(task, sample(question=question))
    assert len(found) == len(bare) + 20  # far from two halves
    text = prompter.decode(found)
    assert f"Question: {question}\nAnswer:" in text and "The following are given passages.\nword 0" in text


def test_the_code_that_repobench_asks_to_continue_is_long_text_too(prompter):
    task = TASKS["repobench-p"]
    writer = PromptWriter(prompter, GREEDY, max_length=400)
    code = sample("int helper;\n", "\n".join(WORDS))
    writer.check(task, [code])
    text = prompter.decode(writer.encode(task, code)[0])
    assert text.lstrip().startswith("Please complete the code given below. \nint helper;\nword 0")
    assert text.endswith("word 399 of the long story;Next line of code:\n")
    with pytest.raises(InputError, match="tokens without its context, its answer may have 32"):
        writer.check(TASKS["hotpotqa"], [code])


def test_a_prompt_that_cannot_fit_is_refused_by_name(prompter):
    task = TASKS["hotpotqa"]
    needed = len(PromptWriter(prompter, GREEDY).encode(task, sample(""))[0])
    PromptWriter(prompter, GREEDY, max_length=needed + 32).check(task, [sample()])
    message = (
        rf"hotpotqa\.jsonl:3: the prompt has {needed} tokens without its context, its answer may have 32, but "
        rf"--max_length is {needed + 31}; pass a larger one, up to the model's window of 4096, or leave hotpotqa out"
    )
    with pytest.raises(InputError, match=message):
        PromptWriter(prompter, GREEDY, max_length=needed + 31).check(task, [sample("short"), sample()])
    PromptWriter(prompter, GREEDY).check(task, [sample()])  # a model without a window
    assert PromptWriter(prompter, GREEDY).encode(task, sample())[1] == 0


def test_what_is_asked_of_an_engine(prompter):
    writer = PromptWriter(prompter, GREEDY, system_prompt="Be brief.", max_length=2048)
    request, _ = writer.request(TASKS["hotpotqa"], sample("a"), 7)
    assert request.strip and request.constraint is None and request.seed == 7
    assert (request.settings.max_new_tokens, request.settings.stop) == (32, [])
    assert "<<SYS>>\nBe brief.\n<</SYS>>" in prompter.decode(request.prompt)
    request, _ = writer.request(TASKS["lcc"], sample("a"), 7)
    assert not request.strip and "[INST]" not in prompter.decode(request.prompt)
    request, _ = writer.request(TASKS["samsum"], sample("a"), 7)
    assert (request.settings.stop, request.settings.min_new_tokens) == (["\n"], 1)
    assert request.constraint is not None
    shorter = PromptWriter(prompter, GenerationArguments(max_new_tokens=40, min_new_tokens=36, stop=["!"]))
    settings = [shorter.request(TASKS[name], sample("a"), 0)[0].settings for name in ("hotpotqa", "samsum")]
    assert [(s.max_new_tokens, s.min_new_tokens, s.stop) for s in settings] == [(32, 32, ["!"]), (40, 36, ["!", "\n"])]
    unconstrained = PromptWriter(prompter, GREEDY, constrains=False)
    assert unconstrained.request(TASKS["samsum"], sample("a"), 0)[0].constraint is None


def test_an_answer_of_one_line_does_not_begin_with_a_newline():
    constraint = NoNewlineFirst(torch.tensor([True, False, True]))
    sampler = Sampler(GREEDY, [], [], 0, constraint=constraint)
    logits = torch.tensor([[0.0, 3.0, 2.0, 9.0]])  # the last row belongs to no token
    assert choose(logits, [sampler])[0] == [2]
    sampler.advance(2)
    assert choose(logits, [sampler])[0] == [1]
