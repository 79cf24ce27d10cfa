"""Quantisation and the table of formats: settings, calibration windows, scores against plain formulas, the report."""

import contextlib
import importlib.machinery
import itertools
import json
import math
import sys
import types
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from support.paths import EXAMPLES
from utils.core.errors import InputError
from utils.evaluation import formats
from utils.evaluation.formats import FormatTable, ScoredText, check_engines_agree, read_scored_text
from utils.models import quantization
from utils.models.quantization import Scheme, check_scheme, read_calibration
from utils.report.charts import HEIGHT, WIDTH, scatter_chart
from utils.report.pages import Page, Text, render_html, render_markdown
from utils.report.run import quantization_sections
from utils.text.tokenizer import load_tokenizer
from utils.weights.config import load_config

HELDOUT = EXAMPLES / "pretrain" / "en_heldout.txt"


@pytest.fixture(scope="module")
def tiny(tiny_model_folder):
    """(folder, tokenizer, config)"""
    return tiny_model_folder, load_tokenizer(tiny_model_folder), load_config(str(tiny_model_folder))


# ---------------------------------------------------------------- before weights are read


def test_calibration_takes_as_many_windows_from_every_file(tiny, tmp_path):
    _, tokenizer, config = tiny
    english = HELDOUT.read_text(encoding="utf-8").splitlines()
    (tmp_path / "short.txt").write_text("\n".join(english[:2]), encoding="utf-8")
    (tmp_path / "long.txt").write_text("\n".join(english[2:]), encoding="utf-8")
    files = [str(tmp_path / "long.txt"), str(tmp_path / "short.txt")]
    rows = read_calibration(files, tokenizer, config, 40, 16)
    assert rows.shape == (40, 16) and rows.dtype == torch.int64
    streams = {}
    for name, lines in (("long", english[2:]), ("short", english[:2])):
        streams[name] = [i for line in lines for i in [1, *tokenizer(line, add_special_tokens=False).input_ids]]
    whole = len(streams["short"]) // 16
    assert 5 < whole < 20, "the short file must run dry before the long one"
    expected = []
    for rank in range(whole):
        expected += [streams[name][16 * rank : 16 * rank + 16] for name in ("long", "short")]
    expected += [streams["long"][16 * rank : 16 * rank + 16] for rank in range(whole, 40 - whole)]
    assert rows.tolist() == expected


@pytest.mark.parametrize(
    ("samples", "length", "message"),
    [
        (10**4, 64, r"holds \d+ windows of 64 tokens, need 10000: add text, or pass a smaller"),
        (1, 513, "need at least 1 sample of 2 to 512 tokens"),
        (0, 16, "need at least 1 sample"),
        (1, 1, "2 to 512"),
    ],
)
def test_calibration_that_does_not_suffice(tiny, samples, length, message):
    _, tokenizer, config = tiny
    with pytest.raises(InputError, match=message):
        read_calibration([str(HELDOUT)], tokenizer, config, samples, length)


def test_calibration_length_follows_the_context(tiny):
    _, tokenizer, config = tiny
    assert read_calibration([str(HELDOUT)], tokenizer, config, 2, None).shape == (2, 512)


def test_group_sizes_must_divide_every_row(tiny, fake_llmcompressor):
    folder, _, config = tiny  # rows of 32 and 64 columns
    check_scheme(Scheme("gptq", 32), folder, config)
    check_scheme(Scheme("gptq", -1), folder, config)
    with pytest.raises(InputError, match=r"--group_size 64: .* 32, 64 columns; pass 32$"):
        check_scheme(Scheme("gptq", 64), folder, config)
    with pytest.raises(InputError, match="--group_size 0"):
        check_scheme(Scheme("gptq", 0), folder, config)


def test_group_sizes_where_only_a_whole_row_fits(tiny, fake_llmcompressor, monkeypatch):
    folder, _, config = tiny
    monkeypatch.setattr(quantization, "KERNEL_GROUPS", (128, 64))
    with pytest.raises(InputError, match=r"pass -1 \(one scale a row\)"):
        check_scheme(Scheme("gptq", 128), folder, config)


@pytest.mark.parametrize(
    ("method", "package", "remedy"),
    [
        ("bnb-4bit", "bitsandbytes", "pip install bitsandbytes"),
        ("fp8", "llmcompressor", r"pip install -r requirements-quantize\.txt"),
    ],
)
def test_a_missing_package_is_named(tiny, monkeypatch, method, package, remedy):
    folder, _, config = tiny
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"--method {method} needs the package {package}: {remedy}"):
        check_scheme(Scheme(method), folder, config)


def test_an_unknown_method_and_awq_without_a_gpu(tiny, fake_llmcompressor, monkeypatch):
    folder, _, config = tiny
    with pytest.raises(InputError, match="--method int3: need one of bnb-4bit, bnb-8bit, gptq, awq, fp8"):
        check_scheme(Scheme("int3"), folder, config)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(InputError, match="awq needs a GPU"):
        check_scheme(Scheme("awq", 32), folder, config)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    check_scheme(Scheme("awq", 32), folder, config)


def test_a_mixture_of_experts_is_refused(tiny):
    from transformers import MixtralConfig

    with pytest.raises(InputError, match=r"mixture of experts.*export_gguf"):
        check_scheme(Scheme("bnb-4bit"), tiny[0], MixtralConfig())


# ---------------------------------------------------------------- how llmcompressor is called


@pytest.fixture
def fake_llmcompressor(monkeypatch):
    """A stand-in with llmcompressor's API: modifiers that keep their settings, oneshot that keeps its arguments."""
    calls = []

    class Modifier:
        def __init__(self, **settings):
            self.settings = settings

    def oneshot(model, recipe, **data):
        calls.append({"recipe": recipe, **data})
        return model

    names = {
        "llmcompressor": {"oneshot": oneshot},
        "llmcompressor.modifiers": {},
        "llmcompressor.modifiers.gptq": {"GPTQModifier": type("GPTQModifier", (Modifier,), {})},
        "llmcompressor.modifiers.quantization": {
            "QuantizationModifier": type("QuantizationModifier", (Modifier,), {})
        },
        "llmcompressor.modifiers.transform": {},
        "llmcompressor.modifiers.transform.awq": {"AWQModifier": type("AWQModifier", (Modifier,), {})},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_gptq_is_asked_for_symmetric_groups_of_four_bits(tiny, fake_llmcompressor):
    folder, tokenizer, config = tiny
    calibration = read_calibration([str(HELDOUT)], tokenizer, config, 5, 32)
    model = quantization.quantize_model(folder, Scheme("gptq", 32), torch.bfloat16, calibration, tokenizer)
    assert model.dtype == torch.bfloat16 and not model.training
    (call,) = fake_llmcompressor
    (modifier,) = call["recipe"]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    assert type(modifier).__name__ == "GPTQModifier" and modifier.settings["ignore"] == ["lm_head"]
    assert modifier.settings["config_groups"] == {"group_0": {"targets": ["Linear"], "weights": weights}}
    assert (call["num_calibration_samples"], call["max_seq_length"], call["tokenizer"]) == (5, 32, tokenizer)
    batches = list(call["dataset"])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), calibration)
    assert all(batch["attention_mask"].shape == (1, 32) and batch["attention_mask"].all() for batch in batches)


def test_awq_scales_first_and_rounds_with_zero_points(fake_llmcompressor):
    awq, rounding = quantization.build_recipe(Scheme("awq", -1))
    assert (type(awq).__name__, type(rounding).__name__) == ("AWQModifier", "QuantizationModifier")
    weights = rounding.settings["config_groups"]["group_0"]["weights"]
    assert weights == {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"}


def test_fp8_needs_no_text(tiny, fake_llmcompressor):
    quantization.quantize_model(tiny[0], Scheme("fp8"), torch.float32)
    (call,) = fake_llmcompressor
    assert call.keys() == {"recipe"}
    assert call["recipe"][0].settings == {"targets": ["Linear"], "scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}


# ---------------------------------------------------------------- scores


def test_scored_text_covers_every_byte_once(tiny):
    _, tokenizer, config = tiny
    text = read_scored_text([str(HELDOUT)], tokenizer, config, window=24)
    lines = HELDOUT.read_text(encoding="utf-8").splitlines()
    assert text.num_bytes == sum(len(line.encode()) for line in lines)
    assert all(row[0] == 1 and 1 < len(row) <= 24 for row in text.rows)
    assert text.num_tokens == sum(len(tokenizer(line, add_special_tokens=False).input_ids) for line in lines)
    joined = [token for row in text.rows for token in row[1:]]
    assert joined == [i for line in lines for i in tokenizer(line, add_special_tokens=False).input_ids]


def test_scored_text_is_thinned_out_evenly(tiny):
    _, tokenizer, config = tiny
    everything = read_scored_text([str(HELDOUT)], tokenizer, config)
    some = read_scored_text([str(HELDOUT)], tokenizer, config, max_tokens=everything.num_tokens // 5)
    places = [everything.rows.index(row) for row in some.rows]
    assert some.num_tokens == pytest.approx(everything.num_tokens / 5, rel=0.15)
    assert places == sorted(set(places)) and places[-1] > 0.9 * len(everything.rows)


def test_text_without_a_bos_leaves_the_first_token_unscored(tiny):
    _, tokenizer, config = tiny
    tokenizer = load_tokenizer(tokenizer.name_or_path)
    tokenizer.bos_token = None
    text = read_scored_text([str(HELDOUT)], tokenizer, config)
    ids = tokenizer(HELDOUT.read_text(encoding="utf-8").splitlines()[0], add_special_tokens=False).input_ids
    assert text.rows[0] == ids


def test_windows_and_texts_that_do_not_fit(tiny, tmp_path):
    _, tokenizer, config = tiny
    with pytest.raises(InputError, match="--window 513: need 2 to 512"):
        read_scored_text([str(HELDOUT)], tokenizer, config, window=513)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputError, match="no text to score"):
        read_scored_text([str(tmp_path / "empty.txt")], tokenizer, config)


def plain_nll(model, rows) -> float:
    """One row at a time, from the whole distribution."""
    total = 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].double()
        chances = torch.softmax(logits, -1)
        total -= sum(math.log(chances[place, token]) for place, token in enumerate(row[1:]))
    return total


ROWS = [[1, 5, 9, 33, 120], [1, 7], [1, *range(40, 90)], [1, 399, 398, 4]]


def test_batches_of_padded_rows_score_as_rows_by_themselves(tiny, monkeypatch):
    from transformers import AutoModelForCausalLM

    expected = plain_nll(AutoModelForCausalLM.from_pretrained(tiny[0]).eval(), ROWS)
    for tokens in (1, 16, 10**6):
        model = AutoModelForCausalLM.from_pretrained(tiny[0]).eval()
        monkeypatch.setattr(formats, "BATCH_TOKENS", tokens)
        assert formats.model_nll(model, ROWS) == pytest.approx(expected, rel=1e-5)


class FakeLlama:
    """llama-cpp-python's API over a table of logits: those of a position depend on its token and its place."""

    def __init__(self, vocabulary: int = 400):
        self.table = np.random.default_rng(0).normal(size=(64, vocabulary)).astype(np.float32) * 3
        self.scores = np.full((64, vocabulary), np.nan, np.float32)
        self.n_tokens, self.evaluated, self.closed = 0, [], False

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        for token in tokens:
            self.scores[self.n_tokens] = np.roll(self.table[self.n_tokens], token)
            self.n_tokens += 1
        self.evaluated.append(list(tokens))

    def close(self):
        self.closed = True


def test_gguf_rows_are_scored_by_themselves():
    model = FakeLlama()
    expected = 0.0
    for row in ROWS:
        for place, (token, following) in enumerate(itertools.pairwise(row)):
            logits = np.roll(model.table[place], token).astype(np.float64)
            expected += math.log(np.exp(logits).sum()) - logits[following]
    assert formats.gguf_nll(model, ROWS) == pytest.approx(expected, rel=1e-6)


def test_time_is_taken_token_by_token_after_the_prompt():
    model = FakeLlama()
    assert formats.gguf_milliseconds(model, list(range(10))) > 0
    assert model.evaluated == [[0, 1, 2, 3, 4], [5], [6], [7], [8], [9]]


# ---------------------------------------------------------------- the table


def make_table(tiny, **changes) -> FormatTable:
    folder, tokenizer, config = tiny
    settings = {"text": ScoredText(ROWS, 100), "gguf_files": {}} | changes
    return FormatTable(folder, config, tokenizer, **settings)


def test_a_row_has_the_figures_of_its_definition(tiny):
    from transformers import AutoModelForCausalLM

    row = make_table(tiny).row("float32")
    model = AutoModelForCausalLM.from_pretrained(tiny[0]).eval()
    nll, scored = plain_nll(model, ROWS), sum(len(row) - 1 for row in ROWS)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert row["perplexity"] == pytest.approx(math.exp(nll / scored), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(nll / math.log(2) / 100, rel=1e-5)
    assert (row["size_gb"], row["bits_per_weight"]) == (4 * weights / 1e9, 32)
    assert row["ms_per_token"] > 0 and row["note"] == ""
    assert make_table(tiny).row("bfloat16")["size_gb"] == 2 * weights / 1e9


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit"])
def test_quantised_rows_measure_the_saved_folder(tiny, tmp_path, name):
    """Rows of 32 columns: narrower than bitsandbytes' packed form for AVX-512 can hold."""
    table = make_table(tiny, work=tmp_path)
    full, row = table.row("float32"), table.row(name)
    assert row["size_gb"] < 0.8 * full["size_gb"] and row["note"] == ""
    change = abs(row["perplexity"] / full["perplexity"] - 1)
    assert 1e-6 < change < 0.5
    assert not list(tmp_path.iterdir()), "the folder is deleted after measuring"


def test_rows_say_what_is_missing(tiny, tmp_path, monkeypatch):
    table = make_table(tiny)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in {"bnb-8bit": "bitsandbytes", "fp8": "llmcompressor", "q4_k_m": "llama-cpp-python"}.items():
        row = table.row(name)
        assert row["perplexity"] is None and package in row["note"] and "pip install" in row["note"]


def test_a_gguf_row_names_the_types_that_stand_in_for_its_own(tiny, tmp_path, monkeypatch):
    import gguf

    path = tmp_path / "model-Q4_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, width, kind in (("wide", 64, "Q4_0"), ("narrow", 48, "F16"), ("output", 64, "Q8_0")):
        values = np.ones((2, width), np.float32)
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("norm.weight", np.ones(48, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = FakeLlama()
    monkeypatch.setattr(formats, "open_model", lambda file, threads, context: contextlib.closing(model))
    monkeypatch.setattr(formats, "require_llama_cpp", lambda purpose: None)
    row = make_table(tiny, gguf_files={"q4_0": path}).row("q4_0")
    assert row["types"] == {"Q4_0": 1, "F16": 1, "Q8_0": 1, "F32": 1}
    assert row["note"] == "weights in another type, as their rows do not fill q4_0's blocks: 1"
    assert row["size_gb"] == path.stat().st_size / 1e9 and row["perplexity"] > 1 and model.closed


def rows_with(float32: float | None, f16: float | None) -> list[dict]:
    return [{"format": "float32", "perplexity": float32}, {"format": "f16", "perplexity": f16}]


def test_engines_that_disagree_are_refused():
    assert check_engines_agree(rows_with(10.0, 10.0005)) == pytest.approx(5e-5)
    assert check_engines_agree(rows_with(10.0, None)) is None and check_engines_agree([]) is None
    for f16 in (10.02, 9.98, math.nan):
        with pytest.raises(InputError, match="the GGUF file is another model"):
            check_engines_agree(rows_with(10.0, f16))


# ---------------------------------------------------------------- the report


TABLE = {
    "scored_tokens": 12345,
    "rows": [
        {"format": "float32", "size_gb": 0.0148, "bits_per_weight": 32.0, "perplexity": 4.0, "bits_per_byte": 0.9,
         "ms_per_token": 2.5, "note": ""},
        {"format": "bnb-4bit", "size_gb": 0.0054, "bits_per_weight": 9.1, "perplexity": 4.1, "bits_per_byte": 0.92,
         "ms_per_token": 5.25, "note": ""},
        {"format": "q4_0", "size_gb": 0.0021, "bits_per_weight": 4.6, "perplexity": 4.3, "bits_per_byte": 0.95,
         "ms_per_token": 1.0, "types": {"Q4_0": 26}, "note": ""},
        {"format": "q4_k_m", "size_gb": None, "bits_per_weight": None, "perplexity": None, "bits_per_byte": None,
         "ms_per_token": None, "note": "needs <llama> | pip"},
    ],
}  # fmt: skip


def test_the_report_shows_the_table(tmp_path):
    assert quantization_sections(tmp_path) == []
    (tmp_path / "quantization.json").write_text(json.dumps(TABLE), encoding="utf-8")
    (section,) = quantization_sections(tmp_path)
    page = Page(Text("页", "page"), [section], "footer")
    markdown = render_markdown(page)
    assert "| float32 | 14.80 | 32.00 | 4.000 | 0.00 % | 0.900 | 2.50 |" in markdown.replace("+0.00", "0.00")
    assert "| bnb-4bit | 5.40 | 9.10 | 4.100 | +2.50 % | 0.920 | 5.25 |" in markdown
    assert "| q4\\_k\\_m | — | — | — | — | — | — |" in markdown
    assert "12,345" in markdown and "&lt;llama&gt; \\| pip" in markdown
    html = render_html(page)
    assert html.count("<circle") == 3 and "needs &lt;llama&gt; | pip" in html


def test_a_table_without_figures_has_no_picture(tmp_path):
    table = {"scored_tokens": 0, "rows": TABLE["rows"][-1:]}
    (tmp_path / "quantization.json").write_text(json.dumps(table), encoding="utf-8")
    (section,) = quantization_sections(tmp_path)
    assert "<circle" not in render_html(Page(Text("页", "page"), [section], ""))


def test_a_scatter_chart_sets_labels_apart():
    close = {f"format-{rank}": (1.0 + 0.01 * rank, 5.0) for rank in range(6)}
    svg = scatter_chart({"one": close, "two": {"far": (9.0, 50.0)}}, "MB", "perplexity")
    root = ElementTree.fromstring(svg)
    labels = {node.text: node for node in root.iter("{http://www.w3.org/2000/svg}text") if node.text}
    boxes = []
    for name in [*close, "far"]:
        left, baseline = float(labels[name].get("x")), float(labels[name].get("y"))
        assert left >= 0 and left + 6.5 * len(name) <= WIDTH and 0 < baseline < HEIGHT
        boxes.append((left, left + 6.5 * len(name), baseline))
    for index, (left, right, line) in enumerate(boxes):
        for other_left, other_right, other_line in boxes[:index]:
            assert right < other_left or other_right < left or abs(line - other_line) >= 12
    with pytest.raises(ValueError, match="finite"):
        scatter_chart({"one": {"bad": (math.nan, 1.0)}}, "x", "y")
    with pytest.raises(ValueError, match="finite"):
        scatter_chart({}, "x", "y")
