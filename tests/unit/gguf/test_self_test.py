"""What the self-test concludes from its figures; it is run as a whole in e2e/test_export_gguf."""

import math

import numpy as np
import pytest
import torch

from utils.gguf.self_test import LARGEST_DIVERGENCE, Rule, _score, _TextScores, choose_rule, judge


def texts(divergences, positions=40):
    """One text for each mean divergence of its positions."""
    return [_TextScores(positions, positions * mean, positions, 1.0, 1.0) for mean in divergences]


def test_a_texts_figures_are_those_of_a_plain_loop():
    generator = np.random.default_rng(0)
    expected, found = generator.normal(size=(2, 7, 11)).astype(np.float32)
    ids = [3, 1, 4, 1, 5, 9, 2]
    scores = _score(ids, expected, found)
    p, q = (torch.from_numpy(logits).double().softmax(-1) for logits in (expected, found))
    assert scores.divergence == pytest.approx(
        sum(float(p[t, v] * math.log(p[t, v] / q[t, v])) for t in range(7) for v in range(11))
    )
    assert scores.nll == pytest.approx(-sum(math.log(q[t, ids[t + 1]]) for t in range(6)))
    assert scores.reference_nll == pytest.approx(-sum(math.log(p[t, ids[t + 1]]) for t in range(6)))
    assert (scores.positions, scores.agreements) == (7, int((p.argmax(-1) == q.argmax(-1)).sum()))


@pytest.mark.parametrize(
    ("divergences", "verdict"),
    [
        ([0.05] * 20, "passed"),
        ([0.09, 0.05] * 10, "passed"),
        ([0.05] * 19 + [2.0], "doubtful"),  # one odd text of twenty
        ([0.09, 0.13] * 10, "problem"),
        ([0.02, 0.20] * 3, "doubtful"),  # too few texts
        ([5.0, 8.0] * 10, "problem"),
        ([math.nan] * 20, "problem"),
        ([0.05], "doubtful"),  # one text says nothing of others
    ],
)
def test_the_sample_decides_how_sure_the_verdict_is(divergences, verdict):
    figures = judge(texts(divergences), Rule(0.1, None))
    found = "problem" if figures["problems"] else "doubtful" if figures["doubts"] else "passed"
    assert found == verdict, figures
    if verdict == "doubtful":
        assert "over" in figures["doubts"][0] and "at most 0.1" in figures["doubts"][0]


def test_the_interval_holds_the_mean_of_all_texts():
    """Of 400 samples of 25 texts each, whose positions are as dependent as can be, 19 in 20 or nearly so."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        figures = judge(texts(generator.exponential(0.01, size=25)), Rule(0.1, None))
        low, high = figures["kl_divergence_interval"]
        held += low <= 0.01 <= high
    assert held / 400 > 0.88, "exponentials are skewed, so that two standard errors hold somewhat less than 95 %"


def test_perplexity_swings_where_the_divergence_does_not():
    """The refused q8_0 export: a ratio of 0.97 over 376 tokens, from noise that is no fault."""
    generator = np.random.default_rng(0)
    ratios, verdicts = [], set()
    for _ in range(50):
        expected = generator.normal(0, 3, size=(376, 50))
        found = expected + generator.normal(0, 0.3, size=expected.shape)  # of each logit
        rows = np.array_split(np.arange(376), 16)
        ids = generator.integers(50, size=376)
        scores = [_score(ids[row].tolist(), expected[row], found[row]) for row in rows]
        figures = judge(scores, choose_rule("Q8_0", experts=False))
        ratios.append(figures["perplexity_ratio"])
        verdicts.add((bool(figures["problems"]), bool(figures["doubts"])))
    assert max(ratios) > 1.02 or min(ratios) < 1 / 1.02, "what the old rule asked for"
    assert verdicts == {(False, False)}


def test_rules_by_type():
    assert choose_rule("F16", experts=True) == choose_rule("BF16", experts=False)
    assert choose_rule("IQ2_XS", experts=False) == Rule(LARGEST_DIVERGENCE[2], None)
    bounds = [choose_rule(name, experts=False).divergence for name in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M")]
    assert bounds == sorted(bounds)
