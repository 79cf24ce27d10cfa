"""Generation: batches against transformers' generate prompt by prompt, sampling against hand-computed distributions,
streams against whole answers, with characters cut into bytes; slots that answers join and leave."""

import math
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from utils.core.arguments import GenerationArguments
from utils.core.errors import InputError
from utils.generation import batching
from utils.generation.batching import BatchScheduler, Generator, forward
from utils.generation.engine import Answer, Request, TextDecoder, TokenSequence
from utils.generation.sampling import choose, process_logits
from utils.generation.transformers_engine import TransformersEngine
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import encode_raw, encode_text, load_tokenizer, token_surfaces

GREEDY = {"temperature": 0.0}
# Characters of two to four bytes, joined emoji, combining marks, unusual spaces: none is in the vocabulary.
TEXTS = (
    "你好，世界！",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 end",
    "naïve café é ℝ𝔸",
    "tab\tand\n\nlines\r\n",
    "\u3000全角　\u00a0space",
    "a" * 40 + "龘",
)
PROMPTS = (
    "The",
    "Once upon a time there was a small house near the river",
    "你好",
    "What is the capital of France?",
    "x y",
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder)


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    model.generation_config = GenerationConfig()
    return model


@pytest.fixture
def generator(model, tokenizer):
    return Generator(model, tokenizer, CHAT_TEMPLATES["alpaca-2"])


@pytest.fixture(scope="module")
def byte_level_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["the quick brown fox " * 20],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|im_end|>"]),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture
def engine(model, tokenizer):
    engine = TransformersEngine(model, tokenizer, CHAT_TEMPLATES["alpaca-2"], max_batch_size=4)
    yield engine
    engine.close()


def write(monkeypatch, text, tokenizer, stop=True, before=lambda: None):
    """Make the model write the text, whatever its weights say."""
    script = encode_text(tokenizer, text) + [tokenizer.eos_token_id] * stop

    def choose_script(logits, samplers):
        before()
        return [script[min(sampler.length, len(script) - 1)] for sampler in samplers], [None] * len(samplers)

    monkeypatch.setattr(batching, "choose", choose_script)
    return script


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text_and_no_character_is_cut(kind, text, tokenizer, byte_level_tokenizer):
    tokenizer = tokenizer if kind == "sentencepiece" else byte_level_tokenizer
    ids = encode_text(tokenizer, text)
    decoder = TextDecoder(token_surfaces(tokenizer), strip=False)
    pieces = [decoder.push([index]) for index in ids] + [decoder.finish()]
    assert "".join(pieces).removeprefix(" ") == text == tokenizer.decode(ids).removeprefix(" ")
    assert not any("\ufffd" in piece for piece in pieces)
    stripping = TextDecoder(token_surfaces(tokenizer), strip=True)
    assert "".join([stripping.push([index]) for index in ids] + [stripping.finish()]) == text.strip()


def test_every_token_is_looked_at_once(tokenizer):
    looked = []

    class Surfaces(list):
        def __getitem__(self, index):
            looked.append(index)
            return super().__getitem__(index)

    ids = encode_text(tokenizer, "你好 hello\n \n" * 500)
    decoder = TextDecoder(Surfaces(token_surfaces(tokenizer)), strip=True)
    for index in ids:
        decoder.push([index])
    decoder.finish()
    assert looked == ids


def test_half_a_character_at_the_end_is_one_replacement_mark(tokenizer):
    ids = encode_text(tokenizer, "好")[:-1]
    decoder = TextDecoder(token_surfaces(tokenizer), strip=False)
    assert "".join(decoder.push([index]) for index in ids).strip() == ""
    assert decoder.finish() == "\ufffd"


def test_ids_of_padded_rows_stand_for_nothing(tokenizer):
    assert TextDecoder(token_surfaces(tokenizer), strip=False).push([len(tokenizer) + 7]) == ""


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("penalty", [1.0, 1.1, 1.7])
def test_a_batch_gives_each_prompt_what_plain_generate_gives_it_alone(generator, model, tokenizer, penalty):
    prompts = [encode_raw(text, tokenizer) for text in PROMPTS]
    # The random model seldom writes EOS: let a token it does write end answers too.
    settings = GenerationArguments(max_new_tokens=24, repetition_penalty=penalty, **GREEDY)
    common = generator.generate(prompts, settings)[0].token_ids[10]
    generator.stop_ids = [tokenizer.eos_token_id, common]
    answers = generator.generate(prompts, settings)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = model.generate(
            input_ids=torch.tensor([prompt]),
            generation_config=GenerationConfig(
                max_new_tokens=24,
                do_sample=False,
                repetition_penalty=penalty,
                eos_token_id=generator.stop_ids,
                pad_token_id=0,
            ),
        )[0, len(prompt) :].tolist()
        assert answer.token_ids == expected
        assert answer.finish_reason == ("stop" if expected[-1] in generator.stop_ids else "length")
        assert answer.num_prompt_tokens == len(prompt)
        text_ids = expected[:-1] if answer.finish_reason == "stop" else expected
        assert answer.text == tokenizer.decode(text_ids, skip_special_tokens=True).strip()
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


def test_padding_changes_no_logit(monkeypatch, generator, tokenizer):
    """Neither through attention and positions, nor through the repetition penalty."""
    prompts = [encode_raw(text, tokenizer) for text in PROMPTS]
    seen = []

    def look(logits, samplers):
        seen.append(process_logits(logits, samplers))
        return choose(logits, samplers)

    monkeypatch.setattr(batching, "choose", look)
    settings = GenerationArguments(max_new_tokens=1, repetition_penalty=2.0, **GREEDY)
    generator.generate(prompts, settings)
    for prompt in prompts:
        generator.generate([prompt], settings)
    torch.testing.assert_close(seen[0], torch.cat(seen[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_next_prompt_joins_when_an_answer_ends(monkeypatch, generator, tokenizer):
    """With room for two, the answers are those of each alone, in the prompts' order, in fewer steps than by twos."""
    steps = []

    def count(model, cache, first, tokens, keep):
        steps.extend([len(tokens)] if max(map(len, tokens)) == 1 else [])  # prompts have more tokens
        return forward(model, cache, first, tokens, keep)

    monkeypatch.setattr(batching, "forward", count)
    monkeypatch.setattr(generator, "stop_ids", list(range(3, 40)))  # so that answers differ in length
    settings = GenerationArguments(max_new_tokens=30, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    prompts, seeds = [encode_raw(text, tokenizer) for text in PROMPTS] * 4, list(range(20))
    alone = [generator.generate([prompt], settings, [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    lengths = [len(answer.token_ids) for answer in alone]
    assert len(set(lengths)) > 5
    steps.clear()
    answers = generator.generate(prompts, settings, seeds, max_batch_size=2)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
    joined, together = len(steps), max(steps)
    steps.clear()
    for start in range(0, len(prompts), 2):
        generator.generate(prompts[start : start + 2], settings, seeds[start : start + 2])
    assert together == 2 and joined < 0.9 * len(steps), (joined, len(steps))


def test_beams_equal_plain_beam_search(engine, model, tokenizer):
    prompts = [encode_raw(text, tokenizer) for text in PROMPTS[:3]]
    settings = GenerationArguments(max_new_tokens=8, num_beams=3, repetition_penalty=1.0)
    answers = engine.generate([Request(prompt, settings) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        config = GenerationConfig(max_new_tokens=8, num_beams=3, do_sample=False, eos_token_id=[2], pad_token_id=0)
        expected = model.generate(input_ids=torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        assert answer.token_ids == expected.tolist()
    with pytest.raises(InputError, match="num_beams 1"):
        engine.submit(Request(prompts[0], settings))


def test_the_context_limits_each_answer_by_its_own_prompt(generator, tokenizer):
    short, long = encode_raw("The", tokenizer), encode_raw("The", tokenizer) * 251
    settings = GenerationArguments(max_new_tokens=30, **GREEDY)
    answers = generator.generate([short, long], settings)
    assert (len(answers[0].token_ids), len(answers[1].token_ids)) == (30, 512 - len(long))
    assert answers[0] == generator.generate([short], settings)[0]
    with pytest.raises(InputError, match="context 512"):
        generator.generate([short * 300], settings)
    with pytest.raises(InputError, match="empty"):
        generator.generate([[]], settings)


def test_settings_of_the_model_folder_do_not_leak_in(generator, model, tokenizer):
    """load_for_inference clears generation_config; what GenerationArguments set wins in any case."""
    prompts = [encode_raw(text, tokenizer) for text in PROMPTS]
    settings = GenerationArguments(max_new_tokens=12, **GREEDY)
    expected = generator.generate(prompts, settings)
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=2.0, max_length=20)
    try:
        assert generator.generate(prompts, settings) == expected
    finally:
        model.generation_config = GenerationConfig()


# ---------------------------------------------------------------- sampling


def test_log_probabilities_are_the_models_own(engine, model, tokenizer):
    prompt = encode_raw("What is the", tokenizer)
    settings = GenerationArguments(max_new_tokens=5, min_new_tokens=5, temperature=1.5, repetition_penalty=1.9)
    completion = engine.submit(Request(prompt, settings, top_logprobs=3)).wait()
    ids = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        expected = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for position, found in enumerate(completion.logprobs):
        assert found.token_id == completion.token_ids[position]
        assert found.logprob == pytest.approx(float(expected[position, found.token_id]), abs=1e-4)
        values, indices = expected[position].topk(3)
        assert [index for index, _ in found.top] == indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert len(completion.logprobs) == 5


@pytest.mark.slow
def test_first_tokens_follow_temperature_top_k_top_p_and_penalty(generator, model, tokenizer):
    """Against the distribution computed here step by step from the model's logits."""
    prompt = encode_raw("What is the", tokenizer)
    settings = GenerationArguments(max_new_tokens=1, temperature=1.3, top_k=12, top_p=0.8, repetition_penalty=1.4)
    logits = model(torch.tensor([prompt])).logits[0, -1].double()
    for index in set(prompt):
        logits[index] = logits[index] / 1.4 if logits[index] > 0 else logits[index] * 1.4
    top = sorted(((value / 1.3, index) for index, value in enumerate(logits.tolist())), reverse=True)[:12]
    weights = [math.exp(value - top[0][0]) for value, _ in top]
    kept, reached = {}, 0.0
    for weight, (_, index) in zip(weights, top, strict=True):
        if reached < 0.8:
            kept[index] = weight / sum(weights)
        reached += weight / sum(weights)
    total = sum(kept.values())
    count = 3000
    batches = [range(start, start + 100) for start in range(0, count, 100)]
    counts = {index: 0 for index in kept}
    for answer in [a for seeds in batches for a in generator.generate([prompt] * 100, settings, seeds)]:
        counts[answer.token_ids[0]] += 1  # a KeyError would be a token that should have been left out
    chi_square = sum((counts[i] - count * p / total) ** 2 / (count * p / total) for i, p in kept.items())
    assert 1 < len(kept) < 12
    assert chi_square < len(kept) - 1 + 5 * math.sqrt(2 * len(kept))


def test_a_sampled_answer_depends_on_its_seed_alone(generator, tokenizer):
    prompts = [encode_raw(text, tokenizer) for text in PROMPTS]
    settings = GenerationArguments(max_new_tokens=20, temperature=1.0, top_k=0, top_p=1.0)
    together = generator.generate(prompts, settings, seeds=[7, 8, 9, 10, 11])
    torch.manual_seed(999)  # the global generator plays no part
    for prompt, seed, answer in zip(prompts, range(7, 12), together, strict=True):
        assert generator.generate([prompt], settings, seeds=[seed]) == [answer]
    from_seven = GenerationArguments(max_new_tokens=20, temperature=1.0, top_k=0, top_p=1.0, seed=7)
    assert generator.generate(prompts, from_seven) == together
    assert generator.generate(prompts[:1], settings, seeds=[8]) != together[:1]


def test_logits_that_are_no_numbers_are_an_error(tiny_model_folder, tokenizer):
    broken = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    broken.lm_head.weight.data[5] = math.nan
    generator, prompt = Generator(broken, tokenizer), encode_raw("a", tokenizer)
    with pytest.raises(InputError, match=r"not finite.*--dtype"):
        generator.generate([prompt], GenerationArguments(max_new_tokens=4))
    engine = TransformersEngine(broken, tokenizer, None)
    with pytest.raises(InputError, match="not finite"):  # raised in the thread, seen by the reader
        list(engine.submit(Request(prompt, GenerationArguments(max_new_tokens=4))))
    with torch.no_grad():
        broken.lm_head.weight[5] = 0
    assert engine.submit(Request(prompt, GenerationArguments(max_new_tokens=4))).wait().token_ids, "it goes on"
    engine.close()


# ---------------------------------------------------------------- streaming


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [True, False])
def test_a_stream_joined_is_the_whole_answer(monkeypatch, generator, engine, tokenizer, text, stop):
    script = write(monkeypatch, text, tokenizer, stop)
    settings = GenerationArguments(max_new_tokens=len(script))
    prompt = generator.encode([{"role": "user", "content": "写"}])
    [whole] = generator.generate([prompt], settings)
    answer = engine.submit(Request(prompt, settings))
    pieces = [delta.text for delta in answer]
    assert "".join(pieces) == whole.text == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert answer.completion == whole
    assert whole.finish_reason == ("stop" if stop else "length")
    assert len(whole.token_ids) == len(script)


def test_pieces_come_while_the_model_is_still_writing(monkeypatch, engine, tokenizer):
    gate = threading.Semaphore(3)
    write(monkeypatch, "a b c d e f g h", tokenizer, before=gate.acquire)
    answer = engine.submit(Request(encode_raw("x", tokenizer), GenerationArguments(max_new_tokens=30)))
    stream = iter(answer)
    first = next(stream).text + next(stream).text
    assert first  # the model waits at its fourth token
    gate.release(30)
    assert (first + "".join(delta.text for delta in stream)).endswith("h")


def test_an_answer_left_early_frees_its_slot(monkeypatch, engine, tokenizer):
    steps = []
    write(monkeypatch, "word " * 400, tokenizer, before=lambda: steps.append(1))
    request = Request(encode_raw("x", tokenizer), GenerationArguments(max_new_tokens=400))
    for _ in engine.submit(request):
        break
    answer = engine.submit(request)
    answer.cancel()
    assert answer.wait().finish_reason == "cancelled"
    waited = [engine.submit(request) for _ in range(9)]  # four slots: five wait
    for one in waited:
        one.cancel()
    assert {one.wait().finish_reason for one in waited} == {"cancelled"}
    assert engine.statistics()["running"] == engine.statistics()["waiting"] == 0
    assert len(steps) < 200


def test_closing_ends_what_runs_and_refuses_what_comes(monkeypatch, model, tokenizer):
    write(monkeypatch, "word " * 400, tokenizer)
    engine = TransformersEngine(model, tokenizer, None, max_batch_size=1)
    request = Request(encode_raw("x", tokenizer), GenerationArguments(max_new_tokens=400))
    answers = [engine.submit(request) for _ in range(3)]
    engine.close()
    assert {answer.wait().finish_reason for answer in answers} <= {"cancelled", "length"}
    with pytest.raises(InputError, match="closed"):
        engine.submit(request)


# ---------------------------------------------------------------- stop texts


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["world"], "Hello "),
        (["o w", "lo"], "Hel"),
        (["never"], "Hello world, hello end"),
        (["end!"], "Hello world, hello end"),  # its beginning is held back, then given
        (["hello", ", h"], "Hello world"),
        (["\n"], "Hello world, hello end"),
    ],
)
def test_a_stop_text_ends_the_answer_across_tokens(tokenizer, stops, expected):
    text = "Hello world, hello end"
    decoder = TextDecoder(token_surfaces(tokenizer), strip=False, stops=stops)
    pieces = [decoder.push([index]) for index in encode_text(tokenizer, text)]
    shown = list(pieces)
    pieces.append(decoder.finish())
    assert "".join(pieces).lstrip() == expected
    assert decoder.stopped == (expected != text)
    for stop in stops:
        assert not any(stop in "".join(shown[:end]) for end in range(len(shown) + 1))


def test_stop_texts_are_seen_before_white_space_is_left_out(monkeypatch, engine, tokenizer):
    write(monkeypatch, "one\n\ntwo", tokenizer)
    settings = GenerationArguments(max_new_tokens=30, stop=["\n\n"])
    completion = engine.submit(Request(encode_raw("x", tokenizer), settings)).wait()
    assert (completion.text, completion.finish_reason) == ("one", "stop")


# ---------------------------------------------------------------- slots


def answered(scheduler, generator, requests, join=1):
    """Answer requests that come one by one, `join` steps apart."""
    sequences = []
    for request in requests:
        sequences.append(TokenSequence(request, generator, Answer(len(request.prompt))))
        scheduler.waiting.append(sequences[-1])
        for _ in range(join):
            scheduler.step()
    while scheduler.step():
        pass
    return [sequence.answer.completion for sequence in sequences]


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("join", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_answers_that_join_and_leave_are_those_they_would_be_alone(generator, tokenizer, slots, join):
    generated = torch.Generator().manual_seed(slots)
    texts = [PROMPTS[number % 5] * (1 + number % 3) for number in range(12)]
    requests = [
        Request(
            encode_raw(text, tokenizer),
            GenerationArguments(max_new_tokens=int(torch.randint(1, 12, (), generator=generated)), **GREEDY),
        )
        for text in texts
    ]
    together = answered(BatchScheduler(generator.model, slots), generator, requests, join)
    for request, completion in zip(requests, together, strict=True):
        [alone] = generator.generate([request.prompt], request.settings)
        assert (completion.token_ids, completion.text) == (alone.token_ids, alone.text)


def test_long_prompts_are_computed_in_parts_beside_those_that_write(monkeypatch, generator, tokenizer):
    monkeypatch.setattr(batching, "PREFILL_CHUNK", 7)
    settings = GenerationArguments(max_new_tokens=30, **GREEDY)
    requests = [Request(encode_raw(text * 9, tokenizer), settings) for text in PROMPTS]
    scheduler = BatchScheduler(generator.model, 8)
    together = answered(scheduler, generator, requests, join=2)
    for request, completion in zip(requests, together, strict=True):
        assert completion.token_ids == generator.generate([request.prompt], settings)[0].token_ids
    assert scheduler.counts["prompt_tokens"] == sum(len(request.prompt) for request in requests)


def test_a_conversation_goes_on_from_what_was_computed(generator, tokenizer):
    settings = GenerationArguments(max_new_tokens=12, **GREEDY)
    scheduler = BatchScheduler(generator.model, 3)
    prompt = encode_raw("Once upon a time there was a small house near the river", tokenizer)
    other = encode_raw("What is the capital of France? " * 3, tokenizer)
    known = 0
    for _ in range(4):
        [completion, _] = answered(scheduler, generator, [Request(prompt, settings), Request(other, settings)], join=0)
        assert completion.token_ids == generator.generate([prompt], settings)[0].token_ids
        assert completion.num_cached_tokens == known
        known = len(prompt) + len(completion.token_ids) - 1  # the last token has not been computed
        prompt = prompt + completion.token_ids + encode_text(tokenizer, "and then?")


def test_answers_to_one_prompt_compute_it_once(generator, tokenizer):
    settings = GenerationArguments(max_new_tokens=6, temperature=1.0)
    prompt = encode_raw("Once upon a time there was a small house near the river", tokenizer)
    scheduler = BatchScheduler(generator.model, 8)
    requests = [Request(prompt, settings, seed=seed) for seed in range(5)]
    completions = answered(scheduler, generator, requests, join=0)
    for seed, completion in enumerate(completions):
        assert completion.token_ids == generator.generate([prompt], settings, [seed])[0].token_ids
    assert [completion.num_cached_tokens for completion in completions] == [0] + [len(prompt) - 1] * 4


def test_guidance_equals_transformers(generator, model, tokenizer):
    settings = GenerationArguments(max_new_tokens=10, guidance_scale=1.8, negative_prompt="bad", **GREEDY)
    settings.repetition_penalty = 1.0
    prompts = [encode_raw(text, tokenizer) for text in PROMPTS[:3]]
    negative = encode_raw("A bad answer to all", tokenizer)
    requests = [Request(prompt, settings, negative_prompt=negative) for prompt in prompts]
    guided = answered(BatchScheduler(generator.model, 5), generator, requests, join=0)  # two at a time
    for prompt, completion in zip(prompts, guided, strict=True):
        expected = model.generate(
            input_ids=torch.tensor([prompt]),
            negative_prompt_ids=torch.tensor([negative]),
            guidance_scale=1.8,
            generation_config=GenerationConfig(max_new_tokens=10, eos_token_id=[2], pad_token_id=0),
        )[0, len(prompt) :]
        assert completion.token_ids == expected.tolist()
    plain = generator.generate(prompts, GenerationArguments(max_new_tokens=10, repetition_penalty=1.0, **GREEDY))
    assert [c.token_ids for c in plain] != [c.token_ids for c in guided]


def test_a_guided_prompt_that_uses_a_step_up_is_not_parted_from_its_guide(monkeypatch, generator, tokenizer):
    settings = GenerationArguments(max_new_tokens=6, guidance_scale=1.8, negative_prompt="bad", **GREEDY)
    negative = encode_raw("A bad answer to all", tokenizer)
    requests = [Request(encode_raw(text, tokenizer), settings, negative_prompt=negative) for text in PROMPTS[:3]]
    together = answered(BatchScheduler(generator.model, 6), generator, requests, join=0)
    monkeypatch.setattr(batching, "PREFILL_TOKENS", 5)
    monkeypatch.setattr(batching, "PREFILL_CHUNK", 2)
    for join in (0, 1):
        apart = answered(BatchScheduler(generator.model, 6), generator, requests, join)
        assert [one.token_ids for one in apart] == [one.token_ids for one in together]


def test_a_sliding_window_is_kept_to(tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.3,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    generator = Generator(model, tokenizer)
    prompts = [encode_raw(text * 2, tokenizer) for text in PROMPTS]
    settings = GenerationArguments(max_new_tokens=12, repetition_penalty=1.0, **GREEDY)
    for prompt, completion in zip(prompts, generator.generate(prompts, settings), strict=True):
        ids = list(prompt)
        for token in completion.token_ids:  # without a cache
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_embeddings_are_masked_means(engine, model, tokenizer):
    prompts = [encode_raw(text, tokenizer) for text in PROMPTS]
    for prompt, found in zip(prompts, engine.embed(prompts), strict=True):
        with torch.no_grad():
            mean = model.model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found, mean / mean.norm(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- prompts


def test_the_end_token_of_the_template_stops_answers_too(model, byte_level_tokenizer):
    template = "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    assert Generator(model, byte_level_tokenizer, template).stop_ids == [0, 1]
    assert Generator(model, byte_level_tokenizer).stop_ids == [0]


def test_history_is_trimmed_by_whole_exchanges_and_keeps_the_system_message(generator):
    messages = [{"role": "system", "content": "be short"}]
    for number in range(30):
        messages += [
            {"role": "user", "content": f"question {number} " + "word " * 5},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    messages.append({"role": "user", "content": "last"})
    kept, dropped = generator.fit_history(messages, 100)
    assert kept[0] == messages[0] and kept[-1] == messages[-1]
    assert kept[1]["role"] == "user" and len(kept) + dropped == len(messages) and dropped % 2 == 0 and dropped > 0
    assert len(generator.encode(kept)) + 100 <= 512
    one_more = [messages[0], *messages[1 + dropped - 2 :]]
    assert len(generator.encode(one_more)) + 100 > 512
    assert generator.fit_history(messages[:3], 100) == (messages[:3], 0)
    huge = [{"role": "user", "content": "word " * 400}]
    assert generator.fit_history(huge, 100) == (huge, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"num_beams": 0}, "num_beams"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        GenerationArguments(**changes)


def test_the_forerunners_settings_are_the_defaults():
    settings = GenerationArguments()
    assert (settings.temperature, settings.top_k, settings.top_p, settings.do_sample) == (0.2, 40, 0.9, True)
    assert (settings.num_beams, settings.repetition_penalty, settings.max_new_tokens) == (1, 1.1, 400)
