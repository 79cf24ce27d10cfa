"""Speculative decoding: greedy answers token for token those of plain decoding, whatever drafts; sampled answers
against the model's distribution, computed here by going through all sequences; how much is drafted; refusals."""

import itertools
import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from utils.core.arguments import GenerationArguments, InferenceArguments, SpeculationArguments
from utils.core.errors import InputError
from utils.generation import speculation
from utils.generation.batching import BatchScheduler, Generator
from utils.generation.drafts import (
    EarlyExitDraft,
    ModelDraft,
    PromptLookup,
    RetokenizedDraft,
    _Occurrences,
    same_vocabulary,
)
from utils.generation.engine import Answer, Request, TokenSequence
from utils.generation.loading import DraftPlan
from utils.generation.sampling import Sampler
from utils.generation.speculation import (
    Clock,
    DraftLengthController,
    Speculation,
    SpeculativeScheduler,
    rejection_sample,
)
from utils.generation.transformers_engine import TransformersEngine
from utils.text.tokenizer import encode_raw, encode_text, load_tokenizer
from utils.weights.config import load_config

GREEDY = {"temperature": 0.0}
WORDS = ["the", "house", "river", "small", "time", "France", "capital", "where", "near", "upon", "Once", "you", "of"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder)


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    model.generation_config = GenerationConfig()
    return model


@pytest.fixture(scope="module")
def generator(model, tokenizer):
    return Generator(model, tokenizer)


@pytest.fixture(scope="module")
def similar(tiny_model_folder):
    """A model that often agrees with the one that checks, and has more rows."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    generated = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generated) * 0.02 * parameter.std().nan_to_num(0))
        model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    return model


@pytest.fixture(scope="module")
def kinds(model, similar, tokenizer, extended_tokenizer_folder):
    """Everything that drafts, by name."""
    other_tokenizer = load_tokenizer(extended_tokenizer_folder)
    torch.manual_seed(1)
    config = LlamaConfig(**model.config.to_dict() | {"vocab_size": len(other_tokenizer) + 5, "num_hidden_layers": 1})
    narrow = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"vocab_size": model.config.vocab_size - 7}))
    return {
        "similar": partial(ModelDraft, similar),
        "itself": partial(ModelDraft, model),
        "fewer rows": partial(ModelDraft, narrow.eval()),
        "layers": partial(EarlyExitDraft, 1),
        "lookup": PromptLookup,
        "other vocabulary": partial(RetokenizedDraft, LlamaForCausalLM(config).eval(), other_tokenizer, tokenizer),
        "itself in text": partial(RetokenizedDraft, model, tokenizer, tokenizer),
    }


def prompts_of(tokenizer, count, seed=0):
    generated = torch.Generator().manual_seed(seed)
    texts = []
    for number in range(count):
        picked = torch.randint(0, len(WORDS), (2 + number % 13,), generator=generated).tolist()
        texts.append(" ".join(WORDS[word] for word in picked))
    return [encode_raw(text * (1 + number % 3), tokenizer) for number, text in enumerate(texts)]


def answered(scheduler, prompter, requests, join=1):
    """Answer requests that come one by one, `join` steps apart."""
    sequences = []
    for request in requests:
        sequences.append(TokenSequence(request, prompter, Answer(len(request.prompt))))
        scheduler.waiting.append(sequences[-1])
        for _ in range(join):
            scheduler.step()
    while scheduler.step():
        pass
    return [sequence.answer.completion for sequence in sequences]


def settings_of(number, **changes):
    """Settings that differ from request to request: lengths, penalties, least lengths, stop texts."""
    kinds = [
        {"repetition_penalty": 1.0},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.0},
        {"min_new_tokens": 9, "repetition_penalty": 1.0},
        {"stop": ["e", "th"]},
    ]
    return GenerationArguments(**{"max_new_tokens": 1 + 7 * number % 41 + 9, **GREEDY} | kinds[number % 5] | changes)


def plain_answers(generator, requests):
    """What a decoder without drafts answers."""
    return answered(BatchScheduler(generator.model, 16), generator, requests, join=0)


def compare(generator, kind, requests, plain, slots, join, k):
    """Check that drafts change no answer; returns what the decoder counted."""
    scheduler = SpeculativeScheduler(generator.model, slots, None, Speculation(kind, k))
    drafted = answered(scheduler, generator, requests, join)
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert [(c.text, c.finish_reason) for c in drafted] == [(c.text, c.finish_reason) for c in plain]
    assert scheduler.counts["new_tokens"] == sum(len(c.token_ids) for c in plain)
    assert 0 <= scheduler.counts["accepted"] <= scheduler.counts["drafted"]
    assert scheduler.counts["passes"] >= scheduler.counts["new_tokens"] - scheduler.counts["accepted"]
    return scheduler.counts


# ---------------------------------------------------------------- greedy


KINDS = ["itself", "fewer rows", "layers", "lookup", "other vocabulary"]
KINDS += [pytest.param(name, marks=pytest.mark.slow) for name in ("similar", "itself in text")]


@pytest.fixture(scope="module")
def twenty(generator, tokenizer):
    """Requests, and what plain decoding answers."""
    generator.stop_ids = [tokenizer.eos_token_id, 260, 300]  # a random model seldom writes the end token
    prompts = prompts_of(tokenizer, 20)
    requests = [Request(prompt, settings_of(number)) for number, prompt in enumerate(prompts)]
    return requests, plain_answers(generator, requests)


@pytest.mark.parametrize("name", KINDS)
def test_greedy_answers_are_those_of_plain_decoding(name, kinds, generator, twenty):
    requests, plain = twenty
    assert {completion.finish_reason for completion in plain} == {"stop", "length"}
    for slots, join, k in [(3, 2, 0)] if name != "similar" else [(3, 2, 4), (4, 0, 0), (6, 1, 2)]:
        counts = compare(generator, kinds[name], requests, plain, slots, join, k)
        if name in ("itself", "similar") and slots < 6:  # with six rows hardly anything is drafted
            assert counts["accepted"] > counts["drafted"] * 0.4


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_two_hundred_greedy_answers(name, kinds, generator, tokenizer):
    generator.stop_ids = [tokenizer.eos_token_id, 260, 300]
    requests = [
        Request(prompt, settings_of(number, max_new_tokens=60))
        for number, prompt in enumerate(prompts_of(tokenizer, 200, seed=9))
    ]
    counts = compare(generator, kinds[name], requests, plain_answers(generator, requests), slots=4, join=2, k=0)
    assert counts["drafted"]


def test_a_draft_that_is_always_right_saves_passes(kinds, generator, tokenizer):
    generator.stop_ids = []
    request = Request(prompts_of(tokenizer, 3)[2], GenerationArguments(max_new_tokens=31, **GREEDY))
    scheduler = SpeculativeScheduler(generator.model, 1, None, Speculation(kinds["itself"], 4))
    answered(scheduler, generator, [request])
    # The prompt's pass and 6 of 5 tokens each; one more if a pass was left without a draft for the clock.
    assert scheduler.counts["passes"] <= 8
    assert scheduler.counts["accepted"] == scheduler.counts["drafted"]


def test_log_probabilities_are_there_for_drafted_tokens_too(kinds, generator, tokenizer):
    prompt = prompts_of(tokenizer, 2)[1]
    for changes in (GREEDY, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}):
        request = Request(prompt, GenerationArguments(max_new_tokens=20, **changes), top_logprobs=2)
        plain = plain_answers(generator, [request])
        compare(generator, kinds["similar"], [request], plain, slots=1, join=0, k=3)
        scheduler = SpeculativeScheduler(generator.model, 1, None, Speculation(kinds["similar"], 3))
        [drafted] = answered(scheduler, generator, [request])
        assert [found.token_id for found in drafted.logprobs] == drafted.token_ids
        for one, other in zip(drafted.logprobs, plain[0].logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_grammar_is_kept_to(kinds, generator, tokenizer):
    class Even:
        """Only even tokens, and only such as differ from the one before."""

        def __init__(self):
            self.last = None

        def allowed(self):
            allowed = torch.arange(generator.model.config.vocab_size) % 2 == 0
            if self.last is not None:
                allowed[self.last] = False
            return allowed

        def advance(self, token_id):
            self.last = token_id

    prompt = prompts_of(tokenizer, 1)[0]
    settings = GenerationArguments(max_new_tokens=25, **GREEDY)
    [plain] = answered(BatchScheduler(generator.model, 1), generator, [Request(prompt, settings, constraint=Even())])
    for name in ("similar", "layers"):
        scheduler = SpeculativeScheduler(generator.model, 1, None, Speculation(kinds[name], 3))
        [drafted] = answered(scheduler, generator, [Request(prompt, settings, constraint=Even())])
        assert drafted.token_ids == plain.token_ids
        assert all(token % 2 == 0 for token in drafted.token_ids)


def test_what_was_computed_is_kept_for_the_next_turn(kinds, generator, tokenizer):
    """As in plain decoding: all but the last token; the same with the draft's own keys and values."""
    generator.stop_ids = []
    for name in ("similar", "layers"):
        scheduler = SpeculativeScheduler(generator.model, 3, None, Speculation(kinds[name], 3))
        prompt, known = prompts_of(tokenizer, 13)[12], 0
        other = prompts_of(tokenizer, 13)[11]
        for _ in range(3):
            settings = GenerationArguments(max_new_tokens=12, **GREEDY)
            [completion, _] = answered(
                scheduler, generator, [Request(prompt, settings), Request(other, settings)], join=0
            )
            assert completion.num_cached_tokens == known
            assert completion.token_ids == generator.generate([prompt], settings)[0].token_ids
            known = len(prompt) + len(completion.token_ids) - 1
            prompt = prompt + completion.token_ids + encode_text(tokenizer, "and then?")


@pytest.mark.parametrize("fails", ["draft", "check"])
def test_a_failure_leaves_nothing_half_computed(monkeypatch, fails, kinds, model, generator, tokenizer):
    """Drafted tokens stand in the first layers only until the model has checked them."""
    engine = TransformersEngine(model, tokenizer, None, max_batch_size=2, speculation=Speculation(kinds["layers"], 3))
    request = Request(prompts_of(tokenizer, 13)[12], GenerationArguments(max_new_tokens=12, **GREEDY))
    expected = plain_answers(generator, [request])[0].token_ids
    logits, passes = BatchScheduler.logits, []

    def failing(scheduler, first, tokens, keep=1):
        result = logits(scheduler, first, tokens, keep)
        passes.append(keep)
        if (len(passes) == 3) if fails == "draft" else (keep > 1 and passes.count(keep) == 1):
            raise MemoryError("no more")
        return result

    try:
        monkeypatch.setattr(BatchScheduler, "logits", failing)
        with pytest.raises(MemoryError):
            engine.submit(request).wait()
        monkeypatch.undo()
        completion = engine.submit(request).wait()
        assert (completion.token_ids, completion.num_cached_tokens) == (expected, 0)
        assert len(model.model.layers) == 2
    finally:
        engine.close()


@pytest.mark.slow
def test_drafts_rotate_as_the_model_does(tiny_model_folder, tokenizer):
    """auto-NTK: requests of different lengths have rotations of their own."""
    from utils.core.arguments import RopeArguments
    from utils.models.rope import install_row_rotary, scale_rope

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    model.config.max_position_embeddings = 64
    scale_rope(model.config, RopeArguments("auto-ntk"))
    rotary = install_row_rotary(model)
    generator = Generator(model, tokenizer)
    generator.stop_ids = []
    prompts = prompts_of(tokenizer, 6)
    requests = [
        Request(prompt, GenerationArguments(max_new_tokens=20 + 25 * (number % 3), **GREEDY))
        for number, prompt in enumerate(prompts)
    ]
    plain = [answered(BatchScheduler(model, 1, rotary), generator, [request])[0].token_ids for request in requests]
    for kind in (partial(EarlyExitDraft, 1), partial(ModelDraft, model)):
        scheduler = SpeculativeScheduler(model, 3, rotary, Speculation(kind, 3))
        assert [c.token_ids for c in answered(scheduler, generator, requests)] == plain
    assert scheduler.counts["accepted"] == scheduler.counts["drafted"], (
        "the model itself, rotated alike, is always right"
    )


# ---------------------------------------------------------------- sampling


VOCABULARY, END = 12, 0


def tiny_model(seed, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.45,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPTER = SimpleNamespace(
    check=lambda request: request.settings.max_new_tokens,
    find_stop_ids=lambda stops: [END],
    token_bytes=[b"x"] * VOCABULARY,
)
SAMPLED = {
    "all": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "cool": {"temperature": 0.6, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.4},
    "top_k": {"temperature": 1.2, "top_k": 4, "top_p": 1.0},
    "top_p": {"temperature": 1.0, "top_k": 0, "top_p": 0.7},
    "both": {"temperature": 1.0, "top_k": 6, "top_p": 0.8, "presence_penalty": 0.5, "min_new_tokens": 2},
}
LENGTH = 4


def step_distribution(logits, prompt, answer, settings):
    """What the settings make of logits, token by token, written down once more."""
    values = list(map(float, logits))
    for token in {*prompt, *answer}:
        penalty = settings.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in set(answer):
        values[token] -= settings.presence_penalty
    if len(answer) < settings.min_new_tokens:
        values[END] = -math.inf
    order = sorted(range(VOCABULARY), key=lambda token: -values[token])
    order = order[: settings.top_k or VOCABULARY]
    weights = {token: math.exp(values[token] / settings.temperature) for token in order}
    total, reached, kept = sum(weights.values()), 0.0, {}
    for token in order:
        if reached < settings.top_p:
            kept[token] = weights[token]
        reached += weights[token] / total
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@torch.no_grad()
def exact_distribution(model, prompt, settings):
    """Probability of each answer of at most LENGTH tokens."""
    finished, open_ones = {}, {(): 1.0}
    for _ in range(LENGTH):
        answers = list(open_ones)
        logits = model(torch.tensor([[*prompt, *answer] for answer in answers])).logits[:, -1]
        grown = {}
        for answer, row in zip(answers, logits, strict=True):
            for token, probability in step_distribution(row, prompt, answer, settings).items():
                target = finished if token == END else grown
                target[*answer, token] = open_ones[answer] * probability
        open_ones = grown
    return finished | open_ones


def chi_square(counts, expected, total):
    """(statistic, degrees of freedom); answers expected fewer than five times are one class."""
    classes, rest = [], [0, 0.0]
    for answer, probability in expected.items():
        if probability * total >= 5:
            classes.append((counts[answer], probability * total))
        else:
            rest[0] += counts[answer]
            rest[1] += probability * total
    classes += [tuple(rest)] if rest[1] >= 5 else []
    return sum((found - wanted) ** 2 / wanted for found, wanted in classes), len(classes) - 1


def sampled(model, kind, prompt, settings, seeds, k=3):
    scheduler = SpeculativeScheduler(model, 64, None, Speculation(kind, k)) if kind else BatchScheduler(model, 64)
    requests = [Request(prompt, settings, seed) for seed in seeds]
    return [tuple(c.token_ids) for c in answered(scheduler, PROMPTER, requests, join=0)], scheduler.counts


def disagreeing():
    """A model that has something of the one that checks, and something of another."""
    drafting, other = tiny_model(7), tiny_model(8)
    with torch.no_grad():
        for parameter, another in zip(drafting.parameters(), other.parameters(), strict=True):
            parameter.mul_(0.75).add_(another, alpha=0.25)
    return drafting


TINY = {
    "another model": lambda: partial(ModelDraft, disagreeing()),
    "layers": lambda: partial(EarlyExitDraft, 1),
    "lookup": lambda: PromptLookup,
}


@pytest.mark.parametrize(
    ("name", "kind", "total"),
    [
        ("lookup", "top_k", 800),
        pytest.param("another model", "all", 800, marks=pytest.mark.slow),
        *(pytest.param(name, kind, 8000, marks=pytest.mark.slow) for name in TINY for kind in SAMPLED),
    ],
)
def test_sampled_answers_have_the_models_distribution(monkeypatch, name, kind, total):
    monkeypatch.setattr(speculation, "MOST_ROWS", 64)
    monkeypatch.setattr(speculation, "MEASURED", 1000)
    model, prompt = tiny_model(7), [3, 5, 4, 3, 5]
    settings = GenerationArguments(**{"max_new_tokens": LENGTH, "repetition_penalty": 1.0} | SAMPLED[kind])
    expected = exact_distribution(model, prompt, settings)
    assert math.isclose(sum(expected.values()), 1, abs_tol=1e-9)
    answers, counts = sampled(model, TINY[name](), prompt, settings, range(total))
    assert set(answers) <= set(expected), "nothing that top_k, top_p or the least length leaves out"
    statistic, freedom = chi_square(Counter(answers), expected, total)
    assert freedom > 10
    assert statistic < freedom + 3.1 * math.sqrt(2 * freedom) + 4  # about p = 0.001; seeds are fixed
    if name != "lookup":
        assert 0.05 * counts["drafted"] < counts["accepted"] < 0.9 * counts["drafted"], "they agree and disagree"


@pytest.mark.slow
def test_the_test_above_would_see_drafts_that_are_always_accepted(monkeypatch):
    monkeypatch.setattr(speculation, "MOST_ROWS", 64)
    monkeypatch.setattr(speculation, "rejection_sample", lambda logits, sampler, token, drafted: token)
    model, prompt = tiny_model(7), [3, 5, 4, 3, 5]
    settings = GenerationArguments(max_new_tokens=LENGTH, repetition_penalty=1.0, **SAMPLED["all"])
    answers, _ = sampled(model, TINY["another model"](), prompt, settings, range(800))
    statistic, freedom = chi_square(Counter(answers), exact_distribution(model, prompt, settings), 800)
    assert statistic > 2 * freedom + 50


@pytest.mark.slow
def test_drafts_that_are_not_drawn_change_no_sampled_answer(kinds, generator, tokenizer):
    generator.stop_ids = [tokenizer.eos_token_id]
    settings = GenerationArguments(max_new_tokens=30, temperature=0.8, top_k=0)
    requests = [Request(prompt, settings, seed) for seed, prompt in enumerate(prompts_of(tokenizer, 8))]
    for name in ("lookup", "itself in text"):
        compare(generator, kinds[name], requests, plain_answers(generator, requests), slots=3, join=1, k=3)


def test_rejection_by_hand():
    """Drafts from q, outcomes from p: exactly, over a fine grid of the two random numbers."""
    own, drafted = [0.5, 0.3, 0.2, 0.0], [0.1, 0.6, 0.2, 0.1]
    settings = GenerationArguments(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    logits, grid = torch.tensor(own).log(), 30
    outcomes = [0.0] * 4
    for token, first, second in itertools.product(range(4), range(grid), range(grid)):
        sampler = Sampler(settings, [], [], 0)
        numbers = iter([(first + 0.5) / grid, (second + 0.5) / grid])
        sampler.draw = lambda numbers=numbers: next(numbers)
        found = rejection_sample(logits, sampler, token, torch.tensor(drafted, dtype=torch.float64))
        outcomes[found] += drafted[token] / grid**2
    assert outcomes == pytest.approx(own, abs=0.02)
    assert outcomes[3] == 0


def test_equal_distributions_leave_no_rest_to_draw_from():
    settings = GenerationArguments(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    sampler = Sampler(settings, [], [], 0)
    sampler.draw = lambda: 0.999999
    own = torch.tensor([0.25, 0.75])
    # More than the model gives it, by rounding: it is rejected, and nothing is left above the draft.
    found = rejection_sample(own.log(), sampler, 0, torch.tensor([0.2500001 * 2, 0.75], dtype=torch.float64))
    assert found in (0, 1)


# ---------------------------------------------------------------- how much is drafted


def drafting(controller, chances, passes=200, seed=0):
    """How many tokens each pass drafts, where the draft knows the chance that a token is accepted: any of these."""
    generated, lengths = torch.Generator().manual_seed(seed), []
    for _ in range(passes):
        most, drafted, tokens, goes_on, standing = controller.length(), 0, 1, True, True
        picked = [chances[int(torch.randint(len(chances), (), generator=generated))] for _ in range(most)]
        while drafted < most and goes_on:
            goes_on, drafted = controller.goes_on(picked[drafted]), drafted + 1
        for place in range(drafted):
            if standing:
                standing = float(torch.rand((), generator=generated)) < picked[place]
                controller.note(place, standing)
                tokens += standing
        if drafted:
            controller.end(tokens)
        lengths.append(drafted)
    return lengths


def test_more_is_drafted_where_more_is_accepted():
    means = {}
    for chance in (0.05, 0.6, 0.95):
        lengths = drafting(DraftLengthController(cost=0.15), [chance])
        means[chance] = sum(lengths[50:]) / 150
        assert max(lengths) <= speculation.LONGEST
    assert means[0.05] < 0.4, "it rests, and looks again now and then"
    assert 1 < means[0.6] < 4 < 6 < means[0.95]
    assert sum(drafting(DraftLengthController(cost=1.1), [0.9])) < 10, "nothing pays that costs as much as the model"
    fixed = drafting(DraftLengthController(cost=0.15, fixed=5), [0.1, 0.9], passes=64)
    assert Counter(fixed) == {5: 62, 0: 2}, "two passes are for the clock"


def test_a_draft_stops_where_it_is_not_sure():
    controller = DraftLengthController(cost=0.15)
    drafting(controller, [0.1, 0.95], passes=300)
    while not controller.length():
        pass
    assert controller.goes_on(0.95) and controller.goes_on(0.95) and not controller.goes_on(0.1)


def test_the_pace_recovers_when_drafts_become_good():
    controller = DraftLengthController(cost=0.2)
    assert sum(drafting(controller, [0.02])[-60:]) < 20
    assert sum(drafting(controller, [0.98], passes=400)[-60:]) > 240


def test_the_clock_compares_with_passes_without_drafts():
    clock = Clock()
    for _ in range(3):
        assert clock.speed_up is None
        clock.note(1.0, 1, drafted=False)
    for _ in range(9):
        clock.note(1.5, 3, drafted=True)
    assert clock.speed_up == pytest.approx((3 * 1.0 / 3) / ((3 + 13.5) / 30))


def test_what_followed_before_is_drafted():
    tokens = [1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3]
    assert _Occurrences().continuation(tokens, 3) == ([5, 8, 2], 2), "the last occurrence of the longest ending"
    assert _Occurrences().continuation([*tokens, 4], 2) == ([9, 2], 3)
    assert _Occurrences().continuation([1, 2, 3, 4], 3) == ([], 0)
    assert _Occurrences().continuation([7, 1, 2, 1, 2], 5) == ([1, 2, 1, 2, 1], 2), "a repetition goes on"
    growing = _Occurrences()
    for end in range(1, len(tokens) + 1):
        assert growing.continuation(tokens[:end], 4) == _Occurrences().continuation(tokens[:end], 4)


def test_text_of_another_vocabulary_becomes_own_tokens(kinds, model, tokenizer):
    """What the draft writes, cut as the model's tokenizer cuts the whole text."""
    draft = kinds["itself in text"](SimpleNamespace(max_batch_size=1, model=model))
    whole = encode_raw("Once upon a time there was a house 你好", tokenizer)
    for cut in range(4, len(whole) - 1):
        found = draft._in_own_tokens(whole[:cut], whole[cut:])
        text = b"".join(draft._token_bytes[token] for token in found)
        rest = b"".join(draft._token_bytes[token] for token in whole[cut:])
        begins_a_character = not 0x80 <= rest[0] < 0xC0
        assert text == (rest if begins_a_character else b"")
    assert draft._in_own_tokens(whole[:5], [tokenizer.eos_token_id, *whole[5:]]) == []


# ---------------------------------------------------------------- the engine


def test_the_engine_counts_and_refuses(kinds, model, tokenizer):
    engine = TransformersEngine(model, tokenizer, None, max_batch_size=2, speculation=Speculation(kinds["similar"], 3))
    prompt = prompts_of(tokenizer, 1)[0]
    try:
        settings = GenerationArguments(max_new_tokens=200, repetition_penalty=1.0, **GREEDY)
        completion = engine.submit(Request(prompt, settings)).wait()
        statistics = engine.statistics()
        assert statistics["new_tokens"] == len(completion.token_ids)
        assert 0 < statistics["accepted"] <= statistics["drafted"]
        assert statistics["passes"] < statistics["new_tokens"]
        assert ("speed_up" in statistics) == (engine._speculation.clock._plain_passes >= 3)
        text = speculation.describe_speculation(statistics | {"speed_up": 1.5})
        share = statistics["accepted"] / statistics["drafted"]
        assert f"({share:.0%})" in text and "tokens a pass" in text and "1.50x" in text
        guided = GenerationArguments(max_new_tokens=4, guidance_scale=2.0, negative_prompt="bad")
        with pytest.raises(InputError, match="speculative decoding"):
            engine.submit(Request(prompt, guided, negative_prompt=prompt))
    finally:
        engine.close()
    assert "nothing" in speculation.describe_speculation({"drafted": 0, "passes": 0})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"speculative_sampling": True}, "needs something that drafts"),
        ({"draft_k": 4}, "nothing that drafts"),
        ({"draft_layers": 0}, "need at least 1"),
        ({"draft_layers": 1, "prompt_lookup": True}, "--draft_layers and --prompt_lookup exclude"),
        ({"draft_base_model": "m", "draft_layers": 1}, "exclude each other"),
        ({"draft_lora_model": "m", "prompt_lookup": True}, "exclude each other"),
        ({"draft_base_model": "m", "draft_model_load_in_8bit": True, "draft_model_load_in_4bit": True}, "exclude"),
        ({"prompt_lookup": True, "draft_model_load_in_4bit": True}, "for --draft_base_model"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(InputError, match=message):
        SpeculationArguments(**flags)


def test_settings_that_go_with_no_drafts():
    flags = SpeculationArguments(prompt_lookup=True)
    with pytest.raises(InputError, match="beam"):
        flags.check(GenerationArguments(num_beams=2))
    with pytest.raises(InputError, match="guidance_scale"):
        flags.check(GenerationArguments(guidance_scale=2.0, negative_prompt="x"))
    SpeculationArguments().check(GenerationArguments(num_beams=2))


def test_drafts_that_cannot_be(tiny_model_folder, tokenizer, extended_tokenizer_folder, tmp_path):
    args = InferenceArguments(model_name_or_path=str(tiny_model_folder))
    config = load_config(str(tiny_model_folder))
    with pytest.raises(InputError, match="2 layers; need fewer"):
        DraftPlan(SpeculationArguments(draft_layers=2), args, tokenizer, config)
    with pytest.raises(InputError, match="not found"):
        DraftPlan(SpeculationArguments(draft_base_model=str(tmp_path / "no")), args, tokenizer, config)
    # A folder without a tokenizer is taken for one of the same vocabulary, which its rows must fit.
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_model_folder / name).read_bytes())
    DraftPlan(SpeculationArguments(draft_base_model=str(bare)), args, tokenizer, config)
    larger = load_tokenizer(extended_tokenizer_folder)
    with pytest.raises(InputError, match=r"the draft model: .*tokenizer has"):
        DraftPlan(SpeculationArguments(draft_base_model=str(bare)), args, larger, config)
    assert same_vocabulary(tokenizer, load_tokenizer(tiny_model_folder))
    assert not same_vocabulary(tokenizer, larger)
