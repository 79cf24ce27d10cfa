"""The world's folders and files, made at random by seed: the whole ones are read as others read them, others named.

WORLD_SEEDS=17,40-45 repeats single cases.
"""

import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer

from support.tokenizers import CHATML, PATTERNS, make_byte_level
from support.world_files import Piece, Record, draw_file, learn_chatml, learn_mixtral
from support.world_folders import (
    EMBEDDING,
    TEXTS,
    Draft,
    draft_adapter,
    draft_folder,
    plant_adapter_fault,
    plant_fault,
)
from utils.core.arguments import InferenceArguments
from utils.core.errors import InputError
from utils.data.cache import CacheSettings
from utils.data.samples import load_sft_samples
from utils.generation.folder_check import FolderCheck
from utils.generation.loading import EnginePlan, load_for_inference
from utils.gguf.file import plan_gguf, write_gguf
from utils.lora.inputs import MergeInputs, open_merge
from utils.lora.streamed_model import StreamedModel
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import encode_text, load_tokenizer


def seeds(count: int, start: int = 0) -> Iterable[int]:
    named = os.environ.get("WORLD_SEEDS")
    if not named:
        return range(start, start + count)
    bounds = [[int(number) for number in part.split("-")] for part in named.split(",")]
    return [seed for first, *last in bounds for seed in range(first, (last or [first])[0] + 1)]


def run_cases(check: Callable[[int, Path, list[str]], None], numbers: Iterable[int], place: Path) -> None:
    """Every case; those that fail are told together, each with its seed and what it holds."""
    failures = []
    for seed in numbers:
        planted: list[str] = []
        folder = place / str(seed)
        try:
            check(seed, folder, planted)
        except (Exception, pytest.fail.Exception) as error:
            where = "".join(traceback.format_exception(error)[-4:]) if os.environ.get("WORLD_SEEDS") else ""
            failures.append(f"seed {seed} ({'; '.join(planted)}): {type(error).__name__}: {error}\n{where}")
        shutil.rmtree(folder, ignore_errors=True)
    assert not failures, f"{len(failures)} cases:\n" + "\n".join(failures)


# ---------------------------------------------------------------- model folders


def check_folder(seed: int, folder: Path, planted: list[str]) -> None:
    draft = draft_folder(seed, folder / "model")
    planted += draft.planted
    args = InferenceArguments(str(draft.folder), dtype="float32", only_cpu=True)
    if draft.rng.random() < 0.4:
        pattern = plant_fault(draft)
        planted += draft.planted[-1:]
        check_refused(args, pattern)
        return
    report = FolderCheck(args)
    assert report.refused == []
    plan = EnginePlan(args)
    check_tokens(draft, plan)
    weights = draft.weights
    # Merges and exports find tensors by their whole names, so they refuse bases that leave "model." out.
    whole_names = "no_prefix" not in draft.planted
    if whole_names and draft.rng.random() < 0.4:
        weights = draft_adapter(draft, folder / "adapter")
        args = replace(args, adapter_name_or_path=str(folder / "adapter"))
        if draft.rng.random() < 0.3:
            pattern = plant_adapter_fault(draft, folder / "adapter")
            planted[:] = draft.planted
            check_refused(args, pattern)
            return
        planted[:] = draft.planted
        assert FolderCheck(args).refused == []
        plan = EnginePlan(args)
    ids = draft.encode(TEXTS[0], with_special=False)
    expected = draft.logits(ids, weights)
    with torch.no_grad():
        logits = load_for_inference(plan.args, plan.config)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    if not whole_names:
        return
    adapters = [args.adapter_name_or_path] if args.adapter_name_or_path else []
    with open_merge(str(draft.folder), adapters) as inputs:
        if adapters or draft.rng.random() < 0.2:
            streamed = torch.from_numpy(StreamedModel(inputs, "--verify").run([ids])[0])
            torch.testing.assert_close(streamed, expected, rtol=1e-4, atol=1e-4)
        if draft.rng.random() < 0.3:
            planted.append("GGUF")
            check_gguf(draft, inputs, weights, folder / "model.gguf")


def check_refused(args: InferenceArguments, pattern: str) -> None:
    """One error, the same from who checks and from who would answer."""
    refused = FolderCheck(args).refused
    with pytest.raises(InputError, match=pattern) as error:
        EnginePlan(args)
    assert str(error.value) in refused, (str(error.value), refused)


def check_gguf(draft: Draft, inputs: MergeInputs, weights: dict[str, torch.Tensor], path: Path) -> None:
    """The header and the embeddings, read back by the gguf package."""
    if "a tensor of something else" in draft.planted:
        with pytest.raises(InputError, match=r"vision\.weight has no counterpart"):
            plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "world", inputs.folders)
        return
    if "llama3" in draft.planted and draft.kind in ("qwen2", "qwen3"):
        with pytest.raises(InputError, match=r"rope_type llama3: llama\.cpp has nothing equal to it"):
            plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "world", inputs.folders)
        return
    plan = plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "world", inputs.folders)
    write_gguf(plan, inputs.model, "F32", path)
    reader = GGUFReader(path)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == draft.model["vocab_size"]
    assert all(tokens[index] == text for text, (index, _) in draft.added.items())
    for name, text in (("bos", draft.bos), ("eos", draft.eos)):
        assert tokens[reader.fields[f"tokenizer.ggml.{name}_token_id"].contents()] == text
    embeddings = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert (torch.from_numpy(embeddings.data.copy()) == weights[EMBEDDING].float()).all()


def check_tokens(draft: Draft, plan: EnginePlan) -> None:
    """Ordinary text, prompts and ends, against a plain loop."""
    tokenizer = load_tokenizer(draft.folder)
    for text in TEXTS:
        assert encode_text(tokenizer, text) == draft.encode(text, with_special=False), text
    assert (tokenizer.bos_token, tokenizer.eos_token) == (draft.bos, draft.eos)
    if draft.template:
        messages = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "好"}]
        messages += [{"role": "user", "content": TEXTS[1]}]
        assert plan.encode(messages) == draft.prompt_ids(messages)
    turn_end = {draft.added["<|im_end|>"][0]} if draft.template == CHATML and "<|im_end|>" in draft.added else set()
    assert set(plan.stop_ids) == draft.ends | turn_end


def test_folders(tmp_path):
    run_cases(check_folder, seeds(25), tmp_path)


@pytest.mark.slow
def test_many_folders(tmp_path):
    run_cases(check_folder, seeds(1000, 1000), tmp_path)


# ---------------------------------------------------------------- files of conversations


@pytest.fixture(scope="module")
def learners(tmp_path_factory, base_tokenizer_folder):
    """(tokenizer, template, what is learnt of a record, pieces of ids) with byte-level and sentencepiece tokens."""
    folder = tmp_path_factory.mktemp("learners")
    byte_level = make_byte_level(folder / "byte-level", PATTERNS["qwen2"], False)
    plain = Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    byte_level.add_tokens([AddedToken(token, special=False) for token in ("<|im_start|>", "<|im_end|>")])
    marks = byte_level.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    pieces = load_tokenizer(base_tokenizer_folder)
    cut = sentencepiece.SentencePieceProcessor(str(base_tokenizer_folder / "tokenizer.model"))

    def learn_byte_level(record: Record) -> list[Piece]:
        return learn_chatml(record, lambda text: plain.encode(text, add_special_tokens=False).ids, *marks)

    return [
        (byte_level, CHATML, learn_byte_level),
        (pieces, CHAT_TEMPLATES["mixtral"], lambda record: learn_mixtral(record, cut.encode, 1, 2)),
    ]


def check_file(learners, seed: int, folder: Path, planted: list[str]) -> None:
    file = draw_file(seed, folder)
    planted += file.planted
    tokenizer, template, learn = learners[seed % len(learners)]
    bad = [line for line, record in zip(file.lines, file.records, strict=True) if record.fate == "bad"]
    expected = [learn(record) for record in file.records if record.fate == "sample"]
    if bad:
        with pytest.raises(InputError, match="|".join(re.escape(f"{file.path}:{line}: ") for line in bad)):
            load_sft_samples([file.path], tokenizer, template, 10_000, CacheSettings(folder / "strict"))
    settings = CacheSettings(folder / "cache", on_bad_record="skip")
    if not expected:
        with pytest.raises(InputError, match=re.escape(str(file.path))):
            load_sft_samples([file.path], tokenizer, template, 10_000, settings)
        return
    cache = load_sft_samples([file.path], tokenizer, template, 10_000, settings)
    dropped = sum(record.fate == "dropped" for record in file.records)
    counters = cache.counters
    counted = (cache.num_samples, counters["dropped_no_answer"] + counters["dropped_no_label"], cache.skipped)
    assert counted == (len(expected), dropped, len(bad))
    start = 0
    for pieces, end in zip(expected, cache.document_ends.tolist(), strict=True):
        ids = [index for part, _ in pieces for index in part]
        trained = [flag for part, flag in pieces for _ in part]
        assert cache.tokens[start:end].tolist() == ids
        assert cache.trained[start:end].tolist() == trained
        start = end


def test_files(tmp_path, learners):
    run_cases(partial(check_file, learners), seeds(25), tmp_path)


@pytest.mark.slow
def test_many_files(tmp_path, learners):
    run_cases(partial(check_file, learners), seeds(1000, 1000), tmp_path)
