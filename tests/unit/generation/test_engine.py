"""What all engines have in common: models by name, an end, and the conversation that guidance leads away from."""

import pytest

from utils.core.arguments import GenerationArguments
from utils.core.errors import InputError
from utils.generation.engine import Answer, Delta, Engine, Prompter, Request
from utils.text.tokenizer import load_tokenizer, token_surfaces

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer_folder):
    return load_tokenizer(base_tokenizer_folder)


class Echo(Engine):
    """Says the name of the model that was asked for, and the prompt."""

    def submit(self, request, on_delta=None):
        name = self._find_model(request)
        self._check_open()
        answer = Answer(len(request.prompt), on_delta)
        answer.push(Delta(f"{name} {list(request.prompt)}", finish_reason="stop"))
        return answer

    def embed(self, prompts):
        raise NotImplementedError

    def statistics(self):
        return {}

    def close(self):
        self._closed = True


def test_requests_name_a_model_and_are_answered_in_order(tokenizer):
    engine = Echo(tokenizer, None, 100, {"first": 0, "second": 1}, 2)
    settings = GenerationArguments()
    requests = [Request([1], settings, model="second"), Request([2], settings), Request([3], settings, model="first")]
    assert [answer.text for answer in engine.generate(requests)] == ["second [1]", "first [2]", "first [3]"]
    with pytest.raises(InputError, match="there is no model 'third'; there are first, second"):
        engine.submit(Request([1], settings, model="third"))
    engine.close()
    with pytest.raises(InputError, match="the engine is closed"):
        engine.submit(requests[0])


def test_an_engine_says_what_ends_answers_and_what_tokens_stand_for(tokenizer):
    engine = Echo(tokenizer, None, 100, ["one"], 1)
    assert engine.stop_ids == [tokenizer.eos_token_id] and list(engine.token_bytes) == list(token_surfaces(tokenizer))


def test_guidance_replaces_the_first_system_message_and_nothing_else(tokenizer):
    prompter = Prompter(tokenizer, TEMPLATE, None)
    guided = GenerationArguments(guidance_scale=1.5, negative_prompt="be rude")
    rude, kind = ({"role": "system", "content": text} for text in ("be rude", "be kind"))
    turns = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "later"},
        {"role": "user", "content": "b"},
    ]
    expected = prompter.encode([rude, *turns])
    assert prompter.encode_negative([kind, *turns], guided) == prompter.encode_negative(turns, guided) == expected
    assert prompter.encode_negative([kind, *turns], GenerationArguments()) is None
    assert prompter.encode_negative([], guided) == prompter.encode([rude])


def test_an_answer_can_be_waited_for_by_anyone_as_often_as_they_like(tokenizer):
    engine = Echo(tokenizer, None, 100, ["one"], 1)
    request = Request([1], GenerationArguments())
    answer = engine.submit(request)
    assert "".join(delta.text for delta in answer) == answer.wait().text == answer.wait().text == "one [1]"
    assert list(answer) == []
    told = []
    assert engine.submit(request, told.append).wait().text == told[0].text == "one [1]"


def test_what_went_wrong_is_raised_whenever_the_answer_is_waited_for():
    answer = Answer(1)
    answer.push(Delta("half"))
    answer.push(Delta(error=RuntimeError("out of memory")))
    for read in (list, Answer.wait, Answer.wait):
        with pytest.raises(RuntimeError, match="out of memory"):
            read(answer)
