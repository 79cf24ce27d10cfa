"""The language of the shell, and the FAQ's entry on an error: found by the message, linked, and in Chinese told."""

import errno
import sys

import pytest

from support.paths import ROOT
from utils.core.command_line import run
from utils.core.errors import InputError
from utils.core.language import FaqEntry, choose_text, find_entry, read_faq, shell_language, with_faq


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "zh_TW"}, "zh"),
        ({"LANG": "zh_CN", "LC_ALL": ""}, "zh"),
        ({"LANG": "C.UTF-8"}, "en"),
    ],
)
def test_the_locale_is_ranked_as_posix_does(environment, language):
    assert shell_language(environment) == language
    assert choose_text(language, "中", "E") == {"zh": "中", "en": "E"}[language]


def test_an_entry_is_found_by_the_message_and_told_in_chinese():
    message = "error: no space left on the device while writing x; free some, then run the same command again"
    assert with_faq(message, "en") == f"{message} [docs/faq_EN.md#disk-full]"
    told, again = with_faq(message, "zh").split("\n")
    assert told.startswith("说明：磁盘（或配额）满了") and again == f"{message} [docs/faq.md#disk-full]"
    assert with_faq("error: nobody wrote about this", "zh") == "error: nobody wrote about this"


def test_of_two_entries_the_more_telling_one_counts(tmp_path, monkeypatch):
    text = '<a id="a"></a>\n### `tokens`\nshort\n\n<a id="b"></a>\n### `tokens left`\nsee [there](x.md),\nand go\n'
    (tmp_path / "faq_EN.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr("utils.core.language.read_faq", lambda language: read_faq(language, tmp_path))
    assert find_entry("no tokens left", "en") == FaqEntry("b", "tokens left", "see there, and go")
    assert find_entry("some tokens", "en").key == "a" and find_entry("x", "en") is None
    assert find_entry("some tokens", "zh") is None, "the page is not there"


def test_every_entry_of_both_pages_has_its_key():
    keys = [[entry.key for entry in read_faq(language)] for language in ("zh", "en")]
    headings = [line for line in (ROOT / "docs/faq.md").read_text(encoding="utf-8").splitlines() if line[:4] == "### "]
    assert keys[0] == keys[1] and len(keys[0]) == len(set(keys[0])) == len(headings)
    assert all(entry.text for language in ("zh", "en") for entry in read_faq(language))


@pytest.mark.parametrize(
    ("error", "key", "told"),
    [
        (InputError("data not found: x"), "data-not-found", "相对路径从当前目录算起"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "disk-full", "磁盘"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "no-access", "不让读"),
    ],
)
def test_a_script_ends_with_the_entry_in_the_language_of_the_shell(error, key, told, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    for language, page in (("zh_CN.UTF-8", "faq.md"), ("C", "faq_EN.md")):
        monkeypatch.setenv("LC_ALL", language)
        with pytest.raises(SystemExit):
            run(main)
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ") and lines[-1].endswith(f"[docs/{page}#{key}]")
        assert (told in lines[0]) == (page == "faq.md")
