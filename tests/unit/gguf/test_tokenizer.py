"""The tokenizer that a GGUF file holds, against the folder it was made of and the gguf package."""

import pytest
from tokenizers import AddedToken

from support.fuzz_text import fuzz_texts
from support.models import save_llama
from support.tokenizers import PATTERNS, make_byte_level
from utils.core.errors import InputError
from utils.gguf import llamacpp
from utils.gguf.file import plan_gguf, write_gguf
from utils.gguf.metadata import read_metadata
from utils.gguf.tokenizer import load_gguf_tokenizer, token_differences
from utils.lora.inputs import open_merge
from utils.text.tokenizer import encode_texts, load_tokenizer


@pytest.fixture(scope="module")
def path(tiny_model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model-F32.gguf"
    with open_merge(str(tiny_model_folder)) as inputs:
        write_gguf(plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "test"), inputs.model, "F32", path)
    return path


def test_the_metadata_is_what_the_gguf_package_reads(path):
    import gguf

    expected = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    found = read_metadata(path)
    assert found == {name: value for name, value in expected.items() if not name.startswith("GGUF.")}


def test_texts_are_cut_as_the_folder_s_tokenizer_cuts_them(path, tiny_model_folder):
    expected, found = load_tokenizer(tiny_model_folder), load_gguf_tokenizer(path, read_metadata(path))
    texts = fuzz_texts(200, ["Once upon a time", "你好，我的猫"])
    assert encode_texts(found, texts) == encode_texts(expected, texts)
    assert (found.bos_token, found.eos_token) == (expected.bos_token, expected.eos_token)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_added_words_are_words_in_the_file_and_to_llamacpp(tmp_path, base_tokenizer_folder, kind):
    if kind == "sentencepiece":
        tokenizer = load_tokenizer(base_tokenizer_folder)
    else:
        tokenizer = make_byte_level(tmp_path / "tokenizer", PATTERNS["qwen2"], False)
    words = ["维修手册", "<|im_end|>", "two words"]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    save_llama(tmp_path / "model", tokenizer)
    path = tmp_path / "model-F32.gguf"
    with open_merge(str(tmp_path / "model")) as inputs:
        write_gguf(plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "test"), inputs.model, "F32", path)
    texts = [f"See{space}{word}{space}the 手册, <s>{word}" for word in words for space in ("", " ", "\n")]
    found = load_gguf_tokenizer(path, read_metadata(path))
    assert encode_texts(found, texts) == encode_texts(tokenizer, texts)
    assert all(set(tokenizer.convert_tokens_to_ids(words)) & set(ids) for ids in encode_texts(found, texts))
    if llamacpp.is_installed():
        # It takes well-known names for special; engines give it ids.
        assert token_differences(path, tokenizer, [text for text in texts if words[1] not in text]) == []


def test_unknown_kinds_of_vocabularies_are_refused(path):
    metadata = read_metadata(path)
    with pytest.raises(InputError, match=r"of the kind bert, .* --tokenizer_path"):
        load_gguf_tokenizer(path, metadata | {"tokenizer.ggml.model": "bert"})
    with pytest.raises(InputError, match=r"the way falcon, .* --tokenizer_path"):
        load_gguf_tokenizer(path, metadata | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "falcon"})
