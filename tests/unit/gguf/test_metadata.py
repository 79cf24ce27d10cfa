"""utils.gguf.metadata: what a file says of sampling means what the generation_config.json it was made of means."""

import json

import pytest

from utils.core.errors import InputError
from utils.gguf.metadata import describe_sampling, read_sampling
from utils.weights.generation_config import named_sampling


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05},
        {"top_k": -1},
        {},
    ],
)
def test_what_a_converter_wrote_means_the_same_as_the_folder(tmp_path, settings):
    """llama.cpp's converter writes those that are there, this project all of them."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
    folder = named_sampling([tmp_path])
    keys = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "penalty_repeat"}
    written = {f"general.sampling.{keys[name]}": value for name, value in settings.items()}
    assert read_sampling(written, "a.gguf") == folder
    own = {name.replace("add_sampling_", "general.sampling."): v for name, v in describe_sampling(folder).items()}
    assert read_sampling(own, "a.gguf") == folder


def test_a_setting_that_makes_no_sense_is_named_with_the_file():
    with pytest.raises(InputError, match=r"a\.gguf: --top_p 7"):
        read_sampling({"general.sampling.top_p": 7.0}, "a.gguf")
