import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from utils.core.errors import InputError
from utils.weights.config import model_of_shapes

SMALL = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)


@pytest.fixture
def zero3():
    yield HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})  # lives as long as it is held
    unset_hf_deepspeed_config()


def test_a_model_of_shapes_is_what_transformers_makes_without_its_memory():
    ours, theirs = model_of_shapes(SMALL), AutoModelForCausalLM.from_config(SMALL)
    assert {name: weight.shape for name, weight in ours.named_parameters()} == {
        name: weight.shape for name, weight in theirs.named_parameters()
    }
    assert all(weight.is_meta for weight in ours.parameters())
    assert model_of_shapes(SMALL, "AutoModelForTokenClassification").score.in_features == 32


def test_a_model_of_shapes_is_whole_under_zero3(zero3):
    """Asked before training starts, where ZeRO-3 would cut up every model that from_config makes."""
    model = model_of_shapes(SMALL)
    assert model.lm_head.weight.shape == (50, 32) and model.lm_head.weight.is_meta
    assert not hasattr(model.lm_head.weight, "ds_id")


def test_a_kind_of_model_that_writes_no_text_is_refused():
    with pytest.raises(InputError, match="type vit is none that transformers' AutoModelForCausalLM can make"):
        model_of_shapes(AutoConfig.for_model("vit"))
