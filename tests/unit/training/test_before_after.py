"""before_after: which questions are asked, what is refused, and how both answers are shown."""

import json
from types import SimpleNamespace

import pytest

from utils.core.arguments import LoraArguments, ModelArguments
from utils.core.errors import InputError
from utils.text.prompts import CHAT_TEMPLATES
from utils.text.tokenizer import load_tokenizer
from utils.training.before_after import as_notes, as_text, open_trial

ROWS = [
    {"question": "1+1=?", "reference": "2", "before": "", "after": "2\n\nyes"},
    {"question": "And\nyou?", "before": "a", "after": "b"},
]


@pytest.fixture
def open_file(tmp_path, tiny_model_folder):
    def open_(rows, fsdp=(), zero3=False):
        path = tmp_path / "q.json"
        path.write_text(json.dumps(rows))
        deepspeed = SimpleNamespace(is_zero3=lambda: zero3)
        args = SimpleNamespace(fsdp=list(fsdp), hf_deepspeed_config=deepspeed)
        model, lora = ModelArguments(model_name_or_path=str(tiny_model_folder)), LoraArguments()
        tokenizer = load_tokenizer(tiny_model_folder)
        return open_trial([str(path)] if rows else [], tokenizer, CHAT_TEMPLATES["llama-2"], model, lora, args)

    return open_


def test_the_first_five_are_asked_with_or_without_an_answer(open_file):
    trial = open_file([{"instruction": f"q{n}", **({"output": "a"} if n else {})} for n in range(9)])
    assert [question.text for question in trial.questions] == ["q0", "q1", "q2", "q3", "q4"]
    rows = trial.describe(list("abcde"), list("vwxyz"))
    assert rows[0] == {"question": "q0", "before": "a", "after": "v"} and rows[4]["reference"] == "a"
    assert open_file([]) is None


@pytest.mark.parametrize("how", [{"fsdp": ["full_shard"]}, {"zero3": True}])
def test_weights_that_are_spread_are_refused(open_file, how):
    with pytest.raises(InputError, match=r"--questions: ZeRO-3 and FSDP spread the weights, .* leave it out"):
        open_file([{"instruction": "q"}], **how)


def test_a_question_that_fills_the_window_is_named_before_weights_are_read(open_file):
    with pytest.raises(InputError, match=r"q\.json:1: the prompt has \d+ tokens, the model's context 512"):
        open_file([{"instruction": "cat " * 600}])


def test_both_answers_are_shown_in_a_line_each():
    assert as_text(ROWS).splitlines() == [
        *("  1+1=?", "    reference  2", "    before     ∅", "    after      2 yes"),
        *("  And you?", "    before     a", "    after      b"),
    ]
    assert as_notes(ROWS) == [
        "## Before and after",
        "**1+1=?**\n- reference: 2\n- before: ∅\n- after: 2 yes",
        "**And you?**\n- before: a\n- after: b",
    ]
