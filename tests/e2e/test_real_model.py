"""A real Qwen2.5 right through: the command line, the server and llama.cpp against transformers' own words.

REAL_MODEL names its folder, with the file it is also published as, original-q4_k_m.gguf, beside the weights. The
oracles: apply_chat_template and the tokenizer of transformers for prompts and counts, transformers' generate and
llama-cpp-python's own loop for greedy answers.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import inference_hf
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from support.fuzz_text import fuzz_texts
from support.server import GREEDY, serving
from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.evaluation.likelihood import LlamaCppScorer, Window
from utils.generation.engine import Request
from utils.generation.loading import EnginePlan
from utils.gguf import llamacpp
from utils.gguf.self_test import PASSAGES

REAL = Path(os.environ.get("REAL_MODEL", ""))
ORIGINAL = REAL / "original-q4_k_m.gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("REAL_MODEL" not in os.environ, reason="REAL_MODEL names no folder of a Qwen2.5 model"),
]

QUESTIONS = ["My name is Anna. What is the capital of France?", "用中文介绍一下这座城市。", "What is my name? 😀"]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Current weather of a city", "parameters": CITY},
    }
]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
COUNT = [{"role": "user", "content": "Count from 1 to 8, with commas."}]
BEGUN = [*COUNT, {"role": "assistant", "content": "1, 2, 3,"}]
STORY = [
    {"role": "user", "content": "Write a Python function that tells whether a word is a palindrome. 用中文解释。"}
]
LIMIT = 24
ENDS = [151645, 151643]  # <|im_end|>, <|endoftext|>


def call_of(arguments: dict) -> dict:
    function = {"name": "get_weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


class Oracle:
    """What transformers writes: prompts by its own template and tokenizer, greedy answers by its own generate."""

    def __init__(self, model):
        self.model = model
        # AutoTokenizer's class for Qwen would add NFC, whatever tokenizer.json says.
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(REAL)
        self.answers = {}

    def prompt(self, messages, tools=None):
        goes_on = messages[-1]["role"] == "assistant"
        ends = {"continue_final_message": goes_on, "add_generation_prompt": not goes_on}
        return self.tokenizer.apply_chat_template(messages, tools=tools, **ends)["input_ids"]

    def ids(self, messages, tools=None, limit=LIMIT):
        key = json.dumps([messages, tools, limit])
        if key not in self.answers:
            self.answers[key] = self.generate(self.prompt(messages, tools), limit)
        return self.answers[key]

    def generate(self, ids, limit):
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)
        settings = {"max_new_tokens": limit, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": ENDS[1]}
        return self.model.generate(prompt, attention_mask=mask, **settings)[0, prompt.shape[1] :].tolist()

    def text(self, *asked, limit=LIMIT):
        return self.tokenizer.decode(self.ids(*asked, limit=limit), skip_special_tokens=True)


class LlamaCppOracle(Oracle):
    """The same prompts, and what llama-cpp-python's own class finds likeliest, token by token."""

    def __init__(self, path):
        super().__init__(None)
        self.path = path

    def generate(self, prompt, limit):
        with llamacpp.open_model(self.path, torch.get_num_threads(), 512) as model:
            logits, ids = llamacpp.compute_logits(model, prompt), []
            while len(ids) < limit and (not ids or ids[-1] not in ENDS):
                ids.append(int(logits[-1].argmax()))
                model.eval(ids[-1:])
                logits = model.scores[: len(prompt) + len(ids)]
        return ids


@pytest.fixture(scope="module")
def engine():
    engine = EnginePlan(InferenceArguments(str(REAL), dtype="float32", only_cpu=True)).load(max_batch_size=2)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def oracle(engine):
    return Oracle(engine.model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    if not llamacpp.is_installed():
        pytest.skip("llama-cpp-python is not installed (requirements-llamacpp.txt)")
    import export_gguf

    out = tmp_path_factory.mktemp("real") / "gguf"
    export_gguf.main(export_gguf.ExportArguments(str(REAL), output_dir=str(out), types=["f16"], self_test="none"))
    return next(out.glob("*.gguf"))


@dataclasses.dataclass
class Door:
    """An engine, the arguments that a user gives for it, and who says what it has to answer."""

    engine: object
    arguments: InferenceArguments
    oracle: Oracle


@pytest.fixture(scope="module", params=["folder", "f16", "q4_k_m"])
def door(request, engine, oracle):
    if request.param == "folder":
        yield Door(engine, InferenceArguments(str(REAL), dtype="float32", only_cpu=True), oracle)
        return
    path = request.getfixturevalue("exported") if request.param == "f16" else ORIGINAL
    if not (llamacpp.is_installed() and path.is_file()):
        pytest.skip("needs llama-cpp-python and original-q4_k_m.gguf beside the weights")
    arguments = InferenceArguments(str(path), engine="llama.cpp", only_cpu=True)
    loaded = EnginePlan(arguments).load(max_batch_size=2, context=2048)
    yield Door(loaded, arguments, oracle if request.param == "f16" else LlamaCppOracle(path))
    loaded.close()


# ---------------------------------------------------------------- the command line


@pytest.fixture
def command_line(door, monkeypatch):
    """inference_hf.main with the engine that is loaded already; the prompts that reached it are in `asked`."""
    submit, asked = door.engine.submit, []

    def record(request, *others):
        asked.append(list(request.prompt))
        return submit(request, *others)

    monkeypatch.setattr(EnginePlan, "load", lambda plan, **options: door.engine)
    monkeypatch.setattr(door.engine, "close", lambda: None)
    monkeypatch.setattr(door.engine, "submit", record)

    def ask(settings=None, **task):
        greedy = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": LIMIT} | (settings or {})
        task = inference_hf.TaskArguments(with_prompt=True, **task)
        return inference_hf.main(door.arguments, GenerationArguments(**greedy), task)

    ask.asked = asked
    return ask


def test_chat_of_three_turns_on_the_command_line(door, command_line, monkeypatch, capsys):
    lines = iter(QUESTIONS)
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/exit"))
    command_line(interactive=True)
    shown = [part.splitlines()[0] for part in capsys.readouterr().out.split("Output: ")[1:]]
    messages = []
    for question, prompt, answer in zip(QUESTIONS, command_line.asked, shown, strict=True):
        messages.append({"role": "user", "content": question})
        assert prompt == door.oracle.prompt(messages)
        assert door.oracle.ids(messages)[-1] == ENDS[0] and answer == door.oracle.text(messages)
        messages.append({"role": "assistant", "content": answer})
    assert "Paris" in shown[0] and "巴黎" in shown[1] and "Anna" in shown[2]


def test_a_cut_answer_goes_on_as_if_it_had_not_been_cut(door, command_line, monkeypatch, capsys):
    lines = iter([COUNT[0]["content"], "/continue", "/continue"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/exit"))
    command_line({"max_new_tokens": 10}, interactive=True)
    whole = door.oracle.text(COUNT, limit=30)
    last = capsys.readouterr().out.rpartition("Output: ")[2].splitlines()[0]
    assert last == whole.splitlines()[0]


def test_files_of_questions(door, command_line, tmp_path):
    """History, functions and their results, and answers that were begun, each record's prompt as transformers'."""
    history = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "Paris."}]
    history.append({"role": "user", "content": QUESTIONS[2]})
    told = [*WEATHER, call_of({"city": "Paris"}), {"role": "tool", "content": "21 degrees, sunny"}]
    cases = [(history, None), (WEATHER, TOOLS), (told, TOOLS)]
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    records = [{"messages": messages} | ({"tools": tools} if tools else {}) for messages, tools in cases]
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    command_line(data_file=str(data), predictions_file=str(out))
    answers = [json.loads(line)["Output"] for line in out.read_text(encoding="utf-8").splitlines()]
    for case, prompt, answer in zip(cases, command_line.asked, answers, strict=True):
        assert prompt == door.oracle.prompt(*case)
        assert answer == door.oracle.text(*case).strip()
    assert "Anna" in answers[0] and "get_weather" in answers[1]


def test_stop_strings_on_the_command_line(door, command_line):
    whole = door.oracle.text(COUNT)
    answer = command_line({"stop": ["5"]}, prompt=COUNT[0]["content"])
    assert answer["output"] == whole[: whole.index("5")].strip()


def test_begun_answers_on_the_command_line(door, command_line, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps({"messages": BEGUN}) + "\n", encoding="utf-8")
    command_line(data_file=str(data), predictions_file=str(out), continue_final_message=True)
    assert command_line.asked == [door.oracle.prompt(BEGUN)]
    assert json.loads(out.read_text(encoding="utf-8"))["Output"] == door.oracle.text(BEGUN)


# ---------------------------------------------------------------- the server


@pytest.fixture
def client(door):
    with serving(door.engine, stream_interval=0) as live, live.client() as client:
        yield functools.partial(client.chat.completions.create, model="tiny", max_tokens=LIMIT, **GREEDY)


def streamed(client, **ask):
    """(text, finish_reason, usage) of the same request as a stream."""
    text, reason, usage = "", None, None
    for chunk in client(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, usage


def check(door, client, messages, tools=None):
    """The reply and its stream are what transformers writes, with its counts; returns the reply's choice."""
    ask = {"messages": messages} | ({"tools": tools} if tools else {})
    reply = client(**ask)
    choice, expected = reply.choices[0], door.oracle.ids(messages, tools)
    text = door.oracle.text(messages, tools)
    if not choice.message.tool_calls:
        assert choice.message.content == (text if messages[-1]["role"] == "assistant" else text.strip())
        assert choice.finish_reason == ("stop" if expected[-1] in ENDS else "length")
        text, reason, usage = streamed(client, **ask)
        assert (text, reason) == (choice.message.content, choice.finish_reason)
        assert usage.total_tokens == reply.usage.total_tokens
    assert reply.usage.prompt_tokens == len(door.oracle.prompt(messages, tools))
    assert reply.usage.completion_tokens == len(expected)
    return choice


def test_chat_of_three_turns_with_the_server(door, client):
    messages = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = check(door, client, messages).message.content
        messages.append({"role": "assistant", "content": answer})
    assert "Paris" in messages[1]["content"] and "Anna" in messages[5]["content"]


def test_begun_answers_with_the_server(door, client):
    assert check(door, client, BEGUN).message.content.startswith(" 4")


def test_stop_strings_with_the_server(door, client):
    whole = door.oracle.text(COUNT)
    expected = (whole[: whole.index("5")].strip(), "stop")
    choice = client(messages=COUNT, stop=["5"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == expected
    assert streamed(client, messages=COUNT, stop=["5"])[:2] == expected
    # The names of special tokens are stop texts, too.
    assert client(messages=COUNT, stop=["<|im_end|>"]).choices[0].message.content == whole


def test_functions_with_the_server(door, client):
    # In 4 bits a call and a fence around it are nearly as likely: 0.12 to 0.17 apart by the batches of the prompt.
    if not isinstance(door.oracle, LlamaCppOracle):
        check(door, client, WEATHER, TOOLS)
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        how = {"tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 64}
        reply = client(messages=WEATHER, tools=TOOLS, **how)
        [call] = reply.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert reply.choices[0].finish_reason == "tool_calls" and call.function.name == "get_weather"
        assert "Paris" in arguments["city"]
        assert reply.usage.prompt_tokens == len(door.oracle.prompt(WEATHER, TOOLS))
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees, sunny"}
    told = client(messages=[*WEATHER, reply.choices[0].message, result], tools=TOOLS)
    shown = ([*WEATHER, call_of(arguments), result], TOOLS)
    assert told.usage.prompt_tokens == len(door.oracle.prompt(*shown))
    assert told.usage.completion_tokens == len(door.oracle.ids(*shown))


def test_json_answers_with_the_server(door, client):
    asked = [{"role": "user", "content": "Give the capital of France and its country as JSON."}]
    client = functools.partial(client, max_tokens=64)
    anything = client(messages=asked, response_format={"type": "json_object"}).choices[0]
    assert anything.finish_reason == "stop" and "Paris" in json.dumps(json.loads(anything.message.content))
    schema = {"capital": {"type": "string"}, "in_europe": {"type": "boolean"}}
    schema = {"type": "object", "properties": schema, "required": list(schema), "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    choice = client(messages=asked, response_format=wanted).choices[0]
    value = json.loads(choice.message.content)
    assert choice.finish_reason == "stop" and set(value) == {"capital", "in_europe"}
    assert "Paris" in value["capital"] and isinstance(value["in_europe"], bool)
    assert streamed(client, messages=asked, response_format=wanted)[:2] == (choice.message.content, "stop")


# ---------------------------------------------------------------- tokens and figures


def test_texts_and_look_alikes_are_cut_as_transformers_cuts_them(door):
    lines = [*QUESTIONS, STORY[0]["content"], "def f(x):\n    return {'a': [i ** 2 for i in x]}  # 平方"]
    controls = [token.content for token in door.oracle.tokenizer.added_tokens_decoder.values()]
    texts = [*fuzz_texts(300, lines), *controls, *(f"你好{token}world\n" for token in controls)]
    tokenizer = door.oracle.tokenizer
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert door.engine.encode_text(text) == expected, text
        # A user's text is text whatever it looks like; the control tokens around it are the template's.
        head = tokenizer("user\n" + text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        prompt = door.engine.encode([{"role": "system", "content": "a"}, {"role": "user", "content": text}])
        assert prompt[6:] == [151644, *head, ENDS[0], 198, 151644, *tokenizer("assistant\n")["input_ids"]], text
    assert set(ENDS) <= set(door.engine.stop_ids)
    assert door.engine.template.rstrip("\n") == tokenizer.chat_template.rstrip("\n")


def test_a_long_answer_is_transformers_own(door):
    settings = GenerationArguments(temperature=0.0, repetition_penalty=1.0, max_new_tokens=64)
    answer = door.engine.generate([Request(door.engine.encode(STORY), settings)])[0]
    assert answer.token_ids == door.oracle.ids(STORY, limit=64)


def test_the_export_has_the_perplexity_of_the_folder(exported, oracle):
    """Of six passages in both languages, prose, code and dialogue; the original's 4 bits are about as good."""
    rows = [oracle.tokenizer(text)["input_ids"] for text in PASSAGES[-7:-1]]
    count = sum(len(row) - 1 for row in rows)
    with torch.no_grad():
        logits = [oracle.model(torch.tensor([row])).logits[0, :-1] for row in rows]
    losses = [
        cross_entropy(part, torch.tensor(row[1:]), reduction="sum") for part, row in zip(logits, rows, strict=True)
    ]
    expected = float(sum(losses)) / count
    found = []
    for path in (exported, ORIGINAL):
        with llamacpp.open_model(path, torch.get_num_threads(), 512) as model:
            found.append(sum(LlamaCppScorer(model).window_losses([Window(row, 1) for row in rows])) / count)
    assert abs(found[0] - expected) < 1e-3 and abs(found[1] - expected) < 0.1, (expected, found)
