"""Arguments of evaluations: answers are the likeliest tokens, where elsewhere they are drawn."""

import pytest

from utils.core.arguments import GenerationArguments
from utils.core.errors import InputError
from utils.evaluation.arguments import GreedyArguments, changed_flags, refuse_beams, warn_unused


def test_answers_that_are_judged_are_the_likeliest_by_default():
    judged, drawn = GreedyArguments(), GenerationArguments()
    assert not judged.samples and drawn.samples
    assert judged.repetition_penalty == 1 and drawn.repetition_penalty != 1
    assert GreedyArguments(do_sample=True).samples


def test_beams_are_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="--num_beams 4: evaluations are answered without beams"):
        GreedyArguments(num_beams=4)
    refuse_beams(GenerationArguments())


def test_flags_that_differ_from_their_defaults(caplog):
    assert changed_flags(GreedyArguments()) == changed_flags(GenerationArguments()) == []
    changed = GreedyArguments(top_k=5, stop=["x"], seed=1, guidance_scale=2, negative_prompt="x")
    assert changed_flags(changed, but=("seed",)) == ["--top_k", "--guidance_scale", "--negative_prompt", "--stop"]
    warn_unused(GreedyArguments(top_k=5, seed=1), "nothing is written", but=("seed",))
    warn_unused(GreedyArguments(), "nothing is written")
    assert [record.getMessage() for record in caplog.records] == ["nothing is written: no effect of --top_k"]
