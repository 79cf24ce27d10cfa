"""Each family that is trained here, through the whole chain: vocabulary, pt, merge, sft, rm, ppo, dpo, export, serve.

Tiny models of the families' shapes with their tokenizers and templates. What is merged is compared with what PEFT
makes of base and adapter, what is exported with llama.cpp, and what is served with transformers' own answer.
"""

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import eval_perplexity
import export_gguf
import merge_llama2_with_chinese_lora_low_mem as merge
import merge_tokenizers
import pytest
import torch
from eval_perplexity import EvalArguments
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from support.families import make_family
from support.merging import DENSE
from support.models import MIXTURES, model_of
from support.paths import EXAMPLES
from support.server import GREEDY, serving
from support.stages import run_main, stage_argv, stage_losses, write_records
from support.tokenizers import read_lines, train_sentencepiece
from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.generation.engine import Request
from utils.generation.loading import EnginePlan
from utils.gguf import llamacpp
from utils.text.tokenizer import load_tokenizer, save_tokenizer


@dataclass(frozen=True)
class Shape:
    """A family's architecture, small."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    tied: bool = False


# Windows are shorter than a row, so that packed documents cross them.
SHAPES = {
    "Llama-2": Shape("llama", {"num_key_value_heads": 4}),
    "Llama-3.1": Shape(
        "llama",
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            }
        },
    ),
    "Mistral": Shape("mistral", {"sliding_window": 24}),
    "Qwen2.5": Shape("qwen2", {"tie_word_embeddings": True}, tied=True),
    "Qwen3": Shape("qwen3", {"head_dim": 32}),
    "Gemma-3": Shape(
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "num_hidden_layers": 6},
        tied=True,
    ),
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
EVERY_ROW = ("--modules_to_save", "embed_tokens,lm_head")
IN_FP32 = ("--precision", "fp32")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records of all stages; texts to train on in both languages."""
    folder = write_records(tmp_path_factory.mktemp("records"))
    with (folder / "pt.txt").open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in read_lines("zh_train.txt")[:40])
    return folder


@pytest.fixture(scope="module")
def chinese_pieces(tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "zh.model"
    path.write_bytes(train_sentencepiece(read_lines("zh_train.txt")[:400], 1800))
    return path


def make_base(family: str, folder: Path, base_tokenizer: Path) -> Path:
    """A model folder of the family; rows of the embeddings as its tokenizer has."""
    tokenizer = make_family(family, folder.parent / "own_tokenizer", base_tokenizer)
    shape = SHAPES[family]
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": None} | ends | shape.settings
    model = model_of(AutoConfig.for_model(shape.kind, **settings), scale=0.06)
    assert model.config.tie_word_embeddings == shape.tied
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def grow_vocabulary(base: Path, out: Path, pieces: Path) -> Path:
    """New Chinese tokens: pieces where the base has a sentencepiece model, else merges trained on text."""
    if (base / "tokenizer.model").is_file():
        source: dict[str, Any] = {"chinese_sp_model_file": str(pieces), "max_new_tokens": 60}
    else:
        source = {"input": [str(EXAMPLES / "pretrain" / "zh_train.txt")], "max_new_tokens": 60}
        source["sample_bytes"] = 200_000
    arguments = merge_tokenizers.MergeTokenizersArguments(
        base_tokenizer=str(base), output_dir=str(out), chat_template="own", **source
    )
    merge_tokenizers.main(arguments)
    return out


def run_stage(stage: str, model: Path, records: Path, out: Path, *flags: Any) -> Path:
    """Three steps; the adapter, or model, in its folder."""
    template = () if stage == "pt" else ("--prompt_template", "tokenizer")
    run_main(stage, stage_argv(stage, model, records, out, *template, *flags))
    losses = stage_losses(stage, out)
    assert len(losses) == 3 and all(loss == loss for loss in losses)
    return out


def adapted_layers(adapter: Path) -> set[str]:
    """Names of the layers that have low-rank updates, without the numbers of decoder layers."""
    return {name.split(".")[-3] for name in load_file(adapter / "adapter_model.safetensors") if ".lora_A" in name}


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def merge_as_peft_does(base: Path, adapter: Path, out: Path) -> Path:
    """Merge, with the merger's own verification; logits equal PEFT's of base and adapter."""
    arguments = merge.MergeArguments(str(base), str(adapter), output_dir=str(out), verify=True)
    assert merge.main(arguments)["verification"]["passed"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    rows = merged.get_input_embeddings().weight.shape[0]
    plain.resize_token_embeddings(rows, mean_resizing=False)
    # Longer than the windows of those that have one; new rows among the ids.
    ids = torch.randint(3, rows, (1, 80), generator=torch.Generator().manual_seed(1))
    untouched = logits_of(copy.deepcopy(plain), ids)
    expected = logits_of(PeftModel.from_pretrained(plain, adapter), ids)
    torch.testing.assert_close(logits_of(merged, ids), expected, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(untouched, expected, atol=2e-3), "the adapter does something"
    return out


def check_served(model: Path) -> None:
    """The official client's answer is transformers' own greedy one on the template's prompt."""
    question = [{"role": "user", "content": "Tell me about the sea. 春天"}]
    tokenizer = load_tokenizer(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    engine = EnginePlan(InferenceArguments(model_name_or_path=str(model), dtype="float32")).load()
    with serving(engine) as live, live.client() as client:
        reply = client.chat.completions.create(model="tiny", messages=question, max_tokens=12, **GREEDY)
        assert reply.usage.prompt_tokens == len(prompt)
        stops = list(engine.stop_ids)
        ids = plain.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]
        )[0, len(prompt) :].tolist()
        if ids[-1] in stops:
            ids.pop()
        assert reply.choices[0].message.content.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()
    engine.close()


def check_exported(family: str, model: Path, out: Path) -> None:
    """llama.cpp cuts texts the same, and computes the same but for Mistral, whose window it does not have."""
    if not llamacpp.is_installed():
        return
    arguments = export_gguf.ExportArguments(str(model), output_dir=str(out), types=["f32"], threads=1)
    arguments.self_test = "tokens" if family == "Mistral" else "full"
    report = export_gguf.main(arguments)
    if family == "Mistral":
        assert any("the model to the last 24" in note for note in report["notes"])
        return
    result = report["self_test"]["results"]["F32"]
    assert result["passed"] and result["perplexity_ratio"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.slow) for family in SHAPES])
def test_a_family_goes_from_vocabulary_to_server(family, base_tokenizer_folder, chinese_pieces, records, tmp_path):
    base = make_base(family, tmp_path / "base", base_tokenizer_folder)
    grown = grow_vocabulary(base, tmp_path / "grown", chinese_pieces)
    assert len(load_tokenizer(grown)) > len(load_tokenizer(base)) + 20
    whole = ("--tokenizer_name_or_path", grown, *IN_FP32)
    adapter = run_stage(
        "pt", base, records, tmp_path / "pt", *whole, *EVERY_ROW, "--target_modules", "all", "--learning_rate", "1e-2"
    )
    assert adapted_layers(adapter) == set(DENSE)
    pretrained = merge_as_peft_does(base, adapter, tmp_path / "pretrained")
    small = run_stage(
        "pt", base, records, tmp_path / "pt4", "--tokenizer_name_or_path", grown, *EVERY_ROW, "--load_in_kbits", "4"
    )
    assert adapted_layers(small) == {"q_proj", "v_proj"}
    full = run_stage("pt", base, records, tmp_path / "full", *whole, "--full_finetuning")
    assert len(load_tokenizer(full)) == len(load_tokenizer(grown))

    tuned = run_stage("sft", pretrained, records, tmp_path / "sft", *IN_FP32, "--target_modules", "all")
    assistant = merge_as_peft_does(pretrained, tuned, tmp_path / "assistant")
    run_stage("sft", pretrained, records, tmp_path / "sft4", "--load_in_kbits", "4", "--target_modules", "all")
    reward = run_stage("rm", assistant, records, tmp_path / "rm")
    run_stage("ppo", assistant, records, tmp_path / "ppo", "--reward_model", reward)
    preferred = run_stage("dpo", assistant, records, tmp_path / "dpo", *IN_FP32, "--target_modules", ",".join(DENSE))
    final = merge_as_peft_does(assistant, preferred, tmp_path / "final")
    check_served(final)
    check_exported(family, final, tmp_path / "gguf")
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_tuned_mixture_answers_and_scores_as_its_merged_model(kind, base_tokenizer_folder, records, tmp_path):
    """LoRA on experts and routers: base and adapter, the merged model, the server, perplexity, 4 bits, GGUF."""
    tokenizer = make_family("Mixtral", tmp_path / "own_tokenizer", base_tokenizer_folder)
    settings = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": None} | MIXTURES[kind]
    settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    base = tmp_path / "base"
    model_of(AutoConfig.for_model(kind, **settings), scale=0.06).save_pretrained(base)
    save_tokenizer(tokenizer, base)
    flags = (*IN_FP32, "--target_modules", "all", "--learning_rate", "1e-2")
    adapter = run_stage("sft", base, records, tmp_path / "sft", *flags)
    merged = tmp_path / "merged"
    arguments = merge.MergeArguments(str(base), str(adapter), output_dir=str(merged), verify=True)
    assert merge.main(arguments)["verification"]["passed"]
    check_served(merged)

    greedy = GenerationArguments(temperature=0, repetition_penalty=1.0, max_new_tokens=16)
    found = {}
    for name, given in {
        "base": {"model_name_or_path": str(base)},
        "adapter": {"model_name_or_path": str(base), "adapter_name_or_path": str(adapter)},
        "adapter in 4 bits": {
            **{"model_name_or_path": str(base), "adapter_name_or_path": str(adapter), "load_in_kbits": 4},
        },
        "merged": {"model_name_or_path": str(merged)},
    }.items():
        model_args = InferenceArguments(**given, dtype="float32")
        engine = EnginePlan(model_args).load()
        prompt = engine.encode([{"role": "user", "content": "Tell me about the sea."}])
        answer = engine.generate([Request(prompt, greedy)])[0].token_ids
        engine.close()
        evaluation = EvalArguments(texts=[str(EXAMPLES / "pretrain" / "en_heldout.txt")], max_documents=3)
        evaluation.output_dir = str(tmp_path / f"perplexity of {name}")
        [row] = eval_perplexity.main(model_args, evaluation)["rows"]
        found[name] = answer, row["perplexity"]
    assert found["adapter"][0] == found["merged"][0] != found["base"][0]
    assert found["adapter"][1] == pytest.approx(found["merged"][1], rel=1e-4)
    assert found["adapter"][1] != pytest.approx(found["base"][1], rel=1e-3)
    assert found["adapter in 4 bits"][1] == pytest.approx(found["merged"][1], rel=0.1)
    check_exported(kind, merged, tmp_path / "gguf")


@pytest.mark.parametrize("family", ["Gemma-3"])
def test_a_family_is_tuned_and_merged(family, base_tokenizer_folder, records, tmp_path):
    """A short chain for the quick tests, of the family that has most of its own: scaled embeddings, norms of
    1 + weight, two kinds of layers with two rotations, a tied head."""
    base = make_base(family, tmp_path / "base", base_tokenizer_folder)
    tuned = run_stage("sft", base, records, tmp_path / "sft", *IN_FP32, "--target_modules", "all")
    assert adapted_layers(tuned) == set(DENSE)
    merge_as_peft_does(base, tuned, tmp_path / "merged")
