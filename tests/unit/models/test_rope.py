"""utils.models.rope: windows longer than the trained one, and a rotation for each row.

Oracles: transformers' own functions for the configs that users would write by hand, transformers' own rotary modules
for a config of each base, plain forward passes, and formulas written out here.
"""

import copy
import json
import logging
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from support import models
from support.paths import ROOT
from utils.core.arguments import GenerationArguments, InferenceArguments, RopeArguments
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.core.old_flags import NTK_FLAGS
from utils.generation.engine import Request
from utils.generation.loading import EnginePlan, check_inference_request, find_inference_files, load_for_inference
from utils.gguf.llamacpp import is_installed
from utils.models.rope import (
    RowRotary,
    auto_ntk_frequencies,
    find_row_rotary,
    gguf_rope_config,
    install_row_rotary,
    llama_cpp_rope_parameters,
    need_one_rotation,
    ntk_alpha,
    rope_overrides,
    rotary_key,
    scale_rope,
    scale_settings,
)
from utils.text.tokenizer import load_tokenizer

WINDOW, DIM, THETA = 64, 16, 10000.0
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
}
# The published 16K and 64K models' configs, as far as positions go.
PUBLISHED_16K = {"max_position_embeddings": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}}
PUBLISHED_64K = {
    "max_position_embeddings": 65536,
    "rope_scaling": {"factor": 16.0, "finetuned": True, "original_max_position_embeddings": 4096, "type": "yarn"},
}


model_of = partial(models.model_of, scale=0.15)  # large enough for attention to depend on positions


def config_of(kind="llama", **changes):
    return AutoConfig.for_model(kind, **(SIZES | changes))


def scaled(name, factor=None, pi_factor=None, **changes):
    config = config_of(**changes)
    scale_rope(config, RopeArguments(name, factor, pi_factor))
    return config


def frequencies(config):
    return LlamaRotaryEmbedding(config).inv_freq


def plain(theta=THETA, divided=1.0):
    return 1.0 / theta ** (torch.arange(0, DIM, 2).double() / DIM) / divided


# ---------------------------------------------------------------- one rotation for all texts


def test_positions_are_divided():
    config = scaled("pi", 4)
    by_hand = config_of(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": THETA})
    assert torch.equal(frequencies(config), ROPE_INIT_FUNCTIONS["linear"](by_hand)[0])
    torch.testing.assert_close(frequencies(config).double(), plain(divided=4), rtol=1e-6, atol=0)
    assert config.max_position_embeddings == 4 * WINDOW


def test_yarn_is_transformers_own():
    config = scaled("yarn", 8)
    by_hand = config_of(
        max_position_embeddings=8 * WINDOW,
        rope_parameters={
            "rope_type": "yarn", "factor": 8.0, "rope_theta": THETA, "original_max_position_embeddings": WINDOW
        },
    )  # fmt: skip
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](by_hand)
    rotary = LlamaRotaryEmbedding(config)
    assert torch.equal(rotary.inv_freq, expected) and rotary.attention_scaling == magnitude > 1
    assert config.max_position_embeddings == 8 * WINDOW


@pytest.mark.parametrize(("factor", "alpha"), [(None, 3.0), (1.5, 2.0), (4, 7.0)])
def test_ntk_raises_the_base(factor, alpha):
    config = scaled("ntk", factor)
    assert config.rope_parameters["rope_theta"] == pytest.approx(THETA * alpha ** (DIM / (DIM - 2)), rel=1e-12)
    assert config.rope_parameters["rope_type"] == "default"
    assert config.max_position_embeddings == WINDOW * (factor or 2)
    # The slowest rotation is alpha times slower, the fastest one as before.
    found, before = frequencies(config), frequencies(config_of())
    assert float(before[-1] / found[-1]) == pytest.approx(alpha, rel=1e-5) and found[0] == before[0]


@pytest.mark.parametrize(("pi_factor", "expected"), [(None, (3.0, 3.0)), (2.0, (2.0, 4.5)), (4.5, (4.5, 2.0))])
def test_pi_and_ntk_share_the_factor(pi_factor, expected):
    config = scaled("pi+ntk", 9, pi_factor)
    divided, slowed = expected
    theta = THETA * (2 * slowed - 1) ** (DIM / (DIM - 2))
    torch.testing.assert_close(frequencies(config).double(), plain(theta, divided), rtol=1e-5, atol=0)
    assert config.max_position_embeddings == 9 * WINDOW


def test_nothing_changes_without_scaling():
    config = config_of()
    before = copy.deepcopy(config)
    scale_rope(config, RopeArguments())
    assert config.to_dict() == before.to_dict() and rotary_key(config, 10**6) is None


# ---------------------------------------------------------------- models that carry their own


@pytest.mark.parametrize("published", [PUBLISHED_16K, PUBLISHED_64K], ids=["16K", "64K"])
def test_a_model_s_own_scaling_is_kept(published):
    config = config_of(**copy.deepcopy(published))
    before, rotary = config.to_dict(), LlamaRotaryEmbedding(config)
    scale_rope(config, RopeArguments())
    assert config.to_dict() == before
    assert config.max_position_embeddings == published["max_position_embeddings"]
    kind = published["rope_scaling"]["type"]
    assert torch.equal(rotary.inv_freq, ROPE_INIT_FUNCTIONS[kind](config)[0]) and rotary.rope_type == kind


@pytest.mark.parametrize(
    ("name", "divided", "alpha"), [("pi", 8.0, 1.0), ("ntk", 4.0, 3.0), ("pi+ntk", 4 * 2**0.5, 2 * 2**0.5 - 1)]
)
def test_scalings_go_on_top_of_a_linear_one(name, divided, alpha):
    config = scaled(name, 2, **copy.deepcopy(PUBLISHED_16K))
    theta = THETA * alpha ** (DIM / (DIM - 2))
    torch.testing.assert_close(frequencies(config).double(), plain(theta, divided), rtol=1e-5, atol=0)
    assert config.max_position_embeddings == 32768 and "type" not in config.rope_parameters


def test_auto_ntk_goes_on_top_of_a_linear_one():
    config = scaled("auto-ntk", 2, **copy.deepcopy(PUBLISHED_16K))
    theta = THETA * 3.0 ** (DIM / (DIM - 2))
    torch.testing.assert_close(auto_ntk_frequencies(config, 32768).double(), plain(theta, 4.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(auto_ntk_frequencies(config, 16384).double(), plain(divided=4.0), rtol=1e-5, atol=0)


def test_a_dynamic_model_gets_a_rotation_for_each_request():
    config = scaled("none", rope_scaling={"type": "dynamic", "factor": 3.0})
    assert config.max_position_embeddings == 3 * WINDOW and config.rope_parameters["rope_type"] == "default"
    dynamic = config_of(rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": THETA})
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](dynamic, seq_len=2 * WINDOW)
    assert torch.equal(auto_ntk_frequencies(config, 2 * WINDOW), expected)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8, "rope_theta": THETA,
}  # fmt: skip
REFUSED = {
    "yarn on 16K": ("yarn", {}, PUBLISHED_16K, r"yarn cannot be put on the linear scaling by 4.*pass pi or ntk"),
    "ntk on 64K": ("ntk", {}, PUBLISHED_64K, r"ntk cannot be put on the yarn scaling by 16.*leave --rope_scaling out"),
    "yarn on 64K": ("yarn", {}, PUBLISHED_64K, "yarn cannot be put on the yarn scaling"),
    "auto-ntk on llama3": ("auto-ntk", {}, {"rope_parameters": LLAMA3}, "llama3 scaling by 8"),
    "pi on dynamic": (
        "pi", {}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "pass auto-ntk, or leave --rope_scaling out"
    ),
    "part of a head": (
        "yarn", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "a part of each head",
    ),
    "factor alone": ("none", {"rope_factor": 2.0}, {}, "do nothing without --rope_scaling"),
    "pi_factor alone": ("none", {"pi_factor": 2.0}, {}, "do nothing without --rope_scaling"),
    "pi_factor with yarn": ("yarn", {"pi_factor": 2.0}, {}, r"--pi_factor is for --rope_scaling pi\+ntk, not yarn"),
    "pi_factor of all": ("pi+ntk", {"pi_factor": 2.0}, {}, "--pi_factor 2: need less than --rope_factor, 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    name, settings, changes, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        scale_rope(config_of(**copy.deepcopy(changes)), RopeArguments(name, **settings))


@pytest.mark.parametrize("factor", ["1", "0.5", "-2", "0"])
def test_factors_make_windows_longer(factor):
    with pytest.raises(InputError, match=r"--rope_factor .*: need more than 1"):
        parse_args(InferenceArguments, argv=["--rope_scaling", "yarn", "--rope_factor", factor])


def test_models_without_rotary_positions_are_refused():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2)
    with pytest.raises(InputError, match="no rotary positions"):
        scale_rope(config, RopeArguments("ntk"))
    scale_rope(config, RopeArguments())
    assert "rope_parameters" not in rope_overrides(config)


# ---------------------------------------------------------------- auto-NTK's formula


def test_auto_ntk_is_the_forerunners_formula_and_transformers_dynamic_one():
    config = scaled("auto-ntk")
    assert config.max_position_embeddings == 4 * WINDOW
    dynamic = config_of(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": THETA})
    for length in (WINDOW, 80, 96, 128, 192, 256):  # quarters of the window
        alpha = (length / (WINDOW / 2) - 1) * 1.0
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](dynamic, seq_len=length)
        found = auto_ntk_frequencies(config, length)
        assert torch.equal(found, expected)
        torch.testing.assert_close(found.double(), plain(THETA * alpha ** (DIM / (DIM - 2))), rtol=1e-5, atol=0)


def test_equal_keys_are_equal_rotations():
    config = scaled("auto-ntk")
    by_key = {}
    for length in range(1, 4 * WINDOW + 1):
        by_key.setdefault(rotary_key(config, length), []).append(length)
    assert [lengths[-1] for lengths in by_key.values()] == [WINDOW, *range(WINDOW + 16, 4 * WINDOW + 1, 16)]
    for lengths in by_key.values():  # rounded up: as if the longest of them were planned
        last = auto_ntk_frequencies(config, lengths[-1])
        assert all(torch.equal(auto_ntk_frequencies(config, length), last) for length in lengths)
    assert torch.equal(auto_ntk_frequencies(config, 1), frequencies(config_of()))


def test_the_static_scaling_is_the_automatic_one_of_a_full_window():
    for factor in (1.25, 2, 3):
        static, auto = scaled("ntk", factor), scaled("auto-ntk", factor)
        assert torch.equal(frequencies(static), auto_ntk_frequencies(auto, int(factor * WINDOW)))
        assert static.max_position_embeddings == auto.max_position_embeddings


# ---------------------------------------------------------------- a rotation for each row


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rotated_as_transformers_rotates_each_alone(kind, dtype):
    few = {"num_local_experts": 2} if kind == "mixtral" else {}
    config = config_of(kind, head_dim=DIM, rope_theta=THETA, **few)
    scale_rope(config, RopeArguments("auto-ntk"))
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    original = model.model.rotary_emb
    rotary = install_row_rotary(model)
    assert install_row_rotary(model) is rotary is find_row_rotary(model) is model.model.rotary_emb
    lengths = (10, 100, 250)
    positions = torch.stack([torch.arange(7) + start for start in (0, 93, 200)])
    x = torch.zeros(3, 7, 64, dtype=dtype)
    rotary.inv_freq_rows = torch.stack([auto_ntk_frequencies(config, length) for length in lengths])
    cos, sin = rotary(x, positions)
    assert cos.shape == sin.shape == (3, 7, DIM) and cos.dtype == dtype
    for row, length in enumerate((WINDOW, 112, 256)):  # the lengths rounded up
        theta = THETA * (2 * length / WINDOW - 1) ** (DIM / (DIM - 2))
        alone = type(original)(config_of(kind, head_dim=DIM, rope_theta=theta, **few))
        expected = alone(x[row : row + 1], positions[row : row + 1])
        assert torch.equal(cos[row : row + 1], expected[0]) and torch.equal(sin[row : row + 1], expected[1])
    by_hand = rotary.inv_freq_rows
    rotary.rotate(lengths)
    assert torch.equal(rotary.inv_freq_rows, by_hand) and rotary.key(100) == rotary_key(config, 100) == 7
    rotary.rotate([])
    assert rotary.inv_freq_rows is None
    for found, expected in zip(rotary(x, positions), original(x, positions), strict=True):
        assert torch.equal(found, expected)


def test_yarn_s_magnitude_stays(caplog):
    model = model_of(scaled("yarn", 4))
    x, positions = torch.zeros(1, 5, 64), torch.arange(5).unsqueeze(0)
    expected = model.model.rotary_emb(x, positions)
    rotary = install_row_rotary(model)
    rotary.inv_freq_rows = model.model.rotary_emb.original.inv_freq.unsqueeze(0)
    assert all(torch.equal(a, b) for a, b in zip(rotary(x, positions), expected, strict=True))


def test_a_batch_of_requests_equals_each_alone():
    """Rows of one forward pass, left-padded, each with its own base, against plain models with that base."""
    config = scaled("auto-ntk")
    model = model_of(config)
    rotary = install_row_rotary(model)
    lengths = (40, 100, 180)
    ids = [torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    width = max(lengths)
    batch = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in ids])
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    rotary.inv_freq_rows = torch.stack([auto_ntk_frequencies(config, length) for length in lengths])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=batch, attention_mask=mask, position_ids=positions).logits
        for row, (tokens, rounded) in enumerate(zip(ids, (WINDOW, 112, 192), strict=True)):
            theta = THETA * (2 * rounded / WINDOW - 1) ** (DIM / (DIM - 2))
            alone = model_of(config_of(rope_theta=theta, max_position_embeddings=config.max_position_embeddings))
            expected = alone(input_ids=tokens.unsqueeze(0)).logits[0]
            torch.testing.assert_close(logits[row, -len(tokens) :], expected, rtol=1e-4, atol=1e-4)


def test_cached_generation_equals_uncached():
    """Greedy tokens far beyond the trained window, two requests at once; uncached: everything anew each time."""
    config = scaled("auto-ntk")
    model = model_of(config)
    prompts = [torch.randint(0, 101, (20 + 30 * row,), generator=torch.Generator().manual_seed(row)) for row in (0, 1)]
    new = 100
    uncached, uncached_logits = [], []
    for prompt in prompts:
        rounded = -(-(len(prompt) + new) // 16) * 16
        theta = THETA * (2 * rounded / WINDOW - 1) ** (DIM / (DIM - 2))
        alone = model_of(config_of(rope_theta=theta, max_position_embeddings=config.max_position_embeddings))
        ids, steps = prompt.unsqueeze(0), []
        with torch.no_grad():
            for _ in range(new):
                steps.append(alone(input_ids=ids, use_cache=False).logits[0, -1])
                ids = torch.cat([ids, steps[-1].argmax().view(1, 1)], dim=1)
        uncached.append(ids[0, len(prompt) :].tolist())
        uncached_logits.append(torch.stack(steps))

    rotary = install_row_rotary(model)
    rotary.inv_freq_rows = torch.stack([auto_ntk_frequencies(config, len(prompt) + new) for prompt in prompts])
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([prompt.new_zeros(width - len(prompt)), prompt]) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    cache, steps, cached = DynamicCache(), [], []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for _ in range(new):
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits[:, -1]
            steps.append(logits)
            ids = logits.argmax(1, keepdim=True)
            cached.append(ids)
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
    assert torch.cat(cached, dim=1).tolist() == uncached
    torch.testing.assert_close(torch.stack(steps, dim=1), torch.stack(uncached_logits), rtol=1e-4, atol=2e-4)


# ---------------------------------------------------------------- requests to an engine


@pytest.mark.parametrize(
    "max_batch_size", [pytest.param(4, marks=pytest.mark.slow), 3, pytest.param(1, marks=pytest.mark.slow)]
)
def test_each_request_of_an_engine_has_its_own_rotation(tiny_model_folder, max_batch_size):
    """Short and long prompts at once, two that begin alike with different and two with equal rotations; a second
    round finds the first one's keys in the slots. Against plain models with each base, without a cache."""
    flags = ("--rope_scaling", "auto-ntk", "--rope_factor", "3", "--only_cpu", "--dtype", "float32")
    (args,) = parse_args(InferenceArguments, argv=["--model_name_or_path", str(tiny_model_folder), *flags])
    plan, new = EnginePlan(args, chat=False), 12
    engine = plan.load(max_batch_size=max_batch_size)
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, len(plan.tokenizer), (n,), generator=random).tolist() for n in (40, 505, 900)]
    prompts += [prompts[1][:300] + prompts[2][:700], prompts[2][:400] + prompts[1]]
    expected = []
    for prompt, alpha in zip(prompts, (1, 1.5, 3, 3, 3), strict=True):
        config = AutoConfig.from_pretrained(tiny_model_folder)
        config.rope_parameters = {"rope_type": "default", "rope_theta": THETA * alpha ** (8 / 6)}  # heads of width 8
        alone = AutoModelForCausalLM.from_pretrained(tiny_model_folder, config=config, dtype=torch.float32)
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(new):
                logits = alone(torch.tensor([ids]), use_cache=False).logits[0, -1]
                logits[plan.stop_ids] = float("-inf")
                ids.append(int(logits.argmax()))
        expected.append(ids[len(prompt) :])
    settings = GenerationArguments(max_new_tokens=new, min_new_tokens=new, temperature=0, repetition_penalty=1.0)
    for order in (1, -1):
        found = engine.generate([Request(prompt, settings) for prompt in prompts[::order]])[::order]
        assert [answer.token_ids for answer in found] == expected
        assert found[1].num_cached_tokens in (0, 504)  # its own keys from before, never another rotation's
    assert sum(answer.num_cached_tokens for answer in found) > 0
    engine.close()


# ---------------------------------------------------------------- loading


def load(folder, *flags):
    (args,) = parse_args(InferenceArguments, argv=["--model_name_or_path", str(folder), "--only_cpu", *flags])
    args = find_inference_files(args)
    return load_for_inference(args, check_inference_request(args, load_tokenizer(folder)))


@pytest.mark.parametrize(
    ("flags", "window", "kind"),
    [
        ((), 512, "default"),
        (("--rope_scaling", "pi"), 1024, "linear"),
        (("--rope_scaling", "ntk", "--rope_factor", "1.5"), 768, "default"),
        (("--rope_scaling", "auto-ntk"), 2048, "default"),
        (("--rope_scaling", "yarn", "--rope_factor", "4"), 2048, "yarn"),
        (("--rope_scaling", "pi+ntk", "--rope_factor", "4"), 2048, "linear"),
    ],
)
def test_models_are_loaded_with_the_window(tiny_model_folder, flags, window, kind):
    model = load(tiny_model_folder, *flags)
    assert model.config.max_position_embeddings == window
    assert isinstance(model.model.rotary_emb, RowRotary) == ("auto-ntk" in flags)
    (args,) = parse_args(InferenceArguments, argv=list(flags))
    config = AutoConfig.from_pretrained(tiny_model_folder)
    scale_rope(config, args)
    rotary = find_row_rotary(model)
    rotary = model.model.rotary_emb if rotary is None else rotary.original
    expected = LlamaRotaryEmbedding(config)
    assert rotary.rope_type == kind and torch.equal(rotary.inv_freq, expected.inv_freq)
    assert rotary.attention_scaling == expected.attention_scaling
    assert getattr(model.config, "auto_ntk", None) == getattr(config, "auto_ntk", None)


def test_a_refusal_comes_before_weights_are_read(tiny_model_folder, monkeypatch):
    monkeypatch.setattr("utils.generation.loading.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(InputError, match="do nothing without"):
        load(tiny_model_folder, "--rope_factor", "2")


# ---------------------------------------------------------------- the forerunners' flags


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--use_ntk", "--alpha", "auto"], ("auto-ntk", None)),
        (["--alpha=auto", "--use_ntk"], ("auto-ntk", None)),
        (["--use_ntk", "--alpha", "2.0"], ("ntk", 1.5)),
        (["--alpha", "4"], ("ntk", 2.5)),
        (["--use_ntk"], ("none", None)),
        (["--use_ntk", "--alpha", "1.0"], ("none", None)),
        (["--use_ntk", "False", "--alpha", "4"], ("none", None)),
    ],
)
def test_old_ntk_flags(argv, expected, caplog):
    with caplog.at_level(logging.WARNING):
        (args,) = parse_args(InferenceArguments, argv=argv)
    assert (args.rope_scaling, args.rope_factor) == expected
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "--alpha" in warning or "--use_ntk" in warning
    if args.rope_scaling == "ntk":  # the same base as theirs
        assert ntk_alpha(args.factor) == float(argv[-1])


def test_old_ntk_flags_in_a_file(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("use_ntk: true\nalpha: auto\n", encoding="utf-8")
    (args,) = parse_args(InferenceArguments, argv=[str(path)])
    assert args.rope_scaling == "auto-ntk"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--alpha", "much"], "--alpha much: need a number, or auto"),
        (["--use_ntk", "--alpha", "0.5"], "--rope_factor 0.75: need more than 1"),
    ],
)
def test_bad_alphas(argv, message):
    with pytest.raises(InputError, match=message):
        parse_args(InferenceArguments, argv=argv)


def test_scripts_without_windows_refuse_them():
    from utils.core.arguments import LoraArguments

    with pytest.raises(InputError, match="use_ntk"):
        parse_args(LoraArguments, argv=["--use_ntk"])


@pytest.mark.parametrize("name", ["docs/migrating.md", "docs/migrating_EN.md"])
def test_old_ntk_flags_are_in_the_migration_tables(name):
    rows = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line.startswith("| `--")]
    for old in NTK_FLAGS:
        assert any(f"--{old}" in row and "`--rope_scaling" in row for row in rows), old


# ---------------------------------------------------------------- other engines


def test_vllm_is_told_the_same():
    for name in ("pi", "ntk", "yarn", "pi+ntk"):
        config = scaled(name, 4)
        again = config_of(**json.loads(json.dumps(rope_overrides(config))))
        assert torch.equal(frequencies(again), frequencies(config)) and again.max_position_embeddings == 4 * WINDOW
    with pytest.raises(InputError, match=r"auto-ntk: vLLM has one rotation for all texts.*pass ntk or yarn"):
        need_one_rotation(scaled("auto-ntk"), "vLLM")


def test_gguf_settings():
    settings = config_of().to_dict() | {"rope_scaling": None, "rope_theta": 5e5}
    settings.pop("rope_parameters")
    found = scale_settings(settings, RopeArguments("yarn", 4))
    assert found["rope_parameters"]["rope_theta"] == 5e5 and found["max_position_embeddings"] == 4 * WINDOW
    assert AutoConfig.for_model(**found).rope_parameters["rope_type"] == "yarn"
    assert "rope_scaling" not in found and "rope_theta" not in found
    assert scale_settings(settings, RopeArguments()) == settings
    with pytest.raises(InputError, match="auto-ntk: a model's file has one rotation"):
        scale_settings(settings, RopeArguments("auto-ntk"))
    with pytest.raises(InputError, match="do nothing without"):
        scale_settings(settings, RopeArguments(rope_factor=2.0))


@pytest.mark.skipif(not is_installed(), reason="llama-cpp-python is not installed (requirements-llamacpp.txt)")
@pytest.mark.parametrize("own", [{}, {"rope_scaling": {"type": "linear", "factor": 4.0}}], ids=["plain", "linear"])
def test_llama_cpp_computes_with_the_same_window(own, tmp_path, base_tokenizer_folder):
    """A float32 file of the unscaled model, opened with the parameters; transformers with the scaled config."""
    import numpy as np
    from llama_cpp import Llama

    from utils.gguf.file import plan_gguf, write_gguf
    from utils.gguf.llamacpp import compute_logits
    from utils.lora.inputs import open_merge
    from utils.text.tokenizer import save_tokenizer

    tokenizer = load_tokenizer(base_tokenizer_folder)
    config = config_of(vocab_size=len(tokenizer), max_position_embeddings=32, rope_theta=2e4, **own)
    model = model_of(config)
    folder, path = tmp_path / "model", tmp_path / "model.gguf"
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    with open_merge(str(folder)) as inputs:
        write_gguf(plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "tiny"), inputs.model, "F32", path)
    metadata = Llama(str(path), vocab_only=True, verbose=False).metadata
    ids = torch.randint(0, len(tokenizer), (100,), generator=torch.Generator().manual_seed(0))
    for name in ("none", "pi", "ntk", "pi+ntk", *([] if own else ["yarn"])):
        args = RopeArguments(name, None if name == "none" else 4)
        longer, from_file = AutoConfig.from_pretrained(folder), gguf_rope_config(metadata)
        scale_rope(longer, args)
        scale_rope(from_file, args)
        assert rope_overrides(from_file)["max_position_embeddings"] == longer.max_position_embeddings
        parameters = llama_cpp_rope_parameters(from_file)
        assert parameters == pytest.approx(llama_cpp_rope_parameters(longer))
        opened = Llama(
            str(path), n_ctx=128, n_batch=128, n_ubatch=128, logits_all=True, verbose=False, n_threads=1, type_k=0,
            type_v=0, **parameters,
        )  # fmt: skip
        scaled_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **rope_overrides(longer))
        with torch.no_grad():
            expected = scaled_model(input_ids=ids.unsqueeze(0)).logits[0].numpy()
        found = compute_logits(opened, ids.tolist())
        assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max(), name
        opened.close()


def test_llama_cpp_refuses_what_it_has_no_parameters_for():
    with pytest.raises(InputError, match=r"rope_type llama3.*export_gguf"):
        llama_cpp_rope_parameters(config_of(rope_parameters=LLAMA3))
    with pytest.raises(InputError, match=r"auto-ntk: llama\.cpp has one rotation"):
        llama_cpp_rope_parameters(scaled("auto-ntk"))


def test_a_gguf_file_s_own_yarn_is_known():
    metadata = {
        "general.architecture": "llama", "llama.context_length": "512", "llama.attention.head_count": "4",
        "llama.embedding_length": "64", "llama.rope.freq_base": "500000.000000", "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": "8.000000", "llama.rope.scaling.original_context_length": "64",
    }  # fmt: skip
    config = gguf_rope_config(metadata)
    assert LlamaConfig(**rope_overrides(config)).rope_parameters == {
        "rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64
    }  # fmt: skip
    with pytest.raises(InputError, match="yarn scaling by 8"):
        scale_rope(config, RopeArguments("ntk"))


@pytest.mark.skipif(not is_installed(), reason="llama-cpp-python is not installed (requirements-llamacpp.txt)")
def test_a_gguf_file_carries_the_window(tiny_model_folder, tmp_path):
    """export_gguf.py's own self-test compares llama.cpp on the file with transformers under the scaling."""
    import export_gguf
    import gguf

    args = export_gguf.ExportArguments(str(tiny_model_folder), output_dir=str(tmp_path / "out"), types=["f32"])
    report = export_gguf.main(args, RopeArguments("yarn", 4))
    assert report["self_test"]["level"] == "full" and report["self_test"]["results"]["F32"]["passed"]
    fields = {name: f.contents() for name, f in gguf.GGUFReader(tmp_path / "out" / "model-F32.gguf").fields.items()}
    assert fields["llama.context_length"] == 2048 and fields["llama.rope.scaling.type"] == "yarn"
    assert fields["llama.rope.scaling.factor"] == 4 and fields["llama.rope.scaling.original_context_length"] == 512
    assert "rope_scaling: yarn" in (tmp_path / "out" / "run_config.yaml").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="a model's file has one rotation"):
        export_gguf.main(
            export_gguf.ExportArguments(str(tiny_model_folder), output_dir=str(tmp_path / "no")),
            RopeArguments("auto-ntk"),
        )
    assert not (tmp_path / "no").exists()
