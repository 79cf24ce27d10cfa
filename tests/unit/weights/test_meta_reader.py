"""utils.weights.meta_reader: what params.json and shapes mean, every way files are stored, damage named."""

import json
import pickle
import shutil

import pytest
import torch

from support import meta_model
from utils.core.errors import InputError
from utils.weights.meta_reader import (
    is_meta_folder,
    meta_config,
    open_meta_checkpoint,
    to_huggingface_rows,
    to_meta_rows,
)
from utils.weights.streams import FileHasher

VOCAB = 21


def make(folder, parts=2, dtype=torch.float32, embedding_dim=1, extra=None, **changes):
    params = meta_model.make_params(dim=32, n_heads=4, n_layers=1, **changes)
    weights = meta_model.make_weights(params, VOCAB, dtype)
    states = meta_model.cut(weights, parts, embedding_dim)
    for state in states:
        state.update(extra or {})
    return meta_model.save(folder, params, states), weights


def edit(folder, number=0, **changes):
    """Change tensors of a part; None removes one."""
    file = folder / f"consolidated.{number:02d}.pth"
    state = torch.load(file) | changes
    torch.save({name: value for name, value in state.items() if value is not None}, file)


def edit_params(folder, **changes):
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps(params))


def test_rotary_order_by_hand():
    rows = torch.arange(12).view(12, 1)  # two heads of six rows
    halves = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert to_huggingface_rows(rows, 6).flatten().tolist() == halves
    assert torch.equal(to_meta_rows(to_huggingface_rows(rows, 6), 6), rows)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_any_rows_of_the_joined_tensors(tmp_path, parts, embedding_dim):
    folder, weights = make(tmp_path / "m", parts, embedding_dim=embedding_dim)
    with open_meta_checkpoint(folder) as checkpoint:
        names = {weight.meta: weight.name for weight in checkpoint._weights.values()}
        assert names.keys() == weights.keys()
        for meta, whole in weights.items():
            if meta.endswith(("wq.weight", "wk.weight")):
                whole = torch.cat([head[order] for head in whole.split(8) for order in ([0, 2, 4, 6], [1, 3, 5, 7])])
            name, rows = names[meta], len(whole)
            assert checkpoint.shapes[name] == tuple(whole.shape)
            assert torch.equal(checkpoint.read(name), whole)
            for start, stop in ((0, rows), (3, 13), (rows - 5, rows), (7, 7), (rows, rows)):
                assert torch.equal(checkpoint.read_rows(name, start, stop), whole[start:stop])
                assert torch.equal(checkpoint.scan_rows(name, start, stop), whole[start:stop])


def test_input_files_are_hashed_as_they_are_read(tmp_path):
    import hashlib

    folder, _ = make(tmp_path / "m", 2)
    hasher = FileHasher()
    with open_meta_checkpoint(folder) as checkpoint:
        assert [file.name for file in checkpoint.files] == ["consolidated.00.pth", "consolidated.01.pth"]
        for name, shape in checkpoint.shapes.items():
            for start in range(0, shape[0], 5):
                checkpoint.scan_rows(name, start, min(start + 5, shape[0]), hasher)
        for file in checkpoint.files:
            assert hasher.finish(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_tensors_come_in_the_order_of_the_file(tmp_path):
    folder, weights = make(tmp_path / "m", 1)
    torch.save(dict(reversed(weights.items())), folder / "consolidated.00.pth")
    with open_meta_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors)[-2:] == ["model.norm.weight", "model.embed_tokens.weight"]


@pytest.mark.parametrize("kind", ["views", "legacy", "strided"])
def test_other_ways_of_storing(tmp_path, kind):
    """Meta's sharded files hold views of one storage; torch before 1.6 wrote no zip; a tensor may be transposed."""
    folder, weights = make(tmp_path / "m", 1)
    if kind == "views":
        flat = torch.cat([weight.flatten() for weight in weights.values()])
        pieces = flat.split([weight.numel() for weight in weights.values()])
        state = {name: piece.view(weights[name].shape) for name, piece in zip(weights, pieces, strict=True)}
    elif kind == "strided":
        state = {name: weight.t().contiguous().t() for name, weight in weights.items()}
    else:
        state = weights
    torch.save(state, folder / "consolidated.00.pth", _use_new_zipfile_serialization=kind != "legacy")
    with open_meta_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.read("model.embed_tokens.weight"), weights["tok_embeddings.weight"])
        w2 = weights["layers.0.feed_forward.w2.weight"]
        assert torch.equal(checkpoint.read_rows("model.layers.0.mlp.down_proj.weight", 3, 9), w2[3:9])


def test_frequencies_are_left_out(tmp_path):
    freqs = {"rope.freqs": torch.ones(4), "layers.0.attention.inner_attention.rope.freqs": torch.ones(4)}
    folder, _ = make(tmp_path / "m", extra=freqs)
    assert len(open_meta_checkpoint(folder).tensors) == 12


def test_what_is_a_meta_folder(tmp_path):
    folder, _ = make(tmp_path / "m")
    assert is_meta_folder(folder)
    (folder / "config.json").write_text("{}")  # a Hugging Face folder that carries Meta's files along
    assert not is_meta_folder(folder)
    assert not is_meta_folder(tmp_path)
    assert not is_meta_folder(tmp_path / "absent")


# ---------------------------------------------------------------- config


def test_config_is_read_by_transformers(tmp_path, caplog):
    from transformers import AutoConfig

    folder, _ = make(tmp_path / "m", dtype=torch.bfloat16, n_kv_heads=2, norm_eps=1e-5)
    with caplog.at_level("INFO"):
        config = meta_config(folder)
    assert "is read as Llama 2 by its rope_theta, norm_eps and sizes: max_position_embeddings 4096" in caplog.text
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoConfig.from_pretrained(tmp_path)
    assert type(model).__name__ == "LlamaConfig"
    assert model.dtype == torch.bfloat16
    expected = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    expected |= {"intermediate_size": 96, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    expected |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "head_dim": 8}
    expected |= {"bos_token_id": 1, "eos_token_id": 2, "architectures": ["LlamaForCausalLM"]}
    assert {name: getattr(model, name) for name in expected} == expected


# The published params.json, as far as they decide. Context and rope as on the model cards.
PUBLISHED = {
    "llama1-7b": ({"dim": 4096, "norm_eps": 1e-6}, 2048, None),
    "llama1-65b": ({"dim": 8192, "norm_eps": 1e-5}, 2048, None),
    "llama2-7b": ({"dim": 4096, "norm_eps": 1e-5}, 4096, None),
    "llama2-70b": ({"dim": 8192, "norm_eps": 1e-5, "n_kv_heads": 8}, 4096, None),
    "codellama": ({"dim": 4096, "norm_eps": 1e-5, "rope_theta": 1e6}, 16384, None),
    "llama3-8b": ({"dim": 4096, "norm_eps": 1e-5, "n_kv_heads": 8, "rope_theta": 500000.0}, 8192, None),
    "llama3.1-8b": (
        {"dim": 4096, "norm_eps": 1e-5, "n_kv_heads": 8, "rope_theta": 500000.0, "use_scaled_rope": True},
        131072,
        8.0,
    ),
    "llama3.2-1b": (
        {"dim": 2048, "norm_eps": 1e-5, "n_kv_heads": 8, "rope_theta": 500000.0, "use_scaled_rope": True},
        131072,
        32.0,
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_generation_decides_context_and_rope(tmp_path, model):
    from transformers import LlamaConfig

    settings, context, factor = PUBLISHED[model]
    # ffn and vocabulary do not decide: the wide models' files stay small
    params = {"n_layers": 1, "n_heads": 64, "multiple_of": 256, "vocab_size": -1} | settings
    small = {"dim": params["dim"], "heads": 64, "kv": params.get("n_kv_heads", 64) * params["dim"] // 64}
    storage = torch.zeros(1, dtype=torch.bfloat16)

    def fake(*shape):
        return storage.expand(shape)

    state = {"tok_embeddings.weight": fake(4, small["dim"]), "output.weight": fake(4, small["dim"])}
    state |= {"norm.weight": fake(small["dim"])}
    for name, shape in {
        "attention.wq": (small["dim"], small["dim"]),
        "attention.wk": (small["kv"], small["dim"]),
        "attention.wv": (small["kv"], small["dim"]),
        "attention.wo": (small["dim"], small["dim"]),
        "feed_forward.w1": (8, small["dim"]),
        "feed_forward.w2": (small["dim"], 8),
        "feed_forward.w3": (8, small["dim"]),
        "attention_norm": (small["dim"],),
        "ffn_norm": (small["dim"],),
    }.items():
        state[f"layers.0.{name}.weight"] = fake(*shape)
    config = meta_config(meta_model.save(tmp_path / "m", params, [state]))
    assert config["max_position_embeddings"] == context
    assert config["intermediate_size"] == 8
    rope = LlamaConfig(**config).rope_parameters
    assert rope["rope_theta"] == settings.get("rope_theta", 10000.0)
    if factor is None:
        assert rope == {"rope_theta": rope["rope_theta"], "rope_type": "default"}
    else:
        published = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        assert rope == {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor} | published


def test_llama3_has_its_own_token_ids(tmp_path):
    params = meta_model.make_params(dim=8, n_heads=2, n_layers=1, rope_theta=500000.0, vocab_size=128256)
    weights = meta_model.make_weights(params, 128256, torch.float16)
    config = meta_config(meta_model.save(tmp_path / "m", params, [weights]))
    assert (config["bos_token_id"], config["eos_token_id"]) == (128000, 128001)


def test_settings_of_a_large_model_may_stand_below_model(tmp_path):
    folder, _ = make(tmp_path / "m")
    (folder / "params.json").write_text(json.dumps({"model": json.loads((folder / "params.json").read_text())}))
    assert meta_config(folder)["hidden_size"] == 32


def test_no_output_weight_means_tied(tmp_path):
    folder, _ = make(tmp_path / "m", 1)
    edit(folder, **{"output.weight": None})
    assert meta_config(folder)["tie_word_embeddings"] is True
    assert "lm_head.weight" not in open_meta_checkpoint(folder).tensors


# ---------------------------------------------------------------- damage


def assert_refused(folder, message):
    with pytest.raises(InputError, match=message):
        open_meta_checkpoint(folder)
    with pytest.raises(InputError, match=message):
        meta_config(folder)


def test_missing_parts(tmp_path):
    folder, _ = make(tmp_path / "m", 4)
    (folder / "consolidated.01.pth").unlink()
    assert_refused(folder, r"m lacks consolidated\.01\.pth; download")
    (folder / "consolidated.00.pth").unlink()
    assert_refused(folder, r"m lacks consolidated\.00\.pth, consolidated\.01\.pth")
    folder, _ = make(tmp_path / "last", 4)
    (folder / "consolidated.03.pth").unlink()
    assert_refused(folder, r"last holds 3 of 4 parts")
    for file in folder.glob("*.pth"):
        file.unlink()
    assert_refused(folder, r"no consolidated\.00\.pth in")


def test_params_missing_or_broken(tmp_path):
    folder, _ = make(tmp_path / "m")
    good = json.loads((folder / "params.json").read_text())
    for text, message in {
        "{": r"params\.json:1: broken JSON",
        "[]": r"params\.json: need an object with the model's settings, got list",
        json.dumps({name: value for name, value in good.items() if name != "dim"}): r'for dim, got \{"dim": null\}',
        json.dumps(good | {"n_layers": "two"}): r'for n_layers, got \{"n_layers": "two"\}',
        json.dumps(good | {"n_heads": True, "n_kv_heads": 0}): r"for n_heads, n_kv_heads",
        json.dumps(good | {"norm_eps": float("nan")}): r"for norm_eps",
        json.dumps(good | {"rope_theta": -1}): r"for rope_theta",
        json.dumps(good | {"n_heads": 5}): r"dim 32, n_heads 5 and n_kv_heads 5 do not fit together",
        json.dumps(good | {"n_kv_heads": 3}): r"n_kv_heads 3 do not fit together",
        json.dumps(good | {"sliding_window": 4096, "moe": {}}): r"sets moe, sliding_window, which no Llama",
    }.items():
        (folder / "params.json").write_text(text)
        assert_refused(folder, message)
    (folder / "params.json").unlink()
    assert_refused(folder, r"has no params\.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 10**12}, r"consolidated\.00\.pth holds no matrix layers\.9{12}\.attention\.wq\.weight"),
        ({"n_kv_heads": 2}, r"attention\.wk\.weight \(consolidated.00.pth \[16, 32\], .*\[16, 32\] that"),
        ({"vocab_size": 32000}, r"says vocab_size 32000, tok_embeddings has 21 rows"),
        ({"dim": 64}, r"holds 2 of 4 parts"),
        ({"dim": 40}, r"tok_embeddings\.weight.*do not make up the \[21, 40\]"),
    ],
)
def test_params_of_another_model(tmp_path, changes, message):
    folder, _ = make(tmp_path / "m")
    edit_params(folder, **changes)
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, r"consolidated\.01\.pth lacks 1 tensors, first norm\.weight"),
        (
            {"layers.0.feed_forward.w1.weight": None},
            r"consolidated\.01\.pth holds no matrix layers\.0\.feed_forward\.w1",
        ),
        ({"extra.bias": torch.ones(3)}, r"consolidated\.01\.pth also holds 1 tensors, first extra\.bias"),
        ({"output.weight": torch.ones(9, 32)}, r"of output\.weight \(consolidated\.00\.pth \[10, 32\], .*\[9, 32\]"),
        ({"layers.0.attention.wo.weight": torch.ones(32)}, r"attention\.wo\.weight .*consolidated\.01\.pth \[32\]"),
        ({"norm.weight": torch.ones(32).half()}, r"norm\.weight .*float16, float32"),
    ],
)
def test_parts_that_do_not_fit_each_other(tmp_path, changes, message):
    folder, _ = make(tmp_path / "m")
    edit(folder, 1, **changes)
    assert_refused(folder, message)


def test_norms_that_differ_between_parts(tmp_path):
    folder, weights = make(tmp_path / "m")
    edit(folder, 1, **{"norm.weight": weights["norm.weight"] + 1})
    with pytest.raises(InputError, match=r"norm\.weight differs between .*consolidated\.00\.pth and consolidated\.01"):
        open_meta_checkpoint(folder).read("model.norm.weight")


class Payload:
    def __reduce__(self):
        return open, ("payload_was_run", "w")


def test_a_payload_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = make(tmp_path / "m")
    torch.save({"a": Payload()}, folder / "consolidated.01.pth")
    assert_refused(folder, r"consolidated\.01\.pth holds Python objects besides weights")
    (folder / "consolidated.01.pth").write_bytes(pickle.dumps(Payload()))
    assert_refused(folder, r"consolidated\.01\.pth holds Python objects besides weights")
    assert not (tmp_path / "payload_was_run").exists()


@pytest.mark.parametrize("keep", [0, 1, 1000, -100])
def test_truncated_files(tmp_path, keep):
    folder, _ = make(tmp_path / "m")
    file = folder / "consolidated.01.pth"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    assert_refused(folder, r"consolidated\.01\.pth (is truncated or corrupted|holds Python objects)")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    folder, _ = make(tmp_path / "m")
    with open_meta_checkpoint(folder) as checkpoint:
        file = folder / "consolidated.01.pth"
        shutil.copyfile(file, folder / "copy")
        file.write_bytes(b"")
        with pytest.raises(InputError, match=r"consolidated\.01\.pth ended while tok_embeddings"):
            checkpoint.read("model.embed_tokens.weight")
