"""Mixtures whose experts are linear layers, against transformers' own and PEFT's adapters of its stacks."""

import copy
import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from support.models import MIXTURES, SIZES, model_of
from utils.core.arguments import LoraArguments, ModelArguments
from utils.core.errors import InputError
from utils.lora.adapter_folder import load_with_peft, names_experts
from utils.models.experts import Experts, Router, counted_by_router
from utils.models.loading import load_model
from utils.models.training_model import adapts_experts, attach_adapter, check_experts
from utils.weights.config import load_config
from utils.weights.model_folder import read_model
from utils.weights.names import find_spelling

IDS = torch.tensor([[1, 5, 9, 33, 60, 2, 7, 64], [3, 3, 8, 1, 44, 0, 0, 0]])
EVERYTHING = LoraArguments(target_modules="all", lora_rank=4, lora_alpha=8, lora_dropout=0.05)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """{kind: folder}; in blocks of 64 for bitsandbytes."""
    folders = {}
    for kind, changes in MIXTURES.items():
        sizes = SIZES | {"vocab_size": 80, "hidden_size": 64, "intermediate_size": 128} | changes
        folders[kind] = tmp_path_factory.mktemp("experts") / kind
        model_of(AutoConfig.for_model(kind, **sizes), scale=0.05).save_pretrained(folders[kind])
    return folders


def load(folder, bits=16, adapts=True):
    device_map = {"": "cpu"} if bits != 16 else None
    args = ModelArguments(model_name_or_path=str(folder), load_in_kbits=bits)
    return load_model(args, torch.float32, device_map, adapts_experts=adapts)


def adapted(folder, bits=16, seed=0, args=EVERYTHING):
    """A model with an adapter that changes something."""
    torch.manual_seed(seed)
    model = attach_adapter(load(folder, bits), args, bits)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("kind", MIXTURES)
def test_linear_experts_compute_what_transformers_stacks_do(mixtures, kind):
    stacked = AutoModelForCausalLM.from_pretrained(mixtures[kind], dtype=torch.float32)
    linear = load(mixtures[kind])
    assert load_config(str(mixtures[kind])).model_type == linear.config.to_dict()["model_type"] == kind
    for model in (stacked, linear):
        model(IDS).logits.square().mean().backward()
    expected, got = (model(IDS, output_router_logits=True) for model in (stacked, linear))
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss)
    name = "model.layers.1.mlp.gate.weight"
    torch.testing.assert_close(linear.get_parameter(name).grad, stacked.get_parameter(name).grad)
    parts = ("w1", "w2") if kind == "mixtral" else ("gate_proj", "down_proj")
    block = linear.model.layers[1].mlp.experts
    gate_up, down = (getattr(stacked.model.layers[1].mlp.experts, name).grad for name in ("gate_up_proj", "down_proj"))
    for number, expert in enumerate(block):
        gate = expert.get_submodule(parts[0]).weight.grad
        torch.testing.assert_close(gate, gate_up[number, : len(gate)])
        torch.testing.assert_close(expert.get_submodule(parts[1]).weight.grad, down[number])


@pytest.mark.parametrize("kind", MIXTURES)
def test_4_bits_mean_4_bits_for_experts(mixtures, kind):
    import bitsandbytes

    model, whole = load(mixtures[kind], 4, adapts=False), load(mixtures[kind])

    def experts(of):
        return [(name, part) for name, part in of.named_modules() if re.search(r"\.experts\.\d+\.\w+$", name)]

    layers = [part for name, part in experts(model) if not name.endswith("act_fn")]
    assert len(layers) == 2 * 4 * 3 and all(type(part) is bitsandbytes.nn.Linear4bit for part in layers)
    assert all(type(layer.mlp.gate) is Router for layer in model.model.layers), "a router is no layer to be rounded"
    resident = 0
    for part in layers:
        state = part.weight.quant_state
        values = (part.weight, state.absmax, state.state2.absmax if state.nested else None)
        resident += sum(value.nbytes for value in values if value is not None)
    full = sum(part.weight.numel() * 2 for name, part in experts(whole) if hasattr(part, "weight"))
    assert resident <= 0.30 * full
    assert not any(value.is_floating_point() and value.dim() > 2 for value in model.state_dict().values())


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("kind", MIXTURES)
def test_all_linear_layers_but_the_head_are_adapted_with_dropout(mixtures, tmp_path, kind, bits):
    assert adapts_experts(EVERYTHING, load_config(str(mixtures[kind])))
    model = adapted(mixtures[kind], bits).train()
    linear = {name for name, part in model.named_modules() if name.endswith(".base_layer")}
    # Without a head there is as much to adapt as the model has matrices of its own.
    per_layer = {"mixtral": 4 + 1 + 12, "qwen2_moe": 4 + 1 + 12 + 4, "qwen3_moe": 4 + 1 + 12}[kind]
    assert len(linear) == 2 * per_layer and not any("lm_head" in name for name in linear)
    rates = {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout) and part.p}
    assert rates == {0.05}
    model(IDS[:1, :1]).logits.sum().backward()  # one token: two of four experts have nothing to do
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert missing == [], "DDP waits for every gradient"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    part = "w1" if kind == "mixtral" else "gate_proj"
    assert f"base_model.model.model.layers.0.mlp.experts.3.{part}.lora_A.weight" in load_file(
        tmp_path / "adapter_model.safetensors"
    )
    again = load_with_peft(load(mixtures[kind], bits), {"default": str(tmp_path)})
    for name, value in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(again.get_parameter(name), value), name


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_adapter_is_its_products_added_to_the_files(mixtures, tmp_path, kind):
    model = adapted(mixtures[kind])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights = load_file(mixtures[kind] / "model.safetensors")
    for name in [name for name in factors if ".lora_A." in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        place = find_spelling(f"{module}.weight", weights)
        weights[place] += 2 * factors[name.replace("lora_A", "lora_B")] @ factors[name]  # alpha 8 / rank 4
    copied = shutil.copytree(mixtures[kind], tmp_path / "sum")
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_adapter_is_what_peft_makes_of_it_on_stacks(mixtures, tmp_path, kind):
    """PEFT's own conversion, which Qwen2-MoE has none of. It refuses a dropout, even where nothing is trained."""
    model = adapted(mixtures[kind])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_dropout": 0.0}))
    base = AutoModelForCausalLM.from_pretrained(mixtures[kind], dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, tmp_path).eval()(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapters_in_chinese_mixtrals_layout_load(mixtures, tmp_path):
    model = adapted(mixtures["mixtral"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    old = {name.replace(".mlp.", ".block_sparse_moe."): value for name, value in weights.items()}
    save_file(old, tmp_path / "adapter_model.safetensors")
    assert names_experts(str(tmp_path))
    again = load_with_peft(load(mixtures["mixtral"]), {"default": str(tmp_path)}).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def plain_router_loss(logits, count, top_k, tokens):
    """Switch Transformer, eq. 4 to 6, over all layers at once: a loop over tokens."""
    chosen, probabilities, rows = torch.zeros(count), torch.zeros(count), 0
    for layer in logits:
        for row, counts in zip(layer.float(), tokens.flatten(), strict=True):
            if counts:
                shares = row.softmax(0)
                for number in shares.topk(top_k).indices:
                    chosen[number] += 1
                probabilities = probabilities + shares
                rows += 1
    return count * (chosen / rows * probabilities / rows).sum()


@pytest.mark.parametrize("adapts", [True, False])
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_balancing_loss_leaves_padding_out(mixtures, kind, adapts):
    model = load(mixtures[kind], adapts=adapts)
    tokens = torch.ones_like(IDS, dtype=torch.bool)
    tokens[1, 5:] = False
    square = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()  # who sees whom, as batches of pairs have it
    with counted_by_router(torch.nn.ModuleDict({"wrapped": model}), tokens):
        outputs = model(IDS, attention_mask=square, output_router_logits=True)
    expected = plain_router_loss(outputs.router_logits, 4, 2, tokens)
    torch.testing.assert_close(outputs.aux_loss, expected)
    everything = model(IDS, output_router_logits=True).aux_loss
    assert abs(float(everything - expected.detach())) > 1e-4, "else this would show nothing"
    gate = model.model.layers[0].mlp.gate.weight
    (ours,) = torch.autograd.grad(outputs.aux_loss, gate, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, gate)[0])


def test_gradients_are_the_same_with_checkpointing(mixtures):
    model = adapted(mixtures["mixtral"], args=LoraArguments(target_modules="gate,w1", lora_rank=4, lora_dropout=0.0))
    gradients = []
    for _ in range(2):
        outputs = model(IDS, output_router_logits=True)
        (outputs.logits.square().mean() + outputs.aux_loss).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        model.train().gradient_checkpointing_enable()
        model.enable_input_require_grads()
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


def test_tokens_come_back_in_order_and_idle_experts_cost_nothing():
    class Scale(torch.nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number, self.calls = number, 0

        def forward(self, x):
            self.calls += 1
            return x * 10**self.number

    experts = Experts(Scale(number) for number in range(4))
    x = torch.tensor([[1.0], [2.0], [3.0]])
    chosen, weights = torch.tensor([[2, 0], [0, 1], [2, 1]]), torch.tensor([[0.5, 0.5], [1.0, 2.0], [0.25, 4.0]])
    with torch.no_grad():
        out = experts(x, chosen, weights)
    assert out.flatten().tolist() == [50.5, 2 + 40, 75 + 120]
    assert [expert.calls for expert in experts] == [1, 1, 1, 0]


def test_a_layer_computes_what_its_experts_do_token_by_token(mixtures):
    block = adapted(mixtures["mixtral"]).model.model.layers[0].mlp
    torch.manual_seed(1)
    x = torch.randn(61, 64, requires_grad=True)  # counts that are rounded up
    weights = torch.rand(61, 2, requires_grad=True)
    chosen = torch.stack([torch.randperm(3)[:2] for _ in x])  # and an expert without tokens
    trained = [value for value in block.experts.parameters() if value.requires_grad]
    rows = [
        sum(share * block.experts[number](row[None])[0] for number, share in zip(numbers, shares, strict=True))
        for row, numbers, shares in zip(x, chosen.tolist(), weights, strict=True)
    ]
    expected, got = torch.stack(rows), block.experts(x, chosen, weights)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    toward, inputs = torch.randn_like(x), [x, weights, *trained]
    theirs = torch.autograd.grad(expected, inputs, toward, materialize_grads=True, allow_unused=True)
    ours = torch.autograd.grad(got, inputs, toward)
    for value, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


def test_products_have_few_shapes_on_a_cpu_where_each_new_one_is_compiled():
    class Widths(torch.nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return x

    experts, sizes, counts = Experts(Widths() for _ in range(8)), [], []
    torch.manual_seed(0)
    for _ in range(40):
        chosen = torch.rand(512, 8).topk(2).indices
        counts += torch.bincount(chosen.flatten(), minlength=8).tolist()
        x = torch.randn(512, 4)
        torch.testing.assert_close(experts(x, chosen, torch.full((512, 2), 0.5)), x)
    assert len(set(counts)) > 40 and len(set(sizes)) < 10
    assert all(count <= size <= 9 / 8 * count for count, size in zip(counts, sizes, strict=True))


def test_what_experts_cannot_do_is_refused_by_name(mixtures, tmp_path, tiny_model_folder):
    def refused(words, folder, bits=4, **lora):
        with pytest.raises(InputError, match=words):
            check_experts(
                ModelArguments(model_name_or_path=str(folder), load_in_kbits=bits),
                LoraArguments(**lora),
                read_model(str(folder)),
            )

    sizes = SIZES | {"vocab_size": 80, "num_experts": 4, "num_experts_per_tok": 2}
    model_of(AutoConfig.for_model("olmoe", **sizes)).save_pretrained(tmp_path / "other")
    refused(r"--load_in_kbits 4: the experts of a olmoe model .* works with: mixtral, qwen2_moe", tmp_path / "other")
    stacks = AutoModelForCausalLM.from_pretrained(mixtures["mixtral"])
    stacks.save_pretrained(tmp_path / "stacks", save_original_format=False)
    refused(r"one by one, but .*stacks holds them in stacks: .*gate_up_proj", tmp_path / "stacks")
    refused(r"--target_modules w1 needs experts one by one", tmp_path / "stacks", 16, target_modules="w1")
    refused("no router", tiny_model_folder, 16, output_router_logits=True)
    adapter = tmp_path / "stacked"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "target_parameters": ["gate_up_proj"], "target_modules": []}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.zeros(16, 64)},
              adapter / "adapter_model.safetensors")  # fmt: skip
    refused("in stacks, which --load_in_kbits 4 cannot take", mixtures["mixtral"], adapter_name_or_path=str(adapter))
    check = copy.deepcopy(EVERYTHING)
    check_experts(ModelArguments(load_in_kbits=4), check, read_model(str(mixtures["qwen3_moe"])))
