"""scripts/train_tokenizer.py: a loadable BPE folder, the same whatever the threads, and mistakes named."""

import json
import signal
import subprocess
import sys

import pytest
from train_tokenizer import TokenizerArguments, iter_sentences, main

from support.paths import EXAMPLES, SCRIPTS
from utils.core.errors import InputError
from utils.text.pieces import inexact_reason
from utils.text.tokenizer import encode_text, load_tokenizer

CORPUS = EXAMPLES / "pretrain" / "zh_heldout.txt"


def run_script(*flags, **kwargs):
    command = [sys.executable, str(SCRIPTS / "train_tokenizer.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def test_a_trained_folder_is_complete_and_loads(tmp_path):
    out = tmp_path / "sp"
    report = main(TokenizerArguments(input=[str(CORPUS)], output_dir=str(out), vocab_size=1300))
    names = [
        "run_config.yaml",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in out.iterdir()) == [*names, "training_report.json"]
    tokenizer = load_tokenizer(out)
    assert len(tokenizer) == report["vocabulary"] == 1300
    assert report["lines"] == len(CORPUS.read_text(encoding="utf-8").splitlines())
    assert inexact_reason(tokenizer.proto) is None
    text = "  天空有 3 只鸟\n😀"
    assert tokenizer.decode(encode_text(tokenizer, text)) == text
    assert report["characters_per_token"] > 1.3
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    with pytest.raises(InputError, match="not empty"):
        main(TokenizerArguments(input=[str(CORPUS)], output_dir=str(out), vocab_size=1300))
    main(TokenizerArguments(input=[str(CORPUS)], output_dir=str(out), vocab_size=1200, overwrite=True))
    assert len(load_tokenizer(out)) == 1200


def test_threads_do_not_change_the_result_and_the_seed_does(tmp_path):
    def train(name, **settings):
        args = {"input": [str(CORPUS)], "vocab_size": 1100, "sample_bytes": 20_000, **settings}
        return main(TokenizerArguments(output_dir=str(tmp_path / name), **args))

    one = train("one", num_threads=1)
    assert train("two", num_threads=2)["sha256"] == one["sha256"]
    assert one["bytes"] <= 20_000 < one["bytes_in_input"]
    assert train("seed", seed=1)["sha256"] != one["sha256"]
    assert train("few", max_sentences=40)["lines"] == 40


def test_every_format_is_read_and_bad_lines_are_named_or_counted(tmp_path):
    import pandas

    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_bytes("\n".join(lines[:50]).encode() + b"\n\xff\xfe broken\n")
    (data / "b.jsonl").write_text(
        "".join(json.dumps({"body": line}) + "\n" for line in lines[50:90]), encoding="utf-8"
    )
    (data / "c.json").write_text(json.dumps([{"body": line} for line in lines[90:120]]), encoding="utf-8")
    pandas.DataFrame({"body": lines[120:150]}).to_parquet(data / "d.parquet")
    settings = {"input": [str(data)], "vocab_size": 1300, "text_column": "body"}
    with pytest.raises(InputError, match=r"a\.txt:51"):
        main(TokenizerArguments(output_dir=str(tmp_path / "out"), **settings))
    assert not (tmp_path / "out").exists()
    report = main(TokenizerArguments(output_dir=str(tmp_path / "out"), on_bad_record="skip", **settings))
    assert (report["lines_in_input"], report["bad_lines_skipped"]) == (150, 1)


def test_sentences_are_cut_where_sentencepiece_would_skip_or_overflow(tmp_path):
    document = "a\tb\x00c\n\nd\u2581e" + "长" * 9000
    sentences = list(iter_sentences([[document, " \t "]], []))
    assert sentences[:4] == ["a", "b", "c", "d"]
    assert "".join(sentences[4:]) == "e" + "长" * 9000
    assert max(map(len, sentences)) == 4000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 100_000}, r"too high for this text, which gives at most \d+ pieces"),
        ({"vocab_size": 300}, "too low: special, byte and single-character pieces alone are"),
        ({"input": ["/nowhere/zh.txt"]}, "data not found: /nowhere/zh.txt"),
        ({"text_column": "body", "input": ["RECORDS"]}, "field 'body' is missing"),
        ({"input": ["EMPTY"]}, "no text"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, settings, message):
    records = EXAMPLES / "sft" / "train.json"
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    names = {"RECORDS": str(records), "EMPTY": str(tmp_path / "empty.txt")}
    settings = {"input": [str(CORPUS)], "vocab_size": 1300, **settings}
    settings["input"] = [names.get(name, name) for name in settings["input"]]
    with pytest.raises(InputError, match=message):
        main(TokenizerArguments(output_dir=str(tmp_path / "out"), **settings))
    assert not (tmp_path / "out").exists()


def test_all_wrong_settings_are_reported_together():
    with pytest.raises(InputError) as caught:
        TokenizerArguments(vocab_size=0, character_coverage=0.5, sample_bytes=0)
    for name in ("--input", "--vocab_size", "--character_coverage", "--sample_bytes"):
        assert name in str(caught.value)


@pytest.mark.slow
def test_the_command_line_fails_with_one_line(tmp_path):
    done = run_script("--input", CORPUS, "--output_dir", tmp_path / "out", "--vocab_size", 100_000)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: --vocab_size 100000 is too high")


@pytest.mark.slow
def test_interrupting_leaves_nothing(tmp_path):
    big = tmp_path / "big.txt"
    big.write_text(CORPUS.read_text(encoding="utf-8") * 400, encoding="utf-8")
    command = [
        sys.executable,
        str(SCRIPTS / "train_tokenizer.py"),
        "--input",
        str(big),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "training on" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip().endswith("interrupted; run the same command again to go on")
    assert [path.name for path in tmp_path.iterdir()] == ["big.txt"]
