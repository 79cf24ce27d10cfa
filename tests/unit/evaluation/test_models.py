"""What a model is called, whether it is GGUF, and which weights answered."""

from dataclasses import replace

import pytest

from utils.core.arguments import InferenceArguments
from utils.core.files import hash_file
from utils.evaluation.models import for_evaluation, is_gguf, short_name, split_name, weights_of


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("models/llama/", "llama"),
        ("models/llama.v2", "llama.v2"),
        ("models/q4_k_m.gguf", "q4_k_m"),
        ("answers/ppo.jsonl", "ppo"),
        ("answers/ppo.json", "ppo"),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_path(place, name):
    assert short_name(place) == name
    assert split_name(place) == (name, place) and split_name(f"other={place}") == ("other", place)


def test_a_file_with_an_equals_sign_is_no_name(tmp_path):
    path = tmp_path / "lr=1.gguf"
    path.write_bytes(b"")
    assert split_name(str(path)) == ("lr=1", str(path))
    assert split_name(f"{path}x") == (f"{tmp_path}/lr", "1.ggufx")


def test_gguf_is_a_file_or_a_folder_without_another_model(tmp_path):
    assert is_gguf("any.gguf") and not is_gguf(None) and not is_gguf(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"")
    assert is_gguf(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert not is_gguf(str(tmp_path))


def test_the_weights_that_answer_are_named_and_told_apart(tiny_model_folder, tmp_path):
    first = InferenceArguments(model_name_or_path=str(tiny_model_folder))
    found = weights_of(first)
    assert list(found) == [str(tiny_model_folder)] and found == weights_of(first)
    (tmp_path / "model.gguf").write_bytes(b"some weights")
    of_file = replace(first, model_name_or_path=str(tmp_path / "model.gguf"), engine="llama.cpp")
    assert list(weights_of(of_file).values()) == [hash_file(tmp_path / "model.gguf")]
    of_folder = replace(of_file, model_name_or_path=str(tmp_path))  # of the arena, this failed
    assert list(weights_of(of_folder).values()) == list(weights_of(of_file).values())
    # A model in several files is all of them.
    parts = [tmp_path / f"m [7B]-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"weights")
    of_parts = replace(of_file, model_name_or_path=str(parts[0]))
    before = weights_of(of_parts)
    parts[1].write_bytes(b"others")
    assert weights_of(of_parts).keys() == before.keys() and weights_of(of_parts) != before


def test_a_gguf_file_is_opened_by_llama_cpp(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    for place in (tmp_path, tmp_path / "model.gguf"):
        found = InferenceArguments(model_name_or_path=str(place), only_cpu=True)
        assert for_evaluation(found) == replace(found, engine="llama.cpp")
    model = InferenceArguments(model_name_or_path="a/model", engine="vllm")
    assert for_evaluation(model) is model
