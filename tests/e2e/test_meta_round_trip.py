"""Meta's pth layout to Hugging Face's and back, against a forward pass in Meta's terms and transformers' converter.

Row blocks are small, so that every matrix is read and written in several, and blocks end inside of attention heads.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
import zipfile

import pytest
import torch

from support import meta_model
from utils.core.files import hash_file, write_json
from utils.lora.inputs import open_merge
from utils.lora.merged_model import MergedModel
from utils.weights import reader, writer
from utils.weights.meta_reader import meta_config, open_meta_checkpoint
from utils.weights.meta_writer import write_meta_checkpoint
from utils.weights.writer import plan_shards, write_shard

pytestmark = pytest.mark.usefixtures("small_blocks")

TOKENS = torch.tensor([1, 5, 9, 33, 120, 400, 7, 64, 64, 3])
MHA, GQA = {}, {"dim": 384, "n_heads": 16, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3}
VOCAB = 401  # odd: the last part has what remains


def to_huggingface(meta, folder):
    """Meta folder -> Hugging Face folder, as the merge script writes one."""
    folder.mkdir()
    write_json(folder / "config.json", meta_config(meta))
    with open_meta_checkpoint(meta) as checkpoint:
        model = MergedModel(checkpoint, [], tied=False)
        [(name, specs)] = plan_shards(model.specs(), 10**9).items()
        write_shard(folder / name, specs, model.stream(specs))
    return folder


def to_meta(huggingface, folder, num_parts=None):
    folder.mkdir()
    with open_merge(str(huggingface)) as inputs:
        return write_meta_checkpoint(folder, inputs.config, inputs.model.specs(), inputs.model.stream, num_parts)


def assert_parts_are(folder, expected):
    files = sorted(folder.glob("*.pth"))
    assert [file.name for file in files] == [f"consolidated.{number:02d}.pth" for number in range(len(expected))]
    for file, state in zip(files, expected, strict=True):
        loaded = torch.load(file, weights_only=True)
        assert loaded.keys() == state.keys()
        for name, weight in state.items():
            assert loaded[name].dtype == weight.dtype, name
            assert loaded[name].shape == weight.shape, name
            assert torch.equal(loaded[name], weight), name


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, id="bf16"),
    ],
)
@pytest.mark.parametrize("parts", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["mha", "gqa", "llama3"])
def test_pth_to_huggingface_to_pth_gives_the_same_bits(tmp_path, kind, parts, dtype):
    params = meta_model.make_params(**(MHA if kind == "mha" else GQA))
    if kind == "llama3":
        params |= {"rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": VOCAB}
    weights = meta_model.make_weights(params, VOCAB, dtype)
    expected = meta_model.cut(weights, parts, embedding_dim=0 if kind == "llama3" else 1)
    huggingface = to_huggingface(meta_model.save(tmp_path / "meta", params, expected), tmp_path / "hf")
    if dtype == torch.float32:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(huggingface).eval()
        oracle = meta_model.logits(weights, params, TOKENS)
        difference = (model(TOKENS[None]).logits[0] - oracle).abs().max()
        assert difference <= 1e-5 * oracle.abs().max()
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, meta_model.frequencies(params))
    hashes = to_meta(huggingface, tmp_path / "back", parts)
    assert_parts_are(tmp_path / "back", expected)
    assert hashes == {file.name: {"sha256": hash_file(file)} for file in (tmp_path / "back").glob("*.pth")}
    written = json.loads((tmp_path / "back" / "params.json").read_text())
    assert meta_model.ffn_size(written) == meta_model.ffn_size(params)
    assert {**written, **{name: 0 for name in ("multiple_of", "ffn_dim_multiplier")}} == {
        **params,
        **{name: 0 for name in ("multiple_of", "ffn_dim_multiplier")},
    }
    # and the result is read again, whatever its number of parts
    with open_meta_checkpoint(tmp_path / "back") as again, open_meta_checkpoint(tmp_path / "meta") as first:
        assert again.shapes == first.shapes
        assert all(torch.equal(again.read(name), first.read(name)) for name in first.shapes)


def test_an_oracle_that_rotates_otherwise_disagrees(tmp_path):
    """What the row order is worth: without it logits are far off."""
    params = meta_model.make_params()
    weights = meta_model.make_weights(params, VOCAB)
    oracle = meta_model.logits(weights, params, TOKENS)
    for name in [name for name in weights if name.endswith(("wq.weight", "wk.weight"))]:
        heads = weights[name].view(8, 12, 2, -1)
        weights[name] = heads.transpose(1, 2).reshape(weights[name].shape)
    assert (meta_model.logits(weights, params, TOKENS) - oracle).abs().max() > 0.1 * oracle.abs().max()


def test_a_huggingface_model_runs_the_same_in_metas_terms(tmp_path, tiny_model_folder):
    """The other direction first: transformers' logits, then Meta's forward pass on what was written."""
    from transformers import AutoModelForCausalLM

    hashes = to_meta(tiny_model_folder, tmp_path / "meta", 2)
    assert set(hashes) == {"consolidated.00.pth", "consolidated.01.pth"}
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    states = [torch.load(tmp_path / "meta" / f"consolidated.0{number}.pth") for number in range(2)]
    weights = {}
    for name in states[0]:
        short = name.removesuffix(".weight").split(".", 2)[-1] if name.startswith("layers.") else name[:-7]
        if "norm" in name:
            weights[name] = states[0][name]
        else:
            weights[name] = torch.cat([state[name] for state in states], dim=0 if short in meta_model.BY_ROWS else 1)
    tokens = TOKENS % 400
    expected = AutoModelForCausalLM.from_pretrained(tiny_model_folder)(tokens[None]).logits[0]
    actual = meta_model.logits(weights, params, tokens)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_memory_is_bounded_by_blocks_not_by_tensors(tmp_path, monkeypatch):
    params = meta_model.make_params(multiple_of=1024, n_layers=1)
    weights = meta_model.make_weights(params, 4000)
    meta = meta_model.save(tmp_path / "meta", params, meta_model.cut(weights, 2))
    largest = {"read": 0, "written": 0}
    read, write = reader.Checkpoint._read_elements, writer.FileWriter.write

    def counted_read(self, info, start, stop):
        largest["read"] = max(largest["read"], (stop - start) * info.dtype.itemsize)
        return read(self, info, start, stop)

    def counted_write(self, data):
        largest["written"] = max(largest["written"], memoryview(data).nbytes)
        return write(self, data)

    monkeypatch.setattr(reader.Checkpoint, "_read_elements", counted_read)
    monkeypatch.setattr(writer.FileWriter, "write", counted_write)
    to_meta(to_huggingface(meta, tmp_path / "hf"), tmp_path / "back", 2)
    assert_parts_are(tmp_path / "back", meta_model.cut(weights, 2))
    assert 0 < largest["read"] <= (128 + 2 * 24) * 1024 * 4  # 128 rows of w2, and heads that a block cuts
    assert 0 < largest["written"] <= (128 + 24) * 1024 * 4


@pytest.mark.slow
def test_tensors_and_files_beyond_4_gb(tmp_path, monkeypatch):
    """Zeros are skipped, so that the file takes no space; its offsets and sizes need 64 bits."""
    from utils.weights import meta_writer
    from utils.weights.reader import TensorSpec

    class SparseWriter:
        digest = {}  # noqa: RUF012

        def __init__(self, path, hashing):
            self.path, self.size, self.file = path, 0, open(path, "wb")  # noqa: SIM115

        def write(self, data):
            view = memoryview(data).cast("B")
            if len(view) == zeros.nbytes:
                self.file.seek(len(view), 1)
            else:
                self.file.write(view)
            self.size += len(view)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    params = meta_model.make_params(n_layers=1, dim=1024, n_heads=8, multiple_of=256)
    weights = meta_model.make_weights(params, 8)
    del weights["tok_embeddings.weight"], weights["output.weight"]
    with open_meta_checkpoint(
        meta_model.save(
            tmp_path / "small",
            params,
            [weights | {name: torch.zeros(8, 1024) for name in ("tok_embeddings.weight", "output.weight")}],
        )
    ) as small:
        rows = 1 << 20
        config = meta_config(tmp_path / "small") | {"vocab_size": rows}
        specs = [
            TensorSpec(name, torch.float32, (rows, 1024) if shape[0] == 8 else shape)
            for name, shape in small.shapes.items()
        ]
        zeros = torch.zeros(1 << 14, 1024)

        def stream(specs):
            for spec in specs:
                if spec.shape[0] == rows:
                    yield from ((spec, zeros) for _ in range(rows // len(zeros)))
                else:
                    yield spec, small.read(spec.name)

        monkeypatch.setattr(meta_writer, "FileWriter", SparseWriter)
        (tmp_path / "large").mkdir()
        write_meta_checkpoint(tmp_path / "large", config, specs, stream)
    file = tmp_path / "large" / "consolidated.00.pth"
    assert file.stat().st_size > 8 << 30
    assert file.stat().st_blocks * 512 < 1 << 30
    loaded = torch.load(file, weights_only=True, mmap=True)
    assert loaded["tok_embeddings.weight"].shape == loaded["output.weight"].shape == (rows, 1024)
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    with open_meta_checkpoint(tmp_path / "large") as large:
        assert torch.equal(large.read("model.norm.weight"), weights["norm.weight"])
        assert torch.equal(
            large.read("model.layers.0.mlp.down_proj.weight"), weights["layers.0.feed_forward.w2.weight"]
        )
    with zipfile.ZipFile(file) as archive:
        sizes = [info.file_size for info in archive.infolist()]
        assert sum(size == 4 << 30 for size in sizes) == 2


# transformers had its converter in the package up to this version
CONVERTER = "transformers/models/llama/convert_llama_weights_to_hf.py"
CONVERTER_SHA256 = "ecc3537bd5b96f737b5aa74873be77a39f9c1c0b09f806f1f07c5a05b664aef1"
RUN_CONVERTER = """
import runpy, sys
script, meta, out, size, version, vocab = sys.argv[1:]
runpy.run_path(script)["write_model"](
    out, meta, model_size=None, llama_version=version, vocab_size=int(vocab), num_shards=int(size)
)
"""


@pytest.fixture(scope="module")
def converter(tmp_path_factory):
    """The script that transformers 4.44.2 came with; it runs with the installed transformers."""
    folder = tmp_path_factory.mktemp("converter")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "transformers==4.44.2", "-d", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("transformers 4.44.2, which has the converter, cannot be downloaded")
    [wheel] = folder.glob("*.whl")
    with contextlib.closing(zipfile.ZipFile(wheel)) as archive:
        script = archive.read(CONVERTER)
    assert hashlib.sha256(script).hexdigest() == CONVERTER_SHA256
    (folder / "convert.py").write_bytes(script)
    return folder / "convert.py"


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("kind", ["mha", "gqa", "llama3"])
def test_transformers_own_conversion_agrees(tmp_path, converter, kind, parts):
    from safetensors.torch import load_file
    from transformers import AutoConfig

    params = meta_model.make_params(**(MHA if kind == "mha" else GQA))
    if kind == "llama3":
        params |= {"rope_theta": 500000.0, "vocab_size": VOCAB}
    weights = meta_model.make_weights(params, VOCAB, torch.bfloat16)  # the script makes everything bfloat16
    states = meta_model.cut(weights, parts, embedding_dim=0 if kind == "llama3" else 1)
    meta = meta_model.save(tmp_path / "meta", params, states)
    command = [sys.executable, "-c", RUN_CONVERTER, converter, meta, tmp_path / "theirs", str(parts)]
    done = subprocess.run(
        [*command, "3" if kind == "llama3" else "2", str(VOCAB)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = to_huggingface(meta, tmp_path / "ours"), tmp_path / "theirs"
    first, second = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    settings = [AutoConfig.from_pretrained(folder).to_dict() for folder in (ours, theirs)]
    # It says float16 of bfloat16 weights, and Llama 3's ids of vocabularies too small for them.
    for name in ("dtype", "bos_token_id", "eos_token_id", "_name_or_path"):
        for each in settings:
            del each[name]
    assert settings[0] == settings[1]
