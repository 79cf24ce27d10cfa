"""One step of DPOTrainer against plain padded forward passes, and against TRL's DPOTrainer in a Python of its own.

TRL_PYTHON names a Python with current TRL (see test_objectives.py); without it that comparison is skipped.
"""

import json
import logging
import math
import os
import subprocess
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from support.training import run_dpo
from utils.core.arguments import LoraArguments, ModelArguments
from utils.core.errors import InputError
from utils.models.training_model import attach_adapter, build_training_model
from utils.rlhf.dpo_trainer import STATISTICS, DPOTrainer, Objective, PairsWithReference, PreferenceCollator
from utils.training.arguments import RunArguments

KINDS = {  # name: objective and the launcher's flags for it
    "sigmoid": Objective("sigmoid", 0.3),
    "smoothed": Objective("sigmoid", 0.3, label_smoothing=0.2),
    "ipo": Objective("ipo", 0.4),
    "hinge": Objective("hinge", 0.3),
    "orpo": Objective("orpo", 0.5),
    "simpo": Objective("simpo", 2.0, simpo_gamma=0.6),
    "rpo": Objective("sigmoid", 0.3, sft_weight=0.7),
}
ANSWERS = ["Yes, of course, we can do that today.", "No.", "It is a small bird.", "Perhaps", "He went home at night."]
BASIC = ["--precision", "fp32", "--preprocessing_num_workers", "1", "--report_to", "none", "--disable_tqdm", "True"]


def write_pairs(path: Path, count: int) -> Path:
    """Pairs whose answers and questions have many lengths."""
    rows = [
        {
            "prompt": f"Question {number}: " + "what is it? " * (number % 4),
            "chosen": ANSWERS[number % 5],
            "rejected": ANSWERS[(number + 1 + number // 5 % 3) % 5],
        }
        for number in range(count)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 6)


@pytest.fixture(scope="module")
def pair_set(pairs, tiny_model_folder, tmp_path_factory):
    from utils.data.batches import PairSet
    from utils.data.cache import CacheSettings
    from utils.data.preferences import load_preferences
    from utils.text.prompts import CHAT_TEMPLATES
    from utils.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_model_folder)
    cache = tmp_path_factory.mktemp("cache")
    settings = CacheSettings(cache, num_workers=1)
    return PairSet(load_preferences([pairs], tokenizer, CHAT_TEMPLATES["llama-2"], 256, settings))


def dpo_argv(model, data, out, *extra) -> list[str]:
    argv = ["--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(out), *BASIC]
    argv += ["--prompt_template", "llama-2", "--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0"]
    return [*argv, *map(str, extra)]


def adapted_model(folder, perturb: bool, **settings):
    """A LoRA model; perturbed, its adapter and what it trains whole differ from the base."""
    from utils.text.tokenizer import load_tokenizer

    torch.manual_seed(1)
    lora = LoraArguments(lora_rank=4, lora_alpha=8, lora_dropout=0.0, target_modules="q_proj,v_proj,down_proj")
    lora.modules_to_save = settings.pop("modules_to_save", None)
    lora.lora_dropout = settings.pop("lora_dropout", 0.0)
    model_args = ModelArguments(model_name_or_path=str(folder))
    import utils.core.arguments as arguments

    base = build_training_model(
        model_args, arguments.ExtendArguments(), lora, load_tokenizer(folder), torch.float32, 0
    )
    model = attach_adapter(base, lora, 16)
    for name, parameter in model.named_parameters():
        if perturb and parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def make_trainer(model, pair_set, objective, folder, attention="sdpa") -> DPOTrainer:
    from utils.text.tokenizer import load_tokenizer

    args = RunArguments(output_dir=str(folder / "out"), precision="fp32", report_to="none", disable_tqdm=True)
    tokenizer = load_tokenizer(model.config._name_or_path if not hasattr(model, "peft_config") else folder_of(model))
    return DPOTrainer(model, args, pair_set, {}, tokenizer, PreferenceCollator(0, attention), objective)


def folder_of(model) -> str:
    return model.peft_config["default"].base_model_name_or_path


def padded_logprobs(model, pair_set, side: str) -> torch.Tensor:
    """The plain way: one padded batch of prompt + answer, all logits, log_softmax; summed over answer tokens."""
    pairs = [pair_set.file[int(number)] for number in pair_set.ids]
    rows = [np.concatenate([pair.prompt, getattr(pair, side)]) for pair in pairs]
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.from_numpy(row), 1
    logprobs = functional.log_softmax(model(input_ids=ids, attention_mask=mask).logits.double(), -1)
    sums = []
    for number, (pair, row) in enumerate(zip(pairs, rows, strict=True)):
        places = range(len(pair.prompt), len(row))
        sums.append(sum(logprobs[number, place - 1, row[place]] for place in places))
    return torch.stack(sums)


def plain_loss(kind: str, c, r, rc, rr, nc, nr) -> torch.Tensor:
    """Mean loss from the papers' formulas; sums of the policy, of the reference, and the numbers of tokens."""
    o, sigmoid = KINDS[kind], torch.sigmoid
    h = (c - rc) - (r - rr)
    if kind in ("sigmoid", "rpo"):
        losses = -torch.log(sigmoid(o.beta * h)) + (0.7 * -c / nc if kind == "rpo" else 0)
    elif kind == "smoothed":
        losses = -0.8 * torch.log(sigmoid(o.beta * h)) - 0.2 * torch.log(sigmoid(-o.beta * h))
    elif kind == "ipo":
        losses = ((c - rc) / nc - (r - rr) / nr - 1 / (2 * o.beta)) ** 2
    elif kind == "hinge":
        losses = torch.clamp(1 - o.beta * h, min=0)
    elif kind == "orpo":
        p, q = torch.exp(c / nc), torch.exp(r / nr)
        losses = -c / nc - o.beta * torch.log(sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q))))
    else:
        losses = -torch.log(sigmoid(o.beta * (c / nc - r / nr) - 0.6))
    return losses.mean()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture(scope="module")
def adapted(tiny_model_folder):
    return adapted_model(tiny_model_folder, perturb=True, modules_to_save="lm_head")


@pytest.fixture(scope="module")
def oracle(adapted, pair_set, tiny_model_folder):
    """Sums of policy (with gradient) and reference, a separate model without adapter, and lengths."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(tiny_model_folder).eval()
    adapted.eval()
    with torch.no_grad():
        base = [padded_logprobs(reference, pair_set, side) for side in ("chosen", "rejected")]
    lengths = torch.from_numpy(pair_set.file.lengths[pair_set.ids].astype(np.float64))
    return base, [lengths[:, 1], lengths[:, 2]]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_four_padded_forward_passes(
    kind, attention, adapted, oracle, pair_set, tiny_model_folder, tmp_path
):
    """Prompts shared in a row (sdpa), both answers in a row, or all of the batch: the model itself runs sdpa here."""
    base, lengths = oracle
    adapted.eval()
    policy = [padded_logprobs(adapted, pair_set, side) for side in ("chosen", "rejected")]
    expected = plain_loss(kind, *policy, *base, *lengths)
    expected.backward()
    theirs = gradients(adapted)
    trainer = make_trainer(adapted, pair_set, KINDS[kind], tmp_path, attention)
    batch = trainer.data_collator([pair_set[number] for number in range(len(pair_set))])
    adapted.train()
    loss = trainer.compute_loss(adapted, batch)
    loss.backward()
    ours = gradients(adapted)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours.keys() == theirs.keys() and any("modules_to_save" in name for name in ours)
    for name, gradient in theirs.items():
        # relative to the largest one; float32 against float64
        assert (ours[name] - gradient).abs().max() < 3e-5 * gradient.abs().max() + 1e-7, name
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs.values())


def test_statistics_of_a_batch(adapted, oracle, pair_set, tmp_path):
    base, lengths = oracle
    trainer = make_trainer(adapted, pair_set, KINDS["sigmoid"], tmp_path)
    adapted.eval()
    batch = trainer.data_collator([pair_set[number] for number in range(len(pair_set))])
    with torch.no_grad():
        chosen, rejected = (padded_logprobs(adapted, pair_set, side) for side in ("chosen", "rejected"))
        statistics = trainer.prediction_step(adapted, batch, False)[1]
    moved = chosen - base[0], rejected - base[1]
    expected = {
        "chosen_reward": 0.3 * moved[0].mean(),
        "rejected_reward": 0.3 * moved[1].mean(),
        "reward_margin": 0.3 * (moved[0] - moved[1]).mean(),
        "accuracy": (moved[0] > moved[1]).double().mean(),
        "chosen_logprob": (chosen / lengths[0]).mean(),
        "rejected_logprob": (rejected / lengths[1]).mean(),
        "log_ratio": ((moved[0] + moved[1]) / (lengths[0] + lengths[1])).mean(),
    }
    found = trainer.objective.summarise(statistics.mean(0).numpy())
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    assert 0 < found["accuracy"] < 1
    assert "log_ratio" not in Objective("simpo", 2.0).summarise(np.zeros(8))


def test_a_new_adapter_starts_at_the_reference(tiny_model_folder, pair_set, tmp_path):
    model = adapted_model(tiny_model_folder, perturb=False, modules_to_save="embed_tokens,lm_head", lora_dropout=0.5)
    trainer = make_trainer(model.train(), pair_set, KINDS["sigmoid"], tmp_path)
    batch = trainer.data_collator([pair_set[number] for number in range(len(pair_set))])
    losses, statistics, _ = trainer._pair_statistics(model, batch)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=1e-6, atol=0)
    found = trainer.objective.summarise(statistics.detach().mean(0).numpy())
    assert found["reward_margin"] == found["chosen_reward"] == found["log_ratio"] == found["accuracy"] == 0


def test_the_reference_pass_has_no_dropout_and_leaves_the_policy_trainable(tiny_model_folder, pair_set, tmp_path):
    model = adapted_model(tiny_model_folder, perturb=True, modules_to_save="lm_head", lora_dropout=0.3)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5  # of the base: the adapter's own dropout is off with the adapter
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trainer = make_trainer(model.train(), pair_set, KINDS["sigmoid"], tmp_path)
    batch = trainer.data_collator([pair_set[number] for number in range(len(pair_set))])
    first, second = trainer._without_adapter(model, batch), trainer._without_adapter(model, batch)
    assert torch.equal(first, second) and not first.requires_grad
    assert model.training and all(module.training for module in model.modules())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    with torch.autocast("cpu", torch.bfloat16):  # casts without gradient must not be kept for the policy's pass
        trainer.compute_loss(model, batch).backward()
    assert set(gradients(model)) == set(trained)


def test_batches_carry_the_references_numbers(pair_set):
    table = np.arange(2 * len(pair_set.file), dtype=np.float32).reshape(-1, 2)
    subset = type(pair_set)(pair_set.file, np.array([4, 1]))
    pairs = PairsWithReference(subset, table)
    batch = PreferenceCollator(0, "sdpa")([pairs[0], pairs[1]])
    assert batch["reference"].tolist() == [8.0, 9.0, 2.0, 3.0] and batch["numbers"].tolist() == [4, 1]
    assert "reference" not in PreferenceCollator(0, "sdpa")([subset[0]])


# ---------------------------------------------------------------- whole steps


@pytest.fixture(scope="module")
def other_model_folder(tiny_model_folder, tmp_path_factory):
    """The tiny model with other weights."""
    from transformers import LlamaForCausalLM

    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    folder = tmp_path_factory.mktemp("models") / "other"
    model = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(load_tokenizer(tiny_model_folder), folder)
    return folder


def weights(folder: Path, name: str = "adapter_model.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / name)


def assert_close_weights(one, other, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=0, atol=tolerance, msg=lambda text, name=name: name + text
        )


STEP = ["--max_steps", "1", "--optim", "sgd", "--learning_rate", "1", "--lr_scheduler_type", "constant"]
STEP += ["--max_grad_norm", "1e9", "--save_strategy", "no", "--logging_steps", "1"]


def logged(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("weights_of", ["adapter", pytest.param("model", marks=pytest.mark.slow)])
def test_batch_size_and_accumulation_do_not_change_the_step(
    weights_of, tiny_model_folder, other_model_folder, pairs, tmp_path
):
    """6 pairs are one step, however they are cut; so is what is logged, which is no micro-batch's own mean."""
    full = ["--full_finetuning"] if weights_of == "model" else []
    extra = [*full, *STEP, "--loss", "ipo", "--reference_model", other_model_folder]
    steps = {}
    for size, parts in ((6, 1), (2, 3), (1, 6)):
        out = tmp_path / f"{size}"
        cut = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", parts]
        run_dpo(dpo_argv(tiny_model_folder, pairs, out, *extra, *cut))
        steps[size] = (
            weights(out, f"{'adapter_' if not full else ''}model.safetensors"),
            next(entry for entry in logged(out) if "loss" in entry),
        )
    for size in (2, 1):
        assert_close_weights(steps[6][0], steps[size][0], 1e-5)
        for name in ("loss", "grad_norm", *STATISTICS):
            assert steps[size][1][name] == pytest.approx(steps[6][1][name], rel=1e-5, abs=1e-6), name
    assert 0 < steps[6][1]["accuracy"] < 1 and steps[6][1]["reward_margin"] != 0


TRL = """
import json, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
job = json.load(open(sys.argv[1]))
rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(job["rows"])
for name, (kind, beta, smoothing, size) in job["kinds"].items():
    models = [AutoModelForCausalLM.from_pretrained(job[key], dtype=torch.float32) for key in ("model", "reference")]
    args = DPOConfig(output_dir=sys.argv[1] + ".out", loss_type=[kind], beta=beta, label_smoothing=smoothing,
        per_device_train_batch_size=size, gradient_accumulation_steps=len(rows) // size, max_steps=1, optim="sgd",
        learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=1e9, save_strategy="no", logging_steps=1,
        report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False)
    trainer = DPOTrainer(model=models[0], ref_model=models[1], args=args, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]))
    trainer.train_dataset = Dataset.from_list(job["rows"])
    trainer.train()
    history = next(entry for entry in trainer.state.log_history if "loss" in entry)
    state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    torch.save({"loss": history["loss"], "margin": history["rewards/margins"], "state": state}, job["out"] + name)
"""


def test_a_step_equals_trls(tiny_model_folder, other_model_folder, pairs, pair_set, tmp_path):
    python = os.environ.get("TRL_PYTHON")
    if not python:
        pytest.skip("TRL_PYTHON names no Python with TRL (see the top of test_objectives.py)")
    # "aot" of one pair is DPO with label smoothing: sorting one number changes nothing.
    kinds = {"sigmoid": ["sigmoid", 0.3, 0.0, 6], "ipo": ["ipo", 0.4, 0.0, 6], "hinge": ["hinge", 0.3, 0.0, 6]}
    kinds["smoothed"] = ["aot", 0.3, 0.2, 1]
    rows = [pair_set.file[number] for number in range(6)]
    rows = [{f"{name}_ids": getattr(row, name).tolist() for name in ("prompt", "chosen", "rejected")} for row in rows]
    job = {"rows": rows, "kinds": kinds, "out": str(tmp_path / "trl-")}
    job |= {"model": str(other_model_folder), "reference": str(tiny_model_folder)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [python, "-c", TRL, str(tmp_path / "job.json")],
        capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (_, beta, smoothing, _) in kinds.items():
        theirs, out = torch.load(tmp_path / f"trl-{name}", weights_only=True), tmp_path / name
        extra = ["--full_finetuning", "--reference_model", tiny_model_folder, "--per_device_train_batch_size", 6]
        extra += ["--loss", KINDS[name].kind, "--beta", beta, "--label_smoothing", smoothing]
        extra += ["--gradient_accumulation_steps", 1, *STEP]
        run_dpo(dpo_argv(other_model_folder, pairs, out, *extra))
        entry = next(entry for entry in logged(out) if "loss" in entry)
        assert entry["loss"] == pytest.approx(theirs["loss"], rel=1e-5), name
        if name == "sigmoid":
            assert entry["reward_margin"] == pytest.approx(theirs["margin"], rel=1e-4)
        start, ours = weights(other_model_folder, "model.safetensors"), weights(out, "model.safetensors")
        for key, tensor in ours.items():
            change = (tensor - start[key]).abs().max()
            assert (tensor - theirs["state"][key]).abs().max() <= 1e-5 * max(1.0, change), (name, key)
        assert max((ours[key] - start[key]).abs().max() for key in ours) > 1e-2, name


# ---------------------------------------------------------------- the reference computed beforehand


@pytest.mark.slow
def test_a_precomputed_reference_equals_one_in_every_step(tiny_model_folder, pairs, tmp_path, caplog, monkeypatch):
    import utils.rlhf.reference as reference

    caplog.set_level(logging.INFO)
    alive = []
    build = reference.build_training_model
    monkeypatch.setattr(
        reference, "build_training_model", lambda *a: (model := build(*a), alive.append(weakref.ref(model)))[0]
    )
    extra = ["--max_steps", 6, "--learning_rate", "1e-2", "--logging_steps", 1, "--per_device_train_batch_size", 2]
    extra += ["--lora_dropout", "0.2", "--validation_split", 0.4, "--eval_strategy", "steps", "--eval_steps", 3]
    histories = {}
    for name, flags in (
        ("live", []),
        ("before", ["--precompute_reference"]),
        ("cached", ["--reference_model", tiny_model_folder]),
    ):
        run_dpo(dpo_argv(tiny_model_folder, pairs, tmp_path / name, *extra, *flags))
        histories[name] = logged(tmp_path / name)
    assert len(alive) == 1 and alive[0]() is None, "computed once, and freed before the policy is trained"
    assert "using the reference's log-probabilities" in caplog.text
    for name in ("before", "cached"):
        for one, other in zip(histories["live"], histories[name], strict=True):
            assert one.keys() == other.keys()
            for key in one:
                if not key.endswith(("per_second", "runtime", "memory_gb")):
                    assert other[key] == pytest.approx(one[key], rel=1e-6, abs=2e-6), (name, key)
    assert_close_weights(weights(tmp_path / "before"), weights(tmp_path / "cached"), 0.0)
    assert [entry["reward_margin"] for entry in histories["live"] if "reward_margin" in entry][-1] != 0


@pytest.mark.slow
def test_a_table_belongs_to_its_weights_and_data(
    tiny_model_folder, other_model_folder, pairs, pair_set, tmp_path, caplog
):
    cache = tmp_path / ".token_cache"
    extra = ["--precompute_reference", *STEP]
    run_dpo(dpo_argv(tiny_model_folder, pairs, tmp_path / "one", *extra))
    (table,) = cache.glob("reference-*.npy")
    expected = np.load(table)
    assert expected.shape == (6, 2) and (expected < 0).all()
    run_dpo(dpo_argv(other_model_folder, pairs, tmp_path / "two", *extra))
    run_dpo(dpo_argv(tiny_model_folder, write_pairs(tmp_path / "less.jsonl", 5), tmp_path / "three", *extra))
    assert len(list(cache.glob("reference-*.npy"))) == 3
    table.write_bytes(table.read_bytes()[:-4])  # damaged
    run_dpo(dpo_argv(tiny_model_folder, pairs, tmp_path / "four", *extra))
    assert "is damaged; it is computed again" in caplog.text
    np.testing.assert_array_equal(np.load(table), expected)


def test_every_weight_is_trained_against_the_start(tiny_model_folder, pairs, tmp_path):
    out = tmp_path / "full"
    extra = ["--full_finetuning", "--max_steps", 3, "--learning_rate", "1e-3", "--logging_steps", 1]
    run_dpo(dpo_argv(tiny_model_folder, pairs, out, *extra, "--per_device_train_batch_size", 6))
    history = [entry for entry in logged(out) if "loss" in entry]
    assert history[0]["loss"] == pytest.approx(math.log(2), rel=1e-5) and history[0]["reward_margin"] == 0
    assert history[-1]["loss"] < history[0]["loss"] and (out / "model.safetensors").is_file()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "--beta 0.0: need a number above 0"),
        (["--beta", "-1", "--sft_weight", "-2"], r"--beta -1.0.*\n--sft_weight -2.0"),
        (["--label_smoothing", "0.5"], "0 <= share < 0.5"),
        (["--loss", "ipo", "--label_smoothing", "0.1"], "ipo has none"),
        (["--simpo_gamma", "0.5"], "need --loss simpo"),
        (["--loss", "orpo", "--precompute_reference"], "orpo uses no reference"),
        (["--loss", "simpo", "--reference_model", "x"], "simpo uses no reference"),
        (["--reference_model", "nowhere"], "nowhere"),
        (["--train_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--max_seq_length", "4"], "at least 8"),
        (["--eval_strategy", "steps", "--validation_split", "0"], "need validation data: pass --validation_data"),
    ],
)
def test_bad_flags_are_refused_before_anything_slow(flags, message, tiny_model_folder, pairs, tmp_path):
    with pytest.raises(InputError, match=message):
        run_dpo(dpo_argv(tiny_model_folder, pairs, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_whose_base_is_not_the_tuned_model_is_refused(tiny_model_folder, pairs, tmp_path):
    model = adapted_model(tiny_model_folder, perturb=True)
    model.save_pretrained(tmp_path / "sft", save_embedding_layers=False)
    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    save_tokenizer(load_tokenizer(tiny_model_folder), tmp_path / "sft")
    adapter = ["--adapter_name_or_path", tmp_path / "sft"]
    with pytest.raises(InputError, match=r"run_merge\.sh.*--reference_model"):
        run_dpo(dpo_argv(tiny_model_folder, pairs, tmp_path / "out", *adapter))
    # Losses without a reference go on with it; so does DPO against the merged model.
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    save_tokenizer(load_tokenizer(tiny_model_folder), tmp_path / "merged")
    run_dpo(dpo_argv(tiny_model_folder, pairs, tmp_path / "simpo", *adapter, "--loss", "simpo", *STEP))
    run_dpo(
        dpo_argv(tiny_model_folder, pairs, tmp_path / "dpo", *adapter, "--reference_model", tmp_path / "merged", *STEP)
    )
    first = next(entry for entry in logged(tmp_path / "dpo") if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5) and abs(first["log_ratio"]) < 1e-5


def test_a_reference_with_another_vocabulary_is_refused(tiny_model_folder, extended_tokenizer_folder, pairs, tmp_path):
    from transformers import LlamaForCausalLM

    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    model = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    model.resize_token_embeddings(300, mean_resizing=False)
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match=r"--reference_model .*small has another vocabulary"):
        run_dpo(dpo_argv(tiny_model_folder, pairs, tmp_path / "out", "--reference_model", tmp_path / "small"))
    model.resize_token_embeddings(406, mean_resizing=False)
    model.save_pretrained(tmp_path / "large")
    tokenizer = load_tokenizer(extended_tokenizer_folder)
    save_tokenizer(tokenizer, tmp_path / "large")
    with pytest.raises(InputError, match="preference tuning adds none"):
        run_dpo(dpo_argv(tiny_model_folder, pairs, tmp_path / "out", "--tokenizer_name_or_path", tmp_path / "large",
                         "--modules_to_save", "embed_tokens,lm_head"))  # fmt: skip


def test_pairs_without_a_preference_are_dropped_and_counted(tiny_model_folder, pairs, tmp_path, caplog):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows += [
        {"prompt": "Same?", "chosen": "Yes", "rejected": "Yes"},
        {"prompt": "Empty?", "chosen": "Yes", "rejected": " "},
    ]
    rows += [{"prompt": "Long " * 400, "chosen": "Yes", "rejected": "No"}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    run_dpo(dpo_argv(tiny_model_folder, data, tmp_path / "out", *STEP))
    assert "3 of 9 records dropped" in caplog.text
    data.write_text("\n".join(map(json.dumps, rows[-3:])))
    with pytest.raises(InputError, match=r"nothing is left of 3 records"):
        run_dpo(dpo_argv(tiny_model_folder, data, tmp_path / "none", *STEP))


def test_a_loss_that_there_is_not_is_no_other():
    with pytest.raises(AssertionError, match="no loss is called dpo"):
        Objective("dpo", 0.1).evaluate(torch.zeros(2), torch.ones(2), torch.zeros(2))
