"""Rewards: functions good and bad, weights, ends, and a reward adapter on the policy's own weights."""

import json
import math
import random

import pytest
import torch

from support.policies import make_policy, make_rollouts, perturb
from utils.core.errors import InputError
from utils.rlhf.actor_critic import CRITIC_ADAPTER, is_critic_parameter
from utils.rlhf.reward_model import load_reward_model, set_pad_token
from utils.rlhf.rewards import REWARD_ADAPTER, BackboneReward, Rewards, call_reward_function, load_reward_function
from utils.text.prompts import CHAT_TEMPLATES

# ---------------------------------------------------------------- functions


def write(tmp_path, text, name="rewards.py"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_function_is_found_and_called(tmp_path):
    path = write(
        tmp_path, "def polite(prompts, answers):\n    return [len(p) - len(a) for p, a in zip(prompts, answers)]\n"
    )
    name, function = load_reward_function(f"{path}:polite")
    assert name == f"{path}:polite"
    assert call_reward_function(name, function, ["abc", "d"], ["a", "bcd"]) == [2.0, -2.0]


def test_a_file_with_dataclasses_can_be_run(tmp_path):
    """They look up their own module in sys.modules."""
    path = write(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Rule:\n"
        "    word: str\n\n\ndef score(prompts, answers):\n    return [Rule('yes').word in a for a in answers]\n",
    )
    _, function = load_reward_function(f"{path}:score")
    assert list(function(["", ""], ["yes", "no"])) == [True, False]


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("x = 1", "rewards.py", r"need file.py:name"),
        ("x = 1", "rewards.py:", r"need file.py:name"),
        ("x = 1", "rewards.txt:f", r"need file.py:name"),
        ("x = 1", "absent.py:f", r"there is no file .*absent.py"),
        ("def g(a, b): pass\ndef h(a): pass", "rewards.py:f", r"has no function f; it has g, h"),
        ("x = 1", "rewards.py:f", r"has no function f; it has none"),
        ("x = 1", "rewards.py:x", r"has no function x"),
        ("a = 1\ndef f(a, b:\n", "rewards.py:f", r"failed: SyntaxError: .*\(rewards.py, line 2\)"),
        ("a = 1\n\nb = 1 / 0\n", "rewards.py:f", r"failed: ZeroDivisionError: .*\(rewards.py, line 3\)"),
        ("import no_such_module_here", "rewards.py:f", r"failed: ModuleNotFoundError: .*no_such_module_here"),
        ("def f(answers): return []", "rewards.py:f", r"called as f\(prompts, answers\), but too many positional"),
        ("def f(a, b, c): return []", "rewards.py:f", r"called as f\(prompts, answers\), but missing .*'c'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(text, spec, message, tmp_path):
    write(tmp_path, text)
    with pytest.raises(InputError, match=message):
        load_reward_function(f"{tmp_path}/{spec}")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('colour')", r"raised KeyError: 'colour' \(rewards.py, line 2\)"),
        ("return [1.0]", r"returned 1 rewards for 2 answers"),
        ("return [1.0, 2.0, 3.0]", r"returned 3 rewards for 2 answers"),
        ("return None", r"returned None; need a list of numbers"),
        ("return 0.5", r"returned 0.5; need a list of numbers"),
        ("return ['good', 'bad']", r"returned \['good', 'bad'\]; need a list of numbers"),
        ("return [[1.0], [2.0]]", r"need a list of numbers"),
        ("return [1.0, float('nan')]", r"returned nan for the answer 'second' to 'why'"),
        ("return [float('inf'), 0]", r"returned inf for the answer 'first' to 'what'"),
        ("return [None, 0]", r"need a list of numbers"),
        ("return (1 / (len(a) - 6) for a in answers)", r"raised ZeroDivisionError: .*line 2"),
        ("answers.pop(); return [1.0]", r"returned 1 rewards for 2 answers"),
    ],
)
def test_a_function_that_fails_is_named(body, message, tmp_path):
    path = write(tmp_path, f"def f(prompts, answers):\n    {body}\n")
    with pytest.raises(InputError, match=message):
        call_reward_function(*load_reward_function(f"{path}:f"), ["what", "why"], ["first", "second"])


@pytest.mark.parametrize(
    "body", ["torch.tensor([1.0, 2.0])", "numpy.array([1, 2])", "(1, 2)", "(n + 1 for n in range(2))"]
)
def test_anything_that_holds_numbers_will_do(body, tmp_path):
    path = write(tmp_path, f"import numpy, torch\ndef f(prompts, answers):\n    return {body}\n")
    assert call_reward_function(*load_reward_function(f"{path}:f"), ["a", "b"], ["c", "d"]) == [1.0, 2.0]


# ---------------------------------------------------------------- sums


class Lengths:
    """A reward model whose scores are the lengths of the answers."""

    def score(self, sequences, batch_size=16):
        return torch.tensor([float(len(answer)) for _, answer in sequences])


def test_model_and_function_are_weighted_and_ends_count():
    rollouts = make_rollouts(6)
    rewards = Rewards(
        Lengths(), ("half", lambda prompts, answers: [float(p) for p in prompts]), model_weight=0.5,
        function_weight=-2.0, end_bonus=10.0, missing_end_penalty=100.0,
    )  # fmt: skip
    rewards.score(rollouts, [str(number) for number in range(6)])
    for number, rollout in enumerate(rollouts):
        expected = 0.5 * len(rollout.answer) - 2.0 * number + (10.0 if rollout.ended else -100.0)
        assert rollout.score == pytest.approx(expected)


def test_no_answers_are_no_work():
    """A process may have none: fewer held-out prompts than processes."""

    class Fails:
        def score(self, sequences, batch_size=16):
            raise AssertionError

    Rewards(Fails(), ("fails", lambda prompts, answers: 1 / 0)).score([], [])


def test_a_reward_model_that_is_damaged_is_named():
    class Broken:
        def score(self, sequences, batch_size=16):
            return torch.full((len(sequences),), math.nan)

    with pytest.raises(InputError, match="the reward model's scores are not finite"):
        Rewards(Broken()).score(make_rollouts(2), ["", ""])


# ---------------------------------------------------------------- a reward adapter on the policy's weights


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory, tiny_model_folder):
    """What rm.py would save: an adapter of other modules than the policy's, with its head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from utils.lora.base_record import record_base
    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    folder = tmp_path_factory.mktemp("rewards") / "rm"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=6, target_modules=["k_proj", "q_proj", "up_proj"])
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "score.modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    record_base(folder, str(tiny_model_folder))
    tokenizer = load_tokenizer(tiny_model_folder)
    tokenizer.chat_template = CHAT_TEMPLATES["llama-2"]
    set_pad_token(tokenizer, tokenizer.chat_template)
    save_tokenizer(tokenizer, folder)
    return folder


def sequences(count=9, seed=1):
    generator = random.Random(seed)
    return [
        ([1, *(generator.randint(3, 390) for _ in range(generator.randint(1, 12)))],
         [generator.randint(3, 390) for _ in range(generator.randint(1, 9))])
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("critic", ["head", "adapter"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_shared_backbone_scores_as_a_model_of_its_own(critic, batch_size, reward_folder, tiny_model_folder):
    policy = make_policy(tiny_model_folder, critic, modules_to_save="embed_tokens,lm_head").eval()
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    ids = torch.tensor([[1, 9, 30, 31]])
    with torch.no_grad():
        before = policy(input_ids=ids).logits
    shared = BackboneReward(policy, reward_folder, 0, torch.device("cpu"))
    expected = load_reward_model(reward_folder, "float32", "cpu").score(sequences())
    assert expected.std() > 0.1
    torch.testing.assert_close(shared.score(sequences(), batch_size), expected, rtol=1e-5, atol=1e-5)
    # The policy is what it was, and trains what it trained.
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trained
    assert any(f".lora_A.{CRITIC_ADAPTER}." in name for name in trained) == (critic == "adapter")
    assert any(is_critic_parameter(name) for name in trained)
    with torch.no_grad():
        assert torch.equal(policy(input_ids=ids).logits, before)
    # Training the policy does not move the reward.
    perturb(policy, seed=3)
    torch.testing.assert_close(shared.score(sequences(), batch_size), expected, rtol=1e-5, atol=1e-5)


def test_one_sequence_at_a_time_with_transformers_own_pooling(reward_folder, tiny_model_folder):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=1, pad_token_id=0)
    plain = PeftModel.from_pretrained(plain, reward_folder).eval()
    shared = BackboneReward(make_policy(tiny_model_folder), reward_folder, 0, torch.device("cpu"))
    scores = shared.score(sequences(), 4)
    for score, (prompt, answer) in zip(scores.tolist(), sequences(), strict=True):
        with torch.no_grad():
            assert score == pytest.approx(plain(torch.tensor([[*prompt, *answer]])).logits.item(), rel=1e-5, abs=1e-5)


def test_the_reward_adapter_is_no_part_of_what_is_trained_or_saved(reward_folder, tiny_model_folder):
    policy = make_policy(tiny_model_folder)
    BackboneReward(policy, reward_folder, 0, torch.device("cpu"))
    names = [name for name, _ in policy.named_parameters() if f".{REWARD_ADAPTER}." in name]
    assert names and not any(dict(policy.named_parameters())[name].requires_grad for name in names)


def test_an_adapter_without_a_head_is_refused(reward_folder, tiny_model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in reward_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "score" not in k}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="no score head"):
        BackboneReward(make_policy(tiny_model_folder), tmp_path, 0, torch.device("cpu"))


def test_an_adapter_with_more_than_low_rank_updates_is_refused(reward_folder, tiny_model_folder, tmp_path):
    """Its embeddings would have to take the policy's place; the caller loads it as a model of its own."""
    for path in reward_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["modules_to_save"] = ["score", "embed_tokens"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert BackboneReward.fits(reward_folder)
    assert not BackboneReward.fits(tmp_path)
