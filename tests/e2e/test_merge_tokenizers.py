"""scripts/merge_tokenizers.py: a complete, checked folder with its report; mistakes named, nothing written then."""

import json
import shutil
import subprocess
import sys

import pytest
from merge_tokenizers import HARD_TEXTS, MergeTokenizersArguments, main
from transformers import AutoTokenizer

from support.paths import EXAMPLES, SCRIPTS
from support.scripts import next_words
from support.tokenizers import PATTERNS, make_byte_level, train_sentencepiece
from utils.core.errors import InputError
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import embedding_rows, encode_texts, load_tokenizer

PRETRAIN = EXAMPLES / "pretrain"
FILES = ["chat_template.jinja", "run_config.yaml", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"]
FILES += ["tokenizer_config.json", "vocabulary_report.json", "vocabulary_report.md", "vocabulary_report.png"]


@pytest.fixture(scope="module")
def chinese_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "chinese_sp.model"
    lines = (PRETRAIN / "zh_train.txt").read_text(encoding="utf-8").splitlines()[:1500]
    path.write_bytes(train_sentencepiece([*lines, "hello world 123"] * 2, 1800))
    return path


@pytest.fixture(scope="module")
def settings(base_tokenizer_folder, chinese_model):
    return {"base_tokenizer": str(base_tokenizer_folder), "chinese_sp_model_file": str(chinese_model)}


def test_a_merged_folder_is_complete_and_reported(tmp_path, settings, base_tokenizer_folder, tiny_model_folder):
    out = tmp_path / "merged"
    texts = [f"zh={PRETRAIN / 'zh_heldout.txt'}", f"en={PRETRAIN / 'en_heldout.txt'}"]
    args = {
        "report_text": texts,
        "pad_token": "<pad>",
        "pad_to_multiple_of": 64,
        "model_config": str(tiny_model_folder),
        "training_text": [str(PRETRAIN / "zh_train.txt")],
    }
    report = main(MergeTokenizersArguments(output_dir=str(out), **settings, **args))
    assert sorted(path.name for path in out.iterdir()) == FILES
    tokenizer, base = load_tokenizer(out), load_tokenizer(base_tokenizer_folder)
    assert len(tokenizer) == report["vocabulary"] == 400 + report["selection"]["added"] + 1
    assert embedding_rows(tokenizer) == report["embedding_rows"] >= len(tokenizer)
    assert report["embedding_rows"] % 64 == 0
    assert report["unreachable_added_tokens"] == 0
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.chat_template == CHAT_TEMPLATES["alpaca-2"]
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATES["alpaca-2"]
    zh, en = report["languages"]["zh"], report["languages"]["en"]
    assert zh["tokens_saved"] > 0.4
    assert en["tokens_saved"] == 0
    lines = [line for line in (PRETRAIN / "zh_heldout.txt").read_text(encoding="utf-8").splitlines() if line]
    for side, which in (("before", base), ("after", tokenizer)):
        tokens = sum(map(len, encode_texts(which, lines)))
        assert zh[side]["tokens"] == tokens
        assert zh[side]["characters_per_token"] == sum(map(len, lines)) / tokens
    pieces, *texts = report["verdict"]  # English is cut as before, nothing to judge
    assert pieces.startswith("this corpus supports about ") and [line.partition(":")[0] for line in texts][:1] == [
        "zh"
    ]
    assert all(line in (out / "vocabulary_report.md").read_text(encoding="utf-8") for line in report["verdict"])
    assert report["cost"]["added_parameters"] == 2 * 32 * (report["embedding_rows"] - 400)
    assert report == json.loads((out / "vocabulary_report.json").read_text(encoding="utf-8"))
    with pytest.raises(InputError, match="not empty"):
        main(MergeTokenizersArguments(output_dir=str(out), **settings))


def test_both_keep_flags_keep_everything(tmp_path, settings, chinese_model, base_tokenizer_folder):
    keep = {"keep_unreachable": True, "keep_base_language_pieces": True}
    report = main(MergeTokenizersArguments(output_dir=str(tmp_path / "all"), **settings, **keep))
    less = main(MergeTokenizersArguments(output_dir=str(tmp_path / "less"), **settings))
    counts = report["selection"]
    assert report["vocabulary"] == 400 + counts["candidates"] - counts["already_in_base"]
    assert less["vocabulary"] < report["vocabulary"]
    assert less["languages"] == {}
    assert "Skipped: no held-out text" in (tmp_path / "less" / "vocabulary_report.md").read_text(encoding="utf-8")
    capped = main(MergeTokenizersArguments(output_dir=str(tmp_path / "capped"), max_new_tokens=50, **settings))
    assert capped["vocabulary"] == 450
    sample = tmp_path / "sample.txt"
    sample.write_text("Beijing is written 北京, and the 大 means big.\n", encoding="utf-8")
    sampled = main(
        MergeTokenizersArguments(output_dir=str(tmp_path / "sampled"), base_language_sample=[str(sample)], **settings)
    )
    assert sampled["selection"]["in_base_language_sample"] > 0
    before, after = load_tokenizer(base_tokenizer_folder), load_tokenizer(tmp_path / "sampled")
    text = [sample.read_text(encoding="utf-8").strip()]
    assert encode_texts(after, text) == encode_texts(before, text)


def test_a_merged_tokenizer_can_be_the_base_of_another(tmp_path, settings):
    first = main(
        MergeTokenizersArguments(output_dir=str(tmp_path / "one"), max_new_tokens=40, pad_token="<pad>", **settings)
    )
    again = {**settings, "base_tokenizer": str(tmp_path / "one")}
    second = main(MergeTokenizersArguments(output_dir=str(tmp_path / "two"), chat_template="own", **again))
    assert second["base_vocabulary"] == first["vocabulary"] == 441
    tokenizer = load_tokenizer(tmp_path / "two")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 440)
    assert tokenizer.chat_template == CHAT_TEMPLATES["alpaca-2"]


def test_a_byte_level_base_is_extended_by_training_on_text(tmp_path):
    base = make_byte_level(tmp_path / "base", PATTERNS["qwen2"], ignore_merges=False)
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    report = main(
        MergeTokenizersArguments(
            base_tokenizer=str(tmp_path / "base"),
            input=[str(PRETRAIN / "zh_heldout.txt")],
            output_dir=str(tmp_path / "out"),
            max_new_tokens=150,
            report_text=[f"zh={PRETRAIN / 'zh_heldout.txt'}"],
            chat_template=str(template),
            hidden_size=32,
        )
    )
    tokenizer = load_tokenizer(tmp_path / "out")
    assert len(tokenizer) == len(base) + 150 == report["vocabulary"]
    assert report["unreachable_added_tokens"] == 0
    assert report["languages"]["zh"]["tokens_saved"] > 0.3
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert report["cost"] == {"hidden_size": 32, "tied": False, "added_parameters": 2 * 32 * 150}
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_mistakes_are_named_and_nothing_is_written(tmp_path, settings, chinese_model):
    make_byte_level(tmp_path / "byte_level", PATTERNS["qwen2"], ignore_merges=False)
    (tmp_path / "broken.model").write_bytes(chinese_model.read_bytes()[:1000])
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\xfe\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "json_only").mkdir()
    base = settings["base_tokenizer"]
    byte_level = {"base_tokenizer": str(tmp_path / "byte_level")}
    text = str(PRETRAIN / "zh_heldout.txt")
    cases = [
        ({**settings, "base_tokenizer": "/nowhere"}, "tokenizer folder not found: /nowhere"),
        ({**settings, "base_tokenizer": str(tmp_path / "json_only")}, "no tokenizer in"),
        ({**settings, "chinese_sp_model_file": "/nowhere.model"}, "sentencepiece model not found"),
        ({**settings, "chinese_sp_model_file": str(tmp_path / "broken.model")}, "not a sentencepiece model"),
        ({**settings, **byte_level}, "has no sentencepiece model"),
        ({"base_tokenizer": base, "input": [text]}, "is a sentencepiece tokenizer"),
        ({**settings, "chat_template": "alpaca-9"}, "neither a file nor one of alpaca-2"),
        ({**settings, "report_text": [f"zh={tmp_path / 'absent.txt'}"]}, "data not found"),
        ({**settings, "base_language_sample": [str(tmp_path / "bad.txt")]}, r"bad\.txt:2"),
        ({**settings, "model_config": str(tmp_path / "model")}, "no hidden_size"),
        ({**settings, "model_config": "/nowhere"}, "file not found"),
    ]
    for flags, message in cases:
        with pytest.raises(InputError, match=message):
            main(MergeTokenizersArguments(output_dir=str(tmp_path / "out"), **flags))
        assert not (tmp_path / "out").exists()
    for flags in (
        {},
        settings | {"input": [text]},
        settings | {"max_new_tokens": 0},
        settings | {"pad_to_multiple_of": 0},
    ):
        with pytest.raises(InputError, match="--"):
            MergeTokenizersArguments(output_dir="out", **flags)


def test_an_unfaithful_base_leaves_nothing_behind(tmp_path, settings, monkeypatch):
    monkeypatch.setattr("utils.text.vocabulary.count_disagreements", lambda folder, texts: {"AutoTokenizer": 3})
    with pytest.raises(InputError, match="does not cut all of 14 texts alike"):
        main(MergeTokenizersArguments(output_dir=str(tmp_path / "out"), **settings))
    assert len(HARD_TEXTS) == 14
    assert list(tmp_path.iterdir()) == []


def test_report_texts_of_one_name_are_all_measured(tmp_path, settings):
    files = [tmp_path / folder / "zh.txt" for folder in ("a", "b")]
    for file, text in zip(files, ("老师", "老师的本子"), strict=True):
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
    report = main(
        MergeTokenizersArguments(output_dir=str(tmp_path / "o"), **settings, report_text=list(map(str, files)))
    )
    assert {name: figures["after"]["characters"] for name, figures in report["languages"].items()} == {
        "zh": 2,
        "zh-2": 5,
    }
    with pytest.raises(InputError, match=r"zh=.*: a corpus with this name was given before"):
        main(
            MergeTokenizersArguments(
                output_dir=str(tmp_path / "p"), **settings, report_text=[f"zh={file}" for file in files]
            )
        )


@pytest.mark.slow
def test_the_forerunners_flag_and_the_launcher(tmp_path, settings):
    """The command of Chinese-LLaMA-Alpaca still runs, and the launcher's flags are the script's."""
    flags = ["--llama_tokenizer_dir", settings["base_tokenizer"], "--max_new_tokens", "20"]
    flags += ["--chinese_sp_model_file", settings["chinese_sp_model_file"], "--output_dir", str(tmp_path / "o u=t.1")]
    command = [sys.executable, str(SCRIPTS / "merge_tokenizers.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "old flags" not in done.stderr
    expected = [f"MODEL={settings['base_tokenizer']}", f"TOKENIZER={tmp_path / 'o u=t.1'}", "DATA=TEXT"]
    assert next_words(done.stderr) == [*expected, "bash", "scripts/run_pt.sh"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "DRY_RUN": "1", "OUT": str(tmp_path / "o u t")}
    environment |= {"BASE": settings["base_tokenizer"], "SP": settings["chinese_sp_model_file"]}
    launcher = ["bash", str(SCRIPTS / "run_merge_tokenizers.sh"), "--max_new_tokens", "20"]
    printed = subprocess.run(launcher, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert "--base_tokenizer" in printed.stdout and "o\\ u\\ t" in printed.stdout
    shutil.rmtree(tmp_path / "o u=t.1")
    missing = subprocess.run(launcher, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, timeout=60)
    assert missing.returncode != 0
    assert "set BASE" in missing.stderr
