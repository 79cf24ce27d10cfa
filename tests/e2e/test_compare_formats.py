"""compare_formats.py: the table of formats, of a model that has learnt something."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import compare_formats
import pytest

from support.learned_model import HELDOUT, save_learned_llama
from support.paths import ROOT
from utils.core.errors import InputError

SCRIPT = Path(compare_formats.__file__)


@pytest.fixture(scope="module")
def base(tmp_path_factory, base_tokenizer_folder) -> Path:
    return save_learned_llama(tmp_path_factory.mktemp("formats") / "base", base_tokenizer_folder)


def table_arguments(base: Path, folder: Path, **settings):
    settings = {"max_tokens": 1500, "window": 64} | settings
    output, plot = str(folder / "table.json"), str(folder / "table.png")
    return compare_formats.FormatArguments(str(base), [str(HELDOUT)], output=output, plot=plot, **settings)


@pytest.mark.slow
def test_the_table_of_formats(base, tmp_path, monkeypatch, capsys):
    """GGUF files are written by this process here; the slow test below runs the command as the demo does."""
    pytest.importorskip("llama_cpp")
    from utils.gguf import llamacpp
    from utils.gguf.file import plan_gguf, write_gguf
    from utils.lora.inputs import open_merge

    with open_merge(str(base)) as inputs:
        plan = plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "base")
        files = {name: tmp_path / f"{name}.gguf" for name in ("f16", "q8_0", "q4_0", "q4_k_m")}
        for name in ("f16", "q8_0", "q4_0"):
            write_gguf(plan, inputs.model, name.upper(), files[name])
        llamacpp.quantize(files["f16"], files["q4_k_m"], "Q4_K_M", None, 1)
    monkeypatch.setattr(compare_formats, "make_gguf_files", lambda *_: contextlib.nullcontext(files))
    formats = ["float32", "bfloat16", "bnb-8bit", "bnb-4bit", "fp8", "f16", "q8_0", "q4_0", "q4_k_m", "q6_k"]
    result = compare_formats.main(table_arguments(base, tmp_path, formats=formats))
    rows = {row["format"]: row for row in result["rows"]}
    assert list(rows) == formats and json.loads((tmp_path / "table.json").read_text("utf-8")) == result
    assert 0 <= result["f16_difference"] < 1e-4
    full = rows["float32"]["perplexity"]
    for name in ("bfloat16", "bnb-8bit", "bnb-4bit", "f16", "q8_0", "q4_0", "q4_k_m"):
        assert 0 < abs(rows[name]["perplexity"] / full - 1) < 0.05, name
        assert rows[name]["ms_per_token"] > 0 and rows[name]["size_gb"] < rows["float32"]["size_gb"]
    ratio = rows["q4_0"]["bits_per_byte"] / rows["float32"]["bits_per_byte"]
    assert ratio == pytest.approx(math.log(rows["q4_0"]["perplexity"]) / math.log(full), rel=1e-6)
    # Rows of 128 and 192 weights: no K-quant fits, and the table says what the file has instead.
    assert not any(kind.endswith("_K") for kind in rows["q4_k_m"]["types"])
    assert "weights in another type" in rows["q4_k_m"]["note"] and rows["q4_0"]["note"] == ""
    assert rows["q6_k"]["perplexity"] is None and "was made" in rows["q6_k"]["note"]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"| float32 | {rows['float32']['size_gb']:.4g} | 32.00 | {full:.4f} | +0.00 % |" in printed
    assert "differ by 0.00" in printed


def test_bad_input_of_the_table(base, tmp_path):
    with pytest.raises(InputError, match="--formats q9: need some of float32"):
        compare_formats.main(table_arguments(base, tmp_path, formats=["q9"]))
    with pytest.raises(InputError, match="pass --base_model and --texts"):
        compare_formats.FormatArguments(str(base))
    assert not (tmp_path / "table.json").exists()


@pytest.mark.slow
def test_the_table_as_the_demo_makes_it(base, tmp_path):
    command = [sys.executable, str(SCRIPT), "--model", str(base)]
    command += ["--texts", str(HELDOUT), "--max_tokens", "1500", "--window", "64"]
    command += ["--output", str(tmp_path / "table.json"), "--formats", "float32", "f16", "q8_0", "q4_0"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    rows = json.loads((tmp_path / "table.json").read_text("utf-8"))["rows"]
    assert [row["format"] for row in rows] == ["float32", "f16", "q8_0", "q4_0"]
    assert all(row["size_gb"] for row in rows) and {path.name for path in tmp_path.iterdir()} == {"table.json"}


@pytest.mark.slow
def test_the_benchmark_records_the_table(base, tmp_path, monkeypatch, capfd):
    """benchmarks/quantization.py takes the script's flags; here into another file than RESULTS.md."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quantization
    import record

    results = tmp_path / "RESULTS.md"
    monkeypatch.setattr(quantization, "record", lambda section, text: record.record(section, text, results))
    flags = ["--model", str(base), "--texts", str(HELDOUT), "--max_tokens", "300"]
    flags += ["--window", "64", "--formats", "float32"]
    monkeypatch.setattr(sys, "argv", ["quantization.py", *flags])
    quantization.main()
    text = results.read_text(encoding="utf-8")
    assert "## Storage formats of base" in text and "`python benchmarks/quantization.py --model" in text
    assert "| float32 | " in text and "| float32 | " in capfd.readouterr().out
