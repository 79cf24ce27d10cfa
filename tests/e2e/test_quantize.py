"""quantize.py: what it saves against bitsandbytes called directly, and against the model it was made from.

llmcompressor's methods run for real where it is installed (requirements-quantize.txt).
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import quantize
import torch
from safetensors.torch import load_file, save_file

from support.learned_model import GREEDY, HELDOUT, TEMPLATE, TRAIN, save_learned_llama
from utils.core.errors import InputError
from utils.evaluation.formats import model_nll, read_scored_text
from utils.models import quantization
from utils.models.quantization import Scheme
from utils.text.tokenizer import load_tokenizer
from utils.weights.config import load_config

SCRIPT = Path(quantize.__file__)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, base_tokenizer_folder) -> Path:
    return save_learned_llama(tmp_path_factory.mktemp("quantize") / "base", base_tokenizer_folder)


def run_quantize(base: Path, out: Path, method: str, **settings) -> dict:
    return quantize.main(quantize.QuantizeArguments(str(base), str(out), method, **settings))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    torch.manual_seed(1)
    return model.eval()(input_ids=torch.randint(3, 400, (3, 40))).logits.float()


def perplexity(model, folder: Path) -> float:
    text = read_scored_text([str(HELDOUT)], load_tokenizer(folder), load_config(str(folder)), 64, 3000)
    return math.exp(model_nll(model, text.rows) / text.num_tokens)


def load(folder: Path, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def check_close_to_base(base: Path, out: Path, most: float) -> None:
    """A change there is, or nothing was quantised; but a small one, where a model that knows nothing has 400."""
    before, after = perplexity(load(base), base), perplexity(load(out), out)
    assert before < 100
    assert 1e-6 < abs(after / before - 1) < most


def quantise_on_load(base: Path, method: str, dtype: torch.dtype = torch.float32, **settings):
    from transformers import BitsAndBytesConfig

    if method == "bnb-8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | settings
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **settings)
    return load(base, dtype=dtype, quantization_config=config, device_map={"": "cpu"})


# ---------------------------------------------------------------- bitsandbytes


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bnb-4bit", "bnb-8bit"])
def test_a_saved_folder_answers_as_quantising_on_load(base, tmp_path, method):
    report = run_quantize(base, tmp_path / "out", method)
    assert torch.equal(logits_of(load(tmp_path / "out")), logits_of(quantise_on_load(base, method)))
    check_close_to_base(base, tmp_path / "out", 0.03)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "quantization_report.json"),
        *("run_config.yaml", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
        "chat_template.jinja",
    }
    assert report == json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert (report["weights"], report["quantised_weights"], report["reload_difference"]) == (21, 14, 0.0)
    saved = sum(weight.nbytes for weight in load_file(tmp_path / "out" / "model.safetensors").values())
    assert report["size_gb"] == pytest.approx(saved / 1e9, abs=1e-6)
    assert report["size_gb"] < (0.5 if method == "bnb-4bit" else 0.6) * report["size_gb_before"]
    assert method in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("fp4", False)])
def test_four_bit_weights_are_stored_as_bitsandbytes_lays_them_out(base, tmp_path, quant_type, double_quant):
    """Not in the order that a CPU with AVX-512 packs them into: a GPU could not read that."""
    from bitsandbytes.functional import quantize_4bit

    run_quantize(base, tmp_path / "out", "bnb-4bit", quant_type=quant_type, double_quant=double_quant)
    stored, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    quantised = [name for name in original if any(part in name for part in LINEAR)]
    assert len(quantised) == 14
    for name in quantised:
        packed, state = quantize_4bit(original[name], quant_type=quant_type, compress_statistics=double_quant)
        assert torch.equal(stored[name], packed), name
        assert torch.equal(stored[f"{name}.absmax"], state.absmax), name
        assert f"{name}.quant_state.bitsandbytes__{quant_type}" in stored
    for name in original.keys() - set(quantised):
        assert torch.equal(stored[name], original[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == (quant_type, double_quant)


def test_what_is_not_quantised_takes_the_type_asked_for(base, tmp_path):
    report = run_quantize(base, tmp_path / "out", "bnb-4bit", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert report["dtype"] == "bfloat16" and stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert torch.equal(
        logits_of(load(tmp_path / "out")), logits_of(quantise_on_load(base, "bnb-4bit", torch.bfloat16))
    )


def test_the_tokenizer_its_template_and_generation_settings_come_along(base, tmp_path):
    run_quantize(base, tmp_path / "out", "bnb-8bit")
    old, new = load_tokenizer(base), load_tokenizer(tmp_path / "out")
    assert new.chat_template == TEMPLATE
    text = "the cat 猫 <s> 🙂"
    assert new(text).input_ids == old(text).input_ids
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GREEDY


def test_tied_embeddings_and_shards(base, tmp_path):
    tied = Path(shutil.copytree(base, tmp_path / "tied"))
    weights = load_file(base / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    run_quantize(tied, tmp_path / "out", "bnb-4bit", max_shard_size="150KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits_of(load(tmp_path / "out")), logits_of(quantise_on_load(tied, "bnb-4bit")))


@pytest.mark.parametrize("method", ["bnb-4bit", "bnb-8bit"])
def test_inference_loads_the_quantised_folder(tiny_model_folder, tmp_path, method):
    """Its weights are narrower than what bitsandbytes packs for AVX-512; that must be noticed without being told."""
    from inference_hf import TaskArguments, main

    from utils.core.arguments import GenerationArguments, InferenceArguments

    run_quantize(tiny_model_folder, tmp_path / "out", method)
    greedy = GenerationArguments(max_new_tokens=8, do_sample=False, repetition_penalty=1.0)
    task = TaskArguments(prompt="The cat", predictions_file=str(tmp_path / "answer.json"))
    main(InferenceArguments(str(tmp_path / "out"), only_cpu=True), greedy, task)
    answer = json.loads((tmp_path / "answer.json").read_text())[0]["Output"]
    tokenizer = load_tokenizer(tiny_model_folder)
    ids = torch.tensor([tokenizer("The cat").input_ids])
    expected = quantization.load_quantized(tmp_path / "out").generate(ids, max_new_tokens=8, do_sample=False)
    # Decoded whole: a piece that begins with a space loses it where it is the first.
    assert answer.split() == tokenizer.decode(expected[0], skip_special_tokens=True).split()


# ---------------------------------------------------------------- llmcompressor, where it is installed


CALIBRATION = {"calibration_data": [str(TRAIN)], "num_calibration_samples": 48, "calibration_length": 64}


@pytest.mark.parametrize(
    ("method", "settings", "stored", "most"),
    [
        ("gptq", {"group_size": 64}, torch.int32, 0.03),
        ("gptq", {"group_size": -1, "dtype": "bfloat16"}, torch.int32, 0.05),
        ("fp8", {}, torch.float8_e4m3fn, 0.01),
    ],
)
def test_llmcompressor_really_quantises(base, tmp_path, method, settings, stored, most):
    pytest.importorskip("llmcompressor")
    if method == "gptq":
        settings = settings | CALIBRATION
    report = run_quantize(base, tmp_path / "out", method, **settings)
    assert report["quantised_weights"] == 14
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(weight.dtype == stored for weight in weights.values()) == 14
    assert weights["lm_head.weight"].dtype == weights["model.embed_tokens.weight"].dtype
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["ignore"]) == ("compressed-tensors", ["lm_head"])
    check_close_to_base(base, tmp_path / "out", most)


def test_gptq_is_closer_to_the_base_than_rounding_each_weight_by_itself(base, tmp_path):
    """The proof that calibration does something: the same groups of four bits, rounded to the nearest."""
    pytest.importorskip("llmcompressor")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    run_quantize(base, tmp_path / "gptq", "gptq", group_size=64, **CALIBRATION)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rounded = oneshot(model=load(base), recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    text = read_scored_text([str(HELDOUT)], load_tokenizer(base), load_config(str(base)), 64, 3000)
    original = load(base)

    def distance(model) -> float:
        rows = [torch.tensor([row]) for row in text.rows]
        with torch.no_grad():
            return sum(float((model(row).logits - original(row).logits).square().sum()) for row in rows)

    assert distance(load(tmp_path / "gptq")) < 0.8 * distance(rounded)


def test_awq_really_quantises(base, tmp_path, monkeypatch):
    """On a CPU only what pins memory for a GPU is replaced; quantize.py refuses AWQ there."""
    pytest.importorskip("llmcompressor")
    if not torch.accelerator.is_available():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    config, tokenizer = load_config(str(base)), load_tokenizer(base)
    quantization.check_scheme(Scheme("awq", 64), base, config)
    monkeypatch.undo()
    if not torch.accelerator.is_available():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    rows = quantization.read_calibration([str(TRAIN)], tokenizer, config, 48, 64)
    model = quantization.quantize_model(base, Scheme("awq", 64), torch.float32, rows, tokenizer)
    quantization.save_weights(model, tmp_path / "out")
    before = quantization.check_logits(model, tokenizer)
    assert quantization.compare_reloaded(tmp_path / "out", before, tokenizer) < 1e-3
    shutil.copytree(base, tmp_path / "files", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shutil.copytree(tmp_path / "files", tmp_path / "out", dirs_exist_ok=True)
    check_close_to_base(base, tmp_path / "out", 0.03)
    assert any("zero_point" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


# ---------------------------------------------------------------- what must not be published


def test_a_folder_that_answers_otherwise_is_not_published(base, tmp_path, monkeypatch):
    load_quantized = quantization.load_quantized

    def load_damaged(folder):
        model = load_quantized(folder)
        with torch.no_grad():
            model.model.norm.weight[3] += 0.05
        return model

    monkeypatch.setattr(quantization, "load_quantized", load_damaged)
    with pytest.raises(InputError, match="answers otherwise than the quantised one in memory"):
        run_quantize(base, tmp_path / "out", "bnb-4bit")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_numbers_are_not_published(base, tmp_path):
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][5] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="hold NaN or infinity"):
        run_quantize(broken, tmp_path / "out", "bnb-8bit")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_weights(monkeypatch):
    """Bad input is found before weights are read."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(quantization, "load_model", refuse)


def test_bad_bases_are_named(base, tmp_path, no_weights):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter, not a model; merge it into its base first"):
        run_quantize(adapter, tmp_path / "out", "bnb-4bit")
    with pytest.raises(InputError, match="folder not found"):
        run_quantize(tmp_path / "nowhere", tmp_path / "out", "bnb-4bit")
    quantised = Path(shutil.copytree(base, tmp_path / "quantised"))
    config = json.loads((base / "config.json").read_text())
    for content in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4}):
        (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": content}))
        with pytest.raises(InputError, match="is a quantised model; pass the full-precision model"):
            run_quantize(quantised, tmp_path / "out", "bnb-4bit")
    (quantised / "config.json").write_text(json.dumps(config))
    os.truncate(quantised / "model.safetensors", 5000)
    with pytest.raises(InputError, match="is truncated"):
        run_quantize(quantised, tmp_path / "out", "bnb-4bit")
    bare = Path(shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    with pytest.raises(InputError, match="has no tokenizer"):
        run_quantize(bare, tmp_path / "out", "bnb-4bit")
    with pytest.raises(InputError, match="--base_model"):
        quantize.QuantizeArguments()
    assert not (tmp_path / "out").exists()


def test_bad_settings_are_named(base, tmp_path, no_weights, monkeypatch):
    with pytest.raises(InputError, match="gptq needs text to calibrate on: pass --calibration_data"):
        run_quantize(base, tmp_path / "out", "gptq")
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: object())
    few = tmp_path / "few.txt"
    few.write_text("the cat\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds 0 windows of 256 tokens, need 128"):
        run_quantize(base, tmp_path / "out", "gptq", calibration_data=[str(few)], group_size=64)
    with pytest.raises(InputError, match=r"--group_size 128: .* 128, 192 columns; pass 64"):
        run_quantize(base, tmp_path / "out", "gptq", calibration_data=[str(few)])
    with pytest.raises(InputError, match="'5 gigs' is no size"):
        run_quantize(base, tmp_path / "out", "bnb-4bit", max_shard_size="5 gigs")
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="fp8 needs the package llmcompressor: pip install -r requirements-quantize"):
        run_quantize(base, tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists()


def test_output_is_never_overwritten_unasked_and_never_touches_the_base(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        run_quantize(base, out, "bnb-8bit")
    assert (out / "keep.txt").read_text() == "precious"
    for inside in (base, base / "sub"):
        with pytest.raises(InputError, match=r"overlap|not empty"):
            run_quantize(base, inside, "bnb-8bit", overwrite=inside == base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    run_quantize(base, out, "bnb-8bit", overwrite=True)
    assert not (out / "keep.txt").exists()
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.slow
def test_command_line(base, tmp_path):
    command = [sys.executable, str(SCRIPT), "--base_model", str(base), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "14 of 21 weights quantised" in done.stderr and "run_inference.sh" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "Traceback" not in again.stderr and "is not empty" in again.stderr
    unknown = subprocess.run([*command, "--method", "int3"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and "bnb-4bit" in unknown.stderr
