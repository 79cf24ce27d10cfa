"""Sentencepiece tokenizers trained on the example data, in folders as people have them."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from support.paths import EXAMPLES
from utils.text.tokenizer import load_tokenizer

NEW_PIECES = ["的", "是", "猫", "狗", "猫狗", "▁zebra"]


def write_sentencepiece(folder: Path, model: bytes) -> Path:
    """A Llama-2-style tokenizer folder, as people have them: tokenizer.model and a short tokenizer_config.json."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def train_sentencepiece(lines: list[str], vocab_size: int) -> bytes:
    """A BPE model with Llama-2's settings: byte fallback, dummy prefix, no normalisation."""

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"

REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PATTERNS = {"llama-bpe": WORDS + r"\p{N}{1,3}" + REST, "qwen2": WORDS + r"\p{N}" + REST}  # by llama.cpp's names

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# It knows tools, and calls them as Qwen's does; no tokens of its own.
TOOL_TEMPLATE = """{% if tools %}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{% endif %}
{%- for m in messages %}{{ m.role + ':' }}{% if m.content %} {{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}{% endfor %}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""

SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


def read_lines(name):
    return [line for line in (EXAMPLES / "pretrain" / name).read_text(encoding="utf-8").splitlines() if line]


def make_byte_level(folder, pattern, ignore_merges, normalizer=None):
    """A small English byte-level tokenizer with a published split pattern, saved as such bases are."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(read_lines("en_train.txt")[:1500], trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SPECIALS[0], eos_token=SPECIALS[1])
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)
