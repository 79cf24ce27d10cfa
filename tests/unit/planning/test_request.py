"""What is read out of a command's flags."""

import json

import pytest
import torch
from transformers import LlamaConfig

from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.planning.request import STAGES, PlannedRun, read_request

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("request") / "model"
    LlamaConfig(**SIZES, vocab_size=512, dtype="bfloat16").save_pretrained(path)
    return path


def request(stage: str, folder, *flags: str, **settings):
    argv = ["--model_name_or_path", str(folder), "--output_dir", "out", *flags]
    *arguments, run = parse_args(*STAGES[stage], PlannedRun, argv=argv)
    return read_request(stage, arguments, run, **({"on_gpu": True} | settings))


def test_a_gpu_computes_in_what_was_asked_for(folder):
    types = {(): torch.bfloat16, ("--fp16",): torch.float16, ("--precision", "fp32"): torch.float32}
    for flags, dtype in types.items():
        assert request("pt", folder, *flags).job.compute_dtype == dtype


def test_weights_have_the_type_that_training_gives_them(folder):
    assert request("pt", folder).job.dtype == torch.bfloat16  # as stored
    assert request("pt", folder, "--full_finetuning").job.dtype == torch.float32
    assert request("pt", folder, "--full_finetuning", "--dtype", "bfloat16").job.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stage", "flags", "length"),
    [
        ("pt", ["--block_size", "300"], 300),
        ("sft", ["--max_seq_length", "700"], 700),
        ("rm", ["--max_seq_length", "700"], 1400),  # two answers behind a short prompt
        ("dpo", ["--max_seq_length", "700"], 1400),
        ("ppo", ["--max_prompt_length", "100", "--max_new_tokens", "200", "--reward_function", "a:b"], 300),
    ],
)
def test_rows_are_as_long_as_the_flags_allow(folder, stage, flags, length):
    assert request(stage, folder, *flags).job.length == length
    assert request(stage, folder, *flags, length=90).job.length == 90


def test_a_larger_vocabulary_is_planned(folder):
    assert request("pt", folder, vocabulary=800).job.config.vocab_size == 800
    assert request("pt", folder, vocabulary=300).job.config.vocab_size == 512


def test_dpo_asks_a_reference_unless_it_is_known_before(folder):
    assert request("dpo", folder).job.reference
    for flags in (["--loss", "orpo"], ["--precompute_reference"], ["--full_finetuning"]):
        assert not request("dpo", folder, *flags).job.reference


def test_full_ppo_holds_a_reference_of_its_own(folder):
    flags = ["--reward_function", "a:b", "--full_finetuning"]
    assert request("ppo", folder, *flags).others == 2 * (2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 128) + 64)


def test_rollouts_have_whole_pages_of_the_cache(folder):
    flags = ["--max_prompt_length", "100", "--max_new_tokens", "200", "--reward_function", "a:b"]
    rollouts = request("ppo", folder, *flags, "--per_device_rollout_batch_size", "8").rollouts
    assert (rollouts.slots, rollouts.tokens) == (8, 512)


def test_configs_of_deepspeed_and_fsdp_are_read_not_started(folder, tmp_path):
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"}}
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config))
    sharing = request("pt", folder, "--deepspeed", str(path), processes=4).sharing
    assert (sharing.kind, sharing.processes, sharing.optimizer_on_cpu, sharing.weights_on_cpu) == (
        "zero3",
        4,
        True,
        False,
    )
    assert sharing.bucket == 64 * 64
    assert request("pt", folder, "--fsdp", "full_shard", processes=2).sharing.kind == "fsdp"
    assert request("pt", folder, processes=2).sharing.kind == "ddp"


def test_what_training_would_refuse_is_refused(folder):
    with pytest.raises(InputError, match="cannot train 4-bit weights"):
        request("pt", folder, "--full_finetuning", "--load_in_kbits", "4")
    with pytest.raises(InputError, match="no module is called head"):
        request("pt", folder, "--modules_to_save", "head")
    shared = ["--sequence_parallel_size", "2"]
    assert request("pt", folder, *shared, processes=4).job.sequence_parallel_size == 2
    with pytest.raises(InputError, match="3 processes; start a multiple of 2"):
        request("sft", folder, *shared, processes=3)
    with pytest.raises(InputError, match="divisor of both"):
        request("sft", folder, "--sequence_parallel_size", "8", processes=8)
    with pytest.raises(InputError, match="--sequence_parallel_size 2: pairs and rollouts"):
        request("dpo", folder, *shared, processes=2)
