"""utils.text.vocabulary: added pieces are reachable, the base's language is cut as before, and every engine agrees."""

import functools
import itertools
import json

import pytest
import regex
import sentencepiece
from tokenizers import normalizers
from transformers import AutoTokenizer

from support.fuzz_text import fuzz_texts, shared_lines
from support.paths import SHARED_DATA
from support.tokenizers import PATTERNS, make_byte_level, read_lines, train_sentencepiece, write_sentencepiece
from utils.core.errors import InputError
from utils.text.pieces import CONTROL, NORMAL, byte_alphabet, inexact_reason, read_sentencepiece_model
from utils.text.tokenizer import encode_text, encode_texts, load_tokenizer, token_surfaces
from utils.text.vocabulary import (
    Selection,
    append_pieces,
    base_with_added_tokens,
    count_disagreements,
    drop_until_stable,
    extend_byte_level,
    is_base_language,
    merge_sentencepiece,
    save_extended,
    unreachable_pieces,
    unreachable_tokens,
)


@pytest.fixture(scope="module")
def texts():
    lines = read_lines("zh_heldout.txt") + read_lines("en_heldout.txt")
    return lines + fuzz_texts(1000, lines, seed=1)


@pytest.fixture(scope="module")
def extra():
    """Chinese pieces, with some English and punctuation in the corpus, as real ones have."""
    from sentencepiece import sentencepiece_model_pb2

    lines = read_lines("zh_train.txt")[:1500] + read_lines("en_train.txt")[:150] + ["——「你好」!!!! 3.14"] * 30
    return sentencepiece_model_pb2.ModelProto.FromString(train_sentencepiece(lines, 1800))


@pytest.fixture(scope="module")
def base(base_tokenizer_folder):
    return read_sentencepiece_model(base_tokenizer_folder / "tokenizer.model")


# ---------------------------------------------------------------- sentencepiece


def test_both_keep_flags_give_the_forerunners_pieces_in_their_order(base, extra):
    selection = Selection(keep_unreachable=True, keep_base_language_pieces=True)
    merged = merge_sentencepiece(base, extra, selection)
    known = {piece.piece for piece in base.pieces}
    assert [p.piece for p in merged.pieces[:400]] == [p.piece for p in base.pieces]
    assert [p.score for p in merged.pieces[:400]] == [p.score for p in base.pieces]
    assert [p.piece for p in merged.pieces[400:]] == [p.piece for p in extra.pieces if p.piece not in known]
    scores = [p.score for p in merged.pieces[400:]]
    assert scores == sorted(set(scores), reverse=True)
    assert scores[0] < min(p.score for p in base.pieces if p.type == NORMAL)


def test_by_default_every_added_piece_is_reachable_and_english_is_cut_as_before(base, extra, texts):
    selection = Selection()
    merged = merge_sentencepiece(base, extra, selection)
    added = [piece.piece for piece in merged.pieces[400:]]
    counts = selection.counts
    assert counts["added"] == len(added) > 500
    assert counts["base_language"] > 50
    assert counts["candidates"] - counts["already_in_base"] - counts["base_language"] - counts["unreachable"] == len(
        added
    )
    assert unreachable_pieces(merged, 400) == []
    old = sentencepiece.SentencePieceProcessor(model_proto=base.SerializeToString())
    new = sentencepiece.SentencePieceProcessor(model_proto=merged.SerializeToString())
    latin = [*read_lines("en_heldout.txt"), *read_lines("en_train.txt")[:500], "(a) + {b} = <c> !!!! ~ 3.14 @ x_y"]
    assert new.encode(latin) == old.encode(latin)
    chinese = read_lines("zh_heldout.txt")
    assert sum(map(len, new.encode(chinese))) < 0.6 * sum(map(len, old.encode(chinese)))


def test_unreachable_pieces_are_dropped(base):
    # 甲乙丙 has no split into two pieces, and 甲乙丙庚 hangs on it. 丑寅 ranks above 子丑 and 寅卯: it pre-empts
    # both halves of 子丑寅卯. 戊己庚 is reached through 戊己, whatever its rank.
    characters = list("甲乙丙庚戊己子丑寅卯")
    words = ["戊己庚", "甲乙丙", "甲乙丙庚", "丑寅", "戊己", "子丑寅卯", "子丑", "寅卯"]
    selection = Selection()
    merged = merge_sentencepiece(base, append_pieces(base, characters + words), selection)
    kept = [piece.piece for piece in merged.pieces[400:]]
    assert kept == [*characters, "戊己庚", "丑寅", "戊己", "子丑", "寅卯"]
    assert unreachable_pieces(merged, 400) == []
    assert selection.counts["unreachable"] == 3


def test_dropping_goes_on_until_none_fails():
    """Each candidate here needs the one before it: dropping "b" takes "c" and "d" along, one a round."""
    order = "abcdefg"

    def failures(chosen):
        return {"broken": {c for c in chosen if c == "b" or (c in "cd" and order[order.index(c) - 1] not in chosen)}}

    selection = Selection(max_new_tokens=3)
    assert drop_until_stable(list(order), selection, failures) == ["a", "e", "f"]
    assert selection.counts == {"broken": 3, "beyond_max_new_tokens": 1, "added": 3}


def test_max_new_tokens_takes_the_best_that_pass(base, extra):
    selection = Selection(max_new_tokens=100)
    merged = merge_sentencepiece(base, extra, selection)
    assert len(merged.pieces) == 500
    assert unreachable_pieces(merged, 400) == []
    assert selection.counts["beyond_max_new_tokens"] > 0
    chosen = [piece.piece for piece in merged.pieces[400:]]
    assert sum(len(piece) > 1 for piece in chosen) > 30
    # The words of highest rank, each with the characters it is made of.
    offered = [piece.piece for piece in merge_sentencepiece(base, extra, Selection()).pieces[400:]]
    assert [piece for piece in chosen if len(piece) > 1] == [
        piece for piece in offered if len(piece) > 1 and piece in chosen
    ]
    assert next(piece for piece in offered if len(piece) > 1) in chosen
    for piece in chosen:
        assert {piece, *piece} <= {*chosen, *(base_piece.piece for base_piece in base.pieces)}


def test_a_base_language_sample_drops_what_it_holds(base, extra):
    sample = ["The Chinese word 你好 means hello.", "猫 is a cat."]
    plain = sentencepiece.SentencePieceProcessor(
        model_proto=merge_sentencepiece(base, extra, Selection()).SerializeToString()
    )
    assert any(index >= 400 for ids in plain.encode(sample) for index in ids)
    selection = Selection(base_language_sample=sample)
    merged = merge_sentencepiece(base, extra, selection)
    processor = sentencepiece.SentencePieceProcessor(model_proto=merged.SerializeToString())
    before = sentencepiece.SentencePieceProcessor(model_proto=base.SerializeToString())
    assert processor.encode(sample) == before.encode(sample)
    assert selection.counts["in_base_language_sample"] > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[
            ("a", True),
            ("3年", True),
            ("的s", True),
            ("——", True),
            ("!!!!", True),
            (" é…", True),
            ("‘", True),
            ("", True),
        ],
        *[("的", False), (" 我", False), ("，", False), ("。”", False), ("é的", False), ("→", False), ("😀", False)],
    ],
)
def test_what_counts_as_the_base_language(text, expected):
    assert is_base_language(text.encode()) is expected


def test_bytes_inside_latin_text_count_as_the_base_language():
    text = "naïve — “café” ½ … Ă".encode()
    for start in range(len(text)):
        for end in range(start, len(text) + 1):
            assert is_base_language(text[start:end])
    for partial in ("的".encode()[:2], "的".encode()[:1], "😀".encode()[:3], "的".encode() + b"\xe2"):
        assert not is_base_language(partial)


def test_a_character_the_base_lacks_may_enter_and_orphans_may_not(base):
    """Merge lists start from pieces: a piece with a character that has none is reachable in sentencepiece alone."""
    assert "”" not in {piece.piece for piece in base.pieces}
    merged = merge_sentencepiece(base, append_pieces(base, ["。", "”", "。”", "——", "龘", "龘龗"]), Selection())
    assert [piece.piece for piece in merged.pieces[400:]] == ["。", "”", "。”", "龘"]
    orphaned = append_pieces(base, ["。”", "。"])
    assert unreachable_pieces(orphaned, 400) == ["。”"]
    assert "no piece of its own" in inexact_reason(orphaned)


def test_scores_stay_above_the_spaces_at_the_very_end(base):
    low = append_pieces(base, ["▁" * 7])
    low.pieces[-1].score = -1e9
    merged = append_pieces(low, ["甲", "乙"])
    assert merged.pieces[-1].score == merged.pieces[-2].score - 1 > -1000
    full = append_pieces(base, ["甲"])
    full.pieces[-1].score = -(2.0**24) + 1
    with pytest.raises(InputError, match="no room"):
        append_pieces(full, ["乙", "丙"])


def test_a_base_that_is_not_bpe_is_refused(base, extra):
    unigram = type(base).FromString(base.SerializeToString())
    unigram.trainer_spec.model_type = unigram.trainer_spec.UNIGRAM
    with pytest.raises(InputError, match="not BPE"):
        merge_sentencepiece(unigram, extra, Selection())


def test_added_tokens_of_the_base_become_control_pieces(tmp_path, base_tokenizer_folder, extra):
    folder = write_sentencepiece(tmp_path / "added", (base_tokenizer_folder / "tokenizer.model").read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 400, "<|im_end|>": 401}), encoding="utf-8")
    base = load_tokenizer(folder)
    proto = base_with_added_tokens(base)
    assert [(piece.piece, piece.type) for piece in proto.pieces[400:]] == [
        ("<|im_start|>", CONTROL),
        ("<|im_end|>", CONTROL),
    ]
    out = tmp_path / "out"
    out.mkdir()
    merged = save_extended(base, merge_sentencepiece(proto, extra, Selection()), out)
    assert merged.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [400, 401]
    assert 400 in encode_text(merged, "a <|im_start|> b"), "it stays the word that it was, not special"
    assert not merged.added_tokens_decoder[400].special
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 405}), encoding="utf-8")
    with pytest.raises(InputError, match="405"):
        base_with_added_tokens(load_tokenizer(folder))


def test_the_written_folder_is_exact_for_every_engine(tmp_path, base_tokenizer_folder, base, extra, texts):
    tokenizer = save_extended(
        load_tokenizer(base_tokenizer_folder),
        merge_sentencepiece(base, extra, Selection()),
        tmp_path,
        pad_token="<pad>",
        chat_template="{{ messages }}",
        pad_to_multiple_of=64,
    )
    found = count_disagreements(tmp_path, texts)
    assert found == {"round_trip": 0, "load_tokenizer": 0, "AutoTokenizer": 0}
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.init_kwargs["embedding_rows"] % 64 == 0
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == tokenizer.pad_token_id
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert processor.encode(texts) == encode_texts(tokenizer, texts)
    assert processor.get_piece_size() == len(tokenizer)


# ---------------------------------------------------------------- byte-level BPE


@functools.cache
def byte_characters():
    return {byte: character for character, byte in byte_alphabet().items()}


def plain_bpe(text, pattern, vocab, ranks, ignore_merges):
    """Byte-pair encoding as the book has it, with no library."""
    ids = []
    for word in regex.findall(pattern, text):
        parts = [byte_characters()[byte] for byte in word.encode()]
        if ignore_merges and "".join(parts) in vocab:
            parts = ["".join(parts)]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            if pairs[best] not in ranks:
                break
            parts[best : best + 2] = ["".join(pairs[best])]
        ids += [vocab[part] for part in parts]
    return ids


@pytest.fixture(scope="module", params=["llama-bpe", pytest.param("qwen2", marks=pytest.mark.slow)])
def byte_level(request, tmp_path_factory):
    """(name, base, extended, its folder) for one split pattern; Llama-3 takes whole words without merging them."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    base = make_byte_level(folder / "base", PATTERNS[name], ignore_merges=name == "llama-bpe")
    lines = [*read_lines("zh_train.txt")[:2000], "Python和3个——“你好”!!"] * 2
    selection = Selection()
    extended = extend_byte_level(base.backend_tokenizer, [lines[:1500], lines[1500:]], 800, selection)
    (folder / "extended").mkdir()
    tokenizer = save_extended(base, extended, folder / "extended", pad_token="<|pad|>")
    assert selection.counts["added"] == 800
    return name, base, tokenizer, folder / "extended"


def test_byte_level_base_is_a_prefix_and_every_new_token_is_reachable(byte_level):
    _, base, tokenizer, _ = byte_level
    old, new = (json.loads(t.backend_tokenizer.to_str())["model"] for t in (base, tokenizer))
    assert new["merges"][: len(old["merges"])] == old["merges"]
    assert all(tokenizer.convert_tokens_to_ids(token) == index for token, index in base.get_vocab().items())
    assert len(tokenizer) == len(base) + 801 == max(tokenizer.get_vocab().values()) + 1
    added = [token for token, index in tokenizer.get_vocab().items() if index >= len(base) and token != "<|pad|>"]
    assert unreachable_tokens(tokenizer.backend_tokenizer, added) == set()
    surfaces, whole = token_surfaces(tokenizer), 0
    for token in added:
        surface = surfaces[tokenizer.convert_tokens_to_ids(token)]
        assert not is_base_language(surface)
        text = surface.decode(errors="replace")
        if "\ufffd" not in text:
            whole += 1
            assert encode_text(tokenizer, text) == [tokenizer.convert_tokens_to_ids(token)]
    assert whole > 400  # the rest are parts of characters, on the way to them
    assert tokenizer.pad_token_id == len(tokenizer) - 1


def test_byte_level_engines_agree_with_plain_bpe(byte_level, texts):
    name, base, tokenizer, folder = byte_level
    assert count_disagreements(folder, texts) == {"round_trip": 0, "load_tokenizer": 0, "AutoTokenizer": 0}
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    rules = (PATTERNS[name], model["vocab"], ranks, name == "llama-bpe")
    assert [plain_bpe(text, *rules) for text in texts] == encode_texts(tokenizer, texts)
    english = [*read_lines("en_heldout.txt"), "café — “naïve” … ½ £5 !!!! —— 3.14"]
    assert encode_texts(tokenizer, english) == encode_texts(base, english)
    chinese = read_lines("zh_heldout.txt")
    before, after = (sum(map(len, encode_texts(t, chinese))) for t in (base, tokenizer))
    assert after < 0.5 * before


def test_byte_level_training_equals_training_in_one_go(tmp_path):
    """With no filter, continuing from the base's merges gives what BPE training on its cut text would give by hand."""
    base = make_byte_level(tmp_path, PATTERNS["qwen2"], ignore_merges=False)
    lines = ["天地玄黄天地", "天地天地宇宙", "宇宙天地玄黄"] * 3
    selection = Selection(keep_unreachable=True, keep_base_language_pieces=True)
    extended = extend_byte_level(base.backend_tokenizer, [lines], 5, selection)
    words = [[tuple(word)] for line in lines for word in [encode_texts(base, [line])[0]]]
    sequences = [list(word[0]) for word in words]
    names = {index: token for token, index in base.get_vocab().items()}
    sequences = [[names[index] for index in sequence] for sequence in sequences]
    learned = json.loads(extended.to_str())["model"]["merges"]
    base_merges = json.loads(base.backend_tokenizer.to_str())["model"]["merges"]
    for left, right in learned[len(base_merges) :]:
        counts = {}
        for sequence in sequences:
            for pair in itertools.pairwise(sequence):
                counts[pair] = counts.get(pair, 0) + 1
        assert counts[left, right] == max(counts.values())
        for sequence in sequences:
            position = 0
            while position < len(sequence) - 1:
                if (sequence[position], sequence[position + 1]) == (left, right):
                    sequence[position : position + 2] = [left + right]
                position += 1


@pytest.mark.slow
def test_a_qwen2_tokenizer_beside_its_model_config(tmp_path, texts):
    """Beside a qwen2 config AutoTokenizer takes its own class whatever the tokenizer says: it must agree too."""
    base = make_byte_level(tmp_path / "base", PATTERNS["qwen2"], ignore_merges=False, normalizer=normalizers.NFC())
    extended = extend_byte_level(base.backend_tokenizer, [read_lines("zh_train.txt")[:500]], 200, Selection())
    (tmp_path / "out").mkdir()
    save_extended(base, extended, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "qwen2"}), encoding="utf-8")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "out")).__name__ == "Qwen2Tokenizer"
    assert count_disagreements(tmp_path / "out", texts)["AutoTokenizer"] == 0


def test_byte_level_bad_input(tmp_path, base_tokenizer_folder):
    from utils.text.tokenizer import save_tokenizer

    base = make_byte_level(tmp_path / "base", PATTERNS["qwen2"], ignore_merges=False)
    with pytest.raises(InputError, match="no text of a new language"):
        extend_byte_level(base.backend_tokenizer, [["only English here"]], 10, Selection())
    save_tokenizer(load_tokenizer(base_tokenizer_folder), tmp_path / "json")
    (tmp_path / "json" / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="neither a sentencepiece model nor byte-level"):
        extend_byte_level(load_tokenizer(tmp_path / "json").backend_tokenizer, [["你好"]], 10, Selection())


# ---------------------------------------------------------------- llama.cpp


def write_gguf(folder, path, pre):
    """A vocab-only GGUF of a saved tokenizer, written as llama.cpp's converter does."""
    import gguf

    tokenizer = load_tokenizer(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_feed_forward_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_pre(pre)
    if pre == "default":
        pieces = tokenizer.proto.pieces
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece.piece.encode() for piece in pieces])
        writer.add_token_scores([piece.score for piece in pieces])
        writer.add_token_types([piece.type for piece in pieces])
        writer.add_unk_token_id(0)
        writer.add_add_space_prefix(True)
    else:
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        specials = tokenizer.added_tokens_decoder
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([token.encode() for token, _ in tokens])
        writer.add_token_types([CONTROL if index in specials else NORMAL for _, index in tokens])
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_disagreements(folder, tmp_path, pre, texts):
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed (requirements-llamacpp.txt)"
    )
    pytest.importorskip("gguf")
    write_gguf(folder, tmp_path / "vocab.gguf", pre)
    model = llama_cpp.Llama(str(tmp_path / "vocab.gguf"), vocab_only=True, verbose=False)
    expected = encode_texts(load_tokenizer(folder), texts)
    found = [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    model.close()
    return [text for text, a, b in zip(texts, expected, found, strict=True) if a != b]


@pytest.mark.slow
def test_llama_cpp_cuts_byte_level_text_alike(byte_level, texts, tmp_path):
    name, _, _, folder = byte_level
    lines = read_lines("zh_train.txt") + read_lines("en_train.txt")
    assert llama_cpp_disagreements(folder, tmp_path, name, texts + lines + fuzz_texts(20000, lines, seed=2)) == []


# ---------------------------------------------------------------- the published vocabularies


def merge_shared(shared_data, keep):
    names = ("llama2_32000/tokenizer.model", "chinese_sp_20000/chinese_sp.model")
    base, extra = (read_sentencepiece_model(shared_data / "tokenizers" / name) for name in names)
    return merge_sentencepiece(base, extra, Selection(keep_unreachable=keep, keep_base_language_pieces=keep))


def save_shared(shared_data, merged, folder):
    folder.mkdir()
    return save_extended(load_tokenizer(shared_data / "tokenizers" / "llama2_32000"), merged, folder)


@pytest.mark.shared_data
def test_llama2_and_the_chinese_pieces(shared_data, tmp_path):
    assert len(merge_shared(shared_data, keep=True).pieces) == 49953
    merged = merge_shared(shared_data, keep=False)
    assert len(merged.pieces) < 49953
    assert unreachable_pieces(merged, 32000) == []
    tokenizer = save_shared(shared_data, merged, tmp_path / "merged")
    base = load_tokenizer(shared_data / "tokenizers" / "llama2_32000")
    for name in ("en_c4", "en_wiki"):
        english = (shared_data / "pt" / f"{name}.txt").read_text(encoding="utf-8").split("\n")
        assert encode_texts(tokenizer, english) == encode_texts(base, english)
    lines = shared_lines(shared_data, every=100)
    texts = [text for text in lines + fuzz_texts(300, lines) if "\u2581" not in text]
    assert not any(count_disagreements(tmp_path / "merged", texts).values())


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize("keep", [True, False])
def test_merged_vocabularies_on_all_shared_text(shared_data, tmp_path, keep):
    save_shared(shared_data, merge_shared(shared_data, keep), tmp_path / "merged")
    lines = shared_lines(shared_data, every=1)
    texts = [text for text in lines + fuzz_texts(20000, lines) if "\u2581" not in text]
    assert not any(count_disagreements(tmp_path / "merged", texts).values())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "merged" / "tokenizer.model"))
    assert processor.encode(texts) == encode_texts(load_tokenizer(tmp_path / "merged"), texts)
    assert llama_cpp_disagreements(tmp_path / "merged", tmp_path, "default", texts) == []


@pytest.mark.slow
@pytest.mark.shared_data
def test_llama_cpp_cuts_the_published_vocabulary_alike(shared_data, tmp_path):
    lines = shared_lines(shared_data, every=1)
    texts = [text for text in lines + fuzz_texts(20000, lines) if "\u2581" not in text]
    folder = SHARED_DATA / "tokenizers" / "chinese_llama2_55296"
    assert llama_cpp_disagreements(folder, tmp_path, "default", texts) == []
