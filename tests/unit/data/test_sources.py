"""utils.data.sources: what the arguments of the five training scripts make of files, limits and held-out shares."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import ppo
import pt
import pytest
import sft

from utils.core.arguments import DataArguments
from utils.core.errors import InputError
from utils.data.cache import CacheSettings
from utils.data.corpora import split_documents
from utils.data.samples import load_sft_samples
from utils.data.sources import Sources, load_pair_sets
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import load_tokenizer
from utils.training.runs import INPUTS, Run, start_run

TEMPLATE = CHAT_TEMPLATES["llama-2"]


@pytest.fixture(scope="module")
def tokenizer(extended_tokenizer_folder):
    return load_tokenizer(extended_tokenizer_folder)


@pytest.fixture
def run(tmp_path):
    """Of a run's arguments, what decides about data; `waits` counts how often the main process went first."""

    @contextlib.contextmanager
    def main_process_first(local, desc):
        assert not local  # once for all nodes: the cache is shared
        args.waits += 1
        yield

    args = SimpleNamespace(output_dir=str(tmp_path / "runs" / "a"), seed=1, waits=0)
    args.main_process_first = main_process_first
    return args


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two folders of the same names: texts, conversations, pairs (which are prompts too), 40 and 12 of each."""
    root = tmp_path_factory.mktemp("data")
    for part, count in (("training", 40), ("validation", 12)):
        (root / part).mkdir()
        (root / part / "zh.txt").write_text("\n".join(f"{part} {number} " * 20 for number in range(count)))
        conversations = [{"instruction": f"{part} {number}", "output": f"{number}"} for number in range(count)]
        pairs = [{"prompt": f"{part} {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(count)]
        (root / part / "sft.json").write_text(json.dumps(conversations))
        (root / part / "pairs.json").write_text(json.dumps(pairs))
    return root


def load_pt(data_args, run, tokenizer):
    args = pt.PretrainingArguments(block_size=16)
    train, evaluated, keys = pt.load_pretraining_data(data_args, args, run, tokenizer)
    return len(train), {name: len(blocks) for name, blocks in evaluated.items()}, keys


def load_sft(data_args, run, tokenizer, packing=False):
    args = sft.TuningArguments(packing=packing)
    train, evaluated, keys = sft.load_tuning_data(data_args, args, run, tokenizer, TEMPLATE)
    return train.num_samples, {name: rows.num_samples for name, rows in evaluated.items()}, keys


def load_pairs(data_args, run, tokenizer):
    train, evaluated, keys = load_pair_sets(data_args, run, tokenizer, TEMPLATE, 100)
    return len(train), {name: len(pairs) for name, pairs in evaluated.items()}, keys


def load_prompts(data_args, run, tokenizer):
    sources = Sources(data_args, run)
    train, evaluated = ppo.load_prompt_sets(sources, ppo.RolloutArguments(), tokenizer, TEMPLATE)
    return len(train), {name: len(rows) for name, rows in evaluated.items()}, sources.keys


SCRIPTS = {"pt": (load_pt, "zh.txt"), "sft": (load_sft, "sft.json"), "rm, dpo": (load_pairs, "pairs.json")}
SCRIPTS["ppo"] = load_prompts, "pairs.json"
RECORD_SCRIPTS = [name for name in SCRIPTS if name != "pt"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_sets_of_one_name_are_both_recorded(data, run, tokenizer, script):
    load, file = SCRIPTS[script]
    name = file.split(".")[0]
    train, validation = (f"{name}={data / part / file}" for part in ("training", "validation"))
    data_args = DataArguments(train_data=[train], validation_data=[validation], validation_split=0.5)
    _, evaluated, keys = load(data_args, run, tokenizer)
    assert list(evaluated) == [name]
    assert list(keys) == [f"train/{name}", f"validation/{name}"] and len(set(keys.values())) == 2
    assert run.waits == 2
    data_args.train_data, data_args.validation_data = [validation], [train]
    assert load(data_args, run, tokenizer)[2] == {f"train/{name}": keys[f"validation/{name}"],
                                                  f"validation/{name}": keys[f"train/{name}"]}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_max_eval_samples_limits_what_is_held_out_too(data, run, tokenizer, script):
    load, file = SCRIPTS[script]
    data_args = DataArguments(train_data=[str(data / "training" / file)], validation_split=0.3)
    train, everything, keys = load(data_args, run, tokenizer)
    data_args.max_eval_samples = 3
    limited_train, limited, _ = load(data_args, run, tokenizer)
    name = "zh" if script == "pt" else "heldout"
    assert list(keys) == [f"train/{file.split('.')[0]}"]
    assert everything[name] > 3 and limited == {name: 3} and limited_train == train
    if script != "pt":  # blocks of pt hold parts of documents
        assert train + everything[name] == 40


@pytest.mark.parametrize("script", RECORD_SCRIPTS)
def test_limits_of_records_read(data, run, tokenizer, script):
    load, file = SCRIPTS[script]
    paths = {part: str(data / part / file) for part in ("training", "validation")}
    data_args = DataArguments([paths["training"], paths["validation"]], [paths["validation"]])
    data_args.max_train_samples, data_args.max_eval_samples = 41, 5
    train, evaluated, keys = load(data_args, run, tokenizer)
    name = file.split(".")[0]
    assert (train, evaluated) == (41, {name: 5})
    assert list(keys) == [f"train/{name}+{name}-2", f"validation/{name}"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_limit_takes_from_all_files_alike(data, run, tokenizer, script, tmp_path):
    """Named one by one, or in a folder: no file is left out, and the smaller one's lack is the larger one's gain."""
    _, file = SCRIPTS[script]
    paths = [str(data / part / file) for part in ("training", "validation")]
    for part, path in zip(("first", "second"), paths, strict=True):
        (tmp_path / "all").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "all" / f"{part}{Path(file).suffix}")
    for sources in (paths, [str(tmp_path / "all")]):
        args = DataArguments(train_data=sources, max_train_samples=30)
        if script == "pt":
            args.max_train_samples = 100
            blocks, _, _ = pt.load_pretraining_data(args, pt.PretrainingArguments(block_size=16), run, tokenizer)
            texts = [tokenizer.decode(blocks[number]["input_ids"]) for number in range(len(blocks))]
            counts = [sum(part in text for text in texts) for part in ("training", "validation")]
            assert len(blocks) == 100 and min(counts) >= (50 if len(sources) == 2 else 8)
        else:
            load = {"sft": sft_texts, "rm, dpo": pair_texts, "ppo": prompt_texts}[script]
            texts = load(args, run, tokenizer)
            assert [sum(part in text for text in texts) for part in ("training", "validation")] == [18, 12]


def sft_texts(args, run, tokenizer):
    rows = sft.load_tuning_data(args, sft.TuningArguments(packing=False), run, tokenizer, TEMPLATE)[0]
    return [tokenizer.decode(rows[number]["input_ids"]) for number in range(len(rows))]


def pair_texts(args, run, tokenizer):
    pairs = load_pair_sets(args, run, tokenizer, TEMPLATE, 100)[0]
    return [tokenizer.decode(pairs[number].pair.prompt) for number in range(len(pairs))]


def prompt_texts(args, run, tokenizer):
    prompts = ppo.load_prompt_sets(Sources(args, run), ppo.RolloutArguments(), tokenizer, TEMPLATE)[0]
    return [tokenizer.decode(ids) for ids in prompts]


def test_held_out_rows_are_the_first_of_the_split(data, run, tokenizer):
    data_args = DataArguments(train_data=[str(data / "training" / "pairs.json")], validation_split=0.3)
    data_args.max_eval_samples = 3
    train, evaluated, _ = load_pair_sets(data_args, run, tokenizer, TEMPLATE, 100)
    train_ids, held_out_ids = split_documents(train.file, 0.3, run.seed)
    assert np.array_equal(train.ids, train_ids) and np.array_equal(evaluated["heldout"].ids, held_out_ids[:3])


def test_the_settings_reach_every_loader(data, run, tokenizer, tmp_path):
    data_args = DataArguments(train_data=["x"], on_bad_record="skip", preprocessing_num_workers=3)
    assert Sources(data_args, run, "", 0.2).settings == CacheSettings(
        tmp_path / "runs" / ".token_cache", "skip", 3, 0.2
    )
    data_args.data_cache_dir = str(tmp_path / "here")
    sources = Sources(data_args, run)
    assert sources.settings == CacheSettings(tmp_path / "here", "skip", 3, 0.1)
    path = tmp_path / "tuning.jsonl"
    path.write_bytes(b'{"instruction": "a", "output": "b"}\n{"instruction": "\xff", "output": "b"}\n')
    ppo_args = ppo.PPOArguments(sft_data=[str(path), str(data / "training" / "sft.json")])
    samples = ppo.load_tuning_set(sources, ppo.RolloutArguments(), ppo_args, tokenizer, TEMPLATE)
    assert (samples.num_samples, samples.skipped) == (41, 1)  # --on_bad_record skip counts for --sft_data too
    assert sources.keys == {"sft/tuning+sft": samples.key}
    assert (
        samples.key
        == load_sft_samples(
            [path, data / "training" / "sft.json"], tokenizer, TEMPLATE, 512 + 256, sources.settings
        ).key
    )
    assert ppo.load_tuning_set(sources, ppo.RolloutArguments(), ppo.PPOArguments(), tokenizer, TEMPLATE) is None


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_data_the_flag_is_named(run, tokenizer, script):
    with pytest.raises(InputError, match=r"pass --train_data: .*files or folders"):
        SCRIPTS[script][0](DataArguments(), run, tokenizer)


# ---------------------------------------------------------------- the keys as a resumed run's record


NEW = {"data": {"train/zh": "a", "validation/zh": "b"}, "tokenizer": "t"}


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        (NEW, None),
        ({**NEW, "data": {"train/zh": "a", "validation/zh": "c"}}, r"unfinished run with other data \(the contents"),
        ({**NEW, "data": {"zh": "a"}}, "unfinished run of an older version .* --restart"),
        ({**NEW, "data": {"train": "a", "zh": "b"}}, "unfinished run of an older version"),
        ({"tokenizer": "t"}, "with other data"),
        ({**NEW, "tokenizer": "u"}, "with other tokenizer"),
    ],
)
def test_a_record_of_an_older_version_is_named(tmp_path, recorded, words):
    (tmp_path / INPUTS).write_text(json.dumps(recorded))
    run = Run(tmp_path, tmp_path / "checkpoint-3", {}, replaces=False)
    if words is None:
        start_run(run, NEW, is_main_process=True)
    else:
        with pytest.raises(InputError, match=words):
            start_run(run, NEW, is_main_process=True)
