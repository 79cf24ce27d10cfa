"""LongBench's tables against the published ones, and its files: what is found, what is read, what is refused."""

import json
import zipfile
from collections import Counter

import pytest

from utils.core.errors import InputError
from utils.evaluation.longbench.tasks import GROUPS, TASKS, find_data, find_files, read_samples, select_tasks

ROW = {
    "input": "Who?", "context": "Long ago ...", "answers": ["He", "him"], "length": 4321, "dataset": "hotpotqa",
    "language": "en", "all_classes": None, "_id": "f00d",
}  # fmt: skip


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.shared_data
@pytest.mark.parametrize(("file", "field"), [("dataset2prompt", "prompt"), ("dataset2maxlen", "max_new_tokens")])
def test_prompts_and_lengths_are_the_published_ones(shared_data, file, field):
    published = json.loads((shared_data / "eval" / "longbench" / f"{file}.json").read_text(encoding="utf-8"))
    assert {name: getattr(task, field) for name, task in TASKS.items()} == published


def test_the_tasks_are_those_of_the_paper():
    assert Counter(task.language for task in TASKS.values()) == {"en": 14, "zh": 5, "code": 2}
    counts = Counter((task.group, task.language) for task in TASKS.values())
    for group in GROUPS:
        assert counts[group, "zh"] == (group != "code")
        assert counts[group, "en"] == {"code": 0, "synthetic": 2}.get(group, 3)
    assert {name for name, task in TASKS.items() if not task.chat} == {
        "trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"
    }  # fmt: skip
    assert {name for name, task in TASKS.items() if task.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert [name for name, task in TASKS.items() if task.one_line] == ["samsum"]
    by_metric = {
        "rouge_l_zh": {"dureader", "vcsum"},
        "classification": {"trec", "lsht"},
        "qa_f1_zh": {"multifieldqa_zh"},
    }
    for metric, names in by_metric.items():
        assert {name for name, task in TASKS.items() if task.metric == metric} == names


def test_a_prompt_is_filled_in_once():
    """What stands in the data is text, whatever braces it has."""
    assert TASKS["repobench-p"].fill("{input} {x}", "{context}") == (
        "Please complete the code given below. \n{input} {x}{context}Next line of code:\n"
    )
    assert TASKS["lsht"].fill("文", "题") == "请判断给定新闻的类别，下面是一些例子。\n\n文\n题"


def test_selection():
    assert len(select_tasks(["zh", "en", "code"], e=False)) == 21
    assert len(select_tasks(["zh", "en", "code"], e=True)) == 13
    assert [task.name for task in select_tasks(["lcc", "zh"], e=False)] == [
        "multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh", "lcc"
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"--predict_on french,squad: need some of zh, en, code, or datasets: narr"):
        select_tasks(["zh", "french", "squad"], e=False)
    with pytest.raises(InputError, match=r"LongBench-E has nothing of --predict_on zh; it has qasper, "):
        select_tasks(["zh"], e=True)
    with pytest.raises(InputError, match=r"LongBench-E has nothing of --predict_on musique"):
        select_tasks(["en", "musique"], e=True)


def test_files_are_found_in_the_folder_or_its_data(tmp_path):
    (tmp_path / "data").mkdir()
    tasks = select_tasks(["hotpotqa", "lcc"], e=True)
    write_rows(tmp_path / "data" / "hotpotqa_e.jsonl", ROW)
    assert find_data(str(tmp_path)) == tmp_path / "data"
    with pytest.raises(InputError, match=r"data has no lcc_e\.jsonl; put them there, or .*--predict_on hotpotqa$"):
        find_files(tmp_path / "data", tasks, e=True)
    with pytest.raises(InputError, match=r"has no hotpotqa\.jsonl, lcc\.jsonl; .* another --data_dir"):
        find_files(tmp_path / "data", tasks, e=False)
    write_rows(tmp_path / "data" / "lcc_e.jsonl", ROW)
    found = find_files(tmp_path / "data", tasks, e=True)
    assert found == {name: tmp_path / "data" / f"{name}_e.jsonl" for name in ("hotpotqa", "lcc")}
    write_rows(tmp_path / "hotpotqa.jsonl", ROW)
    assert find_data(str(tmp_path)) == tmp_path


def test_the_hubs_archive_is_unpacked_once(tmp_path, monkeypatch):
    import huggingface_hub

    archive = tmp_path / "snapshot" / "data.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("data/hotpotqa.jsonl", json.dumps(ROW) + "\n")
        packed.writestr("data/readme.txt", "no data")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *names, **kind: asked.append((names, kind)) or str(archive)
    )
    folder = find_data("Someone/LongBench")
    assert asked == [(("Someone/LongBench", "data.zip"), {"repo_type": "dataset"})]
    assert [path.name for path in folder.iterdir()] == ["hotpotqa.jsonl"]
    assert read_samples(folder / "hotpotqa.jsonl", TASKS["hotpotqa"])[0].answers == ["He", "him"]
    archive.write_bytes(b"")  # not read again
    assert find_data("Someone/LongBench") == folder


def test_without_a_network_the_remedy_is_named(tmp_path):
    with pytest.raises(
        InputError,
        match=r"data folder not found: THUDM/LongBench; .*; download data\.zip of",
    ):
        find_data("THUDM/LongBench")
    with pytest.raises(InputError, match=r"--data_dir nowhere is no folder; download data\.zip"):
        find_data("nowhere")
    (tmp_path / "data.zip").touch()
    with pytest.raises(InputError, match=r"data\.zip is no folder; .* unzip it"):
        find_data(str(tmp_path / "data.zip"))


def test_samples_are_spread_over_the_file(tmp_path):
    path = write_rows(tmp_path / "hotpotqa.jsonl", *(ROW | {"length": number} for number in range(10)))
    lengths = {most: [s.length for s in read_samples(path, TASKS["hotpotqa"], most)] for most in (None, 20, 4, 1)}
    assert lengths == {None: list(range(10)), 20: list(range(10)), 4: [0, 2, 5, 7], 1: [0]}


BAD = {
    "column": ({"ctx": "x", "context": ...}, r"jsonl:2: field 'context' is missing, need text; the record has _id, "),
    "empty context": ({"context": " \n"}, r"field 'context' is ' \\n', need text"),
    "null input": ({"input": None}, "field 'input' is None, need text, which may be empty"),
    "answers": ({"answers": "He"}, "field 'answers' is 'He', need a list of texts"),
    "no answer": ({"answers": []}, r"field 'answers' is \[\], need a list"),
    "number": ({"answers": [3]}, r"field 'answers' is \[3\], need a list of texts"),
    "length": ({"length": "12"}, "field 'length' is '12', need a whole number"),
    "other dataset": ({"dataset": "musique"}, "field 'dataset' is 'musique', need 'hotpotqa'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(case, tmp_path):
    changes, message = BAD[case]
    row = {name: value for name, value in (ROW | changes).items() if value is not ...}
    path = write_rows(tmp_path / "hotpotqa.jsonl", ROW, row)
    with pytest.raises(InputError, match=message):
        read_samples(path, TASKS["hotpotqa"])


def test_bad_records_of_some_tasks_are_named(tmp_path):
    row = {name: value for name, value in ROW.items() if name != "dataset"}
    path = write_rows(tmp_path / "rows.jsonl", row | {"input": ""})
    assert read_samples(path, TASKS["lcc"])[0].question == ""
    with pytest.raises(InputError, match="field 'all_classes' is None, need a list of texts;"):
        read_samples(path, TASKS["trec"])
    with pytest.raises(InputError, match=r"field 'answers' is \['He', 'him'\], need texts such as 'Paragraph 1'"):
        read_samples(path, TASKS["passage_retrieval_en"])
    with pytest.raises(InputError, match=r"need texts such as '段落1'"):
        read_samples(path, TASKS["passage_retrieval_zh"])
    write_rows(path, row | {"answers": ["段落3"]})
    assert read_samples(path, TASKS["passage_retrieval_zh"])[0].answers == ["段落3"]
    path.write_text("")
    with pytest.raises(InputError, match=r"rows\.jsonl: no sample in it"):
        read_samples(path, TASKS["lcc"])
    path.write_text('{"input": "x", ')
    with pytest.raises(InputError, match=r"rows\.jsonl:1: broken JSON"):
        read_samples(path, TASKS["lcc"])
