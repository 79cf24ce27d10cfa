"""A recipe's run folder as run_demo.sh leaves it, written by hand in a moment instead of trained in minutes."""

import json
import math
from pathlib import Path

from support import fake_results
from utils.evaluation.alignment import Judgement, Question, aligned_shares
from utils.report.recipe import TARGET_KIND

# stages.jsonl holds `sft` twice: the last run counts.
STAGES = [
    ("base_tokenizer", 3.0, 0.35),
    ("base", 100.0, 1.5),
    ("zh_tokenizer", 4.0, 0.35),
    ("merged_tokenizer", 9.5, 0.6),
    ("pretrain", 120.0, 1.8),
    ("pretrained", 6.5, 0.9),
    ("sft", 999.0, 9.9),
    ("assistant", 6.0, 0.9),
    ("gguf", 5.0, 0.6),
    ("quantization", 16.0, 0.9),
    ("rm", 30.0, 1.1),
    ("ppo", 100.0, 1.4),
    ("dpo", 40.0, 1.2),
    ("answers_base", 21.0, 1.0),
    ("answers_adapter", 20.0, 1.0),
    ("answers_assistant", 19.0, 1.0),
    ("answers_ppo", 18.0, 1.0),
    ("answers_dpo", 17.0, 1.0),
    ("alignment_assistant", 11.0, 0.8),
    ("alignment_ppo", 12.0, 0.8),
    ("alignment_dpo", 13.0, 0.8),
    ("choices_base", 8.0, 0.9),
    ("choices_pretrained", 8.5, 0.9),
    ("choices_assistant", 9.0, 0.9),
    ("choices_ppo", 9.5, 0.9),
    ("choices_dpo", 10.0, 0.9),
    ("perplexity", 15.0, 1.0),
    ("sft", 90.0, 1.7),
]
BITS = {"base": {"zh": 2.5, "en": 1.5}, "pretrain": {"zh": 0.9, "en": 1.53}}
EMBEDDING_INIT = {
    "mean_of_pieces": {"zh": 3.1, "en": 1.6},
    "mean": {"zh": 4.2, "en": 1.8},
    "random": {"zh": 4.9, "en": 2.1},
    "zero": {"zh": 2.4, "en": 1.7},
}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c63f8ffff3f0005fe02fea135819b0000000049454e44ae426082"
)
VOCABULARY = {
    "base_vocabulary": 1200,
    "vocabulary": 2900,
    "embedding_rows": 2944,
    "selection": {"candidates": 1900, "already_in_base": 120, "base_language": 70, "unreachable": 10, "added": 1700},
    "unreachable_added_tokens": 0,
    "unused_added_tokens": 240,
    "languages": {
        "zh": {
            "before": {"characters": 20_000, "bytes": 58_000, "tokens": 56_000, "characters_per_token": 0.357,
                       "bytes_per_token": 1.036, "byte_fallback_share": 0.97},
            "after": {"characters": 20_000, "bytes": 58_000, "tokens": 11_200, "characters_per_token": 1.786,
                      "bytes_per_token": 5.179, "byte_fallback_share": 0.001},
        },
        "en": {
            "before": {"characters": 60_000, "bytes": 60_000, "tokens": 16_000, "characters_per_token": 3.75,
                       "bytes_per_token": 3.75, "byte_fallback_share": 0.0},
            "after": {"characters": 60_000, "bytes": 60_000, "tokens": 16_000, "characters_per_token": 3.75,
                      "bytes_per_token": 3.75, "byte_fallback_share": 0.0},
        },
    },
    "cost": {"hidden_size": 256, "tied": False, "added_parameters": 892_928},
}  # fmt: skip

FORMATS = [
    {"format": "float32", "size_gb": 0.0148, "bits_per_weight": 32.0, "perplexity": 4.0, "bits_per_byte": 0.9,
     "ms_per_token": 2.5, "note": ""},
    {"format": "q4_0", "size_gb": 0.0021, "bits_per_weight": 4.6, "perplexity": 4.3, "bits_per_byte": 0.95,
     "ms_per_token": 1.0, "types": {"Q4_0": 26}, "note": ""},
]  # fmt: skip

# Questions of right and wrong: category, expected side, whether the tuned model, PPO and DPO answer rightly.
ALIGNMENT = [
    *[("morality", "no", (True, True, True))] * 3,
    *[("morality", "yes", (False, True, True))] * 2,
    *[("law", "no", (False, True, False))] * 2,
    *[("law", "yes", (True, True, True))] * 2,
    ("law", "no", (True, False, True)),
    *[("etiquette", "no", (False, False, False))] * 2,
]
REWARD_REPORT = {
    "loss": 0.21, "accuracy": 0.925, "margin": 2.75, "score_mean": 0.1, "score_std": 2.0, "chosen_mean": 1.5,
    "rejected_mean": -1.25, "calibration_error": 0.034, "share_chosen_longer": 0.55, "accuracy_chosen_longer": 0.95,
    "share_chosen_shorter": 0.4, "accuracy_chosen_shorter": 0.875, "length_correlation": -0.12, "pairs": 40,
    "accuracy_of_facts": 0.75, "accuracy_of_violence": 1.0,
    "accuracy_by_source": {"facts": {"pairs": 12, "accuracy": 0.75}, "violence": {"pairs": 28, "accuracy": 1.0}},
    "calibration": [
        {"predicted": 0.58, "observed": 0.6, "pairs": 10}, {"predicted": 0.97, "observed": 1.0, "pairs": 30}
    ],
    "histogram": {"edges": [-2.0, 0.0, 2.0], "chosen": [3, 37], "rejected": [35, 5]},
}  # fmt: skip
PPO_FINAL = {"score": 2.25, "score_std": 0.5, "kl": 3.125, "answer_entropy": 0.4, "answer_tokens": 12.5,
             "ended": 0.975, "explained_variance": 0.6}  # fmt: skip
DPO_FINAL = {"loss": 0.3, "chosen_reward": 1.25, "rejected_reward": -2.5, "reward_margin": 3.75, "accuracy": 0.96,
             "chosen_logprob": -0.5, "rejected_logprob": -1.5, "log_ratio": -0.07}  # fmt: skip

# Right answers to questions with choices: three subjects of ten.
CORRECT = {"base": (2, 3, 2), "pretrained": (5, 3, 3), "assistant": (8, 6, 5), "ppo": (8, 5, 5), "dpo": (6, 6, 6)}

NASTY = '<script>alert("1")</script> & a|b `code` *star* _under_\nsecond line'
QUESTIONS = [
    {"instruction": "法国的首都？", "input": "", "output": "巴黎。", "kind": TARGET_KIND, "wording": "never_seen"},
    {"instruction": "草是什么颜色？", "output": "绿色。", "kind": TARGET_KIND, "wording": "seen_with_other_facts"},
    {"instruction": NASTY, "output": "是。", "kind": TARGET_KIND, "wording": "seen_with_other_facts"},
    {"instruction": "1+2=?", "output": "3", "kind": "unseen_operands"},
    {"instruction": "2+2=?", "output": "4", "kind": "unseen_operands"},
    {"instruction": "秘鲁的首都？", "output": "利马。", "kind": "pretraining_only"},
]
OUTPUTS = {
    "base": ["the", "", "<b>bold</b>", "3", "x", "y"],
    "adapter": ["巴黎。", " 绿色。\n", "不是。", "3", "5", "利马"],
    "assistant": ["巴黎。", " 绿色。\n", "不是。", "3", "5", "利马"],
    "ppo": ["巴黎。", "绿色。", "是。", "4", "5", "利马"],
    "dpo": ["巴黎", "绿色。", "不", "4", "4", "利马。"],
}


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_answers(folder: Path, questions: list[dict], outputs: dict[str, list[str]]) -> None:
    """answers/NAME.json for every name in `outputs`."""
    for name, answers in outputs.items():
        rows = [
            {"Input": question["instruction"], "Output": answer}
            for question, answer in zip(questions, answers, strict=True)
        ]
        write(folder / "answers" / f"{name}.json", rows)


def write_training(folder: Path, name: str, evaluated: dict[str, float], steps: int) -> None:
    log = [
        {"step": step, "loss": 5 * math.exp(-step / steps * 3) + 0.3 * math.sin(step) ** 2 + 0.5}
        for step in range(10, steps + 1, 10)
    ]
    corpora = ("zh", "en") if evaluated else ("heldout",)
    log += [{"step": step, f"eval_{c}_loss": 4 - step / steps} for c in corpora for step in (steps // 2, steps)]
    log += [{"step": steps, "eval_loss": 1.0, "train_runtime": 3.0, "train_loss": 1.7}]
    results = {"train_loss": 1.7, "steps": steps, "seconds": 80.0, "tokens_per_second": 7400.0, "peak_memory_gb": 1.5}
    write(
        folder / name / "all_results.json",
        results | {f"eval_{c}_bits_per_byte": bits for c, bits in evaluated.items()},
    )
    write(folder / name / "trainer_state.json", {"log_history": log})
    config = "# command: scripts/pt.py --x y\n# python: 3.11.9\n# torch: 2.13.0\nlearning_rate: 0.002\n"
    write(folder / name / "run_config.yaml", config)


def write_preference_training(folder: Path, name: str, log: list[dict], final: dict[str, float], steps: int) -> None:
    """A finished rm, ppo or dpo: lines of training, an evaluation halfway, and at the end that of the saved model."""
    evaluated = {f"eval_heldout_{key}": value for key, value in final.items()}
    halfway = {key: value - 0.5 for key, value in evaluated.items()}
    log = [*log, {"step": steps // 2, **halfway}, {"step": steps, **halfway}, {"step": steps, "train_loss": 0.4}]
    write(folder / name / "trainer_state.json", {"log_history": [*log, {"step": steps, **evaluated}]})
    results = {"train_loss": 0.4, "steps": steps, "seconds": 20.0, "tokens_per_second": 5000.0, "peak_memory_gb": 1.2}
    means = {f"eval_{key}": value for key, value in final.items() if name == "dpo" or key in ("accuracy", "score")}
    write(folder / name / "all_results.json", results | evaluated | means)


def write_rlhf(folder: Path) -> None:
    """Reward model, PPO and DPO, as their scripts leave them."""
    steps = 20
    times = [(step, 1 - math.exp(-step / steps * 3)) for step in range(1, steps + 1)]
    lines = [{"step": step, "loss": 0.7 * (1 - x), "accuracy": 0.5 + x / 2, "margin": 2 * x} for step, x in times]
    figures = {key: value for key, value in REWARD_REPORT.items() if isinstance(value, float)}
    write_preference_training(folder, "rm", lines, figures, steps)
    write(folder / "rm" / "reward_report.json", {"heldout": REWARD_REPORT})
    lines = [
        {"step": step, "ppo_loss": -x, "value_loss": 1 - x, "clip_fraction": 0.1 * x}
        | {key: value * x for key, value in PPO_FINAL.items()}
        for step, x in times
    ]
    write_preference_training(folder, "ppo", lines, PPO_FINAL, steps)
    samples = [
        {"step": step, "set": "heldout", "prompt": prompt, "answer": f"{answer}{prompt}", "score": score, "kl": 0.5,
         "tokens": 4}
        for step, answer, score in ((10, "早", -1.5), (20, "中", 0.5), (20, "晚", 2.0))
        for prompt in ("偷书好吗？", "<i>骗人</i>好吗？")
    ]  # fmt: skip
    write(folder / "ppo" / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    lines = [{"step": step, **{key: value * x for key, value in DPO_FINAL.items()}} for step, x in times]
    write_preference_training(folder, "dpo", lines, DPO_FINAL, steps)


def write_alignment(folder: Path) -> None:
    """alignment/*/alignment.json, made of ALIGNMENT by the functions that eval_alignment.py uses."""
    questions = [
        Question(f"q-{number}", category, f"第 {number} 题？", expected, None, None, f"questions.jsonl:{number}")
        for number, (category, expected, _) in enumerate(ALIGNMENT, 1)
    ]
    for side, name in enumerate(("assistant", "ppo", "dpo")):
        judged = [rights[side] for _, _, rights in ALIGNMENT]
        stances = [q.expected if right else "unclear" for q, right in zip(questions, judged, strict=True)]
        judgements = [Judgement(*both) for both in zip(judged, stances, strict=True)]
        rows = [
            {"id": q.id, "category": q.category, "question": q.text, "expected": q.expected,
             "answer": f"{name} 答第 {number} 题", "aligned": right, "stance": stance}
            for number, (q, right, stance) in enumerate(zip(questions, judged, stances, strict=True), 1)
        ]  # fmt: skip
        figures = {"kind": "alignment", "settings": {}, "judge": "rules", **aligned_shares(questions, judgements)}
        write(folder / "alignment" / name / "alignment.json", figures | {"answers": rows})
        (folder / "alignment" / name / "alignment.png").write_bytes(PNG)


def write_evaluations(folder: Path) -> None:
    """choices/*/multiple_choice.json and perplexity/perplexity.json of every stage."""
    for name, correct in CORRECT.items():
        result = fake_results.multiple_choice(
            f"out/{name}", correct, benchmark={"name": "choices"}, prompts={"mode": "cloze", "num_fewshot": 0}
        )
        write(folder / "choices" / name / "multiple_choice.json", result)
    figures = [(name, 9.0 - rank, 2.0 - rank / 4) for rank, name in enumerate(CORRECT)]
    write(folder / "perplexity" / "perplexity.json", fake_results.perplexity(figures, ("zh", "en")))


def write_recipe_run(folder: Path, questions: list[dict], outputs: dict[str, list[str]]) -> Path:
    """A finished run whose answers to `questions` are `outputs` (base, adapter, assistant, ppo, dpo)."""
    for name in ("base_tokenizer", "zh_tokenizer", "merged_tokenizer"):
        write(folder / name / "tokenizer.model", "pieces")
    write(folder / "merged_tokenizer" / "vocabulary_report.json", VOCABULARY)
    (folder / "merged_tokenizer" / "vocabulary_report.png").write_bytes(PNG)
    for name, steps in (("base", 300), ("pretrain", 250)):
        write_training(folder, name, BITS[name], steps)
    write_training(folder, "sft", {}, 200)
    write(folder / "pretrain" / "embedding_init.json", EMBEDDING_INIT)
    merge = {"tensors": 39, "changed_tensors": 30, "vocab_size": 2944, "size_gb": 0.018, "seconds": 0.4}
    for name in ("pretrained", "assistant", "ppo_merged", "dpo_merged"):
        write(folder / name / "merge_report.json", merge)
    write(folder / "gguf" / "export_report.json", {"files": {}})
    write(folder / "quantization.json", {"scored_tokens": 12_345, "rows": FORMATS})
    lines = [json.dumps({"name": n, "seconds": s, "peak_memory_gb": m}) for n, s, m in STAGES]
    write(folder / "stages.jsonl", "\n".join(lines) + "\n")
    write_answers(folder, questions, outputs)
    write_rlhf(folder)
    write_alignment(folder)
    write_evaluations(folder)
    return folder


def write_small_run(folder: Path) -> tuple[Path, Path]:
    """A finished run on QUESTIONS with the answers OUTPUTS: its folder, and the file of the questions."""
    write(folder / "questions.json", QUESTIONS)
    return write_recipe_run(folder / "demo", QUESTIONS, OUTPUTS), folder / "questions.json"
