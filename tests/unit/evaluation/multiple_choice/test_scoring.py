"""scoring: against one plain forward pass of transformers for every continuation, in float32."""

import copy
import random
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config

from support.models import model_of
from utils.core.arguments import RopeArguments
from utils.core.errors import InputError
from utils.evaluation.multiple_choice import scoring
from utils.evaluation.multiple_choice.scoring import ChoiceRequest, PrefixScorer, group_prompts, token_bytes
from utils.generation.cache import SlotCache
from utils.models.rope import install_row_rotary, scale_rope

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "eager": LlamaConfig(**SIZES, attn_implementation="eager"),
    "window": MistralConfig(**SIZES, sliding_window=24),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": Qwen2Config(**SIZES),
}


def request_of(prompt, *continuations):
    return ChoiceRequest(tuple(prompt), tuple(map(tuple, continuations)), "", ("",) * len(continuations))


def questions(count=23, subjects=3, seed=0, longest=20, tail=1):
    """Requests in mixed order: each subject has its examples, each question its own tokens and continuations."""
    draw = random.Random(seed)

    def tokens(number):
        return [draw.randrange(VOCABULARY) for _ in range(number)]

    examples = [tokens(draw.randint(30, 60)) for _ in range(subjects)]
    return [
        request_of(
            [1, *draw.choice(examples), *tokens(draw.randint(1, longest))],
            *[tokens(draw.randint(1, tail)) for _ in range(draw.randint(2, 5))],
        )
        for _ in range(count)
    ]


@torch.no_grad()
def plain_logprobs(model, request):
    """A pass over prompt and continuation each, and the sum of what its tokens are given."""
    found = []
    for ids in request.continuations:
        logits = model(input_ids=torch.tensor([[*request.prompt, *ids]])).logits[0].double()
        places = range(len(request.prompt) - 1, len(request.prompt) + len(ids) - 1)
        found.append(
            sum(float(logits[i][t] - torch.logsumexp(logits[i], 0)) for i, t in zip(places, ids, strict=True))
        )
    return found


def argmax(values):
    return max(range(len(values)), key=values.__getitem__)


def assert_scores(scores, expected, tolerance=1e-4):
    for score, row in zip(scores, expected, strict=True):
        assert score.error is None
        assert list(score.logprobs) == pytest.approx(row, abs=tolerance)
        assert argmax(score.logprobs) == argmax(row)


def plain_scores(model, requests):
    return [plain_logprobs(model, request) for request in requests]


# ---------------------------------------------------------------- against plain passes


@pytest.mark.parametrize("tail", [1, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_plain_passes(name, tail):
    model, requests = model_of(CONFIGS[name]), questions(count=10, subjects=2, tail=tail)
    scorer = PrefixScorer(model, batch_tokens=100)
    assert_scores(scorer.score(requests), plain_scores(model, requests))
    assert scorer.counts["computed_tokens"] < scorer.counts["prompt_tokens"]


@pytest.mark.slow
def test_batches_do_not_matter():
    """One question at a time (no padding), some, and all at once (padded), in the order given and another."""
    model, requests = model_of(CONFIGS["llama"]), questions(count=13, tail=3)
    expected = plain_scores(model, requests)
    order = random.Random(1).sample(range(len(requests)), len(requests))
    for batch_tokens in (1, 40, 10**6):
        scorer = PrefixScorer(model, batch_tokens=batch_tokens)
        assert_scores(scorer.score(requests), expected)
        mixed = scorer.score([requests[number] for number in order])
        assert_scores(mixed, [expected[number] for number in order])


def test_equal_lengths_need_no_mask():
    """transformers makes the mask itself then; a window shorter than the prompts is kept."""
    draw = random.Random(3)
    examples = [draw.randrange(VOCABULARY) for _ in range(40)]
    requests = [
        request_of([*examples, *(draw.randrange(VOCABULARY) for _ in range(9))], [3], [4], [5]) for _ in range(6)
    ]
    for name in ("llama", "window", "eager"):
        model = model_of(CONFIGS[name])
        assert_scores(PrefixScorer(model).score(requests), plain_scores(model, requests))


def test_odd_requests():
    """The same prompt twice, a prompt that begins another, one token, one continuation, a repeated continuation."""
    model = model_of(CONFIGS["llama"])
    base = [5, 6, 7, 8] * 10
    requests = [
        request_of(base, [1], [2, 3]),
        request_of(base, [2, 3], [1]),
        request_of(base[:20], [9]),
        request_of([4], [1], [1]),
        request_of([*base, 1], [4, 4, 4, 4], [5]),
        request_of(base[:-1], [8], [0]),
    ]
    assert_scores(PrefixScorer(model).score(requests), plain_scores(model, requests))
    assert PrefixScorer(model).score([]) == []


def test_auto_ntk_rotates_by_planned_length():
    """Prompts with one beginning but different rotations share nothing; against models with the base of each."""
    config = LlamaConfig(**{**SIZES, "max_position_embeddings": 32})
    window = copy.deepcopy(config)
    scale_rope(window, RopeArguments("auto-ntk"))
    model = model_of(window)
    install_row_rotary(model)
    draw = random.Random(4)
    examples = [draw.randrange(VOCABULARY) for _ in range(20)]
    requests = [
        request_of([*examples, *(draw.randrange(VOCABULARY) for _ in range(extra))], [1, 2], [3], [4, 5])
        for extra in (4, 30, 5, 38, 6, 20, 31)
    ]
    scores = PrefixScorer(model).score(requests)
    dim = 8
    for score, request in zip(scores, requests, strict=True):
        steps = max(4, -(-4 * (len(request.prompt) + 2) // 32)) / 4
        alpha = max(1.0, 2 * steps - 1)
        theta = 10000.0 * alpha ** (dim / (dim - 2))
        alone = model_of(LlamaConfig(**{**SIZES, "max_position_embeddings": 256}, rope_theta=theta))
        assert list(score.logprobs) == pytest.approx(plain_logprobs(alone, request), abs=1e-4)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_quantised_weights(bits, tmp_path):
    """4 bits with float32 arithmetic to 1e-4; 8 bits choose outliers by batch, and are near."""
    from utils.core.arguments import ModelArguments
    from utils.models.loading import load_model

    config = LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 128})
    model_of(config).save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path), load_in_kbits=bits, dtype="float32")
    model = load_model(args, torch.float32, {"": "cpu"}).eval()
    requests = questions(count=6, subjects=1, tail=3)
    scores, expected = PrefixScorer(model, 100).score(requests), plain_scores(model, requests)
    for score, row in zip(scores, expected, strict=True):
        assert list(score.logprobs) == pytest.approx(row, abs=1e-4 if bits == 4 else 0.2)
        assert bits == 8 or argmax(score.logprobs) == argmax(row)


def test_scores_come_as_they_are_known():
    model, requests = model_of(CONFIGS["llama"]), questions()
    seen = {}
    scorer = PrefixScorer(model, 64)
    scores = scorer.score(requests, lambda number, score: seen.setdefault(number, score))
    assert [seen[number] for number in range(len(requests))] == scores
    assert scorer.counts["requests"] == len(requests) and scorer.counts["errors"] == 0
    assert scorer.counts["prompt_tokens"] == sum(len(request.prompt) for request in requests)


# ---------------------------------------------------------------- what is computed, and what is held


def test_a_beginning_is_computed_once(monkeypatch):
    """Tokens of all passes counted at the model: each subject's examples once, each question's own tokens once."""
    model, requests = model_of(CONFIGS["llama"]), questions(count=40, subjects=3)
    passes = []
    model.register_forward_pre_hook(lambda module, args, kwargs: passes.append(kwargs["input_ids"]), with_kwargs=True)
    scorer = PrefixScorer(model, 1)  # no padding
    scorer.score(requests)
    found = Counter(tuple(request.prompt[:31]) for request in requests)
    assert len(found) == 3
    computed = sum(ids.numel() for ids in passes)
    assert computed == scorer.counts["computed_tokens"]
    groups = group_prompts([request.prompt for request in requests])
    own = sum(len(requests[number].prompt) - group.length for group in groups for number in group.numbers)
    assert computed == own + sum(group.length for group in groups)
    assert {len(group.numbers) for group in groups} == set(found.values())
    assert computed < 0.4 * sum(len(request.prompt) for request in requests)


def test_copies_of_the_beginning_are_bounded(monkeypatch):
    """The keys and values that stand at once stay within the bound, and the scores are the same."""
    model, requests = model_of(CONFIGS["llama"]), questions(count=30, subjects=1, tail=2)
    expected = PrefixScorer(model).score(requests)
    sizes = []
    grown = SlotCache._grown

    def watched(self, old):
        table = grown(self, old)
        sizes.append(table.numel() * table.element_size() * 2 * model.config.num_hidden_layers)
        return table

    monkeypatch.setattr(SlotCache, "_grown", watched)
    bound = 3 * 256 * token_bytes(model.config, torch.float32)
    monkeypatch.setattr(scoring, "available_bytes", lambda: bound / scoring.CACHE_SHARE)
    scores = PrefixScorer(model).score(requests)
    assert 0 < max(sizes) <= bound
    for score, other in zip(scores, expected, strict=True):
        assert score.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    sizes.clear()
    monkeypatch.setattr(scoring, "available_bytes", lambda: 1)
    PrefixScorer(model).score(requests)  # less than a row needs: one row
    assert max(sizes) == bound / 3


def test_logits_stand_for_a_few_places_only(monkeypatch):
    """The largest logits: rows of a batch times the tokens of a continuation, within the bound."""
    model, requests = model_of(CONFIGS["llama"]), questions(count=30, subjects=1, tail=6)
    shapes = []
    model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape))
    monkeypatch.setattr(scoring, "LOGIT_NUMBERS", 20 * VOCABULARY)
    PrefixScorer(model).score(requests)
    assert max(shape.numel() for shape in shapes) <= 20 * VOCABULARY and max(shape[0] for shape in shapes) > 1


def test_groups_cost_the_least():
    """Against all ways to cut the sorted prompts into runs, each computed as one group."""
    draw = random.Random(5)
    for _ in range(30):
        stems = [[draw.randrange(3) for _ in range(draw.randint(0, 60))] for _ in range(3)]
        prompts = [
            [1, *draw.choice(stems)[: draw.randint(0, 60)], *(draw.randrange(5) for _ in range(draw.randint(0, 9)))]
            for _ in range(8)
        ]
        groups = group_prompts(prompts)
        assert sorted(number for group in groups for number in group.numbers) == list(range(8))
        for group in groups:
            assert len({tuple(prompts[number][: group.length]) for number in group.numbers}) == 1
            assert all(group.length < len(prompts[number]) for number in group.numbers)
        cost = sum(
            scoring.GROUP_COST + group.length + sum(len(prompts[n]) - group.length for n in group.numbers)
            for group in groups
        )
        assert cost <= cheapest_runs(prompts) + 8 * scoring.GROUP_COST


def cheapest_runs(prompts):
    """The least cost of cutting the sorted prompts into runs, by trying all."""
    ordered = sorted(prompts)
    best = [0.0] + [float("inf")] * len(ordered)
    for end in range(1, len(ordered) + 1):
        for start in range(end):
            run = ordered[start:end]
            shared = 0
            while all(shared < len(p) - 1 and p[shared] == run[0][shared] for p in run):
                shared += 1
            cost = shared + sum(len(p) - shared for p in run) + scoring.GROUP_COST
            best[end] = min(best[end], best[start] + cost)
    return best[-1]


def test_subjects_are_groups_though_their_introductions_begin_alike():
    """67 subjects of 3 questions, whose prompts have 12 to 20 tokens in common before the examples."""
    draw = random.Random(6)
    prompts, subjects = [], []
    for subject in range(67):
        beginning = [1] * 12 + [2] * (subject % 9) + [100 + subject] * 200
        for _ in range(3):
            prompts.append([*beginning, *(draw.randrange(50) for _ in range(40))])
            subjects.append(subject)
    groups = group_prompts(prompts)
    assert len(groups) == 67 and all(len({subjects[n] for n in group.numbers}) == 1 for group in groups)
    alone = group_prompts([prompt[-40:] for prompt in prompts])
    assert len(alone) == 1  # nothing shared: one group, in batches


def test_many_nested_beginnings():
    """Each prompt begins the next: no recursion, and no square of the time."""
    groups = group_prompts([[7] * length for length in range(1, 3000)])
    assert sum(len(group.numbers) for group in groups) == 2999


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_scored():
    model = model_of(CONFIGS["llama"])
    scorer = PrefixScorer(model)
    with pytest.raises(InputError, match=r"request 1: .*257 tokens.*context 256"):
        scorer.score([request_of([1] * 200, [1]), request_of([1] * 255, [1], [1, 2])])
    for request in (request_of([], [1]), request_of([1]), request_of([1], [2], [])):
        with pytest.raises(InputError, match="at least a token each"):
            scorer.score([request])
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"not finite.*--dtype"):
        scorer.score([request_of([1, 2], [1])])


def test_layers_of_several_kinds_are_refused():
    mixed = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert len(set(mixed.layer_types)) == 2
    with pytest.raises(InputError, match=r"qwen2.*full_attention, sliding_attention"):
        PrefixScorer(model_of(mixed))


# ---------------------------------------------------------------- 16 bits


def test_scores_are_made_in_float32_of_what_16_bits_make():
    """Against the float32 product of the same hidden states; bfloat16 logits near 20 lie 1/8 apart, and tie."""
    model = model_of(CONFIGS["llama"], torch.bfloat16)
    noise = torch.Generator().manual_seed(8)
    with torch.no_grad():  # letters that are almost equally likely, of logits around 20
        rows = 4 * torch.randn(1, SIZES["hidden_size"], generator=noise)
        model.lm_head.weight[5:9] = (rows + 0.02 * torch.randn(4, SIZES["hidden_size"], generator=noise)).bfloat16()
    head, letters = model.lm_head, ([5], [6], [7], [8])
    draw = random.Random(7)
    requests = [request_of([draw.randrange(VOCABULARY) for _ in range(12)], *letters) for _ in range(60)]
    ties = {}
    for exact in (False, True):
        scorer = PrefixScorer(model, batch_tokens=1, exact=exact)
        scores = scorer.score(requests)
        ties[exact] = sum(score.logprobs.count(max(score.logprobs)) > 1 for score in scores)
        scorer.close()
        assert model.lm_head is head
    assert ties[False] > 0 == ties[True]
    with torch.no_grad():
        for score, request in zip(scores, requests, strict=True):
            hidden = model.model(input_ids=torch.tensor([request.prompt])).last_hidden_state[0, -1]
            logits = head.weight.float() @ hidden.float()
            expected = torch.log_softmax(logits, 0)[5:9].tolist()
            assert list(score.logprobs) == pytest.approx(expected, abs=0.3)  # hidden states are rounded, in any order
    as_stored = PrefixScorer(model, exact=False).score(requests[:1])[0].logprobs
    assert torch.tensor(as_stored).bfloat16().tolist() == list(as_stored)


def test_an_adapters_head_is_computed_in_float32_too():
    from peft import LoraConfig, get_peft_model

    for changes in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **changes)
        model = get_peft_model(model_of(CONFIGS["llama"], torch.bfloat16), config).bfloat16().eval()
        head = model.get_base_model().get_output_embeddings()
        hidden = torch.randn(3, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0)).bfloat16()
        weights = {name: value.float() for name, value in head.named_parameters()}
        matrix = weights.get("modules_to_save.default.weight", weights.get("base_layer.weight"))
        if "lora_A.default.weight" in weights:
            matrix = matrix + 2 * weights["lora_B.default.weight"] @ weights["lora_A.default.weight"]
        with torch.no_grad():
            made = scoring.exact_head(head)(hidden)
        assert made.dtype == torch.float32
        assert torch.allclose(made, hidden.float() @ matrix.T, atol=1e-4)
