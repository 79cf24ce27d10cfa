"""rm.py, dpo.py, ppo.py, sft.py and pt.py under several processes: DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP, on CPUs.

Each is compared with one process on the same global batches. A start costs seconds, so several stages run in one: this
file, started by torchrun with a list of jobs, is what the processes execute (run_jobs).
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if __name__ == "__main__":  # started by torchrun, not by pytest, which would know these
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / name) for name in ("scripts", "tests")]

from safetensors.torch import load_file
from transformers import AutoConfig

from support.models import MIXTURES, SIZES, model_of
from support.paths import SCRIPTS
from utils.core import command_line
from utils.text.tokenizer import load_tokenizer, save_tokenizer

CONFIGS = SCRIPTS / "configs"
ZERO2 = ["--deepspeed", str(CONFIGS / "ds_zero2_no_offload.json")]
FSDP = json.loads((CONFIGS / "fsdp.json").read_text())
COMMON = ["--precision", "fp32", "--preprocessing_num_workers", "1", "--lora_rank", "4", "--lora_alpha", "8"]
COMMON += ["--lora_dropout", "0", "--target_modules", "q_proj,v_proj,down_proj", "--learning_rate", "5e-3"]
COMMON += ["--logging_steps", "1", "--disable_tqdm", "True", "--report_to", "none"]
TEMPLATE = ["--prompt_template", "llama-2"]  # of all scripts but pt.py
NOTES = "notes.json"


# ---------------------------------------------------------------- what the processes execute


def run_script(name: str, argv: list[str], fsdp: dict | None = None, stop_after: int | None = None) -> None:
    """The script's main, in this process; `stop_after`: killed once the checkpoint of that step is complete."""
    import importlib

    from utils.core import arguments
    from utils.training.arguments import RunArguments

    shared = (arguments.ModelArguments, arguments.LoraArguments, arguments.DataArguments)
    script = importlib.import_module(name)
    own = {
        "pt": lambda: (shared[0], arguments.ExtendArguments, *shared[1:], script.PretrainingArguments),
        "sft": lambda: (shared[0], arguments.ExtendArguments, *shared[1:], script.TuningArguments),
        "rm": lambda: (*shared, script.RewardModelArguments),
        "dpo": lambda: (*shared, script.PreferenceArguments),
        "ppo": lambda: (*shared, script.RolloutArguments, script.RewardArguments, script.PPOArguments),
    }[name]()
    parsed = command_line.parse_args(*own, RunArguments, argv=argv)
    if fsdp is not None:
        allow_fsdp_on_cpu(parsed[-1], fsdp)
    with contextlib.ExitStack() as stack:
        if name == "ppo":
            stack.enter_context(watched_rollouts(Path(parsed[-1].output_dir)))
        if stop_after is not None:
            stack.enter_context(killed_after(stop_after))
        script.main(*parsed)


def run_jobs(jobs: list[dict]) -> None:
    for job in jobs:
        run_script(**job)


def allow_fsdp_on_cpu(args, config: dict) -> None:
    """Switch FSDP on, which accelerate refuses to do without GPUs although PyTorch has it for CPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    args.fsdp, args.fsdp_config = True, dict(config)
    args.fsdp_plugin_args = args._process_fsdp_args()
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


@contextlib.contextmanager
def killed_after(step: int):
    from utils.training.trainer import CausalLMTrainer

    save = CausalLMTrainer._save_checkpoint

    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == step:
            self.accelerator.wait_for_everyone()
            os.kill(os.getpid(), signal.SIGKILL)

    CausalLMTrainer._save_checkpoint = save_and_die
    try:
        yield
    finally:
        CausalLMTrainer._save_checkpoint = save


@contextlib.contextmanager
def watched_rollouts(folder: Path):
    """Write what was sampled, and how often weights were gathered meanwhile, to NOTES in the folder."""
    from utils.generation.batching import Generator
    from utils.rlhf.ppo_trainer import PPOTrainer

    notes, counts = [], {}
    sample, run = PPOTrainer.sample, Generator.generate

    def watched_run(self, *args, **kwargs):
        forward = self.model.forward

        def counted(*inputs, **options):
            counts["forward_passes"] = counts.get("forward_passes", 0) + 1
            return forward(*inputs, **options)

        self.model.forward = counted
        try:
            return run(self, *args, **kwargs)
        finally:
            self.model.forward = forward

    def watched_sample(self, model, *args, **kwargs):
        counts.clear()
        with counted_gathers(counts):
            rollouts = sample(self, model, *args, **kwargs)
        states = {str(getattr(weight, "ds_status", None)).split(".")[-1] for weight in model.parameters()}
        spread = [weight for weight in model.parameters() if hasattr(weight, "to_local") and weight.shape[0] > 1]
        sharded = {tuple(weight.to_local().shape) != tuple(weight.shape) for weight in spread}
        answers = [[rollout.prompt, rollout.answer, rollout.score] for rollout in rollouts]
        weights = len(list(model.parameters()))
        notes.append({"answers": answers, **counts, "weights": weights, "states": sorted(states)})
        notes[-1]["sharded"] = sorted(sharded)
        if self.args.process_index == 0:
            (folder / NOTES).write_text(json.dumps(notes))
        return rollouts

    PPOTrainer.sample, Generator.generate = watched_sample, watched_run
    try:
        yield
    finally:
        PPOTrainer.sample, Generator.generate = sample, run


@contextlib.contextmanager
def counted_gathers(counts: dict):
    """Count the collective calls that gather sharded weights."""
    import torch.distributed as dist

    names = [name for name in ("all_gather_into_tensor", "all_gather_single", "all_gather") if hasattr(dist, name)]
    before = {name: getattr(dist, name) for name in names}
    modules = [module for name, module in sys.modules.items() if name.startswith(("deepspeed", "torch.distributed"))]
    places = [
        (module, key, value)
        for module in modules
        for key, value in list(vars(module).items())
        if any(value is function for function in before.values())
    ]

    def wrap(function):
        def counted(*args, **kwargs):
            counts["gathers"] = counts.get("gathers", 0) + 1
            return function(*args, **kwargs)

        return counted

    for module, key, value in places:
        setattr(module, key, wrap(value))
    try:
        yield
    finally:
        for module, key, value in places:
            setattr(module, key, value)


def start(nproc: int, *command: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run a Python program in `nproc` processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=900
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if re.search(r"^\[rank|^error", line)]
    assert not check or done.returncode == 0, "\n".join(said)[-4000:]
    return done


def start_jobs(folder: Path, jobs: list[dict], nproc: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    start(nproc, __file__, folder / "jobs.json")


# ---------------------------------------------------------------- data and jobs


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """Pairs, prompts, conversations and a reward function."""
    folder = tmp_path_factory.mktemp("material")
    topics = ["the cat", "a dog", "my house", "the sea", "a red hat", "that tree", "some milk", "an old man"]
    rows = [
        {"prompt": f"Tell me about {topic}, please ({number}).", "chosen": f"Yes, here is {topic}.",
         "rejected": f"No, go away with {topic}." if number % 2 else "No."}
        for number in range(3) for topic in topics
    ]  # fmt: skip
    prompts = [{"prompt": row["prompt"]} for row in rows]
    turns = [{"instruction": row["prompt"], "output": row["chosen"] + " 猫狗的"} for row in rows]
    for name, records in (("pairs", rows), ("prompts", prompts), ("sft", turns + turns)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    function = (
        "def vowels(prompts, answers):\n    return [sum(c in 'aeiou' for c in a) / (1 + len(a)) for a in answers]\n"
    )
    (folder / "reward.py").write_text(function)
    return folder


def job(name: str, model: Path, data: Path, folder: Path, batch: int, *extra, fsdp: dict | None = None) -> dict:
    argv = ["--model_name_or_path", model, "--train_data", data, "--output_dir", folder, *COMMON]
    argv += TEMPLATE if name != "pt" else []
    argv += [
        "--per_device_train_batch_size",
        batch,
        "--per_device_eval_batch_size",
        batch,
        "--validation_split",
        "0.2",
    ]
    return {"name": name, "argv": [*map(str, argv), *map(str, extra)], **({"fsdp": fsdp} if fsdp else {})}


def jobs_of(folder: Path, model: Path, extended: Path, material: Path, batch: int, *extra, fsdp=None) -> list[dict]:
    """Every stage: with LoRA on shared weights, and fully trained with models of their own."""

    def make(kind: str, name: str, data: str, *own) -> dict:
        return job(name, model, material / data, folder / kind, batch, *own, *extra, fsdp=fsdp)

    pairs = ["--max_seq_length", "128", "--max_steps", "4", "--save_steps", "100"]
    ppo = ["--max_prompt_length", "128", "--max_new_tokens", "10", "--rollout_batch_size", "8"]
    ppo += ["--per_device_rollout_batch_size", "2", "--max_steps", "2", "--save_steps", "1"]
    ppo += ["--reward_function", f"{material / 'reward.py'}:vowels"]
    grown = ["--tokenizer_name_or_path", extended, "--modules_to_save", "embed_tokens,lm_head", *pairs]
    grown += ["--embedding_learning_rate", "2e-3"]
    whole = ["--full_finetuning", "True"]
    rm, rm_full = folder / "rm", folder / "rm_full"
    return [
        make("sft", "sft", "sft.jsonl", *grown),
        make("rm", "rm", "pairs.jsonl", *pairs),
        make("rm_full", "rm", "pairs.jsonl", *pairs, *whole),
        make("dpo", "dpo", "pairs.jsonl", *pairs),
        make("dpo_full", "dpo", "pairs.jsonl", *pairs, *whole),
        make("ppo", "ppo", "prompts.jsonl", *ppo, "--critic", "adapter", "--reward_model", rm),
        make("ppo_full", "ppo", "prompts.jsonl", *ppo, *whole, "--critic", "model", "--critic_model", model,
             "--reward_model", rm_full),
    ]  # fmt: skip


STAGES = ("sft", "rm", "rm_full", "dpo", "dpo_full", "ppo", "ppo_full")


@pytest.fixture(scope="session")
def one_process(tmp_path_factory, tiny_model_folder, extended_tokenizer_folder, material) -> Path:
    folder = tmp_path_factory.mktemp("distributed") / "one"
    run_jobs(jobs_of(folder, tiny_model_folder, extended_tokenizer_folder, material, 4))
    return folder


# ---------------------------------------------------------------- comparing


def history(folder: Path) -> list[dict]:
    """Lines of the log, without what depends on the machine, or (train_loss) on where a run was resumed."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    machine = re.compile("second|memory|runtime|flos|^train_loss")
    return [
        {name: value for name, value in entry.items() if isinstance(value, (int, float)) and not machine.search(name)}
        for entry in entries
    ]


def assert_same_run(folder: Path, expected: Path) -> None:
    """Same figures in every line of the log, same weights, same rollouts."""
    lines, wanted = history(folder), history(expected)
    assert len(lines) == len(wanted) and any("loss" in line or "ppo_loss" in line for line in wanted)
    for line, reference in zip(lines, wanted, strict=True):
        if abs(reference.get("reward_margin", 1.0)) < 1e-5:
            # Before the first update policy and reference are one model: which answer is ahead is rounding alone.
            assert 0 <= line.pop("accuracy") <= 1 and 0 <= reference.pop("accuracy") <= 1
        assert line == pytest.approx(reference, abs=1e-3, rel=1e-3, nan_ok=True)
    for name in ("adapter_model.safetensors", "model.safetensors", "critic.safetensors"):
        assert (folder / name).is_file() == (expected / name).is_file(), name
        if not (expected / name).is_file():
            continue
        tensors, reference = load_file(folder / name), load_file(expected / name)
        assert {key: value.shape for key, value in tensors.items()} == {
            key: value.shape for key, value in reference.items()
        }
        for key, value in tensors.items():
            assert value.numel(), key
            difference = (value.float() - reference[key].float()).abs()
            # Adam moves a weight by the learning rate however small its gradient is, so that the order of a sum
            # decides where a gradient is almost 0; but that is one weight of thousands.
            assert difference.max() < 1e-3 and difference.mean() < 1e-5, (name, key, difference.max())
    if (expected / NOTES).is_file():
        ours, theirs = (json.loads((place / NOTES).read_text()) for place in (folder, expected))
        assert [note["answers"] for note in ours] == [
            [[prompt, answer, pytest.approx(score, abs=1e-4)] for prompt, answer, score in note["answers"]]
            for note in theirs
        ]


# ---------------------------------------------------------------- tests


def mode_flags(mode: str, folder: Path) -> list[str]:
    """The flags of a way to share the work; ZeRO-3 as shipped, but also small weights are cut into shards."""
    if mode in ("ddp", "fsdp"):
        return []
    if mode == "zero2":
        return ZERO2
    config = json.loads((CONFIGS / "ds_zero3_offload.json").read_text())
    zero = config["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
    if mode == "zero3":
        del zero["offload_optimizer"], zero["offload_param"]
    # DeepSpeed's own Adam for offloaded weights is compiled on first use, which takes minutes.
    path = folder / f"{mode}.json"
    path.write_text(json.dumps(config | {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}))
    return ["--deepspeed", str(path)]


def ppo_job(model: Path, material: Path, folder: Path, batch: int, *extra) -> dict:
    own = ["--max_prompt_length", "128", "--max_new_tokens", "8", "--rollout_batch_size", "8", "--max_steps", "2"]
    own += ["--per_device_rollout_batch_size", "4", "--reward_function", f"{material / 'reward.py'}:vowels"]
    return job("ppo", model, material / "prompts.jsonl", folder, batch, *own, *extra)


@pytest.mark.slow
def test_ppo_under_zero2_is_ppo_in_one_process(tiny_model_folder, material, tmp_path):
    """The script itself, as users start it: two processes of two answers, against one of four."""
    run_jobs([ppo_job(tiny_model_folder, material, tmp_path / "one", 4)])
    argv = ppo_job(tiny_model_folder, material, tmp_path / "two", 2, *ZERO2)["argv"]
    start(2, SCRIPTS / "ppo.py", *argv)
    (tmp_path / "one" / NOTES).unlink()
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3", "zero3_offload", "fsdp"])
def test_two_processes_train_as_one(
    mode, one_process, tiny_model_folder, extended_tokenizer_folder, material, tmp_path
):
    """Every stage: losses, evaluations, rollouts and the saved weights; and sharded weights gathered once a phase."""
    arguments = (tmp_path, tiny_model_folder, extended_tokenizer_folder, material, 2, *mode_flags(mode, tmp_path))
    start_jobs(tmp_path, jobs_of(*arguments, fsdp=FSDP if mode == "fsdp" else None))
    for stage in STAGES:
        assert_same_run(tmp_path / stage, one_process / stage)
    tables, expected = (sorted(folder.glob(".token_cache/reference-*.npy")) for folder in (tmp_path, one_process))
    assert [path.name for path in tables] == [path.name for path in expected] and tables
    for ours, theirs in zip(tables, expected, strict=True):
        assert np.load(ours) == pytest.approx(np.load(theirs), abs=1e-4)
    grown = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert {value.shape[0] for key, value in grown.items() if "embed_tokens" in key or "lm_head" in key} == {406}
    for stage in ("ppo", "ppo_full"):
        for note in json.loads((tmp_path / stage / NOTES).read_text()):
            assert note["forward_passes"] >= 20  # two batches of ten tokens
            if mode.startswith("zero3"):
                assert 0 < note["gathers"] <= note["weights"] + 3 and note["states"] == ["NOT_AVAILABLE"]
            if mode == "fsdp":
                assert 0 < note["gathers"] < 20 and note["sharded"] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_the_first_of_two_processes_answers_questions(mode, tiny_model_folder, material, tmp_path):
    """As one process does, before and after; the other one waits."""
    (tmp_path / "questions.jsonl").write_text('{"instruction": "Tell me about the cat."}\n{"instruction": "Hello."}\n')
    flags = ["--max_seq_length", "128", "--max_steps", "4", "--save_steps", "100"]
    flags += ["--questions", tmp_path / "questions.jsonl"]
    run_jobs([job("dpo", tiny_model_folder, material / "pairs.jsonl", tmp_path / "one", 4, *flags)])
    more = [*flags, *mode_flags(mode, tmp_path)]
    start_jobs(tmp_path, [job("dpo", tiny_model_folder, material / "pairs.jsonl", tmp_path / "two", 2, *more)])
    assert_same_run(tmp_path / "two", tmp_path / "one")
    found, expected = (json.loads((tmp_path / n / "all_results.json").read_text()) for n in ("two", "one"))
    assert found["questions"] == expected["questions"] and len(found["questions"]) == 2


@pytest.fixture(scope="session")
def mixture(tmp_path_factory, base_tokenizer_folder) -> Path:
    """A Mixtral of 4 experts; with few tokens a batch some get none, and other ones in each process."""
    tokenizer, folder = load_tokenizer(base_tokenizer_folder), tmp_path_factory.mktemp("mixture") / "base"
    sizes = SIZES | MIXTURES["mixtral"] | {"max_position_embeddings": 512}
    model_of(AutoConfig.for_model("mixtral", vocab_size=len(tokenizer), **sizes), scale=0.05).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3", "fsdp"])
def test_experts_are_trained_by_two_processes_as_by_one(mode, mixture, material, tmp_path):
    """LoRA on experts and routers, which are linear layers; without the balancing loss, which is no mean of parts."""
    flags = ["--target_modules", "all", "--max_seq_length", "64", "--max_steps", "4", "--save_steps", "100"]
    flags += ["--no_packing"]
    data = material / "sft.jsonl"
    run_jobs([job("sft", mixture, data, tmp_path / "one", 2, *flags)])
    more = [*flags, *mode_flags(mode, tmp_path)]
    start_jobs(
        tmp_path, [job("sft", mixture, data, tmp_path / "two", 1, *more, fsdp=FSDP if mode == "fsdp" else None)]
    )
    assert any(".experts.3.w2.lora_B" in name for name in load_file(tmp_path / "two" / "adapter_model.safetensors"))
    assert_same_run(tmp_path / "two", tmp_path / "one")


# ---------------------------------------------------------------- rows that processes share


def shared_row_jobs(folder: Path, model: Path, extended: Path, material: Path, batch: int, *extra, fsdp=None) -> list:
    """Several conversations a row with LoRA and trained embeddings; padded ones; and documents cut into blocks."""

    def make(kind: str, name: str, data: str, *own) -> dict:
        return job(name, model, material / data, folder / kind, batch, *own, *steps, *extra, fsdp=fsdp)

    steps = ["--max_steps", "4", "--save_steps", "100", "--gradient_accumulation_steps", "2"]
    packed = ["--tokenizer_name_or_path", extended, "--modules_to_save", "embed_tokens,lm_head"]
    packed += ["--max_seq_length", "256", "--gradient_checkpointing", "True"]
    whole = ["--full_finetuning", "True"]
    return [
        make("packed", "sft", "sft.jsonl", *packed),
        make("padded", "sft", "sft.jsonl", *whole, "--max_seq_length", "128", "--no_packing"),
        make("blocks", "pt", "texts.txt", *whole, "--block_size", "64"),
    ]


@pytest.fixture(scope="session")
def rows_of_one(tmp_path_factory, tiny_model_folder, extended_tokenizer_folder, material) -> Path:
    records = (material / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["output"] * (1 + number % 3) for number, line in enumerate(records)]
    (material / "texts.txt").write_text("\n".join(texts * 2), encoding="utf-8")
    folder = tmp_path_factory.mktemp("rows") / "one"
    run_jobs(shared_row_jobs(folder, tiny_model_folder, extended_tokenizer_folder, material, 2))
    return folder


SHARED_ROWS = ["--sequence_parallel_size", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3", "fsdp"])
def test_two_processes_share_each_row(
    mode, rows_of_one, tiny_model_folder, extended_tokenizer_folder, material, tmp_path
):
    """Each computes its half of the rows that one process has whole."""
    arguments = (tmp_path, tiny_model_folder, extended_tokenizer_folder, material, 2, *mode_flags(mode, tmp_path))
    start_jobs(tmp_path, shared_row_jobs(*arguments, *SHARED_ROWS, fsdp=FSDP if mode == "fsdp" else None))
    for kind in ("packed", "padded", "blocks"):
        assert_same_run(tmp_path / kind, rows_of_one / kind)


@pytest.mark.slow
def test_two_pairs_of_processes_share_rows_and_resume(
    rows_of_one, tiny_model_folder, extended_tokenizer_folder, material, tmp_path
):
    """Four processes, two to a row, so that a step has the rows of two; killed after two steps."""
    jobs = shared_row_jobs(tmp_path, tiny_model_folder, extended_tokenizer_folder, material, 1, *SHARED_ROWS)
    _, padded, blocks = jobs  # the packed rows are nine, of which two groups take one twice, as two DDP processes do
    stopped = padded | {"argv": [*padded["argv"], "--save_steps", "2"]}
    (tmp_path / "jobs.json").write_text(json.dumps([stopped | {"stop_after": 2}]))
    assert start(4, __file__, tmp_path / "jobs.json", check=False).returncode != 0
    assert [path.name for path in (tmp_path / "padded").glob("checkpoint-*")] == ["checkpoint-2"]
    start_jobs(tmp_path, [stopped, blocks], nproc=4)
    for kind in ("padded", "blocks"):
        assert_same_run(tmp_path / kind, rows_of_one / kind)


@pytest.mark.slow
def test_ppo_accumulates_and_computes_again_under_every_engine(tiny_model_folder, material, tmp_path):
    """Two processes of one answer in two micro-batches with activation checkpointing, against one of four."""
    run_jobs([ppo_job(tiny_model_folder, material, tmp_path / "one", 4)])
    jobs = {}
    for mode in ("ddp", "zero2", "zero3", "fsdp"):
        flags = ["--gradient_accumulation_steps", "2", "--gradient_checkpointing", "True", *mode_flags(mode, tmp_path)]
        jobs[mode] = ppo_job(tiny_model_folder, material, tmp_path / mode, 1, *flags)
    start_jobs(tmp_path, [jobs["fsdp"] | {"fsdp": FSDP}])  # a process runs either DeepSpeed or FSDP
    start_jobs(tmp_path, [jobs[mode] for mode in ("ddp", "zero2", "zero3")])
    for mode in jobs:
        assert_same_run(tmp_path / mode, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_killed_processes_resume_exactly(mode, stage, one_process, tiny_model_folder, extended_tokenizer_folder,
                                         material, tmp_path):  # fmt: skip
    place, flags = tmp_path / "run", mode_flags(mode, tmp_path)
    fsdp = FSDP if mode == "fsdp" else None
    jobs = jobs_of(place, tiny_model_folder, extended_tokenizer_folder, material, 2, *flags, fsdp=fsdp)
    chosen = jobs[STAGES.index(stage)]
    step = 2 if stage == "rm" else 1
    argv = [value.replace(str(place / "rm"), str(one_process / "rm")) if stage == "ppo" else value
            for value in chosen["argv"]] + ["--save_steps", str(step)]  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps([chosen | {"argv": argv, "stop_after": step}]))
    assert start(2, __file__, tmp_path / "jobs.json", check=False).returncode != 0
    checkpoints = [path.name for path in (place / stage).glob("checkpoint-*")]
    assert checkpoints == [f"checkpoint-{step}"] and not (place / stage / "all_results.json").exists()
    start_jobs(tmp_path, [chosen | {"argv": argv}])
    (place / stage / NOTES).unlink(missing_ok=True)
    for name in ("adapter_model.safetensors", "critic.safetensors")[: 1 if stage == "rm" else 2]:
        tensors, expected = load_file(place / stage / name), load_file(one_process / stage / name)
        assert tensors.keys() == expected.keys()
        for key, value in tensors.items():
            assert (value - expected[key]).abs().max() < 1e-5, key
    assert history(place / stage)[-1] == pytest.approx(history(one_process / stage)[-1], abs=1e-4, nan_ok=True)


if __name__ == "__main__":
    run_jobs(json.loads(Path(sys.argv[1]).read_text()))
