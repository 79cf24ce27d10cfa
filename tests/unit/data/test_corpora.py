"""utils.data.corpora and utils.data.cache: tokens against a plain loop, caches complete or absent, the split."""

import contextlib
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from support.paths import EXAMPLES, SCRIPTS
from utils.core.errors import InputError
from utils.core.records import RECORD_SUFFIXES
from utils.data import cache as data_cache
from utils.data import corpora as data_corpora
from utils.data.cache import CacheSettings
from utils.data.corpora import CorpusCache, parse_corpora, split_documents, tokenize_corpus
from utils.text.tokenizer import encode_text, load_tokenizer

ARRAYS = ("tokens", "document_ends", "document_bytes", "document_hashes")


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(extended_tokenizer_folder):
    return load_tokenizer(extended_tokenizer_folder)


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory):
    """A byte-level BPE tokenizer without BOS, as Qwen's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    lines = (EXAMPLES / "pretrain" / "en_train.txt").read_text(encoding="utf-8").splitlines()[:300]
    tokenizer.train_from_iterator(lines, trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return load_tokenizer(folder)


def expected_tokens(texts, tokenizer):
    """A plain loop: BOS + ids + EOS of every document."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [bos + encode_text(tokenizer, text) + [tokenizer.eos_token_id] for text in texts]


def check_tokens(file: CorpusCache, texts, tokenizer):
    expected = expected_tokens(texts, tokenizer)
    assert file.tokens.tolist() == list(itertools.chain(*expected))
    assert file.document_ends.tolist() == np.cumsum([len(ids) for ids in expected]).tolist()
    assert file.document_bytes.tolist() == [len(text.encode()) for text in texts]
    assert file.num_documents == len(texts)


def make_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    words = [
        "the",
        " cat",
        "猫狗",
        "的",
        "是",
        "<s>",
        "</s>",
        "zebra",
        "\t",
        "é",
        "😀",
        "\u3000",
        "12,345.",
        "   ",
        "▁",
    ]
    return ["x" + "".join(rng.choices(words, k=rng.choice([1, 3, 40]))) for _ in range(count)]


def parallel_always(monkeypatch):
    monkeypatch.setattr(data_corpora, "PARALLEL_BYTES", {"sentencepiece": 0, "tokenizers": 0})


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_tokens_are_those_of_a_plain_loop(tmp_path, monkeypatch, request, kind, num_workers):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    parallel_always(monkeypatch)
    monkeypatch.setattr(data_corpora, "UNIT_BYTES", 1000)  # several units of work
    texts = make_texts(0, 150)
    lines, records = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("\ufeff" + "\r\n\n".join(texts[:100]), encoding="utf-8", newline="")
    records.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts[100:]), encoding="utf-8")
    file = tokenize_corpus(
        [lines, records], tokenizer, CacheSettings(tmp_path / "c", num_workers=num_workers), text_column="body"
    )
    check_tokens(file, texts, tokenizer)
    assert file.tokens.dtype == np.uint16
    assert file.skipped == 0


def test_documents_of_several_lines(tmp_path, sentencepiece_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n###\nthree\n###\n", encoding="utf-8")
    file = tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(tmp_path / "c"), document_separator="###")
    check_tokens(file, ["one\ntwo\n", "three"], sentencepiece_tokenizer)


def test_a_large_vocabulary_takes_four_bytes(tmp_path, sentencepiece_tokenizer, monkeypatch):
    monkeypatch.setattr(type(sentencepiece_tokenizer), "__len__", lambda self: (1 << 16) + 1)
    (tmp_path / "a.txt").write_text("cat", encoding="utf-8")
    file = tokenize_corpus([tmp_path / "a.txt"], sentencepiece_tokenizer, CacheSettings(tmp_path / "c"))
    assert file.tokens.dtype == np.uint32
    check_tokens(file, ["cat"], sentencepiece_tokenizer)


@pytest.mark.shared_data
def test_published_tokenizer_on_chinese_text(tmp_path, shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "chinese_llama2_55296")
    paths = [shared_data / "pt" / f"{name}.txt" for name in ("zh_d2l", "zh_songci", "en_c4")]
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    file = tokenize_corpus(paths, tokenizer, CacheSettings(tmp_path / "c", num_workers=1))
    assert file.document_bytes.tolist() == [len(line.encode()) for line in lines]
    size = sum(item.stat().st_size for item in file.folder.iterdir())
    assert size / len(file.tokens) <= 2.5
    for number in range(0, len(lines), 37):
        start = file.document_ends[number - 1] if number else 0
        ids = file.tokens[start : file.document_ends[number]].tolist()
        assert ids == expected_tokens([lines[number]], tokenizer)[0]


# ---------------------------------------------------------------- bad text


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_text_stops_or_is_counted(tmp_path, monkeypatch, caplog, sentencepiece_tokenizer, num_workers):
    parallel_always(monkeypatch)
    monkeypatch.setattr(data_corpora, "UNIT_BYTES", 8)
    path, cache = tmp_path / "a.txt", tmp_path / "c"
    path.write_bytes(b"good one\ngood two\nb\xffd\ngood three\n\xe4\xb8\n")
    with pytest.raises(InputError, match=re.escape(f"{path}:3: invalid UTF-8")):
        tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(cache, num_workers=num_workers))
    assert [item.name for item in cache.iterdir() if item.suffix not in (".lock", ".json")] == []
    file = tokenize_corpus(
        [path], sentencepiece_tokenizer, CacheSettings(cache, on_bad_record="skip", num_workers=num_workers)
    )
    check_tokens(file, ["good one", "good two", "good three"], sentencepiece_tokenizer)
    assert file.skipped == 2
    assert f"skipped 2 bad records, the first: {path}:3: invalid UTF-8" in caplog.text
    with pytest.raises(InputError):  # what was skipped before is not forgotten
        tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(cache, num_workers=num_workers))


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xff\n"])
def test_a_corpus_without_text_is_an_error(tmp_path, sentencepiece_tokenizer, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(
        InputError,
        match="no text in" if content != b"\xff\n" else "skipped 1 bad records, the first: .*a.txt:1: invalid UTF-8",
    ):
        tokenize_corpus(
            [tmp_path / "a.txt"], sentencepiece_tokenizer, CacheSettings(tmp_path / "c", on_bad_record="skip")
        )


# ---------------------------------------------------------------- the cache


@pytest.fixture
def count_builds(monkeypatch):
    """The units of work that were really tokenised."""
    done = []
    original = data_cache._encode_unit

    def tokenize_unit(encoder, unit):
        done.append(unit)
        return original(encoder, unit)

    monkeypatch.setattr(data_cache, "_encode_unit", tokenize_unit)
    return done


def test_the_key_is_content_tokenizer_and_settings(
    tmp_path, count_builds, sentencepiece_tokenizer, byte_level_tokenizer
):
    path, cache = tmp_path / "a.txt", tmp_path / "c"

    def tokenize(path=path, tokenizer=sentencepiece_tokenizer, **options) -> bool:
        before = len(count_builds)
        file = tokenize_corpus([path], tokenizer, CacheSettings(cache, **options))
        assert file.tokens.tolist() == list(itertools.chain(*expected_tokens(path.read_text().split("\n"), tokenizer)))
        return len(count_builds) > before

    path.write_text("cat\ndog")
    assert tokenize()
    assert not tokenize()
    # The same length and time of change, other content.
    status = path.stat()
    path.write_text("cat\npig")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert tokenize()
    assert tokenize(tokenizer=byte_level_tokenizer)
    assert tokenize(on_bad_record="skip")
    # Neither name nor place count; the kind of file does.
    other = tmp_path / "elsewhere" / "b.txt"
    other.parent.mkdir()
    shutil.copy(path, other)
    assert not tokenize(other)
    assert not tokenize()


def test_an_unchanged_old_file_is_not_read_again(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.txt", tmp_path / "c"
    cache.mkdir()
    path.write_text("cat")
    first = data_cache.hash_files([path], cache)
    assert not (cache / data_cache.HASHES).exists()  # too young: it might change within the clock's grain
    now = time.time_ns()
    monkeypatch.setattr(data_cache.time, "time_ns", lambda: now + 10**10)
    assert data_cache.hash_files([path], cache) == first
    monkeypatch.setattr(data_cache, "hash_file", lambda path: "read again")
    assert data_cache.hash_files([path], cache) == first
    status = path.stat()
    path.write_text("dog")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert data_cache.hash_files([path], cache) == [[".txt", "read again"]]
    (cache / data_cache.HASHES).write_text("{broken")
    assert data_cache.hash_files([path], cache) == [[".txt", "read again"]]


@pytest.mark.parametrize("damage", ["truncate", "remove", "meta", "no meta"])
def test_a_damaged_cache_is_built_again(tmp_path, count_builds, sentencepiece_tokenizer, damage):
    path, cache = tmp_path / "a.txt", tmp_path / "c"
    path.write_text("cat\ndog\n")
    file = tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(cache))
    folder, expected = file.folder, file.tokens.tolist()
    if damage == "truncate":
        with open(folder / "tokens.bin", "r+b") as stream:
            stream.truncate(3)
    elif damage == "remove":
        (folder / "document_ends.bin").unlink()
    elif damage == "meta":
        (folder / "meta.json").write_text("{}")
    else:
        (folder / "meta.json").unlink()
    assert tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(cache)).tokens.tolist() == expected
    assert len(count_builds) == 2


def test_one_of_several_builds_and_the_others_wait(tmp_path, monkeypatch, count_builds, sentencepiece_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("cat\ndog\n")
    slow = data_cache._encode_unit

    def tokenize_slowly(encoder, unit):
        time.sleep(0.2)
        return slow(encoder, unit)

    monkeypatch.setattr(data_cache, "_encode_unit", tokenize_slowly)
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(
                tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(tmp_path / "c"))
            )
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count_builds) == 1
    assert len({tuple(file.tokens.tolist()) for file in results}) == 1
    assert len(results) == 3


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path, monkeypatch, sentencepiece_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("cat\n")
    original = data_cache._encode_unit

    def append_then_tokenize(encoder, unit):
        with open(path, "a") as file:
            file.write("dog\n")
        return original(encoder, unit)

    monkeypatch.setattr(data_cache, "_encode_unit", append_then_tokenize)
    with pytest.raises(InputError, match="changed while being read"):
        tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(tmp_path / "c"))


def left_behind(cache: Path) -> list[str]:
    return [item.name for item in cache.iterdir() if item.suffix not in (".lock", ".json")]


def test_a_full_disk_leaves_nothing_and_a_rerun_works(tmp_path, monkeypatch, sentencepiece_tokenizer):
    monkeypatch.setattr(data_corpora, "UNIT_BYTES", 10)
    path, cache = tmp_path / "a.txt", tmp_path / "c"
    texts = make_texts(1, 20)
    path.write_text("\n".join(texts), encoding="utf-8")
    original = data_cache.CacheWriter.add

    def fill_up(self, arrays):
        original(self, arrays)
        if self.num_tokens > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(data_cache.CacheWriter, "add", fill_up)
        with pytest.raises(OSError, match="No space left") as caught:
            tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(cache))
    assert caught.value.filename.startswith(str(cache))
    assert left_behind(cache) == []
    check_tokens(
        tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(cache)), texts, sentencepiece_tokenizer
    )


@pytest.mark.slow
def test_a_really_full_disk(tmp_path, sentencepiece_tokenizer):
    cache = tmp_path / "small"
    cache.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(cache)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        path = tmp_path / "a.txt"
        path.write_text("\n".join(make_texts(2, 10_000)), encoding="utf-8")
        with pytest.raises(OSError, match="No space left"):
            tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(cache))
        assert left_behind(cache) == []
        path.write_text("cat")
        assert tokenize_corpus([path], sentencepiece_tokenizer, CacheSettings(cache)).num_documents == 1
    finally:
        subprocess.run(["umount", str(cache)], check=True)


KILLED_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from utils.data import corpora
from utils.data.cache import CacheSettings
from utils.text.tokenizer import load_tokenizer
if __name__ == "__main__":
    corpora.PARALLEL_BYTES["sentencepiece"] = 0
    corpora.UNIT_BYTES = 50_000
    settings = CacheSettings(Path(sys.argv[4]), num_workers=2)
    corpora.tokenize_corpus([sys.argv[3]], load_tokenizer(sys.argv[2]), settings)
"""


def kill_and_rerun(folder: Path, tokenizer_folder: Path, delays) -> None:
    """Kill the program so many seconds after it began to write the cache; the rerun must give the same one."""
    text, cache, program = folder / "a.txt", folder / "killed", folder / "program.py"
    lines = (EXAMPLES / "pretrain" / "en_train.txt").read_bytes()
    text.write_bytes(lines * (3_000_000 // len(lines) + 1))
    program.write_text(KILLED_PROGRAM)
    command = [sys.executable, str(program), str(SCRIPTS), str(tokenizer_folder), str(text), str(cache)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for delay in delays:
        shutil.rmtree(cache, ignore_errors=True)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment, start_new_session=True)
        while process.poll() is None and not list(cache.glob(".*.partial/tokens.bin")):
            time.sleep(0.002)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed; make the text longer"
        assert not list(cache.glob("tokens-*"))
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment)
        again = CorpusCache(next(cache.glob("tokens-*")))
        assert not list(cache.glob(".*.partial"))
        reference = tokenize_corpus(
            [text], load_tokenizer(tokenizer_folder), CacheSettings(folder / "reference", num_workers=1)
        )
        assert again.key == reference.key
        for name in ARRAYS:
            assert (again.folder / f"{name}.bin").read_bytes() == (reference.folder / f"{name}.bin").read_bytes()


@pytest.mark.slow
def test_killed_while_caching_then_rerun(tmp_path, extended_tokenizer_folder):
    kill_and_rerun(tmp_path, extended_tokenizer_folder, [0.05])


@pytest.mark.slow
def test_killed_ten_times_while_caching(tmp_path, extended_tokenizer_folder):
    rng = random.Random(0)
    kill_and_rerun(tmp_path, extended_tokenizer_folder, [rng.uniform(0, 0.3) for _ in range(10)])


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_leaves_nothing(tmp_path, extended_tokenizer_folder):
    text, cache, program = tmp_path / "a.txt", tmp_path / "c", tmp_path / "program.py"
    text.write_bytes((EXAMPLES / "pretrain" / "en_train.txt").read_bytes() * 30)
    program.write_text(KILLED_PROGRAM)
    command = [sys.executable, str(program), str(SCRIPTS), str(extended_tokenizer_folder), str(text), str(cache)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and not list(cache.glob(".*.partial/tokens.bin")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, errors = process.communicate(timeout=20)
    assert process.returncode not in (0, None)
    assert errors.count(b"KeyboardInterrupt") == 1  # the program's own; scripts turn it into one line
    assert left_behind(cache) == []


def test_what_a_killed_builder_left_is_removed(tmp_path, sentencepiece_tokenizer):
    abandoned = tmp_path / "c" / ".tokens-0123.partial"
    abandoned.mkdir(parents=True)
    (tmp_path / "a.txt").write_text("cat")
    tokenize_corpus([tmp_path / "a.txt"], sentencepiece_tokenizer, CacheSettings(tmp_path / "c"))
    assert not abandoned.exists()


# ---------------------------------------------------------------- which files


def test_parse_corpora(tmp_path):
    for name in ("a.txt", "more/a.txt", "more/b.jsonl", "x=y/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    corpora = parse_corpora(
        [f"{tmp_path}/a.txt", f"wiki={tmp_path}/more", f"{tmp_path}/more/a.txt", f"{tmp_path}/x=y"]
    )
    names = {name: [str(path.relative_to(tmp_path)) for path in paths] for name, paths in corpora.items()}
    assert names == {
        "a": ["a.txt"],
        "wiki": ["more/a.txt", "more/b.jsonl"],
        "a-2": ["more/a.txt"],
        "x=y": ["x=y/c.txt"],
    }


def test_parse_corpora_reports_all_mistakes_together(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "nothing").mkdir()
    specs = [f"n={tmp_path}/a.txt", f"n={tmp_path}/a.txt", f"{tmp_path}/absent", f"{tmp_path}/empty.txt"]
    with pytest.raises(InputError) as caught:
        parse_corpora([*specs, f"{tmp_path}/nothing", f"={tmp_path}/a.txt"])
    for part in ("name was given before", "data not found", "every file is empty", "no .txt", "the name is empty"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="no data"):
        parse_corpora([])
    with pytest.raises(InputError, match=r"cannot read '\.txt' files here"):
        parse_corpora([f"{tmp_path}/a.txt"], RECORD_SUFFIXES)


# ---------------------------------------------------------------- the split


def tokenize_texts(tmp_path, texts, tokenizer) -> CorpusCache:
    path = tmp_path / f"{abs(hash(tuple(texts)))}.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return tokenize_corpus([path], tokenizer, CacheSettings(tmp_path / "c"))


def test_the_split_depends_on_text_and_seed_alone(tmp_path, sentencepiece_tokenizer):
    texts = [f"document {number}" for number in range(2000)]
    file = tokenize_texts(tmp_path, texts, sentencepiece_tokenizer)
    train, validation = split_documents(file, 0.1, seed=1)
    assert sorted([*train, *validation]) == list(range(2000))
    assert 150 < len(validation) < 250
    held_out = {texts[number] for number in validation}
    # Other documents, another order and copies change no side.
    others = random.Random(0).sample([*texts, *texts[:500], *(f"new {number}" for number in range(300))], 2800)
    other = tokenize_texts(tmp_path, others, sentencepiece_tokenizer)
    _, other_validation = split_documents(other, 0.1, seed=1)
    assert {others[number] for number in other_validation if not others[number].startswith("new")} == held_out
    _, other_seed = split_documents(file, 0.1, seed=2)
    assert len(set(other_seed) & set(validation)) < 50
    assert len(split_documents(file, 0.0, seed=1)[1]) == 0
    # A larger share holds out the same documents and more.
    assert set(validation) < set(split_documents(file, 0.2, seed=1)[1])


@pytest.mark.parametrize("texts", [["a", "b"], ["same", "same", "same"], ["a", "b", "b"]])
@pytest.mark.parametrize("share", [0.0001, 0.5, 0.9999])
def test_both_sides_have_a_document(tmp_path, sentencepiece_tokenizer, texts, share):
    train, validation = split_documents(tokenize_texts(tmp_path, texts, sentencepiece_tokenizer), share, seed=0)
    assert len(train)
    assert len(validation)
    assert sorted([*train, *validation]) == list(range(len(texts)))


def test_one_document_cannot_be_split(tmp_path, sentencepiece_tokenizer):
    with pytest.raises(InputError, match="cannot hold out"):
        split_documents(tokenize_texts(tmp_path, ["one"], sentencepiece_tokenizer), 0.1, seed=0)
