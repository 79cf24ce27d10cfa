"""Tokens of a batch: their distribution, penalties and bias by hand, rows with settings of their own."""

import math

import pytest
import torch

from utils.core.arguments import GenerationArguments
from utils.core.errors import InputError
from utils.generation.sampling import Sampler, argmax_tokens, choose, process_logits


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.999)])
def test_drawn_tokens_follow_the_distribution(top_k, top_p):
    probabilities = torch.tensor([0.05, 0.5, 0.0, 0.15, 0.3])
    scores = probabilities.clamp(min=1e-30).log().repeat(4000, 1)
    arguments = GenerationArguments(temperature=1.0, repetition_penalty=1.0, top_k=top_k, top_p=top_p)
    drawn, _ = choose(scores, [Sampler(arguments, [0], [], seed) for seed in range(4000)])
    counts = torch.bincount(torch.tensor(drawn), minlength=5).double()
    assert counts[2] == 0
    expected = probabilities.double() * 4000
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001; seeds are fixed, so this holds or not for good


def test_penalties_and_bias_are_what_the_api_reference_says():
    sampler = Sampler(
        GenerationArguments(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, min_new_tokens=9),
        [0, 1],
        [5],
        seed=0,
        logit_bias={3: 7.0},
    )
    for token in (2, 2, 1):
        sampler.advance(token)
    logits = torch.tensor([[1.0, -1.0, 4.0, 1.0, 1.0, 1.0]])
    expected = [0.5, -2.0 - 0.75, 2.0 - 1.0, 8.0, 1.0, -math.inf]
    assert process_logits(logits, [sampler])[0].tolist() == expected
    assert logits[0, 0] == 1.0, "the model's logits stay"


def test_min_p_leaves_out_what_is_much_less_likely():
    scores = torch.tensor([0.6, 0.25, 0.1, 0.05]).log().repeat(500, 1)
    for settings in ({"top_k": 0}, {"top_k": 4}):
        arguments = GenerationArguments(temperature=1.0, top_p=1.0, min_p=0.2, repetition_penalty=1.0, **settings)
        drawn, _ = choose(scores, [Sampler(arguments, [0], [], seed) for seed in range(500)])
        assert set(drawn) == {0, 1}, "0.25 is more than a fifth of 0.6, 0.1 is less"


def test_rows_of_a_batch_have_settings_of_their_own():
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    kinds = [{"temperature": 0.0}, {"top_k": 3}, {"top_k": 0, "top_p": 0.5}, {"top_k": 0, "top_p": 1.0}, {"top_k": 40}]
    samplers = [
        [
            Sampler(GenerationArguments(**{"temperature": 1.0, **kind}), [row], [], seed=row)
            for row, kind in enumerate(kinds)
        ]
        for _ in range(2)
    ]
    together, _ = choose(scores[:5], samplers[0])
    alone = [choose(scores[row : row + 1], [samplers[1][row]])[0][0] for row in range(5)]
    assert together == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_token_in_every_precision(dtype):
    scores = torch.randn(7, 1000, generator=torch.Generator().manual_seed(4)).to(dtype)
    scores[2] -= 100  # all below zero
    scores[3, [11, 900]] = 50  # the first of equals
    scores[4, 999] = math.inf
    expected = [max(range(1000), key=row.__getitem__) for row in scores.tolist()]
    assert argmax_tokens(scores) == expected
    assert argmax_tokens(scores[3:4]) == [11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_first_logits_that_are_no_numbers_are_refused_in_their_own_row(dtype, value):
    new, older = (Sampler(GenerationArguments(temperature=0.0, repetition_penalty=1.0), [0], [], 0) for _ in range(2))
    older.advance(1)
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
    logits[0, 63] = value
    with pytest.raises(InputError, match="not finite"):
        choose(logits, [new, older])
    tokens, _ = choose(logits, [older, new])
    assert tokens[1] == int(logits[1].float().argmax())
