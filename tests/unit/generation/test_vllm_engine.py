"""The vLLM engine against stand-ins for vLLM's server and library whose tokens come from a transformers engine."""

import json
import shlex
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from support import vllm_stand_in
from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.core.errors import InputError
from utils.generation import vllm_backends
from utils.generation.engine import Prompter, Request
from utils.generation.loading import check_inference_request
from utils.generation.transformers_engine import TransformersEngine
from utils.generation.vllm_engine import load_vllm
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import encode_raw, load_tokenizer

TEXTS = (
    "Once upon a time there was a small house near the river",
    "What is the capital of France?",
    "你好，我的猫",
    "x",
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder)


@pytest.fixture(scope="module")
def reference(tiny_model_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()
    engine = TransformersEngine(model, tokenizer, CHAT_TEMPLATES["alpaca-2"], max_batch_size=4)
    yield engine
    engine.close()


@pytest.fixture
def server(reference):
    server = vllm_stand_in.Server(reference)
    yield server
    server.close()


@pytest.fixture
def load(tiny_model_folder, tokenizer):
    """Loads engines, and closes them at the end."""
    engines = []

    def load(url=None, adapters=None, template="alpaca-2", max_batch_size=4, context=None, **settings):
        folder = str(tiny_model_folder)
        args = InferenceArguments(model_name_or_path=folder, tokenizer_name_or_path=folder, **settings)
        config = check_inference_request(args, tokenizer)
        prompter = Prompter(tokenizer, CHAT_TEMPLATES[template], config.max_position_embeddings)
        engines.append(
            load_vllm(
                prompter,
                template,
                args,
                config,
                max_batch_size=max_batch_size,
                context=context,
                adapters=adapters,
                url=url,
            )
        )
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


@pytest.fixture
def adapter(tmp_path, tiny_model_folder):
    """Writes the config of an adapter; load_vllm reads no weights."""

    def write(name="zh", **settings):
        folder = tmp_path / name
        folder.mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model_folder), "r": 12, "lora_alpha": 24}
        config |= {"target_modules": ["q_proj"], "modules_to_save": None, **settings}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return str(folder)

    return write


@pytest.fixture(params=["server", "library"])
def engine(request, load, reference, monkeypatch):
    """The engine on either stand-in; `notes` says which answers nobody read to their end."""
    if request.param == "server":
        server = request.getfixturevalue("server")
        engine = load(server.url)
        engine.notes = server
        return engine
    notes = vllm_stand_in.install(monkeypatch, reference)
    engine = load()
    engine.notes = notes
    return engine


def requests(tokenizer, **settings):
    settings = GenerationArguments(**{"max_new_tokens": 12, "temperature": 0.0, **settings})
    return [Request(encode_raw(text, tokenizer), settings) for text in TEXTS]


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "min_new_tokens": 3, "seed": 7},
        {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    ],
)
def test_answers_are_those_of_the_model_behind(engine, reference, tokenizer, settings):
    asked = [*requests(tokenizer, **settings), *requests(tokenizer, **settings)]  # eight at once in four slots
    for number, request in enumerate(asked):
        request.top_logprobs, request.logit_bias = (None, 0, 2)[number % 3], {300: 1.5} if number % 2 else {}
        request.seed = number
    found, expected = engine.generate(asked), reference.generate(asked)
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        for token, same in zip(one.logprobs, other.logprobs, strict=True):
            assert (token.token_id, token.logprob) == (same.token_id, pytest.approx(same.logprob, abs=1e-5))
            assert dict(token.top) == pytest.approx(dict(same.top), abs=1e-5)
    counts = engine.statistics()
    assert (counts["running"], counts["waiting"], counts["max_batch_size"]) == (0, 0, 4)
    assert counts["new_tokens"] == sum(len(one.token_ids) for one in found)
    assert counts["prompt_tokens"] == sum(one.num_prompt_tokens for one in found)
    assert len(engine.notes.asked) == 8


def test_a_stop_text_ends_the_answer_in_vllm_too(engine, reference, tokenizer):
    settings = {"max_new_tokens": 200, "min_new_tokens": 200}
    [whole] = reference.generate(requests(tokenizer, **settings)[:1])
    stop = whole.text[20:23]
    [request] = requests(tokenizer, **settings, stop=[stop])[:1]
    [found] = engine.generate([request])
    assert found.finish_reason == "stop" and found.text == whole.text[: whole.text.index(stop)].rstrip()
    wait_until(lambda: engine.notes.gone)


def test_pieces_come_as_they_are_written_and_cancelling_ends_them(engine, tokenizer):
    endless = requests(tokenizer, max_new_tokens=400, min_new_tokens=400)
    pieces = []
    first = engine.submit(endless[0], pieces.append)
    wait_until(lambda: len(pieces) > 3)
    assert first.completion is None
    first.cancel()
    wait_until(lambda: first.completion is not None)
    assert first.completion.finish_reason == "cancelled" and 3 < len(first.completion.token_ids) < 400
    wait_until(lambda: engine.notes.gone and engine.notes.gone[0].completion is not None)
    answers = [engine.submit(request) for request in endless * 3]  # four run, eight wait
    wait_until(lambda: (engine.statistics()["running"], engine.statistics()["waiting"]) == (4, 8))
    for answer in answers:
        answer.cancel()
    assert {answer.wait().finish_reason for answer in answers} == {"cancelled"}
    wait_until(lambda: engine.statistics()["running"] == engine.statistics()["waiting"] == 0)


def test_closing_ends_what_runs_and_what_waits(load, server, tokenizer):
    engine = load(server.url, max_batch_size=1)
    answers = [engine.submit(request) for request in requests(tokenizer, max_new_tokens=400, min_new_tokens=400)]
    engine.close()
    assert {answer.wait().finish_reason for answer in answers} == {"cancelled"}
    with pytest.raises(InputError, match="closed"):
        engine.submit(requests(tokenizer)[0])
    engine.close()


def test_what_vllm_does_not_do_is_refused(engine, tokenizer):
    [prompt] = [request.prompt for request in requests(tokenizer)[:1]]
    for request, words in (
        (Request(prompt, GenerationArguments(num_beams=2)), "beam search"),
        (Request(prompt, GenerationArguments(guidance_scale=2, negative_prompt="x"), negative_prompt=[5]), "guidance"),
        (Request(prompt, GenerationArguments(), constraint=object()), "grammars"),
        (Request(prompt, GenerationArguments(), model="other"), "there is no model 'other'; there are default"),
        (Request([5] * 600, GenerationArguments()), "the model's context 512"),
    ):
        with pytest.raises(InputError, match=words):
            engine.submit(request)
    with pytest.raises(InputError, match="no embeddings"):
        engine.embed([prompt])


# ---------------------------------------------------------------- the server


def test_a_server_that_fails_says_so_to_the_reader(load, server, tokenizer):
    engine = load(server.url)
    server.failure = "out of blocks"
    with pytest.raises(RuntimeError, match="vLLM: out of blocks"):
        engine.generate(requests(tokenizer)[:1])
    server.failure = None
    server.models = ["renamed"]
    with pytest.raises(InputError, match="vLLM: The model `base-model` does not exist"):
        engine.generate(requests(tokenizer)[:1])


def test_the_server_is_looked_at_before_anything_is_asked(load, server, adapter, monkeypatch):
    server.window = 100
    assert load(f"{server.url}/v1/").context == 100
    server.models = ["base-model", "zh", "en"]
    assert load(server.url).models == ["default"]
    with pytest.raises(InputError, match=r"it serves base-model, zh, en, not fr; .*--lora-modules"):
        load(server.url, adapters={"fr": adapter("fr")})
    with pytest.raises(InputError, match="no vLLM server answers there"):
        load("http://127.0.0.1:9")
    with pytest.raises(InputError, match="no vLLM server answers there"):
        load("not a url")
    monkeypatch.setattr(server.engine, "decode", lambda ids: "something else")
    with pytest.raises(InputError, match=r"has another vocabulary \(.* becomes 'something else'\)"):
        load(server.url)


def test_the_key_in_the_environment_is_sent(load, server, monkeypatch):
    server.key = "secret"
    for key in ("", "wrong"):
        monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(InputError, match="it wants a key; set VLLM_API_KEY"):
            load(server.url)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert load(server.url).models == ["default"]


# ---------------------------------------------------------------- adapters, options, the command


def test_adapters_are_models(load, reference, monkeypatch, adapter, tokenizer, server):
    monkeypatch.setattr(vllm_backends, "LORA_RANKS", (8, 16))
    folder = adapter()
    notes = vllm_stand_in.install(monkeypatch, reference)
    engine = load(adapters={"zh": folder})
    assert engine.models == ["default", "zh"]
    assert (notes.arguments.enable_lora, notes.arguments.max_loras, notes.arguments.max_lora_rank) == (True, 1, 16)
    for name in (None, "default", "zh"):
        request = requests(tokenizer)[0]
        request.model = name
        engine.generate([request])
    assert [asked[2] for asked in notes.asked] == [None, None, vllm_stand_in.LoRARequest("zh", 1, folder)]
    server.models.append("zh")
    engine = load(server.url, adapters={"zh": folder})
    for name in ("zh", "default"):
        request = requests(tokenizer)[0]
        request.model = name
        engine.generate([request])
    assert [body.model for body in server.asked] == ["zh", "base-model"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "has embed_tokens, lm_head besides LoRA"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "has embed_tokens besides LoRA"),
        ({"use_dora": True}, "has DoRA besides LoRA"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(load, monkeypatch, reference, adapter, settings, words):
    vllm_stand_in.install(monkeypatch, reference)
    with pytest.raises(InputError, match=rf"{words}.* LORA=\S+ bash scripts/run_merge.sh"):
        load(adapters={"zh": adapter(**settings)})


def test_options_reach_the_library(load, monkeypatch, reference, tiny_model_folder):
    notes = vllm_stand_in.install(monkeypatch, reference)
    engine = load(rope_scaling="yarn", rope_factor=4.0, dtype="bfloat16", load_in_4bit=True, gpus="0,1", context=1024)
    assert engine.context == 1024
    arguments = notes.arguments
    assert (arguments.model, arguments.tokenizer, arguments.skip_tokenizer_init) == (
        str(tiny_model_folder),
        None,
        True,
    )
    assert (arguments.dtype, arguments.quantization, arguments.tensor_parallel_size) == ("bfloat16", "bitsandbytes", 2)
    assert (arguments.max_model_len, arguments.max_num_seqs) == (1024, 4)
    rope = arguments.hf_overrides["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 512)
    engine.close()
    assert notes.shut
    with pytest.raises(InputError, match="20"):
        other = load()
        other.generate([Request([1, 5], GenerationArguments(max_new_tokens=2), top_logprobs=21)])


def test_without_vllm_the_command_is_printed(load, adapter, tiny_model_folder):
    folder = adapter("中文 adapter")
    with pytest.raises(InputError) as raised:
        load(
            adapters={"zh": folder},
            gpus="2,3",
            load_in_4bit=True,
            rope_scaling="ntk",
            rope_factor=2.0,
            template="llama-2",
        )
    text = str(raised.value)
    assert "vLLM is not installed here" in text and "--vllm_url http://127.0.0.1:8000" in text
    words = shlex.split(text.splitlines()[1])
    end = words.index("&&")
    assert words[:2] == ["printf", "%s"] and words[2] == CHAT_TEMPLATES["llama-2"]
    assert words[3:end] == [">", "chat_template.jinja"]
    assert words[end + 1 : end + 7] == [
        *("CUDA_VISIBLE_DEVICES=2,3", "vllm", "serve", str(tiny_model_folder), "--host", "127.0.0.1")
    ]
    flags = words[end + 7 :]
    values = {flag: flags[number + 1] for number, flag in enumerate(flags[:-1]) if flag.startswith("--")}
    overrides = json.loads(values.pop("--hf-overrides"))
    assert overrides["max_position_embeddings"] == 1024 and overrides["rope_parameters"]["rope_theta"] > 10_000
    assert values == {
        "--max-model-len": "1024",
        "--quantization": "bitsandbytes",
        "--tensor-parallel-size": "2",
        "--enable-lora": "--max-loras",
        "--max-loras": "1",
        "--max-lora-rank": "16",
        "--lora-modules": f"zh={folder}",
        "--chat-template": "chat_template.jinja",
    }


def test_a_template_of_the_models_own_needs_no_file():
    command = vllm_backends.serve_command({"model": "a b", "max_model_len": 9}, {}, None, None)
    assert command == "vllm serve 'a b' --host 127.0.0.1 --max-model-len 9"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"only_cpu": True}, "vLLM needs GPUs"),
        ({"load_in_8bit": True}, "4 bits only"),
        ({"rope_scaling": "auto-ntk"}, "auto-ntk: vLLM has one rotation"),
    ],
)
def test_what_vllm_cannot_load_is_refused(load, settings, words):
    with pytest.raises(InputError, match=words):
        load(**settings)
