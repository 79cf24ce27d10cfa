"""Arguments of evaluations: answers are the likeliest tokens, where elsewhere they are drawn."""

from utils.core.arguments import GenerationArguments
from utils.evaluation.arguments import GreedyArguments


def test_answers_that_are_judged_are_the_likeliest_by_default():
    judged, drawn = GreedyArguments(), GenerationArguments()
    assert not judged.samples and drawn.samples
    assert judged.repetition_penalty == 1 and drawn.repetition_penalty != 1
    assert GreedyArguments(do_sample=True).samples
