"""Verification: base + adapters against the merged folder.

PEFT's adapter-on logits are the oracle of one half, damaged folders are what the comparison must find.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.merging import (
    DENSE,
    GROWING,
    KINDS,
    TEXT,
    TIED,
    VARIANTS,
    all_weights,
    big_base,
    fused,
    grown_tokenizer,
    make_adapter,
    make_base,
    run_merge,
)
from support.paths import SCRIPTS
from utils.core.errors import InputError
from utils.lora import verify as lora_verify
from utils.lora.inputs import open_merge
from utils.lora.merged_model import MergedModel
from utils.lora.verify import Comparison
from utils.weights.reader import open_checkpoint

pytestmark = pytest.mark.usefixtures("small_blocks")

HALF = {"bf16": "bfloat16", "fp16": "float16"}


def verify(base: Path, adapters: Path | list[Path], out: Path, tokenizer: Path | None = None, ids=None):
    adapters = [adapters] if isinstance(adapters, Path) else adapters
    with open_merge(str(base), [str(item) for item in adapters], str(tokenizer) if tokenizer else None) as inputs:
        with pytest.MonkeyPatch.context() as patch:
            if ids is not None:
                patch.setattr(lora_verify, "choose_ids", lambda _: ids)
            return lora_verify.verify_merge(inputs, out)


def assert_passes(base, adapters, out, expected=None, tokenizer=None) -> None:
    """It passes, every tensor was looked at, and one half is what PEFT computes with the adapter on."""
    report = verify(base, adapters, out, tokenizer)
    assert report.passed, report.verdict
    assert report.unchecked == [] and report.tensor_differences.keys() == all_weights(out).keys()
    assert len(report.layer_differences) == 2 and report.tokens == 64
    if report.logit_tolerance:
        assert report.relative_difference <= 1e-5 and report.logit_tolerance == 2e-5
    if expected is not None:
        logits = halves(base, adapters, out, tokenizer)
        assert (logits[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def halves(base, adapter, out, tokenizer=None) -> torch.Tensor:
    with (
        open_merge(str(base), [str(adapter)], str(tokenizer) if tokenizer else None) as inputs,
        open_checkpoint(out) as merged,
    ):
        return Comparison(inputs, merged).run(TEXT[0])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """As many key as query heads: q_proj and k_proj have one shape."""
    return make_base(tmp_path_factory.mktemp("verification") / "llama", num_key_value_heads=4)


DORA_EMBEDDING = {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}


@pytest.mark.parametrize(
    "variant",
    [
        "lora",
        "dora",
        "tokens",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in [*VARIANTS, "dora_embedding"]
            if name not in ("lora", "dora", "tokens")
        ),
    ],
)
def test_a_right_merge_passes_and_one_half_is_peft(llama, tmp_path, variant):
    expected = make_adapter(llama, tmp_path / "adapter", **(VARIANTS | {"dora_embedding": DORA_EMBEDDING})[variant])
    run_merge(llama, tmp_path / "adapter", tmp_path / "out")
    assert_passes(llama, tmp_path / "adapter", tmp_path / "out", expected)
    # PEFT's own merge passes too: nothing here leans on ours.
    assert verify(llama, tmp_path / "adapter", tmp_path / "adapter" / "oracle").passed


@pytest.mark.parametrize("variant", GROWING)
def test_a_grown_vocabulary(llama, tmp_path, variant, base_tokenizer_folder):
    expected = make_adapter(llama, tmp_path / "adapter", rows=434, **GROWING[variant])
    tokenizer = grown_tokenizer(base_tokenizer_folder, tmp_path / "tokenizer", 434)
    run_merge(llama, tmp_path / "adapter", tmp_path / "out", tokenizer_name_or_path=str(tokenizer))
    assert_passes(llama, tmp_path / "adapter", tmp_path / "out", expected, tokenizer)


@pytest.mark.parametrize("variant", ["lora_tied", "embedding_tied", "rows", "head_only", "lora_embedding_only"])
def test_tied_and_untied_heads(tmp_path, variant):
    settings, stays_tied = TIED[variant]
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    expected = make_adapter(base, tmp_path / "adapter", **settings)
    run_merge(base, tmp_path / "adapter", tmp_path / "out")
    assert_passes(base, tmp_path / "adapter", tmp_path / "out", expected)
    if not stays_tied:  # a config that ties what the merge untied is another model
        edit_json(tmp_path / "out" / "config.json", tie_word_embeddings=True)
        with pytest.raises(InputError, match=r"tie_word_embeddings is True, need False"):
            verify(base, tmp_path / "adapter", tmp_path / "out")


# Here a few; that these merge as PEFT does is asked of all of them by default (test_merge...).
QUICK = ("mistral", "qwen3", "mixtral")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_other_architectures(tmp_path, kind):
    base = make_base(tmp_path / "base", kind.split("_")[0], **({"head_dim": 16} if kind == "qwen3" else {}))
    expected = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    run_merge(base, tmp_path / "adapter", tmp_path / "out")
    assert_passes(base, tmp_path / "adapter", tmp_path / "out", expected)
    if kind == "mixtral":
        stacks = fused(base, tmp_path / "fused")
        for dtype in ("auto", "bfloat16"):
            run_merge(stacks, tmp_path / "adapter", tmp_path / f"out_{dtype}", dtype=dtype)
            assert_passes(stacks, tmp_path / "adapter", tmp_path / f"out_{dtype}", expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("stored", [True, False], ids=["half_base", "half_result"])
def test_half_precision_is_no_mistake(tmp_path, dtype, stored):
    base = make_base(tmp_path / "base", dtype=getattr(torch, HALF[dtype]) if stored else torch.float32)
    make_adapter(base, tmp_path / "adapter", use_dora=True, modules_to_save=["lm_head", "norm"])
    run_merge(base, tmp_path / "adapter", tmp_path / "out", dtype="auto" if stored else HALF[dtype])
    report = verify(base, tmp_path / "adapter", tmp_path / "out")
    assert report.passed, report.verdict
    assert report.dtypes == [HALF[dtype]] and report.logit_tolerance is None
    assert f"base and adapters rounded to {HALF[dtype]} (every tensor is just that" in report.verdict, (
        "the rule is said"
    )
    assert report.relative_difference > 1e-4  # rounding does show in the logits


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_several_adapters_in_order(llama, tmp_path, dtype):
    first, second = tmp_path / "first", tmp_path / "second"
    make_adapter(llama, first, modules_to_save=["lm_head"])
    run_merge(llama, first, tmp_path / "merged1", dtype=dtype)
    expected = make_adapter(
        tmp_path / "merged1", second, seed=2, use_dora=True, target_modules=["q_proj", "v_proj", "embed_tokens"]
    )
    run_merge(tmp_path / "merged1", second, tmp_path / "merged2")
    run_merge(llama, f"{first},{second}", tmp_path / "both", dtype=dtype)
    for out in ("merged2", "both"):
        assert_passes(llama, [first, second], tmp_path / out)
    assert_passes(tmp_path / "merged1", second, tmp_path / "merged2", expected if dtype == "auto" else None)
    swapped = verify(llama, [second, first], tmp_path / "both")
    assert not swapped.passed
    assert {name.split(".")[-2] for name in swapped.failed} == {"q_proj", "v_proj"}


def test_a_share_of_an_adapter(llama, tmp_path, base_tokenizer_folder):
    """The merge at share 0.5 is the mean of base and full merge; new rows are the adapter's alone."""
    settings = {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}
    make_adapter(llama, tmp_path / "adapter", rows=434, modules_to_save=["lm_head"], **settings)
    tokenizer = grown_tokenizer(base_tokenizer_folder, tmp_path / "tokenizer", 434)
    out = tmp_path / "out"
    run_merge(llama, tmp_path / "adapter", out, tokenizer_name_or_path=str(tokenizer))
    old, weights = all_weights(llama), load_file(out / "model.safetensors")
    for name, weight in weights.items():
        weight[: len(old[name])].add_(old[name]).mul_(0.5)
    save_file(weights, out / "model.safetensors")
    with open_merge(str(llama), [str(tmp_path / "adapter")], str(tokenizer)) as inputs:
        plain = inputs.model
        inputs.model = MergedModel(plain.base, plain.adapters, tied=False, adapter_weights=[0.5])
        report = lora_verify.verify_merge(inputs, out)
        assert report.passed, report.verdict
        inputs.model = MergedModel(plain.base, plain.adapters, tied=False, adapter_weights=[0.6])
        report = lora_verify.verify_merge(inputs, out)
    assert "lm_head.weight" in report.failed and "model.layers.1.self_attn.q_proj.weight" in report.failed


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def merges(llama, tmp_path_factory):
    """An adapter and its merges by type: what is damaged below."""
    folder = tmp_path_factory.mktemp("merges")
    make_adapter(llama, folder / "adapter", modules_to_save=["lm_head", "input_layernorm"])
    for dtype in ("float32", "bfloat16", "float16"):
        run_merge(llama, folder / "adapter", folder / dtype, dtype=dtype, max_shard_size="200KB")
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damaged(out: Path, target: Path, change) -> Path:
    """A copy of a merged folder whose weights `change` has had its hands on."""
    shutil.copytree(out, target)
    weights = all_weights(target)
    change(weights)
    for file in target.glob("*.safetensors"):
        save_file({name: weights[name].contiguous() for name in load_file(file)}, file, metadata={"format": "pt"})
    return target


LAYER = "model.layers.1"
O_PROJ, DOWN = f"{LAYER}.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"
Q_PROJ, K_PROJ = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.k_proj.weight"


def _halve(weights, base):
    weights[DOWN] = ((weights[DOWN].float() + base[DOWN]) / 2).to(weights[DOWN].dtype)


def _swap(weights, base):
    weights[Q_PROJ], weights[K_PROJ] = weights[K_PROJ], weights[Q_PROJ]


def _restore(name):
    return lambda weights, base: weights.update({name: base[name].to(weights[name].dtype)})


MISTAKES = {
    "adapter_left_out_in_one_layer": (_restore(O_PROJ), [O_PROJ]),
    "scaling_halved": (_halve, [DOWN]),
    "q_and_k_swapped": (_swap, [Q_PROJ, K_PROJ]),
    "head_shifted": (lambda w, base: w.update({"lm_head.weight": w["lm_head.weight"].roll(1, 0)}), ["lm_head.weight"]),
    "stale_head": (_restore("lm_head.weight"), ["lm_head.weight"]),
    "stale_norm": (_restore(f"{LAYER}.input_layernorm.weight"), [f"{LAYER}.input_layernorm.weight"]),
    "zeroed": (lambda w, base: w[K_PROJ].zero_(), [K_PROJ]),
    "last_rows_zeroed": (lambda w, base: w["lm_head.weight"][-2:].zero_(), ["lm_head.weight"]),
    "embedding_scaled": (lambda w, base: w["model.embed_tokens.weight"].mul_(1.1), ["model.embed_tokens.weight"]),
    "not_a_number": (lambda w, base: w[DOWN][3].fill_(math.nan), [DOWN]),
    "untouched_norm_changed": (lambda w, base: w["model.norm.weight"].mul_(1.01), ["model.norm.weight"]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_and_named(llama, merges, tmp_path, mistake, dtype):
    change, names = MISTAKES[mistake]
    out = damaged(merges / dtype, tmp_path / "out", lambda weights: change(weights, all_weights(llama)))
    report = verify(llama, merges / "adapter", out)
    assert not report.passed
    assert report.failed == names
    assert report.verdict.startswith(f"first apart at {names[0]}")


def test_one_damaged_shard(llama, merges, tmp_path):
    out = Path(shutil.copytree(merges / "bfloat16", tmp_path / "out"))
    shard = sorted(out.glob("*.safetensors"))[1]
    weights = load_file(shard)
    save_file({name: torch.zeros_like(weight) for name, weight in weights.items()}, shard)
    report = verify(llama, merges / "adapter", out)
    assert set(report.failed) == weights.keys() and len(weights) > 1


def test_a_change_smaller_than_rounding_is_found(llama, tmp_path):
    """Left out of one layer, an adapter that moves weights less than bfloat16 rounds them is still found."""
    make_adapter(llama, tmp_path / "adapter", lora_alpha=0.06)
    report = run_merge(llama, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    out = damaged(tmp_path / "out", tmp_path / "left_out", lambda w: _restore(O_PROJ)(w, all_weights(llama)))
    assert report["relative_delta"][O_PROJ] < 2**-8  # the largest relative error of rounding
    right, found = (verify(llama, tmp_path / "adapter", folder) for folder in (tmp_path / "out", out))
    assert right.failed == [] and found.failed == [O_PROJ]
    assert found.max_difference < 3 * right.max_difference  # the logits alone would not tell


def test_an_adapter_that_rounding_took_away_does_not_pass(tmp_path):
    """Against a plain loop of transformers and PEFT: in bfloat16 the merge of a hardly trained adapter is its base."""
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    make_adapter(base, tmp_path / "adapter", lora_alpha=0.01)
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(exact, tmp_path / "adapter")(TEXT).logits[0].detach()
    for dtype in ("auto", "float32"):
        run_merge(base, tmp_path / "adapter", tmp_path / dtype, dtype=dtype)
        report = verify(base, tmp_path / "adapter", tmp_path / dtype, ids=TEXT[0])
        alone, merged = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TEXT).logits[0].detach()
            for folder in (base, tmp_path / dtype)
        )
        share = (merged - exact).norm() / (exact - alone).norm()
        assert report.rounding_of_effect == pytest.approx(float(share), rel=0.02, abs=0.02)
        assert report.failed == [] and report.passed == (dtype == "float32")
        assert report.token_agreement == float((merged.argmax(-1) == exact.argmax(-1)).float().mean())
    lost = verify(base, tmp_path / "adapter", tmp_path / "auto")
    assert lost.rounding_of_effect > 0.8
    assert lost.verdict.startswith("rounding to bfloat16 moves the logits ") and "--dtype float32" in lost.verdict
    with pytest.raises(InputError, match=r"--verify: rounding to bfloat16 .* nothing was published"):
        run_merge(base, tmp_path / "adapter", tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["one_by_one", "fused"])
def test_every_expert_is_compared(tmp_path, layout):
    """One token reaches two of four experts; the others are looked at all the same."""
    base = make_base(tmp_path / "base", "mixtral")
    make_adapter(base, tmp_path / "adapter", target_modules=["gate", "w1", "w2", "w3"])
    if layout == "fused":
        base = fused(base, tmp_path / "fused")
    run_merge(base, tmp_path / "adapter", tmp_path / "out")
    old = all_weights(base)
    for expert in range(4):
        if layout == "fused":
            name, rows = "model.layers.1.mlp.experts.gate_up_proj", slice(320, 640)  # w3 of one expert

            def change(weights, name=name, expert=expert, rows=rows):
                weights[name][expert, rows] = old[name][expert, rows]
        else:
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"

            def change(weights, name=name):
                weights[name] = old[name]

        out = damaged(tmp_path / "out", tmp_path / f"out{expert}", change)
        report = verify(base, tmp_path / "adapter", out, ids=torch.tensor([7]))
        assert report.failed == [name]
    gate = next(name for name in old if name.endswith("1.mlp.gate.weight") or "1.block_sparse_moe.gate" in name)
    out = damaged(tmp_path / "out", tmp_path / "out_gate", lambda weights: weights.update({gate: old[gate]}))
    assert verify(base, tmp_path / "adapter", out).failed == [gate]


def test_new_rows_are_among_the_tokens(llama, tmp_path, base_tokenizer_folder):
    settings = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [401, 3, 237]}}
    make_adapter(llama, tmp_path / "adapter", rows=434, target_modules=["q_proj"], **settings)
    tokenizer = grown_tokenizer(base_tokenizer_folder, tmp_path / "tokenizer", 434)
    run_merge(llama, tmp_path / "adapter", tmp_path / "out", tokenizer_name_or_path=str(tokenizer))
    with open_merge(str(llama), [str(tmp_path / "adapter")], str(tokenizer)) as inputs:
        ids = lora_verify.choose_ids(inputs)
        first = inputs.tokenizer.decode(ids[:12].tolist())
    assert {0, 433, 400, 401, 3, 237} <= set(ids.tolist()) and len(ids) == 64
    assert lora_verify.TEXT.startswith(first.removeprefix("<s>").strip()) and len(first) > 10

    def drop(weights):  # the three rows as the resized base has them
        weights["model.embed_tokens.weight"][237] = all_weights(llama)["model.embed_tokens.weight"][237]

    out = damaged(tmp_path / "out", tmp_path / "dropped", drop)
    assert verify(llama, tmp_path / "adapter", out, tokenizer).failed == ["model.embed_tokens.weight"]


def test_logits_decide_too(llama, merges, monkeypatch):
    """A difference that no tensor shows, here by force, is not passed over."""

    def run(self, *_):
        self.layers, self.differences = [0.0] * 2, {"lm_head.weight": 0.0}
        return torch.tensor([[[1.0, 2.0]], [[1.0, 2.1]], [[3.0, 2.0]]])

    monkeypatch.setattr(Comparison, "run", run)
    report = verify(llama, merges / "adapter", merges / "float32")
    assert not report.passed and "the logits do not" in report.verdict
    assert report.relative_difference == pytest.approx(0.05)


# ---------------------------------------------------------------- bad input


def test_a_folder_that_is_no_merge_of_these_is_refused(llama, merges, tmp_path):
    def refused(message: str, change) -> None:
        out = Path(shutil.copytree(merges / "float32", tmp_path / message[:8]))
        change(out)
        with pytest.raises(InputError, match=message):
            verify(llama, merges / "adapter", out)

    refused("rms_norm_eps is 0.1, need 1e-06", lambda out: edit_json(out / "config.json", rms_norm_eps=0.1))
    refused("not the merge.*\n.*lm_head.weight: shape None", lambda out: drop_tensor(out, "lm_head.weight"))
    with pytest.raises(InputError, match=r"shape \(401, 64\), need \(400, 64\)"):
        make_adapter(llama, tmp_path / "other", rows=401)
        verify(llama, merges / "adapter", tmp_path / "other" / "oracle")
    with pytest.raises(InputError, match="from 0 to 399"):
        verify(llama, merges / "adapter", merges / "float32", ids=torch.tensor([5, 400]))


def drop_tensor(out: Path, dropped: str) -> None:
    weights = {name: weight for name, weight in all_weights(out).items() if name != dropped}
    for file in out.glob("model*"):
        file.unlink()
    save_file(weights, out / "model.safetensors")


def test_other_architectures_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with (
        pytest.raises(InputError, match="gpt2 model: leave --verify out"),
        open_merge(str(tmp_path / "gpt2")) as inputs,
    ):
        lora_verify.check_supported(inputs)


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path):
    peaks = {}
    for megabytes in (40, 300):
        base, adapter = tmp_path / f"base{megabytes}", tmp_path / f"adapter{megabytes}"
        big_base(base, megabytes)
        make_adapter(base, adapter, target_modules=DENSE)
        code = (
            f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
            "from pathlib import Path\n"
            "from utils.lora.inputs import open_merge\n"
            "from utils.lora.verify import verify_merge\n"
            f"with open_merge({str(base)!r}, [{str(adapter)!r}]) as inputs:\n"
            f"    report = verify_merge(inputs, Path({str(adapter / 'oracle')!r}))\n"
            "assert report.passed, report.verdict\n"
            "print(report.peak_memory_gb)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        peaks[megabytes] = float(done.stdout)
    assert peaks[300] - peaks[40] < 0.03, peaks  # the model grew by 0.26 GB, one layer of it has 15 MB


@pytest.mark.parametrize(("agreement", "warned"), [(1.0, False), (0.9, True)])
def test_other_greedy_tokens_are_warned_of_with_the_remedy(agreement, warned, monkeypatch, caplog):
    import merge_llama2_with_chinese_lora_low_mem as merge

    found = SimpleNamespace(passed=True, verdict="rounded", token_agreement=agreement, tokens=80, dtypes=["bfloat16"])
    found.to_dict = lambda: {}
    monkeypatch.setattr("utils.lora.verify.verify_merge", lambda *args, **kwargs: found)
    merge.verify_logits(SimpleNamespace(config={"num_hidden_layers": 2}), Path("out"))
    assert ("at 8 of 80 places the likeliest next token is another" in caplog.text) == warned
    assert ("bfloat16 rounds; --dtype float32 keeps" in caplog.text) == warned
