"""scorers: llama.cpp against transformers; servers against a stand-in that fails, and our own."""

import asyncio
import json
import math
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM

from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.core.errors import InputError
from utils.evaluation import endpoints
from utils.evaluation.multiple_choice.scorers import UNLISTED, EngineScorer, ServerScorer, open_scorer
from utils.evaluation.multiple_choice.scoring import ChoiceRequest, PrefixScorer
from utils.generation.loading import EnginePlan
from utils.generation.transformers_engine import TransformersEngine
from utils.gguf import llamacpp
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import encode_raw, encode_text, load_tokenizer

EXAMPLES = "The following are questions.\n\nWhat is red?\nAnswer: A\n\nWhat is green?\nAnswer: B\n\n"
QUESTIONS = ("What is the cat?", "Who has been to the river and back?", "Is it 7?", "Where?", "What is a zebra, then?")


def likelihoods(model, prompt, continuations):
    """A plain forward pass for each."""
    found = []
    for ids in continuations:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
        found.append(float(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids).unsqueeze(1)).sum()))
    return found


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder)


@pytest.fixture(scope="module")
def requests(tokenizer):
    """Questions after the same examples, with letters and, for every other one, longer texts."""
    found = []
    for number, question in enumerate(QUESTIONS):
        text = f"{EXAMPLES}{question}\nAnswer:"
        texts = (" A", " B", " the river", " x") if number % 2 else (" A", " B", " C")
        ids = [tuple(encode_text(tokenizer, f"\n{part}")[len(encode_text(tokenizer, "\n")) :]) for part in texts]
        found.append(ChoiceRequest(tuple(encode_raw(text, tokenizer)), tuple(ids), text, texts))
    assert {len(ids) for request in found for ids in request.continuations} > {1}
    return found


# ---------------------------------------------------------------- engines


def test_forced_tokens_score_as_plain_passes(tiny_model_folder, tokenizer, requests):
    """The scorer for any engine, on the transformers engine with fewer slots than questions."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    engine = TransformersEngine(model, tokenizer, None, max_batch_size=3)
    try:
        seen = {}
        scorer = EngineScorer(engine)
        scores = scorer.score(requests, seen.__setitem__)
        assert isinstance(open_scorer(engine), PrefixScorer)
        shared = open_scorer(engine).score(requests)
        with pytest.raises(InputError, match="context 512"):
            scorer.score([ChoiceRequest((1,) * 512, ((5,),), "", ("",))])
        end = tokenizer.eos_token_id
        with pytest.raises(InputError, match="ends answers"):
            scorer.score([ChoiceRequest((1, 5), ((end, 7),), "", ("",))])
    finally:
        engine.close()
    assert [seen[number] for number in range(len(requests))] == scores
    for score, other, request in zip(scores, shared, requests, strict=True):
        expected = likelihoods(model, request.prompt, request.continuations)
        assert list(score.logprobs) == pytest.approx(expected, abs=1e-4)
        assert list(other.logprobs) == pytest.approx(expected, abs=1e-4)
    assert scorer.counts["prompt_tokens"] == sum(len(request.prompt) for request in requests)
    assert scorer.counts["computed_tokens"] < 0.7 * scorer.counts["prompt_tokens"]


def test_vllm_is_scored_through_its_server():
    class Vllm:
        name = "vllm"

    with pytest.raises(InputError, match="vllm serve"):
        open_scorer(Vllm())


@pytest.mark.skipif(
    not llamacpp.is_installed(), reason="llama-cpp-python is not installed (requirements-llamacpp.txt)"
)
@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-4), ("f16", 0.02)])
def test_llama_cpp_scores_as_transformers(kind, tolerance, tiny_model_folder, requests, tmp_path):
    import export_gguf

    out = tmp_path / "gguf"
    export_gguf.main(
        export_gguf.ExportArguments(
            str(tiny_model_folder), output_dir=str(out), types=[kind], self_test="none", threads=1
        )
    )
    (path,) = out.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    args = InferenceArguments(model_name_or_path=str(path), engine="llama.cpp", only_cpu=True)
    engine = EnginePlan(args, chat=False).load(max_batch_size=4)
    try:
        scorer = open_scorer(engine)
        scores = scorer.score(requests)
    finally:
        engine.close()
    assert scorer.counts["computed_tokens"] < 0.7 * scorer.counts["prompt_tokens"]
    for score, request in zip(scores, requests, strict=True):
        expected = likelihoods(model, request.prompt, request.continuations)
        assert list(score.logprobs) == pytest.approx(expected, abs=tolerance)
        if max(expected) - sorted(expected)[-2] > 2 * tolerance:
            assert score.logprobs.index(max(score.logprobs)) == expected.index(max(expected))


# ---------------------------------------------------------------- a stand-in server


class StandIn(ThreadingHTTPServer):
    """Answers letters by the number in the prompt; fails as it is told.

    Attributes:
        failures: {prompt: statuses to answer with, before it succeeds}; a status of 0 breaks the connection.
        form: completions (the older dictionary), or content (as chat, and llama.cpp's server, write it).
    """

    daemon_threads = True

    def __init__(self):
        self.failures: dict[str, list[int]] = {}
        self.form, self.echoes, self.delay = "completions", True, 0.0
        self.asked, self.together, self.most, self.lock = Counter(), 0, 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


def listed(number):
    """The likeliest tokens after prompt `number`; D is never among them."""
    return {"A": -1.0 - number, "B": -2.0, "C": -3.0, " B": -0.5, "x": -0.1}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply(200, {"object": "list", "data": [{"id": "stand-in", "object": "model"}]})

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = self.path.endswith("/chat/completions")
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        with server.lock:
            server.asked[text] += 1
            server.together += 1
            server.most = max(server.most, server.together)
            failures = server.failures.get(text, [])
            status = failures.pop(0) if failures else 200
        time.sleep(server.delay)
        with server.lock:
            server.together -= 1
        if status == 0:
            self.close_connection = True
            return
        if status != 200:
            code = "context_length_exceeded" if status == 413 else None
            error = {"error": {"message": f"status {status}", "code": code, "param": None, "type": "x"}}
            return self.reply(400 if status == 413 else status, error)
        self.reply(200, self.answer(body, text, chat))

    def answer(self, body, text, chat):
        server = self.server
        if body.get("echo"):
            logprobs = self.echo(text) if server.echoes else None
        elif chat or server.form == "content":
            number = int(text.split()[0])
            top = [{"token": token, "logprob": value, "bytes": None} for token, value in listed(number).items()]
            logprobs = {"content": [{**top[-1], "top_logprobs": top}]}
        else:
            row = listed(int(text.split()[0]))
            logprobs = {"tokens": ["x"], "token_logprobs": [-0.1], "text_offset": [len(text)], "top_logprobs": [row]}
        count = len(text) + 1 if body.get("echo") else 10
        usage = {"prompt_tokens": count, "completion_tokens": 1, "total_tokens": count + 1}
        usage["prompt_tokens_details"] = {"cached_tokens": 4}
        choice = {"index": 0, "finish_reason": "length", "logprobs": logprobs}
        choice |= {"message": {"role": "assistant", "content": "x"}} if chat else {"text": text + "!"}
        kind = "chat.completion" if chat else "text_completion"
        return {"id": "1", "object": kind, "created": 1, "model": "stand-in", "choices": [choice], "usage": usage}

    def echo(self, text):
        """As vLLM: BOS is a token and counts as 3 characters; each character is a token, likelier the later it is."""
        values = [-math.log(2 + place) for place in range(len(text))]
        return {
            "tokens": ["<s>", *text, "!"],
            "token_logprobs": [None, *values, -9.0],
            "text_offset": [0, *(3 + place for place in range(len(text) + 1))],
            "top_logprobs": [None] + [{}] * (len(text) + 1),
        }

    def reply(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "5")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    server = StandIn()
    yield server
    server.shutdown()
    server.server_close()


def letters(number, letters_="ABCD", chat=False):
    text = f"{number} is the question"
    asked = [{"role": "user", "content": text}] if chat else text
    return ChoiceRequest((), (), asked, tuple(letters_))


def expected_letters(number):
    return (-1.0 - number, -2.0, -3.0, UNLISTED)


@pytest.mark.parametrize("form", ["completions", "content"])
def test_letters_from_what_a_server_lists(server, form):
    server.form = form
    scorer = ServerScorer("server", server.url, 4)
    seen = {}
    scores = scorer.score([letters(number) for number in range(9)], seen.__setitem__)
    scorer.close()
    assert [score.logprobs for score in scores] == [expected_letters(number) for number in range(9)]
    assert [seen[number] for number in range(9)] == scores
    assert scorer.counts == {"requests": 9, "prompt_tokens": 90, "computed_tokens": 63, "retries": 0, "errors": 0}


def test_letters_of_a_conversation_ignore_white_space(server):
    """ " B" is likelier than "B" there; after a text only the exact form counts."""
    scorer = ServerScorer("server", server.url)
    assert scorer.score([letters(0, chat=True)])[0].logprobs == (-1.0, -0.5, -3.0, UNLISTED)
    assert scorer.score([letters(0, (" A", " B"))])[0].logprobs == (UNLISTED, -0.5)


def test_a_server_that_fails_now_and_then(server, monkeypatch):
    """Busy, broken, cut off: asked again, as soon as Retry-After says; one that goes on failing is an error."""
    server.failures = {
        "1 is the question": [429, 503],
        "2 is the question": [500] * 9,
        "3 is the question": [0],
        "4 is the question": [413],
    }
    monkeypatch.setattr(endpoints, "RETRIES", 2)
    scorer = ServerScorer("server", server.url, 3)
    scores = scorer.score([letters(number) for number in range(6)])
    for number in (0, 1, 3, 5):
        assert scores[number].logprobs == expected_letters(number) and scores[number].error is None
    assert scores[2].logprobs == () and "500" in scores[2].error
    assert scores[4].logprobs == () and "413" in scores[4].error
    asked = [server.asked[f"{number} is the question"] for number in range(6)]
    assert asked == [1, 3, 3, 2, 1, 1]
    assert scorer.counts["retries"] == 2 + 2 + 1 and scorer.counts["errors"] == 2 and scorer.counts["requests"] == 6


def test_what_no_try_can_mend_ends_the_run(server, monkeypatch):
    monkeypatch.setattr(endpoints, "RETRIES", 2)
    for status, message in ((401, "SERVER_API_KEY"), (404, "no model"), (400, "refuses requests")):
        server.failures = {"0 is the question": [status]}
        with pytest.raises(InputError, match=message):
            ServerScorer("server", server.url).score([letters(0)])
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="does not answer"):
        ServerScorer("server", server.url).score([letters(0)])


def test_requests_run_beside_each_other(server):
    server.delay = 0.05
    ServerScorer("server", server.url, 5).score([letters(number) for number in range(15)])
    assert 3 <= server.most <= 5


def test_longer_continuations_by_echo(server):
    """The sum over the tokens of the continuation, BOS and the token written after it left out."""
    text = "7 is what comes: "
    request = ChoiceRequest((), (), text, ("blue", "red wine"))
    (score,) = ServerScorer("server", server.url).score([request])
    for continuation, found in zip(request.texts, score.logprobs, strict=True):
        places = range(len(text), len(text) + len(continuation))
        assert found == pytest.approx(sum(-math.log(2 + place) for place in places))


def test_letters_that_are_not_listed_are_asked_for_by_echo(server):
    (score,) = ServerScorer("server", server.url).score([letters(0, "QZ")])
    assert score.logprobs == pytest.approx([-math.log(2 + len("0 is the question"))] * 2)
    server.echoes = False
    scorer = ServerScorer("server", server.url)
    (score,) = scorer.score([letters(0, "QZ")])
    assert score.logprobs == () and "no continuation is among" in score.error and scorer.counts["errors"] == 1


def test_longer_continuations_are_refused_where_they_cannot_be_told(server):
    server.echoes = False
    with pytest.raises(InputError, match="echo with logprobs"):
        ServerScorer("server", server.url).score([letters(0), ChoiceRequest((), (), "7 x", ("blue",))])
    conversation = [{"role": "user", "content": "7 x"}]
    with pytest.raises(InputError, match="conversation"):
        ServerScorer("server", server.url).score([ChoiceRequest((), (), conversation, ("blue",))])


# ---------------------------------------------------------------- our own server


@pytest.fixture
def own_server(tiny_model_folder, tokenizer):
    """openai_api_server's application on a port, with the tiny model in float32."""
    import uvicorn

    from utils.serving.app import create_app
    from utils.serving.arguments import ServingArguments

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    engine = TransformersEngine(model, tokenizer, CHAT_TEMPLATES["alpaca-2"])
    app = create_app(engine, ServingArguments(served_model_name=["tiny"]), GenerationArguments())
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", model, engine
    server.should_exit = True
    thread.join()
    engine.close()


def test_our_own_server_lists_what_the_model_says(own_server, tokenizer):
    """One-character texts among the five likeliest (twenty in a conversation), against a plain pass."""
    url, model, engine = own_server
    scorer = ServerScorer("server", url)
    checked = 0
    for question in QUESTIONS:
        text, messages = f"{EXAMPLES}{question}\nAnswer:", [{"role": "user", "content": question}]
        for asked, prompt, count in ((text, encode_raw(text, tokenizer), 5), (messages, engine.encode(messages), 20)):
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1)
            values = {}  # of texts of one character, the likeliest token of each
            for index in reversed(logprobs.topk(count).indices.tolist()):
                name = engine.token_bytes[index].decode(errors="replace")
                values[name.strip() if count == 20 else name] = float(logprobs[index])
            texts = tuple(name for name in values if len(name.strip()) == 1 and name.isprintable() and name != "�")
            if not texts:
                continue
            (score,) = scorer.score([ChoiceRequest((), (), asked, texts)])
            assert score.error is None, "also where the likeliest token is white space, or ends the answer"
            assert list(score.logprobs) == pytest.approx([values[name] for name in texts], abs=1e-4)
            checked += 1
    assert checked >= 2
    with pytest.raises(InputError, match="echo with logprobs"):
        scorer.score([ChoiceRequest((), (), "x", ("blue",))])
