"""utils.text.vocabulary_report: counts against hand-made ones, costs against a model's own parameters."""

import json

import pytest

from utils.text.tokenizer import encode_text, load_tokenizer
from utils.text.vocabulary_report import ModelSize, compare, describe_cost, measure, write_report


@pytest.fixture(scope="module")
def base(base_tokenizer_folder):
    return load_tokenizer(base_tokenizer_folder)


@pytest.fixture(scope="module")
def extended(extended_tokenizer_folder):
    return load_tokenizer(extended_tokenizer_folder)


def test_measure_counts_tokens_and_parts_of_characters(base):
    texts = ["a cat", "猫", "\n"]
    figures, occurrences = measure(base, texts)
    ids = [index for text in texts for index in encode_text(base, text)]
    assert figures.tokens == len(ids) == occurrences.sum()
    assert (figures.characters, figures.bytes) == (7, 9)
    assert figures.characters_per_token == 7 / len(ids)
    assert figures.bytes_per_token == 9 / len(ids)
    assert figures.byte_fallback_share == 3 / len(ids)  # the three bytes of 猫; a newline's byte is a whole character
    assert all(occurrences[index] == ids.count(index) for index in set(ids))


def test_measure_of_many_texts_is_the_sum(base, monkeypatch):
    texts = ["a cat", "猫 dog", "x"] * 5
    whole, _ = measure(base, texts)
    monkeypatch.setattr("utils.text.vocabulary_report.BATCH", 4)
    assert measure(base, texts)[0] == whole


def test_compare_counts_the_unused(base, extended):
    comparison = compare(base, extended, {"zh": ["的猫"], "en": ["a dog"]})
    assert comparison["unused_added_tokens"] == 4  # of 的 是 猫 狗 猫狗 ▁zebra
    zh = comparison["languages"]["zh"]
    assert (zh["before"]["tokens"], zh["after"]["tokens"]) == (7, 3)
    assert zh["tokens_saved"] == pytest.approx(4 / 7)
    assert comparison["languages"]["en"]["tokens_saved"] == 0
    assert compare(base, extended, {})["unused_added_tokens"] is None


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_body_is_what_the_model_has(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "vocab_size": 50}
    if family == "mixtral":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    elif family != "llama":
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        settings |= {"shared_expert_intermediate_size": 20} if family == "qwen2_moe" else {"head_dim": 8}
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config)
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.dim() > 1 and not any(part in name for part in ("embed", "lm_head", "shared_expert_gate"))
    }
    expected = sum(p.numel() * (0.5 if ".experts." in name else 1) for name, p in matrices.items())  # 2 of 4 experts
    size = ModelSize.from_config(config.to_dict())
    assert size.body == expected
    assert (size.hidden_size, size.tied) == (16, False)
    assert ModelSize.from_config({"hidden_size": 8, "tie_word_embeddings": True}) == ModelSize(8, True, None)


def test_cost_breaks_even_where_both_sides_cost_the_same():
    languages = {
        "zh": {"before": {"tokens": 200}, "after": {"tokens": 100}},
        "en": {"before": {"tokens": 100}, "after": {"tokens": 100}},
    }
    size = ModelSize(hidden_size=10, tied=False, body=9000)
    cost = describe_cost(size, 100, 200, languages)
    assert cost["added_parameters"] == 2 * 100 * 10
    assert cost["compute_per_token_ratio"] == 11000 / 10000
    assert cost["compute_per_text_ratio"]["zh"] == pytest.approx(0.55)
    share = cost["break_even_share"]["zh"]
    before = 10000.0  # per token of the old vocabulary
    after = 11000 * (share * 0.5 + (1 - share))
    assert after == pytest.approx(before)
    assert "en" not in cost["break_even_share"]
    assert describe_cost(ModelSize(10, True), 100, 200, languages) == {
        "hidden_size": 10,
        "tied": True,
        "added_parameters": 1000,
    }


def test_the_report_is_written_in_three_forms(tmp_path, base, extended):
    comparison = compare(base, extended, {"中文": ["的猫 " * 5], "en": ["a dog"]})
    report = {
        "base_vocabulary": 400,
        "vocabulary": 406,
        "embedding_rows": 448,
        "selection": {"candidates": 9, "unreachable": 3, "added": 6},
        "unreachable_added_tokens": 0,
        **comparison,
        "cost": describe_cost(ModelSize(10, False, 1000), 400, 448, comparison["languages"]),
    }
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "vocabulary_report.json").read_text(encoding="utf-8")) == report
    markdown = (tmp_path / "vocabulary_report.md").read_text(encoding="utf-8")
    assert "| 中文 | 15 |" in markdown
    assert "breaks even from a share of" in markdown
    assert "no token is saved" in markdown
    assert (tmp_path / "vocabulary_report.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bare").mkdir()
    write_report(report | {"languages": {}, "unused_added_tokens": None, "cost": None}, tmp_path / "bare")
    assert (tmp_path / "bare" / "vocabulary_report.md").read_text(encoding="utf-8").count("Skipped") == 2
    assert not (tmp_path / "bare" / "vocabulary_report.png").exists()
