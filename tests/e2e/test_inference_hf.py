"""inference_hf.py: adapters against merged models, files that survive kills, conversations, and what is refused."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import inference_hf
import pytest
import torch
from inference_hf import TaskArguments, TerminalChat
from transformers import AutoModelForCausalLM

from support.families import generate_conversations, make_family
from support.paths import SCRIPTS
from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.core.command_line import parse_args
from utils.core.errors import InputError
from utils.generation import engine
from utils.generation.engine import Answer, Delta, Prompter
from utils.generation.loading import EnginePlan
from utils.text.prompts import CHAT_TEMPLATES, encode_prompt, resolve_template
from utils.text.tokenizer import encode_raw, load_tokenizer, save_tokenizer
from utils.web.chat import Reply, Turn

SCRIPT = SCRIPTS / "inference_hf.py"
QUESTIONS = [
    "Where is the house?",
    "你好吗？",
    "Tell me a story about the river.",
    "What is one and one?",
    "Once",
    "why",
]


def ask(model: Path, *, adapter=None, tokenizer=None, settings=None, model_settings=None, **task) -> dict:
    """main() with small answers, greedy unless told otherwise."""
    return inference_hf.main(
        InferenceArguments(
            model_name_or_path=str(model) if model else None,
            adapter_name_or_path=str(adapter) if adapter else None,
            tokenizer_name_or_path=str(tokenizer) if tokenizer else None,
            **(model_settings or {}),
        ),
        GenerationArguments(**({"max_new_tokens": 12, "temperature": 0.0} | (settings or {}))),
        TaskArguments(**({"with_prompt": True} | task)),
    )


def read_rows(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]


def outputs(path: Path) -> list[str]:
    return [row["Output"] for row in read_rows(path)]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.txt"
    path.write_text("\n\n".join(QUESTIONS) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_adapter(
    base: Path, tokenizer_folder: Path, folder: Path, modules_to_save=("embed_tokens", "lm_head"), **changes
):
    """A perturbed adapter with its tokenizer, and beside it, in `folder`-merged, what PEFT makes of both."""
    from peft import LoraConfig, get_peft_model

    tokenizer = load_tokenizer(tokenizer_folder)
    torch.manual_seed(3)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj", "up_proj"],
            modules_to_save=list(modules_to_save) or None,
            **changes,
        )
        model = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder, save_embedding_layers=False)
        save_tokenizer(tokenizer, folder)
        merged = folder.with_name(folder.name + "-merged")
        model.merge_and_unload().save_pretrained(merged)
        save_tokenizer(tokenizer, merged)
    return folder, merged


@pytest.fixture(scope="module")
def grown(tmp_path_factory, tiny_model_folder, extended_tokenizer_folder) -> tuple[Path, Path]:
    return make_adapter(tiny_model_folder, extended_tokenizer_folder, tmp_path_factory.mktemp("adapters") / "grown")


# ---------------------------------------------------------------- adapters and precision


@pytest.mark.slow
def test_compiled_layers_give_the_same_answers(grown, tiny_model_folder, questions, tmp_path, monkeypatch):
    """Through an adapter, with batches that grow and shrink; the compiled parts are really what runs."""
    import torch._dynamo

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # conftest.py sets 1
    settings, task = {"max_new_tokens": 40}, {"data_file": str(questions), "batch_size": 3}
    ask(tiny_model_folder, adapter=grown[0], settings=settings, predictions_file=str(tmp_path / "a.json"), **task)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ask(
        tiny_model_folder, adapter=grown[0], settings=settings, predictions_file=str(tmp_path / "c.json"),
        model_settings={"torch_compile": True}, **task,
    )  # fmt: skip
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert outputs(tmp_path / "a.json") == outputs(tmp_path / "c.json")
    with pytest.raises(InputError, match=r"--torch_compile is for --engine transformers; llama\.cpp has kernels"):
        InferenceArguments(torch_compile=True, engine="llama.cpp")


@pytest.mark.slow
def test_adapter_with_a_grown_vocabulary_answers_as_the_merged_model(grown, tiny_model_folder, questions, tmp_path):
    adapter, merged = grown
    settings = {"max_new_tokens": 40}
    ask(
        tiny_model_folder,
        adapter=adapter,
        settings=settings,
        data_file=str(questions),
        predictions_file=str(tmp_path / "a.json"),
    )
    ask(merged, settings=settings, data_file=str(questions), predictions_file=str(tmp_path / "m.json"), batch_size=4)
    ask(tiny_model_folder, settings=settings, data_file=str(questions), predictions_file=str(tmp_path / "b.json"))
    assert outputs(tmp_path / "a.json") == outputs(tmp_path / "m.json")
    assert all(a != b for a, b in zip(outputs(tmp_path / "a.json"), outputs(tmp_path / "b.json"), strict=True))
    assert [row["Input"] for row in read_rows(tmp_path / "a.json")] == QUESTIONS


@pytest.mark.parametrize("tie", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tied_embeddings(tie, tiny_model_folder, extended_tokenizer_folder, questions, tmp_path):
    """A tied base: the adapter's two matrices stay one, or become two, as it was trained."""
    base = tmp_path / "tied"
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        model.save_pretrained(base)
    save_tokenizer(load_tokenizer(tiny_model_folder), base)
    adapter, merged = make_adapter(base, extended_tokenizer_folder, tmp_path / "adapter", ensure_weight_tying=tie)
    if not tie:  # merging alone does not untie the config; two matrices need that
        config = json.loads((merged / "config.json").read_text())
        (merged / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    ask(base, adapter=adapter, data_file=str(questions), predictions_file=str(tmp_path / "a.json"))
    ask(merged, data_file=str(questions), predictions_file=str(tmp_path / "m.json"))
    assert outputs(tmp_path / "a.json") == outputs(tmp_path / "m.json")


def test_the_base_an_adapter_records_and_its_tokenizer_are_found(grown, tiny_model_folder):
    recorded = json.loads((grown[0] / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded == str(tiny_model_folder)
    assert ask(None, adapter=grown[0], prompt="Hi")["output"] == ask(grown[1], prompt="Hi")["output"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_takes_adapter_and_grown_rows_with_it(grown, tiny_model_folder, dtype):
    from utils.generation.loading import check_inference_request, find_inference_files, load_for_inference

    args = find_inference_files(
        InferenceArguments(str(tiny_model_folder), adapter_name_or_path=str(grown[0]), dtype=dtype)
    )
    model = load_for_inference(args, check_inference_request(args, load_tokenizer(grown[0])))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert ask(tiny_model_folder, adapter=grown[0], prompt="Hi", model_settings={"dtype": dtype})["new_tokens"] == 12


@pytest.mark.parametrize("bits", [8, 4])
def test_k_bit_weights_run_on_the_cpu(grown, tiny_model_folder, bits):
    """Against a float32 model that holds the same rounded weights, with the adapter on."""
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    from utils.generation.loading import check_inference_request, find_inference_files, load_for_inference

    switch = {"only_cpu": True, f"load_in_{bits}bit": True, "dtype": "float32"}
    args = find_inference_files(
        InferenceArguments(str(tiny_model_folder), adapter_name_or_path=str(grown[0]), **switch)
    )
    tokenizer = load_tokenizer(grown[0])
    model = load_for_inference(args, check_inference_request(args, tokenizer))
    quantised = dict(model.named_modules())
    oracle = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    oracle.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    oracle = PeftModel.from_pretrained(oracle, grown[0]).get_base_model().eval()
    rounded = 0
    for name, module in oracle.named_modules():
        if isinstance(module, torch.nn.Linear) and "bit" in type(quantised[name]).__name__:
            module.weight.data = dequantize(quantised[name].weight, bits)
            rounded += 1
    assert rounded == 2 * 7
    ids = torch.tensor([encode_raw("Once upon a time there was a house", tokenizer)])
    with torch.no_grad():
        logits, expected = model(ids).logits.float(), oracle(ids).logits
    # 8-bit layers round their inputs too, and bitsandbytes' 4-bit CPU kernel computes in bf16.
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()
    # How the weights are rounded differs between processors: a random model may end its answer at any token.
    length = {"max_new_tokens": 12, "min_new_tokens": 12}
    answer = ask(tiny_model_folder, adapter=grown[0], prompt="Hi", model_settings=switch, settings=length)
    assert answer["new_tokens"] == 12


def dequantize(weight, bits: int) -> torch.Tensor:
    from bitsandbytes import functional

    if bits == 8:
        return weight.data.float() * weight.SCB.view(-1, 1) / 127
    return functional.dequantize_4bit(weight.data, weight.quant_state).float()


# ---------------------------------------------------------------- files


def test_text_is_continued_and_questions_are_answered(tiny_model_folder, questions, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    metrics = ask(tiny_model_folder, data_file=str(questions), with_prompt=False)
    rows = read_rows(tmp_path / "predictions.json")  # the forerunners' default
    assert [set(row) for row in rows] == [{"Input", "Output"}] * 6
    assert all(row["Output"].startswith(row["Input"]) and row["Output"] != row["Input"] for row in rows)
    assert "5 blank lines left out" in caplog.text
    assert metrics["answers"] == 6 and metrics["new_tokens"] == 72 and metrics["cut_at_limit"] == 6
    assert metrics["tokens_per_second"] > 0
    recorded = json.loads((tmp_path / "predictions.json.settings.json").read_text())
    assert recorded["settings"]["temperature"] == 0 and recorded["metrics"]["answers"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.json", "predictions.json.settings.json"]


def test_records_of_all_kinds_are_asked_without_their_answers(tiny_model_folder, tmp_path, monkeypatch):
    records = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Add\n1 2"},
        {"messages": [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]},
        {"conversations": [{"from": "human", "value": "Add\n1 2"}]},
        {"messages": [{"role": "system", "content": "sys"}, {"role": "user", "content": "Add\n1 2"}]},
        {"instruction": "Add\n1 2", "system": "sys"},
        {"instruction": "b", "history": [["a", "A"]]},
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    ask(tiny_model_folder, data_file=str(data), predictions_file=str(out), batch_size=3)
    rows = read_rows(out)
    assert [row["Input"] for row in rows[:4]] == ["Add\n1 2"] * 4
    assert len({row["Output"] for row in rows[:4]}) == 1
    assert (
        rows[4]["Input"]
        == rows[5]["Input"]
        == [
            {"role": "system", "content": "sys"},
            {"role": "user", "content": "Add\n1 2"},
        ]
    )
    assert rows[4]["Output"] == rows[5]["Output"] != rows[0]["Output"]
    assert [message["content"] for message in rows[6]["Input"]] == ["a", "A", "b"]
    with_flag = ask(tiny_model_folder, prompt="Add\n1 2", model_settings={"system_prompt": "sys"})
    assert with_flag["output"] == rows[4]["Output"]
    with pytest.raises(InputError, match=r"conversation.*--with_prompt"):
        ask(tiny_model_folder, data_file=str(data), predictions_file=str(tmp_path / "raw.json"), with_prompt=False)


def test_begun_answers_in_records_are_gone_on_with(tiny_model_folder, tmp_path):
    """Against the engine itself: the prompt ends with the beginning, the output is what follows it, spaces too."""
    begun = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "the cat"}]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    asked = [begun, begun[:1], [begun[0], {"role": "assistant", "content": "x", "tool_calls": [call]}]]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in asked), encoding="utf-8")
    task = {"data_file": str(data), "predictions_file": str(tmp_path / "out.jsonl"), "continue_final_message": True}
    ask(tiny_model_folder, **task)
    loaded = EnginePlan(InferenceArguments(str(tiny_model_folder))).load()
    settings = GenerationArguments(max_new_tokens=12, temperature=0.0)
    prompt = encode_prompt(begun, loaded.template, loaded.tokenizer, continue_final=True)
    expected = loaded.generate([engine.Request(prompt, settings, strip=False)])[0].text
    loaded.close()
    rows = read_rows(tmp_path / "out.jsonl")
    assert rows[0] == {"Input": begun, "Output": expected}
    assert rows[1]["Input"] == rows[2]["Input"] == "Once" and rows[1]["Output"] == rows[2]["Output"] != expected
    data.write_text(json.dumps({"instruction": "Once"}), encoding="utf-8")
    with pytest.raises(InputError, match=r"no record of .* ends with an answer to go on with"):
        ask(tiny_model_folder, **task)
    with pytest.raises(InputError, match="--continue_final_message is for answers in records"):
        TaskArguments(prompt="a", continue_final_message=True)


@pytest.mark.parametrize(("family", "mark"), [("Llama-3.1", "<|python_tag|>"), ("Mistral", "[TOOL_CALLS]")])
def test_marks_of_calls_are_shown(family, mark, tmp_path, base_tokenizer_folder):
    """They are special tokens, whose text answers lack otherwise; without it a call cannot be told from text."""
    tokenizer = make_family(family, tmp_path / "model", base_tokenizer_folder)
    if mark not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
    prompter = Prompter(tokenizer, resolve_template("tokenizer", tokenizer), 512)
    messages, tools = generate_conversations(1, False)[0][0], [{"name": "f", "description": "", "parameters": {}}]
    settings = GenerationArguments()
    index = tokenizer.convert_tokens_to_ids(mark)
    shown = inference_hf.ask(prompter, settings, {"messages": messages, "tools": tools}, [1], 0)
    assert shown.shown_tokens == {index: mark} and shown.strip
    assert inference_hf.ask(prompter, settings, messages, [1], 0).shown_tokens == {}


def test_batch_size_changes_nothing(tiny_model_folder, questions, tmp_path):
    """In float32: bfloat16 keeps 3 digits, and which kernels round how depends on the rows and on the processor."""
    sampled = {"temperature": 1.0, "max_new_tokens": 30}
    answers = []
    for size in (1, 4):
        out = tmp_path / f"{size}.jsonl"
        task = {"data_file": str(questions), "predictions_file": str(out), "batch_size": size}
        ask(tiny_model_folder, settings=sampled, model_settings={"dtype": "float32"}, **task)
        answers.append(outputs(out))
    assert answers[0] == answers[1] and len(set(answers[0])) == 6


def command(*flags: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, flags)]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on_and_gives_what_an_unbroken_one_gives(tiny_model_folder, tmp_path, how):
    data, out = tmp_path / "many.txt", tmp_path / "out.json"
    data.write_text("\n".join(f"question {number} 好" for number in range(60)), encoding="utf-8")
    flags = ["--base_model", tiny_model_folder, "--with_prompt", "--data_file", data, "--max_new_tokens", "30"]
    process = subprocess.Popen(
        command(*flags, "--temperature", "1.0", "--predictions_file", out), stderr=subprocess.PIPE
    )
    written = out.with_name(out.name + ".partial.jsonl")
    while not written.is_file() or written.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(how)
    messages = process.communicate()[1].decode()
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in messages and "run the same command again" in messages
    before = written.read_bytes()
    assert not out.exists() and 3 <= before.count(b"\n") < 60
    with open(written, "ab") as file:
        file.write('{"Input": "half a row 好'.encode()[:-1])  # what a kill within a write leaves
    task = {"data_file": str(data), "batch_size": 7}
    settings = {"temperature": 1.0, "max_new_tokens": 30}
    metrics = ask(tiny_model_folder, settings=settings, predictions_file=str(out), **task)
    assert metrics["resumed"] == before.count(b"\n") and metrics["answers"] == 60
    ask(tiny_model_folder, settings=settings, predictions_file=str(tmp_path / "unbroken.json"), **task)
    assert read_rows(out) == read_rows(tmp_path / "unbroken.json")
    assert not written.exists()


def test_finished_files_are_kept_and_others_never_mixed(tiny_model_folder, questions, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    task = {"data_file": str(questions), "predictions_file": str(out)}
    ask(tiny_model_folder, **task)
    before = out.read_bytes()
    with monkeypatch.context() as patch:  # all answers are there: no model is loaded
        patch.setattr("utils.generation.loading.load_for_inference", lambda *args: pytest.fail("loaded"))
        assert ask(tiny_model_folder, **task) == {"answers": 6, "resumed": 6, "predictions_file": str(out)}
        with pytest.raises(InputError, match=r"other settings .*temperature 0.0 -> 0.5.*--overwrite"):
            ask(tiny_model_folder, settings={"temperature": 0.5}, **task)
        other = tmp_path / "other.txt"
        other.write_text("Where is the house?\nsomething else\n", encoding="utf-8")
        with pytest.raises(InputError, match=r"answer 2 is to '你好吗？', this run asks 'something else'"):
            ask(tiny_model_folder, **task | {"data_file": str(other)})
        foreign = tmp_path / "notes.json"
        foreign.write_text("[1, 2]")
        with pytest.raises(InputError, match="holds no predictions"):
            ask(tiny_model_folder, **task | {"predictions_file": str(foreign)})
        assert foreign.read_text() == "[1, 2]"
        (tmp_path / "folder.json").mkdir()
        with pytest.raises(InputError, match="is a folder"):
            ask(tiny_model_folder, **task | {"predictions_file": str(tmp_path / "folder.json")})
        with pytest.raises(InputError, match="cannot write there"):
            ask(tiny_model_folder, **task | {"predictions_file": str(foreign / "x.json")})
    assert out.read_bytes() == before
    ask(tiny_model_folder, settings={"temperature": 0.5}, overwrite=True, **task)
    assert out.read_bytes() != before and len(read_rows(out)) == 6


def test_an_unfinished_file_goes_on_even_with_overwrite(tiny_model_folder, questions, tmp_path):
    out = tmp_path / "out.jsonl"
    task = {"data_file": str(questions), "predictions_file": str(out)}
    ask(tiny_model_folder, **task)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]))
    assert ask(tiny_model_folder, overwrite=True, **task)["resumed"] == 4
    assert out.read_bytes() == b"".join(lines)
    assert ask(tiny_model_folder, overwrite=True, **task)["resumed"] == 0


def test_answers_may_hold_any_line_separator(tiny_model_folder, tmp_path):
    """U+2028 stands unescaped in JSON; a reader that splits there sees broken rows."""
    data, out = tmp_path / "q.json", tmp_path / "out.jsonl"
    data.write_text(json.dumps([{"instruction": "a\u2028b\u0085c"}, {"instruction": "d"}]), encoding="utf-8")
    task = {"data_file": str(data), "predictions_file": str(out)}
    ask(tiny_model_folder, **task)
    lines = out.read_bytes().split(b"\n")
    out.write_bytes(lines[0] + b"\n")
    assert ask(tiny_model_folder, **task)["resumed"] == 1
    assert out.read_bytes() == b"\n".join(lines)


def test_changed_weights_are_noticed(tiny_model_folder, questions, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    task = {"data_file": str(questions), "predictions_file": str(tmp_path / "out.json")}
    ask(model, **task)
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(InputError, match="sha256_of_weight_file_list"):
        ask(model, **task)


# ---------------------------------------------------------------- on the screen


def test_one_prompt_is_streamed_and_a_sample_question_stands_in(tiny_model_folder, capsys):
    result = ask(tiny_model_folder, prompt="Where is it?", settings={"max_new_tokens": 30})
    assert capsys.readouterr().out == result["output"] + "\n"
    sample = ask(tiny_model_folder)
    assert sample["output"] == ask(tiny_model_folder, prompt="为什么要减少污染，保护环境？")["output"]
    capsys.readouterr()
    raw = ask(tiny_model_folder, prompt="Where", with_prompt=False)
    assert capsys.readouterr().out == raw["output"] + "\n" and raw["output"].startswith("Where")
    assert ask(tiny_model_folder, prompt="Where", settings={"num_beams": 2})["new_tokens"] > 0


@pytest.mark.slow
def test_a_conversation_through_standard_input(tiny_model_folder, tmp_path):
    """History, /clear, invalid UTF-8, and an end without traceback, in a process with an ASCII locale."""
    flags = ("--base_model", tiny_model_folder, "--with_prompt", "--interactive", "--max_new_tokens", "8")
    lines = ["你好", "again", "/clear", "你好", "/exit", "never asked"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        command(*flags, "--temperature", "0"),
        input="\n".join(lines).encode() + b"\n\xff\xfe\n",
        capture_output=True,
        env=environment,
        check=True,
    )
    text = result.stdout.decode()
    answers = [part.partition("Output: ")[2].strip() for part in text.split("Input: ")]
    assert len(answers) == 6 and "The conversation was cleared." in text
    assert answers[1] == answers[4] != answers[2]  # the same question of a cleared conversation, the same answer
    assert b"Traceback" not in result.stderr and b"documented" not in result.stderr
    assert b"old flags" not in result.stderr  # --base_model is a documented spelling


def feed(monkeypatch, *lines):
    answers = iter(lines)

    def read(prompt=""):
        line = next(answers, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)


def test_the_history_is_what_was_said(tiny_model_folder, monkeypatch, capsys):
    asked = []
    encode = engine.encode_prompt
    monkeypatch.setattr(engine, "encode_prompt", lambda m, *rest: asked.append(list(m)) or encode(m, *rest))
    feed(monkeypatch, "one", "two", "/clear", "three")
    result = ask(tiny_model_folder, interactive=True, model_settings={"system_prompt": "sys"})
    assert result == {"turns": 3}
    conversations = [[(m["role"], m["content"]) for m in messages] for messages in asked]
    first_answer = conversations[-3][2][1]
    assert ("user", "one") in conversations[0] and conversations[0][0] == ("system", "sys")
    assert conversations[-3] == [("system", "sys"), ("user", "one"), ("assistant", first_answer), ("user", "two")]
    assert conversations[-1] == [("system", "sys"), ("user", "three")]
    assert first_answer in capsys.readouterr().out


def test_a_full_context_is_said_and_an_impossible_question_ends_nothing(tiny_model_folder, monkeypatch, capsys):
    feed(monkeypatch, "word " * 60, "word " * 60, "word " * 900, "hello")
    assert ask(tiny_model_folder, interactive=True, settings={"max_new_tokens": 200})["turns"] == 3
    text = capsys.readouterr().out
    assert "no longer fit the context of 512" in text and "nothing is left for an answer" in text


@pytest.mark.parametrize("end", ["", "/exit", None, KeyboardInterrupt])
def test_every_way_out_is_clean(tiny_model_folder, monkeypatch, end):
    feed(monkeypatch, "hello", end, "not read")
    assert ask(tiny_model_folder, interactive=True, with_prompt=False) == {"turns": 1}


@pytest.mark.slow
def test_ctrl_c_while_the_model_writes(tiny_model_folder):
    flags = ("--base_model", tiny_model_folder, "--with_prompt", "--interactive", "--max_new_tokens", "450")
    process = subprocess.Popen(
        command(*flags, "--temperature", "3"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    seen = b""
    while b"Output: " not in seen or len(seen.partition(b"Output: ")[2]) < 3:
        piece = os.read(process.stdout.fileno(), 100)
        assert piece, process.stderr.read().decode()
        seen += piece
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and b"[left]" in out and b"Traceback" not in err


# ---------------------------------------------------------------- what is refused


def refused(message: str, *args, **kwargs):
    with pytest.raises(InputError, match=message):
        ask(*args, **kwargs)


def test_parts_that_do_not_belong_together_are_refused(
    grown, tiny_model_folder, base_tokenizer_folder, extended_tokenizer_folder, tmp_path
):
    adapter, merged = grown
    plain, _ = make_adapter(tiny_model_folder, base_tokenizer_folder, tmp_path / "plain", modules_to_save=())
    size = len(load_tokenizer(extended_tokenizer_folder))
    refused(
        rf"tokenizer has 400 tokens but the adapter's embeddings have {size} rows.*before.*--tokenizer_path {adapter}",
        *(tiny_model_folder,),
        adapter=adapter,
        tokenizer=base_tokenizer_folder,
        prompt="x",
    )
    refused(
        rf"tokenizer has {size} tokens but the adapter's embeddings have 400 rows.*pass --tokenizer_path {plain}",
        tiny_model_folder,
        adapter=plain,
        tokenizer=extended_tokenizer_folder,
        prompt="x",
    )
    refused(
        rf"tokenizer has {size} tokens but the model has 400 rows", tiny_model_folder, tokenizer=merged, prompt="x"
    )
    wide = tmp_path / "wide"
    shutil.copytree(merged, wide)
    make_wide(wide)
    refused(r"trained on .*tiny \(hidden_size 32\), .*wide has 48", wide, adapter=plain, prompt="x")
    narrow, _ = make_adapter(tiny_model_folder, base_tokenizer_folder, tmp_path / "narrow")
    refused("400 rows, but the model already has", merged, adapter=narrow, prompt="x")


def make_wide(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    from transformers import AutoConfig

    with quiet():
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def test_a_folder_is_looked_at_without_loading_it(grown, tiny_model_folder, capsys):
    adapter, merged = grown
    for more in ({"adapter": adapter, "check": str(tiny_model_folder)}, {"check": str(merged)}):
        assert "found" in ask(None, **more)
        assert capsys.readouterr().out.splitlines()[-1] == "nothing would be refused"
    with pytest.raises(SystemExit) as left:
        ask(None, check=str(adapter))
    assert left.value.code == 1 and "refused: " in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--check .* names the model already"):
        ask(tiny_model_folder, check=str(tiny_model_folder))
    with pytest.raises(InputError, match="--check asks the model nothing"):
        TaskArguments(check="model", prompt="why")


def test_missing_and_damaged_files_are_named(grown, tiny_model_folder, tmp_path):
    refused("folder not found: .*nowhere", tmp_path / "nowhere", prompt="x")
    refused("pass --base_model", None, prompt="x")
    refused("one adapter can be used here; merge", tiny_model_folder, adapter="a,b", prompt="x")
    refused("it holds an adapter", grown[0], prompt="x")
    refused("no adapter_config.json", tiny_model_folder, adapter=tiny_model_folder, prompt="x")
    for original, kind in ((tiny_model_folder, "model"), (grown[0], "adapter_model")):
        broken = tmp_path / f"broken-{kind}"
        shutil.copytree(original, broken)
        file = broken / f"{kind}.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        if kind == "model":
            refused(f"{file}", broken, prompt="x")
        else:
            refused(f"{file}", tiny_model_folder, adapter=broken, prompt="x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n\n", "no question"),
        ("bad.txt", "一\n".encode() + b"\xff\n", r"bad\.txt:2: invalid UTF-8.*--on_bad_record skip"),
        ("broken.jsonl", b'{"instruction": "a"}\n{"instruction": \n', r"broken\.jsonl:2: broken JSON"),
        ("fields.jsonl", b'{"question": "a"}\n', r"fields\.jsonl:1: need 'instruction'.*\['question'\]"),
        ("blank.jsonl", b'{"instruction": " "}\n', r"blank\.jsonl:1: the question is empty"),
        ("turns.json", b'[{"messages": "hi"}]', r"turns\.json:1: messages: need a non-empty list"),
        ("long.txt", b"short\n" + b"word " * 900, r"question 2: the prompt has \d+ tokens, the model's context 512"),
        ("table.csv", b"a,b", "cannot read '.csv'"),
    ],
)
def test_bad_data_is_named_before_the_model_is_loaded(
    tiny_model_folder, tmp_path, monkeypatch, name, content, message
):
    monkeypatch.setattr("utils.generation.loading.load_for_inference", lambda *args: pytest.fail("loaded"))
    (tmp_path / name).write_bytes(content)
    refused(message, tiny_model_folder, data_file=str(tmp_path / name), predictions_file=str(tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()
    refused("data not found", tiny_model_folder, data_file=str(tmp_path / "none.txt"))


def test_bad_text_can_be_skipped_and_is_counted(tiny_model_folder, tmp_path, caplog):
    data, out = tmp_path / "bad.txt", tmp_path / "out.jsonl"
    data.write_bytes("一\n".encode() + b"\xff\n\n" + "二\n".encode())
    ask(tiny_model_folder, data_file=str(data), predictions_file=str(out), on_bad_record="skip")
    assert [row["Input"] for row in read_rows(out)] == ["一", "二"]
    assert "skipped 1 bad records" in caplog.text and "bad.txt:2" in caplog.text


def test_flags_that_exclude_each_other():
    with pytest.raises(InputError, match="exclude each other"):
        TaskArguments(prompt="a", interactive=True)
    with pytest.raises(InputError, match="batch_size 0"):
        TaskArguments(batch_size=0)
    with pytest.raises(InputError, match=r"\.json or \.jsonl"):
        TaskArguments(predictions_file="answers.txt")
    with pytest.raises(InputError, match="contradict"):
        InferenceArguments(load_in_4bit=True, load_in_8bit=True)


def test_the_forerunners_command_is_understood_without_a_warning(caplog):
    line = (
        "--base_model B --lora_model L --tokenizer_path T --data_file d.txt --with_prompt --predictions_file p.json "
        "--gpus 0 --load_in_8bit --system_prompt s --use_flash_attention_2"
    )
    model, settings, task = parse_args(
        InferenceArguments,
        GenerationArguments,
        TaskArguments,
        argv=line.split(),
        documented=("base_model", "lora_model", "tokenizer_path"),
    )
    assert (model.model_name_or_path, model.adapter_name_or_path, model.tokenizer_name_or_path) == ("B", "L", "T")
    assert (model.gpus, model.load_in_kbits, model.system_prompt) == ("0", 8, "s")
    assert model.attn_implementation == "flash_attention_2" and task.with_prompt and settings.samples
    assert "base_model" not in caplog.text and "gpus" not in caplog.text
    with pytest.raises(InputError, match=r"--guidance_scale 1\.5: it leads away from --negative_prompt; pass both"):
        parse_args(InferenceArguments, GenerationArguments, TaskArguments, argv=["--guidance_scale=1.5"])


def test_plain_text_cannot_be_led_away_from_a_system_prompt(tiny_model_folder, monkeypatch):
    monkeypatch.setattr("utils.generation.loading.load_for_inference", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(InputError, match="which plain text has not; pass --with_prompt"):
        inference_hf.main(
            InferenceArguments(model_name_or_path=str(tiny_model_folder)),
            GenerationArguments(guidance_scale=2.0, negative_prompt="x"),
            TaskArguments(prompt="Hello"),
        )


def test_gpus_are_chosen_by_the_environment(monkeypatch):
    from utils.core.command_line import select_gpus

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    select_gpus(InferenceArguments())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    select_gpus(InferenceArguments(gpus="0,1"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    select_gpus(InferenceArguments(gpus="0,1", only_cpu=True))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.slow
def test_a_mistake_ends_in_one_line_without_traceback(tmp_path):
    result = subprocess.run(
        command("--base_model", tmp_path / "none", "--prompt", "x"), capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr.splitlines()[-1].startswith("error: model folder not found") and "Traceback" not in result.stderr
    )


# ---------------------------------------------------------------- commands of a conversation


def remembered(*said):
    """A chat in which questions and answers, in turn, were said."""
    terminal = TerminalChat("be brief")
    turns = [Turn(question, [Reply(answer, "stop")]) for question, answer in zip(said[::2], said[1::2], strict=True)]
    terminal.conversation.replace(turns)
    return terminal


def test_commands_change_the_conversation(tmp_path, capsys):
    asked = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]
    terminal = remembered("one", "1", "two", "2")
    history = terminal.conversation.messages
    path = tmp_path / "talk.json"
    assert terminal.command(f"/save {path}") is None
    assert terminal.command("/retry") == "two" and history() == asked
    assert terminal.command("/edit three") == "three" and history() == []
    terminal.command(f"/load {path}")
    assert len(history()) == 4 and terminal.messages[0]["content"] == "be brief"
    terminal.command("/undo")
    assert history() == asked
    terminal.command("/history")
    assert "user: one\nassistant: 1" in capsys.readouterr().out
    terminal.command("/system")
    assert terminal.messages == [{"role": "system", "content": ""}]


def test_an_answer_is_gone_on_with(tiny_model_folder, capsys):
    class Stand(Prompter):
        def submit(self, request):
            self.request, answer = request, Answer(len(request.prompt))
            answer.push(Delta(" more", finish_reason="stop"))
            return answer

    tokenizer = load_tokenizer(tiny_model_folder)
    engine = Stand(tokenizer, CHAT_TEMPLATES["alpaca-2"], 512)
    terminal = remembered("one", "1 and")
    text = tokenizer.apply_chat_template(
        terminal.messages, chat_template=engine.template, tokenize=False, continue_final_message=True
    )
    terminal.go_on(engine, GenerationArguments(), 0)
    assert engine.request.prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert terminal.messages[-1]["content"] == "1 and more" and "1 and more" in capsys.readouterr().out
    with pytest.raises(InputError, match="no answer to go on with"):
        TerminalChat(None).go_on(engine, GenerationArguments(), 0)


def test_a_saved_conversation_has_the_form_it_always_had(tmp_path):
    """The file as text, and what the web demo's files and training data give."""
    path = tmp_path / "talk.json"
    remembered("你好", "1").command(f"/save {path}")
    assert path.read_text(encoding="utf-8") == (
        '{\n  "messages": [\n    {\n      "role": "system",\n      "content": "be brief"\n    },\n'
        '    {\n      "role": "user",\n      "content": "你好"\n    },\n'
        '    {\n      "role": "assistant",\n      "content": "1"\n    }\n  ]\n}\n'
    )
    for record in (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "model": "m"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ):
        path.write_text(json.dumps(record), encoding="utf-8")
        terminal = TerminalChat("be brief")
        terminal.command(f"/load {path}")
        assert [message["content"] for message in terminal.messages] == ["be brief", "q", "a"]
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"talk.json: it is not JSON"):
        terminal.command(f"/load {path}")
    path.write_text('{"messages": [{"role": "root", "content": "q"}]}', encoding="utf-8")
    with pytest.raises(InputError, match=r"talk.json: .*messages: turn 1"):
        terminal.command(f"/load {path}")
    assert len(terminal.messages) == 3, "what cannot be read changes nothing"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/undo", "nothing has been asked"),
        ("/edit", "nothing has been asked"),
        ("/save", "needs a file name"),
        ("/save talk.txt", "ends in .json"),
        ("/load nowhere.json", "nowhere.json: No such file"),
        ("/load ~/nowhere.json", f"{Path.home()}/nowhere.json: No such file"),
        ("/load .", "Is a directory"),
        (f"/load {'a' * 300}", "name too long"),
        ("/load a\0b.json", "null byte"),
        ("/save /proc/talk.json", "/proc/talk.json: No such file"),
        ("/save /dev/null/talk.json", "/dev/null/talk.json: (File exists|Not a directory)"),
        (f"/save {'a' * 300}.json", "name too long"),
        ("/dance", "is no command; /help"),
    ],
)
def test_commands_that_cannot_be_done_change_nothing(line, message):
    terminal = TerminalChat("be brief")
    with pytest.raises(InputError, match=message):
        terminal.command(line)
    terminal.conversation.ask("one")
    if line == "/edit":
        with pytest.raises(InputError, match="needs the question"):
            terminal.command(line)
    assert terminal.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]


def test_the_terminal_chat_speaks_the_language_of_the_shell(monkeypatch, capsys):
    from inference_hf import asked_language

    from utils.web.texts import TERMINAL_TEXTS

    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert asked_language(TaskArguments()) == "zh" and asked_language(TaskArguments(language="en")) == "en"
    for language in ("zh", "en"):
        terminal = TerminalChat(None, language)
        terminal.command("/help")
        terminal.command("/reset")
    chinese, english = capsys.readouterr().out.split("对话已清空。\n")
    named = [sorted(set(re.findall(r"(?<!\w)/[a-z]+", text))) for text in (chinese, english)]
    assert named[0] == named[1] and len(named[0]) == 12
    assert english.endswith("The conversation was cleared.\n") and "换系统提示" in chinese
    for texts in TERMINAL_TEXTS.values():
        assert len({tuple(sorted(re.findall(r"{(\w+)}", text))) for text in texts}) == 1, texts
