"""pt.py and sft.py whole: artifacts, falling loss, exact resume after SIGKILL, refusals that lose nothing."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.paths import EXAMPLES
from support.training import assert_equal_weights, check_kills, losses
from utils.core.arguments import DataArguments, ExtendArguments, LoraArguments, ModelArguments
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.text.prompts import CHAT_TEMPLATES, encode_prompt
from utils.text.tokenizer import load_tokenizer
from utils.training import before_after
from utils.training.arguments import RunArguments

SMALL = ["--precision", "fp32", "--preprocessing_num_workers", "1", "--per_device_train_batch_size", "2"]
SMALL += [
    "--lora_rank",
    "4",
    "--lora_alpha",
    "8",
    "--target_modules",
    "q_proj,v_proj,down_proj",
    "--learning_rate",
    "1e-2",
]
SMALL += ["--logging_steps", "1", "--save_steps", "3", "--disable_tqdm", "True", "--report_to", "none"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    lines = (EXAMPLES / "pretrain" / "zh_train.txt").read_text(encoding="utf-8").splitlines()[:40]
    (folder / "zh.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = json.loads((EXAMPLES / "sft" / "train.json").read_text(encoding="utf-8"))[:60]
    (folder / "sft.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


def pt_argv(model, tokenizer, data, out, *extra) -> list[str]:
    argv = ["--model_name_or_path", str(model), "--tokenizer_name_or_path", str(tokenizer), "--train_data", str(data)]
    argv += ["--output_dir", str(out), "--block_size", "64", "--modules_to_save", "embed_tokens,lm_head"]
    return [*argv, "--max_steps", "12", "--validation_split", "0.1", *SMALL, *map(str, extra)]


def sft_argv(model, data, out, *extra) -> list[str]:
    argv = ["--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(out)]
    argv += ["--max_seq_length", "256", "--prompt_template", "llama-2", "--modules_to_save", "embed_tokens,lm_head"]
    return [*argv, "--max_steps", "12", "--validation_split", "0.1", *SMALL, *map(str, extra)]


def run_pt(argv):
    import pt

    types = (ModelArguments, ExtendArguments, LoraArguments, DataArguments, pt.PretrainingArguments, RunArguments)
    return pt.main(*parse_args(*types, argv=argv))


def run_sft(argv):
    import sft

    types = (ModelArguments, ExtendArguments, LoraArguments, DataArguments, sft.TuningArguments, RunArguments)
    return sft.main(*parse_args(*types, argv=argv))


@pytest.fixture(scope="session")
def pt_run(tmp_path_factory, tiny_model_folder, extended_tokenizer_folder, texts) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pt"
    run_pt(pt_argv(tiny_model_folder, extended_tokenizer_folder, texts / "zh.txt", folder, "--compare_embedding_init"))
    return folder


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory, tiny_model_folder, texts) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sft"
    run_sft(sft_argv(tiny_model_folder, texts / "sft.json", folder))
    return folder


def test_pt_leaves_a_complete_adapter(pt_run, extended_tokenizer_folder):
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.model",
        "tokenizer.json",
        "run_config.yaml",
        "README.md",
        "all_results.json",
        "trainer_state.json",
        "loss.png",
        "embedding_init.json",
    ):
        assert (pt_run / name).is_file(), name
    tensors = load_file(pt_run / "adapter_model.safetensors")
    rows = {key: value.shape[0] for key, value in tensors.items() if "embed_tokens" in key or "lm_head" in key}
    assert len(rows) == 2 and set(rows.values()) == {406}
    assert any(value.any() for key, value in tensors.items() if "lora_B" in key)
    inits = json.loads((pt_run / "embedding_init.json").read_text())
    assert set(inits) == {"mean_of_pieces", "mean", "random", "zero"}


def test_pt_learns_and_measures(pt_run):
    history = losses(pt_run)
    assert [step for step, _ in history] == list(range(1, 13))
    assert history[-1][1] < history[0][1] - 0.3
    results = json.loads((pt_run / "all_results.json").read_text())
    assert results["eval_zh_loss"] < math.log(406)
    assert math.isclose(results["eval_zh_perplexity"], math.exp(results["eval_zh_loss"]), rel_tol=1e-6)
    assert 0 < results["eval_zh_bits_per_byte"] < 8


def test_bits_per_byte_equals_a_plain_loop(pt_run, tiny_model_folder, extended_tokenizer_folder, texts, tmp_path):
    """An untrained evaluation against one forward pass a document with transformers' own loss."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from utils.text.tokenizer import encode_text, load_tokenizer

    tokenizer = load_tokenizer(extended_tokenizer_folder)
    base = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    base.resize_token_embeddings(406, mean_resizing=False)
    model = PeftModel.from_pretrained(base, pt_run).eval()
    document = (texts / "zh.txt").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "one.txt").write_text(document, encoding="utf-8")
    ids = [tokenizer.bos_token_id, *encode_text(tokenizer, document), tokenizer.eos_token_id]
    # Blocks of 64 see only their own tokens, so the oracle scores each block with what it can see.
    total = 0.0
    for start in range(0, len(ids), 64):
        block, targets = ids[start : start + 64], ids[start + 1 : start + 65]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([block])).logits[0, : len(targets)].double()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
    expected = total / math.log(2) / len(document.encode())
    out = tmp_path / "out"
    argv = pt_argv(
        tiny_model_folder, extended_tokenizer_folder, texts / "zh.txt", out, "--adapter_name_or_path", pt_run
    )
    argv += ["--validation_data", f"one={tmp_path / 'one.txt'}", "--learning_rate", "1e-30", "--max_steps", "1"]
    assert run_pt(argv)["eval_one_bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_sft_leaves_a_complete_adapter_with_its_template(sft_run):
    for name in ("adapter_model.safetensors", "tokenizer.json", "run_config.yaml", "all_results.json", "loss.png"):
        assert (sft_run / name).is_file(), name
    assert "[INST]" in (sft_run / "chat_template.jinja").read_text(encoding="utf-8")
    history = losses(sft_run)
    assert history[-1][1] < history[0][1] - 0.3
    assert "eval_heldout_loss" in json.loads((sft_run / "all_results.json").read_text())


def test_a_finished_run_is_refused_and_kept(pt_run, tiny_model_folder, extended_tokenizer_folder, texts):
    before = (pt_run / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"finished run.*--overwrite_output_dir"):
        run_pt(
            pt_argv(tiny_model_folder, extended_tokenizer_folder, texts / "zh.txt", pt_run, "--compare_embedding_init")
        )
    assert (pt_run / "adapter_model.safetensors").read_bytes() == before


@pytest.fixture
def short_answers(monkeypatch):
    """Twelve tokens: the plain loop reads the whole text again for each."""
    monkeypatch.setitem(before_after.SETTINGS, "max_new_tokens", 12)


def greedy(model, tokenizer, question: str) -> str:
    """The likeliest answer, by a plain loop over whole texts."""
    prompt = encode_prompt([{"role": "user", "content": question}], CHAT_TEMPLATES["llama-2"], tokenizer)
    ids = list(prompt)
    while len(ids) < len(prompt) + 12 and tokenizer.eos_token_id not in ids[len(prompt) :]:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_the_same_command_gives_the_same_bits(sft_run, tiny_model_folder, texts, tmp_path, caplog, short_answers):
    """Also if it answers questions: what it says before is the base's answer, what it says after the adapter's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    caplog.set_level("INFO")
    asked = tmp_path / "questions.json"
    asked.write_text(json.dumps([{"instruction": "Hi!", "output": "Hello."}, {"instruction": "Where is the cat?"}]))
    argv = sft_argv(tiny_model_folder, texts / "sft.json", tmp_path / "again", "--questions", asked)
    rows = run_sft(argv)["questions"]
    assert_equal_weights(sft_run, tmp_path / "again")
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model_folder), load_tokenizer(tiny_model_folder)
    before = [greedy(base, tokenizer, row["question"]) for row in rows]
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "again"))
    after = [greedy(tuned, tokenizer, row["question"]) for row in rows]
    assert rows == [
        {"question": "Hi!", "reference": "Hello.", "before": before[0], "after": after[0]},
        {"question": "Where is the cat?", "before": before[1], "after": after[1]},
    ]
    assert before != after and json.loads((tmp_path / "again" / "all_results.json").read_text())["questions"] == rows
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "## Before and after" in card and "**Hi!**\n- reference: Hello.\n- before: " in card
    assert "before and after:\n  Hi!\n    reference  Hello." in caplog.text
    run_sft([str(tmp_path / "again" / "run_config.yaml"), "--output_dir", str(tmp_path / "from_config")])
    assert_equal_weights(sft_run, tmp_path / "from_config")


def test_an_unfinished_run_resumes_with_its_seed_and_refuses_other_settings(
    sft_run, tiny_model_folder, texts, tmp_path, caplog, short_answers
):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run"
    shutil.copytree(sft_run, folder)
    (folder / "all_results.json").unlink()
    shutil.rmtree(folder / "checkpoint-12")
    (folder / "checkpoint-9" / "complete").unlink()  # as if its writing had been cut off
    argv = sft_argv(tiny_model_folder, texts / "sft.json", folder, "--seed", 7, "--overwrite_output_dir")
    with pytest.raises(InputError, match=r"other settings \(lora_rank 4 -> 2\)"):
        run_sft([*argv, "--lora_rank", "2"])
    asked = tmp_path / "questions.json"
    asked.write_text(json.dumps([{"instruction": "Where is the cat?"}]))
    (row,) = run_sft([*argv, "--questions", str(asked)])["questions"]
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model_folder), load_tokenizer(tiny_model_folder)
    assert row["before"] == greedy(base, tokenizer, "Where is the cat?"), "of the weights the first half began with"
    assert "resuming with the recorded seed 42, not 7" in caplog.text
    assert_equal_weights(sft_run, folder)
    assert losses(folder) == losses(sft_run)


def test_a_run_stopped_after_its_last_step_only_finishes(sft_run, tiny_model_folder, texts, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(sft_run, folder)
    (folder / "all_results.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    assert run_sft(sft_argv(tiny_model_folder, texts / "sft.json", folder))["steps"] == 12
    assert_equal_weights(sft_run, folder)
    assert losses(folder) == losses(sft_run)


def test_other_data_cannot_go_on_where_a_run_stopped(sft_run, tiny_model_folder, texts, tmp_path):
    folder, data = tmp_path / "run", tmp_path / "sft.json"
    data.write_bytes((texts / "sft.json").read_bytes())
    argv = sft_argv(tiny_model_folder, data, folder)
    run_sft(argv)
    (folder / "all_results.json").unlink()
    rows = json.loads(data.read_text(encoding="utf-8"))
    data.write_text(json.dumps(rows[1:], ensure_ascii=False), encoding="utf-8")
    with pytest.raises(InputError, match=r"other data .*--restart"):
        run_sft(argv)
    assert (folder / "checkpoint-12" / "complete").is_file()


def test_restart_starts_over(sft_run, tiny_model_folder, texts, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(sft_run, folder)
    (folder / "all_results.json").unlink()
    run_sft(
        sft_argv(tiny_model_folder, texts / "sft.json", folder, "--restart", "--lora_rank", "2", "--max_steps", "2")
    )
    assert json.loads((folder / "all_results.json").read_text())["steps"] == 2


def test_a_folder_with_something_else_is_never_touched(tiny_model_folder, texts, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no training run"):
        run_sft(sft_argv(tiny_model_folder, texts / "sft.json", tmp_path, "--overwrite_output_dir", "--restart"))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_peft_path_goes_on_training(sft_run, tiny_model_folder, texts, tmp_path):
    argv = sft_argv(
        tiny_model_folder, texts / "sft.json", tmp_path / "more", "--peft_path", sft_run, "--max_steps", "3"
    )
    run_sft(argv)
    before, after = (
        load_file(sft_run / "adapter_model.safetensors"),
        load_file(tmp_path / "more/adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[key], after[key]) for key in before if "lora_B" in key)
    assert losses(tmp_path / "more")[0][1] < losses(sft_run)[0][1], "it starts where the adapter was"


def test_full_training_from_scratch(base_tokenizer_folder, texts, tmp_path):
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--config_name", str(tmp_path), "--config_overrides", "num_hidden_layers=2", "--full_finetuning"]
    argv += [
        "--tokenizer_name_or_path",
        str(base_tokenizer_folder),
        "--train_data",
        str(texts / "zh.txt"),
        "--block_size",
        "64",
    ]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_steps", "3", *SMALL]
    run_pt(argv)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size == 400 == len(
        AutoTokenizer.from_pretrained(tmp_path / "out")
    )


@pytest.mark.slow
def test_sft_killed_once_ends_with_the_same_bits(sft_run, tiny_model_folder, texts, tmp_path):
    check_kills("sft.py", lambda out: sft_argv(tiny_model_folder, texts / "sft.json", out), sft_run, tmp_path, 1)


@pytest.mark.slow
def test_sft_killed_ten_times_ends_with_the_same_bits(sft_run, tiny_model_folder, texts, tmp_path):
    check_kills("sft.py", lambda out: sft_argv(tiny_model_folder, texts / "sft.json", out), sft_run, tmp_path, 10)


@pytest.mark.slow
def test_pt_killed_ten_times_ends_with_the_same_bits(
    pt_run, tiny_model_folder, extended_tokenizer_folder, texts, tmp_path
):
    check_kills(
        "pt.py",
        lambda out: pt_argv(
            tiny_model_folder, extended_tokenizer_folder, texts / "zh.txt", out, "--compare_embedding_init"
        ),
        pt_run,
        tmp_path,
        10,
    )


# ---------------------------------------------------------------- learning rates


ONE_STEP = ["--max_steps", "1", "--optim", "sgd", "--lr_scheduler_type", "constant", "--max_grad_norm", "0"]
ONE_STEP += ["--weight_decay", "0", "--save_strategy", "no", "--validation_split", "0", "--learning_rate", "0.5"]


def changes(before: Path, after: Path) -> dict[str, torch.Tensor]:
    """How far one step of plain gradient descent moved each weight."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    return {name: new[name] - old[name] for name in old}


def test_embeddings_have_a_learning_rate_of_their_own(tiny_model_folder, texts, tmp_path):
    """One step of gradient descent moves a weight by its gradient times its learning rate."""
    folders = {}
    for rate in (None, "0.125"):
        folders[rate] = tmp_path / str(rate)
        argv = pt_argv(tiny_model_folder, tiny_model_folder, texts / "zh.txt", folders[rate], *ONE_STEP)
        run_pt([*argv, "--full_finetuning", *([] if rate is None else ["--embedding_learning_rate", rate])])
    plain, own = (changes(tiny_model_folder, folder) for folder in folders.values())
    for name, change in plain.items():
        expected = change / 4 if name in ("model.embed_tokens.weight", "lm_head.weight") else change
        assert change.abs().max() > 0, name
        torch.testing.assert_close(own[name], expected, rtol=1e-3, atol=1e-6, msg=name)


def test_a_learning_rate_for_embeddings_that_are_not_trained_is_refused(tiny_model_folder, texts, tmp_path):
    argv = pt_argv(tiny_model_folder, tiny_model_folder, texts / "zh.txt", tmp_path / "out")
    argv += ["--modules_to_save", "norm", "--embedding_learning_rate"]
    with pytest.raises(InputError, match="neither embed_tokens nor lm_head is trained"):
        run_pt([*argv, "1e-4"])
    with pytest.raises(InputError, match=r"--embedding_learning_rate 0\.0: need a number"):
        run_pt([*argv, "0"])
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- longer windows


LONG = ["--full_finetuning", "--block_size", "96", "--max_steps", "1", "--save_strategy", "no"]
LONG += ["--validation_split", "0"]


@pytest.fixture(scope="module")
def short_model(tmp_path_factory, tiny_model_folder) -> Path:
    """The tiny model with a window of 48 tokens."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 48}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def long_argv(model, texts, out, *extra) -> list[str]:
    return pt_argv(model, model, texts / "zh.txt", out, *LONG, *extra)


@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn"])
def test_a_longer_window_is_trained_and_stands_in_the_config(short_model, texts, tmp_path, scaling):
    """The first loss is that of transformers' own model under a config written by hand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    argv = long_argv(short_model, texts, tmp_path / "out", "--rope_scaling", scaling, "--rope_factor", "2")
    run_pt([*argv, "--learning_rate", "1e-12", "--per_device_train_batch_size", "1"])
    config = AutoConfig.from_pretrained(tmp_path / "out")
    dim = config.hidden_size // config.num_attention_heads
    by_hand = {
        "pi": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        "ntk": {"rope_type": "default", "rope_theta": 10000.0 * 3.0 ** (dim / (dim - 2))},  # alpha = 2 * 2 - 1
        "yarn": {
            "rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 48,
        },
    }[scaling]  # fmt: skip
    assert config.max_position_embeddings == 96
    assert {name: config.rope_parameters[name] for name in by_hand} == pytest.approx(by_hand)
    oracle = AutoModelForCausalLM.from_pretrained(short_model, rope_parameters=by_hand, max_position_embeddings=96)
    plain = AutoModelForCausalLM.from_pretrained(short_model)
    ids = torch.arange(3, 83).unsqueeze(0)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found, expected, unscaled = (model(ids).logits for model in (trained, oracle, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - unscaled).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], r"--block_size 96: the model's window has 48 tokens.*--rope_scaling yarn --rope_factor 2"),
        (["--rope_scaling", "pi", "--rope_factor", "1.5"], "--block_size 96: the model's window has 72 tokens"),
        (["--rope_scaling", "pi", "--rope_factor", "0.5"], "--rope_factor 0.5: need more than 1"),
        (["--rope_factor", "2"], "do nothing without --rope_scaling"),
        (["--rope_scaling", "auto-ntk"], "training has one rotation for all texts"),
        (["--rope_scaling", "yarn", "--full_finetuning", "False"], "make a base with it first"),
    ],
)
def test_windows_that_cannot_be_trained_are_refused(short_model, texts, tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        run_pt(long_argv(short_model, texts, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_is_trained_on_a_base_that_was_made_longer(short_model, texts, tmp_path):
    import merge_llama2_with_chinese_lora_low_mem as merge

    from utils.core.arguments import RopeArguments

    merge.main(merge.MergeArguments(str(short_model), output_dir=str(tmp_path / "long")), RopeArguments("yarn", 2.0))
    argv = long_argv(tmp_path / "long", texts, tmp_path / "out", "--full_finetuning", "False")
    run_pt(argv)
    adapter = str(tmp_path / "out")
    merge.main(merge.MergeArguments(str(tmp_path / "long"), adapter, output_dir=str(tmp_path / "merged")))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn" and config["max_position_embeddings"] == 96


# ---------------------------------------------------------------- new rows alone


@pytest.mark.slow
def test_new_rows_alone_are_trained(tiny_model_folder, extended_tokenizer_folder, texts, tmp_path):
    """One step of gradient descent: new rows move as they do beside everything else, nothing else moves at all."""
    first = len(load_tokenizer(tiny_model_folder))
    for name, extra in (("all", []), ("rows", ["--train_new_rows_only"])):
        out = tmp_path / name
        run_pt(pt_argv(tiny_model_folder, extended_tokenizer_folder, texts / "zh.txt", out, *ONE_STEP, *extra))
    plain, rows = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("all", "rows"))
    for name, weight in rows.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            base = load_file(tiny_model_folder / "model.safetensors")[name.removeprefix("base_model.model.")]
            assert torch.equal(weight[:first], base[:first])
            assert (plain[name][:first] - base[:first]).abs().max() > 0
            torch.testing.assert_close(weight[first:], plain[name][first:], rtol=1e-5, atol=1e-6)
        elif ".lora_B." in name:
            assert weight.abs().max() == 0 and plain[name].abs().max() > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--modules_to_save", "norm"], "embed_tokens and lm_head are not trained"),
        (["--tokenizer_name_or_path", "{model}"], "adds no token to the 400 of"),
    ],
)
def test_new_rows_that_cannot_be_trained_alone(
    tiny_model_folder, extended_tokenizer_folder, texts, tmp_path, flags, words
):
    argv = pt_argv(tiny_model_folder, extended_tokenizer_folder, texts / "zh.txt", tmp_path / "out")
    with pytest.raises(InputError, match=words):
        run_pt([*argv, "--train_new_rows_only", *(flag.format(model=tiny_model_folder) for flag in flags)])


def test_more_steps_to_decay_than_there_are_is_refused(tiny_model_folder, texts, tmp_path):
    argv = pt_argv(tiny_model_folder, tiny_model_folder, texts / "zh.txt", tmp_path / "out")
    argv += ["--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "4", "--lr_scheduler_kwargs"]
    with pytest.raises(InputError, match="are 13 steps together, the run has 12"):
        run_pt([*argv, '{"num_decay_steps": 9}'])
