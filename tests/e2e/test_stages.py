"""What holds for all five training scripts alike, each with a few records."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from support.models import MIXTURES, model_of, save_llama
from support.paths import SCRIPTS
from support.stages import STAGES, run_main, stage_argv, stage_losses, write_records
from utils.core.errors import InputError
from utils.text.prompts import CHAT_TEMPLATES, encode_prompt
from utils.text.tokenizer import load_tokenizer, save_tokenizer
from utils.training import arguments

SAVED = {"rm": "embed_tokens,score"}


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="session")
def stored(tmp_path_factory, base_tokenizer_folder):
    """One model whose weights float16 can hold, stored in float32, float16 and (rounded) bfloat16."""
    folder, tokenizer = tmp_path_factory.mktemp("stored"), load_tokenizer(base_tokenizer_folder)
    save_llama(folder / "first", tokenizer, scale=3.0, max_position_embeddings=512)
    model = AutoModelForCausalLM.from_pretrained(folder / "first").half()
    for name in ("float32", "float16", "bfloat16"):
        model.to(getattr(torch, name)).save_pretrained(folder / name)
        save_tokenizer(tokenizer, folder / name)
    return folder


def losses_of(stage, stored, dtype, records, out, *flags):
    run_main(stage, stage_argv(stage, stored / dtype, records, out, *flags))
    return stage_losses(stage, out)


@pytest.mark.parametrize(
    "stage", [stage if stage == "pt" else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
)
def test_a_base_in_float16_trains_as_in_float32_without_bf16(stage, stored, records, tmp_path, monkeypatch):
    """Llama-2's own weights on an older processor or GPU: every digit, since float32 holds what float16 does."""
    monkeypatch.setattr(arguments, "bf16_is_supported", lambda: False)
    saved = ("--modules_to_save", SAVED.get(stage, "embed_tokens,lm_head"))
    found = losses_of(stage, stored, "float16", records, tmp_path / "float16", *saved)
    assert len(found) == 3 and found == losses_of(stage, stored, "float32", records, tmp_path / "float32", *saved)


@pytest.mark.slow
@pytest.mark.parametrize("way", [(), ("--full_finetuning",), ("--modules_to_save", "embed_tokens,norm")])
@pytest.mark.parametrize("stage", STAGES)
def test_every_way_to_store_and_to_train_goes_together(stage, way, stored, records, tmp_path):
    for precision in ("fp32", "bf16"):
        flags = ("--precision", precision, *way)
        losses = {
            dtype: losses_of(stage, stored, dtype, records, tmp_path / precision / dtype, *flags)
            for dtype in ("float32", "float16", "bfloat16")
        }
        if precision == "fp32":
            assert losses["float16"] == losses["float32"]
        if stage != "ppo":  # whose answers differ by their first other token
            for found in losses.values():
                assert found == pytest.approx(losses["float32"], abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pt", "sft", "dpo"])
def test_a_tied_head_begins_with_the_loss_of_its_copy(stage, stored, records, tmp_path):
    """Qwen2.5-0.5B's is tied: PEFT puts a layer of its own in the head's place where embeddings are trained whole."""
    for tied in (True, False):
        model = AutoModelForCausalLM.from_pretrained(stored / "float32")
        model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
        model.config.tie_word_embeddings = tied
        model.tie_weights()
        model.save_pretrained(tmp_path / f"model-{tied}")
        save_tokenizer(load_tokenizer(stored / "float32"), tmp_path / f"model-{tied}")
    flags = ("--precision", "fp32", "--modules_to_save", "embed_tokens,lm_head")
    found, copied = (
        losses_of(stage, tmp_path, f"model-{tied}", records, tmp_path / f"run-{tied}", *flags)
        for tied in (True, False)
    )
    assert found[0] == pytest.approx(copied[0], rel=1e-5) and found[2] < found[0]


@pytest.mark.slow
def test_answers_of_ppo_are_sampled_where_modules_trained_whole_stand_in_a_base_of_16_bits(stored, records, tmp_path):
    flags = ("--precision", "bf16", "--modules_to_save", "embed_tokens,lm_head,norm")
    assert len(losses_of("ppo", stored, "bfloat16", records, tmp_path / "run", *flags)) == 3


@pytest.mark.slow
def test_a_type_that_float32_arithmetic_cannot_keep_is_said(stored, records, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        losses_of("sft", stored, "float32", records, tmp_path / "run", "--precision", "fp32", "--dtype", "float16")
    assert "--dtype float16 has no effect with --precision fp32" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("run", ["dpo", "ppo", "sft --full_finetuning", "ppo --critic adapter"])
def test_questions_are_answered_before_and_after(run, stored, records, tmp_path):
    """By what is loaded and what is saved, as transformers has it; and nothing else about the run changes."""
    stage, *way = run.split()
    flags = ("--precision", "fp32", "--learning_rate", "0.05", *way)
    asked = [{"instruction": "Where is a?"}, {"instruction": "Where is b?"}]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    without = losses_of(stage, stored, "float32", records, tmp_path / "without", *flags)
    flags += ("--questions", tmp_path / "questions.json")
    assert losses_of(stage, stored, "float32", records, tmp_path / "with", *flags) == without
    name = "model.safetensors" if "--full_finetuning" in way else "adapter_model.safetensors"
    first, second = (load_file(tmp_path / run / name) for run in ("without", "with"))
    assert all(torch.equal(first[key], second[key]) for key in second)
    rows = json.loads((tmp_path / "with" / "all_results.json").read_text())["questions"]
    assert [row["question"] for row in rows] == ["Where is a?", "Where is b?"]
    before = AutoModelForCausalLM.from_pretrained(stored / "float32")
    if "--full_finetuning" in way:
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    else:
        copy = AutoModelForCausalLM.from_pretrained(stored / "float32")
        after = PeftModel.from_pretrained(copy, str(tmp_path / "with"))
    tokenizer = load_tokenizer(stored / "float32")
    for row in rows:
        asked = [{"role": "user", "content": row["question"]}]
        prompt = torch.tensor([encode_prompt(asked, CHAT_TEMPLATES["llama-2"], tokenizer)])
        for when, model in (("before", before), ("after", after)):
            ids = model.generate(input_ids=prompt, max_new_tokens=128, do_sample=False)[0, prompt.shape[1] :]
            assert row[when] == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert any(row["before"] != row["after"] for row in rows)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [(kind, stage) for kind in MIXTURES for stage in STAGES],
)
@pytest.mark.slow
def test_experts_and_routers_of_mixtures_are_trained_in_4_bits(
    kind, stage, base_tokenizer_folder, records, tmp_path, caplog
):
    """With dropout on experts and the balancing loss; the adapter merges, to what base and adapter compute."""
    import merge_llama2_with_chinese_lora_low_mem as merge

    tokenizer = load_tokenizer(base_tokenizer_folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": 512}
    model_of(AutoConfig.for_model(kind, **(sizes | MIXTURES[kind])), scale=0.05).save_pretrained(tmp_path / "base")
    save_tokenizer(tokenizer, tmp_path / "base")
    flags = ["--load_in_kbits", "4", "--target_modules", "all", "--lora_dropout", "0.05", "--gradient_checkpointing"]
    flags += ["--output_router_logits"] * (stage in ("pt", "sft", "dpo"))
    out = tmp_path / "run"
    losses = losses_of(stage, tmp_path, "base", records, out, *flags)
    assert len(losses) == 3 and all(loss == loss for loss in losses)
    weights = load_file(out / "adapter_model.safetensors")
    moved = {name for name, value in weights.items() if ".lora_B." in name and value.abs().max() > 0}
    part = "w2" if kind == "mixtral" else "down_proj"
    assert any(f".mlp.experts.3.{part}.lora_B" in name for name in moved)
    assert any(".mlp.gate.lora_B" in name for name in moved)
    if kind == "qwen2_moe":
        assert any(".shared_expert_gate.lora_B" in name for name in moved)
    merge.main(
        merge.MergeArguments(str(tmp_path / "base"), str(out), output_dir=str(tmp_path / "out"), verify=stage != "rm")
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_start_is_refused_at_once_and_the_first_loses_nothing(stage, tiny_model_folder, records, tmp_path):
    """Before the first checkpoint, where nothing but the lock says that somebody is at work."""
    out = tmp_path / "run"
    argv = stage_argv(stage, tiny_model_folder, records, out)
    code = (
        "import sys, time; from pathlib import Path; from utils.core.files import HeldFolder\n"
        "out = Path(sys.argv[1]); held = HeldFolder(out)\n"
        "out.mkdir(); (out / 'run_config.yaml').touch(); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=SCRIPTS, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        with pytest.raises(InputError, match=rf"another run is writing it \(process {first.pid} on "):
            run_main(stage, argv)
        first.kill()
    assert (out / "run_config.yaml").is_file() and not list(out.glob("all_results.json"))
    if stage == "sft":  # the lock went with its process
        run_main(stage, argv)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".token_cache", "run"]


@pytest.mark.parametrize("stage", ["rm", "dpo", "ppo"])
def test_flags_that_a_stage_does_not_ask_are_said_before_data_is_read(
    stage, tiny_model_folder, records, tmp_path, caplog
):
    argv = stage_argv(stage, tiny_model_folder, records, tmp_path / "run", "--data_seed", "7")
    with pytest.raises(InputError, match="absent"):
        run_main(stage, [*argv, "--train_data", str(tmp_path / "absent.jsonl")])
    assert "--data_seed has no effect: --seed decides the order" in caplog.text
    if stage == "ppo":
        with pytest.raises(InputError, match=r"--neftune_noise_alpha 5\.0: PPO compares"):
            run_main(stage, [*argv, "--neftune_noise_alpha", "5"])
