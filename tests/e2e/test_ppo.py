"""ppo.py whole: artifacts, rewards of all kinds, the best checkpoint, exact resume after SIGKILL, refusals."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.paths import EXAMPLES, SCRIPTS
from support.tokenizers import train_sentencepiece, write_sentencepiece
from support.training import assert_equal_weights
from utils.core.arguments import DataArguments, LoraArguments, ModelArguments
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.training.arguments import RunArguments

SMALL = [
    *("--precision", "fp32", "--preprocessing_num_workers", "1", "--prompt_template", "llama-2", "--lora_rank", "4"),
    *("--lora_alpha", "8", "--lora_dropout", "0", "--target_modules", "q_proj,v_proj,down_proj", "--learning_rate"),
    *("1e-2", "--max_prompt_length", "64", "--max_new_tokens", "6", "--rollout_batch_size", "8", "--ppo_epochs", "2"),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--per_device_rollout_batch_size"),
    *("8", "--logging_steps", "1", "--save_steps", "2", "--disable_tqdm", "True", "--report_to", "none"),
]
WEIGHTS = ("adapter_model.safetensors", "critic.safetensors")
FIGURES = {
    "score", "score_std", "kl", "answer_entropy", "answer_tokens", "ended", "explained_variance", "ppo_loss",
    "policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "approx_kl", "grad_norm", "updates",
    "kl_coef", "rollout_tokens_per_second", "update_tokens_per_second", "learning_rate", "peak_memory_gb",
}  # fmt: skip

FUNCTION = '''
import os
import signal
from pathlib import Path

calls = 0


def letters(prompts, answers):
    """The share of an answer's letters that are vowels."""
    global calls
    calls += 1
    at, mark = os.environ.get("KILL_AT_CALL"), os.environ.get("KILL_MARK")
    if at and calls == int(at) and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(c in "aeiou" for c in a) / max(1, len(a)) for a in answers]


def broken(prompts, answers):
    global calls
    calls += 1
    if calls == 3 and not Path(__file__).with_suffix(".mended").exists():
        raise LookupError("no such word")
    return [0.1] * len(answers)


def nan(prompts, answers):
    return [float("nan")] * len(answers)
'''


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    topics = ["the cat", "a dog", "my house", "the sea", "a red hat", "that tree", "some milk", "an old man"]
    rows = [{"prompt": f"Tell me about {topic}{', please' * number}."} for number in range(2) for topic in topics]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def function(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "rewards.py"
    path.write_text(FUNCTION, encoding="utf-8")
    return path


def run_ppo(argv):
    import ppo

    types = (ModelArguments, LoraArguments, DataArguments, ppo.RolloutArguments, ppo.RewardArguments)
    return ppo.main(*parse_args(*types, ppo.PPOArguments, RunArguments, argv=argv))


def plain_argv(model, prompts, out, *extra) -> list[str]:
    argv = ["--model_name_or_path", str(model), "--train_data", str(prompts), "--output_dir", str(out)]
    return [*argv, *SMALL, *map(str, extra)]


def ppo_argv(model, prompts, function, out, *extra) -> list[str]:
    """With a function, evaluation, and a coefficient that adapts."""
    argv = ["--max_steps", 6, "--reward_function", f"{function}:letters", "--validation_split", "0.2"]
    argv += ["--eval_strategy", "steps", "--eval_steps", 2, "--kl_target", 0.5, "--kl_horizon", 50]
    return plain_argv(model, prompts, out, *argv, *extra)


@pytest.fixture(scope="session")
def ppo_run(tmp_path_factory, tiny_model_folder, prompts, function) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ppo"
    run_ppo(ppo_argv(tiny_model_folder, prompts, function, folder))
    return folder


def history(folder: Path) -> list[dict]:
    """The log without what clocks and memory say."""
    timed = ("per_second", "runtime", "memory", "train_")
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in line.items() if not any(mark in k for mark in timed)} for line in lines]


def entries(folder: Path, key: str) -> list[float]:
    return [
        line[key] for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if key in line
    ]


def assert_same_run(one: Path, other: Path) -> None:
    names = {path.name for path in one.glob("*.safetensors")}
    assert names & {"adapter_model.safetensors", "model.safetensors"}
    assert names == {path.name for path in other.glob("*.safetensors")}
    for name in names:
        assert_equal_weights(one, other, name)
    assert [line for line in history(one) if line] == [line for line in history(other) if line]
    if (one / "samples.jsonl").is_file():
        assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    assert (one / "ppo_state.json").read_bytes() == (other / "ppo_state.json").read_bytes()


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


# ---------------------------------------------------------------- what a run leaves


def test_ppo_leaves_a_complete_adapter_as_tuning_does(ppo_run):
    for name in (
        "adapter_model.safetensors", "adapter_config.json", "base_model.json", "tokenizer.json", "tokenizer.model",
        "chat_template.jinja", "run_config.yaml", "README.md", "trainer_state.json", "all_results.json", "ppo.png",
        "critic.safetensors", "samples.jsonl",
    ):  # fmt: skip
        assert (ppo_run / name).stat().st_size > 0, name
    assert "[INST]" in (ppo_run / "chat_template.jinja").read_text(encoding="utf-8")
    names = load_file(ppo_run / "adapter_model.safetensors").keys()
    assert names and all(".lora_A.weight" in name or ".lora_B.weight" in name for name in names)
    assert len(names) == 2 * 2 * 3  # layers, factors, modules
    assert set(load_file(ppo_run / "critic.safetensors")) == {"critic.value.weight", "critic.value.bias"}
    assert all(value.any() for value in load_file(ppo_run / "critic.safetensors").values())


def test_figures_and_samples_are_logged(ppo_run):
    lines = [line for line in history(ppo_run) if "ppo_loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    whole = json.loads((ppo_run / "trainer_state.json").read_text())["log_history"]
    for line in whole:
        if "ppo_loss" in line:
            # The first critic says 0 everywhere, and how much the returns vary is known by then.
            assert line.keys() >= FIGURES, FIGURES - line.keys()
    json.loads((ppo_run / "trainer_state.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    json.loads((ppo_run / "all_results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert entries(ppo_run, "kl")[0] == pytest.approx(0, abs=1e-4), "the policy starts as the reference"
    assert len(set(entries(ppo_run, "kl_coef"))) > 1
    assert max(entries(ppo_run, "score")[3:]) > entries(ppo_run, "score")[0], "it learns"
    samples = [json.loads(line) for line in (ppo_run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = [(sample["step"], sample["prompt"]) for sample in samples]
    assert len(keys) == len(set(keys)) and [step for step, _ in keys] == sorted(step for step, _ in keys)
    assert {step for step, _ in keys} == {2, 4, 6}
    results = json.loads((ppo_run / "all_results.json").read_text())
    assert results["eval_score"] == results["eval_heldout_score"] and results["steps"] == 6


def test_the_adapter_merges(ppo_run, tiny_model_folder, tmp_path):
    import merge_llama2_with_chinese_lora_low_mem as merge
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    merge.main(merge.MergeArguments(str(tiny_model_folder), str(ppo_run), output_dir=str(tmp_path / "m")))
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model_folder), ppo_run)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_tensorboard_files(tiny_model_folder, prompts, function, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    # Without evaluation, which after the end of training begins a second file: in the same second, by the same name.
    argv = plain_argv(tiny_model_folder, prompts, tmp_path / "out", "--report_to", "tensorboard", "--max_steps", "2")
    run_ppo([*argv, "--reward_function", f"{function}:letters"])
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    written = events.read_bytes()
    assert all(f"train/{name}".encode() in written for name in ("score", "kl", "explained_variance", "grad_norm"))


@pytest.mark.slow
def test_all_weights_can_be_trained(tiny_model_folder, prompts, function, tmp_path):
    """Then the reference is a model of its own, and what is saved loads as any model."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    argv = ppo_argv(tiny_model_folder, prompts, function, out, "--full_finetuning", "--learning_rate", "1e-3")
    run_ppo([*argv, "--max_steps", "3", "--save_steps", "1"])
    tensors, base = load_file(out / "model.safetensors"), load_file(tiny_model_folder / "model.safetensors")
    assert tensors.keys() == base.keys()
    assert all(not torch.equal(tensors[name], base[name]) for name in base)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert set(load_file(out / "critic.safetensors")) == {"critic.value.weight", "critic.value.bias"}
    assert entries(out, "kl")[0] == pytest.approx(0, abs=1e-5) and abs(entries(out, "kl")[-1]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "metric", [pytest.param("eval_heldout_answer_entropy", marks=pytest.mark.slow), "eval_heldout_score"]
)
def test_the_best_checkpoint_is_what_is_saved(metric, tiny_model_folder, prompts, function, tmp_path):
    """An early one: the flags ask for the lowest score, which training raises."""
    out = tmp_path / "out"
    extra = ["--load_best_model_at_end", "True", "--metric_for_best_model", metric, "--greater_is_better"]
    extra += ["True" if "entropy" in metric else "False", "--critic", "adapter"]
    run_ppo(ppo_argv(tiny_model_folder, prompts, function, out, *extra))
    values = entries(out, metric)
    best = (max if "entropy" in metric else min)(range(3), key=values.__getitem__)
    assert best < 2
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2 * (best + 1)
    for name in WEIGHTS:
        assert_equal_weights(out, out / f"checkpoint-{2 * (best + 1)}", name)
        with pytest.raises(AssertionError):
            assert_equal_weights(out, out / "checkpoint-6", name)
    results = json.loads((out / "all_results.json").read_text())
    assert results[metric] == pytest.approx(values[best], abs=1e-6)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = [(sample["step"], sample["prompt"]) for sample in samples]
    assert len(keys) == len(set(keys))


# ---------------------------------------------------------------- rewards


@pytest.fixture(scope="session")
def reward_adapter(tmp_path_factory, tiny_model_folder) -> Path:
    return make_reward_adapter(tmp_path_factory.mktemp("rewards") / "rm", tiny_model_folder)


def make_reward_adapter(folder: Path, base: Path) -> Path:
    """What rm.py leaves, with weights that matter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from utils.lora.base_record import record_base
    from utils.rlhf.reward_model import set_pad_token
    from utils.text.prompts import CHAT_TEMPLATES
    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["k_proj", "q_proj"]))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "score.modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    record_base(folder, str(base))
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = CHAT_TEMPLATES["llama-2"]
    set_pad_token(tokenizer, tokenizer.chat_template)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.slow
def test_rewards_of_models_and_functions(tiny_model_folder, prompts, function, reward_adapter, tmp_path, caplog):
    """A shared backbone or a model of its own give the same training; both weighted give the weighted sum."""
    caplog.set_level(logging.INFO)
    elsewhere = tmp_path / "base"
    shutil.copytree(tiny_model_folder, elsewhere)
    other = copied(reward_adapter, tmp_path / "rm")
    for name in ("adapter_config.json", "base_model.json"):
        text = (other / name).read_text(encoding="utf-8")
        (other / name).write_text(text.replace(str(tiny_model_folder), str(elsewhere)), encoding="utf-8")

    def run(name, *extra):
        run_ppo(plain_argv(tiny_model_folder, prompts, tmp_path / name, "--max_steps", "2", *extra))
        return entries(tmp_path / name, "score")

    shared = run("shared", "--reward_model", reward_adapter)
    assert "an adapter on the policy's weights" in caplog.text
    caplog.clear()
    separate = run("separate", "--reward_model", other)
    assert "a model of its own" in caplog.text
    assert shared == pytest.approx(separate, rel=1e-5) and abs(shared[0]) > 1e-3
    spec = f"{function}:letters"
    alone = run("alone", "--reward_function", spec)
    weights = ("--reward_model_weight", "0.5", "--reward_function_weight", "3")
    both = run("both", "--reward_model", reward_adapter, "--reward_function", spec, *weights)
    assert both[0] == pytest.approx(0.5 * shared[0] + 3 * alone[0], rel=1e-5)
    names = load_file(tmp_path / "shared" / "adapter_model.safetensors").keys()
    assert not any("k_proj" in name or "score" in name for name in names), "the reward is no part of the policy"


@pytest.mark.slow
def test_deepspeed_moves_its_schedule_once_an_iteration(tiny_model_folder, prompts, function, tmp_path):
    """And not, as its engine would, at each of the iteration's four optimizer steps."""
    pytest.importorskip("deepspeed")
    extra = ["--max_steps", "4", "--reward_function", f"{function}:letters", "--lr_scheduler_type", "linear"]
    plain, engine = tmp_path / "plain", tmp_path / "engine"
    run_ppo(plain_argv(tiny_model_folder, prompts, plain, *extra))
    config = SCRIPTS / "configs" / "ds_zero2_no_offload.json"
    done = start(plain_argv(tiny_model_folder, prompts, engine, *extra, "--deepspeed", config), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in (plain, engine):
        assert entries(folder, "learning_rate") == pytest.approx([0.008, 0.006, 0.004, 0.002])
    assert entries(engine, "ppo_loss") == pytest.approx(entries(plain, "ppo_loss"), abs=1e-4)


# ---------------------------------------------------------------- resume


def cut_off(folder: Path, last: int) -> None:
    """As if the run had been stopped before checkpoint `last` was written."""
    (folder / "all_results.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    shutil.rmtree(folder / f"checkpoint-{last}")


def test_an_unfinished_run_goes_on(ppo_run, tiny_model_folder, prompts, function, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(ppo_run, folder)
    cut_off(folder, 6)
    argv = ppo_argv(tiny_model_folder, prompts, function, folder)
    with pytest.raises(InputError, match=r"other settings \(kl_coef"):
        run_ppo([*argv, "--kl_coef", "0.5"])
    run_ppo(argv)
    assert_same_run(ppo_run, folder)


@pytest.mark.slow
def test_a_run_stopped_after_its_last_step_only_finishes(ppo_run, tiny_model_folder, prompts, function, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(ppo_run, folder)
    (folder / "all_results.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert run_ppo(ppo_argv(tiny_model_folder, prompts, function, folder))["steps"] == 6
    assert_same_run(ppo_run, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--critic", "adapter"),
        ("--critic", "model"),
        ("--critic", "group", "--num_generations", "2"),
        ("--full_finetuning", "--learning_rate", "1e-3"),
        ("--critic", "model", "--full_finetuning", "--learning_rate", "1e-3", "--gradient_checkpointing"),
    ],
    ids=["adapter", "model", "group", "full", "full-model"],
)
def test_every_kind_of_critic_resumes(flags, tiny_model_folder, prompts, function, tmp_path):
    flags += ("--critic_model", str(tiny_model_folder)) if "model" in flags else ()
    learns = "group" not in flags
    extra = [*flags, "--max_steps", "3", "--save_steps", "1", *(("--critic_learning_rate", "2e-2") if learns else ())]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run_ppo(ppo_argv(tiny_model_folder, prompts, function, whole, *extra))
    assert (whole / "critic.safetensors").is_file() == learns
    if learns:
        names = set(load_file(whole / "critic.safetensors"))
        assert any("lora_B" in name or "layers" in name for name in names) == ("--critic" in flags)
    shutil.copytree(whole, folder)
    cut_off(folder, 3)
    run_ppo(ppo_argv(tiny_model_folder, prompts, function, folder, *extra))
    assert_same_run(whole, folder)


WRAPPER = """
import os, runpy, signal, sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
from utils.generation.batching import BatchScheduler
from utils.rlhf.ppo_trainer import PPOTrainer
name, at, mark = os.environ["KILL_METHOD"], int(os.environ["KILL_AT"]), Path(os.environ["KILL_MARK"])
owner = PPOTrainer if hasattr(PPOTrainer, name) else BatchScheduler  # whose step is one token of every answer
method, calls = getattr(owner, name), 0

def counting(self, *args, **kwargs):
    global calls
    calls += 1
    if calls == at and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return method(self, *args, **kwargs)

setattr(owner, name, counting)
runpy.run_path({ppo!r}, run_name="__main__")
"""


def start(argv, tmp_path, method=None, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / "ppo.py")]
    if method:
        wrapper = tmp_path / "wrapper.py"
        wrapper.write_text(WRAPPER.format(scripts=str(SCRIPTS), ppo=str(SCRIPTS / "ppo.py")), encoding="utf-8")
        command = [sys.executable, str(wrapper)]
        environment["KILL_METHOD"] = method
    values = {name: str(value) for name, value in environment.items()}
    return subprocess.run([*command, *argv], capture_output=True, text=True, env={**os.environ, **values}, timeout=300)


def check_kill(method, at, whole, argv, folder, tmp_path):
    mark = tmp_path / "mark"
    if method == "reward":
        done = start(argv, tmp_path, KILL_AT_CALL=at, KILL_MARK=mark)
    else:
        done = start(argv, tmp_path, method, KILL_AT=at, KILL_MARK=mark)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (folder / "all_results.json").exists()
    run_ppo(argv)
    assert_same_run(whole, folder)


@pytest.mark.slow
def test_killed_in_an_update_it_ends_with_the_same_bits(ppo_run, tiny_model_folder, prompts, function, tmp_path):
    """Two minibatches of two passes an iteration, two micro-batches each: in the fourth iteration."""
    argv = ppo_argv(tiny_model_folder, prompts, function, tmp_path / "run")
    check_kill("training_step", 27, ppo_run, argv, tmp_path / "run", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "at"),
    [
        ("reward", 4), ("reward", 5), ("_answer", 1), ("_answer", 7), ("step", 60), ("_figures", 5), ("update", 3),
        ("training_step", 9), ("_optimizer_step", 10), ("evaluate", 2), ("_write_samples", 2), ("_save", 2),
        ("_save_checkpoint", 3), ("evaluate", 4),
    ],
)  # fmt: skip
def test_killed_anywhere_it_ends_with_the_same_bits(
    method, at, ppo_run, tiny_model_folder, prompts, function, tmp_path
):
    """The function is called in iterations 1 and 2, the evaluation, iteration 3, ..."""
    argv = ppo_argv(tiny_model_folder, prompts, function, tmp_path / "run")
    check_kill(method, at, ppo_run, argv, tmp_path / "run", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--critic", "adapter"), ("--full_finetuning", "--learning_rate", "1e-3")])
def test_killed_twice_with_other_critics(flags, tiny_model_folder, prompts, function, tmp_path):
    def argv_of(folder):
        return ppo_argv(tiny_model_folder, prompts, function, folder, *flags)

    folder = tmp_path / "run"
    run_ppo(argv_of(tmp_path / "whole"))
    done = start(argv_of(folder), tmp_path, KILL_AT_CALL=4, KILL_MARK=tmp_path / "first")
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    check_kill("training_step", 12, tmp_path / "whole", argv_of(folder), folder, tmp_path)


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def foreign_tokenizer(tmp_path_factory) -> Path:
    """As many pieces as the model's own, but other ones."""
    lines = (EXAMPLES / "pretrain" / "en_train.txt").read_text(encoding="utf-8").splitlines()[3000:3500]
    model = train_sentencepiece([line.upper() for line in lines], 400)
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "foreign", model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), r"pass --reward_model .*--reward_function"),
        (("--reward_function", "{f}:letters", "--rollout_batch_size", "6"), r"6: need a multiple of the 4 answers"),
        (("--reward_function", "{f}:letters", "--critic", "group"), r"pass --num_generations 4, or 2 at least"),
        (
            ("--reward_function", "{f}:letters", "--num_generations", "3", "--rollout_batch_size", "8"),
            r"multiple of --num_g",
        ),
        (
            ("--reward_function", "{f}:letters", "--critic", "group", "--num_generations", "2", "--value_coef", "1"),
            r"value_coef 1.0: belongs to a critic that learns",
        ),
        (("--reward_function", "{f}:letters", "--max_new_tokens", "500"), r"need 564 tokens, .*window has 512"),
        (("--reward_function", "{f}:letters", "--critic", "model"), r"--critic model and --critic_model"),
        (("--reward_function", "{f}:letters", "--critic_model", "x"), r"--critic model and --critic_model"),
        (("--reward_function", "{f}:letters", "--critic", "adapter", "--full_finetuning"), r"--critic adapter needs"),
        (
            ("--reward_function", "{f}:letters", "--critic", "model", "--critic_model", "{foreign_model}"),
            r"critic_model .* has another vocabulary",
        ),
        (
            ("--reward_function", "{f}:letters", "--critic", "model", "--critic_model", "{f}x"),
            r"folder not found: .*x",
        ),
        (("--reward_function", "{f}:letters", "--kl_target", "1", "--kl_coef", "0"), r"must not be 0"),
        (("--reward_function", "{f}:letters", "--temperature", "0"), r"PPO needs sampled answers"),
        (("--reward_function", "{f}:letters", "--top_p", "1.5"), r"--top_p 1.5: need 0 < top_p <= 1"),
        (("--reward_function", "{f}:letters", "--min_new_tokens", "9"), r"--min_new_tokens 9: need 0 to"),
        (("--reward_function", "{f}:letters", "--gamma", "1.5", "--clip_range", "0"), r"clip_range 0.*\n.*gamma 1.5"),
        (("--reward_function", "{f}:absent"), r"has no function absent; it has letters, broken, nan"),
        (("--reward_function", "{f}x:letters"), r"need file.py:name"),
        (("--reward_model", "{model}"), r"is no reward model: it has no scalar head"),
        (("--reward_model", "{headless}"), r"is no reward model: it has no scalar head"),
        (("--reward_model", "{foreign}"), r"token \d+ is .* in the reward model's tokenizer .*but"),
        (("--reward_function", "{f}:letters", "--adapter_name_or_path", "{adapter}"), r"merge the adapter first"),
        (
            ("--reward_function", "{f}:letters", "--reference_model", "{foreign_model}"),
            r"reference_model .* another vocabulary",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    flags, message, tiny_model_folder, prompts, function, reward_adapter, ppo_run, foreign_tokenizer, tmp_path
):
    from utils.models import loading
    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    headless = copied(reward_adapter, tmp_path / "headless")
    tensors = load_file(headless / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "score" not in k}, headless / "adapter_model.safetensors")
    foreign, foreign_model = copied(reward_adapter, tmp_path / "foreign"), copied(tiny_model_folder, tmp_path / "f")
    for folder in (foreign, foreign_model):
        for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
        save_tokenizer(load_tokenizer(foreign_tokenizer), folder)
    places = {
        "f": function, "model": tiny_model_folder, "headless": headless, "foreign": foreign, "adapter": ppo_run,
        "foreign_model": foreign_model,
    }  # fmt: skip
    argv = plain_argv(tiny_model_folder, prompts, tmp_path / "out", "--max_steps", "1")
    argv += [flag.format(**places) for flag in flags]
    loaded = []
    patch = pytest.MonkeyPatch()
    patch.setattr(loading, "load_model", lambda *args, **kwargs: loaded.append(1))
    try:
        with pytest.raises(InputError, match=message):
            run_ppo(argv)
    finally:
        patch.undo()
    assert not loaded and not (tmp_path / "out").exists()


def test_an_adapter_brings_its_tokenizer(tiny_model_folder, prompts, function, ppo_run, tmp_path):
    """It did in every other stage; a vocabulary that grew with the adapter would be cut to the base's here."""
    adapter = copied(ppo_run, tmp_path / "adapter")
    (adapter / "tokenizer.model").unlink(missing_ok=True)
    (adapter / "tokenizer.json").write_text("{")
    argv = plain_argv(tiny_model_folder, prompts, tmp_path / "out", "--reward_function", f"{function}:letters")
    with pytest.raises(InputError, match=rf"{adapter}/tokenizer\.json.*broken JSON"):
        run_ppo([*argv, "--adapter_name_or_path", str(adapter)])


def test_long_prompts_are_dropped_and_counted(tiny_model_folder, function, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "short"}, {"prompt": "long " * 60}, {"prompt": "another"}]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    argv = plain_argv(tiny_model_folder, data, tmp_path / "out", "--max_steps", "1")
    run_ppo([*argv, "--reward_function", f"{function}:letters"])
    assert '"long_prompt": 1' in caplog.text and '"kept": 2' in caplog.text
    assert entries(tmp_path / "out", "updates") == [4.0]  # fewer prompts than answers of an iteration


@pytest.mark.slow
def test_a_function_that_fails_loses_nothing(tiny_model_folder, prompts, function, tmp_path):
    """Once it is mended, the same command goes on."""
    own = tmp_path / "rewards.py"
    shutil.copy(function, own)
    argv = plain_argv(tiny_model_folder, prompts, tmp_path / "out", "--max_steps", "4", "--save_steps", "1")
    argv += ["--reward_function", f"{own}:broken"]
    message = (
        r"raised LookupError: no such word \(rewards.py, line \d+\) \(iteration 3\); the last checkpoint is .*-2$"
    )
    with pytest.raises(InputError, match=message):
        run_ppo(argv)
    own.with_suffix(".mended").touch()
    assert run_ppo(argv)["steps"] == 4


@pytest.mark.slow
def test_a_mistake_is_one_sentence_and_exit_code_2(tiny_model_folder, prompts, function, tmp_path):
    argv = plain_argv(tiny_model_folder, prompts, tmp_path / "out", "--reward_function", f"{function}:nan")
    done = start(argv, tmp_path)
    assert done.returncode == 2 and "returned nan" in done.stderr and "Traceback" not in done.stderr


def test_a_reward_that_is_no_number_is_named(tiny_model_folder, prompts, function, tmp_path):
    argv = plain_argv(tiny_model_folder, prompts, tmp_path / "out", "--reward_function", f"{function}:nan")
    with pytest.raises(InputError, match=r"returned nan for the answer .*iteration 1.*the last checkpoint is none"):
        run_ppo(argv)


def test_a_policy_that_runs_away_leaves_a_good_checkpoint(tiny_model_folder, prompts, function, tmp_path):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    out = tmp_path / "out"
    argv = plain_argv(tiny_model_folder, prompts, out, "--max_steps", "30", "--save_steps", "1", "--kl_coef", "0")
    argv += ["--reward_function", f"{function}:letters", "--kl_limit", "0.5", "--learning_rate", "0.03"]
    with pytest.raises(InputError, match=r"above --kl_limit 0.5.*raise --kl_coef") as caught:
        run_ppo(argv)
    last = Path(str(caught.value).rpartition(" ")[2])
    assert (last / "complete").is_file() and last.parent == out
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model_folder), last)
