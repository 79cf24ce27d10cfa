"""rm.py whole: it learns a preference, reports on it, saves what transformers, PEFT and the merge load alike."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.training import assert_equal_weights, check_kills, losses
from utils.core.arguments import DataArguments, LoraArguments, ModelArguments
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.training.arguments import RunArguments

SMALL = [
    *("--max_seq_length", "256", "--prompt_template", "llama-2", "--precision", "fp32", "--lora_rank", "4"),
    *("--lora_alpha", "8", "--target_modules", "q_proj,v_proj,down_proj", "--learning_rate", "1e-2"),
    *("--per_device_train_batch_size", "4", "--preprocessing_num_workers", "1", "--logging_steps", "1"),
    *("--disable_tqdm", "True", "--report_to", "none"),
]
TWO_EPOCHS = ("--max_train_samples", 64, "--max_steps", 30, "--save_steps", 3)  # 16 steps an epoch
WORDS = ["the", "cat", "dog", "house", "tree", "river", "water", "stone", "light", "green", "small", "quick"]


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """Pairs whose better answer ends in "yes", whatever its length, the worse one in "no"."""
    chance = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(1, most)))

    rows = [
        {
            "prompt": f"{words(5)} {number}",
            "chosen": f"{words(6)} yes",
            "rejected": f"{words(6)} no",
            "source": chance.choice(["short", "long"]),
            "margin": 0.5,
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "validation.jsonl", 60, 1)
    return write_pairs(folder / "train.jsonl", 160, 0)


def rm_argv(model, pairs, out, *extra) -> list[str]:
    argv = ["--model_name_or_path", str(model), "--train_data", str(pairs), "--output_dir", str(out)]
    argv += [
        "--validation_data",
        f"new={pairs.parent / 'validation.jsonl'}",
        "--max_steps",
        "40",
        "--save_steps",
        "10",
    ]
    return [*argv, *SMALL, *map(str, extra)]


def run_rm(argv):
    import rm

    types = (ModelArguments, LoraArguments, DataArguments, rm.RewardModelArguments, RunArguments)
    return rm.main(*parse_args(*types, argv=argv))


@pytest.fixture(scope="session")
def rm_run(tmp_path_factory, tiny_model_folder, pairs) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "rm"
    best = ("--eval_strategy", "steps", "--eval_steps", "10", "--load_best_model_at_end")
    run_rm(rm_argv(tiny_model_folder, pairs, folder, *best, "--metric_for_best_model", "eval_new_accuracy"))
    return folder


def some_sequences(folder: Path) -> list[tuple[list[int], list[int]]]:
    from utils.data.preferences import encode_answers
    from utils.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": "the river is green"}]
    answers = ("a stone yes", "no", "quick quick light and water no", "yes")
    prompt, encoded = encode_answers(messages, answers, str(tokenizer.chat_template), tokenizer)
    return [(prompt, answer) for answer in encoded]


def transformers_scores(model, sequences) -> torch.Tensor:
    """A forward pass of the library's own an answer: (N,)."""
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([[*p, *a]])).logits[0, 0] for p, a in sequences])


# ---------------------------------------------------------------- training


def test_it_learns_a_preference_and_reports_on_it(rm_run):
    for name in (
        *("adapter_model.safetensors", "adapter_config.json", "base_model.json", "tokenizer.json", "run_config.yaml"),
        *("chat_template.jinja", "loss.png", "reward_report.png", "all_results.json", "README.md"),
    ):
        assert (rm_run / name).is_file(), name
    results = json.loads((rm_run / "all_results.json").read_text())
    assert results["eval_new_accuracy"] > 0.95 and results["eval_new_loss"] < 0.3
    report = json.loads((rm_run / "reward_report.json").read_text())["new"]
    for name in ("accuracy", "margin", "loss", "calibration_error", "length_correlation", "score_std"):
        assert report[name] == results[f"eval_new_{name}"]
    assert set(report["accuracy_by_source"]) == {"short", "long"} and report["pairs"] == 60
    assert sum(row["pairs"] for row in report["calibration"]) == 60
    history = json.loads((rm_run / "trainer_state.json").read_text())["log_history"]
    assert [entry["accuracy"] for entry in history if "loss" in entry][-1] > 0.9


def test_the_best_checkpoint_is_what_is_saved(rm_run):
    state = json.loads((rm_run / "trainer_state.json").read_text())
    accuracies = {e["step"]: e["eval_new_accuracy"] for e in state["log_history"] if "eval_new_accuracy" in e}
    best = Path(state["best_model_checkpoint"])
    assert state["best_metric"] == max(accuracies.values()) == accuracies[int(best.name.partition("-")[2])]
    saved, kept = load_file(rm_run / "adapter_model.safetensors"), load_file(best / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


@pytest.mark.slow
def test_losses_are_means_over_the_pairs_of_a_step_however_it_is_cut(tiny_model_folder, pairs, tmp_path):
    """Four pairs at once, or three and one: an epoch of four pairs is one step either way."""
    plain = ("--max_steps", 4, "--max_train_samples", 4, "--lora_dropout", 0, "--use_margin", "--centering", 0.1)
    cut = ("--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2)
    run_rm(rm_argv(tiny_model_folder, pairs, tmp_path / "one", *plain))
    run_rm(rm_argv(tiny_model_folder, pairs, tmp_path / "two", *plain, *cut))
    for (_, one), (_, other) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_evaluation_equals_a_plain_loop(tiny_model_folder, pairs, tmp_path):
    """The untrained model's loss with margin and centering, from transformers' own forward passes."""
    from transformers import AutoModelForSequenceClassification

    from utils.data.preferences import encode_answers
    from utils.text.tokenizer import load_tokenizer

    settings = ("--full_finetuning", "--learning_rate", "1e-30", "--max_steps", 1, "--use_margin", "--centering", 0.1)
    results = run_rm(rm_argv(tiny_model_folder, pairs, tmp_path / "rm", *settings))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = load_tokenizer(tmp_path / "rm")
    losses, margins = [], []
    for line in (pairs.parent / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["prompt"]}]
        texts = (row["chosen"], row["rejected"])
        prompt, answers = encode_answers(messages, texts, str(tokenizer.chat_template), tokenizer)
        chosen, rejected = transformers_scores(model, [(prompt, answer) for answer in answers]).double()
        margins.append((chosen - rejected).item())
        likelihood = torch.nn.functional.logsigmoid(chosen - rejected - row["margin"])
        losses.append((-likelihood + 0.1 * (chosen + rejected) ** 2).item())
    assert results["eval_new_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert results["eval_new_margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert results["eval_new_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)


@pytest.mark.slow
def test_a_four_bit_base_trains(tiny_model_folder, pairs, tmp_path):
    results = run_rm(rm_argv(tiny_model_folder, pairs, tmp_path / "rm", "--load_in_kbits", 4, "--max_steps", 20))
    assert results["eval_new_accuracy"] > 0.8
    from utils.rlhf.reward_model import load_reward_model

    model = load_reward_model(tmp_path / "rm", load_in_kbits=4, device="cpu")
    kinds = {type(module).__name__ for module in model.model.modules()}
    assert "Linear4bit" in kinds and "ScoreHead" in kinds
    assert model.score(some_sequences(tmp_path / "rm")).isfinite().all()


# ---------------------------------------------------------------- what is saved


def test_adapter_pefts_merge_and_our_merge_score_alike(rm_run, tiny_model_folder, tmp_path, caplog):
    import merge_llama2_with_chinese_lora_low_mem as merge
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from utils.rlhf.reward_model import load_reward_model

    sequences = some_sequences(rm_run)
    adapter = AutoPeftModelForSequenceClassification.from_pretrained(rm_run, num_labels=1).eval()
    assert any(parameter.any() for name, parameter in adapter.named_parameters() if "lora_B" in name)
    scores = {"ours": load_reward_model(rm_run, device="cpu").score(sequences, 2)}
    scores["adapter"] = transformers_scores(adapter, sequences)
    scores["peft"] = transformers_scores(adapter.merge_and_unload(), sequences)
    merged = tmp_path / "merged"
    arguments = merge.MergeArguments(str(tiny_model_folder), str(rm_run), output_dir=str(merged))
    with pytest.raises(InputError, match="--verify compares the logits of language models"):
        merge.main(merge.MergeArguments(str(tiny_model_folder), str(rm_run), output_dir=str(merged), verify=True))
    report = merge.main(arguments)
    assert report["reward_model"] and "its head takes the place of lm_head" in report["notes"][0]
    scores["merged"] = transformers_scores(
        AutoModelForSequenceClassification.from_pretrained(merged).eval(), sequences
    )
    scores["merged, ours"] = load_reward_model(merged, device="cpu").score(sequences)
    for name, values in scores.items():
        torch.testing.assert_close(values, scores["ours"], rtol=1e-5, atol=1e-5, msg=name)
    assert scores["ours"].std() > 0.1

    config = AutoConfig.from_pretrained(merged)
    assert config.architectures == ["LlamaForSequenceClassification"] and config.num_labels == 1
    assert config.pad_token_id == 1 and not (merged / "generation_config.json").exists()
    tensors = load_file(merged / "model.safetensors")
    assert tensors["score.weight"].shape == (1, 32) and "lm_head.weight" not in tensors
    assert "text-classification" in (merged / "README.md").read_text()
    # A merged reward model is a base like any other: converted, or trained further.
    merge.main(merge.MergeArguments(str(merged), output_dir=str(tmp_path / "half"), dtype="bfloat16"))
    assert load_file(tmp_path / "half" / "model.safetensors")["score.weight"].dtype == torch.bfloat16


def test_a_reward_model_on_a_tuned_adapter_and_tied_embeddings_merges(rm_run, tiny_model_folder, tmp_path):
    """base <- SFT adapter <- reward model, in one go, equals two merges; the base's head is tied."""
    import merge_llama2_with_chinese_lora_low_mem as merge

    from utils.rlhf.reward_model import load_reward_model

    base, sft = tmp_path / "base", tmp_path / "sft"
    shutil.copytree(tiny_model_folder, base)
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    shutil.copytree(rm_run, sft, ignore=shutil.ignore_patterns("checkpoint-*", "base_model.json"))
    weights = load_file(sft / "adapter_model.safetensors")
    head = weights.pop("base_model.model.score.weight")
    save_file({name: value.flip(0) for name, value in weights.items()}, sft / "adapter_model.safetensors")
    settings = json.loads((sft / "adapter_config.json").read_text())
    settings |= {"task_type": "CAUSAL_LM", "modules_to_save": None}
    (sft / "adapter_config.json").write_text(json.dumps(settings))
    reward = tmp_path / "reward"
    shutil.copytree(rm_run, reward, ignore=shutil.ignore_patterns("checkpoint-*", "base_model.json"))

    both = f"{sft},{reward}"
    merge.main(merge.MergeArguments(str(base), both, output_dir=str(tmp_path / "at_once")))
    merge.main(merge.MergeArguments(str(base), str(sft), output_dir=str(tmp_path / "tuned")))
    merge.main(merge.MergeArguments(str(tmp_path / "tuned"), str(reward), output_dir=str(tmp_path / "after")))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("at_once", "after"))
    assert one.keys() == other.keys() and "lm_head.weight" not in one
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["score.weight"], head)
    assert load_reward_model(tmp_path / "at_once", device="cpu").score(some_sequences(rm_run)).std() > 0


@pytest.mark.slow
def test_a_fully_trained_model_is_loaded_by_transformers(tiny_model_folder, pairs, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from utils.rlhf.reward_model import load_reward_model

    argv = rm_argv(tiny_model_folder, pairs, tmp_path / "rm", "--full_finetuning", "--learning_rate", "3e-3")
    assert run_rm(argv)["eval_new_accuracy"] > 0.95
    tensors = load_file(tmp_path / "rm" / "model.safetensors")
    assert "score.weight" in tensors and "lm_head.weight" not in tensors
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 1
    sequences = some_sequences(tmp_path / "rm")
    scores = load_reward_model(tmp_path / "rm", device="cpu").score(sequences)
    torch.testing.assert_close(transformers_scores(model, sequences), scores, rtol=1e-5, atol=1e-5)
    # Trained further, it begins with the head it has.
    more = ("--max_steps", 1, "--learning_rate", "1e-30")
    assert run_rm(rm_argv(tmp_path / "rm", pairs, tmp_path / "more", *more))["eval_new_accuracy"] > 0.95


@pytest.mark.slow
def test_an_adapter_goes_on_training_where_it_was(rm_run, tiny_model_folder, pairs, tmp_path):
    more = ("--adapter_name_or_path", rm_run, "--max_steps", 1, "--learning_rate", "1e-30")
    results = run_rm(rm_argv(tiny_model_folder, pairs, tmp_path / "more", *more))
    before = json.loads((rm_run / "all_results.json").read_text())
    assert results["eval_new_loss"] == pytest.approx(before["eval_new_loss"], rel=1e-5)


# ---------------------------------------------------------------- scoring


def score(model, records, folder, *extra) -> tuple[list[dict], dict]:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "records.jsonl").write_text(text, encoding="utf-8")
    argv = ["--score", folder / "records.jsonl", "--model_name_or_path", model, "--output_file", folder / "out.jsonl"]
    summary = run_rm([*map(str, argv), "--use_cpu", *map(str, extra)])
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()], summary


def test_score_ranks_pairs_and_says_how_often_it_is_right(rm_run, pairs, tmp_path):
    records = [json.loads(line) for line in (pairs.parent / "validation.jsonl").read_text().splitlines()]
    rows, summary = score(rm_run, records, tmp_path)
    assert [{name: row[name] for name in records[0]} for row in rows] == records
    right = sum(row["chosen_score"] > row["rejected_score"] for row in rows)
    results = json.loads((rm_run / "all_results.json").read_text())
    assert summary["accuracy"] == right / 60 == results["eval_new_accuracy"]
    assert summary["margin"] == pytest.approx(results["eval_new_margin"], rel=1e-5)


def test_score_reads_texts_in_every_layout(rm_run, tmp_path):
    turns = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "tree yes"}]
    records = [
        {"prompt": "the cat", "answer": "tree yes"},
        {"instruction": "the cat", "output": "tree yes"},
        {"conversations": turns},
        {"messages": [{"role": "user", "content": "the cat"}], "answer": "tree yes"},
        {"prompt": "the cat", "answer": "tree no"},
        {"prompt": "the cat", "answer": " "},
        {"prompt": "the cat " * 200, "answer": "yes"},
    ]
    rows, summary = score(rm_run, records, tmp_path, "--max_seq_length", "256")
    scores = [row["score"] for row in rows]
    assert scores[:4] == pytest.approx([scores[0]] * 4, rel=1e-5) and scores[4] < scores[0]
    assert scores[5:] == [None, None], "kept in place, without a score"
    assert summary["records"] == 7 and summary["scored_answers"] == 5 and "accuracy" not in summary
    with pytest.raises(InputError, match="is there already"):
        score(rm_run, records, tmp_path)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "a"}, r"records.jsonl:1: need 'chosen' and 'rejected', or 'answer'"),
        (
            {"messages": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]},
            "ends with the user",
        ),
        ({"prompt": "a", "answer": ""}, "nothing can be scored: 1 empty answers"),
    ],
)
def test_score_names_what_it_cannot_read(rm_run, tmp_path, record, problem):
    with pytest.raises(InputError, match=problem):
        score(rm_run, [record], tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


def test_score_refuses_what_is_no_reward_model(rm_run, tiny_model_folder, tmp_path):
    records = [{"prompt": "a", "answer": "b"}]
    with pytest.raises(InputError, match=r"is no reward model: it has no scalar head \(score.weight\)"):
        score(tiny_model_folder, records, tmp_path)
    adapter = tmp_path / "adapter"
    shutil.copytree(rm_run, adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(adapter / "adapter_model.safetensors")
    del weights["base_model.model.score.weight"]
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter .* is no reward model"):
        score(adapter, records, tmp_path)


def test_training_refuses_what_cannot_be_learnt(rm_run, tiny_model_folder, pairs, tmp_path):
    same, empty = tmp_path / "same.jsonl", tmp_path / "empty.jsonl"
    same.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 3)
    empty.write_text('{"prompt": "a", "chosen": "b", "rejected": " "}\n' * 3)
    out = tmp_path / "out"

    def refused(problem: str, data: Path, *extra, model=tiny_model_folder) -> None:
        argv = ["--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(out), *SMALL]
        with pytest.raises(InputError, match=problem):
            run_rm([*argv, *map(str, extra)])
        assert not out.exists()

    refused("nothing is left of 3 records: 3 whose two answers have the same tokens", same)
    refused("nothing is left of 3 records: 3 with an empty answer", empty)
    refused("need validation data: pass --validation_data", pairs, "--eval_strategy", "steps")
    held_out = ("--validation_split", "0.1", "--metric_for_best_model", "accuracy_heldout")
    refused("--metric_for_best_model accuracy_heldout: need one of eval_heldout_accuracy", pairs, *held_out)
    refused("it holds an adapter: pass the base model here", pairs, model=rm_run)
    refused("--full_finetuning cannot train 4-bit", pairs, "--full_finetuning", "--load_in_kbits", 4)
    refused("no balancing loss", pairs, "--output_router_logits")
    adapter = tmp_path / "sft"
    shutil.copytree(rm_run, adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    refused(r"is no reward model \(task_type CAUSAL_LM\): merge it", pairs, "--adapter_name_or_path", adapter)
    two = tmp_path / "two"
    shutil.copytree(tiny_model_folder, two)
    config = json.loads((two / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    (two / "config.json").write_text(json.dumps(config))
    weights = load_file(two / "model.safetensors") | {"score.weight": torch.zeros(2, 32)}
    save_file(weights, two / "model.safetensors", {"format": "pt"})
    refused("is a classifier with 2 labels", pairs, model=two)


def test_a_larger_tokenizer_is_refused(tiny_model_folder, extended_tokenizer_folder, pairs, tmp_path):
    argv = rm_argv(tiny_model_folder, pairs, tmp_path / "out", "--tokenizer_name_or_path", extended_tokenizer_folder)
    with pytest.raises(InputError, match="406 tokens, the model 400 embedding rows"):
        run_rm(argv)


def test_training_without_validation_pairs_is_warned_of(tiny_model_folder, pairs, tmp_path, caplog):
    argv = ["--model_name_or_path", str(tiny_model_folder), "--train_data", str(pairs), *SMALL, "--max_steps", "1"]
    results = run_rm([*argv, "--output_dir", str(tmp_path / "rm")])
    assert "the accuracy is not measured" in caplog.text
    assert results["steps"] == 1 and not (tmp_path / "rm" / "reward_report.json").exists()


# ---------------------------------------------------------------- interruptions


def assert_same_run(one: Path, other: Path) -> None:
    assert_equal_weights(one, other)
    assert losses(one) == losses(other), "every step saw the same pairs"


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, tiny_model_folder, pairs) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_rm(rm_argv(tiny_model_folder, pairs, folder, *TWO_EPOCHS))
    return folder


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(whole_run, tiny_model_folder, pairs, tmp_path):
    """The stop lies in the second epoch, whose order differs from the first's."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    (folder / "all_results.json").unlink()
    shutil.rmtree(folder / "checkpoint-30")
    (folder / "checkpoint-27" / "complete").unlink()
    run_rm(rm_argv(tiny_model_folder, pairs, folder, *TWO_EPOCHS))
    assert_same_run(whole_run, folder)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [6])
def test_a_killed_run_ends_with_the_same_bits(whole_run, tiny_model_folder, pairs, tmp_path, kills):
    check_kills("rm.py", lambda out: rm_argv(tiny_model_folder, pairs, out, *TWO_EPOCHS), whole_run, tmp_path, kills)
