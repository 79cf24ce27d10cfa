"""dpo.py whole: artifacts, a preference learned, merging, the best checkpoint, exact resume after SIGKILL."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.training import assert_equal_weights, check_kills, losses, run_dpo, run_until_done
from utils.core.errors import InputError

SMALL = ["--precision", "fp32", "--preprocessing_num_workers", "1", "--per_device_train_batch_size", "4"]
SMALL += [
    "--lora_rank",
    "4",
    "--lora_alpha",
    "8",
    "--lora_dropout",
    "0.1",
    "--target_modules",
    "q_proj,v_proj,down_proj",
]
SMALL += ["--learning_rate", "1e-2", "--logging_steps", "1", "--save_steps", "3", "--disable_tqdm", "True"]
SMALL += ["--report_to", "none", "--prompt_template", "llama-2", "--max_seq_length", "128"]


def dpo_argv(model, data, out, *extra) -> list[str]:
    argv = ["--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(out), *SMALL]
    return [*argv, "--validation_split", "0.2", "--max_steps", "12", *map(str, extra)]


@pytest.fixture(scope="session")
def preferences(tmp_path_factory) -> Path:
    """Polite answers are preferred: a preference that can be learned from the answer alone."""
    path = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    topics = ["the cat", "a dog", "my house", "the sea", "a red hat", "that tree", "some milk", "an old man"]
    rows = [
        {"prompt": f"Tell me about {topic}, please ({number}).", "chosen": f"Yes, here is {topic}.",
         "rejected": f"No, go away with {topic}." if number % 2 else "No.", "source": "even" if number % 2 else "odd"}
        for number in range(5) for topic in topics
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dpo_run(tmp_path_factory, tiny_model_folder, preferences) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dpo"
    run_dpo(dpo_argv(tiny_model_folder, preferences, folder))
    return folder


def entries(folder: Path, key: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def test_dpo_leaves_a_complete_adapter_as_tuning_does(dpo_run):
    for name in (
        "adapter_model.safetensors", "adapter_config.json", "base_model.json", "tokenizer.json", "tokenizer.model",
        "chat_template.jinja", "run_config.yaml", "README.md", "trainer_state.json", "all_results.json", "loss.png",
        "dpo.png",
    ):  # fmt: skip
        assert (dpo_run / name).stat().st_size > 0, name
    assert "[INST]" in (dpo_run / "chat_template.jinja").read_text(encoding="utf-8")
    assert all(tensor.numel() for tensor in load_file(dpo_run / "adapter_model.safetensors").values())


def test_dpo_learns_the_preference(dpo_run):
    results = json.loads((dpo_run / "all_results.json").read_text())
    assert results["eval_accuracy"] == results["eval_heldout_accuracy"] >= 0.9
    assert results["eval_reward_margin"] > 0.5 and results["eval_loss"] < 0.5
    assert results["eval_chosen_reward"] - results["eval_rejected_reward"] == pytest.approx(
        results["eval_reward_margin"], abs=1e-5
    )
    assert (
        entries(dpo_run, "loss")[0] == pytest.approx(0.693147, abs=1e-4) and entries(dpo_run, "reward_margin")[0] == 0
    )
    assert entries(dpo_run, "accuracy")[-1] > 0.7


def test_the_adapter_merges(dpo_run, tiny_model_folder, tmp_path):
    import merge_llama2_with_chinese_lora_low_mem as merge
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    merge.main(merge.MergeArguments(str(tiny_model_folder), str(dpo_run), output_dir=str(tmp_path / "m")))
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model_folder), dpo_run)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == (dpo_run / "chat_template.jinja").read_text()


@pytest.mark.slow
def test_the_best_checkpoint_is_what_is_saved(tiny_model_folder, preferences, tmp_path):
    out = tmp_path / "best"
    extra = ["--load_best_model_at_end", "True", "--metric_for_best_model", "eval_heldout_reward_margin"]
    extra += [
        "--greater_is_better",
        "False",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "3",
        "--save_total_limit",
        "1",
    ]
    run_dpo(dpo_argv(tiny_model_folder, preferences, out, *extra))
    margins = entries(out, "eval_heldout_reward_margin")
    best = min(range(4), key=margins.__getitem__)  # of steps 3, 6, 9, 12; training raises it, so an early one
    assert best < 3
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_global_step"] == 3 * (best + 1)
    assert_equal_weights(out, out / f"checkpoint-{3 * (best + 1)}")
    assert json.loads((out / "all_results.json").read_text())["eval_reward_margin"] == pytest.approx(
        margins[best], abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["live", "precomputed"])
def test_an_unfinished_run_goes_on(before, dpo_run, tiny_model_folder, preferences, tmp_path, caplog):
    """Cut off after step 9 of 12; with a precomputed reference the cache is used again."""
    caplog.set_level(logging.INFO)
    folder, whole = tmp_path / "run", dpo_run
    extra = ["--precompute_reference"] if before else []
    if before:
        whole = tmp_path / "whole"
        run_dpo(dpo_argv(tiny_model_folder, preferences, whole, *extra))
    shutil.copytree(whole, folder)
    (folder / "all_results.json").unlink()
    shutil.rmtree(folder / "checkpoint-12")
    argv = dpo_argv(tiny_model_folder, preferences, folder, *extra)
    with pytest.raises(InputError, match=r"other settings \(beta"):
        run_dpo([*argv, "--beta", "0.5"])
    run_dpo(argv)
    assert_equal_weights(whole, folder)
    assert losses(folder) == losses(whole)
    assert entries(folder, "reward_margin") == entries(whole, "reward_margin")
    if before:
        assert "using the reference's log-probabilities" in caplog.text


@pytest.mark.slow
def test_another_reference_cannot_take_over(tiny_model_folder, preferences, tmp_path):
    reference, folder = tmp_path / "reference", tmp_path / "run"
    shutil.copytree(tiny_model_folder, reference)
    argv = dpo_argv(tiny_model_folder, preferences, folder, "--reference_model", reference, "--max_steps", "3")
    run_dpo(argv)
    (folder / "all_results.json").unlink()
    weights = bytearray((reference / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (reference / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=r"other reference .*--restart"):
        run_dpo(argv)


@pytest.mark.slow
def test_dpo_killed_once_ends_with_the_same_bits(dpo_run, tiny_model_folder, preferences, tmp_path):
    check_kills("dpo.py", lambda out: dpo_argv(tiny_model_folder, preferences, out), dpo_run, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("adapter_model.safetensors", ["--precompute_reference"]),
        ("model.safetensors", ["--full_finetuning", "--learning_rate", "1e-3"]),
    ],
)
def test_dpo_killed_ten_times_ends_with_the_same_bits(name, flags, tiny_model_folder, preferences, tmp_path):
    def argv_of(out):
        # each has its own cache, so that kills hit the reference's computation too
        return dpo_argv(tiny_model_folder, preferences, out, *flags, "--data_cache_dir", f"{out}-cache")

    run_dpo(argv_of(tmp_path / "whole"))
    generator = random.Random(10)
    for folder in (tmp_path / "one", tmp_path / "two"):
        run_until_done("dpo.py", argv_of(folder), folder, 5, generator)
        assert_equal_weights(tmp_path / "whole", folder, name)
        assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "hinge", "orpo", "simpo"])
def test_every_loss_learns_the_preference(loss, tiny_model_folder, preferences, tmp_path):
    extra = ["--loss", loss, "--max_steps", "24"]
    assert run_dpo(dpo_argv(tiny_model_folder, preferences, tmp_path / loss, *extra))["eval_accuracy"] >= 0.9


@pytest.mark.slow
def test_dpo_on_a_4_bit_base(tiny_model_folder, preferences, tmp_path):
    pytest.importorskip("bitsandbytes")
    extra = ["--load_in_kbits", "4"]
    live = run_dpo(dpo_argv(tiny_model_folder, preferences, tmp_path / "live", *extra))
    before = run_dpo(dpo_argv(tiny_model_folder, preferences, tmp_path / "before", *extra, "--precompute_reference"))
    assert live["eval_accuracy"] >= 0.9
    # The reference is computed in other batches, and bfloat16 rounds them otherwise.
    assert before["eval_loss"] == pytest.approx(live["eval_loss"], rel=1e-2)
