"""Flags of pt.py and sft.py that cannot be meant."""

import pytest

from utils.core.errors import InputError
from utils.data.arguments import PretrainingArguments, TuningArguments


@pytest.mark.parametrize("flags", [{"block_size": 1}, {"replay_share": 1.0}, {"data_weights": [-1.0]}])
def test_impossible_values_are_named(flags):
    with pytest.raises(InputError, match=f"--{next(iter(flags))}"):
        PretrainingArguments(**flags)


def test_rows_have_room_for_a_sample():
    with pytest.raises(InputError, match="--max_seq_length 7: need at least 8 tokens"):
        TuningArguments(max_seq_length=7)
