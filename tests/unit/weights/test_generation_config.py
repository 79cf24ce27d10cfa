"""What config.json and generation_config.json say about answers; transformers' own reading is the oracle."""

import json

import pytest
from transformers import GenerationConfig

from utils.core.errors import InputError
from utils.weights.generation_config import NEUTRAL_SAMPLING, find_generation_config, named_end_ids, named_sampling


@pytest.fixture
def folder(tmp_path):
    def write(name="model", **files):
        (tmp_path / name).mkdir(exist_ok=True)
        for file, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name / f"{file}.json").write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("config", "generation_config", "ids"),
    [
        ({"eos_token_id": 5}, None, [5]),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 6]}, [5, 7, 6]),
        ({"eos_token_id": [5, 8]}, {"bos_token_id": 1}, [5, 8]),
        ({"eos_token_id": None}, {"eos_token_id": -1}, []),
        ({"text_config": {"eos_token_id": 106}}, {"eos_token_id": [1, 106]}, [106, 1]),
        ({}, {}, []),
    ],
)
def test_every_token_that_a_file_names_is_an_end(folder, config, generation_config, ids):
    files = {"config": config} | ({} if generation_config is None else {"generation_config": generation_config})
    assert named_end_ids([folder(**files)]) == ids


def test_an_adapters_file_counts_before_the_bases_as_in_merging(folder):
    base = folder("base", config={"eos_token_id": 2}, generation_config={"eos_token_id": 3, "temperature": 0.5})
    adapter = folder("adapter", adapter_config={})
    assert find_generation_config([adapter, base]) == base / "generation_config.json"
    assert named_end_ids([adapter, base]) == [2, 3] and named_sampling([adapter, base])["temperature"] == 0.5
    folder("adapter", generation_config={"eos_token_id": 4, "top_k": -1})
    assert named_end_ids([adapter, base]) == [2, 4]
    assert named_sampling([adapter, base]) == NEUTRAL_SAMPLING | {"top_k": 0}
    assert named_end_ids([]) == [] and named_sampling([]) == {} and find_generation_config([]) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": False},
        {"do_sample": True, "min_p": 0.1},
    ],
)
def test_settings_are_those_that_transformers_would_sample_with(folder, settings):
    model = folder(generation_config={"eos_token_id": 2, **settings})
    library = GenerationConfig.from_pretrained(model)
    usual = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    found = named_sampling([model])
    assert found.pop("do_sample") == library.do_sample
    assert found == {
        name: value if getattr(library, name) is None else getattr(library, name) for name, value in usual.items()
    }


def test_a_file_that_names_no_setting_asks_for_none(folder):
    assert named_sampling([folder(generation_config={"eos_token_id": 2, "max_length": 4096})]) == {}
    assert named_sampling([folder(generation_config={"temperature": None, "do_sample": None})]) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>': need a token id, a list of ids, or null"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"temperature": "0.7"}, "temperature '0.7': need a number"),
        ({"do_sample": 1}, "do_sample 1: need true or false"),
        ({"top_k": True}, "top_k True: need a number"),
        ([1], "need an object, got list"),
        ('{"top_k": ', "broken JSON"),
    ],
)
def test_what_makes_no_sense_is_named_with_its_file(folder, content, message):
    model = folder(generation_config=content)
    with pytest.raises(InputError, match=r"generation_config\.json.*" + message.replace("[", r"\[")):
        named_sampling([model])
        named_end_ids([model])
