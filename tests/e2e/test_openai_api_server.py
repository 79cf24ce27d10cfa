"""The server as its users meet it: the official client over HTTP, a real engine behind it, and the script itself."""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import httpx
import openai
import psutil
import pytest
import torch

from support.paths import SCRIPTS
from support.server import GREEDY, serving
from support.tokenizers import TOOL_TEMPLATE
from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.core.errors import InputError
from utils.generation.engine import Request
from utils.generation.loading import EnginePlan
from utils.generation.transformers_engine import TransformersEngine
from utils.serving.app import create_app
from utils.serving.arguments import ServingArguments

HELLO = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def engine(tiny_model_folder):
    engine = EnginePlan(InferenceArguments(model_name_or_path=str(tiny_model_folder))).load()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def live(engine):
    with serving(engine) as live:
        yield live


@pytest.fixture
def client(live):
    with live.client() as client:
        yield client


@pytest.fixture
def slow_steps(engine, monkeypatch):
    """A model that takes a while for each token, so that there is time to leave, wait and end."""
    forward = engine.model.forward

    def slow(*args, **kwargs):
        time.sleep(0.01)
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", slow)


@pytest.fixture
def endless(engine):
    """Fields of a request whose answer goes on to its length."""
    return {"logit_bias": {str(token): -100 for token in engine.stop_ids}, "max_tokens": 400}


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


# ---------------------------------------------------------------- the official client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")


def test_chat_gives_the_engines_own_answer(client, engine):
    settings = GenerationArguments(temperature=0, repetition_penalty=1.0, max_new_tokens=20)
    expected = engine.generate([Request(engine.encode(HELLO), settings)])[0]
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, **GREEDY)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage.prompt_tokens == expected.num_prompt_tokens
    assert whole.usage.completion_tokens == len(expected.token_ids)
    options = {"include_usage": True}
    stream = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_completion_tokens=20, stream=True, stream_options=options, **GREEDY
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == expected.text
    assert stream[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in stream}) == 1


def test_completions_continue_raw_text(client, engine):
    text = "The sea is"
    settings = GenerationArguments(temperature=0, repetition_penalty=1.0, max_new_tokens=12)
    expected = engine.generate([Request(engine.encode_text(text), settings, strip=False)])[0].text
    ids = engine.encode_text(text)
    for prompt in (text, [text], ids, [ids]):
        reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, **GREEDY)
        assert reply.choices[0].text == expected
    echoed = client.completions.create(model="tiny", prompt=text, echo=True, max_tokens=12, **GREEDY)
    assert echoed.choices[0].text == text + expected
    stream = client.completions.create(model="tiny", prompt=[text, "A"], max_tokens=12, stream=True, **GREEDY)
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts[0] == expected and texts[1]
    assert len(client.completions.create(model="tiny", prompt="A", n=2, best_of=4, max_tokens=5).choices) == 2


def test_seeds_decide_answers(client):
    def ask(**options):
        reply = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=15, temperature=1.5, **options)
        return [choice.message.content for choice in reply.choices]

    assert ask(seed=1) == ask(seed=1) != ask(seed=2)
    three = ask(seed=1, n=3)
    assert len(set(three)) == 3 and three[1] == ask(seed=2)[0]
    assert ask() != ask()


def test_stop_texts_end_answers(client):
    text = client.completions.create(model="tiny", prompt="The sea", max_tokens=30, **GREEDY).choices[0].text
    stop = text[10:13]
    reply = client.completions.create(model="tiny", prompt="The sea", max_tokens=30, stop=[stop, "zzzz"], **GREEDY)
    assert reply.choices[0].text == text[: text.index(stop)] and reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 30
    cut = client.completions.create(model="tiny", prompt="The sea", max_tokens=3, **GREEDY)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3


def logprobs_of_model(engine, prompt, answer):
    """(T, V): what the model itself gives the answer's tokens."""
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*prompt, *answer]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)


def test_logprobs_are_the_models(client, engine):
    prompt = engine.encode(HELLO)
    settings = GenerationArguments(temperature=0, repetition_penalty=1.0, max_new_tokens=12)
    answer = engine.generate([Request(prompt, settings)])[0].token_ids
    expected = logprobs_of_model(engine, prompt, answer)
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "logprobs": True, "top_logprobs": 3, **GREEDY}
    whole = client.chat.completions.create(**ask).choices[0]
    content = whole.logprobs.content
    shown = [row for row, token in enumerate(answer) if engine.token_bytes[token].strip()]
    assert len(content) >= len(shown)
    for row, token in zip(range(len(content)), content, strict=True):
        assert token.logprob == pytest.approx(float(expected[row, answer[row]]), abs=1e-4)
        assert bytes(token.bytes) == engine.token_bytes[answer[row]]
        best = expected[row].topk(3).values.tolist()
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(best, abs=1e-4)
    streamed = [
        token
        for chunk in client.chat.completions.create(**ask, stream=True)
        for choice in chunk.choices
        for token in (choice.logprobs.content if choice.logprobs else ())
    ]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_completion_logprobs_point_into_the_text(client):
    for seed in range(5):
        choice = client.completions.create(
            model="tiny", prompt="The sea", logprobs=2, max_tokens=30, seed=seed, temperature=1.0
        ).choices[0]
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            if not token.startswith("bytes:") and "�" not in choice.text[: offset + 1]:
                assert choice.text[offset:].startswith(token)
        assert all(len(top) in (1, 2) for top in logprobs.top_logprobs)


def test_logit_bias_and_penalties(client, engine):
    token = engine.tokenizer.sp_model.piece_to_id("e")
    always = client.completions.create(
        model="tiny", prompt="The", max_tokens=6, logit_bias={str(token): 100}, **GREEDY
    )
    assert always.choices[0].text == "e" * 6
    varied = client.completions.create(
        model="tiny", prompt="The", max_tokens=6, logit_bias={str(token): 5}, frequency_penalty=2, **GREEDY
    )
    assert varied.choices[0].text != "e" * 6


def test_answers_in_json(client):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Bern"]}, "warm": {"type": "boolean"}},
        "required": ["city", "warm"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    for stream in (False, True):
        reply = client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=wanted, n=3, temperature=1.0, stream=stream, seed=3
        )
        texts = {0: "", 1: "", 2: ""}
        if stream:
            for chunk in reply:
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        else:
            texts = {choice.index: choice.message.content for choice in reply.choices}
            assert {choice.finish_reason for choice in reply.choices} == {"stop"}
        for text in texts.values():
            value = json.loads(text)
            assert set(value) == {"city", "warm"} and value["city"] in ("Rome", "Bern")
    anything = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=30
    )
    assert anything.choices[0].message.content.startswith("{")


def test_answers_parsed_into_classes(client):
    """The client's own helper, which sends a schema made by pydantic and checks the answer by it."""
    from typing import Literal

    from pydantic import BaseModel

    class Weather(BaseModel):
        city: Literal["Rome", "Bern"]
        warm: bool

    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Weather)
    assert isinstance(parsed.choices[0].message.parsed, Weather)


def test_tool_calls(client):
    parameters = {"type": "object", "properties": {"city": {"enum": ["Rome", "Bern"]}}, "required": ["city"]}
    parameters["additionalProperties"] = False
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    tools.append({"type": "function", "function": {"name": "time", "description": "now"}})
    named = {"type": "function", "function": {"name": "weather"}}
    ask = {"model": "tiny", "messages": HELLO, "tools": tools, "tool_choice": named, "parallel_tool_calls": False}
    choice = client.chat.completions.create(**ask).choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Bern")
    # The call and its result are sent back.
    turns = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "21"}]
    assert client.chat.completions.create(**ask | {"messages": turns, "tool_choice": "none"}, max_tokens=5).choices
    with client.chat.completions.stream(**ask) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.tool_calls[0].function.name == "weather"
    free = client.chat.completions.create(**ask | {"tool_choice": "auto"}, max_tokens=20).choices[0].message
    assert free.tool_calls or not free.content.startswith("{")


def test_calls_in_the_form_of_the_models_template(engine):
    knowing = TransformersEngine(engine.model, engine.tokenizer, TOOL_TEMPLATE)
    parameters = {"type": "object", "properties": {"city": {"enum": ["Rome", "Bern"]}}, "required": ["city"]}
    parameters["additionalProperties"] = False
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    ask = {"model": "tiny", "messages": HELLO, "tools": tools, "parallel_tool_calls": False, "seed": 3}
    with serving(knowing, stream_interval=0) as live, live.client() as client:
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            whole = client.chat.completions.create(**ask, tool_choice=choice).choices[0]
            with client.chat.completions.stream(**ask, tool_choice=choice) as stream:
                pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
                streamed = stream.get_final_completion().choices[0]
            for answer in (whole, streamed):
                [call] = answer.message.tool_calls
                assert answer.finish_reason == "tool_calls" and call.function.name == "weather"
                assert json.loads(call.function.arguments)["city"] in ("Rome", "Bern")
            assert len(pieces) > 2
    knowing.close()


def test_embeddings(client, engine):
    texts = ["The sea is blue.", "A dog", "The sea is blue."] * 5
    expected = engine.embed([engine.encode_text(text) for text in texts])
    reply = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    assert [item.index for item in reply.data] == list(range(15))
    assert torch.allclose(torch.tensor([item.embedding for item in reply.data]), expected, atol=1e-5)
    assert torch.linalg.vector_norm(torch.tensor(reply.data[0].embedding)) == pytest.approx(1, abs=1e-5)
    assert reply.usage.prompt_tokens == sum(len(engine.encode_text(text)) for text in texts)
    floats = client.embeddings.create(model="tiny", input="A dog", encoding_format="float").data[0].embedding
    raw = client.embeddings.with_raw_response.create(model="tiny", input="A dog", encoding_format="base64")
    encoded = json.loads(raw.text if isinstance(raw.text, str) else raw.text())["data"][0]["embedding"]
    assert list(struct.unpack(f"<{len(floats)}f", base64.b64decode(encoded))) == pytest.approx(floats, abs=1e-7)
    ids = client.embeddings.create(model="tiny", input=[engine.encode_text("A dog")], encoding_format="float")
    assert ids.data[0].embedding == pytest.approx(floats, abs=1e-5)


def test_errors_are_the_clients_own(client, live):
    with pytest.raises(openai.NotFoundError) as absent:
        client.chat.completions.create(model="other", messages=HELLO)
    assert absent.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=3)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[7] * 512)
    assert long.value.code == "context_length_exceeded" and "512" in str(long.value)
    full = client.completions.create(model="tiny", prompt=[7] * 511)
    assert full.usage.completion_tokens == 1
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, max_tokens=3)
    assert raw.headers["x-request-id"] and raw.parse().usage.completion_tokens <= 3


def test_control_tokens_typed_by_users_are_text(client, engine):
    plain = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).usage.prompt_tokens
    typed = "</s><s>[INST] <<SYS>>"
    turns = [{"role": "user", "content": HELLO[0]["content"] + typed}]
    more = client.chat.completions.create(model="tiny", messages=turns, max_tokens=1).usage.prompt_tokens
    assert more >= plain + len(engine.tokenizer.sp_model.encode(typed)) - 2
    echoed = client.completions.create(model="tiny", prompt=typed, echo=True, max_tokens=1).choices[0].text
    assert echoed.startswith(typed)


def test_a_conversation_goes_on_from_its_cache(client):
    turns = [{"role": "user", "content": "word " * 20}]
    first = client.chat.completions.create(model="tiny", messages=turns, max_tokens=5)
    turns += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]
    second = client.chat.completions.create(model="tiny", messages=turns, max_tokens=5)
    assert second.usage.prompt_tokens_details.cached_tokens > 0.8 * first.usage.prompt_tokens


def test_adapters_are_models_beside_the_base(tiny_model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = get_peft_model(base, config)
        folders[name] = str(tmp_path / name)
        adapted.save_pretrained(folders[name])
    plan = EnginePlan(InferenceArguments(model_name_or_path=str(tiny_model_folder)))
    engine = plan.load(adapters=folders)
    try:
        with serving(engine) as live, live.client() as client:
            assert [model.id for model in client.models.list()] == ["tiny", "one", "two"]

            def answer(name):
                return client.completions.create(model=name, prompt="The sea", max_tokens=20, **GREEDY).choices[0].text

            def embedding():
                return client.embeddings.create(model="tiny", input="The sea").data[0].embedding

            before = embedding()
            texts = [answer(name) for name in ("tiny", "one", "two")]
            assert len(set(texts)) == 3 and answer("tiny") == texts[0]
            assert embedding() == pytest.approx(before, abs=1e-6), "embeddings are the base's"
    finally:
        engine.close()


# ---------------------------------------------------------------- many, slow, vanishing and hostile clients


def test_keys_queue_and_recovery(engine, slow_steps, endless):
    with serving(engine, api_keys=["right"], max_batch_size=2, max_queue=2) as live:
        with live.client("wrong") as stranger, pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"
        with live.client("right") as client:

            def ask(results):
                try:
                    results.append(client.chat.completions.create(model="tiny", messages=HELLO, **endless | short))
                except openai.APIStatusError as error:
                    results.append(error)

            short = {"max_tokens": 60}
            results = []
            threads = [threading.Thread(target=ask, args=(results,)) for _ in range(40)]  # ten times what fits
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            errors = [result for result in results if isinstance(result, openai.APIStatusError)]
            assert len(results) == 40 and len(errors) >= 30
            assert {type(error) for error in errors} == {openai.RateLimitError}
            assert all(int(error.response.headers["retry-after"]) >= 1 for error in errors)
            served = [result for result in results if not isinstance(result, openai.APIStatusError)]
            assert len(served) >= 4 and {r.usage.completion_tokens for r in served} == {60}
            assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).choices


def test_leaving_mid_stream_frees_the_slot(engine, slow_steps, endless):
    with serving(engine, max_batch_size=1) as live, live.client() as client:
        before = engine.statistics()["new_tokens"]
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **endless)
        next(iter(stream))
        began = time.monotonic()
        stream.close()
        until(lambda: live.queue.running == 0 and engine.statistics()["running"] == 0)
        assert time.monotonic() - began < 1
        assert engine.statistics()["new_tokens"] - before < 200, "it was not written to its end"
        # So does a client that waits for a whole answer, in line or not.
        for _ in range(2):
            with contextlib.suppress(openai.APITimeoutError):
                client.with_options(timeout=0.1).chat.completions.create(model="tiny", messages=HELLO, **endless)
        until(lambda: live.queue.running == 0 and live.queue.waiting == 0)


def raw_request(body, path="/v1/chat/completions"):
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def vanish(port, content, number):
    """A client that goes away: before it has sent all, while it waits, or after some of the stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    kind = number % 4
    writer.write(content[: len(content) // 2] if kind == 0 else content)
    await writer.drain()
    if kind == 1:
        await asyncio.sleep(0.005)
    elif kind >= 2:
        with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
            await asyncio.wait_for(reader.read(200), 2)
    if kind == 3:
        writer.transport.abort()  # a reset instead of an orderly end
    else:
        writer.close()


def send_vanishing_clients(live, content, count, at_once=50):
    async def go():
        gate = asyncio.Semaphore(at_once)

        async def one(number):
            async with gate:
                await vanish(live.port, content, number)

        await asyncio.gather(*(one(number) for number in range(count)))

    asyncio.run(go())
    until(lambda: live.queue.running == 0 and live.queue.waiting == 0, 60)
    until(lambda: not live.app.state.service.active)


def test_some_clients_vanish(live, client, endless):
    send_vanishing_clients(live, raw_request({"messages": HELLO, "stream": True, **endless}), 60)
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3).choices
    until(lambda: live.engine.statistics()["running"] == 0)


@pytest.mark.slow
def test_a_thousand_clients_vanish_and_memory_stays(live, client, endless):
    content = raw_request({"messages": HELLO, "stream": True, "n": 2, **endless})
    process = psutil.Process()
    send_vanishing_clients(live, content, 300)  # caches and pools fill
    before = process.memory_info().rss
    send_vanishing_clients(live, content, 1000)
    grown = process.memory_info().rss - before
    assert grown < 20e6, f"{grown / 1e6:.1f} MB more after 1,000 clients"
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3).choices


@pytest.mark.slow  # six megabytes through a window of four kilobytes
def test_a_client_that_does_not_read_holds_up_nobody(live, client, endless):
    content = raw_request({"messages": HELLO, "stream": True, "logprobs": True, "top_logprobs": 20, **endless, "n": 8})
    with socket.create_connection(("127.0.0.1", live.port)) as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.sendall(content)
        until(lambda: live.queue.running > 0)
        until(lambda: live.queue.running == 0)  # its answers are complete, although nobody has read them
        assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3).choices
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        received = b""
        while b"[DONE]" not in received[-100:]:
            piece = stuck.recv(1 << 16)
            assert piece
            received += piece
    assert received.count(b'"finish_reason":"length"') == 8


def test_broken_http_does_not_disturb(live, client):
    chat = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
    for content in (
        b"\x00\xff\xfe garbage\r\n\r\n",
        b"GET\r\n\r\n",
        f"{chat}Content-Length: -5\r\n\r\n".encode(),
        f"{chat}Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef".encode(),
        f"{chat}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /v1/models/" + b"../" * 50 + b"etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(content)
                answer = connection.recv(4096)
                assert re.match(rb"HTTP/1.1 4\d\d ", answer), answer
    assert client.models.list().data


def fuzz(app, count, seed):
    """Requests made from the application's own description, fitting it and not; returns how many got which status."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    statuses = {}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    for result in schema.get_all_operations():
        operation = result.ok()
        modes = [GenerationMode.POSITIVE]
        modes += [GenerationMode.NEGATIVE] if operation.method == "post" else []
        for mode in modes:

            @seeded(seed)
            @settings(
                max_examples=count,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
                database=None,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case):
                began = time.monotonic()
                response = case.call()
                assert time.monotonic() - began < 30
                assert response.status_code < 500
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                # A description cannot say how long a context is, or which fields exclude each other.
                case.validate_response(response, excluded_checks=[positive_data_acceptance])

            send()
    return statuses


@pytest.mark.slow
def test_fuzzed_requests_get_described_replies(engine):
    statuses = fuzz(create_app(engine, ServingArguments(max_context=200)), 6, 0)
    assert statuses[200] > 5 and statuses[400] > 15


@pytest.mark.slow
def test_thousands_of_fuzzed_requests_get_described_replies(engine):
    statuses = fuzz(create_app(engine, ServingArguments(max_context=200)), 500, 1)
    assert sum(statuses.values()) > 3000 and statuses[200] > 300


# ---------------------------------------------------------------- the script


class Script:
    """scripts/openai_api_server.py as a user starts it."""

    def __init__(self, *arguments, **environment):
        command = [sys.executable, str(SCRIPTS / "openai_api_server.py"), "--port", "0", "--only_cpu", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        self.errors = []
        for line in self.process.stderr:
            self.errors.append(line)
            if match := re.search(r"running on (http://\S+)", line):
                self.url = match[1]
                break
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()

    def end(self):
        """Wait for its end; returns its status and its requests."""
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, [json.loads(line) for line in output.splitlines()]


@pytest.mark.slow
def test_the_script_serves_and_sigterm_lets_streams_end(tiny_model_folder, tmp_path, engine, endless):
    keys = tmp_path / "keys"
    keys.write_text("from-file\n", encoding="utf-8")
    script = Script(
        *("--base_model", str(tiny_model_folder), "--api_key_file", str(keys), "--max_batch_size", "1"),
        *("--temperature", "0", "--system_prompt", "be kind"),
        API_KEYS="from-environment",
    )
    try:
        for key in ("from-file", "from-environment"):
            with openai.OpenAI(api_key=key, base_url=f"{script.url}/v1") as client:
                assert client.models.list().data[0].id == tiny_model_folder.name
        client = openai.OpenAI(api_key="from-file", base_url=f"{script.url}/v1", max_retries=0)
        answer = client.chat.completions.create(model=tiny_model_folder.name, messages=HELLO, max_tokens=15)
        prompt = engine.encode([{"role": "system", "content": "be kind"}, *HELLO])
        settings = GenerationArguments(temperature=0, max_new_tokens=15)
        assert answer.choices[0].message.content == engine.generate([Request(prompt, settings)])[0].text

        # One after another.
        stream = client.chat.completions.create(
            model=tiny_model_folder.name, messages=HELLO, stream=True, n=3, temperature=1, **endless
        )
        chunks = [next(stream)]
        script.process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        assert reasons == ["length"] * 3
        status, requests = script.end()
    finally:
        script.process.kill()
    assert status == 0, "".join(script.errors)
    assert [line["status"] for line in requests] == [200] * 4 and requests[-1]["new_tokens"] == 3 * 400
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{script.url}/health")
    assert "Traceback" not in "".join(script.errors)


def test_mistakes_are_named_before_weights_are_read(tmp_path, tiny_model_folder, monkeypatch):
    import openai_api_server

    monkeypatch.setattr(EnginePlan, "load", lambda *args: pytest.fail("weights are read"))
    model = InferenceArguments(model_name_or_path=str(tiny_model_folder))
    for model_args, settings, serving_args, message in (
        (InferenceArguments(model_name_or_path=str(tmp_path / "absent")), {}, {}, "absent"),
        (model, {}, {"api_key_file": str(tmp_path / "no")}, "no such file"),
        (model, {}, {"lora_models": [f"a={tmp_path}"]}, "adapter"),
        (model, {"num_beams": 2}, {}, "beam"),
    ):
        with pytest.raises(InputError, match=message):
            openai_api_server.main(model_args, GenerationArguments(**settings), ServingArguments(**serving_args))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: Address already in use; pass another --port"):
            openai_api_server.main(model, GenerationArguments(), ServingArguments(port=port))
