"""utils.data.cache: the rules that turn files into arrays have a version, which is part of every cache's key."""

import hashlib
import json

import pytest
from sentencepiece import sentencepiece_model_pb2

from support.tokenizers import write_sentencepiece
from utils.data import samples
from utils.data.cache import CacheSettings
from utils.data.corpora import CorpusCache, tokenize_corpus
from utils.data.preferences import PairCache, PromptCache, load_preferences, load_prompts
from utils.data.samples import SampleCache, load_sft_samples
from utils.text.pieces import BYTE, CONTROL, NORMAL, UNKNOWN
from utils.text.tokenizer import load_tokenizer

# What GOLDEN_TEXTS and GOLDEN_RECORDS become under each version of a kind's rules. A test below fails because equal
# input gives other arrays? Then raise RULES of that kind and add a line here; a digest that stands here never changes,
# or caches of the old rules would be taken for those of the new ones.
GOLDEN = {
    "tokens": {1: "ded75ca4281c175b", 2: "ded75ca4281c175b"},
    "samples": {1: "c33d8c11620887b4", 2: "c33d8c11620887b4", 3: "3223706ec4f611e1", 4: "3223706ec4f611e1"},
    "pairs": {1: "f07ace143e5837c5", 2: "f07ace143e5837c5", 3: "54cef27ca950ccc2", 4: "54cef27ca950ccc2"},
    "prompts": {1: "c5d580c164b1f267", 2: "c5d580c164b1f267", 3: "bca08cc70fbb0649", 4: "bca08cc70fbb0649"},
}
GOLDEN_TEXTS = ["the cat 猫", "", "  two  spaces <s>", "tab\there", "\u3000é😀"]
CHAT = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "猫 </s>"}]
GOLDEN_RECORDS = [
    {"instruction": "the", "input": "cat", "output": "猫", "system": "S", "history": [["Q", "A"]]},
    {"messages": [*CHAT, {"role": "user", "content": " more "}, {"role": "assistant", "content": "the cat " * 3}]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A\n"}], "tools": "[]"},
    {"instruction": "the cat " * 30, "output": "A"},
    {"instruction": "Q", "output": "the cat " * 30},
]
GOLDEN_PAIRS = [
    {"prompt": "the cat?", "chosen": " 猫", "rejected": "no", "margin": 0.5, "source": "web"},
    {"conversations": [{"from": "human", "value": "Q"}], "chosen": "the cat " * 30, "rejected": "no"},
    {"prompt": "Human: Q Assistant:", "chosen": " A", "rejected": "B"},
    {"prompt": CHAT[:1], "chosen": [CHAT[1]], "rejected": [{"role": "assistant", "content": "no"}], "source": "x"},
    {"prompt": "Q", "chosen": "the same", "rejected": "the same"},
    {"prompt": "the cat " * 30, "chosen": "A", "rejected": "B"},
    {"prompt": " ", "chosen": "A", "rejected": "B"},
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ bos_token + '[' + m['role'] + '] ' + m['content'] + ' [/]' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def fixed_tokenizer(tmp_path_factory):
    """A Llama-2-style tokenizer made by hand, so that no version of a library can change its pieces."""
    proto = sentencepiece_model_pb2.ModelProto()
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{i:02X}>", BYTE) for i in range(256))]
    pieces += [(piece, NORMAL) for piece in ("▁t", "he", "▁the", "at", "▁c", "▁cat", "▁", *"theca猫")]
    for rank, (piece, kind) in enumerate(pieces):
        proto.pieces.add(piece=piece, type=kind, score=-float(rank))
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    folder = tmp_path_factory.mktemp("fixed") / "tokenizer"
    return load_tokenizer(write_sentencepiece(folder, proto.SerializeToString()))


def build(kind, folder, tokenizer):
    """A cache of this kind of the golden input."""
    folder.mkdir()
    texts, records = folder / "a.txt", folder / "b.jsonl"
    texts.write_text("\n".join(GOLDEN_TEXTS), encoding="utf-8")
    settings = CacheSettings(folder / "cache")
    if kind is CorpusCache:
        records.write_text("".join(json.dumps({"body": text + "\n"}) + "\n" for text in GOLDEN_TEXTS))
        return tokenize_corpus([texts, records], tokenizer, settings, text_column="body")
    rows = GOLDEN_RECORDS if kind is SampleCache else GOLDEN_PAIRS
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = {SampleCache: load_sft_samples, PairCache: load_preferences, PromptCache: load_prompts}[kind]
    return load([records], tokenizer, TEMPLATE, 60, settings)


def digest(cache) -> str:
    """Of all that the cache holds."""
    arrays = {name: [str(dtype), cache._map(name).tolist()] for name, (dtype, _) in cache.meta["arrays"].items()}
    content = json.dumps([arrays, cache.counters, cache.meta["names"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind", [CorpusCache, SampleCache, PairCache, PromptCache])
def test_other_rules_have_another_version(tmp_path, fixed_tokenizer, kind):
    known = GOLDEN[kind.KIND]
    found = digest(build(kind, tmp_path / "a", fixed_tokenizer))
    assert known.get(kind.RULES) == found, f"raise {kind.__name__}.RULES, and see the head of this file"


def test_the_digest_sees_a_changed_rule(tmp_path, monkeypatch, fixed_tokenizer):
    monkeypatch.setattr(samples, "truncate_sample", lambda ids, flags, length, ends: (ids[:length], flags[:length]))
    assert digest(build(SampleCache, tmp_path / "a", fixed_tokenizer)) != GOLDEN["samples"][SampleCache.RULES]


@pytest.mark.parametrize("kind", [CorpusCache, SampleCache, PairCache, PromptCache])
def test_a_raised_version_builds_the_cache_again(tmp_path, monkeypatch, fixed_tokenizer, kind):
    before = build(kind, tmp_path / "a", fixed_tokenizer)
    monkeypatch.setattr(kind, "RULES", kind.RULES + 1)
    again = build(kind, tmp_path / "b", fixed_tokenizer)
    assert again.key != before.key and digest(again) == digest(before)
