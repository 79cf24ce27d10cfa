"""merged_model: what the end-to-end comparison with PEFT does not reach: rounding between adapters, order, memory."""

import json

import pytest
import torch
from safetensors.torch import save_file

from utils.core.errors import InputError
from utils.lora.config import load_adapter_config
from utils.lora.merged_model import MergedModel
from utils.weights import reader
from utils.weights.reader import open_checkpoint

pytestmark = pytest.mark.usefixtures("small_blocks")


def make_base(folder, **tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def make_adapter(folder, tensors, **settings):
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | settings))
    return load_adapter_config(folder), open_checkpoint(folder)


def merged(model, name, dtype=None):
    spec = next(spec for spec in model.specs(dtype) if spec.name == name)
    return torch.cat(list(model.blocks(spec)))


def test_values_take_the_files_type_between_adapters(tmp_path):
    """A change too small for bfloat16 is lost with the first file, and must not add up with the second's."""
    base = make_base(tmp_path / "base", **{"x.weight": torch.ones(300, 4, dtype=torch.bfloat16)})
    small = {"x.lora_A.weight": torch.full((2, 4), 1.0), "x.lora_B.weight": torch.full((300, 2), 0.00125)}  # + 0.0025
    adapters = [make_adapter(tmp_path / f"adapter{number}", small) for number in range(3)]
    assert torch.equal(
        merged(MergedModel(base, adapters, False), "x.weight"), torch.ones(300, 4, dtype=torch.bfloat16)
    )
    full = merged(MergedModel(base, adapters, False), "x.weight", torch.float32)
    torch.testing.assert_close(full, torch.full((300, 4), 1.0075))


def test_a_replaced_weight_forgets_earlier_adapters_and_later_ones_add_to_it(tmp_path):
    base = make_base(
        tmp_path / "base", **{"lm_head.weight": torch.zeros(200, 4), "model.embed_tokens.weight": torch.zeros(200, 4)}
    )
    low_rank = {"lm_head.lora_A.weight": torch.ones(2, 4), "lm_head.lora_B.weight": torch.ones(200, 2)}  # + 2
    whole = {"lm_head.weight": torch.full((200, 4), 10.0)}
    one, two = make_adapter(tmp_path / "one", low_rank), make_adapter(tmp_path / "two", whole)
    three = make_adapter(tmp_path / "three", low_rank)
    model = MergedModel(base, [one, two, three], False)
    assert merged(model, "lm_head.weight").unique().tolist() == [12.0]
    assert model.relative_delta["lm_head.weight"] == float("inf")  # the base was zero
    assert model.changed == ["lm_head.weight"]


def test_relative_delta_counts_old_rows_only(tmp_path):
    base = make_base(
        tmp_path / "base", **{n: torch.ones(150, 4) for n in ("lm_head.weight", "model.embed_tokens.weight")}
    )
    grown = torch.cat([torch.full((150, 4), 1.5), torch.full((50, 4), 100.0)])
    whole = {"lm_head.weight": grown, "model.embed_tokens.weight": grown.clone()}
    model = MergedModel(base, [make_adapter(tmp_path / "adapter", whole)], False)
    assert torch.equal(merged(model, "lm_head.weight"), grown)
    assert model.relative_delta["lm_head.weight"] == pytest.approx(0.5)
    assert model.vocab_size == 200


def test_copies_must_be_equal(tmp_path):
    base = make_base(tmp_path / "base", **{"lm_head.weight": torch.zeros(3, 2)})
    copies = {"lm_head.weight": torch.ones(3, 2), "lm_head.modules_to_save.weight": torch.ones(3, 2)}
    MergedModel(base, [make_adapter(tmp_path / "equal", copies)], False)
    copies["lm_head.modules_to_save.weight"][2, 1] = 2.0
    with pytest.raises(InputError, match="should be equal but differ"):
        MergedModel(base, [make_adapter(tmp_path / "different", copies)], False)


def test_large_finite_values_are_no_overflow(tmp_path):
    """Their norm overflows float32, they do not."""
    base = make_base(tmp_path / "base", **{"x.weight": torch.full((130, 4), 1e30)})
    change = {"x.lora_A.weight": torch.full((2, 4), 1e15), "x.lora_B.weight": torch.full((130, 2), 1e15)}
    assert merged(MergedModel(base, [make_adapter(tmp_path / "a", change)], False), "x.weight").unique().tolist() == [
        pytest.approx(3e30)
    ]
    with pytest.raises(InputError, match="overflows float16; use bfloat16"):
        merged(MergedModel(base, [make_adapter(tmp_path / "b", change)], False), "x.weight", torch.float16)


def test_only_the_tensors_at_hand_are_read(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", **{f"{n}.weight": torch.ones(300, 4) for n in "xyz"})
    change = {
        f"{n}.{part}.weight": torch.ones(*shape)
        for n in "xy"
        for part, shape in (("lora_A", (2, 4)), ("lora_B", (300, 2)))
    }
    adapter = make_adapter(tmp_path / "adapter", change)
    read = []
    original = reader.Checkpoint._read_elements

    def spy(self, info, start, stop):
        read.append(info.name.removeprefix("base_model.model."))
        return original(self, info, start, stop)

    monkeypatch.setattr(reader.Checkpoint, "_read_elements", spy)
    model = MergedModel(base, [adapter], False)
    assert read == []  # planning needs headers only
    merged(model, "y.weight")
    assert set(read) == {"y.weight", "y.lora_A.weight", "y.lora_B.weight"}
    assert read.count("y.lora_B.weight") == 1
