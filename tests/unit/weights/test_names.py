"""Names of files and tensors, against those that transformers and PEFT write."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from utils.weights import names

CONFIG = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1
)


def test_tensors_are_called_as_transformers_calls_them():
    shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(CONFIG).state_dict().items()}
    assert shapes[names.EMBEDDING] == shapes[names.HEAD] == (16, 8)
    reward = LlamaForSequenceClassification(CONFIG)
    assert tuple(reward.state_dict()[names.SCORE].shape) == (1, 8)
    assert type(reward).__name__.endswith(names.CLASSIFIER)


def test_adapter_files_are_called_as_peft_calls_them():
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

    assert (names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS) == (CONFIG_NAME, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
