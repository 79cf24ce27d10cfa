"""The part of generate_data.py that writes arena/questions.jsonl: what models are asked side by side.

Reads arena.json beside this file: questions by category, some with a reference, a right answer that only judges see.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
BANK = "arena/questions.jsonl"


def write_arena() -> dict[str, str]:
    """Return {file: text}."""
    bank = json.loads((HERE / "arena.json").read_text(encoding="utf-8"))
    asked = [(category, row) for category, rows in bank.items() for row in rows]
    assert len({row["question"] for _, row in asked}) == len(asked), "a question occurs twice"
    rows = [{"id": f"arena-{n:03}", "category": category, **row} for n, (category, row) in enumerate(asked, 1)]
    return {BANK: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}
