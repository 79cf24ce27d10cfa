"""The server around a stand-in engine whose answers the tests write, token by token."""

import asyncio
import dataclasses
import json
import logging
import threading
import time

import httpx
import openai
import pytest
import torch

from support.tokenizers import TOOL_TEMPLATE
from utils.core.arguments import GenerationArguments
from utils.core.errors import InputError
from utils.generation.engine import Answer, Delta, Engine
from utils.generation.sampling import TokenLogprob
from utils.serving.app import create_app
from utils.serving.arguments import ServingArguments, load_api_keys
from utils.serving.queue import RequestStream
from utils.serving.replies import TokenNames, VisibleTokens
from utils.serving.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import encode_text, load_tokenizer

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
LOOP = [
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "21"},
]


class StandIn(Engine):
    """An engine that says what a test lets it say; with `words` it says them by itself."""

    name = "stand-in"

    def __init__(self, tokenizer, words=(), context=512, template=CHAT_TEMPLATES["alpaca-2"]):
        super().__init__(tokenizer, template, context, ["default", "other"], 8)
        self.words = words
        self.requests, self.answers = [], []

    def submit(self, request, on_delta=None):
        self.check(request)
        answer = Answer(len(request.prompt), on_delta)
        self.requests.append(request)
        self.answers.append(answer)
        for number, word in enumerate(self.words, 1):
            answer.push(Delta(word, (5,), finish_reason="stop" if number == len(self.words) else None))
        return answer

    def embed(self, prompts):
        return torch.tensor([[len(prompt), 1.0] for prompt in prompts])

    def statistics(self):
        return {"running": 0, "waiting": 0, "steps": 7}

    def close(self):
        pass


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer_folder):
    return load_tokenizer(base_tokenizer_folder)


@pytest.fixture
def engine(tokenizer):
    return StandIn(tokenizer)


@pytest.fixture
def speaker(tokenizer):
    """An engine that answers at once."""
    return StandIn(tokenizer, ["Hi", " you"])


def client(engine, api_keys=(), defaults=None, **settings):
    app = create_app(engine, ServingArguments(**settings), defaults, api_keys=api_keys)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=30)


def post(engine, body, path=CHAT, headers=None, **settings):
    async def send():
        async with client(engine, **settings) as http:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await http.post(
                path, content=content, headers={"content-type": "application/json"} | (headers or {})
            )

    return asyncio.run(send())


async def until(condition):
    """Let the event loop work until something holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen within 5 seconds")


def events(response):
    """The data of a stream's events, and whether it ended as OpenAI's do."""
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    return [json.loads(part) for part in parts if part != "[DONE]"], parts[-1] == "[DONE]"


# ---------------------------------------------------------------- requests


REFUSED = [
    ({}, 400, "messages", "missing_required_parameter"),
    ([], 400, None, None),
    ("text", 400, None, None),
    (b"{", 400, None, None),
    (b"", 400, None, None),
    (b"\xff\xfe", 400, None, None),
    (b"[" * 100_000, 400, None, None),
    (b'{"messages": "\\ud800"}', 400, None, None),
    (b'{"messages": "x", "temperature": NaN}', 400, None, None),
    (b'{"messages": "x", "seed": ' + b"9" * 5000 + b"}", 400, None, None),
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({"messages": 5}, 400, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        400,
        "messages[0].content[1].type",
        None,
    ),
    (HELLO | {"temperature": 2.5}, 400, "temperature", "invalid_value"),
    (HELLO | {"temperature": "1"}, 400, "temperature", "invalid_value"),
    (HELLO | {"top_p": -0.1}, 400, "top_p", "invalid_value"),
    (HELLO | {"n": 0}, 400, "n", "invalid_value"),
    (HELLO | {"n": 129}, 400, "n", "invalid_value"),
    (HELLO | {"n": 73}, 400, None, None),
    (HELLO | {"n": True}, 400, "n", "invalid_value"),
    (HELLO | {"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    (HELLO | {"max_tokens": 1.5}, 400, "max_tokens", "invalid_value"),
    (HELLO | {"stop": ""}, 400, "stop", "invalid_value"),
    (HELLO | {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "invalid_value"),
    (HELLO | {"stop": ["a", 1]}, 400, "stop[1]", "invalid_value"),
    (HELLO | {"seed": 2**63}, 400, "seed", "invalid_value"),
    (HELLO | {"logit_bias": {"5": 101}}, 400, "logit_bias.5", "invalid_value"),
    (HELLO | {"logit_bias": {"4000": 1}}, 400, "logit_bias", None),
    (HELLO | {"logit_bias": {"cat": 1}}, 400, "logit_bias.cat", "invalid_value"),
    (HELLO | {"top_logprobs": 3}, 400, "top_logprobs", None),
    (HELLO | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
    (HELLO | {"stream_options": {"include_usage": True}}, 400, "stream_options", None),
    (HELLO | {"temprature": 1}, 400, "temprature", None),
    (HELLO | {"model": "nothing"}, 404, "model", "model_not_found"),
    (HELLO | {"model": "../../etc/passwd"}, 404, "model", "model_not_found"),
    (HELLO | {"num_beams": 2, "stream": True}, 400, "num_beams", None),
    (HELLO | {"modalities": ["text", "audio"]}, 400, "modalities", None),
    (HELLO | {"functions": [{"name": "f"}]}, 400, "functions", None),
    (HELLO | {"web_search_options": {}}, 400, "web_search_options", None),
    (HELLO | {"moderation": {}}, 400, "moderation", None),
    (HELLO | {"tool_choice": "required"}, 400, "tool_choice", None),
    (
        HELLO | {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        400,
        "tool_choice",
        None,
    ),
    (HELLO | {"tools": [TOOL], "response_format": {"type": "json_object"}}, 400, "response_format", None),
    (HELLO | {"response_format": {"type": "xml"}}, 400, "response_format.type", "invalid_value"),
    (
        HELLO | {"response_format": {"type": "json_schema"}},
        400,
        "response_format.json_schema",
        "missing_required_parameter",
    ),
    (
        HELLO | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "catt"}}}},
        400,
        "response_format.json_schema.schema",
        None,
    ),
    ({"messages": "many words " * 500}, 400, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": ""}] * 513}, 400, "messages", "invalid_value"),
    (HELLO | {f"field{number}": 1 for number in range(1001)}, 400, None, None),
    (HELLO | {"logit_bias": {f"x{number}": "y" for number in range(1001)}}, 400, "logit_bias", None),
    (
        HELLO
        | {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"enum": list(range(20_000))}},
            }
        },
        400,
        "response_format.json_schema.schema",
        None,
    ),
]


def test_large_mistakes_are_found_quickly(speaker):
    """The event loop waits meanwhile: a megabyte of mistakes may not take seconds."""
    many = 60_000
    for body in (
        HELLO | {f"field{number}": 1 for number in range(many)},
        HELLO | {"logit_bias": {f"x{number}": "y" for number in range(many)}},
        {"messages": [{"role": "user", "content": [{"type": 1}] * many}]},
        {"messages": [5] * many},
        HELLO | {"stop": [1] * many},
        HELLO | {"tools": [1] * many},
    ):
        began = time.process_time()
        assert post(speaker, body, max_body_bytes=4 << 20).status_code == 400
        assert time.process_time() - began < 1.5


@pytest.mark.parametrize(("body", "status", "param", "code"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_chat_requests_are_named(speaker, body, status, param, code):
    response = post(speaker, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert not speaker.requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": [4000]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({"prompt": "many words " * 500}, "prompt"),
        ({"prompt": ["short", "many words " * 500]}, "prompt"),
    ],
    ids=str,
)
def test_bad_completion_requests_are_named(speaker, body, param):
    response = post(speaker, body, "/v1/completions")
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert not speaker.requests


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": ""}, 200, None),  # the BOS token alone
        ({"input": []}, 400, "input"),
        ({"input": ["a"] * 2049}, 400, "input"),
        ({"input": [4000]}, 400, "input"),
        ({"input": "many words " * 500}, 400, "input"),
        ({"input": "a", "encoding_format": "binary"}, 400, "encoding_format"),
        ({"input": "a", "dimensions": 3}, 400, "dimensions"),
        ({"input": "a", "dimensions": 2}, 200, None),
        ({"input": "a", "model": "other"}, 400, "model"),
        ({"input": "a", "model": "nothing"}, 404, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_embedding_requests(speaker, body, status, param):
    response = post(speaker, body, "/v1/embeddings")
    assert response.status_code == status
    assert status == 200 or response.json()["error"]["param"] == param


def test_context_error_has_the_numbers(speaker):
    prompt = [7] * 600
    response = post(speaker, {"prompt": prompt}, "/v1/completions")
    message = response.json()["error"]["message"]
    assert "512" in message and "600" in message
    # One token below the context there is room for one new one, and at the context none.
    assert post(speaker, {"prompt": [7] * 511}, "/v1/completions").status_code == 200
    assert speaker.requests[-1].settings.max_new_tokens == 1
    assert post(speaker, {"prompt": [7] * 512}, "/v1/completions").status_code == 400
    assert post(speaker, {"prompt": [7] * 64}, "/v1/completions", max_context=64).status_code == 400


def test_every_field_of_the_official_client_is_known():
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    for params, model in (
        (chat_create_params.CompletionCreateParamsBase, ChatRequest),
        (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
        (embedding_create_params.EmbeddingCreateParams, EmbeddingRequest),
    ):
        unknown = set(params.__annotations__) - set(model.model_fields)
        assert not unknown


def test_fields_reach_the_engine(speaker):
    body = HELLO | {"temperature": 0.5, "top_p": 0, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "n": 2}
    body |= {"presence_penalty": 0.3, "frequency_penalty": -0.4, "stop": "END", "seed": 11, "logit_bias": {"7": -3}}
    body |= {"max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2, "user": "u", "store": False}
    assert post(speaker, body).status_code == 200
    first, second = speaker.requests
    settings = dataclasses.asdict(first.settings)
    expected = {"temperature": 0.5, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3}
    expected |= {"frequency_penalty": -0.4, "stop": ["END"], "max_new_tokens": 9}
    assert {name: settings[name] for name in expected} == expected and 0 < settings["top_p"] < 1e-3
    assert (first.seed, second.seed) == (11, 12)  # each answer its own
    assert first.logit_bias == {7: -3.0} and first.top_logprobs == 2 and first.strip


def test_fields_left_out_take_the_servers_settings(speaker):
    defaults = GenerationArguments(temperature=0.7, max_new_tokens=13, stop=["###"], top_k=5)
    assert post(speaker, HELLO | {"temperature": None}, defaults=defaults).status_code == 200
    assert speaker.requests[0].settings == defaults
    assert post(speaker, HELLO, defaults=defaults).status_code == 200
    assert speaker.requests[0].seed != speaker.requests[1].seed, "without a seed answers differ"


def test_messages_in_all_their_forms(speaker):
    def prompt(messages):
        assert post(speaker, {"messages": messages}).status_code == 200
        return speaker.requests[-1].prompt

    plain = prompt([{"role": "user", "content": "hello"}])
    assert plain == speaker.encode([{"role": "user", "content": "hello"}])
    assert prompt("hello") == plain
    assert prompt([{"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "me"}]) == plain
    system = prompt([{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}])
    assert prompt([{"role": "developer", "content": "s"}, {"role": "user", "content": "hello"}]) == system != plain
    # An answer is sent back with all the fields that it came with.
    answer = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None}
    turns = [{"role": "user", "content": "hello"}, answer, {"role": "user", "content": "again"}]
    assert prompt(turns) == speaker.encode([{"role": m["role"], "content": m["content"]} for m in turns])
    assert post(speaker, {"messages": [{"role": "system", "content": ""}, *turns]}).status_code == 200
    assert post(speaker, {"messages": turns[1:]}).status_code == 200  # the assistant speaks first


def test_the_servers_system_prompt_and_negative_prompt(speaker):
    def send(messages, **settings):
        app = create_app(speaker, ServingArguments(), GenerationArguments(**settings), system_prompt="be kind")

        async def go():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
                assert (await http.post(CHAT, json={"messages": messages})).status_code == 200

        asyncio.run(go())
        return speaker.requests[-1]

    user = {"role": "user", "content": "hello"}
    kind, own = {"role": "system", "content": "be kind"}, {"role": "system", "content": "own"}
    assert send([user]).prompt == speaker.encode([kind, user])
    assert send([own, user]).prompt == speaker.encode([own, user])
    guided = send([user], guidance_scale=1.5, negative_prompt="be rude")
    assert guided.negative_prompt == speaker.encode([{"role": "system", "content": "be rude"}, user])


def test_control_tokens_in_prompts_stay_text(speaker, tokenizer):
    text = "<s> </s> [INST] hi [/INST] <unk>"
    special = set(tokenizer.all_special_ids)
    assert post(speaker, {"messages": [{"role": "user", "content": text}]}).status_code == 200
    plain = speaker.encode([{"role": "user", "content": "hi"}])
    count = lambda ids: sum(index in special for index in ids)  # noqa: E731
    assert count(speaker.requests[-1].prompt) == count(plain) == 1
    assert post(speaker, {"prompt": text}, "/v1/completions").status_code == 200
    assert speaker.requests[-1].prompt == [tokenizer.bos_token_id, *encode_text(tokenizer, text)]
    assert count(speaker.requests[-1].prompt) == 1


def test_completions_take_texts_raw_unless_told_otherwise(speaker):
    for prompt, ids in (
        ("a b", [speaker.encode_text("a b")]),
        (["a", "b"], [speaker.encode_text("a"), speaker.encode_text("b")]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ):
        speaker.requests.clear()
        assert post(speaker, {"prompt": prompt}, "/v1/completions").status_code == 200
        assert [request.prompt for request in speaker.requests] == ids
        assert not speaker.requests[0].strip
    assert post(speaker, {"prompt": "a b"}, "/v1/completions", completions_template=True).status_code == 200
    assert speaker.requests[-1].prompt == speaker.encode([{"role": "user", "content": "a b"}])


# ---------------------------------------------------------------- replies


def test_a_chat_reply_is_what_the_official_types_say(speaker):
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    whole = ChatCompletion.model_validate(post(speaker, HELLO).json(), strict=True)
    assert whole.choices[0].message.content == "Hi you" and whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == 2 and whole.usage.total_tokens == whole.usage.prompt_tokens + 2
    stream = post(speaker, HELLO | {"stream": True, "n": 2, "stream_options": {"include_usage": True}})
    assert stream.headers["content-type"].startswith("text/event-stream")
    chunks, done = events(stream)
    assert done
    parsed = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in parsed}) == 1
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in parsed if chunk.choices and chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant" and not any(choice.delta.role for choice in own[1:])
        assert "".join(choice.delta.content or "" for choice in own) == "Hi you"
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert parsed[-1].choices == [] and parsed[-1].usage.completion_tokens == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    chunks, _ = events(post(speaker, HELLO | {"stream": True}))
    assert not any("usage" in chunk for chunk in chunks)


def test_a_completion_reply_is_what_the_official_types_say(speaker):
    from openai.types import Completion

    body = {"prompt": ["one", "two"], "n": 2, "echo": True}
    whole = Completion.model_validate(post(speaker, body, "/v1/completions").json(), strict=True)
    assert [choice.text for choice in whole.choices] == ["oneHi you", "oneHi you", "twoHi you", "twoHi you"]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    prompts = len(speaker.encode_text("one")) + len(speaker.encode_text("two"))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompts, 8)
    chunks, done = events(post(speaker, body | {"stream": True}, "/v1/completions"))
    assert done
    texts = {index: "" for index in range(4)}
    for chunk in chunks:
        texts[Completion.model_validate(chunk).choices[0].index] += chunk["choices"][0]["text"]
    assert list(texts.values()) == ["oneHi you", "oneHi you", "twoHi you", "twoHi you"]


def test_best_of_returns_the_likeliest(engine):
    async def go():
        async with client(engine) as http:
            body = {"prompt": "a", "n": 2, "best_of": 4}
            reply = asyncio.create_task(http.post("/v1/completions", json=body))
            await until(lambda: len(engine.answers) == 4)
            # Mean log-probabilities -2, -1, -3, -1.5: the second has the lowest sum but the highest mean.
            for answer, (count, logprob) in zip(
                engine.answers, [(1, -2.0), (9, -1.0), (1, -3.0), (2, -1.5)], strict=True
            ):
                logprobs = tuple(TokenLogprob(5, logprob) for _ in range(count))
                answer.push(Delta(f"{logprob}", (5,) * count, logprobs, "length"))
            return (await reply).json()

    reply = asyncio.run(go())
    assert [choice["text"] for choice in reply["choices"]] == ["-1.0", "-1.5"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert reply["choices"][0]["logprobs"] is None, "they were not asked for"
    assert reply["usage"]["completion_tokens"] == 13


def push_tokens(names, text_tokens, text, **options):
    visible = VisibleTokens(names)
    return visible.push(text, [TokenLogprob(token, -1.0) for token in text_tokens], **options)


def test_every_token_is_shown_where_it_stands(tokenizer):
    token_bytes = [b"", b"a", b" b", b"\xe4", b"\xbd\xa0", b"  ", b"STOP", b"\n"]
    names = TokenNames(tokenizer, token_bytes)

    def shown(tokens, text):
        return [(place, token.token_id) for place, token in push_tokens(names, tokens, text, last=True)]

    assert shown([1, 2, 0], "a b") == [(0, 1), (1, 2), (3, 0)]  # the end token too
    assert shown([5, 2, 1, 7], "ba") == [(0, 5), (0, 2), (1, 1), (2, 7)]  # stripped space, at either end
    assert shown([2, 1], " ba") == [(0, 2), (2, 1)]  # space that was not stripped counts
    assert shown([1, 6], "a") == [(0, 1), (1, 6)]  # a stop text
    assert shown([5], "") == [(0, 5)] and shown([0], "") == [(0, 0)]  # an answer without text
    assert shown([3, 4, 1], "你a") == [(0, 3), (1, 4), (1, 1)]  # parts of a character
    visible = VisibleTokens(names)
    assert visible.push("", [TokenLogprob(3, -1.0)]) == []  # half a character has no text yet
    assert [token.token_id for _, token in visible.push("你", [TokenLogprob(4, -1.0)])] == [3, 4]
    assert names.name(3) == "bytes:\\xe4" and names.top(4, float("-inf"))["logprob"] == -9999.0


def test_a_tool_call_is_streamed_as_one(tokenizer):
    engine = StandIn(tokenizer, ['{"name": "weather", ', '"arguments": {"city": "Bern"}}'])
    for stream in (False, True):
        reply = post(engine, HELLO | {"tools": [TOOL], "stream": stream})
        if stream:
            choices = [chunk["choices"][0] for chunk in events(reply)[0]]
            calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
            assert not any(choice["delta"].get("content") for choice in choices)
            assert calls[0]["index"] == 0
            reason = choices[-1]["finish_reason"]
        else:
            choice = reply.json()["choices"][0]
            calls, reason = choice["message"]["tool_calls"], choice["finish_reason"]
            assert choice["message"]["content"] is None
        assert len(calls) == 1 and reason == "tool_calls"
        assert calls[0]["function"]["name"] == "weather"
        assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Bern"}


def test_tools_stand_in_the_prompt_as_in_training_data(speaker):
    from utils.text.conversations import read_conversation

    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "21"},
    ]
    assert post(speaker, {"messages": messages, "tools": [TOOL]}).status_code == 200
    trained = {
        "system": "s",
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [
            {"from": "human", "value": "?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "北京"}}'},
            {"from": "observation", "value": "21"},
        ],
    }
    assert speaker.requests[-1].prompt == speaker.encode(read_conversation(trained, "here"))
    assert speaker.requests[-1].constraint is not None
    assert post(speaker, HELLO | {"tools": [TOOL], "tool_choice": "none"}).status_code == 200
    assert speaker.requests[-1].constraint is None


def test_a_template_that_knows_tools_writes_them_itself(tokenizer):
    """transformers' own rendering is the oracle."""
    engine = StandIn(tokenizer, ["x"], template=TOOL_TEMPLATE)
    tools = [TOOL | {"function": {"name": "now", "description": "time", "parameters": {}, "strict": True}}, TOOL]
    parsed = [{**LOOP[1], "tool_calls": [CALL | {"function": {"name": "weather", "arguments": {"city": "北京"}}}]}]
    for messages, shown in ((LOOP[:1], LOOP[:1]), (LOOP, [LOOP[0], *parsed, LOOP[2]])):
        assert post(engine, {"messages": messages, "tools": tools}).status_code == 200
        expected = tokenizer.apply_chat_template(
            shown, tools=tools, chat_template=TOOL_TEMPLATE, add_generation_prompt=True, tokenize=True
        )["input_ids"]
        assert engine.requests[-1].prompt == expected and engine.requests[-1].constraint is None


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, CHAT_TEMPLATES["alpaca-2"]])
def test_no_content_and_an_empty_one_are_the_same_beside_calls(tokenizer, template):
    engine = StandIn(tokenizer, ["x"], template=template)
    for content in (None, "", []):
        messages = [LOOP[0], LOOP[1] | {"content": content}, LOOP[2]]
        assert post(engine, {"messages": messages, "tools": [TOOL]}).status_code == 200
    assert engine.requests[0].prompt == engine.requests[1].prompt == engine.requests[2].prompt


def test_several_calls_of_an_answer(tokenizer):
    """`parallel_tool_calls` false: one."""
    words = ["Let me", " see.\n", "<tool", '_call>\n{"name": "wea', 'ther", "arguments": {"city": "Be', 'rn"}}']
    words += ["\n</tool_call>\n<tool_call>\n", '{"name": "now", "arguments": {}}\n</tool_call>']
    engine = StandIn(tokenizer, words, template=TOOL_TEMPLATE)
    for parallel, names in ((True, ["weather", "now"]), (False, ["weather"])):
        body = HELLO | {"tools": [TOOL], "parallel_tool_calls": parallel}
        choice = post(engine, body).json()["choices"][0]
        assert choice["message"]["content"] == "Let me see." and choice["finish_reason"] == "tool_calls"
        whole = [call["function"] for call in choice["message"]["tool_calls"]]
        assert [call["name"] for call in whole] == names and json.loads(whole[0]["arguments"]) == {"city": "Bern"}
        choices = [chunk["choices"][0] for chunk in events(post(engine, body | {"stream": True}))[0]]
        deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
        first = [delta for delta in deltas if "id" in delta]
        assert [delta["function"]["name"] for delta in first] == names and len({d["id"] for d in first}) == len(names)
        assert [delta["index"] for delta in first] == list(range(len(names)))
        arguments = "".join(delta["function"]["arguments"] for delta in deltas if delta["index"] == 0)
        assert json.loads(arguments) == {"city": "Bern"}
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Let me see."
        assert choices[-1]["finish_reason"] == "tool_calls"


def test_calls_that_must_come_are_held_to_the_templates_form(tokenizer):
    engine = StandIn(tokenizer, ["x"], template=TOOL_TEMPLATE)
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        assert post(engine, HELLO | {"tools": [TOOL], "tool_choice": choice}).status_code == 200
        allowed = engine.requests[-1].constraint.allowed().nonzero()[:, 0].tolist()
        assert {engine.token_bytes[index].lstrip()[:1] for index in allowed} <= {b"<", b""}
    unread = TOOL_TEMPLATE.replace('"arguments"', '"input"').replace("tool_call>", "calling>")
    response = post(StandIn(tokenizer, ["x"], template=unread), HELLO | {"tools": [TOOL]})
    assert response.status_code == 400 and response.json()["error"]["param"] == "tools"


# ---------------------------------------------------------------- answers that were begun


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, CHAT_TEMPLATES["alpaca-2"], CHAT_TEMPLATES["mixtral"]])
def test_an_answer_that_was_begun_is_gone_on_with(tokenizer, template):
    """transformers' continue_final_message is the oracle."""
    engine = StandIn(tokenizer, [" 42", " \n"], template=template)
    messages = [*HELLO["messages"], {"role": "assistant", "content": "The answer is"}]
    reply = post(engine, {"messages": messages})
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, continue_final_message=True)
    assert text.endswith("The answer is")
    assert engine.requests[-1].prompt == engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert engine.requests[-1].strip is False and reply.json()["choices"][0]["message"]["content"] == " 42 \n"
    # Where nothing is begun, the answer is a new one.
    post(engine, {"messages": [*HELLO["messages"], {"role": "assistant", "content": ""}]})
    assert engine.requests[-1].prompt == engine.encode(HELLO["messages"])


def test_what_cannot_be_gone_on_with_is_refused(tokenizer):
    engine = StandIn(tokenizer, ["x"])
    begun = [*HELLO["messages"], {"role": "assistant", "content": '{"a"'}]
    for body in (
        {"messages": LOOP[:2]},  # a call without its result
        {"messages": begun, "response_format": {"type": "json_object"}},
        {"messages": begun, "tools": [TOOL], "tool_choice": "required"},
    ):
        response = post(engine, body)
        assert response.status_code == 400 and response.json()["error"]["param"] == "messages"
    hiding = "{% for m in messages %}{% if '{' not in m.content %}{{ m.content }}{% endif %}{% endfor %}"
    response = post(StandIn(tokenizer, ["x"], template=hiding), {"messages": begun})
    assert response.status_code == 400 and "leaves out the last message" in response.json()["error"]["message"]


# ---------------------------------------------------------------- who may come in, and with how much


def test_keys(speaker):
    async def go():
        async with client(speaker, api_keys=["first-key", "钥匙"]) as http:
            for headers, status in (
                ({}, 401),
                ({"Authorization": "Bearer wrong"}, 401),
                ({"Authorization": "Bearer first-ke"}, 401),
                ({"Authorization": "Basic first-key"}, 401),
                ({"Authorization": "first-key"}, 401),
                ({"Authorization": "Bearer first-key"}, 200),
                ({"Authorization": "bearer first-key "}, 200),
                ({"Authorization": "Bearer 钥匙".encode()}, 200),
            ):
                for path in ("/v1/models", "/metrics", "/openapi.json"):
                    response = await http.get(path, headers=headers)
                    assert response.status_code == status, (headers, path)
                if status == 401:
                    assert response.json()["error"]["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"] == "Bearer"
            assert (await http.get("/health")).status_code == 200
            assert (await http.post(CHAT, content=b"x" * 100)).status_code == 401

    asyncio.run(go())


def test_every_key_is_compared_in_constant_time(speaker, monkeypatch):
    import hmac

    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda *pair: compared.append(pair[1]) or compare(*pair))
    keys = ["one", "two", "three"]
    post(speaker, HELLO, headers={"Authorization": "Bearer one"}, api_keys=keys)
    assert compared == [key.encode() for key in keys]


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("API_KEYS", raising=False)
    assert load_api_keys(None) == []
    file = tmp_path / "keys.txt"
    file.write_text("# ours\nalpha  # Anna's\n\nbeta\n", encoding="utf-8")
    monkeypatch.setenv("API_KEYS", "gamma, alpha,")
    assert load_api_keys(str(file)) == ["gamma", "alpha", "beta"]
    file.write_text("# none yet\n", encoding="utf-8")
    with pytest.raises(InputError, match="no key"):
        load_api_keys(str(file))
    with pytest.raises(InputError, match="no such file"):
        load_api_keys(str(tmp_path / "absent"))


def test_missing_packages_are_named(monkeypatch):
    import openai_api_server

    monkeypatch.setattr(openai_api_server, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(InputError, match=r"needs no_such_package: pip install -r requirements-serve\.txt"):
        openai_api_server.check_packages()


def test_settings_are_checked_together():
    with pytest.raises(InputError) as problems:
        ServingArguments(port=70000, max_batch_size=0, lora_models=["a"], served_model_name=["x", "x"])
    assert len(str(problems.value).splitlines()) == 4
    assert ServingArguments(lora_models=["a=b=c"]).adapters == {"a": "b=c"}


def test_large_bodies_are_refused(speaker):
    limit = 2000
    frame = len(json.dumps({"messages": ""}))

    async def in_parts():
        for _ in range(300):
            yield b"x" * 1000

    async def go():
        async with client(speaker, max_body_bytes=limit, defaults=GenerationArguments(max_new_tokens=4)) as http:
            fits = json.dumps({"messages": " " * (limit - frame)}).encode()
            assert len(fits) == limit
            headers = {"content-type": "application/json"}
            assert (await http.post(CHAT, content=fits, headers=headers)).status_code != 413
            for content in (fits + b" ", in_parts()):
                response = await http.post(CHAT, content=content, headers=headers)
                assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"
                assert str(limit) in response.json()["error"]["message"]

    asyncio.run(go())


def test_a_body_that_never_arrives_is_given_up(speaker, monkeypatch):
    monkeypatch.setattr("utils.serving.http.BODY_SECONDS", 0.05)

    async def never():
        yield b"{"
        await asyncio.sleep(30)

    async def go():
        async with client(speaker) as http:
            response = await http.post(CHAT, content=never(), headers={"content-type": "application/json"})
            assert response.status_code == 408 and response.json()["error"]["code"] == "timeout"

    asyncio.run(go())


def test_browsers_of_other_sites_are_let_in_only_where_named(speaker):
    async def go(**settings):
        async with client(speaker, api_keys=["k"], **settings) as http:
            asked = {"Origin": "http://site", "Access-Control-Request-Method": "POST"}
            preflight = await http.options(CHAT, headers=asked)
            reply = await http.post(CHAT, json=HELLO, headers={"Origin": "http://site", "Authorization": "Bearer k"})
            refused = await http.post(CHAT, json=HELLO, headers={"Origin": "http://site"})
            name = "access-control-allow-origin"
            return preflight.status_code, [response.headers.get(name) for response in (preflight, reply, refused)]

    assert asyncio.run(go())[1] == [None, None, None]
    assert asyncio.run(go(cors_origins=["http://site"])) == (200, ["http://site"] * 3)
    assert asyncio.run(go(cors_origins=["http://elsewhere"]))[1] == [None, None, None]


# ---------------------------------------------------------------- models, health, metrics, log


def test_models_by_name(speaker):
    async def go():
        async with client(speaker, served_model_name=["org/main", "alias"]) as http:
            listed = (await http.get("/v1/models")).json()
            assert [model["id"] for model in listed["data"]] == ["org/main", "alias", "other"]
            assert (await http.get("/v1/models/org/main")).json()["id"] == "org/main"
            for name in ("default", "nothing", "..%2f..%2fetc%2fpasswd", "%2e%2e", "alias/"):
                response = await http.get(f"/v1/models/{name}")
                assert response.status_code == 404
            assert response.json()["error"]["code"] == "model_not_found"
            for name, inner in (("org/main", "default"), ("alias", "default"), ("other", "other"), (None, "default")):
                reply = await http.post(CHAT, json=HELLO | {"model": name})
                assert speaker.requests[-1].model == inner
                assert reply.json()["model"] == (name or "org/main")

    asyncio.run(go())


def test_unknown_routes_and_methods_have_openais_errors(speaker):
    async def go():
        async with client(speaker) as http:
            for method, path, status in (("GET", "/v2", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405)):
                response = await http.request(method, path)
                assert response.status_code == status and "message" in response.json()["error"]
            assert response.headers["allow"] == "GET"

    asyncio.run(go())


def metric(text, name):
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name)))


def test_metrics_count_each_server_for_itself(speaker):
    async def go():
        async with client(speaker) as busy, client(speaker) as idle:
            await busy.post(CHAT, json=HELLO)
            await busy.post(CHAT, json={})
            await busy.get("/nothing/here")
            return (await busy.get("/metrics")).text, (await idle.get("/metrics")).text

    text, other = asyncio.run(go())
    assert metric(text, 'http_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert metric(text, 'http_requests_total{route="/v1/chat/completions",status="400"}') == 1
    assert metric(text, 'http_requests_total{route="other",status="404"}') == 1
    assert metric(text, 'generated_tokens_total{model="default"}') == 2
    assert metric(text, 'first_token_seconds_count{route="/v1/chat/completions"}') == 1
    assert metric(text, "answers_running") == 0 and metric(text, "engine_steps_total") == 7
    assert "http_requests_total{" not in other


def test_one_line_of_json_a_request_without_secrets(speaker, caplog):
    caplog.set_level(logging.INFO, logger="access")
    secret = {"messages": "my secret"}
    headers = {"X-Request-Id": "abc-1", "Authorization": "Bearer key-of-mine"}
    response = post(speaker, secret, headers=headers, api_keys=["key-of-mine"])
    assert response.headers["x-request-id"] == "abc-1"
    strange = post(speaker, {}, headers={"X-Request-Id": 'a"\\n b'})
    assert len(strange.headers["x-request-id"]) == 32, "not taken over"
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "access"]
    assert [line["status"] for line in lines] == [401 if "Authorization" not in headers else 200, 400]
    first = lines[0]
    assert (first["id"], first["route"], first["model"], first["new_tokens"]) == ("abc-1", CHAT, "default", 2)
    assert first["prompt_tokens"] > 5 and first["seconds"] >= first["first_token_seconds"] > 0
    assert "secret" not in caplog.text and "key-of-mine" not in caplog.text


def test_planning_does_not_hold_up_others(speaker):
    released = threading.Event()
    encode = speaker.encode
    speaker.encode = lambda messages, tools=None: released.wait(10) and encode(messages)

    async def go():
        async with client(speaker) as http:
            slow = asyncio.create_task(http.post(CHAT, json=HELLO))
            await asyncio.sleep(0.02)
            assert (await http.get("/health")).status_code == 200
            assert not slow.done()
            released.set()
            assert (await slow).status_code == 200

    asyncio.run(go())


# ---------------------------------------------------------------- load, time and failures


def test_requests_that_are_being_read_count_too(speaker):
    """Or a rush of them would all be tokenised before most of them were turned away."""
    released, encode, encoded = threading.Event(), speaker.encode, []
    speaker.encode = lambda messages, tools=None: encoded.append(1) or (released.wait(10) and encode(messages))

    async def go():
        async with client(speaker, max_batch_size=1, max_queue=1) as http:
            first = [asyncio.create_task(http.post(CHAT, json=HELLO)) for _ in range(2)]
            await until(lambda: encoded)
            await asyncio.sleep(0.05)
            rush = await asyncio.gather(*(http.post(CHAT, json=HELLO) for _ in range(20)))
            assert {response.status_code for response in rush} == {429} and len(encoded) == 1
            released.set()
            assert [(await task).status_code for task in first] == [200, 200]
            assert (await http.post(CHAT, json=HELLO)).status_code == 200

    asyncio.run(go())


def test_overload_is_turned_away_and_then_recovers(engine):
    async def go():
        async with client(engine, max_batch_size=2, max_queue=3) as http:
            waiting = [asyncio.create_task(http.post(CHAT, json=HELLO)) for _ in range(5)]
            await until(lambda: len(engine.answers) == 2)
            await until(lambda: len(asyncio.all_tasks()) > 5)
            await asyncio.sleep(0.05)
            for _ in range(20):
                response = await http.post(CHAT, json=HELLO)
                assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["type"] == "rate_limit_error"
            health = (await http.get("/health")).json()
            assert (health["running"], health["waiting"]) == (2, 3)
            assert len(engine.answers) == 2, "never more at once than asked for"
            for number in range(5):
                await until(lambda number=number: len(engine.answers) > number)
                engine.answers[number].push(Delta("x", (5,), finish_reason="stop"))
            assert [(await task).status_code for task in waiting] == [200] * 5
            late = asyncio.create_task(http.post(CHAT, json=HELLO))
            await until(lambda: len(engine.answers) == 6)
            engine.answers[5].push(Delta("x", (5,), finish_reason="stop"))
            assert (await late).status_code == 200

    asyncio.run(go())


def test_keys_take_turns(engine):
    async def go():
        async with client(engine, api_keys=["a", "b"], max_batch_size=1) as http:

            def ask(key, text):
                return asyncio.create_task(
                    http.post(CHAT, json={"messages": text}, headers={"Authorization": f"Bearer {key}"})
                )

            tasks = [ask("a", f"a{number}") for number in range(4)]
            await until(lambda: len(engine.answers) == 1)
            await asyncio.sleep(0.05)
            tasks.append(ask("b", "b0"))
            await asyncio.sleep(0.05)
            order = []
            for number in range(5):
                await until(lambda number=number: len(engine.answers) > number)
                order.append(engine.decode(engine.requests[number].prompt)[-30:])
                engine.answers[number].push(Delta("x", (5,), finish_reason="stop"))
            await asyncio.gather(*tasks)
            return ["b" if "b0" in text else "a" for text in order]

    assert asyncio.run(go()).index("b") == 2  # behind the one running and the one next in line


def test_a_request_that_takes_too_long_is_ended(engine):
    async def go():
        async with client(engine, request_timeout=0.2) as http:
            whole = await http.post(CHAT, json=HELLO)
            assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
            assert engine.answers[0].cancelled
            stream = asyncio.create_task(http.post(CHAT, json=HELLO | {"stream": True}))
            await until(lambda: len(engine.answers) == 2)
            engine.answers[1].push(Delta("so far", (5,)))
            response = await stream
            chunks, done = events(response)
            assert response.status_code == 200 and not done
            assert chunks[0]["choices"][0]["delta"]["content"] == "so far"
            assert chunks[-1]["error"]["code"] == "timeout"
            assert engine.answers[1].cancelled

    asyncio.run(go())


@pytest.mark.parametrize(("interval", "pieces"), [(60.0, ["a", "bcd"]), (0.0, ["a", "b", "c", "d"])])
def test_tokens_within_the_interval_come_in_one_event(engine, interval, pieces):
    async def go():
        async with client(engine, stream_interval=interval) as http:
            task = asyncio.create_task(http.post(CHAT, json=HELLO | {"stream": True}))
            await until(lambda: engine.answers)
            for text in "abcd":
                await asyncio.sleep(0.01)
                engine.answers[0].push(Delta(text, (5,), finish_reason="stop" if text == "d" else None))
            return events(await task)

    chunks, done = asyncio.run(go())
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert done and [delta["content"] for delta in deltas if delta.get("content")] == pieces


def test_a_token_within_the_interval_waits_for_its_end_only(engine):
    """Nothing comes after the second token: it is sent when the interval is over."""

    async def go():
        service = create_app(engine, ServingArguments()).state.service
        request = service.planner.chat(ChatRequest(**HELLO)).requests[0]
        answers = RequestStream(engine, service.queue, "client", [request], 0.02)
        texts = []
        for text in "ab":
            engine.answers[0].push(Delta(text, (5,)))
            texts += [delta.text for _, delta in await asyncio.wait_for(answers.read(), 5)]
        return texts

    assert asyncio.run(go()) == ["a", "b"]


def test_a_failing_engine_is_a_500_in_openais_form(engine, caplog):
    async def go():
        async with client(engine) as http:
            for stream in (False, True):
                task = asyncio.create_task(http.post(CHAT, json=HELLO | {"stream": stream}))
                count = len(engine.answers)
                await until(lambda count=count: len(engine.answers) > count)
                if stream:
                    engine.answers[-1].push(Delta("first", (5,)))
                    await asyncio.sleep(0.02)
                engine.answers[-1].push(Delta(error=RuntimeError("CUDA out of memory")))
                response = await task
                if stream:
                    error = events(response)[0][-1]["error"]
                else:
                    assert response.status_code == 500
                    error = response.json()["error"]
                assert error["type"] == "server_error" and "CUDA" not in error["message"]
            engine.submit = lambda *args: (_ for _ in ()).throw(InputError("this engine cannot do that"))
            refused = await http.post(CHAT, json=HELLO)
            assert refused.status_code == 400 and "cannot do that" in refused.json()["error"]["message"]
            engine.encode = lambda messages, tools=None: 1 / 0
            broken = await http.post(CHAT, json=HELLO)
            assert broken.status_code == 500 and broken.json()["error"]["code"] == "internal_error"
            health = (await http.get("/health")).json()
            assert (health["running"], health["waiting"]) == (0, 0)

    asyncio.run(go())
    assert "CUDA out of memory" in caplog.text and "ZeroDivisionError" in caplog.text


class Connection:
    """A connection to the application whose other end leaves, or reads slowly, when the test says so."""

    def __init__(self, app, body, path=CHAT):
        self.left, self.reading = asyncio.Event(), asyncio.Event()
        self.reading.set()
        self.messages = []
        self._body = json.dumps(body).encode()
        self._sent = False
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": headers, "client": ("10.0.0.1", 5), "http_version": "1.1", "scheme": "http"}
        self.task = asyncio.create_task(app(scope | {"root_path": "", "state": {}}, self._receive, self._send))

    async def _receive(self):
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        await self.reading.wait()
        self.messages.append(message)

    @property
    def text(self):
        return b"".join(message.get("body", b"") for message in self.messages).decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots_at_once(engine, stream, caplog):
    caplog.set_level(logging.INFO, logger="access")

    async def go():
        app = create_app(engine, ServingArguments(max_batch_size=2))
        queue = app.state.service.queue
        running = Connection(app, HELLO | {"stream": stream, "n": 2})
        await until(lambda: len(engine.answers) == 2)
        queued = Connection(app, HELLO | {"stream": stream, "n": 3})
        await until(lambda: queue.waiting == 3)
        if stream:
            engine.answers[0].push(Delta("x", (5,)))
            await until(lambda: running.messages)
        queued.left.set()
        await asyncio.wait_for(queued.task, 1)
        assert queue.waiting == 0 and not queued.messages
        running.left.set()
        await asyncio.wait_for(running.task, 1)
        assert all(answer.cancelled for answer in engine.answers)
        for answer in engine.answers:  # the engine lets go of them
            answer.push(Delta(finish_reason="cancelled"))
        await until(lambda: queue.running == 0)
        assert not app.state.service.active

    asyncio.run(go())
    statuses = [json.loads(record.getMessage())["status"] for record in caplog.records if record.name == "access"]
    assert statuses == [499, 499]


def test_a_client_that_leaves_while_embedding(engine):
    started, released = threading.Event(), threading.Event()
    calls = []

    def embed(prompts):
        calls.append(len(prompts))
        started.set()
        released.wait(10)
        return torch.zeros(len(prompts), 2)

    engine.embed = embed

    async def go():
        app = create_app(engine, ServingArguments(max_batch_size=2))
        connection = Connection(app, {"input": ["a"] * 10}, "/v1/embeddings")
        await until(started.is_set)
        connection.left.set()
        await asyncio.wait_for(connection.task, 1)
        released.set()
        await until(lambda: app.state.service.embedding_queue.running == 0)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            assert (await http.post("/v1/embeddings", json={"input": "b"})).status_code == 200

    asyncio.run(go())
    assert calls == [2, 1], "the other batches were never begun"


def test_an_engine_without_embeddings_says_so(speaker):
    def refuse(prompts):
        raise InputError("this engine gives no embeddings")

    speaker.embed = refuse
    response = post(speaker, {"input": "a"}, "/v1/embeddings")
    assert response.status_code == 400 and "no embeddings" in response.json()["error"]["message"]


def test_slow_readers_hold_up_nobody_and_get_everything(engine):
    async def go():
        app = create_app(engine, ServingArguments(max_batch_size=2))
        slow = Connection(app, HELLO | {"stream": True})
        slow.reading.clear()
        await until(lambda: len(engine.answers) == 1)
        for number in range(1000):
            engine.answers[0].push(Delta(f"{number} ", (5,)))
        engine.answers[0].push(Delta("end", (5,), finish_reason="stop"))
        await until(lambda: app.state.service.queue.running == 0)  # its slot is free although nothing was read
        other = Connection(app, HELLO)
        await until(lambda: len(engine.answers) == 2)
        engine.answers[1].push(Delta("x", (5,), finish_reason="stop"))
        await asyncio.wait_for(other.task, 1)
        assert other.messages[0]["status"] == 200
        slow.reading.set()
        await asyncio.wait_for(slow.task, 1)
        return slow

    slow = asyncio.run(go())
    assert len(slow.messages) < 10, "what had gathered came together"
    texts = [json.loads(part[6:]) for part in slow.text.split("\n\n") if part and "[DONE]" not in part]
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in texts)
    assert content == "".join(f"{number} " for number in range(1000)) + "end"


def test_a_reader_who_never_reads_is_given_up(engine):
    async def go():
        app = create_app(engine, ServingArguments(request_timeout=0.1))
        stuck = Connection(app, HELLO | {"stream": True})
        stuck.reading.clear()
        await until(lambda: len(engine.answers) == 1)
        engine.answers[0].push(Delta("x", (5,)))
        began = time.monotonic()
        await asyncio.wait_for(stuck.task, 5)
        assert time.monotonic() - began < 3 and engine.answers[0].cancelled

    asyncio.run(go())


def test_closing_lets_what_runs_end_and_sends_the_others_away(engine):
    async def go():
        app = create_app(engine, ServingArguments(max_batch_size=1))
        running = Connection(app, HELLO | {"stream": True})
        await until(lambda: len(engine.answers) == 1)
        waiting = Connection(app, HELLO)
        await until(lambda: app.state.service.queue.waiting == 1)
        app.state.service.close()
        await asyncio.wait_for(waiting.task, 1)
        late = Connection(app, HELLO)
        await asyncio.wait_for(late.task, 1)
        for refused in (waiting, late):
            assert refused.messages[0]["status"] == 503
            assert json.loads(refused.text)["error"]["code"] == "shutting_down"
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            health = await http.get("/health")
            assert health.status_code == 503 and health.json()["status"] == "shutting_down"
        engine.answers[0].push(Delta("to the end", (5,), finish_reason="stop"))
        await asyncio.wait_for(running.task, 1)
        assert "to the end" in running.text and running.text.endswith("data: [DONE]\n\n")

    asyncio.run(go())


def test_the_description_fits_what_is_sent(speaker):
    app = create_app(speaker, ServingArguments())
    described = app.openapi()
    assert "422" not in described["paths"][CHAT]["post"]["responses"]
    assert set(described["paths"]) == {
        *("/v1/models", "/v1/models/{model}", CHAT, "/v1/completions", "/v1/embeddings", "/health", "/metrics")
    }
    assert openai.OpenAI(api_key="x", base_url="http://test/v1").base_url.path == "/v1/"
