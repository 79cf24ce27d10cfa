"""Small policies with critics, and what PEFT and a plain loop make of them."""

import math
import random

import torch
from transformers import AutoModel, LlamaForCausalLM

from utils.core.arguments import ExtendArguments, LoraArguments, ModelArguments
from utils.models.training_model import attach_adapter, build_training_model
from utils.rlhf.actor_critic import CRITIC_ADAPTER, Critic, add_critic_adapter, attach_critic
from utils.rlhf.rollouts import Rollout
from utils.text.tokenizer import load_tokenizer

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": "q_proj,v_proj,down_proj"}


def perturb(model, seed=0, scale=0.1):
    """Random numbers in all that starts at zero (lora_B, the value head), which would hide faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            starts_at_zero = "lora_B" in name or name.startswith("critic.value") or "modules_to_save" in name
            if starts_at_zero and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def make_policy(folder, critic="head", **lora):
    """A policy with an attached critic, float32, perturbed."""
    lora_args = LoraArguments(**{**LORA, **lora})
    model_args = ModelArguments(model_name_or_path=str(folder), dtype="float32")
    torch.manual_seed(0)
    policy = build_training_model(
        model_args, ExtendArguments(), lora_args, load_tokenizer(folder), torch.float32, seed=0
    )
    if not lora_args.full_finetuning:
        policy = attach_adapter(policy, lora_args, 16)
    if critic == "adapter":
        add_critic_adapter(policy)
        attach_critic(policy, Critic(32, CRITIC_ADAPTER))
    elif critic == "model":
        attach_critic(policy, Critic(32, model=AutoModel.from_pretrained(folder)))
        with torch.no_grad():
            policy.critic.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    else:
        attach_critic(policy, Critic(32))
    return perturb(policy)


def merged(policy, folder, adapter):
    """A plain transformers model with an adapter of the policy in its weights, by hand; None: the base itself."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    state = policy.state_dict()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            if (down := state.get(f"{prefix}.lora_A.{adapter}.weight")) is not None:
                weight += 2.0 * state[f"{prefix}.lora_B.{adapter}.weight"] @ down
            if (saved := state.get(f"{prefix}.modules_to_save.{adapter}.weight")) is not None:
                weight.copy_(saved)
    return model


@torch.no_grad()
def oracle(model, prompt, answer, temperature=1.0, value=None):
    """Log-probabilities, entropies and values of each answer token: one sequence, transformers' own logits."""
    output = model(input_ids=torch.tensor([[*prompt, *answer]]), output_hidden_states=True, use_cache=False)
    table = torch.log_softmax(output.logits[0].double() / temperature, -1)
    logprobs, entropies, values = [], [], []
    for number, token in enumerate(answer):
        row = table[len(prompt) + number - 1]
        logprobs.append(row[token].item())
        entropies.append(-sum(p * math_log for p, math_log in zip(row.exp().tolist(), row.tolist(), strict=True)))
        if value is not None:
            hidden = output.hidden_states[-1][0, len(prompt) + number - 1].double()
            values.append((hidden @ value.weight[0].double() + value.bias[0].double()).item())
    return logprobs, entropies, values


def make_rollouts(count=7, seed=0, longest=6):
    generator = random.Random(seed)
    rollouts = []
    for number in range(count):
        length = generator.randint(1, longest)
        figures = {
            name: torch.tensor([generator.gauss(0, 1) for _ in range(length)])
            for name in ("logprobs", "ref_logprobs", "values", "entropies")
        }
        prompt = [generator.randint(3, 90) for _ in range(generator.randint(1, 8))]
        answer = [generator.randint(3, 90) for _ in range(length)]
        score = generator.gauss(0, 3)
        rollouts.append(Rollout(prompt, answer, f"text {number}", number % 2 == 0, number, **figures, score=score))
    return rollouts


def plain_experience(rollouts, kl_coef, estimator, clip, whiten_scores, whiten_advantages, gamma, lam):
    """Everything with Python floats, answer by answer."""
    scores = [rollout.score for rollout in rollouts]
    if clip is not None:
        scores = [max(-clip, min(clip, score)) for score in scores]
    if whiten_scores:
        mean = sum(scores) / len(scores)
        variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
        scores = [(score - mean) / math.sqrt(variance + 1e-8) for score in scores]
    all_advantages, all_returns, all_kl = [], [], []
    for rollout, score in zip(rollouts, scores, strict=True):
        kl = []
        for new, reference in zip(rollout.logprobs.tolist(), rollout.ref_logprobs.tolist(), strict=True):
            k1 = new - reference
            kl.append({"k1": k1, "k2": k1 * k1 / 2, "k3": math.exp(-k1) - 1 + k1}[estimator])
        rewards = [-kl_coef * value for value in kl]
        rewards[-1] += score
        values = [*rollout.values.tolist(), 0.0]
        # The definition, not the recursion: A_t = sum over l of (gamma lam)^l delta_(t+l).
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(len(rewards))]
        advantages = [
            sum((gamma * lam) ** later * delta for later, delta in enumerate(deltas[t:])) for t in range(len(deltas))
        ]
        all_returns.append([a + v for a, v in zip(advantages, values, strict=False)])
        all_advantages.append(advantages)
        all_kl.append(kl)
    if whiten_advantages:
        flat = [value for row in all_advantages for value in row]
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in flat) / (len(flat) - 1) + 1e-8)
        all_advantages = [[(value - mean) / deviation for value in row] for row in all_advantages]
    return all_advantages, all_returns, all_kl
