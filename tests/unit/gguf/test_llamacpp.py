"""llama.cpp in a process of its own, which it may end."""

import numpy as np
import pytest

from support.dying import die_of_sigill, end
from utils.core.arguments import InferenceArguments
from utils.core.errors import InputError
from utils.gguf import llamacpp

needs_llama_cpp = pytest.mark.skipif(
    not llamacpp.is_installed(), reason="llama-cpp-python is not installed (requirements-llamacpp.txt)"
)


def refuse(model, words):
    raise InputError(words)


@needs_llama_cpp
def test_it_computes_there_with_every_kind_of_weights(tmp_path):
    llamacpp._write_trial(tmp_path / "trial.gguf")
    with llamacpp.separate_process(1, 32) as run:
        logits = run(llamacpp.compute_logits, tmp_path / "trial.gguf", [1, 2, 3])
        assert logits.shape == (3, 256) and np.array_equal(logits, np.zeros_like(logits))  # its weights are zero
        with pytest.raises(InputError, match="said there"):
            run(refuse, tmp_path / "trial.gguf", "said there")
        with pytest.raises(InputError, match=r"llama\.cpp cannot read no\.gguf"):
            run(llamacpp.compute_logits, tmp_path / "no.gguf", [1])
    with (
        pytest.raises(InputError, match=r"llama\.cpp was ended by itself: the file, or a fault"),
        llamacpp.separate_process(1, 32) as run,
    ):
        run(end, tmp_path / "trial.gguf")


@needs_llama_cpp
def test_a_build_for_another_processor_is_named_before_anything_is_read(monkeypatch, tmp_path):
    from utils.generation.llamacpp_engine import GgufFile

    monkeypatch.setattr(llamacpp, "_work_on_model", die_of_sigill)
    llamacpp._try_out.cache_clear()
    message = r"llama\.cpp was ended by SIGILL: it is built for another processor .* `make setup-llamacpp`"
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(InputError, match=message):
            llamacpp.require_llama_cpp("this test")
    with pytest.raises(InputError, match=message):
        GgufFile(InferenceArguments(model_name_or_path=str(tmp_path / "model.gguf"), engine="llama.cpp"))
    monkeypatch.undo()
    llamacpp.require_llama_cpp("this test")
