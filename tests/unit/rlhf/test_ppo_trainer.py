"""PPOTrainer: figures of rollouts, whole optimizer steps and bandits with a known optimum, against plain PyTorch."""

import copy
import dataclasses
import json
import math
import zlib

import numpy as np
import pytest
import torch

from support.policies import make_policy, merged, oracle, perturb, plain_experience
from utils.core.errors import InputError
from utils.generation.engine import TextDecoder
from utils.models.loading import causal_model
from utils.rlhf.actor_critic import CRITIC_ADAPTER, is_critic_parameter, use_adapter
from utils.rlhf.arguments import PPOArguments, RolloutArguments
from utils.rlhf.objectives import AdaptiveKL, FixedKL
from utils.rlhf.ppo_trainer import PPOTrainer, Sums
from utils.rlhf.rewards import Rewards
from utils.rlhf.rollouts import minibatches
from utils.text.prompts import CHAT_TEMPLATES, encode_prompt
from utils.text.tokenizer import load_tokenizer, token_surfaces
from utils.training.arguments import RunArguments

TEMPLATE = CHAT_TEMPLATES["llama-2"]
QUESTIONS = ["What is this?", "Tell me about the old house near the river.", "Why?", "Name a bird and a fish."]


def reward_by_text(prompts, answers):
    """A number between 0 and 1 that only the answer's text decides."""
    return [zlib.crc32(answer.encode()) % 1000 / 1000 for answer in answers]


def make_trainer(folder, out, policy, *, questions=QUESTIONS, kl=None, rewards=None, reference=None, args=(), **given):
    """A trainer of `policy`; `given`: RolloutArguments and PPOArguments."""
    given = {"max_new_tokens": 6, "rollout_batch_size": 8, "per_device_rollout_batch_size": 4, **given}
    sampling = {field.name for field in dataclasses.fields(RolloutArguments)}
    rollout_args = RolloutArguments(**{name: value for name, value in given.items() if name in sampling})
    own = {name: value for name, value in given.items() if name not in sampling}
    options = {
        "output_dir": str(out), "precision": "fp32", "report_to": "none", "disable_tqdm": True, "max_steps": 1,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
    }  # fmt: skip
    tokenizer = load_tokenizer(folder)
    prompts = [encode_prompt([{"role": "user", "content": text}], TEMPLATE, tokenizer) for text in questions]
    return PPOTrainer(
        policy,
        RunArguments(**{**options, **dict(args)}),
        prompts,
        {"heldout": prompts[:2]},
        tokenizer,
        TEMPLATE,
        rewards or Rewards(function=("by_text", reward_by_text)),
        rollout_args,
        PPOArguments(**{"kl_limit": None, **own}),
        kl or FixedKL(0.1),
        reference,
    )


# ---------------------------------------------------------------- rollouts


@pytest.mark.parametrize(("temperature", "micro", "together"), [(1.0, 1, 3), (0.7, 3, 8), (0.7, 8, 1)])
def test_figures_of_rollouts_equal_one_sequence_at_a_time(temperature, micro, together, tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder)
    trainer = make_trainer(
        tiny_model_folder, tmp_path, policy, temperature=temperature, per_device_rollout_batch_size=together,
        args={"per_device_train_batch_size": micro},
    )  # fmt: skip
    prompts = [trainer.prompts[n % 4] for n in range(8)]
    rollouts = trainer.sample(policy, prompts, step=3)
    assert [rollout.number for rollout in rollouts] == list(range(8))
    assert [rollout.prompt for rollout in rollouts] == prompts
    assert len({tuple(rollout.answer) for rollout in rollouts}) > 4, "answers are sampled"
    actor = merged(policy, tiny_model_folder, "default")
    base = merged(policy, tiny_model_folder, None)
    for rollout in rollouts:
        logprobs, entropies, _ = oracle(actor, rollout.prompt, rollout.answer, temperature)
        values = oracle(actor, rollout.prompt, rollout.answer, 1.0, policy.critic.value)[2]
        reference = oracle(base, rollout.prompt, rollout.answer, temperature)[0]
        for name, expected in (
            ("logprobs", logprobs), ("entropies", entropies), ("values", values), ("ref_logprobs", reference)
        ):  # fmt: skip
            got = getattr(rollout, name)
            assert got.dtype == torch.float32 and got.device.type == "cpu"
            torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=2e-5, msg=name)
        assert (rollout.logprobs - rollout.ref_logprobs).abs().max() > 1e-3
        assert rollout.score == reward_by_text([""], [rollout.text])[0]


def test_answers_do_not_depend_on_the_batches(tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder)
    answers = []
    for together in (1, 3, 8):
        trainer = make_trainer(tiny_model_folder, tmp_path, policy, per_device_rollout_batch_size=together)
        prompts = [trainer.prompts[n % 4] for n in range(8)]
        answers.append([rollout.answer for rollout in trainer.sample(policy, prompts, step=0)])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] != [rollout.answer for rollout in trainer.sample(policy, prompts, step=1)]


def test_a_reference_of_its_own_is_used(tiny_model_folder, tmp_path):
    from utils.models.lm_loss import install_loss_head

    policy = make_policy(tiny_model_folder)
    reference = merged(policy, tiny_model_folder, "default")
    with torch.no_grad():
        reference.model.layers[0].mlp.down_proj.weight.mul_(1.3)
    plain = copy.deepcopy(reference)
    install_loss_head(reference)
    trainer = make_trainer(tiny_model_folder, tmp_path, policy, reference=reference, temperature=0.7)
    for rollout in trainer.sample(policy, trainer.prompts, step=0):
        expected = oracle(plain, rollout.prompt, rollout.answer, 0.7)[0]
        torch.testing.assert_close(rollout.ref_logprobs, torch.tensor(expected), rtol=1e-4, atol=2e-5)


def test_answers_that_never_end_are_cut_and_counted(tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder)
    rewards = Rewards(function=("zero", lambda p, a: [0] * len(a)), end_bonus=0.25, missing_end_penalty=0.5)
    trainer = make_trainer(tiny_model_folder, tmp_path, policy, rewards=rewards)
    stops = list(trainer.generator.stop_ids)
    rollouts = trainer.sample(policy, trainer.prompts * 8, step=0)
    assert {rollout.score for rollout in rollouts if rollout.ended} <= {0.25}
    assert {rollout.score for rollout in rollouts if not rollout.ended} == {-0.5}
    for rollout in rollouts:
        assert rollout.ended == (rollout.answer[-1] in stops)
        assert rollout.ended or len(rollout.answer) == 6
        assert not any(token in stops for token in rollout.answer[:-1])
    # A policy that cannot end: training goes on.
    trainer.generator.stop_ids = []
    trainer.train()
    assert entries(trainer, "ended") == [0.0] and entries(trainer, "score") == [-0.5]
    assert entries(trainer, "answer_tokens") == [6.0]


def test_min_new_tokens_holds_back_the_end(tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder)
    trainer = make_trainer(tiny_model_folder, tmp_path, policy, min_new_tokens=4, temperature=3.0)
    lengths = [len(rollout.answer) for rollout in trainer.sample(policy, trainer.prompts * 16, step=0)]
    assert min(lengths) >= 4 and max(lengths) == 6


def entries(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ---------------------------------------------------------------- whole steps


def plain_step(policy, rollouts, chosen, optimizer, settings, experience):
    """One optimizer step on rollouts `chosen`, one sequence at a time, with transformers' own logits."""
    advantages, returns, _ = experience
    count = sum(len(rollouts[number].answer) for number in chosen)
    optimizer.zero_grad()
    clipped = 0
    for number in chosen:
        rollout = rollouts[number]
        ids = torch.tensor([[*rollout.prompt, *rollout.answer]])
        output = policy(input_ids=ids, output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[-1]
        if policy.critic.adapter:
            with use_adapter(policy, CRITIC_ADAPTER):
                hidden = policy(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        table = torch.log_softmax(output.logits[0] / settings["temperature"], -1)
        value = hidden[0] @ policy.critic.value.weight[0] + policy.critic.value.bias[0]
        loss = torch.zeros(())
        for t, token in enumerate(rollout.answer):
            place = len(rollout.prompt) + t - 1
            ratio = (table[place, token] - rollout.logprobs[t]).exp()
            low, high = 1 - settings["clip_range"], 1 + settings["clip_range"]
            advantage, target, old = advantages[number][t], returns[number][t], rollout.values[t]
            clipped += bool(ratio * advantage > ratio.clamp(low, high) * advantage)
            actor = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
            cut = old + (value[place] - old).clamp(-settings["value_clip_range"], settings["value_clip_range"])
            critic = 0.5 * torch.max((value[place] - target) ** 2, (cut - target) ** 2)
            loss = loss + actor + settings["value_coef"] * critic
        (loss / count).backward()
    torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], settings["max_grad_norm"])
    optimizer.step()
    return clipped


CASES = {
    "head": {"critic": "head"},
    "adapter": {"critic": "adapter"},
    "embeddings": {"critic": "head", "modules_to_save": "embed_tokens,lm_head"},
    "full": {"critic": "head", "full_finetuning": True},
}
STEP = {"temperature": 0.7, "clip_range": 0.02, "value_clip_range": 0.03, "value_coef": 0.3}


@pytest.mark.parametrize(
    ("case", "micro", "accumulate"),
    [("head", 4, 1), ("head", 1, 4), ("head", 2, 2), ("adapter", 2, 2), ("embeddings", 2, 2), ("full", 2, 2)],
)
def test_an_iteration_equals_a_plain_ppo(case, micro, accumulate, tiny_model_folder, tmp_path):
    """Two passes of two optimizer steps, with everything that clips at work, however the batch is cut."""
    policy = make_policy(tiny_model_folder, **CASES[case])
    options = {
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.4,
        "weight_decay": 0.1, "adam_epsilon": 1e-4, "learning_rate": 2e-3,
    }  # fmt: skip
    reference = merged(policy, tiny_model_folder, None) if case == "full" else None
    if reference is not None:
        from utils.models.lm_loss import install_loss_head

        install_loss_head(reference)
    trainer = make_trainer(
        tiny_model_folder, tmp_path, policy, args=options, critic_learning_rate=5e-3, reference=reference, **STEP
    )
    plain = copy.deepcopy(policy)
    from utils.rlhf.rollouts import prompt_numbers

    prompts = [trainer.prompts[number] for number in prompt_numbers(0, 8, 4, trainer.args.seed)]
    rollouts = trainer.sample(policy, prompts, step=0)
    experience = plain_experience(rollouts, 0.1, "k1", None, False, True, 1.0, 0.95)
    groups = []
    for critic in (False, True):
        for bias in (False, True):
            chosen = [
                p for n, p in plain.named_parameters()
                if p.requires_grad and is_critic_parameter(n) == critic
                and (n.endswith("bias") or "norm" in n) == bias
            ]  # fmt: skip
            rate, decay = (5e-3 if critic else 2e-3), (0.0 if bias else 0.1)
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, eps=1e-4)
    before = {name: p.detach().clone() for name, p in plain.named_parameters() if p.requires_grad}
    order = trainer.build(rollouts)  # for the order of minibatches only
    clipped = 0
    for epoch in range(2):
        for micro_batches in minibatches(order, 4, 4, (trainer.args.seed, 0, epoch), 0, 1):
            clipped += plain_step(
                plain,
                rollouts,
                [n for part in micro_batches for n in part],
                optimizer,
                {**STEP, "max_grad_norm": 0.4},
                experience,
            )
    trainer.train()
    assert clipped > 0
    got = dict(policy.named_parameters())
    for name, parameter in plain.named_parameters():
        if not parameter.requires_grad:
            continue
        torch.testing.assert_close(got[name], parameter, rtol=0, atol=1e-6, msg=name)
    moved = {name: (got[name] - value).abs().max().item() for name, value in before.items()}
    assert all(distance > 1e-4 for distance in moved.values()), moved
    tokens = sum(len(rollout.answer) for rollout in rollouts)
    assert entries(trainer, "clip_fraction")[0] == pytest.approx(clipped / 2 / tokens, rel=0.3)
    assert entries(trainer, "updates") == [4.0]


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 4), (0.5, 2), (0.7, 3), (2.0, 8)])
def test_tuning_samples_add_the_gradient_of_their_mean_loss(ratio, count, tiny_model_folder, tmp_path):
    """Of one optimizer step over 4 answers, in micro-batches of 2, against transformers' own loss on each sample."""
    from torch.nn import functional

    from utils.data.batches import Collator
    from utils.rlhf.rollouts import prompt_numbers

    samples = [
        ([5, 6, 7, 8, 9], 2),
        ([11, 12, 13], 1),
        ([20, 21, 22, 23, 24, 25], 4),
        ([30, 31], 1),
        ([40, 41, 42], 2),
    ]

    class TuningSet:
        num_samples = len(samples)
        document_ends = np.cumsum([len(ids) for ids, _ in samples])
        tokens = np.concatenate([ids for ids, _ in samples])
        trained = np.concatenate([np.arange(len(ids)) >= start for ids, start in samples])

    policy = make_policy(tiny_model_folder)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    trainer = make_trainer(
        tiny_model_folder, tmp_path, policy, temperature=0.7, sft_coef=0.5, sft_ratio=ratio, args=options
    )
    assert isinstance(trainer.data_collator, Collator)
    experience = trainer.build(trainer.sample(policy, trainer.prompts * 2, step=0))
    gradients = []
    trainer.create_optimizer()
    trainer.optimizer.step = lambda: gradients.append(
        {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    )
    policy.train()
    for tuning_set in (None, TuningSet()):
        trainer.tuning_set = tuning_set
        figures = trainer._optimizer_step(policy, experience, [[0, 1], [2, 3]], 4, update=1)
    chosen = [samples[n] for n in prompt_numbers(1, count, len(samples), trainer.args.seed + 1)]
    total, tokens = 0.0, sum(len(ids) - start for ids, start in chosen)
    policy.zero_grad()
    for ids, start in chosen:
        logits = policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
        total = total + functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum")
    (0.5 * total / tokens).backward()
    assert figures["sft_loss"] == pytest.approx(total.item() / tokens, rel=1e-5)
    for name, parameter in policy.named_parameters():
        if name in gradients[1]:
            extra = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradients[1][name], gradients[0][name] + extra, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_of_an_adapter_to_go_on_with_is_off(tiny_model_folder, tmp_path):
    """Else the first step's ratios would not be 1."""
    policy = make_policy(tiny_model_folder, lora_dropout=0.5)
    policy.train()
    trainer = make_trainer(
        tiny_model_folder, tmp_path, policy, rollout_batch_size=4, ppo_epochs=1, args={"learning_rate": 1e-9}
    )
    trainer.train()
    assert entries(trainer, "updates") == [1.0] and entries(trainer, "approx_kl")[0] < 1e-8


def test_weights_that_are_not_trained_stay(tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder)
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}
    make_trainer(tiny_model_folder, tmp_path, policy, args={"max_steps": 2}).train()
    after = dict(policy.named_parameters())
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_first_and_the_last_iteration_learn(tiny_model_folder, tmp_path):
    """An iteration is too dear for a learning rate of 0, which warm-up begins with and decay ends with."""
    policy = make_policy(tiny_model_folder)
    options = {"max_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "linear", "learning_rate": 1e-3}
    trainer = make_trainer(tiny_model_folder, tmp_path, policy, args=options)
    trainer.train()
    assert entries(trainer, "learning_rate") == pytest.approx([5e-4, 1e-3, 2 / 3 * 1e-3, 1 / 3 * 1e-3])


def test_early_stop_ends_an_iterations_updates(tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder)
    trainer = make_trainer(
        tiny_model_folder, tmp_path, policy, early_stop_kl=1e-4, ppo_epochs=4,
        args={"learning_rate": 0.05, "per_device_train_batch_size": 2},
    )  # fmt: skip
    trainer.train()
    assert 2 <= entries(trainer, "updates")[0] < 16


def test_an_adaptive_coefficient_follows_the_kl(tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder)
    kl = AdaptiveKL(0.1, target=1e-3, horizon=100)
    trainer = make_trainer(tiny_model_folder, tmp_path, policy, kl=kl, args={"max_steps": 3})
    trainer.train()
    expected = 0.1
    for measured, logged in zip(entries(trainer, "kl"), entries(trainer, "kl_coef"), strict=True):
        expected *= 1 + min(max(measured / 1e-3 - 1, -0.2), 0.2) * 8 / 100
        assert logged == pytest.approx(expected)
    assert trainer.kl.value == pytest.approx(expected) and expected != 0.1


def test_a_kl_above_its_limit_stops_and_names_the_checkpoint(tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder)
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "complete").touch()
    trainer = make_trainer(tiny_model_folder, tmp_path, perturb(policy, scale=3.0), kl_limit=1e-3)
    with pytest.raises(InputError, match=r"above --kl_limit 0.001.*raise --kl_coef.*checkpoint-3"):
        trainer.train()


def test_a_policy_that_breaks_names_the_checkpoint(tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder)
    trainer = make_trainer(tiny_model_folder, tmp_path, policy)
    rollouts = trainer.sample(policy, trainer.prompts, 0)
    rollouts[0].logprobs[0] = math.nan
    with pytest.raises(InputError, match=r"not finite at iteration 1.*lower --learning_rate.*checkpoint is none"):
        trainer.build(rollouts)


@pytest.mark.slow
def test_nothing_is_kept_from_iteration_to_iteration(tiny_model_folder, tmp_path):
    """Tensors alive after 2 and after 4 iterations."""
    import gc

    alive = []

    class Counting(PPOTrainer):
        def _iterate(self, model):
            super()._iterate(model)
            gc.collect()
            alive.append(sum(torch.is_tensor(thing) for thing in gc.get_objects()))

    trainer = make_trainer(
        tiny_model_folder, tmp_path, make_policy(tiny_model_folder), args={"max_steps": 4, "logging_steps": 100}
    )
    trainer.__class__ = Counting
    trainer.train()
    assert alive[1] == alive[-1]


# ---------------------------------------------------------------- evaluation


def test_evaluation_is_greedy_repeatable_and_leaves_the_model_as_it_was(tiny_model_folder, tmp_path):
    policy = make_policy(tiny_model_folder)
    trainer = make_trainer(tiny_model_folder, tmp_path, policy)
    policy.train()
    first = trainer.evaluate()
    assert policy.training
    actor = merged(policy, tiny_model_folder, "default")
    scores = []
    for prompt in trainer.prompts[:2]:
        ids = actor.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=trainer.generator.stop_ids,
            pad_token_id=0, attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        )[0, len(prompt) :].tolist()  # fmt: skip
        text = trainer.generator.token_bytes
        decoder = TextDecoder(text, True)
        body = ids[:-1] if ids[-1] in trainer.generator.stop_ids else ids
        scores += reward_by_text([""], [decoder.push(body) + decoder.finish()])
    assert first["eval_score"] == first["eval_heldout_score"] == pytest.approx(sum(scores) / 2, abs=1e-6)
    second = trainer.evaluate()
    assert {k: v for k, v in first.items() if v == v} == {k: v for k, v in second.items() if v == v}
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2, "an evaluation of the same step replaces the last one"
    assert {"step", "set", "prompt", "answer", "score", "kl", "tokens"} == lines[0].keys()
    assert QUESTIONS[0] in lines[0]["prompt"]


def test_sampled_answers_may_hold_what_some_take_for_the_end_of_a_line(tiny_model_folder, tmp_path):
    trainer = make_trainer(tiny_model_folder, tmp_path, make_policy(tiny_model_folder))
    samples = [{"step": step, "answer": "one\u2028two\x85three\u2029"} for step in (1, 2)]
    for sample in samples:
        trainer.state.global_step = sample["step"]
        trainer._write_samples([sample])
    lines = (tmp_path / "samples.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines if line] == samples


def test_figures_that_do_not_exist_are_not_logged(tiny_model_folder, tmp_path):
    """Without a reward that varies no variance can be explained; NaN is no JSON."""
    rewards = Rewards(function=("zero", lambda prompts, answers: [0.0] * len(answers)))
    policy = make_policy(tiny_model_folder)
    torch.nn.init.zeros_(policy.critic.value.weight)
    torch.nn.init.zeros_(policy.critic.value.bias)
    trainer = make_trainer(
        tiny_model_folder, tmp_path, policy, rewards=rewards, kl=FixedKL(0.0), args={"max_steps": 2}
    )
    trainer.train()
    assert all(
        math.isfinite(value) for entry in trainer.state.log_history for value in entry.values()
        if isinstance(value, float)
    )  # fmt: skip
    assert not entries(trainer, "explained_variance")


def test_sums():
    sums = Sums()
    sums.add({"a": 1.0, "b": 2.0})
    sums.add({"a": 3.0})
    assert sums.take_means() == {"a": 2.0, "b": 2.0} and sums.take_means() == {}


# ---------------------------------------------------------------- bandits


def bandit(folder, tmp_path, beta, temperature, questions, learning_rate, **options):
    """One-token answers, whose reward follows from the token.

    Returns: log-probabilities of the reference and of the trained policy (prompts, V), and the rewards (V,).
    """
    policy = perturb(make_policy(folder, modules_to_save="lm_head", target_modules="q_proj"), scale=-0.1)
    trainer = make_trainer(
        folder, tmp_path, policy, questions=questions, kl=FixedKL(beta), max_new_tokens=1, temperature=temperature,
        value_clip_range=None, **options,
        args={
            "max_steps": 30, "learning_rate": learning_rate, "per_device_train_batch_size": 256,
            "lr_scheduler_type": "linear", "logging_steps": 1000,
        },
    )  # fmt: skip
    surfaces = token_surfaces(trainer.processing_class)
    texts = []
    for token in range(causal_model(policy).config.vocab_size):
        decoder = TextDecoder(surfaces, True)
        texts.append("" if token in trainer.generator.stop_ids else decoder.push([token]) + decoder.finish())
    table = torch.tensor(reward_by_text(texts, texts), dtype=torch.float64)

    @torch.no_grad()
    def distributions():
        policy.eval()
        logits = [policy(input_ids=torch.tensor([prompt])).logits[0, -1].double() for prompt in trainer.prompts]
        return torch.log_softmax(torch.stack(logits) / temperature, -1)

    reference = distributions()
    trainer.train()
    return reference, distributions(), table


@pytest.mark.slow
def test_ppo_solves_a_bandit(tiny_model_folder, tmp_path):
    size = {"rollout_batch_size": 256, "per_device_rollout_batch_size": 256, "ppo_epochs": 4}
    reference, policy, table = bandit(tiny_model_folder, tmp_path, 0.0, 1.0, QUESTIONS[:2], 0.015, **size)
    before, after = (reference.exp() @ table).mean().item(), (policy.exp() @ table).mean().item()
    assert before < 0.6 * table.max() and after >= 0.95 * table.max(), (before, after, table.max())


@pytest.mark.slow
def test_ppo_with_kl_reaches_the_tilted_reference(tiny_model_folder, tmp_path):
    """max E[r] - beta KL(pi || ref) is beta log sum ref exp(r / beta), at pi ~ ref exp(r / beta)."""
    beta = 0.2
    size = {"rollout_batch_size": 256, "per_device_rollout_batch_size": 256, "ppo_epochs": 2}
    reference, policy, table = bandit(tiny_model_folder, tmp_path, beta, 0.5, QUESTIONS[:1], 0.003, **size)

    def objective(logprobs):
        kl = (logprobs.exp() * (logprobs - reference)).sum(-1)
        return (logprobs.exp() @ table - beta * kl).mean().item()

    best = beta * torch.logsumexp(reference + table / beta, -1).mean().item()
    tilted = torch.log_softmax(reference + table / beta, -1)
    assert objective(tilted) == pytest.approx(best)
    assert objective(reference) < 0.8 * best
    assert 0.95 * best <= objective(policy) <= best
    kl = (policy.exp() * (policy - reference)).sum(-1).mean().item()
    assert kl == pytest.approx((tilted.exp() * (tilted - reference)).sum(-1).mean().item(), rel=0.3)
