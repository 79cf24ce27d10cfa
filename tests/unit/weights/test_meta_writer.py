"""meta_writer: what torch and zip tools make of the files, params.json of the published models, refusals."""

import json
import logging
import os
import random
import shutil
import subprocess
import zipfile

import pytest
import torch

from support import meta_model
from utils.core.errors import InputError
from utils.core.files import hash_file
from utils.weights.meta_reader import open_meta_checkpoint
from utils.weights.meta_writer import ffn_settings, plan_meta_checkpoint, write_meta_checkpoint
from utils.weights.reader import TensorSpec

SIZES = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 21, "rms_norm_eps": 1e-5}
LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 8192}


def make_config(**changes):
    return {"model_type": "llama", "tie_word_embeddings": False, **SIZES, **changes}


def make_model(tmp_path, dtype=torch.float32, **changes):
    """{Hugging Face name: tensor}, by way of a Meta checkpoint."""
    params = meta_model.make_params(dim=32, n_heads=4, n_kv_heads=2, **changes)
    weights = meta_model.make_weights(params, 21, dtype)
    folder = meta_model.save(tmp_path / "source", params, [weights])
    with open_meta_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}, weights


def specs_of(model):
    return [TensorSpec(name, weight.dtype, tuple(weight.shape)) for name, weight in model.items()]


def stream_of(model, rows=5):
    def stream(specs):
        for spec in specs:
            for start in range(0, spec.shape[0], rows):
                yield spec, model[spec.name][start : start + rows]

    return stream


def write(tmp_path, model, config=None, num_parts=None, **changes):
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    hashes = write_meta_checkpoint(
        folder, config or make_config(**changes), specs_of(model), stream_of(model), num_parts
    )
    return folder, hashes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_is_a_sound_zip_that_torch_reads_in_every_way(tmp_path, dtype):
    model, weights = make_model(tmp_path, dtype)
    folder, hashes = write(tmp_path, model)
    file = folder / "consolidated.00.pth"
    assert hashes == {file.name: {"sha256": hash_file(file)}}
    for how in ({}, {"mmap": True}, {"map_location": "meta"}):
        loaded = torch.load(file, weights_only=True, **how)
        assert list(loaded) == list(weights)
        for name, weight in weights.items():
            tensor = loaded[name]
            assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (weight.dtype, weight.shape, True)
            assert tensor.untyped_storage().nbytes() == weight.nbytes  # no tensor holds on to others
            assert "map_location" in how or torch.equal(tensor, weight)
    offsets = [t.untyped_storage()._checkpoint_offset for t in torch.load(file, map_location="meta").values()]
    assert all(offset % 64 == 0 for offset in offsets)
    assert offsets == sorted(offsets)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        theirs = tmp_path / "consolidated.00.pth"
        torch.save(weights, theirs)
        with zipfile.ZipFile(theirs) as other:
            assert set(archive.namelist()) <= set(other.namelist())
            records = [name for name in archive.namelist() if "/data/" in name or name.endswith("/byteorder")]
            assert len(records) == len(weights) + 1
            assert all(archive.read(name) == other.read(name) for name in records)
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", file], check=True)


def test_a_flipped_bit_is_noticed_by_zip_tools(tmp_path):
    model, _ = make_model(tmp_path)
    folder, _ = write(tmp_path, model)
    file = folder / "consolidated.00.pth"
    data = bytearray(file.read_bytes())
    data[torch.load(file, map_location="meta")["norm.weight"].untyped_storage()._checkpoint_offset] ^= 1
    file.write_bytes(data)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() == "consolidated.00/data/1"


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model, _ = make_model(tmp_path)
    assert write(tmp_path, model, num_parts=2)[1] == write(tmp_path, model, num_parts=2)[1]


@pytest.mark.parametrize("rows", [1, 3, 8, 1000])
def test_any_row_blocks_will_do(tmp_path, rows):
    model, weights = make_model(tmp_path)
    (tmp_path / "out").mkdir()
    write_meta_checkpoint(tmp_path / "out", make_config(), specs_of(model), stream_of(model, rows), 2)
    for part, state in enumerate(meta_model.cut(weights, 2)):
        loaded = torch.load(tmp_path / "out" / f"consolidated.{part:02d}.pth")
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_tensors_stand_in_the_order_they_are_given(tmp_path):
    model, weights = make_model(tmp_path)
    folder, _ = write(tmp_path, dict(reversed(model.items())))
    assert list(torch.load(folder / "consolidated.00.pth")) == list(reversed(weights))


def test_a_tied_head_is_written_out(tmp_path, caplog):
    model, weights = make_model(tmp_path)
    del model["lm_head.weight"]
    with pytest.raises(InputError, match=r"lacks 1 tensors that its config needs, first lm_head\.weight"):
        write(tmp_path, model)
    with caplog.at_level(logging.INFO):
        folder, _ = write(tmp_path, model, tie_word_embeddings=True, num_parts=2)
    assert "lm_head is tied to embed_tokens: output.weight is written as its copy" in caplog.text
    parts = [torch.load(folder / f"consolidated.0{part}.pth") for part in range(2)]
    for name, dim in (("tok_embeddings.weight", 1), ("output.weight", 0)):
        joined = torch.cat([part[name] for part in parts], dim=dim)
        assert torch.equal(joined, weights["tok_embeddings.weight"])


def test_old_buffers_are_left_out(tmp_path, caplog):
    model, _ = make_model(tmp_path)
    model["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    with caplog.at_level(logging.INFO):
        folder, _ = write(tmp_path, model)
    assert "1 tensors rotary_emb.inv_freq are left out" in caplog.text
    assert len(torch.load(folder / "consolidated.00.pth")) == 21


def test_an_error_in_the_middle_passes_through(tmp_path):
    model, _ = make_model(tmp_path)

    def stream(specs):
        for number, pair in enumerate(stream_of(model)(specs)):
            if number == 9:
                raise InputError("NaN here")
            yield pair

    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="NaN here"):
        write_meta_checkpoint(tmp_path / "out", make_config(), specs_of(model), stream, 2)
    with pytest.raises((RuntimeError, EOFError, OSError, zipfile.BadZipFile)):
        for part in range(2):
            state = torch.load(tmp_path / "out" / f"consolidated.0{part}.pth")
            assert len(state) == 21


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_is_named(tmp_path, full):
    model, _ = make_model(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"consolidated.0{full}.pth").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: .*consolidated\.0{full}\.pth"):
        write_meta_checkpoint(tmp_path / "out", make_config(), specs_of(model), stream_of(model), 2)


# ---------------------------------------------------------------- params.json


def params_of(**changes):
    config = make_config(**changes)
    shapes = shapes_of(config)
    return plan_meta_checkpoint(config, [TensorSpec(name, torch.float16, shape) for name, shape in shapes.items()])


def shapes_of(config):
    """Shapes by transformers' own model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


# As Meta publishes them: (config.json, params.json, parts)
PUBLISHED = {
    "1.3B": (
        {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 4},
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 4, "norm_eps": 1e-05, "vocab_size": -1},
        1,
    ),
    "7B": (
        {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1},
        1,
    ),
    "13B": (
        {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40},
        {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05, "vocab_size": -1},
        2,
    ),
    "33B": (
        {"hidden_size": 6656, "intermediate_size": 17920, "num_attention_heads": 52, "num_hidden_layers": 60},
        {"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-05, "vocab_size": -1},
        4,
    ),
    "65B": (
        {"hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64, "num_hidden_layers": 80},
        {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
        8,
    ),
    "70B": (
        {
            **{"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
            "num_key_value_heads": 8,
        },
        {
            **{"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8},
            **{"n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
        },
        8,
    ),
    "3-8B": (
        {
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
            **{"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
        },
        {
            **{"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256},
            **{"multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0},
        },
        1,
    ),
    "3.2-1B": (
        {
            **{"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16},
            **{"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
            "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
        },
        {
            **{"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256},
            **{"multiple_of": 256, "ffn_dim_multiplier": 1.5, "norm_eps": 1e-05, "rope_theta": 500000.0},
            "use_scaled_rope": True,
        },
        1,
    ),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_params_of_the_published_models(size):
    config, params, parts = PUBLISHED[size]
    config = {"num_key_value_heads": config["num_attention_heads"], "vocab_size": 32000} | config
    plan = params_of(**config)
    assert plan.params == params
    assert plan.num_parts == parts


def test_other_scaling_factors_are_written_down():
    rope = {"rope_theta": 500000.0, **LLAMA3_ROPE, "factor": 8.0}
    assert params_of(rope_parameters=rope).params["rope_scaling_factor"] == 8.0


def test_ffn_settings_give_the_size_by_metas_formula():
    sizes = random.Random(0)
    for _ in range(2000):
        dim = 2 * sizes.randint(4, 10_000)
        ffn = sizes.randint(1, 8 * dim) * sizes.choice((1, 1, 2, 64))
        settings = ffn_settings(dim, ffn)
        assert meta_model.ffn_size({"dim": dim} | json.loads(json.dumps(settings))) == ffn


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, r"--output_type pth holds Llama models only, this is a mixtral model; use"),
        ({"model_type": "qwen2"}, r"this is a qwen2 model"),
        ({"model_type": "mistral", "sliding_window": 4096}, r"this is a mistral model with sliding_window 4096"),
        ({"attention_bias": True, "mlp_bias": True}, r"cannot hold a model with attention_bias, mlp_bias"),
        ({"hidden_act": "gelu", "head_dim": 16}, r"cannot hold a model with hidden_act gelu, head_dim 16"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, r"scaled by rope_type linear \(.*factor 4.0"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": 8.0, "low_freq_factor": 2.0}}, r"rope_type llama3 \(.*factor 2.0"),
    ],
)
def test_models_the_layout_cannot_hold(changes, message):
    with pytest.raises(InputError, match=message):
        plan_meta_checkpoint(make_config(**changes), [])


def test_mistral_without_a_window_is_a_llama(tmp_path):
    model, weights = make_model(tmp_path)
    folder, _ = write(tmp_path, model, model_type="mistral", sliding_window=None)
    loaded = torch.load(folder / "consolidated.00.pth")
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(("parts", "count"), [(3, "num_attention_heads 4, num_key_value_heads 2"), (4, "num_key")])
def test_parts_that_would_cut_heads(parts, count):
    with pytest.raises(
        InputError, match=rf"cannot write {parts} parts, among which {count}.*; pass another --num_parts"
    ):
        plan_meta_checkpoint(make_config(), [], parts)
    with pytest.raises(InputError, match="cannot write 0 parts: need at least 1"):
        plan_meta_checkpoint(make_config(), [], 0)


def test_tensors_that_do_not_fit_the_config(tmp_path):
    model, _ = make_model(tmp_path)
    with pytest.raises(InputError, match=r"embed_tokens\.weight is \[21, 32\], but config\.json needs \[22, 32\]"):
        write(tmp_path, model, vocab_size=22)
    with pytest.raises(InputError, match=r"no place for 9 tensors of this model, first model\.layers\.1\."):
        write(tmp_path, model, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"lacks 9 tensors that its config needs, first model\.layers\.2\."):
        write(tmp_path, model, num_hidden_layers=3)
    assert not any((tmp_path / "out").iterdir())
    model["model.norm.weight"] = model["model.norm.weight"].double()
    with pytest.raises(InputError, match=r"model\.norm\.weight is float64; .*pass one as --dtype"):
        write(tmp_path, model)
