"""Endpoints: no server is sent another one's key, and what a server is not told is known."""

import pytest

from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.core.errors import InputError
from utils.evaluation.arena.players import find_players
from utils.evaluation.endpoints import answer_options, check_key_variables, key_variable, unsent_flags


def test_two_servers_never_share_a_key():
    assert key_variable("gpt-4.1") == "GPT_4_1_API_KEY"
    check_key_variables(["a", "b", "a-b", "judge"])
    for names in (["甲", "乙"], ["a-b", "c", "a.b"], ["far", "FAR"], ["judge", "judge"]):
        with pytest.raises(InputError, match=r"would both take their key from [A-Z_]+; call one of them otherwise"):
            check_key_variables(names)


def test_the_arena_asks_no_server_before_their_keys_are_told_apart():
    servers = ["甲=http://127.0.0.1:9/v1", "乙=http://127.0.0.1:9/v1"]
    with pytest.raises(InputError, match="甲 and 乙 would both take their key from __API_KEY"):
        find_players(InferenceArguments(), [], [], servers)
    with pytest.raises(InputError, match="JUDGE_API_KEY"):
        find_players(InferenceArguments(), [], [], ["Judge=http://127.0.0.1:9/v1"], judge="judge")


def test_settings_that_no_server_is_told():
    told = GenerationArguments(temperature=0.5, top_p=0.5, stop=["x"], seed=3, max_new_tokens=9, presence_penalty=1)
    assert unsent_flags(told) == []
    assert answer_options(told, 3) == {
        "max_tokens": 9, "seed": 3, "temperature": 0.5, "top_p": 0.5, "presence_penalty": 1, "frequency_penalty": 0.0,
        "stop": ["x"],
    }  # fmt: skip
    left = {"max_tokens": 9, "seed": 3, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert answer_options(GenerationArguments(max_new_tokens=9), 3) == left, "the server's own temperature and top_p"
    assert answer_options(GenerationArguments(max_new_tokens=9, do_sample=False), 3) == left | {"temperature": 0}
    assert unsent_flags(GenerationArguments(top_k=3, repetition_penalty=1.5)) == ["--top_k", "--repetition_penalty"]
