"""The OpenAI-style server under load: this one, `transformers serve`, and the bare model, in one run.

  python benchmarks/serving.py --tokenizer ../shared/data/tokenizers/chinese_llama2_55296
A Llama of 58M parameters with random weights, in bfloat16 where the machine computes in it, else in float32, the
same for all; 16 clients, each of which streams 64 greedy tokens after a prompt of its own. Servers are started anew
for each repetition, by turns, and asked several times. Also: chats of ten turns, where only what is new should be
computed; and, where llama-cpp-python is installed, the same model as a GGUF file, served with --engine llama.cpp and
asked through llama-cpp-python's own class in another process, question by question in turn. Ratios are taken within
a repetition, or a question, so that what a machine does differently later changes both sides.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

WORDS = tuple("天学中历城河音老孩工时朋生问世大经文山水")
PORT = 19400
OURS, ALONE, LLAMA_CPP, BINDING = (
    "openai_api_server.py",
    "one after another",
    "--engine llama.cpp, one after another",
    "no server: llama-cpp-python, one after another",
)
PLAIN = ["--repetition_penalty", "1"]  # none, as the others have none; the server's own default is 1.1
BARE = ("no server: generate", "no server: decoding loop")


def number_type() -> str:
    """What the machine computes fastest in, and the server chooses by itself."""
    from utils.models.loading import bf16_is_supported

    return "bfloat16" if bf16_is_supported() else "float32"


def make_model(folder: Path, tokenizer_folder: str | None) -> None:
    """A random Llama of 58M parameters with the tokenizer's rows."""
    import torch
    from models import random_llama

    from utils.text.prompts import CHAT_TEMPLATES
    from utils.text.tokenizer import load_tokenizer, save_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = CHAT_TEMPLATES["alpaca-2"]
    model = random_llama(
        tokenizer,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=9,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ).to(getattr(torch, number_type()))
    print(f"{model.num_parameters() / 1e6:.1f}M parameters, {len(tokenizer)} rows, {number_type()}", flush=True)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def make_gguf(folder: Path, path: Path) -> None:
    """The model as a GGUF file of 8 bits a weight."""
    from utils.gguf.file import plan_gguf, write_gguf
    from utils.lora.inputs import open_merge

    with open_merge(str(folder)) as inputs:
        plan = plan_gguf(inputs.model, inputs.config, inputs.tokenizer, "benchmark")
        write_gguf(plan, inputs.model, "Q8_0", path)


def questions(count: int, number: int = 0) -> list[str]:
    """Texts of about 64 tokens; those of another number, up to 20, begin with another word, so no cache has them."""
    return [
        WORDS[number] + "".join(WORDS[(7 * n + (3 + n) * place) % len(WORDS)] for place in range(47))
        for n in range(count)
    ]


# ---------------------------------------------------------------- a server and its clients


class Server:
    """A process that serves the model."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        with open(log, "ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        self.log = log

    def __enter__(self) -> "Server":
        import httpx

        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(0.2)
        raise SystemExit(f"the server did not start; see {self.log}:\n{self.log.read_text()[-2000:]}")

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


async def stream(client, url: str, model: str, messages: list[dict], tokens: int) -> tuple[float, float, str]:
    """Seconds to the first token, to the last, and the text."""
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": tokens, "temperature": 0.0}
    start = time.perf_counter()
    first, pieces = 0.0, []
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{url}: {response.status_code} {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            choices = json.loads(line[6:])["choices"]
            piece = choices[0]["delta"].get("content") if choices else None
            if piece:
                first = first or time.perf_counter() - start
                pieces.append(piece)
    return first, time.perf_counter() - start, "".join(pieces)


async def load(url: str, model: str, texts: list[str], tokens: int, together: bool) -> dict[str, float]:
    """All texts at once, or one after another: tokens a second, seconds to the first token."""
    import httpx

    async with httpx.AsyncClient(timeout=600) as client:
        await stream(client, url, model, [{"role": "user", "content": "你好"}], 4)  # warm-up
        asked = [stream(client, url, model, [{"role": "user", "content": text}], tokens) for text in texts]
        start = time.perf_counter()
        answers = list(await asyncio.gather(*asked)) if together else [await one for one in asked]
        seconds = time.perf_counter() - start
    lost = sum(not text for _, _, text in answers)
    firsts = sorted(first for first, _, _ in answers)
    return {
        "tokens_per_second": len(texts) * tokens / seconds,
        "first_median": statistics.median(firsts),
        "first_p95": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
        "slowest": max(whole for _, whole, _ in answers),
        "lost": lost,
    }


def load_in_rounds(args: argparse.Namespace, url: str, model: str, together: bool) -> dict[str, float]:
    """The round of median speed; alone, one round: it takes long."""
    rounds = [
        asyncio.run(load(url, model, questions(args.clients, number), args.tokens, together))
        for number in range(args.rounds if together else 1)
    ]
    rounds.sort(key=lambda result: result["tokens_per_second"])
    return {**rounds[len(rounds) // 2], "lost": sum(result["lost"] for result in rounds)}


async def chat(url: str, model: str, turns: int, number: int) -> list[float]:
    """Seconds to the first token of each turn of a conversation: an answer of one token, so that text which a token
    of a random model does not complete delays nothing. Then the turn's whole answer is asked for."""
    import httpx

    messages: list[dict] = []
    firsts = []
    async with httpx.AsyncClient(timeout=600) as client:
        for text in questions(turns, number):
            messages.append({"role": "user", "content": text})
            body = {"model": model, "messages": messages, "max_tokens": 1, "temperature": 0.0}
            start = time.perf_counter()
            (await client.post(f"{url}/v1/chat/completions", json=body)).raise_for_status()
            firsts.append(time.perf_counter() - start)
            _, _, answer = await stream(client, url, model, messages, 24)
            messages.append({"role": "assistant", "content": answer})
    return firsts


def commands(folder: Path, clients: int, port: int) -> dict[str, list[str]]:
    """How each server is started."""
    ours = [sys.executable, str(ROOT / "scripts" / OURS), "--base_model", str(folder), "--dtype", number_type()]
    ours += PLAIN
    theirs = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--device", "cpu"]
    theirs += ["--dtype", number_type(), "--port", str(port), "--host", "127.0.0.1"]
    return {
        OURS: [*ours, "--port", str(port), "--max_batch_size", str(clients)],
        "transformers serve": theirs,
        "transformers serve --continuous-batching": [*theirs, "--continuous-batching"],
    }


# ---------------------------------------------------------------- without a server


def bare(folder: Path, texts: list[str], tokens: int) -> dict[str, float]:
    """Tokens a second of transformers' batched generate, and of this project's decoding loop, without a server."""
    import torch
    from transformers import AutoModelForCausalLM

    from utils.core.arguments import GenerationArguments
    from utils.generation.batching import Generator
    from utils.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, number_type())).eval()
    generator = Generator(model, tokenizer, tokenizer.chat_template)
    prompts = [generator.encode([{"role": "user", "content": text}]) for text in texts]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationArguments(max_new_tokens=tokens, temperature=0.0, repetition_penalty=1.0)
    rates = {}
    for name in BARE:
        for count in (4, tokens):  # the first is a warm-up
            start = time.perf_counter()
            if name == BARE[0]:
                model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
                )
            else:
                settings.max_new_tokens = settings.min_new_tokens = count
                generator.generate(prompts, settings)
            rates[name] = len(prompts) * count / (time.perf_counter() - start)
    return rates


def answer_questions(path: Path, tokens: int) -> None:
    """Answer each line of standard input with llama-cpp-python's own class, streamed; print the seconds it took."""
    import llama_cpp
    import torch

    model = llama_cpp.Llama(str(path), n_ctx=2048, n_threads=torch.get_num_threads(), verbose=False)
    for line in sys.stdin:
        start = time.perf_counter()
        messages = [{"role": "user", "content": line.strip()}]
        for _ in model.create_chat_completion(messages, stream=True, max_tokens=tokens, temperature=0.0):
            pass
        print(time.perf_counter() - start, flush=True)


def compare_llama_cpp(args: argparse.Namespace, path: Path, log: Path) -> dict[str, dict[str, float]]:
    """A GGUF file behind the server, and in llama-cpp-python: the same questions, each asked here and then there."""
    command = [sys.executable, str(ROOT / "scripts" / OURS), "--base_model", str(path), "--engine", "llama.cpp"]
    command += [*PLAIN, "--port", str(PORT), "--max_batch_size", str(args.clients)]
    alone = [sys.executable, __file__, "--bare", str(path), "--tokenizer", args.tokenizer]
    alone += ["--tokens", str(args.tokens)]
    with (
        Server(command, PORT, log) as server,
        subprocess.Popen(alone, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as binding,
    ):
        firsts, served, plain = asyncio.run(ask_in_turn(args, server.url, path.name, binding))
    ratios = [one / other for one, other in zip(served, plain, strict=True)]
    return {
        LLAMA_CPP: {
            "tokens_per_second": args.tokens / statistics.median(served),
            "first_median": statistics.median(firsts),
            "slowest": max(served),
            "against_binding": statistics.median(ratios),
        },
        BINDING: {"tokens_per_second": args.tokens / statistics.median(plain)},
    }


async def ask_in_turn(
    args: argparse.Namespace, url: str, model: str, binding: "subprocess.Popen[str]"
) -> tuple[list[float], list[float], list[float]]:
    """Seconds to the server's first tokens and to its whole answers, and of the binding's answers."""
    import httpx

    assert binding.stdin is not None and binding.stdout is not None
    firsts, served, plain = [], [], []
    async with httpx.AsyncClient(timeout=600) as client:
        for number in range(1 + args.rounds):  # the first is a warm-up
            for text in questions(args.clients if number else 2, number):
                messages = [{"role": "user", "content": text}]
                first, seconds, _ = await stream(client, url, model, messages, args.tokens)
                binding.stdin.write(text + "\n")
                binding.stdin.flush()
                other = float(binding.stdout.readline())
                if number:
                    firsts.append(first)
                    served.append(seconds)
                    plain.append(other)
    binding.stdin.close()
    return firsts, served, plain


def run_bare(args: argparse.Namespace, model: Path) -> dict[str, dict[str, float]]:
    """What a fresh process of this script measures without a server."""
    command = [sys.executable, __file__, "--bare", str(model), "--tokenizer", args.tokenizer]
    command += ["--clients", str(args.clients), "--tokens", str(args.tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rates = json.loads(done.stdout.splitlines()[-1])
    return {name: {"tokens_per_second": rate} for name, rate in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="times each server is asked all questions, and chats")
    parser.add_argument("--only_ours", action="store_true", help="leave out the other servers")
    parser.add_argument("--bare", help=argparse.SUPPRESS)  # a fresh process of this script
    parser.add_argument("--no_record", action="store_true", help="do not write benchmarks/RESULTS.md")
    args = parser.parse_args()
    texts = questions(args.clients)
    if args.bare:
        model = Path(args.bare)
        if model.is_dir():
            print(json.dumps(bare(model, texts, args.tokens)))
        else:
            answer_questions(model, args.tokens)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, log = Path(scratch) / "model", Path(scratch) / "server.log"
        make_model(folder, args.tokenizer)
        gguf = Path(scratch) / "model.gguf" if importlib.util.find_spec("llama_cpp") else None
        if gguf:
            make_gguf(folder, gguf)
        rows: dict[str, list[dict[str, float]]] = {}
        chats: list[list[float]] = []
        for repeat in range(args.repeats):
            for number, (name, command) in enumerate(commands(folder, args.clients, PORT).items()):
                if args.only_ours and number:
                    continue
                with Server(command, PORT, log) as server:
                    served = str(folder) if number else folder.name
                    results = {name: load_in_rounds(args, server.url, served, together=True)}
                    if not number:
                        results[ALONE] = load_in_rounds(args, server.url, served, together=False)
                        chats += [asyncio.run(chat(server.url, served, 10, turn)) for turn in range(2 * args.rounds)]
                note(rows, repeat, results)
            note(rows, repeat, run_bare(args, folder))
            if gguf:
                note(rows, repeat, compare_llama_cpp(args, gguf, log))
    report(args, rows, chats)


def note(rows: dict[str, list[dict[str, float]]], repeat: int, results: dict[str, dict[str, float]]) -> None:
    for name, result in results.items():
        rows.setdefault(name, []).append(result)
        print(f"{repeat + 1}. {name}: {result}", flush=True)


def report(args: argparse.Namespace, rows: dict[str, list[dict[str, float]]], chats: list[list[float]]) -> None:
    """Print the medians over the repetitions, and record them."""

    def median(name: str, key: str) -> float:
        return statistics.median(result.get(key, float("nan")) for result in rows[name])

    lines = [
        f"{args.clients} clients, {args.tokens} tokens each, {number_type()}; medians of {args.repeats} repetitions "
        f"of {args.rounds} rounds. In brackets: each repetition's own ratio.",
        "",
        "| | tokens/s | first token, median s | p95 s | slowest answer s | lost |",
        "|---|---|---|---|---|---|",
    ]
    for name in rows:
        figures = [median(name, key) for key in ("first_median", "first_p95", "slowest", "lost")]
        cells = [f"{median(name, 'tokens_per_second'):.0f}", *(f"{f:.2f}" for f in figures[:3]), f"{figures[3]:.0f}"]
        lines.append(f"| {name} | " + " | ".join(cell.replace("nan", "") for cell in cells) + " |")

    def ratio(name: str, key: str = "tokens_per_second") -> str:
        """This server against another, within each repetition: the median, and all."""
        found = [ours[key] / other[key] for ours, other in zip(rows[OURS], rows[name], strict=True)]
        return f"{statistics.median(found):.2f} x ({', '.join(f'{one:.2f}' for one in sorted(found))})"

    other = "transformers serve --continuous-batching"
    lines += ["", f"Together against one after another: {ratio(ALONE)}."]
    if other in rows:
        lines.append(f"Against `{other}`: {ratio(other)}; time to the first token: {ratio(other, 'first_median')}.")
    lines += [f"Against `{name}`: {ratio(name)}." for name in BARE]
    if LLAMA_CPP in rows:
        costs = [result["against_binding"] for result in rows[LLAMA_CPP]]
        lines.append(
            f"An answer of `{LLAMA_CPP}` takes {statistics.median(costs):.3f} x the time of `{BINDING}`, question by "
            f"question ({', '.join(f'{one:.3f}' for one in sorted(costs))})."
        )
    turns = [statistics.median(chat[turn] for chat in chats) for turn in range(10)]
    lines.append(
        f"First token of a chat's turns 2 and 10, of {len(chats)} chats: {turns[1] * 1000:.0f} and "
        f"{turns[9] * 1000:.0f} ms, {turns[9] / turns[1]:.2f} x."
    )
    print("\n".join(lines))
    if not args.no_record:
        from record import describe_run, record

        record("Serving", "\n".join([describe_run("torch", "transformers", "fastapi"), "", *lines]))


if __name__ == "__main__":
    main()
