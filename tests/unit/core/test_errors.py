"""Mistakes of the user's, several at once."""

import pytest

from utils.core.errors import InputError, raise_problems


def test_all_problems_are_said_together():
    raise_problems([])
    with pytest.raises(InputError) as raised:
        raise_problems(["--a 0: need at least 1", "--b: need a file"])
    assert str(raised.value).splitlines() == ["--a 0: need at least 1", "--b: need a file"]
    assert isinstance(raised.value, ValueError), "whoever calls main() from Python may catch what Python raises"
