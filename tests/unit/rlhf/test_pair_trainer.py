"""Trainers of pairs: figures on few pairs are called so."""

from types import SimpleNamespace

from utils.rlhf.pair_trainer import PairTrainer, doubt_few_pairs


def test_figures_on_few_pairs_come_with_their_number():
    assert doubt_few_pairs("heldout", 20) == [] and doubt_few_pairs("heldout", 0) != []
    (doubt,) = doubt_few_pairs("heldout", 8)
    assert doubt.startswith("heldout: 8 pairs, of which each moves the accuracy by 12 points")
    sets = {"many": range(20), "few": range(19)}
    assert [doubt.split(":")[0] for doubt in PairTrainer.doubts(SimpleNamespace(eval_dataset=sets))] == ["few"]
    assert PairTrainer.doubts(SimpleNamespace(eval_dataset=None)) == []
