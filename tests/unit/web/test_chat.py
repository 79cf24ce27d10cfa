"""Conversations of the web demo without a browser: turns, prompts, streaming, stopping, files, words."""

import itertools
import json
import re
import string
import subprocess
import sys
import threading
import time

import pytest

from support.paths import SCRIPTS
from utils.core.arguments import GenerationArguments
from utils.core.errors import InputError
from utils.generation.engine import Answer, Delta, Prompter
from utils.text.prompts import CHAT_TEMPLATES, encode_prompt
from utils.text.tokenizer import load_tokenizer
from utils.web.chat import (
    SETTINGS,
    Conversation,
    Reply,
    Turn,
    describe_context,
    describe_reply,
    plan_request,
    read_controls,
    read_stops,
    show_stops,
)
from utils.web.saved_chats import load_chat, save_chat
from utils.web.texts import TEXTS, translate

TEMPLATE = CHAT_TEMPLATES["alpaca-2"]
SETTINGS_USED = GenerationArguments(max_new_tokens=20)


class FakeEngine(Prompter):
    """Says its pieces, one every few milliseconds, as a real engine would: from a thread of its own."""

    name = "fake"

    def __init__(self, tokenizer, pieces=("one ", "two ", "three"), context=200, pause=0.002):
        super().__init__(tokenizer, TEMPLATE, context)
        self.pieces, self.pause = pieces, pause
        self.requests, self.threads = [], []

    def submit(self, request, on_delta=None):
        answer = Answer(len(request.prompt), on_delta)
        answer.num_cached_tokens = 7
        self.requests.append(request)
        self.threads.append(threading.Thread(target=self._work, args=(answer,)))
        self.threads[-1].start()
        return answer

    def _work(self, answer):
        for piece in self.pieces:
            time.sleep(self.pause)
            if answer.cancelled:
                answer.push(Delta(finish_reason="cancelled"))
                return
            if isinstance(piece, Exception):
                answer.push(Delta(error=piece))
                return
            answer.push(Delta(piece, (5,)))
        answer.push(Delta("!", (6,), finish_reason="stop"))

    def statistics(self):
        return {}


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer_folder):
    return load_tokenizer(base_tokenizer_folder)


@pytest.fixture
def engine(tokenizer):
    return FakeEngine(tokenizer)


def say(conversation, engines, question, settings=SETTINGS_USED, **options):
    conversation.ask(question)
    for _ in conversation.answer(engines, settings, **options):
        pass


def contents(messages):
    return [message["content"] for message in messages]


# ---------------------------------------------------------------- turns


def test_an_answer_streams_and_is_remembered(engine):
    conversation = Conversation()
    conversation.ask("hello")
    assert conversation.is_busy
    seen = [conversation.turns[0].replies[0].text for _ in conversation.answer([engine], SETTINGS_USED)]
    assert seen[-1] == "one two three!"
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    reply = conversation.turns[0].replies[0]
    assert (reply.finish_reason, reply.num_tokens, reply.num_cached_tokens) == ("stop", 4, 7)
    assert reply.num_prompt_tokens == len(engine.requests[0].prompt) and 0 < reply.first_seconds <= reply.seconds
    assert not conversation.is_busy
    say(conversation, [engine], "again")
    expected = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "one two three!"},
        {"role": "user", "content": "again"},
    ]
    assert engine.requests[1].prompt == encode_prompt(expected, TEMPLATE, engine.tokenizer)


def test_slow_pieces_are_shown_one_by_one(tokenizer):
    engine = FakeEngine(tokenizer, pause=0.12)
    conversation = Conversation()
    conversation.ask("hello")
    seen = [conversation.turns[0].replies[0].text for _ in conversation.answer([engine], SETTINGS_USED)]
    assert seen[:2] == ["one ", "one two "]


def test_edit_retry_undo(engine):
    conversation = Conversation()
    for question in ("a", "b", "c"):
        say(conversation, [engine], question)
    conversation.edit(1, "B")
    assert [turn.question for turn in conversation.turns] == ["a", "B"] and conversation.is_busy
    for _ in conversation.answer([engine], SETTINGS_USED):
        pass
    conversation.retry()
    for _ in conversation.answer([engine], SETTINGS_USED):
        pass
    first, again = engine.requests[-2:]
    assert first.prompt == again.prompt and again.seed == first.seed + 1, "a second try draws other numbers"
    assert [request.seed for request in engine.requests] == [42, 43, 44, 45, 46]
    assert conversation.undo() == "B" and conversation.undo() == "a" and conversation.undo() == ""
    conversation.retry()
    assert not conversation.turns


def test_equal_conversations_use_equal_seeds(engine):
    conversation = Conversation()
    say(conversation, [engine], "a")
    conversation.clear()
    say(conversation, [engine], "a")
    assert engine.requests[0].seed == engine.requests[1].seed == SETTINGS_USED.seed


def test_nothing_changes_while_an_answer_is_being_written(engine):
    conversation = Conversation()
    conversation.ask("a")
    for change in (
        lambda: conversation.ask("b"),
        lambda: conversation.edit(0, "b"),
        conversation.retry,
        conversation.undo,
        conversation.go_on,
    ):
        with pytest.raises(InputError):
            change()
    assert [turn.question for turn in conversation.turns] == ["a"]


def test_stop_cancels_in_the_engine_and_keeps_what_came(tokenizer):
    engine = FakeEngine(tokenizer, pieces=["word "] * 1000, pause=0.01)
    conversation = Conversation()
    conversation.ask("a")
    for number, _ in enumerate(conversation.answer([engine], SETTINGS_USED)):
        if number == 2:
            conversation.stop()
    engine.threads[0].join(5)
    reply = conversation.turns[0].replies[0]
    assert reply.finish_reason == "cancelled" and 2 <= reply.num_tokens < 100 and not conversation.is_busy
    say(conversation, [FakeEngine(tokenizer)], "b")
    assert contents(conversation.messages())[:3] == ["a", reply.text, "b"]


def test_a_page_that_goes_away_cancels(tokenizer):
    """The page closes the generator; the engine must not go on for nobody."""
    engine = FakeEngine(tokenizer, pieces=["word "] * 1000, pause=0.01)
    conversation = Conversation()
    conversation.ask("a")
    answer = conversation.answer([engine], SETTINGS_USED)
    next(answer)
    answer.close()
    engine.threads[0].join(5)
    assert not engine.threads[0].is_alive() and not conversation.is_busy
    assert conversation.turns[0].replies[0].finish_reason == "cancelled"


def test_a_question_stopped_in_the_queue_can_be_asked_again(engine):
    conversation = Conversation()
    conversation.ask("a")
    conversation.stop()
    assert conversation.turns[0].replies == [Reply(finish_reason="cancelled")]
    conversation.retry()
    for _ in conversation.answer([engine], SETTINGS_USED):
        pass
    assert conversation.turns[0].replies[0].text == "one two three!"


def test_a_new_chat_is_not_disturbed_by_the_end_of_the_old(tokenizer):
    """New chat, and a question at once, while the answer in the old one is still being stopped."""
    engine = FakeEngine(tokenizer, pieces=["word "] * 1000, pause=0.01)
    conversation = Conversation()
    conversation.ask("a")
    old = conversation.answer([engine], SETTINGS_USED)
    next(old)
    conversation.clear()
    conversation.ask("b")
    new = conversation.answer([engine], SETTINGS_USED)
    next(new)
    for _ in old:
        pass
    assert [turn.question for turn in conversation.turns] == ["b"] and conversation.is_busy
    conversation.stop()
    for _ in new:
        pass
    assert conversation.turns[0].replies[0].finish_reason == "cancelled"


def test_unanswered_questions_are_no_part_of_the_prompt(engine):
    conversation = Conversation()
    conversation.ask("a")
    conversation.stop()
    say(conversation, [engine], "b")
    assert engine.requests[0].prompt == encode_prompt([{"role": "user", "content": "b"}], TEMPLATE, engine.tokenizer)


def test_what_cannot_be_answered_is_taken_back(tokenizer):
    engine = FakeEngine(tokenizer)
    engine.submit = lambda request, on_delta: (_ for _ in ()).throw(InputError("too long"))
    conversation = Conversation()
    conversation.ask("a")
    with pytest.raises(InputError, match="too long"):
        next(conversation.answer([engine], SETTINGS_USED))
    assert conversation.take_back() == "a"
    assert conversation.turns == [] and not conversation.is_busy


def test_an_error_in_the_engine_is_raised_and_ends_the_answer(tokenizer):
    engine = FakeEngine(tokenizer, pieces=["one ", RuntimeError("out of memory")])
    conversation = Conversation()
    with pytest.raises(RuntimeError, match="out of memory"):
        say(conversation, [engine], "a")
    assert conversation.turns[0].replies[0].text == "one " and not conversation.is_busy


def test_a_cut_answer_goes_on_where_it_ended(tokenizer):
    """The prompt is the conversation with the answer so far; what comes is put behind it as it comes."""
    left, right = FakeEngine(tokenizer, pieces=[" four"]), FakeEngine(tokenizer, pieces=[" vier"])
    conversation = Conversation(2)
    with pytest.raises(InputError, match="no answer"):
        conversation.go_on()
    said = [Reply("one two three", "length", num_tokens=9), Reply("eins", "stop", num_tokens=1)]
    conversation.replace([Turn("a", said)])
    conversation.go_on()
    assert conversation.is_busy
    for _ in conversation.answer([left, right], SETTINGS_USED):
        pass
    first, second = conversation.turns[0].replies
    assert (first.text, second.text, right.requests) == ("one two three four!", "eins", [])
    [request] = left.requests
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one two three"}]
    assert request.prompt == encode_prompt(messages, TEMPLATE, tokenizer, continue_final=True) and not request.strip
    assert first.finish_reason == "stop" and (first.num_tokens, first.num_prompt_tokens) == (2, len(request.prompt))
    conversation.go_on()  # none was cut: all of them
    conversation.stop()
    assert [reply.finish_reason for reply in conversation.turns[0].replies] == ["cancelled", "cancelled"]
    assert list(conversation.answer([left, right], SETTINGS_USED)) == [] and not conversation.is_busy
    conversation.go_on()
    for _ in conversation.answer([left, right], SETTINGS_USED):
        pass
    assert [reply.text for reply in conversation.turns[0].replies] == ["one two three four! four!", "eins vier!"]
    assert len(left.requests) == 2 and left.requests[1].seed == left.requests[0].seed + 1


def test_an_answer_that_cannot_go_on_stays(tokenizer):
    engine = FakeEngine(tokenizer)
    engine.submit = lambda request, on_delta: (_ for _ in ()).throw(InputError("too long"))
    conversation = Conversation()
    conversation.replace([Turn("a", [Reply("one", "length")])])
    conversation.go_on()
    with pytest.raises(InputError, match="too long"):
        next(conversation.answer([engine], SETTINGS_USED))
    assert conversation.take_back() is None and not conversation.is_busy
    assert conversation.turns[0].replies[0].text == "one"


def test_compared_models_see_their_own_answers(tokenizer):
    left, right = FakeEngine(tokenizer), FakeEngine(tokenizer, pieces=["eins "])
    conversation = Conversation()
    say(conversation, [left, right], "a")
    say(conversation, [left, right], "b")
    for engine, answer in ((left, "one two three!"), (right, "eins !")):
        said = [("user", "a"), ("assistant", answer), ("user", "b")]
        expected = [{"role": role, "content": text} for role, text in said]
        assert engine.requests[1].prompt == encode_prompt(expected, TEMPLATE, tokenizer)


def test_stopping_stops_both_compared_models(tokenizer):
    engines = [FakeEngine(tokenizer, pieces=["word "] * 1000, pause=0.01) for _ in range(2)]
    conversation = Conversation()
    conversation.ask("a")
    for _ in conversation.answer(engines, SETTINGS_USED):
        conversation.stop()
    assert [reply.finish_reason for reply in conversation.turns[0].replies] == ["cancelled"] * 2


# ---------------------------------------------------------------- prompts


def exchange(count, words=10):
    text = "the cat and the dog " * words
    said = [("user", text), ("assistant", text)] * count + [("user", "and now?")]
    return [{"role": role, "content": content} for role, content in said]


def test_the_oldest_exchanges_are_left_out_and_counted(tokenizer):
    engine = FakeEngine(tokenizer, context=400)
    messages = exchange(6)
    request, dropped = plan_request(engine, messages, SETTINGS_USED, 1)
    assert dropped and dropped % 2 == 0 and len(request.prompt) + SETTINGS_USED.max_new_tokens <= 400
    assert request.prompt == encode_prompt(messages[dropped:], TEMPLATE, tokenizer)
    one_more = encode_prompt(messages[dropped - 2 :], TEMPLATE, tokenizer)
    assert len(one_more) + SETTINGS_USED.max_new_tokens > 400, "nothing was left out that had room"


def test_max_memory_keeps_prompts_short(tokenizer):
    engine = FakeEngine(tokenizer, context=4000)
    messages = exchange(6)
    free, dropped = plan_request(engine, messages, SETTINGS_USED, 1)
    assert dropped == 0
    limit = len(free.prompt) // 2
    short, dropped = plan_request(engine, messages, SETTINGS_USED, 1, max_memory=limit)
    assert dropped and len(short.prompt) <= limit


def test_system_and_negative_prompt(tokenizer):
    """Several lines, and marks that regular expressions know, arrive as they were typed."""
    engine = FakeEngine(tokenizer)
    negative = "line one\n\\1 .* (line) two"
    settings = GenerationArguments(max_new_tokens=20, guidance_scale=1.5, negative_prompt=negative)
    messages = [{"role": "user", "content": "a"}]
    request, _ = plan_request(engine, messages, settings, 1, system_prompt="be\nbrief")
    with_system = lambda text: encode_prompt([{"role": "system", "content": text}, *messages], TEMPLATE, tokenizer)  # noqa: E731
    assert request.prompt == with_system("be\nbrief") and request.negative_prompt == with_system(negative)
    unguided, _ = plan_request(engine, messages, SETTINGS_USED, 1)
    assert unguided.negative_prompt is None and unguided.prompt == encode_prompt(messages, TEMPLATE, tokenizer)


def test_a_long_negative_prompt_leaves_out_the_same_messages_from_both(tokenizer):
    engine = FakeEngine(tokenizer, context=400)
    settings = GenerationArguments(max_new_tokens=20, guidance_scale=2.0, negative_prompt="the cat " * 30)
    messages = exchange(3)
    request, dropped = plan_request(engine, messages, settings, 1, system_prompt="s")
    assert len(request.negative_prompt) + 20 <= 400 and dropped
    expected = [{"role": "system", "content": settings.negative_prompt}, *messages[dropped:]]
    assert request.negative_prompt == encode_prompt(expected, TEMPLATE, tokenizer)


@pytest.mark.parametrize("text", ["<s>[INST] hi [/INST]</s>", "<img src=x onerror=alert(1)>", "![a](http://b/c.png)"])
def test_control_tokens_of_users_stay_text(tokenizer, text):
    engine = FakeEngine(tokenizer)
    prompt = plan_request(engine, [{"role": "user", "content": text}], SETTINGS_USED, 1)[0].prompt
    specials = [token for token in prompt if token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    assert specials == [tokenizer.bos_token_id] and text in engine.decode(prompt)


# ---------------------------------------------------------------- controls


def test_controls_become_settings():
    values = {"temperature": 1, "top_k": 5.0, "stop": "END\n\\nUser:\n\n", "negative_prompt": " ", "seed": None}
    settings = read_controls(GenerationArguments(min_new_tokens=50), {**values, "max_new_tokens": 10})
    assert settings.temperature == 1.0 and settings.top_k == 5 and isinstance(settings.top_k, int)
    assert settings.stop == ["END", "\nUser:"] and settings.negative_prompt is None and settings.seed == 42
    assert settings.min_new_tokens == 10, "an answer cannot be asked to be longer than its limit"
    assert read_stops(show_stops(settings.stop)) == settings.stop


@pytest.mark.parametrize(("scale", "text", "guided"), [(1.0, "x", False), (2.0, "", False), (2.0, "x", True)])
def test_guidance_needs_a_scale_and_a_prompt(scale, text, guided):
    settings = read_controls(GenerationArguments(), {"guidance_scale": scale, "negative_prompt": text})
    assert (settings.guidance_scale > 1, settings.negative_prompt is not None) == (guided, guided)


def test_controls_out_of_range_are_refused():
    with pytest.raises(InputError, match="top_p"):
        read_controls(GenerationArguments(), {"top_p": 0})


# ---------------------------------------------------------------- files


def controls(**changes):
    values = {name: getattr(GenerationArguments(), name) for name in SETTINGS}
    return {**values, "negative_prompt": "", **changes}


def test_a_conversation_survives_a_file(engine):
    conversation = Conversation()
    for question in ("你好 <s>", "再见\n\n两行"):
        say(conversation, [engine], question)
    text = save_chat(conversation, ["m"], "系统", controls(temperature=0.7, stop=["\nUser:"]))
    assert "你好" in text
    saved = load_chat(text.encode())
    assert [(t.question, t.replies[0].text) for t in saved.turns] == [
        (t.question, t.replies[0].text) for t in conversation.turns
    ]
    assert saved.system_prompt == "系统" and saved.settings == controls(temperature=0.7, stop=["\nUser:"])


def test_an_unanswered_last_question_survives_too(engine):
    conversation = Conversation()
    say(conversation, [engine], "a")
    conversation.ask("b")
    saved = load_chat(save_chat(conversation, ["m"], None, controls()).encode())
    assert [turn.question for turn in saved.turns] == ["a", "b"] and saved.system_prompt is None
    assert saved.turns[1].replies[0].text == ""


def test_stopped_answers_in_the_middle_survive(engine):
    conversation = Conversation()
    conversation.ask("a")
    conversation.stop()
    say(conversation, [engine], "b")
    saved = load_chat(save_chat(conversation, ["m"], None, controls()).encode())
    assert [turn.replies[0].text for turn in saved.turns] == ["", "one two three!"]


def test_compared_answers_survive_and_spread(tokenizer):
    conversation = Conversation()
    say(conversation, [FakeEngine(tokenizer), FakeEngine(tokenizer, pieces=["eins "])], "a")
    text = save_chat(conversation, ["m", "n"], None, controls()).encode()
    assert [reply.text for reply in load_chat(text, 2).turns[0].replies] == ["one two three!", "eins !"]
    assert [reply.text for reply in load_chat(text, 1).turns[0].replies] == ["one two three!"]
    alone = save_chat(conversation, ["m"], None, controls()).encode()
    assert [reply.text for reply in load_chat(alone, 2).turns[0].replies] == ["one two three!"] * 2


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        [{"instruction": "q", "output": "a"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    ],
)
def test_training_data_can_be_loaded(record):
    (turn,) = load_chat(json.dumps(record).encode()).turns
    assert (turn.question, turn.replies[0].text) == ("q", "a")


GOOD = {"messages": [{"role": "user", "content": "q"}]}
BAD_FILES = {
    b"\xff\xfe": "UTF-8",
    b"{": "JSON",
    b"": "JSON",
    b"[" * 100_000: "JSON",
    b"[]": "conversation",
    b'[{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a"}]': "one conversation.*a list of 2",
    b'"text"': "conversation",
    b"{}": "messages",
    b'{"messages": []}': "turns",
    b'{"messages": [1]}': "turn",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "Unicode",
    b'{"messages": [{"role": "system", "content": "s"}]}': "take turns",
    b'{"messages": [{"role": "root", "content": "s"}]}': "role",
    b'{"messages": [{"role": "assistant", "content": "s"}]}': "take turns",
    b'{"messages": [{"role": "user", "content": "s"}, {"role": "user", "content": "s"}]}': "take turns",
    json.dumps({**GOOD, "settings": {"temperature": "hot"}}).encode(): "temperature",
    json.dumps({**GOOD, "settings": {"temperature": True}}).encode(): "temperature",
    json.dumps({**GOOD, "settings": {"top_p": 7}}).encode(): "top_p",
    json.dumps({**GOOD, "settings": {"seed": float("nan")}}).encode(): "seed",
    json.dumps({**GOOD, "settings": {"gpus": 1}}).encode(): "gpus",
    json.dumps({**GOOD, "settings": [1]}).encode(): "settings",
    json.dumps({**GOOD, "compared": [{"model": "n"}]}).encode(): "compared",
    json.dumps({**GOOD, "compared": 3}).encode(): "compared",
}


@pytest.mark.parametrize("data", BAD_FILES, ids=lambda data: data[:60].decode("latin-1"))
def test_bad_files_are_refused_with_a_reason(data):
    with pytest.raises(InputError, match=BAD_FILES[data]):
        load_chat(data)


# ---------------------------------------------------------------- what is shown


def test_texts_are_in_both_languages():
    names = lambda text: sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)  # noqa: E731
    for chinese, english in TEXTS.values():
        assert names(chinese) == names(english)
        assert not re.search("[\u4e00-\u9fff]", english)
    assert set(SETTINGS) <= set(TEXTS)


def test_an_answer_is_described(engine):
    reply = Reply(
        "x", "length", 42, num_prompt_tokens=312, num_cached_tokens=280, num_tokens=50, seconds=2.0, first_seconds=0.25
    )
    text = describe_reply(reply, {"drafted": 40, "accepted": 30}, "en")
    for part in ("50 tokens", "25.0 tokens/s", "0.25 s", "312", "280 cached", "75%", "30/40", "seed 42", "limit"):
        assert part in text, part
    assert "draft" not in describe_reply(reply, {"running": 1}, "en")
    assert describe_reply(Reply("", "cancelled"), {}, "zh") == translate("stopped", "zh")
    assert describe_reply(Reply("loaded", "stop"), {}, "zh") == ""


def test_the_context_is_described():
    reply = Reply(num_prompt_tokens=300, num_tokens=100, num_dropped=4)
    text, share = describe_context([reply], [1000], "en")
    assert share == 0.4 and "400 of 1000" in text and "600 left" in text and "4 oldest" in text
    assert describe_context([], [1000], "zh")[1] == 0.0
    small, share = describe_context([reply, reply], [1000, 500], "en")
    assert share == 0.8 and "400 of 500" in small, "the fuller one of two models"
    assert describe_context([reply], [None], "en")[1] == 0.0


def test_turns_of_one_conversation_are_not_another_s():
    assert Conversation().turns is not Conversation().turns and Turn("a").replies is not Turn("a").replies


@pytest.mark.slow
def test_conversations_bring_in_no_gradio():
    """The command line's chat has them too, where nobody needs a browser."""
    code = "import sys, utils.web.chat, utils.web.saved_chats; assert 'gradio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, check=True)
