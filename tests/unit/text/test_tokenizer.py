"""tokenizer and pieces: text is cut as the tokenizer's own model file does, and comes back whole."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from support.fuzz_text import fuzz_texts, shared_lines
from support.paths import EXAMPLES
from support.tokenizers import train_sentencepiece, write_sentencepiece
from utils.core.errors import InputError
from utils.text.pieces import BYTE, CONTROL, SAMPLE, inexact_rate, inexact_reason, read_sentencepiece_model
from utils.text.tokenizer import (
    SentencePieceTokenizer,
    check_embedding_rows,
    embedding_rows,
    encode_text,
    encode_texts,
    load_tokenizer,
    save_tokenizer,
    segment_with,
    token_byte_lengths,
    tokenizer_fingerprint,
)
from utils.text.vocabulary import append_pieces


@pytest.fixture(scope="module")
def lines():
    texts = [(EXAMPLES / "pretrain" / f"{name}_heldout.txt").read_text(encoding="utf-8") for name in ("zh", "en")]
    return [line for text in texts for line in text.splitlines() if line]


@pytest.fixture(scope="module")
def texts(lines):
    return lines + fuzz_texts(1500, lines)


@pytest.fixture(scope="module")
def chinese_model():
    lines = (EXAMPLES / "pretrain" / "zh_train.txt").read_text(encoding="utf-8").splitlines()[:1500]
    return train_sentencepiece(lines, 1500)


@pytest.fixture(scope="module")
def merged(base_tokenizer_folder, chinese_model):
    """The base with all Chinese pieces it lacks, ranked below its own."""
    proto = read_sentencepiece_model(base_tokenizer_folder / "tokenizer.model")
    known = {piece.piece for piece in proto.pieces}
    extra = type(proto).FromString(chinese_model)
    return append_pieces(proto, [piece.piece for piece in extra.pieces if piece.piece not in known])


@pytest.fixture(scope="module")
def merged_folder(tmp_path_factory, merged):
    return write_sentencepiece(tmp_path_factory.mktemp("merged") / "merged", merged.SerializeToString())


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory, merged_folder):
    """The same with a tokenizer.json, too."""
    folder = tmp_path_factory.mktemp("saved") / "saved"
    save_tokenizer(load_tokenizer(merged_folder), folder)
    return folder


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory, merged):
    """The same pieces the way the forerunners merged them: every added piece has score 0."""
    tied = type(merged).FromString(merged.SerializeToString())
    for piece in tied.pieces[400:]:
        piece.score = 0.0
    folder = write_sentencepiece(tmp_path_factory.mktemp("tied") / "tied", tied.SerializeToString())
    pads = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(pads), encoding="utf-8")
    return folder


def processor(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("name", ["base_tokenizer_folder", "merged_folder", "tied_folder"])
def test_text_is_cut_as_sentencepiece_does_and_comes_back(request, name, texts):
    folder = request.getfixturevalue(name)
    tokenizer, expected = load_tokenizer(folder), processor(folder).encode(texts)
    assert encode_texts(tokenizer, texts) == expected
    assert encode_texts(tokenizer, texts, num_threads=2) == expected
    assert [encode_text(tokenizer, text) for text in texts[:50]] == expected[:50]
    by_call = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    assert by_call == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts


@pytest.mark.parametrize("model_type", [None, "llama", "mistral", "mixtral"])
def test_exported_tokenizer_json_cuts_alike_in_auto_tokenizer(tmp_path, merged_folder, texts, model_type):
    tokenizer = load_tokenizer(merged_folder)
    save_tokenizer(tokenizer, tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    auto = AutoTokenizer.from_pretrained(tmp_path)
    expected = encode_texts(tokenizer, texts)
    theirs = [auto(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    assert theirs == expected
    # Special tokens in templates: split off, each stretch between them with a dummy prefix of its own; BOS in front.
    for text in texts[-300:]:
        assert auto(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert auto("a")["input_ids"][0] == tokenizer.bos_token_id
    assert [auto.decode(ids) for ids in expected] == texts


def test_saved_and_loaded_again_is_the_same(tmp_path, tied_folder, merged_folder):
    for number, folder in enumerate((tied_folder, merged_folder)):
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tokenizer.init_kwargs["embedding_rows"] = 2048
        saved = tmp_path / str(number)
        save_tokenizer(tokenizer, saved)
        again = load_tokenizer(saved)
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
        assert again.chat_template == tokenizer.chat_template
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again("<s>你好</s> b")["input_ids"] == tokenizer("<s>你好</s> b")["input_ids"]
        assert (saved / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
        assert embedding_rows(again) == 2048
        assert again.apply_chat_template([{"role": "user", "content": "</s>"}])["input_ids"] == [again.eos_token_id]


def test_a_tokenizer_whose_folder_is_gone_is_saved_whole(tmp_path, merged_folder):
    moved = tmp_path / "moved"
    shutil.copytree(merged_folder, moved)
    tokenizer = load_tokenizer(moved)
    shutil.rmtree(moved)
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "saved")) == tokenizer_fingerprint(tokenizer)


def test_tied_scores_have_no_exact_tokenizer_json_and_the_rate_is_said(tmp_path, tied_folder, caplog):
    tokenizer = load_tokenizer(tied_folder)
    assert "share their score" in inexact_reason(tokenizer.proto)
    with caplog.at_level("WARNING"):
        save_tokenizer(tokenizer, tmp_path / "a")
        save_tokenizer(tokenizer, tmp_path / "b")
    assert not (tmp_path / "a" / "tokenizer.json").exists()
    rate = inexact_rate((tied_folder / "tokenizer.model").read_bytes())
    said = [record.getMessage() for record in caplog.records if "no tokenizer.json" in record.getMessage()]
    assert len(said) <= 1  # once a process, whichever test came first
    auto = AutoTokenizer.from_pretrained(tmp_path / "a")
    wrong = [
        text for text in SAMPLE if auto(text, add_special_tokens=False)["input_ids"] != encode_text(tokenizer, text)
    ]
    assert rate == len(wrong) / len(SAMPLE)


def test_special_tokens_come_from_the_map_the_config_or_the_model(tmp_path, merged, tied_folder):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.model").write_bytes(merged.SerializeToString())
    tokenizer = load_tokenizer(bare)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", None)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    padded = load_tokenizer(tied_folder)  # its map names a pad token the model lacks
    assert padded.pad_token_id == len(merged.pieces) == len(padded) - 1
    batch = padded(["a", "你好吗 b"], padding=True, return_tensors="np")
    assert batch["attention_mask"].sum() < batch["attention_mask"].size
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert padded.decode(batch["input_ids"][0], skip_special_tokens=True) == "a"


def test_added_tokens_beyond_the_model_keep_their_ids(tmp_path, base_tokenizer_folder):
    folder = tmp_path / "added"
    shutil.copytree(base_tokenizer_folder, folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 400, "<|im_end|>": 401}), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [400, 401]
    assert len(tokenizer) == 402
    save_tokenizer(tokenizer, tmp_path / "saved")
    for again in (load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        own = again("<|im_start|>a<|im_end|> b", add_special_tokens=False)["input_ids"]
        assert own[0] == 400 and own == encode_text(tokenizer, "<|im_start|>a<|im_end|> b")


def test_control_pieces_are_special_without_any_config(tmp_path, base_tokenizer_folder):
    proto = append_pieces(read_sentencepiece_model(base_tokenizer_folder / "tokenizer.model"), ["[INST]"], CONTROL)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path / "saved")
    for same in (tokenizer, load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert same("[INST]a", add_special_tokens=False)["input_ids"][0] == 400
        assert same.decode([400, *encode_text(tokenizer, "a")], skip_special_tokens=True).strip() == "a"
        assert 400 not in same("[INST]", split_special_tokens=True)["input_ids"]
    assert 400 not in encode_text(tokenizer, "[INST]")


def test_decoding_partial_characters_padding_and_controls(merged_folder):
    tokenizer = load_tokenizer(merged_folder)
    ids = encode_text(tokenizer, "😀")
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")  # what streamers wait for
    assert tokenizer.decode([len(tokenizer) + 5, *ids]) == "😀"  # a padded row stands for nothing
    assert tokenizer.decode([1, *encode_text(tokenizer, "a b")]) == "<s> a b"
    assert tokenizer.decode([1, *encode_text(tokenizer, "a b"), 2], skip_special_tokens=True) == "a b"
    assert tokenizer.decode(ids[0]) == tokenizer.decode([ids[0]])
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == "😀"
    assert tokenizer.batch_decode([ids, ids]) == ["😀", "😀"]


def test_a_pickled_tokenizer_is_the_same(merged_folder):
    tokenizer = load_tokenizer(merged_folder)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert encode_text(again, "你好 a") == encode_text(tokenizer, "你好 a")


def test_fingerprint_depends_on_segmentation_and_specials_alone(tmp_path, merged, merged_folder):
    tokenizer = load_tokenizer(merged_folder)
    first = tokenizer_fingerprint(tokenizer)
    elsewhere = type(merged).FromString(merged.SerializeToString())
    elsewhere.trainer_spec.input.append("/some/other/path.txt")
    folder = write_sentencepiece(tmp_path / "elsewhere", elsewhere.SerializeToString())
    assert tokenizer_fingerprint(load_tokenizer(folder)) == first
    elsewhere.pieces[-1].score -= 1
    folder = write_sentencepiece(tmp_path / "rescored", elsewhere.SerializeToString())
    assert tokenizer_fingerprint(load_tokenizer(folder)) != first
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer_fingerprint(tokenizer) != first


def test_token_bytes_count_the_text(merged_folder, texts):
    tokenizer = load_tokenizer(merged_folder)
    lengths = token_byte_lengths(tokenizer)
    assert lengths.dtype == np.int32
    assert len(lengths) == len(tokenizer)
    for text in texts[::20]:  # the dummy prefix adds a space to every text
        assert lengths[encode_text(tokenizer, text)].sum() == len(text.encode()) + 1
    for index, piece in enumerate(tokenizer.proto.pieces):
        if piece.type in (CONTROL, BYTE):
            assert lengths[index] == (piece.type == BYTE)


def test_new_pieces_are_cut_by_the_old_tokenizer_without_prefix(base_tokenizer_folder, merged_folder):
    old, new = load_tokenizer(base_tokenizer_folder), load_tokenizer(merged_folder)
    for index in range(0, len(new), 7):
        ids = segment_with(old, new, index)
        if index < len(old):
            assert ids == [index]
        else:
            assert b"".join(old.surfaces[i] for i in ids) == new.surfaces[index]
    assert segment_with(old, new, len(new) + 3) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no tokenizer in"),
        ({"chinese_sp.model": b"x"}, "found chinese_sp.model"),
        ({"tokenizer.model": b"\x00garbage"}, "not a sentencepiece model"),
        ({"tokenizer.model": b""}, "without pieces"),
        ({"tokenizer.json": b'{"model": '}, "broken JSON"),
        ({"tokenizer.json": b"{}"}, "need a tokenizer's 'model' with its 'vocab'"),
        ({"tokenizer.json": b'{"model": {"vocab": {}}}'}, r"its tokenizer \(tokenizer\.json\) cannot be opened"),
        ({"tokenizer.json": b"[]"}, "need an object, got list"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path, content, message):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"pad_token": 0}, "pad_token 0: need text, or an object with 'content'"),
        ("tokenizer_config.json", {"additional_special_tokens": "<a>"}, "need a list of tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {"content": "x"}}}, "need an object of ids"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "each with 'name' and 'template'"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "model_max_length 'long': need a number"),
        ("tokenizer_config.json", [], "need an object, got list"),
        ("special_tokens_map.json", {"eos_token": ["</s>"]}, "eos_token"),
        ("added_tokens.json", {"<a>": "400"}, "'<a>' has the id '400', need a number"),
    ],
)
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_a_wrong_file_beside_the_tokenizer_is_named(tmp_path, saved_folder, kind, file, content, message):
    shutil.copyfile(saved_folder / kind, tmp_path / kind)
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / file)) + ".*" + re.escape(message)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_ends_that_the_old_map_alone_names_are_found_beside_added_tokens(tmp_path, saved_folder, kind):
    shutil.copyfile(saved_folder / kind, tmp_path / kind)
    added = {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_truncated_and_contradicting_files_are_refused(tmp_path, base_tokenizer_folder, merged_folder):
    model = (base_tokenizer_folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(InputError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    vocab = {"model": {"vocab": {"<unk>": 0, "other": 300}}}
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(InputError, match="come from different tokenizers"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nowhere", "nobody/no-such-tokenizer-here"])
def test_a_missing_folder_is_an_input_error(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=name):
        load_tokenizer(name)


def test_a_tokenizer_fits_the_rows_of_its_model(base_tokenizer_folder):
    tokenizer = load_tokenizer(base_tokenizer_folder)
    size = len(tokenizer)

    def check(rows, old_rows=None):
        check_embedding_rows(tokenizer, rows, "too few", old_rows, "outdated")

    check(size)
    check(size + 100)  # rows that nobody grew are padding
    with pytest.raises(InputError, match="too few"):
        check(size - 1)
    check(size + 50, size - 50)  # grown for this tokenizer
    with pytest.raises(InputError, match="outdated"):
        check(size + 50, size)
    check(-(-(size + 1) // 64) * 64, size + 1)  # grown to a multiple of a power of two, as others pad
    padded = -(-size // 100) * 100 + 100
    with pytest.raises(InputError, match="outdated"):
        check(padded, size)
    tokenizer.init_kwargs["embedding_rows"] = padded  # as merge_tokenizers.py --pad_to_multiple_of records it
    check(padded, size)


def test_a_tokenizer_json_alone_is_loaded_as_it_is(tmp_path, merged_folder, texts):
    exact = load_tokenizer(merged_folder)
    save_tokenizer(exact, tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert not isinstance(tokenizer, SentencePieceTokenizer)
    tokenizer.pad_token = "</s>"
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)  # leaves settings behind
    assert encode_texts(tokenizer, texts) == encode_texts(exact, texts)
    assert (token_byte_lengths(tokenizer) == token_byte_lengths(exact)).all()


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["llama2_32000", "chinese_llama2_55296"])
def test_published_tokenizers_on_shared_text(shared_data, name, request):
    check_shared(shared_data, shared_data / "tokenizers" / name, every=60, fuzz=500)


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["llama2_32000", "chinese_llama2_55296"])
def test_published_tokenizers_on_all_shared_text(shared_data, name):
    check_shared(shared_data, shared_data / "tokenizers" / name, every=1, fuzz=20000)


def check_shared(shared_data, folder, every, fuzz):
    lines = shared_lines(shared_data, every)
    texts = [text for text in lines + fuzz_texts(fuzz, lines) if "\u2581" not in text]
    tokenizer, expected = load_tokenizer(folder), processor(folder).encode(texts)
    theirs = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    assert theirs == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts
