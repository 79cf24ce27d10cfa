"""Generation: batches against transformers' generate prompt by prompt, sampling against hand-computed distributions,
streams against whole answers, with characters cut into bytes."""

import math
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from utils import generation
from utils.arguments import GenerationArguments
from utils.files import InputError
from utils.generation import Generator, SeededSampling, TextDecoder, encode_raw
from utils.prompts import CHAT_TEMPLATES
from utils.tokenization import encode_text, load_tokenizer, token_surfaces

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


def write(monkeypatch, texts, tokenizer, stop=True):
    """Make the model write the texts, one for each row, whatever its weights say."""
    scripts = [encode_text(tokenizer, text) + [tokenizer.eos_token_id] * stop for text in texts]

    class Script:
        def __init__(self):
            self.step = 0

        def __call__(self, input_ids, scores):
            scores = torch.full_like(scores, -math.inf)
            for row, script in enumerate(scripts):
                scores[row, script[min(self.step, len(script) - 1)]] = 0
            self.step += 1
            return scores

    monkeypatch.setattr(generation, "_logits_processors", lambda *args: [Script()])
    return scripts


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
    monkeypatch.setattr(
        generation, "_logits_processors", lambda *args: [lambda ids, scores: seen.append(scores.clone()) or scores]
    )
    settings = GenerationArguments(max_new_tokens=1, repetition_penalty=2.0, **GREEDY)
    generator.generate(prompts, settings)
    for prompt in prompts:
        generator.generate([prompt], settings)
    torch.testing.assert_close(seen[0], torch.cat(seen[1:]), rtol=1e-4, atol=1e-4)


def test_beams_equal_plain_beam_search(generator, model, tokenizer):
    prompts = [encode_raw(text, tokenizer) for text in PROMPTS[:3]]
    settings = GenerationArguments(max_new_tokens=8, num_beams=3, repetition_penalty=1.0)
    for prompt, answer in zip(prompts, generator.generate(prompts, settings), strict=True):
        config = GenerationConfig(max_new_tokens=8, num_beams=3, do_sample=False, eos_token_id=[2], pad_token_id=0)
        expected = model.generate(input_ids=torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        assert answer.token_ids == expected.tolist()
    with pytest.raises(InputError, match="num_beams 1"):
        generator.stream(prompts[0], settings)


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


def test_seeded_sampling_draws_from_the_distribution():
    probabilities = torch.tensor([0.05, 0.5, 0.0, 0.15, 0.3])
    scores = probabilities.log().repeat(4000, 1)
    drawn = SeededSampling(range(4000))(None, scores).argmax(1)
    counts = torch.bincount(drawn, minlength=5).double()
    assert counts[2] == 0
    expected = probabilities.double() * 4000
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001; seeds are fixed, so this holds or not for good


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
    answers = generator.generate([prompt] * count, settings, seeds=range(count))
    counts = {index: 0 for index in kept}
    for answer in answers:
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
    with pytest.raises(InputError, match="not finite"):  # raised in the thread, seen by the reader
        list(generator.stream(prompt, GenerationArguments(max_new_tokens=4)))


# ---------------------------------------------------------------- streaming


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [True, False])
def test_a_stream_joined_is_the_whole_answer(monkeypatch, generator, tokenizer, text, stop):
    [script] = write(monkeypatch, [text], tokenizer, stop)
    settings = GenerationArguments(max_new_tokens=len(script))
    prompt = generator.encode([{"role": "user", "content": "写"}])
    [whole] = generator.generate([prompt], settings)
    stream = generator.stream(prompt, settings)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.completion == whole
    assert whole.finish_reason == ("stop" if stop else "length")
    assert len(whole.token_ids) == len(script)


def test_streams_of_the_real_model_equal_its_answers(generator, tokenizer):
    for settings in (GenerationArguments(max_new_tokens=60, **GREEDY), GenerationArguments(60, temperature=1.5)):
        for text in PROMPTS:
            prompt = encode_raw(text, tokenizer)
            stream = generator.stream(prompt, settings, seed=3, strip=False)
            assert "".join(stream) == generator.generate([prompt], settings, seeds=[3], strip=False)[0].text
            assert stream.completion == generator.generate([prompt], settings, seeds=[3], strip=False)[0]


def test_pieces_come_while_the_model_is_still_writing(monkeypatch, generator, tokenizer):
    write(monkeypatch, ["a b c d e f g h"], tokenizer)
    gate = threading.Semaphore(3)
    processors = generation._logits_processors
    monkeypatch.setattr(
        generation,
        "_logits_processors",
        lambda *args: [lambda ids, scores: gate.acquire() and scores, *processors(*args)],
    )
    stream = iter(generator.stream(encode_raw("x", tokenizer), GenerationArguments(max_new_tokens=30)))
    assert next(stream)  # the model waits at its fourth token
    gate.release(30)
    assert "".join(stream).endswith("h")


def test_a_stream_left_early_stops_the_model(monkeypatch, generator, tokenizer):
    write(monkeypatch, ["word " * 400], tokenizer)
    processors, steps = generation._logits_processors, []
    monkeypatch.setattr(
        generation,
        "_logits_processors",
        lambda *args: [lambda ids, scores: steps.append(1) or scores, *processors(*args)],
    )
    prompt = encode_raw("x", tokenizer)
    settings = GenerationArguments(max_new_tokens=400)
    threads = threading.active_count()
    for _ in generator.stream(prompt, settings):
        break
    assert threading.active_count() == threads
    assert len(steps) < 100
    unread = generator.stream(prompt, settings)
    unread.close()
    assert unread.completion is None and threading.active_count() == threads
    assert len(generator.generate([prompt], settings)[0].token_ids) == 400  # the model is as before


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
