"""Actor, critic, reference and reward adapter on one backbone, against plain models with merged weights."""

import copy

import pytest
import torch
from peft import PeftModelForCausalLM
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from support.policies import LORA, make_policy, merged, oracle, perturb
from utils.core.arguments import LoraArguments, ModelArguments
from utils.models.loading import causal_model
from utils.models.training_model import attach_adapter
from utils.rlhf.actor_critic import (
    CRITIC_ADAPTER,
    CRITIC_FILE,
    ActorCritic,
    critic_state,
    hidden_states,
    is_critic_parameter,
    load_critic,
    save_critic,
    token_logprobs,
    use_adapter,
)
from utils.rlhf.rollouts import collate, gather_answers
from utils.text.prompts import IGNORE_INDEX

SEQUENCES = [([1, 5, 9, 20], [30, 31, 2]), ([1, 7], [40]), ([1, 8, 9, 10, 11, 12, 13], [50, 51, 52, 53, 54, 2])]


def check_figures(policy, actor, critic, temperature):
    batch, places = collate(SEQUENCES, pad_token_id=0)
    with torch.no_grad():
        figures = [gather_answers(tensor, places) for tensor in policy(**batch, temperature=temperature)]
    for row, (prompt, answer) in enumerate(SEQUENCES):
        logprobs, entropies, _ = oracle(actor, prompt, answer, temperature)
        values = oracle(critic, prompt, answer, 1.0, policy.critic.value)[2]
        assert max(map(abs, values)) > 0.01
        for got, expected in zip(figures, (logprobs, entropies, values), strict=True):
            torch.testing.assert_close(got[row], torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("critic", ["head", "adapter", "model"])
def test_one_forward_gives_what_plain_models_give_alone(critic, temperature, tiny_model_folder):
    policy = make_policy(tiny_model_folder, critic).eval()
    actor = merged(policy, tiny_model_folder, "default")
    judge = {"head": actor, "adapter": merged(policy, tiny_model_folder, CRITIC_ADAPTER)}.get(critic)
    if judge is None:
        judge = LlamaForCausalLM.from_pretrained(tiny_model_folder).eval()
        judge.model = policy.critic.model
    check_figures(policy, actor, judge, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_same_with_all_weights_trained(temperature, tiny_model_folder):
    policy = make_policy(tiny_model_folder, full_finetuning=True).eval()
    plain = LlamaForCausalLM.from_pretrained(tiny_model_folder).eval()
    check_figures(policy, plain, plain, temperature)


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": "embed_tokens,lm_head"}, {"use_dora": True}])
@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_without_its_adapter_the_policy_is_the_base_model(lora, critic, tiny_model_folder):
    policy = make_policy(tiny_model_folder, critic, **lora).eval()
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder).eval()
    batch, places = collate(SEQUENCES, pad_token_id=0)
    with torch.no_grad():
        with use_adapter(policy, None):
            reference = gather_answers(token_logprobs(policy, **batch, temperature=0.7), places)
        own = gather_answers(token_logprobs(policy, **batch, temperature=0.7), places)
    for row, (prompt, answer) in enumerate(SEQUENCES):
        expected = torch.tensor(oracle(base, prompt, answer, 0.7)[0])
        torch.testing.assert_close(reference[row], expected, rtol=1e-5, atol=1e-5)
        assert (own[row] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("full", [False, True])
def test_the_policy_keeps_its_class_its_names_and_its_files(full, tiny_model_folder, tmp_path):
    """What transformers, accelerate and PEFT look at when they write and read checkpoints."""
    policy = make_policy(tiny_model_folder, full_finetuning=full)
    kind = LlamaForCausalLM if full else PeftModelForCausalLM
    assert isinstance(policy, ActorCritic) and isinstance(policy, kind)
    assert type(policy).__name__ == kind.__name__ and type(policy).__module__ == kind.__module__
    assert type(LlamaForCausalLM.from_pretrained(tiny_model_folder)) is LlamaForCausalLM, "other models stay"
    own = {name for name, _ in policy.named_parameters() if not is_critic_parameter(name)}
    plain = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    if not full:
        plain = attach_adapter(plain, LoraArguments(**LORA), 16)
    assert own == {name for name, _ in plain.named_parameters()}
    state = {name: tensor for name, tensor in policy.state_dict().items() if not is_critic_parameter(name)}
    policy.save_pretrained(tmp_path / "policy", state_dict=state)
    plain.save_pretrained(tmp_path / "plain")
    assert {path.name for path in (tmp_path / "policy").iterdir()} == {
        path.name for path in (tmp_path / "plain").iterdir()
    }
    if full:
        config = (tmp_path / "policy/config.json").read_text()
        assert config == (tmp_path / "plain/config.json").read_text() and '"LlamaForCausalLM"' in config


def test_calls_without_targets_are_the_models_own(tiny_model_folder):
    policy = make_policy(tiny_model_folder).eval()
    ids = torch.tensor([[1, 5, 9, 20]])
    plain = merged(policy, tiny_model_folder, "default")
    with torch.no_grad():
        torch.testing.assert_close(policy(input_ids=ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
        assert causal_model(policy).generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 7)


# ---------------------------------------------------------------- adapters


def switches(policy):
    return [
        (name, str(module._active_adapter), module._disable_adapters)
        for name, module in policy.named_modules()
        if hasattr(module, "_active_adapter")
    ]


@pytest.mark.parametrize("adapter", [None, CRITIC_ADAPTER])
def test_use_adapter_leaves_everything_as_it_was(adapter, tiny_model_folder):
    policy = make_policy(tiny_model_folder, "adapter", modules_to_save="embed_tokens")
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    before = switches(policy)
    with pytest.raises(ZeroDivisionError), use_adapter(policy, adapter), use_adapter(policy, CRITIC_ADAPTER):
        assert switches(policy) != before
        assert trained == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        raise ZeroDivisionError
    assert switches(policy) == before
    assert trained == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def test_what_is_trained(tiny_model_folder):
    """The policy's adapter, its modules trained whole, the critic's adapter and head; nothing else."""
    policy = make_policy(tiny_model_folder, "adapter", modules_to_save="embed_tokens,lm_head")
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    marks = (".default.", ".critic.", "critic.value.")
    assert trained == {
        name
        for name, _ in policy.named_parameters()
        if any(mark in name for mark in marks) and "lm_head.modules_to_save.critic" not in name
    }
    assert any("lm_head.modules_to_save.default" in name for name in trained)
    assert any(".lora_B.critic." in name for name in trained) and any(".lora_B.default." in name for name in trained)
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)


# ---------------------------------------------------------------- gradients


def gradients(policy, checkpointing):
    policy.train()
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch, _ = collate(SEQUENCES, pad_token_id=0)
    logprobs, _, values = policy(**batch, temperature=0.7)
    mask = batch["targets"] != IGNORE_INDEX
    (logprobs[mask].sum() + values[mask].square().sum()).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("critic", ["head", "adapter", "model"])
def test_activation_checkpointing_changes_no_gradient(critic, tiny_model_folder):
    """The layers of the backward pass must run with the adapter of the forward pass."""
    policy = make_policy(tiny_model_folder, critic, modules_to_save="embed_tokens")
    expected = gradients(copy.deepcopy(policy), False)
    again = make_policy(tiny_model_folder, critic, modules_to_save="embed_tokens")
    got = gradients(again, True)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("critic", ["head", "adapter", "model"])
def test_checkpointing_computes_every_layer_again(critic, tiny_model_folder):
    """Of the actor, and of the critic where it is another pass: else memory would not be saved."""
    policy = make_policy(tiny_model_folder, critic)
    calls = []
    for name, module in policy.named_modules():
        if name.endswith("layers.1.self_attn"):
            module.register_forward_hook(lambda *_: calls.append(1))
    gradients(policy, True)
    assert len(calls) == (2 if critic == "head" else 4)


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": "lm_head"}, {"full_finetuning": True}])
def test_gradients_equal_those_of_plain_logits(lora, tiny_model_folder):
    """Weighted log-probabilities through the chunked head, against log_softmax of all logits."""
    policy = make_policy(tiny_model_folder, **lora).train()
    batch, _ = collate(SEQUENCES, pad_token_id=0)
    mask = batch["targets"] != IGNORE_INDEX
    weights = torch.linspace(-1, 2, int(mask.sum()))
    (policy(**batch, temperature=0.7)[0][mask] * weights).sum().backward()
    got = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    total, done = torch.zeros(()), 0
    for prompt, answer in SEQUENCES:
        logits = policy(input_ids=torch.tensor([[*prompt, *answer]])).logits[0] / 0.7
        table = torch.log_softmax(logits, -1)
        for number, token in enumerate(answer):
            total = total + weights[done] * table[len(prompt) + number - 1, token]
            done += 1
    total.backward()
    assert got
    for name, parameter in policy.named_parameters():
        if name in got and parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()} == {
        n for n, g in got.items() if g.any()
    }


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_a_critic_comes_back_as_it_was(critic, tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder, critic)
    save_critic(tmp_path, critic_state(policy))
    names = set(load_file(tmp_path / CRITIC_FILE))
    assert names == {n for n, p in policy.named_parameters() if is_critic_parameter(n) and p.requires_grad}
    assert any(".lora_B." in name for name in names) == (critic == "adapter")
    expected = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    perturb(policy, seed=1)
    load_critic(policy, tmp_path)
    for name, parameter in policy.named_parameters():
        if is_critic_parameter(name):
            assert torch.equal(parameter, expected[name]), name
        elif "lora_B" in name:
            assert not torch.equal(parameter, expected[name]), "the policy is not the critic's to load"


def test_padding_changes_nothing_in_front_of_it(tiny_model_folder):
    policy = make_policy(tiny_model_folder).eval()
    batch, _ = collate(SEQUENCES, pad_token_id=0)
    other, _ = collate(SEQUENCES, pad_token_id=77)
    with torch.no_grad():
        one = hidden_states(policy, batch["input_ids"], batch["position_ids"])
        two = hidden_states(policy, other["input_ids"], other["position_ids"])
    for row, (prompt, answer) in enumerate(SEQUENCES):
        length = len(prompt) + len(answer)
        assert torch.equal(one[row, :length], two[row, :length])


def quantised_model(folder, kbits):
    """A small model of bfloat16 around its quantised layers, with a LoRA."""
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    from utils.models.loading import load_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    args = ModelArguments(model_name_or_path=str(folder / "base"), load_in_kbits=kbits)
    base = load_model(args, torch.bfloat16, {"": "cpu"})
    return attach_adapter(base, LoraArguments(lora_rank=2, lora_dropout=0.0, target_modules="all"), kbits)


@pytest.mark.parametrize("kbits", [4, 8])
def test_around_quantised_layers_everything_frozen_stays_in_16_bits(kbits, tmp_path):
    """So do hidden states, and the keys and values of an answer: twice the memory otherwise."""
    model = quantised_model(tmp_path, kbits)
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(wide) == 2 * 2 * 7 and all("lora_" in name for name in wide)
    with torch.no_grad():
        output = model.eval()(input_ids=torch.arange(12).reshape(2, 6), use_cache=True, output_hidden_states=True)
    layers = output.past_key_values.layers
    assert {tensor.dtype for layer in layers for tensor in (layer.keys, layer.values)} == {torch.bfloat16}
    assert {hidden.dtype for hidden in output.hidden_states} == {torch.bfloat16}


@pytest.mark.parametrize("kbits", [4, 8])
def test_a_pass_in_evaluation_mode_leaves_the_gradients_of_a_quantised_base(kbits, tmp_path):
    """bitsandbytes packs 4-bit weights on some CPUs for a kernel without a gradient."""
    model = quantised_model(tmp_path, kbits)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(12).reshape(2, 6)

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert before.keys() == after.keys() and len(before) == 2 * 2 * 7
    for name, gradient in before.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(after[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
