"""A tiny Llama that has learnt something: the worse a copy of it, the higher its perplexity."""

import json
from pathlib import Path

import torch

from support.paths import EXAMPLES
from utils.text.tokenizer import encode_texts, load_tokenizer, save_tokenizer

TRAIN, HELDOUT = EXAMPLES / "pretrain" / "en_train.txt", EXAMPLES / "pretrain" / "en_heldout.txt"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
GREEDY = {"do_sample": False, "temperature": 0.5, "eos_token_id": 2}  # transformers would refuse to save it


def save_learned_llama(folder: Path, tokenizer_folder: Path) -> Path:
    """Train on English for a moment and save with a tokenizer; returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(tokenizer_folder)
    ids = [
        token for row in encode_texts(tokenizer, TRAIN.read_text("utf-8").splitlines()[:1500]) for token in [1, *row]
    ]
    rows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        batch = rows[torch.randint(len(rows), (8,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    save_tokenizer(tokenizer, folder)
    (folder / "generation_config.json").write_text(json.dumps(GREEDY))
    return folder
