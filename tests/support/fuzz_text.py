"""Texts that tell tokenizers apart: mixed scripts, spaces, control characters, and what looks like special tokens."""

import json
import random
from pathlib import Path

ATOMS = [
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "<0x0A>",
        "<0xE4>",
        "<|begin_of_text|>",
        "<|im_end|>",
    ),
    *(
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        " ",
        "  ",
        "     ",
        " " * 17,
        "\u3000",
        "\u00a0",
        "\u200b",
        "\ufeff",
        "\u2028",
        "\u0085",
    ),
    *("\x00", "\x01", "\x7f", "\x1b[0m", "\uffff", "\U0010ffff", "\ud7ff", "e\u0301", "é", "ß", "İ", "ﬁ"),
    *("😀", "👩\u200d👩\u200d👧", "🇨🇳", "𠀀", "𪚥", "𰻞", "㐀", "ａ", "Ａ１", "한국어", "日本語", "العربية"),
    *("你好", "我们", "人工智能", "中华人民共和国", "的", "the", "The", "hello", " world", "123", "3.14", "_", "__"),
    *("——", "……", "“", "”", "、", "。", "，", "！！！", "!!!!", "----", "====", "aaaa", "哈哈哈哈哈"),
]
RANGES = [(0, 0x7F), (0x80, 0x24F), (0x2000, 0x2BFF), (0x3000, 0x303F), (0x4E00, 0x9FFF), (0xFF00, 0xFFEF)]
RANGES += [(0xA0, 0xD7FF), (0xE000, 0xFFFD), (0x20000, 0x2FFFF), (0x1F300, 0x1FAFF)]


def fuzz_texts(count: int, lines: list[str], seed: int = 0) -> list[str]:
    """Seeded random mixtures of the atoms, pieces of real lines, random characters and repeated ones; no U+2581."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.6:
                parts.append(rng.choice(ATOMS))
            elif kind < 0.75:
                parts.append(rng.choice(lines)[: rng.randint(1, 30)])
            elif kind < 0.9:
                parts.append(chr(rng.randint(*rng.choice(RANGES))))
            else:
                parts.append(rng.choice(["哈", "！", " ", "-", "a", "…", "~"]) * rng.randint(1, 40))
        texts.append("".join(parts).replace("\u2581", ""))
    return texts


def shared_lines(shared_data: Path, every: int) -> list[str]:
    """Every n-th line or field of the shared Chinese and English text."""
    lines = []
    for path in sorted((shared_data / "pt").glob("*.txt")):
        lines += path.read_text(encoding="utf-8").split("\n")
    for path in sorted((shared_data / "sft").glob("*.json")):
        for record in json.loads(path.read_text(encoding="utf-8")):
            lines += [value for value in record.values() if isinstance(value, str)]
    return [line for line in lines if line][::every]
