"""Questions with choices, against lm-evaluation-harness on the same files: preset lm-eval, a small trained model.

LM_EVAL_PYTHON names a Python that has it, in an environment of its own: pip install torch==2.13.0, then lm_eval
(0.4.13 was used) transformers sentencepiece; without it the comparison is skipped. LM_EVAL_SUBJECTS: more subjects
than the few below, or "all" for the whole of CMMLU.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from support.models import tiny_llama
from support.paths import EXAMPLES
from utils.evaluation.multiple_choice.benchmarks import read_benchmark
from utils.evaluation.multiple_choice.prompts import ChoiceEncoder, ChoiceWriter
from utils.evaluation.multiple_choice.scorers import open_scorer
from utils.evaluation.multiple_choice.scoring import PrefixScorer
from utils.evaluation.multiple_choice.wordings import PRESETS
from utils.generation.engine import Prompter
from utils.generation.transformers_engine import TransformersEngine
from utils.text.tokenizer import encode_texts, load_tokenizer, save_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.shared_data]
SUBJECTS = ["college_actuarial_science", "elementary_chinese", "global_facts"]  # numbers, long texts, English names
TIE = 1e-4
# The harness's own tasks, their wording and subjects' names untouched; only the data come from local files.
HARNESS = """
import json, logging, sys
from pathlib import Path
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
folder, subjects = Path(sys.argv[1]), sys.argv[2:]
own = Path(lm_eval.__file__).parent / "tasks" / "cmmlu"
tasks = folder / "tasks"
tasks.mkdir()
for subject in subjects:
    files = {split: str(folder / f"{subject}_{split}.jsonl") for split in ("dev", "test")}
    (tasks / f"{subject}.yaml").write_text(json.dumps({
        "include": str(own / f"cmmlu_{subject}.yaml"), "task": f"local_{subject}", "dataset_path": "json",
        "dataset_name": None, "dataset_kwargs": {"data_files": files}}))
model = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=8)
found = lm_eval.simple_evaluate(model, tasks=[f"local_{name}" for name in subjects], num_fewshot=5,
    task_manager=TaskManager(include_path=str(tasks)), log_samples=True, bootstrap_iters=0)
out = {}
for subject in subjects:
    samples = sorted(found["samples"][f"local_{subject}"], key=lambda sample: sample["doc_id"])
    rows = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    prompts = [sample["arguments"] for sample in samples]
    texts = [p["gen_args_0"]["arg_0"] if isinstance(p, dict) else p[0][0] for p in prompts]
    out[subject] = {"logprobs": rows, "texts": texts, "acc": found["results"][f"local_{subject}"]["acc,none"]}
(folder / "harness.json").write_text(json.dumps(out))
"""


@pytest.fixture(scope="module")
def benchmark(shared_data):
    wanted = os.environ.get("LM_EVAL_SUBJECTS", " ".join(SUBJECTS))
    subjects = [] if wanted == "all" else wanted.split()
    return read_benchmark("cmmlu", str(shared_data / "eval" / "cmmlu"), subjects=subjects, num_examples=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_data, benchmark):
    """The questions as jsonl, and in model/ a small Llama that has learned a little, answers too."""
    folder = tmp_path_factory.mktemp("harness")
    for subject in benchmark.subjects:
        questions = [question for question in benchmark.questions if question.subject == subject]
        for split, rows in (("dev", benchmark.examples[subject]), ("test", questions)):
            lines = [
                {"Question": q.text, **dict(zip("ABCD", q.choices, strict=True)), "Answer": q.answer} for q in rows
            ]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / f"{subject}_{split}.jsonl").write_text(text, encoding="utf-8")
    train(folder / "model", shared_data, benchmark)
    return folder


def train(folder: Path, shared_data: Path, benchmark, steps=300, rows=8, length=64) -> None:
    # transformers' own reading of the merged vocabulary, which the harness uses, cuts Chinese otherwise than its
    # sentencepiece model; this one is cut alike by both.
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama2_32000")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048}
    model = tiny_llama(len(tokenizer), **sizes, tie_word_embeddings=True)
    texts = (EXAMPLES / "pretrain" / "zh_train.txt").read_text(encoding="utf-8").splitlines()[:1500]
    asked = [
        f"{q.text}\n" + "".join(f"{letter}. {choice}\n" for letter, choice in zip(q.letters, q.choices, strict=True))
        for examples in benchmark.examples.values()
        for q in examples
    ]
    answers = [q.answer for examples in benchmark.examples.values() for q in examples]
    texts += [f"{question}答案： {answer}\n\n" for question, answer in zip(asked, answers, strict=True)] * 20
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    stream = torch.tensor([token for ids in encode_texts(tokenizer, [texts[n] for n in order]) for token in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(0, len(stream) - length, (rows,), generator=draw)
        batch = torch.stack([stream[start : start + length] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 8.5  # a random one has ln(32000) = 10.4
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


@pytest.fixture(scope="module")
def harness(folder, benchmark):
    python = os.environ.get("LM_EVAL_PYTHON")
    if not python:
        pytest.skip("LM_EVAL_PYTHON names no Python with lm-evaluation-harness (see the top of this file)")
    script = folder / "harness.py"
    script.write_text(HARNESS, encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [python, str(script), str(folder), *benchmark.subjects],
        capture_output=True,
        text=True,
        env=os.environ | offline | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "harness.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scored(folder, benchmark):
    """Our prompts and scores, by subject."""
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    engine = TransformersEngine(model, load_tokenizer(folder / "model"), None)
    wording = PRESETS["lm-eval"].wording("cmmlu", "zh", "constrained", False)
    prompter = Prompter(engine.tokenizer, None, engine.context)
    encoder = ChoiceEncoder(ChoiceWriter(wording, "constrained", False), prompter)
    prompts = [
        encoder.encode(question, benchmark.subjects[question.subject], benchmark.examples[question.subject])
        for question in benchmark.questions
    ]
    try:
        scorer = open_scorer(engine)
        assert isinstance(scorer, PrefixScorer)
        scores = scorer.score([prompt.request for prompt in prompts])
    finally:
        engine.close()
    return list(zip(benchmark.questions, prompts, scores, strict=True))


def argmax(values):
    return max(range(len(values)), key=values.__getitem__)


def test_answers_and_scores_are_those_of_the_harness(harness, scored, benchmark):
    flips, total, spread = [], 0, set()
    for subject in benchmark.subjects:
        rows = [row for row in scored if row[0].subject == subject]
        theirs = harness[subject]
        assert [prompt.request.text for _, prompt, _ in rows] == theirs["texts"]
        right, flipped = 0, 0
        for (question, _, score), other in zip(rows, theirs["logprobs"], strict=True):
            assert list(score.logprobs) == pytest.approx(other, abs=TIE)
            mine, best = argmax(score.logprobs), argmax(other)
            right += question.letters[mine] == question.answer
            spread.add(mine)
            total += 1
            if mine != best:
                flipped += 1
                flips.append(
                    (question.location, other[best] - other[mine], score.logprobs[mine] - score.logprobs[best])
                )
        assert abs(right - theirs["acc"] * len(rows)) <= flipped + 1e-6, subject
    assert len(spread) > 1, "the model has learned one letter only: that compares nothing"
    assert all(max(gaps) < TIE for _, *gaps in flips), flips
    assert len(flips) <= 0.001 * total, f"{len(flips)} of {total}: {flips}"
    print(f"{total} questions, {len(benchmark.subjects)} subjects, {len(flips)} flips")
