"""Arguments: precedence, unknown names, old spellings, and run_config.yaml as a config file."""

import errno
import logging
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

import pytest
import yaml

from support.paths import ROOT
from utils.core.arguments import DataArguments, LoraArguments, ModelArguments, arg, list_arg
from utils.core.command_line import build_parser, describe_arguments, parse_args, run, save_run_config, shell_command
from utils.core.errors import InputError


@dataclass
class RateArguments:
    learning_rate: float = arg(5e-5, help="step size")
    use_cpu: bool = arg(False, help="no GPU")


def write_yaml(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_command_line_beats_file_beats_default(tmp_path):
    path = write_yaml(tmp_path, "learning_rate: 1e-4\nuse_cpu: true\n")
    assert parse_args(RateArguments, argv=[])[0].learning_rate == 5e-5
    (from_file,) = parse_args(RateArguments, argv=[path])
    assert from_file.learning_rate == 1e-4  # YAML reads 1e-4 as text; it must still become a number
    assert from_file.use_cpu is True
    assert parse_args(RateArguments, argv=[path, "--learning_rate", "2e-4"])[0].learning_rate == 2e-4


def test_unknown_names_are_refused_with_the_nearest_known_one(tmp_path):
    with pytest.raises(InputError, match=r"config\.yaml: unknown: 'learnin_rate' \(did you mean 'learning_rate'\?\)"):
        parse_args(RateArguments, argv=[write_yaml(tmp_path, "learnin_rate: 1\n")])
    with pytest.raises(InputError, match="did you mean 'learning_rate'"):
        parse_args(RateArguments, argv=["--learning_rat", "1"])


def test_abbreviations_are_not_guessed():
    with pytest.raises(InputError, match="model_name"):
        parse_args(ModelArguments, argv=["--model_name", "x"])


def test_broken_yaml_names_file_and_line(tmp_path):
    with pytest.raises(InputError, match=r"config\.yaml:2: broken YAML"):
        parse_args(RateArguments, argv=[write_yaml(tmp_path, "learning_rate: 1\nuse_cpu: {]\n")])


def test_text_that_is_not_utf8_is_refused(tmp_path):
    """As the system hands over bytes of another encoding; and a file in one."""
    word = os.fsdecode("你好".encode("gb18030"))
    for argv in (["--learning_rate", word], [f"--learning_rate={word}"]):
        with pytest.raises(InputError, match=r"--learning_rate: not UTF-8: .*\\udcc4.*put the text into a file"):
            parse_args(RateArguments, argv=argv)
    (tmp_path / "gbk.yaml").write_bytes("learning_rate: 1  # 学习率".encode("gb18030"))
    with pytest.raises(InputError, match=r"gbk\.yaml: not UTF-8 at byte 24"):
        parse_args(RateArguments, argv=[str(tmp_path / "gbk.yaml")])


@pytest.mark.parametrize("path", ["plain", "a b", "a=b.c", "it's", "$HOME", "a\\b", "中文", "*", ""])
def test_commands_can_be_pasted(path):
    command = shell_command("bash", "run.sh", "--compare", path, MODEL=path)
    assert shlex.split(command) == [f"MODEL={path}", "bash", "run.sh", "--compare", path]
    # And by a shell, to which MODEL= has to be a variable still.
    printed = shell_command("bash", "-c", 'printf "%s|%s" "$MODEL" "$1"', "-", path, MODEL=path)
    assert subprocess.run(["bash", "-c", printed], capture_output=True, text=True).stdout == f"{path}|{path}"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_learning_rate_that_is_no_number_is_refused(value):
    with pytest.raises(InputError, match=r"--learning_rate .*finite"):
        parse_args(RateArguments, argv=[f"--learning_rate={value}"])


def test_old_flags_keep_their_meaning_with_one_warning(caplog):
    argv = ["--model_path", "base", "--peft_path", "lora", "--trainable", "q_proj", "--torch_dtype", "float16"]
    argv += ["--save_safetensors", "False", "--overwrite_cache", "--dataset_dir", "data", "--lora_rank", "4"]
    with caplog.at_level(logging.WARNING):
        model, lora, data = parse_args(ModelArguments, LoraArguments, DataArguments, argv=argv)
    assert (model.model_name_or_path, model.dtype) == ("base", "float16")
    assert (lora.adapter_name_or_path, lora.target_modules, lora.lora_rank) == ("lora", "q_proj", 4)
    assert data.train_data == ["data"]
    (warning,) = [record.getMessage() for record in caplog.records]
    for words in ("--peft_path is now --adapter_name_or_path", "--save_safetensors has no effect", "docs/migrating"):
        assert words in warning


def test_documented_old_spellings_do_not_warn(caplog):
    with caplog.at_level(logging.WARNING):
        (model,) = parse_args(ModelArguments, argv=["--base_model", "x"], documented=("base_model",))
    assert model.model_name_or_path == "x" and not caplog.records


def test_several_mistakes_are_reported_together():
    with pytest.raises(InputError) as error:
        parse_args(LoraArguments, argv=["--lora_rank", "0", "--lora_dropout", "1.5"])
    assert "--lora_rank 0" in str(error.value) and "--lora_dropout 1.5" in str(error.value)


def test_run_config_repeats_the_run(tmp_path):
    argv = [
        "--model_name_or_path",
        "a b",
        "--lora_rank",
        "64",
        "--lora_alpha",
        "128",
        "--train_data",
        "x=1.txt",
        "二.txt",
    ]
    first = parse_args(ModelArguments, LoraArguments, DataArguments, argv=argv)
    save_run_config(tmp_path, describe_arguments(*first), {"command": "test"})
    again = parse_args(ModelArguments, LoraArguments, DataArguments, argv=[str(tmp_path / "run_config.yaml")])
    assert again == first
    assert set(yaml.safe_load((tmp_path / "run_config.yaml").read_text(encoding="utf-8"))) == {
        "model_name_or_path",
        "lora_rank",
        "lora_alpha",
        "train_data",
    }


def test_a_file_that_cannot_be_read_is_not_called_written(monkeypatch, capsys):
    def main():
        raise PermissionError(errno.EACCES, "Permission denied", "data.jsonl")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: data.jsonl: Permission denied; pass files that you may read")


def test_packages_that_do_not_go_together_are_one_line(monkeypatch, capsys):
    """As transformers says it when it is imported, which a script may do long after its flags are read."""

    def main():
        raise ImportError("huggingface-hub>=2.0 is required, but found 1.0.\nTry: pip install")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert "do not go together: huggingface-hub>=2.0 is required, but found 1.0.; run `make setup`" in (
        capsys.readouterr().err
    )


COMPILES = """
import sys
from dataclasses import dataclass
sys.path.insert(0, "scripts")
from utils.core.arguments import InferenceArguments; from utils.core.command_line import run

def main(args):
    import bitsandbytes, torch
    print("torch._inductor.compile_fx" in sys.modules, torch.compile(len) is len)

run(main, InferenceArguments)
"""


@pytest.mark.slow
@pytest.mark.parametrize("asked", [False, True])
def test_the_compiler_is_loaded_where_it_was_asked_for(asked):
    command = [sys.executable, "-c", COMPILES, *(["--torch_compile", "True"] if asked else [])]
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{asked} {not asked}\n", done.stderr


@dataclass
class ShapeArguments:
    kl_limit: float | None = arg(100.0, help="a limit, or none")
    stop: list[str] = list_arg(help="texts")
    weights: list[float] = list_arg(help="numbers")
    target_modules: str = arg("q_proj", help="names, comma-separated")
    rank: int = arg(8, help="a number")


def test_a_config_file_says_no_value_and_lists_of_any_words(tmp_path):
    """The oracle is what YAML itself reads."""
    settings = {"kl_limit": None, "stop": ["###", "---", "--rank"], "weights": ["1e-1", 2], "rank": None}
    path = write_yaml(tmp_path, yaml.safe_dump(settings) + "target_modules: [q_proj, v_proj]\n")
    (read,) = parse_args(ShapeArguments, argv=[path])
    assert read == ShapeArguments(None, ["###", "---", "--rank"], [0.1, 2.0], "q_proj,v_proj")
    (read,) = parse_args(ShapeArguments, argv=[path, "--stop", "x", "--kl_limit", "3", "--target_modules", "o_proj"])
    assert read == ShapeArguments(3.0, ["x"], [0.1, 2.0], "o_proj"), "the command line counts more"
    assert parse_args(ShapeArguments, argv=["--kl_limit", "null"])[0].kl_limit is None
    assert describe_arguments(read)["kl_limit"] == 3.0
    save_run_config(tmp_path, describe_arguments(ShapeArguments(kl_limit=None)))
    assert parse_args(ShapeArguments, argv=[str(tmp_path / "run_config.yaml")])[0].kl_limit is None
    for text, message in ("weights: [1, many]\n", r"weights: .*'many'.* float"), ("rank: [1, 2]\n", "rank"):
        with pytest.raises((InputError, SystemExit), match=message if "weights" in text else None):
            parse_args(ShapeArguments, argv=[write_yaml(tmp_path, text)])


def test_lists_under_an_old_name(tmp_path, caplog):
    (data,) = parse_args(DataArguments, argv=[write_yaml(tmp_path, "dataset_dir: [a, --b]\n")])
    assert data.train_data == ["a", "--b"] and "--dataset_dir is now --train_data" in caplog.text


def test_help_shows_our_flags_in_parts_and_those_of_transformers_on_demand(capsys):
    from support.flags import own_flags
    from support.scripts import script_types

    def parts(argv):
        with pytest.raises(SystemExit):
            parse_args(*script_types("sft.py"), argv=argv)
        text = capsys.readouterr().out
        split = re.split(r"^(\S.*):\n", text, flags=re.M)
        return {
            title: set(re.findall(r"^  (--\w+)", part, re.M))
            for title, part in zip(split[1::2], split[2::2], strict=True)
        }

    short, long = parts(["--help"]), parts(["--help_all"])
    own = {f"--{name}" for name in own_flags("sft.py")}
    assert own <= set().union(*short.values())
    assert {"--max_seq_length", "--packing"} <= short["How conversations become rows"]
    usual = short["Of transformers, those most asked for"]
    assert {"--learning_rate", "--output_dir", "--deepspeed"} <= usual and not usual & own
    shown = set().union(*long.values())
    assert "--adam_beta1" in shown and "--adam_beta1" not in set().union(*short.values())
    actions = build_parser(script_types("sft.py"))._actions
    assert {f"--{action.dest}" for action in actions} <= shown | {"--help"}


def test_a_wrong_value_is_one_line():
    with pytest.raises(
        InputError, match=r"^argument --lora_rank/--lora-rank: invalid int value: 'x'; --help tells of every flag$"
    ):
        parse_args(LoraArguments, argv=["--lora_rank", "x"])
