"""utils.text.vocabulary_report: counts against hand-made ones, costs against a model's own parameters."""

import json

import numpy as np
import pytest

from utils.text.tokenizer import encode_text, load_tokenizer
from utils.text.vocabulary_report import (
    ModelSize,
    compare,
    describe_cost,
    judge,
    measure,
    round_figure,
    supported_pieces,
    tokens_to_learn,
    tokens_to_pay,
    write_report,
)


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


# ---------------------------------------------------------------- the verdict


def read_until_learnt(text: list[str], new: set[str]) -> int:
    """Read the text over and over until 95 % of its new tokens are pieces seen 50 times: the plain way."""
    seen, read = dict.fromkeys(new, 0), 0
    while True:
        for token in text:
            read += 1
            if token in new:
                seen[token] += 1
        learnt = sum(seen[token] >= 50 for token in text if token in new)
        if learnt >= 0.95 * sum(token in new for token in text):
            return read


@pytest.mark.parametrize("counts", [(40, 30, 20, 9, 1), (50, 50), (1, 1, 1), (97, 3), (90, 10)])
def test_learning_takes_what_a_reader_takes(counts):
    text = [str(piece) for piece, count in enumerate(counts) for _ in range(count)] + ["old"] * 100
    needed = tokens_to_learn(np.array([*counts, 0]), len(text))
    read = read_until_learnt(text, {str(piece) for piece in range(len(counts))})
    assert read - len(text) < needed <= read  # the reader looks up once a pass
    assert tokens_to_learn(np.array([0, 0]), 100) is None


def test_what_is_saved_pays_at_the_size_named():
    """All texts side by side: the first whose saving covers what the rows cost."""
    ratio, cost, learning = 0.5, 1.2, 3000.0
    for old_tokens in range(0, 100_000, 10):
        plain, extended = old_tokens, cost * ratio * old_tokens + cost * learning
        if extended <= plain:
            break
    assert tokens_to_pay(learning, ratio, cost) == pytest.approx(ratio * old_tokens, abs=10)
    assert tokens_to_pay(learning, 0.9, 1.2) is None and tokens_to_pay(None, 0.5) is None


def test_a_corpus_supports_what_it_shows_often_enough():
    added = np.array([100, 49, 26, 25, 24, 0])
    assert supported_pieces(added) == 1
    assert supported_pieces(added, scale=2) == 4


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (49, "49"),
        (994, "990"),
        (996, "1k"),
        (12_345, "12k"),
        (999_999, "1M"),
        (2.46e6, "2.5M"),
        (3e10, "30G"),
    ],
)
def test_figures_are_rounded_to_two_digits(number, text):
    assert round_figure(number) == text


def judged(cost=1.0, training=None, added=1000, unused=400, before=1000, after=800, learn=1e6):
    text = {"before": {"tokens": before}, "after": {"tokens": after}, "tokens_to_learn": learn}
    report = {"selection": {"added": added}, "unused_added_tokens": unused, "languages": {"zh": text}}
    report["cost"] = None if cost is None else {"compute_per_token_ratio": cost}
    return judge(report | ({} if training is None else {"training_text": text | training}))


def test_the_verdict_in_words():
    pieces, zh = judged()
    assert pieces.startswith("400 of 1,000 added pieces unused") and "--training_text" in pieces
    assert zh == "zh: saves 20% of the computation: not worth it below 4M tokens of it"  # 0.8 * 1M / 0.2
    assert "not worth it below 4M" in judged(cost=None)[1] and "--model_config" in judged(cost=None)[1]
    assert judged(cost=1.5)[1] == "zh: 20% fewer tokens, 1.20 times the computation: never worth it"
    assert len(judged(after=1000)) == 1  # a text that is cut as before is nothing to judge


def test_the_verdict_on_a_corpus_has_its_size():
    few = judged(training={"tokens": 3e6, "supported_pieces": 120, "unused_added_tokens": 700})
    assert "supports about 120 pieces" in few[0] and "700 are unused" in few[0]
    assert few[0].endswith("lower --vocab_size, or pass --max_new_tokens 120")
    assert few[-1].endswith("not worth it below 4M tokens of it; it has 3M, too few: leave the vocabulary as it is")
    much = judged(training={"tokens": 5e6, "supported_pieces": 900, "unused_added_tokens": 10})
    assert "--max_new_tokens" not in much[0] and much[-1].endswith("it has 5M, enough")


def test_the_corpus_is_measured_with_its_scale(base, extended):
    text = ["的猫 狗"] * 10
    measured = compare(base, extended, {}, text, scale=6.0)
    corpus = measured["training_text"]
    assert corpus["tokens"] == 6 * sum(len(encode_text(extended, line)) for line in text)
    ids = [index for line in text for index in encode_text(extended, line)]
    often = [index for index in set(ids) if index >= len(base) and 6 * ids.count(index) >= 50]
    assert corpus["supported_pieces"] == len(often) > 0
    assert measured["unused_added_tokens"] is None and "training_text" not in compare(base, extended, {})
