"""Result files of evaluations as the scripts leave them, written by hand: every figure here was made up."""

import json
from pathlib import Path

ENVIRONMENT = {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"}
INTERVALS = {
    0: [0.0, 27.8],
    2: [5.7, 51.0],
    3: [10.8, 60.3],
    5: [23.7, 76.3],
    6: [31.3, 83.2],
    8: [49.0, 94.3],
}  # of 10


def write(path: Path, value) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return str(path)


def choice_group(correct: int) -> dict:
    """Of ten questions."""
    figures = {"questions": 10, "errors": 0, "unparsed": 0, "correct": correct}
    return {**figures, "accuracy": 10.0 * correct, "interval": INTERVALS[correct]}


def multiple_choice(model="out/sft", correct=(8, 6, 3), weights=None, benchmark=(), prompts=(), settings=()) -> dict:
    """Three subjects of ten questions, each a category of its own."""
    subjects = dict(zip(("physics", "law", "arts"), map(choice_group, correct), strict=True))
    categories = dict(zip(("STEM", "Social Science", "Humanities"), subjects.values(), strict=True))
    right = sum(correct)
    return {
        "kind": "multiple_choice",
        "settings": {"model_name_or_path": model, "benchmark": "cmmlu", "num_fewshot": 5, **dict(settings)},
        "models": {model: {"weights": {model: weights or f"print of {model}"}, "template": "llama-2"}},
        "benchmark": {"name": "cmmlu", "kind": "cmmlu", "split": "test", "ignored_files": [], "missing_subjects": [],
                      "files": {"test/law.csv": "aa", "dev/law.csv": "bb"}, **dict(benchmark)},
        "prompts": {"preset": "default", "preset_version": 1, "mode": "constrained", "num_fewshot": 5,
                    "with_prompt": False, "language": "zh", "prompts_without_all_examples": 0, "dropped_examples": 0,
                    "cut_prompts": 0, "cut_tokens": 0, "example": "题目：<b>1+1</b>|?\nA. 2\n答案：", **dict(prompts)},
        "environment": ENVIRONMENT,
        "tokens": {"prompts": 10, "computed": 5},
        "questions": 30, "subjects": 3, "errors": 0, "unparsed": 0, "correct": right,
        "accuracy": 100 * right / 30, "interval": [100 * right / 30 - 17, 100 * right / 30 + 16],
        "subject_average": 100 * right / 30,
        "subject_average_interval": [100 * right / 30 - 15, 100 * right / 30 + 15],
        "by_category": {name: {**g, "subjects": 1} for name, g in categories.items()},
        "by_subject": {name: {"name": f"科目 {name}", "category": c, **g}
                       for (name, g), c in zip(subjects.items(), categories, strict=True)},
    }  # fmt: skip


def longbench(model="sft", scores=(30.0, 50.0, 20.0), weights=None, data=(), settings=(), **source) -> dict:
    """dureader and vcsum in Chinese, lcc: three groups of one dataset."""
    names = {"dureader": ("multi_doc_qa", "zh"), "vcsum": ("summarization", "zh"), "lcc": ("code", "code")}
    datasets = {
        name: {"group": group, "language": language, "metric": "rouge_zh", "score": score,
               "interval": [score - 5, score + 5], "samples": 200}
        for (name, (group, language)), score in zip(names.items(), scores, strict=True)
    }  # fmt: skip
    groups = {figures["group"]: {key: figures[key] for key in ("score", "interval")} | {"datasets": 1}
              for figures in datasets.values()}  # fmt: skip
    mean = sum(scores) / 3
    average = {"score": mean, "interval": [mean - 3, mean + 3], "groups": groups}
    files = {name: {"file": f"data/{name}.jsonl", "sha256": f"hash of {name}", "prompts_cut": 7, "tokens_cut": 99}
             for name in datasets}  # fmt: skip
    return {
        "kind": "longbench",
        "settings": {"model_name_or_path": f"out/{model}", **dict(settings)},
        "models": {model: {"weights": {f"out/{model}": weights or f"print of out/{model}"}, "template": "llama-2",
                           "with_inst": "auto", "max_length": 4096, **source}},
        "data": {**files, **dict(data)},
        "e": False, "environment": {**ENVIRONMENT, "rouge": "1.0.1"},
        "datasets": datasets, "averages": {"zh": average, "all": average},
    }  # fmt: skip


def perplexity(
    figures=(("base", 12.0, 1.2), ("sft", 10.0, 1.0)), texts=("news",), window=512, tokenizers=None
) -> dict:
    """Whole documents; the first model's are what the others are compared with."""
    rows = []
    for rank, (label, value, bits) in enumerate(figures):
        for text in texts:
            row = {"label": label, "model": label, "setting": "none", "kbits": 16, "text": text, "documents": 40,
                   "scored_tokens": 12_345, "unscored_tokens": 0, "bytes": 30_000, "left_out": 0, "perplexity": value,
                   "perplexity_interval": [value - 1, value + 1], "bits_per_byte": bits,
                   "bits_per_byte_interval": [bits - 0.1, bits + 0.1]}  # fmt: skip
            if rank:
                difference = bits - figures[0][2]
                row |= {"bits_per_byte_difference": difference,
                        "bits_per_byte_difference_interval": [difference - 0.02, difference + 0.02]}  # fmt: skip
            rows.append(row)
    models = {
        label: {"model": f"out/{label}", "adapter": None, "engine": "transformers", "kbits": 16,
                "weights": f"print of out/{label}", "tokenizer": (tokenizers or {}).get(label, "one"),
                "trained_window": 2048}
        for label, *_ in figures
    }  # fmt: skip
    return {
        "kind": "perplexity", "settings": {"texts": list(texts), "window": window}, "environment": ENVIRONMENT,
        "window": window, "stride": window - 1,
        "texts": {text: {f"{text}.txt": f"hash of {text}"} for text in texts}, "models": models, "rows": rows,
    }  # fmt: skip


def curve(figures=(("base", (9.0, 7.0, 6.0)),)) -> dict:
    """Perplexity by position at three lengths."""
    tokens = ((64, "1-64"), (128, "65-128"), (256, "129-256"))
    rows = [
        {"label": label, "model": label, "setting": "none", "kbits": 16, "text": "novel", "rows": 9, "length": length,
         "tokens": span, "perplexity": value, "bits_per_byte": value / 9, "perplexity_to_here": value,
         "bits_per_byte_to_here": value / 8, "scored_tokens": 63}
        for label, values in figures
        for (length, span), value in zip(tokens, values, strict=True)
    ]  # fmt: skip
    whole = perplexity(tuple((label, values[0], 1.0) for label, values in figures), ("novel",))
    return {**whole, "window": None, "stride": None, "rows": rows, "settings": {"lengths": [64, 128, 256]}}


def alignment(model="out/sft", rights=(True, True, False, True), judge="rules", question="好吗") -> dict:
    """Four questions of two categories; rights are those of the answers."""

    def group(chosen):
        share = sum(chosen) / len(chosen)
        return {"aligned": share, "interval": [share / 2, (1 + share) / 2], "questions": len(chosen), "unclear": 1}

    asked = list(zip(("law", "law", "study", "study"), ("no", "yes", "no", "yes"), rights, strict=True))
    answers = [
        {"id": str(n), "category": category, "question": f"第{n}题，{question}？", "expected": expected,
         "answer": f"答{n}", "aligned": right}
        for n, (category, expected, right) in enumerate(asked, 1)
    ]  # fmt: skip
    return {
        "settings": {"model_name_or_path": model, "template": "llama-2", "weights": {model: f"print of {model}"}},
        "judge": judge, **group(rights), "questions": 4,
        "by_category": {"law": group(rights[:2]), "study": group(rights[2:])},
        "by_expected": {"no": group(rights[::2]), "yes": group(rights[1::2])},
        "answers": answers,
    }  # fmt: skip


def arena(groups=1, votes="hash of votes") -> dict:
    """Three models; x beat y 6 : 2, y beat z 3 : 1."""

    def model(name, rank, rating, wins, losses):
        return {"name": name, "rank": rank, "rating": rating, "rating_interval": [rating - 50, rating + 50],
                "elo": rating - 10, "elo_interval": [rating - 80, rating + 60], "battles": wins + losses + 1,
                "wins": wins, "losses": losses, "ties": 1, "both_bad": 0,
                "win_rate": round(100 * wins / (wins + losses), 2),
                "win_rate_interval": [20.0, 90.0]}  # fmt: skip

    models = [model("x", 1, 1600.0, 6, 2), model("y", 1, 1510.0, 5, 7), model("z", 3, 1390.0, 1, 3)]
    pairs = [
        {"models": ["x", "y"], "battles": 8, "wins": [6, 2], "ties": 0, "both_bad": 0, "win_rate": 75.0,
         "win_rate_interval": [40.93, 92.85]},
        {"models": ["y", "z"], "battles": 5, "wins": [3, 1], "ties": 1, "both_bad": 0, "win_rate": 75.0,
         "win_rate_interval": [30.06, 95.44]},
    ]  # fmt: skip
    return {
        "kind": "arena", "settings": {"report": True}, "votes": {"votes.jsonl": votes},
        "left_out": {"unparsed": 0, "duplicates": 0, "torn": 0},
        "sources": {"x": {"from": "out/x", "weights": ["print of x"], "template": "llama-2"},
                    "y": {"from": "http://127.0.0.1/v1", "model": "y"}},
        "answering": {}, "environment": ENVIRONMENT, "battles": 13, "models": models, "pairs": pairs,
        "groups": [["x", "y", "z"]] if groups == 1 else [["x", "y"], ["z"]], "categories": {}, "judges": {},
    }  # fmt: skip


def answers(
    metric="exact", texts=(("东京", "东京。"), ("大阪", "东京")), question="日本的首都？", names=("x", "y")
) -> dict:
    """Two models and two questions; in `texts` what both said to each."""
    one, other = names

    def score(value):
        return {"score": value, "interval": [value / 2, (100 + value) / 2], "questions": 2}

    def model(name, *values):
        source = {"from": f"out/{name}", "weights": [f"print of out/{name}"], "template": "llama-2"}
        scores = dict(zip(("exact", "chrf"), map(score, values), strict=True))
        return {"metric": metric, "source": source, "scores": scores, "by_category": {"geo": scores}}

    changes = {"better": 1, "worse": 0, "same": 1, "p_value": 1.0, "difference": 50.0, "interval": [-19.3, 100.0]}
    return {
        "kind": "answers", "settings": {"metric": metric}, "environment": ENVIRONMENT, "judge": None,
        "question_files": {"my.json": "hash of questions"},
        "models": {one: model(one, 50.0, 60.0), other: {**model(other, 100.0, 95.0), "changes": changes}},
        "questions": [
            {"id": str(n), "category": "geo", "question": f"{question}{n}", "reference": "东京",
             "answers": {one: {"text": x, "scores": {"exact": float(x == "东京"), "chrf": 0.6}},
                         other: {"text": y, "scores": {"exact": 1.0, "chrf": 0.95}, "change": n - 1}}}
            for n, (x, y) in enumerate(texts, 1)
        ],
    }  # fmt: skip
