"""utils.weights.reader: reading against safetensors and torch, writing read back by them, damage named."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils.core.errors import InputError
from utils.core.files import hash_file
from utils.weights import config, reader
from utils.weights.reader import TensorSpec, open_checkpoint, row_blocks
from utils.weights.writer import parse_size, plan_shards, write_index, write_shard


def some_weights():
    torch.manual_seed(0)
    wide = torch.randn(6, 10)
    return {
        "a": torch.randn(300, 7),
        "b.weight": torch.randn(5, 3).bfloat16(),
        "c": torch.randn(4).half(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(9),
        "flags": torch.tensor([True, False, True]),
        "cube": torch.randn(3, 4, 5),
        "transposed": wide.T,
        "part": wide[2:4],
    }


def assert_same(checkpoint, weights):
    assert checkpoint.shapes == {name: tuple(weight.shape) for name, weight in weights.items()}
    for name, weight in weights.items():
        loaded = checkpoint.read(name)
        assert loaded.dtype == weight.dtype == checkpoint.tensors[name].dtype
        assert torch.equal(loaded, weight)
    assert torch.equal(checkpoint.read_rows("a", 130, 257), weights["a"][130:257])
    assert torch.equal(checkpoint.read_rows("cube", 1, 11), weights["cube"].reshape(12, 5)[1:11])
    assert torch.equal(checkpoint.read_rows("transposed", 4, 9), weights["transposed"][4:9])


@pytest.mark.parametrize("kind", ["safetensors", "bin", "legacy_bin"])
def test_reading(tmp_path, kind):
    weights = some_weights()
    if kind == "safetensors":
        save_file(
            {name: weight.contiguous().clone() for name, weight in weights.items()}, tmp_path / "model.safetensors"
        )
    else:
        torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, weights)
        assert [info.num_bytes for info in checkpoint.tensors.values()] == [
            weights[name].nbytes for name in checkpoint.tensors
        ]


def test_a_contiguous_bin_tensor_is_read_without_loading_its_file(tmp_path, monkeypatch):
    torch.save({"a": torch.arange(1000.0), "b": torch.arange(2000.0)[500:1500]}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    monkeypatch.setattr(torch, "load", None)
    assert torch.equal(checkpoint.read_rows("a", 10, 20), torch.arange(10.0, 20))
    assert torch.equal(checkpoint.read("b"), torch.arange(500.0, 1500))


def test_an_adapter_folder_is_opened_as_one(tmp_path):
    save_file({"x.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    torch.save({"stale": torch.ones(1)}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert open_checkpoint(tmp_path).shapes == {"x.lora_A.weight": (2, 3)}


def test_written_shards_are_what_safetensors_reads(tmp_path):
    weights = {name: weight.contiguous() for name, weight in some_weights().items()}
    specs = [TensorSpec(name, weight.dtype, tuple(weight.shape)) for name, weight in weights.items()]
    shards = plan_shards(specs, 400)
    assert list(shards) == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for shard in shards.values():
        assert len(shard) == 1 or sum(spec.num_bytes for spec in shard) <= 400

    def blocks(spec):
        weight = weights[spec.name]
        return [weight] if weight.dim() == 0 else [weight[start : start + 100] for start in range(0, len(weight), 100)]

    stream = ((spec, block) for shard in shards.values() for spec in shard for block in blocks(spec))
    for name, shard in shards.items():
        assert write_shard(tmp_path / name, shard, stream) == {"sha256": hash_file(tmp_path / name)}
    write_index(tmp_path, shards)
    read = {}
    for name in shards:
        read |= load_file(tmp_path / name)
    assert read.keys() == weights.keys()
    assert all(
        torch.equal(read[name], weight) and read[name].dtype == weight.dtype for name, weight in weights.items()
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    assert set(index["weight_map"]) == set(weights)
    assert_same(open_checkpoint(tmp_path), weights)


def test_tensors_are_aligned_to_their_type(tmp_path):
    specs = [
        TensorSpec("odd", torch.bool, (3,)),
        TensorSpec("f", torch.float32, (2,)),
        TensorSpec("h", torch.bfloat16, (3,)),
    ]
    ((name, shard),) = plan_shards(specs, 10**6).items()
    write_shard(tmp_path / name, shard, ((spec, torch.zeros(spec.shape, dtype=spec.dtype)) for spec in shard))
    write_index(tmp_path, {name: shard})
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]
    for info in open_checkpoint(tmp_path).tensors.values():
        assert info.offset % info.dtype.itemsize == 0


def test_row_blocks_cover_a_tensor_once():
    for shape in [(), (0, 3), (1,), (127, 4), (128, 4), (1000, 4), (1000, 100_000), (55296, 4096)]:
        blocks = list(row_blocks(shape))
        rows = [row for start, stop in blocks for row in range(start, stop)]
        assert rows == list(range(shape[0] if shape else 1))
        assert all(stop - start >= reader.MIN_BLOCK_ROWS for start, stop in blocks[:-1])


def test_row_blocks_of_a_stack_hold_rows_of_one_matrix():
    assert list(row_blocks((2, 200, 100_000))) == [(0, 128), (128, 200), (200, 328), (328, 400)]
    assert list(row_blocks((3, 5, 2))) == [(0, 5), (5, 10), (10, 15)]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200MB", 200 * 10**6), ("1.5 GiB", 3 << 29), ("64kib", 1 << 16), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 G", "-1GB", "0MB", "5TB"])
def test_bad_sizes(text):
    with pytest.raises(InputError, match="no size"):
        parse_size(text)


# ---------------------------------------------------------------- damage


def saved(folder):
    save_file({"a": torch.ones(20, 5), "b": torch.ones(7).half()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def rewrite_header(path, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


HEADERS = {
    "larger_shape": (lambda h: h["a"].update(shape=[40, 5]), "wrong about the size of a"),
    "overlap": (lambda h: h["b"].update(data_offsets=[0, 14]), "wrong about the size of"),
    "hole": (lambda h: h.pop("a"), "wrong about the size of b"),
    "missing_tail": (lambda h: h.pop("b"), "corrupted: it has"),
    "negative": (lambda h: h["a"].update(shape=[-20, -5]), "corrupted"),
    "text_offsets": (lambda h: h["a"].update(data_offsets="ab"), "corrupted"),
    "one_offset": (lambda h: h["a"].update(data_offsets=[0]), "corrupted"),
    "no_shape": (lambda h: h["a"].pop("shape"), "corrupted"),
    "text_shape": (lambda h: h["a"].update(shape=["x"]), "corrupted"),
    "unknown_type": (lambda h: h["a"].update(dtype="F4"), "type F4"),
    "not_an_entry": (lambda h: h.update(c=3), "corrupted"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(tmp_path, case):
    change, message = HEADERS[case]
    rewrite_header(saved(tmp_path), change)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(error.value)


def test_truncation_anywhere_is_found(tmp_path):
    path = saved(tmp_path)
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(InputError, match=r"model\.safetensors is (truncated|corrupted)"):
            open_checkpoint(tmp_path)
    path.write_bytes(raw + b"x")
    with pytest.raises(InputError, match="corrupted"):
        open_checkpoint(tmp_path)
    path.write_bytes(raw)
    open_checkpoint(tmp_path)


def test_random_bytes_never_end_in_another_error(tmp_path):
    path = saved(tmp_path)
    raw = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    header_end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(300):
        damaged = bytearray(raw)
        place = int(torch.randint(header_end, (1,), generator=generator))
        damaged[place] = int(torch.randint(256, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            for name, info in open_checkpoint(tmp_path).tensors.items():  # a changed name or type is no visible damage
                assert info.name == name
        except InputError as error:
            assert "model.safetensors" in str(error)


def test_git_lfs_pointers_are_recognised(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="git lfs pull"):
        open_checkpoint(tmp_path)


class Payload:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_pickles_with_a_payload_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="may run code; refused"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_damaged_bin_files(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(50, 50)}, path)
    raw = path.read_bytes()
    for content in (raw[: len(raw) // 2], raw[:100], b"", b"hello world, no weights here"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"pytorch_model\.bin (is truncated or corrupted|holds Python objects)"):
            open_checkpoint(tmp_path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(InputError, match="no state dict"):
        open_checkpoint(tmp_path)


def test_missing_files_and_indexes(tmp_path):
    with pytest.raises(InputError, match="folder not found"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(InputError, match="no weights in"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors or adapter_model\.bin"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(InputError, match="1 of 2 weight files"):
        open_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match=r"files that are missing: model-00002-of-00002\.safetensors"):
        open_checkpoint(tmp_path)
    save_file({"c": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="1 tensors that no file holds, first b"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="stale"):
        open_checkpoint(tmp_path)
    for content, message in (("{}", "no weight_map"), ('{"weight_map": {"a": "../x"}}', "not a file of this folder")):
        index.write_text(content)
        with pytest.raises(InputError, match=message):
            open_checkpoint(tmp_path)


def test_an_index_of_a_single_file(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert open_checkpoint(tmp_path).shapes == {"a": (2,)}
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match="the weights stand there twice"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = saved(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(InputError, match="ended while"):
        for name in checkpoint.tensors:
            checkpoint.read(name)


def test_names_that_are_no_folder(tmp_path, monkeypatch):
    assert config.local_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.local_folder("~") == tmp_path
    names = {"~/m": f"{tmp_path}/m", "./m/": "./m/", "owner/name": "owner/name"}
    assert {name: config.folder_or_hub_id(name) for name in names} == names
    with pytest.raises(InputError, match="folder not found: /no/such/folder"):
        config.local_folder("/no/such/folder")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="model folder not found: nobody/nothing-of-this-name; as a hub id"):
        config.local_folder("nobody/nothing-of-this-name")


@pytest.mark.slow
def test_reading_does_not_fill_memory(tmp_path):
    """64 MB read in row blocks: the process grows by a block, not by the file."""
    save_file({"a": torch.zeros(16_000, 1000)}, tmp_path / "model.safetensors")
    code = f"""
import re, sys
sys.path.insert(0, {str(reader.__file__.rsplit("/utils/", 1)[0])!r})
from utils.weights.reader import open_checkpoint, row_blocks
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
with open_checkpoint({str(tmp_path)!r}) as checkpoint:
    checkpoint.read_rows("a", 0, 128)
    before = peak()
    for start, stop in row_blocks(checkpoint.shapes["a"]):
        checkpoint.read_rows("a", start, stop)
    print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 32_000, f"{grown} KiB"
