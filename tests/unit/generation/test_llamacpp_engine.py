"""The llama.cpp engine against the transformers engine and llama-cpp-python itself, on one model in float32."""

import asyncio
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from support.fuzz_text import fuzz_texts
from support.models import with_template
from utils.core.arguments import GenerationArguments, InferenceArguments, RopeArguments
from utils.core.errors import InputError
from utils.generation import llamacpp_engine
from utils.generation.engine import Request
from utils.generation.loading import EnginePlan
from utils.generation.transformers_engine import TransformersEngine
from utils.gguf import llamacpp
from utils.gguf.metadata import read_metadata
from utils.gguf.tokenizer import check_same_tokens, load_gguf_tokenizer
from utils.models.rope import scale_rope
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import encode_raw, encode_text, encode_texts, load_tokenizer, save_tokenizer

pytestmark = pytest.mark.skipif(
    not llamacpp.is_installed(), reason="llama-cpp-python is not installed (requirements-llamacpp.txt)"
)
TEXTS = (
    "Once upon a time there was a small house near the river",
    "What is the capital of France?",
    "你好，我的猫",
    "x",
    "The quick brown fox jumps over the lazy dog. " * 4,
)


@pytest.fixture(scope="module")
def model_folder(tiny_model_folder, tmp_path_factory):
    """The tiny model with a chat template."""
    return with_template(tiny_model_folder, tmp_path_factory.mktemp("gguf") / "model")


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory):
    return export(model_folder, tmp_path_factory.mktemp("gguf") / "out")


def export(model_folder, out):
    import export_gguf

    export_gguf.main(
        export_gguf.ExportArguments(str(model_folder), output_dir=str(out), types=["f32"], self_test="none", threads=1)
    )
    return out


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(model_folder)


@pytest.fixture(scope="module")
def model(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()
    return model


@pytest.fixture(scope="module")
def reference(model, tokenizer):
    engine = TransformersEngine(model, tokenizer, CHAT_TEMPLATES["alpaca-2"], max_batch_size=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine(exported):
    engine = plan(exported).load(max_batch_size=4)
    yield engine
    engine.close()


def plan(path, chat=True, **settings):
    return EnginePlan(InferenceArguments(model_name_or_path=str(path), engine="llama.cpp", **settings), chat)


def greedy(tokenizer, **settings):
    settings = GenerationArguments(**{"max_new_tokens": 24, "temperature": 0.0, "repetition_penalty": 1.0, **settings})
    return [Request(encode_raw(text, tokenizer), settings) for text in TEXTS]


def ids(completions):
    return [completion.token_ids for completion in completions]


# ---------------------------------------------------------------- the same answers


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3, "min_new_tokens": 20}, {"frequency_penalty": 1}])
def test_greedy_answers_are_those_of_transformers(engine, reference, tokenizer, settings):
    requests = greedy(tokenizer, **settings)  # five at once in four slots
    assert ids(engine.generate(requests)) == ids(reference.generate(requests))


def test_greedy_answers_are_those_of_llama_cpp_python(engine, exported, tokenizer):
    requests = greedy(tokenizer)
    with llamacpp.open_model(exported / "model-F32.gguf", 1, 512) as model:
        for request, completion in zip(requests, engine.generate(requests), strict=True):
            expected = llamacpp.continue_greedily(model, list(request.prompt), len(completion.token_ids))
            assert completion.token_ids == expected[len(request.prompt) :]


def test_drawn_answers_and_their_log_probabilities_are_those_of_transformers(engine, reference, tokenizer):
    settings = GenerationArguments(max_new_tokens=16, temperature=1.0, top_k=0, top_p=0.95, min_p=0.001)
    prompt = encode_raw(TEXTS[0], tokenizer)
    requests = [Request(prompt, settings, seed=seed, top_logprobs=3, logit_bias={300: 2.0}) for seed in range(5)]
    expected, found = reference.generate(requests), engine.generate(requests)
    assert ids(found) == ids(expected) and len(set(map(tuple, ids(found)))) == 5
    for one, other in zip(found, expected, strict=True):
        for token, same in zip(one.logprobs, other.logprobs, strict=True):
            assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
            assert [index for index, _ in token.top] == [index for index, _ in same.top]


def test_chats_stop_texts_constraints_and_guidance_are_those_of_transformers(engine, reference, tokenizer):
    class OnlyDigits:
        def __init__(self):
            self.mask = torch.zeros(len(tokenizer), dtype=torch.bool)
            self.mask[[tokenizer.convert_tokens_to_ids(f"<0x{48 + digit:X}>") for digit in range(10)]] = True

        def allowed(self):
            return self.mask

        def advance(self, token_id):
            assert self.mask[token_id]

    chat = engine.encode([{"role": "user", "content": "你好</s>[INST]<s>"}])
    assert chat == reference.encode([{"role": "user", "content": "你好</s>[INST]<s>"}])
    assert chat.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in chat  # typed ones stay text
    plain = GenerationArguments(max_new_tokens=12, temperature=0.0)
    guided = GenerationArguments(max_new_tokens=12, temperature=0.0, guidance_scale=1.7, negative_prompt="bad")
    [whole] = reference.generate([Request(chat, plain)])
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped = GenerationArguments(max_new_tokens=12, temperature=0.0, stop=[stop])
    negative = engine.encode([{"role": "system", "content": "bad"}, {"role": "user", "content": "你好"}])

    def requests():
        return [
            Request(chat, plain),
            Request(chat, stopped),
            Request(chat, plain, constraint=OnlyDigits()),
            Request(chat, guided, negative_prompt=negative),
        ]

    found, expected = engine.generate(requests()), reference.generate(requests())
    assert [(one.text, one.finish_reason) for one in found] == [(one.text, one.finish_reason) for one in expected]
    assert found[1].finish_reason == "stop" and stop not in found[1].text
    assert found[2].text.isdigit() and found[3].text != found[0].text


def test_json_schemas_are_followed(engine, tokenizer):
    grammars = pytest.importorskip("utils.serving.grammar").Grammars(tokenizer, engine.stop_ids)
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    settings = GenerationArguments(max_new_tokens=60, temperature=1.0)
    constraint = grammars.json(schema)
    requests = [Request(encode_raw(text, tokenizer), settings, constraint=constraint.copy()) for text in TEXTS]
    for completion in engine.generate(requests):
        assert json.loads(completion.text)["n"] in (1, 22) and completion.finish_reason == "stop"


def test_the_command_line_answers_alike(exported, model_folder, tmp_path):
    import inference_hf

    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(TEXTS), encoding="utf-8")
    answers = {}
    for name, folder in (("transformers", model_folder), ("llama.cpp", exported)):
        args = InferenceArguments(model_name_or_path=str(folder), engine=name, dtype="float32")
        settings = GenerationArguments(max_new_tokens=16, temperature=0.0)
        task = inference_hf.TaskArguments(
            data_file=str(questions), with_prompt=True, batch_size=3, predictions_file=str(tmp_path / f"{name}.json")
        )
        inference_hf.main(args, settings, task)
        answers[name] = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert answers["transformers"] == answers["llama.cpp"] and len(answers["llama.cpp"]) == 5


def test_the_server_answers_alike(engine, reference):
    httpx, serving = pytest.importorskip("httpx"), pytest.importorskip("utils.serving.app")
    from utils.serving.arguments import ServingArguments

    messages = [{"role": "user", "content": "你好，my cat</s>"}]
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 20, "logprobs": True}

    async def ask(engine):
        app = serving.create_app(engine, ServingArguments(served_model_name=["m"]))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
            return (await client.post("/v1/chat/completions", json=body)).json()

    one, other = asyncio.run(ask(engine)), asyncio.run(ask(reference))
    assert one["choices"][0]["message"] == other["choices"][0]["message"]
    assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
    tokens = [item["token"] for item in one["choices"][0]["logprobs"]["content"]]
    assert tokens == [item["token"] for item in other["choices"][0]["logprobs"]["content"]]


def test_embeddings_are_those_of_transformers(monkeypatch, engine, reference, tokenizer):
    monkeypatch.setattr(llamacpp_engine, "EMBEDDING_BATCH", 7)  # most texts need several
    prompts = [encode_raw(text, tokenizer) for text in TEXTS]
    found = engine.embed(prompts)
    assert found.shape == (5, 32) and torch.allclose(found, reference.embed(prompts), atol=1e-5)
    with pytest.raises(InputError, match="600 tokens has no embedding; need 1 to 512"):
        engine.embed([[5] * 600])


def test_an_embedding_that_fails_leaves_running_answers_as_they_are(monkeypatch, engine, tokenizer):
    model = engine._model
    model.embed([1, 2], 8)  # its context is there
    requests = greedy(tokenizer, max_new_tokens=100, min_new_tokens=100)[:4]
    expected = ids(engine.generate(requests))
    decode = model._library.llama_decode
    monkeypatch.setattr(
        model._library, "llama_decode", lambda context, batch: context == model._embedder or decode(context, batch)
    )
    answers = [engine.submit(request) for request in requests]
    readers = [iter(answer) for answer in answers]
    for reader in readers:  # all are being written
        next(reader)
    with pytest.raises(RuntimeError, match="failed with status"):
        engine.embed([[1, 2, 3]])
    assert ids([answer.wait() for answer in answers]) == expected


# ---------------------------------------------------------------- batches, prefixes, memory


def test_answers_that_join_and_leave_are_those_they_would_be_alone(engine, tokenizer):
    lengths = [3, 17, 9, 1, 12, 5, 20, 7]
    requests = []
    for number, length in enumerate(lengths):
        settings = GenerationArguments(max_new_tokens=length, temperature=0.0)
        requests.append(Request(encode_raw(TEXTS[number % 5] * (1 + number % 2), tokenizer), settings))
    answers = []
    for request in requests:
        answers.append(engine.submit(request))
        next(iter(answers[-1]), None) if len(answers) == 2 else None
    # The second was left after its first token, which cancels it.
    together = [answer.wait() if number != 1 else None for number, answer in enumerate(answers)]
    alone = [engine.generate([request])[0] for request in requests]
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert number == 1 or one.token_ids == other.token_ids
    assert engine.statistics()["running"] == engine.statistics()["waiting"] == 0


def test_prompts_longer_than_a_batch_of_llama_cpp(monkeypatch, exported, engine, tokenizer):
    monkeypatch.setattr(llamacpp_engine, "BATCH", 16)
    small = plan(exported).load(max_batch_size=4)
    requests = greedy(tokenizer)
    assert ids(small.generate(requests)) == ids(engine.generate(requests))
    small.close()


def test_a_conversation_goes_on_from_what_was_computed(engine, reference, tokenizer):
    settings = GenerationArguments(max_new_tokens=10, temperature=0.0)
    prompt = encode_raw("There were four cats and a dog " * 3, tokenizer)
    known = None
    for _ in range(3):
        [completion] = engine.generate([Request(prompt, settings)])
        assert completion.token_ids == reference.generate([Request(prompt, settings)])[0].token_ids
        assert known is None or completion.num_cached_tokens == known
        known = len(prompt) + len(completion.token_ids) - 1  # the last token has not been computed
        prompt = prompt + completion.token_ids + encode_text(tokenizer, "and then?")
    # Other answers to the same beginning share what is stored, while the first one writes.
    requests = [
        Request(prompt, GenerationArguments(max_new_tokens=8, temperature=1.0), seed=seed) for seed in range(4)
    ]
    completions = engine.generate(requests)
    assert all(completion.num_cached_tokens >= known for completion in completions)
    assert ids(completions) == [reference.generate([request])[0].token_ids for request in requests]


def test_a_small_cache_makes_requests_wait_and_forgets_old_ones(monkeypatch, exported, engine, tokenizer):
    monkeypatch.setattr(llamacpp_engine, "choose_capacity", lambda *_: 512)
    small = plan(exported).load(max_batch_size=4)
    assert small._model.capacity == 512
    most = []
    original = small._model.forward

    def forward(first, rows):
        most.append(sum(map(len, small._model.tokens)) + sum(map(len, rows)))
        return original(first, rows)

    small._model.forward = forward
    settings = GenerationArguments(max_new_tokens=100, temperature=0.0, min_new_tokens=100)
    requests = [Request(encode_raw(f"{number} {TEXTS[4] * 2}", tokenizer), settings) for number in range(8)]
    assert ids(small.generate(requests)) == ids(engine.generate(requests))
    assert max(most) <= 512
    guided = GenerationArguments(max_new_tokens=200, guidance_scale=2.0, negative_prompt="bad")
    with pytest.raises(InputError, match=r"may have \d+ tokens together, the cache 512"):
        small.submit(Request([5] * 100, guided, negative_prompt=[5] * 100))
    small.close()


def test_how_much_is_kept_depends_on_the_memory():
    assert llamacpp_engine.choose_capacity(4096, 8, 100_000, 100 * 10**9) == 8 * 4096
    assert llamacpp_engine.choose_capacity(4096, 8, 100_000, 10**9) == 5000  # half of it
    with pytest.raises(InputError, match=r"4096 tokens need 0.4 GB, .* half of the 0.5 GB .* --max_context"):
        llamacpp_engine.choose_capacity(4096, 8, 100_000, 5 * 10**8)


def test_what_a_token_takes():
    """Llama-2-7B: 32 layers of 32 heads of 128 numbers, keys and values; Mixtral has 8 heads for them."""
    llama = {"llama.block_count": 32, "llama.attention.head_count": 32, "llama.embedding_length": 4096}
    assert llamacpp_engine.cache_numbers(llama) == 2 * 32 * 4096
    assert llamacpp_engine.cache_numbers(llama | {"llama.attention.head_count_kv": 8}) == 2 * 32 * 1024
    varying = {"llama.attention.head_count_kv": [8, 4], "llama.attention.key_length": 64}
    assert llamacpp_engine.cache_numbers(llama | varying) == 12 * (64 + 128)


def test_cancelled_answers_end_after_the_token_at_hand(engine, tokenizer):
    settings = GenerationArguments(max_new_tokens=300, min_new_tokens=300)
    answers = [engine.submit(Request(encode_raw(text, tokenizer), settings)) for text in (*TEXTS, *TEXTS)]
    next(iter(answers[0]))  # leaving the loop cancels
    for answer in answers[1:]:
        answer.cancel()
    assert {answer.wait().finish_reason for answer in answers[1:]} == {"cancelled"}
    assert engine.statistics()["running"] == engine.statistics()["waiting"] == 0
    with pytest.raises(InputError, match="beam search"):
        engine.submit(Request([5], GenerationArguments(num_beams=2)))
    with pytest.raises(InputError, match="context 512"):
        engine.submit(Request([5] * 512, settings))


def test_closing_ends_what_runs(exported, tokenizer):
    engine = plan(exported).load(max_batch_size=1)
    settings = GenerationArguments(max_new_tokens=400, min_new_tokens=400)
    answers = [engine.submit(Request(encode_raw("x", tokenizer), settings)) for _ in range(3)]
    engine.close()
    assert "cancelled" in {answer.wait().finish_reason for answer in answers}
    with pytest.raises(InputError, match="closed"):
        engine.submit(Request([5], settings))


# ---------------------------------------------------------------- long context


@pytest.mark.parametrize("scaling", [("pi", 2.0), ("ntk", 2.0), ("yarn", 4.0), ("pi+ntk", 4.0)])
def test_longer_windows_are_those_of_transformers(exported, model, tokenizer, scaling):
    name, factor = scaling
    engine = plan(exported, rope_scaling=name, rope_factor=factor).load(max_batch_size=2)
    assert engine.context == 512 * factor
    config = type(model.config).from_dict(model.config.to_dict())
    scale_rope(config, RopeArguments(rope_scaling=name, rope_factor=factor))
    scaled = type(model)(config).eval()
    scaled.load_state_dict(model.state_dict())
    ids = encode_raw(TEXTS[4] * 20, tokenizer)[:700]
    with torch.no_grad():
        expected = torch.log_softmax(scaled(torch.tensor([ids])).logits[0, -1], -1)
    settings = GenerationArguments(max_new_tokens=1, temperature=0.0)
    [completion] = engine.generate([Request(ids, settings, top_logprobs=20)])
    engine.close()
    for token, logprob in completion.logprobs[0].top:
        assert logprob == pytest.approx(float(expected[token]), abs=1e-3)


def test_a_rotation_for_each_request_is_refused(exported):
    with pytest.raises(InputError, match=r"auto-ntk: llama.cpp has one rotation"):
        plan(exported, rope_scaling="auto-ntk")


# ---------------------------------------------------------------- files and vocabularies


def test_the_file_brings_the_tokenizer(exported, tokenizer):
    found = plan(exported)
    texts = fuzz_texts(300, [TEXTS[0], TEXTS[2]])
    assert encode_texts(found.tokenizer, texts) == encode_texts(tokenizer, texts)
    assert found.tokenizer.chat_template == CHAT_TEMPLATES["alpaca-2"] == found.template
    assert found.stop_ids == [tokenizer.eos_token_id] and found.token_bytes == list(found.token_bytes)
    assert plan(exported, chat=False).template is None


def test_a_byte_level_file_brings_the_tokenizer(tmp_path):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from utils.gguf.vocabulary import PRE_TOKENIZERS

    (pattern,), _ = next(form for form, name in PRE_TOKENIZERS.items() if name == "qwen2")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>", "<|im_end|>"]
    )
    backend.train_from_iterator(["the quick brown fox 123 你好 " * 20, "don't they're"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    save_tokenizer(tokenizer, tmp_path / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    found = plan(export(tmp_path / "model", tmp_path / "out")).tokenizer
    texts = fuzz_texts(300, [TEXTS[0], TEXTS[2]])
    assert encode_texts(found, texts) == encode_texts(tokenizer, texts)
    assert (found.eos_token, found.bos_token_id) == ("<|end|>", None)
    assert found.convert_tokens_to_ids("<|im_end|>") in found.added_tokens_decoder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "llama-bpe", "qwen2", "gpt-2"])
def test_vocabularies_of_llama_cpp_are_cut_as_its_own_tests_say(name):
    folder = Path(os.environ.get("LLAMACPP_SOURCE", "")) / "models"
    path = folder / f"ggml-vocab-{name}.gguf"
    if "LLAMACPP_SOURCE" not in os.environ:
        pytest.skip("LLAMACPP_SOURCE, the folder of llama.cpp's source, is not set")
    tokenizer = load_gguf_tokenizer(path, read_metadata(path))
    check_same_tokens(path, tokenizer)
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(word) for word in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    assert encode_texts(tokenizer, texts)[: len(expected)] == expected and len(expected) > 40


def test_files_that_cannot_be_used_are_named(tmp_path, exported, base_tokenizer_folder, extended_tokenizer_folder):
    with pytest.raises(InputError, match="no such file or folder"):
        plan(tmp_path / "absent")
    with pytest.raises(InputError, match="the folder has none; make one with export_gguf"):
        plan(tmp_path)
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(exported / "model-F32.gguf", two / name)
    with pytest.raises(InputError, match=r"the folder has a.gguf, b.gguf; pass one of them"):
        plan(two)
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(InputError, match="no GGUF file"):
        plan(tmp_path / "text.gguf")
    whole = (exported / "model-F32.gguf").read_bytes()
    for size in (9, 40, 300, 4000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(InputError, match="damaged or truncated"):
            plan(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"llama.cpp cannot read cut.gguf"):
        plan(tmp_path / "cut.gguf").load()
    (tmp_path / "new.gguf").write_bytes(whole[:4] + struct.pack("<I", 9) + whole[8:])
    with pytest.raises(InputError, match="GGUF version 9"):
        plan(tmp_path / "new.gguf")
    assert plan(exported, tokenizer_name_or_path=str(base_tokenizer_folder)).tokenizer.chat_template is None
    with pytest.raises(InputError, match=r"cuts \d+ of \d+ texts otherwise than the file's vocabulary"):
        plan(exported, tokenizer_name_or_path=str(extended_tokenizer_folder))


def test_what_the_engine_does_not_do_is_refused(exported):
    with pytest.raises(InputError, match=r"export_gguf\.py --lora_model"):
        plan(exported, adapter_name_or_path="adapter")
    with pytest.raises(InputError, match="--types q4_k_m"):
        plan(exported, load_in_4bit=True)
    with pytest.raises(InputError, match="one model"):
        plan(exported).load(adapters={"other": "folder"})
    with pytest.raises(InputError, match="256 at once"):
        plan(exported).load(max_batch_size=300)


def test_a_file_without_a_model_is_named(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"metadata has no 'llama.context_length'; is it a language model"):
        plan(tmp_path / "vocabulary.gguf")


def test_of_a_file_in_parts_llama_cpp_is_given_the_first(tmp_path):
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(b"x" * 10 * number)
    assert llamacpp_engine.find_gguf_file(str(tmp_path)).name == "m-00001-of-00002.gguf"
