"""What a model's own files say about its answers: every end that they name ends them, and their sampling holds."""

import json
import logging

import pytest

from support import vllm_stand_in
from support.models import save_scripted_llama
from support.tokenizers import PATTERNS, make_byte_level
from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.core.command_line import describe_arguments, parse_args
from utils.core.errors import InputError
from utils.generation.engine import Request
from utils.generation.loading import EnginePlan
from utils.gguf import llamacpp
from utils.text.tokenizer import encode_text, load_tokenizer

ENDS = ["<|end_of_text|>", "<|eot_id|>", "<|fin|>", "<|done|>"]  # EOS, the template's, config.json's, the other's
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|eot_id|>' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant:{% endif %}"
QUESTION = [{"role": "user", "content": "?"}]
QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
needs_llama_cpp = pytest.mark.skipif(not llamacpp.is_installed(), reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = make_byte_level(tmp_path_factory.mktemp("ends") / "tokenizer", PATTERNS["qwen2"], False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|fin|>", "<|done|>", "<|other|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def make_model(tmp_path, tokenizer):
    """Saves a model that answers "X" and one more token, then goes on with "Y" for ever."""

    def make(end, **generation_config):
        x, y = encode_text(tokenizer, "X") + encode_text(tokenizer, "Y")
        last, end = tokenizer.convert_tokens_to_ids(":"), tokenizer.convert_tokens_to_ids(end)
        ids = tokenizer.convert_tokens_to_ids(ENDS)
        folder = save_scripted_llama(
            tmp_path / "model",
            tokenizer,
            {last: x, x: end, end: y, y: y},
            eos_token_id=ids[2],
            max_position_embeddings=64,
        )
        named = {"eos_token_id": [ids[3], ids[0]], **generation_config}
        (folder / "generation_config.json").write_text(json.dumps(named))
        return folder

    return make


def plan(folder, **args):
    return EnginePlan(InferenceArguments(model_name_or_path=str(folder), **args))


def answer(engine, **settings):
    settings = GenerationArguments(**{"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.0} | settings)
    return engine.generate([Request(engine.encode(QUESTION), settings)])[0]


def outcome(completion):
    return completion.text, len(completion.token_ids), completion.finish_reason


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_answer_ends_at_every_token_that_a_file_names(make_model, end, num_beams):
    engine = plan(make_model(end)).load()
    try:
        assert outcome(answer(engine, num_beams=num_beams)) == ("X", 2, "stop")
    finally:
        engine.close()


def test_other_tokens_end_no_answer_unless_the_request_says_so(make_model):
    engine = plan(make_model("<|other|>")).load()
    try:
        assert outcome(answer(engine)) == ("XYYYY", 6, "length")
        assert outcome(answer(engine, stop=["<|other|>"])) == ("X", 2, "stop")
        assert outcome(answer(engine, stop=["<|other|>"], min_new_tokens=3))[2] == "length"
        assert outcome(answer(engine, stop=["no token", "YYY"])) == ("X", 5, "stop")
    finally:
        engine.close()


@needs_llama_cpp
@pytest.mark.parametrize("end", ENDS[:3])
def test_an_exported_file_has_three_ends_and_the_sampling(make_model, tmp_path, end, caplog):
    import export_gguf

    folder = make_model(end, **QWEN)
    export_gguf.main(
        export_gguf.ExportArguments(
            str(folder), output_dir=str(tmp_path / "gguf"), types=["f32"], self_test="none", threads=1
        )
    )
    assert "no place for more than three ends of an answer; it does not name <|done|>" in caplog.text
    found = plan(tmp_path / "gguf", engine="llama.cpp")
    assert found.complete_settings(GenerationArguments()) == GenerationArguments(**QWEN)
    engine = found.load()
    try:
        assert outcome(answer(engine)) == ("X", 2, "stop")
    finally:
        engine.close()
    modelfile = (tmp_path / "gguf" / "Modelfile").read_text()
    assert all(f'PARAMETER stop "{name}"' in modelfile for name in ENDS)


def test_vllm_is_told_every_end(make_model, monkeypatch, tokenizer):
    folder = make_model("<|done|>")
    reference = plan(folder).load()
    vllm_stand_in.install(monkeypatch, reference)
    engine = plan(folder, engine="vllm").load()
    try:
        assert sorted(engine.stop_ids) == sorted(tokenizer.convert_tokens_to_ids(ENDS))
        assert outcome(answer(engine)) == ("X", 2, "stop")  # the stand-in compares what it is asked with its own
    finally:
        engine.close()
        reference.close()


def test_ends_beyond_the_vocabulary_are_ignored_with_a_warning(make_model, caplog):
    found = plan(make_model("<|fin|>", eos_token_id=100_000))
    assert 100_000 not in found.stop_ids
    assert "name 100000 as ends of an answer" in caplog.text


# ---------------------------------------------------------------- sampling


def flags(*words):
    return parse_args(GenerationArguments, argv=list(words))[0]


def test_flags_count_more_than_the_models_file_and_that_more_than_the_defaults(make_model, caplog):
    caplog.set_level(logging.INFO)
    found = plan(make_model("<|fin|>", **QWEN))
    settings = found.complete_settings(flags("--top_k", "40", "--temperature", "0.2"))
    assert settings == GenerationArguments(**QWEN | {"top_k": 40, "temperature": 0.2})
    line = next(line for line in caplog.messages if line.startswith("sampling:"))
    assert "temperature 0.2, top_k 40 (flags)" in line and "top_p 0.8" in line.partition("(flags)")[2]
    assert found.complete_settings(flags("--do_sample", "False")).samples is False
    # A second time changes nothing: all have been chosen by then.
    assert found.complete_settings(settings) == settings


def test_a_file_without_sampling_leaves_the_defaults(make_model, caplog):
    caplog.set_level(logging.INFO)
    settings = plan(make_model("<|fin|>")).complete_settings(flags())
    assert (settings.temperature, settings.top_k, settings.top_p, settings.repetition_penalty) == (0.2, 40, 0.9, 1.1)
    assert "repetition_penalty 1.1 (defaults)" in caplog.text


def test_a_file_that_says_greedy_is_obeyed(make_model):
    assert not plan(make_model("<|fin|>", do_sample=False)).complete_settings(flags()).samples


def test_a_files_impossible_setting_is_named(make_model):
    with pytest.raises(InputError, match=r"generation_config.json.*temperature -1"):
        plan(make_model("<|fin|>", temperature=-1.0)).complete_settings(flags())


def test_what_nobody_asked_for_is_not_recorded():
    assert describe_arguments(flags()) == {} and describe_arguments(flags("--top_k", "40")) == {"top_k": 40}


def test_sentencepiece_control_tokens_stop_too(tiny_model_folder):
    found = EnginePlan(InferenceArguments(model_name_or_path=str(tiny_model_folder)))
    tokenizer = load_tokenizer(tiny_model_folder)
    assert found.find_stop_ids(["<s>", "<unk>", "The"]) == [tokenizer.eos_token_id, 1, 0]
