"""lora.chat_vector, through the merge script: the result against a plain sum of whole tensors in memory."""

import json

import merge_llama2_with_chinese_lora_low_mem as merge
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.merging import all_weights, load, make_adapter, make_base
from support.models import save_llama
from support.tokenizers import CHATML
from utils.core.errors import InputError
from utils.core.files import read_json
from utils.lora.chat_vector import AddDifference, ChatVector
from utils.text.tokenizer import load_tokenizer, save_tokenizer
from utils.weights.reader import open_checkpoint

pytestmark = pytest.mark.usefixtures("small_blocks")


def run(base, out, **settings):
    return merge.main(merge.MergeArguments(str(base), output_dir=str(out), **settings))


def changed_copy(base, folder, seed: int, rows: int | None = None, dtype=torch.float32, scale: float = 0.1):
    """The model trained further, so to speak: every weight moved, the vocabulary grown to so many rows."""
    torch.manual_seed(seed)
    model = load(base, torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    model.to(dtype).save_pretrained(folder)
    return folder


def plain_sum(model, chat, base, share: float = 1.0) -> dict[str, torch.Tensor]:
    """model + share * (chat - base), rows that they have in common, by whole tensors."""
    total = {name: tensor.float().clone() for name, tensor in all_weights(model).items()}
    one, other = all_weights(chat), all_weights(base)
    for name, tensor in total.items():
        rows = min(len(tensor), len(one[name]), len(other[name]))
        tensor[:rows] += share * (one[name][:rows].float() - other[name][:rows].float())
    return total


def test_rows_that_all_three_have_change(tmp_path):
    for name, values in (("tuned", [[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]), ("plain", [[0.5, 0.0], [1.0, 1.0]])):
        (tmp_path / name).mkdir()
        save_file({"model.embed_tokens.weight": torch.tensor(values)}, tmp_path / name / "model.safetensors")
    vector = ChatVector(*(open_checkpoint(tmp_path / name) for name in ("tuned", "plain")))
    steps = vector.plan({"model.embed_tokens.weight": (5, 2), "lm_head.weight": (5, 2), "score.weight": (1, 2)})
    step = AddDifference("model.embed_tokens.weight", "model.embed_tokens.weight", 2)
    assert steps == {"model.embed_tokens.weight": step, "lm_head.weight": step}  # a tied head is the embeddings
    assert vector.add(step, torch.ones(4, 2), 1).tolist() == [[3.0, 4.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    assert vector.add(step, torch.ones(2, 2), 3).tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The base, the base tuned to chat (one token more), and the base trained further with a larger vocabulary."""
    folder = tmp_path_factory.mktemp("chat")
    base = make_base(folder / "base")
    return base, changed_copy(base, folder / "chat", 1, rows=401), changed_copy(base, folder / "more", 2, rows=450)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_result_is_the_plain_sum_and_new_rows_stay(models, tmp_path, share):
    base, chat, more = models
    report = run(more, tmp_path / "out", chat_model=str(chat), chat_model_base=str(base), chat_weight=share)
    result, expected = all_weights(tmp_path / "out"), plain_sum(more, chat, base, share)
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
        assert (tensor[:400] - all_weights(more)[name][:400]).abs().max() > 1e-3
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(result[name][400:], all_weights(more)[name][400:])
    assert report["changed_tensors"] == len(result) and report["chat_vector"] == [str(chat), str(base), share]
    assert any("50 after them do not change" in note for note in report["notes"])
    assert any("1 rows more" in note for note in report["notes"])
    config = read_json(tmp_path / "out" / "config.json")
    assert config["vocab_size"] == 450
    assert merge.verify_only(str(tmp_path / "out"))["files"] > 3
    folders = [
        entry["folder"] for entry in read_json(tmp_path / "out" / "merge_manifest.json")["inputs"]["chat_vector"]
    ]
    assert folders == [str(chat), str(base)]


def test_base_and_adapter_and_chat_vector_at_once(models, tmp_path):
    """Base + (adapter) + (chat - base): the base is that of both, and need not be named twice."""
    base, chat, _ = models
    make_adapter(base, tmp_path / "adapter")
    run(base, tmp_path / "out", adapter_name_or_path=str(tmp_path / "adapter"), chat_model=str(chat))
    expected = plain_sum(tmp_path / "adapter" / "oracle", chat, base)
    for name, tensor in all_weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_two_steps_give_the_same_bits_in_bfloat16(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    chat = changed_copy(base, tmp_path / "chat", 1, dtype=torch.bfloat16)
    make_adapter(base, tmp_path / "adapter")
    run(base, tmp_path / "once", adapter_name_or_path=str(tmp_path / "adapter"), chat_model=str(chat))
    run(base, tmp_path / "merged", adapter_name_or_path=str(tmp_path / "adapter"))
    run(tmp_path / "merged", tmp_path / "twice", chat_model=str(chat), chat_model_base=str(base))
    once, twice = all_weights(tmp_path / "once"), all_weights(tmp_path / "twice")
    assert all(torch.equal(once[name], twice[name]) for name in once | twice)


def test_tied_embeddings_stay_tied(tmp_path):
    base = make_base(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    chat, more = (changed_copy(base, tmp_path / name, seed) for seed, name in enumerate(("chat", "more")))
    run(more, tmp_path / "out", chat_model=str(chat), chat_model_base=str(base))
    expected = plain_sum(more, chat, base)
    result = all_weights(tmp_path / "out")
    assert "lm_head.weight" not in result
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_the_chat_models_template_and_ends_come_along(base_tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(base_tokenizer_folder)
    base, chat = (save_llama(tmp_path / name, tokenizer, seed=seed) for seed, name in enumerate(("base", "chat")))
    more = save_llama(tmp_path / "more", tokenizer, seed=2)
    tokenizer.chat_template = CHATML
    save_tokenizer(tokenizer, chat)
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    report = run(more, tmp_path / "out", chat_model=str(chat), chat_model_base=str(base))
    assert load_tokenizer(tmp_path / "out").chat_template == CHATML
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [2, 7]
    assert f"the chat template is that of {chat}" in report["notes"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chat_model": "c"}, "pass --chat_model_base"),
        ({"chat_model_base": "b"}, "do nothing without --chat_model"),
        ({"chat_weight": 0.5}, "do nothing without --chat_model"),
        ({"chat_model": "c", "chat_model_base": "b", "chat_weight": 0.0}, "need a number other than 0"),
        ({"chat_model": "c", "chat_model_base": "b", "verify": True}, "leave it out with --chat_model"),
    ],
)
def test_flags_that_say_nothing_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        merge.MergeArguments("base", **settings)


def test_models_that_do_not_belong_together_are_refused(models, tmp_path):
    base, chat, more = models
    other = make_base(tmp_path / "other", num_hidden_layers=3)
    cases = [
        (chat, chat, "their difference is nothing"),
        (chat, other, "num_hidden_layers 3, the model 2"),
        (chat, tmp_path / "nothing", "folder not found"),
    ]
    narrow = make_base(tmp_path / "narrow", num_key_value_heads=1)
    cases.append((chat, narrow, r"model.layers.0.self_attn.k_proj.weight \(\[32, 64\], \[32, 64\] and \[16, 64\]\)"))
    for tuned, plain, words in cases:
        with pytest.raises(InputError, match=words):
            run(more, tmp_path / "out", chat_model=str(tuned), chat_model_base=str(plain))
    weights = load_file(chat / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    chat_nan = changed_copy(base, tmp_path / "nan", 1)
    save_file({name: w[:400] for name, w in weights.items()}, chat_nan / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="holds NaN or infinity"):
        run(more, tmp_path / "out", chat_model=str(chat_nan), chat_model_base=str(base))
    with pytest.raises(InputError, match="overlap"):
        run(more, chat / "out", chat_model=str(chat), chat_model_base=str(base))
    assert not (tmp_path / "out").exists()
