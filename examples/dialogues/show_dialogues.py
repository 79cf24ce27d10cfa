"""Write README.md here: what the demo's models answered, every 20th held-out question, right or wrong.

python examples/dialogues/show_dialogues.py output/demo
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUESTIONS = HERE.parent / "data" / "sft" / "heldout.json"
MODELS = {
    "base": "英文基座 English base",
    "assistant": "精调后 tuned",
    "ppo": "PPO 之后 after PPO",
    "dpo": "DPO 之后 after DPO",
}
EVERY = 20  # no question is picked by hand

HEAD = """# 对话示例 · Sample dialogues

<!-- written by show_dialogues.py; change that, not this -->

`make demo` 的模型（460 万参数，四层，从零训练）的真实回答：{date} 的一次运行，种子 42，贪心解码。
问题是留出的，每 {every} 题取一题，不是挑出来的；答错的照样列出。
这些模型只认识示例数据教的事实，不代表 7B 能做到什么；7B 还没有测过。

Real answers of `make demo`'s models (4.6 million parameters, four layers, trained from scratch): a run of {date},
seed 42, greedy. The questions are held out, every {every}th of them and none picked by hand; wrong answers stand as
they are. These models know the facts that the example data teaches and nothing else; they say nothing about a 7B,
which has not been measured.

`pretraining_only`: 只在预训练里写过的事实 a fact met in pre-training alone;
`unseen_operands`: 没见过的算式 a sum not met;
`unseen_wording`: 学过的事实，没用过的问法 a fact that was taught, in a wording that was not.

```bash
python examples/dialogues/show_dialogues.py output/demo
```
"""


def main(folder: Path) -> None:
    """Read the answers of a run and write the page."""
    summary = folder / "summary.json"
    date = datetime.date.fromtimestamp(summary.stat().st_mtime).isoformat()
    (HERE / "README.md").write_text("\n".join([HEAD.format(date=date, every=EVERY), *facts(folder), *values(folder)]))


def facts(folder: Path) -> list[str]:
    """Questions with one right answer."""
    questions = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    answers = {name: json.loads((folder / "answers" / f"{name}.json").read_text(encoding="utf-8")) for name in MODELS}
    for given in answers.values():
        assert [row["Input"] for row in given] == [
            "\n".join(filter(None, (q["instruction"], q["input"]))) for q in questions
        ]
    lines = ["## 问答 · Questions", "", "✓：与参考答案逐字相同 the reference answer, to the letter.", ""]
    for number in range(0, len(questions), EVERY):
        question = questions[number]
        lines += [f"**{clean(answers['base'][number]['Input'])}** ({question['kind']})", ""]
        for name, label in MODELS.items():
            text = answers[name][number]["Output"].strip()
            mark = " ✓" if text == question["output"].strip() else ""
            lines.append(f"- {label}: {clean(text)}{mark}")
        lines += [f"- 参考 reference: {clean(question['output'])}", ""]
    return lines


def values(folder: Path) -> list[str]:
    """Questions about right and wrong; the tuned model was deliberately given bad answers to some."""
    names = {"assistant": "精调后 tuned", "ppo": MODELS["ppo"], "dpo": MODELS["dpo"]}
    answers = {name: read_lines(folder / "alignment" / name / "answers.jsonl") for name in names}
    lines = ["## 是非题 · Right and wrong", ""]
    lines += ["精调数据里故意有坏答案。The tuning data has bad answers on purpose.", ""]
    for number in range(0, len(answers["assistant"]), EVERY):
        lines += [f"**{clean(answers['assistant'][number]['Input'])}**", ""]
        lines += [f"- {label}: {clean(answers[name][number]['Output'])}" for name, label in names.items()]
        lines.append("")
    return lines


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clean(text: str) -> str:
    """On one line, marks of markdown as they are."""
    return " ".join(text.split()).replace("*", "\\*").replace("<", "&lt;") or "（空 empty）"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "output/demo"))
