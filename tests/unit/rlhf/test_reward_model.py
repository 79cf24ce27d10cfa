"""Reward models: scores of packed rows against one forward pass an answer, pooling, padding tokens, the report.

TRL_PYTHON names a Python with current TRL (see test_objectives.py); without it the comparison with TRL is skipped.
"""

import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from support.tokenizers import train_sentencepiece, write_sentencepiece
from utils.core.errors import InputError
from utils.data.batches import Example, PairCollator, model_inputs
from utils.data.preferences import Pair
from utils.rlhf.objectives import reward_model_loss
from utils.rlhf.reward_model import (
    RewardModel,
    check_same_tokenizer,
    initialise_head,
    install_score_head,
    load_classifier,
    score_places,
    set_pad_token,
)
from utils.rlhf.reward_trainer import calibrate, describe_scores
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import load_tokenizer, save_tokenizer

VOCABULARY, PAD = 97, 1


def some_examples(count: int = 4) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        prompt, chosen, rejected = (rng.integers(3, VOCABULARY, size=int(rng.integers(1, 12))) for _ in range(3))
        examples.append(Example(number, Pair(prompt, chosen, rejected, (False, False), 0.1 * number, "here")))
    return examples


def tiny_classifier(seed: int = 0):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, num_labels=1, pad_token_id=PAD,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def answers_of(examples: list[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (example.pair.prompt, answer)
        for example in examples
        for answer in (example.pair.chosen, example.pair.rejected)
    ]


def score_one_by_one(model, answers) -> torch.Tensor:
    """transformers' own classification forward, an answer at a time: (N,)."""
    scores = [model(input_ids=torch.from_numpy(np.concatenate(pair))[None]).logits[0, 0] for pair in answers]
    return torch.stack(scores)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_packed_scores_and_gradients_equal_separate_forward_passes(attention):
    examples = some_examples()
    plain, packed = tiny_classifier(), tiny_classifier()
    expected = score_one_by_one(plain, answers_of(examples)).view(-1, 2)
    margins = [example.pair.margin for example in examples]
    losses = [
        -torch.nn.functional.logsigmoid(chosen - rejected - margin) + 0.02 * (chosen + rejected) ** 2
        for (chosen, rejected), margin in zip(expected, margins, strict=True)
    ]
    (sum(losses) / len(losses)).backward()

    install_score_head(packed)
    batch = PairCollator(PAD, attention)(examples)
    with score_places(packed, batch["last"]):
        output = packed(**model_inputs(batch), use_cache=False)
    scores = output.logits.view(-1, 2)
    loss = reward_model_loss(scores[:, 0], scores[:, 1], batch["margins"], 0.02).mean()
    loss.backward()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    gradients = dict(packed.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_outside_the_block_the_model_is_transformers_own():
    plain, packed = tiny_classifier(), tiny_classifier()
    install_score_head(packed)
    ids = torch.tensor([[5, 6, 7, PAD], [8, 9, 10, 11]])
    assert torch.equal(plain(input_ids=ids).logits, packed(input_ids=ids).logits)
    assert packed.state_dict().keys() == plain.state_dict().keys()


def test_scores_are_float32_where_the_model_is_not():
    model = tiny_classifier()
    install_score_head(model)
    with torch.autocast("cpu", torch.bfloat16), score_places(model, torch.tensor([3])):
        score = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    assert score.dtype == torch.float32
    assert score.item() != score.bfloat16().item()


def test_a_head_that_is_none_is_refused():
    from transformers import LlamaForSequenceClassification

    config = tiny_classifier().config
    config.num_labels = 3
    with pytest.raises(InputError, match="no plain scalar head"):
        install_score_head(LlamaForSequenceClassification(config))


def test_a_new_head_is_the_same_for_a_seed_and_small():
    weights = [torch.nn.Parameter(torch.zeros(1, 4095)) for _ in range(3)]
    for weight, seed in zip(weights, (1, 1, 2), strict=True):
        torch.rand(seed)  # the state of the global generator does not matter
        initialise_head(weight, seed)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(1 / 64, rel=0.05)


# ---------------------------------------------------------------- padding tokens, other tokenizers


@pytest.mark.parametrize("pad", ["absent", "eos", "own"])
def test_padded_batches_score_alike_in_transformers_whatever_the_padding_token(pad, tiny_model_folder, tmp_path):
    """An answer's end token must not be taken for padding, nor padding for an answer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from utils.core.arguments import ModelArguments
    from utils.data.preferences import encode_answers

    tokenizer = load_tokenizer(tiny_model_folder)
    template = CHAT_TEMPLATES["llama-2"]
    tokenizer.pad_token = {"absent": None, "eos": "</s>", "own": "<unk>"}[pad]
    set_pad_token(tokenizer, template)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert (tokenizer.pad_token == "<unk>") == (pad == "own")
    model = load_classifier(
        ModelArguments(str(tiny_model_folder)), torch.float32, tokenizer.pad_token_id, seed=3
    ).eval()
    texts = ("the cat is here and there", "yes", "no no no")
    prompt, answers = encode_answers([{"role": "user", "content": "the dog"}], texts, template, tokenizer)
    answers[2] = answers[2][:-1]  # cut: no end token
    scores = RewardModel(model, tokenizer, template).score([(prompt, answer) for answer in answers], batch_size=2)

    model.save_pretrained(tmp_path / "rm")
    save_tokenizer(tokenizer, tmp_path / "rm")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert theirs.pad_token_id == reloaded.config.pad_token_id == tokenizer.pad_token_id
    for side in ("right", "left"):
        theirs.padding_side = side
        batch = theirs.pad({"input_ids": [[*prompt, *answer] for answer in answers]}, return_tensors="pt")
        with torch.no_grad():
            got = reloaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        torch.testing.assert_close(got, scores, rtol=1e-5, atol=1e-5)
    assert len(set(scores.tolist())) == 3


def test_a_tokenizer_whose_only_special_token_ends_answers_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "<pad>": 3}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<end>")
    with pytest.raises(InputError, match=r"no special token but those that end an answer \(<end>\)"):
        set_pad_token(tokenizer, template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    set_pad_token(tokenizer, template)
    assert tokenizer.pad_token_id == 3


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(
    base_tokenizer_folder, extended_tokenizer_folder, tmp_path
):
    base, extended = load_tokenizer(base_tokenizer_folder), load_tokenizer(extended_tokenizer_folder)
    check_same_tokenizer(base, load_tokenizer(base_tokenizer_folder))
    with pytest.raises(InputError, match=r"token 400 is None in the reward model's .*400 tokens\) but '的' in"):
        check_same_tokenizer(base, extended)
    with pytest.raises(InputError, match=r"token 400 is '的' in the reward model's .*but None"):
        check_same_tokenizer(extended, base)
    other = write_sentencepiece(tmp_path / "other", train_sentencepiece(["zebra quiz"] * 50, 270))
    with pytest.raises(InputError, match="token 259 is"):
        check_same_tokenizer(base, load_tokenizer(other))


# ---------------------------------------------------------------- scoring


def test_scores_come_in_the_order_given_whatever_the_batch_size(tiny_model_folder):
    model = tiny_classifier()
    answers = answers_of(some_examples(5))
    with torch.no_grad():
        expected = score_one_by_one(model, answers)
    install_score_head(model)
    tokenizer = load_tokenizer(tiny_model_folder)
    done: list[int] = []
    for batch_size in (1, 3, 64):
        scores = RewardModel(model, tokenizer, "").score(answers, batch_size, done.append)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert sum(done) == 3 * len(answers)
    assert RewardModel(model, tokenizer, "").score([]).shape == (0,)
    with pytest.raises(InputError, match="answer 1 has no tokens"):
        RewardModel(model, tokenizer, "").score([([5], [6]), ([5], [])])


# ---------------------------------------------------------------- the report


def test_the_report_is_what_a_plain_count_gives():
    # four pairs: right by 2, wrong by 1, a tie, right by 0.1
    scores = np.array([[1.0, -1.0], [0.0, 1.0], [0.5, 0.5], [0.1, 0.0]])
    lengths = np.array([[5, 3], [4, 4], [2, 6], [9, 1]])
    metrics, tables = describe_scores(scores, lengths, ["b", "a", "a", "b"])
    assert metrics["accuracy"] == 0.5
    assert metrics["margin"] == pytest.approx(1.1 / 4)
    assert metrics["score_mean"] == pytest.approx(2.1 / 8)
    assert metrics["score_std"] == pytest.approx(np.std([1, -1, 0, 1, 0.5, 0.5, 0.1, 0]))
    assert (metrics["share_chosen_longer"], metrics["share_chosen_shorter"]) == (0.5, 0.25)
    assert (metrics["accuracy_chosen_longer"], metrics["accuracy_chosen_shorter"]) == (1.0, 0.0)
    flat, tokens = scores.ravel() - scores.mean(), lengths.ravel() - lengths.mean()
    correlation = (flat * tokens).sum() / math.sqrt((flat**2).sum() * (tokens**2).sum())
    assert metrics["length_correlation"] == pytest.approx(correlation)
    assert tables["accuracy_by_source"] == {"a": {"pairs": 2, "accuracy": 0.0}, "b": {"pairs": 2, "accuracy": 1.0}}
    assert (metrics["accuracy_of_a"], metrics["accuracy_of_b"]) == (0.0, 1.0)
    assert sum(tables["histogram"]["chosen"]) == sum(tables["histogram"]["rejected"]) == tables["pairs"] == 4


def test_calibration_error_against_a_plain_loop():
    rng = np.random.default_rng(1)
    difference = rng.normal(0.5, 2.0, size=500)
    bins: dict[int, list[tuple[float, float]]] = {}
    for value in difference.tolist():
        predicted = 1 / (1 + math.exp(-abs(value)))
        number = next(n for n in range(10) if predicted < 0.55 + 0.05 * n or n == 9)
        bins.setdefault(number, []).append((predicted, float(value > 0)))
    expected = sum(abs(sum(p for p, _ in rows) - sum(o for _, o in rows)) / len(difference) for rows in bins.values())
    rows, error = calibrate(difference)
    assert error == pytest.approx(expected)
    assert [row["pairs"] for row in rows] == [len(bins[number]) for number in sorted(bins)]
    # Bets that come true as often as they say are calibrated; a model that is always sure and half wrong is not.
    assert calibrate(np.repeat([math.log(3), -math.log(3)], [75, 25]))[1] == pytest.approx(0, abs=1e-12)
    assert calibrate(np.array([1e4, -1e4]))[1] == pytest.approx(0.5)


# ---------------------------------------------------------------- TRL

TRL_CODE = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from datasets import Dataset
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference
folder, data = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = [{"chosen_ids": c, "rejected_ids": r, "margin": m} for c, r, m in data["rows"]]
results = {}
for name, centering, with_margin in (("plain", None, False), ("full", 0.02, True)):
    args = RewardConfig(output_dir=sys.argv[3] + "-run", center_rewards_coefficient=centering, report_to=[],
                        use_cpu=True, max_length=None, bf16=False)
    text = Dataset.from_list([{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                               "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}])
    trainer = RewardTrainer(model=model, args=args, train_dataset=text, processing_class=tokenizer)
    kept = [row if with_margin else {k: v for k, v in row.items() if k != "margin"} for row in rows]
    batch = DataCollatorForPreference(pad_token_id=model.config.pad_token_id)(kept)
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    results[name] = loss.detach()
    results[name + "_grad"] = model.score.weight.grad.clone()
torch.save(results, sys.argv[3])
"""


def test_loss_agrees_with_trls_reward_trainer(tiny_model_folder, tmp_path):
    python = os.environ.get("TRL_PYTHON") or (sys.executable if importlib.util.find_spec("trl") else None)
    if not python:
        pytest.skip("TRL_PYTHON names no Python with TRL")
    model = tiny_classifier()
    model.save_pretrained(tmp_path / "rm")
    tokenizer = load_tokenizer(tiny_model_folder)
    tokenizer.chat_template = CHAT_TEMPLATES["llama-2"]
    tokenizer.pad_token = "<s>"
    save_tokenizer(tokenizer, tmp_path / "rm")
    examples = some_examples(6)
    rows = [
        (
            np.concatenate([example.pair.prompt, example.pair.chosen]).tolist(),
            np.concatenate([example.pair.prompt, example.pair.rejected]).tolist(),
            example.pair.margin,
        )
        for example in examples
    ]
    torch.save({"rows": rows}, tmp_path / "in.pt")
    (tmp_path / "trl_code.py").write_text(TRL_CODE, encoding="utf-8")
    arguments = [tmp_path / "trl_code.py", tmp_path / "rm", tmp_path / "in.pt", tmp_path / "out.pt"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    trl = torch.load(tmp_path / "out.pt", weights_only=True)

    install_score_head(model)
    batch = PairCollator(PAD, "sdpa")(examples)
    for name, margins, centering in (("plain", None, 0.0), ("full", batch["margins"], 0.02)):
        model.zero_grad()
        with score_places(model, batch["last"]):
            scores = model(**model_inputs(batch), use_cache=False).logits.view(-1, 2)
        loss = reward_model_loss(scores[:, 0], scores[:, 1], margins, centering).mean()
        loss.backward()
        torch.testing.assert_close(loss.detach(), trl[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.score.weight.grad, trl[name + "_grad"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("metric", "greater"), [("accuracy", True), ("margin", True), ("loss", False), ("calibration_error", False)]
)
def test_the_best_checkpoint_has_the_larger_figure_or_the_smaller_error(metric, greater, tmp_path):
    """transformers takes everything that is not called a loss for better when it is larger."""
    from utils.core.command_line import parse_args
    from utils.rlhf.reward_trainer import check_best_metric
    from utils.training.arguments import RunArguments

    best = ["--eval_strategy", "steps", "--eval_steps", "10", "--save_steps", "10", "--load_best_model_at_end"]
    argv = ["--output_dir", str(tmp_path), *best, "--metric_for_best_model", f"eval_heldout_{metric}"]
    (args,) = parse_args(RunArguments, argv=argv)
    check_best_metric(args, ["heldout"])
    assert args.greater_is_better is greater
