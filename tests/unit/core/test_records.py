"""Records: reading txt, json, jsonl and parquet against plain oracles, errors with file:line."""

import itertools
import json
import random
import re

import pytest

from utils.core import records as core_records
from utils.core.errors import InputError
from utils.core.records import BadRecords, iter_document_batches, iter_records

ALPHABET = ["a", "b", " ", "\t", "é", "中", "文", "𠮷", "😀", "\u3000", "\u2028", "\x0c", "\ufeff", "\x00"]


def read_all(path, **options) -> list[str]:
    return [text for batch in iter_document_batches(path, **options) for text in batch]


def places(bad_records) -> list[str]:
    return [problem.partition(": ")[0] for problem in bad_records.problems]


def expected_lines(content: bytes) -> list[str]:
    """Every line of a txt file that is not blank, by the plainest means."""
    lines = [line.rstrip("\r") for line in content.decode("utf-8-sig").split("\n")]
    return [line for line in lines if line and not line.isspace()]


def random_text(rng: random.Random, num_lines: int) -> bytes:
    lines = ["".join(rng.choices(ALPHABET, k=rng.choice([0, 0, 1, 3, 20]))) for _ in range(num_lines)]
    text = "".join(line + rng.choice(["\n", "\r\n", "\r\r\n"]) for line in lines)
    if rng.random() < 0.5:
        text = text.rstrip("\r\n") + "end"  # no newline at the end of the file
    return rng.choice([b"", b"\xef\xbb\xbf"]) + text.encode()


# ---------------------------------------------------------------- txt


@pytest.mark.parametrize("seed", range(20))
def test_adjoining_ranges_give_every_line_once(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    content = random_text(rng, rng.randint(1, 60))
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    monkeypatch.setattr(core_records, "READ_BYTES", rng.choice([1, 2, 7, 50, 4096]))
    assert read_all(path) == expected_lines(content)
    for _ in range(30):  # cuts fall into characters, line ends and before the end alike
        cuts = sorted(rng.choices(range(len(content) + 1), k=rng.randint(0, 5)))
        borders = [0, *cuts, len(content)]
        parts = [read_all(path, byte_range=pair) for pair in itertools.pairwise(borders)]
        assert list(itertools.chain(*parts)) == expected_lines(content), borders


def test_every_single_cut(tmp_path):
    content = "\ufeff一行\r\n\r\n  \nb\n\n末行 😀".encode()
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    for cut in range(len(content) + 1):
        both = read_all(path, byte_range=(0, cut)) + read_all(path, byte_range=(cut, len(content)))
        assert both == ["一行", "b", "末行 😀"], cut


@pytest.mark.parametrize("read_bytes", [4, 1 << 20])
def test_invalid_utf8_is_named_and_counted(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(core_records, "READ_BYTES", read_bytes)
    path = tmp_path / "bad.txt"
    path.write_bytes(b"\xef\xbb\xbfgood\nba\xffd\n\xe4\xb8\xad\nalso \xe4\xb8\nlast\xc0")
    with pytest.raises(InputError, match=re.escape(f"{path}:2: invalid UTF-8 (byte 3 of the line)")):
        read_all(path)
    bad_records = BadRecords("skip")
    assert read_all(path, bad_records=bad_records) == ["good", "中"]
    assert (bad_records.skipped, places(bad_records)) == (3, [f"{path}:2", f"{path}:4", f"{path}:5"])
    with pytest.raises(InputError, match=re.escape(f"{path}:4: ")):
        read_all(path, byte_range=(15, 20))


def test_only_the_first_places_are_kept():
    bad_records = BadRecords("skip")
    for number in range(100):
        bad_records.handle(f"f:{number}: bad")
    assert bad_records.skipped == 100
    assert places(bad_records) == [f"f:{number}" for number in range(core_records.MAX_NAMED)]


def test_documents_of_several_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(core_records, "READ_BYTES", 3)
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeff甲\r\n乙\n---\n \n---\n---\n丙 ---\n\n丁\n".encode())
    assert read_all(path, document_separator="---") == ["甲\n乙", "丙 ---\n\n丁"]


# ---------------------------------------------------------------- json, jsonl, parquet


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_jsonl_with_bom_blank_lines_and_crlf(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "一"}\r\n\n  \n{"text": " "}\n{"text": "two"}'.encode())
    assert read_all(path) == ["一", "two"]
    assert [location for location, _ in iter_records(path)] == [f"{path}:1", f"{path}:4", f"{path}:5"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "2: broken JSON: Expecting ',' delimiter"),
        ('{"text": ' + "[" * 99999, "2: broken JSON: it is nested too deeply"),
        ('{"text": ' + "1" * 9999 + "}", "2: broken JSON: Exceeds the limit"),
        (
            '{"content": "x", "id": 3}',
            "2: field 'text' is missing; the record has ['content', 'id']; pass --text_column",
        ),
        ('{"text": null}', "2: field 'text' is null, not text"),
        ('{"text": 5}', "2: field 'text' is int, not text"),
        ('["text"]', "2: need an object with named fields, got list"),
        ('{"text": "\\ud800"}', "2: text that is not valid Unicode"),
        ('{"text": "x", "id": ' + "9" * 5000 + "}", "2: broken JSON: Exceeds the limit"),
        ('{"text": "x", "id": ' + "[" * 10**5 + "]" * 10**5 + "}", "2: broken JSON: it is nested too deeply"),
    ],
)
def test_bad_jsonl_is_named_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + '\n{"text": "more"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(f"{path}:{message}")):
        read_all(path)
    bad_records = BadRecords("skip")
    assert read_all(path, bad_records=bad_records) == ["fine", "more"]
    assert places(bad_records) == [f"{path}:2"]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_bad_unicode_in_records_is_skipped_and_counted(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(
        b'{"text": "one"}\n{"text": "\xff"}\n{"text": "x", "more": [{"\\udc00": 1}]}\n{"text": "\xe4\xb8\xad"}'
    )
    with pytest.raises(InputError, match=re.escape(f"{path}:2: ")):
        read_all(path)
    bad_records = BadRecords("skip")
    assert read_all(path, bad_records=bad_records) == ["one", "中"]
    assert (bad_records.skipped, places(bad_records)) == (2, [f"{path}:2", f"{path}:3"])


def random_record(rng: random.Random) -> dict:
    text = "".join(rng.choices([*ALPHABET, '"', "\\", "{", "]", ",", "\n"], k=rng.choice([0, 2, 30])))
    return {"text": text, "n": rng.choice([None, True, -1.5e3, 7]), "list": [[], {"ü": [text[:3]]}]}


@pytest.mark.parametrize("chunk", [1, 3, 17, 1 << 20])
@pytest.mark.parametrize("seed", range(6))
def test_json_is_streamed_as_json_loads_reads_it(tmp_path, monkeypatch, chunk, seed):
    monkeypatch.setattr(core_records, "CHUNK_CHARACTERS", chunk)
    rng = random.Random(seed)
    records = [random_record(rng) for _ in range(rng.randint(0, 12))]
    options = {"ensure_ascii": rng.random() < 0.5, "indent": rng.choice([None, 1, 40])}
    one_list, one_a_line, path = json.dumps(records, **options), tmp_path / "lines.json", tmp_path / "list.json"
    path.write_text(f" {one_list}\n\n", encoding="utf-8")
    assert [record for _, record in iter_records(path)] == records
    # The place of a record is the line where it begins.
    for location, record in iter_records(path):
        line = int(location.rpartition(":")[2])
        before = "\n".join(f" {one_list}".split("\n")[line - 1 :])
        begins = json.JSONDecoder().raw_decode(before[before.index("{") :])[0] if options["indent"] else record
        assert begins == record
    one_a_line.write_text("\n".join(json.dumps(record, **options) for record in records), encoding="utf-8")
    assert [record for _, record in iter_records(one_a_line)] == records


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[\n{"a": 1},\n{"a": 2\n]', "4: broken JSON: Expecting ',' delimiter (column 1)"),
        ('[\n{"a": 1}\n{"a": 2}]', "3: broken JSON: expecting ',' or ']' after a record (column 1)"),
        ('[\n{"a": 1},\n]', "3: broken JSON: a comma before the end of the list; remove it (column 1)"),
        ("[,]", "1: broken JSON: Expecting value (column 2)"),
        ('{"a": 1,}', "1: broken JSON: "),
        ('[{"a": 1},\n', "2: broken JSON: the list is not closed by ']' (column 1)"),
        ('[{"a": 1}]\n x', "2: broken JSON: something follows the end of the list (column 2)"),
        ('{"a": 1}\n{"a": tru}\n{"a": 3}' + " " * 50, "2: broken JSON: Expecting value (column 7)"),
        ('{"a": 1}\n{"a": "x', "2: broken JSON: Unterminated string starting at (column 7)"),
        ('[\n{"a": 1}, {"a": ' + "[" * 99999 + "]}]", "2: broken JSON: it is nested too deeply (column 11)"),
        ("[\n5]", "2: need an object with named fields, got int"),
        ('[\n{"a": ' + "9" * 5000 + "}]", "2: broken JSON: Exceeds the limit"),
        ('[\n{"a": ' + "[" * 10**5 + "]" * 10**5 + "}]", "2: broken JSON: it is nested too deeply"),
    ],
)
def test_broken_json_is_named_with_line_and_column(tmp_path, monkeypatch, chunk, content, place):
    monkeypatch.setattr(core_records, "CHUNK_CHARACTERS", chunk)
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(f"{path}:{place}")):
        list(iter_records(path))


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = ["一", "", "b", None]
    parquet.write_table(pyarrow.table({"content": texts, "id": [1, 2, 3, 4]}), path)
    assert [record["id"] for _, record in iter_records(path)] == [1, 2, 3, 4]
    with pytest.raises(InputError, match=r"row 1: field 'text' is missing; the record has \['content', 'id'\]"):
        read_all(path)
    with pytest.raises(InputError, match="row 4: field 'content' is null"):
        read_all(path, text_column="content")
    parquet.write_table(pyarrow.table({"content": texts[:3]}), path)
    assert read_all(path, text_column="content") == ["一", "b"]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="not a readable parquet file"):
        list(iter_records(path))


@pytest.mark.parametrize("nested", [False, True])
def test_bytes_that_are_no_text_in_parquet(tmp_path, nested):
    """pyarrow gives no row of a batch in which one text is not UTF-8."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array(["一".encode(), b"\xff\xfe", b"two"], pyarrow.binary()).view(pyarrow.string())
    column = pyarrow.ListArray.from_arrays([0, 1, 2, 3], raw) if nested else raw
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(InputError, match=re.escape(f"{path}: row 2: invalid UTF-8")):
        list(iter_records(path))
    bad_records = BadRecords("skip")
    texts = [record["text"] for _, record in iter_records(path, bad_records)]
    assert texts == ([["一"], ["two"]] if nested else ["一", "two"])
    assert places(bad_records) == [f"{path}"]


# ---------------------------------------------------------------- other encodings

SIMPLIFIED = "老师的本子上写着许多小知识。“安全”和“危险”是一对反义词，2024 年的 PDF 文件。"
TRADITIONAL = "老師的本子上寫著許多小知識。「安全」和「危險」是一對反義詞，2024 年的 PDF 文件。"


@pytest.mark.parametrize(
    ("text", "codec", "name"),
    [
        (SIMPLIFIED, "gbk", "GB18030"),
        (SIMPLIFIED, "gb18030", "GB18030"),
        (TRADITIONAL, "big5", "BIG5"),
        (SIMPLIFIED, "utf-16", "UTF-16"),
        (TRADITIONAL, "utf-16-le", "UTF-16LE"),
        (SIMPLIFIED, "utf-16-be", "UTF-16BE"),
        ("no Chinese", "utf-16", "UTF-16"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl"])
def test_a_file_in_another_encoding_is_named_with_the_command(tmp_path, suffix, text, codec, name):
    path = tmp_path / f"a b.{suffix}"
    line = text if suffix == "txt" else json.dumps({"text": text}, ensure_ascii=False)
    path.write_bytes((line + "\n").encode(codec) * 3)
    # Skipping would leave nothing of it, or in UTF-16 some letters with zero bytes between them.
    for policy in ("error", "skip"):
        with pytest.raises(InputError, match=re.escape(f"{name}, need UTF-8; convert it: iconv -f {name} -t UTF-8 '")):
            read_all(path, bad_records=BadRecords(policy))


@pytest.mark.parametrize(
    "content",
    [
        "好\n".encode() + SIMPLIFIED.encode("gbk"),  # one line of two
        "caf\xe9 au lait \xe0 la carte\nd\xe9j\xe0 vu\n".encode("latin-1"),
        b"\xff\n",
    ],
)
def test_single_bad_lines_are_no_other_encoding(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="invalid UTF-8"):
        read_all(path)


# ---------------------------------------------------------------- which files


def test_folders_are_recursive_sorted_and_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.jsonl", "a/a.txt", ".hidden.txt", ".cache/x.txt", "notes.md", "c.JSON"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    found = [str(path.relative_to(tmp_path)) for path in core_records.list_data_files(tmp_path)]
    assert found == ["a/a.txt", "a/z.jsonl", "b.txt", "c.JSON"]
    with pytest.raises(InputError, match=r"cannot read '.md'"):
        core_records.list_data_files(tmp_path / "notes.md")
    with pytest.raises(InputError, match="data not found"):
        core_records.list_data_files(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no \.json, \.jsonl, \.parquet files below"):
        core_records.list_data_files(tmp_path / ".cache", core_records.RECORD_SUFFIXES)


def test_files_that_are_not_read_are_named(tmp_path, caplog):
    for name in ("a.txt", "b.csv", "deep/c.xlsx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert core_records.list_data_files(tmp_path) == [tmp_path / "a.txt"]
    assert "2 files are not read, being no .txt, .json, .jsonl, .parquet: b.csv, deep/c.xlsx" in caplog.text
    with pytest.raises(InputError, match=r"no \.json.* files below .*; there are a\.txt, b\.csv, deep/c\.xlsx"):
        core_records.list_data_files(tmp_path, core_records.RECORD_SUFFIXES)


def test_linked_folders_are_read_once(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "own", elsewhere):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("x", encoding="utf-8")
    (data / "linked").symlink_to(elsewhere)
    (data / "own" / "circle").symlink_to(data)
    (elsewhere / "twin").symlink_to(data / "own")
    found = core_records.list_data_files(data)
    assert sorted(path.resolve() for path in found) == [data / "own" / "a.txt", elsewhere / "a.txt"]
    (data / "lost.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"lost\.txt: a link that leads nowhere"):
        core_records.list_data_files(data)


# ---------------------------------------------------------------- output: complete or absent
