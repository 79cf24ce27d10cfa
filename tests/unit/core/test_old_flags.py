"""Old flags: DeepSpeed-Chat's are translated by the scripts that do its steps and refused by others; A2's commands."""

import logging

import pytest

from support.scripts import script_flags, script_types
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.core.old_flags import DROPPED_OF_CHAT, RENAMED, REPLACED_SWITCHES, read_flags, translate_old_flags

KNOWN = {"kl_coef", "deepspeed", "dtype", "precision", "rollout_batch_size", "per_device_rollout_batch_size"}


def test_new_names_are_flags_of_some_script():
    flags = set().union(
        *(script_flags(name) for name in ("pt.py", "sft.py", "rm.py", "ppo.py", "merge_tokenizers.py")),
        script_flags("eval_multiple_choice.py"),
    )
    missing = {new for new in RENAMED.values() if f"--{new}" not in flags}
    assert not missing
    assert not {f"--{old}" for old in [*RENAMED, *REPLACED_SWITCHES, *DROPPED_OF_CHAT]} & (flags - {"--adapter"})


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--deepspeed"], []),
        (["--deepspeed", "--zero_stage", "3", "--offload"], []),
        (["--deepspeed", "zero.json"], ["--deepspeed", "zero.json"]),
        (["--deepspeed=zero.json"], ["--deepspeed=zero.json"]),
        (["--dtype", "bf16"], ["--precision", "bf16"]),
        (["--dtype=fp16"], ["--precision", "fp16"]),
        (["--dtype", "bfloat16"], ["--dtype", "bfloat16"]),
        (["--kl_ctl=0.2"], ["--kl_coef=0.2"]),
        (["--data_split", "0,10,0", "--kl_ctl", "-1"], ["--kl_coef", "-1"]),
    ],
)
def test_values_of_deepspeed_chat(argv, expected):
    assert translate_old_flags(argv, KNOWN) == expected


def test_generation_batches_are_counted_over_all_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "24")
    argv = ["--generation_batches", "2", "--per_device_generation_batch_size", "6"]
    expected = ["--per_device_rollout_batch_size", "6", "--rollout_batch_size", str(2 * 6 * 24)]
    assert translate_old_flags(argv, KNOWN) == expected


def test_generation_batches_without_a_batch_size_use_the_script_s_default(monkeypatch):
    from utils.rlhf.arguments import RolloutArguments

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result = translate_old_flags(["--generation_batches=3"], KNOWN)
    assert result == ["--rollout_batch_size", str(3 * RolloutArguments().per_device_rollout_batch_size)]


EXAM = {"num_fewshot", "mode", "split", "data_dir", "output_dir", "model_name_or_path", "train_data", "rope_scaling"}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        # Values: numbers below zero, words with "=" in them, anything behind "=".
        (["--train_file", "zh=a.txt", "en=b.txt", "-1"], ["--train_data", "zh=a.txt", "en=b.txt", "-1"]),
        (["--train_file=zh=--a.txt", "en=b.txt"], ["--train_data=zh=--a.txt", "en=b.txt"]),
        (["--model_path="], ["--model_name_or_path="]),
        (["--logging_dir", "-x", "--model_path", "m"], ["--model_name_or_path", "m"]),
        (["--unknown", "--cache_dir=a=b", "--", "x"], ["--unknown", "--", "x"]),
        # Either spelling; those that scripts know stay as they are typed.
        (["--model-path", "m", "--train-data", "a"], ["--model_name_or_path", "m", "--train-data", "a"]),
        # A flag takes one value away with it; the parser complains of others.
        (["stray", "--cache_dir", "a", "b", "--save_dir", "o"], ["stray", "b", "--output_dir", "o"]),
        # Repeated: the last one decides, as everywhere.
        (["--save_dir", "a", "--save_dir", "b"], ["--output_dir", "a", "--output_dir", "b"]),
        (["--cot", "True", "--cot=no", "--few_shot", "--few_shot", "off"], ["--num_fewshot", "0"]),
        (["--alpha", "3", "--alpha", "1"], []),
        # Switches: alone, or with a value.
        (["--cot", "--do_test"], ["--mode", "cot", "--split", "test"]),
        (["--cot", "0", "--do_test", "False"], []),
        (["--constrained_decoding", "-k", "5"], ["--num_fewshot", "5", "--mode", "constrained"]),
        (["--use_ntk", "--alpha=2.0"], ["--rope_scaling", "ntk", "--rope_factor", "1.5"]),
        (["--use_ntk", "no", "--alpha", "2.0"], []),
        # Any spelling of those that need more than a new name, too.
        (["--few-shot", "no", "--use-ntk", "--alpha", "auto"], ["--num_fewshot", "0", "--rope_scaling", "auto-ntk"]),
        (["--cot", "-k", "5"], ["--num_fewshot", "5", "--mode", "cot"]),
        (["-k=5", "-m", "m", "-d=-x"], ["--num_fewshot=5", "--model_name_or_path", "m", "--data_dir=-x"]),
    ],
)
def test_odd_command_lines(argv, expected):
    assert translate_old_flags(argv, EXAM) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--deepspeed="], ["--deepspeed="]),
        (["--deepspeed", ""], []),
        (["--dtype", "bf16", "--dtype", "float32"], ["--precision", "bf16", "--dtype", "float32"]),
        (["-k", "5", "--kl-ctl", "-1"], ["-k", "5", "--kl_coef", "-1"]),  # short flags are other scripts'
        (["--generation-batches=2", "--generation_batches", "3"], ["--rollout_batch_size", "48"]),
        (["--generation_batches", "many"], ["--rollout_batch_size", "many"]),  # the parser says what is wrong
    ],
)
def test_odd_command_lines_of_deepspeed_chat(argv, expected, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert translate_old_flags(argv, KNOWN) == expected


def test_a_command_line_without_old_flags_comes_back_as_it_was():
    for argv in (["a", "--b", "-1", "c d", "--e=", "--f==g", "--", "--h-i", ""], ["-k", "1"], [], ["--train_data"]):
        assert translate_old_flags(argv, {"train_data"}) == argv
        assert [word for flag in read_flags(argv) for word in flag.words()] == argv


@pytest.mark.parametrize("script", ["sft.py", "pt.py", "dpo.py", "inference_hf.py", "quantize.py"])
@pytest.mark.parametrize("flag", ["num_padding_at_beginning", "offload_reference_model", "data_split"])
def test_other_scripts_refuse_them(script, flag):
    with pytest.raises(InputError, match=flag):
        parse_args(*script_types(script), argv=[f"--{flag}", "0"])


@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_other_scripts_keep_their_values(script, capsys):
    with pytest.raises(InputError, match="invalid choice: 'bf16'"):
        parse_args(*script_types(script), argv=["--dtype", "bf16"])
    assert capsys.readouterr().err == ""


def test_a_script_without_the_new_flag_refuses_the_old_one():
    with pytest.raises(InputError, match="critic_model_name_or_path"):
        parse_args(*script_types("rm.py"), argv=["--critic_model_name_or_path", "m", "--output_dir", "o"])


def test_one_warning_names_the_config_to_pass(caplog):
    with caplog.at_level(logging.WARNING):
        translate_old_flags(["--deepspeed", "--zero_stage", "3", "--offload"], KNOWN)
    (record,) = caplog.records
    assert "ds_zero3_offload.json" in record.getMessage() and "--zero_stage has no effect" in record.getMessage()


A2_PAGE = (
    "--base_model b --lora_model l --tokenizer_path t --gpus 0 --port 19324 --max_memory 1024 --load_in_8bit "
    "--only_cpu --alpha 2.0 --use_ntk --use_vllm --post_host 0.0.0.0 --post_port 8000 --use_flash_attention_2"
)
A2_SERVER = "--base_model b --lora_model l --tokenizer_path t --gpus 0,1 --load_in_4bit --alpha auto --use_ntk"
A2_VLLM_SERVER = (
    '--model b --host localhost --port 8000 --served-model-name chinese-llama-alpaca-2 --allow-credentials '
    '--allowed-origins ["*"] --allowed-methods ["*"] --allowed-headers ["*"] --use_vllm'
)  # fmt: skip


A2_CEVAL = (
    "--benchmark ceval --data_dir . --model_path b --cot False --few_shot True --with_prompt True "
    "--constrained_decoding True --temperature 0.2 --n_times 1 --ntrain 3 --do_save_csv False --do_test True "
    "--output_dir o"
)
A2_CMMLU = "--benchmark cmmlu --input_dir d --model_path b --few_shot False -k 5 --constrained_decoding False"
MX_MMLU = "--benchmark mmlu -k 2 -g 8 -d d -s out -m b --do_test --load_in_4bit --use_flash_attention_2"


@pytest.mark.parametrize(
    ("script", "line", "expected"),
    [
        ("eval_multiple_choice.py", A2_CEVAL, {"mode": "constrained", "num_fewshot": 3, "split": "test"}),
        ("eval_multiple_choice.py", A2_CEVAL + " --cot True", {"mode": "cot", "with_prompt": True}),
        ("eval_multiple_choice.py", A2_CMMLU, {"mode": "generative", "num_fewshot": 0, "data_dir": "d"}),
        (
            "eval_multiple_choice.py",
            MX_MMLU,
            {"num_fewshot": 2, "output_dir": "out", "split": "test", "data_dir": "d"},
        ),
        ("gradio_demo.py", A2_PAGE, {"port": 19324, "max_memory": 1024, "engine": "vllm", "rope_scaling": "ntk"}),
        ("openai_api_server.py", A2_SERVER, {"gpus": "0,1", "load_in_4bit": True, "rope_scaling": "auto-ntk"}),
        ("openai_api_server.py", A2_VLLM_SERVER, {"served_model_name": ["chinese-llama-alpaca-2"], "port": 8000}),
    ],
)
def test_the_forerunners_own_commands(script, line, expected):
    parsed = parse_args(*script_types(script), argv=line.split())
    found = {name: value for part in parsed for name, value in vars(part).items()}
    assert found["model_name_or_path"] == "b" and expected.items() <= found.items()
