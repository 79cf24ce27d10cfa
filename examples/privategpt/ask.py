"""Ask the documents that ingest.py has read; answers name the passages they come from. Nothing leaves this machine.

python examples/privategpt/ask.py --store output/privategpt.sqlite
python examples/privategpt/ask.py --question "李白是哪里人？" --chain_type refine --target_source_chunks 6
"""

import argparse
import sys
from collections.abc import Sequence

import openai
from client import add_server_flags, connect, embed
from store import Passage, Store

PROMPTS = {
    "zh": {
        "answer": "请只根据下面编了号的资料回答问题，并在用到的地方注明编号，如 [1]；资料里没有答案，就说不知道。\n\n"
        "{context}\n\n问题：{question}",
        "refine": "问题：{question}\n\n现有的回答：{answer}\n\n又找到一段资料：\n{context}\n\n"
        "请用它补充或改正现有的回答，并注明编号；没有帮助就照写现有的回答。",
    },
    "en": {
        "answer": "Answer the question from this numbered material only, and name the numbers where you use them, "
        "such as [1]; if the answer is not in it, say that you do not know.\n\n{context}\n\nQuestion: {question}",
        "refine": "Question: {question}\n\nAnswer so far: {answer}\n\nMore material:\n{context}\n\nComplete or "
        "correct the answer with it and name its number; if it does not help, write the same answer again.",
    },
}


def main(argv: Sequence[str] | None = None) -> str:
    """Answer --question, or what is typed until an empty line; returns the last answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="output/privategpt.sqlite", help="File that ingest.py wrote.")
    parser.add_argument("--question", help="Default: ask on the terminal.")
    parser.add_argument("--target_source_chunks", type=int, default=4, help="Passages that are read.")
    parser.add_argument("--chain_type", choices=("stuff", "refine"), default="stuff", help="All at once, or in turn.")
    parser.add_argument("--language", choices=("zh", "en"), default="zh", help="Language of the prompts.")
    parser.add_argument("-S", "--hide_source", action="store_true", help="Do not print the passages.")
    parser.add_argument("-M", "--mute_stream", action="store_true", help="Print answers when they are complete.")
    parser.add_argument("--max_tokens", type=int, default=400, help="Longest answer, in tokens.")
    add_server_flags(parser)
    args = parser.parse_args(argv)
    client, store = connect(args), Store(args.store)
    if not store.files():
        sys.exit(f"error: --store {args.store} holds no document; run ingest.py first")
    models = sorted({model for _, model in store.files().values()})
    if models != [args.model]:
        sys.exit(
            f"error: the store was made with {', '.join(models)}, the server has {args.model}; run ingest.py again"
        )
    answer = ""
    while question := args.question or input("\nQuestion: ").strip():
        passages = store.search(embed(client, args.model, [question])[0], args.target_source_chunks)
        answer = answer_question(client, args, question, passages)
        if not args.hide_source:
            print_sources(passages)
        if args.question:
            break
    return answer


def answer_question(
    client: openai.OpenAI, args: argparse.Namespace, question: str, passages: Sequence[Passage]
) -> str:
    """The answer, printed as it is written: the last one where several are made in turn."""
    prompts = PROMPTS[args.language]
    numbered = [f"[{number}] {passage.text}" for number, passage in enumerate(passages, 1)]
    if args.chain_type == "stuff":
        context = "\n\n".join(numbered)
        return write(client, args, prompts["answer"].format(context=context, question=question), shown=True)
    answer = write(
        client, args, prompts["answer"].format(context=numbered[0], question=question), shown=len(numbered) == 1
    )
    for number, context in enumerate(numbered[1:], 2):
        prompt = prompts["refine"].format(context=context, question=question, answer=answer)
        answer = write(client, args, prompt, shown=number == len(numbered))
    return answer


def write(client: openai.OpenAI, args: argparse.Namespace, prompt: str, shown: bool) -> str:
    """The model's answer to a prompt."""
    pieces = []
    stream = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=args.max_tokens,
        temperature=0.2,
        stream=True,
    )
    for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "" if chunk.choices else "")
        if shown and not args.mute_stream:
            print(pieces[-1], end="", flush=True)
    answer = "".join(pieces)
    if shown:
        print(answer if args.mute_stream else "")
    return answer


def print_sources(passages: Sequence[Passage]) -> None:
    """The passages by number, with their places."""
    for number, passage in enumerate(passages, 1):
        print(f"\n[{number}] {passage.file}, passage {passage.number}, similarity {passage.score:.2f}\n{passage.text}")


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        sys.exit("\n[left]")
    except openai.APIError as error:
        sys.exit(f"error: {error.message}")
